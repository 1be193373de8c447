/* ltn-bench: how fast things are, held against what this very machine can do. The commands have a file each,
 * src/bench_*.c; this one chooses and holds what they share. */
#include "src/bench.h"

#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/rng.h"
#include "src/cli.h"

int ltn_bench_cores(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

double ltn_bench_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

enum ltn_status ltn_bench_summarise(struct ltn_bench_summary *out, const double *samples, size_t n,
                                    struct ltn_error *err)
{
    double *sorted = malloc(n * sizeof *sorted);
    if (!sorted)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %zu samples", n);
    memcpy(sorted, samples, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, ascending);
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++)
        sum += sorted[i];
    out->mean = sum / (double)n;
    for (size_t i = 0; i < n; i++)
        squares += (sorted[i] - out->mean) * (sorted[i] - out->mean);
    out->stddev = n > 1 ? sqrt(squares / (double)(n - 1)) : 0;
    out->median = (sorted[(n - 1) / 2] + sorted[n / 2]) / 2;
    out->min = sorted[0];
    out->max = sorted[n - 1];
    free(sorted);
    return LTN_OK;
}

/* ---- noise --------------------------------------------------------------------------------------------- */

void ltn_bench_noise(void *to, enum ltn_dtype dtype, int64_t first, int64_t n)
{
    for (int64_t i = first; i < first + n; i += 4) {
        uint32_t counter[4] = {(uint32_t)i, (uint32_t)(i >> 32)};
        float x[4];
        ltn_philox(counter, 4, 2);
        for (int j = 0; j < 4; j += 2) { /* Box and Muller */
            double radius = sqrt(-2 * log((counter[j] + 1.0) * 0x1p-32));
            double angle = 0x1p-31 * M_PI * counter[j + 1];
            x[j] = (float)(radius * cos(angle));
            x[j + 1] = (float)(radius * sin(angle));
        }
        for (int64_t j = 0; j < 4 && i + j < first + n; j++) {
            if (dtype == LTN_F32)
                ((float *)to)[i + j] = x[j];
            else
                ((uint16_t *)to)[i + j] = dtype == LTN_BF16 ? ltn_f32_to_bf16(x[j]) : ltn_f32_to_f16(x[j]);
        }
    }
}

enum ltn_status ltn_bench_fill(struct ltn_backend *be, enum ltn_dtype dtype, void *memory, size_t bytes,
                               struct ltn_error *err)
{
    const size_t most = ((size_t)8 << 20) + 192; /* no multiple of a row */
    size_t done = bytes < most ? bytes : most;
    void *block = malloc(done);
    if (!block)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for random numbers");
    ltn_bench_noise(block, dtype, 0, (int64_t)(done / ltn_dtype_size(dtype)));
    enum ltn_status status = be->ops->upload(be, memory, block, done, err);
    free(block);
    for (size_t n; status == LTN_OK && done < bytes; done += n) {
        n = bytes - done < done ? bytes - done : done;
        status = be->ops->copy(be, (uint8_t *)memory + done, memory, n, err);
    }
    return status;
}

/* ---- the head of the results --------------------------------------------------------------------------- */

static void name_device(struct ltn_bench_head *head, const struct ltn_backend *be)
{
    char line[256];
    FILE *cpuinfo = be->host_memory ? fopen("/proc/cpuinfo", "re") : NULL;

    snprintf(head->device, sizeof head->device, "%s", be->name);
    while (cpuinfo && fgets(line, sizeof line, cpuinfo)) {
        char *value = strstr(line, ": ");
        if (strncmp(line, "model name", 10) != 0 || !value)
            continue;
        snprintf(head->device, sizeof head->device, "%.*s", (int)strcspn(value + 2, "\n"), value + 2);
        break;
    }
    if (cpuinfo)
        fclose(cpuinfo);
}

/* NVIDIA's driver tells its version to whoever asks, in words that differ from kind to kind: the first word
 * that begins with a digit and has a dot is it. */
static void name_driver(struct ltn_bench_head *head)
{
    char line[256], *rest = line, *word;
    FILE *version = fopen("/proc/driver/nvidia/version", "re");

    if (!version)
        return;
    if (fgets(line, sizeof line, version))
        while ((word = strsep(&rest, " \t\n")))
            if (*word >= '0' && *word <= '9' && strchr(word, '.')) {
                snprintf(head->driver, sizeof head->driver, "%.30s", word);
                break;
            }
    fclose(version);
}

void ltn_bench_note(struct ltn_bench_head *head, int argc, char **argv)
{
    time_t t = time(NULL);
    struct tm tm;

    *head = (struct ltn_bench_head){.command = "ltn-bench"};
    for (int i = 0; i < argc; i++) {
        size_t used = strlen(head->command);
        snprintf(head->command + used, sizeof head->command - used, " %s", argv[i]);
    }
    name_driver(head);
    strftime(head->date, sizeof head->date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&t, &tm));
}

enum ltn_status ltn_bench_begin(struct ltn_bench_head *head, struct ltn_backend *be, int n_threads, int argc,
                                char **argv, struct ltn_error *err)
{
    ltn_bench_note(head, argc, argv);
    name_device(head, be);
    return ltn_measure_bandwidth(&head->bandwidth, be, n_threads, err);
}

void ltn_bench_number(cJSON *json, const char *key, double value)
{
    if (isnan(value))
        cJSON_AddNullToObject(json, key);
    else
        cJSON_AddNumberToObject(json, key, value);
}

static void add_text(cJSON *json, const char *key, const char *text)
{
    if (text && *text)
        cJSON_AddStringToObject(json, key, text);
    else
        cJSON_AddNullToObject(json, key);
}

cJSON *ltn_bench_json(const struct ltn_bench_head *head)
{
    const char *commit = getenv("LTN_COMMIT");
    cJSON *json = cJSON_CreateObject();

    cJSON_AddStringToObject(json, "device", head->device);
    add_text(json, "driver", head->driver);
    cJSON_AddStringToObject(json, "date", head->date);
    add_text(json, "commit", commit);
    cJSON_AddStringToObject(json, "command", head->command);
    ltn_bench_number(json, "read_gbps", head->bandwidth.read_gbps);
    ltn_bench_number(json, "copy_gbps", head->bandwidth.copy_gbps);
    ltn_bench_number(json, "gemm_tflops", head->gemm_tflops > 0 ? head->gemm_tflops : NAN);
    return json;
}

enum ltn_status ltn_bench_print(cJSON *json, struct ltn_error *err)
{
    char *text = cJSON_Print(json);
    cJSON_Delete(json);
    if (!text)
        return ltn_fail(err, LTN_ERR_MEMORY, "JSON: no memory");
    enum ltn_status status = ltn_cli_write(text, strlen(text), err);
    cJSON_free(text);
    return status == LTN_OK ? ltn_cli_write("\n", 1, err) : status;
}

int ltn_bench_go(ltn_bench_fn *run, void (*end)(void *bench), void *bench, int argc, char **argv)
{
    struct ltn_error err;
    ltn_cli_catch_signals();
    int code = run(bench, argc, argv, &err) == LTN_OK ? LTN_EXIT_OK : ltn_cli_error(&err);
    end(bench);
    return code;
}

/* ---- the program --------------------------------------------------------------------------------------- */

static const struct command {
    const char *name;
    int (*run)(int argc, char **argv);
} commands[] = {
    {"model", ltn_bench_model},     {"decode", ltn_bench_decode}, {"attention", ltn_bench_attention},
    {"prefill", ltn_bench_prefill}, {"conv", ltn_bench_conv},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

int main(int argc, char **argv)
{
    char first[] = "model", random[] = "decode";

    for (size_t i = 0; argc > 1 && i < N_COMMANDS; i++)
        if (strcmp(argv[1], commands[i].name) == 0)
            return commands[i].run(argc - 1, argv + 1);
    if (argc > 1 && argv[1][0] != '-')
        return ltn_cli_bad_usage("%s: no such command, expected one of " LTN_BENCH_COMMANDS, argv[1]);
    /* the file that completes the program holds the completions of its other commands */
    for (size_t i = 1; argc == 2 && strcmp(argv[1], "--print-completion") == 0 && i < N_COMMANDS; i++) {
        int code = commands[i].run(argc, argv);
        if (code != LTN_EXIT_OK)
            return code;
    }
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--random") == 0) { /* no model, so it is made up */
            argv[0] = random;
            return ltn_bench_decode(argc, argv);
        }
    argv[0] = first;
    return commands[0].run(argc, argv);
}
