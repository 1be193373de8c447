/* A loaded model: its weights on a backend, ready for the forward pass. Immutable; any number of threads may
 * use it. */
#ifndef LTN_MODEL_H
#define LTN_MODEL_H

#include "model/checkpoint.h"

struct ltn_model {
    struct ltn_config config;
    struct ltn_backend *be;  /* borrowed */
    struct ltn_matrix embed; /* [V, D] */
    struct ltn_matrix head;  /* [V, D]; the embedding where tied */
    struct ltn_norm final_norm;
    struct ltn_layer *layers; /* [n_layers] */
    void *arena;              /* backend memory of all that is not used in place */
    void *fp8_arena;          /* and of the fp8 of the layers' maps; NULL: they have none */
};

/* Puts the weights of an open checkpoint on the backend. Matrices keep their dtype; vectors become f32. Where
 * the backend works in host memory, aligned matrices are used inside the mapping, so the checkpoint must stay
 * open for as long as the model lives. progress (may be NULL) is told of bytes done out of bytes in all, and
 * is called from this thread. On failure *model is zero. */
enum ltn_status ltn_model_load(struct ltn_model *model, const struct ltn_checkpoint *checkpoint,
                               struct ltn_backend *be,
                               void (*progress)(void *ctx, uint64_t done, uint64_t total), void *ctx,
                               struct ltn_error *err);

/* Rows of a prefill call that suit the model on its backend. */
int32_t ltn_model_chunk_rows(const struct ltn_model *model);

/* Gives the maps of all layers their fp8, on top of what they have: prefill then runs in e4m3, at about twice
 * the speed and with its rounding (kernels/cuda/PREFILL.md); decoding stays as it is. Maps that are stored as
 * LTN_FP8 are used as they are. LTN_ERR_UNSUPPORTED: the backend, or the weights' type or sizes, do not allow
 * it; the model is as before. */
enum ltn_status ltn_model_prefill_fp8(struct ltn_model *model, struct ltn_error *err);

/* A model of random weights, for measuring: what takes time is as in a real one of this (checked) config.
 * Every tensor is there, its elements normal with standard deviation 0.02, the same ones on every call.
 * Matrices get `dtype`, or what a file of it has. On failure *model is zero. */
enum ltn_status ltn_model_random(struct ltn_model *model, const struct ltn_config *config,
                                 enum ltn_dtype dtype, struct ltn_backend *be, struct ltn_error *err);

void ltn_model_free(struct ltn_model *model); /* a zeroed one is allowed */

#endif
