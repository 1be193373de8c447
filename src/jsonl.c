#include "src/jsonl.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/cli.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/utf8.h"

void ltn_jsonl_free(struct ltn_jsonl *j)
{
    free(j->line);
    j->line = NULL;
    j->bytes = j->room = 0;
}

static void put(struct ltn_jsonl *j, const char *text, size_t bytes)
{
    if (j->bytes + bytes > j->room) {
        size_t room = 2 * (j->bytes + bytes) + 256;
        char *line = realloc(j->line, room);
        if (!line) {
            j->failed = true;
            return;
        }
        j->line = line;
        j->room = room;
    }
    memcpy(j->line + j->bytes, text, bytes);
    j->bytes += bytes;
}

__attribute__((format(printf, 2, 3))) static void print(struct ltn_jsonl *j, const char *format, ...)
{
    char text[128]; /* enough for every format here */
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    put(j, text, (size_t)n);
}

size_t ltn_jsonl_escape(const char *text, size_t bytes, char out[8], size_t *out_bytes)
{
    uint32_t c = 0;
    size_t n = ltn_utf8_decode(text, bytes, &c);

    if (n == 0)
        *out_bytes = (size_t)sprintf(out, "\xEF\xBF\xBD");
    else if (c == '"' || c == '\\')
        *out_bytes = (size_t)sprintf(out, "\\%c", (char)c);
    else if (c == '\n')
        *out_bytes = (size_t)sprintf(out, "\\n");
    else if (c < ' ' || c == 0x7F)
        *out_bytes = (size_t)sprintf(out, "\\u%04x", (unsigned)c & 0xff);
    else
        memcpy(out, text, *out_bytes = n);
    return n ? n : 1;
}

const char *ltn_jsonl_end_name(enum ltn_end end)
{
    static const char *const names[] = {[LTN_END_LENGTH] = "length",
                                        [LTN_END_EOS] = "eos",
                                        [LTN_END_STRING] = "string",
                                        [LTN_END_STOPPED] = "stopped"};
    return names[end];
}

static void put_escaped(struct ltn_jsonl *j, const char *text, size_t bytes)
{
    char out[8];
    for (size_t at = 0, n; at < bytes;) {
        at += ltn_jsonl_escape(text + at, bytes - at, out, &n);
        put(j, out, n);
    }
}

static void put_logprob(struct ltn_jsonl *j, double logprob)
{
    if (isfinite(logprob))
        print(j, ", \"logprob\": %.7g", logprob);
    else
        print(j, ", \"logprob\": null");
}

static void put_index(struct ltn_jsonl *j)
{
    print(j, j->indexed ? "{\"index\": %" PRId64 ", " : "{", j->index);
}

/* Writes what was put together. */
static enum ltn_status flush(struct ltn_jsonl *j, struct ltn_error *err)
{
    size_t bytes = j->bytes;
    j->bytes = 0;
    if (j->failed)
        return ltn_fail(err, LTN_ERR_MEMORY, "JSON: no memory for a line");
    return bytes ? ltn_cli_write(j->line, bytes, err) : LTN_OK;
}

enum ltn_status ltn_jsonl_begin(struct ltn_jsonl *j, int64_t index, struct ltn_error *err)
{
    j->index = index;
    j->n_tokens = 0;
    j->sum = 0;
    if (j->form != LTN_JSONL_TEXT)
        return LTN_OK;
    put_index(j);
    print(j, j->ids ? "\"ids\": [" : "\"text\": \"");
    return flush(j, err);
}

enum ltn_status ltn_jsonl_drawn(struct ltn_jsonl *j, int32_t id, const float *logits, struct ltn_error *err)
{
    const int32_t V = ltn_engine_info(j->engine)->vocab_size;
    (void)err;
    if (j->form == LTN_JSONL_NONE)
        return LTN_OK;
    j->last.id = id;
    j->last.logprob = ltn_logprobs(logits, V, id, j->top, j->n_top < V ? j->n_top : V);
    j->sum += j->last.logprob;
    return LTN_OK;
}

static void put_top(struct ltn_jsonl *j)
{
    const struct ltn_tokenizer *t = ltn_engine_tokenizer(j->engine);
    const int32_t V = ltn_engine_info(j->engine)->vocab_size;

    print(j, ", \"top\": [");
    for (int32_t i = 0; i < j->n_top && i < V; i++) {
        size_t bytes = 0;
        const char *piece = t ? ltn_tokenizer_piece(t, j->top[i].id, &bytes) : NULL;
        print(j, "%s{\"id\": %d, \"piece\": %s", i ? ", " : "", j->top[i].id, piece ? "\"" : "null");
        if (piece) {
            put_escaped(j, piece, bytes);
            put(j, "\"", 1);
        }
        put_logprob(j, j->top[i].logprob);
        put(j, "}", 1);
    }
    put(j, "]", 1);
}

enum ltn_status ltn_jsonl_piece(struct ltn_jsonl *j, int32_t id, const char *text, size_t bytes,
                                struct ltn_error *err)
{
    if (j->form == LTN_JSONL_TEXT) {
        if (!j->ids)
            put_escaped(j, text, bytes);
        else if (id >= 0)
            print(j, j->n_tokens ? ", %d" : "%d", id);
    } else {
        put_index(j);
        if (id >= 0)
            print(j, "\"id\": %d, ", id);
        print(j, "\"text\": \"");
        put_escaped(j, text, bytes);
        put(j, "\"", 1);
        if (id >= 0) {
            put_logprob(j, j->last.logprob);
            put_top(j);
        }
        put(j, "}\n", 2);
    }
    j->n_tokens += id >= 0;
    return flush(j, err);
}

enum ltn_status ltn_jsonl_end(struct ltn_jsonl *j, enum ltn_end end, struct ltn_error *err)
{
    if (j->form != LTN_JSONL_TEXT)
        return LTN_OK;
    print(j, "%s, \"tokens\": %" PRId64, j->ids ? "]" : "\"", j->n_tokens);
    put_logprob(j, j->sum);
    print(j, ", \"end\": \"%s\"}\n", ltn_jsonl_end_name(end));
    return flush(j, err);
}
