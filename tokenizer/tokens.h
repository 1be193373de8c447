/* What the detokenizer asks of an open tokenizer; for tokenizer/ only. */
#ifndef LTN_TOKENS_H
#define LTN_TOKENS_H

#include "tokenizer/sp_model.h"
#include "tokenizer/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ltn_token {
    struct ltn_sp_string text; /* at most LTN_TOKENIZER_MAX_PIECE bytes */
    bool is_special;           /* else it is decoded as a piece of this type: */
    enum ltn_sp_piece_type type;
};

/* How id decodes; false: it names no token. The type is SentencePiece's alone. */
bool ltn_tokenizer_token(const struct ltn_tokenizer *tokenizer, int32_t id, struct ltn_token *token);
/* NULL: tokens are bytes, as tiktoken has them. */
const struct ltn_sp_model *ltn_tokenizer_model(const struct ltn_tokenizer *tokenizer);

#ifdef __cplusplus
}
#endif
#endif
