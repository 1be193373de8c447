/* The plain reference: the definition in conv.h, one loop each, sums in f64. */
#include "kernels/conv/index.h"

void ltn_conv2d_reference(double *y, const struct ltn_conv_shape *s, const float *x, const float *filter,
                          const float *bias)
{
    const int32_t ho = ltn_conv_ho(s), wo = ltn_conv_wo(s);
    const int32_t cg = s->ci / s->groups, og = s->co / s->groups;

    for (int32_t n = 0; n < s->n; n++)
        for (int32_t o = 0; o < s->co; o++)
            for (int32_t m = 0; m < ho; m++)
                for (int32_t j = 0; j < wo; j++) {
                    double sum = bias ? bias[o] : 0;
                    for (int32_t c = 0; c < cg; c++)
                        for (int32_t u = 0; u < s->hf; u++)
                            for (int32_t v = 0; v < s->wf; v++) {
                                int64_t h = (int64_t)m * s->sh + (int64_t)u * s->dh - s->pt;
                                int64_t w = (int64_t)j * s->sw + (int64_t)v * s->dw - s->pl;
                                if (h < 0 || h >= s->hi || w < 0 || w >= s->wi)
                                    continue;
                                sum += (double)x[conv_x_at(s, n, o / og * cg + c, (int32_t)h, (int32_t)w)] *
                                       filter[conv_filter_at(s, o, c, u, v)];
                            }
                    y[conv_y_at(s, ho, wo, n, o, m, j)] = s->relu && sum < 0 ? 0 : sum;
                }
}
