/* Inner loops in portable C: four-lane vectors of the compiler, no instruction beyond the base machine's. */
#include "kernels/cpu/micro.h"

#define VL 4
#define DOT_ROWS 2
#define OUTER_ROWS 4
#define BYTES_FOR_Q8 1
#define WORDS_FOR_ROWS 0
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef int16_t vw __attribute__((vector_size(16)));
typedef uint8_t vb __attribute__((vector_size(16)));

static inline vf fma_v(vf a, vf b, vf c)
{
    return a * b + c;
}

static inline float fma_s(float a, float b, float c)
{
    return a * b + c;
}

static inline vf load_f32(const float *p)
{
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline vf load_bf16(const uint16_t *p)
{
    return (vf){ltn_bf16_to_f32(p[0]), ltn_bf16_to_f32(p[1]), ltn_bf16_to_f32(p[2]), ltn_bf16_to_f32(p[3])};
}

static inline vf load_f16(const uint16_t *p)
{
    return (vf){ltn_f16_to_f32(p[0]), ltn_f16_to_f32(p[1]), ltn_f16_to_f32(p[2]), ltn_f16_to_f32(p[3])};
}

static inline vf load_e4m3(const uint8_t *p)
{
    return (vf){ltn_e4m3_to_f32(p[0]), ltn_e4m3_to_f32(p[1]), ltn_e4m3_to_f32(p[2]), ltn_e4m3_to_f32(p[3])} *
           0x1p-8f;
}

static inline vw load_i8(const uint8_t *p)
{
    vw v;
    for (int i = 0; i < 2 * VL; i++)
        v[i] = (int8_t)p[i];
    return v;
}

static inline vi madd(vw a, vw b)
{
    vi v;
    for (int i = 0; i < VL; i++)
        v[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return v;
}

static inline vi dot_bytes(vb low, vb high, const vb p[4], vi sum)
{
    const int8_t(*x)[4 * VL] = (const int8_t(*)[4 * VL]) p;
    int32_t lanes[VL] = {0};
    for (int i = 0; i < 4 * VL; i++)
        lanes[i / 4] += 256 * (low[i] * x[0][i] + high[i] * x[1][i]) + low[i] * x[2][i] + high[i] * x[3][i];
    return (vi){lanes[0], lanes[1], lanes[2], lanes[3]} + sum;
}

static inline void halves(const uint8_t *codes, vb *low, vb *high)
{
    memcpy(low, codes, sizeof *low);
    memcpy(high, codes + sizeof *low, sizeof *high);
}

static inline vf spread(const float *scales)
{
    return (vf){scales[0], scales[0], scales[0], scales[0]};
}

/* The sums of the lanes of four vectors. */
static inline vf sum_lanes(vf a, vf b, vf c, vf d)
{
    typedef int32_t vi __attribute__((vector_size(16)));
    vf ac_lo = __builtin_shuffle(a, c, (vi){0, 4, 1, 5}), ac_hi = __builtin_shuffle(a, c, (vi){2, 6, 3, 7});
    vf bd_lo = __builtin_shuffle(b, d, (vi){0, 4, 1, 5}), bd_hi = __builtin_shuffle(b, d, (vi){2, 6, 3, 7});
    vf ac = ac_lo + ac_hi, bd = bd_lo + bd_hi;
    return __builtin_shuffle(ac, bd, (vi){0, 4, 1, 5}) + __builtin_shuffle(ac, bd, (vi){2, 6, 3, 7});
}

#define MICRO_TABLE ltn_micro_portable
#define MICRO_NAME "portable"
#include "kernels/cpu/micro_body.h"
