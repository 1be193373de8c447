/* Session files through their C interface. */
#include <setjmp.h>
#include <stdarg.h>

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>
#include <xxhash.h>

#include "src/session.h"
#include "src/session_file.h"
#include "tests/files.h"
#include "tests/sessions.h"
#include "tests/text_model.h"

static char text_model[128], token_model[128], tnl3_model[128], file[128];

static void write_models(void)
{
    snprintf(text_model, sizeof text_model, "%s/text.ltn", test_folder());
    snprintf(token_model, sizeof token_model, "%s/token.ltn", test_folder());
    snprintf(tnl3_model, sizeof tnl3_model, "%s/tnl3.ltn", test_folder());
    snprintf(file, sizeof file, "%s/session", test_folder());
    test_write_text_model(text_model, 1, 2);
    test_write_token_model(token_model, -1, -1);
    test_write_tnl3_model(tnl3_model, 5, LTN_F32);
}

/* ---- resuming ------------------------------------------------------------------------------------------ */

/* A session that at random places is saved and loaded into a new one, exported and imported, forked, led
 * astray and brought back: to the bit it stays with one that just goes on, in its logits and in what it
 * draws. */
static void walk(const char *model, uint64_t seed)
{
    enum { STEPS = 150, MOST = 200 };
    struct ltn_engine *engine = open_engine(model, 1);
    const size_t bytes = ltn_engine_info(engine)->session_bytes;
    struct ltn_session *plain = open_session(engine, NULL), *moved = open_session(engine, NULL);
    struct test_rng rng = {seed};
    struct ltn_error err;
    void *memory = malloc(bytes);

    assert_non_null(memory);
    ltn_session_seed(plain, seed);
    ltn_session_seed(moved, seed);
    for (int step = 0; step < STEPS; step++) {
        int32_t ids[MOST], a, b;
        struct ltn_session *other = open_session(engine, NULL);
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
    struct ltn_engine *engine = open_engine(text_model, 1);
    struct ltn_session *session = open_session(engine, NULL), *whole = open_session(engine, NULL);
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
        session = open_session(engine, NULL);
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
    struct ltn_engine *engine = open_engine(text_model, 1);
    struct ltn_session *session = open_session(engine, NULL);
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
        uint8_t *data = read_file(file, &found);
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
    struct ltn_engine *engine = open_engine(text_model, 1);
    struct ltn_session *session = open_session(engine, NULL), *kept = open_session(engine, NULL);
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
        write_file(file, memory, n);
        assert_int_equal(ltn_session_load(session, file, &err), LTN_ERR_INPUT);
        assert_ptr_equal(strstr(err.text, file), err.text);
    }
    memory[bytes] = 0;
    write_file(file, memory, bytes + 1);
    assert_int_equal(ltn_session_load(session, file, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_session_import(session, memory, bytes - 1, &err), LTN_ERR_INPUT);
    assert_int_equal(ltn_session_position(session), 150);
    assert_true(same_logits(session, kept));

    /* an id that the model has not, under a checksum that is right */
    struct ltn_session_file f;
    write_file(file, memory, bytes);
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
    struct ltn_engine *engine = open_engine(text_model, 1), *other = open_engine(token_model, 1);
    struct ltn_session *session = open_session(engine, NULL), *foreign = open_session(other, NULL);
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
    struct ltn_engine *engine = open_engine(text_model, 1);
    struct ltn_session *session = open_session(engine, NULL);
    struct rlimit before, small;
    size_t bytes, found;
    struct ltn_error err;
    (void)state;
    CHECK(ltn_session_save(session, file, &err));
    uint8_t *old = read_file(file, &bytes);
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
    uint8_t *now = read_file(file, &found);
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
    struct ltn_session *session = open_session(engine, NULL);
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
    struct ltn_engine *engine = open_engine(text_model, 1);
    struct ltn_session *session = open_session(engine, NULL), *expected = open_session(engine, NULL);
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
        int64_t position;
        if (i % 2) { /* every other time not before it has saved once, however slow this machine is */
            assert_int_equal(read(ends[0], &position, sizeof position), sizeof position);
            reported = position;
            saves++;
        }
        usleep((useconds_t)test_below(&rng, 25000));
        kill(child, SIGKILL);
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status)); /* it did not fail by itself */
        for (; read(ends[0], &position, sizeof position) == sizeof position; saves++)
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
    assert_true(saves >= KILLS / 2);
    ltn_session_free(session);
    ltn_session_free(expected);
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
    };
    write_models();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
