/* step.cu's products with quantised weights (kernels/quant.h): another ring and another arithmetic. Tensor
 * cores multiply, because ordinary instructions would bind before memory does at 4 bits.
 *
 * A unit is what a warp fetches and multiplies at once: a tile of 32 rows of weights by 64 bytes of each (64
 * columns, of q4 128) and their scales. Warp w has the units w, w + WARPS, ... of all rows. A thread (g, t) =
 * (lane / 4, lane % 4) fetches for itself the pieces of 16 bytes number t of rows g, g + 8, g + 16 and g +
 * 24, which are what mma wants of it as A, given that columns may be taken in any order. B has eight columns,
 * of which a vector needs one: so column 2 k takes the high part and column 2 k + 1 the low part of the input
 * of the unit's group k of 32 columns, and both are zero elsewhere. A group's sum, which has a scale of its
 * own, comes out by itself.
 *
 * Of q8 and q4 the input is an integer of 16 bits, with a scale for each group, in two bytes, and sums are
 * exact. Of fp8 the weights become f16, exactly, and the input over its group's largest number is the sum of
 * two f16.
 *
 * Units go round a warp's ring. How many may be on their way at once is limited, and more so while the warp
 * waits for other blocks: what is asked for stands in one queue with what memory is asked for. */
#ifndef LTN_CUDA_STEP_QUANT_CUH
#define LTN_CUDA_STEP_QUANT_CUH

#include "kernels/cuda/quant.cuh"
#include "kernels/cuda/step.cuh"

enum {
    PIECES = 4,                     /* of a thread in a unit */
    TILE = 8 * PIECES,              /* rows of a unit */
    UNIT_ROW = 64,                  /* bytes of a row in a unit */
    PIECES_BYTES = TILE * UNIT_ROW, /* of a unit; then its scales */
};

static __device__ __forceinline__ void mma_s8(int c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                              uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ void mma_f16(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                               uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* What a thread has of a unit's input, as B: zero but where its column and its pieces are of one group. */
struct unit_input {
    uint4 first, second;
    float scale; /* of the group whose sums the thread gets */
};

/* 256 times the sum of high parts and the sum of low parts. */
static __device__ __forceinline__ float joined(int high, int low)
{
    return (float)(high * 256 + low);
}

/* What differs between the formats. COLS: of a unit; GROUPS: of a unit; GROUP_BYTES: of a group's input in
 * shared memory, high part first; SCALE_STEP: bytes of a row's scales that belong to a unit; MOST: what the
 * largest number of a group becomes. dot(): sums for rows g and g + 8, in out[0] and out[1], where scales are
 * at row g's (of a group's in groups' units). */
struct q8 {
    static constexpr int COLS = 64, GROUPS = 2, GROUP_BYTES = 64, SCALE_STEP = 4, ROW_SCALES = false;
    static constexpr float MOST = 32512, UNIT_OF_CODES = 1;
    static __device__ __forceinline__ void dot(float out[2], uint4 a, uint4 b, const struct unit_input &x)
    {
        int c[4] = {0, 0, 0, 0};
        mma_s8(c, a.x, b.x, a.y, b.y, x.first.x, x.first.y);
        mma_s8(c, a.z, b.z, a.w, b.w, x.first.z, x.first.w);
        out[0] = joined(c[0], c[1]), out[1] = joined(c[2], c[3]);
    }
};
struct fp8 {
    static constexpr int COLS = 64, GROUPS = 2, GROUP_BYTES = 128, SCALE_STEP = 0, ROW_SCALES = true;
    static constexpr float MOST = 1, UNIT_OF_CODES = 1;
    static __device__ __forceinline__ uint32_t two(uint32_t codes)
    {
        const __half2_raw h = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)codes, __NV_E4M3);
        return h.x | (uint32_t)h.y << 16;
    }
    static __device__ __forceinline__ void dot(float out[2], uint4 a, uint4 b, const struct unit_input &x)
    {
        float c[4] = {0, 0, 0, 0};
        mma_f16(c, two(a.x & 0xffff), two(b.x & 0xffff), two(a.x >> 16), two(b.x >> 16), x.first.x,
                x.first.y);
        mma_f16(c, two(a.y & 0xffff), two(b.y & 0xffff), two(a.y >> 16), two(b.y >> 16), x.first.z,
                x.first.w);
        mma_f16(c, two(a.z & 0xffff), two(b.z & 0xffff), two(a.z >> 16), two(b.z >> 16), x.second.x,
                x.second.y);
        mma_f16(c, two(a.w & 0xffff), two(b.w & 0xffff), two(a.w >> 16), two(b.w >> 16), x.second.z,
                x.second.w);
        out[0] = c[0] + c[1], out[1] = c[2] + c[3];
    }
};
struct q4 { /* a nibble in the high half of a byte is 16 times its code, as two's complement has it */
    static constexpr int COLS = 128, GROUPS = 4, GROUP_BYTES = 64, SCALE_STEP = 8, ROW_SCALES = false;
    static constexpr float MOST = 32512, UNIT_OF_CODES = 16;
    static __device__ __forceinline__ uint32_t low(uint32_t w)
    {
        return w << 4 & 0xf0f0f0f0u;
    }
    static __device__ __forceinline__ uint32_t high(uint32_t w)
    {
        return w & 0xf0f0f0f0u;
    }
    static __device__ __forceinline__ void dot(float out[2], uint4 a, uint4 b, const struct unit_input &x)
    {
        int c[4] = {0, 0, 0, 0};
        mma_s8(c, low(a.x), low(b.x), high(a.x), high(b.x), x.first.x, x.first.y);
        mma_s8(c, low(a.y), low(b.y), high(a.y), high(b.y), x.first.z, x.first.w);
        mma_s8(c, low(a.z), low(b.z), high(a.z), high(b.z), x.second.x, x.second.y);
        mma_s8(c, low(a.w), low(b.w), high(a.w), high(b.w), x.second.z, x.second.w);
        out[0] = joined(c[0], c[1]), out[1] = joined(c[2], c[3]);
    }
};

/* The type of weights that step.cu's kernel is made for: layers in Q, embedding and head in q8. */
template <typename Q> struct quant {
};
template <typename Q> struct paired<quant<Q>> {
    static constexpr bool value = true;
};
template <typename Q> struct rounded<quant<Q>> {
    static constexpr bool value = false;
};

template <typename Q> struct embedding<quant<Q>> {
    const int8_t *codes;
    const __half *scales;
    float scale;

    __device__ embedding(const struct step_args &a)
    {
        const int64_t id = __ldcg(a.id);
        codes = (const int8_t *)a.embed + id * a.D;
        scales = (const __half *)a.embed_scales + id * (a.D / LTN_GROUP);
        scale = a.embed_scale;
    }
    __device__ float operator()(int32_t c) const
    {
        return scale * ((float)codes[c] * __half2float(scales[c / LTN_GROUP]));
    }
};

/* Bytes of a unit, and of a ring that also takes the head's; a unit's input in shared memory, with scales. */
template <typename Q> struct unit_of {
    static constexpr int BARRIER = PIECES_BYTES + TILE * (Q::GROUPS == 4 ? 8 : 4), BYTES = BARRIER + 16,
                         INPUT = Q::GROUPS * Q::GROUP_BYTES + 16;
};
template <typename Q> struct ring<quant<Q>> {
    static constexpr int DEPTH = Q::ROW_SCALES ? 4 : 5, BYTES = DEPTH * WARPS * unit_of<Q>::BYTES,
                         STREAMS = false;
};

/* Units of a row, and how many of them this warp has. */
template <typename Q> static __host__ __device__ __forceinline__ int32_t all_units(int32_t cols)
{
    return cols / Q::COLS;
}
template <typename Q> static __device__ __forceinline__ int32_t own_units(int32_t cols)
{
    return (all_units<Q>(cols) + WARPS - 1 - (int32_t)threadIdx.x / 32) / WARPS;
}

/* 16 bytes into shared memory, or zeros. */
static __device__ __forceinline__ void copy_or_zero(uint32_t shared, const void *global, bool copy)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(copy ? 16 : 0)
                 : "memory");
}

/* BYTES into shared memory, or zeros. */
template <int BYTES>
static __device__ __forceinline__ void copy_few_or_zero(uint32_t shared, const void *global, bool copy)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared), "l"(global),
                 "r"(copy ? BYTES : 0), "n"(BYTES)
                 : "memory");
}

/* Arrives when all copies of this thread up to now are there. */
static __device__ __forceinline__ void arrive_with_copies(uint32_t barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

static __device__ __forceinline__ bool has_landed(uint32_t barrier, uint32_t parity)
{
    uint32_t done;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return __all_sync(0xffffffffu, done); /* it has to be the same for all lanes */
}

static __device__ __forceinline__ void await_landing(uint32_t barrier, uint32_t parity)
{
#if __CUDA_ARCH__ >= 900
#define WAIT "mbarrier.try_wait" /* which may rest meanwhile */
#else
#define WAIT "mbarrier.test_wait"
#endif
    uint32_t done;
    do
        asm volatile("{\n.reg .pred p;\n" WAIT ".parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    while (!done);
#undef WAIT
}

/* The units of this warp in the order of their use. All lanes have the same but for where they copy. */
template <typename Q> struct feed {
    static constexpr int DEPTH = ring<quant<Q>>::DEPTH, UNIT = unit_of<Q>::BYTES,
                         BARRIER = unit_of<Q>::BARRIER;

    struct place { /* in the ring: shared memory, and the parity of the round */
        uint32_t at, parity;
    };

    const struct step_args &a;
    const struct share *shares; /* [HEAD + 1] */
    uint32_t begin, end;        /* shared memory: this warp's units */
    struct place in, landed, out;
    int32_t n_coming, n_kept; /* units on their way; on their way or not yet used */
    int32_t room;             /* for units: none where nothing is left to fetch */
    /* The unit that comes next: */
    const uint8_t *piece, *scales;   /* this lane's, of row g and of the row whose scales it brings */
    int32_t half, step, scales_step; /* bytes to row g + 8; from a tile's last unit on to the next tile */
    int32_t unit_scales;             /* bytes from a unit's scales to the next */
    int32_t at, last;                /* products */
    int32_t coming, coming_idle;     /* units on their way, at most; while waiting */
    int32_t dots, left, n_units;     /* rows of the block from this tile on; units of the tile's */

    __device__ __forceinline__ feed(const struct step_args &args, const struct share *all, uint32_t shared)
        : a(args), shares(all)
    {
        const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        begin = shared + warp * DEPTH * UNIT, end = begin + DEPTH * UNIT;
        in = landed = out = {begin, 0};
        n_coming = n_kept = 0, room = DEPTH;
        coming = a.coming, coming_idle = a.coming_idle;
        if (lane < DEPTH)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 32;" ::"r"(begin + lane * UNIT + BARRIER)
                         : "memory");
        __syncwarp();
        at = 0, last = N_PHASES * a.n_layers;
        enter();
        top_up(coming);
    }

    __device__ __forceinline__ void advance(struct place &p)
    {
        p.at += UNIT;
        if (p.at == end)
            p.at = begin, p.parity ^= 1;
    }

    template <typename P>
    __device__ __forceinline__ void enter_product(int phase, const uint8_t *w, const uint8_t *w2,
                                                  const uint8_t *s, const uint8_t *s2)
    {
        const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, pair = phase == GLU;
        const int32_t cols = shares[phase].cols, first = shares[phase].first, row = lane / 4;
        const int32_t row_bytes = P::GROUPS == 4 ? cols / 2 : cols;
        const int32_t scale_bytes = P::ROW_SCALES ? 4 : cols / LTN_GROUP * 2;
        unit_scales = P::ROW_SCALES ? 0 : P::GROUPS * 2;
        half = (8 >> pair) * row_bytes;
        step = PIECES * half - (n_units - 1) * WARPS * UNIT_ROW;
        scales_step = (TILE >> pair) * scale_bytes - (n_units - 1) * WARPS * unit_scales;
        piece = (pair && row & 1 ? w2 : w) + (int64_t)(first + (row >> pair)) * row_bytes + warp * UNIT_ROW +
                lane % 4 * 16;
        scales = (pair && lane & 1 ? s2 : s) + (int64_t)(first + (lane >> pair)) * scale_bytes +
                 warp * unit_scales;
        left = n_units;
    }

    __device__ __forceinline__ void enter()
    {
        for (; at < last; at++) {
            const int phase = at % N_PHASES;
            dots = shares[phase].n_dots, n_units = own_units<Q>(shares[phase].cols);
            if (dots == 0 || n_units == 0)
                continue;
            const struct step_layer &l = a.layers[at / N_PHASES % MAX_LAYERS];
            const void *w = phase == QKVU ? l.qkvu : phase == OUT ? l.out : phase == GLU ? l.l1 : l.l3;
            const void *s = l.scales[phase == QKVU ? 0 : phase == OUT ? 1 : phase == GLU ? 2 : 4];
            enter_product<Q>(phase, (const uint8_t *)w, (const uint8_t *)l.l2, (const uint8_t *)s,
                             (const uint8_t *)l.scales[3]);
            return;
        }
        dots = at == last ? shares[HEAD].n_dots : 0, n_units = own_units<q8>(shares[HEAD].cols);
        if (dots == 0 || n_units == 0)
            room = 0;
        else
            enter_product<q8>(HEAD, (const uint8_t *)a.head, NULL, (const uint8_t *)a.head_scales, NULL);
    }

    __device__ __forceinline__ void fetch()
    {
        const int32_t lane = threadIdx.x % 32, row = lane / 4;
        const bool more = left > 1;
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            copy_or_zero(in.at + i * 512 + lane * 16, piece + i * half, row + 8 * i < dots);
        if (Q::GROUPS == 4 && unit_scales == 8)
            copy_few_or_zero<8>(in.at + PIECES_BYTES + lane * 8, scales, lane < dots);
        else
            copy_few_or_zero<4>(in.at + PIECES_BYTES + lane * 4, scales, lane < dots);
        arrive_with_copies(in.at + BARRIER);
        advance(in);
        n_coming++, n_kept++;
        piece += more ? WARPS * UNIT_ROW : step;
        scales += more ? WARPS * unit_scales : scales_step;
        if (!more) {
            left = n_units + 1;
            dots -= TILE;
            if (dots <= 0) {
                at++;
                enter();
                left++;
            }
        }
        left--;
    }

    /* Whether one more may be on its way. */
    __device__ __forceinline__ bool may_come(int32_t most)
    {
        if (n_coming < most)
            return true;
        if (!has_landed(landed.at + BARRIER, landed.parity))
            return false;
        advance(landed);
        n_coming--;
        return true;
    }

    __device__ __forceinline__ void top_up(int32_t most)
    {
        while (n_kept < room && may_come(most))
            fetch();
    }

    /* Shared memory of the oldest unit, when it is there. */
    __device__ __forceinline__ uint32_t oldest()
    {
        await_landing(out.at + BARRIER, out.parity);
        if (n_coming == n_kept) {
            advance(landed);
            n_coming--;
        }
        return out.at;
    }

    /* It has been read. */
    __device__ __forceinline__ void used()
    {
        __syncwarp();
        advance(out);
        n_kept--;
        if (n_kept < room && may_come(coming))
            fetch();
    }

    /* Beside waiting. */
    __device__ __forceinline__ void idle()
    {
        top_up(coming_idle);
    }
};

static __device__ __forceinline__ float load_shared_f32(uint32_t shared)
{
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(shared) : "memory");
    return v;
}
static __device__ __forceinline__ float load_shared_f16(uint32_t shared)
{
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(shared) : "memory");
    return __half2float(__ushort_as_half(v));
}

template <typename Q> struct worker<quant<Q>> {
    const struct room &m;
    struct feed<Q> f;
    int32_t lane, warp, buffer;
    float squares; /* of this lane's columns of the input */

    __device__ __forceinline__ worker(const struct step_args &a, const struct room &room, uint4 *ring)
        : m(room), f(a, room.shares, (uint32_t)__cvta_generic_to_shared(ring))
    {
        lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        buffer = 0;
    }

    __device__ __forceinline__ void idle()
    {
        f.idle();
    }

    /* Input is taken in runs of 64 columns, two a lane: number i, and how many this warp has. */
    template <typename P> __device__ __forceinline__ int32_t column(int32_t i) const
    {
        constexpr int RUNS = P::COLS / 64;
        return (i / RUNS * WARPS + warp) * P::COLS + i % RUNS * 64 + 2 * lane;
    }
    template <typename P> static __device__ __forceinline__ int32_t runs(int32_t cols)
    {
        return own_units<P>(cols) * (P::COLS / 64);
    }

    /* Of a run, columns a and b of this lane; 16 lanes have a group. */
    template <typename P> __device__ __forceinline__ void put(int32_t i, float a, float b)
    {
        constexpr int RUNS = P::COLS / 64;
        uint8_t *in = reinterpret_cast<uint8_t *>(m.in) + (i / RUNS * WARPS + warp) * unit_of<P>::INPUT;
        const int32_t group = i % RUNS * 2 + lane / 16, c = 2 * (lane % 16);
        float most = fmaxf(fabsf(a), fabsf(b));
        for (int offset = 8; offset > 0; offset /= 2)
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
        const float inverse = most > 1e-30f ? __fdividef(P::MOST, most) : 0;
        if (c == 0)
            reinterpret_cast<float *>(in + P::GROUPS * P::GROUP_BYTES)[group] =
                most * (1 / (P::MOST * P::UNIT_OF_CODES));
        in += group * P::GROUP_BYTES;
        if (P::ROW_SCALES) {
            const __half2 high = __floats2half2_rn(a * inverse, b * inverse);
            const float2 back = __half22float2(high);
            *reinterpret_cast<__half2 *>(in + 2 * c) = high;
            *reinterpret_cast<__half2 *>(in + 64 + 2 * c) =
                __floats2half2_rn(a * inverse - back.x, b * inverse - back.y);
        } else {
            /* The low 16 bits of 1.5 * 2^23 + 128 + n are a high byte and a low one plus 128. */
            const uint32_t n0 = __float_as_uint(fmaf(a, inverse, 12583040.0f)),
                           n1 = __float_as_uint(fmaf(b, inverse, 12583040.0f));
            const int32_t to =
                P::GROUPS == 4 ? c / 4 % 4 * 8 + c / 16 * 4 + c % 4 : c; /* as q4's dot() has it */
            *reinterpret_cast<uint16_t *>(in + to) = (uint16_t)__byte_perm(n0, n1, 0x0051);
            *reinterpret_cast<uint16_t *>(in + 32 + to) = (uint16_t)(__byte_perm(n0, n1, 0x0040) ^ 0x8080);
        }
    }

    template <typename P>
    __device__ __forceinline__ void gather_as(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        constexpr int N = 4;
        const int32_t n = runs<P>(cols);
        squares = 0;
        for (int32_t from = 0; from < n; from += N) {
            ulonglong2 v[N];
            await_all(
                v, [&](int i) { return words + column<P>(from + i); },
                [&](int i) { return from + i < n && column<P>(from + i) < cols; }, tag, *this);
#pragma unroll
            for (int i = 0; i < N; i++)
                if (from + i < n) {
                    const float a = value_of(v[i].x), b = value_of(v[i].y);
                    squares = fmaf(b, b, fmaf(a, a, squares));
                    put<P>(from + i, a, b);
                }
        }
        __syncwarp();
    }
    __device__ __forceinline__ void gather(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        gather_as<Q>(words, cols, tag);
    }

    __device__ __forceinline__ void gather_act(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        constexpr int N = 12;
        const int32_t n = runs<Q>(cols);
        for (int32_t from = 0; from < n; from += N) {
            uint64_t v[N];
            await_all(
                v, [&](int i) { return words + column<Q>(from + i) / 2; },
                [&](int i) { return from + i < n && column<Q>(from + i) < cols; }, tag, *this);
#pragma unroll
            for (int i = 0; i < N; i++)
                if (from + i < n) {
                    const float2 f = values_of(v[i]);
                    put<Q>(from + i, f.x, f.y);
                }
        }
        __syncwarp();
    }

    __device__ __forceinline__ void gather_gated(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        constexpr int N = 4;
        const int32_t n = runs<Q>(cols);
        squares = 0;
        for (int32_t from = 0; from < n; from += N) {
            ulonglong2 v[N];
            await_all(
                v, [&](int i) { return words + column<Q>(from + i); },
                [&](int i) { return from + i < n && column<Q>(from + i) < cols; }, tag, *this);
#pragma unroll
            for (int i = 0; i < N; i++)
                if (from + i < n) {
                    const float2 a = values_of(v[i].x), b = values_of(v[i].y);
                    squares = fmaf(b.x, b.x, fmaf(a.x, a.x, squares));
                    put<Q>(from + i, a.x * a.y, b.x * b.y);
                }
        }
        __syncwarp();
    }

    __device__ __forceinline__ void gather_row(const struct embedding<quant<Q>> &row, int32_t cols)
    {
        const int32_t n = runs<Q>(cols);
        squares = 0;
        for (int32_t i = 0; i < n; i++) {
            const int32_t c = column<Q>(i);
            const float a = c < cols ? row(c) : 0, b = c < cols ? row(c + 1) : 0;
            squares = fmaf(b, b, fmaf(a, a, squares));
            put<Q>(i, a, b);
        }
        __syncwarp();
    }

    /* This warp's sums of a tile's rows: of row g + 8 t. */
    template <typename P> __device__ __forceinline__ float tile_sums(int32_t n_units)
    {
        const int32_t g = lane / 4, t = lane % 4;
        /* The group of this thread's pieces, where B is not zero, and the group of its sums. */
        const int32_t own = P::GROUPS == 4 ? t : t / 2, group = P::GROUPS == 4 ? t : t % 2;
        const bool is_own = g / 2 == own;
        const uint8_t *in = reinterpret_cast<const uint8_t *>(m.in) + warp * unit_of<P>::INPUT;
        const uint8_t *x = in + own * P::GROUP_BYTES + g % 2 * (P::GROUP_BYTES / 2) +
                           (P::GROUPS == 4 ? 0 : t % 2 * (P::GROUP_BYTES / 4));
        const float *x_scale = reinterpret_cast<const float *>(in + P::GROUPS * P::GROUP_BYTES) + group;
        constexpr int ROW_SCALE = P::ROW_SCALES ? 4 : 2 * P::GROUPS; /* bytes */
        const int32_t scale_at = PIECES_BYTES + g * ROW_SCALE + (P::ROW_SCALES ? 0 : group * 2);
        float acc[PIECES] = {}, row_scale[PIECES] = {};
        struct unit_input b = {};
        for (int32_t unit = 0; unit < n_units; unit++) {
            if (is_own) { /* elsewhere it stays zero */
                b.first = reinterpret_cast<const uint4 *>(x)[0];
                if (P::GROUPS == 4 || P::ROW_SCALES)
                    b.second = reinterpret_cast<const uint4 *>(x)[1];
            }
            const float scale = *x_scale;
            const uint32_t from = f.oldest();
            uint4 w[PIECES];
            float scales[PIECES], sum[PIECES];
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                w[i] = load_shared(from + i * 512 + lane * 16);
                if (P::ROW_SCALES)
                    row_scale[i] = load_shared_f32(from + scale_at + i * 8 * ROW_SCALE);
                else
                    scales[i] = load_shared_f16(from + scale_at + i * 8 * ROW_SCALE);
            }
#pragma unroll
            for (int i = 0; i < PIECES; i += 2)
                P::dot(sum + i, w[i], w[i + 1], b);
            f.used();
#pragma unroll
            for (int i = 0; i < PIECES; i++)
                acc[i] = fmaf(sum[i], P::ROW_SCALES ? scale : scales[i] * scale, acc[i]);
            x += WARPS * unit_of<P>::INPUT;
            x_scale += WARPS * unit_of<P>::INPUT / (int)sizeof(float);
        }
        if (P::ROW_SCALES)
            for (int i = 0; i < PIECES; i++)
                acc[i] *= row_scale[i];
        const bool b1 = t & 1, b2 = t & 2;
        float two[2];
        for (int i = 0; i < 2; i++)
            two[i] = (b1 ? acc[2 * i + 1] : acc[2 * i]) +
                     __shfl_xor_sync(0xffffffffu, b1 ? acc[2 * i] : acc[2 * i + 1], 1);
        return (b2 ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, b2 ? two[0] : two[1], 2);
    }

    template <typename P, typename F>
    __device__ __forceinline__ void product_as(const struct share &s, F publish)
    {
        const int32_t n_units = own_units<P>(s.cols);
        const float square = warp_sum(squares);
        for (int32_t from = 0; from < s.n_dots; from += PASS) {
            float *parts = m.parts + buffer * GROUPS * WARPS * GROUP, *red = m.red + buffer * WARPS;
            const int32_t n = min(s.n_dots - from, (int32_t)PASS);
            static_assert(TILE == GROUP, "a tile's sums go together");
            for (int32_t tile = 0; tile * TILE < n; tile++)
                parts[(tile * WARPS + warp) * GROUP + lane % 4 * 8 + lane / 4] = tile_sums<P>(n_units);
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
    template <typename F> __device__ __forceinline__ void product(const struct share &s, F publish)
    {
        product_as<Q>(s, publish);
    }

    /* The head's. */
    __device__ __forceinline__ void gather_last(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        gather_as<q8>(words, cols, tag);
    }
    template <typename F> __device__ __forceinline__ void product_last(const struct share &s, F publish)
    {
        product_as<q8>(s, publish);
    }
};

#endif
