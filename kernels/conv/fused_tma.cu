/* Fused im2win for Hopper with strips by the copy engine: see fused_tma.h for what lies in shared memory,
 * fused_tma_plan.c for how it is chosen.
 *
 * One block stays on each multiprocessor and takes tiles in turn. Warpgroups 0 and 1 multiply, each every
 * other tile: while one writes its outputs, the products of the other follow. Warp 8 brings strips, in im2col
 * mode and rounded to tf32 where that is asked for; warp 9 packed filters. */
#include "kernels/conv/fused_tma.h"
#include "kernels/conv/fused_write.cuh"

#include <stdio.h>
#include <stdlib.h>

namespace
{

constexpr int kBlock = 3 * kGroup;

struct tma_params : fused_tiles {
    const char *weights;
    ltn_tma_strips strips;
    int sh, sw, pt, pl, cg;
    int n_strips, taps, slots, stages, slot_bytes, strip_bytes;
    int at_stages, at_barriers; /* in shared memory */
    bool resident;
};

struct barriers {
    uint64_t full[LTN_TMA_MAX_SLOTS], empty[LTN_TMA_MAX_SLOTS];
    uint64_t w_full[LTN_TMA_MAX_STAGES], w_empty[LTN_TMA_MAX_STAGES];
    uint64_t order[2]; /* a warpgroup's turn to multiply */
};
static_assert(sizeof(barriers) <= 1024, "fits in the plan's part");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* By one thread. */
template <int BN>
__device__ void load_strips(const tma_params &p, const CUtensorMap *map, uint32_t base, barriers &bar)
{
    turn now;
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const tile t = tile_at(p, index, BN);
        const int row = quotient(t.first, p.by_wq), image = quotient(row, p.by_hq);
        const int x = (t.first - row * static_cast<int>(p.by_wq.d)) * p.sw - p.pl;
        const int y = (row - image * static_cast<int>(p.by_hq.d)) * p.sh - p.pt;
        for (int line = 0; line < p.strips.lines; ++line)
            for (int u = 0; u < p.strips.rows; ++u)
                for (int phase = 0; phase < p.strips.phases; ++phase, now.next(p.slots)) {
                    barrier_wait(&bar.empty[now.at], now.phase ^ 1);
                    barrier_arrive_expect(&bar.full[now.at], p.strip_bytes);
                    tma_load_im2col(base + now.at * p.slot_bytes, map, t.group * p.cg + line * p.strips.line,
                                    x, y, image, p.strips.phase[phase].x, u * p.strips.down,
                                    &bar.full[now.at]);
                }
    }
}

/* By one thread. */
template <int BN> __device__ void load_filters(const tma_params &p, uint32_t base, barriers &bar)
{
    constexpr uint32_t kBytes = BN * LTN_TMA_LINE;
    turn now;
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const tile t = tile_at(p, index, BN);
        const char *from =
            p.weights + (static_cast<int64_t>(t.group) * p.by_n_tiles.d + t.n_tile) * p.taps * kBytes;
        for (int k = 0; k < p.taps; ++k, from += kBytes) {
            if (!p.resident)
                barrier_wait(&bar.w_empty[now.at], now.phase ^ 1);
            barrier_arrive_expect(&bar.w_full[now.at], kBytes);
            bulk_load(base + p.at_stages + now.at * kBytes, from, kBytes, &bar.w_full[now.at]);
            now.next(p.stages);
        }
        if (p.resident)
            break;
    }
}

/* Adds U steps of a tap, a group of products. */
template <typename T, int BN, int MT, int U>
__device__ __forceinline__ void add_steps(float (&acc)[MT][BN / 2], uint64_t a, uint64_t w, int accumulate)
{
    constexpr int kRows = 64 * LTN_TMA_LINE / 16, kStep = LTN_TMA_STEP / 16;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < U; ++k)
#pragma unroll
        for (int m = 0; m < MT; ++m)
            product<T, BN>::add(acc[m], a + m * kRows + k * kStep, w + k * kStep, k > 0 ? 1 : accumulate);
    wgmma_commit();
}

template <typename T, int BN, int MT>
__device__ __forceinline__ void add_tap(float (&acc)[MT][BN / 2], uint64_t a, uint64_t w, int steps,
                                        int accumulate)
{
    if (steps == 4)
        add_steps<T, BN, MT, 4>(acc, a, w, accumulate);
    else if (steps == 2)
        add_steps<T, BN, MT, 2>(acc, a, w, accumulate);
    else if (steps == 1)
        add_steps<T, BN, MT, 1>(acc, a, w, accumulate);
    else
        add_steps<T, BN, MT, 3>(acc, a, w, accumulate);
}

/* Strip a and stage w are read; -1: none. */
__device__ __forceinline__ void release(barriers &bar, int lane, int a, int w)
{
    barrier_arrive_if(&bar.w_empty[w], lane == 0 && w >= 0);
    barrier_arrive_if(&bar.empty[a], lane == 0 && a >= 0);
}

template <typename T, int BN, int MT>
__device__ void multiply(const tma_params &p, uint32_t base, barriers &bar, int group)
{
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    turn a, w;
    int skip = group;           /* tiles of the other warpgroup before this one's next */
    uint32_t order = group ^ 1; /* the first turn is warpgroup 0's */

    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        if (skip-- > 0) {
            a.skip(p.n_strips, p.slots);
            w.skip(p.taps, p.stages);
            continue;
        }
        skip = 1;
        float acc[MT][BN / 2];
        int accumulate = 0, a_held = -1, w_held = -1; /* what the group of products before reads */
        barrier_wait(&bar.order[group], order);
        order ^= 1;
        for (int line = 0; line < p.strips.lines; ++line) {
            const int steps = line + 1 < p.strips.lines ? 4 : p.strips.last_steps;
            for (int u = 0; u < p.strips.rows; ++u)
                for (int phase = 0; phase < p.strips.phases; ++phase, a.next(p.slots)) {
                    const int taps = p.strips.phase[phase].taps;
                    uint64_t from = matrix_descriptor(base + a.at * p.slot_bytes) +
                                    p.strips.phase[phase].shift * (LTN_TMA_LINE / 16);
                    barrier_wait(&bar.full[a.at], a.phase);
                    for (int t = 0; t < taps; ++t, from += p.strips.apart * (LTN_TMA_LINE / 16)) {
                        barrier_wait(&bar.w_full[w.at], p.resident ? 0 : w.phase);
                        add_tap<T, BN, MT>(acc, from,
                                           matrix_descriptor(base + p.at_stages + w.at * (BN * LTN_TMA_LINE)),
                                           steps, accumulate);
                        accumulate = 1;
                        wgmma_wait<1>();
                        release(bar, lane, a_held, w_held);
                        w_held = p.resident ? -1 : w.at;
                        a_held = t + 1 == taps ? a.at : -1;
                        w.next(p.stages);
                    }
                }
        }
        barrier_arrive_if(&bar.order[group ^ 1], lane == 0);
        wgmma_wait<0>();
        pin(acc);
        release(bar, lane, a_held, w_held);
        const tile t = tile_at(p, index, BN);
        write_tile<T, BN, MT>(p, acc, t.first + warp * 16 + (lane >> 2), t);
    }
}

/* By all threads, each its barrier. */
__device__ __forceinline__ void begin(const tma_params &p, barriers &bar)
{
    const int i = threadIdx.x;
    if (i < p.slots) {
        barrier_init(&bar.full[i], 1);
        barrier_init(&bar.empty[i], 4);
    }
    if (i < p.stages) {
        barrier_init(&bar.w_full[i], 1);
        barrier_init(&bar.w_empty[i], 4);
    }
    if (i < 2)
        barrier_init(&bar.order[i], 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

template <typename T, int BN, int MT>
__global__ void __launch_bounds__(kBlock, 1)
    tma_kernel(const __grid_constant__ tma_params p, const __grid_constant__ CUtensorMap map)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ char raw[];
    const uint32_t base = (shared_address(raw) + 1023) & ~1023u;
    char *aligned = raw + (base - shared_address(raw));
    barriers &bar = *reinterpret_cast<barriers *>(aligned + p.at_barriers);
    if (threadIdx.x == 2 * kGroup)
        prefetch_map(&map);
    begin(p, bar);
    __syncthreads();
    const int group =
        __shfl_sync(0xFFFFFFFF, threadIdx.x / kGroup, 0); /* the compiler then knows that it is uniform */
    if (group < 2) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        multiply<T, BN, MT>(p, base, bar, group);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 2 * kGroup)
            load_strips<BN>(p, &map, base, bar);
        else if (threadIdx.x == 2 * kGroup + 32)
            load_filters<BN>(p, base, bar);
    }
#else
    __shared__ volatile char absent[1]; /* tells refuse() */
    absent[0] = 0;
    __trap();
#endif
}

/* ---- the operator ---- */

using tma_fn = void (*)(const tma_params, const CUtensorMap);

template <typename T> tma_fn kernel_of(const ltn_tma_plan &plan)
{
    return plan.bn == 128  ? tma_kernel<T, 128, 2>
           : plan.bn == 96 ? tma_kernel<T, 96, 2>
           : plan.mt == 4  ? tma_kernel<T, 64, 4>
                           : tma_kernel<T, 64, 2>;
}

/* The driver's encoder of such maps, without linking the driver. NULL where it has none. */
decltype(&cuTensorMapEncodeIm2col) im2col_encoder()
{
    static const auto fn = [] {
        void *p = nullptr;
        cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeIm2col", &p, 12000, cudaEnableDefault,
                                             &found) != cudaSuccess ||
            found != cudaDriverEntryPointSuccess)
            p = nullptr;
        return reinterpret_cast<decltype(&cuTensorMapEncodeIm2col)>(p);
    }();
    return fn;
}

struct tma_op {
    ltn_tma_plan plan;
    tma_fn kernel;
    tma_params params; /* but y and what depends on the number of images */
    int images;        /* at most, in one launch */
};

tma_params params_of(const ltn_tma_plan &plan, const ltn_conv_shape &s)
{
    tma_params p = {};
    p.y_image = static_cast<int64_t>(s.co) * plan.ho * plan.wo;
    p.y_row = static_cast<int64_t>(plan.wo) * s.co;
    p.y_col = s.co;
    p.y_channel = 1;
    p.y_group = p.cog = s.co / s.groups;
    p.by_wq = conv_divisor_of(plan.wq);
    p.by_hq = conv_divisor_of(plan.ho);
    p.by_n_tiles = conv_divisor_of(plan.n_tiles);
    p.ho = plan.ho;
    p.wo = plan.wo;
    p.tile_rows = 64 * plan.mt;
    p.relu = s.relu;
    p.whole = p.cog % plan.unit == 0;
    p.sh = s.sh;
    p.sw = s.sw;
    p.pt = s.pt;
    p.pl = s.pl;
    p.cg = s.ci / s.groups;
    p.strips = plan.strips;
    p.n_strips = plan.n_strips;
    p.taps = plan.taps;
    p.slots = plan.slots;
    p.stages = plan.stages;
    p.slot_bytes = plan.slot_bytes;
    p.strip_bytes = plan.load * LTN_TMA_LINE;
    p.at_stages = plan.at_stages;
    p.at_barriers = plan.at_barriers;
    p.resident = plan.resident;
    return p;
}

const char *refuse(const conv_device *dev, const ltn_conv_shape *s)
{
    ltn_tma_plan plan;
    cudaFuncAttributes kernel;
    if (dev->major != 9 || im2col_encoder() == nullptr ||
        cudaFuncGetAttributes(&kernel, tma_kernel<float, 64, 2>) != cudaSuccess ||
        kernel.sharedSizeBytes != 0)
        return "strips by the copy engine need a Hopper GPU, and to be built for sm_90a";
    if (ltn_tma_choose(&plan, s, nullptr, nullptr) != LTN_OK)
        return "not a shape for strips by the copy engine";
    return nullptr;
}

enum ltn_status create(conv_device *dev, conv_op *op, const float *filter, ltn_error *err)
{
    const ltn_conv_shape &s = op->base.shape;
    tma_op *f = static_cast<tma_op *>(calloc(1, sizeof(tma_op)));
    if (f == nullptr)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no memory for an operator");
    op->own = f;
    LTN_TRY(ltn_tma_choose(&f->plan, &s, nullptr, err));
    const ltn_tma_plan &plan = f->plan;
    f->kernel = s.type == LTN_CONV_BF16 ? kernel_of<__nv_bfloat16>(plan) : kernel_of<float>(plan);
    f->params = params_of(plan, s);
    /* positions and tiles of one launch are counted in 32 bits */
    int64_t per_image = static_cast<int64_t>(plan.ho) * plan.wq;
    int64_t most = INT32_MAX / 2 / (static_cast<int64_t>(plan.n_tiles) * s.groups);
    if (per_image > most)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "convolution: too large for fused im2win");
    f->images = static_cast<int>(most / per_image < s.n ? most / per_image : s.n);

    void *packed = malloc(plan.bytes);
    if (packed == nullptr)
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no memory for a packed filter of %zu bytes",
                        plan.bytes);
    ltn_tma_pack(&plan, &s, filter, packed);
    enum ltn_status status = conv_alloc(dev, &op->filter, plan.bytes, err);
    if (status == LTN_OK)
        status = dev->base.ops->upload(&dev->base, op->filter, packed, plan.bytes, err);
    free(packed);
    LTN_TRY(status);
    f->params.weights = static_cast<const char *>(op->filter);
    op->base.info.filter_bytes = plan.bytes;
    snprintf(op->base.info.variant, sizeof op->base.info.variant, "%s, tile %d x %d, filters %s",
             plan.overlap ? "rows" : "taps", 64 * plan.mt, plan.bn, plan.resident ? "resident" : "streamed");
    CONV_TRY(dev, err,
             cudaFuncSetAttribute(f->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes));
    return LTN_OK;
}

bool encode(CUtensorMap *map, const ltn_tma_plan &plan, const ltn_conv_shape &s, const void *x, int images)
{
    const cuuint64_t size = ltn_conv_type_size(s.type), ci = s.ci, wi = s.wi, hi = s.hi;
    const cuuint64_t dims[4] = {ci, wi, hi, static_cast<cuuint64_t>(images)};
    const cuuint64_t strides[3] = {ci * size, wi * ci * size, hi * wi * ci * size};
    const cuuint32_t steps[4] = {1, static_cast<cuuint32_t>(s.sw), static_cast<cuuint32_t>(s.sh), 1};
    int corners[4];
    ltn_tma_corners(&plan, &s, corners);
    return im2col_encoder()(
               map, size == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_TFLOAT32, 4,
               const_cast<void *>(x), dims, strides, corners, corners + 2, LTN_TMA_LINE / size, plan.load,
               steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

enum ltn_status run(conv_device *dev, conv_op *op, void *y, const void *x, void *, enum ltn_conv_part part,
                    ltn_error *err)
{
    const ltn_conv_shape &s = op->base.shape;
    const tma_op *f = static_cast<const tma_op *>(op->own);
    const int64_t size = static_cast<int64_t>(ltn_conv_type_size(s.type));
    tma_params p = f->params;
    p.bias = op->bias;
    if (!(part & LTN_CONV_KERNEL))
        return LTN_OK;
    for (int first = 0; first < s.n; first += f->images) {
        CUtensorMap map;
        p.n = s.n - first < f->images ? s.n - first : f->images;
        p.y = static_cast<char *>(y) + first * p.y_image * size;
        const char *from =
            static_cast<const char *>(x) + first * static_cast<int64_t>(s.ci) * s.hi * s.wi * size;
        if (!encode(&map, f->plan, s, from, p.n))
            return ltn_fail(err, LTN_ERR_DEVICE, "convolution: no tensor map for %d images of %d x %d x %d",
                            p.n, s.hi, s.wi, s.ci);
        int m_tiles = (p.n * f->plan.ho * f->plan.wq + p.tile_rows - 1) / p.tile_rows;
        p.by_m_tiles = conv_divisor_of(m_tiles);
        p.tiles = m_tiles * f->plan.n_tiles * s.groups;
        const int grid = p.tiles < dev->n_sms ? p.tiles : dev->n_sms;
        const tma_fn kernel = f->kernel;
        kernel<<<grid, kBlock, f->plan.shared_bytes, dev->stream>>>(p, map);
        CONV_TRY(dev, err, cudaGetLastError());
    }
    return LTN_OK;
}

void destroy(conv_device *, conv_op *op)
{
    free(op->own);
}

} // namespace

const struct conv_algo conv_fused_tma = {LTN_CONV_FUSED, refuse, create, run, destroy};
