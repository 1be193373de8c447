#include "src/sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A full sort of the vocabulary would cost more than many a model's forward pass. Logits fall into buckets of
 * equal width instead; only the bucket in which a cut lies is sorted. */
enum { N_BUCKETS = 1024 };

const struct ltn_sampling ltn_sampling_default = {.temperature = 0.8, .top_p = 0.95};

enum ltn_status ltn_sampler_create(struct ltn_sampler *sampler, int32_t n, struct ltn_error *err)
{
    sampler->n = n;
    sampler->weight = malloc((size_t)n * sizeof *sampler->weight);
    sampler->boundary = malloc((size_t)n * sizeof *sampler->boundary);
    if (sampler->weight && sampler->boundary)
        return LTN_OK;
    ltn_sampler_free(sampler);
    return ltn_fail(err, LTN_ERR_MEMORY, "sampling: no memory for %d candidates", n);
}

void ltn_sampler_free(struct ltn_sampler *sampler)
{
    free(sampler->weight);
    free(sampler->boundary);
    *sampler = (struct ltn_sampler){0};
}

enum ltn_status ltn_sampling_check(const struct ltn_sampling *s, struct ltn_error *err)
{
    if (!(s->temperature >= 0) || isinf(s->temperature))
        return ltn_fail(err, LTN_ERR_INPUT, "temperature: expected 0 or more, found %g", s->temperature);
    if (s->top_k < 0)
        return ltn_fail(err, LTN_ERR_INPUT, "top_k: expected 0 or more, found %d", s->top_k);
    if (!(s->top_p >= 0 && s->top_p <= 1))
        return ltn_fail(err, LTN_ERR_INPUT, "top_p: expected 0 to 1, found %g", s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return ltn_fail(err, LTN_ERR_INPUT, "min_p: expected 0 to 1, found %g", s->min_p);
    return LTN_OK;
}

/* Where the kept tokens end: the last one kept. */
struct cut {
    float logit;
    int32_t id;
};

static bool kept(const struct cut *cut, float logit, int32_t id)
{
    return logit > cut->logit || (logit == cut->logit && id <= cut->id);
}

struct scale { /* logit -> bucket; the largest logits in bucket 0 */
    float largest;
    double per_logit;
};

static int bucket_of(const struct scale *scale, float logit)
{
    double b = ((double)scale->largest - logit) * scale->per_logit;
    return b < N_BUCKETS - 1 ? (int)b : N_BUCKETS - 1;
}

static int by_logit_then_id(const void *a, const void *b, void *logits)
{
    int32_t ia = *(const int32_t *)a, ib = *(const int32_t *)b;
    float la = ((const float *)logits)[ia], lb = ((const float *)logits)[ib];
    if (la != lb)
        return la > lb ? -1 : 1;
    return ia < ib ? -1 : ia > ib;
}

/* Sorts the kept tokens of one bucket into sampler->boundary; returns how many. */
static int32_t sort_bucket(struct ltn_sampler *sampler, const float *logits, const struct scale *scale,
                           const struct cut *cut, int bucket)
{
    int32_t n = 0;
    for (int32_t i = 0; i < sampler->n; i++)
        if (bucket_of(scale, logits[i]) == bucket && kept(cut, logits[i], i))
            sampler->boundary[n++] = i;
    qsort_r(sampler->boundary, (size_t)n, sizeof *sampler->boundary, by_logit_then_id, (void *)logits);
    return n;
}

static void cut_top_k(struct ltn_sampler *sampler, const float *logits, const struct scale *scale, int32_t k,
                      struct cut *cut)
{
    int32_t count[N_BUCKETS] = {0};
    for (int32_t i = 0; i < sampler->n; i++)
        if (kept(cut, logits[i], i))
            count[bucket_of(scale, logits[i])]++;
    int bucket = 0;
    for (; bucket < N_BUCKETS && k > count[bucket]; bucket++)
        k -= count[bucket];
    if (bucket == N_BUCKETS) /* fewer than k tokens are possible at all */
        return;
    sort_bucket(sampler, logits, scale, cut, bucket);
    cut->id = sampler->boundary[k - 1];
    cut->logit = logits[cut->id];
}

static void cut_top_p(struct ltn_sampler *sampler, const float *logits, const struct scale *scale, double p,
                      struct cut *cut)
{
    double mass[N_BUCKETS] = {0}, total = 0;
    for (int32_t i = 0; i < sampler->n; i++)
        if (kept(cut, logits[i], i))
            mass[bucket_of(scale, logits[i])] += sampler->weight[i];
    for (int b = 0; b < N_BUCKETS; b++)
        total += mass[b];
    double goal = p * total, sum = 0;
    int bucket = 0;
    for (; bucket < N_BUCKETS - 1 && sum + mass[bucket] < goal; bucket++)
        sum += mass[bucket];
    int32_t n = sort_bucket(sampler, logits, scale, cut, bucket);
    for (int32_t i = 0; i < n; i++) {
        sum += sampler->weight[sampler->boundary[i]];
        if (sum >= goal || i == n - 1) {
            *cut = (struct cut){logits[sampler->boundary[i]], sampler->boundary[i]};
            return;
        }
    }
}

/* The extremes of the logits; refuses those that no choice can be made from. */
static enum ltn_status survey(const float *logits, int32_t n, int32_t *best, float *lowest,
                              struct ltn_error *err)
{
    *best = 0;
    *lowest = INFINITY; /* of the finite ones */
    for (int32_t i = 0; i < n; i++) {
        if (isnan(logits[i]) || logits[i] == INFINITY)
            return ltn_fail(err, LTN_ERR_INPUT, "logits: expected finite numbers, found %f for token %d",
                            (double)logits[i], i);
        if (logits[i] > logits[*best])
            *best = i;
        if (logits[i] < *lowest && logits[i] != -INFINITY)
            *lowest = logits[i];
    }
    if (logits[*best] == -INFINITY)
        return ltn_fail(err, LTN_ERR_INPUT, "logits: every one of the %d tokens has -infinity", n);
    return LTN_OK;
}

enum ltn_status ltn_sample(struct ltn_sampler *sampler, const float *logits,
                           const struct ltn_sampling *sampling, double u, int32_t *id, struct ltn_error *err)
{
    int32_t n = sampler->n, best;
    float lowest;
    LTN_TRY(ltn_sampling_check(sampling, err));
    LTN_TRY(survey(logits, n, &best, &lowest, err));
    *id = best;
    if (sampling->temperature == 0)
        return LTN_OK;

    float largest = logits[best];
    for (int32_t i = 0; i < n; i++)
        sampler->weight[i] = exp(((double)logits[i] - largest) / sampling->temperature);

    double range = (double)largest - lowest;
    struct scale scale = {largest, range > 0 ? N_BUCKETS / range : 0};
    struct cut cut = {lowest, n - 1}; /* everything that is possible */
    if (sampling->top_k > 0 && sampling->top_k < n)
        cut_top_k(sampler, logits, &scale, sampling->top_k, &cut);
    if (sampling->top_p < 1)
        cut_top_p(sampler, logits, &scale, sampling->top_p, &cut);

    double total = 0, sum = 0;
    for (int32_t i = 0; i < n; i++) {
        if (!kept(&cut, logits[i], i) || sampler->weight[i] < sampling->min_p)
            sampler->weight[i] = 0;
        total += sampler->weight[i];
    }
    for (int32_t i = 0; i < n; i++) {
        if (sampler->weight[i] == 0)
            continue;
        *id = i; /* the last one with any weight, should rounding keep the sum below u * total */
        sum += sampler->weight[i];
        if (sum > u * total)
            break;
    }
    return LTN_OK;
}
