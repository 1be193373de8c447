/* Lightning attention over many rows (prefill) on tensor cores: the CUDA backend's `lightning` operation for
 * bf16 activations and the usual head sizes. What the kernels do, how a sequence is split and what was
 * measured: LIGHTNING.md.
 *
 *   S <- exp(-s) S + k_t^T v_t,   o_t = q_t S      per sequence and head (Lightning Attention-2, arXiv
 *   2401.04658, Algorithm 1), computed in chunks of 64 rows: inside a chunk by the masked product
 *   (q k^T . M) v, across chunks through the f32 state.
 */
#ifndef LTN_LIGHTNING_MMA_H
#define LTN_LIGHTNING_MMA_H

#include "kernels/ops.h"

#include <cuda_runtime.h>

/* One call. All pointers but `a`, `seqs` are device memory; sequences and shapes as in ltn_ops.lightning. */
struct ltn_lightning_call {
    void *o;                       /* [rows, n_heads * e] bf16, contiguous */
    const void *q, *k, *v;         /* bf16, row r of head h at p + r * ld + h * e */
    int32_t ld;                    /* elements between rows of q, k, v */
    const struct ltn_attention *a; /* e, heads, slopes, theta; state_offset applies to seqs[].state */
    const struct ltn_seq *seqs;    /* [n_seqs], ascending and without gaps; host memory, free on return */
    int32_t n_seqs;
    void *workspace; /* zeroed once before its first use; calls on different streams need different ones */
    size_t workspace_bytes;
    int32_t walkers;      /* parallel segments per sequence; 0: chosen from the sizes (LIGHTNING.md) */
    bool portable;        /* take the mma.sync kernels even where the Hopper kernel would run */
    const int64_t *steps; /* device memory: what a replay adds to every position; NULL: nothing */
    void *turned;         /* [ltn_lightning_turned()] bytes for q and k turned by LRPE, or NULL */
    const void *gate; /* bf16, row r at gate + r * ld_gate, or NULL; else o becomes gate * o, and squares */
    int32_t ld_gate;
    float *squares; /* [n_heads * e / 64, rows] the sums of o^2 over 64 columns each, before the gate */
};

/* Whether there is a kernel for this call on the current device: e in {64, 80, 96, 128, 160, 192, 256},
 * with LRPE in {32, 40, 48} too, 16-byte aligned rows of q, k, v, o and gate, enough shared memory and
 * workspace; a gate takes the Hopper kernel, and so e in {64, 128}, with LRPE 128 and room for what is
 * turned. Else the caller's generic kernel must do it. */
bool ltn_lightning_supports(const struct ltn_lightning_call *call);

/* Bytes of workspace for any call with this shape, whatever its rows and sequences. */
size_t ltn_lightning_workspace(int32_t n_heads, int32_t head_dim, bool lrpe);

/* Bytes for q and k turned by LRPE, with which the Hopper kernel takes such a call; 0: it would not. */
size_t ltn_lightning_turned(int64_t rows, int32_t n_heads, int32_t head_dim);

/* Issues the operation on `stream`. The call must be supported. Never allocates, never waits. */
cudaError_t ltn_lightning_prefill(cudaStream_t stream, const struct ltn_lightning_call *call);

#endif
