/* The operations of the fast CPU backend, on every instruction set that this machine has and with 1, 2 and 3
 * threads, against the plain reference; lightning attention also against a loop in float64 that shares no
 * code with either. Outputs start as NaN, so that what is not written is seen. */
#include "kernels/cpu/cpu.h"
#include "tests/support.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))

enum { MAX_THREADS = 3, GUARD = 16 };

static struct ltn_backend *reference;
static struct ltn_backend *fast[4 * MAX_THREADS]; /* by instruction set, then by threads */
static int n_fast;
static struct test_rng rng = {20240607};

static int open_all(void **state)
{
    (void)state;
    struct ltn_error err;
    if (ltn_reference_open(&reference, &err))
        return -1;
    for (enum ltn_cpu_isa isa = LTN_CPU_PORTABLE; isa <= ltn_cpu_best_isa(); isa++)
        for (int threads = 1; threads <= MAX_THREADS; threads++)
            if (ltn_cpu_open_isa(&fast[n_fast++], threads, isa, &err))
                return -1;
    return 0;
}

static int close_all(void **state)
{
    (void)state;
    reference->ops->close(reference);
    for (int i = 0; i < n_fast; i++)
        fast[i]->ops->close(fast[i]);
    return 0;
}

/* ---- buffers and comparisons ------------------------------------------------------------------------- */

/* n floats of NaN, and a few more that must stay so. */
static float *poisoned(size_t n)
{
    float *p = malloc((n + GUARD) * sizeof *p);
    assert_non_null(p);
    for (size_t i = 0; i < n + GUARD; i++)
        p[i] = NAN;
    return p;
}

static float *normal(size_t n)
{
    float *p = poisoned(n);
    for (size_t i = 0; i < n; i++)
        p[i] = (float)test_normal(&rng);
    return p;
}

static float *copied(const float *from, size_t n)
{
    return memcpy(poisoned(n), from, n * sizeof *from);
}

static void *random_weights(size_t n, enum ltn_dtype dtype)
{
    float *values = normal(n);
    uint16_t *halves = (uint16_t *)values;
    for (size_t i = 0; dtype != LTN_F32 && i < n; i++)
        halves[i] = dtype == LTN_BF16 ? ltn_f32_to_bf16(values[i]) : ltn_f32_to_f16(values[i]);
    return values;
}

/* A matrix of random weights of any type; freed by matrix_free. */
static struct ltn_matrix matrix(int outs, int cols, enum ltn_dtype dtype)
{
    struct ltn_matrix w = {.dtype = dtype, .rows = outs, .cols = cols};
    if (!ltn_is_quantised(dtype)) {
        w.data = random_weights((size_t)outs * cols, dtype);
        return w;
    }
    size_t row = ltn_row_bytes(dtype, (size_t)cols), row_scales = ltn_row_scale_bytes(dtype, (size_t)cols);
    float *values = normal((size_t)outs * cols);
    char *codes = malloc(outs * row), *scales = malloc(outs * row_scales); /* exact, for the sanitizer */
    assert_true(codes && scales);
    for (int o = 0; o < outs; o++)
        assert_true(ltn_quantise_row(dtype, values + (size_t)o * cols, (size_t)cols, codes + o * row,
                                     scales + o * row_scales));
    free(values);
    w.data = codes;
    w.scales = scales;
    return w;
}

static void matrix_free(struct ltn_matrix *w)
{
    free((void *)w->data);
    free((void *)w->scales);
}

/* The largest difference over the largest value; infinite if anything is not finite. */
static double difference(const float *got, const float *want, size_t n)
{
    double worst = 0, largest = 1e-30;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(got[i]) || !isfinite(want[i]))
            return INFINITY;
        worst = fmax(worst, fabs((double)got[i] - want[i]));
        largest = fmax(largest, fabs(want[i]));
    }
    return worst / largest;
}

static void expect_close(const struct ltn_backend *be, const float *got, const float *want, size_t n,
                         double tolerance, const char *what)
{
    double error = difference(got, want, n);
    if (!(error <= tolerance))
        fail_msg("%s: %s: relative error %.3g, allowed %.3g", be->name, what, error, tolerance);
    for (size_t i = n; i < n + GUARD; i++)
        if (!isnan(got[i]))
            fail_msg("%s: %s: wrote past its end", be->name, what);
}

/* Takes over what fast[index] computed: it must be close to `want`, and the same bits as with one thread
 * (*first, which the caller frees at the end). */
static void judge(int index, float *got, float **first, const float *want, size_t n, double tolerance,
                  const char *what)
{
    expect_close(fast[index], got, want, n, tolerance, what);
    if (index % MAX_THREADS == 0) {
        free(*first);
        *first = got;
        return;
    }
    if (memcmp(got, *first, n * sizeof *got) != 0)
        fail_msg("%s: %s: other bits than with one thread", fast[index]->name, what);
    free(got);
}

/* ---- the small operations ---------------------------------------------------------------------------- */

static const int some_rows[] = {1, 2, 3, 7, 17, 64, 65, 257};
static const int some_cols[] = {1, 3, 16, 31, 64, 100, 259, 1024, 1333};

static void test_embed(void **state)
{
    (void)state;
    struct ltn_error err;
    for (enum ltn_dtype dtype = LTN_F32; dtype < LTN_N_DTYPES; dtype++) {
        for (int i = 0; i < LENGTH(some_rows); i++) {
            int rows = some_rows[i], cols = some_cols[i], words = 37;
            size_t n = (size_t)rows * cols;
            struct ltn_matrix table = matrix(words, cols, dtype);
            int32_t *ids = malloc((size_t)rows * sizeof *ids);
            for (int r = 0; r < rows; r++)
                ids[r] = test_below(&rng, words);
            float *want = poisoned(n), *first = NULL;
            CHECK(reference->ops->embed(reference, want, &table, ids, rows, 19.6f, &err));
            for (size_t at = 0; at < n; at++)
                assert_true(want[at] == 19.6f * ltn_weight(table.data, table.scales, dtype, (size_t)cols,
                                                           (size_t)ids[at / cols], at % cols));
            for (int b = 0; b < n_fast; b++) {
                float *got = poisoned(n);
                CHECK(fast[b]->ops->embed(fast[b], got, &table, ids, rows, 19.6f, &err));
                judge(b, got, &first, want, n, 0, "embed");
            }
            free(first), free(want), free(ids), matrix_free(&table);
        }
    }
}

static void test_norms(void **state)
{
    (void)state;
    struct ltn_error err;
    for (int i = 0; i < LENGTH(some_rows) * LENGTH(some_cols); i++) {
        int rows = some_rows[i % LENGTH(some_rows)], cols = some_cols[i / LENGTH(some_rows)];
        size_t n = (size_t)rows * cols, ld_gate = (size_t)cols + 5;
        float *x = normal(n), *gate = normal(rows * ld_gate), *weight = normal((size_t)cols);
        float *bias = normal((size_t)cols), *want = poisoned(n), *first = NULL;
        /* small rows, where eps decides, and rows far from zero, where the mean does */
        for (int c = 0; c < cols; c++) {
            x[c] *= 1e-3f;
            x[(size_t)(rows - 1) * cols + c] += rows > 1 ? 30 : 0;
        }
        for (int kind = 0; kind < 4; kind++) {
            struct ltn_norm norm = {kind & 1 ? weight : NULL, kind & 1 ? bias : NULL};
            if (kind & 2)
                CHECK(reference->ops->gated_norm(reference, want, x, gate, (int32_t)ld_gate, &norm, rows,
                                                 cols, &err));
            else
                CHECK(reference->ops->norm(reference, want, x, &norm, rows, cols, &err));
            for (int b = 0; b < n_fast; b++) {
                float *got = poisoned(n);
                if (kind & 2)
                    CHECK(fast[b]->ops->gated_norm(fast[b], got, x, gate, (int32_t)ld_gate, &norm, rows, cols,
                                                   &err));
                else
                    CHECK(fast[b]->ops->norm(fast[b], got, x, &norm, rows, cols, &err));
                /* each row by itself: they differ in size */
                for (size_t r = 0; r + 1 < (size_t)rows; r++) {
                    double error = difference(got + r * cols, want + r * cols, (size_t)cols);
                    if (!(error <= (kind & 1 ? 1e-5 : 2e-6))) /* a mean cancels */
                        fail_msg("%s: norm %d: row %zu of %d columns is off by %.3g", fast[b]->name, kind, r,
                                 cols, error);
                }
                judge(b, got, &first, want, n, 5e-6, kind & 2 ? "gated_norm" : "norm");
            }
        }
        free(first), free(want), free(bias), free(weight), free(gate), free(x);
    }
}

static void test_activations(void **state)
{
    (void)state;
    struct ltn_error err;
    for (enum ltn_act act = LTN_ACT_NONE; act <= LTN_ACT_SINE; act++) {
        for (int i = 0; i < LENGTH(some_rows); i++) {
            int rows = some_rows[i], group = some_cols[i], cols = group * (1 + i % 3), ld = cols + 7;
            size_t n = (size_t)rows * ld;
            float *x = normal(n), *first = NULL;
            static const float special[] = {0,  -0.0f, 1e-6f, -1e-6f, 20,   -20,
                                            87, -87,   100,   -100,   3e4f, -3e4f};
            for (size_t at = 0; at < n; at++)
                x[at] *= at % 3 ? 1 : 8;
            for (size_t at = 0; at < n; at += 11)
                x[at] = special[at % LENGTH(special)];
            /* x - max is rounded before the exponential sees it */
            double relative = act == LTN_ACT_EXP ? 1e-5 : 1e-6;
            float *want = copied(x, n);
            CHECK(reference->ops->activation(reference, want, ld, rows, cols, group, act, &err));
            for (int b = 0; b < n_fast; b++) {
                float *got = copied(x, n);
                CHECK(fast[b]->ops->activation(fast[b], got, ld, rows, cols, group, act, &err));
                for (size_t at = 0; at < n; at++) {
                    if (at % ld >= (size_t)cols)
                        assert_true(got[at] == x[at]); /* not of these columns */
                    else if (!(fabs((double)got[at] - want[at]) <= relative * fabs(want[at]) + 1e-33))
                        fail_msg("%s: activation %d of %.9g is %.9g, not %.9g", fast[b]->name, act, x[at],
                                 got[at], want[at]);
                }
                judge(b, got, &first, want, n, 1e-6, "activation");
            }
            free(first), free(want), free(x);
        }
    }
    float broken[20] = {[7] = NAN, [17] = NAN}; /* what is wrong stays visible */
    for (int b = 0; b < n_fast; b++) {
        for (enum ltn_act act = LTN_ACT_NONE; act <= LTN_ACT_SINE; act++) {
            float x[20];
            memcpy(x, broken, sizeof x);
            CHECK(fast[b]->ops->activation(fast[b], x, 20, 1, 20, 20, act, &err));
            assert_true(isnan(x[7]) && isnan(x[17]));
        }
    }
}

static void test_multiply(void **state)
{
    (void)state;
    struct ltn_error err;
    for (int64_t n = 1; n < 200000; n = n * 5 + 2) {
        float *a = normal((size_t)n), *b = normal((size_t)n), *want = copied(a, (size_t)n), *first = NULL;
        CHECK(reference->ops->multiply(reference, want, b, n, &err));
        assert_true(want[n - 1] == a[n - 1] * b[n - 1]);
        for (int i = 0; i < n_fast; i++) {
            float *got = copied(a, (size_t)n);
            CHECK(fast[i]->ops->multiply(fast[i], got, b, n, &err));
            judge(i, got, &first, want, (size_t)n, 0, "multiply");
        }
        free(first), free(want), free(b), free(a);
    }
}

/* ---- matrix products --------------------------------------------------------------------------------- */

static void test_matrix_products(void **state)
{
    (void)state;
    struct ltn_error err;
    static const int sizes[][2] = {{1, 1},    {5, 3},   {4, 16},   {64, 64},  {63, 80},  {67, 31},
                                   {130, 97}, {97, 20}, {384, 33}, {20, 384}, {9, 1025}, {7, 2500}};
    for (int i = 0; i < LENGTH(sizes) * LENGTH(some_rows) * 2; i++) {
        int rows = some_rows[i % LENGTH(some_rows)], size = i / LENGTH(some_rows) % LENGTH(sizes);
        int outs = sizes[size][0], cols = sizes[size][1];
        enum ltn_dtype dtype =
            (enum ltn_dtype)((i + i / LENGTH(some_rows)) % 3 + i / (LENGTH(sizes) * LENGTH(some_rows)) * 3);
        size_t n = (size_t)rows * outs;
        float *x = normal((size_t)rows * cols), *bias = normal((size_t)outs), *residual = normal(n);
        struct ltn_linear l = {.w = matrix(outs, cols, dtype), .bias = bias};
        float *first = NULL;
        for (int kind = 0; kind < 5; kind++) {
            l.bias = kind & 1 ? bias : NULL;
            float *want = NULL;
            for (int b = -1; b < n_fast; b++) {
                struct ltn_backend *be = b < 0 ? reference : fast[b];
                float *got = kind < 2 || kind == 4 ? poisoned(n) : copied(residual, n);
                if (kind < 2)
                    CHECK(be->ops->linear(be, got, x, &l, rows, &err));
                else if (kind < 4)
                    CHECK(be->ops->linear_add(be, got, x, &l, rows, &err));
                else
                    CHECK(be->ops->logits(be, got, x, &l.w, rows, &err));
                if (b < 0)
                    want = got;
                else /* for q8 and q4 the input is rounded to 16 bits */
                    judge(b, got, &first, want, n, dtype == LTN_Q8 || dtype == LTN_Q4 ? 1e-4 : 2e-6,
                          "matrix product");
            }
            free(want);
        }
        free(first), matrix_free(&l.w), free(residual), free(bias), free(x);
    }
}

/* A row's result does not depend on the rows around it. */
static void test_rows_are_independent(void **state)
{
    (void)state;
    struct ltn_error err;
    enum { ROWS = 101, OUTS = 70, COLS = 1100 };
    for (enum ltn_dtype dtype = LTN_F32; dtype < LTN_N_DTYPES; dtype++) {
        float *x = normal(ROWS * COLS), *all = poisoned(ROWS * OUTS), *one = poisoned(OUTS);
        struct ltn_matrix w = matrix(OUTS, COLS, dtype);
        for (int b = 0; b < n_fast; b++) {
            CHECK(fast[b]->ops->logits(fast[b], all, x, &w, ROWS, &err));
            for (int r = 0; r < ROWS; r++) {
                CHECK(fast[b]->ops->logits(fast[b], one, x + r * COLS, &w, 1, &err));
                assert_memory_equal(one, all + r * OUTS, OUTS * sizeof *one);
            }
        }
        matrix_free(&w), free(one), free(all), free(x);
    }
}

/* ---- lightning attention ----------------------------------------------------------------------------- */

/* Random inputs of one call with rows of q, k, v, u side by side. */
struct attention_case {
    struct ltn_attention a;
    int rows, n_seqs;
    size_t e, d, ld, out, state, n_out; /* state: floats per sequence; out: of a row of o */
    float *qkvu, *states;
    struct ltn_seq seqs[8];
};

static void case_make(struct attention_case *c, int heads, int e, bool lrpe, const int *counts, int n_seqs)
{
    *c = (struct attention_case){.n_seqs = n_seqs, .e = (size_t)e, .d = lrpe ? 2 * (size_t)e : (size_t)e};
    float *slopes = poisoned((size_t)heads), *theta = lrpe ? poisoned((size_t)heads * e) : NULL;
    for (int h = 0; h < heads; h++)
        slopes[h] = (float)pow(2, -8.0 * (h + 1) / heads);
    if (heads > 2)
        slopes[2] = 3.9e-8f;
    for (int i = 0; lrpe && i < heads * e; i++)
        theta[i] = (float)pow(10000, -2.0 * i / (heads * e)) * (i % 5 == 4 ? -1 : 1);
    c->a = (struct ltn_attention){heads, e, slopes, theta, 24};
    c->out = (size_t)heads * e;
    c->ld = 4 * c->out + 3;
    c->state = 24 + heads * c->d * e + 8; /* something before and after it */
    for (int i = 0; i < n_seqs; i++) {
        c->seqs[i] = (struct ltn_seq){NULL, i % 2 ? 10000000 + i : i * 777, c->rows, counts[i]};
        c->rows += counts[i];
    }
    c->n_out = c->rows * c->out;
    c->qkvu = normal(c->rows * c->ld);
    c->states = normal(n_seqs * c->state);
}

static void case_free(struct attention_case *c)
{
    free(c->states), free(c->qkvu), free((void *)c->a.slopes), free((void *)c->a.theta);
}

/* Returns o, and in *states the states after the call. */
static float *case_run(const struct attention_case *c, struct ltn_backend *be, float **states)
{
    struct ltn_error err;
    struct ltn_seq seqs[LENGTH(c->seqs)];
    float *o = poisoned(c->n_out);
    *states = copied(c->states, c->n_seqs * c->state);
    for (int i = 0; i < c->n_seqs; i++) {
        seqs[i] = c->seqs[i];
        seqs[i].state = *states + i * c->state;
    }
    CHECK(be->ops->lightning(be, o, c->qkvu, c->qkvu + c->out, c->qkvu + 2 * c->out, (int32_t)c->ld, &c->a,
                             seqs, c->n_seqs, &err));
    return o;
}

static void compare_case(int heads, int e, bool lrpe, const int *counts, int n_seqs)
{
    struct attention_case c;
    case_make(&c, heads, e, lrpe, counts, n_seqs);
    float *want_states, *want = case_run(&c, reference, &want_states), *first = NULL, *first_states = NULL;
    char what[128];
    snprintf(what, sizeof what, "lightning, %d heads of %d%s, %d sequences, %d rows", heads, e,
             lrpe ? " with LRPE" : "", n_seqs, c.rows);
    for (int b = 0; b < n_fast; b++) {
        float *states, *got = case_run(&c, fast[b], &states);
        for (int i = 0; i < n_seqs; i++) { /* before and after the layer nothing moved; each head by itself */
            const float *now = states + i * c.state, *then = c.states + i * c.state;
            size_t size = c.d * c.e;
            assert_memory_equal(now, then, 24 * sizeof *now);
            assert_memory_equal(now + c.state - 8, then + c.state - 8, 8 * sizeof *now);
            for (int h = 0; h < heads; h++) {
                double error =
                    difference(now + 24 + h * size, want_states + i * c.state + 24 + h * size, size);
                if (!(error <= 1e-5))
                    fail_msg("%s: %s: head %d of state %d is off by %.3g", fast[b]->name, what, h, i, error);
            }
        }
        judge(b, got, &first, want, c.n_out, 5e-6, what);
        judge(b, states, &first_states, want_states, n_seqs * c.state, 5e-6, what);
    }
    free(first_states), free(first), free(want_states), free(want);
    case_free(&c);
}

static void test_lightning(void **state)
{
    (void)state;
    static const int dims[] = {1, 8, 20, 64, 80, 96, 128, 160, 192, 256}, heads[] = {1, 3, 5, 12};
    static const int one[] = {1}, few[] = {3}, odd[] = {7}, block[] = {64}, more[] = {65}, many[] = {257};
    static const int mixed[] = {5, 1, 70, 1, 17, 2, 128, 3}, decode[] = {1, 1, 1, 1, 1};
    static const struct {
        const int *counts;
        int n;
    } packs[] = {{one, 1}, {few, 1}, {odd, 1}, {block, 1}, {more, 1}, {many, 1}, {mixed, 8}, {decode, 5}};
    int turn = 0;
    for (int i = 0; i < LENGTH(dims); i++) {
        for (int p = 0; p < LENGTH(packs); p++) {
            for (int lrpe = 0; lrpe < 2; lrpe++) {
                int h = heads[turn++ % LENGTH(heads)];
                if (h * dims[i] <= 640)
                    compare_case(h, dims[i], lrpe, packs[p].counts, packs[p].n);
                else
                    compare_case(dims[i] > 128 ? 1 : 3, dims[i], lrpe, packs[p].counts, packs[p].n);
            }
        }
    }
    compare_case(5, 32, true, mixed, 8);
    compare_case(12, 64, true, mixed, 8);
    compare_case(1, 1500, true, few, 1); /* too wide for whole blocks */
    compare_case(1, 1500, true, one, 1);
}

/* One head against the plain recurrence in float64, which shares no code with the backends. */
struct long_stream {
    int n, e;
    float slope;
    float *qkv;    /* [n, 3e] */
    double *o, *s; /* [n, e], [e, e] */
};

static void stream_make(struct long_stream *l, int n, int e, float slope)
{
    *l = (struct long_stream){n,
                              e,
                              slope,
                              normal((size_t)n * 3 * e),
                              calloc((size_t)n * e, sizeof(double)),
                              calloc((size_t)e * e, sizeof(double))};
    for (int t = 0; t < n; t++)
        for (int c = 0; c < 3 * e; c++) { /* features as after SiLU; values with a mean, so that sums grow */
            float *x = &l->qkv[(size_t)t * 3 * e + c];
            *x = c < 2 * e ? *x / (1 + expf(-*x)) : *x + 0.2f;
        }
    double r = exp(-(double)slope);
    for (int t = 0; t < n; t++) {
        const float *q = l->qkv + (size_t)t * 3 * e, *k = q + e, *v = k + e;
        for (int c = 0; c < e; c++) {
            for (int j = 0; j < e; j++) {
                double *s = &l->s[c * e + j];
                *s = r * *s + (double)k[c] * v[j];
                l->o[(size_t)t * e + j] += q[c] * *s;
            }
        }
    }
}

/* In calls of `chunk` rows; 0: of random sizes, unaligned, many of a single row. */
static void stream_run(const struct long_stream *l, struct ltn_backend *be, int chunk)
{
    struct ltn_error err;
    size_t e = (size_t)l->e;
    float *o = poisoned(l->n * e), *s = calloc(e * e, sizeof *s);
    struct ltn_attention a = {1, l->e, &l->slope, NULL, 0};
    assert_non_null(s);
    for (int first = 0; first < l->n;) {
        int count = chunk;
        if (chunk == 0)
            count = test_below(&rng, 3) ? 1 + test_below(&rng, 20) : 1 + test_below(&rng, 500);
        if (count > l->n - first)
            count = l->n - first;
        struct ltn_seq seq = {s, first, 0, count};
        const float *q = l->qkv + first * 3 * e;
        CHECK(be->ops->lightning(be, o + first * e, q, q + e, q + 2 * e, 3 * l->e, &a, &seq, 1, &err));
        first += count;
    }
    double worst_s = 0, largest_s = 0, worst_o = 0, largest_o = 0;
    for (size_t i = 0; i < e * e; i++) {
        worst_s = fmax(worst_s, fabs(s[i] - l->s[i]));
        largest_s = fmax(largest_s, fabs(l->s[i]));
    }
    for (size_t i = 0; i < l->n * e; i++) {
        if (!isfinite(o[i]))
            worst_o = INFINITY;
        worst_o = fmax(worst_o, fabs(o[i] - l->o[i]));
        largest_o = fmax(largest_o, fabs(l->o[i]));
    }
    if (!(worst_s <= 1e-5 * largest_s) || !(worst_o <= 1e-5 * largest_o))
        fail_msg("%s: slope %g, %d tokens, calls of %d: state off by %.3g, outputs by %.3g of the largest",
                 be->name, l->slope, l->n, worst_s / largest_s, worst_o / largest_o);
    free(s), free(o);
}

static void test_long_streams(void **state)
{
    (void)state;
    static const float slopes[] = {3.9e-8f, 9.1e-4f, 0.5f};
    for (int i = 0; i < LENGTH(slopes); i++) {
        struct long_stream l;
        stream_make(&l, 20000, 40, slopes[i]);
        stream_run(&l, reference, 0);
        for (int b = 0; b < n_fast; b++)
            stream_run(&l, fast[b], 0);
        /* Step by step, and in blocks so short that a decay rounded to f32 would be far off at the end. */
        for (int b = 0; b < n_fast; b += MAX_THREADS)
            for (int chunk = 1; chunk <= 2; chunk++)
                stream_run(&l, fast[b], chunk);
        free(l.s), free(l.o), free(l.qkv);
    }
}

/* The first token's state is its rotated key times its value: cosines and sines, seen bare. */
static void test_far_positions(void **state)
{
    (void)state;
    enum { E = 64 };
    struct ltn_error err;
    static const int64_t positions[] = {0, 1, 1000, 1048577, 9999999, 10000000, 100000007};
    float theta[E], slope = 0.01f, *x = poisoned(3 * E), *o = poisoned(3 * E);
    for (int c = 0; c < E; c++) {
        theta[c] = (float)((1 + test_uniform(&rng)) * pow(10, -c / 10.0));
        x[c] = x[E + c] = x[2 * E + c] = 1;
    }
    struct ltn_attention a = {1, E, &slope, theta, 0};
    for (int i = 0; i < LENGTH(positions); i++) {
        for (int b = -1; b < n_fast; b++) {
            struct ltn_backend *be = b < 0 ? reference : fast[b];
            for (int count = 1; count <= 2; count++) { /* as a step, and as the first row of a block */
                float *s = poisoned(2 * E * E);
                memset(s, 0, 2 * E * E * sizeof *s);
                for (int c = 0; c < E; c++)
                    x[E + c] = 1;
                struct ltn_seq seq = {s, positions[i], 0, count};
                float rows[2][3 * E] = {{0}}; /* the second row adds nothing */
                memcpy(rows[0], x, sizeof rows[0]);
                CHECK(be->ops->lightning(be, o, rows[0], rows[0] + E, rows[0] + 2 * E, 3 * E, &a, &seq, 1,
                                         &err));
                double decay = count == 2 ? exp(-(double)slope) : 1;
                for (int c = 0; c < E; c++) {
                    long double angle = (long double)theta[c] * positions[i];
                    double cosine = (double)cosl(angle) * decay, sine = (double)sinl(angle) * decay;
                    for (int j = 0; j < E; j++)
                        if (!(fabs(s[c * E + j] - cosine) < 5e-7) ||
                            !(fabs(s[(E + c) * E + j] - sine) < 5e-7))
                            fail_msg("%s: position %lld: cosine %.9g, sine %.9g; expected %.9g, %.9g",
                                     be->name, (long long)positions[i], s[c * E + j], s[(E + c) * E + j],
                                     cosine, sine);
                }
                free(s);
            }
        }
    }
    free(o), free(x);
}

/* ---- the backend as a whole -------------------------------------------------------------------------- */

/* Work of one of several threads on one backend; each repeats its own calls and counts surprises. */
struct user {
    struct ltn_backend *be;
    struct attention_case c;
    struct ltn_matrix w;
    float *logits, *o, *states;
    int surprises;
};

static float *user_logits(struct user *u)
{
    struct ltn_error err;
    float *out = malloc((size_t)u->c.rows * u->w.rows * sizeof *out);
    if (!out || u->be->ops->logits(u->be, out, u->c.qkvu, &u->w, u->c.rows, &err))
        u->surprises++;
    return out;
}

static void *user_main(void *arg)
{
    struct user *u = arg;
    for (int i = 0; i < 60; i++) {
        float *states, *o = case_run(&u->c, u->be, &states), *logits = user_logits(u);
        if (memcmp(o, u->o, u->c.n_out * sizeof *o) ||
            memcmp(states, u->states, u->c.n_seqs * u->c.state * sizeof *o) ||
            memcmp(logits, u->logits, (size_t)u->c.rows * u->w.rows * sizeof *o))
            u->surprises++;
        free(logits), free(o), free(states);
    }
    return NULL;
}

static void test_several_users(void **state)
{
    (void)state;
    enum { USERS = 4 };
    struct user users[USERS];
    pthread_t threads[USERS];
    static const int counts[] = {33, 1, 90};
    for (int i = 0; i < USERS; i++) {
        struct user *u = &users[i];
        *u = (struct user){.be = fast[n_fast - 1]};
        case_make(&u->c, 3, 32 + 16 * i, i % 2, counts, 1 + i % 3);
        u->w = matrix(100 + i, 50, LTN_F32);
        u->o = case_run(&u->c, u->be, &u->states);
        u->logits = user_logits(u);
    }
    for (int i = 0; i < USERS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, user_main, &users[i]), 0);
    for (int i = 0; i < USERS; i++) {
        struct user *u = &users[i];
        pthread_join(threads[i], NULL);
        assert_int_equal(u->surprises, 0);
        free(u->o), free(u->states), free(u->logits), matrix_free(&u->w);
        case_free(&u->c);
    }
}

struct meeting {
    atomic_int arrived;
    atomic_int_fast64_t sum, count;
};

/* Two tasks that wait for each other end in time only if two threads run them. */
static void meet(void *ctx, int64_t task, int worker)
{
    struct meeting *m = ctx;
    (void)worker;
    atomic_fetch_add(&m->sum, task);
    atomic_fetch_add(&m->arrived, 1);
    for (int i = 0; i < 10000 && atomic_load(&m->arrived) < 2; i++)
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    if (atomic_load(&m->arrived) == 2)
        atomic_fetch_add(&m->count, 1);
}

/* Task 0 ends only once the others have, one of which lies in the share of the thread that runs it. */
static void wait_for_others(void *ctx, int64_t task, int worker)
{
    struct meeting *m = ctx;
    (void)worker;
    for (int i = 0; i < 10000 && task == 0 && atomic_load(&m->arrived) < 3; i++)
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    if (task > 0)
        atomic_fetch_add(&m->arrived, 1);
    else if (atomic_load(&m->arrived) == 3)
        atomic_fetch_add(&m->count, 1);
}

static void tally(void *ctx, int64_t task, int worker)
{
    struct meeting *m = ctx;
    (void)worker;
    atomic_fetch_add(&m->sum, task);
    atomic_fetch_add(&m->count, 1);
}

static void test_pool(void **state)
{
    (void)state;
    struct ltn_error err;
    struct pool *pool;
    CHECK(pool_open(&pool, 2, &err));
    struct meeting m = {0};
    pool_run(pool, 2, meet, &m);
    assert_int_equal(m.count, 2);
    assert_int_equal(m.sum, 1);
    m = (struct meeting){0};
    pool_run(pool, 4, wait_for_others, &m);
    assert_int_equal(m.count, 1);
    static const int64_t counts[] = {1, 2, 3, 100000,
                                     (1 << 24) + 7}; /* the last is more than one job holds */
    for (int i = 0; i < LENGTH(counts); i++) {
        int64_t n = counts[i];
        m = (struct meeting){0};
        pool_run(pool, n, tally, &m);
        assert_int_equal(m.count, n);
        assert_int_equal(m.sum, n * (n - 1) / 2);
    }
    pool_close(pool);
}

/* What is expected changes no bit: be it what comes, or something else, or gone by then. */
static void test_expectations(void **state)
{
    (void)state;
    struct ltn_error err;
    static const enum ltn_dtype dtypes[] = {LTN_F32, LTN_BF16, LTN_Q8, LTN_Q4, LTN_FP8};
    for (int b = 0; b < n_fast; b++) {
        const struct ltn_ops *ops = fast[b]->ops;
        for (int i = 0; i < LENGTH(dtypes); i++) {
            struct ltn_matrix w = matrix(301, 2100, dtypes[i]), other = matrix(3, 5, dtypes[(i + 1) % 5]);
            for (int rows = 1; rows <= 2; rows++) {
                float *x = normal(2 * 2100), *want = poisoned(2 * 301), *got = poisoned(2 * 301);
                CHECK(ops->logits(fast[b], want, x, &w, rows, &err));
                const struct ltn_matrix gone = {NULL, dtypes[i], 1 << 20, 1 << 20, NULL};
                const struct ltn_matrix *expected[] = {&w, &other, &gone, &w};
                for (int k = 0; k < 4; k++) {
                    ops->expect(fast[b], expected[k], k < 3 ? rows : 1000);
                    CHECK(ops->logits(fast[b], got, x, &w, rows, &err));
                    assert_memory_equal(got, want, (size_t)rows * 301 * sizeof *got);
                }
                free(x), free(want), free(got);
            }
            matrix_free(&w), matrix_free(&other);
        }
    }
}

/* An idle pool sleeps, and wakes for the next call. */
static void test_idle_pool(void **state)
{
    (void)state;
    struct ltn_error err;
    struct ltn_backend *be = fast[n_fast - 1];
    float *a = normal(100000), *b = normal(100000);
    CHECK(be->ops->multiply(be, a, b, 100000, &err));
    struct timespec before, after, rest = {0, 200000000};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
    nanosleep(&rest, NULL);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
    double used = (double)(after.tv_sec - before.tv_sec) + (double)(after.tv_nsec - before.tv_nsec) * 1e-9;
    if (used > 0.05)
        fail_msg("%s: used %.3f s of processor time in 0.2 s of rest", be->name, used);
    float *want = copied(a, 100000);
    CHECK(reference->ops->multiply(reference, want, b, 100000, &err));
    CHECK(be->ops->multiply(be, a, b, 100000, &err));
    expect_close(be, a, want, 100000, 0, "multiply after a rest");
    free(want), free(a), free(b);
}

static void test_memory(void **state)
{
    (void)state;
    struct ltn_error err;
    struct ltn_backend *backends[] = {reference, fast[n_fast - 1]};
    for (int i = 0; i < 2; i++) {
        struct ltn_backend *be = backends[i];
        assert_true(be->host_memory);
        assert_int_equal(be->act_dtype, LTN_F32);
        assert_true(be->chunk_rows >= 1);
        char host[100], *a, *b;
        memset(host, 7, sizeof host);
        CHECK(be->ops->alloc(be, (void **)&a, 100, &err));
        CHECK(be->ops->alloc(be, (void **)&b, 0, &err));
        assert_int_equal((uintptr_t)a % 64, 0);
        be->ops->free(be, b);
        be->ops->free(be, NULL);
        CHECK(be->ops->alloc(be, (void **)&b, 100, &err));
        CHECK(be->ops->upload(be, a, host, 100, &err));
        CHECK(be->ops->zero(be, a + 50, 50, &err));
        CHECK(be->ops->copy(be, b, a, 100, &err));
        CHECK(be->ops->download(be, host, b, 100, &err));
        CHECK(be->ops->sync(be, &err));
        for (int at = 0; at < 100; at++)
            assert_int_equal(host[at], at < 50 ? 7 : 0);
        be->ops->free(be, a);
        be->ops->free(be, b);
        assert_int_equal(be->ops->alloc(be, (void **)&a, SIZE_MAX - 10, &err), LTN_ERR_MEMORY);
        assert_null(a);
        assert_non_null(strstr(err.text, "needed"));
    }
}

static void test_opening(void **state)
{
    (void)state;
    struct ltn_error err;
    struct ltn_backend *be;
    assert_int_equal(ltn_cpu_open(&be, -1, &err), LTN_ERR_INPUT);
    assert_null(be);
    assert_int_equal(ltn_cpu_open(&be, 5000, &err), LTN_ERR_INPUT);
    CHECK(ltn_cpu_open(&be, 0, &err));
    assert_non_null(strstr(be->name, "CPU, "));
    be->ops->close(be);
    CHECK(ltn_cpu_open(&be, 1, &err));
    assert_non_null(strstr(be->name, "1 thread, "));
    be->ops->close(be);
}

static void instruction_set(enum ltn_cpu_isa isa, const char *name)
{
    struct ltn_error err;
    struct ltn_backend *be;
    if (isa > ltn_cpu_best_isa()) {
        assert_int_equal(ltn_cpu_open_isa(&be, 1, isa, &err), LTN_ERR_UNSUPPORTED);
        assert_null(be);
        skip();
    }
    CHECK(ltn_cpu_open_isa(&be, 1, isa, &err));
    assert_non_null(strstr(be->name, name));
    be->ops->close(be);
}

static void test_avx2_is_here(void **state)
{
    (void)state;
    instruction_set(LTN_CPU_AVX2, "AVX2");
}

static void test_avx512_is_here(void **state)
{
    (void)state;
    instruction_set(LTN_CPU_AVX512, "AVX-512");
}

static void test_vnni_is_here(void **state)
{
    (void)state;
    instruction_set(LTN_CPU_VNNI, "AVX-512 VNNI");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_embed),
        cmocka_unit_test(test_norms),
        cmocka_unit_test(test_activations),
        cmocka_unit_test(test_multiply),
        cmocka_unit_test(test_matrix_products),
        cmocka_unit_test(test_rows_are_independent),
        cmocka_unit_test(test_lightning),
        cmocka_unit_test(test_long_streams),
        cmocka_unit_test(test_far_positions),
        cmocka_unit_test(test_several_users),
        cmocka_unit_test(test_pool),
        cmocka_unit_test(test_expectations),
        cmocka_unit_test(test_idle_pool),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_opening),
        cmocka_unit_test(test_avx2_is_here),
        cmocka_unit_test(test_avx512_is_here),
        cmocka_unit_test(test_vnni_is_here),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}
