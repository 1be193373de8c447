/* The first half of fused.cu: what the kernel is told, and the threads that load. See fused.h. */
#ifndef LTN_CONV_FUSED_LOAD_CUH
#define LTN_CONV_FUSED_LOAD_CUH

#include "kernels/conv/fused.h"
#include "kernels/conv/fused_write.cuh"

namespace
{

constexpr int kBlock = 4 * kGroup;

/* From a loading thread's position to its next, `positions` on, in the input: rows, columns and elements; and
 * what comes on top where a row or an image of positions ends. */
struct walk_step {
    int positions, y, x, row_y, row_x, image_y;
    int64_t at, row_at, image_at;
};

struct fused_params : fused_tiles {
    const void *x;
    const int2 *fetch;
    const int2 *steps_table;
    const char *weights;
    int64_t x_image; /* elements */
    int x_row, x_col, x_group;
    int hi, wi, sh, sw, pt, pl;
    walk_step walk;
    int subplanes, planes, phases, load, stride, blocks, steps, loaders;
    int share, stage_steps, stages, slots, slot_bytes;
    int at_weights, at_slots; /* in shared memory */
    bool zero, resident, vector;
};

struct alignas(8) barriers {
    uint64_t full[LTN_FUSED_MAX_SLOTS], empty[LTN_FUSED_MAX_SLOTS];
    uint64_t w_full[LTN_FUSED_MAX_STAGES], w_empty[LTN_FUSED_MAX_STAGES];
};
static_assert(sizeof(barriers) <= 1024 - 128, "fits in the plan's fixed part");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kLoaders = LTN_FUSED_LOADERS;

/* ---- loading strips ---- */

__device__ __forceinline__ uint32_t tf32(float x)
{
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

__device__ __forceinline__ uint4 rounded(uint4 v)
{
    return make_uint4(tf32(__uint_as_float(v.x)), tf32(__uint_as_float(v.y)), tf32(__uint_as_float(v.z)),
                      tf32(__uint_as_float(v.w)));
}

__device__ __forceinline__ uint4 load_unit(const void *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ __forceinline__ void store_unit(uint32_t at, uint4 v)
{
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

/* A thread's way through positions. (y, x): row and column in the input of what it loads there; at: its
 * element. */
struct walker {
    int64_t at;
    int y, x, y_end, x_end, images;
    walker() = default;
    __device__ __forceinline__ walker(const fused_params &p, int position, int dy, int dx, int offset)
    {
        int row = quotient(position, p.by_wq), image = quotient(row, p.by_hq);
        int q = position - row * static_cast<int>(p.by_wq.d), m = row - image * static_cast<int>(p.by_hq.d);
        y = m * p.sh - p.pt;
        x = q * p.sw - p.pl;
        at = image * p.x_image + static_cast<int64_t>(y) * p.x_row + static_cast<int64_t>(x) * p.x_col +
             offset;
        y += dy;
        x += dx;
        y_end = p.walk.image_y - p.pt + dy;
        x_end = p.walk.row_x - p.pl + dx;
        images = p.n - image; /* to come, this one too */
    }
    __device__ __forceinline__ void next(const fused_params &p)
    {
        x += p.walk.x;
        y += p.walk.y;
        at += p.walk.at;
        if (x >= x_end) {
            x -= p.walk.row_x;
            y += p.walk.row_y;
            at += p.walk.row_at;
        }
        while (y >= y_end) {
            y -= p.walk.image_y;
            at += p.walk.image_at;
            --images;
        }
    }
    /* Whether what lies dy rows and dx columns on is in an image. */
    __device__ __forceinline__ bool inside(const fused_params &p, int dy, int dx) const
    {
        return static_cast<unsigned>(y + dy) < static_cast<unsigned>(p.hi) &&
               static_cast<unsigned>(x + dx) < static_cast<unsigned>(p.wi) && images > 0;
    }
};

/* Units are 16 aligned bytes of the input; a thread (one of p.loaders) stays in one plane. bf16: copied as
 * they are, and `full` hears of it when they have come. */
__device__ void load_vectors(const fused_params &p, const __nv_bfloat16 *x, int first, int block,
                             uint32_t slot, uint64_t *full, int thread)
{
    const int from = thread / p.planes, plane = thread - from * p.planes;
    if (from < p.walk.positions) {
        const int2 e = __ldg(p.fetch + block * p.planes + plane);
        walker w(p, first + from, e.y >> 16, e.y & 0xFFFF, e.x);
        uint32_t at = slot + (plane * p.stride + from) * 16;
#pragma unroll 4
        for (int pos = from; pos < p.load; pos += p.walk.positions) {
            bool inside = w.inside(p, 0, 0);
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at),
                         "l"(inside ? x + w.at : x), "r"(inside ? 16 : 0)
                         : "memory");
            at += p.walk.positions * 16;
            w.next(p);
        }
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(full)) : "memory");
}

/* tf32: rounded on the way. */
__device__ void load_vectors(const fused_params &p, const float *x, int first, int block, uint32_t slot,
                             uint64_t *full, int thread)
{
    constexpr int kDeep = 8;
    const int from = thread / p.planes, plane = thread - from * p.planes;
    if (from < p.walk.positions) {
        const int2 e = __ldg(p.fetch + block * p.planes + plane);
        walker w(p, first + from, e.y >> 16, e.y & 0xFFFF, e.x);
        uint32_t at = slot + (plane * p.stride + from) * 16;
        for (int pos = from; pos < p.load; pos += kDeep * p.walk.positions) {
            uint4 v[kDeep];
#pragma unroll
            for (int k = 0; k < kDeep; ++k) {
                v[k] = make_uint4(0, 0, 0, 0);
                if (pos + k * p.walk.positions < p.load && w.inside(p, 0, 0))
                    v[k] = load_unit(x + w.at);
                w.next(p);
            }
#pragma unroll
            for (int k = 0; k < kDeep; ++k, at += p.walk.positions * 16)
                if (pos + k * p.walk.positions < p.load)
                    store_unit(at, rounded(v[k]));
        }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    barrier_arrive(full);
}

template <typename T> struct elements; /* V elements on their way from the input to one unit */

template <> struct elements<__nv_bfloat16> {
    static constexpr int kUnit = 8;
    unsigned short v[kUnit];
    __device__ __forceinline__ uint4 unit() const
    {
        return make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
    }
};

template <> struct elements<float> {
    static constexpr int kUnit = 4;
    uint32_t v[kUnit];
    __device__ __forceinline__ uint4 unit() const
    {
        return rounded(make_uint4(v[0], v[1], v[2], v[3]));
    }
};

template <typename T>
__device__ __forceinline__ void gather_one(elements<T> &out, int i, const fused_params &p, const T *x,
                                           const walker &w, int offset, int tap)
{
    out.v[i] = 0;
    if (w.inside(p, tap >> 16, tap & 0xFFFF)) {
        if (sizeof(T) == 2)
            out.v[i] = __ldg(reinterpret_cast<const unsigned short *>(x + w.at + offset));
        else
            out.v[i] = __ldg(reinterpret_cast<const unsigned *>(x + w.at + offset));
    }
}

/* The same unit of N positions. */
template <typename T, int N>
__device__ __forceinline__ void gather(elements<T> (&out)[N], const fused_params &p, const T *x,
                                       const walker (&w)[N], const int2 *fetch)
{
    constexpr int V = elements<T>::kUnit;
#pragma unroll
    for (int k = 0; k < V; k += 2) {
        const int4 e = __ldg(reinterpret_cast<const int4 *>(fetch + k)); /* two entries */
#pragma unroll
        for (int i = 0; i < N; ++i) {
            gather_one(out[i], k, p, x, w[i], e.x, e.y);
            gather_one(out[i], k + 1, p, x, w[i], e.z, e.w);
        }
    }
}

/* Units are gathered element by element: any layout, any number of channels. A thread stays in one column
 * phase, and neighbouring threads take neighbouring columns; two units of N positions are under way at a
 * time. */
template <typename T, int N>
__device__ __forceinline__ void load_elements(const fused_params &p, const T *x, int first, int block,
                                              uint32_t slot, int thread)
{
    constexpr int V = elements<T>::kUnit;
    const int from = thread / p.phases, phase = thread - from * p.phases, step = p.walk.positions;
    const int2 *fetch = p.fetch + block * p.subplanes * V;
    if (from >= step)
        return;
    const walker begin(p, first + from, 0, phase, phase * p.x_col);
    walker w[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        w[i] = i ? w[i - 1] : begin;
        if (i)
            w[i].next(p);
    }
    uint32_t at = slot + (phase * p.subplanes * p.stride + from) * 16;
    for (int pos = from; pos < p.load; pos += N * step, at += N * step * 16) {
#pragma unroll
        for (int i = 1; i < N; ++i)
            if (pos + i * step >= p.load)
                w[i].images = 0; /* nothing is inside */
        int k = 0;
        for (; k + 2 <= p.subplanes; k += 2) {
            elements<T> a[N], b[N];
            gather(a, p, x, w, fetch + k * V);
            gather(b, p, x, w, fetch + (k + 1) * V);
#pragma unroll
            for (int i = 0; i < N; ++i)
                if (i == 0 || pos + i * step < p.load) {
                    store_unit(at + (k * p.stride + i * step) * 16, a[i].unit());
                    store_unit(at + ((k + 1) * p.stride + i * step) * 16, b[i].unit());
                }
        }
        if (k < p.subplanes) {
            elements<T> a[N];
            gather(a, p, x, w, fetch + k * V);
#pragma unroll
            for (int i = 0; i < N; ++i)
                if (i == 0 || pos + i * step < p.load)
                    store_unit(at + (k * p.stride + i * step) * 16, a[i].unit());
        }
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int k = 0; k < N; ++k)
                w[i].next(p);
    }
}

/* Two positions where a unit is eight loads of two bytes; with four of four bytes they are slower. */
template <typename T>
__device__ void load_elements(const fused_params &p, const T *x, int first, int block, uint32_t slot,
                              uint64_t *full, int thread)
{
    load_elements<T, sizeof(T) == 2 ? 2 : 1>(p, x, first, block, slot, thread);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    barrier_arrive(full);
}

/* All loading threads fill each strip, or each warp (p.loaders 32) every seventh by itself. */
template <typename T, int BN> __device__ void load_strips(const fused_params &p, char *base, barriers &bar)
{
    const int id = threadIdx.x - 2 * kGroup, groups = kLoaders / p.loaders, thread = id % p.loaders;
    const uint32_t slots = shared_address(base) + p.at_slots;
    if (p.zero) { /* the plane of zeros behind each strip; the barriers of the first strips cover it */
        for (int s = 0; s < p.slots; ++s)
            for (int i = thread; i < p.tile_rows; i += p.loaders)
                store_unit(slots + s * p.slot_bytes + (p.planes * p.stride + i) * 16, make_uint4(0, 0, 0, 0));
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    turn now;
    int skip = id / p.loaders; /* strips of other warps before this one's next */
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const tile t = tile_at(p, index, BN);
        const T *x = static_cast<const T *>(p.x) + static_cast<int64_t>(t.group) * p.x_group;
        for (int b = 0; b < p.blocks; ++b, now.next(p.slots)) {
            if (skip-- > 0)
                continue;
            skip = groups - 1;
            barrier_wait(&bar.empty[now.at], now.phase ^ 1);
            const uint32_t slot = slots + now.at * p.slot_bytes;
            if (p.vector)
                load_vectors(p, x, t.first, b, slot, &bar.full[now.at], thread);
            else
                load_elements(p, x, t.first, b, slot, &bar.full[now.at], thread);
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* By one thread. */
template <int BN> __device__ void load_filters(const fused_params &p, char *base, barriers &bar)
{
    const uint32_t at = shared_address(base) + p.at_weights;
    const int64_t block_bytes = static_cast<int64_t>(p.steps) * BN * 32;
    turn now;
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const tile t = tile_at(p, index, BN);
        const char *from =
            p.weights + (static_cast<int64_t>(t.group) * p.by_n_tiles.d + t.n_tile) * p.blocks * block_bytes;
        uint32_t to = at;
        for (int b = 0; b < p.blocks; ++b)
            for (int s = 0; s < p.steps; s += p.stage_steps) {
                uint32_t bytes = min(p.stage_steps, p.steps - s) * BN * 32;
                if (!p.resident) {
                    barrier_wait(&bar.w_empty[now.at], now.phase ^ 1);
                    to = at + now.at * p.stage_steps * BN * 32;
                }
                barrier_arrive_expect(&bar.w_full[now.at], bytes);
                bulk_load(to, from, bytes, &bar.w_full[now.at]);
                from += bytes;
                to += bytes;
                now.next(p.stages);
            }
        if (p.resident)
            break;
    }
}

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

} // namespace

#endif
