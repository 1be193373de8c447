/* Engine, sessions and generation through the public interface. */
#include <setjmp.h>
#include <stdarg.h>

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/sessions.h"
#include "tests/text_model.h"

static char text_model[128], token_model[128], tnl3_model[128];

static void write_models(void)
{
    snprintf(text_model, sizeof text_model, "%s/text.ltn", test_folder());
    snprintf(token_model, sizeof token_model, "%s/token.ltn", test_folder());
    snprintf(tnl3_model, sizeof tnl3_model, "%s/tnl3.ltn", test_folder());
    test_write_text_model(text_model, 1, 2);
    test_write_token_model(token_model, -1, -1);
    test_write_tnl3_model(tnl3_model, 5, LTN_F32);
}

/* malloc'd */
static int32_t *new_ids(const struct ltn_engine *engine, size_t n, uint64_t seed)
{
    int32_t *ids = malloc(n * sizeof *ids);
    assert_non_null(ids);
    random_ids(ids, n, ltn_engine_info(engine)->vocab_size, seed);
    return ids;
}

/* ---- split invariance --------------------------------------------------------------------------------- */

struct keeper {
    float *logits; /* [n, vocab] */
    int32_t vocab;
    float largest;
};

static enum ltn_status keep(void *ctx, const float *logits, int64_t position, int32_t rows,
                            struct ltn_error *err)
{
    struct keeper *k = ctx;
    (void)err;
    memcpy(k->logits + position * k->vocab, logits, (size_t)rows * (size_t)k->vocab * sizeof *logits);
    for (int32_t i = 0; i < rows * k->vocab; i++)
        k->largest = fmaxf(k->largest, fabsf(logits[i]));
    return LTN_OK;
}

/* Largest difference between the session's logits and those of the unbroken stream at the same place. */
static double distance(struct ltn_session *session, const struct keeper *k)
{
    struct ltn_error err;
    const float *logits;
    double worst = 0;
    CHECK(ltn_session_logits(session, &logits, &err));
    const float *expected = k->logits + (ltn_session_position(session) - 1) * k->vocab;
    for (int32_t i = 0; i < k->vocab; i++) {
        assert_true(isfinite(logits[i]));
        worst = fmax(worst, fabs((double)logits[i] - expected[i]));
    }
    return worst;
}

static size_t random_piece(struct test_rng *rng, size_t left)
{
    static const int most[] = {1, 2, 17, 300, 2500};
    size_t n = 1 + (size_t)test_below(rng, most[test_below(rng, 5)]);
    return n < left ? n : left;
}

static struct ltn_session *in_chunks(const struct ltn_engine *engine, int rows)
{
    return open_session(engine, &(struct ltn_session_options){.chunk_rows = rows});
}

/* Feeds, asks for logits, saves and loads in memory, forks, rewinds, at random and unaligned places. */
static double walk(const struct ltn_engine *engine, const int32_t *ids, size_t n, const struct keeper *k,
                   int chunk_rows, uint64_t seed)
{
    struct test_rng rng = {seed};
    struct ltn_session *session = in_chunks(engine, chunk_rows);
    size_t bytes = ltn_engine_info(engine)->session_bytes;
    void *saved = malloc(bytes);
    struct ltn_error err;
    double worst = 0;

    assert_non_null(saved);
    for (size_t at = 0; at < n;) {
        size_t piece = random_piece(&rng, n - at);
        CHECK(ltn_session_feed(session, ids + at, piece, &err));
        at += piece;
        assert_int_equal(ltn_session_position(session), at);
        switch (test_below(&rng, 6)) {
        case 0: /* load into a new session, the old one is gone */
            CHECK(ltn_session_export(session, saved, bytes, &err));
            ltn_session_free(session);
            session = in_chunks(engine, 1 + test_below(&rng, 200));
            CHECK(ltn_session_import(session, saved, bytes, &err));
            break;
        case 1: { /* go on in a fork; what happens to the origin must not matter */
            struct ltn_session *fork = in_chunks(engine, chunk_rows);
            CHECK(ltn_session_feed(fork, ids, 3, &err));
            CHECK(ltn_session_copy(fork, session, &err));
            CHECK(ltn_session_feed(session, ids, n < 5 ? n : 5, &err));
            CHECK(ltn_session_reset(session, &err));
            ltn_session_free(session);
            session = fork;
            break;
        }
        case 2: { /* go astray, then rewind */
            CHECK(ltn_session_export(session, saved, bytes, &err));
            CHECK(ltn_session_feed(session, ids, random_piece(&rng, n), &err));
            CHECK(ltn_session_import(session, saved, bytes, &err));
            break;
        }
        case 3: /* feeds that nothing was asked between */
            continue;
        default:
            break;
        }
        worst = fmax(worst, distance(session, k));
    }
    worst = fmax(worst, distance(session, k));
    ltn_session_free(session);
    free(saved);
    return worst;
}

static void split_invariance(const char *path)
{
    enum { N = 20000 };
    static const int chunks[] = {0, 1, 7, 64};
    struct ltn_engine *engine = open_engine(path, 0);
    int32_t *ids = new_ids(engine, N, 21);
    struct ltn_session *whole = open_session(engine, &(struct ltn_session_options){.score_rows = 1 << 20});
    struct keeper k = {.vocab = ltn_engine_info(engine)->vocab_size};
    struct ltn_error err;

    k.logits = malloc((size_t)N * (size_t)k.vocab * sizeof *k.logits);
    assert_non_null(k.logits);
    CHECK(ltn_session_score(whole, ids, N, keep, &k, &err));
    assert_int_equal(ltn_session_position(whole), N);
    assert_true(distance(whole, &k) == 0);
    for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
        double worst = walk(engine, ids, N, &k, chunks[i], 100 + i) / k.largest;
        print_message("# chunks of %d: largest difference %.2g of the largest logit\n", chunks[i], worst);
        assert_true(worst <= 1e-5);
    }
    free(k.logits);
    free(ids);
    ltn_session_free(whole);
    ltn_engine_close(engine);
}

static void test_split_invariance(void **state)
{
    (void)state;
    split_invariance(token_model);
}

static void test_split_invariance_tnl3(void **state)
{
    (void)state;
    split_invariance(tnl3_model);
}

/* Feeds without a question between them are one feed, to the bit. */
static void test_feeds_coalesce(void **state)
{
    struct ltn_engine *engine = open_engine(token_model, 0);
    int32_t *ids = new_ids(engine, 1000, 5);
    struct ltn_session *a = open_session(engine, NULL), *b = open_session(engine, NULL);
    const float *x, *y;
    struct ltn_error err;
    (void)state;
    CHECK(ltn_session_feed(a, ids, 1000, &err));
    for (int i = 0; i < 1000; i++)
        CHECK(ltn_session_feed(b, ids + i, 1, &err));
    CHECK(ltn_session_logits(a, &x, &err));
    CHECK(ltn_session_logits(b, &y, &err));
    assert_memory_equal(x, y, (size_t)ltn_engine_info(engine)->vocab_size * sizeof *x);
    free(ids);
    ltn_session_free(a);
    ltn_session_free(b);
    ltn_engine_close(engine);
}

/* ---- isolation ---------------------------------------------------------------------------------------- */

enum { STREAM = 1500, N_STREAMS = 4 };

struct stream {
    const struct ltn_engine *engine;
    uint64_t seed;
    int32_t greedy[STREAM]; /* what this stream generates */
    float *last;            /* its last logits */
    pthread_t thread;
};

static struct ltn_session *begin_stream(struct stream *s)
{
    struct ltn_session *session = open_session(s->engine, NULL);
    int32_t *ids = new_ids(s->engine, 333, s->seed);
    struct ltn_error err;
    ltn_session_seed(session, s->seed);
    CHECK(ltn_session_feed(session, ids, 333, &err));
    free(ids);
    return session;
}

static void step_stream(struct stream *s, struct ltn_session *session, int i)
{
    struct ltn_error err;
    CHECK(ltn_session_sample(session, &ltn_sampling_default, &s->greedy[i], &err));
    CHECK(ltn_session_feed(session, &s->greedy[i], 1, &err));
}

static void end_stream(struct stream *s, struct ltn_session *session)
{
    size_t bytes = (size_t)ltn_engine_info(s->engine)->vocab_size * sizeof(float);
    const float *logits;
    struct ltn_error err;
    CHECK(ltn_session_logits(session, &logits, &err));
    s->last = malloc(bytes);
    assert_non_null(s->last);
    memcpy(s->last, logits, bytes);
    ltn_session_free(session);
}

static void *run_stream(void *stream)
{
    struct stream *s = stream;
    struct ltn_session *session = begin_stream(s);
    for (int i = 0; i < STREAM; i++)
        step_stream(s, session, i);
    end_stream(s, session);
    return NULL;
}

static void assert_same_stream(const struct stream *a, const struct stream *b)
{
    size_t bytes = (size_t)ltn_engine_info(a->engine)->vocab_size * sizeof(float);
    assert_memory_equal(a->greedy, b->greedy, sizeof a->greedy);
    assert_memory_equal(a->last, b->last, bytes);
}

static void test_streams_do_not_touch(void **state)
{
    static struct stream alone[N_STREAMS], mixed[N_STREAMS], threaded[N_STREAMS];
    struct ltn_engine *engine = open_engine(token_model, 2);
    struct ltn_session *sessions[N_STREAMS];
    (void)state;
    for (int i = 0; i < N_STREAMS; i++) {
        alone[i] = mixed[i] = threaded[i] = (struct stream){.engine = engine, .seed = 70 + (uint64_t)i};
        run_stream(&alone[i]);
        sessions[i] = begin_stream(&mixed[i]);
    }
    for (int t = 0; t < STREAM; t++)
        for (int i = 0; i < N_STREAMS; i++)
            step_stream(&mixed[i], sessions[i], t);
    for (int i = 0; i < N_STREAMS; i++) {
        end_stream(&mixed[i], sessions[i]);
        assert_int_equal(pthread_create(&threaded[i].thread, NULL, run_stream, &threaded[i]), 0);
    }
    for (int i = 0; i < N_STREAMS; i++)
        pthread_join(threaded[i].thread, NULL);
    for (int i = 0; i < N_STREAMS; i++) {
        assert_same_stream(&alone[i], &mixed[i]);
        assert_same_stream(&alone[i], &threaded[i]);
        if (i > 0)
            assert_memory_not_equal(alone[i].greedy, alone[0].greedy, sizeof alone[0].greedy);
        free(alone[i].last);
        free(mixed[i].last);
        free(threaded[i].last);
    }
    ltn_engine_close(engine);
}

/* ---- constant memory ---------------------------------------------------------------------------------- */

static long resident_kib(void)
{
    long total, resident = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%ld %ld", &total, &resident), 2);
    fclose(f);
    return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

#ifdef __SANITIZE_ADDRESS__
enum { MANY = 200000 }; /* it is ten times slower */
#else
enum { MANY = 1000000 };
#endif

static void test_a_million_tokens(void **state)
{
    enum { PIECE = 1000 };
    struct ltn_engine *engine = open_engine(token_model, 0);
    struct ltn_session *session = open_session(engine, NULL);
    int32_t *ids = new_ids(engine, PIECE, 3);
    const float *logits;
    struct ltn_error err;
    long early = 0;
    (void)state;
    for (int i = 0; i < MANY / PIECE; i++) {
        CHECK(ltn_session_feed(session, ids, PIECE, &err));
        if (i == 20)
            early = resident_kib();
    }
    CHECK(ltn_session_logits(session, &logits, &err));
    for (int32_t i = 0; i < ltn_engine_info(engine)->vocab_size; i++)
        assert_true(isfinite(logits[i]));
    assert_int_equal(ltn_session_position(session), MANY);
    print_message("# resident after 21,000 tokens %ld KiB, after %d %ld KiB\n", early, MANY, resident_kib());
    assert_true(resident_kib() - early <= 256);
    free(ids);
    ltn_session_free(session);
    ltn_engine_close(engine);
}

/* ---- what is refused ---------------------------------------------------------------------------------- */

static enum ltn_status refuse(void *ctx, const float *logits, int64_t position, int32_t rows,
                              struct ltn_error *err)
{
    (void)ctx, (void)logits, (void)rows;
    return ltn_fail(err, LTN_ERR_STOPPED, "stopped at %d", (int)position);
}

static void test_session_refuses(void **state)
{
    struct ltn_engine *engine = open_engine(token_model, 1), *other = open_engine(text_model, 1);
    const struct ltn_session_options scoring = {.score_rows = 4};
    struct ltn_session *session = open_session(engine, NULL), *foreign = open_session(other, &scoring);
    const struct ltn_session_options bad_options = {.chunk_rows = -1};
    size_t bytes = ltn_engine_info(engine)->session_bytes;
    struct ltn_session *none;
    const float *logits;
    struct ltn_error err;
    uint8_t *saved = calloc(1, bytes);
    (void)state;

    assert_non_null(saved);
    assert_int_equal(ltn_session_create(&none, engine, &bad_options, &err), LTN_ERR_INPUT);
    assert_null(none);
    assert_int_equal(ltn_session_logits(session, &logits, &err), LTN_ERR_INPUT);
    const int32_t over[] = {1, 2, 360}, under[] = {-1};
    assert_int_equal(ltn_session_feed(session, over, 3, &err), LTN_ERR_INPUT);
    assert_string_equal(err.text, "token 2: expected an id from 0 to 359, found 360");
    assert_int_equal(ltn_session_position(session), 0); /* none of them was taken */
    assert_int_equal(ltn_session_feed(session, under, 1, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_session_feed_text(session, "x", 1, &err), LTN_ERR_UNSUPPORTED);
    assert_int_equal(ltn_session_score(session, over, 2, refuse, NULL, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_session_score(foreign, over, 2, refuse, NULL, &err), LTN_ERR_STOPPED);
    assert_int_equal(ltn_session_copy(session, foreign, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_session_export(session, saved, bytes - 1, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_session_import(session, saved, bytes, &err), LTN_ERR_INPUT); /* all zeros */
    CHECK(ltn_session_export(session, saved, bytes, &err));
    CHECK(ltn_session_import(session, saved, bytes, &err)); /* at position 0, too */
    saved[bytes / 2] ^= 1;                                  /* altered */
    assert_int_equal(ltn_session_import(session, saved, bytes, &err), LTN_ERR_INPUT);

    CHECK(ltn_session_feed_text(foreign, "a text", 6, &err)); /* amid a text nothing else goes */
    assert_int_equal(ltn_session_feed(foreign, over, 1, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_session_logits(foreign, &logits, &err), LTN_ERR_INPUT);
    CHECK(ltn_session_reset(foreign, &err));
    CHECK(ltn_session_feed(foreign, over, 1, &err));
    free(saved);
    ltn_session_free(session);
    ltn_session_free(foreign);
    ltn_engine_close(engine);
    ltn_engine_close(other);
}

static void test_engine_refuses(void **state)
{
    struct ltn_engine_options options = {.device = "gpu"};
    struct ltn_engine *engine;
    struct ltn_error err;
    (void)state;
    assert_int_equal(ltn_engine_open(&engine, "/nowhere/x.ltn", NULL, &err), LTN_ERR_IO);
    assert_non_null(strstr(err.text, "/nowhere/x.ltn"));
    assert_null(engine);
    assert_int_equal(ltn_engine_open(&engine, token_model, &options, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "'gpu'"));
    static const char *const bad[] = {"", "cuda:", "cuda:x", "cuda:1x", "cuda:99999", "cpu:1", "Auto"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(ltn_device_check(bad[i], &err), LTN_ERR_INPUT);
    options = (struct ltn_engine_options){.device = "cpu", .n_threads = -1};
    assert_int_equal(ltn_engine_open(&engine, token_model, &options, &err), LTN_ERR_INPUT);
    options = (struct ltn_engine_options){.device = "cpu", .prefill = "fp9"};
    assert_int_equal(ltn_engine_open(&engine, token_model, &options, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "expected \"exact\" or \"fp8\", found \"fp9\""));
    options.prefill = "fp8";
    assert_int_equal(ltn_engine_open(&engine, token_model, &options, &err), LTN_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.text, "CPU"));
    CHECK(ltn_engine_open(&engine, token_model, NULL, &err)); /* auto always finds something */
    assert_int_equal(ltn_engine_info(engine)->vocab_size, 360);
    assert_false(ltn_engine_info(engine)->has_tokenizer);
    ltn_engine_close(engine);
    ltn_engine_close(NULL);
    ltn_session_free(NULL);
}

/* ---- text and generation ------------------------------------------------------------------------------ */

static struct ltn_session *prompted(const struct ltn_engine *engine, const char *prompt)
{
    struct ltn_session *session = open_session(engine, NULL);
    struct ltn_error err;
    ltn_session_seed(session, 17);
    CHECK(ltn_session_feed_text(session, prompt, strlen(prompt), &err));
    CHECK(ltn_session_end_text(session, &err));
    return session;
}

static struct ltn_generated generate(struct ltn_session *session, struct collector *c, int64_t n,
                                     const char *const *stop, size_t n_stop, bool keep_open)
{
    const struct ltn_generate_options options = {.max_tokens = n,
                                                 .ignore_eos = true,
                                                 .stop = stop,
                                                 .n_stop = n_stop,
                                                 .keep_open = keep_open,
                                                 .piece = collect,
                                                 .ctx = c};
    struct ltn_generated result;
    struct ltn_error err;
    CHECK(ltn_generate(session, &options, &result, &err));
    return result;
}

/* The text is decode(prompt + generated) less decode(prompt). */
static void test_generated_text(void **state)
{
    static struct collector c;
    struct ltn_engine *engine = open_engine(text_model, 0);
    const char *prompt = "the other thing";
    struct ltn_session *session = prompted(engine, prompt);
    int32_t *ids, *all;
    size_t n, bytes;
    char *whole;
    struct ltn_error err;
    (void)state;
    c = (struct collector){0};
    struct ltn_generated made = generate(session, &c, 700, NULL, 0, false);
    assert_int_equal(made.n_tokens, 700);
    assert_int_equal(made.end, LTN_END_LENGTH);
    assert_int_equal(c.n, 700);
    CHECK(ltn_engine_tokenize(engine, prompt, strlen(prompt), &ids, &n, &err));
    assert_int_equal(ltn_session_position(session), n + 700);
    all = malloc((n + c.n) * sizeof *all);
    assert_non_null(all);
    memcpy(all, ids, n * sizeof *ids);
    size_t n_all = n;
    for (size_t i = 0; i < c.n; i++)
        if (c.ids[i] < 352) /* the vocabulary is padded beyond the tokenizer */
            all[n_all++] = c.ids[i];
    CHECK(ltn_engine_detokenize(engine, all, n_all, &whole, &bytes, &err));
    assert_true(bytes > strlen(prompt));
    assert_memory_equal(whole, prompt, strlen(prompt));
    assert_string_equal(whole + strlen(prompt), c.text);
    free(whole);
    free(all);
    free(ids);
    ltn_session_free(session);
    ltn_engine_close(engine);
}

/* Generating, saving in memory, loading elsewhere and going on gives the bytes of one run, wherever it is
 * cut: in the middle of a character, too. */
static void test_resumed_text(void **state)
{
    static struct collector one, two;
    struct ltn_engine *engine = open_engine(text_model, 0);
    struct ltn_session *session = prompted(engine, "hello");
    size_t bytes = ltn_engine_info(engine)->session_bytes;
    void *saved = malloc(bytes);
    struct test_rng rng = {3};
    struct ltn_error err;
    (void)state;
    assert_non_null(saved);
    one = two = (struct collector){0};
    generate(session, &one, 900, NULL, 0, true);
    ltn_session_free(session);
    session = prompted(engine, "hello");
    while (two.n < 900) {
        size_t n = 1 + (size_t)test_below(&rng, 9);
        generate(session, &two, (int64_t)(n < 900 - two.n ? n : 900 - two.n), NULL, 0, true);
        CHECK(ltn_session_export(session, saved, bytes, &err));
        ltn_session_free(session);
        session = open_session(engine, NULL);
        CHECK(ltn_session_import(session, saved, bytes, &err));
    }
    assert_memory_equal(one.ids, two.ids, 900 * sizeof *one.ids);
    assert_string_equal(one.text, two.text);
    free(saved);
    ltn_session_free(session);
    ltn_engine_close(engine);
}

/* Any part of the text, however it lies across tokens, stops it there. */
static void test_stop_across_tokens(void **state)
{
    static struct collector whole, cut;
    struct ltn_engine *engine = open_engine(text_model, 0);
    struct ltn_session *session = prompted(engine, "and then");
    struct test_rng rng = {8};
    (void)state;
    whole = (struct collector){0};
    generate(session, &whole, 300, NULL, 0, false);
    ltn_session_free(session);
    for (int round = 0; round < 40; round++) {
        char part[16];
        size_t length = 2 + (size_t)test_below(&rng, 12);
        size_t at = (size_t)test_below(&rng, (int)(whole.bytes - length));
        memcpy(part, whole.text + at, length);
        part[length] = 0;
        if (strlen(part) != length)
            continue; /* a NUL was generated */
        const char *stop[] = {"never seen in this text", part};
        const char *first = strstr(whole.text, part);
        if (!first)
            continue;
        session = prompted(engine, "and then");
        cut = (struct collector){0};
        struct ltn_generated made = generate(session, &cut, 300, stop, 2, false);
        assert_int_equal(made.end, LTN_END_STRING);
        assert_int_equal(cut.bytes, first - whole.text);
        assert_memory_equal(cut.text, whole.text, cut.bytes);
        ltn_session_free(session);
    }
    ltn_engine_close(engine);
}

static void test_stopped_by_the_caller(void **state)
{
    static struct collector c;
    struct ltn_engine *engine = open_engine(text_model, 0);
    struct ltn_session *session = prompted(engine, "and then");
    const char *stop[] = {"zzzz"};
    (void)state;
    c = (struct collector){.stop_after = 10};
    struct ltn_generated made = generate(session, &c, -1, stop, 1, false);
    assert_int_equal(made.end, LTN_END_STOPPED);
    assert_int_equal(made.n_tokens, 10);
    ltn_session_free(session);
    ltn_engine_close(engine);
}

/* Text may be fed in any pieces. */
static void test_text_in_pieces(void **state)
{
    const char *text = "the other day at \xc3\xa9t\xc3\xa9 \xf0\x9f\x98\x80 in the end  and so on";
    struct ltn_engine *engine = open_engine(text_model, 0);
    struct ltn_session *a = prompted(engine, text), *b = open_session(engine, NULL);
    const float *x, *y;
    struct ltn_error err;
    (void)state;
    for (int round = 0; round < 2; round++) { /* the second time after a reset amid a text */
        CHECK(ltn_session_feed_text(b, "left alone", 10, &err));
        CHECK(ltn_session_reset(b, &err));
        for (const char *c = text; *c; c++)
            CHECK(ltn_session_feed_text(b, c, 1, &err));
        CHECK(ltn_session_end_text(b, &err));
        assert_int_equal(ltn_session_position(a), ltn_session_position(b));
        CHECK(ltn_session_logits(a, &x, &err));
        CHECK(ltn_session_logits(b, &y, &err));
        assert_memory_equal(x, y, (size_t)ltn_engine_info(engine)->vocab_size * sizeof *x);
    }
    ltn_session_free(a);
    ltn_session_free(b);
    ltn_engine_close(engine);
}

/* The end token ends, and is neither given out nor fed; ignore_eos makes it a token like any other. */
static void test_end_token(void **state)
{
    static struct collector c, d;
    char path[160];
    struct ltn_engine *engine = open_engine(text_model, 0);
    struct ltn_session *session = prompted(engine, "well");
    struct ltn_error err;
    (void)state;
    c = d = (struct collector){0};
    generate(session, &c, 50, NULL, 0, false);
    ltn_session_free(session);
    ltn_engine_close(engine);

    size_t at = 20; /* the first time that this token comes */
    for (size_t i = 0; i < at; i++)
        if (c.ids[i] == c.ids[at])
            at = i;
    snprintf(path, sizeof path, "%s/eos.ltn", test_folder());
    test_write_text_model(path, 1, c.ids[at]); /* the same weights */
    engine = open_engine(path, 0);
    session = prompted(engine, "well");
    const struct ltn_generate_options options = {.max_tokens = 50, .piece = collect, .ctx = &d};
    struct ltn_generated made;
    int64_t prompt = ltn_session_position(session);
    CHECK(ltn_generate(session, &options, &made, &err));
    assert_int_equal(made.end, LTN_END_EOS);
    assert_int_equal(made.n_tokens, at);
    assert_int_equal(ltn_session_position(session), prompt + (int64_t)at);
    assert_memory_equal(d.ids, c.ids, at * sizeof *d.ids);
    ltn_session_free(session);
    ltn_engine_close(engine);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_split_invariance),
        cmocka_unit_test(test_split_invariance_tnl3),
        cmocka_unit_test(test_feeds_coalesce),
        cmocka_unit_test(test_streams_do_not_touch),
        cmocka_unit_test(test_a_million_tokens),
        cmocka_unit_test(test_session_refuses),
        cmocka_unit_test(test_engine_refuses),
        cmocka_unit_test(test_generated_text),
        cmocka_unit_test(test_resumed_text),
        cmocka_unit_test(test_stop_across_tokens),
        cmocka_unit_test(test_stopped_by_the_caller),
        cmocka_unit_test(test_text_in_pieces),
        cmocka_unit_test(test_end_token),
    };
    write_models();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
