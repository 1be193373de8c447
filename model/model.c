#include "model/model.h"

#include <stdlib.h>
#include <string.h>

/* Weights are staged through a host buffer of this size on their way to a device. */
enum { STAGE_BYTES = 16 << 20, ALIGN = 64 };

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

/* Copies a tensor to the backend, vectors widened to f32 on the way. */
static enum ltn_status send(struct ltn_backend *be, void *dst, const struct ltn_tensor_spec *spec,
                            const struct ltn_st_tensor *t, const uint8_t *src, float *stage,
                            struct ltn_error *err)
{
    if (spec->is_matrix) {
        for (uint64_t done = 0; done < t->bytes; done += STAGE_BYTES) {
            uint64_t n = t->bytes - done < STAGE_BYTES ? t->bytes - done : STAGE_BYTES;
            LTN_TRY(be->ops->upload(be, (uint8_t *)dst + done, src + done, n, err));
        }
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
    return be->ops->upload(be, dst, stage, n * sizeof(float), err);
}

/* *at: the tensor as the backend sees it; *next: the free part of the arena. */
static enum ltn_status place(const void **at, uint8_t **next, struct ltn_backend *be,
                             const struct ltn_checkpoint *ck, const struct ltn_tensor_spec *spec,
                             const struct ltn_st_tensor *t, float *stage, struct ltn_error *err)
{
    const uint8_t *src = ck->file.map + t->offset;
    *at = src;
    if (usable_in_place(be, spec, t))
        return LTN_OK;
    *at = *next;
    LTN_TRY(send(be, *next, spec, t, src, stage, err));
    *next += arena_bytes(be, spec, t);
    return LTN_OK;
}

static enum ltn_status load(struct ltn_model *model, const struct ltn_checkpoint *ck,
                            void (*progress)(void *ctx, uint64_t done, uint64_t total), void *ctx,
                            float *stage, struct ltn_error *err)
{
    const struct ltn_config *config = &model->config;
    struct ltn_backend *be = model->be;
    size_t slopes_bytes = align_up((size_t)config->n_heads * sizeof(float));
    size_t arena = (size_t)config->n_layers * slopes_bytes;
    uint64_t done = 0, total = 0;

    for (size_t i = 0; i < ck->n_specs; i++) {
        const struct ltn_tensor_spec *spec = &ck->specs[i];
        enum ltn_dtype dtype = ltn_checkpoint_matrix_dtype(ck->dtype, spec);
        if (spec->is_matrix && !(be->dtypes >> dtype & 1))
            return ltn_fail(err, LTN_ERR_UNSUPPORTED, "%s: tensor \"%s\" is %s, which %s does not have",
                            ck->file.path, spec->name, ltn_dtype_name(dtype), be->name);
        arena += arena_bytes(be, spec, ck->tensors[i]) + arena_bytes(be, spec, ck->scales[i]);
        total += ck->tensors[i]->bytes;
    }
    LTN_TRY(be->ops->alloc(be, &model->arena, arena, err));

    uint8_t *next = model->arena;
    for (int32_t l = 0; l < config->n_layers; l++) {
        struct ltn_attention *a = &model->layers[l].attention;
        ltn_slopes(stage, config->n_heads, l, config->n_layers);
        LTN_TRY(be->ops->upload(be, next, stage, (size_t)config->n_heads * sizeof(float), err));
        a->n_heads = config->n_heads;
        a->head_dim = config->head_dim;
        a->slopes = (const float *)next;
        a->state_offset = ltn_state_offset(config, l);
        next += slopes_bytes;
    }
    for (size_t i = 0; i < ck->n_specs; i++) {
        const struct ltn_tensor_spec *spec = &ck->specs[i];
        struct ltn_matrix matrix = {.dtype = ltn_checkpoint_matrix_dtype(ck->dtype, spec),
                                    .rows = (int32_t)spec->shape[0],
                                    .cols = (int32_t)spec->shape[1]};
        LTN_TRY(place(&matrix.data, &next, be, ck, spec, ck->tensors[i], stage, err));
        if (ck->scales[i])
            LTN_TRY(place(&matrix.scales, &next, be, ck, spec, ck->scales[i], stage, err));
        put(model, spec, &matrix);
        done += ck->tensors[i]->bytes;
        if (progress)
            progress(ctx, done, total);
    }
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

/* ---- fp8 for prefill ------------------------------------------------------------------------------------
 */

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
