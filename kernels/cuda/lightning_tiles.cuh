/* What the warpgroups of lightning_hopper.cu share: the layout of their shared memory, and work on its tiles.
 */
#ifndef LTN_LIGHTNING_TILES_CUH
#define LTN_LIGHTNING_TILES_CUH

#include "kernels/cuda/lightning_plan.cuh"

namespace
{

constexpr int kTile = 64;             /* value columns per item */
constexpr int kBox = kChunk * 64 * 2; /* bytes of a [64, 64] bf16 tile */
constexpr int kGroup = 128;           /* threads of a warpgroup */
constexpr int kBlock = 3 * kGroup;

/* E: value columns of a head. TURNED: q and k come turned by LRPE, [.., 2 E] f16 in units of kTurnScale, and
 * the state's registers are in units of its square. GATED: outputs are multiplied by a gate on their way out.
 */
template <int E, bool TURNED, bool GATED> struct layout {
    static constexpr bool kTurned = TURNED, kGated = GATED;
    static constexpr int kE = E, kD = TURNED ? 2 * E : E;
    static constexpr int kTiles = E / kTile;
    static constexpr int kHalves = kD / 64; /* [64, 64] parts of q, k or a published state */
    static constexpr int kStages = kD == 256 ? 2 : kD == 128 ? 4 : 7;
    static constexpr int kSlots =
        GATED && kD < 256 ? 4 : 2;              /* outputs on their way out, gates on theirs in */
    static constexpr int kKey = kHalves * kBox; /* bytes of q or k; of one published state too */
    static constexpr int kStage = 2 * kKey + kBox;
    static constexpr int kStates = kStages * kStage;
    static constexpr int kOut = kStates + 2 * kKey;
    static constexpr int kSmall = kOut + kSlots * kBox;
    static constexpr int kBytes = kSmall + 1024 + 1024; /* small things, and slack to align the base */
    static constexpr float kQ = TURNED ? kTurnScale : 1.0f;
    static constexpr float kS = kQ * kQ;
};

struct alignas(16) small_shared {
    uint64_t full[8], empty[8];     /* ring of stages */
    uint64_t s_full[2], s_empty[2]; /* published states */
    uint64_t gate[4][4];            /* of a warp: gates of 16 rows in a slot */
    float power[72];                /* output group: exp(-s i), i = 0..64 */
    float4 scale[2];                /* TURNED: what 16 columns of a published state are to be multiplied by */
    float weight[kChunk]; /* state group: of the chunk's row i in the state, exp(-s (m-1-i)); 0 from m on */
};
static_assert(sizeof(small_shared) <= 1024, "small things must fit");

struct tensor_maps {
    CUtensorMap q, k, v, o, gate;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Barrier of one warpgroup (ids from 1; 0 is __syncthreads). */
__device__ __forceinline__ void group_sync(int id)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kGroup) : "memory");
}

/* The kernel before may run until here: each group makes its tables first, which take slopes alone. */
__device__ __forceinline__ void await_previous()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

/* Descriptors of tiles here. Rows along the matrix's own M or N, columns along the sum ("K-major"): 8-row
 * groups are 1024 bytes apart. Rows along the sum ("MN-major"): likewise, and blocks of 64 columns lie kBox
 * apart. */
__device__ __forceinline__ uint64_t descriptor(uint32_t address)
{
    return matrix_descriptor(address, kBox);
}

/* Keeps the compiler from moving uses of registers across the asynchronous products. */
template <int N> __device__ __forceinline__ void pin(float (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; ++i)
        asm volatile("" : "+f"(x[i])::"memory");
}

template <int N> __device__ __forceinline__ void pin(uint32_t (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; ++i)
        asm volatile("" : "+r"(x[i])::"memory");
}

/* Stores an f32 accumulator [64, 8 N/4] as a swizzled bf16 or f16 tile of 128-byte rows (halves kBox apart).
 */
template <bool F16 = false, int N>
__device__ __forceinline__ void store_tile(uint32_t tile, const float (&x)[N], float scale = 1)
{
    int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    int row = warp * 16 + (lane & 7) + (lane & 8);
    auto two = [&](int i) {
        return F16 ? pack_f16(x[i] * scale, x[i + 1] * scale) : pack_bf16(x[i], x[i + 1]);
    };
#pragma unroll
    for (int j = 0; j < N / 4; j += 2) {
        int column = (j & 7) + (lane >> 4);
        uint32_t at = tile + (j >> 3) * kBox + row * 128 + ((column ^ (row & 7)) << 4);
        stmatrix(at, two(4 * j), two(4 * j + 2), two(4 * j + 4), two(4 * j + 6));
    }
}

/* The same in f16, the largest of the warp's 16 rows scaled to [2^14, 2^15) by a power of two; *back is its
 * inverse. */
template <int N> __device__ __forceinline__ void store_scaled(uint32_t tile, const float (&x)[N], float *back)
{
    float top = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
        top = fmaxf(top, fabsf(x[i]));
    for (int offset = 16; offset > 0; offset /= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const uint32_t power = max(__float_as_uint(top) & 0x7F800000u, 30u << 23);
    const float scale = __uint_as_float(((127u + 127 + 14) << 23) - power);
    if ((threadIdx.x & 31) == 0)
        *back = __uint_as_float(power - (14u << 23));
    store_tile<true>(tile, x, scale);
}

/* Rows m.. of a [64, 64] tile become zero: a tail's rows belong to another sequence, or to nobody. */
__device__ __forceinline__ void zero_rows(char *tile, int m)
{
    for (int i = threadIdx.x & (kGroup - 1); i < (kChunk - m) * 8; i += kGroup)
        reinterpret_cast<uint4 *>(tile)[m * 8 + i] = make_uint4(0, 0, 0, 0);
}

/* By the state group, which publishes its state only afterwards. */
template <class L> __device__ __forceinline__ void zero_tail(char *stage, int m)
{
    group_sync(1); /* all have done with what the stage held before */
    for (int h = L::kHalves; h <= 2 * L::kHalves; ++h)
        zero_rows(stage + h * kBox, m);
    proxy_fence();
    group_sync(1);
}

/* The state group's table for chunks of m rows. */
template <class L> __device__ __forceinline__ void fill_weights(float *weight, float slope, int m)
{
    int i = threadIdx.x & (kGroup - 1);
    group_sync(1); /* all are done with the table before */
    if (i < kChunk)
        weight[i] = i < m ? static_cast<float>(exp(-static_cast<double>(slope) * (m - 1 - i))) / L::kQ : 0.0f;
    group_sync(1);
}

/* The output group's table. */
__device__ __forceinline__ void fill_powers(float *power, float slope)
{
    int i = threadIdx.x & (kGroup - 1);
    group_sync(2);
    if (i <= kChunk)
        power[i] = static_cast<float>(exp(-static_cast<double>(slope) * i));
    group_sync(2);
}

/* Place in the ring of stages of the block's i-th chunk, and the barrier phase of its turn. */
template <class L> struct turn {
    int stage;
    uint32_t phase;
    __device__ explicit turn(int i) : stage(i % L::kStages), phase((i / L::kStages) & 1)
    {
    }
};

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

} // namespace

#endif
