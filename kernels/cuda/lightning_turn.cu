/* LRPE for the Hopper kernel: q and k turned by their positions, on their way through memory. */
#include "kernels/cuda/lightning_plan.cuh"

#include <cuda_fp16.h>

namespace
{

constexpr int kThreads = 256, kRowsEach = 32, kBatch = 8;

/* A thread takes two columns of 32 rows of a sequence, of q and of k; a block 64 columns (blockIdx.y) of 256
 * rows (blockIdx.x) of sequence blockIdx.z. */
__global__ void __launch_bounds__(kThreads) turn_kernel(const __grid_constant__ lightning_params p, int width)
{
    const lightning_seq &seq = p.seq[blockIdx.z];
    const int64_t row0 = (int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32) * kRowsEach;
    const int column = blockIdx.y * 64 + 2 * (threadIdx.x & 31), e = width / p.n_heads;
    if (row0 >= seq.count)
        return;
    const int64_t pos = seq.pos + (p.steps ? *p.steps : 0) + row0;
    turning a(p.theta[column], pos), b(p.theta[column + 1], pos);
    const int64_t first = seq.first + row0, rows = min(int64_t(kRowsEach), seq.count - row0);
    const __nv_bfloat16 *from[2] = {p.q + first * p.ld + column, p.k + first * p.ld + column};
    __nv_bfloat16 *to = p.turned + first * 2 * width + column / e * 2 * e + column % e;
    for (int64_t row = 0; row < rows; row += kBatch) {
        uint32_t x[2][kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j)
                x[j][i] = row + i < rows
                              ? __ldcg(reinterpret_cast<const uint32_t *>(from[j] + (row + i) * p.ld))
                              : 0;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const float ca = a.c * (1 / kTurnScale), sa = a.s * (1 / kTurnScale);
            const float cb = b.c * (1 / kTurnScale), sb = b.s * (1 / kTurnScale);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                __nv_bfloat16 *at = to + (j * p.rows + row + i) * 2 * width;
                const float lo = low_half(x[j][i]), hi = high_half(x[j][i]);
                if (row + i < rows) {
                    *reinterpret_cast<uint32_t *>(at) = pack_f16(lo * ca, hi * cb);
                    *reinterpret_cast<uint32_t *>(at + e) = pack_f16(lo * sa, hi * sb);
                }
            }
            a.next();
            b.next();
        }
    }
}

} // namespace

cudaError_t lightning_turn(cudaStream_t stream, const lightning_params &p, int32_t head_dim)
{
    int32_t longest = 0;
    for (int32_t i = 0; i < p.n_seqs; ++i)
        longest = p.seq[i].count > longest ? p.seq[i].count : longest;
    const int width = p.n_heads * head_dim, rows = kThreads / 32 * kRowsEach;
    turn_kernel<<<dim3((longest + rows - 1) / rows, width / 64, p.n_seqs), kThreads, 0, stream>>>(p, width);
    return cudaGetLastError();
}
