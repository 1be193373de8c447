/* The converter: golden checkpoints value by value, every rule about heads, dtypes and configurations, and
 * directories and pickles that mean harm.
 *
 *   test_convert generate DIR D L HEADS G V FILES DTYPE    writes a checkpoint of that shape to measure with
 */
#include "model/checkpoint.h"
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

#define CHECK(call) check((call), &err, #call)

static void check(enum ltn_status status, const struct ltn_error *err, const char *what)
{
    if (status != LTN_OK)
        fail_msg("%s: %s", what, err->text);
}

static void check_error(enum ltn_status status, const struct ltn_error *err, const char *part)
{
    if (status == LTN_OK)
        fail_msg("succeeded, expected an error with \"%s\"", part);
    if (!strstr(err->text, part) || strchr(err->text, '\n') || err->status != status)
        fail_msg("error \"%s\", expected \"%s\" in it", err->text, part);
}

static const char *in_folder(const char *name)
{
    static char paths[4][512];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", test_folder(), name);
    return path;
}

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

/* A name for a fresh directory; the last 64 stay valid. */
static const char *new_dir(void)
{
    static char dirs[64][512];
    static int n;
    snprintf(dirs[n % 64], sizeof dirs[0], "%s/hf%d", test_folder(), n);
    return dirs[n++ % 64];
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
    test_write_file(path, text, strlen(text));
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

/* ---- torch archives ---- */

static struct test_pickle pk;

static void expect_pickle(const char *error)
{
    static const float data[8];
    const struct test_storage storage = {"0", data, sizeof data};
    const char *path = in_folder("attack.bin");
    struct ltn_error err = {0};
    struct ltn_torch_bin bin;
    test_write_torch(path, pk.v, pk.n, &storage, 1, false);
    enum ltn_status status = ltn_torch_open(&bin, path, &err);
    if (error)
        check_error(status, &err, error);
    else
        check(status, &err, "open");
    ltn_torch_close(&bin);
}

/* A pickle of these opcodes after the protocol. */
#define OPS(text, error)                                                                                     \
    do {                                                                                                     \
        pk.n = 0;                                                                                            \
        pk_bytes(&pk, "\x80\x02" text, sizeof text + 1);                                                     \
        expect_pickle(error);                                                                                \
    } while (0)

static void pickles(void **state)
{
    static const int64_t eight[] = {8}, nine[] = {9}, square[] = {2, 4}, negative[] = {-1};
    static const int64_t by_columns[] = {1, 2}, far[] = {5, 1}, none[] = {0, 0},
                         huge[] = {INT64_C(1) << 62, 1};
    (void)state;
    OPS("}.", NULL);
    OPS("ccollections\nOrderedDict\n)R.", NULL);
    OPS("}}b.", NULL); /* _metadata */
    OPS("ccollections\nOrderedDict\n)R}(X\1\0\0\0aK\1ub.", NULL);
    OPS("", "ends inside an operation");
    OPS("}", "ends inside an operation");
    OPS("}.x", "something is left after its end");
    OPS("}}.", "something is left after its end");
    OPS("N.", "found None, expected a dictionary");
    OPS(".", "the stack holds too little");
    OPS("\x80\2}.", "names one later");
    pk.n = 0;
    pk_bytes(&pk, "}.", 2);
    expect_pickle("does not begin with a protocol");
    pk.n = 0;
    pk_bytes(&pk, "\x80\4}.", 4);
    expect_pickle("protocol 4, expected 2");

    /* everything that could run something, or that torch never writes */
    OPS("cos\nsystem\nX\2\0\0\0id\x85R.",
        "asks for \"os.system\", which no checkpoint of weights needs; refused");
    OPS("cposix\nsystem\n.", "asks for \"posix.system\"");
    OPS("cbuiltins\neval\n.", "asks for \"builtins.eval\"");
    OPS("ctorch\nload\n.", "asks for \"torch.load\"");
    OPS("ctorch\nLongStorage\n.", "asks for \"torch.LongStorage\"");
    OPS("ccollections\nOrderedDictX\n.", "asks for \"collections.OrderedDictX\"");
    OPS("ccollections\nOrderedDict", "asks for \"collections.OrderedDict\"");
    OPS("c", "asks for \"\"");
    OPS("i", "opcode 0x69");              /* INST */
    OPS("(oo", "opcode 0x6f");            /* OBJ */
    OPS("\x81", "opcode 0x81");           /* NEWOBJ */
    OPS("\x82\1", "opcode 0x82");         /* EXT1 */
    OPS("\x93", "opcode 0x93");           /* STACK_GLOBAL */
    OPS("\x95", "opcode 0x95");           /* FRAME */
    OPS("P0\n", "opcode 0x50");           /* PERSID */
    OPS("]", "opcode 0x5d");              /* EMPTY_LIST */
    OPS("I1\n", "opcode 0x49");           /* INT */
    OPS("\x8b\1\0\0\0\1", "opcode 0x8b"); /* LONG4 */
    OPS("0", "opcode 0x30");              /* POP */
    OPS("2", "opcode 0x32");              /* DUP */
    OPS("\xff", "opcode 0xff");
    OPS("ctorch\nFloatStorage\n)R.", "is not to be called so; refused");
    OPS("ccollections\nOrderedDict\nN\x85R.", "is not to be called so; refused");
    OPS("X\1\0\0\0a)R.", "found text, expected a global");
    OPS("ccollections\nOrderedDict\nNR.", "found None, expected a tuple");
    OPS("ctorch._utils\n_rebuild_tensor_v2\n)R.", "_rebuild_tensor_v2 with other arguments");

    /* the machine's limits */
    OPS("h\0.", "memo number 0 was never set");
    OPS("}q\1h\0.", "memo number 0 was never set");
    OPS("q\0.", "nothing to put into the memo");
    OPS("(q\0.", "nothing to put into the memo");
    OPS("}r\xff\xff\xff\xff.", "memo number 4294967295 in a pickle of 9 bytes");
    OPS("j\xff\xff\xff\xff.", "memo number 4294967295 was never set");
    OPS("t.", "no mark on the stack");
    OPS("u.", "no mark on the stack");
    OPS("(u.", "items without their dictionary");
    OPS("}(Nu.", "items without their dictionary");
    OPS("N(NNu.", "found None, expected a dictionary");
    OPS("NNNs.", "found None, expected a dictionary");
    OPS("NNs.", "items without their dictionary");
    OPS("}(Ns.", "a mark inside a dictionary");
    OPS("\x87.", "the stack holds too little");
    OPS("N(N\x87.", "a mark inside a tuple");
    OPS("}Nb.", "found None, expected a dictionary");
    OPS("N}b.", "attributes for something that is no dictionary");
    OPS("}b.", "attributes for something that is no dictionary");
    OPS("(b", "the stack holds too little");
    OPS("X\xff\xff\xff\xff", "a text of 4294967295 bytes, 0 are left");
    OPS("X\5\0\0\0abcd", "a text of 5 bytes, 4 are left");
    OPS("K", "ends inside an operation");
    OPS("J\0\0\0", "ends inside an operation");
    OPS("\x8a\x09", "an integer of 9 bytes");
    OPS("\x8a\x08\0", "ends inside an operation");
    OPS("}(NX\1\0\0\0au.", "a key that is no name");
    OPS("}(X\1\0\0\0\0Nu.", "a key that is no name");
    OPS("}(X\1\0\0\0aNu.", "\"a\" is None, expected a tensor");
    OPS("}(X\1\0\0\0a}u.", "\"a\" is a dictionary, expected a tensor");

    /* persistent ids */
    OPS("NQ.", "found None, expected a tuple");
    OPS(")Q.", "a persistent id that is not");
    OPS("(X\7\0\0\0storageNNNNtQ.", "a persistent id that is not");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\0\0\0\0K\x08tQ.",
        "found a storage, expected a dictionary");
    OPS("(X\7\0\0\0storagectorch._utils\n_rebuild_tensor_v2\nX\1\0\0\0000X\0\0\0\0K\x08tQ.",
        "a persistent id that is not");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0001X\0\0\0\0K\x08tQ.",
        "no entry \"archive/data/1\"");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\x0b\0\0\0../data.pklX\0\0\0\0K\x08tQ.", "no entry");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\2\0\0\0000\0X\0\0\0\0K\x08tQ.",
        "a storage key that is no key");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\0\0\0\0K\x09tQ.",
        "of 9 F32 elements has an entry of 32 bytes");
    OPS("(X\7\0\0\0storagectorch\nDoubleStorage\nX\1\0\0\0000X\0\0\0\0K\x05tQ.",
        "of 5 F64 elements has an entry of 32 bytes");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\0\0\0\0J\xff\xff\xff\xfftQ.",
        "of -1 F32 elements");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\0\0\0\0\x8a\x08\0\0\0\0\0\0\0\x40tQ.",
        "of 4611686018427387904 F32");

    /* views */
    static const struct {
        int64_t numel, offset;
        int rank;
        const int64_t *shape, *strides;
        const char *error;
    } views[] = {
        {8, 0, 1, eight, NULL, NULL},
        {8, 0, 2, square, by_columns, NULL},
        {8, 8, 1, none, NULL, NULL}, /* nothing, at the end */
        {8, 7, 0, NULL, NULL, NULL}, /* a scalar */
        {8, 0, 1, eight, none, NULL},
        {8, 8, 0, NULL, NULL, "reaches outside its storage of 8 elements"},
        {8, 9, 1, none, NULL, "reaches outside"},
        {8, -1, 1, none, NULL, "reaches outside"},
        {8, 0, 1, nine, NULL, "reaches outside"},
        {8, 1, 1, eight, NULL, "reaches outside"},
        {7, 0, 1, eight, NULL, "reaches outside its storage of 7 elements"},
        {8, 0, 2, square, far, "reaches outside"},
        {8, 0, 2, square, huge, "reaches outside"},
        {8, 0, 2, huge, huge, "reaches outside"},
        {8, 0, 2, huge, by_columns, "reaches outside"},
        {8, INT64_MAX, 1, eight, NULL, "reaches outside"},
        {8, 0, 1, negative, by_columns, "a size or stride that is not a number from 0 up"},
        {8, 7, 1, eight, negative, "a size or stride that is not a number from 0 up"},
    };
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) {
        pk_begin(&pk);
        pk_tensor(&pk, "a", "FloatStorage", "0", views[i].numel, views[i].offset, views[i].rank,
                  views[i].shape, views[i].strides);
        pk_end(&pk);
        expect_pickle(views[i].error);
    }
    static const int64_t nine_ones[] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
    pk_begin(&pk);
    pk_tensor(&pk, "a", "FloatStorage", "0", 8, 0, 9, nine_ones, NULL);
    pk_end(&pk);
    expect_pickle("at most 8 are allowed");
}

/* Random damage to real pickles and archives, with a fixed seed: an error or tensors that can be read. */
static void pickles_fuzzed(void **state)
{
    enum { ROUNDS = 6000 };
    static const int64_t shape[] = {2, 4}, strides[] = {1, 2};
    static const float data[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    const struct test_storage storage = {"0", data, sizeof data};
    struct test_rng rng = {99};
    struct ltn_error err = {0};
    const char *path = in_folder("fuzz.bin"), *dir = new_dir();
    size_t opened = 0;
    char command[1024];
    (void)state;
    mkdir(dir, 0755);
    snprintf(command, sizeof command, "%s/pytorch_model.bin", dir);
    for (int round = 0; round < ROUNDS; round++) {
        pk_begin(&pk);
        pk_tensor(&pk, "a", "FloatStorage", "0", 8, 0, 2, shape, NULL);
        pk_tensor(&pk, "b", "HalfStorage", "0", 16, 3, 2, shape, strides);
        pk_end(&pk);
        bool whole_file = round % 2;
        for (int k = test_below(&rng, 3); !whole_file && k >= 0; k--) {
            size_t at = (size_t)test_below(&rng, (int)pk.n);
            if (test_below(&rng, 2))
                pk.v[at] = (uint8_t)test_random(&rng);
            else if (test_below(&rng, 2))
                pk.v[at] = pk.v[test_below(&rng, (int)pk.n)];
            else
                memmove(pk.v + at, pk.v + at + 1, --pk.n - at);
        }
        test_write_torch(path, pk.v, pk.n, &storage, 1, false);
        FILE *f = fopen(path, "rb");
        static uint8_t bytes[1 << 16];
        assert_non_null(f);
        size_t n = fread(bytes, 1, sizeof bytes, f);
        fclose(f);
        for (int k = test_below(&rng, 3); whole_file && k >= 0; k--)
            bytes[test_below(&rng, (int)n)] = (uint8_t)test_random(&rng);
        if (whole_file && test_below(&rng, 8) == 0)
            n = (size_t)test_below(&rng, (int)n);
        test_write_file(command, bytes, n);
        struct ltn_source source;
        enum ltn_status status = ltn_source_open(&source, dir, &err);
        if (status != LTN_OK) {
            check_error(status, &err, "");
            continue;
        }
        opened++;
        for (size_t i = 0; i < source.n_tensors; i++) {
            struct ltn_source_reader *reader;
            uint64_t count = 1;
            for (int32_t d = 0; d < source.tensors[i].rank; d++)
                count *= (uint64_t)source.tensors[i].shape[d];
            uint8_t *out = malloc(count * 8 + 1);
            if (ltn_source_reader_open(&reader, &source, &source.tensors[i], &err) == LTN_OK) {
                if (count < 1 << 20)
                    ltn_source_read(reader, out, count, &err);
                ltn_source_reader_close(reader);
            }
            free(out);
        }
        ltn_source_close(&source);
    }
    assert_true(opened > 0 && opened < ROUNDS);
}

/* Shared storages, offsets and strides give the values that indexing by hand gives. */
static void torch_views(void **state)
{
    static float base[60];
    static uint16_t halves[16];
    static const int64_t shape[] = {3, 4}, transposed[] = {1, 3}, rows[] = {10, 2}, repeated[] = {0, 1};
    static const int64_t cube[] = {2, 3, 4}, cube_strides[] = {4, 8, 1}, sixteen[] = {16}, ones[] = {1, 4, 1};
    static const int64_t odd_ones[] = {77, 1, 99};
    const struct test_storage storages[] = {{"0", base, sizeof base}, {"key1", halves, sizeof halves}};
    static const struct {
        const char *name;
        int64_t offset;
        int rank;
        const int64_t *shape, *strides;
    } views[] = {
        {"plain", 0, 2, shape, NULL},
        {"offset", 48, 2, shape, NULL},
        {"transposed", 5, 2, shape, transposed},
        {"rows", 1, 2, shape, rows},
        {"repeated", 9, 2, shape, repeated},
        {"cube", 2, 3, cube, cube_strides},
        {"ones", 3, 3, ones, odd_ones},
    };
    enum { N = sizeof views / sizeof *views };
    struct ltn_error err = {0};
    struct ltn_source source;
    (void)state;
    for (int i = 0; i < 60; i++)
        base[i] = (float)i * 1.25f;
    for (int i = 0; i < 16; i++)
        halves[i] = (uint16_t)(0x3c00 + i);
    const char *dir = new_dir();
    char path[600];
    mkdir(dir, 0755);
    snprintf(path, sizeof path, "%s/pytorch_model.bin", dir);
    pk_begin(&pk);
    for (int i = 0; i < N; i++)
        pk_tensor(&pk, views[i].name, "FloatStorage", "0", 60, views[i].offset, views[i].rank, views[i].shape,
                  views[i].strides);
    pk_tensor(&pk, "half", "HalfStorage", "key1", 16, 0, 1, sixteen, NULL);
    pk_end(&pk);
    test_write_torch(path, pk.v, pk.n, storages, 2, false);
    CHECK(ltn_source_open(&source, dir, &err));
    assert_int_equal(source.n_tensors, N + 1);
    assert_int_equal(ltn_source_find(&source, "half")->dtype, LTN_ST_F16);
    for (int i = 0; i < N; i++) {
        const struct ltn_source_tensor *t = ltn_source_find(&source, views[i].name);
        struct ltn_source_reader *reader;
        float out[24];
        int64_t n = 1, stride[3] = {0}, at[3] = {0};
        assert_non_null(t);
        for (int d = views[i].rank - 1; d >= 0; d--) {
            stride[d] = views[i].strides ? views[i].strides[d] : n;
            n *= views[i].shape[d];
        }
        CHECK(ltn_source_reader_open(&reader, &source, t, &err));
        CHECK(ltn_source_read(reader, out, 5 < n ? 5 : (size_t)n, &err)); /* in two pieces */
        if (n > 5)
            CHECK(ltn_source_read(reader, out + 5, (size_t)n - 5, &err));
        check_error(ltn_source_read(reader, out, 1, &err), &err, "has only");
        ltn_source_reader_close(reader);
        for (int64_t k = 0; k < n; k++) {
            int64_t rest = k, place = views[i].offset;
            for (int d = views[i].rank - 1; d >= 0; d--) {
                at[d] = rest % views[i].shape[d];
                rest /= views[i].shape[d];
                place += at[d] * stride[d];
            }
            assert_true(out[k] == base[place]);
        }
    }
    assert_true(ltn_source_same(&source.tensors[0], &source.tensors[0]));
    assert_false(ltn_source_same(ltn_source_find(&source, "plain"), ltn_source_find(&source, "offset")));
    ltn_source_close(&source);

    test_write_torch(path, pk.v, pk.n, storages, 2, true);
    check_error(ltn_source_open(&source, dir, &err), &err, "compressed or encrypted, expected stored");
    test_write_torch(path, pk.v, pk.n, storages, 1, false);
    check_error(ltn_source_open(&source, dir, &err), &err, "no entry \"archive/data/key1\"");

    /* a flipped bit of a storage does not get past its CRC */
    test_write_torch(path, pk.v, pk.n, storages, 2, false);
    FILE *f = fopen(path, "r+b");
    static uint8_t bytes[1 << 16];
    assert_non_null(f);
    size_t n = fread(bytes, 1, sizeof bytes, f), found = 0;
    for (size_t i = 0; i + sizeof halves <= n; i++)
        if (memcmp(bytes + i, halves, sizeof halves) == 0)
            found = i;
    assert_true(found > 0);
    fseek(f, (long)found + 3, SEEK_SET);
    fputc(bytes[found + 3] ^ 1, f);
    fclose(f);
    struct ltn_source_reader *reader;
    uint16_t out[16];
    CHECK(ltn_source_open(&source, dir, &err));
    CHECK(ltn_source_reader_open(&reader, &source, ltn_source_find(&source, "half"), &err));
    check_error(ltn_source_read(reader, out, 16, &err), &err, "tensor \"half\" is damaged");
    ltn_source_reader_close(reader);
    ltn_source_close(&source);
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
        cmocka_unit_test(pickles),      cmocka_unit_test(pickles_fuzzed),
        cmocka_unit_test(torch_views),  cmocka_unit_test(tokenizer),
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
