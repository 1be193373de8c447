#include "src/sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A full sort of the vocabulary would cost more than many a model's forward pass. Logits fall into buckets of
 * equal width instead; only the bucket in which a cut lies is sorted. */
enum { N_BUCKETS = 1024 };

const struct ltn_sampling ltn_sampling_default = {.temperature = 0.8, .top_p = 0.95, .repeat_last = 64};

enum ltn_status ltn_sampler_create(struct ltn_sampler *sampler, int32_t n, struct ltn_error *err)
{
    sampler->n = n;
    sampler->weight = malloc((size_t)n * sizeof *sampler->weight);
    sampler->adjusted = malloc((size_t)n * sizeof *sampler->adjusted);
    sampler->boundary = malloc((size_t)n * sizeof *sampler->boundary);
    sampler->nearness = malloc((size_t)n * sizeof *sampler->nearness);
    if (sampler->weight && sampler->adjusted && sampler->nearness && sampler->boundary)
        return LTN_OK;
    ltn_sampler_free(sampler);
    return ltn_fail(err, LTN_ERR_MEMORY, "sampling: no memory for %d candidates", n);
}

void ltn_sampler_free(struct ltn_sampler *sampler)
{
    free(sampler->weight);
    free(sampler->adjusted);
    free(sampler->nearness);
    free(sampler->boundary);
    *sampler = (struct ltn_sampler){0};
}

static enum ltn_status check_share(const char *name, double share, struct ltn_error *err)
{
    if (share >= 0 && share <= 1)
        return LTN_OK;
    return ltn_fail(err, LTN_ERR_INPUT, "%s: expected 0 to 1, found %g", name, share);
}

enum ltn_status ltn_sampling_check(const struct ltn_sampling *s, struct ltn_error *err)
{
    if (!(s->temperature >= 0) || isinf(s->temperature))
        return ltn_fail(err, LTN_ERR_INPUT, "temperature: expected 0 or more, found %g", s->temperature);
    if (s->top_k < 0)
        return ltn_fail(err, LTN_ERR_INPUT, "top_k: expected 0 or more, found %d", s->top_k);
    LTN_TRY(check_share("top_p", s->top_p, err));
    LTN_TRY(check_share("min_p", s->min_p, err));
    LTN_TRY(check_share("typical", s->typical, err));
    if (s->repeat_last < 0 || s->repeat_last > LTN_MAX_REPEAT_LAST)
        return ltn_fail(err, LTN_ERR_INPUT, "repeat_last: expected 0 to %d, found %d", LTN_MAX_REPEAT_LAST,
                        s->repeat_last);
    if (!(s->repeat_penalty >= 0) || isinf(s->repeat_penalty))
        return ltn_fail(err, LTN_ERR_INPUT, "repeat_penalty: expected 0 or more, found %g",
                        s->repeat_penalty);
    if (!isfinite(s->presence_penalty) || !isfinite(s->frequency_penalty))
        return ltn_fail(err, LTN_ERR_INPUT, "%s_penalty: expected a finite number, found %g",
                        isfinite(s->presence_penalty) ? "frequency" : "presence",
                        isfinite(s->presence_penalty) ? s->frequency_penalty : s->presence_penalty);
    for (size_t i = 0; i < s->n_bias; i++)
        if (isnan(s->bias[i].value) || s->bias[i].value == INFINITY)
            return ltn_fail(err, LTN_ERR_INPUT, "bias of token %d: expected a number or -infinity, found %g",
                            s->bias[i].id, (double)s->bias[i].value);
    return LTN_OK;
}

/* ---- what is kept: tokens of weight 0 are out ---- */

/* The last token kept, in the order "larger key first, of equals the lower id first". */
struct cut {
    float key;
    int32_t id;
};

/* Takes out what comes after the cut. */
static void apply(struct ltn_sampler *sampler, const float *keys, struct cut cut)
{
    for (int32_t i = 0; i < sampler->n; i++)
        if (keys[i] < cut.key || (keys[i] == cut.key && i > cut.id))
            sampler->weight[i] = 0;
}

struct scale { /* key -> bucket; the largest keys in bucket 0 */
    float largest;
    double per_key;
};

static struct scale make_scale(float largest, float lowest)
{
    double range = (double)largest - lowest;
    return (struct scale){largest, range > 0 ? N_BUCKETS / range : 0};
}

static int bucket_of(const struct scale *scale, float key)
{
    double b = ((double)scale->largest - key) * scale->per_key;
    return b < N_BUCKETS - 1 ? (int)b : N_BUCKETS - 1;
}

static int by_key_then_id(const void *a, const void *b, void *keys)
{
    int32_t ia = *(const int32_t *)a, ib = *(const int32_t *)b;
    float ka = ((const float *)keys)[ia], kb = ((const float *)keys)[ib];
    if (ka != kb)
        return ka > kb ? -1 : 1;
    return ia < ib ? -1 : ia > ib;
}

/* Sorts the tokens of one bucket into sampler->boundary; returns how many. */
static int32_t sort_bucket(struct ltn_sampler *sampler, const float *keys, const struct scale *scale,
                           int bucket)
{
    int32_t n = 0;
    for (int32_t i = 0; i < sampler->n; i++)
        if (sampler->weight[i] > 0 && bucket_of(scale, keys[i]) == bucket)
            sampler->boundary[n++] = i;
    qsort_r(sampler->boundary, (size_t)n, sizeof *sampler->boundary, by_key_then_id, (void *)keys);
    return n;
}

/* Keeps the first k tokens. */
static void keep_count(struct ltn_sampler *sampler, const float *keys, struct scale scale, int32_t k)
{
    int32_t count[N_BUCKETS] = {0};
    for (int32_t i = 0; i < sampler->n; i++)
        if (sampler->weight[i] > 0)
            count[bucket_of(&scale, keys[i])]++;
    int bucket = 0;
    for (; bucket < N_BUCKETS && k > count[bucket]; bucket++)
        k -= count[bucket];
    if (bucket == N_BUCKETS) /* fewer than k tokens are possible at all */
        return;
    sort_bucket(sampler, keys, &scale, bucket);
    const int32_t last = sampler->boundary[k - 1];
    apply(sampler, keys, (struct cut){keys[last], last});
}

/* Keeps the first tokens that together reach this share, one at least. */
static void keep_share(struct ltn_sampler *sampler, const float *keys, struct scale scale, double share)
{
    double mass[N_BUCKETS] = {0}, total = 0;
    for (int32_t i = 0; i < sampler->n; i++)
        if (sampler->weight[i] > 0)
            mass[bucket_of(&scale, keys[i])] += sampler->weight[i];
    int last_bucket = 0;
    for (int b = 0; b < N_BUCKETS; b++) {
        total += mass[b];
        last_bucket = mass[b] > 0 ? b : last_bucket;
    }
    double goal = share * total, sum = 0;
    int bucket = 0;
    for (; bucket < last_bucket && (mass[bucket] == 0 || sum + mass[bucket] < goal); bucket++)
        sum += mass[bucket];
    int32_t n = sort_bucket(sampler, keys, &scale, bucket), i = 0;
    while (sum += sampler->weight[sampler->boundary[i]], sum < goal && i < n - 1)
        i++;
    const int32_t last = sampler->boundary[i];
    apply(sampler, keys, (struct cut){keys[last], last});
}

/* -log p less the entropy is, but for sign and temperature, the logit less its mean: the logarithm of the
 * total is in both. */
static void keep_typical(struct ltn_sampler *sampler, const float *logits, double share)
{
    double total = 0, mean = 0;
    float largest = -INFINITY, lowest = 0, *nearness = sampler->nearness;
    for (int32_t i = 0; i < sampler->n; i++)
        if (sampler->weight[i] > 0) {
            total += sampler->weight[i];
            mean += sampler->weight[i] * logits[i];
        }
    mean /= total;
    for (int32_t i = 0; i < sampler->n; i++) {
        nearness[i] = -INFINITY;
        if (sampler->weight[i] == 0)
            continue;
        nearness[i] = -(float)fabs(logits[i] - mean);
        largest = nearness[i] > largest ? nearness[i] : largest;
        lowest = nearness[i] < lowest ? nearness[i] : lowest;
    }
    keep_share(sampler, nearness, make_scale(largest, lowest), share);
}

static void keep_min(struct ltn_sampler *sampler, double share)
{
    double largest = 0;
    for (int32_t i = 0; i < sampler->n; i++)
        largest = sampler->weight[i] > largest ? sampler->weight[i] : largest;
    for (int32_t i = 0; i < sampler->n; i++)
        if (sampler->weight[i] < share * largest)
            sampler->weight[i] = 0;
}

/* ---- penalties and bias ---- */

bool ltn_sampling_has_penalties(const struct ltn_sampling *s)
{
    return s->repeat_last > 0 && ((s->repeat_penalty != 0 && s->repeat_penalty != 1) ||
                                  s->presence_penalty != 0 || s->frequency_penalty != 0);
}

static void penalise(struct ltn_sampler *sampler, const struct ltn_sampling *s, const int32_t *recent,
                     int32_t n_recent)
{
    const double repeat = s->repeat_penalty == 0 ? 1 : s->repeat_penalty;
    int32_t *count = sampler->boundary;
    for (int32_t i = 0; i < n_recent; i++)
        count[recent[i]] = 0;
    for (int32_t i = 0; i < n_recent; i++)
        count[recent[i]]++;
    for (int32_t i = 0; i < n_recent; i++) {
        const int32_t id = recent[i], n = count[id];
        const double logit = sampler->adjusted[id];
        if (n == 0) /* done */
            continue;
        sampler->adjusted[id] = (float)((logit > 0 ? logit / repeat : logit * repeat) - s->presence_penalty -
                                        n * s->frequency_penalty);
        count[id] = 0;
    }
}

/* *logits becomes what the choice is made from. */
static enum ltn_status adjust(struct ltn_sampler *sampler, const struct ltn_sampling *s,
                              const int32_t *recent, int32_t n_recent, const float **logits,
                              struct ltn_error *err)
{
    const bool penalties = n_recent > 0 && ltn_sampling_has_penalties(s);
    if (!penalties && s->n_bias == 0)
        return LTN_OK;
    memcpy(sampler->adjusted, *logits, (size_t)sampler->n * sizeof *sampler->adjusted);
    *logits = sampler->adjusted;
    if (penalties)
        penalise(sampler, s, recent, n_recent);
    for (size_t i = 0; i < s->n_bias; i++) {
        if (s->bias[i].id < 0 || s->bias[i].id >= sampler->n)
            return ltn_fail(err, LTN_ERR_INPUT, "bias: expected an id from 0 to %d, found %d", sampler->n - 1,
                            s->bias[i].id);
        sampler->adjusted[s->bias[i].id] += s->bias[i].value;
    }
    return LTN_OK;
}

/* ---- the choice ---- */

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
                           const struct ltn_sampling *sampling, const int32_t *recent, int32_t n_recent,
                           double u, int32_t *id, struct ltn_error *err)
{
    int32_t n = sampler->n, best;
    float lowest;
    LTN_TRY(ltn_sampling_check(sampling, err));
    LTN_TRY(adjust(sampler, sampling, recent, n_recent, &logits, err));
    LTN_TRY(survey(logits, n, &best, &lowest, err));
    *id = best;
    if (sampling->temperature == 0)
        return LTN_OK;

    const float largest = logits[best];
    for (int32_t i = 0; i < n; i++)
        sampler->weight[i] = exp(((double)logits[i] - largest) / sampling->temperature);

    const struct scale scale = make_scale(largest, lowest);
    if (sampling->top_k > 0 && sampling->top_k < n)
        keep_count(sampler, logits, scale, sampling->top_k);
    if (sampling->typical > 0 && sampling->typical < 1)
        keep_typical(sampler, logits, sampling->typical);
    if (sampling->top_p < 1)
        keep_share(sampler, logits, scale, sampling->top_p);
    if (sampling->min_p > 0)
        keep_min(sampler, sampling->min_p);

    double total = 0, sum = 0;
    for (int32_t i = 0; i < n; i++)
        total += sampler->weight[i];
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
