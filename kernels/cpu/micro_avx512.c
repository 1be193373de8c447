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
