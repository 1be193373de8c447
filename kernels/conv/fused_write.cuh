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
    bool relu;
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

/* The output of a position, its group's first channel; NULL: there is none. */
template <typename T>
__device__ __forceinline__ T *output_at(const fused_tiles &p, int position, const tile &t)
{
    int row = quotient(position, p.by_wq), image = quotient(row, p.by_hq);
    int j = position - row * static_cast<int>(p.by_wq.d), m = row - image * static_cast<int>(p.by_hq.d);
    if (image >= p.n || m >= p.ho || j >= p.wo)
        return nullptr;
    return static_cast<T *>(p.y) + image * p.y_image + m * p.y_row + j * p.y_col + t.group * p.y_group;
}

/* One row of accumulators, those of `d` at [4 b + 2 half + 0, 1]. */
template <typename T, int BN>
__device__ __forceinline__ void write_row(const fused_tiles &p, const float (&d)[BN / 2], int half,
                                          int position, const tile &t)
{
    constexpr int V = 16 / sizeof(T);
    T *y = output_at<T>(p, position, t);
    if (y == nullptr)
        return;
    const float *bias = p.bias ? p.bias + t.group * p.cog : nullptr;
#pragma unroll
    for (int i = 0; i < BN / (4 * V); ++i) {
        int c = t.channel + i * 4 * V + (threadIdx.x & 3) * V;
        float v[V];
#pragma unroll
        for (int k = 0; k < V; ++k)
            v[k] = d[4 * (i * V / 2 + k / 2) + 2 * half + (k & 1)];
        if (bias || p.relu)
#pragma unroll
            for (int k = 0; k < V; ++k)
                v[k] = conv_finish(v[k], c + k < p.cog ? bias : nullptr, c + k, p.relu);
        if (p.y_channel == 1 && p.cog % V == 0) {
            if (c < p.cog)
                *reinterpret_cast<uint4 *>(y + c) = pack(v, T());
        } else {
#pragma unroll
            for (int k = 0; k < V; ++k)
                if (c + k < p.cog)
                    y[(c + k) * p.y_channel] = static_cast<T>(v[k]);
        }
    }
}

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

} // namespace

#endif
