#include "src/sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A full sort of the vocabulary would cost more than many a model's forward pass. Tokens fall into buckets by
 * distance instead, 16 for each halving of probability; only the bucket in which a cut lies is sorted. */
enum { BUCKET_BITS = LTN_DISTANCE_BITS - 4, N_BUCKETS = (LTN_FARTHEST >> BUCKET_BITS) + 1 };

enum { SPAN = 256 }; /* logits that are looked at together */

const struct ltn_sampling ltn_sampling_default = {.temperature = 0.8, .top_p = 0.95, .repeat_last = 64};

enum ltn_status ltn_sampler_create(struct ltn_sampler *sampler, int32_t n, struct ltn_error *err)
{
    sampler->n = n;
    sampler->distance = malloc((size_t)n * sizeof *sampler->distance);
    sampler->adjusted = malloc((size_t)n * sizeof *sampler->adjusted);
    sampler->boundary = malloc((size_t)n * sizeof *sampler->boundary);
    if (sampler->distance && sampler->adjusted && sampler->boundary)
        return LTN_OK;
    ltn_sampler_free(sampler);
    return ltn_fail(err, LTN_ERR_MEMORY, "sampling: no memory for %d candidates", n);
}

void ltn_sampler_free(struct ltn_sampler *sampler)
{
    free(sampler->distance);
    free(sampler->adjusted);
    free(sampler->boundary);
    *sampler = (struct ltn_sampler){0};
}

static enum ltn_status check_share(const char *name, double share, struct ltn_error *err)
{
    if (share >= 0 && share <= 1)
        return LTN_OK;
    return ltn_fail(err, LTN_ERR_INPUT, "%s: expected 0 to 1, found %g", name, share);
}

static enum ltn_status check_bias(const struct ltn_logit_bias *bias, int32_t n, struct ltn_error *err)
{
    if (bias->id < 0 || bias->id >= n)
        return ltn_fail(err, LTN_ERR_INPUT, "bias: expected an id from 0 to %d, found %d", n - 1, bias->id);
    if (isnan(bias->value) || bias->value == INFINITY)
        return ltn_fail(err, LTN_ERR_INPUT, "bias of token %d: expected a number or -infinity, found %g",
                        bias->id, (double)bias->value);
    return LTN_OK;
}

enum ltn_status ltn_sampling_check(const struct ltn_sampling *s, int32_t n, struct ltn_error *err)
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
    if (s->n_bias > INT32_MAX)
        return ltn_fail(err, LTN_ERR_INPUT, "bias: expected at most %d of them, found %zu", INT32_MAX,
                        s->n_bias);
    for (size_t i = 0; i < s->n_bias; i++)
        LTN_TRY(check_bias(&s->bias[i], n, err));
    return LTN_OK;
}

struct ltn_choice ltn_sampling_choice(const struct ltn_sampling *s)
{
    return (struct ltn_choice){.temperature = s->temperature,
                               .top_k = s->top_k,
                               .top_p = s->top_p,
                               .min_p = s->min_p,
                               .typical = s->typical,
                               .repeat_last = s->repeat_last,
                               .repeat_penalty = s->repeat_penalty,
                               .presence_penalty = s->presence_penalty,
                               .frequency_penalty = s->frequency_penalty};
}

bool ltn_sampling_has_penalties(const struct ltn_sampling *s)
{
    const struct ltn_choice choice = ltn_sampling_choice(s);
    return ltn_has_penalties(&choice);
}

bool ltn_sampling_equal(const struct ltn_sampling *a, const struct ltn_sampling *b)
{
    if (a->temperature != b->temperature || a->top_k != b->top_k || a->top_p != b->top_p ||
        a->min_p != b->min_p || a->typical != b->typical || a->repeat_last != b->repeat_last ||
        a->repeat_penalty != b->repeat_penalty || a->presence_penalty != b->presence_penalty ||
        a->frequency_penalty != b->frequency_penalty || a->n_bias != b->n_bias)
        return false;
    for (size_t i = 0; i < a->n_bias; i++)
        if (a->bias[i].id != b->bias[i].id || a->bias[i].value != b->bias[i].value)
            return false;
    return true;
}

/* ---- a sampling with biases of its own ---- */

static int by_id(const void *a, const void *b)
{
    const struct ltn_logit_bias *const *x = a, *const *y = b;
    if ((*x)->id != (*y)->id)
        return (*x)->id < (*y)->id ? -1 : 1;
    return *x < *y ? -1 : *x > *y;
}

enum ltn_status ltn_own_sampling_set(struct ltn_own_sampling *own, const struct ltn_sampling *sampling,
                                     struct ltn_error *err)
{
    const size_t n = sampling->n_bias;
    struct ltn_logit_bias *bias = malloc(n * sizeof *bias + 1);
    struct ltn_bias *sorted = malloc(n * sizeof *sorted + 1);
    const struct ltn_logit_bias **order = malloc(n * sizeof *order + 1);

    if (!bias || !sorted || !order) {
        free(bias);
        free(sorted);
        free(order);
        ltn_own_sampling_free(own);
        return ltn_fail(err, LTN_ERR_MEMORY, "sampling: no memory for %zu biases", n);
    }
    for (size_t i = 0; i < n; i++) {
        bias[i] = sampling->bias[i];
        order[i] = &bias[i];
    }
    qsort(order, n, sizeof *order, by_id);
    for (size_t i = 0; i < n; i++)
        sorted[i] = (struct ltn_bias){order[i]->id, order[i]->value};
    free(order);
    const struct ltn_own_sampling made = {.sampling = *sampling, .sorted = sorted};
    ltn_own_sampling_free(own);
    *own = made;
    own->sampling.bias = bias;
    return LTN_OK;
}

void ltn_own_sampling_free(struct ltn_own_sampling *own)
{
    free((void *)own->sampling.bias);
    free(own->sorted);
    *own = (struct ltn_own_sampling){0};
}

/* ---- what is kept ---- */

/* What tokens are ordered by: their logits, or, where `near` is set, how near their distance is to `mean`. */
struct order {
    const float *logits;
    bool near;
    uint32_t mean;
};

static uint64_t place_of(const struct ltn_sampler *sampler, const struct order *order, int32_t i)
{
    return ltn_place(order->near ? ltn_nearness_key(sampler->distance[i], order->mean)
                                 : ltn_logit_key(order->logits[i]),
                     i);
}

/* Never descends along the order. */
static uint32_t bucket_of(const struct ltn_sampler *sampler, const struct order *order, int32_t i)
{
    const uint32_t distance = sampler->distance[i];
    return (order->near ? ltn_nearness_key(distance, order->mean) : distance) >> BUCKET_BITS;
}

static int by_place(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static uint64_t amount_of(const struct ltn_sampler *sampler, int32_t i, bool weights)
{
    return weights ? ltn_token_weight(sampler->distance[i]) : sampler->distance[i] != LTN_FAR;
}

static uint64_t total_of(const struct ltn_sampler *sampler)
{
    uint64_t total = 0;
    for (int32_t i = 0; i < sampler->n; i++)
        total += ltn_token_weight(sampler->distance[i]);
    return total;
}

/* The place of the last of the fewest first tokens that reach what is left of `amount` inside a bucket. */
static uint64_t last_place(struct ltn_sampler *sampler, const struct order *order, uint32_t bucket,
                           uint64_t amount, bool weights)
{
    size_t n = 0, i = 0;
    for (int32_t id = 0; id < sampler->n; id++)
        if (sampler->distance[id] != LTN_FAR && bucket_of(sampler, order, id) == bucket)
            sampler->boundary[n++] = place_of(sampler, order, id);
    qsort(sampler->boundary, n, sizeof *sampler->boundary, by_place);
    for (uint64_t sum = 0; i < n; i++) {
        sum += amount_of(sampler, (int32_t)sampler->boundary[i], weights);
        if (sum >= amount)
            break;
    }
    return sampler->boundary[i];
}

/* Keeps the fewest first tokens that reach the amount, of weight or of tokens. */
static void keep_first(struct ltn_sampler *sampler, const struct order *order, uint64_t amount, bool weights)
{
    uint64_t sums[N_BUCKETS] = {0};
    uint32_t bucket = 0;
    for (int32_t i = 0; i < sampler->n; i++)
        if (sampler->distance[i] != LTN_FAR)
            sums[bucket_of(sampler, order, i)] += amount_of(sampler, i, weights);
    for (; bucket < N_BUCKETS && sums[bucket] < amount; bucket++)
        amount -= sums[bucket];
    if (bucket == N_BUCKETS) /* there are fewer tokens than that */
        return;
    const uint64_t last = last_place(sampler, order, bucket, amount, weights);
    for (int32_t i = 0; i < sampler->n; i++)
        if (place_of(sampler, order, i) > last)
            sampler->distance[i] = LTN_FAR;
}

static void keep_typical(struct ltn_sampler *sampler, double share)
{
    uint64_t high = 0, low = 0, total = total_of(sampler);
    for (int32_t i = 0; i < sampler->n; i++) {
        const uint64_t product = ltn_token_weight(sampler->distance[i]) * sampler->distance[i];
        high += product >> 32;
        low += product & 0xffffffffu;
    }
    const struct order order = {.near = true, .mean = ltn_mean_distance(high, low, total)};
    keep_first(sampler, &order, ltn_share_of(share, total), true);
}

static void keep_min(struct ltn_sampler *sampler, double share)
{
    uint32_t nearest = LTN_FAR;
    for (int32_t i = 0; i < sampler->n; i++)
        nearest = sampler->distance[i] < nearest ? sampler->distance[i] : nearest;
    const uint64_t least = ltn_share_of(share, ltn_token_weight(nearest));
    for (int32_t i = 0; i < sampler->n; i++)
        if (ltn_token_weight(sampler->distance[i]) < least)
            sampler->distance[i] = LTN_FAR;
}

/* ---- penalties and bias ---- */

static void penalise(struct ltn_sampler *sampler, const struct ltn_sampling *s, const int32_t *recent,
                     int32_t n_recent)
{
    const struct ltn_choice choice = ltn_sampling_choice(s);
    uint64_t *count = sampler->boundary;
    for (int32_t i = 0; i < n_recent; i++)
        count[recent[i]] = 0;
    for (int32_t i = 0; i < n_recent; i++)
        count[recent[i]]++;
    for (int32_t i = 0; i < n_recent; i++) {
        const int32_t id = recent[i];
        if (count[id] == 0) /* done */
            continue;
        sampler->adjusted[id] = ltn_penalised(sampler->adjusted[id], (int32_t)count[id], &choice);
        count[id] = 0;
    }
}

/* What the choice is made from. */
static const float *adjust(struct ltn_sampler *sampler, const float *logits, const struct ltn_sampling *s,
                           const int32_t *recent, int32_t n_recent)
{
    const bool penalties = n_recent > 0 && ltn_sampling_has_penalties(s);
    if (!penalties && s->n_bias == 0)
        return logits;
    memcpy(sampler->adjusted, logits, (size_t)sampler->n * sizeof *sampler->adjusted);
    if (penalties)
        penalise(sampler, s, recent, n_recent);
    for (size_t i = 0; i < s->n_bias; i++)
        sampler->adjusted[s->bias[i].id] += s->bias[i].value;
    return sampler->adjusted;
}

/* ---- the choice ---- */

/* Whether any of SPAN logits is above `most`, or a NaN. The compiler makes vectors of it. */
static bool any_above(const float *logits, float most)
{
    int above = 0;
    for (int i = 0; i < SPAN; i++)
        above |= !(logits[i] <= most);
    return above != 0;
}

/* The first of the largest logits; refuses those that no choice can be made from. Greedy decoding does this
 * alone, for every token, so spans with nothing new in them are passed over. */
static enum ltn_status survey(const float *logits, int32_t n, int32_t *best, struct ltn_error *err)
{
    *best = 0;
    for (int32_t first = 0; first < n; first += SPAN) {
        const int32_t end = n - first < SPAN ? n : first + SPAN;
        if (first > 0 && end - first == SPAN && !any_above(logits + first, logits[*best]))
            continue;
        for (int32_t i = first; i < end; i++) {
            if (isnan(logits[i]) || logits[i] == INFINITY)
                return ltn_fail(err, LTN_ERR_INPUT, "logits: expected finite numbers, found %f for token %d",
                                (double)logits[i], i);
            if (logits[i] > logits[*best])
                *best = i;
        }
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
    LTN_TRY(ltn_sampling_check(sampling, n, err));
    logits = adjust(sampler, logits, sampling, recent, n_recent);
    LTN_TRY(survey(logits, n, &best, err));
    *id = best;
    if (sampling->temperature == 0)
        return LTN_OK;

    const double scale = ltn_distance_scale(sampling->temperature);
    const struct order order = {.logits = logits};
    for (int32_t i = 0; i < n; i++)
        sampler->distance[i] = ltn_distance(logits[i], logits[best], scale);
    if (sampling->top_k > 0 && sampling->top_k < n)
        keep_first(sampler, &order, (uint64_t)sampling->top_k, false);
    if (sampling->typical > 0 && sampling->typical < 1)
        keep_typical(sampler, sampling->typical);
    if (sampling->top_p < 1)
        keep_first(sampler, &order, ltn_share_of(sampling->top_p, total_of(sampler)), true);
    if (sampling->min_p > 0)
        keep_min(sampler, sampling->min_p);

    const uint64_t threshold = ltn_threshold(u, total_of(sampler));
    uint64_t sum = 0;
    for (*id = 0; sum += ltn_token_weight(sampler->distance[*id]), sum <= threshold; ++*id)
        ;
    return LTN_OK;
}
