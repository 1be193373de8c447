/* Choosing the next token from logits. */
#ifndef LTN_SAMPLING_H
#define LTN_SAMPLING_H

#include "src/ltn.h"

/* Scratch for one vocabulary, so that sampling allocates nothing. */
struct ltn_sampler {
    int32_t n;         /* size of the vocabulary */
    double *weight;    /* [n] exp((logit - largest) / temperature); 0: the token is out */
    float *adjusted;   /* [n] logits after penalties and bias */
    float *nearness;   /* [n] how typical a token is: 0 at most; -infinity: it is out */
    int32_t *boundary; /* [n] the candidates of one bucket, sorted; or counts of tokens */
};

enum ltn_status ltn_sampler_create(struct ltn_sampler *sampler, int32_t n, struct ltn_error *err);
void ltn_sampler_free(struct ltn_sampler *sampler); /* a zeroed one is allowed */

/* Refuses what means nothing: a negative or non-finite temperature, negative top_k, shares outside 0 to 1. */
enum ltn_status ltn_sampling_check(const struct ltn_sampling *sampling, struct ltn_error *err);

/* Does it look at past tokens? */
bool ltn_sampling_has_penalties(const struct ltn_sampling *sampling);

/* Picks *id from logits [n]. recent [n_recent] are ids that penalties look at. The tokens that top_k and
 * top_p keep are a prefix of the order "larger logit first, of equals the lower id first", those of typical
 * one of "nearer first, in float32, of equals the lower id first". The draw u in [0, 1) then picks the first
 * kept token, walking up the ids, at which the running share passes u. A NaN or +infinity among the logits,
 * or nothing but -infinity, is an error that names the token. */
enum ltn_status ltn_sample(struct ltn_sampler *sampler, const float *logits,
                           const struct ltn_sampling *sampling, const int32_t *recent, int32_t n_recent,
                           double u, int32_t *id, struct ltn_error *err);

#endif
