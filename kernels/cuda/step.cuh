/* What step.cu is made of: its sizes, the words between blocks, a block's shares, the products of a warp. */
#ifndef LTN_CUDA_STEP_CUH
#define LTN_CUDA_STEP_CUH

#include "kernels/cuda/hopper.cuh"

#include "kernels/cuda/cuda.cuh"

enum {
    WARPS = 16, /* that consume; one more streams */
    THREADS = 32 * WARPS,
    STREAMERS = 128,
    DEPTH = 6,
    ROWS = 16,
    ROW_BYTES = 2048, /* of a row in a stage: 128 for each warp */
    STAGE_SIZE = ROWS * ROW_BYTES,
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

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

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

/* ---- the ring -------------------------------------------------------------------------------------------
 */

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
    uint32_t ring;          /* [DEPTH][STAGE_SIZE] */
    uint64_t *full, *empty; /* [DEPTH] barriers */
    float *parts;           /* [2][WARPS][PASS] the warps' sums */
    float *red;             /* [2][WARPS] sums of squares */
    float *mix;             /* [2][WARPS / 2][COLS] */
    float *own;             /* [D / blocks] this block's part of the residual stream */
};

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
    __device__ __forceinline__ void put(int j, int r, const float (&v)[4], bool low)
    {
        const float4 f = make_float4(v[0], v[1], v[2], v[3]);
        if (low)
            run[j][1 - r] = f;
        else
            run[j][r] = f;
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
        v = (lane & 1) == (lane >> 2 & 1) ? c.x + c.y : c.z + c.w;
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

    /* The input from words of a value each. Addresses are one register and constants: what the compiler would
     * keep of them from layer to layer has no room. */
    __device__ __forceinline__ void gather(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        constexpr int LOADS = G::PIECE / 2, TOGETHER = G::WIDE ? 1 : 2;
        squares = 0;
#pragma unroll
        for (int j0 = 0; j0 < CHUNKS; j0 += TOGETHER) {
            if (j0 * G::CHUNK >= cols)
                break;
            ulonglong2 v[TOGETHER][N_RUNS][LOADS];
            const int32_t left = cols - column(j0, run_of(0));
            const uint64_t *from = words + (column(j0, run_of(0)) - t * G::PIECE) + t * 2;
            asm volatile("" : "+l"(from));
            bool again;
#pragma unroll
            for (int j = 0; j < TOGETHER; j++)
#pragma unroll
                for (int r = 0; r < N_RUNS; r++)
#pragma unroll
                    for (int i = 0; i < LOADS; i++) {
                        v[j][r][i] = make_ulonglong2((uint64_t)tag << 32, (uint64_t)tag << 32);
                        if (j * G::CHUNK + r * G::RUN < left)
                            v[j][r][i] = look2(from + j * G::CHUNK + r * G::RUN + i * 8);
                    }
            do {
                again = false;
#pragma unroll
                for (int j = 0; j < TOGETHER; j++)
#pragma unroll
                    for (int r = 0; r < N_RUNS; r++)
#pragma unroll
                        for (int i = 0; i < LOADS; i++)
                            if (stale(v[j][r][i].x, tag) || stale(v[j][r][i].y, tag)) {
                                v[j][r][i] = look2(from + j * G::CHUNK + r * G::RUN + i * 8);
                                again = true;
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
            const int32_t left = cols - column(j0, run_of(0));
            const uint64_t *from = words + (column(j0, run_of(0)) - t * G::PIECE) / 2 + t * 2;
            asm volatile("" : "+l"(from));
            bool again;
#pragma unroll
            for (int j = 0; j < TOGETHER; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    v[j][i] = make_ulonglong2((uint64_t)tag << 32, (uint64_t)tag << 32);
                    if (j * G::CHUNK < left)
                        v[j][i] = look2(from + j * G::CHUNK / 2 + i * 8);
                }
            do {
                again = false;
#pragma unroll
                for (int j = 0; j < TOGETHER; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (stale(v[j][i].x, tag) || stale(v[j][i].y, tag)) {
                            v[j][i] = look2(from + j * G::CHUNK / 2 + i * 8);
                            again = true;
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

    /* c += this lane's pieces of a row in a stage times the input; left: columns from its first on. Lanes of
     * odd rows take their second run first: the rows lie in the same banks. */
    __device__ __forceinline__ void multiply_row(float4 &c, uint32_t from, int j, int32_t left)
    {
        uint4 p = make_uint4(0, 0, 0, 0), q = p;
        if (j * G::CHUNK + (g & 1) * G::RUN < left)
            p = load_piece(from + (g & 1) * 64);
        if (j * G::CHUNK + (~g & 1) * G::RUN < left)
            q = load_piece(from + (~g & 1) * 64);
        multiply_unit(c, p, q, in, j);
    }

    /* n rows of the block's, n <= PASS, times the input: the warps' sums into m.parts, the sums of squares of
     * their inputs into m.red; ends with a barrier. */
    __device__ __forceinline__ void multiply(int32_t n, int32_t cols, float sum_squares)
    {
        float *parts = m.parts + (buffer * WARPS + warp) * PASS;
        for (int32_t dot = 0; dot < n; dot += ROWS) {
            float4 c = make_float4(0, 0, 0, 0), c2 = c;
            const bool both = n - dot > ROWS / 2;
            int32_t left = cols - column(0, 0);
            asm volatile("" : "+r"(left));
#pragma unroll
            for (int j = 0; j < CHUNKS; j++) {
                if (j * G::CHUNK >= cols)
                    break;
                const uint32_t from = m.ring + at.stage * STAGE_SIZE + g * ROW_BYTES + warp * 128 + t * 16;
                barrier_wait(&m.full[at.stage], at.parity);
                multiply_row(c, from, j, left);
                if (both)
                    multiply_row(c2, from + ROWS / 2 * ROW_BYTES, j, left);
                __syncwarp();
                if (lane == 0)
                    barrier_arrive(&m.empty[at.stage]);
                at.next();
            }
            const float v = row_sum<W>(c, lane), v2 = row_sum<W>(c2, lane);
            if (t == 0) {
                parts[dot + g] = v;
                if (both)
                    parts[dot + ROWS / 2 + g] = v2;
            }
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

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

#endif
