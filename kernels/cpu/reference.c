/* The plain reference: one loop per formula, no threads, no blocks. Values are stored in f32; within an
 * operation everything is double, so that its error is the last rounding alone. */
#include "kernels/cpu/memory.h"
#include "kernels/ops.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void reference_close(struct ltn_backend *be)
{
    free(be);
}

static enum ltn_status reference_embed(struct ltn_backend *be, float *x, const struct ltn_matrix *table,
                                       const int32_t *ids, int32_t rows, float scale, struct ltn_error *err)
{
    (void)be, (void)err;
    size_t cols = (size_t)table->cols;
    for (int32_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            x[r * cols + c] =
                scale * ltn_weight(table->data, table->scales, table->dtype, cols, (size_t)ids[r], c);
    return LTN_OK;
}

/* y = gate * Norm(x) of one row; gate may be NULL. */
static void norm_row(float *y, const float *x, const float *gate, const struct ltn_norm *norm, int32_t cols)
{
    double mean = 0, sum = 0;
    if (norm->weight) {
        for (int32_t c = 0; c < cols; c++)
            mean += x[c];
        mean /= cols;
    }
    for (int32_t c = 0; c < cols; c++)
        sum += (x[c] - mean) * (x[c] - mean);
    double rms = sqrt(sum / cols + (norm->weight ? 1e-5 : 1e-6));
    for (int32_t c = 0; c < cols; c++) {
        double value = (x[c] - mean) / rms;
        if (norm->weight)
            value = value * norm->weight[c] + norm->bias[c];
        y[c] = (float)(gate ? gate[c] * value : value);
    }
}

static enum ltn_status reference_norm(struct ltn_backend *be, void *y, const float *x,
                                      const struct ltn_norm *norm, int32_t rows, int32_t cols,
                                      struct ltn_error *err)
{
    (void)be, (void)err;
    for (size_t r = 0; r < (size_t)rows; r++)
        norm_row((float *)y + r * cols, x + r * cols, NULL, norm, cols);
    return LTN_OK;
}

static enum ltn_status reference_gated_norm(struct ltn_backend *be, void *y, const void *o, const void *gate,
                                            int32_t ld_gate, const struct ltn_norm *norm, int32_t rows,
                                            int32_t cols, struct ltn_error *err)
{
    (void)be, (void)err;
    for (size_t r = 0; r < (size_t)rows; r++)
        norm_row((float *)y + r * cols, (const float *)o + r * cols, (const float *)gate + r * ld_gate, norm,
                 cols);
    return LTN_OK;
}

/* y[r, o] = (add ? y[r, o] : 0) + sum_c x[r, c] W[o, c] + bias[o] */
static void matmul(float *y, const float *x, const struct ltn_matrix *w, const float *bias, int32_t rows,
                   bool add)
{
    size_t outs = (size_t)w->rows, cols = (size_t)w->cols;
    for (size_t r = 0; r < (size_t)rows; r++) {
        for (size_t o = 0; o < outs; o++) {
            double sum = add ? y[r * outs + o] : 0;
            for (size_t c = 0; c < cols; c++)
                sum += (double)x[r * cols + c] * ltn_weight(w->data, w->scales, w->dtype, cols, o, c);
            y[r * outs + o] = (float)(sum + (bias ? bias[o] : 0));
        }
    }
}

static enum ltn_status reference_linear(struct ltn_backend *be, void *y, const void *x,
                                        const struct ltn_linear *l, int32_t rows, struct ltn_error *err)
{
    (void)be, (void)err;
    matmul(y, x, &l->w, l->bias, rows, false);
    return LTN_OK;
}

static enum ltn_status reference_linear_add(struct ltn_backend *be, float *x, const void *y,
                                            const struct ltn_linear *l, int32_t rows, struct ltn_error *err)
{
    (void)be, (void)err;
    matmul(x, y, &l->w, l->bias, rows, true);
    return LTN_OK;
}

static enum ltn_status reference_logits(struct ltn_backend *be, float *out, const void *y,
                                        const struct ltn_matrix *w, int32_t rows, struct ltn_error *err)
{
    (void)be, (void)err;
    matmul(out, y, w, NULL, rows, false);
    return LTN_OK;
}

static double activate(double x, enum ltn_act act, double max)
{
    switch (act) {
    case LTN_ACT_SILU:
        return x / (1 + exp(-x));
    case LTN_ACT_GELU:
        return x * erfc(-x * M_SQRT1_2) / 2;
    case LTN_ACT_RELU:
        return x > 0 ? x : 0;
    case LTN_ACT_ELU:
        return x > 0 ? x : expm1(x);
    case LTN_ACT_SIGMOID:
        return 1 / (1 + exp(-x));
    case LTN_ACT_EXP:
        return exp(x - max);
    case LTN_ACT_LEAK:
        return x > 0 ? x : 0.01 * x;
    case LTN_ACT_ELU_ADD1:
        return x > 0 ? 1 + x : exp(x);
    case LTN_ACT_ELU_ADD2:
        return x > 0 ? 2 + x : 1 + exp(x);
    case LTN_ACT_SINE:
        return sin(x);
    case LTN_ACT_NONE:
        break;
    }
    return x;
}

static enum ltn_status reference_activation(struct ltn_backend *be, void *x, int32_t ld, int32_t rows,
                                            int32_t cols, int32_t group, enum ltn_act act,
                                            struct ltn_error *err)
{
    (void)be, (void)err;
    for (int32_t r = 0; r < rows; r++) {
        for (int32_t first = 0; first < cols; first += group) {
            float *run = (float *)x + (size_t)r * ld + first, max = run[0];
            for (int32_t c = 1; c < group; c++)
                max = run[c] > max ? run[c] : max;
            for (int32_t c = 0; c < group; c++)
                run[c] = (float)activate(run[c], act, max);
        }
    }
    return LTN_OK;
}

static enum ltn_status reference_multiply(struct ltn_backend *be, void *a, const void *b, int64_t n,
                                          struct ltn_error *err)
{
    (void)be, (void)err;
    for (int64_t i = 0; i < n; i++)
        ((float *)a)[i] *= ((const float *)b)[i];
    return LTN_OK;
}

/* S <- S + k^T v - (1 - r) S,  o = q S, for one token of one head: q, k [e] before rotation, v, o [e],
 * S [d, e]. The columns of S are independent; they go in groups so that the sums of o stay in double. */
static void recurrence(float *o, float *S, const float *q, const float *k, const float *v, double one_less_r,
                       const float *theta, double pos, int32_t e)
{
    enum { GROUP = 64 };
    int32_t d = theta ? 2 * e : e;
    for (int32_t first = 0; first < e; first += GROUP) {
        int32_t end = first + GROUP < e ? first + GROUP : e;
        double sum[GROUP] = {0};
        for (int32_t row = 0; row < d; row++) {
            int32_t c = row % e;
            double turn = 1;
            if (theta)
                turn = row < e ? cos(theta[c] * pos) : sin(theta[c] * pos);
            for (int32_t j = first; j < end; j++) {
                float *s = &S[(size_t)row * e + j];
                *s = (float)(*s + (turn * k[c] * v[j] - one_less_r * *s));
                sum[j - first] += turn * q[c] * *s;
            }
        }
        for (int32_t j = first; j < end; j++)
            o[j] = (float)sum[j - first];
    }
}

static enum ltn_status reference_lightning(struct ltn_backend *be, void *o, const void *q, const void *k,
                                           const void *v, int32_t ld, const struct ltn_attention *a,
                                           const struct ltn_seq *seqs, int32_t n_seqs, struct ltn_error *err)
{
    (void)be, (void)err;
    size_t e = (size_t)a->head_dim, d = a->theta ? 2 * e : e;
    for (int32_t i = 0; i < n_seqs; i++) {
        for (int32_t t = 0; t < seqs[i].count; t++) {
            size_t row = (size_t)seqs[i].first + t;
            for (size_t h = 0; h < (size_t)a->n_heads; h++) {
                size_t at = row * ld + h * e;
                recurrence((float *)o + (row * a->n_heads + h) * e,
                           seqs[i].state + a->state_offset + h * d * e, (const float *)q + at,
                           (const float *)k + at, (const float *)v + at, -expm1(-(double)a->slopes[h]),
                           a->theta ? a->theta + h * e : NULL, (double)seqs[i].pos + t, a->head_dim);
            }
        }
    }
    return LTN_OK;
}

/* ---- choosing a token ---------------------------------------------------------------------------------- */

struct chooser {
    const float *logits; /* [n] after penalties and biases */
    int32_t n;
    float largest;
    double scale;
    uint32_t mean;    /* distance, for nearness */
    uint64_t last[2]; /* of each order: the place of the last token kept */
    uint64_t least;   /* weight that is kept */
};

enum order { BY_LOGIT, BY_NEARNESS };

static uint64_t place_of(const struct chooser *c, enum order order, int32_t i)
{
    const uint32_t distance = ltn_distance(c->logits[i], c->largest, c->scale);
    return ltn_place(order == BY_LOGIT ? ltn_logit_key(c->logits[i]) : ltn_nearness_key(distance, c->mean),
                     i);
}

/* 0: the token is out. */
static uint64_t weight_of(const struct chooser *c, int32_t i)
{
    const uint64_t weight = ltn_token_weight(ltn_distance(c->logits[i], c->largest, c->scale));
    return weight >= c->least && place_of(c, BY_LOGIT, i) <= c->last[BY_LOGIT] &&
                   place_of(c, BY_NEARNESS, i) <= c->last[BY_NEARNESS]
               ? weight
               : 0;
}

/* How many tokens, or how much weight, are kept up to a place in the order. */
static uint64_t amount_to(const struct chooser *c, enum order order, uint64_t last, bool weights)
{
    uint64_t sum = 0;
    for (int32_t i = 0; i < c->n; i++) {
        const uint64_t weight = place_of(c, order, i) <= last ? weight_of(c, i) : 0;
        sum += weights ? weight : weight > 0;
    }
    return sum;
}

/* Keeps the fewest first tokens of the order that reach the amount: the least place at which it is reached is
 * found by halving. */
static void keep_first(struct chooser *c, enum order order, uint64_t amount, bool weights)
{
    uint64_t low = 0, high = UINT64_MAX;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (amount_to(c, order, middle, weights) >= amount)
            high = middle;
        else
            low = middle + 1;
    }
    c->last[order] = high;
}

static void keep_typical(struct chooser *c, double share)
{
    uint64_t high = 0, low = 0, total = amount_to(c, BY_LOGIT, UINT64_MAX, true);
    for (int32_t i = 0; i < c->n; i++) {
        const uint64_t weight = weight_of(c, i);
        const uint64_t product = weight ? weight * ltn_distance(c->logits[i], c->largest, c->scale) : 0;
        high += product >> 32;
        low += product & 0xffffffffu;
    }
    c->mean = ltn_mean_distance(high, low, total);
    keep_first(c, BY_NEARNESS, ltn_share_of(share, total), true);
}

static int32_t draw(struct chooser *c, const struct ltn_choice *choice, double u)
{
    uint64_t heaviest = 0, sum = 0;
    if (choice->top_k > 0)
        keep_first(c, BY_LOGIT, (uint64_t)choice->top_k, false);
    if (choice->typical > 0 && choice->typical < 1)
        keep_typical(c, choice->typical);
    if (choice->top_p < 1)
        keep_first(c, BY_LOGIT, ltn_share_of(choice->top_p, amount_to(c, BY_LOGIT, UINT64_MAX, true)), true);
    for (int32_t i = 0; i < c->n; i++)
        heaviest = weight_of(c, i) > heaviest ? weight_of(c, i) : heaviest;
    c->least = ltn_share_of(choice->min_p, heaviest);
    const uint64_t threshold = ltn_threshold(u, amount_to(c, BY_LOGIT, UINT64_MAX, true));
    int32_t i = 0;
    while (sum += weight_of(c, i), sum <= threshold)
        i++;
    return i;
}

static int32_t choose(const float *logits, int32_t n, const struct ltn_choice *choice,
                      const struct ltn_draws *draws)
{
    int32_t best = 0;
    for (int32_t i = 0; i < n; i++) {
        if (isnan(logits[i]) || logits[i] == INFINITY)
            return ltn_bad_logit(i);
        best = logits[i] > logits[best] ? i : best;
    }
    if (logits[best] == -INFINITY)
        return LTN_NO_TOKEN;
    if (choice->temperature == 0)
        return best;
    struct chooser c = {.logits = logits,
                        .n = n,
                        .largest = logits[best],
                        .scale = ltn_distance_scale(choice->temperature),
                        .last = {UINT64_MAX, UINT64_MAX},
                        .least = 1};
    return draw(&c, choice, ltn_uniform(draws->seed, draws->draw));
}

static void penalise(float *logits, const struct ltn_choice *choice, const struct ltn_draws *draws)
{
    const int64_t position = draws->position;
    const int64_t first = position > choice->repeat_last ? position - choice->repeat_last : 0;
    for (int64_t i = first; i < position; i++) {
        const int32_t id = draws->recent[i % LTN_RECENT_IDS];
        int32_t count = 0;
        bool seen = false; /* before */
        for (int64_t j = first; j < position; j++) {
            const bool same = draws->recent[j % LTN_RECENT_IDS] == id;
            count += same;
            seen = seen || (same && j < i);
        }
        if (!seen)
            logits[id] = ltn_penalised(logits[id], count, choice);
    }
}

static enum ltn_status reference_sample(struct ltn_backend *be, int32_t *ids, const float *logits,
                                        int32_t rows, int32_t cols, const struct ltn_choice *choice,
                                        struct ltn_draws *draws, float *scratch, int64_t *steps, int32_t *log,
                                        int32_t log_rows, struct ltn_error *err)
{
    (void)be, (void)err;
    for (int32_t r = 0; r < rows; r++) {
        struct ltn_draws *d = &draws[r];
        const float *row = logits + (size_t)r * cols;
        if (ltn_has_penalties(choice) || choice->n_bias > 0) {
            float *changed = scratch + (size_t)r * cols;
            memcpy(changed, row, (size_t)cols * sizeof *changed);
            if (ltn_has_penalties(choice))
                penalise(changed, choice, d);
            for (int32_t i = 0; i < choice->n_bias; i++)
                changed[choice->bias[i].id] += choice->bias[i].value;
            row = changed;
        }
        const int32_t id = choose(row, cols, choice, d);
        log[*steps % log_rows * rows + r] = id;
        ids[r] = id < 0 ? 0 : id;
        d->recent[d->position % LTN_RECENT_IDS] = ids[r];
        d->position++;
        d->draw++;
    }
    ++*steps;
    return LTN_OK;
}

static const struct ltn_ops reference_ops = {
    LTN_HOST_MEMORY_OPS,
    .close = reference_close,
    .embed = reference_embed,
    .norm = reference_norm,
    .gated_norm = reference_gated_norm,
    .linear = reference_linear,
    .linear_add = reference_linear_add,
    .logits = reference_logits,
    .activation = reference_activation,
    .multiply = reference_multiply,
    .lightning = reference_lightning,
    .sample = reference_sample,
};

enum ltn_status ltn_reference_open(struct ltn_backend **out, struct ltn_error *err)
{
    *out = malloc(sizeof **out);
    if (!*out)
        return ltn_fail(err, LTN_ERR_MEMORY, "host memory: no room for the reference backend");
    **out = (struct ltn_backend){
        .ops = &reference_ops,
        .act_dtype = LTN_F32,
        .dtypes = (1u << LTN_N_DTYPES) - 1,
        .host_memory = true,
        .chunk_rows = 256,
        .name = "CPU, plain reference",
    };
    return LTN_OK;
}
