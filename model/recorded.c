/* The ways into the forward pass: once, recorded for a stream that goes on token by token, and many steps at
 * a time without the host. */
#include "model/decoder.h"

#include <stdlib.h>

/* ---- one stream, token by token: recorded where the backend records ----------------------------------- */

static enum ltn_status record_step(const struct ltn_model *model, struct ltn_workspace *ws, float *state,
                                   struct ltn_error *err)
{
    struct ltn_backend *be = model->be;
    struct ltn_cursor *cursor = ws->cursor;
    const struct ltn_seq seq = {state, 0, 0, 1};

    LTN_TRY(be->ops->record(be, &cursor->position, err));
    enum ltn_status status = ltn_forward_ids(model, ws, &cursor->id, 1, &seq, 1, LTN_WANT_LAST, NULL, err);
    struct ltn_error late;
    enum ltn_status ended = be->ops->recorded(be, &ws->step, status == LTN_OK ? err : &late);
    return status != LTN_OK ? status : ended;
}

/* *done: whether the step was taken. A stream's first token goes the ordinary way: there may be no second. */
static enum ltn_status step_recorded(const struct ltn_model *model, struct ltn_workspace *ws, int32_t id,
                                     const struct ltn_seq *seq, bool *done, struct ltn_error *err)
{
    struct ltn_backend *be = model->be;
    const struct ltn_cursor cursor = {seq->pos, id};
    const bool again = ws->step_model == model && ws->step_state == seq->state;

    *done = false;
    if (!again) {
        if (ws->step)
            be->ops->recording_free(be, ws->step);
        ws->step = NULL;
        ws->step_model = model;
        ws->step_state = seq->state;
        return LTN_OK;
    }
    if (!ws->step)
        LTN_TRY(record_step(model, ws, seq->state, err));
    *done = true;
    LTN_TRY(be->ops->upload(be, ws->cursor, &cursor, sizeof cursor, err));
    return be->ops->replay(be, ws->step, err);
}

enum ltn_status ltn_forward(const struct ltn_model *model, struct ltn_workspace *ws, const int32_t *ids,
                            int32_t rows, const struct ltn_seq *seqs, int32_t n_seqs, enum ltn_want want,
                            const struct ltn_tap *tap, struct ltn_error *err)
{
    struct ltn_backend *be = model->be;
    int32_t n_logits = want == LTN_WANT_ALL ? rows : want == LTN_WANT_LAST ? n_seqs : 0;

    if (rows < 1 || rows > ws->max_rows || n_logits > ws->max_logits)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "forward pass: %d rows with %d logits, the workspace holds 1..%d with %d", rows,
                        n_logits, ws->max_rows, ws->max_logits);
    if (be->ops->record && rows == 1 && want == LTN_WANT_LAST && !tap) {
        bool done;
        LTN_TRY(step_recorded(model, ws, ids[0], seqs, &done, err));
        if (done)
            return LTN_OK;
    }
    LTN_TRY(be->ops->upload(be, ws->ids, ids, (size_t)rows * sizeof *ids, err));
    return ltn_forward_ids(model, ws, ws->ids, rows, seqs, n_seqs, want, tap, err);
}

/* ---- many steps on the device ------------------------------------------------------------------------- */

bool ltn_stepper_possible(const struct ltn_backend *be)
{
    return be->ops->record != NULL;
}

static enum ltn_status step(struct ltn_stepper *s, struct ltn_error *err)
{
    const struct ltn_model *model = s->model;
    struct ltn_backend *be = model->be;

    LTN_TRY(
        ltn_forward_ids(model, s->ws, s->ws->ids, s->n_seqs, s->seqs, s->n_seqs, LTN_WANT_LAST, NULL, err));
    return be->ops->sample(be, s->ws->ids, s->ws->logits, s->n_seqs, model->config.vocab_size, &s->choice,
                           s->draws, s->scratch, s->steps, s->log, s->max_steps, err);
}

/* Nothing of a recorded step runs, so that the states stay as they are. */
static enum ltn_status record_steps(struct ltn_stepper *s, int32_t n, struct ltn_recording **out,
                                    struct ltn_error *err)
{
    struct ltn_backend *be = s->model->be;
    enum ltn_status status = LTN_OK;
    struct ltn_error late;
    LTN_TRY(be->ops->record(be, s->steps, err));
    for (int32_t i = 0; i < n && status == LTN_OK; i++)
        status = step(s, err);
    enum ltn_status ended = be->ops->recorded(be, out, status == LTN_OK ? err : &late);
    return status != LTN_OK ? status : ended;
}

/* Between the steps of one recording less time passes than between two recordings. */
static enum ltn_status take_steps(struct ltn_stepper *s, int32_t n, struct ltn_error *err)
{
    struct ltn_backend *be = s->model->be;
    if (n >= LTN_STEPS_RECORDED && !s->several)
        LTN_TRY(record_steps(s, LTN_STEPS_RECORDED, &s->several, err));
    for (; n >= LTN_STEPS_RECORDED; n -= LTN_STEPS_RECORDED)
        LTN_TRY(be->ops->replay(be, s->several, err));
    for (; n > 0; n--)
        LTN_TRY(be->ops->replay(be, s->one, err));
    return LTN_OK;
}

static size_t align_up(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

static enum ltn_status prepare(struct ltn_stepper *s, const struct ltn_seq *seqs, struct ltn_error *err)
{
    struct ltn_backend *be = s->model->be;
    const size_t n = (size_t)s->n_seqs, bias_bytes = (size_t)s->choice.n_bias * sizeof *s->choice.bias;
    const size_t scratch_bytes = 2 * n * (size_t)s->model->config.vocab_size * sizeof *s->scratch;
    const size_t parts[] = {64, align_up(n * sizeof *s->draws),
                            align_up((size_t)s->max_steps * n * sizeof *s->log), align_up(bias_bytes)};
    const size_t bytes = parts[0] + parts[1] + parts[2] + parts[3];

    LTN_TRY(be->ops->alloc(be, &s->memory, bytes + scratch_bytes, err));
    LTN_TRY(be->ops->zero(be, s->memory, bytes, err));
    uint8_t *at = s->memory;
    s->steps = (int64_t *)at;
    s->draws = (struct ltn_draws *)(at += parts[0]);
    s->log = (int32_t *)(at += parts[1]);
    at += parts[2];
    if (bias_bytes)
        LTN_TRY(be->ops->upload(be, at, s->choice.bias, bias_bytes, err));
    s->choice.bias = (const struct ltn_bias *)at;
    s->scratch = (float *)(at + parts[3]);
    for (int32_t i = 0; i < s->n_seqs; i++)
        s->seqs[i] = (struct ltn_seq){seqs[i].state, seqs[i].pos, i, 1};
    return record_steps(s, 1, &s->one, err);
}

enum ltn_status ltn_stepper_create(struct ltn_stepper *s, const struct ltn_model *model,
                                   struct ltn_workspace *ws, const struct ltn_seq *seqs, int32_t n_seqs,
                                   int32_t max_steps, const struct ltn_choice *choice, struct ltn_error *err)
{
    *s = (struct ltn_stepper){.model = model, .ws = ws, .n_seqs = n_seqs, .max_steps = max_steps};
    s->choice = choice ? *choice : (struct ltn_choice){.temperature = 0};
    if (!ltn_stepper_possible(model->be))
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "%s: cannot record steps of decoding", model->be->name);
    if (n_seqs < 1 || n_seqs > ws->max_rows || n_seqs > ws->max_logits || max_steps < 1)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "decoding: %d streams, %d steps; the workspace holds 1..%d with %d logits", n_seqs,
                        max_steps, ws->max_rows, ws->max_logits);
    s->seqs = malloc((size_t)n_seqs * sizeof *s->seqs);
    enum ltn_status status =
        s->seqs ? prepare(s, seqs, err) : ltn_fail(err, LTN_ERR_MEMORY, "no memory for %d streams", n_seqs);
    if (status != LTN_OK)
        ltn_stepper_free(s);
    return status;
}

enum ltn_status ltn_stepper_seek(struct ltn_stepper *s, int64_t steps, struct ltn_error *err)
{
    s->done = steps;
    return s->model->be->ops->upload(s->model->be, s->steps, &steps, sizeof steps, err);
}

enum ltn_status ltn_stepper_run(struct ltn_stepper *s, const int32_t *ids, const struct ltn_draws *draws,
                                int32_t n_steps, int32_t *out, struct ltn_error *err)
{
    struct ltn_backend *be = s->model->be;
    const size_t row = (size_t)s->n_seqs;

    if (n_steps < 1 || n_steps > s->max_steps)
        return ltn_fail(err, LTN_ERR_INPUT, "decoding: %d steps at once, expected 1..%d", n_steps,
                        s->max_steps);
    if (ids)
        LTN_TRY(be->ops->upload(be, s->ws->ids, ids, row * sizeof *ids, err));
    if (draws)
        LTN_TRY(be->ops->upload(be, s->draws, draws, row * sizeof *draws, err));
    LTN_TRY(take_steps(s, n_steps, err));
    /* The log is a ring. */
    for (int32_t got = 0; got < n_steps;) {
        int32_t at = (int32_t)(s->done % s->max_steps);
        int32_t n = n_steps - got < s->max_steps - at ? n_steps - got : s->max_steps - at;
        LTN_TRY(be->ops->download(be, out + (size_t)got * row, s->log + (size_t)at * row,
                                  (size_t)n * row * sizeof *out, err));
        s->done += n;
        got += n;
    }
    return LTN_OK;
}

void ltn_stepper_free(struct ltn_stepper *s)
{
    if (s->model) {
        if (s->one)
            s->model->be->ops->recording_free(s->model->be, s->one);
        if (s->several)
            s->model->be->ops->recording_free(s->model->be, s->several);
        s->model->be->ops->free(s->model->be, s->memory);
    }
    free(s->seqs);
    *s = (struct ltn_stepper){0};
}
