#include "tests/conv_shapes.h"

#include "kernels/conv/random.h"
#include "tests/support.h"

#include <stdio.h>

void conv_random(float *out, int64_t n, uint64_t seed)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = conv_normal(seed, (uint64_t)i);
}

struct ltn_conv_shape conv_random_shape(uint64_t seed, double most_products)
{
    static const int32_t sides[] = {1, 1, 2, 3, 3, 4, 5, 7, 11};
    struct test_rng rng = {conv_mix(seed) | 1};
    struct ltn_conv_shape s;
    do {
        const bool plain = test_below(&rng, 2); /* half of them without dilation and groups */
        s = (struct ltn_conv_shape){.groups = plain || test_below(&rng, 3) ? 1 : 1 + test_below(&rng, 4)};
        s.n = test_below(&rng, 3) ? 1 + test_below(&rng, 4) : 1;
        s.ci = s.groups * (1 + (test_below(&rng, 3) ? test_below(&rng, 9) : test_below(&rng, 80)));
        s.co = s.groups * (1 + (test_below(&rng, 3) ? test_below(&rng, 40) : test_below(&rng, 300)));
        s.hf = sides[test_below(&rng, 9)];
        s.wf = test_below(&rng, 2) ? s.hf : sides[test_below(&rng, 9)];
        s.sh = 1 + test_below(&rng, 4);
        s.sw = test_below(&rng, 2) ? s.sh : 1 + test_below(&rng, 4);
        s.dh = plain ? 1 : 1 + test_below(&rng, 3);
        s.dw = plain ? 1 : 1 + test_below(&rng, 3);
        s.hi = 1 + test_below(&rng, 40);
        s.wi = test_below(&rng, 3) ? 1 + test_below(&rng, 40) : s.hi;
        if (test_below(&rng, 2)) {
            s.pt = test_below(&rng, 4);
            s.pb = test_below(&rng, 4);
            s.pl = test_below(&rng, 4);
            s.pr = test_below(&rng, 4);
        }
        s.relu = test_below(&rng, 3) == 0;
    } while (ltn_conv_check(&s, NULL) != LTN_OK || ltn_conv_flop(&s) > 2 * most_products);
    return s;
}

void conv_shape_text(char *out, size_t size, const struct ltn_conv_shape *s)
{
    snprintf(
        out, size,
        "%s %s %dx%dx%dx%d -> %d, filter %dx%d, stride %d,%d, pad %d,%d,%d,%d, dilation %d,%d, groups %d%s",
        ltn_conv_type_name(s->type), s->layout == LTN_NCHW ? "NCHW" : "NHWC", s->n, s->ci, s->hi, s->wi,
        s->co, s->hf, s->wf, s->sh, s->sw, s->pt, s->pb, s->pl, s->pr, s->dh, s->dw, s->groups,
        s->relu ? ", relu" : "");
}
