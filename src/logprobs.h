/* The probabilities behind a choice. */
#ifndef LTN_LOGPROBS_H
#define LTN_LOGPROBS_H

#include <stdint.h>

struct ltn_logprob {
    int32_t id;
    double logprob; /* natural logarithm */
};

/* log softmax(logits [n])[id], in f64. top [n_top], n_top <= n, are the likeliest tokens, likeliest first, of
 * equals the lower id first. The logits hold no NaN and no +infinity, and one at least is finite. */
double ltn_logprobs(const float *logits, int32_t n, int32_t id, struct ltn_logprob *top, int32_t n_top);

#endif
