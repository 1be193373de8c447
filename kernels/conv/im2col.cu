/* im2col and cuBLAS: every window a column of its own in the workspace, then one library product; for the
 * whole batch at once, and image by image (the fallback of PyTorch). NCHW.
 *
 * With many places per image the batch is one strided batch of products, image by image in the library, whose
 * results lie as y does. With few, those products would be too small: the columns of all images lie side by
 * side, [ci hf wf][n][ho wo], for one product, whose result [co][n][ho wo] a last pass puts in order.
 *
 * cuBLAS is opened when it is first needed. */
#include "kernels/conv/conv.cuh"

#include <cublas_v2.h>
#include <dlfcn.h>
#include <new>
#include <stdio.h>

enum { JOINT_BELOW = 1024 /* places per image */, BLAS_WORKSPACE = 32 << 20 };

/* ---- cuBLAS -----------------------------------------------------------------------------------------------
 */

#define BLAS_FUNCTIONS(F)                                                                                    \
    F(cublasCreate_v2)                                                                                       \
    F(cublasDestroy_v2)                                                                                      \
    F(cublasSetStream_v2)                                                                                    \
    F(cublasSetWorkspace_v2)                                                                                 \
    F(cublasGetVersion_v2)

typedef cublasStatus_t blas_product_fn(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n,
                                       int k, const void *alpha, const void *a, cudaDataType, int lda,
                                       long long stride_a, const void *b, cudaDataType, int ldb,
                                       long long stride_b, const void *beta, void *c, cudaDataType, int ldc,
                                       long long stride_c, int batch, cublasComputeType_t, cublasGemmAlgo_t);

struct blas_library {
    void *handle; /* of dlopen */
#define DECLARE(name) decltype(&::name) name;
    BLAS_FUNCTIONS(DECLARE)
#undef DECLARE
    blas_product_fn *product; /* cublasGemmStridedBatchedEx, which C++ has overloaded */
    cublasHandle_t blas;
    void *workspace;
};

#define BLAS_TRY(dev, err, name, ...)                                                                        \
    do {                                                                                                     \
        cublasStatus_t blas_code_ = (dev)->blas->name(__VA_ARGS__);                                          \
        if (blas_code_ != CUBLAS_STATUS_SUCCESS)                                                             \
            return ltn_fail(err, LTN_ERR_DEVICE, "cuda:%d: " #name " failed with status %d", (dev)->device,  \
                            (int)blas_code_);                                                                \
    } while (0)

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define BLAS_LIBRARY "libcublas.so." TEXT(CUBLAS_VER_MAJOR)

static enum ltn_status blas_open(struct conv_device *dev, struct ltn_error *err)
{
    if (dev->blas && dev->blas->blas)
        return LTN_OK;
    blas_close(dev); /* what an attempt that failed half-way left */
    dev->blas = new (std::nothrow) blas_library();
    if (!dev->blas)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory");
    struct blas_library *b = dev->blas;
    b->handle = dlopen(BLAS_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (!b->handle)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "cuBLAS: %s", dlerror());
#define RESOLVE(name)                                                                                        \
    b->name = reinterpret_cast<decltype(b->name)>(dlsym(b->handle, #name));                                  \
    if (!b->name)                                                                                            \
        return ltn_fail(err, LTN_ERR_DEVICE, BLAS_LIBRARY ": no function " #name " in it");
    BLAS_FUNCTIONS(RESOLVE)
#undef RESOLVE
    b->product = reinterpret_cast<blas_product_fn *>(dlsym(b->handle, "cublasGemmStridedBatchedEx"));
    if (!b->product)
        return ltn_fail(err, LTN_ERR_DEVICE, BLAS_LIBRARY ": no function cublasGemmStridedBatchedEx in it");
    LTN_TRY(conv_alloc(dev, &b->workspace, BLAS_WORKSPACE, err));
    BLAS_TRY(dev, err, cublasCreate_v2, &b->blas);
    BLAS_TRY(dev, err, cublasSetStream_v2, b->blas, dev->stream);
    BLAS_TRY(dev, err, cublasSetWorkspace_v2, b->blas, b->workspace, BLAS_WORKSPACE);
    return LTN_OK;
}

void blas_close(struct conv_device *dev)
{
    struct blas_library *b = dev->blas;
    if (!b)
        return;
    if (b->blas)
        b->cublasDestroy_v2(b->blas);
    cudaFree(b->workspace);
    if (b->handle)
        dlclose(b->handle);
    delete b;
    dev->blas = NULL;
}

void blas_name(struct conv_device *dev, char *text, size_t size)
{
    struct ltn_error ignored;
    int version = 0;
    const size_t used = strlen(text);
    if (blas_open(dev, &ignored) == LTN_OK &&
        dev->blas->cublasGetVersion_v2(dev->blas->blas, &version) == CUBLAS_STATUS_SUCCESS)
        snprintf(text + used, size - used, ", cuBLAS %d", version);
}

enum ltn_status blas_peak(struct conv_device *dev, double *tflops, struct ltn_error *err)
{
    enum { SIDE = 8192, TIMES = 6 };
    const size_t bytes = (size_t)SIDE * SIDE * 2;
    const float one = 1, zero = 0;
    void *a = NULL;
    float ms = 0;
    cudaEvent_t begin, end;

    *tflops = 0;
    if (blas_open(dev, err) != LTN_OK)
        return LTN_OK;
    LTN_TRY(conv_alloc(dev, &a, 3 * bytes, err));
    uint8_t *const p = (uint8_t *)a;
    enum ltn_status status =
        dev->base.ops->normal(&dev->base, a, LTN_CONV_BF16, 3 * (int64_t)SIDE * SIDE, 5, err);
    if (status == LTN_OK && cudaEventCreate(&begin) == cudaSuccess) {
        if (cudaEventCreate(&end) == cudaSuccess) {
            for (int i = 0; i < 2 * TIMES; i++) {
                if (i == TIMES)
                    cudaEventRecord(begin, dev->stream);
                dev->blas->product(dev->blas->blas, CUBLAS_OP_T, CUBLAS_OP_N, SIDE, SIDE, SIDE, &one, p,
                                   CUDA_R_16BF, SIDE, 0, p + bytes, CUDA_R_16BF, SIDE, 0, &zero,
                                   p + 2 * bytes, CUDA_R_16BF, SIDE, 0, 1, CUBLAS_COMPUTE_32F,
                                   CUBLAS_GEMM_DEFAULT);
            }
            cudaEventRecord(end, dev->stream);
            if (cudaEventSynchronize(end) == cudaSuccess &&
                cudaEventElapsedTime(&ms, begin, end) == cudaSuccess)
                *tflops = 2e-9 * SIDE * SIDE * SIDE * TIMES / ms;
            cudaEventDestroy(end);
        }
        cudaEventDestroy(begin);
    }
    cudaFree(a);
    return status;
}

/* ---- the columns ------------------------------------------------------------------------------------------
 */

/* [n][ci hf wf][places], or joint [ci hf wf][n][places]: rows of places, each with a major and a minor index.
 */
struct columns {
    struct ltn_conv_shape s; /* n: the images of this call */
    int32_t wo, places;      /* ho wo */
    bool joint;
    int64_t total; /* elements */
    struct conv_divisor by_places, by_minor, by_taps, by_wf, by_wo;
};

enum { COLUMN_THREADS = 256 };

/* Where rows are multiples of 16 bytes, and many. A thread: one channel and place, whose elements for all
 * taps lie a row apart. */
template <typename T>
static __global__ void __launch_bounds__(COLUMN_THREADS)
    aligned_columns_kernel(T *to, const T *x, const __grid_constant__ struct columns c)
{
    const struct ltn_conv_shape &s = c.s;
    const int64_t t = (int64_t)blockIdx.x * COLUMN_THREADS + threadIdx.x,
                  row = t / c.places; /* n ci + channel */
    if (row >= (int64_t)s.n * s.ci)
        return;
    const int32_t p = (int32_t)(t - row * c.places), m = p / c.wo, j = p - m * c.wo;
    const int32_t n = (int32_t)(row / s.ci), channel = (int32_t)(row - (int64_t)n * s.ci);
    const int32_t taps = s.hf * s.wf;
    const int64_t pitch = c.joint ? (int64_t)s.n * c.places : c.places;
    const int64_t h0 = (int64_t)m * s.sh - s.pt, w0 = (int64_t)j * s.sw - s.pl;
    const T *const image = x + row * s.hi * s.wi;
    to += (c.joint ? (int64_t)channel * taps * pitch + (int64_t)n * c.places : row * taps * pitch) + p;
    for (int32_t u = 0; u < s.hf; u++) {
        const int64_t h = h0 + (int64_t)u * s.dh;
        const bool inside = h >= 0 && h < s.hi;
#pragma unroll 4
        for (int32_t v = 0; v < s.wf; v++) {
            const int64_t w = w0 + (int64_t)v * s.dw;
            *to = inside && w >= 0 && w < s.wi ? image[h * s.wi + w] : (T)0.0f;
            to += pitch;
        }
    }
}

/* For all others: there the kernel above writes partial sectors, at half the speed. A thread writes 16 bytes;
 * where they lie comes from divisions once, and from counting on. */
template <typename T>
static __global__ void __launch_bounds__(COLUMN_THREADS)
    columns_kernel(T *to, const T *x, const __grid_constant__ struct columns c)
{
    constexpr int EACH = 16 / sizeof(T);
    __shared__ uint32_t base_major, base_minor, base_place; /* of the block's first element */
    const struct ltn_conv_shape &s = c.s;
    const int64_t first = (int64_t)blockIdx.x * (COLUMN_THREADS * EACH);
    const uint32_t at = threadIdx.x * EACH;

    if (threadIdx.x == 0) {
        const int64_t row = first / c.places;
        base_place = (uint32_t)(first - row * c.places);
        base_major = (uint32_t)(row / c.by_minor.d);
        base_minor = (uint32_t)(row - (int64_t)base_major * c.by_minor.d);
    }
    __syncthreads();
    if (first + at >= c.total)
        return;
    alignas(16) T v[EACH];
    uint32_t p = 0, j = 0;
    int64_t h = 0, w = 0;
    const T *image = x;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (i == 0 || p == (uint32_t)c.places) { /* a row begins */
            const uint32_t from = base_place + at + (uint32_t)i, rows = divide(from, c.by_places);
            const uint32_t minors = base_minor + rows, majors = divide(minors, c.by_minor);
            const uint32_t minor = minors - majors * c.by_minor.d, major = base_major + majors;
            const uint32_t k = c.joint ? major : minor, n = c.joint ? minor : major;
            const uint32_t channel = divide(k, c.by_taps), tap = k - channel * c.by_taps.d;
            const uint32_t u = divide(tap, c.by_wf),
                           m = divide(p = from - rows * (uint32_t)c.places, c.by_wo);
            j = p - m * (uint32_t)c.wo;
            h = (int64_t)m * s.sh + (int64_t)u * s.dh - s.pt;
            w = (int64_t)j * s.sw + (int64_t)(tap - u * (uint32_t)s.wf) * s.dw - s.pl;
            image = x + ((int64_t)n * s.ci + channel) * s.hi * s.wi;
        }
        const bool inside = h >= 0 && h < s.hi && w >= 0 && w < s.wi && first + at + i < c.total;
        v[i] = inside ? image[h * s.wi + w] : (T)0.0f;
        p++;
        j++;
        w += s.sw;
        if (j == (uint32_t)c.wo) { /* the next row of places */
            j = 0;
            w -= (int64_t)c.wo * s.sw;
            h += s.sh;
        }
    }
    if (first + at + EACH <= c.total)
        *reinterpret_cast<uint4 *>(to + first + at) = *reinterpret_cast<const uint4 *>(v);
    else
        for (int i = 0; i < EACH && first + at + i < c.total; i++)
            to[first + at + i] = v[i];
}

template <typename T>
static void lay_columns(struct conv_device *dev, void *to, const void *x, const struct columns &c)
{
    enum { FILLS = 1 << 18 }; /* threads that keep a device busy */
    const int64_t rows = c.total / c.places, threads = c.places * (rows / (c.s.hf * c.s.wf));
    const int64_t pitch = c.joint ? (int64_t)c.s.n * c.places : c.places;
    if (pitch % (16 / sizeof(T)) == 0 && threads >= FILLS)
        aligned_columns_kernel<<<(unsigned)((threads + COLUMN_THREADS - 1) / COLUMN_THREADS), COLUMN_THREADS,
                                 0, dev->stream>>>((T *)to, (const T *)x, c);
    else
        columns_kernel<<<(unsigned)((c.total * sizeof(T) / 16 + COLUMN_THREADS) / COLUMN_THREADS),
                         COLUMN_THREADS, 0, dev->stream>>>((T *)to, (const T *)x, c);
}

/* y [n][co][places] from result [co][n][places], or from itself, with bias and ReLU */
template <typename T>
static __global__ void __launch_bounds__(256)
    finish_kernel(T *y, const T *result, const float *bias, int64_t total, int32_t n_images, int32_t co,
                  int32_t places, bool relu)
{
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= total)
        return;
    const int64_t row = i / places;
    const int32_t n = (int32_t)(row / co), o = (int32_t)(row - (int64_t)n * co);
    const int64_t from = result == y ? i : ((int64_t)o * n_images + n) * places + (i - row * places);
    y[i] = (T)conv_finish(conv_f32(result[from]), bias, o, relu);
}

/* ---- the operator -----------------------------------------------------------------------------------------
 */

static bool joint(const struct conv_op *op)
{
    const struct ltn_conv_shape *s = &op->base.shape;
    return op->algo->id == LTN_CONV_IM2COL && s->n > 1 &&
           (int64_t)ltn_conv_ho(s) * ltn_conv_wo(s) < JOINT_BELOW;
}

/* The columns' part of the workspace. */
static size_t columns_bytes(const struct ltn_conv_shape *s, enum ltn_conv_algo id)
{
    const int64_t all = conv_im2col_elements(s, ltn_conv_ho(s), ltn_conv_wo(s));
    const int64_t elements = id == LTN_CONV_IM2COL ? all : all / s->n;
    return ((size_t)elements * ltn_conv_type_size(s->type) + 255) & ~(size_t)255;
}

static const char *im2col_refuse(const struct conv_device *, const struct ltn_conv_shape *s)
{
    const int64_t places = (int64_t)ltn_conv_ho(s) * ltn_conv_wo(s);
    if (s->layout != LTN_NCHW)
        return "im2col is for NCHW";
    if (places * (places < JOINT_BELOW ? s->n : 1) > INT32_MAX)
        return "more than 2^31 columns in a product";
    if ((int64_t)s->ci * s->hf * s->wf + COLUMN_THREADS * 8 > INT32_MAX ||
        places + COLUMN_THREADS * 8 > INT32_MAX)
        return "windows or images of 2^31 elements";
    if (conv_im2col_elements(s, ltn_conv_ho(s), ltn_conv_wo(s)) / 1024 >= INT32_MAX ||
        ltn_conv_y_elements(s) / 256 >= INT32_MAX)
        return "more than 2^31 blocks";
    return NULL;
}

static enum ltn_status im2col_create(struct conv_device *dev, struct conv_op *op, const float *filter,
                                     struct ltn_error *err)
{
    const struct ltn_conv_shape *s = &op->base.shape;
    LTN_TRY(blas_open(dev, err));
    LTN_TRY(conv_upload_filter(dev, op, filter, err));
    op->base.info.has_parts = true;
    op->base.info.workspace_bytes =
        columns_bytes(s, op->algo->id) +
        (joint(op) ? (size_t)ltn_conv_y_elements(s) * ltn_conv_type_size(s->type) : 0);
    snprintf(op->base.info.variant, sizeof op->base.info.variant, "%s",
             joint(op)                         ? "one product"
             : op->algo->id == LTN_CONV_IM2COL ? "strided batch of products"
                                               : "image by image");
    return LTN_OK;
}

/* result [batch][co or joint: og][columns] = filter of each group times its columns */
static enum ltn_status product(struct conv_device *dev, struct conv_op *op, void *result, const void *columns,
                               int32_t images, struct ltn_error *err)
{
    const struct ltn_conv_shape *s = &op->base.shape;
    const bool all = joint(op);
    const int64_t places = (int64_t)ltn_conv_ho(s) * ltn_conv_wo(s);
    const int64_t m = all ? places * images : places;
    const int64_t k = (int64_t)(s->ci / s->groups) * s->hf * s->wf, og = s->co / s->groups;
    const size_t size = ltn_conv_type_size(s->type);
    const cudaDataType_t type = s->type == LTN_CONV_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    const cublasComputeType_t compute =
        s->type == LTN_CONV_TF32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    const float one = 1, zero = 0;

    for (int g = 0; g < s->groups; g++)
        BLAS_TRY(dev, err, product, dev->blas->blas, CUBLAS_OP_N, CUBLAS_OP_N, (int)m, (int)og, (int)k, &one,
                 (const uint8_t *)columns + (size_t)(g * k * m) * size, type, (int)m, s->groups * k * m,
                 (const uint8_t *)op->filter + (size_t)(g * og * k) * size, type, (int)k, 0, &zero,
                 (uint8_t *)result + (size_t)(g * og * m) * size, type, (int)m, s->co * m, all ? 1 : images,
                 compute, CUBLAS_GEMM_DEFAULT);
    return LTN_OK;
}

static enum ltn_status run_images(struct conv_device *dev, struct conv_op *op, uint8_t *y, const uint8_t *x,
                                  uint8_t *workspace, int32_t images, enum ltn_conv_part part,
                                  struct ltn_error *err)
{
    const struct ltn_conv_shape *s = &op->base.shape;
    const int32_t ho = ltn_conv_ho(s), wo = ltn_conv_wo(s), taps = s->hf * s->wf;
    struct columns c = {*s, wo, ho * wo, joint(op), 0, {}, {}, {}, {}, {}};
    c.s.n = images;
    c.total = conv_im2col_elements(&c.s, ho, wo);
    c.by_places = conv_divisor_of(c.places);
    c.by_minor = conv_divisor_of(c.joint ? images : (int64_t)s->ci * taps);
    c.by_taps = conv_divisor_of(taps);
    c.by_wf = conv_divisor_of(s->wf);
    c.by_wo = conv_divisor_of(wo);
    const bool bf16 = s->type == LTN_CONV_BF16;
    const int64_t total = ltn_conv_y_elements(&c.s);

    if (part & LTN_CONV_TRANSFORM) {
        if (bf16)
            lay_columns<__nv_bfloat16>(dev, workspace, x, c);
        else
            lay_columns<float>(dev, workspace, x, c);
        CONV_TRY(dev, err, cudaGetLastError());
    }
    if (!(part & LTN_CONV_KERNEL))
        return LTN_OK;
    uint8_t *const result = c.joint ? workspace + columns_bytes(s, op->algo->id) : y;
    LTN_TRY(product(dev, op, result, workspace, images, err));
    if (c.joint || op->bias || s->relu) {
        const unsigned blocks = (unsigned)((total + 255) / 256);
        if (bf16)
            finish_kernel<<<blocks, 256, 0, dev->stream>>>((__nv_bfloat16 *)y, (const __nv_bfloat16 *)result,
                                                           op->bias, total, images, s->co, c.places, s->relu);
        else
            finish_kernel<<<blocks, 256, 0, dev->stream>>>((float *)y, (const float *)result, op->bias, total,
                                                           images, s->co, c.places, s->relu);
        CONV_TRY(dev, err, cudaGetLastError());
    }
    return LTN_OK;
}

static enum ltn_status im2col_run(struct conv_device *dev, struct conv_op *op, void *y, const void *x,
                                  void *workspace, enum ltn_conv_part part, struct ltn_error *err)
{
    const struct ltn_conv_shape *s = &op->base.shape;
    const int32_t each = op->algo->id == LTN_CONV_IM2COL ? s->n : 1;
    const size_t size = ltn_conv_type_size(s->type);
    const size_t x_image = (size_t)(ltn_conv_x_elements(s) / s->n) * size;
    const size_t y_image = (size_t)(ltn_conv_y_elements(s) / s->n) * size;

    for (int32_t n = 0; n < s->n; n += each)
        LTN_TRY(run_images(dev, op, (uint8_t *)y + (size_t)n * y_image,
                           (const uint8_t *)x + (size_t)n * x_image, (uint8_t *)workspace, each, part, err));
    return LTN_OK;
}

const struct conv_algo conv_im2col = {LTN_CONV_IM2COL, im2col_refuse, im2col_create, im2col_run, NULL};
const struct conv_algo conv_im2col_image = {LTN_CONV_IM2COL_IMAGE, im2col_refuse, im2col_create, im2col_run,
                                            NULL};
