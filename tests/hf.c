#include "tests/hf.h"

#include "tests/files.h"
#include "tests/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <zip.h>

static void die(const char *text)
{
    fprintf(stderr, "tests/hf: %s\n", text);
    exit(99);
}

/* ---- directories ---- */

enum { CHUNK = 1 << 20 }; /* bytes */

static void fill(uint64_t *words, size_t n, enum ltn_st_dtype dtype, struct test_rng *rng)
{
    /* sign and mantissa at random, two or three bits of the exponent */
    static const uint64_t keep[] = {[LTN_ST_F16] = UINT64_C(0x87ff87ff87ff87ff),
                                    [LTN_ST_BF16] = UINT64_C(0x80ff80ff80ff80ff),
                                    [LTN_ST_F32] = UINT64_C(0x80ffffff80ffffff),
                                    [LTN_ST_F64] = UINT64_C(0x801fffffe0000000)}; /* exact in F32 */
    static const uint64_t set[] = {[LTN_ST_F16] = UINT64_C(0x2000200020002000),
                                   [LTN_ST_BF16] = UINT64_C(0x3c003c003c003c00),
                                   [LTN_ST_F32] = UINT64_C(0x3c0000003c000000),
                                   [LTN_ST_F64] = UINT64_C(0x3f80000000000000)};
    for (size_t i = 0; i < n; i++)
        words[i] = (test_random(rng) & keep[dtype]) | set[dtype];
}

struct entry {
    struct ltn_st_tensor tensor;
    uint64_t seed;
};

static void write_weights(const char *path, const struct entry *entries, size_t n)
{
    static uint64_t words[CHUNK / 8];
    struct ltn_error err = {0};
    struct ltn_st_writer *writer;
    struct ltn_st_tensor *tensors = calloc(n, sizeof *tensors);
    const char *metadata[] = {"format", "pt"};
    if (!tensors)
        die("out of memory");
    for (size_t i = 0; i < n; i++)
        tensors[i] = entries[i].tensor;
    if (ltn_st_create(&writer, path, tensors, n, metadata, 1, &err))
        die(err.text);
    for (size_t i = 0; i < n; i++) {
        struct test_rng rng = {entries[i].seed};
        for (uint64_t at = 0; at < tensors[i].bytes; at += CHUNK) {
            size_t bytes = tensors[i].bytes - at < CHUNK ? (size_t)(tensors[i].bytes - at) : CHUNK;
            fill(words, (bytes + 7) / 8, tensors[i].dtype, &rng);
            if (ltn_st_write(writer, words, bytes, &err))
                die(err.text);
        }
    }
    if (ltn_st_finish(writer, &err))
        die(err.text);
    free(tensors);
}

static void write_index(const char *path, const struct entry *entries, size_t n, int files)
{
    FILE *f = fopen(path, "w");
    if (!f)
        die(path);
    fprintf(f, "{\"metadata\": {\"total_size\": 1e3}, \"weight_map\": {");
    for (size_t i = 0; i < n; i++)
        fprintf(f, "%s\"%s\": \"model-%05zu-of-%05d.safetensors\"", i ? ", " : "", entries[i].tensor.name,
                i * (size_t)files / n + 1, files);
    fprintf(f, "}}\n");
    if (fclose(f) != 0)
        die(path);
}

void test_write_hf(const char *dir, const struct test_hf *hf)
{
    struct ltn_error err = {0};
    struct ltn_tensor_spec *specs;
    size_t n;
    char path[1024];
    mkdir(dir, 0755); /* may be there */
    if (ltn_config_tensors(&hf->config, &specs, &n, &err))
        die(err.text);
    struct entry *entries = calloc(n + 1, sizeof *entries);
    char *json = hf->config_json ? strdup(hf->config_json) : ltn_config_print(&hf->config);
    if (!entries || !json)
        die("out of memory");
    for (size_t i = 0; i < n; i++) {
        struct ltn_st_tensor *t = &entries[i].tensor;
        t->name = specs[i].name;
        t->dtype = specs[i].is_matrix ? hf->matrices : hf->vectors;
        t->rank = specs[i].rank;
        memcpy(t->shape, specs[i].shape, sizeof specs[i].shape);
        t->bytes = ltn_st_dtype_size(t->dtype);
        for (int32_t d = 0; d < t->rank; d++)
            t->bytes *= (uint64_t)t->shape[d];
        entries[i].seed = hf->seed + i + 1;
    }
    if (hf->head != HEAD_AS_CONFIG) {
        entries[n] = entries[0];
        entries[n].tensor.name = "lm_head.weight";
        entries[n].seed += hf->head == HEAD_OTHER ? 1000 : 0;
        n++;
    }
    snprintf(path, sizeof path, "%s/config.json", dir);
    write_file(path, json, strlen(json));
    for (int f = 0; f < hf->files; f++) {
        size_t begin = 0, end = 0; /* the rule of write_index */
        for (size_t i = 0; i < n; i++) {
            begin += i * (size_t)hf->files / n < (size_t)f;
            end += i * (size_t)hf->files / n <= (size_t)f;
        }
        snprintf(path, sizeof path, "%s/model-%05d-of-%05d.safetensors", dir, f + 1, hf->files);
        if (hf->files == 1)
            snprintf(path, sizeof path, "%s/model.safetensors", dir);
        write_weights(path, entries + begin, end - begin);
    }
    if (hf->files > 1) {
        snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
        write_index(path, entries, n, hf->files);
    }
    free(json);
    free(entries);
    free(specs);
}

/* ---- torch archives ---- */

void pk_bytes(struct test_pickle *p, const void *bytes, size_t n)
{
    if (n > sizeof p->v - p->n)
        die("pickle too large");
    memcpy(p->v + p->n, bytes, n);
    p->n += n;
}

void pk_op(struct test_pickle *p, char op)
{
    pk_bytes(p, &op, 1);
}

static void little_endian(struct test_pickle *p, uint64_t value, int n)
{
    for (int i = 0; i < n; i++)
        pk_op(p, (char)(value >> 8 * i));
}

void pk_int(struct test_pickle *p, int64_t value)
{
    if (value >= 0 && value < 256) {
        pk_op(p, 'K');
        little_endian(p, (uint64_t)value, 1);
    } else if (value >= 0 && value < 65536) {
        pk_op(p, 'M');
        little_endian(p, (uint64_t)value, 2);
    } else if (value >= INT32_MIN && value <= INT32_MAX) {
        pk_op(p, 'J');
        little_endian(p, (uint64_t)value, 4);
    } else {
        pk_bytes(p, "\x8a\x08", 2);
        little_endian(p, (uint64_t)value, 8);
    }
}

void pk_text(struct test_pickle *p, const char *text)
{
    pk_op(p, 'X');
    little_endian(p, strlen(text), 4);
    pk_bytes(p, text, strlen(text));
}

void pk_global(struct test_pickle *p, const char *module, const char *name)
{
    pk_op(p, 'c');
    pk_bytes(p, module, strlen(module));
    pk_op(p, '\n');
    pk_bytes(p, name, strlen(name));
    pk_op(p, '\n');
}

void pk_begin(struct test_pickle *p)
{
    p->n = 0;
    pk_bytes(p, "\x80\x02", 2);
    pk_global(p, "collections", "OrderedDict");
    pk_bytes(p, "q\0)Rq\1(", 7);
}

void pk_end(struct test_pickle *p)
{
    pk_bytes(p, "u.", 2);
}

void pk_tensor(struct test_pickle *p, const char *name, const char *storage_type, const char *key,
               int64_t numel, int64_t offset, int rank, const int64_t *shape, const int64_t *strides)
{
    pk_text(p, name);
    pk_global(p, "torch._utils", "_rebuild_tensor_v2");
    pk_bytes(p, "((", 2);
    pk_text(p, "storage");
    pk_global(p, "torch", storage_type);
    pk_text(p, key);
    pk_text(p, "cpu");
    pk_int(p, numel);
    pk_bytes(p, "tQ", 2);
    pk_int(p, offset);
    pk_op(p, '(');
    for (int i = 0; i < rank; i++)
        pk_int(p, shape[i]);
    pk_op(p, 't');
    pk_op(p, '(');
    for (int i = 0; i < rank; i++) {
        int64_t stride = 1;
        for (int k = i + 1; k < rank; k++)
            stride *= shape[k];
        pk_int(p, strides ? strides[i] : stride);
    }
    pk_bytes(p, "t\x89h\0)RtR", 8); /* requires_grad False, hooks OrderedDict() */
}

void test_write_torch(const char *path, const void *pickle, size_t pickle_bytes,
                      const struct test_storage *storages, size_t n_storages, bool compress)
{
    int code = 0;
    zip_t *zip = zip_open(path, ZIP_CREATE | ZIP_TRUNCATE, &code);
    if (!zip)
        die(path);
    for (size_t i = 0; i <= n_storages; i++) {
        char name[256] = "archive/data.pkl";
        const void *data = i ? storages[i - 1].data : pickle;
        size_t bytes = i ? storages[i - 1].bytes : pickle_bytes;
        if (i)
            snprintf(name, sizeof name, "archive/data/%s", storages[i - 1].key);
        zip_source_t *source = zip_source_buffer(zip, data, bytes, 0);
        zip_int64_t at = source ? zip_file_add(zip, name, source, 0) : -1;
        if (at < 0 ||
            zip_set_file_compression(zip, (zip_uint64_t)at, compress ? ZIP_CM_DEFLATE : ZIP_CM_STORE, 0) != 0)
            die(path);
    }
    if (zip_close(zip) != 0)
        die(path);
}
