/* ltn-bench: how fast a model reads and writes.
 *
 * Two tests for each length L: "prefill" reads L tokens from an empty state, to the last one's logits;
 * "decode" writes tokens one by one after L tokens. Every sample is a whole repetition, timed on its own
 * after one that is thrown away. Decoding is also given as GB/s, the bytes it cannot do without (weights
 * read, state read and written) by its median time, and as a share of the memory bandwidth measured in this
 * very run.
 *
 * --format json: one object {device, driver, date, commit, command, read_gbps, copy_gbps, gemm_tflops, model,
 * backend, threads, rows}; null where unknown; commit is taken from $LTN_COMMIT. A row is {test, length,
 * tokens, tok_s, median, stddev, min, max, gbps, share, samples}: speeds in tokens/s, tok_s the mean, samples
 * the raw ones.
 */
#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>

#include "src/bandwidth.h"
#include "src/cli.h"
#include "src/rng.h"

struct options {
    const char *model, *device, *format;
    struct ltn_ints lengths;
    int64_t n, repetitions, threads;
};

struct row {
    const char *test;
    int64_t length, tokens; /* tokens that one sample processes */
    double *samples;        /* [repetitions] tokens/s */
    double mean, median, stddev, min, max;
    double gbps, share; /* NaN for prefill */
};

struct bench {
    const struct options *options;
    struct ltn_engine *engine;
    const struct ltn_engine_info *info;
    struct ltn_session *session;
    struct ltn_bandwidth bandwidth;
    struct row *rows; /* [n_rows] */
    size_t n_rows;
    char device[128], date[32], command[1024];
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

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
    double begin = now();
    LTN_TRY(feed(b, length, err));
    LTN_TRY(ltn_session_logits(b->session, &logits, err));
    *seconds = now() - begin;
    return LTN_OK;
}

/* Goes on from where the session is: the past is of no consequence to the time. */
static enum ltn_status time_decode(struct bench *b, int64_t n, double *seconds, struct ltn_error *err)
{
    const struct ltn_sampling greedy = {.top_p = 1};
    int32_t id;
    double begin = now();
    for (int64_t i = 0; i < n; i++) {
        LTN_TRY(ltn_session_sample(b->session, &greedy, &id, err));
        LTN_TRY(ltn_session_feed(b->session, &id, 1, err));
    }
    const float *logits;
    LTN_TRY(ltn_session_logits(b->session, &logits, err));
    *seconds = now() - begin;
    return LTN_OK;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static enum ltn_status summarise(struct bench *b, struct row *row, struct ltn_error *err)
{
    size_t n = (size_t)b->options->repetitions;
    double *sorted = malloc(n * sizeof *sorted);
    if (!sorted)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %zu samples", n);
    memcpy(sorted, row->samples, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, ascending);
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++)
        sum += sorted[i];
    row->mean = sum / (double)n;
    for (size_t i = 0; i < n; i++)
        squares += (sorted[i] - row->mean) * (sorted[i] - row->mean);
    row->stddev = n > 1 ? sqrt(squares / (double)(n - 1)) : 0;
    row->median = (sorted[(n - 1) / 2] + sorted[n / 2]) / 2;
    row->min = sorted[0];
    row->max = sorted[n - 1];
    free(sorted);

    double peak = b->bandwidth.read_gbps > 0 ? b->bandwidth.read_gbps : b->bandwidth.copy_gbps;
    bool decode = strcmp(row->test, "decode") == 0;
    row->gbps = decode ? 1e-9 * row->median * (double)b->info->decode_bytes : NAN;
    row->share = decode ? row->gbps / peak : NAN;
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
    return summarise(b, row, err);
}

/* ---- printing ------------------------------------------------------------------------------------------ */

static enum ltn_status print_table(const struct bench *b, struct ltn_error *err)
{
    LTN_TRY(ltn_cli_printf(err,
                           "%s, %s\n%.1f M parameters, %s, %.1f MB; state %.1f MB\n"
                           "measured here: read %.1f GB/s, copy %.1f GB/s\n\n"
                           "%-8s %8s %12s %12s %10s %12s %12s %8s %7s\n",
                           b->device, b->info->backend, 1e-6 * (double)b->info->n_parameters, b->info->dtype,
                           1e-6 * (double)b->info->weights_bytes, 1e-6 * (double)b->info->state_bytes,
                           b->bandwidth.read_gbps, b->bandwidth.copy_gbps, "test", "length", "mean tok/s",
                           "median", "stddev", "min", "max", "GB/s", "share"));
    for (size_t i = 0; i < b->n_rows; i++) {
        const struct row *r = &b->rows[i];
        char rate[32] = "-", share[32] = "-";
        if (!isnan(r->gbps)) {
            snprintf(rate, sizeof rate, "%.2f", r->gbps);
            snprintf(share, sizeof share, "%.1f %%", 100 * r->share);
        }
        LTN_TRY(ltn_cli_printf(err, "%-8s %8lld %12.1f %12.1f %10.1f %12.1f %12.1f %8s %7s\n", r->test,
                               (long long)r->length, r->mean, r->median, r->stddev, r->min, r->max, rate,
                               share));
    }
    return LTN_OK;
}

static enum ltn_status print_csv(const struct bench *b, struct ltn_error *err)
{
    LTN_TRY(ltn_cli_printf(err, "test,length,tokens,tok_s,median,stddev,min,max,gbps,share\n"));
    for (size_t i = 0; i < b->n_rows; i++) {
        const struct row *r = &b->rows[i];
        LTN_TRY(ltn_cli_printf(err, "%s,%lld,%lld,%.3f,%.3f,%.3f,%.3f,%.3f", r->test, (long long)r->length,
                               (long long)r->tokens, r->mean, r->median, r->stddev, r->min, r->max));
        LTN_TRY(isnan(r->gbps) ? ltn_cli_printf(err, ",,\n")
                               : ltn_cli_printf(err, ",%.4f,%.4f\n", r->gbps, r->share));
    }
    return LTN_OK;
}

static void add_number(cJSON *json, const char *key, double value, bool known)
{
    if (known)
        cJSON_AddNumberToObject(json, key, value);
    else
        cJSON_AddNullToObject(json, key);
}

static cJSON *row_json(const struct bench *b, const struct row *r)
{
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "test", r->test);
    cJSON_AddNumberToObject(json, "length", (double)r->length);
    cJSON_AddNumberToObject(json, "tokens", (double)r->tokens);
    cJSON_AddNumberToObject(json, "tok_s", r->mean);
    cJSON_AddNumberToObject(json, "median", r->median);
    cJSON_AddNumberToObject(json, "stddev", r->stddev);
    cJSON_AddNumberToObject(json, "min", r->min);
    cJSON_AddNumberToObject(json, "max", r->max);
    add_number(json, "gbps", r->gbps, !isnan(r->gbps));
    add_number(json, "share", r->share, !isnan(r->share));
    cJSON_AddItemToObject(json, "samples", cJSON_CreateDoubleArray(r->samples, (int)b->options->repetitions));
    return json;
}

static enum ltn_status print_json(const struct bench *b, struct ltn_error *err)
{
    struct utsname host;
    const char *commit = getenv("LTN_COMMIT");
    cJSON *json = cJSON_CreateObject();

    cJSON_AddStringToObject(json, "device", b->device);
    if (uname(&host) == 0)
        cJSON_AddStringToObject(json, "driver", host.release);
    cJSON_AddStringToObject(json, "date", b->date);
    if (commit)
        cJSON_AddStringToObject(json, "commit", commit);
    else
        cJSON_AddNullToObject(json, "commit");
    cJSON_AddStringToObject(json, "command", b->command);
    add_number(json, "read_gbps", b->bandwidth.read_gbps, b->bandwidth.read_gbps > 0);
    cJSON_AddNumberToObject(json, "copy_gbps", b->bandwidth.copy_gbps);
    cJSON_AddNullToObject(json, "gemm_tflops");
    cJSON_AddStringToObject(json, "model", b->info->checksum);
    cJSON_AddStringToObject(json, "backend", b->info->backend);
    cJSON_AddNumberToObject(json, "threads", b->info->n_threads);
    cJSON *rows = cJSON_AddArrayToObject(json, "rows");
    for (size_t i = 0; i < b->n_rows; i++)
        cJSON_AddItemToArray(rows, row_json(b, &b->rows[i]));
    char *text = cJSON_Print(json);
    cJSON_Delete(json);
    if (!text)
        return ltn_fail(err, LTN_ERR_MEMORY, "JSON: no memory");
    enum ltn_status status = ltn_cli_write(text, strlen(text), err);
    cJSON_free(text);
    return status == LTN_OK ? ltn_cli_write("\n", 1, err) : status;
}

/* ---- the program --------------------------------------------------------------------------------------- */

/* What the run is about to be done on: the processor's name, or the backend's where that is a device. */
static void name_device(struct bench *b)
{
    char line[256];
    FILE *cpuinfo = b->info->n_threads ? fopen("/proc/cpuinfo", "re") : NULL;

    snprintf(b->device, sizeof b->device, "%s", b->info->backend);
    while (cpuinfo && fgets(line, sizeof line, cpuinfo)) {
        char *value = strstr(line, ": ");
        if (strncmp(line, "model name", 10) != 0 || !value)
            continue;
        snprintf(b->device, sizeof b->device, "%.*s", (int)strcspn(value + 2, "\n"), value + 2);
        break;
    }
    if (cpuinfo)
        fclose(cpuinfo);
}

static enum ltn_status run_all(struct bench *b, struct ltn_error *err)
{
    const struct options *o = b->options;
    struct ltn_progress progress = {"loading the model", -1};
    const struct ltn_engine_options options = {.device = o->device,
                                               .n_threads = (int)o->threads,
                                               .progress = ltn_cli_progress,
                                               .progress_ctx = &progress};
    char path[4096];
    time_t t = time(NULL);
    struct tm tm;

    LTN_TRY(ltn_cli_write("", 0, err));
    LTN_TRY(ltn_cli_model(path, sizeof path, o->model, err));
    LTN_TRY(ltn_engine_open(&b->engine, path, &options, err));
    b->info = ltn_engine_info(b->engine);
    if (b->info->notice)
        ltn_cli_note("%s", b->info->notice);
    LTN_TRY(ltn_session_create(&b->session, b->engine, NULL, err));
    strftime(b->date, sizeof b->date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&t, &tm));
    name_device(b);
    LTN_TRY(ltn_measure_bandwidth(b->engine, &b->bandwidth, err));

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

int main(int argc, char **argv)
{
    struct options o = {
        .device = "auto", .format = "table", .lengths = {{512, 2048, 8192}, 3}, .n = 64, .repetitions = 5};
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
    };
    // clang-format on
    const struct ltn_program program = {
        .name = "ltn-bench",
        .summary = "Measure how fast a TransNormerLLM reads (prefill) and writes (decode).",
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
        .notes =
            "The share is that of the memory bandwidth measured in the same run: by reading host memory "
            "with as many threads, or by copying the device's memory. It can pass 100 % where the weights "
            "fit in a cache.\n\n"
            "Exit status: 0 done, 1 failure, 2 wrong usage, 130 after Ctrl-C.",
    };
    struct bench b = {.options = &o};
    struct ltn_error err;

    for (int i = 0; i < argc; i++) {
        size_t used = strlen(b.command);
        snprintf(b.command + used, sizeof b.command - used, i ? " %s" : "%s", argv[i]);
    }
    int code = ltn_cli_parse(&program, argc, argv, NULL);
    if (code >= 0)
        return code;
    ltn_cli_catch_signals();
    code = run_all(&b, &err) == LTN_OK ? LTN_EXIT_OK : ltn_cli_error(&err);
    for (size_t i = 0; i < b.n_rows; i++)
        free(b.rows[i].samples);
    free(b.rows);
    ltn_session_free(b.session);
    ltn_engine_close(b.engine);
    return code;
}
