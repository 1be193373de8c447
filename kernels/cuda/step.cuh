/* What step.cu is made of whatever the weights are: its sizes, the words between blocks, a block's share of
 * the weights and the warp that streams them, and how products are cut. What a warp multiplies, and how, is
 * in step_plain.cuh and step_quant.cuh. */
#ifndef LTN_CUDA_STEP_CUH
#define LTN_CUDA_STEP_CUH

#include "kernels/cuda/dot.cuh"
#include "kernels/cuda/hopper.cuh"

enum {
    STREAMER = 32, /* threads of the warp that streams weights */
    GROUP = 32,    /* rows whose sums go together */
    GROUPS = 4,    /* whose sums are in shared memory at once */
    PASS = GROUP * GROUPS,
    MAX_LAYERS = 64,
    MAX_DIM = 8192, /* D and H */
    MAX_GLU = 16384,
    COLS = 8, /* columns of a head's state that half a block works on */
};

enum phase { QKVU, OUT, GLU, L3, HEAD, N_PHASES = HEAD }; /* products of a layer; HEAD follows the last */
enum { TAG_QKVU = 1, TAG_MIX, TAG_OUT, TAG_GLU, TAG_L3, N_TAGS = TAG_L3 };

/* The warps of a block that take part in products, by the type of the weights. */
template <typename W> struct team {
    static constexpr int WARPS = 16;
};
template <typename W> struct shape : team<W> {
    static constexpr int WARPS = team<W>::WARPS, THREADS = 32 * WARPS, HALF = THREADS / 2;
    static constexpr int ROWS = HALF / 2; /* of the state at once: two threads hold COLS columns */
};

struct step_layer {
    const void *qkvu, *out, *l1, *l2, *l3;
    const void *scales[5]; /* theirs, of quantised weights */
    const float *slopes, *theta;
    int64_t state_offset;
};

/* Between blocks; be->step_words. x and activations are f32, or two bf16 in a word (`paired`). */
struct words {
    uint32_t epoch; /* the last tag that was used */
    uint32_t left;  /* blocks that have left a launch after which tags begin again; else 0 */
    uint32_t unused[30];
    uint64_t x[MAX_DIM];         /* the residual stream where it enters products */
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
    int32_t coming, coming_idle; /* tiles on their way at most; and while blocks wait */
    int32_t blocks;              /* of scales, in the ring */
    bool halves;                 /* whether lines that follow each other in memory come in one copy */
    struct step_layer layers[MAX_LAYERS];
};

/* Of numbers that are neither 0 nor near it, nor very large. */
static __device__ __forceinline__ float reciprocal(float x)
{
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
static __device__ __forceinline__ float reciprocal_root(float x)
{
    asm("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

/* All threads of the block that take part in products. */
template <typename W> static __device__ __forceinline__ void meet()
{
    asm volatile("bar.sync 1, %0;" ::"n"(shape<W>::THREADS) : "memory");
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

/* Columns c and c + 1, c even. */
template <bool PAIRED>
static __device__ __forceinline__ void tell_two(uint64_t *words, int32_t c, float a, float b, uint32_t tag)
{
    if (PAIRED) {
        tell(words + (uint32_t)c / 2, two_bf16(a, b), tag);
    } else {
        tell(words + c, __float_as_uint(a), tag);
        tell(words + c + 1, __float_as_uint(b), tag);
    }
}

/* Words without a value that have this tag. */
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
    return ((uint32_t)(v.x >> 32) ^ tag) | ((uint32_t)(v.y >> 32) ^ tag);
}

/* N words or pairs of words from place(i), where wanted(i), all under way together; by whole warps. */
template <typename V, int N, typename P, typename I>
static __device__ __forceinline__ void await_all(V (&v)[N], P place, I wanted, uint32_t tag)
{
    bool again;
#pragma unroll
    for (int i = 0; i < N; i++)
        v[i] = there(v[i], wanted(i) ? 0 : tag); /* no tag is 0 */
    do {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (stale(v[i], tag))
                look_at(v[i], place(i));
        again = false;
#pragma unroll
        for (int i = 0; i < N; i++)
            again |= stale(v[i], tag);
    } while (__any_sync(0xffffffffu, again));
}

/* ---- weights ------------------------------------------------------------------------------------------- */

/* A block's rows of one kind of product; of GLU the rows of two matrices alternate. */
struct share {
    int32_t first, n_dots, cols;
    float each; /* 1 / cols */
};

/* Whether activations are bf16, two in a word, and so the residual stream where it enters products; what is
 * added to it stays f32 in its block. */
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

/* A tile: LINES lines of LINE_BYTES, GAP bytes between its halves; of two matrices each has one. ABREAST (1
 * or 2): how many tiles' rows, that follow each other, come by turns, chunk by chunk. RATIO: bytes of weights
 * to a byte of scales that comes along, 0 if none does. */
enum { LINES = 8, LINE_BYTES = 2048 };
template <typename W> struct tile {
    static constexpr int GAP = 0, ABREAST = 1, RATIO = 0;
    static constexpr bool FOLDS = false; /* whether short rows share a line */
    static __host__ __device__ __forceinline__ int32_t row_bytes(int32_t cols)
    {
        return cols * (int32_t)sizeof(W);
    }
};

/* How a product is cut into tiles: a line has LINE_BYTES of a row, so a row takes `chunks` tiles, or it has
 * 1 << fold whole rows that follow each other, so that it is always about as long. */
struct cut {
    int32_t row_bytes, chunks, fold;
};
template <typename W> static __host__ __device__ __forceinline__ struct cut cut_of(int32_t cols)
{
    const int32_t bytes = tile<W>::row_bytes(cols);
    const bool folds = tile<W>::FOLDS;
    return {bytes, (int32_t)(((uint32_t)bytes + LINE_BYTES - 1) / LINE_BYTES),
            folds && bytes == LINE_BYTES / 2   ? 1
            : folds && bytes == LINE_BYTES / 4 ? 2
                                               : 0};
}

/* Of the scales of a row that come along. */
template <typename W> static __device__ __forceinline__ int32_t scale_bytes(const struct cut &cut)
{
    constexpr int RATIO = tile<W>::RATIO;
    return RATIO ? cut.row_bytes / (RATIO ? RATIO : 1) : 0;
}

/* What the head's weights are. */
template <typename W> struct outer {
    using type = W;
};

/* Weights on their way: TILES tiles, and blocks of scales. */
template <typename W> struct ring {
    static constexpr int TILES = 10, SLOT = LINES * LINE_BYTES + tile<W>::GAP, BLOCK = 0;
    static constexpr int CONSUMERS = team<W>::WARPS; /* of a tile */
    /* How many, of `room` bytes; -1: there is not room for what is needed. */
    static __host__ int32_t blocks(const struct step_args &, size_t)
    {
        return 0;
    }
};

/* Its shared memory, with barriers and a flag. */
template <typename W> static __host__ __device__ __forceinline__ int32_t ring_bytes(int32_t blocks)
{
    using R = ring<W>;
    return R::TILES * (R::SLOT + 2 * (int)sizeof(uint64_t)) + blocks * R::BLOCK + 16;
}

static __device__ struct share share_of(const struct step_args &a, int phase)
{
    const bool even = phase != QKVU && phase != HEAD; /* activations travel in pairs */
    const uint32_t outs = phase == QKVU ? 4 * a.H : phase == GLU ? a.G / 2 : phase == HEAD ? a.V : a.D / 2;
    const uint32_t from = (uint64_t)outs * blockIdx.x / gridDim.x;
    const uint32_t to = (uint64_t)outs * (blockIdx.x + 1) / gridDim.x;
    struct share s;
    s.first = even ? 2 * from : from;
    s.n_dots = (phase == GLU ? 4 : even ? 2 : 1) * (to - from);
    s.cols = phase == OUT ? a.H : phase == L3 ? a.G : a.D;
    s.each = 1.0f / s.cols;
    return s;
}

/* A product's matrix, or two whose rows alternate, and their scales. */
struct source {
    const void *w, *w2, *scales, *scales2;
};

static __device__ __forceinline__ struct source source_of(const struct step_args &a, int32_t layer, int phase)
{
    const struct step_layer &l = a.layers[layer % MAX_LAYERS];
    return phase == HEAD   ? source{a.head, NULL, a.head_scales, NULL}
           : phase == QKVU ? source{l.qkvu, NULL, l.scales[0], NULL}
           : phase == OUT  ? source{l.out, NULL, l.scales[1], NULL}
           : phase == GLU  ? source{l.l1, l.l2, l.scales[2], l.scales[3]}
                           : source{l.l3, NULL, l.scales[4], NULL};
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

/* ---- products ------------------------------------------------------------------------------------------ */

/* Shared memory beside the ring. */
struct room {
    float *in;            /* [max_input] as the worker has it */
    float *parts;         /* [2][WARPS][PASS] the warps' sums */
    float *red;           /* [2][WARPS] sums of squares */
    float *mix;           /* [2][2][WARPS / 2][COLS] */
    struct share *shares; /* [HEAD + 1] */
};

/* The sum of v[0], v[stride], ..., N numbers in pairs. */
template <int N> static __device__ __forceinline__ float tree(const float *v, int stride)
{
    if constexpr (N == 1)
        return *v;
    else
        return tree<N / 2>(v, stride) + tree<N / 2>(v + N / 2 * stride, stride);
}

template <typename W> struct worker;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename W> struct tile_ring {
    static constexpr int TILES = ring<W>::TILES, SLOT = ring<W>::SLOT;
    uint32_t tiles, scales; /* shared memory: [TILES][SLOT], [blocks][BLOCK] */
    uint32_t blocks;
    uint64_t *full, *empty; /* [TILES] barriers */
    volatile int *waiting;  /* whether this block waits for others */

    __device__ __forceinline__ tile_ring(uint4 *shared, uint32_t n_blocks)
    {
        blocks = n_blocks;
        tiles = shared_address(shared);
        scales = tiles + TILES * SLOT;
        full = reinterpret_cast<uint64_t *>(shared + (TILES * SLOT + n_blocks * ring<W>::BLOCK) / 16);
        empty = full + TILES;
        waiting = reinterpret_cast<int *>(empty + TILES);
    }

    __device__ void open() const
    {
        for (int i = 0; i < TILES; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], ring<W>::CONSUMERS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        proxy_fence();
        *waiting = false;
    }
};

/* Where a ring stands for whoever walks it. Scales of the rows of a tile, or of as many tiles as these rows
 * have, lie together, a block for each of the tiles. They have no barriers of their own: they are there when
 * the first of these tiles is, and read when the last of them is. */
template <typename W> struct position {
    uint32_t tile, parity, block;

    __device__ __forceinline__ void next()
    {
        if (++tile == ring<W>::TILES)
            tile = 0, parity ^= 1;
    }
    __device__ __forceinline__ uint32_t take(const struct tile_ring<W> &r, uint32_t n)
    {
        const uint32_t at = block + n > r.blocks ? 0 : block;
        block = at + n;
        return r.scales + at * ring<W>::BLOCK;
    }
};

/* Where line number `line` of a tile begins, and which line that is for lane 4 g and those beside it: lanes
 * that read at once have one of either half. */
template <typename W> static __device__ __forceinline__ int32_t line_at(int32_t line)
{
    return line * LINE_BYTES + line / (LINES / 2) * tile<W>::GAP;
}
static __device__ __forceinline__ int32_t line_of(int32_t g)
{
    return g % 2 * (LINES / 2) + g / 2;
}

/* The warp that streams the block's weights, in the order of their use: by products, tiles of rows, and runs
 * of columns. A lane takes a line of each tile, or half a tile, or the scales of one matrix's rows. What is
 * on its way delays what blocks tell each other, so there is a limit to it, and another while they wait. */
template <typename W> struct streamer {
    const struct step_args &a;
    const struct tile_ring<W> &r;
    struct position<W> to;
    int32_t n;      /* tiles so far */
    int32_t reader; /* the last tile whose rows have their scales in the block with this lane's number */

    /* Waits until nothing in the ring needs the blocks that are taken now, for n_tiles tiles `apart`. */
    __device__ __forceinline__ uint32_t take(int32_t n_tiles, int32_t apart)
    {
        const uint32_t place = to.take(r, n_tiles), lane = threadIdx.x % 32;
        if (lane + n_tiles >= to.block && lane < to.block) {
            if (reader + r.TILES > n)
                barrier_wait(&r.empty[reader % r.TILES], reader / r.TILES & 1);
            reader = n + (n_tiles - 1) * apart;
        }
        __syncwarp();
        return place;
    }

    template <typename P>
    __device__ __forceinline__ void product(const struct share &s, const struct source &from)
    {
        using T = tile<P>;
        const struct cut c = cut_of<P>(s.cols);
        const int32_t lane = threadIdx.x % 32, two = from.w2 ? 2 : 1, line = lane % (LINES / two);
        const bool second = from.w2 && lane & (lane < LINES ? LINES / 2 : 1);
        const bool halves = a.halves && c.row_bytes << c.fold == LINE_BYTES;
        const bool copies = lane < LINES && (!halves || lane % (LINES / 2) == 0);
        const int32_t most = (halves ? LINES / 2 : 1) << c.fold; /* rows that a lane has */
        const int32_t step = LINES / two << c.fold;              /* rows of a matrix in a tile */
        const uint8_t *at = static_cast<const uint8_t *>(second ? from.w2 : from.w) +
                            (int64_t)(s.first + (line << c.fold)) * c.row_bytes;
        const int32_t row_scales = scale_bytes<P>(c);
        const uint8_t *scales =
            static_cast<const uint8_t *>(second ? from.scales2 : from.scales) + (int64_t)s.first * row_scales;
        for (int32_t left = s.n_dots / two; left > 0; left -= T::ABREAST * step) {
            const int32_t abreast = left > step ? T::ABREAST : 1;
            for (int32_t begin = 0; begin < c.row_bytes; begin += LINE_BYTES)
                for (int32_t side = 0; side < abreast; side++) {
                    const int32_t rows = min(step, left - side * step);
                    const int32_t own = max(0, min(most, rows - (line << c.fold)));
                    const int32_t bytes = min((int32_t)LINE_BYTES, c.row_bytes - begin);
                    const bool brings = T::RATIO && begin == 0;
                    barrier_wait(&r.empty[to.tile], to.parity ^ 1);
                    for (;;) {
                        const int32_t k = n - (*r.waiting ? a.coming_idle : a.coming);
                        if (k < 0 || barrier_passed(&r.full[k % r.TILES], k / r.TILES & 1))
                            break;
                    }
                    if (lane == 0)
                        barrier_arrive_expect(&r.full[to.tile],
                                              two * rows * (bytes + (brings ? row_scales : 0)));
                    __syncwarp();
                    if (own && copies)
                        bulk_load(r.tiles + to.tile * r.SLOT + line_at<P>(lane),
                                  at + (int64_t)(side * step) * c.row_bytes + begin, own * bytes,
                                  &r.full[to.tile]);
                    if (brings) {
                        const uint32_t place = take(c.chunks, abreast);
                        if (lane >= LINES && lane < LINES + two)
                            bulk_load(place + second * step * row_scales, scales + side * step * row_scales,
                                      rows * row_scales, &r.full[to.tile]);
                    }
                    to.next();
                    n++;
                }
            at += (int64_t)(T::ABREAST * step) * c.row_bytes;
            scales += T::ABREAST * step * row_scales;
        }
    }
};

template <typename W>
static __device__ __forceinline__ void stream(const struct step_args &a, const struct share *shares,
                                              const struct tile_ring<W> &r)
{
    struct streamer<W> s = {
        a, r, {0, 0, 0}, 0, -ring<W>::TILES
    };
    for (int32_t at = 0; at < N_PHASES * a.n_layers; at++)
        s.template product<W>(shares[at % N_PHASES], source_of(a, at / N_PHASES, at % N_PHASES));
    s.template product<typename outer<W>::type>(shares[HEAD], source_of(a, 0, HEAD));
}

/* What warps have in common whatever the weights are. */
template <typename W> struct crew {
    const struct room &m;
    struct tile_ring<W> r;
    struct position<W> at;
    int32_t lane, warp, buffer;
    float squares; /* of this lane's columns of the input */
    static constexpr int WARPS = team<W>::WARPS;

    __device__ __forceinline__ crew(const struct room &room, const struct tile_ring<W> &ring)
        : m(room), r(ring)
    {
        lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        at = {0, 0, 0};
        buffer = 0;
    }

    /* All rows of the block times the input. sums(to, rows, whether it is the product's first) writes this
     * warp's sums of the next rows, PASS at most, and the first adds up squares; row_scale(row) is what a sum
     * is multiplied by. publish(row, sum, 1 / rms) is called by whole warps, a lane a row; the last ones may
     * lie beyond the block's. */
    template <typename S, typename R, typename F>
    __device__ __forceinline__ void product_by(const struct share &s, S sums, R row_scale, F publish)
    {
        for (int32_t from = 0; from < s.n_dots; from += PASS) {
            float *parts = m.parts + buffer * WARPS * PASS, *red = m.red + buffer * WARPS;
            const int32_t n = min(s.n_dots - from, (int32_t)PASS);
            const float scale = warp * GROUP < n ? row_scale(from + warp * GROUP + lane) : 0;
            sums(parts + warp * PASS, n, from == 0);
            if (lane == 0)
                red[warp] = squares;
            meet<W>();
            if (warp * GROUP < n) {
                const float sum = tree<WARPS>(parts + warp * GROUP + lane, PASS);
                publish(from + warp * GROUP + lane, sum * scale,
                        reciprocal_root(fmaf(tree<WARPS>(red, 1), s.each, 1e-6f)));
            }
            buffer ^= 1;
        }
        if (threadIdx.x == 0)
            *r.waiting = true;
    }
};

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

#endif
