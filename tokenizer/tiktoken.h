/* tiktoken's way from text to ids: a pattern splits the text into pieces, and each piece is merged by rank.
 *
 * The pattern is that of TransNormerLLM3: cl100k's, with digits one by one. \p{L} and \p{N} are Unicode's
 * letters and numbers as the PCRE2 at hand knows them (10.42: Unicode 14), so that a letter younger than that
 * is none; \s is Unicode's White_Space.
 *
 * Where a stream may be cut: PCRE2 is asked for the next piece of what is there with PCRE2_PARTIAL_HARD,
 * which gives up as soon as it would look past the end. So a piece that it does find depends on no byte that
 * is yet to come: it is the one that the whole text has there. */
#ifndef LTN_TIKTOKEN_H
#define LTN_TIKTOKEN_H

#include "kernels/status.h"
#include "tokenizer/bpe.h"
#include "tokenizer/tokenizer.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ltn_tiktoken; /* immutable once open; any number of threads may use it */

/* text: a *.tiktoken file, [bytes], copied. Fails as ltn_bpe_read does. */
enum ltn_status ltn_tiktoken_open(struct ltn_tiktoken **out, const void *text, size_t bytes,
                                  struct ltn_error *err);
void ltn_tiktoken_close(struct ltn_tiktoken *tiktoken); /* NULL is allowed */
const struct ltn_bpe *ltn_tiktoken_bpe(const struct ltn_tiktoken *tiktoken);

/* A run of text on its way to ids, in memory that does not grow with it. Where no piece ends within 256 KiB,
 * the text is cut there, at a character, as though it ended. */
struct ltn_tiktoken_run;

enum ltn_status ltn_tiktoken_run_create(struct ltn_tiktoken_run **out, const struct ltn_tiktoken *tiktoken,
                                        ltn_ids_fn *emit, void *ctx, struct ltn_error *err);
void ltn_tiktoken_run_free(struct ltn_tiktoken_run *run); /* NULL is allowed */
/* More of the run; each byte that is part of no character counts as U+FFFD. *used is how many bytes were
 * taken: what is left, fewer than 4 bytes, begins a character and must come again in front of what follows.
 * last: the end of the run, nothing is left; the next feed begins another. */
enum ltn_status ltn_tiktoken_run_feed(struct ltn_tiktoken_run *run, const char *text, size_t bytes, bool last,
                                      size_t *used, struct ltn_error *err);

/* Emits every piece that is certain by now: a feed does not look for the end of a long one each time. */
enum ltn_status ltn_tiktoken_run_settle(struct ltn_tiktoken_run *run, struct ltn_error *err);

#ifdef __cplusplus
}
#endif
#endif
