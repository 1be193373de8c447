/* y = In(x) W^T + b for few rows: the kernel of decoding. It is bound by reading W once, so that everything
 * here serves loads in flight: each thread keeps DEPTH 16-byte pieces of W on their way into its own slots of
 * shared memory (cp.async: no registers, no barriers), the first of them while the previous kernel still
 * runs.
 *
 * A block takes a run of outputs; `split` warps share the columns of one output, a warp's lanes read
 * consecutive pieces. Which block and which warp computes an output changes nothing in its sum: the order of
 * the additions follows from the sizes alone.
 *
 * SimpleRMSNorm has no weights and so commutes with W: W Norm(x) = (W x) / rms(x). The sum of squares is
 * taken beside the product and divides its result. */
#include "kernels/cuda/dot.cuh"

enum {
    WARPS = 16,
    THREADS = 32 * WARPS,
    DEPTH = 12, /* leaves no room for two blocks on an SM: an SM with two would leave another with none */
    MAX_SUMS = 4096, /* partial results that a block may hold, floats */
};

/* Brings In(x) of all rows into shared memory, with SimpleRMSNorm not yet divided by the rms: the warps' sums
 * of squares are left in red [WARPS][R]. */
template <typename W, typename A, int R, bool WIDE>
static __device__ void stage_input(float *sx, float *red, float *scratch, const struct product &p)
{
    constexpr int STEP = WIDE ? 4 : 1;
    const int32_t cols = p.cols;

#pragma unroll
    for (int r = 0; r < R; r++) {
        float sum = 0;
        if (r < p.rows) {
            const float *xf = (const float *)p.x + (int64_t)r * cols;
            const A *xa = (const A *)p.x + (int64_t)r * cols;
            const A *gate = (const A *)p.gate + (int64_t)r * p.ld_gate;
            const bool gate_now = p.in == IN_GATED && !p.norm.weight;
            for (int32_t c = threadIdx.x * STEP; c < cols; c += THREADS * STEP) {
                float v[4];
                if (WIDE) {
                    float4 f = p.in == IN_NORM ? load_fresh4(xf + c) : load_fresh4(xa + c);
                    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
                    sum += f.x * f.x + f.y * f.y + f.z * f.z + f.w * f.w;
                    if (gate_now) {
                        f = load_fresh4(gate + c);
                        v[0] *= f.x, v[1] *= f.y, v[2] *= f.z, v[3] *= f.w;
                    }
                    *reinterpret_cast<float4 *>(sx + r * cols + stage_at<W, WIDE>(c, cols)) =
                        make_float4(v[0], v[1], v[2], v[3]);
                } else {
                    v[0] = p.in == IN_NORM ? load_fresh(xf + c) : load_fresh(xa + c);
                    sum += v[0] * v[0];
                    sx[r * cols + c] = gate_now ? v[0] * load_fresh(gate + c) : v[0];
                }
            }
        } else {
            for (int32_t c = threadIdx.x; c < cols; c += THREADS)
                sx[r * cols + c] = 0;
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0)
            red[threadIdx.x / 32 * R + r] = sum;
    }
    __syncthreads();
    if (p.in == IN_ACT || !p.norm.weight)
        return;
    /* LayerNorm: its weights do not commute, so the staged input becomes the whole of In(x). */
    for (int r = 0; r < p.rows; r++) {
        float *row = sx + r * cols, mean = 0, sum = 0;
        for (int32_t c = threadIdx.x; c < cols; c += THREADS)
            mean += row[c];
        mean = block_sum(mean, scratch) / cols;
        for (int32_t c = threadIdx.x; c < cols; c += THREADS)
            sum += (row[c] - mean) * (row[c] - mean);
        const float inverse = rsqrtf(block_sum(sum, scratch) / cols + 1e-5f);
        for (int32_t c = threadIdx.x; c < cols; c += THREADS) {
            float *at = row + stage_at<W, WIDE>(c, cols);
            float v = (*at - mean) * inverse * p.norm.weight[c] + p.norm.bias[c];
            if (p.in == IN_GATED)
                v *= load_fresh((const A *)p.gate + (int64_t)r * p.ld_gate + c);
            *at = v;
        }
        __syncthreads();
    }
}

/* Shared: x [R][cols], slots [DEPTH][THREADS] of 16 bytes, sums [outputs of the block][split][R], red
 * [WARPS][R], scratch [32]. */
template <typename W, typename A, int R, bool WIDE>
static __global__ void __launch_bounds__(THREADS, 2)
    gemv_kernel(const __grid_constant__ struct product p, int split, int max_sums)
{
    extern __shared__ uint4 shared[];
    constexpr int N = piece<W, WIDE>::N;
    const int32_t cols = p.cols, n_pieces = cols / N;
    uint4 *slots = shared + threadIdx.x;
    float *sx = reinterpret_cast<float *>(shared + (WIDE ? DEPTH * THREADS : 0));
    float *sums = sx + ((R * cols + 3) & ~3), *red = sums + max_sums, *scratch = red + WARPS * R;

    /* This block's outputs; with two matrices they alternate: w, w2, w, w2, ... */
    const int64_t first = (int64_t)p.outs * blockIdx.x / gridDim.x;
    const int32_t n_outs = (int32_t)((int64_t)p.outs * (blockIdx.x + 1) / gridDim.x - first);
    const int pair = p.w2 ? 2 : 1;
    const int32_t n_dots = n_outs * pair;

    /* This warp's part: dots group, group + groups, ..., pieces [from, to) of each, 32 at a time. */
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int part = warp % split, group = warp / split, groups = WARPS / split;
    const int32_t n_steps = (n_pieces + 31) / 32, per_part = (n_steps + split - 1) / split;
    const int32_t from = min(part * per_part, n_steps), to = min(from + per_part, n_steps);

    auto row_of = [&](int32_t i) {
        const W *base = (const W *)(pair == 2 && (i & 1) ? p.w2 : p.w);
        return base + (first + (pair == 2 ? i >> 1 : i)) * cols;
    };
    int32_t next_dot = from < to ? group : n_dots, next_step = from;
    const W *next_row = row_of(next_dot);
    auto fetch = [&](int slot) {
        const int32_t at = next_step * 32 + lane;
        if (next_dot < n_dots && at < n_pieces)
            copy_async(slots + slot * THREADS, next_row + at * N);
        end_copy_group();
        if (++next_step == to) {
            next_step = from;
            next_dot += groups;
            next_row = row_of(next_dot);
        }
    };

    let_next_start();
    if (WIDE) {
#pragma unroll
        for (int i = 0; i < DEPTH; i++)
            fetch(i);
    }
    wait_for_previous();
    /* The residual that the result is added to is on its way before it is needed. */
    float old = 0;
    if (p.out == OUT_ADD && (int32_t)threadIdx.x < n_outs)
        old = load_fresh((const float *)p.y + first + threadIdx.x);
    stage_input<W, A, R, WIDE>(sx, red, scratch, p);

    int slot = 0;
    for (int32_t i = from < to ? group : n_dots; i < n_dots; i += groups) {
        float acc[R] = {};
        for (int32_t step = from; step < to; step++) {
            const int32_t at = step * 32 + lane;
            if (WIDE)
                wait_copy_groups<DEPTH - 1>();
            if (at < n_pieces) {
                const uint4 w = WIDE ? slots[slot * THREADS] : make_uint4(0, 0, 0, 0);
                const float one = WIDE ? 0 : to_f32(row_of(i)[at]);
#pragma unroll
                for (int r = 0; r < R; r++)
                    acc[r] = WIDE ? dot_wide<W>(w, sx + r * cols, at, n_pieces, acc[r])
                                  : fmaf(one, sx[r * cols + at], acc[r]);
            }
            if (WIDE)
                fetch(slot);
            slot = slot == DEPTH - 1 ? 0 : slot + 1;
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float sum = warp_sum(acc[r]);
            if (lane == 0)
                sums[(i * split + part) * R + r] = sum;
        }
    }
    __syncthreads();

    const int parts = min(split, (n_steps + per_part - 1) / per_part); /* the others had no columns */
    for (int32_t i = threadIdx.x; i < n_outs * p.rows; i += THREADS) {
        const int32_t n = i % n_outs, r = i / n_outs;
        const int64_t out = first + n;
        float scale = 1;
        if (p.in != IN_ACT && !p.norm.weight) {
            float sum = 0;
            for (int w = 0; w < WARPS; w++)
                sum += red[w * R + r];
            scale = rsqrtf(sum / cols + 1e-6f);
        }
        float value = 0;
        for (int s = 0; s < parts; s++)
            value += sums[(n * pair * split + s) * R + r];
        value = value * scale + (p.bias ? p.bias[out] : 0);
        if (p.w2) {
            float second = 0;
            for (int s = 0; s < parts; s++)
                second += sums[((n * pair + 1) * split + s) * R + r];
            value *= second * scale + (p.bias2 ? p.bias2[out] : 0);
        }
        if (out < p.act_cols)
            value = activate(value, p.act);
        const int64_t to_y = (int64_t)r * p.outs + out;
        if (p.out == OUT_ACT)
            ((A *)p.y)[to_y] = from_f32<A>(value);
        else if (p.out == OUT_F32)
            ((float *)p.y)[to_y] = value;
        else
            ((float *)p.y)[to_y] = value + (i < THREADS && r == 0 ? old : load_fresh((float *)p.y + to_y));
    }
}

/* ---- host ------------------------------------------------------------------------------------------------
 */

template <typename W, typename A, int R, bool WIDE>
static enum ltn_status run(struct cuda_backend *be, const struct product *p, struct ltn_error *err)
{
    const int split = split_of(p->outs * (p->w2 ? 2 : 1)), per_out = split * (p->w2 ? 2 : 1) * R;
    const int32_t most = MAX_SUMS / per_out; /* outputs of one block */
    int32_t blocks = be->n_sms;
    if (blocks > p->outs)
        blocks = p->outs;
    if ((p->outs + blocks - 1) / blocks > most)
        blocks = (p->outs + most - 1) / most;
    const int32_t max_sums = ((p->outs + blocks - 1) / blocks * per_out + 3) & ~3;
    const size_t shared = (WIDE ? DEPTH * THREADS * 16 : 0) +
                          (((R * p->cols + 3) & ~3) + max_sums + WARPS * R + 32) * sizeof(float);
    LAUNCH(be, err, (gemv_kernel<W, A, R, WIDE>), dim3(blocks), dim3(THREADS), shared, *p, split, max_sums);
    return LTN_OK;
}

static bool is_wide(const struct product *p, enum ltn_dtype dtype)
{
    const int n = 16 / (int)ltn_dtype_size(dtype);
    return p->cols % n == 0 && aligned16(p->w) && aligned16(p->w2) && aligned16(p->x) &&
           (p->in != IN_GATED || (aligned16(p->gate) && p->ld_gate % 8 == 0));
}

enum ltn_status gemv(struct cuda_backend *be, const struct product *p, enum ltn_dtype dtype,
                     struct ltn_error *err)
{
    const bool wide = is_wide(p, dtype);
#define RUN(W, A)                                                                                            \
    (p->rows == 1                                                                                            \
         ? (wide ? run<W, A, 1, true>(be, p, err) : run<W, A, 1, false>(be, p, err))                         \
         : (wide ? run<W, A, GEMV_ROWS, true>(be, p, err) : run<W, A, GEMV_ROWS, false>(be, p, err)))
    return FOR_TYPES(be, err, dtype, RUN);
#undef RUN
}

template <typename W, typename A, int R, bool WIDE>
static enum ltn_status allow_shared(struct cuda_backend *be, struct ltn_error *err)
{
    CUDA_TRY(be, err,
             cudaFuncSetAttribute(gemv_kernel<W, A, R, WIDE>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)be->max_shared));
    return LTN_OK;
}

enum ltn_status gemv_open(struct cuda_backend *be, struct ltn_error *err)
{
#define ALLOW(W, A)                                                                                          \
    LTN_TRY((allow_shared<W, A, 1, true>(be, err)));                                                         \
    LTN_TRY((allow_shared<W, A, 1, false>(be, err)));                                                        \
    LTN_TRY((allow_shared<W, A, GEMV_ROWS, true>(be, err)));                                                 \
    LTN_TRY((allow_shared<W, A, GEMV_ROWS, false>(be, err)));
    ALLOW(float, float)
    ALLOW(__nv_bfloat16, __nv_bfloat16)
    ALLOW(__half, __nv_bfloat16)
#undef ALLOW
    return LTN_OK;
}

/* Input columns that fit beside the results. */
bool gemv_fits(const struct cuda_backend *be, int32_t cols, int32_t rows)
{
    const size_t r = rows == 1 ? 1 : GEMV_ROWS;
    return DEPTH * THREADS * 16 + (r * cols + MAX_SUMS + r * WARPS + 64) * sizeof(float) <= be->max_shared;
}
