/* The prefix cache and endless input through their C interfaces. */
#include <setjmp.h>
#include <stdarg.h>

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "src/ingest.h"
#include "src/prefix_cache.h"
#include "tests/files.h"
#include "tests/sessions.h"
#include "tests/text_model.h"

static char text_model[128], token_model[128];

static void write_models(void)
{
    snprintf(text_model, sizeof text_model, "%s/text.ltn", test_folder());
    snprintf(token_model, sizeof token_model, "%s/token.ltn", test_folder());
    test_write_text_model(text_model, 1, 2);
    test_write_token_model(token_model, -1, -1);
}

/* ---- prefix cache -------------------------------------------------------------------------------------- */

static char cache[160];

static void new_cache(void)
{
    static int n;
    snprintf(cache, sizeof cache, "%s/cache%d", test_folder(), n++);
}

/* Reads a prompt through the cache; gives how much was resumed. */
static int64_t read_prompt(struct ltn_session *session, const int32_t *ids, size_t n, uint64_t max_bytes)
{
    struct ltn_prefix_cache *c;
    struct test_rng rng = {n + 1};
    struct ltn_error err;
    int64_t resumed = -1;
    CHECK(ltn_session_reset(session, &err));
    CHECK(ltn_prefix_open(&c, session, cache, max_bytes, &err));
    for (size_t at = 0; at < n;) {
        size_t piece = 1 + (size_t)test_below(&rng, 700);
        piece = piece < n - at ? piece : n - at;
        CHECK(ltn_prefix_feed(c, ids + at, piece, &err));
        at += piece;
    }
    CHECK(ltn_prefix_finish(c, &resumed, &err));
    if (ltn_prefix_warning(c))
        fail_msg("%s", ltn_prefix_warning(c));
    ltn_prefix_close(c);
    assert_int_equal(ltn_session_position(session), n);
    return resumed;
}

static void test_prefix_cache(void **state)
{
    enum { N = 3000, ROUNDS = 60 };
    static int32_t base[N], ids[N];
    static struct {
        size_t n;
        int32_t ids[N];
    } known[ROUNDS];
    struct ltn_engine *engine = open_engine(token_model, 1);
    struct ltn_session *session = open_session(engine, NULL), *fresh = open_session(engine, NULL);
    struct test_rng rng = {9};
    struct ltn_error err;
    (void)state;
    new_cache();
    random_ids(base, N, 360, 1);
    for (int round = 0; round < ROUNDS; round++) {
        size_t n = 1 + (size_t)test_below(&rng, N), same = (size_t)test_below(&rng, (int)n + 1);
        random_ids(ids, n, 360, 100 + (uint64_t)round);
        memcpy(ids, base, same * sizeof *ids); /* the beginning is one that others have, too */
        /* the longest that may be there: where an earlier prompt ended or passed a power of two */
        int64_t expected = 0;
        for (int k = 0; k < round; k++) {
            size_t common = 0, least = n < known[k].n ? n : known[k].n;
            while (common < least && ids[common] == known[k].ids[common])
                common++;
            for (size_t at = 256; at <= common; at *= 2)
                expected = expected > (int64_t)at ? expected : (int64_t)at;
            if (common == known[k].n && common >= LTN_PREFIX_LEAST)
                expected = expected > (int64_t)common ? expected : (int64_t)common;
        }
        assert_int_equal(read_prompt(session, ids, n, 1 << 30), expected);
        CHECK(ltn_session_reset(fresh, &err));
        CHECK(ltn_session_feed(fresh, ids, n, &err));
        assert_true(difference(session, fresh) <= 1e-5);
        known[round].n = n;
        memcpy(known[round].ids, ids, n * sizeof *ids);
    }
    ltn_session_free(session);
    ltn_session_free(fresh);
    ltn_engine_close(engine);
}

/* Calls fn on the path of every entry. */
static void each_entry(void (*fn)(const char *path))
{
    DIR *dir = opendir(cache);
    char path[512];
    assert_non_null(dir);
    for (struct dirent *d; (d = readdir(dir)) != NULL;)
        if (strstr(d->d_name, ".prefix")) {
            snprintf(path, sizeof path, "%s/%s", cache, d->d_name);
            fn(path);
        }
    closedir(dir);
}

static void damage(const char *path)
{
    size_t bytes;
    uint8_t *data = read_file(path, &bytes);
    data[bytes / 2] ^= 1;
    write_file(path, data, bytes);
    free(data);
}

static void cut(const char *path)
{
    assert_int_equal(truncate(path, 100), 0);
}

static void vanish(const char *path)
{
    unlink(path);
}

static char stolen[512];

/* Every entry becomes a copy of the one that came first: right in itself, but of other tokens. */
static void swap(const char *path)
{
    size_t bytes;
    if (!stolen[0]) {
        snprintf(stolen, sizeof stolen, "%s", path);
        return;
    }
    uint8_t *data = read_file(stolen, &bytes);
    write_file(path, data, bytes);
    free(data);
}

static void test_bad_entries(void **state)
{
    enum { N = 700 };
    void (*const harms[])(const char *) = {damage, cut, vanish};
    struct ltn_engine *engine = open_engine(token_model, 1);
    struct ltn_session *session = open_session(engine, NULL), *fresh = open_session(engine, NULL);
    int32_t ids[N];
    struct ltn_prefix_cache *c;
    struct ltn_error err;
    int64_t resumed;
    (void)state;
    random_ids(ids, N, 360, 31);
    CHECK(ltn_session_feed(fresh, ids, N, &err));
    for (size_t i = 0; i < sizeof harms / sizeof *harms; i++) {
        new_cache();
        assert_int_equal(read_prompt(session, ids, N, 1 << 30), 0);
        assert_int_equal(files_in(cache, ".prefix"), 3); /* at 256, 512, 700 */
        CHECK(ltn_session_reset(session, &err));
        CHECK(ltn_prefix_open(&c, session, cache, 1 << 30, &err));
        each_entry(harms[i]); /* after they were listed */
        CHECK(ltn_prefix_feed(c, ids, N, &err));
        CHECK(ltn_prefix_finish(c, &resumed, &err));
        ltn_prefix_close(c);
        assert_int_equal(resumed, 0);
        assert_true(difference(session, fresh) <= 1e-5);
        assert_int_equal(read_prompt(session, ids, N, 1 << 30), N); /* they are good again */
    }
    each_entry(swap);
    resumed = read_prompt(session, ids, N, 1 << 30);
    char count[32];
    snprintf(count, sizeof count, "-%d.prefix", (int)resumed);
    assert_true(resumed > 0 && strstr(stolen, count)); /* the one that is what its name says */
    assert_true(difference(session, fresh) <= 1e-5);
    /* what is none of the cache's is left alone */
    char path[200];
    snprintf(path, sizeof path, "%s/notes.txt", cache);
    write_file(path, "x", 1);
    uint64_t one = ltn_engine_info(engine)->session_bytes;
    assert_int_equal(ltn_prefix_open(&c, session, cache, one - 1, &err), LTN_ERR_INPUT);
    CHECK(ltn_session_reset(session, &err));
    assert_int_equal(ltn_prefix_open(&c, session, cache, one - 1, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "at least one entry"));
    ids[0] = 1;
    assert_int_equal(read_prompt(session, ids, N, one), 0);
    assert_int_equal(files_in(cache, ".prefix"), 1);
    assert_int_equal(files_in(cache, "notes.txt"), 1);
    ltn_session_free(session);
    ltn_session_free(fresh);
    ltn_engine_close(engine);
}

/* The entry unused for longest goes; resuming counts as use. */
static void test_least_recently_used(void **state)
{
    enum { N = 100 };
    struct ltn_engine *engine = open_engine(token_model, 1);
    struct ltn_session *session = open_session(engine, NULL);
    const uint64_t most = 3 * ltn_engine_info(engine)->session_bytes;
    int32_t ids[4][N];
    (void)state;
    new_cache();
    for (int i = 0; i < 4; i++)
        random_ids(ids[i], N, 360, 50 + (uint64_t)i);
    for (int i = 0; i < 3; i++, usleep(20000))
        assert_int_equal(read_prompt(session, ids[i], N, most), 0);
    assert_int_equal(read_prompt(session, ids[0], N, most), N);
    usleep(20000);
    assert_int_equal(read_prompt(session, ids[3], N, most), 0); /* in the place of number 1 */
    assert_int_equal(files_in(cache, ".prefix"), 3);
    assert_int_equal(read_prompt(session, ids[0], N, most), N);
    assert_int_equal(read_prompt(session, ids[2], N, most), N);
    assert_int_equal(read_prompt(session, ids[3], N, most), N);
    assert_int_equal(read_prompt(session, ids[1], N, most), 0);
    ltn_session_free(session);
    ltn_engine_close(engine);
}

/* Processes that fill, use and empty one folder at once. */
static void test_several_processes(void **state)
{
    enum { PROCESSES = 4, ROUNDS = 60, N = 600 };
    struct ltn_engine *engine = open_engine(token_model, 1);
    const uint64_t most = 5 * ltn_engine_info(engine)->session_bytes;
    pid_t children[PROCESSES];
    (void)state;
    new_cache();
    for (int p = 0; p < PROCESSES; p++) {
        children[p] = fork();
        if (children[p] != 0)
            continue;
        struct ltn_session *session = open_session(engine, NULL), *fresh = open_session(engine, NULL);
        struct test_rng rng = {40 + (uint64_t)p};
        struct ltn_error err;
        int32_t ids[N];
        for (int i = 0; i < ROUNDS; i++) {
            size_t n = 1 + (size_t)test_below(&rng, N);
            random_ids(ids, N, 360, (uint64_t)test_below(&rng, 4) + 1);
            read_prompt(session, ids, n, most);
            if (ltn_session_reset(fresh, &err) || ltn_session_feed(fresh, ids, n, &err) ||
                difference(session, fresh) > 1e-5)
                _exit(1);
        }
        _exit(0);
    }
    for (int p = 0; p < PROCESSES; p++) {
        int status;
        assert_int_equal(waitpid(children[p], &status, 0), children[p]);
        assert_int_equal(status, 0);
    }
    assert_true(files_in(cache, ".prefix") <= 5);
    assert_int_equal(files_in(cache, ".tmp"), 0);
    ltn_engine_close(engine);
}

/* ---- endless input ------------------------------------------------------------------------------------- */

static long resident_kib(void)
{
    long total, resident = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%ld %ld", &total, &resident), 2);
    fclose(f);
    return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

#ifdef __SANITIZE_ADDRESS__
enum { STREAM = 60000, EVERY = 7000 };
#else
enum { STREAM = 300000, EVERY = 20000 };
#endif

struct asked {
    int64_t positions[64]; /* of the stream, less the question */
    size_t n_question, n;
    struct collector answers[64];
    long early, late; /* KiB resident at the second and at the last */
};

static enum ltn_status answer(void *ctx, struct ltn_session *fork, struct ltn_error *err)
{
    struct asked *a = ctx;
    const struct ltn_generate_options options = {
        .max_tokens = 20, .ignore_eos = true, .piece = collect, .ctx = &a->answers[a->n]};
    assert_true(a->n < 64);
    a->positions[a->n++] = ltn_session_position(fork) - (int64_t)a->n_question;
    a->late = resident_kib();
    if (a->n == 2)
        a->early = a->late;
    return ltn_generate(fork, &options, NULL, err);
}

/* Some text of about so many tokens, to a file; words of many lengths, and characters of several bytes. */
static char *make_text(const char *path, size_t bytes)
{
    static const char *const words[] = {
        "the",   "other",     "thing",           " and", "so", "\n", "in", "42,", "ing.", "  ",
        "Error", "\xc3\xa9t", "\xf0\x9f\x98\x80"};
    struct test_rng rng = {15};
    char *text = malloc(bytes + 16);
    size_t n = 0;
    assert_non_null(text);
    while (n < bytes)
        n += (size_t)sprintf(text + n, "%s ", words[test_below(&rng, sizeof words / sizeof *words)]);
    write_file(path, text, n);
    return text;
}

static void test_ingest(void **state)
{
    static struct asked a;
    struct ltn_engine *engine = open_engine(text_model, 1);
    struct ltn_session *session = open_session(engine, NULL), *fresh = open_session(engine, NULL);
    static struct collector expected;
    const char *question = "and what was that?";
    char path[160];
    int32_t *ids, *asked;
    size_t n;
    struct ltn_error err;
    (void)state;
    snprintf(path, sizeof path, "%s/stream", test_folder());
    char *text = make_text(path, 2 * STREAM);
    CHECK(ltn_engine_tokenize(engine, question, strlen(question), &asked, &a.n_question, &err));
    CHECK(ltn_engine_tokenize(engine, text, strlen(text), &ids, &n, &err));
    int keep = dup(STDIN_FILENO), input = open(path, O_RDONLY);
    dup2(input, STDIN_FILENO);
    const struct ltn_ingest in = {.session = session,
                                  .engine = engine,
                                  .every_tokens = EVERY,
                                  .question = asked,
                                  .n_question = a.n_question,
                                  .answer = answer,
                                  .ctx = &a};
    ltn_session_seed(session, 3);
    CHECK(ltn_ingest(&in, &err));
    dup2(keep, STDIN_FILENO);
    close(input);
    close(keep);

    assert_int_equal(ltn_session_position(session), n);
    assert_true(n > STREAM);
    assert_int_equal(a.n, n / EVERY + (n % EVERY != 0));
    for (size_t i = 0; i < a.n; i++)
        assert_int_equal(a.positions[i], i + 1 < a.n ? (i + 1) * EVERY : n);
    print_message("# resident at %lld tokens %ld KiB, at %lld %ld KiB\n", (long long)a.positions[1], a.early,
                  (long long)a.positions[a.n - 1], a.late);
    assert_true(a.late - a.early <= 512);

    /* the stream is what the same text is in one piece; an answer is what a session of its own gives */
    CHECK(ltn_session_feed(fresh, ids, n, &err));
    double worst = difference(session, fresh);
    print_message("# logits after the stream: within %.2g of the largest\n", worst);
    assert_true(worst <= 1e-5);
    ltn_session_seed(fresh, 3);
    CHECK(ltn_session_copy(fresh, session, &err));
    CHECK(ltn_session_feed(fresh, asked, a.n_question, &err));
    const struct ltn_generate_options options = {
        .max_tokens = 20, .ignore_eos = true, .piece = collect, .ctx = &expected};
    CHECK(ltn_generate(fresh, &options, NULL, &err));
    assert_int_equal(a.answers[a.n - 1].bytes, expected.bytes);
    assert_memory_equal(a.answers[a.n - 1].text, expected.text, expected.bytes);
    free(text);
    free(ids);
    free(asked);
    ltn_session_free(session);
    ltn_session_free(fresh);
    ltn_engine_close(engine);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_prefix_cache),
        cmocka_unit_test(test_bad_entries),
        cmocka_unit_test(test_least_recently_used),
        cmocka_unit_test(test_several_processes),
        cmocka_unit_test(test_ingest),
    };
    write_models();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
