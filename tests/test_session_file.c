/* Session files, the prefix cache and endless input, through their C interfaces. */
#include <setjmp.h>
#include <stdarg.h>

#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

#include <cmocka.h>

#include "src/ingest.h"
#include "src/prefix_cache.h"
#include "src/session_file.h"
#include "tests/support.h"
#include "tests/text_model.h"

#define CHECK(call) check((call), &err, #call)

static void check(enum ltn_status status, const struct ltn_error *err, const char *what)
{
    if (status != LTN_OK)
        fail_msg("%s: %s", what, err->text);
}

static char text_model[128], token_model[128], tnl3_model[128], file[128];

static void write_models(void)
{
    struct ltn_config tnl3 = {.vocab_size = 77,
                              .embed_dim = 96,
                              .hidden_dim = 96,
                              .n_layers = 5,
                              .n_heads = 3,
                              .glu_dim = 80,
                              .gate_dim = 8,
                              .act = LTN_ACT_SILU,
                              .layer_norm = true,
                              .bias = true,
                              .bos_id = -1,
                              .eos_id = -1,
                              .pad_id = -1};
    tnl3.lrpe[0] = tnl3.lrpe[3] = 1;
    snprintf(text_model, sizeof text_model, "%s/text.ltn", test_folder());
    snprintf(token_model, sizeof token_model, "%s/token.ltn", test_folder());
    snprintf(tnl3_model, sizeof tnl3_model, "%s/tnl3.ltn", test_folder());
    snprintf(file, sizeof file, "%s/session", test_folder());
    test_write_text_model(text_model, 1, 2);
    test_write_token_model(token_model, -1, -1);
    test_write_model(tnl3, LTN_F32, 9, tnl3_model);
}

static struct ltn_engine *open_engine(const char *path)
{
    const struct ltn_engine_options options = {.device = "cpu", .n_threads = 1};
    struct ltn_engine *engine;
    struct ltn_error err;
    CHECK(ltn_engine_open(&engine, path, &options, &err));
    return engine;
}

static struct ltn_session *open_session(const struct ltn_engine *engine)
{
    struct ltn_session *session;
    struct ltn_error err;
    CHECK(ltn_session_create(&session, engine, NULL, &err));
    return session;
}

static void random_ids(int32_t *ids, size_t n, int32_t vocab, uint64_t seed)
{
    struct test_rng rng = {seed};
    for (size_t i = 0; i < n; i++)
        ids[i] = test_below(&rng, vocab);
}

static uint8_t *read_whole(const char *path, size_t *bytes)
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

static void write_whole(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    assert_int_equal(fclose(f), 0);
}

static int files_in(const char *path, const char *part)
{
    DIR *dir = opendir(path);
    int n = 0;
    assert_non_null(dir);
    for (struct dirent *d; (d = readdir(dir)) != NULL;)
        n += strstr(d->d_name, part) != NULL;
    closedir(dir);
    return n;
}

static bool same_logits(struct ltn_session *a, struct ltn_session *b)
{
    const float *x, *y;
    struct ltn_error err;
    CHECK(ltn_session_logits(a, &x, &err));
    CHECK(ltn_session_logits(b, &y, &err));
    return memcmp(x, y, (size_t)ltn_engine_info(a->engine)->vocab_size * sizeof *x) == 0;
}

/* Largest difference of the logits, as a share of the largest logit. */
static double difference(struct ltn_session *a, struct ltn_session *b)
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

/* ---- resuming ------------------------------------------------------------------------------------------ */

/* A session that at random places is saved and loaded into a new one, exported and imported, forked, led
 * astray and brought back: to the bit it stays with one that just goes on, in its logits and in what it
 * draws. */
static void walk(const char *model, uint64_t seed)
{
    enum { STEPS = 150, MOST = 200 };
    struct ltn_engine *engine = open_engine(model);
    const size_t bytes = ltn_engine_info(engine)->session_bytes;
    struct ltn_session *plain = open_session(engine), *moved = open_session(engine);
    struct test_rng rng = {seed};
    struct ltn_error err;
    void *memory = malloc(bytes);

    assert_non_null(memory);
    ltn_session_seed(plain, seed);
    ltn_session_seed(moved, seed);
    for (int step = 0; step < STEPS; step++) {
        int32_t ids[MOST], a, b;
        struct ltn_session *other = open_session(engine);
        size_t n = 1 + (size_t)test_below(&rng, test_below(&rng, 2) ? MOST : 3);
        random_ids(ids, n, ltn_engine_info(engine)->vocab_size, test_random(&rng));
        CHECK(ltn_session_feed(other, ids, 1 + n / 2, &err)); /* nothing of this may stay */
        CHECK(ltn_session_feed(plain, ids, n, &err));
        CHECK(ltn_session_feed(moved, ids, n, &err));
        CHECK(ltn_session_sample(plain, &ltn_sampling_default, &a, &err));
        switch (test_below(&rng, 4)) {
        case 0:
            CHECK(ltn_session_save(moved, file, &err));
            CHECK(ltn_session_load(other, file, &err));
            break;
        case 1:
            CHECK(ltn_session_export(moved, memory, bytes, &err));
            CHECK(ltn_session_import(other, memory, bytes, &err));
            break;
        case 2:
            CHECK(ltn_session_copy(other, moved, &err));
            CHECK(ltn_session_feed(moved, ids, 1, &err));
            break;
        default: /* the same session, after going astray */
            CHECK(ltn_session_save(moved, file, &err));
            CHECK(ltn_session_feed(moved, ids, n, &err));
            CHECK(ltn_session_sample(moved, &ltn_sampling_default, &b, &err));
            CHECK(ltn_session_load(moved, file, &err));
            CHECK(ltn_session_copy(other, moved, &err));
        }
        ltn_session_free(moved);
        moved = other;
        assert_true(same_logits(plain, moved));
        CHECK(ltn_session_sample(moved, &ltn_sampling_default, &b, &err));
        assert_int_equal(a, b);
        assert_int_equal(ltn_session_position(plain), ltn_session_position(moved));
    }
    free(memory);
    ltn_session_free(plain);
    ltn_session_free(moved);
    ltn_engine_close(engine);
}

static void test_resumes_to_the_bit(void **state)
{
    (void)state;
    walk(token_model, 4);
    walk(tnl3_model, 5);
}

struct collector {
    char text[16384];
    size_t bytes;
};

static enum ltn_status collect(void *ctx, int32_t id, const char *text, size_t bytes, struct ltn_error *err)
{
    struct collector *c = ctx;
    (void)id, (void)err;
    assert_true(c->bytes + bytes <= sizeof c->text);
    memcpy(c->text + c->bytes, text, bytes);
    c->bytes += bytes;
    return LTN_OK;
}

static void generate(struct ltn_session *session, struct collector *c, int n)
{
    const struct ltn_generate_options options = {
        .max_tokens = n, .ignore_eos = true, .keep_open = true, .piece = collect, .ctx = c};
    struct ltn_error err;
    CHECK(ltn_generate(session, &options, NULL, &err));
}

/* Amid characters, too. */
static void test_resumed_text(void **state)
{
    enum { N = 800 };
    static struct collector one, two;
    struct ltn_engine *engine = open_engine(text_model);
    struct ltn_session *session = open_session(engine), *whole = open_session(engine);
    struct test_rng rng = {6};
    struct ltn_error err;
    (void)state;
    ltn_session_seed(session, 12);
    CHECK(ltn_session_feed_text(session, "and then", 8, &err));
    assert_int_equal(ltn_session_save(session, file, &err), LTN_ERR_INPUT); /* amid a text */
    CHECK(ltn_session_end_text(session, &err));
    CHECK(ltn_session_copy(whole, session, &err));
    generate(whole, &one, N);
    for (int done = 0; done < N;) {
        int n = 1 + test_below(&rng, 6);
        n = n < N - done ? n : N - done;
        generate(session, &two, n);
        done += n;
        CHECK(ltn_session_save(session, file, &err));
        ltn_session_free(session);
        session = open_session(engine);
        CHECK(ltn_session_load(session, file, &err));
    }
    assert_int_equal(one.bytes, two.bytes);
    assert_memory_equal(one.text, two.text, one.bytes);
    ltn_session_free(session);
    ltn_session_free(whole);
    ltn_engine_close(engine);
}

static void test_file_and_memory_are_one(void **state)
{
    struct ltn_engine *engine = open_engine(text_model);
    struct ltn_session *session = open_session(engine);
    size_t bytes = ltn_engine_info(engine)->session_bytes, found;
    uint8_t *memory = malloc(bytes);
    int32_t ids[100];
    struct ltn_session_file f;
    struct ltn_error err;
    (void)state;
    assert_non_null(memory);
    random_ids(ids, 100, 352, 2);
    for (int round = 0; round < 2; round++) { /* at position 0 and at 100 */
        CHECK(ltn_session_export(session, memory, bytes, &err));
        CHECK(ltn_session_save(session, file, &err));
        uint8_t *data = read_whole(file, &found);
        assert_int_equal(found, bytes);
        assert_memory_equal(data, memory, bytes);
        free(data);
        CHECK(ltn_session_load(session, file, &err));
        CHECK(ltn_session_file_open(&f, file, &err));
        assert_int_equal(f.position, 100 * round);
        assert_int_equal(f.n_layers, ltn_engine_info(engine)->n_layers);
        assert_int_equal(f.logits->offset - f.state->offset, ltn_engine_info(engine)->state_bytes);
        CHECK(ltn_session_file_verify(&f, &err));
        ltn_session_file_close(&f);
        CHECK(ltn_session_feed(session, ids, 100, &err));
    }
    free(memory);
    ltn_session_free(session);
    ltn_engine_close(engine);
}

/* ---- what is refused ----------------------------------------------------------------------------------- */

/* One bit changed anywhere, the file cut anywhere: refused, and the session is as it was. */
static void test_altered(void **state)
{
    struct ltn_engine *engine = open_engine(text_model);
    struct ltn_session *session = open_session(engine), *kept = open_session(engine);
    size_t bytes = ltn_engine_info(engine)->session_bytes, header;
    uint8_t *memory = malloc(bytes + 1);
    struct test_rng rng = {3};
    int32_t ids[100];
    struct ltn_error err;
    (void)state;
    assert_non_null(memory);
    random_ids(ids, 100, 352, 2);
    CHECK(ltn_session_feed(session, ids, 100, &err));
    CHECK(ltn_session_export(session, memory, bytes, &err));
    CHECK(ltn_session_feed(session, ids, 50, &err));
    CHECK(ltn_session_copy(kept, session, &err));

    header = 8 + memory[0] + 256u * memory[1];
    for (size_t at = 0; at < bytes; at += at < header ? 1 : 1 + (size_t)test_below(&rng, 9))
        for (int bit = at < header ? 0 : test_below(&rng, 8); bit < 8; bit += at < header ? 1 : 8) {
            memory[at] ^= (uint8_t)(1 << bit);
            if (ltn_session_import(session, memory, bytes, &err) != LTN_ERR_INPUT)
                fail_msg("bit %d of byte %zu changed: not refused", bit, at);
            assert_true(err.text[0] && !strchr(err.text, '\n'));
            memory[at] ^= (uint8_t)(1 << bit);
        }
    for (size_t n = 0; n < bytes; n += n < 16 || n > bytes - 16 ? 1 : 1 + (size_t)test_below(&rng, 300)) {
        write_whole(file, memory, n);
        assert_int_equal(ltn_session_load(session, file, &err), LTN_ERR_INPUT);
        assert_ptr_equal(strstr(err.text, file), err.text);
    }
    memory[bytes] = 0;
    write_whole(file, memory, bytes + 1);
    assert_int_equal(ltn_session_load(session, file, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_session_import(session, memory, bytes - 1, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_session_position(session), 150);
    assert_true(same_logits(session, kept));

    /* an id that the model has not, under a checksum that is right */
    struct ltn_session_file f;
    write_whole(file, memory, bytes);
    CHECK(ltn_session_file_open(&f, file, &err));
    size_t recent = f.recent->offset, checksum = 0;
    for (size_t i = 0; i + 32 < header; i++)
        if (memcmp(memory + i, f.checksum, 32) == 0)
            checksum = i;
    ltn_session_file_close(&f);
    memory[recent + 3] = 0x7f;
    XXH128_hash_t hash = XXH3_128bits(memory + header, bytes - header);
    char text[33];
    ltn_st_checksum_text(text, hash.high64, hash.low64);
    memcpy(memory + checksum, text, 32);
    assert_int_equal(ltn_session_import(session, memory, bytes, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "recent id 0: expected one from 0 to 359"));
    assert_true(same_logits(session, kept));
    free(memory);
    ltn_session_free(session);
    ltn_session_free(kept);
    ltn_engine_close(engine);
}

static void test_refused(void **state)
{
    struct ltn_engine *engine = open_engine(text_model), *other = open_engine(token_model);
    struct ltn_session *session = open_session(engine), *foreign = open_session(other);
    struct ltn_error err;
    char path[160];
    (void)state;
    CHECK(ltn_session_save(foreign, file, &err));
    assert_int_equal(ltn_session_load(session, file, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "a session of another model"));
    assert_int_equal(ltn_session_load(session, text_model, &err), LTN_ERR_INPUT);
    assert_non_null(strstr(err.text, "not a session file"));
    snprintf(path, sizeof path, "%s/none", test_folder());
    assert_int_equal(ltn_session_load(session, path, &err), LTN_ERR_IO);
    snprintf(path, sizeof path, "%s/no/such", test_folder());
    assert_int_equal(ltn_session_save(session, path, &err), LTN_ERR_IO);
    assert_int_equal(ltn_session_file_check(path, &err), LTN_ERR_IO);
    assert_int_equal(ltn_session_save(session, "/dev/null", &err), LTN_ERR_INPUT);
    snprintf(path, sizeof path, "%s/new", test_folder());
    CHECK(ltn_session_file_check(path, &err));
    assert_int_not_equal(access(path, F_OK), 0); /* asking leaves nothing */
    ltn_session_free(session);
    ltn_session_free(foreign);
    ltn_engine_close(engine);
    ltn_engine_close(other);
}

/* No room: the old file stays, and nothing else. */
static void test_full_disk(void **state)
{
    struct ltn_engine *engine = open_engine(text_model);
    struct ltn_session *session = open_session(engine);
    struct rlimit before, small;
    size_t bytes, found;
    struct ltn_error err;
    (void)state;
    CHECK(ltn_session_save(session, file, &err));
    uint8_t *old = read_whole(file, &bytes);
    CHECK(ltn_session_feed(session, (int32_t[]){5, 6}, 2, &err));
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before);
    small = before;
    small.rlim_cur = bytes / 2;
    setrlimit(RLIMIT_FSIZE, &small);
    enum ltn_status status = ltn_session_save(session, file, &err);
    setrlimit(RLIMIT_FSIZE, &before);
    assert_int_equal(status, LTN_ERR_IO);
    assert_ptr_equal(strstr(err.text, file), err.text);
    uint8_t *now = read_whole(file, &found);
    assert_int_equal(found, bytes);
    assert_memory_equal(now, old, bytes);
    assert_int_equal(files_in(test_folder(), ".tmp"), 0);
    free(old);
    free(now);
    ltn_session_free(session);
    ltn_engine_close(engine);
}

/* ---- killed while saving ------------------------------------------------------------------------------- */

static int32_t id_at(int64_t position)
{
    return (int32_t)(position * 2654435761u % 350);
}

/* Goes on from the file, one token and one save at a time, and reports each position once it is saved. */
static void save_for_ever(const struct ltn_engine *engine, int report)
{
    struct ltn_session *session = open_session(engine);
    struct ltn_error err;
    if (ltn_session_load(session, file, &err))
        _exit(1);
    for (;;) {
        int64_t position = ltn_session_position(session);
        int32_t id = id_at(position++);
        if (ltn_session_feed(session, &id, 1, &err) || ltn_session_save(session, file, &err) ||
            write(report, &position, sizeof position) != sizeof position)
            _exit(1);
    }
}

static void test_killed(void **state)
{
    enum { KILLS = 100 };
    struct ltn_engine *engine = open_engine(text_model);
    struct ltn_session *session = open_session(engine), *expected = open_session(engine);
    struct test_rng rng = {77};
    struct ltn_error err;
    int64_t reported = 0, saves = 0;
    int later = 0;
    (void)state;
    CHECK(ltn_session_save(session, file, &err));
    for (int i = 0; i < KILLS; i++) {
        int ends[2], status;
        assert_int_equal(pipe(ends), 0);
        pid_t child = fork();
        if (child == 0) {
            close(ends[0]);
            save_for_ever(engine, ends[1]);
        }
        close(ends[1]);
        usleep((useconds_t)test_below(&rng, 25000));
        kill(child, SIGKILL);
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status)); /* it did not fail by itself */
        for (int64_t position; read(ends[0], &position, sizeof position) == sizeof position; saves++)
            reported = position;
        close(ends[0]);

        CHECK(ltn_session_load(session, file, &err));
        assert_true(ltn_session_position(session) >= reported &&
                    ltn_session_position(session) <= reported + 1);
        later += ltn_session_position(session) > reported;
        reported = ltn_session_position(session);
        while (ltn_session_position(expected) < reported) {
            int32_t id = id_at(ltn_session_position(expected));
            const float *logits;
            CHECK(ltn_session_feed(expected, &id, 1, &err));
            CHECK(ltn_session_logits(expected, &logits, &err));
        }
        if (reported > 0)
            assert_true(same_logits(session, expected));
    }
    print_message("# %d kills, %lld saves, %d of them not reported yet; %d temporary files left\n", KILLS,
                  (long long)saves, later, files_in(test_folder(), ".tmp"));
    assert_true(saves > KILLS);
    ltn_session_free(session);
    ltn_session_free(expected);
    ltn_engine_close(engine);
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
    struct ltn_engine *engine = open_engine(token_model);
    struct ltn_session *session = open_session(engine), *fresh = open_session(engine);
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
    uint8_t *data = read_whole(path, &bytes);
    data[bytes / 2] ^= 1;
    write_whole(path, data, bytes);
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
    uint8_t *data = read_whole(stolen, &bytes);
    write_whole(path, data, bytes);
    free(data);
}

static void test_bad_entries(void **state)
{
    enum { N = 700 };
    void (*const harms[])(const char *) = {damage, cut, vanish};
    struct ltn_engine *engine = open_engine(token_model);
    struct ltn_session *session = open_session(engine), *fresh = open_session(engine);
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
    write_whole(path, "x", 1);
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
    struct ltn_engine *engine = open_engine(token_model);
    struct ltn_session *session = open_session(engine);
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
    struct ltn_engine *engine = open_engine(token_model);
    const uint64_t most = 5 * ltn_engine_info(engine)->session_bytes;
    pid_t children[PROCESSES];
    (void)state;
    new_cache();
    for (int p = 0; p < PROCESSES; p++) {
        children[p] = fork();
        if (children[p] != 0)
            continue;
        struct ltn_session *session = open_session(engine), *fresh = open_session(engine);
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
    write_whole(path, text, n);
    return text;
}

static void test_ingest(void **state)
{
    static struct asked a;
    struct ltn_engine *engine = open_engine(text_model);
    struct ltn_session *session = open_session(engine), *fresh = open_session(engine);
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
        cmocka_unit_test(test_resumes_to_the_bit),
        cmocka_unit_test(test_resumed_text),
        cmocka_unit_test(test_file_and_memory_are_one),
        cmocka_unit_test(test_altered),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_killed),
        cmocka_unit_test(test_prefix_cache),
        cmocka_unit_test(test_bad_entries),
        cmocka_unit_test(test_least_recently_used),
        cmocka_unit_test(test_several_processes),
        cmocka_unit_test(test_ingest),
    };
    write_models();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
