/* Every algorithm of libltn_conv.so against the reference in f64: random shapes (strides, pads, dilations,
 * groups, sides that differ, tails), every type and layout that an algorithm takes; then the twelve layers
 * with few images, and im2win with as many as are measured, judged on the device. Outputs and workspaces
 * begin as NaN, and what lies behind an output must stay as it is.
 *
 * test_conv [SHAPES [SEED]]: the layers from 100 shapes on; from 500 on, or with 0 alone, 128 images of them
 * and one of 10 GB too */
#include "kernels/conv/conv.h"
#include "kernels/dtype.h"
#include "tests/conv_shapes.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 256 /* bytes behind y */ };

static struct ltn_conv *conv;
static struct ltn_error err;
static int ran[LTN_CONV_ALGOS], refused[LTN_CONV_ALGOS], failed;
static double worst[LTN_CONV_ALGOS][3]; /* by type */

static void need(enum ltn_status status)
{
    if (status == LTN_OK)
        return;
    fprintf(stderr, "test_conv: %s\n", err.text);
    exit(1);
}

static void *room(size_t bytes)
{
    void *p = malloc(bytes ? bytes : 1);
    if (!p) {
        fprintf(stderr, "test_conv: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

/* bf16: im2col rounds the library's result, and again after bias and ReLU */
static double limit(const struct ltn_conv_shape *s, enum ltn_conv_algo algo)
{
    const bool twice = algo == LTN_CONV_IM2COL || algo == LTN_CONV_IM2COL_IMAGE;
    return s->type == LTN_CONV_F32 ? 1e-5 : s->type == LTN_CONV_TF32 ? 1e-3 : twice ? 8e-3 : 5e-3;
}

static void complain(const struct ltn_conv_shape *s, enum ltn_conv_algo algo, const char *what, double found)
{
    char text[256];
    failed++;
    conv_shape_text(text, sizeof text, s);
    printf("# %s %s: %s: %g\n", ltn_conv_algo_name(algo), text, what, found);
}

static void judge(const struct ltn_conv_shape *s, enum ltn_conv_algo algo, double error)
{
    if (!(error <= limit(s, algo)))
        complain(s, algo, "relative error", error);
    if (!(error <= worst[algo][s->type]))
        worst[algo][s->type] = error;
}

/* The elements of values in the type, and the values as they are then. */
static void *rounded(float *values, int64_t n, enum ltn_conv_type type)
{
    void *out = room((size_t)n * 4);
    for (int64_t i = 0; i < n; i++)
        if (type == LTN_CONV_BF16) {
            ((uint16_t *)out)[i] = ltn_f32_to_bf16(values[i]);
            values[i] = ltn_bf16_to_f32(((uint16_t *)out)[i]);
        } else {
            ((float *)out)[i] = values[i];
        }
    return out;
}

/* Compares y (host, of the type, and GUARD bytes) with exact. */
static void compare(const struct ltn_conv_shape *s, enum ltn_conv_algo algo, const uint8_t *y,
                    const double *exact)
{
    const int64_t n = ltn_conv_y_elements(s);
    double error = 0, norm = 0, most = 0, largest = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = ltn_load(y, s->type == LTN_CONV_BF16 ? LTN_BF16 : LTN_F32, (size_t)i) - exact[i];
        error += d * d;
        norm += exact[i] * exact[i];
        most = fabs(d) <= most ? most : fabs(d); /* NaN too */
        largest = fmax(largest, fabs(exact[i]));
    }
    judge(s, algo, norm > 0 ? sqrt(error / norm) : sqrt(error));
    if (!(most <= 4 * limit(s, algo) * largest))
        complain(s, algo, "largest error by largest value", most / largest);
    for (size_t i = 0; i < GUARD; i++)
        if (y[(size_t)n * ltn_conv_type_size(s->type) + i] != 0xff) {
            complain(s, algo, "written behind the output, at byte", (double)i);
            break;
        }
}

/* The product alone, on the workspace as it was left, gives the same bits. */
static void run_again(const struct ltn_conv_shape *s, struct ltn_conv2d *op, void *y, size_t y_bytes,
                      const void *x, void *workspace)
{
    uint8_t *first = room(y_bytes), *second = room(y_bytes);
    need(conv->ops->download(conv, first, y, y_bytes, &err));
    need(conv->ops->fill(conv, y, 0xff, y_bytes, &err));
    need(ltn_conv2d_run(op, y, x, workspace, LTN_CONV_KERNEL, &err));
    need(conv->ops->download(conv, second, y, y_bytes, &err));
    if (memcmp(first, second, y_bytes) != 0)
        complain(s, ltn_conv2d_info(op)->algo, "other bits when run again", 1);
    free(first);
    free(second);
}

/* One algorithm: y is device memory of the shape and GUARD bytes. */
static bool run(const struct ltn_conv_shape *s, enum ltn_conv_algo algo, void *y, size_t y_bytes,
                const void *x, const float *filter, const float *bias)
{
    struct ltn_conv2d *op;
    void *workspace;
    enum ltn_status status = ltn_conv2d_create(&op, conv, s, algo, filter, bias, &err);
    if (status == LTN_ERR_UNSUPPORTED) {
        refused[algo]++;
        return false;
    }
    need(status);
    ran[algo]++;
    size_t bytes = ltn_conv2d_info(op)->workspace_bytes;
    need(conv->ops->alloc(conv, &workspace, bytes, &err));
    need(conv->ops->fill(conv, workspace, 0xff, bytes, &err));
    need(conv->ops->fill(conv, y, 0xff, y_bytes, &err));
    need(ltn_conv2d_run(op, y, x, workspace, LTN_CONV_ALL, &err));
    if (bytes == 0) /* without a workspace there is no transform */
        need(ltn_conv2d_run(op, y, x, workspace, LTN_CONV_TRANSFORM, &err));
    if ((algo == LTN_CONV_IM2WIN || algo == LTN_CONV_FUSED) && y_bytes < 64 << 20) /* larger: seconds */
        run_again(s, op, y, y_bytes, x, workspace);
    ltn_conv2d_free(op);
    conv->ops->free(conv, workspace);
    return true;
}

static void test_shape(struct ltn_conv_shape s, uint64_t seed)
{
    const int64_t nx = ltn_conv_x_elements(&s), nf = ltn_conv_filter_elements(&s),
                  ny = ltn_conv_y_elements(&s);
    float *x = room((size_t)nx * 4), *filter = room((size_t)nf * 4), *bias = room((size_t)s.co * 4);
    double *exact = room((size_t)ny * sizeof *exact);
    const bool with_bias = seed % 3 != 0;

    for (int t = 0; t < 6; t++) {
        s.type = (enum ltn_conv_type)(t % 3);
        s.layout = t < 3 ? LTN_NCHW : LTN_NHWC;
        conv_random(x, nx, seed + 1);
        conv_random(filter, nf, seed + 2);
        conv_random(bias, s.co, seed + 3);
        void *x_typed = rounded(x, nx, s.type);
        free(rounded(filter, nf, s.type));
        ltn_conv2d_reference(exact, &s, x, filter, with_bias ? bias : NULL);
        const size_t size = ltn_conv_type_size(s.type), y_bytes = (size_t)ny * size + GUARD;
        uint8_t *y = room(y_bytes);
        void *dx, *dy;
        need(conv->ops->alloc(conv, &dx, (size_t)nx * size, &err));
        need(conv->ops->alloc(conv, &dy, y_bytes, &err));
        need(conv->ops->upload(conv, dx, x_typed, (size_t)nx * size, &err));
        for (int algo = 0; algo < LTN_CONV_ALGOS; algo++) {
            if (algo == LTN_CONV_CUDNN) /* a peer, and seconds for each shape */
                continue;
            if (!run(&s, (enum ltn_conv_algo)algo, dy, y_bytes, dx, filter, with_bias ? bias : NULL))
                continue;
            need(conv->ops->download(conv, y, dy, y_bytes, &err));
            compare(&s, (enum ltn_conv_algo)algo, y, exact);
        }
        double error = NAN; /* of the last algorithm: the device's judge agrees with ours */
        need(conv->ops->rel_l2(conv, &error, &s, dy, dx, filter, with_bias ? bias : NULL, 0, s.n, &err));
        if (!(error <= limit(&s, LTN_CONV_DIRECT_NAIVE)))
            complain(&s, LTN_CONV_AUTO, "judged on the device", error);
        conv->ops->free(conv, dx);
        conv->ops->free(conv, dy);
        free(x_typed);
        free(y);
    }
    free(x);
    free(filter);
    free(bias);
    free(exact);
}

/* all: every algorithm, not im2win alone */
static void test_layer(int layer, int32_t images, bool all)
{
    struct ltn_conv_shape s = ltn_conv_layer(layer, images);
    const int64_t nf = ltn_conv_filter_elements(&s);
    float *filter = room((size_t)nf * 4);

    for (int t = 0; t < 6; t++) {
        void *x, *y;
        s.type = (enum ltn_conv_type)(t % 3);
        s.layout = t < 3 ? LTN_NCHW : LTN_NHWC;
        const size_t size = ltn_conv_type_size(s.type);
        const size_t y_bytes = (size_t)ltn_conv_y_elements(&s) * size + GUARD;
        conv_random(filter, nf, (uint64_t)layer);
        free(rounded(filter, nf, s.type));
        need(conv->ops->alloc(conv, &x, (size_t)ltn_conv_x_elements(&s) * size, &err));
        need(conv->ops->alloc(conv, &y, y_bytes, &err));
        need(conv->ops->normal(conv, x, s.type, ltn_conv_x_elements(&s), (uint64_t)(100 + t), &err));
        for (int algo = 0; algo < LTN_CONV_ALGOS; algo++) {
            double error = NAN;
            if (algo == LTN_CONV_CUDNN || (!all && algo != LTN_CONV_IM2WIN && algo != LTN_CONV_FUSED) ||
                !run(&s, (enum ltn_conv_algo)algo, y, y_bytes, x, filter, NULL))
                continue;
            need(conv->ops->rel_l2(conv, &error, &s, y, x, filter, NULL, 0, s.n, &err));
            judge(&s, (enum ltn_conv_algo)algo, error);
        }
        conv->ops->free(conv, x);
        conv->ops->free(conv, y);
    }
    free(filter);
}

/* An image whose window tensor is beyond what explicit im2win reaches with 32 bits. */
static void test_wide(void)
{
    const struct ltn_conv_shape s = {.n = 1,
                                     .ci = 1,
                                     .hi = 40000,
                                     .wi = 40000,
                                     .co = 1,
                                     .hf = 3,
                                     .wf = 1,
                                     .sh = 2,
                                     .sw = 1,
                                     .dh = 1,
                                     .dw = 1,
                                     .groups = 1};
    const float filter[3] = {0.5f, -1.25f, 2};
    const size_t x_bytes = (size_t)ltn_conv_x_elements(&s) * 4, y_bytes = (size_t)ltn_conv_y_elements(&s) * 4;
    void *x = NULL, *y = NULL, *workspace = NULL;
    struct ltn_conv2d *op = NULL;
    double error = NAN;

    need(ltn_conv2d_create(&op, conv, &s, LTN_CONV_IM2WIN, filter, NULL, &err));
    enum ltn_status status = conv->ops->alloc(conv, &x, x_bytes, &err);
    if (status == LTN_OK)
        status = conv->ops->alloc(conv, &y, y_bytes, &err);
    if (status == LTN_OK)
        status = conv->ops->alloc(conv, &workspace, ltn_conv2d_info(op)->workspace_bytes, &err);
    if (status == LTN_ERR_MEMORY) {
        printf("# an image of 2.4e9 elements: not run: %s\n", err.text);
    } else {
        need(status);
        need(conv->ops->normal(conv, x, LTN_CONV_F32, ltn_conv_x_elements(&s), 7, &err));
        need(conv->ops->fill(conv, y, 0xff, y_bytes, &err));
        need(ltn_conv2d_run(op, y, x, workspace, LTN_CONV_ALL, &err));
        need(conv->ops->rel_l2(conv, &error, &s, y, x, filter, NULL, 0, s.n, &err));
        judge(&s, LTN_CONV_IM2WIN, error);
        printf("# an image of 2.4e9 elements: relative error %.2g\n", error);
    }
    ltn_conv2d_free(op);
    conv->ops->free(conv, x);
    conv->ops->free(conv, y);
    conv->ops->free(conv, workspace);
}

int main(int argc, char **argv)
{
    const int shapes = argc > 1 ? atoi(argv[1]) : 600;
    const uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;

    need(ltn_conv_open(&conv, "cuda", 0, &err));
    printf("# %s, %s\n", conv->name, conv->driver);
    for (int i = 0; i < shapes; i++)
        test_shape(conv_random_shape(seed + (uint64_t)i, i % 10 == 9 ? 4e7 : 4e6), 1000 * seed + (uint64_t)i);
    for (int layer = 1; layer <= 12 && shapes >= 100; layer++)
        test_layer(layer, 3, true);
    for (int layer = 1; layer <= 12 && (shapes >= 500 || shapes == 0); layer++)
        test_layer(layer, 128, false);
    if (shapes >= 500 || shapes == 0)
        test_wide();
    for (int a = 0; a < LTN_CONV_ALGOS; a++)
        printf("# %-20s ran %d, not for %d; worst relative error f32 %.2g, tf32 %.2g, bf16 %.2g\n",
               ltn_conv_algo_name((enum ltn_conv_algo)a), ran[a], refused[a], worst[a][LTN_CONV_F32],
               worst[a][LTN_CONV_TF32], worst[a][LTN_CONV_BF16]);
    const bool hopper = strstr(conv->name, "H100") || strstr(conv->name, "H200");
    const bool each = ran[LTN_CONV_AUTO] && ran[LTN_CONV_IM2WIN] && ran[LTN_CONV_IM2COL] &&
                      ran[LTN_CONV_IM2COL_IMAGE] && ran[LTN_CONV_DIRECT] && ran[LTN_CONV_DIRECT_NAIVE] &&
                      (ran[LTN_CONV_FUSED] || !hopper);
    const bool all = each || shapes == 0;
    ltn_conv_close(conv);
    printf("%s 1 - %d random shapes%s\n1..1\n", failed || !all ? "not ok" : "ok", shapes,
           shapes >= 100 ? " and the twelve layers" : "");
    return failed || !all;
}
