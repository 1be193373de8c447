/* Decoding without the host between the tokens: choosing the next token on the device, and a step of decoding
 * as one CUDA graph. */
#include "kernels/cuda/cuda.cuh"

enum { THREADS = 1024 };

struct best {
    float value;
    int32_t at;
};

static __device__ struct best better(struct best a, struct best b)
{
    return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a;
}

static __device__ struct best warp_best(struct best b)
{
    for (int offset = 16; offset > 0; offset /= 2) {
        struct best other = {__shfl_xor_sync(0xffffffffu, b.value, offset),
                             __shfl_xor_sync(0xffffffffu, b.at, offset)};
        b = better(b, other);
    }
    return b;
}

/* One block per row. NaN never wins; a row of nothing but NaN gives column 0. */
static __global__ void __launch_bounds__(THREADS)
    greedy_kernel(int32_t *ids, const float *logits, int32_t cols, int64_t *steps, int32_t *log,
                  int32_t log_rows)
{
    __shared__ struct best warps[32];
    const int64_t row = blockIdx.x;
    struct best b = {-INFINITY, INT32_MAX};
    let_next_start();
    wait_for_previous();
    logits += row * cols;
    if (cols % 4 == 0) {
#pragma unroll 4
        for (int32_t c = threadIdx.x * 4; c < cols; c += THREADS * 4) {
            const float4 v = load_fresh4(logits + c);
            b = better(b, {v.x, c}), b = better(b, {v.y, c + 1});
            b = better(b, {v.z, c + 2}), b = better(b, {v.w, c + 3});
        }
    } else {
        for (int32_t c = threadIdx.x; c < cols; c += THREADS)
            b = better(b, {load_fresh(logits + c), c});
    }
    b = warp_best(b);
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = b;
    __syncthreads();
    if (threadIdx.x < 32) {
        b = warp_best(warps[threadIdx.x]);
        if (threadIdx.x == 0) {
            const int32_t id = b.at == INT32_MAX ? 0 : b.at;
            ids[row] = id;
            const int64_t done = __ldcg(steps);
            log[done % log_rows * gridDim.x + row] = id;
            if (gridDim.x == 1)
                *steps = done + 1;
        }
    }
}

/* With several rows, when all have read it. */
static __global__ void count_kernel(int64_t *steps)
{
    let_next_start();
    wait_for_previous();
    *steps = __ldcg(steps) + 1;
}

enum ltn_status cuda_greedy(struct ltn_backend *base, int32_t *ids, const float *logits, int32_t rows,
                            int32_t cols, int64_t *steps, int32_t *log, int32_t log_rows,
                            struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    LAUNCH(be, err, greedy_kernel, dim3(rows), dim3(THREADS), 0, ids, logits, cols, steps, log, log_rows);
    if (rows > 1)
        LAUNCH(be, err, count_kernel, dim3(1), dim3(1), 0, steps);
    return LTN_OK;
}

/* ---- recording -------------------------------------------------------------------------------------------
 */

struct ltn_recording {
    cudaGraphExec_t graph;
};

/* The lock stays with this thread until cuda_recorded. */
enum ltn_status cuda_record(struct ltn_backend *base, const int64_t *steps, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    be->lock.lock();
    cudaError_t code = cudaSetDevice(be->device);
    if (code == cudaSuccess)
        code = cudaStreamBeginCapture(be->stream, cudaStreamCaptureModeRelaxed);
    if (code != cudaSuccess)
        be->lock.unlock();
    CUDA_TRY(be, err, code);
    be->steps = steps;
    return LTN_OK;
}

enum ltn_status cuda_recorded(struct ltn_backend *base, struct ltn_recording **out, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    cudaGraph_t graph = NULL;
    *out = NULL;
    cudaError_t code = cudaStreamEndCapture(be->stream, &graph);
    be->steps = NULL;
    be->lock.unlock();
    CUDA_TRY(be, err, code);
    struct ltn_recording *recording = new struct ltn_recording();
    code = cudaGraphInstantiate(&recording->graph, graph, 0);
    cudaGraphDestroy(graph);
    if (code != cudaSuccess) {
        delete recording;
        CUDA_TRY(be, err, code);
    }
    *out = recording;
    return LTN_OK;
}

enum ltn_status cuda_replay(struct ltn_backend *base, struct ltn_recording *recording, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    CUDA_TRY(be, err, cudaGraphLaunch(recording->graph, be->stream));
    return LTN_OK;
}

void cuda_recording_free(struct ltn_backend *base, struct ltn_recording *recording)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    if (!recording)
        return;
    cudaGraphExecDestroy(recording->graph);
    delete recording;
}
