/* Operations that go row by row or element by element: embedding, norms, feature maps, products. */
#include "kernels/cuda/quant.cuh"

enum { THREADS = 256 };

/* ---- embedding -------------------------------------------------------------------------------------------
 */

template <typename W>
static __global__ void embed_kernel(float *x, const W *table, const int32_t *ids, int32_t cols, float scale)
{
    let_next_start();
    wait_for_previous();
    const int64_t row = blockIdx.y;
    const W *from = table + (int64_t)__ldcg(ids + row) * cols;
    for (int32_t c = blockIdx.x * blockDim.x + threadIdx.x; c < cols; c += gridDim.x * blockDim.x)
        x[row * cols + c] = scale * to_f32(from[c]);
}

template <typename W, typename A>
static enum ltn_status embed(struct cuda_backend *be, float *x, const struct ltn_matrix *table,
                             const int32_t *ids, int32_t rows, float scale, struct ltn_error *err)
{
    /* A grid has at most 65,535 rows. */
    for (int32_t first = 0; first < rows; first += 65535) {
        int32_t n = rows - first < 65535 ? rows - first : 65535;
        LAUNCH(be, err, embed_kernel<W>, dim3(blocks_for(table->cols, THREADS), n), dim3(THREADS), 0,
               x + (int64_t)first * table->cols, (const W *)table->data, ids + first, table->cols, scale);
    }
    return LTN_OK;
}

enum ltn_status cuda_embed(struct ltn_backend *base, float *x, const struct ltn_matrix *table,
                           const int32_t *ids, int32_t rows, float scale, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    if (ltn_is_quantised(table->dtype))
        return quant_embed(be, x, table, ids, rows, scale, err);
#define EMBED(W, A) embed<W, A>(be, x, table, ids, rows, scale, err)
    return FOR_TYPES(be, err, table->dtype, EMBED);
#undef EMBED
}

/* ---- norms -----------------------------------------------------------------------------------------------
 */

/* y = gate * Norm(x), one block per row; gate may be NULL. The row is read again where it is needed again: it
 * then lies in the L1 or L2 cache. */
template <typename X, typename A>
static __global__ void __launch_bounds__(THREADS)
    norm_kernel(A *y, const X *x, const A *gate, int32_t ld_gate, struct ltn_norm norm, int32_t cols)
{
    __shared__ float scratch[32];
    const int64_t row = blockIdx.x;
    let_next_start();
    wait_for_previous();
    x += row * cols;
    y += row * cols;
    gate = gate ? gate + row * ld_gate : NULL;

    float mean = 0;
    if (norm.weight) {
        for (int32_t c = threadIdx.x; c < cols; c += THREADS)
            mean += load_fresh(x + c);
        mean = block_sum(mean, scratch) / cols;
    }
    float sum = 0;
    for (int32_t c = threadIdx.x; c < cols; c += THREADS) {
        float v = load_fresh(x + c) - mean;
        sum += v * v;
    }
    const float inverse = rsqrtf(block_sum(sum, scratch) / cols + (norm.weight ? 1e-5f : 1e-6f));
    for (int32_t c = threadIdx.x; c < cols; c += THREADS) {
        float v = (load_fresh(x + c) - mean) * inverse;
        if (norm.weight)
            v = v * norm.weight[c] + norm.bias[c];
        y[c] = from_f32<A>(gate ? load_fresh(gate + c) * v : v);
    }
}

/* The same for rows that fit in registers, HELD fours a thread, so that they are read once. */
enum { HELD = 4 };

static __device__ __forceinline__ void store4(float *p, float4 v)
{
    *reinterpret_cast<float4 *>(p) = v;
}
static __device__ __forceinline__ void store4(__nv_bfloat16 *p, float4 v)
{
    const __nv_bfloat162 a = __floats2bfloat162_rn(v.x, v.y), b = __floats2bfloat162_rn(v.z, v.w);
    *reinterpret_cast<uint2 *>(p) =
        make_uint2(*reinterpret_cast<const uint32_t *>(&a), *reinterpret_cast<const uint32_t *>(&b));
}

template <typename X, typename A>
static __global__ void __launch_bounds__(THREADS)
    short_norm_kernel(A *y, const X *x, const A *gate, int32_t ld_gate, int32_t cols)
{
    __shared__ float scratch[32];
    const int64_t row = blockIdx.x;
    float4 v[HELD] = {}, g[HELD];
    float sum = 0;
    let_next_start();
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int32_t c = (i * THREADS + threadIdx.x) * 4;
        g[i] = make_float4(1, 1, 1, 1);
        if (c < cols) {
            v[i] = load_fresh4(x + row * cols + c);
            if (gate)
                g[i] = load_fresh4(gate + row * ld_gate + c);
        }
    }
#pragma unroll
    for (int i = 0; i < HELD; i++)
        sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    const float inverse = rsqrtf(block_sum(sum, scratch) / cols + 1e-6f);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int32_t c = (i * THREADS + threadIdx.x) * 4;
        if (c < cols)
            store4(y + row * cols + c, make_float4(v[i].x * inverse * g[i].x, v[i].y * inverse * g[i].y,
                                                   v[i].z * inverse * g[i].z, v[i].w * inverse * g[i].w));
    }
}

template <typename X, typename A>
static enum ltn_status norm(struct cuda_backend *be, A *y, const X *x, const A *gate, int32_t ld_gate,
                            const struct ltn_norm *norm, int32_t rows, int32_t cols, struct ltn_error *err)
{
    const bool is_short = !norm->weight && cols <= HELD * THREADS * 4 && cols % 8 == 0 && ld_gate % 8 == 0 &&
                          aligned16(y) && aligned16(x) && aligned16(gate);
    if (is_short)
        LAUNCH(be, err, (short_norm_kernel<X, A>), dim3(rows), dim3(THREADS), 0, y, x, gate, ld_gate, cols);
    else
        LAUNCH(be, err, (norm_kernel<X, A>), dim3(rows), dim3(THREADS), 0, y, x, gate, ld_gate, *norm, cols);
    return LTN_OK;
}

enum ltn_status cuda_norm(struct ltn_backend *base, void *y, const float *x, const struct ltn_norm *how,
                          int32_t rows, int32_t cols, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    return base->act_dtype == LTN_F32
               ? norm<float, float>(be, (float *)y, x, NULL, 0, how, rows, cols, err)
               : norm<float, __nv_bfloat16>(be, (__nv_bfloat16 *)y, x, NULL, 0, how, rows, cols, err);
}

enum ltn_status cuda_gated_norm(struct ltn_backend *base, void *y, const void *o, const void *gate,
                                int32_t ld_gate, const struct ltn_norm *how, int32_t rows, int32_t cols,
                                struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    return base->act_dtype == LTN_F32
               ? norm(be, (float *)y, (const float *)o, (const float *)gate, ld_gate, how, rows, cols, err)
               : norm(be, (__nv_bfloat16 *)y, (const __nv_bfloat16 *)o, (const __nv_bfloat16 *)gate, ld_gate,
                      how, rows, cols, err);
}

/* ---- feature maps ----------------------------------------------------------------------------------------
 */

template <typename A>
static __global__ void activation_kernel(A *x, int64_t ld, int32_t rows, int32_t cols, enum ltn_act act)
{
    let_next_start();
    wait_for_previous();
    const int64_t n = (int64_t)rows * cols, stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
        A *at = x + i / cols * ld + i % cols;
        *at = from_f32<A>(activate(load_fresh(at), act));
    }
}

/* LTN_ACT_EXP: one warp per group. */
template <typename A>
static __global__ void exp_kernel(A *x, int64_t ld, int32_t rows, int32_t cols, int32_t group)
{
    let_next_start();
    wait_for_previous();
    const int64_t per_row = cols / group, at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    if (at >= rows * per_row)
        return;
    A *run = x + at / per_row * ld + at % per_row * group;
    float max = -INFINITY;
    for (int32_t c = lane; c < group; c += 32)
        max = fmaxf(max, load_fresh(run + c));
    for (int offset = 16; offset > 0; offset /= 2)
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, offset));
    for (int32_t c = lane; c < group; c += 32)
        run[c] = from_f32<A>(expf(load_fresh(run + c) - max));
}

template <typename A>
static enum ltn_status activation(struct cuda_backend *be, A *x, int32_t ld, int32_t rows, int32_t cols,
                                  int32_t group, enum ltn_act act, struct ltn_error *err)
{
    const int64_t n = (int64_t)rows * cols;
    if (act == LTN_ACT_EXP)
        LAUNCH(be, err, exp_kernel<A>, dim3(blocks_for(n / group, THREADS / 32)), dim3(THREADS), 0, x,
               (int64_t)ld, rows, cols, group);
    else if (act != LTN_ACT_NONE)
        LAUNCH(be, err, activation_kernel<A>, dim3(blocks_for(n < 1 << 22 ? n : 1 << 22, THREADS)),
               dim3(THREADS), 0, x, (int64_t)ld, rows, cols, act);
    return LTN_OK;
}

enum ltn_status cuda_activation(struct ltn_backend *base, void *x, int32_t ld, int32_t rows, int32_t cols,
                                int32_t group, enum ltn_act act, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    return base->act_dtype == LTN_F32 ? activation(be, (float *)x, ld, rows, cols, group, act, err)
                                      : activation(be, (__nv_bfloat16 *)x, ld, rows, cols, group, act, err);
}

/* ---- product ---------------------------------------------------------------------------------------------
 */

template <typename A> static __global__ void multiply_kernel(A *a, const A *b, int64_t n)
{
    let_next_start();
    wait_for_previous();
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        a[i] = from_f32<A>(load_fresh(a + i) * load_fresh(b + i));
}

enum ltn_status cuda_multiply(struct ltn_backend *base, void *a, const void *b, int64_t n,
                              struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    const dim3 grid(blocks_for(n < 1 << 22 ? n : 1 << 22, THREADS));
    if (base->act_dtype == LTN_F32)
        LAUNCH(be, err, multiply_kernel<float>, grid, dim3(THREADS), 0, (float *)a, (const float *)b, n);
    else
        LAUNCH(be, err, multiply_kernel<__nv_bfloat16>, grid, dim3(THREADS), 0, (__nv_bfloat16 *)a,
               (const __nv_bfloat16 *)b, n);
    return LTN_OK;
}
