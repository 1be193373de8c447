/* Quantised weights on the CUDA backend against the CPU backend, which tests/test_ops.c holds against the
 * plain reference, through every operation that takes a matrix: shapes for the kernel of one row and shapes
 * that it refuses, few rows and many. The CPU's input and weights are bf16 where the device's are, so that
 * what is compared is the product alone. */
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

/* A matrix on both sides, and on the host as it is in bf16, for devices that turn it into that first. */
struct matrices {
    struct ltn_matrix host, wide, device;
    float *sizes; /* [rows] the root of the sum of a row's squares */
};

static struct matrices matrices(int outs, int cols, enum ltn_dtype dtype)
{
    enum { ROWS = 61 };
    size_t row = ltn_row_bytes(dtype, (size_t)cols), row_scales = ltn_row_scale_bytes(dtype, (size_t)cols);
    float *values = malloc((size_t)cols * sizeof *values), *sizes = calloc((size_t)outs, sizeof *sizes);
    uint8_t *codes = malloc(outs * row), *scales = malloc(outs * row_scales), *codes_there, *scales_there;
    uint16_t *wide = malloc((size_t)outs * cols * sizeof *wide);
    assert_true(values && codes && scales && wide && sizes);
    for (int o = 0; o < outs; o++) {
        if (o >= ROWS) { /* making codes takes long: they come again */
            memcpy(codes + o * row, codes + (o - ROWS) * row, row);
            memcpy(scales + o * row_scales, scales + (o - ROWS) * row_scales, row_scales);
            memcpy(wide + (size_t)o * cols, wide + (size_t)(o - ROWS) * cols, (size_t)cols * sizeof *wide);
            sizes[o] = sizes[o - ROWS];
            continue;
        }
        for (int c = 0; c < cols; c++)
            values[c] = (float)(test_normal(&rng) * (1 + o % 3) / sqrt(cols));
        assert_true(ltn_quantise_row(dtype, values, (size_t)cols, codes + o * row, scales + o * row_scales));
        for (int c = 0; c < cols; c++) {
            const float w = ltn_weight(codes, scales, dtype, (size_t)cols, (size_t)o, (size_t)c);
            wide[(size_t)o * cols + c] = ltn_f32_to_bf16(w);
            sizes[o] += w * w;
        }
        sizes[o] = sqrtf(sizes[o]);
    }
    free(values);
    CHECK(cuda->ops->alloc(cuda, (void **)&codes_there, outs * row, &err));
    CHECK(cuda->ops->alloc(cuda, (void **)&scales_there, outs * row_scales, &err));
    CHECK(cuda->ops->upload(cuda, codes_there, codes, outs * row, &err));
    CHECK(cuda->ops->upload(cuda, scales_there, scales, outs * row_scales, &err));
    return (struct matrices){{codes, dtype, outs, cols, scales},
                             {wide, LTN_BF16, outs, cols, NULL},
                             {codes_there, dtype, outs, cols, scales_there},
                             sizes};
}

static void drop_matrices(struct matrices *m)
{
    free((void *)m->host.data);
    free((void *)m->host.scales);
    free((void *)m->wide.data);
    free(m->sizes);
    cuda->ops->free(cuda, (void *)m->device.data);
    cuda->ops->free(cuda, (void *)m->device.scales);
}

/* ---- products ------------------------------------------------------------------------------------------ */

enum { LINEAR, LINEAR_ADD, LOGITS, NORM_LOGITS, NORM_LINEAR, NORM_GLU, GATED_LINEAR_ADD, N_PRODUCTS };
static const char *const product_names[N_PRODUCTS] = {
    "linear", "linear_add", "logits", "norm_logits", "norm_linear", "norm_glu", "gated_linear_add"};

static bool is_act(int product)
{
    return product == LINEAR || product == NORM_LINEAR || product == NORM_GLU;
}

/* What is in bf16 on the device's way to a result, but for inputs and results. */
struct way {
    bool weights, normed, outputs; /* those before a feature map or the other product of a GLU */
};

/* Which ways there are: one row, or a few, by kernels of quantised weights; else these become bf16, for
 * kernels that take the norm in, or not, or not even the feature map. */
static const struct way ways[] = {{0}, {true, false, false}, {true, true, false}, {true, true, true}};
enum { WAYS = sizeof ways / sizeof *ways };

struct inputs {
    struct numbers a, f, gate, x, bias, norm_weight, norm_bias;
    bool layer_norm, has_bias;
    int rows, outs, cols, ld;
};

static void round_to_bf16(float *x, size_t n, bool whether)
{
    for (size_t i = 0; whether && i < n; i++)
        x[i] = ltn_bf16_to_f32(ltn_f32_to_bf16(x[i]));
}

/* size[r, o] = |w_o| |x_r| / sqrt(cols): what a sum of so many terms has where their signs are random. */
static void sizes_of(float *size, const struct matrices *m, const float *x, int rows)
{
    const int outs = m->host.rows, cols = m->host.cols;
    for (int r = 0; r < rows; r++) {
        double sum = 0;
        for (int c = 0; c < cols; c++)
            sum += (double)x[(size_t)r * cols + c] * x[(size_t)r * cols + c];
        for (int o = 0; o < outs; o++)
            size[(size_t)r * outs + o] = m->sizes[o] * (float)sqrt(sum / cols);
    }
}

/* All products by the CPU backend, and how large the terms of their sums are. y, size: [N_PRODUCTS] of
 * [rows, outs] */
static void expected(float **y, float **size, const struct inputs *in, const struct matrices w[2],
                     const struct way *way)
{
    const struct ltn_ops *r = ref->ops;
    const int rows = in->rows, outs = in->outs, cols = in->cols;
    const size_t n_in = (size_t)rows * cols, n_out = (size_t)rows * outs;
    const float *bias = in->has_bias ? in->bias.host : NULL;
    const struct ltn_linear l[2] = {{way->weights ? w[0].wide : w[0].host, bias, {0}},
                                    {way->weights ? w[1].wide : w[1].host, bias, {0}}};
    const struct ltn_norm norm = {in->layer_norm ? in->norm_weight.host : NULL,
                                  in->layer_norm ? in->norm_bias.host : NULL};
    float *x = malloc(n_in * sizeof *x), *second = malloc(n_out * sizeof *second);
    float *second_size = malloc(n_out * sizeof *second_size);
    assert_true(x && second && second_size);

    sizes_of(size[LINEAR], &w[0], in->a.host, rows);
    CHECK(r->linear(ref, y[LINEAR], in->a.host, &l[0], rows, &err));
    memcpy(y[LINEAR_ADD], in->x.host, n_out * sizeof(float));
    CHECK(r->linear_add(ref, y[LINEAR_ADD], in->a.host, &l[0], rows, &err));
    CHECK(r->logits(ref, y[LOGITS], in->a.host, &l[0].w, rows, &err));
    memcpy(size[LINEAR_ADD], size[LINEAR], n_out * sizeof(float));
    memcpy(size[LOGITS], size[LINEAR], n_out * sizeof(float));

    CHECK(r->norm(ref, x, in->f.host, &norm, rows, cols, &err));
    round_to_bf16(x, n_in, way->normed);
    sizes_of(size[NORM_LOGITS], &w[0], x, rows);
    CHECK(r->logits(ref, y[NORM_LOGITS], x, &l[0].w, rows, &err));
    CHECK(r->linear(ref, y[NORM_LINEAR], x, &l[0], rows, &err));
    round_to_bf16(y[NORM_LINEAR], n_out, way->outputs);
    CHECK(r->linear(ref, second, x, &l[1], rows, &err));
    round_to_bf16(second, n_out, way->outputs);
    sizes_of(second_size, &w[1], x, rows);
    for (size_t i = 0; i < n_out; i++) {
        size[NORM_LINEAR][i] = size[NORM_LOGITS][i];
        size[NORM_GLU][i] = hypotf(size[NORM_LOGITS][i] * second[i], second_size[i] * y[NORM_LINEAR][i]);
        y[NORM_GLU][i] = y[NORM_LINEAR][i] * second[i];
    }
    CHECK(r->activation(ref, y[NORM_LINEAR], outs, rows, outs / 2, 1, LTN_ACT_SILU, &err));

    CHECK(r->gated_norm(ref, x, in->a.host, in->gate.host, in->ld, &norm, rows, cols, &err));
    round_to_bf16(x, n_in, way->normed);
    sizes_of(size[GATED_LINEAR_ADD], &w[0], x, rows);
    memcpy(y[GATED_LINEAR_ADD], in->x.host, n_out * sizeof(float));
    CHECK(r->linear_add(ref, y[GATED_LINEAR_ADD], x, &l[0], rows, &err));
    free(x);
    free(second);
    free(second_size);
}

/* All products on the device, as f32. */
static void found(float **y, const struct inputs *in, const struct matrices w[2])
{
    const struct ltn_ops *c = cuda->ops;
    const int rows = in->rows, outs = in->outs, cols = in->cols;
    const size_t n = (size_t)rows * outs;
    const float *bias = in->has_bias ? in->bias.device : NULL;
    const struct ltn_linear l[2] = {{w[0].device, bias, {0}}, {w[1].device, bias, {0}}};
    const struct ltn_norm norm = {in->layer_norm ? in->norm_weight.device : NULL,
                                  in->layer_norm ? in->norm_bias.device : NULL};
    struct numbers act = numbers(n, true), f32 = numbers(n, false);
    struct numbers between = numbers((size_t)rows * cols, true), second = numbers(n, true);
    uint16_t *half = malloc(n * sizeof *half);
    assert_non_null(half);
    reserve_room(cuda, &l[0], &l[1], NULL, rows);
    for (int i = 0; i < N_PRODUCTS; i++) {
        void *a = act.device, *x = f32.device, *s = between.device;
        CHECK(c->copy(cuda, x, in->x.device, n * sizeof(float), &err));
        const enum ltn_status status =
            i == LINEAR        ? c->linear(cuda, a, in->a.device, &l[0], rows, &err)
            : i == LINEAR_ADD  ? c->linear_add(cuda, x, in->a.device, &l[0], rows, &err)
            : i == LOGITS      ? c->logits(cuda, x, in->a.device, &l[0].w, rows, &err)
            : i == NORM_LOGITS ? c->norm_logits(cuda, x, in->f.device, &norm, &l[0].w, rows, s, &err)
            : i == NORM_LINEAR ? c->norm_linear(cuda, a, in->f.device, &norm, &l[0], LTN_ACT_SILU, outs / 2,
                                                1, rows, s, &err)
            : i == NORM_GLU
                ? c->norm_glu(cuda, a, in->f.device, &norm, &l[0], &l[1], rows, s, second.device, &err)
                : c->gated_linear_add(cuda, x, in->a.device, in->gate.device, in->ld, &norm, &l[0], rows, s,
                                      &err);
        CHECK(status);
        if (!is_act(i)) {
            CHECK(c->download(cuda, y[i], x, n * sizeof(float), &err));
            continue;
        }
        CHECK(c->download(cuda, half, a, n * sizeof *half, &err));
        for (size_t k = 0; k < n; k++)
            y[i][k] = ltn_bf16_to_f32(half[k]);
    }
    free(half);
    drop(&act), drop(&f32), drop(&between), drop(&second);
}

/* ||found - y|| / ||size||; of results in bf16, what it is more than if they were the nearest. */
static double distance(const float *found, const float *y, const float *size, size_t n, bool is_act)
{
    double lost = 0, all = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)found[i] - y[i]);
        if (is_act)
            d -= fabs((double)ltn_bf16_to_f32(ltn_f32_to_bf16(y[i])) - y[i]);
        lost += isfinite(d) ? d * d : INFINITY;
        all += (double)size[i] * size[i];
    }
    return sqrt(lost / all);
}

/* What the CPU backend rounds is allowed: 1,024 columns to 16 bits under one scale, 2^-15 / sqrt(12) of their
 * most a column, which is 3.5 times the root mean square of normal inputs and 6 to 11 times that of products
 * of two: 3e-5 to 1e-4 of the terms. The device's, a scale a group, and f32 sums are less. One group lost in
 * one row of the largest matrices is 1.7e-3, one group's scale taken for its neighbour's (.28 off) 5e-4. */
static const double allowed = 0x1p-13;

static double worst[LTN_N_DTYPES][WAYS];

static void one_case(const struct matrices w[2], int rows, bool layer_norm, bool has_bias)
{
    const enum ltn_dtype dtype = w->host.dtype;
    const int outs = w->host.rows, cols = w->host.cols, ld = cols + 8;
    const size_t n = (size_t)rows * outs, n_in = (size_t)rows * cols;
    struct inputs in = {.a = numbers(n_in, true),
                        .f = numbers(n_in, false),
                        .gate = numbers((size_t)rows * ld, true),
                        .x = numbers(n, false),
                        .bias = numbers((size_t)outs, false),
                        .norm_weight = numbers((size_t)cols, false),
                        .norm_bias = numbers((size_t)cols, false),
                        .layer_norm = layer_norm,
                        .has_bias = has_bias,
                        .rows = rows,
                        .outs = outs,
                        .cols = cols,
                        .ld = ld};
    float *there[N_PRODUCTS], *here[N_PRODUCTS], *size[N_PRODUCTS];
    double least[N_PRODUCTS];
    int by[N_PRODUCTS] = {0};
    for (int i = 0; i < N_PRODUCTS; i++) {
        there[i] = malloc(n * sizeof(float)), here[i] = malloc(n * sizeof(float));
        size[i] = malloc(n * sizeof(float));
        assert_true(there[i] && here[i] && size[i]);
        least[i] = INFINITY;
    }
    found(there, &in, w);
    for (int way = 0; way < WAYS; way++) {
        expected(here, size, &in, w, &ways[way]);
        for (int i = 0; i < N_PRODUCTS; i++) {
            const double d = distance(there[i], here[i], size[i], n, is_act(i));
            by[i] = d < least[i] ? way : by[i];
            least[i] = d < least[i] ? d : least[i];
        }
    }
    for (int i = 0; i < N_PRODUCTS; i++) {
        worst[dtype][by[i]] = fmax(worst[dtype][by[i]], least[i]);
        if (!(least[i] <= allowed))
            fail_msg("%s of %s [%d, %d], %d rows: error %.3g of its terms (rounding %d), allowed %.3g",
                     product_names[i], ltn_dtype_name(dtype), outs, cols, rows, least[i], by[i], allowed);
        free(there[i]);
        free(here[i]);
        free(size[i]);
    }
    struct numbers *all[] = {&in.a, &in.f, &in.gate, &in.x, &in.bias, &in.norm_weight, &in.norm_bias};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        drop(all[i]);
}

static void test_products(void **state)
{
    const enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*state;
    static const int shapes[][2] = {{2, 32},    {64, 64},     {130, 96},    {384, 1024}, {961, 416},
                                    {5, 11008}, {4096, 2048}, {2048, 5632}, {77, 100},   {40, 31}};
    static const int rows[] = {1, 2, 4, 5, 33};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct matrices w[2];
        for (int k = 0; k < 2; k++)
            w[k] = matrices(shapes[i][0], shapes[i][1], dtype);
        for (size_t k = 0; k < sizeof rows / sizeof *rows; k++)
            one_case(w, rows[k], (i + k) % 4 == 3, (i + k) % 2);
        for (int k = 0; k < 2; k++)
            drop_matrices(&w[k]);
    }
    for (int way = 0; way < WAYS; way++)
        print_message("%s, rounding %d: worst error %.3g\n", ltn_dtype_name(dtype), way, worst[dtype][way]);
}

static void test_embed(void **state)
{
    const enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*state;
    static const int32_t ids[] = {3, 0, 36, 3, 17};
    static const int widths[] = {31, 64, 100, 1024};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        struct matrices m = matrices(37, widths[i], dtype);
        struct numbers x = numbers((size_t)5 * widths[i], false);
        void *there;
        CHECK(cuda->ops->alloc(cuda, &there, sizeof ids, &err));
        CHECK(cuda->ops->upload(cuda, there, ids, sizeof ids, &err));
        CHECK(ref->ops->embed(ref, x.host, &m.host, ids, 5, 19.6f, &err));
        CHECK(cuda->ops->embed(cuda, x.device, &m.device, there, 5, 19.6f, &err));
        assert_true(error_of(&x) == 0);
        cuda->ops->free(cuda, there);
        drop(&x);
        drop_matrices(&m);
    }
}

/* Rows of a call are what they are by themselves, to the bit, as far as they go one by one; and the same call
 * twice gives the same bits. */
static void test_same_bits(void **state)
{
    const enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*state;
    enum { ROWS = 3, OUTS = 700, COLS = 2048 };
    static uint16_t all[ROWS * OUTS], again[ROWS * OUTS], one[OUTS];
    struct matrices m = matrices(OUTS, COLS, dtype);
    struct numbers x = numbers(ROWS * COLS, true), y = numbers(ROWS * OUTS, true);
    const struct ltn_linear l = {.w = m.device};
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
    drop_matrices(&m);
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
