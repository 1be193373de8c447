/* Dot products of rows of weights with one input in shared memory: what gemv.cu and step.cu have in common.
 */
#ifndef LTN_CUDA_DOT_CUH
#define LTN_CUDA_DOT_CUH

#include "kernels/cuda/cuda.cuh"

/* Warps that share an output: where there are few outputs, so that all have work. From the sizes alone, as
 * the order of additions hangs on it. */
static inline __host__ __device__ int split_of(int32_t dots)
{
    return dots <= 256 ? 8 : dots <= 512 ? 4 : dots <= 1024 ? 2 : 1;
}

/* A piece of W: 16 bytes, or one element where sizes or addresses forbid that. */
template <typename W, bool WIDE> struct piece {
    static constexpr int N = WIDE ? 16 / sizeof(W) : 1;
};

/* acc += piece . x, where lo and hi are the first and last four of eight columns; of four, lo alone. */
template <typename W> struct dot;
template <> struct dot<float> {
    static __device__ __forceinline__ float add(uint4 w, float4 lo, float4, float acc)
    {
        acc = fmaf(__uint_as_float(w.x), lo.x, acc);
        acc = fmaf(__uint_as_float(w.y), lo.y, acc);
        acc = fmaf(__uint_as_float(w.z), lo.z, acc);
        return fmaf(__uint_as_float(w.w), lo.w, acc);
    }
};
template <> struct dot<__nv_bfloat16> {
    static __device__ __forceinline__ float add(uint4 w, float4 lo, float4 hi, float acc)
    {
        acc = fmaf(__uint_as_float(w.x << 16), lo.x, acc);
        acc = fmaf(__uint_as_float(w.x & 0xffff0000u), lo.y, acc);
        acc = fmaf(__uint_as_float(w.y << 16), lo.z, acc);
        acc = fmaf(__uint_as_float(w.y & 0xffff0000u), lo.w, acc);
        acc = fmaf(__uint_as_float(w.z << 16), hi.x, acc);
        acc = fmaf(__uint_as_float(w.z & 0xffff0000u), hi.y, acc);
        acc = fmaf(__uint_as_float(w.w << 16), hi.z, acc);
        return fmaf(__uint_as_float(w.w & 0xffff0000u), hi.w, acc);
    }
};
template <> struct dot<__half> {
    static __device__ __forceinline__ float add(uint4 w, float4 lo, float4 hi, float acc)
    {
        const float2 a = __half22float2(*reinterpret_cast<const __half2 *>(&w.x));
        const float2 b = __half22float2(*reinterpret_cast<const __half2 *>(&w.y));
        const float2 c = __half22float2(*reinterpret_cast<const __half2 *>(&w.z));
        const float2 d = __half22float2(*reinterpret_cast<const __half2 *>(&w.w));
        acc = fmaf(a.x, lo.x, acc), acc = fmaf(a.y, lo.y, acc);
        acc = fmaf(b.x, lo.z, acc), acc = fmaf(b.y, lo.w, acc);
        acc = fmaf(c.x, hi.x, acc), acc = fmaf(c.y, hi.y, acc);
        acc = fmaf(d.x, hi.z, acc), acc = fmaf(d.y, hi.w, acc);
        return acc;
    }
};

/* acc += piece . x, where x is this row's input in shared memory: f32, in the layout of stage_at(); at: which
 * of the n pieces of a row. */
template <typename W>
static __device__ __forceinline__ float dot_wide(uint4 w, const float *x, int32_t at, int32_t n, float acc)
{
    const float4 *from = reinterpret_cast<const float4 *>(x);
    return dot<W>::add(w, from[at], from[sizeof(W) == 2 ? n + at : at], acc);
}

/* Where column c of the input lies in shared memory. Pieces of eight are held as two planes of fours, so that
 * the 16-byte reads of neighbouring lanes fall into different banks. */
template <typename W, bool WIDE> static __device__ __forceinline__ int32_t stage_at(int32_t c, int32_t cols)
{
    if (piece<W, WIDE>::N != 8)
        return c;
    return (c & 4 ? cols / 2 : 0) + c / 8 * 4 + c % 4;
}

#endif
