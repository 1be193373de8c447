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
 * the product.
 *
 * A quarter of an SM keeps 32 KB of instructions; what is beyond takes twice as long, and more where warps
 * are apart. So a loop goes over the products of a layer, and their code has to be short.
 *
 * The launch before may still run when blocks begin: weights are fetched at once, all else waits for it. */
#include "kernels/cuda/step_plain.cuh"
#include "kernels/cuda/step_quant.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* ---- the state ----------------------------------------------------------------------------------------- */

/* What few layers or models need is called, not repeated, so that the code is short. */
static __device__ __noinline__ float turn_of(const float *theta, uint32_t feature, double pos, bool sine)
{
    return lrpe_turn(theta[feature], pos, sine);
}

/* The state's part of a layer. Units of COLS columns of a head go round the blocks, then their halves. */
template <typename W> struct mixer {
    static constexpr int WARPS = team<W>::WARPS, HALF = shape<W>::HALF, ROWS = shape<W>::ROWS;
    static constexpr int ROUNDS = 2, EARLY = 128 / ROWS; /* whose rows are fetched ahead, and how many */

    /* Where a unit is: its head, and its first column there. head < 0: there is none. */
    struct spot {
        int32_t head, col;
    };

    const struct step_args &a;
    int32_t row, col;
    struct spot spots[ROUNDS];
    float4 held[ROUNDS][EARLY];
    float slope; /* of the first unit's head */

    __device__ __forceinline__ mixer(const struct step_args &args) : a(args)
    {
        row = threadIdx.x % HALF / 2;
        col = threadIdx.x % 2 * 4;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++)
            spots[i] = spot_of(i);
    }

    __device__ __noinline__ struct spot spot_of(int32_t round) const
    {
        const uint32_t per_head = a.head_dim / COLS;
        const uint32_t unit = (round * 2 + threadIdx.x / HALF) * gridDim.x + blockIdx.x;
        const int32_t head = unit / per_head;
        return {head < a.n_heads ? head : -1, (int32_t)(unit - head * per_head) * COLS};
    }

    __device__ __forceinline__ const struct step_layer &layer(int32_t l) const
    {
        return a.layers[l % MAX_LAYERS];
    }
    __device__ __forceinline__ int32_t rows(int32_t l) const /* of a head's state */
    {
        return layer(l).theta ? 2 * a.head_dim : a.head_dim;
    }
    /* This thread's first row of a unit; the others are ROWS apart. */
    __device__ __forceinline__ float *first_row(int32_t l, const struct spot &at) const
    {
        return a.state + layer(l).state_offset + (int64_t)(at.head * rows(l) + row) * a.head_dim + at.col +
               col;
    }
    static __device__ __forceinline__ float4 load_row(const float *S)
    {
        return __ldcg(reinterpret_cast<const float4 *>(S));
    }

    /* Of a layer, what can be had before its q, k and v. */
    __device__ __forceinline__ void fetch(int32_t l)
    {
        if (spots[0].head >= 0)
            slope = __ldg(layer(l).slopes + spots[0].head);
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const float *S = first_row(l, spots[i]);
#pragma unroll
            for (int k = 0; k < EARLY; k++)
                if (spots[i].head >= 0 && row + k * ROWS < rows(l))
                    held[i][k] = load_row(S + k * ROWS * a.head_dim);
        }
    }

    __device__ __forceinline__ void run(const struct room &m, int32_t l, double pos, uint32_t tag)
    {
        const int lane = threadIdx.x % 32, half = threadIdx.x / HALF, warp = threadIdx.x % HALF / 32;
        const int32_t i = threadIdx.x % HALF, n_units = a.n_heads * (a.head_dim / COLS);
        const int32_t stride = ROWS * a.head_dim, d = rows(l);
        const float *theta = layer(l).theta;
        const uint32_t H = a.H, qkvu = tag + TAG_QKVU;
        const uint64_t *words = a.words->qkvu;
#pragma unroll 1
        for (int32_t round = 0; round * (int32_t)gridDim.x * 2 < n_units; round++) {
            float *sums = m.mix + (round % 2 * 2 + half) * (WARPS / 2) * COLS;
            const struct spot spot = round == 0 ? spots[0] : round == 1 ? spots[1] : spot_of(round);
            const uint32_t head = spot.head * a.head_dim, c = head + spot.col;
            const bool writes = i < COLS && spot.head >= 0;
            float up = 0;
            float4 sum = make_float4(0, 0, 0, 0);
            if (spot.head >= 0) {
                const float fade = -expm1f(-(round == 0 ? slope : __ldg(layer(l).slopes + spot.head)));
                float *S = first_row(l, spot);
#pragma unroll 1
                for (int32_t from = 0; from < d; from += EARLY * ROWS, S += EARLY * stride) {
                    float4 s[EARLY];
                    float turned[EARLY];
                    uint32_t features[EARLY];
#pragma unroll
                    for (int k = 0; k < EARLY; k++) {
                        const int32_t own = from + row + k * ROWS, r = min(own, d - 1);
                        features[k] = head + (r < a.head_dim ? r : r - a.head_dim);
                        s[k] = round == 0 ? held[0][k] : held[1][k];
                        turned[k] = 1;
                        if ((round >= ROUNDS || from > 0) && own < d)
                            s[k] = load_row(S + k * stride);
                        if (theta)
                            turned[k] = turn_of(theta, features[k], pos, r >= a.head_dim);
                    }
                    ulonglong2 v0, v1;
                    uint64_t q_word[EARLY], k_word[EARLY], up_word = (uint64_t)qkvu << 32;
                    bool again = true;
                    do {
                        if (again) {
                            v0 = look2(words + (2 * H + c + col)), v1 = look2(words + (2 * H + c + col + 2));
                            if (writes)
                                up_word = look(words + (3 * H + c + i));
#pragma unroll
                            for (int k = 0; k < EARLY; k++)
                                q_word[k] = look(words + features[k]),
                                k_word[k] = look(words + (H + features[k]));
                        }
                        again = stale(v0, qkvu) | stale(v1, qkvu) | stale(up_word, qkvu);
#pragma unroll
                        for (int k = 0; k < EARLY; k++)
                            again |= stale(q_word[k], qkvu) | stale(k_word[k], qkvu);
                    } while (__any_sync(0xffffffffu, again));
                    const float4 v =
                        make_float4(value_of(v0.x), value_of(v0.y), value_of(v1.x), value_of(v1.y));
                    up = value_of(up_word);
#pragma unroll
                    for (int k = 0; k < EARLY; k++)
                        if (from + row + k * ROWS < d) {
                            const float with_q = value_of(q_word[k]) * turned[k];
                            const float with_k = value_of(k_word[k]) * turned[k];
                            s[k].x += with_k * v.x - fade * s[k].x, s[k].y += with_k * v.y - fade * s[k].y;
                            s[k].z += with_k * v.z - fade * s[k].z, s[k].w += with_k * v.w - fade * s[k].w;
                            __stcg(reinterpret_cast<float4 *>(S + k * stride), s[k]);
                            sum.x += with_q * s[k].x, sum.y += with_q * s[k].y;
                            sum.z += with_q * s[k].z, sum.w += with_q * s[k].w;
                        }
                }
            }
            /* Over the 16 lanes of a column; lane bits 4 and 3 say which of the four. */
            const bool b16 = lane & 16, b8 = lane & 8;
            const float s0 = (b16 ? sum.z : sum.x) + __shfl_xor_sync(0xffffffffu, b16 ? sum.x : sum.z, 16);
            const float s1 = (b16 ? sum.w : sum.y) + __shfl_xor_sync(0xffffffffu, b16 ? sum.y : sum.w, 16);
            float s = (b8 ? s1 : s0) + __shfl_xor_sync(0xffffffffu, b8 ? s0 : s1, 8);
            s += __shfl_xor_sync(0xffffffffu, s, 4);
            s += __shfl_xor_sync(0xffffffffu, s, 2);
            if ((lane & 6) == 0)
                sums[warp * COLS + col + lane / 8] = s;
            meet<W>(); /* sums of the next round but one come after the next */
            if (writes) {
                const float total = tree<WARPS / 2>(sums + i, COLS);
                if (paired<W>::value) {
                    tell(a.words->gated + c + i, two_bf16(total, up), tag + TAG_MIX);
                } else {
                    tell(a.words->gated + 2 * (c + i), __float_as_uint(total), tag + TAG_MIX);
                    tell(a.words->gated + 2 * (c + i) + 1, __float_as_uint(up), tag + TAG_MIX);
                }
            }
        }
    }
};

/* ---- the kernel ---------------------------------------------------------------------------------------- */

static __device__ __noinline__ float other_feature(float x, enum ltn_act act)
{
    return activate(x, act);
}

/* The feature map; that of the released models without jumps. */
static __device__ __forceinline__ float feature(float x, enum ltn_act act)
{
    return act == LTN_ACT_SILU ? __fdividef(x, 1 + __expf(-x)) : other_feature(x, act);
}

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

    w.gather_row(token, m.shares[QKVU].cols);
    struct mixer<W> mix(a);
    for (int32_t l = 0; l < a.n_layers; l++, tag += N_TAGS) {
#pragma unroll 1
        for (int phase = 0; phase < N_PHASES; phase++) {
            const struct share s = m.shares[phase];
            if (phase == QKVU)
                mix.fetch(l);
            if (s.n_dots) {
                w.prepare(s, phase == GLU);
                if (phase == OUT)
                    w.gather_gated(words.gated, s.cols, tag + TAG_MIX);
                else if (phase != QKVU || l > 0) /* of QKVU, l3 of the layer before */
                    w.gather(phase == L3 ? words.h : words.x, s.cols,
                             phase == L3    ? tag + TAG_GLU
                             : phase == GLU ? tag + TAG_OUT
                                            : tag);
                w.product(s, source_of(a, l, phase), [&](int32_t i, float sum, float scale) {
                    if (phase == QKVU) {
                        sum *= scale;
                        if (s.first + i < 2 * a.H)
                            sum = feature(sum, a.act);
                        if (i < s.n_dots)
                            tell(words.qkvu + s.first + i, __float_as_uint(sum), tag + TAG_QKVU);
                    } else if (phase == GLU) {
                        sum *= scale;
                        const float h = sum * __shfl_down_sync(0xffffffffu, sum, 1);
                        const float next = __shfl_down_sync(0xffffffffu, h, 2);
                        if (i < s.n_dots && i % 4 == 0)
                            tell_two<paired<W>::value>(words.h, s.first + i / 2, h, next, tag + TAG_GLU);
                    } else {
                        own += phase == OUT ? sum * scale : sum;
                        const float next = __shfl_down_sync(0xffffffffu, own, 1);
                        if (i < s.n_dots && i % 2 == 0)
                            tell_two<paired<W>::value>(words.x, s.first + i, own, next,
                                                       tag + (phase == OUT ? TAG_OUT : TAG_L3));
                    }
                });
            }
            if (phase == QKVU)
                mix.run(m, l, pos, tag);
        }
    }
    const struct share s = m.shares[HEAD];
    w.prepare_last(s);
    w.gather_last(words.x, s.cols, tag);
    w.product_last(s, source_of(a, 0, HEAD), [&](int32_t i, float sum, float scale) {
        if (i < s.n_dots)
            a.logits[s.first + i] = sum * scale;
    });
    leave(a.words, tag);
}

#endif

template <typename W>
static __global__ void __launch_bounds__(shape<W>::THREADS + STREAMER, 1)
    step_kernel(const __grid_constant__ struct step_args a)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(128) uint4 shared[];
    constexpr int WARPS = team<W>::WARPS;
    struct room m;
    m.in = reinterpret_cast<float *>(shared + ring_bytes<W>(a.blocks) / 16);
    m.parts = m.in + a.max_input;
    m.mix = m.parts + 2 * WARPS * PASS;
    m.red = m.mix + 2 * WARPS * COLS;
    m.shares = reinterpret_cast<struct share *>(m.red + 2 * WARPS);
    if (threadIdx.x <= HEAD)
        m.shares[threadIdx.x] = share_of(a, threadIdx.x);
    const struct tile_ring<W> r(shared, a.blocks);
    if (threadIdx.x == 0)
        r.open();
    __syncthreads();
    if (threadIdx.x >= shape<W>::THREADS) {
        stream<W>(a, m.shares, r);
    } else {
        wait_for_previous();
        consume<W>(a, m, r);
    }
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
    constexpr int PAD = team<W>::WARPS * LANES * 8; /* columns that all warps have at once, at most */
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

/* What is on its way delays what blocks tell each other, so the less a block has to fetch between two of
 * them, the lower the limit. Measured at the released shapes: 53, 211 and 770 KB of a product of 16 bits a
 * block, of 4 bits 15, 59 and 233, of 8 bits twice that. Large copies are fetched sooner, but delay more. */
static void set_limits(struct step_args *a, const struct ltn_network *net, int32_t n_sms)
{
    const enum ltn_dtype dtype = net->layers[0].qkv.w.dtype;
    const int64_t D = net->embed_dim, H = net->hidden_dim, G = net->glu_dim;
    const int64_t row = ltn_row_bytes(dtype, (size_t)D) + ltn_row_scale_bytes(dtype, (size_t)D);
    const int64_t each = (5 * H + 3 * G) * row / N_PHASES / n_sms;
    a->coming = each < 128 << 10 ? 2 : each < 512 << 10 ? 3 : 4;
    a->coming_idle = 2;
    a->halves = false;
    if (ltn_is_quantised(dtype)) {
        a->halves = each >= 48 << 10;
        a->coming = a->halves && each < (dtype == LTN_FP8 ? 256 : 96) << 10 ? 2 : 3;
        a->coming_idle = dtype == LTN_Q8 && each >= 384 << 10 ? 2 : 1;
    }
}

template <typename W>
static enum ltn_status run(struct cuda_backend *be, struct step_args *a, struct ltn_error *err)
{
    constexpr int WARPS = team<W>::WARPS;
    a->max_input = input_floats(max32(a->D, max32(a->H, a->G)), W());
    if (a->embed_scales)
        a->max_input = max32(a->max_input, input_floats(a->D, quant<q8>()));
    const size_t others =
        ring_bytes<W>(0) + sizeof(struct share) * (HEAD + 1) +
        ((size_t)a->max_input + 2 * WARPS * PASS + 2 * WARPS * COLS + 2 * WARPS) * sizeof(float);
    if (others > be->max_shared)
        return LTN_ERR_UNSUPPORTED;
    a->blocks = ring<W>::blocks(*a, be->max_shared - others);
    if (a->blocks < 0)
        return LTN_ERR_UNSUPPORTED;
    const size_t shared = others + (size_t)a->blocks * ring<W>::BLOCK;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(be->n_sms);
    config.blockDim = dim3(shape<W>::THREADS + STREAMER);
    config.dynamicSmemBytes = shared;
    config.stream = be->stream;
    config.attrs = attributes;
    config.numAttrs = may_overlap(be) ? 2 : 1;
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
    return dtype == LTN_Q8    ? RUN(quant<q8>, )
           : dtype == LTN_FP8 ? RUN(quant<fp8>, )
           : dtype == LTN_Q4  ? RUN(quant<q4>, )
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
    LTN_TRY(allow_shared<quant<fp8>>(be, err));
    LTN_TRY(allow_shared<quant<q4>>(be, err));
    LTN_TRY(device_alloc(be, &be->step_words, sizeof(struct words), err));
    CUDA_TRY(be, err, cudaMemsetAsync(be->step_words, 0, sizeof(struct words), be->stream));
    return LTN_OK;
}
