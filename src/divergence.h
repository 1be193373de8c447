/* How far a model's predictions are from a reference model's, token by token, in constant memory. */
#ifndef LTN_DIVERGENCE_H
#define LTN_DIVERGENCE_H

#include <stdint.h>

/* KL divergences are counted in bins of 2^(1/64) from 2^-64 to 2^8 nats: quantiles are good to 0.6 %. */
enum { LTN_KL_PER_OCTAVE = 64, LTN_KL_MIN_EXP = -64, LTN_KL_BINS = LTN_KL_PER_OCTAVE * (8 + 64) };

struct ltn_divergence {
    int64_t n;             /* predictions compared */
    int64_t agreed;        /* of them with the same likeliest token */
    double kl, kl_squares; /* sums, in nats */
    double kl_max;
    float logit_max;           /* the largest difference of a logit */
    int64_t bins[LTN_KL_BINS]; /* what is below the first bin counts in it */
};

/* log sum_i exp(logits[i]), i < n */
double ltn_log_sum_exp(const float *logits, int32_t n);

/* Compares one prediction, logits [n], with the reference's; *_lse: their ltn_log_sum_exp. Returns the
 * Kullback-Leibler divergence sum_i p_i (log p_i - log q_i), p the reference's distribution, in nats. */
double ltn_divergence_add(struct ltn_divergence *d, const float *reference, double reference_lse,
                          const float *logits, double lse, int32_t n);

/* The KL divergence that a share of the predictions, 0 to 1, does not exceed; 0 where there is none. */
double ltn_divergence_quantile(const struct ltn_divergence *d, double share);

#endif
