/* Instructions of sm_90a that the fused convolutions need beside kernels/cuda/hopper.cuh: arriving without a
 * branch, the copy engine's im2col mode, products of a warpgroup in the sizes used here. */
#ifndef LTN_CONV_HOPPER_CUH
#define LTN_CONV_HOPPER_CUH

#include "kernels/cuda/hopper.cuh"

#include <cuda_bf16.h>
#include <stdint.h>

/* Without a branch, behind which the compiler would no longer know what is the same in all threads. */
static __device__ __forceinline__ void barrier_arrive_if(uint64_t *bar, bool wanted)
{
    asm volatile("{\n"
                 ".reg .pred wanted;\n"
                 "setp.ne.s32 wanted, %1, 0;\n"
                 "@wanted mbarrier.arrive.shared::cta.b64 _, [%0];\n"
                 "}\n" ::"r"(shared_address(bar)),
                 "r"(static_cast<int>(wanted))
                 : "memory");
}

/* Pixels in a row from (x, y) of an image on, in the map's box, each moved by (right, down). */
static __device__ __forceinline__ void tma_load_im2col(uint32_t dst, const CUtensorMap *map, int channel,
                                                       int x, int y, int image, int right, int down,
                                                       uint64_t *bar)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8};" ::"r"(dst),
                 "l"(map), "r"(channel), "r"(x), "r"(y), "r"(image), "r"(shared_address(bar)),
                 "h"(static_cast<uint16_t>(right)), "h"(static_cast<uint16_t>(down))
                 : "memory");
}

/* Has the map at hand before the first copy needs it. */
static __device__ __forceinline__ void prefetch_map(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* ---- products ---- */

#define ACC8(d, i)                                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),              \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define ACC16(d, i) ACC8(d, i), ACC8(d, i + 8)
#define ACC32(d, i) ACC16(d, i), ACC16(d, i + 16)
#define REGS16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define REGS32 REGS16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGS48 REGS32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define REGS64 REGS48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

/* d (+)= A B^T, 64 positions by N channels by two units; both operands in shared memory */
template <typename T, int N> struct product;

#define PRODUCT(N, REGS, ACCS, A, B, P)                                                                      \
    template <> struct product<__nv_bfloat16, N> {                                                           \
        static __device__ __forceinline__ void add(float (&d)[N / 2], uint64_t a, uint64_t b,                \
                                                   int accumulate)                                           \
        {                                                                                                    \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                      \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGS "}, " A ", " B    \
                         ", p, 1, 1, 0, 0;\n}\n"                                                             \
                         : ACCS                                                                              \
                         : "l"(a), "l"(b), "r"(accumulate));                                                 \
        }                                                                                                    \
    };                                                                                                       \
    template <> struct product<float, N> {                                                                   \
        static __device__ __forceinline__ void add(float (&d)[N / 2], uint64_t a, uint64_t b,                \
                                                   int accumulate)                                           \
        {                                                                                                    \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                      \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k8.f32.tf32.tf32 {" REGS "}, " A ", " B     \
                         ", p, 1, 1;\n}\n"                                                                   \
                         : ACCS                                                                              \
                         : "l"(a), "l"(b), "r"(accumulate));                                                 \
        }                                                                                                    \
    };

#define ACCS16 ACC16(d, 0)
#define ACCS32 ACC32(d, 0)
#define ACCS48 ACC32(d, 0), ACC16(d, 32)
#define ACCS64 ACC32(d, 0), ACC32(d, 32)
PRODUCT(32, REGS16, ACCS16, "%16", "%17", "%18")
PRODUCT(64, REGS32, ACCS32, "%32", "%33", "%34")
PRODUCT(96, REGS48, ACCS48, "%48", "%49", "%50")
PRODUCT(128, REGS64, ACCS64, "%64", "%65", "%66")

/* No swizzle, "K-major": 8-row groups are 128 bytes apart, the two units of a row `apart` units. */
static __device__ __forceinline__ uint64_t descriptor(uint32_t units, uint32_t apart)
{
    return static_cast<uint64_t>(units | (apart << 16)) | (static_cast<uint64_t>(8) << 32);
}

template <int M, int N> static __device__ __forceinline__ void pin(float (&x)[M][N])
{
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j)
            asm volatile("" : "+f"(x[i][j])::"memory");
}

#endif
