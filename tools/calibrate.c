#include "tools/calibrate.h"

#include "kernels/ops.h"
#include "model/decoder.h"
#include "tokenizer/tokenizer.h"
#include "tools/quantize.h"
#include "tools/source.h"

#include <stdlib.h>
#include <string.h>

enum { CHUNK = 256, MAX_TEXT = 64 << 20 };
static const size_t GRAMS_BYTES = (size_t)2 << 30; /* that are held at once, if more than one matrix's */

/* The CPU backend with its products listened to: `ops` is its table but for these, and the first field, so
 * that it is found again from the backend. */
struct listener {
    struct ltn_ops ops;
    const struct ltn_ops *inner;
    struct ltn_calibration *calibration;
};

struct ltn_calibration {
    const struct ltn_checkpoint *checkpoint;
    struct ltn_backend *be;
    struct listener listener;
    struct ltn_model model;
    struct ltn_workspace ws;
    float *state;
    int32_t *ids;
    size_t n_ids;
    float *turned; /* [widest input, CHUNK] */
    float **grams; /* [n_specs] of the specs [first, end), else NULL */
    size_t first, end;
};

static uint64_t cols_of(const struct ltn_tensor_spec *spec)
{
    return (uint64_t)spec->shape[1];
}

/* Which of the specs [first, end) the matrix is; end: none. Of two that share an input both listen. */
static size_t spec_of(const struct ltn_calibration *c, const struct ltn_matrix *w)
{
    for (size_t i = c->first; i < c->end; i++) {
        const struct ltn_st_tensor *t = c->checkpoint->tensors[i];
        if (c->grams[i] && c->checkpoint->file.map + t->offset == w->data)
            return i;
    }
    return c->end;
}

/* gram += x^T x, x: [rows, cols]: the backend's own product, of x turned with itself. */
static enum ltn_status listen(struct ltn_backend *be, const float *x, const struct ltn_matrix *w,
                              int32_t rows, struct ltn_error *err)
{
    const struct listener *l = (const struct listener *)be->ops;
    struct ltn_calibration *c = l->calibration;
    size_t spec = spec_of(c, w), cols = (size_t)w->cols;
    if (spec == c->end)
        return LTN_OK;
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t i = 0; i < cols; i++)
            c->turned[i * (size_t)rows + r] = x[r * cols + i];
    const struct ltn_linear turned = {
        .w = {.data = c->turned, .dtype = LTN_F32, .rows = w->cols, .cols = rows}};
    return l->inner->linear_add(be, c->grams[spec], c->turned, &turned, w->cols, err);
}

static enum ltn_status listening_linear(struct ltn_backend *be, void *y, const void *x,
                                        const struct ltn_linear *l, int32_t rows, struct ltn_error *err)
{
    LTN_TRY(listen(be, x, &l->w, rows, err));
    return ((const struct listener *)be->ops)->inner->linear(be, y, x, l, rows, err);
}

static enum ltn_status listening_linear_add(struct ltn_backend *be, float *x, const void *y,
                                            const struct ltn_linear *l, int32_t rows, struct ltn_error *err)
{
    LTN_TRY(listen(be, y, &l->w, rows, err));
    return ((const struct listener *)be->ops)->inner->linear_add(be, x, y, l, rows, err);
}

static enum ltn_status listening_logits(struct ltn_backend *be, float *out, const void *y,
                                        const struct ltn_matrix *w, int32_t rows, struct ltn_error *err)
{
    (void)out; /* which nobody reads */
    return listen(be, y, w, rows, err);
}

bool ltn_calibration_listens(const struct ltn_checkpoint *checkpoint, size_t spec)
{
    const struct ltn_tensor_spec *s = &checkpoint->specs[spec];
    return s->is_matrix && (s->slot != LTN_SLOT_EMBED || checkpoint->config.tied);
}

/* ---- reading the text ---------------------------------------------------------------------------------- */

static void forget(struct ltn_calibration *c)
{
    for (size_t i = c->first; i < c->end; i++) {
        free(c->grams[i]);
        c->grams[i] = NULL;
    }
    c->first = c->end = 0;
}

/* Grams of the specs from `spec` on, as many as there is room for. */
static enum ltn_status make_room(struct ltn_calibration *c, size_t spec, struct ltn_error *err)
{
    const struct ltn_checkpoint *ck = c->checkpoint;
    size_t bytes = 0;
    forget(c);
    for (c->first = c->end = spec; c->end < ck->n_specs; c->end++) {
        const struct ltn_tensor_spec *s = &ck->specs[c->end];
        size_t own = s->is_matrix ? (size_t)(cols_of(s) * cols_of(s) * sizeof(float)) : 0;
        if (bytes > 0 && own > 0 && bytes + own > GRAMS_BYTES)
            break;
        if (!ltn_calibration_listens(ck, c->end))
            continue;
        c->grams[c->end] = calloc(1, own);
        if (!c->grams[c->end])
            return ltn_fail(err, LTN_ERR_MEMORY, "calibration: no memory for %zu x %zu sums of \"%s\"",
                            (size_t)cols_of(s), (size_t)cols_of(s), s->name);
        bytes += own;
    }
    return LTN_OK;
}

static enum ltn_status read_text(struct ltn_calibration *c, struct ltn_error *err)
{
    size_t state_floats = ltn_state_offset(&c->model.config, c->model.config.n_layers);
    struct ltn_seq seq = {.state = c->state};
    LTN_TRY(c->be->ops->zero(c->be, c->state, state_floats * sizeof(float), err));
    for (size_t at = 0; at < c->n_ids; at += CHUNK) {
        seq.count = (int32_t)(c->n_ids - at < CHUNK ? c->n_ids - at : CHUNK);
        LTN_TRY(ltn_forward(&c->model, &c->ws, c->ids + at, seq.count, &seq, 1, LTN_WANT_ALL, NULL, err));
        seq.pos += seq.count;
    }
    return LTN_OK;
}

enum ltn_status ltn_calibration_gram(struct ltn_calibration *c, size_t spec, const float **gram,
                                     struct ltn_error *err)
{
    if (spec < c->first || spec >= c->end) {
        LTN_TRY(make_room(c, spec, err));
        LTN_TRY(read_text(c, err));
    }
    *gram = c->grams[spec];
    return LTN_OK;
}

/* ---- opening ------------------------------------------------------------------------------------------- */

static enum ltn_status encode(struct ltn_calibration *c, const char *path, struct ltn_error *err)
{
    const struct ltn_checkpoint *ck = c->checkpoint;
    struct ltn_tokenizer *tokenizer = NULL;
    char *text = NULL;
    size_t bytes = 0;
    if (!ck->tokenizer)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "%s: has no tokenizer, which calibration by a text needs",
                        ck->file.path);
    LTN_TRY(ltn_read_file(&text, &bytes, path, MAX_TEXT, NULL, err));
    enum ltn_status status =
        ltn_tokenizer_open(&tokenizer, ck->tokenizer, ck->tokenizer_bytes, ck->tokenizer_json, err);
    if (status == LTN_OK)
        status = ltn_tokenize(tokenizer, text, bytes, &c->ids, &c->n_ids, err);
    ltn_tokenizer_close(tokenizer);
    free(text);
    LTN_TRY(status);
    if (c->n_ids < LTN_CALIBRATE_MIN)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: too short to calibrate by: expected at least %d tokens, found %zu", path,
                        LTN_CALIBRATE_MIN, c->n_ids);
    if (c->n_ids > LTN_CALIBRATE_MAX)
        c->n_ids = LTN_CALIBRATE_MAX;
    return LTN_OK;
}

static enum ltn_status open_model(struct ltn_calibration *c, int n_threads, struct ltn_error *err)
{
    const struct ltn_checkpoint *ck = c->checkpoint;
    uint64_t widest = 0;
    for (size_t i = 0; i < ck->n_specs; i++)
        if (ck->specs[i].is_matrix && cols_of(&ck->specs[i]) > widest)
            widest = cols_of(&ck->specs[i]);
    LTN_TRY(ltn_cpu_open(&c->be, n_threads, err));
    c->listener.inner = c->be->ops;
    c->listener.ops = *c->be->ops;
    c->listener.ops.linear = listening_linear;
    c->listener.ops.linear_add = listening_linear_add;
    c->listener.ops.logits = listening_logits;
    c->listener.ops.norm_linear = NULL; /* composed, so that every product is heard */
    c->listener.ops.norm_glu = NULL;
    c->listener.calibration = c;
    c->be->ops = &c->listener.ops;
    LTN_TRY(ltn_model_load(&c->model, ck, c->be, NULL, NULL, err));
    LTN_TRY(ltn_workspace_create(&c->ws, &c->model, CHUNK, CHUNK, err));
    size_t state_bytes = ltn_state_offset(&ck->config, ck->config.n_layers) * sizeof(float);
    LTN_TRY(c->be->ops->alloc(c->be, (void **)&c->state, state_bytes, err));
    return c->be->ops->alloc(c->be, (void **)&c->turned, (size_t)widest * CHUNK * sizeof(float), err);
}

enum ltn_status ltn_calibration_open(struct ltn_calibration **out, const struct ltn_checkpoint *checkpoint,
                                     const char *text_path, int n_threads, struct ltn_error *err)
{
    struct ltn_calibration *c = *out = calloc(1, sizeof *c);
    if (c)
        c->grams = calloc(checkpoint->n_specs, sizeof *c->grams);
    if (!c || !c->grams) {
        free(c);
        *out = NULL;
        return ltn_fail(err, LTN_ERR_MEMORY, "calibration: no memory for a list of matrices");
    }
    c->checkpoint = checkpoint;
    enum ltn_status status = encode(c, text_path, err);
    if (status == LTN_OK)
        status = open_model(c, n_threads, err);
    if (status != LTN_OK) {
        ltn_calibration_close(c);
        *out = NULL;
    }
    return status;
}

void ltn_calibration_close(struct ltn_calibration *c)
{
    if (!c)
        return;
    forget(c);
    free(c->grams);
    free(c->ids);
    if (c->be) {
        ltn_workspace_free(&c->ws);
        ltn_model_free(&c->model);
        c->be->ops->free(c->be, c->turned);
        c->be->ops->free(c->be, c->state);
        c->be->ops->close(c->be);
    }
    free(c);
}
