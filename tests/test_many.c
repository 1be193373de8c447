/* Several sessions in one step, and many prompts at once. */
#include <setjmp.h>
#include <stdarg.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "src/batch.h"
#include "src/many.h"
#include "src/rng.h"
#include "tests/sessions.h"
#include "tests/text_model.h"

static char text_model[128], token_model[128], tnl3_model[128];

static void write_models(void)
{
    snprintf(text_model, sizeof text_model, "%s/text.ltn", test_folder());
    snprintf(token_model, sizeof token_model, "%s/token.ltn", test_folder());
    snprintf(tnl3_model, sizeof tnl3_model, "%s/tnl3.ltn", test_folder());
    test_write_text_model(text_model, 1, -1);
    test_write_token_model(token_model, -1, -1);
    test_write_tnl3_model(tnl3_model, 4, LTN_BF16);
}

static void feed_random(struct ltn_session *session, size_t n, uint64_t seed)
{
    struct test_rng rng = {seed};
    struct ltn_error err;
    for (size_t i = 0; i < n; i++) {
        int32_t id = test_below(&rng, ltn_engine_info(session->engine)->vocab_size);
        CHECK(ltn_session_feed(session, &id, 1, &err));
    }
}

/* To the bit: state, logits, position, draws, last ids. */
static void assert_same_session(struct ltn_session *a, struct ltn_session *b)
{
    size_t bytes = ltn_engine_info(a->engine)->session_bytes;
    char *x = malloc(bytes), *y = malloc(bytes);
    struct ltn_error err;
    assert_true(x && y);
    CHECK(ltn_session_export(a, x, bytes, &err));
    CHECK(ltn_session_export(b, y, bytes, &err));
    assert_memory_equal(x, y, bytes);
    free(x);
    free(y);
}

/* ---- a step of several sessions ------------------------------------------------------------------------ */

enum { N = 9 };

/* Sessions of a batch and their twins alone read prompts of different lengths, some longer than a chunk, then
 * go on, some of them in each step, others being fed long texts meanwhile. */
static void same_as_alone(const char *path, int32_t max_sessions, int n_threads)
{
    static const size_t lengths[N] = {1, 2, 63, 64, 65, 256, 590, 257, 700};
    struct ltn_engine *engine = open_engine(path, n_threads);
    struct ltn_session *batched[N], *alone[N];
    struct test_rng rng = {77};
    struct ltn_batch *batch;
    struct ltn_error err;

    CHECK(ltn_batch_create(&batch, engine, max_sessions, &err));
    for (int i = 0; i < N; i++) {
        struct ltn_session_options options = {.chunk_rows = i == 6 ? 600 : 0};
        alone[i] = open_session(engine, &options);
        options.batch = i % 3 ? batch : NULL;
        batched[i] = open_session(engine, &options);
        ltn_session_seed(batched[i], 40 + (uint64_t)i);
        ltn_session_seed(alone[i], 40 + (uint64_t)i);
        feed_random(batched[i], lengths[i], 1 + (uint64_t)i);
        feed_random(alone[i], lengths[i], 1 + (uint64_t)i);
    }
    for (int round = 0; round < 60; round++) {
        struct ltn_session *moving[N];
        int which[N], n = 0;
        for (int i = 0; i < N; i++) {
            if (round && test_below(&rng, 4) == 0)
                continue;
            which[n] = i;
            moving[n++] = batched[i];
        }
        CHECK(ltn_batch_step(batch, moving, (size_t)n, NULL, &err));
        for (int k = 0; k < n; k++) {
            struct ltn_session *a = moving[k], *b = alone[which[k]];
            int32_t id, other;
            assert_int_equal(a->n_pending, 0);
            assert_int_equal(a->logits_where, LTN_ON_HOST);
            CHECK(ltn_session_sample(a, &ltn_sampling_default, &id, &err));
            CHECK(ltn_session_sample(b, &ltn_sampling_default, &other, &err));
            assert_int_equal(id, other);
            CHECK(ltn_session_feed(a, &id, 1, &err));
            CHECK(ltn_session_feed(b, &id, 1, &err));
            if (test_below(&rng, 20) == 0) {
                size_t more = (size_t)test_below(&rng, 590);
                feed_random(a, more, 1000 + (uint64_t)round);
                feed_random(b, more, 1000 + (uint64_t)round);
            }
        }
    }
    for (int i = 0; i < N; i++) {
        assert_same_session(batched[i], alone[i]);
        ltn_session_free(batched[i]);
        ltn_session_free(alone[i]);
    }
    ltn_batch_free(batch);
    ltn_engine_close(engine);
}

static void test_batched_as_alone(void **state)
{
    (void)state;
    same_as_alone(token_model, 16, 0);
    same_as_alone(token_model, 16, 3);
}

static void test_more_sessions_than_room(void **state)
{
    (void)state;
    same_as_alone(token_model, 4, 0);
    same_as_alone(token_model, 1, 0);
}

static void test_batched_as_alone_tnl3(void **state)
{
    (void)state;
    same_as_alone(tnl3_model, 5, 0);
}

/* Where one is refused, none has moved. */
static void test_a_step_refuses(void **state)
{
    struct ltn_engine *engine = open_engine(text_model, 1), *other = open_engine(token_model, 1);
    struct ltn_session *s[3], *twin, *foreign;
    const struct ltn_session_options scoring = {.score_rows = 1};
    struct ltn_session_options options = scoring;
    struct ltn_session *none;
    struct ltn_batch *batch;
    struct ltn_error err;
    (void)state;

    assert_int_equal(ltn_batch_create(&batch, engine, 0, &err), LTN_ERR_INPUT);
    assert_null(batch);
    assert_int_equal(ltn_batch_create(&batch, engine, LTN_BATCH_MAX + 1, &err), LTN_ERR_INPUT);
    CHECK(ltn_batch_create(&batch, engine, 4, &err));
    options.batch = batch;
    assert_int_equal(ltn_session_create(&none, engine, &options, &err), LTN_ERR_INPUT);
    options = (struct ltn_session_options){.batch = batch, .chunk_rows = 1 << 20};
    assert_int_equal(ltn_session_create(&none, engine, &options, &err), LTN_ERR_INPUT);
    options.chunk_rows = 0;
    assert_int_equal(ltn_session_create(&none, other, &options, &err), LTN_ERR_INPUT);

    CHECK(ltn_batch_step(batch, NULL, 0, NULL, &err));
    for (int i = 0; i < 3; i++) {
        s[i] = open_session(engine, &(struct ltn_session_options){.batch = batch});
        feed_random(s[i], 10, 5);
    }
    twin = open_session(engine, NULL);
    feed_random(twin, 10, 5);
    foreign = open_session(other, NULL);

    CHECK(ltn_session_feed_text(s[1], "amid", 4, &err));
    assert_int_equal(ltn_batch_step(batch, s, 3, NULL, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "session 1: "));
    assert_int_equal(s[0]->pos, 0);
    assert_int_equal(s[0]->n_pending, 10);
    struct ltn_session *with_foreign[] = {s[0], s[2], foreign};
    assert_int_equal(ltn_batch_step(batch, with_foreign, 3, NULL, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "session 2: "));
    assert_int_equal(s[0]->pos, 0);

    /* one that is there twice moves once, one at position 0 not at all */
    CHECK(ltn_session_reset(s[1], &err));
    struct ltn_session *twice[] = {s[0], s[1], s[0], s[2]};
    CHECK(ltn_batch_step(batch, twice, 4, NULL, &err));
    assert_int_equal(s[1]->pos, 0);
    assert_same_session(s[0], twin);
    assert_same_session(s[2], twin);
    ltn_session_free(twin);
    ltn_session_free(foreign);
    for (int i = 0; i < 3; i++)
        ltn_session_free(s[i]);
    ltn_batch_free(batch);
    ltn_batch_free(NULL);
    ltn_engine_close(engine);
    ltn_engine_close(other);
}

static enum ltn_status broken_embed(struct ltn_backend *be, float *x, const struct ltn_matrix *table,
                                    const int32_t *ids, int32_t rows, float scale, struct ltn_error *err)
{
    (void)be, (void)x, (void)table, (void)ids, (void)rows, (void)scale;
    return ltn_fail(err, LTN_ERR_DEVICE, "the device has gone");
}

/* A device that fails leaves no session that looks whole. */
static void test_a_device_fails(void **state)
{
    struct ltn_engine *engine = open_engine(token_model, 1);
    const struct ltn_ops *whole = engine->be->ops;
    struct ltn_ops broken = *whole;
    struct ltn_session *s[3], *twin = open_session(engine, NULL);
    struct ltn_batch *batch;
    const float *logits;
    struct ltn_error err;
    (void)state;

    CHECK(ltn_batch_create(&batch, engine, 4, &err));
    for (int i = 0; i < 3; i++)
        s[i] = open_session(engine, &(struct ltn_session_options){.batch = batch});
    feed_random(s[0], 5, 1);
    feed_random(s[2], 7, 2);
    broken.embed = broken_embed;
    engine->be->ops = &broken;
    assert_int_equal(ltn_batch_step(batch, s, 3, NULL, &err), LTN_ERR_DEVICE);
    assert_string_equal(err.text, "the device has gone");
    engine->be->ops = whole;
    assert_int_equal(ltn_session_logits(s[0], &logits, &err), LTN_ERR_DEVICE);
    assert_int_equal(ltn_session_logits(s[2], &logits, &err), LTN_ERR_DEVICE);
    assert_int_equal(ltn_batch_step(batch, s, 3, NULL, &err), LTN_ERR_DEVICE);
    for (int i = 0; i < 3; i++) {
        CHECK(ltn_session_reset(s[i], &err));
        feed_random(s[i], 9, 3);
    }
    CHECK(ltn_batch_step(batch, s, 3, NULL, &err));
    feed_random(twin, 9, 3);
    for (int i = 0; i < 3; i++) {
        assert_same_session(s[i], twin);
        ltn_session_free(s[i]);
    }
    ltn_session_free(twin);
    ltn_batch_free(batch);
    ltn_engine_close(engine);
}

/* ---- many prompts -------------------------------------------------------------------------------------- */

/* What ltn_many writes to standard output, malloc'd, [*bytes]. */
static char *captured(struct ltn_many *many, size_t *bytes)
{
    FILE *file = tmpfile();
    struct ltn_error err;
    assert_non_null(file);
    fflush(stdout);
    int keep = dup(STDOUT_FILENO);
    assert_true(keep >= 0 && dup2(fileno(file), STDOUT_FILENO) >= 0);
    enum ltn_status status = ltn_many(many, &err);
    assert_true(dup2(keep, STDOUT_FILENO) >= 0);
    close(keep);
    test_check(status, &err, "ltn_many");
    fseek(file, 0, SEEK_END);
    *bytes = (size_t)ftell(file);
    rewind(file);
    char *text = malloc(*bytes + 1);
    assert_non_null(text);
    assert_int_equal(fread(text, 1, *bytes, file), *bytes);
    text[*bytes] = 0;
    fclose(file);
    return text;
}

static void write_prompts(const char *path, int n)
{
    static const char *const words[] = {"the ",        "house ", "and ",     "",
                                        "it\xc3\xa9 ", "?!",     "\"x\\\" ", "then "};
    struct test_rng rng = {11};
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    for (int i = 0; i < n; i++) {
        for (int k = test_below(&rng, i % 10 == 9 ? 2000 : 12); k > 0; k--)
            fputs(words[test_below(&rng, 8)], file);
        fputc('\n', file);
    }
    fclose(file);
}

/* Any width, with little or no room for texts that wait, gives the same bytes; and each text is that of its
 * prompt alone, under its own seed. */
static void test_any_width(void **state)
{
    enum { PROMPTS = 50 };
    static const struct {
        int32_t width;
        size_t max_waiting;
        int n_threads;
    } ways[] = {{1, 1 << 20, 1},  {4, 1 << 20, 2}, {16, 1 << 20, 3},
                {64, 1 << 20, 1}, {16, 1, 2},      {5, 3000, 1}};
    static const char *const stop[] = {"th", "q"};
    char path[160], *first = NULL;
    size_t first_bytes = 0;
    (void)state;
    snprintf(path, sizeof path, "%s/prompts", test_folder());
    write_prompts(path, PROMPTS);
    for (int json = 0; json < 2; json++) {
        for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
            struct ltn_engine *engine = open_engine(text_model, ways[i].n_threads);
            struct ltn_many many = {.engine = engine,
                                    .width = ways[i].width,
                                    .seed = 1234567890123456789u,
                                    .file = path,
                                    .json_out = json,
                                    .max_waiting = ways[i].max_waiting,
                                    .generate = {.max_tokens = 60, .stop = stop, .n_stop = 2}};
            size_t bytes;
            char *text = captured(&many, &bytes);
            assert_int_equal(many.n_prompts, PROMPTS);
            if (ways[i].max_waiting > 1)
                assert_true(many.n_rows >= many.n_steps * (ways[i].width < 5 ? ways[i].width : 4) / 2);
            if (i == 0) {
                first = text;
                first_bytes = bytes;
                assert_true(bytes > 20 * PROMPTS);
            } else {
                assert_int_equal(bytes, first_bytes);
                assert_memory_equal(text, first, bytes);
                free(text);
            }
            ltn_engine_close(engine);
        }
        free(first);
    }
}

/* Each text is what its prompt alone gives under its own seed. */
static void test_each_as_alone(void **state)
{
    static const char *const prompts[] = {"the same", "the same", "another", "", "and one more"};
    struct ltn_engine *engine = open_engine(text_model, 1);
    struct ltn_session *session = open_session(engine, NULL);
    char path[160], *expected;
    size_t expected_bytes, bytes;
    struct ltn_error err;
    FILE *file, *out = open_memstream(&expected, &expected_bytes);
    (void)state;

    snprintf(path, sizeof path, "%s/few", test_folder());
    file = fopen(path, "w");
    assert_true(file && out);
    for (uint64_t i = 0; i < 5; i++) {
        struct collector c = {.bytes = 0};
        const struct ltn_generate_options options = {.max_tokens = 50, .piece = collect, .ctx = &c};
        fprintf(file, "%s\n", prompts[i]);
        CHECK(ltn_session_reset(session, &err));
        CHECK(ltn_session_feed_text(session, prompts[i], strlen(prompts[i]), &err));
        CHECK(ltn_session_end_text(session, &err));
        if (!*prompts[i])
            CHECK(ltn_session_feed(session, &(int32_t){1}, 1, &err));
        ltn_session_seed(session, ltn_text_seed(7, i));
        CHECK(ltn_generate(session, &options, NULL, &err));
        fwrite(c.text, 1, c.bytes, out);
        fputc(0, out);
    }
    fclose(file);
    fclose(out);
    struct ltn_many many = {.engine = engine,
                            .width = 3,
                            .seed = 7,
                            .file = path,
                            .max_waiting = 1 << 20,
                            .generate = {.max_tokens = 50}};
    char *text = captured(&many, &bytes);
    assert_int_equal(bytes, expected_bytes);
    for (size_t i = 0; i < bytes; i++) /* here the texts end in newlines */
        assert_true(text[i] == expected[i] || (expected[i] == 0 && text[i] == '\n'));
    free(text);
    free(expected);
    ltn_session_free(session);
    ltn_engine_close(engine);
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Seeds of texts differ among each other, and between seeds next to each other. */
static void test_text_seeds(void **state)
{
    enum { TEXTS = 20000 };
    static uint64_t seeds[3 * TEXTS];
    (void)state;
    for (uint64_t i = 0; i < TEXTS; i++)
        for (uint64_t seed = 0; seed < 3; seed++)
            seeds[3 * i + seed] = ltn_text_seed(seed, i % 2 ? i : i << 32);
    qsort(seeds, 3 * TEXTS, sizeof *seeds, by_value);
    for (size_t i = 1; i < 3 * TEXTS; i++)
        assert_true(seeds[i] != seeds[i - 1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_batched_as_alone),      cmocka_unit_test(test_more_sessions_than_room),
        cmocka_unit_test(test_batched_as_alone_tnl3), cmocka_unit_test(test_a_step_refuses),
        cmocka_unit_test(test_a_device_fails),        cmocka_unit_test(test_any_width),
        cmocka_unit_test(test_each_as_alone),         cmocka_unit_test(test_text_seeds),
    };
    write_models();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
