#include "model/decoder.h"

#include <math.h>

/* ---- the forward pass ------------------------------------------------------------------------------
 *
 *   x = s E[ids]
 *   for each layer:   x += W_o (gate * Norm(attention(q, k, v)))      q, k, v, gate from Norm(x)
 *                     x += W_3 ((W_1 y) * (W_2 y))                    y = Norm(x)
 *   logits = Norm(x) E^T
 */

/* What every step of one call needs. */
struct pass {
    const struct ltn_config *config;
    struct ltn_workspace *ws;
    struct ltn_backend *be;
    const struct ltn_ops *ops;
    const int32_t *ids; /* backend memory */
    const struct ltn_seq *seqs;
    int32_t n_seqs;
    int32_t rows;
    struct ltn_error *err;
};

/* Names the weights of the product behind the one that comes now. */
static void expect(const struct pass *p, const struct ltn_matrix *w)
{
    if (p->ops->expect)
        p->ops->expect(p->be, w, p->rows);
}

static void *columns(const struct pass *p, void *act, int32_t column)
{
    return (uint8_t *)act + (size_t)column * ltn_dtype_size(p->be->act_dtype);
}

/* y = act(Norm(x) W^T + b); the feature map on the first act_cols columns, in groups of `group`. */
static enum ltn_status norm_linear(const struct pass *p, void *y, const struct ltn_norm *norm,
                                   const struct ltn_linear *l, enum ltn_act act, int32_t act_cols,
                                   int32_t group)
{
    struct ltn_workspace *ws = p->ws;
    if (p->ops->norm_linear)
        return p->ops->norm_linear(p->be, y, ws->x, norm, l, act, act_cols, group, p->rows, ws->y, p->err);
    LTN_TRY(p->ops->norm(p->be, ws->y, ws->x, norm, p->rows, l->w.cols, p->err));
    LTN_TRY(p->ops->linear(p->be, y, ws->y, l, p->rows, p->err));
    return act_cols > 0 ? p->ops->activation(p->be, y, l->w.rows, p->rows, act_cols, group, act, p->err)
                        : LTN_OK;
}

/* x += W_o (gate * Norm(attention(q, k, v))) */
static enum ltn_status attention_out(const struct pass *p, const struct ltn_layer *layer, const void *q,
                                     const void *k, const void *v, int32_t ld, const void *gate,
                                     int32_t ld_gate)
{
    struct ltn_workspace *ws = p->ws;
    const struct ltn_attention *a = &layer->attention;
    const struct ltn_norm *norm = &layer->attn_norm;
    if (p->ops->lightning_linear_add)
        return p->ops->lightning_linear_add(p->be, ws->x, q, k, v, ld, a, p->seqs, p->n_seqs, gate, ld_gate,
                                            norm, &layer->out, p->rows, ws->o, ws->y, p->err);
    LTN_TRY(p->ops->lightning(p->be, ws->o, q, k, v, ld, a, p->seqs, p->n_seqs, p->err));
    expect(p, &layer->l1.w);
    if (p->ops->gated_linear_add)
        return p->ops->gated_linear_add(p->be, ws->x, ws->o, gate, ld_gate, norm, &layer->out, p->rows, ws->y,
                                        p->err);
    LTN_TRY(p->ops->gated_norm(p->be, ws->y, ws->o, gate, ld_gate, norm, p->rows, layer->out.w.cols, p->err));
    return p->ops->linear_add(p->be, ws->x, ws->y, &layer->out, p->rows, p->err);
}

/* Lightning attention with its gate (TransNormerLLM, arXiv 2307.14995, "Gating mechanism"): x += W_o (gate *
 * Norm(o)). In v1/v2 the gate u comes out of the same product as q, k, v; in TransNormerLLM3 it is sigmoid(G1
 * G0 y), and phi acts on v too. */
static enum ltn_status token_mixer(const struct pass *p, const struct ltn_layer *layer)
{
    const struct ltn_config *c = p->config;
    struct ltn_workspace *ws = p->ws;
    const int32_t H = c->hidden_dim;
    const bool v3 = c->gate_dim > 0;
    const int32_t ld = layer->qkv.w.rows; /* 4H or 3H */
    void *q = ws->qkv, *k = columns(p, q, H), *v = columns(p, q, 2 * H);
    void *gate = v3 ? ws->gate : columns(p, q, 3 * H);

    if (v3) {
        /* phi sees the whole [q k v] vector, before it is split into heads */
        expect(p, &layer->gate0.w);
        LTN_TRY(norm_linear(p, q, &layer->token_norm, &layer->qkv, c->act, ld, ld));
        expect(p, &layer->gate1.w);
        LTN_TRY(norm_linear(p, ws->gate_low, &layer->token_norm, &layer->gate0, LTN_ACT_NONE, 0, 1));
        expect(p, &layer->out.w);
        LTN_TRY(p->ops->linear(p->be, gate, ws->gate_low, &layer->gate1, p->rows, p->err));
        LTN_TRY(p->ops->activation(p->be, gate, H, p->rows, H, H, LTN_ACT_SIGMOID, p->err));
    } else {
        expect(p, &layer->out.w);
        LTN_TRY(norm_linear(p, q, &layer->token_norm, &layer->qkv, c->act, 2 * H, c->head_dim));
    }
    return attention_out(p, layer, q, k, v, ld, gate, v3 ? H : ld);
}

/* Gated linear unit without an activation (SGLU, same section): x += W_3 ((W_1 y) * (W_2 y)). `next` is
 * multiplied after it. */
static enum ltn_status channel_mixer(const struct pass *p, const struct ltn_layer *layer,
                                     const struct ltn_matrix *next)
{
    struct ltn_workspace *ws = p->ws;
    const struct ltn_norm *norm = &layer->channel_norm;
    void *a = ws->qkv, *b = ws->gate;

    expect(p, &layer->l3.w);
    if (p->ops->norm_glu) {
        LTN_TRY(p->ops->norm_glu(p->be, a, ws->x, norm, &layer->l1, &layer->l2, p->rows, ws->y, b, p->err));
    } else {
        LTN_TRY(p->ops->norm(p->be, ws->y, ws->x, norm, p->rows, p->config->embed_dim, p->err));
        LTN_TRY(p->ops->linear(p->be, a, ws->y, &layer->l1, p->rows, p->err));
        LTN_TRY(p->ops->linear(p->be, b, ws->y, &layer->l2, p->rows, p->err));
        LTN_TRY(p->ops->multiply(p->be, a, b, (int64_t)p->rows * p->config->glu_dim, p->err));
    }
    expect(p, next);
    return p->ops->linear_add(p->be, ws->x, a, &layer->l3, p->rows, p->err);
}

/* logits = Norm(x) E^T for the first rows of x. */
static enum ltn_status head(const struct pass *p, const struct ltn_model *model, int32_t rows)
{
    struct ltn_workspace *ws = p->ws;
    const struct ltn_norm *norm = &model->final_norm;

    expect(p, &model->layers[0].qkv.w); /* of the next token */
    if (p->ops->norm_logits)
        return p->ops->norm_logits(p->be, ws->logits, ws->x, norm, &model->head, rows, ws->y, p->err);
    LTN_TRY(p->ops->norm(p->be, ws->y, ws->x, norm, rows, p->config->embed_dim, p->err));
    return p->ops->logits(p->be, ws->logits, ws->y, &model->head, rows, p->err);
}

static enum ltn_status wanted_logits(const struct pass *p, const struct ltn_model *model, enum ltn_want want)
{
    if (want == LTN_WANT_NONE)
        return LTN_OK;
    if (want == LTN_WANT_ALL)
        return head(p, model, p->rows);
    /* The last rows move up, so that the head's weights are read once for all of them. Row i's own place is
     * free by then: last rows ascend, and the i-th is i or later. */
    const size_t D = (size_t)p->config->embed_dim;
    for (int32_t i = 0; i < p->n_seqs; i++) {
        int32_t last = p->seqs[i].first + p->seqs[i].count - 1;
        if (last != i)
            LTN_TRY(p->ops->copy(p->be, p->ws->x + (size_t)i * D, p->ws->x + (size_t)last * D,
                                 D * sizeof(float), p->err));
    }
    return head(p, model, p->n_seqs);
}

static struct ltn_network network_of(const struct ltn_model *model)
{
    const struct ltn_config *c = &model->config;
    const float scale = c->scale_embedding ? sqrtf((float)c->embed_dim) : 1.0f;
    return (struct ltn_network){c->vocab_size,     c->embed_dim, c->hidden_dim, c->glu_dim,   c->gate_dim,
                                c->n_layers,       c->act,       scale,         model->embed, model->head,
                                model->final_norm, model->layers};
}

enum ltn_status ltn_forward_ids(const struct ltn_model *model, struct ltn_workspace *ws, const int32_t *ids,
                                int32_t rows, const struct ltn_seq *seqs, int32_t n_seqs, enum ltn_want want,
                                const struct ltn_tap *tap, struct ltn_error *err)
{
    const struct ltn_config *c = &model->config;
    const struct pass pass = {c, ws, model->be, model->be->ops, ids, seqs, n_seqs, rows, err}, *p = &pass;
    const struct ltn_network net = network_of(model);

    /* one token of one stream, where the backend can take it through the whole model at once */
    if (p->ops->step && rows == 1 && want != LTN_WANT_NONE && !tap) {
        enum ltn_status status = p->ops->step(p->be, &net, seqs, ids, ws->logits, err);
        if (status != LTN_ERR_UNSUPPORTED)
            return status;
    }
    LTN_TRY(p->ops->embed(p->be, ws->x, &model->embed, p->ids, rows, net.embed_scale, err));
    for (int32_t l = 0; l < c->n_layers; l++) {
        if (tap)
            LTN_TRY(tap->fn(tap->ctx, l, ws->x, rows, err));
        LTN_TRY(token_mixer(p, &model->layers[l]));
        LTN_TRY(channel_mixer(p, &model->layers[l],
                              l + 1 < c->n_layers ? &model->layers[l + 1].qkv.w : &model->head));
    }
    if (tap)
        LTN_TRY(tap->fn(tap->ctx, c->n_layers, ws->x, rows, err));
    return wanted_logits(p, model, want);
}

/* ---- workspace ------------------------------------------------------------------------------------- */

static int32_t max32(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

enum ltn_status ltn_workspace_create(struct ltn_workspace *ws, const struct ltn_model *model,
                                     int32_t max_rows, int32_t max_logits, struct ltn_error *err)
{
    const struct ltn_config *c = &model->config;
    struct ltn_backend *be = model->be;
    const size_t act = ltn_dtype_size(be->act_dtype), n = (size_t)max_rows;
    const int32_t D = c->embed_dim, H = c->hidden_dim, G = c->glu_dim;
    struct {
        void **at;
        size_t bytes;
    } parts[] = {
        {(void **)&ws->cursor, sizeof(struct ltn_cursor)},
        {(void **)&ws->ids, n * sizeof *ws->ids},
        {(void **)&ws->x, n * (size_t)D * sizeof(float)},
        {&ws->y, n * (size_t)max32(D, H) * act},
        {&ws->qkv, n * (size_t)max32(c->gate_dim ? 3 * H : 4 * H, G) * act},
        {&ws->gate, n * (size_t)max32(c->gate_dim ? H : 0, G) * act},
        {&ws->gate_low, n * (size_t)c->gate_dim * act},
        {&ws->o, n * (size_t)H * act},
        {(void **)&ws->logits, (size_t)max_logits * (size_t)c->vocab_size * sizeof(float)},
    };
    const struct ltn_network net = network_of(model);
    size_t total = 0;

    *ws = (struct ltn_workspace){.be = be, .max_rows = max_rows, .max_logits = max_logits};
    if (be->ops->reserve)
        LTN_TRY(be->ops->reserve(be, &net, max_rows, max_logits, err));
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        total += (parts[i].bytes + 63) / 64 * 64;
    LTN_TRY(be->ops->alloc(be, &ws->memory, total, err));
    ws->bytes = total;
    uint8_t *next = ws->memory;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].at = next;
        next += (parts[i].bytes + 63) / 64 * 64;
    }
    return LTN_OK;
}

void ltn_workspace_free(struct ltn_workspace *ws)
{
    if (ws->step)
        ws->be->ops->recording_free(ws->be, ws->step);
    if (ws->be)
        ws->be->ops->free(ws->be, ws->memory);
    *ws = (struct ltn_workspace){0};
}
