/* Rounding a row such that its products with given inputs change least.
 *
 * The loss of rounding a row w to q is (w - q) H (w - q), H the damped sum over the inputs x of x x^T. What
 * counts is that of q and that of q turned into bf16, together (struct fit in feedback.c). Column after
 * column, what a rounding loses is made good in those not yet rounded, by the second-order rule of GPTQ
 * (Frantar, Ashkboos, Hoefler, Alistarh, arXiv 2210.17323, Algorithm 1 without its blocks); each group takes
 * of the scales that ltn_quant_scales names the one with which this loses least. Then sweeps over the groups,
 * as QuantEase (Behdin and others, arXiv 2309.01885) does over columns: with all others as they are, a group
 * is rounded anew to what would be best for it, and stays as it was unless the loss falls. */
#ifndef LTN_FEEDBACK_H
#define LTN_FEEDBACK_H

#include "kernels/dtype.h"
#include "kernels/status.h"

#include <stdbool.h>

enum { LTN_FEEDBACK_SWEEPS = 3 };

/* What the rows of a matrix share. */
struct ltn_feedback {
    size_t cols;
    float *gram;   /* [cols, cols] H */
    float *whole;  /* [cols, cols] its rule, see feedback.c */
    float *groups; /* [cols, LTN_GROUP] the rules of the blocks on its diagonal, each with its own width */
};

/* gram: [cols, cols], symmetric, not yet damped, not kept. `name`: of the tensor. On failure *f is zero. */
enum ltn_status ltn_feedback_open(struct ltn_feedback *f, const float *gram, size_t cols, const char *name,
                                  struct ltn_error *err);
void ltn_feedback_close(struct ltn_feedback *f); /* a zeroed one is allowed */

/* Floats of scratch that a row needs. */
static inline size_t ltn_feedback_room(size_t cols)
{
    return 4 * cols;
}

/* Rounds one row, [cols], into codes and scales as ltn_quantise_row does. False where a scale is infinite. */
bool ltn_feedback_row(const struct ltn_feedback *f, enum ltn_dtype dtype, int sweeps, const float *row,
                      float *room, void *codes, void *scales);

#endif
