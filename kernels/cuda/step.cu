/* One token through the whole network in one launch: the kernel of decoding a single stream.
 *
 * One block per SM stays for the whole token. Its rows of every matrix are known beforehand, and so is the
 * order in which it needs them: each thread keeps 2 PAIRS 16-byte pieces of weights on their way into its own
 * slots of shared memory, across layers, as far ahead as the slots go:
 *
 *   qkvu   [q k v u] = W Norm(x), q and k through the feature map
 *   mix    S <- S + k^T v - (1 - r) S, o = q S       (the state is fetched ahead)
 *   out    x += W_o (u * Norm(o))
 *   glu    h = (W_1 Norm(x)) * (W_2 Norm(x))
 *   l3     x += W_3 h
 *
 * What one block makes and others need travels in words of eight bytes: four of value, four of a tag that
 * names launch, layer and phase. A word is written and read whole, so a reader that sees the tag it waits for
 * has the value too: there is neither a barrier among blocks nor a fence, and waiting costs one way to the L2
 * cache and one back.
 *
 * A word is written again only when all have read it. Every block has a row of qkvu and a pair of h at least
 * (suits() asks for it), and publishes results of a product when all its warps have read its input. So
 * whoever has all o of a layer knows that every block is done with the layer before, as o is made of all of
 * qkvu; and whoever has all h knows that every block has finished mix and out and read x of out. Hence:
 * x of out is written with all o at hand, x of l3 with all h, and both had been read in qkvu and glu;
 * h with all x of out, made with all o, so h of the layer before had been read in l3;
 * qkvu, and what mix makes of them, with all x of l3, made with all h, so those before had been read.
 *
 * All warps work on all rows of a block: warp w has UNIT columns of every WARPS UNIT, and its input. A row is
 * eight lanes wide. Then the WARPS sums of a row are added. Every sum has an order that follows from the
 * number of columns alone. Norms are scalars beside the product. */
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
    const void *embed, *head;
    const int32_t *id;
    const int64_t *steps; /* NULL, or added to pos */
    int64_t pos;
    float *state;
    float *logits;
    struct words *words;
    int32_t max_input; /* floats */
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
#ifdef PROBE_NO_WAIT
    return false;
#endif
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

/* N words or pairs of words at from + i stride, for i < n, all under way together. */
template <int N>
static __device__ __forceinline__ void await_all(uint64_t (&v)[N], const uint64_t *from, int32_t stride,
                                                 int32_t n, uint32_t tag)
{
#pragma unroll
    for (int i = 0; i < N; i++)
        v[i] = i < n ? look(from + i * stride) : (uint64_t)tag << 32;
    bool again;
    do {
        again = false;
#pragma unroll
        for (int i = 0; i < N; i++)
            if (stale(v[i], tag)) {
                v[i] = look(from + i * stride);
                again = true;
            }
    } while (again);
}

template <int N>
static __device__ __forceinline__ void await_all(ulonglong2 (&v)[N], const uint64_t *from, int32_t stride,
                                                 int32_t n, uint32_t tag)
{
#pragma unroll
    for (int i = 0; i < N; i++)
        v[i] = i < n ? look2(from + i * stride) : make_ulonglong2((uint64_t)tag << 32, (uint64_t)tag << 32);
    bool again;
    do {
        again = false;
#pragma unroll
        for (int i = 0; i < N; i++)
            if (stale(v[i].x, tag) || stale(v[i].y, tag)) {
                v[i] = look2(from + i * stride);
                again = true;
            }
    } while (again);
}

/* ---- weights ------------------------------------------------------------------------------------------- */

/* A block's rows of one kind of product; of GLU the rows of two matrices alternate. */
struct share {
    int32_t first, n_dots, cols;
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
#ifdef PROBE_NO_WEIGHTS
    copy = false;
    if (threadIdx.x > 9999)
#endif
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
        for (int i = 0; i < PAIRS; i++)
            fetch();
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
        slot += 2 * THREADS * 16;
        if (slot == end)
            slot = begin;
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
    static constexpr bool PAIRED = sizeof(W) == 2; /* activations are bf16, two in a word */
    const struct room &m;
    struct feed<W> f;
    int32_t lane, warp, buffer;
    float squares; /* of this lane's columns of the input */

    __device__ __forceinline__ worker(const struct step_args &a, const struct room &room, uint32_t slots)
        : m(room), f(a, room.shares, slots)
    {
        lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        buffer = 0;
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
            await_all(v, words + c, STRIDE, n, tag);
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
                await_all(v, words + c / 2, STRIDE / 2, n, tag);
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
            if constexpr (PAIRED) {
                await_all(v, words + c, STRIDE, n, tag);
            } else {
                await_all(v, words + 2 * c, 2 * STRIDE, n, tag);
                await_all(v2, words + 2 * c + 2, 2 * STRIDE, n, tag);
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
    __device__ __forceinline__ void gather_row(const W *row, int32_t cols, float scale)
    {
        const int32_t n_units = units_of<W>(cols);
        squares = 0;
        for (int32_t unit = 0; unit < n_units; unit++) {
            const int32_t c = column(unit);
            float a = 0, b = 0;
            if (2 * lane < G::UNIT && c < cols)
                a = scale * to_f32(row[c]), b = scale * to_f32(row[c + 1]);
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
};

/* ---- the state ----------------------------------------------------------------------------------------- */

/* The state's part of a layer. Units of COLS columns of a head go round the blocks, then their halves. */
struct mixer {
    const struct step_args &a;
    const struct step_layer &l;
    int32_t d, per_head, n_units, row, col, per_unit;
    float4 held[HELD];
    float turns[HELD];

    __device__ __forceinline__ mixer(const struct step_args &args, const struct step_layer &layer)
        : a(args), l(layer)
    {
        d = l.theta ? 2 * a.head_dim : a.head_dim;
        per_head = a.head_dim / COLS;
        n_units = a.n_heads * per_head;
        row = threadIdx.x % HALF / 2;
        col = threadIdx.x % 2 * 4;
        per_unit = (d + ROWS - 1) / ROWS;
    }

    __device__ __forceinline__ int32_t unit(int32_t round) const
    {
        return (round * 2 + (int32_t)threadIdx.x / HALF) * (int32_t)gridDim.x + (int32_t)blockIdx.x;
    }

    __device__ __forceinline__ float4 *place(int32_t u, int32_t r) const
    {
        const int32_t head = u / per_head;
        float *S = a.state + l.state_offset + (int64_t)head * d * a.head_dim;
        return reinterpret_cast<float4 *>(S + (int64_t)r * a.head_dim + u % per_head * COLS + col);
    }

    __device__ __forceinline__ int32_t feature(int32_t u, int32_t r) const
    {
        return u / per_head * a.head_dim + (r < a.head_dim ? r : r - a.head_dim);
    }

    __device__ __forceinline__ float turn(int32_t u, int32_t r, double pos) const
    {
        return l.theta ? lrpe_turn(l.theta[feature(u, r)], pos, r >= a.head_dim) : 1;
    }

    __device__ __forceinline__ void fetch(double pos)
    {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int32_t u = unit(i / per_unit), r = row + i % per_unit * ROWS;
            if (u < n_units && r < d) {
                held[i] = __ldcg(place(u, r));
                turns[i] = turn(u, r, pos);
            }
        }
    }

    template <typename W> __device__ __forceinline__ void run(const struct room &m, double pos, uint32_t tag)
    {
        const int lane = threadIdx.x % 32, half = threadIdx.x / HALF, warp = threadIdx.x % HALF / 32;
        const int32_t H = a.H;
        const uint64_t *q = a.words->qkvu;
        for (int32_t round = 0; round * (int32_t)gridDim.x * 2 < n_units; round++) {
            const int32_t u = unit(round), c = u * COLS, i = threadIdx.x % HALF;
            const bool writes = i < COLS && u < n_units;
            float up = 0;
            float4 sum = make_float4(0, 0, 0, 0);
            if (u < n_units) {
                const float fade = -expm1f(-l.slopes[u / per_head]);
                const uint64_t *v_at = q + 2 * H + c + col, *up_at = q + 3 * H + c + i;
                ulonglong2 v0 = look2(v_at), v1 = look2(v_at + 2);
                uint64_t up_word = writes ? look(up_at) : 0;
                for (int32_t k = 0; k < per_unit; k++) {
                    const int32_t r = row + k * ROWS, held_at = round * per_unit + k;
                    if (r >= d)
                        break;
                    const uint64_t *q_at = q + feature(u, r), *k_at = q_at + H;
                    uint64_t q_word = look(q_at), k_word = look(k_at);
                    float4 *S = place(u, r), s;
                    float turned;
                    if (held_at < HELD) {
                        static_assert(HELD == 4, "all are named");
                        s = held_at == 0   ? held[0]
                            : held_at == 1 ? held[1]
                            : held_at == 2 ? held[2]
                                           : held[3];
                        turned = held_at == 0   ? turns[0]
                                 : held_at == 1 ? turns[1]
                                 : held_at == 2 ? turns[2]
                                                : turns[3];
                    } else {
                        s = __ldcg(S);
                        turned = turn(u, r, pos);
                    }
                    while (stale(v0.x, tag + TAG_QKVU) || stale(v0.y, tag + TAG_QKVU))
                        v0 = look2(v_at);
                    while (stale(v1.x, tag + TAG_QKVU) || stale(v1.y, tag + TAG_QKVU))
                        v1 = look2(v_at + 2);
                    const float qr = value_of(await(q_at, q_word, tag + TAG_QKVU)) * turned;
                    const float kr = value_of(await(k_at, k_word, tag + TAG_QKVU)) * turned;
                    s.x += kr * value_of(v0.x) - fade * s.x, s.y += kr * value_of(v0.y) - fade * s.y;
                    s.z += kr * value_of(v1.x) - fade * s.z, s.w += kr * value_of(v1.y) - fade * s.w;
                    __stcg(S, s);
                    sum.x += qr * s.x, sum.y += qr * s.y, sum.z += qr * s.z, sum.w += qr * s.w;
                }
                if (writes)
                    up = value_of(await(up_at, up_word, tag + TAG_QKVU));
            }
            /* Over the 16 lanes of a column; lane bits 4 and 3 say which of the four. */
            const bool b16 = lane & 16, b8 = lane & 8;
            const float s0 = (b16 ? sum.z : sum.x) + __shfl_xor_sync(0xffffffffu, b16 ? sum.x : sum.z, 16);
            const float s1 = (b16 ? sum.w : sum.y) + __shfl_xor_sync(0xffffffffu, b16 ? sum.y : sum.w, 16);
            float s = (b8 ? s1 : s0) + __shfl_xor_sync(0xffffffffu, b8 ? s0 : s1, 8);
            s += __shfl_xor_sync(0xffffffffu, s, 4);
            s += __shfl_xor_sync(0xffffffffu, s, 2);
            if ((lane & 6) == 0)
                m.mix[(half * (WARPS / 2) + warp) * COLS + col + lane / 8] = s;
            meet();
            if (writes) {
                float total = 0;
                for (int w = 0; w < WARPS / 2; w++)
                    total += m.mix[(half * (WARPS / 2) + w) * COLS + i];
                if (sizeof(W) == 2) {
                    tell(a.words->gated + c + i, two_bf16(total, up), tag + TAG_MIX);
                } else {
                    tell(a.words->gated + 2 * (c + i), __float_as_uint(total), tag + TAG_MIX);
                    tell(a.words->gated + 2 * (c + i) + 1, __float_as_uint(up), tag + TAG_MIX);
                }
            }
            if ((round + 1) * (int32_t)gridDim.x * 2 < n_units)
                meet();
        }
    }
};

/* ---- the kernel ---------------------------------------------------------------------------------------- */

/* Tags begin again long before they could overflow, with all words cleared by the last block to leave. */
static __device__ void leave(struct words *words, uint32_t tag)
{
    if (tag < UINT32_MAX - 2 * N_TAGS * MAX_LAYERS) {
        if (blockIdx.x == 0 && threadIdx.x == 0)
            words->epoch = tag; /* all blocks have read the old one: this block has values from all */
        return;
    }
    if (threadIdx.x || atomicAdd(&words->left, 1) < gridDim.x - 1)
        return;
    for (uint32_t i = 0; i < sizeof *words / 16; i++)
        reinterpret_cast<uint4 *>(words)[i] = make_uint4(0, 0, 0, 0);
}

template <typename W>
static __global__ void __launch_bounds__(THREADS, 1) step_kernel(const __grid_constant__ struct step_args a)
{
    extern __shared__ uint4 shared[];
    struct room m;
    m.in = reinterpret_cast<float *>(shared + PAIRS * 2 * THREADS);
    m.parts = m.in + a.max_input;
    m.mix = m.parts + 2 * GROUPS * WARPS * GROUP;
    m.red = m.mix + WARPS * COLS;
    m.shares = reinterpret_cast<struct share *>(m.red + 2 * WARPS);
    if (threadIdx.x <= HEAD)
        m.shares[threadIdx.x] = share_of(a, threadIdx.x);
    __syncthreads();

    struct words &words = *a.words;
    uint32_t tag = __ldcg(&words.epoch);
    const double pos = (double)(a.pos + (a.steps ? __ldcg(a.steps) : 0));
    const W *token = (const W *)a.embed + (int64_t)__ldcg(a.id) * a.D;
    struct worker<W> w(a, m, (uint32_t)__cvta_generic_to_shared(shared + threadIdx.x));
    float own = 0; /* of the residual stream: the row that this thread publishes in out and l3 */
    if ((int32_t)threadIdx.x < m.shares[OUT].n_dots)
        own = a.embed_scale * to_f32(token[m.shares[OUT].first + threadIdx.x]);

    for (int32_t l = 0; l < a.n_layers; l++, tag += N_TAGS) {
        const struct step_layer &layer = a.layers[l];
        struct mixer mix(a, layer);
        mix.fetch(pos);

        struct share s = m.shares[QKVU];
        if (l == 0)
            w.gather_row(token, s.cols, a.embed_scale);
        else
            w.gather(words.x, s.cols, tag); /* l3 of the layer before */
        w.product(s, [&](int32_t i, float sum, float scale) {
            if (i < s.n_dots) {
                sum *= scale;
                if (s.first + i < 2 * a.H)
                    sum = activate(sum, a.act);
                tell(words.qkvu + s.first + i, __float_as_uint(sum), tag + TAG_QKVU);
            }
        });
        mix.template run<W>(m, pos, tag);

        s = m.shares[OUT];
        if (s.n_dots) {
            w.gather_gated(words.gated, s.cols, tag + TAG_MIX);
            w.product(s, [&](int32_t i, float sum, float scale) {
                if (i < s.n_dots) {
                    own += sum * scale;
                    tell(words.x + s.first + i, __float_as_uint(own), tag + TAG_OUT);
                }
            });
        }

        s = m.shares[GLU];
        w.gather(words.x, s.cols, tag + TAG_OUT);
        w.product(s, [&](int32_t i, float sum, float scale) {
            sum *= scale;
            const float h = sum * __shfl_xor_sync(0xffffffffu, sum, 1);
            const float h2 = __shfl_xor_sync(0xffffffffu, h, 2);
            uint64_t *to = words.h + (s.first + i / 2) / (sizeof(W) == 2 ? 2 : 1);
            if (i < s.n_dots && sizeof(W) == 2 && i % 4 == 0)
                tell(to, two_bf16(h, h2), tag + TAG_GLU);
            if (i < s.n_dots && sizeof(W) == 4 && i % 2 == 0)
                tell(to, __float_as_uint(h), tag + TAG_GLU);
        });

        s = m.shares[L3];
        if (s.n_dots) {
            w.gather_act(words.h, s.cols, tag + TAG_GLU);
            w.product(s, [&](int32_t i, float sum, float) {
                if (i < s.n_dots) {
                    own += sum;
                    tell(words.x + s.first + i, __float_as_uint(own), tag + TAG_L3);
                }
            });
        }
    }
    const struct share s = m.shares[HEAD];
    w.gather(words.x, s.cols, tag);
    w.product(s, [&](int32_t i, float sum, float scale) {
        if (i < s.n_dots)
            a.logits[s.first + i] = sum * scale;
    });
    leave(a.words, tag);
}

/* ---- host ------------------------------------------------------------------------------------------------
 */

static int32_t max32(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

/* The released shapes and their kin: one gate in qkvu, SimpleRMSNorm, no biases, sizes in whole pieces, and a
 * row of qkvu and a pair of h at least for every block. */
static bool suits(const struct cuda_backend *be, const struct ltn_network *net, size_t *shared,
                  struct step_args *a)
{
    if (ltn_is_quantised(net->embed.dtype))
        return false;
    const int32_t n = 16 / (int32_t)ltn_dtype_size(net->embed.dtype);
    const struct ltn_attention *first = &net->layers[0].attention;
    if (!be->step_words || net->gate_dim || net->n_layers > MAX_LAYERS || net->final_norm.weight ||
        net->act == LTN_ACT_EXP || first->head_dim % COLS || net->embed_dim % n || net->hidden_dim % n ||
        net->glu_dim % n || net->head.dtype != net->embed.dtype || !aligned16(net->head.data))
        return false;
    if (net->embed_dim > MAX_DIM || net->hidden_dim > MAX_DIM || net->glu_dim > MAX_GLU ||
        4 * net->hidden_dim < be->n_sms || net->glu_dim / 2 < be->n_sms || net->embed_dim > PASS * be->n_sms)
        return false;
    for (int32_t l = 0; l < net->n_layers; l++) {
        const struct ltn_layer *y = &net->layers[l];
        const struct ltn_linear *all[] = {&y->qkv, &y->out, &y->l1, &y->l2, &y->l3};
        for (const struct ltn_linear *linear : all)
            if (linear->bias || linear->w.dtype != net->embed.dtype || !aligned16(linear->w.data))
                return false;
        if (y->token_norm.weight || y->attn_norm.weight || y->channel_norm.weight ||
            y->attention.state_offset % 4)
            return false;
    }
    a->max_input = max32(net->embed_dim, max32(net->hidden_dim, net->glu_dim));
    a->max_input = (a->max_input + PAD - 1) / PAD * PAD;
    *shared = (size_t)PAIRS * 2 * THREADS * 16 + sizeof(struct share) * (HEAD + 1) +
              ((size_t)a->max_input + 2 * GROUPS * WARPS * GROUP + WARPS * COLS + 2 * WARPS) * sizeof(float);
    return *shared <= be->max_shared;
}

template <typename W>
static enum ltn_status run(struct cuda_backend *be, const struct step_args &a, size_t shared,
                           struct ltn_error *err)
{
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(be->n_sms);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared;
    config.stream = be->stream;
    config.attrs = &together;
    config.numAttrs = 1;
    CUDA_TRY(be, err, (cudaLaunchKernelEx(&config, step_kernel<W>, a)));
    return LTN_OK;
}

enum ltn_status cuda_step(struct ltn_backend *base, const struct ltn_network *net, const struct ltn_seq *seq,
                          const int32_t *id, float *logits, float *, void *, void *, void *,
                          struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    struct step_args a;
    size_t shared;

    if (!suits(be, net, &shared, &a))
        return LTN_ERR_UNSUPPORTED;
    a.V = net->vocab_size, a.D = net->embed_dim, a.H = net->hidden_dim, a.G = net->glu_dim;
    a.n_heads = net->layers[0].attention.n_heads;
    a.head_dim = net->layers[0].attention.head_dim;
    a.n_layers = net->n_layers;
    a.act = net->act;
    a.embed_scale = net->embed_scale;
    a.embed = net->embed.data, a.head = net->head.data;
    a.id = id;
    a.steps = be->steps;
    a.pos = seq->pos;
    a.state = seq->state;
    a.logits = logits;
    a.words = static_cast<struct words *>(be->step_words);
    for (int32_t l = 0; l < net->n_layers; l++) {
        const struct ltn_layer *y = &net->layers[l];
        a.layers[l] = {
            y->qkv.w.data, y->out.w.data,       y->l1.w.data,       y->l2.w.data,
            y->l3.w.data,  y->attention.slopes, y->attention.theta, (int64_t)y->attention.state_offset};
    }
#define RUN(W, A) run<W>(be, a, shared, err)
    return FOR_TYPES(be, err, net->embed.dtype, RUN);
#undef RUN
}

template <typename W> static enum ltn_status allow_shared(struct cuda_backend *be, struct ltn_error *err)
{
    CUDA_TRY(be, err,
             cudaFuncSetAttribute(step_kernel<W>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)be->max_shared));
    return LTN_OK;
}

enum ltn_status step_open(struct cuda_backend *be, struct ltn_error *err)
{
    int together = 0;
    CUDA_TRY(be, err, cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, be->device));
    if (!together)
        return LTN_OK;
    LTN_TRY(allow_shared<float>(be, err));
    LTN_TRY(allow_shared<__nv_bfloat16>(be, err));
    LTN_TRY(allow_shared<__half>(be, err));
    CUDA_TRY(be, err, cudaMalloc(&be->step_words, sizeof(struct words)));
    CUDA_TRY(be, err, cudaMemsetAsync(be->step_words, 0, sizeof(struct words), be->stream));
    return LTN_OK;
}
