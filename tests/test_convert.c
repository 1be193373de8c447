/* The converter: golden checkpoints value by value, every rule about heads, dtypes and configurations, and
 * directories that mean harm.
 *
 *   test_convert generate DIR D L HEADS G V FILES DTYPE    writes a checkpoint of that shape to measure with
 */
#include "model/checkpoint.h"
#include "tests/files.h"
#include "tests/hf.h"
#include "tests/support.h"
#include "tokenizer/tokenizer.h"
#include "tools/hf_convert.h"
#include "tools/source.h"

#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <cmocka.h>

static char notes[2048];

static void take_note(void *ctx, const char *text)
{
    (void)ctx;
    strncat(notes, text, sizeof notes - strlen(notes) - 1);
}

static const struct ltn_convert_options as_stored = {.note = take_note};

static enum ltn_status convert(const char *dir, const char *out, struct ltn_error *err)
{
    notes[0] = 0;
    return ltn_hf_convert(dir, out, &as_stored, err);
}

/* ---- golden checkpoints ---- */

/* The folder of the case: in the repository, else in $LTN_GOLDEN; false where neither has it. */
static bool find_case(char path[512], const char *name)
{
    const char *roots[] = {"tests/data/golden", getenv("LTN_GOLDEN")};
    for (int i = 0; i < 2; i++) {
        snprintf(path, 512, "%s/%s", roots[i] ? roots[i] : "", name);
        if (roots[i] && access(path, F_OK) == 0)
            return true;
    }
    return false;
}

static const char *const dtype_names[] = {[LTN_F32] = "F32", [LTN_BF16] = "BF16", [LTN_F16] = "F16"};

/* Every tensor of the converted case has the bytes that PyTorch and safetensors read from it. */
static void golden(void **state)
{
    const char *name = *state;
    char dir[512], line[512], seen = 0;
    struct ltn_error err = {0};
    struct ltn_checkpoint ck;
    if (!find_case(dir, name))
        skip();
    CHECK(convert(dir, in_folder("golden.ltn"), &err));
    CHECK(ltn_checkpoint_open(&ck, in_folder("golden.ltn"), &err));
    CHECK(ltn_checkpoint_verify(&ck, &err));
    FILE *list = fopen("tests/data/golden_tensors.txt", "r");
    assert_non_null(list);
    size_t n = 0;
    while (fgets(line, sizeof line, list)) {
        char case_name[100], tensor[100], dtype[8], shape[40], hash[40], found[33], found_shape[40] = "";
        assert_int_equal(sscanf(line, "%99s %99s %7s %39s %39s", case_name, tensor, dtype, shape, hash), 5);
        if (strcmp(case_name, name) != 0)
            continue;
        seen = 1;
        const struct ltn_st_tensor *t = ltn_st_find(&ck.file, tensor);
        if (!t) { /* only a head that is the embedding may be left out */
            assert_string_equal(tensor, "lm_head.weight");
            assert_true(ck.config.tied);
            continue;
        }
        n++;
        for (int32_t i = 0; i < t->rank; i++)
            snprintf(found_shape + strlen(found_shape), sizeof found_shape - strlen(found_shape),
                     "%s%" PRId64, i ? "x" : "", t->shape[i]);
        assert_string_equal(found_shape, shape);
        assert_string_equal(ltn_st_dtype_name(t->dtype), dtype);
        XXH128_hash_t h = XXH3_128bits(ck.file.map + t->offset, t->bytes);
        ltn_st_checksum_text(found, h.high64, h.low64);
        if (strcmp(found, hash) != 0)
            fail_msg("%s: values differ", tensor);
    }
    fclose(list);
    assert_true(seen);
    assert_int_equal(n, ck.n_specs);

    /* The same with other dtypes: each value is what the scalar conversion of the stored one gives. */
    for (int d = 0; d < 3; d++) {
        struct ltn_checkpoint other;
        struct ltn_convert_options options = {.has_dtype = true, .dtype = (enum ltn_dtype)d};
        CHECK(ltn_hf_convert(dir, in_folder("other.ltn"), &options, &err));
        CHECK(ltn_checkpoint_open(&other, in_folder("other.ltn"), &err));
        CHECK(ltn_checkpoint_verify(&other, &err));
        assert_int_equal(other.dtype, d);
        for (size_t i = 0; i < ck.n_specs; i++) {
            const struct ltn_st_tensor *a = ck.tensors[i], *b = other.tensors[i];
            enum ltn_dtype from, to;
            assert_true(ltn_checkpoint_dtype(&from, a->dtype) && ltn_checkpoint_dtype(&to, b->dtype));
            assert_int_equal(to, ck.specs[i].is_matrix ? (enum ltn_dtype)d : from);
            for (size_t k = 0; k < a->bytes / ltn_dtype_size(from); k++) {
                uint32_t word = 0, other_word = 0;
                memcpy(&word, ck.file.map + a->offset + k * ltn_dtype_size(from), ltn_dtype_size(from));
                memcpy(&other_word, other.file.map + b->offset + k * ltn_dtype_size(to), ltn_dtype_size(to));
                float value = ltn_load(&word, from, 0);
                uint32_t expected = to == LTN_F32    ? ltn_f32_to_bits(value)
                                    : to == LTN_BF16 ? ltn_f32_to_bf16(value)
                                                     : ltn_f32_to_f16(value);
                if (other_word != expected)
                    fail_msg("%s[%zu] as %s", a->name, k, dtype_names[to]);
            }
        }
        ltn_checkpoint_close(&other);
    }
    ltn_checkpoint_close(&ck);
}

/* ---- made checkpoints ---- */

static struct test_hf small(void)
{
    struct ltn_error err = {0};
    struct test_hf hf = {.config = {.vocab_size = 11,
                                    .embed_dim = 8,
                                    .hidden_dim = 8,
                                    .n_layers = 2,
                                    .n_heads = 2,
                                    .glu_dim = 12,
                                    .act = LTN_ACT_SILU,
                                    .tied = true,
                                    .scale_embedding = true,
                                    .bos_id = 1,
                                    .eos_id = 2,
                                    .pad_id = 0,
                                    .lrpe = {1, 0}},
                         .matrices = LTN_ST_BF16,
                         .vectors = LTN_ST_BF16,
                         .files = 1,
                         .seed = 5};
    CHECK(ltn_config_check(&hf.config, &err));
    return hf;
}

static const char *made(const struct test_hf *hf)
{
    const char *dir = new_dir();
    test_write_hf(dir, hf);
    return dir;
}

static void expect_good(const char *dir, struct ltn_checkpoint *ck)
{
    struct ltn_error err = {0};
    CHECK(convert(dir, in_folder("out.ltn"), &err));
    CHECK(ltn_checkpoint_open(ck, in_folder("out.ltn"), &err));
    CHECK(ltn_checkpoint_verify(ck, &err));
}

static void expect_bad(const char *dir, const char *error)
{
    struct ltn_error err = {0};
    unlink(in_folder("bad.ltn"));
    check_error(convert(dir, in_folder("bad.ltn"), &err), &err, error);
    assert_int_equal(access(in_folder("bad.ltn"), F_OK), -1);
}

static void heads(void **state)
{
    struct ltn_checkpoint ck;
    struct test_hf hf = small();
    (void)state;
    expect_good(made(&hf), &ck);
    assert_true(ck.config.tied);
    ltn_checkpoint_close(&ck);
    hf.head = HEAD_EQUAL;
    expect_good(made(&hf), &ck);
    assert_true(ck.config.tied);
    assert_null(ltn_st_find(&ck.file, "lm_head.weight"));
    ltn_checkpoint_close(&ck);
    hf.head = HEAD_OTHER;
    expect_bad(made(&hf), "tie_word_embeddings is true, but lm_head.weight differs");

    hf.head = HEAD_AS_CONFIG;
    hf.config.tied = false;
    expect_good(made(&hf), &ck); /* one of its own */
    assert_false(ck.config.tied);
    assert_non_null(ltn_st_find(&ck.file, "lm_head.weight"));
    ltn_checkpoint_close(&ck);
    char *untied = ltn_config_print(&hf.config);
    assert_non_null(untied);
    hf.config.tied = true;
    hf.config_json = untied;
    expect_bad(made(&hf), "tie_word_embeddings is false, but there is no lm_head.weight");
    hf.head = HEAD_EQUAL; /* equal means tied, whatever the config says */
    expect_good(made(&hf), &ck);
    assert_true(ck.config.tied);
    ltn_checkpoint_close(&ck);
    free(untied);
}

static void dtypes(void **state)
{
    static const enum ltn_st_dtype stored[] = {LTN_ST_F16, LTN_ST_BF16, LTN_ST_F32, LTN_ST_F64};
    static const enum ltn_dtype expected[] = {LTN_F16, LTN_BF16, LTN_F32, LTN_F32};
    struct ltn_error err = {0};
    struct ltn_checkpoint ck;
    struct ltn_st_file source;
    (void)state;
    for (int m = 0; m < 4; m++)
        for (int v = 0; v < 4; v++) {
            struct test_hf hf = small();
            hf.config.bias = hf.config.layer_norm = true;
            hf.matrices = stored[m];
            hf.vectors = stored[v];
            const char *dir = made(&hf);
            char path[600];
            expect_good(dir, &ck);
            assert_int_equal(ck.dtype, expected[m]);
            snprintf(path, sizeof path, "%s/model.safetensors", dir);
            CHECK(ltn_st_open(&source, path, &err));
            for (size_t i = 0; i < ck.n_specs; i++) {
                const struct ltn_st_tensor *a = ltn_st_find(&source, ck.specs[i].name), *b = ck.tensors[i];
                assert_string_equal(ltn_st_dtype_name(b->dtype),
                                    dtype_names[expected[ck.specs[i].is_matrix ? m : v]]);
                const uint8_t *from = source.map + a->offset, *to = ck.file.map + b->offset;
                if (a->dtype != LTN_ST_F64)
                    assert_memory_equal(from, to, a->bytes);
                for (size_t k = 0; a->dtype == LTN_ST_F64 && k < a->bytes / 8; k++) {
                    double x;
                    float y;
                    memcpy(&x, from + 8 * k, 8);
                    memcpy(&y, to + 4 * k, 4);
                    assert_true((double)y == x);
                }
            }
            ltn_st_close(&source);
            ltn_checkpoint_close(&ck);
        }
}

/* Rewrites one tensor of a directory's model.safetensors: n elements from `at` on, or all of it in another
 * dtype (data then holds all). */
static void rewrite(const char *dir, const char *name, enum ltn_st_dtype dtype, size_t at, const void *data,
                    size_t n)
{
    struct ltn_error err = {0};
    struct ltn_st_file f;
    struct ltn_st_writer *writer;
    char path[600];
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    CHECK(ltn_st_open(&f, path, &err));
    struct ltn_st_tensor *tensors = calloc(f.n_tensors, sizeof *tensors);
    assert_non_null(tensors);
    size_t size = ltn_st_dtype_size(dtype), which = f.n_tensors;
    for (size_t i = 0; i < f.n_tensors; i++) {
        tensors[i] = f.tensors[i];
        if (strcmp(tensors[i].name, name) == 0) {
            which = i;
            tensors[i].bytes = tensors[i].bytes / ltn_st_dtype_size(tensors[i].dtype) * size;
            tensors[i].dtype = dtype;
        }
    }
    assert_true(which < f.n_tensors);
    CHECK(ltn_st_create(&writer, path, tensors, f.n_tensors, NULL, 0, &err));
    for (size_t i = 0; i < f.n_tensors; i++) {
        uint8_t *copy = calloc(1, tensors[i].bytes);
        assert_non_null(copy);
        if (i != which || n * size < tensors[i].bytes)
            memcpy(copy, f.map + f.tensors[i].offset, tensors[i].bytes);
        if (i == which)
            memcpy(copy + at * size, data, n * size);
        CHECK(ltn_st_write(writer, copy, tensors[i].bytes, &err));
        free(copy);
    }
    CHECK(ltn_st_finish(writer, &err));
    free(tensors);
    ltn_st_close(&f);
}

static void mixed_dtypes(void **state)
{
    struct test_hf hf = small();
    struct ltn_checkpoint ck;
    float values[64]; /* [D, H] */
    (void)state;
    for (int i = 0; i < 64; i++)
        values[i] = 1.0f / (float)(i + 3);
    const char *dir = made(&hf);
    rewrite(dir, "model.layers.1.token_mixer.out_proj.weight", LTN_ST_F32, 0, values, 64);
    expect_good(dir, &ck);
    assert_non_null(strstr(notes, "matrices of several dtypes, all became F32"));
    assert_int_equal(ck.dtype, LTN_F32);
    const struct ltn_st_tensor *t = ltn_st_find(&ck.file, "model.layers.1.token_mixer.out_proj.weight");
    assert_memory_equal(ck.file.map + t->offset, values, sizeof values);
    assert_int_equal(ltn_st_find(&ck.file, "model.embed_tokens.weight")->dtype, LTN_ST_F32);
    assert_int_equal(ltn_st_find(&ck.file, "model.layers.0.token_mixer.lrpe.theta")->dtype, LTN_ST_BF16);
    ltn_checkpoint_close(&ck);
}

static void bad_values(void **state)
{
    static const char name[] = "model.layers.0.channel_mixer.l3.weight";
    const uint16_t nan = 0x7fc1, infinity = 0xff80;
    const float large = 70000, huge = 3.4e38f;
    const double beyond = 1e39;
    struct test_hf hf = small();
    struct ltn_error err = {0};
    struct ltn_convert_options f16 = {.has_dtype = true, .dtype = LTN_F16};
    struct ltn_convert_options bf16 = {.has_dtype = true, .dtype = LTN_BF16};
    (void)state;
    const char *dir = made(&hf);
    rewrite(dir, name, LTN_ST_BF16, 17, &nan, 1);
    expect_bad(dir,
               "tensor \"model.layers.0.channel_mixer.l3.weight\", element 17: nan is not a finite number");
    rewrite(dir, name, LTN_ST_BF16, 16, &infinity, 1);
    expect_bad(dir, "element 16: -inf is not a finite number");
    check_error(ltn_hf_convert(dir, in_folder("bad.ltn"), &f16, &err), &err,
                "element 16: -inf is not a finite number");
    hf.matrices = LTN_ST_F32;
    dir = made(&hf);
    rewrite(dir, name, LTN_ST_F32, 95, &large, 1);
    check_error(ltn_hf_convert(dir, in_folder("bad.ltn"), &f16, &err), &err,
                "l3.weight\", element 95: 70000 is beyond the range of F16");
    CHECK(ltn_hf_convert(dir, in_folder("bad.ltn"), &bf16, &err));
    rewrite(dir, name, LTN_ST_F32, 95, &huge, 1); /* rounds up to infinity in BF16 */
    check_error(ltn_hf_convert(dir, in_folder("bad.ltn"), &bf16, &err), &err, "is beyond the range of BF16");
    hf.matrices = LTN_ST_F64;
    dir = made(&hf);
    rewrite(dir, name, LTN_ST_F64, 3, &beyond, 1);
    expect_bad(dir, "element 3: inf is not a finite F32");
    hf.matrices = LTN_ST_F32;
    dir = made(&hf);
    const int32_t zeros[96] = {0};
    rewrite(dir, name, LTN_ST_I32, 0, zeros, 96);
    expect_bad(dir, "l3.weight\" is I32, expected F16, BF16, F32 or F64");
}

/* ---- config.json ---- */

static void configs_good(void **state)
{
    /* Sizes that all cases need; what is left out takes the official default. */
    static const char sizes[] =
        "\"vocab_size\": 11, \"decoder_embed_dim\": 8.0, \"hidden_dim\": 8, \"decoder_layers\": 2,"
        " \"decoder_attention_heads\": 2";
    static const struct {
        const char *more;
        struct ltn_config config; /* what differs from `plain` below is set by `change` */
        int change;
    } cases[] = {
        {", \"glu_dim\": 12", {0}, 0},
        {", \"glu_dim\": -1", {0}, 1},
        {", \"glu_dim\": 12, \"linear_use_lrpe_list\": [], \"linear_use_lrpe\": true", {0}, 2},
        {", \"glu_dim\": 12, \"linear_use_lrpe_list\": [0, 3.5, 1, 1], \"linear_use_lrpe\": 0", {0}, 3},
        {", \"glu_dim\": 12, \"linear_use_lrpe_list\": [false, true]", {0}, 3},
        {", \"glu_dim\": 12, \"linear_act_fun\": \"mish\"", {0}, 4},
        {", \"glu_dim\": 12, \"linear_act_fun\": \"none\"", {0}, 5},
        {", \"glu_dim\": 12, \"norm_type\": \"rmsnorm\"", {0}, 6},
        {", \"glu_dim\": 12, \"no_scale_embedding\": 1, \"bias\": true", {0}, 7},
        {", \"glu_dim\": 12, \"bos_token_id\": null, \"eos_token_id\": 10, \"pad_token_id\": -1", {0}, 8},
        {", \"glu_dim\": 12, \"model_type\": \"llama\", \"act_fun\": 7, \"x\": [{\"y\": 1e-5}], "
         "\"final_norm\": null,"
         " \"tie_word_embeddings\": null, \"add_bos_token\": true, \"architectures\": [\"x\"]",
         {0},
         0},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct test_hf hf = small();
        struct ltn_checkpoint ck;
        char json[1024];
        struct ltn_config *c = &hf.config;
        memset(c->lrpe, 0, sizeof c->lrpe);
        switch (cases[i].change) {
        case 1:
            c->glu_dim = 8;
            break;
        case 2:
            c->lrpe[0] = c->lrpe[1] = 1;
            break;
        case 3:
            c->lrpe[1] = 1;
            break;
        case 4:
        case 5:
            c->act = LTN_ACT_NONE;
            break;
        case 6:
            c->layer_norm = true;
            break;
        case 7:
            c->scale_embedding = false;
            c->bias = true;
            break;
        case 8:
            c->bos_id = c->pad_id = -1;
            c->eos_id = 10;
            break;
        default:
            break;
        }
        snprintf(json, sizeof json, "{%s%s}\n", sizes, cases[i].more);
        hf.config_json = json;
        expect_good(made(&hf), &ck);
        assert_memory_equal(&ck.config, c, sizeof *c);
        assert_int_equal(strstr(notes, "\"mish\" is unknown") != NULL, cases[i].change == 4);
        assert_non_null(strstr(notes, "no tokenizer.model"));
        ltn_checkpoint_close(&ck);
    }
    /* TransNormerLLM3, told by its tensors; several files */
    struct test_hf hf = small();
    struct ltn_checkpoint ck;
    char json[1024];
    hf.config.gate_dim = 3;
    hf.config.bias = true;
    hf.files = 4;
    snprintf(json, sizeof json,
             "{%s, \"glu_dim\": 12, \"linear_use_lrpe_list\": [1, 0], \"bias\": true, \"gate_dim\": 16}",
             sizes);
    hf.config_json = json;
    expect_good(made(&hf), &ck);
    assert_memory_equal(&ck.config, &hf.config, sizeof hf.config);
    assert_non_null(
        strstr(ltn_st_metadata(&ck.file, "provenance"),
               "model-00001-of-00004.safetensors to model-00004-of-00004.safetensors, stored as BF16"));
    ltn_checkpoint_close(&ck);
}

static void configs_bad(void **state)
{
    static const char sizes[] =
        "\"vocab_size\":11,\"decoder_embed_dim\":8,\"hidden_dim\":8,\"decoder_layers\":2,"
        "\"decoder_attention_heads\":2,\"glu_dim\":12,";
    static const struct {
        const char *json, *error;
        bool sized;
    } cases[] = {
        {"{", "config.json: bad JSON", false},
        {"[]", "not a JSON object", false},
        {"{}", "has shape [11, 8], expected [64000, 1024] after config.json", false},
        {"\"linear_use_lrpe_list\":[1]}", "has 1 entries, expected one for each of 2 layers", true},
        {"\"linear_use_lrpe_list\":[1,\"0\"]}", "neither a boolean nor a number", true},
        {"\"linear_use_lrpe_list\":1}", "is not an array", true},
        {"\"linear_use_lrpe_list\":[1,1]}", "tensor \"model.layers.1.token_mixer.lrpe.theta\" is missing",
         true},
        {"\"linear_use_lrpe_list\":[0,0]}",
         "tensor \"model.layers.0.token_mixer.lrpe.theta\" is not one that", true},
        {"\"linear_use_lrpe_list\":[1,0],\"bias\":true}", "qkvu_proj.bias\" is missing", true},
        {"\"linear_use_lrpe_list\":[1,0],\"bias\":\"no\"}", "neither a boolean nor a number", true},
        {"\"linear_use_lrpe_list\":[1,0],\"norm_type\":5}", "\"norm_type\" is a number, expected a string",
         true},
        {"\"linear_use_lrpe_list\":[1,0],\"eos_token_id\":11}", "eos_token_id", true},
        {"\"linear_use_lrpe_list\":[1,0],\"eos_token_id\":[2]}",
         "\"eos_token_id\" is an array, expected an integer", true},
        {"\"linear_use_lrpe_list\":[1,0],\"vocab_size\":11}", "\"vocab_size\" stands twice", true},
        {"\"linear_use_lrpe_list\":[1,0]} x", "text after the end", true},
    };
    struct test_hf hf = small();
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char json[1024];
        snprintf(json, sizeof json, "%s%s%s", cases[i].sized ? "{" : "", cases[i].sized ? sizes : "",
                 cases[i].json);
        hf.config_json = json;
        expect_bad(made(&hf), cases[i].error);
    }
}

/* ---- directories ---- */

static void write_in(const char *dir, const char *name, const char *text)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    write_file(path, text, strlen(text));
}

static void remove_in(const char *dir, const char *name)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_int_equal(unlink(path), 0);
}

static void directories(void **state)
{
    static const char first[] = "model-00001-of-00002.safetensors", index[] = "model.safetensors.index.json";
    struct test_hf hf = small();
    char json[512];
    (void)state;
    expect_bad(in_folder("nowhere"), "nowhere: cannot open: No such file");
    expect_bad("/dev/null", "not a directory");
    const char *dir = made(&hf);
    remove_in(dir, "config.json");
    expect_bad(dir, "config.json: cannot open: No such file");
    remove_in(dir, "model.safetensors");
    expect_bad(dir, "no weights: neither model.safetensors nor pytorch_model.bin");
    write_in(dir, "model.safetensors", "");
    expect_bad(dir, "0 bytes");
    write_in(dir, "model.safetensors", "\x02\0\0\0\0\0\0\0{}");
    remove_in(dir, "model.safetensors");
    write_in(dir, "pytorch_model.bin", "\x80\x02}q.");
    expect_bad(dir, "not a whole torch checkpoint");

    hf.files = 2;
    dir = made(&hf);
    struct ltn_checkpoint ck;
    expect_good(dir, &ck);
    ltn_checkpoint_close(&ck);
    static const char *const names[] = {
        "../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".x.safetensors", "x.bin", ""};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(json, sizeof json, "{\"weight_map\":{\"a\":\"%s\"}}", names[i]);
        write_in(dir, index, json);
        expect_bad(dir, "expected a file name ending in .safetensors");
    }
    write_in(dir, index, "{\"weight_map\":{\"a\":5}}");
    expect_bad(dir, "expected a file name");
    write_in(dir, index, "{\"weight_map\":{}}");
    expect_bad(dir, "no weight_map");
    write_in(dir, index, "{\"weight_map\":[]}");
    expect_bad(dir, "no weight_map");
    write_in(dir, index, "[]");
    expect_bad(dir, "no weight_map");
    snprintf(json, sizeof json, "{\"weight_map\":{\"a\":\"%s\"}}", first);
    write_in(dir, index, json);
    expect_bad(dir, "tensor \"a\" is not in model-00001-of-00002.safetensors, where the index has it");
    snprintf(json, sizeof json, "{\"weight_map\":{\"a\":\"%s\",\"b\":\"model-3.safetensors\"}}", first);
    write_in(dir, index, json);
    expect_bad(dir, "model-3.safetensors: cannot open");
    /* a copy of a file brings its tensors a second time */
    char command[2048];
    snprintf(command, sizeof command, "cp %s/%s %s/copy.safetensors", dir, first, dir);
    assert_int_equal(system(command), 0);
    snprintf(json, sizeof json, "{\"weight_map\":{\"a\":\"%s\",\"b\":\"copy.safetensors\"}}", first);
    write_in(dir, index, json);
    expect_bad(dir, "stands in");

    /* neither variant */
    struct ltn_error err = {0};
    struct ltn_st_writer *writer;
    const struct ltn_st_tensor one = {
        .name = "transformer.wte.weight", .dtype = LTN_ST_U8, .rank = 1, .shape = {1}, .bytes = 1};
    hf.files = 1;
    dir = made(&hf);
    snprintf(command, sizeof command, "%s/model.safetensors", dir);
    CHECK(ltn_st_create(&writer, command, &one, 1, NULL, 0, &err));
    CHECK(ltn_st_write(writer, "x", 1, &err));
    CHECK(ltn_st_finish(writer, &err));
    expect_bad(dir, "not a TransNormerLLM: layer 0 has neither token_mixer.qkvu_proj.weight");
}

/* An existing output is replaced only by a whole new one; a stop leaves nothing behind. */
static enum ltn_status stop_half_way(void *ctx, uint64_t done, uint64_t total)
{
    *(uint64_t *)ctx = done;
    return done > total / 2 ? LTN_ERR_STOPPED : LTN_OK;
}

static void replaced_only_whole(void **state)
{
    struct test_hf hf = small();
    struct ltn_error err = {0};
    struct ltn_checkpoint ck;
    uint64_t done = 0;
    struct ltn_convert_options stopping = {.progress = stop_half_way, .ctx = &done};
    const uint16_t nan = 0x7fc1;
    char command[1024];
    (void)state;
    const char *dir = made(&hf);
    assert_int_equal(mkdir(in_folder("outs"), 0755), 0);
    CHECK(convert(dir, in_folder("outs/out.ltn"), &err));
    CHECK(ltn_checkpoint_open(&ck, in_folder("outs/out.ltn"), &err));
    char checksum[40];
    snprintf(checksum, sizeof checksum, "%s", ck.checksum);
    ltn_checkpoint_close(&ck);

    hf.seed = 77;
    dir = made(&hf);
    rewrite(dir, "model.layers.1.channel_mixer.l3.weight", LTN_ST_BF16, 95, &nan, 1); /* the very last */
    check_error(convert(dir, in_folder("outs/out.ltn"), &err), &err, "element 95");
    check_error(ltn_hf_convert(dir, in_folder("outs/out.ltn"), &stopping, &err), &err, "stopped");
    assert_int_equal(err.status, LTN_ERR_STOPPED);
    assert_true(done > 0);
    CHECK(ltn_checkpoint_open(&ck, in_folder("outs/out.ltn"), &err));
    assert_string_equal(ck.checksum, checksum);
    ltn_checkpoint_close(&ck);
    snprintf(command, sizeof command, "test \"$(ls -A %s)\" = out.ltn", in_folder("outs"));
    assert_int_equal(system(command), 0);

    hf.seed = 78;
    CHECK(convert(made(&hf), in_folder("outs/out.ltn"), &err));
    CHECK(ltn_checkpoint_open(&ck, in_folder("outs/out.ltn"), &err));
    assert_string_not_equal(ck.checksum, checksum);
    ltn_checkpoint_close(&ck);
}

/* ---- the tokenizer ---- */

static void tokenizer(void **state)
{
    const char *folder = getenv("LTN_TEST_TOKENIZERS");
    struct test_hf hf = small();
    struct ltn_checkpoint ck;
    struct ltn_error err = {0};
    char path[1024], command[2048];
    (void)state;
    snprintf(path, sizeof path, "%s/sp-test-unigram.model", folder ? folder : "");
    if (!folder || access(path, F_OK) != 0)
        skip();
    hf.config.vocab_size = 1010;
    const char *dir = made(&hf);
    snprintf(command, sizeof command, "cp %s %s/tokenizer.model && chmod u+w %s/tokenizer.model", path, dir,
             dir);
    assert_int_equal(system(command), 0);
    expect_good(dir, &ck);
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(ck.tokenizer_bytes, st.st_size);
    size_t bytes;
    char *model;
    CHECK(ltn_read_file(&model, &bytes, path, 1 << 24, NULL, &err));
    assert_memory_equal(model, ck.tokenizer, bytes);
    free(model);
    struct ltn_tokenizer *t;
    CHECK(ltn_tokenizer_open(&t, ck.tokenizer, ck.tokenizer_bytes, ck.tokenizer_json, &err));
    assert_int_equal(ltn_tokenizer_size(t), 1000);
    ltn_tokenizer_close(t);
    assert_non_null(strstr(ck.tokenizer_json, "\"add_bos\":false"));
    assert_non_null(strstr(ck.tokenizer_json, "<unk>"));
    ltn_checkpoint_close(&ck);

    write_in(dir, "tokenizer_config.json",
             "{\"add_bos_token\": false, \"add_eos_token\": true, \"bos_token\": {\"content\": \"<s>\"},"
             " \"pad_token\": null, \"eos_token\": \"</s>\", \"model_max_length\": "
             "1000000000000000019884624838656,"
             " \"added_tokens_decoder\": {\"1003\": {\"content\": \"<|im|>\", \"special\": true}}}");
    write_in(dir, "special_tokens_map.json",
             "{\"additional_special_tokens\": [\"<|im|>\"], \"mask_token\": \"nowhere\"}");
    write_in(dir, "added_tokens.json", "{\"<|far|>\": 1010, \"<|near|>\": 1009}");
    expect_good(dir, &ck);
    assert_non_null(strstr(notes, "1 added tokens left out"));
    assert_non_null(strstr(ck.tokenizer_json, "\"add_eos\":true"));
    assert_non_null(strstr(ck.tokenizer_json, "<|im|>"));
    assert_null(strstr(ck.tokenizer_json, "<|far|>"));
    assert_null(strstr(ck.tokenizer_json, "nowhere"));
    CHECK(ltn_tokenizer_open(&t, ck.tokenizer, ck.tokenizer_bytes, ck.tokenizer_json, &err));
    assert_int_equal(ltn_tokenizer_find(t, "<|im|>", 6), 1003);
    assert_int_equal(ltn_tokenizer_find(t, "<|near|>", 8), 1009);
    ltn_tokenizer_close(t);
    ltn_checkpoint_close(&ck);

    write_in(dir, "tokenizer_config.json", "{}"); /* silent: the official class adds bos */
    expect_good(dir, &ck);
    assert_non_null(strstr(ck.tokenizer_json, "\"add_bos\":true"));
    assert_non_null(strstr(ck.tokenizer_json, "\"add_eos\":false"));
    ltn_checkpoint_close(&ck);

    write_in(dir, "tokenizer_config.json", "{\"added_tokens_decoder\": {\"x\": {\"content\": \"a\"}}}");
    expect_bad(dir, "tokenizer_config.json: added_tokens_decoder: \"x\" is no token id");
    write_in(dir, "tokenizer_config.json", "{\"added_tokens_decoder\": {\"1009\": {\"content\": \"a\"}}}");
    expect_bad(dir, "added_tokens.json: special token 1009 is \"<|near|>\", but 1009 was \"a\" before");
    write_in(dir, "tokenizer_config.json", "{\"add_bos_token\": \"no\"}");
    expect_bad(dir, "\"add_bos_token\" is a string, expected true or false");
    write_in(dir, "tokenizer_config.json", "{");
    expect_bad(dir, "tokenizer_config.json: bad JSON");
    remove_in(dir, "tokenizer_config.json");
    write_in(dir, "tokenizer.model", "not a model");
    expect_bad(dir, "tokenizer.model: ");
    write_in(dir, "tokenizer.model", "");
    expect_bad(dir, "tokenizer.model: ");

    hf.config.vocab_size = 999;
    dir = made(&hf);
    snprintf(command, sizeof command, "cp %s %s/tokenizer.model", path, dir);
    assert_int_equal(system(command), 0);
    expect_bad(dir, "tokenizer.model: 1000 pieces, but the model's vocab_size is 999");
}

/* ---- */

static int generate(char **argv)
{
    static const struct {
        const char *name;
        enum ltn_st_dtype dtype;
    } types[] = {{"f16", LTN_ST_F16}, {"bf16", LTN_ST_BF16}, {"f32", LTN_ST_F32}, {"f64", LTN_ST_F64}};
    struct ltn_error err = {0};
    struct test_hf hf = small();
    struct ltn_config *c = &hf.config;
    c->embed_dim = c->hidden_dim = atoi(argv[3]);
    c->n_layers = atoi(argv[4]);
    c->n_heads = atoi(argv[5]);
    c->glu_dim = atoi(argv[6]);
    c->vocab_size = atoi(argv[7]);
    hf.files = atoi(argv[8]);
    for (int i = 0; i < 4; i++)
        if (strcmp(argv[9], types[i].name) == 0)
            hf.matrices = hf.vectors = types[i].dtype;
    if (hf.files < 1 || ltn_config_check(c, &err) != LTN_OK) {
        fprintf(stderr, "test_convert: %s\n", hf.files < 1 ? "FILES must be 1 or more" : err.text);
        return 1;
    }
    test_write_hf(argv[2], &hf);
    return 0;
}

int main(int argc, char **argv)
{
    static char *const cases[] = {
        "a1_tnl2_f32_plain",
        "a2_tnl2_bf16_h6_nolrpe_untied",
        "a3_tnl2_f16_bin_layernorm_bias",
        "a4_tnl2_f32_hidden_ne_embed_sharded",
        "a5_tnl3_bf16_bin_sharded",
        "a6_tnl2_f16_hd128",
        "a7_tnl2_f32_bin_h5_emptylist",
        "a8_tnl2_f32_h12_identity_ln",
    };
    const struct CMUnitTest others[] = {
        cmocka_unit_test(heads),        cmocka_unit_test(dtypes),
        cmocka_unit_test(mixed_dtypes), cmocka_unit_test(bad_values),
        cmocka_unit_test(configs_good), cmocka_unit_test(configs_bad),
        cmocka_unit_test(directories),  cmocka_unit_test(replaced_only_whole),
        cmocka_unit_test(tokenizer),
    };
    enum { N_CASES = sizeof cases / sizeof *cases, N_OTHERS = sizeof others / sizeof *others };
    struct CMUnitTest tests[N_CASES + N_OTHERS];
    if (argc == 10 && strcmp(argv[1], "generate") == 0)
        return generate(argv);
    for (int i = 0; i < N_CASES; i++)
        tests[i] = (struct CMUnitTest){.name = cases[i], .test_func = golden, .initial_state = cases[i]};
    memcpy(tests + N_CASES, others, sizeof others);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
