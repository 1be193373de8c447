#include "model/checkpoint.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <xxhash.h>

static const char *const keys[] = {"format",   "version",   "config",    "dtype",
                                   "checksum", "tokenizer", "provenance"};
enum { N_KEYS = sizeof keys / sizeof *keys };

static const char *const dtype_keys[LTN_N_DTYPES] = {
    [LTN_F32] = "f32", [LTN_BF16] = "bf16", [LTN_F16] = "f16",
    [LTN_Q8] = "q8",   [LTN_FP8] = "fp8",   [LTN_Q4] = "q4"};

const char *ltn_checkpoint_dtype_key(enum ltn_dtype dtype)
{
    return dtype_keys[dtype];
}

bool ltn_checkpoint_dtype_from_key(enum ltn_dtype *out, const char *key)
{
    for (int d = 0; d < LTN_N_DTYPES; d++) {
        *out = (enum ltn_dtype)d;
        if (strcmp(key, dtype_keys[d]) == 0)
            return true;
    }
    return false;
}

bool ltn_checkpoint_dtype(enum ltn_dtype *out, enum ltn_st_dtype dtype)
{
    *out = dtype == LTN_ST_F32 ? LTN_F32 : dtype == LTN_ST_BF16 ? LTN_BF16 : LTN_F16;
    return dtype == LTN_ST_F32 || dtype == LTN_ST_BF16 || dtype == LTN_ST_F16;
}

enum ltn_dtype ltn_checkpoint_matrix_dtype(enum ltn_dtype file, const struct ltn_tensor_spec *spec)
{
    bool keeps_8_bits = spec->slot == LTN_SLOT_EMBED || spec->slot == LTN_SLOT_HEAD ||
                        spec->slot == LTN_SLOT_GATE0 || spec->slot == LTN_SLOT_GATE1;
    return ltn_is_quantised(file) && keeps_8_bits ? LTN_Q8 : file;
}

static const enum ltn_st_dtype st_dtypes[LTN_N_DTYPES] = {
    [LTN_F32] = LTN_ST_F32, [LTN_BF16] = LTN_ST_BF16,   [LTN_F16] = LTN_ST_F16,
    [LTN_Q8] = LTN_ST_I8,   [LTN_FP8] = LTN_ST_F8_E4M3, [LTN_Q4] = LTN_ST_U8};

enum ltn_status ltn_checkpoint_stored(struct ltn_stored **stored, size_t *n,
                                      const struct ltn_tensor_spec *specs, size_t n_specs,
                                      enum ltn_dtype dtype, struct ltn_error *err)
{
    size_t count = 0;
    *n = 0;
    struct ltn_stored *list = *stored = calloc(2 * n_specs, sizeof *list);
    if (!list)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for the names of %zu tensors", 2 * n_specs);
    for (size_t i = 0; i < n_specs; i++) {
        const struct ltn_tensor_spec *spec = &specs[i];
        enum ltn_dtype matrix = ltn_checkpoint_matrix_dtype(dtype, spec);
        struct ltn_stored *t = &list[count++];
        *t = (struct ltn_stored){
            .spec = i, .dtype = spec->is_matrix ? st_dtypes[matrix] : LTN_ST_F32, .rank = spec->rank};
        snprintf(t->name, sizeof t->name, "%s", spec->name);
        memcpy(t->shape, spec->shape, sizeof t->shape);
        if (spec->is_matrix && matrix == LTN_Q4)
            t->shape[1] = (int64_t)ltn_row_bytes(LTN_Q4, (size_t)spec->shape[1]);
        t->bytes = ltn_st_dtype_size(t->dtype);
        for (int32_t d = 0; d < t->rank; d++)
            t->bytes *= (uint64_t)t->shape[d];
        if (!spec->is_matrix || !ltn_is_quantised(matrix))
            continue;
        size_t per_row = ltn_row_scales(matrix, (size_t)spec->shape[1]);
        t = &list[count++];
        *t = (struct ltn_stored){.spec = i,
                                 .is_scales = true,
                                 .dtype = st_dtypes[ltn_scale_dtype(matrix)],
                                 .rank = 2,
                                 .shape = {spec->shape[0], (int64_t)per_row}};
        snprintf(t->name, sizeof t->name, "%s.scales", spec->name);
        t->bytes = (uint64_t)spec->shape[0] * ltn_row_scale_bytes(matrix, (size_t)spec->shape[1]);
    }
    *n = count;
    return LTN_OK;
}

void ltn_checkpoint_order(size_t *order, const uint64_t *bytes, size_t n)
{
    size_t placed = 0;
    for (int odd = 0; odd < 2; odd++)
        for (size_t i = 0; i < n; i++)
            if ((bytes[i] % 64 != 0) == odd)
                order[placed++] = i;
}

void ltn_shape_print(char *text, size_t size, const int64_t *shape, int32_t rank)
{
    size_t used = (size_t)snprintf(text, size, "[");
    for (int32_t i = 0; i < rank && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%" PRId64, i ? ", " : "", shape[i]);
    if (used < size)
        snprintf(text + used, size - used, "]");
}

/* ---- opening ---- */

static enum ltn_status read_metadata(struct ltn_checkpoint *c, struct ltn_error *err)
{
    const struct ltn_st_file *f = &c->file;
    const char *format = ltn_st_metadata(f, "format"), *version = ltn_st_metadata(f, "version");
    if (!format || strcmp(format, "ltn") != 0)
        return ltn_fail(
            err, LTN_ERR_INPUT, "%s: not a .ltn file: its metadata says format \"%.40s\", expected \"ltn\"%s",
            f->path, format ? format : "", format ? "" : " (tools/convert makes one from a checkpoint)");
    if (!version || strcmp(version, "1") != 0)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: version \"%.40s\" of the format, this program reads \"1\"",
                        f->path, version ? version : "");
    for (int i = 0; i < N_KEYS; i++)
        if (!ltn_st_metadata(f, keys[i]))
            return ltn_fail(err, LTN_ERR_INPUT, "%s: metadata \"%s\" is missing", f->path, keys[i]);
    for (size_t i = 0; i < f->n_metadata; i++) {
        int k = 0;
        while (k < N_KEYS && strcmp(f->metadata[2 * i], keys[k]) != 0)
            k++;
        if (k == N_KEYS)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: unknown metadata \"%.100s\"", f->path,
                            f->metadata[2 * i]);
    }

    const char *dtype = ltn_st_metadata(f, "dtype");
    if (!ltn_checkpoint_dtype_from_key(&c->dtype, dtype))
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: metadata dtype is \"%.40s\", expected f32, bf16, f16, q8, fp8 or q4", f->path,
                        dtype);

    c->checksum = ltn_st_metadata(f, "checksum");
    if (strlen(c->checksum) != 32 || strspn(c->checksum, "0123456789abcdef") != 32)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: metadata checksum is \"%.40s\", expected 32 hexadecimal digits in lower case",
                        f->path, c->checksum);
    c->tokenizer_json = ltn_st_metadata(f, "tokenizer");

    struct ltn_error inner;
    enum ltn_status status = ltn_config_parse(&c->config, ltn_st_metadata(f, "config"), &inner);
    return status == LTN_OK ? status : ltn_fail(err, status, "%s: %s", f->path, inner.text);
}

/* Tensor number i of the file is not `expected` (NULL: the file should have ended): why? */
static enum ltn_status wrong_name(const struct ltn_checkpoint *c, const struct ltn_stored *stored, size_t n,
                                  size_t i, const char *expected, struct ltn_error *err)
{
    const struct ltn_st_file *f = &c->file;
    if (expected && !ltn_st_find(f, expected))
        return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%s\" is missing", f->path, expected);
    for (size_t k = 0; k < f->n_tensors; k++) {
        const char *name = f->tensors[k].name;
        bool known = c->tokenizer_json[0] && strcmp(name, "tokenizer") == 0;
        for (size_t s = 0; s < n && !known; s++)
            known = strcmp(name, stored[s].name) == 0;
        if (!known)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%.100s\" is not one that its configuration has",
                            f->path, name);
    }
    return ltn_fail(err, LTN_ERR_INPUT,
                    "%s: tensor number %zu is \"%.100s\", expected \"%.100s\": wrong order", f->path, i,
                    f->tensors[i].name, expected ? expected : "none");
}

static enum ltn_status check_tensor(struct ltn_checkpoint *c, const struct ltn_stored *s,
                                    const struct ltn_st_tensor *t, struct ltn_error *err)
{
    enum ltn_dtype dtype;
    if (!s->is_scales && !c->specs[s->spec].is_matrix) {
        if (!ltn_checkpoint_dtype(&dtype, t->dtype))
            return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%s\" is %s, expected F32, BF16 or F16",
                            c->file.path, s->name, ltn_st_dtype_name(t->dtype));
    } else if (t->dtype != s->dtype) {
        return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%s\" is %s, expected %s as the metadata says",
                        c->file.path, s->name, ltn_st_dtype_name(t->dtype), ltn_st_dtype_name(s->dtype));
    }
    if (t->rank != s->rank || memcmp(t->shape, s->shape, (size_t)s->rank * sizeof *s->shape) != 0) {
        char found[128], expected[128];
        ltn_shape_print(found, sizeof found, t->shape, t->rank);
        ltn_shape_print(expected, sizeof expected, s->shape, s->rank);
        return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%s\" has shape %s, expected %s", c->file.path,
                        s->name, found, expected);
    }
    (s->is_scales ? c->scales : c->tensors)[s->spec] = t;
    return LTN_OK;
}

static enum ltn_status check_all(struct ltn_checkpoint *c, const struct ltn_stored *stored, size_t n,
                                 size_t *order, uint64_t *bytes, struct ltn_error *err)
{
    const struct ltn_st_file *f = &c->file;
    size_t expected = n + (c->tokenizer_json[0] != 0);
    /* Where a tensor belongs follows from its size, and that from the dtype that the file gives it. */
    for (size_t i = 0; i < n; i++) {
        const struct ltn_st_tensor *t = f->n_tensors > expected ? NULL : ltn_st_find(f, stored[i].name);
        if (!t)
            return wrong_name(c, stored, n, 0, stored[i].name, err);
        LTN_TRY(check_tensor(c, &stored[i], t, err));
        bytes[i] = t->bytes;
    }
    ltn_checkpoint_order(order, bytes, n);
    for (size_t i = 0; i < f->n_tensors; i++) {
        const char *name = i < n ? stored[order[i]].name : i < expected ? "tokenizer" : NULL;
        if (!name || strcmp(f->tensors[i].name, name) != 0)
            return wrong_name(c, stored, n, i, name, err);
    }
    if (f->n_tensors < expected)
        return wrong_name(c, stored, n, f->n_tensors, "tokenizer", err);
    return LTN_OK;
}

static enum ltn_status check_tensors(struct ltn_checkpoint *c, struct ltn_error *err)
{
    const struct ltn_st_file *f = &c->file;
    struct ltn_stored *stored;
    size_t n;
    LTN_TRY(ltn_checkpoint_stored(&stored, &n, c->specs, c->n_specs, c->dtype, err));
    size_t *order = calloc(n, sizeof *order);
    uint64_t *bytes = calloc(n, sizeof *bytes);
    enum ltn_status status = order && bytes
                                 ? check_all(c, stored, n, order, bytes, err)
                                 : ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for %zu tensors", f->path, n);
    free(order);
    free(bytes);
    free(stored);
    LTN_TRY(status);
    if (c->tokenizer_json[0]) {
        const struct ltn_st_tensor *t = &f->tensors[n];
        if (t->dtype != LTN_ST_U8 || t->rank != 1 || t->bytes == 0)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"tokenizer\" is not a row of U8", f->path);
        c->tokenizer = f->map + t->offset;
        c->tokenizer_bytes = t->bytes;
    }
    return LTN_OK;
}

enum ltn_status ltn_checkpoint_open(struct ltn_checkpoint *c, const char *path, struct ltn_error *err)
{
    *c = (struct ltn_checkpoint){0};
    enum ltn_status status = ltn_st_open(&c->file, path, err);
    if (status == LTN_OK)
        status = read_metadata(c, err);
    if (status == LTN_OK)
        status = ltn_config_tensors(&c->config, &c->specs, &c->n_specs, err);
    if (status == LTN_OK) {
        c->tensors = calloc(c->n_specs, sizeof *c->tensors);
        c->scales = calloc(c->n_specs, sizeof *c->scales);
        status = c->tensors && c->scales
                     ? check_tensors(c, err)
                     : ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for %zu tensors", path, c->n_specs);
    }
    if (status != LTN_OK)
        ltn_checkpoint_close(c);
    return status;
}

void ltn_checkpoint_close(struct ltn_checkpoint *c)
{
    ltn_st_close(&c->file);
    free(c->specs);
    free(c->tensors);
    free(c->scales);
    *c = (struct ltn_checkpoint){0};
}

/* ---- verifying ---- */

/* A float is finite unless all bits of its exponent are set. The loops have no early exit, so that they run
 * at the speed of memory; the place is looked for once there is something to find. memcpy, because a tensor
 * behind an odd one lies at any address. */
static bool any_not_finite(const uint8_t *p, enum ltn_dtype dtype, size_t n)
{
    uint32_t found = 0;
    uint16_t found16 = 0, exponent = dtype == LTN_BF16 ? 0x7f80 : 0x7c00;
    if (dtype == LTN_F32) {
        for (size_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, p + 4 * i, 4);
            found |= (bits & 0x7f800000u) == 0x7f800000u;
        }
        return found;
    }
    for (size_t i = 0; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, p + 2 * i, 2);
        found16 |= (uint16_t)((bits & exponent) == exponent);
    }
    return found16;
}

size_t ltn_first_not_finite(const void *data, enum ltn_dtype dtype, size_t n)
{
    if (!any_not_finite(data, dtype, n))
        return n;
    size_t i = 0;
    while (!any_not_finite((const uint8_t *)data + i * ltn_dtype_size(dtype), dtype, 1))
        i++;
    return i;
}

static size_t first_e4m3_nan(const uint8_t *data, size_t n)
{
    size_t i = 0;
    while (i < n && (data[i] & 0x7f) != 0x7f)
        i++;
    return i;
}

enum ltn_status ltn_checkpoint_verify(const struct ltn_checkpoint *c, struct ltn_error *err)
{
    enum { BLOCK = 1 << 18 }; /* fits a cache: hashed and looked through in one pass over memory */
    const struct ltn_st_file *f = &c->file;
    const struct ltn_st_tensor *bad = NULL;
    size_t bad_at = 0;
    XXH3_state_t *hash = XXH3_createState();
    if (!hash || XXH3_128bits_reset(hash) != XXH_OK) {
        XXH3_freeState(hash);
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for the checksum", f->path);
    }
    madvise((void *)f->map, f->size, MADV_SEQUENTIAL); /* a hint */
    for (size_t i = 0; i < f->n_tensors; i++) {
        const struct ltn_st_tensor *t = &f->tensors[i];
        enum ltn_dtype dtype;
        bool weights = ltn_checkpoint_dtype(&dtype, t->dtype);
        for (uint64_t at = 0; at < t->bytes; at += BLOCK) {
            size_t bytes = t->bytes - at < BLOCK ? (size_t)(t->bytes - at) : BLOCK;
            const uint8_t *data = f->map + t->offset + at;
            XXH3_128bits_update(hash, data, bytes);
            if (bad || (!weights && t->dtype != LTN_ST_F8_E4M3))
                continue;
            size_t size = ltn_st_dtype_size(t->dtype), n = bytes / size;
            size_t k = weights ? ltn_first_not_finite(data, dtype, n) : first_e4m3_nan(data, n);
            if (k < n) {
                bad = t;
                bad_at = at / size + k;
            }
        }
    }
    XXH128_hash_t digest = XXH3_128bits_digest(hash);
    XXH3_freeState(hash);
    char text[33];
    ltn_st_checksum_text(text, digest.high64, digest.low64);
    char place[160] = "";
    if (bad)
        snprintf(place, sizeof place, "tensor \"%s\" is not finite at element %zu", bad->name, bad_at);
    if (strcmp(text, c->checksum) != 0)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: damaged: the checksum of the data is %s, the header says %s%s%s", f->path, text,
                        c->checksum, bad ? "; " : "", place);
    if (bad)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: %s", f->path, place);
    return LTN_OK;
}
