#include "src/ahead.h"

#include <string.h>

#include "src/session.h"

/* ---- the recording, for one way of sampling ------------------------------------------------------------ */

static void free_recording(struct ltn_ahead *a)
{
    ltn_stepper_free(&a->stepper);
    ltn_own_sampling_free(&a->way);
}

static enum ltn_status create_stepper(struct ltn_session *s, const struct ltn_choice *choice,
                                      struct ltn_error *err)
{
    const struct ltn_seq seq = {.state = s->state};
    return ltn_stepper_create(&s->ahead.stepper, &s->engine->model, s->ws, &seq, 1, LTN_AHEAD_MOST, choice,
                              err);
}

static enum ltn_status record(struct ltn_session *s, const struct ltn_sampling *sampling,
                              struct ltn_error *err)
{
    struct ltn_ahead *a = &s->ahead;
    struct ltn_choice choice = ltn_sampling_choice(sampling);

    free_recording(a);
    LTN_TRY(ltn_own_sampling_set(&a->way, sampling, err));
    choice.bias = a->way.sorted;
    choice.n_bias = (int32_t)sampling->n_bias;
    enum ltn_status status = create_stepper(s, &choice, err);
    if (status != LTN_OK)
        free_recording(a);
    return status;
}

/* What the first of some steps needs: memory, and a recording that draws this way. */
static enum ltn_status prepare(struct ltn_session *s, const struct ltn_sampling *sampling,
                               struct ltn_error *err)
{
    struct ltn_ahead *a = &s->ahead;
    struct ltn_backend *be = s->engine->be;
    void *saved = NULL;

    if (!a->saved) {
        LTN_TRY(be->ops->alloc(be, &saved, s->engine->info.state_bytes, err));
        a->saved = saved;
    }
    return a->stepper.model && ltn_sampling_equal(&a->way.sampling, sampling) ? LTN_OK
                                                                              : record(s, sampling, err);
}

/* ---- going ahead --------------------------------------------------------------------------------------- */

bool ltn_ahead_possible(const struct ltn_session *s)
{
    return s->ws == &s->own && s->n_pending == 1 && ltn_stepper_possible(s->engine->be);
}

/* The session takes the step of the token that waits, as the backend has before. */
static void give(struct ltn_session *s, int32_t *id)
{
    struct ltn_ahead *a = &s->ahead;
    a->given++;
    s->pos++;
    s->n_pending = 0;
    s->logits_where = LTN_BEHIND_BACKEND;
    if (a->given == a->ran) { /* it has caught up */
        s->logits_where = LTN_ON_BACKEND;
        a->ran = 0;
    }
    *id = a->ids[a->given];
}

bool ltn_ahead_next(struct ltn_session *s, const struct ltn_sampling *sampling, int32_t *id)
{
    const struct ltn_ahead *a = &s->ahead;
    if (a->ran == 0 || a->given == a->drawn || s->n_pending != 1 || s->pending[0] != a->ids[a->given] ||
        s->seed != a->seed || s->draw != a->draw + (uint64_t)a->given ||
        !ltn_sampling_equal(&a->way.sampling, sampling))
        return false;
    give(s, id);
    return true;
}

static enum ltn_status take_steps(struct ltn_session *s, int32_t n, struct ltn_error *err)
{
    struct ltn_ahead *a = &s->ahead;
    struct ltn_backend *be = s->engine->be;
    struct ltn_draws draws = {.seed = s->seed, .draw = s->draw, .position = s->pos + 1};

    memcpy(draws.recent, s->recent, sizeof draws.recent);
    LTN_TRY(be->ops->copy(be, a->saved, s->state, s->engine->info.state_bytes, err));
    LTN_TRY(ltn_stepper_seek(&a->stepper, s->pos, err));
    return ltn_stepper_run(&a->stepper, a->ids, &draws, n, a->ids + 1, err);
}

enum ltn_status ltn_ahead_begin(struct ltn_session *s, const struct ltn_sampling *sampling, int64_t most,
                                int32_t *id, bool *found, struct ltn_error *err)
{
    struct ltn_ahead *a = &s->ahead;
    struct ltn_backend *be = s->engine->be;

    LTN_TRY(ltn_ahead_end(s, err));
    LTN_TRY(prepare(s, sampling, err));
    const int32_t burst = a->burst, n = most < burst ? (int32_t)most : burst;
    a->burst = burst * 2 < LTN_AHEAD_MOST ? burst * 2 : LTN_AHEAD_MOST;
    a->ids[0] = s->pending[0];
    s->failed = true; /* until it has not */
    LTN_TRY(take_steps(s, n, err));
    for (a->drawn = 0; a->drawn < n && a->ids[a->drawn + 1] >= 0; a->drawn++)
        ;
    *found = a->drawn > 0;
    if (!*found)
        LTN_TRY(be->ops->copy(be, s->state, a->saved, s->engine->info.state_bytes, err));
    s->failed = false;
    if (!*found)
        return LTN_OK;
    a->ran = n;
    a->given = 0;
    a->position = s->pos;
    a->seed = s->seed;
    a->draw = s->draw;
    give(s, id);
    return LTN_OK;
}

enum ltn_status ltn_ahead_end(struct ltn_session *s, struct ltn_error *err)
{
    struct ltn_ahead *a = &s->ahead;
    struct ltn_backend *be = s->engine->be;

    if (a->ran == 0)
        return LTN_OK;
    s->failed = true;
    LTN_TRY(be->ops->copy(be, s->state, a->saved, s->engine->info.state_bytes, err));
    for (int32_t i = 0; i < a->given; i++) {
        const struct ltn_seq seq = {s->state, a->position + i, 0, 1};
        LTN_TRY(ltn_forward(&s->engine->model, s->ws, &a->ids[i], 1, &seq, 1, LTN_WANT_LAST, NULL, err));
    }
    s->logits_where = LTN_ON_BACKEND;
    s->failed = false;
    ltn_ahead_forget(s);
    return LTN_OK;
}

void ltn_ahead_forget(struct ltn_session *s)
{
    s->ahead.ran = 0;
    s->ahead.burst = 2;
}

void ltn_ahead_free(struct ltn_session *s)
{
    free_recording(&s->ahead);
    s->engine->be->ops->free(s->engine->be, s->ahead.saved);
}
