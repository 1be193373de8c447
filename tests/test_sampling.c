/* Random draws, the choice of a token, stop strings: each against a plain restatement of its rule. */
#include <setjmp.h>
#include <stdarg.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/ops.h"
#include "src/logprobs.h"
#include "src/rng.h"
#include "src/sampling.h"
#include "src/stop.h"
#include "tests/choices.h"
#include "tests/support.h"
#include "tests/text_model.h"

/* ---- Philox: known answers of the authors' Random123 distribution ------------------------------------- */

static void test_philox(void **state)
{
    static const uint32_t known[][10] = {
        /* counter, key, result */
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e,
         0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb,
         0x5001e420, 0x24126ea1},
    };
    (void)state;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        uint32_t counter[4];
        memcpy(counter, known[i], sizeof counter);
        ltn_philox(counter, known[i][4], known[i][5]);
        assert_memory_equal(counter, known[i] + 6, sizeof counter);
    }
}

static void test_uniform_draws(void **state)
{
    double sum = 0, squares = 0;
    const int n = 200000;
    (void)state;
    for (int i = 0; i < n; i++) {
        double u = ltn_uniform(42, (uint64_t)i);
        assert_true(u >= 0 && u < 1);
        sum += u;
        squares += u * u;
    }
    assert_true(fabs(sum / n - 0.5) < 0.003); /* 4.6 standard errors */
    assert_true(fabs(squares / n - 1.0 / 3) < 0.003);
    assert_true(ltn_uniform(42, 7) == ltn_uniform(42, 7));
    assert_true(ltn_uniform(42, 7) != ltn_uniform(43, 7));
    assert_true(ltn_uniform(42, 7) != ltn_uniform(42, (uint64_t)7 << 32));
    assert_true(ltn_uniform((uint64_t)42 << 32, 7) != ltn_uniform(42, 7));
}

/* ---- sampling against a full sort --------------------------------------------------------------------- */

struct candidate {
    float logit;
    int32_t id;
    double p;
    float distance;
};

static int likelier(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static int lower_id(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    return x->id < y->id ? -1 : 1;
}

static int more_typical(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->distance != y->distance)
        return x->distance < y->distance ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

/* -log p against the entropy, as the paper has it, among the first `kept`; returns how many stay. */
static int32_t plain_typical(struct candidate *c, int32_t kept, double share)
{
    double total = 0, entropy = 0, sum = 0;
    int32_t n = 0;
    for (int32_t i = 0; i < kept; i++)
        total += c[i].p;
    for (int32_t i = 0; i < kept; i++)
        if (c[i].p > 0)
            entropy -= c[i].p / total * log(c[i].p / total);
    for (int32_t i = 0; i < kept; i++)
        c[i].distance = c[i].p > 0 ? (float)fabs(-log(c[i].p / total) - entropy) : INFINITY;
    qsort(c, (size_t)kept, sizeof *c, more_typical);
    do
        sum += c[n++].p;
    while (n < kept && sum < share * total);
    qsort(c, (size_t)n, sizeof *c, likelier);
    return n;
}

static float plain_penalty(float logit, int32_t id, const struct ltn_sampling *s, const int32_t *recent,
                           int32_t n_recent)
{
    int count = 0;
    for (int32_t i = 0; i < n_recent; i++)
        count += recent[i] == id;
    if (count > 0) {
        double l = logit;
        l = l > 0 ? l / s->repeat_penalty : l * s->repeat_penalty;
        logit = (float)(l - s->presence_penalty - count * s->frequency_penalty);
    }
    for (size_t i = 0; i < s->n_bias; i++)
        if (s->bias[i].id == id)
            logit += s->bias[i].value;
    return logit;
}

/* The order: penalties, bias, temperature, top-k, typical, top-p, min-p; then a walk up the ids. */
static int32_t plain_sample(const float *logits, int32_t n, const struct ltn_sampling *s,
                            const int32_t *recent, int32_t n_recent, double u)
{
    struct candidate *c = calloc((size_t)n, sizeof *c);
    assert_non_null(c);
    for (int32_t i = 0; i < n; i++)
        c[i] = (struct candidate){.logit = plain_penalty(logits[i], i, s, recent, n_recent), .id = i};
    qsort(c, (size_t)n, sizeof *c, likelier);
    if (s->temperature == 0) {
        int32_t id = c[0].id;
        free(c);
        return id;
    }
    for (int32_t i = 0; i < n; i++)
        c[i].p = exp(((double)c[i].logit - c[0].logit) / s->temperature);
    int32_t kept = s->top_k > 0 && s->top_k < n ? s->top_k : n;
    if (s->typical > 0 && s->typical < 1)
        kept = plain_typical(c, kept, s->typical);
    double total = 0, sum = 0;
    for (int32_t i = 0; i < kept; i++)
        total += c[i].p;
    if (s->top_p < 1) {
        int32_t i = 0;
        do
            sum += c[i++].p;
        while (i < kept && sum < s->top_p * total);
        kept = i;
    }
    while (kept > 1 && c[kept - 1].p < s->min_p * c[0].p)
        kept--;
    qsort(c, (size_t)kept, sizeof *c, lower_id);
    total = sum = 0;
    for (int32_t i = 0; i < kept; i++)
        total += c[i].p;
    int32_t id = c[kept - 1].id;
    for (int32_t i = 0; i < kept; i++) {
        sum += c[i].p;
        if (sum > u * total) {
            id = c[i].id;
            break;
        }
    }
    free(c);
    return id;
}

static void random_logits(struct test_rng *rng, float *logits, int32_t n)
{
    int kind = test_below(rng, 4);
    for (int32_t i = 0; i < n; i++) {
        logits[i] = (float)(4 * test_normal(rng));
        if (kind == 1)
            logits[i] = roundf(logits[i]); /* many ties */
        if (kind == 2 && test_below(rng, 3) == 0)
            logits[i] = -INFINITY;
        if (kind == 3)
            logits[i] = 1.25f; /* nothing but ties */
    }
    if (kind == 2)
        logits[test_below(rng, n)] = 1;
}

static void test_sample_against_sort(void **state)
{
    static const int32_t sizes[] = {1, 2, 3, 17, 360, 5000};
    static const double temperatures[] = {0, 0.01, 0.8, 1, 3};
    static const double shares[] = {0, 0.1, 0.5, 0.95, 0.999, 1};
    struct test_rng rng = {11};
    (void)state;
    for (int round = 0; round < 4000; round++) {
        int32_t n = sizes[test_below(&rng, 6)], id, recent[40];
        struct ltn_logit_bias bias[3];
        struct ltn_sampler sampler;
        float *logits = malloc((size_t)n * sizeof *logits);
        assert_non_null(logits);
        assert_int_equal(ltn_sampler_create(&sampler, n, NULL), LTN_OK);
        random_logits(&rng, logits, n);
        for (int i = 0; i < 40; i++)
            recent[i] = test_below(&rng, test_below(&rng, 2) && n > 5 ? 5 : n);
        for (int i = 0; i < 3; i++)
            bias[i] = (struct ltn_logit_bias){test_below(&rng, n), (float)(3 * test_normal(&rng))};
        const bool penalties = test_below(&rng, 2);
        struct ltn_sampling s = {.temperature = temperatures[test_below(&rng, 5)],
                                 .top_k = test_below(&rng, 2) ? test_below(&rng, 60) : 0,
                                 .top_p = shares[test_below(&rng, 6)],
                                 .min_p = test_below(&rng, 2) ? 0.1 : 0,
                                 .repeat_last = 40,
                                 .repeat_penalty = penalties ? 0.5 + 2 * test_uniform(&rng) : 1,
                                 .presence_penalty = penalties ? test_normal(&rng) : 0,
                                 .frequency_penalty = penalties ? test_normal(&rng) : 0,
                                 .bias = bias,
                                 .n_bias = (size_t)test_below(&rng, 4)};
        int32_t n_recent = penalties ? test_below(&rng, 41) : 0;
        double u = test_uniform(&rng);
        assert_int_equal(ltn_sample(&sampler, logits, &s, recent, n_recent, u, &id, NULL), LTN_OK);
        int32_t expected = plain_sample(logits, n, &s, recent, n_recent, u);
        if (id != expected)
            fail_msg("n %d, temperature %g, top_k %d, top_p %g, min_p %g, u %.17g: got %d, expected %d", n,
                     s.temperature, s.top_k, s.top_p, s.min_p, u, id, expected);
        assert_true(logits[id] != -INFINITY);
        ltn_sampler_free(&sampler);
        free(logits);
    }
}

/* The operation of the plain backend chooses the same, from the same draws, to the last id. */
static void test_sample_against_operation(void **state)
{
    static const int32_t sizes[] = {1, 2, 17, 360, 5003};
    struct test_rng rng = {13};
    struct ltn_backend *be;
    (void)state;
    assert_int_equal(ltn_reference_open(&be, NULL), LTN_OK);
    for (int round = 0; round < 3000; round++) {
        const int32_t n = sizes[test_below(&rng, 5)];
        float *logits = malloc(3 * (size_t)n * sizeof *logits);
        struct ltn_bias bias[TEST_BIASES];
        struct ltn_logit_bias same[TEST_BIASES];
        int32_t n_bias, id, log = 0, found, recent[LTN_RECENT_IDS], n_recent = 0;
        int64_t steps = 7;
        struct ltn_sampler sampler;
        assert_non_null(logits);
        assert_int_equal(ltn_sampler_create(&sampler, n, NULL), LTN_OK);
        test_logits(&rng, logits, n);
        struct ltn_choice choice = test_choice(&rng, n, bias, &n_bias);
        struct ltn_draws draws = test_draws(&rng, n);
        const struct ltn_draws before = draws;
        choice.bias = bias;
        choice.n_bias = n_bias;
        for (int i = 0; i < n_bias; i++)
            same[i] = (struct ltn_logit_bias){bias[i].id, bias[i].value};
        const struct ltn_sampling s = {.temperature = choice.temperature,
                                       .top_k = choice.top_k,
                                       .top_p = choice.top_p,
                                       .min_p = choice.min_p,
                                       .typical = choice.typical,
                                       .repeat_last = choice.repeat_last,
                                       .repeat_penalty = choice.repeat_penalty,
                                       .presence_penalty = choice.presence_penalty,
                                       .frequency_penalty = choice.frequency_penalty,
                                       .bias = same,
                                       .n_bias = (size_t)n_bias};
        for (; n_recent < s.repeat_last && n_recent < before.position; n_recent++)
            recent[n_recent] = before.recent[(before.position - 1 - n_recent) % LTN_RECENT_IDS];
        assert_int_equal(
            be->ops->sample(be, &id, logits, 1, n, &choice, &draws, logits + n, &steps, &log, 1, NULL),
            LTN_OK);
        assert_int_equal(id, log < 0 ? 0 : log);
        assert_int_equal(steps, 8);
        assert_int_equal(draws.position, before.position + 1);
        assert_int_equal(draws.draw, before.draw + 1);
        assert_int_equal(draws.recent[before.position % LTN_RECENT_IDS], id);
        enum ltn_status status = ltn_sample(&sampler, logits, &s, recent, n_recent,
                                            ltn_uniform(before.seed, before.draw), &found, NULL);
        assert_int_equal(status, log < 0 ? LTN_ERR_INPUT : LTN_OK);
        if (log >= 0)
            assert_int_equal(found, id);
        ltn_sampler_free(&sampler);
        free(logits);
    }
    be->ops->close(be);
}

/* The paper's formula and ours differ in rounding, so ties and near ties must not count: distances are drawn
 * such that the nearest two are told apart by far more. */
static void test_typical_against_sort(void **state)
{
    static const double shares[] = {0.001, 0.2, 0.5, 0.9, 0.999};
    struct test_rng rng = {12};
    int below_the_top = 0;
    (void)state;
    for (int round = 0; round < 3000; round++) {
        int32_t n = 2 + test_below(&rng, 60), id;
        struct ltn_sampler sampler;
        float logits[64];
        assert_int_equal(ltn_sampler_create(&sampler, n, NULL), LTN_OK);
        for (int32_t i = 0; i < n; i++)
            logits[i] = (float)(3 * test_normal(&rng));
        const struct ltn_sampling s = {.temperature = 0.3 + test_uniform(&rng),
                                       .top_k = test_below(&rng, 2) ? 1 + test_below(&rng, 60) : 0,
                                       .typical = shares[test_below(&rng, 5)],
                                       .top_p = test_below(&rng, 2) ? 0.7 : 1,
                                       .min_p = test_below(&rng, 2) ? 0.2 : 0};
        double u = test_uniform(&rng);
        assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, u, &id, NULL), LTN_OK);
        assert_int_equal(id, plain_sample(logits, n, &s, NULL, 0, u));
        for (int32_t i = 0; i < n; i++)
            if (logits[i] > logits[id]) {
                below_the_top++;
                break;
            }
        ltn_sampler_free(&sampler);
    }
    assert_true(below_the_top > 500);
}

/* By hand: p = 0.5, 0.25, 0.125, 0.125 has the entropy 1.75 bits; their surprisals are 1, 2, 3, 3 bits. */
static void test_typical_by_hand(void **state)
{
    const float logits[] = {-0.6931472f, -2.0794415f, -1.3862944f, -2.0794415f}; /* ids 0, 2, then 1 and 3 */
    static const struct {
        double typical, u;
        int32_t id;
    } cases[] = {
        {0.01, 0.999, 2},                 /* 2 bits is nearest; */
        {0.24, 0.0, 2},   {0.26, 0.0, 0}, /* then 1 bit: 0 and 2 share 2 : 1, in the order of ids */
        {0.74, 0.66, 0},  {0.74, 0.67, 2},  {0.76, 0.999, 2}, /* then 3 bits, the lower id first: 0, 1, 2 */
        {0.76, 0.58, 1},  {0.88, 0.999, 3}, {1, 0.999, 3},    {0, 0.999, 3},
    };
    struct ltn_sampler sampler;
    (void)state;
    assert_int_equal(ltn_sampler_create(&sampler, 4, NULL), LTN_OK);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct ltn_sampling s = {.temperature = 1, .top_p = 1, .typical = cases[i].typical};
        int32_t id;
        assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, cases[i].u, &id, NULL), LTN_OK);
        assert_int_equal(id, cases[i].id);
    }
    ltn_sampler_free(&sampler);
}

/* What penalties and bias make of greedy choices, by hand. */
static void test_penalties_by_hand(void **state)
{
    const float logits[] = {4, 3.5f, -1, 3};
    static const struct ltn_logit_bias ban[] = {{0, -INFINITY}}, lift[] = {{2, 3}, {2, 2.5f}},
                                       all[] = {{0, -INFINITY},
                                                {1, -INFINITY},
                                                {2, -INFINITY},
                                                {3, -INFINITY}},
                                       beyond[] = {{4, 1}};
    const int32_t recent[] = {0, 1, 0};
    struct ltn_sampling plain = {.repeat_last = 3, .top_p = 1}, s;
    struct ltn_sampler sampler;
    struct ltn_error err;
    int32_t id;
    (void)state;
#define PICKS(expected, ...)                                                                                 \
    do {                                                                                                     \
        s = plain;                                                                                           \
        __VA_ARGS__;                                                                                         \
        assert_int_equal(ltn_sample(&sampler, logits, &s, recent, 3, 0, &id, NULL), LTN_OK);                 \
        assert_int_equal(id, expected);                                                                      \
    } while (0)
    assert_int_equal(ltn_sampler_create(&sampler, 4, NULL), LTN_OK);
    PICKS(0, (void)0);
    PICKS(0, s.repeat_penalty = 1);
    PICKS(0, s.repeat_penalty = 1.3);    /* 3.08, 2.69 against 3 */
    PICKS(3, s.repeat_penalty = 1.4);    /* 2.86, 2.5 */
    PICKS(0, s.presence_penalty = 0.9);  /* 3.1, 2.6 */
    PICKS(3, s.presence_penalty = 1.1);  /* 2.9, 2.4 */
    PICKS(0, s.frequency_penalty = 0.4); /* 3.2, 3.1 */
    PICKS(0, s.presence_penalty = 0.6);  /* 3.4, 2.9 */
    PICKS(3, s.frequency_penalty = 0.6); /* 2.8, 2.9: the first is there twice */
    PICKS(1, s.presence_penalty = -0.1, s.frequency_penalty = 0.6, s.repeat_penalty = 0.9); /* 3.344, 3.389 */
    PICKS(0, s.repeat_penalty = 1.4, s.repeat_last = 0); /* looks at none */
    PICKS(1, s.bias = ban, s.n_bias = 1);
    PICKS(2, s.bias = lift, s.n_bias = 2); /* -1 + 5.5 */
    PICKS(0, s.bias = lift, s.n_bias = 1);
    const int32_t negative[] = {2, 2};
    s = plain, s.repeat_penalty = 2, s.temperature = 1; /* a negative logit is multiplied: -2 */
    const double p = exp(-2), total = exp(4) + exp(3.5) + exp(3) + p;
    assert_int_equal(
        ltn_sample(&sampler, logits, &s, negative, 2, (total - exp(3) - p * 0.99) / total, &id, NULL),
        LTN_OK);
    assert_int_equal(id, 2);
    assert_int_equal(
        ltn_sample(&sampler, logits, &s, negative, 2, (total - exp(3) - p * 1.01) / total, &id, NULL),
        LTN_OK);
    assert_int_equal(id, 1);
    assert_int_equal(logits[0], 4); /* those of the model stay */

    s = plain, s.bias = all, s.n_bias = 4;
    assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, 0, &id, &err), LTN_ERR_INPUT);
    s = plain, s.bias = beyond, s.n_bias = 1;
    assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, 0, &id, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "bias: expected an id from 0 to 3, found 4"));
    ltn_sampler_free(&sampler);
}
#undef PICKS

static void test_distribution(void **state)
{
    enum { N = 8, DRAWS = 200000 };
    const float logits[N] = {0, 1, 2, -1, 0.5f, -3, 1.5f, 2};
    const struct ltn_sampling s = {.temperature = 1.3, .top_p = 1};
    struct ltn_sampler sampler;
    double p[N], total = 0, chi = 0;
    int count[N] = {0};
    (void)state;
    assert_int_equal(ltn_sampler_create(&sampler, N, NULL), LTN_OK);
    for (int i = 0; i < N; i++)
        total += p[i] = exp(logits[i] / 1.3);
    for (int i = 0; i < DRAWS; i++) {
        int32_t id;
        assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, ltn_uniform(3, (uint64_t)i), &id, NULL),
                         LTN_OK);
        count[id]++;
    }
    for (int i = 0; i < N; i++) {
        double expected = DRAWS * p[i] / total;
        chi += (count[i] - expected) * (count[i] - expected) / expected;
    }
    assert_true(chi < 24.3); /* 7 degrees of freedom: exceeded once in a thousand seeds */
    ltn_sampler_free(&sampler);
}

static void test_greedy_takes_lowest_id(void **state)
{
    const float logits[] = {1, 5, 5, 5, 2};
    const struct ltn_sampling s = {.top_p = 1};
    struct ltn_sampler sampler;
    int32_t id;
    (void)state;
    assert_int_equal(ltn_sampler_create(&sampler, 5, NULL), LTN_OK);
    assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, 0.999, &id, NULL), LTN_OK);
    assert_int_equal(id, 1);
    ltn_sampler_free(&sampler);
}

/* Wherever among many logits the largest lies, and what no choice can be made from. */
static void test_greedy_far_from_the_first(void **state)
{
    enum { N = 1000 };
    static const int32_t at[] = {0, 1, 255, 256, 257, 511, 767, 768, 998, 999};
    const struct ltn_sampling s = {.top_p = 1};
    struct ltn_sampler sampler;
    struct ltn_error err;
    float logits[N];
    int32_t id;
    (void)state;
    assert_int_equal(ltn_sampler_create(&sampler, N, NULL), LTN_OK);
    for (size_t k = 0; k < sizeof at / sizeof *at; k++) {
        const int32_t i = at[k];
        char text[64];
        for (int32_t j = 0; j < N; j++)
            logits[j] = j % 3 ? -INFINITY : -2 - (float)j;
        logits[i] = logits[(i + N - 1) / 2] = logits[N - 1] = -1;
        assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, 0, &id, &err), LTN_OK);
        assert_int_equal(id, i < (i + N - 1) / 2 ? i : (i + N - 1) / 2);
        logits[i] = k % 2 ? NAN : -NAN;
        assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, 0, &id, &err), LTN_ERR_INPUT);
        snprintf(text, sizeof text, "for token %d", i);
        assert_non_null(strstr(err.text, text));
        logits[i] = INFINITY;
        assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, 0, &id, &err), LTN_ERR_INPUT);
        assert_non_null(strstr(err.text, text));
        for (int32_t j = 0; j < N; j++)
            logits[j] = -INFINITY;
        assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, 0, &id, &err), LTN_ERR_INPUT);
        assert_non_null(strstr(err.text, "-infinity"));
        logits[i] = -3;
        assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, 0, &id, &err), LTN_OK);
        assert_int_equal(id, i);
    }
    ltn_sampler_free(&sampler);
}

static void test_bad_logits_and_parameters(void **state)
{
    struct ltn_sampling s = ltn_sampling_default;
    float logits[] = {1, 2, NAN, 4};
    struct ltn_sampler sampler;
    struct ltn_error err;
    int32_t id;
    (void)state;
    assert_int_equal(ltn_sampler_create(&sampler, 4, NULL), LTN_OK);
    assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, 0.5, &id, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "nan for token 2"));
    logits[2] = INFINITY;
    assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, 0.5, &id, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "inf for token 2"));
    for (int i = 0; i < 4; i++)
        logits[i] = -INFINITY;
    assert_int_equal(ltn_sample(&sampler, logits, &s, NULL, 0, 0.5, &id, &err), LTN_ERR_INPUT);

    static const struct ltn_logit_bias not_a_number[] = {{1, NAN}}, infinite[] = {{1, INFINITY}};
    const struct ltn_sampling bad[] = {{.temperature = -1, .top_p = 1},
                                       {.temperature = NAN, .top_p = 1},
                                       {.temperature = INFINITY, .top_p = 1},
                                       {.top_k = -1, .top_p = 1},
                                       {.top_p = 1.1},
                                       {.top_p = -0.1},
                                       {.top_p = NAN},
                                       {.top_p = 1, .min_p = -0.1},
                                       {.top_p = 1, .min_p = 1.1},
                                       {.top_p = 1, .typical = -0.1},
                                       {.top_p = 1, .typical = 1.1},
                                       {.top_p = 1, .typical = NAN},
                                       {.top_p = 1, .repeat_last = -1},
                                       {.top_p = 1, .repeat_last = LTN_MAX_REPEAT_LAST + 1},
                                       {.top_p = 1, .repeat_penalty = -1},
                                       {.top_p = 1, .repeat_penalty = INFINITY},
                                       {.top_p = 1, .presence_penalty = NAN},
                                       {.top_p = 1, .frequency_penalty = INFINITY},
                                       {.top_p = 1, .bias = not_a_number, .n_bias = 1},
                                       {.top_p = 1, .bias = infinite, .n_bias = 1}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(ltn_sampling_check(&bad[i], 4, &err), LTN_ERR_INPUT);
    ltn_sampler_free(&sampler);
}

/* ---- log-probabilities ---- */

static void test_logprobs(void **state)
{
    struct test_rng rng = {13};
    (void)state;
    for (int round = 0; round < 500; round++) {
        int32_t n = 1 + test_below(&rng, 300), n_top = test_below(&rng, n < 20 ? n + 1 : 20);
        struct ltn_logprob top[20];
        struct candidate c[300];
        float logits[300];
        double total = 0;
        random_logits(&rng, logits, n);
        for (int32_t i = 0; i < n; i++) {
            c[i] = (struct candidate){.logit = logits[i], .id = i};
            total += exp(logits[i]);
        }
        qsort(c, (size_t)n, sizeof *c, likelier);
        int32_t id = test_below(&rng, n);
        double logprob = ltn_logprobs(logits, n, id, top, n_top);
        if (logits[id] == -INFINITY)
            assert_true(logprob == -INFINITY);
        else
            assert_true(fabs(logprob - log(exp(logits[id]) / total)) < 1e-9);
        for (int32_t i = 0; i < n_top; i++) {
            assert_int_equal(top[i].id, c[i].id);
            assert_true(top[i].logprob == ltn_logprobs(logits, n, c[i].id, NULL, 0));
        }
    }
    const float large[] = {1e6f, 1e6f, -1e6f}; /* their exponentials overflow */
    assert_true(fabs(ltn_logprobs(large, 3, 1, NULL, 0) + log(2)) < 1e-8);
}

/* ---- stop strings ------------------------------------------------------------------------------------- */

/* Where the text ends by the rule: at the first byte at which a stop string is complete, less the longest
 * complete there. -1: nowhere. */
static long plain_stop(const char *text, size_t bytes, const char *const *stop, size_t n)
{
    for (size_t end = 1; end <= bytes; end++) {
        size_t longest = 0;
        for (size_t i = 0; i < n; i++) {
            size_t length = strlen(stop[i]);
            if (length <= end && length > longest && memcmp(text + end - length, stop[i], length) == 0)
                longest = length;
        }
        if (longest)
            return (long)(end - longest);
    }
    return -1;
}

static void random_word(struct test_rng *rng, char *word, int length)
{
    for (int i = 0; i < length; i++)
        word[i] = "abc"[test_below(rng, 3)];
    word[length] = 0;
}

static void test_stop_strings(void **state)
{
    struct test_rng rng = {7};
    int found_some = 0, found_none = 0;
    (void)state;
    for (int round = 0; round < 5000; round++) {
        char words[3][8], text[64], got[64];
        const char *stop[3];
        size_t n = 1 + (size_t)test_below(&rng, 3), bytes = (size_t)test_below(&rng, 60), n_got = 0;
        for (size_t i = 0; i < n; i++) {
            random_word(&rng, words[i], 2 + test_below(&rng, 5));
            stop[i] = words[i];
        }
        random_word(&rng, text, (int)bytes);
        long expected = plain_stop(text, bytes, stop, n);
        struct ltn_stopper s;
        bool found = false;
        const char *out;
        size_t out_bytes;
        assert_int_equal(ltn_stopper_create(&s, stop, n, NULL), LTN_OK);
        for (size_t at = 0; at < bytes && !found;) {
            size_t piece = (size_t)test_below(&rng, 9);
            if (piece > bytes - at)
                piece = bytes - at;
            assert_int_equal(ltn_stopper_push(&s, text + at, piece, &out, &out_bytes, &found, NULL), LTN_OK);
            memcpy(got + n_got, out, out_bytes);
            n_got += out_bytes;
            at += piece;
            if (!found) /* what is held back could still become a stop string, and no more than that */
                assert_true(s.held_bytes - s.release < 6);
        }
        if (!found) {
            ltn_stopper_finish(&s, &out, &out_bytes);
            memcpy(got + n_got, out, out_bytes);
            n_got += out_bytes;
        }
        assert_int_equal(found, expected >= 0);
        assert_int_equal(n_got, found ? (size_t)expected : bytes);
        assert_memory_equal(got, text, n_got);
        found ? found_some++ : found_none++;
        ltn_stopper_free(&s);
    }
    assert_true(found_some > 500 && found_none > 500);
}

static void test_empty_stop_string(void **state)
{
    const char *stop[] = {"x", ""};
    struct ltn_stopper s;
    struct ltn_error err;
    (void)state;
    assert_int_equal(ltn_stopper_create(&s, stop, 2, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "stop string 2"));
}

/* ---- in a session ------------------------------------------------------------------------------------- */

enum { N_TOKENS = 1500, V = 360 };

struct history {
    int32_t ids[N_TOKENS];
    int32_t n;
};

/* Every choice of a session is the one that its logits, its last tokens and its draws call for, also in a
 * copy and after an export; the window reaches back into the prompt and is never longer than asked for. */
static void test_session_penalties(void **state)
{
    static const int32_t windows[] = {0, 1, 2, 63, 64, 65, 1000, LTN_MAX_REPEAT_LAST};
    static const struct ltn_logit_bias bias[] = {{17, -INFINITY}, {5, 1.5f}};
    static struct history h;
    struct test_rng rng = {14};
    struct ltn_engine *engine;
    struct ltn_session *session, *other;
    struct ltn_error err;
    char path[512];
    (void)state;
    snprintf(path, sizeof path, "%s/tokens.ltn", test_folder());
    test_write_token_model(path, 1, 2);
    const struct ltn_engine_options options = {.device = "cpu", .n_threads = 1};
    assert_int_equal(ltn_engine_open(&engine, path, &options, &err), LTN_OK);
    assert_int_equal(ltn_session_create(&session, engine, NULL, &err), LTN_OK);
    assert_int_equal(ltn_session_create(&other, engine, NULL, &err), LTN_OK);
    size_t bytes = ltn_engine_info(engine)->session_bytes;
    void *exported = malloc(bytes);
    assert_non_null(exported);
    ltn_session_seed(session, 9);
    h.n = 0;
    for (uint64_t draw = 0; h.n < N_TOKENS; draw++) {
        for (int i = test_below(&rng, 8) ? 1 : test_below(&rng, 100); i > 0 && h.n < N_TOKENS; i--) {
            h.ids[h.n] = test_below(&rng, 30); /* fed by us; often the same ones */
            assert_int_equal(ltn_session_feed(session, &h.ids[h.n++], 1, &err), LTN_OK);
        }
        if (test_below(&rng, 20) == 0) { /* to go on elsewhere is to go on */
            struct ltn_session *swap = session;
            if (test_below(&rng, 2)) {
                assert_int_equal(ltn_session_copy(other, session, &err), LTN_OK);
            } else {
                assert_int_equal(ltn_session_export(session, exported, bytes, &err), LTN_OK);
                assert_int_equal(ltn_session_import(other, exported, bytes, &err), LTN_OK);
            }
            session = other;
            other = swap;
        }
        const struct ltn_sampling s = {.temperature = test_below(&rng, 2) ? 0.8 : 0,
                                       .top_p = 0.95,
                                       .repeat_last = windows[test_below(&rng, 8)],
                                       .repeat_penalty = 1.5,
                                       .presence_penalty = 0.4,
                                       .frequency_penalty = 0.3,
                                       .bias = bias,
                                       .n_bias = 2};
        const int32_t n_recent = s.repeat_last < h.n ? s.repeat_last : h.n;
        const float *logits;
        int32_t id;
        assert_int_equal(ltn_session_logits(session, &logits, &err), LTN_OK);
        const int32_t expected =
            plain_sample(logits, V, &s, h.ids + h.n - n_recent, n_recent, ltn_uniform(9, draw));
        assert_int_equal(ltn_session_sample(session, &s, &id, &err), LTN_OK);
        assert_int_equal(id, expected);
        assert_true(id != 17);
        if (h.n < N_TOKENS) {
            h.ids[h.n++] = id;
            assert_int_equal(ltn_session_feed(session, &id, 1, &err), LTN_OK);
        }
    }
    int32_t id;
    const struct ltn_sampling bad = {.top_p = 1, .repeat_penalty = 2, .repeat_last = LTN_MAX_REPEAT_LAST + 1};
    assert_int_equal(ltn_session_sample(session, &bad, &id, &err), LTN_ERR_INPUT);
    free(exported);
    ltn_session_free(session);
    ltn_session_free(other);
    ltn_engine_close(engine);
}

struct trace {
    int32_t ids[64], drawn[64];
    int32_t n, n_drawn;
    double sum;
};

static enum ltn_status note_piece(void *ctx, int32_t id, const char *text, size_t bytes,
                                  struct ltn_error *err)
{
    struct trace *t = ctx;
    (void)text, (void)bytes, (void)err;
    if (id >= 0)
        t->ids[t->n++] = id;
    return LTN_OK;
}

static enum ltn_status note_drawn(void *ctx, int32_t id, const float *logits, struct ltn_error *err)
{
    struct trace *t = ctx;
    (void)err;
    assert_int_equal(t->n, t->n_drawn); /* before its piece */
    t->drawn[t->n_drawn++] = id;
    t->sum += ltn_logprobs(logits, V, id, NULL, 0);
    return LTN_OK;
}

/* Forks draw from numbers of their own, and `drawn` sees the logits of the model. */
static void test_forks(void **state)
{
    static const struct ltn_logit_bias bias[] = {{7, 2}};
    const struct ltn_sampling sampling = {.temperature = 1, .top_p = 1, .bias = bias, .n_bias = 1};
    const int32_t prompt[] = {5, 17, 9};
    struct ltn_session *session, *fork;
    struct trace t[3] = {0};
    struct ltn_engine *engine;
    struct ltn_error err;
    char path[512];
    (void)state;
    snprintf(path, sizeof path, "%s/forks.ltn", test_folder());
    test_write_token_model(path, 1, -1);
    const struct ltn_engine_options options = {.device = "cpu", .n_threads = 1};
    assert_int_equal(ltn_engine_open(&engine, path, &options, &err), LTN_OK);
    assert_int_equal(ltn_session_create(&session, engine, NULL, &err), LTN_OK);
    assert_int_equal(ltn_session_create(&fork, engine, NULL, &err), LTN_OK);
    ltn_session_seed(session, 21);
    assert_int_equal(ltn_session_feed(session, prompt, 3, &err), LTN_OK);
    for (int k = 0; k < 2; k++) { /* forks go on from these draws */
        int32_t id;
        assert_int_equal(ltn_session_sample(session, &sampling, &id, &err), LTN_OK);
    }
    for (uint64_t i = 0; i < 3; i++) {
        const struct ltn_generate_options o = {
            .sampling = &sampling, .max_tokens = 64, .piece = note_piece, .drawn = note_drawn, .ctx = &t[i]};
        assert_int_equal(ltn_session_copy(fork, session, &err), LTN_OK);
        ltn_session_skip(fork, i * LTN_FORK_DRAWS);
        assert_int_equal(ltn_generate(fork, &o, NULL, &err), LTN_OK);
        assert_int_equal(t[i].n, 64);
        assert_memory_equal(t[i].ids, t[i].drawn, sizeof t[i].ids);

        double sum = 0; /* token by token, by hand */
        assert_int_equal(ltn_session_copy(fork, session, &err), LTN_OK);
        for (uint64_t k = 0; k < 64; k++) {
            const float *logits;
            assert_int_equal(ltn_session_logits(fork, &logits, &err), LTN_OK);
            int32_t id =
                plain_sample(logits, V, &sampling, NULL, 0, ltn_uniform(21, 2 + i * LTN_FORK_DRAWS + k));
            assert_int_equal(id, t[i].ids[k]);
            sum += ltn_logprobs(logits, V, id, NULL, 0);
            assert_int_equal(ltn_session_feed(fork, &id, 1, &err), LTN_OK);
        }
        assert_true(sum == t[i].sum);
    }
    assert_memory_not_equal(t[0].ids, t[1].ids, sizeof t[0].ids);
    assert_memory_not_equal(t[1].ids, t[2].ids, sizeof t[0].ids);
    ltn_session_free(fork);
    ltn_session_free(session);
    ltn_engine_close(engine);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_philox),
        cmocka_unit_test(test_uniform_draws),
        cmocka_unit_test(test_sample_against_sort),
        cmocka_unit_test(test_sample_against_operation),
        cmocka_unit_test(test_typical_against_sort),
        cmocka_unit_test(test_typical_by_hand),
        cmocka_unit_test(test_penalties_by_hand),
        cmocka_unit_test(test_distribution),
        cmocka_unit_test(test_greedy_takes_lowest_id),
        cmocka_unit_test(test_greedy_far_from_the_first),
        cmocka_unit_test(test_bad_logits_and_parameters),
        cmocka_unit_test(test_logprobs),
        cmocka_unit_test(test_session_penalties),
        cmocka_unit_test(test_forks),
        cmocka_unit_test(test_stop_strings),
        cmocka_unit_test(test_empty_stop_string),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
