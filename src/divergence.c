#include "src/divergence.h"

#include <math.h>

double ltn_log_sum_exp(const float *logits, int32_t n)
{
    float largest = logits[0];
    double sum = 0;
    for (int32_t i = 1; i < n; i++)
        largest = logits[i] > largest ? logits[i] : largest;
    for (int32_t i = 0; i < n; i++)
        sum += expf(logits[i] - largest);
    return (double)largest + log(sum);
}

static int bin_of(double kl)
{
    double bin = kl > 0 ? floor((log2(kl) - LTN_KL_MIN_EXP) * LTN_KL_PER_OCTAVE) : 0;
    return bin < 0 ? 0 : bin < LTN_KL_BINS - 1 ? (int)bin : LTN_KL_BINS - 1;
}

double ltn_divergence_add(struct ltn_divergence *d, const float *reference, double reference_lse,
                          const float *logits, double lse, int32_t n)
{
    int32_t best = 0, reference_best = 0;
    double kl = 0;
    for (int32_t i = 0; i < n; i++) {
        double log_p = reference[i] - reference_lse, log_q = logits[i] - lse;
        float difference = fabsf(logits[i] - reference[i]);
        kl += expf((float)log_p) * (log_p - log_q);
        d->logit_max = difference > d->logit_max ? difference : d->logit_max;
        best = logits[i] > logits[best] ? i : best;
        reference_best = reference[i] > reference[reference_best] ? i : reference_best;
    }
    kl = kl > 0 ? kl : 0; /* it cannot be negative but by rounding */
    d->n++;
    d->agreed += best == reference_best;
    d->kl += kl;
    d->kl_squares += kl * kl;
    d->kl_max = kl > d->kl_max ? kl : d->kl_max;
    d->bins[bin_of(kl)]++;
    return kl;
}

double ltn_divergence_quantile(const struct ltn_divergence *d, double share)
{
    int64_t wanted = (int64_t)ceil(share * (double)d->n), seen = 0;
    for (int b = 0; b < LTN_KL_BINS; b++) {
        seen += d->bins[b];
        if (seen >= wanted &&
            seen > 0) /* the middle of the bin; what is in the first is as good as nothing */
            return b == 0 ? 0 : exp2(LTN_KL_MIN_EXP + (b + 0.5) / LTN_KL_PER_OCTAVE);
    }
    return 0;
}
