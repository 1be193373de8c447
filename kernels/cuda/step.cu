/* One token through the whole network in one launch: the kernel of decoding a single stream (sm_90).
 *
 * One block per SM stays for the whole token. Its rows of every matrix are known beforehand, and so is the
 * order in which it needs them: one warp does nothing but stream them, in bulk copies, into a ring of DEPTH
 * stages in shared memory, across layers and as far ahead as the ring goes. The other warps consume:
 *
 *   qkvu   [q k v u] = W Norm(x), q and k through the feature map
 *   mix    S <- S + k^T v - (1 - r) S, o = q S       (the state is fetched ahead)
 *   out    x += W_o (u * Norm(o))
 *   glu    h = (W_1 Norm(x)) * (W_2 Norm(x))
 *   l3     x += W_3 h
 *
 * What one block makes and all need travels in words of eight bytes: four of value, four of a tag that names
 * the launch, layer and phase. A word is written and read whole, so a reader that sees the tag it waits for
 * has the value too: there is neither a barrier among blocks nor a fence, and waiting costs one way to the L2
 * cache and one back. A word is written again only by a block that has seen values made of values ... made of
 * it by every block that reads it; suits() asks for the sizes that this hangs on.
 *
 * A stage holds up to ROWS rows of a matrix, UNIT columns of each for every warp. Each warp multiplies its
 * columns of all rows by its part of the input, which it holds in registers, and the WARPS sums of a row are
 * added up in a fixed order: sums follow from sizes alone. With 16-bit weights the tensor cores do it: a tile
 * of 16 x 16 weights is 8 rows of the matrix by two runs of columns, and of its 8 columns of input four are
 * used: the high and the low bf16 half of f32 input, for either run. Norms are scalars beside the product. */
#include "kernels/cuda/step.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* One of the warps that stream: a lane of each issues its share of every stage's rows. A copy costs its warp
 * some hundred cycles, which is why they are several. */
template <typename W> static __device__ void stream(const struct step_args &a, const struct room &m)
{
    constexpr int EACH = ROWS / (STREAMERS / 32);
    const int first = (threadIdx.x - THREADS) / 32 * EACH;
    struct position at = {0, 0};
    for (int32_t l = 0; l <= a.n_layers; l++) {
        for (int phase = 0; phase < (l == a.n_layers ? 1 : N_PHASES); phase++) {
            const struct share<W> s = share_of<W>(a, l, phase);
            const int32_t row_bytes = s.cols * (int32_t)sizeof(W);
            for (int32_t dot = 0; dot < s.n_dots; dot += ROWS) {
                const int32_t rows = min((int32_t)ROWS, s.n_dots - dot);
                for (int32_t from = 0; from < row_bytes; from += ROW_BYTES) {
                    const uint32_t bytes = min((int32_t)ROW_BYTES, row_bytes - from);
                    barrier_wait(&m.empty[at.stage], at.parity ^ 1);
                    if (first == 0)
                        barrier_arrive_expect(&m.full[at.stage], bytes * rows);
                    for (int32_t r = first; r < min(first + EACH, rows); r++)
                        bulk_load(m.ring + at.stage * STAGE_SIZE + r * ROW_BYTES,
                                  (const uint8_t *)s.row(dot + r) + from, bytes, &m.full[at.stage]);
                    at.next();
                }
            }
        }
    }
}

/* ---- the state ----------------------------------------------------------------------------------------- */

/* The state's part of a layer. Units of COLS columns of a head go round the blocks, then their halves. */
struct mixer {
    const struct step_args &a;
    const struct step_layer &l;
    int32_t d, per_head, n_units, row, col, per_unit;
    float4 held[HELD];
    float turns[HELD];

    __device__ mixer(const struct step_args &args, const struct step_layer &layer) : a(args), l(layer)
    {
        d = l.theta ? 2 * a.head_dim : a.head_dim;
        per_head = a.head_dim / COLS;
        n_units = a.n_heads * per_head;
        row = threadIdx.x % HALF / 2;
        col = threadIdx.x % 2 * 4;
        per_unit = (d + STATE_ROWS - 1) / STATE_ROWS;
    }

    __device__ int32_t unit(int32_t round) const
    {
        return (round * 2 + (int32_t)threadIdx.x / HALF) * (int32_t)gridDim.x + (int32_t)blockIdx.x;
    }

    __device__ float4 *state_at(int32_t u, int32_t r) const
    {
        const int32_t head = u / per_head;
        float *S = a.state + l.state_offset + (int64_t)head * d * a.head_dim;
        return reinterpret_cast<float4 *>(S + (int64_t)r * a.head_dim + u % per_head * COLS + col);
    }

    __device__ int32_t feature(int32_t u, int32_t r) const
    {
        return u / per_head * a.head_dim + (r < a.head_dim ? r : r - a.head_dim);
    }

    __device__ float turn(int32_t u, int32_t r, double pos) const
    {
        return l.theta ? lrpe_turn(l.theta[feature(u, r)], pos, r >= a.head_dim) : 1;
    }

    __device__ __forceinline__ void fetch(double pos)
    {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int32_t u = unit(i / per_unit), r = row + i % per_unit * STATE_ROWS;
            if (u < n_units && r < d) {
                held[i] = __ldcg(state_at(u, r));
                turns[i] = turn(u, r, pos);
            }
        }
    }

    template <typename W> __device__ __forceinline__ void run(const struct room &m, double pos, uint32_t tag)
    {
        const int lane = threadIdx.x % 32, half = threadIdx.x / HALF, warp = threadIdx.x % HALF / 32;
        const int32_t H = a.H;
        const uint64_t *q = a.words->qkvu;
        const uint32_t tag_in = tag + TAG_QKVU, tag_out = tag + TAG_MIX;
        for (int32_t round = 0; round * (int32_t)gridDim.x * 2 < n_units; round++) {
            const int32_t u = unit(round), first = u * COLS; /* = head * e + column within the head */
            const bool writes = (int)threadIdx.x % HALF < COLS && u < n_units;
            const uint64_t *gate_at = q + 3 * H + first + threadIdx.x % HALF;
            uint64_t gate = 0;
            float4 sum = make_float4(0, 0, 0, 0);
            if (u < n_units) {
                const float fade = -expm1f(-l.slopes[u / per_head]);
                const uint64_t *v_at = q + 2 * H + first + col;
                ulonglong2 v0 = look2(v_at), v1 = look2(v_at + 2);
                if (writes)
                    gate = look(gate_at);
                for (int32_t k = 0; k < per_unit; k++) {
                    const int32_t r = row + k * STATE_ROWS, i = round * per_unit + k;
                    if (r >= d)
                        break;
                    const uint64_t *q_at = q + feature(u, r), *k_at = q_at + H;
                    uint64_t qw = look(q_at), kw = look(k_at);
                    float4 *S = state_at(u, r), s;
                    float turned;
                    if (i < HELD) {
                        static_assert(HELD == 4, "all are named");
                        s = i == 0 ? held[0] : i == 1 ? held[1] : i == 2 ? held[2] : held[3];
                        turned = i == 0 ? turns[0] : i == 1 ? turns[1] : i == 2 ? turns[2] : turns[3];
                    } else {
                        s = __ldcg(S);
                        turned = turn(u, r, pos);
                    }
                    while (stale(v0.x, tag_in) || stale(v0.y, tag_in))
                        v0 = look2(v_at);
                    while (stale(v1.x, tag_in) || stale(v1.y, tag_in))
                        v1 = look2(v_at + 2);
                    const float qr = value_of(await(q_at, qw, tag_in)) * turned;
                    const float kr = value_of(await(k_at, kw, tag_in)) * turned;
                    s.x += kr * value_of(v0.x) - fade * s.x, s.y += kr * value_of(v0.y) - fade * s.y;
                    s.z += kr * value_of(v1.x) - fade * s.z, s.w += kr * value_of(v1.y) - fade * s.w;
                    __stcg(S, s);
                    sum.x += qr * s.x, sum.y += qr * s.y, sum.z += qr * s.z, sum.w += qr * s.w;
                }
            }
            for (int offset = 16; offset > 1; offset /= 2) {
                sum.x += __shfl_xor_sync(0xffffffffu, sum.x, offset);
                sum.y += __shfl_xor_sync(0xffffffffu, sum.y, offset);
                sum.z += __shfl_xor_sync(0xffffffffu, sum.z, offset);
                sum.w += __shfl_xor_sync(0xffffffffu, sum.w, offset);
            }
            if (lane < 2)
                *reinterpret_cast<float4 *>(m.mix + (half * (WARPS / 2) + warp) * COLS + col) = sum;
            meet();
            if (writes) {
                const int i = threadIdx.x % HALF;
                float total = 0;
                for (int w = 0; w < WARPS / 2; w++)
                    total += m.mix[(half * (WARPS / 2) + w) * COLS + i];
                const float up = value_of(await(gate_at, gate, tag_in));
                tell(a.words->o + place<W>(first + i), __float_as_uint(total * up), tag_out);
                float square = total * total;
                for (int offset = COLS / 2; offset > 0; offset /= 2)
                    square += __shfl_xor_sync(0xffu, square, offset);
                if (i == 0)
                    tell(a.words->squares + u, __float_as_uint(square), tag_out);
            }
            if ((round + 1) * (int32_t)gridDim.x * 2 < n_units)
                meet();
        }
    }

    /* Of all o, this warp's share; the same in all lanes. */
    __device__ __forceinline__ float sum_squares(uint32_t tag) const
    {
        float sum = 0;
        for (int32_t u = threadIdx.x; u < n_units; u += THREADS) {
            const uint64_t *at = a.words->squares + u;
            sum += value_of(await(at, look(at), tag));
        }
        return warp_sum(sum);
    }
};

template <typename W, int CHUNKS>
static __device__ __forceinline__ void consume(const struct step_args &a, const struct room &m)
{
    struct words &words = *a.words;
    uint32_t tag = __ldcg(&words.epoch);
    const double pos = (double)(a.pos + (a.steps ? __ldcg(a.steps) : 0));
    const W *token = (const W *)a.embed + (int64_t)__ldcg(a.id) * a.D;
    struct worker<W, CHUNKS> w(m);

    for (int32_t l = 0; l < a.n_layers; l++, tag += N_TAGS) {
        struct share<W> s = share_of<W>(a, l, QKVU);
        if (l == 0)
            w.embed(token, s.cols, a.embed_scale);
        else
            w.gather(words.x, s.cols, tag); /* l3 of the layer before */
        for (int32_t from = 0; from < s.n_dots; from += PASS) {
            const int32_t n = min((int32_t)PASS, s.n_dots - from);
            w.multiply(n, s.cols, w.sum_squares());
            for (int32_t i = threadIdx.x; i < n; i += THREADS) {
                float value = w.result(i) * w.inverse_rms(s.cols);
                const int32_t out = s.first + from + i;
                if (out < 2 * a.H)
                    value = activate(value, a.act);
                tell(words.qkvu + out, __float_as_uint(value), tag + TAG_QKVU);
            }
        }

        struct mixer mix(a, a.layers[l]);
        mix.fetch(pos);
        mix.template run<W>(m, pos, tag);

        s = share_of<W>(a, l, OUT);
        w.gather(words.o, s.cols, tag + TAG_MIX);
        const float squares = mix.sum_squares(tag + TAG_MIX);
        for (int32_t from = 0; from < s.n_dots; from += PASS) {
            const int32_t n = min((int32_t)PASS, s.n_dots - from);
            w.multiply(n, s.cols, squares);
            for (int32_t i = threadIdx.x; i < n; i += THREADS) {
                const int32_t out = s.first + from + i;
                const float old = l == 0 ? a.embed_scale * to_f32(token[out]) : m.own[from + i];
                const float value = old + w.result(i) * w.inverse_rms(s.cols);
                m.own[from + i] = value;
                tell(words.x + place<W>(out), __float_as_uint(value), tag + TAG_OUT);
            }
        }

        s = share_of<W>(a, l, GLU);
        w.gather(words.x, s.cols, tag + TAG_OUT);
        for (int32_t from = 0; from < s.n_dots; from += PASS) {
            const int32_t n = min((int32_t)PASS, s.n_dots - from);
            w.multiply(n, s.cols, w.sum_squares());
            for (int32_t i = threadIdx.x; i < n / 4; i += THREADS) { /* two outputs */
                const int32_t out = s.first + from / 2 + 2 * i;
                const float scale = w.inverse_rms(s.cols);
                const float h0 = (w.result(4 * i) * scale) * (w.result(4 * i + 1) * scale);
                const float h1 = (w.result(4 * i + 2) * scale) * (w.result(4 * i + 3) * scale);
                if (sizeof(W) == 4) {
                    tell(words.h + place<W>(out), __float_as_uint(h0), tag + TAG_GLU);
                    tell(words.h + place<W>(out + 1), __float_as_uint(h1), tag + TAG_GLU);
                } else {
                    const __nv_bfloat162 h = __floats2bfloat162_rn(h0, h1);
                    tell(words.h + place_pair(out), *reinterpret_cast<const uint32_t *>(&h), tag + TAG_GLU);
                }
            }
        }

        s = share_of<W>(a, l, L3);
        if constexpr (sizeof(W) == 4)
            w.gather(words.h, s.cols, tag + TAG_GLU);
        else
            w.gather_pairs(words.h, s.cols, tag + TAG_GLU);
        for (int32_t from = 0; from < s.n_dots; from += PASS) {
            const int32_t n = min((int32_t)PASS, s.n_dots - from);
            w.multiply(n, s.cols, 0);
            for (int32_t i = threadIdx.x; i < n; i += THREADS) {
                const float value = m.own[from + i] + w.result(i);
                m.own[from + i] = value;
                tell(words.x + place<W>(s.first + from + i), __float_as_uint(value), tag + TAG_L3);
            }
        }
    }

    const struct share<W> s = share_of<W>(a, a.n_layers, 0);
    w.gather(words.x, s.cols, tag);
    for (int32_t from = 0; from < s.n_dots; from += PASS) {
        const int32_t n = min((int32_t)PASS, s.n_dots - from);
        w.multiply(n, s.cols, w.sum_squares());
        for (int32_t i = threadIdx.x; i < n; i += THREADS)
            a.logits[s.first + from + i] = w.result(i) * w.inverse_rms(s.cols);
    }
    /* By now all blocks have seen the old one: this block has values that hang on values of all. */
    if (blockIdx.x == 0 && threadIdx.x == 0)
        words.epoch = tag;
}

#endif /* __CUDA_ARCH_FEAT_SM90_ALL */

template <typename W, int CHUNKS>
static __global__ void __launch_bounds__(THREADS + STREAMERS, 1)
    step_kernel(const __grid_constant__ struct step_args a)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(128) uint8_t shared[];
    struct room m;
    uint8_t *rest = shared + DEPTH * STAGE_SIZE;
    m.ring = shared_address(shared);
    m.full = reinterpret_cast<uint64_t *>(rest), m.empty = m.full + DEPTH;
    m.parts = reinterpret_cast<float *>(rest + DEPTH * 16);
    m.red = m.parts + 2 * WARPS * PASS;
    m.mix = m.red + 2 * WARPS;
    m.own = m.mix + WARPS * COLS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < DEPTH; i++) {
            barrier_init(&m.full[i], 1);
            barrier_init(&m.empty[i], WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        proxy_fence();
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (threadIdx.x % 32 == 0)
            stream<W>(a, m);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
        consume<W, CHUNKS>(a, m);
    }
#endif
}

/* ---- host ------------------------------------------------------------------------------------------------
 */

/* Stages that a row may take. */
enum { FEW = 6, MANY = 11 };

static int32_t max32(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

static int32_t stages_of(const struct ltn_network *net)
{
    const int32_t widest = max32(net->embed_dim, max32(net->hidden_dim, net->glu_dim));
    return (widest * (int32_t)ltn_dtype_size(net->embed.dtype) + ROW_BYTES - 1) / ROW_BYTES;
}

/* The released shapes and their kin: one gate in qkvu, SimpleRMSNorm, no biases, sizes in whole pieces, and a
 * row of qkvu and a pair of h at least for every block. */
static bool suits(const struct cuda_backend *be, const struct ltn_network *net, size_t *shared)
{
    if (ltn_is_quantised(net->embed.dtype))
        return false;
    const int32_t n = 16 / (int32_t)ltn_dtype_size(net->embed.dtype);
    const struct ltn_attention *first = &net->layers[0].attention;
    if (!be->step_words || net->gate_dim || net->n_layers > MAX_LAYERS || net->final_norm.weight ||
        net->act == LTN_ACT_EXP || first->head_dim % COLS || net->embed_dim % n || net->hidden_dim % n ||
        net->glu_dim % n || net->head.dtype != net->embed.dtype || !aligned16(net->head.data) ||
        !aligned16(net->embed.data))
        return false;
    if (net->embed_dim > MAX_DIM || net->hidden_dim > MAX_DIM || net->glu_dim > MAX_GLU ||
        stages_of(net) > (n == 4 ? (int)FEW : (int)MANY) || net->vocab_size > INT32_MAX / be->n_sms ||
        4 * net->hidden_dim < be->n_sms || net->glu_dim / 2 < be->n_sms)
        return false;
    for (int32_t l = 0; l < net->n_layers; l++) {
        const struct ltn_layer *y = &net->layers[l];
        const struct ltn_linear *all[] = {&y->qkv, &y->out, &y->l1, &y->l2, &y->l3};
        for (const struct ltn_linear *linear : all)
            if (linear->bias || linear->w.dtype != net->embed.dtype || !aligned16(linear->w.data))
                return false;
        if (y->token_norm.weight || y->attn_norm.weight || y->channel_norm.weight ||
            y->attention.state_offset % 4)
            return false;
    }
    *shared = DEPTH * (STAGE_SIZE + 16) +
              ((size_t)2 * WARPS * PASS + 2 * WARPS + WARPS * COLS + net->embed_dim / be->n_sms + 1) *
                  sizeof(float);
    return *shared <= be->max_shared;
}

template <typename W, int CHUNKS>
static enum ltn_status run(struct cuda_backend *be, const struct step_args &a, size_t shared,
                           struct ltn_error *err)
{
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(be->n_sms);
    config.blockDim = dim3(THREADS + STREAMERS);
    config.dynamicSmemBytes = shared;
    config.stream = be->stream;
    config.attrs = &together;
    config.numAttrs = 1;
    CUDA_TRY(be, err, (cudaLaunchKernelEx(&config, step_kernel<W, CHUNKS>, a)));
    return LTN_OK;
}

enum ltn_status cuda_step(struct ltn_backend *base, const struct ltn_network *net, const struct ltn_seq *seq,
                          const int32_t *id, float *logits, float *, void *, void *, void *,
                          struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    struct step_args a;
    size_t shared;

    if (!suits(be, net, &shared))
        return LTN_ERR_UNSUPPORTED;
    a.V = net->vocab_size, a.D = net->embed_dim, a.H = net->hidden_dim, a.G = net->glu_dim;
    a.n_heads = net->layers[0].attention.n_heads;
    a.head_dim = net->layers[0].attention.head_dim;
    a.n_layers = net->n_layers;
    a.act = net->act;
    a.embed_scale = net->embed_scale;
    a.embed = net->embed.data, a.head = net->head.data;
    a.id = id;
    a.steps = be->steps;
    a.pos = seq->pos;
    a.state = seq->state;
    a.logits = logits;
    a.words = static_cast<struct words *>(be->step_words);
    for (int32_t l = 0; l < net->n_layers; l++) {
        const struct ltn_layer *y = &net->layers[l];
        a.layers[l] = {
            y->qkv.w.data, y->out.w.data,       y->l1.w.data,       y->l2.w.data,
            y->l3.w.data,  y->attention.slopes, y->attention.theta, (int64_t)y->attention.state_offset};
    }
    const bool few = stages_of(net) <= FEW;
#define RUN(W, A)                                                                                            \
    (few || sizeof(W) == 4 ? run<W, FEW>(be, a, shared, err) : run < W,                                      \
     sizeof(W) == 4 ? FEW : MANY > (be, a, shared, err))
    return FOR_TYPES(be, err, net->embed.dtype, RUN);
#undef RUN
}

template <typename W, int CHUNKS>
static enum ltn_status allow_shared(struct cuda_backend *be, struct ltn_error *err)
{
    CUDA_TRY(be, err,
             (cudaFuncSetAttribute(step_kernel<W, CHUNKS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   (int)be->max_shared)));
    return LTN_OK;
}

enum ltn_status step_open(struct cuda_backend *be, struct ltn_error *err)
{
    int together = 0, major = 0, minor = 0;
    CUDA_TRY(be, err, cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, be->device));
    CUDA_TRY(be, err, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, be->device));
    CUDA_TRY(be, err, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, be->device));
    if (!together || major != 9 || minor != 0)
        return LTN_OK;
    LTN_TRY((allow_shared<float, FEW>(be, err)));
    LTN_TRY((allow_shared<__nv_bfloat16, FEW>(be, err)));
    LTN_TRY((allow_shared<__nv_bfloat16, MANY>(be, err)));
    LTN_TRY((allow_shared<__half, FEW>(be, err)));
    LTN_TRY((allow_shared<__half, MANY>(be, err)));
    CUDA_TRY(be, err, cudaMalloc(&be->step_words, sizeof(struct words)));
    CUDA_TRY(be, err, cudaMemsetAsync(be->step_words, 0, sizeof(struct words), be->stream));
    return LTN_OK;
}
