/* What the matrices of a model are multiplied with while it reads a text: the sums that tools/quantize.c
 * weighs its roundings by. */
#ifndef LTN_CALIBRATE_H
#define LTN_CALIBRATE_H

#include "model/checkpoint.h"

struct ltn_calibration;

/* Opens the model on the CPU and encodes the text. Refuses a text of fewer than LTN_CALIBRATE_MIN tokens. The
 * checkpoint must outlive it. */
enum ltn_status ltn_calibration_open(struct ltn_calibration **out, const struct ltn_checkpoint *checkpoint,
                                     const char *text_path, int n_threads, struct ltn_error *err);
void ltn_calibration_close(struct ltn_calibration *c); /* NULL is allowed */

/* Whether the checkpoint's specs[spec] is a matrix that inputs are multiplied with, as an embedding is not
 * unless it is the head too. */
bool ltn_calibration_listens(const struct ltn_checkpoint *checkpoint, size_t spec);

/* Of a spec that listens: *gram: [cols, cols], sum over the text's tokens of x x^T, x the input of the matrix
 * that specs[spec] is. It belongs to c and is valid until the next call. The text is read again for every few
 * layers, asked for in their order. */
enum ltn_status ltn_calibration_gram(struct ltn_calibration *c, size_t spec, const float **gram,
                                     struct ltn_error *err);

#endif
