#include "model/json.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- the scan: one recursive descent over the grammar of RFC 8259 ---- */

struct scan {
    const unsigned char *text;
    size_t bytes, at;
    const char *what;
    int depth, max_depth;
    bool integers_only;
    struct ltn_error *err;
};

static enum ltn_status bad(const struct scan *s, const char *expected)
{
    return ltn_fail(s->err, LTN_ERR_INPUT, "%s: bad JSON at byte %zu: %s", s->what, s->at, expected);
}

/* The byte at hand; 0, which no JSON text contains, at the end. */
static int peek(const struct scan *s)
{
    return s->at < s->bytes ? s->text[s->at] : 0;
}

static void skip_space(struct scan *s)
{
    while (s->at < s->bytes && memchr(" \t\n\r", s->text[s->at], 4))
        s->at++;
}

/* Bytes of the valid UTF-8 sequence at hand (Unicode table 3-7), 0 where there is none. */
static size_t utf8_length(const struct scan *s)
{
    const unsigned char *p = s->text + s->at;
    size_t left = s->bytes - s->at;
    unsigned char low = 0x80, high = 0xbf; /* limits of the second byte */
    size_t n;
    if (p[0] < 0x80)
        return 1;
    if (p[0] < 0xc2 || p[0] > 0xf4)
        return 0;
    n = p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
    if (p[0] == 0xe0)
        low = 0xa0;
    if (p[0] == 0xed)
        high = 0x9f;
    if (p[0] == 0xf0)
        low = 0x90;
    if (p[0] == 0xf4)
        high = 0x8f;
    if (left < n || p[1] < low || p[1] > high)
        return 0;
    for (size_t i = 2; i < n; i++)
        if (p[i] < 0x80 || p[i] > 0xbf)
            return 0;
    return n;
}

/* The four hexadecimal digits after \u, -1 where they are not. */
static int32_t hex4(struct scan *s)
{
    int32_t value = 0;
    for (int i = 0; i < 4; i++) {
        int c = peek(s);
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0)
            return -1;
        value = value * 16 + digit;
        s->at++;
    }
    return value;
}

static enum ltn_status scan_string(struct scan *s)
{
    s->at++; /* the quote, seen by the caller */
    while (peek(s) != '"') {
        if (s->at >= s->bytes)
            return bad(s, "the text ends inside a string");
        if (peek(s) < 0x20)
            return bad(s, "control character inside a string");
        if (peek(s) != '\\') {
            size_t n = utf8_length(s);
            if (n == 0)
                return bad(s, "not valid UTF-8");
            s->at += n;
            continue;
        }
        s->at++;
        if (peek(s) == 'u') {
            s->at++;
            int32_t unit = hex4(s);
            if (unit <= 0)
                return bad(s, "expected \\u with four hexadecimal digits, not all zero");
            if (unit >= 0xdc00 && unit <= 0xdfff)
                return bad(s, "low surrogate without its high one");
            if (unit >= 0xd800 && unit <= 0xdbff) {
                int32_t low = -1;
                if (peek(s) == '\\' && s->at + 1 < s->bytes && s->text[s->at + 1] == 'u') {
                    s->at += 2;
                    low = hex4(s);
                }
                if (low < 0xdc00 || low > 0xdfff)
                    return bad(s, "high surrogate without its low one");
            }
        } else if (s->at < s->bytes && memchr("\"\\/bfnrt", peek(s), 8)) {
            s->at++;
        } else {
            return bad(s, "unknown escape");
        }
    }
    s->at++;
    return LTN_OK;
}

static size_t skip_digits(struct scan *s)
{
    size_t from = s->at;
    while (peek(s) >= '0' && peek(s) <= '9')
        s->at++;
    return s->at - from;
}

static enum ltn_status scan_number(struct scan *s)
{
    size_t from = s->at;
    bool negative = peek(s) == '-';
    s->at += negative;
    size_t digits_from = s->at;
    size_t digits = skip_digits(s);
    if (digits == 0)
        return bad(s, "expected a value");
    if (digits > 1 && s->text[digits_from] == '0')
        return bad(s, "number with a leading zero");
    if (s->integers_only) {
        if (peek(s) == '.' || peek(s) == 'e' || peek(s) == 'E')
            return bad(s, "expected an integer without fraction or exponent");
        int64_t value = 0;
        for (size_t i = 0; i < digits && i < 17; i++)
            value = value * 10 + (s->text[digits_from + i] - '0');
        if (value > LTN_JSON_MAX_INT)
            return bad(s, "integer beyond 2^53");
        if (negative && value == 0)
            return bad(s, "negative zero");
        return LTN_OK;
    }
    if (peek(s) == '.') {
        s->at++;
        if (skip_digits(s) == 0)
            return bad(s, "expected digits after the point");
    }
    if (peek(s) == 'e' || peek(s) == 'E') {
        s->at++;
        s->at += peek(s) == '+' || peek(s) == '-';
        if (skip_digits(s) == 0)
            return bad(s, "expected digits in the exponent");
    }
    if (s->at - from >
        60) /* cJSON reads 63 characters of a number and takes what follows for the next token */
        return bad(s, "number of more than 60 characters");
    return LTN_OK;
}

static enum ltn_status scan_value(struct scan *s);

static enum ltn_status scan_container(struct scan *s, char close)
{
    if (s->depth == s->max_depth)
        return ltn_fail(s->err, LTN_ERR_INPUT, "%s: bad JSON at byte %zu: nested more than %d deep", s->what,
                        s->at, s->max_depth);
    s->depth++;
    s->at++;
    skip_space(s);
    if (peek(s) == close) {
        s->at++;
        s->depth--;
        return LTN_OK;
    }
    for (;;) {
        if (close == '}') {
            skip_space(s);
            if (peek(s) != '"')
                return bad(s, "expected a key");
            LTN_TRY(scan_string(s));
            skip_space(s);
            if (peek(s) != ':')
                return bad(s, "expected ':'");
            s->at++;
        }
        LTN_TRY(scan_value(s));
        skip_space(s);
        int c = peek(s);
        if (c != ',' && c != close)
            return bad(s, close == '}' ? "expected ',' or '}'" : "expected ',' or ']'");
        s->at++;
        if (c == close)
            break;
    }
    s->depth--;
    return LTN_OK;
}

static enum ltn_status scan_value(struct scan *s)
{
    static const char *const words[] = {"true", "false", "null"};
    skip_space(s);
    switch (peek(s)) {
    case '{':
        return scan_container(s, '}');
    case '[':
        return scan_container(s, ']');
    case '"':
        return scan_string(s);
    case 't':
    case 'f':
    case 'n':
        for (int i = 0; i < 3; i++) {
            size_t n = strlen(words[i]);
            if (s->bytes - s->at >= n && memcmp(s->text + s->at, words[i], n) == 0) {
                s->at += n;
                return LTN_OK;
            }
        }
        return bad(s, "expected a value");
    default:
        if (s->at >= s->bytes)
            return bad(s, "the text ends where a value is expected");
        return scan_number(s);
    }
}

/* ---- duplicate keys: on the tree, where \u0061 and a are the same ---- */

static int compare_keys(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static enum ltn_status check_duplicates(const cJSON *item, const char *what, struct ltn_error *err)
{
    size_t n = 0;
    for (const cJSON *c = item->child; c; c = c->next) {
        if (c->child)
            LTN_TRY(check_duplicates(c, what, err));
        n++;
    }
    if (!cJSON_IsObject(item) || n < 2)
        return LTN_OK;
    const char **keys = malloc(n * sizeof *keys);
    if (!keys)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for %zu keys", what, n);
    size_t i = 0;
    for (const cJSON *c = item->child; c; c = c->next)
        keys[i++] = c->string;
    qsort(keys, n, sizeof *keys, compare_keys);
    enum ltn_status status = LTN_OK;
    for (i = 1; i < n && status == LTN_OK; i++)
        if (strcmp(keys[i - 1], keys[i]) == 0)
            status =
                ltn_fail(err, LTN_ERR_INPUT, "%s: bad JSON: the key \"%.100s\" stands twice", what, keys[i]);
    free(keys);
    return status;
}

enum ltn_status ltn_json_parse(cJSON **out, const char *text, size_t bytes, const char *what, int max_depth,
                               bool integers_only, struct ltn_error *err)
{
    struct scan s = {.text = (const unsigned char *)text,
                     .bytes = bytes,
                     .what = what,
                     .max_depth = max_depth,
                     .integers_only = integers_only,
                     .err = err};
    *out = NULL;
    LTN_TRY(scan_value(&s));
    skip_space(&s);
    if (s.at < bytes)
        return bad(&s, "text after the end");
    cJSON *tree = cJSON_ParseWithLength(text, bytes);
    if (!tree) /* the text is good, so nothing else is left */
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for %zu bytes of JSON", what, bytes);
    enum ltn_status status = check_duplicates(tree, what, err);
    if (status != LTN_OK) {
        cJSON_Delete(tree);
        return status;
    }
    *out = tree;
    return LTN_OK;
}

/* ---- typed access ---- */

const cJSON *ltn_json_find(const cJSON *object, const char *key)
{
    if (!cJSON_IsObject(object))
        return NULL;
    for (const cJSON *c = object->child; c; c = c->next)
        if (strcmp(c->string, key) == 0)
            return c;
    return NULL;
}

static const char *type_name(const cJSON *item)
{
    return cJSON_IsString(item)   ? "a string"
           : cJSON_IsNumber(item) ? "a number"
           : cJSON_IsBool(item)   ? "a boolean"
           : cJSON_IsNull(item)   ? "null"
           : cJSON_IsArray(item)  ? "an array"
                                  : "an object";
}

static enum ltn_status need(const cJSON **out, const cJSON *object, const char *key, const char *what,
                            struct ltn_error *err)
{
    *out = ltn_json_find(object, key);
    if (!*out)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: the key \"%s\" is missing", what, key);
    return LTN_OK;
}

static enum ltn_status wrong_type(const cJSON *item, const char *expected, const char *key, const char *what,
                                  struct ltn_error *err)
{
    return ltn_fail(err, LTN_ERR_INPUT, "%s: \"%.100s\" is %s, expected %s", what, key, type_name(item),
                    expected);
}

enum ltn_status ltn_json_int_item(int64_t *out, const cJSON *item, int64_t min, int64_t max, const char *key,
                                  const char *what, struct ltn_error *err)
{
    if (!cJSON_IsNumber(item))
        return wrong_type(item, "an integer", key, what, err);
    double value = item->valuedouble;
    if (!(value >= (double)min && value <= (double)max) || value != floor(value))
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: \"%.100s\" is %.17g, expected an integer from %" PRId64 " to %" PRId64, what,
                        key, value, min, max);
    *out = (int64_t)value;
    return LTN_OK;
}

enum ltn_status ltn_json_int(int64_t *out, const cJSON *object, const char *key, int64_t min, int64_t max,
                             const char *what, struct ltn_error *err)
{
    const cJSON *item;
    LTN_TRY(need(&item, object, key, what, err));
    return ltn_json_int_item(out, item, min, max, key, what, err);
}

enum ltn_status ltn_json_bool(bool *out, const cJSON *object, const char *key, const char *what,
                              struct ltn_error *err)
{
    const cJSON *item;
    LTN_TRY(need(&item, object, key, what, err));
    if (!cJSON_IsBool(item))
        return wrong_type(item, "true or false", key, what, err);
    *out = cJSON_IsTrue(item);
    return LTN_OK;
}

enum ltn_status ltn_json_string(const char **out, const cJSON *object, const char *key, const char *what,
                                struct ltn_error *err)
{
    const cJSON *item;
    LTN_TRY(need(&item, object, key, what, err));
    if (!cJSON_IsString(item))
        return wrong_type(item, "a string", key, what, err);
    *out = item->valuestring;
    return LTN_OK;
}

enum ltn_status ltn_json_array(const cJSON **out, const cJSON *object, const char *key, const char *what,
                               struct ltn_error *err)
{
    const cJSON *item;
    LTN_TRY(need(&item, object, key, what, err));
    if (!cJSON_IsArray(item))
        return wrong_type(item, "an array", key, what, err);
    *out = item;
    return LTN_OK;
}

enum ltn_status ltn_json_keys(const cJSON *object, const char *const *keys, size_t n_keys, const char *what,
                              struct ltn_error *err)
{
    if (!cJSON_IsObject(object))
        return ltn_fail(err, LTN_ERR_INPUT, "%s: %s, expected an object", what, type_name(object));
    for (size_t i = 0; i < n_keys; i++)
        if (!ltn_json_find(object, keys[i]))
            return ltn_fail(err, LTN_ERR_INPUT, "%s: the key \"%s\" is missing", what, keys[i]);
    for (const cJSON *c = object->child; c; c = c->next) {
        bool known = false;
        for (size_t i = 0; i < n_keys && !known; i++)
            known = strcmp(c->string, keys[i]) == 0;
        if (!known)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: unknown key \"%.100s\"", what, c->string);
    }
    return LTN_OK;
}
