/* A session whose past can be had back. It is kept as checkpoints (ltn_session_export, of one size however
 * long the past is) and the ids that came after them: to go back is to load the last checkpoint before the
 * place and to read the ids from there again, at most LTN_CHECKPOINT_EVERY of them. The past is bounded by a
 * number of checkpoints and by bytes; the oldest goes first.
 *
 * The past is made of exchanges, each an input and an answer, that begin with a checkpoint. Going back to
 * where one began restores the very state; within one, reading again rounds as reading does. The draws go
 * back too: what is sampled next is what was sampled there before.
 *
 * Forks are several such timelines under names, one of which is the session's at a time.
 */
#ifndef LTN_TIMELINE_H
#define LTN_TIMELINE_H

#include "src/ltn.h"

enum {
    LTN_CHECKPOINTS = 32,        /* of one timeline */
    LTN_CHECKPOINT_EVERY = 2048, /* tokens without one */
    LTN_FORKS = 16,
    LTN_FORK_NAME = 32, /* bytes of a name, at most */
};

struct ltn_timelines;

/* The session is borrowed; from now on its tokens come through here or are told here. The timeline that
 * begins where it stands is called "main". All checkpoints and forks together have at most max_bytes, but
 * that each timeline keeps the beginning of its last exchange. */
enum ltn_status ltn_timelines_create(struct ltn_timelines **out, const struct ltn_engine *engine,
                                     struct ltn_session *session, uint64_t max_bytes, struct ltn_error *err);
void ltn_timelines_free(struct ltn_timelines *t); /* NULL is allowed */

/* An exchange begins. */
enum ltn_status ltn_timelines_begin(struct ltn_timelines *t, struct ltn_error *err);
/* Feeds ids of its input. */
enum ltn_status ltn_timelines_feed(struct ltn_timelines *t, const int32_t *ids, size_t n,
                                   struct ltn_error *err);
/* ltn_generate fed id, and it completed so many bytes of text. To be called from ltn_piece_fn. */
enum ltn_status ltn_timelines_drawn(struct ltn_timelines *t, int32_t id, size_t bytes, struct ltn_error *err);
/* The answer ends before its last tokens: `total` bytes of text were drawn, the first `keep` count. What
 * remains is all tokens whose text is within those. */
enum ltn_status ltn_timelines_cut(struct ltn_timelines *t, size_t total, size_t keep, struct ltn_error *err);

/* Back by n tokens; back to where the last exchange began; back to where its answer began, with the draws of
 * another answer: number k draws from k * 2^32 draws beyond the first one's beginning. Refused
 * (LTN_ERR_INPUT) where there is nothing or the past does not reach back so far; nothing is changed then. */
enum ltn_status ltn_timelines_rewind(struct ltn_timelines *t, int64_t n, struct ltn_error *err);
enum ltn_status ltn_timelines_undo(struct ltn_timelines *t, struct ltn_error *err);
enum ltn_status ltn_timelines_again(struct ltn_timelines *t, struct ltn_error *err);

/* The session was loaded with something else: the past of this timeline is dropped. */
void ltn_timelines_forget(struct ltn_timelines *t);

/* Goes over to the timeline of this name, a new one begins as a copy of the present one, past included; the
 * one that is left stays as it is. */
enum ltn_status ltn_timelines_fork(struct ltn_timelines *t, const char *name, struct ltn_error *err);

struct ltn_timeline_info {
    const char *name;
    int64_t position, oldest; /* every position from oldest on can be gone back to */
    size_t n_checkpoints;
    bool current;
};
/* Number i of them; false: there are not so many. */
bool ltn_timelines_info(const struct ltn_timelines *t, size_t i, struct ltn_timeline_info *info);
struct ltn_timeline_info ltn_timelines_current(const struct ltn_timelines *t);
size_t ltn_timelines_count(const struct ltn_timelines *t);
uint64_t ltn_timelines_bytes(const struct ltn_timelines *t); /* of all checkpoints and forks */

#endif
