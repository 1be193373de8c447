/* The tokenizer against sentencepiece 0.2 (tests/data/tokenizer, made by tools/make_tokenizer_fixtures.py).
 *
 * $LTN_TEST_TOKENIZERS: a directory with the third-party models, NAME.model for each NAME.ids that has no
 * model of its own here. $LTN_TEST_CORPUS: a directory with val.txt or val.txt.xz. Tests that need what is
 * not set skip. */
#include "tokenizer/tokenizer.h"

#include "tests/tokenizer_fixture.h"

#include <pthread.h>
#include <unistd.h>

static const char plain_json[] =
    "{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":false,\"special\":[]}";

/* ---- opening and decoding ---- */

static void assert_decodes(const struct ltn_tokenizer *t, const int32_t *ids, size_t n, const char *expected)
{
    struct text got = tok_decode(t, ids, n);

    text_add(&got, "", 1);
    assert_string_equal(got.data, expected);
    free(got.data);
}

static struct ltn_tokenizer *open_json(const char *model, const char *json)
{
    struct text bytes = read_file(TOK_DATA, model);
    struct ltn_tokenizer *t;
    struct ltn_error err;

    if (ltn_tokenizer_open(&t, bytes.data, bytes.n, json, &err) != LTN_OK)
        fail_msg("%s: %s", model, err.text);
    free(bytes.data); /* it must have been copied */
    return t;
}

/* ---- fixtures ---- */

static void check_model(const char *name, const char *folder, bool with_val)
{
    char model[64];

    snprintf(model, sizeof model, "%s.model", name);
    tok_check(folder, model, name, plain_json, with_val);
}

static void test_own_model(void **state)
{
    check_model(*state, TOK_DATA, false);
}

static void test_own_model_val(void **state)
{
    if (getenv("LTN_TEST_CORPUS") == NULL)
        skip();
    check_model(*state, TOK_DATA, true);
}

static void test_third_party(void **state)
{
    const char *folder = getenv("LTN_TEST_TOKENIZERS");

    if (folder == NULL)
        skip();
    check_model(*state, folder, false);
}

static void test_third_party_val(void **state)
{
    const char *folder = getenv("LTN_TEST_TOKENIZERS");

    if (folder == NULL || getenv("LTN_TEST_CORPUS") == NULL)
        skip();
    check_model(*state, folder, true);
}

/* ---- streams ---- */

static const char special_json[] =
    "{\"type\":\"sentencepiece\",\"add_bos\":true,\"add_eos\":true,\"special\":["
    "{\"id\":0,\"text\":\"<unk>\"},{\"id\":1,\"text\":\"<s>\"},"
    "{\"id\":2,\"text\":\"<|endoftext|>\"},{\"id\":900,\"text\":\"<\"},"
    "{\"id\":901,\"text\":\"<<s>\"},{\"id\":902,\"text\":\"\u6771\u4eac\"}]}";

static void test_split_invariance(void **state)
{
    static const char *const models[] = {"tiny_bpe.model", "tiny_unigram.model", "tiny_suffix.model",
                                         "tiny_plain.model"};
    struct texts texts = tok_read_texts();
    (void)state;

    for (size_t m = 0; m < 4; m++) {
        struct ltn_tokenizer *t = open_json(models[m], m == 0 ? special_json : plain_json);
        struct random r = {m + 1};
        struct text text = {0};
        while (text.n < 60000) {
            struct text part = tok_random_text(&r, &texts);
            text_add(&text, part.data, part.n);
            free(part.data);
        }
        struct ids want = tok_encode(t, text.data, text.n);
        static const size_t most[] = {1, 2, 30, 5000, 100000};
        for (size_t i = 0; i < sizeof most / sizeof *most; i++) {
            struct ids got = tok_encode_split(t, text.data, text.n, most[i], &r);
            assert_ids(&got, &want);
            free(got.data);
        }
        free(want.data);
        free(text.data);
        ltn_tokenizer_close(t);
    }
    tok_free_texts(&texts);
}

/* Settling gives out all but the last words, at once, and does not change the ids. */
static void test_settle(void **state)
{
    static const char *const models[] = {"tiny_bpe.model", "tiny_unigram.model", "tiny_suffix.model",
                                         "tiny_plain.model"};
    struct texts texts = tok_read_texts();
    (void)state;

    for (size_t m = 0; m < 4; m++) {
        struct ltn_tokenizer *t = open_json(models[m], m == 0 ? special_json : plain_json);
        struct random r = {m + 21};
        struct text text = {0};
        while (text.n < 40000) {
            struct text part = tok_random_text(&r, &texts);
            text_add(&text, part.data, part.n);
            free(part.data);
        }
        struct ids want = tok_encode(t, text.data, text.n), got = {0};
        struct ltn_encoder *encoder;
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

        static const char line[] = "and so on and so on, as they say, until there is nothing more to say\n";
        got.n = 0;
        assert_int_equal(ltn_encoder_feed(encoder, line, strlen(line), NULL), LTN_OK);
        assert_int_equal(ltn_encoder_settle(encoder, NULL), LTN_OK);
        struct text early = tok_decode(t, got.data, got.n);
        struct ids ids = tok_encode(t, line, strlen(line));
        struct text all = tok_decode(t, ids.data, ids.n);
        assert_in_range(early.n, all.n / 2, all.n);
        assert_memory_equal(early.data, all.data, early.n);
        free(all.data);
        free(ids.data);
        free(early.data);
        ltn_encoder_free(encoder);
        free(got.data);
        free(want.data);
        free(text.data);
        ltn_tokenizer_close(t);
    }
    tok_free_texts(&texts);
}

/* More words than the encoder of a long text remembers, many in each other's place. */
static void test_many_words(void **state)
{
    struct ltn_tokenizer *t = open_json("tiny_bpe.model", plain_json);
    struct random r = {9};
    struct text text = {0};
    struct ids want = {0};
    (void)state;

    for (int i = 0; i < 60000; i++) {
        char word[4] = " xy";
        for (int k = 1; k < 4; k++)
            word[k] = (char)('a' + random_below(&r, 26));
        struct ids ids = tok_encode(t, word, 4); /* a short text, of which nothing is remembered */
        ids_add(&want, ids.data, ids.n);
        text_add(&text, word, 4);
        free(ids.data);
    }
    struct ids got = tok_encode(t, text.data, text.n);
    assert_ids(&got, &want);
    free(got.data);
    free(want.data);
    free(text.data);
    ltn_tokenizer_close(t);
}

/* Where no place is safe the text is cut at a character, after 256 KiB, wherever the feeds end. */
static void test_forced_cut(void **state)
{
    enum { N = 150000, WINDOW = 256 << 10 };
    struct ltn_tokenizer *t = open_json("tiny_bpe.model", plain_json);
    struct random r = {6};
    struct text text = {0};
    (void)state;

    for (size_t i = 0; i < N; i++)
        text_add(&text, "\u2581", 3); /* pieces of several spaces: no cut between two is safe */
    struct ids want = tok_encode(t, text.data, text.n);
    struct ids got = tok_encode_split(t, text.data, text.n, 70000, &r);
    assert_ids(&got, &want);
    const size_t cut = (WINDOW + 2) / 3 * 3;
    struct ids left = tok_encode(t, text.data, cut), right = tok_encode(t, text.data + cut, text.n - cut);
    ids_add(&left, right.data, right.n);
    assert_ids(&left, &want);
    struct text back = tok_decode(t, want.data, want.n);
    assert_int_equal(back.n, N);
    for (size_t i = 0; i < N; i++)
        assert_int_equal(back.data[i], ' ');
    free(back.data);
    free(left.data);
    free(right.data);
    free(want.data);
    free(got.data);
    free(text.data);
    ltn_tokenizer_close(t);
}

static void test_constant_memory(void **state)
{
    struct ltn_tokenizer *t = open_json("tiny_bpe.model", special_json);
    (void)state;

    tok_check_constant_memory(t, 1, 7);
    ltn_tokenizer_close(t);
}

static void test_stop(void **state)
{
    struct ltn_tokenizer *t = open_json("tiny_bpe.model", plain_json);
    struct ltn_encoder *encoder;
    struct ltn_error err;
    (void)state;

    assert_int_equal(ltn_encoder_create(&encoder, t, tok_stop_emit, NULL, &err), LTN_OK);
    assert_int_equal(ltn_encoder_feed(encoder, "some text", 9, &err), LTN_OK);
    assert_int_equal(ltn_encoder_finish(encoder, &err), LTN_ERR_STOPPED);
    assert_string_equal(err.text, "enough");
    ltn_encoder_free(encoder);
    ltn_tokenizer_close(t);
}

static void *encode_often(void *arg)
{
    static const char text[] = "Then they went home, and the engine told the crow.\n\nna\u00efve \U0001f600";
    size_t sum = 0;

    for (int i = 0; i < 200; i++) {
        int32_t *ids;
        size_t n;
        if (ltn_tokenize(arg, text, sizeof text - 1, &ids, &n, NULL) != LTN_OK)
            return NULL;
        for (size_t j = 0; j < n; j++)
            sum = sum * 31 + (size_t)ids[j];
        free(ids);
    }
    return (void *)(sum | 1);
}

static void test_threads(void **state)
{
    struct ltn_tokenizer *t = open_json("tiny_bpe.model", plain_json);
    pthread_t threads[4];
    void *sums[4];
    (void)state;

    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, encode_often, t), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], &sums[i]);
    for (int i = 0; i < 4; i++)
        assert_true(sums[i] != NULL && sums[i] == sums[0]);
    ltn_tokenizer_close(t);
}

/* ---- special tokens ---- */

static void test_special(void **state)
{
    /* The text, and what it is: runs and special tokens in turn. The last of each line ends it. */
    static const struct {
        const char *text;
        struct {
            const char *run;
            int32_t special;
        } parts[6];
    } cases[] = {
        {"", {{"", -1}}},
        {"<|endoftext|>", {{"", 2}, {"", -1}}},
        {"a<|endoftext|>b", {{"a", 2}, {"b", -1}}},
        {"<s><s> <s>", {{"", 1}, {"", 1}, {" ", 1}, {"", -1}}},
        {"<<s>", {{"", 901}, {"", -1}}},
        {"<<<s>", {{"", 900}, {"", 901}, {"", -1}}},
        {"<<|endoftext|>", {{"", 900}, {"", 2}, {"", -1}}},
        {"<<|endoftext", {{"", 900}, {"", 900}, {"|endoftext", -1}}},
        {"<|endoftext|", {{"", 900}, {"|endoftext|", -1}}},
        {"x<", {{"x", 900}, {"", -1}}},
        {"</s>", {{"", 900}, {"/s>", -1}}},
        {"the \u6771\u4eac end\n\n<unk>\n", {{"the ", 902}, {" end\n\n", 0}, {"\n", -1}}},
        {"\xe6\x9d\xb1\xe4\xba", {{"\xe6\x9d\xb1\xe4\xba", -1}}},
    };
    struct ltn_tokenizer *t = open_json("tiny_bpe.model", special_json);
    struct ltn_tokenizer *runs = open_json("tiny_bpe.model", plain_json);
    struct random r = {8};
    (void)state;

    assert_int_equal(ltn_tokenizer_size(t), 903);
    assert_int_equal(ltn_tokenizer_size(runs), 700);
    assert_int_equal(ltn_tokenizer_bos(t), 1);
    assert_int_equal(ltn_tokenizer_eos(t), 2);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct ids want = {0};
        ids_add(&want, &(int32_t){1}, 1);
        for (size_t j = 0;; j++) {
            struct ids run = tok_encode(runs, cases[i].parts[j].run, strlen(cases[i].parts[j].run));
            if (run.n > 0)
                ids_add(&want, run.data, run.n);
            free(run.data);
            if (cases[i].parts[j].special < 0)
                break;
            ids_add(&want, &cases[i].parts[j].special, 1);
        }
        ids_add(&want, &(int32_t){2}, 1);
        for (size_t most = 1; most < 20; most += 3) {
            struct ids got = tok_encode_split(t, cases[i].text, strlen(cases[i].text), most, &r);
            assert_ids(&got, &want);
            free(got.data);
        }
        free(want.data);
    }
    ltn_tokenizer_close(t);
    ltn_tokenizer_close(runs);
}

static void test_special_decode(void **state)
{
    struct ltn_tokenizer *t = open_json("tiny_bpe.model", special_json);
    struct ltn_tokenizer *d = open_json("tiny_unigram.model", "{\"type\":\"sentencepiece\",\"add_bos\":false,"
                                                              "\"add_eos\":false,\"special\":["
                                                              "{\"id\":1,\"text\":\"<s>\"}]}");
    const int32_t a = ltn_tokenizer_find(t, "a", 1), the = ltn_tokenizer_find(d, "\u2581the", 6);
    const int32_t e2 = ltn_tokenizer_find(t, "<0xE2>", 6), x82 = ltn_tokenizer_find(t, "<0x82>", 6),
                  xac = ltn_tokenizer_find(t, "<0xAC>", 6);
    struct ltn_detokenizer *one;
    struct ltn_error err;
    const char *text;
    size_t bytes;
    (void)state;

    assert_true(a > 0 && the > 0 && e2 > 0 && x82 > 0 && xac > 0);
    assert_decodes(t, (int32_t[]){2}, 1, "<|endoftext|>");
    assert_decodes(t, (int32_t[]){2, 2}, 2, "<|endoftext|><|endoftext|>");
    assert_decodes(t, (int32_t[]){a, 2, a, 902, 2, a}, 6, "a <|endoftext|>a \u6771\u4eac<|endoftext|>a");
    assert_decodes(t, (int32_t[]){e2, x82, xac}, 3, "\u20ac");
    assert_decodes(t, (int32_t[]){e2, x82, 2, xac}, 4, "\ufffd\ufffd <|endoftext|>\ufffd");
    assert_decodes(t, (int32_t[]){e2, x82, a}, 3, "\ufffd\ufffda");
    assert_decodes(t, (int32_t[]){e2, e2, x82, xac}, 4, "\ufffd\u20ac");
    /* The dummy prefix goes at the start of each run; unknown is "?" here, and </s> is nothing. */
    assert_decodes(d, (int32_t[]){the, the, 1, the, 0, the}, 6, "the the <s>the? the");
    assert_decodes(d, (int32_t[]){2, the, 2, the}, 4, "the the");

    assert_int_equal(ltn_detokenizer_create(&one, t, &err), LTN_OK);
    assert_int_equal(ltn_detokenizer_push(one, e2, &text, &bytes, &err), LTN_OK);
    assert_int_equal(bytes, 0);
    static const int32_t bad[] = {-1, 903, 700, 899, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(ltn_detokenizer_push(one, bad[i], &text, &bytes, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_detokenizer_push(one, x82, &text, &bytes, &err), LTN_OK);
    assert_int_equal(bytes, 0);
    assert_int_equal(ltn_detokenizer_push(one, xac, &text, &bytes, &err), LTN_OK);
    assert_int_equal(bytes, 3);
    assert_memory_equal(text, "\u20ac", 3);
    ltn_detokenizer_free(one);
    ltn_tokenizer_close(t);
    ltn_tokenizer_close(d);
}

static void test_pieces(void **state)
{
    struct ltn_tokenizer *t = open_json("tiny_bpe.model", special_json);
    size_t bytes;
    (void)state;

    for (int32_t id = 0; id < ltn_tokenizer_size(t); id++) {
        const char *piece = ltn_tokenizer_piece(t, id, &bytes);
        if (id >= 700 && id < 900)
            assert_null(piece);
        else
            assert_int_equal(ltn_tokenizer_find(t, piece, bytes), id);
    }
    assert_null(ltn_tokenizer_piece(t, -1, &bytes));
    assert_null(ltn_tokenizer_piece(t, 903, &bytes));
    assert_int_equal(ltn_tokenizer_find(t, "no such piece", 13), -1);
    assert_int_equal(ltn_tokenizer_find(t, "", 0), -1);
    ltn_tokenizer_close(t);
    ltn_tokenizer_close(NULL);
    ltn_encoder_free(NULL), ltn_detokenizer_free(NULL);
}

static void test_describe(void **state)
{
    struct text model = read_file(TOK_DATA, "tiny_bpe.model");
    struct ltn_tokenizer *t;
    struct ltn_error err;
    char *json;
    (void)state;

    assert_int_equal(ltn_tokenizer_describe(model.data, model.n, false, false, NULL, 0, &json, &err), LTN_OK);
    assert_string_equal(json, "{\"type\":\"sentencepiece\",\"add_bos\":false,\"add_eos\":false,\"special\":["
                              "{\"id\":0,\"text\":\"<unk>\"},{\"id\":1,\"text\":\"<s>\"},"
                              "{\"id\":2,\"text\":\"<|endoftext|>\"}]}");
    free(json);
    const struct ltn_special extra[] = {{1, "<\"\\\n\u6771>"}, {701, "<pad>"}};
    assert_int_equal(ltn_tokenizer_describe(model.data, model.n, true, true, extra, 2, &json, &err), LTN_OK);
    assert_string_equal(json, "{\"type\":\"sentencepiece\",\"add_bos\":true,\"add_eos\":true,\"special\":["
                              "{\"id\":0,\"text\":\"<unk>\"},{\"id\":1,\"text\":\"<\\\"\\\\\\n\u6771>\"},"
                              "{\"id\":2,\"text\":\"<|endoftext|>\"},{\"id\":701,\"text\":\"<pad>\"}]}");
    assert_int_equal(ltn_tokenizer_open(&t, model.data, model.n, json, &err), LTN_OK);
    assert_int_equal(ltn_tokenizer_find(t, extra[0].text, strlen(extra[0].text)), 1);
    assert_int_equal(ltn_tokenizer_size(t), 702);
    ltn_tokenizer_close(t);
    free(json);
    const struct ltn_special wrong[] = {{-1, "x"}, {1 << 20, "x"}, {5, ""}, {5, "\xff"}, {5, "<unk>"}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_equal(ltn_tokenizer_describe(model.data, model.n, false, false, &wrong[i], 1, &json, &err),
                         LTN_ERR_INPUT);
        assert_null(json);
    }
    assert_int_equal(ltn_tokenizer_describe("x", 1, false, false, NULL, 0, &json, &err), LTN_ERR_INPUT);
    free(model.data);
}

int main(void)
{
    static char own[][16] = {"tiny_bpe", "tiny_unigram", "tiny_suffix", "tiny_plain"};
    static char others[][24] = {"baichuan-7b",      "mistral-v1", "mistral-v3",
                                "albert-30k-clean", "sp-test-ja", "sp-test-unigram"};
    const struct CMUnitTest tests[] = {
        {"own model: tiny_bpe", test_own_model, NULL, NULL, own[0]},
        {"own model: tiny_unigram", test_own_model, NULL, NULL, own[1]},
        {"own model: tiny_suffix", test_own_model, NULL, NULL, own[2]},
        {"own model: tiny_plain", test_own_model, NULL, NULL, own[3]},
        {"own model: tiny_bpe, val.txt", test_own_model_val, NULL, NULL, own[0]},
        {"own model: tiny_unigram, val.txt", test_own_model_val, NULL, NULL, own[1]},
        {"own model: tiny_suffix, val.txt", test_own_model_val, NULL, NULL, own[2]},
        {"own model: tiny_plain, val.txt", test_own_model_val, NULL, NULL, own[3]},
        {"third-party model: baichuan-7b", test_third_party, NULL, NULL, others[0]},
        {"third-party model: mistral-v1", test_third_party, NULL, NULL, others[1]},
        {"third-party model: mistral-v3", test_third_party, NULL, NULL, others[2]},
        {"third-party model: albert-30k-clean", test_third_party, NULL, NULL, others[3]},
        {"third-party model: sp-test-ja", test_third_party, NULL, NULL, others[4]},
        {"third-party model: sp-test-unigram", test_third_party, NULL, NULL, others[5]},
        {"third-party model: baichuan-7b, val.txt", test_third_party_val, NULL, NULL, others[0]},
        {"third-party model: mistral-v1, val.txt", test_third_party_val, NULL, NULL, others[1]},
        {"third-party model: mistral-v3, val.txt", test_third_party_val, NULL, NULL, others[2]},
        {"third-party model: albert-30k-clean, val.txt", test_third_party_val, NULL, NULL, others[3]},
        {"third-party model: sp-test-ja, val.txt", test_third_party_val, NULL, NULL, others[4]},
        {"third-party model: sp-test-unigram, val.txt", test_third_party_val, NULL, NULL, others[5]},
        cmocka_unit_test(test_split_invariance),
        cmocka_unit_test(test_settle),
        cmocka_unit_test(test_many_words),
        cmocka_unit_test(test_forced_cut),
        cmocka_unit_test(test_constant_memory),
        cmocka_unit_test(test_stop),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_special),
        cmocka_unit_test(test_special_decode),
        cmocka_unit_test(test_pieces),
        cmocka_unit_test(test_describe),
    };

    return cmocka_run_group_tests_name("tokenizer", tests, NULL, NULL);
}
