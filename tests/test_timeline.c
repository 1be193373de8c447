/* Timelines: after any going back, forking and going on, a session is what a fresh one is that reads the same
 * ids. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "src/timeline.h"
#include "tests/support.h"
#include "tests/text_model.h"

struct bench {
    struct ltn_engine *engine;
    struct ltn_session *session, *fresh;
    struct ltn_timelines *t;
};

static struct bench setup(uint64_t max_images)
{
    char path[128];
    struct bench b;
    struct ltn_error err;

    snprintf(path, sizeof path, "%s/token.ltn", test_folder());
    test_write_token_model(path, -1, -1);
    CHECK(ltn_engine_open(&b.engine, path, &(struct ltn_engine_options){.device = "cpu", .n_threads = 1},
                          &err));
    CHECK(ltn_session_create(&b.session, b.engine, NULL, &err));
    CHECK(ltn_session_create(&b.fresh, b.engine, NULL, &err));
    ltn_session_seed(b.session, 5);
    CHECK(ltn_timelines_create(&b.t, b.engine, b.session,
                               max_images * ltn_engine_info(b.engine)->session_bytes, &err));
    return b;
}

static void teardown(struct bench *b)
{
    ltn_timelines_free(b->t);
    ltn_session_free(b->session);
    ltn_session_free(b->fresh);
    ltn_engine_close(b->engine);
}

static void assert_same(const struct bench *b, struct ltn_session *expected)
{
    const float *found, *wanted;
    float largest = 0;
    struct ltn_error err;

    assert_int_equal(ltn_session_position(b->session), ltn_session_position(expected));
    if (ltn_session_position(expected) == 0)
        return;
    CHECK(ltn_session_logits(b->session, &found, &err));
    CHECK(ltn_session_logits(expected, &wanted, &err));
    const int32_t n = ltn_engine_info(b->engine)->vocab_size;
    for (int32_t i = 0; i < n; i++)
        largest = fmaxf(largest, fabsf(wanted[i]));
    for (int32_t i = 0; i < n; i++)
        if (!(fabsf(found[i] - wanted[i]) <= 1e-5f * largest))
            fail_msg("logit %d: %g, expected %g", i, (double)found[i], (double)wanted[i]);
}

/* ---- a random walk ------------------------------------------------------------------------------------ */

enum { MAX_IDS = 3000, MAX_LINES = 5 };

struct line { /* what a timeline should be */
    char name[8];
    int32_t ids[MAX_IDS]; /* [n] */
    int64_t n;
    int64_t begin[MAX_IDS], answer[MAX_IDS]; /* [n_exchanges] */
    size_t n_exchanges;
};

static struct line lines[MAX_LINES];

struct walk {
    struct bench *b;
    struct line *line;
    struct test_rng rng;
};

static enum ltn_status take(void *ctx, int32_t id, const char *text, size_t bytes, struct ltn_error *err)
{
    struct walk *w = ctx;
    (void)text, (void)bytes;
    w->line->ids[w->line->n++] = id;
    return ltn_timelines_drawn(w->b->t, id, 0, err);
}

static void answer(struct walk *w)
{
    struct ltn_error err;
    CHECK(
        ltn_generate(w->b->session,
                     &(struct ltn_generate_options){
                         .max_tokens = test_below(&w->rng, 40), .piece = take, .ctx = w, .ignore_eos = true},
                     NULL, &err));
}

static void exchange(struct walk *w)
{
    struct line *line = w->line;
    struct ltn_error err;

    CHECK(ltn_timelines_begin(w->b->t, &err));
    line->begin[line->n_exchanges] = line->n;
    for (int k = line->n == 0 ? 1 : test_below(&w->rng, 30); k >= 0; k--) {
        line->ids[line->n] = test_below(&w->rng, ltn_engine_info(w->b->engine)->vocab_size);
        CHECK(ltn_timelines_feed(w->b->t, &line->ids[line->n++], 1, &err));
    }
    line->answer[line->n_exchanges++] = line->n;
    answer(w);
}

static void rewind_line(struct walk *w)
{
    struct line *line = w->line;
    const struct ltn_timeline_info info = ltn_timelines_current(w->b->t);
    struct ltn_error err;

    assert_int_equal(info.position, line->n);
    if (info.oldest == line->n)
        return;
    line->n -= 1 + test_below(&w->rng, (int)(line->n - info.oldest));
    CHECK(ltn_timelines_rewind(w->b->t, info.position - line->n, &err));
    while (line->n_exchanges && line->begin[line->n_exchanges - 1] >= line->n)
        line->n_exchanges--;
    if (line->n_exchanges && line->answer[line->n_exchanges - 1] > line->n)
        line->answer[line->n_exchanges - 1] = line->n;
}

static void undo(struct walk *w)
{
    struct line *line = w->line;
    struct ltn_error err;
    if (ltn_timelines_undo(w->b->t, &err) == LTN_OK)
        line->n = line->begin[--line->n_exchanges];
    else /* only where the past is too short */
        assert_true(line->n_exchanges == 0 ||
                    line->begin[line->n_exchanges - 1] < ltn_timelines_current(w->b->t).oldest);
}

static void again(struct walk *w)
{
    struct line *line = w->line;
    struct ltn_error err;
    if (ltn_timelines_again(w->b->t, &err) != LTN_OK) {
        assert_true(line->n_exchanges == 0 ||
                    line->answer[line->n_exchanges - 1] < ltn_timelines_current(w->b->t).oldest);
        return;
    }
    line->n = line->answer[line->n_exchanges - 1];
    answer(w);
}

static void fork_line(struct walk *w)
{
    struct line *to = &lines[test_below(&w->rng, MAX_LINES)];
    struct ltn_error err;

    if (to == w->line) {
        assert_int_equal(ltn_timelines_fork(w->b->t, to->name, &err), LTN_ERR_INPUT);
        return;
    }
    if (!to->name[0]) {
        memcpy(to, w->line, sizeof *to);
        snprintf(to->name, sizeof to->name, "%d", (int)(to - lines));
    }
    CHECK(ltn_timelines_fork(w->b->t, to->name, &err));
    w->line = to;
}

static void a_random_walk(uint64_t max_images)
{
    static void (*const steps[])(struct walk * w) = {exchange, exchange, exchange, rewind_line,
                                                     undo,     again,    fork_line};
    struct bench b = setup(max_images);
    struct walk w = {.b = &b, .line = lines, .rng = {7 + max_images}};
    struct ltn_error err;

    memset(lines, 0, sizeof lines);
    strcpy(lines[0].name, "main");
    for (int i = 0; i < 250; i++) {
        steps[w.line->n > MAX_IDS - 100 ? 4 : test_below(&w.rng, sizeof steps / sizeof *steps)](&w);
        CHECK(ltn_session_reset(b.fresh, &err));
        CHECK(ltn_session_feed(b.fresh, w.line->ids, (size_t)w.line->n, &err));
        assert_same(&b, b.fresh);
    }
    teardown(&b);
}

static void random_walk(void **state)
{
    (void)state;
    a_random_walk(1000);
}

static void random_walk_with_little_room(void **state)
{
    (void)state;
    a_random_walk(2 * MAX_LINES);
}

/* ---- bounds ------------------------------------------------------------------------------------------- */

static void long_past(void **state)
{
    enum { N = 68000, N_COPIES = 4 };
    struct bench b = setup(1000);
    struct ltn_session *copies[N_COPIES];
    struct test_rng rng = {3};
    int32_t *ids = malloc(N * sizeof *ids);
    struct ltn_error err;
    (void)state;

    assert_non_null(ids);
    for (int i = 0; i < N; i++)
        ids[i] = test_below(&rng, ltn_engine_info(b.engine)->vocab_size);
    CHECK(ltn_timelines_begin(b.t, &err));
    CHECK(ltn_timelines_feed(b.t, ids, N, &err));
    struct ltn_timeline_info info = ltn_timelines_current(b.t);
    const int64_t reach = (LTN_CHECKPOINTS - 1) * LTN_CHECKPOINT_EVERY;
    assert_int_equal(info.n_checkpoints, LTN_CHECKPOINTS);
    assert_true(info.oldest >= N - reach && info.oldest <= N - reach + LTN_CHECKPOINT_EVERY);

    const int64_t targets[N_COPIES] = {info.oldest, info.oldest + 1, (info.oldest + N) / 2, N - 3};
    for (int i = 0; i < N_COPIES; i++) {
        int64_t at = ltn_session_position(b.fresh);
        CHECK(ltn_session_feed(b.fresh, ids + at, (size_t)(targets[i] - at), &err));
        CHECK(ltn_session_create(&copies[i], b.engine, NULL, &err));
        CHECK(ltn_session_copy(copies[i], b.fresh, &err));
    }
    assert_int_equal(ltn_timelines_rewind(b.t, N - info.oldest + 1, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_session_position(b.session), N);
    for (int i = N_COPIES; i-- > 0;) {
        CHECK(ltn_timelines_rewind(b.t, ltn_session_position(b.session) - targets[i], &err));
        assert_same(&b, copies[i]);
        ltn_session_free(copies[i]);
    }
    CHECK(ltn_timelines_undo(b.t, &err)); /* the exchange's beginning is kept however long it is */
    assert_int_equal(ltn_session_position(b.session), 0);
    free(ids);
    teardown(&b);
}

static void bytes_are_bounded(void **state)
{
    struct bench b = setup(4);
    struct ltn_error err;
    char name[16];
    int n = 0;
    (void)state;

    const uint64_t most = 4 * ltn_engine_info(b.engine)->session_bytes;
    for (int i = 0; i < 50; i++) {
        CHECK(ltn_timelines_begin(b.t, &err));
        CHECK(ltn_timelines_feed(b.t, &(int32_t){1}, 1, &err));
        assert_true(ltn_timelines_bytes(b.t) <= most);
    }
    assert_int_equal(ltn_timelines_current(b.t).n_checkpoints, 4);
    assert_int_equal(ltn_timelines_current(b.t).oldest, 46);
    for (;;) {
        snprintf(name, sizeof name, "%d", n);
        if (ltn_timelines_fork(b.t, name, &err) != LTN_OK)
            break;
        assert_true(ltn_timelines_bytes(b.t) <= most);
        n++;
    }
    assert_int_equal(n, 3);
    assert_non_null(strstr(err.text, "no room"));
    CHECK(ltn_timelines_undo(b.t, &err));
    assert_int_equal(ltn_session_position(b.session), 49);
    CHECK(ltn_timelines_fork(b.t, "main", &err));
    assert_int_equal(ltn_session_position(b.session), 50);
    assert_true(ltn_timelines_bytes(b.t) <= most);
    teardown(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_walk),
        cmocka_unit_test(random_walk_with_little_room),
        cmocka_unit_test(long_past),
        cmocka_unit_test(bytes_are_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
