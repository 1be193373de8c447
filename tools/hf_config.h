/* The configuration of a Hugging Face TransNormerLLM checkpoint, read as leniently as the official code reads
 * it.
 *
 * config.json, with the official defaults where a key is missing or null: vocab_size 64000, decoder_embed_dim
 * 1024, hidden_dim 1024, decoder_layers 24, decoder_attention_heads 8, glu_dim 2816 (-1: decoder_embed_dim),
 * linear_act_fun "silu" (an unknown name: the identity), norm_type "simplermsnorm" (any other text:
 * LayerNorm), no_scale_embedding false, bias false, tie_word_embeddings true, bos_token_id 1, eos_token_id 2,
 * pad_token_id 0 (null or -1: none). linear_use_lrpe_list: one number or boolean per layer, more than there
 * are layers are fine, fewer are not; an empty or missing list: linear_use_lrpe for all layers, else none.
 * All other keys are ignored: what the model is, its tensors tell.
 */
#ifndef LTN_HF_CONFIG_H
#define LTN_HF_CONFIG_H

#include "model/config.h"
#include "tools/source.h"

struct ltn_hf_config {
    struct ltn_config config; /* checked; tied as the key says, which the weights may overrule */
    char act_name[64];        /* linear_act_fun as it stands there */
    bool act_known;           /* false: the official code takes the identity for it */
};

/* Reads DIR/config.json. The variant follows from the names of the weights: token_mixer.qkvu_proj is v1/v2,
 * token_mixer.qkv_proj is TransNormerLLM3, whose gate_dim is the number of rows of output_gate.0. */
enum ltn_status ltn_hf_config_read(struct ltn_hf_config *out, const struct ltn_source *source,
                                   struct ltn_error *err);

#endif
