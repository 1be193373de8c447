/* What the tests of sessions share: opening, comparing, collecting what is generated. A failure fails the
 * test. */
#ifndef LTN_TESTS_SESSIONS_H
#define LTN_TESTS_SESSIONS_H

#include "src/ltn.h"
#include "tests/support.h"

/* On the CPU; n_threads 0: one per core. */
struct ltn_engine *open_engine(const char *path, int n_threads);
/* options NULL: as they are by default. */
struct ltn_session *open_session(const struct ltn_engine *engine, const struct ltn_session_options *options);

/* n ids from 0 to vocab - 1. */
void random_ids(int32_t *ids, size_t n, int32_t vocab, uint64_t seed);

bool same_logits(struct ltn_session *a, struct ltn_session *b); /* to the bit */
/* Largest difference of the logits, as a share of the largest logit. */
double difference(struct ltn_session *a, struct ltn_session *b);

/* What was generated, by a ltn_generate_options.piece. */
struct collector {
    char text[16384]; /* [bytes], and a NUL */
    size_t bytes;
    int32_t ids[4096]; /* [n] */
    size_t n;
    size_t stop_after; /* ids; 0: never */
};
enum ltn_status collect(void *collector, int32_t id, const char *text, size_t bytes, struct ltn_error *err);

/* How many names in the folder hold `part`. */
int files_in(const char *path, const char *part);

#endif
