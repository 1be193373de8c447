#include "model/model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/rng.h"

/* Matrices that lie one after another, in the file as in the arena, go to a device in runs of this size. */
enum { RUN_BYTES = 1 << 30, ALIGN = 64 };

static size_t align_up(size_t n)
{
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

static size_t count_of(const struct ltn_tensor_spec *spec)
{
    size_t n = 1;
    for (int32_t i = 0; i < spec->rank; i++)
        n *= (size_t)spec->shape[i];
    return n;
}

/* A matrix, or its scales, that lies aligned in host memory needs no copy. */
static bool usable_in_place(const struct ltn_backend *be, const struct ltn_tensor_spec *spec,
                            const struct ltn_st_tensor *t)
{
    return be->host_memory && spec->is_matrix && t->offset % ALIGN == 0;
}

/* Bytes that the tensor takes in the arena; none at all (NULL) takes none. */
static size_t arena_bytes(const struct ltn_backend *be, const struct ltn_tensor_spec *spec,
                          const struct ltn_st_tensor *t)
{
    if (!t || usable_in_place(be, spec, t))
        return 0;
    return align_up(spec->is_matrix ? t->bytes : count_of(spec) * sizeof(float));
}

static void put_linear(struct ltn_linear *l, const struct ltn_tensor_spec *spec,
                       const struct ltn_matrix *matrix)
{
    if (spec->is_bias)
        l->bias = matrix->data;
    else
        l->w = *matrix;
}

static void put_norm(struct ltn_norm *norm, const struct ltn_tensor_spec *spec, const void *data)
{
    if (spec->is_bias)
        norm->bias = data;
    else
        norm->weight = data;
}

/* Gives a tensor its place in the model: the one list of which name is what. matrix: where it lies; of a
 * vector the data alone counts. */
static void put(struct ltn_model *model, const struct ltn_tensor_spec *spec, const struct ltn_matrix *matrix)
{
    const void *data = matrix->data;
    struct ltn_layer *layer = spec->layer >= 0 ? &model->layers[spec->layer] : NULL;

    switch (spec->slot) {
    case LTN_SLOT_EMBED:
        model->embed = *matrix;
        break;
    case LTN_SLOT_HEAD:
        model->head = *matrix;
        break;
    case LTN_SLOT_FINAL_NORM:
        put_norm(&model->final_norm, spec, data);
        break;
    case LTN_SLOT_TOKEN_NORM:
        put_norm(&layer->token_norm, spec, data);
        break;
    case LTN_SLOT_ATTN_NORM:
        put_norm(&layer->attn_norm, spec, data);
        break;
    case LTN_SLOT_CHANNEL_NORM:
        put_norm(&layer->channel_norm, spec, data);
        break;
    case LTN_SLOT_THETA:
        layer->attention.theta = data;
        break;
    case LTN_SLOT_QKV:
        put_linear(&layer->qkv, spec, matrix);
        break;
    case LTN_SLOT_GATE0:
        put_linear(&layer->gate0, spec, matrix);
        break;
    case LTN_SLOT_GATE1:
        put_linear(&layer->gate1, spec, matrix);
        break;
    case LTN_SLOT_OUT:
        put_linear(&layer->out, spec, matrix);
        break;
    case LTN_SLOT_L1:
        put_linear(&layer->l1, spec, matrix);
        break;
    case LTN_SLOT_L2:
        put_linear(&layer->l2, spec, matrix);
        break;
    case LTN_SLOT_L3:
        put_linear(&layer->l3, spec, matrix);
        break;
    }
}

static size_t attention_bytes(const struct ltn_config *config)
{
    return (size_t)config->n_layers * align_up((size_t)config->n_heads * sizeof(float));
}

/* What of the attention is no tensor: sizes and slopes, which go to *next. */
static enum ltn_status put_attention(struct ltn_model *model, uint8_t **next, struct ltn_error *err)
{
    const struct ltn_config *config = &model->config;
    float slopes[LTN_MAX_HEADS];

    for (int32_t l = 0; l < config->n_layers; l++) {
        struct ltn_attention *a = &model->layers[l].attention;
        const size_t bytes = (size_t)config->n_heads * sizeof(float);
        ltn_slopes(slopes, config->n_heads, l, config->n_layers);
        LTN_TRY(model->be->ops->upload(model->be, *next, slopes, bytes, err));
        a->n_heads = config->n_heads;
        a->head_dim = config->head_dim;
        a->slopes = (const float *)*next;
        a->state_offset = ltn_state_offset(config, l);
        *next += align_up(bytes);
    }
    return LTN_OK;
}

/* Matrices on their way to the backend: the run that has not been sent yet. */
struct loading {
    struct ltn_backend *be;
    const struct ltn_checkpoint *checkpoint;
    uint8_t *next; /* free part of the arena */
    uint8_t *dst;
    const uint8_t *src;
    size_t bytes;
    float *stage; /* room for the largest vector */
};

static enum ltn_status flush(struct loading *l, struct ltn_error *err)
{
    const size_t bytes = l->bytes;
    l->bytes = 0;
    return bytes ? l->be->ops->upload(l->be, l->dst, l->src, bytes, err) : LTN_OK;
}

/* Copies a tensor to the backend, vectors widened to f32 on the way. */
static enum ltn_status send(struct loading *l, uint8_t *dst, const struct ltn_tensor_spec *spec,
                            const struct ltn_st_tensor *t, const uint8_t *src, struct ltn_error *err)
{
    float *stage = l->stage;
    if (spec->is_matrix) {
        if (l->bytes >= RUN_BYTES || l->dst + l->bytes != dst || l->src + l->bytes != src)
            LTN_TRY(flush(l, err));
        if (l->bytes == 0) {
            l->dst = dst;
            l->src = src;
        }
        l->bytes += t->bytes;
        return LTN_OK;
    }
    enum ltn_dtype dtype;
    ltn_checkpoint_dtype(&dtype, t->dtype);
    size_t n = count_of(spec);
    for (size_t i = 0; i < n; i++) {
        /* A small tensor may lie unaligned in the file. */
        uint32_t word = 0;
        memcpy(&word, src + i * ltn_dtype_size(dtype), ltn_dtype_size(dtype));
        stage[i] = ltn_load(&word, dtype, 0);
    }
    return l->be->ops->upload(l->be, dst, stage, n * sizeof(float), err);
}

/* *at: the tensor as the backend sees it. */
static enum ltn_status place(const void **at, struct loading *l, const struct ltn_tensor_spec *spec,
                             const struct ltn_st_tensor *t, struct ltn_error *err)
{
    const uint8_t *src = l->checkpoint->file.map + t->offset;
    *at = src;
    if (usable_in_place(l->be, spec, t))
        return LTN_OK;
    *at = l->next;
    LTN_TRY(send(l, l->next, spec, t, src, err));
    l->next += arena_bytes(l->be, spec, t);
    return LTN_OK;
}

static enum ltn_status load(struct ltn_model *model, const struct ltn_checkpoint *ck,
                            void (*progress)(void *ctx, uint64_t done, uint64_t total), void *ctx,
                            float *stage, struct ltn_error *err)
{
    const struct ltn_config *config = &model->config;
    struct ltn_backend *be = model->be;
    size_t arena = attention_bytes(config);
    uint64_t done = 0, total = 0;

    for (size_t i = 0; i < ck->n_specs; i++) {
        const struct ltn_tensor_spec *spec = &ck->specs[i];
        enum ltn_dtype dtype = ltn_checkpoint_matrix_dtype(ck->dtype, spec);
        if (spec->is_matrix && !(be->dtypes >> dtype & 1))
            return ltn_fail(err, LTN_ERR_UNSUPPORTED, "%s: tensor \"%s\" is %s, which %s does not have",
                            ck->file.path, spec->name, ltn_dtype_name(dtype), be->name);
        arena += arena_bytes(be, spec, ck->tensors[i]) + arena_bytes(be, spec, ck->scales[i]);
        total += ck->tensors[i]->bytes + (ck->scales[i] ? ck->scales[i]->bytes : 0);
    }
    LTN_TRY(be->ops->alloc(be, &model->arena, arena, err));

    struct loading l = {.be = be, .checkpoint = ck, .next = model->arena, .stage = stage};
    LTN_TRY(put_attention(model, &l.next, err));
    for (size_t i = 0; i < ck->n_specs; i++) {
        const struct ltn_tensor_spec *spec = &ck->specs[i];
        struct ltn_matrix matrix = {.dtype = ltn_checkpoint_matrix_dtype(ck->dtype, spec),
                                    .rows = (int32_t)spec->shape[0],
                                    .cols = (int32_t)spec->shape[1]};
        LTN_TRY(place(&matrix.data, &l, spec, ck->tensors[i], err));
        if (ck->scales[i])
            LTN_TRY(place(&matrix.scales, &l, spec, ck->scales[i], err));
        put(model, spec, &matrix);
        done += ck->tensors[i]->bytes + (ck->scales[i] ? ck->scales[i]->bytes : 0);
        if (progress)
            progress(ctx, done - l.bytes, total);
    }
    LTN_TRY(flush(&l, err));
    if (progress)
        progress(ctx, total, total);
    if (config->tied)
        model->head = model->embed;
    return be->ops->sync(be, err);
}

enum ltn_status ltn_model_load(struct ltn_model *model, const struct ltn_checkpoint *checkpoint,
                               struct ltn_backend *be,
                               void (*progress)(void *ctx, uint64_t done, uint64_t total), void *ctx,
                               struct ltn_error *err)
{
    size_t widest = LTN_MAX_DIM; /* floats in the largest vector: a norm or bias is at most 4H long */
    for (size_t i = 0; i < checkpoint->n_specs; i++)
        if (!checkpoint->specs[i].is_matrix && count_of(&checkpoint->specs[i]) > widest)
            widest = count_of(&checkpoint->specs[i]);
    float *stage = malloc(widest * sizeof *stage);

    *model = (struct ltn_model){.config = checkpoint->config, .be = be};
    model->layers = calloc((size_t)model->config.n_layers, sizeof *model->layers);
    enum ltn_status status = stage && model->layers
                                 ? load(model, checkpoint, progress, ctx, stage, err)
                                 : ltn_fail(err, LTN_ERR_MEMORY, "no memory for the model's layer table");
    free(stage);
    if (status != LTN_OK)
        ltn_model_free(model);
    return status;
}

/* ---- random weights ------------------------------------------------------------------------------------ */

/* Memory of one kind of element: the weights or codes of a dtype, or the scales that go with it. */
struct region {
    enum ltn_dtype dtype;
    bool is_scales;
    size_t bytes;
    uint8_t *next;
};

enum { N_REGIONS = 2 * LTN_N_DTYPES };

/* Element i of a block: normal with standard deviation 0.02; codes with one that fits them, and scales, here
 * all the same, that make it 0.02. */
static void put_random(uint8_t *block, size_t i, const struct region *r, double normal)
{
    static const double spread[LTN_N_DTYPES] = {[LTN_Q8] = 40, [LTN_FP8] = 100, [LTN_Q4] = 2.5};
    const enum ltn_dtype dtype = r->is_scales ? ltn_scale_dtype(r->dtype) : r->dtype;
    const float x = (float)(r->is_scales ? 0.02 / spread[r->dtype] : 0.02 * normal);
    float unused;
    if (ltn_is_quantised(dtype)) {
        const int code = ltn_quant_code(dtype, (float)(spread[dtype] * normal), 1, &unused);
        block[i] = (uint8_t)(dtype == LTN_Q4 ? (code & 15) * 17 : code);
    } else {
        const uint16_t half = dtype == LTN_BF16 ? ltn_f32_to_bf16(x) : ltn_f32_to_f16(x);
        memcpy(block + i * ltn_dtype_size(dtype), dtype == LTN_F32 ? (const void *)&x : &half,
               ltn_dtype_size(dtype));
    }
}

/* Fills a region: a block made here, then pieces of it from places that never fall on the same columns of a
 * matrix, so that 14 GB take no longer than to copy them. */
static enum ltn_status fill(struct ltn_backend *be, const struct region *r, struct ltn_error *err)
{
    enum { BLOCK = 16 << 20, SHIFT = ALIGN * 1021 };
    const enum ltn_dtype dtype = r->is_scales ? ltn_scale_dtype(r->dtype) : r->dtype;
    const size_t size = ltn_is_quantised(dtype) ? 1 : ltn_dtype_size(dtype);
    size_t done = r->bytes < BLOCK ? r->bytes : BLOCK;
    if (done == 0)
        return LTN_OK;
    uint8_t *block = malloc(BLOCK);
    if (!block)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for random weights");
    for (size_t i = 0; i < done / size; i++) {
        uint32_t counter[4] = {(uint32_t)i};
        ltn_philox(counter, 1, 0);
        const double radius = sqrt(-2 * log((counter[0] + 1.0) * 0x1p-32)); /* Box and Muller */
        put_random(block, i, r, radius * cos(0x1p-31 * M_PI * counter[1]));
    }
    enum ltn_status status = be->ops->upload(be, r->next, block, done, err);
    free(block);
    for (size_t i = 1, piece; status == LTN_OK && done < r->bytes; i++, done += piece) {
        const size_t from = i * SHIFT % (BLOCK / 2);
        piece = r->bytes - done < BLOCK / 2 ? r->bytes - done : BLOCK / 2;
        status = be->ops->copy(be, r->next + done, r->next + from, piece, err);
    }
    return status;
}

static size_t spec_bytes(const struct ltn_tensor_spec *spec, enum ltn_dtype dtype)
{
    if (!spec->is_matrix)
        return align_up(count_of(spec) * sizeof(float));
    return align_up((size_t)spec->shape[0] * ltn_row_bytes(dtype, (size_t)spec->shape[1]));
}

static size_t scales_bytes(const struct ltn_tensor_spec *spec, enum ltn_dtype dtype)
{
    return align_up((size_t)spec->shape[0] * ltn_row_scale_bytes(dtype, (size_t)spec->shape[1]));
}

static enum ltn_status make_random(struct ltn_model *model, const struct ltn_tensor_spec *specs,
                                   size_t n_specs, enum ltn_dtype dtype, struct ltn_error *err)
{
    struct ltn_backend *be = model->be;
    struct region regions[N_REGIONS];
    size_t all = attention_bytes(&model->config);

    for (int i = 0; i < N_REGIONS; i++)
        regions[i] = (struct region){(enum ltn_dtype)(i / 2), i % 2, 0, NULL};
    for (size_t i = 0; i < n_specs; i++) {
        const enum ltn_dtype own =
            specs[i].is_matrix ? ltn_checkpoint_matrix_dtype(dtype, &specs[i]) : LTN_F32;
        regions[2 * own].bytes += spec_bytes(&specs[i], own);
        regions[2 * own + 1].bytes += specs[i].is_matrix ? scales_bytes(&specs[i], own) : 0;
    }
    for (int i = 0; i < N_REGIONS; i++)
        all += regions[i].bytes;
    LTN_TRY(be->ops->alloc(be, &model->arena, all, err));
    uint8_t *rest = model->arena;
    for (int i = 0; i < N_REGIONS; i++) {
        regions[i].next = rest;
        rest += regions[i].bytes;
        LTN_TRY(fill(be, &regions[i], err));
    }
    LTN_TRY(put_attention(model, &rest, err));
    for (size_t i = 0; i < n_specs; i++) {
        const struct ltn_tensor_spec *spec = &specs[i];
        struct ltn_matrix m = {.dtype = spec->is_matrix ? ltn_checkpoint_matrix_dtype(dtype, spec) : LTN_F32,
                               .rows = (int32_t)spec->shape[0],
                               .cols = (int32_t)spec->shape[1]};
        struct region *data = &regions[2 * m.dtype], *scales = data + 1;
        m.data = data->next;
        data->next += spec_bytes(spec, m.dtype);
        if (spec->is_matrix && ltn_is_quantised(m.dtype)) {
            m.scales = scales->next;
            scales->next += scales_bytes(spec, m.dtype);
        }
        put(model, spec, &m);
    }
    if (model->config.tied)
        model->head = model->embed;
    return be->ops->sync(be, err);
}

enum ltn_status ltn_model_random(struct ltn_model *model, const struct ltn_config *config,
                                 enum ltn_dtype dtype, struct ltn_backend *be, struct ltn_error *err)
{
    struct ltn_tensor_spec *specs;
    size_t n_specs;

    *model = (struct ltn_model){0};
    LTN_TRY(ltn_config_tensors(config, &specs, &n_specs, err));
    *model = (struct ltn_model){.config = *config, .be = be};
    model->layers = calloc((size_t)config->n_layers, sizeof *model->layers);
    enum ltn_status status = model->layers
                                 ? make_random(model, specs, n_specs, dtype, err)
                                 : ltn_fail(err, LTN_ERR_MEMORY, "no memory for the model's layer table");
    free(specs);
    if (status != LTN_OK)
        ltn_model_free(model);
    return status;
}

/* ---- reading --------------------------------------------------------------------------------------------
 */

int32_t ltn_model_chunk_rows(const struct ltn_model *model)
{
    enum { WHOLE = 256 }; /* fewer rows than the backend's most come in multiples of this: whole tiles */
    const int64_t most = model->be->chunk_rows, values = model->be->chunk_values;
    const int64_t rows = values ? values / model->config.embed_dim : most;
    if (rows >= most)
        return (int32_t)most;
    return (int32_t)(rows < 1 ? 1 : rows < WHOLE ? rows : rows / WHOLE * WHOLE);
}

/* ---- fp8 for prefill ----------------------------------------------------------------------------------- */

/* The maps that prefill spends its time in. TNL3's low-rank gate is not worth it. */
enum { FP8_MAPS = 5 };

static void fp8_maps(struct ltn_linear *maps[FP8_MAPS], struct ltn_layer *layer)
{
    maps[0] = &layer->qkv;
    maps[1] = &layer->out;
    maps[2] = &layer->l1;
    maps[3] = &layer->l2;
    maps[4] = &layer->l3;
}

static size_t fp8_bytes(const struct ltn_matrix *w)
{
    return w->dtype == LTN_FP8
               ? 0
               : align_up((size_t)w->rows * (size_t)w->cols) + align_up((size_t)w->rows * sizeof(float));
}

static enum ltn_status fill_fp8(struct ltn_model *model, struct ltn_error *err)
{
    struct ltn_linear *maps[FP8_MAPS];
    uint8_t *next = model->fp8_arena;

    for (int32_t l = 0; l < model->config.n_layers; l++) {
        fp8_maps(maps, &model->layers[l]);
        for (int i = 0; i < FP8_MAPS; i++) {
            const struct ltn_matrix *w = &maps[i]->w;
            if (w->dtype == LTN_FP8) {
                maps[i]->fp8 = *w;
                continue;
            }
            const struct ltn_matrix fp8 = {next, LTN_FP8, w->rows, w->cols,
                                           next + align_up((size_t)w->rows * (size_t)w->cols)};
            LTN_TRY(model->be->ops->matrix_fp8(model->be, &fp8, w, err));
            maps[i]->fp8 = fp8;
            next += fp8_bytes(w);
        }
    }
    return model->be->ops->sync(model->be, err);
}

enum ltn_status ltn_model_prefill_fp8(struct ltn_model *model, struct ltn_error *err)
{
    struct ltn_linear *maps[FP8_MAPS];
    size_t bytes = 0;

    if (!model->be->ops->matrix_fp8)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "prefill in fp8: %s does not have it", model->be->name);
    for (int32_t l = 0; l < model->config.n_layers; l++) {
        fp8_maps(maps, &model->layers[l]);
        for (int i = 0; i < FP8_MAPS; i++)
            bytes += fp8_bytes(&maps[i]->w);
    }
    LTN_TRY(model->be->ops->alloc(model->be, &model->fp8_arena, bytes, err));
    enum ltn_status status = fill_fp8(model, err);
    if (status != LTN_OK) {
        for (int32_t l = 0; l < model->config.n_layers; l++) {
            fp8_maps(maps, &model->layers[l]);
            for (int i = 0; i < FP8_MAPS; i++)
                maps[i]->fp8 = (struct ltn_matrix){0};
        }
        model->be->ops->free(model->be, model->fp8_arena);
        model->fp8_arena = NULL;
    }
    return status;
}

void ltn_model_free(struct ltn_model *model)
{
    if (model->be) {
        model->be->ops->free(model->be, model->arena);
        model->be->ops->free(model->be, model->fp8_arena);
    }
    free(model->layers);
    *model = (struct ltn_model){0};
}
