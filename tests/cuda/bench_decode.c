/* Speed of decoding on the CUDA backend with random weights in the released shapes, through the recorded step
 * of model/decoder.h, beside the floor: bytes of the matrices and of the states, read and written once, over
 * the read bandwidth measured in the same run.
 *
 *   bench_decode [--shapes 385m,1b,7b] [--batches 1,8,64] [--positions 0,1000000] [--seconds 0.3] [--ops
 * 0,1,..,5]
 *                [--dtype bf16] [--json FILE] [--read GBPS]
 *
 * --ops times operations of a layer by themselves too, over all layers in turn (names below); --seconds 0
 * leaves whole steps out; --read gives the read bandwidth instead of measuring it. */
#include "model/decoder.h"
#include "tests/cuda/device.h"
#include "tests/support.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SAMPLES = 5, LIST = 16 };

static const struct shape {
    const char *name;
    int32_t dim, layers, heads, glu, vocab;
} shapes[] = {{"385m", 1024, 24, 8, 2816, 64000},
              {"1b", 2048, 16, 16, 5632, 64000},
              {"7b", 4096, 30, 32, 11008, 64000}};

static struct ltn_error err;

static void check(enum ltn_status status)
{
    if (status != LTN_OK) {
        fprintf(stderr, "bench_decode: %s\n", err.text);
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

static double median(const double *samples, int n)
{
    double sorted[64];
    memcpy(sorted, samples, (size_t)n * sizeof *samples);
    qsort(sorted, (size_t)n, sizeof *sorted, by_value);
    return sorted[n / 2];
}

/* ---- a model of random weights ------------------------------------------------------------------------ */

/* Weights are pieces of one random block, so that making 14 GB of them takes no time. */
enum { BLOCK = 16 << 20 };

static uint8_t *take(uint8_t **next, size_t bytes)
{
    uint8_t *at = *next;
    *next += (bytes + 63) / 64 * 64;
    return at;
}

static size_t place(struct ltn_model *m, uint8_t *arena, enum ltn_dtype dtype)
{
    const struct ltn_config *c = &m->config;
    const size_t size = ltn_dtype_size(dtype);
    const int32_t D = c->embed_dim, H = c->hidden_dim, G = c->glu_dim, V = c->vocab_size;
    uint8_t *next = arena;
#define MATRIX(rows, cols)                                                                                   \
    (struct ltn_matrix){take(&next, (size_t)(rows) * (size_t)(cols)*size), dtype, rows, cols, NULL}
    m->embed = m->head = MATRIX(V, D);
    for (int32_t l = 0; l < c->n_layers; l++) {
        struct ltn_layer *layer = &m->layers[l];
        layer->qkv.w = MATRIX(4 * H, D);
        layer->out.w = MATRIX(D, H);
        layer->l1.w = MATRIX(G, D);
        layer->l2.w = MATRIX(G, D);
        layer->l3.w = MATRIX(D, G);
    }
    for (int32_t l = 0; l < c->n_layers; l++) {
        struct ltn_attention *a = &m->layers[l].attention;
        a->n_heads = c->n_heads;
        a->head_dim = c->head_dim;
        a->state_offset = ltn_state_offset(c, l);
        a->slopes = (float *)take(&next, (size_t)c->n_heads * sizeof(float));
        a->theta = c->lrpe[l] ? (float *)take(&next, (size_t)D * sizeof(float)) : NULL;
    }
#undef MATRIX
    return (size_t)(next - arena);
}

static void fill(struct ltn_backend *be, uint8_t *arena, size_t bytes, enum ltn_dtype dtype)
{
    struct test_rng rng = {77};
    const size_t n = BLOCK / ltn_dtype_size(dtype), shift = 64 * 1021; /* no row repeats at its own offset */
    uint8_t *block = malloc(BLOCK);
    if (!block)
        exit(1);
    for (size_t i = 0; i < n; i++) {
        float v = (float)(0.02 * test_normal(&rng));
        uint16_t half = dtype == LTN_BF16 ? ltn_f32_to_bf16(v) : ltn_f32_to_f16(v);
        memcpy(block + i * ltn_dtype_size(dtype), dtype == LTN_F32 ? (void *)&v : &half,
               ltn_dtype_size(dtype));
    }
    size_t done = bytes < BLOCK ? bytes : BLOCK;
    check(be->ops->upload(be, arena, block, done, &err));
    for (size_t i = 0; done < bytes; i++) {
        size_t from = i * shift % (BLOCK / 2), most = BLOCK - from, m = bytes - done;
        m = m < most ? m : most;
        check(be->ops->copy(be, arena + done, arena + from, m, &err));
        done += m;
    }
    check(be->ops->sync(be, &err));
    free(block);
}

static void model_make(struct ltn_model *m, const struct shape *s, struct ltn_backend *be,
                       enum ltn_dtype dtype)
{
    *m = (struct ltn_model){.be = be};
    m->config = (struct ltn_config){.vocab_size = s->vocab,
                                    .embed_dim = s->dim,
                                    .hidden_dim = s->dim,
                                    .n_layers = s->layers,
                                    .n_heads = s->heads,
                                    .glu_dim = s->glu,
                                    .act = LTN_ACT_SILU,
                                    .tied = true,
                                    .scale_embedding = true,
                                    .bos_id = 1,
                                    .eos_id = 2,
                                    .lrpe = {1}};
    check(ltn_config_check(&m->config, &err));
    m->layers = calloc((size_t)s->layers, sizeof *m->layers);
    if (!m->layers)
        exit(1);
    size_t bytes = place(m, NULL, dtype);
    check(be->ops->alloc(be, &m->arena, bytes, &err));
    place(m, m->arena, dtype);
    fill(be, m->arena, bytes, dtype);
    for (int32_t l = 0; l < s->layers; l++) {
        float values[LTN_MAX_HEADS];
        ltn_slopes(values, s->heads, l, s->layers);
        check(be->ops->upload(be, (void *)m->layers[l].attention.slopes, values,
                              (size_t)s->heads * sizeof(float), &err));
    }
}

/* Bytes that one step must read of the weights. */
static double weight_bytes(const struct ltn_model *m)
{
    const struct ltn_config *c = &m->config;
    const double D = c->embed_dim, H = c->hidden_dim, G = c->glu_dim;
    return (double)ltn_dtype_size(m->embed.dtype) *
           (c->vocab_size * D + c->n_layers * (4 * H * D + H * D + 3 * G * D));
}

/* ---- measuring ---------------------------------------------------------------------------------------- */

static FILE *json;
static int n_json;
static double read_gbps, copy_gbps;

static void measure_bandwidth(struct ltn_backend *be)
{
    enum { ROWS = 8192, COLS = 65536 };
    const size_t bytes = (size_t)ROWS * COLS * sizeof(float);
    uint8_t *buffer;
    double samples[SAMPLES];

    check(be->ops->alloc(be, (void **)&buffer, 2 * bytes, &err));
    fill(be, buffer, bytes, LTN_F32);
    for (int i = -1; i < SAMPLES; i++) {
        double start = now();
        for (int k = 0; k < 10; k++)
            check(be->ops->copy(be, buffer + bytes, buffer, bytes, &err));
        check(be->ops->sync(be, &err));
        if (i >= 0)
            samples[i] = 10 * 2e-9 * (double)bytes / (now() - start);
    }
    copy_gbps = median(samples, SAMPLES);
    for (int i = -1; i < SAMPLES; i++) {
        double start = now();
        for (int k = 0; k < 10; k++)
            check(be->ops->sum(be, (uint64_t *)(buffer + bytes), buffer, bytes, &err));
        check(be->ops->sync(be, &err));
        if (i >= 0)
            samples[i] = 10 * 1e-9 * (double)bytes / (now() - start);
    }
    read_gbps = median(samples, SAMPLES);
    be->ops->free(be, buffer);
}

/* Host memory, already in place, to the device. */
static double measure_upload(struct ltn_backend *be)
{
    const size_t bytes = (size_t)512 << 20;
    uint8_t *host = malloc(bytes), *device;
    double samples[SAMPLES];
    if (!host)
        exit(1);
    memset(host, 1, bytes);
    check(be->ops->alloc(be, (void **)&device, bytes, &err));
    for (int i = -1; i < SAMPLES; i++) {
        double start = now();
        check(be->ops->upload(be, device, host, bytes, &err));
        check(be->ops->sync(be, &err));
        if (i >= 0)
            samples[i] = 1e-9 * (double)bytes / (now() - start);
    }
    be->ops->free(be, device);
    free(host);
    return median(samples, SAMPLES);
}

struct bench {
    struct ltn_model model;
    struct ltn_workspace ws;
    int32_t batch;
    struct ltn_seq *seqs;
    float *states;
};

static void bench_step(struct bench *b, const char *name, int64_t pos, double seconds, const char *dtype)
{
    enum { MOST = 4096 };
    struct ltn_backend *be = b->model.be;
    const struct ltn_config *c = &b->model.config;
    struct ltn_stepper stepper;
    const double state = 4.0 * (double)ltn_state_offset(c, c->n_layers);
    int32_t *ids = calloc((size_t)b->batch, sizeof *ids),
            *out = malloc(sizeof *out * MOST * (size_t)b->batch);
    double samples[SAMPLES];

    if (!ids || !out)
        exit(1);
    check(be->ops->zero(be, b->states, (size_t)state * (size_t)b->batch, &err));
    for (int32_t i = 0; i < b->batch; i++) {
        b->seqs[i].pos = pos;
        ids[i] = 17 * i % c->vocab_size;
    }
    check(ltn_stepper_create(&stepper, &b->model, &b->ws, b->seqs, b->batch, MOST, NULL, &err));
    check(ltn_stepper_run(&stepper, ids, NULL, 8, out, &err));
    double start = now();
    check(ltn_stepper_run(&stepper, NULL, NULL, 16, out, &err));
    double each = (now() - start) / 16;
    int steps = (int)(seconds / each);
    steps = steps < 16 ? 16 : steps > MOST ? MOST : steps;
    for (int i = 0; i < SAMPLES; i++) {
        start = now();
        check(ltn_stepper_run(&stepper, NULL, NULL, steps, out, &err));
        samples[i] = b->batch * steps / (now() - start);
    }
    ltn_stepper_free(&stepper);
    double tok_s = median(samples, SAMPLES);
    double bytes = weight_bytes(&b->model) + 2 * state * b->batch, gbps = 1e-9 * bytes * tok_s / b->batch;
    printf("%-5s %s batch %3d at %7lld: %9.1f tok/s %8.1f us/step %7.1f GB/s %5.1f %% of the floor\n", name,
           dtype, b->batch, (long long)pos, tok_s, 1e6 * b->batch / tok_s, gbps, 100 * gbps / read_gbps);
    fflush(stdout);
    if (json) {
        fprintf(json,
                "%s\n  {\"model\": \"%s\", \"dtype\": \"%s\", \"batch\": %d, \"position\": %lld, \"tok_s\": "
                "%.2f, \"gbps\": %.1f, \"share\": %.4f, \"weight_bytes\": %.0f, \"state_bytes\": %.0f, "
                "\"samples\": [",
                n_json++ ? "," : "", name, dtype, b->batch, (long long)pos, tok_s, gbps, gbps / read_gbps,
                weight_bytes(&b->model), state);
        for (int i = 0; i < SAMPLES; i++)
            fprintf(json, "%s%.2f", i ? ", " : "", samples[i]);
        fprintf(json, "]}");
    }
    free(ids);
    free(out);
}

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
    double s = median(samples, SAMPLES);
    printf("%-5s batch %3d %-18s %8.2f us  %8.1f GB/s %5.1f %%\n", name, b->batch, names[op], 1e6 * s,
           1e-9 * bytes / s, 1e-7 * bytes / s / read_gbps);
    fflush(stdout);
}

/* ---- the command line --------------------------------------------------------------------------------- */

static int numbers(int64_t *out, const char *text)
{
    int n = 0;
    for (; *text && n < LIST; text += *text == ',')
        out[n++] = strtoll(text, (char **)&text, 10);
    return n;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"shapes", 1, NULL, 's'},  {"batches", 1, NULL, 'b'}, {"positions", 1, NULL, 'p'},
        {"seconds", 1, NULL, 't'}, {"ops", 1, NULL, 'o'},     {"dtype", 1, NULL, 'd'},
        {"json", 1, NULL, 'j'},    {"read", 1, NULL, 'r'},    {NULL, 0, NULL, 0}};
    static const char *const dtypes[] = {"f32", "bf16", "f16"};
    const char *wanted = "385m,1b,7b";
    int64_t batches[LIST] = {1}, positions[LIST] = {0};
    int n_batches = 1, n_positions = 1, n_ops = 0, c;
    int64_t ops[LIST];
    double seconds = 0.3;
    enum ltn_dtype dtype = LTN_BF16;

    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (c) {
        case 's':
            wanted = optarg;
            break;
        case 'b':
            n_batches = numbers(batches, optarg);
            break;
        case 'p':
            n_positions = numbers(positions, optarg);
            break;
        case 't':
            seconds = atof(optarg);
            break;
        case 'r':
            read_gbps = atof(optarg);
            break;
        case 'o':
            n_ops = numbers(ops, optarg);
            break;
        case 'd':
            for (int i = 0; i < 3; i++)
                if (strcmp(optarg, dtypes[i]) == 0)
                    dtype = (enum ltn_dtype)i;
            break;
        case 'j':
            json = fopen(optarg, "w");
            if (!json) {
                perror(optarg);
                return 1;
            }
            break;
        default:
            return 2;
        }
    }
    double start = now();
    struct ltn_backend *be = open_cuda(dtype);
    printf("%s, opened in %.0f ms\n", be->name, 1e3 * (now() - start));
    if (read_gbps == 0)
        measure_bandwidth(be);
    printf("read %.0f GB/s, copy %.0f GB/s (read and written)\n", read_gbps, copy_gbps);
    if (json) {
        double upload_gbps = measure_upload(be);
        printf("upload %.1f GB/s\n", upload_gbps);
        char date[32];
        time_t t = time(NULL);
        strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime(&t));
        fprintf(json,
                "{\"device\": \"%s\", \"date\": \"%s\", \"read_gbps\": %.1f, \"copy_gbps\": %.1f, "
                "\"upload_gbps\": %.1f, "
                "\"rows\": [",
                be->name, date, read_gbps, copy_gbps, upload_gbps);
    }
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct bench b = {0};
        if (!strstr(wanted, shapes[i].name))
            continue;
        model_make(&b.model, &shapes[i], be, dtype);
        for (int k = 0; k < n_batches; k++) {
            const struct ltn_config *config = &b.model.config;
            const size_t floats = ltn_state_offset(config, config->n_layers);
            b.batch = (int32_t)batches[k];
            b.seqs = calloc((size_t)b.batch, sizeof *b.seqs);
            check(ltn_workspace_create(&b.ws, &b.model, b.batch, b.batch, &err));
            check(be->ops->alloc(be, (void **)&b.states, floats * (size_t)b.batch * sizeof(float), &err));
            for (int32_t j = 0; j < b.batch; j++)
                b.seqs[j] = (struct ltn_seq){b.states + floats * (size_t)j, 0, j, 1};
            for (int p = 0; seconds > 0 && p < n_positions; p++)
                bench_step(&b, shapes[i].name, positions[p], seconds, dtypes[dtype]);
            for (int op = 0; op < n_ops; op++)
                bench_op(&b, shapes[i].name, (int)ops[op]);
            be->ops->free(be, b.states);
            ltn_workspace_free(&b.ws);
            free(b.seqs);
        }
        ltn_model_free(&b.model);
    }
    if (json) {
        fprintf(json, "\n]}\n");
        if (fclose(json) != 0) {
            perror("bench_decode: writing");
            return 1;
        }
    }
    be->ops->close(be);
    return 0;
}
