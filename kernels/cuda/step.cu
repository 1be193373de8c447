/* One token through the whole network in one launch: the kernel of decoding a single stream.
 *
 * One block per SM stays for the whole token. Its rows of every matrix are known beforehand, and so is the
 * order in which it needs them: one warp does nothing but stream them, in bulk copies, into a ring of tiles
 * in shared memory, across layers and as far ahead as the ring goes. The other warps consume:
 *
 *   qkvu   [q k v u] = W Norm(x), q and k through the feature map
 *   mix    S <- S + k^T v - (1 - r) S, o = q S       (the state is fetched ahead)
 *   out    x += W_o (u * Norm(o))
 *   glu    h = (W_1 Norm(x)) * (W_2 Norm(x))
 *   l3     x += W_3 h
 *
 * What one block makes and others need travels in words of eight bytes: four of value, four of a tag that
 * names launch, layer and phase. A word is written and read whole, so a reader that sees the tag it waits for
 * has the value too: there is neither a barrier among blocks nor a fence, and waiting costs one way to the L2
 * cache and one back.
 *
 * A word is written again only when all have read it. Every block has a row of qkvu and a pair of h at least
 * (suits() asks for it), and publishes results of a product when all its warps have read its input. So
 * whoever has all o of a layer knows that every block is done with the layer before, as o is made of all of
 * qkvu; and whoever has all h knows that every block has finished mix and out and read x of out. Hence:
 * x of out is written with all o at hand, x of l3 with all h, and both had been read in qkvu and glu;
 * h with all x of out, made with all o, so h of the layer before had been read in l3;
 * qkvu, and what mix makes of them, with all x of l3, made with all h, so those before had been read.
 *
 * A tile is a few rows of a matrix, so many columns of each for every warp. All warps work on all rows of a
 * block, with their columns of the input, and then the WARPS sums of a row are added: every sum has an order
 * that follows from the sizes of the model alone. With bf16 and quantised weights (step_quant.cuh) the tensor
 * cores multiply, with f16 and f32 the ordinary ones. With all but f32 the input is bf16, as the residual
 * stream is where it enters a product; what it is added to stays f32 in its block. Norms are scalars beside
 * the product. */
#include "kernels/cuda/step_quant.cuh"

/* ---- the state ----------------------------------------------------------------------------------------- */

/* The state's part of a layer. Units of COLS columns of a head go round the blocks, then their halves. */
struct mixer {
    const struct step_args &a;
    const struct step_layer &l;
    int32_t d, per_head, n_units, row, col, per_unit;
    float4 held[HELD];
    float turns[HELD];

    __device__ __forceinline__ mixer(const struct step_args &args, const struct step_layer &layer)
        : a(args), l(layer)
    {
        d = l.theta ? 2 * a.head_dim : a.head_dim;
        per_head = a.head_dim / COLS;
        n_units = a.n_heads * per_head;
        row = threadIdx.x % HALF / 2;
        col = threadIdx.x % 2 * 4;
        per_unit = (d + ROWS - 1) / ROWS;
    }

    __device__ __forceinline__ int32_t unit(int32_t round) const
    {
        return (round * 2 + (int32_t)threadIdx.x / HALF) * (int32_t)gridDim.x + (int32_t)blockIdx.x;
    }

    __device__ __forceinline__ float4 *place(int32_t u, int32_t r) const
    {
        const int32_t head = u / per_head;
        float *S = a.state + l.state_offset + (int64_t)head * d * a.head_dim;
        return reinterpret_cast<float4 *>(S + (int64_t)r * a.head_dim + u % per_head * COLS + col);
    }

    __device__ __forceinline__ int32_t feature(int32_t u, int32_t r) const
    {
        return u / per_head * a.head_dim + (r < a.head_dim ? r : r - a.head_dim);
    }

    __device__ __forceinline__ float turn(int32_t u, int32_t r, double pos) const
    {
        return l.theta ? lrpe_turn(l.theta[feature(u, r)], pos, r >= a.head_dim) : 1;
    }

    __device__ __forceinline__ void fetch(double pos)
    {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int32_t u = unit(i / per_unit), r = row + i % per_unit * ROWS;
            if (u < n_units && r < d) {
                held[i] = __ldcg(place(u, r));
                turns[i] = turn(u, r, pos);
            }
        }
    }

    template <typename W> __device__ __forceinline__ void run(const struct room &m, double pos, uint32_t tag)
    {
        const int lane = threadIdx.x % 32, half = threadIdx.x / HALF, warp = threadIdx.x % HALF / 32;
        const int32_t H = a.H;
        const uint64_t *q = a.words->qkvu;
        for (int32_t round = 0; round * (int32_t)gridDim.x * 2 < n_units; round++) {
            const int32_t u = unit(round), c = u * COLS, i = threadIdx.x % HALF;
            const bool writes = i < COLS && u < n_units;
            float up = 0;
            float4 sum = make_float4(0, 0, 0, 0);
            if (u < n_units) {
                const float fade = -expm1f(-l.slopes[u / per_head]);
                const uint64_t *v_at = q + 2 * H + c + col, *up_at = q + 3 * H + c + i;
                ulonglong2 v0 = look2(v_at), v1 = look2(v_at + 2);
                uint64_t up_word = writes ? look(up_at) : 0;
                const uint64_t *q_at = q + feature(u, min(row, d - 1));
                uint64_t q_word = look(q_at), k_word = look(q_at + H);
                for (;;) {
                    const bool again = stale(v0, tag + TAG_QKVU) || stale(v1, tag + TAG_QKVU) ||
                                       stale(q_word, tag + TAG_QKVU) || stale(k_word, tag + TAG_QKVU);
                    if (again)
                        v0 = look2(v_at), v1 = look2(v_at + 2), q_word = look(q_at), k_word = look(q_at + H);
                    if (!__any_sync(0xffffffffu, again))
                        break;
                }
                for (int32_t k = 0; k < per_unit; k++) {
                    const int32_t r = row + k * ROWS, held_at = round * per_unit + k;
                    if (r >= d)
                        break;
                    if (k) {
                        q_at = q + feature(u, r);
                        q_word = look(q_at), k_word = look(q_at + H);
                    }
                    float4 *S = place(u, r), s;
                    float turned;
                    if (held_at < HELD) {
                        static_assert(HELD == 2, "all are named");
                        s = held_at ? held[1] : held[0];
                        turned = held_at ? turns[1] : turns[0];
                    } else {
                        s = __ldcg(S);
                        turned = turn(u, r, pos);
                    }
                    const float qr = value_of(await(q_at, q_word, tag + TAG_QKVU)) * turned;
                    const float kr = value_of(await(q_at + H, k_word, tag + TAG_QKVU)) * turned;
                    s.x += kr * value_of(v0.x) - fade * s.x, s.y += kr * value_of(v0.y) - fade * s.y;
                    s.z += kr * value_of(v1.x) - fade * s.z, s.w += kr * value_of(v1.y) - fade * s.w;
                    __stcg(S, s);
                    sum.x += qr * s.x, sum.y += qr * s.y, sum.z += qr * s.z, sum.w += qr * s.w;
                }
                if (writes)
                    up = value_of(await(up_at, up_word, tag + TAG_QKVU));
            }
            /* Over the 16 lanes of a column; lane bits 4 and 3 say which of the four. */
            const bool b16 = lane & 16, b8 = lane & 8;
            const float s0 = (b16 ? sum.z : sum.x) + __shfl_xor_sync(0xffffffffu, b16 ? sum.x : sum.z, 16);
            const float s1 = (b16 ? sum.w : sum.y) + __shfl_xor_sync(0xffffffffu, b16 ? sum.y : sum.w, 16);
            float s = (b8 ? s1 : s0) + __shfl_xor_sync(0xffffffffu, b8 ? s0 : s1, 8);
            s += __shfl_xor_sync(0xffffffffu, s, 4);
            s += __shfl_xor_sync(0xffffffffu, s, 2);
            if ((lane & 6) == 0)
                m.mix[(half * (WARPS / 2) + warp) * COLS + col + lane / 8] = s;
            meet();
            if (writes) {
                float total = 0;
                for (int w = 0; w < WARPS / 2; w++)
                    total += m.mix[(half * (WARPS / 2) + w) * COLS + i];
                if (paired<W>::value) {
                    tell(a.words->gated + c + i, two_bf16(total, up), tag + TAG_MIX);
                } else {
                    tell(a.words->gated + 2 * (c + i), __float_as_uint(total), tag + TAG_MIX);
                    tell(a.words->gated + 2 * (c + i) + 1, __float_as_uint(up), tag + TAG_MIX);
                }
            }
            if ((round + 1) * (int32_t)gridDim.x * 2 < n_units)
                meet();
        }
    }
};

/* ---- the kernel ---------------------------------------------------------------------------------------- */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Tags begin again long before they could overflow, with all words cleared by the last block to leave. */
static __device__ void leave(struct words *words, uint32_t tag)
{
    if (tag < UINT32_MAX - 2 * N_TAGS * MAX_LAYERS) {
        if (blockIdx.x == 0 && threadIdx.x == 0)
            words->epoch = tag; /* all blocks have read the old one: this block has values from all */
        return;
    }
    if (threadIdx.x || atomicAdd(&words->left, 1) < gridDim.x - 1)
        return;
    for (uint32_t i = 0; i < sizeof *words / 16; i++)
        reinterpret_cast<uint4 *>(words)[i] = make_uint4(0, 0, 0, 0);
}

template <typename W>
static __device__ __forceinline__ void consume(const struct step_args &a, const struct room &m,
                                               const struct tile_ring<W> &ring)
{
    struct words &words = *a.words;
    uint32_t tag = __ldcg(&words.epoch);
    const double pos = (double)(a.pos + (a.steps ? __ldcg(a.steps) : 0));
    const struct embedding<W> token(a);
    struct worker<W> w(m, ring);
    float own = 0; /* of the residual stream: the row that this thread publishes in out and l3 */
    if ((int32_t)threadIdx.x < m.shares[OUT].n_dots)
        own = token(m.shares[OUT].first + threadIdx.x);

    for (int32_t l = 0; l < a.n_layers; l++, tag += N_TAGS) {
        const struct step_layer &layer = a.layers[l];
        struct mixer mix(a, layer);
        mix.fetch(pos);

        struct share s = m.shares[QKVU];
        w.prepare(s, source_of(a, l, QKVU));
        if (l == 0)
            w.gather_row(token, s.cols);
        else
            w.gather(words.x, s.cols, tag); /* l3 of the layer before */
        w.product(s, source_of(a, l, QKVU), [&](int32_t i, float sum, float scale) {
            if (i < s.n_dots) {
                sum *= scale;
                if (s.first + i < 2 * a.H)
                    sum = activate(sum, a.act);
                tell(words.qkvu + s.first + i, __float_as_uint(sum), tag + TAG_QKVU);
            }
        });
        mix.template run<W>(m, pos, tag);

        s = m.shares[OUT];
        const auto tell_x = [&](int32_t i, uint32_t with) {
            const float next = __shfl_down_sync(0xffffffffu, own, 1);
            if (i < s.n_dots && i % 2 == 0)
                tell_two<paired<W>::value>(words.x, s.first + i, own, next, with);
        };
        if (s.n_dots) {
            w.prepare(s, source_of(a, l, OUT));
            w.gather_gated(words.gated, s.cols, tag + TAG_MIX);
            w.product(s, source_of(a, l, OUT), [&](int32_t i, float sum, float scale) {
                own += sum * scale;
                tell_x(i, tag + TAG_OUT);
            });
        }

        s = m.shares[GLU];
        w.prepare(s, source_of(a, l, GLU));
        w.gather(words.x, s.cols, tag + TAG_OUT);
        w.product(s, source_of(a, l, GLU), [&](int32_t i, float sum, float scale) {
            sum *= scale;
            const float h = sum * __shfl_down_sync(0xffffffffu, sum, 1);
            const float next = __shfl_down_sync(0xffffffffu, h, 2);
            if (i < s.n_dots && i % 4 == 0)
                tell_two<paired<W>::value>(words.h, s.first + i / 2, h, next, tag + TAG_GLU);
        });

        s = m.shares[L3];
        if (s.n_dots) {
            w.prepare(s, source_of(a, l, L3));
            w.gather_act(words.h, s.cols, tag + TAG_GLU);
            w.product(s, source_of(a, l, L3), [&](int32_t i, float sum, float) {
                own += sum;
                tell_x(i, tag + TAG_L3);
            });
        }
    }
    const struct share s = m.shares[HEAD];
    w.prepare_last(s, source_of(a, 0, HEAD));
    w.gather_last(words.x, s.cols, tag);
    w.product_last(s, source_of(a, 0, HEAD), [&](int32_t i, float sum, float scale) {
        if (i < s.n_dots)
            a.logits[s.first + i] = sum * scale;
    });
    leave(a.words, tag);
}

#endif

template <typename W>
static __global__ void __launch_bounds__(THREADS + STREAMER, 1)
    step_kernel(const __grid_constant__ struct step_args a)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(128) uint4 shared[];
    struct room m;
    m.in = reinterpret_cast<float *>(shared + ring_bytes<W>(a.blocks) / 16);
    m.parts = m.in + a.max_input;
    m.mix = m.parts + 2 * GROUPS * WARPS * GROUP;
    m.red = m.mix + WARPS * COLS;
    m.shares = reinterpret_cast<struct share *>(m.red + 2 * WARPS);
    if (threadIdx.x <= HEAD)
        m.shares[threadIdx.x] = share_of(a, threadIdx.x);
    const struct tile_ring<W> r(shared, a.blocks);
    if (threadIdx.x == 0)
        r.open();
    __syncthreads();
    if (threadIdx.x >= THREADS)
        stream<W>(a, m.shares, r);
    else
        consume<W>(a, m, r);
#endif
}

/* ---- host ------------------------------------------------------------------------------------------------
 */

static int32_t max32(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

/* Floats of shared memory for a product's input. */
template <typename W> static int32_t input_floats(int32_t cols, W)
{
    return (cols + PAD - 1) / PAD * PAD;
}
template <typename Q> static int32_t input_floats(int32_t cols, struct quant<Q>)
{
    return input_bytes<Q>(cols) / (int32_t)sizeof(float);
}

/* The released shapes and their kin: one gate in qkvu, SimpleRMSNorm, no biases, sizes in whole pieces, and a
 * row of qkvu and a pair of h at least for every block. */
static bool suits(const struct cuda_backend *be, const struct ltn_network *net)
{
    const enum ltn_dtype dtype = net->layers[0].qkv.w.dtype;
    const bool quantised = ltn_is_quantised(dtype);
    const enum ltn_dtype outer = quantised ? LTN_Q8 : dtype;
    const int32_t n =
        quantised ? 8 * LTN_GROUP : 16 / (int32_t)ltn_dtype_size(dtype); /* 16 bytes, of scales too */
    const struct ltn_attention *first = &net->layers[0].attention;
    if (!be->step_words || net->gate_dim || net->n_layers > MAX_LAYERS || net->final_norm.weight ||
        net->act == LTN_ACT_EXP || first->head_dim % COLS || net->embed_dim % n || net->hidden_dim % n ||
        net->glu_dim % n || net->embed.dtype != outer || net->head.dtype != outer ||
        !aligned16(net->head.data) || !aligned16(net->head.scales) || !be->step_streams ||
        (quantised && be->base.act_dtype != LTN_BF16))
        return false;
    if (net->embed_dim > MAX_DIM || net->hidden_dim > MAX_DIM || net->glu_dim > MAX_GLU ||
        4 * net->hidden_dim < be->n_sms || net->glu_dim / 2 < be->n_sms || net->embed_dim > PASS * be->n_sms)
        return false;
    for (int32_t l = 0; l < net->n_layers; l++) {
        const struct ltn_layer *y = &net->layers[l];
        const struct ltn_linear *all[] = {&y->qkv, &y->out, &y->l1, &y->l2, &y->l3};
        for (const struct ltn_linear *linear : all)
            if (linear->bias || linear->w.dtype != dtype || !aligned16(linear->w.data) ||
                !aligned16(linear->w.scales))
                return false;
        if (y->token_norm.weight || y->attn_norm.weight || y->channel_norm.weight ||
            y->attention.state_offset % 4)
            return false;
    }
    return true;
}

/* Where a layer has so many bytes that warps work in two crews: measured at the released shapes, of which the
 * larger two have 28 and 110 MB a layer in q4 and twice that in 8 bits. Sums have another order then, so it
 * does not depend on the GPU. */
static bool is_large(const struct ltn_network *net)
{
    const enum ltn_dtype dtype = net->layers[0].qkv.w.dtype;
    const int64_t D = net->embed_dim, H = net->hidden_dim, G = net->glu_dim;
    return (5 * H + 3 * G) * (int64_t)ltn_row_bytes(dtype, (size_t)D) >= 80 << 20;
}

/* What is on its way delays what blocks tell each other, so the less a block has to fetch between two of
 * them, the lower the limit. Measured at the released shapes: 53, 211 and 770 KB of a product of 16 bits a
 * block. */
static void set_limits(struct step_args *a, const struct ltn_network *net, int32_t n_sms)
{
    const enum ltn_dtype dtype = net->layers[0].qkv.w.dtype;
    const int64_t D = net->embed_dim, H = net->hidden_dim, G = net->glu_dim;
    const int64_t row = ltn_row_bytes(dtype, (size_t)D) + ltn_row_scale_bytes(dtype, (size_t)D);
    const int64_t each = (5 * H + 3 * G) * row / N_PHASES / n_sms;
    a->coming = each < 128 << 10 ? 2 : each < 512 << 10 ? 3 : 4;
    a->coming_idle = 2;
    if (ltn_is_quantised(dtype))
        a->coming = each < 128 << 10 ? 2 : 3, a->coming_idle = 1;
}

template <typename W>
static enum ltn_status run(struct cuda_backend *be, struct step_args *a, struct ltn_error *err)
{
    a->max_input = input_floats(max32(a->D, max32(a->H, a->G)), W());
    if (a->embed_scales)
        a->max_input = max32(a->max_input, input_floats(a->D, quant<q8>()));
    a->blocks = ring<W>::blocks(*a);
    const size_t shared =
        ring_bytes<W>(a->blocks) + sizeof(struct share) * (HEAD + 1) +
        ((size_t)a->max_input + 2 * GROUPS * WARPS * GROUP + WARPS * COLS + 2 * WARPS) * sizeof(float);
    if (shared > be->max_shared)
        return LTN_ERR_UNSUPPORTED;
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(be->n_sms);
    config.blockDim = dim3(THREADS + STREAMER);
    config.dynamicSmemBytes = shared;
    config.stream = be->stream;
    config.attrs = &together;
    config.numAttrs = 1;
    CUDA_TRY(be, err, (cudaLaunchKernelEx(&config, step_kernel<W>, *a)));
    return LTN_OK;
}

enum ltn_status cuda_step(struct ltn_backend *base, const struct ltn_network *net, const struct ltn_seq *seq,
                          const int32_t *id, float *logits, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    struct step_args a;

    if (!suits(be, net))
        return LTN_ERR_UNSUPPORTED;
    a.V = net->vocab_size, a.D = net->embed_dim, a.H = net->hidden_dim, a.G = net->glu_dim;
    a.n_heads = net->layers[0].attention.n_heads;
    a.head_dim = net->layers[0].attention.head_dim;
    a.n_layers = net->n_layers;
    a.act = net->act;
    a.embed_scale = net->embed_scale;
    a.embed = net->embed.data, a.head = net->head.data;
    a.embed_scales = net->embed.scales, a.head_scales = net->head.scales;
    set_limits(&a, net, be->n_sms);
    a.id = id;
    a.steps = be->steps;
    a.pos = seq->pos;
    a.state = seq->state;
    a.logits = logits;
    a.words = static_cast<struct words *>(be->step_words);
    for (int32_t l = 0; l < net->n_layers; l++) {
        const struct ltn_layer *y = &net->layers[l];
        a.layers[l] = {y->qkv.w.data,
                       y->out.w.data,
                       y->l1.w.data,
                       y->l2.w.data,
                       y->l3.w.data,
                       {y->qkv.w.scales, y->out.w.scales, y->l1.w.scales, y->l2.w.scales, y->l3.w.scales},
                       y->attention.slopes,
                       y->attention.theta,
                       (int64_t)y->attention.state_offset};
    }
    const enum ltn_dtype dtype = net->layers[0].qkv.w.dtype;
#define RUN(W, A) run<W>(be, &a, err)
    const bool large = ltn_is_quantised(dtype) && is_large(net);
    return dtype == LTN_Q8    ? large ? RUN(quant<q8_large>, ) : RUN(quant<q8>, )
              : dtype == LTN_FP8 ? large ? RUN(quant<fp8_large>, ) : RUN(quant<fp8>, )
              : dtype == LTN_Q4 ? large ? RUN(quant<q4_large>, ) : RUN(quant<q4>, )
                                : FOR_TYPES(be, err, dtype, RUN);
#undef RUN
}

template <typename W> static enum ltn_status allow_shared(struct cuda_backend *be, struct ltn_error *err)
{
    CUDA_TRY(be, err,
             cudaFuncSetAttribute(step_kernel<W>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)be->max_shared));
    return LTN_OK;
}

enum ltn_status step_open(struct cuda_backend *be, struct ltn_error *err)
{
    int together = 0, major = 0, minor = 0;
    CUDA_TRY(be, err, cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, be->device));
    CUDA_TRY(be, err, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, be->device));
    CUDA_TRY(be, err, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, be->device));
    be->step_streams = major == 9 && minor == 0;
    if (!together)
        return LTN_OK;
    LTN_TRY(allow_shared<float>(be, err));
    LTN_TRY(allow_shared<__nv_bfloat16>(be, err));
    LTN_TRY(allow_shared<__half>(be, err));
    LTN_TRY(allow_shared<quant<q8>>(be, err));
    LTN_TRY(allow_shared<quant<q8_large>>(be, err));
    LTN_TRY(allow_shared<quant<fp8>>(be, err));
    LTN_TRY(allow_shared<quant<fp8_large>>(be, err));
    LTN_TRY(allow_shared<quant<q4>>(be, err));
    LTN_TRY(allow_shared<quant<q4_large>>(be, err));
    LTN_TRY(device_alloc(be, &be->step_words, sizeof(struct words), err));
    CUDA_TRY(be, err, cudaMemsetAsync(be->step_words, 0, sizeof(struct words), be->stream));
    return LTN_OK;
}
