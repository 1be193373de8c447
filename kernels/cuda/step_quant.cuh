/* step.cu's products with quantised weights (kernels/quant.h): their tiles, and another arithmetic. Tensor
 * cores multiply, because ordinary instructions would bind before memory does at 4 bits.
 *
 * A warp's unit of a tile is 128 bytes of each line (128 columns, of q4 256). Lane 4 g + t has the pieces of
 * 16 bytes number 2 t and 2 t + 1 of line g, which are what mma wants of it as A, given that columns may be
 * taken in any order. B has eight columns, of which a vector needs one: so column 2 k takes the high part and
 * column 2 k + 1 the low part of the input of the columns that lanes with t = k have, and both are zero
 * elsewhere. So lane 4 g + t gets the sum of its own pieces, and a group of 32 columns, which has a scale of
 * its own, is one such piece in q4, and both in q8.
 *
 * Of q8 and q4 the input is an integer of 16 bits in two bytes, with a scale for each run of 64 columns, and
 * sums are exact. Of fp8 the weights become f16, exactly, and the input over its run's largest number is the
 * sum of two f16; a row's scale comes in where the warps' sums are added up. */
#ifndef LTN_CUDA_STEP_QUANT_CUH
#define LTN_CUDA_STEP_QUANT_CUH

#include "kernels/cuda/quant.cuh"
#include "kernels/cuda/step.cuh"

enum { UNIT_BYTES = LINE_BYTES / WARPS };

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

/* What a thread has of a unit's input, as B: zero but where its column and its pieces are one lane's. */
struct unit_input {
    uint4 a[2], b[2]; /* for one piece and for the other; of q8 one uint4 each */
    float scale;      /* of the groups whose sums the thread gets */
};

/* 256 times the sum of high parts and the sum of low parts. */
static __device__ __forceinline__ float joined(int high, int low)
{
    return (float)(high * 256 + low);
}

static __device__ __forceinline__ float2 f32_of_f16(uint32_t two)
{
    return __half22float2(*reinterpret_cast<const __half2 *>(&two));
}

/* Of pieces whose words are unpacked into two: word by word, with the input of its columns. */
template <typename Q, typename T>
static __device__ __forceinline__ void add_words(T c[4], T d[4], uint4 a, uint4 b, const struct unit_input &x)
{
    Q::add(c, d, a.x, b.x, x.a[0].x, x.a[0].y, x.b[0].x, x.b[0].y);
    Q::add(c, d, a.y, b.y, x.a[0].z, x.a[0].w, x.b[0].z, x.b[0].w);
    Q::add(c, d, a.z, b.z, x.a[1].x, x.a[1].y, x.b[1].x, x.b[1].y);
    Q::add(c, d, a.w, b.w, x.a[1].z, x.a[1].w, x.b[1].z, x.b[1].w);
}

/* What differs between the formats. COLS: of a unit; GROUPS: of a unit; GROUP_BYTES: of a group's input in
 * shared memory, high part first; RATIO: bytes of weights to one of scales, 0 where a row has one; MOST: what
 * the largest number of a run of the input becomes. multiply(), then sum(): what a lane's pieces a and b of a
 * line add. Piece a takes the place of row g and b that of row g + 8, so of what mma makes of them with the
 * input of a, numbers 0 and 1 are wanted, and with the input of b numbers 2 and 3. */
struct q8 {
    static constexpr int COLS = 128, GROUPS = 4, GROUP_BYTES = 64, RATIO = 16, CREWS = 1;
    using outer = q8;
    static constexpr float MOST = 32512, UNIT_OF_CODES = 1;
    static __device__ __forceinline__ int2 multiply(uint4 a, uint4 b, const struct unit_input &x)
    {
        int c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
        mma_s8(c, a.x, b.x, a.y, b.y, x.a[0].x, x.a[0].y);
        mma_s8(d, a.x, b.x, a.y, b.y, x.b[0].x, x.b[0].y);
        mma_s8(c, a.z, b.z, a.w, b.w, x.a[0].z, x.a[0].w);
        mma_s8(d, a.z, b.z, a.w, b.w, x.b[0].z, x.b[0].w);
        return make_int2(c[0] + d[2], c[1] + d[3]);
    }
    static __device__ __forceinline__ float sum(int2 parts, uint32_t scale)
    {
        return joined(parts.x, parts.y) * f32_of_f16(scale).x;
    }
};
struct fp8 {
    static constexpr int COLS = 128, GROUPS = 4, GROUP_BYTES = 128, RATIO = 0, CREWS = 1;
    using outer = q8;
    static constexpr float MOST = 1, UNIT_OF_CODES = 1;
    static __device__ __forceinline__ uint32_t low(uint32_t codes)
    {
        const __half2_raw h = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)codes, __NV_E4M3);
        return h.x | (uint32_t)h.y << 16;
    }
    static __device__ __forceinline__ void add(float c[4], float d[4], uint32_t a, uint32_t b, uint32_t xa0,
                                               uint32_t xa1, uint32_t xb0, uint32_t xb1)
    {
        const uint32_t a0 = low(a), b0 = low(b), a1 = low(a >> 16), b1 = low(b >> 16);
        mma_f16(c, a0, b0, a1, b1, xa0, xa1);
        mma_f16(d, a0, b0, a1, b1, xb0, xb1);
    }
    static __device__ __forceinline__ float multiply(uint4 a, uint4 b, const struct unit_input &x)
    {
        float c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
        add_words<fp8>(c, d, a, b, x);
        return (c[0] + c[1]) + (d[2] + d[3]);
    }
    static __device__ __forceinline__ float sum(float all, uint32_t)
    {
        return all;
    }
};
struct q4 { /* a nibble in the high half of a byte is 16 times its code, as two's complement has it */
    static constexpr int COLS = 256, GROUPS = 8, GROUP_BYTES = 64, RATIO = 8, CREWS = 1;
    using outer = q8;
    static constexpr float MOST = 32512, UNIT_OF_CODES = 16;
    static constexpr uint32_t HIGH = 0xf0f0f0f0u;
    static __device__ __forceinline__ void add(int c[4], int d[4], uint32_t a, uint32_t b, uint32_t xa0,
                                               uint32_t xa1, uint32_t xb0, uint32_t xb1)
    {
        const uint32_t a0 = a << 4 & HIGH, b0 = b << 4 & HIGH, a1 = a & HIGH, b1 = b & HIGH;
        mma_s8(c, a0, b0, a1, b1, xa0, xa1);
        mma_s8(d, a0, b0, a1, b1, xb0, xb1);
    }
    static __device__ __forceinline__ int4 multiply(uint4 a, uint4 b, const struct unit_input &x)
    {
        int c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
        add_words<q4>(c, d, a, b, x);
        return make_int4(c[0], c[1], d[2], d[3]);
    }
    static __device__ __forceinline__ float sum(int4 parts, uint32_t scales)
    {
        const float2 f = f32_of_f16(scales);
        return fmaf(joined(parts.x, parts.y), f.x, joined(parts.z, parts.w) * f.y);
    }
};

/* The same for large models: half of the warps share the tiles of some rows, and have two units of each line,
 * while the others have the next rows. That takes fewer instructions a byte, but more time for a tile. */
struct q8_large : q8 {
    static constexpr int CREWS = 2;
    using outer = q8_large;
};
struct fp8_large : fp8 {
    static constexpr int CREWS = 2;
    using outer = q8_large;
};
struct q4_large : q4 {
    static constexpr int CREWS = 2;
    using outer = q8_large;
};

/* The type of weights that step.cu's kernel is made for: layers in Q, embedding and head in q8. */
template <typename Q> struct quant {
};
template <typename Q> struct paired<quant<Q>> {
    static constexpr bool value = true;
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

/* Eight lanes, which read 16 bytes each at once, have every other piece of two lines: PITCH puts these into
 * different banks. */
template <typename Q> struct tile<quant<Q>> {
    static constexpr int PITCH = LINE_BYTES + 16, RATIO = Q::RATIO;
    static __host__ __device__ __forceinline__ int32_t row_bytes(int32_t cols)
    {
        return cols / Q::COLS * UNIT_BYTES;
    }
};
template <typename Q> struct outer<quant<Q>> {
    using type = quant<typename Q::outer>;
};

template <typename Q> struct ring<quant<Q>> {
    static constexpr int TILES = 9, SLOT = LINES * tile<quant<Q>>::PITCH, CONSUMERS = WARPS / Q::CREWS;
    static constexpr int BLOCK = LINES * LINE_BYTES / (Q::RATIO == q4::RATIO ? q4::RATIO : q8::RATIO);
    /* When the first tile of some rows enters the ring, TILES - 1 tiles may be in it. If a row takes `chunks`
     * tiles at most, at least blocks - 3 chunks + 2 others are used before the same blocks are again: up to
     * chunks - 1 stay unused at the end, and both the old and the new blocks may reach chunks - 1 beyond
     * those they share. */
    static __host__ int32_t blocks(const struct step_args &a)
    {
        const int32_t chunks[] = {cut_of<quant<Q>>(a.D).chunks, cut_of<quant<Q>>(a.H).chunks,
                                  cut_of<quant<Q>>(a.G).chunks, cut_of<quant<q8>>(a.D).chunks};
        int32_t most = 0;
        for (int i = Q::RATIO ? 0 : 3; i < 4; i++)
            most = chunks[i] > most ? chunks[i] : most;
        return TILES - 1 + 3 * most - 2;
    }
};

/* A unit's input in shared memory: pieces of what all lanes have, STRIDE bytes from one to the next, which
 * puts them into different banks, and a scale for each run of 64 columns. */
template <typename Q> struct unit_of {
    static constexpr int RUNS = Q::COLS / 64, STRIDE = 128 + 16,
                         SCALES = Q::GROUPS * Q::GROUP_BYTES / 128 * STRIDE, INPUT = SCALES + 16;
    static_assert(RUNS * sizeof(float) <= 16, "room for the scales");
};
template <typename Q> static __host__ __device__ __forceinline__ int32_t input_bytes(int32_t cols)
{
    return cols / Q::COLS * unit_of<Q>::INPUT;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* A lane's scales of a line of a unit: two f16 of q4, one of q8. */
template <typename Q> static __device__ __forceinline__ uint32_t load_scales(uint32_t shared)
{
    uint32_t v = 0;
    uint16_t one;
    if (Q::RATIO == q4::RATIO) {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared) : "memory");
    } else if (Q::RATIO) {
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(one) : "r"(shared) : "memory");
        v = one;
    }
    return v;
}

template <typename Q> struct worker<quant<Q>> : crew<quant<Q>> {
    using crew<quant<Q>>::m, crew<quant<Q>>::r, crew<quant<Q>>::at, crew<quant<Q>>::lane,
        crew<quant<Q>>::warp, crew<quant<Q>>::squares;
    using crew<quant<Q>>::release;
    using crew<quant<Q>>::crew;

    /* Input is taken in runs of 64 columns, two a lane, which go round the warps: this warp's number i, and
     * how many it has. */
    __device__ __forceinline__ int32_t column(int32_t i) const
    {
        return (i * WARPS + warp) * 64 + 2 * lane;
    }
    __device__ __forceinline__ int32_t runs(int32_t cols) const
    {
        return (cols / 64 + WARPS - 1 - warp) / WARPS;
    }

    /* All warps read what each has put. */
    __device__ __forceinline__ void ready()
    {
        meet();
        if (threadIdx.x == 0)
            *r.waiting = false;
    }

    /* Of a run, columns a and b of this lane; 16 lanes have a group. */
    template <typename P> __device__ __forceinline__ void put(int32_t i, float a, float b)
    {
        constexpr int RUNS = unit_of<P>::RUNS, STRIDE = unit_of<P>::STRIDE;
        const int32_t run = i * WARPS + warp;
        uint8_t *in = reinterpret_cast<uint8_t *>(m.in) + run / RUNS * unit_of<P>::INPUT;
        const int32_t group = run % RUNS * 2 + lane / 16, c = 2 * (lane % 16);
        /* As integers, floats that are not negative have the same order. */
        const uint32_t order = __reduce_max_sync(0xffffffffu, __float_as_uint(fmaxf(fabsf(a), fabsf(b))));
        const float most = __uint_as_float(order);
        const float inverse = most > 1e-30f ? __fdividef(P::MOST, most) : 0;
        if (lane == 0)
            reinterpret_cast<float *>(in + unit_of<P>::SCALES)[run % RUNS] =
                most * (1 / (P::MOST * P::UNIT_OF_CODES));
        /* Piece by piece, the two parts of what each quarter of the lanes has, as load_input() wants it. */
        if (P::RATIO == 0) {
            const __half2 high = __floats2half2_rn(a * inverse, b * inverse);
            const float2 back = __half22float2(high);
            in += c / 8 * STRIDE + group * 32 + c % 8 * 2;
            *reinterpret_cast<__half2 *>(in) = high;
            *reinterpret_cast<__half2 *>(in + 16) =
                __floats2half2_rn(a * inverse - back.x, b * inverse - back.y);
        } else {
            /* The low 16 bits of 1.5 * 2^23 + 128 + n are a high byte and a low one plus 128. */
            const uint32_t n0 = __float_as_uint(fmaf(a, inverse, 12583040.0f)),
                           n1 = __float_as_uint(fmaf(b, inverse, 12583040.0f));
            if (P::RATIO == q4::RATIO) { /* as q4's multiply() has columns */
                const int32_t to = c / 4 % 4 * 8 + c / 16 * 4 + c % 4;
                in += (group % 2 * 2 + to / 16) * STRIDE + group / 2 * 32 + to % 16;
            } else {
                in += c / 16 * STRIDE + group * 32 + c % 16;
            }
            *reinterpret_cast<uint16_t *>(in) = (uint16_t)__byte_perm(n0, n1, 0x0051);
            *reinterpret_cast<uint16_t *>(in + 16) = (uint16_t)(__byte_perm(n0, n1, 0x0040) ^ 0x8080);
        }
    }

    /* From words of two columns each; the squares of these where a norm is to follow. */
    template <typename P, int N, bool SQUARES>
    __device__ __forceinline__ void gather_pairs(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        const int32_t n = runs(cols);
        squares = 0;
        for (int32_t from = 0; from < n; from += N) {
            uint64_t v[N];
            await_all(
                v, [&](int i) { return words + column(from + i) / 2; }, [&](int i) { return from + i < n; },
                tag);
#pragma unroll
            for (int i = 0; i < N; i++)
                if (from + i < n) {
                    const float2 f = values_of(v[i]);
                    if (SQUARES)
                        squares = fmaf(f.y, f.y, fmaf(f.x, f.x, squares));
                    put<P>(from + i, f.x, f.y);
                }
        }
        ready();
    }
    __device__ __forceinline__ void gather(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        gather_pairs<Q, 4, true>(words, cols, tag);
    }
    __device__ __forceinline__ void gather_act(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        gather_pairs<Q, 12, false>(words, cols, tag);
    }

    __device__ __forceinline__ void gather_gated(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        constexpr int N = 4;
        const int32_t n = runs(cols);
        squares = 0;
        for (int32_t from = 0; from < n; from += N) {
            ulonglong2 v[N];
            await_all(
                v, [&](int i) { return words + column(from + i); }, [&](int i) { return from + i < n; }, tag);
#pragma unroll
            for (int i = 0; i < N; i++)
                if (from + i < n) {
                    const float2 a = values_of(v[i].x), b = values_of(v[i].y);
                    squares = fmaf(b.x, b.x, fmaf(a.x, a.x, squares));
                    put<Q>(from + i, a.x * a.y, b.x * b.y);
                }
        }
        ready();
    }

    __device__ __forceinline__ void gather_row(const struct embedding<quant<Q>> &row, int32_t cols)
    {
        const int32_t n = runs(cols);
        squares = 0;
        for (int32_t i = 0; i < n; i++) {
            const int32_t c = column(i);
            const float a = row(c), b = row(c + 1);
            squares = fmaf(b, b, fmaf(a, a, squares));
            put<Q>(i, a, b);
        }
        ready();
    }

    /* Where this lane finds what it has of a product's tiles. */
    struct view {
        struct cut cut;
        uint32_t pieces;       /* of line g of a tile */
        int32_t scales;        /* of line g, in the block of the tile's rows */
        int32_t sub;           /* which of a line's rows this warp has */
        int32_t unit, n_units; /* the first of a row that this warp has, and how many there are in all */
        const uint8_t *x, *x_scale;
        bool two, own; /* matrices; whether B is not zero, as lanes with t have what column g is for */
    } view;
    bool turn = false; /* which half of the warps has the next rows */

    template <typename P>
    __device__ __forceinline__ void prepare_as(const struct share &s, const struct source &from)
    {
        constexpr int CREW = WARPS / P::CREWS;
        const int32_t g = lane / 4, t = lane % 4, place = warp % CREW * P::CREWS; /* units of a line */
        view.cut = cut_of<quant<P>>(s.cols);
        view.two = from.w2, view.own = t == g / 2;
        const int32_t fold = view.cut.fold;
        view.unit = place & ((WARPS >> fold) - 1), view.n_units = s.cols / P::COLS;
        view.sub = place / 4 >> (2 - fold);
        static_assert(WARPS == 16, "a row has 16, 8 or 4 units of a line");
        /* The rows of a tile in memory: those of the second matrix after those of the first. */
        const int32_t row = ((view.two ? g % 2 * (LINES / 2) + g / 2 : g) << fold) + view.sub;
        view.scales =
            row * scale_bytes<quant<P>>(view.cut) + (view.unit * P::GROUPS + t * (P::GROUPS / 4)) * 2;
        view.pieces = r.tiles + g * tile<quant<P>>::PITCH + place * UNIT_BYTES + t * 32;
        const uint8_t *in = reinterpret_cast<const uint8_t *>(m.in) + view.unit * unit_of<P>::INPUT;
        view.x = in + g * 16; /* g is 2 t and a part, where it matters */
        view.x_scale = in + unit_of<P>::SCALES + t * unit_of<P>::RUNS / 4 * sizeof(float);
    }
    __device__ __forceinline__ void prepare(const struct share &s, const struct source &from)
    {
        prepare_as<Q>(s, from);
    }

    template <typename P>
    __device__ __forceinline__ void load_input(struct unit_input &x, int32_t there) const
    {
        constexpr int NEXT = unit_of<P>::STRIDE / 16;
        const uint4 *from = reinterpret_cast<const uint4 *>(view.x + there);
        if (view.own) {
            x.a[0] = from[0];
            if (P::RATIO == q8::RATIO)
                x.b[0] = from[NEXT];
            else
                x.a[1] = from[NEXT], x.b[0] = from[2 * NEXT], x.b[1] = from[3 * NEXT];
        }
        x.scale = *reinterpret_cast<const float *>(view.x_scale + there);
    }

    /* This warp's sums of the rows of a group, by tiles. The first group of a product adds up squares. */
    template <typename P>
    __device__ __forceinline__ void group_sums(float *to, int32_t rows, struct unit_input &x, bool begins)
    {
        const struct cut cut = view.cut;
        const int32_t g = lane / 4, t = lane % 4;
        const bool second = warp >= WARPS / P::CREWS;
        if (begins)
            squares = warp_sum(squares);
        for (; rows > 0; rows -= LINES << cut.fold) {
            uint32_t block = P::RATIO ? at.take(r, cut.chunks) + view.scales : 0;
            int32_t unit = view.unit, input = 0;
            float sum = 0;
            const bool mine = P::CREWS == 1 || turn == second;
            for (int32_t k = 0; k < cut.chunks; k++) {
                if (mine) {
                    barrier_wait(&r.full[at.tile], at.parity);
                    const uint32_t pieces = view.pieces + at.tile * r.SLOT;
#pragma unroll
                    for (int i = 0; i < P::CREWS; i++)
                        if (unit + i < view.n_units) {
                            const uint32_t piece = pieces + i * UNIT_BYTES;
                            if (P::CREWS > 1 || cut.chunks > 1) /* else it is as before */
                                load_input<P>(x, input + i * unit_of<P>::INPUT);
                            const uint4 a = load_shared(piece), b = load_shared(piece + 16);
                            const uint32_t scales = load_scales<P>(block + i * P::GROUPS * 2);
                            sum = fmaf(P::sum(P::multiply(a, b, x), scales), x.scale, sum);
                        }
                    release(at.tile);
                }
                at.next();
                unit += WARPS, input += WARPS * unit_of<P>::INPUT, block += WARPS * P::GROUPS * 2;
            }
            turn = !turn;
            if (mine) {
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            }
            if (t < 1 << cut.fold)
                to[view.two ? 2 * ((g / 2 << cut.fold) + t) + g % 2 : (g << cut.fold) + t] =
                    t == view.sub ? sum : 0;
            to += LINES << cut.fold;
        }
    }

    template <typename P, typename F>
    __device__ __forceinline__ void product_as(const struct share &s, const struct source &from, F publish)
    {
        struct unit_input x = {};
        if (view.unit < view.n_units)
            load_input<P>(x, 0);
        this->product_by(
            s, [&](float *to, int32_t rows, bool begins) { group_sums<P>(to, rows, x, begins); },
            [&](int32_t i) {
                if (P::RATIO || i >= s.n_dots)
                    return 1.0f;
                const bool two = view.two;
                const float *scales = static_cast<const float *>(two && i & 1 ? from.scales2 : from.scales);
                return __ldg(scales + s.first + (two ? i / 2 : i));
            },
            publish);
    }
    template <typename F>
    __device__ __forceinline__ void product(const struct share &s, const struct source &from, F publish)
    {
        product_as<Q>(s, from, publish);
    }

    /* The head's. */
    __device__ __forceinline__ void prepare_last(const struct share &s, const struct source &from)
    {
        prepare_as<typename Q::outer>(s, from);
    }
    __device__ __forceinline__ void gather_last(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        gather_pairs<typename Q::outer, 4, true>(words, cols, tag);
    }
    template <typename F>
    __device__ __forceinline__ void product_last(const struct share &s, const struct source &from, F publish)
    {
        product_as<typename Q::outer>(s, from, publish);
    }
};

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

#endif
