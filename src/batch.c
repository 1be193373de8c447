#include "src/batch.h"

#include <stdlib.h>
#include <string.h>

static enum ltn_status allocate(struct ltn_batch *b, struct ltn_error *err)
{
    const struct ltn_engine *engine = b->engine;
    const size_t n = (size_t)b->max_sessions, V = (size_t)engine->info.vocab_size;
    /* one whole chunk of a prompt fits beside a token of every other session */
    const int32_t rows = engine->info.chunk_rows + b->max_sessions;

    b->ids = malloc((size_t)rows * sizeof *b->ids);
    b->seqs = malloc(n * sizeof *b->seqs);
    b->members = malloc(n * sizeof(struct ltn_session *));
    if (!engine->be->host_memory)
        b->logits = malloc(n * V * sizeof *b->logits);
    if (!b->ids || !b->seqs || !b->members || (!engine->be->host_memory && !b->logits))
        return ltn_fail(err, LTN_ERR_MEMORY, "batch: no memory for %zu sessions", n);
    return ltn_workspace_create(&b->ws, &engine->model, rows, b->max_sessions, err);
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
    ltn_workspace_free(&b->ws);
    free(b->ids);
    free(b->seqs);
    free(b->members);
    free(b->logits);
    free(b);
}

/* The pass that was put together; each member gets its row of logits. */
static enum ltn_status forward(struct ltn_batch *b, struct ltn_error *err)
{
    struct ltn_backend *be = b->engine->be;
    const size_t row = (size_t)b->engine->info.vocab_size;

    LTN_TRY(ltn_forward(&b->engine->model, &b->ws, b->ids, b->rows, b->seqs, b->n_seqs, LTN_WANT_LAST, NULL,
                        err));
    const float *logits = b->ws.logits;
    if (!be->host_memory) {
        size_t bytes = (size_t)b->n_seqs * row * sizeof *logits;
        LTN_TRY(be->ops->download(be, b->logits, b->ws.logits, bytes, err));
        logits = b->logits;
    }
    for (int32_t i = 0; i < b->n_seqs; i++) {
        struct ltn_session *s = b->members[i];
        memcpy(s->logits, logits + (size_t)i * row, row * sizeof *logits);
        s->logits_where = LTN_ON_HOST;
        s->pos += b->seqs[i].count;
        s->failed = false;
    }
    return LTN_OK;
}

/* Runs what was put together, if anything, and begins anew. */
static enum ltn_status run(struct ltn_batch *b, struct ltn_error *err)
{
    enum ltn_status status = b->n_seqs ? forward(b, err) : LTN_OK;
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
    s->failed = true;
}

enum ltn_status ltn_batch_step(struct ltn_batch *b, struct ltn_session *const *sessions, size_t n,
                               struct ltn_error *err)
{
    struct ltn_error why;

    for (size_t i = 0; i < n; i++) {
        if (sessions[i]->engine != b->engine)
            return ltn_fail(err, LTN_ERR_INPUT,
                            "batch: session %zu: expected the batch's engine, found another", i);
        if (ltn_session_ready(sessions[i], &why) != LTN_OK)
            return ltn_fail(err, why.status, "batch: session %zu: %.400s", i, why.text);
    }
    for (size_t i = 0; i < n; i++)
        LTN_TRY(ltn_ahead_end(sessions[i], err));
    for (size_t i = 0; i < n; i++)
        if (sessions[i]->n_pending > b->ws.max_rows) /* it has longer chunks, and the room for them */
            LTN_TRY(ltn_session_settle(sessions[i], err));
    for (size_t i = 0; i < n; i++) {
        struct ltn_session *s = sessions[i];
        if (b->n_seqs == b->max_sessions || b->rows + s->n_pending > b->ws.max_rows)
            LTN_TRY(run(b, err));
        if (s->n_pending > 0)
            join(b, s);
    }
    return run(b, err);
}
