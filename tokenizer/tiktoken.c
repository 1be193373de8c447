#include "tokenizer/tiktoken.h"

#include "tokenizer/utf8.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { WINDOW = 256 << 10 }; /* bytes; a piece ends here at the latest */

/* LTN_TIKTOKEN_PATTERN as PCRE2 spells it. Its own \s has U+180E too, which has not been white space since
 * Unicode 6.3. */
#define SPACE "\\t-\\r\\x85\\p{Z}"
static const char pattern[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
                              "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
                              "|\\p{N}"
                              "| ?[^" SPACE "\\p{L}\\p{N}]+[\\r\\n]*"
                              "|[" SPACE "]*[\\r\\n]+"
                              "|[" SPACE "]+(?![^" SPACE "])"
                              "|[" SPACE "]+";

struct ltn_tiktoken {
    struct ltn_bpe bpe;
    pcre2_code *code;
};

enum ltn_status ltn_tiktoken_open(struct ltn_tiktoken **out, const void *text, size_t bytes,
                                  struct ltn_error *err)
{
    int code;
    PCRE2_SIZE at;

    *out = NULL;
    struct ltn_tiktoken *t = calloc(1, sizeof *t);
    if (t == NULL)
        return ltn_fail(err, LTN_ERR_MEMORY, "tokenizer: out of memory");
    enum ltn_status status = ltn_bpe_read(&t->bpe, text, bytes, err);
    if (status == LTN_OK) {
        t->code = pcre2_compile((PCRE2_SPTR)pattern, sizeof pattern - 1,
                                PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &code, &at, NULL);
        if (t->code == NULL)
            status = ltn_fail(
                err, LTN_ERR_UNSUPPORTED,
                "tokenizer: PCRE2 refuses the split pattern at byte %zu with its error %d; it must be "
                "built with Unicode",
                (size_t)at, code);
    }
    if (status != LTN_OK) {
        ltn_tiktoken_close(t);
        return status;
    }
    /* Where machine code may not be made, it goes on without. */
    (void)pcre2_jit_compile(t->code, PCRE2_JIT_COMPLETE | PCRE2_JIT_PARTIAL_HARD);
    *out = t;
    return LTN_OK;
}

void ltn_tiktoken_close(struct ltn_tiktoken *t)
{
    if (t == NULL)
        return;
    ltn_bpe_free(&t->bpe);
    pcre2_code_free(t->code);
    free(t);
}

const struct ltn_bpe *ltn_tiktoken_bpe(const struct ltn_tiktoken *t)
{
    return &t->bpe;
}

/* ---- a run ---- */

struct ltn_tiktoken_run {
    const struct ltn_tiktoken *t;
    ltn_ids_fn *emit;
    void *ctx;
    pcre2_match_data *match;
    struct ltn_merger merger;
    int32_t *ids; /* [room] of what the buffer holds; an id is one byte at least */
    char *text;   /* [room] whole characters that are in no piece yet: [n] of them from `from` on */
    size_t from, n, room;
    size_t retry; /* with fewer bytes than this it does not look for a piece again */
};

enum ltn_status ltn_tiktoken_run_create(struct ltn_tiktoken_run **out, const struct ltn_tiktoken *tiktoken,
                                        ltn_ids_fn *emit, void *ctx, struct ltn_error *err)
{
    struct ltn_tiktoken_run *run = *out = calloc(1, sizeof *run);

    if (run != NULL) {
        run->t = tiktoken;
        run->emit = emit;
        run->ctx = ctx;
        run->match = pcre2_match_data_create(1, NULL);
    }
    if (run != NULL && run->match != NULL)
        return LTN_OK;
    ltn_tiktoken_run_free(run);
    *out = NULL;
    return ltn_fail(err, LTN_ERR_MEMORY, "tokenizer: out of memory");
}

void ltn_tiktoken_run_free(struct ltn_tiktoken_run *run)
{
    if (run == NULL)
        return;
    pcre2_match_data_free(run->match);
    ltn_merger_free(&run->merger);
    free(run->ids);
    free(run->text);
    free(run);
}

/* Makes room for `bytes` more, all of which may become U+FFFD. */
static enum ltn_status reserve(struct ltn_tiktoken_run *run, size_t bytes, struct ltn_error *err)
{
    const size_t need = run->n + 3 * bytes;

    if (run->from > 0 && run->n > 0)
        memmove(run->text, run->text + run->from, run->n);
    run->from = 0;
    if (need <= run->room)
        return LTN_OK;
    char *text = realloc(run->text, 2 * need);
    if (text != NULL)
        run->text = text;
    int32_t *ids = realloc(run->ids, 2 * need * sizeof *ids);
    if (ids != NULL)
        run->ids = ids;
    if (text == NULL || ids == NULL)
        return ltn_fail(err, LTN_ERR_MEMORY, "tokenizer: no memory for %zu bytes of text", need);
    run->room = 2 * need;
    return LTN_OK;
}

/* Appends the characters of from [bytes]; returns how many bytes they took: unless it is the last, the
 * beginning of one is left. */
static size_t take_characters(struct ltn_tiktoken_run *run, const char *from, size_t bytes, bool last)
{
    char *to = run->text + run->from + run->n;
    const char *const begin = to;
    size_t at = 0;
    uint32_t c;

    while (at < bytes &&
           (last || bytes - at >= 4 || bytes - at >= ltn_utf8_length((unsigned char)from[at]))) {
        const size_t n = ltn_utf8_decode(from + at, bytes - at, &c);
        memcpy(to, n > 0 ? from + at : "\xEF\xBF\xBD", n > 0 ? n : 3);
        to += n > 0 ? n : 3;
        at += n > 0 ? n : 1;
    }
    run->n += (size_t)(to - begin);
    return at;
}

/* The length of the piece that text [bytes] begins with; 0: it needs more text, unless these are the last. */
static enum ltn_status next_piece(struct ltn_tiktoken_run *run, const char *text, size_t bytes, bool last,
                                  size_t *piece, struct ltn_error *err)
{
    const int found = pcre2_match(run->t->code, (PCRE2_SPTR)text, bytes, 0,
                                  PCRE2_NO_UTF_CHECK | (last ? 0 : PCRE2_PARTIAL_HARD), run->match, NULL);

    *piece = found > 0 ? pcre2_get_ovector_pointer(run->match)[1] : 0;
    if (found > 0 ? *piece > 0 : found == PCRE2_ERROR_PARTIAL)
        return LTN_OK;
    return ltn_fail(err, found == PCRE2_ERROR_NOMEMORY ? LTN_ERR_MEMORY : LTN_ERR_INPUT,
                    "tokenizer: PCRE2 failed with its error %d in a text of %zu bytes", found, bytes);
}

/* Encodes pieces of the first `bytes` bytes of the buffer, as long as any is certain. */
static enum ltn_status encode_pieces(struct ltn_tiktoken_run *run, size_t bytes, bool last, size_t *n_ids,
                                     struct ltn_error *err)
{
    while (bytes > 0) {
        const char *text = run->text + run->from;
        size_t piece, n;
        LTN_TRY(next_piece(run, text, bytes, last, &piece, err));
        if (piece == 0) {
            run->retry = 2 * bytes; /* not at each byte of a long one */
            return LTN_OK;
        }
        LTN_TRY(ltn_bpe_encode(&run->t->bpe, &run->merger, text, piece, run->ids + *n_ids, &n, err));
        *n_ids += n;
        run->from += piece;
        run->n -= piece;
        bytes -= piece;
        run->retry = 0;
    }
    return LTN_OK;
}

/* The window that begins at the buffer's first byte; it ends with a whole character. */
static size_t window(const struct ltn_tiktoken_run *run)
{
    size_t n = run->n;

    if (n > WINDOW)
        for (n = WINDOW; ltn_utf8_is_trail((unsigned char)run->text[run->from + n]);)
            n--;
    return n;
}

/* Only what lies in the window decides, so that it does not matter how the text was fed. */
static enum ltn_status encode(struct ltn_tiktoken_run *run, bool last, struct ltn_error *err)
{
    size_t n_ids = 0;

    while (run->n > 0 && (last || run->n >= run->retry || run->n > WINDOW)) {
        const size_t bytes = window(run), before = run->n;
        LTN_TRY(encode_pieces(run, bytes, last && bytes == run->n, &n_ids, err));
        if (run->n < before)
            continue;
        if (run->n <= WINDOW)
            break;
        LTN_TRY(encode_pieces(run, bytes, true, &n_ids, err));
    }
    return n_ids > 0 ? run->emit(run->ctx, run->ids, n_ids, err) : LTN_OK;
}

enum ltn_status ltn_tiktoken_run_feed(struct ltn_tiktoken_run *run, const char *text, size_t bytes, bool last,
                                      size_t *used, struct ltn_error *err)
{
    LTN_TRY(reserve(run, bytes, err));
    *used = take_characters(run, text, bytes, last);
    return encode(run, last, err);
}

enum ltn_status ltn_tiktoken_run_settle(struct ltn_tiktoken_run *run, struct ltn_error *err)
{
    run->retry = 0;
    return encode(run, false, err);
}
