/* Inner loops for x86 with AVX-512 (F, BW, VL, DQ); micro_vnni.c includes them for processors with VNNI. */
#include "kernels/cpu/micro.h"

#include <immintrin.h>

#define VL 16
#define DOT_ROWS 6
#define OUTER_ROWS 12
#define WORDS_FOR_ROWS 0
#ifdef __AVX512VNNI__
#define BYTES_FOR_Q8 1
#else
#define BYTES_FOR_Q8 0
#endif
typedef __m512 vf;
typedef int32_t vi __attribute__((vector_size(64)));
typedef int16_t vw __attribute__((vector_size(64)));
typedef uint8_t vb __attribute__((vector_size(64)));

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

static inline vi madd(vw a, vw b)
{
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}

#ifdef __AVX512VNNI__
static inline vi dot_bytes(vb low, vb high, const vb p[4], vi sum)
{
    const __m512i l = (__m512i)low, h = (__m512i)high;
    __m512i a =
        _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), l, (__m512i)p[0]), h, (__m512i)p[1]);
    __m512i b = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32((__m512i)sum, l, (__m512i)p[2]), h, (__m512i)p[3]);
    return ((vi)a << 8) + (vi)b;
}
#else
/* Four products of at most 15 * 128 are an int16 yet. */
static inline vi dot_bytes(vb low, vb high, const vb p[4], vi sum)
{
    const __m512i l = (__m512i)low, h = (__m512i)high;
    __m512i a =
        _mm512_add_epi16(_mm512_maddubs_epi16(l, (__m512i)p[0]), _mm512_maddubs_epi16(h, (__m512i)p[1]));
    __m512i b =
        _mm512_add_epi16(_mm512_maddubs_epi16(l, (__m512i)p[2]), _mm512_maddubs_epi16(h, (__m512i)p[3]));
    return (vi)_mm512_madd_epi16(a, _mm512_set1_epi16(256)) + (vi)_mm512_madd_epi16(b, _mm512_set1_epi16(1)) +
           sum;
}
#endif

static inline void halves(const uint8_t *codes, vb *low, vb *high)
{
    const __m512i a = _mm512_loadu_si512(codes), b = _mm512_loadu_si512(codes + 64);
    *low = (vb)_mm512_shuffle_i64x2(a, b, 0x88);  /* quarters 0 and 2 of a, then of b */
    *high = (vb)_mm512_shuffle_i64x2(a, b, 0xdd); /* 1 and 3 */
}

static inline vf spread(const float *scales)
{
    const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(scales)), lanes);
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

#ifdef __AVX512VNNI__
#define MICRO_TABLE ltn_micro_vnni
#define MICRO_NAME "AVX-512 VNNI"
#else
#define MICRO_TABLE ltn_micro_avx512
#define MICRO_NAME "AVX-512"
#endif
#include "kernels/cpu/micro_body.h"
