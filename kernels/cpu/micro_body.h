/* The inner loops themselves, included once per instruction set by a file that has defined
 *   VL           lanes of a vector
 *   DOT_ROWS     rows of a tile of dot products; its DOT_ROWS x 4 sums stay in registers
 *   OUTER_ROWS   rows of a tile of outer products; OUTER_ROWS x 2 vectors stay in registers
 *   vf vi vw vb  a vector of VL floats, of VL int32, of 2 VL int16, of 4 VL uint8
 *   fma_v fma_s  a * b + c of vectors and scalars, as fast as the machine has it
 *   load_f32 load_bf16 load_f16    VL elements from any address, widened to f32
 *   load_e4m3                      VL codes likewise, as 2^-8 of their values
 *   load_i8      2 VL codes of q8, as int16
 *   madd         the sums of products of neighbours, a[2i] b[2i] + a[2i + 1] b[2i + 1]
 *   dot_bytes    in lane i the sum over bytes 4i .. 4i + 3 of low p[0] + high p[1] of the one half of the
 * input and low p[2] + high p[3] of the other, the first times 256; see below spread       lane i is scales[i
 * / 4] sum_lanes    the four lane sums of four vectors MICRO_TABLE MICRO_NAME Tiles are written as loops over
 * constant bounds inside inlined functions, so that the compiler unrolls them into registers. */
#include <math.h>

#define INLINE static inline __attribute__((always_inline))

typedef float v4 __attribute__((vector_size(16)));

INLINE vf splat(float s)
{
    return s - (vf){0}; /* no addition: s - 0 is s, whatever its sign */
}

INLINE void store(float *p, vf v)
{
    memcpy(p, &v, sizeof v);
}

/* The first n < VL lanes; the others read as zero. */
INLINE vf load_part(const float *p, int n)
{
    float lanes[VL] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return load_f32(lanes);
}

INLINE void store_part(float *p, vf v, int n)
{
    memcpy(p, &v, (size_t)n * sizeof *p);
}

/* VL weights from element i on, or only n of them if n < VL. */
INLINE vf load_weights(const void *w, enum ltn_dtype dtype, size_t i, int n)
{
    uint16_t lanes[VL] = {0};
    if (dtype == LTN_F32)
        return n < VL ? load_part((const float *)w + i, n) : load_f32((const float *)w + i);
    const uint16_t *p = (const uint16_t *)w + i;
    if (n < VL)
        p = memcpy(lanes, p, (size_t)n * sizeof *p);
    return dtype == LTN_BF16 ? load_bf16(p) : load_f16(p);
}

/* ---- products ---------------------------------------------------------------------------------------- */

enum { CHUNK_GROUPS = VL / 4, CHUNK = CHUNK_GROUPS * LTN_GROUP }; /* of q8 and q4, see below */

/* A row of the input, MICRO_DOT_COLS of its columns at most, rounded for q8 and q4. In words: x. In chunks:
 * of each the planes, for low and for high nibbles, of h, then of l (of q4 in words: x of the even codes,
 * then of the odd), and of the bytes -8 times their sums. With zeros up to whole groups, or chunks. */
struct rounded {
    _Alignas(64) int16_t x[MICRO_DOT_COLS];
    vb planes[MICRO_DOT_COLS / CHUNK][4];
    vi shift[MICRO_DOT_COLS / CHUNK];
    float scale;
};

INLINE void clear_tile(vf sum[][4], int rows)
{
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int o = 0; o < 4; o++)
            sum[r][o] = (vf){0};
}

/* y[r, o] = (add ? y[r, o] : 0) + scale[o] x[r].scale * lanes of sum[r][o] + bias[o]; x may be NULL */
INLINE void put_tile(float *y, size_t ldy, vf sum[][4], int rows, int n_outs, v4 scale,
                     const struct rounded *x, bool add, const float *bias)
{
    v4 b = {0};
    if (bias)
        memcpy(&b, bias, (size_t)n_outs * sizeof *bias);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        v4 factor = x ? scale * x[r].scale : scale, old = {0};
        v4 out = (v4)sum_lanes(sum[r][0], sum[r][1], sum[r][2], sum[r][3]) * factor + b;
        float *at = y + r * ldy;
        if (n_outs == 4) {
            if (add)
                memcpy(&old, at, sizeof old);
            old += out;
            memcpy(at, &old, sizeof old);
        } else {
            for (int o = 0; o < n_outs; o++)
                at[o] = (add ? at[o] : 0) + out[o];
        }
    }
}

INLINE void fetch_ahead(const void *p, int bytes)
{
    for (int i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)p + i);
}

/* For one row of x, which goes through w as fast as memory gives it: the second cache can wait for more lines
 * at once than the first, so it asks memory for what lies 16 rows ahead, and the first it for what lies
 * `near` rows ahead: so few that they fit. */
INLINE void fetch_far_ahead(const void *p, size_t row_bytes, size_t near, int bytes)
{
    for (int i = 0; i < bytes; i += 64) {
        __builtin_prefetch((const char *)p + 16 * row_bytes + i, 0, 2);
        __builtin_prefetch((const char *)p + near * row_bytes + i);
    }
}

/* rows <= DOT_ROWS (a constant) by n_outs <= 4 dot products over at most MICRO_DOT_COLS columns from column
 * `first` on. `fetch`: w is read for the first time, from memory rather than a cache. */
INLINE void dot_tile(float *y, size_t ldy, const float *x, size_t ldx, const void *weights, size_t ldw,
                     enum ltn_dtype dtype, int rows, int n_outs, int first, int cols, bool fetch, bool add,
                     const float *bias)
{
    size_t size = dtype == LTN_F32 ? 4 : 2;
    const char *w[4];
    for (int o = 0; o < 4; o++) /* rows that are not there repeat the first */
        w[o] = (const char *)weights + ((size_t)(o < n_outs ? o : 0) * ldw + (size_t)first) * size;
    vf sum[DOT_ROWS][4];
    clear_tile(sum, rows);
    int c = 0;
    for (; c + VL <= cols; c += VL) {
        vf b[4];
#pragma GCC unroll 4
        for (int o = 0; o < 4; o++)
            b[o] = load_weights(w[o], dtype, (size_t)c, VL);
        if (fetch && rows > 1) { /* rows end before the hardware has seen a stream */
#pragma GCC unroll 4
            for (int o = 0; o < 4; o++)
                fetch_ahead(w[o] + ((size_t)c + 8 * ldw) * size, 1);
        } else if (fetch && dtype != LTN_F32) { /* which does without, measured */
#pragma GCC unroll 4
            for (int o = 0; o < 4; o++)
                fetch_far_ahead(w[o] + (size_t)c * size, ldw * size, 4, 1);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vf a = load_f32(x + r * ldx + c);
#pragma GCC unroll 4
            for (int o = 0; o < 4; o++)
                sum[r][o] = fma_v(a, b[o], sum[r][o]);
        }
    }
    if (c < cols) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vf a = load_part(x + r * ldx + c, cols - c);
#pragma GCC unroll 4
            for (int o = 0; o < 4; o++)
                sum[r][o] = fma_v(a, load_weights(w[o], dtype, (size_t)c, cols - c), sum[r][o]);
        }
    }
    put_tile(y, ldy, sum, rows, n_outs, (v4){1, 1, 1, 1}, NULL, add, bias);
}

/* dot_tile of fp8 weights. A row's scale waits for the sum. */
INLINE void fp8_tile(float *y, size_t ldy, const float *x, size_t ldx, const void *weights, size_t ldw,
                     const void *scales, int rows, int n_outs, int first, int cols, bool fetch, bool add,
                     const float *bias)
{
    const uint8_t *w[4];
    v4 scale = {0};
    for (int o = 0; o < 4; o++) { /* rows that are not there repeat the first */
        size_t at = (size_t)(o < n_outs ? o : 0);
        w[o] = (const uint8_t *)weights + at * ldw + first;
        scale[o] = 256 * ((const float *)scales)[at];
    }
    vf sum[DOT_ROWS][4];
    clear_tile(sum, rows);
    int c = 0;
    for (; c + VL <= cols; c += VL) {
        vf b[4];
#pragma GCC unroll 4
        for (int o = 0; o < 4; o++)
            b[o] = load_e4m3(w[o] + c);
        if (fetch) {
#pragma GCC unroll 4
            for (int o = 0; o < 4; o++)
                if (rows > 1)
                    fetch_ahead(w[o] + c + 8 * ldw, 1);
                else
                    fetch_far_ahead(w[o] + c, ldw, 4, 1);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vf a = load_f32(x + r * ldx + c);
#pragma GCC unroll 4
            for (int o = 0; o < 4; o++)
                sum[r][o] = fma_v(a, b[o], sum[r][o]);
        }
    }
    for (int o = 0; o < 4 && c < cols; o++) {
        uint8_t part[VL] = {0};
        vf b = load_e4m3(memcpy(part, w[o] + c, (size_t)(cols - c)));
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            sum[r][o] = fma_v(load_part(x + r * ldx + c, cols - c), b, sum[r][o]);
    }
    put_tile(y, ldy, sum, rows, n_outs, scale, NULL, add, bias);
}

/* ---- products in whole numbers: q8 and q4 ----
 *
 * The input of a tile is rounded to int16 with one scale for the columns of the tile: 2^-16 of its largest
 * value at most, far below what a weight of 8 bits has lost. Products of a group are summed exactly, and
 * its scale is applied once.
 *
 * For q4 the int16 are cut in two bytes, x = 256 h + l with l from -128 on, because bytes multiply in half
 * the instructions and a nibble is soon one: VL / 4 groups make a chunk, whose 4 VL bytes of codes hold one
 * vector of low and one of high nibbles. They are multiplied as 0 .. 15, which is the weight's code plus 8;
 * -8 times the sum of the inputs makes that good. Where the work of unpacking is shared by many rows, int16
 * may be faster (even and odd bytes of the codes apart); both ways give every lane the same whole number. */

enum {
    WHOLE_MOST = 127 * 256 + 127, /* the largest x with h below 128 */
    PARTS = LTN_GROUP / (2 * VL),
    TILE_GROUPS = MICRO_DOT_COLS / LTN_GROUP,
};

INLINE bool in_words(enum ltn_dtype dtype, int rows)
{
    return dtype == LTN_Q4 && rows > 1 && WORDS_FOR_ROWS;
}

INLINE bool in_chunks(enum ltn_dtype dtype)
{
    return dtype == LTN_Q4 || BYTES_FOR_Q8;
}

INLINE vi larger(vi a, vi b)
{
    const vi more = a > b;
    return (a & more) | (b & ~more);
}

INLINE float largest(const float *x, int n)
{
    vi most[4] = {0}; /* of the bits without the sign, which order floats as numbers; four, as each waits */
    int c = 0, top = 0;
    for (; c + 4 * VL <= n; c += 4 * VL) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            most[i] = larger((vi)load_f32(x + c + i * VL) & 0x7fffffff, most[i]);
    }
    const vi all = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    for (int i = 0; i < VL; i++)
        top = all[i] > top ? all[i] : top;
    for (; c < n; c++) {
        int bits = (int)(ltn_f32_to_bits(x[c]) & 0x7fffffffu);
        top = bits > top ? bits : top;
    }
    return ltn_bits_to_f32((uint32_t)top);
}

INLINE void round_row(int16_t *to, const float *x, float factor, int cols)
{
    typedef int16_t narrow __attribute__((vector_size(2 * VL)));
    const vf shift = splat(0x1.8p23f); /* puts the nearest integer into the low bits */
    for (int c = 0; c < cols; c += VL) {
        vf v = cols - c < VL ? load_part(x + c, cols - c) : load_f32(x + c);
        narrow n = __builtin_convertvector((vi)(v * splat(factor) + shift), narrow);
        memcpy(to + c, &n, sizeof n);
    }
}

INLINE void cut_row(vb planes[][4], vi *shift, const int16_t *x, int chunks, int offset, bool words_do)
{
    typedef int16_t words __attribute__((vector_size(LTN_GROUP)));
    typedef int32_t pairs __attribute__((vector_size(LTN_GROUP)));
    typedef int8_t bytes __attribute__((vector_size(LTN_GROUP / 2)));
    typedef int16_t evens __attribute__((vector_size(LTN_GROUP / 2)));
    for (int k = 0; k < chunks; k++)
        for (int g = 0; g < CHUNK_GROUPS; g++)
            for (int half = 0; half < 2; half++, x += LTN_GROUP / 2) {
                words v;
                memcpy(&v, x, sizeof v);
                const bytes high = words_do ? (bytes) __builtin_convertvector((pairs)v, evens)
                                            : __builtin_convertvector((v + 128) >> 8, bytes);
                const bytes low = words_do ? (bytes) __builtin_convertvector((pairs)v >> 16, evens)
                                           : __builtin_convertvector(v, bytes);
                memcpy((char *)&planes[k][half] + (size_t)g * sizeof high, &high, sizeof high);
                memcpy((char *)&planes[k][half + 2] + (size_t)g * sizeof low, &low, sizeof low);
            }
    if (words_do)
        return;
    for (int k = 0; k < chunks; k++) /* later, since what has just been written in halves loads slowly */
        shift[k] = -offset * dot_bytes((vb){0} + 1, (vb){0} + 1, planes[k], (vi){0});
}

INLINE void round_rows(struct rounded *to, enum ltn_dtype dtype, const float *x, size_t ldx, int rows,
                       int cols)
{
    const int unit = in_chunks(dtype) ? CHUNK : LTN_GROUP, padded = (cols + unit - 1) / unit * unit;
    for (int r = 0; r < rows; r++) {
        const float most = largest(x + r * ldx, cols);
        const bool usable = most > 0x1p-100f && most < INFINITY; /* as good as zero; or not a number */
        to[r].scale = usable ? most / WHOLE_MOST : most < INFINITY ? 0 : NAN;
        for (int c = cols; c < padded; c++)
            to[r].x[c] = 0;
        if (usable)
            round_row(to[r].x, x + r * ldx, WHOLE_MOST / most, cols);
        else
            memset(to[r].x, 0, (size_t)cols * sizeof *to[r].x);
        if (in_chunks(dtype))
            cut_row(to[r].planes, to[r].shift, to[r].x, padded / CHUNK, dtype == LTN_Q4 ? 8 : 128,
                    in_words(dtype, rows));
    }
}

/* The scales of n <= TILE_GROUPS groups, and zeros up to a multiple of VL. */
INLINE void load_scales(float *scales, const uint16_t *from, int n)
{
    uint16_t part[VL] = {0};
    int g = 0;
    for (; g + VL <= n; g += VL)
        store(scales + g, load_f16(from + g));
    if (g < n)
        store(scales + g, load_f16(memcpy(part, from + g, (size_t)(n - g) * sizeof *from)));
}

/* One group of q8 of one output against all rows of the tile; codes: of at least a whole group. */
INLINE void group_dots(vf sum[][4], const struct rounded *x, const uint8_t *codes, float scale, int rows,
                       int o, int g)
{
    vw b[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++)
        b[p] = load_i8(codes + p * 2 * VL);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const vw *a = (const vw *)(x[r].x + g * LTN_GROUP);
        vi total = madd(a[0], b[0]);
#pragma GCC unroll 4
        for (int p = 1; p < PARTS; p++)
            total += madd(a[p], b[p]);
        sum[r][o] = fma_v(__builtin_convertvector(total, vf), splat(scale), sum[r][o]);
    }
}

/* One chunk likewise, of q4 or, in bytes, of q8. */
INLINE void chunk_dots(vf sum[][4], const struct rounded *x, const uint8_t *codes, enum ltn_dtype dtype,
                       const float *scales, int rows, int o, int k)
{
    vb both, low, high;
    memcpy(&both, codes, sizeof both);
    const vw two = (vw)both, words[4] = {two << 12 >> 12, two << 8 >> 12, two << 4 >> 12, two >> 12};
    if (dtype == LTN_Q8) {
        halves(codes, &low, &high);
        low ^= 0x80;
        high ^= 0x80;
    } else {
        low = (both ^ 0x88) & 15;
        high = (vb)((vw)(both ^ 0x88) >> 4) & 15;
    }
    const vf scale = spread(scales + k * CHUNK_GROUPS);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const vb *p = x[r].planes[k];
        vi total = in_words(dtype, rows) ? madd(words[0], (vw)p[0]) + madd(words[1], (vw)p[1]) +
                                               madd(words[2], (vw)p[2]) + madd(words[3], (vw)p[3])
                                         : dot_bytes(low, high, p, x[r].shift[k]);
        sum[r][o] = fma_v(__builtin_convertvector(total, vf), scale, sum[r][o]);
    }
}

INLINE void whole_dots(vf sum[][4], const struct rounded *x, const uint8_t *codes, enum ltn_dtype dtype,
                       const float *scales, int rows, int o, int k)
{
    if (in_chunks(dtype))
        chunk_dots(sum, x, codes, dtype, scales, rows, o, k);
    else
        group_dots(sum, x, codes, scales[k], rows, o, k);
}

/* dot_tile of q8 or q4 weights, of an input that is rounded already. */
INLINE void whole_tile(float *y, size_t ldy, const struct rounded *x, const void *weights, size_t ldw,
                       const void *scales, enum ltn_dtype dtype, int rows, int n_outs, int first, int cols,
                       bool fetch, bool add, const float *bias)
{
    const uint8_t *w[4];
    float group_scales[4][TILE_GROUPS];
    const size_t row_bytes = ltn_row_bytes(dtype, ldw), n_groups = ltn_groups(ldw);
    for (int o = 0; o < 4; o++) { /* rows that are not there repeat the first */
        size_t at = (size_t)(o < n_outs ? o : 0);
        const uint16_t *s = (const uint16_t *)scales + at * n_groups + (size_t)first / LTN_GROUP;
        w[o] = (const uint8_t *)weights + at * row_bytes + ltn_row_bytes(dtype, (size_t)first);
        load_scales(group_scales[o], s, (int)ltn_groups((size_t)cols));
        if (fetch)
            __builtin_prefetch(s + 8 * n_groups);
    }
    const int step = in_chunks(dtype) ? CHUNK : LTN_GROUP, step_bytes = dtype == LTN_Q4 ? step / 2 : step;
    const int whole = cols / step, rest = (int)ltn_row_bytes(dtype, (size_t)cols) - whole * step_bytes;
    vf sum[DOT_ROWS][4];
    clear_tile(sum, rows);
    if (rows == 1) { /* in the order of memory, which is what the time goes into */
#pragma GCC unroll 4
        for (int o = 0; o < 4; o++)
            for (int k = 0; k < whole; k++) {
                fetch_far_ahead(w[o] + k * step_bytes, row_bytes, 2, step_bytes);
                whole_dots(sum, x, w[o] + k * step_bytes, dtype, group_scales[o], rows, o, k);
            }
    } else {
        for (int k = 0; k < whole; k++) {
#pragma GCC unroll 4
            for (int o = 0; o < 4; o++) {
                if (fetch)
                    fetch_ahead(w[o] + k * step_bytes + 8 * row_bytes, step_bytes);
                whole_dots(sum, x, w[o] + k * step_bytes, dtype, group_scales[o], rows, o, k);
            }
        }
    }
    for (int o = 0; o < 4 && rest > 0; o++) { /* the last group or chunk, where it is not full */
        uint8_t part[CHUNK] = {0};
        memcpy(part, w[o] + whole * step_bytes, (size_t)rest);
        whole_dots(sum, x, part, dtype, group_scales[o], rows, o, whole);
    }
    put_tile(y, ldy, sum, rows, n_outs, (v4){1, 1, 1, 1}, x, add, bias);
}

/* Any tile: rows (a constant) of x by n_outs rows of w, its columns from `first` on. */
INLINE void any_tile(float *y, size_t ldy, const float *x, size_t ldx, const struct rounded *rounded,
                     const void *w, size_t ldw, const void *scales, enum ltn_dtype dtype, int rows,
                     int n_outs, int first, int cols, bool fetch, bool add, const float *bias)
{
    if (dtype == LTN_Q8 || dtype == LTN_Q4)
        whole_tile(y, ldy, rounded, w, ldw, scales, dtype, rows, n_outs, first, cols, fetch, add, bias);
    else if (dtype == LTN_FP8)
        fp8_tile(y, ldy, x, ldx, w, ldw, scales, rows, n_outs, first, cols, fetch, add, bias);
    else
        dot_tile(y, ldy, x, ldx, w, ldw, dtype, rows, n_outs, first, cols, fetch, add, bias);
}

/* One row of x. Its time goes into reading w, so that is done in the order of memory: all pieces of four rows
 * of w before the next four, as far as the rounded input has room. */
INLINE void row_dots(float *y, const float *x, const void *w, const void *scales, enum ltn_dtype dtype,
                     int outs, int cols, bool add, const float *bias)
{
    enum { PIECES = 6 };
    const size_t ldw = (size_t)cols, row_bytes = ltn_row_bytes(dtype, ldw);
    const size_t scale_bytes = ltn_row_scale_bytes(dtype, ldw);
    struct rounded rounded[PIECES]; /* of q8 and q4 alone */
    for (int begin = 0; begin < cols; begin += PIECES * MICRO_DOT_COLS) {
        const int end = cols - begin < PIECES * MICRO_DOT_COLS ? cols : begin + PIECES * MICRO_DOT_COLS;
        for (int first = begin; first < end && (dtype == LTN_Q8 || dtype == LTN_Q4); first += MICRO_DOT_COLS)
            round_rows(&rounded[(first - begin) / MICRO_DOT_COLS], dtype, x + first, 0, 1,
                       end - first < MICRO_DOT_COLS ? end - first : MICRO_DOT_COLS);
        for (int o = 0; o < outs; o += 4) {
            const void *at = (const char *)w + (size_t)o * row_bytes;
            const void *s = scale_bytes ? (const char *)scales + (size_t)o * scale_bytes : NULL;
            for (int first = begin; first < end; first += MICRO_DOT_COLS)
                any_tile(y + o, 0, x + first, 0, &rounded[(first - begin) / MICRO_DOT_COLS], at, ldw, s,
                         dtype, 1, outs - o < 4 ? outs - o : 4, first,
                         end - first < MICRO_DOT_COLS ? end - first : MICRO_DOT_COLS, true, add || first > 0,
                         bias && first == 0 ? bias + o : NULL);
        }
    }
}

INLINE void dots(float *y, size_t ldy, const float *x, size_t ldx, const void *w, const void *scales,
                 enum ltn_dtype dtype, int rows, int outs, int cols, bool add, const float *bias)
{
    size_t ldw = (size_t)cols, row_bytes = ltn_row_bytes(dtype, ldw);
    size_t scale_bytes = ltn_row_scale_bytes(dtype, ldw);
    struct rounded rounded[DOT_ROWS]; /* of q8 and q4 alone */
    if (rows == 1) {
        row_dots(y, x, w, scales, dtype, outs, cols, add, bias);
        return;
    }
    for (int first = 0; first < cols; first += MICRO_DOT_COLS) {
        int n = cols - first < MICRO_DOT_COLS ? cols - first : MICRO_DOT_COLS;
        bool plus = add || first > 0;
        for (int r = 0; r < rows; r += DOT_ROWS) {
            if (dtype == LTN_Q8 || dtype == LTN_Q4)
                round_rows(rounded, dtype, x + r * ldx + first, ldx,
                           rows - r < DOT_ROWS ? rows - r : DOT_ROWS, n);
            for (int o = 0; o < outs; o += 4) {
                int n_outs = outs - o < 4 ? outs - o : 4;
                float *to = y + r * ldy + o;
                const float *from = x + r * ldx + first, *b = bias && first == 0 ? bias + o : NULL;
                const void *at = (const char *)w + (size_t)o * row_bytes;
                const void *s = scale_bytes ? (const char *)scales + (size_t)o * scale_bytes : NULL;
#define TILE(m) any_tile(to, ldy, from, ldx, rounded, at, ldw, s, dtype, m, n_outs, first, n, r == 0, plus, b)
                switch (rows - r < DOT_ROWS ? rows - r : DOT_ROWS) {
                case 1:
                    TILE(1);
                    break;
#if DOT_ROWS > 2
                case 2:
                    TILE(2);
                    break;
#endif
#if DOT_ROWS > 3
                case 3:
                    TILE(3);
                    break;
                case 4:
                    TILE(4);
                    break;
                case 5:
                    TILE(5);
                    break;
#endif
                default:
                    TILE(DOT_ROWS);
                }
#undef TILE
            }
        }
    }
}

#define DOTS(name, dtype)                                                                                    \
    static void name(float *y, size_t ldy, const float *x, size_t ldx, const void *w, const void *scales,    \
                     int rows, int outs, int cols, bool add, const float *bias)                              \
    {                                                                                                        \
        dots(y, ldy, x, ldx, w, scales, dtype, rows, outs, cols, add, bias);                                 \
    }
DOTS(dots_f32, LTN_F32)
DOTS(dots_bf16, LTN_BF16)
DOTS(dots_f16, LTN_F16)
DOTS(dots_q8, LTN_Q8)
DOTS(dots_fp8, LTN_FP8)
DOTS(dots_q4, LTN_Q4)
#undef DOTS

/* m rows by `vecs` vectors (constants, at most OUTER_ROWS by 2), of which the last has `lanes` lanes. */
INLINE void outer_tile(float *c, size_t ldc, const float *a, size_t rs, size_t ks, const float *b, size_t ldb,
                       int m, int vecs, int lanes, int k, float shrink)
{
    vf sum[OUTER_ROWS][2] = {0};
    for (int l = 0; l < k; l++) {
        vf row[2];
        const float *at = b + (size_t)l * ldb;
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++)
            row[v] = lanes < VL ? load_part(at + v * VL, lanes) : load_f32(at + v * VL);
#pragma GCC unroll 16
        for (int i = 0; i < m; i++) {
            vf s = splat(a[i * rs + l * ks]);
#pragma GCC unroll 2
            for (int v = 0; v < vecs; v++)
                sum[i][v] = fma_v(s, row[v], sum[i][v]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) {
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) {
            float *at = c + i * ldc + v * VL;
            vf old = lanes < VL ? load_part(at, lanes) : load_f32(at);
            old += fma_v(splat(-shrink), old, sum[i][v]);
            if (lanes < VL)
                store_part(at, old, lanes);
            else
                store(at, old);
        }
    }
}

/* m rows (a constant) by n columns. */
INLINE void outer_rows(float *c, size_t ldc, const float *a, size_t rs, size_t ks, const float *b, size_t ldb,
                       int m, int n, int k, float shrink)
{
    int j = 0;
    for (; j + 2 * VL <= n; j += 2 * VL)
        outer_tile(c + j, ldc, a, rs, ks, b + j, ldb, m, 2, VL, k, shrink);
    for (; j + VL <= n; j += VL)
        outer_tile(c + j, ldc, a, rs, ks, b + j, ldb, m, 1, VL, k, shrink);
    if (j < n)
        outer_tile(c + j, ldc, a, rs, ks, b + j, ldb, m, 1, n - j, k, shrink);
}

static void outer(float *c, size_t ldc, const float *a, size_t rs, size_t ks, const float *b, size_t ldb,
                  int m, int n, int k, float shrink)
{
    int i = 0;
    for (; i + OUTER_ROWS <= m; i += OUTER_ROWS)
        outer_rows(c + i * ldc, ldc, a + i * rs, rs, ks, b, ldb, OUTER_ROWS, n, k, shrink);
    for (; i + 4 <= m; i += 4)
        outer_rows(c + i * ldc, ldc, a + i * rs, rs, ks, b, ldb, 4, n, k, shrink);
    for (; i < m; i++)
        outer_rows(c + i * ldc, ldc, a + i * rs, rs, ks, b, ldb, 1, n, k, shrink);
}

/* `vecs` vectors of columns (a constant, at most 4), of which the last has `lanes` lanes. */
INLINE void step_columns(float *o, float *s, size_t lds, const float *q, const float *k, const float *v,
                         float one_less_r, int d, int vecs, int lanes)
{
    vf value[4], sum[4] = {0};
#pragma GCC unroll 4
    for (int i = 0; i < vecs; i++)
        value[i] = lanes < VL ? load_part(v + i * VL, lanes) : load_f32(v + i * VL);
    for (int c = 0; c < d; c++, s += lds) {
#pragma GCC unroll 4
        for (int i = 0; i < vecs; i++) {
            float *at = s + i * VL;
            vf old = lanes < VL ? load_part(at, lanes) : load_f32(at);
            old += fma_v(splat(k[c]), value[i], splat(-one_less_r) * old);
            if (lanes < VL)
                store_part(at, old, lanes);
            else
                store(at, old);
            sum[i] = fma_v(splat(q[c]), old, sum[i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < vecs; i++) {
        if (lanes < VL)
            store_part(o + i * VL, sum[i], lanes);
        else
            store(o + i * VL, sum[i]);
    }
}

static void step(float *o, float *s, size_t lds, const float *q, const float *k, const float *v,
                 float one_less_r, int d, int n)
{
    int j = 0;
    for (; j + 4 * VL <= n; j += 4 * VL)
        step_columns(o + j, s + j, lds, q, k, v + j, one_less_r, d, 4, VL);
    for (; j + VL <= n; j += VL)
        step_columns(o + j, s + j, lds, q, k, v + j, one_less_r, d, 1, VL);
    if (j < n)
        step_columns(o + j, s + j, lds, q, k, v + j, one_less_r, d, 1, n - j);
}

/* ---- element by element ------------------------------------------------------------------------------ */

/* sum_i (x[i] - mean)^power, power 1 or 2 (a constant) */
INLINE float sum_power(const float *x, float mean, int power, size_t n)
{
    vf sum[4] = {0}, m = splat(mean);
    size_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vf v = load_f32(x + i + j * VL) - m;
            sum[j] += power == 1 ? v : (vf)(v * v);
        }
    }
    v4 four = (v4)sum_lanes(sum[0], sum[1], sum[2], sum[3]);
    float total = (four[0] + four[1]) + (four[2] + four[3]);
    for (; i < n; i++) {
        float v = x[i] - mean;
        total += power == 1 ? v : v * v;
    }
    return total;
}

static float sum(const float *x, size_t n)
{
    return sum_power(x, 0, 1, n);
}

static float sum_squares(const float *x, float mean, size_t n)
{
    return sum_power(x, mean, 2, n);
}

static void normalize(float *y, const float *x, const float *gate, const struct ltn_norm *norm, float mean,
                      float scale, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = (x[i] - mean) * scale;
    if (norm->weight)
        for (size_t i = 0; i < n; i++)
            y[i] = fma_s(y[i], norm->weight[i], norm->bias[i]);
    if (gate)
        for (size_t i = 0; i < n; i++)
            y[i] *= gate[i];
}

static void multiply(float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        a[i] *= b[i];
}

static void scale(float *x, float factor, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] *= factor;
}

/* yes where mask is all ones, no where it is zero */
INLINE vf choose(vi mask, vf yes, vf no)
{
    return (vf)((mask & (vi)yes) | (~mask & (vi)no));
}

/* exp(x) for x in [-87, 88]; beyond it the value at the border, so that nothing overflows or goes subnormal.
 * x = n ln 2 + r with |r| <= ln 2 / 2; polynomial of Cephes' expf. Relative error below 2e-7. NaN stays NaN.
 */
INLINE vf exp_v(vf x)
{
    x = choose(x < splat(-87.0f), splat(-87.0f), x);
    x = choose(x > splat(88.0f), splat(88.0f), x);
    vf shifted = fma_v(x, splat(0x1.715476p0f), splat(0x1.8p23f)); /* n in the low bits */
    vf n = shifted - splat(0x1.8p23f);
    vf r = fma_v(n, splat(2.12194440e-4f), fma_v(n, splat(-0.693359375f), x));
    vf p = splat(1.9875691500e-4f);
    p = fma_v(p, r, splat(1.3981999507e-3f));
    p = fma_v(p, r, splat(8.3334519073e-3f));
    p = fma_v(p, r, splat(4.1665795894e-2f));
    p = fma_v(p, r, splat(1.6666665459e-1f));
    p = fma_v(p, r, splat(5.0000001201e-1f));
    p = fma_v(p, r * r, r) + splat(1.0f);
    return p * (vf)(((vi)shifted << 23) + (vi)splat(1.0f));
}

INLINE vf activate_v(vf x, enum ltn_act act)
{
    vf one = splat(1.0f), zero = splat(0.0f);
    switch (act) {
    case LTN_ACT_SILU:
        return x / (one + exp_v(-x));
    case LTN_ACT_SIGMOID:
        return one / (one + exp_v(-x));
    case LTN_ACT_EXP:
        return exp_v(x);
    case LTN_ACT_RELU:
        return choose(x < zero, zero, x);
    case LTN_ACT_LEAK:
        return choose(x < zero, splat(0.01f) * x, x);
    case LTN_ACT_ELU_ADD1:
        return choose(x > zero, one + x, exp_v(x));
    case LTN_ACT_ELU_ADD2:
        return choose(x > zero, splat(2.0f) + x, one + exp_v(x));
    default:
        return x;
    }
}

INLINE void activate_all(float *x, enum ltn_act act, float shift, size_t n)
{
    size_t i = 0;
    for (; i + VL <= n; i += VL)
        store(x + i, activate_v(load_f32(x + i) - splat(shift), act));
    if (i < n) {
        int rest = (int)(n - i);
        store_part(x + i, activate_v(load_part(x + i, rest) - splat(shift), act), rest);
    }
}

static void activate(float *x, enum ltn_act act, float shift, size_t n)
{
    switch (act) {
#define CASE(name)                                                                                           \
    case name:                                                                                               \
        activate_all(x, name, shift, n);                                                                     \
        break
        CASE(LTN_ACT_SILU);
        CASE(LTN_ACT_SIGMOID);
        CASE(LTN_ACT_EXP);
        CASE(LTN_ACT_RELU);
        CASE(LTN_ACT_LEAK);
        CASE(LTN_ACT_ELU_ADD1);
        CASE(LTN_ACT_ELU_ADD2);
#undef CASE
    case LTN_ACT_GELU: /* rare in this family: left to the C library */
        for (size_t i = 0; i < n; i++)
            x[i] = (float)(0.5 * x[i] * erfc(-0.7071067811865476 * x[i]));
        break;
    case LTN_ACT_ELU:
        for (size_t i = 0; i < n; i++)
            x[i] = x[i] > 0 ? x[i] : expm1f(x[i]);
        break;
    case LTN_ACT_SINE:
        for (size_t i = 0; i < n; i++)
            x[i] = sinf(x[i]);
        break;
    case LTN_ACT_NONE:
        break;
    }
}

/* Turns are reduced in f64, to the nearest quarter; the rest, at most an eighth, goes to Cephes' polynomials
 * for sinf and cosf. */
static void angles(float *cosine, float *sine, const float *theta, double pos, size_t n)
{
    const double round = 0x1.8p52; /* adding and subtracting it rounds to an integer */
    for (size_t i = 0; i < n; i++) {
        double turns = theta[i] * 0.15915494309189535 * pos;
        turns -= (turns + round) - round;
        double quarters = (4 * turns + round) - round; /* -2 .. 2 */
        float x = (float)((turns - quarters * 0.25) * 6.283185307179586), xx = x * x, q = (float)quarters;
        float s = fma_s(fma_s(-1.9515295891e-4f, xx, 8.3321608736e-3f), xx, -1.6666654611e-1f);
        float c = fma_s(fma_s(2.443315711809948e-5f, xx, -1.388731625493765e-3f), xx, 4.166664568298827e-2f);
        s = fma_s(s * xx, x, x);
        c = fma_s(c * xx, xx, fma_s(xx, -0.5f, 1.0f));
        float odd = q * q == 1.0f ? 1.0f : 0.0f, even = 1.0f - odd;
        float sign = q * q == 4.0f ? -1.0f : 1.0f;
        cosine[i] = sign * even * c - odd * q * s;
        sine[i] = sign * even * s + odd * q * c;
    }
}

const struct micro MICRO_TABLE = {
    .name = MICRO_NAME,
    .dots = {[LTN_F32] = dots_f32,
             [LTN_BF16] = dots_bf16,
             [LTN_F16] = dots_f16,
             [LTN_Q8] = dots_q8,
             [LTN_FP8] = dots_fp8,
             [LTN_Q4] = dots_q4},
    .outer = outer,
    .step = step,
    .sum = sum,
    .sum_squares = sum_squares,
    .normalize = normalize,
    .multiply = multiply,
    .scale = scale,
    .activate = activate,
    .angles = angles,
};
