/* Lightning attention of many rows a sequence, block by block (Lightning Attention-2, arXiv 2401.04658,
 * Algorithm 1), in f32 arithmetic, for any head size and element type.
 *
 * A block of threads owns COLS columns of one head's state and walks its sequence in chunks of m <= CHUNK
 * rows. With row i of the chunk counted from 0:
 *     P   = (Q K^T) masked, times r^(i - j)                    inside the chunk
 *     O   = P V + r^(i + 1) Q S                                what came before it
 *     S  += sum_j r^(m - 1 - j) k_j^T v_j - (1 - r^m) S
 * Every exponent is a difference of positions. The key width d is walked in slabs, so that it may be
 * anything.
 */
#include "kernels/cuda/cuda.cuh"

enum {
    THREADS = 256,
    CHUNK = 64,
    COLS = 32,
    SLAB = 32,
    PITCH = CHUNK + 4, /* of a transposed slab and of P, in floats: shifts rows to other banks */
};

struct tiles {
    float q[SLAB][PITCH]; /* transposed: key feature, row */
    float k[SLAB][PITCH];
    float s[SLAB][COLS];
    float v[CHUNK][COLS];
    float faded_v[CHUNK][COLS]; /* r^(m - 1 - j) v_j */
    float p[CHUNK][PITCH];
    float power[CHUNK + 1]; /* r^i */
};

/* One slab of q or k, rotated where theta is set; beyond rows m and features d it is zero. */
template <typename A>
static __device__ void load_slab(float (*slab)[PITCH], const A *x, int64_t ld, int32_t m, int32_t from,
                                 int32_t e, int32_t d, const float *theta, int64_t pos)
{
    for (int i = threadIdx.x; i < SLAB * CHUNK; i += THREADS) {
        const int f = i % SLAB, row = i / SLAB;
        const int32_t feature = from + f, c = feature < e ? feature : feature - e;
        float value = 0;
        if (row < m && feature < d) {
            value = load_fresh(x + row * ld + c);
            if (theta)
                value *= lrpe_turn(theta[c], (double)(pos + row), feature >= e);
        }
        slab[f][row] = value;
    }
}

template <typename A>
static __global__ void __launch_bounds__(THREADS)
    prefill_kernel(A *o, const A *q, const A *k, const A *v, int64_t ld, const struct ltn_attention a,
                   const __grid_constant__ struct seq_table seqs)
{
    extern __shared__ float4 shared[];
    struct tiles &t = *reinterpret_cast<struct tiles *>(shared);
    const int32_t e = a.head_dim, d = a.theta ? 2 * e : e, head = blockIdx.y;
    const int32_t first = blockIdx.x * COLS, n_cols = min((int32_t)COLS, e - first);
    const struct ltn_seq &seq = seqs.seq[blockIdx.z];
    const double slope = a.slopes[head];
    const float *theta = a.theta ? a.theta + head * e : NULL;
    float *S = seq.state + a.state_offset + (int64_t)head * d * e + first;

    /* Who computes what: P in 4 x 4 pieces, O in pieces of 2 rows x 4 columns, S of 1 x 4. */
    const int pr = threadIdx.x / 16 * 4, pc = threadIdx.x % 16 * 4;
    const int orow = threadIdx.x / 8 * 2, oc = threadIdx.x % 8 * 4;
    const int srow = threadIdx.x / 8;

    let_next_start();
    if (threadIdx.x <= CHUNK)
        t.power[threadIdx.x] = (float)exp(-slope * threadIdx.x);
    wait_for_previous();
    const int64_t start = seq.pos + (seqs.steps ? __ldcg(seqs.steps) : 0);
    __syncthreads();

    for (int32_t done = 0; done < seq.count; done += CHUNK) {
        const int32_t m = min((int32_t)CHUNK, seq.count - done);
        const int64_t row0 = (int64_t)seq.first + done, at = row0 * ld + head * e;
        const float fade = (float)-expm1(-slope * m); /* 1 - r^m */
        float p[4][4] = {}, out[2][4] = {};

        for (int i = threadIdx.x; i < CHUNK * COLS; i += THREADS) {
            const int row = i / COLS, c = i % COLS;
            const bool in = row < m && c < n_cols;
            const float value = in ? load_fresh(v + at + row * ld + first + c) : 0;
            t.v[row][c] = value;
            t.faded_v[row][c] = in ? t.power[m - 1 - row] * value : 0;
        }
        for (int32_t from = 0; from < d; from += SLAB) {
            load_slab(t.q, q + at, ld, m, from, e, d, theta, start + done);
            load_slab(t.k, k + at, ld, m, from, e, d, theta, start + done);
            for (int i = threadIdx.x; i < SLAB * COLS; i += THREADS) {
                const int row = i / COLS, c = i % COLS;
                t.s[row][c] = from + row < d && c < n_cols ? __ldcg(S + (int64_t)(from + row) * e + c) : 0;
            }
            __syncthreads();
            for (int f = 0; f < SLAB; f++) {
                const float4 qs = *reinterpret_cast<const float4 *>(&t.q[f][pr]);
                const float4 ks = *reinterpret_cast<const float4 *>(&t.k[f][pc]);
                const float qa[4] = {qs.x, qs.y, qs.z, qs.w}, ka[4] = {ks.x, ks.y, ks.z, ks.w};
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++)
                        p[i][j] += qa[i] * ka[j];
                const float4 ss = *reinterpret_cast<const float4 *>(&t.s[f][oc]);
                const float sa[4] = {ss.x, ss.y, ss.z, ss.w};
                for (int i = 0; i < 2; i++)
                    for (int j = 0; j < 4; j++)
                        out[i][j] += t.q[f][orow + i] * sa[j];
            }
            float kv[4] = {};
            for (int row = 0; row < m; row++) {
                const float4 vs = *reinterpret_cast<const float4 *>(&t.faded_v[row][oc]);
                const float key = t.k[srow][row];
                kv[0] += key * vs.x, kv[1] += key * vs.y, kv[2] += key * vs.z, kv[3] += key * vs.w;
            }
            for (int j = 0; j < 4; j++) {
                const float s = t.s[srow][oc + j];
                if (from + srow < d && oc + j < n_cols)
                    __stcg(S + (int64_t)(from + srow) * e + oc + j, s + (kv[j] - fade * s));
            }
            __syncthreads();
        }
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) {
                const int row = pr + i, col = pc + j;
                t.p[row][col] = col <= row ? p[i][j] * t.power[row - col] : 0;
            }
        __syncthreads();
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 4; j++)
                out[i][j] *= t.power[orow + i + 1];
        for (int col = 0; col < m; col++) {
            const float4 vs = *reinterpret_cast<const float4 *>(&t.v[col][oc]);
            for (int i = 0; i < 2; i++) {
                const float w = t.p[orow + i][col];
                out[i][0] += w * vs.x, out[i][1] += w * vs.y, out[i][2] += w * vs.z, out[i][3] += w * vs.w;
            }
        }
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 4; j++)
                if (orow + i < m && oc + j < n_cols)
                    o[((row0 + orow + i) * a.n_heads + head) * e + first + oc + j] = from_f32<A>(out[i][j]);
        __syncthreads();
    }
}

template <typename A>
static enum ltn_status prefill(struct cuda_backend *be, void *o, const void *q, const void *k, const void *v,
                               int32_t ld, const struct ltn_attention *a, const struct seq_table *seqs,
                               int32_t n_seqs, struct ltn_error *err)
{
    const dim3 grid((a->head_dim + COLS - 1) / COLS, a->n_heads, n_seqs);
    CUDA_TRY(be, err,
             cudaFuncSetAttribute(prefill_kernel<A>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  sizeof(struct tiles)));
    LAUNCH(be, err, prefill_kernel<A>, grid, dim3(THREADS), sizeof(struct tiles), (A *)o, (const A *)q,
           (const A *)k, (const A *)v, (int64_t)ld, *a, *seqs);
    return LTN_OK;
}

enum ltn_status lightning_prefill(struct cuda_backend *be, void *o, const void *q, const void *k,
                                  const void *v, int32_t ld, const struct ltn_attention *a,
                                  const struct seq_table *seqs, int32_t n_seqs, struct ltn_error *err)
{
    return be->base.act_dtype == LTN_F32 ? prefill<float>(be, o, q, k, v, ld, a, seqs, n_seqs, err)
                                         : prefill<__nv_bfloat16>(be, o, q, k, v, ld, a, seqs, n_seqs, err);
}
