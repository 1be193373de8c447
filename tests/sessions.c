#include "tests/sessions.h"

#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "src/session.h"

struct ltn_engine *open_engine(const char *path, int n_threads)
{
    const struct ltn_engine_options options = {.device = "cpu", .n_threads = n_threads};
    struct ltn_engine *engine;
    struct ltn_error err;
    CHECK(ltn_engine_open(&engine, path, &options, &err));
    return engine;
}

struct ltn_session *open_session(const struct ltn_engine *engine, const struct ltn_session_options *options)
{
    struct ltn_session *session;
    struct ltn_error err;
    CHECK(ltn_session_create(&session, engine, options, &err));
    return session;
}

void random_ids(int32_t *ids, size_t n, int32_t vocab, uint64_t seed)
{
    struct test_rng rng = {seed};
    for (size_t i = 0; i < n; i++)
        ids[i] = test_below(&rng, vocab);
}

bool same_logits(struct ltn_session *a, struct ltn_session *b)
{
    const float *x, *y;
    struct ltn_error err;
    CHECK(ltn_session_logits(a, &x, &err));
    CHECK(ltn_session_logits(b, &y, &err));
    return memcmp(x, y, (size_t)ltn_engine_info(a->engine)->vocab_size * sizeof *x) == 0;
}

double difference(struct ltn_session *a, struct ltn_session *b)
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

enum ltn_status collect(void *ctx, int32_t id, const char *text, size_t bytes, struct ltn_error *err)
{
    struct collector *c = ctx;
    assert_true(c->bytes + bytes < sizeof c->text);
    memcpy(c->text + c->bytes, text, bytes);
    c->bytes += bytes;
    c->text[c->bytes] = 0;
    if (id >= 0) {
        assert_true(c->n < sizeof c->ids / sizeof *c->ids);
        c->ids[c->n++] = id;
    }
    return c->stop_after && c->n >= c->stop_after ? ltn_fail(err, LTN_ERR_STOPPED, "enough") : LTN_OK;
}

int files_in(const char *path, const char *part)
{
    DIR *dir = opendir(path);
    int n = 0;
    assert_non_null(dir);
    for (struct dirent *d; (d = readdir(dir)) != NULL;)
        n += strstr(d->d_name, part) != NULL;
    closedir(dir);
    return n;
}
