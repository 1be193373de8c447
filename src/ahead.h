/* Drawing ahead. Where the backend records, a session that generates lets it take several steps at once, each
 * token drawn on the device and fed to the next step, and hands the tokens out one by one. Meanwhile the
 * session is in every respect what it would be one by one, but for the backend, which is further: whatever
 * needs the recurrent state or the logits first calls ltn_ahead_end, which goes back to a copy of the state
 * and takes the steps that count again. */
#ifndef LTN_AHEAD_H
#define LTN_AHEAD_H

#include "model/decoder.h"
#include "src/ltn.h"
#include "src/sampling.h"

struct ltn_session;

enum { LTN_AHEAD_MOST = 16 }; /* tokens at once: the host's part hides behind them, and text still flows */

struct ltn_ahead {
    struct ltn_stepper stepper; /* draws that way; its model is NULL: there is none yet */
    struct ltn_own_sampling way;
    float *saved;                    /* backend memory: the state before the first of the steps */
    int64_t position;                /* of the state there */
    uint64_t seed, draw;             /* of the first token drawn */
    int32_t ids[LTN_AHEAD_MOST + 1]; /* [0] was fed; [i + 1] was drawn from what came after [i] */
    int32_t ran;                     /* steps that the backend took; 0: it is where the session is */
    int32_t drawn, given; /* tokens that came of them, less than `ran` where logits were no numbers; and of
                             them so many handed out: the steps that count */
    int32_t burst;        /* steps to take next time */
};

/* The next token, if it is known already: *id, true. The session has then taken the step before it. */
bool ltn_ahead_next(struct ltn_session *session, const struct ltn_sampling *sampling, int32_t *id);

/* Takes up to `most` steps from the one token that waits, and gives the first that was drawn, if one could
 * be: *found. Else the session is as before. Only where ltn_ahead_possible. */
bool ltn_ahead_possible(const struct ltn_session *session);
enum ltn_status ltn_ahead_begin(struct ltn_session *session, const struct ltn_sampling *sampling,
                                int64_t most, int32_t *id, bool *found, struct ltn_error *err);

/* Brings the backend to where the session is, to the bit as if it had never been elsewhere. */
enum ltn_status ltn_ahead_end(struct ltn_session *session, struct ltn_error *err);

/* The state of the backend is to be set anew, and need not be brought back. */
void ltn_ahead_forget(struct ltn_session *session);
void ltn_ahead_free(struct ltn_session *session);

#endif
