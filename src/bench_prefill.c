/* ltn-bench prefill: how fast models in the released shapes read, against the bare products of their layers.
 *
 * Weights are random. A pass reads n tokens from an empty state in chunks, as a session does, up to the last
 * one's logits. The bare pass does every product of every layer's weights with as many rows, through the
 * backend's own `linear`, and nothing else. The two take turns until each has run for --seconds (and at least
 * three times), so that both see the same clocks and the same heat.
 *
 * With --loop, longer texts are read once, or until --seconds have passed, in slices. Behind each slice
 * passes of --loop tokens, each from an empty state to its logits, read as many tokens, without a wait
 * between them: does speed depend on the length of a text? Bare slices are in between only until they have
 * run for --seconds.
 *
 * Results also carry {backend, threads}; gemm_tflops is that of the last row. A row is {impl, model, dtype,
 * prefill, n, chunk, tok_s, share, gemm_tok_s, gemm_tflops, extra_bytes, samples, gemm_samples}: tok_s and
 * gemm_tok_s the medians of the samples, in tokens/s; share = tok_s / gemm_tok_s; extra_bytes: workspace,
 * the backend's room and state, all that reading takes beside the weights. Of texts longer than --loop the
 * samples are of slices, and {loop_n, loop_tok_s, loop_samples} are of the short texts.
 */
#include "src/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/rng.h"
#include "src/cli.h"
#include "src/engine.h"

enum { MOST_SAMPLES = 512, LEAST_SAMPLES = 3 };

struct options {
    const char *device, *format, *shape, *dtype, *prefill;
    struct ltn_ints lengths;
    int64_t chunk, threads, loop;
    double seconds;
};

struct samples {
    double v[MOST_SAMPLES]; /* [n] tokens/s */
    int n;
    double spent; /* seconds */
    struct ltn_bench_summary summary;
};

struct row {
    int64_t n;
    struct samples model, bare, loop; /* loop.n == 0: not one of --loop */
    double bare_tflops;
};

struct bench {
    const struct options *options;
    struct ltn_backend *be;
    struct ltn_model model;
    struct ltn_workspace ws;
    float *state, *long_state; /* long_state: of a text that waits between its slices */
    void *in, *out;            /* act: what the bare products read and write */
    int32_t *ids;              /* host, [chunk] */
    int32_t chunk;
    size_t state_bytes;
    int n_threads;
    struct ltn_bench_head head;
    struct row *rows; /* [n_rows] */
    size_t n_rows;
};

static int32_t max32(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

/* ---- measuring ----------------------------------------------------------------------------------------- */

/* Reads tokens first .. end - 1 of a text of n. */
static enum ltn_status read_part(struct bench *b, float *state, int64_t first, int64_t end, int64_t n,
                                 struct ltn_error *err)
{
    if (first == 0)
        LTN_TRY(b->be->ops->zero(b->be, state, b->state_bytes, err));
    for (int64_t done = first; done < end; done += b->chunk) {
        const int32_t rows = end - done < b->chunk ? (int32_t)(end - done) : b->chunk;
        const struct ltn_seq seq = {state, done, 0, rows};
        LTN_TRY(ltn_forward(&b->model, &b->ws, b->ids, rows, &seq, 1,
                            done + rows == n ? LTN_WANT_LAST : LTN_WANT_NONE, NULL, err));
    }
    return LTN_OK;
}

static enum ltn_status pass(struct bench *b, int64_t n, struct ltn_error *err)
{
    return read_part(b, b->state, 0, n, n, err);
}

static enum ltn_status bare_pass(struct bench *b, int64_t n, struct ltn_error *err)
{
    for (int64_t done = 0; done < n; done += b->chunk) {
        const int32_t rows = n - done < b->chunk ? (int32_t)(n - done) : b->chunk;
        for (int32_t i = 0; i < b->model.config.n_layers; i++) {
            const struct ltn_layer *l = &b->model.layers[i];
            for (const struct ltn_linear *const *w =
                     (const struct ltn_linear *const[]){&l->qkv, &l->out, &l->l1, &l->l2, &l->l3, NULL};
                 *w; w++)
                LTN_TRY(b->be->ops->linear(b->be, b->out, b->in, *w, rows, err));
        }
    }
    return LTN_OK;
}

/* Of n tokens that have been asked for since `begin`. */
static enum ltn_status end_sample(struct bench *b, struct samples *s, int64_t n, double begin,
                                  struct ltn_error *err)
{
    LTN_TRY(b->be->ops->sync(b->be, err));
    double seconds = ltn_bench_now() - begin;
    s->v[s->n++] = (double)n / seconds;
    s->spent += seconds;
    if (ltn_cli_interrupted())
        return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
    return LTN_OK;
}

static enum ltn_status sample(struct bench *b, struct samples *s, int64_t n, bool bare, struct ltn_error *err)
{
    LTN_TRY(b->be->ops->sync(b->be, err));
    double begin = ltn_bench_now();
    LTN_TRY(bare ? bare_pass(b, n, err) : pass(b, n, err));
    return end_sample(b, s, n, begin, err);
}

/* A slice of the row's text, and as many tokens, or a few more, in texts of --loop. */
static enum ltn_status sample_slices(struct bench *b, struct row *row, int64_t first, int64_t end,
                                     struct ltn_error *err)
{
    const int64_t loop = b->options->loop, times = (end - first + loop - 1) / loop;
    LTN_TRY(b->be->ops->sync(b->be, err));
    double begin = ltn_bench_now();
    LTN_TRY(read_part(b, b->long_state, first, end, row->n, err));
    LTN_TRY(end_sample(b, &row->model, end - first, begin, err));
    begin = ltn_bench_now();
    for (int64_t i = 0; i < times; i++)
        LTN_TRY(pass(b, loop, err));
    LTN_TRY(end_sample(b, &row->loop, times * loop, begin, err));
    if (row->bare.n == 0 || row->bare.spent < b->options->seconds)
        LTN_TRY(sample(b, &row->bare, end - first, true, err));
    return LTN_OK;
}

/* Slices of whole chunks, sixteen, or so many that the samples have room. */
static enum ltn_status measure_slices(struct bench *b, struct row *row, struct ltn_error *err)
{
    int64_t chunks = 16;
    while (row->n / (chunks * b->chunk) >= MOST_SAMPLES / 2)
        chunks *= 2;
    const int64_t slice = chunks * b->chunk, slices = (row->n + slice - 1) / slice;
    do
        for (int64_t first = 0; first < row->n; first += slice)
            LTN_TRY(sample_slices(b, row, first, first + slice < row->n ? first + slice : row->n, err));
    while (row->model.spent < b->options->seconds && row->model.n + slices <= MOST_SAMPLES);
    return LTN_OK;
}

static bool enough(const struct samples *s, double seconds)
{
    return s->n == MOST_SAMPLES || (s->n >= LEAST_SAMPLES && s->spent >= seconds);
}

static enum ltn_status measure(struct bench *b, int64_t n, struct ltn_error *err)
{
    const struct ltn_config *c = &b->model.config;
    const double D = c->embed_dim, H = c->hidden_dim, G = c->glu_dim;
    struct row *row = &b->rows[b->n_rows++];

    row->n = n;
    LTN_TRY(pass(b, n < 2 * (int64_t)b->chunk ? n : 2 * (int64_t)b->chunk, err)); /* warms up */
    LTN_TRY(bare_pass(b, n < b->chunk ? n : b->chunk, err));
    const bool in_slices = b->options->loop > 0 && n > b->options->loop;
    if (in_slices)
        LTN_TRY(measure_slices(b, row, err));
    while (!in_slices &&
           (!enough(&row->model, b->options->seconds) || !enough(&row->bare, b->options->seconds))) {
        /* the one that has had less time, so that short passes of the one match long ones of the other */
        const bool bare = row->bare.n < MOST_SAMPLES &&
                          (row->bare.spent < row->model.spent || row->model.n == MOST_SAMPLES);
        LTN_TRY(sample(b, bare ? &row->bare : &row->model, n, bare, err));
    }
    LTN_TRY(ltn_bench_summarise(&row->model.summary, row->model.v, (size_t)row->model.n, err));
    LTN_TRY(ltn_bench_summarise(&row->bare.summary, row->bare.v, (size_t)row->bare.n, err));
    if (in_slices)
        LTN_TRY(ltn_bench_summarise(&row->loop.summary, row->loop.v, (size_t)row->loop.n, err));
    row->bare_tflops = 2e-12 * c->n_layers * (4 * H * D + H * D + 3 * G * D) * row->bare.summary.median;
    b->head.gemm_tflops = row->bare_tflops;
    return LTN_OK;
}

/* ---- printing ------------------------------------------------------------------------------------------ */

static enum ltn_status print_table(const struct bench *b, struct ltn_error *err)
{
    LTN_TRY(ltn_cli_printf(err,
                           "%s, shape %s, %s, chunks of %d rows; beside the weights %.1f MB\n\n"
                           "%10s %12s %9s %14s %9s%s\n",
                           b->head.device, b->options->shape, b->options->dtype, b->chunk,
                           1e-6 * (double)(b->ws.bytes + b->be->room_bytes + b->state_bytes), "length",
                           "tok/s", "share", "products tok/s", "TFLOP/s",
                           b->options->loop ? "   looped tok/s" : ""));
    for (size_t i = 0; i < b->n_rows; i++) {
        const struct row *r = &b->rows[i];
        LTN_TRY(ltn_cli_printf(
            err, "%10lld %12.0f %7.1f %% %14.0f %9.2f", (long long)r->n, r->model.summary.median,
            100 * r->model.summary.median / r->bare.summary.median, r->bare.summary.median, r->bare_tflops));
        if (r->loop.n)
            LTN_TRY(ltn_cli_printf(err, " %14.0f", r->loop.summary.median));
        LTN_TRY(ltn_cli_printf(err, "\n"));
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
        cJSON_AddStringToObject(row, "model", b->options->shape);
        cJSON_AddStringToObject(row, "dtype", b->options->dtype);
        cJSON_AddStringToObject(row, "prefill", b->options->prefill);
        cJSON_AddNumberToObject(row, "n", (double)r->n);
        cJSON_AddNumberToObject(row, "chunk", b->chunk);
        cJSON_AddNumberToObject(row, "tok_s", r->model.summary.median);
        cJSON_AddNumberToObject(row, "share", r->model.summary.median / r->bare.summary.median);
        cJSON_AddNumberToObject(row, "gemm_tok_s", r->bare.summary.median);
        cJSON_AddNumberToObject(row, "gemm_tflops", r->bare_tflops);
        cJSON_AddNumberToObject(row, "extra_bytes",
                                (double)(b->ws.bytes + b->be->room_bytes + b->state_bytes));
        cJSON_AddItemToObject(row, "samples", cJSON_CreateDoubleArray(r->model.v, r->model.n));
        cJSON_AddItemToObject(row, "gemm_samples", cJSON_CreateDoubleArray(r->bare.v, r->bare.n));
        if (r->loop.n) {
            cJSON_AddNumberToObject(row, "loop_n", (double)b->options->loop);
            cJSON_AddNumberToObject(row, "loop_tok_s", r->loop.summary.median);
            cJSON_AddItemToObject(row, "loop_samples", cJSON_CreateDoubleArray(r->loop.v, r->loop.n));
        }
        cJSON_AddItemToArray(rows, row);
    }
    return ltn_bench_print(json, err);
}

/* ---- the command --------------------------------------------------------------------------------------- */

static enum ltn_dtype dtype_of(const char *name)
{
    return strcmp(name, "f32") == 0 ? LTN_F32 : strcmp(name, "f16") == 0 ? LTN_F16 : LTN_BF16;
}

static enum ltn_status prepare(struct bench *b, struct ltn_error *err)
{
    const struct options *o = b->options;
    struct ltn_config config;
    struct ltn_backend *be = b->be;

    LTN_TRY(ltn_config_released(&config, o->shape, err));
    LTN_TRY(ltn_model_random(&b->model, &config, dtype_of(o->dtype), be, err));
    if (strcmp(o->prefill, "fp8") == 0)
        LTN_TRY(ltn_model_prefill_fp8(&b->model, err));
    b->chunk = o->chunk ? (int32_t)o->chunk : ltn_model_chunk_rows(&b->model);
    LTN_TRY(ltn_workspace_create(&b->ws, &b->model, b->chunk, 1, err));
    b->state_bytes = ltn_state_offset(&config, config.n_layers) * sizeof(float);
    LTN_TRY(be->ops->alloc(be, (void **)&b->state, b->state_bytes, err));
    LTN_TRY(be->ops->alloc(be, (void **)&b->long_state, b->state_bytes, err));
    const size_t act = ltn_dtype_size(be->act_dtype), rows = (size_t)b->chunk;
    const int32_t D = config.embed_dim, H = config.hidden_dim, G = config.glu_dim;
    const size_t in_bytes = rows * (size_t)max32(max32(D, H), G) * act;
    LTN_TRY(be->ops->alloc(be, &b->in, in_bytes, err));
    LTN_TRY(be->ops->alloc(be, &b->out, rows * (size_t)max32(max32(D, 4 * H), G) * act, err));
    LTN_TRY(ltn_bench_fill(be, be->act_dtype, b->in, in_bytes, err));
    b->ids = malloc(rows * sizeof *b->ids);
    b->rows = calloc(o->lengths.n, sizeof *b->rows);
    if (!b->ids || !b->rows)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %zu rows", o->lengths.n);
    for (size_t i = 0; i < rows; i++)
        b->ids[i] = (int32_t)(ltn_uniform(1, i) * config.vocab_size);
    return LTN_OK;
}

static enum ltn_status run_all(void *bench, int argc, char **argv, struct ltn_error *err)
{
    struct bench *b = bench;
    const struct options *o = b->options;
    char notice[512];

    LTN_TRY(ltn_cli_write("", 0, err));
    b->n_threads = o->threads > 0 ? (int)o->threads : ltn_bench_cores();
    LTN_TRY(ltn_backend_open(&b->be, o->device, dtype_of(o->dtype), b->n_threads, &notice, err));
    if (*notice)
        ltn_cli_note("%s", notice);
    LTN_TRY(ltn_bench_begin(&b->head, b->be, b->n_threads, argc, argv, err));
    LTN_TRY(prepare(b, err));
    for (size_t i = 0; i < o->lengths.n; i++)
        LTN_TRY(measure(b, o->lengths.v[i], err));
    return strcmp(o->format, "json") == 0 ? print_json(b, err) : print_table(b, err);
}

static void end(void *bench)
{
    struct bench *b = bench;
    free(b->rows);
    free(b->ids);
    if (b->be) {
        b->be->ops->free(b->be, b->in);
        b->be->ops->free(b->be, b->out);
        b->be->ops->free(b->be, b->state);
        b->be->ops->free(b->be, b->long_state);
        ltn_workspace_free(&b->ws);
        ltn_model_free(&b->model);
        b->be->ops->close(b->be);
    }
}

int ltn_bench_prefill(int argc, char **argv)
{
    struct options o = {.device = "auto",
                        .format = "table",
                        .shape = "385m",
                        .dtype = "bf16",
                        .prefill = "exact",
                        .lengths = {{2048, 8192, 32768}, 3},
                        .seconds = 3};
    // clang-format off
    const struct ltn_flag flags[] = {
        {.name = "shape", .argument = "SHAPE", .kind = LTN_FLAG_CHOICE, .target = &o.shape, .choices = LTN_RELEASED,
         .help = "the released model whose shape to take"},
        {.letter = 'l', .argument = "LENGTHS", .kind = LTN_FLAG_INTS, .target = &o.lengths, .min = 1, .max = 1e12,
         .help = "tokens of a pass"},
        {.name = "seconds", .argument = "S", .kind = LTN_FLAG_REAL, .target = &o.seconds, .max = 1e5,
         .help = "how long passes, and bare products, are repeated"},
        {.name = "loop", .argument = "TOKENS", .kind = LTN_FLAG_INT, .target = &o.loop, .max = 1 << 30,
         .help = "compare longer texts with texts of TOKENS, read again and again; 0: do not"},
        {.name = "chunk", .argument = "ROWS", .kind = LTN_FLAG_INT, .target = &o.chunk, .max = 1 << 20,
         .help = "tokens that go through the model at once; 0: what suits the device"},
        {.name = "dtype", .argument = "DTYPE", .kind = LTN_FLAG_CHOICE, .target = &o.dtype, .choices = "bf16|f16|f32",
         .help = "element type of the weights"},
        {.name = "prefill", .argument = "HOW", .kind = LTN_FLAG_CHOICE, .target = &o.prefill, .choices = "exact|fp8",
         .help = "fp8: products in e4m3, the bare ones too"},
        {.name = "format", .argument = "FORMAT", .kind = LTN_FLAG_CHOICE, .target = &o.format,
         .choices = "table|json", .help = "table or json; json keeps every sample"},
        {.letter = 't', .argument = "THREADS", .kind = LTN_FLAG_INT, .target = &o.threads, .max = 1024,
         .help = "CPU threads; 0: one per core"},
        {.name = "device", .argument = "DEVICE", .kind = LTN_FLAG_DEVICE, .target = &o.device,
         .help = "auto, cpu, cuda or cuda:N; auto: CUDA where it works, else the CPU"},
    };
    // clang-format on
    const struct ltn_program program = {
        .name = "ltn-bench prefill",
        .summary = "Measure how fast models in the released shapes read, on random weights.",
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
        .notes =
            "The share is that of the speed of the products of the layers' weights alone, which run in turn "
            "with the whole model.\n\n"
            "Exit status: 0 done, 1 failure, 2 wrong usage, 130 after Ctrl-C.",
    };
    struct bench b = {.options = &o};

    int code = ltn_cli_parse(&program, argc, argv, NULL);
    return code >= 0 ? code : ltn_bench_go(run_all, end, &b, argc, argv);
}
