/* THE forward pass of TransNormerLLM: prefill, decode, batches and packed sequences are one function. */
#ifndef LTN_DECODER_H
#define LTN_DECODER_H

#include "model/model.h"

/* Buffers for calls of up to max_rows rows and max_logits rows of logits. One per thread of work; no two
 * calls may use the same workspace at once. */
struct ltn_workspace {
    struct ltn_backend *be;
    int32_t max_rows, max_logits;
    void *memory; /* one allocation; the rest points into it */
    int32_t *ids; /* [max_rows] */
    float *x;     /* [max_rows, D] the residual stream */
    void *y;      /* act [max_rows, max(D, H)] normed inputs; gated outputs */
    void *qkv;    /* act [max_rows, 4H or 3H]; in the channel mixer: l1's output, [max_rows, G] */
    void *gate; /* act: TNL3's gate [max_rows, H] with its inner rank; channel mixer: l2's output, [max_rows,
                   G] */
    void *gate_low; /* act: TNL3, [max_rows, gate_dim] */
    void *o;        /* act [max_rows, H] attention outputs */
    float *logits;  /* [max_logits, V] */
};

enum ltn_status ltn_workspace_create(struct ltn_workspace *ws, const struct ltn_model *model,
                                     int32_t max_rows, int32_t max_logits, struct ltn_error *err);
void ltn_workspace_free(struct ltn_workspace *ws); /* a zeroed one is allowed */

/* Which rows get logits. */
enum ltn_want { LTN_WANT_NONE, LTN_WANT_LAST /* the last row of each sequence */, LTN_WANT_ALL };

/* For tests and study: called with the residual stream x (backend memory, f32 [rows, D]) at the input of
 * layer 0 .. L-1 and, as layer L, at the output of the last. */
struct ltn_tap {
    enum ltn_status (*fn)(void *ctx, int32_t layer, const float *x, int32_t rows, struct ltn_error *err);
    void *ctx;
};

/* Runs ids (host, [rows], all inside the vocabulary) through the model, advancing each sequence's state. The
 * rows of seqs (host) add up to `rows` <= max_rows; the caller advances seq.pos. Logits are left in
 * ws->logits, one row per sequence or per token as `want` says, at most max_logits. tap may be NULL. After a
 * failure the states are undefined. */
enum ltn_status ltn_forward(const struct ltn_model *model, struct ltn_workspace *ws, const int32_t *ids,
                            int32_t rows, const struct ltn_seq *seqs, int32_t n_seqs, enum ltn_want want,
                            const struct ltn_tap *tap, struct ltn_error *err);

#endif
