/* From a Hugging Face directory to one .ltn file.
 *
 * Element types. A tensor keeps the dtype in which it is stored, but for this: all matrices of a .ltn file
 * have one dtype, so matrices that are stored in several become F32, which holds every F16 and BF16 value;
 * F64 becomes F32; and where a dtype is asked for, the matrices get it, rounded to nearest even. Vectors
 * (norms, biases, LRPE angles) are never narrowed to 16 bits. A weight that is not finite, or no longer is
 * after narrowing, is an error that names it.
 *
 * The head. lm_head.weight equal to the embedding, or absent with tie_word_embeddings: tied, and not stored
 * again. Tied by config with another lm_head, or untied by config with none, is an error.
 */
#ifndef LTN_HF_CONVERT_H
#define LTN_HF_CONVERT_H

#include "kernels/dtype.h"
#include "kernels/status.h"

#include <stdbool.h>
#include <stdint.h>

struct ltn_convert_options {
    bool has_dtype;
    enum ltn_dtype dtype; /* of the matrices, where has_dtype */
    /* Both may be NULL. progress counts bytes of the output; anything but LTN_OK stops the conversion and is
     * returned. note receives, after success, one line about each thing worth knowing. */
    enum ltn_status (*progress)(void *ctx, uint64_t done, uint64_t total);
    void (*note)(void *ctx, const char *text);
    void *ctx;
};

/* Memory: some MB, whatever the size of the checkpoint (a tensor stored with transposed strides is held
 * whole). A file at `path` is replaced only once all went well. */
enum ltn_status ltn_hf_convert(const char *dir, const char *path, const struct ltn_convert_options *options,
                               struct ltn_error *err);

#endif
