#include "src/logprobs.h"

#include <math.h>

double ltn_logprobs(const float *logits, int32_t n, int32_t id, struct ltn_logprob *top, int32_t n_top)
{
    float largest = -INFINITY;
    double sum = 0;
    int32_t found = 0;

    for (int32_t i = 0; i < n; i++)
        largest = logits[i] > largest ? logits[i] : largest;
    for (int32_t i = 0; i < n; i++)
        sum += exp((double)logits[i] - largest);
    const double log_sum = largest + log(sum);
    for (int32_t i = 0; i < n; i++) {
        if (found == n_top && (n_top == 0 || logits[i] <= logits[top[found - 1].id]))
            continue;
        int32_t at = found < n_top ? found++ : found - 1;
        for (; at > 0 && logits[i] > logits[top[at - 1].id]; at--)
            top[at] = top[at - 1];
        top[at] = (struct ltn_logprob){i, logits[i] - log_sum};
    }
    return logits[id] - log_sum;
}
