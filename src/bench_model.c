/* ltn-bench model: how fast a model reads and writes.
 *
 * Two tests for each length L: "prefill" reads L tokens from an empty state, to the last one's logits;
 * "decode" writes tokens one by one after L tokens. Every sample is a whole repetition, timed on its own
 * after one that is thrown away. Decoding is also given as GB/s, the bytes it cannot do without (weights
 * read, state read and written) by its median time, and as a share of the memory bandwidth measured in this
 * very run.
 *
 * Results also carry {model, backend, threads}. A row is {test, length, tokens, tok_s, median, stddev, min,
 * max, gbps, share, samples}: speeds in tokens/s, tok_s the mean, samples the raw ones.
 */
#include "src/bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/cli.h"
#include "src/engine.h"
#include "src/rng.h"

struct options {
    const char *model, *device, *prefill, *format;
    struct ltn_ints lengths;
    int64_t n, repetitions, threads;
};

struct row {
    const char *test;
    int64_t length, tokens; /* tokens that one sample processes */
    double *samples;        /* [repetitions] tokens/s */
    struct ltn_bench_summary speed;
    double gbps, share; /* NaN for prefill */
};

struct bench {
    const struct options *options;
    struct ltn_engine *engine;
    const struct ltn_engine_info *info;
    struct ltn_session *session;
    struct ltn_bench_head head;
    struct row *rows; /* [n_rows] */
    size_t n_rows;
};

/* ---- measuring ----------------------------------------------------------------------------------------- */

/* Feeds n ids drawn at random, the same ones every time. */
static enum ltn_status feed(struct bench *b, int64_t n, struct ltn_error *err)
{
    for (int64_t i = 0; i < n; i++) {
        int32_t id = (int32_t)(ltn_uniform(1, (uint64_t)i) * b->info->vocab_size);
        LTN_TRY(ltn_session_feed(b->session, &id, 1, err));
    }
    return LTN_OK;
}

static enum ltn_status time_prefill(struct bench *b, int64_t length, double *seconds, struct ltn_error *err)
{
    const float *logits;
    LTN_TRY(ltn_session_reset(b->session, err));
    double begin = ltn_bench_now();
    LTN_TRY(feed(b, length, err));
    LTN_TRY(ltn_session_logits(b->session, &logits, err));
    *seconds = ltn_bench_now() - begin;
    return LTN_OK;
}

/* Goes on from where the session is: the past is of no consequence to the time. */
static enum ltn_status time_decode(struct bench *b, int64_t n, double *seconds, struct ltn_error *err)
{
    const struct ltn_sampling greedy = {.top_p = 1};
    const struct ltn_generate_options options = {.sampling = &greedy, .max_tokens = n, .ignore_eos = true};
    double begin = ltn_bench_now();
    LTN_TRY(ltn_generate(b->session, &options, NULL, err));
    const float *logits;
    LTN_TRY(ltn_session_logits(b->session, &logits, err));
    *seconds = ltn_bench_now() - begin;
    return LTN_OK;
}

static enum ltn_status measure(struct bench *b, const char *test, int64_t length, struct ltn_error *err)
{
    bool decode = strcmp(test, "decode") == 0;
    struct row *row = &b->rows[b->n_rows++];
    *row = (struct row){.test = test, .length = length, .tokens = decode ? b->options->n : length};
    row->samples = malloc((size_t)b->options->repetitions * sizeof *row->samples);
    if (!row->samples)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %lld samples",
                        (long long)b->options->repetitions);

    double seconds;
    for (int64_t i = -1; i < b->options->repetitions; i++) { /* number -1 warms up */
        if (decode && i < 0)
            LTN_TRY(time_prefill(b, length, &seconds, err));
        if (decode)
            LTN_TRY(time_decode(b, row->tokens, &seconds, err));
        else
            LTN_TRY(time_prefill(b, length, &seconds, err));
        if (i >= 0)
            row->samples[i] = (double)row->tokens / seconds;
        if (ltn_cli_interrupted())
            return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
    }
    LTN_TRY(ltn_bench_summarise(&row->speed, row->samples, (size_t)b->options->repetitions, err));
    row->gbps = decode ? 1e-9 * row->speed.median * (double)b->info->decode_bytes : NAN;
    row->share = row->gbps / b->head.bandwidth.read_gbps;
    return LTN_OK;
}

/* ---- printing ------------------------------------------------------------------------------------------ */

static enum ltn_status print_table(const struct bench *b, struct ltn_error *err)
{
    LTN_TRY(ltn_cli_printf(err,
                           "%s, %s\n%.1f M parameters, %s, %.1f MB; state %.1f MB\n"
                           "measured here: read %.1f GB/s, copy %.1f GB/s\n\n"
                           "%-8s %8s %12s %12s %10s %12s %12s %8s %7s\n",
                           b->head.device, b->info->backend, 1e-6 * (double)b->info->n_parameters,
                           b->info->dtype, 1e-6 * (double)b->info->weights_bytes,
                           1e-6 * (double)b->info->state_bytes, b->head.bandwidth.read_gbps,
                           b->head.bandwidth.copy_gbps, "test", "length", "mean tok/s", "median", "stddev",
                           "min", "max", "GB/s", "share"));
    for (size_t i = 0; i < b->n_rows; i++) {
        const struct row *r = &b->rows[i];
        char rate[32] = "-", share[32] = "-";
        if (!isnan(r->gbps)) {
            snprintf(rate, sizeof rate, "%.2f", r->gbps);
            snprintf(share, sizeof share, "%.1f %%", 100 * r->share);
        }
        LTN_TRY(ltn_cli_printf(err, "%-8s %8lld %12.1f %12.1f %10.1f %12.1f %12.1f %8s %7s\n", r->test,
                               (long long)r->length, r->speed.mean, r->speed.median, r->speed.stddev,
                               r->speed.min, r->speed.max, rate, share));
    }
    return LTN_OK;
}

static enum ltn_status print_csv(const struct bench *b, struct ltn_error *err)
{
    LTN_TRY(ltn_cli_printf(err, "test,length,tokens,tok_s,median,stddev,min,max,gbps,share\n"));
    for (size_t i = 0; i < b->n_rows; i++) {
        const struct row *r = &b->rows[i];
        LTN_TRY(ltn_cli_printf(err, "%s,%lld,%lld,%.3f,%.3f,%.3f,%.3f,%.3f", r->test, (long long)r->length,
                               (long long)r->tokens, r->speed.mean, r->speed.median, r->speed.stddev,
                               r->speed.min, r->speed.max));
        LTN_TRY(isnan(r->gbps) ? ltn_cli_printf(err, ",,\n")
                               : ltn_cli_printf(err, ",%.4f,%.4f\n", r->gbps, r->share));
    }
    return LTN_OK;
}

static cJSON *row_json(const struct bench *b, const struct row *r)
{
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "test", r->test);
    cJSON_AddNumberToObject(json, "length", (double)r->length);
    cJSON_AddNumberToObject(json, "tokens", (double)r->tokens);
    cJSON_AddNumberToObject(json, "tok_s", r->speed.mean);
    cJSON_AddNumberToObject(json, "median", r->speed.median);
    cJSON_AddNumberToObject(json, "stddev", r->speed.stddev);
    cJSON_AddNumberToObject(json, "min", r->speed.min);
    cJSON_AddNumberToObject(json, "max", r->speed.max);
    ltn_bench_number(json, "gbps", r->gbps);
    ltn_bench_number(json, "share", r->share);
    cJSON_AddItemToObject(json, "samples", cJSON_CreateDoubleArray(r->samples, (int)b->options->repetitions));
    return json;
}

static enum ltn_status print_json(const struct bench *b, struct ltn_error *err)
{
    cJSON *json = ltn_bench_json(&b->head);
    cJSON_AddStringToObject(json, "model", b->info->checksum);
    cJSON_AddStringToObject(json, "backend", b->info->backend);
    cJSON_AddNumberToObject(json, "threads", b->info->n_threads);
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
    struct ltn_progress progress = {"loading the model", -1};
    const struct ltn_engine_options options = {.device = o->device,
                                               .n_threads = (int)o->threads,
                                               .prefill = o->prefill,
                                               .progress = ltn_cli_progress,
                                               .progress_ctx = &progress};
    char path[4096];

    LTN_TRY(ltn_cli_write("", 0, err));
    LTN_TRY(ltn_cli_model(path, sizeof path, o->model, err));
    LTN_TRY(ltn_engine_open(&b->engine, path, &options, err));
    b->info = ltn_engine_info(b->engine);
    if (b->info->notice)
        ltn_cli_note("%s", b->info->notice);
    LTN_TRY(ltn_session_create(&b->session, b->engine, NULL, err));
    LTN_TRY(ltn_bench_begin(&b->head, b->engine->be, b->info->n_threads, argc, argv, err));

    b->rows = calloc(2 * o->lengths.n, sizeof *b->rows);
    if (!b->rows)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %zu rows", 2 * o->lengths.n);
    for (size_t i = 0; i < o->lengths.n; i++) {
        LTN_TRY(measure(b, "prefill", o->lengths.v[i], err));
        LTN_TRY(measure(b, "decode", o->lengths.v[i], err));
    }
    return strcmp(o->format, "json") == 0  ? print_json(b, err)
           : strcmp(o->format, "csv") == 0 ? print_csv(b, err)
                                           : print_table(b, err);
}

static void end(void *bench)
{
    struct bench *b = bench;
    for (size_t i = 0; i < b->n_rows; i++)
        free(b->rows[i].samples);
    free(b->rows);
    ltn_session_free(b->session);
    ltn_engine_close(b->engine);
}

int ltn_bench_model(int argc, char **argv)
{
    struct options o = {.device = "auto",
                        .prefill = "exact",
                        .format = "table",
                        .lengths = {{512, 2048, 8192}, 3},
                        .n = 64,
                        .repetitions = 5};
    // clang-format off
    const struct ltn_flag flags[] = {
        {.letter = 'm', .argument = "MODEL", .kind = LTN_FLAG_STRING, .target = &o.model,
         .help = "the model, a .ltn file; without it $LTN_MODEL, else the model that ships with ltn"},
        {.letter = 'l', .argument = "LENGTHS", .kind = LTN_FLAG_INTS, .target = &o.lengths, .min = 1, .max = 1e9,
         .help = "tokens to read, and to have read before writing"},
        {.letter = 'n', .argument = "N", .kind = LTN_FLAG_INT, .target = &o.n, .min = 1, .max = 1e9,
         .help = "tokens to write in each repetition"},
        {.letter = 'r', .argument = "R", .kind = LTN_FLAG_INT, .target = &o.repetitions, .min = 1, .max = 1e6,
         .help = "repetitions of each test, after one that does not count"},
        {.name = "format", .argument = "FORMAT", .kind = LTN_FLAG_CHOICE, .target = &o.format,
         .choices = "table|csv|json", .help = "table, csv or json; json keeps every sample"},
        {.letter = 't', .argument = "THREADS", .kind = LTN_FLAG_INT, .target = &o.threads, .max = 1024,
         .help = "CPU threads; 0: one per core"},
        {.name = "device", .argument = "DEVICE", .kind = LTN_FLAG_DEVICE, .target = &o.device,
         .help = "auto, cpu, cuda or cuda:N; auto: CUDA where it works, else the CPU"},
        {.name = "prefill", .argument = "HOW", .kind = LTN_FLAG_CHOICE, .target = &o.prefill,
         .choices = "exact|fp8",
         .help = "fp8: read the input with products in e4m3, about twice as fast and coarser; needs a Hopper GPU"},
    };
    // clang-format on
    const struct ltn_program program = {
        .name = "ltn-bench",
        .commands = LTN_BENCH_COMMANDS,
        .summary = "Measure how fast a TransNormerLLM reads (prefill) and writes (decode).",
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
        .notes =
            "Commands: " LTN_BENCH_COMMANDS ". This is what the first does, and what is done without one; "
            "ltn-bench COMMAND --help shows another's options.\n\n"
            "The share is that of the memory bandwidth measured in the same run: by reading host memory "
            "with as many threads, or the device's memory. It can pass 100 % where the weights fit in a "
            "cache.\n\n"
            "Exit status: 0 done, 1 failure, 2 wrong usage, 130 after Ctrl-C.",
    };
    struct bench b = {.options = &o};

    int code = ltn_cli_parse(&program, argc, argv, NULL);
    return code >= 0 ? code : ltn_bench_go(run_all, end, &b, argc, argv);
}
