/* What a TransNormerLLM is made of: its sizes, its switches, and the exact set of tensors that follows from
 * them.
 *
 * In a .ltn file the configuration is JSON text with the key names of the Hugging Face checkpoints:
 *   vocab_size, decoder_embed_dim, hidden_dim, decoder_layers, decoder_attention_heads, glu_dim, gate_dim (0:
 * the v1/v2 architecture with a full gate; > 0: TransNormerLLM3 with a low-rank gate), linear_act_fun
 * (string), norm_type ("simplermsnorm" or "layernorm"), linear_use_lrpe_list (decoder_layers numbers 0 or 1),
 *   no_scale_embedding, bias, tie_word_embeddings (booleans), bos_token_id, eos_token_id, pad_token_id (-1:
 * none). Every key must be present, none other may be. */
#ifndef LTN_CONFIG_H
#define LTN_CONFIG_H

#include "kernels/ops.h"

enum {
    LTN_MAX_LAYERS = 256,
    LTN_MAX_DIM = 65536,     /* D, H, G */
    LTN_MAX_VOCAB = 1 << 21, /* V */
    LTN_MAX_HEADS = 1024,
    LTN_MAX_HEAD_DIM = 1024,
};

struct ltn_config {
    int32_t vocab_size;             /* V */
    int32_t embed_dim;              /* D, the residual width */
    int32_t hidden_dim;             /* H, the width of q, k, v and the gate */
    int32_t n_layers;               /* L */
    int32_t n_heads;                /* h */
    int32_t head_dim;               /* e = H / h */
    int32_t glu_dim;                /* G */
    int32_t gate_dim;               /* rank of the output gate (TNL3); 0: v1/v2 */
    enum ltn_act act;               /* feature map on q, k (v1/v2) or q, k, v (TNL3) */
    bool layer_norm;                /* LayerNorm with parameters; else SimpleRMSNorm */
    bool bias;                      /* on every projection but the head */
    bool tied;                      /* the head is the embedding */
    bool scale_embedding;           /* embeddings times sqrt(D) */
    int32_t bos_id, eos_id, pad_id; /* -1: none */
    uint8_t lrpe[LTN_MAX_LAYERS];   /* 1: the layer rotates q and k by LRPE */
};

/* Refuses what cannot be computed: sizes out of range, heads that do not divide H, LRPE or TNL3 with H != D,
 * L == 1 (the slopes divide by L - 1), token ids outside the vocabulary. Sets config->head_dim. */
enum ltn_status ltn_config_check(struct ltn_config *config, struct ltn_error *err);

/* The shape of a released model by its name, one of LTN_RELEASED: sizes from the configurations published
 * with OpenNLPLab/TransNormerLLM-385M, -1B and -7B. LTN_ERR_INPUT where there is none. */
#define LTN_RELEASED "385m|1b|7b"
enum ltn_status ltn_config_released(struct ltn_config *config, const char *name, struct ltn_error *err);

/* Parses and checks the JSON of a .ltn file. */
enum ltn_status ltn_config_parse(struct ltn_config *config, const char *json, struct ltn_error *err);

/* The same JSON from a checked config; malloc'd, the caller frees it; NULL when memory is out. */
char *ltn_config_print(const struct ltn_config *config);

/* The feature map of a checkpoint's linear_act_fun; any unknown name is the identity, as in the official
 * code. */
enum ltn_act ltn_act_from_name(const char *name);

/* s[i], i < n_heads: the decay slopes of one layer, float32 like the official tensors. ALiBi slopes, for p
 * the largest power of two <= h: 2^(-8 (i + 1) / p) for i < p, else 2^(-4 (2 (i - p) + 1) / p); times 1 - l /
 * (L - 1) + 1e-5. */
void ltn_slopes(float *slopes, int32_t n_heads, int32_t layer, int32_t n_layers);

/* Floats of one sequence's state in one layer, n_heads * d * e, and where the layer begins in the whole
 * state. ltn_state_offset(config, n_layers) is the size of a whole state. */
size_t ltn_state_floats(const struct ltn_config *config, int32_t layer);
size_t ltn_state_offset(const struct ltn_config *config, int32_t layer);

/* Which part of the model a tensor is. Those from LTN_SLOT_TOKEN_NORM on exist once in every layer. */
enum ltn_slot {
    LTN_SLOT_EMBED,
    LTN_SLOT_FINAL_NORM,
    LTN_SLOT_HEAD,
    LTN_SLOT_TOKEN_NORM,
    LTN_SLOT_QKV,   /* [4H, D] q, k, v, u; TNL3: [3H, D] */
    LTN_SLOT_GATE0, /* TNL3: [gate_dim, D] */
    LTN_SLOT_GATE1, /* TNL3: [H, gate_dim] */
    LTN_SLOT_THETA, /* [h, 1, D / h] */
    LTN_SLOT_ATTN_NORM,
    LTN_SLOT_OUT, /* [D, H] */
    LTN_SLOT_CHANNEL_NORM,
    LTN_SLOT_L1, /* [G, D] */
    LTN_SLOT_L2, /* [G, D] */
    LTN_SLOT_L3, /* [D, G] */
};

/* One tensor that a checkpoint of this configuration has, under its Hugging Face name. */
struct ltn_tensor_spec {
    char name[64];
    enum ltn_slot slot;
    int32_t layer;  /* -1 outside the layers */
    bool is_bias;   /* the bias of its slot rather than the weight */
    bool is_matrix; /* a matrix keeps its dtype in memory; anything else is widened to f32 at load */
    int32_t rank;
    int64_t shape[3];
};

/* The exact tensor set, in the order in which the forward pass reads it. *specs is malloc'd, the caller frees
 * it. The head appears only where it is not tied. */
enum ltn_status ltn_config_tensors(const struct ltn_config *config, struct ltn_tensor_spec **specs,
                                   size_t *n_specs, struct ltn_error *err);

#endif
