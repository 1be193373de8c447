/* What is generated, as lines of JSON on stdout.
 *
 * LTN_JSONL_TEXT, one line for each text, which is written as it comes:
 *   {"text": "...", "tokens": 12, "logprob": -31.7, "end": "length"}
 * or, of token ids, "ids": [5, 17, ...] in the place of "text". logprob is the sum of all tokens'; end is
 * length, eos, string or stopped.
 *
 * LTN_JSONL_TOKENS, one line for each token:
 *   {"id": 17, "text": " the", "logprob": -0.91, "top": [{"id": 17, "piece": "\u2581the", "logprob": -0.91},
 * ...]} text is what the token makes certain, so that all texts together are the text; what came of the last
 * ones only at the end follows as {"text": "..."}. piece is the token as the vocabulary spells it, null where
 * it has none.
 *
 * In each line "index" comes first where there are several texts. Log-probabilities are natural logarithms of
 * what the model says, before penalties, bias, temperature and what is cut off; null for one of probability
 * 0. What is not UTF-8 becomes U+FFFD. */
#ifndef LTN_JSONL_H
#define LTN_JSONL_H

#include "src/logprobs.h"
#include "src/ltn.h"

enum { LTN_JSONL_MAX_TOP = 100 };

struct ltn_jsonl {
    const struct ltn_engine *engine;
    enum { LTN_JSONL_NONE, LTN_JSONL_TEXT, LTN_JSONL_TOKENS } form;
    bool ids;      /* of LTN_JSONL_TEXT */
    bool indexed;  /* there are several texts */
    int32_t n_top; /* of LTN_JSONL_TOKENS: 0 to LTN_JSONL_MAX_TOP */
    /* of the text so far */
    int64_t index, n_tokens;
    double sum;
    struct ltn_logprob last, top[LTN_JSONL_MAX_TOP]; /* of the token drawn last */
    /* a line being made */
    char *line; /* [bytes] */
    size_t bytes, room;
    bool failed; /* for want of memory */
};

/* One character as it stands in a JSON string (RFC 8259, section 7), what is not UTF-8 as U+FFFD: out holds
 * *out_bytes. Returns how many bytes of text[0 .. bytes), bytes > 0, it took. */
size_t ltn_jsonl_escape(const char *text, size_t bytes, char out[8], size_t *out_bytes);

const char *ltn_jsonl_end_name(enum ltn_end end); /* "length", "eos", "string", "stopped" */

void ltn_jsonl_free(struct ltn_jsonl *j); /* a zeroed one is allowed */

/* Text number `index` begins, goes on, ends. _drawn and _piece are a ltn_drawn_fn and a ltn_piece_fn but for
 * their first argument. */
enum ltn_status ltn_jsonl_begin(struct ltn_jsonl *j, int64_t index, struct ltn_error *err);
enum ltn_status ltn_jsonl_drawn(struct ltn_jsonl *j, int32_t id, const float *logits, struct ltn_error *err);
enum ltn_status ltn_jsonl_piece(struct ltn_jsonl *j, int32_t id, const char *text, size_t bytes,
                                struct ltn_error *err);
enum ltn_status ltn_jsonl_end(struct ltn_jsonl *j, enum ltn_end end, struct ltn_error *err);

#endif
