/* What the sources of libltn_conv.so share: the device, failing, launching, and what an algorithm is. */
#ifndef LTN_CONV_CUH
#define LTN_CONV_CUH

#include "kernels/conv/conv.h"
#include "kernels/conv/index.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

struct blas_library;  /* cuBLAS, opened when it is first needed: im2col.cu */
struct cudnn_library; /* cuDNN alike: cudnn.cu */

struct conv_device {
    struct ltn_conv base;
    int device, n_sms;
    int major;           /* of the compute capability */
    size_t max_shared;   /* bytes of shared memory that a block may have */
    cudaStream_t stream; /* the one queue */
    void *flush;         /* FLUSH_BYTES to write between samples; NULL until then */
    struct blas_library *blas;
    struct cudnn_library *cudnn;
};

/* An operator on this device. An algorithm's create fills in what it needs; free releases filter, bias and
 * then calls the algorithm's own. */
struct conv_op {
    struct ltn_conv2d base;
    const struct conv_algo *algo;
    void *filter; /* packed, device memory, info.filter_bytes; may be NULL */
    float *bias;  /* device [co] or NULL */
    void *own;    /* the algorithm's */
};

/* An algorithm, one file each. The shape has been checked. */
struct conv_algo {
    enum ltn_conv_algo id;
    /* NULL where it can compute this shape on this device, else why not */
    const char *(*refuse)(const struct conv_device *dev, const struct ltn_conv_shape *s);
    /* fills op->filter (from the host's f32 filter, see ltn_conv2d_create), op->own, info.workspace_bytes,
     * .filter_bytes, .variant; what it allocated before it failed stays in op, for free */
    enum ltn_status (*create)(struct conv_device *dev, struct conv_op *op, const float *filter,
                              struct ltn_error *err);
    enum ltn_status (*run)(struct conv_device *dev, struct conv_op *op, void *y, const void *x,
                           void *workspace, enum ltn_conv_part part, struct ltn_error *err);
    void (*free)(struct conv_device *dev, struct conv_op *op); /* of own; NULL: nothing to do */
};

extern const struct conv_algo conv_im2win, conv_fused, conv_im2col, conv_im2col_image, conv_direct,
    conv_naive, conv_cudnn;
extern const struct conv_algo conv_fused_tma; /* what conv_fused hands over to where it can */

static inline struct conv_device *device_of(struct ltn_conv *conv)
{
    return reinterpret_cast<struct conv_device *>(conv);
}

enum ltn_status conv_fail(struct conv_device *dev, struct ltn_error *err, const char *what, const char *file,
                          int line, cudaError_t code);

/* Leaves the enclosing function with an error that names the call and its place. */
#define CONV_TRY(dev, err, call)                                                                             \
    do {                                                                                                     \
        cudaError_t conv_try_code_ = (call);                                                                 \
        if (conv_try_code_ != cudaSuccess)                                                                   \
            return conv_fail(dev, err, #call, __FILE__, __LINE__, conv_try_code_);                           \
    } while (0)

/* Device memory, or LTN_ERR_MEMORY with what was needed and what was free. */
enum ltn_status conv_alloc(struct conv_device *dev, void **out, size_t bytes, struct ltn_error *err);
/* The filter as the host has it, [co][ci / groups][hf][wf], but in the type's elements (tf32: f32, rounded),
 * on the device in op->filter. */
enum ltn_status conv_upload_filter(struct conv_device *dev, struct conv_op *op, const float *filter,
                                   struct ltn_error *err);

/* Division of 0 <= n < 2^31 by a fixed divisor: multiply and shift (Granlund, Montgomery, "Division by
 * invariant integers using multiplication", 1994). */
struct conv_divisor {
    uint32_t d, factor, shift;
};
static inline struct conv_divisor conv_divisor_of(int64_t d) /* 1 <= d < 2^31 */
{
    uint32_t shift = 0;
    while (((int64_t)1 << shift) < d)
        shift++;
    return {(uint32_t)d,
            (uint32_t)((((uint64_t)1 << 32) * (((uint64_t)1 << shift) - (uint64_t)d)) / (uint64_t)d + 1),
            shift};
}
static __device__ __forceinline__ uint32_t divide(uint32_t n, struct conv_divisor d)
{
    return (__umulhi(n, d.factor) + n) >> d.shift;
}

static __device__ __forceinline__ float conv_f32(float v)
{
    return v;
}
static __device__ __forceinline__ float conv_f32(__nv_bfloat16 v)
{
    return __bfloat162float(v);
}

/* The epilogue. */
static __device__ __forceinline__ float conv_finish(float sum, const float *bias, int32_t o, bool relu)
{
    const float v = bias ? sum + bias[o] : sum;
    return relu && v < 0 ? 0 : v;
}

void blas_close(struct conv_device *dev);
void cudnn_close(struct conv_device *dev);
/* A large square product in bf16: TFLOP/s into *tflops, 0 where there is no cuBLAS. */
enum ltn_status blas_peak(struct conv_device *dev, double *tflops, struct ltn_error *err);
/* The versions of the libraries at hand, appended to text. */
void blas_name(struct conv_device *dev, char *text, size_t size);
void cudnn_name(struct conv_device *dev, char *text, size_t size);

#endif
