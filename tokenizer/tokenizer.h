/* Text to token ids and back, streaming, in constant memory.
 *
 * The tokenizer JSON of a .ltn file (strict: exactly these keys):
 *   {"type": "sentencepiece", "add_bos": false, "add_eos": false, "special": [{"id": 0, "text": "<unk>"},
 * ...]} `special` lists the tokens that are found in the text literally before SentencePiece sees it (the
 * longest match at a place wins) and that decode to their literal text.
 */
#ifndef LTN_TOKENIZER_H
#define LTN_TOKENIZER_H

#include "kernels/status.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ltn_tokenizer;   /* immutable once open; any number of threads may use it */
struct ltn_encoder;     /* one stream of text being encoded */
struct ltn_detokenizer; /* one stream of tokens being decoded */

/* model: the bytes of a SentencePiece model, copied; json: see above. */
enum ltn_status ltn_tokenizer_open(struct ltn_tokenizer **out, const void *model, size_t bytes,
                                   const char *json, struct ltn_error *err);
void ltn_tokenizer_close(struct ltn_tokenizer *tokenizer);         /* NULL is allowed */
int32_t ltn_tokenizer_size(const struct ltn_tokenizer *tokenizer); /* number of ids */

/* Receives ids as they become certain; anything but LTN_OK stops the encoder, which returns it. */
typedef enum ltn_status ltn_ids_fn(void *ctx, const int32_t *ids, size_t n, struct ltn_error *err);

/* An encoder gives, for any split of the text into feeds, the ids that one encoding of the whole text would
 * give. Text that is not UTF-8 is defined: each byte that cannot be part of a character counts as U+FFFD. */
enum ltn_status ltn_encoder_create(struct ltn_encoder **out, const struct ltn_tokenizer *tokenizer,
                                   ltn_ids_fn *emit, void *ctx, struct ltn_error *err);
enum ltn_status ltn_encoder_feed(struct ltn_encoder *encoder, const char *text, size_t bytes,
                                 struct ltn_error *err);
enum ltn_status ltn_encoder_finish(struct ltn_encoder *encoder,
                                   struct ltn_error *err); /* end of text: emits the rest */
void ltn_encoder_free(struct ltn_encoder *encoder);        /* NULL is allowed */

/* The whole of a text at once; *ids is malloc'd, the caller frees it. */
enum ltn_status ltn_tokenize(const struct ltn_tokenizer *tokenizer, const char *text, size_t bytes,
                             int32_t **ids, size_t *n, struct ltn_error *err);

/* A detokenizer turns ids into bytes, one id at a time, such that all bytes together are decode(all ids):
 * piecewise decoding would lose spaces. It holds back the bytes of an unfinished UTF-8 character. */
enum ltn_status ltn_detokenizer_create(struct ltn_detokenizer **out, const struct ltn_tokenizer *tokenizer,
                                       struct ltn_error *err);
/* *text: the bytes that id completes, [*bytes], owned by the detokenizer, valid until its next call; may be
 * empty. */
enum ltn_status ltn_detokenizer_push(struct ltn_detokenizer *detokenizer, int32_t id, const char **text,
                                     size_t *bytes, struct ltn_error *err);
/* What is still held back at the end, an unfinished character's bytes as U+FFFD. */
enum ltn_status ltn_detokenizer_finish(struct ltn_detokenizer *detokenizer, const char **text, size_t *bytes,
                                       struct ltn_error *err);
void ltn_detokenizer_free(struct ltn_detokenizer *detokenizer); /* NULL is allowed */

#ifdef __cplusplus
}
#endif
#endif
