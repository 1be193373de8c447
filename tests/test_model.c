/* The decoder against references: the golden checkpoints, and an independent float64 oracle over every
 * variant of the architecture with random weights. On the plain backend and on the fast one; with
 * LTN_TEST_CUDA set, on the CUDA backend. */
#include "model/decoder.h"
#include "tests/cuda/device.h"
#include "tests/oracle.h"
#include "tests/support.h"

#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* ---- a model on a backend with one stream ------------------------------------------------------------- */

struct rig {
    struct ltn_backend *be;
    struct ltn_checkpoint ck;
    struct ltn_model model;
    struct ltn_workspace ws;
    float *state; /* one stream's */
    size_t state_bytes;
    int64_t pos;
    /* hidden states caught by the tap, for the rows of the current call */
    float *hidden; /* NULL, or [n_layers + 1, n, D] */
    int n, first;
};

enum { MAX_ROWS = 512 };

enum kind { PLAIN, FAST, CUDA };
static const char *const kind_names[] = {"reference", "fast", "cuda"};

/* Whether activations are rounded to 16 bits: then results are compared in the root mean square. */
static bool rounds;

static void rig_open(struct rig *r, const char *path, enum kind kind)
{
    struct ltn_error err = {0};

    memset(r, 0, sizeof *r);
    CHECK(ltn_checkpoint_open(&r->ck, path, &err));
    if (kind == CUDA)
        r->be = open_cuda(r->ck.dtype);
    else
        CHECK(kind == FAST ? ltn_cpu_open(&r->be, 2, &err) : ltn_reference_open(&r->be, &err));
    rounds = r->be->act_dtype != LTN_F32;
    CHECK(ltn_model_load(&r->model, &r->ck, r->be, NULL, NULL, &err));
    CHECK(ltn_workspace_create(&r->ws, &r->model, MAX_ROWS, MAX_ROWS, &err));
    r->state_bytes = ltn_state_offset(&r->ck.config, r->ck.config.n_layers) * sizeof(float);
    CHECK(r->be->ops->alloc(r->be, (void **)&r->state, r->state_bytes, &err));
    CHECK(r->be->ops->zero(r->be, r->state, r->state_bytes, &err));
}

static void rig_close(struct rig *r)
{
    r->be->ops->free(r->be, r->state);
    ltn_workspace_free(&r->ws);
    ltn_model_free(&r->model);
    ltn_checkpoint_close(&r->ck);
    r->be->ops->close(r->be);
}

static void rig_reset(struct rig *r)
{
    struct ltn_error err = {0};
    CHECK(r->be->ops->zero(r->be, r->state, r->state_bytes, &err));
    r->pos = 0;
}

static enum ltn_status catch_hidden(void *ctx, int32_t layer, const float *x, int32_t rows,
                                    struct ltn_error *err)
{
    struct rig *r = ctx;
    size_t D = (size_t)r->ck.config.embed_dim;
    float *to = r->hidden + ((size_t)layer * (size_t)r->n + (size_t)r->first) * D;
    return r->be->ops->download(r->be, to, x, (size_t)rows * D * sizeof(float), err);
}

/* Feeds n tokens in one call; logits: [n, V] on the host. */
static void rig_feed(struct rig *r, const int32_t *ids, int n, float *logits)
{
    struct ltn_error err = {0};
    struct ltn_seq seq = {r->state, r->pos, 0, n};
    struct ltn_tap tap = {catch_hidden, r};

    CHECK(ltn_forward(&r->model, &r->ws, ids, n, &seq, 1, LTN_WANT_ALL, r->hidden ? &tap : NULL, &err));
    CHECK(r->be->ops->download(r->be, logits, r->ws.logits,
                               (size_t)n * (size_t)r->ck.config.vocab_size * sizeof(float), &err));
    r->pos += n;
}

/* The same in pieces: of the given size, or of random sizes from 1 up where step is 0. */
static void rig_feed_split(struct rig *r, const int32_t *ids, int n, float *logits, int step,
                           struct test_rng *rng)
{
    r->n = n;
    for (r->first = 0; r->first < n;) {
        int m = step ? step : 1 + test_below(rng, test_below(rng, 2) ? 4 : 150);
        m = m < n - r->first ? m : n - r->first;
        rig_feed(r, ids + r->first, m, logits + (size_t)r->first * (size_t)r->ck.config.vocab_size);
        r->first += m;
    }
}

static double largest(const float *x, size_t n)
{
    double most = 0;
    for (size_t i = 0; i < n; i++)
        most = fmax(most, fabs((double)x[i]));
    return most;
}

static void assert_close(const char *what, const float *found, const float *expected, size_t n, double bound)
{
    if (rounds) {
        double ss = 0, diff = 0;
        for (size_t i = 0; i < n; i++) {
            ss += (double)expected[i] * expected[i];
            diff += ((double)found[i] - expected[i]) * ((double)found[i] - expected[i]);
        }
        if (!(diff <= 0.04 * 0.04 * ss))
            fail_msg("%s: off by %.3g of its root mean square, expected at most 0.04", what, sqrt(diff / ss));
        return;
    }
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)found[i] - (double)expected[i]) <= bound))
            fail_msg("%s: element %zu is %.9g, expected %.9g within %.3g", what, i, (double)found[i],
                     (double)expected[i], bound);
}

/* Head by head, since heads that decay slowly are large and would hide the others. */
static void assert_state_close(const struct ltn_config *c, int layer, const float *found,
                               const float *expected)
{
    size_t head = ltn_state_floats(c, layer) / (size_t)c->n_heads;
    for (int i = 0; i < c->n_heads; i++)
        assert_close("state of a head", found + (size_t)i * head, expected + (size_t)i * head, head,
                     1e-4 * largest(expected + (size_t)i * head, head) + 1e-9);
}

static int argmax(const float *x, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

/* ---- golden checkpoints ------------------------------------------------------------------------------- */

/* The backends under test. */
static enum kind kinds[2] = {PLAIN, FAST};
static int n_kinds = 2;

struct golden_case {
    const char *name;
    enum kind kind;
};

static const float *golden_f32(const struct ltn_st_file *g, int prompt, const char *what, size_t n)
{
    char name[64];
    snprintf(name, sizeof name, "p%d.%s", prompt, what);
    const struct ltn_st_tensor *t = ltn_st_find(g, name);
    if (!t)
        fail_msg("golden.safetensors has no %s", name);
    if (t->bytes != n * sizeof(float))
        fail_msg("%s has %llu bytes, expected %zu", name, (unsigned long long)t->bytes, n * sizeof(float));
    return (const float *)(g->map + t->offset);
}

static void check_hidden(const struct rig *r, const struct ltn_st_file *g, int prompt)
{
    const struct ltn_config *c = &r->ck.config;
    size_t D = (size_t)c->embed_dim, L = (size_t)c->n_layers;
    char name[64];

    snprintf(name, sizeof name, "p%d.hidden_pos", prompt);
    size_t n_pos = ltn_st_find(g, name)->bytes / sizeof(int32_t);
    const int32_t *pos = (const int32_t *)golden_f32(g, prompt, "hidden_pos", n_pos);
    const float *hidden = golden_f32(g, prompt, "hidden", (L + 2) * n_pos * D);
    for (size_t l = 0; l <= L; l++)
        for (size_t i = 0; i < n_pos; i++) {
            const float *expected = hidden + (l * n_pos + i) * D;
            assert_close("hidden state", r->hidden + (l * (size_t)r->n + (size_t)pos[i]) * D, expected, D,
                         2e-4 * largest(expected, D));
        }
}

static void check_greedy(struct rig *r, const struct ltn_st_file *g, int prompt, const float *last)
{
    enum { N = 32 };
    size_t V = (size_t)r->ck.config.vocab_size;
    const int32_t *ids = (const int32_t *)golden_f32(g, prompt, "greedy_ids", N);
    const float *expected = golden_f32(g, prompt, "greedy_logits", N * V);
    float *logits = malloc(V * sizeof *logits);

    int equal = 0;
    assert_non_null(logits);
    memcpy(logits, last, V * sizeof *logits);
    for (int i = 0; i < N; i++) {
        assert_close("greedy logits", logits, expected + (size_t)i * V, V, 2e-4 * largest(expected, N * V));
        equal += argmax(logits, (int)V) == ids[i];
        rig_feed(r, &ids[i], 1, logits);
    }
    if (rounds)
        fprintf(stderr, "greedy: %d of %d ids are those of the exact arithmetic\n", equal, N);
    else
        assert_int_equal(equal, N);
    free(logits);
}

static void check_prompt(struct rig *r, const struct ltn_st_file *g, int prompt, int step,
                         struct test_rng *rng)
{
    const struct ltn_config *c = &r->ck.config;
    size_t V = (size_t)c->vocab_size;
    char name[64];

    snprintf(name, sizeof name, "p%d.input_ids", prompt);
    const struct ltn_st_tensor *t = ltn_st_find(g, name);
    int n = (int)(t->bytes / sizeof(int32_t));
    const int32_t *ids = (const int32_t *)(g->map + t->offset);
    const float *expected = golden_f32(g, prompt, "logits", (size_t)n * V);
    float *logits = malloc((size_t)n * V * sizeof *logits);

    r->hidden = calloc((size_t)(c->n_layers + 1) * (size_t)n * (size_t)c->embed_dim, sizeof(float));
    assert_true(logits && r->hidden);
    rig_reset(r);
    rig_feed_split(r, ids, n, logits, step, rng);
    assert_close("logits", logits, expected, (size_t)n * V, 2e-4 * largest(expected, (size_t)n * V));
    check_hidden(r, g, prompt);
    free(r->hidden);
    r->hidden = NULL;

    struct ltn_error err = {0};
    float *state = malloc(r->state_bytes);
    assert_non_null(state);
    CHECK(r->be->ops->download(r->be, state, r->state, r->state_bytes, &err));
    for (int l = 0; l < c->n_layers; l++) {
        char key[32];
        snprintf(key, sizeof key, "state.%d", l);
        assert_state_close(c, l, state + ltn_state_offset(c, l),
                           golden_f32(g, prompt, key, ltn_state_floats(c, l)));
    }
    free(state);
    check_greedy(r, g, prompt, logits + (size_t)(n - 1) * V);
    free(logits);
}

/* Finds the case in the repository's own data or in $LTN_GOLDEN; false where neither has it. */
static bool find_case(char *path, size_t size, const char *name)
{
    const char *roots[] = {"tests/data/golden", getenv("LTN_GOLDEN")};
    for (int i = 0; i < 2; i++) {
        if (!roots[i])
            continue;
        snprintf(path, size, "%s/%s", roots[i], name);
        DIR *dir = opendir(path);
        if (dir) {
            closedir(dir);
            return true;
        }
    }
    return false;
}

static void test_chunk_rows(void **state)
{
    static const int32_t dims[][2] = {{16, 8192},   {2048, 8192},  {4096, 4096},
                                      {5120, 3072}, {1 << 20, 16}, {1 << 30, 1}};
    struct ltn_backend be = {.chunk_rows = 8192, .chunk_values = 4096 * 4096};
    struct ltn_model model = {.be = &be};
    (void)state;
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
        model.config.embed_dim = dims[i][0];
        assert_int_equal(ltn_model_chunk_rows(&model), dims[i][1]);
    }
    be.chunk_values = 0;
    assert_int_equal(ltn_model_chunk_rows(&model), 8192);
    be = (struct ltn_backend){.chunk_rows = 100, .chunk_values = 50 << 20};
    model.config.embed_dim = 1 << 20;
    assert_int_equal(ltn_model_chunk_rows(&model), 50);
}

static void test_golden(void **state)
{
    const struct golden_case *which = *state;
    struct ltn_error err = {0};
    struct test_rng rng = {7};
    char source[512], model[512], golden[600];
    struct ltn_st_file g;
    struct rig r;

    if (!find_case(source, sizeof source, which->name))
        skip();
    snprintf(model, sizeof model, "%s/%s.ltn", test_folder(), which->name);
    assert_int_equal(test_convert(source, model), 0);
    snprintf(golden, sizeof golden, "%s/golden.safetensors", source);
    CHECK(ltn_st_open(&g, golden, &err));
    rig_open(&r, model, which->kind);
    for (int p = 0;; p++) {
        char name[32];
        snprintf(name, sizeof name, "p%d.input_ids", p);
        if (!ltn_st_find(&g, name))
            break;
        check_prompt(&r, &g, p, MAX_ROWS, &rng); /* whole */
        check_prompt(&r, &g, p, 1, &rng);        /* token by token */
        check_prompt(&r, &g, p, 0, &rng);        /* in random pieces */
    }
    assert_true(r.pos > 0);
    rig_close(&r);
    ltn_st_close(&g);
}

/* ---- every variant against the oracle ----------------------------------------------------------------- */

struct variant {
    const char *name;
    int D, H, h, L, G, gate;
    enum ltn_act act;
    bool layer_norm, bias, untied, unscaled;
    const char *lrpe; /* one digit a layer */
    int n;
    enum ltn_dtype dtype;
};

static const struct variant variants[] = {
    {"v2, long", 48, 48, 3, 3, 80, 0, LTN_ACT_SILU, 0, 0, 0, 0, "100", 1300, LTN_F32},
    {"v2, gelu, LRPE everywhere", 40, 40, 5, 3, 24, 0, LTN_ACT_GELU, 0, 0, 0, 1, "111", 150, LTN_F32},
    {"v2, elu, bf16", 36, 36, 6, 3, 50, 0, LTN_ACT_ELU, 0, 1, 0, 0, "010", 150, LTN_BF16},
    {"v2, sigmoid, LayerNorm", 32, 32, 2, 4, 33, 0, LTN_ACT_SIGMOID, 1, 0, 1, 0, "0101", 150, LTN_F32},
    {"v2, exp", 30, 30, 3, 3, 20, 0, LTN_ACT_EXP, 0, 0, 0, 0, "100", 150, LTN_F32},
    {"v2, leak, f16, H != D", 24, 56, 7, 3, 31, 0, LTN_ACT_LEAK, 0, 1, 1, 0, "000", 150, LTN_F16},
    {"v2, 1+elu", 22, 22, 1, 3, 20, 0, LTN_ACT_ELU_ADD1, 0, 0, 0, 0, "100", 150, LTN_F32},
    {"v2, 2+elu, seven layers", 20, 20, 4, 7, 20, 0, LTN_ACT_ELU_ADD2, 0, 0, 0, 0, "1000001", 150, LTN_F32},
    {"v2, sine", 26, 26, 2, 3, 20, 0, LTN_ACT_SINE, 0, 0, 0, 0, "100", 150, LTN_F32},
    {"v2, relu, one feature a head", 12, 12, 12, 2, 9, 0, LTN_ACT_RELU, 0, 0, 0, 0, "10", 80, LTN_F32},
    {"v2, no activation, head of 80", 160, 160, 2, 3, 100, 0, LTN_ACT_NONE, 0, 0, 0, 0, "100", 200, LTN_F32},
    {"v2, head of 96", 96, 96, 1, 2, 64, 0, LTN_ACT_SILU, 0, 0, 0, 0, "10", 200, LTN_F32},
    {"v2, head of 256", 256, 256, 1, 2, 64, 0, LTN_ACT_SILU, 0, 0, 0, 0, "10", 200, LTN_F32},
    {"TNL3", 48, 48, 3, 4, 70, 8, LTN_ACT_SILU, 0, 0, 0, 0, "1000", 300, LTN_F32},
    {"TNL3, bias, LayerNorm, own head", 40, 40, 5, 4, 30, 7, LTN_ACT_GELU, 1, 1, 1, 0, "0110", 150, LTN_F32},
    {"TNL3, exp", 32, 32, 4, 3, 30, 3, LTN_ACT_EXP, 0, 0, 0, 0, "100", 150, LTN_F32},
    {"TNL3, f16, twelve heads", 48, 48, 12, 3, 30, 5, LTN_ACT_SILU, 0, 1, 0, 0, "101", 150, LTN_F16},
};
enum { N_VARIANTS = sizeof variants / sizeof *variants };

static void test_variant(void **test_state)
{
    const struct variant *v = *test_state;
    struct ltn_config c = {.vocab_size = 61,
                           .embed_dim = v->D,
                           .hidden_dim = v->H,
                           .n_layers = v->L,
                           .n_heads = v->h,
                           .glu_dim = v->G,
                           .gate_dim = v->gate,
                           .act = v->act,
                           .layer_norm = v->layer_norm,
                           .bias = v->bias,
                           .tied = !v->untied,
                           .scale_embedding = !v->unscaled,
                           .bos_id = -1,
                           .eos_id = 2,
                           .pad_id = -1};
    struct test_rng rng = {11};
    struct ltn_error err = {0};
    char path[512];

    for (int l = 0; l < v->L; l++)
        c.lrpe[l] = v->lrpe[l] == '1';
    snprintf(path, sizeof path, "%s/variant.ltn", test_folder());
    test_write_model(c, v->dtype, 5, path);

    size_t V = (size_t)c.vocab_size, n = (size_t)v->n;
    int32_t *ids = malloc(n * sizeof *ids);
    double *exact = malloc(n * V * sizeof *exact);
    float *expected = malloc(n * V * sizeof *expected), *logits = malloc(n * V * sizeof *logits);
    assert_true(ids && exact && expected && logits);
    for (size_t i = 0; i < n; i++)
        ids[i] = test_below(&rng, c.vocab_size);

    for (int i = 0; i < n_kinds; i++) {
        struct rig r;
        rig_open(&r, path, kinds[i]);
        size_t floats = r.state_bytes / sizeof(float);
        double *exact_state = malloc(floats * sizeof *exact_state);
        float *expected_state = malloc(r.state_bytes), *state = malloc(r.state_bytes);
        assert_true(exact_state && expected_state && state);
        oracle_forward(&r.ck, ids, v->n, exact, exact_state);
        for (size_t i = 0; i < n * V; i++)
            expected[i] = (float)exact[i];
        for (size_t i = 0; i < floats; i++)
            expected_state[i] = (float)exact_state[i];
        for (int step = 0; step < 3; step++) { /* random pieces, single tokens, large pieces */
            rig_reset(&r);
            rig_feed_split(&r, ids, v->n, logits, step == 2 ? MAX_ROWS : step, &rng);
            assert_close("logits", logits, expected, n * V, 1e-4 * largest(expected, n * V));
            CHECK(r.be->ops->download(r.be, state, r.state, r.state_bytes, &err));
            for (int l = 0; l < c.n_layers; l++)
                assert_state_close(&c, l, state + ltn_state_offset(&c, l),
                                   expected_state + ltn_state_offset(&c, l));
        }
        free(exact_state);
        free(expected_state);
        free(state);
        rig_close(&r);
    }
    free(ids);
    free(exact);
    free(expected);
    free(logits);
}

/* ---- packed sequences --------------------------------------------------------------------------------- */

/* Several streams of different lengths and positions in one call give what each gives alone. */
static void test_packed(void **test_state)
{
    (void)test_state;
    enum { STREAMS = 5, ROUNDS = 12, MOST = 40 };
    struct ltn_config c = {.vocab_size = 61,
                           .embed_dim = 48,
                           .hidden_dim = 48,
                           .n_layers = 3,
                           .n_heads = 3,
                           .glu_dim = 40,
                           .act = LTN_ACT_SILU,
                           .tied = true,
                           .bos_id = -1,
                           .eos_id = -1,
                           .pad_id = -1,
                           .lrpe = {1, 0, 0}};
    struct test_rng rng = {3};
    struct ltn_error err = {0};
    char path[512];
    struct rig r;

    snprintf(path, sizeof path, "%s/packed.ltn", test_folder());
    test_write_model(c, LTN_F32, 9, path);
    rig_open(&r, path, kinds[n_kinds - 1]);
    size_t V = (size_t)c.vocab_size;
    float *packed[STREAMS], *alone[STREAMS];
    int64_t pos[STREAMS] = {0};
    float *one = malloc(STREAMS * MOST * V * sizeof *one), *many = malloc(STREAMS * MOST * V * sizeof *many);
    assert_true(one && many);
    for (int s = 0; s < STREAMS; s++) {
        CHECK(r.be->ops->alloc(r.be, (void **)&packed[s], r.state_bytes, &err));
        CHECK(r.be->ops->alloc(r.be, (void **)&alone[s], r.state_bytes, &err));
        CHECK(r.be->ops->zero(r.be, packed[s], r.state_bytes, &err));
        CHECK(r.be->ops->zero(r.be, alone[s], r.state_bytes, &err));
    }
    for (int round = 0; round < ROUNDS; round++) {
        struct ltn_seq seqs[STREAMS];
        int32_t ids[STREAMS * MOST], rows = 0;
        bool decode = round % 3 == 2; /* one row each: batched decode */
        for (int s = 0; s < STREAMS; s++) {
            int count = decode ? 1 : 1 + test_below(&rng, MOST);
            seqs[s] = (struct ltn_seq){packed[s], pos[s], rows, count};
            for (int i = 0; i < count; i++)
                ids[rows++] = test_below(&rng, c.vocab_size);
        }
        CHECK(ltn_forward(&r.model, &r.ws, ids, rows, seqs, STREAMS, LTN_WANT_ALL, NULL, &err));
        CHECK(r.be->ops->download(r.be, many, r.ws.logits, (size_t)rows * V * sizeof(float), &err));
        for (int s = 0; s < STREAMS; s++) {
            struct ltn_seq seq = {alone[s], pos[s], 0, seqs[s].count};
            CHECK(ltn_forward(&r.model, &r.ws, ids + seqs[s].first, seq.count, &seq, 1, LTN_WANT_ALL, NULL,
                              &err));
            CHECK(r.be->ops->download(r.be, one, r.ws.logits, (size_t)seq.count * V * sizeof(float), &err));
            assert_close("packed logits", many + (size_t)seqs[s].first * V, one, (size_t)seq.count * V,
                         1e-5 * largest(one, (size_t)seq.count * V));
            pos[s] += seq.count;
        }
    }
    for (int s = 0; s < STREAMS; s++) {
        r.be->ops->free(r.be, packed[s]);
        r.be->ops->free(r.be, alone[s]);
    }
    free(one);
    free(many);
    rig_close(&r);
}

/* ---- slopes and configs ------------------------------------------------------------------------------- */

static void test_slopes(void **test_state)
{
    (void)test_state;
    for (int h = 1; h <= 128; h++)
        for (int layers = 2; layers <= 42; layers += 8)
            for (int l = 0; l < layers; l++) {
                float s[128];
                int p = 1;
                while (2 * p <= h)
                    p *= 2;
                ltn_slopes(s, h, l, layers);
                float factor = (float)((1 - (double)l / (double)(layers - 1)) + 1e-5);
                for (int i = 0; i < h; i++) {
                    float head =
                        (float)(i < p ? pow(2, -8.0 * (i + 1) / p) : pow(2, -4.0 * (2 * (i - p) + 1) / p));
                    float expected = head * factor;
                    assert_memory_equal(&s[i], &expected, sizeof expected);
                }
            }
    /* Values worked out by hand: 8 heads halve from 1/2 on; the last layer keeps 1e-5 of that. */
    float s[8];
    ltn_slopes(s, 8, 0, 24);
    assert_true(s[0] == 0.5f * 1.00001f && s[7] == 0.00390625f * 1.00001f);
    ltn_slopes(s, 8, 23, 24);
    assert_true(s[0] == 0.5f * 1e-5f);
    ltn_slopes(s, 3, 0, 24); /* p = 2: 2^-4, 2^-8, then 2^-2 of the doubled set */
    assert_true(s[0] == 0.0625f * 1.00001f && s[1] == 0.00390625f * 1.00001f && s[2] == 0.25f * 1.00001f);
}

static void test_config(void **test_state)
{
    (void)test_state;
    static const char good[] =
        "{\"vocab_size\":10,\"decoder_embed_dim\":8,\"hidden_dim\":8,\"decoder_layers\":2,"
        "\"decoder_attention_heads\":2,\"glu_dim\":4,\"gate_dim\":0,\"linear_act_fun\":\"swish\","
        "\"norm_type\":\"simplermsnorm\",\"linear_use_lrpe_list\":[1,0],\"no_scale_embedding\":false,"
        "\"bias\":false,"
        "\"tie_word_embeddings\":true,\"bos_token_id\":1,\"eos_token_id\":2,\"pad_token_id\":-1}";
    static const char *const swaps[][2] = {
        {"\"vocab_size\":10", "\"vocab_size\":0"},
        {"\"vocab_size\":10", "\"vocab_size\":1e1"},
        {"\"vocab_size\":10", "\"vocab_size\":99999999999"},
        {"\"hidden_dim\":8", "\"hidden_dim\":9"},
        {"\"hidden_dim\":8", "\"hidden_dim\":16"}, /* LRPE needs H == D */
        {"\"decoder_layers\":2", "\"decoder_layers\":1"},
        {"\"decoder_layers\":2", "\"decoder_layers\":3"}, /* the list has two */
        {"[1,0]", "[1,2]"},
        {"[1,0]", "[1,true]"},
        {"\"gate_dim\":0", "\"gate_dim\":-1"},
        {"\"glu_dim\":4", "\"glu_dim\":\"4\""},
        {"simplermsnorm", "rmsnorm"},
        {"\"eos_token_id\":2", "\"eos_token_id\":10"},
        {"\"bias\":false,", ""},
        {"\"bias\":false", "\"bias\":false,\"extra\":1"},
        {"\"bias\":false", "\"bias\":0"},
        {"\"bias\":false", "\"bias\":false,\"bias\":false"},
        {"-1}", "-1}x"},
    };
    struct ltn_config c;
    struct ltn_error err = {0};

    CHECK(ltn_config_parse(&c, good, &err));
    char *printed = ltn_config_print(&c);
    struct ltn_config again;
    assert_non_null(printed);
    CHECK(ltn_config_parse(&again, printed, &err));
    assert_memory_equal(&c, &again, sizeof c);
    free(printed);
    for (size_t i = 0; i < sizeof swaps / sizeof *swaps; i++) {
        char bad[1024];
        const char *at = strstr(good, swaps[i][0]);
        assert_non_null(at);
        snprintf(bad, sizeof bad, "%.*s%s%s", (int)(at - good), good, swaps[i][1], at + strlen(swaps[i][0]));
        err.text[0] = 0;
        if (ltn_config_parse(&c, bad, &err) == LTN_OK)
            fail_msg("accepted with %s", swaps[i][1]);
        assert_true(err.text[0] && !strchr(err.text, '\n'));
    }
}

int main(void)
{
    static const char *const golden[] = {
        "a1_tnl2_f32_plain",
        "a2_tnl2_bf16_h6_nolrpe_untied",
        "a3_tnl2_f16_bin_layernorm_bias",
        "a4_tnl2_f32_hidden_ne_embed_sharded",
        "a5_tnl3_bf16_bin_sharded",
        "a6_tnl2_f16_hd128",
        "a7_tnl2_f32_bin_h5_emptylist",
        "a8_tnl2_f32_h12_identity_ln",
    };
    enum { N_GOLDEN = sizeof golden / sizeof *golden };
    static struct golden_case cases[2 * N_GOLDEN];
    static char names[2 * N_GOLDEN + N_VARIANTS][96];
    struct CMUnitTest tests[2 * N_GOLDEN + N_VARIANTS + 4] = {
        cmocka_unit_test(test_chunk_rows), cmocka_unit_test(test_slopes), cmocka_unit_test(test_config),
        cmocka_unit_test(test_packed)};
    size_t n = 4;

    if (getenv("LTN_TEST_CUDA")) {
        kinds[0] = CUDA;
        n_kinds = 1;
    }
    for (int i = 0; i < n_kinds * N_GOLDEN; i++) {
        cases[i] = (struct golden_case){golden[i / n_kinds], kinds[i % n_kinds]};
        snprintf(names[i], sizeof names[i], "golden %s, %s", cases[i].name, kind_names[cases[i].kind]);
        tests[n++] =
            (struct CMUnitTest){.name = names[i], .test_func = test_golden, .initial_state = &cases[i]};
    }
    for (int i = 0; i < N_VARIANTS; i++) {
        char *name = names[2 * N_GOLDEN + i];
        snprintf(name, sizeof *names, "variant %s", variants[i].name);
        tests[n++] = (struct CMUnitTest){
            .name = name, .test_func = test_variant, .initial_state = (void *)&variants[i]};
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
