/* Im2win on the CPU, f32. One task is one row of outputs of one image and group: its strip of the input is
 * laid out in window order with the channels innermost, [Wp][hf][ci / groups], so that the window of output j
 * is one run that starts at j sw hf ci / groups; and the row is then one matrix product, whose left rows
 * overlap, by the same inner loops as a model's linear maps. Only the strips of the rows at work exist at any
 * time. */
#include "kernels/cpu/cpu.h"
#include "kernels/conv/random.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct cpu_conv {
    struct ltn_conv base;
    const struct micro *micro;
    struct pool *pool;
    int n_threads;
};

enum { SHORT = 512 }; /* products of a sum */

struct cpu_op {
    struct ltn_conv2d base;
    bool across;   /* vectors go across output channels */
    int runs;      /* 1, or with dilation across one for each column of the filter */
    int run;       /* elements of one: wf hf ci / groups, or hf ci / groups */
    float *filter; /* [groups][runs][co / groups][run], or across [groups][runs][run][co / groups] */
    float *bias;   /* [co] or NULL */
    size_t strip;  /* floats of one thread: its strip, then its outputs [wo][co / groups] */
    size_t scratch;
};

static struct cpu_conv *cpu_of(struct ltn_conv *conv)
{
    return (struct cpu_conv *)conv;
}

/* ---- the operator -------------------------------------------------------------------------------------- */

static void cpu_free_op(struct ltn_conv2d *op)
{
    struct cpu_op *o = (struct cpu_op *)op;
    free(o->filter);
    free(o->bias);
    free(o);
}

static void pack_filter(struct cpu_op *op, const float *filter)
{
    const struct ltn_conv_shape *s = &op->base.shape;
    const size_t cg = (size_t)(s->ci / s->groups), og = (size_t)(s->co / s->groups), run = (size_t)op->run;
    for (int32_t o = 0; o < s->co; o++)
        for (int32_t v = 0; v < s->wf; v++)
            for (int32_t u = 0; u < s->hf; u++)
                for (int32_t c = 0; c < (int32_t)cg; c++) {
                    const size_t at = ((size_t)v * (size_t)s->hf + (size_t)u) * cg + (size_t)c, k = at % run;
                    const size_t first = ((size_t)o / og * (size_t)op->runs + at / run) * run * og,
                                 in = (size_t)o % og;
                    op->filter[first + (op->across ? k * og + in : in * run + k)] =
                        filter[conv_filter_at(s, o, c, u, v)];
                }
}

static enum ltn_status cpu_create(struct ltn_conv2d **out, struct ltn_conv *conv,
                                  const struct ltn_conv_shape *s, enum ltn_conv_algo algo,
                                  const float *filter, const float *bias, struct ltn_error *err)
{
    const size_t elements = (size_t)ltn_conv_filter_elements(s);
    const int64_t column = (int64_t)s->hf * (s->ci / s->groups);

    if (s->type != LTN_CONV_F32 || (algo != LTN_CONV_AUTO && algo != LTN_CONV_IM2WIN))
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "convolution: the CPU has im2win in f32, not %s in %s",
                        ltn_conv_algo_name(algo), ltn_conv_type_name(s->type));
    if (column * s->wf > INT32_MAX)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "convolution: windows of 2^31 elements and more");
    struct cpu_op *op = calloc(1, sizeof *op);
    if (op) {
        op->base.conv = conv;
        op->base.shape = *s;
        op->runs = s->dw == 1 ? 1 : s->wf;
        op->run = (int)(s->dw == 1 ? column * s->wf : column);
        op->across = column * s->wf < SHORT;
        op->filter = aligned_alloc(64, (elements * sizeof(float) + 63) & ~(size_t)63);
        op->bias = bias ? malloc((size_t)s->co * sizeof(float)) : NULL;
    }
    if (!op || !op->filter || (bias && !op->bias)) {
        if (op)
            cpu_free_op(&op->base);
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory for a filter of %zu elements",
                        elements);
    }
    pack_filter(op, filter);
    if (bias)
        memcpy(op->bias, bias, (size_t)s->co * sizeof(float));
    op->strip = ((size_t)conv_wp(s) * (size_t)column + 15) & ~(size_t)15;
    op->scratch = op->strip + (((size_t)ltn_conv_wo(s) * (size_t)(s->co / s->groups) + 15) & ~(size_t)15);
    op->base.info = (struct ltn_conv2d_info){
        .algo = LTN_CONV_IM2WIN,
        .workspace_bytes = op->scratch * (size_t)cpu_of(conv)->n_threads * sizeof(float),
        .filter_bytes = elements * sizeof(float)};
    snprintf(op->base.info.variant, sizeof op->base.info.variant, "row by row, %s",
             cpu_of(conv)->micro->name);
    *out = &op->base;
    return LTN_OK;
}

/* strip[k][u][c] of image n, output row m, channels c0 .. c0 + cg - 1 */
static void lay_strip(float *strip, const struct ltn_conv_shape *s, const float *x, int n, int m, int c0,
                      int cg)
{
    const int wp = conv_wp(s);
    const size_t column = (size_t)s->hf * (size_t)cg;
    for (int u = 0; u < s->hf; u++) {
        const int64_t h = (int64_t)m * s->sh + (int64_t)u * s->dh - s->pt;
        float *to = strip + (size_t)u * (size_t)cg;
        const bool inside = h >= 0 && h < s->hi;
        for (int k = 0; k < wp; k++)
            if (!inside || k < s->pl || k >= s->pl + s->wi)
                memset(to + (size_t)k * column, 0, (size_t)cg * sizeof *to);
        if (!inside)
            continue;
        to += (size_t)s->pl * column;
        if (s->layout == LTN_NHWC) {
            const float *from = x + conv_x_at(s, n, c0, (int32_t)h, 0);
            for (int w = 0; w < s->wi; w++)
                memcpy(to + (size_t)w * column, from + (size_t)w * (size_t)s->ci, (size_t)cg * sizeof *to);
        } else {
            for (int c = 0; c < cg; c++) {
                const float *from = x + conv_x_at(s, n, c0 + c, (int32_t)h, 0);
                for (int w = 0; w < s->wi; w++)
                    to[(size_t)w * column + (size_t)c] = from[w];
            }
        }
    }
}

struct job {
    const struct cpu_op *op;
    float *y, *scratch;
    const float *x;
    int ho, wo;
};

static void row_task(void *ctx, int64_t task, int worker)
{
    const struct job *job = ctx;
    const struct cpu_op *op = job->op;
    const struct ltn_conv_shape *s = &op->base.shape;
    const int cg = s->ci / s->groups, og = s->co / s->groups, wo = job->wo;
    const int g = (int)(task % s->groups), m = (int)(task / s->groups % job->ho);
    const int n = (int)(task / s->groups / job->ho);
    const size_t column = (size_t)s->hf * (size_t)cg;
    const struct micro *micro = cpu_of(op->base.conv)->micro;
    const float *bias = op->bias ? op->bias + g * og : NULL;
    float *strip = job->scratch + (size_t)worker * op->scratch;
    const bool in_place = s->layout == LTN_NHWC;
    float *y = in_place ? job->y + conv_y_at(s, job->ho, wo, n, g * og, m, 0) : strip + op->strip;
    const size_t ldy = (size_t)(in_place ? s->co : og);

    lay_strip(strip, s, job->x, n, m, g * cg, cg);
    if (op->across) /* which adds to what is there */
        for (int j = 0; j < wo; j++)
            for (int o = 0; o < og; o++)
                y[(size_t)j * ldy + (size_t)o] = bias ? bias[o] : 0;
    for (int r = 0; r < op->runs; r++) {
        const float *w = op->filter + (size_t)(g * op->runs + r) * (size_t)og * (size_t)op->run;
        const float *windows = strip + (size_t)r * (size_t)s->dw * column;
        const size_t step = (size_t)s->sw * column;
        if (op->across)
            micro->outer(y, ldy, windows, step, 1, w, (size_t)og, wo, og, op->run, 0);
        else
            micro->dots[LTN_F32](y, ldy, windows, step, w, NULL, wo, og, op->run, r > 0,
                                 r == 0 ? bias : NULL);
    }
    if (s->relu)
        for (int j = 0; j < wo; j++)
            for (int o = 0; o < og; o++)
                if (y[(size_t)j * ldy + (size_t)o] < 0)
                    y[(size_t)j * ldy + (size_t)o] = 0;
    for (int o = 0; o < og && !in_place; o++) {
        float *to = job->y + conv_y_at(s, job->ho, wo, n, g * og + o, m, 0);
        for (int j = 0; j < wo; j++)
            to[j] = y[(size_t)j * ldy + (size_t)o];
    }
}

static enum ltn_status cpu_run(struct ltn_conv2d *base, void *y, const void *x, void *workspace,
                               enum ltn_conv_part part, struct ltn_error *err)
{
    struct cpu_op *op = (struct cpu_op *)base;
    const struct ltn_conv_shape *s = &base->shape;
    struct job job = {op, y, workspace, x, ltn_conv_ho(s), ltn_conv_wo(s)};
    (void)err;
    if (part != LTN_CONV_TRANSFORM) /* which here belongs to each row */
        pool_run(cpu_of(base->conv)->pool, (int64_t)s->n * job.ho * s->groups, row_task, &job);
    return LTN_OK;
}

/* ---- memory and measuring ------------------------------------------------------------------------------ */

static void cpu_close(struct ltn_conv *conv)
{
    pool_close(cpu_of(conv)->pool);
    free(conv);
}

static enum ltn_status cpu_alloc(struct ltn_conv *conv, void **out, size_t bytes, struct ltn_error *err)
{
    (void)conv;
    *out = bytes <= SIZE_MAX - 255 ? aligned_alloc(256, bytes ? (bytes + 255) & ~(size_t)255 : 256) : NULL;
    return *out ? LTN_OK : ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory for %zu bytes", bytes);
}

static void cpu_free(struct ltn_conv *conv, void *p)
{
    (void)conv;
    free(p);
}

static enum ltn_status cpu_copy_in(struct ltn_conv *conv, void *dst, const void *src, size_t bytes,
                                   struct ltn_error *err)
{
    (void)conv;
    (void)err;
    memcpy(dst, src, bytes);
    return LTN_OK;
}

static enum ltn_status cpu_fill(struct ltn_conv *conv, void *p, int byte, size_t bytes, struct ltn_error *err)
{
    (void)conv;
    (void)err;
    memset(p, byte, bytes);
    return LTN_OK;
}

static enum ltn_status cpu_normal(struct ltn_conv *conv, void *p, enum ltn_conv_type type, int64_t n,
                                  uint64_t seed, struct ltn_error *err)
{
    (void)conv;
    (void)err;
    for (int64_t i = 0; i < n; i++) {
        float value = conv_normal(seed, (uint64_t)i);
        if (type == LTN_CONV_BF16)
            ((uint16_t *)p)[i] = ltn_f32_to_bf16(value);
        else
            ((float *)p)[i] = value;
    }
    return LTN_OK;
}

static enum ltn_status cpu_rel_l2(struct ltn_conv *conv, double *out, const struct ltn_conv_shape *s,
                                  const void *y, const void *x, const float *filter, const float *bias,
                                  int32_t first, int32_t count, struct ltn_error *err)
{
    struct ltn_conv_shape part = *s;
    const size_t x_image = (size_t)(ltn_conv_x_elements(s) / s->n),
                 y_image = (size_t)(ltn_conv_y_elements(s) / s->n);
    double *exact = malloc((size_t)count * y_image * sizeof *exact), error = 0, norm = 0;
    (void)conv;
    if (!exact)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory for %d exact images", count);
    part.n = count;
    ltn_conv2d_reference(exact, &part, (const float *)x + (size_t)first * x_image, filter, bias);
    for (size_t i = 0; i < (size_t)count * y_image; i++) {
        double d = ((const float *)y)[(size_t)first * y_image + i] - exact[i];
        error += d * d;
        norm += exact[i] * exact[i];
    }
    free(exact);
    *out = error == 0 ? 0 : sqrt(error / norm);
    return LTN_OK;
}

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
}

/* Caches are left as they are: here they are part of a small convolution's speed in any use. */
static enum ltn_status cpu_time(struct ltn_conv *conv, struct ltn_conv2d *op, void *y, const void *x,
                                void *workspace, enum ltn_conv_part part, int n, bool recorded, double *us,
                                struct ltn_error *err)
{
    (void)conv;
    (void)recorded;
    LTN_TRY(cpu_run(op, y, x, workspace, part, err));
    for (int i = 0; i < n; i++) {
        double begin = now_us();
        LTN_TRY(cpu_run(op, y, x, workspace, part, err));
        us[i] = now_us() - begin;
    }
    return LTN_OK;
}

static enum ltn_status cpu_peaks(struct ltn_conv *conv, double *read_gbps, double *copy_gbps,
                                 double *gemm_tflops, struct ltn_error *err)
{
    (void)conv;
    (void)err;
    *read_gbps = *copy_gbps = *gemm_tflops = 0;
    return LTN_OK;
}

static const struct ltn_conv_ops cpu_ops = {
    .close = cpu_close,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .upload = cpu_copy_in,
    .download = cpu_copy_in,
    .fill = cpu_fill,
    .normal = cpu_normal,
    .rel_l2 = cpu_rel_l2,
    .time = cpu_time,
    .peaks = cpu_peaks,
    .create = cpu_create,
    .free_op = cpu_free_op,
    .run = cpu_run,
};

enum ltn_status ltn_conv_cpu_open(struct ltn_conv **out, int n_threads, struct ltn_error *err)
{
    static const struct micro *const micros[] = {&ltn_micro_portable, &ltn_micro_avx2, &ltn_micro_avx512,
                                                 &ltn_micro_vnni};
    struct cpu_conv *cpu = calloc(1, sizeof *cpu);
    cpu_set_t set;

    *out = NULL;
    if (!cpu)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no host memory");
    if (n_threads < 1)
        n_threads = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    cpu->base.ops = &cpu_ops;
    cpu->micro = micros[ltn_cpu_best_isa()];
    cpu->n_threads = n_threads;
    enum ltn_status status = pool_open(&cpu->pool, n_threads, err);
    if (status != LTN_OK) {
        free(cpu);
        return status;
    }
    snprintf(cpu->base.name, sizeof cpu->base.name, "CPU, %d thread%s, %s", n_threads,
             n_threads > 1 ? "s" : "", cpu->micro->name);
    *out = &cpu->base;
    return LTN_OK;
}
