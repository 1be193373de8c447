/* One view over the weights of a Hugging Face directory, however they are stored: model.safetensors,
 * pytorch_model.bin, or many of either with an index.
 */
#ifndef LTN_SOURCE_H
#define LTN_SOURCE_H

#include "model/safetensors.h"
#include "tools/torch_bin.h"

struct ltn_source_tensor {
    const char *name; /* owned by its file */
    enum ltn_st_dtype dtype;
    int32_t rank;
    int64_t shape[LTN_ST_MAX_RANK];
    size_t file;                          /* index into files */
    const struct ltn_st_tensor *st;       /* in a safetensors file, else NULL */
    const struct ltn_torch_tensor *torch; /* in a .bin, else NULL */
};

struct ltn_source_file {
    char *name; /* inside the directory */
    struct ltn_st_file st;
    struct ltn_torch_bin torch;
};

struct ltn_source {
    char *dir;
    struct ltn_source_file *files;
    size_t n_files;
    struct ltn_source_tensor *tensors; /* [n_tensors] sorted by name; no name stands twice */
    size_t n_tensors;
};

/* Opens the first that is there of model.safetensors, model.safetensors.index.json, pytorch_model.bin,
 * pytorch_model.bin.index.json, as Hugging Face's own loader does. An index must put every tensor where it
 * is. On failure *source is zero. */
enum ltn_status ltn_source_open(struct ltn_source *source, const char *dir, struct ltn_error *err);
void ltn_source_close(struct ltn_source *source); /* a zeroed one is allowed */

const struct ltn_source_tensor *ltn_source_find(const struct ltn_source *source, const char *name);

/* True where both names stand for the same bytes on disk. */
bool ltn_source_same(const struct ltn_source_tensor *a, const struct ltn_source_tensor *b);

/* Reads one tensor from its first element to its last in row-major order, whatever its strides. A contiguous
 * one takes no memory; of another, the part of the storage that it spans is held. Readers of one source must
 * be used by one thread, in any interleaving. */
struct ltn_source_reader;
enum ltn_status ltn_source_reader_open(struct ltn_source_reader **out, const struct ltn_source *source,
                                       const struct ltn_source_tensor *tensor, struct ltn_error *err);
/* The next n elements, in their stored dtype. */
enum ltn_status ltn_source_read(struct ltn_source_reader *reader, void *out, size_t n, struct ltn_error *err);
void ltn_source_reader_close(struct ltn_source_reader *reader); /* NULL is allowed */

/* A whole regular file of at most max_bytes, malloc'd, with a zero after its end; the caller frees it.
 * LTN_ERR_IO: it cannot be opened or read; *found (may be NULL) tells whether there is such a file. */
enum ltn_status ltn_read_file(char **out, size_t *bytes, const char *path, size_t max_bytes, bool *found,
                              struct ltn_error *err);

#endif
