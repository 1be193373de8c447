/* y = In(x) W^T + b for one row and quantised W (kernels/quant.h): gemv.cu's way of keeping pieces of W in
 * flight, with a scale beside each. For SimpleRMSNorm and columns in whole groups; linear_quant.cu has a way
 * for the rest.
 *
 * A piece is 16 bytes: 16 codes of q8 or fp8, or a whole group of q4. q8 becomes f32 by a byte's permutation
 * into the low mantissa of 2^23, exactly, and fp8 by the hardware's conversion; the input is f32. Of q4 there
 * are so many weights to a byte that their arithmetic would bind, so the input is rounded to 16 bits with a
 * scale for each group of 32 (an error below 2^-15 of the group's largest) and four products of a byte of it
 * go into one instruction, summed exactly. */
#include "kernels/cuda/dot.cuh"
#include "kernels/cuda/quant.cuh"

#include <cuda_fp8.h>

enum {
    WARPS = 16,
    THREADS = 32 * WARPS,
    DEPTH = 12,
    MAX_SUMS = 4096,
    MOST_CODE = 32512, /* of a rounded input: its high byte is at most 127 */
};

/* What differs between the formats. GROUPS: pieces have scales of their own, one for PIECES of them; X_BYTES:
 * of a piece's input in shared memory, beside INFO_BYTES about it; ROUNDED: the input is not f32. */
struct q8 {
    static constexpr int N = 16, PIECES = 2, X_BYTES = 64, INFO_BYTES = 0;
    static constexpr bool GROUPS = true, ROW_SCALES = false, ROUNDED = false;
    static __device__ __forceinline__ float dot(uint4 w, const uint8_t *x, int32_t at, int32_t n)
    {
        const uint32_t words[4] = {w.x, w.y, w.z, w.w};
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t u = words[i] ^ 0x80808080u;
            const float4 v = reinterpret_cast<const float4 *>(x)[i * n + at];
            sum = fmaf(__uint_as_float(__byte_perm(u, 0x4b000000u, 0x7440)) - 8388736.0f, v.x, sum);
            sum = fmaf(__uint_as_float(__byte_perm(u, 0x4b000000u, 0x7441)) - 8388736.0f, v.y, sum);
            sum = fmaf(__uint_as_float(__byte_perm(u, 0x4b000000u, 0x7442)) - 8388736.0f, v.z, sum);
            sum = fmaf(__uint_as_float(__byte_perm(u, 0x4b000000u, 0x7443)) - 8388736.0f, v.w, sum);
        }
        return sum;
    }
};
struct fp8 {
    static constexpr int N = 16, PIECES = 1, X_BYTES = 64, INFO_BYTES = 0;
    static constexpr bool GROUPS = false, ROW_SCALES = true, ROUNDED = false;
    static __device__ __forceinline__ float2 two(uint32_t codes)
    {
        const __half2_raw h = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)codes, __NV_E4M3);
        return __half22float2(*reinterpret_cast<const __half2 *>(&h));
    }
    static __device__ __forceinline__ float dot(uint4 w, const uint8_t *x, int32_t at, int32_t n)
    {
        const uint32_t words[4] = {w.x, w.y, w.z, w.w};
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 a = two(words[i] & 0xffff), b = two(words[i] >> 16);
            const float4 v = reinterpret_cast<const float4 *>(x)[i * n + at];
            sum = fmaf(a.x, v.x, sum);
            sum = fmaf(a.y, v.y, sum);
            sum = fmaf(b.x, v.z, sum);
            sum = fmaf(b.y, v.w, sum);
        }
        return sum;
    }
};
/* Of the input, an integer of 16 bits: its high bytes in two planes of 16, its low bytes, signed, in two
 * more; then {scale, -8 times the sum of the integers} of each group. */
struct q4 {
    static constexpr int N = 32, PIECES = 1, X_BYTES = 64, INFO_BYTES = 8;
    static constexpr bool GROUPS = true, ROW_SCALES = false, ROUNDED = true;
    static __device__ __forceinline__ int four(uint32_t weights, uint32_t x, int sum)
    {
        asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(weights), "r"(x));
        return sum;
    }
    static __device__ __forceinline__ float dot(uint4 w, const uint8_t *x, int32_t at, int32_t n)
    {
        const uint2 info = reinterpret_cast<const uint2 *>(x + (int64_t)n * X_BYTES)[at];
        const uint32_t words[4] = {w.x, w.y, w.z, w.w};
        int sum[2] = {0, (int)info.y};
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const uint4 lo = reinterpret_cast<const uint4 *>(x)[2 * part * n + at],
                        hi = reinterpret_cast<const uint4 *>(x)[(2 * part + 1) * n + at];
            const uint32_t low[4] = {lo.x, lo.y, lo.z, lo.w}, high[4] = {hi.x, hi.y, hi.z, hi.w};
#pragma unroll
            for (int i = 0; i < 4; i++) { /* two's complement to the code plus 8 */
                sum[part] = four((words[i] & 0x0f0f0f0fu) ^ 0x08080808u, low[i], sum[part]);
                sum[part] = four((words[i] >> 4 & 0x0f0f0f0fu) ^ 0x08080808u, high[i], sum[part]);
            }
        }
        return __uint_as_float(info.x) * (float)(sum[0] * 256 + sum[1]);
    }
};

/* Brings columns c .. c + 3 of the input to their place; of q4, eight neighbouring threads bring a group. */
template <typename Q>
static __device__ __forceinline__ void put_input(uint8_t *x, int32_t c, int32_t cols, float4 v)
{
    const int32_t n = cols / Q::N, at = c / Q::N, word = c % Q::N / 4;
    if (!Q::ROUNDED) {
        reinterpret_cast<float4 *>(x)[word * n + at] = v;
        return;
    }
    float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
    for (int offset = 4; offset > 0; offset /= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    const float inverse = most > 1e-30f ? MOST_CODE / most : 0;
    const int code[4] = {__float2int_rn(v.x * inverse), __float2int_rn(v.y * inverse),
                         __float2int_rn(v.z * inverse), __float2int_rn(v.w * inverse)};
    int sum = code[0] + code[1] + code[2] + code[3];
    for (int offset = 4; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (c >= cols) /* such threads only kept the others company */
        return;
    uint32_t high = 0, low = 0;
    for (int i = 0; i < 4; i++) {
        high |= (uint32_t)((code[i] + 128) >> 8 & 255) << 8 * i;
        low |= (uint32_t)(code[i] & 255) << 8 * i;
    }
    uint32_t *words = reinterpret_cast<uint32_t *>(x) + (word / 4 * n + at) * 4 + word % 4;
    words[0] = high;
    words[8 * n] = low;
    if (word == 0)
        reinterpret_cast<uint2 *>(x + (int64_t)n * Q::X_BYTES)[at] =
            make_uint2(__float_as_uint(most / MOST_CODE), (uint32_t)(-8 * sum));
}

/* In(x), but for the division by the rms; the warps' sums of squares are left in red. */
template <typename Q> static __device__ void stage_input(uint8_t *x, float *red, const struct product &p)
{
    const __nv_bfloat16 *act = (const __nv_bfloat16 *)p.x, *gate = (const __nv_bfloat16 *)p.gate;
    const int32_t rounds = (p.cols + THREADS * 4 - 1) / (THREADS * 4);
    float sum = 0;
    for (int32_t i = 0; i < rounds; i++) {
        const int32_t c = (i * THREADS + threadIdx.x) * 4;
        float4 v = make_float4(0, 0, 0, 0);
        if (c < p.cols) {
            v = p.in == IN_NORM ? load_fresh4((const float *)p.x + c) : load_fresh4(act + c);
            sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            if (p.in == IN_GATED) {
                const float4 u = load_fresh4(gate + c);
                v.x *= u.x, v.y *= u.y, v.z *= u.z, v.w *= u.w;
            }
        }
        if (Q::ROUNDED || c < p.cols)
            put_input<Q>(x, c, p.cols, v);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        red[threadIdx.x / 32] = sum;
    __syncthreads();
}

/* The scale of a piece, of the two that lie in the aligned word. */
static __device__ __forceinline__ float scale_of(uint32_t word, uintptr_t address)
{
    const uint16_t half = (uint16_t)(address & 2 ? word >> 16 : word);
    return __half2float(__ushort_as_half(half));
}

static __device__ __forceinline__ void copy_word_async(void *shared, uintptr_t global)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(global)
                 : "memory");
}

/* Shared: slots [DEPTH][THREADS] of 16 bytes, the scales' [DEPTH][THREADS] words, the input, sums [outputs of
 * the block][split], red [WARPS]. */
template <typename Q>
static __global__ void __launch_bounds__(THREADS, 1)
    gemv_quant_kernel(const __grid_constant__ struct product p, const __grid_constant__ struct quant_scales s,
                      int split, int max_sums)
{
    extern __shared__ uint4 shared[];
    const int32_t cols = p.cols, n_pieces = cols / Q::N;
    uint4 *slots = shared + threadIdx.x;
    uint32_t *scale_slots = reinterpret_cast<uint32_t *>(shared + DEPTH * THREADS) + threadIdx.x;
    float *sums = reinterpret_cast<float *>(shared + DEPTH * THREADS) + (Q::GROUPS ? DEPTH * THREADS : 0);
    float *red = sums + max_sums;
    uint8_t *x = reinterpret_cast<uint8_t *>(red + WARPS);

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
        const uint8_t *base = (const uint8_t *)(pair == 2 && (i & 1) ? p.w2 : p.w);
        return base + (first + (pair == 2 ? i >> 1 : i)) * n_pieces * 16;
    };
    auto scales_of = [&](int32_t i) {
        const uint16_t *base = (const uint16_t *)(pair == 2 && (i & 1) ? s.w2 : s.w);
        return (uintptr_t)(base + (first + (pair == 2 ? i >> 1 : i)) * (n_pieces / Q::PIECES));
    };
    int32_t next_dot = from < to ? group : n_dots, next_step = from;
    const uint8_t *next_row = row_of(next_dot);
    uintptr_t next_scales = Q::GROUPS ? scales_of(next_dot) : 0;
    auto fetch = [&](int slot) {
        const int32_t at = next_step * 32 + lane;
        if (next_dot < n_dots && at < n_pieces) {
            copy_async(slots + slot * THREADS, next_row + (int64_t)at * 16);
            if (Q::GROUPS)
                copy_word_async(scale_slots + slot * THREADS,
                                (next_scales + at / Q::PIECES * 2) & ~(uintptr_t)3);
        }
        end_copy_group();
        if (++next_step == to) {
            next_step = from;
            next_dot += groups;
            next_row = row_of(next_dot);
            next_scales = Q::GROUPS ? scales_of(next_dot) : 0;
        }
    };

    let_next_start();
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
        fetch(i);
    float row_scale = 1, row_scale2 = 1;
    if (Q::ROW_SCALES && (int32_t)threadIdx.x < n_outs) {
        row_scale = ((const float *)s.w)[first + threadIdx.x];
        row_scale2 = p.w2 ? ((const float *)s.w2)[first + threadIdx.x] : 1;
    }
    wait_for_previous();
    /* The residual that the result is added to is on its way before it is needed. */
    float old = 0;
    if (p.out == OUT_ADD && (int32_t)threadIdx.x < n_outs)
        old = load_fresh((const float *)p.y + first + threadIdx.x);
    stage_input<Q>(x, red, p);

    int slot = 0;
    for (int32_t i = from < to ? group : n_dots; i < n_dots; i += groups) {
        const uintptr_t scales = Q::GROUPS ? scales_of(i) : 0;
        float acc = 0;
        for (int32_t step = from; step < to; step++) {
            const int32_t at = step * 32 + lane;
            wait_copy_groups<DEPTH - 1>();
            if (at < n_pieces) {
                const float sum = Q::dot(slots[slot * THREADS], x, at, n_pieces);
                if (Q::GROUPS)
                    acc = fmaf(scale_of(scale_slots[slot * THREADS], scales + at / Q::PIECES * 2), sum, acc);
                else
                    acc += sum;
            }
            fetch(slot);
            slot = slot == DEPTH - 1 ? 0 : slot + 1;
        }
        acc = warp_sum(acc);
        if (lane == 0)
            sums[i * split + part] = acc;
    }
    __syncthreads();

    const int parts = min(split, (n_steps + per_part - 1) / per_part); /* the others had no columns */
    for (int32_t n = threadIdx.x; n < n_outs; n += THREADS) {
        const int64_t out = first + n;
        if (Q::ROW_SCALES && n >= THREADS) {
            row_scale = ((const float *)s.w)[out];
            row_scale2 = p.w2 ? ((const float *)s.w2)[out] : 1;
        }
        float scale = 1;
        if (p.in != IN_ACT) {
            float sum = 0;
            for (int w = 0; w < WARPS; w++)
                sum += red[w];
            scale = rsqrtf(sum / cols + 1e-6f);
        }
        float value = 0;
        for (int i = 0; i < parts; i++)
            value += sums[n * pair * split + i];
        value = value * (scale * row_scale) + (p.bias ? p.bias[out] : 0);
        if (p.w2) {
            float second = 0;
            for (int i = 0; i < parts; i++)
                second += sums[(n * pair + 1) * split + i];
            value *= second * (scale * row_scale2) + (p.bias2 ? p.bias2[out] : 0);
        }
        if (out < p.act_cols)
            value = activate(value, p.act);
        if (p.out == OUT_ACT)
            ((__nv_bfloat16 *)p.y)[out] = __float2bfloat16(value);
        else if (p.out == OUT_F32)
            ((float *)p.y)[out] = value;
        else
            ((float *)p.y)[out] = value + (n < THREADS ? old : load_fresh((float *)p.y + out));
    }
}

/* ---- host ------------------------------------------------------------------------------------------------
 */

template <typename Q> static size_t shared_bytes(int32_t cols, int32_t max_sums)
{
    return (size_t)DEPTH * THREADS * (Q::GROUPS ? 20 : 16) + (max_sums + WARPS) * sizeof(float) +
           (size_t)(cols / Q::N) * (Q::X_BYTES + Q::INFO_BYTES);
}

template <typename Q>
static enum ltn_status run(struct cuda_backend *be, const struct product *p, const struct quant_scales *s,
                           struct ltn_error *err)
{
    const int split = split_of(p->outs * (p->w2 ? 2 : 1)), per_out = split * (p->w2 ? 2 : 1);
    const int32_t most = MAX_SUMS / per_out; /* outputs of one block */
    int32_t blocks = p->outs < be->n_sms ? p->outs : be->n_sms;
    if ((p->outs + blocks - 1) / blocks > most)
        blocks = (p->outs + most - 1) / most;
    const int32_t max_sums = ((p->outs + blocks - 1) / blocks * per_out + 3) & ~3;
    LAUNCH(be, err, gemv_quant_kernel<Q>, dim3(blocks), dim3(THREADS), shared_bytes<Q>(p->cols, max_sums), *p,
           *s, split, max_sums);
    return LTN_OK;
}

bool gemv_quant_suits(const struct cuda_backend *be, const struct product *p)
{
    return be->base.act_dtype == LTN_BF16 && p->rows == 1 && p->cols % LTN_GROUP == 0 &&
           (p->in == IN_ACT || !p->norm.weight) && aligned16(p->w) && aligned16(p->w2) && aligned16(p->x) &&
           aligned16(p->gate) && shared_bytes<q8>(p->cols, MAX_SUMS) <= be->max_shared;
}

enum ltn_status gemv_quant(struct cuda_backend *be, const struct product *p, const struct quant_scales *s,
                           enum ltn_dtype dtype, struct ltn_error *err)
{
    return dtype == LTN_Q8    ? run<q8>(be, p, s, err)
           : dtype == LTN_FP8 ? run<fp8>(be, p, s, err)
                              : run<q4>(be, p, s, err);
}

template <typename Q> static enum ltn_status allow_shared(struct cuda_backend *be, struct ltn_error *err)
{
    CUDA_TRY(be, err,
             cudaFuncSetAttribute(gemv_quant_kernel<Q>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)be->max_shared));
    return LTN_OK;
}

enum ltn_status gemv_quant_open(struct cuda_backend *be, struct ltn_error *err)
{
    LTN_TRY(allow_shared<q8>(be, err));
    LTN_TRY(allow_shared<fp8>(be, err));
    return allow_shared<q4>(be, err);
}
