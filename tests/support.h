/* What several tests need: checks of a status, reproducible randomness, a scratch folder, small models with
 * random weights. */
#ifndef LTN_TESTS_SUPPORT_H
#define LTN_TESTS_SUPPORT_H

#include "kernels/status.h"
#include "model/config.h"

/* The call, whose error goes to the local `err`, succeeded; else the test fails. */
#define CHECK(call) test_check((call), &err, #call)
void test_check(enum ltn_status status, const struct ltn_error *err, const char *what);

/* xorshift64*; any seed but 0. */
struct test_rng {
    uint64_t s;
};
uint64_t test_random(struct test_rng *rng);
double test_uniform(struct test_rng *rng);   /* [0, 1) */
double test_normal(struct test_rng *rng);    /* mean 0, variance 1 */
int test_below(struct test_rng *rng, int n); /* 0 .. n - 1 */

/* A fresh folder, removed with all that is in it when the program ends. The same one on every call. */
const char *test_folder(void);

/* Writes a .ltn with random weights of moderate size for the config. Exits the test program with a line on
 * failure. */
void test_write_model(struct ltn_config config, enum ltn_dtype dtype, uint64_t seed, const char *path);

/* The same with a tokenizer inside: its model, [tokenizer_bytes], and its JSON; NULL and "": none. */
void test_write_model_with(struct ltn_config config, enum ltn_dtype dtype, uint64_t seed,
                           const void *tokenizer, size_t tokenizer_bytes, const char *tokenizer_json,
                           const char *path);

/* Runs `tools/convert source out.ltn` of this build ($LTN_BIN, else the current folder); 0 on success. */
int test_convert(const char *source, const char *out);

#endif
