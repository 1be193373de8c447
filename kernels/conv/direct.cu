/* Direct convolution: a loop per output, and tiles of input and filter in shared memory. What the others are
 * measured against, the first also in f64 as their judge. */
#include "kernels/conv/direct.cuh"

#include <stdio.h>

/* ---- naive: any type, any layout -------------------------------------------------------------------------
 */

template <typename T>
static __global__ void __launch_bounds__(256)
    naive_kernel(T *y, const T *x, const T *filter, const float *bias,
                 const __grid_constant__ struct ltn_conv_shape s, int32_t ho, int32_t wo, int64_t total)
{
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += stride) {
        const struct conv_place p = conv_place_of(s, ho, wo, i);
        const float sum = direct_sum<float>(s, x, filter, p);
        y[i] = (T)conv_finish(sum, bias, p.o, s.relu);
    }
}

static const char *naive_refuse(const struct conv_device *, const struct ltn_conv_shape *)
{
    return NULL;
}

static enum ltn_status naive_create(struct conv_device *dev, struct conv_op *op, const float *filter,
                                    struct ltn_error *err)
{
    snprintf(op->base.info.variant, sizeof op->base.info.variant, "a loop per output");
    return conv_upload_filter(dev, op, filter, err);
}

static enum ltn_status naive_run(struct conv_device *dev, struct conv_op *op, void *y, const void *x, void *,
                                 enum ltn_conv_part part, struct ltn_error *err)
{
    const struct ltn_conv_shape &s = op->base.shape;
    const int64_t total = ltn_conv_y_elements(&s);
    const unsigned blocks = (unsigned)((total + 255) / 256 < 1 << 30 ? (total + 255) / 256 : 1 << 30);

    if (part == LTN_CONV_TRANSFORM)
        return LTN_OK;
    if (s.type == LTN_CONV_BF16)
        naive_kernel<<<blocks, 256, 0, dev->stream>>>((__nv_bfloat16 *)y, (const __nv_bfloat16 *)x,
                                                      (const __nv_bfloat16 *)op->filter, op->bias, s,
                                                      ltn_conv_ho(&s), ltn_conv_wo(&s), total);
    else
        naive_kernel<<<blocks, 256, 0, dev->stream>>>((float *)y, (const float *)x, (const float *)op->filter,
                                                      op->bias, s, ltn_conv_ho(&s), ltn_conv_wo(&s), total);
    CONV_TRY(dev, err, cudaGetLastError());
    return LTN_OK;
}

const struct conv_algo conv_naive = {LTN_CONV_DIRECT_NAIVE, naive_refuse, naive_create, naive_run, NULL};

/* ---- tiled: f32, NCHW -------------------------------------------------------------------------------------
 */

enum { TILE_H = 8, TILE_W = 32, TILE_O = 16, TILE_THREADS = TILE_H * TILE_W };

/* What a tile of outputs reads of one channel. */
static __host__ __device__ int64_t patch_h(const struct ltn_conv_shape &s)
{
    return (int64_t)(TILE_H - 1) * s.sh + (int64_t)(s.hf - 1) * s.dh + 1;
}
static __host__ __device__ int64_t patch_w(const struct ltn_conv_shape &s)
{
    return (int64_t)(TILE_W - 1) * s.sw + (int64_t)(s.wf - 1) * s.dw + 1;
}

static int64_t tiled_shared(const struct ltn_conv_shape &s)
{
    return ((int64_t)TILE_O * s.hf * s.wf + patch_h(s) * patch_w(s)) * (int64_t)sizeof(float);
}

/* A block: TILE_O output channels of TILE_H x TILE_W places of one image; channel by channel, the patch of
 * the input and the filters [hf wf][TILE_O] in shared memory. */
static __global__ void __launch_bounds__(TILE_THREADS)
    tiled_kernel(float *y, const float *x, const float *filter, const float *bias,
                 const __grid_constant__ struct ltn_conv_shape s, int32_t ho, int32_t wo, int32_t tiles_w,
                 int32_t tiles_h, int32_t tiles_o)
{
    extern __shared__ __align__(16) float shared[];
    const int taps = s.hf * s.wf, ph = (int)patch_h(s), pw = (int)patch_w(s);
    float *const weights = shared, *const patch = shared + TILE_O * taps;
    const int cg = s.ci / s.groups, og = s.co / s.groups;
    int64_t b = blockIdx.x;
    const int j0 = (int)(b % tiles_w) * TILE_W;
    b /= tiles_w;
    const int m0 = (int)(b % tiles_h) * TILE_H;
    b /= tiles_h;
    const int o0 = (int)(b % tiles_o) * TILE_O; /* within the group */
    b /= tiles_o;
    const int g = (int)(b % s.groups), n = (int)(b / s.groups);
    const int tj = threadIdx.x % TILE_W, tm = threadIdx.x / TILE_W;
    float acc[TILE_O] = {};

    for (int c = 0; c < cg; c++) {
        const float *const image = x + conv_x_at(&s, n, g * cg + c, 0, 0);
        for (int i = threadIdx.x; i < ph * pw; i += TILE_THREADS) {
            const int64_t h = (int64_t)m0 * s.sh - s.pt + i / pw, w = (int64_t)j0 * s.sw - s.pl + i % pw;
            patch[i] = h >= 0 && h < s.hi && w >= 0 && w < s.wi ? image[h * s.wi + w] : 0;
        }
        for (int i = threadIdx.x; i < TILE_O * taps; i += TILE_THREADS) {
            const int o = i % TILE_O;
            weights[i] = o0 + o < og ? filter[((int64_t)(g * og + o0 + o) * cg + c) * taps + i / TILE_O] : 0;
        }
        __syncthreads();
        for (int u = 0; u < s.hf; u++)
            for (int v = 0; v < s.wf; v++) {
                const float value = patch[(tm * s.sh + u * s.dh) * pw + tj * s.sw + v * s.dw];
                const float4 *w = reinterpret_cast<const float4 *>(weights + (u * s.wf + v) * TILE_O);
#pragma unroll
                for (int q = 0; q < TILE_O / 4; q++) {
                    const float4 f = w[q];
                    acc[4 * q] = fmaf(value, f.x, acc[4 * q]);
                    acc[4 * q + 1] = fmaf(value, f.y, acc[4 * q + 1]);
                    acc[4 * q + 2] = fmaf(value, f.z, acc[4 * q + 2]);
                    acc[4 * q + 3] = fmaf(value, f.w, acc[4 * q + 3]);
                }
            }
        __syncthreads();
    }
    const int m = m0 + tm, j = j0 + tj;
    if (m >= ho || j >= wo)
        return;
#pragma unroll
    for (int i = 0; i < TILE_O; i++)
        if (o0 + i < og) {
            const int o = g * og + o0 + i;
            y[conv_y_at(&s, ho, wo, n, o, m, j)] = conv_finish(acc[i], bias, o, s.relu);
        }
}

static int64_t tiled_blocks(const struct ltn_conv_shape &s)
{
    const int64_t h = (ltn_conv_ho(&s) + TILE_H - 1) / TILE_H, w = (ltn_conv_wo(&s) + TILE_W - 1) / TILE_W;
    return h * w * ((s.co / s.groups + TILE_O - 1) / TILE_O) * s.groups * s.n;
}

static const char *tiled_refuse(const struct conv_device *dev, const struct ltn_conv_shape *s)
{
    if (s->type != LTN_CONV_F32 || s->layout != LTN_NCHW)
        return "the tiled direct kernel is for f32 in NCHW";
    if (tiled_shared(*s) > (int64_t)dev->max_shared)
        return "a tile's input and filters do not fit into shared memory";
    if (tiled_blocks(*s) > INT32_MAX)
        return "more than 2^31 tiles";
    return NULL;
}

static enum ltn_status tiled_create(struct conv_device *dev, struct conv_op *op, const float *filter,
                                    struct ltn_error *err)
{
    CONV_TRY(dev, err,
             cudaFuncSetAttribute(tiled_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)dev->max_shared));
    snprintf(op->base.info.variant, sizeof op->base.info.variant, "tiles of %d x %d x %d", (int)TILE_O,
             (int)TILE_H, (int)TILE_W);
    return conv_upload_filter(dev, op, filter, err);
}

static enum ltn_status tiled_run(struct conv_device *dev, struct conv_op *op, void *y, const void *x, void *,
                                 enum ltn_conv_part part, struct ltn_error *err)
{
    const struct ltn_conv_shape &s = op->base.shape;
    const int32_t ho = ltn_conv_ho(&s), wo = ltn_conv_wo(&s);

    if (part == LTN_CONV_TRANSFORM)
        return LTN_OK;
    tiled_kernel<<<(unsigned)tiled_blocks(s), TILE_THREADS, (size_t)tiled_shared(s), dev->stream>>>(
        (float *)y, (const float *)x, (const float *)op->filter, op->bias, s, ho, wo,
        (wo + TILE_W - 1) / TILE_W, (ho + TILE_H - 1) / TILE_H, (s.co / s.groups + TILE_O - 1) / TILE_O);
    CONV_TRY(dev, err, cudaGetLastError());
    return LTN_OK;
}

const struct conv_algo conv_direct = {LTN_CONV_DIRECT, tiled_refuse, tiled_create, tiled_run, NULL};
