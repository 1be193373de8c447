/* Reading on the CUDA backend: however a text is cut, the logits and the state are the same within rounding,
 * through sizes at which other kernels take over; the same cut gives the same bits; e4m3 stays near. All
 * memory between the operations is NaN beforehand. */
#include "model/decoder.h"
#include "tests/cuda/device.h"
#include "tests/support.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { VOCAB = 500, CHUNK = 8192, LONGEST = 9001 };

static const struct ltn_config shape = {.vocab_size = VOCAB,
                                        .embed_dim = 512,
                                        .hidden_dim = 512,
                                        .n_layers = 3,
                                        .n_heads = 4,
                                        .glu_dim = 1424,
                                        .act = LTN_ACT_SILU,
                                        .tied = true,
                                        .scale_embedding = true,
                                        .bos_id = -1,
                                        .eos_id = -1,
                                        .pad_id = -1,
                                        .lrpe = {1, 0, 0}};

struct rig {
    struct ltn_backend *be;
    struct ltn_model model;
    struct ltn_workspace ws;
    float *state;
    size_t state_bytes;
};

/* What a text leaves behind. */
struct result {
    float logits[VOCAB];
    float *state;
};

static int32_t text[LONGEST];

static void rig_open(struct rig *r, bool cuda, int32_t rows)
{
    struct ltn_error err = {0};
    struct ltn_config config = shape;
    memset(r, 0, sizeof *r);
    CHECK(ltn_config_check(&config, &err));
    if (cuda)
        r->be = open_cuda(LTN_BF16);
    else
        CHECK(ltn_cpu_open(&r->be, 2, &err));
    CHECK(ltn_model_random(&r->model, &config, LTN_BF16, r->be, &err));
    CHECK(ltn_workspace_create(&r->ws, &r->model, rows, 1, &err));
    r->state_bytes = ltn_state_offset(&config, config.n_layers) * sizeof(float);
    CHECK(r->be->ops->alloc(r->be, (void **)&r->state, r->state_bytes, &err));
}

static void rig_close(struct rig *r)
{
    r->be->ops->free(r->be, r->state);
    ltn_workspace_free(&r->ws);
    ltn_model_free(&r->model);
    r->be->ops->close(r->be);
}

static void poison(struct rig *r)
{
    struct ltn_error err = {0};
    const size_t keep = (size_t)((uint8_t *)r->ws.x - (uint8_t *)r->ws.memory), bytes = r->ws.bytes - keep;
    uint8_t *ones = malloc(bytes);
    assert_non_null(ones);
    memset(ones, 0xff, bytes);
    CHECK(r->be->ops->upload(r->be, r->ws.x, ones, bytes, &err));
    free(ones);
}

/* Reads n tokens in pieces of `most`, or at random of 1 to `most`. */
static void read_text(struct rig *r, struct result *out, int32_t n, int32_t most, struct test_rng *rng)
{
    struct ltn_error err = {0};
    CHECK(r->be->ops->zero(r->be, r->state, r->state_bytes, &err));
    for (int32_t done = 0, rows; done < n; done += rows) {
        rows = rng ? 1 + test_below(rng, test_below(rng, 3) ? most : 70) : most;
        rows = rows < n - done ? rows : n - done;
        const struct ltn_seq seq = {r->state, done, 0, rows};
        poison(r);
        CHECK(ltn_forward(&r->model, &r->ws, text + done, rows, &seq, 1, LTN_WANT_LAST, NULL, &err));
    }
    out->state = malloc(r->state_bytes);
    assert_non_null(out->state);
    CHECK(r->be->ops->download(r->be, out->logits, r->ws.logits, sizeof out->logits, &err));
    CHECK(r->be->ops->download(r->be, out->state, r->state, r->state_bytes, &err));
}

/* rms of the difference over rms of b */
static double apart(const float *a, const float *b, size_t n)
{
    double diff = 0, sum = 0;
    for (size_t i = 0; i < n; i++) {
        diff += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        sum += (double)b[i] * b[i];
    }
    return sqrt(diff / sum);
}

static void check_near(struct rig *r, const char *what, int32_t n, const struct result *a,
                       const struct result *b, double bound)
{
    const double logits = apart(a->logits, b->logits, VOCAB),
                 state = apart(a->state, b->state, r->state_bytes / sizeof(float));
    print_message("# %s, %d tokens: logits %.2g, state %.2g apart\n", what, n, logits, state);
    if (!(logits <= bound) || !(state <= bound))
        fail_msg("%s, %d tokens: logits %g, state %g apart, at most %g expected", what, n, logits, state,
                 bound);
}

static void test_splits(void **state)
{
    (void)state;
    static const int32_t lengths[] = {2, 63, 65, 129, 255, 257, 1025, 4095, 4097, LONGEST};
    struct test_rng rng = {11};
    struct rig r;
    rig_open(&r, true, CHUNK);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        struct result whole, again, cut;
        const int32_t n = lengths[i];
        read_text(&r, &whole, n, CHUNK, NULL);
        read_text(&r, &again, n, CHUNK, NULL);
        assert_memory_equal(whole.logits, again.logits, sizeof whole.logits);
        assert_memory_equal(whole.state, again.state, r.state_bytes);
        for (int k = 0; k < 2; k++) {
            read_text(&r, &cut, n, k ? CHUNK : 600, &rng);
            check_near(&r, "cut at random", n, &cut, &whole, 0.02);
            free(cut.state);
        }
        free(whole.state);
        free(again.state);
    }
    rig_close(&r);
}

static void test_against_cpu(void **state)
{
    (void)state;
    struct rig cuda, cpu;
    struct result found, expected;
    const int32_t n = 1500;
    rig_open(&cuda, true, CHUNK);
    rig_open(&cpu, false, 256);
    read_text(&cuda, &found, n, CHUNK, NULL);
    read_text(&cpu, &expected, n, 256, NULL);
    check_near(&cuda, "against the CPU", n, &found, &expected, 0.04);
    free(found.state);
    free(expected.state);
    rig_close(&cuda);
    rig_close(&cpu);
}

static void test_fp8(void **state)
{
    (void)state;
    struct ltn_error err = {0};
    struct rig r;
    struct result exact, coarse, again;
    rig_open(&r, true, CHUNK);
    read_text(&r, &exact, LONGEST, CHUNK, NULL);
    if (ltn_model_prefill_fp8(&r.model, &err) == LTN_ERR_UNSUPPORTED) {
        rig_close(&r);
        free(exact.state);
        skip();
    }
    ltn_workspace_free(&r.ws); /* what is made after it has room for e4m3 */
    CHECK(ltn_workspace_create(&r.ws, &r.model, CHUNK, 1, &err));
    read_text(&r, &coarse, LONGEST, CHUNK, NULL);
    read_text(&r, &again, LONGEST, CHUNK, NULL);
    assert_memory_equal(coarse.logits, again.logits, sizeof again.logits);
    check_near(&r, "fp8", LONGEST, &coarse, &exact, 0.2);
    assert_true(apart(coarse.logits, exact.logits, VOCAB) > 1e-3); /* it did run in e4m3 */
    free(again.state);
    read_text(&r, &again, LONGEST, 3000, NULL);
    check_near(&r, "fp8, cut otherwise", LONGEST, &again, &coarse, 0.2);
    free(exact.state);
    free(coarse.state);
    free(again.state);
    rig_close(&r);
}

/* The attention with its gate and the sum into the stream, as one operation and as two: states to the bit,
 * and the stream within rounding. */
enum { MOST_SEQS = 4 };
struct mixer_case {
    int32_t n_heads, outs;
    bool lrpe;
    int32_t counts[MOST_SEQS + 1]; /* rows of each sequence, ended by 0 */
};

/* [n] on the device: normal numbers, as bf16 or f32 */
static void *upload_normal(struct ltn_backend *be, size_t n, bool f32, double scale, struct test_rng *rng)
{
    struct ltn_error err = {0};
    const size_t bytes = n * (f32 ? sizeof(float) : sizeof(uint16_t));
    uint8_t *host = malloc(bytes);
    void *device;
    assert_non_null(host);
    for (size_t i = 0; i < n; i++) {
        const float v = (float)(scale * test_normal(rng));
        uint32_t bits;
        memcpy(&bits, &v, sizeof bits);
        const uint16_t upper = (uint16_t)(bits >> 16);
        memcpy(host + (f32 ? 4 * i : 2 * i), f32 ? (const void *)&bits : &upper, f32 ? 4 : 2);
    }
    CHECK(be->ops->alloc(be, &device, bytes, &err));
    CHECK(be->ops->upload(be, device, host, bytes, &err));
    free(host);
    return device;
}

static void check_mixer(struct ltn_backend *be, const struct mixer_case *c, struct test_rng *rng)
{
    enum { E = 128 };
    struct ltn_error err = {0};
    const struct ltn_ops *ops = be->ops;
    const struct ltn_norm norm = {0};
    const size_t H = (size_t)c->n_heads * E, layer = H * E * (c->lrpe ? 2 : 1);
    int32_t rows = 0, n_seqs = 0;
    for (; c->counts[n_seqs]; n_seqs++)
        rows += c->counts[n_seqs];
    const size_t n = (size_t)rows * (size_t)c->outs;
    float slopes[64], theta[64 * E];
    for (int32_t i = 0; i < c->n_heads; i++)
        slopes[i] = (float)exp2(-8.0 * (i + 1) / c->n_heads);
    for (size_t i = 0; i < H; i++)
        theta[i] = (float)pow(10000, -2.0 * (double)i / (double)H);

    uint16_t *qkvu = upload_normal(be, (size_t)rows * 4 * H, false, 1, rng);
    void *w = upload_normal(be, (size_t)c->outs * H, false, 0.05, rng);
    float *x = upload_normal(be, n, true, 0, rng), *slopes_at = upload_normal(be, H, true, 0, rng);
    float *theta_at = upload_normal(be, H, true, 0, rng), *state[2];
    void *o = upload_normal(be, (size_t)rows * H, false, NAN, rng);
    void *scratch = upload_normal(be, (size_t)rows * H, false, NAN, rng);
    float *found[2], *states[2];
    CHECK(ops->upload(be, slopes_at, slopes, (size_t)c->n_heads * sizeof *slopes, &err));
    CHECK(ops->upload(be, theta_at, theta, H * sizeof *theta, &err));
    struct test_rng start = *rng;
    for (int i = 0; i < 2; i++) {
        struct test_rng same = start;
        state[i] = upload_normal(be, layer * MOST_SEQS, true, 3, &same);
    }
    const struct ltn_attention a = {c->n_heads, E, slopes_at, c->lrpe ? theta_at : NULL, 0};
    const struct ltn_linear l = {.w = {w, LTN_BF16, c->outs, (int32_t)H, NULL}};
    const int32_t ld = 4 * (int32_t)H;
    reserve_room(be, &l, NULL, &a, rows);
    for (int i = 0; i < 2; i++) {
        struct ltn_seq seqs[MOST_SEQS];
        for (int32_t j = 0, first = 0; j < n_seqs; first += c->counts[j++])
            seqs[j] = (struct ltn_seq){state[i] + (size_t)j * layer, 1000 * j, first, c->counts[j]};
        CHECK(ops->zero(be, x, n * sizeof *x, &err));
        if (i == 0) {
            CHECK(ops->lightning_linear_add(be, x, qkvu, qkvu + H, qkvu + 2 * H, ld, &a, seqs, n_seqs,
                                            qkvu + 3 * H, ld, &norm, &l, rows, o, scratch, &err));
        } else {
            CHECK(ops->lightning(be, o, qkvu, qkvu + H, qkvu + 2 * H, ld, &a, seqs, n_seqs, &err));
            CHECK(ops->gated_linear_add(be, x, o, qkvu + 3 * H, ld, &norm, &l, rows, scratch, &err));
        }
        found[i] = malloc(n * sizeof(float));
        states[i] = malloc(layer * MOST_SEQS * sizeof(float));
        assert_true(found[i] && states[i]);
        CHECK(ops->download(be, found[i], x, n * sizeof(float), &err));
        CHECK(ops->download(be, states[i], state[i], layer * MOST_SEQS * sizeof(float), &err));
    }
    const double error = apart(found[0], found[1], n);
    print_message("# %d heads%s, %d rows in %d sequences: %.2g apart\n", c->n_heads, c->lrpe ? ", LRPE" : "",
                  rows, n_seqs, error);
    if (!(error <= 5e-3))
        fail_msg("%d rows of %d heads%s: the operation and its parts are %g apart", rows, c->n_heads,
                 c->lrpe ? ", LRPE" : "", error);
    assert_memory_equal(states[0], states[1], layer * MOST_SEQS * sizeof(float));
    for (int i = 0; i < 2; i++) {
        free(found[i]);
        free(states[i]);
        ops->free(be, state[i]);
    }
    for (void **p = (void *[]){qkvu, w, x, slopes_at, theta_at, o, scratch, NULL}; *p; p++)
        ops->free(be, *p);
}

static void test_mixer(void **state)
{
    (void)state;
    static const struct mixer_case cases[] = {
        {8, 1024, false, {3000}}, {8, 1024, true, {3000}},
        {2, 2056, false, {1537}}, {3, 4096, true, {700, 1, 63, 257}},
        {4, 3000, false, {1025}}, {4, 512, true, {1, 100, 64}},
        {4, 512, false, {1, 1}},
    };
    struct ltn_backend *be = open_cuda(LTN_BF16);
    struct test_rng rng = {5};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_mixer(be, &cases[i], &rng);
    be->ops->close(be);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mixer),
        cmocka_unit_test(test_splits),
        cmocka_unit_test(test_against_cpu),
        cmocka_unit_test(test_fp8),
    };
    struct test_rng rng = {3};
    for (int i = 0; i < LONGEST; i++)
        text[i] = test_below(&rng, VOCAB);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
