/* UTF-8, as strict as SentencePiece: shortest forms only, no surrogates, nothing above U+10FFFF. */
#ifndef LTN_UTF8_H
#define LTN_UTF8_H

#include <stddef.h>
#include <stdint.h>

/* How many bytes the character has that `lead` begins; 1 for a byte that begins none. */
static inline size_t ltn_utf8_length(unsigned char lead)
{
    return lead < 0xC0 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF8 ? 4 : 1;
}

static inline int ltn_utf8_is_trail(unsigned char byte)
{
    return (byte & 0xC0) == 0x80;
}

/* Decodes the character at text [bytes], bytes > 0: returns its length and sets *c; 0: it is none. */
static inline size_t ltn_utf8_decode(const char *text, size_t bytes, uint32_t *c)
{
    static const uint32_t least[5] = {0, 0, 0x80, 0x800,
                                      0x10000}; /* [length] below it the form is too long */
    const unsigned char *u = (const unsigned char *)text;
    const size_t n = ltn_utf8_length(u[0]);

    if (n == 1) {
        *c = u[0];
        return u[0] < 0x80 ? 1 : 0;
    }
    if (n > bytes)
        return 0;
    uint32_t value = u[0] & (0x7Fu >> n);
    for (size_t i = 1; i < n; i++) {
        if (!ltn_utf8_is_trail(u[i]))
            return 0;
        value = value << 6 | (u[i] & 0x3F);
    }
    if (value < least[n] || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000))
        return 0;
    *c = value;
    return n;
}

/* Where the first byte stands that is part of no character; bytes if there is none. */
static inline size_t ltn_utf8_check(const char *text, size_t bytes)
{
    size_t at = 0;
    uint32_t c;

    while (at < bytes) {
        const size_t n = ltn_utf8_decode(text + at, bytes - at, &c);
        if (n == 0)
            return at;
        at += n;
    }
    return bytes;
}

#endif
