/* bench_quant cpu|cuda SHAPE DTYPE[,DTYPE...] [SECONDS] [THREADS]: tokens per second of decoding one stream
 * with random weights in a released shape, a line of JSON for each dtype, all in one run. Bytes are those of
 * the matrices and scales that a token reads; samples take turns among nothing but themselves, so give the
 * machine to it alone. */
#include "model/decoder.h"
#include "tests/cuda/device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SAMPLES = 5, MOST = 1024 };

static struct ltn_error err;

static void check(enum ltn_status status)
{
    if (status != LTN_OK) {
        fprintf(stderr, "bench_quant: %s\n", err.text);
        exit(1);
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double bytes_of(const struct ltn_config *c, enum ltn_dtype dtype)
{
    struct ltn_tensor_spec *specs;
    size_t n;
    double bytes = 0;
    check(ltn_config_tensors(c, &specs, &n, &err));
    for (size_t i = 0; i < n; i++) {
        enum ltn_dtype own = ltn_checkpoint_matrix_dtype(dtype, &specs[i]);
        size_t cols = (size_t)specs[i].shape[1];
        if (specs[i].is_matrix)
            bytes += (double)specs[i].shape[0] *
                     (double)(ltn_row_bytes(own, cols) + ltn_row_scale_bytes(own, cols));
    }
    free(specs);
    return bytes;
}

static void bench(struct ltn_backend *be, const struct ltn_config *config, const char *shape,
                  enum ltn_dtype dtype, double seconds)
{
    struct ltn_model model;
    struct ltn_workspace ws;
    struct ltn_stepper stepper = {0};
    struct ltn_seq seq = {.count = 1};
    const size_t state = ltn_state_offset(config, config->n_layers) * sizeof(float);
    int32_t id = 17, out[MOST];
    double samples[SAMPLES], each = 1e9;
    const bool device = ltn_stepper_possible(be);

    check(ltn_model_random(&model, config, dtype, be, &err));
    check(ltn_workspace_create(&ws, &model, 1, 1, &err));
    check(be->ops->alloc(be, (void **)&seq.state, state, &err));
    check(be->ops->zero(be, seq.state, state, &err));
    if (device) {
        check(ltn_stepper_create(&stepper, &model, &ws, &seq, 1, MOST, NULL, &err));
        check(ltn_stepper_run(&stepper, &id, NULL, 8, out, &err));
    }
    for (int i = -1; i < SAMPLES; i++) { /* the first, of four steps, says how many a sample has */
        int steps = i < 0 ? 4 : (int)(seconds / each);
        steps = steps < 4 ? 4 : steps > MOST ? MOST : steps;
        double start = now();
        if (device) {
            check(ltn_stepper_run(&stepper, NULL, NULL, steps, out, &err));
        } else {
            for (int k = 0; k < steps; k++, seq.pos++) {
                check(ltn_forward(&model, &ws, &id, 1, &seq, 1, LTN_WANT_LAST, NULL, &err));
                id = (id * 31 + 7) % config->vocab_size;
            }
        }
        each = (now() - start) / steps;
        if (i >= 0)
            samples[i] = 1 / each;
    }
    double sorted[SAMPLES];
    memcpy(sorted, samples, sizeof sorted);
    qsort(sorted, SAMPLES, sizeof *sorted, by_value);
    printf("{\"model\": \"%s\", \"dtype\": \"%s\", \"device\": \"%s\", \"bytes\": %.0f, \"state_bytes\": "
           "%zu, \"tok_s\": "
           "%.2f, \"gbps\": %.1f, \"samples\": [",
           shape, ltn_checkpoint_dtype_key(dtype), be->name, bytes_of(config, dtype), state,
           sorted[SAMPLES / 2], 1e-9 * sorted[SAMPLES / 2] * (bytes_of(config, dtype) + 2 * (double)state));
    for (int i = 0; i < SAMPLES; i++)
        printf("%s%.2f", i ? ", " : "", samples[i]);
    printf("]}\n");
    fflush(stdout);
    if (device)
        ltn_stepper_free(&stepper);
    be->ops->free(be, seq.state);
    ltn_workspace_free(&ws);
    ltn_model_free(&model);
}

int main(int argc, char **argv)
{
    struct ltn_config config;
    struct ltn_backend *be;
    if (argc < 4) {
        fprintf(stderr, "usage: bench_quant cpu|cuda SHAPE DTYPE[,DTYPE...] [SECONDS] [THREADS]\n");
        return 2;
    }
    double seconds = argc > 4 ? atof(argv[4]) : 0.5;
    check(ltn_config_released(&config, argv[2], &err));
    if (strcmp(argv[1], "cuda") == 0)
        be = open_cuda(LTN_BF16);
    else
        check(ltn_cpu_open(&be, argc > 5 ? atoi(argv[5]) : 0, &err));
    for (char *name = strtok(argv[3], ","); name; name = strtok(NULL, ",")) {
        enum ltn_dtype dtype;
        if (!ltn_checkpoint_dtype_from_key(&dtype, name)) {
            fprintf(stderr, "bench_quant: %s: no such dtype\n", name);
            return 2;
        }
        bench(be, &config, argv[2], dtype, seconds);
    }
    be->ops->close(be);
    return 0;
}
