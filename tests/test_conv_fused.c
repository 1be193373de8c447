/* The plans of the fused convolutions, carried out in plain C as the kernels do it: strips, steps, packed
 * filters. What a strip does not load is NaN, so that reading it shows. */
#include "kernels/conv/fused.h"
#include "kernels/conv/fused_tma.h"
#include "kernels/conv/index.h"
#include "kernels/dtype.h"
#include "tests/support.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

struct arrays {
    float *x, *filter;
    double *y;
};

/* Values that bf16 and tf32 hold exactly. */
static float *random_array(struct test_rng *rng, int64_t n)
{
    float *a = malloc((size_t)n * sizeof *a);
    assert_non_null(a);
    for (int64_t i = 0; i < n; i++)
        a[i] = (float)(test_below(rng, 255) - 127) / 64;
    return a;
}

static bool inside(const struct ltn_conv_shape *p, int y, int x)
{
    return y >= 0 && y < p->hi && x >= 0 && x < p->wi;
}

/* One strip, [slot units][unit]: block `block` of the tile that begins at position `first`. */
static void load_strip(double *strip, const struct ltn_fused_plan *plan, const struct ltn_conv_shape *p,
                       const int32_t (*fetch)[2], const float *x, int first, int block, int group)
{
    int v = plan->unit, row = p->layout == LTN_NHWC ? p->wi * p->ci : p->wi,
        col = p->layout == LTN_NHWC ? p->ci : 1;
    int64_t image = (int64_t)p->ci * p->hi * p->wi;
    int64_t offset = (int64_t)group * (p->ci / p->groups) * (p->layout == LTN_NHWC ? 1 : p->hi * p->wi);
    for (int i = 0; i < plan->slot_bytes / 16 * v; i++)
        strip[i] = i >= plan->planes * plan->stride * v ? 0.0 : NAN;
    for (int plane = 0; plane < plan->planes; plane++)
        for (int pos = 0; pos < plan->load; pos++)
            for (int i = 0; i < v; i++) {
                int rows = (first + pos) / plan->wq, q = (first + pos) % plan->wq;
                int n = rows / plan->hq, m = rows % plan->hq, phase = plane / plan->subplanes;
                const int32_t *e;
                int64_t at =
                    n * image + offset + (int64_t)(m * p->sh - p->pt) * row + (q * p->sw - p->pl) * col;
                int shift = 0;
                if (plan->vector) {
                    e = fetch[block * plan->planes + plane];
                    at += i;
                } else {
                    e = fetch[(block * plan->subplanes + plane % plan->subplanes) * v + i];
                    shift = phase;
                    at += phase * col;
                }
                bool valid = n < p->n && inside(p, m * p->sh - p->pt + (e[1] >> 16),
                                                q * p->sw - p->pl + (e[1] & 0xffff) + shift);
                strip[(plane * plan->stride + pos) * v + i] = valid ? x[at + e[0]] : 0.0;
            }
}

/* y in the shape's layout, as the kernel computes it */
static void run_plan(const struct ltn_fused_plan *plan, const struct ltn_conv_shape *p,
                     const struct arrays *a)
{
    char *packed = malloc(plan->bytes);
    double *strip = malloc((size_t)plan->slot_bytes / 16 * plan->unit * sizeof *strip);
    int cog = p->co / p->groups, rows = plan->tile_rows, v = plan->unit;
    double *sum = malloc((size_t)rows * plan->bn * sizeof *sum);
    struct ltn_error err;
    assert_true(packed && strip && sum);
    CHECK(ltn_fused_pack(plan, p, a->filter, packed, &err));
    const int32_t(*fetch)[2] = (const void *)packed;
    const int32_t(*steps)[2] = (const void *)(packed + plan->at_steps);
    int positions = p->n * plan->hq * plan->wq;
    int64_t next = 0; /* element of the weights */
    for (int tile = 0; tile < p->groups * plan->n_tiles; tile++) {
        int group = tile / plan->n_tiles, channel = tile % plan->n_tiles * plan->bn;
        int64_t begin = next;
        for (int first = 0; first < positions; first += rows) {
            memset(sum, 0, (size_t)rows * plan->bn * sizeof *sum);
            next = begin;
            for (int b = 0; b < plan->blocks; b++) {
                load_strip(strip, plan, p, fetch, a->x, first, b, group);
                for (int k = 0; k < plan->steps * 2; k++) {
                    int at = steps[k / 2][0] + k % 2 * steps[k / 2][1];
                    assert_true(at >= 0 && at + rows <= plan->slot_bytes / 16 && steps[k / 2][1] >= 0);
                    for (int column = 0; column < plan->bn; column++)
                        for (int i = 0; i < v; i++, next++) {
                            double w = ltn_load(packed + plan->at_weights, v == 8 ? LTN_BF16 : LTN_F32, next);
                            for (int r = 0; r < rows; r++)
                                sum[r * plan->bn + ltn_fused_channel(column, v)] +=
                                    strip[(at + r) * v + i] * w;
                        }
                }
            }
            for (int r = 0; r < rows; r++) {
                int q = (first + r) % plan->wq, m = (first + r) / plan->wq % plan->hq;
                int n = (first + r) / plan->wq / plan->hq;
                for (int c = 0; c < plan->bn && channel + c < cog; c++)
                    if (n < p->n && m < plan->ho && q < plan->wo)
                        a->y[conv_y_at(p, plan->ho, plan->wo, n, group * cog + channel + c, m, q)] =
                            sum[r * plan->bn + c];
            }
        }
    }
    assert_int_equal(plan->at_weights + (size_t)next * (v == 8 ? 2 : 4), plan->bytes);
    free(packed);
    free(strip);
    free(sum);
}

static double direct(const struct ltn_conv_shape *p, const struct arrays *a, int n, int o, int m, int j)
{
    int cg = p->ci / p->groups, group = o / (p->co / p->groups);
    double sum = 0;
    for (int c = 0; c < cg; c++)
        for (int u = 0; u < p->hf; u++)
            for (int v = 0; v < p->wf; v++) {
                int y = m * p->sh + u * p->dh - p->pt, x = j * p->sw + v * p->dw - p->pl;
                if (inside(p, y, x))
                    sum += (double)a->x[conv_x_at(p, n, group * cg + c, y, x)] *
                           a->filter[((int64_t)(o * cg + c) * p->hf + u) * p->wf + v];
            }
    return sum;
}

static void check_y(const struct ltn_conv_shape *p, const struct arrays *a, int i, const char *what)
{
    int ho = ltn_conv_ho(p), wo = ltn_conv_wo(p);
    for (int n = 0; n < p->n; n++)
        for (int o = 0; o < p->co; o++)
            for (int m = 0; m < ho; m++)
                for (int j = 0; j < wo; j++) {
                    double y = a->y[conv_y_at(p, ho, wo, n, o, m, j)];
                    if (!(fabs(y - direct(p, a, n, o, m, j)) < 1e-9))
                        fail_msg("case %d, %s: output (%d, %d, %d, %d)", i, what, n, o, m, j);
                }
}

static struct ltn_conv_shape random_problem(struct test_rng *rng)
{
    struct ltn_conv_shape p;
    do {
        p = (struct ltn_conv_shape){.groups = test_below(rng, 3) ? 1 : 1 + test_below(rng, 4)};
        p.ci = p.groups * (test_below(rng, 2) ? 1 + test_below(rng, 20) : 8 * (1 + test_below(rng, 4)));
        p.co = p.groups * (1 + test_below(rng, test_below(rng, 4) ? 9 : 150));
        p.n = 1 + test_below(rng, 3);
        p.hi = 1 + test_below(rng, 20);
        p.wi = 1 + test_below(rng, 20);
        p.hf = 1 + test_below(rng, 5);
        p.wf = 1 + test_below(rng, 5);
        p.sh = 1 + test_below(rng, 4);
        p.sw = 1 + test_below(rng, 4);
        p.dh = 1 + test_below(rng, 3);
        p.dw = 1 + test_below(rng, 3);
        p.pt = test_below(rng, 4);
        p.pb = test_below(rng, 4);
        p.pl = test_below(rng, 4);
        p.pr = test_below(rng, 4);
        p.layout = test_below(rng, 2) ? LTN_NHWC : LTN_NCHW;
        p.type = test_below(rng, 2) ? LTN_CONV_BF16 : LTN_CONV_TF32;
    } while (p.hi + p.pt + p.pb < p.dh * (p.hf - 1) + 1 || p.wi + p.pl + p.pr < p.dw * (p.wf - 1) + 1);
    return p;
}

static void test_plans_compute_the_convolution(void **state)
{
    (void)state;
    struct test_rng rng = {20};
    struct ltn_error err;
    int orders[4] = {0};
    for (int i = 0; i < 120; i++) {
        struct ltn_conv_shape p = random_problem(&rng);
        struct ltn_fused_choice choice = {.mt = test_below(&rng, 3),
                                          .share = test_below(&rng, 3),
                                          .blocks = test_below(&rng, 4),
                                          .resident = test_below(&rng, 3) - 1,
                                          .order = test_below(&rng, 5) - 1,
                                          .loaders = test_below(&rng, 2) * 32};
        struct ltn_fused_plan plan;
        if (i % 2 || ltn_fused_choose(&plan, &p, &choice, &err) != LTN_OK)
            CHECK(ltn_fused_choose(&plan, &p, NULL, &err));
        assert_true(plan.shared_bytes <= 227 * 1024 && plan.slots >= 2);
        orders[plan.order]++;
        int64_t n_y = ltn_conv_y_elements(&p);
        struct arrays a = {random_array(&rng, ltn_conv_x_elements(&p)),
                           random_array(&rng, ltn_conv_filter_elements(&p)),
                           malloc((size_t)n_y * sizeof *a.y)};
        assert_non_null(a.y);
        for (int64_t k = 0; k < n_y; k++)
            a.y[k] = NAN;
        run_plan(&plan, &p, &a);
        static const char *const orders_of[] = {"channels", "window", "exact", "exact list"};
        check_y(&p, &a, i, orders_of[plan.order]);
        free(a.x);
        free(a.filter);
        free(a.y);
    }
    for (int k = 0; k < 4; k++)
        assert_true(orders[k] > 0);
}

/* A strip as the copy engine's im2col mode brings it, [load][8 units]: first pixels run through the box, row
 * by row and image by image; what lies outside of the tensor is zero. */
static void copy_strip(double *out, const struct ltn_tma_plan *plan, const struct ltn_conv_shape *p,
                       int channel, int right, int down, const float *x, int first, int group)
{
    int line = 8 * plan->unit, corners[4];
    ltn_tma_corners(plan, p, corners);
    int n = first / plan->wq / plan->ho, m = first / plan->wq % plan->ho, j = first % plan->wq;
    int row = m * p->sh - p->pt, column = j * p->sw - p->pl;
    for (int pos = 0; pos < plan->load; pos++) {
        for (int i = 0; i < line; i++) {
            int c = group * (p->ci / p->groups) + channel + i;
            bool valid = n < p->n && inside(p, row + down, column + right) && c < p->ci;
            out[pos * line + i] = valid ? x[conv_x_at(p, n, c, row + down, column + right)] : 0.0;
        }
        column += p->sw;
        if (column > p->wi - 1 + corners[2]) {
            column = corners[0];
            row += p->sh;
        }
        if (row > p->hi - 1 + corners[3]) {
            row = corners[1];
            n++;
        }
    }
}

/* Adds a tap, so many steps of channels, of the strip from position `shift` on. */
static void add_tap(double *sum, const struct ltn_tma_plan *plan, const double *strip, int shift, int steps,
                    const char *weights)
{
    int line = 8 * plan->unit, rows = 64 * plan->mt;
    assert_true(shift + rows <= plan->load);
    for (int column = 0; column < plan->bn; column++)
        for (int i = 0; i < steps * 2 * plan->unit; i++) {
            int place = column * line + ((i / plan->unit) ^ (column & 7)) * plan->unit + i % plan->unit;
            double w = ltn_load(weights, plan->unit == 8 ? LTN_BF16 : LTN_F32, (size_t)place);
            for (int r = 0; r < rows; r++)
                sum[r * plan->bn + ltn_fused_channel(column, plan->unit)] +=
                    strip[(r + shift) * line + i] * w;
        }
}

/* The same for the plan of strips by the copy engine. */
static void run_tma_plan(const struct ltn_tma_plan *plan, const struct ltn_conv_shape *p,
                         const struct arrays *a)
{
    char *packed = malloc(plan->bytes);
    int line = 8 * plan->unit, rows = 64 * plan->mt, cog = p->co / p->groups;
    double *strip = malloc((size_t)plan->load * (size_t)line * sizeof *strip);
    double *sum = malloc((size_t)rows * (size_t)plan->bn * sizeof *sum);
    assert_true(packed && strip && sum);
    ltn_tma_pack(plan, p, a->filter, packed);
    const struct ltn_tma_strips *strips = &plan->strips;
    int positions = p->n * plan->ho * plan->wq;
    const char *weights = packed;
    for (int tile = 0; tile < p->groups * plan->n_tiles; tile++) {
        int group = tile / plan->n_tiles, channel = tile % plan->n_tiles * plan->bn;
        const char *begin = weights;
        for (int first = 0; first < positions; first += rows) {
            memset(sum, 0, (size_t)rows * (size_t)plan->bn * sizeof *sum);
            weights = begin;
            for (int s = 0; s < plan->n_strips; s++) {
                int phase = s % strips->phases, u = s / strips->phases % strips->rows;
                int at_line = s / strips->phases / strips->rows;
                copy_strip(strip, plan, p, at_line * strips->line, strips->phase[phase].x, u * strips->down,
                           a->x, first, group);
                for (int t = 0; t < strips->phase[phase].taps; t++, weights += plan->stage_bytes)
                    add_tap(sum, plan, strip, strips->phase[phase].shift + t * strips->apart,
                            at_line + 1 < strips->lines ? 4 : strips->last_steps, weights);
            }
            for (int r = 0; r < rows; r++) {
                int j = (first + r) % plan->wq, m = (first + r) / plan->wq % plan->ho;
                int n = (first + r) / plan->wq / plan->ho;
                for (int c = 0; c < plan->bn && channel + c < cog; c++)
                    if (n < p->n && j < plan->wo)
                        a->y[conv_y_at(p, plan->ho, plan->wo, n, group * cog + channel + c, m, j)] =
                            sum[r * plan->bn + c];
            }
        }
    }
    assert_int_equal(weights - packed, plan->bytes);
    free(packed);
    free(strip);
    free(sum);
}

static void test_plans_of_the_copy_engine_compute_the_convolution(void **state)
{
    (void)state;
    struct test_rng rng = {21};
    struct ltn_error err;
    int overlapping = 0, apart = 0, short_lines = 0;
    for (int i = 0; i < 60; i++) {
        struct ltn_conv_shape p = random_problem(&rng);
        int step = p.type == LTN_CONV_BF16 ? 16 : 8;
        p.layout = LTN_NHWC;
        p.ci = p.groups * step * (1 + test_below(&rng, 5));
        p.hi = p.hi > 12 ? 12 : p.hi;
        if (p.hi + p.pt + p.pb < p.dh * (p.hf - 1) + 1)
            p.pt = p.dh * (p.hf - 1);
        struct ltn_tma_choice choice = {.mt = i % 3 ? 0 : 4, .overlap = i % 2};
        struct ltn_tma_plan plan;
        if (ltn_tma_choose(&plan, &p, &choice, &err) != LTN_OK)
            CHECK(ltn_tma_choose(&plan, &p, NULL, &err));
        assert_true(plan.shared_bytes <= 227 * 1024 && plan.slots >= 2 && plan.stages >= 1);
        overlapping += plan.overlap && plan.taps > plan.n_strips;
        apart += !plan.overlap;
        short_lines += p.ci / p.groups % (4 * step) != 0;
        int64_t n_y = ltn_conv_y_elements(&p);
        struct arrays a = {random_array(&rng, ltn_conv_x_elements(&p)),
                           random_array(&rng, ltn_conv_filter_elements(&p)),
                           malloc((size_t)n_y * sizeof *a.y)};
        assert_non_null(a.y);
        for (int64_t k = 0; k < n_y; k++)
            a.y[k] = NAN;
        run_tma_plan(&plan, &p, &a);
        check_y(&p, &a, i, plan.overlap ? "rows" : "taps");
        free(a.x);
        free(a.filter);
        free(a.y);
    }
    assert_true(overlapping > 0 && apart > 0 && short_lines > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plans_compute_the_convolution),
        cmocka_unit_test(test_plans_of_the_copy_engine_compute_the_convolution),
    };
    return cmocka_run_group_tests_name("conv_fused", tests, NULL, NULL);
}
