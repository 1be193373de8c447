/* The inner loops of the CPU backend, one table per instruction set. micro_body.h writes them once over a
 * vector type; micro_portable.c, micro_avx2.c, micro_avx512.c and micro_vnni.c define that type and include
 * it.
 *
 * In every one of them the value of an output element depends on its own inputs and on the length of its sum
 * alone, never on which rows or columns it is computed together with: so results are the same bits however
 * the work is cut among calls, rows and threads. */
#ifndef LTN_CPU_MICRO_H
#define LTN_CPU_MICRO_H

#include "kernels/ops.h"

enum { MICRO_DOT_COLS = 1024 }; /* longer dot products are summed in pieces of so many columns */

struct micro {
    const char *name;

    /* y[r, o] = (add ? y[r, o] : 0) + sum_c x[r, c] w[o, c] + bias[o], by element type of w.
     * w: [outs, cols] contiguous, and scales where it is quantised; bias: [outs] or NULL; ldx, ldy: row
     * strides of x and y in floats. */
    void (*dots[LTN_N_DTYPES])(float *y, size_t ldy, const float *x, size_t ldx, const void *w,
                               const void *scales, int rows, int outs, int cols, bool add, const float *bias);

    /* c[i, j] += sum_l a[i * rs + l * ks] b[l, j] - shrink * c[i, j],  i < m, j < n, l < k */
    void (*outer)(float *c, size_t ldc, const float *a, size_t rs, size_t ks, const float *b, size_t ldb,
                  int m, int n, int k, float shrink);

    /* One token of one head, n columns: s[c, j] += k[c] v[j] - one_less_r * s[c, j], then
     * o[j] = sum_c q[c] s[c, j];  c < d, j < n */
    void (*step)(float *o, float *s, size_t lds, const float *q, const float *k, const float *v,
                 float one_less_r, int d, int n);

    float (*sum)(const float *x, size_t n);                     /* sum_i x[i] */
    float (*sum_squares)(const float *x, float mean, size_t n); /* sum_i (x[i] - mean)^2 */
    /* y = (x - mean) * scale [* weight + bias] [* gate]; weight and bias, or gate, may be NULL */
    void (*normalize)(float *y, const float *x, const float *gate, const struct ltn_norm *norm, float mean,
                      float scale, size_t n);
    void (*multiply)(float *a, const float *b, size_t n); /* a *= b */
    void (*scale)(float *x, float factor, size_t n);      /* x *= factor */
    /* x = act(x - shift); shift is 0 for all but LTN_ACT_EXP */
    void (*activate)(float *x, enum ltn_act act, float shift, size_t n);
    /* cosines and sines of theta[i] * pos, good to 2e-7 as long as theta * pos < 2^30 */
    void (*angles)(float *cosine, float *sine, const float *theta, double pos, size_t n);
};

extern const struct micro ltn_micro_portable;
extern const struct micro ltn_micro_avx2;
extern const struct micro ltn_micro_avx512;
extern const struct micro ltn_micro_vnni;

#endif
