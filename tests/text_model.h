/* Small models that speak, for tests of everything between text and text. */
#ifndef LTN_TESTS_TEXT_MODEL_H
#define LTN_TESTS_TEXT_MODEL_H

#include "kernels/dtype.h"

/* Writes a .ltn of random weights with a BPE tokenizer made here: <unk>, <s>, </s>, all bytes, letters and
 * some merges. Its text is gibberish with spaces, and with characters that take several tokens. bos_id,
 * eos_id: -1 for none. Exits the program with a line on failure. */
void test_write_text_model(const char *path, int bos_id, int eos_id);

/* The same sizes without a tokenizer. */
void test_write_token_model(const char *path, int bos_id, int eos_id);

/* That one with its matrices rounded to bf16: nearly the same model. */
void test_write_rounded_model(const char *path, int bos_id, int eos_id);

/* One of the later architecture, without a tokenizer: gated attention, lrpe in layers 0 and 3, layer norms,
 * biases, 3 heads of 32. At least 4 layers. */
void test_write_tnl3_model(const char *path, int n_layers, enum ltn_dtype dtype);

#endif
