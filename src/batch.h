/* What a batch is made of, for the library's own files. */
#ifndef LTN_BATCH_H
#define LTN_BATCH_H

#include "src/session.h"

/* Drawing where the logits are, for one way of sampling. */
struct ltn_batch_drawing {
    struct ltn_own_sampling way;
    uint64_t number;          /* of the way, counted from 1 */
    struct ltn_choice choice; /* the same; its biases in `memory` */
    void *memory;             /* backend memory, of what follows */
    int64_t *steps;
    int32_t *ids, *log;      /* [max_sessions] */
    struct ltn_draws *draws; /* [max_sessions] */
    float *scratch;          /* as the operation wants it */
    struct ltn_draws *host;  /* [max_sessions] the draws on their way there, */
    int32_t *drawn;          /* [max_sessions] and what comes back */
};

struct ltn_batch {
    const struct ltn_engine *engine;
    struct ltn_workspace ws; /* info.chunk_rows + max_sessions rows, max_sessions of logits */
    int32_t max_sessions;
    struct ltn_batch_drawing drawing; /* memory NULL: of no way yet */
    struct ltn_session *
        *holders; /* [n_holders] of the batch's own: their logits may still lie in `ws` alone */
    int32_t n_holders;
    /* of the pass being put together */
    int32_t *ids;                 /* [rows] */
    struct ltn_seq *seqs;         /* [n_seqs] */
    struct ltn_session **members; /* [n_seqs] */
    int32_t rows, n_seqs;
    float *logits; /* host, [max_sessions, vocab_size]; NULL where the backend's memory is host's */
};

/* Before ws is used again: who still wants the logits that lie there gets them. */
enum ltn_status ltn_batch_settle(struct ltn_batch *batch, struct ltn_error *err);

/* The logits of a session that is one of the holders, and LTN_IN_BATCH, to the host. */
enum ltn_status ltn_batch_fetch(struct ltn_batch *batch, struct ltn_session *session, struct ltn_error *err);

/* The token that was drawn with the step before, if this is the draw and the way: *id, true. */
bool ltn_batch_drawn(const struct ltn_batch *batch, const struct ltn_session *session,
                     const struct ltn_sampling *sampling, int32_t *id);

/* A session that comes to its end is no holder. */
void ltn_batch_forget(struct ltn_batch *batch, const struct ltn_session *session);

#endif
