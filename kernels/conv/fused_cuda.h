/* The device's side of the fused convolution. */
#ifndef LTN_CONV_FUSED_CUDA_H
#define LTN_CONV_FUSED_CUDA_H

#include "kernels/conv/fused.h"

#include <cuda_runtime.h>

/* packed: device memory of plan.bytes whose first plan.at_weights bytes hold ltn_fused_tables' result. filter
 * [co][ci / groups][hf][wf] on the device, bf16 or f32. */
cudaError_t ltn_fused_pack(cudaStream_t stream, const ltn_fused_plan &plan, const fused_problem &p, void *packed,
                           const void *filter);

/* y = conv(x) + bias, negative values become 0 if relu. bias f32 [co] or NULL. x and y 16-byte aligned. */
cudaError_t ltn_fused_run(cudaStream_t stream, const ltn_fused_plan &plan, const fused_problem &p, const void *packed,
                          const void *x, const float *bias, bool relu, void *y, int n_sm);

#endif
