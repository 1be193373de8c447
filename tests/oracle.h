/* An independent forward pass in float64, straight from the paper's formulas and sharing no code with the
 * engine: the quadratic form of the attention, every matrix widened to double. For small models only. */
#ifndef LTN_TESTS_ORACLE_H
#define LTN_TESTS_ORACLE_H

#include "model/checkpoint.h"

/* logits: [n, V]; state: NULL, or [all layers][h, d, e] after the last token, as the engine lays it out. */
void oracle_forward(const struct ltn_checkpoint *ck, const int32_t *ids, int n, double *logits,
                    double *state);

#endif
