/* From one .ltn file to another whose matrices are quantised (kernels/quant.h).
 *
 * Without a text every weight goes to the nearest code. With a text the model reads it first, and each matrix
 * is quantised so that its products with what it was given there change least (tools/feedback.h). An
 * embedding, which is read by rows, is rounded to the nearest, unless it is the head too. Both ways are
 * deterministic, with any number of threads.
 */
#ifndef LTN_QUANTIZE_H
#define LTN_QUANTIZE_H

#include "kernels/dtype.h"
#include "kernels/status.h"
#include "model/checkpoint.h"

struct ltn_quantize_options {
    enum ltn_dtype dtype;
    const char *calibrate; /* a text file, or NULL: to the nearest code */
    int n_threads;         /* 0: one per core */
    /* May be NULL. Counts parameters; anything but LTN_OK stops the work and is returned. */
    enum ltn_status (*progress)(void *ctx, uint64_t done, uint64_t total);
    void *ctx;
};

/* A text for calibration has at least so many tokens; of a longer one so many are read. */
enum { LTN_CALIBRATE_MIN = 4096, LTN_CALIBRATE_MAX = 65536 };

/* src must not be quantised. A file at `path` is replaced only once all went well. Memory: the largest matrix
 * in f32 and, with a text, for the matrices of a few layers at a time cols x cols floats each. */
enum ltn_status ltn_quantize(const struct ltn_checkpoint *src, const char *path,
                             const struct ltn_quantize_options *options, struct ltn_error *err);

#endif
