/* Text to token ids and back, streaming, in constant memory.
 *
 * Two kinds of model: SentencePiece's (TransNormerLLM, TNL2) and the *.tiktoken vocabulary of TransNormerLLM3
 * (tokenizer/bpe.h). The tokenizer JSON of a .ltn file (strict: exactly these keys):
 *   {"type": "sentencepiece", "add_bos": false, "add_eos": false, "special": [{"id": 0, "text": "<unk>"}]}
 *   {"type": "tiktoken", "pattern": LTN_TIKTOKEN_PATTERN, "bos": 261, "eos": -1, "add_bos": false,
 *    "add_eos": false, "special": [{"id": 261, "text": "<s>"}]}
 * `special` lists the tokens that are found in the text literally before the model sees it (the longest match
 * at a place wins) and that decode to their literal text. No id and no text may stand there twice; an id may
 * lie beyond the model's own (a token added to a checkpoint). bos and eos are special tokens or -1, none.
 * ltn_tokenizer_describe and ltn_tokenizer_describe_tiktoken write this JSON.
 *
 * What is computed: text between two special tokens is a run. A run's ids are those of one SentencePiece
 * encoding of it, with its own dummy prefix where the model adds one; or those of tiktoken: the pattern
 * splits the run into pieces, each of which is merged by rank. An empty run gives none. add_bos puts bos, the
 * SentencePiece model's <s>, before everything, add_eos eos, its </s>, after everything.
 */
#ifndef LTN_TOKENIZER_H
#define LTN_TOKENIZER_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ltn_tokenizer;   /* immutable once open; any number of threads may use it */
struct ltn_encoder;     /* one stream of text being encoded */
struct ltn_detokenizer; /* one stream of tokens being decoded */

/* Limits on what is opened; a model beyond them is refused. */
enum {
    LTN_TOKENIZER_MAX_MODEL = 64 << 20, /* bytes of a model */
    LTN_TOKENIZER_MAX_IDS = 1 << 20,    /* ids, special ones included */
    LTN_TOKENIZER_MAX_PIECE = 1024,     /* bytes of one piece or special text */
    LTN_TOKENIZER_MAX_SPECIAL = 65536,  /* special tokens */
    LTN_TOKENIZER_MAX_JSON = 8 << 20,   /* bytes of the JSON */
};

/* The split pattern of TransNormerLLM3, the one that there is: cl100k's, with digits one by one. */
#define LTN_TIKTOKEN_PATTERN                                                                                 \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"                                      \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

/* model: the bytes of a SentencePiece model (BPE or unigram) or of a *.tiktoken file, copied; json: see
 * above. The model is checked in full before it is used, so that a hostile file gives an error, never a
 * crash. LTN_ERR_INPUT: model or json is wrong; LTN_ERR_UNSUPPORTED: valid, but of a kind that is not offered
 * (word or char models, unused pieces, a denormaliser; another pattern). */
enum ltn_status ltn_tokenizer_open(struct ltn_tokenizer **out, const void *model, size_t bytes,
                                   const char *json, struct ltn_error *err);
void ltn_tokenizer_close(struct ltn_tokenizer *tokenizer); /* NULL is allowed */

/* Number of ids, those of special tokens included: every id that the encoder emits is below it. */
int32_t ltn_tokenizer_size(const struct ltn_tokenizer *tokenizer);
int32_t ltn_tokenizer_bos(const struct ltn_tokenizer *tokenizer); /* -1: there is none */
int32_t ltn_tokenizer_eos(const struct ltn_tokenizer *tokenizer);
/* The text of a special token or else the piece as the model spells it: SentencePiece's has U+2581 for a
 * space, a tiktoken one is bytes that need not be UTF-8. *bytes is its length. NULL where id names neither.
 * Belongs to the tokenizer. */
const char *ltn_tokenizer_piece(const struct ltn_tokenizer *tokenizer, int32_t id, size_t *bytes);
/* The id of a special token's text or else of a piece; -1: neither. */
int32_t ltn_tokenizer_find(const struct ltn_tokenizer *tokenizer, const char *piece, size_t bytes);

/* One special token of the JSON: text is UTF-8, 1..LTN_TOKENIZER_MAX_PIECE bytes. */
struct ltn_special {
    int32_t id;
    const char *text;
};

/* For the converter: the JSON of a model. Special are its unknown piece and its control pieces (<unk>, <s>,
 * </s> and the like), and those in extra, [n_extra], which win over a piece of the same id. *json is
 * malloc'd, the caller frees it; ltn_tokenizer_open accepts it with the same model. Fails as
 * ltn_tokenizer_open does. */
enum ltn_status ltn_tokenizer_describe(const void *model, size_t bytes, bool add_bos, bool add_eos,
                                       const struct ltn_special *extra, size_t n_extra, char **json,
                                       struct ltn_error *err);

/* The same for a *.tiktoken file with all special tokens that it has, [n_special]; bos and eos are ids of two
 * of them, or -1. */
enum ltn_status ltn_tokenizer_describe_tiktoken(const void *model, size_t bytes, bool add_bos, bool add_eos,
                                                int32_t bos, int32_t eos, const struct ltn_special *special,
                                                size_t n_special, char **json, struct ltn_error *err);

/* Receives ids as they become certain, ids [n]; anything but LTN_OK stops the encoder, which returns it. */
typedef enum ltn_status ltn_ids_fn(void *ctx, const int32_t *ids, size_t n, struct ltn_error *err);

/* An encoder gives, for any split of the text into feeds, the same ids, in time linear in the text and memory
 * that does not grow with it. They are the ids of tiktoken on the whole run (tokenizer/tiktoken.h), or of
 * SentencePiece:
 * - The run is normalised as it comes (Normalizer::Normalize of SentencePiece, as a stream) and handed over
 * in segments. A segment ends where enough is gathered and no piece of the model holds the two
 *   characters around the cut side by side: no token can cross there, and the ids do not change.
 * - Where no such place comes within 256 KiB of normalised text (such a stretch of one repeated letter), the
 * cut is forced at the next character: the ids there may differ from those of one call.
 * - A unigram model's scores are sums in float32 that SentencePiece starts at the beginning of a call; in a
 * run of more than 64 KiB its choice between near-equal segmentations may differ by this rounding. Text that
 * is not UTF-8 is defined: each byte that does not begin or continue a whole character counts as U+FFFD. NUL
 * is a character like any other. After a failure only ltn_encoder_free may be called. */
enum ltn_status ltn_encoder_create(struct ltn_encoder **out, const struct ltn_tokenizer *tokenizer,
                                   ltn_ids_fn *emit, void *ctx, struct ltn_error *err);
enum ltn_status ltn_encoder_feed(struct ltn_encoder *encoder, const char *text, size_t bytes,
                                 struct ltn_error *err);
/* Amid a text: emits what is certain by now, all but the last words, rather than waiting for a segment's
 * worth. The ids stay those of the whole text (a unigram model's within the rounding above). */
enum ltn_status ltn_encoder_settle(struct ltn_encoder *encoder, struct ltn_error *err);
/* The end of the text: emits the rest. The encoder then stands at the beginning of a new text. */
enum ltn_status ltn_encoder_finish(struct ltn_encoder *encoder, struct ltn_error *err);
void ltn_encoder_free(struct ltn_encoder *encoder); /* NULL is allowed */

/* The whole of a text at once; *ids is malloc'd, the caller frees it (NULL when *n is 0). */
enum ltn_status ltn_tokenize(const struct ltn_tokenizer *tokenizer, const char *text, size_t bytes,
                             int32_t **ids, size_t *n, struct ltn_error *err);

/* A detokenizer turns ids into bytes, one id at a time, such that all bytes together are decode(all ids):
 * piecewise decoding would lose spaces. With tiktoken that is the bytes of all tokens, special ones too; what
 * is not UTF-8 becomes U+FFFD, once for each longest beginning of a character and once for each other byte
 * (the Unicode standard's practice, and Python's). With SentencePiece,
 * consecutive ids that are not special are decoded as it does: the space of the dummy prefix goes at the
 * start of such a run only, byte pieces join to characters, a byte that is part of none is U+FFFD, unknown is
 * the model's unknown surface, a control piece is nothing. A special token is its literal text, preceded by
 * one space unless it is first or follows another special token. What is returned ends on a whole UTF-8
 * character; the bytes of an unfinished one are held back. */
enum ltn_status ltn_detokenizer_create(struct ltn_detokenizer **out, const struct ltn_tokenizer *tokenizer,
                                       struct ltn_error *err);
/* *text: the bytes that id completes, [*bytes], owned by the detokenizer, valid until its next call; may be
 * empty. An id without a piece is LTN_ERR_INPUT and changes nothing. */
enum ltn_status ltn_detokenizer_push(struct ltn_detokenizer *detokenizer, int32_t id, const char **text,
                                     size_t *bytes, struct ltn_error *err);
/* What is still held back at the end, an unfinished character as U+FFFD, with SentencePiece each of its
 * bytes. The detokenizer then stands at the beginning of a new text. */
enum ltn_status ltn_detokenizer_finish(struct ltn_detokenizer *detokenizer, const char **text, size_t *bytes,
                                       struct ltn_error *err);
void ltn_detokenizer_free(struct ltn_detokenizer *detokenizer); /* NULL is allowed */

#ifdef __cplusplus
}
#endif
#endif
