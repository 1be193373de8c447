/* step.cu's products with weights of 16 and 32 bits. A tile is a line of each of eight rows, and all warps
 * have their columns of them: bf16 is multiplied by the tensor cores, f16 and f32 by ordinary instructions.
 */
#ifndef LTN_CUDA_STEP_PLAIN_CUH
#define LTN_CUDA_STEP_PLAIN_CUH

#include "kernels/cuda/dot.cuh"
#include "kernels/cuda/step.cuh"

enum { LANES = 8 }; /* that share a row */

/* Columns of a piece, and of a warp in a tile. */
template <typename W> struct geometry {
    static constexpr int PIECE = 16 / sizeof(W), UNIT = LANES * PIECE, WARPS = team<W>::WARPS;
    static_assert(WARPS * LANES * 16 == LINE_BYTES, "a piece for every lane");
};

/* How many units of a row this warp has: number j is unit j WARPS + warp. */
template <typename W> static __device__ __forceinline__ int32_t units_of(int32_t cols)
{
    const int32_t n = (cols + geometry<W>::UNIT - 1) / geometry<W>::UNIT;
    return (n + team<W>::WARPS - 1 - (int32_t)threadIdx.x / 32) / team<W>::WARPS;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

static __device__ __forceinline__ void mma(float4 &c, uint4 a, uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

/* What a warp does for products. It alone reads and writes its units of the input. */
template <typename W> struct worker : crew<W> {
    using G = geometry<W>;
    using crew<W>::m, crew<W>::r, crew<W>::at, crew<W>::lane, crew<W>::warp, crew<W>::squares;
    static constexpr int WARPS = team<W>::WARPS;
    static constexpr bool PAIRED = paired<W>::value;
    static constexpr bool TENSOR = __is_same(W, __nv_bfloat16);
    using crew<W>::crew;

    /* The input is there. */
    __device__ __forceinline__ void ready()
    {
        __syncwarp();
        if (threadIdx.x == 0)
            *r.waiting = false;
    }

    __device__ __forceinline__ void release(uint32_t tile)
    {
        __syncwarp();
        if (lane == 0)
            barrier_arrive(&r.empty[tile]);
    }

    /* Columns c and c + 1 of this lane. */
    __device__ __forceinline__ int32_t column(int32_t unit) const
    {
        return (unit * WARPS + warp) * G::UNIT + 2 * lane;
    }

    __device__ __forceinline__ void put(int32_t unit, float a, float b)
    {
        const int32_t o = 2 * lane, first = (unit * WARPS + warp) * G::UNIT;
        if (TENSOR) { /* word i of piece t of a run, for group_by_tiles */
            uint32_t *in = reinterpret_cast<uint32_t *>(m.in) + first;
            const int32_t run = lane / 16, t = lane / 4 % 4, i = lane % 4;
            const int32_t place = i % 2 * 16 + t * 4 + i / 2;
            in[place + run * 2] = in[32 + place + (run ^ 1) * 2] = two_bf16(a, b);
        } else if (o < G::UNIT) {
            *reinterpret_cast<float2 *>(m.in + first + (PAIRED ? (o & 4) * 8 + o / 8 * 4 + o % 4 : o)) =
                make_float2(a, b);
        }
    }

    /* Before the input of a product: nothing. */
    __device__ __forceinline__ void prepare(const struct share &, bool)
    {
    }
    __device__ __forceinline__ void prepare_last(const struct share &)
    {
    }

    /* The input from words of activations; of columns without a word: 0. */
    __device__ __forceinline__ void gather(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        constexpr int N = 4, STRIDE = WARPS * G::UNIT;
        const int32_t n_units = units_of<W>(cols);
        squares = 0;
        for (int32_t unit = 0; unit < n_units; unit += N) {
            const int32_t c = column(unit);
            const int32_t n = 2 * lane < G::UNIT && c < cols ? (cols - c + STRIDE - 1) / STRIDE : 0;
            ulonglong2 v[N];
            uint64_t pair[N];
            const auto wanted = [&](int i) { return i < n; };
            if constexpr (PAIRED)
                await_all(
                    pair, [&](int i) { return words + (c + i * STRIDE) / 2; }, wanted, tag);
            else
                await_all(
                    v, [&](int i) { return words + c + i * STRIDE; }, wanted, tag);
#pragma unroll
            for (int i = 0; i < N; i++)
                if (unit + i < n_units) {
                    float2 f;
                    if constexpr (PAIRED)
                        f = values_of(pair[i]);
                    else
                        f = make_float2(value_of(v[i].x), value_of(v[i].y));
                    squares = fmaf(f.y, f.y, fmaf(f.x, f.x, squares));
                    put(unit + i, f.x, f.y);
                }
        }
        ready();
    }

    /* u * o, and the squares of o. */
    __device__ __forceinline__ void gather_gated(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        constexpr int N = 4, STRIDE = WARPS * G::UNIT;
        const int32_t n_units = units_of<W>(cols);
        squares = 0;
        for (int32_t unit = 0; unit < n_units; unit += N) {
            const int32_t c = column(unit);
            const int32_t n = 2 * lane < G::UNIT && c < cols ? (cols - c + STRIDE - 1) / STRIDE : 0;
            ulonglong2 v[N], v2[N];
            const auto wanted = [&](int i) { return i < n; };
            if constexpr (PAIRED) {
                await_all(
                    v, [&](int i) { return words + c + i * STRIDE; }, wanted, tag);
            } else {
                await_all(
                    v, [&](int i) { return words + 2 * (c + i * STRIDE); }, wanted, tag);
                await_all(
                    v2, [&](int i) { return words + 2 * (c + i * STRIDE) + 2; }, wanted, tag);
            }
#pragma unroll
            for (int i = 0; i < N; i++)
                if (unit + i < n_units) {
                    float2 a, b;
                    if constexpr (PAIRED) {
                        a = values_of(v[i].x), b = values_of(v[i].y);
                    } else {
                        a = make_float2(value_of(v[i].x), value_of(v[i].y));
                        b = make_float2(value_of(v2[i].x), value_of(v2[i].y));
                    }
                    squares = fmaf(b.x, b.x, fmaf(a.x, a.x, squares));
                    put(unit + i, a.x * a.y, b.x * b.y);
                }
        }
        ready();
    }

    /* From a row of the embedding. */
    __device__ __forceinline__ void gather_row(const struct embedding<W> &row, int32_t cols)
    {
        const int32_t n_units = units_of<W>(cols);
        squares = 0;
        for (int32_t unit = 0; unit < n_units; unit++) {
            const int32_t c = column(unit);
            float a = 0, b = 0;
            if (2 * lane < G::UNIT && c < cols)
                a = row(c), b = row(c + 1);
            squares = fmaf(b, b, fmaf(a, a, squares));
            put(unit, a, b);
        }
        ready();
    }

    /* This warp's sums of the rows of a group, by eights. The first group of a product adds up squares. */
    __device__ __forceinline__ void group_sums(float *to, int32_t eights, int32_t cols, bool two, bool begins)
    {
        if constexpr (TENSOR) {
            group_by_tiles(to, eights, cols, two, begins);
        } else {
            if (begins)
                squares = warp_sum(squares);
            group_by_pieces(to, eights, cols, two);
        }
    }

    /* A warp's part of a tile is eight rows by two runs of 32 columns. Lane 4 g + t has piece t of both runs
     * of line line_of(g), the second run first where g is odd, as rows lie in the same banks. A run is an
     * operand of the tensor cores as it lies: words 0 and 2 of a piece as row g, words 1 and 3 as row g + 8.
     * What they meet are columns 0 and 1 of the input if g is even, else 2 and 3: the same with its runs
     * exchanged. */
    struct part {
        uint4 p, q, x;
        uint32_t tile;
    };

    __device__ __forceinline__ void group_by_tiles(float *to, int32_t eights, int32_t cols, bool two,
                                                   bool begins)
    {
        constexpr int32_t STRIDE = WARPS * G::UNIT;
        const int32_t g = lane / 4, t = lane % 4, odd = g & 1, unit = warp * G::UNIT;
        const int32_t units = (cols + STRIDE - 1) / STRIDE;
        const uint4 none = make_uint4(0, 0, 0, 0);
        const uint32_t *in = reinterpret_cast<const uint32_t *>(m.in) + unit + lane % 16 * 4;
        const uint32_t first = r.tiles + line_at<W>(line_of(g)) + warp * 128 + t * 16;
        int32_t left = eights * units, units_left = units, from = 0;
        float4 c = make_float4(0, 0, 0, 0);
        const auto read = [&](struct part &v) {
            const uint32_t piece = first + at.tile * r.SLOT;
            v.x = *reinterpret_cast<const uint4 *>(in + from);
            barrier_wait(&r.full[at.tile], at.parity);
            v.p = load_shared(piece + odd * 64), v.q = load_shared(piece + (odd ^ 1) * 64);
            if (from + STRIDE > cols) { /* what lies beyond is of another tile */
                const int32_t within = cols - from - unit;
                v.x = within > 0 ? v.x : none;
                v.p = odd * 32 + t * 8 < within ? v.p : none;
                v.q = (odd ^ 1) * 32 + t * 8 < within ? v.q : none;
            }
            v.tile = at.tile;
            at.next();
            from += STRIDE;
            from = from < cols ? from : 0;
        };
        const auto multiply = [&](const struct part &v) {
            mma(c, v.p, v.x.x, v.x.y);
            mma(c, v.q, v.x.z, v.x.w);
            release(v.tile);
            if (--units_left == 0) {
                if (t == odd)
                    *to = c.x + c.w;
                to += LINES, units_left = units;
                c = make_float4(0, 0, 0, 0);
            }
        };
        struct part one, other; /* the next is read before one is multiplied */
        to += two ? g : line_of(g);
        read(one);
        if (begins)
            squares = warp_sum(squares);
        for (;;) {
            if (--left == 0) {
                multiply(one);
                break;
            }
            read(other);
            multiply(one);
            if (--left == 0) {
                multiply(other);
                break;
            }
            read(one);
            multiply(other);
        }
    }

    /* Lane 8 q + i has piece i of lines q and q + 4; at the end, line 4 (i % 2) + q of tile i / 2. */
    __device__ __forceinline__ void group_by_pieces(float *to, int32_t eights, int32_t cols, bool two)
    {
        float acc[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        const int32_t own = warp * G::UNIT + lane % LANES * G::PIECE;
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (e < eights) {
                const float *in = m.in + warp * G::UNIT + lane % LANES * 4;
                for (int32_t from = 0; from < cols; from += WARPS * G::UNIT) {
                    const uint32_t piece = r.tiles + at.tile * r.SLOT + line_at<W>(lane / LANES) +
                                           (warp * LANES + lane % LANES) * 16;
                    barrier_wait(&r.full[at.tile], at.parity);
                    if (from + own < cols) {
                        const uint4 w0 = load_shared(piece), w1 = load_shared(piece + line_at<W>(4));
                        const float4 lo = *reinterpret_cast<const float4 *>(in + from);
                        const float4 hi =
                            PAIRED ? *reinterpret_cast<const float4 *>(in + from + G::UNIT / 2) : lo;
                        acc[2 * e] = dot<W>::add(w0, lo, hi, acc[2 * e]);
                        acc[2 * e + 1] = dot<W>::add(w1, lo, hi, acc[2 * e + 1]);
                    }
                    release(at.tile);
                    at.next();
                }
            }
        float sum[4], half[2];
        const bool b4 = lane & 4, b2 = lane & 2, b1 = lane & 1;
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum[i] = (b4 ? acc[i + 4] : acc[i]) + __shfl_xor_sync(0xffffffffu, b4 ? acc[i] : acc[i + 4], 4);
#pragma unroll
        for (int i = 0; i < 2; i++)
            half[i] = (b2 ? sum[i + 2] : sum[i]) + __shfl_xor_sync(0xffffffffu, b2 ? sum[i] : sum[i + 2], 2);
        const int32_t i = lane % LANES, q = lane / LANES;
        to[two ? i / 2 * LINES + 2 * q + i % 2 : 4 * i + q] =
            (b1 ? half[1] : half[0]) + __shfl_xor_sync(0xffffffffu, b1 ? half[0] : half[1], 1);
    }

    template <typename F>
    __device__ __forceinline__ void product(const struct share &s, const struct source &from, F publish)
    {
        this->product_by(
            s,
            [&](float *to, int32_t rows, bool begins) {
                for (int32_t g = 0; g < rows; g += GROUP)
                    group_sums(to + g, (min(rows - g, (int32_t)GROUP) + LINES - 1) / LINES, s.cols, from.w2,
                               begins && g == 0);
            },
            [](int32_t) { return 1.0f; }, publish);
    }

    /* The head's. */
    __device__ __forceinline__ void gather_last(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        gather(words, cols, tag);
    }
    template <typename F>
    __device__ __forceinline__ void product_last(const struct share &s, const struct source &from, F publish)
    {
        product(s, from, publish);
    }
};

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

#endif
