/* Lightning attention forward for Hopper: TMA loads, wgmma, the state in registers.
 *
 * One block works on one item at a time: 64 value columns ("tile") of one head over one segment. Three
 * warpgroups:
 *   loader   one thread fills a ring of stages with the chunks' q, k [64, kD] and v [64, 64].
 *   state    holds S^T [64, kD] in f32 registers. Per chunk: publishes S as bf16 in shared memory, then
 *            S <- S + (V'^T K - e S), V'_i = exp(-s (m-1-i)) v_i as a high and a low bf16, e = -expm1(-s m).
 *   output   O = diag(exp(-s (i+1))) (Q S) + (Q K^T . M) V, M_ij = exp(-s (i-j)) for i >= j, else 0.
 * The state group never waits for outputs (two published states), so the only chain over chunks is the
 * elementwise update of S. Decay multiplies f32 accumulators, or v in two parts; never q or k.
 *
 * Shared tiles are 64 rows of 128 bytes with the 128-byte swizzle: 16-byte column c of row r lies at column
 * c ^ (r & 7). A [64, 128] tile is two such halves. */
#include "kernels/cuda/lightning_tiles.cuh"

namespace
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class L>
__device__ void load(const lightning_params &p, const tensor_maps &maps, char *base, small_shared &sh)
{
    int n_items = p.items * p.n_heads * L::kTiles, i = 0;
    await_previous();
    for (int index = blockIdx.x; index < n_items; index += gridDim.x) {
        lightning_item it = lightning_decode(p, index, L::kTiles);
        int first = p.seq[it.seq].first;
        for (int c = it.chunk0; c < it.chunk1; ++c, ++i) {
            turn<L> now(i);
            uint64_t *full = &sh.full[now.stage];
            uint32_t at = shared_address(base) + now.stage * L::kStage;
            int row = first + c * kChunk;
            barrier_wait(&sh.empty[now.stage], now.phase ^ 1);
            barrier_arrive_expect(full, (c >= it.fused ? 2 * L::kKey : L::kKey) + kBox);
            for (int h = 0; h < L::kHalves; ++h)
                tma_load(at + L::kKey + h * kBox, &maps.k, it.head * L::kD + h * 64, row, full);
            tma_load(at + 2 * L::kKey, &maps.v, it.head * L::kE + it.tile * kTile, row, full);
            for (int h = 0; c >= it.fused && h < L::kHalves; ++h)
                tma_load(at + h * kBox, &maps.q, it.head * L::kD + h * 64, row, full);
        }
    }
}

/* S^T <- the state in which the item begins. Thread t of the group holds, as wgmma does, rows (value columns)
 * 16 warp + lane / 4 (+ 8) and, for each j < kD / 8, columns 8 j + 2 (lane % 4) (+ 1). */
template <class L>
__device__ void begin_state(float (&s)[L::kD / 2], const lightning_params &p, const lightning_item &it,
                            float slope)
{
    constexpr int n_tiles = L::kTiles;
    const lightning_seq &seq = p.seq[it.seq];
    int t = threadIdx.x & (kGroup - 1);
    int row = (t >> 5) * 16 + ((t & 31) >> 2), col = 2 * (t & 3);
#pragma unroll
    for (int i = 0; i < L::kD / 2; ++i)
        s[i] = 0.0f;
    if (it.seg == 0 || seq.warm) {
        const float *from = seq.state + static_cast<int64_t>(it.head) * L::kD * L::kE + it.tile * kTile;
#pragma unroll
        for (int i = 0; i < L::kD / 2; ++i)
            s[i] = from[(8 * (i >> 2) + col + (i & 1)) * L::kE + row + ((i & 2) << 2)] * (1 / L::kS);
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
        const float4 *from = reinterpret_cast<const float4 *>(
            p.parts + static_cast<int64_t>(part) * L::kD * L::kE + it.tile * kTile * L::kD);
        const int64_t step = static_cast<int64_t>(p.n_heads) * L::kD * L::kE / 4;
        /* In pieces that leave room for two of them beside the state: they are on their way while others are
         * added. Piece n of all is the n % kPieces-th of segment n / kPieces. */
        constexpr int kPieces = L::kD == 256 ? 4 : 1, kEach = L::kD / 8 / kPieces,
                      kTurn = kPieces > 1 ? kPieces : 2;
        float4 x[2][kEach];
        const int n_pieces = it.seg * kPieces;
        auto read = [&](float4(&to)[kEach], int n) {
#pragma unroll
            for (int i = 0; i < kEach; ++i)
                to[i] = __ldcg(from + n / kPieces * step + (n % kPieces * kEach + i) * kGroup + t);
        };
        read(x[0], 0);
        if (n_pieces > 1)
            read(x[1], 1);
        for (int n = 0; n < n_pieces; n += kTurn)
#pragma unroll
            for (int m = 0; m < kTurn; ++m) {
                if (n + m < n_pieces) {
                    float *to = s + m % kPieces * 4 * kEach;
#pragma unroll
                    for (int i = 0; i < kEach; ++i) {
                        to[4 * i] += fmaf(-e, to[4 * i], x[m & 1][i].x);
                        to[4 * i + 1] += fmaf(-e, to[4 * i + 1], x[m & 1][i].y);
                        to[4 * i + 2] += fmaf(-e, to[4 * i + 2], x[m & 1][i].z);
                        to[4 * i + 3] += fmaf(-e, to[4 * i + 3], x[m & 1][i].w);
                    }
                }
                if (n + m + 2 < n_pieces)
                    read(x[m & 1], n + m + 2);
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

template <class L>
__device__ void end_state(const float (&s)[L::kD / 2], const lightning_params &p, const lightning_item &it)
{
    constexpr int n_tiles = L::kTiles;
    const lightning_seq &seq = p.seq[it.seq];
    int t = threadIdx.x & (kGroup - 1);
    if (it.seg == seq.n_seg - 1) {
        if (seq.warm) { /* until all others have done with the start state */
            if (t == 0)
                await_readers(p.flags + (seq.part * p.n_heads + it.head) * n_tiles + it.tile, seq.n_seg - 1);
            group_sync(1);
        }
        int row = (t >> 5) * 16 + ((t & 31) >> 2), col = 2 * (t & 3);
        float *to = seq.state + static_cast<int64_t>(it.head) * L::kD * L::kE + it.tile * kTile;
#pragma unroll
        for (int i = 0; i < L::kD / 2; ++i)
            to[(8 * (i >> 2) + col + (i & 1)) * L::kE + row + ((i & 2) << 2)] = s[i] * L::kS;
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
    float4 *to = reinterpret_cast<float4 *>(p.parts + static_cast<int64_t>(part) * L::kD * L::kE +
                                            it.tile * kTile * L::kD);
#pragma unroll
    for (int i = 0; i < L::kD / 8; ++i)
        to[i * kGroup + t] = make_float4(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]);
    group_sync(1);
    if (t == 0)
        asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(p.flags + part * n_tiles + it.tile),
                     "r"(seq.n_seg - 1 - it.seg)
                     : "memory");
}

/* 16 rows of v, in a lane's layout of wgmma's first operand, times their weights in the state: a high and a
 * low bf16 (TURNED: one f16). */
template <class L>
__device__ __forceinline__ void weigh_values(uint32_t (&hi)[4], uint32_t (&lo)[4], const uint32_t (&x)[4],
                                             const float *weight)
{
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float2 w = *reinterpret_cast<const float2 *>(weight + 4 * (j & 2) + 2 * (threadIdx.x & 3));
        const float a = low_half(x[j]) * w.x, b = high_half(x[j]) * w.y;
        hi[j] = L::kTurned ? pack_f16(a, b) : pack_bf16(a, b);
        lo[j] = L::kTurned ? 0 : pack_bf16(a - low_half(hi[j]), b - high_half(hi[j]));
    }
}

/* kv (+)= V'^T K over the kk-th 16 rows of a chunk, for 64 columns of k */
template <class L>
__device__ __forceinline__ void issue_state(float (&kv)[32], uint64_t k_desc, const uint32_t (&hi)[4],
                                            const uint32_t (&lo)[4], int kk)
{
    wgmma_64<L::kTurned>(kv, hi, k_desc, kk > 0);
    if (!L::kTurned)
        wgmma_64<false>(kv, lo, k_desc, 1);
}

template <class L> __device__ void carry_state(const lightning_params &p, char *base, small_shared &sh)
{
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const uint32_t ring = shared_address(base);
    /* the lane's address within v for ldmatrix: row 8 (lane / 16) + lane % 8, 16-byte column 2 warp + lane /
     * 8 % 2
     */
    const uint32_t v_at =
        ((lane & 7) + ((lane >> 4) << 3)) * 128 + (((2 * warp + ((lane >> 3) & 1)) ^ (lane & 7)) << 4);
    const int n_items = p.items * p.n_heads * L::kTiles;
    int i = 0, published = 0, weighed = -1; /* the head that sh.weight and e are of, for whole chunks */
    float e = 0.0f;

    for (int index = blockIdx.x; index < n_items; index += gridDim.x) {
        const lightning_item it = lightning_decode(p, index, L::kTiles);
        const float slope = p.slopes[it.head];
        const int last_rows = p.seq[it.seq].count - (it.chunk1 - 1) * kChunk;
        if (weighed != it.head) {
            e = loss(slope, kChunk);
            fill_weights<L>(sh.weight, slope, kChunk);
            weighed = it.head;
        }
        if (index == static_cast<int>(blockIdx.x))
            await_previous();
        float s[L::kD / 2];
        begin_state<L>(s, p, it, slope);

        for (int c = it.chunk0; c < it.chunk1; ++c, ++i) {
            const turn<L> now(i);
            const uint32_t at = ring + now.stage * L::kStage;
            barrier_wait(&sh.full[now.stage], now.phase);
            if (c + 1 == it.chunk1 && last_rows < kChunk) {
                zero_tail<L>(base + now.stage * L::kStage, last_rows);
                e = loss(slope, last_rows);
                fill_weights<L>(sh.weight, slope, last_rows);
                weighed = -1;
            }
            float kv[2][32]; /* 64 columns of V'^T K each, in turn */
            uint32_t x[4][4], hi[4][4], lo[4][4];
            const uint64_t k_desc = descriptor(at + L::kKey);
            auto issue = [&](int half, int kk) {
                issue_state<L>(kv[half & 1], k_desc + half * (kBox >> 4) + kk * (2048 >> 4), hi[kk], lo[kk],
                               kk);
            };
#pragma unroll
            for (int kk = 0; kk < 4; ++kk)
                ldmatrix_trans(x[kk], at + 2 * L::kKey + kk * 2048 + v_at);
#pragma unroll
            for (int kk = 0; kk < 4; ++kk) {
                weigh_values<L>(hi[kk], lo[kk], x[kk], sh.weight + 16 * kk);
                wgmma_fence();
                issue(0, kk);
            }
            wgmma_commit();
            if (L::kHalves > 1) {
#pragma unroll
                for (int kk = 0; kk < 4; ++kk)
                    issue(1, kk);
                wgmma_commit();
            }
            if (c >= it.fused) { /* in the products' shadow */
                const int slot = published & 1;
                barrier_wait(&sh.s_empty[slot], ((published >> 1) & 1) ^ 1);
                if constexpr (L::kTurned)
                    store_scaled(ring + L::kStates + slot * L::kKey, s,
                                 reinterpret_cast<float *>(&sh.scale[slot]) + warp);
                else
                    store_tile(ring + L::kStates + slot * L::kKey, s);
                proxy_fence();
                __syncwarp();
                if (lane == 0)
                    barrier_arrive(&sh.s_full[slot]);
                ++published;
            }
#pragma unroll
            for (int half = 0; half < L::kHalves; ++half) {
                if (half + 1 < L::kHalves) {
                    wgmma_wait<1>();
                    pin(kv[half & 1]);
                } else {
                    wgmma_wait<0>();
                    pin(kv[half & 1]);
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
                }
#pragma unroll
                for (int j = 0; j < 32; ++j)
                    s[32 * half + j] += fmaf(-e, s[32 * half + j], kv[half & 1][j]);
                if (half + 2 < L::kHalves) {
                    pin(kv[half & 1]);
                    wgmma_fence();
#pragma unroll
                    for (int kk = 0; kk < 4; ++kk)
                        issue(half + 2, kk);
                    wgmma_commit();
                }
            }
        }
        end_state<L>(s, p, it);
    }
}

/* d <- A B^T, [64, kD] by [64, kD]; one group of products, not waited for */
template <class L> __device__ __forceinline__ void issue_product(float (&d)[32], uint32_t a, uint32_t b)
{
    uint64_t a_desc = descriptor(a), b_desc = descriptor(b);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < L::kD / 16; ++kk) {
        int step = (kk >> 2) * (kBox >> 4) + (kk & 3) * 2;
        wgmma_64<L::kTurned>(d, a_desc + step, b_desc + step, kk > 0);
    }
    wgmma_commit();
}

template <class L>
__device__ void write_output(const lightning_params &p, const tensor_maps &maps, char *base, small_shared &sh)
{
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const int row = warp * 16 + (lane >> 2), col = 2 * (lane & 3);
    const uint32_t ring = shared_address(base);
    const int n_items = p.items * p.n_heads * L::kTiles;
    int i = 0, published = 0, stored = 0;
    int powered = -1; /* the head that sh.power is of */
    bool jumped = false;

    for (int index = blockIdx.x; index < n_items; index += gridDim.x) {
        const lightning_item it = lightning_decode(p, index, L::kTiles);
        i += it.fused - it.chunk0;
        jumped = jumped || it.fused > it.chunk0;
        if (it.fused == it.chunk1)
            continue;
        const int x = it.head * L::kE + it.tile * kTile; /* the tile's first column in o */
        const int first = p.seq[it.seq].first;
        const int last_rows = p.seq[it.seq].count - (it.chunk1 - 1) * kChunk; /* 64 or more: all */
        /* below[k], under[k]: exp(-s (row - col - 8 (k - 1))), and for one column on; 0 above the diagonal */
        float below[9], under[9], from_start[2];
        if (powered != it.head)
            fill_powers(sh.power, p.slopes[it.head]);
        if (powered < 0)
            await_previous();
        powered = it.head;
#pragma unroll
        for (int k = 0; k < 9; ++k) {
            int back = row - col - 8 * (k - 1);
            below[k] = back >= 0 ? sh.power[back] * L::kS : 0.0f;
            under[k] = back >= 1 ? sh.power[back - 1] * L::kS : 0.0f;
        }
        from_start[0] = sh.power[row + 1] * (L::kQ * L::kS);
        from_start[1] = sh.power[row + 9] * (L::kQ * L::kS);

        float out[32];
        uint32_t prob[4][4];
        /* score = Q K^T and inter = Q S of chunk i */
        auto issue_scores = [&](float(&score)[32], int chunk_i) {
            const turn<L> now(chunk_i);
            const uint32_t at = ring + now.stage * L::kStage;
            barrier_wait(&sh.full[now.stage], now.phase);
            issue_product<L>(score, at, at + L::kKey);
        };
        auto issue_inter = [&](float(&inter)[32], int chunk_i) {
            const int slot = published & 1;
            barrier_wait(&sh.s_full[slot], (published >> 1) & 1);
            issue_product<L>(inter, ring + turn<L>(chunk_i).stage * L::kStage,
                             ring + L::kStates + slot * L::kKey);
        };
        /* Both products done: prob <- score . M, out <- diag(exp(-s (i+1))) inter */
        auto weigh = [&](const float(&score)[32], const float(&inter)[32], bool tail) {
            float scale[4] = {1, 1, 1, 1};
            if (L::kTurned) {
                float4 x = {};
                if (lane == 0) /* which alone tells that it is read */
                    x = sh.scale[published & 1];
                scale[0] = __shfl_sync(0xffffffffu, x.x, 0);
                scale[1] = __shfl_sync(0xffffffffu, x.y, 0);
                scale[2] = __shfl_sync(0xffffffffu, x.z, 0);
                scale[3] = __shfl_sync(0xffffffffu, x.w, 0);
            }
            if (lane == 0)
                barrier_arrive(&sh.s_empty[published & 1]);
            ++published;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                prob[j / 2][2 * (j & 1)] =
                    pack_bf16(score[4 * j] * below[j + 1], score[4 * j + 1] * under[j + 1]);
                prob[j / 2][2 * (j & 1) + 1] =
                    pack_bf16(score[4 * j + 2] * below[j], score[4 * j + 3] * under[j]);
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
                out[j] = inter[j] * (from_start[(j >> 1) & 1] * scale[j >> 3]);
        };
        /* out += prob V of chunk i */
        auto issue_output = [&]() {
            uint64_t v_desc = descriptor(ring + turn<L>(i).stage * L::kStage + 2 * L::kKey);
            pin(out);
            wgmma_fence();
#pragma unroll
            for (int kk = 0; kk < 4; ++kk)
                wgmma_64<false>(out, prob[kk], v_desc + kk * (2048 >> 4), 1);
            wgmma_commit();
        };
        auto finish_output = [&]() {
            pin(out);
#pragma unroll
            for (int kk = 0; kk < 4; ++kk)
                pin(prob[kk]);
            if (lane == 0)
                barrier_arrive(&sh.empty[turn<L>(i).stage]);
        };
        /* The gates of the warp's rows of chunk c, to where their outputs go: into slot `turn`, counted on.
         */
        auto fetch_gate = [&](int c, int turn) {
            const int slot = turn % L::kSlots;
            barrier_arrive_expect(&sh.gate[warp][slot], 16 * 128);
            tma_load(ring + L::kOut + slot * kBox + warp * 16 * 128, &maps.gate, x,
                     first + c * kChunk + warp * 16, &sh.gate[warp][slot]);
        };
        /* out <- gate * out, and the sums of squares of what it was, for the norm */
        auto apply_gate = [&](uint32_t staged, int c, int rows) {
            const int slot = stored % L::kSlots;
            float squares[2] = {};
#pragma unroll
            for (int j = 0; j < 32; ++j)
                squares[(j >> 1) & 1] = fmaf(out[j], out[j], squares[(j >> 1) & 1]);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                squares[h] += __shfl_xor_sync(0xffffffffu, squares[h], 1);
                squares[h] += __shfl_xor_sync(0xffffffffu, squares[h], 2);
                if ((lane & 3) == 0 && row + 8 * h < rows)
                    p.squares[static_cast<int64_t>(it.head * L::kTiles + it.tile) * p.rows + first +
                              c * kChunk + row + 8 * h] = squares[h];
            }
            barrier_wait(&sh.gate[warp][slot], (stored / L::kSlots) & 1);
            const int line = warp * 16 + (lane & 15);
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                uint32_t g[4];
                ldmatrix(g, staged + line * 128 + (((j + (lane >> 4)) ^ (line & 7)) << 4));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    out[4 * j + 2 * i] *= low_half(g[i]);
                    out[4 * j + 2 * i + 1] *= high_half(g[i]);
                }
            }
        };
        /* Each warp sends its 16 rows on its own. */
        auto store = [&](int c) {
            constexpr int kAhead = L::kSlots / 2; /* chunks by which gates come before they are needed */
            const uint32_t staged = ring + L::kOut + stored % L::kSlots * kBox;
            if (L::kGated) {
                apply_gate(staged, c, kChunk);
            } else {
                if (lane == 0) /* the store before the last one has left this tile */
                    tma_wait_read<1>();
                __syncwarp();
            }
            store_tile(staged, out);
            proxy_fence();
            __syncwarp();
            if (lane == 0) {
                tma_store(&maps.o, x, first + c * kChunk + warp * 16, staged + warp * 16 * 128);
                if (L::kGated && c + kAhead < it.chunk1) {
                    tma_wait_read<kAhead>();
                    fetch_gate(c + kAhead, stored + kAhead);
                }
            }
            ++stored;
        };

        int c = it.fused;
        if (L::kGated && lane == 0) {
            tma_wait_read<0>();
            for (int i = 0; i < L::kSlots / 2 && c + i < it.chunk1; ++i)
                fetch_gate(c + i, stored + i);
        }
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
            if (L::kGated)
                apply_gate(ring + L::kOut + stored % L::kSlots * kBox, c, last_rows);
            ++stored;
            const int64_t ld = static_cast<int64_t>(p.n_heads) * L::kE;
            __nv_bfloat16 *to = p.o + (first + c * kChunk + row) * ld + x + col;
#pragma unroll
            for (int j = 0; j < 16; ++j) /* columns 8 (j / 2) + col of rows row, row + 8 */
                if (row + 8 * (j & 1) < last_rows)
                    *reinterpret_cast<uint32_t *>(to + 8 * (j & 1) * ld + 8 * (j >> 1)) =
                        pack_bf16(out[2 * j], out[2 * j + 1]);
        }
    }
    if (lane == 0)
        tma_wait_all();
}

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

template <int E, bool TURNED, bool GATED>
__global__ void __launch_bounds__(kBlock, 1)
    lightning_hopper_kernel(const __grid_constant__ lightning_params p,
                            const __grid_constant__ tensor_maps maps)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using L = layout<E, TURNED, GATED>;
    extern __shared__ char raw[];
    char *base = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
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
        for (int i = 0; i < 4 * L::kSlots; ++i)
            barrier_init(&sh.gate[i / L::kSlots][i % L::kSlots], 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (const CUtensorMap *map : {&maps.q, &maps.k, &maps.v, &maps.o, &maps.gate})
            asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
    }
    __syncthreads();
    asm volatile("griddepcontrol.launch_dependents;");
    int group = threadIdx.x / kGroup;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0)
            load<L>(p, maps, base, sh);
    } else if (group == 1) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 248;");
        carry_state<L>(p, base, sh);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        write_output<L>(p, maps, base, sh);
    }
#else
    __shared__ volatile char absent[1]; /* tells ltn_lightning_hopper_supports */
    absent[0] = 0;
    __trap();
#endif
}

/* [rows, columns] of 16 bits, ld elements from row to row */
bool encode(CUtensorMap *map, const void *base, int64_t rows, int64_t columns, int64_t ld, uint32_t box_rows)
{
    return tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, base, rows, columns, ld, box_rows);
}

template <int E, bool TURNED, bool GATED>
cudaError_t launch(cudaStream_t stream, const lightning_params &p, const tensor_maps &maps, int n_sm)
{
    using L = layout<E, TURNED, GATED>;
    const auto kernel = lightning_hopper_kernel<E, TURNED, GATED>;
    cudaError_t err = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
    if (err != cudaSuccess)
        return err;
    /* No more blocks than can be resident at once: phase 2 waits for phase 1 inside the kernel. */
    int items = p.items1 > p.items - p.items1 ? p.items1 : p.items - p.items1;
    int64_t wanted = static_cast<int64_t>(items) * p.n_heads * L::kTiles;
    int grid = static_cast<int>(wanted < n_sm ? wanted : n_sm);
    cudaLaunchAttribute early[1] = {};
    early[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early[0].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(kBlock);
    config.dynamicSmemBytes = L::kBytes;
    config.stream = stream;
    config.attrs = early;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, p, maps);
}

} // namespace

bool ltn_lightning_hopper_supports(int32_t head_dim, bool lrpe, int device)
{
    int major = 0, minor = 0;
    cudaFuncAttributes kernel;
    return (head_dim == 128 || (head_dim == 64 && !lrpe)) &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
           major == 9 && minor == 0 && tensor_map_encoder() != nullptr &&
           cudaFuncGetAttributes(&kernel, lightning_hopper_kernel<128, false, false>) == cudaSuccess &&
           kernel.sharedSizeBytes == 0; /* built for sm_90a, not for sm_90 or another */
}

cudaError_t ltn_lightning_hopper(cudaStream_t stream, const lightning_params &p, int32_t head_dim, int device)
{
    tensor_maps maps;
    const bool turned = p.theta != nullptr, gated = p.gate != nullptr;
    const int64_t width = static_cast<int64_t>(p.n_heads) * head_dim, keys = turned ? 2 * width : width;
    const int64_t ld = turned ? keys : p.ld;
    const __nv_bfloat16 *q = turned ? p.turned : p.q, *k = turned ? p.turned + p.rows * keys : p.k;
    int n_sm = 0;
    cudaError_t err = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
    if (err != cudaSuccess)
        return err;
    if (!encode(&maps.q, q, p.rows, keys, ld, kChunk) || !encode(&maps.k, k, p.rows, keys, ld, kChunk) ||
        !encode(&maps.v, p.v, p.rows, width, p.ld, kChunk) ||
        !encode(&maps.o, p.o, p.rows, width, width, 16) ||
        !encode(&maps.gate, gated ? p.gate : p.v, p.rows, width, gated ? p.ld_gate : p.ld, 16))
        return cudaErrorInvalidValue;
#define RUN(E, TURNED)                                                                                       \
    (gated ? launch<E, TURNED, true>(stream, p, maps, n_sm) : launch<E, TURNED, false>(stream, p, maps, n_sm))
    return turned ? RUN(128, true) : head_dim == 128 ? RUN(128, false) : RUN(64, false);
#undef RUN
}
