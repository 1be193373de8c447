/* Convolution in two dimensions, computed by im2win and by what it is measured against.
 *
 * For image i, output channel o of group g and output place (m, j)
 *
 *   y[i,o,m,j] = relu?(bias[o] + sum over c < Ci/groups, u < Hf, v < Wf of
 *                      x[i, g Ci/groups + c, m sh + u dh - pt, j sw + v dw - pl] * filter[o,c,u,v])
 *
 * where x is zero outside of the image, Ho = (Hi + pt + pb - dh (Hf - 1) - 1) / sh + 1, Wo alike. Im2win (Lu,
 * Chu, Liu, "Im2win: An Efficient Convolution Paradigm on GPU", Euro-Par 2023, arXiv 2306.14316, section 3)
 * lays out the input so that the whole window of an output is one contiguous run, and neighbouring windows
 * share what they have in common: kernels/conv/index.h.
 *
 *   struct ltn_conv *conv;
 *   struct ltn_conv2d *op;
 *   ltn_conv_open(&conv, "cuda", 0, &err);
 *   ltn_conv2d_create(&op, conv, &shape, LTN_CONV_AUTO, filter, bias, &err);   the filter is packed, once
 *   ltn_conv2d_run(op, y, x, workspace, LTN_CONV_ALL, &err);                   as often as one likes
 *
 * A ltn_conv is used by one thread at a time. Work is issued in order on its one queue; results are visible
 * to the host after download or sync. Sums run in an order that depends on the shape alone.
 */
#ifndef LTN_CONV_H
#define LTN_CONV_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum ltn_conv_layout { LTN_NCHW, LTN_NHWC };

/* What elements are and how products are formed. Sums run in f32 always. */
enum ltn_conv_type {
    LTN_CONV_F32,  /* f32 in memory, f32 products */
    LTN_CONV_TF32, /* f32 in memory, rounded to tf32 (10 bits after the point) before they are multiplied */
    LTN_CONV_BF16, /* bf16 in memory, also the output */
};

/* One convolution. Every size >= 1, pads >= 0; ci and co are multiples of groups; Ho and Wo come out >= 1. */
struct ltn_conv_shape {
    int32_t n, ci, hi, wi;  /* images, input channels, height, width */
    int32_t co, hf, wf;     /* output channels, height and width of the filter */
    int32_t sh, sw;         /* strides, down and across */
    int32_t pt, pb, pl, pr; /* zeros at top, bottom, left, right */
    int32_t dh, dw;         /* dilation: distance of neighbouring filter elements */
    int32_t groups;
    enum ltn_conv_layout layout; /* of x and y: [n][ci][hi][wi] or [n][hi][wi][ci], dense */
    enum ltn_conv_type type;
    bool relu;
};

enum ltn_conv_algo {
    LTN_CONV_AUTO,         /* chosen by shape */
    LTN_CONV_IM2WIN,       /* window tensor in the workspace, then a product; f32, NCHW */
    LTN_CONV_FUSED,        /* window order built in shared memory, tensor cores; no workspace; tf32, bf16 */
    LTN_CONV_IM2COL,       /* im2col of the whole batch in the workspace, then cuBLAS; NCHW */
    LTN_CONV_IM2COL_IMAGE, /* the same image by image; NCHW */
    LTN_CONV_DIRECT,       /* tiles of input and filter in shared memory; f32, NCHW */
    LTN_CONV_DIRECT_NAIVE, /* a loop per output; every type and layout */
    LTN_CONV_CUDNN, /* a peer to measure, where libcudnn is installed: its fastest of all, tried on creation
                     */
    LTN_CONV_ALGOS,
};
const char *ltn_conv_algo_name(enum ltn_conv_algo algo); /* "im2win", "im2win-fused", "im2col-cublas", ... */
const char *ltn_conv_type_name(enum ltn_conv_type type); /* "f32", "tf32", "bf16" */
static inline size_t ltn_conv_type_size(enum ltn_conv_type type) /* bytes of one element */
{
    return type == LTN_CONV_BF16 ? 2 : 4;
}

/* LTN_ERR_INPUT, naming the field, unless the shape is as it must be and every size in bytes is below 2^62.
 */
enum ltn_status ltn_conv_check(const struct ltn_conv_shape *s, struct ltn_error *err);
/* The rest are for shapes that passed. */
int32_t ltn_conv_ho(const struct ltn_conv_shape *s);
int32_t ltn_conv_wo(const struct ltn_conv_shape *s);
int64_t ltn_conv_x_elements(const struct ltn_conv_shape *s);
int64_t ltn_conv_y_elements(const struct ltn_conv_shape *s);
int64_t ltn_conv_filter_elements(const struct ltn_conv_shape *s); /* [co][ci / groups][hf][wf] */
double ltn_conv_flop(const struct ltn_conv_shape *s); /* 2 per product, those with padding included */

/* Layer 1 .. 12 of the paper's evaluation (its table 2), without padding, f32, NCHW. */
struct ltn_conv_shape ltn_conv_layer(int layer, int32_t n);

/* The definition above, in f64, one loop each. x, y in the shape's layout, type and relu of the shape
 * honoured as far as they are about values: x, filter are used as they are. bias: [co] or NULL. */
void ltn_conv2d_reference(double *y, const struct ltn_conv_shape *s, const float *x, const float *filter,
                          const float *bias);

struct ltn_conv;   /* a device */
struct ltn_conv2d; /* an operator: shape, algorithm, packed filter, bias */

/* device: "cpu" (n_threads, 0: one per available core) or "cuda", "cuda:N", which is libltn_conv.so, looked
 * for where libltn_cuda.so is. LTN_ERR_UNSUPPORTED where there is none. */
enum ltn_status ltn_conv_open(struct ltn_conv **out, const char *device, int n_threads,
                              struct ltn_error *err);
void ltn_conv_close(struct ltn_conv *conv); /* NULL is allowed; operators and buffers must have been freed */

/* Packs the filter for the algorithm. filter: host f32 [co][ci / groups][hf][wf], rounded to the type here;
 * bias: host f32 [co] or NULL; both may be freed on return. LTN_ERR_UNSUPPORTED: the algorithm is not one for
 * this shape, type or layout on this device, or its library is missing. */
enum ltn_status ltn_conv2d_create(struct ltn_conv2d **out, struct ltn_conv *conv,
                                  const struct ltn_conv_shape *s, enum ltn_conv_algo algo,
                                  const float *filter, const float *bias, struct ltn_error *err);
void ltn_conv2d_free(struct ltn_conv2d *op); /* NULL is allowed */

struct ltn_conv2d_info {
    enum ltn_conv_algo algo; /* never LTN_CONV_AUTO */
    bool has_parts;          /* transform and kernel can be run apart */
    size_t workspace_bytes;  /* what run needs beyond x and y */
    size_t filter_bytes;     /* packed */
    char variant[96];        /* for people: tile, library algorithm */
};
const struct ltn_conv2d_info *ltn_conv2d_info(const struct ltn_conv2d *op);

/* For measuring, the two parts can be run apart where info says so: after the whole, each finds what it
 * needs. Elsewhere the transform is nothing, and the kernel the whole. */
enum ltn_conv_part { LTN_CONV_TRANSFORM = 1, LTN_CONV_KERNEL = 2, LTN_CONV_ALL = 3 };

/* x, y, workspace: device memory of the shape's elements and workspace_bytes, 256-byte aligned; workspace may
 * be NULL where that is 0. y does not overlap the others; what it holds before does not matter. Allocates
 * nothing. */
enum ltn_status ltn_conv2d_run(struct ltn_conv2d *op, void *y, const void *x, void *workspace,
                               enum ltn_conv_part part, struct ltn_error *err);

/* ---- device memory and measuring: the table that a device brings -----------------------------------------
 */

struct ltn_conv_ops {
    void (*close)(struct ltn_conv *conv);
    enum ltn_status (*alloc)(struct ltn_conv *conv, void **out, size_t bytes, struct ltn_error *err);
    void (*free)(struct ltn_conv *conv, void *p); /* NULL is allowed */
    enum ltn_status (*upload)(struct ltn_conv *conv, void *dst, const void *host, size_t bytes,
                              struct ltn_error *err);
    enum ltn_status (*download)(struct ltn_conv *conv, void *host, const void *src, size_t bytes,
                                struct ltn_error *err);
    /* every byte of p becomes `byte`: 0xff makes every element NaN */
    enum ltn_status (*fill)(struct ltn_conv *conv, void *p, int byte, size_t bytes, struct ltn_error *err);
    /* n normal values (mean 0, variance 1), a function of seed and place alone; bf16 or f32 as type says */
    enum ltn_status (*normal)(struct ltn_conv *conv, void *p, enum ltn_conv_type type, int64_t n,
                              uint64_t seed, struct ltn_error *err);
    /* *out = ||y - exact|| / ||exact||, L2, in f64, exact being the convolution of x and filter (host f32,
     * and bias) in f64 over images first .. first + count - 1. NaN in y gives NaN. y, x: device memory, all
     * images. */
    enum ltn_status (*rel_l2)(struct ltn_conv *conv, double *out, const struct ltn_conv_shape *s,
                              const void *y, const void *x, const float *filter, const float *bias,
                              int32_t first, int32_t count, struct ltn_error *err);
    /* Runs part of op once to warm up, then n times, each after its caches were flushed, and writes
     * microseconds. recorded: the work is recorded once and replayed, so that the host's launches cost
     * nothing. */
    enum ltn_status (*time)(struct ltn_conv *conv, struct ltn_conv2d *op, void *y, const void *x,
                            void *workspace, enum ltn_conv_part part, int n, bool recorded, double *us,
                            struct ltn_error *err);
    /* 1e9 bytes a second of reading and of copying (both directions counted), 0 where not measured; TFLOP/s
     * of a large bf16 product of the library, 0 alike */
    enum ltn_status (*peaks)(struct ltn_conv *conv, double *read_gbps, double *copy_gbps, double *gemm_tflops,
                             struct ltn_error *err);
    enum ltn_status (*create)(struct ltn_conv2d **out, struct ltn_conv *conv, const struct ltn_conv_shape *s,
                              enum ltn_conv_algo algo, const float *filter, const float *bias,
                              struct ltn_error *err);
    void (*free_op)(struct ltn_conv2d *op);
    enum ltn_status (*run)(struct ltn_conv2d *op, void *y, const void *x, void *workspace,
                           enum ltn_conv_part part, struct ltn_error *err);
};

/* What every device and operator begins with; their own fields follow. */
struct ltn_conv {
    const struct ltn_conv_ops *ops;
    char name[96];    /* "NVIDIA H100 80GB HBM3" */
    char driver[128]; /* versions of what is below: driver, CUDA, cuBLAS, cuDNN */
};
struct ltn_conv2d {
    struct ltn_conv *conv;
    struct ltn_conv_shape shape;
    struct ltn_conv2d_info info;
};

enum ltn_status ltn_conv_cpu_open(struct ltn_conv **out, int n_threads, struct ltn_error *err);
/* libltn_conv.so exports exactly this, under the name LTN_CONV_ENTRY. */
#define LTN_CONV_ENTRY "ltn_conv_cuda_open"
typedef enum ltn_status ltn_conv_open_fn(struct ltn_conv **out, int device, struct ltn_error *err);

#ifdef __cplusplus
}
#endif
#endif
