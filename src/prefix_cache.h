/* A library of prompt beginnings: the longest beginning of a prompt whose session lies there is resumed
 * instead of read.
 *
 * An entry is a session file (src/session_file.h), HASH-COUNT.prefix: COUNT, in decimal, its tokens, HASH the
 * XXH3-128 of "ltn-prefix 1", the model's checksum and those tokens' ids (int32, little-endian). The file's
 * metadata carry both again; where they do not match, or the checksum does not, there is no such entry. An
 * entry is made where a prompt of at least LTN_PREFIX_LEAST tokens ends, and on the way there at 256, 512,
 * 1024, ... 2^20 tokens, then at every further 2^20, so that prompts that part somewhere share what is
 * before.
 *
 * Any number of processes may use one folder at once. There are no locks: entries appear by a rename,
 * complete; one that has vanished by the time it is opened is a miss. The time of last use is the file's
 * modification time; while all entries together are larger than the limit, the one unused for longest is
 * removed.
 *
 * Memory is constant, however long the prompt is: tokens wait only while a longer entry may still fit, 2^20
 * of them at most. As any other split, resuming leaves the logits the same within rounding.
 */
#ifndef LTN_PREFIX_CACHE_H
#define LTN_PREFIX_CACHE_H

#include "src/ltn.h"

enum { LTN_PREFIX_LEAST = 64 };

struct ltn_prefix_cache;

/* For one prompt, into a session at position 0, borrowed. The folder is created where there is none. Refuses
 * a max_bytes that is less than one entry takes. */
enum ltn_status ltn_prefix_open(struct ltn_prefix_cache **out, struct ltn_session *session,
                                const char *folder, uint64_t max_bytes, struct ltn_error *err);
/* As ltn_session_feed and ltn_session_feed_text, which must not be called meanwhile; one or the other. */
enum ltn_status ltn_prefix_feed(struct ltn_prefix_cache *cache, const int32_t *ids, size_t n,
                                struct ltn_error *err);
enum ltn_status ltn_prefix_feed_text(struct ltn_prefix_cache *cache, const char *text, size_t bytes,
                                     struct ltn_error *err);
/* The end of the prompt: the session then stands there. *resumed: its tokens that were not read. */
enum ltn_status ltn_prefix_finish(struct ltn_prefix_cache *cache, int64_t *resumed, struct ltn_error *err);
/* Why no entry could be stored: one line; NULL: nothing went wrong. A failure to store is none of the prompt.
 */
const char *ltn_prefix_warning(const struct ltn_prefix_cache *cache);
void ltn_prefix_close(struct ltn_prefix_cache *cache); /* NULL is allowed */

#endif
