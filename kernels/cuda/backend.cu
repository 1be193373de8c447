/* Opening and closing the device, its memory, and the table of operations. */
#include "kernels/cuda/gemm_hopper.h"
#include "kernels/cuda/lightning_mma.h"
#include "kernels/cuda/quant.cuh"

#include <new>
#include <stdio.h>

enum ltn_status cuda_fail(struct cuda_backend *be, struct ltn_error *err, const char *what, const char *file,
                          int line, cudaError_t code)
{
    cudaGetLastError(); /* so that the next call does not report this failure again */
    const char *base = strrchr(file, '/');
    return ltn_fail(err, code == cudaErrorMemoryAllocation ? LTN_ERR_MEMORY : LTN_ERR_DEVICE,
                    "cuda:%d: %s (%s): %s:%d: %.120s", be->device, cudaGetErrorString(code),
                    cudaGetErrorName(code), base ? base + 1 : file, line, what);
}

enum ltn_status refuse_dtype(struct cuda_backend *be, struct ltn_error *err, enum ltn_dtype dtype)
{
    return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                    "cuda:%d: %s weights with %s activations; the backend was opened for others", be->device,
                    ltn_dtype_name(dtype), ltn_dtype_name(be->base.act_dtype));
}

/* ---- memory ----------------------------------------------------------------------------------------------
 */

enum ltn_status device_alloc(struct cuda_backend *be, void **out, size_t bytes, struct ltn_error *err)
{
    cudaError_t code = cudaMalloc(out, bytes ? bytes : 1);
    if (code != cudaErrorMemoryAllocation) {
        CUDA_TRY(be, err, code);
        be->base.n_allocations++;
        return LTN_OK;
    }
    size_t free = 0, total = 0;
    cudaGetLastError();
    cudaMemGetInfo(&free, &total);
    return ltn_fail(err, LTN_ERR_MEMORY, "cuda:%d: %.1f MiB of device memory needed, %.1f of %.1f MiB free",
                    be->device, (double)bytes / (1 << 20), (double)free / (1 << 20),
                    (double)total / (1 << 20));
}

static enum ltn_status cuda_alloc(struct ltn_backend *base, void **out, size_t bytes, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    return device_alloc(be, out, bytes, err);
}

static void cuda_free(struct ltn_backend *base, void *p)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    cudaFree(p);
}

static enum ltn_status cuda_zero(struct ltn_backend *base, void *p, size_t bytes, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    CUDA_TRY(be, err, cudaMemsetAsync(p, 0, bytes, be->stream));
    return LTN_OK;
}

static enum ltn_status cuda_copy(struct ltn_backend *base, void *dst, const void *src, size_t bytes,
                                 struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    CUDA_TRY(be, err, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, be->stream));
    return LTN_OK;
}

static enum ltn_status cuda_sync(struct ltn_backend *base, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    CUDA_TRY(be, err, cudaStreamSynchronize(be->stream));
    return LTN_OK;
}

enum { SUM_THREADS = 256, SUM_LOADS = 4, SUM_TILE = SUM_THREADS * SUM_LOADS };

static __global__ void __launch_bounds__(SUM_THREADS)
    sum_kernel(uint64_t *out, const ulonglong2 *src, size_t n)
{
    uint64_t sum = 0;
    let_next_start();
    wait_for_previous();
    for (size_t tile = (size_t)blockIdx.x * SUM_TILE; tile < n; tile += (size_t)gridDim.x * SUM_TILE) {
        const size_t first = tile + threadIdx.x;
        ulonglong2 v[SUM_LOADS];
#pragma unroll
        for (int i = 0; i < SUM_LOADS; i++)
            v[i] = first + i * SUM_THREADS < n ? __ldcs(src + first + i * SUM_THREADS) : ulonglong2{0, 0};
#pragma unroll
        for (int i = 0; i < SUM_LOADS; i++)
            sum += v[i].x + v[i].y;
    }
    for (int offset = 16; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0)
        atomicAdd((unsigned long long *)out, (unsigned long long)sum);
}

static enum ltn_status cuda_sum(struct ltn_backend *base, uint64_t *out, const void *src, size_t bytes,
                                struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    CUDA_TRY(be, err, cudaMemsetAsync(out, 0, sizeof *out, be->stream));
    LAUNCH(be, err, sum_kernel, dim3(8 * be->n_sms), dim3(SUM_THREADS), 0, out, (const ulonglong2 *)src,
           bytes / 16);
    return LTN_OK;
}

/* ---- attention: by sequences -----------------------------------------------------------------------------
 */

void lightning_room(const struct ltn_network *net, int32_t rows, size_t *needed)
{
    for (int32_t i = 0; i < net->n_layers && rows > 1; i++) {
        const struct ltn_attention *a = &net->layers[i].attention;
        raise(&needed[ROOM_LIGHTNING], ltn_lightning_workspace(a->n_heads, a->head_dim, a->theta != NULL));
        if (a->theta)
            raise(&needed[ROOM_TURNED], ltn_lightning_turned(rows, a->n_heads, a->head_dim));
    }
}

/* For sequences of more than one row. */
enum ltn_status lightning_tensor(struct cuda_backend *be, struct ltn_lightning_call *call, bool *done,
                                 struct ltn_error *err)
{
    const struct ltn_attention *a = call->a;
    bool many = false;
    *done = false;
    for (int32_t i = 0; i < call->n_seqs; i++)
        many = many || call->seqs[i].count > 1;
    if (!many || be->base.act_dtype != LTN_BF16)
        return LTN_OK;
    call->workspace_bytes = ltn_lightning_workspace(a->n_heads, a->head_dim, a->theta != NULL);
    LTN_TRY(room_part(be, &call->workspace, ROOM_LIGHTNING, call->workspace_bytes, err));
    if (a->theta) {
        const struct ltn_seq *last = &call->seqs[call->n_seqs - 1];
        const size_t turned =
            ltn_lightning_turned((int64_t)last->first + last->count, a->n_heads, a->head_dim);
        if (turned > 0)
            LTN_TRY(room_part(be, &call->turned, ROOM_TURNED, turned, err));
    }
    *done = ltn_lightning_supports(call);
    if (*done)
        CUDA_TRY(be, err, ltn_lightning_prefill(be->stream, call));
    return LTN_OK;
}

enum ltn_status cuda_lightning(struct ltn_backend *base, void *o, const void *q, const void *k, const void *v,
                               int32_t ld, const struct ltn_attention *a, const struct ltn_seq *seqs,
                               int32_t n_seqs, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    struct ltn_lightning_call call = {};
    call.o = o;
    call.q = q;
    call.k = k;
    call.v = v;
    call.ld = ld;
    call.a = a;
    call.seqs = seqs;
    call.n_seqs = n_seqs;
    call.steps = be->steps;
    bool done;
    LTN_TRY(lightning_tensor(be, &call, &done, err));
    if (done)
        return LTN_OK;
    /* Runs of sequences of one row each, and runs of longer ones. */
    for (int32_t i = 0; i < n_seqs;) {
        bool one = seqs[i].count == 1;
        struct seq_table table;
        int32_t n = 0;
        table.steps = be->steps;
        for (; i < n_seqs && n < SEQS_PER_LAUNCH && (seqs[i].count == 1) == one; i++)
            table.seq[n++] = seqs[i];
        LTN_TRY((one ? lightning_decode : lightning_prefill)(be, o, q, k, v, ld, a, &table, n, err));
    }
    return LTN_OK;
}

/* ---- opening and closing ---------------------------------------------------------------------------------
 */

static void cuda_close(struct ltn_backend *base)
{
    struct cuda_backend *be = cuda_of(base);
    cudaSetDevice(be->device);
    if (be->stream)
        cudaStreamSynchronize(be->stream);
    gemm_close(be);
    room_drop(be, be->room);
    cudaFree(be->partials);
    cudaFree(be->step_words);
    for (int i = 0; i < STAGES; i++) {
        cudaFreeHost(be->stage[i]);
        if (be->staged[i])
            cudaEventDestroy(be->staged[i]);
    }
    if (be->stream)
        cudaStreamDestroy(be->stream);
    delete be;
}

static const struct ltn_ops cuda_ops = {
    .close = cuda_close,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .zero = cuda_zero,
    .upload = cuda_upload,
    .download = cuda_download,
    .copy = cuda_copy,
    .sync = cuda_sync,
    .sum = cuda_sum,
    .reserve = cuda_reserve,
    .embed = cuda_embed,
    .norm = cuda_norm,
    .gated_norm = cuda_gated_norm,
    .linear = cuda_linear,
    .linear_add = cuda_linear_add,
    .logits = cuda_logits,
    .activation = cuda_activation,
    .multiply = cuda_multiply,
    .lightning = cuda_lightning,
    .expect = NULL,
    .norm_linear = cuda_norm_linear,
    .norm_glu = cuda_norm_glu,
    .gated_linear_add = cuda_gated_linear_add,
    .lightning_linear_add = cuda_lightning_linear_add,
    .norm_logits = cuda_norm_logits,
    .matrix_fp8 = cuda_matrix_fp8,
    .step = cuda_step,
    .sample = cuda_sample,
    .record = cuda_record,
    .recorded = cuda_recorded,
    .replay = cuda_replay,
    .recording_free = cuda_recording_free,
};

static enum ltn_status start(struct cuda_backend *be, struct ltn_error *err)
{
    struct cudaDeviceProp prop;
    CUDA_TRY(be, err, cudaSetDevice(be->device));
    CUDA_TRY(be, err, cudaGetDeviceProperties(&prop, be->device));
    if (prop.major < 8)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                        "cuda:%d: %s has compute capability %d.%d, 8.0 or later is needed", be->device,
                        prop.name, prop.major, prop.minor);
    be->n_sms = prop.multiProcessorCount;
    be->overlaps = prop.major >= 9;
    be->hopper = hopper_gemm_present(be->device);
    be->max_shared = prop.sharedMemPerBlockOptin;
    snprintf(be->base.name, sizeof be->base.name, "cuda:%d, %.60s, %d SMs", be->device, prop.name, be->n_sms);
    CUDA_TRY(be, err, cudaStreamCreateWithFlags(&be->stream, cudaStreamNonBlocking));
    for (int i = 0; i < STAGES; i++) {
        CUDA_TRY(be, err, cudaMallocHost(&be->stage[i], STAGE_BYTES));
        CUDA_TRY(be, err, cudaEventCreateWithFlags(&be->staged[i], cudaEventDisableTiming));
    }
    LTN_TRY(batch_open(be, err));
    LTN_TRY(step_open(be, err));
    LTN_TRY(gemv_quant_open(be, err));
    return gemv_open(be, err);
}

extern "C" __attribute__((visibility("default"))) ltn_cuda_open_fn ltn_cuda_open;

extern "C" enum ltn_status ltn_cuda_open(struct ltn_backend **out, int device, enum ltn_dtype weights_dtype,
                                         struct ltn_error *err)
{
    int n = 0;
    cudaError_t code = cudaGetDeviceCount(&n);
    *out = NULL;
    if (code != cudaSuccess)
        return ltn_fail(err, LTN_ERR_DEVICE, "cuda:%d: no usable driver or device: %s (%s)", device,
                        cudaGetErrorString(code), cudaGetErrorName(code));
    if (device < 0 || device >= n)
        return ltn_fail(err, LTN_ERR_DEVICE, "cuda:%d: no such device, this machine has %d", device, n);

    struct cuda_backend *be = new (std::nothrow) cuda_backend();
    if (!be)
        return ltn_fail(err, LTN_ERR_MEMORY, "host memory: no room for the CUDA backend");
    be->base.ops = &cuda_ops;
    be->base.act_dtype = weights_dtype == LTN_F32 ? LTN_F32 : LTN_BF16;
    be->base.dtypes =
        weights_dtype == LTN_F32 ? 1u << LTN_F32 : ((1u << LTN_N_DTYPES) - 1) & ~(1u << LTN_F32);
    be->base.chunk_rows = 8192; /* PREFILL.md */
    be->base.chunk_values = 4096 * 4096;
    be->device = device;
    enum ltn_status status = start(be, err);
    if (status != LTN_OK) {
        cuda_close(&be->base);
        return status;
    }
    *out = &be->base;
    return LTN_OK;
}
