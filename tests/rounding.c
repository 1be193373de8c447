#include "tests/rounding.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct rounding_backend {
    struct ltn_backend base;
    struct ltn_ops ops; /* those of plain, but for what is rounded */
    struct ltn_backend *plain;
    struct rounding how;
    bool from_table; /* x has not been added to yet: nobody has told it to others in bf16 */
};

static const struct ltn_ops *plain_of(struct ltn_backend *be, struct ltn_backend **plain)
{
    *plain = ((struct rounding_backend *)be)->plain;
    return (*plain)->ops;
}

static const struct rounding *how_of(struct ltn_backend *be)
{
    return &((struct rounding_backend *)be)->how;
}

static void round_columns(float *y, int32_t ld, int32_t rows, int32_t first, int32_t end)
{
    for (int32_t r = 0; r < rows; r++)
        for (int32_t c = first; c < end; c++)
            y[(size_t)r * ld + c] = ltn_bf16_to_f32(ltn_f32_to_bf16(y[(size_t)r * ld + c]));
}

static void round_all(float *y, int32_t rows, int32_t cols, bool whether)
{
    if (whether)
        round_columns(y, cols, rows, 0, cols);
}

/* x [n] in integers of 16 bits, a scale for each group. */
static void round_groups(float *to, const float *x, size_t n)
{
    enum { MOST = 32512 }; /* its high byte is 127 */
    for (size_t first = 0; first < n; first += LTN_GROUP) {
        const size_t end = first + LTN_GROUP < n ? first + LTN_GROUP : n;
        float most = 0;
        for (size_t i = first; i < end; i++)
            most = fmaxf(most, fabsf(x[i]));
        for (size_t i = first; i < end; i++)
            to[i] = most > 0 ? rintf(x[i] * (MOST / most)) * (most / MOST) : 0;
    }
}

static void widen(uint16_t *to, const struct ltn_matrix *w)
{
    const size_t rows = (size_t)w->rows, cols = (size_t)w->cols;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            to[r * cols + c] = ltn_f32_to_bf16(ltn_weight(w->data, w->scales, w->dtype, cols, r, c));
}

/* y = x W^T + b, with what is rounded of W and x. */
static enum ltn_status linear(struct ltn_backend *be, void *y, const void *x, const struct ltn_linear *l,
                              int32_t rows, struct ltn_error *err)
{
    const struct rounding *how = how_of(be);
    const size_t cols = (size_t)l->w.cols, n = (size_t)l->w.rows * cols;
    const bool weights = how->weights && ltn_is_quantised(l->w.dtype);
    const bool input = !weights && (l->w.dtype == LTN_Q4 || (how->integer && l->w.dtype == LTN_Q8));
    struct ltn_linear as = *l;
    struct ltn_backend *plain;
    const struct ltn_ops *ops = plain_of(be, &plain);
    if (!weights && !input)
        return ops->linear(plain, y, x, l, rows, err);
    const size_t bytes = weights ? n * sizeof(uint16_t) : (size_t)rows * cols * sizeof(float);
    void *room = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!room)
        return ltn_fail(err, LTN_ERR_MEMORY, "host memory: no room for %zu bytes", bytes);
    if (weights) {
        widen(room, &l->w);
        as.w = (struct ltn_matrix){room, LTN_BF16, l->w.rows, l->w.cols, NULL};
    }
    for (size_t r = 0; input && r < (size_t)rows; r++)
        round_groups((float *)room + r * cols, (const float *)x + r * cols, cols);
    const enum ltn_status status = ops->linear(plain, y, input ? room : x, &as, rows, err);
    free(room);
    return status;
}

/* x += y W^T + b */
static enum ltn_status linear_add(struct ltn_backend *be, float *x, const void *y, const struct ltn_linear *l,
                                  int32_t rows, struct ltn_error *err)
{
    float *sum = malloc((size_t)rows * l->w.rows * sizeof *sum);
    if (!sum)
        return ltn_fail(err, LTN_ERR_MEMORY, "host memory: no room for %d rows", rows);
    const enum ltn_status status = linear(be, sum, y, l, rows, err);
    ((struct rounding_backend *)be)->from_table = false;
    for (size_t i = 0; status == LTN_OK && i < (size_t)rows * l->w.rows; i++)
        x[i] += sum[i];
    free(sum);
    return status;
}

static enum ltn_status embed(struct ltn_backend *be, float *x, const struct ltn_matrix *table,
                             const int32_t *ids, int32_t rows, float scale, struct ltn_error *err)
{
    struct ltn_backend *plain;
    ((struct rounding_backend *)be)->from_table = true;
    return plain_of(be, &plain)->embed(plain, x, table, ids, rows, scale, err);
}

static enum ltn_status norm(struct ltn_backend *be, float *y, const float *x, const struct ltn_norm *norm,
                            int32_t rows, int32_t cols, struct ltn_error *err)
{
    const struct rounding *how = how_of(be);
    const bool from_table = ((struct rounding_backend *)be)->from_table;
    const struct ltn_ops *ops = plain_of(be, &be);
    memcpy(y, x, (size_t)rows * cols * sizeof *y);
    round_all(y, rows, cols, how->stream && !from_table);
    LTN_TRY(ops->norm(be, y, y, norm, rows, cols, err));
    round_all(y, rows, cols, how->normed);
    return LTN_OK;
}

static enum ltn_status norm_linear(struct ltn_backend *be, void *y, const float *x, const struct ltn_norm *n,
                                   const struct ltn_linear *l, enum ltn_act act, int32_t act_cols,
                                   int32_t group, int32_t rows, void *scratch, struct ltn_error *err)
{
    const struct rounding *how = how_of(be);
    const int32_t outs = l->w.rows, gate = outs / 4 * 3;
    LTN_TRY(norm(be, scratch, x, n, rows, l->w.cols, err));
    LTN_TRY(linear(be, y, scratch, l, rows, err));
    round_all(y, rows, outs, how->outputs);
    const struct ltn_ops *ops = plain_of(be, &be);
    LTN_TRY(ops->activation(be, y, outs, rows, act_cols, group, act, err));
    round_columns(y, outs, rows, how->qkv ? 0 : gate, outs);
    return LTN_OK;
}

static enum ltn_status lightning(struct ltn_backend *be, void *o, const void *q, const void *k, const void *v,
                                 int32_t ld, const struct ltn_attention *a, const struct ltn_seq *seqs,
                                 int32_t n_seqs, struct ltn_error *err)
{
    const struct ltn_ops *ops = plain_of(be, &be);
    const struct ltn_seq *last = &seqs[n_seqs - 1];
    LTN_TRY(ops->lightning(be, o, q, k, v, ld, a, seqs, n_seqs, err));
    round_all(o, last->first + last->count, a->n_heads * a->head_dim, true);
    return LTN_OK;
}

/* y = bf16(gate * o) / rms(o) */
static void round_gated(float *y, const float *o, const float *gate, int32_t ld_gate, int32_t rows,
                        int32_t cols)
{
    for (int32_t r = 0; r < rows; r++, y += cols, o += cols, gate += ld_gate) {
        double sum = 0;
        for (int32_t c = 0; c < cols; c++) {
            sum += (double)o[c] * o[c];
            y[c] = ltn_bf16_to_f32(ltn_f32_to_bf16(gate[c] * o[c]));
        }
        for (int32_t c = 0; c < cols; c++)
            y[c] = (float)(y[c] / sqrt(sum / cols + 1e-6));
    }
}

static enum ltn_status gated_linear_add(struct ltn_backend *be, float *x, const void *o, const void *gate,
                                        int32_t ld_gate, const struct ltn_norm *n, const struct ltn_linear *l,
                                        int32_t rows, void *scratch, struct ltn_error *err)
{
    const struct rounding *how = how_of(be);
    struct ltn_backend *plain;
    const struct ltn_ops *ops = plain_of(be, &plain);
    if (how->gated)
        round_gated(scratch, o, gate, ld_gate, rows, l->w.cols);
    else
        LTN_TRY(ops->gated_norm(plain, scratch, o, gate, ld_gate, n, rows, l->w.cols, err));
    round_all(scratch, rows, l->w.cols, how->normed);
    return linear_add(be, x, scratch, l, rows, err);
}

static enum ltn_status norm_glu(struct ltn_backend *be, void *y, const float *x, const struct ltn_norm *n,
                                const struct ltn_linear *l1, const struct ltn_linear *l2, int32_t rows,
                                void *scratch, void *scratch2, struct ltn_error *err)
{
    const struct rounding *how = how_of(be);
    const int32_t outs = l1->w.rows;
    LTN_TRY(norm(be, scratch, x, n, rows, l1->w.cols, err));
    LTN_TRY(linear(be, y, scratch, l1, rows, err));
    LTN_TRY(linear(be, scratch2, scratch, l2, rows, err));
    round_all(y, rows, outs, how->outputs);
    round_all(scratch2, rows, outs, how->outputs);
    const struct ltn_ops *ops = plain_of(be, &be);
    LTN_TRY(ops->multiply(be, y, scratch2, (int64_t)rows * outs, err));
    round_all(y, rows, outs, true);
    return LTN_OK;
}

static enum ltn_status norm_logits(struct ltn_backend *be, float *out, const float *x,
                                   const struct ltn_norm *n, const struct ltn_matrix *w, int32_t rows,
                                   void *scratch, struct ltn_error *err)
{
    const struct ltn_linear head = {*w, NULL, {0}};
    LTN_TRY(norm(be, scratch, x, n, rows, w->cols, err));
    return linear(be, out, scratch, &head, rows, err);
}

static void close_both(struct ltn_backend *be)
{
    struct ltn_backend *plain;
    plain_of(be, &plain)->close(plain);
    free(be);
}

void rounding_set(struct ltn_backend *be, const struct rounding *how)
{
    ((struct rounding_backend *)be)->how = *how;
}

enum ltn_status rounding_open(struct ltn_backend **out, struct ltn_backend *plain, struct ltn_error *err)
{
    struct rounding_backend *be = malloc(sizeof *be);
    if (!be)
        return ltn_fail(err, LTN_ERR_MEMORY, "host memory: no room for a backend");
    *be = (struct rounding_backend){.base = *plain, .ops = *plain->ops, .plain = plain};
    be->base.ops = &be->ops;
    be->ops.close = close_both;
    be->ops.expect = NULL;
    be->ops.embed = embed;
    be->ops.norm_linear = norm_linear;
    be->ops.lightning = lightning;
    be->ops.gated_linear_add = gated_linear_add;
    be->ops.norm_glu = norm_glu;
    be->ops.linear_add = linear_add;
    be->ops.norm_logits = norm_logits;
    *out = &be->base;
    return LTN_OK;
}
