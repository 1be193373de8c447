/* Inner loops for x86 with AVX-512 (F, BW, VL, DQ). */
#include "kernels/cpu/micro.h"

#include <immintrin.h>

#define VL 16
#define DOT_ROWS 6
#define OUTER_ROWS 12
typedef __m512 vf;
typedef int32_t vi __attribute__((vector_size(64)));
typedef int16_t vw __attribute__((vector_size(64)));

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

/* The sign stays, the other bits become an f16 of 2^-8 times the value. */
static inline vf load_e4m3(const uint8_t *p)
{
    __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbfff)));
}

static inline vw load_i8(const uint8_t *p)
{
    return (vw)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
}

/* All nibbles of a group: the low ones of its bytes, then the high ones. */
static inline vw load_nibbles(const uint8_t *group, int part)
{
    (void)part;
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)group));
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_slli_epi16(wide, 4)), wide, 1);
    return (vw)_mm512_srai_epi16(_mm512_slli_epi16(both, 8), 12);
}

static inline vi madd(vw a, vw b)
{
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
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
