/* What a session is made of, for the library's own files. */
#ifndef LTN_SESSION_H
#define LTN_SESSION_H

#include "src/ahead.h"
#include "src/engine.h"
#include "src/sampling.h"

/* The last LTN_RECENT_IDS ids of the timeline are kept, in session files too (src/session_file.h): penalties
 * look at them, and a fresh detokenizer finds its way back into the text from the last few. */
_Static_assert((int)LTN_RECENT_IDS == (int)LTN_MAX_REPEAT_LAST, "what sessions keep is what penalties need");

/* LTN_BEHIND_BACKEND: the backend has gone on past them (src/ahead.h). LTN_IN_BATCH: in the batch's memory on
 * the backend, in its row (src/batch.h). */
enum ltn_where { LTN_NOWHERE, LTN_BEHIND_BACKEND, LTN_ON_BACKEND, LTN_IN_BATCH, LTN_ON_HOST };

struct ltn_session {
    const struct ltn_engine *engine;
    struct ltn_workspace own; /* none in a session of a batch */
    struct ltn_workspace *ws; /* own, or the batch's, in which nothing stays between calls */
    struct ltn_batch *batch;  /* whose it is; NULL: none's */
    float *state;             /* backend memory, info.state_bytes */
    int64_t pos;              /* tokens that the state has seen */

    int32_t *pending; /* [chunk_rows] fed, but not yet run through the model */
    int32_t n_pending, chunk_rows, score_rows;

    float *logits; /* host, [vocab_size] of the last token; own.logits where that is host memory */
    enum ltn_where logits_where; /* are they there yet; only while nothing is pending */
    float *scores; /* host, [score_rows, vocab_size]; NULL where the backend's memory is host's */

    struct ltn_sampler sampler;
    uint64_t seed, draw;
    struct ltn_ahead ahead;
    struct {
        uint64_t way; /* as the batch numbers them; 0: nothing was drawn */
        uint64_t seed, draw;
        int64_t position;
        int32_t id;
    } drawn; /* with the batch's last step */
    int32_t batch_row;

    int32_t recent[LTN_RECENT_IDS];      /* id number i of the timeline at i % LTN_RECENT_IDS */
    struct ltn_encoder *encoder;         /* NULL until the first text */
    bool in_text;                        /* the encoder is amid a text */
    struct ltn_detokenizer *detokenizer; /* NULL until the first generation */
    bool detokenizer_current;            /* it has seen the timeline up to here */
    bool failed;                         /* the device failed: the state is undefined */
};

/* Refuses where the session cannot go on: after a failure, or amid a text. */
enum ltn_status ltn_session_ready(const struct ltn_session *session, struct ltn_error *err);

/* As ltn_session_sample, for a caller who will feed what it gets and ask again, `most` times in all, this one
 * counted: there is no harm in stopping before, nor in doing something else. */
enum ltn_status ltn_session_draw(struct ltn_session *session, const struct ltn_sampling *sampling,
                                 int64_t most, int32_t *id, struct ltn_error *err);

/* Brings everything up to date and the logits, where there are any, to the host: wherever the position is not
 * 0, they are there afterwards. */
enum ltn_status ltn_session_settle(struct ltn_session *session, struct ltn_error *err);

/* Drops what belongs to the timeline so far, but for the recurrent state: that, position, logits and recent
 * ids are to be set anew, then `failed` cleared. */
void ltn_session_forget(struct ltn_session *session);

#endif
