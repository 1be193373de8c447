#include "src/divergence.h"

#include "kernels/dtype.h"

#include <math.h>

/* Vocabularies are long and this is done for every token, so the loops go over LANES numbers at a time, which
 * the compiler makes vectors of; what is left over goes to lane 0. */
enum { LANES = 8 };

/* exp(x) for x <= 0, to 2e-7 of its value; below -87 that of -87. x = n ln 2 + r with |r| <= ln 2 / 2; the
 * polynomial is that of Cephes' expf. */
static inline float exp_below(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 0x1.715476p0f + 0x1.8p23f, n = shifted - 0x1.8p23f; /* n in the low bits */
    float r = x - n * 0.693359375f + n * 2.12194440e-4f, p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * ltn_bits_to_f32((ltn_f32_to_bits(shifted) << 23) + 0x3f800000u);
}

static float largest(const float *x, int32_t n)
{
    float most[LANES];
    int32_t i = 0;
    for (int j = 0; j < LANES; j++)
        most[j] = x[0];
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
    for (; i < n; i++)
        most[0] = x[i] > most[0] ? x[i] : most[0];
    for (int j = 1; j < LANES; j++)
        most[0] = most[j] > most[0] ? most[j] : most[0];
    return most[0];
}

/* The first of the largest; n where they are not numbers. */
static int32_t likeliest(const float *x, int32_t n)
{
    float most = largest(x, n);
    int32_t i = 0;
    while (i < n && x[i] != most)
        i++;
    return i;
}

double ltn_log_sum_exp(const float *logits, int32_t n)
{
    float most = largest(logits, n);
    double sum[LANES] = {0}, total = 0;
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            sum[j] += exp_below(logits[i + j] - most);
    for (; i < n; i++)
        sum[0] += exp_below(logits[i] - most);
    for (int j = 0; j < LANES; j++)
        total += sum[j];
    return (double)most + log(total);
}

static int bin_of(double kl)
{
    double bin = kl > 0 ? floor((log2(kl) - LTN_KL_MIN_EXP) * LTN_KL_PER_OCTAVE) : 0;
    return bin < 0 ? 0 : bin < LTN_KL_BINS - 1 ? (int)bin : LTN_KL_BINS - 1;
}

double ltn_divergence_add(struct ltn_divergence *d, const float *reference, double reference_lse,
                          const float *logits, double lse, int32_t n)
{
    double sum[LANES] = {0}, shift = lse - reference_lse, kl = 0;
    float most[LANES] = {0};
    const float top = (float)reference_lse;
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            float p = reference[i + j], q = logits[i + j], apart = p > q ? p - q : q - p;
            sum[j] += exp_below(p - top) * ((double)p - q + shift);
            most[j] = apart > most[j] ? apart : most[j];
        }
    for (; i < n; i++) {
        float apart = fabsf(reference[i] - logits[i]);
        sum[0] += exp_below(reference[i] - top) * ((double)reference[i] - logits[i] + shift);
        most[0] = apart > most[0] ? apart : most[0];
    }
    for (int j = 0; j < LANES; j++) {
        kl += sum[j];
        d->logit_max = most[j] > d->logit_max ? most[j] : d->logit_max;
    }
    kl *= exp((double)top - reference_lse); /* what was rounded off */
    kl = kl > 0 ? kl : 0;                   /* it cannot be negative but by rounding */
    d->n++;
    d->agreed += likeliest(logits, n) == likeliest(reference, n);
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
