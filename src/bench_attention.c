/* ltn-bench attention: the lightning attention of one layer by itself, through the backend's table.
 *
 * Speed: one sequence of n rows, q, k and v side by side as a layer's projection leaves them. The calls go
 * over inputs that together exceed any cache, recorded and replayed where the backend can; a sample is one
 * such replay's time over its calls. The floor is that of memory: q, k and v read and o written once, over
 * the speed of a copy measured in this very run. Operations are counted as chunks of 64 rows need them: 4
 * multiplications and additions per row and state element (into the state, and out of it), 2 * 64 * (d + e)
 * inside the chunk.
 *
 * Error: relative L2 distance of outputs and of the final state from a recurrence in f64 on the same rounded
 * inputs, for the slopes of a model's first and of its last layer.
 *
 * Results also carry {backend, threads}. A row is {impl, h, d, n, dtype, layer, lrpe, ms, share, gbps,
 * tflops, rel_l2, state_rel_l2, samples_ms}; ms is the median, and null where the row is one of errors;
 * rel_l2 is null where the row is one of times. d: features of a head, before LRPE doubles those of q and k.
 */
#include "src/bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/pool.h"
#include "model/config.h"
#include "src/cli.h"
#include "src/engine.h"

static const size_t span = (size_t)320 << 20; /* bytes of inputs and outputs that the calls go over */

struct options {
    const char *device, *format, *layer, *dtype;
    struct ltn_ints heads, lengths, checks;
    int64_t head_dim, repetitions, threads;
    bool lrpe;
};

struct row {
    int32_t heads;
    int64_t n;
    bool last_layer;
    double *samples; /* [repetitions] seconds; NULL: a row of errors */
    struct ltn_bench_summary seconds;
    double share, gbps, tflops, error, state_error; /* NaN: not measured */
};

struct bench {
    const struct options *options;
    struct ltn_backend *be;
    struct pool *pool;
    int n_threads;
    struct ltn_bench_head head;
    struct row *rows; /* [n_rows] */
    size_t n_rows;
};

/* One layer's call and all it needs. */
struct layer {
    struct ltn_attention a;
    int32_t d; /* rows of a head's state */
    int32_t width, ld;
    size_t size;      /* bytes of an element of act_dtype */
    float *constants; /* backend: slopes, then theta */
    float *state;     /* backend [heads, d, e] */
    size_t state_bytes;
    float slopes[LTN_MAX_HEADS];
    float *theta; /* host [heads, e], or NULL */
};

static void layer_free(struct layer *l, struct ltn_backend *be)
{
    be->ops->free(be, l->constants);
    be->ops->free(be, l->state);
    free(l->theta);
}

/* n: rows of its calls, at most */
static enum ltn_status layer_make(struct layer *l, const struct bench *b, int32_t heads, bool last, int64_t n,
                                  struct ltn_error *err)
{
    const int32_t e = (int32_t)b->options->head_dim;
    struct ltn_backend *be = b->be;

    *l = (struct layer){.d = b->options->lrpe ? 2 * e : e,
                        .width = heads * e,
                        .ld = 3 * heads * e,
                        .size = ltn_dtype_size(be->act_dtype)};
    l->state_bytes = sizeof(float) * (size_t)l->width * (size_t)l->d;
    ltn_slopes(l->slopes, heads, last, 2);
    LTN_TRY(be->ops->alloc(be, (void **)&l->state, l->state_bytes, err));
    LTN_TRY(be->ops->alloc(be, (void **)&l->constants, sizeof(float) * (size_t)(heads + l->width), err));
    LTN_TRY(be->ops->zero(be, l->state, l->state_bytes, err));
    LTN_TRY(be->ops->upload(be, l->constants, l->slopes, sizeof(float) * (size_t)heads, err));
    l->a = (struct ltn_attention){.n_heads = heads, .head_dim = e, .slopes = l->constants};
    if (b->options->lrpe)
        l->a.theta = l->constants + heads;
    const struct ltn_layer layer = {.attention = l->a};
    const struct ltn_network net = {.n_layers = 1, .layers = &layer};
    if (be->ops->reserve)
        LTN_TRY(be->ops->reserve(be, &net, (int32_t)n, 0, err));
    if (!b->options->lrpe)
        return LTN_OK;
    l->theta = malloc(sizeof(float) * (size_t)l->width);
    if (!l->theta)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %d angles", l->width);
    for (int32_t i = 0; i < l->width; i++)
        l->theta[i] = (float)pow(10000, -2.0 * i / l->width);
    return be->ops->upload(be, l->constants + heads, l->theta, sizeof(float) * (size_t)l->width, err);
}

static enum ltn_status attend(const struct bench *b, const struct layer *l, uint8_t *o, const uint8_t *qkv,
                              int64_t n, struct ltn_error *err)
{
    const struct ltn_seq seq = {l->state, 0, 0, (int32_t)n};
    const size_t part = (size_t)l->width * l->size;
    return b->be->ops->lightning(b->be, o, qkv, qkv + part, qkv + 2 * part, l->ld, &l->a, &seq, 1, err);
}

/* ---- noise --------------------------------------------------------------------------------------------- */

struct noise {
    void *to;
    enum ltn_dtype dtype;
    int64_t n; /* elements */
};
enum { NOISE_TASK = 1 << 16 };

static void make_noise(void *ctx, int64_t task, int worker)
{
    const struct noise *noise = ctx;
    const int64_t begin = task * NOISE_TASK, rest = noise->n - begin;
    (void)worker;
    ltn_bench_noise(noise->to, noise->dtype, begin, rest < NOISE_TASK ? rest : NOISE_TASK);
}

/* ---- speed --------------------------------------------------------------------------------------------- */

struct rotation {
    uint8_t *qkv, *o; /* backend: [sets, n, 3 width], [sets, n, width] */
    int64_t sets, calls;
    int64_t *steps; /* backend: 0 */
    struct ltn_recording *recording;
};

static enum ltn_status issue(const struct bench *b, const struct layer *l, const struct rotation *r,
                             int64_t n, int64_t calls, struct ltn_error *err)
{
    const size_t rows = (size_t)n * (size_t)l->width * l->size;
    for (int64_t i = 0; i < calls; i++) {
        const size_t set = (size_t)(i % r->sets);
        LTN_TRY(attend(b, l, r->o + set * rows, r->qkv + set * 3 * rows, n, err));
    }
    return LTN_OK;
}

/* Seconds of one call */
static enum ltn_status time_calls(const struct bench *b, const struct layer *l, const struct rotation *r,
                                  int64_t n, double *seconds, struct ltn_error *err)
{
    LTN_TRY(b->be->ops->sync(b->be, err));
    double begin = ltn_bench_now();
    if (r->recording)
        LTN_TRY(b->be->ops->replay(b->be, r->recording, err));
    else
        LTN_TRY(issue(b, l, r, n, r->calls, err));
    LTN_TRY(b->be->ops->sync(b->be, err));
    *seconds = (ltn_bench_now() - begin) / (double)r->calls;
    return LTN_OK;
}

static enum ltn_status record(const struct bench *b, const struct layer *l, struct rotation *r, int64_t n,
                              struct ltn_error *err)
{
    struct ltn_error late;
    LTN_TRY(b->be->ops->record(b->be, r->steps, err));
    enum ltn_status status = issue(b, l, r, n, r->calls, err);
    enum ltn_status ended = b->be->ops->recorded(b->be, &r->recording, status == LTN_OK ? err : &late);
    return status != LTN_OK ? status : ended;
}

static enum ltn_status sample(const struct bench *b, const struct layer *l, struct rotation *r,
                              struct row *row, struct ltn_error *err)
{
    const size_t bytes = (size_t)row->n * (size_t)l->width * l->size;
    const double long_enough = 2e-3; /* for a replay, so that its start and end are lost in it */
    double seconds;

    r->sets = (int64_t)(span / (4 * bytes)) + 1;
    LTN_TRY(b->be->ops->alloc(b->be, (void **)&r->qkv, 3 * bytes * (size_t)r->sets, err));
    LTN_TRY(b->be->ops->alloc(b->be, (void **)&r->o, bytes * (size_t)r->sets, err));
    LTN_TRY(ltn_bench_fill(b->be, b->be->act_dtype, r->qkv, 3 * bytes * (size_t)r->sets, err));
    r->calls = r->sets;
    for (int i = 0; i < 2; i++) /* warms up */
        LTN_TRY(time_calls(b, l, r, row->n, &seconds, err));
    while ((double)r->calls * seconds < long_enough)
        r->calls += r->sets;
    if (b->be->ops->record) {
        LTN_TRY(b->be->ops->alloc(b->be, (void **)&r->steps, sizeof *r->steps, err));
        LTN_TRY(b->be->ops->zero(b->be, r->steps, sizeof *r->steps, err));
        LTN_TRY(record(b, l, r, row->n, err));
    }
    for (int64_t i = -1; i < b->options->repetitions; i++) {
        LTN_TRY(time_calls(b, l, r, row->n, &seconds, err));
        if (i >= 0)
            row->samples[i] = seconds;
        if (ltn_cli_interrupted())
            return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
    }
    return LTN_OK;
}

static enum ltn_status measure_speed(struct bench *b, int32_t heads, int64_t n, struct ltn_error *err)
{
    struct row *row = &b->rows[b->n_rows++];
    struct layer l;
    struct rotation r = {0};
    struct ltn_backend *be = b->be;

    *row = (struct row){.heads = heads,
                        .n = n,
                        .last_layer = strcmp(b->options->layer, "last") == 0,
                        .error = NAN,
                        .state_error = NAN};
    row->samples = malloc((size_t)b->options->repetitions * sizeof *row->samples);
    if (!row->samples)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %lld samples",
                        (long long)b->options->repetitions);
    enum ltn_status status = layer_make(&l, b, heads, row->last_layer, n, err);
    if (status == LTN_OK)
        status = sample(b, &l, &r, row, err);
    if (be->ops->recording_free)
        be->ops->recording_free(be, r.recording);
    be->ops->free(be, r.qkv);
    be->ops->free(be, r.o);
    be->ops->free(be, r.steps);
    layer_free(&l, be);
    LTN_TRY(status);

    LTN_TRY(ltn_bench_summarise(&row->seconds, row->samples, (size_t)b->options->repetitions, err));
    const double elements = (double)n * l.width; /* of q, k, v and o each */
    row->gbps = 1e-9 * 4 * (double)l.size * elements / row->seconds.median;
    row->share = row->gbps / b->head.bandwidth.copy_gbps;
    row->tflops = 1e-12 * elements * (4.0 * l.d + 2 * 64 * (1 + (double)l.d / (double)l.a.head_dim)) /
                  row->seconds.median;
    return LTN_OK;
}

/* ---- error --------------------------------------------------------------------------------------------- */

/* The oracle: S <- exp(-s) S + k^T v, o = q S, in f64, a head per task. */
struct oracle {
    const struct layer *l;
    const uint8_t *qkv, *o; /* [n, 3 width], [n, width] of `dtype`: what the backend read and wrote */
    const float *state;     /* [heads, d, e]: where it ended */
    enum ltn_dtype dtype;
    int64_t n;
    double *scratch; /* [heads][d e + 3 d + e] */
    double (
        *squares)[4]; /* [heads]: of o's difference and of o, of the state's difference and of the state */
};

static void check_head(void *ctx, int64_t head, int worker)
{
    const struct oracle *c = ctx;
    const int32_t e = c->l->a.head_dim, d = c->l->d;
    double *s = c->scratch + (size_t)head * (size_t)(d * e + 2 * d + 2 * e), *q = s + (size_t)d * (size_t)e;
    double *k = q + d, *v = k + d, *o = v + e, *squares = c->squares[head];
    const double keep = exp(-(double)c->l->slopes[head]);

    (void)worker;
    memset(s, 0, sizeof *s * (size_t)d * (size_t)e);
    for (int64_t t = 0; t < c->n; t++) {
        const size_t at = (size_t)t * (size_t)c->l->ld + (size_t)head * (size_t)e,
                     width = (size_t)c->l->width;
        for (int32_t i = 0; i < e; i++) {
            q[i] = ltn_load(c->qkv, c->dtype, at + (size_t)i);
            k[i] = ltn_load(c->qkv, c->dtype, at + width + (size_t)i);
            v[i] = ltn_load(c->qkv, c->dtype, at + 2 * width + (size_t)i);
            o[i] = 0;
        }
        for (int32_t i = 0; i < e && c->l->theta; i++) {
            const double angle = (double)c->l->theta[head * e + i] * (double)t;
            q[e + i] = q[i] * sin(angle), k[e + i] = k[i] * sin(angle);
            q[i] *= cos(angle), k[i] *= cos(angle);
        }
        for (int32_t i = 0; i < d; i++)
            for (int32_t j = 0; j < e; j++) {
                s[i * e + j] = keep * s[i * e + j] + k[i] * v[j];
                o[j] += q[i] * s[i * e + j];
            }
        for (int32_t j = 0; j < e; j++) {
            const double x = ltn_load(c->o, c->dtype, (size_t)t * width + (size_t)(head * e + j)) - o[j];
            squares[0] += x * x;
            squares[1] += o[j] * o[j];
        }
    }
    for (int64_t i = 0; i < (int64_t)d * e; i++) {
        const double x = c->state[head * d * e + i] - s[i];
        squares[2] += x * x;
        squares[3] += s[i] * s[i];
    }
}

struct check {
    uint8_t *qkv, *o;               /* host */
    uint8_t *device_qkv, *device_o; /* backend */
    float *state;                   /* host */
    double *scratch;
    double (*squares)[4];
};

static enum ltn_status run_check(const struct bench *b, const struct layer *l, struct check *c,
                                 struct row *row, struct ltn_error *err)
{
    struct ltn_backend *be = b->be;
    const size_t heads = (size_t)l->a.n_heads, bytes = (size_t)row->n * (size_t)l->width * l->size;
    const size_t scratch = heads * (size_t)(l->d * l->a.head_dim + 2 * l->d + 2 * l->a.head_dim);
    double sums[4] = {0};

    struct noise noise = {malloc(3 * bytes), be->act_dtype, (int64_t)(3 * bytes / l->size)};
    c->qkv = noise.to;
    c->o = malloc(bytes);
    c->state = malloc(l->state_bytes);
    c->scratch = malloc(scratch * sizeof *c->scratch);
    c->squares = calloc(heads, sizeof *c->squares);
    if (!c->qkv || !c->o || !c->state || !c->scratch || !c->squares)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory to check %lld rows", (long long)row->n);
    pool_run(b->pool, (noise.n + NOISE_TASK - 1) / NOISE_TASK, make_noise, &noise);
    LTN_TRY(be->ops->alloc(be, (void **)&c->device_qkv, 3 * bytes, err));
    LTN_TRY(be->ops->alloc(be, (void **)&c->device_o, bytes, err));
    LTN_TRY(be->ops->upload(be, c->device_qkv, c->qkv, 3 * bytes, err));
    LTN_TRY(attend(b, l, c->device_o, c->device_qkv, row->n, err));
    LTN_TRY(be->ops->download(be, c->o, c->device_o, bytes, err));
    LTN_TRY(be->ops->download(be, c->state, l->state, l->state_bytes, err));
    struct oracle oracle = {l, c->qkv, c->o, c->state, be->act_dtype, row->n, c->scratch, c->squares};
    pool_run(b->pool, l->a.n_heads, check_head, &oracle);
    for (size_t i = 0; i < heads; i++)
        for (int j = 0; j < 4; j++)
            sums[j] += c->squares[i][j];
    row->error = sqrt(sums[0] / sums[1]);
    row->state_error = sqrt(sums[2] / sums[3]);
    return LTN_OK;
}

static enum ltn_status measure_error(struct bench *b, int32_t heads, int64_t n, bool last_layer,
                                     struct ltn_error *err)
{
    struct row *row = &b->rows[b->n_rows++];
    struct layer l;
    struct check c = {0};

    *row = (struct row){.heads = heads, .n = n, .last_layer = last_layer};
    row->seconds.median = row->share = row->gbps = row->tflops = NAN;
    enum ltn_status status = layer_make(&l, b, heads, last_layer, n, err);
    if (status == LTN_OK)
        status = run_check(b, &l, &c, row, err);
    b->be->ops->free(b->be, c.device_qkv);
    b->be->ops->free(b->be, c.device_o);
    free(c.qkv), free(c.o), free(c.state), free(c.scratch), free(c.squares);
    layer_free(&l, b->be);
    if (status == LTN_OK && ltn_cli_interrupted())
        return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
    return status;
}

/* ---- printing ------------------------------------------------------------------------------------------ */

static enum ltn_status print_table(const struct bench *b, struct ltn_error *err)
{
    LTN_TRY(ltn_cli_printf(err,
                           "%s, %s, d = %lld%s; copy measured here: %.1f GB/s\n\n"
                           "%5s %9s %6s %11s %9s %7s %8s %10s %10s\n",
                           b->head.device, ltn_dtype_name(b->be->act_dtype), (long long)b->options->head_dim,
                           b->options->lrpe ? " with LRPE" : "", b->head.bandwidth.copy_gbps, "heads", "rows",
                           "layer", "ms", "GB/s", "share", "TFLOP/s", "error", "of state"));
    for (size_t i = 0; i < b->n_rows; i++) {
        const struct row *r = &b->rows[i];
        LTN_TRY(ltn_cli_printf(err, "%5d %9lld %6s ", r->heads, (long long)r->n,
                               r->last_layer ? "last" : "first"));
        LTN_TRY(r->samples
                    ? ltn_cli_printf(err, "%11.4f %9.1f %5.1f %% %8.2f %10s %10s\n", 1e3 * r->seconds.median,
                                     r->gbps, 100 * r->share, r->tflops, "-", "-")
                    : ltn_cli_printf(err, "%11s %9s %7s %8s %10.2e %10.2e\n", "-", "-", "-", "-", r->error,
                                     r->state_error));
    }
    return LTN_OK;
}

static cJSON *row_json(const struct bench *b, const struct row *r)
{
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "impl", "ltn");
    cJSON_AddNumberToObject(json, "h", r->heads);
    cJSON_AddNumberToObject(json, "d", (double)b->options->head_dim);
    cJSON_AddNumberToObject(json, "n", (double)r->n);
    cJSON_AddStringToObject(json, "dtype", ltn_dtype_name(b->be->act_dtype));
    cJSON_AddStringToObject(json, "layer", r->last_layer ? "last" : "first");
    cJSON_AddBoolToObject(json, "lrpe", b->options->lrpe);
    ltn_bench_number(json, "ms", 1e3 * r->seconds.median);
    ltn_bench_number(json, "share", r->share);
    ltn_bench_number(json, "gbps", r->gbps);
    ltn_bench_number(json, "tflops", r->tflops);
    ltn_bench_number(json, "rel_l2", r->error);
    ltn_bench_number(json, "state_rel_l2", r->state_error);
    cJSON *samples = cJSON_AddArrayToObject(json, "samples_ms");
    for (int64_t i = 0; r->samples && i < b->options->repetitions; i++)
        cJSON_AddItemToArray(samples, cJSON_CreateNumber(1e3 * r->samples[i]));
    return json;
}

static enum ltn_status print_json(const struct bench *b, struct ltn_error *err)
{
    cJSON *json = ltn_bench_json(&b->head);
    cJSON_AddStringToObject(json, "backend", b->be->name);
    cJSON_AddNumberToObject(json, "threads", b->be->host_memory ? b->n_threads : 0);
    cJSON *rows = cJSON_AddArrayToObject(json, "rows");
    for (size_t i = 0; i < b->n_rows; i++)
        cJSON_AddItemToArray(rows, row_json(b, &b->rows[i]));
    return ltn_bench_print(json, err);
}

/* ---- the command --------------------------------------------------------------------------------------- */

static enum ltn_status run_all(void *bench, int argc, char **argv, struct ltn_error *err)
{
    struct bench *b = bench;
    const struct options *o = b->options;
    const size_t most = o->heads.n * (o->lengths.n + 2 * o->checks.n);
    char notice[512];

    LTN_TRY(ltn_cli_write("", 0, err));
    b->n_threads = o->threads > 0 ? (int)o->threads : ltn_bench_cores();
    LTN_TRY(pool_open(&b->pool, b->n_threads, err));
    LTN_TRY(ltn_backend_open(&b->be, o->device, strcmp(o->dtype, "f32") == 0 ? LTN_F32 : LTN_BF16,
                             b->n_threads, &notice, err));
    if (*notice)
        ltn_cli_note("%s", notice);
    LTN_TRY(ltn_bench_begin(&b->head, b->be, b->n_threads, argc, argv, err));
    b->rows = calloc(most, sizeof *b->rows);
    if (!b->rows)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %zu rows", most);
    for (size_t i = 0; i < o->heads.n; i++) {
        for (size_t j = 0; j < 2 * o->checks.n; j++)
            LTN_TRY(measure_error(b, (int32_t)o->heads.v[i], o->checks.v[j / 2], j % 2, err));
        for (size_t j = 0; j < o->lengths.n; j++)
            LTN_TRY(measure_speed(b, (int32_t)o->heads.v[i], o->lengths.v[j], err));
    }
    return strcmp(o->format, "json") == 0 ? print_json(b, err) : print_table(b, err);
}

static void end(void *bench)
{
    struct bench *b = bench;
    for (size_t i = 0; i < b->n_rows; i++)
        free(b->rows[i].samples);
    free(b->rows);
    if (b->be)
        b->be->ops->close(b->be);
    pool_close(b->pool);
}

int ltn_bench_attention(int argc, char **argv)
{
    struct options o = {.device = "auto",
                        .format = "table",
                        .layer = "last",
                        .dtype = "bf16",
                        .heads = {{8}, 1},
                        .lengths = {{512, 2048, 8192}, 3},
                        .checks = {{2048}, 1},
                        .head_dim = 128,
                        .repetitions = 10};
    // clang-format off
    const struct ltn_flag flags[] = {
        {.name = "heads", .argument = "HEADS", .kind = LTN_FLAG_INTS, .target = &o.heads, .min = 1,
         .max = LTN_MAX_HEADS, .help = "heads of the layer"},
        {.name = "head-dim", .argument = "E", .kind = LTN_FLAG_INT, .target = &o.head_dim, .min = 1, .max = 1024,
         .help = "features of a head"},
        {.name = "lrpe", .kind = LTN_FLAG_SWITCH, .target = &o.lrpe,
         .help = "turn q and k by LRPE, as a model's first layer does"},
        {.letter = 'l', .argument = "LENGTHS", .kind = LTN_FLAG_INTS, .target = &o.lengths, .min = 1, .max = 1e8,
         .help = "rows of a call to time"},
        {.name = "layer", .argument = "LAYER", .kind = LTN_FLAG_CHOICE, .target = &o.layer, .choices = "first|last",
         .help = "the layer whose slopes the timed calls have: first, which forgets fast, or last"},
        {.name = "check", .argument = "LENGTHS", .kind = LTN_FLAG_INTS, .target = &o.checks, .min = 1, .max = 1e8,
         .help = "rows of a call to hold against a recurrence in f64, with the slopes of either layer"},
        {.letter = 'r', .argument = "R", .kind = LTN_FLAG_INT, .target = &o.repetitions, .min = 1, .max = 1e6,
         .help = "samples of each time, after one that does not count"},
        {.name = "dtype", .argument = "DTYPE", .kind = LTN_FLAG_CHOICE, .target = &o.dtype, .choices = "bf16|f32",
         .help = "bf16 or f32, that of the weights whose activations these would be; the CPU's are f32 anyway"},
        {.name = "format", .argument = "FORMAT", .kind = LTN_FLAG_CHOICE, .target = &o.format,
         .choices = "table|json", .help = "table or json; json keeps every sample"},
        {.letter = 't', .argument = "THREADS", .kind = LTN_FLAG_INT, .target = &o.threads, .max = 1024,
         .help = "CPU threads; 0: one per core"},
        {.name = "device", .argument = "DEVICE", .kind = LTN_FLAG_DEVICE, .target = &o.device,
         .help = "auto, cpu, cuda or cuda:N; auto: CUDA where it works, else the CPU"},
    };
    // clang-format on
    const struct ltn_program program = {
        .name = "ltn-bench attention",
        .summary = "Measure the lightning attention of one layer: its speed and its error.",
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
        .notes =
            "The share is that of the speed of a copy, measured in the same run, at which q, k and v are "
            "read and the outputs written once. The error is the relative L2 distance from f64.\n\n"
            "Exit status: 0 done, 1 failure, 2 wrong usage, 130 after Ctrl-C.",
    };
    struct bench b = {.options = &o};

    int code = ltn_cli_parse(&program, argc, argv, NULL);
    return code >= 0 ? code : ltn_bench_go(run_all, end, &b, argc, argv);
}
