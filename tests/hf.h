/* Hugging Face directories and torch archives to convert in tests, made from nothing. */
#ifndef LTN_TESTS_HF_H
#define LTN_TESTS_HF_H

#include "model/config.h"
#include "model/safetensors.h"

/* A checkpoint of random numbers. */
struct test_hf {
    struct ltn_config config;   /* checked */
    enum ltn_st_dtype matrices; /* F16, BF16, F32 or F64 */
    enum ltn_st_dtype vectors;
    int files;               /* 1: model.safetensors, more: with an index */
    const char *config_json; /* of config.json; NULL: what says the same as config */
    enum { HEAD_AS_CONFIG, HEAD_EQUAL, HEAD_OTHER } head; /* an lm_head.weight beside a tied one */
    uint64_t seed;
};

/* Creates `dir` and writes config.json and the weights. Values are +-2^-8 .. 2^-6 with random bits. Ends the
 * program with a line on failure. */
void test_write_hf(const char *dir, const struct test_hf *hf);

/* ---- torch archives: a pickle, opcode by opcode, and its storages ---- */

struct test_pickle {
    uint8_t v[1 << 16];
    size_t n;
};

void pk_bytes(struct test_pickle *p, const void *bytes, size_t n);
void pk_op(struct test_pickle *p, char op);
void pk_int(struct test_pickle *p, int64_t value); /* BININT1, BININT2, BININT or LONG1, as fits */
void pk_text(struct test_pickle *p, const char *text);
void pk_global(struct test_pickle *p, const char *module, const char *name);
/* Everything up to the MARK of the state dictionary's items, and from their SETITEMS on. */
void pk_begin(struct test_pickle *p);
void pk_end(struct test_pickle *p);
/* Pushes name and tensor; strides NULL: contiguous. */
void pk_tensor(struct test_pickle *p, const char *name, const char *storage_type, const char *key,
               int64_t numel, int64_t offset, int rank, const int64_t *shape, const int64_t *strides);

struct test_storage {
    const char *key;
    const void *data;
    size_t bytes;
};

/* The archive ROOT "archive" with data.pkl and data/KEY for each storage; deflated where `compress`. */
void test_write_torch(const char *path, const void *pickle, size_t pickle_bytes,
                      const struct test_storage *storages, size_t n_storages, bool compress);

#endif
