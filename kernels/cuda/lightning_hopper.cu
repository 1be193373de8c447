/* Lightning attention forward for Hopper: TMA loads, wgmma, the state in registers.
 *
 * One block works on one item at a time: 64 value columns ("tile") of one head over one segment. Three
 * warpgroups:
 *   loader   one thread fills a ring of stages with the chunks' q, k [64, DK] and v [64, 64].
 *   state    holds S^T [64, DK] in f32 registers. Per chunk: publishes S as bf16 in shared memory, then
 *            S <- S + (V'^T K - e S), V'_i = exp(-s (m-1-i)) v_i as a high and a low bf16, e = -expm1(-s m).
 *   output   O = diag(exp(-s (i+1))) (Q S) + (Q K^T . M) V, M_ij = exp(-s (i-j)) for i >= j, else 0.
 * The state group never waits for outputs (two published states), so the only chain over chunks is the
 * elementwise update of S. Decay multiplies f32 accumulators, or v in two parts; never q or k.
 *
 * Shared tiles are 64 rows of 128 bytes with the 128-byte swizzle: 16-byte column c of row r lies at column
 * c ^ (r & 7). A [64, 128] tile is two such halves. */
#include "kernels/cuda/lightning_plan.cuh"

#include <cuda.h>

namespace
{

constexpr int kTile = 64;             /* value columns per item */
constexpr int kBox = kChunk * 64 * 2; /* bytes of a [64, 64] bf16 tile */
constexpr int kGroup = 128;           /* threads of a warpgroup */
constexpr int kBlock = 3 * kGroup;

template <int DK> struct layout {
    static constexpr int kHalves = DK / 64;
    static constexpr int kStages = DK == 128 ? 4 : 8;
    static constexpr int kKey = kHalves * kBox; /* bytes of q or k; of one published state too */
    static constexpr int kStage = 2 * kKey + kBox;
    static constexpr int kStates = kStages * kStage;
    static constexpr int kOut = kStates + 2 * kKey;
    static constexpr int kSmall = kOut + 2 * kBox;
    static constexpr int kBytes = kSmall + 1024 + 1024; /* small things, and slack to align the base */
};

struct alignas(8) small_shared {
    uint64_t full[8], empty[8];     /* ring of stages */
    uint64_t s_full[2], s_empty[2]; /* published states */
    float power[72];                /* output group: exp(-s i), i = 0..64 */
    float weight[kChunk]; /* state group: of the chunk's row i in the state, exp(-s (m-1-i)); 0 from m on */
};
static_assert(sizeof(small_shared) <= 1024, "small things must fit");

struct tensor_maps {
    CUtensorMap q, k, v, o;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void barrier_init(uint64_t *bar, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(bar)), "r"(count));
}

__device__ __forceinline__ void barrier_arrive(uint64_t *bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(bar)) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint64_t *bar, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(bar)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t *bar, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(smem_address(bar)),
                 "r"(parity)
                 : "memory");
}

/* Barrier of one warpgroup (ids from 1; 0 is __syncthreads). */
__device__ __forceinline__ void group_sync(int id)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kGroup) : "memory");
}

/* Orders ordinary shared stores before later reads by the tensor cores or the copy engine. */
__device__ __forceinline__ void proxy_fence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void tma_load(uint32_t dst, const CUtensorMap *map, int x, int y, uint64_t *bar)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(dst),
                 "l"(map), "r"(x), "r"(y), "r"(smem_address(bar))
                 : "memory");
}

__device__ __forceinline__ void tma_store(const CUtensorMap *map, int x, int y, uint32_t src)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(x),
        "r"(y), "r"(src)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Matrix descriptors, 128-byte swizzle. Rows along the matrix's own M or N, columns along the sum
 * ("K-major"): 8-row groups are 1024 bytes apart. Rows along the sum ("MN-major"): likewise, and blocks of 64
 * columns lie kBox apart. */
__device__ __forceinline__ uint64_t descriptor(uint32_t address)
{
    return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (static_cast<uint64_t>(kBox >> 4) << 16) |
           (static_cast<uint64_t>(1024 >> 4) << 32) | (1ull << 62);
}

__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* Keeps the compiler from moving uses of registers across the asynchronous products. */
template <int N> __device__ __forceinline__ void pin(float (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; ++i)
        asm volatile("" : "+f"(x[i])::"memory");
}

template <int N> __device__ __forceinline__ void pin(uint32_t (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; ++i)
        asm volatile("" : "+r"(x[i])::"memory");
}

#define ACC8(d, i)                                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),              \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define ACC32(d, i) ACC8(d, i), ACC8(d, i + 8), ACC8(d, i + 16), ACC8(d, i + 24)
#define REGS32                                                                                               \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"    \
    "%27,%28,%29,%30,%31}"

/* d (+)= A B^T, 64 x 64 x 16, both operands in shared memory, K-major */
__device__ __forceinline__ void wgmma_ss(float (&d)[32], uint64_t a, uint64_t b, int accumulate)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGS32
                 ", %32, %33, p, 1, 1, 0, 0;\n}\n"
                 : ACC32(d, 0)
                 : "l"(a), "l"(b), "r"(accumulate));
}

/* d (+)= A B, A in registers, B MN-major in shared memory */
__device__ __forceinline__ void wgmma_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGS32
                 ", {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}\n"
                 : ACC32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void stmatrix(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/* Stores an f32 accumulator [64, 8 N/4] as a swizzled bf16 tile of 128-byte rows (halves kBox apart). */
template <int N> __device__ __forceinline__ void store_tile(uint32_t tile, const float (&x)[N])
{
    int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    int row = warp * 16 + (lane & 7) + (lane & 8);
#pragma unroll
    for (int j = 0; j < N / 4; j += 2) {
        int column = (j & 7) + (lane >> 4);
        uint32_t at = tile + (j >> 3) * kBox + row * 128 + ((column ^ (row & 7)) << 4);
        stmatrix(at, pack(x[4 * j], x[4 * j + 1]), pack(x[4 * j + 2], x[4 * j + 3]),
                 pack(x[4 * j + 4], x[4 * j + 5]), pack(x[4 * j + 6], x[4 * j + 7]));
    }
}

/* Rows m.. of a [64, 64] tile become zero: a tail's rows belong to another sequence, or to nobody. */
__device__ __forceinline__ void zero_rows(char *tile, int m)
{
    for (int i = threadIdx.x & (kGroup - 1); i < (kChunk - m) * 8; i += kGroup)
        reinterpret_cast<uint4 *>(tile)[m * 8 + i] = make_uint4(0, 0, 0, 0);
}

/* By the state group, which publishes its state only afterwards. */
template <int DK> __device__ __forceinline__ void zero_tail(char *stage, int m)
{
    group_sync(1); /* all have done with what the stage held before */
    for (int h = layout<DK>::kHalves; h <= 2 * layout<DK>::kHalves; ++h)
        zero_rows(stage + h * kBox, m);
    proxy_fence();
    group_sync(1);
}

/* The state group's table for chunks of m rows. */
__device__ __forceinline__ void fill_weights(float *weight, float slope, int m)
{
    int i = threadIdx.x & (kGroup - 1);
    group_sync(1); /* all are done with the table before */
    if (i < kChunk)
        weight[i] = i < m ? static_cast<float>(exp(-static_cast<double>(slope) * (m - 1 - i))) : 0.0f;
    group_sync(1);
}

/* The output group's table. */
__device__ __forceinline__ void fill_powers(float *power, float slope)
{
    int i = threadIdx.x & (kGroup - 1);
    group_sync(2);
    if (i <= kChunk)
        power[i] = static_cast<float>(exp(-static_cast<double>(slope) * i));
    group_sync(2);
}

/* Place in the ring of stages of the block's i-th chunk, and the barrier phase of its turn. */
template <int DK> struct turn {
    int stage;
    uint32_t phase;
    __device__ explicit turn(int i) : stage(i % layout<DK>::kStages), phase((i / layout<DK>::kStages) & 1)
    {
    }
};

template <int DK>
__device__ void load(const lightning_params &p, const tensor_maps &maps, char *base, small_shared &sh)
{
    using L = layout<DK>;
    int n_items = p.items * p.n_heads * L::kHalves, i = 0;
    for (int index = blockIdx.x; index < n_items; index += gridDim.x) {
        lightning_item it = lightning_decode(p, index, L::kHalves);
        int first = p.seq[it.seq].first;
        for (int c = it.chunk0; c < it.chunk1; ++c, ++i) {
            turn<DK> now(i);
            uint64_t *full = &sh.full[now.stage];
            uint32_t at = smem_address(base) + now.stage * L::kStage;
            int row = first + c * kChunk;
            barrier_wait(&sh.empty[now.stage], now.phase ^ 1);
            barrier_arrive_expect(full, (c >= it.fused ? 2 * L::kKey : L::kKey) + kBox);
            for (int h = 0; h < L::kHalves; ++h)
                tma_load(at + L::kKey + h * kBox, &maps.k, it.head * DK + h * 64, row, full);
            tma_load(at + 2 * L::kKey, &maps.v, it.head * DK + it.tile * kTile, row, full);
            for (int h = 0; c >= it.fused && h < L::kHalves; ++h)
                tma_load(at + h * kBox, &maps.q, it.head * DK + h * 64, row, full);
        }
    }
}

/* S^T <- the state in which the item begins. Thread t of the group holds, as wgmma does, rows (value columns)
 * 16 warp + lane / 4 (+ 8) and, for each j < DK / 8, columns 8 j + 2 (lane % 4) (+ 1). */
template <int DK>
__device__ void begin_state(float (&s)[DK / 2], const lightning_params &p, const lightning_item &it,
                            float slope)
{
    constexpr int n_tiles = layout<DK>::kHalves;
    const lightning_seq &seq = p.seq[it.seq];
    int t = threadIdx.x & (kGroup - 1);
    int row = (t >> 5) * 16 + ((t & 31) >> 2), col = 2 * (t & 3);
#pragma unroll
    for (int i = 0; i < DK / 2; ++i)
        s[i] = 0.0f;
    if (it.seg == 0 || seq.warm) {
        const float *from = seq.state + static_cast<int64_t>(it.head) * DK * DK + it.tile * kTile;
#pragma unroll
        for (int i = 0; i < DK / 2; ++i)
            s[i] = from[(8 * (i >> 2) + col + (i & 1)) * DK + row + ((i & 2) << 2)];
    } else if (it.fused < it.chunk1) {
        int part = seq.part * p.n_heads + it.head;
        float e = loss(slope, static_cast<int64_t>(seq.seg_len) * kChunk);
        asm volatile("" : "+f"(e)); /* before the wait, which hides it */
        if (t < it.seg) {
            const unsigned *flag = p.flags + (part + t * p.n_heads) * n_tiles + it.tile;
            unsigned ready;
            do
                asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(ready) : "l"(flag) : "memory");
            while (ready == 0);
        }
        group_sync(1);
        const float4 *from = reinterpret_cast<const float4 *>(p.parts + static_cast<int64_t>(part) * DK * DK +
                                                              it.tile * kTile * DK);
        const int64_t step = static_cast<int64_t>(p.n_heads) * DK * DK / 4;
        auto read = [&](float4(&x)[DK / 8], int seg) {
#pragma unroll
            for (int i = 0; i < DK / 8; ++i)
                x[i] = __ldcg(from + seg * step + i * kGroup + t);
        };
        auto add = [&](const float4(&x)[DK / 8]) {
#pragma unroll
            for (int i = 0; i < DK / 8; ++i) {
                s[4 * i] += fmaf(-e, s[4 * i], x[i].x);
                s[4 * i + 1] += fmaf(-e, s[4 * i + 1], x[i].y);
                s[4 * i + 2] += fmaf(-e, s[4 * i + 2], x[i].z);
                s[4 * i + 3] += fmaf(-e, s[4 * i + 3], x[i].w);
            }
        };
        float4 x[DK / 8], y[DK / 8]; /* the next one or two are on their way */
        read(x, 0);
        if (it.seg > 1)
            read(y, 1);
        for (int seg = 0; seg < it.seg; seg += 2) {
            add(x);
            if (seg + 2 < it.seg)
                read(x, seg + 2);
            if (seg + 1 < it.seg)
                add(y);
            if (seg + 3 < it.seg)
                read(y, seg + 3);
        }
        group_sync(1);
        if (t < it.seg)
            atomicSub(p.flags + (part + t * p.n_heads) * n_tiles + it.tile, 1u);
    }
}

/* Waits until the flag has counted so far, and sets it back. */
__device__ __forceinline__ void await_readers(unsigned *flag, int readers)
{
    unsigned done;
    do
        asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(done) : "l"(flag) : "memory");
    while (done < static_cast<unsigned>(readers));
    *flag = 0;
}

template <int DK>
__device__ void end_state(const float (&s)[DK / 2], const lightning_params &p, const lightning_item &it)
{
    constexpr int n_tiles = layout<DK>::kHalves;
    const lightning_seq &seq = p.seq[it.seq];
    int t = threadIdx.x & (kGroup - 1);
    if (it.seg == seq.n_seg - 1) {
        if (seq.warm) { /* until all others have done with the start state */
            if (t == 0)
                await_readers(p.flags + (seq.part * p.n_heads + it.head) * n_tiles + it.tile, seq.n_seg - 1);
            group_sync(1);
        }
        int row = (t >> 5) * 16 + ((t & 31) >> 2), col = 2 * (t & 3);
        float *to = seq.state + static_cast<int64_t>(it.head) * DK * DK + it.tile * kTile;
#pragma unroll
        for (int i = 0; i < DK / 2; ++i)
            to[(8 * (i >> 2) + col + (i & 1)) * DK + row + ((i & 2) << 2)] = s[i];
        return;
    }
    if (seq.warm) {
        group_sync(1);
        if (t == 0)
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(
                             p.flags + (seq.part * p.n_heads + it.head) * n_tiles + it.tile)
                         : "memory");
        return;
    }
    if (it.seg > 0 && it.fused < it.chunk1)
        return; /* phase 1 left this segment's own state where its readers find it */
    int part = (seq.part + it.seg) * p.n_heads + it.head;
    float4 *to =
        reinterpret_cast<float4 *>(p.parts + static_cast<int64_t>(part) * DK * DK + it.tile * kTile * DK);
#pragma unroll
    for (int i = 0; i < DK / 8; ++i)
        to[i * kGroup + t] = make_float4(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]);
    group_sync(1);
    if (t == 0)
        asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(p.flags + part * n_tiles + it.tile),
                     "r"(seq.n_seg - 1 - it.seg)
                     : "memory");
}

template <int DK> __device__ void carry_state(const lightning_params &p, char *base, small_shared &sh)
{
    using L = layout<DK>;
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const uint32_t ring = smem_address(base);
    /* the lane's address within v for ldmatrix: row 8 (lane / 16) + lane % 8, 16-byte column 2 warp + lane /
     * 8 % 2
     */
    const uint32_t v_at =
        ((lane & 7) + ((lane >> 4) << 3)) * 128 + (((2 * warp + ((lane >> 3) & 1)) ^ (lane & 7)) << 4);
    const int n_items = p.items * p.n_heads * L::kHalves;
    int i = 0, published = 0, weighed = -1; /* the head that sh.weight and e are of, for whole chunks */
    float e = 0.0f;

    for (int index = blockIdx.x; index < n_items; index += gridDim.x) {
        const lightning_item it = lightning_decode(p, index, L::kHalves);
        const float slope = p.slopes[it.head];
        const int last_rows = p.seq[it.seq].count - (it.chunk1 - 1) * kChunk;
        if (weighed != it.head) {
            e = loss(slope, kChunk);
            fill_weights(sh.weight, slope, kChunk);
            weighed = it.head;
        }
        float s[DK / 2];
        begin_state<DK>(s, p, it, slope);

        for (int c = it.chunk0; c < it.chunk1; ++c, ++i) {
            const turn<DK> now(i);
            const uint32_t at = ring + now.stage * L::kStage;
            barrier_wait(&sh.full[now.stage], now.phase);
            if (c + 1 == it.chunk1 && last_rows < kChunk) {
                zero_tail<DK>(base + now.stage * L::kStage, last_rows);
                e = loss(slope, last_rows);
                fill_weights(sh.weight, slope, last_rows);
                weighed = -1;
            }
            float kv[L::kHalves][32];
            uint32_t x[4][4], hi[4][4], lo[4][4];
            const uint64_t k_desc = descriptor(at + L::kKey);
#pragma unroll
            for (int kk = 0; kk < 4; ++kk)
                ldmatrix_trans(x[kk], at + 2 * L::kKey + kk * 2048 + v_at);
#pragma unroll
            for (int kk = 0; kk < 4; ++kk) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 w =
                        *reinterpret_cast<const float2 *>(&sh.weight[16 * kk + 4 * (j & 2) + 2 * (lane & 3)]);
                    float a = low_half(x[kk][j]) * w.x, b = high_half(x[kk][j]) * w.y;
                    hi[kk][j] = pack(a, b);
                    lo[kk][j] = pack(a - low_half(hi[kk][j]), b - high_half(hi[kk][j]));
                }
                wgmma_fence();
                wgmma_rs(kv[0], hi[kk], k_desc + kk * (2048 >> 4), kk > 0);
                wgmma_rs(kv[0], lo[kk], k_desc + kk * (2048 >> 4), 1);
            }
            wgmma_commit();
            if (L::kHalves == 2) {
#pragma unroll
                for (int kk = 0; kk < 4; ++kk) {
                    uint64_t desc = k_desc + (kBox >> 4) + kk * (2048 >> 4);
                    wgmma_rs(kv[L::kHalves - 1], hi[kk], desc, kk > 0);
                    wgmma_rs(kv[L::kHalves - 1], lo[kk], desc, 1);
                }
                wgmma_commit();
            }
            if (c >= it.fused) { /* in the products' shadow */
                const int slot = published & 1;
                barrier_wait(&sh.s_empty[slot], ((published >> 1) & 1) ^ 1);
                store_tile(ring + L::kStates + slot * L::kKey, s);
                proxy_fence();
                __syncwarp();
                if (lane == 0)
                    barrier_arrive(&sh.s_full[slot]);
                ++published;
            }
            if (L::kHalves == 2) {
                wgmma_wait<1>();
                pin(kv[0]);
#pragma unroll
                for (int j = 0; j < 32; ++j)
                    s[j] += fmaf(-e, s[j], kv[0][j]);
            }
            wgmma_wait<0>();
            pin(kv[L::kHalves - 1]);
#pragma unroll
            for (int kk = 0; kk < 4; ++kk) {
                pin(hi[kk]);
                pin(lo[kk]);
            }
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(&sh.empty[now.stage]);
                if (c < it.fused) /* for the output group, which skips this chunk */
                    barrier_arrive(&sh.empty[now.stage]);
            }
#pragma unroll
            for (int j = 0; j < 32; ++j)
                s[DK / 2 - 32 + j] += fmaf(-e, s[DK / 2 - 32 + j], kv[L::kHalves - 1][j]);
        }
        end_state<DK>(s, p, it);
    }
}

/* d <- A B^T, [64, DK] by [64, DK]; one group of products, not waited for */
template <int DK> __device__ __forceinline__ void issue_product(float (&d)[32], uint32_t a, uint32_t b)
{
    uint64_t a_desc = descriptor(a), b_desc = descriptor(b);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < DK / 16; ++kk) {
        int step = (kk >> 2) * (kBox >> 4) + (kk & 3) * 2;
        wgmma_ss(d, a_desc + step, b_desc + step, kk > 0);
    }
    wgmma_commit();
}

template <int DK>
__device__ void write_output(const lightning_params &p, const tensor_maps &maps, char *base, small_shared &sh)
{
    using L = layout<DK>;
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const int row = warp * 16 + (lane >> 2), col = 2 * (lane & 3);
    const uint32_t ring = smem_address(base);
    const int n_items = p.items * p.n_heads * L::kHalves;
    int i = 0, published = 0, stored = 0;
    int powered = -1; /* the head that sh.power is of */
    bool jumped = false;

    for (int index = blockIdx.x; index < n_items; index += gridDim.x) {
        const lightning_item it = lightning_decode(p, index, L::kHalves);
        i += it.fused - it.chunk0;
        jumped = jumped || it.fused > it.chunk0;
        if (it.fused == it.chunk1)
            continue;
        const int x = it.head * DK + it.tile * kTile; /* the tile's first column in o */
        const int first = p.seq[it.seq].first;
        const int last_rows = p.seq[it.seq].count - (it.chunk1 - 1) * kChunk; /* 64 or more: all */
        /* below[k], under[k]: exp(-s (row - col - 8 (k - 1))), and for one column on; 0 above the diagonal */
        float below[9], under[9], from_start[2];
        if (powered != it.head)
            fill_powers(sh.power, p.slopes[it.head]);
        powered = it.head;
#pragma unroll
        for (int k = 0; k < 9; ++k) {
            int back = row - col - 8 * (k - 1);
            below[k] = back >= 0 ? sh.power[back] : 0.0f;
            under[k] = back >= 1 ? sh.power[back - 1] : 0.0f;
        }
        from_start[0] = sh.power[row + 1];
        from_start[1] = sh.power[row + 9];

        float out[32];
        uint32_t prob[4][4];
        /* score = Q K^T and inter = Q S of chunk i */
        auto issue_scores = [&](float(&score)[32], int chunk_i) {
            const turn<DK> now(chunk_i);
            const uint32_t at = ring + now.stage * L::kStage;
            barrier_wait(&sh.full[now.stage], now.phase);
            issue_product<DK>(score, at, at + L::kKey);
        };
        auto issue_inter = [&](float(&inter)[32], int chunk_i) {
            const int slot = published & 1;
            barrier_wait(&sh.s_full[slot], (published >> 1) & 1);
            issue_product<DK>(inter, ring + turn<DK>(chunk_i).stage * L::kStage,
                              ring + L::kStates + slot * L::kKey);
        };
        /* Both products done: prob <- score . M, out <- diag(exp(-s (i+1))) inter */
        auto weigh = [&](const float(&score)[32], const float(&inter)[32], bool tail) {
            if (lane == 0)
                barrier_arrive(&sh.s_empty[published & 1]);
            ++published;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                prob[j / 2][2 * (j & 1)] = pack(score[4 * j] * below[j + 1], score[4 * j + 1] * under[j + 1]);
                prob[j / 2][2 * (j & 1) + 1] = pack(score[4 * j + 2] * below[j], score[4 * j + 3] * under[j]);
            }
            if (tail) { /* k's rows past the tail may have held anything, NaN too */
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    int back = last_rows - (8 * (j >> 1) + col);
                    uint32_t keep = back >= 2 ? 0xFFFFFFFFu : back == 1 ? 0x0000FFFFu : 0u;
                    prob[j >> 2][j & 3] &= keep;
                }
            }
#pragma unroll
            for (int j = 0; j < 32; ++j)
                out[j] = inter[j] * from_start[(j >> 1) & 1];
        };
        /* out += prob V of chunk i */
        auto issue_output = [&]() {
            uint64_t v_desc = descriptor(ring + turn<DK>(i).stage * L::kStage + 2 * L::kKey);
            pin(out);
            wgmma_fence();
#pragma unroll
            for (int kk = 0; kk < 4; ++kk)
                wgmma_rs(out, prob[kk], v_desc + kk * (2048 >> 4), 1);
            wgmma_commit();
        };
        auto finish_output = [&]() {
            pin(out);
#pragma unroll
            for (int kk = 0; kk < 4; ++kk)
                pin(prob[kk]);
            if (lane == 0)
                barrier_arrive(&sh.empty[turn<DK>(i).stage]);
        };
        /* Each warp sends its 16 rows on its own. */
        auto store = [&](int c) {
            uint32_t staged = ring + L::kOut + (stored & 1) * kBox;
            ++stored;
            if (lane == 0) /* the store before the last one has left this tile */
                asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
            __syncwarp();
            store_tile(staged, out);
            proxy_fence();
            __syncwarp();
            if (lane == 0)
                tma_store(&maps.o, x, first + c * kChunk + warp * 16, staged + warp * 16 * 128);
        };

        int c = it.fused;
        {
            float score[32], inter[32];
            if (jumped) /* parity alone does not tell this turn of a stage from the one before the last */
                barrier_wait(&sh.s_full[published & 1], (published >> 1) & 1);
            jumped = false;
            issue_scores(score, i);
            issue_inter(inter, i);
            wgmma_wait<0>();
            pin(score);
            pin(inter);
            weigh(score, inter, c + 1 == it.chunk1 && last_rows < kChunk);
        }
        for (; c + 1 < it.chunk1; ++c, ++i) {
            float score[32], inter[32];
            issue_output();
            issue_scores(score, i + 1); /* the next chunk's products run while this one's output is stored */
            issue_inter(inter, i + 1);
            wgmma_wait<2>();
            finish_output();
            store(c);
            wgmma_wait<0>();
            pin(score);
            pin(inter);
            weigh(score, inter, c + 2 == it.chunk1 && last_rows < kChunk);
        }
        issue_output();
        wgmma_wait<0>();
        finish_output();
        ++i;
        if (last_rows >= kChunk) {
            store(c);
        } else {
            const int64_t ld = static_cast<int64_t>(p.n_heads) * DK;
            __nv_bfloat16 *to = p.o + (first + c * kChunk + row) * ld + x + col;
#pragma unroll
            for (int j = 0; j < 16; ++j) /* columns 8 (j / 2) + col of rows row, row + 8 */
                if (row + 8 * (j & 1) < last_rows)
                    *reinterpret_cast<uint32_t *>(to + 8 * (j & 1) * ld + 8 * (j >> 1)) =
                        pack(out[2 * j], out[2 * j + 1]);
        }
    }
    if (lane == 0)
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

template <int DK>
__global__ void __launch_bounds__(kBlock, 1)
    lightning_hopper_kernel(const __grid_constant__ lightning_params p,
                            const __grid_constant__ tensor_maps maps)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using L = layout<DK>;
    extern __shared__ char raw[];
    char *base = raw + ((1024 - (smem_address(raw) & 1023)) & 1023);
    small_shared &sh = *reinterpret_cast<small_shared *>(base + L::kSmall);
    if (threadIdx.x == 0) {
        for (int i = 0; i < L::kStages; ++i) {
            barrier_init(&sh.full[i], 1);
            barrier_init(&sh.empty[i], 8); /* warps of the two consumer groups */
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(&sh.s_full[i], 4);
            barrier_init(&sh.s_empty[i], 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (const CUtensorMap *map : {&maps.q, &maps.k, &maps.v, &maps.o})
            asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
    }
    __syncthreads();
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory"); /* until here the kernel before may still run */
    int group = threadIdx.x / kGroup;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0)
            load<DK>(p, maps, base, sh);
    } else if (group == 1) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 248;");
        carry_state<DK>(p, base, sh);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        write_output<DK>(p, maps, base, sh);
    }
#else
    __shared__ volatile char absent[1]; /* tells ltn_lightning_hopper_supports */
    absent[0] = 0;
    __trap();
#endif
}

/* The driver's encoder, without linking the driver. NULL where the driver has none. */
decltype(&cuTensorMapEncodeTiled) encoder()
{
    static const auto fn = [] {
        void *p = nullptr;
        cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault,
                                             &found) != cudaSuccess ||
            found != cudaDriverEntryPointSuccess)
            p = nullptr;
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(p);
    }();
    return fn;
}

/* [rows, columns] bf16 in boxes of 64 columns */
bool encode(CUtensorMap *map, const void *base, int64_t rows, int64_t columns, int64_t ld, uint32_t box_rows)
{
    cuuint64_t dims[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    cuuint64_t strides[1] = {static_cast<cuuint64_t>(ld) * sizeof(__nv_bfloat16)};
    cuuint32_t box[2] = {64, box_rows}, step[2] = {1, 1};
    return encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(base), dims, strides, box,
                     step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int DK>
cudaError_t launch(cudaStream_t stream, const lightning_params &p, const tensor_maps &maps, int n_sm)
{
    cudaError_t err = cudaFuncSetAttribute(lightning_hopper_kernel<DK>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, layout<DK>::kBytes);
    if (err != cudaSuccess)
        return err;
    /* No more blocks than can be resident at once: phase 2 waits for phase 1 inside the kernel. */
    int items = p.items1 > p.items - p.items1 ? p.items1 : p.items - p.items1;
    int64_t wanted = static_cast<int64_t>(items) * p.n_heads * (DK / kTile);
    int grid = static_cast<int>(wanted < n_sm ? wanted : n_sm);
    cudaLaunchAttribute early[1] = {};
    early[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early[0].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(kBlock);
    config.dynamicSmemBytes = layout<DK>::kBytes;
    config.stream = stream;
    config.attrs = early;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, lightning_hopper_kernel<DK>, p, maps);
}

} // namespace

bool ltn_lightning_hopper_supports(int32_t head_dim, bool lrpe, int device)
{
    int major = 0, minor = 0;
    cudaFuncAttributes kernel;
    return (head_dim == 64 || head_dim == 128) && !lrpe &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
           major == 9 && minor == 0 && encoder() != nullptr &&
           cudaFuncGetAttributes(&kernel, lightning_hopper_kernel<128>) == cudaSuccess &&
           kernel.sharedSizeBytes == 0; /* built for sm_90a, not for sm_90 or another */
}

cudaError_t ltn_lightning_hopper(cudaStream_t stream, const lightning_params &p, int32_t head_dim,
                                 int64_t rows, int device)
{
    tensor_maps maps;
    int64_t width = static_cast<int64_t>(p.n_heads) * head_dim;
    int n_sm = 0;
    cudaError_t err = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
    if (err != cudaSuccess)
        return err;
    if (!encode(&maps.q, p.q, rows, width, p.ld, kChunk) ||
        !encode(&maps.k, p.k, rows, width, p.ld, kChunk) ||
        !encode(&maps.v, p.v, rows, width, p.ld, kChunk) || !encode(&maps.o, p.o, rows, width, width, 16))
        return cudaErrorInvalidValue;
    return head_dim == 128 ? launch<128>(stream, p, maps, n_sm) : launch<64>(stream, p, maps, n_sm);
}
