/* The device: opening it, its memory, choosing an algorithm, and measuring. */
#include "kernels/conv/direct.cuh"
#include "kernels/conv/random.h"
#include "kernels/dtype.h"

#include <math.h>
#include <new>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    FLUSH_BYTES = 256 << 20, /* several times the L2 of any device */
    JUDGE_BLOCKS = 4096,
};

enum ltn_status conv_fail(struct conv_device *dev, struct ltn_error *err, const char *what, const char *file,
                          int line, cudaError_t code)
{
    return ltn_fail(err, code == cudaErrorMemoryAllocation ? LTN_ERR_MEMORY : LTN_ERR_DEVICE,
                    "cuda:%d: %s at %s:%d: %s", dev->device, what, file, line, cudaGetErrorString(code));
}

/* ---- memory -----------------------------------------------------------------------------------------------
 */

enum ltn_status conv_alloc(struct conv_device *dev, void **out, size_t bytes, struct ltn_error *err)
{
    size_t free_bytes = 0, total = 0;
    *out = NULL;
    CONV_TRY(dev, err, cudaSetDevice(dev->device));
    cudaError_t code = cudaMalloc(out, bytes ? bytes : 1);
    if (code != cudaErrorMemoryAllocation) {
        CONV_TRY(dev, err, code);
        return LTN_OK;
    }
    cudaGetLastError(); /* forget it */
    cudaMemGetInfo(&free_bytes, &total);
    return ltn_fail(err, LTN_ERR_MEMORY, "cuda:%d: out of memory: %zu bytes needed, %zu of %zu free",
                    dev->device, bytes, free_bytes, total);
}

static enum ltn_status device_alloc(struct ltn_conv *conv, void **out, size_t bytes, struct ltn_error *err)
{
    return conv_alloc(device_of(conv), out, bytes, err);
}

static void device_free(struct ltn_conv *, void *p)
{
    cudaFree(p);
}

static enum ltn_status device_upload(struct ltn_conv *conv, void *dst, const void *host, size_t bytes,
                                     struct ltn_error *err)
{
    struct conv_device *dev = device_of(conv);
    CONV_TRY(dev, err, cudaMemcpyAsync(dst, host, bytes, cudaMemcpyHostToDevice, dev->stream));
    CONV_TRY(dev, err, cudaStreamSynchronize(dev->stream));
    return LTN_OK;
}

static enum ltn_status device_download(struct ltn_conv *conv, void *host, const void *src, size_t bytes,
                                       struct ltn_error *err)
{
    struct conv_device *dev = device_of(conv);
    CONV_TRY(dev, err, cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, dev->stream));
    CONV_TRY(dev, err, cudaStreamSynchronize(dev->stream));
    return LTN_OK;
}

static enum ltn_status device_fill(struct ltn_conv *conv, void *p, int byte, size_t bytes,
                                   struct ltn_error *err)
{
    struct conv_device *dev = device_of(conv);
    CONV_TRY(dev, err, cudaMemsetAsync(p, byte, bytes, dev->stream));
    return LTN_OK;
}

template <typename T> static __global__ void normal_kernel(T *p, int64_t n, uint64_t seed)
{
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        p[i] = (T)conv_normal(seed, (uint64_t)i);
}

static enum ltn_status device_normal(struct ltn_conv *conv, void *p, enum ltn_conv_type type, int64_t n,
                                     uint64_t seed, struct ltn_error *err)
{
    struct conv_device *dev = device_of(conv);
    if (type == LTN_CONV_BF16)
        normal_kernel<<<4096, 256, 0, dev->stream>>>((__nv_bfloat16 *)p, n, seed);
    else
        normal_kernel<<<4096, 256, 0, dev->stream>>>((float *)p, n, seed);
    CONV_TRY(dev, err, cudaGetLastError());
    return LTN_OK;
}

/* ---- operators --------------------------------------------------------------------------------------------
 */

static const struct conv_algo *const algos[] = {
    &conv_fused, &conv_im2win, &conv_im2col, &conv_im2col_image, &conv_direct, &conv_naive, &conv_cudnn,
};

enum ltn_status conv_upload_filter(struct conv_device *dev, struct conv_op *op, const float *filter,
                                   struct ltn_error *err)
{
    const enum ltn_conv_type type = op->base.shape.type;
    const int64_t n = ltn_conv_filter_elements(&op->base.shape);
    const size_t bytes = (size_t)n * ltn_conv_type_size(type);

    LTN_TRY(conv_alloc(dev, &op->filter, bytes, err));
    op->base.info.filter_bytes = bytes;
    if (type == LTN_CONV_F32)
        return device_upload(&dev->base, op->filter, filter, bytes, err);
    void *rounded = malloc(bytes);
    if (!rounded)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory for a filter of %zu bytes", bytes);
    for (int64_t i = 0; i < n; i++)
        if (type == LTN_CONV_BF16)
            ((__nv_bfloat16 *)rounded)[i] = __float2bfloat16(filter[i]);
        else
            ((float *)rounded)[i] = ltn_round_tf32(filter[i]);
    enum ltn_status status = device_upload(&dev->base, op->filter, rounded, bytes, err);
    free(rounded);
    return status;
}

static void device_free_op(struct ltn_conv2d *base)
{
    struct conv_op *op = reinterpret_cast<struct conv_op *>(base);
    if (op->algo->free)
        op->algo->free(device_of(base->conv), op);
    cudaFree(op->filter);
    cudaFree(op->bias);
    delete op;
}

static const struct conv_algo *algo_of(enum ltn_conv_algo id)
{
    for (const struct conv_algo *algo : algos)
        if (algo->id == id)
            return algo;
    return NULL;
}

/* f32 in NCHW goes through the window tensor; what no other takes, through the plain loop. */
static const struct conv_algo *choose(const struct conv_device *dev, const struct ltn_conv_shape *s)
{
    for (enum ltn_conv_algo id : {LTN_CONV_FUSED, LTN_CONV_IM2WIN}) {
        const struct conv_algo *algo = algo_of(id);
        if (algo && !algo->refuse(dev, s))
            return algo;
    }
    return &conv_naive;
}

static enum ltn_status device_create(struct ltn_conv2d **out, struct ltn_conv *conv,
                                     const struct ltn_conv_shape *s, enum ltn_conv_algo id,
                                     const float *filter, const float *bias, struct ltn_error *err)
{
    struct conv_device *dev = device_of(conv);
    const struct conv_algo *algo = id == LTN_CONV_AUTO ? choose(dev, s) : algo_of(id);
    const char *why = algo ? algo->refuse(dev, s) : "not part of this build";

    if (why)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "convolution: %s: %s", ltn_conv_algo_name(id), why);
    struct conv_op *op = new (std::nothrow) conv_op();
    if (!op)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory");
    op->base.conv = conv;
    op->base.shape = *s;
    op->base.info.algo = algo->id;
    op->algo = algo;
    const size_t bias_bytes = (size_t)s->co * sizeof(float);
    enum ltn_status status = LTN_OK;
    if (bias) {
        status = conv_alloc(dev, (void **)&op->bias, bias_bytes, err);
        if (status == LTN_OK)
            status = device_upload(conv, op->bias, bias, bias_bytes, err);
    }
    if (status == LTN_OK)
        status = algo->create(dev, op, filter, err);
    if (status != LTN_OK) {
        device_free_op(&op->base);
        return status;
    }
    *out = &op->base;
    return LTN_OK;
}

static enum ltn_status device_run(struct ltn_conv2d *base, void *y, const void *x, void *workspace,
                                  enum ltn_conv_part part, struct ltn_error *err)
{
    struct conv_op *op = reinterpret_cast<struct conv_op *>(base);
    return op->algo->run(device_of(base->conv), op, y, x, workspace, part, err);
}

/* ---- judging ----------------------------------------------------------------------------------------------
 */

/* partial[block] = {sum of (y - exact)^2, sum of exact^2}, in f64 and in a fixed order */
template <typename T>
static __global__ void __launch_bounds__(256)
    judge_kernel(double2 *partial, const T *y, const T *x, const float *filter, const float *bias,
                 const __grid_constant__ struct ltn_conv_shape s, int32_t ho, int32_t wo, int64_t first,
                 int64_t last)
{
    __shared__ double2 shared[256];
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    double2 sum = {0, 0};
    for (int64_t i = first + (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < last; i += stride) {
        const struct conv_place p = conv_place_of(s, ho, wo, i);
        double exact = direct_sum<double>(s, x, filter, p) + (bias ? (double)bias[p.o] : 0);
        if (s.relu && exact < 0)
            exact = 0;
        const double d = (double)conv_f32(y[i]) - exact;
        sum.x += d * d;
        sum.y += exact * exact;
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            shared[threadIdx.x].x += shared[threadIdx.x + half].x;
            shared[threadIdx.x].y += shared[threadIdx.x + half].y;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0)
        partial[blockIdx.x] = shared[0];
}

static enum ltn_status judge(struct conv_device *dev, double2 *sums, double2 *partial, float *weights,
                             const struct ltn_conv_shape *s, const void *y, const void *x,
                             const float *filter, const float *bias, int32_t first, int32_t count,
                             struct ltn_error *err)
{
    const int64_t image = ltn_conv_y_elements(s) / s->n, elements = ltn_conv_filter_elements(s);
    float *const b = bias ? weights + elements : NULL;

    LTN_TRY(device_upload(&dev->base, weights, filter, (size_t)elements * sizeof(float), err));
    if (bias)
        LTN_TRY(device_upload(&dev->base, b, bias, (size_t)s->co * sizeof(float), err));
    if (s->type == LTN_CONV_BF16)
        judge_kernel<<<JUDGE_BLOCKS, 256, 0, dev->stream>>>(
            partial, (const __nv_bfloat16 *)y, (const __nv_bfloat16 *)x, weights, b, *s, ltn_conv_ho(s),
            ltn_conv_wo(s), first * image, (first + count) * image);
    else
        judge_kernel<<<JUDGE_BLOCKS, 256, 0, dev->stream>>>(partial, (const float *)y, (const float *)x,
                                                            weights, b, *s, ltn_conv_ho(s), ltn_conv_wo(s),
                                                            first * image, (first + count) * image);
    CONV_TRY(dev, err, cudaGetLastError());
    return device_download(&dev->base, sums, partial, JUDGE_BLOCKS * sizeof *sums, err);
}

static enum ltn_status device_rel_l2(struct ltn_conv *conv, double *out, const struct ltn_conv_shape *s,
                                     const void *y, const void *x, const float *filter, const float *bias,
                                     int32_t first, int32_t count, struct ltn_error *err)
{
    struct conv_device *dev = device_of(conv);
    void *partial = NULL, *weights = NULL;
    double2 *sums = new (std::nothrow) double2[JUDGE_BLOCKS], total = {0, 0};
    const size_t weights_bytes = ((size_t)ltn_conv_filter_elements(s) + (size_t)s->co) * sizeof(float);

    enum ltn_status status =
        sums ? LTN_OK : ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory for partial sums");
    if (status == LTN_OK)
        status = conv_alloc(dev, &partial, JUDGE_BLOCKS * sizeof *sums, err);
    if (status == LTN_OK)
        status = conv_alloc(dev, &weights, weights_bytes, err);
    if (status == LTN_OK)
        status =
            judge(dev, sums, (double2 *)partial, (float *)weights, s, y, x, filter, bias, first, count, err);
    for (int i = 0; status == LTN_OK && i < JUDGE_BLOCKS; i++) {
        total.x += sums[i].x;
        total.y += sums[i].y;
    }
    *out = total.x == 0 ? 0 : sqrt(total.x / total.y);
    cudaFree(partial);
    cudaFree(weights);
    delete[] sums;
    return status;
}

/* ---- timing -----------------------------------------------------------------------------------------------
 */

/* Reads all of p: afterwards the caches hold nothing else, and nothing that must still be written. */
static __global__ void read_kernel(const uint4 *p, int64_t n, uint32_t *sink)
{
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    uint32_t all = 0;
#pragma unroll 8
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
        const uint4 v = p[i];
        all |= v.x | v.y | v.z | v.w;
    }
    if (all == 0x12345678u) /* never: the buffer is zeros */
        *sink = all;
}

static enum ltn_status flush_open(struct conv_device *dev, struct ltn_error *err)
{
    if (dev->flush)
        return LTN_OK;
    LTN_TRY(conv_alloc(dev, &dev->flush, FLUSH_BYTES, err));
    CONV_TRY(dev, err, cudaMemsetAsync(dev->flush, 0, FLUSH_BYTES, dev->stream));
    return LTN_OK;
}

static void flush(struct conv_device *dev)
{
    read_kernel<<<dev->n_sms * 8, 256, 0, dev->stream>>>((const uint4 *)dev->flush, FLUSH_BYTES / 16,
                                                         (uint32_t *)dev->flush);
}

/* What `time` needs besides the operator. */
struct stopwatch {
    cudaEvent_t begin, end;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
};

static enum ltn_status time_all(struct conv_device *dev, struct stopwatch *w, struct ltn_conv2d *op, void *y,
                                const void *x, void *workspace, enum ltn_conv_part part, int n, bool recorded,
                                double *us, struct ltn_error *err)
{
    LTN_TRY(flush_open(dev, err));
    CONV_TRY(dev, err, cudaEventCreate(&w->begin));
    CONV_TRY(dev, err, cudaEventCreate(&w->end));
    LTN_TRY(device_run(op, y, x, workspace, part, err));
    if (recorded) {
        CONV_TRY(dev, err, cudaStreamBeginCapture(dev->stream, cudaStreamCaptureModeThreadLocal));
        enum ltn_status status = device_run(op, y, x, workspace, part, err);
        cudaError_t code = cudaStreamEndCapture(dev->stream, &w->graph);
        if (status != LTN_OK)
            return status;
        CONV_TRY(dev, err, code);
        CONV_TRY(dev, err, cudaGraphInstantiate(&w->exec, w->graph, 0));
        CONV_TRY(dev, err, cudaGraphLaunch(w->exec, dev->stream));
    }
    for (int i = 0; i < n; i++) {
        float ms = 0;
        flush(dev);
        CONV_TRY(dev, err, cudaEventRecord(w->begin, dev->stream));
        if (recorded)
            CONV_TRY(dev, err, cudaGraphLaunch(w->exec, dev->stream));
        else
            LTN_TRY(device_run(op, y, x, workspace, part, err));
        CONV_TRY(dev, err, cudaEventRecord(w->end, dev->stream));
        CONV_TRY(dev, err, cudaEventSynchronize(w->end));
        CONV_TRY(dev, err, cudaEventElapsedTime(&ms, w->begin, w->end));
        us[i] = 1e3 * ms;
    }
    return LTN_OK;
}

static enum ltn_status device_time(struct ltn_conv *conv, struct ltn_conv2d *op, void *y, const void *x,
                                   void *workspace, enum ltn_conv_part part, int n, bool recorded, double *us,
                                   struct ltn_error *err)
{
    struct stopwatch w = {};
    enum ltn_status status = time_all(device_of(conv), &w, op, y, x, workspace, part, n, recorded, us, err);
    if (w.exec)
        cudaGraphExecDestroy(w.exec);
    if (w.graph)
        cudaGraphDestroy(w.graph);
    if (w.begin)
        cudaEventDestroy(w.begin);
    if (w.end)
        cudaEventDestroy(w.end);
    return status;
}

/* Best of five over the flush buffer's size, past the L2. */
static enum ltn_status bandwidths(struct conv_device *dev, struct stopwatch *w, void *other,
                                  double *read_gbps, double *copy_gbps, struct ltn_error *err)
{
    CONV_TRY(dev, err, cudaEventCreate(&w->begin));
    CONV_TRY(dev, err, cudaEventCreate(&w->end));
    *read_gbps = *copy_gbps = 0;
    for (int i = 0; i < 12; i++) {
        float ms = 0;
        CONV_TRY(dev, err, cudaEventRecord(w->begin, dev->stream));
        if (i % 2)
            flush(dev);
        else
            CONV_TRY(dev, err,
                     cudaMemcpyAsync(other, dev->flush, FLUSH_BYTES, cudaMemcpyDeviceToDevice, dev->stream));
        CONV_TRY(dev, err, cudaEventRecord(w->end, dev->stream));
        CONV_TRY(dev, err, cudaEventSynchronize(w->end));
        CONV_TRY(dev, err, cudaEventElapsedTime(&ms, w->begin, w->end));
        double *best = i % 2 ? read_gbps : copy_gbps;
        const double rate = (i % 2 ? 1e-6 : 2e-6) * FLUSH_BYTES / ms;
        if (i > 1 && rate > *best)
            *best = rate;
    }
    return LTN_OK;
}

static enum ltn_status device_peaks(struct ltn_conv *conv, double *read_gbps, double *copy_gbps,
                                    double *gemm_tflops, struct ltn_error *err)
{
    struct conv_device *dev = device_of(conv);
    struct stopwatch w = {};
    void *other;

    LTN_TRY(flush_open(dev, err));
    LTN_TRY(conv_alloc(dev, &other, FLUSH_BYTES, err));
    enum ltn_status status = bandwidths(dev, &w, other, read_gbps, copy_gbps, err);
    cudaFree(other);
    if (w.begin)
        cudaEventDestroy(w.begin);
    if (w.end)
        cudaEventDestroy(w.end);
    return status == LTN_OK ? blas_peak(dev, gemm_tflops, err) : status;
}

/* ---- opening ----------------------------------------------------------------------------------------------
 */

static void device_close(struct ltn_conv *conv)
{
    struct conv_device *dev = device_of(conv);
    cudaSetDevice(dev->device);
    blas_close(dev);
    cudnn_close(dev);
    cudaFree(dev->flush);
    if (dev->stream)
        cudaStreamDestroy(dev->stream);
    delete dev;
}

static const struct ltn_conv_ops device_ops = {
    device_close,  device_alloc, device_free,  device_upload, device_download, device_fill, device_normal,
    device_rel_l2, device_time,  device_peaks, device_create, device_free_op,  device_run,
};

static enum ltn_status open_device(struct conv_device *dev, int device, struct ltn_error *err)
{
    int driver = 0, runtime = 0, shared = 0;
    cudaDeviceProp properties;

    dev->device = device;
    CONV_TRY(dev, err, cudaSetDevice(device));
    CONV_TRY(dev, err, cudaGetDeviceProperties(&properties, device));
    CONV_TRY(dev, err, cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    CONV_TRY(dev, err, cudaDriverGetVersion(&driver));
    CONV_TRY(dev, err, cudaRuntimeGetVersion(&runtime));
    CONV_TRY(dev, err, cudaStreamCreateWithFlags(&dev->stream, cudaStreamNonBlocking));
    dev->n_sms = properties.multiProcessorCount;
    dev->major = properties.major;
    dev->max_shared = (size_t)shared;
    snprintf(dev->base.name, sizeof dev->base.name, "%.90s", properties.name);
    snprintf(dev->base.driver, sizeof dev->base.driver, "CUDA driver %d.%d, runtime %d.%d", driver / 1000,
             driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    blas_name(dev, dev->base.driver, sizeof dev->base.driver);
    cudnn_name(dev, dev->base.driver, sizeof dev->base.driver);
    return LTN_OK;
}

extern "C" __attribute__((visibility("default"))) enum ltn_status
ltn_conv_cuda_open(struct ltn_conv **out, int device, struct ltn_error *err)
{
    *out = NULL;
    struct conv_device *dev = new (std::nothrow) conv_device();
    if (!dev)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory");
    dev->base.ops = &device_ops;
    enum ltn_status status = open_device(dev, device, err);
    if (status != LTN_OK) {
        device_close(&dev->base);
        return status;
    }
    *out = &dev->base;
    return LTN_OK;
}
