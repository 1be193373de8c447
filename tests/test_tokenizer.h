/* What the two test programs of the tokenizer share: files, ids, random numbers, hashes. */
#ifndef LTN_TEST_TOKENIZER_H
#define LTN_TEST_TOKENIZER_H

#include "kernels/status.h"
#include "tokenizer/utf8.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <xxhash.h>

struct text {
    char *data; /* [n], malloc'd */
    size_t n, room;
};

static inline void text_add(struct text *to, const void *bytes, size_t n)
{
    if (to->n + n > to->room || to->data == NULL) {
        to->room = 2 * (to->n + n) + 1;
        to->data = realloc(to->data, to->room);
        assert_non_null(to->data);
    }
    if (n > 0)
        memcpy(to->data + to->n, bytes, n);
    to->n += n;
}

static inline struct text read_stream(FILE *file)
{
    struct text out = {0};
    char buffer[65536];

    for (size_t n; (n = fread(buffer, 1, sizeof buffer, file)) > 0;)
        text_add(&out, buffer, n);
    return out;
}

static inline struct text read_file(const char *folder, const char *name)
{
    char path[4096];

    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    if (file == NULL)
        fail_msg("cannot read %s", path);
    struct text out = read_stream(file);
    fclose(file);
    return out;
}

/* val.txt of $LTN_TEST_CORPUS, which must be set. */
static inline struct text read_val(void)
{
    FILE *file = popen("cd \"$LTN_TEST_CORPUS\" && { cat val.txt 2>&- || xz -dc val.txt.xz; }", "r");

    assert_non_null(file);
    struct text out = read_stream(file);
    assert_int_equal(pclose(file), 0);
    return out;
}

static inline struct text from_hex(const char *hex, size_t n)
{
    struct text out = {0};

    text_add(&out, "", 0);
    for (size_t i = 0; i + 1 < n; i += 2) {
        const char pair[3] = {hex[i], hex[i + 1], '\0'};
        text_add(&out, &(char){(char)strtoul(pair, NULL, 16)}, 1);
    }
    return out;
}

/* Knuth's MMIX generator, as in tools/make_tokenizer_fixtures.py. */
struct random {
    uint64_t x;
};

static inline uint32_t random_below(struct random *r, uint32_t n)
{
    r->x = r->x * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(r->x >> 33) % n;
}

struct ids {
    int32_t *data; /* [n] */
    size_t n, room;
};

static inline void ids_add(struct ids *to, const int32_t *ids, size_t n)
{
    if (to->n + n > to->room) {
        to->room = 2 * (to->n + n);
        to->data = realloc(to->data, to->room * sizeof *to->data);
        assert_non_null(to->data);
    }
    if (n > 0)
        memcpy(to->data + to->n, ids, n * sizeof *ids);
    to->n += n;
}

static inline enum ltn_status ids_emit(void *ctx, const int32_t *ids, size_t n, struct ltn_error *err)
{
    (void)err;
    ids_add(ctx, ids, n);
    return LTN_OK;
}

static inline void assert_ids(const struct ids *a, const struct ids *b)
{
    assert_int_equal(a->n, b->n);
    if (a->n > 0)
        assert_memory_equal(a->data, b->data, a->n * sizeof *a->data);
}

/* A count and an XXH3-128. */
struct hash {
    XXH3_state_t *state;
    size_t n;
};

static inline void hash_begin(struct hash *h)
{
    h->n = 0;
    h->state = XXH3_createState();
    assert_non_null(h->state);
    XXH3_128bits_reset(h->state);
}

static inline void hash_add(struct hash *h, const void *data, size_t bytes, size_t count)
{
    if (bytes > 0)
        XXH3_128bits_update(h->state, data, bytes);
    h->n += count;
}

/* want: "COUNT HASH" */
static inline void hash_check(struct hash *h, const char *want)
{
    const XXH128_hash_t hash = XXH3_128bits_digest(h->state);
    char got[64];

    XXH3_freeState(h->state);
    snprintf(got, sizeof got, "%zu %016llx%016llx", h->n, (unsigned long long)hash.high64,
             (unsigned long long)hash.low64);
    assert_string_equal(got, want);
}

#endif
