/* Times the operations of a step of decoding by themselves, on the CUDA backend, with random weights in a
 * released shape: each over all layers in turn, recorded and replayed.
 *
 *   bench_ops [SHAPE [BATCH [DTYPE]]]        385m, 1b or 7b; streams; bf16, f16 or f32
 */
#include "model/decoder.h"
#include "src/bandwidth.h"
#include "tests/cuda/device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SAMPLES = 5 };

static struct ltn_error err;
static struct ltn_bandwidth bandwidth;

static void check(enum ltn_status status)
{
    if (status != LTN_OK) {
        fprintf(stderr, "bench_ops: %s\n", err.text);
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

struct bench {
    struct ltn_model model;
    struct ltn_workspace ws;
    int32_t batch;
    struct ltn_seq *seqs;
    float *states;
};

/* One operation over all layers in turn, recorded and replayed. */
static void bench_op(struct bench *b, const char *name, int op)
{
    static const char *const names[] = {"norm_linear qkvu", "lightning",     "gated_linear_add",
                                        "norm_glu",         "linear_add l3", "norm_logits"};
    enum { REPEATS = 20 };
    struct ltn_backend *be = b->model.be;
    const struct ltn_ops *ops = be->ops;
    const struct ltn_config *c = &b->model.config;
    struct ltn_workspace *ws = &b->ws;
    const int32_t H = c->hidden_dim, rows = b->batch;
    const size_t act = ltn_dtype_size(be->act_dtype);
    uint8_t *q = ws->qkv;
    struct ltn_recording *recording = NULL;
    double samples[SAMPLES], bytes = 0;
    int n = op == 5 ? 4 : c->n_layers;

    for (int pass = 0; pass < 2; pass++) { /* first as it comes, for what a library sets up on first use */
        if (pass)
            check(ops->record(be, NULL, &err));
        for (int l = 0; l < n; l++) {
            const struct ltn_layer *y = &b->model.layers[l];
            const double size = (double)ltn_dtype_size(b->model.embed.dtype);
            switch (op) {
            case 0:
                check(ops->norm_linear(be, q, ws->x, &y->token_norm, &y->qkv, c->act, 2 * H, c->head_dim,
                                       rows, ws->y, &err));
                bytes = size * 4 * H * c->embed_dim;
                break;
            case 1:
                check(ops->lightning(be, ws->o, q, q + H * act, q + 2 * H * act, 4 * H, &y->attention,
                                     b->seqs, b->batch, &err));
                bytes = 8.0 * (double)ltn_state_floats(c, 1) * b->batch;
                break;
            case 2:
                check(ops->gated_linear_add(be, ws->x, ws->o, q + 3 * H * act, 4 * H, &y->attn_norm, &y->out,
                                            rows, ws->y, &err));
                bytes = size * H * c->embed_dim;
                break;
            case 3:
                check(ops->norm_glu(be, q, ws->x, &y->channel_norm, &y->l1, &y->l2, rows, ws->y, ws->gate,
                                    &err));
                bytes = size * 2 * c->glu_dim * c->embed_dim;
                break;
            case 4:
                check(ops->linear_add(be, ws->x, q, &y->l3, rows, &err));
                bytes = size * c->glu_dim * c->embed_dim;
                break;
            default:
                check(ops->norm_logits(be, ws->logits, ws->x, &b->model.final_norm, &b->model.head, rows,
                                       ws->y, &err));
                bytes = size * c->vocab_size * c->embed_dim;
            }
        }
        if (pass)
            check(ops->recorded(be, &recording, &err));
    }
    for (int i = -1; i < SAMPLES; i++) {
        double start = now();
        for (int k = 0; k < REPEATS; k++)
            check(ops->replay(be, recording, &err));
        check(ops->sync(be, &err));
        if (i >= 0)
            samples[i] = (now() - start) / REPEATS / n;
    }
    ops->recording_free(be, recording);
    qsort(samples, SAMPLES, sizeof *samples, by_value);
    const double s = samples[SAMPLES / 2];
    printf("%-5s batch %3d %-18s %8.2f us  %8.1f GB/s %5.1f %%\n", name, b->batch, names[op], 1e6 * s,
           1e-9 * bytes / s, 1e-7 * bytes / s / bandwidth.read_gbps);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    const char *shape = argc > 1 ? argv[1] : "385m", *type = argc > 3 ? argv[3] : "bf16";
    const enum ltn_dtype dtype = strcmp(type, "f32") == 0   ? LTN_F32
                                 : strcmp(type, "f16") == 0 ? LTN_F16
                                                            : LTN_BF16;
    struct bench b = {.batch = argc > 2 ? atoi(argv[2]) : 1};
    struct ltn_config config;

    if (b.batch < 1) {
        fprintf(stderr, "bench_ops: expected a batch of 1 or more, found %s\n", argv[2]);
        return 2;
    }
    check(ltn_config_released(&config, shape, &err));
    struct ltn_backend *be = open_cuda(dtype);
    check(ltn_measure_bandwidth(&bandwidth, be, 1, &err));
    printf("%s: read %.0f GB/s, copy %.0f GB/s\n", be->name, bandwidth.read_gbps, bandwidth.copy_gbps);
    check(ltn_model_random(&b.model, &config, dtype, be, &err));
    const size_t floats = ltn_state_offset(&config, config.n_layers), n = (size_t)b.batch;
    b.seqs = calloc(n, sizeof *b.seqs);
    if (!b.seqs)
        return 1;
    check(ltn_workspace_create(&b.ws, &b.model, b.batch, b.batch, &err));
    check(be->ops->alloc(be, (void **)&b.states, floats * n * sizeof(float), &err));
    check(be->ops->zero(be, b.states, floats * n * sizeof(float), &err));
    check(be->ops->zero(be, b.ws.memory, b.ws.bytes, &err));
    for (int32_t i = 0; i < b.batch; i++)
        b.seqs[i] = (struct ltn_seq){b.states + floats * (size_t)i, 0, i, 1};
    for (int op = 0; op < 6; op++)
        bench_op(&b, shape, op);
    be->ops->free(be, b.states);
    ltn_workspace_free(&b.ws);
    ltn_model_free(&b.model);
    free(b.seqs);
    be->ops->close(be);
    return 0;
}
