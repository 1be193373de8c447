/* THE boundary between the model and the hardware: the operations that a backend offers.
 *
 * The model (model/decoder.c) writes the forward pass once, in these operations. A backend is a table of
 * them. An operation knows sizes and pointers, never a model, a file or a flag.
 *
 * Numerics contract
 *   - Residual stream, recurrent state and logits are f32 on every backend.
 *   - Activations ("act": everything between two residual additions) have the backend's own element type,
 * act_dtype: f32 on the CPU. A `void *` below points at act elements; a `float *` at f32.
 *   - Sums run in f32 or wider, in an order that depends on sizes alone, never on thread count or timing: the
 * same call on the same machine gives the same bits.
 *   - Norms divide by sqrt(mean + eps) formed in f32 or wider.
 *
 * Memory contract
 *   - Every pointer named here is backend memory (alloc), except where it says host. On a backend with
 * host_memory set, backend memory is ordinary memory and weights may be used where they lie.
 *   - No operation allocates: what it needs of its own, reserve has made. Rows are contiguous unless a
 * leading dimension `ld*` (in elements) is given.
 *   - `rows` may be anything from 1 up. Sizes are those of the model; any value >= 1 must work.
 *
 * Operations are issued in order on the backend's one queue; results are visible to the host after download
 * or sync. One backend may be used by several threads: each call is atomic, and callers bring their own
 * buffers.
 */
#ifndef LTN_OPS_H
#define LTN_OPS_H

#include "kernels/dtype.h"
#include "kernels/quant.h"
#include "kernels/sample.h"
#include "kernels/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ltn_backend;
struct ltn_recording;

/* A linear map's weights: y = x W^T, stored [out, in] as checkpoints store them. */
struct ltn_matrix {
    const void *data; /* [rows, cols], 64-byte aligned; quantised: [rows] of ltn_row_bytes each */
    enum ltn_dtype dtype;
    int32_t rows;       /* outputs */
    int32_t cols;       /* inputs */
    const void *scales; /* of quantised data, see kernels/quant.h; else NULL */
};

struct ltn_linear {
    struct ltn_matrix w;
    const float *bias;     /* [w.rows] or NULL */
    struct ltn_matrix fp8; /* w as LTN_FP8, for products of many rows in e4m3; data NULL: they run in w */
};

/* weight == NULL: SimpleRMSNorm, x / sqrt(mean(x^2) + 1e-6), no parameters (TransNormerLLM, arXiv 2307.14995,
 * "Tensor normalization"). Else LayerNorm, (x - mean) / sqrt(var + 1e-5) * weight + bias. */
struct ltn_norm {
    const float *weight; /* [cols] or NULL */
    const float *bias;   /* [cols], set exactly when weight is */
};

/* Feature maps. LTN_ACT_EXP is exp(x - max over its group); the others act on each element alone. */
enum ltn_act {
    LTN_ACT_NONE,
    LTN_ACT_SILU,
    LTN_ACT_GELU, /* x * (1 + erf(x / sqrt 2)) / 2 */
    LTN_ACT_RELU,
    LTN_ACT_ELU, /* alpha 1 */
    LTN_ACT_SIGMOID,
    LTN_ACT_EXP,
    LTN_ACT_LEAK,     /* leaky ReLU, slope 0.01 */
    LTN_ACT_ELU_ADD1, /* 1 + elu(x) */
    LTN_ACT_ELU_ADD2, /* 2 + elu(x) */
    LTN_ACT_SINE,
};

/* One stream's part of a call. Sequences lie one after another and cover all rows: seq[0].first == 0,
 * seq[i+1].first == seq[i].first + seq[i].count. Prefill of one text is one sequence; batched decode is B
 * sequences of one row each; anything between is allowed. */
struct ltn_seq {
    float *state;  /* this stream's whole recurrent state, all layers, backend memory */
    int64_t pos;   /* position of its first row, >= 0 */
    int32_t first; /* its first row */
    int32_t count; /* its rows, >= 1 */
};

/* Lightning attention of one layer. e = head_dim; d = e, or 2e with LRPE (theta != NULL). */
struct ltn_attention {
    int32_t n_heads;
    int32_t head_dim;    /* e */
    const float *slopes; /* [n_heads], s > 0: a token j steps back weighs exp(-s j) */
    const float *theta;  /* [n_heads, head_dim] LRPE angles per position, or NULL */
    size_t state_offset; /* of this layer in ltn_seq.state, in floats */
};

/* The weights of one layer; names as in the paper's formulas, in the widths D (residual), H (q, k, v, gate)
 * and G (channel mixer). */
struct ltn_layer {
    struct ltn_norm token_norm;
    struct ltn_linear qkv;          /* [4H, D] rows q, k, v, u; TNL3: [3H, D] rows q, k, v */
    struct ltn_linear gate0, gate1; /* TNL3: [gate_dim, D], [H, gate_dim] */
    struct ltn_attention attention; /* slopes, LRPE angles, place of the state */
    struct ltn_norm attn_norm;      /* over all H features */
    struct ltn_linear out;          /* [D, H] */
    struct ltn_norm channel_norm;
    struct ltn_linear l1, l2; /* [G, D] */
    struct ltn_linear l3;     /* [D, G] */
};

/* A whole model, for the operation that takes a token through all of it. */
struct ltn_network {
    int32_t vocab_size, embed_dim, hidden_dim, glu_dim; /* V, D, H, G */
    int32_t gate_dim;                                   /* 0: the gate is part of qkv */
    int32_t n_layers;
    enum ltn_act act;
    float embed_scale;
    struct ltn_matrix embed, head; /* [V, D] */
    struct ltn_norm final_norm;
    const struct ltn_layer *layers; /* host, [n_layers] */
};

struct ltn_ops {
    /* ---- device memory and order --------------------------------------------------------------------------
     */
    void (*close)(struct ltn_backend *be); /* releases the backend; every buffer must have been freed */
    /* *out: 64-byte aligned, contents undefined. LTN_ERR_MEMORY names what was needed and what was free. */
    enum ltn_status (*alloc)(struct ltn_backend *be, void **out, size_t bytes, struct ltn_error *err);
    void (*free)(struct ltn_backend *be, void *p); /* NULL is allowed */
    enum ltn_status (*zero)(struct ltn_backend *be, void *p, size_t bytes, struct ltn_error *err);
    /* host -> backend; the host buffer may be reused on return */
    enum ltn_status (*upload)(struct ltn_backend *be, void *dst, const void *host, size_t bytes,
                              struct ltn_error *err);
    /* backend -> host; complete on return, and so is all that was issued before */
    enum ltn_status (*download)(struct ltn_backend *be, void *host, const void *src, size_t bytes,
                                struct ltn_error *err);
    enum ltn_status (*copy)(struct ltn_backend *be, void *dst, const void *src, size_t bytes,
                            struct ltn_error *err);
    enum ltn_status (*sync)(struct ltn_backend *be, struct ltn_error *err); /* waits, reports late failures */
    /* *out = the sum of the 64-bit words at src, as whole numbers, wrapping: every byte is read, next to none
     * written. out: backend memory, one word; bytes: a multiple of 16. NULL where host_memory is set. */
    enum ltn_status (*sum)(struct ltn_backend *be, uint64_t *out, const void *src, size_t bytes,
                           struct ltn_error *err);

    /* Makes the room that operations need beside what they are given, for calls of up to `rows` rows in this
     * network (whose layers have their fp8 by then), and `logits` rows to its head: the operations of such
     * calls allocate nothing, and of others may fail. The room is the backend's own, one for all its users,
     * and only grows. net: for the call only. LTN_ERR_MEMORY: as from alloc, and all is as before. NULL: no
     * operation needs any. */
    enum ltn_status (*reserve)(struct ltn_backend *be, const struct ltn_network *net, int32_t rows,
                               int32_t logits, struct ltn_error *err);

    /* ---- the small operations that every backend has ------------------------------------------------------
     */
    /* x[r] = scale * table[ids[r]].  x: [rows, table->cols] f32; ids: [rows], each in [0, table->rows) */
    enum ltn_status (*embed)(struct ltn_backend *be, float *x, const struct ltn_matrix *table,
                             const int32_t *ids, int32_t rows, float scale, struct ltn_error *err);
    /* y = Norm(x), row by row.  y: act [rows, cols]; x: f32 [rows, cols] */
    enum ltn_status (*norm)(struct ltn_backend *be, void *y, const float *x, const struct ltn_norm *norm,
                            int32_t rows, int32_t cols, struct ltn_error *err);
    /* y = gate * Norm(o): the output of the token mixer before its last projection (TransNormerLLM, "Gating
     * mechanism", with the norm over all heads together).  y, o: act [rows, cols]; gate: act, row r at gate +
     * r * ld_gate
     */
    enum ltn_status (*gated_norm)(struct ltn_backend *be, void *y, const void *o, const void *gate,
                                  int32_t ld_gate, const struct ltn_norm *norm, int32_t rows, int32_t cols,
                                  struct ltn_error *err);
    /* y = x W^T + b.  y: act [rows, W.rows]; x: act [rows, W.cols] */
    enum ltn_status (*linear)(struct ltn_backend *be, void *y, const void *x, const struct ltn_linear *l,
                              int32_t rows, struct ltn_error *err);
    /* x += y W^T + b, into the residual stream.  x: f32 [rows, W.rows]; y: act [rows, W.cols] */
    enum ltn_status (*linear_add)(struct ltn_backend *be, float *x, const void *y, const struct ltn_linear *l,
                                  int32_t rows, struct ltn_error *err);
    /* out = y W^T.  out: f32 [rows, W.rows]; y: act [rows, W.cols] */
    enum ltn_status (*logits)(struct ltn_backend *be, float *out, const void *y, const struct ltn_matrix *w,
                              int32_t rows, struct ltn_error *err);
    /* x = act(x) in place on `cols` columns of each row.  x: act, row r at x + r * ld. LTN_ACT_EXP takes its
     * maximum over runs of `group` columns (cols is a multiple of group). */
    enum ltn_status (*activation)(struct ltn_backend *be, void *x, int32_t ld, int32_t rows, int32_t cols,
                                  int32_t group, enum ltn_act act, struct ltn_error *err);
    /* a *= b, element by element.  a, b: act [n] */
    enum ltn_status (*multiply)(struct ltn_backend *be, void *a, const void *b, int64_t n,
                                struct ltn_error *err);
    /* Lightning attention with state (Lightning Attention-2, arXiv 2401.04658, Algorithm 1): for each
     * sequence, head and row t, with ratio r = exp(-s), S the head's state [d, e] and q, k rotated by LRPE to
     * width d where theta is set, S <- r S + k_t^T v_t,   o_t = q_t S          (no scaling, no softmax) S is
     * read from and left in seq.state + attention.state_offset as [n_heads, d, e] f32, cosine rows first. The
     * decay must be applied as S += k^T v - (1 - r) S with 1 - r = -expm1(-s) from f64, and likewise
     * -expm1(-s m) over a block of m rows: in the last layers r rounds to 1 in f32. LRPE: [x cos(theta p), x
     * sin(theta p)] at position p = seq.pos + t, the angle reduced in f64. o: act [rows, n_heads * e]; q, k,
     * v: act, row r of each at + r * ld; n_seqs >= 1. seqs is HOST memory, and may be reused on return. */
    enum ltn_status (*lightning)(struct ltn_backend *be, void *o, const void *q, const void *k, const void *v,
                                 int32_t ld, const struct ltn_attention *a, const struct ltn_seq *seqs,
                                 int32_t n_seqs, struct ltn_error *err);

    /* A hint, which changes no result: of the products with `rows` rows, one with w comes next but for that
     * of the operation that follows. NULL: of no use to this backend. */
    void (*expect)(struct ltn_backend *be, const struct ltn_matrix *w, int32_t rows);

    /* ---- fused operations: each may be NULL, and then is its composition of the above
     * ----------------------
     *
     * Results agree with the composition up to the rounding of what lies between. `scratch` is room for act
     * [rows, cols of the weights], scratch2 for act [rows, rows of the weights]: contents undefined on
     * return.
     */
    /* y = act(Norm(x) W^T + b), the feature map on the first act_cols columns, in groups of `group`.
     * y: act [rows, W.rows]; x: f32 [rows, W.cols] */
    enum ltn_status (*norm_linear)(struct ltn_backend *be, void *y, const float *x,
                                   const struct ltn_norm *norm, const struct ltn_linear *l, enum ltn_act act,
                                   int32_t act_cols, int32_t group, int32_t rows, void *scratch,
                                   struct ltn_error *err);
    /* y = (Norm(x) W1^T + b1) * (Norm(x) W2^T + b2).  y: act [rows, W1.rows]; x: f32 [rows, W1.cols] */
    enum ltn_status (*norm_glu)(struct ltn_backend *be, void *y, const float *x, const struct ltn_norm *norm,
                                const struct ltn_linear *l1, const struct ltn_linear *l2, int32_t rows,
                                void *scratch, void *scratch2, struct ltn_error *err);
    /* x += (gate * Norm(o)) W^T + b.  x: f32 [rows, W.rows]; o: act [rows, W.cols]; gate as in gated_norm */
    enum ltn_status (*gated_linear_add)(struct ltn_backend *be, float *x, const void *o, const void *gate,
                                        int32_t ld_gate, const struct ltn_norm *norm,
                                        const struct ltn_linear *l, int32_t rows, void *scratch,
                                        struct ltn_error *err);
    /* x += (gate * Norm(o)) W^T + b, o = lightning(q, k, v): a token mixer behind its first product. x: f32
     * [rows, W.rows]; o: act [rows, W.cols], undefined on return as scratch is; the rest as in lightning and
     * gated_norm */
    enum ltn_status (*lightning_linear_add)(struct ltn_backend *be, float *x, const void *q, const void *k,
                                            const void *v, int32_t ld, const struct ltn_attention *a,
                                            const struct ltn_seq *seqs, int32_t n_seqs, const void *gate,
                                            int32_t ld_gate, const struct ltn_norm *norm,
                                            const struct ltn_linear *l, int32_t rows, void *o, void *scratch,
                                            struct ltn_error *err);
    /* out = Norm(x) W^T.  out: f32 [rows, W.rows]; x: f32 [rows, W.cols] */
    enum ltn_status (*norm_logits)(struct ltn_backend *be, float *out, const float *x,
                                   const struct ltn_norm *norm, const struct ltn_matrix *w, int32_t rows,
                                   void *scratch, struct ltn_error *err);

    /* out = w as LTN_FP8: out->data [w->rows, w->cols] and out->scales f32 [w->rows], a row's largest
     * magnitude over 448. w: LTN_BF16 or LTN_F16. LTN_ERR_UNSUPPORTED: the device has no e4m3 products. Where
     * a linear map has its fp8 set, prefill rounds activations to e4m3 too, each row under a scale of its
     * own.
     */
    enum ltn_status (*matrix_fp8)(struct ltn_backend *be, const struct ltn_matrix *out,
                                  const struct ltn_matrix *w, struct ltn_error *err);

    /* One token of one stream through the whole network: its logits, and its state advanced. id: [1]; logits:
     * f32 [V]; both backend memory. LTN_ERR_UNSUPPORTED: nothing was done, as sizes or switches do not suit;
     * compose. */
    enum ltn_status (*step)(struct ltn_backend *be, const struct ltn_network *net, const struct ltn_seq *seq,
                            const int32_t *id, float *logits, struct ltn_error *err);

    /* ---- decoding without the host between the tokens: where record is set, so are all of these -----------
     */
    /* ids[r] = the token chosen from logits[r], as kernels/sample.h has it, to the last id the same on every
     * backend; log[*steps % log_rows][r] = ids[r], or what stands there in place of an id, and then ids[r] =
     * 0; draws[r] advances by the token; *steps += 1. scratch: room for f32 [2, rows, cols]. ids: [rows];
     * logits: f32 [rows, cols]; draws: [rows]; log: [log_rows, rows]; all backend memory; choice: host. */
    enum ltn_status (*sample)(struct ltn_backend *be, int32_t *ids, const float *logits, int32_t rows,
                              int32_t cols, const struct ltn_choice *choice, struct ltn_draws *draws,
                              float *scratch, int64_t *steps, int32_t *log, int32_t log_rows,
                              struct ltn_error *err);
    /* From record to recorded, operations of this thread are noted, not run (upload, download, alloc, free,
     * reserve and sync must not be called); other threads wait. recorded ends it, also after an operation
     * that failed. replay issues all that was noted, on the same memory, with *steps (backend memory), as it
     * stands when an operation runs, added to every position of it. */
    enum ltn_status (*record)(struct ltn_backend *be, const int64_t *steps, struct ltn_error *err);
    enum ltn_status (*recorded)(struct ltn_backend *be, struct ltn_recording **out, struct ltn_error *err);
    enum ltn_status (*replay)(struct ltn_backend *be, struct ltn_recording *recording, struct ltn_error *err);
    void (*recording_free)(struct ltn_backend *be, struct ltn_recording *recording); /* NULL is allowed */
};

/* What every backend begins with; its own fields follow. */
struct ltn_backend {
    const struct ltn_ops *ops;
    enum ltn_dtype act_dtype;
    uint32_t dtypes;       /* bit 1 << t: takes matrices of ltn_dtype t */
    bool host_memory;      /* backend memory is host memory: weights are used in place */
    int32_t chunk_rows;    /* rows per prefill call that suit this backend, at most, */
    int64_t chunk_values;  /* and elements of the residual stream in them; 0: any number */
    int64_t n_allocations; /* of device memory so far, room included; 0 where host_memory is set */
    size_t room_bytes;     /* what reserve holds by now */
    char name[96];         /* for people, e.g. "CPU, 8 threads, AVX-512" */
};

/* The plain reference: one thread, one loop per formula, f32 storage. The oracle of every other backend. */
enum ltn_status ltn_reference_open(struct ltn_backend **out, struct ltn_error *err);

/* The fast CPU backend. n_threads 0: one per available core. The instruction set is chosen at run time. */
enum ltn_status ltn_cpu_open(struct ltn_backend **out, int n_threads, struct ltn_error *err);

/* The CUDA backend lives in libltn_cuda.so, which exports exactly this function under the name
 * LTN_CUDA_ENTRY; weights_dtype picks the arithmetic: f32 weights keep f32 activations, all others get
 * bf16. */
#define LTN_CUDA_ENTRY "ltn_cuda_open"
typedef enum ltn_status ltn_cuda_open_fn(struct ltn_backend **out, int device, enum ltn_dtype weights_dtype,
                                         struct ltn_error *err);

#endif
