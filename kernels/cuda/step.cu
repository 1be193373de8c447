/* One token through the whole network in one launch: the kernel of decoding a single stream.
 *
 * One block per SM stays for the whole token. Its share of every matrix is known beforehand, and so is the
 * order in which it needs it: each thread keeps DEPTH 16-byte pieces of weights on their way into its own
 * slots of shared memory, across layers and across the barriers at which all blocks wait for each other. So
 * memory is busy while the arithmetic waits, and what a layer costs beyond its bytes is five barriers:
 *
 *   qkvu   [q k v u] = W Norm(x), q and k through the feature map
 *   mix    S <- S + k^T v - (1 - r) S, o = q S       (the state is fetched before the barrier)
 *   out    x += W_o (u * Norm(o))
 *   glu    h = (W_1 Norm(x)) * (W_2 Norm(x))
 *   l3     x += W_3 h
 *
 * A block owns the same part of the residual stream in `out` and in `l3`, and keeps it. Norms are scalars
 * beside the product, as in gemv.cu. Every sum has an order that follows from sizes alone. */
#include "kernels/cuda/dot.cuh"
#include "kernels/cuda/quant.cuh"

enum {
    WARPS = 16,
    THREADS = 32 * WARPS,
    MAX_LAYERS = 64,
    COLS = 8, /* columns of a head's state that half a block works on */
    HALF = THREADS / 2,
    ROWS = HALF / 2, /* rows of the state at once: two threads hold COLS columns */
    HELD = 4,        /* pieces of the state that a thread fetches ahead */
};

struct step_layer {
    const void *qkvu, *out, *l1, *l2, *l3;
    struct quant_scales qkvu_scales, out_scales, glu_scales, l3_scales;
    const float *slopes, *theta;
    int64_t state_offset;
};

struct step_args {
    int32_t V, D, H, G, n_heads, head_dim, n_layers;
    enum ltn_act act;
    float embed_scale;
    const void *embed, *head;
    struct quant_scales embed_scales, head_scales;
    const int32_t *id;
    const int64_t *steps; /* NULL, or added to pos */
    int64_t pos;
    float *state;
    float *logits, *x;
    void *qkv, *o, *h;
    uint32_t *barrier;           /* [2] blocks that arrived, blocks that left; zero between launches */
    int32_t max_input, max_sums; /* floats */
    struct step_layer layers[MAX_LAYERS];
};

enum phase { QKVU, OUT, GLU, L3, N_PHASES }; /* of a layer; after the last layer comes the head */

/* What a product is of: sizes, and the outputs of this block. Worked out once, for each phase and the head.
 */
struct extent {
    int32_t outs, cols, first, n_outs;
};

static __device__ void extent_of(struct extent *e, const struct step_args &a, int phase)
{
    e->outs = phase == QKVU ? 4 * a.H : phase == GLU ? a.G : phase == N_PHASES ? a.V : a.D;
    e->cols = phase == OUT ? a.H : phase == L3 ? a.G : a.D;
    e->first = (int32_t)((int64_t)e->outs * blockIdx.x / gridDim.x);
    e->n_outs = (int32_t)((int64_t)e->outs * (blockIdx.x + 1) / gridDim.x) - e->first;
}

/* A warp's share of one product: dots group, group + groups, ... of its block's, pieces [32 from, 32 to). */
template <typename W> struct share {
    const W *w, *w2;
    int32_t first, n_outs, n_dots, cols, n_pieces;
    int32_t split, part, group, groups, from, to;

    __device__ const W *row(int32_t dot) const
    {
        const W *base = w2 && (dot & 1) ? w2 : w;
        return base + (int64_t)(first + (w2 ? dot >> 1 : dot)) * cols;
    }
    __device__ bool empty() const
    {
        return from >= to || group >= n_dots;
    }
};

template <typename W>
static __device__ void part_out(struct share<W> &s, const void *w, const void *w2,
                                const struct quant_scales &, const struct extent &e)
{
    const int32_t warp = threadIdx.x / 32;
    s.w = (const W *)w, s.w2 = (const W *)w2;
    s.cols = e.cols, s.first = e.first, s.n_outs = e.n_outs;
    s.n_dots = s.w2 ? 2 * s.n_outs : s.n_outs;
    s.n_pieces = s.cols / piece<W, true>::N;
    s.split = split_of(s.w2 ? 2 * e.outs : e.outs);
    s.part = warp % s.split, s.group = warp / s.split, s.groups = WARPS / s.split;
    const int32_t n_steps = (s.n_pieces + 31) / 32, per_part = (n_steps + s.split - 1) / s.split;
    s.from = min(s.part * per_part, n_steps), s.to = min(s.from + per_part, n_steps);
}

template <typename W>
static __device__ struct share<W> share_of(const struct step_args &a, const struct extent *extents,
                                           int32_t at) {
    struct share<W> s;
    const int32_t layer = at / N_PHASES;
    if (layer == a.n_layers) {
        part_out(s, a.head, NULL, a.head_scales, extents[N_PHASES]);
        return s;
    }
    const struct step_layer &l = a.layers[layer];
    switch (at % N_PHASES) {
    case QKVU:
        part_out(s, l.qkvu, NULL, l.qkvu_scales, extents[QKVU]);
        break;
    case OUT:
        part_out(s, l.out, NULL, l.out_scales, extents[OUT]);
        break;
    case GLU:
        part_out(s, l.l1, l.l2, l.glu_scales, extents[GLU]);
        break;
    default:
        part_out(s, l.l3, NULL, l.l3_scales, extents[L3]);
    }
    return s;
}

/* Pieces in flight, and the bytes of their slots. */
template <typename W>
struct ring_size {
    static constexpr int DEPTH = 20, BYTES = DEPTH * THREADS * 16;
};

/* The weights of this thread in the order of their use, as many pieces ahead of it as the ring holds. */
template <typename W> struct feed {
    const struct step_args &a;
    const struct extent *extents;
    uint4 *slots;
    struct share<W> s;
    const W *row;
    int32_t at, last, dot, step;

    __device__ feed(const struct step_args &args, const struct extent *all, uint4 *shared, int32_t products)
        : a(args), extents(all)
    {
        slots = shared + threadIdx.x;
        at = 0, last = products - 1;
        enter();
        for (int i = 0; i < ring_size<W>::DEPTH; i++)
            fetch(i);
    }

    __device__ void enter()
    {
        for (; at <= last; at++) {
            s = share_of<W>(a, extents, at);
            if (!s.empty()) {
                dot = s.group, step = s.from;
                row = s.row(dot);
                return;
            }
        }
    }

    __device__ void fetch(int slot)
    {
        if (at <= last) {
            const int32_t i = step * 32 + threadIdx.x % 32;
            if (i < s.n_pieces)
                copy_async(slots + slot * THREADS, row + i * piece<W, true>::N);
            if (++step == s.to) {
                step = s.from;
                dot += s.groups;
                if (dot < s.n_dots) {
                    row = s.row(dot);
                } else {
                    at++;
                    enter();
                }
            }
        }
        end_copy_group();
    }
};

/* All blocks wait for each other; what was written before is visible after. */
struct barrier {
    uint32_t *count;
    uint32_t target;

    __device__ void arrive()
    {
        __syncthreads();
        target += gridDim.x;
        if (threadIdx.x == 0)
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
    }

    __device__ void wait()
    {
        if (threadIdx.x == 0) {
            uint32_t seen;
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
            } while (seen < target);
        }
        __syncthreads();
    }

    /* The last block to leave makes it ready for the next launch: by then all have left wait(). */
    __device__ void leave()
    {
        if (threadIdx.x == 0 && atomicAdd(count + 1, 1) == gridDim.x - 1) {
            count[0] = 0;
            count[1] = 0;
        }
    }
};

/* Shared memory beside the slots. */
struct room {
    float *in;   /* [max_input] the input of the product */
    float *sums; /* [max_sums] the warps' results */
    float *own;  /* [D / blocks] this block's part of the residual stream */
    float *red;  /* [WARPS] sums of squares */
    float *mix;  /* [2][WARPS / 2][COLS] */
};

/* Leaves an input in shared memory and the warps' sums of squares in red; value(c) gives what to square and
 * what to stage of columns c .. c + 3. */
template <typename W, typename F>
static __device__ __forceinline__ void stage(const struct room &m, const struct share<W> &s, F value)
{
    const int32_t cols = s.cols;
    float sum = 0;
    for (int32_t c = threadIdx.x * 4; c < cols; c += THREADS * 4) {
        float4 square, v;
        value(c, square, v);
        sum += square.x * square.x + square.y * square.y + square.z * square.z + square.w * square.w;
        *reinterpret_cast<float4 *>(m.in + stage_at<W, true>(c, cols)) = v;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        m.red[threadIdx.x / 32] = sum;
    __syncthreads();
}

static __device__ float inverse_rms(const struct room &m, int32_t cols)
{
    float sum = 0;
    for (int w = 0; w < WARPS; w++)
        sum += m.red[w];
    return rsqrtf(sum / cols + 1e-6f);
}

/* The block's dots with the staged input, into m.sums; ends with a barrier of the block. */
template <typename W>
static __device__ __forceinline__ void multiply(const struct room &m, const struct share<W> &s,
                                                struct feed<W> &f, int &slot)
{
    constexpr int DEPTH = ring_size<W>::DEPTH;
    const int lane = threadIdx.x % 32;
    if (!s.empty()) {
        for (int32_t i = s.group; i < s.n_dots; i += s.groups) {
            float acc = 0;
            for (int32_t step = s.from; step < s.to; step++) {
                const int32_t at = step * 32 + lane;
                wait_copy_groups<DEPTH - 1>();
                if (at < s.n_pieces)
                    acc = dot<W>::wide(f.slots[slot * THREADS], m.in, at, s.n_pieces, acc);
                f.fetch(slot);
                slot = slot == DEPTH - 1 ? 0 : slot + 1;
            }
            acc = warp_sum(acc);
            if (lane == 0)
                m.sums[i * s.split + s.part] = acc;
        }
    } else if (lane == 0) {
        for (int32_t i = s.group; i < s.n_dots; i += s.groups)
            m.sums[i * s.split + s.part] = 0;
    }
    __syncthreads();
}

template <typename W>
static __device__ float result(const struct room &m, const struct share<W> &s, int32_t dot)
{
    float value = 0;
    for (int i = 0; i < s.split; i++)
        value += m.sums[dot * s.split + i];
    return value;
}

/* Element c of the embedding of a token. */
template <typename W> struct embedding {
    const W *row;
    float scale;

    __device__ embedding(const struct step_args &a)
    {
        row = (const W *)a.embed + (int64_t)__ldcg(a.id) * a.D;
        scale = a.embed_scale;
    }
    __device__ float operator()(int32_t c) const
    {
        return scale * to_f32(row[c]);
    }
};

/* The type of the head's weights beside layers in W. */
template <typename W> struct head_weights {
    typedef W type;
};

#include "kernels/cuda/step_quant.cuh"

/* The state's part of a layer. Units of COLS columns of a head go round the halves of the blocks. */
struct mixer {
    const struct step_args &a;
    const struct step_layer &l;
    int32_t d, per_head, n_units, row, col;
    float4 held[HELD];

    __device__ mixer(const struct step_args &args, const struct step_layer &layer) : a(args), l(layer)
    {
        d = l.theta ? 2 * a.head_dim : a.head_dim;
        per_head = a.head_dim / COLS;
        n_units = a.n_heads * per_head;
        row = threadIdx.x % HALF / 2;
        col = threadIdx.x % 2 * 4;
    }

    __device__ int32_t unit(int32_t round) const
    {
        return (round * (int32_t)gridDim.x + (int32_t)blockIdx.x) * 2 + threadIdx.x / HALF;
    }

    __device__ float4 *place(int32_t u, int32_t r) const
    {
        const int32_t head = u / per_head;
        float *S = a.state + l.state_offset + (int64_t)head * d * a.head_dim;
        return reinterpret_cast<float4 *>(S + (int64_t)r * a.head_dim + u % per_head * COLS + col);
    }

    __device__ void fetch()
    {
        const int32_t per_unit = (d + ROWS - 1) / ROWS;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int32_t u = unit(i / per_unit), r = row + i % per_unit * ROWS;
            if (u < n_units && r < d)
                held[i] = __ldcg(place(u, r));
        }
    }

    template <typename A> __device__ void run(const struct room &m, double pos)
    {
        const int lane = threadIdx.x % 32, half = threadIdx.x / HALF, warp = threadIdx.x % HALF / 32;
        const int32_t e = a.head_dim, H = a.H;
        const int32_t per_unit = (d + ROWS - 1) / ROWS;
        const A *q = (const A *)a.qkv;
        for (int32_t round = 0; round * (int32_t)gridDim.x * 2 < n_units; round++) {
            const int32_t u = unit(round), head = u / per_head;
            float4 sum = make_float4(0, 0, 0, 0);
            if (u < n_units) {
                const float fade = (float)-expm1(-(double)l.slopes[head]);
                const int32_t c = head * e + u % per_head * COLS + col;
                const float4 v = load_fresh4(q + 2 * H + c);
                for (int32_t k = 0; k < per_unit; k++) {
                    const int32_t r = row + k * ROWS, i = round * per_unit + k;
                    if (r >= d)
                        break;
                    const int32_t feature = head * e + (r < e ? r : r - e);
                    const float turn = l.theta ? lrpe_turn(l.theta[feature], pos, r >= e) : 1;
                    const float qr = load_fresh(q + feature) * turn, kr = load_fresh(q + H + feature) * turn;
                    float4 *S = place(u, r), s;
                    if (i < HELD) {
#pragma unroll
                        for (int j = 0; j < HELD; j++)
                            if (i == j)
                                s = held[j];
                    } else {
                        s = __ldcg(S);
                    }
                    s.x += kr * v.x - fade * s.x, s.y += kr * v.y - fade * s.y;
                    s.z += kr * v.z - fade * s.z, s.w += kr * v.w - fade * s.w;
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
            __syncthreads();
            if (threadIdx.x % HALF < COLS && u < n_units) {
                float total = 0;
                for (int w = 0; w < WARPS / 2; w++)
                    total += m.mix[(half * (WARPS / 2) + w) * COLS + threadIdx.x % HALF];
                ((A *)a.o)[head * e + u % per_head * COLS + threadIdx.x % HALF] = from_f32<A>(total);
            }
            __syncthreads();
        }
    }
};

template <typename W, typename A>
static __global__ void __launch_bounds__(THREADS, 1) step_kernel(const __grid_constant__ struct step_args a)
{
    extern __shared__ uint4 shared[];
    __shared__ struct extent extents[N_PHASES + 1];
    if (threadIdx.x <= N_PHASES)
        extent_of(&extents[threadIdx.x], a, threadIdx.x);
    __syncthreads();
    struct room m;
    m.in = reinterpret_cast<float *>(shared + ring_size<W>::BYTES / 16);
    m.sums = m.in + a.max_input;
    m.mix = m.sums + a.max_sums;
    m.red = m.mix + WARPS * COLS;
    m.own = m.red + WARPS;

    struct feed<W> f(a, extents, shared, N_PHASES * a.n_layers + 1);
    struct barrier all = {a.barrier, 0};
    const double pos = (double)(a.pos + (a.steps ? __ldcg(a.steps) : 0));
    const struct embedding<W> token(a);
    int slot = 0;
    for (int32_t l = 0; l < a.n_layers; l++) {
        const struct step_layer &layer = a.layers[l];
        auto load_x = [&](int32_t c, float4 &square, float4 &v) {
            if (l == 0)
                v = make_float4(token(c), token(c + 1), token(c + 2), token(c + 3));
            else
                v = load_fresh4(a.x + c);
            square = v;
        };

        struct share<W> s = share_of<W>(a, extents, l * N_PHASES + QKVU);
        stage(m, s, load_x);
        multiply(m, s, f, slot);
        float scale = inverse_rms(m, s.cols);
        for (int32_t i = threadIdx.x; i < s.n_outs; i += THREADS) {
            float value = result(m, s, i) * scale;
            if (s.first + i < 2 * a.H)
                value = activate(value, a.act);
            ((A *)a.qkv)[s.first + i] = from_f32<A>(value);
        }
        all.arrive();
        struct mixer mix(a, layer);
        mix.fetch();
        all.wait();
        mix.template run<A>(m, pos);
        all.arrive();

        s = share_of<W>(a, extents, l * N_PHASES + OUT);
        if (l == 0)
            for (int32_t i = threadIdx.x; i < s.n_outs; i += THREADS)
                m.own[i] = token(s.first + i);
        all.wait();
        stage(m, s, [&](int32_t c, float4 &square, float4 &v) {
            const float4 u = load_fresh4((const A *)a.qkv + 3 * a.H + c);
            square = load_fresh4((const A *)a.o + c);
            v = make_float4(square.x * u.x, square.y * u.y, square.z * u.z, square.w * u.w);
        });
        multiply(m, s, f, slot);
        scale = inverse_rms(m, s.cols);
        for (int32_t i = threadIdx.x; i < s.n_outs; i += THREADS)
            a.x[s.first + i] = m.own[i] += result(m, s, i) * scale;
        all.arrive();

        s = share_of<W>(a, extents, l * N_PHASES + GLU);
        all.wait();
        stage(m, s, [&](int32_t c, float4 &square, float4 &v) { square = v = load_fresh4(a.x + c); });
        multiply(m, s, f, slot);
        scale = inverse_rms(m, s.cols);
        for (int32_t i = threadIdx.x; i < s.n_outs; i += THREADS)
            ((A *)a.h)[s.first + i] =
                from_f32<A>((result(m, s, 2 * i) * scale) * (result(m, s, 2 * i + 1) * scale));
        all.arrive();

        s = share_of<W>(a, extents, l * N_PHASES + L3);
        all.wait();
        stage(m, s,
              [&](int32_t c, float4 &square, float4 &v) { square = v = load_fresh4((const A *)a.h + c); });
        multiply(m, s, f, slot);
        for (int32_t i = threadIdx.x; i < s.n_outs; i += THREADS)
            a.x[s.first + i] = m.own[i] += result(m, s, i);
        all.arrive();
        all.wait();
    }
    typedef typename head_weights<W>::type head;
    const struct share<head> s = share_of<head>(a, extents, a.n_layers * N_PHASES);
    stage(m, s, [&](int32_t c, float4 &square, float4 &v) { square = v = load_fresh4(a.x + c); });
    multiply(m, s, f, slot);
    const float scale = inverse_rms(m, s.cols);
    for (int32_t i = threadIdx.x; i < s.n_outs; i += THREADS)
        a.logits[s.first + i] = result(m, s, i) * scale;
    all.leave();
}

/* ---- host ------------------------------------------------------------------------------------------------
 */

static int32_t max32(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

/* Dots of a block, at most, where an output has `pair` of them. */
static int32_t most_dots(const struct cuda_backend *be, int32_t outs, int32_t pair)
{
    return (outs + be->n_sms - 1) / be->n_sms * pair;
}

/* Floats of shared memory that the inputs and the warps' results need. */
template <typename W>
static void room_of(const struct cuda_backend *be, const struct ltn_network *net, struct step_args *a, W)
{
    auto sums = [&](int32_t outs, int32_t pair) { return most_dots(be, outs, pair) * split_of(outs * pair); };
    a->max_input = max32(net->embed_dim, max32(net->hidden_dim, net->glu_dim));
    a->max_sums = max32(max32(sums(4 * net->hidden_dim, 1), sums(net->glu_dim, 2)),
                        max32(sums(net->vocab_size, 1), sums(net->embed_dim, 1)));
    a->max_sums = (a->max_sums + 3) & ~3;
}

/* Both in one room, as step_quant.cuh has it: a product's sums beside its input and beside the next. */
template <typename Q>
static void room_of(const struct cuda_backend *be, const struct ltn_network *net, struct step_args *a,
                    struct quant<Q>)
{
    const int32_t D = net->embed_dim, H = net->hidden_dim, G = net->glu_dim;
    auto sums = [&](int32_t outs, int32_t pair, int32_t cols) {
        return most_dots(be, outs, pair) << log_parts_of(outs * pair, cols);
    };
    const int32_t d = input_bytes<Q>(D) / 4, h = input_bytes<Q>(H) / 4, g = input_bytes<Q>(G) / 4,
                  head = input_bytes<q8>(D) / 4;
    a->max_input = max32(max32(sums(4 * H, 1, D) + max32(d, h), sums(D, 1, H) + max32(h, d)),
                         max32(sums(G, 2, D) + max32(d, g), sums(D, 1, G) + max32(g, max32(d, head))));
    a->max_input = (max32(a->max_input, sums(net->vocab_size, 1, D) + head) + 3) & ~3;
    a->max_sums = 0;
}

/* The released shapes and their kin: one gate in qkvu, SimpleRMSNorm, no biases, sizes in whole pieces. */
static bool suits(const struct cuda_backend *be, const struct ltn_network *net)
{
    const enum ltn_dtype dtype = net->layers[0].qkv.w.dtype;
    const bool quantised = ltn_is_quantised(dtype);
    const int32_t n = quantised ? UNIT_ROW : 16 / (int32_t)ltn_dtype_size(dtype);
    const enum ltn_dtype outer = quantised ? LTN_Q8 : dtype;
    const struct ltn_attention *first = &net->layers[0].attention;
    if (!be->step_barrier || net->gate_dim || net->n_layers > MAX_LAYERS || net->final_norm.weight ||
        net->act == LTN_ACT_EXP || first->head_dim % COLS || net->embed_dim % n || net->hidden_dim % n ||
        net->glu_dim % n || net->embed.dtype != outer || net->head.dtype != outer ||
        !aligned16(net->head.data) || !aligned16(net->head.scales))
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

template <typename W, typename A>
static enum ltn_status run(struct cuda_backend *be, const struct ltn_network *net, struct step_args *a,
                           struct ltn_error *err)
{
    room_of(be, net, a, W());
    const size_t shared = ring_size<W>::BYTES + ((size_t)a->max_input + a->max_sums + WARPS * COLS + WARPS +
                                                 net->embed_dim / be->n_sms + 1) *
                                                    sizeof(float);
    if (shared > be->max_shared)
        return LTN_ERR_UNSUPPORTED;
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(be->n_sms);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared;
    config.stream = be->stream;
    config.attrs = &together;
    config.numAttrs = 1;
    CUDA_TRY(be, err, (cudaLaunchKernelEx(&config, step_kernel<W, A>, *a)));
    return LTN_OK;
}

enum ltn_status cuda_step(struct ltn_backend *base, const struct ltn_network *net, const struct ltn_seq *seq,
                          const int32_t *id, float *logits, float *x, void *qkv, void *o, void *h,
                          struct ltn_error *err)
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
    a.embed_scales.w = net->embed.scales, a.head_scales.w = net->head.scales;
    a.id = id;
    a.steps = be->steps;
    a.pos = seq->pos;
    a.state = seq->state;
    a.logits = logits, a.x = x, a.qkv = qkv, a.o = o, a.h = h;
    a.barrier = be->step_barrier;
    for (int32_t l = 0; l < net->n_layers; l++) {
        const struct ltn_layer *y = &net->layers[l];
        a.layers[l] = {y->qkv.w.data,
                       y->out.w.data,
                       y->l1.w.data,
                       y->l2.w.data,
                       y->l3.w.data,
                       {y->qkv.w.scales, NULL},
                       {y->out.w.scales, NULL},
                       {y->l1.w.scales, y->l2.w.scales},
                       {y->l3.w.scales, NULL},
                       y->attention.slopes,
                       y->attention.theta,
                       (int64_t)y->attention.state_offset};
    }
    const enum ltn_dtype dtype = net->layers[0].qkv.w.dtype;
#define RUN(W, A) run<W, A>(be, net, &a, err)
    if (ltn_is_quantised(dtype) && be->base.act_dtype != LTN_BF16)
        return LTN_ERR_UNSUPPORTED;
    return dtype == LTN_Q8    ? RUN(quant<q8>, __nv_bfloat16)
           : dtype == LTN_FP8 ? RUN(quant<fp8>, __nv_bfloat16)
           : dtype == LTN_Q4  ? RUN(quant<q4>, __nv_bfloat16)
                              : FOR_TYPES(be, err, dtype, RUN);
#undef RUN
}

template <typename W, typename A>
static enum ltn_status allow_shared(struct cuda_backend *be, struct ltn_error *err)
{
    CUDA_TRY(be, err,
             cudaFuncSetAttribute(step_kernel<W, A>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)be->max_shared));
    return LTN_OK;
}

enum ltn_status step_open(struct cuda_backend *be, struct ltn_error *err)
{
    int together = 0;
    CUDA_TRY(be, err, cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, be->device));
    if (!together)
        return LTN_OK;
    LTN_TRY((allow_shared<float, float>(be, err)));
    LTN_TRY((allow_shared<__nv_bfloat16, __nv_bfloat16>(be, err)));
    LTN_TRY((allow_shared<__half, __nv_bfloat16>(be, err)));
    LTN_TRY((allow_shared<quant<q8>, __nv_bfloat16>(be, err)));
    LTN_TRY((allow_shared<quant<fp8>, __nv_bfloat16>(be, err)));
    LTN_TRY((allow_shared<quant<q4>, __nv_bfloat16>(be, err)));
    CUDA_TRY(be, err, cudaMalloc(&be->step_barrier, 2 * sizeof(uint32_t)));
    CUDA_TRY(be, err, cudaMemsetAsync(be->step_barrier, 0, 2 * sizeof(uint32_t), be->stream));
    return LTN_OK;
}
