/* Choosing the next token from logits. */
#ifndef LTN_SAMPLING_H
#define LTN_SAMPLING_H

#include "src/ltn.h"

/* Scratch for one vocabulary, so that sampling allocates nothing. */
struct ltn_sampler {
    int32_t n;         /* size of the vocabulary */
    double *weight;    /* [n] exp((logit - largest) / temperature) */
    int32_t *boundary; /* [n] the candidates of one bucket, sorted */
};

enum ltn_status ltn_sampler_create(struct ltn_sampler *sampler, int32_t n, struct ltn_error *err);
void ltn_sampler_free(struct ltn_sampler *sampler); /* a zeroed one is allowed */

/* Refuses what means nothing: a negative or non-finite temperature, negative top_k, shares outside 0 to 1. */
enum ltn_status ltn_sampling_check(const struct ltn_sampling *sampling, struct ltn_error *err);

/* Picks *id from logits [n]. The kept tokens are a prefix of the order "larger logit first, of equals the
 * lower id first": top_k counts tokens, top_p sums shares of what top_k kept, min_p compares with the
 * likeliest. The draw u in [0, 1) then picks the first kept token, walking up the ids, at which the running
 * share passes u. A NaN or +infinity among the logits, or nothing but -infinity, is an error that names the
 * token. */
enum ltn_status ltn_sample(struct ltn_sampler *sampler, const float *logits,
                           const struct ltn_sampling *sampling, double u, int32_t *id, struct ltn_error *err);

#endif
