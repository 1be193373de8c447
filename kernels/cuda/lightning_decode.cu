/* Lightning attention of one token per sequence: S <- S + k^T v - (1 - r) S, o = q S, in f32.
 *
 * The columns of a head's state are independent, so a block takes COLS of them with all their rows: FEW
 * where there are few heads in all, so that many blocks share the work; MANY where heads are enough, so that
 * a block's state lies in one piece of memory. Each thread holds WIDE columns of one row at a time; the rows'
 * products are then summed through shared memory in a fixed order. */
#include "kernels/cuda/cuda.cuh"

enum {
    THREADS = 256,
    IN_FLIGHT = 4,
    FEW = 32,
    MANY = 128,
    ENOUGH_HEADS = 256, /* over all sequences */
};

/* Fills the rotated q, k [d] and v [COLS] of one head; one call per block, followed by a barrier. */
template <typename A>
static __device__ void load_token(float *sq, float *sk, float *sv, const A *q, const A *k, const A *v,
                                  const float *theta, double pos, int32_t e, int32_t d, int32_t n_cols)
{
    for (int32_t i = threadIdx.x; i < d; i += THREADS) {
        const int32_t c = i < e ? i : i - e;
        const float turn = theta ? lrpe_turn(theta[c], pos, i >= e) : 1;
        sq[i] = load_fresh(q + c) * turn;
        sk[i] = load_fresh(k + c) * turn;
    }
    for (int32_t i = threadIdx.x; i < n_cols; i += THREADS)
        sv[i] = load_fresh(v + i);
}

template <int WIDE> struct columns {
    float v[WIDE];
};

template <int WIDE> static __device__ __forceinline__ struct columns<WIDE> load_columns(const float *p) {
    struct columns<WIDE> c;
    if (WIDE == 4) {
        float4 f = __ldcg(reinterpret_cast<const float4 *>(p));
        c.v[0] = f.x, c.v[1 % WIDE] = f.y, c.v[2 % WIDE] = f.z, c.v[3 % WIDE] = f.w;
    } else {
        c.v[0] = __ldcg(p);
    }
    return c;
}

template <int WIDE>
static __device__ __forceinline__ void store_columns(float *p, struct columns<WIDE> c)
{
    if (WIDE == 4)
        __stcg(reinterpret_cast<float4 *>(p),
               make_float4(c.v[0], c.v[1 % WIDE], c.v[2 % WIDE], c.v[3 % WIDE]));
    else
        __stcg(p, c.v[0]);
}

/* WIDE: 4 where head_dim is a multiple of 4, else 1. Block (column tile, head, sequence). Shared: q, k [d], v
 * [COLS], sums [THREADS * WIDE]. */
template <typename A, int WIDE, int COLS>
static __global__ void __launch_bounds__(THREADS)
    decode_kernel(A *o, const A *q, const A *k, const A *v, int64_t ld, const struct ltn_attention a,
                  const __grid_constant__ struct seq_table seqs)
{
    extern __shared__ float shared[];
    constexpr int ACROSS = COLS / WIDE, ROWS = THREADS / ACROSS; /* threads across the tile; rows at once */
    const int32_t e = a.head_dim, d = a.theta ? 2 * e : e, head = blockIdx.y;
    const int32_t first = blockIdx.x * COLS, n_cols = min(COLS, e - first);
    const int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS;
    const struct ltn_seq &seq = seqs.seq[blockIdx.z];
    float *sq = shared, *sk = sq + d, *sv = sk + d, *sums = sv + COLS;
    float *S = seq.state + a.state_offset + (int64_t)head * d * e + first + across * WIDE;
    const bool mine = across * WIDE < n_cols;

    let_next_start();
    const float fade = (float)-expm1(-(double)a.slopes[head]); /* 1 - r */
    /* Its state may still be in the making, but its place in the L2 cache is no secret. */
    const int32_t line = threadIdx.x % (COLS / 32) * 32, line_row = threadIdx.x / (COLS / 32);
    if (threadIdx.x < THREADS / 2 && line_row < d && line < n_cols)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(S - across * WIDE + (int64_t)line_row * e + line));
    wait_for_previous();

    struct columns<WIDE> s[IN_FLIGHT], sum = {
    };
    for (int i = 0; i < IN_FLIGHT; i++)
        if (mine && down + i * ROWS < d)
            s[i] = load_columns<WIDE>(S + (int64_t)(down + i * ROWS) * e);

    const int64_t at = (int64_t)seq.first * ld + head * e;
    const double pos = (double)(seq.pos + (seqs.steps ? __ldcg(seqs.steps) : 0));
    load_token(sq, sk, sv, q + at, k + at, v + at + first, a.theta ? a.theta + head * e : NULL, pos, e, d,
               n_cols);
    __syncthreads();

    for (int32_t base = down; mine && base < d; base += IN_FLIGHT * ROWS) {
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            const int32_t row = base + i * ROWS, next = row + IN_FLIGHT * ROWS;
            if (row >= d)
                break;
            struct columns<WIDE> now = s[i];
            if (next < d)
                s[i] = load_columns<WIDE>(S + (int64_t)next * e);
            for (int j = 0; j < WIDE; j++) {
                now.v[j] += sk[row] * sv[across * WIDE + j] - fade * now.v[j];
                sum.v[j] += sq[row] * now.v[j];
            }
            store_columns<WIDE>(S + (int64_t)row * e, now);
        }
    }
    for (int j = 0; j < WIDE; j++)
        sums[down * COLS + across * WIDE + j] = sum.v[j];
    __syncthreads();
    for (int32_t c = threadIdx.x; c < n_cols; c += THREADS) {
        float total = 0;
        for (int r = 0; r < ROWS; r++)
            total += sums[r * COLS + c];
        o[((int64_t)seq.first * a.n_heads + head) * e + first + c] = from_f32<A>(total);
    }
}

template <typename A, int WIDE, int COLS>
static enum ltn_status run(struct cuda_backend *be, void *o, const void *q, const void *k, const void *v,
                           int32_t ld, const struct ltn_attention *a, const struct seq_table *seqs,
                           int32_t n_seqs, struct ltn_error *err)
{
    const int32_t e = a->head_dim, d = a->theta ? 2 * e : e;
    const dim3 grid((e + COLS - 1) / COLS, a->n_heads, n_seqs);
    const size_t shared = (2 * (size_t)d + COLS + THREADS * WIDE) * sizeof(float);
    LAUNCH(be, err, (decode_kernel<A, WIDE, COLS>), grid, dim3(THREADS), shared, (A *)o, (const A *)q,
           (const A *)k, (const A *)v, (int64_t)ld, *a, *seqs);
    return LTN_OK;
}

template <typename A>
static enum ltn_status decode(struct cuda_backend *be, void *o, const void *q, const void *k, const void *v,
                              int32_t ld, const struct ltn_attention *a, const struct seq_table *seqs,
                              int32_t n_seqs, struct ltn_error *err)
{
    if (a->head_dim % 4)
        return run<A, 1, FEW>(be, o, q, k, v, ld, a, seqs, n_seqs, err);
    return a->head_dim > FEW && a->n_heads * n_seqs >= ENOUGH_HEADS
               ? run<A, 4, MANY>(be, o, q, k, v, ld, a, seqs, n_seqs, err)
               : run<A, 4, FEW>(be, o, q, k, v, ld, a, seqs, n_seqs, err);
}

enum ltn_status lightning_decode(struct cuda_backend *be, void *o, const void *q, const void *k,
                                 const void *v, int32_t ld, const struct ltn_attention *a,
                                 const struct seq_table *seqs, int32_t n_seqs, struct ltn_error *err)
{
    return be->base.act_dtype == LTN_F32 ? decode<float>(be, o, q, k, v, ld, a, seqs, n_seqs, err)
                                         : decode<__nv_bfloat16>(be, o, q, k, v, ld, a, seqs, n_seqs, err);
}
