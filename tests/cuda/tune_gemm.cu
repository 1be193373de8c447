/* Chooses cuBLASLt's algorithms for the products of the released shapes that the library does (gemm.cu), and
 * prints the rows of kernels/cuda/gemm_table.h (`make build/release/tests/cuda/tune_gemm` builds it).
 *
 * For each product: the library's first sixteen suggestions under the backend's workspace, each a median of
 * five times twelve runs over matrices beyond the L2; then the best of them and the first in turn, seven
 * times. It enters the table where it gained more than 1.5 % both times. Random data. */
#include "kernels/cuda/cuda.cuh"

#include <algorithm>
#include <cstdio>
#include <cublasLt.h>
#include <vector>

#define TRY(call)                                                                                            \
    do {                                                                                                     \
        const int code_ = (int)(call);                                                                       \
        if (code_) {                                                                                         \
            fprintf(stderr, "tune_gemm: %s failed with status %d (%s:%d)\n", #call, code_, __FILE__,         \
                    __LINE__);                                                                               \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

enum { SUGGESTIONS = 16, RUNS = 12, L2_BYTES = 50 << 20 };

static const int32_t BUCKETS[] = {64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 2816};

struct shape {
    int32_t outs, cols;
    enum product_out out;
};

/* as in model/config.c: q, k, v, u; out; l1 (and l2); l3; the head */
static const struct shape SHAPES[] = {
    {4096, 1024, OUT_ACT},  {1024, 1024, OUT_ADD},  {2816, 1024, OUT_ACT},  {1024, 2816, OUT_ADD},
    {64000, 1024, OUT_F32}, {8192, 2048, OUT_ACT},  {2048, 2048, OUT_ADD},  {5632, 2048, OUT_ACT},
    {2048, 5632, OUT_ADD},  {64000, 2048, OUT_F32}, {16384, 4096, OUT_ACT}, {4096, 4096, OUT_ADD},
    {11008, 4096, OUT_ACT}, {4096, 11008, OUT_ADD}, {64000, 4096, OUT_F32},
};

static __global__ void fill_kernel(__nv_bfloat16 *x, size_t n, uint32_t seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        uint32_t h = ((uint32_t)i ^ seed) * 2654435761u;
        h = (h ^ h >> 15) * 2246822519u;
        x[i] = __float2bfloat16(((h ^ h >> 13) >> 8) * 0x1p-23f - 1);
    }
}

static cublasLtHandle_t lt;
static cudaStream_t stream;
static void *workspace, *ws, *xs, *ys;

enum { ROOM = 640 << 20 };

struct problem {
    struct shape shape;
    int32_t rows;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t w, x, y;
    int copies; /* of w, used in turn */
    size_t w_bytes, x_bytes, y_bytes;
};

/* Microseconds a run; negative: it does not run. */
static float time_of(const struct problem *p, const cublasLtMatmulAlgo_t *algo, int times)
{
    std::vector<float> us;
    const float one = 1, beta = p->shape.out == OUT_ADD ? 1 : 0;
    cudaEvent_t from, to;
    int at = 0;
    TRY(cudaEventCreate(&from));
    TRY(cudaEventCreate(&to));
    for (int t = -1; t < times; t++) { /* the first warms up */
        float ms;
        TRY(cudaEventRecord(from, stream));
        for (int r = 0; r < RUNS; r++, at = (at + 1) % p->copies)
            if (cublasLtMatmul(lt, p->desc, &one, (uint8_t *)ws + at * p->w_bytes, p->w, xs, p->x, &beta, ys,
                               p->y, ys, p->y, algo, workspace, WORKSPACE_BYTES,
                               stream) != CUBLAS_STATUS_SUCCESS)
                return -1;
        TRY(cudaEventRecord(to, stream));
        TRY(cudaEventSynchronize(to));
        TRY(cudaEventElapsedTime(&ms, from, to));
        if (t >= 0)
            us.push_back(ms * 1000 / RUNS);
    }
    TRY(cudaEventDestroy(from));
    TRY(cudaEventDestroy(to));
    std::nth_element(us.begin(), us.begin() + times / 2, us.end());
    return us[times / 2];
}

static int config(const cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoConfigAttributes_t what, size_t bytes)
{
    uint32_t value = 0;
    size_t written;
    TRY(cublasLtMatmulAlgoConfigGetAttribute(algo, what, &value, bytes, &written));
    return (int)value;
}

static void tune(const struct shape *s, int32_t from, int32_t rows)
{
    const cudaDataType_t type_y = s->out == OUT_ACT ? CUDA_R_16BF : CUDA_R_32F;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const size_t room = WORKSPACE_BYTES;
    struct problem p = {};
    p.shape = *s;
    p.rows = rows;
    p.w_bytes = (size_t)s->outs * s->cols * 2;
    p.copies = (int)std::min<size_t>(ROOM / p.w_bytes, 2 + 2 * L2_BYTES / p.w_bytes);
    TRY(cublasLtMatmulDescCreate(&p.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    TRY(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    TRY(cublasLtMatrixLayoutCreate(&p.w, CUDA_R_16BF, s->cols, s->outs, s->cols));
    TRY(cublasLtMatrixLayoutCreate(&p.x, CUDA_R_16BF, s->cols, rows, s->cols));
    TRY(cublasLtMatrixLayoutCreate(&p.y, type_y, s->outs, rows, s->outs));

    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found[SUGGESTIONS];
    int n = 0, best = 0;
    float us[SUGGESTIONS];
    TRY(cublasLtMatmulPreferenceCreate(&preference));
    TRY(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room,
                                             sizeof room));
    TRY(cublasLtMatmulAlgoGetHeuristic(lt, p.desc, p.w, p.x, p.y, p.y, preference, SUGGESTIONS, found, &n));
    for (int i = 0; i < n; i++) {
        us[i] = found[i].state == CUBLAS_STATUS_SUCCESS ? time_of(&p, &found[i].algo, 5) : -1;
        if (us[i] > 0 && (us[best] < 0 || us[i] < us[best]))
            best = i;
    }
    if (n > 0 && best > 0 && us[0] > 1.015f * us[best]) {
        std::vector<float> one, two;
        for (int t = 0; t < 7; t++) {
            one.push_back(time_of(&p, &found[0].algo, 1));
            two.push_back(time_of(&p, &found[best].algo, 1));
        }
        std::sort(one.begin(), one.end());
        std::sort(two.begin(), two.end());
        if (one[3] > 1.015f * two[3]) {
            const cublasLtMatmulAlgo_t *a = &found[best].algo;
            static const char *const OUT[] = {"OUT_ACT", "OUT_ADD", "OUT_F32"};
            const char *out = s->out == OUT_ACT ? OUT[0] : s->out == OUT_ADD ? OUT[1] : OUT[2];
            printf("    {%d, %d, %s, %d, %d, %d, %d, %d, %d, %d, %d, %d, %d, %d}, /* %.1f us, not %.1f */\n",
                   s->outs, s->cols, out, from, rows, config(a, CUBLASLT_ALGO_CONFIG_ID, 4),
                   config(a, CUBLASLT_ALGO_CONFIG_TILE_ID, 4), config(a, CUBLASLT_ALGO_CONFIG_STAGES_ID, 4),
                   config(a, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, 4),
                   config(a, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, 4),
                   config(a, CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, 4),
                   config(a, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, 4),
                   config(a, CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, 2),
                   config(a, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, 2), two[3], one[3]);
            fflush(stdout);
        }
    }
    cublasLtMatmulPreferenceDestroy(preference);
    cublasLtMatmulDescDestroy(p.desc);
    for (cublasLtMatrixLayout_t layout : {p.w, p.x, p.y})
        cublasLtMatrixLayoutDestroy(layout);
}

int main(void)
{
    cudaDeviceProp prop;
    TRY(cudaGetDeviceProperties(&prop, 0));
    TRY(cudaStreamCreate(&stream));
    TRY(cublasLtCreate(&lt));
    for (void **p : {&ws, &xs, &ys})
        TRY(cudaMalloc(p, p == &ys ? (size_t)ROOM + (100 << 20) : (size_t)ROOM));
    TRY(cudaMalloc(&workspace, WORKSPACE_BYTES));
    for (void *p : {ws, xs})
        fill_kernel<<<1024, 256, 0, stream>>>((__nv_bfloat16 *)p, ROOM / 2, p == ws);
    TRY(cudaMemsetAsync(ys, 0, ROOM, stream));
    printf("/* %s, cuBLASLt %zu */\n", prop.name, cublasLtGetVersion());
    for (const struct shape &s : SHAPES)
        for (size_t b = 1; b < sizeof BUCKETS / sizeof *BUCKETS; b++) {
            /* where gemm_hopper.cu has enough tiles, linear.cu does not come here; the head does */
            const int64_t tiles = (int64_t)((BUCKETS[b - 1] + 256) / 256) * ((s.outs + 255) / 256);
            if (s.out == OUT_F32 ? BUCKETS[b] <= 1024 : tiles < 48)
                tune(&s, BUCKETS[b - 1], BUCKETS[b]);
        }
    return 0;
}
