/* Random cases of choosing a token, for the tests of every backend. */
#ifndef LTN_TESTS_CHOICES_H
#define LTN_TESTS_CHOICES_H

#include "kernels/sample.h"
#include "tests/support.h"

enum { TEST_BIASES = 6 };

/* Logits [n] of many kinds: spread out, close together, tied, equal, with -infinity, now and then with none
 * that can be chosen. */
void test_logits(struct test_rng *rng, float *logits, int32_t n);

/* Anything that is allowed; its biases are put into bias, sorted, but not into the choice. */
struct ltn_choice test_choice(struct test_rng *rng, int32_t n, struct ltn_bias bias[TEST_BIASES],
                              int32_t *n_bias);

struct ltn_draws test_draws(struct test_rng *rng, int32_t n);

#endif
