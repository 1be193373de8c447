/* JSON and safetensors files: what is accepted, what is refused and how, what the writer leaves behind. */
#include "model/json.h"
#include "model/safetensors.h"
#include "tests/files.h"
#include "tests/support.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

/* Files in the scratch folder whose name begins with `prefix`. */
static int count_files(const char *prefix)
{
    char command[1024];
    snprintf(command, sizeof command, "ls -a %s | grep -c '^%s'", test_folder(), prefix);
    FILE *f = popen(command, "r");
    int n = -1;
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%d", &n), 1);
    pclose(f);
    return n;
}

/* ---- JSON ---- */

static enum ltn_status parse(const char *text, bool integers_only, struct ltn_error *err)
{
    cJSON *tree;
    size_t n = strlen(text);
    char *exact = malloc(n ? n : 1); /* no byte behind the end, so that a sanitizer sees a read there */
    assert_non_null(exact);
    memcpy(exact, text, n);
    enum ltn_status status = ltn_json_parse(&tree, exact, n, "text", 4, integers_only, err);
    assert_true((status == LTN_OK) == (tree != NULL));
    cJSON_Delete(tree);
    free(exact);
    return status;
}

static void json_good(void **state)
{
    static const char *const good[] = {
        "{}",
        "[]",
        " [ ] ",
        "0",
        "-1",
        "9007199254740992",
        "\"\"",
        "true",
        "false",
        "null",
        "[[[[]]]]",
        "{\"a\":[1,2],\"A\":\"\\u00e9\\ud83d\\ude00\\n\\\\\\/\\\"\"}",
        "\"\xc3\xa9 \xf0\x9f\x98\x80\"\n\t\r ",
    };
    static const char *const good_floats[] = {
        "1.5", "-0", "1e3", "1E-3", "0.5e+10", "1.0", "1000000000000000019884624838656"};
    struct ltn_error err = {0};
    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        CHECK(parse(good[i], true, &err));
    for (size_t i = 0; i < sizeof good_floats / sizeof *good_floats; i++)
        CHECK(parse(good_floats[i], false, &err));
}

static void json_bad(void **state)
{
    static const struct {
        const char *text, *error;
    } bad[] = {
        {"", "ends where a value is expected"},
        {"   ", "ends where a value is expected"},
        {"{", "expected a key"},
        {"[1,]", "expected a value"},
        {"[1 2]", "expected ','"},
        {"{\"a\":1,}", "expected a key"},
        {"{\"a\" 1}", "expected ':'"},
        {"{1:1}", "expected a key"},
        {"{} x", "text after the end"},
        {"{}{}", "text after the end"},
        {"007", "leading zero"},
        {"+1", "expected a value"},
        {"--1", "expected a value"},
        {"-", "expected a value"},
        {"-0", "negative zero"},
        {"1.0", "without fraction"},
        {"1e3", "without fraction"},
        {"9007199254740993", "beyond 2^53"},
        {"-9007199254740993", "beyond 2^53"},
        {"99999999999999999999999999999999999999", "beyond 2^53"},
        {"0x10", "text after the end"},
        {"NaN", "expected a value"},
        {"nul", "expected a value"},
        {"'a'", "expected a value"},
        {"\"a", "ends inside a string"},
        {"\"a\\", "unknown escape"},
        {"\"\\x\"", "unknown escape"},
        {"\"\\u12\"", "hexadecimal"},
        {"\"\\u0000\"", "not all zero"},
        {"\"\\ud800\"", "high surrogate"},
        {"\"\\ud800\\u0041\"", "high surrogate"},
        {"\"\\udc00\"", "low surrogate"},
        {"\"\n\"", "control character"},
        {"\"\x80\"", "UTF-8"},
        {"\"\xc0\xaf\"", "UTF-8"},
        {"\"\xe0\x80\xaf\"", "UTF-8"},
        {"\"\xed\xa0\x80\"", "UTF-8"},
        {"\"\xf4\x90\x80\x80\"", "UTF-8"},
        {"\"\xf0\x9f\x98", "UTF-8"},
        {"\xef\xbb\xbf{}", "expected a value"},
        {"[[[[[]]]]]", "nested more than 4 deep"},
        {"{\"a\":1,\"b\":2,\"a\":3}", "\"a\" stands twice"},
        {"[{\"a\":1,\"\\u0061\":3}]", "\"a\" stands twice"},
    };
    struct ltn_error err = {0};
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        check_error(parse(bad[i].text, true, &err), &err, bad[i].error);
    check_error(parse("[1.]", false, &err), &err, "digits after the point");
    check_error(parse("[1e]", false, &err), &err, "digits in the exponent");
    check_error(parse("[01.5]", false, &err), &err, "leading zero");
    char digits[100];
    memset(digits, '1', sizeof digits);
    digits[70] = 0; /* cJSON would split it into two numbers */
    check_error(parse(digits, false, &err), &err, "60 characters");
}

static void json_access(void **state)
{
    static const char text[] =
        "{\"n\":12,\"big\":4294967296,\"half\":0.5,\"yes\":true,\"s\":\"x\",\"list\":[]}";
    static const char *const keys[] = {"n", "big", "half", "yes", "s", "list"};
    struct ltn_error err = {0};
    cJSON *tree;
    int64_t n = 0;
    bool yes = false;
    const char *s = NULL;
    const cJSON *list = NULL;
    (void)state;
    CHECK(ltn_json_parse(&tree, text, strlen(text), "text", 2, false, &err));
    CHECK(ltn_json_int(&n, tree, "n", 0, 12, "text", &err));
    assert_int_equal(n, 12);
    CHECK(ltn_json_int(&n, tree, "big", 0, LTN_JSON_MAX_INT, "text",
                       &err)); /* cJSON's valueint stops at 2^31 - 1 */
    assert_int_equal(n, INT64_C(4294967296));
    CHECK(ltn_json_bool(&yes, tree, "yes", "text", &err));
    assert_true(yes);
    CHECK(ltn_json_string(&s, tree, "s", "text", &err));
    assert_string_equal(s, "x");
    CHECK(ltn_json_array(&list, tree, "list", "text", &err));
    CHECK(ltn_json_keys(tree, keys, 6, "text", &err));
    check_error(ltn_json_keys(tree, keys, 5, "text", &err), &err, "unknown key \"list\"");
    check_error(ltn_json_int(&n, tree, "N", 0, 12, "text", &err), &err, "text: the key \"N\" is missing");
    check_error(ltn_json_int(&n, tree, "n", 0, 11, "text", &err), &err,
                "\"n\" is 12, expected an integer from 0 to 11");
    check_error(ltn_json_int(&n, tree, "half", 0, 11, "text", &err), &err,
                "\"half\" is 0.5, expected an integer");
    check_error(ltn_json_int(&n, tree, "s", 0, 11, "text", &err), &err,
                "\"s\" is a string, expected an integer");
    check_error(ltn_json_bool(&yes, tree, "n", "text", &err), &err,
                "\"n\" is a number, expected true or false");
    cJSON_Delete(tree);
}

/* ---- safetensors ---- */

static void st_round_trip(void **state)
{
    const struct ltn_st_tensor tensors[] = {
        {.name = "matrix", .dtype = LTN_ST_BF16, .rank = 2, .shape = {3, 5}, .bytes = 30},
        {.name = "scalar", .dtype = LTN_ST_F64, .rank = 0, .bytes = 8},
        {.name = "empty", .dtype = LTN_ST_F32, .rank = 2, .shape = {0, 7}, .bytes = 0},
        {.name = "Zeichen \"\xc3\xbc\" \\ /", .dtype = LTN_ST_U8, .rank = 1, .shape = {13}, .bytes = 13},
    };
    const char *metadata[] = {"note", "two\nlines", "checksum", "00000000000000000000000000000000"};
    const char *path = in_folder("round.safetensors");
    uint8_t data[51];
    struct ltn_error err = {0};
    struct ltn_st_writer *writer;
    struct ltn_st_file file;
    (void)state;
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(i * 37);
    umask(027);
    CHECK(ltn_st_create(&writer, path, tensors, 4, metadata, 2, &err));
    assert_int_equal(access(path, F_OK), -1); /* not yet under its name */
    CHECK(ltn_st_write(writer, data, 1, &err));
    CHECK(ltn_st_write(writer, data + 1, 0, &err));
    CHECK(ltn_st_write(writer, data + 1, 50, &err));
    CHECK(ltn_st_finish(writer, &err));
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0640); /* what the umask says */
    umask(022);

    CHECK(ltn_st_open(&file, path, &err));
    assert_int_equal(file.n_tensors, 4);
    assert_int_equal(file.data_start % 64, 0);
    assert_int_equal(file.size, file.data_start + 51);
    assert_memory_equal(file.map + file.data_start, data, 51);
    for (int i = 0; i < 4; i++) {
        const struct ltn_st_tensor *t = ltn_st_find(&file, tensors[i].name);
        assert_non_null(t);
        assert_int_equal(t->dtype, tensors[i].dtype);
        assert_int_equal(t->rank, tensors[i].rank);
        assert_memory_equal(t->shape, tensors[i].shape, sizeof t->shape);
        assert_int_equal(t->bytes, tensors[i].bytes);
    }
    assert_int_equal(ltn_st_find(&file, "scalar")->offset, file.data_start + 30);
    assert_null(ltn_st_find(&file, "Matrix"));
    assert_string_equal(ltn_st_metadata(&file, "note"), "two\nlines");
    /* made by Python's xxhash.xxh3_128_hexdigest(bytes(i * 37 % 256 for i in range(51))) */
    assert_string_equal(ltn_st_metadata(&file, "checksum"), "271d09ee1c61b2699a34ed483ce465c4");
    assert_null(ltn_st_metadata(&file, "Note"));
    ltn_st_close(&file);
    ltn_st_close(&file);
}

/* A file of this header, with n bytes of data, must be refused for this reason; NULL: must be accepted. */
static void try_header(const char *json, size_t n, const char *error)
{
    size_t bytes = strlen(json);
    uint8_t *file = calloc(1, 8 + bytes + n);
    struct ltn_error err = {0};
    struct ltn_st_file st;
    assert_non_null(file);
    for (int i = 0; i < 8; i++)
        file[i] = (uint8_t)((uint64_t)bytes >> 8 * i);
    memcpy(file + 8, json, bytes);
    write_file(in_folder("header"), file, 8 + bytes + n);
    free(file);
    enum ltn_status status = ltn_st_open(&st, in_folder("header"), &err);
    if (error) {
        check_error(status, &err, error);
        assert_null(st.map);
    } else {
        test_check(status, &err, json);
    }
    ltn_st_close(&st);
}

#define A(shape, offsets) "{\"a\":{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void st_headers(void **state)
{
    (void)state;
    try_header("{}", 0, NULL);
    try_header("{}   ", 0, NULL);
    try_header(A("[2]", "[0,8]") "}", 8, NULL);
    try_header(A("[]", "[0,4]") "}", 4, NULL);
    try_header(A("[0]", "[0,0]") "}", 0, NULL);
    try_header(A("[0,9007199254740992]", "[0,0]") "}", 0, NULL);
    try_header("{\"__metadata__\":{\"k\":\"v\"}}", 0, NULL);
    try_header(A("[1]", "[4,8]") ",\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 8, NULL);

    try_header("", 0, "does not begin with '{'");
    try_header(" {}", 0, "does not begin with '{'");
    try_header("[]", 0, "does not begin with '{'");
    try_header("{}", 1, "1 bytes of data, but the tensors end after 0");
    try_header(A("[2]", "[0,8]") "}", 7, "do not lie within");
    try_header(A("[2]", "[0,8]") "}", 9, "9 bytes of data, but the tensors end after 8");
    try_header(A("[2]", "[0,8]") ",\"a\":1}", 8, "stands twice");
    try_header(A("[2]", "[1,9]") "}", 9, "begins at data byte 1, but the one before it ends at 0");
    try_header(A("[2]", "[8,0]") "}", 8, "do not lie within");
    try_header(A("[2]", "[0,8,8]") "}", 8, "not two numbers");
    try_header(A("[2]", "[0]") "}", 8, "not two numbers");
    try_header(A("[2]", "[]") "}", 8, "not two numbers");
    try_header(A("[2]", "{}") "}", 8, "expected an array");
    try_header(A("[2]", "[0,\"8\"]") "}", 8, "is a string, expected an integer");
    try_header(A("[2]", "[0,8.0]") "}", 8, "without fraction");
    try_header(A("[2]", "[-8,0]") "}", 8, "expected an integer from 0");
    try_header(A("[2]", "[0,18446744073709551624]") "}", 8, "beyond 2^53");
    try_header(A("[3]", "[0,8]") "}", 8, "ask for another size");
    try_header(A("[-2]", "[0,8]") "}", 8, "expected an integer from 0");
    try_header(A("[2,\"1\"]", "[0,8]") "}", 8, "is a string");
    try_header(A("2", "[0,8]") "}", 8, "expected an array");
    try_header(A("[4294967296,4294967296]", "[0,0]") "}", 0, "ask for another size");  /* 2^66 wraps to 0 */
    try_header(A("[9007199254740992,512,2]", "[0,0]") "}", 0, "ask for another size"); /* 2^65 */
    try_header(A("[4611686018427387904]", "[0,0]") "}", 0, "beyond 2^53");
    try_header(A("[1,1,1,1,1,1,1,2]", "[0,8]") "}", 8, NULL);
    try_header(A("[1,1,1,1,1,1,1,1,2]", "[0,8]") "}", 8, "more than 8 dimensions");
    try_header("{\"a\":{\"dtype\":\"f32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8,
               "unknown dtype \"f32\"");
    try_header("{\"a\":{\"dtype\":\"F4\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "unknown dtype \"F4\"");
    try_header("{\"a\":{\"dtype\":7,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "expected a string");
    try_header("{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "the key \"dtype\" is missing");
    try_header("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, "the key \"shape\" is missing");
    try_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "the key \"data_offsets\" is missing");
    try_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"x\":1}}", 8,
               "unknown key \"x\"");
    try_header("{\"a\":[]}", 0, "expected an object");
    try_header("{\"__metadata__\":[]}", 0, "__metadata__ is not an object");
    try_header("{\"__metadata__\":{\"k\":1}}", 0, "metadata \"k\" is not a string");
    try_header("{\"__metadata__\":{\"k\":\"\",\"k\":\"\"}}", 0, "stands twice");
    try_header("{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{}}}}}}}}}", 0,
               "nested more than 8 deep");
    /* two that overlap; a gap between two */
    try_header(A("[2]", "[0,8]") ",\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8,
               "begins at data byte 4");
    try_header(A("[1]", "[0,4]") ",\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}", 12,
               "begins at data byte 8");
    try_header(A("[1]", "[0,4]") ",\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
               "begins at data byte 0");
}

static void st_not_a_file(void **state)
{
    struct ltn_error err = {0};
    struct ltn_st_file file;
    (void)state;
    check_error(ltn_st_open(&file, in_folder("missing"), &err), &err, "missing: cannot open: No such file");
    check_error(ltn_st_open(&file, test_folder(), &err), &err, "not a regular file");
    check_error(ltn_st_open(&file, "/dev/null", &err), &err, "not a regular file");
    assert_int_equal(mkfifo(in_folder("fifo"), 0600), 0);
    check_error(ltn_st_open(&file, in_folder("fifo"), &err), &err, "not a regular file");
    write_file(in_folder("empty"), "", 0);
    check_error(ltn_st_open(&file, in_folder("empty"), &err), &err, "0 bytes");
    write_file(in_folder("short"), "\2\0\0\0\0\0\0", 7);
    check_error(ltn_st_open(&file, in_folder("short"), &err), &err, "7 bytes");
    for (int bit = 0; bit < 64; bit++) { /* a header length of every size */
        char bytes[10] = {0};
        bytes[bit / 8] = (char)(1 << bit % 8);
        bytes[8] = '{';
        bytes[9] = '}';
        write_file(in_folder("length"), bytes, 10);
        if (bit == 1)
            CHECK(ltn_st_open(&file, in_folder("length"), &err));
        else
            check_error(ltn_st_open(&file, in_folder("length"), &err), &err, "length: ");
        ltn_st_close(&file);
    }
    assert_int_equal(chmod(in_folder("length"), 0), 0);
    if (geteuid() != 0)
        check_error(ltn_st_open(&file, in_folder("length"), &err), &err, "Permission denied");
    /* a name with a line break and an escape sequence still gives one line */
    check_error(ltn_st_open(&file, "a\nb\033[2J", &err), &err, "a?b?[2J: cannot open");
}

static void st_writer_refuses(void **state)
{
    const struct ltn_st_tensor one = {.name = "a", .dtype = LTN_ST_F32, .rank = 1, .shape = {2}, .bytes = 8};
    const struct ltn_st_tensor twice[] = {one, one};
    struct ltn_st_tensor wrong = one;
    const char *bad_utf8[] = {"k", "\xff"};
    const char *path = in_folder("kept");
    struct ltn_error err = {0};
    struct ltn_st_writer *writer;
    (void)state;
    write_file(path, "old", 3);
    check_error(ltn_st_create(&writer, path, twice, 2, NULL, 0, &err), &err, "stands twice");
    assert_null(writer);
    wrong.bytes = 4;
    check_error(ltn_st_create(&writer, path, &wrong, 1, NULL, 0, &err), &err, "another size");
    check_error(ltn_st_create(&writer, path, &one, 1, bad_utf8, 1, &err), &err, "UTF-8");
    check_error(ltn_st_create(&writer, test_folder(), &one, 1, NULL, 0, &err), &err, "not a regular file");
    check_error(ltn_st_create(&writer, "/dev/null", &one, 1, NULL, 0, &err), &err, "not a regular file");
    check_error(ltn_st_create(&writer, in_folder("no/such"), &one, 1, NULL, 0, &err), &err, "cannot create");
    size_t long_text = 1 << 20;
    char *text = malloc(long_text + 1);
    assert_non_null(text);
    memset(text, 'x', long_text);
    text[long_text] = 0;
    const char *large[] = {"k", text};
    check_error(ltn_st_create(&writer, path, &one, 1, large, 1, &err), &err, "at most 1048576");
    free(text);

    CHECK(ltn_st_create(&writer, path, &one, 1, NULL, 0, &err));
    check_error(ltn_st_write(writer, "123456789", 9, &err), &err, "more data than its header says");
    ltn_st_abandon(writer);
    CHECK(ltn_st_create(&writer, path, &one, 1, NULL, 0, &err));
    CHECK(ltn_st_write(writer, "1234567", 7, &err));
    check_error(ltn_st_finish(writer, &err), &err, "7 bytes of data came, the header says 8");
    ltn_st_abandon(NULL);

    size_t bytes;
    uint8_t *kept = read_file(path, &bytes);
    assert_int_equal(bytes, 3);
    assert_memory_equal(kept, "old", 3);
    free(kept);
    assert_int_equal(count_files("kept"), 1); /* no temporary file stayed */
    /* two writers to one name do not meet: the last to finish wins */
    struct ltn_st_writer *second;
    CHECK(ltn_st_create(&writer, path, &one, 1, NULL, 0, &err));
    CHECK(ltn_st_create(&second, path, &one, 1, NULL, 0, &err));
    CHECK(ltn_st_write(writer, "11111111", 8, &err));
    CHECK(ltn_st_write(second, "22222222", 8, &err));
    CHECK(ltn_st_finish(second, &err));
    CHECK(ltn_st_finish(writer, &err));
    kept = read_file(path, &bytes);
    assert_memory_equal(kept + bytes - 8, "11111111", 8);
    free(kept);
    assert_int_equal(count_files("kept"), 1);
}

/* No room: the limit on a file's size stands for the full disk. */
static void st_no_room(void **state)
{
    const struct ltn_st_tensor one = {
        .name = "a", .dtype = LTN_ST_U8, .rank = 1, .shape = {100000}, .bytes = 100000};
    const char *path = in_folder("full");
    struct rlimit old, limit;
    struct ltn_error err = {0};
    struct ltn_st_writer *writer;
    static uint8_t data[100000];
    (void)state;
    write_file(path, "old", 3);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    signal(SIGXFSZ, SIG_IGN);
    limit = (struct rlimit){.rlim_cur = 50000, .rlim_max = old.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    enum ltn_status reserved = ltn_st_create(&writer, path, &one, 1, NULL, 0, &err);
    struct ltn_error reserve_error = err;
    setrlimit(RLIMIT_FSIZE, &old);
    check_error(reserved, &reserve_error, "cannot reserve");

    /* and where the room goes away later */
    CHECK(ltn_st_create(&writer, path, &one, 1, NULL, 0, &err));
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    enum ltn_status written = ltn_st_write(writer, data, sizeof data, &err);
    setrlimit(RLIMIT_FSIZE, &old);
    signal(SIGXFSZ, SIG_DFL);
    check_error(written, &err, "full: cannot write: File too large");
    ltn_st_abandon(writer);
    size_t bytes;
    free(read_file(path, &bytes));
    assert_int_equal(bytes, 3);
    assert_int_equal(count_files("full"), 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(json_good),         cmocka_unit_test(json_bad),   cmocka_unit_test(json_access),
        cmocka_unit_test(st_round_trip),     cmocka_unit_test(st_headers), cmocka_unit_test(st_not_a_file),
        cmocka_unit_test(st_writer_refuses), cmocka_unit_test(st_no_room),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
