/* What a batch is made of, for the library's own files. */
#ifndef LTN_BATCH_H
#define LTN_BATCH_H

#include "src/session.h"

struct ltn_batch {
    const struct ltn_engine *engine;
    struct ltn_workspace ws; /* info.chunk_rows + max_sessions rows, max_sessions of logits */
    int32_t max_sessions;
    /* of the pass being put together */
    int32_t *ids;                 /* [rows] */
    struct ltn_seq *seqs;         /* [n_seqs] */
    struct ltn_session **members; /* [n_seqs] */
    int32_t rows, n_seqs;
    float *logits; /* host, [max_sessions, vocab_size]; NULL where the backend's memory is host's */
};

#endif
