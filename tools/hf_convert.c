#include "tools/hf_convert.h"

#include "model/checkpoint.h"
#include "tools/hf_config.h"
#include "tools/hf_tokenizer.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    PIECE = 1 << 19
}; /* elements; what is read stays in the cache while it is checked, hashed and written */

struct conversion {
    const struct ltn_convert_options *options;
    struct ltn_source source;
    struct ltn_hf_config hf;
    struct ltn_hf_tokenizer tokenizer;
    struct ltn_tensor_spec *specs;
    size_t n_specs;
    enum ltn_dtype matrices;
    bool mixed; /* the matrices are stored in several dtypes */
    /* Two readers' worth of each: raw elements as stored, and as floats. */
    uint8_t *raw[2]; /* [PIECE * 8] */
    float *f32[2];   /* [PIECE] */
    uint64_t done, total;
    struct ltn_error *err;
};

__attribute__((format(printf, 2, 3))) static void note(const struct conversion *c, const char *format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (c->options->note)
        c->options->note(c->options->ctx, text);
}

static enum ltn_status step(struct conversion *c, uint64_t bytes)
{
    c->done += bytes;
    if (!c->options->progress)
        return LTN_OK;
    enum ltn_status status = c->options->progress(c->options->ctx, c->done, c->total);
    return status == LTN_OK ? status : ltn_fail(c->err, status, "stopped");
}

/* ---- what goes into the file ---- */

static bool is_weight(enum ltn_st_dtype dtype)
{
    enum ltn_dtype unused;
    return dtype == LTN_ST_F64 || ltn_checkpoint_dtype(&unused, dtype);
}

static uint64_t count(const struct ltn_tensor_spec *spec)
{
    uint64_t n = 1;
    for (int32_t i = 0; i < spec->rank; i++)
        n *= (uint64_t)spec->shape[i];
    return n;
}

static enum ltn_status check_tensor(struct conversion *c, const struct ltn_tensor_spec *spec)
{
    const struct ltn_source_tensor *t = ltn_source_find(&c->source, spec->name);
    if (!t)
        return ltn_fail(c->err, LTN_ERR_INPUT, "%s: tensor \"%s\" is missing", c->source.dir, spec->name);
    if (!is_weight(t->dtype))
        return ltn_fail(c->err, LTN_ERR_INPUT, "%s: tensor \"%s\" is %s, expected F16, BF16, F32 or F64",
                        c->source.dir, spec->name, ltn_st_dtype_name(t->dtype));
    if (t->rank != spec->rank || memcmp(t->shape, spec->shape, (size_t)t->rank * sizeof *t->shape) != 0) {
        char found[128], expected[128];
        ltn_shape_print(found, sizeof found, t->shape, t->rank);
        ltn_shape_print(expected, sizeof expected, spec->shape, spec->rank);
        return ltn_fail(c->err, LTN_ERR_INPUT,
                        "%s: tensor \"%s\" has shape %s, expected %s after config.json", c->source.dir,
                        spec->name, found, expected);
    }
    return LTN_OK;
}

static void widen(float *out, const uint8_t *raw, enum ltn_st_dtype dtype, size_t n)
{
    enum ltn_dtype weight;
    if (!ltn_checkpoint_dtype(&weight, dtype)) {
        const double *f64 = (const double *)raw;
        for (size_t i = 0; i < n; i++)
            out[i] = (float)f64[i]; /* too large becomes infinity, which is looked for */
    } else if (weight == LTN_F32) {
        memcpy(out, raw, n * sizeof *out);
    } else if (weight == LTN_BF16) {
        for (size_t i = 0; i < n; i++)
            out[i] = ltn_bf16_to_f32(((const uint16_t *)raw)[i]);
    } else {
        for (size_t i = 0; i < n; i++)
            out[i] = ltn_f16_to_f32(((const uint16_t *)raw)[i]);
    }
}

/* True where both have the same values. */
static enum ltn_status equal(struct conversion *c, const struct ltn_source_tensor *a,
                             const struct ltn_source_tensor *b, bool *same)
{
    const struct ltn_source_tensor *tensors[2] = {a, b};
    struct ltn_source_reader *readers[2] = {NULL, NULL};
    enum ltn_status status = LTN_OK;
    uint64_t n = (uint64_t)a->shape[0] * (uint64_t)a->shape[1]; /* both have the shape that was checked */
    *same = true;
    if (ltn_source_same(a, b))
        return LTN_OK;
    for (int i = 0; i < 2 && status == LTN_OK; i++)
        status = ltn_source_reader_open(&readers[i], &c->source, tensors[i], c->err);
    for (uint64_t at = 0; at < n && *same && status == LTN_OK; at += PIECE) {
        size_t piece = n - at < PIECE ? (size_t)(n - at) : PIECE;
        for (int i = 0; i < 2 && status == LTN_OK; i++) {
            status = ltn_source_read(readers[i], c->raw[i], piece, c->err);
            if (status == LTN_OK)
                widen(c->f32[i], c->raw[i], tensors[i]->dtype, piece);
        }
        if (status == LTN_OK)
            *same = memcmp(c->f32[0], c->f32[1], piece * sizeof(float)) == 0;
    }
    ltn_source_reader_close(readers[0]);
    ltn_source_reader_close(readers[1]);
    return status;
}

/* Settles config.tied after the weights. */
static enum ltn_status decide_head(struct conversion *c)
{
    const struct ltn_config *config = &c->hf.config;
    struct ltn_tensor_spec head = {
        .name = "lm_head.weight", .rank = 2, .shape = {config->vocab_size, config->embed_dim}};
    struct ltn_tensor_spec embed = head;
    snprintf(embed.name, sizeof embed.name, "model.embed_tokens.weight");
    const struct ltn_source_tensor *h = ltn_source_find(&c->source, head.name);
    LTN_TRY(check_tensor(c, &embed));
    if (!h)
        return config->tied ? LTN_OK
                            : ltn_fail(c->err, LTN_ERR_INPUT,
                                       "%s: tie_word_embeddings is false, but there is no lm_head.weight",
                                       c->source.dir);
    LTN_TRY(check_tensor(c, &head));
    bool same = false;
    LTN_TRY(equal(c, ltn_source_find(&c->source, embed.name), h, &same));
    if (config->tied && !same)
        return ltn_fail(
            c->err, LTN_ERR_INPUT,
            "%s: tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight",
            c->source.dir);
    c->hf.config.tied = same;
    return LTN_OK;
}

static enum ltn_status check_tensors(struct conversion *c)
{
    LTN_TRY(decide_head(c));
    LTN_TRY(ltn_config_tensors(&c->hf.config, &c->specs, &c->n_specs, c->err));
    bool first = true;
    enum ltn_st_dtype stored = LTN_ST_F32;
    for (size_t i = 0; i < c->n_specs; i++) {
        LTN_TRY(check_tensor(c, &c->specs[i]));
        if (!c->specs[i].is_matrix)
            continue;
        enum ltn_st_dtype dtype = ltn_source_find(&c->source, c->specs[i].name)->dtype;
        c->mixed |= !first && dtype != stored;
        stored = dtype;
        first = false;
    }
    if (c->mixed || !ltn_checkpoint_dtype(&c->matrices, stored))
        c->matrices = LTN_F32;
    if (c->options->has_dtype)
        c->matrices = c->options->dtype;
    for (size_t i = 0; i < c->source.n_tensors; i++) {
        const char *name = c->source.tensors[i].name;
        bool known = c->hf.config.tied && strcmp(name, "lm_head.weight") == 0;
        for (size_t k = 0; k < c->n_specs && !known; k++)
            known = strcmp(name, c->specs[k].name) == 0;
        if (!known)
            return ltn_fail(c->err, LTN_ERR_INPUT,
                            "%s: tensor \"%.100s\" is not one that a model of this config.json has",
                            c->source.dir, name);
    }
    return LTN_OK;
}

static enum ltn_dtype target(const struct conversion *c, const struct ltn_tensor_spec *spec,
                             enum ltn_st_dtype stored)
{
    enum ltn_dtype dtype = LTN_F32;
    if (spec->is_matrix)
        return c->matrices;
    return ltn_checkpoint_dtype(&dtype, stored) ? dtype : LTN_F32;
}

/* Where the weights came from: the directory's last name and the files, without what no text should contain.
 */
static char *provenance(const struct conversion *c)
{
    const char *dir = c->source.dir;
    size_t end = strlen(dir);
    while (end > 1 && dir[end - 1] == '/')
        end--;
    size_t begin = end;
    while (begin > 0 && dir[begin - 1] != '/')
        begin--;
    char *text;
    size_t n = c->source.n_files;
    const struct ltn_source_tensor *embed = ltn_source_find(&c->source, "model.embed_tokens.weight");
    if (asprintf(&text, "%.*s: %s%s%s, stored as %s; converted by ltn-convert %s", (int)(end - begin),
                 dir + begin, c->source.files[0].name, n > 1 ? " to " : "",
                 n > 1 ? c->source.files[n - 1].name : "", ltn_st_dtype_name(embed->dtype), LTN_VERSION) < 0)
        return NULL;
    for (char *p = text; *p; p++)
        if (*p < 0x20 || *p > 0x7e) /* the name of a directory may be anything, metadata must be UTF-8 */
            *p = '?';
    return text;
}

/* ---- the data ---- */

static enum ltn_status refuse_value(struct conversion *c, const struct ltn_source_tensor *t, uint64_t at,
                                    float value, enum ltn_dtype dtype)
{
    if (isfinite(value))
        return ltn_fail(c->err, LTN_ERR_INPUT,
                        "%s: tensor \"%s\", element %" PRIu64 ": %g is beyond the range of %s", c->source.dir,
                        t->name, at, (double)value, ltn_dtype_name(dtype));
    return ltn_fail(c->err, LTN_ERR_INPUT, "%s: tensor \"%s\", element %" PRIu64 ": %g is not a finite %s",
                    c->source.dir, t->name, at, (double)value, t->dtype == LTN_ST_F64 ? "F32" : "number");
}

/* Converts one piece that lies in raw[0]; *out is what to write. */
static enum ltn_status convert_piece(struct conversion *c, const struct ltn_source_tensor *t,
                                     enum ltn_dtype dtype, uint64_t at, size_t n, const void **out)
{
    enum ltn_dtype stored;
    if (ltn_checkpoint_dtype(&stored, t->dtype) && stored == dtype) {
        size_t bad = ltn_first_not_finite(c->raw[0], dtype, n);
        *out = c->raw[0];
        return bad == n ? LTN_OK : refuse_value(c, t, at + bad, ltn_load(c->raw[0], dtype, bad), dtype);
    }
    widen(c->f32[0], c->raw[0], t->dtype, n);
    *out = c->f32[0];
    if (dtype != LTN_F32) {
        uint16_t *half = (uint16_t *)c->raw[1];
        if (dtype == LTN_BF16)
            for (size_t i = 0; i < n; i++)
                half[i] = ltn_f32_to_bf16(c->f32[0][i]);
        else
            for (size_t i = 0; i < n; i++)
                half[i] = ltn_f32_to_f16(c->f32[0][i]);
        *out = half;
    }
    size_t bad = ltn_first_not_finite(*out, dtype, n);
    return bad == n ? LTN_OK : refuse_value(c, t, at + bad, c->f32[0][bad], dtype);
}

static enum ltn_status copy_tensor(struct conversion *c, struct ltn_st_writer *writer,
                                   const struct ltn_tensor_spec *spec)
{
    const struct ltn_source_tensor *t = ltn_source_find(&c->source, spec->name);
    enum ltn_dtype dtype = target(c, spec, t->dtype);
    struct ltn_source_reader *reader;
    uint64_t n = count(spec);
    LTN_TRY(ltn_source_reader_open(&reader, &c->source, t, c->err));
    enum ltn_status status = LTN_OK;
    for (uint64_t at = 0; at < n && status == LTN_OK; at += PIECE) {
        size_t piece = n - at < PIECE ? (size_t)(n - at) : PIECE, bytes = piece * ltn_dtype_size(dtype);
        const void *data = NULL;
        status = ltn_source_read(reader, c->raw[0], piece, c->err);
        if (status == LTN_OK)
            status = convert_piece(c, t, dtype, at, piece, &data);
        if (status == LTN_OK)
            status = ltn_st_write(writer, data, bytes, c->err);
        if (status == LTN_OK)
            status = step(c, bytes);
    }
    ltn_source_reader_close(reader);
    return status;
}

static enum ltn_status write_file(struct conversion *c, const char *path, struct ltn_st_tensor *tensors,
                                  uint64_t *bytes, size_t *order, const char *config, const char *from)
{
    static const enum ltn_st_dtype st_dtypes[] = {
        [LTN_F32] = LTN_ST_F32, [LTN_BF16] = LTN_ST_BF16, [LTN_F16] = LTN_ST_F16};
    const char *metadata[] = {
        "format",     "ltn",
        "version",    "1",
        "config",     config,
        "dtype",      ltn_checkpoint_dtype_key(c->matrices),
        "checksum",   "00000000000000000000000000000000",
        "tokenizer",  c->tokenizer.json ? c->tokenizer.json : "",
        "provenance", from,
    };
    size_t n = c->n_specs;
    for (size_t i = 0; i < n; i++) {
        const struct ltn_source_tensor *t = ltn_source_find(&c->source, c->specs[i].name);
        bytes[i] = count(&c->specs[i]) * ltn_dtype_size(target(c, &c->specs[i], t->dtype));
        c->total += bytes[i];
    }
    ltn_checkpoint_order(order, bytes, n);
    for (size_t i = 0; i < n; i++) {
        const struct ltn_tensor_spec *spec = &c->specs[order[i]];
        const struct ltn_source_tensor *t = ltn_source_find(&c->source, spec->name);
        tensors[i] = (struct ltn_st_tensor){.name = spec->name,
                                            .dtype = st_dtypes[target(c, spec, t->dtype)],
                                            .rank = spec->rank,
                                            .bytes = bytes[order[i]]};
        memcpy(tensors[i].shape, spec->shape, sizeof spec->shape);
    }
    if (c->tokenizer.model)
        tensors[n++] = (struct ltn_st_tensor){.name = "tokenizer",
                                              .dtype = LTN_ST_U8,
                                              .rank = 1,
                                              .shape = {(int64_t)c->tokenizer.bytes},
                                              .bytes = c->tokenizer.bytes};
    struct ltn_st_writer *writer;
    LTN_TRY(
        ltn_st_create(&writer, path, tensors, n, metadata, sizeof metadata / sizeof *metadata / 2, c->err));
    enum ltn_status status = LTN_OK;
    for (size_t i = 0; i < c->n_specs && status == LTN_OK; i++)
        status = copy_tensor(c, writer, &c->specs[order[i]]);
    if (status == LTN_OK && c->tokenizer.model)
        status = ltn_st_write(writer, c->tokenizer.model, c->tokenizer.bytes, c->err);
    if (status == LTN_OK)
        return ltn_st_finish(writer, c->err);
    ltn_st_abandon(writer);
    return status;
}

/* What the user should know of a conversion that went well. */
static void tell(const struct conversion *c)
{
    const char *dir = c->source.dir;
    if (c->mixed && !c->options->has_dtype)
        note(c, "%s: matrices of several dtypes, all became F32", dir);
    if (!c->hf.act_known)
        note(c, "%s: linear_act_fun \"%s\" is unknown, which means the identity in the official code", dir,
             c->hf.act_name);
    if (!c->tokenizer.model)
        note(c, "%s: no tokenizer.model and no *.tiktoken, so the .ltn takes token ids only (--tokens)", dir);
    if (c->tokenizer.beyond)
        note(c, "%s: %d added tokens left out, their ids are not below the vocabulary's %d", dir,
             c->tokenizer.beyond, c->hf.config.vocab_size);
}

static enum ltn_status convert(struct conversion *c, const char *dir, const char *path)
{
    for (int i = 0; i < 2; i++) {
        c->raw[i] = malloc(PIECE * sizeof(double));
        c->f32[i] = malloc(PIECE * sizeof(float));
        if (!c->raw[i] || !c->f32[i])
            return ltn_fail(c->err, LTN_ERR_MEMORY, "no memory for buffers");
    }
    LTN_TRY(ltn_source_open(&c->source, dir, c->err));
    LTN_TRY(ltn_hf_config_read(&c->hf, &c->source, c->err));
    LTN_TRY(check_tensors(c));
    LTN_TRY(ltn_hf_tokenizer_read(&c->tokenizer, dir, c->hf.config.vocab_size, c->err));

    struct ltn_st_tensor *tensors = calloc(c->n_specs + 1, sizeof *tensors);
    uint64_t *bytes = calloc(c->n_specs, sizeof *bytes);
    size_t *order = calloc(c->n_specs, sizeof *order);
    char *config = ltn_config_print(&c->hf.config), *from = provenance(c);
    enum ltn_status status = tensors && bytes && order && config && from
                                 ? write_file(c, path, tensors, bytes, order, config, from)
                                 : ltn_fail(c->err, LTN_ERR_MEMORY, "no memory for %zu tensors", c->n_specs);
    free(tensors);
    free(bytes);
    free(order);
    free(config);
    free(from);
    if (status == LTN_OK)
        tell(c);
    return status;
}

enum ltn_status ltn_hf_convert(const char *dir, const char *path, const struct ltn_convert_options *options,
                               struct ltn_error *err)
{
    struct conversion c = {.options = options, .err = err};
    enum ltn_status status = convert(&c, dir, path);
    for (int i = 0; i < 2; i++) {
        free(c.raw[i]);
        free(c.f32[i]);
    }
    free(c.specs);
    ltn_hf_tokenizer_free(&c.tokenizer);
    ltn_source_close(&c.source);
    return status;
}
