/* ltn-bench conv: convolution by im2win and by what it is measured against, in the twelve layers of the paper
 * (kernels/conv/conv.h).
 *
 * A row is {layer, impl, variant, dtype, layout, channels, transform_us, kernel_us, total_us, tflops,
 * workspace_bytes, filter_bytes, rel_l2, samples}: impl is im2win, im2win-fused, im2col-cublas, direct or
 * cudnn, variant says which form or library algorithm; channels, how many the input has: more than the
 * layer's where it was padded with zeros beforehand, untimed, its copy counted in workspace_bytes;
 * transform_us, kernel_us and total_us medians of the two parts and of the whole (transform_us is 0 where
 * there is none), each run with the caches flushed before; tflops by the layer's own products; rel_l2 the
 * larger relative L2 error of the first and the last image against f64; samples the raw times of the whole.
 * Results also carry {libraries, images}. */
#include "src/bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/conv/conv.h"
#include "src/cli.h"

enum { LAYERS = 12, MOST_SAMPLES = 100 };

struct options {
    const char *device, *format;
    struct ltn_ints layers;
    struct ltn_strings impls;
    int64_t images, repetitions, threads;
    double seconds;
};

struct row {
    int layer;
    enum ltn_conv_algo algo;
    struct ltn_conv_shape shape; /* as it was run */
    struct ltn_conv2d_info info;
    size_t workspace_bytes;
    double transform_us, kernel_us, total_us, tflops, rel_l2;
    double samples[MOST_SAMPLES];
    int n_samples;
};

struct bench {
    const struct options *options;
    struct ltn_conv *conv;
    struct ltn_bench_head head;
    struct row *rows; /* [n_rows] */
    size_t n_rows;
};

/* What is measured, layer by layer; what a device or a build lacks is left out. */
static const struct {
    enum ltn_conv_algo algo;
    enum ltn_conv_type type;
    enum ltn_conv_layout layout;
    int channels; /* 0, or what the layer's are padded to where they are no multiple of it */
} cases[] = {
    {LTN_CONV_IM2WIN, LTN_CONV_F32, LTN_NCHW, 0},  {LTN_CONV_IM2WIN, LTN_CONV_F32, LTN_NHWC, 0},
    {LTN_CONV_FUSED, LTN_CONV_TF32, LTN_NCHW, 0},  {LTN_CONV_FUSED, LTN_CONV_TF32, LTN_NHWC, 0},
    {LTN_CONV_FUSED, LTN_CONV_BF16, LTN_NCHW, 0},  {LTN_CONV_FUSED, LTN_CONV_BF16, LTN_NHWC, 0},
    {LTN_CONV_IM2COL, LTN_CONV_F32, LTN_NCHW, 0},  {LTN_CONV_IM2COL, LTN_CONV_TF32, LTN_NCHW, 0},
    {LTN_CONV_IM2COL, LTN_CONV_BF16, LTN_NCHW, 0}, {LTN_CONV_IM2COL_IMAGE, LTN_CONV_F32, LTN_NCHW, 0},
    {LTN_CONV_DIRECT, LTN_CONV_F32, LTN_NCHW, 0},  {LTN_CONV_DIRECT_NAIVE, LTN_CONV_F32, LTN_NCHW, 0},
    {LTN_CONV_CUDNN, LTN_CONV_F32, LTN_NCHW, 0},   {LTN_CONV_CUDNN, LTN_CONV_F32, LTN_NHWC, 0},
    {LTN_CONV_CUDNN, LTN_CONV_TF32, LTN_NCHW, 0},  {LTN_CONV_CUDNN, LTN_CONV_TF32, LTN_NHWC, 0},
    {LTN_CONV_CUDNN, LTN_CONV_TF32, LTN_NHWC, 4},  {LTN_CONV_CUDNN, LTN_CONV_BF16, LTN_NCHW, 0},
    {LTN_CONV_CUDNN, LTN_CONV_BF16, LTN_NHWC, 0},  {LTN_CONV_CUDNN, LTN_CONV_BF16, LTN_NHWC, 4},
    {LTN_CONV_CUDNN, LTN_CONV_BF16, LTN_NHWC, 8},
};
enum { CASES = sizeof cases / sizeof *cases };

/* The algorithm's family, without its form. */
static const char *impl_name(enum ltn_conv_algo algo)
{
    return algo == LTN_CONV_IM2COL_IMAGE   ? ltn_conv_algo_name(LTN_CONV_IM2COL)
           : algo == LTN_CONV_DIRECT_NAIVE ? ltn_conv_algo_name(LTN_CONV_DIRECT)
                                           : ltn_conv_algo_name(algo);
}

/* ---- measuring ----------------------------------------------------------------------------------------- */

/* Samples of one part, as many as fit into the time for it; *us their median. */
static enum ltn_status measure(struct bench *b, struct ltn_conv2d *op, void *y, const void *x,
                               void *workspace, enum ltn_conv_part part, double *samples, int *n_samples,
                               double *us, struct ltn_error *err)
{
    struct ltn_bench_summary summary;
    double once;
    LTN_TRY(b->conv->ops->time(b->conv, op, y, x, workspace, part, 1, false, &once, err));
    if (once > 1e5) { /* a tenth of a second: one sample says it */
        *samples = *us = once;
        *n_samples = 1;
        return LTN_OK;
    }
    double fit = 1e6 * b->options->seconds / (once > 1 ? once : 1);
    const int most = (int)b->options->repetitions;
    *n_samples = fit >= most ? most : fit < 3 ? (most < 3 ? most : 3) : (int)fit;
    const bool recorded = once < 200; /* so that the host's launches do not show */
    LTN_TRY(b->conv->ops->time(b->conv, op, y, x, workspace, part, *n_samples, recorded, samples, err));
    LTN_TRY(ltn_bench_summarise(&summary, samples, (size_t)*n_samples, err));
    *us = summary.median;
    return LTN_OK;
}

struct memory {
    void *x, *y, *workspace;
    float *filter; /* host */
};

/* Runs into an output of NaN, judges it, and times it. */
static enum ltn_status fill_row(struct bench *b, struct row *row, struct memory *m, struct ltn_conv2d *op,
                                struct ltn_error *err)
{
    const struct ltn_conv_ops *ops = b->conv->ops;
    const struct ltn_conv_shape *s = &row->shape;
    const size_t y_bytes = (size_t)ltn_conv_y_elements(s) * ltn_conv_type_size(s->type);
    double scratch[MOST_SAMPLES], first, last;
    int n;

    LTN_TRY(ops->alloc(b->conv, &m->workspace, row->info.workspace_bytes, err));
    LTN_TRY(ops->fill(b->conv, m->y, 0xff, y_bytes, err));
    LTN_TRY(ltn_conv2d_run(op, m->y, m->x, m->workspace, LTN_CONV_ALL, err));
    LTN_TRY(ops->rel_l2(b->conv, &first, s, m->y, m->x, m->filter, NULL, 0, 1, err));
    LTN_TRY(ops->rel_l2(b->conv, &last, s, m->y, m->x, m->filter, NULL, s->n - 1, 1, err));
    row->rel_l2 = isnan(first) || first > last ? first : last;
    LTN_TRY(measure(b, op, m->y, m->x, m->workspace, LTN_CONV_ALL, row->samples, &row->n_samples,
                    &row->total_us, err));
    row->kernel_us = row->total_us;
    if (row->info.has_parts) {
        LTN_TRY(measure(b, op, m->y, m->x, m->workspace, LTN_CONV_TRANSFORM, scratch, &n, &row->transform_us,
                        err));
        LTN_TRY(measure(b, op, m->y, m->x, m->workspace, LTN_CONV_KERNEL, scratch, &n, &row->kernel_us, err));
    }
    return LTN_OK;
}

/* The layer's filter: normal, over the root of its window's size. */
static float *make_filter(const struct ltn_conv_shape *layer)
{
    const int64_t n = ltn_conv_filter_elements(layer);
    const double scale = 1 / sqrt((double)layer->ci * layer->hf * layer->wf);
    float *filter = malloc((size_t)n * sizeof *filter);
    if (filter)
        ltn_bench_noise(filter, LTN_F32, 0, n);
    for (int64_t i = 0; filter && i < n; i++)
        filter[i] *= (float)scale;
    return filter;
}

/* The same for a row: zeros for channels that pad; bf16 rounded, so that the error is the product's. */
static float *filter_for(const struct ltn_conv_shape *s, const struct ltn_conv_shape *layer,
                         const float *filter)
{
    float *out = calloc((size_t)ltn_conv_filter_elements(s), sizeof *out);
    const int64_t own = (int64_t)layer->ci * layer->hf * layer->wf, padded = (int64_t)s->ci * s->hf * s->wf;
    for (int64_t o = 0; out && o < s->co; o++)
        for (int64_t i = 0; i < own; i++) {
            const float value = filter[o * own + i];
            out[o * padded + i] = s->type == LTN_CONV_BF16 ? ltn_bf16_to_f32(ltn_f32_to_bf16(value)) : value;
        }
    return out;
}

static enum ltn_status run_case(struct bench *b, struct row *row, struct memory *m, struct ltn_conv2d **op,
                                const float *filter, struct ltn_error *err)
{
    const struct ltn_conv_ops *ops = b->conv->ops;
    const struct ltn_conv_shape *s = &row->shape;
    const struct ltn_conv_shape layer = ltn_conv_layer(row->layer, s->n);
    const size_t size = ltn_conv_type_size(s->type), x_bytes = (size_t)ltn_conv_x_elements(s) * size;

    m->filter = filter_for(s, &layer, filter);
    if (!m->filter)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for the filter of layer %d", row->layer);
    LTN_TRY(ltn_conv2d_create(op, b->conv, s, row->algo, m->filter, NULL, err));
    row->info = *ltn_conv2d_info(*op);
    row->workspace_bytes = row->info.workspace_bytes + (s->ci > layer.ci ? x_bytes : 0);
    LTN_TRY(ops->alloc(b->conv, &m->x, x_bytes, err));
    LTN_TRY(ops->alloc(b->conv, &m->y, (size_t)ltn_conv_y_elements(s) * size, err));
    LTN_TRY(ops->normal(b->conv, m->x, s->type, ltn_conv_x_elements(s), (uint64_t)row->layer, err));
    LTN_TRY(fill_row(b, row, m, *op, err));
    row->tflops = 1e-6 * ltn_conv_flop(&layer) / row->total_us;
    return LTN_OK;
}

static bool wanted(const struct options *o, enum ltn_conv_algo algo)
{
    bool found = o->impls.n == 0;
    for (size_t i = 0; i < o->impls.n; i++)
        found |= strcmp(o->impls.v[i], impl_name(algo)) == 0;
    return found;
}

static enum ltn_status run_cases(struct bench *b, int layer, const float *filter, struct ltn_error *err)
{
    for (int i = 0; i < CASES; i++) {
        struct row *row = &b->rows[b->n_rows];
        struct memory m = {0};
        struct ltn_conv2d *op = NULL;

        *row = (struct row){.layer = layer, .algo = cases[i].algo};
        row->shape = ltn_conv_layer(layer, (int32_t)b->options->images);
        row->shape.type = cases[i].type;
        row->shape.layout = cases[i].layout;
        if (!wanted(b->options, row->algo) || (cases[i].channels && row->shape.ci % cases[i].channels == 0))
            continue;
        if (cases[i].channels)
            row->shape.ci = (row->shape.ci + cases[i].channels - 1) / cases[i].channels * cases[i].channels;
        enum ltn_status status = run_case(b, row, &m, &op, filter, err);
        ltn_conv2d_free(op);
        b->conv->ops->free(b->conv, m.x);
        b->conv->ops->free(b->conv, m.y);
        b->conv->ops->free(b->conv, m.workspace);
        free(m.filter);
        if (status == LTN_OK)
            b->n_rows++;
        else if (status != LTN_ERR_UNSUPPORTED)
            return status;
        if (ltn_cli_interrupted())
            return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
    }
    return LTN_OK;
}

static enum ltn_status run_layer(struct bench *b, int layer, struct ltn_error *err)
{
    const struct ltn_conv_shape shape = ltn_conv_layer(layer, 1);
    float *filter = make_filter(&shape);
    enum ltn_status status =
        filter ? run_cases(b, layer, filter, err)
               : ltn_fail(err, LTN_ERR_MEMORY, "no memory for the filter of layer %d", layer);
    free(filter);
    return status;
}

/* ---- printing ------------------------------------------------------------------------------------------ */

static const char *layout_name(const struct row *r)
{
    return r->shape.layout == LTN_NCHW ? "NCHW" : "NHWC";
}

static enum ltn_status print_table(const struct bench *b, struct ltn_error *err)
{
    LTN_TRY(ltn_cli_printf(err, "%s%s%s\n\n%5s  %-14s %-5s %-6s %3s %13s %11s %11s %9s %14s %9s  %s\n",
                           b->head.device, *b->conv->driver ? "; " : "", b->conv->driver, "layer", "impl",
                           "dtype", "layout", "ch", "transform us", "kernel us", "total us", "TFLOP/s",
                           "workspace MiB", "rel. L2", "variant"));
    for (size_t i = 0; i < b->n_rows; i++) {
        const struct row *r = &b->rows[i];
        LTN_TRY(ltn_cli_printf(err, "%5d  %-14s %-5s %-6s %3d %13.1f %11.1f %11.1f %9.2f %14.1f %9.2g  %s\n",
                               r->layer, impl_name(r->algo), ltn_conv_type_name(r->shape.type),
                               layout_name(r), r->shape.ci, r->transform_us, r->kernel_us, r->total_us,
                               r->tflops, (double)r->workspace_bytes / (1 << 20), r->rel_l2,
                               r->info.variant));
    }
    return LTN_OK;
}

static enum ltn_status print_csv(const struct bench *b, struct ltn_error *err)
{
    LTN_TRY(ltn_cli_printf(err, "layer,impl,dtype,layout,channels,transform_us,kernel_us,total_us,tflops,"
                                "workspace_bytes,filter_bytes,rel_l2\n"));
    for (size_t i = 0; i < b->n_rows; i++) {
        const struct row *r = &b->rows[i];
        LTN_TRY(ltn_cli_printf(err, "%d,%s,%s,%s,%d,%.3f,%.3f,%.3f,%.4f,%zu,%zu,%.3g\n", r->layer,
                               impl_name(r->algo), ltn_conv_type_name(r->shape.type), layout_name(r),
                               r->shape.ci, r->transform_us, r->kernel_us, r->total_us, r->tflops,
                               r->workspace_bytes, r->info.filter_bytes, r->rel_l2));
    }
    return LTN_OK;
}

static enum ltn_status print_json(const struct bench *b, struct ltn_error *err)
{
    cJSON *json = ltn_bench_json(&b->head);
    cJSON_AddStringToObject(json, "libraries", b->conv->driver);
    cJSON_AddNumberToObject(json, "images", (double)b->options->images);
    cJSON *rows = cJSON_AddArrayToObject(json, "rows");
    for (size_t i = 0; i < b->n_rows; i++) {
        const struct row *r = &b->rows[i];
        cJSON *row = cJSON_CreateObject();
        cJSON_AddNumberToObject(row, "layer", r->layer);
        cJSON_AddStringToObject(row, "impl", impl_name(r->algo));
        cJSON_AddStringToObject(row, "variant", r->info.variant);
        cJSON_AddStringToObject(row, "dtype", ltn_conv_type_name(r->shape.type));
        cJSON_AddStringToObject(row, "layout", layout_name(r));
        cJSON_AddNumberToObject(row, "channels", r->shape.ci);
        cJSON_AddNumberToObject(row, "transform_us", r->transform_us);
        cJSON_AddNumberToObject(row, "kernel_us", r->kernel_us);
        cJSON_AddNumberToObject(row, "total_us", r->total_us);
        cJSON_AddNumberToObject(row, "tflops", r->tflops);
        cJSON_AddNumberToObject(row, "workspace_bytes", (double)r->workspace_bytes);
        cJSON_AddNumberToObject(row, "filter_bytes", (double)r->info.filter_bytes);
        ltn_bench_number(row, "rel_l2", r->rel_l2);
        cJSON_AddItemToObject(row, "samples", cJSON_CreateDoubleArray(r->samples, r->n_samples));
        cJSON_AddItemToArray(rows, row);
    }
    return ltn_bench_print(json, err);
}

/* ---- the command --------------------------------------------------------------------------------------- */

static enum ltn_status open_device(struct bench *b, struct ltn_error *err)
{
    const struct options *o = b->options;
    const bool is_auto = strcmp(o->device, "auto") == 0;
    struct ltn_error why;

    if (strcmp(o->device, "cpu") != 0) {
        enum ltn_status status = ltn_conv_open(&b->conv, is_auto ? "cuda" : o->device, 0, &why);
        if (status == LTN_OK)
            return LTN_OK;
        if (!is_auto)
            return ltn_fail(err, status, "%s", why.text);
        ltn_cli_note("using the CPU: %s", why.text);
    }
    return ltn_conv_open(&b->conv, "cpu", (int)o->threads, err);
}

static enum ltn_status run_all(void *bench, int argc, char **argv, struct ltn_error *err)
{
    struct bench *b = bench;
    const struct options *o = b->options;

    LTN_TRY(ltn_cli_write("", 0, err));
    LTN_TRY(open_device(b, err));
    ltn_bench_note(&b->head, argc, argv);
    snprintf(b->head.device, sizeof b->head.device, "%s", b->conv->name);
    LTN_TRY(b->conv->ops->peaks(b->conv, &b->head.bandwidth.read_gbps, &b->head.bandwidth.copy_gbps,
                                &b->head.gemm_tflops, err));
    if (b->head.bandwidth.copy_gbps == 0)
        b->head.bandwidth.copy_gbps = NAN; /* unknown */
    b->rows = calloc((size_t)CASES * o->layers.n, sizeof *b->rows);
    if (!b->rows)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for the rows");
    enum ltn_status status = LTN_OK;
    for (size_t i = 0; i < o->layers.n && status == LTN_OK; i++)
        status = run_layer(b, (int)o->layers.v[i], err);
    if (status != LTN_OK && status != LTN_ERR_STOPPED)
        return status;
    /* an interrupted run keeps the rows that it has */
    struct ltn_error printing;
    enum ltn_status printed = strcmp(o->format, "json") == 0  ? print_json(b, &printing)
                              : strcmp(o->format, "csv") == 0 ? print_csv(b, &printing)
                                                              : print_table(b, &printing);
    return printed != LTN_OK ? ltn_fail(err, printed, "%s", printing.text) : status;
}

/* -1, or the exit code after saying that a word names no implementation. */
static int check_impls(const struct options *o)
{
    for (size_t i = 0; i < o->impls.n; i++) {
        bool known = false;
        for (int c = 0; c < CASES; c++)
            known |= strcmp(o->impls.v[i], impl_name(cases[c].algo)) == 0;
        if (!known)
            return ltn_cli_bad_usage(
                "--impl: expected im2win, im2win-fused, im2col-cublas, direct or cudnn, found '%s'",
                o->impls.v[i]);
    }
    return -1;
}

static void end(void *bench)
{
    struct bench *b = bench;
    free(b->rows);
    ltn_conv_close(b->conv);
}

int ltn_bench_conv(int argc, char **argv)
{
    struct options o = {
        .device = "auto", .format = "table", .images = 128, .repetitions = 15, .seconds = 0.2};
    for (o.layers.n = 0; o.layers.n < LAYERS; o.layers.n++)
        o.layers.v[o.layers.n] = (int64_t)o.layers.n + 1;
    // clang-format off
    const struct ltn_flag flags[] = {
        {.letter = 'l', .name = "layers", .argument = "LAYERS", .kind = LTN_FLAG_INTS, .target = &o.layers, .min = 1, .max = LAYERS,
         .help = "which of the twelve layers"},
        {.letter = 'n', .name = "images", .argument = "N", .kind = LTN_FLAG_INT, .target = &o.images, .min = 1, .max = 65536,
         .help = "images in the batch"},
        {.name = "impl", .argument = "NAME", .kind = LTN_FLAG_STRINGS, .target = &o.impls,
         .help = "im2win, im2win-fused, im2col-cublas, direct or cudnn; may be repeated; without it all of them"},
        {.letter = 'r', .argument = "R", .kind = LTN_FLAG_INT, .target = &o.repetitions, .min = 1, .max = MOST_SAMPLES,
         .help = "repetitions of each measurement, after one that does not count; fewer, down to 1, where they take long"},
        {.name = "seconds", .argument = "S", .kind = LTN_FLAG_REAL, .target = &o.seconds, .min = 0, .max = 3600,
         .help = "time after which there are no more repetitions than 3"},
        {.name = "format", .argument = "FORMAT", .kind = LTN_FLAG_CHOICE, .target = &o.format,
         .choices = "table|csv|json", .help = "table, csv or json; json keeps every sample"},
        {.letter = 't', .argument = "THREADS", .kind = LTN_FLAG_INT, .target = &o.threads, .max = 1024,
         .help = "CPU threads; 0: one per core"},
        {.name = "device", .argument = "DEVICE", .kind = LTN_FLAG_DEVICE, .target = &o.device,
         .help = "auto, cpu, cuda or cuda:N; auto: CUDA where it works, else the CPU"},
    };
    // clang-format on
    const struct ltn_program program = {
        .name = "ltn-bench conv",
        .summary = "Measure convolution by im2win beside im2col, direct convolution and cuDNN.",
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
        .notes = "The layers are the twelve of the paper (arXiv 2306.14316). Times include the transform of "
                 "the input; "
                 "caches are flushed before each run on a GPU. cuDNN and cuBLAS are peers, measured where "
                 "they are "
                 "installed. The whole, with 128 images, wants 40 GB of device memory.\n\n"
                 "Exit status: 0 done, 1 failure, 2 wrong usage, 130 after Ctrl-C.",
    };
    struct bench b = {.options = &o};

    int code = ltn_cli_parse(&program, argc, argv, NULL);
    if (code < 0)
        code = check_impls(&o);
    return code >= 0 ? code : ltn_bench_go(run_all, end, &b, argc, argv);
}
