/* Explicit im2win in f32, NCHW: the window tensor is written to the workspace (see index.h), then multiplied
 * (arXiv 2306.14316, sections 3.2 to 3.4): a product of [co] x [n ho wo] x [ci hf wf] in tiles of BM x BN
 * outputs and iterations of BK, 8 x 16 or 8 x 8 outputs per thread, both factors double-buffered in shared
 * memory by asynchronous copies and in registers, vector accesses wherever addresses allow: filters (packed,
 * a tile's iteration after the other, padded with zeros), shared memory, outputs where images are multiples
 * of 16 bytes.
 *
 * Element k = (c, v, u) of the window of a column lies at the column's start plus an offset that depends on k
 * alone: a table, packed behind the filter; what pads k to a multiple of BK is zero and reads nothing.
 * Columns past the last are computed on the last one's window and not stored. A sum is taken in the order of
 * k, by one block, or by several that have a run of k each (struct split): the shape alone says which. */
#include "kernels/conv/conv.cuh"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum {
    BK = 16,
    FETCH_K = 8 /* neighbours in k fetched at once */
};

/* ---- the window tensor ------------------------------------------------------------------------------------
 */

enum { LAY_THREADS = 256, LAY_EACH = 4 };

/* Division of 0 <= n < 2^62 by a fixed divisor: the product with 2^64 / d, rounded up, is at most one too
 * large. */
struct wide_divisor {
    int64_t d;
    uint64_t factor;
};
static struct wide_divisor wide_divisor_of(int64_t d) /* 1 <= d < 2^31 */
{
    return {d, d == 1 ? UINT64_MAX : UINT64_MAX / (uint64_t)d + 1};
}
static __device__ __forceinline__ int64_t divide(int64_t n, struct wide_divisor d)
{
    const int64_t q = (int64_t)__umul64hi((uint64_t)n, d.factor) + (d.d == 1 ? 1 : 0);
    return q * d.d > n ? q - 1 : q;
}

struct lay {
    struct ltn_conv_shape s;
    int32_t ho;
    int64_t total; /* elements of the tensor */
    struct wide_divisor by_row /* of Wp hf elements */, by_ho;
    struct conv_divisor by_hf;
    uint32_t *counters; /* [n_counters] become 0 */
    int32_t n_counters;
};

/* A thread writes LAY_EACH elements that follow one another, 16 bytes: places come from divisions once, and
 * from counting on. */
template <bool PADDED>
static __global__ void __launch_bounds__(LAY_THREADS)
    lay_kernel(float *to, const float *x, const __grid_constant__ struct lay l)
{
    const struct ltn_conv_shape &s = l.s;
    const int64_t first = ((int64_t)blockIdx.x * LAY_THREADS + threadIdx.x) * LAY_EACH;

    if (blockIdx.x == 0)
        for (int32_t i = (int32_t)threadIdx.x; i < l.n_counters; i += LAY_THREADS)
            l.counters[i] = 0;
    if (first >= l.total)
        return;
    const int64_t r = divide(first, l.by_row);
    int64_t channel = divide(r, l.by_ho); /* image * ci + channel */
    int32_t m = (int32_t)(r - channel * l.ho), q = (int32_t)(first - r * l.by_row.d);
    const int32_t column = (int32_t)divide((uint32_t)q, l.by_hf), row = (int32_t)l.by_row.d;
    int32_t u = q - column * s.hf, h = m * s.sh - s.pt + u * s.dh, w = column - s.pl;
    const float *at = x + (channel * s.hi + h) * s.wi + w;
    const int64_t down = (int64_t)s.dh * s.wi, next = 1 - s.hf * down;
    float v[LAY_EACH];
#pragma unroll
    for (int i = 0; i < LAY_EACH; i++) {
        const bool inside = (!PADDED || (h >= 0 && h < s.hi && w >= 0 && w < s.wi)) && first + i < l.total;
        v[i] = inside ? __ldg(at) : 0;
        at += down;
        h += s.dh;
        if (++u == s.hf) { /* the next column */
            u = 0;
            h -= s.hf * s.dh;
            w++;
            at += next;
        }
        if (++q == row) { /* the next row */
            q = 0;
            if (++m == l.ho) {
                m = 0;
                channel++;
            }
            h = m * s.sh - s.pt;
            w = -s.pl;
            at = x + (channel * s.hi + h) * s.wi + w;
        }
    }
    if (first + LAY_EACH <= l.total)
        *reinterpret_cast<float4 *>(to + first) = make_float4(v[0], v[1], v[2], v[3]);
    else
        for (int i = 0; i < LAY_EACH && first + i < l.total; i++)
            to[first + i] = v[i];
}

/* ---- the product ------------------------------------------------------------------------------------------
 */

enum {
    BN = 128,              /* columns of a tile */
    LD = BN + 32 / FETCH_K /* of a row of windows in shared memory: FETCH_K rows begin in different banks */
};

/* Who computes which tile. The first `blocks` blocks take every blocks-th of the first `whole` tiles. Of the
 * rest the sums are split: `streams` blocks share their iterations (of BK) alike, each a run of them that may
 * begin and end within a tile. A block takes its run from the back: the part at its end, which another block
 * completes, comes first and is left in the workspace; whoever has a tile's last iterations adds the parts
 * before it, from the nearest to the first. These blocks are numbered as they start and only wait for lower
 * numbers, so that whatever runs together, they end. */
struct split {
    int64_t whole, blocks; /* tiles that are not split, blocks for them */
    int32_t streams;       /* 0: all are whole */
    uint32_t *ticket;      /* of the next block, 0 before and after */
    uint32_t *ready;       /* [streams] a block's part is there; 0 before and after */
    float *parts;          /* [streams][BM * BN] */
};

struct windows {
    const float *t;         /* window tensor */
    const float *filter;    /* [groups][row tiles][k padded][BM] */
    const int64_t *offsets; /* [k padded] from a column's start */
    const float *bias;
    float *y;
    int32_t ci_group, co, og, ho, wo;
    int32_t k, k_tiles;
    struct conv_divisor by_places, by_wo;
    int64_t columns;             /* n ho wo */
    int64_t column_tiles, tiles; /* of BN columns; of all groups and channels */
    int64_t image, channel, row,
        step;          /* elements of t: an image, a channel, a row of windows, from column to column */
    int32_t row_tiles; /* of BM output channels */
    bool relu;
    struct split split;
};

/* The first iteration, of all tiles', of the run of a block. */
static __device__ __forceinline__ int64_t run_of(const struct windows &p, uint32_t ticket)
{
    return p.split.whole * p.k_tiles +
           (p.tiles - p.split.whole) * p.k_tiles * (int64_t)ticket / p.split.streams;
}

/* from + 4 distance, in one instruction where the distance has 32 bits */
template <typename F> static __device__ __forceinline__ F *element(F *from, uint32_t distance)
{
    F *at;
    asm("mad.wide.u32 %0, %1, 4, %2;" : "=l"(at) : "r"(distance), "l"(from));
    return at;
}
template <typename F> static __device__ __forceinline__ F *element(F *from, int64_t distance)
{
    return from + distance;
}

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

static __device__ __forceinline__ uint32_t load_acquire(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

/* v, but at least `least`; NaN stays */
static __device__ __forceinline__ float at_least(float v, float least)
{
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(least));
    return r;
}

/* Warps, WM below one another and WN side by side, of 4 x 8 threads; a thread has GM x GN squares of 4 x 4
 * outputs, which lie 16 rows and 32 columns apart. */
template <int GM_, int GN_, int WM_, int WN_> struct tile {
    static constexpr int GM = GM_, GN = GN_, WM = WM_, WN = WN_;
    static constexpr int THREADS = 32 * WM * WN, BM = 16 * GM * WM, COLUMNS = 32 * GN /* of a warp */;
    static constexpr int STAGE = BK * (BM + LD);
    static constexpr int K_ROUNDS = BK / FETCH_K, AT_ONCE = THREADS / FETCH_K /* columns */;
    static constexpr int ROUNDS = (BN + AT_ONCE - 1) / AT_ONCE, FILTER_ROUNDS = BK * BM / 4 / THREADS;
    static_assert(COLUMNS * WN == BN, "a tile is BN columns");
    static_assert(FILTER_ROUNDS * THREADS == BK * BM / 4, "filters alike");
    static_assert(WM * WN * 8 * COLUMNS <= STAGE, "what warps turn over fits");
};

/* The thread's place in its warp: 4 x 8 so that of any eight neighbours, which are served together, pairs
 * share windows and fours filters. */
static __device__ __forceinline__ int lane_m()
{
    return (threadIdx.x & 1) | (threadIdx.x >> 2 & 2);
}
static __device__ __forceinline__ int lane_n()
{
    return (threadIdx.x >> 1 & 3) | (threadIdx.x >> 2 & 4);
}

/* Iterations from .. to - 1 of a tile. */
struct piece {
    int32_t tile, from, to;
};

/* What a block has left to do. */
struct work {
    int64_t whole;      /* its next whole tile */
    int64_t first, end; /* its run of the iterations of split tiles, what is left of it */
    uint32_t ticket;    /* its number, where it has such a run */
};

/* to is 0 where nothing is left. */
static __device__ __forceinline__ struct piece next_piece(struct work &w, const struct windows &p)
{
    if (w.whole < p.split.whole) {
        const struct piece q = {(int32_t)w.whole, 0, p.k_tiles};
        w.whole += p.split.blocks;
        return q;
    }
    if (w.end <= w.first)
        return {0, 0, 0};
    const int64_t tile = (w.end - 1) / p.k_tiles, begin = tile * p.k_tiles;
    const struct piece q = {(int32_t)tile, (int32_t)(w.first > begin ? w.first - begin : 0),
                            (int32_t)(w.end - begin)};
    w.end = begin + q.from;
    return q;
}

/* Where a tile lies. */
struct place {
    int32_t g, row_tile;
    int64_t image0; /* of its first column */
    uint32_t place0;
    uint32_t last; /* column that exists, of its BN */
};

static __device__ __forceinline__ struct place place_of(int32_t tile, const struct windows &p)
{
    struct place at;
    const int32_t column_tile = tile / p.row_tiles, places = p.ho * p.wo;
    at.row_tile = tile - column_tile * p.row_tiles;
    at.g = column_tile / (int32_t)p.column_tiles;
    const int64_t column0 = (int64_t)(column_tile - at.g * (int32_t)p.column_tiles) * BN;
    at.image0 = column0 / places;
    at.place0 = (uint32_t)(column0 - at.image0 * places);
    at.last = p.columns - column0 < BN ? (uint32_t)(p.columns - column0) - 1 : BN - 1;
    return at;
}

/* Brings what an iteration multiplies to shared memory. Windows: thread (k, column), k fastest, as the
 * elements of a window are neighbours. */
template <class T, typename I> struct loader {
    const float *t, *filter;
    I starts[T::ROUNDS], offsets[T::K_ROUNDS]; /* of the next iteration */

    __device__ __forceinline__ void take_offsets(const struct windows &p, int iteration)
    {
        const int64_t *const from = p.offsets + iteration * BK + threadIdx.x % FETCH_K;
#pragma unroll
        for (int r = 0; r < T::K_ROUNDS; r++)
            offsets[r] = (I)from[r * FETCH_K];
    }

    __device__ __forceinline__ void begin(const struct windows &p, const struct piece &q)
    {
        const struct place at = place_of(q.tile, p);
        const uint32_t places = (uint32_t)(p.ho * p.wo);
        t = p.t + at.image0 * p.image + (int64_t)at.g * p.ci_group * p.channel;
        filter = p.filter +
                 (((int64_t)at.g * p.row_tiles + at.row_tile) * p.k_tiles + q.from) * (BK * T::BM) +
                 threadIdx.x * 4;
#pragma unroll
        for (int i = 0; i < T::ROUNDS; i++) {
            const uint32_t from = at.place0 + min(threadIdx.x / FETCH_K + i * T::AT_ONCE, at.last);
            const uint32_t n = divide(from, p.by_places), rest = from - n * places;
            const uint32_t m = divide(rest, p.by_wo), j = rest - m * (uint32_t)p.wo;
            starts[i] = (I)n * (I)p.image + (I)m * (I)p.row + (I)j * (I)p.step;
        }
        if (q.from > 0)
            take_offsets(p, q.from);
    }

    /* to: the end of the piece; behind it the next one's offsets are taken, which mostly begins at 0 */
    __device__ __forceinline__ void fetch(const struct windows &p, uint32_t stage, int iteration, int to)
    {
#pragma unroll
        for (int i = 0; i < T::FILTER_ROUNDS; i++)
            copy16(stage + (uint32_t)(threadIdx.x + i * T::THREADS) * 16, filter + i * T::THREADS * 4);
        filter += BK * T::BM;
#pragma unroll
        for (int r = 0; r < T::K_ROUNDS; r++) {
            const int k = (int)threadIdx.x % FETCH_K + r * FETCH_K;
            const bool inside = iteration * BK + k < p.k;
#pragma unroll
            for (int i = 0; i < T::ROUNDS; i++) {
                const int column = (int)threadIdx.x / FETCH_K + i * T::AT_ONCE;
                if (BN % T::AT_ONCE == 0 || column < BN)
                    copy4(stage + (uint32_t)(BK * T::BM + k * LD + (column ^ 1)) * 4,
                          element(t, starts[i] + offsets[r]), inside);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        take_offsets(p, iteration + 1 < to ? iteration + 1 : 0);
    }
};

/* acc += the products of one iteration, of which the first `depth` k are not zero. Columns lie in shared
 * memory with neighbours swapped, and rows are gone through to and fro: so the two operands that a product
 * reads from registers, besides the one that it shares with the product before it, come from different banks,
 * as registers of even and of odd number do. */
template <class T> struct fragments {
    float4 a[2][T::GM], b[2][T::GN];

    __device__ __forceinline__ void load(int which, const float *from_a, const float *from_b)
    {
#pragma unroll
        for (int i = 0; i < T::GM; i++)
            a[which][i] = *reinterpret_cast<const float4 *>(from_a + 16 * i);
#pragma unroll
        for (int j = 0; j < T::GN; j++)
            b[which][j] = *reinterpret_cast<const float4 *>(from_b + 32 * j);
    }
};

template <class T>
static __device__ __forceinline__ void multiply(float (&acc)[4 * T::GM][4 * T::GN], struct fragments<T> &f,
                                                const float *a, const float *b, int depth)
{
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
        const int onward = k + 4 < depth ? 4 : 0; /* the last one's next are not used */
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            const int row = kk < 3 ? kk + 1 : onward;
            f.load((kk + 1) % 2, a + row * T::BM, b + row * LD);
            const float *const as = &f.a[kk % 2][0].x, *const bs = &f.b[kk % 2][0].x;
#pragma unroll
            for (int i = 0; i < 4 * T::GM; i++)
#pragma unroll
                for (int n = 0; n < 4 * T::GN; n++) {
                    const int j = i % 2 ? n : 4 * T::GN - 1 - n;
                    acc[i][j] = fmaf(as[i], bs[j ^ 1], acc[i][j]);
                }
        }
        a += 4 * T::BM;
        b += 4 * LD;
    }
}

/* Leaves the block's sums in the workspace for the block that completes the tile. */
template <class T>
static __device__ void leave_part(const float (&acc)[4 * T::GM][4 * T::GN], const struct split &s,
                                  uint32_t ticket)
{
    float4 *const part = reinterpret_cast<float4 *>(s.parts + (int64_t)ticket * (T::BM * BN)) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4 * T::GM; i++)
#pragma unroll
        for (int j = 0; j < T::GN; j++)
            __stcg(part + (i * T::GN + j) * T::THREADS,
                   make_float4(acc[i][4 * j], acc[i][4 * j + 1], acc[i][4 * j + 2], acc[i][4 * j + 3]));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        atomicExch(s.ready + ticket, 1);
}

/* Adds what the block with that ticket left. */
template <class T>
static __device__ void add_part(float (&acc)[4 * T::GM][4 * T::GN], const struct split &s, uint32_t ticket)
{
    const float4 *const part =
        reinterpret_cast<const float4 *>(s.parts + (int64_t)ticket * (T::BM * BN)) + threadIdx.x;
    if (threadIdx.x == 0) {
        while (!load_acquire(s.ready + ticket))
            __nanosleep(100);
        s.ready[ticket] = 0; /* for the next launch */
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4 * T::GM; i++)
#pragma unroll
        for (int j = 0; j < T::GN; j++) {
            const float4 v = __ldcg(part + (i * T::GN + j) * T::THREADS);
            acc[i][4 * j] += v.x;
            acc[i][4 * j + 1] += v.y;
            acc[i][4 * j + 2] += v.z;
            acc[i][4 * j + 3] += v.w;
        }
}

/* Bias, ReLU, and stores. */
template <class T, typename I>
static __device__ __forceinline__ void store_tile(const float (&acc)[4 * T::GM][4 * T::GN], float *stage,
                                                  const struct windows &p, const struct place &at)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = at.g;
    const int64_t places = (int64_t)p.ho * p.wo;
    const int o0 = at.row_tile * T::BM + warp / T::WN * (16 * T::GM);
    const bool plain = !p.bias && !p.relu;
    const float least = p.relu ? 0 : -INFINITY;
    const bool fours = places % 4 == 0; /* columns in fours that begin at multiples of 16 bytes */
    const int first = warp % T::WN * T::COLUMNS + (fours ? lane_n() * 4 : lane);
    float *to[T::GN]; /* of the columns first + 32 c */
    bool inside[T::GN];

#pragma unroll
    for (int c = 0; c < T::GN; c++) {
        const uint32_t column = (uint32_t)(first + 32 * c), from = at.place0 + min(column, at.last);
        const uint32_t n = divide(from, p.by_places);
        inside[c] = column <= at.last;
        to[c] =
            p.y + ((at.image0 + n) * p.co + (int64_t)g * p.og + o0) * places + (from - n * (uint32_t)places);
    }
    if (fours) {
#pragma unroll
        for (int i = 0; i < 4 * T::GM; i++) {
            const int r = i / 4 * 16 + lane_m() * 4 + i % 4;
            if (o0 + r < p.og) {
                const I down = (I)r * (I)places;
                const float bias = p.bias ? p.bias[g * p.og + o0 + r] : 0;
#pragma unroll
                for (int c = 0; c < T::GN; c++) {
                    float4 v =
                        make_float4(acc[i][4 * c], acc[i][4 * c + 1], acc[i][4 * c + 2], acc[i][4 * c + 3]);
                    if (!plain)
                        v = make_float4(at_least(v.x + bias, least), at_least(v.y + bias, least),
                                        at_least(v.z + bias, least), at_least(v.w + bias, least));
                    if (inside[c])
                        *reinterpret_cast<float4 *>(element(to[c], down)) = v;
                }
            }
        }
        return;
    }
    /* Each warp turns its tile over in shared memory, two rows of every four at a time, so that stores are
     * whole rows. */
    float *const rows = stage + warp * (8 * T::COLUMNS);
    __syncthreads(); /* the stage is used up */
#pragma unroll
    for (int h = 0; h < 2 * T::GM; h++) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int c = 0; c < T::GN; c++)
                *reinterpret_cast<float4 *>(rows + (lane_m() * 2 + i) * T::COLUMNS + lane_n() * 4 + 32 * c) =
                    make_float4(acc[2 * h + i][4 * c], acc[2 * h + i][4 * c + 1], acc[2 * h + i][4 * c + 2],
                                acc[2 * h + i][4 * c + 3]);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int r = h / 2 * 16 + i / 2 * 4 + h % 2 * 2 + i % 2;
            if (o0 + r < p.og) {
                const I down = (I)r * (I)places;
                const float bias = p.bias ? p.bias[g * p.og + o0 + r] : 0;
#pragma unroll
                for (int c = 0; c < T::GN; c++) {
                    float v = rows[i * T::COLUMNS + lane + 32 * c];
                    if (!plain)
                        v = at_least(v + bias, least);
                    if (inside[c])
                        *element(to[c], down) = v;
                }
            }
        }
        __syncwarp();
    }
}

/* AHEAD: a block loads for its next piece while it ends one. */
template <class T, int BLOCKS, typename I, bool AHEAD>
static __global__ void __launch_bounds__(T::THREADS, BLOCKS)
    product_kernel(const __grid_constant__ struct windows p)
{
    __shared__ __align__(16) float shared[2 * T::STAGE];
    __shared__ struct work work; /* in shared memory, as registers are short */
    __shared__ struct piece next;
    const uint32_t shared0 = (uint32_t)__cvta_generic_to_shared(shared);
    const int warp = threadIdx.x / 32;

    if (threadIdx.x == 0) {
        work = {blockIdx.x, 0, 0, 0};
        if (blockIdx.x >= p.split.blocks) {
            const uint32_t ticket = atomicInc(p.split.ticket, (uint32_t)p.split.streams - 1);
            work = {p.split.whole, run_of(p, ticket), run_of(p, ticket + 1), ticket};
        }
        next = next_piece(work, p);
    }
    __syncthreads();
    struct piece now, loaded = next;
    struct loader<T, I> loader;
    uint32_t stage = 0; /* of the iteration that comes: its distance in shared memory */
    loader.take_offsets(p, 0);
    loader.begin(p, loaded);
    loader.fetch(p, shared0, loaded.from, loaded.to);
    while (loaded.to > 0) {
        float acc[4 * T::GM][4 * T::GN] = {};
        now = loaded;
        for (int it = now.from; it < now.to; it++) {
            const bool is_last = it + 1 == now.to;
            if (is_last && it == now.from)
                __syncthreads(); /* all have read the piece before */
            if (is_last && threadIdx.x == 0)
                next = next_piece(work, p);
            asm volatile("cp.async.wait_group 0;" ::: "memory");
            __syncthreads(); /* the iteration's elements are there for all, and those before it are used up */
            const float *const a = shared + stage + warp / T::WN * (16 * T::GM) + lane_m() * 4;
            const float *const b = shared + stage + BK * T::BM + warp % T::WN * T::COLUMNS + lane_n() * 4;
            stage = T::STAGE - stage;
            struct fragments<T> f;
            f.load(0, a, b);
            if (AHEAD && is_last) {
                loaded = next;
                if (loaded.to > 0)
                    loader.begin(p, loaded);
            }
            if (AHEAD ? loaded.to > 0 : !is_last)
                loader.fetch(p, shared0 + stage * 4, is_last ? loaded.from : it + 1, loaded.to);
            multiply<T>(acc, f, a, b, min(p.k - it * BK, (int)BK));
        }
        const struct place at = place_of(now.tile, p);
        if (now.to < p.k_tiles) {
            leave_part<T>(acc, p.split, work.ticket);
        } else {
            const int64_t begin = (int64_t)now.tile * p.k_tiles;
            for (uint32_t t = work.ticket; now.from > 0 && (t == work.ticket || run_of(p, t) > begin);)
                add_part<T>(acc, p.split, --t);
            store_tile<T, I>(acc, shared + (T::STAGE - stage), p, at);
        }
        if (!AHEAD) {
            loaded = next;
            if (loaded.to > 0) {
                loader.begin(p, loaded);
                loader.fetch(p, shared0 + stage * 4, loaded.from, loaded.to);
            }
        }
    }
}

/* ---- the operator -----------------------------------------------------------------------------------------
 */

struct form {
    int bm, threads, blocks; /* on a processor */
    /* [0][]: for images of 2^32 elements of the window tensor and more; [][1]: where blocks stay */
    void (*kernels[2][2])(const struct windows);
};
template <class T, int BLOCKS> static constexpr struct form form_of()
{
    return {T::BM,
            T::THREADS,
            BLOCKS,
            {{product_kernel<T, BLOCKS, int64_t, false>, product_kernel<T, BLOCKS, int64_t, true>},
             {product_kernel<T, BLOCKS, uint32_t, false>, product_kernel<T, BLOCKS, uint32_t, true>}}};
}
static const struct form forms[] = {
    form_of<tile<2, 4, 4, 1>, 2>(),
    form_of<tile<2, 2, 3, 2>, 2>(),
    form_of<tile<2, 4, 2, 1>, 4>(),
    form_of<tile<2, 2, 1, 2>, 6>(),
};

/* How a shape is cut up. */
struct plan {
    const struct form *form;
    int64_t k_tiles;      /* iterations of a tile */
    int64_t column_tiles; /* of one group */
    int64_t row_tiles;
    int64_t tiles;                  /* of all groups */
    int64_t whole, blocks, streams; /* see struct split */
};

static int64_t n_columns(const struct ltn_conv_shape *s)
{
    return (int64_t)s->n * ltn_conv_ho(s) * ltn_conv_wo(s);
}

/* Tiles of the height that pads the channels least: the lower, the more is fetched for each product. Sums are
 * split where whole tiles would keep the processors of an H100 badly busy at the end. Where sums are short
 * blocks stay, so that they load for a tile while they end the one before. Constants, not the device's
 * counts, so that the bits are the same everywhere. */
static struct plan make_plan(const struct ltn_conv_shape *s)
{
    enum {
        PROCESSORS = 132,
        ROUNDS = 8 /* of tiles, at least, that are not split */,
        LEAST = 4 /* iterations of a part */,
        STAY = 12 /* iterations of a tile at most */
    };
    const int64_t k = (int64_t)(s->ci / s->groups) * s->hf * s->wf, og = s->co / s->groups;
    struct plan p = {};
    double least = 0;

    for (const struct form &form : forms) {
        const int64_t padded = (og + form.bm - 1) / form.bm * form.bm;
        const double cost = (double)padded * (1 + 8.0 / form.bm);
        if (!p.form || cost < least) {
            p.form = &form;
            least = cost;
        }
    }
    p.k_tiles = (k + BK - 1) / BK;
    p.column_tiles = (n_columns(s) + BN - 1) / BN;
    p.row_tiles = (og + p.form->bm - 1) / p.form->bm;
    p.tiles = p.column_tiles * p.row_tiles * s->groups;
    const int64_t round = PROCESSORS * p.form->blocks; /* tiles computed at once */
    p.whole = p.tiles;
    if (p.tiles < ROUNDS * round && p.tiles % round != 0 && p.k_tiles >= 2 * LEAST) {
        p.whole = p.tiles > 2 * round ? (p.tiles / round - 1) * round : 0;
        p.streams = (p.tiles - p.whole) * p.k_tiles / LEAST;
        p.streams = p.streams < round ? p.streams : round;
    }
    p.blocks = p.k_tiles <= STAY && p.whole > round ? round : p.whole;
    return p;
}

static int64_t k_padded(const struct ltn_conv_shape *s)
{
    return make_plan(s).k_tiles * BK;
}

/* The workspace: the window tensor, the counters of struct split, the parts. */
static size_t tensor_bytes(const struct ltn_conv_shape *s)
{
    return ((size_t)conv_window_elements(s, ltn_conv_ho(s)) * sizeof(float) + 255) & ~(size_t)255;
}

static size_t counters_bytes(const struct plan *p)
{
    return ((size_t)(p->streams ? 1 + p->streams : 0) * sizeof(uint32_t) + 255) & ~(size_t)255;
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
        make_plan(s).tiles >= INT32_MAX)
        return "more than 2^31 blocks";
    return NULL;
}

static enum ltn_status im2win_create(struct conv_device *dev, struct conv_op *op, const float *filter,
                                     struct ltn_error *err)
{
    const struct ltn_conv_shape *s = &op->base.shape;
    const struct plan plan = make_plan(s);
    const int64_t cg = s->ci / s->groups, og = s->co / s->groups, kp = plan.k_tiles * BK;
    const int64_t bm = plan.form->bm, channel = ltn_conv_ho(s) * conv_window_row(s);
    const size_t weights = (size_t)(s->groups * plan.row_tiles * kp * bm) * sizeof(float),
                 bytes = weights + (size_t)kp * 8;
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
                    packed[((o / og * plan.row_tiles + o % og / bm) * kp + k) * bm + o % og % bm] =
                        filter[conv_filter_at(s, o, c, u, v)];
            }
    enum ltn_status status = conv_alloc(dev, &op->filter, bytes, err);
    if (status == LTN_OK)
        status = dev->base.ops->upload(&dev->base, op->filter, packed, bytes, err);
    free(packed);
    op->base.info.has_parts = true;
    op->base.info.filter_bytes = bytes;
    op->base.info.workspace_bytes = tensor_bytes(s) + counters_bytes(&plan) +
                                    (size_t)plan.streams * (size_t)(plan.form->bm * BN) * sizeof(float);
    const int used = snprintf(op->base.info.variant, sizeof op->base.info.variant, "tiles of %d x %d x %d",
                              plan.form->bm, (int)BN, (int)BK);
    if (plan.streams)
        snprintf(op->base.info.variant + used, sizeof op->base.info.variant - (size_t)used,
                 ", %lld of %lld split among %lld blocks", (long long)(plan.tiles - plan.whole),
                 (long long)plan.tiles, (long long)plan.streams);
    return status;
}

static enum ltn_status im2win_run(struct conv_device *dev, struct conv_op *op, void *y, const void *x,
                                  void *workspace, enum ltn_conv_part part, struct ltn_error *err)
{
    const struct ltn_conv_shape *s = &op->base.shape;
    const int32_t ho = ltn_conv_ho(s), wo = ltn_conv_wo(s);
    const int64_t row = conv_window_row(s);

    const struct plan plan = make_plan(s);
    uint32_t *const counters = plan.streams ? (uint32_t *)((uint8_t *)workspace + tensor_bytes(s)) : NULL;

    if (part & LTN_CONV_TRANSFORM) {
        const struct lay l = {*s,
                              ho,
                              conv_window_elements(s, ho),
                              wide_divisor_of(row),
                              wide_divisor_of(ho),
                              conv_divisor_of(s->hf),
                              counters,
                              plan.streams ? (int32_t)plan.streams + 1 : 0};
        const int64_t each = LAY_THREADS * LAY_EACH;
        const bool padded = s->pt > 0 || s->pb > 0 || s->pl > 0 || s->pr > 0;
        (padded
             ? lay_kernel<true>
             : lay_kernel<false>)<<<(unsigned)((l.total + each - 1) / each), LAY_THREADS, 0, dev->stream>>>(
            (float *)workspace, (const float *)x, l);
        CONV_TRY(dev, err, cudaGetLastError());
    }
    if (part & LTN_CONV_KERNEL) {
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
        p.k = p.ci_group * s->hf * s->wf;
        p.k_tiles = (int32_t)plan.k_tiles;
        p.by_places = conv_divisor_of((int64_t)ho * wo);
        p.by_wo = conv_divisor_of(wo);
        p.offsets = (const int64_t *)((const uint8_t *)op->filter + op->base.info.filter_bytes -
                                      (size_t)plan.k_tiles * BK * sizeof(int64_t));
        p.columns = n_columns(s);
        p.column_tiles = plan.column_tiles;
        p.tiles = plan.tiles;
        p.row = row;
        p.channel = ho * row;
        p.image = s->ci * p.channel;
        p.step = (int64_t)s->sw * s->hf;
        p.row_tiles = (int32_t)plan.row_tiles;
        p.relu = s->relu;
        p.split.whole = plan.whole;
        p.split.blocks = plan.blocks;
        p.split.streams = (int32_t)plan.streams;
        p.split.ticket = counters;
        p.split.ready = counters + 1;
        p.split.parts = (float *)((uint8_t *)counters + counters_bytes(&plan));
        const int64_t images = (BN - 1) / ((int64_t)ho * wo) + 2; /* that the columns of a tile may touch */
        const bool narrow = images * p.image < UINT32_MAX && 32 * (int64_t)ho * wo < UINT32_MAX;
        plan.form->kernels[narrow][plan.blocks < plan.whole]<<<
            (unsigned)(plan.blocks + plan.streams), (unsigned)plan.form->threads, 0, dev->stream>>>(p);
        CONV_TRY(dev, err, cudaGetLastError());
    }
    return LTN_OK;
}

const struct conv_algo conv_im2win = {LTN_CONV_IM2WIN, im2win_refuse, im2win_create, im2win_run, NULL};
