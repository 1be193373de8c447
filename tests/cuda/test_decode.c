/* Decoding on the CUDA backend beyond single operations: recorded steps against the forward pass, states that
 * move between backends, fused operations against their compositions, long positions. */
#include "model/decoder.h"
#include "tests/cuda/device.h"
#include "tests/rounding.h"
#include "tests/support.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { STREAMS = 70, VOCAB = 311, MAX_ROWS = 256 };

struct rig {
    struct ltn_backend *be;
    struct ltn_checkpoint ck;
    struct ltn_model model;
    struct ltn_workspace ws;
    size_t state_bytes;
    int n_states;
    float *state[STREAMS];
};

static const struct ltn_config shape = {.vocab_size = VOCAB,
                                        .embed_dim = 128,
                                        .hidden_dim = 128,
                                        .n_layers = 3,
                                        .n_heads = 2,
                                        .glu_dim = 352,
                                        .act = LTN_ACT_SILU,
                                        .tied = true,
                                        .bos_id = -1,
                                        .eos_id = -1,
                                        .pad_id = -1,
                                        .lrpe = {1, 0, 0}};

/* Random codes, each by itself, and random scales in place of those of a random model, which repeat. */
static void scramble(struct ltn_backend *be, const struct ltn_matrix *m, struct test_rng *rng)
{
    static const float usual[LTN_N_DTYPES] = {[LTN_Q8] = 1.3e-4f, [LTN_FP8] = 2e-4f, [LTN_Q4] = 2e-3f};
    const size_t row = ltn_row_bytes(m->dtype, (size_t)m->cols), n = row * (size_t)m->rows;
    const size_t row_scales = ltn_row_scales(m->dtype, (size_t)m->cols), n_scales = row_scales * m->rows;
    const size_t row_scale_bytes = ltn_row_scale_bytes(m->dtype, (size_t)m->cols);
    uint8_t *codes = malloc(n), *scales = malloc(row_scale_bytes * (size_t)m->rows);
    struct ltn_error err = {0};
    assert_true(codes && scales);
    for (size_t i = 0; i < n; i++) {
        codes[i] = (uint8_t)test_below(rng, 256);
        if (m->dtype == LTN_FP8 ? (codes[i] & 0x7f) > 0x70 : m->dtype == LTN_Q8 && codes[i] == 0x80)
            codes[i] = 0x31;
    }
    for (size_t i = 0; i < n_scales; i++)
        ltn_quant_put_scale(m->dtype, scales + i / row_scales * row_scale_bytes, i % row_scales,
                            usual[m->dtype] * (float)(1 + test_below(rng, 1000) / 500.0));
    CHECK(be->ops->upload(be, (void *)m->data, codes, n, &err));
    CHECK(be->ops->upload(be, (void *)m->scales, scales, row_scale_bytes * (size_t)m->rows, &err));
    free(codes);
    free(scales);
}

static void random_model(struct ltn_model *model, const struct ltn_config *config, enum ltn_dtype dtype,
                         struct ltn_backend *be)
{
    struct ltn_error err = {0};
    struct test_rng rng = {7};
    CHECK(ltn_model_random(model, config, dtype, be, &err));
    if (!ltn_is_quantised(dtype))
        return;
    scramble(be, &model->embed, &rng);
    for (int i = 0; i < config->n_layers; i++) {
        const struct ltn_layer *l = &model->layers[i];
        const struct ltn_linear *all[] = {&l->qkv, &l->out, &l->l1, &l->l2, &l->l3};
        for (size_t k = 0; k < sizeof all / sizeof *all; k++)
            scramble(be, &all[k]->w, &rng);
    }
}

static const char *model_path(enum ltn_dtype dtype)
{
    static char path[3][512];
    if (!path[dtype][0]) {
        snprintf(path[dtype], sizeof path[dtype], "%s/%s.ltn", test_folder(), ltn_dtype_name(dtype));
        test_write_model(shape, dtype, 21, path[dtype]);
    }
    return path[dtype];
}

/* Takes the backend over. config: of a model from random_model(), or NULL for that of the small
 * shape. */
static void rig_open(struct rig *r, enum ltn_dtype dtype, struct ltn_backend *be,
                     const struct ltn_config *config, int streams)
{
    struct ltn_config units = shape;
    struct ltn_error err = {0};
    units.embed_dim = units.hidden_dim = 256; /* in whole units of the step's kernel */
    units.glu_dim = 768;
    memset(r, 0, sizeof *r);
    r->be = be;
    r->n_states = streams;
    if (!config && ltn_is_quantised(dtype))
        config = &units;
    if (config) {
        struct ltn_config checked = *config;
        CHECK(ltn_config_check(&checked, &err));
        random_model(&r->model, &checked, dtype, r->be);
    } else {
        CHECK(ltn_checkpoint_open(&r->ck, model_path(dtype), &err));
        CHECK(ltn_model_load(&r->model, &r->ck, r->be, NULL, NULL, &err));
    }
    CHECK(ltn_workspace_create(&r->ws, &r->model, MAX_ROWS, streams, &err));
    r->state_bytes = ltn_state_offset(&r->model.config, r->model.config.n_layers) * sizeof(float);
    for (int i = 0; i < streams; i++) {
        CHECK(r->be->ops->alloc(r->be, (void **)&r->state[i], r->state_bytes, &err));
        CHECK(r->be->ops->zero(r->be, r->state[i], r->state_bytes, &err));
    }
}

static void small_open(struct rig *r, enum ltn_dtype dtype, struct ltn_backend *be)
{
    rig_open(r, dtype, be, NULL, STREAMS);
}

static void rig_close(struct rig *r)
{
    for (int i = 0; i < r->n_states; i++)
        r->be->ops->free(r->be, r->state[i]);
    ltn_workspace_free(&r->ws);
    ltn_model_free(&r->model);
    ltn_checkpoint_close(&r->ck);
    r->be->ops->close(r->be);
}

static int argmax(const float *x, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

/* Greedy continuation by one forward pass a step, n streams at once; out: [steps, n], logits: [n, VOCAB]. */
static void walk(struct rig *r, const int32_t *first, int n, int64_t pos, int steps, int32_t *out,
                 float *logits)
{
    struct ltn_error err = {0};
    int32_t ids[STREAMS];
    memcpy(ids, first, (size_t)n * sizeof *ids);
    for (int s = 0; s < steps; s++) {
        struct ltn_seq seqs[STREAMS];
        for (int i = 0; i < n; i++)
            seqs[i] = (struct ltn_seq){r->state[i], pos + s, i, 1};
        CHECK(ltn_forward(&r->model, &r->ws, ids, n, seqs, n, LTN_WANT_LAST, NULL, &err));
        CHECK(r->be->ops->download(r->be, logits, r->ws.logits, (size_t)n * VOCAB * sizeof(float), &err));
        for (int i = 0; i < n; i++)
            out[s * n + i] = ids[i] = argmax(logits + (size_t)i * VOCAB, VOCAB);
    }
}

static void zero_states(struct rig *r)
{
    struct ltn_error err = {0};
    for (int i = 0; i < r->n_states; i++)
        CHECK(r->be->ops->zero(r->be, r->state[i], r->state_bytes, &err));
}

/* Recorded steps are the forward pass, bit for bit: tokens, logits and states, over calls that wrap the log.
 */
static void test_stepper(void **state)
{
    enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*state;
    static const int streams[] = {1, 3, 8, STREAMS};
    struct ltn_error err = {0};
    struct rig r;
    small_open(&r, dtype, open_cuda(dtype));
    for (size_t k = 0; k < sizeof streams / sizeof *streams; k++) {
        enum { STEPS = 50, LOG = 13 };
        const int n = streams[k];
        if (ltn_is_quantised(dtype) && n > 4)
            break; /* recorded, they go row by row; else by a matrix in bf16 */
        int32_t first[STREAMS], *a = malloc(sizeof(int32_t) * STEPS * STREAMS),
                                *b = malloc(sizeof(int32_t) * STEPS * STREAMS);
        float *la = malloc(sizeof(float) * STREAMS * VOCAB), *lb = malloc(sizeof(float) * STREAMS * VOCAB);
        uint8_t *sa = malloc(r.state_bytes), *sb = malloc(r.state_bytes);
        struct ltn_seq seqs[STREAMS];
        struct ltn_stepper stepper;
        assert_true(a && b && la && lb && sa && sb);
        for (int i = 0; i < n; i++) {
            first[i] = (7 * i + 3) % VOCAB;
            seqs[i] = (struct ltn_seq){r.state[i], 1000, 0, 0};
        }
        zero_states(&r);
        CHECK(ltn_stepper_create(&stepper, &r.model, &r.ws, seqs, n, LOG, NULL, &err));
        for (int done = 0; done < STEPS;) {
            int m = done == 0 ? 1 : done + 10 <= STEPS ? 10 : STEPS - done;
            CHECK(ltn_stepper_run(&stepper, done ? NULL : first, NULL, m, a + done * n, &err));
            done += m;
        }
        CHECK(r.be->ops->download(r.be, la, r.ws.logits, (size_t)n * VOCAB * sizeof(float), &err));
        CHECK(r.be->ops->download(r.be, sa, r.state[n - 1], r.state_bytes, &err));
        ltn_stepper_free(&stepper);
        zero_states(&r);
        walk(&r, first, n, 1000, STEPS, b, lb);
        CHECK(r.be->ops->download(r.be, sb, r.state[n - 1], r.state_bytes, &err));
        assert_memory_equal(a, b, sizeof(int32_t) * STEPS * (size_t)n);
        assert_memory_equal(la, lb, sizeof(float) * VOCAB * (size_t)n);
        assert_memory_equal(sa, sb, r.state_bytes);
        free(a), free(b), free(la), free(lb), free(sa), free(sb);
    }
    rig_close(&r);
}

static double rms_error(const float *found, const float *expected, size_t n)
{
    double ss = 0, diff = 0;
    for (size_t i = 0; i < n; i++) {
        ss += (double)expected[i] * expected[i];
        diff += ((double)found[i] - expected[i]) * ((double)found[i] - expected[i]);
    }
    return sqrt(diff / ss);
}

/* Which tokens the backend took through the model at once. */
static enum ltn_status (*real_step)(struct ltn_backend *, const struct ltn_network *, const struct ltn_seq *,
                                    const int32_t *, float *, struct ltn_error *);
static int steps_taken;

static enum ltn_status counted_step(struct ltn_backend *be, const struct ltn_network *net,
                                    const struct ltn_seq *seq, const int32_t *id, float *logits,
                                    struct ltn_error *err)
{
    enum ltn_status status = real_step(be, net, seq, id, logits, err);
    steps_taken += status == LTN_OK;
    return status;
}

static struct ltn_backend *open_cpu(int n_threads)
{
    struct ltn_backend *be;
    struct ltn_error err = {0};
    CHECK(ltn_cpu_open(&be, n_threads, &err));
    return be;
}

static struct ltn_backend *open_reference(void)
{
    struct ltn_backend *be;
    struct ltn_error err = {0};
    CHECK(ltn_reference_open(&be, &err));
    return be;
}

enum way { WHOLE_STEP, FUSED, COMPOSED, N_WAYS };
static const char *const way_names[] = {"whole step", "fused", "composed"};

/* What is rounded on a way through the model: the i-th possibility, depending on the GPU, or NULL.
 *   whole step   of 16-bit weights x is bf16 where it enters a product, and with bf16 all that tensor cores
 *                read; quantised ones meet integers (step.cu, step_quant.cuh)
 *   fused        a kernel a product has everything in f32 inside (gemv.cu, gemv_quant.cu); where a block's
 *                shared memory is too small for that, Norm(x) is bf16, and so are quantised weights
 *                (batch.cu, linear_quant.cu)
 *   composed     every operation leaves bf16 */
static const struct rounding *possible(enum ltn_dtype dtype, enum way way, int i)
{
    static const struct rounding of_bf16 = {.stream = true, .gated = true}, of_f16 = {.stream = true},
                                 quantised = {.stream = true, .integer = 128}, inside = {.qkv = true},
                                 batch = {.qkv = true, .normed = true, .weights = true},
                                 composed = {.qkv = true, .normed = true, .outputs = true},
                                 wide = {.qkv = true, .normed = true, .outputs = true, .weights = true};
    const struct rounding *const list[N_WAYS][3] = {
        [WHOLE_STEP] = {dtype == LTN_BF16  ? &of_bf16
                        : dtype == LTN_F16 ? &of_f16
                                           : &quantised},
        [FUSED] = {&inside, &batch},
        [COMPOSED] = {&composed, ltn_is_quantised(dtype) ? &wide : NULL},
    };
    return list[way][i];
}

/* `plain`, to be told what to round; of f32 there is nothing. */
static struct ltn_backend *rounding(struct ltn_backend *plain, enum ltn_dtype dtype)
{
    struct ltn_error err = {0};
    if (dtype != LTN_F32)
        CHECK(rounding_open(&plain, plain, &err));
    return plain;
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

enum { TOKENS = 40, LISTED = 2 /* possible roundings of a way */ };

/* How far apart tokens are, sorted, by every rounding. */
struct apart {
    double of[LISTED][TOKENS];
    int roundings, tokens;
};

/* Feeds one token after another to the device, and each also to the reference, from the state that the device
 * has got to: how far apart logits and state are then. Every way has a stream of its own, as a stream that
 * goes on is recorded. */
static void follow(struct rig *r, const struct ltn_ops *ops, struct rig *ref, enum way way, int tokens,
                   struct apart *apart)
{
    const struct ltn_ops *full = r->be->ops;
    const int32_t V = r->model.config.vocab_size;
    const enum ltn_dtype dtype = r->model.layers[0].qkv.w.dtype;
    struct ltn_error err = {0};
    float *state = malloc(r->state_bytes), *logits = malloc((size_t)V * sizeof *logits);
    assert_true(state && logits);
    apart->tokens = tokens;
    apart->roundings = 1;
    while (apart->roundings < LISTED && dtype != LTN_F32 && possible(dtype, way, apart->roundings))
        apart->roundings++;
    CHECK(full->zero(r->be, r->state[way], r->state_bytes, &err));
    for (int t = 0; t < tokens; t++) {
        const int32_t id = (t * 7919 + 5) % V;
        struct ltn_seq seq = {r->state[way], 3000 + t, 0, 1};
        for (int i = 0; i < apart->roundings; i++)
            CHECK(full->download(r->be, ref->state[i], seq.state, r->state_bytes, &err));
        r->be->ops = ops;
        CHECK(ltn_forward(&r->model, &r->ws, &id, 1, &seq, 1, LTN_WANT_LAST, NULL, &err));
        r->be->ops = full;
        CHECK(full->download(r->be, logits, r->ws.logits, (size_t)V * sizeof *logits, &err));
        CHECK(full->download(r->be, state, seq.state, r->state_bytes, &err));
        for (int i = 0; i < apart->roundings; i++) {
            if (dtype != LTN_F32)
                rounding_set(ref->be, possible(dtype, way, i));
            seq.state = ref->state[i];
            CHECK(ltn_forward(&ref->model, &ref->ws, &id, 1, &seq, 1, LTN_WANT_LAST, NULL, &err));
            apart->of[i][t] = fmax(rms_error(logits, ref->ws.logits, (size_t)V),
                                   rms_error(state, seq.state, r->state_bytes / sizeof(float)));
        }
    }
    for (int i = 0; i < apart->roundings; i++)
        qsort(apart->of[i], (size_t)tokens, sizeof *apart->of[i], ascending);
    free(state);
    free(logits);
}

static bool is_hopper(const struct ltn_backend *be)
{
    return strstr(be->name, "H100") || strstr(be->name, "H200");
}

/* How far two ways may be apart that round in different places, where a fault in the order of operations or
 * in the state makes them differ by more than half. What each kernel computes is tested more sharply
 * elsewhere: products in test_ops and test_quant, the whole step below. */
static double apart_at_most(enum ltn_dtype dtype)
{
    return dtype == LTN_F32 ? 1e-5 : ltn_is_quantised(dtype) ? 0.05 : 0.02;
}

/* What is left between a way and the reference that rounds in the same places are sums in another order, 1e-7
 * of their terms; where that carries one number over to the next bf16 or integer, all behind it follows. So
 * tokens fall in two kinds: those that agree best tell whether a way is right, and how many there are is
 * chance. An imitation of the quantised steps on the CPU, 600 models of this shape in q4 and 600 in q8, 40
 * tokens each: a third of the tokens differ by 2e-4 at most, the fourth best by 8e-5 at most, the eleventh by
 * more than 2e-4 in a quarter of the models, and the worst by .005 in the median, by more than .02 in one
 * model of a hundred. With one fault in one matrix, 40 models each, the fourth best at least and in the
 * median: a group of 32 weights lost in one row 5e-4 and 2e-3, a row's scales one group off 6e-4 and 3e-3,
 * those of its neighbour 4e-4 and 3e-3, a stale number between products 2e-3 and 6e-3. The fused and the
 * composed operations are held to apart_at_most() alone. allowed: what the best tenth of the tokens may
 * differ by. */
static void judge(const struct apart *apart, enum ltn_dtype dtype, enum way way, double allowed)
{
    const int last = apart->tokens > 10 ? apart->tokens / 10 - 1 : 0; /* of that tenth */
    double best = INFINITY, most = INFINITY;
    for (int i = 0; i < apart->roundings; i++) {
        const double *of = apart->of[i];
        print_message("%s, rounding %d: best tenth %.3g, median %.3g, most %.3g\n", way_names[way], i,
                      of[last], of[apart->tokens / 2], of[apart->tokens - 1]);
        if (of[last] < best)
            best = of[last], most = of[apart->tokens - 1];
    }
    if (!(most <= fmin(way == WHOLE_STEP ? 0.02 : 1, apart_at_most(dtype))) || !(best <= allowed))
        fail_msg("%s: the best tenth of the tokens differ by up to %.3g, one by %.3g", way_names[way], best,
                 most);
}

enum { WIDE_VOCAB = 24000 };

static struct ltn_config wide_config(enum ltn_dtype dtype)
{
    return (struct ltn_config){.vocab_size = WIDE_VOCAB,
                               .embed_dim = ltn_is_quantised(dtype) ? 2304 : 2176,
                               .hidden_dim = ltn_is_quantised(dtype) ? 2304 : 2176,
                               .n_layers = 2,
                               .n_heads = 8,
                               .glu_dim = dtype == LTN_F32          ? 2056
                                          : ltn_is_quantised(dtype) ? 6400
                                                                    : 6152,
                               .act = LTN_ACT_SILU,
                               .tied = true,
                               .bos_id = -1,
                               .eos_id = -1,
                               .pad_id = -1,
                               .lrpe = {1, 0}};
}

/* Every way of a token, against the plain reference that rounds in the same places. */
static void test_rounding(void **test_state)
{
    enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*test_state;
    struct rig r, ref;
    struct apart apart;
    small_open(&r, dtype, open_cuda(dtype));
    small_open(&ref, dtype, rounding(open_reference(), dtype));
    const struct ltn_ops *full = r.be->ops;
    struct ltn_ops ways[N_WAYS] = {*full, *full, *full};
    assert_non_null(full->step);
    real_step = full->step;
    ways[WHOLE_STEP].step = counted_step;
    ways[FUSED].step = ways[COMPOSED].step = NULL;
    ways[COMPOSED].norm_linear = NULL;
    ways[COMPOSED].norm_glu = NULL;
    ways[COMPOSED].gated_linear_add = NULL;
    ways[COMPOSED].lightning_linear_add = NULL;
    ways[COMPOSED].norm_logits = NULL;
    for (int way = 0; way < N_WAYS; way++) {
        steps_taken = 0;
        follow(&r, &ways[way], &ref, way, TOKENS, &apart);
        if (way == WHOLE_STEP && steps_taken == 0) /* test_released says where that is wrong */
            print_message("no whole step here\n"); /* fused, then */
        else
            judge(&apart, dtype, way, way == WHOLE_STEP ? 2e-4 : 1);
    }
    rig_close(&ref);
    rig_close(&r);

    /* and sizes beyond one round of anything, with remainders everywhere */
    const struct ltn_config large = wide_config(dtype);
    rig_open(&r, dtype, open_cuda(dtype), &large, 1);
    rig_open(&ref, dtype, rounding(open_reference(), dtype), &large, LISTED);
    ways[WHOLE_STEP] = *r.be->ops;
    ways[WHOLE_STEP].step = counted_step;
    steps_taken = 0;
    follow(&r, &ways[WHOLE_STEP], &ref, WHOLE_STEP, 4, &apart);
    if (steps_taken > 0)
        judge(&apart, dtype, WHOLE_STEP,
              0.02); /* with so many sums, one of each token is rounded otherwise */
    rig_close(&ref);
    rig_close(&r);
}

/* Sizes beyond one round of anything in the kernel of a whole step, with remainders everywhere: against the
 * fused operations, twice for the same bits, and over again from copies of one state. */
static void test_wide(void **state)
{
    enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*state;
    enum { V = WIDE_VOCAB, N = 12, REPEATS = 100, WAYS = 3 };
    struct ltn_config config = wide_config(dtype);
    struct ltn_error err = {0};
    struct ltn_backend *be = open_cuda(dtype);
    struct ltn_model model;
    struct ltn_workspace ws;
    float *states[WAYS], *logits[WAYS];
    size_t bytes;

    CHECK(ltn_config_check(&config, &err));
    bytes = ltn_state_offset(&config, config.n_layers) * sizeof(float);
    random_model(&model, &config, dtype, be);
    CHECK(ltn_workspace_create(&ws, &model, 1, 1, &err));
    const struct ltn_ops *full = be->ops;
    struct ltn_ops counted = *full, composed = *full;
    real_step = full->step;
    steps_taken = 0;
    counted.step = counted_step;
    composed.step = NULL;
    for (int way = 0; way < WAYS; way++) {
        CHECK(full->alloc(be, (void **)&states[way], bytes, &err));
        CHECK(full->zero(be, states[way], bytes, &err));
        assert_non_null(logits[way] = malloc(V * sizeof(float)));
    }
    double most = 0;
    int far = 0;
    for (int t = 0; t < N; t++) {
        const int32_t id = (t * 7919 + 5) % V;
        for (int way = 0; way < WAYS; way++) {
            struct ltn_seq seq = {states[way], 3000 + t, 0, 1};
            be->ops = way == 1 ? &composed : &counted;
            CHECK(ltn_forward(&model, &ws, &id, 1, &seq, 1, LTN_WANT_LAST, NULL, &err));
            CHECK(full->download(be, logits[way], ws.logits, V * sizeof(float), &err));
        }
        double error = rms_error(logits[0], logits[1], V);
        most = fmax(most, error);
        far += !(error <= (dtype == LTN_F32 ? 1e-5 : 0.02));
        assert_memory_equal(logits[0], logits[2], V * sizeof(float));
    }
    /* Of q4, single tokens of this model are made of what nearly cancels, and the two ways, which do not
     * round in the same places, part there; test_rounding has the whole step against its own rounding. */
    if (far > (dtype == LTN_Q4 ? N / 4 : 0) || !(most <= 0.5))
        fail_msg("%d of %d tokens: whole-step and fused logits differ by up to %.3g", far, N, most);
    print_message("whole step from fused: %.3g\n", most);
    be->ops = &counted;
    for (int i = 0; i < REPEATS; i++) {
        const int32_t id = 77;
        struct ltn_seq seq = {states[2], 5000, 0, 1};
        CHECK(full->copy(be, states[2], states[0], bytes, &err));
        CHECK(ltn_forward(&model, &ws, &id, 1, &seq, 1, LTN_WANT_LAST, NULL, &err));
        CHECK(full->download(be, logits[i ? 1 : 0], ws.logits, V * sizeof(float), &err));
        if (i)
            assert_memory_equal(logits[0], logits[1], V * sizeof(float));
    }
    if (strstr(be->name, "H100") || strstr(be->name, "H200"))
        assert_true(steps_taken >= 2 * N); /* repeats may come from a recording */
    be->ops = full;
    for (int way = 0; way < WAYS; way++) {
        full->free(be, states[way]);
        free(logits[way]);
    }
    ltn_workspace_free(&ws);
    ltn_model_free(&model);
    full->close(be);
}

/* The released shapes (of types for tests alone the smallest) and one with more heads, two layers of each: no
 * fused operation is missing on an H100, the kernel of a whole step takes them, and agrees with the fused
 * operations. */
static void test_released(void **state)
{
    enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*state;
    enum { WAYS = 2, TOKENS = 3 };
    static const char *const names[] = {"385m", "1b", "7b", "40 heads"};
    struct ltn_error err = {0};
    struct ltn_backend *be = open_cuda(dtype);
    const struct ltn_ops *full = be->ops;
    const bool hopper = is_hopper(be);
    const struct {
        const char *name;
        bool set;
    } slots[] = {{"norm_linear", full->norm_linear},
                 {"norm_glu", full->norm_glu},
                 {"gated_linear_add", full->gated_linear_add},
                 {"lightning_linear_add", full->lightning_linear_add},
                 {"norm_logits", full->norm_logits},
                 {"matrix_fp8", full->matrix_fp8},
                 {"step", full->step},
                 {"sample", full->sample},
                 {"record", full->record},
                 {"recorded", full->recorded},
                 {"replay", full->replay}};
    int missing = 0;
    for (size_t i = 0; i < sizeof slots / sizeof *slots; i++) {
        print_message("%s%s%s", i ? ", " : "fused: ", slots[i].name, slots[i].set ? "" : " (missing)");
        missing += !slots[i].set;
    }
    print_message("\n");
    if (hopper)
        assert_int_equal(missing, 0);

    struct ltn_ops counted = *full, composed = *full;
    real_step = full->step;
    counted.step = counted_step;
    composed.step = NULL;
    const bool all = dtype == LTN_BF16 || ltn_is_quantised(dtype);
    struct ltn_config config;
    for (size_t k = 0; k < (all ? sizeof names / sizeof *names : 1); k++) {
        struct ltn_model model;
        struct ltn_workspace ws;
        float *states[WAYS], *logits[WAYS];
        double most = 0;
        if (k < 3) {
            CHECK(ltn_config_released(&config, names[k], &err));
        } else { /* from the last: a state that takes more rounds than are fetched ahead */
            config.embed_dim = config.hidden_dim = config.glu_dim = 5120;
            config.n_heads = 40;
            CHECK(ltn_config_check(&config, &err));
        }
        config.n_layers = 2;
        const size_t bytes = ltn_state_offset(&config, config.n_layers) * sizeof(float);
        const int32_t V = config.vocab_size;
        CHECK(ltn_model_random(&model, &config, dtype, be, &err));
        CHECK(ltn_workspace_create(&ws, &model, 1, 1, &err));
        steps_taken = 0;
        for (int way = 0; way < WAYS; way++) {
            CHECK(full->alloc(be, (void **)&states[way], bytes, &err));
            CHECK(full->zero(be, states[way], bytes, &err));
            assert_non_null(logits[way] = malloc((size_t)V * sizeof(float)));
        }
        for (int t = 0; t < TOKENS; t++) {
            const int32_t id = (t * 7919 + 5) % V;
            for (int way = 0; way < WAYS; way++) {
                struct ltn_seq seq = {states[way], 3000 + t, 0, 1};
                be->ops = way ? &composed : &counted;
                CHECK(ltn_forward(&model, &ws, &id, 1, &seq, 1, LTN_WANT_LAST, NULL, &err));
                CHECK(full->download(be, logits[way], ws.logits, (size_t)V * sizeof(float), &err));
            }
            most = fmax(most, rms_error(logits[0], logits[1], V));
        }
        be->ops = full;
        print_message("%s: whole step from fused %.3g\n", names[k], most);
        if (!(most <= (dtype == LTN_F32 ? 1e-5 : 0.02)))
            fail_msg("%s: whole-step and fused logits differ by %.3g", names[k], most);
        if (hopper)
            assert_int_equal(steps_taken, TOKENS);
        for (int way = 0; way < WAYS; way++) {
            full->free(be, states[way]);
            free(logits[way]);
        }
        ltn_workspace_free(&ws);
        ltn_model_free(&model);
    }
    full->close(be);
}

static void check_split(struct rig *r, const float *found, const float *whole, const char *calls)
{
    /* of quantised weights, many rows are multiplied by a matrix rounded to bf16 */
    const enum ltn_dtype dtype = r->model.embed.dtype;
    const double error = rms_error(found, whole, VOCAB);
    if (!(error <= (dtype == LTN_F32 ? 1e-5 : ltn_is_quantised(dtype) ? 0.05 : 0.02)))
        fail_msg("calls of %s tokens: logits differ by %.3g", calls, error);
}

/* Feeds n tokens to the first stream, which stands at pos. */
static void feed(struct rig *r, const int32_t *ids, int n, int64_t pos)
{
    struct ltn_error err = {0};
    struct ltn_seq seq = {r->state[0], pos, 0, n};
    CHECK(ltn_forward(&r->model, &r->ws, ids, n, &seq, 1, LTN_WANT_LAST, NULL, &err));
}

/* Any split of a text into calls gives the same logits and state. */
static void test_split(void **state)
{
    enum { N = 200 };
    static const int steps[] = {N, 1, 64, 65, 7, 0};
    struct ltn_error err = {0};
    struct test_rng rng = {99};
    int32_t ids[N];
    float whole[VOCAB], logits[VOCAB];
    struct rig r;
    const enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*state;
    small_open(&r, dtype, open_cuda(dtype));
    for (int i = 0; i < N; i++)
        ids[i] = test_below(&rng, VOCAB);
    for (size_t k = 0; k < sizeof steps / sizeof *steps; k++) {
        char calls[16];
        zero_states(&r);
        for (int at = 0, m; at < N; at += m) {
            m = steps[k] ? steps[k] : 1 + test_below(&rng, 40);
            m = m < N - at ? m : N - at;
            feed(&r, ids + at, m, 5000000 + at);
        }
        CHECK(r.be->ops->download(r.be, k ? logits : whole, r.ws.logits, sizeof logits, &err));
        snprintf(calls, sizeof calls, "%d", steps[k]);
        if (k)
            check_split(&r, logits, whole, calls);
    }
    rig_close(&r);
}

/* The same of a text as short as it can be and still take every kernel: what the sanitizers run. */
static void test_short_split(void **state)
{
    enum { N = 70, CUTS = 3, MOST = 5 };
    static const int cuts[CUTS][MOST] = {{N}, {65, 4, 1}, {64, 3, 1, 1, 1}};
    struct ltn_error err = {0};
    int32_t ids[N];
    float logits[CUTS][VOCAB];
    struct rig r;
    const enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*state;
    small_open(&r, dtype, open_cuda(dtype));
    for (int i = 0; i < N; i++)
        ids[i] = (31 * i + 7) % VOCAB;
    for (int k = 0; k < CUTS; k++) {
        CHECK(r.be->ops->zero(r.be, r.state[0], r.state_bytes, &err));
        for (int i = 0, at = 0; i < MOST && cuts[k][i]; at += cuts[k][i++])
            feed(&r, ids + at, cuts[k][i], 5000000 + at);
        CHECK(r.be->ops->download(r.be, logits[k], r.ws.logits, sizeof logits[k], &err));
        if (k)
            check_split(&r, logits[k], logits[0], k == 1 ? "65, 4, 1" : "64, 3, 1, 1, 1");
    }
    rig_close(&r);
}

/* Passes of all sizes, of one text and of several, and steps that were recorded before, allocate nothing:
 * what they need beside the workspace was reserved with it. A recording goes on to work when the room is made
 * larger, and all goes on when it cannot be. */
static void test_room(void **state)
{
    enum ltn_dtype dtype = (enum ltn_dtype)(intptr_t)*state;
    enum { ROWS = 2000, LARGER = 8192, STEPS = 3, RUNS = 2 };
    static const int32_t sizes[] = {ROWS, 1, 2, 5, 64, 65, 300, 1000, ROWS, 1};
    const struct ltn_attention wide = {.n_heads = 16, .head_dim = 256};
    struct ltn_config config = shape;
    struct ltn_error err = {0};
    struct ltn_backend *be = open_cuda(dtype);
    struct ltn_model model;
    struct ltn_workspace ws, larger;
    struct ltn_stepper stepper;
    struct ltn_seq seqs[STREAMS];
    float *states;
    int32_t *ids = calloc(LARGER, sizeof *ids), *out[RUNS];

    config.embed_dim = config.hidden_dim = 512;
    config.n_heads = 4;
    config.glu_dim = 1408;
    CHECK(ltn_config_check(&config, &err));
    random_model(&model, &config, dtype, be);
    const size_t floats = ltn_state_offset(&config, config.n_layers), bytes = floats * sizeof(float);
    CHECK(be->ops->alloc(be, (void **)&states, STREAMS * bytes, &err));
    CHECK(be->ops->zero(be, states, STREAMS * bytes, &err));
    assert_non_null(ids);
    for (int i = 0; i < STREAMS; i++)
        seqs[i] = (struct ltn_seq){states + (size_t)i * floats, 0, i, 1};
    for (int i = 0; i < LARGER; i++)
        ids[i] = (i * 37 + i / 300) % VOCAB;
    CHECK(ltn_workspace_create(&ws, &model, ROWS, STREAMS, &err));
    CHECK(ltn_stepper_create(&stepper, &model, &ws, seqs, STREAMS, STEPS, NULL, &err));

    int64_t made = be->n_allocations;
    assert_true(made > 0 && be->room_bytes > 0);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const struct ltn_seq one = {states, 10, 0, sizes[i]};
        CHECK(ltn_forward(&model, &ws, ids, sizes[i], &one, 1, LTN_WANT_LAST, NULL, &err));
        if (be->n_allocations != made)
            fail_msg("a pass of %d rows allocated", sizes[i]);
    }
    struct ltn_seq packed[3] = {
        {states, 0, 0, 1}, {states + floats, 9, 1, 700}, {states + 2 * floats, 0, 701, 1}};
    CHECK(ltn_forward(&model, &ws, ids, 702, packed, 3, LTN_WANT_LAST, NULL, &err));
    CHECK(ltn_forward(&model, &ws, ids, STREAMS, seqs, STREAMS, LTN_WANT_ALL, NULL, &err));
    for (int run = 0; run < RUNS; run++) {
        assert_non_null(out[run] = calloc(STEPS * STREAMS, sizeof **out));
        CHECK(be->ops->zero(be, states, STREAMS * bytes, &err));
        CHECK(ltn_stepper_seek(&stepper, 0, &err));
        CHECK(ltn_stepper_run(&stepper, ids, NULL, STEPS, out[run], &err));
        assert_int_equal(be->n_allocations, made);
        if (run > 0)
            break;
        /* the room grows, and what it was is used by others, as far as it is theirs */
        const size_t room = be->room_bytes;
        const struct ltn_seq one = {states, 0, 0, LARGER};
        CHECK(ltn_workspace_create(&larger, &model, LARGER, 1, &err));
        reserve_room(be, NULL, NULL, &wide, LARGER);    /* on any GPU, where rows count on some alone */
        if (be->room_bytes == room && dtype != LTN_F32) /* f32 has nothing that grows */
            fail_msg("the room of %zu bytes did not grow", room);
        made = be->n_allocations;
        CHECK(ltn_forward(&model, &larger, ids, LARGER, &one, 1, LTN_WANT_LAST, NULL, &err));
    }
    assert_memory_equal(out[0], out[1], STEPS * STREAMS * sizeof **out);

    struct ltn_workspace none;
    assert_int_equal(ltn_workspace_create(&none, &model, 1 << 30, 1, &err), LTN_ERR_MEMORY);
    assert_non_null(strstr(err.text, "needed"));
    assert_non_null(strstr(err.text, "free"));
    const struct ltn_seq one = {states, 0, 0, ROWS};
    CHECK(ltn_forward(&model, &ws, ids, ROWS, &one, 1, LTN_WANT_LAST, NULL, &err));

    ltn_stepper_free(&stepper);
    ltn_workspace_free(&ws);
    ltn_workspace_free(&larger);
    ltn_model_free(&model);
    be->ops->free(be, states);
    for (int run = 0; run < RUNS; run++)
        free(out[run]);
    free(ids);
    be->ops->close(be);
}

/* A state made on one backend goes on upon the other; greedy text is the same for 200 tokens. */
static void test_resume(void **test_state)
{
    enum { N = 100, STEPS = 200 };
    struct ltn_error err = {0};
    struct test_rng rng = {5};
    int32_t ids[N], out[2][STEPS];
    float logits[VOCAB];
    struct rig rigs[2];
    (void)test_state;
    for (int i = 0; i < N; i++)
        ids[i] = test_below(&rng, VOCAB);
    for (int i = 0; i < 2; i++)
        small_open(&rigs[i], LTN_F32, i ? open_cuda(LTN_F32) : open_cpu(2));
    for (int from = 0; from < 2; from++) {
        struct rig *a = &rigs[from], *b = &rigs[!from];
        struct ltn_seq seq = {a->state[0], 0, 0, N};
        uint8_t *bytes = malloc(a->state_bytes);
        assert_non_null(bytes);
        zero_states(a);
        CHECK(ltn_forward(&a->model, &a->ws, ids, N, &seq, 1, LTN_WANT_LAST, NULL, &err));
        CHECK(a->be->ops->download(a->be, logits, a->ws.logits, sizeof logits, &err));
        CHECK(a->be->ops->download(a->be, bytes, a->state[0], a->state_bytes, &err));
        CHECK(b->be->ops->upload(b->be, b->state[0], bytes, b->state_bytes, &err));
        int32_t next = argmax(logits, VOCAB);
        walk(a, &next, 1, N, STEPS, out[0], logits);
        walk(b, &next, 1, N, STEPS, out[1], logits);
        assert_memory_equal(out[0], out[1], sizeof out[0]);
        free(bytes);
    }
    for (int i = 0; i < 2; i++)
        rig_close(&rigs[i]);
}

/* An argument picks tests by name. */
int main(int argc, char **argv)
{
    static const enum ltn_dtype dtypes[] = {LTN_F32, LTN_BF16, LTN_F16, LTN_Q8, LTN_FP8, LTN_Q4};
    static const struct {
        const char *name;
        CMUnitTestFunction run;
    } table[] = {{"recorded steps", test_stepper},
                 {"rounding", test_rounding},
                 {"wide", test_wide},
                 {"released shapes", test_released},
                 {"split invariance", test_split},
                 {"short text", test_short_split},
                 {"room", test_room}};
    enum { N = sizeof table / sizeof *table, TYPES = sizeof dtypes / sizeof *dtypes };
    static char names[TYPES * N][64];
    static struct CMUnitTest tests[TYPES * N + 1];

    for (int i = 0; i < TYPES * N; i++) {
        snprintf(names[i], sizeof names[i], "%s, %s", table[i / TYPES].name,
                 ltn_dtype_name(dtypes[i % TYPES]));
        tests[i] = (struct CMUnitTest){names[i], table[i / TYPES].run, NULL, NULL,
                                       (void *)(intptr_t)dtypes[i % TYPES]};
    }
    tests[TYPES * N] = (struct CMUnitTest)cmocka_unit_test(test_resume);
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
