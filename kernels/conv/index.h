/* Where an element lies in the tensors of im2win and im2col. Usable from C and CUDA.
 *
 * c counts the channels of all groups; k = column of the padded input, 0 <= k < Wp = wi + pl + pr; (m, j) the
 * output place; (u, v) row and column of the filter.
 *
 *   window tensor [n][ci][ho][Wp * hf]   T[n, c, m, k hf + u] = x[n, c, m sh + u dh - pt, k - pl], 0 outside
 *   packed filter [co][ci / groups][wf * hf]   F'[o, c, v hf + u] = F[o, c, u, v]
 *   im2col        [n][ci][hf * wf][ho * wo]
 *
 * The window of output (m, j) holds element (u, v) at (j sw + v dw) hf + u: with dw = 1 one run of wf hf
 * elements that starts at j sw hf (arXiv 2306.14316, section 3.1). Neighbouring windows overlap in (wf - sw)
 * hf of them, which im2col stores twice. */
#ifndef LTN_CONV_INDEX_H
#define LTN_CONV_INDEX_H

#include "kernels/conv/conv.h"

#ifdef __CUDACC__
#define LTN_HD static inline __host__ __device__
#else
#define LTN_HD static inline
#endif

LTN_HD int32_t conv_wp(const struct ltn_conv_shape *s)
{
    return s->wi + s->pl + s->pr;
}

/* Elements of one row of the window tensor. */
LTN_HD int64_t conv_window_row(const struct ltn_conv_shape *s)
{
    return (int64_t)conv_wp(s) * s->hf;
}

LTN_HD int64_t conv_x_at(const struct ltn_conv_shape *s, int32_t n, int32_t c, int32_t h, int32_t w)
{
    return s->layout == LTN_NCHW ? (((int64_t)n * s->ci + c) * s->hi + h) * s->wi + w
                                 : (((int64_t)n * s->hi + h) * s->wi + w) * s->ci + c;
}

LTN_HD int64_t conv_y_at(const struct ltn_conv_shape *s, int32_t ho, int32_t wo, int32_t n, int32_t o,
                         int32_t m, int32_t j)
{
    return s->layout == LTN_NCHW ? (((int64_t)n * s->co + o) * ho + m) * wo + j
                                 : (((int64_t)n * ho + m) * wo + j) * s->co + o;
}

LTN_HD int64_t conv_window_at(const struct ltn_conv_shape *s, int32_t ho, int32_t n, int32_t c, int32_t m,
                              int32_t k, int32_t u)
{
    return (((int64_t)n * s->ci + c) * ho + m) * conv_window_row(s) + (int64_t)k * s->hf + u;
}

/* Within one row of the window tensor: filter element (u, v) of output column j. */
LTN_HD int64_t conv_window_element(const struct ltn_conv_shape *s, int32_t j, int32_t u, int32_t v)
{
    return ((int64_t)j * s->sw + (int64_t)v * s->dw) * s->hf + u;
}

LTN_HD int64_t conv_filter_at(const struct ltn_conv_shape *s, int32_t o, int32_t c, int32_t u, int32_t v)
{
    return (((int64_t)o * (s->ci / s->groups) + c) * s->hf + u) * s->wf + v;
}

/* In the order of the window tensor. */
LTN_HD int64_t conv_packed_at(const struct ltn_conv_shape *s, int32_t o, int32_t c, int32_t u, int32_t v)
{
    return (((int64_t)o * (s->ci / s->groups) + c) * s->wf + v) * s->hf + u;
}

LTN_HD int64_t conv_im2col_at(const struct ltn_conv_shape *s, int32_t ho, int32_t wo, int32_t n, int32_t c,
                              int32_t u, int32_t v, int32_t m, int32_t j)
{
    return (((((int64_t)n * s->ci + c) * s->hf + u) * s->wf + v) * ho + m) * wo + j;
}

LTN_HD int64_t conv_window_elements(const struct ltn_conv_shape *s, int32_t ho)
{
    return (int64_t)s->n * s->ci * ho * conv_window_row(s);
}

LTN_HD int64_t conv_im2col_elements(const struct ltn_conv_shape *s, int32_t ho, int32_t wo)
{
    return (int64_t)s->n * s->ci * s->hf * s->wf * ho * wo;
}

#endif
