/* Tokenizer models and JSON that are broken, by chance or by intent: each gives an error or works, none
 * crashes. The chance ones are mutations with a fixed seed of the models in tests/data/tokenizer; the
 * intended ones are written here, field by field (sentencepiece_model.proto). */
#include "tests/test_tokenizer.h"

#include "tokenizer/sp_model.h"
#include "tokenizer/tokenizer.h"

#include <math.h>

#define DATA "tests/data/tokenizer"

static const char json[] = "{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":false,\"special\":[]}";
static const char sample[] =
    "The engine said:\t\"na\u00efve \u4f60\u597d \U0001f600 ab\" \xff\x80 \0 abcabc  <br>e\u0301e 12\n\n";

/* Opens the model and, where it opens, uses it. */
static enum ltn_status try_model(const void *model, size_t bytes, struct ltn_error *err)
{
    struct ltn_tokenizer *t;
    struct ltn_detokenizer *d;
    const char *text;
    size_t n, n_text;
    int32_t *ids;

    err->text[0] = '\0';
    const enum ltn_status status = ltn_tokenizer_open(&t, model, bytes, json, err);
    if (status != LTN_OK) {
        assert_true(err->text[0] != '\0' && strchr(err->text, '\n') == NULL);
        assert_null(t);
        return status;
    }
    if (ltn_tokenize(t, sample, sizeof sample, &ids, &n, err) == LTN_OK) {
        assert_int_equal(ltn_detokenizer_create(&d, t, err), LTN_OK);
        for (size_t i = 0; i < n; i++)
            assert_int_equal(ltn_detokenizer_push(d, ids[i], &text, &n_text, err), LTN_OK);
        for (int32_t id = 0; id < ltn_tokenizer_size(t); id += 1 + ltn_tokenizer_size(t) / 100)
            assert_int_equal(ltn_detokenizer_push(d, id, &text, &n_text, err), LTN_OK);
        assert_int_equal(ltn_detokenizer_finish(d, &text, &n_text, err), LTN_OK);
        ltn_detokenizer_free(d);
        free(ids);
    }
    ltn_tokenizer_close(t);
    return LTN_OK;
}

/* One to four bytes set, bits flipped, stretches cut out, doubled or moved. */
static struct text mutate(const struct text *model, struct random *r)
{
    struct text out = {0};

    text_add(&out, model->data, model->n);
    for (uint32_t k = 1 + random_below(r, 4); k > 0 && out.n > 1; k--) {
        /* Half of the strikes go to the last 3,000 bytes, where the specifications and the rules are. */
        const size_t tail = random_below(r, 2) && out.n > 3000 ? out.n - 3000 : 0;
        const size_t at = tail + random_below(r, (uint32_t)(out.n - tail));
        const size_t left = out.n - at;
        const size_t n = 1 + random_below(r, left < 64 ? (uint32_t)left : 64);
        switch (random_below(r, 6)) {
        case 0:
            out.data[at] ^= (char)(1 << random_below(r, 8));
            break;
        case 1:
            out.data[at] = (char)random_below(r, 256);
            break;
        case 2:
            out.data[at] = (char)(random_below(r, 2) ? 0xFF : 0);
            break;
        case 3:
            memmove(out.data + at, out.data + at + n - 1, left - n + 1);
            out.n -= n - 1;
            break;
        case 4:
            memmove(out.data + at, out.data + random_below(r, (uint32_t)(out.n - n + 1)), n);
            break;
        default:
            if (random_below(r, 8) == 0)
                out.n = at;
        }
    }
    return out;
}

static void mutations(const char *folder, const char *name, int times, uint64_t seed)
{
    struct text model = read_file(folder, name);
    struct random r = {seed};
    struct ltn_error err;
    int works = 0;

    assert_int_equal(try_model(model.data, model.n, &err), LTN_OK);
    for (int i = 0; i < times; i++) {
        struct text broken = mutate(&model, &r);
        works += try_model(broken.data, broken.n, &err) == LTN_OK;
        free(broken.data);
    }
    assert_true(works > 0 && works < times);
    free(model.data);
}

static void test_mutations(void **state)
{
    (void)state;
    mutations(DATA, "tiny_bpe.model", 1500, 1);
    mutations(DATA, "tiny_unigram.model", 3000, 2);
    mutations(DATA, "tiny_suffix.model", 1000, 3);
    mutations(DATA, "tiny_plain.model", 1000, 4);
}

static void test_mutations_third_party(void **state)
{
    const char *folder = getenv("LTN_TEST_TOKENIZERS");
    (void)state;

    if (folder == NULL)
        skip();
    mutations(folder, "baichuan-7b.model", 60, 5);
    mutations(folder, "sp-test-unigram.model", 100, 6);
}

static void test_truncated(void **state)
{
    struct text model = read_file(DATA, "tiny_unigram.model");
    struct ltn_error err;
    (void)state;

    for (size_t n = 0; n < model.n; n++) {
        char *exact = malloc(n + 1); /* no byte to read behind it, so that AddressSanitizer sees one more */
        assert_non_null(exact);
        memcpy(exact + 1, model.data, n);
        try_model(exact + 1, n, &err);
        free(exact);
    }
    free(model.data);
}

/* ---- models written by hand ---- */

static void put_varint(struct text *to, uint64_t value)
{
    do {
        const uint8_t byte = (uint8_t)((value & 0x7F) | (value > 0x7F ? 0x80 : 0));
        text_add(to, &byte, 1);
    } while ((value >>= 7) != 0);
}

static void put_number(struct text *to, uint32_t field, uint64_t value)
{
    put_varint(to, field << 3);
    put_varint(to, value);
}

static void put_bytes(struct text *to, uint32_t field, const void *bytes, size_t n)
{
    put_varint(to, field << 3 | 2);
    put_varint(to, n);
    text_add(to, bytes, n);
}

static void put_message(struct text *to, uint32_t field, struct text *message)
{
    put_bytes(to, field, message->data, message->n);
    free(message->data);
    *message = (struct text){0};
}

static void put_piece(struct text *to, const void *text, size_t n, float score, int type)
{
    struct text piece = {0};
    uint32_t bits;

    memcpy(&bits, &score, sizeof bits);
    put_bytes(&piece, 1, text, n);
    put_varint(&piece, 2 << 3 | 5);
    for (int i = 0; i < 4; i++)
        text_add(&piece, &(uint8_t){(uint8_t)(bits >> 8 * i)}, 1);
    put_number(&piece, 3, (uint64_t)type);
    put_message(to, 1, &piece);
}

/* <unk>, a, b, ab, U+2581: the beginning of a sound model of the type. */
static struct text begin_model(int type)
{
    struct text model = {0}, trainer = {0};

    put_number(&trainer, 3, (uint64_t)type);
    put_message(&model, 2, &trainer);
    put_piece(&model, "<unk>", 5, 0, LTN_SP_UNKNOWN);
    put_piece(&model, "a", 1, -1, LTN_SP_NORMAL);
    put_piece(&model, "b", 1, -2, LTN_SP_NORMAL);
    put_piece(&model, "ab", 2, -1.5f, LTN_SP_NORMAL);
    put_piece(&model, "\u2581", 3, -3, LTN_SP_NORMAL);
    return model;
}

static void expect(struct text *model, enum ltn_status status, const char *in_text)
{
    struct ltn_error err;
    const enum ltn_status got = try_model(model->data, model->n, &err);

    if (got != status || strstr(err.text, in_text) == NULL)
        fail_msg("status %d, expected %d; \"%s\", expected it to say \"%s\"", got, status, err.text, in_text);
    free(model->data);
    *model = (struct text){0};
}

static void test_pieces(void **state)
{
    char long_text[LTN_TOKENIZER_MAX_PIECE + 1], nested[66];
    struct text m;
    (void)state;

    memset(long_text, 'x', sizeof long_text);
    memset(nested, 'y', sizeof nested);
    for (int type = LTN_SP_UNIGRAM; type <= LTN_SP_BPE; type++) {
        m = begin_model(type);
        expect(&m, LTN_OK, "");
        m = begin_model(type);
        put_piece(&m, long_text, sizeof long_text - 1, 0, LTN_SP_NORMAL);
        expect(&m, LTN_OK, "");
        m = begin_model(type);
        put_piece(&m, long_text, sizeof long_text, 0, LTN_SP_NORMAL);
        expect(&m, LTN_ERR_INPUT, "more than 1024 bytes");
        m = begin_model(type);
        put_piece(&m, "", 0, 0, LTN_SP_NORMAL);
        expect(&m, LTN_ERR_INPUT, "no text");
        m = begin_model(type);
        put_piece(&m, "\xc3", 1, 0, LTN_SP_NORMAL);
        expect(&m, LTN_ERR_INPUT, "not UTF-8");
        m = begin_model(type);
        put_piece(&m, "c", 1, NAN, LTN_SP_NORMAL);
        expect(&m, LTN_ERR_INPUT, "not finite");
        m = begin_model(type);
        put_piece(&m, "c", 1, INFINITY, LTN_SP_NORMAL);
        expect(&m, LTN_ERR_INPUT, "not finite");
        m = begin_model(type);
        put_piece(&m, "c", 1, -3e38f, LTN_SP_NORMAL); /* sums overflow */
        put_piece(&m, "abc", 3, 3e38f, LTN_SP_NORMAL);
        expect(&m, LTN_OK, "");
        m = begin_model(type);
        put_piece(&m, "c", 1, 0, 7);
        expect(&m, LTN_ERR_INPUT, "does not exist");
        m = begin_model(type);
        put_piece(&m, "c", 1, 0, LTN_SP_UNUSED);
        expect(&m, LTN_ERR_UNSUPPORTED, "unused");
        m = begin_model(type);
        put_piece(&m, "a", 1, 0, LTN_SP_NORMAL);
        expect(&m, LTN_ERR_INPUT, "already defined");
        m = begin_model(type);
        put_piece(&m, "<u2>", 4, 0, LTN_SP_UNKNOWN);
        expect(&m, LTN_ERR_INPUT, "already defined");
        m = begin_model(type);
        put_piece(&m, "<0x41>", 6, 0, LTN_SP_BYTE); /* without byte_fallback */
        expect(&m, LTN_ERR_INPUT, "byte");
        m = begin_model(type); /* the tries are built from C strings: CVE-2026-1260 */
        put_piece(&m, "a\0b", 3, 0, LTN_SP_USER_DEFINED);
        put_piece(&m, "a\0a", 3, 0, LTN_SP_USER_DEFINED);
        expect(&m, LTN_ERR_INPUT, "NUL");
        m = begin_model(type);
        put_piece(&m, "<s>\0", 4, 0, LTN_SP_CONTROL);
        expect(&m, LTN_ERR_INPUT, "NUL");
        m = begin_model(type);
        put_piece(&m, "a\nb", 3, 0, LTN_SP_NORMAL);
        put_piece(&m, "a\nb", 3, 0, LTN_SP_NORMAL);
        expect(&m, LTN_ERR_INPUT, "a?b is already defined"); /* on one line */
        m = begin_model(type);
        put_piece(&m, "\0", 1, 0, LTN_SP_NORMAL);
        expect(&m, type == LTN_SP_BPE ? LTN_OK : LTN_ERR_INPUT, type == LTN_SP_BPE ? "" : "NUL");
        for (int n = 64; n <= 65; n++) {
            m = begin_model(type);
            for (int i = 1; i <= n; i++)
                put_piece(&m, nested, (size_t)i, 0, LTN_SP_USER_DEFINED);
            put_piece(&m, "z", 1, 0, LTN_SP_USER_DEFINED);
            expect(&m, n == 64 ? LTN_OK : LTN_ERR_INPUT, n == 64 ? "" : "begin with each other");
        }
    }
    m = (struct text){0};
    put_piece(&m, "a", 1, 0, LTN_SP_NORMAL);
    expect(&m, LTN_ERR_INPUT, "unk");
    m = (struct text){0};
    text_add(&m, "", 0);
    expect(&m, LTN_ERR_INPUT, "0 bytes");
    m = begin_model(LTN_SP_WORD);
    expect(&m, LTN_ERR_UNSUPPORTED, "word");
    m = begin_model(LTN_SP_CHAR);
    expect(&m, LTN_ERR_UNSUPPORTED, "character");
    m = begin_model(5);
    expect(&m, LTN_ERR_INPUT, "does not exist");
}

static void test_wire(void **state)
{
    static const struct {
        const char *bytes;
        size_t n;
        const char *says;
    } tails[] = {
        {"\x0a", 1, "ends inside a number"},
        {"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11, "beyond the end"},
        {"\x0a\x7f", 2, "beyond the end"},
        {"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 12, "more than 10 bytes"},
        {"\x0b", 1, "unknown kind"}, /* a group */
        {"\x0f", 1, "unknown kind"},
        {"\x02\x00", 2, "cannot be"},
        {"\x0d\x00\x00", 3, "ends inside a number"},
        {"\x08\x01", 2, "another kind"},
        {"\x10\x01", 2, "another kind"},
        {"\x0a\x02\x0d\x00", 4, "ends inside a number"},
        {"\x12\x02\x1a\x00", 4, "another kind"},
        {"\x1a\x03\x12\x01\x00", 5, "precompiled_charsmap"},
    };
    struct text m;
    (void)state;

    for (size_t i = 0; i < sizeof tails / sizeof *tails; i++) {
        m = begin_model(LTN_SP_BPE);
        text_add(&m, tails[i].bytes, tails[i].n);
        expect(&m, LTN_ERR_INPUT, tails[i].says);
    }
    m = begin_model(LTN_SP_BPE);
    text_add(&m, "\xc2\x3e\x03xyz", 6); /* an extension, field 1000 */
    expect(&m, LTN_OK, "");
    m = begin_model(LTN_SP_BPE);
    text_add(&m, "\x2a\x03\x12\x01x", 5);
    expect(&m, LTN_ERR_UNSUPPORTED, "denormaliser");
    struct ltn_error err;
    struct ltn_tokenizer *t;
    char *large = calloc(LTN_TOKENIZER_MAX_MODEL + 1, 1);
    assert_non_null(large);
    assert_int_equal(ltn_tokenizer_open(&t, large, LTN_TOKENIZER_MAX_MODEL + 1, json, &err), LTN_ERR_INPUT);
    free(large);
}

enum { UNITS = 512 };

/* Puts units [UNITS] and texts [n] into a model as its rules. */
static void expect_rules(const uint32_t *units, const char *texts, size_t n, enum ltn_status status,
                         const char *says)
{
    struct text m = begin_model(LTN_SP_BPE), rules = {0}, spec = {0};

    for (int i = -1; i < UNITS; i++) {
        const uint32_t unit = i < 0 ? 4 * UNITS : units[i];
        for (int k = 0; k < 4; k++)
            text_add(&rules, &(uint8_t){(uint8_t)(unit >> 8 * k)}, 1);
    }
    text_add(&rules, texts, n);
    put_message(&spec, 2, &rules);
    put_message(&m, 3, &spec);
    expect(&m, status, says);
}

/* A trie of one rule, a -> the text at value. A unit at i with offset o has its children at i ^ o ^ label:
 * the root's lie from 256 on, and `a` has at 16 the one of label 0, which is its value. */
static void one_rule(uint32_t *units, uint32_t value)
{
    memset(units, 0, UNITS * sizeof *units);
    for (int i = 1; i < UNITS; i++)
        units[i] = 0x80000000u; /* no child */
    units[0] = 256u << 10;
    units[16] = 0x80000000u | value;
    units[256 + 'a'] = (uint32_t)'a' | 1u << 8 | ((256u + 'a') ^ 16u) << 10;
}

static void test_rules(void **state)
{
    static const char says[] = "out of bounds";
    uint32_t units[UNITS];
    (void)state;

    one_rule(units, 0);
    expect_rules(units, "b", 2, LTN_OK, "");
    one_rule(units, 2);
    expect_rules(units, "bcd", 4, LTN_OK, "");
    one_rule(units, 4);
    expect_rules(units, "bcd", 4, LTN_ERR_INPUT, says);
    one_rule(units, 0x7FFFFFFF);
    expect_rules(units, "bcd", 4, LTN_ERR_INPUT, says);
    one_rule(units, 1);
    expect_rules(units, "\u00e9", 3, LTN_ERR_INPUT, says); /* into the middle of a character */
    one_rule(units, 0);
    expect_rules(units, "bcd", 3, LTN_ERR_INPUT, "NUL");
    expect_rules(units, "\xc3", 2, LTN_ERR_INPUT, "UTF-8");
    expect_rules(units, "", 0, LTN_ERR_INPUT, "do not fit");
    char long_text[1025];
    memset(long_text, 'x', sizeof long_text);
    long_text[1024] = '\0';
    expect_rules(units, long_text, sizeof long_text, LTN_ERR_INPUT, "replacement");

    one_rule(units, 0);
    units[0] = 0x80000000u | 0x1FFFFFu << 10; /* a root that leads far away */
    expect_rules(units, "b", 2, LTN_ERR_INPUT, says);
    one_rule(units, 0);
    units[0] = 512u << 10; /* just beyond */
    expect_rules(units, "b", 2, LTN_ERR_INPUT, says);
    one_rule(units, 0);
    units[256 + 'a'] = (uint32_t)'a' | 1u << 9 | 2u << 10; /* 2 << 8, out of the middle */
    expect_rules(units, "b", 2, LTN_ERR_INPUT, says);
    one_rule(units, 0);
    units[256 + 'a'] = (uint32_t)'a' | (uint32_t)'a' << 10; /* its own child: a* */
    expect_rules(units, "b", 2, LTN_ERR_INPUT, says);
}

static void test_json(void **state)
{
    static const char *const wrong[] = {
        "",
        "{",
        "[]",
        "null",
        "{}",
        "{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":false}",
        "{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":false,\"special\":[]} x",
        "{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":false,\"special\":[],\"more\":1}",
        "{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_bos\":false,\"add_eos\":false,\"special\":[]}",
        "{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":false,\"special\":[],\"a\\nb\":1}",
        "{\"Type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":false,\"special\":[]}",
        "{\"type\":\"tiktoken\",\"add_bos\":false,\"add_eos\":false,\"special\":[]}",
        "{\"type\":1,\"add_bos\":false,\"add_eos\":false,\"special\":[]}",
        "{\"type\":\"sentencepiece\",\"add_bos\":0,\"add_eos\":false,\"special\":[]}",
        "{\"type\":\"sentencepiece\",\"add_bos\":\"false\",\"add_eos\":false,\"special\":[]}",
        "{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":null,\"special\":[]}",
        "{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":false,\"special\":{}}",
    };
    static const char *const wrong_special[] = {
        "1",
        "{}",
        "{\"id\":1}",
        "{\"id\":1,\"text\":\"x\",\"rstrip\":true}",
        "{\"id\":\"1\",\"text\":\"x\"}",
        "{\"id\":1.5,\"text\":\"x\"}",
        "{\"id\":-1,\"text\":\"x\"}",
        "{\"id\":1048576,\"text\":\"x\"}",
        "{\"id\":1e99,\"text\":\"x\"}",
        "{\"id\":4294967297,\"text\":\"x\"}",
        "{\"id\":1,\"text\":1}",
        "{\"id\":1,\"text\":\"\"}",
        "{\"id\":1,\"text\":\"a\\u0000b\"}",
        "{\"id\":1,\"text\":\"\xff\"}",
        "{\"id\":1,\"text\":\"x\"},{\"id\":1,\"text\":\"y\"}",
        "{\"id\":1,\"text\":\"x\"},{\"id\":2,\"text\":\"x\"}",
    };
    struct text model = read_file(DATA, "tiny_bpe.model");
    struct ltn_tokenizer *t;
    struct ltn_error err;
    char text[512];
    (void)state;

    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_equal(ltn_tokenizer_open(&t, model.data, model.n, wrong[i], &err), LTN_ERR_INPUT);
        assert_null(t);
        assert_true(strlen(err.text) > 0 && strchr(err.text, '\n') == NULL);
    }
    for (size_t i = 0; i < sizeof wrong_special / sizeof *wrong_special; i++) {
        snprintf(text, sizeof text,
                 "{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":false,\"special\":[%s]}",
                 wrong_special[i]);
        assert_int_equal(ltn_tokenizer_open(&t, model.data, model.n, text, &err), LTN_ERR_INPUT);
    }
    free(model.data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mutations), cmocka_unit_test(test_mutations_third_party),
        cmocka_unit_test(test_truncated), cmocka_unit_test(test_pieces),
        cmocka_unit_test(test_wire),      cmocka_unit_test(test_rules),
        cmocka_unit_test(test_json),
    };

    return cmocka_run_group_tests_name("tokenizer_hostile", tests, NULL, NULL);
}
