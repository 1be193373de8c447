/* Fused im2win for Hopper: see fused.h for what lies in shared memory, fused_plan.c for how it is chosen.
 *
 * One block stays on each multiprocessor and takes tiles in turn. Warpgroups 0 and 1 multiply and write
 * outputs, together on one tile (share 2), or each on its own (share 1), so that one writes while the other
 * multiplies. Warps 8-14 load strips, warp 15 packed filters.
 *
 * A thread's accumulators are of two output positions and, by the order in which the filters were packed, of
 * runs of 16 bytes of neighbouring channels (ltn_fused_channel), so that outputs go straight to memory. */
#include "kernels/conv/fused_load.cuh"

#include <stdio.h>
#include <stdlib.h>

namespace
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Adds U steps, one group of products: the fewer groups, the fewer gaps between products. */
template <typename T, int BN, int MT, int U>
__device__ __forceinline__ void add_steps(float (&acc)[MT][BN / 2], const int2 *steps, uint32_t strip,
                                          uint64_t filters, int accumulate)
{
    uint64_t a[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
        int2 step = steps[u];
        a[u] = descriptor(strip + step.x, step.y);
    }
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
        for (int m = 0; m < MT; ++m)
            product<T, BN>::add(acc[m], a[u] + m * 64, filters + u * BN * 2, u > 0 ? 1 : accumulate);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <typename T, int BN, int MT>
__device__ void multiply(const fused_params &p, char *base, barriers &bar, int group)
{
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const int2 *steps = reinterpret_cast<const int2 *>(base);
    const int rows = p.share == 2 ? group * MT * 64 : 0; /* of this warpgroup in the tile */
    const uint32_t weights = (shared_address(base) + p.at_weights) >> 4;
    const uint32_t slots = (shared_address(base) + p.at_slots) >> 4;
    turn now, filters;
    int skip = p.share == 2 ? 0 : group; /* tiles of the other warpgroup before this one's next */

    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        if (p.share == 1) { /* one strip per tile, and each warpgroup every other tile */
            if (skip-- > 0) {
                now.next(p.slots);
                continue;
            }
            skip = 1;
        }
        float acc[MT][BN / 2];
        int accumulate = 0, w_held = -1, s_held = -1; /* what the stage before reads */
        for (int b = 0; b < p.blocks; ++b) {
            barrier_wait(&bar.full[now.at], now.phase);
            if (sizeof(T) == 2) /* copied units have had no fence yet */
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            const uint32_t strip = slots + now.at * (p.slot_bytes >> 4) + rows;
            for (int s0 = 0; s0 < p.steps; s0 += p.stage_steps) {
                const int n = min(p.stage_steps, p.steps - s0);
                barrier_wait(&bar.w_full[filters.at], p.resident ? 0 : filters.phase);
                uint64_t w = descriptor(
                    weights + (p.resident ? b * p.steps + s0 : filters.at * p.stage_steps) * (BN * 2), BN);
                for (int i = 0; i < n;) {
                    const bool first = i == 0;
                    if (i + 4 <= n) {
                        add_steps<T, BN, MT, 4>(acc, steps + s0 + i, strip, w + i * (BN * 2), accumulate);
                        i += 4;
                    } else {
                        add_steps<T, BN, MT, 1>(acc, steps + s0 + i, strip, w + i * (BN * 2), accumulate);
                        i += 1;
                    }
                    accumulate = 1;
                    if (first) { /* with these under way, see the stage before done and let it go */
                        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                        if (lane == 0) {
                            if (w_held >= 0)
                                barrier_arrive(&bar.w_empty[w_held]);
                            if (s_held >= 0)
                                barrier_arrive(&bar.empty[s_held]);
                        }
                    }
                }
                w_held = p.resident ? -1 : filters.at;
                s_held = s0 + p.stage_steps >= p.steps ? now.at : -1;
                filters.next(p.stages);
            }
            now.next(p.slots);
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        pin(acc);
        if (lane == 0) {
            if (w_held >= 0)
                barrier_arrive(&bar.w_empty[w_held]);
            barrier_arrive(&bar.empty[s_held]);
        }
        const tile t = tile_at(p, index, BN);
        write_tile<T, BN, MT>(p, acc, t.first + rows + warp * 16 + (lane >> 2), t);
    }
}

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

template <typename T, int BN, int MT>
__global__ void __launch_bounds__(kBlock, 1) fused_kernel(const __grid_constant__ fused_params p)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(128) char raw[];
    barriers &bar = *reinterpret_cast<barriers *>(raw);
    char *base = raw + 1024 - 128; /* steps, filters, strips */
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.slots; ++i) {
            barrier_init(&bar.full[i], p.loaders);
            barrier_init(&bar.empty[i], 4 * p.share);
        }
        for (int i = 0; i < p.stages; ++i) {
            barrier_init(&bar.w_full[i], 1);
            barrier_init(&bar.w_empty[i], 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int i = threadIdx.x; i < p.steps; i += kBlock)
        reinterpret_cast<int2 *>(base)[i] = p.steps_table[i];
    __syncthreads();
    const int group =
        __shfl_sync(0xFFFFFFFF, threadIdx.x / kGroup, 0); /* the compiler then knows that it is uniform */
    if (group < 2) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 176;");
        multiply<T, BN, MT>(p, base, bar, group);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 80;");
        if (threadIdx.x < 2 * kGroup + kLoaders)
            load_strips<T, BN>(p, base, bar);
        else if (threadIdx.x == 2 * kGroup + kLoaders)
            load_filters<BN>(p, base, bar);
    }
#else
    __shared__ volatile char absent[1]; /* tells refuse() */
    absent[0] = 0;
    __trap();
#endif
}

/* ---- the operator ---- */

using fused_fn = void (*)(const fused_params);

/* NULL: no such tile */
template <typename T> fused_fn kernel_of(const ltn_fused_plan &plan)
{
    switch (plan.bn * 4 + plan.mt) {
    case 32 * 4 + 1:
        return fused_kernel<T, 32, 1>;
    case 32 * 4 + 2:
        return fused_kernel<T, 32, 2>;
    case 64 * 4 + 1:
        return fused_kernel<T, 64, 1>;
    case 64 * 4 + 2:
        return fused_kernel<T, 64, 2>;
    case 64 * 4 + 3:
        return fused_kernel<T, 64, 3>;
    case 96 * 4 + 1:
        return fused_kernel<T, 96, 1>;
    case 96 * 4 + 2:
        return fused_kernel<T, 96, 2>;
    case 128 * 4 + 1:
        return fused_kernel<T, 128, 1>;
    case 128 * 4 + 2:
        return fused_kernel<T, 128, 2>;
    }
    return nullptr;
}

struct fused_op {
    ltn_fused_plan plan;
    fused_fn kernel;
    fused_params params; /* but x, y and what depends on the number of images */
    int images;          /* at most, in one launch */
};

fused_params params_of(const ltn_fused_plan &plan, const ltn_conv_shape &s)
{
    bool nhwc = s.layout == LTN_NHWC;
    int cog = s.co / s.groups,
        held = plan.resident ? plan.blocks * plan.steps : plan.stages * plan.stage_steps;
    fused_params p = {};
    p.x_image = static_cast<int64_t>(s.ci) * s.hi * s.wi;
    p.y_image = static_cast<int64_t>(s.co) * plan.ho * plan.wo;
    p.x_row = nhwc ? s.wi * s.ci : s.wi;
    p.x_col = nhwc ? s.ci : 1;
    p.x_group = s.ci / s.groups * (nhwc ? 1 : s.hi * s.wi);
    p.y_row = nhwc ? static_cast<int64_t>(plan.wo) * s.co : plan.wo;
    p.y_col = nhwc ? s.co : 1;
    p.y_channel = nhwc ? 1 : static_cast<int64_t>(plan.ho) * plan.wo;
    p.y_group = cog * p.y_channel;
    p.hi = s.hi;
    p.wi = s.wi;
    p.ho = plan.ho;
    p.wo = plan.wo;
    p.sh = s.sh;
    p.sw = s.sw;
    p.pt = s.pt;
    p.pl = s.pl;
    p.by_wq = conv_divisor_of(plan.wq);
    p.by_hq = conv_divisor_of(plan.hq);
    p.walk.positions = plan.loaders / (plan.vector ? plan.planes : plan.phases);
    p.walk.y = p.walk.positions / plan.wq * s.sh;
    p.walk.x = p.walk.positions % plan.wq * s.sw;
    p.walk.at = static_cast<int64_t>(p.walk.y) * p.x_row + static_cast<int64_t>(p.walk.x) * p.x_col;
    p.walk.row_y = s.sh;
    p.walk.row_x = plan.wq * s.sw;
    p.walk.row_at = static_cast<int64_t>(s.sh) * p.x_row - static_cast<int64_t>(p.walk.row_x) * p.x_col;
    p.walk.image_y = plan.hq * s.sh;
    p.walk.image_at = p.x_image - static_cast<int64_t>(p.walk.image_y) * p.x_row;
    p.loaders = plan.loaders;
    p.by_n_tiles = conv_divisor_of(plan.n_tiles);
    p.cog = cog;
    p.subplanes = plan.subplanes;
    p.planes = plan.planes;
    p.phases = plan.phases;
    p.load = plan.load;
    p.stride = plan.stride;
    p.blocks = plan.blocks;
    p.steps = plan.steps;
    p.share = plan.share;
    p.tile_rows = plan.tile_rows;
    p.stage_steps = plan.stage_steps;
    p.stages = plan.stages;
    p.slots = plan.slots;
    p.slot_bytes = plan.slot_bytes;
    p.at_weights = (plan.steps * 8 + 255) & ~255;
    p.at_slots = p.at_weights + held * plan.bn * 32;
    p.zero = plan.zero;
    p.resident = plan.resident;
    p.vector = plan.vector;
    p.relu = s.relu;
    p.whole = nhwc && cog % plan.unit == 0;
    return p;
}

const char *refuse(const conv_device *dev, const ltn_conv_shape *s)
{
    ltn_fused_plan plan;
    cudaFuncAttributes kernel;
    if (s->type == LTN_CONV_F32)
        return "fused im2win is for tf32 and bf16";
    if (conv_fused_tma.refuse(dev, s) == nullptr)
        return nullptr;
    if (dev->major != 9 || cudaFuncGetAttributes(&kernel, fused_kernel<float, 32, 1>) != cudaSuccess ||
        kernel.sharedSizeBytes != 0)
        return "fused im2win needs a Hopper GPU, and to be built for sm_90a";
    if (ltn_fused_choose(&plan, s, nullptr, nullptr) != LTN_OK)
        return "no plan of fused im2win fits this shape";
    return nullptr;
}

enum ltn_status create(conv_device *dev, conv_op *op, const float *filter, ltn_error *err)
{
    const ltn_conv_shape &s = op->base.shape;
    if (conv_fused_tma.refuse(dev, &s) == nullptr) {
        op->algo = &conv_fused_tma;
        return op->algo->create(dev, op, filter, err);
    }
    fused_op *f = static_cast<fused_op *>(calloc(1, sizeof(fused_op)));
    if (f == nullptr)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no memory for an operator");
    op->own = f;
    LTN_TRY(ltn_fused_choose(&f->plan, &s, nullptr, err));
    const ltn_fused_plan &plan = f->plan;
    f->kernel = s.type == LTN_CONV_BF16 ? kernel_of<__nv_bfloat16>(plan) : kernel_of<float>(plan);
    f->params = params_of(plan, s);
    /* positions and tiles of one launch are counted in 32 bits */
    int64_t per_image = static_cast<int64_t>(plan.hq) * plan.wq;
    int64_t most = INT32_MAX / 2 / (static_cast<int64_t>(plan.n_tiles) * s.groups);
    if (f->kernel == nullptr || per_image > most)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "convolution: too large for fused im2win");
    f->images = static_cast<int>(most / per_image < s.n ? most / per_image : s.n);

    void *packed = malloc(plan.bytes);
    if (packed == nullptr)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no memory for a packed filter of %zu bytes",
                        plan.bytes);
    enum ltn_status status = ltn_fused_pack(&plan, &s, filter, packed, err);
    if (status == LTN_OK)
        status = conv_alloc(dev, &op->filter, plan.bytes, err);
    if (status == LTN_OK)
        status = dev->base.ops->upload(&dev->base, op->filter, packed, plan.bytes, err);
    free(packed);
    LTN_TRY(status);
    const char *base = static_cast<const char *>(op->filter);
    f->params.fetch = reinterpret_cast<const int2 *>(base);
    f->params.steps_table = reinterpret_cast<const int2 *>(base + plan.at_steps);
    f->params.weights = base + plan.at_weights;
    op->base.info.filter_bytes = plan.bytes;
    static const char *const orders[] = {"channels", "window", "exact", "exact list"};
    snprintf(op->base.info.variant, sizeof op->base.info.variant,
             "%s, tile %d x %d, %d in a strip, filters %s", orders[plan.order], plan.tile_rows, plan.bn,
             plan.steps, plan.resident ? "resident" : "streamed");
    CONV_TRY(dev, err,
             cudaFuncSetAttribute(f->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(plan.shared_bytes)));
    return LTN_OK;
}

enum ltn_status run(conv_device *dev, conv_op *op, void *y, const void *x, void *, enum ltn_conv_part part,
                    ltn_error *err)
{
    const ltn_conv_shape &s = op->base.shape;
    const fused_op *f = static_cast<const fused_op *>(op->own);
    const int64_t size = static_cast<int64_t>(ltn_conv_type_size(s.type));
    fused_params p = f->params;
    p.bias = op->bias;
    if (!(part & LTN_CONV_KERNEL))
        return LTN_OK;
    for (int first = 0; first < s.n; first += f->images) {
        p.n = s.n - first < f->images ? s.n - first : f->images;
        p.x = static_cast<const char *>(x) + first * p.x_image * size;
        p.y = static_cast<char *>(y) + first * p.y_image * size;
        int m_tiles = (p.n * f->plan.hq * f->plan.wq + p.tile_rows - 1) / p.tile_rows;
        p.by_m_tiles = conv_divisor_of(m_tiles);
        p.tiles = m_tiles * f->plan.n_tiles * s.groups;
        const int grid = p.tiles < dev->n_sms ? p.tiles : dev->n_sms;
        const fused_fn kernel = f->kernel;
        kernel<<<grid, kBlock, f->plan.shared_bytes, dev->stream>>>(p);
        CONV_TRY(dev, err, cudaGetLastError());
    }
    return LTN_OK;
}

void destroy(conv_device *, conv_op *op)
{
    free(op->own);
}

} // namespace

const struct conv_algo conv_fused = {LTN_CONV_FUSED, refuse, create, run, destroy};
