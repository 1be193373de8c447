/* Convolution on the CPU: the index maps, exhaustively on small sizes; the reference against a scatter of
 * every input element over the outputs that it reaches; im2win on the CPU against the reference; refusals. */
#include "kernels/conv/index.h"
#include "tests/conv_shapes.h"
#include "tests/support.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct ltn_error err;

static void *room(size_t bytes)
{
    void *p = malloc(bytes);
    assert_non_null(p);
    return p;
}

/* ---- index maps ------------------------------------------------------------------------------------------
 */

/* Every index in [0, n) comes once. */
struct seen {
    uint8_t *marks;
    int64_t n;
};

static struct seen seen_of(int64_t n)
{
    struct seen s = {calloc(1, (size_t)n), n};
    assert_non_null(s.marks);
    return s;
}

static void see(struct seen *s, int64_t i)
{
    assert_in_range(i, 0, s->n - 1);
    assert_int_equal(s->marks[i]++, 0);
}

static void all_seen(struct seen *s)
{
    assert_null(memchr(s->marks, 0, (size_t)s->n));
    free(s->marks);
}

#define EACH(i, n) for (int32_t i = 0; i < (n); i++)

static void check_maps(const struct ltn_conv_shape *s)
{
    const int32_t ho = ltn_conv_ho(s), wo = ltn_conv_wo(s), wp = conv_wp(s), cg = s->ci / s->groups;
    struct seen x = seen_of(ltn_conv_x_elements(s)), y = seen_of(ltn_conv_y_elements(s));
    struct seen filter = seen_of(ltn_conv_filter_elements(s)), packed = seen_of(ltn_conv_filter_elements(s));
    struct seen window = seen_of(conv_window_elements(s, ho)),
                columns = seen_of(conv_im2col_elements(s, ho, wo));

    EACH(n, s->n)
    {
        EACH(c, s->ci) EACH(h, s->hi) EACH(w, s->wi) see(&x, conv_x_at(s, n, c, h, w));
        EACH(o, s->co) EACH(m, ho) EACH(j, wo) see(&y, conv_y_at(s, ho, wo, n, o, m, j));
        EACH(c, s->ci)
        EACH(m, ho) EACH(k, wp) EACH(u, s->hf) see(&window, conv_window_at(s, ho, n, c, m, k, u));
        EACH(c, s->ci)
        EACH(u, s->hf)
        EACH(v, s->wf) EACH(m, ho) EACH(j, wo) see(&columns, conv_im2col_at(s, ho, wo, n, c, u, v, m, j));
    }
    EACH(o, s->co)
    EACH(c, cg) EACH(u, s->hf) EACH(v, s->wf)
    {
        see(&filter, conv_filter_at(s, o, c, u, v));
        see(&packed, conv_packed_at(s, o, c, u, v));
    }
    /* the window of output j, in its row: column j sw + v dw of the padded input; with dw = 1 one run */
    EACH(j, wo)
    EACH(v, s->wf) EACH(u, s->hf)
    {
        int64_t at = conv_window_at(s, ho, 0, 0, 0, 0, 0) + conv_window_element(s, j, u, v);
        assert_int_equal(at, conv_window_at(s, ho, 0, 0, 0, j * s->sw + v * s->dw, u));
        assert_true(at < conv_window_row(s));
        if (s->dw == 1)
            assert_int_equal(at, j * s->sw * s->hf + conv_packed_at(s, 0, 0, u, v));
    }
    all_seen(&x);
    all_seen(&y);
    all_seen(&filter);
    all_seen(&packed);
    all_seen(&window);
    all_seen(&columns);
}

static void test_index_maps(void **state)
{
    (void)state;
    int checked = 0;
    for (int32_t layout = 0; layout < 2; layout++)
        for (int32_t hi = 1; hi <= 4; hi++)
            for (int32_t wi = 1; wi <= 5; wi += 2)
                for (int32_t hf = 1; hf <= 3; hf++)
                    for (int32_t wf = 1; wf <= 3; wf++)
                        for (int32_t stride = 1; stride <= 3; stride++)
                            for (int32_t pad = 0; pad <= 2; pad++)
                                for (int32_t dilation = 1; dilation <= 2; dilation++)
                                    for (int32_t groups = 1; groups <= 2; groups++) {
                                        struct ltn_conv_shape s = {.n = 2,
                                                                   .ci = 2 * groups,
                                                                   .hi = hi,
                                                                   .wi = wi,
                                                                   .co = 3 * groups,
                                                                   .hf = hf,
                                                                   .wf = wf,
                                                                   .sh = stride,
                                                                   .sw = 4 - stride,
                                                                   .pt = pad,
                                                                   .pb = 0,
                                                                   .pl = 0,
                                                                   .pr = pad,
                                                                   .dh = dilation,
                                                                   .dw = 3 - dilation,
                                                                   .groups = groups,
                                                                   .layout = (enum ltn_conv_layout)layout};
                                        if (ltn_conv_check(&s, &err) != LTN_OK)
                                            continue;
                                        check_maps(&s);
                                        checked++;
                                    }
    assert_true(checked > 1000);
}

/* ---- the reference ---------------------------------------------------------------------------------------
 */

/* Each element of x goes to every output whose window it is in: found from the input's side, so that a
 * mistake in the reference's bounds or strides is not repeated here. */
static void scatter(double *y, const struct ltn_conv_shape *s, const float *x, const float *filter,
                    const float *bias)
{
    const int32_t ho = ltn_conv_ho(s), wo = ltn_conv_wo(s), cg = s->ci / s->groups, og = s->co / s->groups;
    EACH(n, s->n)
    EACH(o, s->co) EACH(m, ho) EACH(j, wo) y[conv_y_at(s, ho, wo, n, o, m, j)] = bias ? bias[o] : 0;
    EACH(n, s->n)
    EACH(c, s->ci) EACH(h, s->hi) EACH(w, s->wi) EACH(u, s->hf) EACH(v, s->wf)
    {
        const int32_t up = h + s->pt - u * s->dh, left = w + s->pl - v * s->dw;
        if (up < 0 || left < 0 || up % s->sh || left % s->sw || up / s->sh >= ho || left / s->sw >= wo)
            continue;
        EACH(o, og)
        {
            const int32_t out = c / cg * og + o;
            y[conv_y_at(s, ho, wo, n, out, up / s->sh, left / s->sw)] +=
                (double)x[conv_x_at(s, n, c, h, w)] * filter[conv_filter_at(s, out, c % cg, u, v)];
        }
    }
    for (int64_t i = 0; s->relu && i < ltn_conv_y_elements(s); i++)
        y[i] = y[i] < 0 ? 0 : y[i];
}

static double relative_error(const double *exact, const double *found, const float *found32, int64_t n)
{
    double error = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        const double d = exact[i] - (found ? found[i] : (double)found32[i]);
        error += d * d;
        norm += exact[i] * exact[i];
    }
    return norm > 0 ? sqrt(error / norm) : sqrt(error);
}

struct values {
    float *x, *filter, *bias; /* bias: NULL for one shape in three */
    double *exact;
};

static struct values values_of(const struct ltn_conv_shape *s, uint64_t seed)
{
    struct values v = {room((size_t)ltn_conv_x_elements(s) * 4),
                       room((size_t)ltn_conv_filter_elements(s) * 4),
                       seed % 3 ? room((size_t)s->co * 4) : NULL, room((size_t)ltn_conv_y_elements(s) * 8)};
    conv_random(v.x, ltn_conv_x_elements(s), seed);
    conv_random(v.filter, ltn_conv_filter_elements(s), seed + 1);
    if (v.bias)
        conv_random(v.bias, s->co, seed + 2);
    return v;
}

static void values_free(struct values *v)
{
    free(v->x);
    free(v->filter);
    free(v->bias);
    free(v->exact);
}

static void test_reference(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 300; seed++) {
        struct ltn_conv_shape s = conv_random_shape(seed, 3e5);
        s.layout = seed % 2 ? LTN_NCHW : LTN_NHWC;
        struct values v = values_of(&s, seed);
        double *expected = room((size_t)ltn_conv_y_elements(&s) * 8);
        scatter(expected, &s, v.x, v.filter, v.bias);
        ltn_conv2d_reference(v.exact, &s, v.x, v.filter, v.bias);
        assert_true(relative_error(expected, v.exact, NULL, ltn_conv_y_elements(&s)) < 1e-13);
        free(expected);
        values_free(&v);
    }
}

/* ---- im2win on the CPU -----------------------------------------------------------------------------------
 */

static void run_cpu(struct ltn_conv *conv, const struct ltn_conv_shape *s, const struct values *v, float *y)
{
    struct ltn_conv2d *op;
    void *workspace;
    CHECK(ltn_conv2d_create(&op, conv, s, LTN_CONV_AUTO, v->filter, v->bias, &err));
    const size_t bytes = ltn_conv2d_info(op)->workspace_bytes;
    CHECK(conv->ops->alloc(conv, &workspace, bytes, &err));
    memset(workspace, 0xff, bytes);
    memset(y, 0xff, ((size_t)ltn_conv_y_elements(s) + 8) * 4);
    CHECK(ltn_conv2d_run(op, y, v->x, workspace, LTN_CONV_ALL, &err));
    for (int i = 0; i < 8; i++)
        assert_true(isnan(y[ltn_conv_y_elements(s) + i]));
    ltn_conv2d_free(op);
    conv->ops->free(conv, workspace);
}

static void test_cpu(void **state)
{
    (void)state;
    struct ltn_conv *conv[2];
    CHECK(ltn_conv_open(&conv[0], "cpu", 1, &err));
    CHECK(ltn_conv_open(&conv[1], "cpu", 3, &err));
    for (uint64_t seed = 1; seed <= 400; seed++) {
        struct ltn_conv_shape s = conv_random_shape(seed, seed % 20 ? 1e6 : 1e7);
        s.layout = seed % 2 ? LTN_NCHW : LTN_NHWC;
        struct values v = values_of(&s, seed);
        const int64_t n = ltn_conv_y_elements(&s);
        float *y[2] = {room((size_t)(n + 8) * 4), room((size_t)(n + 8) * 4)};
        ltn_conv2d_reference(v.exact, &s, v.x, v.filter, v.bias);
        run_cpu(conv[0], &s, &v, y[0]);
        run_cpu(conv[1], &s, &v, y[1]);
        const double error = relative_error(v.exact, NULL, y[0], n);
        if (!(error < 1e-6)) {
            char text[256];
            conv_shape_text(text, sizeof text, &s);
            fail_msg("%s: relative error %g", text, error);
        }
        assert_memory_equal(y[0], y[1], (size_t)n * 4); /* whatever the threads */
        double judged;
        CHECK(conv[0]->ops->rel_l2(conv[0], &judged, &s, y[0], v.x, v.filter, v.bias, 0, s.n, &err));
        assert_true(fabs(judged - error) <= 1e-12);
        free(y[0]);
        free(y[1]);
        values_free(&v);
    }
    ltn_conv_close(conv[0]);
    ltn_conv_close(conv[1]);
}

/* ---- refusals --------------------------------------------------------------------------------------------
 */

static void refused(struct ltn_conv_shape s, const char *word)
{
    assert_int_equal(ltn_conv_check(&s, &err), LTN_ERR_INPUT);
    if (!strstr(err.text, word))
        fail_msg("expected '%s' in: %s", word, err.text);
}

static void test_refusals(void **state)
{
    (void)state;
    const struct ltn_conv_shape good = ltn_conv_layer(6, 2);
    struct ltn_conv_shape s = good;
    float filter[1] = {0};
    struct ltn_conv *conv;
    struct ltn_conv2d *op;

    CHECK(ltn_conv_check(&good, &err));
#define REFUSED(change, word)                                                                                \
    s = good;                                                                                                \
    change;                                                                                                  \
    refused(s, word)
    REFUSED(s.n = 0, "n:");
    REFUSED(s.sw = 0, "sw:");
    REFUSED(s.pl = -1, "pl:");
    REFUSED(s.dh = -2, "dh:");
    REFUSED(s.groups = 3, "groups:");
    REFUSED(s.hf = 13, "does not fit");
    REFUSED(s.dw = 6, "does not fit");
    REFUSED((s.pt = INT32_MAX, s.pb = INT32_MAX), "2^31");
    REFUSED((s.n = INT32_MAX, s.ci = INT32_MAX), "2^62");
    REFUSED(s.type = (enum ltn_conv_type)7, "type");
    s = good;
    CHECK(ltn_conv_open(&conv, "cpu", 1, &err));
    s.type = LTN_CONV_BF16;
    assert_int_equal(ltn_conv2d_create(&op, conv, &s, LTN_CONV_AUTO, filter, NULL, &err),
                     LTN_ERR_UNSUPPORTED);
    s = good;
    assert_int_equal(ltn_conv2d_create(&op, conv, &s, LTN_CONV_IM2COL, filter, NULL, &err),
                     LTN_ERR_UNSUPPORTED);
    s.n = 0;
    assert_int_equal(ltn_conv2d_create(&op, conv, &s, LTN_CONV_AUTO, filter, NULL, &err), LTN_ERR_INPUT);
    assert_null(op);
    ltn_conv_close(conv);
    assert_int_equal(ltn_conv_open(&conv, "gpu", 1, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_conv_open(&conv, "cuda:x", 1, &err), LTN_ERR_INPUT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_index_maps),
        cmocka_unit_test(test_reference),
        cmocka_unit_test(test_cpu),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
