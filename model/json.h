/* JSON from files nobody vouches for: the text is checked in full before cJSON builds the tree.
 *
 * cJSON alone accepts 007, 1e999, text after the end, duplicate keys and depth 1000, clamps large integers
 * and looks names up ignoring case; nothing here does.
 */
#ifndef LTN_JSON_H
#define LTN_JSON_H

#include "kernels/status.h"

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LTN_JSON_MAX_INT ((int64_t)1 << 53) /* integers beyond it are not exact in a double */

/* Parses text[0 .. bytes), which needs no terminating zero and must be one JSON value: valid UTF-8, nested at
 * most max_depth deep, no duplicate keys, no \u0000 (strings are zero-terminated), nothing but white space
 * after it. integers_only: every number is a plain decimal integer, -2^53 .. 2^53, without leading zeros,
 * fraction or exponent. `what` names the text in errors. *out belongs to the caller: cJSON_Delete. On failure
 * *out is NULL. */
enum ltn_status ltn_json_parse(cJSON **out, const char *text, size_t bytes, const char *what, int max_depth,
                               bool integers_only, struct ltn_error *err);

/* The member of that exact name; NULL where there is none or `object` is none. */
const cJSON *ltn_json_find(const cJSON *object, const char *key);

/* The member `key` of `object`, which must be there and of that type; the error names what and key. An
 * integer may be written 2.0 where the text allowed fractions, but must be whole and in min .. max, which lie
 * within +-2^53. *out of ltn_json_string belongs to the tree. */
enum ltn_status ltn_json_int(int64_t *out, const cJSON *object, const char *key, int64_t min, int64_t max,
                             const char *what, struct ltn_error *err);
enum ltn_status ltn_json_bool(bool *out, const cJSON *object, const char *key, const char *what,
                              struct ltn_error *err);
enum ltn_status ltn_json_string(const char **out, const cJSON *object, const char *key, const char *what,
                                struct ltn_error *err);
enum ltn_status ltn_json_array(const cJSON **out, const cJSON *object, const char *key, const char *what,
                               struct ltn_error *err);

/* An item that is at hand, such as the element of an array, as an integer in min .. max; `key` is what the
 * error calls it. */
enum ltn_status ltn_json_int_item(int64_t *out, const cJSON *item, int64_t min, int64_t max, const char *key,
                                  const char *what, struct ltn_error *err);

/* `object` must be an object with exactly these keys; the error names the missing or the unknown one. */
enum ltn_status ltn_json_keys(const cJSON *object, const char *const *keys, size_t n_keys, const char *what,
                              struct ltn_error *err);

#endif
