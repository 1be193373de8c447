/* Sessions on the CUDA backend against the CPU's: greedy text of the model that ships, sessions that move
 * between the two through files, several tokens at once against one at a time, many texts at once, a million
 * tokens, files of a large state. */
#include "model/decoder.h"
#include "src/batch.h"
#include "tests/cuda/device.h"
#include "tests/sessions.h"
#include "tests/text_model.h"

#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static const char *in_folder(const char *name)
{
    static char path[4][256];
    static int next;
    char *at = path[next++ % 4];
    snprintf(at, sizeof path[0], "%s/%s", test_folder(), name);
    return at;
}

static struct ltn_engine *open_on(const char *device, const char *path)
{
    const struct ltn_engine_options options = {.device = device};
    struct ltn_engine *engine;
    struct ltn_error err;
    CHECK(ltn_engine_open(&engine, path, &options, &err));
    return engine;
}

/* ---- the model that ships, in f32 ---------------------------------------------------------------------- */

static const char *demo(void)
{
    const char *path = getenv("DEMO");
    return path && path[0] ? path : "model/demo/demo.ltn";
}

static void *new_copy(struct ltn_backend *be, const void *host, size_t bytes)
{
    struct ltn_error err;
    void *at;
    CHECK(be->ops->alloc(be, &at, bytes, &err));
    CHECK(be->ops->upload(be, at, host, bytes, &err));
    return at;
}

static struct ltn_matrix widened(struct ltn_backend *be, const struct ltn_matrix *m)
{
    const size_t n = (size_t)m->rows * (size_t)m->cols;
    float *wide = malloc(n * sizeof *wide);
    assert_non_null(wide);
    const size_t cols = (size_t)m->cols;
    for (size_t i = 0; i < n; i++)
        wide[i] = ltn_weight(m->data, m->scales, m->dtype, cols, i / cols, i % cols);
    const struct ltn_matrix out = {new_copy(be, wide, n * sizeof *wide), LTN_F32, m->rows, m->cols, NULL};
    free(wide);
    return out;
}

/* A copy upon another backend with f32 matrices; its memory goes with the process. */
static struct ltn_model widen(const struct ltn_model *m, struct ltn_backend *be)
{
    const size_t n_heads = (size_t)m->config.n_heads, e = (size_t)m->config.head_dim;
    struct ltn_model out = *m;
    out.be = be;
    out.arena = NULL;
    out.embed = out.head = widened(be, &m->embed);
    out.layers = malloc((size_t)m->config.n_layers * sizeof *out.layers);
    assert_true(out.layers && m->config.tied);
    for (int32_t i = 0; i < m->config.n_layers; i++) {
        const struct ltn_layer *from = &m->layers[i];
        struct ltn_layer *to = &out.layers[i];
        *to = *from;
        to->qkv.w = widened(be, &from->qkv.w);
        to->out.w = widened(be, &from->out.w);
        to->l1.w = widened(be, &from->l1.w);
        to->l2.w = widened(be, &from->l2.w);
        to->l3.w = widened(be, &from->l3.w);
        to->attention.slopes = new_copy(be, from->attention.slopes, n_heads * sizeof(float));
        if (from->attention.theta)
            to->attention.theta = new_copy(be, from->attention.theta, n_heads * e * sizeof(float));
    }
    return out;
}

static void write_text(struct ltn_backend *be, const struct ltn_model *m, const int32_t *prompt, int n,
                       int32_t *out, int steps)
{
    const int32_t V = m->config.vocab_size;
    const size_t state_bytes = ltn_state_offset(&m->config, m->config.n_layers) * sizeof(float);
    float *logits = malloc((size_t)V * sizeof *logits);
    struct ltn_workspace ws;
    struct ltn_error err;
    void *state;
    assert_non_null(logits);
    CHECK(ltn_workspace_create(&ws, m, n, 1, &err));
    CHECK(be->ops->alloc(be, &state, state_bytes, &err));
    CHECK(be->ops->zero(be, state, state_bytes, &err));
    for (int k = 0; k < steps; k++) {
        const struct ltn_seq seq = {state, k ? n + k - 1 : 0, 0, k ? 1 : n};
        CHECK(ltn_forward(m, &ws, k ? &out[k - 1] : prompt, k ? 1 : n, &seq, 1, LTN_WANT_LAST, NULL, &err));
        CHECK(be->ops->download(be, logits, ws.logits, (size_t)V * sizeof *logits, &err));
        out[k] = 0;
        for (int32_t i = 1; i < V; i++)
            out[k] = logits[i] > logits[out[k]] ? i : out[k];
    }
    be->ops->free(be, state);
    ltn_workspace_free(&ws);
    free(logits);
}

static void test_demo_text(void **state)
{
    enum { STEPS = 200 };
    static int32_t text[2][STEPS];
    struct ltn_engine *engine = open_on("cpu", demo());
    struct ltn_backend *gpu = open_cuda(LTN_F32);
    const struct ltn_model *m = &engine->model, wide[2] = {widen(m, engine->be), widen(m, gpu)};
    int32_t *prompt;
    size_t n;
    struct ltn_error err;
    (void)state;
    CHECK(ltn_engine_tokenize(engine, "Once upon a time there was a king who", 37, &prompt, &n, &err));
    write_text(engine->be, &wide[0], prompt, (int)n, text[0], STEPS);
    write_text(gpu, &wide[1], prompt, (int)n, text[1], STEPS);
    assert_memory_equal(text[0], text[1], sizeof text[0]);
    free(prompt);
}

/* ---- several at once against one at a time ------------------------------------------------------------- */

static enum ltn_status look_on(void *ctx, int32_t id, const float *logits, struct ltn_error *err)
{
    (void)ctx, (void)id, (void)logits, (void)err;
    return LTN_OK;
}

/* Who looks at the logits of each token gets them one at a time. */
static void test_ahead(void **state)
{
    static struct collector c[2];
    struct ltn_engine *engine = open_on("cuda", demo());
    const size_t bytes = ltn_engine_info(engine)->session_bytes;
    char *file[2] = {malloc(bytes), malloc(bytes)};
    struct ltn_error err;
    (void)state;
    assert_true(file[0] && file[1]);
    for (int round = 0; round < 8; round++) {
        const struct ltn_sampling sampling = {.temperature = round ? 0.5 + 0.2 * round : 0,
                                              .top_p = round % 2 ? 0.95 : 1,
                                              .top_k = round % 3 ? 0 : 40,
                                              .typical = round == 5 ? 0.9 : 0,
                                              .repeat_last = 64,
                                              .repeat_penalty = round == 4 ? 1.2 : 1};
        for (int i = 0; i < 2; i++) {
            struct ltn_session *s = open_session(engine, NULL);
            const struct ltn_generate_options o = {.sampling = &sampling,
                                                   .max_tokens = 100 + round,
                                                   .ignore_eos = true,
                                                   .piece = collect,
                                                   .drawn = i ? NULL : look_on,
                                                   .ctx = &c[i]};
            memset(&c[i], 0, sizeof c[i]);
            c[i].stop_after = round % 3 == 2 ? 53 : 0;
            ltn_session_seed(s, (uint64_t)round);
            CHECK(ltn_session_feed_text(s, "The old house", 13, &err));
            CHECK(ltn_session_end_text(s, &err));
            CHECK(ltn_generate(s, &o, NULL, &err));
            CHECK(ltn_session_export(s, file[i], bytes, &err));
            ltn_session_free(s);
        }
        assert_string_equal(c[0].text, c[1].text);
        assert_memory_equal(file[0], file[1], bytes);
    }
    free(file[0]);
    free(file[1]);
    ltn_engine_close(engine);
}

/* Drawn on the device with the steps of a batch, and on the host from the logits of the same steps. */
static void test_batch(void **state)
{
    enum { SESSIONS = 12, STEPS = 80 };
    static const char *const prompts[] = {"The old house", "Once upon a time", "", "She said"};
    struct ltn_engine *engine = open_on("cuda", demo());
    const size_t bytes = ltn_engine_info(engine)->session_bytes;
    char *file[2] = {malloc(bytes), malloc(bytes)};
    struct ltn_error err;
    (void)state;
    assert_true(file[0] && file[1]);
    for (int round = 0; round < 4; round++) {
        const struct ltn_sampling sampling = {.temperature = round == 3 ? 0 : 0.8,
                                              .top_p = round ? 0.95 : 1,
                                              .typical = round == 2 ? 0.9 : 0,
                                              .repeat_last = 64,
                                              .repeat_penalty = round == 1 ? 1.2 : 1};
        struct ltn_batch *batch[2];
        struct ltn_session *s[2][SESSIONS];
        int drawn = 0;
        for (int i = 0; i < 2; i++) {
            CHECK(ltn_batch_create(&batch[i], engine, SESSIONS, &err));
            for (int k = 0; k < SESSIONS; k++) {
                s[i][k] = open_session(engine, &(struct ltn_session_options){.batch = batch[i]});
                ltn_session_seed(s[i][k], (uint64_t)(100 * round + k));
                CHECK(ltn_session_feed(s[i][k], &(int32_t){1}, 1, &err));
                CHECK(ltn_session_feed_text(s[i][k], prompts[k % 4], strlen(prompts[k % 4]), &err));
                CHECK(ltn_session_end_text(s[i][k], &err));
            }
        }
        for (int step = 0; step < STEPS; step++) {
            int32_t id[2][SESSIONS];
            for (int i = 0; i < 2; i++) {
                const int n = SESSIONS - step % 3; /* some wait at times */
                CHECK(ltn_batch_step(batch[i], s[i], (size_t)n, i ? &sampling : NULL, &err));
                for (int k = 0; k < n; k++) {
                    drawn += ltn_batch_drawn(batch[i], s[i][k], &sampling, &id[i][k]);
                    CHECK(ltn_session_sample(s[i][k], &sampling, &id[i][k], &err));
                    CHECK(ltn_session_feed(s[i][k], &id[i][k], 1, &err));
                    assert_int_equal(id[0][k], id[i][k]);
                }
            }
        }
        assert_true(drawn > (SESSIONS - 2) * STEPS);
        for (int k = 0; k < SESSIONS; k++) {
            for (int i = 0; i < 2; i++) {
                CHECK(ltn_batch_step(batch[i], s[i], SESSIONS, i ? &sampling : NULL, &err));
                CHECK(ltn_session_export(s[i][k], file[i], bytes, &err)); /* with its logits */
            }
            assert_memory_equal(file[0], file[1], bytes);
        }
        for (int i = 0; i < 2; i++) {
            for (int k = 0; k < SESSIONS; k++)
                ltn_session_free(s[i][k]);
            ltn_batch_free(batch[i]);
        }
    }
    free(file[0]);
    free(file[1]);
    ltn_engine_close(engine);
}

/* ---- through files ------------------------------------------------------------------------------------- */

static void test_resume_through_files(void **state)
{
    static struct collector whole, rest;
    struct ltn_engine *engine[2];
    struct ltn_error err;
    (void)state;
    test_write_token_model(in_folder("token.ltn"), -1, -1); /* f32 */
    engine[0] = open_on("cpu", in_folder("token.ltn"));
    engine[1] = open_on("cuda", in_folder("token.ltn"));
    for (int from = 0; from < 2; from++) {
        const struct ltn_sampling greedy = {.top_p = 1};
        struct ltn_generate_options o = {.sampling = &greedy, .max_tokens = 100, .piece = collect};
        struct ltn_session *a = open_session(engine[from], NULL), *b = open_session(engine[!from], NULL);
        for (int32_t id = 3; id < 90; id++)
            CHECK(ltn_session_feed(a, &id, 1, &err));
        memset(&whole, 0, sizeof whole);
        memset(&rest, 0, sizeof rest);
        o.ctx = &whole;
        CHECK(ltn_generate(a, &o, NULL, &err));
        CHECK(ltn_session_save(a, in_folder("moved.ltns"), &err));
        CHECK(ltn_session_load(b, in_folder("moved.ltns"), &err));
        assert_true(ltn_session_position(a) == ltn_session_position(b));
        assert_true(difference(a, b) == 0); /* the logits are in the file */
        memset(&whole, 0, sizeof whole);
        CHECK(ltn_generate(a, &o, NULL, &err));
        o.ctx = &rest;
        CHECK(ltn_generate(b, &o, NULL, &err));
        assert_int_equal(rest.n, 100);
        assert_memory_equal(whole.ids, rest.ids, sizeof *rest.ids * rest.n);
        assert_true(difference(b, a) < 1e-4);
        ltn_session_free(a);
        ltn_session_free(b);
    }
    ltn_engine_close(engine[0]);
    ltn_engine_close(engine[1]);
}

/* As many bytes to the disk with nothing else to do: the best that a save can come to. */
static double disk_alone(size_t bytes)
{
    const char *path = in_folder("alone");
    struct test_rng rng = {9};
    uint64_t *data = malloc(bytes + sizeof *data);
    assert_non_null(data);
    for (size_t i = 0; i <= bytes / sizeof *data; i++)
        data[i] = test_random(&rng);
    double begin = now();
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_true(fd >= 0 && write(fd, data, bytes) == (ssize_t)bytes && fsync(fd) == 0 && close(fd) == 0);
    double seconds = now() - begin;
    unlink(path);
    free(data);
    return seconds;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* A state as large as the 7B model's, 65 MB: to a file and back. */
static void test_large_state(void **state)
{
    enum { REPEATS = 9 };
    const struct ltn_config shape = {.vocab_size = 64,
                                     .embed_dim = 512,
                                     .hidden_dim = 512,
                                     .n_layers = 62,
                                     .n_heads = 1,
                                     .glu_dim = 64,
                                     .act = LTN_ACT_SILU,
                                     .tied = true,
                                     .bos_id = -1,
                                     .eos_id = -1,
                                     .pad_id = -1,
                                     .lrpe = {1}};
    double save[REPEATS], load[REPEATS], alone[REPEATS], begin;
    struct ltn_error err;
    (void)state;
    test_write_model(shape, LTN_BF16, 5, in_folder("large.ltn"));
    struct ltn_engine *engine = open_on("cuda", in_folder("large.ltn"));
    struct ltn_session *a = open_session(engine, NULL), *b = open_session(engine, NULL);
    const size_t bytes = ltn_engine_info(engine)->session_bytes;
    for (int32_t id = 3; id < 40; id++)
        CHECK(ltn_session_feed(a, &id, 1, &err));
    for (int i = 0; i < REPEATS; i++) {
        begin = now();
        CHECK(ltn_session_save(a, in_folder("large.ltns"), &err));
        save[i] = now() - begin;
        begin = now();
        CHECK(ltn_session_load(b, in_folder("large.ltns"), &err));
        load[i] = now() - begin;
        assert_true(same_logits(a, b));
        CHECK(ltn_session_feed(a, &(int32_t){i}, 1, &err)); /* and from the state */
        CHECK(ltn_session_feed(b, &(int32_t){i}, 1, &err));
        assert_true(same_logits(a, b));
        alone[i] = disk_alone(bytes);
    }
    qsort(save, REPEATS, sizeof *save, by_value);
    qsort(load, REPEATS, sizeof *load, by_value);
    qsort(alone, REPEATS, sizeof *alone, by_value);
    print_message("%.1f MB, median (least, most) ms: saved and synced %.1f (%.1f, %.1f), loaded %.1f (%.1f, "
                  "%.1f); written and synced by itself %.1f (%.1f, %.1f)\n",
                  1e-6 * (double)bytes, 1e3 * save[REPEATS / 2], 1e3 * save[0], 1e3 * save[REPEATS - 1],
                  1e3 * load[REPEATS / 2], 1e3 * load[0], 1e3 * load[REPEATS - 1], 1e3 * alone[REPEATS / 2],
                  1e3 * alone[0], 1e3 * alone[REPEATS - 1]);
    assert_true(load[REPEATS / 2] < 0.05);
    assert_true(save[REPEATS / 2] < 0.05 || save[REPEATS / 2] < 1.5 * alone[REPEATS / 2]);
    ltn_session_free(a);
    ltn_session_free(b);
    ltn_engine_close(engine);
}

/* ---- a million tokens ---------------------------------------------------------------------------------- */

/* Written one after another; then the same tokens read in chunks. The sums are in another order, and still
 * the logits and states agree: nothing has drifted. It is so warm that the tokens vary: what one repeated
 * token adds to a slow sum of its own kind is always rounded to the same side (kernels/cuda/NOTES.md). */
static void test_a_million_tokens(void **state)
{
    enum { TOKENS = 1 << 20, BURST = 4096, CHUNK = 1024 };
    const struct ltn_config shape = {.vocab_size = 97,
                                     .embed_dim = 64,
                                     .hidden_dim = 64,
                                     .n_layers = 2,
                                     .n_heads = 2,
                                     .glu_dim = 96,
                                     .act = LTN_ACT_SILU,
                                     .tied = true,
                                     .bos_id = -1,
                                     .eos_id = -1,
                                     .pad_id = -1,
                                     .lrpe = {1, 0}};
    struct ltn_backend *be = open_cuda(LTN_F32);
    struct ltn_checkpoint ck;
    struct ltn_model m;
    struct ltn_workspace ws;
    struct ltn_stepper stepper;
    struct ltn_error err;
    const struct ltn_choice choice = {.temperature = 30, .top_p = 1};
    static struct ltn_draws draws;
    static int32_t ids[TOKENS + 1];
    float logits[2][97];
    void *states[2];
    (void)state;
    test_write_model(shape, LTN_F32, 5, in_folder("walk.ltn"));
    CHECK(ltn_checkpoint_open(&ck, in_folder("walk.ltn"), &err));
    CHECK(ltn_model_load(&m, &ck, be, NULL, NULL, &err));
    CHECK(ltn_workspace_create(&ws, &m, CHUNK, 1, &err));
    const size_t n = ltn_state_offset(&m.config, 2), bytes = n * sizeof(float);
    for (int i = 0; i < 2; i++) {
        CHECK(be->ops->alloc(be, &states[i], bytes, &err));
        CHECK(be->ops->zero(be, states[i], bytes, &err));
    }
    struct ltn_seq seq = {states[0], 0, 0, 1};
    CHECK(ltn_stepper_create(&stepper, &m, &ws, &seq, 1, BURST, &choice, &err));
    double begin = now();
    ids[0] = 7;
    for (int32_t at = 0; at < TOKENS; at += BURST)
        CHECK(ltn_stepper_run(&stepper, at ? NULL : ids, at ? NULL : &draws, BURST, ids + at + 1, &err));
    print_message("a million tokens in %.1f s\n", now() - begin);
    CHECK(be->ops->download(be, logits[0], ws.logits, sizeof logits[0], &err));
    for (int32_t at = 0; at < TOKENS; at += CHUNK) {
        seq = (struct ltn_seq){states[1], at, 0, CHUNK};
        CHECK(ltn_forward(&m, &ws, ids + at, CHUNK, &seq, 1, LTN_WANT_LAST, NULL, &err));
    }
    CHECK(be->ops->download(be, logits[1], ws.logits, sizeof logits[1], &err));
    float *found = malloc(bytes), *expected = malloc(bytes);
    assert_true(found && expected);
    CHECK(be->ops->download(be, found, states[0], bytes, &err));
    CHECK(be->ops->download(be, expected, states[1], bytes, &err));
    double diff = 0, sum = 0, worst = 0, largest = 0;
    for (size_t i = 0; i < n; i++) {
        diff += ((double)found[i] - expected[i]) * ((double)found[i] - expected[i]);
        sum += (double)expected[i] * expected[i];
    }
    for (int i = 0; i < 97; i++) {
        worst = fmax(worst, fabs((double)logits[0][i] - logits[1][i]));
        largest = fmax(largest, fabs((double)logits[1][i]));
    }
    print_message("states differ by %.2g of their size, logits by %.2g of the largest\n", sqrt(diff / sum),
                  worst / largest);
    assert_true(sqrt(diff / sum) < 1e-4);
    assert_true(worst < 1e-4 * largest);
    ltn_stepper_free(&stepper);
    ltn_workspace_free(&ws);
    ltn_model_free(&m);
    ltn_checkpoint_close(&ck);
    free(found);
    free(expected);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_demo_text),   cmocka_unit_test(test_ahead),
        cmocka_unit_test(test_batch),       cmocka_unit_test(test_resume_through_files),
        cmocka_unit_test(test_large_state), cmocka_unit_test(test_a_million_tokens),
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
