/* Drawing ahead changes nothing but the time: two sessions live the same life, one on a backend that records
 * and one on the same without, and are equal to the bit at every turn. */
#include <setjmp.h>
#include <stdarg.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "src/batch.h"
#include "tests/recorder.h"
#include "tests/sessions.h"
#include "tests/text_model.h"

static char text_model[128], token_model[128];

static void write_models(void)
{
    snprintf(text_model, sizeof text_model, "%s/text.ltn", test_folder());
    snprintf(token_model, sizeof token_model, "%s/token.ltn", test_folder());
    test_write_text_model(text_model, 1, 2);
    test_write_token_model(token_model, -1, -1);
}

/* [0] one token at a time, [1] ahead */
struct pair {
    struct ltn_engine *engine[2];
    struct ltn_session *session[2], *fork[2];
    char *export[2];
    size_t bytes;
};

static void pair_open(struct pair *p, const char *path)
{
    for (int i = 0; i < 2; i++) {
        p->engine[i] = open_engine(path, 1);
        recorder_install(p->engine[i]->be, i);
        p->session[i] = open_session(p->engine[i], NULL);
        p->fork[i] = open_session(p->engine[i], NULL);
        p->bytes = ltn_engine_info(p->engine[i])->session_bytes;
        p->export[i] = malloc(p->bytes);
        assert_non_null(p->export[i]);
    }
}

static void pair_close(struct pair *p)
{
    for (int i = 0; i < 2; i++) {
        ltn_session_free(p->session[i]);
        ltn_session_free(p->fork[i]);
        ltn_engine_close(p->engine[i]);
        free(p->export[i]);
    }
}

/* State, logits, position, draws, last ids, pending bytes. */
static void assert_same(struct pair *p, struct ltn_session *const s[2])
{
    struct ltn_error err;
    for (int i = 0; i < 2; i++)
        CHECK(ltn_session_export(s[i], p->export[i], p -> bytes, &err));
    assert_memory_equal(p->export[0], p -> export[1], p -> bytes);
}

static struct ltn_sampling random_sampling(struct test_rng *rng, struct ltn_logit_bias bias[3])
{
    struct ltn_sampling s = {.temperature = test_below(rng, 4) ? 1.5 : 0, .top_p = 1};
    if (test_below(rng, 2))
        s.top_p = 0.9;
    if (test_below(rng, 2)) {
        s.repeat_last = 1 + test_below(rng, 100);
        s.repeat_penalty = 1.3;
        s.frequency_penalty = 0.1;
    }
    if (test_below(rng, 3) == 0)
        s.typical = 0.8;
    bias[0] = (struct ltn_logit_bias){9, 1.5f};
    bias[1] = (struct ltn_logit_bias){5, -INFINITY};
    bias[2] = (struct ltn_logit_bias){9, 0.25f};
    s.bias = bias;
    s.n_bias = test_below(rng, 2) ? (size_t)test_below(rng, 4) : 0;
    return s;
}

static void generate(struct pair *p, struct test_rng *rng, const struct ltn_sampling *sampling)
{
    static const char *const stops[] = {"th", "e "};
    static struct collector c[2];
    struct ltn_generated made[2];
    struct ltn_error err;
    const bool text = ltn_engine_info(p->engine[0])->has_tokenizer;
    struct ltn_generate_options o = {.sampling = sampling,
                                     .max_tokens = test_below(rng, 70),
                                     .ignore_eos = test_below(rng, 2),
                                     .keep_open = test_below(rng, 2),
                                     .stop = stops,
                                     .n_stop = text && test_below(rng, 3) == 0 ? 2 : 0,
                                     .piece = collect};
    const size_t stop_after = test_below(rng, 3) == 0 ? (size_t)test_below(rng, 40) : 0;
    for (int i = 0; i < 2; i++) {
        memset(&c[i], 0, sizeof c[i]);
        c[i].stop_after = stop_after;
        o.ctx = &c[i];
        CHECK(ltn_generate(p->session[i], &o, &made[i], &err));
    }
    assert_int_equal(made[0].end, made[1].end);
    assert_true(made[0].n_tokens == made[1].n_tokens);
    assert_int_equal(c[0].n, c[1].n);
    assert_memory_equal(c[0].ids, c[1].ids, c[0].n * sizeof *c[0].ids);
    assert_string_equal(c[0].text, c[1].text);
}

static void turn(struct pair *p, struct test_rng *rng, const struct ltn_sampling *sampling)
{
    enum { GENERATE, GENERATE_AGAIN, FEED, DRAW, LOGITS, EXPORT, FORK, SEED, SKIP, BATCH, RESET, N_TURNS };
    const int kind = test_below(rng, N_TURNS), amount = 1 + test_below(rng, 5);
    int32_t ids[5], drawn[2];
    struct ltn_error err;

    random_ids(ids, 5, ltn_engine_info(p->engine[0])->vocab_size, (uint64_t)test_below(rng, 1 << 20));
    if (kind == GENERATE || kind == GENERATE_AGAIN)
        generate(p, rng, sampling);
    for (int i = 0; i < 2; i++) {
        struct ltn_session *s = p->session[i];
        struct ltn_batch *batch;
        switch (kind) {
        case FEED:
            CHECK(ltn_session_feed(s, ids, (size_t)amount, &err));
            break;
        case DRAW: /* one and, at times, another one fed in its place */
            CHECK(ltn_session_sample(s, sampling, &drawn[i], &err));
            CHECK(ltn_session_feed(s, amount < 3 ? ids : &drawn[i], 1, &err));
            assert_int_equal(drawn[0], drawn[i]);
            break;
        case FORK:
            CHECK(ltn_session_copy(p->fork[i], s, &err));
            p->session[i] = p->fork[i];
            p->fork[i] = s;
            break;
        case SEED:
            ltn_session_seed(s, (uint64_t)amount);
            break;
        case SKIP:
            ltn_session_skip(s, (uint64_t)amount);
            break;
        case BATCH:
            CHECK(ltn_batch_create(&batch, p->engine[i], 2, &err));
            CHECK(ltn_batch_step(batch, &s, 1, amount < 3 ? sampling : NULL, &err));
            ltn_batch_free(batch);
            break;
        case RESET:
            if (amount == 1) {
                CHECK(ltn_session_reset(s, &err));
                CHECK(ltn_session_feed(s, ids, 5, &err));
            }
            break;
        default:
            break;
        }
    }
    assert_true(ltn_session_position(p->session[0]) == ltn_session_position(p->session[1]));
    if (kind == LOGITS)
        assert_true(same_logits(p->session[0], p->session[1]));
    if (kind == EXPORT)
        assert_same(p, p->session);
    if (kind == FORK)
        assert_same(p, p->fork);
}

static void live(const char *path)
{
    enum { LIVES = 40, TURNS = 30 };
    struct test_rng rng = {31};
    struct pair p;
    struct ltn_error err;
    const int before = recorder_replays();

    pair_open(&p, path);
    for (int life = 0; life < LIVES; life++) {
        struct ltn_logit_bias bias[3];
        struct ltn_sampling sampling = random_sampling(&rng, bias);
        for (int i = 0; i < 2; i++) {
            CHECK(ltn_session_reset(p.session[i], &err));
            CHECK(ltn_session_feed(p.session[i], &(int32_t){7}, 1, &err));
        }
        for (int k = 0; k < TURNS; k++) {
            if (test_below(&rng, 8) == 0)
                sampling = random_sampling(&rng, bias);
            turn(&p, &rng, &sampling);
        }
        assert_same(&p, p.session);
    }
    assert_true(recorder_replays() - before > LIVES * TURNS); /* it did go ahead */
    pair_close(&p);
}

static void test_text(void **state)
{
    (void)state;
    live(text_model);
}

static void test_tokens(void **state)
{
    (void)state;
    live(token_model);
}

/* After this token all logits are NaN. */
static void poison(struct ltn_engine *engine, int32_t id)
{
    struct ltn_matrix *m = &engine->model.embed;
    const size_t row = (size_t)m->cols * ltn_dtype_size(m->dtype), bytes = (size_t)m->rows * row;
    uint8_t *copy = malloc(bytes);
    assert_non_null(copy);
    memcpy(copy, m->data, bytes);
    memset(copy + (size_t)id * row, 0xff, row);
    m->data = copy; /* the head keeps its own pointer to the file */
}

/* Logits that are no numbers, met amid steps ahead: the same tokens before them, the same error after. */
static void test_bad_logits(void **state)
{
    static struct collector whole, c[2];
    const struct ltn_sampling sampling = {.temperature = 2, .top_p = 1};
    struct ltn_generate_options o = {
        .sampling = &sampling, .max_tokens = 90, .piece = collect, .ignore_eos = true};
    struct ltn_error err, found[2];
    struct pair p;
    (void)state;

    for (size_t at = 1; at < 40; at += 3) {
        pair_open(&p, token_model);
        for (int i = 0; i < 2; i++)
            CHECK(ltn_session_feed(p.session[i], &(int32_t){7}, 1, &err));
        memset(&whole, 0, sizeof whole);
        memset(c, 0, sizeof c);
        o.ctx = &whole;
        CHECK(ltn_session_copy(p.fork[0], p.session[0], &err));
        CHECK(ltn_generate(p.fork[0], &o, NULL, &err));
        for (int i = 0; i < 2; i++) {
            poison(p.engine[i], whole.ids[at]);
            o.ctx = &c[i];
            assert_int_equal(ltn_generate(p.session[i], &o, NULL, &found[i]), LTN_ERR_INPUT);
        }
        assert_string_equal(found[0].text, found[1].text);
        assert_non_null(strstr(found[1].text, "expected finite numbers"));
        assert_true(c[0].n > 0 && c[0].n <= at + 1);
        assert_int_equal(c[0].n, c[1].n);
        assert_memory_equal(c[0].ids, c[1].ids, c[0].n * sizeof *c[0].ids);
        assert_same(&p, p.session);
        for (int i = 0; i < 2; i++)
            free((void *)p.engine[i]->model.embed.data);
        pair_close(&p);
    }
}

/* ---- drawing with a batch's step ----------------------------------------------------------------------- */

enum { MEMBERS = 6 };

/* [0] draws from logits on the host, [1] with the step */
struct crowd {
    struct ltn_engine *engine[2];
    struct ltn_batch *batch[2];
    struct ltn_session *session[2][MEMBERS];
    char *export[2];
    size_t bytes;
    int n_drawn; /* with a step */
};

static void crowd_open(struct crowd *c, const char *path, int32_t max_sessions)
{
    struct ltn_error err;
    for (int i = 0; i < 2; i++) {
        c->engine[i] = open_engine(path, 1);
        recorder_install(c->engine[i]->be, i);
        CHECK(ltn_batch_create(&c->batch[i], c->engine[i], max_sessions, &err));
        c->bytes = ltn_engine_info(c->engine[i])->session_bytes;
        c->export[i] = malloc(c->bytes);
        assert_non_null(c->export[i]);
        for (int k = 0; k < MEMBERS; k++) {
            const struct ltn_session_options own = {.batch = c->batch[i]};
            c->session[i][k] = open_session(c->engine[i], k == 0 ? NULL : &own);
            CHECK(ltn_session_feed(c->session[i][k], &(int32_t){7 + k}, 1, &err));
        }
    }
}

static void crowd_close(struct crowd *c)
{
    for (int i = 0; i < 2; i++) {
        for (int k = 0; k < MEMBERS; k++)
            ltn_session_free(c->session[i][k]);
        ltn_batch_free(c->batch[i]);
        ltn_engine_close(c->engine[i]);
        free(c->export[i]);
    }
}

static void assert_same_member(struct crowd *c, int k)
{
    struct ltn_error err;
    for (int i = 0; i < 2; i++)
        CHECK(ltn_session_export(c->session[i][k], c->export[i], c -> bytes, &err));
    assert_memory_equal(c->export[0], c -> export[1], c -> bytes);
}

static void member_turn(struct crowd *c, struct test_rng *rng, int k, const struct ltn_sampling *sampling)
{
    enum { DRAW, DRAW_AGAIN, OTHER, LOGITS, EXPORT, COPY, SEED, SKIP, LONG, RESET, ANEW, SETTLE, N_TURNS };
    const int kind = test_below(rng, 2) ? DRAW : test_below(rng, N_TURNS), other = test_below(rng, MEMBERS);
    int32_t ids[90], drawn[2] = {0};
    struct ltn_error err;

    random_ids(ids, 90, ltn_engine_info(c->engine[0])->vocab_size, 1 + (uint64_t)test_below(rng, 1 << 20));
    for (int i = 0; i < 2; i++) {
        struct ltn_session *s = c->session[i][k];
        int32_t id;
        switch (kind) {
        case DRAW:
        case DRAW_AGAIN:
            c->n_drawn += i && s->batch && ltn_batch_drawn(s->batch, s, sampling, &id);
            CHECK(ltn_session_sample(s, sampling, &drawn[i], &err));
            if (kind == DRAW_AGAIN) /* another number, so from the logits */
                CHECK(ltn_session_sample(s, sampling, &drawn[i], &err));
            CHECK(ltn_session_feed(s, &drawn[i], 1, &err));
            assert_int_equal(drawn[0], drawn[i]);
            break;
        case OTHER:
            CHECK(ltn_session_feed(s, ids, 1, &err));
            break;
        case COPY:
            CHECK(ltn_session_copy(c->session[i][other], s, &err));
            break;
        case SEED:
            ltn_session_seed(s, (uint64_t)other);
            break;
        case SKIP:
            ltn_session_skip(s, 1);
            break;
        case LONG:
            CHECK(ltn_session_feed(s, ids, 90, &err));
            break;
        case RESET:
            CHECK(ltn_session_reset(s, &err));
            CHECK(ltn_session_feed(s, ids, 3, &err));
            break;
        case ANEW:
            if (s->batch) {
                ltn_session_free(s);
                s = open_session(c->engine[i], &(struct ltn_session_options){.batch = c->batch[i]});
                CHECK(ltn_session_feed(s, ids, 2, &err));
                c->session[i][k] = s;
            }
            break;
        case SETTLE:
            CHECK(ltn_session_settle(s, &err));
            break;
        default:
            break;
        }
    }
    if (kind == LOGITS)
        assert_true(same_logits(c->session[0][k], c->session[1][k]));
    if (kind == EXPORT)
        assert_same_member(c, k);
}

static void draw_with_steps(const char *path, int32_t max_sessions)
{
    enum { STEPS = 250 };
    struct test_rng rng = {63};
    struct crowd c = {.n_drawn = 0};
    struct ltn_logit_bias bias[3];
    struct ltn_sampling sampling = random_sampling(&rng, bias);
    struct ltn_error err;

    crowd_open(&c, path, max_sessions);
    for (int step = 0; step < STEPS; step++) {
        struct ltn_session *moving[2][MEMBERS];
        int n = 0;
        if (test_below(&rng, 12) == 0)
            sampling = random_sampling(&rng, bias);
        for (int k = 0; k < MEMBERS; k++) {
            if (test_below(&rng, 5) == 0 || (k == 0 && step % 3))
                continue;
            moving[0][n] = c.session[0][k];
            moving[1][n++] = c.session[1][k];
        }
        for (int i = 0; i < 2; i++)
            CHECK(ltn_batch_step(c.batch[i], moving[i], (size_t)n, &sampling, &err));
        for (int turns = 0; turns < 2 * MEMBERS; turns++)
            member_turn(&c, &rng, test_below(&rng, MEMBERS), &sampling);
        if (test_below(&rng, 3) == 0)
            for (int k = 0; k < MEMBERS; k++)
                member_turn(&c, &rng, k, &sampling);
    }
    for (int k = 0; k < MEMBERS; k++)
        assert_same_member(&c, k);
    assert_true(c.n_drawn > STEPS);
    crowd_close(&c);
}

static void test_batch(void **state)
{
    (void)state;
    draw_with_steps(token_model, MEMBERS);
    draw_with_steps(token_model, 2);
}

/* A member whose logits are no numbers: its own draw says so, the others' go on. */
static void test_bad_logits_in_batch(void **state)
{
    struct crowd c;
    struct ltn_error err, found[2];
    int32_t id[2][MEMBERS];
    (void)state;

    crowd_open(&c, token_model, MEMBERS);
    for (int i = 0; i < 2; i++) {
        poison(c.engine[i], 9); /* what member 2 is fed */
        CHECK(ltn_batch_step(c.batch[i], c.session[i], MEMBERS, &ltn_sampling_default, &err));
        for (int k = 0; k < MEMBERS; k++)
            assert_int_equal(ltn_session_sample(c.session[i][k], &ltn_sampling_default, &id[i][k],
                                                k == 2 ? &found[i] : &err),
                             k == 2 ? LTN_ERR_INPUT : LTN_OK);
    }
    assert_string_equal(found[0].text, found[1].text);
    for (int k = 0; k < MEMBERS; k++)
        assert_true(k == 2 || id[0][k] == id[1][k]);
    for (int i = 0; i < 2; i++)
        free((void *)c.engine[i]->model.embed.data);
    crowd_close(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_text),
        cmocka_unit_test(test_tokens),
        cmocka_unit_test(test_bad_logits),
        cmocka_unit_test(test_batch),
        cmocka_unit_test(test_bad_logits_in_batch),
    };
    write_models();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
