/* Finding stop strings in text that comes in pieces. */
#ifndef LTN_STOP_H
#define LTN_STOP_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stddef.h>

struct ltn_stopper {
    const char *const *stop; /* [n] borrowed; none empty */
    size_t n;
    char *held; /* [held_bytes] text not given out yet */
    size_t held_bytes, capacity;
    size_t release; /* of held: what the last push let go */
};

enum ltn_status ltn_stopper_create(struct ltn_stopper *s, const char *const *stop, size_t n,
                                   struct ltn_error *err);
void ltn_stopper_free(struct ltn_stopper *s); /* a zeroed one is allowed */

/* Adds text. *out, [*out_bytes], is what may be given out, valid until the next call: everything before the
 * longest ending that could still become a stop string; or, with *found, what stands before the first stop
 * string to be complete (of those complete at the same byte, the longest). The result does not depend on how
 * the text is cut into pieces. */
enum ltn_status ltn_stopper_push(struct ltn_stopper *s, const char *text, size_t bytes, const char **out,
                                 size_t *out_bytes, bool *found, struct ltn_error *err);

/* What is still held back, at the end of the text. */
void ltn_stopper_finish(struct ltn_stopper *s, const char **out, size_t *out_bytes);

#endif
