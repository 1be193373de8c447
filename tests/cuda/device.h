/* What the tests and the bench of the CUDA backend share: opening it, and buffers on both sides. */
#ifndef LTN_TESTS_CUDA_DEVICE_H
#define LTN_TESTS_CUDA_DEVICE_H

#include "kernels/ops.h"

/* The backend out of libltn_cuda.so, looked for in $LTN_BIN, else in the current folder. Exits with a line
 * where it cannot be had. */
struct ltn_backend *open_cuda(enum ltn_dtype weights_dtype);

/* Room for every operation on up to `rows` rows of these maps, of which all but one may be NULL. */
void reserve_room(struct ltn_backend *be, const struct ltn_linear *l1, const struct ltn_linear *l2,
                  const struct ltn_attention *a, int32_t rows);

#endif
