/* The matrix product of gemm_hopper.h: TMA loads shared by a cluster of two blocks, wgmma, a persistent grid.
 *
 * A cluster works on 256 rows x 256 columns of W's rows at a time, each block on 128 of the rows. Three
 * warpgroups:
 *   loader     one thread fills a ring of stages with 128 bytes of the sum: x [128], W [256], half of W by
 *              each block of the cluster, for both.
 *   consumers  64 rows x 256 columns each, in f32 registers; what follows the product goes through 2 KB of
 *              shared memory a warp, and out by TMA, which cuts off what lies beyond rows and outs.
 * With HOPPER_GLU the first 128 columns are of w, the others the same columns of w2, so that both factors of
 * a result lie in one thread. */
#include "kernels/cuda/gemm_hopper.h"

#include "kernels/cuda/hopper.cuh"

#include <cuda_bf16.h>

namespace
{

constexpr int kRows = 128; /* of a block */
constexpr int kCols = 256; /* of W's rows, both matrices together */
constexpr int kStages = 4;
constexpr int kLine = 128;        /* bytes of the sum per stage */
constexpr int kA = kRows * kLine; /* bytes of x in a stage */
constexpr int kB = kCols * kLine; /* of W */
constexpr int kStage = kA + kB;
constexpr int kGroup = 128; /* threads of a warpgroup */
constexpr int kBlock = 3 * kGroup;
constexpr int kWarps = 8;        /* of the consumers */
constexpr int kBox = 16 * kLine; /* bytes of a piece of the result on its way out */
constexpr int kOut = kStages * kStage;
constexpr int kBarriers = kOut + kWarps * 2 * kBox;
constexpr int kBytes = kBarriers + 1024 + 1024; /* barriers, and slack to align the base */
constexpr int kPairsOfRows = 8;                 /* of 256 rows: so much of x stays in the L2 while W passes */

struct params {
    const float *row_scale, *col_scale, *col_scale2;
    int32_t rows, outs, act_cols;
    int32_t n_lines; /* stages of one sum */
    int32_t line;    /* elements of a line */
    int32_t m_tiles, n_tiles;
};

struct tensor_maps {
    CUtensorMap x, w, w2, y;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct barriers {
    uint64_t full[kStages], empty[kStages];
};

/* Tiles go by columns inside a band of kPairsOfRows. */
__device__ __forceinline__ void tile_at(const params &p, int index, int *m, int *n)
{
    const int band = index / (kPairsOfRows * p.n_tiles), first = band * kPairsOfRows;
    const int rest = index - first * p.n_tiles, high = min(kPairsOfRows, p.m_tiles - first);
    *n = rest / high;
    *m = first + rest - *n * high;
}

template <int OUT>
__device__ void load(const params &p, const tensor_maps &maps, uint32_t base, barriers &bar, int rank)
{
    const int n_tiles = p.m_tiles * p.n_tiles;
    int stage = 0;
    uint32_t phase = 0;
    for (int index = blockIdx.x / 2; index < n_tiles; index += gridDim.x / 2) {
        int m, n;
        tile_at(p, index, &m, &n);
        const CUtensorMap *w = OUT == HOPPER_GLU && rank ? &maps.w2 : &maps.w;
        const int x_row = (2 * m + rank) * kRows;
        const int w_row = OUT == HOPPER_GLU ? n * (kCols / 2) : n * kCols + rank * (kCols / 2);
        for (int i = 0; i < p.n_lines; i++) {
            const uint32_t at = base + stage * kStage;
            barrier_wait(&bar.empty[stage], phase ^ 1);
            barrier_arrive_expect(&bar.full[stage], kStage);
            tma_load(at, &maps.x, i * p.line, x_row, &bar.full[stage]);
            tma_load_multicast(at + kA + rank * (kB / 2), w, i * p.line, w_row, &bar.full[stage], 3);
            if (++stage == kStages)
                stage = 0, phase ^= 1;
        }
    }
}

__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi)
{
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

__device__ __forceinline__ float silu(float x)
{
    return __fdividef(x, 1 + __expf(-x));
}

__device__ __forceinline__ float2 column_scale(const float *scale, int col, int outs)
{
    return col < outs ? __ldg(reinterpret_cast<const float2 *>(scale + col)) : make_float2(0, 0);
}

/* A warp's 16 rows of the result: thread t holds, for each j, columns 8 j + 2 (t % 4) (+ 1) of rows t / 4 in
 * c[4 j] (+ 1) and t / 4 + 8 in c[4 j + 2] (+ 1). */
template <bool FP8, int OUT>
__device__ __forceinline__ void finish(float (&c)[128], const params &p, const CUtensorMap *y, uint32_t box,
                                       int row, int col)
{
    constexpr int boxes = OUT == HOPPER_GLU ? 2 : OUT == HOPPER_ACT ? 4 : 8;
    constexpr int runs = OUT == HOPPER_ADD ? 4 : 8; /* of 8 columns in a box */
    const int lane = threadIdx.x & 31, pair = 2 * (lane & 3);
    float s[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = row + lane / 4 + 8 * h;
        s[h] = p.row_scale && r < p.rows ? __ldcg(p.row_scale + r) : 1;
        if (OUT == HOPPER_GLU)
            s[h] *= s[h];
    }
#pragma unroll
    for (int b = 0; b < boxes; b++) {
        const uint32_t at = box + (b & 1) * kBox;
        if (lane == 0)
            tma_wait_read<1>();
        __syncwarp();
#pragma unroll
        for (int j = b * runs; j < (b + 1) * runs; j++) {
            float *v = &c[4 * j];
            const float *g = &c[(64 + 4 * j) % 128]; /* of HOPPER_GLU: the other factor */
            v[0] *= s[0], v[1] *= s[0], v[2] *= s[1], v[3] *= s[1];
            if (OUT == HOPPER_GLU)
                v[0] *= g[0], v[1] *= g[1], v[2] *= g[2], v[3] *= g[3];
            if (FP8) {
                float2 t = column_scale(p.col_scale, col + 8 * j + pair, p.outs);
                if (OUT == HOPPER_GLU) {
                    const float2 u = column_scale(p.col_scale2, col + 8 * j + pair, p.outs);
                    t.x *= u.x, t.y *= u.y;
                }
                v[0] *= t.x, v[1] *= t.y, v[2] *= t.x, v[3] *= t.y;
            }
        }
        /* one branch a box: all its elements are then on their way through the special functions at once */
        if (OUT == HOPPER_ACT && col + 64 * b < p.act_cols) {
#pragma unroll
            for (int j = b * runs; j < (b + 1) * runs; j++)
#pragma unroll
                for (int i = 4 * j; i < 4 * j + 4; i++) {
                    const float v = silu(c[i]);
                    c[i] = col + 8 * j < p.act_cols ? v : c[i];
                }
        }
        if (OUT == HOPPER_ADD) {
#pragma unroll
            for (int j = 0; j < runs; j++) {
                const float *v = &c[4 * (b * runs + j)];
                const int r = lane / 4; /* r and r + 8 are swizzled alike */
                const uint32_t to =
                    at + r * kLine + (((2 * j + (pair >> 2)) ^ r) << 4) + (pair & 2) * sizeof(float);
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(v[0]), "f"(v[1]) : "memory");
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + 8 * kLine), "f"(v[2]), "f"(v[3])
                             : "memory");
            }
        } else {
#pragma unroll
            for (int j = 0; j < runs; j += 2) {
                const float *v = &c[4 * (b * runs + j)];
                const int r = lane & 15;
                stmatrix(at + r * kLine + (((j + (lane >> 4)) ^ (r & 7)) << 4), pack_bf16(v[0], v[1]),
                         pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
            }
        }
        proxy_fence();
        __syncwarp();
        if (lane == 0) {
            if (OUT == HOPPER_ADD)
                tma_add(y, col + 32 * b, row, at);
            else
                tma_store(y, col + 64 * b, row, at);
        }
    }
}

template <bool FP8, int OUT>
__device__ void consume(const params &p, const tensor_maps &maps, uint32_t base, barriers &bar, int rank)
{
    const int warp = threadIdx.x / 32 - 4, group = warp / 4, lane = threadIdx.x & 31;
    const int n_tiles = p.m_tiles * p.n_tiles;
    const uint32_t box = base + kOut + warp * 2 * kBox;
    int stage = 0;
    uint32_t phase = 0;
    float c[128];
    for (int index = blockIdx.x / 2; index < n_tiles; index += gridDim.x / 2) {
        int m, n, before = 0;
        tile_at(p, index, &m, &n);
        for (int i = 0; i < p.n_lines; i++) {
            const uint32_t at = base + stage * kStage;
            const uint64_t a = matrix_descriptor(at + group * 64 * kLine), b = matrix_descriptor(at + kA);
            barrier_wait(&bar.full[stage], phase);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++)
                wgmma_256<FP8>(c, a + 2 * k, b + 2 * k, i | k);
            wgmma_commit();
            wgmma_wait<1>(); /* the stage before is read */
            if (i > 0 && lane < 2)
                barrier_arrive_at(&bar.empty[before], lane);
            before = stage;
            if (++stage == kStages)
                stage = 0, phase ^= 1;
        }
        wgmma_wait<0>();
        if (lane < 2)
            barrier_arrive_at(&bar.empty[before], lane);
        finish<FP8, OUT>(c, p, &maps.y, box, (2 * m + rank) * kRows + warp * 16,
                         OUT == HOPPER_GLU ? n * (kCols / 2) : n * kCols);
    }
    if (lane == 0)
        tma_wait_all();
}

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

template <bool FP8, int OUT>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kBlock, 1)
    gemm_kernel(const __grid_constant__ params p, const __grid_constant__ tensor_maps maps)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ char raw[];
    const uint32_t base = (shared_address(raw) + 1023) & ~1023u;
    barriers &bar = *reinterpret_cast<barriers *>(raw + (base - shared_address(raw)) + kBarriers);
    const int rank = (int)cluster_rank();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            barrier_init(&bar.full[i], 1);
            barrier_init(&bar.empty[i], 2 * kWarps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (const CUtensorMap *map : {&maps.x, &maps.w, &maps.w2, &maps.y})
            asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
    }
    cluster_sync();
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory"); /* until here the kernel before may still run */
    if (threadIdx.x < kGroup) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0)
            load<OUT>(p, maps, base, bar, rank);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<FP8, OUT>(p, maps, base, bar, rank);
    }
    __syncwarp();
    cluster_sync(); /* the other block may still send here */
#else
    __shared__ volatile char absent[1]; /* tells hopper_gemm_present */
    absent[0] = 0;
    __trap();
#endif
}

/* [rows, columns] in boxes of 128 bytes by box_rows */
bool encode(CUtensorMap *map, CUtensorMapDataType type, int size, const void *base, int64_t rows,
            int64_t columns, uint32_t box_rows)
{
    const cuuint64_t dims[2] = {(cuuint64_t)columns, (cuuint64_t)rows};
    const cuuint64_t strides[1] = {(cuuint64_t)columns * size};
    const cuuint32_t box[2] = {(cuuint32_t)(kLine / size), box_rows}, step[2] = {1, 1};
    return tensor_map_encoder()(map, type, 2, const_cast<void *>(base), dims, strides, box, step,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <bool FP8, int OUT>
cudaError_t launch(cudaStream_t stream, int n_sms, const params &p, const tensor_maps &maps)
{
    cudaError_t err =
        cudaFuncSetAttribute(gemm_kernel<FP8, OUT>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (err != cudaSuccess)
        return err;
    const int64_t tiles = (int64_t)p.m_tiles * p.n_tiles, clusters = n_sms / 2;
    cudaLaunchAttribute early[1] = {};
    early[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early[0].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(2 * (tiles < clusters ? tiles : clusters)));
    config.blockDim = dim3(kBlock);
    config.dynamicSmemBytes = kBytes;
    config.stream = stream;
    config.attrs = early;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, gemm_kernel<FP8, OUT>, p, maps);
}

} // namespace

bool hopper_gemm_present(int device)
{
    int major = 0, minor = 0;
    cudaFuncAttributes kernel;
    return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
           major == 9 && minor == 0 && tensor_map_encoder() != nullptr &&
           cudaFuncGetAttributes(&kernel, gemm_kernel<false, HOPPER_ACT>) == cudaSuccess &&
           kernel.sharedSizeBytes == 0; /* built for sm_90a, not for sm_90 or another */
}

cudaError_t hopper_gemm_run(cudaStream_t stream, int n_sms, const struct hopper_gemm *g)
{
    const int size = g->fp8 ? 1 : 2, wide = g->out == HOPPER_GLU ? kCols / 2 : kCols;
    const CUtensorMapDataType type =
        g->fp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    params p = {};
    tensor_maps maps;
    p.row_scale = g->row_scale;
    p.col_scale = g->col_scale;
    p.col_scale2 = g->col_scale2;
    p.rows = g->rows;
    p.outs = g->outs;
    p.act_cols = g->act_cols;
    p.line = kLine / size;
    p.n_lines = (g->cols + p.line - 1) / p.line;
    p.m_tiles = (g->rows + 2 * kRows - 1) / (2 * kRows);
    p.n_tiles = (g->outs + wide - 1) / wide;
    if (!encode(&maps.x, type, size, g->x, g->rows, g->cols, kRows) ||
        !encode(&maps.w, type, size, g->w, g->outs, g->cols, kCols / 2) ||
        !encode(&maps.w2, type, size, g->w2 ? g->w2 : g->w, g->outs, g->cols, kCols / 2) ||
        !(g->out == HOPPER_ADD
              ? encode(&maps.y, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, g->y, g->rows, g->outs, 16)
              : encode(&maps.y, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, g->y, g->rows, g->outs, 16)))
        return cudaErrorInvalidValue;
#define RUN(FP8, OUT) launch<FP8, OUT>(stream, n_sms, p, maps)
    switch (g->out) {
    case HOPPER_ACT:
        return g->fp8 ? RUN(true, HOPPER_ACT) : RUN(false, HOPPER_ACT);
    case HOPPER_GLU:
        return g->fp8 ? RUN(true, HOPPER_GLU) : RUN(false, HOPPER_GLU);
    default:
        return g->fp8 ? RUN(true, HOPPER_ADD) : RUN(false, HOPPER_ADD);
    }
#undef RUN
}
