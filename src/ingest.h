/* A stream without end: text (or ids) from standard input goes into one session, in constant memory, and now
 * and then a fork of it is asked a question and dropped. */
#ifndef LTN_INGEST_H
#define LTN_INGEST_H

#include "src/ltn.h"

/* Receives a fork that has just read the question, to let it answer. LTN_ERR_STOPPED ends the reading in good
 * order; any other failure too, and is what ltn_ingest returns. */
typedef enum ltn_status ltn_answer_fn(void *ctx, struct ltn_session *fork, struct ltn_error *err);

struct ltn_ingest {
    struct ltn_session *session; /* its engine is `engine` */
    const struct ltn_engine *engine;
    bool ids;  /* the input is token ids, as src/cli.h parses them; else text */
    bool echo; /* write what was read to standard output */
    /* Ask after every so many tokens, or after so many seconds in which something came; 0: only at the end.
     * Tokens are counted from where the session stands at the beginning, so where the questions fall does not
     * depend on how the input arrives. At a time, text counts but for its last words, which may yet change.
     */
    int64_t every_tokens;
    double every_seconds;
    const int32_t *question; /* [n_question] */
    size_t n_question;
    ltn_answer_fn *answer; /* NULL: nothing is ever asked */
    void *ctx;
};

/* Reads standard input to its end, asks a last time unless just done, and leaves the session behind all that
 * was read: also where it fails or, on a signal, returns LTN_ERR_STOPPED. The tokens are those of the whole
 * text in one piece. A question at position 0 is asked after the model's BOS token, if it has one. */
enum ltn_status ltn_ingest(const struct ltn_ingest *ingest, struct ltn_error *err);

#endif
