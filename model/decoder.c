#include "model/decoder.h"

#include <math.h>

/* ---- the forward pass
 * --------------------------------------------------------------------------------------------
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
    const struct ltn_seq *seqs;
    int32_t n_seqs;
    int32_t rows;
    struct ltn_error *err;
};

static void *columns(const struct pass *p, void *act, int32_t column)
{
    return (uint8_t *)act + (size_t)column * ltn_dtype_size(p->be->act_dtype);
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

    LTN_TRY(p->ops->norm(p->be, ws->y, ws->x, &layer->token_norm, p->rows, c->embed_dim, p->err));
    LTN_TRY(p->ops->linear(p->be, q, ws->y, &layer->qkv, p->rows, p->err));
    if (v3) {
        /* phi sees the whole [q k v] vector, before it is split into heads */
        LTN_TRY(p->ops->activation(p->be, q, ld, p->rows, ld, ld, c->act, p->err));
        LTN_TRY(p->ops->linear(p->be, ws->gate_low, ws->y, &layer->gate0, p->rows, p->err));
        LTN_TRY(p->ops->linear(p->be, gate, ws->gate_low, &layer->gate1, p->rows, p->err));
        LTN_TRY(p->ops->activation(p->be, gate, H, p->rows, H, H, LTN_ACT_SIGMOID, p->err));
    } else {
        LTN_TRY(p->ops->activation(p->be, q, ld, p->rows, 2 * H, c->head_dim, c->act, p->err));
    }
    LTN_TRY(p->ops->lightning(p->be, ws->o, q, k, v, ld, &layer->attention, p->seqs, p->n_seqs, p->err));
    LTN_TRY(
        p->ops->gated_norm(p->be, ws->y, ws->o, gate, v3 ? H : ld, &layer->attn_norm, p->rows, H, p->err));
    return p->ops->linear_add(p->be, ws->x, ws->y, &layer->out, p->rows, p->err);
}

/* Gated linear unit without an activation (SGLU, same section): x += W_3 ((W_1 y) * (W_2 y)). */
static enum ltn_status channel_mixer(const struct pass *p, const struct ltn_layer *layer)
{
    struct ltn_workspace *ws = p->ws;
    void *a = ws->qkv, *b = ws->gate;

    LTN_TRY(p->ops->norm(p->be, ws->y, ws->x, &layer->channel_norm, p->rows, p->config->embed_dim, p->err));
    LTN_TRY(p->ops->linear(p->be, a, ws->y, &layer->l1, p->rows, p->err));
    LTN_TRY(p->ops->linear(p->be, b, ws->y, &layer->l2, p->rows, p->err));
    LTN_TRY(p->ops->multiply(p->be, a, b, (int64_t)p->rows * p->config->glu_dim, p->err));
    return p->ops->linear_add(p->be, ws->x, a, &layer->l3, p->rows, p->err);
}

/* logits = Norm(x) E^T for the rows first .. first + rows - 1, into row `to` of ws->logits on. */
static enum ltn_status head(const struct pass *p, const struct ltn_model *model, int32_t first, int32_t rows,
                            int32_t to)
{
    struct ltn_workspace *ws = p->ws;
    const int32_t D = p->config->embed_dim;

    LTN_TRY(p->ops->norm(p->be, ws->y, ws->x + (size_t)first * D, &model->final_norm, rows, D, p->err));
    return p->ops->logits(p->be, ws->logits + (size_t)to * p->config->vocab_size, ws->y, &model->head, rows,
                          p->err);
}

static enum ltn_status wanted_logits(const struct pass *p, const struct ltn_model *model, enum ltn_want want)
{
    if (want == LTN_WANT_NONE)
        return LTN_OK;
    /* In batched decode every row is the last of its sequence. */
    if (want == LTN_WANT_ALL || p->n_seqs == p->rows)
        return head(p, model, 0, p->rows, 0);
    for (int32_t i = 0; i < p->n_seqs; i++)
        LTN_TRY(head(p, model, p->seqs[i].first + p->seqs[i].count - 1, 1, i));
    return LTN_OK;
}

enum ltn_status ltn_forward(const struct ltn_model *model, struct ltn_workspace *ws, const int32_t *ids,
                            int32_t rows, const struct ltn_seq *seqs, int32_t n_seqs, enum ltn_want want,
                            const struct ltn_tap *tap, struct ltn_error *err)
{
    const struct ltn_config *c = &model->config;
    struct ltn_backend *be = model->be;
    const struct pass p = {c, ws, be, be->ops, seqs, n_seqs, rows, err};
    int32_t n_logits = want == LTN_WANT_ALL ? rows : want == LTN_WANT_LAST ? n_seqs : 0;

    if (rows < 1 || rows > ws->max_rows || n_logits > ws->max_logits)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "forward pass: %d rows with %d logits, the workspace holds 1..%d with %d", rows,
                        n_logits, ws->max_rows, ws->max_logits);

    LTN_TRY(be->ops->upload(be, ws->ids, ids, (size_t)rows * sizeof *ids, err));
    float scale = c->scale_embedding ? sqrtf((float)c->embed_dim) : 1.0f;
    LTN_TRY(be->ops->embed(be, ws->x, &model->embed, ws->ids, rows, scale, err));
    for (int32_t l = 0; l < c->n_layers; l++) {
        if (tap)
            LTN_TRY(tap->fn(tap->ctx, l, ws->x, rows, err));
        LTN_TRY(token_mixer(&p, &model->layers[l]));
        LTN_TRY(channel_mixer(&p, &model->layers[l]));
    }
    if (tap)
        LTN_TRY(tap->fn(tap->ctx, c->n_layers, ws->x, rows, err));
    return wanted_logits(&p, model, want);
}

/* ---- workspace
 * ----------------------------------------------------------------------------------------------------- */

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
        {(void **)&ws->ids, n * sizeof *ws->ids},
        {(void **)&ws->x, n * (size_t)D * sizeof(float)},
        {&ws->y, n * (size_t)max32(D, H) * act},
        {&ws->qkv, n * (size_t)max32(c->gate_dim ? 3 * H : 4 * H, G) * act},
        {&ws->gate, n * (size_t)max32(c->gate_dim ? H : 0, G) * act},
        {&ws->gate_low, n * (size_t)c->gate_dim * act},
        {&ws->o, n * (size_t)H * act},
        {(void **)&ws->logits, (size_t)max_logits * (size_t)c->vocab_size * sizeof(float)},
    };
    size_t total = 0;

    *ws = (struct ltn_workspace){.be = be, .max_rows = max_rows, .max_logits = max_logits};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        total += (parts[i].bytes + 63) / 64 * 64;
    LTN_TRY(be->ops->alloc(be, &ws->memory, total, err));
    uint8_t *next = ws->memory;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].at = next;
        next += (parts[i].bytes + 63) / 64 * 64;
    }
    return LTN_OK;
}

void ltn_workspace_free(struct ltn_workspace *ws)
{
    if (ws->be)
        ws->be->ops->free(ws->be, ws->memory);
    *ws = (struct ltn_workspace){0};
}
