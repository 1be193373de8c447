/* What the sources of the CUDA backend share: the backend itself, failing, launching, element types.
 *
 * Every kernel of this backend may be launched while the one before it still runs (programmatic dependent
 * launch, sm_90 and later), so that it can fetch weights meanwhile. Hence the rule: a kernel calls
 * wait_for_previous() before it touches anything that another kernel writes, and only immutable weights
 * before.
 */
#ifndef LTN_CUDA_CUH
#define LTN_CUDA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <math.h>
#include <mutex>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

extern "C" {
#include "kernels/ops.h"
}

struct gemm_library; /* cuBLASLt, opened when it is first needed: gemm.cu */

enum {
    STAGES = 6,                 /* pinned buffers on the way to and from the device */
    STAGE_BYTES = 4 << 20,      /* of each */
    WORKSPACE_BYTES = 32 << 20, /* for cuBLASLt; fixed, as the algorithm it picks depends on it */
    CONVERTED_BYTES = 64 << 20, /* activations on their way to f16, see gemm.cu */
};

/* Device memory that operations need beside what they are given: one allocation, made by reserve (room.cu).
 * All of the device memory there is: what alloc gave, this room, and, from opening on, partials and
 * step_words. */
enum room_part {
    ROOM_COPY,      /* bf16 copy and sums of squares of a residual stream; outlives its operation: see turn */
    ROOM_FP8,       /* activations in e4m3, with their scales */
    ROOM_WIDENED,   /* a quantised matrix in bf16, or two */
    ROOM_TURNED,    /* q and k turned by LRPE */
    ROOM_LIGHTNING, /* of the tensor-core attention; zero at first */
    ROOM_LIBRARY,   /* cuBLASLt's workspace */
    ROOM_CONVERTED, /* activations in f16, with their scale */
    N_ROOM_PARTS
};
struct rooms {
    int users; /* the backend, and the recordings whose operations use it */
    void *memory;
    void *at[N_ROOM_PARTS];
    size_t bytes[N_ROOM_PARTS];
};

struct cuda_backend {
    struct ltn_backend base;
    int device;
    int n_sms;
    bool hopper;         /* gemm_hopper.cu has its kernels here */
    bool overlaps;       /* programmatic dependent launch works */
    bool apart;          /* the next launch begins when all before it has ended: see may_overlap */
    bool batch_hopper;   /* so does batch_hopper.cu */
    bool step_streams;   /* and step.cu */
    size_t max_shared;   /* bytes of shared memory that a block may have */
    cudaStream_t stream; /* the one queue */
    std::recursive_mutex lock;
    uint8_t *stage[STAGES]; /* pinned, [STAGE_BYTES] each */
    cudaEvent_t staged[STAGES];
    int next_stage;
    size_t stage_used; /* bytes of stage[next_stage] already given out */
    struct gemm_library *gemm;
    struct rooms *room;  /* what reserve made; NULL before */
    const float *copied; /* the stream that ROOM_COPY is of; NULL unless the operation just before left it */
    int32_t copied_rows, copied_cols;
    uint8_t *partials;    /* device: batch.cu's partial sums and counters */
    void *step_words;     /* device: step.cu's; NULL: the device cannot hold all blocks at once */
    const int64_t *steps; /* while recording: what is added to positions; else NULL */
};

static inline struct cuda_backend *cuda_of(struct ltn_backend *be)
{
    return reinterpret_cast<struct cuda_backend *>(be);
}

/* Every operation holds one: the calling thread gets the backend's device, and the call is atomic. `copied`
 * is what the operation before left beside its residual stream: good for this operation alone, as any other
 * may write there. */
struct turn {
    std::lock_guard<std::recursive_mutex> hold;
    const float *copied;
    explicit turn(struct cuda_backend *be) : hold(be->lock), copied(be->copied)
    {
        be->copied = NULL;
        cudaSetDevice(be->device);
    }
};

enum ltn_status cuda_fail(struct cuda_backend *be, struct ltn_error *err, const char *what, const char *file,
                          int line, cudaError_t code);

/* backend.cu: all device memory comes from here. As alloc of ops.h. */
enum ltn_status device_alloc(struct cuda_backend *be, void **out, size_t bytes, struct ltn_error *err);

/* room.cu */
enum ltn_status cuda_reserve(struct ltn_backend *be, const struct ltn_network *net, int32_t rows,
                             int32_t logits, struct ltn_error *err);
/* *out: the part, which must have been reserved with so many bytes. */
enum ltn_status room_part(struct cuda_backend *be, void **out, enum room_part part, size_t bytes,
                          struct ltn_error *err);
void room_drop(struct cuda_backend *be, struct rooms *room); /* by one user; NULL is allowed */

/* What reserve asks of each file: raises needed[N_ROOM_PARTS] to what its operations take in this network,
 * with calls of up to so many rows, and so many for the head. */
void lightning_room(const struct ltn_network *net, int32_t rows, size_t *needed);
void linear_room(const struct cuda_backend *be, const struct ltn_network *net, int32_t rows, size_t *needed);
void quant_room(const struct cuda_backend *be, const struct ltn_network *net, int32_t rows, int32_t logits,
                size_t *needed);
void gemm_room(const struct ltn_network *net, size_t *needed);
static inline void raise(size_t *needed, size_t bytes)
{
    if (*needed < bytes)
        *needed = bytes;
}

/* Leaves the enclosing function with an error that names the call and its place. */
#define CUDA_TRY(be, err, call)                                                                              \
    do {                                                                                                     \
        cudaError_t cuda_try_code_ = (call);                                                                 \
        if (cuda_try_code_ != cudaSuccess)                                                                   \
            return cuda_fail(be, err, #call, __FILE__, __LINE__, cuda_try_code_);                            \
    } while (0)

/* Whether the launch at hand may begin before the one before it has ended. Kernels fetch weights ahead of
 * their wait for it, so whoever has just written weights sets `apart`, once. */
static inline bool may_overlap(struct cuda_backend *be)
{
    const bool apart = be->apart;
    be->apart = false;
    return be->overlaps && !apart;
}

/* cluster: blocks of each; 1: none. */
template <typename... P, typename... A>
static cudaError_t launch_cluster(struct cuda_backend *be, void (*kernel)(P...), unsigned cluster, dim3 grid,
                                  dim3 block, size_t shared, A... args)
{
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = be->stream;
    config.attrs = attributes;
    if (may_overlap(be)) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = cluster;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
    return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}

template <typename... P, typename... A>
static cudaError_t launch(struct cuda_backend *be, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                          A... args)
{
    return launch_cluster(be, kernel, 1, grid, block, shared, args...);
}

#define LAUNCH(be, err, kernel, ...) CUDA_TRY(be, err, launch(be, kernel, __VA_ARGS__))
#define LAUNCH_CLUSTER(be, err, kernel, ...) CUDA_TRY(be, err, launch_cluster(be, kernel, __VA_ARGS__))

static inline __device__ void let_next_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

static inline __device__ void wait_for_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

static __device__ __forceinline__ float to_f32(float v)
{
    return v;
}
static __device__ __forceinline__ float to_f32(__nv_bfloat16 v)
{
    return __bfloat162float(v);
}
static __device__ __forceinline__ float to_f32(__half v)
{
    return __half2float(v);
}

template <typename T> static __device__ __forceinline__ T from_f32(float v);
template <> __device__ __forceinline__ float from_f32<float>(float v)
{
    return v;
}
template <> __device__ __forceinline__ __nv_bfloat16 from_f32<__nv_bfloat16>(float v)
{
    return __float2bfloat16(v);
}
template <> __device__ __forceinline__ __half from_f32<__half>(float v)
{
    return __float2half(v);
}

/* What another kernel wrote is read past the L1 cache, which an overlapping launch may find stale. */
static __device__ __forceinline__ float load_fresh(const float *p)
{
    return __ldcg(p);
}
static __device__ __forceinline__ float load_fresh(const __nv_bfloat16 *p)
{
    return to_f32(__ldcg(p));
}

/* Four elements from an address that is aligned for it. */
static __device__ __forceinline__ float4 load_fresh4(const float *p)
{
    return __ldcg(reinterpret_cast<const float4 *>(p));
}
static __device__ __forceinline__ float4 load_fresh4(const __nv_bfloat16 *p)
{
    uint2 u = __ldcg(reinterpret_cast<const uint2 *>(p));
    return make_float4(__uint_as_float(u.x << 16), __uint_as_float(u.x & 0xffff0000u),
                       __uint_as_float(u.y << 16), __uint_as_float(u.y & 0xffff0000u));
}

/* 16 bytes on their way into shared memory, past the registers and the L1 cache. (With an L2 policy operand,
 * ptxas 13.0 may put the policy into an odd uniform register, which is an illegal instruction.) */
static __device__ __forceinline__ void copy_async(void *shared, const void *global)
{
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
        "l"(global)
        : "memory");
}

static __device__ __forceinline__ void end_copy_group()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until all but the last N groups of this thread have arrived. */
template <int N> static __device__ __forceinline__ void wait_copy_groups()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

static __device__ __forceinline__ float warp_sum(float v)
{
    for (int offset = 16; offset > 0; offset /= 2)
        v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

/* Sum over the block, the same for all threads; scratch: [32] shared floats, free again on return. */
static __device__ inline float block_sum(float v, float *scratch)
{
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0)
        scratch[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < (int)(blockDim.x + 31) / 32; i++)
        sum += scratch[i];
    __syncthreads();
    return sum;
}

/* Every feature map but LTN_ACT_EXP, which needs a maximum. */
static __device__ inline float activate(float x, enum ltn_act act)
{
    switch (act) {
    case LTN_ACT_SILU:
        return x / (1 + expf(-x));
    case LTN_ACT_GELU:
        return x * normcdff(x);
    case LTN_ACT_RELU:
        return x > 0 ? x : 0;
    case LTN_ACT_ELU:
        return x > 0 ? x : expm1f(x);
    case LTN_ACT_SIGMOID:
        return 1 / (1 + expf(-x));
    case LTN_ACT_LEAK:
        return x > 0 ? x : 0.01f * x;
    case LTN_ACT_ELU_ADD1:
        return x > 0 ? 1 + x : expf(x);
    case LTN_ACT_ELU_ADD2:
        return x > 0 ? 2 + x : 1 + expf(x);
    case LTN_ACT_SINE:
        return sinf(x);
    default:
        return x;
    }
}

/* cos or sin of theta * pos, reduced to part of a turn in f64. */
static __device__ inline float lrpe_turn(float theta, double pos, bool sine)
{
    const double turns = 0.15915494309189535 * theta * pos;
    const float half_turns = 2 * (float)(turns - rint(turns));
    return sine ? sinpif(half_turns) : cospif(half_turns);
}

static inline bool aligned16(const void *p)
{
    return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

static inline unsigned blocks_for(int64_t n, int64_t each)
{
    return (unsigned)((n + each - 1) / each);
}

/* Calls CALL(weights' element type, activations' element type), both as open() paired them. */
#define FOR_TYPES(be, err, dtype, CALL)                                                                      \
    ((be)->base.act_dtype == LTN_F32 && (dtype) == LTN_F32     ? CALL(float, float)                          \
     : (be)->base.act_dtype == LTN_BF16 && (dtype) == LTN_BF16 ? CALL(__nv_bfloat16, __nv_bfloat16)          \
     : (be)->base.act_dtype == LTN_BF16 && (dtype) == LTN_F16  ? CALL(__half, __nv_bfloat16)                 \
                                                               : refuse_dtype(be, err, dtype))

enum ltn_status refuse_dtype(struct cuda_backend *be, struct ltn_error *err, enum ltn_dtype dtype);

/* ---- the operations of kernels/ops.h, by file ------------------------------------------------------------
 */

/* rows.cu */
enum ltn_status cuda_embed(struct ltn_backend *be, float *x, const struct ltn_matrix *table,
                           const int32_t *ids, int32_t rows, float scale, struct ltn_error *err);
enum ltn_status cuda_norm(struct ltn_backend *be, void *y, const float *x, const struct ltn_norm *norm,
                          int32_t rows, int32_t cols, struct ltn_error *err);
enum ltn_status cuda_gated_norm(struct ltn_backend *be, void *y, const void *o, const void *gate,
                                int32_t ld_gate, const struct ltn_norm *norm, int32_t rows, int32_t cols,
                                struct ltn_error *err);
enum ltn_status cuda_activation(struct ltn_backend *be, void *x, int32_t ld, int32_t rows, int32_t cols,
                                int32_t group, enum ltn_act act, struct ltn_error *err);
enum ltn_status cuda_multiply(struct ltn_backend *be, void *a, const void *b, int64_t n,
                              struct ltn_error *err);

/* lightning_decode.cu and lightning_prefill.cu: one or many rows a sequence; at most SEQS_PER_LAUNCH of them
 */
enum { SEQS_PER_LAUNCH = 64 };
struct seq_table {
    const int64_t *steps; /* NULL, or added to every position: see record */
    struct ltn_seq seq[SEQS_PER_LAUNCH];
};
enum ltn_status lightning_decode(struct cuda_backend *be, void *o, const void *q, const void *k,
                                 const void *v, int32_t ld, const struct ltn_attention *a,
                                 const struct seq_table *seqs, int32_t n_seqs, struct ltn_error *err);
enum ltn_status lightning_prefill(struct cuda_backend *be, void *o, const void *q, const void *k,
                                  const void *v, int32_t ld, const struct ltn_attention *a,
                                  const struct seq_table *seqs, int32_t n_seqs, struct ltn_error *err);

struct ltn_lightning_call;
/* The tensor-core kernels, where they take the call (*done); its workspaces are set here. backend.cu */
enum ltn_status lightning_tensor(struct cuda_backend *be, struct ltn_lightning_call *call, bool *done,
                                 struct ltn_error *err);
enum ltn_status cuda_lightning(struct ltn_backend *be, void *o, const void *q, const void *k, const void *v,
                               int32_t ld, const struct ltn_attention *a, const struct ltn_seq *seqs,
                               int32_t n_seqs, struct ltn_error *err);

/* What a product reads and what becomes of it; y = In(x) W^T + b. */
enum product_in {
    IN_ACT,   /* x: act [rows, cols] */
    IN_NORM,  /* Norm(x), x: f32 [rows, cols] */
    IN_GATED, /* gate * Norm(x), x: act [rows, cols] */
};
enum product_out {
    OUT_ACT, /* y: act [rows, outs], its first act_cols columns through the feature map */
    OUT_ADD, /* y: f32 [rows, outs], += */
    OUT_F32, /* y: f32 [rows, outs] */
};
struct product {
    const void *w, *w2;        /* [outs, cols]; w2: of a second product, whose result multiplies; or NULL */
    const float *bias, *bias2; /* [outs] or NULL */
    int32_t outs, cols, rows;
    enum product_in in;
    const void *x;
    const void *gate;
    int32_t ld_gate;
    struct ltn_norm norm;
    const float *squares; /* [n_squares, rows] sums over each row whose 1 / rms scales IN_ACT's x; or NULL: */
    int32_t n_squares;    /* gemm_hopper.cu alone */
    enum product_out out;
    void *y;
    enum ltn_act act;
    int32_t act_cols;
};

/* gemv.cu: few rows */
enum { GEMV_ROWS = 4 };
bool gemv_fits(const struct cuda_backend *be, int32_t cols, int32_t rows); /* its input, in shared memory */
enum ltn_status gemv_open(struct cuda_backend *be, struct ltn_error *err);
enum ltn_status gemv(struct cuda_backend *be, const struct product *p, enum ltn_dtype dtype,
                     struct ltn_error *err);
/* batch.cu: a batch of rows, 16-bit weights; IN_ACT alone */
bool batch_suits(const struct cuda_backend *be, const struct product *p, enum ltn_dtype dtype);
enum ltn_status batch_open(struct cuda_backend *be, struct ltn_error *err);
enum ltn_status batch(struct cuda_backend *be, const struct product *p, enum ltn_dtype dtype,
                      struct ltn_error *err);

/* batch_hopper.cu: the same for bf16 weights, where batch_hopper_open() allows it */
bool batch_hopper_open(struct cuda_backend *be, struct ltn_error *err);
enum ltn_status batch_hopper(struct cuda_backend *be, const struct product *p, struct ltn_error *err);

/* gemm.cu: many rows; IN_ACT and a single matrix alone, no feature map */
enum ltn_status gemm(struct cuda_backend *be, const struct product *p, enum ltn_dtype dtype,
                     struct ltn_error *err);
void gemm_close(struct cuda_backend *be);

/* rows.cu: e4m3 under a scale per row */
enum { FP8_COLS = 6 * 8 * 256 }; /* the most columns */
struct fp8_rows {
    uint8_t *codes; /* [rows, cols] */
    float *scales;  /* [rows] */
};
/* y = In(x) of a product; of IN_NORM and IN_GATED, SimpleRMSNorm alone. cols % 16 == 0 */
enum ltn_status rows_to_fp8(struct cuda_backend *be, struct fp8_rows *y, const struct product *p,
                            struct ltn_error *err);
enum ltn_status cuda_matrix_fp8(struct ltn_backend *be, const struct ltn_matrix *out,
                                const struct ltn_matrix *w, struct ltn_error *err);

/* linear.cu */
enum ltn_status cuda_linear(struct ltn_backend *be, void *y, const void *x, const struct ltn_linear *l,
                            int32_t rows, struct ltn_error *err);
enum ltn_status cuda_linear_add(struct ltn_backend *be, float *x, const void *y, const struct ltn_linear *l,
                                int32_t rows, struct ltn_error *err);
enum ltn_status cuda_logits(struct ltn_backend *be, float *out, const void *y, const struct ltn_matrix *w,
                            int32_t rows, struct ltn_error *err);
enum ltn_status cuda_norm_linear(struct ltn_backend *be, void *y, const float *x, const struct ltn_norm *norm,
                                 const struct ltn_linear *l, enum ltn_act act, int32_t act_cols,
                                 int32_t group, int32_t rows, void *scratch, struct ltn_error *err);
enum ltn_status cuda_norm_glu(struct ltn_backend *be, void *y, const float *x, const struct ltn_norm *norm,
                              const struct ltn_linear *l1, const struct ltn_linear *l2, int32_t rows,
                              void *scratch, void *scratch2, struct ltn_error *err);
enum ltn_status cuda_gated_linear_add(struct ltn_backend *be, float *x, const void *o, const void *gate,
                                      int32_t ld_gate, const struct ltn_norm *norm,
                                      const struct ltn_linear *l, int32_t rows, void *scratch,
                                      struct ltn_error *err);
enum ltn_status cuda_lightning_linear_add(struct ltn_backend *be, float *x, const void *q, const void *k,
                                          const void *v, int32_t ld, const struct ltn_attention *a,
                                          const struct ltn_seq *seqs, int32_t n_seqs, const void *gate,
                                          int32_t ld_gate, const struct ltn_norm *norm,
                                          const struct ltn_linear *l, int32_t rows, void *o, void *scratch,
                                          struct ltn_error *err);
enum ltn_status cuda_norm_logits(struct ltn_backend *be, float *out, const float *x,
                                 const struct ltn_norm *norm, const struct ltn_matrix *w, int32_t rows,
                                 void *scratch, struct ltn_error *err);

/* step.cu */
enum ltn_status step_open(struct cuda_backend *be, struct ltn_error *err);
enum ltn_status cuda_step(struct ltn_backend *be, const struct ltn_network *net, const struct ltn_seq *seq,
                          const int32_t *id, float *logits, struct ltn_error *err);

/* transfer.cu */
enum ltn_status cuda_upload(struct ltn_backend *be, void *dst, const void *host, size_t bytes,
                            struct ltn_error *err);
enum ltn_status cuda_download(struct ltn_backend *be, void *host, const void *src, size_t bytes,
                              struct ltn_error *err);

/* sample.cu */
enum ltn_status cuda_sample(struct ltn_backend *be, int32_t *ids, const float *logits, int32_t rows,
                            int32_t cols, const struct ltn_choice *choice, struct ltn_draws *draws,
                            float *scratch, int64_t *steps, int32_t *log, int32_t log_rows,
                            struct ltn_error *err);

/* record.cu */
enum ltn_status cuda_record(struct ltn_backend *be, const int64_t *steps, struct ltn_error *err);
enum ltn_status cuda_recorded(struct ltn_backend *be, struct ltn_recording **out, struct ltn_error *err);
enum ltn_status cuda_replay(struct ltn_backend *be, struct ltn_recording *recording, struct ltn_error *err);
void cuda_recording_free(struct ltn_backend *be, struct ltn_recording *recording);

#endif
