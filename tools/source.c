#include "tools/source.h"

#include "model/json.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_INDEX = 16 << 20, MAX_FILES = 10000 };

/* ---- opening ---- */

enum ltn_status ltn_read_file(char **out, size_t *bytes, const char *path, size_t max_bytes, bool *found,
                              struct ltn_error *err)
{
    *out = NULL;
    *bytes = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (found)
        *found = fd >= 0 || errno != ENOENT;
    struct stat st;
    enum ltn_status status = LTN_OK;
    if (fd < 0 || fstat(fd, &st) != 0)
        status = ltn_fail(err, LTN_ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        status = ltn_fail(err, LTN_ERR_INPUT, "%s: not a regular file", path);
    else if ((uint64_t)st.st_size > max_bytes)
        status = ltn_fail(err, LTN_ERR_INPUT, "%s: %jd bytes, at most %zu are allowed", path,
                          (intmax_t)st.st_size, max_bytes);
    else if (!(*out = malloc((size_t)st.st_size + 1)))
        status = ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for %jd bytes", path, (intmax_t)st.st_size);
    while (status == LTN_OK && *bytes < (size_t)st.st_size) {
        ssize_t n = read(fd, *out + *bytes, (size_t)st.st_size - *bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            status = ltn_fail(err, LTN_ERR_IO, "%s: cannot read: %s", path,
                              n < 0 ? strerror(errno) : "it ended early");
        else
            *bytes += (size_t)n;
    }
    if (fd >= 0)
        close(fd);
    if (status == LTN_OK) {
        (*out)[*bytes] = 0;
    } else {
        free(*out);
        *out = NULL;
    }
    return status;
}

/* DIR/NAME, malloc'd. */
static char *join(const char *dir, const char *name)
{
    char *path;
    return asprintf(&path, "%s/%s", dir, name) < 0 ? NULL : path;
}

static bool exists(const char *dir, const char *name)
{
    struct stat st;
    char *path = join(dir, name);
    bool there = path && stat(path, &st) == 0;
    free(path);
    return there;
}

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

/* Opens DIR/NAME as the next of the files and appends its tensors. */
static enum ltn_status add_file(struct ltn_source *s, const char *name, struct ltn_error *err)
{
    struct ltn_source_file *f = &s->files[s->n_files];
    char *path = join(s->dir, name);
    f->name = strdup(name);
    if (!path || !f->name) {
        free(path);
        free(f->name);
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for a name", name);
    }
    size_t file = s->n_files++;
    enum ltn_status status = ends_with(name, ".safetensors") ? ltn_st_open(&f->st, path, err)
                                                             : ltn_torch_open(&f->torch, path, err);
    free(path);
    LTN_TRY(status);
    size_t more = f->st.n_tensors + f->torch.n_tensors;
    struct ltn_source_tensor *tensors = realloc(s->tensors, (s->n_tensors + more + 1) * sizeof *tensors);
    if (!tensors)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its tensors", name);
    s->tensors = tensors;
    for (size_t i = 0; i < more; i++) {
        struct ltn_source_tensor *t = &tensors[s->n_tensors++];
        *t = (struct ltn_source_tensor){.file = file};
        if (i < f->st.n_tensors) {
            t->st = &f->st.tensors[i];
            t->name = t->st->name;
            t->dtype = t->st->dtype;
            t->rank = t->st->rank;
            memcpy(t->shape, t->st->shape, sizeof t->shape);
        } else {
            t->torch = &f->torch.tensors[i - f->st.n_tensors];
            t->name = t->torch->name;
            t->dtype = t->torch->dtype;
            t->rank = t->torch->rank;
            memcpy(t->shape, t->torch->shape, sizeof t->shape);
        }
    }
    return LTN_OK;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const struct ltn_source_tensor *)a)->name, ((const struct ltn_source_tensor *)b)->name);
}

static enum ltn_status sort_tensors(struct ltn_source *s, struct ltn_error *err)
{
    if (s->n_tensors == 0)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: no tensors in %s", s->dir, s->files[0].name);
    qsort(s->tensors, s->n_tensors, sizeof *s->tensors, compare_names);
    for (size_t i = 1; i < s->n_tensors; i++)
        if (compare_names(&s->tensors[i - 1], &s->tensors[i]) == 0)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%.100s\" stands in %s and again in %s", s->dir,
                            s->tensors[i].name, s->files[s->tensors[i - 1].file].name,
                            s->files[s->tensors[i].file].name);
    return LTN_OK;
}

static enum ltn_status open_shards(struct ltn_source *s, const cJSON *tree, const char *suffix,
                                   const char *path, struct ltn_error *err)
{
    const cJSON *map = ltn_json_find(tree, "weight_map");
    if (!cJSON_IsObject(map) || !map->child)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: no weight_map", path);
    for (const cJSON *c = map->child; c; c = c->next) {
        const char *name = cJSON_IsString(c) ? c->valuestring : "";
        if (strchr(name, '/') || name[0] == '.' || !ends_with(name, suffix))
            return ltn_fail(
                err, LTN_ERR_INPUT,
                "%s: weight_map puts \"%.100s\" into \"%.100s\", expected a file name ending in %s", path,
                c->string, name, suffix);
        size_t f = 0;
        while (f < s->n_files && strcmp(s->files[f].name, name) != 0)
            f++;
        if (f < s->n_files)
            continue;
        if (f == MAX_FILES)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: more than %d files", path, MAX_FILES);
        LTN_TRY(add_file(s, name, err));
    }
    LTN_TRY(sort_tensors(s, err));
    for (const cJSON *c = map->child; c; c = c->next) {
        const struct ltn_source_tensor *t = ltn_source_find(s, c->string);
        if (!t || strcmp(s->files[t->file].name, c->valuestring) != 0)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%.100s\" is not in %s, where the index has it",
                            path, c->string, c->valuestring);
    }
    return LTN_OK;
}

static enum ltn_status open_index(struct ltn_source *s, const char *name, const char *suffix,
                                  struct ltn_error *err)
{
    char *text = NULL, *path = join(s->dir, name);
    size_t bytes = 0;
    cJSON *tree = NULL;
    enum ltn_status status = path ? ltn_read_file(&text, &bytes, path, MAX_INDEX, NULL, err)
                                  : ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its name", name);
    if (status == LTN_OK)
        status = ltn_json_parse(&tree, text, bytes, path, 8, false, err);
    if (status == LTN_OK) {
        s->files = calloc(MAX_FILES, sizeof *s->files);
        status = s->files ? open_shards(s, tree, suffix, path, err)
                          : ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its files", path);
    }
    cJSON_Delete(tree);
    free(text);
    free(path);
    return status;
}

static enum ltn_status open_single(struct ltn_source *s, const char *name, struct ltn_error *err)
{
    s->files = calloc(1, sizeof *s->files);
    if (!s->files)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory", s->dir);
    LTN_TRY(add_file(s, name, err));
    return sort_tensors(s, err);
}

enum ltn_status ltn_source_open(struct ltn_source *s, const char *dir, struct ltn_error *err)
{
    struct stat st;
    *s = (struct ltn_source){.dir = strdup(dir)};
    enum ltn_status status;
    if (!s->dir)
        status = ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its name", dir);
    else if (stat(dir, &st) != 0)
        status = ltn_fail(err, LTN_ERR_IO, "%s: cannot open: %s", dir, strerror(errno));
    else if (!S_ISDIR(st.st_mode))
        status = ltn_fail(err, LTN_ERR_INPUT, "%s: not a directory, expected that of a checkpoint", dir);
    else if (exists(dir, "model.safetensors"))
        status = open_single(s, "model.safetensors", err);
    else if (exists(dir, "model.safetensors.index.json"))
        status = open_index(s, "model.safetensors.index.json", ".safetensors", err);
    else if (exists(dir, "pytorch_model.bin"))
        status = open_single(s, "pytorch_model.bin", err);
    else if (exists(dir, "pytorch_model.bin.index.json"))
        status = open_index(s, "pytorch_model.bin.index.json", ".bin", err);
    else
        status = ltn_fail(
            err, LTN_ERR_INPUT,
            "%s: no weights: neither model.safetensors nor pytorch_model.bin, nor an .index.json of one",
            dir);
    if (status != LTN_OK)
        ltn_source_close(s);
    return status;
}

void ltn_source_close(struct ltn_source *s)
{
    for (size_t i = 0; i < s->n_files; i++) {
        ltn_st_close(&s->files[i].st);
        ltn_torch_close(&s->files[i].torch);
        free(s->files[i].name);
    }
    free(s->files);
    free(s->tensors);
    free(s->dir);
    *s = (struct ltn_source){0};
}

const struct ltn_source_tensor *ltn_source_find(const struct ltn_source *s, const char *name)
{
    const struct ltn_source_tensor key = {.name = name};
    return bsearch(&key, s->tensors, s->n_tensors, sizeof key, compare_names);
}

bool ltn_source_same(const struct ltn_source_tensor *a, const struct ltn_source_tensor *b)
{
    size_t rank_bytes = (size_t)a->rank * sizeof *a->shape;
    if (a->file != b->file || a->dtype != b->dtype || a->rank != b->rank ||
        memcmp(a->shape, b->shape, rank_bytes) != 0)
        return false;
    if (a->st)
        return a->st == b->st;
    return a->torch->entry == b->torch->entry && a->torch->offset == b->torch->offset &&
           memcmp(a->torch->stride, b->torch->stride, rank_bytes) == 0;
}

/* ---- reading ---- */

struct ltn_source_reader {
    const struct ltn_source_tensor *tensor;
    const char *path;
    size_t size;       /* bytes of an element */
    uint64_t n, done;  /* elements */
    int fd;            /* safetensors */
    zip_file_t *entry; /* .bin */
    uint8_t *span;     /* a strided tensor: its part of the storage */
    int64_t index[LTN_ST_MAX_RANK];
};

static bool is_contiguous(const struct ltn_torch_tensor *t)
{
    int64_t stride = 1;
    for (int32_t i = t->rank - 1; i >= 0; i--) {
        if (t->shape[i] != 1 && t->stride[i] != stride)
            return false;
        stride *= t->shape[i]; /* the span was checked, so this fits unless it is no longer compared */
    }
    return true;
}

static enum ltn_status read_entry(struct ltn_source_reader *r, void *out, uint64_t bytes,
                                  struct ltn_error *err)
{
    uint8_t *to = out;
    while (bytes > 0) {
        zip_int64_t n = zip_fread(r->entry, to, bytes);
        if (n <= 0)
            return ltn_fail(err, LTN_ERR_IO, "%s: cannot read tensor \"%.100s\": %s", r->path,
                            r->tensor->name, n < 0 ? zip_file_strerror(r->entry) : "it ended early");
        to += n;
        bytes -= (uint64_t)n;
    }
    return LTN_OK;
}

static enum ltn_status open_entry(struct ltn_source_reader *r, const struct ltn_torch_bin *bin,
                                  struct ltn_error *err)
{
    const struct ltn_torch_tensor *t = r->tensor->torch;
    r->entry = zip_fopen_index(bin->zip, t->entry, 0);
    if (!r->entry)
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot open the storage of tensor \"%.100s\": %s", r->path,
                        t->name, zip_strerror(bin->zip));
    if (t->offset > 0 && zip_fseek(r->entry, (zip_int64_t)((uint64_t)t->offset * r->size), SEEK_SET) != 0)
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot seek to tensor \"%.100s\": %s", r->path, t->name,
                        zip_file_strerror(r->entry));
    if (t->span == 0 || is_contiguous(t))
        return LTN_OK;
    r->span = malloc((size_t)t->span * r->size);
    if (!r->span)
        return ltn_fail(err, LTN_ERR_MEMORY,
                        "%s: no memory for the %" PRId64 " elements that tensor \"%.100s\" spans", r->path,
                        t->span, t->name);
    return read_entry(r, r->span, (uint64_t)t->span * r->size, err);
}

enum ltn_status ltn_source_reader_open(struct ltn_source_reader **out, const struct ltn_source *s,
                                       const struct ltn_source_tensor *t, struct ltn_error *err)
{
    const struct ltn_source_file *f = &s->files[t->file];
    struct ltn_source_reader *r = calloc(1, sizeof *r);
    *out = NULL;
    if (!r)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for a reader", f->name);
    r->tensor = t;
    r->path = t->st ? f->st.path : f->torch.path;
    r->size = ltn_st_dtype_size(t->dtype);
    r->fd = f->st.fd;
    enum ltn_status status = LTN_OK;
    r->n = 1;
    for (int32_t i = 0; i < t->rank; i++)
        if (__builtin_mul_overflow(r->n, (uint64_t)t->shape[i], &r->n))
            status = ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%.100s\" is too large", r->path, t->name);
    if (status == LTN_OK && t->torch)
        status = open_entry(r, &f->torch, err);
    if (status != LTN_OK)
        ltn_source_reader_close(r);
    else
        *out = r;
    return status;
}

static enum ltn_status read_safetensors(struct ltn_source_reader *r, uint8_t *out, uint64_t bytes,
                                        struct ltn_error *err)
{
    uint64_t at = r->tensor->st->offset + r->done * r->size;
    while (bytes > 0) {
        ssize_t n = pread(r->fd, out, bytes, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return ltn_fail(err, LTN_ERR_IO, "%s: cannot read tensor \"%.100s\": %s", r->path,
                            r->tensor->name, n < 0 ? strerror(errno) : "the file has become shorter");
        out += n;
        at += (uint64_t)n;
        bytes -= (uint64_t)n;
    }
    return LTN_OK;
}

/* Steps through the index like an odometer. */
static void gather(struct ltn_source_reader *r, uint8_t *out, size_t n)
{
    const struct ltn_torch_tensor *t = r->tensor->torch;
    for (size_t i = 0; i < n; i++) {
        int64_t at = 0;
        for (int32_t d = 0; d < t->rank; d++)
            at += r->index[d] * t->stride[d];
        memcpy(out + i * r->size, r->span + (size_t)at * r->size, r->size);
        for (int32_t d = t->rank - 1; d >= 0 && ++r->index[d] == t->shape[d]; d--)
            r->index[d] = 0;
    }
}

enum ltn_status ltn_source_read(struct ltn_source_reader *r, void *out, size_t n, struct ltn_error *err)
{
    if (n > r->n - r->done)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%.100s\" has only %" PRIu64 " elements", r->path,
                        r->tensor->name, r->n);
    if (r->tensor->st)
        LTN_TRY(read_safetensors(r, out, n * r->size, err));
    else if (r->span)
        gather(r, out, n);
    else
        LTN_TRY(read_entry(r, out, n * r->size, err));
    r->done += n;
    /* The archive checks its CRC where an entry read from its beginning ends. */
    uint8_t beyond;
    if (r->entry && !r->span && r->done == r->n && r->tensor->torch->offset == 0 &&
        r->n * r->size == r->tensor->torch->entry_bytes && zip_fread(r->entry, &beyond, 1) != 0)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%.100s\" is damaged: %s", r->path, r->tensor->name,
                        zip_file_strerror(r->entry));
    return LTN_OK;
}

void ltn_source_reader_close(struct ltn_source_reader *r)
{
    if (!r)
        return;
    if (r->entry)
        zip_fclose(r->entry);
    free(r->span);
    free(r);
}
