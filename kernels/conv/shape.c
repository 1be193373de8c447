/* Names, sizes and checks: what both the engine and the device's library need. */
#include "kernels/conv/conv.h"

const char *ltn_conv_algo_name(enum ltn_conv_algo algo)
{
    static const char *const names[LTN_CONV_ALGOS] = {
        [LTN_CONV_AUTO] = "auto",
        [LTN_CONV_IM2WIN] = "im2win",
        [LTN_CONV_FUSED] = "im2win-fused",
        [LTN_CONV_IM2COL] = "im2col-cublas",
        [LTN_CONV_IM2COL_IMAGE] = "im2col-cublas-image",
        [LTN_CONV_DIRECT] = "direct",
        [LTN_CONV_DIRECT_NAIVE] = "direct-naive",
        [LTN_CONV_CUDNN] = "cudnn",
    };
    return names[algo];
}

const char *ltn_conv_type_name(enum ltn_conv_type type)
{
    return type == LTN_CONV_F32 ? "f32" : type == LTN_CONV_TF32 ? "tf32" : "bf16";
}

/* ---- sizes --------------------------------------------------------------------------------------------- */

static int64_t out_size(int32_t in, int32_t before, int32_t after, int32_t filter, int32_t stride,
                        int32_t dilation)
{
    int64_t room = (int64_t)in + before + after - (int64_t)dilation * (filter - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
}

int32_t ltn_conv_ho(const struct ltn_conv_shape *s)
{
    return (int32_t)out_size(s->hi, s->pt, s->pb, s->hf, s->sh, s->dh);
}

int32_t ltn_conv_wo(const struct ltn_conv_shape *s)
{
    return (int32_t)out_size(s->wi, s->pl, s->pr, s->wf, s->sw, s->dw);
}

int64_t ltn_conv_x_elements(const struct ltn_conv_shape *s)
{
    return (int64_t)s->n * s->ci * s->hi * s->wi;
}

int64_t ltn_conv_y_elements(const struct ltn_conv_shape *s)
{
    return (int64_t)s->n * s->co * ltn_conv_ho(s) * ltn_conv_wo(s);
}

int64_t ltn_conv_filter_elements(const struct ltn_conv_shape *s)
{
    return (int64_t)s->co * (s->ci / s->groups) * s->hf * s->wf;
}

double ltn_conv_flop(const struct ltn_conv_shape *s)
{
    return 2.0 * (double)ltn_conv_y_elements(s) * (s->ci / s->groups) * s->hf * s->wf;
}

struct ltn_conv_shape ltn_conv_layer(int layer, int32_t n)
{
    static const int32_t layers[12][5] = {/* ci, hi = wi, co, hf = wf, sh = sw */
                                          {3, 227, 96, 11, 4},  {3, 231, 96, 11, 4},  {3, 227, 64, 7, 2},
                                          {64, 224, 64, 7, 2},  {96, 24, 256, 5, 1},  {256, 12, 512, 3, 1},
                                          {3, 224, 64, 3, 1},   {64, 112, 128, 3, 1}, {64, 56, 64, 3, 1},
                                          {128, 28, 128, 3, 1}, {256, 14, 256, 3, 1}, {512, 7, 512, 3, 1}};
    const int32_t *l = layers[layer - 1];
    return (struct ltn_conv_shape){.n = n,
                                   .ci = l[0],
                                   .hi = l[1],
                                   .wi = l[1],
                                   .co = l[2],
                                   .hf = l[3],
                                   .wf = l[3],
                                   .sh = l[4],
                                   .sw = l[4],
                                   .dh = 1,
                                   .dw = 1,
                                   .groups = 1};
}

/* ---- checks -------------------------------------------------------------------------------------------- */

/* Whether 8 times the product of the factors stays below 2^62. */
static bool fits(const int64_t *factors, int n)
{
    int64_t product = 8;
    for (int i = 0; i < n; i++)
        if (__builtin_mul_overflow(product, factors[i], &product) || product >= (int64_t)1 << 62)
            return false;
    return true;
}

enum ltn_status ltn_conv_check(const struct ltn_conv_shape *s, struct ltn_error *err)
{
    const struct {
        const char *name;
        int32_t value, least;
    } fields[] = {
        {"n", s->n, 1},   {"ci", s->ci, 1}, {"hi", s->hi, 1}, {"wi", s->wi, 1},
        {"co", s->co, 1}, {"hf", s->hf, 1}, {"wf", s->wf, 1}, {"sh", s->sh, 1},
        {"sw", s->sw, 1}, {"dh", s->dh, 1}, {"dw", s->dw, 1}, {"pt", s->pt, 0},
        {"pb", s->pb, 0}, {"pl", s->pl, 0}, {"pr", s->pr, 0}, {"groups", s->groups, 1},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (fields[i].value < fields[i].least)
            return ltn_fail(err, LTN_ERR_INPUT, "convolution: %s: expected %d or more, found %d",
                            fields[i].name, fields[i].least, fields[i].value);
    if (s->ci % s->groups != 0 || s->co % s->groups != 0)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "convolution: groups: expected a divisor of ci = %d and co = %d, found %d", s->ci,
                        s->co, s->groups);
    if ((s->layout != LTN_NCHW && s->layout != LTN_NHWC) ||
        (s->type != LTN_CONV_F32 && s->type != LTN_CONV_TF32 && s->type != LTN_CONV_BF16))
        return ltn_fail(err, LTN_ERR_INPUT, "convolution: no such layout (%d) or type (%d)", (int)s->layout,
                        (int)s->type);
    int64_t hp = (int64_t)s->hi + s->pt + s->pb, wp = (int64_t)s->wi + s->pl + s->pr;
    int64_t ho = out_size(s->hi, s->pt, s->pb, s->hf, s->sh, s->dh);
    int64_t wo = out_size(s->wi, s->pl, s->pr, s->wf, s->sw, s->dw);
    if (ho < 1 || wo < 1)
        return ltn_fail(
            err, LTN_ERR_INPUT,
            "convolution: the %dx%d filter (dilation %d, %d) does not fit into the padded input of "
            "%lldx%lld",
            s->hf, s->wf, s->dh, s->dw, (long long)hp, (long long)wp);
    const int64_t places[] = {s->hf, s->dh}, across[] = {s->wf, s->dw};
    const int64_t image[] = {hp, wp}, window[] = {s->n, s->ci, ho, wp, s->hf};
    const int64_t columns[] = {s->n, s->ci, s->hf, s->wf, ho, wo}, out[] = {s->n, s->co, ho, wo};
    const int64_t filter[] = {s->co, s->ci, s->hf, s->wf};
    if (hp > INT32_MAX || wp > INT32_MAX || s->hf > INT32_MAX / s->dh || s->wf > INT32_MAX / s->dw ||
        !fits(places, 2) || !fits(across, 2) || !fits(image, 2) || !fits(window, 5) || !fits(columns, 6) ||
        !fits(out, 4) || !fits(filter, 4))
        return ltn_fail(err, LTN_ERR_INPUT,
                        "convolution: sizes: expected tensors below 2^62 bytes and sides below "
                        "2^31, found more");
    return LTN_OK;
}
