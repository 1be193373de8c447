/* Explicit im2win in f32, NCHW: the window tensor is written to the workspace (see index.h), then multiplied
 * (arXiv 2306.14316, sections 3.2 to 3.4): a product of [co] x [n ho wo] x [ci hf wf] in tiles of BM x BN x
 * 8, 8 x 8 outputs per thread, tiles of both factors double-buffered and more in shared memory by
 * asynchronous copies, fragments double-buffered in registers, vector accesses wherever addresses allow:
 * filters (packed [k][o], padded with zeros), shared memory.
 *
 * Element k = (c, v, u) of the window of a column lies at the column's start plus an offset that depends on k
 * alone: a table, packed behind the filter, in which what pads k to a multiple of 8 is -1 and reads as zero.
 * Columns past the last are computed on the last one's window and not stored. The order of every sum is that
 * of k, whatever the tile. */
#include "kernels/conv/conv.cuh"

#include <stdio.h>
#include <stdlib.h>

enum { BK = 8, STAGES = 4, PAD = 4 /* floats behind each row of windows, against bank conflicts */ };

/* ---- the window tensor ------------------------------------------------------------------------------------
 */

enum { LAY_THREADS = 256, LAY_EACH = 8 };

struct lay {
    struct ltn_conv_shape s;
    int32_t ho;
    int64_t row;   /* elements of a row, Wp hf */
    int64_t total; /* of the tensor */
    struct conv_divisor by_row, by_hf, by_ho;
};

/* A block writes LAY_THREADS * LAY_EACH elements that follow one another. */
static __global__ void __launch_bounds__(LAY_THREADS)
    lay_kernel(float *to, const float *x, const __grid_constant__ struct lay l)
{
    __shared__ int64_t base_channel; /* of the block's first element: image * ci + channel */
    __shared__ uint32_t base_m, base_q;
    const struct ltn_conv_shape &s = l.s;
    const int64_t first = (int64_t)blockIdx.x * (LAY_THREADS * LAY_EACH);

    if (threadIdx.x == 0) {
        const int64_t r = first / l.row;
        base_q = (uint32_t)(first - r * l.row);
        base_channel = r / l.ho;
        base_m = (uint32_t)(r - base_channel * l.ho);
    }
    __syncthreads();
    const int64_t channel0 = base_channel;
    const uint32_t m0 = base_m, q0 = base_q;
#pragma unroll
    for (int i = 0; i < LAY_EACH; i++) {
        const uint32_t at = (uint32_t)(i * LAY_THREADS) + threadIdx.x;
        if (first + at >= l.total)
            return;
        const uint32_t rows = divide(q0 + at, l.by_row), q = q0 + at - rows * (uint32_t)l.row;
        const uint32_t k = divide(q, l.by_hf), u = q - k * (uint32_t)s.hf;
        const uint32_t channels = divide(m0 + rows, l.by_ho), m = m0 + rows - channels * (uint32_t)l.ho;
        const int64_t h = (int64_t)m * s.sh + (int64_t)u * s.dh - s.pt;
        const int32_t w = (int32_t)k - s.pl;
        to[first + at] = h >= 0 && h < s.hi && w >= 0 && w < s.wi
                             ? __ldg(x + ((channel0 + channels) * s.hi + h) * s.wi + w)
                             : 0;
    }
}

/* ---- the product ------------------------------------------------------------------------------------------
 */

struct windows {
    const float *t;         /* window tensor */
    const float *filter;    /* [groups][k padded][og padded] */
    const int64_t *offsets; /* [k padded] from a column's start; -1: zero */
    const float *bias;
    float *y;
    int32_t ci_group, co, og, ho, wo, groups;
    int32_t k_tiles, og_padded;
    int64_t columns; /* n ho wo */
    int64_t image, channel, row,
        step;          /* elements of t: an image, a channel, a row of windows, from column to column */
    int32_t row_tiles; /* of BM output channels */
    bool relu;
};

static __device__ __forceinline__ void copy4(uint32_t shared, const float *global, bool inside)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global),
                 "r"(inside ? 4 : 0)
                 : "memory");
}

static __device__ __forceinline__ void copy16(uint32_t shared, const float *global)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

/* Warps of 4 x 8 threads, each thread 8 x 8 outputs as four quarters of 4 x 4: a warp's tile is 32 x 64.
 * I: holds every element's distance from the start of the first column's image. */
template <int BM, int BN, typename I>
static __global__ void __launch_bounds__(BM *BN / 64, 512 / (BM * BN / 64))
    product_kernel(const __grid_constant__ struct windows p)
{
    constexpr int THREADS = BM * BN / 64, WARPS_N = BN / 64;
    constexpr int LD = BN + PAD, STAGE = BK * (BM + LD);
    constexpr int ROWS_AT_ONCE = THREADS / BK; /* columns of the tile that one round fetches */
    constexpr int ROUNDS = (BN + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    constexpr int FILTER_VECTORS = BK * BM / 4;
    __shared__ __align__(16) float shared[STAGES * STAGE];

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int64_t column0 = (int64_t)(blockIdx.x / p.row_tiles) * BN;
    const int o0 = (int)(blockIdx.x % p.row_tiles) * BM, g = blockIdx.y;
    const uint32_t shared0 = (uint32_t)__cvta_generic_to_shared(shared);

    /* windows: thread (k, column), k fastest, as the elements of a window are neighbours */
    const int fetch_k = tid % BK, fetch_column = tid / BK;
    I starts[ROUNDS];
    const int64_t places = (int64_t)p.ho * p.wo, image0 = column0 / places;
    const float *const t = p.t + image0 * p.image + (int64_t)g * p.ci_group * p.channel;
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        int64_t column = column0 + fetch_column + i * ROWS_AT_ONCE;
        column = column < p.columns ? column : p.columns - 1;
        const int64_t n = column / places;
        const int32_t place = (int32_t)(column - n * places), m = place / p.wo, j = place - m * p.wo;
        starts[i] = (I)((n - image0) * p.image + m * p.row + j * p.step);
    }
    const float *filter = p.filter + (int64_t)g * p.k_tiles * BK * p.og_padded + o0;
    I offset = (I)p.offsets[fetch_k]; /* of the next tile to fetch */

    auto fetch = [&](int tile) {
        if (tile < p.k_tiles) {
            const uint32_t stage = shared0 + (uint32_t)(tile % STAGES * STAGE) * 4;
            for (int i = tid; i < FILTER_VECTORS; i += THREADS)
                copy16(stage + (uint32_t)i * 16,
                       filter + ((int64_t)tile * BK + i / (BM / 4)) * p.og_padded + i % (BM / 4) * 4);
            const bool inside = offset != (I)-1;
#pragma unroll
            for (int i = 0; i < ROUNDS; i++) {
                const int column = fetch_column + i * ROWS_AT_ONCE;
                if (BN % ROWS_AT_ONCE == 0 || column < BN)
                    copy4(stage + (uint32_t)(BK * BM + fetch_k * LD + column) * 4,
                          t + (inside ? starts[i] + offset : 0), inside);
            }
            if (tile + 1 < p.k_tiles)
                offset = (I)p.offsets[(tile + 1) * BK + fetch_k];
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    for (int tile = 0; tile < STAGES - 1; tile++)
        fetch(tile);

    const int tm = warp / WARPS_N * 32 + lane / 8 * 4, tn = warp % WARPS_N * 64 + lane % 8 * 4;
    float acc[8][8] = {};
    for (int tile = 0; tile < p.k_tiles; tile++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads(); /* the tile is there for all, and the one before it is used up */
        fetch(tile + STAGES - 1);
        const float *const a = shared + tile % STAGES * STAGE + tm, *const b = a - tm + BK * BM + tn;
        float4 fa[2][2], fb[2][2];
        fa[0][0] = *reinterpret_cast<const float4 *>(a);
        fa[0][1] = *reinterpret_cast<const float4 *>(a + 16);
        fb[0][0] = *reinterpret_cast<const float4 *>(b);
        fb[0][1] = *reinterpret_cast<const float4 *>(b + 32);
#pragma unroll
        for (int k = 0; k < BK; k++) {
            const int now = k % 2, next = 1 - now;
            if (k + 1 < BK) {
                fa[next][0] = *reinterpret_cast<const float4 *>(a + (k + 1) * BM);
                fa[next][1] = *reinterpret_cast<const float4 *>(a + (k + 1) * BM + 16);
                fb[next][0] = *reinterpret_cast<const float4 *>(b + (k + 1) * LD);
                fb[next][1] = *reinterpret_cast<const float4 *>(b + (k + 1) * LD + 32);
            }
            const float as[8] = {fa[now][0].x, fa[now][0].y, fa[now][0].z, fa[now][0].w,
                                 fa[now][1].x, fa[now][1].y, fa[now][1].z, fa[now][1].w};
            const float bs[8] = {fb[now][0].x, fb[now][0].y, fb[now][0].z, fb[now][0].w,
                                 fb[now][1].x, fb[now][1].y, fb[now][1].z, fb[now][1].w};
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    acc[i][j] = fmaf(as[i], bs[j], acc[i][j]);
        }
    }

    /* Each warp turns its tile over in shared memory, half by half, so that stores are whole rows of 64
     * columns. */
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    static_assert(THREADS / 32 * 16 * 64 <= STAGES * STAGE, "the halves of all warps fit");
    float *const half = shared + warp * (16 * 64);
    int64_t to[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
        const int64_t column = column0 + warp % WARPS_N * 64 + lane + 32 * c, n = column / places;
        to[c] = column < p.columns ? (n * p.co + (int64_t)g * p.og) * places + (column - n * places) : -1;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *const row = half + (lane / 8 * 4 + i) * 64 + lane % 8 * 4;
            *reinterpret_cast<float4 *>(row) =
                make_float4(acc[4 * h + i][0], acc[4 * h + i][1], acc[4 * h + i][2], acc[4 * h + i][3]);
            *reinterpret_cast<float4 *>(row + 32) =
                make_float4(acc[4 * h + i][4], acc[4 * h + i][5], acc[4 * h + i][6], acc[4 * h + i][7]);
        }
        __syncwarp();
        const int o_first = o0 + warp / WARPS_N * 32 + h * 16;
        for (int r = 0; r < 16 && o_first + r < p.og; r++) {
#pragma unroll
            for (int c = 0; c < 2; c++)
                if (to[c] >= 0)
                    p.y[to[c] + (o_first + r) * places] =
                        conv_finish(half[r * 64 + lane + 32 * c], p.bias, g * p.og + o_first + r, p.relu);
        }
        __syncwarp();
    }
}

/* ---- the operator -----------------------------------------------------------------------------------------
 */

struct tile {
    int bm, bn;
    void (*kernel)(const struct windows);
    void (*wide_kernel)(const struct windows);
};
#define TILE(bm, bn)                                                                                         \
    {                                                                                                        \
        bm, bn, product_kernel<bm, bn, uint32_t>, product_kernel<bm, bn, int64_t>                            \
    }
static const struct tile tiles[] = {
    TILE(128, 128), TILE(96, 128), TILE(64, 256), TILE(64, 128), TILE(32, 128),
};
#undef TILE
static int64_t n_columns(const struct ltn_conv_shape *s)
{
    return (int64_t)s->n * ltn_conv_ho(s) * ltn_conv_wo(s);
}

static int64_t k_padded(const struct ltn_conv_shape *s)
{
    return ((int64_t)(s->ci / s->groups) * s->hf * s->wf + BK - 1) / BK * BK;
}

static int64_t n_tiles(const struct ltn_conv_shape *s, const struct tile &t)
{
    return (n_columns(s) + t.bn - 1) / t.bn * ((s->co / s->groups + t.bm - 1) / t.bm);
}

/* The tile whose blocks, spread over WAVE places, take the least time: a block's time goes with its area, and
 * smaller tiles fetch more for each product. Constants, not the device's count: though any choice gives the
 * same bits. */
static const struct tile &choose_tile(const struct ltn_conv_shape *s)
{
    enum { WAVE = 132 };
    const struct tile *best = NULL;
    double least = 0;
    for (const struct tile &t : tiles) {
        const double waves = (double)((n_tiles(s, t) * s->groups + WAVE - 1) / WAVE);
        const double cost = waves * t.bm * t.bn * (1 + 8.0 / t.bm + 4.0 / t.bn);
        if (!best || cost < least) {
            best = &t;
            least = cost;
        }
    }
    return *best;
}

static const char *im2win_refuse(const struct conv_device *, const struct ltn_conv_shape *s)
{
    const int64_t row = conv_window_row(s);
    if (s->type != LTN_CONV_F32 || s->layout != LTN_NCHW)
        return "explicit im2win is for f32 in NCHW";
    if (row + LAY_THREADS * LAY_EACH > INT32_MAX || s->groups > 65535 || k_padded(s) > INT32_MAX / 2)
        return "rows, groups or windows beyond 2^31, 65,535 or 2^30";
    if (conv_window_elements(s, ltn_conv_ho(s)) / (LAY_THREADS * LAY_EACH) >= INT32_MAX ||
        n_columns(s) / 128 * (s->co / s->groups / 32 + 1) >= INT32_MAX)
        return "more than 2^31 blocks";
    return NULL;
}

static enum ltn_status im2win_create(struct conv_device *dev, struct conv_op *op, const float *filter,
                                     struct ltn_error *err)
{
    const struct ltn_conv_shape *s = &op->base.shape;
    const struct tile &t = choose_tile(s);
    const int64_t cg = s->ci / s->groups, og = s->co / s->groups, kp = k_padded(s);
    const int64_t op_ = (og + t.bm - 1) / t.bm * t.bm, channel = ltn_conv_ho(s) * conv_window_row(s);
    const size_t weights = (size_t)(s->groups * kp * op_) * sizeof(float), bytes = weights + (size_t)kp * 8;
    float *packed = (float *)calloc(1, bytes);

    if (!packed)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory for a filter of %zu bytes", bytes);
    int64_t *const offsets = (int64_t *)((uint8_t *)packed + weights);
    for (int64_t k = 0; k < kp; k++)
        offsets[k] = -1;
    for (int32_t c = 0; c < cg; c++)
        for (int32_t v = 0; v < s->wf; v++)
            for (int32_t u = 0; u < s->hf; u++) {
                const int64_t k = ((int64_t)c * s->wf + v) * s->hf + u;
                offsets[k] = c * channel + conv_window_element(s, 0, u, v);
                for (int32_t o = 0; o < s->co; o++)
                    packed[(o / og * kp + k) * op_ + o % og] = filter[conv_filter_at(s, o, c, u, v)];
            }
    enum ltn_status status = conv_alloc(dev, &op->filter, bytes, err);
    if (status == LTN_OK)
        status = dev->base.ops->upload(&dev->base, op->filter, packed, bytes, err);
    free(packed);
    op->base.info.filter_bytes = bytes;
    op->base.info.workspace_bytes = (size_t)conv_window_elements(s, ltn_conv_ho(s)) * sizeof(float);
    snprintf(op->base.info.variant, sizeof op->base.info.variant, "tiles of %d x %d x %d", t.bm, t.bn,
             (int)BK);
    return status;
}

static enum ltn_status im2win_run(struct conv_device *dev, struct conv_op *op, void *y, const void *x,
                                  void *workspace, enum ltn_conv_part part, struct ltn_error *err)
{
    const struct ltn_conv_shape *s = &op->base.shape;
    const int32_t ho = ltn_conv_ho(s), wo = ltn_conv_wo(s);
    const int64_t row = conv_window_row(s);

    if (part & LTN_CONV_TRANSFORM) {
        const struct lay l = {*s,
                              ho,
                              row,
                              conv_window_elements(s, ho),
                              conv_divisor_of(row),
                              conv_divisor_of(s->hf),
                              conv_divisor_of(ho)};
        const int64_t each = LAY_THREADS * LAY_EACH;
        lay_kernel<<<(unsigned)((l.total + each - 1) / each), LAY_THREADS, 0, dev->stream>>>(
            (float *)workspace, (const float *)x, l);
        CONV_TRY(dev, err, cudaGetLastError());
    }
    if (part & LTN_CONV_KERNEL) {
        const struct tile &t = choose_tile(s);
        const int64_t kp = k_padded(s);
        struct windows p = {};
        p.t = (const float *)workspace;
        p.filter = (const float *)op->filter;
        p.bias = op->bias;
        p.y = (float *)y;
        p.ci_group = s->ci / s->groups;
        p.co = s->co;
        p.og = s->co / s->groups;
        p.ho = ho;
        p.wo = wo;
        p.groups = s->groups;
        p.k_tiles = (int32_t)(kp / BK);
        p.og_padded = (p.og + t.bm - 1) / t.bm * t.bm;
        p.offsets = (const int64_t *)((const uint8_t *)op->filter +
                                      (size_t)(s->groups * kp * p.og_padded) * sizeof(float));
        p.columns = n_columns(s);
        p.row = row;
        p.channel = ho * row;
        p.image = s->ci * p.channel;
        p.step = (int64_t)s->sw * s->hf;
        p.row_tiles = p.og_padded / t.bm;
        p.relu = s->relu;
        const int64_t images = (t.bn - 1) / ((int64_t)ho * wo) + 2; /* that the columns of a tile may touch */
        const bool narrow = images * p.image < UINT32_MAX;
        (narrow ? t.kernel : t.wide_kernel)<<<dim3((unsigned)n_tiles(s, t), (unsigned)s->groups),
                                              (unsigned)(t.bm * t.bn / 64), 0, dev->stream>>>(p);
        CONV_TRY(dev, err, cudaGetLastError());
    }
    return LTN_OK;
}

const struct conv_algo conv_im2win = {LTN_CONV_IM2WIN, im2win_refuse, im2win_create, im2win_run, NULL};
