/* One token through the whole network in one launch: the kernel of decoding a single stream (sm_90).
 *
 * One block per SM stays for the whole token. Its rows of every matrix are known beforehand, and so is the
 * order in which it needs them: one warp does nothing but stream them, in bulk copies, into a ring of DEPTH
 * stages in shared memory, across layers and as far ahead as the ring goes. The other warps consume:
 *
 *   qkvu   [q k v u] = W Norm(x), q and k through the feature map
 *   mix    S <- S + k^T v - (1 - r) S, o = q S       (the state is fetched ahead)
 *   out    x += W_o (u * Norm(o))
 *   glu    h = (W_1 Norm(x)) * (W_2 Norm(x))
 *   l3     x += W_3 h
 *
 * What one block makes and all need travels in words of eight bytes: four of value, four of a tag that names
 * the launch, layer and phase. A word is written and read whole, so a reader that sees the tag it waits for
 * has the value too: there is neither a barrier among blocks nor a fence, and waiting costs one way to the L2
 * cache and one back. A word is written again only by a block that has seen values made of values ... made of
 * it by every block that reads it; suits() asks for the sizes that this hangs on.
 *
 * A stage holds up to ROWS rows of a matrix, UNIT columns of each for every warp. Each warp multiplies its
 * columns of all rows by its part of the input, which it holds in registers, and the WARPS sums of a row are
 * added up in a fixed order: sums follow from sizes alone. With 16-bit weights the tensor cores do it: a tile
 * of 16 x 16 weights is 8 rows of the matrix by two runs of columns, and of its 8 columns of input four are
 * used: the high and the low bf16 half of f32 input, for either run. Norms are scalars beside the product. */
#include "kernels/cuda/cuda.cuh"

enum {
    WARPS = 16, /* that consume; one more streams */
    THREADS = 32 * WARPS,
    STREAMERS = 128, /* threads of the warp that streams and its three idle neighbours */
    DEPTH = 12,
    ROWS = 8,
    ROW_BYTES = 2048,       /* of a row in a stage: 128 for each warp */
    PITCH = ROW_BYTES + 64, /* rows g and g + 1 in different banks */
    STAGE_SIZE = ROWS * PITCH,
    PASS = 176, /* rows whose sums are held at once */
    MAX_LAYERS = 64,
    MAX_DIM = 8192, /* D and H */
    MAX_GLU = 16384,
    COLS = 8, /* columns of a head's state that half a block works on */
    HALF = THREADS / 2,
    STATE_ROWS = HALF / 2, /* rows of the state at once: two threads hold COLS columns */
    HELD = 4,              /* pieces of the state that a thread fetches ahead */
};

struct step_layer {
    const void *qkvu, *out, *l1, *l2, *l3;
    const float *slopes, *theta;
    int64_t state_offset;
};

/* Words between blocks; be->step_words. */
struct words {
    uint32_t epoch, unused[31]; /* the last tag that was used */
    uint64_t x[MAX_DIM];        /* f32, in the order of place() */
    uint64_t qkvu[4 * MAX_DIM]; /* f32 */
    uint64_t o[MAX_DIM];        /* f32 u * o, in the order of place() */
    uint64_t squares[MAX_DIM / COLS];
    uint64_t h[MAX_GLU]; /* f32 or two bf16, in the order of place() or of place_pair() */
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
    struct step_layer layers[MAX_LAYERS];
};

enum phase { QKVU, OUT, GLU, L3, N_PHASES }; /* products of a layer; after the last layer comes the head */
enum { TAG_QKVU = 1, TAG_MIX, TAG_OUT, TAG_GLU, TAG_L3, N_TAGS = TAG_L3 };

/* Columns of a 16-byte piece, of a warp's run (four pieces), of its unit (two runs), of a stage. */
template <typename W> struct geometry {
    static constexpr int PIECE = 16 / sizeof(W), RUN = 4 * PIECE, UNIT = 2 * RUN, CHUNK = WARPS * UNIT;
    static constexpr bool WIDE = sizeof(W) == 4;
};

/* ---- words --------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ ulonglong2 look2(const uint64_t *p)
{
    ulonglong2 v;
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory");
    return v;
}

static __device__ __forceinline__ uint64_t look(const uint64_t *p)
{
    uint64_t v;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
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

static __device__ __forceinline__ uint64_t await(const uint64_t *p, uint64_t word, uint32_t tag)
{
    while (stale(word, tag))
        word = look(p);
    return word;
}

/* Where the word of column c lies: pairs of columns in the order in which the four lanes of a run take them,
 * so that their loads are neighbours. */
template <typename W> static __device__ __forceinline__ int32_t place(int32_t c)
{
    constexpr int N = geometry<W>::PIECE, RUN = geometry<W>::RUN;
    return (c & ~(RUN - 1)) + c / 2 % (N / 2) * 8 + c / N % 4 * 2 + c % 2;
}

/* The same for words of two columns of 16-bit weights; c is even. */
static __device__ __forceinline__ int32_t place_pair(int32_t c)
{
    return c / 32 * 16 + c / 4 % 2 * 8 + c / 8 % 4 * 2 + c / 2 % 2;
}

/* ---- barriers of the block ----------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

static __device__ __forceinline__ void await_phase(uint32_t barrier, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* Of the warps that consume. */
static __device__ __forceinline__ void meet()
{
    asm volatile("bar.sync 1, %0;" ::"n"((int)THREADS) : "memory");
}

/* Where the ring stands for whoever walks it. */
struct position {
    uint32_t stage, parity;

    __device__ __forceinline__ void next()
    {
        if (++stage == DEPTH)
            stage = 0, parity ^= 1;
    }
};

/* ---- shares -------------------------------------------------------------------------------------------- */

/* A block's rows of one product. With two matrices their rows alternate: w, w2, w, w2, ... */
template <typename W> struct share {
    const W *w, *w2;
    int32_t first, n_outs, n_dots, cols, n_chunks;

    __device__ const W *row(int32_t dot) const
    {
        const W *base = w2 && (dot & 1) ? w2 : w;
        return base + (int64_t)(first + (w2 ? dot >> 1 : dot)) * cols;
    }
};

template <typename W>
static __device__ __forceinline__ struct share<W> share_of(const struct step_args &a, int32_t layer,
                                                           int phase) {
    struct share<W> s;
    uint32_t outs, grain = 1;
    s.w2 = NULL;
    if (layer == a.n_layers) {
        s.w = (const W *)a.head;
        outs = a.V, s.cols = a.D;
    } else {
        const struct step_layer &l = a.layers[layer];
        switch (phase) {
        case QKVU:
            s.w = (const W *)l.qkvu;
            outs = 4 * a.H, s.cols = a.D;
            break;
        case OUT:
            s.w = (const W *)l.out;
            outs = a.D, s.cols = a.H;
            break;
        case GLU:
            s.w = (const W *)l.l1, s.w2 = (const W *)l.l2;
            outs = a.G, s.cols = a.D;
            grain = 2; /* h travels in pairs */
            break;
        default:
            s.w = (const W *)l.l3;
            outs = a.D, s.cols = a.G;
        }
    }
    const uint32_t n = outs / grain;
    s.first = n * blockIdx.x / gridDim.x * grain;
    s.n_outs = n * (blockIdx.x + 1) / gridDim.x * grain - s.first;
    s.n_dots = s.w2 ? 2 * s.n_outs : s.n_outs;
    s.n_chunks = (s.cols + geometry<W>::CHUNK - 1) / geometry<W>::CHUNK;
    return s;
}

/* Shared memory. */
struct room {
    uint32_t ring;        /* [DEPTH][STAGE_SIZE] */
    uint32_t full, empty; /* [DEPTH] barriers */
    float *parts;         /* [2][WARPS][PASS] the warps' sums */
    float *red;           /* [2][WARPS] sums of squares */
    float *mix;           /* [2][WARPS / 2][COLS] */
    float *own;           /* [D / blocks] this block's part of the residual stream */
};

/* The warp that streams. */
template <typename W> static __device__ void stream(const struct step_args &a, const struct room &m)
{
    const int lane = threadIdx.x % 32;
    struct position at = {0, 0};
    for (int32_t l = 0; l <= a.n_layers; l++) {
        for (int phase = 0; phase < (l == a.n_layers ? 1 : N_PHASES); phase++) {
            const struct share<W> s = share_of<W>(a, l, phase);
            for (int32_t dot = 0; dot < s.n_dots; dot += ROWS) {
                const int32_t rows = min((int32_t)ROWS, s.n_dots - dot);
                const uint8_t *row = (const uint8_t *)s.row(dot + min(lane, rows - 1));
                for (int32_t j = 0; j < s.n_chunks; j++) {
                    const uint32_t bytes =
                        min((int32_t)ROW_BYTES, s.cols * (int32_t)sizeof(W) - j * ROW_BYTES);
                    const uint32_t full = m.full + at.stage * 8;
                    if (lane == 0) {
                        await_phase(m.empty + at.stage * 8, at.parity ^ 1);
                        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full),
                                     "r"(bytes * rows)
                                     : "memory");
                    }
                    __syncwarp();
                    if (lane < rows)
                        asm volatile(
                            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                            "[%0], [%1], %2, [%3];" ::"r"(m.ring + at.stage * STAGE_SIZE + lane * PITCH),
                            "l"(row + j * ROW_BYTES), "r"(bytes), "r"(full)
                            : "memory");
                    at.next();
                }
            }
        }
    }
}

/* CHUNKS, below: stages that a row may take. It bounds the registers that hold the input. */

/* ---- products ------------------------------------------------------------------------------------------ */

/* A warp's part of the input. Lane 4 g + t holds, of every unit, piece t of a run: for 16-bit weights the
 * high (g even) or low (g odd) halves of the first (g & 2 == 0) or second run, for f32 weights of both. */
template <typename W, int CHUNKS> struct input {
    uint4 half[CHUNKS];
    __device__ __forceinline__ void put(int j, int, const float (&v)[8], bool low)
    {
        uint32_t *to = &half[j].x;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const __nv_bfloat162 high = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
            const float2 f = low ? __bfloat1622float2(high) : make_float2(0, 0);
            const __nv_bfloat162 h = __floats2bfloat162_rn(v[2 * i] - f.x, v[2 * i + 1] - f.y);
            to[i] = *reinterpret_cast<const uint32_t *>(&h);
        }
    }
};
template <int CHUNKS> struct input<float, CHUNKS> {
    float4 run[CHUNKS][2];
    __device__ __forceinline__ void put(int j, int r, const float (&v)[4], bool)
    {
        run[j][r] = make_float4(v[0], v[1], v[2], v[3]);
    }
};

static __device__ __forceinline__ uint4 load_piece(uint32_t address)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

static __device__ __forceinline__ void mma(float4 &c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                           uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ void mma_pieces(float4 &c, const uint4 &p, const uint4 &q, const uint4 &x)
{
    mma(c, p.x, q.x, p.y, q.y, x.x, x.y);
    mma(c, p.z, q.z, p.w, q.w, x.z, x.w);
}

/* Four f16 pairs as bf16 pairs, high and low, whose sums they are. */
static __device__ __forceinline__ void split_halves(uint4 &high, uint4 &low, const uint4 &halves)
{
    const uint32_t *from = &halves.x;
    uint32_t *to = &high.x, *rest = &low.x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 f = __half22float2(*reinterpret_cast<const __half2 *>(&from[i]));
        const __nv_bfloat162 h = __floats2bfloat162_rn(f.x, f.y);
        const float2 back = __bfloat1622float2(h);
        const __nv_bfloat162 l = __floats2bfloat162_rn(f.x - back.x, f.y - back.y);
        to[i] = *reinterpret_cast<const uint32_t *>(&h);
        rest[i] = *reinterpret_cast<const uint32_t *>(&l);
    }
}

/* c += a unit's pieces p (first run), q (second run) of row g times the input. */
template <typename W, int CHUNKS>
static __device__ __forceinline__ void multiply_unit(float4 &c, const uint4 &p, const uint4 &q,
                                                     const struct input<W, CHUNKS> &in, int j)
{
    if (sizeof(W) == 2 && __is_same(W, __half)) {
        uint4 ph, pl, qh, ql;
        split_halves(ph, pl, p);
        split_halves(qh, ql, q);
        mma_pieces(c, ph, qh, in.half[j]);
        mma_pieces(c, pl, ql, in.half[j]);
    } else {
        mma_pieces(c, p, q, in.half[j]);
    }
}
template <int CHUNKS>
static __device__ __forceinline__ void multiply_unit(float4 &c, const uint4 &p, const uint4 &q,
                                                     const struct input<float, CHUNKS> &in, int j)
{
    const float4 &x = in.run[j][0], &y = in.run[j][1];
    c.x = fmaf(__uint_as_float(p.x), x.x, fmaf(__uint_as_float(q.x), y.x, c.x));
    c.y = fmaf(__uint_as_float(p.y), x.y, fmaf(__uint_as_float(q.y), y.y, c.y));
    c.z = fmaf(__uint_as_float(p.z), x.z, fmaf(__uint_as_float(q.z), y.z, c.z));
    c.w = fmaf(__uint_as_float(p.w), x.w, fmaf(__uint_as_float(q.w), y.w, c.w));
}

/* Row g's sum over a warp's columns, in lane 4 g. */
template <typename W> static __device__ __forceinline__ float row_sum(const float4 &c, int lane)
{
    float v;
    if (sizeof(W) == 4) {
        v = (c.x + c.y) + (c.z + c.w);
        v += __shfl_xor_sync(0xffffffffu, v, 2);
    } else { /* lane 4 g: the first run's high and low columns; lane 4 g + 1: the second run's */
        v = lane % 4 == 0 ? c.x + c.y : c.z + c.w;
    }
    return v + __shfl_xor_sync(0xffffffffu, v, 1);
}

/* A warp that consumes. */
template <typename W, int CHUNKS> struct worker {
    using G = struct geometry<W>;
    const struct room &m;
    int lane, warp, g, t;
    struct position at;
    int buffer; /* of parts and red: alternates */
    struct input<W, CHUNKS> in;
    float squares; /* over this lane's part of the input */

    __device__ worker(const struct room &room) : m(room)
    {
        lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
        at = {0, 0};
        buffer = 0;
    }

    /* The run, of this lane, that comes r-th in unit j: where its piece begins. */
    __device__ __forceinline__ int32_t column(int j, int r) const
    {
        return j * G::CHUNK + warp * G::UNIT + r * G::RUN + t * G::PIECE;
    }
    static constexpr int N_RUNS = G::WIDE ? 2 : 1;
    __device__ __forceinline__ int run_of(int r) const
    {
        return G::WIDE ? r : g >> 1 & 1;
    }

    __device__ __forceinline__ void put(int j, int r, const float (&v)[G::PIECE])
    {
        if (G::WIDE || (g & 5) == 0) {
#pragma unroll
            for (int i = 0; i < G::PIECE; i++)
                squares = fmaf(v[i], v[i], squares);
        }
        in.put(j, r, v, g & 1);
    }

    /* The input from words of a value each. */
    __device__ __forceinline__ void gather(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        constexpr int LOADS = G::PIECE / 2, TOGETHER = G::WIDE ? 1 : 2;
        squares = 0;
#pragma unroll
        for (int j0 = 0; j0 < CHUNKS; j0 += TOGETHER) {
            if (j0 * G::CHUNK >= cols)
                break;
            ulonglong2 v[TOGETHER][N_RUNS][LOADS];
            bool again;
#pragma unroll
            for (int j = 0; j < TOGETHER; j++)
#pragma unroll
                for (int r = 0; r < N_RUNS; r++) {
                    const int32_t c = column(j0 + j, run_of(r));
#pragma unroll
                    for (int i = 0; i < LOADS; i++) {
                        v[j][r][i] = make_ulonglong2((uint64_t)tag << 32, (uint64_t)tag << 32);
                        if (c < cols)
                            v[j][r][i] = look2(words + (c - t * G::PIECE) + i * 8 + t * 2);
                    }
                }
            do {
                again = false;
#pragma unroll
                for (int j = 0; j < TOGETHER; j++)
#pragma unroll
                    for (int r = 0; r < N_RUNS; r++) {
                        const int32_t c = column(j0 + j, run_of(r));
#pragma unroll
                        for (int i = 0; i < LOADS; i++)
                            if (stale(v[j][r][i].x, tag) || stale(v[j][r][i].y, tag)) {
                                v[j][r][i] = look2(words + (c - t * G::PIECE) + i * 8 + t * 2);
                                again = true;
                            }
                    }
            } while (again);
#pragma unroll
            for (int j = 0; j < TOGETHER && j0 + j < CHUNKS; j++)
#pragma unroll
                for (int r = 0; r < N_RUNS; r++) {
                    float f[G::PIECE];
#pragma unroll
                    for (int i = 0; i < LOADS; i++)
                        f[2 * i] = value_of(v[j][r][i].x), f[2 * i + 1] = value_of(v[j][r][i].y);
                    put(j0 + j, r, f);
                }
        }
    }

    /* The input from words of two bf16 values each. */
    __device__ __forceinline__ void gather_pairs(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        constexpr int TOGETHER = 4;
#pragma unroll
        for (int j0 = 0; j0 < CHUNKS; j0 += TOGETHER) {
            if (j0 * G::CHUNK >= cols)
                break;
            ulonglong2 v[TOGETHER][2];
            bool again;
#pragma unroll
            for (int j = 0; j < TOGETHER; j++) {
                const int32_t c = column(j0 + j, run_of(0));
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    v[j][i] = make_ulonglong2((uint64_t)tag << 32, (uint64_t)tag << 32);
                    if (c < cols)
                        v[j][i] = look2(words + (c - t * G::PIECE) / 2 + i * 8 + t * 2);
                }
            }
            do {
                again = false;
#pragma unroll
                for (int j = 0; j < TOGETHER; j++) {
                    const int32_t c = column(j0 + j, run_of(0));
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (stale(v[j][i].x, tag) || stale(v[j][i].y, tag)) {
                            v[j][i] = look2(words + (c - t * G::PIECE) / 2 + i * 8 + t * 2);
                            again = true;
                        }
                }
            } while (again);
#pragma unroll
            for (int j = 0; j < TOGETHER && j0 + j < CHUNKS; j++)
                in.half[j0 + j] = g & 1 ? make_uint4(0, 0, 0, 0)
                                        : make_uint4((uint32_t)v[j][0].x, (uint32_t)v[j][0].y,
                                                     (uint32_t)v[j][1].x, (uint32_t)v[j][1].y);
        }
    }

    /* The input from a row of the embedding. */
    __device__ __forceinline__ void embed(const W *row, int32_t cols, float scale)
    {
        squares = 0;
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
            if (j * G::CHUNK >= cols)
                break;
#pragma unroll
            for (int r = 0; r < N_RUNS; r++) {
                const int32_t c = column(j, run_of(r));
                float f[G::PIECE];
                uint4 piece = make_uint4(0, 0, 0, 0);
                if (c < cols)
                    piece = __ldg(reinterpret_cast<const uint4 *>(row + c));
#pragma unroll
                for (int i = 0; i < G::PIECE; i++)
                    f[i] = scale * to_f32(reinterpret_cast<const W *>(&piece)[i]);
                put(j, r, f);
            }
        }
    }

    /* Rows dot .. dot + n of the block's, n <= PASS, times the input: the warps' sums into m.parts, the sums
     * of squares of their inputs into m.red; ends with a barrier. */
    __device__ __forceinline__ void multiply(int32_t n, int32_t cols, float sum_squares)
    {
        float *parts = m.parts + (buffer * WARPS + warp) * PASS;
        const uint32_t here = m.ring + g * PITCH + warp * 128 + t * 16;
        for (int32_t dot = 0; dot < n; dot += ROWS) {
            float4 c = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int j = 0; j < CHUNKS; j++) {
                if (j * G::CHUNK >= cols)
                    break;
                uint4 p = make_uint4(0, 0, 0, 0), q = p;
                await_phase(m.full + at.stage * 8, at.parity);
                const uint32_t from = here + at.stage * STAGE_SIZE;
                if (column(j, 0) < cols)
                    p = load_piece(from);
                if (column(j, 1) < cols)
                    q = load_piece(from + 64);
                __syncwarp();
                if (lane == 0)
                    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(m.empty + at.stage * 8)
                                 : "memory");
                multiply_unit(c, p, q, in, j);
                at.next();
            }
            const float v = row_sum<W>(c, lane);
            if (t == 0)
                parts[dot + g] = v;
        }
        if (lane == 0)
            m.red[buffer * WARPS + warp] = sum_squares;
        meet();
        buffer ^= 1;
    }

    /* Of a gathered input; in lane 0. */
    __device__ __forceinline__ float sum_squares()
    {
        float s = squares;
        s += __shfl_xor_sync(0xffffffffu, s, 1);
        s += __shfl_xor_sync(0xffffffffu, s, 2);
        if (!G::WIDE)
            s += __shfl_xor_sync(0xffffffffu, s, 8);
        return s;
    }

    __device__ __forceinline__ static float tree(const float *v, int stride)
    {
        static_assert(WARPS == 16, "four levels");
        float s[4];
#pragma unroll
        for (int i = 0; i < 4; i++, v += 4 * stride)
            s[i] = (v[0] + v[stride]) + (v[2 * stride] + v[3 * stride]);
        return (s[0] + s[1]) + (s[2] + s[3]);
    }

    /* After multiply(): a row's sum, and what the norm multiplies it by. */
    __device__ __forceinline__ float result(int32_t dot) const
    {
        return tree(m.parts + (buffer ^ 1) * WARPS * PASS + dot, PASS);
    }
    __device__ __forceinline__ float inverse_rms(int32_t cols) const
    {
        return rsqrtf(tree(m.red + (buffer ^ 1) * WARPS, 1) / cols + 1e-6f);
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

    __device__ mixer(const struct step_args &args, const struct step_layer &layer) : a(args), l(layer)
    {
        d = l.theta ? 2 * a.head_dim : a.head_dim;
        per_head = a.head_dim / COLS;
        n_units = a.n_heads * per_head;
        row = threadIdx.x % HALF / 2;
        col = threadIdx.x % 2 * 4;
        per_unit = (d + STATE_ROWS - 1) / STATE_ROWS;
    }

    __device__ int32_t unit(int32_t round) const
    {
        return (round * 2 + (int32_t)threadIdx.x / HALF) * (int32_t)gridDim.x + (int32_t)blockIdx.x;
    }

    __device__ float4 *state_at(int32_t u, int32_t r) const
    {
        const int32_t head = u / per_head;
        float *S = a.state + l.state_offset + (int64_t)head * d * a.head_dim;
        return reinterpret_cast<float4 *>(S + (int64_t)r * a.head_dim + u % per_head * COLS + col);
    }

    __device__ int32_t feature(int32_t u, int32_t r) const
    {
        return u / per_head * a.head_dim + (r < a.head_dim ? r : r - a.head_dim);
    }

    __device__ float turn(int32_t u, int32_t r, double pos) const
    {
        return l.theta ? lrpe_turn(l.theta[feature(u, r)], pos, r >= a.head_dim) : 1;
    }

    __device__ __forceinline__ void fetch(double pos)
    {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int32_t u = unit(i / per_unit), r = row + i % per_unit * STATE_ROWS;
            if (u < n_units && r < d) {
                held[i] = __ldcg(state_at(u, r));
                turns[i] = turn(u, r, pos);
            }
        }
    }

    template <typename W> __device__ __forceinline__ void run(const struct room &m, double pos, uint32_t tag)
    {
        const int lane = threadIdx.x % 32, half = threadIdx.x / HALF, warp = threadIdx.x % HALF / 32;
        const int32_t H = a.H;
        const uint64_t *q = a.words->qkvu;
        const uint32_t tag_in = tag + TAG_QKVU, tag_out = tag + TAG_MIX;
        for (int32_t round = 0; round * (int32_t)gridDim.x * 2 < n_units; round++) {
            const int32_t u = unit(round), first = u * COLS; /* = head * e + column within the head */
            const bool writes = (int)threadIdx.x % HALF < COLS && u < n_units;
            const uint64_t *gate_at = q + 3 * H + first + threadIdx.x % HALF;
            uint64_t gate = 0;
            float4 sum = make_float4(0, 0, 0, 0);
            if (u < n_units) {
                const float fade = (float)-expm1(-(double)l.slopes[u / per_head]);
                const uint64_t *v_at = q + 2 * H + first + col;
                ulonglong2 v0 = look2(v_at), v1 = look2(v_at + 2);
                if (writes)
                    gate = look(gate_at);
                for (int32_t k = 0; k < per_unit; k++) {
                    const int32_t r = row + k * STATE_ROWS, i = round * per_unit + k;
                    if (r >= d)
                        break;
                    const uint64_t *q_at = q + feature(u, r), *k_at = q_at + H;
                    uint64_t qw = look(q_at), kw = look(k_at);
                    float4 *S = state_at(u, r), s;
                    float turned;
                    if (i < HELD) {
                        static_assert(HELD == 4, "all are named");
                        s = i == 0 ? held[0] : i == 1 ? held[1] : i == 2 ? held[2] : held[3];
                        turned = i == 0 ? turns[0] : i == 1 ? turns[1] : i == 2 ? turns[2] : turns[3];
                    } else {
                        s = __ldcg(S);
                        turned = turn(u, r, pos);
                    }
                    while (stale(v0.x, tag_in) || stale(v0.y, tag_in))
                        v0 = look2(v_at);
                    while (stale(v1.x, tag_in) || stale(v1.y, tag_in))
                        v1 = look2(v_at + 2);
                    const float qr = value_of(await(q_at, qw, tag_in)) * turned;
                    const float kr = value_of(await(k_at, kw, tag_in)) * turned;
                    s.x += kr * value_of(v0.x) - fade * s.x, s.y += kr * value_of(v0.y) - fade * s.y;
                    s.z += kr * value_of(v1.x) - fade * s.z, s.w += kr * value_of(v1.y) - fade * s.w;
                    __stcg(S, s);
                    sum.x += qr * s.x, sum.y += qr * s.y, sum.z += qr * s.z, sum.w += qr * s.w;
                }
            }
            for (int offset = 16; offset > 1; offset /= 2) {
                sum.x += __shfl_xor_sync(0xffffffffu, sum.x, offset);
                sum.y += __shfl_xor_sync(0xffffffffu, sum.y, offset);
                sum.z += __shfl_xor_sync(0xffffffffu, sum.z, offset);
                sum.w += __shfl_xor_sync(0xffffffffu, sum.w, offset);
            }
            if (lane < 2)
                *reinterpret_cast<float4 *>(m.mix + (half * (WARPS / 2) + warp) * COLS + col) = sum;
            meet();
            if (writes) {
                const int i = threadIdx.x % HALF;
                float total = 0;
                for (int w = 0; w < WARPS / 2; w++)
                    total += m.mix[(half * (WARPS / 2) + w) * COLS + i];
                const float up = value_of(await(gate_at, gate, tag_in));
                tell(a.words->o + place<W>(first + i), __float_as_uint(total * up), tag_out);
                float square = total * total;
                for (int offset = COLS / 2; offset > 0; offset /= 2)
                    square += __shfl_xor_sync(0xffu, square, offset);
                if (i == 0)
                    tell(a.words->squares + u, __float_as_uint(square), tag_out);
            }
            if ((round + 1) * (int32_t)gridDim.x * 2 < n_units)
                meet();
        }
    }

    /* Of all o, this warp's share; the same in all lanes. */
    __device__ __forceinline__ float sum_squares(uint32_t tag) const
    {
        float sum = 0;
        for (int32_t u = threadIdx.x; u < n_units; u += THREADS) {
            const uint64_t *at = a.words->squares + u;
            sum += value_of(await(at, look(at), tag));
        }
        return warp_sum(sum);
    }
};

template <typename W, int CHUNKS>
static __device__ __forceinline__ void consume(const struct step_args &a, const struct room &m)
{
    struct words &words = *a.words;
    uint32_t tag = __ldcg(&words.epoch);
    const double pos = (double)(a.pos + (a.steps ? __ldcg(a.steps) : 0));
    const W *token = (const W *)a.embed + (int64_t)__ldcg(a.id) * a.D;
    struct worker<W, CHUNKS> w(m);

    for (int32_t l = 0; l < a.n_layers; l++, tag += N_TAGS) {
        struct share<W> s = share_of<W>(a, l, QKVU);
        if (l == 0)
            w.embed(token, s.cols, a.embed_scale);
        else
            w.gather(words.x, s.cols, tag); /* l3 of the layer before */
        for (int32_t from = 0; from < s.n_dots; from += PASS) {
            const int32_t n = min((int32_t)PASS, s.n_dots - from);
            w.multiply(n, s.cols, w.sum_squares());
            for (int32_t i = threadIdx.x; i < n; i += THREADS) {
                float value = w.result(i) * w.inverse_rms(s.cols);
                const int32_t out = s.first + from + i;
                if (out < 2 * a.H)
                    value = activate(value, a.act);
                tell(words.qkvu + out, __float_as_uint(value), tag + TAG_QKVU);
            }
        }

        struct mixer mix(a, a.layers[l]);
        mix.fetch(pos);
        mix.template run<W>(m, pos, tag);

        s = share_of<W>(a, l, OUT);
        w.gather(words.o, s.cols, tag + TAG_MIX);
        const float squares = mix.sum_squares(tag + TAG_MIX);
        for (int32_t from = 0; from < s.n_dots; from += PASS) {
            const int32_t n = min((int32_t)PASS, s.n_dots - from);
            w.multiply(n, s.cols, squares);
            for (int32_t i = threadIdx.x; i < n; i += THREADS) {
                const int32_t out = s.first + from + i;
                const float old = l == 0 ? a.embed_scale * to_f32(token[out]) : m.own[from + i];
                const float value = old + w.result(i) * w.inverse_rms(s.cols);
                m.own[from + i] = value;
                tell(words.x + place<W>(out), __float_as_uint(value), tag + TAG_OUT);
            }
        }

        s = share_of<W>(a, l, GLU);
        w.gather(words.x, s.cols, tag + TAG_OUT);
        for (int32_t from = 0; from < s.n_dots; from += PASS) {
            const int32_t n = min((int32_t)PASS, s.n_dots - from);
            w.multiply(n, s.cols, w.sum_squares());
            for (int32_t i = threadIdx.x; i < n / 4; i += THREADS) { /* two outputs */
                const int32_t out = s.first + from / 2 + 2 * i;
                const float scale = w.inverse_rms(s.cols);
                const float h0 = (w.result(4 * i) * scale) * (w.result(4 * i + 1) * scale);
                const float h1 = (w.result(4 * i + 2) * scale) * (w.result(4 * i + 3) * scale);
                if (sizeof(W) == 4) {
                    tell(words.h + place<W>(out), __float_as_uint(h0), tag + TAG_GLU);
                    tell(words.h + place<W>(out + 1), __float_as_uint(h1), tag + TAG_GLU);
                } else {
                    const __nv_bfloat162 h = __floats2bfloat162_rn(h0, h1);
                    tell(words.h + place_pair(out), *reinterpret_cast<const uint32_t *>(&h), tag + TAG_GLU);
                }
            }
        }

        s = share_of<W>(a, l, L3);
        if constexpr (sizeof(W) == 4)
            w.gather(words.h, s.cols, tag + TAG_GLU);
        else
            w.gather_pairs(words.h, s.cols, tag + TAG_GLU);
        for (int32_t from = 0; from < s.n_dots; from += PASS) {
            const int32_t n = min((int32_t)PASS, s.n_dots - from);
            w.multiply(n, s.cols, 0);
            for (int32_t i = threadIdx.x; i < n; i += THREADS) {
                const float value = m.own[from + i] + w.result(i);
                m.own[from + i] = value;
                tell(words.x + place<W>(s.first + from + i), __float_as_uint(value), tag + TAG_L3);
            }
        }
    }

    const struct share<W> s = share_of<W>(a, a.n_layers, 0);
    w.gather(words.x, s.cols, tag);
    for (int32_t from = 0; from < s.n_dots; from += PASS) {
        const int32_t n = min((int32_t)PASS, s.n_dots - from);
        w.multiply(n, s.cols, w.sum_squares());
        for (int32_t i = threadIdx.x; i < n; i += THREADS)
            a.logits[s.first + from + i] = w.result(i) * w.inverse_rms(s.cols);
    }
    /* By now all blocks have seen the old one: this block has values that hang on values of all. */
    if (blockIdx.x == 0 && threadIdx.x == 0)
        words.epoch = tag;
}

template <typename W, int CHUNKS>
static __global__ void __launch_bounds__(THREADS + STREAMERS, 1)
    step_kernel(const __grid_constant__ struct step_args a)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(128) uint8_t shared[];
    struct room m;
    uint8_t *rest = shared + DEPTH * STAGE_SIZE;
    m.ring = shared_address(shared);
    m.full = shared_address(rest), m.empty = m.full + DEPTH * 8;
    m.parts = reinterpret_cast<float *>(rest + DEPTH * 16);
    m.red = m.parts + 2 * WARPS * PASS;
    m.mix = m.red + 2 * WARPS;
    m.own = m.mix + WARPS * COLS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < DEPTH; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(m.full + i * 8) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(m.empty + i * 8), "n"((int)WARPS)
                         : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (threadIdx.x < THREADS + 32)
            stream<W>(a, m);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 120;");
        consume<W, CHUNKS>(a, m);
    }
#endif
}

/* ---- host ------------------------------------------------------------------------------------------------
 */

/* Stages that a row may take. */
enum { FEW = 6, MANY = 11 };

static int32_t max32(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

static int32_t stages_of(const struct ltn_network *net)
{
    const int32_t widest = max32(net->embed_dim, max32(net->hidden_dim, net->glu_dim));
    return (widest * (int32_t)ltn_dtype_size(net->embed.dtype) + ROW_BYTES - 1) / ROW_BYTES;
}

/* The released shapes and their kin: one gate in qkvu, SimpleRMSNorm, no biases, sizes in whole pieces, and a
 * row of qkvu and a pair of h at least for every block. */
static bool suits(const struct cuda_backend *be, const struct ltn_network *net, size_t *shared)
{
    const int32_t n = 16 / (int32_t)ltn_dtype_size(net->embed.dtype);
    const struct ltn_attention *first = &net->layers[0].attention;
    if (!be->step_words || net->gate_dim || net->n_layers > MAX_LAYERS || net->final_norm.weight ||
        net->act == LTN_ACT_EXP || first->head_dim % COLS || net->embed_dim % n || net->hidden_dim % n ||
        net->glu_dim % n || net->head.dtype != net->embed.dtype || !aligned16(net->head.data) ||
        !aligned16(net->embed.data))
        return false;
    if (net->embed_dim > MAX_DIM || net->hidden_dim > MAX_DIM || net->glu_dim > MAX_GLU ||
        stages_of(net) > (n == 4 ? (int)FEW : (int)MANY) || net->vocab_size > INT32_MAX / be->n_sms ||
        4 * net->hidden_dim < be->n_sms || net->glu_dim / 2 < be->n_sms)
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
    *shared = DEPTH * (STAGE_SIZE + 16) +
              ((size_t)2 * WARPS * PASS + 2 * WARPS + WARPS * COLS + net->embed_dim / be->n_sms + 1) *
                  sizeof(float);
    return *shared <= be->max_shared;
}

template <typename W, int CHUNKS>
static enum ltn_status run(struct cuda_backend *be, const struct step_args &a, size_t shared,
                           struct ltn_error *err)
{
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(be->n_sms);
    config.blockDim = dim3(THREADS + STREAMERS);
    config.dynamicSmemBytes = shared;
    config.stream = be->stream;
    config.attrs = &together;
    config.numAttrs = 1;
    CUDA_TRY(be, err, (cudaLaunchKernelEx(&config, step_kernel<W, CHUNKS>, a)));
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

    if (!suits(be, net, &shared))
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
    const bool few = stages_of(net) <= FEW;
#define RUN(W, A)                                                                                            \
    (few || sizeof(W) == 4 ? run<W, FEW>(be, a, shared, err) : run < W,                                      \
     sizeof(W) == 4 ? FEW : MANY > (be, a, shared, err))
    return FOR_TYPES(be, err, net->embed.dtype, RUN);
#undef RUN
}

template <typename W, int CHUNKS>
static enum ltn_status allow_shared(struct cuda_backend *be, struct ltn_error *err)
{
    CUDA_TRY(be, err,
             (cudaFuncSetAttribute(step_kernel<W, CHUNKS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   (int)be->max_shared)));
    return LTN_OK;
}

enum ltn_status step_open(struct cuda_backend *be, struct ltn_error *err)
{
    int together = 0, major = 0, minor = 0;
    CUDA_TRY(be, err, cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, be->device));
    CUDA_TRY(be, err, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, be->device));
    CUDA_TRY(be, err, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, be->device));
    if (!together || major != 9 || minor != 0)
        return LTN_OK;
    LTN_TRY((allow_shared<float, FEW>(be, err)));
    LTN_TRY((allow_shared<__nv_bfloat16, FEW>(be, err)));
    LTN_TRY((allow_shared<__nv_bfloat16, MANY>(be, err)));
    LTN_TRY((allow_shared<__half, FEW>(be, err)));
    LTN_TRY((allow_shared<__half, MANY>(be, err)));
    CUDA_TRY(be, err, cudaMalloc(&be->step_words, sizeof(struct words)));
    CUDA_TRY(be, err, cudaMemsetAsync(be->step_words, 0, sizeof(struct words), be->stream));
    return LTN_OK;
}
