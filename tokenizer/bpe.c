#include "tokenizer/bpe.h"

#include "tokenizer/tokenizer.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

/* ---- the vocabulary ---- */

/* The value of a base64 digit (RFC 4648, section 4); -1: none. */
static int digit(char c)
{
    return c >= 'A' && c <= 'Z'   ? c - 'A'
           : c >= 'a' && c <= 'z' ? c - 'a' + 26
           : c >= '0' && c <= '9' ? c - '0' + 52
           : c == '+'             ? 62
           : c == '/'             ? 63
                                  : -1;
}

/* Decodes text [bytes] to `to`, 3 bytes for each 4; returns how many bytes, or -1 where it is not the one
 * base64 text that they have. */
static long decode_base64(const char *text, size_t bytes, char *to)
{
    const char *begin = to;
    size_t padding = 0;

    if (bytes == 0 || bytes % 4 != 0)
        return -1;
    while (padding < 2 && text[bytes - 1 - padding] == '=')
        padding++;
    for (size_t at = 0; at < bytes; at += 4) {
        const size_t given = at + 4 < bytes ? 4 : 4 - padding;
        uint32_t bits = 0;
        for (size_t i = 0; i < 4; i++) {
            const int value = i < given ? digit(text[at + i]) : 0;
            if (value < 0)
                return -1;
            bits = bits << 6 | (uint32_t)value;
        }
        if (bits & ((1u << (8 * (4 - given))) - 1)) /* bits that belong to no byte must be 0 */
            return -1;
        for (size_t i = 0; i + 1 < given; i++)
            *to++ = (char)(bits >> (16 - 8 * i));
    }
    return to - begin;
}

/* The slot where the token is, or would be. */
static size_t slot_of(const struct ltn_bpe *bpe, const char *text, size_t bytes)
{
    size_t slot = XXH3_64bits(text, bytes) & (bpe->n_slots - 1);

    for (int32_t id; (id = bpe->slots[slot]) >= 0; slot = (slot + 1) & (bpe->n_slots - 1)) {
        const uint32_t from = bpe->from[id];
        if (bpe->from[id + 1] - from == bytes && memcmp(bpe->bytes + from, text, bytes) == 0)
            break;
    }
    return slot;
}

int32_t ltn_bpe_find(const struct ltn_bpe *bpe, const char *text, size_t bytes)
{
    return bytes == 0 || bytes > bpe->longest ? -1 : bpe->slots[slot_of(bpe, text, bytes)];
}

/* One line, text [bytes] without its end: token number bpe->n. */
static enum ltn_status read_line(struct ltn_bpe *bpe, const char *text, size_t bytes, struct ltn_error *err)
{
    const int32_t id = bpe->n;
    const long line = (long)id + 1;
    const char *space = memchr(text, ' ', bytes);
    const size_t base64 = space != NULL ? (size_t)(space - text) : bytes;
    char *token = bpe->bytes + bpe->from[id];
    char rank[12], found[24];

    if (space == NULL)
        return ltn_fail(err, LTN_ERR_INPUT, "tiktoken file: line %ld: expected a token, a space and a rank",
                        line);
    const long n = decode_base64(text, base64, token);
    if (n < 0)
        return ltn_fail(err, LTN_ERR_INPUT, "tiktoken file: line %ld: the token is not base64", line);
    if (n > LTN_TOKENIZER_MAX_PIECE)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "tiktoken file: line %ld: a token of %ld bytes, at most %d are allowed", line, n,
                        LTN_TOKENIZER_MAX_PIECE);
    const int digits = snprintf(rank, sizeof rank, "%" PRId32, id);
    const size_t given = bytes - base64 - 1;
    if (given != (size_t)digits || memcmp(space + 1, rank, given) != 0) {
        size_t k = 0;
        for (; k < given && k + 1 < sizeof found; k++)
            found[k] = space[1 + k] >= '!' && space[1 + k] <= '~' ? space[1 + k] : '?';
        found[k] = '\0';
        return ltn_fail(err, LTN_ERR_INPUT, "tiktoken file: line %ld: expected rank %s, found '%s'", line,
                        rank, found);
    }
    const size_t slot = slot_of(bpe, token, (size_t)n);
    if (bpe->slots[slot] >= 0)
        return ltn_fail(err, LTN_ERR_INPUT, "tiktoken file: line %ld: the token is that of rank %d too", line,
                        bpe->slots[slot]);
    bpe->slots[slot] = id;
    bpe->from[id + 1] = bpe->from[id] + (uint32_t)n;
    bpe->longest = (size_t)n > bpe->longest ? (size_t)n : bpe->longest;
    bpe->n++;
    return LTN_OK;
}

static enum ltn_status read_lines(struct ltn_bpe *bpe, const char *text, size_t bytes, struct ltn_error *err)
{
    const char *end = text + bytes;
    size_t lines = 0;

    if (bytes > LTN_TOKENIZER_MAX_MODEL)
        return ltn_fail(err, LTN_ERR_INPUT, "tiktoken file: it has %zu bytes, at most %d are allowed", bytes,
                        LTN_TOKENIZER_MAX_MODEL);
    for (const char *at = text; at < end; lines++) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        at = newline != NULL ? newline + 1 : end;
    }
    if (lines > LTN_TOKENIZER_MAX_IDS)
        return ltn_fail(err, LTN_ERR_INPUT, "tiktoken file: it has %zu lines, at most %d are allowed", lines,
                        LTN_TOKENIZER_MAX_IDS);
    for (bpe->n_slots = 512; bpe->n_slots < 2 * lines;)
        bpe->n_slots *= 2;
    bpe->bytes = malloc(bytes + 1); /* base64 has more bytes than what it stands for */
    bpe->from = calloc(lines + 1, sizeof *bpe->from);
    bpe->slots = malloc(bpe->n_slots * sizeof *bpe->slots);
    if (bpe->bytes == NULL || bpe->from == NULL || bpe->slots == NULL)
        return ltn_fail(err, LTN_ERR_MEMORY, "tiktoken file: no memory for %zu tokens", lines);
    memset(bpe->slots, -1, bpe->n_slots * sizeof *bpe->slots);
    for (const char *at = text; at < end;) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        const char *stop = newline != NULL ? newline : end;
        LTN_TRY(read_line(bpe, at, (size_t)(stop - at), err));
        at = stop + 1;
    }
    for (int b = 0; b < 256; b++)
        if (ltn_bpe_find(bpe, &(char){(char)b}, 1) < 0)
            return ltn_fail(err, LTN_ERR_INPUT, "tiktoken file: no token for the byte 0x%02X in %d lines", b,
                            bpe->n);
    return LTN_OK;
}

enum ltn_status ltn_bpe_read(struct ltn_bpe *bpe, const char *text, size_t bytes, struct ltn_error *err)
{
    *bpe = (struct ltn_bpe){0};
    const enum ltn_status status = read_lines(bpe, text, bytes, err);
    if (status != LTN_OK)
        ltn_bpe_free(bpe);
    return status;
}

void ltn_bpe_free(struct ltn_bpe *bpe)
{
    free(bpe->bytes);
    free(bpe->from);
    free(bpe->slots);
    *bpe = (struct ltn_bpe){0};
}

/* ---- merging ---- */

enum { NO_RANK = INT32_MAX };

/* What begins at a byte of the piece. */
struct ltn_merger_part {
    int32_t next, previous; /* where the neighbours begin; the end of the piece, -1: none */
    int32_t
        rank; /* of the token that this part and the next make up; NO_RANK: none, or no part begins here */
};

/* Two parts that may be merged, or could once: then parts[at].rank has changed since, for good, because the
 * parts at one place only grow and each rank is one length. */
struct ltn_merger_pair {
    int32_t rank, at;
};

void ltn_merger_free(struct ltn_merger *merger)
{
    free(merger->parts);
    free(merger->heap);
    *merger = (struct ltn_merger){0};
}

static enum ltn_status grow(struct ltn_merger *merger, size_t bytes, struct ltn_error *err)
{
    if (bytes <= merger->room)
        return LTN_OK;
    const size_t room = 2 * bytes;
    ltn_merger_free(merger);
    merger->parts = malloc((room + 1) * sizeof *merger->parts);
    merger->heap = malloc(3 * room * sizeof *merger->heap);
    if (merger->parts == NULL || merger->heap == NULL) {
        ltn_merger_free(merger);
        return ltn_fail(err, LTN_ERR_MEMORY, "tokenizer: no memory for a piece of %zu bytes", bytes);
    }
    merger->room = room;
    return LTN_OK;
}

static int before(struct ltn_merger_pair a, struct ltn_merger_pair b)
{
    return a.rank != b.rank ? a.rank < b.rank : a.at < b.at;
}

static void push(struct ltn_merger_pair *heap, size_t *n, struct ltn_merger_pair pair)
{
    size_t i = (*n)++;

    for (; i > 0 && before(pair, heap[(i - 1) / 2]); i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = pair;
}

static struct ltn_merger_pair pop(struct ltn_merger_pair *heap, size_t *n)
{
    const struct ltn_merger_pair first = heap[0], last = heap[--*n];
    size_t i = 0;

    for (size_t child; (child = 2 * i + 1) < *n; i = child) {
        if (child + 1 < *n && before(heap[child + 1], heap[child]))
            child++;
        if (!before(heap[child], last))
            break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return first;
}

/* Looks up what the part at `at` and the next make up, and notes it. */
static void note_pair(const struct ltn_bpe *bpe, struct ltn_merger *merger, size_t *n_heap, const char *piece,
                      size_t bytes, int32_t at)
{
    struct ltn_merger_part *part = &merger->parts[at];

    part->rank = NO_RANK;
    if ((size_t)part->next == bytes)
        return;
    const int32_t id = ltn_bpe_find(bpe, piece + at, (size_t)(merger->parts[part->next].next - at));
    if (id < 0)
        return;
    part->rank = id;
    push(merger->heap, n_heap, (struct ltn_merger_pair){id, at});
}

enum ltn_status ltn_bpe_encode(const struct ltn_bpe *bpe, struct ltn_merger *merger, const char *piece,
                               size_t bytes, int32_t *ids, size_t *n, struct ltn_error *err)
{
    const int32_t whole = ltn_bpe_find(bpe, piece, bytes), end = (int32_t)bytes;
    size_t n_heap = 0; /* at most one for each pair at first, and two for each of `bytes` - 1 merges */

    if (whole >= 0) {
        ids[0] = whole;
        *n = 1;
        return LTN_OK;
    }
    LTN_TRY(grow(merger, bytes, err));
    struct ltn_merger_part *parts = merger->parts;
    for (int32_t at = 0; at < end; at++)
        parts[at] = (struct ltn_merger_part){at + 1, at - 1, NO_RANK};
    for (int32_t at = 0; at < end; at++)
        note_pair(bpe, merger, &n_heap, piece, bytes, at);
    while (n_heap > 0) {
        const struct ltn_merger_pair pair = pop(merger->heap, &n_heap);
        if (parts[pair.at].rank != pair.rank)
            continue;
        const int32_t gone = parts[pair.at].next;
        parts[gone].rank = NO_RANK;
        parts[pair.at].next = parts[gone].next;
        if (parts[gone].next < end)
            parts[parts[gone].next].previous = pair.at;
        note_pair(bpe, merger, &n_heap, piece, bytes, pair.at);
        if (parts[pair.at].previous >= 0)
            note_pair(bpe, merger, &n_heap, piece, bytes, parts[pair.at].previous);
    }
    *n = 0;
    for (int32_t at = 0; at < end; at = parts[at].next)
        ids[(*n)++] = ltn_bpe_find(bpe, piece + at, (size_t)(parts[at].next - at));
    return LTN_OK;
}
