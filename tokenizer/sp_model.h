/* What stands in a SentencePiece model file, read with every size checked.
 *
 * The file is the protocol buffer message ModelProto (sentencepiece_model.proto of SentencePiece). Releases
 * before 0.2.1 trust it: a crafted one makes them read and write out of bounds (CVE-2026-1260: user-defined
 * pieces with a NUL inside; and, fixed later, the tries of the normaliser, over-long pieces, deeply nested
 * user-defined ones). So it is read here first, and SentencePiece is given only what passed. */
#ifndef LTN_SP_MODEL_H
#define LTN_SP_MODEL_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum ltn_sp_piece_type {
    LTN_SP_NORMAL = 1,
    LTN_SP_UNKNOWN = 2,
    LTN_SP_CONTROL = 3,
    LTN_SP_USER_DEFINED = 4,
    LTN_SP_UNUSED = 5,
    LTN_SP_BYTE = 6,
};

enum ltn_sp_model_type {
    LTN_SP_UNIGRAM = 1,
    LTN_SP_BPE = 2,
    LTN_SP_WORD = 3,
    LTN_SP_CHAR = 4,
};

struct ltn_sp_string {
    const char *data; /* [bytes] inside the model's bytes; no terminating NUL */
    size_t bytes;
};

struct ltn_sp_piece {
    struct ltn_sp_string text; /* UTF-8, not empty */
    float score;               /* finite */
    enum ltn_sp_piece_type type;
};

/* The normaliser's rules, longest match first: a double-array trie (darts-clone) from a key, the bytes of one
 * or more characters, to the text that replaces them. */
struct ltn_sp_charsmap {
    const uint8_t *units; /* [n_units] 32-bit little-endian; every transition from the root is in bounds */
    size_t n_units;       /* 0: no rules */
    const char *texts;    /* [text_bytes] UTF-8, each replacement ended by NUL */
    size_t text_bytes;
    size_t max_key; /* bytes of the longest key */
};

struct ltn_sp_model {
    struct ltn_sp_piece *pieces; /* [n_pieces], id order */
    size_t n_pieces;
    enum ltn_sp_model_type type; /* unigram or BPE */
    bool byte_fallback;
    bool add_dummy_prefix;
    bool remove_extra_whitespaces;
    bool escape_whitespaces;
    bool whitespace_as_suffix; /* the dummy space goes to the end of the text */
    struct ltn_sp_string unk_surface, bos_piece, eos_piece;
    struct ltn_sp_charsmap charsmap;
};

/* Reads data [bytes], which must outlive *model. On failure *model is zero. */
enum ltn_status ltn_sp_model_read(struct ltn_sp_model *model, const void *data, size_t bytes,
                                  struct ltn_error *err);
void ltn_sp_model_free(struct ltn_sp_model *model); /* a zeroed one is allowed */

/* Writes *model as SentencePiece is to see it: pieces, model type and byte fallback as they are, and a
 * normaliser that changes nothing. checked->data is malloc'd, the caller frees it. */
enum ltn_status ltn_sp_model_rewrite(const struct ltn_sp_model *model, struct ltn_sp_string *checked,
                                     struct ltn_error *err);

/* The longest key that text [bytes] begins with: returns its length and sets *to to the replacement, which
 * ends with NUL; 0: none. */
size_t ltn_sp_charsmap_match(const struct ltn_sp_charsmap *map, const char *text, size_t bytes,
                             const char **to);

#ifdef __cplusplus
}
#endif
#endif
