/* THE forward pass of TransNormerLLM: prefill, decode, batches and packed sequences are one function. */
#ifndef LTN_DECODER_H
#define LTN_DECODER_H

#include "model/model.h"

/* What a recorded step reads that changes from token to token. */
struct ltn_cursor {
    int64_t position;
    int32_t id;
};

/* Buffers for calls of up to max_rows rows and max_logits rows of logits. One per thread of work; no two
 * calls may use the same workspace at once. */
struct ltn_workspace {
    struct ltn_backend *be;
    int32_t max_rows, max_logits;
    void *memory; /* one allocation of `bytes`; the rest points into it */
    size_t bytes;
    int32_t *ids; /* [max_rows] */
    float *x;     /* [max_rows, D] the residual stream */
    void *y;      /* act [max_rows, max(D, H)] normed inputs; gated outputs */
    void *qkv;    /* act [max_rows, 4H or 3H]; in the channel mixer: l1's output, [max_rows, G] */
    void *gate; /* act: TNL3's gate [max_rows, H] with its inner rank; channel mixer: l2's output, [max_rows,
                   G] */
    void *gate_low; /* act: TNL3, [max_rows, gate_dim] */
    void *o;        /* act [max_rows, H] attention outputs */
    float *logits;  /* [max_logits, V] */
    /* Where the backend records: the step of the stream that was last decoded token by token. */
    struct ltn_cursor *cursor; /* backend memory */
    struct ltn_recording *step;
    const struct ltn_model *step_model;
    const float *step_state;
};

/* After it, a pass allocates nothing: what the backend needs of its own is reserved here. The model has its
 * fp8 by then, if it gets any. LTN_ERR_MEMORY names what was needed and what was free. */
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

/* The pass itself, as ltn_forward calls it: ids lie in backend memory, sizes are not checked, nothing is
 * recorded. */
enum ltn_status ltn_forward_ids(const struct ltn_model *model, struct ltn_workspace *ws, const int32_t *ids,
                                int32_t rows, const struct ltn_seq *seqs, int32_t n_seqs, enum ltn_want want,
                                const struct ltn_tap *tap, struct ltn_error *err);

enum { LTN_STEPS_RECORDED = 8 }; /* in one recording, where so many are taken at once */

/* Decoding with the token, its choice and the position on the device: steps are recorded once and then
 * replayed, many steps per call. Only where the backend records (ltn_stepper_possible). */
struct ltn_stepper {
    const struct ltn_model *model; /* borrowed */
    struct ltn_workspace *ws;      /* borrowed, and used by every step */
    struct ltn_seq *seqs;          /* [n_seqs] */
    int32_t n_seqs;
    int32_t max_steps;
    struct ltn_choice choice;            /* its biases in `memory` */
    int64_t done;                        /* tokens past the positions at creation */
    void *memory;                        /* of what follows */
    int64_t *steps;                      /* backend memory: `done`, as the device counts it */
    struct ltn_draws *draws;             /* backend memory, [n_seqs] */
    int32_t *log;                        /* backend memory, [max_steps, n_seqs] the latest ids, a ring */
    float *scratch;                      /* backend memory, [2, n_seqs, V] */
    struct ltn_recording *one, *several; /* of a step, and of LTN_STEPS_RECORDED; NULL: none yet */
};

bool ltn_stepper_possible(const struct ltn_backend *be);

/* Of each of seqs (host), only state and pos matter; the states must stay where they are. max_steps: the most
 * steps of one call. choice: host, its biases in host memory too, sorted by id; borrowed for the call only;
 * NULL: the largest logit. */
enum ltn_status ltn_stepper_create(struct ltn_stepper *stepper, const struct ltn_model *model,
                                   struct ltn_workspace *ws, const struct ltn_seq *seqs, int32_t n_seqs,
                                   int32_t max_steps, const struct ltn_choice *choice, struct ltn_error *err);

/* From here on every stream stands `steps`, 0 or more, tokens past its position at creation. */
enum ltn_status ltn_stepper_seek(struct ltn_stepper *stepper, int64_t steps, struct ltn_error *err);

/* Feeds ids (host, [n_seqs]), then each chosen token in turn, n_steps in all; every stream's state advances
 * by n_steps. draws: host, [n_seqs], those of the first choice; NULL where nothing depends on them. out: host
 * [n_steps, n_seqs], the tokens chosen, the last of which has not been fed; below 0 where none could be
 * (kernels/sample.h), and what came after it means nothing. ids NULL: goes on with those, and with the draws.
 * ws->logits holds the last step's logits. */
enum ltn_status ltn_stepper_run(struct ltn_stepper *stepper, const int32_t *ids,
                                const struct ltn_draws *draws, int32_t n_steps, int32_t *out,
                                struct ltn_error *err);
void ltn_stepper_free(struct ltn_stepper *stepper); /* a zeroed one is allowed */

#endif
