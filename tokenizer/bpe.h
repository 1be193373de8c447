/* Byte-pair encoding by rank: the vocabulary of a *.tiktoken file, and how it merges.
 *
 * The file is text, one token a line: its bytes in base64, a space, its rank, which is also its id. Here
 * ranks count up from 0, line by line, and every single byte has a token, so that any text can be encoded; no
 * token stands there twice. */
#ifndef LTN_BPE_H
#define LTN_BPE_H

#include "kernels/status.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Immutable once read; any number of threads may use it. */
struct ltn_bpe {
    char *bytes;    /* all tokens, one after another */
    uint32_t *from; /* [n + 1] where each begins */
    int32_t n;
    int32_t *slots; /* [n_slots] token ids by hash, -1: free */
    size_t n_slots; /* a power of two, at least 2 n */
    size_t longest; /* bytes of the longest token */
};

/* Reads text [bytes], which need not outlive *bpe. LTN_ERR_INPUT names the line. On failure *bpe is zero. */
enum ltn_status ltn_bpe_read(struct ltn_bpe *bpe, const char *text, size_t bytes, struct ltn_error *err);
void ltn_bpe_free(struct ltn_bpe *bpe); /* a zeroed one is allowed */

/* The id of the token with exactly these bytes; -1: there is none. */
int32_t ltn_bpe_find(const struct ltn_bpe *bpe, const char *text, size_t bytes);

/* Scratch of one thread; grows to the longest piece that it has seen. */
struct ltn_merger {
    struct ltn_merger_part *parts; /* [room + 1] */
    struct ltn_merger_pair *heap;  /* [3 * room] */
    size_t room;                   /* bytes of piece */
};

void ltn_merger_free(struct ltn_merger *merger); /* a zeroed one is allowed */

/* Encodes one piece, bytes > 0 (at most INT32_MAX / 4), into ids, which has room for `bytes` of them; *n is
 * how many came. A piece that is a token is that one. Else its bytes are merged, two neighbours at a time, as
 * long as any two make up a token: those of the lowest rank first, of equals the leftmost. Time is that of
 * sorting `bytes` things. */
enum ltn_status ltn_bpe_encode(const struct ltn_bpe *bpe, struct ltn_merger *merger, const char *piece,
                               size_t bytes, int32_t *ids, size_t *n, struct ltn_error *err);

#ifdef __cplusplus
}
#endif
#endif
