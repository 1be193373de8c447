/* What step.cu is made of: its sizes, the words between blocks, a block's share of the weights, and products.
 */
#ifndef LTN_CUDA_STEP_CUH
#define LTN_CUDA_STEP_CUH

#include "kernels/cuda/dot.cuh"

enum {
    WARPS = 16,
    THREADS = 32 * WARPS,
    PAIRS = 10, /* pairs of pieces of weights that a thread has on their way */
    LANES = 8,  /* that share a row */
    GROUP = 32, /* rows whose sums a warp holds at once: eight a lane */
    GROUPS = 4, /* whose sums are in shared memory at once */
    PASS = GROUP * GROUPS,
    MAX_LAYERS = 64,
    MAX_DIM = 8192, /* D and H */
    MAX_GLU = 16384,
    COLS = 8, /* columns of a head's state that half a block works on */
    HALF = THREADS / 2,
    ROWS = HALF / 2,         /* rows of the state at once: two threads hold COLS columns */
    HELD = 4,                /* pieces of the state that a thread fetches ahead */
    PAD = WARPS * LANES * 8, /* columns that all warps have at once, at most */
};

enum phase { QKVU, OUT, GLU, L3, HEAD, N_PHASES = HEAD }; /* products of a layer; HEAD follows the last */
enum { TAG_QKVU = 1, TAG_MIX, TAG_OUT, TAG_GLU, TAG_L3, N_TAGS = TAG_L3 };

struct step_layer {
    const void *qkvu, *out, *l1, *l2, *l3;
    const void *scales[5]; /* theirs, of quantised weights */
    const float *slopes, *theta;
    int64_t state_offset;
};

/* Between blocks; be->step_words. Activations are f32, or with 16-bit weights two bf16 in a word. */
struct words {
    uint32_t epoch; /* the last tag that was used */
    uint32_t left;  /* blocks that have left a launch after which tags begin again; else 0 */
    uint32_t unused[30];
    uint64_t x[MAX_DIM];         /* f32 */
    uint64_t qkvu[4 * MAX_DIM];  /* f32 */
    uint64_t gated[2 * MAX_DIM]; /* o and u, side by side */
    uint64_t h[MAX_GLU];         /* activations */
};

struct step_args {
    int32_t V, D, H, G, n_heads, head_dim, n_layers;
    enum ltn_act act;
    float embed_scale;
    const void *embed, *head, *embed_scales, *head_scales;
    const int32_t *id;
    const int64_t *steps; /* NULL, or added to pos */
    int64_t pos;
    float *state;
    float *logits;
    struct words *words;
    int32_t max_input;           /* floats */
    int32_t coming, coming_idle; /* of a quantised feed: units on their way, at most */
    struct step_layer layers[MAX_LAYERS];
};

/* All threads of the block that take part in products. */
static __device__ __forceinline__ void meet()
{
    asm volatile("bar.sync 1, %0;" ::"n"((int)THREADS) : "memory");
}

/* ---- words --------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint64_t look(const uint64_t *p)
{
    uint64_t v;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

static __device__ __forceinline__ ulonglong2 look2(const uint64_t *p)
{
    ulonglong2 v;
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory");
    return v;
}

static __device__ __forceinline__ void tell(uint64_t *p, uint32_t value, uint32_t tag)
{
    const uint64_t v = (uint64_t)tag << 32 | value;
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

static __device__ __forceinline__ bool stale(uint64_t word, uint32_t tag)
{
    return (uint32_t)(word >> 32) != tag;
}

static __device__ __forceinline__ float value_of(uint64_t word)
{
    return __uint_as_float((uint32_t)word);
}

/* Two bf16 in a word. */
static __device__ __forceinline__ float2 values_of(uint64_t word)
{
    return make_float2(__uint_as_float((uint32_t)word << 16), __uint_as_float((uint32_t)word & 0xffff0000u));
}

static __device__ __forceinline__ uint32_t two_bf16(float a, float b)
{
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t *>(&v);
}

static __device__ __forceinline__ uint64_t await(const uint64_t *p, uint64_t word, uint32_t tag)
{
    while (stale(word, tag))
        word = look(p);
    return word;
}

/* What a thread does not wait for. */
static __device__ __forceinline__ uint64_t there(uint64_t, uint32_t tag)
{
    return (uint64_t)tag << 32;
}
static __device__ __forceinline__ ulonglong2 there(ulonglong2, uint32_t tag)
{
    return make_ulonglong2((uint64_t)tag << 32, (uint64_t)tag << 32);
}
static __device__ __forceinline__ void look_at(uint64_t &v, const uint64_t *p)
{
    v = look(p);
}
static __device__ __forceinline__ void look_at(ulonglong2 &v, const uint64_t *p)
{
    v = look2(p);
}
static __device__ __forceinline__ bool stale(ulonglong2 v, uint32_t tag)
{
    return stale(v.x, tag) || stale(v.y, tag);
}

/* N words or pairs of words from place(i), where wanted(i), all under way together; by whole warps, which
 * call who.idle() beside waiting. */
template <typename V, int N, typename P, typename I, typename W>
static __device__ __forceinline__ void await_all(V (&v)[N], P place, I wanted, uint32_t tag, W &who)
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        v[i] = there(v[i], tag);
        if (wanted(i))
            look_at(v[i], place(i));
    }
    for (;;) {
        bool again = false;
#pragma unroll
        for (int i = 0; i < N; i++)
            if (stale(v[i], tag)) {
                look_at(v[i], place(i));
                again = true;
            }
        if (!__any_sync(0xffffffffu, again))
            break;
        who.idle();
    }
}

/* ---- weights ------------------------------------------------------------------------------------------- */

/* A block's rows of one kind of product; of GLU the rows of two matrices alternate. */
struct share {
    int32_t first, n_dots, cols;
};

/* Whether activations are bf16, two in a word. */
template <typename W> struct paired {
    static constexpr bool value = sizeof(W) == 2;
};

/* The embedding of the token, column by column. */
template <typename W> struct embedding {
    const W *row;
    float scale;

    __device__ embedding(const struct step_args &a)
    {
        row = (const W *)a.embed + (int64_t)__ldcg(a.id) * a.D;
        scale = a.embed_scale;
    }
    __device__ float operator()(int32_t c) const
    {
        return scale * to_f32(row[c]);
    }
};

/* Shared memory for weights on their way. */
template <typename W> struct ring {
    static constexpr int BYTES = PAIRS * 2 * THREADS * 16;
};

/* Columns of a piece, and of a warp at a time. */
template <typename W> struct geometry {
    static constexpr int PIECE = 16 / sizeof(W), UNIT = LANES * PIECE;
};

/* How many units of a row this warp has: number j is unit j WARPS + warp. */
template <typename W> static __device__ __forceinline__ int32_t units_of(int32_t cols)
{
    const int32_t n = (cols + geometry<W>::UNIT - 1) / geometry<W>::UNIT;
    return (n + WARPS - 1 - (int32_t)threadIdx.x / 32) / WARPS;
}

static __device__ struct share share_of(const struct step_args &a, int phase)
{
    const uint32_t outs = phase == QKVU ? 4 * a.H : phase == GLU ? a.G / 2 : phase == HEAD ? a.V : a.D;
    const uint32_t from = (uint64_t)outs * blockIdx.x / gridDim.x;
    const uint32_t to = (uint64_t)outs * (blockIdx.x + 1) / gridDim.x;
    struct share s;
    s.first = phase == GLU ? 2 * from : from; /* h travels in pairs */
    s.n_dots = phase == GLU ? 4 * (to - from) : to - from;
    s.cols = phase == OUT ? a.H : phase == L3 ? a.G : a.D;
    return s;
}

/* 16 bytes into shared memory, or zeros. */
static __device__ __forceinline__ void copy_or_zero(uint32_t shared, const void *global, bool copy)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(copy ? 16 : 0)
                 : "memory");
}

static __device__ __forceinline__ uint4 load_shared(uint32_t shared)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared)
                 : "memory");
    return v;
}

/* The weights of this thread in the order of their use: by products, groups of rows, units and rows. */
template <typename W> struct feed {
    using G = geometry<W>;
    const struct step_args &a;
    const struct share *shares;  /* [HEAD + 1] */
    const uint8_t *group, *from; /* this lane's first row of the group; its next piece */
    uint32_t slot, begin, end;   /* shared memory: the next pair of pieces; all of this thread's */
    uint32_t row_step;           /* bytes from a row to the next one */
    int32_t at, last;            /* products */
    int32_t of_group, left;      /* rows from this lane's on, in the group and now; 0: nothing to fetch */
    int32_t dots, pairs;         /* to do: rows of the block from this group on; pairs of rows of this unit */
    int32_t unit, n_units, cols;

    __device__ __forceinline__ feed(const struct step_args &args, const struct share *all, uint32_t slots)
        : a(args), shares(all)
    {
        slot = begin = slots;
        end = begin + PAIRS * 2 * THREADS * 16;
        at = 0, last = N_PHASES * a.n_layers;
        enter();
        for (int i = 0; i < PAIRS; i++) {
            fetch();
            advance();
        }
    }

    __device__ __forceinline__ void advance()
    {
        slot += 2 * THREADS * 16;
        if (slot == end)
            slot = begin;
    }

    __device__ __forceinline__ void start_unit()
    {
        const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int32_t c = (unit * WARPS + warp) * G::UNIT + lane % LANES * G::PIECE;
        from = group + unit * (WARPS * G::UNIT * (int)sizeof(W));
        left = c < cols ? of_group : 0;
        pairs = (min(dots, (int32_t)GROUP) + 7) / 8;
    }

    __device__ __forceinline__ void enter()
    {
        for (; at <= last; at++) {
            const int phase = at == last ? HEAD : at % N_PHASES;
            dots = shares[phase].n_dots, cols = shares[phase].cols, n_units = units_of<W>(cols);
            if (dots == 0 || n_units == 0)
                continue;
            const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / LANES;
            const struct step_layer &l = a.layers[at / N_PHASES % MAX_LAYERS];
            const bool two = phase == GLU;
            const void *w = phase == HEAD   ? a.head
                            : phase == QKVU ? l.qkvu
                            : phase == OUT  ? l.out
                            : phase == L3   ? l.l3
                            : row & 1       ? l.l2
                                            : l.l1;
            const int64_t first = shares[phase].first + (two ? row / 2 : row);
            group = (const uint8_t *)w +
                    (first * cols + warp * G::UNIT + lane % LANES * G::PIECE) * (int64_t)sizeof(W);
            row_step = (two ? 2 : 4) * cols * (uint32_t)sizeof(W);
            of_group = dots - row;
            unit = 0;
            start_unit();
            return;
        }
    }

    /* The next pair of pieces, into the slots that are free. */
    __device__ __forceinline__ void fetch()
    {
        if (at <= last) {
            copy_or_zero(slot, from, left > 0);
            copy_or_zero(slot + THREADS * 16, from + row_step, left > 4);
            from += 2 * row_step;
            left -= 8;
            if (--pairs == 0) {
                if (++unit == n_units) {
                    unit = 0;
                    group += (uint64_t)(GROUP / 4) * row_step;
                    of_group -= GROUP;
                    dots -= GROUP;
                }
                if (dots > 0) {
                    start_unit();
                } else {
                    at++;
                    enter();
                }
            }
        }
        end_copy_group();
    }

    /* The oldest pair. Its slots are filled again. */
    __device__ __forceinline__ void next(uint4 (&v)[2])
    {
        wait_copy_groups<PAIRS - 1>();
        v[0] = load_shared(slot), v[1] = load_shared(slot + THREADS * 16);
        fetch();
        advance();
    }
};

/* ---- products ------------------------------------------------------------------------------------------ */

/* Shared memory beside the slots. */
struct room {
    float *in;    /* [max_input] by units; of 16-bit weights the first fours of all pieces, then the others */
    float *parts; /* [2][GROUPS][WARPS][GROUP] the warps' sums */
    float *red;   /* [2][WARPS] sums of squares */
    float *mix;   /* [2][WARPS / 2][COLS] */
    struct share *shares; /* [HEAD + 1] */
};

static __device__ __forceinline__ float tree16(const float *v, int stride)
{
    static_assert(WARPS == 16, "four levels");
    float s[4];
#pragma unroll
    for (int i = 0; i < 4; i++, v += 4 * stride)
        s[i] = (v[0] + v[stride]) + (v[2 * stride] + v[3 * stride]);
    return (s[0] + s[1]) + (s[2] + s[3]);
}

/* What a warp does for products. It alone reads and writes its units of the input. */
template <typename W> struct worker {
    using G = geometry<W>;
    static constexpr bool PAIRED = paired<W>::value;
    const struct room &m;
    struct feed<W> f;
    int32_t lane, warp, buffer;
    float squares; /* of this lane's columns of the input */

    __device__ __forceinline__ worker(const struct step_args &a, const struct room &room, uint4 *ring)
        : m(room), f(a, room.shares, (uint32_t)__cvta_generic_to_shared(ring + threadIdx.x))
    {
        lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        buffer = 0;
    }

    __device__ __forceinline__ void idle()
    {
    }

    /* Columns c and c + 1 of this lane. */
    __device__ __forceinline__ int32_t column(int32_t unit) const
    {
        return (unit * WARPS + warp) * G::UNIT + 2 * lane;
    }

    __device__ __forceinline__ void put(int32_t unit, float a, float b)
    {
        const int32_t o = 2 * lane, first = (unit * WARPS + warp) * G::UNIT;
        if (o < G::UNIT)
            *reinterpret_cast<float2 *>(m.in + first + (PAIRED ? (o & 4) * 8 + o / 8 * 4 + o % 4 : o)) =
                make_float2(a, b);
    }

    /* The input from words; of columns without a word: 0. */
    __device__ __forceinline__ void gather(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        constexpr int N = 4, STRIDE = WARPS * G::UNIT;
        const int32_t n_units = units_of<W>(cols);
        squares = 0;
        for (int32_t unit = 0; unit < n_units; unit += N) {
            ulonglong2 v[N];
            const int32_t c = column(unit);
            const int32_t n = 2 * lane < G::UNIT && c < cols ? (cols - c + STRIDE - 1) / STRIDE : 0;
            await_all(
                v, [&](int i) { return words + c + i * STRIDE; }, [&](int i) { return i < n; }, tag, *this);
#pragma unroll
            for (int i = 0; i < N; i++)
                if (unit + i < n_units) {
                    const float a = value_of(v[i].x), b = value_of(v[i].y);
                    squares = fmaf(b, b, fmaf(a, a, squares));
                    put(unit + i, a, b);
                }
        }
        __syncwarp();
    }

    /* The same from activations. */
    __device__ __forceinline__ void gather_act(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        if constexpr (!PAIRED) {
            gather(words, cols, tag);
        } else {
            constexpr int N = 4, STRIDE = WARPS * G::UNIT;
            const int32_t n_units = units_of<W>(cols);
            for (int32_t unit = 0; unit < n_units; unit += N) {
                uint64_t v[N];
                const int32_t c = column(unit), n = c < cols ? (cols - c + STRIDE - 1) / STRIDE : 0;
                await_all(
                    v, [&](int i) { return words + (c + i * STRIDE) / 2; }, [&](int i) { return i < n; }, tag,
                    *this);
#pragma unroll
                for (int i = 0; i < N; i++)
                    if (unit + i < n_units) {
                        const float2 f = values_of(v[i]);
                        put(unit + i, f.x, f.y);
                    }
            }
            __syncwarp();
        }
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
                    v, [&](int i) { return words + c + i * STRIDE; }, wanted, tag, *this);
            } else {
                await_all(
                    v, [&](int i) { return words + 2 * (c + i * STRIDE); }, wanted, tag, *this);
                await_all(
                    v2, [&](int i) { return words + 2 * (c + i * STRIDE) + 2; }, wanted, tag, *this);
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
        __syncwarp();
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
        __syncwarp();
    }

    /* This warp's sums of the rows of a group: lane 8 q + i has row 4 i + q. */
    __device__ __forceinline__ float group_sums(int32_t pairs, int32_t n_units)
    {
        float acc[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int32_t unit = 0; unit < n_units; unit++) {
            const float *in = m.in + (unit * WARPS + warp) * G::UNIT + lane % LANES * 4;
            const float4 lo = *reinterpret_cast<const float4 *>(in);
            const float4 hi = PAIRED ? *reinterpret_cast<const float4 *>(in + G::UNIT / 2) : lo;
#pragma unroll
            for (int r = 0; r < 4; r++)
                if (r < pairs) {
                    uint4 w[2];
                    f.next(w);
                    acc[2 * r] = dot<W>::add(w[0], lo, hi, acc[2 * r]);
                    acc[2 * r + 1] = dot<W>::add(w[1], lo, hi, acc[2 * r + 1]);
                }
        }
        float sum[4], two[2];
        const bool b4 = lane & 4, b2 = lane & 2, b1 = lane & 1;
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum[i] = (b4 ? acc[i + 4] : acc[i]) + __shfl_xor_sync(0xffffffffu, b4 ? acc[i] : acc[i + 4], 4);
#pragma unroll
        for (int i = 0; i < 2; i++)
            two[i] = (b2 ? sum[i + 2] : sum[i]) + __shfl_xor_sync(0xffffffffu, b2 ? sum[i] : sum[i + 2], 2);
        return (b1 ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, b1 ? two[0] : two[1], 1);
    }

    /* All rows of the block times the input. publish(row, sum, 1 / rms) is called by whole warps, a lane a
     * row; the last ones may lie beyond the block's. */
    template <typename F> __device__ __forceinline__ void product(const struct share &s, F publish)
    {
        const int32_t n_units = units_of<W>(s.cols);
        const float square = warp_sum(squares);
        for (int32_t from = 0; from < s.n_dots; from += PASS) {
            float *parts = m.parts + buffer * GROUPS * WARPS * GROUP, *red = m.red + buffer * WARPS;
            const int32_t n = min(s.n_dots - from, (int32_t)PASS);
            for (int32_t g = 0; g * GROUP < n; g++)
                parts[(g * WARPS + warp) * GROUP + lane % LANES * 4 + lane / LANES] =
                    group_sums((min(n - g * GROUP, (int32_t)GROUP) + 7) / 8, n_units);
            if (lane == 0)
                red[warp] = square;
            meet();
            if (warp * GROUP < n) {
                const float sum = tree16(parts + warp * WARPS * GROUP + lane, GROUP);
                publish(from + warp * GROUP + lane, sum, rsqrtf(tree16(red, 1) / s.cols + 1e-6f));
            }
            buffer ^= 1;
        }
    }

    /* The head's. */
    __device__ __forceinline__ void gather_last(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        gather(words, cols, tag);
    }
    template <typename F> __device__ __forceinline__ void product_last(const struct share &s, F publish)
    {
        product(s, publish);
    }
};

#endif
