/* The tokenizer on *.tiktoken vocabularies: against Python's tiktoken
 * (tests/data/tokenizer/tiny_tiktoken.ids, made by tools/make_tiktoken_fixtures.py), against a plain
 * restatement of the merging, on broken files.
 *
 * $LTN_TEST_CORPUS: a directory with val.txt or val.txt.xz; without it the test that needs it skips. */
#include "tests/tokenizer_fixture.h"

#include "tests/support.h"
#include "tokenizer/bpe.h"
#include "tools/hf_tokenizer.h"

#include <time.h>

#define SPECIAL                                                                                              \
    "{\"id\":1200,\"text\":\"<|endoftext|>\"},{\"id\":1201,\"text\":\"<s>\"},"                               \
    "{\"id\":1202,\"text\":\"<pad>\"},{\"id\":1203,\"text\":\"\u6771\u4eac\"}"

enum { RANKS = 1200, EOT = 1200, BOS = 1201, TOKYO = 1203 };

/* With the pattern as it stands in a JSON text, which must not change. */
static const char pattern[] = "\"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{"
                              "N}| ?[^\\\\s\\\\p{L}\\\\p{N}]+"
                              "[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+\"";

static const char *make_json(const char *add_bos, const char *bos, const char *special)
{
    static char json[1024];

    snprintf(json, sizeof json,
             "{\"type\":\"tiktoken\",\"add_bos\":%s,\"add_eos\":false,\"pattern\":%s,\"bos\":%s,\"eos\":-1,"
             "\"special\":[%s]}",
             add_bos, pattern, bos, special);
    return json;
}

static struct ltn_tokenizer *open_tiny(const char *json)
{
    struct text file = read_file(TOK_DATA, "tiny.tiktoken");
    struct ltn_tokenizer *t;
    struct ltn_error err;

    if (ltn_tokenizer_open(&t, file.data, file.n, json, &err) != LTN_OK)
        fail_msg("%s", err.text);
    free(file.data); /* it must have been copied */
    return t;
}

static void test_against_python(void **state)
{
    (void)state;
    tok_check(TOK_DATA, "tiny.tiktoken", "tiny_tiktoken", make_json("false", "-1", SPECIAL), false);
}

static void test_against_python_val(void **state)
{
    (void)state;
    if (getenv("LTN_TEST_CORPUS") == NULL)
        skip();
    tok_check(TOK_DATA, "tiny.tiktoken", "tiny_tiktoken", make_json("false", "-1", SPECIAL), true);
}

/* ---- merging ---- */

/* The rule, word for word: look for the best pair, merge it, again. */
static size_t plain_merge(const struct ltn_bpe *bpe, const char *piece, size_t bytes, int32_t *ids)
{
    size_t end[300], n = bytes;

    assert_true(bytes <= 300);
    ids[0] = ltn_bpe_find(bpe, piece, bytes);
    if (ids[0] >= 0)
        return 1;
    for (size_t i = 0; i < bytes; i++)
        end[i] = i + 1;
    for (;;) {
        size_t best = n;
        int32_t rank = INT32_MAX;
        for (size_t i = 0; i + 1 < n; i++) {
            const size_t from = i == 0 ? 0 : end[i - 1];
            const int32_t id = ltn_bpe_find(bpe, piece + from, end[i + 1] - from);
            if (id >= 0 && id < rank) {
                rank = id;
                best = i;
            }
        }
        if (best == n)
            break;
        memmove(&end[best], &end[best + 1], (n - best - 1) * sizeof *end);
        n--;
    }
    for (size_t i = 0; i < n; i++) {
        const size_t from = i == 0 ? 0 : end[i - 1];
        ids[i] = ltn_bpe_find(bpe, piece + from, end[i] - from);
    }
    return n;
}

static void test_merging(void **state)
{
    struct text file = read_file(TOK_DATA, "tiny.tiktoken");
    struct ltn_merger merger = {0};
    struct random r = {1};
    struct ltn_bpe bpe;
    int32_t want[300], got[300];
    char piece[300];
    size_t n, merged = 0;
    (void)state;

    assert_int_equal(ltn_bpe_read(&bpe, file.data, file.n, NULL), LTN_OK);
    assert_int_equal(bpe.n, RANKS);
    for (int round = 0; round < 3000; round++) {
        const size_t most = round % 10 == 0 ? 300 : 20;
        size_t bytes = 0;
        while (bytes <
               1 + random_below(&r, (uint32_t)most)) { /* tokens, whole and cut, so that much merges */
            const uint32_t id = random_below(&r, RANKS);
            size_t len = bpe.from[id + 1] - bpe.from[id];
            len = random_below(&r, 2) ? len : 1 + random_below(&r, (uint32_t)len);
            len = len < 300 - bytes ? len : 300 - bytes;
            memcpy(piece + bytes, bpe.bytes + bpe.from[id], len);
            bytes += len;
            if (bytes == 300)
                break;
        }
        if (round % 7 == 0)
            for (size_t i = 0; i < bytes; i++)
                piece[i] = "aeht "[random_below(&r, 5)];
        const size_t n_want = plain_merge(&bpe, piece, bytes, want);
        assert_int_equal(ltn_bpe_encode(&bpe, &merger, piece, bytes, got, &n, NULL), LTN_OK);
        assert_int_equal(n, n_want);
        assert_memory_equal(got, want, n * sizeof *got);
        merged += bytes - n;
    }
    assert_true(merged > 10000);
    ltn_merger_free(&merger);
    ltn_bpe_free(&bpe);
    free(file.data);
}

static double cpu_seconds(void)
{
    return (double)clock() / CLOCKS_PER_SEC;
}

/* One piece as long as the window takes little more time a byte than a short one: a pair at a time would take
 * thousands of times as long. */
static void test_long_piece(void **state)
{
    enum { N = 256 << 10 };
    struct ltn_tokenizer *t = open_tiny(make_json("false", "-1", SPECIAL));
    struct text text = {0};
    struct random r = {2};
    (void)state;

    for (int i = 0; i < N; i++)
        text_add(&text, &"aeihnrst"[random_below(&r, 8)], 1);
    const double begin = cpu_seconds();
    struct ids ids = tok_encode(t, text.data, text.n);
    assert_true(cpu_seconds() - begin < 10);
    struct text back = tok_decode(t, ids.data, ids.n);
    assert_int_equal(back.n, text.n);
    assert_memory_equal(back.data, text.data, text.n);
    struct ids split = tok_encode_split(t, text.data, text.n, 40, &r); /* nor does it matter how it comes */
    assert_true(cpu_seconds() - begin < 20);
    assert_ids(&split, &ids);
    free(split.data);
    free(back.data);
    free(ids.data);
    free(text.data);
    ltn_tokenizer_close(t);
}

/* ---- streams ---- */

static void test_split_invariance(void **state)
{
    static const size_t most[] = {1, 2, 30, 5000, 100000};
    struct ltn_tokenizer *t = open_tiny(make_json("true", "1201", SPECIAL));
    struct texts texts = tok_read_texts();
    struct text text = {0};
    struct random r = {3};
    (void)state;

    while (text.n < 60000) {
        struct text part = tok_random_text(&r, &texts);
        text_add(&text, part.data, part.n);
        free(part.data);
    }
    struct ids want = tok_encode(t, text.data, text.n);
    assert_int_equal(want.data[0], BOS);
    for (size_t i = 0; i < sizeof most / sizeof *most; i++) {
        struct ids got = tok_encode_split(t, text.data, text.n, most[i], &r);
        assert_ids(&got, &want);
        free(got.data);
    }
    free(want.data);
    free(text.data);
    tok_free_texts(&texts);
    ltn_tokenizer_close(t);
}

/* Settling gives out all pieces but the last, and does not change the ids. */
static void test_settle(void **state)
{
    struct ltn_tokenizer *t = open_tiny(make_json("false", "-1", SPECIAL));
    struct texts texts = tok_read_texts();
    struct ltn_encoder *encoder;
    struct text text = {0};
    struct random r = {7};
    struct ids got = {0};
    (void)state;

    while (text.n < 40000) {
        struct text part = tok_random_text(&r, &texts);
        text_add(&text, part.data, part.n);
        free(part.data);
    }
    struct ids want = tok_encode(t, text.data, text.n);
    assert_int_equal(ltn_encoder_create(&encoder, t, ids_emit, &got, NULL), LTN_OK);
    for (size_t at = 0, n; at < text.n; at += n) {
        n = 1 + random_below(&r, random_below(&r, 2) ? 3 : 400);
        n = n < text.n - at ? n : text.n - at;
        assert_int_equal(ltn_encoder_feed(encoder, text.data + at, n, NULL), LTN_OK);
        if (random_below(&r, 3) == 0)
            assert_int_equal(ltn_encoder_settle(encoder, NULL), LTN_OK);
    }
    assert_int_equal(ltn_encoder_finish(encoder, NULL), LTN_OK);
    assert_ids(&got, &want);

    got.n = 0;
    for (int i = 0; i < 1000; i++) /* a long piece, whose end then comes */
        assert_int_equal(ltn_encoder_feed(encoder, "x", 1, NULL), LTN_OK);
    assert_int_equal(ltn_encoder_feed(encoder, " and", 4, NULL), LTN_OK);
    assert_int_equal(ltn_encoder_settle(encoder, NULL), LTN_OK);
    struct text early = tok_decode(t, got.data, got.n);
    assert_int_equal(early.n, 1000);
    free(early.data);
    ltn_encoder_free(encoder);
    free(got.data);
    free(want.data);
    free(text.data);
    tok_free_texts(&texts);
    ltn_tokenizer_close(t);
}

/* A run that a special token ends while more than a window of it waits: not all of it is one long piece. */
static void test_end_beyond_window(void **state)
{
    enum { WINDOW = 256 << 10 };
    struct ltn_tokenizer *t = open_tiny(make_json("false", "-1", SPECIAL));
    struct random r = {8};
    struct text text = {0};
    (void)state;

    while (text.n < WINDOW - 100)
        text_add(&text, "x", 1);
    while (text.n < WINDOW + 1000)
        text_add(&text, " and the engine", 15);
    text_add(&text, "<|endoftext|>", 13);
    struct ids got = {0}, parts = {0};
    struct ltn_encoder *encoder;
    assert_int_equal(ltn_encoder_create(&encoder, t, ids_emit, &got, NULL), LTN_OK);
    assert_int_equal(ltn_encoder_feed(encoder, text.data, 10000, NULL), LTN_OK); /* out of step with slices */
    assert_int_equal(ltn_encoder_feed(encoder, text.data + 10000, text.n - 10000, NULL), LTN_OK);
    assert_int_equal(ltn_encoder_finish(encoder, NULL), LTN_OK);
    ltn_encoder_free(encoder);
    for (size_t at = 0; at < text.n;) { /* word by word */
        const char *from = text.data + at, *next = memchr(from + 1, ' ', text.n - at - 1);
        const size_t n = next != NULL ? (size_t)(next - from) : text.n - at;
        struct ids word = tok_encode(t, from, n);
        ids_add(&parts, word.data, word.n);
        free(word.data);
        at += n;
    }
    assert_ids(&got, &parts);
    free(got.data);
    got = tok_encode_split(t, text.data, text.n, 1000, &r);
    assert_ids(&got, &parts);
    free(got.data), free(parts.data), free(text.data);
    ltn_tokenizer_close(t);
}

/* A stretch of one kind that is longer than the window is cut there, wherever feeds end. */
static void test_forced_cut(void **state)
{
    static const char *const kinds[] = {"\u00e9", " ", "-", "\n", "\u4e2d", " \n", "x"};
    enum { WINDOW = 256 << 10 };
    struct ltn_tokenizer *t = open_tiny(make_json("false", "-1", SPECIAL));
    struct random r = {4};
    (void)state;

    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        const size_t len = strlen(kinds[k]), cut = WINDOW / len * len;
        struct text text = {0};
        while (text.n < 2 * WINDOW + 1000)
            text_add(&text, kinds[k], len);
        text_add(&text, "1 end", 5);
        struct ids want = tok_encode(t, text.data, text.n);
        struct ids got = tok_encode_split(t, text.data, text.n, 100000, &r);
        assert_ids(&got, &want);
        free(got.data);
        got = tok_encode_split(t, text.data, text.n, 1000, &r);
        assert_ids(&got, &want);
        struct ids parts = tok_encode(t, text.data, cut);
        struct ids second = tok_encode(t, text.data + cut, cut);
        struct ids third = tok_encode(t, text.data + 2 * cut, text.n - 2 * cut);
        ids_add(&parts, second.data, second.n);
        ids_add(&parts, third.data, third.n);
        assert_ids(&parts, &want);
        struct text back = tok_decode(t, want.data, want.n);
        assert_int_equal(back.n, text.n);
        assert_memory_equal(back.data, text.data, text.n);
        free(back.data);
        free(parts.data), free(second.data), free(third.data);
        free(got.data), free(want.data);
        free(text.data);
    }
    ltn_tokenizer_close(t);
}

static void test_constant_memory(void **state)
{
    struct ltn_tokenizer *t = open_tiny(make_json("false", "-1", SPECIAL));
    (void)state;

    tok_check_constant_memory(t, 0, 5);
    ltn_tokenizer_close(t);
}

static void test_stop(void **state)
{
    struct ltn_tokenizer *t = open_tiny(make_json("false", "-1", SPECIAL));
    struct ltn_encoder *encoder;
    struct ltn_error err;
    (void)state;

    assert_int_equal(ltn_encoder_create(&encoder, t, tok_stop_emit, NULL, &err), LTN_OK);
    assert_int_equal(ltn_encoder_feed(encoder, "some text", 9, &err), LTN_ERR_STOPPED);
    assert_string_equal(err.text, "enough");
    ltn_encoder_free(encoder);
    ltn_tokenizer_close(t);
}

/* ---- tokens and text ---- */

static void assert_decodes(const struct ltn_tokenizer *t, const int32_t *ids, size_t n, const char *expected)
{
    struct text got = tok_decode(t, ids, n);

    text_add(&got, "", 1);
    assert_string_equal(got.data, expected);
    free(got.data);
}

static void test_decode(void **state)
{
    struct ltn_tokenizer *t = open_tiny(make_json("false", "1201", SPECIAL));
    int32_t byte[256];
    struct ltn_detokenizer *d;
    struct ltn_error err;
    const char *text;
    size_t bytes;
    (void)state;

    for (int b = 0; b < 256; b++) {
        byte[b] = ltn_tokenizer_find(t, &(char){(char)b}, 1);
        assert_true(byte[b] >= 0 && byte[b] < 256);
    }
    assert_int_equal(ltn_tokenizer_bos(t), BOS);
    assert_int_equal(ltn_tokenizer_eos(t), -1);
    assert_int_equal(ltn_tokenizer_size(t), RANKS + 4);
    const int32_t a = byte['a'];
    assert_decodes(t, (int32_t[]){a, EOT, EOT, a, TOKYO, a}, 6, "a<|endoftext|><|endoftext|>a\u6771\u4eaca");
    assert_decodes(t, (int32_t[]){byte[0xE2], byte[0x82], byte[0xAC]}, 3, "\u20ac");
    assert_decodes(t, (int32_t[]){byte[0xE2], byte[0x82], EOT, byte[0xAC]}, 4, "\ufffd<|endoftext|>\ufffd");
    assert_decodes(t, (int32_t[]){byte[0xE2], byte[0x82], a}, 3, "\ufffda");
    assert_decodes(t, (int32_t[]){byte[0xE2], byte[0xE2], byte[0x82], byte[0xAC]}, 4, "\ufffd\u20ac");
    assert_decodes(t, (int32_t[]){byte[0xF0], byte[0x9F], byte[0x98]}, 3, "\ufffd");
    assert_decodes(t, (int32_t[]){byte[0xED], byte[0xA0], byte[0x80]}, 3, "\ufffd\ufffd\ufffd");
    assert_decodes(t, (int32_t[]){byte[0xE0], byte[0x80], byte[0xC0], byte[0xF5]}, 4,
                   "\ufffd\ufffd\ufffd\ufffd");

    for (int32_t id = 0; id < ltn_tokenizer_size(t); id++) {
        const char *piece = ltn_tokenizer_piece(t, id, &bytes);
        assert_int_equal(ltn_tokenizer_find(t, piece, bytes), id);
    }
    assert_null(ltn_tokenizer_piece(t, -1, &bytes));
    assert_null(ltn_tokenizer_piece(t, RANKS + 4, &bytes));
    assert_int_equal(ltn_tokenizer_find(t, "no such piece", 13), -1);
    assert_int_equal(ltn_tokenizer_find(t, "", 0), -1);

    assert_int_equal(ltn_detokenizer_create(&d, t, &err), LTN_OK);
    assert_int_equal(ltn_detokenizer_push(d, byte[0xC3], &text, &bytes, &err), LTN_OK);
    assert_int_equal(bytes, 0);
    assert_int_equal(ltn_detokenizer_push(d, RANKS + 4, &text, &bytes, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_detokenizer_push(d, -1, &text, &bytes, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_detokenizer_push(d, byte[0xA9], &text, &bytes, &err), LTN_OK);
    assert_int_equal(bytes, 2);
    assert_memory_equal(text, "\u00e9", 2);
    ltn_detokenizer_free(d);
    ltn_tokenizer_close(t);
}

/* ---- the file and the JSON ---- */

/* All single bytes in base64, ranks 0 to 255, then `more`. */
static struct text make_file(const char *more)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    struct text out = {0};
    char line[32];

    for (int b = 0; b < 256; b++)
        text_add(&out, line,
                 (size_t)snprintf(line, sizeof line, "%c%c== %d\n", digits[b >> 2], digits[(b & 3) << 4], b));
    text_add(&out, more, strlen(more));
    return out;
}

static void expect_read(const char *file, size_t bytes, const char *complaint)
{
    struct ltn_error err = {0};
    struct ltn_bpe bpe;
    char *exact = malloc(bytes + 1); /* so that a byte too far is seen */

    assert_non_null(exact);
    memcpy(exact, file, bytes);
    exact = realloc(exact, bytes > 0 ? bytes : 1);
    const enum ltn_status status = ltn_bpe_read(&bpe, exact, bytes, &err);
    if (complaint == NULL) {
        assert_int_equal(status, LTN_OK);
    } else {
        assert_int_equal(status, LTN_ERR_INPUT);
        if (strstr(err.text, complaint) == NULL)
            fail_msg("expected \"%s\", found \"%s\"", complaint, err.text);
        assert_null(bpe.bytes);
    }
    ltn_bpe_free(&bpe);
    free(exact);
}

static void test_broken_files(void **state)
{
    static const struct {
        const char *more, *complaint;
    } cases[] = {
        {"", NULL},
        {"YWI= 256\n", NULL},
        {"YWI= 256", NULL},
        {"YWI= 256\nYWJj 257\n", NULL},
        {"YWI= 257\n", "line 257: expected rank 256, found '257'"},
        {"YWI= 255\n", "line 257: expected rank 256, found '255'"},
        {"YWI= 256\nYWJj 256\n", "line 258: expected rank 257, found '256'"},
        {"YWI= 256\nYWI= 257\n", "line 258: the token is that of rank 256 too"},
        {"YQ== 256\n", "line 257: the token is that of rank 97 too"},
        {"YWI 256\n", "line 257: the token is not base64"},
        {"YWI=YWI= 256\n", "line 257: the token is not base64"},
        {"YW=I 256\n", "line 257: the token is not base64"},
        {"Y=== 256\n", "line 257: the token is not base64"},
        {"==== 256\n", "line 257: the token is not base64"},
        {"YWJ= 256\n", "line 257: the token is not base64"}, /* bits beyond the last byte */
        {"YR== 256\n", "line 257: the token is not base64"},
        {"YW-_ 256\n", "line 257: the token is not base64"},
        {" 256\n", "line 257: the token is not base64"},
        {"\n", "line 257: expected a token, a space and a rank"},
        {"YWI=\n", "line 257: expected a token, a space and a rank"},
        {"YWI=\t256\n", "line 257: expected a token, a space and a rank"},
        {"YWI= \n", "line 257: expected rank 256, found ''"},
        {"YWI= 0256\n", "line 257: expected rank 256, found '0256'"},
        {"YWI= +256\n", "line 257: expected rank 256, found '+256'"},
        {"YWI= 256 \n", "line 257: expected rank 256, found '256?'"},
        {"YWI= 256\r\n", "line 257: expected rank 256, found '256?'"},
        {"YWI= 99999999999999999999999999999999\n",
         "line 257: expected rank 256, found '99999999999999999999999'"},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct text file = make_file(cases[i].more);
        expect_read(file.data, file.n, cases[i].complaint);
        free(file.data);
    }
    expect_read("", 0, "no token for the byte 0x00 in 0 lines");
    expect_read("AA== 0\n", 7, "no token for the byte 0x01 in 1 lines");

    /* A token of 1,024 bytes, 1365 digits and padding, and one of 1,026. */
    for (int longer = 0; longer < 2; longer++) {
        struct text file = make_file("");
        for (int i = 0; i < 341 + longer; i++)
            text_add(&file, "YWFh", 4);
        if (!longer)
            text_add(&file, "YQ==", 4);
        text_add(&file, " 256\n", 5);
        expect_read(file.data, file.n,
                    longer ? "line 257: a token of 1026 bytes, at most 1024 are allowed" : NULL);
        free(file.data);
    }
    char *lines = malloc(LTN_TOKENIZER_MAX_IDS + 1);
    assert_non_null(lines);
    memset(lines, '\n', LTN_TOKENIZER_MAX_IDS + 1);
    expect_read(lines, LTN_TOKENIZER_MAX_IDS + 1, "it has 1048577 lines, at most 1048576 are allowed");
    free(lines);
    struct ltn_bpe bpe;
    assert_int_equal(ltn_bpe_read(&bpe, "", LTN_TOKENIZER_MAX_MODEL + 1, NULL), LTN_ERR_INPUT); /* unread */
}

static void test_mutations(void **state)
{
    static const char sample[] = "The engine said:\t\"na\u00efve \u4f60\u597d ab\" \xff\x80 it's 12\n\n";
    struct text file = read_file(TOK_DATA, "tiny.tiktoken");
    const char *json = make_json("false", "-1", "");
    struct random r = {6};
    int works = 0;
    (void)state;

    for (int i = 0; i < 2000; i++) {
        struct text broken = {0};
        struct ltn_tokenizer *t;
        struct ltn_error err = {0};
        text_add(&broken, file.data, file.n);
        const size_t at = random_below(&r, (uint32_t)broken.n);
        if (i % 4 == 0)
            broken.n = at;
        else if (i % 4 == 1)
            broken.data[at] ^= (char)(1 << random_below(&r, 8));
        else if (i % 4 == 2)
            broken.data[at] = "=\n +/0A"[random_below(&r, 7)];
        else
            memmove(broken.data + at, broken.data + random_below(&r, (uint32_t)at + 1), broken.n - at);
        if (ltn_tokenizer_open(&t, broken.data, broken.n, json, &err) == LTN_OK) {
            struct ids ids = tok_encode(t, sample, sizeof sample - 1);
            struct text text = tok_decode(t, ids.data, ids.n);
            free(text.data), free(ids.data);
            ltn_tokenizer_close(t);
            works++;
        } else {
            assert_true(err.text[0] != '\0' && strchr(err.text, '\n') == NULL);
        }
        free(broken.data);
    }
    assert_true(works > 0 && works < 2000);
    free(file.data);
}

static void expect_json(const char *json, enum ltn_status want, const char *complaint)
{
    struct text file = make_file("");
    struct ltn_tokenizer *t;
    struct ltn_error err = {0};

    assert_int_equal(ltn_tokenizer_open(&t, file.data, file.n, json, &err), want);
    if (strstr(err.text, complaint) == NULL)
        fail_msg("expected \"%s\", found \"%s\"", complaint, err.text);
    ltn_tokenizer_close(t);
    free(file.data);
}

static void test_json(void **state)
{
    (void)state;
    expect_json(make_json("false", "-1", ""), LTN_OK, "");
    expect_json(make_json("true", "-1", ""), LTN_ERR_INPUT, "\"add_bos\" is true");
    expect_json(make_json("1", "-1", ""), LTN_ERR_INPUT, "\"add_bos\" is neither true nor false");
    expect_json(make_json("false", "300", ""), LTN_ERR_INPUT, "\"bos\" 300 is no special token");
    expect_json(make_json("false", "-2", ""), LTN_ERR_INPUT, "\"bos\" -2 is no special token");
    expect_json(make_json("false", "1.5", ""), LTN_ERR_INPUT, "\"bos\" is not an integer");
    expect_json(make_json("false", "-1", "{\"id\":300,\"text\":\"\"}"), LTN_ERR_INPUT, "0 bytes of text");
    expect_json("{\"type\":\"tiktoken\"}", LTN_ERR_INPUT, "it has no \"add_bos\"");
    expect_json(
        "{\"type\":\"tiktoken\",\"add_bos\":false,\"add_eos\":false,\"pattern\":\".\",\"bos\":-1,\"eos\":-1,"
        "\"special\":[]}",
        LTN_ERR_UNSUPPORTED, "\"pattern\" is not the one that is known");
    expect_json("{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":false,\"special\":[]}",
                LTN_ERR_INPUT, "");
    expect_json("{\"type\":\"other\",\"add_bos\":false,\"add_eos\":false,\"special\":[]}", LTN_ERR_INPUT, "");
    expect_json("{", LTN_ERR_INPUT, "not valid from byte");
}

static void test_describe(void **state)
{
    const struct ltn_special special[] = {{260, "<eos>"}, {257, "<s>"}};
    struct text file = make_file("");
    struct ltn_tokenizer *t;
    struct ltn_error err;
    char *json, want[1024];
    (void)state;

    assert_int_equal(
        ltn_tokenizer_describe_tiktoken(file.data, file.n, true, false, 257, 260, special, 2, &json, &err),
        LTN_OK);
    snprintf(
        want, sizeof want,
        "{\"type\":\"tiktoken\",\"add_bos\":true,\"add_eos\":false,\"pattern\":%s,\"bos\":257,\"eos\":260,"
        "\"special\":[{\"id\":260,\"text\":\"<eos>\"},{\"id\":257,\"text\":\"<s>\"}]}",
        pattern);
    assert_string_equal(json, want);
    assert_int_equal(ltn_tokenizer_open(&t, file.data, file.n, json, &err), LTN_OK);
    struct ids ids = tok_encode(t, "A<eos>", 6);
    assert_int_equal(ids.n, 3);
    assert_true(ids.data[0] == 257 && ids.data[1] == 65 && ids.data[2] == 260);
    free(ids.data);
    ltn_tokenizer_close(t);
    free(json);
    assert_int_equal(
        ltn_tokenizer_describe_tiktoken(file.data, file.n, true, false, -1, 260, special, 2, &json, &err),
        LTN_ERR_INPUT);
    assert_null(json);
    assert_int_equal(ltn_tokenizer_describe_tiktoken("x", 1, false, false, -1, -1, NULL, 0, &json, &err),
                     LTN_ERR_INPUT);
    free(file.data);
}

/* ---- a checkpoint's folder ---- */

/* A file of test_folder(). */
static const char *path_of(const char *name)
{
    static char path[512];

    snprintf(path, sizeof path, "%s/%s", test_folder(), name);
    return path;
}

static void write_bytes(const char *name, const void *data, size_t bytes)
{
    FILE *file = fopen(path_of(name), "wb");

    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

static void write_text(const char *name, const char *text)
{
    write_bytes(name, text, strlen(text));
}

/* NULL: it must go well; *out is the caller's. */
static void read_folder(struct ltn_hf_tokenizer *out, int32_t vocab_size, const char *complaint)
{
    struct ltn_error err = {0};
    const enum ltn_status status = ltn_hf_tokenizer_read(out, test_folder(), vocab_size, &err);

    if (complaint == NULL) {
        if (status != LTN_OK)
            fail_msg("%s", err.text);
        return;
    }
    assert_int_equal(status, LTN_ERR_INPUT);
    if (strstr(err.text, complaint) == NULL)
        fail_msg("expected \"%s\", found \"%s\"", complaint, err.text);
}

static void test_checkpoint(void **state)
{
    struct text file = make_file("YWI= 256\n");
    struct ltn_hf_tokenizer hf;
    char want[1024];
    (void)state;

    read_folder(&hf, 300, NULL);
    assert_null(hf.model);
    write_bytes("any.tiktoken", file.data, file.n);
    read_folder(&hf, 300, "any.tiktoken: 257 ranks: expected their special tokens as added_tokens_decoder");
    write_text("tokenizer_config.json", "{\"bos_token\": \"<s>\", \"eos_token\": {\"content\": \"</s>\"},"
                                        " \"pad_token\": null, \"unk_token\": \"nowhere\"}");
    read_folder(&hf, 300, "257 ranks: expected their special tokens");
    write_text("added_tokens.json", "{\"<s>\": 260, \"</s>\": 258, \"<far>\": 300}");
    read_folder(&hf, 300, NULL);
    snprintf(
        want, sizeof want,
        "{\"type\":\"tiktoken\",\"add_bos\":false,\"add_eos\":false,\"pattern\":%s,\"bos\":260,\"eos\":258,"
        "\"special\":[{\"id\":260,\"text\":\"<s>\"},{\"id\":258,\"text\":\"</s>\"}]}",
        pattern);
    assert_string_equal(hf.json, want);
    assert_int_equal(hf.beyond, 1);
    assert_int_equal(hf.bytes, file.n);
    assert_memory_equal(hf.model, file.data, file.n);
    ltn_hf_tokenizer_free(&hf);
    write_text("tokenizer_config.json",
               "{\"add_bos_token\": true, \"bos_token\": \"<b>\","
               " \"added_tokens_decoder\": {\"259\": {\"content\": \"<b>\", \"special\": true}}}");
    read_folder(&hf, 300, NULL);
    assert_non_null(strstr(hf.json, "\"add_bos\":true"));
    assert_non_null(strstr(hf.json, "\"bos\":259,\"eos\":-1"));
    ltn_hf_tokenizer_free(&hf);
    write_text("tokenizer_config.json", "{\"add_bos_token\": true}");
    read_folder(&hf, 300, "\"add_bos\" is true");
    read_folder(&hf, 256, "any.tiktoken: 257 pieces, but the model's vocab_size is 256");
    write_text("b.tiktoken", "");
    read_folder(&hf, 300, "expected one tokenizer, found");
    assert_int_equal(remove(path_of("b.tiktoken")), 0);
    write_text("tokenizer.model", "");
    read_folder(&hf, 300, "expected one tokenizer, found any.tiktoken beside tokenizer.model");
    assert_int_equal(remove(path_of("tokenizer.model")), 0);
    write_text("any.tiktoken", "YQ== 1\n");
    read_folder(&hf, 300, "any.tiktoken: tiktoken file: line 1: expected rank 0, found '1'");
    assert_int_equal(remove(path_of("any.tiktoken")), 0);
    assert_int_equal(remove(path_of("tokenizer_config.json")), 0);
    assert_int_equal(remove(path_of("added_tokens.json")), 0);
    free(file.data);
}

/* As many ranks as TransNormerLLM3 has: its special tokens are known. */
static void test_tnl3(void **state)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    struct text file = make_file("");
    struct ltn_hf_tokenizer hf;
    struct ltn_tokenizer *t;
    struct ltn_error err;
    char line[32];
    (void)state;

    for (int i = 0; i < 100000; i++) /* three bytes each */
        text_add(&file, line,
                 (size_t)snprintf(line, sizeof line, "%c%c%c%c %d\n", digits[i >> 18], digits[i >> 12 & 63],
                                  digits[i >> 6 & 63], digits[i & 63], 256 + i));
    write_bytes("tnl3.tiktoken", file.data, file.n);
    read_folder(&hf, 100280, NULL);
    assert_int_equal(ltn_tokenizer_open(&t, hf.model, hf.bytes, hf.json, &err), LTN_OK);
    assert_int_equal(ltn_tokenizer_size(t), 100277);
    assert_int_equal(ltn_tokenizer_bos(t), 100261);
    assert_int_equal(ltn_tokenizer_eos(t), 100257);
    static const struct {
        const char *text;
        int32_t id;
    } known[] = {{"<|J2PM|>", 100256}, {"<|endoftext|>", 100257}, {"<|fim_suffix|>", 100260},
                 {"<pad>", 100262},    {"<mask>", 100264},        {"<|endofprompt|>", 100276}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        struct ids ids = tok_encode(t, known[i].text, strlen(known[i].text));
        assert_int_equal(ids.n, 1);
        assert_int_equal(ids.data[0], known[i].id);
        free(ids.data);
    }
    struct ids ids = tok_encode(t, "ab", 2); /* nothing is put around a text */
    assert_int_equal(ids.n, 2);
    free(ids.data);
    ltn_tokenizer_close(t);
    ltn_hf_tokenizer_free(&hf);
    assert_int_equal(remove(path_of("tnl3.tiktoken")), 0);
    free(file.data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_python),
        cmocka_unit_test(test_against_python_val),
        cmocka_unit_test(test_merging),
        cmocka_unit_test(test_long_piece),
        cmocka_unit_test(test_split_invariance),
        cmocka_unit_test(test_settle),
        cmocka_unit_test(test_end_beyond_window),
        cmocka_unit_test(test_forced_cut),
        cmocka_unit_test(test_constant_memory),
        cmocka_unit_test(test_stop),
        cmocka_unit_test(test_decode),
        cmocka_unit_test(test_broken_files),
        cmocka_unit_test(test_mutations),
        cmocka_unit_test(test_json),
        cmocka_unit_test(test_describe),
        cmocka_unit_test(test_checkpoint),
        cmocka_unit_test(test_tnl3),
    };

    return cmocka_run_group_tests_name("tiktoken", tests, NULL, NULL);
}
