/* Ids to text, id by id: SentencePieceProcessor::Decode of SentencePiece 0.2, or the bytes of tiktoken's
 * tokens. */
#include "tokenizer/tokens.h"
#include "tokenizer/utf8.h"

#include <stdlib.h>
#include <string.h>

static const char space_mark[] = "\xE2\x96\x81";  /* U+2581, a space as pieces spell it */
static const char replacement[] = "\xEF\xBF\xBD"; /* U+FFFD */

struct ltn_detokenizer {
    const struct ltn_tokenizer *tokenizer;
    const struct ltn_sp_model *model; /* NULL: tokens are bytes, of the rest only `held` and `out` are used */
    bool first;                       /* no id has come */
    bool after_special;
    /* Since the last special token: */
    bool has_text;
    bool prefix_due;     /* a space at the front of the next piece is the dummy prefix's */
    bool prefix_dropped; /* the last piece has given it away */
    char held[4];        /* [n_held] bytes of a character that is not whole: at most 3 between calls */
    size_t n_held;
    /* [n_out] what this call completes: what was held and one text, each byte of which may become U+FFFD */
    char out[3 * (sizeof(char[4]) + LTN_TOKENIZER_MAX_PIECE)];
    size_t n_out;
};

static void put(struct ltn_detokenizer *d, const char *text, size_t bytes)
{
    memcpy(d->out + d->n_out, text, bytes);
    d->n_out += bytes;
    d->has_text |= bytes > 0;
}

/* Turns held bytes into characters, a byte that is part of none into U+FFFD. Unless these are the last, the
 * beginning of a character waits. */
static void put_held(struct ltn_detokenizer *d, bool last)
{
    size_t at = 0;

    while (at < d->n_held) {
        const char *from = d->held + at;
        const size_t left = d->n_held - at;
        size_t whole = 1, n;
        uint32_t c;

        while (whole < left && ltn_utf8_is_trail((unsigned char)from[whole]))
            whole++;
        if (!last && whole == left && left < ltn_utf8_length((unsigned char)*from))
            break;
        n = ltn_utf8_decode(from, left, &c);
        if (n > 0)
            put(d, from, n);
        else
            put(d, replacement, 3);
        at += n > 0 ? n : 1;
    }
    d->n_held -= at;
    memmove(d->held, d->held + at, d->n_held);
}

/* Whether held[0, n_held) begins a character that is not whole. */
static bool may_go_on(const unsigned char *held, size_t n)
{
    const size_t length = ltn_utf8_length(held[0]);

    if (length < 2 || n >= length || held[0] < 0xC2 || held[0] > 0xF4)
        return false;
    /* the shortest form, no surrogate, nothing above U+10FFFF: the second byte tells */
    return n == 1 || (held[0] == 0xE0   ? held[1] >= 0xA0
                      : held[0] == 0xED ? held[1] < 0xA0
                      : held[0] == 0xF0 ? held[1] >= 0x90
                      : held[0] == 0xF4 ? held[1] < 0x90
                                        : true);
}

/* One byte of a token that is bytes. What is held is the beginning of a character; if the byte does not go on
 * with it, it becomes one U+FFFD, and the byte begins anew. */
static void put_byte(struct ltn_detokenizer *d, char byte)
{
    uint32_t c;

    if (d->n_held > 0 && !ltn_utf8_is_trail((unsigned char)byte)) {
        put(d, replacement, 3);
        d->n_held = 0;
    }
    d->held[d->n_held++] = byte;
    if (ltn_utf8_decode(d->held, d->n_held, &c) == d->n_held) {
        put(d, d->held, d->n_held);
        d->n_held = 0;
    } else if (!may_go_on((const unsigned char *)d->held, d->n_held)) {
        put(d, replacement, 3);
        if (d->n_held > 1) /* what was held; the byte itself, which trails, begins nothing */
            put(d, replacement, 3);
        d->n_held = 0;
    }
}

static int hex_digit(char c)
{
    return c <= '9' ? c - '0' : c - 'A' + 10;
}

static void put_piece(struct ltn_detokenizer *d, enum ltn_sp_piece_type type, struct ltn_sp_string text)
{
    const struct ltn_sp_model *m = d->model;

    if (type == LTN_SP_BYTE) { /* "<0x41>" */
        d->held[d->n_held++] = (char)(hex_digit(text.data[3]) << 4 | hex_digit(text.data[4]));
        put_held(d, false);
        return;
    }
    put_held(d, true);
    if (d->prefix_dropped || d->has_text)
        d->prefix_due = false;
    d->prefix_dropped = false;
    if (type == LTN_SP_CONTROL)
        return;
    if (type == LTN_SP_UNKNOWN) { /* SentencePiece takes the surface for a C string */
        put(d, m->unk_surface.data, strnlen(m->unk_surface.data, m->unk_surface.bytes));
        return;
    }
    for (size_t at = 0; at < text.bytes;) {
        if (text.bytes - at < 3 || memcmp(text.data + at, space_mark, 3) != 0) {
            put(d, text.data + at++, 1);
            continue;
        }
        if (at == 0 && d->prefix_due && (m->add_dummy_prefix || m->remove_extra_whitespaces))
            d->prefix_dropped =
                !m->remove_extra_whitespaces; /* where extra spaces go, the next one goes too */
        else
            put(d, " ", 1);
        at += 3;
    }
}

static void put_special(struct ltn_detokenizer *d, struct ltn_sp_string text)
{
    put_held(d, true);
    if (!d->first && !d->after_special)
        put(d, " ", 1);
    put(d, text.data, text.bytes);
}

static void begin_run(struct ltn_detokenizer *d)
{
    d->has_text = d->prefix_dropped = false;
    d->prefix_due = true;
}

static void begin_text(struct ltn_detokenizer *d)
{
    d->first = true;
    d->after_special = false;
    begin_run(d);
}

enum ltn_status ltn_detokenizer_create(struct ltn_detokenizer **out, const struct ltn_tokenizer *tokenizer,
                                       struct ltn_error *err)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL)
        return ltn_fail(err, LTN_ERR_MEMORY, "tokenizer: out of memory");
    (*out)->tokenizer = tokenizer;
    (*out)->model = ltn_tokenizer_model(tokenizer);
    begin_text(*out);
    return LTN_OK;
}

enum ltn_status ltn_detokenizer_push(struct ltn_detokenizer *d, int32_t id, const char **text, size_t *bytes,
                                     struct ltn_error *err)
{
    struct ltn_token token;

    if (!ltn_tokenizer_token(d->tokenizer, id, &token))
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer: id %d names no token; ids are below %d", id,
                        ltn_tokenizer_size(d->tokenizer));
    d->n_out = 0;
    if (d->model == NULL) {
        for (size_t i = 0; i < token.text.bytes; i++)
            put_byte(d, token.text.data[i]);
    } else if (token.is_special) {
        put_special(d, token.text);
        begin_run(d);
    } else {
        put_piece(d, token.type, token.text);
    }
    d->first = false;
    d->after_special = token.is_special;
    *text = d->out;
    *bytes = d->n_out;
    return LTN_OK;
}

enum ltn_status ltn_detokenizer_finish(struct ltn_detokenizer *d, const char **text, size_t *bytes,
                                       struct ltn_error *err)
{
    (void)err;
    d->n_out = 0;
    if (d->model == NULL && d->n_held > 0) {
        put(d, replacement, 3);
        d->n_held = 0;
    }
    put_held(d, true);
    begin_text(d);
    *text = d->out;
    *bytes = d->n_out;
    return LTN_OK;
}

void ltn_detokenizer_free(struct ltn_detokenizer *d)
{
    free(d);
}
