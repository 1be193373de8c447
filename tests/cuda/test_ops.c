/* Every operation of the CUDA backend against the plain reference, over shapes and element types.
 *
 * Each check runs the operation twice on the device from the same inputs: outputs are poisoned with NaN
 * first, must agree bit for bit between the runs, must leave what lies behind them alone, and must be close
 * to the reference, which works on the same (rounded) inputs. */
#include "kernels/ops.h"
#include "tests/choices.h"
#include "tests/cuda/device.h"
#include "tests/support.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct ltn_backend *ref, *devices[3]; /* by the weights' dtype */
static struct ltn_backend *be;               /* the one under test */
static enum ltn_dtype weights;
static struct test_rng rng = {1};
static char what[160]; /* the case, for messages */

/* ---- values on both sides: f32 on the host and in the reference, any type on the device --------------- */

enum { GUARD = 64 }; /* elements behind a buffer that must stay as they are */

struct values {
    float *host;
    uint8_t *device;
    enum ltn_dtype dtype;
    size_t n;
};

static void encode(uint8_t *to, const float *from, enum ltn_dtype dtype, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t half = dtype == LTN_BF16 ? ltn_f32_to_bf16(from[i]) : ltn_f32_to_f16(from[i]);
        memcpy(to + i * ltn_dtype_size(dtype), dtype == LTN_F32 ? (const void *)&from[i] : &half,
               ltn_dtype_size(dtype));
    }
}

static void send(struct values *v)
{
    struct ltn_error err = {0};
    size_t size = ltn_dtype_size(v->dtype);
    uint8_t *bytes = malloc((v->n + GUARD) * size);
    assert_non_null(bytes);
    encode(bytes, v->host, v->dtype, v->n);
    memset(bytes + v->n * size, 0xff, GUARD * size);
    CHECK(be->ops->upload(be, v->device, bytes, (v->n + GUARD) * size, &err));
    free(bytes);
}

/* Random values of the given spread, rounded to what the type can hold. */
static struct values make(size_t n, enum ltn_dtype dtype, double spread)
{
    struct ltn_error err = {0};
    struct values v = {calloc(n, sizeof(float)), NULL, dtype, n};
    uint8_t raw[4];
    assert_non_null(v.host);
    for (size_t i = 0; i < n; i++) {
        v.host[i] = (float)(spread * test_normal(&rng));
        encode(raw, &v.host[i], dtype, 1);
        v.host[i] = ltn_load(raw, dtype, 0);
    }
    CHECK(be->ops->alloc(be, (void **)&v.device, (n + GUARD) * ltn_dtype_size(dtype), &err));
    send(&v);
    return v;
}

static void drop(struct values *v)
{
    be->ops->free(be, v->device);
    free(v->host);
}

static float *fetch(const struct values *v, uint8_t **raw)
{
    struct ltn_error err = {0};
    size_t size = ltn_dtype_size(v->dtype);
    float *out = malloc(v->n * sizeof *out);
    *raw = malloc((v->n + GUARD) * size);
    assert_true(out && *raw);
    CHECK(be->ops->download(be, *raw, v->device, (v->n + GUARD) * size, &err));
    for (size_t i = 0; i < GUARD * size; i++)
        if ((*raw)[v->n * size + i] != 0xff)
            fail_msg("%s: wrote behind its output", what);
    for (size_t i = 0; i < v->n; i++)
        out[i] = ltn_load(*raw, v->dtype, i);
    return out;
}

/* Before the device runs: NaN everywhere where the output is not also an input. */
static void poison(struct values *v)
{
    struct ltn_error err = {0};
    size_t bytes = (v->n + GUARD) * ltn_dtype_size(v->dtype);
    uint8_t *ones = malloc(bytes);
    assert_non_null(ones);
    memset(ones, 0xff, bytes);
    CHECK(be->ops->upload(be, v->device, ones, bytes, &err));
    free(ones);
}

/* Rounding of one act element, relative to the largest values beside it. */
static double act_bound(void)
{
    return be->act_dtype == LTN_F32 ? 2e-6 : 8e-3;
}

/* The difference is within `bound` of the expected values in the root mean square, and nowhere far off. */
static void compare(const float *found, const float *expected, size_t n, double bound)
{
    double ss = 0, diff = 0, worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)found[i] - (double)expected[i]);
        ss += (double)expected[i] * expected[i];
        diff += d * d;
        if (!(d <= worst)) {
            worst = d;
            at = i;
        }
    }
    double rms = sqrt(ss / (double)n) + 1e-20;
    if (!(sqrt(diff / (double)n) <= bound * rms) || !(worst <= 12 * bound * rms + bound * fabs(expected[at])))
        fail_msg("%s: element %zu of %zu is %.9g, expected %.9g; rms of the difference %.3g of %.3g", what,
                 at, n, (double)found[at], (double)expected[at], sqrt(diff / (double)n), rms);
}

/* Runs the operation twice through `run`, compares with v->host, into which the reference has written. */
static void verify(struct values *out, void (*run)(void *), void *ctx, const float *before, double bound)
{
    uint8_t *raw[2];
    float *found[2];
    for (int i = 0; i < 2; i++) {
        if (before) {
            struct values again = {(float *)before, out->device, out->dtype, out->n};
            send(&again);
        } else {
            poison(out);
        }
        run(ctx);
        found[i] = fetch(out, &raw[i]);
    }
    if (memcmp(raw[0], raw[1], out->n * ltn_dtype_size(out->dtype)) != 0)
        fail_msg("%s: two runs gave different bits", what);
    compare(found[0], out->host, out->n, bound);
    for (int i = 0; i < 2; i++) {
        free(raw[i]);
        free(found[i]);
    }
}

static float *duplicate(const struct values *v)
{
    float *copy = malloc(v->n * sizeof *copy);
    assert_non_null(copy);
    memcpy(copy, v->host, v->n * sizeof *copy);
    return copy;
}

/* ---- linear maps, plain and fused --------------------------------------------------------------------- */

enum kind { LINEAR, LINEAR_ADD, LOGITS, NORM_LINEAR, NORM_GLU, GATED_ADD, NORM_LOGITS, N_KINDS };
static const char *const kind_names[] = {"linear",   "linear_add", "logits",     "norm_linear",
                                         "norm_glu", "gated_add",  "norm_logits"};

struct map {
    enum kind kind;
    int32_t outs, cols, rows, ld_gate;
    struct values w, w2, bias, bias2, x, gate, norm_w, norm_b, y, scratch, scratch2;
    struct ltn_matrix fp8, fp8_2; /* data NULL: none */
    bool has_bias, layer_norm;
    enum ltn_act act;
    int32_t act_cols, group;
};

static struct ltn_linear linear_of(const struct map *m, bool second, bool device)
{
    const struct values *w = second ? &m->w2 : &m->w, *b = second ? &m->bias2 : &m->bias;
    struct ltn_linear l = {
        .w = {device ? (void *)w->device : w->host, device ? w->dtype : LTN_F32, m->outs, m->cols}};
    if (device)
        l.fp8 = second ? m->fp8_2 : m->fp8;
    if (m->has_bias)
        l.bias = device ? (const float *)b->device : b->host;
    return l;
}

/* What becomes of a row, or of a weight's row, in e4m3. */
static float round_e4m3(float *row, int32_t cols)
{
    float top = 0;
    for (int32_t i = 0; i < cols; i++)
        top = fmaxf(top, fabsf(row[i]));
    for (int32_t i = 0; i < cols; i++)
        row[i] = ltn_e4m3_to_f32(ltn_f32_to_e4m3(row[i] * (448 / top))) * (top / 448);
    return top / 448;
}

/* The reference's input of a product, rounded where the map under test rounds it. */
static void *input(const struct map *m, void *from)
{
    if (!m->fp8.data)
        return from;
    memmove(m->scratch.host, from, m->scratch.n * sizeof(float));
    for (int32_t r = 0; r < m->rows; r++)
        round_e4m3(m->scratch.host + (size_t)r * m->cols, m->cols);
    return m->scratch.host;
}

static void run_map_on(struct map *m, struct ltn_backend *on, bool device)
{
    struct ltn_error err = {0};
    const struct ltn_ops *ops = on->ops;
#define AT(v) (device ? (void *)(v).device : (void *)(v).host)
    struct ltn_norm norm = {0};
    if (m->layer_norm)
        norm = (struct ltn_norm){AT(m->norm_w), AT(m->norm_b)};
    struct ltn_linear l = linear_of(m, false, device), l2 = linear_of(m, true, device);
    void *x = AT(m->x), *y = AT(m->y), *gate = AT(m->gate), *s = AT(m->scratch), *s2 = AT(m->scratch2);
    int32_t rows = m->rows;
    switch (m->kind) {
    case LINEAR:
        CHECK(ops->linear(on, y, device ? x : input(m, x), &l, rows, &err));
        break;
    case LINEAR_ADD:
        CHECK(ops->linear_add(on, y, device ? x : input(m, x), &l, rows, &err));
        break;
    case LOGITS:
        CHECK(ops->logits(on, y, x, &l.w, rows, &err));
        break;
    case NORM_LINEAR:
        if (device) {
            CHECK(ops->norm_linear(on, y, x, &norm, &l, m->act, m->act_cols, m->group, rows, s, &err));
        } else {
            CHECK(ops->norm(on, s, x, &norm, rows, m->cols, &err));
            CHECK(ops->linear(on, y, input(m, s), &l, rows, &err));
            if (m->act_cols)
                CHECK(ops->activation(on, y, m->outs, rows, m->act_cols, m->group, m->act, &err));
        }
        break;
    case NORM_GLU:
        if (device) {
            CHECK(ops->norm_glu(on, y, x, &norm, &l, &l2, rows, s, s2, &err));
        } else {
            CHECK(ops->norm(on, s, x, &norm, rows, m->cols, &err));
            CHECK(ops->linear(on, y, input(m, s), &l, rows, &err));
            CHECK(ops->linear(on, s2, s, &l2, rows, &err));
            CHECK(ops->multiply(on, y, s2, (int64_t)rows * m->outs, &err));
        }
        break;
    case GATED_ADD:
        if (device) {
            CHECK(ops->gated_linear_add(on, y, x, gate, m->ld_gate, &norm, &l, rows, s, &err));
        } else {
            CHECK(ops->gated_norm(on, s, x, gate, m->ld_gate, &norm, rows, m->cols, &err));
            CHECK(ops->linear_add(on, y, input(m, s), &l, rows, &err));
        }
        break;
    default:
        if (device) {
            CHECK(ops->norm_logits(on, y, x, &norm, &l.w, rows, s, &err));
        } else {
            CHECK(ops->norm(on, s, x, &norm, rows, m->cols, &err));
            CHECK(ops->logits(on, y, s, &l.w, rows, &err));
        }
    }
#undef AT
}

static void run_map(void *ctx)
{
    run_map_on(ctx, be, true);
}

/* w as fp8 on the device; on the host w becomes what it then means. */
static struct ltn_matrix make_fp8(const struct map *m, struct values *w)
{
    struct ltn_error err = {0};
    struct ltn_matrix from = {w->device, w->dtype, m->outs, m->cols, NULL}, to = from;
    uint8_t *codes = malloc(w->n), *device;
    float *scales = malloc((size_t)m->outs * sizeof *scales);
    assert_true(codes && scales);
    CHECK(be->ops->alloc(be, (void **)&device, w->n + (size_t)m->outs * sizeof *scales, &err));
    to.data = device;
    to.dtype = LTN_FP8;
    to.scales = device + w->n;
    CHECK(be->ops->matrix_fp8(be, &to, &from, &err));
    CHECK(be->ops->download(be, codes, to.data, w->n, &err));
    CHECK(be->ops->download(be, scales, to.scales, (size_t)m->outs * sizeof *scales, &err));
    for (int32_t r = 0; r < m->outs; r++) {
        float *row = w->host + (size_t)r * m->cols;
        if (fabsf(round_e4m3(row, m->cols) - scales[r]) > 1e-6f * scales[r])
            fail_msg("%s: fp8 scale of row %d is %g", what, r, (double)scales[r]);
        for (int32_t i = 0; i < m->cols; i++) {
            float found = ltn_e4m3_to_f32(codes[(size_t)r * m->cols + i]) * scales[r];
            if (!(fabsf(found - row[i]) <= 0.07f * fabsf(row[i]) + 0.003f * scales[r]))
                fail_msg("%s: fp8 of [%d, %d] is %g, expected %g", what, r, i, (double)found, (double)row[i]);
            row[i] = found;
        }
    }
    free(codes);
    free(scales);
    return to;
}

static void check_map(struct map m, bool fp8)
{
    const bool adds = m.kind == LINEAR_ADD || m.kind == GATED_ADD;
    const bool f32_out = adds || m.kind == LOGITS || m.kind == NORM_LOGITS;
    const bool f32_in = m.kind == NORM_LINEAR || m.kind == NORM_GLU || m.kind == NORM_LOGITS;
    const size_t in = (size_t)m.rows * m.cols, out = (size_t)m.rows * m.outs;
    const double spread = 1 / sqrt(m.cols);

    snprintf(what, sizeof what, "%s, %s weights%s [%d, %d], %d rows%s%s", kind_names[m.kind],
             ltn_dtype_name(weights), fp8 ? " as fp8" : "", m.outs, m.cols, m.rows,
             m.has_bias ? ", bias" : "", m.layer_norm ? ", LayerNorm" : "");
    m.ld_gate = m.cols + 24;
    m.w = make((size_t)m.outs * m.cols, weights, spread);
    m.w2 = make(m.kind == NORM_GLU ? m.w.n : 1, weights, spread);
    m.bias = make((size_t)m.outs, LTN_F32, 0.5);
    m.bias2 = make((size_t)m.outs, LTN_F32, 0.5);
    m.x = make(in, f32_in ? LTN_F32 : be->act_dtype, 3);
    m.gate = make((size_t)m.rows * m.ld_gate, be->act_dtype, 1);
    m.norm_w = make((size_t)m.cols, LTN_F32, 1);
    m.norm_b = make((size_t)m.cols, LTN_F32, 1);
    m.y = make(out, f32_out ? LTN_F32 : be->act_dtype, 1);
    m.scratch = make(in, be->act_dtype, 1);
    m.scratch2 = make(out, be->act_dtype, 1);
    float *before = adds ? duplicate(&m.y) : NULL;
    if (fp8) {
        m.fp8 = make_fp8(&m, &m.w);
        if (m.kind == NORM_GLU)
            m.fp8_2 = make_fp8(&m, &m.w2);
    }
    run_map_on(&m, ref, false);
    const struct ltn_linear l = linear_of(&m, false, true), l2 = linear_of(&m, true, true);
    reserve_room(be, &l, m.kind == NORM_GLU ? &l2 : NULL, NULL, m.rows);
    /* f32: a sum of `cols` products; 16 bits: the input of the product rounds too */
    verify(&m.y, run_map, &m, before, be->act_dtype == LTN_F32 ? 3e-6 : 8e-3);
    free(before);
    be->ops->free(be, (void *)m.fp8.data);
    be->ops->free(be, (void *)m.fp8_2.data);
    struct values *all[] = {&m.w,      &m.w2,     &m.bias, &m.bias2,   &m.x,       &m.gate,
                            &m.norm_w, &m.norm_b, &m.y,    &m.scratch, &m.scratch2};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        drop(all[i]);
}

static const int32_t map_shapes[][2] = {{1, 1},      {3, 5},      {17, 33},    {64, 64},
                                        {100, 72},   {40, 256},   {256, 1000}, {1024, 520},
                                        {520, 2816}, {2500, 264}, {4100, 128}, {8200, 520}};

static void test_maps(void **state)
{
    enum kind kind = (enum kind)(intptr_t)*state;
    static const int32_t rows[] = {1, 2, 3, 4, 5, 8, 17, 64, 65, 130};
    for (size_t s = 0; s < sizeof map_shapes / sizeof *map_shapes; s++)
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            int32_t outs = map_shapes[s][0], cols = map_shapes[s][1];
            /* The reference is slow: of the large ones only some, the largest with a whole batch. */
            if ((double)outs * cols * rows[r] > 2e7 &&
                (outs == 8200 ? rows[r] != 64 : rows[r] != 5 && rows[r] != 65))
                continue;
            struct map m = {.kind = kind, .outs = outs, .cols = cols, .rows = rows[r]};
            m.has_bias = (s + r) % 2 && kind != LOGITS && kind != NORM_LOGITS;
            m.layer_norm = kind >= NORM_LINEAR && (s + r) % 3 == 1;
            if (kind == NORM_LINEAR && outs >= 4) {
                static const enum ltn_act acts[] = {LTN_ACT_SILU, LTN_ACT_EXP, LTN_ACT_NONE, LTN_ACT_GELU};
                m.act = acts[(s + r) % 4];
                m.group = outs / 4;
                m.act_cols = 2 * m.group;
            }
            check_map(m, false);
        }
}

/* Many rows of many columns, where the kernels with large tiles take over, up to odd edges. */
static void wide_maps(enum kind kind, bool fp8)
{
    static const int32_t sizes[][3] = {
        {12296, 72, 65}, {2568, 136, 1025}, {1288, 64, 2049}, {1281, 80, 2100}};
    static const int32_t fp8_sizes[][3] = {
        {2568, 144, 1025}, {1288, 64, 2049}, {264, 80, 300}, {72, 2816, 257}};
    for (size_t i = 0; weights == LTN_BF16 && i < sizeof sizes / sizeof *sizes; i++) {
        const int32_t *size = fp8 ? fp8_sizes[i] : sizes[i];
        struct map m = {.kind = kind, .outs = size[0], .cols = size[1], .rows = size[2]};
        m.has_bias = i == 2 && kind == NORM_LINEAR && !fp8;
        if (kind == NORM_LINEAR) {
            m.act = i == 1 ? LTN_ACT_ELU : LTN_ACT_SILU;
            m.group = 8;
            m.act_cols = m.outs / 24 * 8;
        }
        check_map(m, fp8);
    }
}

static void test_wide_maps(void **state)
{
    wide_maps((enum kind)(intptr_t)*state, false);
}

/* Products of released shapes whose algorithm gemm_table.h names, which has bf16 alone; among them one whose
 * sums are split. Of a range the fewest rows or nearly, as the reference is slow. */
static void test_tabled_maps(void **state)
{
    static const struct {
        enum kind kind;
        int32_t outs, cols, rows;
    } sizes[] = {{LINEAR_ADD, 1024, 1024, 65},  {LINEAR_ADD, 1024, 1024, 385},  {LINEAR_ADD, 1024, 2816, 193},
                 {LINEAR_ADD, 2048, 5632, 129}, {LINEAR_ADD, 4096, 11008, 129}, {LINEAR, 2816, 1024, 257},
                 {LOGITS, 64000, 1024, 65}};
    (void)state;
    if (weights != LTN_BF16)
        skip();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        struct map m = {
            .kind = sizes[i].kind, .outs = sizes[i].outs, .cols = sizes[i].cols, .rows = sizes[i].rows};
        check_map(m, false);
    }
}

static void test_fp8_maps(void **state)
{
    wide_maps((enum kind)(intptr_t)*state, true);
}

/* Norm(x) of a stream that the operation before summed into, and of one that just lies there: the same bits.
 */
static void test_residual(void **state)
{
    (void)state;
    enum { ROWS = 2049, DIM = 1288, OUTS = 1496 };
    struct ltn_error err = {0};
    const struct ltn_norm norm = {0};
    if (weights != LTN_BF16)
        return;
    struct values w = make((size_t)DIM * DIM, weights, 0.03), w2 = make((size_t)OUTS * DIM, weights, 0.03);
    struct values x = make((size_t)ROWS * DIM, LTN_F32, 3), y = make((size_t)ROWS * DIM, be->act_dtype, 1);
    struct values out = make((size_t)ROWS * OUTS, be->act_dtype, 1), scratch = make(y.n, be->act_dtype, 1);
    const struct ltn_linear add = {.w = {w.device, weights, DIM, DIM, NULL}},
                            map = {.w = {w2.device, weights, OUTS, DIM, NULL}};
    uint8_t *raw[2];
    snprintf(what, sizeof what, "norm_linear after linear_add");
    reserve_room(be, &map, NULL, NULL, ROWS);
    CHECK(be->ops->linear_add(be, (float *)x.device, y.device, &add, ROWS, &err));
    for (int i = 0; i < 2; i++) {
        CHECK(be->ops->norm_linear(be, out.device, (float *)x.device, &norm, &map, LTN_ACT_SILU, OUTS / 2, 8,
                                   ROWS, scratch.device, &err));
        free(fetch(&out, &raw[i]));
        poison(&out);
    }
    assert_memory_equal(raw[0], raw[1], out.n * ltn_dtype_size(be->act_dtype));
    free(raw[0]);
    free(raw[1]);
    struct values *all[] = {&w, &w2, &x, &y, &out, &scratch};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        drop(all[i]);
}

/* ---- row by row --------------------------------------------------------------------------------------- */

struct norm_case {
    struct values y, x, gate, w, b;
    struct ltn_norm norm;
    int32_t rows, cols, ld;
    bool gated;
};

static void run_norm(void *ctx)
{
    struct norm_case *c = ctx;
    struct ltn_error err = {0};
    if (c->gated)
        CHECK(be->ops->gated_norm(be, c->y.device, c->x.device, c->gate.device, c->ld, &c->norm, c->rows,
                                  c->cols, &err));
    else
        CHECK(be->ops->norm(be, c->y.device, (float *)c->x.device, &c->norm, c->rows, c->cols, &err));
}

static void test_norms(void **state)
{
    (void)state;
    static const int32_t cols[] = {1, 5, 64, 257, 1000, 4096}, rows[] = {1, 2, 7, 130};
    struct ltn_error err = {0};
    for (int k = 0; k < 4; k++)
        for (size_t i = 0; i < sizeof cols / sizeof *cols; i++)
            for (size_t j = 0; j < sizeof rows / sizeof *rows; j++) {
                struct norm_case c = {.rows = rows[j], .cols = cols[i], .gated = k / 2, .ld = cols[i] + 3};
                const size_t n = (size_t)c.rows * c.cols;
                snprintf(what, sizeof what, "%s%s [%d, %d]", k / 2 ? "gated " : "",
                         k % 2 ? "LayerNorm" : "SimpleRMSNorm", c.rows, c.cols);
                c.x = make(n, c.gated ? be->act_dtype : LTN_F32, 2);
                c.y = make(n, be->act_dtype, 1);
                c.gate = make((size_t)c.rows * c.ld, be->act_dtype, 1);
                c.w = make((size_t)c.cols, LTN_F32, 1);
                c.b = make((size_t)c.cols, LTN_F32, 1);
                struct ltn_norm host = {0};
                if (k % 2) {
                    host = (struct ltn_norm){c.w.host, c.b.host};
                    c.norm = (struct ltn_norm){(float *)c.w.device, (float *)c.b.device};
                }
                if (c.gated)
                    CHECK(ref->ops->gated_norm(ref, c.y.host, c.x.host, c.gate.host, c.ld, &host, c.rows,
                                               c.cols, &err));
                else
                    CHECK(ref->ops->norm(ref, c.y.host, c.x.host, &host, c.rows, c.cols, &err));
                verify(&c.y, run_norm, &c, NULL, act_bound());
                drop(&c.x), drop(&c.y), drop(&c.gate), drop(&c.w), drop(&c.b);
            }
}

struct act_case {
    struct values x;
    int32_t ld, rows, cols, group;
    enum ltn_act act;
};

static void run_activation(void *ctx)
{
    struct act_case *c = ctx;
    struct ltn_error err = {0};
    CHECK(be->ops->activation(be, c->x.device, c->ld, c->rows, c->cols, c->group, c->act, &err));
}

static void test_activations(void **state)
{
    (void)state;
    static const int32_t groups[] = {1, 7, 64, 100};
    struct ltn_error err = {0};
    for (int act = LTN_ACT_NONE; act <= LTN_ACT_SINE; act++)
        for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
            struct act_case c = {.rows = i ? 19 : 1, .group = groups[i], .act = (enum ltn_act)act};
            c.cols = 3 * c.group;
            c.ld = c.cols + 5;
            snprintf(what, sizeof what, "activation %d, groups of %d", act, c.group);
            c.x = make((size_t)c.rows * c.ld, be->act_dtype, 2);
            float *before = duplicate(&c.x);
            CHECK(ref->ops->activation(ref, c.x.host, c.ld, c.rows, c.cols, c.group, c.act, &err));
            verify(&c.x, run_activation, &c, before, act_bound());
            free(before);
            drop(&c.x);
        }
}

struct pair_case {
    struct values a, b;
};

static void run_multiply(void *ctx)
{
    struct pair_case *c = ctx;
    struct ltn_error err = {0};
    CHECK(be->ops->multiply(be, c->a.device, c->b.device, (int64_t)c->a.n, &err));
}

static void test_multiply(void **state)
{
    (void)state;
    static const size_t sizes[] = {1, 31, 1000, 70001};
    struct ltn_error err = {0};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        snprintf(what, sizeof what, "multiply %zu", sizes[i]);
        struct pair_case c = {make(sizes[i], be->act_dtype, 1), make(sizes[i], be->act_dtype, 1)};
        float *before = duplicate(&c.a);
        CHECK(ref->ops->multiply(ref, c.a.host, c.b.host, (int64_t)sizes[i], &err));
        verify(&c.a, run_multiply, &c, before, act_bound());
        free(before);
        drop(&c.a), drop(&c.b);
    }
}

struct embed_case {
    struct values x, table;
    struct ltn_matrix m;
    int32_t *ids; /* device */
    int32_t rows;
};

static void run_embed(void *ctx)
{
    struct embed_case *c = ctx;
    struct ltn_error err = {0};
    CHECK(be->ops->embed(be, (float *)c->x.device, &c->m, c->ids, c->rows, 1.7f, &err));
}

static void test_embed(void **state)
{
    (void)state;
    static const int32_t cols[] = {1, 7, 64, 1000}, rows[] = {1, 3, 130};
    struct ltn_error err = {0};
    for (size_t i = 0; i < sizeof cols / sizeof *cols; i++)
        for (size_t j = 0; j < sizeof rows / sizeof *rows; j++) {
            enum { VOCAB = 211 };
            int32_t ids[130];
            struct embed_case c = {.rows = rows[j]};
            snprintf(what, sizeof what, "embed [%d, %d]", rows[j], cols[i]);
            for (int r = 0; r < rows[j]; r++)
                ids[r] = r == 1 ? VOCAB - 1 : test_below(&rng, VOCAB);
            c.table = make((size_t)VOCAB * cols[i], weights, 1);
            c.x = make((size_t)rows[j] * cols[i], LTN_F32, 1);
            c.m = (struct ltn_matrix){c.table.device, weights, VOCAB, cols[i], NULL};
            struct ltn_matrix host = {c.table.host, LTN_F32, VOCAB, cols[i], NULL};
            CHECK(be->ops->alloc(be, (void **)&c.ids, sizeof ids, &err));
            CHECK(be->ops->upload(be, c.ids, ids, sizeof ids, &err));
            CHECK(ref->ops->embed(ref, c.x.host, &host, ids, rows[j], 1.7f, &err));
            verify(&c.x, run_embed, &c, NULL, 1e-7);
            be->ops->free(be, c.ids);
            drop(&c.x), drop(&c.table);
        }
}

/* ---- attention ---------------------------------------------------------------------------------------- */

struct attention_case {
    struct values o, qkv, state, slopes, theta;
    struct ltn_attention a;
    struct ltn_seq seqs[80];
    int32_t n_seqs, rows, e, h;
    float *state_before;
};

static void run_lightning(void *ctx)
{
    struct attention_case *c = ctx;
    struct ltn_error err = {0};
    const size_t H = (size_t)c->h * c->e, act = ltn_dtype_size(be->act_dtype);
    struct values again = {c->state_before, c->state.device, LTN_F32, c->state.n};
    send(&again);
    CHECK(be->ops->lightning(be, c->o.device, c->qkv.device, c->qkv.device + H * act,
                             c->qkv.device + 2 * H * act, (int32_t)(4 * H), &c->a, c->seqs, c->n_seqs, &err));
}

/* counts: rows of each sequence, ended by 0. */
static void check_lightning(int32_t e, int32_t h, bool lrpe, double slope, const int32_t *counts, int64_t pos)
{
    struct ltn_error err = {0};
    struct attention_case c = {.e = e, .h = h};
    struct attention_case *C = &c;
    const size_t H = (size_t)h * e, floats = (size_t)h * e * e * (lrpe ? 2 : 1), skip = 12;

    for (; counts[c.n_seqs]; c.n_seqs++)
        c.rows += counts[c.n_seqs];
    snprintf(what, sizeof what, "lightning, %d heads of %d%s, slope %g, %d rows in %d sequences at %lld", h,
             e, lrpe ? ", LRPE" : "", slope, c.rows, c.n_seqs, (long long)pos);
    c.qkv = make((size_t)c.rows * 4 * H, be->act_dtype, 1);
    c.o = make((size_t)c.rows * H, be->act_dtype, 1);
    c.state = make((floats + skip) * (size_t)c.n_seqs, LTN_F32, 2);
    c.slopes = make((size_t)h, LTN_F32, 1);
    c.theta = make(H, LTN_F32, 1);
    for (int32_t i = 0; i < h; i++)
        c.slopes.host[i] = (float)(slope / (1 << (i % 8)));
    for (size_t i = 0; i < H; i++)
        c.theta.host[i] = (float)pow(10000, -2.0 * (double)i / (double)H);
    send(&c.slopes), send(&c.theta);
    struct ltn_attention host = {h, e, c.slopes.host, lrpe ? c.theta.host : NULL, skip};
    c.a = (struct ltn_attention){h, e, (float *)c.slopes.device, lrpe ? (float *)c.theta.device : NULL, skip};
    c.state_before = duplicate(&c.state);
    reserve_room(be, NULL, NULL, &c.a, c.rows);
    struct ltn_seq on_host[80];
    for (int32_t i = 0, row = 0; i < c.n_seqs; row += counts[i++]) {
        size_t at = (size_t)i * (floats + skip);
        on_host[i] = (struct ltn_seq){c.state.host + at, pos + 100 * i, row, counts[i]};
        c.seqs[i] = (struct ltn_seq){(float *)c.state.device + at, pos + 100 * i, row, counts[i]};
    }
    CHECK(ref->ops->lightning(ref, c.o.host, c.qkv.host, c.qkv.host + H, c.qkv.host + 2 * H, (int32_t)(4 * H),
                              &host, on_host, c.n_seqs, &err));
    verify(&c.o, run_lightning, C, NULL, be->act_dtype == LTN_F32 ? 1e-5 : 8e-3);
    /* The state is f32 on either side, but the tensor-core kernels (bf16) add v to it as two bf16 numbers,
     * and LRPE layers round the turned k. */
    snprintf(what + strlen(what), sizeof what - strlen(what), ", state");
    verify(&c.state, run_lightning, C, c.state_before, be->act_dtype == LTN_F32 ? 1e-5 : lrpe ? 3e-3 : 5e-5);
    free(c.state_before);
    drop(&c.o), drop(&c.qkv), drop(&c.state), drop(&c.slopes), drop(&c.theta);
}

static void test_lightning(void **state)
{
    (void)state;
    static const int32_t heads[] = {1, 5, 16, 33, 64, 80, 96, 128, 160, 256};
    static const int32_t shapes[][8] = {{1}, {1, 1, 1}, {2}, {63}, {64}, {65}, {130}, {1, 70, 1, 1, 3, 64}};
    int32_t batch[80] = {0};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++)
        for (size_t j = 0; j < sizeof shapes / sizeof *shapes; j++)
            for (int k = 0; k < 2; k++) {
                const int32_t e = heads[i];
                if (e > 100 && j > 3 && j != 5)
                    continue;
                check_lightning(e, e < 100 ? 3 : 2, (i + j + (size_t)k) % 2, k ? 3.9e-8 : 0.5, shapes[j],
                                k ? 3000000 : 0);
            }
    for (int i = 0; i < 70; i++)
        batch[i] = 1;
    check_lightning(32, 2, true, 0.25, batch, 7);   /* more sequences than one launch takes */
    check_lightning(128, 4, false, 0.25, batch, 7); /* heads enough for the wide tiles of decoding */
    check_lightning(72, 5, true, 3.9e-8, batch, 3000000);
    check_lightning(136, 4, true, 0.5, batch, 0);
    batch[66] = 9;
    check_lightning(32, 2, false, 0.25, batch, 7);
}

/* ---- the rest ----------------------------------------------------------------------------------------- */

/* The device chooses what the plain reference does, to the last id, over all kinds of logits and rules. Few:
 * small rows alone, for the sanitizers. */
static void test_sample(void **state)
{
    const bool few = (intptr_t)*state;
    static const int32_t sizes[] = {1, 2, 3, 31, 1000, 1023, 8193, 64000, 100003};
    enum { MOST_ROWS = 5, LOG = 2 };
    const int rounds = few ? 6 : weights == LTN_F32 ? 400 : 20; /* weights have no part in it */
    struct ltn_error err = {0};
    struct device {
        int64_t steps;
        struct ltn_draws draws[MOST_ROWS];
        int32_t ids[MOST_ROWS], log[LOG * MOST_ROWS];
        struct ltn_bias bias[TEST_BIASES];
    } * device, *found = malloc(sizeof *found), *host = calloc(1, sizeof *host);
    assert_true(found && host);
    CHECK(be->ops->alloc(be, (void **)&device, sizeof *device, &err));
    for (int round = 0; round < rounds; round++) {
        /* the reference looks at every token for every bit of a place: large rows come seldom */
        const int32_t n = sizes[test_below(&rng, few ? 5 : round % 40 == 0 ? 9 : 6)];
        const int32_t rows = n > 2000 ? 1 : 1 + test_below(&rng, MOST_ROWS);
        struct values logits = make((size_t)n * (size_t)rows, LTN_F32, 1);
        struct values scratch = make(2 * logits.n, LTN_F32, 1);
        for (int32_t r = 0; r < rows; r++) {
            test_logits(&rng, logits.host + (size_t)r * (size_t)n, n);
            host->draws[r] = test_draws(&rng, n);
        }
        int32_t n_bias;
        struct ltn_choice choice = test_choice(&rng, n, host->bias, &n_bias), there;
        choice.n_bias = n_bias;
        snprintf(
            what, sizeof what,
            "sample of %d x %d, temperature %g, top_k %d, typical %g, top_p %g, min_p %g, last %d, bias %d",
            rows, n, choice.temperature, choice.top_k, choice.typical, choice.top_p, choice.min_p,
            choice.repeat_last, choice.n_bias);
        host->steps = round;
        there = choice;
        choice.bias = host->bias;
        there.bias = device->bias;
        send(&logits);
        CHECK(be->ops->upload(be, device, host, sizeof *host, &err));
        for (int step = 0; step < 2; step++) {
            CHECK(be->ops->sample(be, device->ids, (float *)logits.device, rows, n, &there, device->draws,
                                  (float *)scratch.device, &device->steps, device->log, LOG, &err));
            CHECK(ref->ops->sample(ref, host->ids, logits.host, rows, n, &choice, host->draws, scratch.host,
                                   &host->steps, host->log, LOG, &err));
        }
        CHECK(be->ops->download(be, found, device, sizeof *device, &err));
        for (int i = 0; i < LOG * rows; i++)
            if (found->log[i] != host->log[i])
                fail_msg("%s: chose %d, expected %d", what, found->log[i], host->log[i]);
        assert_memory_equal(found->ids, host->ids, (size_t)rows * sizeof *host->ids);
        assert_memory_equal(found->draws, host->draws, (size_t)rows * sizeof *host->draws);
        assert_int_equal(found->steps, host->steps);
        uint8_t *raw;
        free(fetch(&scratch, &raw)); /* nothing was written behind it */
        free(raw);
        drop(&logits);
        drop(&scratch);
    }
    be->ops->free(be, device);
    free(host);
    free(found);
}

static void test_sum(void **state)
{
    (void)state;
    static const size_t sizes[] = {16, 48, 4096 + 16, 5000 * 16, 1 << 22};
    struct ltn_error err = {0};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        struct values v = make(sizes[i] / sizeof(float), LTN_F32, 1);
        uint64_t expected = 0, *out, found;
        for (size_t k = 0; k < v.n; k += 2) {
            uint64_t word;
            memcpy(&word, v.host + k, sizeof word);
            expected += word;
        }
        CHECK(be->ops->alloc(be, (void **)&out, sizeof *out, &err));
        CHECK(be->ops->sum(be, out, v.device, sizes[i], &err));
        CHECK(be->ops->download(be, &found, out, sizeof found, &err));
        assert_true(found == expected);
        be->ops->free(be, out);
        drop(&v);
    }
}

/* Up and down in odd sizes, over the edges of the staging buffers. */
static void test_transfers(void **state)
{
    (void)state;
    static const size_t sizes[] = {1, 63, 4097, (4 << 20) - 1, (4 << 20) + 3, 40000001};
    struct ltn_error err = {0};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t n = sizes[i];
        uint8_t *a = malloc(n), *b = calloc(n, 1), *device, *copy;
        assert_true(a && b);
        for (size_t k = 0; k < n; k++)
            a[k] = (uint8_t)(k * 2654435761u >> 13);
        CHECK(be->ops->alloc(be, (void **)&device, n, &err));
        CHECK(be->ops->alloc(be, (void **)&copy, n, &err));
        CHECK(be->ops->upload(be, device, a, n, &err));
        memset(b, 0, n);
        CHECK(be->ops->copy(be, copy, device, n, &err));
        CHECK(be->ops->zero(be, device, n, &err));
        CHECK(be->ops->download(be, b, copy, n, &err));
        assert_memory_equal(a, b, n);
        CHECK(be->ops->download(be, b, device, n, &err));
        for (size_t k = 0; k < n; k++)
            assert_int_equal(b[k], 0);
        CHECK(be->ops->sync(be, &err));
        be->ops->free(be, device);
        be->ops->free(be, copy);
        free(a);
        free(b);
    }
}

static void test_errors(void **state)
{
    (void)state;
    struct ltn_error err = {0};
    void *p = NULL;
    assert_int_equal(be->ops->alloc(be, &p, (size_t)1 << 46, &err), LTN_ERR_MEMORY);
    assert_non_null(strstr(err.text, "needed"));
    assert_non_null(strstr(err.text, "free"));
    CHECK(be->ops->sync(be, &err)); /* the failure is over */
    /* weights of a type that the backend was not opened for */
    struct ltn_matrix m = {NULL, weights == LTN_F32 ? LTN_BF16 : LTN_F32, 8, 8, NULL};
    assert_int_equal(be->ops->logits(be, NULL, NULL, &m, 1, &err), LTN_ERR_UNSUPPORTED);
}

static void test_fused_present(void **state)
{
    (void)state;
    const struct ltn_ops *o = be->ops;
    assert_true(o->norm_linear && o->norm_glu && o->gated_linear_add && o->lightning_linear_add &&
                o->norm_logits && o->step && o->sample && o->sum && o->record && o->recorded && o->replay &&
                o->recording_free);
}

static const struct {
    const char *name;
    CMUnitTestFunction run;
    intptr_t arg;
} table[] = {
    {"transfers", test_transfers, 0},
    {"errors", test_errors, 0},
    {"fused operations are there", test_fused_present, 0},
    {"embed", test_embed, 0},
    {"norms", test_norms, 0},
    {"activations", test_activations, 0},
    {"multiply", test_multiply, 0},
    {"linear", test_maps, LINEAR},
    {"linear_add", test_maps, LINEAR_ADD},
    {"logits", test_maps, LOGITS},
    {"norm_linear", test_maps, NORM_LINEAR},
    {"norm_glu", test_maps, NORM_GLU},
    {"gated_linear_add", test_maps, GATED_ADD},
    {"norm_logits", test_maps, NORM_LOGITS},
    {"wide linear", test_wide_maps, LINEAR},
    {"wide linear_add", test_wide_maps, LINEAR_ADD},
    {"wide norm_linear", test_wide_maps, NORM_LINEAR},
    {"wide norm_glu", test_wide_maps, NORM_GLU},
    {"wide gated_linear_add", test_wide_maps, GATED_ADD},
    {"products of the table", test_tabled_maps, 0},
    {"residual", test_residual, 0},
    {"fp8 linear", test_fp8_maps, LINEAR},
    {"fp8 linear_add", test_fp8_maps, LINEAR_ADD},
    {"fp8 norm_linear", test_fp8_maps, NORM_LINEAR},
    {"fp8 norm_glu", test_fp8_maps, NORM_GLU},
    {"fp8 gated_linear_add", test_fp8_maps, GATED_ADD},
    {"lightning", test_lightning, 0},
    {"sample", test_sample, false},
    {"few samples", test_sample, true},
    {"sum", test_sum, 0},
};
enum { N_TABLE = sizeof table / sizeof *table };

struct run {
    int entry;
    enum ltn_dtype dtype;
};

static void test_entry(void **state)
{
    const struct run *run = *state;
    void *arg = (void *)table[run->entry].arg;
    weights = run->dtype;
    be = devices[weights];
    rng.s = 0x9e3779b97f4a7c15u + (uint64_t)run->entry;
    table[run->entry].run(&arg);
    struct ltn_error err = {0};
    CHECK(be->ops->sync(be, &err));
}

/* An argument picks tests by name: "lightning*", "*BF16". */
int main(int argc, char **argv)
{
    static struct run runs[3 * N_TABLE];
    static char names[3 * N_TABLE][64];
    static struct CMUnitTest tests[3 * N_TABLE];
    struct ltn_error err = {0};

    if (ltn_reference_open(&ref, &err) != LTN_OK) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    for (int d = 0; d < 3; d++) {
        devices[d] = open_cuda((enum ltn_dtype)d);
        for (int i = 0; i < N_TABLE; i++) {
            int at = d * N_TABLE + i;
            runs[at] = (struct run){i, (enum ltn_dtype)d};
            snprintf(names[at], sizeof names[at], "%s, %s", table[i].name, ltn_dtype_name((enum ltn_dtype)d));
            tests[at] = (struct CMUnitTest){names[at], test_entry, NULL, NULL, &runs[at]};
        }
    }
    fprintf(stderr, "%s\n", devices[0]->name);
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    for (int d = 0; d < 3; d++)
        devices[d]->ops->close(devices[d]);
    ref->ops->close(ref);
    return failed;
}
