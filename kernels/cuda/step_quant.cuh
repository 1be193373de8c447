/* step.cu's products with quantised weights (kernels/quant.h): their tiles, and another arithmetic. Tensor
 * cores multiply, because ordinary instructions would bind before memory does at 4 bits.
 *
 * A warp's unit of a tile is 128 bytes of each line (128 columns, of q4 256). Two tiles are multiplied at
 * once, rows that follow each other in the same columns: lane 4 g + t has the pieces of 16 bytes number 2 t
 * and 2 t + 1 of one line of each. They are what mma wants of it as A, the second tile's in the place of rows
 * g + 8, given that columns may be taken in any order. B has eight columns, of which a vector needs one: so
 * column 2 k takes the high part and column 2 k + 1 the low part of the input of the columns that lanes with
 * t = k have, and both are zero elsewhere. So a lane gets the sums of its own pieces, and a group of 32
 * columns, which has a scale of its own, is one such piece in q4, and both in q8.
 *
 * Of q8 and q4 the input is an integer of 16 bits in two bytes, with a scale for each run of 128 columns, and
 * sums are exact. Of fp8 the weights become f16, exactly, and the input over its run's largest number is the
 * sum of two f16; a row's scale comes in where the warps' sums are added up. */
#ifndef LTN_CUDA_STEP_QUANT_CUH
#define LTN_CUDA_STEP_QUANT_CUH

#include "kernels/cuda/quant.cuh"
#include "kernels/cuda/step.cuh"

enum { UNIT_BYTES = 128, LINE_UNITS = LINE_BYTES / UNIT_BYTES };
enum { RUN = 128 }; /* columns of the input that share a scale */

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

static __device__ __forceinline__ uint32_t bits_of(__half2 two)
{
    return *reinterpret_cast<const uint32_t *>(&two);
}

static __device__ __forceinline__ float2 f32_of_f16(uint32_t two)
{
    return __half22float2(*reinterpret_cast<const __half2 *>(&two));
}

/* Pieces, of two tiles, whose words are unpacked into two: word by word, with the input of their columns. */
template <typename Q, typename T>
static __device__ __forceinline__ void add_words(T c[4], const uint4 (&w)[2], const uint4 (&x)[2])
{
    Q::add(c, w[0].x, w[1].x, x[0].x, x[0].y);
    Q::add(c, w[0].y, w[1].y, x[0].z, x[0].w);
    Q::add(c, w[0].z, w[1].z, x[1].x, x[1].y);
    Q::add(c, w[0].w, w[1].w, x[1].z, x[1].w);
}

/* What differs between the formats. COLS: of a unit; GROUPS: of a unit; GROUP_BYTES: of a group's input in
 * shared memory, high part first; RATIO: bytes of weights to one of scales, 0 where a row has one; WAITS:
 * whether a tile waits for the other, as two take little longer than one, though there may be less to wait
 * for at the end; MOST: what the largest number of a run of the input becomes. sums(): what a lane's pieces a
 * and b of a line of each of two tiles add, with their groups' scales; of what mma makes of them the first
 * two numbers are of the one, of high and low parts of the input, and the others of the other. */
struct q8 {
    static constexpr int COLS = 128, GROUPS = 4, GROUP_BYTES = 64, RATIO = 16;
    static constexpr bool WAITS = true;
    static constexpr float MOST = 32512, UNIT_OF_CODES = 1;
    static __device__ __forceinline__ float2 sums(const uint4 (&a)[2], const uint4 (&b)[2],
                                                  const struct unit_input &x, const uint32_t (&scales)[2])
    {
        int c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
        mma_s8(c, a[0].x, a[1].x, a[0].y, a[1].y, x.a[0].x, x.a[0].y);
        mma_s8(d, b[0].x, b[1].x, b[0].y, b[1].y, x.b[0].x, x.b[0].y);
        mma_s8(c, a[0].z, a[1].z, a[0].w, a[1].w, x.a[0].z, x.a[0].w);
        mma_s8(d, b[0].z, b[1].z, b[0].w, b[1].w, x.b[0].z, x.b[0].w);
        return make_float2(joined(c[0] + d[0], c[1] + d[1]) * f32_of_f16(scales[0]).x,
                           joined(c[2] + d[2], c[3] + d[3]) * f32_of_f16(scales[1]).x);
    }
};
struct fp8 {
    static constexpr int COLS = 128, GROUPS = 4, GROUP_BYTES = 128, RATIO = 0;
    static constexpr bool WAITS = false;
    static constexpr float MOST = 1, UNIT_OF_CODES = 1;
    static __device__ __forceinline__ uint32_t low(uint32_t codes)
    {
        const __half2_raw h = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)codes, __NV_E4M3);
        return h.x | (uint32_t)h.y << 16;
    }
    static __device__ __forceinline__ void add(float c[4], uint32_t v, uint32_t w, uint32_t x0, uint32_t x1)
    {
        mma_f16(c, low(v), low(w), low(v >> 16), low(w >> 16), x0, x1);
    }
    static __device__ __forceinline__ float2 sums(const uint4 (&a)[2], const uint4 (&b)[2],
                                                  const struct unit_input &x, const uint32_t (&)[2])
    {
        float c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
        add_words<fp8>(c, a, x.a);
        add_words<fp8>(d, b, x.b);
        return make_float2((c[0] + c[1]) + (d[0] + d[1]), (c[2] + c[3]) + (d[2] + d[3]));
    }
};
struct q4 { /* a nibble in the high half of a byte is 16 times its code, as two's complement has it */
    static constexpr int COLS = 256, GROUPS = 8, GROUP_BYTES = 64, RATIO = 8;
    static constexpr bool WAITS = true;
    static constexpr float MOST = 32512, UNIT_OF_CODES = 16;
    static constexpr uint32_t HIGH = 0xf0f0f0f0u;
    static __device__ __forceinline__ void add(int c[4], uint32_t v, uint32_t w, uint32_t x0, uint32_t x1)
    {
        mma_s8(c, v << 4 & HIGH, w << 4 & HIGH, v & HIGH, w & HIGH, x0, x1);
    }
    static __device__ __forceinline__ float with(uint32_t scales, int c0, int c1, int d0, int d1)
    {
        const float2 f = f32_of_f16(scales);
        return fmaf(joined(c0, c1), f.x, joined(d0, d1) * f.y);
    }
    static __device__ __forceinline__ float2 sums(const uint4 (&a)[2], const uint4 (&b)[2],
                                                  const struct unit_input &x, const uint32_t (&scales)[2])
    {
        int c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
        add_words<q4>(c, a, x.a);
        add_words<q4>(d, b, x.b);
        return make_float2(with(scales[0], c[0], c[1], d[0], d[1]), with(scales[1], c[2], c[3], d[2], d[3]));
    }
};

/* The type of weights that step.cu's kernel is made for: layers in Q, embedding and head in q8. */
template <typename Q> struct quant {
};
template <typename Q> struct team<quant<Q>> {
    static constexpr int WARPS = 8;
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
    /* Columns c to c + 3, c a multiple of 4. */
    __device__ float4 four(int32_t c) const
    {
        const char4 v = __ldg(reinterpret_cast<const char4 *>(codes + c));
        const float with = __half2float(__ldg(scales + c / LTN_GROUP));
        return make_float4(scale * ((float)v.x * with), scale * ((float)v.y * with),
                           scale * ((float)v.z * with), scale * ((float)v.w * with));
    }
};

/* Eight lanes, which read 16 bytes each at once, have every other piece of two lines, one of either half: GAP
 * puts these into different banks. */
template <typename Q> struct tile<quant<Q>> {
    static constexpr int GAP = 16, ABREAST = 2, RATIO = Q::RATIO;
    static constexpr bool FOLDS = true;
    static __host__ __device__ __forceinline__ int32_t row_bytes(int32_t cols)
    {
        return (uint32_t)cols / Q::COLS * UNIT_BYTES;
    }
};
template <typename Q> struct outer<quant<Q>> {
    using type = quant<q8>;
};

template <typename Q> struct ring<quant<Q>> {
    static constexpr int TILES = Q::RATIO ? 10 : 9, SLOT = LINES * LINE_BYTES + tile<quant<Q>>::GAP,
                         CONSUMERS = team<quant<Q>>::WARPS;
    static constexpr int BLOCK = LINES * LINE_BYTES / (Q::RATIO == q4::RATIO ? q4::RATIO : q8::RATIO) + 32;
    /* Of blocks there are as many as the streamer never waits for, if there is room, and at least so many
     * that tiles abreast have theirs wherever the first are; at most one for each of its lanes. */
    static __host__ int32_t blocks(const struct step_args &a, size_t room)
    {
        const int32_t chunks[] = {cut_of<quant<Q>>(a.D).chunks, cut_of<quant<Q>>(a.H).chunks,
                                  cut_of<quant<Q>>(a.G).chunks, cut_of<quant<q8>>(a.D).chunks};
        int32_t most = 0;
        for (int i = Q::RATIO ? 0 : 3; i < 4; i++)
            most = chunks[i] > most ? chunks[i] : most;
        const int32_t enough = 4 * (most + 1) < STREAMER ? 4 * (most + 1) : STREAMER;
        const int32_t fit = (int32_t)(room / BLOCK) < enough ? (int32_t)(room / BLOCK) : enough;
        return fit < 3 * most ? -1 : fit;
    }
};

/* A unit's input in shared memory: pieces of what all lanes have, STRIDE bytes from one to the next, which
 * puts them into different banks, and a scale for each run. */
template <typename Q> struct unit_of {
    static constexpr int RUNS = Q::COLS / RUN, STRIDE = 128 + 16,
                         SCALES = Q::GROUPS * Q::GROUP_BYTES / 128 * STRIDE, INPUT = SCALES + 16;
    static_assert(RUNS * sizeof(float) <= 16, "room for the scales");
};
template <typename Q> static __host__ __device__ __forceinline__ int32_t input_bytes(int32_t cols)
{
    return (cols / Q::COLS + LINE_UNITS - 1) / LINE_UNITS * LINE_UNITS * unit_of<Q>::INPUT;
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
    static constexpr int WARPS = team<quant<Q>>::WARPS,
                         UNITS = LINE_UNITS / WARPS; /* of a line, for a warp */
    struct unit_input x[UNITS]; /* zero where B is, which is the same lanes in every product */

    __device__ __forceinline__ worker(const struct room &room, const struct tile_ring<quant<Q>> &ring)
        : crew<quant<Q>>(room, ring), x{}
    {
    }

    /* Input is taken in runs, four columns a lane, which go round the warps: this warp's number i, and how
     * many it has. */
    __device__ __forceinline__ int32_t column(int32_t i) const
    {
        return (i * WARPS + warp) * RUN + 4 * lane;
    }
    __device__ __forceinline__ int32_t runs(int32_t cols) const
    {
        return ((uint32_t)cols / RUN + WARPS - 1 - warp) / WARPS;
    }

    /* All warps read what each has put. */
    __device__ __forceinline__ void ready()
    {
        meet<quant<Q>>();
        if (threadIdx.x == 0)
            *r.waiting = false;
    }

    /* Where the four columns of this lane in its warp's first run go, of the high part, and from one run to
     * the next; eight lanes have a group. */
    template <typename P> struct target {
        static constexpr int RUNS = unit_of<P>::RUNS, STRIDE = unit_of<P>::STRIDE;
        static constexpr int NEXT = WARPS / RUNS * unit_of<P>::INPUT;
        static_assert(WARPS % RUNS == 0, "a warp's runs have the same place in their units");
        uint8_t *codes, *scale;

        __device__ __forceinline__ target(float *input, int32_t warp, int32_t lane)
        {
            uint8_t *in = reinterpret_cast<uint8_t *>(input) + warp / RUNS * unit_of<P>::INPUT;
            const int32_t group = warp % RUNS * 4 + lane / 8, c = 4 * (lane % 8);
            scale = in + unit_of<P>::SCALES + warp % RUNS * sizeof(float);
            if (P::RATIO == 0) {
                codes = in + c / 8 * STRIDE + group * 32 + c % 8 * 2;
            } else if (P::RATIO == q4::RATIO) { /* as q4's sums() has columns */
                const int32_t to = c / 4 % 4 * 8 + c / 16 * 4;
                codes = in + (group % 2 * 2 + to / 16) * STRIDE + group / 2 * 32 + to % 16;
            } else {
                codes = in + c / 16 * STRIDE + group * 32 + c % 16;
            }
        }
        __device__ __forceinline__ void skip(int n)
        {
            codes += n * NEXT, scale += n * NEXT;
        }
    };

    /* The largest number of what all lanes have. As integers, floats that are not negative have the same
     * order. */
    __device__ __forceinline__ float most_of(float4 v) const
    {
        const float own = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
        return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(own)));
    }

    /* The four columns of this lane in run i from there, if wanted; `most` of the run. */
    template <typename P>
    __device__ __forceinline__ void put(const struct target<P> &to, int i, float4 v, float most, bool wanted)
    {
        uint8_t *codes = to.codes + i * to.NEXT;
        most = fmaxf(most, 1e-30f);
        const float inverse = P::MOST * reciprocal(most);
        if (wanted && lane == 0)
            *reinterpret_cast<float *>(to.scale + i * to.NEXT) = most * (1 / (P::MOST * P::UNIT_OF_CODES));
        if (P::RATIO == 0) {
            v.x *= inverse, v.y *= inverse, v.z *= inverse, v.w *= inverse;
            const __half2 a = __floats2half2_rn(v.x, v.y), b = __floats2half2_rn(v.z, v.w);
            const float2 a_back = __half22float2(a), b_back = __half22float2(b);
            const uint2 high = make_uint2(bits_of(a), bits_of(b)),
                        low = make_uint2(bits_of(__floats2half2_rn(v.x - a_back.x, v.y - a_back.y)),
                                         bits_of(__floats2half2_rn(v.z - b_back.x, v.w - b_back.y)));
            if (wanted)
                reinterpret_cast<uint2 *>(codes)[0] = high, reinterpret_cast<uint2 *>(codes)[2] = low;
        } else {
            /* The low 16 bits of 1.5 * 2^23 + 128 + n are a high byte and a low one plus 128. */
            const float one = 12583040.0f;
            const uint32_t x = __float_as_uint(fmaf(v.x, inverse, one)),
                           y = __float_as_uint(fmaf(v.y, inverse, one)),
                           z = __float_as_uint(fmaf(v.z, inverse, one)),
                           w = __float_as_uint(fmaf(v.w, inverse, one));
            const uint32_t xy = __byte_perm(x, y, 0x5140),
                           zw = __byte_perm(z, w, 0x5140); /* low, then high */
            const uint32_t high = __byte_perm(xy, zw, 0x7632),
                           low = __byte_perm(xy, zw, 0x5410) ^ 0x80808080u;
            if (wanted)
                reinterpret_cast<uint32_t *>(codes)[0] = high, reinterpret_cast<uint32_t *>(codes)[4] = low;
        }
    }

    /* The same of runs i and i + 1, side by side, the second if wanted. */
    template <typename P>
    __device__ __forceinline__ void put_two(const struct target<P> &to, int i, float4 v, float4 w,
                                            bool wanted)
    {
        const float most_v = most_of(v), most_w = most_of(w);
        put(to, i, v, most_v, true);
        put(to, i + 1, w, most_w, wanted);
    }

    __device__ __forceinline__ void square(float4 v)
    {
        squares = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares))));
    }

    /* From words of two columns each. */
    template <typename P>
    __device__ __forceinline__ void gather_pairs(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        constexpr int N = 6, NEXT = WARPS * RUN / 2;
        struct target<P> to(m.in, warp, lane);
        squares = 0;
        words += column(0) / 2;
        for (int32_t left = runs(cols); left > 0; left -= N, words += N * NEXT, to.skip(N)) {
            ulonglong2 v[N];
            await_all(
                v, [&](int i) { return words + i * NEXT; }, [&](int i) { return i < left; }, tag);
            const auto four = [&](int i) {
                const float2 a = values_of(v[i].x), b = values_of(v[i].y);
                return make_float4(a.x, a.y, b.x, b.y);
            };
#pragma unroll
            for (int i = 0; i < N; i += 2)
                if (i < left) {
                    square(four(i)), square(four(i + 1)); /* what is not wanted is 0 */
                    put_two(to, i, four(i), four(i + 1), i + 1 < left);
                }
        }
        ready();
    }
    __device__ __forceinline__ void gather(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        gather_pairs<Q>(words, cols, tag);
    }

    /* From words of one column of o and of u: u * o, and the squares of o. */
    __device__ __forceinline__ void gather_gated(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        constexpr int N = 2, NEXT = WARPS * RUN;
        struct target<Q> to(m.in, warp, lane);
        squares = 0;
        words += column(0);
        for (int32_t left = runs(cols); left > 0; left -= N, words += N * NEXT, to.skip(N)) {
            ulonglong2 v[2 * N];
            await_all(
                v, [&](int i) { return words + i / 2 * NEXT + i % 2 * 2; },
                [&](int i) { return i / 2 < left; }, tag);
            float4 x[N];
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float2 a = values_of(v[2 * i].x), b = values_of(v[2 * i].y);
                const float2 c = values_of(v[2 * i + 1].x), d = values_of(v[2 * i + 1].y);
                square(make_float4(a.x, b.x, c.x, d.x));
                x[i] = make_float4(a.x * a.y, b.x * b.y, c.x * c.y, d.x * d.y);
            }
            put_two(to, 0, x[0], x[1], left > 1);
        }
        ready();
    }

    __device__ __forceinline__ void gather_row(const struct embedding<quant<Q>> &row, int32_t cols)
    {
        struct target<Q> to(m.in, warp, lane);
        squares = 0;
        const int32_t n = runs(cols);
        float4 next = make_float4(0, 0, 0, 0); /* asked for ahead */
        if (n > 0)
            next = row.four(column(0));
#pragma unroll 1
        for (int32_t i = 0; i < n; i++, to.skip(1)) {
            const float4 v = next;
            next = row.four(column(min(i + 1, n - 1)));
            square(v);
            put(to, 0, v, most_of(v), true);
        }
        ready();
    }

    /* Where this lane finds what it has of a product's tiles. */
    struct view {
        struct cut cut;
        uint32_t pieces;       /* of its line of a tile */
        int32_t scales;        /* of its line, in the block of the tile's rows */
        int32_t to;            /* the first row of its line, of the tile's rows */
        int32_t sub;           /* which of a line's rows this warp has */
        int32_t unit, n_units; /* the first of a row that this warp has, and how many there are in all */
        const uint8_t *x, *x_scale;
        bool two, own; /* matrices; whether B is not zero, as lanes with t have what column g is for */
    } view;
    template <typename P> __device__ __forceinline__ void prepare_as(const struct share &s, bool two)
    {
        const int32_t g = lane / 4, t = lane % 4, place = warp * UNITS; /* units of a line */
        view.cut = cut_of<quant<P>>(s.cols);
        view.two = two, view.own = t == g / 2;
        const int32_t fold = view.cut.fold;
        view.unit = place & ((LINE_UNITS >> fold) - 1), view.n_units = (uint32_t)s.cols / P::COLS;
        view.sub = place / 4 >> (2 - fold);
        static_assert(LINE_UNITS == 16 && UNITS <= 4, "a row has 16, 8 or 4 units of a line");
        /* The rows of a tile in memory: those of the second matrix after those of the first. */
        const int32_t row = (line_of(g) << fold) + view.sub;
        view.to = view.two ? (g / 2 << (fold + 1)) + g % 2 : line_of(g) << fold;
        view.scales =
            row * scale_bytes<quant<P>>(view.cut) + (view.unit * P::GROUPS + t * (P::GROUPS / 4)) * 2;
        view.pieces = r.tiles + line_at<quant<P>>(line_of(g)) + place * UNIT_BYTES + t * 32;
        const uint8_t *in = reinterpret_cast<const uint8_t *>(m.in) + view.unit * unit_of<P>::INPUT;
        view.x = in + g * 16; /* g is 2 t and a part, where it matters */
        view.x_scale = in + unit_of<P>::SCALES + t * unit_of<P>::RUNS / 4 * sizeof(float);
    }
    __device__ __forceinline__ void prepare(const struct share &s, bool two)
    {
        prepare_as<Q>(s, two);
    }

    /* What this warp has of a line's units. */
    template <typename P> __device__ __forceinline__ void load_inputs(int32_t there)
    {
        constexpr int NEXT = unit_of<P>::STRIDE / 16;
#pragma unroll
        for (int i = 0; i < UNITS; i++, there += unit_of<P>::INPUT) {
            const uint4 *from = reinterpret_cast<const uint4 *>(view.x + there);
            if (view.own) {
                x[i].a[0] = from[0];
                if (P::RATIO == q8::RATIO)
                    x[i].b[0] = from[NEXT];
                else
                    x[i].a[1] = from[NEXT], x[i].b[0] = from[2 * NEXT], x[i].b[1] = from[3 * NEXT];
            }
            x[i].scale = *reinterpret_cast<const float *>(view.x_scale + there);
        }
    }

    /* Waits for the next tile. */
    __device__ __forceinline__ uint32_t arrived()
    {
        const uint32_t tile = at.tile;
        barrier_wait(&r.full[tile], at.parity);
        at.next();
        return tile;
    }

    /* The scales of this lane's pieces of two tiles, whose blocks are given. Rows of scales often lie in the
     * same banks, so rows differ in which they ask for first. */
    template <typename P>
    __device__ __forceinline__ void load_all_scales(uint32_t (&scales)[UNITS][2], const uint32_t (&blocks)[2])
    {
        static_assert(UNITS == 2, "as many units as tiles");
        constexpr int32_t UNIT = P::GROUPS * 2;
        const bool other_unit = lane & 4, other_tile = lane & 8;
        const uint32_t first = (other_tile ? blocks[1] : blocks[0]) + (other_unit ? UNIT : 0);
        const uint32_t second = (other_tile ? blocks[0] : blocks[1]) + (other_unit ? UNIT : 0);
        const int32_t next = other_unit ? -UNIT : UNIT;
        const uint32_t v[2][2] = {{load_scales<P>(first), load_scales<P>(second)},
                                  {load_scales<P>(first + next), load_scales<P>(second + next)}};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t a = other_unit ? v[1 - i][0] : v[i][0], b = other_unit ? v[1 - i][1] : v[i][1];
            scales[i][0] = other_tile ? b : a, scales[i][1] = other_tile ? a : b;
        }
    }

    /* This warp's sums of rows, by two tiles abreast, a bit for each; one that is not there, or is not waited
     * for, has the other's place and adds nothing. The first rows of a product add up squares. */
    template <typename P> __device__ __forceinline__ void sums(float *to, int32_t rows, bool begins)
    {
        const struct cut cut = view.cut;
        const int32_t t = lane % 4, step = LINES << cut.fold;
        if (begins)
            squares = warp_sum(squares);
        to += view.to + (t % 2) * step;
#pragma unroll 1
        for (; rows > 0; rows -= 2 * step, to += 2 * step) {
            const uint32_t all = rows > step ? 3 : 1;
            uint32_t blocks[2] = {0, 0};
            if (P::RATIO) {
                blocks[0] = blocks[1] = at.take(r, cut.chunks) + view.scales;
                if (all == 3)
                    blocks[1] = at.take(r, cut.chunks) + view.scales;
            }
            int32_t unit = view.unit, input = 0;
            float sum[2] = {0, 0};
            uint32_t todo = all;
#pragma unroll 1
            for (int32_t k = 0; k < cut.chunks;) {
                if (cut.chunks > 1) /* else it is as before */
                    load_inputs<P>(input);
                uint32_t tiles[2], now = todo;
                tiles[0] = tiles[1] = arrived();
                if (!P::WAITS && todo == 3 && /* of one mind, whatever the lanes saw */
                    !__all_sync(0xffffffffu, barrier_passed(&r.full[at.tile], at.parity)))
                    now = 1;
                if (now == 3)
                    tiles[1] = arrived();
                uint4 a[UNITS][2], b[UNITS][2];
                uint32_t scales[UNITS][2] = {};
#pragma unroll
                for (int i = 0; i < UNITS; i++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const uint32_t piece = view.pieces + tiles[j] * r.SLOT + i * UNIT_BYTES;
                        a[i][j] = load_shared(piece), b[i][j] = load_shared(piece + 16);
                    }
                if (P::RATIO)
                    load_all_scales<P>(scales, blocks);
#pragma unroll
                for (int i = 0; i < UNITS; i++) {
                    const float2 more = P::sums(a[i], b[i], x[i], scales[i]);
                    const bool within = unit + i < view.n_units; /* what lies beyond is of other tiles */
                    sum[0] = within && (P::WAITS || now & 1) ? fmaf(more.x, x[i].scale, sum[0]) : sum[0];
                    sum[1] = within && (P::WAITS || now & 2) ? fmaf(more.y, x[i].scale, sum[1]) : sum[1];
                }
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(&r.empty[tiles[0]]);
                    if (now == 3)
                        barrier_arrive(&r.empty[tiles[1]]);
                }
                if (!P::WAITS)
                    todo = todo == now ? all : todo - now;
                if (todo == all) {
                    k++;
                    unit += LINE_UNITS, input += LINE_UNITS * unit_of<P>::INPUT;
                    blocks[0] += LINE_UNITS * P::GROUPS * 2, blocks[1] += LINE_UNITS * P::GROUPS * 2;
                }
            }
            const bool odd = t % 2;
            float own = (odd ? sum[1] : sum[0]) + __shfl_xor_sync(0xffffffffu, odd ? sum[0] : sum[1], 1);
            own += __shfl_xor_sync(0xffffffffu, own, 2);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int32_t sub = t / 2 + 2 * i;
                if (sub < 1 << cut.fold)
                    to[sub * (view.two ? 2 : 1)] = sub == view.sub ? own : 0;
            }
        }
    }

    template <typename P, typename F>
    __device__ __forceinline__ void product_as(const struct share &s, const struct source &from, F publish)
    {
        load_inputs<P>(0);
        this->product_by(
            s, [&](float *to, int32_t rows, bool begins) { sums<P>(to, rows, begins); },
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
    __device__ __forceinline__ void prepare_last(const struct share &s)
    {
        prepare_as<q8>(s, false);
    }
    __device__ __forceinline__ void gather_last(const uint64_t *words, int32_t cols, uint32_t tag)
    {
        gather_pairs<q8>(words, cols, tag);
    }
    template <typename F>
    __device__ __forceinline__ void product_last(const struct share &s, const struct source &from, F publish)
    {
        product_as<q8>(s, from, publish);
    }
};

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

#endif
