/* How a call is cut into work items, shared by the portable and the Hopper kernel.
 *
 * A sequence of n 64-row chunks is cut into W + 1 segments (W "walkers"), or left whole (W = 1):
 *
 *   segment            0            1 .. W-1               W
 *   phase 1       outputs, state    local state only       -
 *   phase 2            -            outputs                outputs, final state
 *
 * Decay is one factor per head, so a segment's start state is the decayed sum of the states before it: the
 * first segment needs nothing, the last is needed by nobody. Segments 1 .. W-1 read k and v twice.
 *
 * A short one is cut into fewer segments, of which each brings itself to its start: it walks the state over
 * all chunks before it, without their outputs ("warm"). That takes about half as long per chunk as outputs
 * do, and nobody waits for anybody, but that the last must not overwrite the start state while others read
 * it. All sizes come from n, the heads and the number of sequences, never from the device: same bits
 * everywhere.
 */
#ifndef LTN_LIGHTNING_PLAN_CUH
#define LTN_LIGHTNING_PLAN_CUH

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/lightning_mma.h"

#include <cuda_bf16.h>

constexpr int kChunk = 64;                /* rows per chunk */
constexpr int kMaxSeqs = 32;              /* sequences per launch */
constexpr int kMaxWarm = 4;               /* segments of a sequence that is walked warm */
constexpr int kMaxStates = 128;           /* segment states in the workspace */
constexpr int kMaxFlags = 2 * kMaxStates; /* one per segment state and value tile of the Hopper kernel */

struct lightning_seq {
    float *state; /* this layer's [n_heads, d, e] */
    int64_t pos;
    int32_t first, count;
    int32_t n_chunks;
    int32_t n_seg;
    int32_t first_len;         /* chunks of segment 0 */
    int32_t seg_len;           /* chunks of segments 1 .. n_seg-2; the last has the rest */
    int32_t item1;             /* its first segment in phase 1 */
    int32_t item2;             /* and in phase 2, counted on from phase 1's end */
    int32_t part;              /* its first segment state in the workspace, in units of n_heads */
    int32_t warm;              /* segments that walk from the first chunk on: n_seg; 0: those of two phases */
    int32_t cut[kMaxWarm - 1]; /* where segments 1 .. warm-1 begin */
};

struct lightning_params {
    __nv_bfloat16 *o;
    const __nv_bfloat16 *q, *k, *v;
    const float *slopes;  /* [n_heads] */
    const float *theta;   /* [n_heads, e] or NULL */
    const int64_t *steps; /* added to every position; or NULL */
    const __nv_bfloat16 *gate;
    float *squares;
    __nv_bfloat16 *turned; /* q, then k, each [rows, n_heads, 2 e], as lightning_turn leaves them */
    int64_t rows;          /* of all sequences, of this launch or not */
    int64_t ld_gate;
    float *parts;    /* [segment, head][d * e] */
    unsigned *flags; /* [segment, head, tile]: how many readers still wait; 0 between calls */
    int64_t ld;
    int32_t n_heads;
    int32_t n_seqs;
    int32_t items1; /* segments of phase 1 */
    int32_t items;  /* segments of both phases */
    struct lightning_seq seq[kMaxSeqs];
};

/* One segment of one head's value tile: the state over chunks [chunk0, chunk1), outputs from `fused` on. */
struct lightning_item {
    int32_t seq, seg, head, tile;
    int32_t chunk0, fused, chunk1;
};

__device__ __forceinline__ int lightning_segment_start(const lightning_seq &s, int seg)
{
    if (seg == 0 || seg == s.n_seg)
        return seg == 0 ? 0 : s.n_chunks;
    return s.warm ? s.cut[seg - 1] : s.first_len + (seg - 1) * s.seg_len;
}

__device__ __forceinline__ lightning_item lightning_decode(const lightning_params &p, int index, int n_tiles)
{
    lightning_item it;
    int per_seg = p.n_heads * n_tiles;
    int item = index / per_seg, rest = index - item * per_seg;
    bool phase2 = item >= p.items1;
    it.head = rest / n_tiles;
    it.tile = rest - it.head * n_tiles;
    it.seq = 0;
    while (it.seq + 1 < p.n_seqs && (phase2 ? p.seq[it.seq + 1].item2 : p.seq[it.seq + 1].item1) <= item)
        ++it.seq;
    const lightning_seq &s = p.seq[it.seq];
    it.seg = phase2 ? 1 + item - s.item2 : item - s.item1;
    int start = lightning_segment_start(s, it.seg);
    it.chunk0 = s.warm ? 0 : start;
    it.chunk1 = lightning_segment_start(s, it.seg + 1);
    it.fused = phase2 || it.seg == 0 || s.warm ? start : it.chunk1;
    return it;
}

__device__ __forceinline__ float low_half(uint32_t x)
{
    return __uint_as_float(x << 16);
}

__device__ __forceinline__ float high_half(uint32_t x)
{
    return __uint_as_float(x & 0xFFFF0000u);
}

/* 1 - exp(-s rows), the share of a state that is lost over so many rows; from f64, as exp(-s) may round to 1.
 */
__device__ __forceinline__ float loss(float slope, int64_t rows)
{
    return static_cast<float>(-expm1(-static_cast<double>(slope) * static_cast<double>(rows)));
}

/* q and k, once turned by LRPE, are kept as f16 times 1 / kTurnScale: its 11 bits cost a state 2e-4, where
 * bf16's 8 would cost 1.6e-3. The scale moves its range to 1e6, beyond what a row of weights can make of a
 * normalised input; below 1e-3 elements lose bits that no sum misses. */
constexpr float kTurnScale = 16.0f;

/* cos and sin of an angle that steps from row to row: reduced in f64 once, then turned in f32. */
struct turning {
    float c, s, dc, ds;
    __device__ turning(float theta, int64_t pos)
    {
        double step = theta * 0.15915494309189535; /* in turns */
        double turn = static_cast<double>(pos) * step;
        sincospif(2.0f * static_cast<float>(turn - rint(turn)), &s, &c);
        sincospif(2.0f * static_cast<float>(step - rint(step)), &ds, &dc);
    }
    __device__ void next()
    {
        float x = c * dc - s * ds;
        s = s * dc + c * ds;
        c = x;
    }
};

/* The Hopper kernel (lightning_hopper.cu): e = 128, or 64 without LRPE. */
bool ltn_lightning_hopper_supports(int32_t head_dim, bool lrpe, int device);
cudaError_t ltn_lightning_hopper(cudaStream_t stream, const lightning_params &p, int32_t head_dim,
                                 int device);

/* p.turned <- q and k, [x cos(theta p), x sin(theta p)] / kTurnScale in f16; e a multiple of 64 */
cudaError_t lightning_turn(cudaStream_t stream, const lightning_params &p, int32_t head_dim);

#endif
