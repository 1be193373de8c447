/* The definition of a convolution as a loop per output, for the naive kernel and for judging the others. */
#ifndef LTN_CONV_DIRECT_CUH
#define LTN_CONV_DIRECT_CUH

#include "kernels/conv/conv.cuh"

struct conv_place {
    int32_t n, o, m, j;
};

/* Of element i of y. */
static __device__ __forceinline__ struct conv_place conv_place_of(const struct ltn_conv_shape &s, int32_t ho,
                                                                  int32_t wo, int64_t i)
{
    struct conv_place p;
    if (s.layout == LTN_NHWC) {
        p.o = (int32_t)(i % s.co);
        i /= s.co;
    }
    p.j = (int32_t)(i % wo);
    i /= wo;
    p.m = (int32_t)(i % ho);
    i /= ho;
    if (s.layout == LTN_NCHW) {
        p.o = (int32_t)(i % s.co);
        i /= s.co;
    }
    p.n = (int32_t)i;
    return p;
}

/* filter: [co][ci / groups][hf][wf] */
template <typename S, typename T, typename F>
static __device__ __forceinline__ S direct_sum(const struct ltn_conv_shape &s, const T *x, const F *filter,
                                               const struct conv_place &p)
{
    const int32_t cg = s.ci / s.groups, c0 = p.o / (s.co / s.groups) * cg;
    const int64_t h0 = (int64_t)p.m * s.sh - s.pt, w0 = (int64_t)p.j * s.sw - s.pl;
    const int64_t pixel = s.layout == LTN_NCHW ? 1 : s.ci;
    S sum = 0;
    for (int32_t c = 0; c < cg; c++)
        for (int32_t u = 0; u < s.hf; u++) {
            const int64_t h = h0 + (int64_t)u * s.dh;
            if (h < 0 || h >= s.hi)
                continue;
            const T *const row = x + conv_x_at(&s, p.n, c0 + c, (int32_t)h, 0);
            const F *const f = filter + conv_filter_at(&s, p.o, c, u, 0);
            for (int32_t v = 0; v < s.wf; v++) {
                const int64_t w = w0 + (int64_t)v * s.dw;
                if (w >= 0 && w < s.wi)
                    sum += (S)conv_f32(row[w * pixel]) * (S)conv_f32(f[v]);
            }
        }
    return sum;
}

#endif
