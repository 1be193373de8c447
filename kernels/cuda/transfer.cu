/* Large pieces of host memory on their way to the device, read where they lie: a window at a time is pinned,
 * copied by the bus and let go, by several threads, for pinning a page takes about as long as copying it. A
 * file that the page cache holds gets to the device without another copy in host memory. */
#include "kernels/cuda/cuda.cuh"

#include <atomic>
#include <thread>
#include <unistd.h>

enum { WINDOW_BYTES = 16 << 20, WORKERS = 8 };

struct windows {
    int device;
    uint8_t *to;
    const uint8_t *from, *end;
    uintptr_t pages, pages_end; /* around from .. end */
    std::atomic<uintptr_t> next;
    std::atomic<int> failure; /* a cudaError_t */
};

static cudaError_t copy_window(struct windows *w, uintptr_t at, cudaStream_t stream)
{
    const uintptr_t stop = w->pages_end - at < WINDOW_BYTES ? w->pages_end : at + WINDOW_BYTES;
    const uint8_t *from = (const uint8_t *)at < w->from ? w->from : (const uint8_t *)at;
    const uint8_t *end = (const uint8_t *)stop > w->end ? w->end : (const uint8_t *)stop;
    cudaError_t code = cudaHostRegister((void *)at, stop - at, cudaHostRegisterReadOnly);
    if (code != cudaSuccess)
        return code;
    code = cudaMemcpyAsync(w->to + (from - w->from), from, end - from, cudaMemcpyHostToDevice, stream);
    if (code == cudaSuccess)
        code = cudaStreamSynchronize(stream);
    const cudaError_t late = cudaHostUnregister((void *)at);
    return code != cudaSuccess ? code : late;
}

static void copy_windows(struct windows *w)
{
    cudaStream_t stream;
    cudaError_t code = cudaSetDevice(w->device);
    if (code == cudaSuccess)
        code = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (code == cudaSuccess) {
        while (code == cudaSuccess && w->failure == cudaSuccess) {
            const uintptr_t at = w->next.fetch_add(WINDOW_BYTES);
            if (at >= w->pages_end)
                break;
            code = copy_window(w, at, stream);
        }
        cudaStreamDestroy(stream);
    }
    if (code != cudaSuccess)
        w->failure = code;
    cudaGetLastError(); /* the failure is told; the next call does not report it again */
}

cudaError_t upload_in_place(struct cuda_backend *be, void *dst, const void *host, size_t bytes)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    struct windows w = {};
    std::thread worker[WORKERS - 1];

    w.device = be->device;
    w.to = (uint8_t *)dst;
    w.from = (const uint8_t *)host;
    w.end = w.from + bytes;
    w.pages = (uintptr_t)w.from / page * page;
    w.pages_end = ((uintptr_t)w.end + page - 1) / page * page;
    w.next = w.pages;
    w.failure = cudaSuccess;
    cudaError_t code = cudaStreamSynchronize(be->stream); /* what was issued before comes before */
    if (code != cudaSuccess)
        return code;
    for (std::thread &t : worker) {
        try {
            t = std::thread(copy_windows, &w);
        } catch (...) {
            break; /* fewer do it too */
        }
    }
    copy_windows(&w);
    for (std::thread &t : worker)
        if (t.joinable())
            t.join();
    return (cudaError_t)w.failure.load();
}
