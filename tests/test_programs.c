/* The programs in a row, as people use them: convert a checkpoint, score its golden prompts, continue them.
 */
#include <setjmp.h>
#include <stdarg.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "model/safetensors.h"
#include "tests/support.h"

static const char *const cases[] = {
    "a1_tnl2_f32_plain",
    "a2_tnl2_bf16_h6_nolrpe_untied",
    "a3_tnl2_f16_bin_layernorm_bias",
    "a4_tnl2_f32_hidden_ne_embed_sharded",
    "a5_tnl3_bf16_bin_sharded",
    "a6_tnl2_f16_hd128",
    "a7_tnl2_f32_bin_h5_emptylist",
    "a8_tnl2_f32_h12_identity_ln",
};

enum { N_CASES = sizeof cases / sizeof *cases, NPY_HEADER = 128, N_GREEDY = 32 };

static bool find_case(char *path, size_t size, const char *name)
{
    const char *roots[] = {"tests/data/golden", getenv("LTN_GOLDEN")};
    for (int i = 0; i < 2; i++) {
        snprintf(path, size, "%s/%s/config.json", roots[i] ? roots[i] : "", name);
        if (roots[i] && access(path, R_OK) == 0) {
            *strrchr(path, '/') = 0;
            return true;
        }
    }
    return false;
}

/* Runs "$LTN_BIN/COMMAND" through the shell; it must succeed. */
static void shell(const char *format, ...)
{
    const char *bin = getenv("LTN_BIN");
    char command[2048];
    int n = snprintf(command, sizeof command, "%s/", bin ? bin : ".");
    va_list args;
    va_start(args, format);
    vsnprintf(command + n, sizeof command - (size_t)n, format, args);
    va_end(args);
    if (system(command) != 0)
        fail_msg("failed: %s", command);
}

static const void *golden(const struct ltn_st_file *g, int prompt, const char *key, int64_t shape[2])
{
    char name[64];
    snprintf(name, sizeof name, "p%d.%s", prompt, key);
    const struct ltn_st_tensor *t = ltn_st_find(g, name);
    if (!t)
        return NULL;
    shape[0] = t->shape[0];
    shape[1] = t->rank > 1 ? t->shape[1] : 1;
    return g->map + t->offset;
}

static void write_ids(const char *path, const uint8_t *ids, int64_t n)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    for (int64_t i = 0; i < n; i++) {
        int32_t id;
        memcpy(&id, ids + 4 * i, 4);
        fprintf(f, "%s%d", i == 0 ? "" : i % 20 == 0 ? "\n" : ",", id);
    }
    fclose(f);
}

static void compare_logits(const char *path, const uint8_t *expected, int64_t n, int64_t vocab)
{
    FILE *f = fopen(path, "rb");
    float *found = malloc((size_t)(n * vocab) * sizeof *found);
    float e;
    double largest = 0;

    assert_non_null(f);
    assert_non_null(found);
    assert_int_equal(fseek(f, NPY_HEADER, SEEK_SET), 0);
    assert_int_equal(fread(found, sizeof *found, (size_t)(n * vocab), f), n * vocab);
    fclose(f);
    for (int64_t i = 0; i < n * vocab; i++) {
        memcpy(&e, expected + 4 * i, 4);
        largest = fmax(largest, fabs((double)e));
    }
    for (int64_t i = 0; i < n * vocab; i++) {
        memcpy(&e, expected + 4 * i, 4);
        if (!(fabs((double)found[i] - e) <= 2e-4 * largest))
            fail_msg("row %d, token %d: found %g, expected %g within %g", (int)(i / vocab), (int)(i % vocab),
                     (double)found[i], (double)e, 2e-4 * largest);
    }
    free(found);
}

static void compare_greedy(const char *path, const uint8_t *expected)
{
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    for (int i = 0; i < N_GREEDY; i++) {
        int32_t id, found;
        memcpy(&id, expected + 4 * i, 4);
        assert_int_equal(fscanf(f, "%d", &found), 1);
        assert_int_equal(found, id);
    }
    fclose(f);
}

static void test_case(void **state)
{
    const char *name = *state, *folder = test_folder();
    char source[512], model[256], ids[256], out[256], path[600];
    struct ltn_st_file g;
    struct ltn_error err;
    int64_t n[2], shape[2] = {0};
    const uint8_t *input;
    int prompts = 0;

    if (!find_case(source, sizeof source, name))
        skip();
    snprintf(model, sizeof model, "%s/%s.ltn", folder, name);
    snprintf(ids, sizeof ids, "%s/ids", folder);
    snprintf(out, sizeof out, "%s/out", folder);
    assert_int_equal(test_convert(source, model), 0);
    snprintf(path, sizeof path, "%s/golden.safetensors", source);
    if (ltn_st_open(&g, path, &err) != LTN_OK)
        fail_msg("%s", err.text);
    for (; (input = golden(&g, prompts, "input_ids", n)) != NULL; prompts++) {
        write_ids(ids, input, n[0]);
        shell("ltn-score -m %s --device cpu --tokens - --logits %s <%s >/dev/null", model, out, ids);
        const uint8_t *logits = golden(&g, prompts, "logits", shape);
        assert_non_null(logits);
        compare_logits(out, logits, n[0], shape[1]);
        shell("ltn-run -m %s --device cpu --temp 0 -n 32 --ignore-eos --tokens - <%s >%s", model, ids, out);
        compare_greedy(out, golden(&g, prompts, "greedy_ids", shape));
    }
    assert_true(prompts > 0);
    ltn_st_close(&g);
}

int main(void)
{
    struct CMUnitTest tests[N_CASES];
    for (int i = 0; i < N_CASES; i++)
        tests[i] =
            (struct CMUnitTest){.name = cases[i], .test_func = test_case, .initial_state = (void *)cases[i]};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
