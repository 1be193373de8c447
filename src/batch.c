#include "src/batch.h"

#include <stdlib.h>
#include <string.h>

/* ---- life ---------------------------------------------------------------------------------------------- */

static enum ltn_status allocate(struct ltn_batch *b, struct ltn_error *err)
{
    const struct ltn_engine *engine = b->engine;
    const size_t n = (size_t)b->max_sessions, V = (size_t)engine->info.vocab_size;
    /* one whole chunk of a prompt fits beside a token of every other session */
    const int32_t rows = engine->info.chunk_rows + b->max_sessions;

    b->ids = malloc((size_t)rows * sizeof *b->ids);
    b->seqs = malloc(n * sizeof *b->seqs);
    b->members = malloc(n * sizeof(struct ltn_session *));
    b->holders = malloc(n * sizeof(struct ltn_session *));
    if (!engine->be->host_memory)
        b->logits = malloc(n * V * sizeof *b->logits);
    if (!b->ids || !b->seqs || !b->members || !b->holders || (!engine->be->host_memory && !b->logits))
        return ltn_fail(err, LTN_ERR_MEMORY, "batch: no memory for %zu sessions", n);
    return ltn_workspace_create(&b->ws, &engine->model, rows, b->max_sessions, err);
}

static void free_drawing(struct ltn_batch *b)
{
    struct ltn_batch_drawing *d = &b->drawing;
    b->engine->be->ops->free(b->engine->be, d->memory);
    ltn_own_sampling_free(&d->way);
    free(d->host);
    free(d->drawn);
    *d = (struct ltn_batch_drawing){.number = d->number};
}

enum ltn_status ltn_batch_create(struct ltn_batch **out, const struct ltn_engine *engine,
                                 int32_t max_sessions, struct ltn_error *err)
{
    *out = NULL;
    if (max_sessions < 1 || max_sessions > LTN_BATCH_MAX)
        return ltn_fail(err, LTN_ERR_INPUT, "batch: expected 1 to %d sessions, found %d", LTN_BATCH_MAX,
                        max_sessions);
    struct ltn_batch *b = calloc(1, sizeof *b);
    if (!b)
        return ltn_fail(err, LTN_ERR_MEMORY, "batch: no memory");
    b->engine = engine;
    b->max_sessions = max_sessions;
    enum ltn_status status = allocate(b, err);
    if (status != LTN_OK) {
        ltn_batch_free(b);
        return status;
    }
    *out = b;
    return LTN_OK;
}

void ltn_batch_free(struct ltn_batch *b)
{
    if (!b)
        return;
    free_drawing(b);
    ltn_workspace_free(&b->ws);
    free(b->ids);
    free(b->seqs);
    free(b->members);
    free(b->holders);
    free(b->logits);
    free(b);
}

/* ---- drawing with the step ----------------------------------------------------------------------------- */

static size_t align_up(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

static enum ltn_status make_drawing(struct ltn_batch *b, const struct ltn_sampling *sampling,
                                    struct ltn_error *err)
{
    struct ltn_batch_drawing *d = &b->drawing;
    struct ltn_backend *be = b->engine->be;
    const size_t n = (size_t)b->max_sessions, V = (size_t)b->engine->info.vocab_size;
    const size_t ids_bytes = align_up(n * sizeof *d->ids), draws_bytes = align_up(n * sizeof *d->draws),
                 bias_bytes = align_up(sampling->n_bias * sizeof *d->way.sorted),
                 all = 64 + 2 * ids_bytes + draws_bytes + bias_bytes + 2 * n * V * sizeof *d->scratch;

    LTN_TRY(ltn_own_sampling_set(&d->way, sampling, err));
    d->choice = ltn_sampling_choice(sampling);
    d->choice.n_bias = (int32_t)sampling->n_bias;
    d->host = calloc(n, sizeof *d->host);
    d->drawn = malloc(n * sizeof *d->drawn);
    if (!d->host || !d->drawn)
        return ltn_fail(err, LTN_ERR_MEMORY, "batch: no memory for the draws of %zu sessions", n);
    LTN_TRY(be->ops->alloc(be, &d->memory, all, err));
    uint8_t *at = d->memory;
    LTN_TRY(be->ops->zero(be, at, 64, err));
    d->steps = (int64_t *)at;
    d->ids = (int32_t *)(at += 64);
    d->log = (int32_t *)(at += ids_bytes);
    d->draws = (struct ltn_draws *)(at += ids_bytes);
    at += draws_bytes;
    if (d->choice.n_bias)
        LTN_TRY(be->ops->upload(be, at, d->way.sorted, sampling->n_bias * sizeof *d->way.sorted, err));
    d->choice.bias = (const struct ltn_bias *)at;
    d->scratch = (float *)(at + bias_bytes);
    d->number++;
    return LTN_OK;
}

/* What the draws that way need, where there are any on the backend. */
static enum ltn_status prepare(struct ltn_batch *b, const struct ltn_sampling *sampling,
                               struct ltn_error *err)
{
    struct ltn_batch_drawing *d = &b->drawing;

    LTN_TRY(ltn_sampling_check(sampling, b->engine->info.vocab_size, err));
    if (!ltn_stepper_possible(b->engine->be) || (d->memory && ltn_sampling_equal(&d->way.sampling, sampling)))
        return LTN_OK;
    free_drawing(b);
    enum ltn_status status = make_drawing(b, sampling, err);
    if (status != LTN_OK)
        free_drawing(b);
    return status;
}

/* Each member's next token. One that could not be chosen is left to the session, which says why. */
static enum ltn_status draw(struct ltn_batch *b, struct ltn_error *err)
{
    struct ltn_batch_drawing *d = &b->drawing;
    struct ltn_backend *be = b->engine->be;
    const size_t n = (size_t)b->n_seqs;

    for (size_t i = 0; i < n; i++) {
        const struct ltn_session *s = b->members[i];
        d->host[i].seed = s->seed;
        d->host[i].draw = s->draw;
        d->host[i].position = s->pos;
        if (ltn_has_penalties(&d->choice))
            memcpy(d->host[i].recent, s->recent, sizeof s->recent);
    }
    LTN_TRY(be->ops->upload(be, d->draws, d->host, n * sizeof *d->draws, err));
    LTN_TRY(be->ops->sample(be, d->ids, b->ws.logits, b->n_seqs, b->engine->info.vocab_size, &d->choice,
                            d->draws, d->scratch, d->steps, d->log, 1, err));
    LTN_TRY(be->ops->download(be, d->drawn, d->log, n * sizeof *d->drawn, err));
    for (size_t i = 0; i < n; i++) {
        struct ltn_session *s = b->members[i];
        s->drawn.way = s->batch == b && d->drawn[i] >= 0 ? d->number : 0;
        s->drawn.seed = s->seed;
        s->drawn.draw = s->draw;
        s->drawn.position = s->pos;
        s->drawn.id = d->drawn[i];
    }
    return LTN_OK;
}

bool ltn_batch_drawn(const struct ltn_batch *b, const struct ltn_session *s,
                     const struct ltn_sampling *sampling, int32_t *id)
{
    if (s->n_pending > 0 || s->drawn.way == 0 || s->drawn.way != b->drawing.number ||
        s->drawn.position != s->pos || s->drawn.seed != s->seed || s->drawn.draw != s->draw ||
        !ltn_sampling_equal(&b->drawing.way.sampling, sampling))
        return false;
    *id = s->drawn.id;
    return true;
}

/* ---- whose logits lie in the workspace ----------------------------------------------------------------- */

enum ltn_status ltn_batch_fetch(struct ltn_batch *b, struct ltn_session *s, struct ltn_error *err)
{
    struct ltn_backend *be = b->engine->be;
    const size_t V = (size_t)b->engine->info.vocab_size;
    enum ltn_status status =
        be->ops->download(be, s->logits, b->ws.logits + (size_t)s->batch_row * V, V * sizeof *s->logits, err);
    s->logits_where = status == LTN_OK ? LTN_ON_HOST : LTN_NOWHERE;
    s->failed = status != LTN_OK;
    return status;
}

enum ltn_status ltn_batch_settle(struct ltn_batch *b, struct ltn_error *err)
{
    for (; b->n_holders > 0; b->n_holders--) {
        struct ltn_session *s = b->holders[b->n_holders - 1];
        if (s->logits_where == LTN_IN_BATCH && s->n_pending == 0)
            LTN_TRY(ltn_batch_fetch(b, s, err));
    }
    return LTN_OK;
}

void ltn_batch_forget(struct ltn_batch *b, const struct ltn_session *s)
{
    int32_t n = 0;
    for (int32_t i = 0; i < b->n_holders; i++)
        if (b->holders[i] != s)
            b->holders[n++] = b->holders[i];
    b->n_holders = n;
}

/* ---- the step ------------------------------------------------------------------------------------------ */

/* The logits of those that are not the batch's own, or of all, to the host at once. */
static enum ltn_status hand_out(struct ltn_batch *b, bool all, struct ltn_error *err)
{
    struct ltn_backend *be = b->engine->be;
    const size_t row = (size_t)b->engine->info.vocab_size;
    const float *logits = b->ws.logits;

    for (int32_t i = 0; i < b->n_seqs && !all; i++)
        all = b->members[i]->batch != b;
    if (all && !be->host_memory) {
        size_t bytes = (size_t)b->n_seqs * row * sizeof *logits;
        LTN_TRY(be->ops->download(be, b->logits, b->ws.logits, bytes, err));
        logits = b->logits;
    }
    for (int32_t i = 0; i < b->n_seqs; i++) {
        struct ltn_session *s = b->members[i];
        if (all) {
            memcpy(s->logits, logits + (size_t)i * row, row * sizeof *logits);
            s->logits_where = LTN_ON_HOST;
        } else {
            s->logits_where = LTN_IN_BATCH;
            s->batch_row = i;
            b->holders[b->n_holders++] = s;
        }
    }
    return LTN_OK;
}

/* The pass that was put together; each member gets its row of logits. */
static enum ltn_status forward(struct ltn_batch *b, bool draws, struct ltn_error *err)
{
    LTN_TRY(ltn_batch_settle(b, err));
    LTN_TRY(ltn_forward(&b->engine->model, &b->ws, b->ids, b->rows, b->seqs, b->n_seqs, LTN_WANT_LAST, NULL,
                        err));
    for (int32_t i = 0; i < b->n_seqs; i++)
        b->members[i]->pos += b->seqs[i].count;
    if (draws)
        LTN_TRY(draw(b, err));
    LTN_TRY(hand_out(b, !draws, err));
    for (int32_t i = 0; i < b->n_seqs; i++)
        b->members[i]->failed = false;
    return LTN_OK;
}

/* Runs what was put together, if anything, and begins anew. */
static enum ltn_status run(struct ltn_batch *b, bool draws, struct ltn_error *err)
{
    enum ltn_status status = b->n_seqs ? forward(b, draws, err) : LTN_OK;
    b->rows = b->n_seqs = 0;
    return status;
}

/* Its tokens join the pass. Until that has run the session counts as failed. */
static void join(struct ltn_batch *b, struct ltn_session *s)
{
    memcpy(b->ids + b->rows, s->pending, (size_t)s->n_pending * sizeof *b->ids);
    b->seqs[b->n_seqs] = (struct ltn_seq){s->state, s->pos, b->rows, s->n_pending};
    b->members[b->n_seqs++] = s;
    b->rows += s->n_pending;
    s->n_pending = 0;
    s->logits_where = LTN_NOWHERE; /* nobody asks for the last ones any more */
    s->failed = true;
}

enum ltn_status ltn_batch_step(struct ltn_batch *b, struct ltn_session *const *sessions, size_t n,
                               const struct ltn_sampling *sampling, struct ltn_error *err)
{
    struct ltn_error why;

    for (size_t i = 0; i < n; i++) {
        if (sessions[i]->engine != b->engine)
            return ltn_fail(err, LTN_ERR_INPUT,
                            "batch: session %zu: expected the batch's engine, found another", i);
        if (ltn_session_ready(sessions[i], &why) != LTN_OK)
            return ltn_fail(err, why.status, "batch: session %zu: %.400s", i, why.text);
    }
    if (sampling)
        LTN_TRY(prepare(b, sampling, err));
    const bool draws = sampling && b->drawing.memory;
    for (size_t i = 0; i < n; i++)
        LTN_TRY(ltn_ahead_end(sessions[i], err));
    for (size_t i = 0; i < n; i++)
        if (sessions[i]->n_pending > b->ws.max_rows) /* it has longer chunks, and the room for them */
            LTN_TRY(ltn_session_settle(sessions[i], err));
    for (size_t i = 0; i < n; i++) {
        struct ltn_session *s = sessions[i];
        if (b->n_seqs == b->max_sessions || b->rows + s->n_pending > b->ws.max_rows)
            LTN_TRY(run(b, draws, err));
        if (s->n_pending > 0)
            join(b, s);
    }
    return run(b, draws, err);
}
