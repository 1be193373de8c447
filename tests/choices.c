#include "tests/choices.h"

#include <stdlib.h>

void test_logits(struct test_rng *rng, float *logits, int32_t n)
{
    enum { SPREAD, NARROW, TIED, MASKED, EQUAL, ONE_MASS, N_KINDS };
    const int kind = test_below(rng, N_KINDS);
    for (int32_t i = 0; i < n; i++) {
        float logit = (float)(4 * test_normal(rng));
        if (kind == NARROW)
            logit = 17 + logit / 4096;
        if (kind == TIED)
            logit = roundf(logit);
        if (kind == MASKED && test_below(rng, 3) > 0)
            logit = -INFINITY;
        if (kind == EQUAL)
            logit = test_below(rng, 2) ? 0.0f : -0.0f;
        if (kind == ONE_MASS)
            logit = i % 1000 == 7 ? 30 : logit - 20;
        logits[i] = logit;
    }
    if (test_below(rng, 40) == 0)
        logits[test_below(rng, n)] = test_below(rng, 2) ? NAN : INFINITY;
    if (test_below(rng, 40) == 0)
        for (int32_t i = 0; i < n; i++)
            logits[i] = -INFINITY;
}

static int by_id(const void *a, const void *b)
{
    const struct ltn_bias *x = a, *y = b;
    return x->id < y->id ? -1 : x->id > y->id;
}

struct ltn_choice test_choice(struct test_rng *rng, int32_t n, struct ltn_bias bias[TEST_BIASES],
                              int32_t *n_bias)
{
    static const double temperatures[] = {0, 1e-6, 0.3, 0.8, 1, 3, 1e5};
    static const double shares[] = {0, 0.001, 0.3, 0.95, 0.9999, 1};
    const bool penalties = test_below(rng, 2);
    struct ltn_choice c = {.temperature = temperatures[test_below(rng, 7)], .top_p = 1};

    if (test_below(rng, 2))
        c.top_k = test_below(rng, 2) ? test_below(rng, 60) : test_below(rng, n + 5);
    if (test_below(rng, 2))
        c.top_p = shares[test_below(rng, 6)];
    if (test_below(rng, 3) == 0)
        c.typical = shares[test_below(rng, 6)];
    if (test_below(rng, 3) == 0)
        c.min_p = test_uniform(rng);
    if (penalties) {
        c.repeat_last = test_below(rng, 2) ? test_below(rng, 70) : test_below(rng, LTN_RECENT_IDS + 1);
        c.repeat_penalty = 0.5 + 2 * test_uniform(rng);
        c.presence_penalty = test_normal(rng);
        c.frequency_penalty = test_normal(rng);
    }
    *n_bias = test_below(rng, 2) ? test_below(rng, TEST_BIASES + 1) : 0;
    for (int i = 0; i < *n_bias;
         i++) /* some twice, which qsort of two of one value may swap: the same value */
        bias[i] = (struct ltn_bias){test_below(rng, n < 4 ? n : 4), test_below(rng, 5) ? 1.7f : -INFINITY};
    qsort(bias, (size_t)*n_bias, sizeof *bias, by_id);
    return c;
}

struct ltn_draws test_draws(struct test_rng *rng, int32_t n)
{
    struct ltn_draws d = {.seed = (uint64_t)test_below(rng, 1 << 30) << 20,
                          .draw = (uint64_t)test_below(rng, 1 << 30) << test_below(rng, 30),
                          .position = test_below(rng, 2) ? test_below(rng, 100) : (int64_t)1 << 40};
    const int32_t few = test_below(rng, 2) && n > 5 ? 5 : n;
    for (int i = 0; i < LTN_RECENT_IDS; i++)
        d.recent[i] = test_below(rng, few);
    return d;
}
