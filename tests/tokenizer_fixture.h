/* Encoding and decoding as tests want it, and the fixtures in tests/data/tokenizer: NAME.ids holds what
 * another implementation makes of a model (tools/make_tokenizer_fixtures.py,
 * tools/make_tiktoken_fixtures.py). */
#ifndef LTN_TESTS_TOKENIZER_FIXTURE_H
#define LTN_TESTS_TOKENIZER_FIXTURE_H

#include "tests/test_tokenizer.h"
#include "tokenizer/tokenizer.h"

#define TOK_DATA "tests/data/tokenizer/"

/* Results belong to the caller: free(.data). A failure fails the test. */
struct ids tok_encode(const struct ltn_tokenizer *t, const char *text, size_t bytes);
/* Fed in pieces of 0 to `most` bytes; most 1: of one. */
struct ids tok_encode_split(const struct ltn_tokenizer *t, const char *text, size_t bytes, size_t most,
                            struct random *r);
void tok_feed_split(struct ltn_encoder *encoder, const char *text, size_t bytes, size_t most,
                    struct random *r);
/* Id by id; each push must return whole characters. */
struct text tok_decode(const struct ltn_tokenizer *t, const int32_t *ids, size_t n);

struct texts {
    struct text *data; /* [n] */
    size_t n;
};

struct texts tok_read_texts(void); /* texts.hex */
void tok_free_texts(struct texts *texts);
struct text tok_random_text(struct random *r, const struct texts *texts); /* some of them put together */

/* For ltn_encoder_create: refuses the first ids, LTN_ERR_STOPPED, "enough". */
enum ltn_status tok_stop_emit(void *ctx, const int32_t *ids, size_t n, struct ltn_error *err);

/* Encodes 6 MB of text through one encoder: each repetition gives as many ids, after n_bos at the beginning,
 * and no more memory is taken. The tokenizer knows <|endoftext|>. */
void tok_check_constant_memory(const struct ltn_tokenizer *t, size_t n_bos, uint64_t seed);

/* Checks FOLDER/MODEL, opened with this JSON, against every line of NAME.ids; with_val: its lines about
 * val.txt, and nothing else. */
void tok_check(const char *folder, const char *model, const char *name, const char *json, bool with_val);

#endif
