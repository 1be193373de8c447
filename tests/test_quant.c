/* Quantised matrices: codes, layouts, what a rounding may lose, and the files that hold them. */
#include "kernels/quant.h"
#include "model/checkpoint.h"
#include "model/decoder.h"
#include "tests/files.h"
#include "tests/support.h"
#include "tools/feedback.h"
#include "tools/quantize.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct test_rng rng = {77};

static double e4m3(unsigned code)
{
    unsigned exponent = code >> 3 & 15, fraction = code & 7;
    double value = exponent ? ldexp(8 + fraction, (int)exponent - 10) : ldexp(fraction, -9);
    return code & 0x80 ? -value : value;
}

static void test_every_e4m3(void **state)
{
    (void)state;
    for (unsigned code = 0; code < 256; code++) {
        float value = ltn_e4m3_to_f32((uint8_t)code);
        if ((code & 0x7f) == 0x7f) {
            assert_true(isnan(value));
            continue;
        }
        assert_true((double)value == e4m3(code));
        assert_int_equal(ltn_f32_to_e4m3(value), code);
        if ((code & 0x7f) == 0x7e)
            continue;
        float next = ltn_e4m3_to_f32((uint8_t)(code + 1)), middle = (value + next) / 2;
        assert_int_equal(ltn_f32_to_e4m3(middle), code & 1 ? code + 1 : code);
        assert_int_equal(ltn_f32_to_e4m3(nextafterf(middle, next)), code + 1);
        assert_int_equal(ltn_f32_to_e4m3(nextafterf(middle, value)), code);
    }
    assert_int_equal(ltn_f32_to_e4m3(449), 0x7e);
    assert_int_equal(ltn_f32_to_e4m3(-INFINITY), 0xfe);
    assert_int_equal(ltn_f32_to_e4m3(NAN) & 0x7f, 0x7f);
    assert_int_equal(ltn_f32_to_e4m3(1e-9f), 0);
}

/* Every code comes back from its place, whatever was put beside it. */
static void test_places(void **state)
{
    (void)state;
    static const size_t widths[] = {1, 15, 16, 17, 31, 32, 33, 64, 100};
    for (enum ltn_dtype dtype = LTN_Q8; dtype < LTN_N_DTYPES; dtype++) {
        for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
            size_t cols = widths[i], n_scales = ltn_row_scales(dtype, cols);
            uint8_t row[128] = {0}, scales[512];
            float want[100];
            for (size_t g = 0; g < n_scales; g++)
                ltn_quant_put_scale(dtype, scales, g, 0.25f + (float)g);
            for (size_t c = 0; c < cols; c++) {
                float scale = 0.25f + (float)(n_scales > 1 ? c / LTN_GROUP : 0);
                int code = ltn_quant_code(dtype, (float)test_normal(&rng) * 2 * scale, scale, &want[c]);
                ltn_quant_put(dtype, row, c, code);
            }
            for (size_t c = 0; c < cols; c++)
                assert_true(ltn_weight(row, scales, dtype, cols, 0, c) == want[c]);
            for (size_t at = ltn_row_bytes(dtype, cols); at < sizeof row; at++)
                assert_int_equal(row[at], 0);
        }
    }
}

/* Relative rms error of normal weights, against what theory has for each: a uniform step of the group's
 * largest / 127 or (about) / 8, an e4m3's of 1/16 at most. */
static void test_losses(void **state)
{
    (void)state;
    static const double most[LTN_N_DTYPES] = {[LTN_Q8] = 0.006, [LTN_FP8] = 0.03, [LTN_Q4] = 0.09};
    enum { COLS = 4096 };
    static float w[COLS];
    static uint8_t row[COLS], scales[COLS];
    for (enum ltn_dtype dtype = LTN_Q8; dtype < LTN_N_DTYPES; dtype++) {
        for (int power = -12; power <= 12; power += 6) { /* of any size */
            double lost = 0, all = 0;
            for (int c = 0; c < COLS; c++)
                w[c] = (float)ldexp(test_normal(&rng), power);
            assert_true(ltn_quantise_row(dtype, w, COLS, row, scales));
            for (int c = 0; c < COLS; c++) {
                double e = w[c] - (double)ltn_weight(row, scales, dtype, COLS, 0, (size_t)c);
                lost += e * e;
                all += (double)w[c] * w[c];
            }
            assert_true(sqrt(lost / all) < most[dtype]);
            assert_true(sqrt(lost / all) > most[dtype] / 3);
        }
        memset(w, 0, sizeof w); /* and of none */
        assert_true(ltn_quantise_row(dtype, w, COLS, row, scales));
        assert_true(ltn_weight(row, scales, dtype, COLS, 0, 5) == 0);
        w[3] = 1e9f;
        assert_int_equal(ltn_quantise_row(dtype, w, COLS, row, scales), dtype == LTN_FP8);
    }
}

/* q8's scale, chosen among many, loses a fifth less than the plain one. */
static void test_scales(void **state)
{
    (void)state;
    double chosen = 0, plain = 0;
    for (int trial = 0; trial < 500; trial++) {
        float w[LTN_GROUP], largest = 0, value;
        uint8_t row[LTN_GROUP], scale[2];
        for (int i = 0; i < LTN_GROUP; i++) {
            w[i] = (float)test_normal(&rng);
            largest = fmaxf(largest, fabsf(w[i]));
        }
        assert_true(ltn_quantise_row(LTN_Q8, w, LTN_GROUP, row, scale));
        for (size_t i = 0; i < LTN_GROUP; i++) {
            chosen += pow(w[i] - ltn_weight(row, scale, LTN_Q8, LTN_GROUP, 0, i), 2);
            ltn_quant_code(LTN_Q8, w[i], largest / 127, &value);
            plain += pow(w[i] - value, 2);
        }
    }
    assert_true(chosen < 0.8 * plain);
}

/* ---- feedback ------------------------------------------------------------------------------------------ */

enum { COLS = 80, INPUTS = 400 }; /* the last group is half full */

/* What a row loses, as sweeps count it: halfway between its weights and those turned into bf16, and by half
 * their distance. */
static double row_loss(const struct ltn_feedback *f, enum ltn_dtype dtype, const float *w,
                       const uint8_t *codes, const uint8_t *scales)
{
    double e[COLS], sum = 0;
    for (size_t c = 0; c < COLS; c++) {
        const float value = ltn_weight(codes, scales, dtype, COLS, 0, c);
        const double apart = ((double)ltn_bf16_to_f32(ltn_f32_to_bf16(value)) - value) / 2;
        const size_t first = c / LTN_GROUP * LTN_GROUP,
                     n = COLS - first < LTN_GROUP ? COLS - first : LTN_GROUP;
        e[c] = w[c] - (value + apart);
        sum += f->groups[first * LTN_GROUP + (c - first) * (n + 1)] * apart * apart;
    }
    for (size_t i = 0; i < COLS; i++)
        for (size_t k = 0; k < COLS; k++)
            sum += e[i] * f->gram[i * COLS + k] * e[k];
    return sum;
}

/* Inputs that depend on one another: feedback loses less than the nearest codes, a sweep never makes a row
 * worse and makes many better, and the same row twice is the same. */
static void test_feedback(void **state)
{
    (void)state;
    static float gram[COLS * COLS], room[4 * COLS];
    struct ltn_error err;
    struct ltn_feedback f;
    for (int t = 0; t < INPUTS; t++) {
        float x[COLS], common = (float)test_normal(&rng);
        for (int c = 0; c < COLS; c++)
            x[c] = (float)test_normal(&rng) + 2 * common * (float)sin(c);
        for (int i = 0; i < COLS; i++)
            for (int k = 0; k < COLS; k++)
                gram[i * COLS + k] += x[i] * x[k];
    }
    assert_int_equal(ltn_feedback_room(COLS) * sizeof *room, sizeof room);
    CHECK(ltn_feedback_open(&f, gram, COLS, "w", &err));
    for (enum ltn_dtype dtype = LTN_Q8; dtype < LTN_N_DTYPES; dtype++) {
        double nearest = 0, fed = 0, swept = 0;
        for (int trial = 0; trial < 100; trial++) {
            float w[COLS];
            uint8_t codes[COLS], scales[64], again[COLS], again_scales[64];
            double loss = INFINITY;
            for (int c = 0; c < COLS; c++)
                w[c] = (float)test_normal(&rng);
            assert_true(ltn_quantise_row(dtype, w, COLS, codes, scales));
            nearest += row_loss(&f, dtype, w, codes, scales);
            for (int sweeps = 0; sweeps <= 3; sweeps++) {
                assert_true(ltn_feedback_row(&f, dtype, sweeps, w, room, codes, scales));
                const double now = row_loss(&f, dtype, w, codes, scales);
                assert_true(now <= loss * (1 + 1e-5));
                loss = now;
                *(sweeps == 0 ? &fed : &swept) += sweeps == 0 || sweeps == 3 ? now : 0;
            }
            assert_true(ltn_feedback_row(&f, dtype, 3, w, room, again, again_scales));
            assert_memory_equal(codes, again, ltn_row_bytes(dtype, COLS));
            assert_memory_equal(scales, again_scales, ltn_row_scale_bytes(dtype, COLS));
        }
        assert_true(fed < 0.95 * nearest);
        assert_true(swept < 0.995 * fed);
    }
    float huge[COLS] = {1e30f}; /* whose loss is beyond float */
    uint8_t codes[COLS], scales[64];
    assert_false(ltn_feedback_row(&f, LTN_FP8, 1, huge, room, codes, scales));
    ltn_feedback_close(&f);
    memset(gram, 0, sizeof gram);
    assert_int_equal(ltn_feedback_open(&f, gram, COLS, "w", &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "tensor \"w\": its inputs, over the text, are all zero"));
}

/* ---- files --------------------------------------------------------------------------------------------- */

static struct ltn_config config(void)
{
    return (struct ltn_config){.vocab_size = 40,
                               .embed_dim = 96,
                               .hidden_dim = 96,
                               .n_layers = 2,
                               .n_heads = 3,
                               .glu_dim = 80,
                               .gate_dim = 8,
                               .act = LTN_ACT_SILU,
                               .layer_norm = true,
                               .bias = true,
                               .bos_id = -1,
                               .eos_id = -1,
                               .pad_id = -1,
                               .lrpe = {1, 0}};
}

static void quantise(const char *from, const char *to, enum ltn_dtype dtype)
{
    struct ltn_error err;
    struct ltn_checkpoint src;
    CHECK(ltn_checkpoint_open(&src, in_folder(from), &err));
    const struct ltn_quantize_options options = {.dtype = dtype};
    CHECK(ltn_quantize(&src, in_folder(to), &options, &err));
    ltn_checkpoint_close(&src);
}

/* Each tensor is what the layout says, and each weight within half a step of what it was. */
static void test_files(void **state)
{
    (void)state;
    struct ltn_error err;
    struct ltn_checkpoint src, q;
    test_write_model(config(), LTN_F32, 3, in_folder("f32.ltn"));
    CHECK(ltn_checkpoint_open(&src, in_folder("f32.ltn"), &err));
    for (enum ltn_dtype dtype = LTN_Q8; dtype < LTN_N_DTYPES; dtype++) {
        quantise("f32.ltn", "q.ltn", dtype);
        CHECK(ltn_checkpoint_open(&q, in_folder("q.ltn"), &err));
        CHECK(ltn_checkpoint_verify(&q, &err));
        assert_int_equal(q.dtype, dtype);
        for (size_t i = 0; i < q.n_specs; i++) {
            const struct ltn_tensor_spec *spec = &q.specs[i];
            const uint8_t *was = src.file.map + src.tensors[i]->offset,
                          *is = q.file.map + q.tensors[i]->offset;
            if (!spec->is_matrix) {
                assert_null(q.scales[i]);
                assert_memory_equal(was, is, src.tensors[i]->bytes);
                continue;
            }
            bool small =
                strstr(spec->name, "embed") || strstr(spec->name, "lm_head") || strstr(spec->name, "gate");
            enum ltn_dtype own = small ? LTN_Q8 : dtype;
            assert_int_equal(ltn_checkpoint_matrix_dtype(dtype, spec), own);
            size_t rows = (size_t)spec->shape[0], cols = (size_t)spec->shape[1];
            for (size_t r = 0; r < rows; r++) {
                float want[96], largest = 0;
                memcpy(want, was + r * cols * 4, cols * 4);
                for (size_t c = 0; c < cols; c++)
                    largest = fmaxf(largest, fabsf(want[c]));
                for (size_t c = 0; c < cols; c++) {
                    float got = ltn_weight(is, q.file.map + q.scales[i]->offset, own, cols, r, c);
                    float step = own == LTN_Q8 ? largest / 103
                                 : own == LTN_FP8
                                     ? fabsf(want[c]) / 8 + largest / 448 / 512
                                     : largest / 3.2f; /* its 7 may have to stand for 8 and more */
                    assert_true(fabsf(got - want[c]) <= 0.51f * step);
                }
            }
        }
        ltn_checkpoint_close(&q);
    }
    ltn_checkpoint_close(&src);
}

/* A header in which the first `from` has become `to`, of the same length, is refused with `what`. */
static void refuses(const char *from, const char *to, const char *what)
{
    struct ltn_error err;
    struct ltn_checkpoint q;
    size_t bytes;
    uint8_t *file = read_file(in_folder("q.ltn"), &bytes);
    uint8_t *at = memmem(file, bytes, from, strlen(from));
    assert_non_null(at);
    assert_int_equal(strlen(from), strlen(to));
    memcpy(at, to, strlen(to));
    write_file(in_folder("bad.ltn"), file, bytes);
    free(file);
    assert_int_equal(ltn_checkpoint_open(&q, in_folder("bad.ltn"), &err), LTN_ERR_INPUT);
    if (!strstr(err.text, what))
        fail_msg("expected \"%s\", found \"%s\"", what, err.text);
}

static void test_hostile_files(void **state)
{
    (void)state;
    test_write_model(config(), LTN_F32, 3, in_folder("f32.ltn"));
    quantise("f32.ltn", "q.ltn", LTN_Q4);
    refuses("l1.weight.scales", "l1.weight.scalez", "l1.weight.scales\" is missing");
    refuses("\"dtype\":\"q4\"", "\"dtype\":\"q8\"", "is U8, expected I8 as the metadata says");
    refuses("\"dtype\":\"q4\"", "\"dtype\":\"q7\"", "expected f32, bf16, f16, q8, fp8 or q4");
    refuses("\"I8\",\"shape\":[40,96]", "\"U8\",\"shape\":[40,96]", "is U8, expected I8");
    refuses("\"F16\",\"shape\":[40,3]", "\"F16\",\"shape\":[30,4]", "has shape [30, 4], expected [40, 3]");
    refuses("\"U8\",\"shape\":[80,48]", "\"U8\",\"shape\":[48,80]", "has shape [48, 80], expected [80, 48]");
}

/* An infinite weight is named; a damaged scale and an e4m3 NaN are found by a verification. */
static void test_not_finite(void **state)
{
    (void)state;
    struct ltn_error err;
    struct ltn_checkpoint src, q;
    size_t bytes;
    test_write_model(config(), LTN_F32, 3, in_folder("f32.ltn"));
    CHECK(ltn_checkpoint_open(&src, in_folder("f32.ltn"), &err));
    size_t spec = 0;
    while (!strstr(src.specs[spec].name, "l3.weight"))
        spec++;
    uint64_t at = src.tensors[spec]->offset + 4 * 123;
    ltn_checkpoint_close(&src);
    uint8_t *file = read_file(in_folder("f32.ltn"), &bytes);
    memcpy(file + at, &(float){NAN}, 4);
    write_file(in_folder("nan.ltn"), file, bytes);
    free(file);
    CHECK(ltn_checkpoint_open(&src, in_folder("nan.ltn"), &err));
    const struct ltn_quantize_options options = {.dtype = LTN_Q4};
    assert_int_equal(ltn_quantize(&src, in_folder("none.ltn"), &options, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "channel_mixer.l3.weight\", element 123: nan is not a finite number"));
    const struct ltn_quantize_options calibrated = {.dtype = LTN_Q8, .calibrate = "README.md"};
    assert_int_equal(ltn_quantize(&src, in_folder("none.ltn"), &calibrated, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "channel_mixer.l3.weight\" is not finite at element 123"));
    ltn_checkpoint_close(&src);

    quantise("f32.ltn", "q.ltn", LTN_FP8);
    CHECK(ltn_checkpoint_open(&q, in_folder("q.ltn"), &err));
    uint64_t places[] = {q.tensors[spec]->offset + 7, q.scales[spec]->offset + 4};
    ltn_checkpoint_close(&q);
    for (int i = 0; i < 2; i++) {
        file = read_file(in_folder("q.ltn"), &bytes);
        if (i == 0)
            file[places[i]] = 0x7f;
        else
            memcpy(file + places[i], &(float){INFINITY}, 4);
        write_file(in_folder("bad.ltn"), file, bytes);
        free(file);
        CHECK(ltn_checkpoint_open(&q, in_folder("bad.ltn"), &err));
        assert_int_equal(ltn_checkpoint_verify(&q, &err), LTN_ERR_INPUT);
        assert_non_null(strstr(err.text, i == 0 ? "l3.weight\" is not finite at element 7"
                                                : "l3.weight.scales\" is not finite at element 1"));
        ltn_checkpoint_close(&q);
    }
}

/* A backend that has not all types says which tensor it cannot take. */
static void test_backend_without(void **state)
{
    (void)state;
    struct ltn_error err;
    struct ltn_checkpoint q;
    struct ltn_backend *be;
    struct ltn_model model;
    test_write_model(config(), LTN_F32, 3, in_folder("f32.ltn"));
    quantise("f32.ltn", "q.ltn", LTN_Q4);
    CHECK(ltn_checkpoint_open(&q, in_folder("q.ltn"), &err));
    CHECK(ltn_cpu_open(&be, 1, &err));
    be->dtypes &= ~(1u << LTN_Q4);
    assert_int_equal(ltn_model_load(&model, &q, be, NULL, NULL, &err), LTN_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.text, "q.ltn: tensor \"model.layers.0."));
    assert_non_null(strstr(err.text, "\" is Q4, which CPU, 1 thread"));
    be->ops->close(be);
    ltn_checkpoint_close(&q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_e4m3),      cmocka_unit_test(test_places),
        cmocka_unit_test(test_losses),          cmocka_unit_test(test_scales),
        cmocka_unit_test(test_feedback),        cmocka_unit_test(test_files),
        cmocka_unit_test(test_hostile_files),   cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_backend_without),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
