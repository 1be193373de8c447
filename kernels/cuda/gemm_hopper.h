/* y = x W^T on Hopper's tensor cores, for many rows, with what follows the product done on the way out:
 *
 *   HOPPER_ACT   y = phi(c), SiLU on the first act_cols columns     y: bf16 [rows, outs]
 *   HOPPER_GLU   y = c1 * c2, c2 of a second matrix                 y: bf16 [rows, outs]
 *   HOPPER_ADD   y += c                                             y: f32 [rows, outs]
 *   HOPPER_RESIDUAL   the same, and copy = bf16(y), new_squares: sums of y^2 over 256 columns each; bf16
 * alone
 *
 * with c[r, o] = row_scale[r] col_scale[o] sum_k x[r, k] W[o, k], col_scale in e4m3 alone, and where squares
 * are given, row_scale[r] = 1 / sqrt(their sum over the row / cols + 1e-6): SimpleRMSNorm has no weights, so
 * that W Norm(x) = (W x) / rms(x), and a norm costs no pass over x. Sums in f32, in an order that depends on
 * cols alone. Design and measurements: PREFILL.md. */
#ifndef LTN_GEMM_HOPPER_H
#define LTN_GEMM_HOPPER_H

#include <cuda_runtime.h>
#include <stdint.h>

enum hopper_out { HOPPER_ACT, HOPPER_GLU, HOPPER_ADD, HOPPER_RESIDUAL };

/* Pointers are device memory, 16-byte aligned, as are rows: cols % 8 == 0 (fp8: 16), outs % 8 == 0. */
struct hopper_gemm {
    enum hopper_out out;
    bool fp8;               /* x, w, w2 hold e4m3; else bf16 */
    const void *w, *w2;     /* [outs, cols]; w2 with HOPPER_GLU */
    const void *x;          /* [rows, cols] */
    void *y;                /* must not overlap x */
    const float *row_scale; /* [rows] or NULL: 1 */
    const float *squares;   /* [n_squares, rows] or NULL */
    int32_t n_squares;
    void *copy;                          /* HOPPER_RESIDUAL: bf16 [rows, outs] */
    float *new_squares;                  /* HOPPER_RESIDUAL: [hopper_squares(outs), rows] */
    const float *col_scale, *col_scale2; /* [outs], with fp8 alone; of w, w2 */
    int32_t rows, outs, cols;
    int32_t act_cols; /* HOPPER_ACT: a multiple of 8 */
};

/* Whether the current device and this build have the kernel. */
bool hopper_gemm_present(int device);

/* Sums of squares that a row of so many columns has. */
int32_t hopper_squares(int32_t cols);

/* copy and squares of y as HOPPER_RESIDUAL leaves them, to the bit; y: f32 [rows, cols], cols % 8 == 0 */
cudaError_t hopper_square(cudaStream_t stream, void *copy, float *squares, const float *y, int32_t rows,
                          int32_t cols);

/* Issues it on `stream`, on n_sms multiprocessors (any number gives the same bits). */
cudaError_t hopper_gemm_run(cudaStream_t stream, int n_sms, const struct hopper_gemm *g);

#endif
