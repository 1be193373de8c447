/* Host memory to the device and back, by way of pinned buffers. A small upload is copied into one and on its
 * way when the call returns. A large one, weights out of the page cache say, is limited by how fast the
 * host's threads copy, a few GB/s each, so many of them do, each with buffers of its own in turns. (Pinning
 * the memory where it lies and letting go of it takes several times as long as that.) */
#include "kernels/cuda/cuda.cuh"

#include <atomic>
#include <thread>

enum {
    WIDE_BYTES = 16 << 20, /* from here on an upload is a large one */
    SLOT_BYTES = 1 << 20,
    SLOTS = 2, /* of a worker: one is filled while the other is sent */
    WORKERS = STAGES * (STAGE_BYTES / SLOT_BYTES) / SLOTS,
};

/* Takes the next whole pinned buffer, once the copy that last used it is done. */
static cudaError_t take_stage(struct cuda_backend *be)
{
    cudaError_t code = cudaEventRecord(be->staged[be->next_stage], be->stream);
    be->next_stage = (be->next_stage + 1) % STAGES;
    be->stage_used = 0;
    return code != cudaSuccess ? code : cudaEventSynchronize(be->staged[be->next_stage]);
}

/* ---- large uploads ------------------------------------------------------------------------------------- */

struct wide {
    struct cuda_backend *be;
    uint8_t *to;
    const uint8_t *from;
    size_t bytes;
    std::atomic<size_t> next;
    std::atomic<int> failure; /* a cudaError_t */
};

struct worker {
    cudaStream_t stream;
    cudaEvent_t sent[SLOTS];
    uint8_t *slot[SLOTS];
};

static cudaError_t send_slots(struct wide *w, struct worker *own)
{
    for (int k = 0; w->failure == cudaSuccess; k = (k + 1) % SLOTS) {
        const size_t at = w->next.fetch_add(SLOT_BYTES);
        if (at >= w->bytes)
            break;
        const size_t n = w->bytes - at < SLOT_BYTES ? w->bytes - at : (size_t)SLOT_BYTES;
        cudaError_t code = cudaEventSynchronize(own->sent[k]);
        if (code != cudaSuccess)
            return code;
        memcpy(own->slot[k], w->from + at, n);
        code = cudaMemcpyAsync(w->to + at, own->slot[k], n, cudaMemcpyHostToDevice, own->stream);
        if (code == cudaSuccess)
            code = cudaEventRecord(own->sent[k], own->stream);
        if (code != cudaSuccess)
            return code;
    }
    return cudaStreamSynchronize(own->stream);
}

static void work(struct wide *w, int index)
{
    struct worker own = {};
    cudaError_t code = cudaSetDevice(w->be->device);
    if (code == cudaSuccess)
        code = cudaStreamCreateWithFlags(&own.stream, cudaStreamNonBlocking);
    for (int k = 0; k < SLOTS && code == cudaSuccess; k++) {
        const size_t at = (size_t)(SLOTS * index + k) * SLOT_BYTES;
        own.slot[k] = w->be->stage[at / STAGE_BYTES] + at % STAGE_BYTES;
        code = cudaEventCreateWithFlags(&own.sent[k], cudaEventDisableTiming);
    }
    if (code == cudaSuccess)
        code = send_slots(w, &own);
    if (code != cudaSuccess)
        w->failure = code;
    for (cudaEvent_t sent : own.sent)
        if (sent)
            cudaEventDestroy(sent);
    if (own.stream)
        cudaStreamDestroy(own.stream);
}

/* Complete on return. */
static cudaError_t upload_wide(struct cuda_backend *be, uint8_t *to, const uint8_t *from, size_t bytes)
{
    struct wide w = {};
    std::thread worker[WORKERS - 1];
    const int n = (int)std::thread::hardware_concurrency();

    w.be = be;
    w.to = to;
    w.from = from;
    w.bytes = bytes;
    cudaError_t code = cudaStreamSynchronize(be->stream); /* what was issued before comes before, */
    if (code != cudaSuccess)                              /* and the pinned buffers are free */
        return code;
    for (int i = 1; i < WORKERS && i < n; i++) {
        try {
            worker[i - 1] = std::thread(work, &w, i);
        } catch (...) {
            break; /* fewer do it too */
        }
    }
    work(&w, 0);
    for (std::thread &t : worker)
        if (t.joinable())
            t.join();
    return (cudaError_t)w.failure.load();
}

/* ---- the operations ------------------------------------------------------------------------------------ */

enum ltn_status cuda_upload(struct ltn_backend *base, void *dst, const void *host, size_t bytes,
                            struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    const uint8_t *from = (const uint8_t *)host;
    uint8_t *to = (uint8_t *)dst;
    if (bytes >= WIDE_BYTES) {
        CUDA_TRY(be, err, upload_wide(be, to, from, bytes));
        return LTN_OK;
    }
    while (bytes > 0) {
        if (be->stage_used == STAGE_BYTES)
            CUDA_TRY(be, err, take_stage(be));
        size_t room = STAGE_BYTES - be->stage_used, n = bytes < room ? bytes : room;
        uint8_t *stage = be->stage[be->next_stage] + be->stage_used;
        memcpy(stage, from, n);
        CUDA_TRY(be, err, cudaMemcpyAsync(to, stage, n, cudaMemcpyHostToDevice, be->stream));
        be->stage_used += (n + 63) & ~(size_t)63;
        from += n, to += n, bytes -= n;
    }
    return LTN_OK;
}

enum ltn_status cuda_download(struct ltn_backend *base, void *host, const void *src, size_t bytes,
                              struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    const uint8_t *from = (const uint8_t *)src;
    uint8_t *to = (uint8_t *)host;
    do {
        size_t n = bytes < STAGE_BYTES ? bytes : (size_t)STAGE_BYTES;
        CUDA_TRY(be, err, take_stage(be));
        uint8_t *stage = be->stage[be->next_stage];
        CUDA_TRY(be, err, cudaMemcpyAsync(stage, from, n, cudaMemcpyDeviceToHost, be->stream));
        CUDA_TRY(be, err, cudaStreamSynchronize(be->stream));
        memcpy(to, stage, n);
        from += n, to += n, bytes -= n;
    } while (bytes > 0);
    return LTN_OK;
}
