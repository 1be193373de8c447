/* y = x W^T + b for a batch of up to 64 rows and 16-bit weights: bound by reading W once, as in decoding, but
 * with too many rows for a dot product each. Tensor cores (mma) do the sums.
 *
 * A block takes a tile of M outputs, all rows, and one of `splits` parts of the columns. W and x pass through
 * a ring of STAGES_ stages in shared memory, each K columns wide; W's first stages are fetched while the
 * previous kernel still runs. Within a stage, warps share outputs and columns out among them. The parts of a
 * tile meet in device memory: the block that comes last adds them in their order, so that the sum does not
 * depend on which block that was, and writes the result. Tiles and parts follow from the sizes alone.
 *
 * f16 weights meet bf16 inputs as two bf16 numbers each, high and low, whose sum is exact. */
#include "kernels/cuda/cuda.cuh"

enum {
    THREADS = 256,
    K = 64,   /* columns of a stage: 128 bytes of each row, eight pieces of 16 */
    RING = 4, /* stages */
    MAX_ROWS = 64,
    MAX_PARTS = 768, /* blocks that may leave partial sums */
    TILE_FLOATS = 64 * 128,
    COUNTERS = 1024,
};

/* Piece c of row r in a stage: rows are 128 bytes, pieces swapped about so that ldmatrix meets no bank twice.
 */
static __device__ __forceinline__ uint32_t piece_at(int r, int c)
{
    return r * 128 + ((c ^ (r & 7)) << 4);
}

static __device__ __forceinline__ void load_matrix(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t *b)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Two f16 numbers as two bf16 pairs whose sum they are: 8 of the 11 bits, then the other 3. */
static __device__ __forceinline__ void split_half2(uint32_t &high, uint32_t &low, uint32_t halves)
{
    const float2 f = __half22float2(*reinterpret_cast<const __half2 *>(&halves));
    const __nv_bfloat162 h = __floats2bfloat162_rn(f.x, f.y);
    const float2 back = __bfloat1622float2(h);
    const __nv_bfloat162 l = __floats2bfloat162_rn(f.x - back.x, f.y - back.y);
    high = *reinterpret_cast<const uint32_t *>(&h);
    low = *reinterpret_cast<const uint32_t *>(&l);
}

/* Leaves this block's tile in device memory; in the block that comes last, true, and the sum of all parts in
 * tile. Four loads times four parts are in flight at once. */
template <int M, int ROWS, int PITCH>
static __device__ bool join_parts(float *tile, int32_t rows, int splits, int part, float *partials,
                                  uint32_t *counters)
{
    __shared__ bool last;
    constexpr int ACROSS = M / 4;
    const int n = ACROSS * rows;
    float4 *all = reinterpret_cast<float4 *>(partials) + (int64_t)blockIdx.x * splits * (ACROSS * ROWS);
    for (int i = threadIdx.x; i < n; i += THREADS)
        __stcg(all + part * (ACROSS * ROWS) + i,
               *reinterpret_cast<const float4 *>(&tile[i / ACROSS * PITCH + i % ACROSS * 4]));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        last = atomicAdd(&counters[blockIdx.x], 1) == (uint32_t)splits - 1;
    __syncthreads();
    if (!last)
        return false;
    __threadfence();
    for (int first = threadIdx.x; first < n; first += 4 * THREADS) {
        float4 sum[4] = {};
#pragma unroll 4
        for (int s = 0; s < splits; s++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int i = first + j * THREADS;
                if (i < n) {
                    const float4 v = __ldcg(all + s * (ACROSS * ROWS) + i);
                    sum[j].x += v.x, sum[j].y += v.y, sum[j].z += v.z, sum[j].w += v.w;
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int i = first + j * THREADS;
            if (i < n)
                *reinterpret_cast<float4 *>(&tile[i / ACROSS * PITCH + i % ACROSS * 4]) = sum[j];
        }
    }
    if (threadIdx.x == 0)
        counters[blockIdx.x] = 0; /* for the next launch */
    __syncthreads();
    return true;
}

/* From the tile to y, with what is fused. Old values are fetched ahead of their use, four at a time. */
template <int M, int PITCH>
static __device__ void write_result(const float *tile, const struct product &p, int64_t out0)
{
    const int shift = p.w2 ? 1 : 0, across = M >> shift, n = across * p.rows;
    for (int first = threadIdx.x; first < n; first += 4 * THREADS) {
        float old[4] = {};
        if (p.out == OUT_ADD) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int i = first + j * THREADS;
                const int64_t out = out0 + (i & (across - 1));
                if (i < n && out < p.outs)
                    old[j] =
                        load_fresh((const float *)p.y + (int64_t)(p.w2 ? i / (M / 2) : i / M) * p.outs + out);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int i = first + j * THREADS, column = i & (across - 1), row = p.w2 ? i / (M / 2) : i / M;
            const int64_t out = out0 + column, at = (int64_t)row * p.outs + out;
            if (i >= n || out >= p.outs)
                continue;
            float value = tile[row * PITCH + column] + (p.bias ? p.bias[out] : 0);
            if (p.w2)
                value *= tile[row * PITCH + M / 2 + column] + (p.bias2 ? p.bias2[out] : 0);
            if (out < p.act_cols)
                value = activate(value, p.act);
            if (p.out == OUT_ACT)
                ((__nv_bfloat16 *)p.y)[at] = __float2bfloat16(value);
            else
                ((float *)p.y)[at] = value + old[j];
        }
    }
}

/* M outputs by 8 N rows. With a second matrix, its outputs are the second half of the tile. */
template <typename W, int M, int N>
static __global__ void __launch_bounds__(THREADS, 2)
    batch_kernel(const __grid_constant__ struct product p, int splits, float *partials, uint32_t *counters)
{
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr int ROWS = 8 * N, STAGE = (M + ROWS) * 128, PITCH = M + 4;
    constexpr int WARPS_M = M / 32, WARPS_K = 8 / WARPS_M, STEPS = K / 16 / WARPS_K;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_m = warp % WARPS_M, warp_k = warp / WARPS_M;
    const int outs_here = p.w2 ? M / 2 : M;
    const int64_t out0 = (int64_t)blockIdx.x * outs_here;
    const int part = blockIdx.y;
    const int32_t n_chunks = (p.cols + K - 1) / K;
    const int32_t from = (int32_t)((int64_t)n_chunks * part / splits);
    const int32_t to = (int32_t)((int64_t)n_chunks * (part + 1) / splits);
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(shared);

    auto fetch_weights = [&](int32_t chunk) {
        uint8_t *stage = shared + (chunk - from) % RING * STAGE;
#pragma unroll
        for (int i = 0; i < M * 8 / THREADS; i++) {
            const int at = i * THREADS + threadIdx.x, row = at / 8, c = at % 8;
            const bool second = p.w2 && row >= M / 2;
            const int64_t out = out0 + (second ? row - M / 2 : row);
            const int32_t col = chunk * K + c * 8;
            void *slot = stage + piece_at(row, c);
            if (out < p.outs && col < p.cols)
                copy_async(slot, (const W *)(second ? p.w2 : p.w) + out * p.cols + col);
            else
                *(uint4 *)slot = make_uint4(0, 0, 0, 0);
        }
    };
    auto fetch_input = [&](int32_t chunk) {
        uint8_t *stage = shared + (chunk - from) % RING * STAGE + M * 128;
        for (int at = threadIdx.x; at < ROWS * 8; at += THREADS) {
            const int row = at / 8, c = at % 8;
            const int32_t col = chunk * K + c * 8;
            void *slot = stage + piece_at(row, c);
            if (row < p.rows && col < p.cols)
                copy_async(slot, (const __nv_bfloat16 *)p.x + (int64_t)row * p.cols + col);
            else
                *(uint4 *)slot = make_uint4(0, 0, 0, 0);
        }
    };

    let_next_start();
    for (int32_t i = from; i < min(from + RING - 1, to); i++)
        fetch_weights(i);
    wait_for_previous();
    for (int32_t i = from; i < from + RING - 1; i++) {
        if (i < to)
            fetch_input(i);
        end_copy_group();
    }

    float acc[2][N][4] = {};
    for (int32_t chunk = from; chunk < to; chunk++) {
        wait_copy_groups<RING - 2>();
        __syncthreads(); /* the chunk is here, and everyone has left the stage that is filled next */
        if (chunk + RING - 1 < to) {
            fetch_weights(chunk + RING - 1);
            fetch_input(chunk + RING - 1);
        }
        end_copy_group();

        const uint32_t stage = base + (chunk - from) % RING * STAGE;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const int c = (warp_k * STEPS + s) * 2; /* first piece of these 16 columns */
            uint32_t a[2][4], low[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++) {
                load_matrix(a[m], stage + piece_at(warp_m * 32 + m * 16 + lane % 16, c + lane / 16));
                if (sizeof(W) == 2 && !__is_same(W, __nv_bfloat16)) {
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        split_half2(a[m][i], low[m][i], a[m][i]);
                }
            }
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                uint32_t b[4];
                load_matrix(b,
                            stage + M * 128 + piece_at(n * 8 + lane / 16 * 8 + lane % 8, c + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma(acc[m][n], a[m], b);
                    mma(acc[m][n + 1], a[m], b + 2);
                    if (!__is_same(W, __nv_bfloat16)) {
                        mma(acc[m][n], low[m], b);
                        mma(acc[m][n + 1], low[m], b + 2);
                    }
                }
            }
        }
    }
    wait_copy_groups<0>();
    __syncthreads();

    /* The warps that shared columns leave their sums side by side: tile [WARPS_K][ROWS][PITCH]. */
    float *tile = reinterpret_cast<float *>(shared);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = n * 8 + lane % 4 * 2 + i % 2;
                const int out = warp_m * 32 + m * 16 + lane / 4 + i / 2 * 8;
                tile[(warp_k * ROWS + row) * PITCH + out] = acc[m][n][i];
            }
    __syncthreads();
    /* Added up in their order, each place by one thread. */
    for (int i = threadIdx.x; i < M / 4 * p.rows; i += THREADS) {
        float4 *at = reinterpret_cast<float4 *>(&tile[i / (M / 4) * PITCH + i % (M / 4) * 4]), sum = *at;
#pragma unroll
        for (int k = 1; k < WARPS_K; k++) {
            const float4 v = at[k * (ROWS * PITCH / 4)];
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        *at = sum;
    }
    __syncthreads();
    if (splits > 1 && !join_parts<M, ROWS, PITCH>(tile, p.rows, splits, part, partials, counters))
        return;
    write_result<M, PITCH>(tile, p, out0);
}

/* ---- host ------------------------------------------------------------------------------------------------
 */

static size_t shared_bytes(int m, int n)
{
    const size_t ring = (size_t)RING * (m + 8 * n) * 128;
    const size_t tile = (size_t)(8 / (m / 32)) * 8 * n * (m + 4) * sizeof(float);
    return ring > tile ? ring : tile;
}

template <typename W, int M, int N>
static enum ltn_status run(struct cuda_backend *be, const struct product *p, struct ltn_error *err)
{
    const int tiles = (p->outs + (p->w2 ? M / 2 : M) - 1) / (p->w2 ? M / 2 : M);
    const int chunks = (p->cols + K - 1) / K;
    /* About 256 or 512 blocks in all, none with fewer than four chunks. */
    int splits = tiles <= 128 ? 256 / tiles : (512 + tiles / 2) / tiles;
    if (splits > chunks / 4)
        splits = chunks / 4;
    if (splits < 1)
        splits = 1;
    float *partials = reinterpret_cast<float *>(be->partials + COUNTERS * sizeof(uint32_t));
    LAUNCH(be, err, (batch_kernel<W, M, N>), dim3(tiles, splits), dim3(THREADS), shared_bytes(M, N), *p,
           splits, partials, reinterpret_cast<uint32_t *>(be->partials));
    return LTN_OK;
}

template <typename W>
static enum ltn_status choose(struct cuda_backend *be, const struct product *p, struct ltn_error *err)
{
    if ((int64_t)p->outs * (p->w2 ? 2 : 1) >= 8192)
        return p->rows <= 16 ? run<W, 128, 2>(be, p, err) : run<W, 128, 8>(be, p, err);
    return p->rows <= 16 ? run<W, 64, 2>(be, p, err) : run<W, 64, 8>(be, p, err);
}

bool batch_suits(const struct cuda_backend *be, const struct product *p, enum ltn_dtype dtype)
{
    return be->base.act_dtype == LTN_BF16 && dtype != LTN_F32 && p->rows <= MAX_ROWS && p->cols % 8 == 0 &&
           aligned16(p->w) && aligned16(p->w2) && aligned16(p->x) && be->max_shared >= shared_bytes(128, 8);
}

enum ltn_status batch(struct cuda_backend *be, const struct product *p, enum ltn_dtype dtype,
                      struct ltn_error *err)
{
    if (dtype == LTN_BF16 && be->batch_hopper)
        return batch_hopper(be, p, err);
    return dtype == LTN_BF16 ? choose<__nv_bfloat16>(be, p, err) : choose<__half>(be, p, err);
}

template <typename W, int M, int N>
static enum ltn_status allow_shared(struct cuda_backend *be, struct ltn_error *err)
{
    if (be->max_shared >= shared_bytes(M, N))
        CUDA_TRY(be, err,
                 cudaFuncSetAttribute(batch_kernel<W, M, N>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      (int)shared_bytes(M, N)));
    return LTN_OK;
}

template <typename W> static enum ltn_status open_for(struct cuda_backend *be, struct ltn_error *err)
{
    LTN_TRY((allow_shared<W, 128, 8>(be, err)));
    LTN_TRY((allow_shared<W, 128, 2>(be, err)));
    LTN_TRY((allow_shared<W, 64, 8>(be, err)));
    return allow_shared<W, 64, 2>(be, err);
}

enum ltn_status batch_open(struct cuda_backend *be, struct ltn_error *err)
{
    if (be->base.act_dtype == LTN_F32)
        return LTN_OK;
    const size_t counters = COUNTERS * sizeof(uint32_t);
    LTN_TRY(device_alloc(be, (void **)&be->partials,
                         counters + (size_t)MAX_PARTS * TILE_FLOATS * sizeof(float), err));
    CUDA_TRY(be, err, cudaMemsetAsync(be->partials, 0, counters, be->stream));
    be->batch_hopper = batch_hopper_open(be, err);
    LTN_TRY(open_for<__nv_bfloat16>(be, err));
    return open_for<__half>(be, err);
}
