/* Reading and writing safetensors files. Reading is hostile-input code: nothing in the file is believed.
 *
 * Layout: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the
 * data. Accepted: a regular file; header at most 1 MiB, beginning with '{'; JSON depth at most 8; plain
 * decimal integers only; no duplicate names; the dtypes below; rank at most 8; exactly the bytes that dtype
 * and shape ask for; tensors that lie inside the file, do not overlap and leave no gap; their data ends at
 * the end of the file. As the format says, a tensor without elements (a 0 in its shape) is one of 0 bytes,
 * and a shape of [] is one element.
 */
#ifndef LTN_SAFETENSORS_H
#define LTN_SAFETENSORS_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum ltn_st_dtype {
    LTN_ST_BOOL,
    LTN_ST_U8,
    LTN_ST_I8,
    LTN_ST_F8_E4M3,
    LTN_ST_I16,
    LTN_ST_F16,
    LTN_ST_BF16,
    LTN_ST_I32,
    LTN_ST_F32,
    LTN_ST_I64,
    LTN_ST_F64
};

size_t ltn_st_dtype_size(enum ltn_st_dtype dtype);      /* bytes of one element */
const char *ltn_st_dtype_name(enum ltn_st_dtype dtype); /* "F32", "BF16", ... */

enum { LTN_ST_MAX_RANK = 8 };

struct ltn_st_tensor {
    const char *name; /* owned by the file */
    enum ltn_st_dtype dtype;
    int32_t rank;
    int64_t shape[LTN_ST_MAX_RANK];
    uint64_t offset; /* of its first byte, from the start of the file */
    uint64_t bytes;
};

struct ltn_st_file {
    char *path;
    int fd;             /* -1: not a file but the caller's memory */
    const uint8_t *map; /* the whole file, mapped read-only */
    uint64_t size;
    uint64_t data_start;
    struct ltn_st_tensor *tensors; /* [n_tensors] in the order of their offsets */
    size_t n_tensors;
    char **metadata; /* [2 * n_metadata] key, value, key, value, ... of __metadata__ */
    size_t n_metadata;
};

/* Maps the file and reads its header. On failure *file is zero and nothing stays open. */
enum ltn_status ltn_st_open(struct ltn_st_file *file, const char *path, struct ltn_error *err);
/* The same of a file's bytes in memory, data [bytes], which are borrowed; `name` stands for the path. */
enum ltn_status ltn_st_open_memory(struct ltn_st_file *file, const char *name, const void *data, size_t bytes,
                                   struct ltn_error *err);
void ltn_st_close(struct ltn_st_file *file); /* a zeroed file is allowed */

const struct ltn_st_tensor *ltn_st_find(const struct ltn_st_file *file, const char *name); /* NULL: none */
const char *ltn_st_metadata(const struct ltn_st_file *file, const char *key);              /* NULL: none */

/* ---- writing: names, shapes and metadata first, then the data in the same order, streamed ---- */

struct ltn_st_writer;

/* Writes to a file in the folder of `path`, without a name where the system can, so that a process that is
 * killed leaves nothing, else under a temporary one; it appears under its own name, synced, in ltn_st_finish.
 * The header is padded with spaces to a multiple of 64 bytes, so that the first tensor is aligned.
 * tensors[i].offset is ignored and computed; tensors[i].bytes must agree with dtype and shape. metadata: [2 *
 * n_metadata] as above. A metadata value of 32 zeros under the key "checksum" is replaced by the XXH3-128 of
 * the data in hexadecimal. */
enum ltn_status ltn_st_create(struct ltn_st_writer **out, const char *path,
                              const struct ltn_st_tensor *tensors, size_t n_tensors,
                              const char *const *metadata, size_t n_metadata, struct ltn_error *err);
/* The same into the caller's memory, buffer [bytes], which must have the size of ltn_st_size: the file as it
 * would lie on disk. */
enum ltn_status ltn_st_create_memory(struct ltn_st_writer **out, const char *name, void *buffer, size_t bytes,
                                     const struct ltn_st_tensor *tensors, size_t n_tensors,
                                     const char *const *metadata, size_t n_metadata, struct ltn_error *err);
/* Bytes of the file that such a writer makes. */
enum ltn_status ltn_st_size(uint64_t *bytes, const char *name, const struct ltn_st_tensor *tensors,
                            size_t n_tensors, const char *const *metadata, size_t n_metadata,
                            struct ltn_error *err);
/* Appends data. Tensors follow each other without gaps, so the calls need not end where tensors end. */
enum ltn_status ltn_st_write(struct ltn_st_writer *writer, const void *data, size_t bytes,
                             struct ltn_error *err);
/* Checks that all data came, patches the checksum, syncs, renames. The writer is gone afterwards, also on
 * failure. */
enum ltn_status ltn_st_finish(struct ltn_st_writer *writer, struct ltn_error *err);
/* XXH3-128 as the header's text has it: 32 hexadecimal digits, the high half first. */
void ltn_st_checksum_text(char text[33], uint64_t high, uint64_t low);
/* Removes the temporary file; for the path on which something else failed. NULL is allowed. */
void ltn_st_abandon(struct ltn_st_writer *writer);

#endif
