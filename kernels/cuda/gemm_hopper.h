/* y = x W^T on Hopper's tensor cores, for many rows, with what follows the product done on the way out:
 *
 *   HOPPER_ACT   y = phi(c), SiLU on the first act_cols columns     y: bf16 [rows, outs]
 *   HOPPER_GLU   y = c1 * c2, c2 of a second matrix                 y: bf16 [rows, outs]
 *   HOPPER_ADD   y += c                                             y: f32 [rows, outs]
 *
 * with c[r, o] = row_scale[r] col_scale[o] sum_k x[r, k] W[o, k], col_scale in e4m3 alone; sums in f32, in an
 * order that depends on cols alone. Design and measurements: PREFILL.md. */
#ifndef LTN_GEMM_HOPPER_H
#define LTN_GEMM_HOPPER_H

#include <cuda_runtime.h>
#include <stdint.h>

enum hopper_out { HOPPER_ACT, HOPPER_GLU, HOPPER_ADD };

/* Pointers are device memory, 16-byte aligned, as are rows: cols % 8 == 0 (fp8: 16), outs % 8 == 0. */
struct hopper_gemm {
    enum hopper_out out;
    bool fp8;                            /* x, w, w2 hold e4m3; else bf16 */
    const void *w, *w2;                  /* [outs, cols]; w2 with HOPPER_GLU */
    const void *x;                       /* [rows, cols] */
    void *y;                             /* must not overlap x */
    const float *row_scale;              /* [rows] or NULL: 1 */
    const float *col_scale, *col_scale2; /* [outs], with fp8 alone; of w, w2 */
    int32_t rows, outs, cols;
    int32_t act_cols; /* HOPPER_ACT: a multiple of 8 */
};

/* Whether the current device and this build have the kernel. */
bool hopper_gemm_present(int device);

/* Issues it on `stream`, on n_sms multiprocessors (any number gives the same bits). */
cudaError_t hopper_gemm_run(cudaStream_t stream, int n_sms, const struct hopper_gemm *g);

#endif
