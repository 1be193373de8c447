/* Lightning attention forward: the plan of a call, and the portable kernel (sm_80 and up, mma.sync).
 *
 * The portable kernel computes what lightning_hopper.cu does, in the same chunks and segments, for every
 * supported width and for LRPE, where q and k are turned in shared memory to width d = 2e, as f16. One block
 * of four warps walks one segment of one head and one tile of value columns: O = diag(exp(-s (i+1))) (Q S) +
 * (Q K^T . M) V     warp w owns rows 16w .. 16w+15 of the chunk S <- S + (K'^T V - e S) warp w owns rows 16
 * (w + 4 i) .. +15 of S, in f32 registers with M_ij = exp(-s (i-j)) for i >= j, K'_i = exp(-s (m-1-i)) k_i as
 * a high and a low bf16 and e = -expm1(-s m). Q S reads S as bf16 from shared memory. */
#include "kernels/cuda/lightning_plan.cuh"

#include <cuda_fp16.h>

namespace
{

constexpr int kThreads = 128;

/* Rows of shared tiles are padded to an odd number of 16-byte pieces: ldmatrix then meets no bank twice. */
constexpr int padded(int columns)
{
    return columns + ((columns / 8) % 2 == 0 ? 8 : 0);
}

template <int E, bool LRPE, int DVT> struct shape {
    static constexpr int kD = LRPE ? 2 * E : E;
    static constexpr int kTiles = E / DVT;            /* value tiles per head */
    static constexpr int kLdKey = padded(kD);         /* q, k: [64][kLdKey] */
    static constexpr int kLdValue = padded(DVT);      /* v: [64][kLdValue]; S: [kD][kLdValue] */
    static constexpr int kBlocks = (kD / 16 + 3) / 4; /* 16-row blocks of S per warp */
    static constexpr int kN = DVT / 8;
    static constexpr int kBytes =
        (2 * kChunk * kLdKey + kChunk * kLdValue + kD * kLdValue) * 2 + (kChunk + 8) * 4;
    static_assert(E % DVT == 0 && DVT % 8 == 0 && kD % 16 == 0, "tiles must divide the head");
};

__device__ __forceinline__ void ldmatrix2_trans(uint32_t (&r)[2], const void *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(p))
                 : "memory");
}

/* d += A B, 16 x 8 x 16 */
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The same of f16 */
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Two elements of a tile of q or k in f32: bf16, or the f16 of turned ones */
template <bool F16> __device__ __forceinline__ float2 unpack(uint32_t x)
{
    if (F16)
        return __half22float2(*reinterpret_cast<const __half2 *>(&x));
    return make_float2(low_half(x), high_half(x));
}

/* (a, b) as a high and a low pair of bf16 */
__device__ __forceinline__ void split(uint32_t &hi, uint32_t &lo, float a, float b)
{
    hi = pack_bf16(a, b);
    lo = pack_bf16(a - low_half(hi), b - high_half(hi));
}

/* acc[n] += A (16 x 16) times columns 8 n .. 8 n + 7 of the 16 rows at `b`, for all n. */
template <int N>
__device__ __forceinline__ void mma_row(float (&acc)[N][4], const uint32_t (&a)[4], const __nv_bfloat16 *b,
                                        int ld)
{
    int lane = threadIdx.x & 31;
    const __nv_bfloat16 *at = b + (lane & 15) * ld;
#pragma unroll
    for (int n = 0; n + 1 < N; n += 2) {
        uint32_t r[4];
        ldmatrix_trans(r, shared_address(at + 8 * n + 8 * (lane >> 4)));
        mma(acc[n], a, r[0], r[1]);
        mma(acc[n + 1], a, r[2], r[3]);
    }
    if (N % 2 == 1) {
        uint32_t r[2];
        ldmatrix2_trans(r, at + 8 * (N - 1));
        mma(acc[N - 1], a, r[0], r[1]);
    }
}

/* The same with A in two parts, hi + lo */
template <int N>
__device__ __forceinline__ void mma_row(float (&acc)[N][4], const uint32_t (&hi)[4], const uint32_t (&lo)[4],
                                        const __nv_bfloat16 *b, int ld)
{
    int lane = threadIdx.x & 31;
    const __nv_bfloat16 *at = b + (lane & 15) * ld;
#pragma unroll
    for (int n = 0; n + 1 < N; n += 2) {
        uint32_t r[4];
        ldmatrix_trans(r, shared_address(at + 8 * n + 8 * (lane >> 4)));
        mma(acc[n], hi, r[0], r[1]);
        mma(acc[n + 1], hi, r[2], r[3]);
        mma(acc[n], lo, r[0], r[1]);
        mma(acc[n + 1], lo, r[2], r[3]);
    }
    if (N % 2 == 1) {
        uint32_t r[2];
        ldmatrix2_trans(r, at + 8 * (N - 1));
        mma(acc[N - 1], hi, r[0], r[1]);
        mma(acc[N - 1], lo, r[0], r[1]);
    }
}

/* Copies rows [0, m) of a [64, columns] tile, 16 bytes at a time, and zeroes the rest. */
template <int COLUMNS>
__device__ __forceinline__ void load_tile(__nv_bfloat16 *tile, int ld_tile, const __nv_bfloat16 *from,
                                          int64_t ld, int m)
{
    constexpr int kPieces = COLUMNS / 8;
    for (int i = threadIdx.x; i < kChunk * kPieces; i += kThreads) {
        int row = i / kPieces, piece = i - row * kPieces;
        int bytes = row < m ? 16 : 0;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                         shared_address(tile + row * ld_tile + 8 * piece)),
                     "l"(from + (row < m ? row : 0) * ld + 8 * piece), "r"(bytes)
                     : "memory");
    }
}

/* [x] -> [x cos(theta p), x sin(theta p)] / kTurnScale in f16, in place on q (unless NULL) and k, p = pos +
 * row. Each thread takes two columns of some rows, and reads a few rows ahead of what it writes. */
template <int E>
__device__ __forceinline__ void rotate(__nv_bfloat16 *q, __nv_bfloat16 *k, int ld, const float *theta,
                                       int64_t pos)
{
    constexpr int kPairs = E / 2, kParts = kPairs > 64 ? 1 : kPairs > 32 ? 2 : kPairs > 16 ? 4 : 8;
    constexpr int kRows = kChunk / kParts, kBatch = 8;
    static_assert(kPairs * kParts <= kThreads && kRows % kBatch == 0, "a thread per pair and part");
    if (threadIdx.x >= kPairs * kParts)
        return;
    const int column = 2 * (threadIdx.x % kPairs), row0 = threadIdx.x / kPairs * kRows;
    turning a(theta[column], pos + row0), b(theta[column + 1], pos + row0);
    auto at = [=](__nv_bfloat16 *tile, int row) {
        return reinterpret_cast<uint32_t *>(tile + row * ld + column);
    };
    for (int row = row0; row < row0 + kRows; row += kBatch) {
        uint32_t x[kBatch], y[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            x[i] = q ? *at(q, row + i) : 0;
            y[i] = *at(k, row + i);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const float ca = a.c * (1.0f / kTurnScale), sa = a.s * (1.0f / kTurnScale);
            const float cb = b.c * (1.0f / kTurnScale), sb = b.s * (1.0f / kTurnScale);
            auto put = [&](uint32_t *to, uint32_t z) {
                __half2 cosine = __floats2half2_rn(low_half(z) * ca, high_half(z) * cb);
                __half2 sine = __floats2half2_rn(low_half(z) * sa, high_half(z) * sb);
                to[0] = *reinterpret_cast<uint32_t *>(&cosine);
                to[E / 2] = *reinterpret_cast<uint32_t *>(&sine);
            };
            if (q)
                put(at(q, row + i), x[i]);
            put(at(k, row + i), y[i]);
            a.next();
            b.next();
        }
    }
}

template <int E, bool LRPE, int DVT>
__global__ void __launch_bounds__(kThreads)
    lightning_kernel(const __grid_constant__ lightning_params p, int item0)
{
    using S = shape<E, LRPE, DVT>;
    constexpr int kD = S::kD, kN = S::kN, kLdKey = S::kLdKey, kLdValue = S::kLdValue;
    constexpr float kUnit = LRPE ? kTurnScale : 1.0f; /* q and k are in units of this */
    extern __shared__ __align__(16) char shared[];
    __nv_bfloat16 *q = reinterpret_cast<__nv_bfloat16 *>(shared), *k = q + kChunk * kLdKey;
    __nv_bfloat16 *v = k + kChunk * kLdKey, *state = v + kChunk * kLdValue;
    float *power = reinterpret_cast<float *>(state + kD * kLdValue); /* exp(-s i), i = 0 .. 64 */

    const lightning_item it = lightning_decode(p, item0 + blockIdx.x, S::kTiles);
    const bool fused = it.fused < it.chunk1; /* all of it, or nothing: no sequence is warm here */
    const lightning_seq &seq = p.seq[it.seq];
    float slope = p.slopes[it.head];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t2 = 2 * (lane & 3);
    for (int i = threadIdx.x; i <= kChunk; i += kThreads)
        power[i] = static_cast<float>(exp(-static_cast<double>(slope) * i));

    /* s[b][n]: rows 16 (warp + 4 b) + g (+ 8), columns 8 n + t2 (+ 1) */
    float s[S::kBlocks][kN][4] = {};
    int64_t own =
        static_cast<int64_t>(it.head) * kD * E + it.tile * DVT; /* of this tile in a layer's state */
    auto accumulate = [&](const float *from, float e) {
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
            if (warp + 4 * b < kD / 16)
#pragma unroll
                for (int n = 0; n < kN; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float2 x = __ldcg(reinterpret_cast<const float2 *>(
                            from + (16 * (warp + 4 * b) + g + 8 * i) * E + 8 * n + t2));
                        s[b][n][2 * i] += fmaf(-e, s[b][n][2 * i], x.x);
                        s[b][n][2 * i + 1] += fmaf(-e, s[b][n][2 * i + 1], x.y);
                    }
    };
    int64_t part_size = static_cast<int64_t>(p.n_heads) * kD * E;
    float *parts = p.parts + seq.part * part_size + own;
    if (it.seg == 0)
        accumulate(seq.state + own, 0.0f);
    else if (fused)
        for (int seg = 0; seg < it.seg; ++seg)
            accumulate(parts + seg * part_size, loss(slope, static_cast<int64_t>(seq.seg_len) * kChunk));

    int64_t row0 = seq.first, pos = seq.pos + (LRPE && p.steps ? *p.steps : 0);
    const __nv_bfloat16 *q_from = p.q + it.head * E, *k_from = p.k + it.head * E;
    const __nv_bfloat16 *v_from = p.v + it.head * E + it.tile * DVT;
    float e = loss(slope, kChunk);
    for (int c = it.chunk0; c < it.chunk1; ++c) {
        int m = min(kChunk, seq.count - c * kChunk);
        int64_t row = row0 + static_cast<int64_t>(c) * kChunk;
        __syncthreads(); /* all are done with the last chunk's tiles */
        if (fused) {
            load_tile<E>(q, kLdKey, q_from + row * p.ld, p.ld, m);
#pragma unroll
            for (int b = 0; b < S::kBlocks; ++b)
                if (warp + 4 * b < kD / 16)
#pragma unroll
                    for (int n = 0; n < kN; ++n)
#pragma unroll
                        for (int i = 0; i < 2; ++i)
                            *reinterpret_cast<uint32_t *>(
                                state + (16 * (warp + 4 * b) + g + 8 * i) * kLdValue + 8 * n + t2) =
                                pack_bf16(s[b][n][2 * i], s[b][n][2 * i + 1]);
        }
        load_tile<E>(k, kLdKey, k_from + row * p.ld, p.ld, m);
        load_tile<DVT>(v, kLdValue, v_from + row * p.ld, p.ld, m);
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
        if (LRPE) {
            rotate<E>(fused ? q : nullptr, k, kLdKey, p.theta + it.head * E,
                      pos + static_cast<int64_t>(c) * kChunk);
            __syncthreads();
        }

        if (fused) {
            /* scores of the warp's 16 rows; warp w sees columns 0 .. 16 w + 15 */
            float score[8][4] = {}, out[kN][4] = {};
#pragma unroll 4
            for (int kk = 0; kk < kD / 16; ++kk) {
                uint32_t a[4];
                ldmatrix(a,
                         shared_address(q + (16 * warp + (lane & 15)) * kLdKey + 16 * kk + 8 * (lane >> 4)));
#pragma unroll
                for (int n = 0; n < 8; n += 2)
                    if (n <= 2 * warp) {
                        uint32_t b[4];
                        ldmatrix(b, shared_address(k + (8 * n + (lane & 7) + 8 * (lane >> 4)) * kLdKey +
                                                   16 * kk + 8 * ((lane >> 3) & 1)));
                        (LRPE ? mma_f16 : mma)(score[n], a, b[0], b[1]);
                        (LRPE ? mma_f16 : mma)(score[n + 1], a, b[2], b[3]);
                    }
                if (LRPE) {
                    uint32_t hi[4], lo[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float2 x = unpack<true>(a[i]);
                        split(hi[i], lo[i], x.x, x.y);
                    }
                    mma_row(out, hi, lo, state + 16 * kk * kLdValue, kLdValue);
                } else {
                    mma_row(out, a, state + 16 * kk * kLdValue, kLdValue);
                }
            }
            int r = 16 * warp + g;
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    out[n][i] *= kUnit * power[r + 1 + 8 * (i >> 1)];
#pragma unroll
            for (int kk = 0; kk < 4; ++kk)
                if (kk <= warp) {
                    uint32_t a[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) { /* rows r, r + 8 of columns 16 kk + t2, then of + 8 */
                        int back = r + 8 * (i & 1) - (16 * kk + 8 * (i >> 1) + t2);
                        const float *x = score[2 * kk + (i >> 1)] + 2 * (i & 1);
                        a[i] = pack_bf16(back >= 0 ? x[0] * (kUnit * kUnit * power[max(back, 0)]) : 0.0f,
                                         back >= 1 ? x[1] * (kUnit * kUnit * power[max(back - 1, 0)]) : 0.0f);
                    }
                    mma_row(out, a, v + 16 * kk * kLdValue, kLdValue);
                }
            __nv_bfloat16 *to = p.o + (row + r) * p.n_heads * E + it.head * E + it.tile * DVT + t2;
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (r + 8 * i < m)
#pragma unroll
                    for (int n = 0; n < kN; ++n)
                        *reinterpret_cast<uint32_t *>(to + static_cast<int64_t>(8 * i) * p.n_heads * E +
                                                      8 * n) = pack_bf16(out[n][2 * i], out[n][2 * i + 1]);
        }

        if (m < kChunk)
            e = loss(slope, m);
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
            if (warp + 4 * b < kD / 16) {
                float kv[kN][4] = {};
#pragma unroll
                for (int kk = 0; kk < 4; ++kk) {
                    uint32_t x[4], hi[4], lo[4];
                    ldmatrix_trans(x, shared_address(k + (16 * kk + (lane & 7) + 8 * (lane >> 4)) * kLdKey +
                                                     16 * (warp + 4 * b) + 8 * ((lane >> 3) & 1)));
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        int back = m - 1 - (16 * kk + 8 * (i >> 1) + t2); /* rows past m hold zeros */
                        float2 key = unpack<LRPE>(x[i]);
                        split(hi[i], lo[i], key.x * (kUnit * power[max(back, 0)]),
                              key.y * (kUnit * power[max(back - 1, 0)]));
                    }
                    mma_row(kv, hi, lo, v + 16 * kk * kLdValue, kLdValue);
                }
#pragma unroll
                for (int n = 0; n < kN; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        s[b][n][i] += fmaf(-e, s[b][n][i], kv[n][i]);
            }
    }

    if (it.seg > 0 && fused && it.seg < seq.n_seg - 1)
        return; /* phase 1 left this segment's own state where its readers find it */
    float *to = it.seg == seq.n_seg - 1 ? seq.state + own : parts + it.seg * part_size;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b)
        if (warp + 4 * b < kD / 16)
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    *reinterpret_cast<float2 *>(to + (16 * (warp + 4 * b) + g + 8 * i) * E + 8 * n + t2) =
                        make_float2(s[b][n][2 * i], s[b][n][2 * i + 1]);
}

/* The instantiation for a shape: its kernel, value tiles and shared memory. */
struct variant {
    void (*kernel)(const lightning_params, int);
    int tiles, bytes;
};

/* Heads below 64 come with LRPE only: their states are as large as those of one twice as wide. */
template <int E> variant pick_small(bool lrpe)
{
    if (!lrpe)
        return {nullptr, 0, 0};
    return {lightning_kernel<E, true, E>, 1, shape<E, true, E>::kBytes};
}

template <int E, int DVT, int DVT_LRPE> variant pick(bool lrpe)
{
    if (lrpe)
        return {lightning_kernel<E, true, DVT_LRPE>, E / DVT_LRPE, shape<E, true, DVT_LRPE>::kBytes};
    return {lightning_kernel<E, false, DVT>, E / DVT, shape<E, false, DVT>::kBytes};
}

/* Tiles such that the state takes at most 128 registers of a thread, where narrower ones measured slower. */
variant find(int32_t e, bool lrpe)
{
    switch (e) {
    case 32:
        return pick_small<32>(lrpe);
    case 40:
        return pick_small<40>(lrpe);
    case 48:
        return pick_small<48>(lrpe);
    case 64:
        return pick<64, 64, 64>(lrpe);
    case 80:
        return pick<80, 40, 40>(lrpe);
    case 96:
        return pick<96, 48, 48>(lrpe);
    case 128:
        return pick<128, 64, 64>(lrpe);
    case 160:
        return pick<160, 40, 32>(lrpe);
    case 192:
        return pick<192, 48, 24>(lrpe);
    case 256:
        return pick<256, 32, 16>(lrpe);
    default:
        return {nullptr, 0, 0};
    }
}

/* Walkers of a sequence, or minus the segments of one that is walked warm. `tiles`: 64-column value tiles of
 * all heads and sequences. Blocks of the Hopper kernel have an SM each, two of the portable one share it: 128
 * or 256 items fill a large GPU, and each further walker adds to what is read twice. Up to which length warm
 * segments are the faster was measured (LIGHTNING.md). */
int choose_walkers(int64_t tiles, int n_chunks, bool hopper)
{
    int64_t w = (hopper ? 128 : 256) / tiles;
    if (w > 16)
        w = 16;
    if (w < 2)
        return 1;
    if (hopper && n_chunks <= (w >= 8 ? 9 : w >= 4 ? 16 : 64))
        return w < kMaxWarm ? -static_cast<int>(w) : -kMaxWarm;
    if (w < 4 && n_chunks < 24) /* two phases cost more than half the chunks */
        return 1;
    return static_cast<int>(w);
}

void plan_sequence(struct lightning_seq *s, const struct ltn_seq *seq, size_t state_offset)
{
    s->state = seq->state + state_offset;
    s->pos = seq->pos;
    s->first = seq->first;
    s->count = seq->count;
    s->n_chunks = static_cast<int32_t>((static_cast<int64_t>(seq->count) + kChunk - 1) / kChunk);
}

void split_sequence(struct lightning_seq *s, int walkers)
{
    int n = s->n_chunks, w = walkers < n / 2 ? walkers : n / 2;
    s->warm = 0;
    if (w < 2) {
        s->n_seg = 1;
        s->first_len = n;
        s->seg_len = 0;
        return;
    }
    /* Segment 0 does twice the work of its phase's others, so it is half as long; the last takes the rest. */
    s->n_seg = w + 1;
    s->seg_len = (2 * n + 2 * w) / (2 * w + 1);
    s->first_len = (s->seg_len + 1) / 2;
    while (s->first_len + (w - 1) * s->seg_len >= n)
        s->first_len > 1 ? --s->first_len : --s->seg_len;
}

/* Segments of about equal cost, where a chunk without outputs costs 0.7 of one with. */
void split_warm(struct lightning_seq *s, int segments)
{
    static const int permille[kMaxWarm + 1][kMaxWarm - 1] = {{}, {}, {720}, {700, 920}, {690, 900, 970}};
    int n = segments < kMaxWarm ? segments : kMaxWarm;
    while (n > 1 && s->n_chunks < 2 * n)
        --n;
    s->n_seg = n;
    s->warm = n > 1 ? n : 0;
    s->first_len = s->n_chunks; /* of the only one, if n == 1 */
    s->seg_len = 0;
    for (int i = 0; i + 1 < n; ++i) {
        int64_t cut = (static_cast<int64_t>(s->n_chunks) * permille[n][i] + 500) / 1000;
        int least = i ? s->cut[i - 1] + 1 : 1, most = s->n_chunks - (n - 1 - i);
        s->cut[i] = static_cast<int32_t>(cut < least ? least : cut > most ? most : cut);
    }
}

bool aligned(const void *p)
{
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

bool on_hopper(const struct ltn_lightning_call *call, int device)
{
    const bool lrpe = call->a->theta != nullptr;
    return !call->portable && (!lrpe || (call->turned && aligned(call->turned))) &&
           ltn_lightning_hopper_supports(call->a->head_dim, lrpe, device);
}

} // namespace

bool ltn_lightning_supports(const struct ltn_lightning_call *call)
{
    int device = 0, bytes = 0;
    variant v = find(call->a->head_dim, call->a->theta != nullptr);
    return v.kernel && call->ld % 8 == 0 && aligned(call->q) && aligned(call->k) && aligned(call->v) &&
           aligned(call->o) && cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
           (!call->gate ||
            (call->ld_gate % 8 == 0 && aligned(call->gate) && call->squares && on_hopper(call, device))) &&
           v.bytes <= bytes && call->workspace && aligned(call->workspace) &&
           call->workspace_bytes >=
               ltn_lightning_workspace(call->a->n_heads, call->a->head_dim, call->a->theta != nullptr);
}

size_t ltn_lightning_workspace(int32_t n_heads, int32_t head_dim, bool lrpe)
{
    size_t state = sizeof(float) * head_dim * head_dim * (lrpe ? 2 : 1);
    return kMaxFlags * sizeof(unsigned) + (n_heads <= kMaxStates / 2 ? kMaxStates * state : 0);
}

size_t ltn_lightning_turned(int64_t rows, int32_t n_heads, int32_t head_dim)
{
    int device = 0;
    return cudaGetDevice(&device) == cudaSuccess && ltn_lightning_hopper_supports(head_dim, true, device)
               ? sizeof(__nv_bfloat16) * 2 * 2 * rows * n_heads * head_dim
               : 0;
}

cudaError_t ltn_lightning_prefill(cudaStream_t stream, const struct ltn_lightning_call *call)
{
    const struct ltn_attention *a = call->a;
    int device = 0;
    cudaError_t err = cudaGetDevice(&device);
    if (err != cudaSuccess)
        return err;
    const bool hopper = on_hopper(call, device);
    variant v = find(a->head_dim, a->theta != nullptr);

    struct lightning_params p;
    p.o = static_cast<__nv_bfloat16 *>(call->o);
    p.q = static_cast<const __nv_bfloat16 *>(call->q);
    p.k = static_cast<const __nv_bfloat16 *>(call->k);
    p.v = static_cast<const __nv_bfloat16 *>(call->v);
    p.slopes = a->slopes;
    p.theta = a->theta;
    p.steps = call->steps;
    p.flags = static_cast<unsigned *>(call->workspace);
    p.parts = reinterpret_cast<float *>(p.flags + kMaxFlags);
    p.gate = static_cast<const __nv_bfloat16 *>(call->gate);
    p.squares = call->squares;
    p.turned = static_cast<__nv_bfloat16 *>(call->turned);
    p.rows = static_cast<int64_t>(call->seqs[call->n_seqs - 1].first) + call->seqs[call->n_seqs - 1].count;
    p.ld_gate = call->ld_gate;
    p.ld = call->ld;
    p.n_heads = a->n_heads;
    int64_t tiles = static_cast<int64_t>(a->n_heads) * call->n_seqs * ((a->head_dim + 63) / 64);

    for (int32_t done = 0; done < call->n_seqs; done += p.n_seqs) {
        p.n_seqs = call->n_seqs - done < kMaxSeqs ? call->n_seqs - done : kMaxSeqs;
        const int most = kMaxStates / (p.n_seqs * a->n_heads); /* that the workspace holds the states of */
        int32_t n1 = 0, n2 = 0, parts = 0;
        for (int32_t i = 0; i < p.n_seqs; ++i) {
            struct lightning_seq *s = &p.seq[i];
            plan_sequence(s, &call->seqs[done + i], a->state_offset);
            int w = call->walkers ? call->walkers : choose_walkers(tiles, s->n_chunks, hopper);
            if (w < 0 && hopper && most > 0)
                split_warm(s, -w);
            else
                split_sequence(s, w < most ? w : most);
            const bool phases = s->n_seg > 1 && !s->warm;
            s->item1 = n1;
            s->item2 = n2;
            s->part = parts;
            n1 += phases ? s->n_seg - 1 : s->n_seg;
            n2 += phases ? s->n_seg - 1 : 0;
            parts += s->warm ? 1 : s->n_seg - 1;
        }
        for (int32_t i = 0; i < p.n_seqs; ++i)
            p.seq[i].item2 += n1;
        p.items1 = n1;
        p.items = n1 + n2;
        if (hopper) {
            if (p.theta)
                err = lightning_turn(stream, p, a->head_dim);
            if (err == cudaSuccess)
                err = ltn_lightning_hopper(stream, p, a->head_dim, device);
        } else {
            err = cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.bytes);
            if (err == cudaSuccess)
                v.kernel<<<n1 * a->n_heads * v.tiles, kThreads, v.bytes, stream>>>(p, 0);
            if (err == cudaSuccess && n2 > 0)
                v.kernel<<<n2 * a->n_heads * v.tiles, kThreads, v.bytes, stream>>>(p,
                                                                                   n1 * a->n_heads * v.tiles);
            if (err == cudaSuccess)
                err = cudaGetLastError();
        }
        if (err != cudaSuccess)
            return err;
    }
    return cudaSuccess;
}
