/* Quantised matrices: q8, fp8, q4. Layouts, sizes and scalar conversions, usable from C and CUDA;
 * kernels/QUANT.md draws them and says why. Everything is symmetric: a weight is its code times a scale.
 *
 *   LTN_Q8   code: int8, -127 .. 127; one f16 scale for LTN_GROUP weights of a row
 *   LTN_FP8  code: e4m3 (S.1111.111 is NaN, no infinities, largest 448); one f32 scale for a row
 *   LTN_Q4   code: -8 .. 7 in two's complement, a nibble; one f16 scale for LTN_GROUP weights of a row
 *
 * Rows lie one after another. A row of q8 or fp8 is cols bytes. A row of q4 is 16 bytes a group: byte j has
 * weight j of the group in its low half and weight j + 16 in its high half; a last group that is not full is
 * filled with zeros. Scales: [rows, ltn_row_scales]. */
#ifndef LTN_QUANT_H
#define LTN_QUANT_H

#include "kernels/dtype.h"

#include <math.h>
#include <stdbool.h>

enum { LTN_GROUP = 32, LTN_Q4_GROUP_BYTES = LTN_GROUP / 2 };

static inline bool ltn_is_quantised(enum ltn_dtype dtype)
{
    return dtype >= LTN_Q8;
}

static inline size_t ltn_groups(size_t cols)
{
    return (cols + LTN_GROUP - 1) / LTN_GROUP;
}

/* Bytes of a row of a matrix of any type. */
static inline size_t ltn_row_bytes(enum ltn_dtype dtype, size_t cols)
{
    if (dtype == LTN_Q4)
        return ltn_groups(cols) * LTN_Q4_GROUP_BYTES;
    return ltn_is_quantised(dtype) ? cols : cols * ltn_dtype_size(dtype);
}

/* Scales of a row; 0 where there are none. */
static inline size_t ltn_row_scales(enum ltn_dtype dtype, size_t cols)
{
    return !ltn_is_quantised(dtype) ? 0 : dtype == LTN_FP8 ? 1 : ltn_groups(cols);
}

static inline enum ltn_dtype ltn_scale_dtype(enum ltn_dtype dtype)
{
    return dtype == LTN_FP8 ? LTN_F32 : LTN_F16;
}

static inline size_t ltn_row_scale_bytes(enum ltn_dtype dtype, size_t cols)
{
    return ltn_row_scales(dtype, cols) * ltn_dtype_size(ltn_scale_dtype(dtype));
}

/* Without its exponent's bias of 7, an e4m3 is an f16 of 2^-8 times its value: only NaN is to be told. */
static inline float ltn_e4m3_to_f32(uint8_t code)
{
    if ((code & 0x7f) == 0x7f)
        return ltn_bits_to_f32(0x7fc00000u);
    return 256 * ltn_f16_to_f32((uint16_t)((code & 0x80) << 8 | (code & 0x7f) << 7));
}

/* Round to nearest, ties to even; beyond 448 it is 448; NaN stays NaN. */
static inline uint8_t ltn_f32_to_e4m3(float value)
{
    uint32_t bits = ltn_f32_to_bits(value), sign = bits >> 24 & 0x80;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u)
        return (uint8_t)(sign | 0x7f);
    if (bits >= 0x43e00000u) /* 448 */
        return (uint8_t)(sign | 0x7e);
    if (bits < 0x3c800000u) { /* below 2^-6: adding 2^14 lets the f32 unit round at 2^-9 */
        float shifted = ltn_bits_to_f32(bits) + 0x1p14f;
        return (uint8_t)(sign | (ltn_f32_to_bits(shifted) - 0x46800000u));
    }
    bits += 0x7ffffu + ((bits >> 20) & 1);
    return (uint8_t)(sign | ((bits - (120u << 23)) >> 20));
}

/* Weight [row, col] of a matrix of any type. */
static inline float ltn_weight(const void *data, const void *scales, enum ltn_dtype dtype, size_t cols,
                               size_t row, size_t col)
{
    if (!ltn_is_quantised(dtype))
        return ltn_load(data, dtype, row * cols + col);
    const uint8_t *codes = (const uint8_t *)data + row * ltn_row_bytes(dtype, cols);
    if (dtype == LTN_FP8)
        return ltn_e4m3_to_f32(codes[col]) * ((const float *)scales)[row];
    float scale = ltn_f16_to_f32(((const uint16_t *)scales)[row * ltn_groups(cols) + col / LTN_GROUP]);
    if (dtype == LTN_Q8)
        return (float)(int8_t)codes[col] * scale;
    size_t in_group = col % LTN_GROUP;
    int nibble = codes[col / LTN_GROUP * LTN_Q4_GROUP_BYTES + in_group % LTN_Q4_GROUP_BYTES] >>
                 (in_group < LTN_Q4_GROUP_BYTES ? 0 : 4);
    return (float)(((nibble & 15) ^ 8) - 8) * scale;
}

/* ---- making them: kernels/quant.c ---------------------------------------------------------------------- */

/* Scales, as they will be stored, to choose from for n weights that share one, at most LTN_QUANT_SCALES: fp8
 * has one, which gives the largest weight the largest code. Infinite where f16 cannot hold it. Returns how
 * many. */
enum { LTN_QUANT_SCALES = 60 };
size_t ltn_quant_scales(enum ltn_dtype dtype, const float *weights, size_t n, float *scales);

/* The code nearest to a weight, in the low byte, and in *value the weight that it stands for. */
int ltn_quant_code(enum ltn_dtype dtype, float weight, float scale, float *value);

/* Puts the code of column `col` into a row of codes, whose bytes must be zero before. */
void ltn_quant_put(enum ltn_dtype dtype, void *row, size_t col, int code);

/* Puts scale number i into a row's scales. */
void ltn_quant_put_scale(enum ltn_dtype dtype, void *row_scales, size_t i, float scale);

/* One row, each weight to the nearest code. weights: [cols]; row: ltn_row_bytes; scales: ltn_row_scale_bytes.
 * False where a scale is infinite. */
bool ltn_quantise_row(enum ltn_dtype dtype, const float *weights, size_t cols, void *row, void *row_scales);

#endif
