/* What the tests of sessions share: opening, comparing, files. */
#ifndef LTN_TESTS_SESSIONS_H
#define LTN_TESTS_SESSIONS_H

#include <setjmp.h>
#include <stdarg.h>

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "src/session.h"
#include "tests/support.h"

#define CHECK(call) check((call), &err, #call)

static inline void check(enum ltn_status status, const struct ltn_error *err, const char *what)
{
    if (status != LTN_OK)
        fail_msg("%s: %s", what, err->text);
}

static inline struct ltn_engine *open_engine(const char *path)
{
    const struct ltn_engine_options options = {.device = "cpu", .n_threads = 1};
    struct ltn_engine *engine;
    struct ltn_error err;
    CHECK(ltn_engine_open(&engine, path, &options, &err));
    return engine;
}

static inline struct ltn_session *open_session(const struct ltn_engine *engine)
{
    struct ltn_session *session;
    struct ltn_error err;
    CHECK(ltn_session_create(&session, engine, NULL, &err));
    return session;
}

static inline void random_ids(int32_t *ids, size_t n, int32_t vocab, uint64_t seed)
{
    struct test_rng rng = {seed};
    for (size_t i = 0; i < n; i++)
        ids[i] = test_below(&rng, vocab);
}

static inline uint8_t *read_whole(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    struct stat st;
    assert_non_null(f);
    assert_int_equal(fstat(fileno(f), &st), 0);
    *bytes = (size_t)st.st_size;
    uint8_t *data = malloc(*bytes + 1);
    assert_non_null(data);
    assert_int_equal(fread(data, 1, *bytes, f), *bytes);
    fclose(f);
    return data;
}

static inline void write_whole(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    assert_int_equal(fclose(f), 0);
}

static inline int files_in(const char *path, const char *part)
{
    DIR *dir = opendir(path);
    int n = 0;
    assert_non_null(dir);
    for (struct dirent *d; (d = readdir(dir)) != NULL;)
        n += strstr(d->d_name, part) != NULL;
    closedir(dir);
    return n;
}

static inline bool same_logits(struct ltn_session *a, struct ltn_session *b)
{
    const float *x, *y;
    struct ltn_error err;
    CHECK(ltn_session_logits(a, &x, &err));
    CHECK(ltn_session_logits(b, &y, &err));
    return memcmp(x, y, (size_t)ltn_engine_info(a->engine)->vocab_size * sizeof *x) == 0;
}

/* Largest difference of the logits, as a share of the largest logit. */
static inline double difference(struct ltn_session *a, struct ltn_session *b)
{
    const float *x, *y;
    double worst = 0, largest = 0;
    struct ltn_error err;
    CHECK(ltn_session_logits(a, &x, &err));
    CHECK(ltn_session_logits(b, &y, &err));
    for (int32_t i = 0; i < ltn_engine_info(a->engine)->vocab_size; i++) {
        worst = fmax(worst, fabs((double)x[i] - y[i]));
        largest = fmax(largest, fabs((double)y[i]));
    }
    return worst / largest;
}

struct collector {
    char text[16384];
    size_t bytes;
};

static inline enum ltn_status collect(void *ctx, int32_t id, const char *text, size_t bytes,
                                      struct ltn_error *err)
{
    struct collector *c = ctx;
    (void)id, (void)err;
    assert_true(c->bytes + bytes <= sizeof c->text);
    memcpy(c->text + c->bytes, text, bytes);
    c->bytes += bytes;
    return LTN_OK;
}

#endif
