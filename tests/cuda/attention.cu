/* Lightning attention on the GPU against a float64 recurrence, and its speed.
 *
 *   attention test     shapes, tails, packed sequences, start states, LRPE, split points; exit 1 on a failure
 *   attention small    a few tiny cases, for compute-sanitizer
 *   attention tune     milliseconds by heads, rows and walkers
 *   attention time E,HEADS,ROWS,WALKERS[,LRPE[,GATED[,PORTABLE]]]...     milliseconds of these shapes
 *                                                                       (walkers 0: as chosen)
 *
 * Outputs and everything outside the inputs hold NaN beforehand, so that what is not written, or is read out
 * of bounds, shows. */
#include "kernels/cuda/lightning_mma.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_bf16.h>
#include <string>
#include <vector>

#define CHECK(call)                                                                                          \
    do {                                                                                                     \
        cudaError_t err_ = (call);                                                                           \
        if (err_ != cudaSuccess) {                                                                           \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(err_));         \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

namespace
{

struct test_case {
    int32_t e, heads;
    bool lrpe, last_layer, portable;
    int32_t walkers;
    std::vector<int32_t> rows; /* of each sequence */
    int64_t pos;
    int32_t ld = 0;     /* between rows of q, k, v; 0: that of q, k, v and a gate side by side */
    int32_t pieces = 1; /* calls, one after another, cut at random rows */
    bool gated = false;
};

/* Counter-based noise, so that inputs need no host copy: two rounds of a 64-bit mixer, then Box-Muller. */
__host__ __device__ uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

__device__ float normal(uint64_t seed, uint64_t i)
{
    uint64_t r = mix(mix(seed * 0x9e3779b97f4a7c15ull + i) + 0x632be59bd9b4e019ull);
    float u = ((r >> 40) + 1) * (1.0f / 16777217.0f), a = (r & 0xFFFFFF) * (1.0f / 16777216.0f);
    return sqrtf(-2.0f * logf(u)) * cospif(2.0f * a);
}

/* [rows, ld] bf16: noise in the first `columns` columns of the first `rows` rows, NaN elsewhere */
__global__ void fill_bf16(__nv_bfloat16 *x, int64_t rows, int64_t all_rows, int columns, int ld,
                          uint64_t seed)
{
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < all_rows * ld;
         i += int64_t(gridDim.x) * blockDim.x) {
        bool in = i % ld < columns && i / ld < rows;
        x[i] = in ? __float2bfloat16_rn(normal(seed, i)) : __ushort_as_bfloat16(0x7FFF);
    }
}

__global__ void fill_f32(float *x, int64_t n, uint64_t seed, float scale)
{
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x)
        x[i] = scale == 0.0f ? __uint_as_float(0x7FFFFFFF) : scale * normal(seed, i);
}

/* One block per (head, value column), one thread per state row: the recurrence, token by token, in f64. */
__global__ void reference(double *o, double *state, const __nv_bfloat16 *q, const __nv_bfloat16 *k,
                          const __nv_bfloat16 *v, int64_t ld, int64_t rows, int64_t pos, int heads, int e,
                          int d, const float *slopes, const float *theta)
{
    __shared__ double partial[2][32];
    int head = blockIdx.x / e, column = blockIdx.x % e, row = threadIdx.x, feature = row % e;
    double keep = exp(-double(slopes[head]));
    double *own = state + (int64_t(head) * d + row) * e + column;
    double s = row < d ? *own : 0.0;
    for (int64_t t = 0; t < rows; ++t) {
        double x = 0.0, y = 0.0;
        if (row < d) {
            x = double(__bfloat162float(q[t * ld + head * e + feature]));
            y = double(__bfloat162float(k[t * ld + head * e + feature]));
            if (theta) {
                double angle = double(theta[head * e + feature]) * double(pos + t);
                double turn = row < e ? cos(angle) : sin(angle);
                x *= turn;
                y *= turn;
            }
        }
        s = keep * s + y * double(__bfloat162float(v[t * ld + head * e + column]));
        double sum = x * s;
        for (int i = 16; i > 0; i >>= 1)
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, i);
        if ((row & 31) == 0)
            partial[t & 1][row >> 5] = sum;
        __syncthreads();
        if (row == 0) {
            sum = 0.0;
            for (int i = 0; i < int(blockDim.x) / 32; ++i)
                sum += partial[t & 1][i];
            o[(t * heads + head) * e + column] = sum;
        }
    }
    if (row < d)
        *own = s;
}

/* squares [heads e / 64, rows] of o's 64 columns each; then o is multiplied by the gate. */
__global__ void gate_reference(double *o, double *squares, const __nv_bfloat16 *gate, int64_t ld,
                               int64_t rows, int width)
{
    const int64_t row = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (row >= rows)
        return;
    for (int group = 0; group < width / 64; ++group) {
        double sum = 0;
        for (int c = group * 64; c < group * 64 + 64; ++c) {
            double *at = o + row * width + c;
            sum += *at * *at;
            *at *= double(__bfloat162float(gate[row * ld + c]));
        }
        squares[group * rows + row] = sum;
    }
}

/* sums[0] += |x - y|^2, sums[1] += |y|^2; a NaN in x stays */
template <class T> __global__ void compare(const T *x, const double *y, int64_t n, double *sums)
{
    double diff = 0.0, norm = 0.0;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x) {
        double a = double(float(x[i])), b = y[i];
        diff += (a - b) * (a - b);
        norm += b * b;
    }
    atomicAdd(&sums[0], diff);
    atomicAdd(&sums[1], norm);
}

__global__ void widen(double *to, const float *from, int64_t n)
{
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x)
        to[i] = from[i];
}

template <class T> T *device_alloc(size_t n)
{
    T *p = nullptr;
    CHECK(cudaMalloc(&p, n * sizeof(T)));
    return p;
}

/* Slopes of the first or last layer (ALiBi for a power of two, otherwise the next power's). */
std::vector<float> make_slopes(int heads, bool last_layer)
{
    std::vector<float> s(heads);
    int p = 1;
    while (p < heads)
        p *= 2;
    for (int i = 0; i < heads; ++i)
        s[i] = float(std::exp2(-8.0 * (i + 1) / p)) * float(last_layer ? 1e-5 : 1.0 + 1e-5);
    return s;
}

double relative(const double *sums)
{
    return std::sqrt(sums[0] / std::max(sums[1], 1e-300));
}

struct result {
    double o, state, squares;
    bool repeat, clean; /* same bits twice; nothing written beyond the output, flags left at zero */
};

result run_case(const test_case &c, uint64_t seed)
{
    const int d = c.lrpe ? 2 * c.e : c.e, width = c.heads * c.e, ld = c.ld ? c.ld : 4 * width;
    int64_t rows = 0;
    for (int32_t n : c.rows)
        rows += n;
    const int64_t all_rows = rows + 70, layer = int64_t(c.heads) * d * c.e, offset = layer;
    const int n_seqs = int(c.rows.size());

    auto *qkvu = device_alloc<__nv_bfloat16>(all_rows * ld);
    auto *o = device_alloc<__nv_bfloat16>(all_rows * width);
    auto *start = device_alloc<float>(n_seqs * 2 * layer), *state = device_alloc<float>(n_seqs * 2 * layer);
    auto *slopes = device_alloc<float>(c.heads), *theta = device_alloc<float>(width);
    auto *o_ref = device_alloc<double>(rows * width), *s_ref = device_alloc<double>(n_seqs * layer);
    auto *sums = device_alloc<double>(6);
    auto *squares = device_alloc<float>(rows * width / 64 + 64);
    auto *squares_ref = device_alloc<double>(rows * width / 64 + 64);
    const size_t turned_bytes = c.lrpe ? ltn_lightning_turned(rows, c.heads, c.e) : 0;
    auto *turned = device_alloc<char>(turned_bytes + 16);
    CHECK(cudaMemset(turned, 0xFF, turned_bytes));
    CHECK(cudaMemset(squares, 0xFF, sizeof(float) * (rows * width / 64)));
    size_t work_bytes = ltn_lightning_workspace(c.heads, c.e, c.lrpe);
    auto *work = device_alloc<char>(work_bytes);
    CHECK(cudaMemset(work, 0, work_bytes));

    fill_bf16<<<1024, 256>>>(qkvu, rows, all_rows, (c.gated ? 4 : 3) * width, ld, seed);
    fill_f32<<<256, 256>>>(start, n_seqs * 2 * layer, seed + 1, 5.0f);
    std::vector<float> host = make_slopes(c.heads, c.last_layer), angles(width);
    for (int i = 0; i < width; ++i)
        angles[i] = float(std::pow(10000.0, -2.0 * i / width));
    CHECK(cudaMemcpy(slopes, host.data(), sizeof(float) * c.heads, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(theta, angles.data(), sizeof(float) * width, cudaMemcpyHostToDevice));

    ltn_attention a = {c.heads, c.e, slopes, c.lrpe ? theta : nullptr, size_t(offset)};
    std::vector<ltn_seq> seqs(n_seqs);
    for (int i = 0, first = 0; i < n_seqs; first += c.rows[i], ++i)
        seqs[i] = {state + i * 2 * layer, c.pos + 1000 * i, first, c.rows[i]};
    /* The rows of each call: all, or up to a random row of each sequence, up to the next, ... */
    std::vector<std::vector<int32_t>> ends(c.pieces, c.rows);
    for (int i = 0; i < n_seqs; ++i) {
        std::vector<int32_t> cuts;
        for (int piece = 0; piece + 1 < c.pieces; ++piece)
            cuts.push_back(int32_t(mix(seed * 1000003 + i * 101 + piece) % (c.rows[i] + 1)));
        std::sort(cuts.begin(), cuts.end());
        for (int piece = 0; piece + 1 < c.pieces; ++piece)
            ends[piece][i] = cuts[piece];
    }

    std::vector<uint16_t> bits[2];
    for (int i = 0; i < 2; ++i) {
        CHECK(cudaMemcpy(state, start, sizeof(float) * n_seqs * 2 * layer, cudaMemcpyDeviceToDevice));
        CHECK(cudaMemset(o, 0xFF, sizeof(*o) * all_rows * width));
        std::vector<int32_t> begin(n_seqs, 0);
        for (const std::vector<int32_t> &end : ends) {
            /* Sequences of a call lie one after another: with several pieces, each goes alone. */
            for (int j = 0; j < (c.pieces > 1 ? n_seqs : 1); ++j) {
                const int64_t row = c.pieces > 1 ? seqs[j].first + begin[j] : 0;
                ltn_seq part = {seqs[j].state, seqs[j].pos + begin[j], 0, end[j] - begin[j]};
                begin[j] = end[j];
                const __nv_bfloat16 *q = qkvu + row * ld;
                ltn_lightning_call call = {o + row * width,
                                           q,
                                           q + width,
                                           q + 2 * width,
                                           ld,
                                           &a,
                                           c.pieces > 1 ? &part : seqs.data(),
                                           c.pieces > 1 ? 1 : n_seqs,
                                           work,
                                           work_bytes,
                                           c.walkers,
                                           c.portable,
                                           nullptr,
                                           turned_bytes ? turned : nullptr,
                                           c.gated ? q + 3 * width : nullptr,
                                           ld,
                                           squares};
                if (!ltn_lightning_supports(&call)) {
                    fprintf(stderr, "e=%d lrpe=%d: not supported\n", c.e, c.lrpe);
                    exit(1);
                }
                if (c.pieces == 1 || part.count > 0)
                    CHECK(ltn_lightning_prefill(nullptr, &call));
            }
        }
        CHECK(cudaDeviceSynchronize());
        bits[i].resize(all_rows * width);
        CHECK(cudaMemcpy(bits[i].data(), o, sizeof(*o) * all_rows * width, cudaMemcpyDeviceToHost));
    }
    result r = {};
    r.repeat = bits[0] == bits[1];
    r.clean =
        std::all_of(bits[0].begin() + rows * width, bits[0].end(), [](uint16_t x) { return x == 0xFFFF; });
    std::vector<char> flags(2 * 128 * sizeof(unsigned)); /* the workspace begins with them */
    CHECK(cudaMemcpy(flags.data(), work, flags.size(), cudaMemcpyDeviceToHost));
    r.clean = r.clean && std::all_of(flags.begin(), flags.end(), [](char x) { return x == 0; });

    CHECK(cudaMemset(sums, 0, 6 * sizeof(double)));
    for (int i = 0; i < n_seqs; ++i) {
        widen<<<256, 256>>>(s_ref + i * layer, start + i * 2 * layer + offset, layer);
        const __nv_bfloat16 *q = qkvu + int64_t(seqs[i].first) * ld;
        reference<<<width, (d + 31) / 32 * 32>>>(o_ref + int64_t(seqs[i].first) * width, s_ref + i * layer, q,
                                                 q + width, q + 2 * width, ld, c.rows[i], seqs[i].pos,
                                                 c.heads, c.e, d, slopes, a.theta);
        compare<<<256, 256>>>(state + i * 2 * layer + offset, s_ref + i * layer, layer, sums + 2);
    }
    if (c.gated) {
        gate_reference<<<(rows + 127) / 128, 128>>>(o_ref, squares_ref, qkvu + 3 * width, ld, rows, width);
        compare<<<256, 256>>>(squares, squares_ref, rows * width / 64, sums + 4);
    }
    compare<<<1024, 256>>>(o, o_ref, rows * width, sums);
    double host_sums[6];
    CHECK(cudaMemcpy(host_sums, sums, sizeof(host_sums), cudaMemcpyDeviceToHost));
    r.o = relative(host_sums);
    r.state = relative(host_sums + 2);
    r.squares = c.gated ? relative(host_sums + 4) : 0;
    for (void *p :
         {(void *)qkvu, (void *)o, (void *)start, (void *)state, (void *)slopes, (void *)theta, (void *)o_ref,
          (void *)s_ref, (void *)sums, (void *)work, (void *)squares, (void *)squares_ref, (void *)turned})
        CHECK(cudaFree(p));
    return r;
}

int run_cases(const std::vector<test_case> &cases)
{
    int failures = 0;
    uint64_t seed = 7;
    for (const test_case &c : cases) {
        result r = run_case(c, seed += 2);
        bool good = r.o <= 2.5e-3 && r.state <= 5e-4 && r.squares <= 5e-3 && r.repeat && r.clean;
        failures += !good;
        std::string rows;
        for (size_t i = 0; i < c.rows.size(); ++i)
            rows += (i ? "," : "") + std::to_string(c.rows[i]);
        printf(
            "%s e=%-3d h=%-2d lrpe=%d gate=%d layer=%s %s W=%-2d pieces=%d n=%-22s o %.3e state %.3e%s%s\n",
            good ? "ok  " : "FAIL", c.e, c.heads, c.lrpe, c.gated, c.last_layer ? "last " : "first",
            c.portable ? "portable" : "default ", c.walkers, c.pieces, rows.c_str(), r.o, r.state,
            r.repeat ? "" : " [bits differ between runs]",
            r.clean ? "" : " [wrote out of bounds, or left flags]");
        fflush(stdout);
    }
    printf("%d of %zu cases failed\n", failures, cases.size());
    return failures ? 1 : 0;
}

std::vector<test_case> test_cases()
{
    std::vector<test_case> cases;
    /* the Hopper widths: tails, splits, packed sequences */
    for (int e : {128, 64}) {
        for (int n : {1, 5, 63, 64, 65, 130, 257, 1000})
            cases.push_back({e, 3, false, n % 2 == 0, false, 0, {n}, 0});
        for (int w : {1, 2, 3, 5, 8, 16, -2, -3, -4})
            cases.push_back({e, 4, false, w % 2 == 0, false, w, {64 * 37 + 11}, 0});
        for (int n : {130, 256, 300, 512, 700})
            cases.push_back({e, 3, false, n % 2 == 0, false, -4, {n}, 0});
        cases.push_back({e, 5, false, true, false, -4, {700, 1, 64, 1111}, 3});
        cases.push_back({e, 70, false, false, false, -2, {300}, 3}); /* more items than fit at once */
        cases.push_back({e, 2, false, false, false, 0, {1, 70, 640, 129, 2, 64}, 3});
        cases.push_back({e, 5, false, true, false, 4, {700, 1, 64, 1111}, 3});
        cases.push_back({e, 40, false, false, false, 3, {1500}, 3});
        for (bool last : {false, true})
            for (int n : {2048, 65536})
                cases.push_back({e, 8, false, last, false, 0, {n}, 0});
    }
    /* and with a gate, LRPE, or both */
    for (int kind = 0; kind < 4; ++kind) {
        const int e = kind == 3 ? 64 : 128;
        const bool lrpe = kind == 1 || kind == 2, gated = kind != 1;
        auto add = [&](int heads, bool last, int walkers, std::vector<int32_t> rows, int64_t pos) {
            cases.push_back({e, heads, lrpe, last, false, walkers, rows, pos, 0, 1, gated});
        };
        for (int n : {1, 5, 63, 64, 65, 130, 257, 1000})
            add(3, n % 2 == 0, 0, {n}, 3);
        for (int w : {1, 2, 3, 5, 8, 16, -2, -3, -4})
            add(4, w % 2 == 0, w, {64 * 37 + 11}, int64_t(1) << 24);
        add(5, true, -4, {700, 1, 64, 1111}, 3);
        add(70, false, -2, {300}, 3);
        add(2, false, 0, {1, 70, 640, 129, 2, 64}, 3);
        add(5, true, 4, {700, 1, 64, 1111}, 3);
        add(40, false, 3, {1500}, 3);
        for (int n = 1; n <= 64; n += 3)
            add(1 + n % 3, n % 2 == 0, (n & 8 ? -1 : 1) * (1 + n % 4), {576 + n}, 100);
        for (bool last : {false, true})
            for (int n : {2048, 65536})
                add(8, last, 0, {n}, 0);
    }
    std::vector<int32_t> many(70, 3);
    many[5] = 200;
    cases.push_back({128, 2, false, false, false, 0, many, 3});
    cases.push_back({128, 2, true, false, false, 0, many, 3, 0, 1, true});
    /* the portable kernel: every width, with and without LRPE */
    for (int e : {64, 80, 96, 128, 160, 192, 256})
        for (bool lrpe : {false, true}) {
            cases.push_back({e, 3, lrpe, false, true, 0, {1, 77, 300}, 5});
            cases.push_back({e, 3, lrpe, true, true, 4, {1200 + e}, int64_t(1) << 24});
        }
    for (int e : {32, 40, 48})
        cases.push_back({e, 3, true, true, true, 3, {1, 77, 700}, 5});
    for (bool lrpe : {false, true})
        for (bool last : {false, true})
            for (int n : {2048, 65536})
                cases.push_back({128, 8, lrpe, last, true, 0, {n}, 0});
    /* every tail; a text cut at random rows; an offset beyond 2^31 elements */
    for (int e : {128, 64})
        for (int n = 1; n <= 64; ++n)
            cases.push_back(
                {e, 1 + n % 3, false, n % 2 == 0, n % 5 == 0, (n & 8 ? -1 : 1) * (1 + n % 4), {576 + n}, 0});
    for (int n = 1; n <= 64; n += 3)
        cases.push_back({80, 1, true, n % 2 == 0, true, 1 + n % 4, {576 + n}, 1000});
    for (int i = 0; i < 12; ++i) {
        cases.push_back({i % 2 ? 64 : 128, 3, false, i % 3 == 0, i % 4 == 3, 0, {2000, 1500}, 7, 0, 2 + i});
        cases.push_back({128, 2, true, i % 3 == 0, i % 2 == 0, 0, {1100}, 7, 0, 2 + i});
    }
    cases.push_back({128, 2, false, true, false, 0, {36000}, 0, 65536});
    cases.push_back({128, 1, true, true, true, 0, {36000}, 0, 65536});
    return cases;
}

std::vector<test_case> small_cases()
{
    return {{128, 2, false, true, false, 2, {400}, 0},
            {64, 2, false, true, false, 2, {300}, 0},
            {128, 2, false, true, false, 1, {70, 130}, 0},
            {128, 2, false, true, false, -3, {500}, 0},
            {128, 2, true, true, true, 2, {300}, 0},
            {80, 2, false, true, true, 2, {300, 65}, 0},
            {128, 1, false, true, false, 2, {330}, 0, 0, 1, true},
            {128, 1, true, true, false, 2, {330, 70}, 0, 0, 1, true},
            {128, 1, true, true, false, -2, {300}, 0}};
}

/* Median milliseconds of one call, replayed in a graph over inputs that together exceed the L2 cache. */
double time_call(int e, int heads, int n, int walkers, bool portable, bool lrpe = false, bool gated = false)
{
    const int width = heads * e, ld = (gated ? 4 : 3) * width;
    const int64_t layer = int64_t(heads) * e * e * (lrpe ? 2 : 1);
    const size_t set = size_t(n) * (ld + width) * 2;
    const int sets = std::max<int>(1, int((300u << 20) / set) + 1),
              calls = std::max(sets, set < (256u << 20) ? 8 : 1);
    auto *qkv = device_alloc<__nv_bfloat16>(int64_t(sets) * n * ld),
         *o = device_alloc<__nv_bfloat16>(int64_t(sets) * n * width);
    auto *state = device_alloc<float>(layer), *slopes = device_alloc<float>(heads),
         *theta = device_alloc<float>(width);
    size_t work_bytes = ltn_lightning_workspace(heads, e, lrpe);
    auto *work = device_alloc<char>(work_bytes);
    const size_t turned_bytes = lrpe ? ltn_lightning_turned(n, heads, e) : 0;
    auto *turned = device_alloc<char>(turned_bytes + 16);
    auto *squares = device_alloc<float>(int64_t(n) * width / 64 + 64);
    CHECK(cudaMemset(work, 0, work_bytes));
    CHECK(cudaMemset(state, 0, sizeof(float) * layer));
    fill_bf16<<<2048, 256>>>(qkv, int64_t(sets) * n, int64_t(sets) * n, ld, ld, 3);
    std::vector<float> host = make_slopes(heads, true);
    CHECK(cudaMemcpy(slopes, host.data(), sizeof(float) * heads, cudaMemcpyHostToDevice));
    fill_f32<<<64, 256>>>(theta, width, 5, 1.0f);
    ltn_attention a = {heads, e, slopes, lrpe ? theta : nullptr, 0};
    ltn_seq seq = {state, 0, 0, n};

    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t begin, end;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) {
        const __nv_bfloat16 *q = qkv + int64_t(i % sets) * n * ld;
        ltn_lightning_call call = {o + int64_t(i % sets) * n * width,
                                   q,
                                   q + width,
                                   q + 2 * width,
                                   ld,
                                   &a,
                                   &seq,
                                   1,
                                   work,
                                   work_bytes,
                                   walkers,
                                   portable,
                                   nullptr,
                                   turned_bytes ? turned : nullptr,
                                   gated ? q + 3 * width : nullptr,
                                   ld,
                                   squares};
        if (!ltn_lightning_supports(&call))
            return NAN;
        CHECK(ltn_lightning_prefill(stream, &call));
    }
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<double> ms;
    for (int i = 0; i < 8; ++i) {
        float x;
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&x, begin, end));
        if (i > 0)
            ms.push_back(x / calls);
    }
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(stream));
    for (void *p : {(void *)qkv, (void *)o, (void *)state, (void *)slopes, (void *)theta, (void *)work,
                    (void *)turned, (void *)squares})
        CHECK(cudaFree(p));
    std::nth_element(ms.begin(), ms.begin() + ms.size() / 2, ms.end());
    return ms[ms.size() / 2];
}

/* Device-to-device copy, bytes read plus bytes written, GB/s */
double copy_speed()
{
    const size_t bytes = size_t(2) << 30;
    char *a = device_alloc<char>(bytes), *b = device_alloc<char>(bytes);
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    float best = 1e30f;
    for (int i = 0; i < 8; ++i) {
        float x;
        CHECK(cudaEventRecord(begin));
        CHECK(cudaMemcpyAsync(a, b, bytes, cudaMemcpyDeviceToDevice));
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&x, begin, end));
        best = std::min(best, x);
    }
    CHECK(cudaFree(a));
    CHECK(cudaFree(b));
    return 2.0 * bytes / best * 1e-6;
}

void tune()
{
    double copy = copy_speed();
    printf("copy %.0f GB/s\n", copy);
    struct {
        int e, heads, n;
        std::vector<int> walkers;
    } rows[] = {{128, 8, 512, {1, 2, 4, -2, -4}},    {128, 8, 1024, {1, 2, 4, 8, -4}},
                {128, 8, 4096, {1, 2, 4, 6, 8, 16}}, {128, 8, 65536, {4, 6, 8, 16}},
                {128, 8, 262144, {4, 8, 16}},        {128, 16, 4096, {1, 2, 4, 8}},
                {128, 16, 65536, {2, 4, 8}},         {128, 32, 512, {1, 2, -2}},
                {128, 32, 1024, {1, 2, 4, -2}},      {128, 32, 4096, {1, 2, 3, 4}},
                {128, 32, 65536, {1, 2, 3, 4}},      {128, 32, 262144, {1, 2, 4}},
                {128, 40, 65536, {1, 2, 3}},         {64, 16, 65536, {4, 8}}};
    for (const auto &r : rows) {
        double floor_ms = 8.0 * r.e * r.heads * r.n / copy * 1e-6;
        printf("e=%d h=%-2d n=%-7d floor %.4f ms |", r.e, r.heads, r.n, floor_ms);
        for (int w : r.walkers) {
            double ms = time_call(r.e, r.heads, r.n, w, false);
            printf(" W=%d %.4f (%.1f%%)", w, ms, 100 * floor_ms / ms);
        }
        double ms = time_call(r.e, r.heads, r.n, 0, true);
        printf(" | portable %.4f (%.1f%%)\n", ms, 100 * floor_ms / ms);
        fflush(stdout);
    }
}

} // namespace

/* The operation behind a C interface, for tools/bench_attention_peers.py (libattention.so). One sequence. */
#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED size_t attention_workspace(int heads, int e)
{
    return ltn_lightning_workspace(heads, e, false);
}

EXPORTED int attention_call(void *stream, void *o, const void *q, const void *k, const void *v, int ld,
                            int heads, int e, const float *slopes, float *state, int n, void *work,
                            int walkers, int portable)
{
    ltn_attention a = {heads, e, slopes, nullptr, 0};
    ltn_seq seq = {state, 0, 0, n};
    ltn_lightning_call call = {};
    call.o = o;
    call.q = q;
    call.k = k;
    call.v = v;
    call.ld = ld;
    call.a = &a;
    call.seqs = &seq;
    call.n_seqs = 1;
    call.workspace = work;
    call.workspace_bytes = ltn_lightning_workspace(heads, e, false);
    call.walkers = walkers;
    call.portable = portable != 0;
    return ltn_lightning_supports(&call) ? ltn_lightning_prefill(static_cast<cudaStream_t>(stream), &call)
                                         : -1;
}

int main(int argc, char **argv)
{
    std::string mode = argc == 2 ? argv[1] : "";
    const bool mode_is_time = argc > 2 && std::string(argv[1]) == "time";
    if (mode == "test")
        return run_cases(test_cases());
    if (mode == "small")
        return run_cases(small_cases());
    if (mode == "tune") {
        tune();
        return 0;
    }
    for (int i = 2; mode_is_time && i < argc; ++i) {
        int e, heads, n, walkers, lrpe = 0, gated = 0, portable = 0;
        if (sscanf(argv[i], "%d,%d,%d,%d,%d,%d,%d", &e, &heads, &n, &walkers, &lrpe, &gated, &portable) < 4) {
            fprintf(stderr, "attention: expected E,HEADS,ROWS,WALKERS[,LRPE[,GATED[,PORTABLE]]], found %s\n",
                    argv[i]);
            return 2;
        }
        printf("e=%d h=%d n=%d W=%d lrpe=%d gated=%d portable=%d: %.5f ms\n", e, heads, n, walkers, lrpe,
               gated, portable, time_call(e, heads, n, walkers, portable != 0, lrpe != 0, gated != 0));
        fflush(stdout);
    }
    if (mode_is_time)
        return 0;
    fprintf(stderr,
            "usage: attention test|small|tune|time E,HEADS,ROWS,WALKERS[,LRPE[,GATED[,PORTABLE]]]...\n");
    return 2;
}
