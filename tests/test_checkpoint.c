/* .ltn files: whole, cut, and damaged in every field. */
#include "model/checkpoint.h"
#include "tests/files.h"
#include "tests/support.h"

#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static struct ltn_config small_config(void)
{
    return (struct ltn_config){.vocab_size = 9,
                               .embed_dim = 8,
                               .hidden_dim = 8,
                               .n_layers = 2,
                               .n_heads = 2,
                               .glu_dim = 12,
                               .act = LTN_ACT_SILU,
                               .layer_norm = true,
                               .bias = true,
                               .scale_embedding = true,
                               .bos_id = 1,
                               .eos_id = 2,
                               .pad_id = -1,
                               .lrpe = {1, 0}};
}

/* A copy of a file's contents that can be changed and written again with a right header and checksum. */
struct copy {
    struct ltn_st_tensor tensors[200];
    const void *data[200];
    size_t n;
    const char *metadata[40];
    size_t n_metadata;
};

static const char *base(void)
{
    static char path[512];
    if (!path[0]) {
        snprintf(path, sizeof path, "%s/base.ltn", test_folder());
        test_write_model(small_config(), LTN_BF16, 7, path);
    }
    return path;
}

static void take(struct copy *c, const struct ltn_st_file *f)
{
    assert_true(f->n_tensors < 200 && f->n_metadata < 18);
    c->n = f->n_tensors;
    c->n_metadata = f->n_metadata;
    for (size_t i = 0; i < c->n; i++) {
        c->tensors[i] = f->tensors[i];
        c->data[i] = f->map + f->tensors[i].offset;
    }
    for (size_t i = 0; i < 2 * c->n_metadata; i++)
        c->metadata[i] = f->metadata[i];
}

static void put(const struct copy *c, const char *path)
{
    struct ltn_st_writer *writer;
    struct ltn_error err = {0};
    CHECK(ltn_st_create(&writer, path, c->tensors, c->n, c->metadata, c->n_metadata, &err));
    for (size_t i = 0; i < c->n; i++)
        CHECK(ltn_st_write(writer, c->data[i], c->tensors[i].bytes, &err));
    CHECK(ltn_st_finish(writer, &err));
}

static size_t where(const struct copy *c, const char *name)
{
    for (size_t i = 0; i < c->n; i++)
        if (strcmp(c->tensors[i].name, name) == 0)
            return i;
    fail_msg("no tensor %s", name);
    return 0;
}

static void set_metadata(struct copy *c, const char *key, const char *value)
{
    for (size_t i = 0; i < c->n_metadata; i++)
        if (strcmp(c->metadata[2 * i], key) == 0)
            c->metadata[2 * i + 1] = value;
}

static const char zeros[] = "00000000000000000000000000000000";

/* Changes a copy of the base file and expects ltn_checkpoint_open to say `error` (NULL: to open it). */
#define VARY(error, ...)                                                                                     \
    do {                                                                                                     \
        struct ltn_st_file vary_file;                                                                        \
        struct copy c;                                                                                       \
        struct ltn_checkpoint ck;                                                                            \
        struct ltn_error err = {0};                                                                          \
        CHECK(ltn_st_open(&vary_file, base(), &err));                                                        \
        take(&c, &vary_file);                                                                                \
        __VA_ARGS__;                                                                                         \
        put(&c, in_folder("vary.ltn"));                                                                      \
        ltn_st_close(&vary_file);                                                                            \
        check_open(ltn_checkpoint_open(&ck, in_folder("vary.ltn"), &err), &err, error);                      \
        ltn_checkpoint_close(&ck);                                                                           \
    } while (0)

static void check_open(enum ltn_status status, const struct ltn_error *err, const char *error)
{
    if (error)
        check_error(status, err, error);
    else
        test_check(status, err, "open");
}

static void swap_tensors(struct copy *c, size_t i, size_t k)
{
    struct ltn_st_tensor t = c->tensors[i];
    const void *data = c->data[i];
    c->tensors[i] = c->tensors[k];
    c->data[i] = c->data[k];
    c->tensors[k] = t;
    c->data[k] = data;
}

static void drop_tensor(struct copy *c, size_t i)
{
    for (c->n--; i < c->n; i++) {
        c->tensors[i] = c->tensors[i + 1];
        c->data[i] = c->data[i + 1];
    }
}

static void add_tensor(struct copy *c, const char *name, enum ltn_st_dtype dtype, int64_t n)
{
    static const uint8_t some[256];
    c->tensors[c->n] = (struct ltn_st_tensor){.name = name,
                                              .dtype = dtype,
                                              .rank = 1,
                                              .shape = {n},
                                              .bytes = (uint64_t)n * ltn_st_dtype_size(dtype)};
    c->data[c->n++] = some;
}

static void ltn_opens(void **state)
{
    struct ltn_checkpoint ck;
    struct ltn_error err = {0};
    (void)state;
    CHECK(ltn_checkpoint_open(&ck, base(), &err));
    struct ltn_config expected = small_config();
    CHECK(ltn_config_check(&expected, &err));
    assert_memory_equal(&ck.config, &expected, sizeof expected);
    assert_int_equal(ck.dtype, LTN_BF16);
    assert_null(ck.tokenizer);
    for (size_t i = 0; i < ck.n_specs; i++) {
        assert_string_equal(ck.tensors[i]->name, ck.specs[i].name);
        if (ck.tensors[i]->bytes % 64 == 0)
            assert_int_equal(ck.tensors[i]->offset % 64, 0);
    }
    CHECK(ltn_checkpoint_verify(&ck, &err));
    ltn_checkpoint_close(&ck);
    ltn_checkpoint_close(&ck);
    struct ltn_st_file plain = {0};
    ltn_st_close(&plain); /* a zeroed one must not close descriptor 0 */
    assert_int_not_equal(fcntl(STDIN_FILENO, F_GETFD), -1);
}

static void ltn_tensors(void **state)
{
    (void)state;
    VARY(NULL, (void)c);
    VARY("tensor \"model.layers.1.channel_mixer.l2.weight\" is missing",
         drop_tensor(&c, where(&c, "model.layers.1.channel_mixer.l2.weight")));
    VARY("tensor \"lm_head.weight\" is missing", drop_tensor(&c, where(&c, "lm_head.weight")));
    VARY("tensor \"extra\" is not one that its configuration has", add_tensor(&c, "extra", LTN_ST_BF16, 1));
    VARY("tensor \"tokenizer\" is not one",
         add_tensor(&c, "tokenizer", LTN_ST_U8, 5)); /* the metadata has none */
    VARY("tensor \"model.embed_tokens.weight\" is missing",
         c.tensors[where(&c, "model.embed_tokens.weight")].name = "model.embed_tokens.Weight");
    VARY("wrong order", swap_tensors(&c, where(&c, "model.layers.0.channel_mixer.l1.weight"),
                                     where(&c, "model.layers.0.channel_mixer.l2.weight")));
    VARY("wrong order", swap_tensors(&c, 0, c.n - 1));
    VARY("\"model.layers.0.channel_mixer.l3.weight\" has shape [12, 8], expected [8, 12]", {
        struct ltn_st_tensor *t = &c.tensors[where(&c, "model.layers.0.channel_mixer.l3.weight")];
        t->shape[0] = 12;
        t->shape[1] = 8;
    });
    VARY("\"model.layers.0.channel_mixer.l3.bias\" has shape [1, 8], expected [8]", {
        struct ltn_st_tensor *t = &c.tensors[where(&c, "model.layers.0.channel_mixer.l3.bias")];
        t->rank = 2;
        t->shape[0] = 1;
        t->shape[1] = 8;
    });
    VARY("\"model.layers.0.channel_mixer.l3.weight\" is F16, expected BF16 as the metadata says",
         c.tensors[where(&c, "model.layers.0.channel_mixer.l3.weight")].dtype = LTN_ST_F16);
    VARY("\"model.layers.0.channel_mixer.l3.weight\" is I16, expected BF16 as the metadata says",
         c.tensors[where(&c, "model.layers.0.channel_mixer.l3.weight")].dtype = LTN_ST_I16);
    VARY(NULL, c.tensors[where(&c, "model.layers.0.channel_mixer.l3.bias")].dtype = LTN_ST_F16);

    static const char json[] =
        "{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":false,\"special\":[]}";
    VARY(NULL, {
        set_metadata(&c, "tokenizer", json);
        add_tensor(&c, "tokenizer", LTN_ST_U8, 5);
    });
    VARY("tensor \"tokenizer\" is missing", set_metadata(&c, "tokenizer", json));
    VARY("\"tokenizer\" is not a row of U8", {
        set_metadata(&c, "tokenizer", json);
        add_tensor(&c, "tokenizer", LTN_ST_I8, 5);
    });
    VARY("\"tokenizer\" is not a row of U8", {
        set_metadata(&c, "tokenizer", json);
        add_tensor(&c, "tokenizer", LTN_ST_U8, 0);
    });
    VARY("wrong order", {
        set_metadata(&c, "tokenizer", json);
        add_tensor(&c, "tokenizer", LTN_ST_U8, 5);
        swap_tensors(&c, c.n - 2, c.n - 1);
    });
}

/* The configuration text with `from` replaced by `to`. */
static char *edited(const struct copy *c, const char *from, const char *to)
{
    static char text[4096];
    const char *json = NULL;
    for (size_t i = 0; i < c->n_metadata; i++)
        if (strcmp(c->metadata[2 * i], "config") == 0)
            json = c->metadata[2 * i + 1];
    const char *at = strstr(json, from);
    if (!at)
        fail_msg("no %s in %s", from, json);
    snprintf(text, sizeof text, "%.*s%s%s", (int)(at - json), json, to, at + strlen(from));
    return text;
}

static void ltn_metadata(void **state)
{
    (void)state;
    VARY("not a .ltn file: its metadata says format \"\"", c.n_metadata = 0);
    VARY("format \"ltn-session\"", set_metadata(&c, "format", "ltn-session"));
    VARY("version \"2\" of the format", set_metadata(&c, "version", "2"));
    VARY("metadata dtype is \"q7\"", set_metadata(&c, "dtype", "q7"));
    VARY("expected F16 as the metadata says", set_metadata(&c, "dtype", "f16"));
    VARY("metadata checksum is \"123\"", set_metadata(&c, "checksum", "123"));
    VARY("expected 32 hexadecimal", set_metadata(&c, "checksum", "ABCDEFABCDEFABCDEFABCDEFABCDEFAB"));
    VARY("unknown metadata \"author\"", {
        c.metadata[2 * c.n_metadata] = "author";
        c.metadata[2 * c.n_metadata++ + 1] = "";
    });
    static const char *const keys[] = {"config", "dtype", "checksum", "tokenizer", "provenance"};
    for (size_t k = 0; k < sizeof keys / sizeof *keys; k++)
        VARY(keys[k], {
            for (size_t i = 0; i < c.n_metadata; i++)
                if (strcmp(c.metadata[2 * i], keys[k]) == 0) {
                    c.metadata[2 * i] = c.metadata[2 * --c.n_metadata];
                    c.metadata[2 * i + 1] = c.metadata[2 * c.n_metadata + 1];
                }
        });

    VARY("vary.ltn: config: bad JSON", set_metadata(&c, "config", "{"));
    VARY("is missing", set_metadata(&c, "config", "{}"));
    static const struct {
        const char *from, *to, *error;
    } edits[] = {
        {"\"vocab_size\":9", "\"vocab_size\":10", "has shape [9, 8], expected [10, 8]"},
        {"\"vocab_size\":9", "\"vocab_size\":0", "vocab_size"},
        {"\"vocab_size\":9", "\"vocab_size\":-9", "vocab_size"},
        {"\"vocab_size\":9", "\"vocab_size\":4294967305", "vocab_size"}, /* 9 in 32 bits */
        {"\"vocab_size\":9", "\"vocab_size\":\"9\"", "vocab_size"},
        {"\"decoder_embed_dim\":8", "\"decoder_embed_dim\":16", "LRPE"},
        {"\"decoder_embed_dim\":8", "\"decoder_embed_dim\":1000000000", "decoder_embed_dim"},
        {"\"hidden_dim\":8", "\"hidden_dim\":9", "heads"},
        {"\"decoder_layers\":2", "\"decoder_layers\":1", "decoder_layers"},
        {"\"decoder_layers\":2", "\"decoder_layers\":3", "linear_use_lrpe_list"},
        {"\"decoder_layers\":2", "\"decoder_layers\":100000", "decoder_layers"},
        {"\"decoder_attention_heads\":2", "\"decoder_attention_heads\":3", "heads"},
        {"\"decoder_attention_heads\":2", "\"decoder_attention_heads\":0", "decoder_attention_heads"},
        {"\"decoder_attention_heads\":2", "\"decoder_attention_heads\":4", "theta"},
        {"\"glu_dim\":12", "\"glu_dim\":13", "expected [13, 8]"},
        {"\"gate_dim\":0", "\"gate_dim\":4", "qkv_proj.weight\" is missing"},
        {"\"norm_type\":\"layernorm\"", "\"norm_type\":\"simplermsnorm\"", "is not one that"},
        {"\"norm_type\":\"layernorm\"", "\"norm_type\":\"rms\"", "norm_type"},
        {"\"linear_use_lrpe_list\":[1,0]", "\"linear_use_lrpe_list\":[1,1]", "theta\" is missing"},
        {"\"linear_use_lrpe_list\":[1,0]", "\"linear_use_lrpe_list\":[0,0]", "is not one that"},
        {"\"linear_use_lrpe_list\":[1,0]", "\"linear_use_lrpe_list\":[1]", "linear_use_lrpe_list"},
        {"\"linear_use_lrpe_list\":[1,0]", "\"linear_use_lrpe_list\":[1,2]", "linear_use_lrpe_list"},
        {"\"bias\":true", "\"bias\":false", "is not one that"},
        {"\"bias\":true", "\"bias\":1", "bias"},
        {"\"tie_word_embeddings\":false", "\"tie_word_embeddings\":true",
         "\"lm_head.weight\" is not one that"},
        {"\"eos_token_id\":2", "\"eos_token_id\":9", "eos_token_id"},
        {"\"eos_token_id\":2", "\"eos_token_id\":02", "leading zero"},
        {"\"bias\":true", "\"bias\":true,\"bias\":true", "stands twice"},
        {"\"bias\":true", "\"bias\":true,\"more\":1", "unknown key"},
        {"\"bias\":true,", "", "\"bias\""},
    };
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++)
        VARY(edits[i].error, set_metadata(&c, "config", edited(&c, edits[i].from, edits[i].to)));
}

static void ltn_verify(void **state)
{
    static const char *const names[] = {"model.layers.0.token_mixer.qkvu_proj.weight",
                                        "model.final_norm.bias"};
    struct ltn_error err = {0};
    struct ltn_checkpoint ck;
    struct ltn_st_file file;
    struct copy c;
    (void)state;
    for (int k = 0; k < 4; k++) { /* a NaN or infinity under a right checksum */
        CHECK(ltn_st_open(&file, base(), &err));
        take(&c, &file);
        set_metadata(&c, "checksum", zeros);
        size_t at = where(&c, names[k % 2]);
        uint16_t *data = malloc(c.tensors[at].bytes);
        assert_non_null(data);
        memcpy(data, c.data[at], c.tensors[at].bytes);
        data[5] = k < 2 ? 0x7fc0 : 0xff80;
        data[7] = 0x7f81;
        c.data[at] = data;
        put(&c, in_folder("nan.ltn"));
        free(data);
        ltn_st_close(&file);
        CHECK(ltn_checkpoint_open(&ck, in_folder("nan.ltn"), &err));
        char expected[128];
        snprintf(expected, sizeof expected, "nan.ltn: tensor \"%s\" is not finite at element 5",
                 names[k % 2]);
        check_error(ltn_checkpoint_verify(&ck, &err), &err, expected);
        ltn_checkpoint_close(&ck);
    }
    size_t bytes;
    uint8_t *data = read_file(base(), &bytes);
    CHECK(ltn_st_open(&file, base(), &err));
    uint64_t start = file.data_start;
    ltn_st_close(&file);
    for (size_t at = (size_t)start; at < bytes; at += 97) { /* any flipped bit of the data */
        data[at] ^= 4;
        write_file(in_folder("flip.ltn"), data, bytes);
        data[at] ^= 4;
        CHECK(ltn_checkpoint_open(&ck, in_folder("flip.ltn"), &err));
        check_error(ltn_checkpoint_verify(&ck, &err), &err, "damaged: the checksum of the data is");
        ltn_checkpoint_close(&ck);
    }
    free(data);
}

static void first_not_finite(void **state)
{
    static const struct {
        enum ltn_dtype dtype;
        uint32_t largest, infinity;
    } types[] = {{LTN_F32, 0xff7fffff, 0x7f800000}, {LTN_BF16, 0xff7f, 0x7f80}, {LTN_F16, 0xfbff, 0x7c00}};
    enum { N = 71 };
    uint32_t f32[N];
    uint16_t half[N];
    (void)state;
    for (int t = 0; t < 3; t++)
        for (size_t n = 0; n <= N; n++) {
            void *data = types[t].dtype == LTN_F32 ? (void *)f32 : (void *)half;
            for (size_t i = 0; i < N; i++) {
                f32[i] = types[t].largest;
                half[i] = (uint16_t)types[t].largest;
            }
            assert_int_equal(ltn_first_not_finite(data, types[t].dtype, n), n);
            for (size_t i = n; i-- > 0;) {
                f32[i] = types[t].infinity + i % 2;
                half[i] = (uint16_t)(types[t].infinity + i % 2);
                assert_int_equal(ltn_first_not_finite(data, types[t].dtype, n), i);
            }
        }
}

/* Cut at every byte of the header, at every boundary of a tensor, and one byte around it. */
static void ltn_truncated(void **state)
{
    struct ltn_error err = {0};
    struct ltn_checkpoint ck;
    size_t bytes;
    uint8_t *data = read_file(base(), &bytes);
    const char *path = in_folder("cut.ltn");
    (void)state;
    CHECK(ltn_checkpoint_open(&ck, base(), &err));
    size_t start = (size_t)ck.file.data_start, n = ck.file.n_tensors, cuts[600], n_cuts = 0;
    for (size_t i = 0; i < n; i++)
        for (int around = -1; around < 2; around++)
            cuts[n_cuts++] = (size_t)ck.file.tensors[i].offset + (size_t)around;
    cuts[n_cuts++] = bytes - 1;
    ltn_checkpoint_close(&ck);
    write_file(path, data, bytes);
    for (size_t cut = bytes; cut-- > 0;) {
        bool boundary = cut < start;
        for (size_t i = 0; i < n_cuts && !boundary; i++)
            boundary = cuts[i] == cut;
        if (!boundary)
            continue;
        assert_int_equal(truncate(path, (off_t)cut), 0);
        check_error(ltn_checkpoint_open(&ck, path, &err), &err, "cut.ltn: ");
        ltn_checkpoint_close(&ck);
    }
    uint8_t *more = realloc(data, bytes + 1);
    assert_non_null(more);
    more[bytes] = 0;
    write_file(path, more, bytes + 1);
    check_error(ltn_checkpoint_open(&ck, path, &err), &err, "bytes of data, but the tensors end after");
    free(more);
}

/* Every single bit of the length and the header: an error or a file that opens and can be read, never a
 * crash. */
static void ltn_flipped(void **state)
{
    struct ltn_error err = {0};
    struct ltn_checkpoint ck;
    size_t bytes, refused = 0;
    uint8_t *data = read_file(base(), &bytes);
    const char *path = in_folder("bit.ltn");
    (void)state;
    CHECK(ltn_checkpoint_open(&ck, base(), &err));
    size_t start = (size_t)ck.file.data_start;
    ltn_checkpoint_close(&ck);
    write_file(path, data, bytes);
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    for (size_t i = 0; i < start; i++)
        for (int bit = 0; bit < 8; bit++) {
            uint8_t flipped = (uint8_t)(data[i] ^ 1 << bit);
            assert_int_equal(pwrite(fd, &flipped, 1, (off_t)i), 1);
            enum ltn_status status = ltn_checkpoint_open(&ck, path, &err);
            if (i < 8 || status != LTN_OK) {
                check_error(status, &err, "bit.ltn: ");
                refused++;
            }
            ltn_checkpoint_close(&ck);
            assert_int_equal(pwrite(fd, &data[i], 1, (off_t)i), 1);
        }
    close(fd);
    /* What may pass: bits of the checksum's digits and of the provenance, switches that move no tensor, a
     * space of the padding that becomes another one. */
    assert_true(refused > 8 * start * 9 / 10);
    free(data);
}

/* Random damage of the header with a fixed seed: bytes changed, cut out, doubled and spliced in. */
static void ltn_fuzzed(void **state)
{
    enum { ROUNDS = 20000 };
    static const char *const splices[] = {"{",
                                          "}",
                                          "[",
                                          "]",
                                          "\"",
                                          ",",
                                          ":",
                                          "-1",
                                          "0",
                                          "1e9",
                                          "9007199254740992",
                                          "18446744073709551615",
                                          "\\u0000",
                                          "null",
                                          "\xff",
                                          "[[[[[[[[[[",
                                          "F32"};
    struct test_rng rng = {12345};
    struct ltn_error err = {0};
    struct ltn_checkpoint ck;
    size_t bytes, opened = 0;
    uint8_t *data = read_file(base(), &bytes);
    const char *path = in_folder("fuzz.ltn");
    (void)state;
    CHECK(ltn_checkpoint_open(&ck, base(), &err));
    size_t start = (size_t)ck.file.data_start;
    ltn_checkpoint_close(&ck);
    uint8_t *file = malloc(bytes + 1000);
    assert_non_null(file);
    for (int round = 0; round < ROUNDS; round++) {
        size_t n = bytes, header = start;
        memcpy(file, data, bytes);
        for (int k = test_below(&rng, 3); k >= 0; k--) {
            size_t at = 8 + (size_t)test_below(&rng, (int)header - 8);
            size_t length = 1 + (size_t)test_below(&rng, 20);
            const char *splice = splices[test_below(&rng, sizeof splices / sizeof *splices)];
            switch (test_below(&rng, 5)) {
            case 0: /* a byte */
                file[at] = (uint8_t)test_random(&rng);
                break;
            case 1: /* a digit */
                while (at < header - 1 && (file[at] < '0' || file[at] > '9'))
                    at++;
                file[at] = (uint8_t)('0' + test_below(&rng, 10));
                break;
            case 2: /* over what is there */
                if (at + strlen(splice) < header)
                    memcpy(file + at, splice, strlen(splice));
                break;
            case 3: /* cut out */
                if (at + length < header) {
                    memmove(file + at, file + at + length, n - at - length);
                    n -= length;
                    header -= length;
                }
                break;
            default: /* in between */
                memmove(file + at + strlen(splice), file + at, n - at);
                memcpy(file + at, splice, strlen(splice));
                n += strlen(splice);
                header += strlen(splice);
            }
        }
        if (test_below(&rng, 8)) /* mostly with a length that fits, so that the damage is looked at */
            for (int i = 0; i < 8; i++)
                file[i] = (uint8_t)((uint64_t)(header - 8) >> 8 * i);
        if (test_below(&rng, 8) == 0)
            n = (size_t)test_below(&rng, (int)n + 1);
        write_file(path, file, n);
        enum ltn_status status = ltn_checkpoint_open(&ck, path, &err);
        if (status == LTN_OK) {
            opened++;
            ltn_checkpoint_verify(&ck, &err); /* reads every byte that the header gives away */
        } else {
            check_error(status, &err, "fuzz.ltn: ");
        }
        ltn_checkpoint_close(&ck);
    }
    free(file);
    free(data);
    assert_true(opened > 0 && opened < ROUNDS / 2); /* harmless damage, such as to the provenance, exists */
}

/* The official reader opens a .ltn, and sees what was written. */
static void python_reads_it(void **state)
{
    static const char program[] =
        "import sys\n"
        "from safetensors import safe_open\n"
        "with safe_open(sys.argv[1], 'numpy') as f:\n"
        "    assert f.metadata()['format'] == 'ltn'\n"
        "    t = f.get_tensor('model.layers.0.token_mixer.qkvu_proj.weight')\n"
        "    assert t.shape == (32, 8) and t.dtype == 'float32', (t.shape, t.dtype)\n"
        "    print(len(f.keys()), repr(float(t.astype('float64').sum())))\n";
    (void)state;
    if (system("python3 -c 'import safetensors, numpy' 2>/dev/null") != 0)
        skip();
    char command[2048];
    const char *path = in_folder("python.ltn");
    struct ltn_error err = {0};
    struct ltn_checkpoint ck;
    test_write_model(small_config(), LTN_F32, 7, path);
    write_file(in_folder("read.py"), program, strlen(program));
    snprintf(command, sizeof command, "python3 %s %s", in_folder("read.py"), path);
    FILE *f = popen(command, "r");
    assert_non_null(f);
    size_t n = 0;
    double python_sum = 0, sum = 0;
    assert_int_equal(fscanf(f, "%zu %lf", &n, &python_sum), 2);
    assert_int_equal(pclose(f), 0);
    CHECK(ltn_checkpoint_open(&ck, path, &err));
    assert_int_equal(n, ck.file.n_tensors);
    const struct ltn_st_tensor *t = ltn_st_find(&ck.file, "model.layers.0.token_mixer.qkvu_proj.weight");
    for (size_t i = 0; i < t->bytes / 4; i++)
        sum += (double)ltn_load(ck.file.map + t->offset, LTN_F32, i);
    assert_true(fabs(sum - python_sum) < 1e-9);
    ltn_checkpoint_close(&ck);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ltn_opens),   cmocka_unit_test(ltn_tensors),      cmocka_unit_test(ltn_metadata),
        cmocka_unit_test(ltn_verify),  cmocka_unit_test(first_not_finite), cmocka_unit_test(ltn_truncated),
        cmocka_unit_test(ltn_flipped), cmocka_unit_test(ltn_fuzzed),       cmocka_unit_test(python_reads_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
