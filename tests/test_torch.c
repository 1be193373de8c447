/* Torch archives: views of every kind, and pickles and archives that mean harm. */
#include "tests/files.h"
#include "tests/hf.h"
#include "tests/support.h"
#include "tools/source.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

static struct test_pickle pk;

static void expect_pickle(const char *error)
{
    static const float data[8];
    const struct test_storage storage = {"0", data, sizeof data};
    const char *path = in_folder("attack.bin");
    struct ltn_error err = {0};
    struct ltn_torch_bin bin;
    test_write_torch(path, pk.v, pk.n, &storage, 1, false);
    enum ltn_status status = ltn_torch_open(&bin, path, &err);
    if (error)
        check_error(status, &err, error);
    else
        test_check(status, &err, "open");
    ltn_torch_close(&bin);
}

/* A pickle of these opcodes after the protocol. */
#define OPS(text, error)                                                                                     \
    do {                                                                                                     \
        pk.n = 0;                                                                                            \
        pk_bytes(&pk, "\x80\x02" text, sizeof text + 1);                                                     \
        expect_pickle(error);                                                                                \
    } while (0)

static void pickles(void **state)
{
    static const int64_t eight[] = {8}, nine[] = {9}, square[] = {2, 4}, negative[] = {-1};
    static const int64_t by_columns[] = {1, 2}, far[] = {5, 1}, none[] = {0, 0},
                         huge[] = {INT64_C(1) << 62, 1};
    (void)state;
    OPS("}.", NULL);
    OPS("ccollections\nOrderedDict\n)R.", NULL);
    OPS("}}b.", NULL); /* _metadata */
    OPS("ccollections\nOrderedDict\n)R}(X\1\0\0\0aK\1ub.", NULL);
    OPS("", "ends inside an operation");
    OPS("}", "ends inside an operation");
    OPS("}.x", "something is left after its end");
    OPS("}}.", "something is left after its end");
    OPS("N.", "found None, expected a dictionary");
    OPS(".", "the stack holds too little");
    OPS("\x80\2}.", "names one later");
    pk.n = 0;
    pk_bytes(&pk, "}.", 2);
    expect_pickle("does not begin with a protocol");
    pk.n = 0;
    pk_bytes(&pk, "\x80\4}.", 4);
    expect_pickle("protocol 4, expected 2");

    /* everything that could run something, or that torch never writes */
    OPS("cos\nsystem\nX\2\0\0\0id\x85R.",
        "asks for \"os.system\", which no checkpoint of weights needs; refused");
    OPS("cposix\nsystem\n.", "asks for \"posix.system\"");
    OPS("cbuiltins\neval\n.", "asks for \"builtins.eval\"");
    OPS("ctorch\nload\n.", "asks for \"torch.load\"");
    OPS("ctorch\nLongStorage\n.", "asks for \"torch.LongStorage\"");
    OPS("ccollections\nOrderedDictX\n.", "asks for \"collections.OrderedDictX\"");
    OPS("ccollections\nOrderedDict", "asks for \"collections.OrderedDict\"");
    OPS("c", "asks for \"\"");
    OPS("i", "opcode 0x69");              /* INST */
    OPS("(oo", "opcode 0x6f");            /* OBJ */
    OPS("\x81", "opcode 0x81");           /* NEWOBJ */
    OPS("\x82\1", "opcode 0x82");         /* EXT1 */
    OPS("\x93", "opcode 0x93");           /* STACK_GLOBAL */
    OPS("\x95", "opcode 0x95");           /* FRAME */
    OPS("P0\n", "opcode 0x50");           /* PERSID */
    OPS("]", "opcode 0x5d");              /* EMPTY_LIST */
    OPS("I1\n", "opcode 0x49");           /* INT */
    OPS("\x8b\1\0\0\0\1", "opcode 0x8b"); /* LONG4 */
    OPS("0", "opcode 0x30");              /* POP */
    OPS("2", "opcode 0x32");              /* DUP */
    OPS("\xff", "opcode 0xff");
    OPS("ctorch\nFloatStorage\n)R.", "is not to be called so; refused");
    OPS("ccollections\nOrderedDict\nN\x85R.", "is not to be called so; refused");
    OPS("X\1\0\0\0a)R.", "found text, expected a global");
    OPS("ccollections\nOrderedDict\nNR.", "found None, expected a tuple");
    OPS("ctorch._utils\n_rebuild_tensor_v2\n)R.", "_rebuild_tensor_v2 with other arguments");

    /* the machine's limits */
    OPS("h\0.", "memo number 0 was never set");
    OPS("}q\1h\0.", "memo number 0 was never set");
    OPS("q\0.", "nothing to put into the memo");
    OPS("(q\0.", "nothing to put into the memo");
    OPS("}r\xff\xff\xff\xff.", "memo number 4294967295 in a pickle of 9 bytes");
    OPS("j\xff\xff\xff\xff.", "memo number 4294967295 was never set");
    OPS("t.", "no mark on the stack");
    OPS("u.", "no mark on the stack");
    OPS("(u.", "items without their dictionary");
    OPS("}(Nu.", "items without their dictionary");
    OPS("N(NNu.", "found None, expected a dictionary");
    OPS("NNNs.", "found None, expected a dictionary");
    OPS("NNs.", "items without their dictionary");
    OPS("}(Ns.", "a mark inside a dictionary");
    OPS("\x87.", "the stack holds too little");
    OPS("N(N\x87.", "a mark inside a tuple");
    OPS("}Nb.", "found None, expected a dictionary");
    OPS("N}b.", "attributes for something that is no dictionary");
    OPS("}b.", "attributes for something that is no dictionary");
    OPS("(b", "the stack holds too little");
    OPS("X\xff\xff\xff\xff", "a text of 4294967295 bytes, 0 are left");
    OPS("X\5\0\0\0abcd", "a text of 5 bytes, 4 are left");
    OPS("K", "ends inside an operation");
    OPS("J\0\0\0", "ends inside an operation");
    OPS("\x8a\x09", "an integer of 9 bytes");
    OPS("\x8a\x08\0", "ends inside an operation");
    OPS("}(NX\1\0\0\0au.", "a key that is no name");
    OPS("}(X\1\0\0\0\0Nu.", "a key that is no name");
    OPS("}(X\1\0\0\0aNu.", "\"a\" is None, expected a tensor");
    OPS("}(X\1\0\0\0a}u.", "\"a\" is a dictionary, expected a tensor");

    /* persistent ids */
    OPS("NQ.", "found None, expected a tuple");
    OPS(")Q.", "a persistent id that is not");
    OPS("(X\7\0\0\0storageNNNNtQ.", "a persistent id that is not");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\0\0\0\0K\x08tQ.",
        "found a storage, expected a dictionary");
    OPS("(X\7\0\0\0storagectorch._utils\n_rebuild_tensor_v2\nX\1\0\0\0000X\0\0\0\0K\x08tQ.",
        "a persistent id that is not");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0001X\0\0\0\0K\x08tQ.",
        "no entry \"archive/data/1\"");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\x0b\0\0\0../data.pklX\0\0\0\0K\x08tQ.", "no entry");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\2\0\0\0000\0X\0\0\0\0K\x08tQ.",
        "a storage key that is no key");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\0\0\0\0K\x09tQ.",
        "of 9 F32 elements has an entry of 32 bytes");
    OPS("(X\7\0\0\0storagectorch\nDoubleStorage\nX\1\0\0\0000X\0\0\0\0K\x05tQ.",
        "of 5 F64 elements has an entry of 32 bytes");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\0\0\0\0J\xff\xff\xff\xfftQ.",
        "of -1 F32 elements");
    OPS("(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\0\0\0\0\x8a\x08\0\0\0\0\0\0\0\x40tQ.",
        "of 4611686018427387904 F32");

    /* views */
    static const struct {
        int64_t numel, offset;
        int rank;
        const int64_t *shape, *strides;
        const char *error;
    } views[] = {
        {8, 0, 1, eight, NULL, NULL},
        {8, 0, 2, square, by_columns, NULL},
        {8, 8, 1, none, NULL, NULL}, /* nothing, at the end */
        {8, 7, 0, NULL, NULL, NULL}, /* a scalar */
        {8, 0, 1, eight, none, NULL},
        {8, 8, 0, NULL, NULL, "reaches outside its storage of 8 elements"},
        {8, 9, 1, none, NULL, "reaches outside"},
        {8, -1, 1, none, NULL, "reaches outside"},
        {8, 0, 1, nine, NULL, "reaches outside"},
        {8, 1, 1, eight, NULL, "reaches outside"},
        {7, 0, 1, eight, NULL, "reaches outside its storage of 7 elements"},
        {8, 0, 2, square, far, "reaches outside"},
        {8, 0, 2, square, huge, "reaches outside"},
        {8, 0, 2, huge, huge, "reaches outside"},
        {8, 0, 2, huge, by_columns, "reaches outside"},
        {8, INT64_MAX, 1, eight, NULL, "reaches outside"},
        {8, 0, 1, negative, by_columns, "a size or stride that is not a number from 0 up"},
        {8, 7, 1, eight, negative, "a size or stride that is not a number from 0 up"},
    };
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) {
        pk_begin(&pk);
        pk_tensor(&pk, "a", "FloatStorage", "0", views[i].numel, views[i].offset, views[i].rank,
                  views[i].shape, views[i].strides);
        pk_end(&pk);
        expect_pickle(views[i].error);
    }
    static const int64_t nine_ones[] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
    pk_begin(&pk);
    pk_tensor(&pk, "a", "FloatStorage", "0", 8, 0, 9, nine_ones, NULL);
    pk_end(&pk);
    expect_pickle("at most 8 are allowed");
}

/* Random damage to real pickles and archives, with a fixed seed: an error or tensors that can be read. */
static void pickles_fuzzed(void **state)
{
    enum { ROUNDS = 6000 };
    static const int64_t shape[] = {2, 4}, strides[] = {1, 2};
    static const float data[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    const struct test_storage storage = {"0", data, sizeof data};
    struct test_rng rng = {99};
    struct ltn_error err = {0};
    const char *path = in_folder("fuzz.bin"), *dir = new_dir();
    size_t opened = 0;
    char command[1024];
    (void)state;
    mkdir(dir, 0755);
    snprintf(command, sizeof command, "%s/pytorch_model.bin", dir);
    for (int round = 0; round < ROUNDS; round++) {
        pk_begin(&pk);
        pk_tensor(&pk, "a", "FloatStorage", "0", 8, 0, 2, shape, NULL);
        pk_tensor(&pk, "b", "HalfStorage", "0", 16, 3, 2, shape, strides);
        pk_end(&pk);
        bool whole_file = round % 2;
        for (int k = test_below(&rng, 3); !whole_file && k >= 0; k--) {
            size_t at = (size_t)test_below(&rng, (int)pk.n);
            if (test_below(&rng, 2))
                pk.v[at] = (uint8_t)test_random(&rng);
            else if (test_below(&rng, 2))
                pk.v[at] = pk.v[test_below(&rng, (int)pk.n)];
            else
                memmove(pk.v + at, pk.v + at + 1, --pk.n - at);
        }
        test_write_torch(path, pk.v, pk.n, &storage, 1, false);
        FILE *f = fopen(path, "rb");
        static uint8_t bytes[1 << 16];
        assert_non_null(f);
        size_t n = fread(bytes, 1, sizeof bytes, f);
        fclose(f);
        for (int k = test_below(&rng, 3); whole_file && k >= 0; k--)
            bytes[test_below(&rng, (int)n)] = (uint8_t)test_random(&rng);
        if (whole_file && test_below(&rng, 8) == 0)
            n = (size_t)test_below(&rng, (int)n);
        write_file(command, bytes, n);
        struct ltn_source source;
        enum ltn_status status = ltn_source_open(&source, dir, &err);
        if (status != LTN_OK) {
            check_error(status, &err, "");
            continue;
        }
        opened++;
        for (size_t i = 0; i < source.n_tensors; i++) {
            struct ltn_source_reader *reader;
            uint64_t count = 1;
            for (int32_t d = 0; d < source.tensors[i].rank; d++)
                count *= (uint64_t)source.tensors[i].shape[d];
            uint8_t *out = malloc(count * 8 + 1);
            if (ltn_source_reader_open(&reader, &source, &source.tensors[i], &err) == LTN_OK) {
                if (count < 1 << 20)
                    ltn_source_read(reader, out, count, &err);
                ltn_source_reader_close(reader);
            }
            free(out);
        }
        ltn_source_close(&source);
    }
    assert_true(opened > 0 && opened < ROUNDS);
}

/* Shared storages, offsets and strides give the values that indexing by hand gives. */
static void torch_views(void **state)
{
    static float base[60];
    static uint16_t halves[16];
    static const int64_t shape[] = {3, 4}, transposed[] = {1, 3}, rows[] = {10, 2}, repeated[] = {0, 1};
    static const int64_t cube[] = {2, 3, 4}, cube_strides[] = {4, 8, 1}, sixteen[] = {16}, ones[] = {1, 4, 1};
    static const int64_t odd_ones[] = {77, 1, 99};
    const struct test_storage storages[] = {{"0", base, sizeof base}, {"key1", halves, sizeof halves}};
    static const struct {
        const char *name;
        int64_t offset;
        int rank;
        const int64_t *shape, *strides;
    } views[] = {
        {"plain", 0, 2, shape, NULL},
        {"offset", 48, 2, shape, NULL},
        {"transposed", 5, 2, shape, transposed},
        {"rows", 1, 2, shape, rows},
        {"repeated", 9, 2, shape, repeated},
        {"cube", 2, 3, cube, cube_strides},
        {"ones", 3, 3, ones, odd_ones},
    };
    enum { N = sizeof views / sizeof *views };
    struct ltn_error err = {0};
    struct ltn_source source;
    (void)state;
    for (int i = 0; i < 60; i++)
        base[i] = (float)i * 1.25f;
    for (int i = 0; i < 16; i++)
        halves[i] = (uint16_t)(0x3c00 + i);
    const char *dir = new_dir();
    char path[600];
    mkdir(dir, 0755);
    snprintf(path, sizeof path, "%s/pytorch_model.bin", dir);
    pk_begin(&pk);
    for (int i = 0; i < N; i++)
        pk_tensor(&pk, views[i].name, "FloatStorage", "0", 60, views[i].offset, views[i].rank, views[i].shape,
                  views[i].strides);
    pk_tensor(&pk, "half", "HalfStorage", "key1", 16, 0, 1, sixteen, NULL);
    pk_end(&pk);
    test_write_torch(path, pk.v, pk.n, storages, 2, false);
    CHECK(ltn_source_open(&source, dir, &err));
    assert_int_equal(source.n_tensors, N + 1);
    assert_int_equal(ltn_source_find(&source, "half")->dtype, LTN_ST_F16);
    for (int i = 0; i < N; i++) {
        const struct ltn_source_tensor *t = ltn_source_find(&source, views[i].name);
        struct ltn_source_reader *reader;
        float out[24];
        int64_t n = 1, stride[3] = {0}, at[3] = {0};
        assert_non_null(t);
        for (int d = views[i].rank - 1; d >= 0; d--) {
            stride[d] = views[i].strides ? views[i].strides[d] : n;
            n *= views[i].shape[d];
        }
        CHECK(ltn_source_reader_open(&reader, &source, t, &err));
        CHECK(ltn_source_read(reader, out, 5 < n ? 5 : (size_t)n, &err)); /* in two pieces */
        if (n > 5)
            CHECK(ltn_source_read(reader, out + 5, (size_t)n - 5, &err));
        check_error(ltn_source_read(reader, out, 1, &err), &err, "has only");
        ltn_source_reader_close(reader);
        for (int64_t k = 0; k < n; k++) {
            int64_t rest = k, place = views[i].offset;
            for (int d = views[i].rank - 1; d >= 0; d--) {
                at[d] = rest % views[i].shape[d];
                rest /= views[i].shape[d];
                place += at[d] * stride[d];
            }
            assert_true(out[k] == base[place]);
        }
    }
    assert_true(ltn_source_same(&source.tensors[0], &source.tensors[0]));
    assert_false(ltn_source_same(ltn_source_find(&source, "plain"), ltn_source_find(&source, "offset")));
    ltn_source_close(&source);

    test_write_torch(path, pk.v, pk.n, storages, 2, true);
    check_error(ltn_source_open(&source, dir, &err), &err, "compressed or encrypted, expected stored");
    test_write_torch(path, pk.v, pk.n, storages, 1, false);
    check_error(ltn_source_open(&source, dir, &err), &err, "no entry \"archive/data/key1\"");

    /* a flipped bit of a storage does not get past its CRC */
    test_write_torch(path, pk.v, pk.n, storages, 2, false);
    FILE *f = fopen(path, "r+b");
    static uint8_t bytes[1 << 16];
    assert_non_null(f);
    size_t n = fread(bytes, 1, sizeof bytes, f), found = 0;
    for (size_t i = 0; i + sizeof halves <= n; i++)
        if (memcmp(bytes + i, halves, sizeof halves) == 0)
            found = i;
    assert_true(found > 0);
    fseek(f, (long)found + 3, SEEK_SET);
    fputc(bytes[found + 3] ^ 1, f);
    fclose(f);
    struct ltn_source_reader *reader;
    uint16_t out[16];
    CHECK(ltn_source_open(&source, dir, &err));
    CHECK(ltn_source_reader_open(&reader, &source, ltn_source_find(&source, "half"), &err));
    check_error(ltn_source_read(reader, out, 16, &err), &err, "tensor \"half\" is damaged");
    ltn_source_reader_close(reader);
    ltn_source_close(&source);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pickles),
        cmocka_unit_test(pickles_fuzzed),
        cmocka_unit_test(torch_views),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
