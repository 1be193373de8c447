/* Inner loops for x86 with AVX2, FMA and F16C. */
#include "kernels/cpu/micro.h"

#include <immintrin.h>

#define VL 8
#define DOT_ROWS 3
#define OUTER_ROWS 6
#define BYTES_FOR_Q8 0
#define WORDS_FOR_ROWS 1
typedef __m256 vf;
typedef int32_t vi __attribute__((vector_size(32)));
typedef int16_t vw __attribute__((vector_size(32)));
typedef uint8_t vb __attribute__((vector_size(32)));

static inline vf fma_v(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}

static inline float fma_s(float a, float b, float c)
{
    return __builtin_fmaf(a, b, c);
}

static inline vf load_f32(const float *p)
{
    return _mm256_loadu_ps(p);
}

static inline vf load_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static inline vf load_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

/* The sign stays, the other bits become an f16 of 2^-8 times the value. */
static inline vf load_e4m3(const uint8_t *p)
{
    __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p)), 7);
    return _mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16((short)0xbfff)));
}

static inline vw load_i8(const uint8_t *p)
{
    return (vw)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
}

static inline vi madd(vw a, vw b)
{
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}

/* Four products of at most 15 * 128 are an int16 yet. */
static inline vi dot_bytes(vb low, vb high, const vb p[4], vi sum)
{
    const __m256i l = (__m256i)low, h = (__m256i)high;
    __m256i a =
        _mm256_add_epi16(_mm256_maddubs_epi16(l, (__m256i)p[0]), _mm256_maddubs_epi16(h, (__m256i)p[1]));
    __m256i b =
        _mm256_add_epi16(_mm256_maddubs_epi16(l, (__m256i)p[2]), _mm256_maddubs_epi16(h, (__m256i)p[3]));
    return (vi)_mm256_madd_epi16(a, _mm256_set1_epi16(256)) + (vi)_mm256_madd_epi16(b, _mm256_set1_epi16(1)) +
           sum;
}

static inline void halves(const uint8_t *codes, vb *low, vb *high)
{
    const __m256i a = _mm256_loadu_si256((const __m256i *)codes),
                  b = _mm256_loadu_si256((const __m256i *)codes + 1);
    *low = (vb)_mm256_permute2x128_si256(a, b, 0x20);
    *high = (vb)_mm256_permute2x128_si256(a, b, 0x31);
}

static inline vf spread(const float *scales)
{
    double pair; /* two scales, moved as one */
    memcpy(&pair, scales, sizeof pair);
    return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(pair)),
                                _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0));
}

/* The sums of the lanes of four vectors. */
static inline __m128 sum_lanes(vf a, vf b, vf c, vf d)
{
    vf ac = _mm256_add_ps(_mm256_unpacklo_ps(a, c), _mm256_unpackhi_ps(a, c));
    vf bd = _mm256_add_ps(_mm256_unpacklo_ps(b, d), _mm256_unpackhi_ps(b, d));
    vf abcd = _mm256_add_ps(_mm256_unpacklo_ps(ac, bd), _mm256_unpackhi_ps(ac, bd));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

#define MICRO_TABLE ltn_micro_avx2
#define MICRO_NAME "AVX2"
#include "kernels/cpu/micro_body.h"
