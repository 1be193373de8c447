#include "model/safetensors.h"

#include "model/json.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

enum { MAX_HEADER = 1 << 20, MAX_DEPTH = 8, ALIGNMENT = 64 };

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    [LTN_ST_BOOL] = {"BOOL", 1},       [LTN_ST_U8] = {"U8", 1},   [LTN_ST_I8] = {"I8", 1},
    [LTN_ST_F8_E4M3] = {"F8_E4M3", 1}, [LTN_ST_I16] = {"I16", 2}, [LTN_ST_F16] = {"F16", 2},
    [LTN_ST_BF16] = {"BF16", 2},       [LTN_ST_I32] = {"I32", 4}, [LTN_ST_F32] = {"F32", 4},
    [LTN_ST_I64] = {"I64", 8},         [LTN_ST_F64] = {"F64", 8},
};
enum { N_DTYPES = sizeof dtypes / sizeof *dtypes };

size_t ltn_st_dtype_size(enum ltn_st_dtype dtype)
{
    return dtypes[dtype].size;
}

const char *ltn_st_dtype_name(enum ltn_st_dtype dtype)
{
    return dtypes[dtype].name;
}

/* ---- the header ---- */

/* Bytes of a tensor of this dtype and shape; false where they do not fit into 63 bits. */
static bool tensor_bytes(uint64_t *bytes, enum ltn_st_dtype dtype, const int64_t *shape, int32_t rank)
{
    int64_t n = (int64_t)dtypes[dtype].size;
    for (int32_t i = 0; i < rank; i++)
        if (shape[i] < 0 || __builtin_mul_overflow(n, shape[i], &n))
            return false;
    *bytes = (uint64_t)n;
    return true;
}

static enum ltn_status read_tensor(struct ltn_st_tensor *t, const cJSON *item, uint64_t data_bytes,
                                   const char *path, struct ltn_error *err)
{
    static const char *const keys[] = {"dtype", "shape", "data_offsets"};
    char what[256];
    snprintf(what, sizeof what, "%.120s: tensor \"%.100s\"", path, item->string);
    LTN_TRY(ltn_json_keys(item, keys, 3, what, err));

    const char *name;
    LTN_TRY(ltn_json_string(&name, item, "dtype", what, err));
    int dtype = 0;
    while (dtype < N_DTYPES && strcmp(name, dtypes[dtype].name) != 0)
        dtype++;
    if (dtype == N_DTYPES)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: unknown dtype \"%.40s\"", what, name);
    t->dtype = (enum ltn_st_dtype)dtype;

    const cJSON *shape, *offsets;
    LTN_TRY(ltn_json_array(&shape, item, "shape", what, err));
    for (const cJSON *c = shape->child; c; c = c->next) {
        if (t->rank == LTN_ST_MAX_RANK)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: more than %d dimensions", what, LTN_ST_MAX_RANK);
        LTN_TRY(ltn_json_int_item(&t->shape[t->rank], c, 0, LTN_JSON_MAX_INT, "shape", what, err));
        t->rank++;
    }
    LTN_TRY(ltn_json_array(&offsets, item, "data_offsets", what, err));
    int64_t ends[2] = {0, 0};
    int n = 0;
    for (const cJSON *c = offsets->child; c; c = c->next, n++) {
        if (n == 2)
            break;
        LTN_TRY(ltn_json_int_item(&ends[n], c, 0, LTN_JSON_MAX_INT, "data_offsets", what, err));
    }
    if (n != 2 || offsets->child->next->next)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: data_offsets are not two numbers", what);
    if (ends[0] > ends[1] || (uint64_t)ends[1] > data_bytes)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: data_offsets %" PRId64 " to %" PRId64 " do not lie within the %" PRIu64
                        " bytes of data in the file",
                        what, ends[0], ends[1], data_bytes);
    t->offset = (uint64_t)ends[0];
    t->bytes = (uint64_t)(ends[1] - ends[0]);
    uint64_t expected;
    if (!tensor_bytes(&expected, t->dtype, t->shape, t->rank) || expected != t->bytes)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: dtype and shape ask for another size than its %" PRIu64 " bytes", what,
                        t->bytes);
    t->name = strdup(item->string);
    return t->name ? LTN_OK : ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its name", what);
}

static int compare_offsets(const void *a, const void *b)
{
    const struct ltn_st_tensor *s = a, *t = b;
    if (s->offset != t->offset)
        return s->offset < t->offset ? -1 : 1;
    return s->bytes < t->bytes ? -1 : s->bytes > t->bytes; /* an empty tensor before its neighbour */
}

static enum ltn_status read_tree(struct ltn_st_file *file, const cJSON *tree, uint64_t data_bytes,
                                 struct ltn_error *err)
{
    if (!cJSON_IsObject(tree))
        return ltn_fail(err, LTN_ERR_INPUT, "%s: the header is not a JSON object", file->path);
    const cJSON *metadata = ltn_json_find(tree, "__metadata__");
    if (metadata && !cJSON_IsObject(metadata))
        return ltn_fail(err, LTN_ERR_INPUT, "%s: __metadata__ is not an object", file->path);
    size_t n_items = (size_t)cJSON_GetArraySize(tree);
    size_t n_metadata = metadata ? (size_t)cJSON_GetArraySize(metadata) : 0;
    file->tensors = calloc(n_items + 1, sizeof *file->tensors);
    file->metadata = calloc(2 * n_metadata + 1, sizeof *file->metadata);
    if (!file->tensors || !file->metadata)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for %zu tensors", file->path, n_items);

    for (const cJSON *c = metadata ? metadata->child : NULL; c; c = c->next) {
        if (!cJSON_IsString(c))
            return ltn_fail(err, LTN_ERR_INPUT, "%s: metadata \"%.100s\" is not a string", file->path,
                            c->string);
        char **pair = &file->metadata[2 * file->n_metadata++];
        pair[0] = strdup(c->string);
        pair[1] = strdup(c->valuestring);
        if (!pair[0] || !pair[1])
            return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its metadata", file->path);
    }
    for (const cJSON *c = tree->child; c; c = c->next)
        if (c != metadata)
            LTN_TRY(read_tensor(&file->tensors[file->n_tensors++], c, data_bytes, file->path, err));

    qsort(file->tensors, file->n_tensors, sizeof *file->tensors, compare_offsets);
    uint64_t end = 0;
    for (size_t i = 0; i < file->n_tensors; i++) {
        struct ltn_st_tensor *t = &file->tensors[i];
        if (t->offset != end)
            return ltn_fail(err, LTN_ERR_INPUT,
                            "%s: tensor \"%.100s\" begins at data byte %" PRIu64
                            ", but the one before it ends at %" PRIu64,
                            file->path, t->name, t->offset, end);
        end += t->bytes; /* <= data_bytes */
        t->offset += file->data_start;
    }
    if (end != data_bytes)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: %" PRIu64 " bytes of data, but the tensors end after %" PRIu64, file->path,
                        data_bytes, end);
    return LTN_OK;
}

/* Fills tensors and metadata from the header's JSON. */
static enum ltn_status read_header(struct ltn_st_file *file, const char *json, size_t bytes,
                                   uint64_t data_bytes, struct ltn_error *err)
{
    char what[200];
    snprintf(what, sizeof what, "%.150s: safetensors header", file->path);
    if (bytes == 0 || json[0] != '{')
        return ltn_fail(err, LTN_ERR_INPUT, "%s: does not begin with '{'", what);
    cJSON *tree;
    LTN_TRY(ltn_json_parse(&tree, json, bytes, what, MAX_DEPTH, true, err));
    enum ltn_status status = read_tree(file, tree, data_bytes, err);
    cJSON_Delete(tree);
    return status;
}

/* ---- reading ---- */

/* From map and size. */
static enum ltn_status read_file(struct ltn_st_file *file, struct ltn_error *err)
{
    if (file->size < 8)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: %" PRIu64 " bytes, a safetensors file has at least 8",
                        file->path, file->size);
    uint64_t header = 0;
    for (int i = 7; i >= 0; i--)
        header = header << 8 | file->map[i];
    if (header > MAX_HEADER || header > file->size - 8)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: not a safetensors file: header of %" PRIu64 " bytes in a file of %" PRIu64
                        ", at most %d are allowed",
                        file->path, header, file->size, MAX_HEADER);
    file->data_start = 8 + header;
    return read_header(file, (const char *)file->map + 8, header, file->size - file->data_start, err);
}

static enum ltn_status open_file(struct ltn_st_file *file, struct ltn_error *err)
{
    const char *path = file->path;
    struct stat st;
    file->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* else a FIFO would wait for a writer */
    if (file->fd < 0 || fstat(file->fd, &st) != 0)
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return ltn_fail(err, LTN_ERR_INPUT, "%s: not a regular file", path);
    file->size = (uint64_t)st.st_size;
    if (file->size == 0) /* which mmap refuses */
        return read_file(file, err);
    void *map = mmap(NULL, file->size, PROT_READ, MAP_SHARED, file->fd, 0);
    if (map == MAP_FAILED)
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot map %" PRIu64 " bytes: %s", path, file->size,
                        strerror(errno));
    file->map = map;
    return read_file(file, err);
}

static enum ltn_status name_file(struct ltn_st_file *file, const char *path, struct ltn_error *err)
{
    file->path = strdup(path);
    return file->path ? LTN_OK : ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its name", path);
}

enum ltn_status ltn_st_open(struct ltn_st_file *file, const char *path, struct ltn_error *err)
{
    *file = (struct ltn_st_file){.fd = -1};
    enum ltn_status status = name_file(file, path, err);
    if (status == LTN_OK)
        status = open_file(file, err);
    if (status != LTN_OK)
        ltn_st_close(file);
    return status;
}

enum ltn_status ltn_st_open_memory(struct ltn_st_file *file, const char *name, const void *data, size_t bytes,
                                   struct ltn_error *err)
{
    *file = (struct ltn_st_file){.fd = -1, .map = data, .size = bytes};
    enum ltn_status status = name_file(file, name, err);
    if (status == LTN_OK)
        status = read_file(file, err);
    if (status != LTN_OK)
        ltn_st_close(file);
    return status;
}

void ltn_st_close(struct ltn_st_file *file)
{
    for (size_t i = 0; i < file->n_tensors; i++)
        free((char *)file->tensors[i].name);
    for (size_t i = 0; i < 2 * file->n_metadata; i++)
        free(file->metadata[i]);
    free(file->tensors);
    free(file->metadata);
    if (file->map && file->fd >= 0)
        munmap((void *)file->map, file->size);
    if (file->path && file->fd >= 0) /* a zeroed file has fd 0, which is not its own */
        close(file->fd);
    free(file->path);
    *file = (struct ltn_st_file){0};
}

const struct ltn_st_tensor *ltn_st_find(const struct ltn_st_file *file, const char *name)
{
    for (size_t i = 0; i < file->n_tensors; i++)
        if (strcmp(file->tensors[i].name, name) == 0)
            return &file->tensors[i];
    return NULL;
}

const char *ltn_st_metadata(const struct ltn_st_file *file, const char *key)
{
    for (size_t i = 0; i < file->n_metadata; i++)
        if (strcmp(file->metadata[2 * i], key) == 0)
            return file->metadata[2 * i + 1];
    return NULL;
}

/* ---- writing ---- */

/* Written, summed and sent towards the disk at a time: the sync at the end then finds little left to do, and
 * the sum finds its bytes in the cache, or leaves them there. */
enum { PIECE = 2 << 20 };

#define NO_CHECKSUM "00000000000000000000000000000000"
#define CHECKSUM_FIELD "\"checksum\":\"" NO_CHECKSUM "\""

struct ltn_st_writer {
    char *path, *temporary;
    int fd;          /* -1: */
    uint8_t *memory; /* into this, [room]; NULL: into the file */
    size_t room;
    uint64_t used, begun; /* bytes so far; of them those that the disk was told of */
    uint64_t data_bytes, written;
    off_t checksum_at; /* of the digits in the file; 0: none wanted */
    XXH3_state_t *hash;
};

static enum ltn_status write_all(struct ltn_st_writer *w, const void *data, size_t bytes,
                                 struct ltn_error *err)
{
    const char *p = data;
    if (w->memory) {
        if (bytes > w->room - w->used)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: does not fit into %zu bytes of memory", w->path,
                            w->room);
        memcpy(w->memory + w->used, data, bytes);
        w->used += bytes;
        return LTN_OK;
    }
    while (bytes > 0) {
        ssize_t n = write(w->fd, p, bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return ltn_fail(err, LTN_ERR_IO, "%s: cannot write: %s", w->path,
                            n < 0 ? strerror(errno) : "nothing was taken");
        p += n;
        bytes -= (size_t)n;
        w->used += (size_t)n;
    }
    if (w->used - w->begun >= PIECE) { /* a hint: whatever comes of it, the sync at the end tells */
        sync_file_range(w->fd, (off_t)w->begun, (off_t)(w->used - w->begun), SYNC_FILE_RANGE_WRITE);
        w->begun = w->used;
    }
    return LTN_OK;
}

/* The header text without padding, malloc'd; NULL when memory is out. */
static char *print_header(const struct ltn_st_tensor *tensors, size_t n_tensors, const char *const *metadata,
                          size_t n_metadata)
{
    cJSON *tree = cJSON_CreateObject();
    cJSON *m = n_metadata ? cJSON_AddObjectToObject(tree, "__metadata__") : NULL;
    bool good = tree && (m || !n_metadata);
    for (size_t i = 0; i < n_metadata && good; i++)
        good = cJSON_AddStringToObject(m, metadata[2 * i], metadata[2 * i + 1]);
    uint64_t offset = 0;
    for (size_t i = 0; i < n_tensors && good; i++) {
        const struct ltn_st_tensor *t = &tensors[i];
        cJSON *entry = cJSON_AddObjectToObject(tree, t->name);
        good = entry && cJSON_AddStringToObject(entry, "dtype", dtypes[t->dtype].name);
        cJSON *shape = good ? cJSON_AddArrayToObject(entry, "shape") : NULL;
        for (int32_t d = 0; d < t->rank && shape && good; d++)
            good = cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)t->shape[d]));
        const double ends[2] = {(double)offset, (double)(offset + t->bytes)};
        good =
            good && shape && cJSON_AddItemToObject(entry, "data_offsets", cJSON_CreateDoubleArray(ends, 2));
        offset += t->bytes;
    }
    char *text = good ? cJSON_PrintUnformatted(tree) : NULL;
    cJSON_Delete(tree);
    return text;
}

/* Reads the header as the reader would: refuses what no reader would take (duplicate names, a wrong size, bad
 * UTF-8, too much of it) before anything is written. */
static enum ltn_status check_header(const char *path, const char *json, size_t bytes, uint64_t data_bytes,
                                    struct ltn_error *err)
{
    if (bytes > MAX_HEADER)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: the header would take %zu bytes, at most %d are allowed",
                        path, bytes, MAX_HEADER);
    struct ltn_st_file file = {.fd = -1, .path = strdup(path)};
    if (!file.path)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its name", path);
    enum ltn_status status = read_header(&file, json, bytes, data_bytes, err);
    ltn_st_close(&file);
    return status;
}

/* The folder that path lies in, malloc'd; NULL when memory is out. */
static char *folder_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    if (!slash)
        return strdup(".");
    return strndup(path, slash == path ? 1 : (size_t)(slash - path)); /* "/file" lies in "/" */
}

/* Finds a free name beside the path for the file: a new one, or what the descriptor has open. */
static enum ltn_status name_temporary(struct ltn_st_writer *w, struct ltn_error *err)
{
    char open_file[40];
    size_t room = strlen(w->path) + 40;
    bool named = false, has_file = w->fd >= 0;

    w->temporary = malloc(room);
    if (!w->temporary)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its name", w->path);
    snprintf(open_file, sizeof open_file, "/proc/self/fd/%d", w->fd);
    errno = EEXIST;
    for (int i = 0; i < 1000 && !named && errno == EEXIST; i++) {
        snprintf(w->temporary, room, "%s.%ld-%d.tmp", w->path, (long)getpid(), i);
        if (has_file) {
            named = linkat(AT_FDCWD, open_file, AT_FDCWD, w->temporary, AT_SYMLINK_FOLLOW) == 0;
        } else {
            w->fd = open(w->temporary, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
            named = w->fd >= 0;
        }
    }
    if (named)
        return LTN_OK;
    int error = errno;
    free(w->temporary);
    w->temporary = NULL; /* there is nothing to remove */
    return ltn_fail(err, LTN_ERR_IO, "%s: cannot create: %s", w->path, strerror(error));
}

/* Creates the file in the folder of the path: the umask applies, as it would to the file itself. Where that
 * can be had it has no name until it is complete, so that a process that is killed leaves nothing. */
static enum ltn_status create_file(struct ltn_st_writer *w, struct ltn_error *err)
{
    struct stat st;
    if (stat(w->path, &st) == 0 && !S_ISREG(st.st_mode)) /* or the rename would replace /dev/null */
        return ltn_fail(err, LTN_ERR_INPUT, "%s: exists and is not a regular file", w->path);
    char *folder = folder_of(w->path);
    if (!folder)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its folder's name", w->path);
    if (access("/proc/self/fd", F_OK) == 0) /* by which it gets its name */
        w->fd = open(folder, O_RDWR | O_TMPFILE | O_CLOEXEC, 0666);
    free(folder);
    return w->fd >= 0 ? LTN_OK : name_temporary(w, err);
}

/* The file up to its data: *header is malloc'd, [*bytes], a multiple of ALIGNMENT. */
static enum ltn_status make_header(char **header, size_t *bytes, uint64_t *data_bytes, const char *path,
                                   const struct ltn_st_tensor *tensors, size_t n_tensors,
                                   const char *const *metadata, size_t n_metadata, struct ltn_error *err)
{
    *data_bytes = 0;
    for (size_t i = 0; i < n_tensors; i++)
        if (__builtin_add_overflow(*data_bytes, tensors[i].bytes, data_bytes) ||
            *data_bytes > (uint64_t)LTN_JSON_MAX_INT)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: tensors of more than 2^53 bytes", path);
    char *text = print_header(tensors, n_tensors, metadata, n_metadata);
    size_t length = text ? strlen(text) : 0;
    *bytes = (8 + length + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; /* with the length before it */
    *header = text ? malloc(*bytes) : NULL;
    if (*header) {
        for (int i = 0; i < 8; i++)
            (*header)[i] = (char)((uint64_t)(*bytes - 8) >> 8 * i);
        memcpy(*header + 8, text, length);
        memset(*header + 8 + length, ' ', *bytes - 8 - length);
    }
    free(text);
    if (!*header)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for the header", path);
    enum ltn_status status = check_header(path, *header + 8, *bytes - 8, *data_bytes, err);
    if (status != LTN_OK)
        free(*header);
    return status;
}

/* Reserving the room tells of a full disk now rather than after an hour. */
static enum ltn_status begin_file(struct ltn_st_writer *w, uint64_t bytes, struct ltn_error *err)
{
    LTN_TRY(create_file(w, err));
    if (fallocate(w->fd, 0, 0, (off_t)bytes) != 0 && (errno == ENOSPC || errno == EDQUOT || errno == EFBIG))
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot reserve %" PRIu64 " bytes: %s", w->path, bytes,
                        strerror(errno));
    return LTN_OK;
}

static enum ltn_status begin(struct ltn_st_writer *w, const struct ltn_st_tensor *tensors, size_t n_tensors,
                             const char *const *metadata, size_t n_metadata, struct ltn_error *err)
{
    char *header;
    size_t bytes;

    w->hash = XXH3_createState();
    if (!w->hash || XXH3_128bits_reset(w->hash) != XXH_OK)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for the checksum", w->path);
    LTN_TRY(
        make_header(&header, &bytes, &w->data_bytes, w->path, tensors, n_tensors, metadata, n_metadata, err));
    const char *field = memmem(header, bytes, CHECKSUM_FIELD, strlen(CHECKSUM_FIELD));
    w->checksum_at = field ? field - header + (off_t)strlen("\"checksum\":\"") : 0;
    enum ltn_status status = w->memory ? LTN_OK : begin_file(w, bytes + w->data_bytes, err);
    if (status == LTN_OK)
        status = write_all(w, header, bytes, err);
    free(header);
    return status;
}

/* buffer [bytes]; NULL: a file */
static enum ltn_status create(struct ltn_st_writer **out, const char *path, void *buffer, size_t bytes,
                              const struct ltn_st_tensor *tensors, size_t n_tensors,
                              const char *const *metadata, size_t n_metadata, struct ltn_error *err)
{
    *out = NULL;
    struct ltn_st_writer *w = calloc(1, sizeof *w);
    if (!w)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for a writer", path);
    w->fd = -1;
    w->memory = buffer;
    w->room = bytes;
    w->path = strdup(path);
    enum ltn_status status = w->path ? begin(w, tensors, n_tensors, metadata, n_metadata, err)
                                     : ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its name", path);
    if (status != LTN_OK)
        ltn_st_abandon(w);
    else
        *out = w;
    return status;
}

enum ltn_status ltn_st_create(struct ltn_st_writer **out, const char *path,
                              const struct ltn_st_tensor *tensors, size_t n_tensors,
                              const char *const *metadata, size_t n_metadata, struct ltn_error *err)
{
    return create(out, path, NULL, 0, tensors, n_tensors, metadata, n_metadata, err);
}

enum ltn_status ltn_st_create_memory(struct ltn_st_writer **out, const char *name, void *buffer, size_t bytes,
                                     const struct ltn_st_tensor *tensors, size_t n_tensors,
                                     const char *const *metadata, size_t n_metadata, struct ltn_error *err)
{
    return create(out, name, buffer, bytes, tensors, n_tensors, metadata, n_metadata, err);
}

enum ltn_status ltn_st_size(uint64_t *bytes, const char *name, const struct ltn_st_tensor *tensors,
                            size_t n_tensors, const char *const *metadata, size_t n_metadata,
                            struct ltn_error *err)
{
    char *header;
    size_t header_bytes;
    LTN_TRY(make_header(&header, &header_bytes, bytes, name, tensors, n_tensors, metadata, n_metadata, err));
    free(header);
    *bytes += header_bytes;
    return LTN_OK;
}

enum ltn_status ltn_st_write(struct ltn_st_writer *w, const void *data, size_t bytes, struct ltn_error *err)
{
    if (bytes > w->data_bytes - w->written)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: more data than its header says, %" PRIu64 " bytes", w->path,
                        w->data_bytes);
    for (const char *p = data; bytes > 0;) {
        size_t n = bytes < PIECE ? bytes : PIECE;
        XXH3_128bits_update(w->hash, p, n);
        LTN_TRY(write_all(w, p, n, err));
        w->written += n;
        p += n;
        bytes -= n;
    }
    return LTN_OK;
}

void ltn_st_checksum_text(char text[33], uint64_t high, uint64_t low)
{
    snprintf(text, 33, "%016" PRIx64 "%016" PRIx64, high, low);
}

/* The name is durable only when its directory is. */
static enum ltn_status sync_directory(const char *path, struct ltn_error *err)
{
    char *directory = folder_of(path);
    if (!directory)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for its directory's name", path);
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    free(directory);
    if (fd < 0)
        return LTN_OK; /* a directory one may write in but not read */
    int failed = fsync(fd) != 0 && errno != EINVAL;
    int error = errno;
    close(fd);
    return failed ? ltn_fail(err, LTN_ERR_IO, "%s: cannot sync its directory: %s", path, strerror(error))
                  : LTN_OK;
}

static void *close_file(void *fd)
{
    close((int)(intptr_t)fd);
    return NULL;
}

/* The last one to close a file without a name gives back its room, which takes ten milliseconds where the
 * file is of a hundred megabytes. Nothing depends on it, so nobody waits for it. */
static void let_go(int fd)
{
    pthread_t thread;
    if (fd < 0)
        return;
    if (pthread_create(&thread, NULL, close_file, (void *)(intptr_t)fd) == 0)
        pthread_detach(thread);
    else
        close(fd);
}

/* The temporary file takes the name of what was there before. */
static enum ltn_status replace(struct ltn_st_writer *w, struct ltn_error *err)
{
    const int before = open(w->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (rename(w->temporary, w->path) != 0) {
        int error = errno;
        let_go(before);
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot rename %s to it: %s", w->path, w->temporary,
                        strerror(error));
    }
    free(w->temporary);
    w->temporary = NULL;
    enum ltn_status status = sync_directory(w->path, err);
    let_go(before);
    return status;
}

static enum ltn_status complete(struct ltn_st_writer *w, struct ltn_error *err)
{
    if (w->written != w->data_bytes)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: %" PRIu64 " bytes of data came, the header says %" PRIu64,
                        w->path, w->written, w->data_bytes);
    if (w->checksum_at) {
        char text[33];
        XXH128_hash_t hash = XXH3_128bits_digest(w->hash);
        ltn_st_checksum_text(text, hash.high64, hash.low64);
        if (w->memory)
            memcpy(w->memory + w->checksum_at, text, 32);
        else if (pwrite(w->fd, text, 32, w->checksum_at) != 32)
            return ltn_fail(err, LTN_ERR_IO, "%s: cannot write the checksum: %s", w->path, strerror(errno));
    }
    if (w->memory)
        return LTN_OK;
    if (fsync(w->fd) != 0)
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot sync: %s", w->path, strerror(errno));
    if (!w->temporary)
        LTN_TRY(name_temporary(w, err));
    int fd = w->fd;
    w->fd = -1;
    if (close(fd) != 0)
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot close: %s", w->path, strerror(errno));
    return replace(w, err);
}

enum ltn_status ltn_st_finish(struct ltn_st_writer *w, struct ltn_error *err)
{
    enum ltn_status status = complete(w, err);
    ltn_st_abandon(w);
    return status;
}

void ltn_st_abandon(struct ltn_st_writer *w)
{
    if (!w)
        return;
    if (w->fd >= 0)
        close(w->fd);
    if (w->temporary)
        unlink(w->temporary);
    free(w->temporary);
    free(w->path);
    XXH3_freeState(w->hash);
    free(w);
}
