/* The .ltn file: a safetensors file that holds one model, complete.
 *
 * __metadata__ (all strings, exactly these keys):
 *   format      "ltn"
 *   version     "1"
 *   config      JSON text, see model/config.h
 *   dtype       "f32", "bf16", "f16", "q8", "fp8" or "q4": of the matrices
 *   checksum    XXH3-128 of the data bytes, 32 hexadecimal digits, lower case; also the model's identity
 *   tokenizer   JSON text, see tokenizer/tokenizer.h; "" when the file has no tokenizer
 *   provenance  free text: where the weights came from
 * Tensors: exactly the set of ltn_config_tensors, under the same names and shapes; every matrix in the dtype
 * of the metadata, every other tensor in F32, BF16 or F16 (it is widened at load anyway); plus "tokenizer"
 * (U8 [n], n > 0) when the metadata has one. Order: those whose size is a multiple of 64 bytes in the order
 * of the forward pass, then the rest, the tokenizer last; so everything but small odd tensors is aligned.
 *
 * With a quantised dtype (kernels/quant.h) the embedding, the head and TransNormerLLM3's gates are q8 all the
 * same: they are small, or what is lost in them is lost twice. A quantised matrix NAME [rows, cols] is stored
 * as its codes under that name, directly followed in the forward order by "NAME.scales":
 *   q8   I8 [rows, cols]               F16 [rows, groups]       groups = cols / 32, rounded up
 *   fp8  F8_E4M3 [rows, cols]          F32 [rows, 1]
 *   q4   U8 [rows, 16 groups]          F16 [rows, groups]
 */
#ifndef LTN_CHECKPOINT_H
#define LTN_CHECKPOINT_H

#include "model/config.h"
#include "model/safetensors.h"

struct ltn_checkpoint {
    struct ltn_st_file file;
    struct ltn_config config;
    struct ltn_tensor_spec *specs;        /* [n_specs] what the config asks for, in forward order */
    const struct ltn_st_tensor **tensors; /* [n_specs] where the file has it */
    const struct ltn_st_tensor **scales;  /* [n_specs] of quantised matrices, else NULL */
    size_t n_specs;
    enum ltn_dtype dtype;     /* as the metadata says and the tensors confirm */
    const uint8_t *tokenizer; /* [tokenizer_bytes] inside the mapping; NULL: none */
    size_t tokenizer_bytes;
    const char *tokenizer_json; /* the metadata value */
    const char *checksum;       /* 32 hexadecimal digits */
};

/* Opens and validates: every name, dtype, shape and offset must be what the config asks for. The data itself
 * is not read. On failure *checkpoint is zero. */
enum ltn_status ltn_checkpoint_open(struct ltn_checkpoint *checkpoint, const char *path,
                                    struct ltn_error *err);
void ltn_checkpoint_close(struct ltn_checkpoint *checkpoint); /* a zeroed one is allowed */

/* Reads all of it: the checksum must match and every weight must be finite; the error names the first that is
 * not by its tensor and its index in the flat tensor. */
enum ltn_status ltn_checkpoint_verify(const struct ltn_checkpoint *checkpoint, struct ltn_error *err);

/* ---- the rules above, for whoever writes such a file ---- */

/* The dtype of a matrix in a file of the given dtype. */
enum ltn_dtype ltn_checkpoint_matrix_dtype(enum ltn_dtype file, const struct ltn_tensor_spec *spec);

/* One tensor of the file. */
struct ltn_stored {
    char name[80];
    size_t spec; /* the one of specs that it belongs to */
    bool is_scales;
    enum ltn_st_dtype dtype; /* of what is neither a matrix nor scales: F32, and BF16 and F16 are as good */
    int32_t rank;
    int64_t shape[3];
    uint64_t bytes; /* in that dtype */
};

/* What a file of the given dtype stores for specs, [n_specs], in forward order. *stored is malloc'd, the
 * caller frees it. */
enum ltn_status ltn_checkpoint_stored(struct ltn_stored **stored, size_t *n,
                                      const struct ltn_tensor_spec *specs, size_t n_specs,
                                      enum ltn_dtype dtype, struct ltn_error *err);

/* order[k] is which of n tensors, given in forward order with their sizes, comes k-th in the file. */
void ltn_checkpoint_order(size_t *order, const uint64_t *bytes, size_t n);
/* The metadata's word for a dtype: "f32", "bf16", "f16", "q8", "fp8", "q4"; and back, false for any other. */
const char *ltn_checkpoint_dtype_key(enum ltn_dtype dtype);
bool ltn_checkpoint_dtype_from_key(enum ltn_dtype *out, const char *key);
/* The weight dtype that a stored one is; false where it is none of F32, BF16 and F16. */
bool ltn_checkpoint_dtype(enum ltn_dtype *out, enum ltn_st_dtype dtype);
/* Index of the first infinity or NaN of data, [n] elements at any address; n: all are finite. */
size_t ltn_first_not_finite(const void *data, enum ltn_dtype dtype, size_t n);
/* "[2, 3]"; cut where it does not fit. */
void ltn_shape_print(char *text, size_t size, const int64_t *shape, int32_t rank);

#endif
