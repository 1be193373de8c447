/* ltn-bench decode: how fast models in the released shapes write, one stream or many at once.
 *
 * Weights are random and made on the device. A step takes one token of each of `batch` streams through the
 * model, chooses the likeliest next ones, and so on without the host; where the backend does not record, the
 * host chooses. What a step cannot do without is that every matrix is read once, and every stream's state
 * read and written once: that over its time is GB/s, and share is GB/s over the read bandwidth measured in
 * the same run. The positions of a batch take turns, so that all see the same clocks and the same heat.
 *
 * Results also carry {backend, threads}. A row is {impl, model, dtype, batch, position, tok_s, gbps, share,
 * weight_bytes, state_bytes, samples}: tok_s the median of the samples, in tokens/s of all streams together;
 * weight_bytes: read by a step; state_bytes: of one stream.
 */
#include "src/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/cli.h"
#include "src/engine.h"
#include "src/sampling.h"

enum { MOST_STEPS = 4096, WARM_UP = 8 };

struct options {
    const char *device, *format, *shape, *dtype;
    struct ltn_ints batches, positions;
    int64_t repetitions, threads;
    double seconds;
    bool random;
};

struct row {
    const char *model;
    int32_t batch;
    int64_t position;
    double *samples; /* [repetitions] tokens/s */
    double tok_s, gbps, share, weight_bytes, state_bytes;
};

struct bench {
    const struct options *options;
    struct ltn_backend *be;
    int n_threads;
    struct ltn_bench_head head;
    struct row *rows; /* [n_rows] */
    size_t n_rows;
};

/* One model with one number of streams. */
struct streams {
    struct ltn_model *model;
    struct ltn_workspace ws;
    struct ltn_stepper stepper; /* none where the backend does not record */
    float *states;
    struct ltn_sampler sampler; /* of the host; none where there is a stepper */
    float *logits;              /* host, [batch, V]; NULL where they are read in the workspace */
    struct ltn_seq *seqs;
    int32_t *ids, *out; /* host: [batch]; [MOST_STEPS, batch] */
    int32_t batch;
    size_t state_bytes;
};

/* ---- the streams --------------------------------------------------------------------------------------- */

static enum ltn_status streams_open(struct streams *s, struct ltn_model *model, int32_t batch,
                                    struct ltn_error *err)
{
    struct ltn_backend *be = model->be;
    const struct ltn_config *c = &model->config;
    const size_t n = (size_t)batch, floats = ltn_state_offset(c, c->n_layers);

    *s = (struct streams){.model = model, .batch = batch, .state_bytes = floats * sizeof(float)};
    s->seqs = calloc(n, sizeof *s->seqs);
    s->ids = calloc(n, sizeof *s->ids);
    s->out = malloc(MOST_STEPS * n * sizeof *s->out);
    if (!be->host_memory)
        s->logits = malloc(n * (size_t)c->vocab_size * sizeof *s->logits);
    if (!s->seqs || !s->ids || !s->out || (!be->host_memory && !s->logits))
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %d streams", batch);
    LTN_TRY(ltn_workspace_create(&s->ws, model, batch, batch, err));
    LTN_TRY(be->ops->alloc(be, (void **)&s->states, n * s->state_bytes, err));
    for (int32_t i = 0; i < batch; i++)
        s->seqs[i] = (struct ltn_seq){s->states + floats * (size_t)i, 0, i, 1};
    return ltn_stepper_possible(be)
               ? ltn_stepper_create(&s->stepper, model, &s->ws, s->seqs, batch, MOST_STEPS, NULL, err)
               : ltn_sampler_create(&s->sampler, c->vocab_size, err);
}

static void streams_close(struct streams *s)
{
    ltn_stepper_free(&s->stepper);
    ltn_sampler_free(&s->sampler);
    s->model->be->ops->free(s->model->be, s->states);
    ltn_workspace_free(&s->ws);
    free(s->seqs);
    free(s->ids);
    free(s->out);
    free(s->logits);
}

/* Every stream at `position` of a text of which it has seen nothing: that costs what a full past costs. */
static enum ltn_status move_to(struct streams *s, int64_t position, struct ltn_error *err)
{
    struct ltn_backend *be = s->model->be;
    for (int32_t i = 0; i < s->batch; i++) {
        s->ids[i] = 17 * i % s->model->config.vocab_size;
        s->seqs[i].pos = position;
    }
    LTN_TRY(be->ops->zero(be, s->states, s->state_bytes * (size_t)s->batch, err));
    return s->stepper.model ? ltn_stepper_seek(&s->stepper, position, err) : LTN_OK;
}

static enum ltn_status take_steps(struct streams *s, int32_t n, struct ltn_error *err)
{
    struct ltn_backend *be = s->model->be;
    const struct ltn_sampling greedy = {.temperature = 0, .top_p = 1};
    const size_t V = (size_t)s->model->config.vocab_size;
    const float *logits = s->logits ? s->logits : s->ws.logits;

    if (s->stepper.model) {
        LTN_TRY(ltn_stepper_run(&s->stepper, s->ids, NULL, n, s->out, err));
        memcpy(s->ids, s->out + (size_t)(n - 1) * (size_t)s->batch, (size_t)s->batch * sizeof *s->ids);
        return LTN_OK;
    }
    for (int32_t k = 0; k < n; k++) {
        LTN_TRY(ltn_forward(s->model, &s->ws, s->ids, s->batch, s->seqs, s->batch, LTN_WANT_LAST, NULL, err));
        if (s->logits)
            LTN_TRY(be->ops->download(be, s->logits, s->ws.logits, (size_t)s->batch * V * sizeof *s->logits,
                                      err));
        for (int32_t i = 0; i < s->batch; i++) {
            LTN_TRY(ltn_sample(&s->sampler, logits + (size_t)i * V, &greedy, NULL, 0, 0, &s->ids[i], err));
            s->seqs[i].pos++;
        }
    }
    return LTN_OK;
}

static enum ltn_status timed_steps(struct streams *s, int32_t n, double *seconds, struct ltn_error *err)
{
    const double begin = ltn_bench_now();
    LTN_TRY(take_steps(s, n, err));
    *seconds = ltn_bench_now() - begin;
    return ltn_cli_interrupted() ? ltn_fail(err, LTN_ERR_STOPPED, "interrupted") : LTN_OK;
}

/* ---- measuring ----------------------------------------------------------------------------------------- */

static double matrix_bytes(const struct ltn_matrix *m)
{
    const size_t cols = (size_t)m->cols;
    return (double)m->rows * (double)(ltn_row_bytes(m->dtype, cols) + ltn_row_scale_bytes(m->dtype, cols));
}

/* Of the weights, that a step has to read. */
static double step_bytes(const struct ltn_model *m)
{
    double bytes = matrix_bytes(&m->head);
    for (int32_t i = 0; i < m->config.n_layers; i++) {
        const struct ltn_layer *l = &m->layers[i];
        bytes += matrix_bytes(&l->qkv.w) + matrix_bytes(&l->out.w) + matrix_bytes(&l->l1.w) +
                 matrix_bytes(&l->l2.w) + matrix_bytes(&l->l3.w);
    }
    return bytes;
}

static enum ltn_status summarise(struct bench *b, struct row *row, const struct streams *s,
                                 struct ltn_error *err)
{
    struct ltn_bench_summary summary;
    LTN_TRY(ltn_bench_summarise(&summary, row->samples, (size_t)b->options->repetitions, err));
    row->tok_s = summary.median;
    row->weight_bytes = step_bytes(s->model);
    row->state_bytes = (double)s->state_bytes;
    row->gbps = 1e-9 * (row->weight_bytes + 2 * row->state_bytes * row->batch) * row->tok_s / row->batch;
    row->share = row->gbps / b->head.bandwidth.read_gbps;
    return LTN_OK;
}

/* A row for each position. */
static enum ltn_status measure(struct bench *b, const char *name, struct streams *s, struct ltn_error *err)
{
    const struct options *o = b->options;
    struct row *rows = b->rows + b->n_rows;
    double seconds;
    int32_t steps = WARM_UP;

    for (size_t p = 0; p < o->positions.n; p++, b->n_rows++) {
        rows[p] = (struct row){.model = name, .batch = s->batch, .position = o->positions.v[p]};
        rows[p].samples = malloc((size_t)o->repetitions * sizeof *rows[p].samples);
        if (!rows[p].samples)
            return ltn_fail(err, LTN_ERR_MEMORY, "no memory for samples");
    }
    LTN_TRY(move_to(s, 0, err));
    for (int i = 0; i < 2; i++) { /* the first warms up, the second tells how many fill the time */
        LTN_TRY(timed_steps(s, steps, &seconds, err));
        const double wanted = o->seconds / seconds * steps;
        if (i == 1)
            steps = wanted < 1 ? 1 : wanted < MOST_STEPS ? (int32_t)wanted : MOST_STEPS;
    }
    for (int64_t k = 0; k < o->repetitions; k++)
        for (size_t p = 0; p < o->positions.n; p++) {
            LTN_TRY(move_to(s, rows[p].position, err));
            LTN_TRY(take_steps(s, 1, err));
            LTN_TRY(timed_steps(s, steps, &seconds, err));
            rows[p].samples[k] = (double)s->batch * steps / seconds;
        }
    for (size_t p = 0; p < o->positions.n; p++)
        LTN_TRY(summarise(b, &rows[p], s, err));
    return LTN_OK;
}

static enum ltn_status measure_model(struct bench *b, const char *name, enum ltn_dtype dtype,
                                     struct ltn_error *err)
{
    struct ltn_config config;
    struct ltn_model model;
    enum ltn_status status = LTN_OK;

    LTN_TRY(ltn_config_released(&config, name, err));
    LTN_TRY(ltn_model_random(&model, &config, dtype, b->be, err));
    for (size_t i = 0; i < b->options->batches.n && status == LTN_OK; i++) {
        struct streams s;
        status = streams_open(&s, &model, (int32_t)b->options->batches.v[i], err);
        if (status == LTN_OK)
            status = measure(b, name, &s, err);
        streams_close(&s);
    }
    ltn_model_free(&model);
    return status;
}

/* ---- printing ------------------------------------------------------------------------------------------ */

static enum ltn_status print_table(const struct bench *b, struct ltn_error *err)
{
    LTN_TRY(ltn_cli_printf(err,
                           "%s, %s\nmeasured here: read %.1f GB/s, copy %.1f GB/s\n\n"
                           "%-6s %5s %6s %10s %11s %10s %9s %8s %10s\n",
                           b->head.device, b->options->dtype, b->head.bandwidth.read_gbps,
                           b->head.bandwidth.copy_gbps, "model", "dtype", "batch", "position", "tok/s",
                           "us/step", "GB/s", "share", "state MB"));
    for (size_t i = 0; i < b->n_rows; i++) {
        const struct row *r = &b->rows[i];
        LTN_TRY(ltn_cli_printf(err, "%-6s %5s %6d %10lld %11.1f %10.1f %9.1f %6.1f %% %10.1f\n", r->model,
                               b->options->dtype, r->batch, (long long)r->position, r->tok_s,
                               1e6 * r->batch / r->tok_s, r->gbps, 100 * r->share, 1e-6 * r->state_bytes));
    }
    return LTN_OK;
}

static enum ltn_status print_json(const struct bench *b, struct ltn_error *err)
{
    cJSON *json = ltn_bench_json(&b->head);
    cJSON_AddStringToObject(json, "backend", b->be->name);
    cJSON_AddNumberToObject(json, "threads", b->be->host_memory ? b->n_threads : 0);
    cJSON *rows = cJSON_AddArrayToObject(json, "rows");
    for (size_t i = 0; i < b->n_rows; i++) {
        const struct row *r = &b->rows[i];
        cJSON *row = cJSON_CreateObject();
        cJSON_AddStringToObject(row, "impl", "ltn");
        cJSON_AddStringToObject(row, "model", r->model);
        cJSON_AddStringToObject(row, "dtype", b->options->dtype);
        cJSON_AddNumberToObject(row, "batch", r->batch);
        cJSON_AddNumberToObject(row, "position", (double)r->position);
        cJSON_AddNumberToObject(row, "tok_s", r->tok_s);
        cJSON_AddNumberToObject(row, "gbps", r->gbps);
        cJSON_AddNumberToObject(row, "share", r->share);
        cJSON_AddNumberToObject(row, "weight_bytes", r->weight_bytes);
        cJSON_AddNumberToObject(row, "state_bytes", r->state_bytes);
        cJSON_AddItemToObject(row, "samples",
                              cJSON_CreateDoubleArray(r->samples, (int)b->options->repetitions));
        cJSON_AddItemToArray(rows, row);
    }
    return ltn_bench_print(json, err);
}

/* ---- the command --------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    enum ltn_dtype dtype;
} dtypes[] = {{"bf16", LTN_BF16}, {"f16", LTN_F16}, {"f32", LTN_F32},
              {"q8", LTN_Q8},     {"fp8", LTN_FP8}, {"q4", LTN_Q4}};

static enum ltn_status run_all(void *bench, int argc, char **argv, struct ltn_error *err)
{
    struct bench *b = bench;
    static const char *const shapes[] = {"385m", "1b", "7b"};
    const struct options *o = b->options;
    char notice[512];
    size_t d = 0;

    LTN_TRY(ltn_cli_write("", 0, err));
    while (strcmp(dtypes[d].name, o->dtype) != 0)
        d++;
    b->n_threads = o->threads > 0 ? (int)o->threads : ltn_bench_cores();
    LTN_TRY(ltn_backend_open(&b->be, o->device, dtypes[d].dtype, b->n_threads, &notice, err));
    if (*notice)
        ltn_cli_note("%s", notice);
    LTN_TRY(ltn_bench_begin(&b->head, b->be, b->n_threads, argc, argv, err));
    b->rows = calloc(3 * o->batches.n * o->positions.n, sizeof *b->rows);
    if (!b->rows)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %zu rows", o->batches.n * o->positions.n);
    for (size_t i = 0; i < 3; i++)
        if (strcmp(o->shape, "all") == 0 || strcmp(o->shape, shapes[i]) == 0)
            LTN_TRY(measure_model(b, shapes[i], dtypes[d].dtype, err));
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
}

int ltn_bench_decode(int argc, char **argv)
{
    struct options o = {.device = "auto",
                        .format = "table",
                        .shape = "385m",
                        .dtype = "bf16",
                        .batches = {{1}, 1},
                        .positions = {{0}, 1},
                        .repetitions = 5,
                        .seconds = 0.3};
    // clang-format off
    const struct ltn_flag flags[] = {
        {.name = "shape", .argument = "SHAPE", .kind = LTN_FLAG_CHOICE, .target = &o.shape,
         .choices = LTN_RELEASED "|all", .help = "the released model whose shape to take, or each in turn"},
        {.name = "random", .kind = LTN_FLAG_SWITCH, .target = &o.random,
         .help = "random weights, as always here: the word decode may be left out then"},
        {.letter = 'b', .name = "batch", .argument = "STREAMS", .kind = LTN_FLAG_INTS, .target = &o.batches, .min = 1,
         .max = 4096, .help = "streams at once"},
        {.name = "position", .argument = "TOKENS", .kind = LTN_FLAG_INTS, .target = &o.positions, .max = 1e15,
         .help = "where in their texts the streams are"},
        {.letter = 'r', .argument = "R", .kind = LTN_FLAG_INT, .target = &o.repetitions, .min = 1, .max = 1e6,
         .help = "repetitions of each test"},
        {.name = "seconds", .argument = "S", .kind = LTN_FLAG_REAL, .target = &o.seconds, .max = 1e5,
         .help = "how long one takes"},
        {.name = "dtype", .argument = "DTYPE", .kind = LTN_FLAG_CHOICE, .target = &o.dtype,
         .choices = "bf16|f16|f32|q8|fp8|q4", .help = "element type of the weights"},
        {.name = "format", .argument = "FORMAT", .kind = LTN_FLAG_CHOICE, .target = &o.format,
         .choices = "table|json", .help = "table or json; json keeps every sample"},
        {.letter = 't', .argument = "THREADS", .kind = LTN_FLAG_INT, .target = &o.threads, .max = 1024,
         .help = "CPU threads; 0: one per core"},
        {.name = "device", .argument = "DEVICE", .kind = LTN_FLAG_DEVICE, .target = &o.device,
         .help = "auto, cpu, cuda or cuda:N; auto: CUDA where it works, else the CPU"},
    };
    // clang-format on
    const struct ltn_program program = {
        .name = "ltn-bench decode",
        .summary = "Measure how fast models in the released shapes write, on random weights.",
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
        .notes =
            "GB/s counts what a step cannot do without: every matrix read once, every stream's state read "
            "and written once. The share is that of the memory bandwidth measured in the same run, by "
            "reading.\n\n"
            "Exit status: 0 done, 1 failure, 2 wrong usage, 130 after Ctrl-C.",
    };
    struct bench b = {.options = &o};

    int code = ltn_cli_parse(&program, argc, argv, NULL);
    return code >= 0 ? code : ltn_bench_go(run_all, end, &b, argc, argv);
}
