#include "tests/support.h"

#include "model/safetensors.h"

#include <ftw.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

void test_check(enum ltn_status status, const struct ltn_error *err, const char *what)
{
    if (status != LTN_OK)
        fail_msg("%s: %s", what, err->text);
}

uint64_t test_random(struct test_rng *rng)
{
    rng->s ^= rng->s >> 12;
    rng->s ^= rng->s << 25;
    rng->s ^= rng->s >> 27;
    return rng->s * 2685821657736338717u;
}

double test_uniform(struct test_rng *rng)
{
    return (double)(test_random(rng) >> 11) * 0x1p-53;
}

double test_normal(struct test_rng *rng)
{
    double radius = sqrt(-2 * log(1 - test_uniform(rng)));
    return radius * cos(6.283185307179586 * test_uniform(rng));
}

int test_below(struct test_rng *rng, int n)
{
    return (int)(test_random(rng) % (uint64_t)n);
}

static char folder[64];

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *at)
{
    (void)info, (void)type, (void)at;
    return remove(path);
}

static void remove_folder(void)
{
    nftw(folder, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

static void die(const char *what)
{
    fprintf(stderr, "test support: %s\n", what);
    exit(1);
}

const char *test_folder(void)
{
    if (!folder[0]) {
        strcpy(folder, "/tmp/ltn-test-XXXXXX");
        if (!mkdtemp(folder))
            die("no scratch folder under /tmp");
        atexit(remove_folder);
    }
    return folder;
}

static void store(uint8_t *at, double value, enum ltn_dtype dtype)
{
    float f = (float)value;
    uint16_t half = dtype == LTN_BF16 ? ltn_f32_to_bf16(f) : ltn_f32_to_f16(f);
    if (dtype == LTN_F32)
        memcpy(at, &f, 4);
    else
        memcpy(at, &half, 2);
}

/* One value of a tensor: matrices keep the size of what they multiply, norms are near 1, biases small. */
static double weight(const struct ltn_config *c, const struct ltn_tensor_spec *spec, int64_t i,
                     struct test_rng *rng)
{
    if (spec->slot == LTN_SLOT_THETA)
        return pow(10000, -2.0 * (double)i / c->embed_dim);
    if (spec->slot == LTN_SLOT_EMBED)
        return test_normal(rng) / (c->scale_embedding ? sqrt(c->embed_dim) : 1);
    if (spec->is_matrix)
        return test_normal(rng) / sqrt((double)spec->shape[1]);
    return spec->is_bias ? 0.2 * test_normal(rng) : 1 + 0.2 * test_normal(rng);
}

void test_write_model(struct ltn_config config, enum ltn_dtype dtype, uint64_t seed, const char *path)
{
    test_write_model_with(config, dtype, seed, NULL, 0, "", path);
}

void test_write_model_with(struct ltn_config config, enum ltn_dtype dtype, uint64_t seed,
                           const void *tokenizer, size_t tokenizer_bytes, const char *tokenizer_json,
                           const char *path)
{
    static const char *const names[] = {"f32", "bf16", "f16"};
    static const enum ltn_st_dtype types[] = {LTN_ST_F32, LTN_ST_BF16, LTN_ST_F16};
    struct ltn_error err = {0};
    struct ltn_tensor_spec *specs = NULL;
    size_t n = 0, placed = 0;
    struct test_rng rng = {seed};

    if (ltn_config_check(&config, &err) || ltn_config_tensors(&config, &specs, &n, &err))
        die(err.text);
    char *json = ltn_config_print(&config);
    const char *metadata[] = {"format",     "ltn",
                              "version",    "1",
                              "config",     json,
                              "dtype",      names[dtype],
                              "checksum",   "00000000000000000000000000000000",
                              "tokenizer",  tokenizer_json,
                              "provenance", "random weights"};
    struct ltn_st_tensor *tensors = calloc(n + 1, sizeof *tensors);
    size_t *order = calloc(n, sizeof *order);
    if (!json || !tensors || !order)
        die("out of memory");
    for (int odd = 0; odd < 2; odd++) /* first the tensors that keep the next one aligned */
        for (size_t i = 0; i < n; i++) {
            struct ltn_st_tensor t = {.name = specs[i].name, .dtype = types[dtype], .rank = specs[i].rank};
            t.bytes = ltn_dtype_size(dtype);
            for (int32_t d = 0; d < t.rank; d++) {
                t.shape[d] = specs[i].shape[d];
                t.bytes *= (uint64_t)t.shape[d];
            }
            if ((t.bytes % 64 != 0) == odd) {
                order[placed] = i;
                tensors[placed++] = t;
            }
        }
    if (tokenizer)
        tensors[n] = (struct ltn_st_tensor){.name = "tokenizer",
                                            .dtype = LTN_ST_U8,
                                            .rank = 1,
                                            .shape = {(int64_t)tokenizer_bytes},
                                            .bytes = tokenizer_bytes};
    struct ltn_st_writer *writer = NULL;
    if (ltn_st_create(&writer, path, tensors, n + (tokenizer != NULL), metadata,
                      sizeof metadata / sizeof *metadata / 2, &err))
        die(err.text);
    for (size_t k = 0; k < n; k++) {
        size_t size = ltn_dtype_size(dtype), count = tensors[k].bytes / size;
        uint8_t *data = malloc(tensors[k].bytes);
        if (!data)
            die("out of memory");
        for (size_t i = 0; i < count; i++)
            store(data + i * size, weight(&config, &specs[order[k]], (int64_t)i, &rng), dtype);
        if (ltn_st_write(writer, data, tensors[k].bytes, &err))
            die(err.text);
        free(data);
    }
    if (tokenizer && ltn_st_write(writer, tokenizer, tokenizer_bytes, &err))
        die(err.text);
    if (ltn_st_finish(writer, &err))
        die(err.text);
    free(order);
    free(tensors);
    free(json);
    free(specs);
}

int test_convert(const char *source, const char *out)
{
    const char *bin = getenv("LTN_BIN");
    char program[512];

    snprintf(program, sizeof program, "%s/tools/convert", bin ? bin : ".");
    pid_t child = fork();
    if (child == 0) {
        execl(program, program, source, out, (char *)NULL);
        fprintf(stderr, "cannot run %s\n", program);
        _exit(127);
    }
    int status = 1;
    if (child < 0 || waitpid(child, &status, 0) != child)
        return 1;
    return status;
}
