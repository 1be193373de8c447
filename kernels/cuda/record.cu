/* A step of decoding without the host in it, as one CUDA graph. */
#include "kernels/cuda/cuda.cuh"

struct ltn_recording {
    cudaGraphExec_t graph;
    struct rooms *room; /* of the operations in it */
};

/* The lock stays with this thread until cuda_recorded. */
enum ltn_status cuda_record(struct ltn_backend *base, const int64_t *steps, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    be->lock.lock();
    be->copied = NULL;
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
    be->copied = NULL;
    be->lock.unlock();
    CUDA_TRY(be, err, code);
    struct ltn_recording *recording = new struct ltn_recording();
    code = cudaGraphInstantiate(&recording->graph, graph, 0);
    cudaGraphDestroy(graph);
    if (code != cudaSuccess) {
        delete recording;
        CUDA_TRY(be, err, code);
    }
    recording->room = be->room;
    if (be->room)
        be->room->users++;
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
    room_drop(be, recording->room);
    delete recording;
}
