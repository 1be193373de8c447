/* What both kernels of the fused convolution share: where a tile lies, turns in a ring, writing outputs. */
#ifndef LTN_CONV_FUSED_WRITE_CUH
#define LTN_CONV_FUSED_WRITE_CUH

#include "kernels/conv/conv.cuh"
#include "kernels/conv/hopper.cuh"

namespace
{

constexpr int kGroup = 128; /* threads of a warpgroup */

/* Outputs and tiles. Positions run through images of by_hq rows of by_wq; those with row < ho, column < wo
 * are outputs. */
struct fused_tiles {
    void *y;
    const float *bias;
    int64_t y_image, y_row, y_col, y_channel, y_group; /* elements */
    conv_divisor by_wq, by_hq, by_n_tiles, by_m_tiles;
    int n, ho, wo, cog;
    int tiles, tile_rows;
    bool relu, whole; /* whole: channels are neighbours, and come in whole units of 16 bytes */
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ int quotient(int n, const conv_divisor &d)
{
    return static_cast<int>(divide(static_cast<uint32_t>(n), d));
}

struct tile {
    int first;   /* position */
    int channel; /* of the group */
    int n_tile, group;
};

__device__ __forceinline__ tile tile_at(const fused_tiles &p, int index, int bn)
{
    tile t;
    int rest = quotient(index, p.by_n_tiles);
    t.n_tile = index - rest * static_cast<int>(p.by_n_tiles.d);
    t.group = quotient(rest, p.by_m_tiles);
    int m = rest - t.group * static_cast<int>(p.by_m_tiles.d);
    t.first = m * p.tile_rows;
    t.channel = t.n_tile * bn;
    return t;
}

/* Place in a ring, and the parity of the barrier's phase. */
struct turn {
    int at = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void next(int size)
    {
        if (++at == size) {
            at = 0;
            phase ^= 1;
        }
    }
    __device__ __forceinline__ void skip(int n, int size)
    {
        at += n;
        for (; at >= size; at -= size)
            phase ^= 1;
    }
};

/* ---- writing ---- */

__device__ __forceinline__ uint32_t pack(float a, float b)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&v);
}

__device__ __forceinline__ uint4 pack(const float (&v)[8], __nv_bfloat16)
{
    return make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
}

__device__ __forceinline__ uint4 pack(const float (&v)[4], float)
{
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                      __float_as_uint(v[3]));
}

/* Without a branch: a branch for each store costs more than the store. */
__device__ __forceinline__ void store_if(bool wanted, void *p, uint4 v)
{
    asm volatile("{\n"
                 ".reg .pred wanted;\n"
                 "setp.ne.s32 wanted, %0, 0;\n"
                 "@wanted st.global.v4.b32 [%1], {%2, %3, %4, %5};\n"
                 "}\n" ::"r"(static_cast<int>(wanted)),
                 "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

/* The output of a position, a channel of its group; NULL: there is none. */
template <typename T>
__device__ __forceinline__ T *output_at(const fused_tiles &p, int position, const tile &t, int channel)
{
    int row = quotient(position, p.by_wq), image = quotient(row, p.by_hq);
    int j = position - row * static_cast<int>(p.by_wq.d), m = row - image * static_cast<int>(p.by_hq.d);
    if (image >= p.n || m >= p.ho || j >= p.wo)
        return nullptr;
    return static_cast<T *>(p.y) + image * p.y_image + m * p.y_row + j * p.y_col + t.group * p.y_group +
           channel * p.y_channel;
}

/* Bias and ReLU, in place. first: the thread's first channel. */
template <typename T, int BN, int MT>
__device__ __forceinline__ void finish_tile(const fused_tiles &p, float (&acc)[MT][BN / 2], int first,
                                            const tile &t)
{
    constexpr int V = 16 / sizeof(T);
    const float *bias = p.bias ? p.bias + t.group * p.cog : nullptr;
#pragma unroll
    for (int i = 0; i < BN / (4 * V); ++i)
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const int c = first + i * 4 * V + k;
            const float b = bias && c < p.cog ? __ldg(bias + c) : 0;
#pragma unroll
            for (int r = 0; r < 2 * MT; ++r) {
                float &v = acc[r / 2][4 * (i * V / 2 + k / 2) + 2 * (r & 1) + (k & 1)];
                v += b;
                if (p.relu && v < 0)
                    v = 0;
            }
        }
}

/* The warpgroup's accumulators: a thread's are of positions `position`, 8 on, 64 on, 72 on ..., those of the
 * first at [4 b + 0, 1], of the second at [4 b + 2, 3]. What goes to memory as it is takes few instructions,
 * for they are what this costs. */
template <typename T, int BN, int MT>
__device__ __forceinline__ void write_tile(const fused_tiles &p, float (&acc)[MT][BN / 2], int position,
                                           const tile &t)
{
    constexpr int V = 16 / sizeof(T);
    const int first = t.channel + (threadIdx.x & 3) * V, own = p.cog - first;
    if (p.bias || p.relu)
        finish_tile<T, BN, MT>(p, acc, first, t);
    T *y[2 * MT];
#pragma unroll
    for (int r = 0; r < 2 * MT; ++r)
        y[r] = output_at<T>(p, position + r / 2 * 64 + (r & 1) * 8, t, first);
    if (p.whole) {
#pragma unroll
        for (int r = 0; r < 2 * MT; ++r)
#pragma unroll
            for (int i = 0; i < BN / (4 * V); ++i) {
                float v[V];
#pragma unroll
                for (int k = 0; k < V; ++k)
                    v[k] = acc[r / 2][2 * i * V + k / 2 * 4 + 2 * (r & 1) + (k & 1)];
                store_if(y[r] && i * 4 * V < own, y[r] + i * 4 * V, pack(v, T()));
            }
    } else {
#pragma unroll
        for (int r = 0; r < 2 * MT; ++r)
#pragma unroll
            for (int i = 0; i < BN / (4 * V); ++i)
#pragma unroll
                for (int k = 0; k < V; ++k)
                    if (y[r] && i * 4 * V + k < own)
                        y[r][(i * 4 * V + k) * p.y_channel] =
                            static_cast<T>(acc[r / 2][2 * i * V + k / 2 * 4 + 2 * (r & 1) + (k & 1)]);
    }
}

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

} // namespace

#endif
