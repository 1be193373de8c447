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

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum {
    BK = 16,
    FETCH_K = 8 /* neighbours in k fetched at once */,
    PAD = 4 /* floats behind each row of windows, against bank conflicts */
};

/* ---- the window tensor ------------------------------------------------------------------------------------
 */

enum { LAY_THREADS = 256, LAY_EACH = 4 };

struct lay {
    struct ltn_conv_shape s;
    int32_t ho;
    int64_t row;   /* elements of a row, Wp hf */
    int64_t total; /* of the tensor */
    struct conv_divisor by_row, by_hf, by_ho;
};

/* A block writes LAY_THREADS * LAY_EACH elements that follow one another, a thread LAY_EACH of them, 16
 * bytes: places come from divisions once, and from counting on. */
static __global__ void __launch_bounds__(LAY_THREADS)
    lay_kernel(float *to, const float *x, const __grid_constant__ struct lay l)
{
    __shared__ int64_t base_channel; /* of the block's first element: image * ci + channel */
    __shared__ uint32_t base_m, base_q;
    const struct ltn_conv_shape &s = l.s;
    const int64_t first = (int64_t)blockIdx.x * (LAY_THREADS * LAY_EACH);
    const uint32_t at = threadIdx.x * LAY_EACH;

    if (threadIdx.x == 0) {
        const int64_t r = first / l.row;
        base_q = (uint32_t)(first - r * l.row);
        base_channel = r / l.ho;
        base_m = (uint32_t)(r - base_channel * l.ho);
    }
    __syncthreads();
    if (first + at >= l.total)
        return;
    float v[LAY_EACH];
    uint32_t q = 0, u = 0;
    int32_t h = 0, w = 0;
    const float *image = x;
#pragma unroll
    for (int i = 0; i < LAY_EACH; i++) {
        if (i == 0 || q == (uint32_t)l.row) { /* a row begins */
            const uint32_t from = base_q + at + (uint32_t)i, rows = divide(from, l.by_row);
            q = from - rows * (uint32_t)l.row;
            const uint32_t k = divide(q, l.by_hf), channels = divide(base_m + rows, l.by_ho);
            u = q - k * (uint32_t)s.hf;
            h = (int32_t)(base_m + rows - channels * (uint32_t)l.ho) * s.sh + (int32_t)u * s.dh - s.pt;
            w = (int32_t)k - s.pl;
            image = x + (base_channel + channels) * s.hi * s.wi;
        }
        const bool inside = h >= 0 && h < s.hi && w >= 0 && w < s.wi && first + at + i < l.total;
        v[i] = inside ? __ldg(image + (int64_t)h * s.wi + w) : 0;
        q++;
        u++;
        h += s.dh;
        if (u == (uint32_t)s.hf) { /* the next column */
            u = 0;
            h -= s.hf * s.dh;
            w++;
        }
    }
    if (first + at + LAY_EACH <= l.total)
        *reinterpret_cast<float4 *>(to + first + at) = make_float4(v[0], v[1], v[2], v[3]);
    else
        for (int i = 0; i < LAY_EACH && first + at + i < l.total; i++)
            to[first + at + i] = v[i];
}

/* ---- the product ------------------------------------------------------------------------------------------
 */

struct windows {
    const float *t;         /* window tensor */
    const float *filter;    /* [groups][k padded][og padded] */
    const int64_t *offsets; /* [k padded] from a column's start */
    const float *bias;
    float *y;
    int32_t ci_group, co, og, ho, wo, groups;
    int32_t k, k_tiles, og_padded;
    struct conv_divisor by_places, by_wo;
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
    constexpr int LD = BN + PAD, STAGE = BK * (BM + LD), K_ROUNDS = BK / FETCH_K;
    constexpr int ROWS_AT_ONCE = THREADS / FETCH_K; /* columns of the tile that one round fetches */
    constexpr int ROUNDS = (BN + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    constexpr int FILTER_VECTORS = BK * BM / 4, FILTER_ROUNDS = (FILTER_VECTORS + THREADS - 1) / THREADS;
    static_assert(THREADS % (BM / 4) == 0, "a round of filters is whole rows");
    __shared__ __align__(16) float shared[2 * STAGE];

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int64_t column0 = (int64_t)(blockIdx.x / p.row_tiles) * BN;
    const int o0 = (int)(blockIdx.x % p.row_tiles) * BM, g = blockIdx.y;
    const uint32_t shared0 = (uint32_t)__cvta_generic_to_shared(shared);

    /* windows: thread (k, column), k fastest, as the elements of a window are neighbours */
    const int fetch_k = tid % FETCH_K, fetch_column = tid / FETCH_K;
    I starts[ROUNDS];
    const int64_t places = (int64_t)p.ho * p.wo, image0 = column0 / places;
    const float *const t = p.t + image0 * p.image + (int64_t)g * p.ci_group * p.channel;
    const uint32_t place0 = (uint32_t)(column0 - image0 * places);
    const uint32_t last = p.columns - column0 < BN ? (uint32_t)(p.columns - column0) - 1 : BN - 1;
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const uint32_t at = place0 + min((uint32_t)(fetch_column + i * ROWS_AT_ONCE), last);
        const uint32_t n = divide(at, p.by_places), place = at - n * (uint32_t)places;
        const uint32_t m = divide(place, p.by_wo), j = place - m * (uint32_t)p.wo;
        starts[i] = (I)n * (I)p.image + (I)m * (I)p.row + (I)j * (I)p.step;
    }
    const float *filter = p.filter + ((int64_t)g * p.k_tiles * BK + tid / (BM / 4)) * p.og_padded + o0 +
                          tid % (BM / 4) * 4; /* of the next tile to fetch */
    const int64_t *next_offsets = p.offsets + fetch_k;
    I offsets[K_ROUNDS]; /* likewise */
#pragma unroll
    for (int r = 0; r < K_ROUNDS; r++)
        offsets[r] = (I)next_offsets[r * FETCH_K];

    auto fetch = [&](int tile) {
        const uint32_t stage = shared0 + (uint32_t)(tile % 2 * STAGE) * 4;
#pragma unroll
        for (int i = 0; i < FILTER_ROUNDS; i++)
            if ((i + 1) * THREADS <= FILTER_VECTORS || tid + i * THREADS < FILTER_VECTORS)
                copy16(stage + (uint32_t)(tid + i * THREADS) * 16,
                       filter + (int64_t)(i * THREADS / (BM / 4)) * p.og_padded);
        filter += (int64_t)BK * p.og_padded;
#pragma unroll
        for (int r = 0; r < K_ROUNDS; r++) {
            const int k = fetch_k + r * FETCH_K;
            const bool inside = tile * BK + k < p.k;
#pragma unroll
            for (int i = 0; i < ROUNDS; i++) {
                const int column = fetch_column + i * ROWS_AT_ONCE;
                if (BN % ROWS_AT_ONCE == 0 || column < BN)
                    copy4(stage + (uint32_t)(BK * BM + k * LD + column) * 4, t + (starts[i] + offsets[r]),
                          inside);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        next_offsets += BK;
        if (tile + 1 < p.k_tiles)
#pragma unroll
            for (int r = 0; r < K_ROUNDS; r++)
                offsets[r] = (I)next_offsets[r * FETCH_K];
    };
    fetch(0);

    /* 4 x 8 threads so that of any eight neighbours, which are served together, pairs share windows and fours
     * filters */
    const int lane_m = (lane & 1) | (lane >> 2 & 2), lane_n = (lane >> 1 & 3) | (lane >> 2 & 4);
    const int tm = warp / WARPS_N * 32 + lane_m * 4, tn = warp % WARPS_N * 64 + lane_n * 4;
    float acc[8][8] = {};
    for (int tile = 0; tile < p.k_tiles; tile++) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads(); /* the tile is there for all, and the one before it is used up */
        if (tile + 1 < p.k_tiles)
            fetch(tile + 1);
        const float *const a = shared + tile % 2 * STAGE + tm, *const b = a - tm + BK * BM + tn;
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
    __syncthreads();
    static_assert(THREADS / 32 * 16 * 64 <= 2 * STAGE, "the halves of all warps fit");
    float *const half = shared + warp * (16 * 64);
    float *to[2];
    bool inside[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
        const uint32_t at = (uint32_t)(warp % WARPS_N * 64 + lane + 32 * c), from = place0 + min(at, last);
        const uint32_t n = divide(from, p.by_places);
        inside[c] = at <= last;
        to[c] = p.y + ((image0 + n) * p.co + (int64_t)g * p.og + o0 + warp / WARPS_N * 32) * places +
                (from - n * (uint32_t)places);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *const row = half + (lane_m * 4 + i) * 64 + lane_n * 4;
            *reinterpret_cast<float4 *>(row) =
                make_float4(acc[4 * h + i][0], acc[4 * h + i][1], acc[4 * h + i][2], acc[4 * h + i][3]);
            *reinterpret_cast<float4 *>(row + 32) =
                make_float4(acc[4 * h + i][4], acc[4 * h + i][5], acc[4 * h + i][6], acc[4 * h + i][7]);
        }
        __syncwarp();
        const int o = o0 + warp / WARPS_N * 32 + h * 16;
#pragma unroll
        for (int r = 0; r < 16; r++) {
            if (o + r < p.og) {
                const float bias = p.bias ? p.bias[g * p.og + o + r] : 0, least = p.relu ? 0 : -INFINITY;
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const float v = half[r * 64 + lane + 32 * c] + bias;
                    if (inside[c])
                        *to[c] = v < least ? least : v; /* NaN stays */
                    to[c] += places;
                }
            }
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
    TILE(128, 64), TILE(96, 64), TILE(64, 128), TILE(64, 64), TILE(32, 64),
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

/* The tile whose blocks, spread over WAVE places, take the least time: a block's time goes with its area,
 * smaller tiles fetch more for each product, and the starts and ends of large blocks are long where sums are
 * short. Constants, not the device's count: though any choice gives the same bits. */
static const struct tile &choose_tile(const struct ltn_conv_shape *s)
{
    enum { WAVE = 132 };
    const struct tile *best = NULL;
    double least = 0;
    for (const struct tile &t : tiles) {
        const double waves = (double)((n_tiles(s, t) * s->groups + WAVE - 1) / WAVE), area = t.bm * t.bn;
        const double cost =
            waves * area * (1 + 24.0 / t.bm + 8.0 / t.bn) * (1 + area / 256 / (double)k_padded(s));
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
    const int64_t places = (int64_t)ltn_conv_ho(s) * ltn_conv_wo(s);
    if (row + LAY_THREADS * LAY_EACH > INT32_MAX || places > INT32_MAX - 1024 || s->groups > 65535 ||
        k_padded(s) > INT32_MAX / 2)
        return "rows, places, groups or windows beyond 2^31, 2^31, 65,535 or 2^30";
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
    op->base.info.has_parts = true;
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
        p.k = p.ci_group * s->hf * s->wf;
        p.k_tiles = (int32_t)(kp / BK);
        p.by_places = conv_divisor_of((int64_t)ho * wo);
        p.by_wo = conv_divisor_of(wo);
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
