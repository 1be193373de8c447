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

/* ---- to e4m3 ---------------------------------------------------------------------------------------------
 */

static __device__ __forceinline__ void load8(float (&v)[8], const float *p)
{
    const float4 a = load_fresh4(p), b = load_fresh4(p + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
static __device__ __forceinline__ void load8(float (&v)[8], const __half *p)
{
    const uint4 u = __ldcg(reinterpret_cast<const uint4 *>(p));
    const uint32_t w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2 *>(&w[i]));
        v[2 * i] = pair.x;
        v[2 * i + 1] = pair.y;
    }
}
static __device__ __forceinline__ void load8(float (&v)[8], const __nv_bfloat16 *p)
{
    const uint4 u = __ldcg(reinterpret_cast<const uint4 *>(p));
    const uint32_t w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = __uint_as_float(w[i] << 16);
        v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
}

/* y scale = gate * x, or gate * Norm(x) with `norm`; scale: a row's largest magnitude over E4M3_MAX. One
 * block a row, N eights a thread. */
template <typename X, int N>
static __global__ void __launch_bounds__(THREADS)
    fp8_kernel(uint8_t *y, float *scale, const X *x, const __nv_bfloat16 *gate, int32_t ld_gate, int32_t cols,
               bool norm)
{
    constexpr float E4M3_MAX = 448;
    __shared__ float sums[THREADS / 32], tops[THREADS / 32];
    const int64_t row = blockIdx.x;
    float v[N][8] = {}, sum = 0, top = 0;
    let_next_start();
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int32_t c = (i * THREADS + threadIdx.x) * 8;
        if (c < cols)
            load8(v[i], x + row * cols + c);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int32_t c = (i * THREADS + threadIdx.x) * 8;
        float g[8];
        if (gate && c < cols)
            load8(g, gate + row * ld_gate + c);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            sum += v[i][k] * v[i][k];
            if (gate && c < cols)
                v[i][k] *= g[k];
            top = fmaxf(top, fabsf(v[i][k]));
        }
    }
    sum = warp_sum(sum);
    for (int offset = 16; offset > 0; offset /= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = sum;
        tops[threadIdx.x / 32] = top;
    }
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) {
        sum += sums[i];
        top = fmaxf(top, tops[i]);
    }
    const float by = top > 0 ? E4M3_MAX / top : 0;
    if (threadIdx.x == 0)
        scale[row] = top / E4M3_MAX * (norm ? rsqrtf(sum / cols + 1e-6f) : 1);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int32_t c = (i * THREADS + threadIdx.x) * 8;
        uint32_t codes[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            codes[k] = __nv_cvt_float2_to_fp8x2(make_float2(v[i][2 * k] * by, v[i][2 * k + 1] * by),
                                                __NV_SATFINITE, __NV_E4M3);
        if (c < cols)
            *reinterpret_cast<uint2 *>(y + row * cols + c) =
                make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
    }
}

template <typename X>
static enum ltn_status to_fp8(struct cuda_backend *be, struct fp8_rows *y, const X *x, const void *gate,
                              int32_t ld_gate, bool norm, int32_t rows, int32_t cols, struct ltn_error *err)
{
    const __nv_bfloat16 *g = (const __nv_bfloat16 *)gate;
#define FP8(N)                                                                                               \
    LAUNCH(be, err, (fp8_kernel<X, N>), dim3(rows), dim3(THREADS), 0, y->codes, y->scales, x, g, ld_gate,    \
           cols, norm)
    if (cols <= 8 * THREADS)
        FP8(1);
    else if (cols <= 2 * 8 * THREADS)
        FP8(2);
    else if (cols <= 3 * 8 * THREADS)
        FP8(3);
    else
        FP8(FP8_COLS / 8 / THREADS);
#undef FP8
    return LTN_OK;
}

enum ltn_status rows_to_fp8(struct cuda_backend *be, struct fp8_rows *y, const struct product *p,
                            struct ltn_error *err)
{
    return p->in == IN_NORM ? to_fp8(be, y, (const float *)p->x, NULL, 0, true, p->rows, p->cols, err)
           : p->in == IN_GATED
               ? to_fp8(be, y, (const __nv_bfloat16 *)p->x, p->gate, p->ld_gate, true, p->rows, p->cols, err)
               : to_fp8(be, y, (const __nv_bfloat16 *)p->x, NULL, 0, false, p->rows, p->cols, err);
}

enum ltn_status cuda_matrix_fp8(struct ltn_backend *base, const struct ltn_matrix *out,
                                const struct ltn_matrix *w, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    struct fp8_rows y = {(uint8_t *)out->data, (float *)out->scales};
    if (!be->hopper)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                        "%s: no products in fp8 here, they need compute capability 9.0", base->name);
    if (w->cols % 16 != 0 || w->cols > FP8_COLS || (w->dtype != LTN_BF16 && w->dtype != LTN_F16))
        return ltn_fail(
            err, LTN_ERR_UNSUPPORTED,
            "cuda:%d: a %s matrix of %d columns has no fp8 form: BF16 or F16, columns a multiple of 16 "
            "and at most %d are needed",
            be->device, ltn_dtype_name(w->dtype), w->cols, FP8_COLS);
    return w->dtype == LTN_BF16
               ? to_fp8(be, &y, (const __nv_bfloat16 *)w->data, NULL, 0, false, w->rows, w->cols, err)
               : to_fp8(be, &y, (const __half *)w->data, NULL, 0, false, w->rows, w->cols, err);
}
