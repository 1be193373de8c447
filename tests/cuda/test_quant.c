/* Quantised weights on the CUDA backend against the CPU backend, which tests/test_ops.c holds against the
 * plain reference, through every operation that takes a matrix: shapes for the kernel of one row and shapes
 * that it refuses, few rows and many. */
#include "kernels/quant.h"
#include "tests/cuda/device.h"
#include "tests/support.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct ltn_backend *cuda, *ref;
static struct ltn_error err;
static struct test_rng rng = {99};

/* Numbers on both sides. What is act on the device is bf16 there, and rounded to it on the host. */
struct numbers {
    float *host;
    void *device;
    size_t n;
    bool is_act;
};

static void send(const struct numbers *v)
{
    uint16_t *half = malloc(v->n * 2);
    assert_non_null(half);
    for (size_t i = 0; i < v->n; i++)
        half[i] = ltn_f32_to_bf16(v->host[i]);
    for (size_t i = 0; v->is_act && i < v->n; i++)
        v->host[i] = ltn_bf16_to_f32(half[i]);
    CHECK(cuda->ops->upload(cuda, v->device, v->is_act ? (void *)half : v->host, v->n * (v->is_act ? 2 : 4),
                            &err));
    free(half);
}

static struct numbers numbers(size_t n, bool is_act)
{
    struct numbers v = {malloc(n * sizeof(float)), NULL, n, is_act};
    assert_non_null(v.host);
    for (size_t i = 0; i < n; i++)
        v.host[i] = (float)test_normal(&rng);
    CHECK(cuda->ops->alloc(cuda, &v.device, n * (is_act ? 2 : 4), &err));
    send(&v);
    return v;
}

static void drop(struct numbers *v)
{
    free(v->host);
    cuda->ops->free(cuda, v->device);
}

/* ||device - host|| / ||host||; infinite where anything is not finite */
static double error_of(const struct numbers *v)
{
    void *raw = malloc(v->n * 4);
    double lost = 0, all = 1e-30;
    assert_non_null(raw);
    CHECK(cuda->ops->download(cuda, raw, v->device, v->n * (v->is_act ? 2 : 4), &err));
    for (size_t i = 0; i < v->n; i++) {
        double got = ltn_load(raw, v->is_act ? LTN_BF16 : LTN_F32, i);
        lost += isfinite(got) ? (got - v->host[i]) * (got - v->host[i]) : INFINITY;
        all += (double)v->host[i] * v->host[i];
    }
    free(raw);
    return sqrt(lost / all);
}

static struct ltn_matrix matrix(struct ltn_matrix *device, int outs, int cols, enum ltn_dtype dtype)
{
    enum { ROWS = 61 };
    size_t row = ltn_row_bytes(dtype, (size_t)cols), row_scales = ltn_row_scale_bytes(dtype, (size_t)cols);
    float *values = malloc((size_t)cols * sizeof *values);
    uint8_t *codes = malloc(outs * row), *scales = malloc(outs * row_scales), *codes_there, *scales_there;
    assert_true(values && codes && scales);
    for (int o = 0; o < outs; o++) {
        if (o >= ROWS) { /* making codes takes long: they come again */
            memcpy(codes + o * row, codes + (o - ROWS) * row, row);
            memcpy(scales + o * row_scales, scales + (o - ROWS) * row_scales, row_scales);
            continue;
        }
        for (int c = 0; c < cols; c++)
            values[c] = (float)(test_normal(&rng) * (1 + o % 3) / sqrt(cols));
        assert_true(ltn_quantise_row(dtype, values, (size_t)cols, codes + o * row, scales + o * row_scales));
    }
    free(values);
    CHECK(cuda->ops->alloc(cuda, (void **)&codes_there, outs * row, &err));
    CHECK(cuda->ops->alloc(cuda, (void **)&scales_there, outs * row_scales, &err));
    CHECK(cuda->ops->upload(cuda, codes_there, codes, outs * row, &err));
    CHECK(cuda->ops->upload(cuda, scales_there, scales, outs * row_scales, &err));
    *device = (struct ltn_matrix){codes_there, dtype, outs, cols, scales_there};
    return (struct ltn_matrix){codes, dtype, outs, cols, scales};
}

static void drop_matrix(struct ltn_matrix *host, struct ltn_matrix *device)
{
    free((void *)host->data);
    free((void *)host->scales);
    cuda->ops->free(cuda, (void *)device->data);
    cuda->ops->free(cuda, (void *)device->scales);
}

enum { FEW = 1000 }; /* numbers */
static double worst[LTN_N_DTYPES];

/* How large the terms of a result's sums are: t [rows, outs], the root of the sum of (w x)^2. Errors are in
 * proportion to it, and of few results all may happen to be small beside their terms; of many its norm is
 * that of the results, so it is not worked out (0). */
static void terms_of(float *t, const struct ltn_matrix *w, const float *x, int rows)
{
    const size_t outs = (size_t)w->rows, cols = (size_t)w->cols;
    memset(t, 0, (size_t)rows * outs * sizeof *t);
    for (size_t i = 0; (size_t)rows * outs < FEW && i < (size_t)rows * outs; i++) {
        double sum = 0;
        for (size_t c = 0; c < cols; c++) {
            double term = ltn_weight(w->data, w->scales, w->dtype, cols, i % outs, c);
            term *= x[i / outs * cols + c];
            sum += term * term;
        }
        t[i] = (float)sqrt(sum);
    }
}

/* terms: [v->n], or NULL */
static void judge(const struct numbers *v, const float *terms, enum ltn_dtype dtype, const char *what,
                  int outs, int cols, int rows)
{
    /* bf16 results, inputs and, of many rows, weights, twice for a product of two: 2^-9 each, at most */
    const double allowed = 0.006;
    double own = 1e-30, size = 0;
    for (size_t i = 0; i < v->n; i++) {
        own += (double)v->host[i] * v->host[i];
        size += terms ? (double)terms[i] * terms[i] : 0;
    }
    const double e = error_of(v) / fmax(1, sqrt(size / own));
    worst[dtype] = fmax(worst[dtype], e);
    if (!(e <= allowed))
        fail_msg("%s of %s [%d, %d], %d rows: relative error %.3g, allowed %.3g", what, ltn_dtype_name(dtype),
                 outs, cols, rows, e, allowed);
}

static void one_case(const struct ltn_matrix w[2], const struct ltn_matrix d[2], int rows, bool layer_norm,
                     bool has_bias)
{
    const enum ltn_dtype dtype = w->dtype;
    const int outs = w->rows, cols = w->cols;
    const size_t in = (size_t)rows * cols, out = (size_t)rows * outs, ld = (size_t)cols + 8;
    struct numbers a = numbers(in, true), f = numbers(in, false), gate = numbers((size_t)rows * ld, true);
    struct numbers y = numbers(out, true), x = numbers(out, false);
    struct numbers s1 = numbers(in, true), s2 = numbers(out, true);
    struct numbers bias = numbers((size_t)outs, false), nw = numbers((size_t)cols, false),
                   nb = numbers((size_t)cols, false);
    const struct ltn_linear l[2] = {{w[0], has_bias ? bias.host : NULL, {0}},
                                    {w[1], has_bias ? bias.host : NULL, {0}}};
    const struct ltn_linear m[2] = {{d[0], has_bias ? bias.device : NULL, {0}},
                                    {d[1], has_bias ? bias.device : NULL, {0}}};
    reserve_room(cuda, &m[0], &m[1], NULL, rows);
    const struct ltn_norm n = {layer_norm ? nw.host : NULL, layer_norm ? nb.host : NULL};
    const struct ltn_norm k = {layer_norm ? nw.device : NULL, layer_norm ? nb.device : NULL};
    const struct ltn_ops *r = ref->ops, *c = cuda->ops;
    float *normed = malloc(in * sizeof *normed), *second = malloc(out * sizeof *second);
    float *terms = malloc(out * sizeof *terms), *terms2 = malloc(out * sizeof *terms2);
    assert_true(normed && second && terms && terms2);

    terms_of(terms, &w[0], a.host, rows);
    CHECK(r->linear(ref, y.host, a.host, &l[0], rows, &err));
    CHECK(c->linear(cuda, y.device, a.device, &m[0], rows, &err));
    judge(&y, terms, dtype, "linear", outs, cols, rows);
    CHECK(r->linear_add(ref, x.host, a.host, &l[0], rows, &err));
    CHECK(c->linear_add(cuda, x.device, a.device, &m[0], rows, &err));
    judge(&x, terms, dtype, "linear_add", outs, cols, rows);
    CHECK(r->logits(ref, x.host, a.host, &w[0], rows, &err));
    CHECK(c->logits(cuda, x.device, a.device, &d[0], rows, &err));
    judge(&x, terms, dtype, "logits", outs, cols, rows);

    CHECK(r->norm(ref, normed, f.host, &n, rows, cols, &err));
    terms_of(terms, &w[0], normed, rows);
    terms_of(terms2, &w[1], normed, rows);
    CHECK(r->linear(ref, y.host, normed, &l[0], rows, &err));
    CHECK(r->linear(ref, second, normed, &l[1], rows, &err));
    CHECK(r->logits(ref, x.host, normed, &w[0], rows, &err));
    CHECK(c->norm_logits(cuda, x.device, f.device, &k, &d[0], rows, s1.device, &err));
    judge(&x, terms, dtype, "norm_logits", outs, cols, rows);
    for (size_t i = 0; i < out; i++) {
        terms2[i] = hypotf(terms2[i] * y.host[i], terms[i] * second[i]);
        second[i] *= y.host[i];
    }
    CHECK(r->activation(ref, y.host, outs, rows, outs / 2, 1, LTN_ACT_SILU, &err));
    CHECK(c->norm_linear(cuda, y.device, f.device, &k, &m[0], LTN_ACT_SILU, outs / 2, 1, rows, s1.device,
                         &err));
    judge(&y, terms, dtype, "norm_linear", outs, cols, rows);
    memcpy(y.host, second, out * sizeof *second);
    CHECK(c->norm_glu(cuda, y.device, f.device, &k, &m[0], &m[1], rows, s1.device, s2.device, &err));
    judge(&y, terms2, dtype, "norm_glu", outs, cols, rows);

    CHECK(r->gated_norm(ref, normed, a.host, gate.host, (int32_t)ld, &n, rows, cols, &err));
    terms_of(terms, &w[0], normed, rows);
    CHECK(r->logits(ref, x.host, normed, &w[0], rows, &err));
    for (size_t i = 0; i < out; i++)
        x.host[i] += (has_bias ? bias.host[i % (size_t)outs] : 0) + 1;
    CHECK(c->zero(cuda, x.device, out * sizeof(float), &err));
    for (size_t i = 0; i < out; i++)
        second[i] = 1;
    CHECK(c->upload(cuda, x.device, second, out * sizeof(float), &err));
    CHECK(c->gated_linear_add(cuda, x.device, a.device, gate.device, (int32_t)ld, &k, &m[0], rows, s1.device,
                              &err));
    judge(&x, terms, dtype, "gated_linear_add", outs, cols, rows);

    struct numbers *all[] = {&a, &f, &gate, &y, &x, &s1, &s2, &bias, &nw, &nb};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        drop(all[i]);
    free(normed);
    free(second);
    free(terms);
    free(terms2);
}

static void test_products(void **state)
{
    const enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*state;
    static const int shapes[][2] = {{2, 32},    {64, 64},     {130, 96},    {384, 1024}, {961, 416},
                                    {5, 11008}, {4096, 2048}, {2048, 5632}, {77, 100},   {40, 31}};
    static const int rows[] = {1, 2, 4, 5, 33};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct ltn_matrix w[2], d[2];
        for (int k = 0; k < 2; k++)
            w[k] = matrix(&d[k], shapes[i][0], shapes[i][1], dtype);
        for (size_t k = 0; k < sizeof rows / sizeof *rows; k++)
            one_case(w, d, rows[k], (i + k) % 4 == 3, (i + k) % 2);
        for (int k = 0; k < 2; k++)
            drop_matrix(&w[k], &d[k]);
    }
    print_message("%s: worst relative error %.3g\n", ltn_dtype_name(dtype), worst[dtype]);
}

static void test_embed(void **state)
{
    const enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*state;
    static const int32_t ids[] = {3, 0, 36, 3, 17};
    static const int widths[] = {31, 64, 100, 1024};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        struct ltn_matrix device, host = matrix(&device, 37, widths[i], dtype);
        struct numbers x = numbers((size_t)5 * widths[i], false);
        void *there;
        CHECK(cuda->ops->alloc(cuda, &there, sizeof ids, &err));
        CHECK(cuda->ops->upload(cuda, there, ids, sizeof ids, &err));
        CHECK(ref->ops->embed(ref, x.host, &host, ids, 5, 19.6f, &err));
        CHECK(cuda->ops->embed(cuda, x.device, &device, there, 5, 19.6f, &err));
        assert_true(error_of(&x) == 0);
        cuda->ops->free(cuda, there);
        drop(&x);
        drop_matrix(&host, &device);
    }
}

/* Rows of a call are what they are by themselves, to the bit, as far as they go one by one; and the same call
 * twice gives the same bits. */
static void test_same_bits(void **state)
{
    const enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*state;
    enum { ROWS = 3, OUTS = 700, COLS = 2048 };
    static uint16_t all[ROWS * OUTS], again[ROWS * OUTS], one[OUTS];
    struct ltn_matrix device, host = matrix(&device, OUTS, COLS, dtype);
    struct numbers x = numbers(ROWS * COLS, true), y = numbers(ROWS * OUTS, true);
    const struct ltn_linear l = {.w = device};
    reserve_room(cuda, &l, NULL, NULL, ROWS);
    CHECK(cuda->ops->linear(cuda, y.device, x.device, &l, ROWS, &err));
    CHECK(cuda->ops->download(cuda, all, y.device, sizeof all, &err));
    for (int i = 0; i < 20; i++) {
        CHECK(cuda->ops->linear(cuda, y.device, x.device, &l, ROWS, &err));
        CHECK(cuda->ops->download(cuda, again, y.device, sizeof all, &err));
        assert_memory_equal(all, again, sizeof all);
    }
    for (int r = 0; r < ROWS; r++) {
        CHECK(cuda->ops->linear(cuda, y.device, (uint16_t *)x.device + r * COLS, &l, 1, &err));
        CHECK(cuda->ops->download(cuda, one, y.device, sizeof one, &err));
        assert_memory_equal(one, all + r * OUTS, sizeof one);
    }
    drop(&x), drop(&y);
    drop_matrix(&host, &device);
}

static int open_both(void **state)
{
    (void)state;
    cuda = open_cuda(LTN_Q8);
    return ltn_cpu_open(&ref, 0, &err);
}

static int close_both(void **state)
{
    (void)state;
    cuda->ops->close(cuda);
    ref->ops->close(ref);
    return 0;
}

int main(void)
{
    enum { KINDS = 3, TYPES = LTN_N_DTYPES - LTN_Q8 };
    static char names[KINDS * TYPES][64];
    static void (*const functions[KINDS])(void **) = {test_embed, test_products, test_same_bits};
    static const char *const what[KINDS] = {"embed", "products", "same bits"};
    struct CMUnitTest tests[KINDS * TYPES];
    for (int i = 0; i < KINDS * TYPES; i++) {
        enum ltn_dtype dtype = (enum ltn_dtype)(LTN_Q8 + i % TYPES);
        snprintf(names[i], sizeof names[i], "%s, %s", what[i / TYPES], ltn_dtype_name(dtype));
        tests[i] = (struct CMUnitTest){names[i], functions[i / TYPES], NULL, NULL, (void *)(intptr_t)dtype};
    }
    return cmocka_run_group_tests(tests, open_both, close_both);
}
