/* y = x W^T + b for many rows: cuBLASLt where sizes and addresses suit it, else a plain tiled kernel.
 *
 * cuBLASLt is opened when it is first needed, as that takes longer than everything else at start-up. Its
 * algorithm for a shape is that of gemm_table.h where it has one (compute capability 9.0), else the library's
 * own first suggestion under a fixed workspace; nothing is timed at run time, so the same machine gives the
 * same bits. f32 runs in f32, not tf32.
 *
 * f16 weights: cuBLASLt wants one type on both sides, and rounding weights to bf16 would lose three of their
 * bits. The activations become f16 instead, scaled by a power of two that puts their largest magnitude near
 * the top of f16's range; the product's alpha takes the scale out again. */
#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/gemm_table.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <new>

/* ---- the plain kernel: any size, any type ----------------------------------------------------------------
 */

enum { TILE = 64, TILE_K = 16, THREADS = 256 };

template <typename W, typename A>
static __global__ void __launch_bounds__(THREADS) tile_kernel(const __grid_constant__ struct product p)
{
    __shared__ __align__(16) float sx[TILE_K][TILE + 4], sw[TILE_K][TILE + 4];
    const int64_t row0 = (int64_t)blockIdx.x * TILE, out0 = (int64_t)blockIdx.y * TILE;
    const int r = threadIdx.x / 16 * 4, n = threadIdx.x % 16 * 4;
    float acc[4][4] = {};

    let_next_start();
    wait_for_previous();
    for (int32_t k0 = 0; k0 < p.cols; k0 += TILE_K) {
        for (int i = threadIdx.x; i < TILE * TILE_K; i += THREADS) {
            const int k = i % TILE_K, at = i / TILE_K;
            const bool in = k0 + k < p.cols;
            const int64_t row = row0 + at, out = out0 + at;
            sx[k][at] = in && row < p.rows ? load_fresh((const A *)p.x + row * p.cols + k0 + k) : 0;
            sw[k][at] = in && out < p.outs ? to_f32(((const W *)p.w)[out * p.cols + k0 + k]) : 0;
        }
        __syncthreads();
        for (int k = 0; k < TILE_K; k++) {
            const float4 xs = *reinterpret_cast<const float4 *>(&sx[k][r]);
            const float4 ws = *reinterpret_cast<const float4 *>(&sw[k][n]);
            const float xa[4] = {xs.x, xs.y, xs.z, xs.w}, wa[4] = {ws.x, ws.y, ws.z, ws.w};
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++)
                    acc[i][j] = fmaf(xa[i], wa[j], acc[i][j]);
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            const int64_t row = row0 + r + i, out = out0 + n + j;
            if (row >= p.rows || out >= p.outs)
                continue;
            const float value = acc[i][j] + (p.bias ? p.bias[out] : 0);
            const int64_t at = row * p.outs + out;
            if (p.out == OUT_ACT)
                ((A *)p.y)[at] = from_f32<A>(value);
            else
                ((float *)p.y)[at] = value + (p.out == OUT_ADD ? load_fresh((float *)p.y + at) : 0);
        }
    }
}

template <typename W, typename A>
static enum ltn_status tiles(struct cuda_backend *be, const struct product *p, struct ltn_error *err)
{
    LAUNCH(be, err, (tile_kernel<W, A>), dim3(blocks_for(p->rows, TILE), blocks_for(p->outs, TILE)),
           dim3(THREADS), 0, *p);
    return LTN_OK;
}

/* ---- what goes around a library product ------------------------------------------------------------------
 */

template <typename Y> static __global__ void bias_kernel(Y *y, const float *bias, int64_t n, int32_t outs)
{
    let_next_start();
    wait_for_previous();
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        y[i] = from_f32<Y>(load_fresh(y + i) + bias[i % outs]);
}

static unsigned wide_grid(int64_t n)
{
    return blocks_for(n < 1 << 20 ? n : 1 << 20, THREADS);
}

/* Device scalars of the f16 path. */
struct scalars {
    uint32_t largest; /* bits of the largest magnitude */
    float alpha;      /* undoes the scale */
    float zero, one;
};

static __global__ void start_kernel(struct scalars *s)
{
    let_next_start();
    wait_for_previous();
    *s = {0, 1, 0, 1};
}

/* Non-negative floats order like their bits, so that the maximum is the same in any order. */
static __global__ void largest_kernel(struct scalars *s, const __nv_bfloat16 *x, int64_t n)
{
    let_next_start();
    wait_for_previous();
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    float most = 0;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        most = fmaxf(most, fabsf(load_fresh(x + i)));
    for (int offset = 16; offset > 0; offset /= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    if (threadIdx.x % 32 == 0)
        atomicMax(&s->largest, __float_as_uint(most));
}

static __global__ void convert_kernel(__half *y, struct scalars *s, const __nv_bfloat16 *x, int64_t n)
{
    let_next_start();
    wait_for_previous();
    /* largest * 2^shift lies in [2^14, 2^15) */
    const float largest = __uint_as_float(__ldcg(&s->largest));
    const int shift = largest > 0 && largest < INFINITY ? min(max(14 - ilogbf(largest), -100), 100) : 0;
    const float scale = ldexpf(1, shift);
    const int64_t stride = (int64_t)gridDim.x * blockDim.x, first = (int64_t)blockIdx.x * blockDim.x;
    for (int64_t i = first + threadIdx.x; i < n; i += stride)
        y[i] = __float2half(load_fresh(x + i) * scale);
    if (first + threadIdx.x == 0)
        s->alpha = 1 / scale;
}

/* ---- cuBLASLt --------------------------------------------------------------------------------------------
 */

#define LT_FUNCTIONS(F)                                                                                      \
    F(cublasLtCreate)                                                                                        \
    F(cublasLtDestroy)                                                                                       \
    F(cublasLtMatmulDescCreate)                                                                              \
    F(cublasLtMatmulDescDestroy)                                                                             \
    F(cublasLtMatmulDescSetAttribute)                                                                        \
    F(cublasLtMatrixLayoutCreate)                                                                            \
    F(cublasLtMatrixLayoutDestroy)                                                                           \
    F(cublasLtMatmulPreferenceCreate)                                                                        \
    F(cublasLtMatmulPreferenceDestroy)                                                                       \
    F(cublasLtMatmulPreferenceSetAttribute)                                                                  \
    F(cublasLtMatmulAlgoGetHeuristic)                                                                        \
    F(cublasLtMatmulAlgoInit)                                                                                \
    F(cublasLtMatmulAlgoConfigSetAttribute)                                                                  \
    F(cublasLtMatmulAlgoCheck)                                                                               \
    F(cublasLtMatmul)

/* A product that was asked for before. */
struct plan {
    struct {
        int32_t outs, cols, rows;
        enum product_out out;
        cudaDataType_t type; /* of both inputs */
    } key;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t w, x, y;
    bool usable; /* false: cuBLASLt has nothing for it */
    cublasLtMatmulAlgo_t algo;
};

enum { PLANS = 64 };

struct gemm_library {
    void *handle; /* of dlopen; NULL: not installed here */
#define DECLARE(name) decltype(&::name) name;
    LT_FUNCTIONS(DECLARE)
#undef DECLARE
    cublasLtHandle_t lt;
    struct plan plans[PLANS]; /* by hash; a newcomer takes the place */
};

static enum ltn_status lt_fail(struct cuda_backend *be, struct ltn_error *err, const char *call, int line,
                               cublasStatus_t code)
{
    return ltn_fail(err, LTN_ERR_DEVICE, "cuda:%d: status %d: gemm.cu:%d: %s", be->device, (int)code, line,
                    call);
}

#define LT_TRY(be, err, name, ...)                                                                           \
    do {                                                                                                     \
        cublasStatus_t lt_code_ = (be)->gemm->name(__VA_ARGS__);                                             \
        if (lt_code_ != CUBLAS_STATUS_SUCCESS)                                                               \
            return lt_fail(be, err, #name, __LINE__, lt_code_);                                              \
    } while (0)

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

/* Where the library is missing, be->gemm->lt stays NULL and the plain kernel does the work. */
static enum ltn_status gemm_open(struct cuda_backend *be, struct ltn_error *err)
{
    if (be->gemm)
        return LTN_OK;
    be->gemm = new (std::nothrow) gemm_library();
    if (!be->gemm)
        return ltn_fail(err, LTN_ERR_MEMORY, "host memory: no room for the table of matrix products");
    struct gemm_library *g = be->gemm;
    g->handle = dlopen("libcublasLt.so." TEXT(CUBLAS_VER_MAJOR), RTLD_NOW | RTLD_LOCAL);
    if (!g->handle)
        return LTN_OK;
#define RESOLVE(name)                                                                                        \
    g->name = reinterpret_cast<decltype(g->name)>(dlsym(g->handle, #name));                                  \
    if (!g->name)                                                                                            \
        return ltn_fail(err, LTN_ERR_DEVICE, "libcublasLt: no function %s in it", #name);
    LT_FUNCTIONS(RESOLVE)
#undef RESOLVE
    LT_TRY(be, err, cublasLtCreate, &g->lt);
    return LTN_OK;
}

static void plan_free(struct gemm_library *g, struct plan *plan)
{
    if (plan->desc)
        g->cublasLtMatmulDescDestroy(plan->desc);
    for (cublasLtMatrixLayout_t layout : {plan->w, plan->x, plan->y})
        if (layout)
            g->cublasLtMatrixLayoutDestroy(layout);
    *plan = {};
}

void gemm_close(struct cuda_backend *be)
{
    struct gemm_library *g = be->gemm;
    if (!g)
        return;
    for (struct plan &plan : g->plans)
        plan_free(g, &plan);
    if (g->lt)
        g->cublasLtDestroy(g->lt);
    if (g->handle)
        dlclose(g->handle);
    delete g;
    be->gemm = NULL;
}

/* The table's algorithm for a plan; false: it has none, or this library or GPU does not take it. */
static bool chosen(const struct cuda_backend *be, struct plan *plan, cudaDataType_t type_y)
{
    const auto &key = plan->key;
    const struct gemm_library *g = be->gemm;
    if (!be->hopper || key.type != CUDA_R_16BF)
        return false;
    for (const struct gemm_choice &c : GEMM_H100) {
        if (c.outs != key.outs || c.cols != key.cols || c.out != key.out || key.rows <= c.from ||
            key.rows > c.to)
            continue;
        if (g->cublasLtMatmulAlgoInit(g->lt, CUBLAS_COMPUTE_32F, CUDA_R_32F, key.type, key.type, type_y,
                                      type_y, c.id, &plan->algo) != CUBLAS_STATUS_SUCCESS)
            return false;
        const struct {
            cublasLtMatmulAlgoConfigAttributes_t what;
            const void *value;
            size_t bytes;
        } settings[] = {{CUBLASLT_ALGO_CONFIG_TILE_ID, &c.tile, sizeof c.tile},
                        {CUBLASLT_ALGO_CONFIG_STAGES_ID, &c.stages, sizeof c.stages},
                        {CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &c.split_k, sizeof c.split_k},
                        {CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &c.reduction, sizeof c.reduction},
                        {CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, &c.swizzle, sizeof c.swizzle},
                        {CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, &c.custom, sizeof c.custom},
                        {CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, &c.inner, sizeof c.inner},
                        {CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, &c.cluster, sizeof c.cluster}};
        for (const auto &s : settings)
            if (g->cublasLtMatmulAlgoConfigSetAttribute(&plan->algo, s.what, s.value, s.bytes) !=
                CUBLAS_STATUS_SUCCESS)
                return false;
        cublasLtMatmulHeuristicResult_t result = {};
        return g->cublasLtMatmulAlgoCheck(g->lt, plan->desc, plan->w, plan->x, plan->y, plan->y, &plan->algo,
                                          &result) == CUBLAS_STATUS_SUCCESS &&
               result.workspaceSize <= WORKSPACE_BYTES;
    }
    return false;
}

/* Fills a plan. cuBLASLt thinks in columns: our row-major y [rows, outs] is its [outs, rows]. */
static enum ltn_status plan_make(struct cuda_backend *be, struct plan *plan, struct ltn_error *err)
{
    const auto &key = plan->key;
    const cudaDataType_t type_y = key.out == OUT_ACT && key.type != CUDA_R_32F ? CUDA_R_16BF : CUDA_R_32F;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const size_t workspace = WORKSPACE_BYTES;

    LT_TRY(be, err, cublasLtMatmulDescCreate, &plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    LT_TRY(be, err, cublasLtMatmulDescSetAttribute, plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
           sizeof transposed);
    if (key.type == CUDA_R_16F) {
        const cublasLtPointerMode_t on_device = CUBLASLT_POINTER_MODE_DEVICE;
        LT_TRY(be, err, cublasLtMatmulDescSetAttribute, plan->desc, CUBLASLT_MATMUL_DESC_POINTER_MODE,
               &on_device, sizeof on_device);
    }
    LT_TRY(be, err, cublasLtMatrixLayoutCreate, &plan->w, key.type, key.cols, key.outs, key.cols);
    LT_TRY(be, err, cublasLtMatrixLayoutCreate, &plan->x, key.type, key.cols, key.rows, key.cols);
    LT_TRY(be, err, cublasLtMatrixLayoutCreate, &plan->y, type_y, key.outs, key.rows, key.outs);

    plan->usable = chosen(be, plan, type_y);
    if (plan->usable)
        return LTN_OK;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t result = {};
    int n = 0;
    LT_TRY(be, err, cublasLtMatmulPreferenceCreate, &preference);
    cublasStatus_t code = be->gemm->cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    if (code == CUBLAS_STATUS_SUCCESS)
        code = be->gemm->cublasLtMatmulAlgoGetHeuristic(be->gemm->lt, plan->desc, plan->w, plan->x, plan->y,
                                                        plan->y, preference, 1, &result, &n);
    be->gemm->cublasLtMatmulPreferenceDestroy(preference);
    plan->usable = code == CUBLAS_STATUS_SUCCESS && n > 0 && result.state == CUBLAS_STATUS_SUCCESS;
    plan->algo = result.algo;
    return LTN_OK;
}

static enum ltn_status plan_for(struct cuda_backend *be, struct plan **out, const struct product *p,
                                cudaDataType_t type, struct ltn_error *err)
{
    uint32_t hash = 2166136261u;
    for (uint32_t part : {(uint32_t)p->outs, (uint32_t)p->cols, (uint32_t)p->rows, (uint32_t)p->out})
        hash = (hash ^ part) * 16777619u;
    struct plan *plan = &be->gemm->plans[(hash ^ hash >> 16) % PLANS];
    if (!plan->desc || plan->key.outs != p->outs || plan->key.cols != p->cols || plan->key.rows != p->rows ||
        plan->key.out != p->out || plan->key.type != type) {
        plan_free(be->gemm, plan);
        plan->key = {p->outs, p->cols, p->rows, p->out, type};
        enum ltn_status status = plan_make(be, plan, err);
        if (status != LTN_OK) {
            plan_free(be->gemm, plan);
            return status;
        }
    }
    *out = plan;
    return LTN_OK;
}

/* *done: whether cuBLASLt took it. */
static enum ltn_status library(struct cuda_backend *be, const struct product *p, enum ltn_dtype dtype,
                               bool *done, struct ltn_error *err)
{
    const cudaDataType_t type = dtype == LTN_F32 ? CUDA_R_32F : dtype == LTN_BF16 ? CUDA_R_16BF : CUDA_R_16F;
    struct gemm_library *g = be->gemm;
    struct plan *plan;
    const float one = 1, zero = 0;
    const float *alpha = &one, *beta = p->out == OUT_ADD ? &one : &zero;
    const void *x = p->x;
    void *workspace;

    LTN_TRY(plan_for(be, &plan, p, type, err));
    *done = plan->usable;
    if (!plan->usable)
        return LTN_OK;
    LTN_TRY(room_part(be, &workspace, ROOM_LIBRARY, WORKSPACE_BYTES, err));
    if (dtype == LTN_F16) {
        const int64_t n = (int64_t)p->rows * p->cols;
        void *converted;
        LTN_TRY(room_part(be, &converted, ROOM_CONVERTED, CONVERTED_BYTES + sizeof(struct scalars), err));
        struct scalars *s = (struct scalars *)((uint8_t *)converted + CONVERTED_BYTES);
        LAUNCH(be, err, start_kernel, dim3(1), dim3(1), 0, s);
        LAUNCH(be, err, largest_kernel, dim3(wide_grid(n)), dim3(THREADS), 0, s, (const __nv_bfloat16 *)x, n);
        LAUNCH(be, err, convert_kernel, dim3(wide_grid(n)), dim3(THREADS), 0, (__half *)converted, s,
               (const __nv_bfloat16 *)x, n);
        x = converted;
        alpha = &s->alpha;
        beta = p->out == OUT_ADD ? &s->one : &s->zero;
    }
    LT_TRY(be, err, cublasLtMatmul, g->lt, plan->desc, alpha, p->w, plan->w, x, plan->x, beta, p->y, plan->y,
           p->y, plan->y, &plan->algo, workspace, WORKSPACE_BYTES, be->stream);
    if (p->bias) {
        const int64_t n = (int64_t)p->rows * p->outs;
        if (p->out == OUT_ACT && be->base.act_dtype == LTN_BF16)
            LAUNCH(be, err, bias_kernel<__nv_bfloat16>, dim3(wide_grid(n)), dim3(THREADS), 0,
                   (__nv_bfloat16 *)p->y, p->bias, n, p->outs);
        else
            LAUNCH(be, err, bias_kernel<float>, dim3(wide_grid(n)), dim3(THREADS), 0, (float *)p->y, p->bias,
                   n, p->outs);
    }
    return LTN_OK;
}

void gemm_room(const struct ltn_network *net, size_t *needed)
{
    raise(&needed[ROOM_LIBRARY], WORKSPACE_BYTES);
    if (net->embed.dtype == LTN_F16)
        raise(&needed[ROOM_CONVERTED], CONVERTED_BYTES + sizeof(struct scalars));
}

/* ---- dispatch --------------------------------------------------------------------------------------------
 */

static bool suits_library(const struct product *p)
{
    return p->cols % 8 == 0 && p->outs % 8 == 0 && aligned16(p->w) && aligned16(p->x) && aligned16(p->y);
}

enum ltn_status gemm(struct cuda_backend *be, const struct product *p, enum ltn_dtype dtype,
                     struct ltn_error *err)
{
    bool library_first = suits_library(p);
    if (library_first) {
        LTN_TRY(gemm_open(be, err));
        library_first = be->gemm->lt != NULL;
    }
    /* f16 activations pass through a buffer of fixed size: so many rows at a time. */
    const int64_t most = dtype == LTN_F16 ? CONVERTED_BYTES / 2 / p->cols : p->rows;
    const size_t x_size = ltn_dtype_size(be->base.act_dtype), y_size = p->out == OUT_ACT ? x_size : 4;
    for (int64_t first = 0; first < p->rows; first += most) {
        struct product part = *p;
        bool done = false;
        part.rows = (int32_t)(p->rows - first < most ? p->rows - first : most);
        part.x = (const uint8_t *)p->x + first * p->cols * x_size;
        part.y = (uint8_t *)p->y + first * p->outs * y_size;
        if (library_first)
            LTN_TRY(library(be, &part, dtype, &done, err));
#define TILES(W, A) tiles<W, A>(be, &part, err)
        if (!done)
            LTN_TRY(FOR_TYPES(be, err, dtype, TILES));
#undef TILES
    }
    return LTN_OK;
}
