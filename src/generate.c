#include "src/session.h"
#include "src/stop.h"

#include <stdlib.h>
#include <string.h>

/* From so many of the last ids a fresh detokenizer finds its way back into the text: no piece's bytes depend
 * on more than a few before it. */
enum { DETOKENIZER_IDS = 64 };

/* One generation on its way out: model -> detokenizer -> stop strings -> piece. */
struct ltn_generation {
    struct ltn_session *session;
    const struct ltn_generate_options *options;
    struct ltn_stopper stopper;
    struct ltn_generated result;
    bool ended;
};

/* A vocabulary padded beyond its tokenizer has ids without text. */
static bool has_text(const struct ltn_session *s, int32_t id)
{
    size_t bytes;
    return s->engine->tokenizer && ltn_tokenizer_piece(s->engine->tokenizer, id, &bytes) != NULL;
}

/* The detokenizer of a session stands where its timeline stands. After other feeds it starts over from the
 * last ids: what they say has gone out before. */
static enum ltn_status ready_detokenizer(struct ltn_session *s, struct ltn_error *err)
{
    const char *text;
    size_t bytes;

    if (!s->engine->tokenizer || s->detokenizer_current)
        return LTN_OK;
    if (!s->detokenizer)
        LTN_TRY(ltn_detokenizer_create(&s->detokenizer, s->engine->tokenizer, err));
    LTN_TRY(ltn_detokenizer_finish(s->detokenizer, &text, &bytes, err)); /* a new text begins */
    int64_t end = ltn_session_position(s), begin = end > DETOKENIZER_IDS ? end - DETOKENIZER_IDS : 0;
    for (int64_t i = begin; i < end; i++)
        if (has_text(s, s->recent[i % LTN_RECENT_IDS]))
            LTN_TRY(ltn_detokenizer_push(s->detokenizer, s->recent[i % LTN_RECENT_IDS], &text, &bytes, err));
    s->detokenizer_current = true;
    return LTN_OK;
}

static void end(struct ltn_generation *g, enum ltn_end why)
{
    g->ended = true;
    g->result.end = why;
}

/* Hands a piece to the caller; its wish to stop is an end, not a failure. */
static enum ltn_status give(struct ltn_generation *g, int32_t id, const char *text, size_t bytes,
                            struct ltn_error *err)
{
    if (!g->options->piece || (id < 0 && bytes == 0))
        return LTN_OK;
    enum ltn_status status = g->options->piece(g->options->ctx, id, text, bytes, err);
    if (status == LTN_ERR_STOPPED && id >= 0) {
        end(g, LTN_END_STOPPED);
        return LTN_OK;
    }
    return status == LTN_ERR_STOPPED ? LTN_OK : status;
}

/* A token's way from id to text. */
static enum ltn_status emit(struct ltn_generation *g, int32_t id, struct ltn_error *err)
{
    struct ltn_session *s = g->session;
    const char *text = "";
    size_t bytes = 0;

    if (has_text(s, id))
        LTN_TRY(ltn_detokenizer_push(s->detokenizer, id, &text, &bytes, err));
    if (g->stopper.n) {
        bool found;
        LTN_TRY(ltn_stopper_push(&g->stopper, text, bytes, &text, &bytes, &found, err));
        if (found)
            end(g, LTN_END_STRING);
    }
    return give(g, id, text, bytes, err);
}

/* At the end: what the stop strings held back, then what the detokenizer did. */
static enum ltn_status flush(struct ltn_generation *g, struct ltn_error *err)
{
    struct ltn_session *s = g->session;
    const char *text;
    size_t bytes;

    if (g->result.end == LTN_END_STRING)
        return LTN_OK;
    if (g->stopper.n) {
        ltn_stopper_finish(&g->stopper, &text, &bytes);
        LTN_TRY(give(g, -1, text, bytes, err));
    }
    if (!s->engine->tokenizer || g->options->keep_open)
        return LTN_OK;
    s->detokenizer_current = false;
    LTN_TRY(ltn_detokenizer_finish(s->detokenizer, &text, &bytes, err));
    return give(g, -1, text, bytes, err);
}

/* Draws a token and gives it out, or comes to an end. */
static enum ltn_status next(struct ltn_generation *g, struct ltn_error *err)
{
    const struct ltn_generate_options *o = g->options;
    const struct ltn_sampling *sampling = o->sampling ? o->sampling : &ltn_sampling_default;
    struct ltn_session *s = g->session;
    const int64_t left = o->max_tokens < 0 ? INT64_MAX : o->max_tokens - g->result.n_tokens;
    int32_t id;

    /* who looks at the logits of every token wants them of each, not of the last of many */
    LTN_TRY(ltn_session_draw(s, sampling, o->drawn ? 1 : left, &id, err));
    if (id == s->engine->info.eos_id && !o->ignore_eos) {
        end(g, LTN_END_EOS);
        return LTN_OK;
    }
    if (o->drawn) {
        const float *logits;
        LTN_TRY(ltn_session_logits(s, &logits, err));
        LTN_TRY(o->drawn(o->ctx, id, logits, err));
    }
    bool current = s->detokenizer_current; /* feeding does not put it out of step here: emit follows */
    LTN_TRY(ltn_session_feed(s, &id, 1, err));
    s->detokenizer_current = current;
    g->result.n_tokens++;
    return emit(g, id, err);
}

enum ltn_status ltn_generation_next(struct ltn_generation *g, bool *ended, struct ltn_error *err)
{
    if (g->result.n_tokens != g->options->max_tokens) /* it may be 0 */
        LTN_TRY(next(g, err));
    if (!g->ended && g->result.n_tokens == g->options->max_tokens)
        end(g, LTN_END_LENGTH);
    *ended = g->ended;
    return g->ended ? flush(g, err) : LTN_OK;
}

static enum ltn_status begin(struct ltn_generation *g, struct ltn_error *err)
{
    const struct ltn_generate_options *o = g->options;

    if (o->max_tokens < -1)
        return ltn_fail(err, LTN_ERR_INPUT, "max_tokens: expected -1 or more, found %lld",
                        (long long)o->max_tokens);
    if (o->n_stop && !g->session->engine->tokenizer)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "stop strings need a tokenizer, and the model has none");
    LTN_TRY(ltn_session_ready(g->session, err));
    LTN_TRY(ready_detokenizer(g->session, err));
    return ltn_stopper_create(&g->stopper, o->stop, o->n_stop, err);
}

enum ltn_status ltn_generation_begin(struct ltn_generation **out, struct ltn_session *session,
                                     const struct ltn_generate_options *options, struct ltn_error *err)
{
    struct ltn_generation *g = *out = calloc(1, sizeof *g);
    if (!g)
        return ltn_fail(err, LTN_ERR_MEMORY, "generation: no memory");
    g->session = session;
    g->options = options;
    enum ltn_status status = begin(g, err);
    if (status != LTN_OK) {
        ltn_generation_end(g, NULL);
        *out = NULL;
    }
    return status;
}

void ltn_generation_end(struct ltn_generation *g, struct ltn_generated *result)
{
    if (!g)
        return;
    if (result)
        *result = g->result;
    ltn_stopper_free(&g->stopper);
    free(g);
}

enum ltn_status ltn_generate(struct ltn_session *session, const struct ltn_generate_options *options,
                             struct ltn_generated *result, struct ltn_error *err)
{
    struct ltn_generation *g;
    bool ended = false;

    LTN_TRY(ltn_generation_begin(&g, session, options, err));
    enum ltn_status status = LTN_OK;
    while (status == LTN_OK && !ended)
        status = ltn_generation_next(g, &ended, err);
    ltn_generation_end(g, result);
    return status;
}
