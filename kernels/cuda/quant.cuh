/* Quantised weights on the device: what gemv_quant.cu, linear_quant.cu and linear.cu share. */
#ifndef LTN_CUDA_QUANT_CUH
#define LTN_CUDA_QUANT_CUH

#include "kernels/cuda/cuda.cuh"

/* The scales that go with a product's w and w2. */
struct quant_scales {
    const void *w, *w2;
};

/* gemv_quant.cu: one row */
bool gemv_quant_suits(const struct cuda_backend *be, const struct product *p);
enum ltn_status gemv_quant_open(struct cuda_backend *be, struct ltn_error *err);
enum ltn_status gemv_quant(struct cuda_backend *be, const struct product *p, const struct quant_scales *s,
                           enum ltn_dtype dtype, struct ltn_error *err);

/* linear_quant.cu: a product of rows p->rows with quantised matrices. *done: whether it was made, row by row;
 * if not, *plain and *plain2 (where l2 is there) are the same maps in bf16, in a buffer of the backend that
 * the next call overwrites. */
enum ltn_status quant_product(struct cuda_backend *be, const struct product *p, const struct ltn_linear *l,
                              const struct ltn_linear *l2, struct ltn_linear *plain,
                              struct ltn_linear *plain2, bool *done, struct ltn_error *err);
enum ltn_status quant_embed(struct cuda_backend *be, float *x, const struct ltn_matrix *table,
                            const int32_t *ids, int32_t rows, float scale, struct ltn_error *err);

#endif
