/* step.cu's products with quantised weights (kernels/quant.h): the same ring of pieces on their way, another
 * consumer. Tensor cores multiply, because ordinary arithmetic would bind before memory does at 4 bits.
 *
 * A unit is what a warp fetches and multiplies at once: 16 rows of weights by 64 bytes of each (64 columns,
 * of q4 128) and their scales. A thread (g, t) = (lane / 4, lane % 4) fetches for itself the pieces of 16
 * bytes number t of rows g and g + 8, which are what mma wants of it as A, given that columns may be taken in
 * any order. B has eight columns, of which a vector needs one: so column 2 k takes the high part and column 2
 * k + 1 the low part of the input of the unit's group k of 32 columns, and both are zero elsewhere. A group's
 * sum, which has a scale of its own, comes out by itself:
 *
 *   q8, q4  the input is an integer of 16 bits, with a scale for each group, in two bytes; sums are exact,
 * and start at the bits of 1.5 * 2^23, so that they end as f32 fp8     weights become f16, exactly; the input
 * over its group's largest number is the sum of two f16
 *
 * Columns are parted among the warps by sizes alone, so that the order of every sum follows from sizes. */
#ifndef LTN_CUDA_STEP_QUANT_CUH
#define LTN_CUDA_STEP_QUANT_CUH

#include "kernels/cuda/quant.cuh"

#include <type_traits>

enum {
    TILE = 16,          /* rows of a unit */
    UNIT_ROW = 64,      /* bytes of a row in a unit */
    PIECES_BYTES = 1024 /* of a unit; then its scales */
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
    return fmaf(__int_as_float(high) - 12582912.0f, 256.0f, __int_as_float(low) - 12582912.0f);
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
        int c[4] = {0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000};
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
        int c[4] = {0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000};
        mma_s8(c, low(a.x), low(b.x), high(a.x), high(b.x), x.first.x, x.second.x);
        mma_s8(c, low(a.y), low(b.y), high(a.y), high(b.y), x.first.y, x.second.y);
        mma_s8(c, low(a.z), low(b.z), high(a.z), high(b.z), x.first.z, x.second.z);
        mma_s8(c, low(a.w), low(b.w), high(a.w), high(b.w), x.first.w, x.second.w);
        out[0] = joined(c[0], c[1]), out[1] = joined(c[2], c[3]);
    }
};

/* The type of weights that step.cu's kernel is made for: layers in Q, embedding and head in q8. */
template <typename Q> struct quant {
};
template <typename Q> struct head_weights<quant<Q>> {
    typedef quant<q8> type;
};

template <typename Q> struct embedding<quant<Q>> {
    const int8_t *codes;
    const __half *scales;
    float scale;

    __device__ embedding(const struct step_args &a)
    {
        const int64_t id = __ldcg(a.id);
        codes = (const int8_t *)a.embed + id * a.D;
        scales = (const __half *)a.embed_scales.w + id * (a.D / LTN_GROUP);
        scale = a.embed_scale;
    }
    __device__ float operator()(int32_t c) const
    {
        return scale * ((float)codes[c] * __half2float(scales[c / LTN_GROUP]));
    }
};

/* Bytes of a unit; of all that a kernel meets, the largest. */
template <typename Q> static constexpr int unit_bytes()
{
    return PIECES_BYTES + TILE * (Q::GROUPS == 4 ? 8 : 4);
}
template <typename Q> struct ring_size<quant<Q>> {
    static constexpr int DEPTH = 9, BYTES = DEPTH * WARPS * unit_bytes<Q>();
};

/* Units side by side in the rows of a matrix. */
template <typename Q> static __host__ __device__ int32_t units_of(int32_t cols)
{
    return (cols + Q::COLS - 1) / Q::COLS;
}

/* Into how many parts the columns are parted, as a power of two: for matrices of few rows into more. */
static inline __host__ __device__ int32_t log_parts_of(int32_t dots, int32_t cols)
{
    const int32_t columns = (cols + 127) / 128, each = dots <= 4224 ? 1 : 2;
    int32_t log = 4;
    while (log > 0 && columns < each << log)
        log--;
    return log;
}

/* Of an input in shared memory, in bytes: groups, in whole units, and their scales. */
template <typename Q> static __host__ __device__ int32_t input_bytes(int32_t cols)
{
    return units_of<Q>(cols) * Q::GROUPS * (Q::GROUP_BYTES + (int32_t)sizeof(float));
}

/* A warp's share of one product: tiles group, group + groups, ... of its block's dots, units [from, to). */
template <typename Q> struct share<quant<Q>> {
    const uint8_t *w, *w2, *scales, *scales2;
    int32_t first, n_outs, n_dots, cols, row_bytes, scale_bytes, n_tiles;
    int32_t parts, part, group, groups, from, to;

    __device__ int64_t row(int32_t dot) const
    {
        return first + (w2 ? dot >> 1 : dot);
    }
    __device__ const uint8_t *codes_of(int32_t dot) const
    {
        return (w2 && (dot & 1) ? w2 : w) + row(dot) * row_bytes;
    }
    __device__ const uint8_t *scales_of(int32_t dot) const
    {
        return (w2 && (dot & 1) ? scales2 : scales) + row(dot) * scale_bytes;
    }
    __device__ bool empty() const
    {
        return group >= n_tiles;
    }
};

template <typename Q>
static __device__ void part_out(struct share<quant<Q>> &s, const void *w, const void *w2,
                                const struct quant_scales &scales, const struct extent &e)
{
    const int32_t warp = threadIdx.x / 32;
    s.w = (const uint8_t *)w, s.w2 = (const uint8_t *)w2;
    s.scales = (const uint8_t *)scales.w, s.scales2 = (const uint8_t *)scales.w2;
    s.cols = e.cols, s.first = e.first, s.n_outs = e.n_outs;
    s.row_bytes = Q::GROUPS == 4 ? s.cols / 2 : s.cols;
    s.scale_bytes = Q::ROW_SCALES ? 4 : s.cols / LTN_GROUP * 2;
    s.n_dots = w2 ? 2 * s.n_outs : s.n_outs;
    s.n_tiles = (s.n_dots + TILE - 1) / TILE;
    const int32_t log = log_parts_of(w2 ? 2 * e.outs : e.outs, s.cols);
    s.parts = 1 << log;
    s.part = warp & (s.parts - 1), s.group = warp >> log, s.groups = WARPS >> log;
    const int32_t n_units = units_of<Q>(s.cols);
    s.from = n_units * s.part >> log, s.to = n_units * (s.part + 1) >> log;
}

/* 16 or 4 bytes on their way into shared memory, or as many zeros. */
static __device__ __forceinline__ void copy16_or_zero(uint32_t shared, const void *global, bool copy)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(copy ? 16 : 0)
                 : "memory");
}
static __device__ __forceinline__ void copy4_or_zero(uint32_t shared, const void *global, bool copy)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(copy ? 4 : 0)
                 : "memory");
}

/* The units of this warp in the order of their use. */
template <typename Q> struct feed<quant<Q>> {
    static constexpr int UNIT = unit_bytes<Q>();

    const struct step_args &a;
    const struct extent *extents;
    uint8_t *ring; /* this warp's */
    int32_t at, last;
    /* of the product at hand */
    int32_t n_tiles, groups, from, to, row_bytes, scale_bytes, scale_step;
    /* of the tile at hand */
    int32_t tile, unit;
    const uint8_t *row[2], *scales;
    bool there[2], scales_there;
    int32_t column, scale_column; /* bytes from the rows' begin */

    __device__ feed(const struct step_args &args, const struct extent *all, void *shared, int32_t products)
        : a(args), extents(all)
    {
        ring = (uint8_t *)shared + threadIdx.x / 32 * (ring_size<quant<Q>>::BYTES / WARPS);
        at = 0, last = products - 1;
        enter();
        for (int i = 0; i < ring_size<quant<Q>>::DEPTH; i++)
            fetch(i);
    }
    template <typename P> __device__ void enter_tile(const struct share<quant<P>> &s)
    {
        const int32_t lane = threadIdx.x % 32, end = s.n_dots - 1;
        for (int i = 0; i < 2; i++) {
            const int32_t dot = tile * TILE + lane / 4 + 8 * i;
            there[i] = dot <= end;
            row[i] = s.codes_of(min(dot, end));
        }
        const int32_t dot = tile * TILE + (P::GROUPS == 4 ? lane / 2 : lane % TILE);
        scales_there = dot <= end && (P::GROUPS == 4 || lane < TILE);
        scales = s.scales_of(min(dot, end));
        unit = s.from;
        column = unit * UNIT_ROW + lane % 4 * 16;
        scale_column = unit * P::SCALE_STEP + (P::GROUPS == 4 ? lane % 2 * 4 : 0);
    }

    template <typename P> __device__ bool enter_product()
    {
        const struct share<quant<P>> s = share_of<quant<P>>(a, extents, at);
        if (s.empty())
            return false;
        n_tiles = s.n_tiles, groups = s.groups, from = s.from, to = s.to;
        row_bytes = s.row_bytes, scale_bytes = s.scale_bytes, scale_step = P::SCALE_STEP;
        tile = s.group;
        enter_tile(s);
        return true;
    }

    __device__ void enter()
    {
        for (; at <= last; at++)
            if (at == last ? enter_product<q8>() : enter_product<Q>())
                return;
    }

    __device__ void fetch(int slot)
    {
        if (at <= last) {
            const int32_t lane = threadIdx.x % 32;
            const uint32_t to_shared = (uint32_t)__cvta_generic_to_shared(ring + slot * UNIT);
            for (int i = 0; i < 2; i++)
                copy16_or_zero(to_shared + (i * 32 + lane) * 16, row[i] + column,
                               there[i] && column < row_bytes);
            if (Q::GROUPS == 4 || lane < TILE)
                copy4_or_zero(to_shared + PIECES_BYTES + lane * 4, scales + scale_column,
                              scales_there && scale_column < scale_bytes);
            column += UNIT_ROW;
            scale_column += scale_step;
            if (++unit == to) {
                tile += groups;
                if (tile >= n_tiles) {
                    at++;
                    enter();
                } else if (at == last) {
                    enter_tile(share_of<quant<q8>>(a, extents, at));
                } else {
                    enter_tile(share_of<quant<Q>>(a, extents, at));
                }
            }
        }
        end_copy_group();
    }
};

/* Leaves an input in shared memory and the warps' sums of squares in red; value(c) gives what to square and
 * what to stage of columns c .. c + 3. Eight neighbouring threads make a group. */
template <typename Q, typename F>
static __device__ __forceinline__ void stage(const struct room &m, const struct share<quant<Q>> &s, F value)
{
    const int32_t cols = s.cols, n_groups = units_of<Q>(cols) * Q::GROUPS;
    uint8_t *x = reinterpret_cast<uint8_t *>(m.in);
    float *scales = reinterpret_cast<float *>(x + n_groups * Q::GROUP_BYTES);
    float sum = 0;
    for (int32_t first = 0; first < n_groups * LTN_GROUP; first += THREADS * 4) {
        const int32_t c = first + threadIdx.x * 4;
        float4 v = make_float4(0, 0, 0, 0);
        if (c < cols) {
            float4 square;
            value(c, square, v);
            sum += square.x * square.x + square.y * square.y + square.z * square.z + square.w * square.w;
        }
        float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
        for (int offset = 4; offset > 0; offset /= 2)
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
        const float inverse = most > 1e-30f ? Q::MOST / most : 0;
        if (c >= n_groups * LTN_GROUP)
            continue;
        if (c % LTN_GROUP == 0)
            scales[c / LTN_GROUP] = most / (Q::MOST * Q::UNIT_OF_CODES);
        uint8_t *to = x + c / LTN_GROUP * Q::GROUP_BYTES;
        if (Q::ROW_SCALES) {
            const float part[4] = {v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse};
            __half high[4], low[4];
            for (int i = 0; i < 4; i++) {
                high[i] = __float2half_rn(part[i]);
                low[i] = __float2half_rn(part[i] - __half2float(high[i]));
            }
            *reinterpret_cast<uint2 *>(to + c % LTN_GROUP * 2) = *reinterpret_cast<uint2 *>(high);
            *reinterpret_cast<uint2 *>(to + 64 + c % LTN_GROUP * 2) = *reinterpret_cast<uint2 *>(low);
        } else {
            /* The low 16 bits of 1.5 * 2^23 + 128 + n are a high byte and a low one plus 128. */
            const uint32_t n0 = __float_as_uint(fmaf(v.x, inverse, 12583040.0f)),
                           n1 = __float_as_uint(fmaf(v.y, inverse, 12583040.0f)),
                           n2 = __float_as_uint(fmaf(v.z, inverse, 12583040.0f)),
                           n3 = __float_as_uint(fmaf(v.w, inverse, 12583040.0f));
            const uint32_t n01 = __byte_perm(n0, n1, 0x5140), n23 = __byte_perm(n2, n3, 0x5140);
            *reinterpret_cast<uint32_t *>(to + c % LTN_GROUP) = __byte_perm(n01, n23, 0x7632);
            *reinterpret_cast<uint32_t *>(to + 32 + c % LTN_GROUP) =
                __byte_perm(n01, n23, 0x5410) ^ 0x80808080u;
        }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        m.red[threadIdx.x / 32] = sum;
    __syncthreads();
}

/* Where the parts' sums of a product lie: behind the largest input, as the next may be staged beside them. */
template <typename Q> static __device__ float *sums_of(const struct room &m, const struct share<quant<Q>> &s)
{
    return m.sums - s.parts * s.n_dots;
}

/* The block's dots with the staged input, into the sums; ends with a barrier of the block. P: the product's
 * format; the ring's is Q. */
template <typename P, typename Q>
static __device__ __forceinline__ void multiply_units(const struct room &m, const struct share<quant<P>> &s,
                                                      struct feed<quant<Q>> &f, int &slot)
{
    constexpr int DEPTH = ring_size<quant<Q>>::DEPTH;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint8_t *x = reinterpret_cast<const uint8_t *>(m.in);
    const float *x_scales =
        reinterpret_cast<const float *>(x + units_of<P>(s.cols) * P::GROUPS * P::GROUP_BYTES);
    float *sums = sums_of(m, s);

    /* The group of this thread's pieces as B has to have it, and of its sums. */
    const int own = P::GROUPS == 4 ? t : t / 2, group = P::GROUPS == 4 ? t : t % 2;
    const bool is_own = g / 2 == own;
    x += own * P::GROUP_BYTES + g % 2 * (P::GROUP_BYTES / 2) +
         (P::GROUPS == 4 ? 0 : t % 2 * (P::GROUP_BYTES / 4));
    const int scale_at = PIECES_BYTES + (P::ROW_SCALES ? g * 4 : (g * P::GROUPS + group) * 2);
    struct unit_input in = {};
    for (int32_t tile = s.group; tile < s.n_tiles; tile += s.groups) {
        float acc[2] = {0, 0}, row_scale[2] = {1, 1};
        for (int32_t unit = s.from; unit < s.to; unit++) {
            const uint8_t *from = f.ring + slot * feed<quant<Q>>::UNIT;
            wait_copy_groups<DEPTH - 1>();
            __syncwarp(); /* scales come by other threads of the warp */
            const uint4 a = reinterpret_cast<const uint4 *>(from)[lane],
                        b = reinterpret_cast<const uint4 *>(from)[32 + lane];
            float scale[2];
            for (int i = 0; i < 2; i++) {
                const uint8_t *one = from + scale_at + i * 8 * (P::ROW_SCALES ? 4 : P::GROUPS * 2);
                if (P::ROW_SCALES)
                    row_scale[i] = *reinterpret_cast<const float *>(one);
                else
                    scale[i] = __half2float(*reinterpret_cast<const __half *>(one));
            }
            const uint8_t *own_x = x + unit * (P::GROUPS * P::GROUP_BYTES);
            if (is_own) { /* elsewhere it stays zero */
                in.first = reinterpret_cast<const uint4 *>(own_x)[0];
                if (P::GROUPS == 4 || P::ROW_SCALES)
                    in.second = reinterpret_cast<const uint4 *>(own_x)[1];
            }
            const float x_scale = x_scales[unit * P::GROUPS + group];
            __syncwarp();
            f.fetch(slot);
            slot = slot == DEPTH - 1 ? 0 : slot + 1;
            float sum[2];
            P::dot(sum, a, b, in);
            for (int i = 0; i < 2; i++)
                acc[i] = fmaf(sum[i], P::ROW_SCALES ? x_scale : scale[i] * x_scale, acc[i]);
        }
        for (int i = 0; i < 2; i++) {
            acc[i] += __shfl_xor_sync(0xffffffffu, acc[i], 1);
            acc[i] += __shfl_xor_sync(0xffffffffu, acc[i], 2);
            const int32_t dot = tile * TILE + g + 8 * i;
            if (t == 0 && dot < s.n_dots)
                sums[s.part * s.n_dots + dot] = acc[i] * row_scale[i];
        }
    }
    __syncthreads();
}

template <typename Q>
static __device__ __forceinline__ void multiply(const struct room &m, const struct share<quant<Q>> &s,
                                                struct feed<quant<Q>> &f, int &slot)
{
    multiply_units(m, s, f, slot);
}
template <typename Q>
static __device__ __forceinline__ typename std::enable_if<!std::is_same<Q, q8>::value>::type
multiply(const struct room &m, const struct share<quant<q8>> &s, struct feed<quant<Q>> &f, int &slot)
{
    multiply_units(m, s, f, slot);
}

template <typename Q>
static __device__ float result(const struct room &m, const struct share<quant<Q>> &s, int32_t dot)
{
    const float *sums = sums_of(m, s);
    float value = 0;
    for (int i = 0; i < s.parts; i++)
        value += sums[i * s.n_dots + dot];
    return value;
}

#endif
