/* Inner loops for x86 with AVX-512 (F, BW, VL, DQ). */
#include "kernels/cpu/micro.h"

#include <immintrin.h>

#define VL 16
#define DOT_ROWS 6
#define OUTER_ROWS 12
typedef __m512 vf;

static inline vf fma_v(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}

static inline float fma_s(float a, float b, float c)
{
    return __builtin_fmaf(a, b, c);
}

static inline vf load_f32(const float *p)
{
    return _mm512_loadu_ps(p);
}

static inline vf load_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline vf load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

static inline vf load_i8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

/* The sign stays, the other bits become an f16 of 2^-8 times the value. */
static inline vf load_e4m3(const uint8_t *p)
{
    __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbfff)));
}

/* Of each byte the low or the high nibble. The table is looked up by the low four bits. */
static inline vf load_nibbles(const uint8_t *p, bool high)
{
    const vf values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm512_permutexvar_ps(high ? _mm512_srli_epi32(wide, 4) : wide, values);
}

/* The sums of the lanes of four vectors. */
static inline __m128 sum_lanes(vf a, vf b, vf c, vf d)
{
    vf ac = _mm512_add_ps(_mm512_unpacklo_ps(a, c), _mm512_unpackhi_ps(a, c));
    vf bd = _mm512_add_ps(_mm512_unpacklo_ps(b, d), _mm512_unpackhi_ps(b, d));
    vf abcd = _mm512_add_ps(_mm512_unpacklo_ps(ac, bd), _mm512_unpackhi_ps(ac, bd));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#define MICRO_TABLE ltn_micro_avx512
#define MICRO_NAME "AVX-512"
#include "kernels/cpu/micro_body.h"
