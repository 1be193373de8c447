/* Choosing the next token from logits. */
#ifndef LTN_SAMPLING_H
#define LTN_SAMPLING_H

#include "kernels/sample.h"
#include "src/ltn.h"

/* Scratch for one vocabulary, so that sampling allocates nothing. */
struct ltn_sampler {
    int32_t n;          /* size of the vocabulary */
    uint32_t *distance; /* [n] below the largest logit (kernels/sample.h); LTN_FAR: the token is out */
    float *adjusted;    /* [n] logits after penalties and bias */
    uint64_t *boundary; /* [n] the places of one bucket's tokens, sorted; or counts of tokens */
};

enum ltn_status ltn_sampler_create(struct ltn_sampler *sampler, int32_t n, struct ltn_error *err);
void ltn_sampler_free(struct ltn_sampler *sampler); /* a zeroed one is allowed */

/* Refuses what means nothing: a negative or non-finite temperature, negative top_k, shares outside 0 to 1, a
 * bias for an id outside the vocabulary of n. */
enum ltn_status ltn_sampling_check(const struct ltn_sampling *sampling, int32_t n, struct ltn_error *err);

/* Does it look at past tokens? */
bool ltn_sampling_has_penalties(const struct ltn_sampling *sampling);

/* The same as the operation takes it; biases stay the caller's to place. */
struct ltn_choice ltn_sampling_choice(const struct ltn_sampling *sampling);

bool ltn_sampling_equal(const struct ltn_sampling *a, const struct ltn_sampling *b);

/* A sampling with biases of its own. */
struct ltn_own_sampling {
    struct ltn_sampling sampling;
    struct ltn_bias *sorted; /* [n_bias] by id, of one id in the order they were given, as the operation
                                takes them; NULL: there is no sampling yet */
};

/* own is zeroed or holds another, which goes; on failure it is zeroed. */
enum ltn_status ltn_own_sampling_set(struct ltn_own_sampling *own, const struct ltn_sampling *sampling,
                                     struct ltn_error *err);
void ltn_own_sampling_free(struct ltn_own_sampling *own); /* a zeroed one is allowed, and one is left */

/* Picks *id from logits [n], as kernels/sample.h has it. recent [n_recent] are ids that penalties look at. A
 * NaN or +infinity among the logits, or nothing but -infinity, is an error that names the token. */
enum ltn_status ltn_sample(struct ltn_sampler *sampler, const float *logits,
                           const struct ltn_sampling *sampling, const int32_t *recent, int32_t n_recent,
                           double u, int32_t *id, struct ltn_error *err);

#endif
