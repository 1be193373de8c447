/* The tokenizer of a Hugging Face checkpoint: its model and what the files beside it say about it.
 *
 * tokenizer.model           the SentencePiece model, or
 * NAME.tiktoken             TransNormerLLM3's ranks; without either the checkpoint has no tokenizer that ltn
 * knows tokenizer_config.json     add_bos_token, add_eos_token; added_tokens_decoder; names of special tokens
 * special_tokens_map.json   names of special tokens
 * added_tokens.json         texts and ids of added tokens
 *
 * SentencePiece: special are the unknown and control pieces of the model, the added tokens, and the pieces
 * that are named as unk, bos, eos, pad, ... token or as additional ones. Without tokenizer_config.json
 * neither bos nor eos is added; where it is there but silent, the official class adds bos and not eos.
 *
 * tiktoken: special are the added tokens; bos and eos are those that tokenizer_config.json names, and are put
 * around a text only where it says so. Where there are no added tokens and the file has the 100,256 ranks of
 * TransNormerLLM3, its special tokens are known (bos <s>, eos <|endoftext|>); with other ranks that is an
 * error.
 */
#ifndef LTN_HF_TOKENIZER_H
#define LTN_HF_TOKENIZER_H

#include "kernels/status.h"

#include <stddef.h>
#include <stdint.h>

struct ltn_hf_tokenizer {
    char *model; /* [bytes], malloc'd; NULL: there is none */
    size_t bytes;
    char *json;     /* see tokenizer/tokenizer.h, malloc'd */
    int32_t beyond; /* added tokens left out because their id is not below vocab_size */
};

/* A model with more pieces than vocab_size is refused; fewer are fine. On failure *out is zero. */
enum ltn_status ltn_hf_tokenizer_read(struct ltn_hf_tokenizer *out, const char *dir, int32_t vocab_size,
                                      struct ltn_error *err);
void ltn_hf_tokenizer_free(struct ltn_hf_tokenizer *tokenizer); /* a zeroed one is allowed */

#endif
