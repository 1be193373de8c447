/* Choosing the next token on the device (kernels/sample.h).
 *
 * A cluster of blocks shares a row: each takes a run of the vocabulary and keeps its tokens' logits and
 * distances in shared memory. Sums of a cluster are sums of integers, so their order is free. A cut in an
 * order is found by a histogram over the distance and one over the bucket in which the cut lies; by then few
 * tokens are left, and these are ranked against each other. Should many still be left, equal logits say,
 * further histograms over the digits of their places go on until few are. */
#include "kernels/cuda/cuda.cuh"

enum {
    THREADS = 1024,
    WARPS = THREADS / 32,
    PARTS = 8, /* blocks in a cluster */
    BINS = 1024,
    COARSE = LTN_DISTANCE_BITS - 4, /* bits of distance inside a bin of the first histogram, */
    FINE = COARSE - 10,             /* and of the second */
    DIGITS_FROM = 2,                /* the histogram from which on places are told apart, by 8 bits each */
    LAST_LEVEL = DIGITS_FROM + 7,
    CANDIDATES = 512, /* most that are ranked */
    WIDEST = 3,       /* sums that a cluster forms at once */
    RUN = 8,          /* tokens in a row that a thread looks at for the draw */
};
static_assert(LTN_FARTHEST >> COARSE < BINS && THREADS == BINS, "a thread for each part of a block's bins");

enum order { BY_LOGIT, BY_NEARNESS };

struct candidate {
    uint64_t place, amount;
};

struct shared {
    uint64_t weight[BINS];
    uint32_t count[BINS];
    struct candidate own[CANDIDATES], all[CANDIDATES];
    uint32_t n_own;
    int32_t recent[LTN_RECENT_IDS];
    uint64_t warps[WIDEST][WARPS], total, last;
    uint64_t exchange[2][WIDEST]; /* in turns: by the time one is written again, every block has read it */
    uint32_t turn;
    struct found {
        uint32_t bin, count;
        uint64_t before;
    } found; /* in every block the same */
};

/* A row as its cluster sees it; the same in every thread, but for the run of its block. */
struct row {
    uint64_t seed, number; /* of the draw */
    int64_t position;
    int32_t first, end; /* this block's run */
    float *logits;      /* [end - first] of the run's tokens, with penalties and biases, */
    uint32_t *distance; /* [end - first] and their distances; LTN_FAR: out */
    uint32_t part;
    uint32_t mean; /* distance, for nearness */
};

/* Clusters came with sm_90; before it one block takes a row. */
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
enum { PARTS_HERE = PARTS };
#else
enum { PARTS_HERE = 1 };
#endif

/* ---- sums over a block and over a cluster -------------------------------------------------------------- */

/* What any thread of the cluster wrote before it, all see after it. A release waits for all memory of the
 * device, so one warp of a block does it for the others, once they have met. */
static __device__ __forceinline__ void sync_cluster()
{
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x < 32)
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    else
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/* Where another block of the cluster has what is at p here. */
template <typename T> static __device__ __forceinline__ T *of_part(T *p, uint32_t part)
{
#if __CUDA_ARCH__ >= 900
    uint64_t at;
    asm("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(p), "r"(part));
    return reinterpret_cast<T *>(at);
#else
    return p;
#endif
}

/* How words are joined: over a warp, by instructions for 32 bits, and two of them. */
struct add {
    static const uint64_t none = 0;
    static __device__ __forceinline__ uint64_t join(uint64_t a, uint64_t b)
    {
        return a + b;
    }
    static __device__ __forceinline__ uint64_t of_warp(uint64_t v)
    {
        enum { BITS = 22 }; /* 32 times as much is no more than 27 */
        const uint32_t mask = (1u << BITS) - 1;
        return __reduce_add_sync(0xffffffffu, (uint32_t)v & mask) +
               ((uint64_t)__reduce_add_sync(0xffffffffu, (uint32_t)(v >> BITS) & mask) << BITS) +
               ((uint64_t)__reduce_add_sync(0xffffffffu, (uint32_t)(v >> 2 * BITS)) << 2 * BITS);
    }
};

struct least {
    static const uint64_t none = UINT64_MAX;
    static __device__ __forceinline__ uint64_t join(uint64_t a, uint64_t b)
    {
        return a < b ? a : b;
    }
    static __device__ __forceinline__ uint64_t of_warp(uint64_t v)
    {
        const uint32_t high = __reduce_min_sync(0xffffffffu, (uint32_t)(v >> 32));
        const uint32_t low = (uint32_t)(v >> 32) == high ? (uint32_t)v : UINT32_MAX;
        return (uint64_t)high << 32 | __reduce_min_sync(0xffffffffu, low);
    }
};

/* Each of v over all threads of the cluster. before: of the blocks before this one, if wanted. */
template <typename J, int N>
static __device__ __forceinline__ void cluster_join(const struct row *r, struct shared *s, uint64_t (&v)[N],
                                                    uint64_t *before = NULL)
{
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, turn = s->turn;
#pragma unroll
    for (int i = 0; i < N; i++) {
        v[i] = J::of_warp(v[i]);
        if (lane == 0)
            s->warps[i][warp] = v[i];
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const uint64_t all = J::of_warp(s->warps[i][lane]);
            if (lane == 0)
                s->exchange[turn][i] = all;
        }
        if (lane == 0)
            s->turn = turn ^ 1;
    }
    sync_cluster();
#pragma unroll
    for (int i = 0; i < N; i++)
        v[i] = J::none;
#pragma unroll
    for (uint32_t p = 0; p < PARTS_HERE; p++) {
        if (before && p == r->part)
            *before = v[0];
#pragma unroll
        for (int i = 0; i < N; i++)
            v[i] = J::join(v[i], *of_part(&s->exchange[turn][i], p));
    }
}

/* To a sum in shared memory that others add to as well: there is no such instruction for 64 bits. */
static __device__ __forceinline__ void add_to(uint64_t *sum, uint64_t v)
{
    uint32_t *word = reinterpret_cast<uint32_t *>(sum), low = (uint32_t)v, high = (uint32_t)(v >> 32);
    const uint32_t before = atomicAdd(&word[0], low);
    high += before + low < low;
    if (high)
        atomicAdd(&word[1], high);
}

/* The sum of v over the threads up to this one; s->total: of all. */
static __device__ uint64_t block_scan(struct shared *s, uint64_t v)
{
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        uint64_t other = __shfl_up_sync(0xffffffffu, v, offset);
        v += lane >= offset ? other : 0;
    }
    __syncthreads(); /* the last scan's readers are done */
    if (lane == 31)
        s->warps[0][warp] = v;
    __syncthreads();
    if (warp == 0) {
        const uint64_t own = s->warps[0][lane];
        uint64_t sum = own;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            uint64_t other = __shfl_up_sync(0xffffffffu, sum, offset);
            sum += lane >= offset ? other : 0;
        }
        s->warps[0][lane] = sum - own;
        if (lane == 31)
            s->total = sum;
    }
    __syncthreads();
    return v + s->warps[0][warp];
}

/* ---- tokens -------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint64_t weight_of(const struct row *r, int32_t i)
{
    return ltn_token_weight(r->distance[i - r->first]);
}

static __device__ __forceinline__ uint64_t place_of(const struct row *r, enum order order, int32_t i)
{
    return ltn_place(order == BY_LOGIT ? ltn_logit_key(r->logits[i - r->first])
                                       : ltn_nearness_key(r->distance[i - r->first], r->mean),
                     i);
}

static __device__ __forceinline__ float logit_of(uint32_t key)
{
    return __uint_as_float(key & 0x80000000u ? key : ~key & 0x7fffffffu);
}

/* ---- a cut in an order --------------------------------------------------------------------------------- */

/* The bins chosen so far, level by level. */
struct path {
    enum order order;
    int level;
    uint32_t near;   /* of the distance or nearness: first COARSE, then FINE bits are cut off */
    uint64_t digits; /* of the place */
};

/* What the first two histograms are over; never descends along the order. */
static __device__ __forceinline__ uint32_t nearness(const struct row *r, const struct path *p, int32_t i)
{
    const uint32_t distance = r->distance[i - r->first];
    return p->order == BY_LOGIT ? distance : ltn_nearness_key(distance, r->mean);
}

static __device__ __forceinline__ bool on_path(const struct row *r, const struct path *p, int32_t i)
{
    if (r->distance[i - r->first] == LTN_FAR)
        return false;
    if (p->level == 0)
        return true;
    if (p->level == 1)
        return nearness(r, p, i) >> COARSE == p->near;
    if (nearness(r, p, i) >> FINE != p->near)
        return false;
    return p->level == DIGITS_FROM ||
           place_of(r, p->order, i) >> (64 - 8 * (p->level - DIGITS_FROM)) == p->digits;
}

static __device__ __forceinline__ uint32_t bin_of(const struct row *r, const struct path *p, int32_t i)
{
    if (p->level == 0)
        return nearness(r, p, i) >> COARSE;
    if (p->level == 1)
        return nearness(r, p, i) >> FINE & (BINS - 1);
    return (uint32_t)(place_of(r, p->order, i) >> (56 - 8 * (p->level - DIGITS_FROM))) & 255;
}

static __device__ void go_into(struct path *p, uint32_t bin)
{
    if (p->level < DIGITS_FROM)
        p->near = p->level == 0 ? bin : p->near << (COARSE - FINE) | bin;
    else
        p->digits = p->digits << 8 | bin;
    p->level++;
}

static __device__ void histogram(const struct row *r, struct shared *s, const struct path *p, bool weights)
{
    s->weight[threadIdx.x] = 0;
    s->count[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll 2
    for (int32_t i = r->first + threadIdx.x; i < r->end; i += THREADS) {
        if (!on_path(r, p, i))
            continue;
        const uint32_t bin = bin_of(r, p, i);
        atomicAdd(&s->count[bin], 1);
        if (weights)
            add_to(&s->weight[bin], weight_of(r, i));
    }
    sync_cluster();
}

/* Ranks what is left, each block its share; the place at which the amount is reached. */
static __device__ uint64_t rank(const struct row *r, struct shared *s, const struct path *p, uint64_t amount,
                                bool weights)
{
    uint64_t last[1] = {UINT64_MAX};
    uint32_t n_part[PARTS_HERE], n = 0;
    if (threadIdx.x == 0)
        s->n_own = 0;
    __syncthreads();
#pragma unroll 2
    for (int32_t i = r->first + threadIdx.x; i < r->end; i += THREADS)
        if (on_path(r, p, i))
            s->own[atomicAdd(&s->n_own, 1)] = {place_of(r, p->order, i), weights ? weight_of(r, i) : 1};
    sync_cluster();
#pragma unroll
    for (uint32_t part = 0; part < PARTS_HERE; part++)
        n_part[part] = *of_part(&s->n_own, part);
#pragma unroll
    for (uint32_t part = 0; part < PARTS_HERE; part++)
        n += n_part[part];
    for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
        uint32_t from = 0, part = 0, at = i; /* number `at` of the part's */
#pragma unroll
        for (uint32_t next = 1; next < PARTS_HERE; next++) {
            from += n_part[next - 1];
            if (i >= from) {
                part = next;
                at = i - from;
            }
        }
        s->all[i] = *of_part(&s->own[at], part);
    }
    __syncthreads();
    for (uint32_t i = r->part + PARTS_HERE * (threadIdx.x / 32); i < n; i += PARTS_HERE * WARPS) {
        const struct candidate c = s->all[i];
        uint64_t sum = 0;
        for (uint32_t j = threadIdx.x % 32; j < n; j += 32)
            sum += s->all[j].place <= c.place ? s->all[j].amount : 0;
        sum = add::of_warp(sum);
        if (sum >= amount && sum - c.amount < amount)
            last[0] = c.place;
    }
    cluster_join<least>(r, s, last);
    return last[0];
}

/* Keeps the fewest first tokens of the order that reach the amount: so many tokens, or this share of the
 * weight. */
static __device__ void keep_first(struct row *r, struct shared *s, enum order order, bool weights,
                                  uint64_t amount, double share)
{
    /* a block adds up its share of the bins, a thread one block's part of one of them */
    const uint32_t bin = (r->part * THREADS + threadIdx.x) / PARTS_HERE, part = threadIdx.x % PARTS_HERE;
    struct path path = {order, 0, 0, 0};
    for (;;) {
        histogram(r, s, &path, weights);
        uint32_t count = *of_part(&s->count[bin], part);
        uint64_t own = weights ? *of_part(&s->weight[bin], part) : count;
#pragma unroll
        for (int offset = PARTS_HERE / 2; offset > 0; offset /= 2) {
            count += __shfl_xor_sync(0xffffffffu, count, offset);
            own += __shfl_xor_sync(0xffffffffu, own, offset);
        }
        own = part == 0 ? own : 0; /* once */
        uint64_t total[1] = {own}, before;
        cluster_join<add>(r, s, total, &before);
        if (path.level == 0) {
            if (weights)
                amount = ltn_share_of(share, total[0]);
            if (amount > total[0]) /* there are fewer tokens than that */
                return;
        }
        const uint64_t sum = before + block_scan(s, own);
        if (sum >= amount && sum - own < amount)
            for (uint32_t p = 0; p < PARTS_HERE; p++)
                *of_part(&s->found, p) = {bin, count, sum - own};
        sync_cluster();
        amount -= s->found.before;
        go_into(&path, s->found.bin);
        if (s->found.count <= CANDIDATES || path.level > LAST_LEVEL)
            break;
    }
    /* out is what lies behind the path, or on it and behind the last place */
    const uint64_t last = rank(r, s, &path, amount, weights);
    const int bits = path.level == 1 ? COARSE : FINE;
#pragma unroll 2
    for (int32_t i = r->first + threadIdx.x; i < r->end; i += THREADS) {
        const uint32_t at = nearness(r, &path, i) >> bits;
        if (at > path.near || (at == path.near && place_of(r, order, i) > last))
            r->distance[i - r->first] = LTN_FAR;
    }
}

/* The mean of distances by weight. */
static __device__ uint32_t mean_distance(const struct row *r, struct shared *s)
{
    enum { TOTAL, HIGH, LOW, N };
    uint64_t sum[N] = {};
#pragma unroll 2
    for (int32_t i = r->first + threadIdx.x; i < r->end; i += THREADS) {
        const uint64_t weight = weight_of(r, i), product = weight * r->distance[i - r->first];
        sum[TOTAL] += weight;
        sum[HIGH] += product >> 32;
        sum[LOW] += product & 0xffffffffu;
    }
    cluster_join<add>(r, s, sum);
    return ltn_mean_distance(sum[HIGH], sum[LOW], sum[TOTAL]);
}

/* ---- penalties and biases ------------------------------------------------------------------------------ */

static __device__ void adjust(const struct row *r, struct shared *s, const struct ltn_choice *choice,
                              const struct ltn_draws *draws)
{
    const int64_t position = r->position;
    int32_t n = ltn_has_penalties(choice) ? choice->repeat_last : 0;
    n = n < position ? n : (int32_t)position;
    for (int32_t i = threadIdx.x; i < n; i += THREADS)
        s->recent[i] = __ldcg(&draws->recent[(position - 1 - i) % LTN_RECENT_IDS]);
    __syncthreads();
    for (int32_t i = threadIdx.x; i < n; i += THREADS) {
        const int32_t id = s->recent[i];
        int32_t count = 0;
        bool seen = false; /* by a thread before */
        if (id < r->first || id >= r->end)
            continue;
        for (int32_t j = 0; j < n; j++) {
            count += s->recent[j] == id;
            seen = seen || (j < i && s->recent[j] == id);
        }
        if (!seen)
            r->logits[id - r->first] = ltn_penalised(r->logits[id - r->first], count, choice);
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < choice->n_bias; i += THREADS) {
        const int32_t id = choice->bias[i].id;
        if (id < r->first || id >= r->end || (i > 0 && choice->bias[i - 1].id == id))
            continue;
        float logit = r->logits[id - r->first];
        for (int32_t j = i; j < choice->n_bias && choice->bias[j].id == id; j++)
            logit += choice->bias[j].value;
        r->logits[id - r->first] = logit;
    }
    __syncthreads();
}

static __device__ void keep_min(const struct row *r, struct shared *s, double share)
{
    uint64_t nearest[1] = {LTN_FAR};
    for (int32_t i = r->first + threadIdx.x; i < r->end; i += THREADS)
        nearest[0] = least::join(nearest[0], r->distance[i - r->first]);
    cluster_join<least>(r, s, nearest);
    const uint64_t lightest = ltn_share_of(share, ltn_token_weight((uint32_t)nearest[0]));
    for (int32_t i = r->first + threadIdx.x; i < r->end; i += THREADS)
        if (weight_of(r, i) < lightest)
            r->distance[i - r->first] = LTN_FAR;
}

/* ---- the choice ---------------------------------------------------------------------------------------- */

static __device__ void keep_some(struct row *r, struct shared *s, const struct ltn_choice *choice)
{
    enum { TOP_K, TYPICAL, TOP_P, N_CUTS };
#pragma unroll 1 /* keep_first is much code, and the instruction cache is filled for every launch */
    for (int cut = 0; cut < N_CUTS; cut++) {
        const double share = cut == TYPICAL ? choice->typical : choice->top_p;
        if (cut == TOP_K ? choice->top_k <= 0 : (cut == TYPICAL && share <= 0) || share >= 1)
            continue;
        if (cut == TYPICAL)
            r->mean = mean_distance(r, s);
        keep_first(r, s, cut == TYPICAL ? BY_NEARNESS : BY_LOGIT, cut != TOP_K, (uint64_t)choice->top_k,
                   share);
    }
    if (choice->min_p > 0)
        keep_min(r, s, choice->min_p);
}

/* *id in the thread that found it, and in that one alone; true there. */
static __device__ bool draw(const struct row *r, struct shared *s, int32_t *id)
{
    const double u = ltn_uniform(r->seed, r->number);
    uint64_t sum[1] = {0}, before = 0;
#pragma unroll 2
    for (int32_t i = r->first + threadIdx.x; i < r->end; i += THREADS)
        sum[0] += weight_of(r, i);
    cluster_join<add>(r, s, sum, &before);
    const uint64_t threshold = ltn_threshold(u, sum[0]);
    if (threshold < before)
        return false;
    for (int32_t first = r->first; first < r->end && before <= threshold; first += RUN * THREADS) {
        const int32_t mine = first + RUN * threadIdx.x;
        uint64_t own = 0;
#pragma unroll
        for (int i = 0; i < RUN; i++)
            own += mine + i < r->end ? weight_of(r, mine + i) : 0;
        const uint64_t to_here = before + block_scan(s, own);
        if (to_here > threshold && to_here - own <= threshold) {
            own = to_here - own;
            for (*id = mine; own += weight_of(r, *id), own <= threshold; ++*id)
                ;
            return true; /* the others' loop ends too: before passes the threshold */
        }
        before += s->total;
    }
    return false;
}

/* The cluster's first block and thread alone give the likeliest out. */
static __device__ bool choose(struct row *r, struct shared *s, const struct ltn_choice *choice, int32_t *id)
{
    enum { BEST, BAD, N }; /* a place; an id */
    uint32_t best = UINT32_MAX, best_id = UINT32_MAX, bad = UINT32_MAX;
#pragma unroll 4
    for (int32_t i = r->first + threadIdx.x; i < r->end; i += THREADS) {
        const float logit = r->logits[i - r->first];
        const uint32_t key = ltn_logit_key(logit);
        best_id = key < best ? (uint32_t)i : best_id;
        best = min(best, key);
        bad = logit < INFINITY ? bad : min(bad, (uint32_t)i);
    }
    uint64_t found[N] = {ltn_place(best, (int32_t)best_id), bad};
    cluster_join<least>(r, s, found);
    const bool leads = r->part == 0 && threadIdx.x == 0;
    if (found[BAD] != UINT32_MAX) {
        *id = ltn_bad_logit((int32_t)found[BAD]);
        return leads;
    }
    *id = (int32_t)(uint32_t)found[BEST];
    const float largest = logit_of((uint32_t)(found[BEST] >> 32));
    if (largest == -INFINITY)
        *id = LTN_NO_TOKEN;
    if (choice->temperature == 0 || largest == -INFINITY)
        return leads;
    const double scale = ltn_distance_scale(choice->temperature);
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < r->end - r->first; i += THREADS)
        r->distance[i] = ltn_distance(r->logits[i], largest, scale);
    keep_some(r, s, choice);
    return draw(r, s, id);
}

/* HERE: a run fits into shared memory; else it is in scratch. */
template <bool HERE>
static __global__ void __launch_bounds__(THREADS)
    sample_kernel(int32_t *ids, const float *logits, int32_t cols, struct ltn_choice choice,
                  struct ltn_draws *draws, float *scratch, int64_t *steps, int32_t *log, int32_t log_rows)
{
    extern __shared__ float run_memory[];
    __shared__ struct shared s;
    const uint32_t parts = PARTS_HERE, n = blockIdx.x / parts, n_rows = gridDim.x / parts;
    const int32_t run = (int32_t)((cols + parts - 1) / parts);
    struct row r = {.part = blockIdx.x % parts};
    int32_t id;

    r.first = (int32_t)min((int64_t)r.part * run, (int64_t)cols);
    r.end = (int32_t)min((int64_t)r.first + run, (int64_t)cols);
    logits += (int64_t)n * cols + r.first;
    if (HERE) {
        r.logits = run_memory;
        r.distance = reinterpret_cast<uint32_t *>(run_memory + run);
    } else {
        r.logits = scratch + (int64_t)n * cols + r.first;
        r.distance = reinterpret_cast<uint32_t *>(r.logits + (int64_t)n_rows * cols);
    }
    draws += n;
    if (threadIdx.x == 0)
        s.turn = 0;
    let_next_start();
    wait_for_previous();
    __syncthreads();
    const int64_t done = __ldcg(steps);
    r.seed = __ldcg(&draws->seed);
    r.number = __ldcg(&draws->draw);
    r.position = __ldcg(&draws->position);
#pragma unroll 8
    for (int32_t i = threadIdx.x; i < r.end - r.first; i += THREADS)
        r.logits[i] = load_fresh(logits + i);
    if (ltn_has_penalties(&choice) || choice.n_bias > 0)
        adjust(&r, &s, &choice, draws);
    if (choose(&r, &s, &choice, &id)) {
        log[done % log_rows * n_rows + n] = id;
        id = id < 0 ? 0 : id;
        ids[n] = id;
        draws->recent[r.position % LTN_RECENT_IDS] = id;
        draws->position = r.position + 1;
        draws->draw = r.number + 1;
        if (n_rows == 1)
            *steps = done + 1;
    }
    sync_cluster(); /* no block's memory goes while another may read it */
}

/* With several rows, when all have read it. */
static __global__ void count_kernel(int64_t *steps)
{
    let_next_start();
    wait_for_previous();
    *steps = __ldcg(steps) + 1;
}

enum ltn_status cuda_sample(struct ltn_backend *base, int32_t *ids, const float *logits, int32_t rows,
                            int32_t cols, const struct ltn_choice *choice, struct ltn_draws *draws,
                            float *scratch, int64_t *steps, int32_t *log, int32_t log_rows,
                            struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    const uint32_t parts = be->overlaps ? PARTS : 1; /* as the kernel has it */
    const size_t run_bytes = (cols + parts - 1) / parts * (sizeof(float) + sizeof(uint32_t));
    const size_t most =
        be->max_shared - sizeof(struct shared) - 1024; /* what the system keeps of a block's */
    if (run_bytes <= most) {
        CUDA_TRY(be, err,
                 cudaFuncSetAttribute(sample_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      (int)most));
        LAUNCH_CLUSTER(be, err, sample_kernel<true>, parts, dim3(rows * parts), dim3(THREADS), run_bytes, ids,
                       logits, cols, *choice, draws, scratch, steps, log, log_rows);
    } else {
        LAUNCH_CLUSTER(be, err, sample_kernel<false>, parts, dim3(rows * parts), dim3(THREADS), 0, ids,
                       logits, cols, *choice, draws, scratch, steps, log, log_rows);
    }
    if (rows > 1)
        LAUNCH(be, err, count_kernel, dim3(1), dim3(1), 0, steps);
    return LTN_OK;
}
