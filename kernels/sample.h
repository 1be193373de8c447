/* The arithmetic of choosing a token, for C and CUDA alike.
 *
 * A choice is the same to the last id wherever it is made, because whatever could depend on an order of sums
 * is an integer. A token's distance is how far its logit lies below the largest one, in units of 2^-22 of a
 * halving of its probability; its weight is 2^(40 - distance * 2^-22), rounded down. Tokens that would weigh
 * less than 1, that is, less than 2^-40 of the likeliest, are out. The few sums and products in floating
 * point are single operations, rounded as IEEE 754 has it, none of them fused with the next.
 *
 * What is kept is always the beginning of an order: larger logits first, or nearer to the mean distance
 * first, of equals the lower id first. */
#ifndef LTN_KERNELS_SAMPLE_H
#define LTN_KERNELS_SAMPLE_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "kernels/rng.h"

enum { LTN_RECENT_IDS = 1024 }; /* so many of a text's last ids are known to penalties */

struct ltn_bias {
    int32_t id;
    float value; /* added to the logit */
};

/* How to choose; what each number means and in which order they apply says struct ltn_sampling, src/ltn.h. */
struct ltn_choice {
    double temperature; /* 0: the largest logit, of equals the first */
    int32_t top_k;
    double top_p, min_p, typical;
    int32_t repeat_last; /* 0 to LTN_RECENT_IDS */
    double repeat_penalty, presence_penalty, frequency_penalty;
    const struct ltn_bias *bias; /* backend memory, [n_bias], ids inside the vocabulary and ascending */
    int32_t n_bias;
};

/* What a text's next draw depends on beside the logits. Every draw advances it. */
struct ltn_draws {
    uint64_t seed, draw;            /* the next draw is number `draw` under `seed` */
    int64_t position;               /* tokens in the text; the one that is chosen becomes number `position` */
    int32_t recent[LTN_RECENT_IDS]; /* token number i at i % LTN_RECENT_IDS */
};

/* In place of an id, where none can be chosen. */
enum { LTN_NO_TOKEN = INT32_MIN };        /* every logit is -infinity */
LTN_BOTH int32_t ltn_bad_logit(int32_t i) /* logit i is NaN or +infinity, and none before it */
{
    return -1 - i;
}

LTN_BOTH bool ltn_has_penalties(const struct ltn_choice *c)
{
    return c->repeat_last > 0 && ((c->repeat_penalty != 0 && c->repeat_penalty != 1) ||
                                  c->presence_penalty != 0 || c->frequency_penalty != 0);
}

/* Products that no compiler may fuse with the sum they go into. */
LTN_BOTH double ltn_times(double a, double b)
{
#ifdef __CUDA_ARCH__
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

LTN_BOTH float ltn_timesf(float a, float b)
{
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

/* The logit of a token that is `count` times, at least once, among the last ones. */
LTN_BOTH float ltn_penalised(float logit, int32_t count, const struct ltn_choice *c)
{
    const double repeat = c->repeat_penalty == 0 ? 1 : c->repeat_penalty;
    const double scaled = logit > 0 ? logit / repeat : ltn_times(logit, repeat);
    return (float)(scaled - c->presence_penalty - ltn_times(count, c->frequency_penalty));
}

enum { LTN_DISTANCE_BITS = 22, LTN_FARTHEST = 40 << LTN_DISTANCE_BITS };
#define LTN_FAR UINT32_MAX /* the token is out */

/* Units of distance for each unit of logit. */
LTN_BOTH double ltn_distance_scale(double temperature)
{
    const double scale = 1.4426950408889634 * (1 << LTN_DISTANCE_BITS) / temperature;
    return scale < 1e300 ? scale : 1e300; /* finite, so that 0 times it is 0 */
}

LTN_BOTH uint32_t ltn_distance(float logit, float largest, double scale)
{
    const double d = ((double)largest - (double)logit) * scale;
    return d <= LTN_FARTHEST ? (uint32_t)d : LTN_FAR;
}

LTN_BOTH uint64_t ltn_token_weight(uint32_t distance)
{
    /* 2^-f on [0, 1] within 1.1e-8: interpolation of (2^-f - 1) / f at the six Chebyshev nodes */
    const uint32_t whole = distance >> LTN_DISTANCE_BITS;
    const float f = (float)(distance & ((1u << LTN_DISTANCE_BITS) - 1)) * 0x1p-22f;
    if (distance == LTN_FAR)
        return 0;
    float p = 0.00011491995f;
    p = ltn_timesf(p, f) + -0.00129163688f;
    p = ltn_timesf(p, f) + 0.00959703519f;
    p = ltn_timesf(p, f) + -0.0554992296f;
    p = ltn_timesf(p, f) + 0.240226091f;
    p = ltn_timesf(p, f) + -0.693147175f;
    p = ltn_timesf(p, f) + 1.0f;
    return ((uint64_t)(uint32_t)(p * 0x1p24f) << 16) >> whole;
}

/* A token's place in an order, unique and ascending: what it is ordered by, then its id. */
LTN_BOTH uint64_t ltn_place(uint32_t key, int32_t id)
{
    return (uint64_t)key << 32 | (uint32_t)id;
}

/* Ascends as the logit descends; 0 and -0 are one. */
LTN_BOTH uint32_t ltn_logit_key(float logit)
{
    uint32_t bits;
    logit = logit + 0.0f;
    memcpy(&bits, &logit, sizeof bits);
    return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

LTN_BOTH uint32_t ltn_nearness_key(uint32_t distance, uint32_t mean)
{
    return distance > mean ? distance - mean : mean - distance;
}

/* The mean of distances by weight: -log p less the entropy is, but for a factor, a token's distance less
 * this. high and low: sums over all tokens of the upper and lower 32 bits of weight * distance. */
LTN_BOTH uint32_t ltn_mean_distance(uint64_t high, uint64_t low, uint64_t total)
{
    return (uint32_t)(((double)high * 0x1p32 + (double)low) / (double)total);
}

/* The least whole weight that is this share of the total, 1 or more. */
LTN_BOTH uint64_t ltn_share_of(double share, uint64_t total)
{
    const double goal = ceil(share * (double)total);
    return goal < 1 ? 1 : goal >= (double)total ? total : (uint64_t)goal;
}

/* Walking up the ids, the token is the first at which the sum of weights passes this. */
LTN_BOTH uint64_t ltn_threshold(double u, uint64_t total)
{
    const uint64_t t = (uint64_t)(u * (double)total);
    return t < total ? t : total - 1;
}

#endif
