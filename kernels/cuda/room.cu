/* The room of the operations: as large as the networks and calls that were announced need it, and made before
 * them, so that an operation, recorded or not, finds it there and allocates nothing. */
#include "kernels/cuda/cuda.cuh"

#include <new>

enum { ALIGN = 256 };

static const char *const part_names[N_ROOM_PARTS] = {
    "a copy of the stream", "activations in e4m3",  "weights in bf16",   "turned q and k",
    "the attention",        "products of cuBLASLt", "activations in f16"};

void room_drop(struct cuda_backend *be, struct rooms *room)
{
    if (!room || --room->users > 0)
        return;
    cudaStreamSynchronize(be->stream); /* which may still work there */
    cudaFree(room->memory);
    delete room;
}

enum ltn_status room_part(struct cuda_backend *be, void **out, enum room_part part, size_t bytes,
                          struct ltn_error *err)
{
    const size_t there = be->room ? be->room->bytes[part] : 0;
    if (bytes > there)
        return ltn_fail(err, LTN_ERR_INPUT, "cuda:%d: %zu bytes of room for %s needed, %zu were reserved",
                        be->device, bytes, part_names[part], there);
    *out = be->room->at[part];
    return LTN_OK;
}

/* The room's layout and memory. */
static enum ltn_status fill(struct cuda_backend *be, struct rooms *room, const size_t *needed,
                            struct ltn_error *err)
{
    size_t total = 0;
    for (int i = 0; i < N_ROOM_PARTS; i++) {
        room->bytes[i] = (needed[i] + ALIGN - 1) / ALIGN * ALIGN;
        total += room->bytes[i];
    }
    LTN_TRY(device_alloc(be, &room->memory, total, err));
    uint8_t *next = (uint8_t *)room->memory;
    for (int i = 0; i < N_ROOM_PARTS; i++) {
        room->at[i] = next;
        next += room->bytes[i];
    }
    CUDA_TRY(be, err, cudaMemsetAsync(room->at[ROOM_LIGHTNING], 0, room->bytes[ROOM_LIGHTNING], be->stream));
    be->base.room_bytes = total;
    return LTN_OK;
}

/* Where the room must grow, a new one takes its place; recordings keep the one that they were made with. */
enum ltn_status cuda_reserve(struct ltn_backend *base, const struct ltn_network *net, int32_t rows,
                             int32_t logits, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    size_t needed[N_ROOM_PARTS] = {};
    bool grows = !be->room;

    linear_room(be, net, rows, needed);
    quant_room(be, net, rows, logits, needed);
    gemm_room(net, needed);
    if (be->base.act_dtype == LTN_BF16)
        lightning_room(net, rows, needed);
    for (int i = 0; be->room && i < N_ROOM_PARTS; i++) {
        grows = grows || needed[i] > be->room->bytes[i];
        raise(&needed[i], be->room->bytes[i]);
    }
    if (!grows)
        return LTN_OK;
    struct rooms *room = new (std::nothrow) struct rooms();
    if (!room)
        return ltn_fail(err, LTN_ERR_MEMORY, "host memory: no room for a table of parts");
    room->users = 1;
    enum ltn_status status = fill(be, room, needed, err);
    if (status != LTN_OK) {
        room_drop(be, room);
        return status;
    }
    room_drop(be, be->room);
    be->room = room;
    return LTN_OK;
}
