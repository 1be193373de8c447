#include "tests/tokenizer_fixture.h"

#include <sys/resource.h>

/* ---- encoding and decoding ---- */

struct ids tok_encode(const struct ltn_tokenizer *t, const char *text, size_t bytes)
{
    struct ids out = {0};
    struct ltn_error err;

    if (ltn_tokenize(t, text, bytes, &out.data, &out.n, &err) != LTN_OK)
        fail_msg("%s", err.text);
    return out;
}

/* Fed in pieces of 0 to most bytes. */
void tok_feed_split(struct ltn_encoder *encoder, const char *text, size_t bytes, size_t most,
                    struct random *r)
{
    for (size_t at = 0, n; at < bytes; at += n) {
        n = most == 1 ? 1 : random_below(r, (uint32_t)most + 1);
        n = n < bytes - at ? n : bytes - at;
        assert_int_equal(ltn_encoder_feed(encoder, text + at, n, NULL), LTN_OK);
    }
    assert_int_equal(ltn_encoder_finish(encoder, NULL), LTN_OK);
}

struct ids tok_encode_split(const struct ltn_tokenizer *t, const char *text, size_t bytes, size_t most,
                            struct random *r)
{
    struct ltn_encoder *encoder;
    struct ids out = {0};

    assert_int_equal(ltn_encoder_create(&encoder, t, ids_emit, &out, NULL), LTN_OK);
    tok_feed_split(encoder, text, bytes, most, r);
    ltn_encoder_free(encoder);
    return out;
}

/* Every push must return whole characters. */
struct text tok_decode(const struct ltn_tokenizer *t, const int32_t *ids, size_t n)
{
    struct ltn_detokenizer *d;
    struct text out = {0};
    struct ltn_error err;
    const char *part;
    size_t bytes;

    assert_int_equal(ltn_detokenizer_create(&d, t, &err), LTN_OK);
    for (size_t i = 0; i <= n; i++) {
        if (i < n)
            assert_int_equal(ltn_detokenizer_push(d, ids[i], &part, &bytes, &err), LTN_OK);
        else
            assert_int_equal(ltn_detokenizer_finish(d, &part, &bytes, &err), LTN_OK);
        assert_int_equal(ltn_utf8_check(part, bytes), bytes);
        text_add(&out, part, bytes);
    }
    ltn_detokenizer_free(d);
    return out;
}

/* ---- fixtures ---- */

struct texts tok_read_texts(void)
{
    struct text file = read_file(TOK_DATA, "texts.hex");
    struct texts all = {0};

    for (char *line = file.data, *end;
         (end = memchr(line, '\n', (size_t)(file.data + file.n - line))) != NULL; line = end + 1) {
        all.data = realloc(all.data, (all.n + 1) * sizeof *all.data);
        assert_non_null(all.data);
        all.data[all.n++] = from_hex(line, (size_t)(end - line));
    }
    free(file.data);
    assert_true(all.n > 150);
    return all;
}

void tok_free_texts(struct texts *texts)
{
    for (size_t i = 0; i < texts->n; i++)
        free(texts->data[i].data);
    free(texts->data);
}

static void hash_ids(struct hash *h, const struct ids *ids)
{
    hash_add(h, ids->data, ids->n * sizeof *ids->data, ids->n);
    hash_add(h, &(int32_t){-1}, sizeof(int32_t), 0);
}

static void hash_encode(struct hash *h, const struct ltn_tokenizer *t, const char *text, size_t bytes)
{
    struct ids ids = tok_encode(t, text, bytes);

    hash_ids(h, &ids);
    free(ids.data);
}

struct text tok_random_text(struct random *r, const struct texts *texts)
{
    struct text out = {0};

    for (uint32_t n = random_below(r, 24); n > 0; n--) {
        const struct text *part = &texts->data[random_below(r, (uint32_t)texts->n)];
        text_add(&out, part->data, part->n);
    }
    return out;
}

static void check_text(const struct ltn_tokenizer *t, const struct text *text, char *line)
{
    struct random r = {3};
    struct ids want = {0};

    for (char *word = strtok(line, " "); word != NULL; word = strtok(NULL, " "))
        ids_add(&want, &(int32_t){(int32_t)strtol(word, NULL, 10)}, 1);
    struct ids got = tok_encode(t, text->data, text->n);
    assert_ids(&got, &want);
    free(got.data);
    got = tok_encode_split(t, text->data, text->n, 1, &r);
    assert_ids(&got, &want);
    free(got.data);
    got = tok_encode_split(t, text->data, text->n, 5, &r);
    assert_ids(&got, &want);
    free(got.data);
    free(want.data);
}

/* Each text by itself, and all of them split and through one encoder, which has read a long text before. */
static void check_random_encode(const struct ltn_tokenizer *t, const struct texts *texts, unsigned n,
                                const char *want)
{
    struct random r = {1}, split = {4};
    struct text long_text = {0};
    struct ltn_encoder *encoder;
    struct ids ids = {0};
    struct hash h, h_split;

    hash_begin(&h);
    hash_begin(&h_split);
    while (long_text.n < 10000)
        for (size_t i = 0; i < texts->n; i++)
            text_add(&long_text, texts->data[i].data, texts->data[i].n);
    assert_int_equal(ltn_encoder_create(&encoder, t, ids_emit, &ids, NULL), LTN_OK);
    tok_feed_split(encoder, long_text.data, long_text.n, 9, &split);
    free(long_text.data);
    for (unsigned i = 0; i < n; i++) {
        struct text text = tok_random_text(&r, texts);
        hash_encode(&h, t, text.data, text.n);
        ids.n = 0;
        tok_feed_split(encoder, text.data, text.n, 9, &split);
        hash_ids(&h_split, &ids);
        free(text.data);
    }
    hash_check(&h, want);
    hash_check(&h_split, want);
    ltn_encoder_free(encoder);
    free(ids.data);
}

static void check_random_decode(const struct ltn_tokenizer *t, unsigned n, const char *want)
{
    const uint32_t size = (uint32_t)ltn_tokenizer_size(t), near = size < 300 ? size : 300;
    struct random r = {2};
    struct hash h;

    hash_begin(&h);
    for (unsigned i = 0; i < n; i++) {
        int32_t ids[24];
        const bool is_near = random_below(&r, 2);
        const size_t n_ids = random_below(&r, 24);
        for (size_t j = 0; j < n_ids; j++)
            ids[j] = (int32_t)random_below(&r, is_near ? near : size);
        struct text text = tok_decode(t, ids, n_ids);
        text_add(&text, "", 1);
        hash_add(&h, text.data, text.n, text.n - 1);
        free(text.data);
    }
    hash_check(&h, want);
}

static void check_run(const struct ltn_tokenizer *t, const char *hex, size_t times, const char *want)
{
    struct text part = from_hex(hex, strlen(hex)), text = {0};
    struct hash h;

    for (size_t i = 0; i < times; i++)
        text_add(&text, part.data, part.n);
    hash_begin(&h);
    hash_encode(&h, t, text.data, text.n);
    hash_check(&h, want);
    free(part.data);
    free(text.data);
}

static void check_val_lines(const struct ltn_tokenizer *t, const struct text *val, const char *want)
{
    struct hash h;

    hash_begin(&h);
    for (size_t at = 0; at <= val->n;) {
        const char *line = val->data + at;
        const char *end = at < val->n ? memchr(line, '\n', val->n - at) : NULL;
        const size_t n = end != NULL ? (size_t)(end - line) : val->n - at;
        hash_encode(&h, t, line, n);
        at += n + 1;
    }
    hash_check(&h, want);
}

static void check_val_whole(const struct ltn_tokenizer *t, const struct text *val, const char *want)
{
    struct random r = {5};
    struct hash h;

    hash_begin(&h);
    struct ids ids = tok_encode_split(t, val->data, val->n, 3000, &r);
    hash_ids(&h, &ids);
    free(ids.data);
    hash_check(&h, want);
}

/* "HEX ID ID ...": the text and its ids. */
static void check_piece(const struct ltn_tokenizer *t, char *rest)
{
    const size_t n = strcspn(rest, " ");
    struct text text = from_hex(rest, n);

    check_text(t, &text, rest + n);
    free(text.data);
}

void tok_check(const char *folder, const char *model_name, const char *name, const char *json, bool with_val)
{
    char file_name[64], hex[64], word[32], rest[64];
    struct ltn_tokenizer *t;
    struct ltn_error err;
    size_t n_text = 0, n_checked = 0;
    unsigned n;
    int at;

    struct text model = read_file(folder, model_name);
    snprintf(file_name, sizeof file_name, "%s.ids", name);
    struct text file = read_file(TOK_DATA, file_name);
    struct text val = with_val ? read_val() : (struct text){0};
    struct texts texts = tok_read_texts();
    if (ltn_tokenizer_open(&t, model.data, model.n, json, &err) != LTN_OK)
        fail_msg("%s", err.text);

    text_add(&file, "", 1);
    for (char *line = file.data, *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        *end = '\0';
        at = 0;
        if (sscanf(line, "%31s%n", word, &at) != 1)
            fail_msg("an empty line");
        if (strcmp(word, "model") == 0) {
            struct hash h;
            hash_begin(&h);
            hash_add(&h, model.data, model.n, model.n);
            snprintf(rest, sizeof rest, "%zu%s", model.n, line + at);
            hash_check(&h, rest); /* else these fixtures are another model's */
        } else if (strncmp(word, "val-", 4) == 0) {
            if (with_val)
                (word[4] == 'l' ? check_val_lines : check_val_whole)(t, &val, line + at + 1);
        } else if (with_val) {
            continue;
        } else if (strcmp(word, "text") == 0) {
            assert_true(n_text < texts.n);
            check_text(t, &texts.data[n_text++], line + at);
        } else if (strcmp(word, "piece") == 0) {
            check_piece(t, line + at + 1);
        } else if (sscanf(line, "random-encode %u %n", &n, &at) == 1) {
            check_random_encode(t, &texts, n, line + at);
        } else if (sscanf(line, "random-decode %u %n", &n, &at) == 1) {
            check_random_decode(t, n, line + at);
        } else if (sscanf(line, "run %63s %u %n", hex, &n, &at) == 2) {
            check_run(t, hex, n, line + at);
        } else {
            fail_msg("an unknown line: %s", line);
        }
        n_checked++;
    }
    assert_true(with_val ? n_checked >= 2 : n_text == texts.n && n_checked > n_text + 8);
    ltn_tokenizer_close(t);
    tok_free_texts(&texts);
    free(file.data);
    free(model.data);
    free(val.data);
}

/* ---- streams ---- */

enum ltn_status tok_stop_emit(void *ctx, const int32_t *ids, size_t n, struct ltn_error *err)
{
    (void)ctx, (void)ids, (void)n;
    return ltn_fail(err, LTN_ERR_STOPPED, "enough");
}

static enum ltn_status count_emit(void *ctx, const int32_t *ids, size_t n, struct ltn_error *err)
{
    (void)ids, (void)err;
    *(size_t *)ctx += n;
    return LTN_OK;
}

static long max_rss_kib(void)
{
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss;
}

void tok_check_constant_memory(const struct ltn_tokenizer *t, size_t n_bos, uint64_t seed)
{
    struct texts texts = tok_read_texts();
    struct ltn_encoder *encoder;
    struct random r = {seed};
    struct text text = {0};
    size_t n = 0, first = 0;
    long before = 0;

    while (text.n < 300000) {
        struct text part = tok_random_text(&r, &texts);
        text_add(&text, part.data, part.n);
        free(part.data);
    }
    text_add(&text, "<|endoftext|>", 13); /* each copy a run of its own: as many ids each time */
    assert_int_equal(ltn_encoder_create(&encoder, t, count_emit, &n, NULL), LTN_OK);
    for (size_t i = 0; i < 20; i++) {
        assert_int_equal(ltn_encoder_feed(encoder, text.data, text.n, NULL), LTN_OK);
        if (i == 0)
            first = n - n_bos;
        assert_int_equal(n, n_bos + first * (i + 1));
        if (i == 2)
            before = max_rss_kib();
    }
    assert_int_equal(ltn_encoder_finish(encoder, NULL), LTN_OK);
#ifndef __SANITIZE_ADDRESS__ /* which keeps freed memory */
    assert_true(max_rss_kib() - before < 1024);
#else
    (void)before;
#endif
    ltn_encoder_free(encoder);
    free(text.data);
    tok_free_texts(&texts);
}
