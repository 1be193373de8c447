/* What batch.cu does, for bf16 weights on sm_90: y = x W^T + b for up to 64 rows, bound by reading W once.
 *
 * A block takes a tile of 64 BOXES outputs, all rows, and one of `splits` parts of the columns. One warp
 * keeps the copy engine at work on a ring of stages of 64 columns: the weights of the first of them are
 * fetched while the previous kernel still runs. A warpgroup multiplies 64 outputs (wgmma: the weights are its
 * M, the rows its N). The blocks with the parts of one tile are a cluster: each leaves its sums in its own
 * shared memory and adds up its share of the tile from all of them, in their order. Tiles and parts follow
 * from the sizes alone. */
#include "kernels/cuda/hopper.cuh"

#include "kernels/cuda/cuda.cuh"

enum {
    COLS = 64, /* of a stage: rows of 128 bytes */
    BOX = 64 * 128,
    MAX_SPLITS = 8,
};

struct batch_maps {
    CUtensorMap w, w2, x;
};

template <int BOXES, int N> struct geometry {
    static constexpr int THREADS = BOXES * 128; /* and a warp that fetches */
    static constexpr int STAGE = BOXES * BOX + N * 128;
    static constexpr int RING = 100 * 1024 / STAGE;
    static constexpr int M = 64 * BOXES, PITCH = M + 4; /* of the tile of sums, floats */
    static constexpr int SHARED = RING * STAGE + 1024 + 2 * RING * 8;
    static_assert(N * PITCH * 4 <= RING * STAGE, "the tile takes the ring's place");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* d (+)= A B^T, [64, N], the sum over 16 columns */
template <int N> struct product_of;
template <> struct product_of<16> {
    static __device__ __forceinline__ void run(float (&d)[8], uint64_t a, uint64_t b, int accumulate)
    {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, "
                     "%8, %9, p, 1, 1, 0, 0;\n}\n"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
                       "+f"(d[7])
                     : "l"(a), "l"(b), "r"(accumulate));
    }
};
template <> struct product_of<64> {
    static __device__ __forceinline__ void run(float (&d)[32], uint64_t a, uint64_t b, int accumulate)
    {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                     "%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, 0, 0;\n}\n"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
                       "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
                       "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
                       "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),
                       "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                     : "l"(a), "l"(b), "r"(accumulate));
    }
};

/* Four floats from the same place in block `rank` of the cluster. */
static __device__ __forceinline__ float4 load_there(uint32_t address, uint32_t rank)
{
    float4 v;
    asm volatile("{\n.reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}\n"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address), "r"(rank)
                 : "memory");
    return v;
}

static __device__ __forceinline__ void add(float4 &a, const float4 &b)
{
    a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
}

/* The sums of all parts of four outputs, in their order. */
static __device__ __forceinline__ float4 sum_parts(uint32_t address, int splits)
{
    float4 v[MAX_SPLITS];
#pragma unroll
    for (int s = 0; s < MAX_SPLITS; s++)
        if (s < splits)
            v[s] = load_there(address, s);
#pragma unroll
    for (int s = 1; s < MAX_SPLITS; s++)
        if (s < splits)
            add(v[0], v[s]);
    return v[0];
}

/* Four outputs of one row, with what is fused. */
static __device__ __forceinline__ void write_four(const struct product &p, int32_t row, int32_t out,
                                                  const float4 &sum, const float4 &sum2, bool vector)
{
    const int64_t at = (int64_t)row * p.outs + out;
    const float a[4] = {sum.x, sum.y, sum.z, sum.w}, b[4] = {sum2.x, sum2.y, sum2.z, sum2.w};
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const bool exists = out + i < p.outs;
        v[i] = a[i] + (p.bias && exists ? p.bias[out + i] : 0);
        if (p.w2)
            v[i] *= b[i] + (p.bias2 && exists ? p.bias2[out + i] : 0);
        if (out + i < p.act_cols)
            v[i] = activate(v[i], p.act);
    }
    if (p.out == OUT_ACT) {
        __nv_bfloat16 *y = (__nv_bfloat16 *)p.y + at;
        if (vector) {
            const __nv_bfloat162 lo = __floats2bfloat162_rn(v[0], v[1]),
                                 hi = __floats2bfloat162_rn(v[2], v[3]);
            *reinterpret_cast<uint2 *>(y) = make_uint2(*reinterpret_cast<const uint32_t *>(&lo),
                                                       *reinterpret_cast<const uint32_t *>(&hi));
        } else {
            for (int i = 0; i < 4 && out + i < p.outs; i++)
                y[i] = __float2bfloat16(v[i]);
        }
        return;
    }
    float *y = (float *)p.y + at;
    if (vector) {
        float4 old = make_float4(0, 0, 0, 0);
        if (p.out == OUT_ADD)
            old = load_fresh4(y);
        *reinterpret_cast<float4 *>(y) = make_float4(v[0] + old.x, v[1] + old.y, v[2] + old.z, v[3] + old.w);
    } else {
        for (int i = 0; i < 4 && out + i < p.outs; i++)
            y[i] = v[i] + (p.out == OUT_ADD ? load_fresh(y + i) : 0);
    }
}

#endif

/* Grid: (splits, tiles), a cluster per tile. With a second matrix it is the second box. */
template <int BOXES, int N>
static __global__ void __launch_bounds__(BOXES * 128 + 32, 2)
    batch_hopper_kernel(const __grid_constant__ struct product p,
                        const __grid_constant__ struct batch_maps maps)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using G = struct geometry<BOXES, N>;
    extern __shared__ uint8_t unaligned[];
    uint8_t *shared = unaligned + (-shared_address(unaligned) & 1023);
    uint64_t *full = reinterpret_cast<uint64_t *>(shared + G::RING * G::STAGE), *empty = full + G::RING;
    const uint32_t base = shared_address(shared);
    const int splits = gridDim.x, part = blockIdx.x;
    const int32_t out0 = (int32_t)blockIdx.y * (p.w2 ? 64 : G::M);
    const int32_t n_chunks = (p.cols + COLS - 1) / COLS;
    const int32_t from = n_chunks * part / splits, n = n_chunks * (part + 1) / splits - from;

    let_next_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < G::RING; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], BOXES * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        proxy_fence();
    }
    __syncthreads();
    if (threadIdx.x >= G::THREADS) {
        if (threadIdx.x == G::THREADS) {
            auto weights = [&](int32_t i, int slot) {
                barrier_arrive_expect(&full[slot], G::STAGE);
#pragma unroll
                for (int b = 0; b < BOXES; b++)
                    tma_load(base + slot * G::STAGE + b * BOX, b && p.w2 ? &maps.w2 : &maps.w,
                             (from + i) * COLS, out0 + (p.w2 ? 0 : b * 64), &full[slot]);
            };
            auto input = [&](int32_t i, int slot) {
                tma_load(base + slot * G::STAGE + BOXES * BOX, &maps.x, (from + i) * COLS, 0, &full[slot]);
            };
            const int32_t ahead = min(n, (int32_t)G::RING);
            for (int32_t i = 0; i < ahead; i++)
                weights(i, i);
            wait_for_previous();
            for (int32_t i = 0; i < ahead; i++)
                input(i, i);
            int slot = 0;
            uint32_t parity = 0;
            for (int32_t i = ahead; i < n; i++) {
                barrier_wait(&empty[slot], parity);
                weights(i, slot);
                input(i, slot);
                if (++slot == G::RING)
                    slot = 0, parity ^= 1;
            }
        }
        __syncwarp();
    } else {
        const int lane = threadIdx.x % 32, group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
        float d[N / 2];
        int slot = 0, before = 0;
        uint32_t parity = 0;
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            d[i] = 0;
        for (int32_t i = 0; i < n; i++) {
            barrier_wait(&full[slot], parity);
            const uint64_t a = matrix_descriptor(base + slot * G::STAGE + group * BOX);
            const uint64_t b = matrix_descriptor(base + slot * G::STAGE + BOXES * BOX);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++)
                product_of<N>::run(d, a + 2 * k, b + 2 * k, 1);
            wgmma_commit();
            wgmma_wait<1>();
            if (i > 0 && lane == 0)
                barrier_arrive(&empty[before]);
            before = slot;
            if (++slot == G::RING)
                slot = 0, parity ^= 1;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            asm volatile("" : "+f"(d[i])::"memory");
        asm volatile("bar.sync 1, %0;" ::"n"((int)G::THREADS)
                     : "memory"); /* nobody reads the ring any more */
        float *tile = reinterpret_cast<float *>(shared) + group * 64 + warp * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                tile[(j * 8 + lane % 4 * 2 + i % 2) * G::PITCH + i / 2 * 8] = d[j * 4 + i];
        wait_for_previous(); /* before y is touched */
    }
    cluster_sync();
    if (threadIdx.x < G::THREADS) {
        const int across = p.w2 ? 16 : G::M / 4, fours = across * p.rows;
        const bool vector = p.outs % 4 == 0 && (reinterpret_cast<uintptr_t>(p.y) & 15) == 0;
        for (int i = fours * part / splits + threadIdx.x; i < fours * (part + 1) / splits; i += G::THREADS) {
            const int row = i / across, column = i % across * 4;
            const int32_t out = out0 + column;
            if (out >= p.outs)
                continue;
            const uint32_t at = base + (row * G::PITCH + column) * 4;
            const float4 sum = sum_parts(at, splits);
            const float4 sum2 = p.w2 ? sum_parts(at + 64 * 4, splits) : make_float4(0, 0, 0, 0);
            write_four(p, row, out, sum, sum2, vector);
        }
    }
    if (splits > 1)
        cluster_sync(); /* others may still read from here */
#endif
}

/* ---- host ------------------------------------------------------------------------------------------------
 */

static bool encode(CUtensorMap *map, const void *base, int32_t rows, int32_t cols, uint32_t box_rows)
{
    return tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, base, rows, cols, cols, box_rows);
}

template <int BOXES, int N>
static enum ltn_status run(struct cuda_backend *be, const struct product *p, struct ltn_error *err)
{
    using G = struct geometry<BOXES, N>;
    const int32_t tiles = (p->outs + (p->w2 ? 64 : G::M) - 1) / (p->w2 ? 64 : G::M);
    const int32_t n_chunks = (p->cols + COLS - 1) / COLS;
    struct batch_maps maps;
    int splits = 1;
    /* Up to 128 blocks, which leave half of the shared memory to the next kernel, so that it can fetch; where
     * tiles alone come near that number, twice as many, as one block an SM does not keep the memory busy. No
     * block with fewer than two stages. */
    const int32_t most = tiles > 64 ? 256 : 128;
    while (splits < MAX_SPLITS && tiles * splits * 2 <= most && splits * 4 <= n_chunks)
        splits *= 2;
    memset(&maps, 0, sizeof maps);
    if (!encode(&maps.w, p->w, p->outs, p->cols, 64) ||
        (p->w2 && !encode(&maps.w2, p->w2, p->outs, p->cols, 64)) ||
        !encode(&maps.x, p->x, p->rows, p->cols, N))
        return ltn_fail(err, LTN_ERR_DEVICE, "%s: no tensor map for %d x %d weights", be->base.name, p->outs,
                        p->cols);
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = splits;
    attributes[0].val.clusterDim.y = 1;
    attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(splits, tiles);
    config.blockDim = dim3(G::THREADS + 32);
    config.dynamicSmemBytes = G::SHARED;
    config.stream = be->stream;
    config.attrs = attributes;
    config.numAttrs = may_overlap(be) ? 2 : 1;
    CUDA_TRY(be, err, (cudaLaunchKernelEx(&config, batch_hopper_kernel<BOXES, N>, *p, maps)));
    return LTN_OK;
}

enum ltn_status batch_hopper(struct cuda_backend *be, const struct product *p, struct ltn_error *err)
{
    if (p->w2 || p->outs >= 4096)
        return p->rows <= 16 ? run<2, 16>(be, p, err) : run<2, 64>(be, p, err);
    return p->rows <= 16 ? run<1, 16>(be, p, err) : run<1, 64>(be, p, err);
}

template <int BOXES, int N>
static enum ltn_status allow_shared(struct cuda_backend *be, struct ltn_error *err)
{
    CUDA_TRY(be, err,
             (cudaFuncSetAttribute(batch_hopper_kernel<BOXES, N>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   (int)geometry<BOXES, N>::SHARED)));
    return LTN_OK;
}

/* Built for sm_90a, not for another target whose kernels are empty? */
bool batch_hopper_open(struct cuda_backend *be, struct ltn_error *err)
{
    int major = 0, minor = 0;
    cudaFuncAttributes kernel;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, be->device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, be->device) != cudaSuccess ||
        major != 9 || minor != 0 || !tensor_map_encoder() ||
        cudaFuncGetAttributes(&kernel, batch_hopper_kernel<2, 64>) != cudaSuccess)
        return false;
    return allow_shared<2, 64>(be, err) == LTN_OK && allow_shared<2, 16>(be, err) == LTN_OK &&
           allow_shared<1, 64>(be, err) == LTN_OK && allow_shared<1, 16>(be, err) == LTN_OK;
}
