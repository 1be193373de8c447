#include "src/session.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "src/batch.h"
#include "src/rng.h"

/* ---- life ---------------------------------------------------------------------------------------------- */

/* Its logits are read where the backend leaves them. */
static bool reads_in_place(const struct ltn_session *s)
{
    return s->engine->be->host_memory && s->ws == &s->own;
}

static enum ltn_status allocate(struct ltn_session *s, struct ltn_error *err)
{
    const struct ltn_engine *engine = s->engine;
    struct ltn_backend *be = engine->be;
    const size_t V = (size_t)engine->info.vocab_size;
    void *state = NULL;

    if (s->ws == &s->own)
        LTN_TRY(ltn_workspace_create(&s->own, &engine->model, s->chunk_rows,
                                     s->score_rows ? s->score_rows : 1, err));
    LTN_TRY(be->ops->alloc(be, &state, engine->info.state_bytes, err));
    s->state = state;
    LTN_TRY(ltn_sampler_create(&s->sampler, engine->info.vocab_size, err));
    s->pending = malloc((size_t)s->chunk_rows * sizeof *s->pending);
    s->logits = reads_in_place(s) ? s->own.logits : malloc(V * sizeof *s->logits);
    if (s->score_rows && !be->host_memory)
        s->scores = malloc((size_t)s->score_rows * V * sizeof *s->scores);
    if (!s->pending || !s->logits || (s->score_rows && !be->host_memory && !s->scores))
        return ltn_fail(err, LTN_ERR_MEMORY, "session: no memory for %d rows of %zu logits", s->score_rows,
                        V);
    return ltn_session_reset(s, err);
}

enum ltn_status ltn_session_create(struct ltn_session **out, const struct ltn_engine *engine,
                                   const struct ltn_session_options *options, struct ltn_error *err)
{
    const struct ltn_batch *batch = options ? options->batch : NULL;
    int32_t chunk_rows = options && options->chunk_rows ? options->chunk_rows : engine->info.chunk_rows;
    int32_t score_rows = options ? options->score_rows : 0;

    *out = NULL;
    if (chunk_rows < 1 || score_rows < 0)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "session: expected chunk_rows of 1 or more and score_rows of 0 or more, found %d, %d",
                        chunk_rows, score_rows);
    if (batch && (batch->engine != engine || chunk_rows > engine->info.chunk_rows || score_rows > 0))
        return ltn_fail(
            err, LTN_ERR_INPUT,
            "session of a batch: expected the batch's engine, chunk_rows up to %d and no score_rows",
            engine->info.chunk_rows);
    struct ltn_session *s = calloc(1, sizeof *s);
    if (!s)
        return ltn_fail(err, LTN_ERR_MEMORY, "session: no memory");
    s->engine = engine;
    s->batch = options ? options->batch : NULL;
    s->ws = s->batch ? &s->batch->ws : &s->own;
    s->chunk_rows = chunk_rows;
    s->score_rows = score_rows < chunk_rows ? score_rows : chunk_rows;
    enum ltn_status status = allocate(s, err);
    if (status != LTN_OK) {
        ltn_session_free(s);
        return status;
    }
    *out = s;
    return LTN_OK;
}

void ltn_session_free(struct ltn_session *s)
{
    if (!s)
        return;
    if (s->batch)
        ltn_batch_forget(s->batch, s);
    ltn_encoder_free(s->encoder);
    ltn_detokenizer_free(s->detokenizer);
    ltn_sampler_free(&s->sampler);
    ltn_ahead_free(s);
    s->engine->be->ops->free(s->engine->be, s->state);
    if (!reads_in_place(s))
        free(s->logits);
    ltn_workspace_free(&s->own);
    free(s->pending);
    free(s->scores);
    free(s);
}

/* An encoder that was left amid a text, or failed, is of no more use. */
static void drop_text(struct ltn_session *s)
{
    if (!s->in_text)
        return;
    ltn_encoder_free(s->encoder);
    s->encoder = NULL;
    s->in_text = false;
}

void ltn_session_forget(struct ltn_session *s)
{
    drop_text(s);
    ltn_ahead_forget(s);
    s->drawn.way = 0;
    s->detokenizer_current = false;
    s->n_pending = 0;
    s->logits_where = LTN_NOWHERE;
    s->failed = true; /* until the state is whole again */
}

enum ltn_status ltn_session_reset(struct ltn_session *s, struct ltn_error *err)
{
    struct ltn_backend *be = s->engine->be;
    ltn_session_forget(s);
    LTN_TRY(be->ops->zero(be, s->state, s->engine->info.state_bytes, err));
    s->failed = false;
    s->pos = 0;
    s->draw = 0;
    return LTN_OK;
}

int64_t ltn_session_position(const struct ltn_session *s)
{
    return s->pos + s->n_pending;
}

void ltn_session_seed(struct ltn_session *s, uint64_t seed)
{
    s->seed = seed;
    s->draw = 0;
}

void ltn_session_skip(struct ltn_session *s, uint64_t draws)
{
    s->draw += draws;
}

enum ltn_status ltn_session_ready(const struct ltn_session *s, struct ltn_error *err)
{
    if (s->failed)
        return ltn_fail(err, LTN_ERR_DEVICE,
                        "session: an earlier failure left no valid state: reset or import first");
    if (s->in_text)
        return ltn_fail(err, LTN_ERR_INPUT, "session: a text is being fed: end it first");
    return LTN_OK;
}

/* ---- feeding ------------------------------------------------------------------------------------------- */

/* Runs rows ids through the model; logits are left in the workspace. */
static enum ltn_status run(struct ltn_session *s, const int32_t *ids, int32_t rows, enum ltn_want want,
                           struct ltn_error *err)
{
    const struct ltn_seq seq = {s->state, s->pos, 0, rows};
    LTN_TRY(ltn_ahead_end(s, err));
    if (s->batch)
        LTN_TRY(ltn_batch_settle(s->batch, err));
    enum ltn_status status = ltn_forward(&s->engine->model, s->ws, ids, rows, &seq, 1, want, NULL, err);
    if (status != LTN_OK) {
        s->failed = true;
        return status;
    }
    s->pos += rows;
    return LTN_OK;
}

static enum ltn_status run_pending(struct ltn_session *s, enum ltn_want want, struct ltn_error *err)
{
    if (s->n_pending == 0)
        return LTN_OK;
    int32_t rows = s->n_pending;
    s->n_pending = 0;
    s->logits_where = LTN_NOWHERE;
    LTN_TRY(run(s, s->pending, rows, want, err));
    s->logits_where = want == LTN_WANT_LAST ? LTN_ON_BACKEND : LTN_NOWHERE;
    return LTN_OK;
}

static enum ltn_status check_ids(const struct ltn_session *s, const int32_t *ids, size_t n,
                                 struct ltn_error *err)
{
    const int32_t V = s->engine->info.vocab_size;
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= V)
            return ltn_fail(err, LTN_ERR_INPUT, "token %" PRId64 ": expected an id from 0 to %d, found %d",
                            ltn_session_position(s) + (int64_t)i, V - 1, ids[i]);
    return LTN_OK;
}

/* The last full step waits as well, so that its logits can still be asked for. */
static enum ltn_status take(struct ltn_session *s, const int32_t *ids, size_t n, struct ltn_error *err)
{
    LTN_TRY(check_ids(s, ids, n, err));
    for (size_t i = 0; i < n; i++) {
        if (s->n_pending == s->chunk_rows)
            LTN_TRY(run_pending(s, LTN_WANT_NONE, err));
        s->recent[ltn_session_position(s) % LTN_RECENT_IDS] = ids[i];
        s->pending[s->n_pending++] = ids[i];
    }
    return LTN_OK;
}

enum ltn_status ltn_session_feed(struct ltn_session *s, const int32_t *ids, size_t n, struct ltn_error *err)
{
    LTN_TRY(ltn_session_ready(s, err));
    s->detokenizer_current = false;
    return take(s, ids, n, err);
}

static enum ltn_status take_encoded(void *session, const int32_t *ids, size_t n, struct ltn_error *err)
{
    return take(session, ids, n, err);
}

enum ltn_status ltn_session_feed_text(struct ltn_session *s, const char *text, size_t bytes,
                                      struct ltn_error *err)
{
    if (!s->in_text || s->failed) {
        LTN_TRY(ltn_session_ready(s, err));
        if (!s->engine->tokenizer)
            return ltn_fail(err, LTN_ERR_UNSUPPORTED, "%s: the model has no tokenizer, only token ids work",
                            s->engine->checkpoint.file.path);
        if (!s->encoder)
            LTN_TRY(ltn_encoder_create(&s->encoder, s->engine->tokenizer, take_encoded, s, err));
        s->in_text = true;
    }
    s->detokenizer_current = false;
    return ltn_encoder_feed(s->encoder, text, bytes, err);
}

enum ltn_status ltn_session_end_text(struct ltn_session *s, struct ltn_error *err)
{
    if (!s->in_text || s->failed)
        return ltn_session_ready(s, err); /* a text of no pieces */
    LTN_TRY(ltn_encoder_finish(s->encoder, err));
    s->in_text = false;
    return LTN_OK;
}

/* ---- results ------------------------------------------------------------------------------------------- */

enum ltn_status ltn_session_logits(struct ltn_session *s, const float **logits, struct ltn_error *err)
{
    struct ltn_backend *be = s->engine->be;

    LTN_TRY(ltn_session_ready(s, err));
    LTN_TRY(run_pending(s, LTN_WANT_LAST, err));
    LTN_TRY(ltn_ahead_end(s, err));
    if (s->logits_where == LTN_NOWHERE)
        return ltn_fail(err, LTN_ERR_INPUT, "session: no logits before the first token");
    if (s->logits_where == LTN_IN_BATCH)
        LTN_TRY(ltn_batch_fetch(s->batch, s, err));
    if (s->logits_where == LTN_ON_BACKEND) {
        size_t bytes = (size_t)s->engine->info.vocab_size * sizeof *s->logits;
        enum ltn_status status =
            reads_in_place(s) ? LTN_OK : be->ops->download(be, s->logits, s->ws->logits, bytes, err);
        if (status != LTN_OK) {
            s->failed = true;
            return status;
        }
        s->logits_where = LTN_ON_HOST;
    }
    *logits = s->logits;
    return LTN_OK;
}

enum ltn_status ltn_session_score(struct ltn_session *s, const int32_t *ids, size_t n, ltn_logits_fn *each,
                                  void *ctx, struct ltn_error *err)
{
    struct ltn_backend *be = s->engine->be;
    const size_t row_bytes = (size_t)s->engine->info.vocab_size * sizeof(float);

    LTN_TRY(ltn_session_ready(s, err));
    if (s->score_rows == 0)
        return ltn_fail(err, LTN_ERR_INPUT, "session: created without score_rows, it cannot score");
    LTN_TRY(check_ids(s, ids, n, err));
    if (n == 0)
        return LTN_OK;
    LTN_TRY(run_pending(s, LTN_WANT_NONE, err));
    s->detokenizer_current = false;
    for (size_t done = 0; done < n;) {
        int32_t rows = n - done < (size_t)s->score_rows ? (int32_t)(n - done) : s->score_rows;
        int64_t position = s->pos;
        for (int32_t i = 0; i < rows; i++)
            s->recent[(position + i) % LTN_RECENT_IDS] = ids[done + (size_t)i];
        LTN_TRY(run(s, ids + done, rows, LTN_WANT_ALL, err));
        const float *logits = s->ws->logits;
        if (!be->host_memory) {
            LTN_TRY(be->ops->download(be, s->scores, s->ws->logits, (size_t)rows * row_bytes, err));
            logits = s->scores;
        }
        enum ltn_status status = each(ctx, logits, position, rows, err);
        memmove(s->logits, logits + (size_t)(rows - 1) * (size_t)s->engine->info.vocab_size, row_bytes);
        s->logits_where = LTN_ON_HOST;
        LTN_TRY(status);
        done += (size_t)rows;
    }
    return LTN_OK;
}

/* From the logits as they are on the host. */
static enum ltn_status draw_here(struct ltn_session *s, const struct ltn_sampling *sampling, int32_t *id,
                                 struct ltn_error *err)
{
    int32_t recent[LTN_RECENT_IDS], n = 0;
    const float *logits;
    LTN_TRY(ltn_session_logits(s, &logits, err));
    for (; ltn_sampling_has_penalties(sampling) && n < sampling->repeat_last && n < s->pos; n++)
        recent[n] = s->recent[(s->pos - 1 - n) % LTN_RECENT_IDS];
    return ltn_sample(&s->sampler, logits, sampling, recent, n, ltn_uniform(s->seed, s->draw), id, err);
}

enum ltn_status ltn_session_draw(struct ltn_session *s, const struct ltn_sampling *sampling, int64_t most,
                                 int32_t *id, struct ltn_error *err)
{
    LTN_TRY(ltn_session_ready(s, err));
    LTN_TRY(ltn_sampling_check(sampling, s->engine->info.vocab_size, err));
    bool found = ltn_ahead_next(s, sampling, id) || (s->batch && ltn_batch_drawn(s->batch, s, sampling, id));
    if (!found && most > 1 && ltn_ahead_possible(s))
        LTN_TRY(ltn_ahead_begin(s, sampling, most, id, &found, err));
    if (!found)
        LTN_TRY(draw_here(s, sampling, id, err));
    s->draw++;
    return LTN_OK;
}

enum ltn_status ltn_session_sample(struct ltn_session *s, const struct ltn_sampling *sampling, int32_t *id,
                                   struct ltn_error *err)
{
    return ltn_session_draw(s, sampling, 1, id, err);
}

/* ---- copies -------------------------------------------------------------------------------------------- */

enum ltn_status ltn_session_settle(struct ltn_session *s, struct ltn_error *err)
{
    const float *logits;
    LTN_TRY(ltn_session_ready(s, err));
    if (ltn_session_position(s) > 0)
        LTN_TRY(ltn_session_logits(s, &logits, err));
    return LTN_OK;
}

enum ltn_status ltn_session_copy(struct ltn_session *dst, struct ltn_session *src, struct ltn_error *err)
{
    struct ltn_backend *be = src->engine->be;

    if (dst->engine != src->engine)
        return ltn_fail(err, LTN_ERR_INPUT, "session: a copy needs two sessions of one engine");
    LTN_TRY(ltn_session_settle(src, err));
    if (dst == src)
        return LTN_OK;
    ltn_session_forget(dst);
    LTN_TRY(be->ops->copy(be, dst->state, src->state, src->engine->info.state_bytes, err));
    memcpy(dst->logits, src->logits, (size_t)src->engine->info.vocab_size * sizeof *src->logits);
    memcpy(dst->recent, src->recent, sizeof src->recent);
    dst->logits_where = src->logits_where;
    dst->pos = src->pos;
    dst->seed = src->seed;
    dst->draw = src->draw;
    dst->failed = false;
    return LTN_OK;
}
