/* Element types of weights and activations, and their scalar conversions. Usable from C and CUDA. */
#ifndef LTN_DTYPE_H
#define LTN_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum ltn_dtype {
    LTN_F32 = 0,
    LTN_BF16 = 1, /* upper half of an f32 */
    LTN_F16 = 2,  /* IEEE binary16 */
    LTN_Q8 = 3,   /* these three only as matrices, with scales: kernels/quant.h */
    LTN_FP8 = 4,
    LTN_Q4 = 5,
    LTN_N_DTYPES = 6
};

static inline size_t ltn_dtype_size(enum ltn_dtype dtype) /* bytes of one element of F32, BF16 or F16 */
{
    return dtype == LTN_F32 ? 4 : 2;
}

/* For people; of the first three also the name that safetensors uses. */
static inline const char *ltn_dtype_name(enum ltn_dtype dtype)
{
    static const char *const names[LTN_N_DTYPES] = {"F32", "BF16", "F16", "Q8", "FP8", "Q4"};
    return names[dtype];
}

static inline float ltn_bits_to_f32(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t ltn_f32_to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float ltn_bf16_to_f32(uint16_t half)
{
    return ltn_bits_to_f32((uint32_t)half << 16);
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline uint16_t ltn_f32_to_bf16(float value)
{
    uint32_t bits = ltn_f32_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

/* To tf32, 10 bits after the point: to nearest, ties away from zero (as cvt.rna does); infinity and NaN stay.
 */
static inline float ltn_round_tf32(float value)
{
    uint32_t bits = ltn_f32_to_bits(value);
    return (bits & 0x7f800000u) == 0x7f800000u ? value : ltn_bits_to_f32((bits + 0x1000u) & 0xffffe000u);
}

static inline float ltn_f16_to_f32(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) /* infinity, NaN */
        return ltn_bits_to_f32(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) { /* zero, subnormal: magnitude * 2^-24 is exact in f32 */
        float value = (float)magnitude * 0x1p-24f;
        return sign ? -value : value;
    }
    return ltn_bits_to_f32(sign | ((magnitude << 13) + (112u << 23)));
}

/* Round to nearest, ties to even; overflow becomes infinity; NaN stays NaN. */
static inline uint16_t ltn_f32_to_f16(float value)
{
    uint32_t bits = ltn_f32_to_bits(value);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000u) /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000u) { /* below 2^-14: adding 0.5 lets the f32 unit round at 2^-24 */
        float shifted = ltn_bits_to_f32(bits) + 0.5f;
        return (uint16_t)(sign | (ltn_f32_to_bits(shifted) - 0x3f000000u));
    }
    bits += 0xfffu + ((bits >> 13) & 1);
    return (uint16_t)(sign | ((bits - (112u << 23)) >> 13));
}

/* Element i of an array of the given type. */
static inline float ltn_load(const void *data, enum ltn_dtype dtype, size_t i)
{
    if (dtype == LTN_F32)
        return ((const float *)data)[i];
    uint16_t half = ((const uint16_t *)data)[i];
    return dtype == LTN_BF16 ? ltn_bf16_to_f32(half) : ltn_f16_to_f32(half);
}

#endif
