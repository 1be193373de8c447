/* Reading what torch.save wrote: a zip archive with one pickle, data.pkl, that names tensors and the storages
 * they are views of, and one stored entry, data/KEY, for each storage.
 *
 * The pickle is hostile input. Its program is followed by a machine of 24 opcodes (protocol 2) that knows
 * collections.OrderedDict, torch._utils._rebuild_tensor_v2 and four storage types by name and makes tuples,
 * dictionaries and tensor descriptions; anything else is refused, and nothing is ever executed. Memory is
 * bounded by a multiple of the pickle's size.
 */
#ifndef LTN_TORCH_BIN_H
#define LTN_TORCH_BIN_H

#include "model/safetensors.h"

#include <zip.h>

struct ltn_torch_tensor {
    char *name;
    enum ltn_st_dtype dtype; /* F16, BF16, F32 or F64 */
    int32_t rank;
    int64_t shape[LTN_ST_MAX_RANK];
    int64_t stride[LTN_ST_MAX_RANK]; /* elements, >= 0 */
    int64_t offset;                  /* of its first element in the storage, in elements */
    int64_t span;                    /* elements from its first to its last, both counted; 0: it has none */
    zip_uint64_t entry;              /* of the storage in the archive */
    uint64_t entry_bytes;
};

struct ltn_torch_bin {
    char *path;
    zip_t *zip;
    struct ltn_torch_tensor *tensors; /* [n_tensors] in the order of the file; several may share a storage */
    size_t n_tensors;
};

/* Every view is checked to lie inside its storage, and every storage to have its bytes in the archive. On
 * failure *bin is zero. */
enum ltn_status ltn_torch_open(struct ltn_torch_bin *bin, const char *path, struct ltn_error *err);
void ltn_torch_close(struct ltn_torch_bin *bin); /* a zeroed one is allowed */

#endif
