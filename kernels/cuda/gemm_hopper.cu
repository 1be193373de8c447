/* The matrix product of gemm_hopper.h: TMA loads shared by a cluster of two blocks, wgmma, a persistent grid.
 *
 * A cluster works on 256 rows x 256 columns of W's rows at a time, each block on 128 of the rows. Three
 * warpgroups:
 *   loader     one thread fills a ring of stages with 128 bytes of the sum: x [128], W [256], half of W by
 *              each block of the cluster, for both.
 *   consumers  64 rows x 256 columns each, in f32 registers; what follows the product goes through 2 KB of
 *              shared memory a warp, and out by TMA, which cuts off what lies beyond rows and outs.
 * HOPPER_RESIDUAL has one stage less, for pieces of y that arrive before the products are done.
 *
 * With HOPPER_GLU the first 128 columns are of w, the others the same columns of w2, so that both factors of
 * a result lie in one thread. */
#include "kernels/cuda/gemm_hopper.h"

#include "kernels/cuda/hopper.cuh"

#include <cuda_bf16.h>

namespace
{

constexpr int kRows = 128;        /* of a block */
constexpr int kCols = 256;        /* of W's rows, both matrices together */
constexpr int kLine = 128;        /* bytes of the sum per stage */
constexpr int kA = kRows * kLine; /* bytes of x in a stage */
constexpr int kB = kCols * kLine; /* of W */
constexpr int kStage = kA + kB;
constexpr int kGroup = 128; /* threads of a warpgroup */
constexpr int kBlock = 3 * kGroup;
constexpr int kWarps = 8;        /* of the consumers */
constexpr int kBox = 16 * kLine; /* bytes of a piece of the result on its way out */
constexpr int kAhead = 4;        /* HOPPER_RESIDUAL: pieces of y on their way in */

template <int OUT> struct layout {
    static constexpr int kStages = OUT == HOPPER_RESIDUAL ? 3 : 4;
    static constexpr int kBoxes = OUT == HOPPER_RESIDUAL ? kAhead + 1 : 2; /* of a warp */
    static constexpr int kOut = kStages * kStage;
    static constexpr int kBarriers = kOut + kWarps * kBoxes * kBox;
    static constexpr int kBytes = kBarriers + 1024 + 1024; /* barriers, and slack to align the base */
};

struct params {
    const float *row_scale, *col_scale, *col_scale2;
    const float *squares; /* of what x was, [n_squares, rows]; NULL: row_scale counts */
    float *new_squares;   /* of y, [n_tiles, rows] */
    int32_t rows, outs, cols, act_cols;
    int32_t n_squares;
    int32_t n_lines; /* stages of one sum */
    int32_t line;    /* elements of a line */
    int32_t m_tiles, n_tiles;
};

struct tensor_maps {
    CUtensorMap x, w, w2, y, copy;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kPairsOfRows = 8; /* of 256 rows: so much of x stays in the L2 while W passes */

struct barriers {
    uint64_t full[4], empty[4];
    uint64_t box[kWarps][kAhead];
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
            if (++stage == layout<OUT>::kStages)
                stage = 0, phase ^= 1;
        }
    }
}

/* x / (1 + exp(-x)) = h + h tanh(h), h = x / 2: one special function instead of two, right to 2^-11 of h; of
 * normal x, that is a tenth of what rounding to bf16 costs. */
__device__ __forceinline__ float silu(float x)
{
    const float h = 0.5f * x;
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(h));
    return fmaf(h, t, h);
}

__device__ __forceinline__ float2 column_scale(const float *scale, int col, int outs)
{
    return col < outs ? __ldg(reinterpret_cast<const float2 *>(scale + col)) : make_float2(0, 0);
}

/* A warp's 16 rows of the result: thread t holds, for each j, columns 8 j + 2 (t % 4) (+ 1) of rows t / 4 in
 * c[4 j] (+ 1) and t / 4 + 8 in c[4 j + 2] (+ 1). */
template <bool FP8, int OUT>
__device__ __forceinline__ void finish(float (&c)[128], const float (&s)[2], const params &p,
                                       const CUtensorMap *y, uint32_t box, int row, int col)
{
    constexpr int boxes = OUT == HOPPER_GLU ? 2 : OUT == HOPPER_ACT ? 4 : 8;
    constexpr int runs = OUT == HOPPER_ADD ? 4 : 8; /* of 8 columns in a box */
    const int lane = threadIdx.x & 31, pair = 2 * (lane & 3);
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

/* What the results of rows r and r + 8 are multiplied by; each of the four lanes that have these rows takes a
 * quarter of the squares. */
template <int OUT> __device__ __forceinline__ void row_scales(float (&s)[2], const params &p, int r)
{
    float sum[2] = {};
    if (p.squares) {
#pragma unroll 4
        for (int i = threadIdx.x & 3; i < p.n_squares; i += 4)
#pragma unroll
            for (int h = 0; h < 2; h++)
                sum[h] += r + 8 * h < p.rows ? __ldcg(p.squares + (int64_t)i * p.rows + r + 8 * h) : 0;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
        s[h] = p.squares                           ? rsqrtf(sum[h] / p.cols + 1e-6f)
               : p.row_scale && r + 8 * h < p.rows ? __ldcg(p.row_scale + r + 8 * h)
                                                   : 1;
        if (OUT == HOPPER_GLU)
            s[h] *= s[h];
    }
}

/* HOPPER_RESIDUAL: y comes in ahead of its sum, kAhead pieces of 32 columns at a time; the sum goes out as
 * f32, in place, and as bf16, 64 columns at a time. */
__device__ __forceinline__ void fetch(const CUtensorMap *y, uint64_t *arrived, uint32_t box, int row, int col)
{
    barrier_arrive_expect(arrived, kBox);
    tma_load(box, y, col, row, arrived);
}

/* By lane 0 of each warp, before the products of a tile. */
__device__ __forceinline__ void begin_residual(const CUtensorMap *y, uint64_t *arrived, uint32_t box, int row,
                                               int col)
{
    tma_wait_read<0>();
#pragma unroll
    for (int b = 0; b < kAhead; b++)
        fetch(y, arrived + b, box + b * kBox, row, col + 32 * b);
}

__device__ __forceinline__ void finish_residual(float (&c)[128], const float (&s)[2], const params &p,
                                                const tensor_maps &maps, uint64_t *arrived, uint32_t box,
                                                int row, int col)
{
    const int lane = threadIdx.x & 31, pair = 2 * (lane & 3), r = lane / 4;
    const uint32_t copy = box + kAhead * kBox;
    float squares[2] = {};
#pragma unroll
    for (int b = 0; b < 8; b++) {
        const uint32_t at = box + b % kAhead * kBox;
        barrier_wait(arrived + b % kAhead, b / kAhead & 1);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float *v = &c[16 * b + 4 * j];
#pragma unroll
            for (int h = 0; h < 2; h++) { /* r and r + 8 are swizzled alike */
                const uint32_t to = at + (r + 8 * h) * kLine + (((2 * j + (pair >> 2)) ^ r) << 4) +
                                    (pair & 2) * (int)sizeof(float);
                float2 old;
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                             : "=f"(old.x), "=f"(old.y)
                             : "r"(to)
                             : "memory");
                v[2 * h] = fmaf(v[2 * h], s[h], old.x);
                v[2 * h + 1] = fmaf(v[2 * h + 1], s[h], old.y);
                squares[h] = fmaf(v[2 * h], v[2 * h], squares[h]);
                squares[h] = fmaf(v[2 * h + 1], v[2 * h + 1], squares[h]);
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(v[2 * h]), "f"(v[2 * h + 1])
                             : "memory");
            }
        }
        if (b % 2 == 1) {
            if (lane == 0)
                tma_wait_read<1>(); /* the copy before: behind it only the last piece has gone out */
            __syncwarp();
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const float *v = &c[16 * (b - 1) + 4 * j];
                const int line = lane & 15;
                stmatrix(copy + line * kLine + (((j + (lane >> 4)) ^ (line & 7)) << 4), pack_bf16(v[0], v[1]),
                         pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
            }
        }
        proxy_fence();
        __syncwarp();
        if (lane == 0) {
            tma_store(&maps.y, col + 32 * b, row, at);
            if (b % 2 == 1)
                tma_store(&maps.copy, col + 32 * (b - 1), row, copy);
            if (b >= 1 && b + kAhead - 1 < 8) { /* into the place of the piece before */
                tma_wait_read<2>();
                fetch(&maps.y, arrived + (b - 1) % kAhead, box + (b - 1) % kAhead * kBox, row,
                      col + 32 * (b + kAhead - 1));
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        squares[h] += __shfl_xor_sync(0xffffffffu, squares[h], 1);
        squares[h] += __shfl_xor_sync(0xffffffffu, squares[h], 2);
        if (pair == 0 && row + r + 8 * h < p.rows)
            p.new_squares[(int64_t)(col / kCols) * p.rows + row + r + 8 * h] = squares[h];
    }
}

template <bool FP8, int OUT>
__device__ void consume(const params &p, const tensor_maps &maps, uint32_t base, barriers &bar, int rank)
{
    const int warp = threadIdx.x / 32 - 4, group = warp / 4, lane = threadIdx.x & 31;
    const int n_tiles = p.m_tiles * p.n_tiles;
    using L = layout<OUT>;
    const uint32_t box = base + L::kOut + warp * L::kBoxes * kBox;
    int stage = 0;
    uint32_t phase = 0;
    float c[128], s[2];
    for (int index = blockIdx.x / 2; index < n_tiles; index += gridDim.x / 2) {
        int m, n, before = 0;
        tile_at(p, index, &m, &n);
        const int row = (2 * m + rank) * kRows + warp * 16;
        const int col = OUT == HOPPER_GLU ? n * (kCols / 2) : n * kCols;
        if (OUT == HOPPER_RESIDUAL && lane == 0)
            begin_residual(&maps.y, bar.box[warp], box, row, col);
        __syncwarp();
        for (int i = 0; i < p.n_lines; i++) {
            const uint32_t at = base + stage * kStage;
            const uint64_t a = matrix_descriptor(at + group * 64 * kLine), b = matrix_descriptor(at + kA);
            barrier_wait(&bar.full[stage], phase);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++)
                wgmma_256<FP8>(c, a + 2 * k, b + 2 * k, i | k);
            wgmma_commit();
            if (i == 0) /* while the products run */
                row_scales<OUT>(s, p, row + lane / 4);
            wgmma_wait<1>(); /* the stage before is read */
            if (i > 0 && lane < 2)
                barrier_arrive_at(&bar.empty[before], lane);
            before = stage;
            if (++stage == layout<OUT>::kStages)
                stage = 0, phase ^= 1;
        }
        wgmma_wait<0>();
        if (lane < 2)
            barrier_arrive_at(&bar.empty[before], lane);
        if constexpr (OUT == HOPPER_RESIDUAL)
            finish_residual(c, s, p, maps, bar.box[warp], box, row, col);
        else
            finish<FP8, OUT>(c, s, p, &maps.y, box, row, col);
    }
    if (lane == 0)
        tma_wait_all();
}

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

/* Older GPUs know no clusters, and this file is compiled for them too. */
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CLUSTER_OF_TWO __cluster_dims__(2, 1, 1)
#else
#define CLUSTER_OF_TWO
#endif

template <bool FP8, int OUT>
__global__ void CLUSTER_OF_TWO __launch_bounds__(kBlock, 1)
    gemm_kernel(const __grid_constant__ params p, const __grid_constant__ tensor_maps maps)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ char raw[];
    const uint32_t base = (shared_address(raw) + 1023) & ~1023u;
    barriers &bar =
        *reinterpret_cast<barriers *>(raw + (base - shared_address(raw)) + layout<OUT>::kBarriers);
    const int rank = (int)cluster_rank();
    if (threadIdx.x == 0) {
        for (int i = 0; i < layout<OUT>::kStages; i++) {
            barrier_init(&bar.full[i], 1);
            barrier_init(&bar.empty[i], 2 * kWarps);
        }
        for (int i = 0; i < kWarps * kAhead; i++)
            barrier_init(&bar.box[0][0] + i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (const CUtensorMap *map : {&maps.x, &maps.w, &maps.w2, &maps.y, &maps.copy})
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

bool encode(CUtensorMap *map, CUtensorMapDataType type, int size, const void *base, int64_t rows,
            int64_t columns, uint32_t box_rows)
{
    return tensor_map(map, type, size, base, rows, columns, columns, box_rows);
}

template <bool FP8, int OUT>
cudaError_t launch(cudaStream_t stream, int n_sms, const params &p, const tensor_maps &maps)
{
    cudaError_t err = cudaFuncSetAttribute(gemm_kernel<FP8, OUT>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           layout<OUT>::kBytes);
    if (err != cudaSuccess)
        return err;
    const int64_t tiles = (int64_t)p.m_tiles * p.n_tiles, clusters = n_sms / 2;
    cudaLaunchAttribute early[1] = {};
    early[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early[0].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(2 * (tiles < clusters ? tiles : clusters)));
    config.blockDim = dim3(kBlock);
    config.dynamicSmemBytes = layout<OUT>::kBytes;
    config.stream = stream;
    config.attrs = early;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, gemm_kernel<FP8, OUT>, p, maps);
}

/* copy = bf16(y) and the squares of y as HOPPER_RESIDUAL leaves them, to the bit. A warp takes 8 rows x 256
 * columns, four lanes a row. */
__global__ void __launch_bounds__(256)
    squares_kernel(__nv_bfloat16 *copy, float *squares, const float *y, int32_t rows, int32_t cols)
{
    const int lane = threadIdx.x & 31, pair = 2 * (lane & 3);
    const int64_t row = ((int64_t)blockIdx.x * 8 + threadIdx.x / 32) * 8 + lane / 4;
    const int col = blockIdx.y * kCols + pair;
    float2 v[kCols / 8];
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kCols / 8; j++)
        v[j] = row < rows && col + 8 * j < cols
                   ? __ldcg(reinterpret_cast<const float2 *>(y + row * cols + col + 8 * j))
                   : make_float2(0, 0);
#pragma unroll
    for (int j = 0; j < kCols / 8; j++) {
        sum = fmaf(v[j].x, v[j].x, sum);
        sum = fmaf(v[j].y, v[j].y, sum);
        if (row < rows && col + 8 * j < cols)
            *reinterpret_cast<__nv_bfloat162 *>(copy + row * cols + col + 8 * j) =
                __floats2bfloat162_rn(v[j].x, v[j].y);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (pair == 0 && row < rows)
        squares[(int64_t)blockIdx.y * rows + row] = sum;
}

} // namespace

int32_t hopper_squares(int32_t cols)
{
    return (cols + kCols - 1) / kCols;
}

cudaError_t hopper_square(cudaStream_t stream, void *copy, float *squares, const float *y, int32_t rows,
                          int32_t cols)
{
    squares_kernel<<<dim3((unsigned)((rows + 63) / 64), (unsigned)hopper_squares(cols)), 256, 0, stream>>>(
        static_cast<__nv_bfloat16 *>(copy), squares, y, rows, cols);
    return cudaGetLastError();
}

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
    const bool in_f32 = g->out == HOPPER_ADD || g->out == HOPPER_RESIDUAL;
    params p = {};
    tensor_maps maps;
    p.row_scale = g->row_scale;
    p.col_scale = g->col_scale;
    p.col_scale2 = g->col_scale2;
    p.rows = g->rows;
    p.outs = g->outs;
    p.cols = g->cols;
    p.act_cols = g->act_cols;
    p.squares = g->squares;
    p.n_squares = g->n_squares;
    p.new_squares = g->new_squares;
    p.line = kLine / size;
    p.n_lines = (g->cols + p.line - 1) / p.line;
    p.m_tiles = (g->rows + 2 * kRows - 1) / (2 * kRows);
    p.n_tiles = (g->outs + wide - 1) / wide;
    if (!encode(&maps.x, type, size, g->x, g->rows, g->cols, kRows) ||
        !encode(&maps.w, type, size, g->w, g->outs, g->cols, kCols / 2) ||
        !encode(&maps.w2, type, size, g->w2 ? g->w2 : g->w, g->outs, g->cols, kCols / 2) ||
        !encode(&maps.y, in_f32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                in_f32 ? 4 : 2, g->y, g->rows, g->outs, 16) ||
        !encode(&maps.copy, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, g->copy ? g->copy : g->y, g->rows, g->outs,
                16))
        return cudaErrorInvalidValue;
#define RUN(FP8, OUT) launch<FP8, OUT>(stream, n_sms, p, maps)
    switch (g->out) {
    case HOPPER_ACT:
        return g->fp8 ? RUN(true, HOPPER_ACT) : RUN(false, HOPPER_ACT);
    case HOPPER_GLU:
        return g->fp8 ? RUN(true, HOPPER_GLU) : RUN(false, HOPPER_GLU);
    case HOPPER_RESIDUAL:
        return g->fp8 ? cudaErrorInvalidValue : RUN(false, HOPPER_RESIDUAL);
    default:
        return g->fp8 ? RUN(true, HOPPER_ADD) : RUN(false, HOPPER_ADD);
    }
#undef RUN
}
