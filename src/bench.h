/* What the commands of ltn-bench share: the clock, medians, the head of the results.
 *
 * Results (--format json) are one object {device, driver, date, commit, command, read_gbps, copy_gbps,
 * gemm_tflops, ..., rows}; null where unknown. commit is taken from $LTN_COMMIT. What a command adds, and
 * what a row is, stands at the top of the command's file.
 */
#ifndef LTN_BENCH_H
#define LTN_BENCH_H

#include "kernels/ops.h"
#include "src/bandwidth.h"

#include <cjson/cJSON.h>

/* A command, one file each: its part of the command line, argv[0] its name; returns the exit code. --help,
 * --print-man and --print-completion print what is its own. */
int ltn_bench_model(int argc, char **argv);
int ltn_bench_decode(int argc, char **argv);
int ltn_bench_attention(int argc, char **argv);
int ltn_bench_prefill(int argc, char **argv);
int ltn_bench_conv(int argc, char **argv);

/* the words of the table in bench.c, "|" between */
#define LTN_BENCH_COMMANDS "model|decode|attention|prefill|conv"

/* The rest of a command, once its options are read: runs it, tells of a failure, lets go of what it holds,
 * and gives the exit code. bench: the command's own. */
typedef enum ltn_status ltn_bench_fn(void *bench, int argc, char **argv, struct ltn_error *err);
int ltn_bench_go(ltn_bench_fn *run, void (*end)(void *bench), void *bench, int argc, char **argv);

int ltn_bench_cores(void);  /* that this process may use */
double ltn_bench_now(void); /* seconds, of a clock that only goes forward */

struct ltn_bench_summary {
    double mean, median, stddev, min, max;
};
/* Of n >= 1 samples, which keep their order. */
enum ltn_status ltn_bench_summarise(struct ltn_bench_summary *out, const double *samples, size_t n,
                                    struct ltn_error *err);

/* Elements first .. first + n - 1 of an endless row of normal numbers, at their places in `to`; first: a
 * multiple of 4. */
void ltn_bench_noise(void *to, enum ltn_dtype dtype, int64_t first, int64_t n);
/* Fills backend memory with such numbers: a block of some MB, then copies of it. */
enum ltn_status ltn_bench_fill(struct ltn_backend *be, enum ltn_dtype dtype, void *memory, size_t bytes,
                               struct ltn_error *err);

struct ltn_bench_head {
    char device[128]; /* the processor's name, or the backend's where that is a device */
    char driver[32];  /* the version of NVIDIA's driver; "": there is none */
    char date[32];    /* UTC, as ISO 8601 has it */
    char command[1024];
    struct ltn_bandwidth bandwidth;
    double gemm_tflops; /* 0: not measured */
};

/* Clears the head and notes driver, date and command ("ltn-bench" and the words of argv). */
void ltn_bench_note(struct ltn_bench_head *head, int argc, char **argv);
/* The same, names the device, and measures the bandwidth. */
enum ltn_status ltn_bench_begin(struct ltn_bench_head *head, struct ltn_backend *be, int n_threads, int argc,
                                char **argv, struct ltn_error *err);

/* The results as JSON: the caller adds keys of its own, then an array "rows". NULL: no memory. */
cJSON *ltn_bench_json(const struct ltn_bench_head *head);
/* A number, or null where it is NaN. */
void ltn_bench_number(cJSON *json, const char *key, double value);
/* Writes the results to stdout and frees them; json may be NULL: no memory. */
enum ltn_status ltn_bench_print(cJSON *json, struct ltn_error *err);

#endif
