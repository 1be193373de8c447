#include "tokenizer/sp_model.h"

#include "tokenizer/tokenizer.h"
#include "tokenizer/utf8.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_CHARSMAP = 8 << 20, /* bytes; the largest in use (nmt_nfkc) has 0.24 MB */
    MAX_KEY = 128,          /* bytes of a rule's key; NFKC's longest has 36 */
    MAX_REPLACEMENT = 1024, /* bytes of what replaces it */
    MAX_NESTED = 64, /* user-defined pieces that begin with each other: what SentencePiece has room for */
};

/* ---- the wire format of protocol buffers: a message is a list of (field number, value) ---- */

enum wire { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BYTES = 2, WIRE_32 = 5 };

struct message {
    const uint8_t *start; /* of the file, for error texts */
    const uint8_t *at, *end;
    const char *name;
};

struct field {
    uint32_t number;
    enum wire wire;
    uint64_t value;       /* WIRE_VARINT, WIRE_64, WIRE_32 */
    const uint8_t *bytes; /* WIRE_BYTES: [n_bytes] */
    size_t n_bytes;
};

static enum ltn_status broken(const struct message *m, const char *what, struct ltn_error *err)
{
    return ltn_fail(err, LTN_ERR_INPUT, "tokenizer model: byte %zu, in %s: %s", (size_t)(m->at - m->start),
                    m->name, what);
}

static enum ltn_status read_varint(struct message *m, uint64_t *value, struct ltn_error *err)
{
    *value = 0;
    for (int shift = 0; shift < 70; shift += 7) {
        if (m->at == m->end)
            return broken(m, "the file ends inside a number", err);
        const uint8_t byte = *m->at++;
        if (shift < 64)
            *value |= (uint64_t)(byte & 0x7F) << shift;
        if (byte < 0x80)
            return LTN_OK;
    }
    return broken(m, "a number of more than 10 bytes", err);
}

static enum ltn_status read_fixed(struct message *m, size_t n, uint64_t *value, struct ltn_error *err)
{
    if ((size_t)(m->end - m->at) < n)
        return broken(m, "the file ends inside a number", err);
    *value = 0;
    for (size_t i = 0; i < n; i++)
        *value |= (uint64_t)m->at[i] << (8 * i);
    m->at += n;
    return LTN_OK;
}

static enum ltn_status read_field(struct message *m, struct field *f, struct ltn_error *err)
{
    uint64_t tag, length;

    LTN_TRY(read_varint(m, &tag, err));
    if (tag >> 3 == 0 || tag >> 3 > 0x1FFFFFFF)
        return broken(m, "a field number that cannot be", err);
    *f = (struct field){.number = (uint32_t)(tag >> 3), .wire = (enum wire)(tag & 7)};
    switch (f->wire) {
    case WIRE_VARINT:
        return read_varint(m, &f->value, err);
    case WIRE_64:
        return read_fixed(m, 8, &f->value, err);
    case WIRE_32:
        return read_fixed(m, 4, &f->value, err);
    case WIRE_BYTES:
        LTN_TRY(read_varint(m, &length, err));
        if (length > (uint64_t)(m->end - m->at))
            return broken(m, "a length beyond the end", err);
        f->bytes = m->at;
        f->n_bytes = (size_t)length;
        m->at += length;
        return LTN_OK;
    }
    return broken(m, "an unknown kind of value", err);
}

static enum ltn_status want(const struct message *m, const struct field *f, enum wire wire,
                            struct ltn_error *err)
{
    return f->wire == wire ? LTN_OK : broken(m, "a value of another kind than the field's", err);
}

static enum ltn_status get_bool(const struct message *m, const struct field *f, bool *value,
                                struct ltn_error *err)
{
    LTN_TRY(want(m, f, WIRE_VARINT, err));
    *value = f->value != 0;
    return LTN_OK;
}

static enum ltn_status get_enum(const struct message *m, const struct field *f, uint64_t max, int *value,
                                struct ltn_error *err)
{
    LTN_TRY(want(m, f, WIRE_VARINT, err));
    if (f->value < 1 || f->value > max)
        return broken(m, "a kind that does not exist", err);
    *value = (int)f->value;
    return LTN_OK;
}

static enum ltn_status get_text(const struct message *m, const struct field *f, struct ltn_sp_string *text,
                                struct ltn_error *err)
{
    LTN_TRY(want(m, f, WIRE_BYTES, err));
    if (f->n_bytes > LTN_TOKENIZER_MAX_PIECE)
        return broken(m, "a text of more than 1024 bytes", err);
    text->data = (const char *)f->bytes;
    text->bytes = f->n_bytes;
    if (ltn_utf8_check(text->data, text->bytes) != text->bytes)
        return broken(m, "a text that is not UTF-8", err);
    return LTN_OK;
}

static struct message enter(const struct message *m, const struct field *f, const char *name)
{
    return (struct message){.start = m->start, .at = f->bytes, .end = f->bytes + f->n_bytes, .name = name};
}

/* ---- the normaliser's rules ---- */

static uint32_t unit_at(const struct ltn_sp_charsmap *map, size_t i)
{
    const uint8_t *u = map->units + 4 * i;

    return (uint32_t)u[0] | (uint32_t)u[1] << 8 | (uint32_t)u[2] << 16 | (uint32_t)u[3] << 24;
}

/* The bits of a unit, as darts-clone packs them: 0-7 label, 8 has a value, 9 offset is scaled, 10-30 offset;
 * bit 31 marks a value, which no label equals. */
static uint32_t unit_label(uint32_t unit)
{
    return unit & 0x800000FFu;
}

static bool unit_has_value(uint32_t unit)
{
    return unit >> 8 & 1;
}

static size_t unit_offset(uint32_t unit)
{
    return (size_t)(unit >> 10) << ((unit & 1u << 9) >> 6);
}

size_t ltn_sp_charsmap_match(const struct ltn_sp_charsmap *map, const char *text, size_t bytes,
                             const char **to)
{
    size_t longest = 0;

    if (map->n_units == 0)
        return 0;
    size_t base = unit_offset(unit_at(map, 0));
    for (size_t i = 0; i < bytes; i++) {
        const uint8_t label = (uint8_t)text[i];
        const size_t at = base ^ label;
        const uint32_t unit = unit_at(map, at);
        if (unit_label(unit) != label)
            break;
        base = at ^ unit_offset(unit);
        if (unit_has_value(unit)) {
            longest = i + 1;
            *to = map->texts + (unit_at(map, base) & 0x7FFFFFFFu);
        }
    }
    return longest;
}

/* Checks all that can be reached from the unit at `at`, `depth` bytes into a key, and returns how many more
 * bytes a key may have from there; -1: broken. heights [n_units]: what is known, plus one. Units may be
 * shared (the trie is a minimised automaton), so each is visited once; a cycle runs into the limit of depth.
 */
static int trie_height(const struct ltn_sp_charsmap *map, uint8_t *heights, size_t at, int depth)
{
    if (heights[at] != 0)
        return depth + heights[at] - 1 <= MAX_KEY ? heights[at] - 1 : -1;
    const uint32_t unit = unit_at(map, at);
    const size_t base = at ^ unit_offset(unit);
    int height = 0;

    if (depth > MAX_KEY || (base | 0xFF) >= map->n_units)
        return -1;
    if (unit_has_value(unit)) {
        const size_t value = unit_at(map, base) & 0x7FFFFFFFu;
        if (value >= map->text_bytes || ltn_utf8_is_trail((unsigned char)map->texts[value]))
            return -1;
    }
    for (uint32_t label = 0; label < 256; label++) {
        if (unit_label(unit_at(map, base ^ label)) != label)
            continue;
        const int below = trie_height(map, heights, base ^ label, depth + 1);
        if (below < 0)
            return -1;
        if (below + 1 > height)
            height = below + 1;
    }
    heights[at] = (uint8_t)(height + 1);
    return height;
}

/* Layout: u32 size of the trie in bytes, the trie, the replacements (Normalizer::DecodePrecompiledCharsMap).
 */
static enum ltn_status read_charsmap(struct ltn_sp_charsmap *map, const uint8_t *data, size_t bytes,
                                     struct ltn_error *err)
{
    static const char what[] = "tokenizer model: precompiled_charsmap";

    *map = (struct ltn_sp_charsmap){0};
    if (bytes == 0)
        return LTN_OK;
    if (bytes < 4 || bytes > MAX_CHARSMAP)
        return ltn_fail(err, LTN_ERR_INPUT, "%s has %zu bytes, expected 4 to %d", what, bytes, MAX_CHARSMAP);
    const size_t trie =
        (size_t)data[0] | (size_t)data[1] << 8 | (size_t)data[2] << 16 | (size_t)data[3] << 24;
    if (trie == 0 || trie % 4 != 0 || trie >= bytes - 4)
        return ltn_fail(err, LTN_ERR_INPUT, "%s says its trie has %zu bytes, which do not fit its %zu", what,
                        trie, bytes);
    map->units = data + 4;
    map->n_units = trie / 4;
    map->texts = (const char *)data + 4 + trie;
    map->text_bytes = bytes - 4 - trie;

    if (map->texts[map->text_bytes - 1] != '\0' ||
        ltn_utf8_check(map->texts, map->text_bytes) != map->text_bytes)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: the replacements are not UTF-8 that ends with NUL", what);
    for (size_t at = 0, n; at < map->text_bytes; at += n) {
        n = strlen(map->texts + at) + 1;
        if (n > MAX_REPLACEMENT)
            return ltn_fail(err, LTN_ERR_INPUT, "%s: a replacement has %zu bytes, at most %d are allowed",
                            what, n - 1, MAX_REPLACEMENT - 1);
    }

    uint8_t *heights = calloc(map->n_units, 1);
    if (heights == NULL)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for %zu bytes", what, map->n_units);
    const int height = trie_height(map, heights, 0, 0);
    free(heights);
    if (height < 0)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: the trie leads out of bounds, or to a rule longer than %d bytes", what, MAX_KEY);
    map->max_key = (size_t)height;
    return LTN_OK;
}

/* ---- the messages ---- */

static enum ltn_status read_piece(struct message m, struct ltn_sp_piece *piece, struct ltn_error *err)
{
    struct field f;

    *piece = (struct ltn_sp_piece){.type = LTN_SP_NORMAL};
    while (m.at < m.end) {
        LTN_TRY(read_field(&m, &f, err));
        if (f.number == 1) {
            LTN_TRY(get_text(&m, &f, &piece->text, err));
        } else if (f.number == 2) {
            LTN_TRY(want(&m, &f, WIRE_32, err));
            const uint32_t bits = (uint32_t)f.value;
            memcpy(&piece->score, &bits, sizeof bits);
            if (!isfinite(piece->score))
                return broken(&m, "a score that is not finite", err);
        } else if (f.number == 3) {
            int type = 0;
            LTN_TRY(get_enum(&m, &f, LTN_SP_BYTE, &type, err));
            piece->type = (enum ltn_sp_piece_type)type;
        }
    }
    if (piece->text.bytes == 0)
        return broken(&m, "the piece has no text", err);
    return LTN_OK;
}

static enum ltn_status read_trainer(struct message m, struct ltn_sp_model *model, struct ltn_error *err)
{
    struct field f;

    while (m.at < m.end) {
        LTN_TRY(read_field(&m, &f, err));
        if (f.number == 3) {
            int type = 0;
            LTN_TRY(get_enum(&m, &f, LTN_SP_CHAR, &type, err));
            model->type = (enum ltn_sp_model_type)type;
        } else if (f.number == 24) {
            LTN_TRY(get_bool(&m, &f, &model->whitespace_as_suffix, err));
        } else if (f.number == 35) {
            LTN_TRY(get_bool(&m, &f, &model->byte_fallback, err));
        } else if (f.number == 44) {
            LTN_TRY(get_text(&m, &f, &model->unk_surface, err));
        } else if (f.number == 46) {
            LTN_TRY(get_text(&m, &f, &model->bos_piece, err));
        } else if (f.number == 47) {
            LTN_TRY(get_text(&m, &f, &model->eos_piece, err));
        }
    }
    return LTN_OK;
}

static enum ltn_status read_normalizer(struct message m, struct ltn_sp_model *model, struct ltn_error *err)
{
    struct field f;

    while (m.at < m.end) {
        LTN_TRY(read_field(&m, &f, err));
        if (f.number == 2) {
            LTN_TRY(want(&m, &f, WIRE_BYTES, err));
            LTN_TRY(read_charsmap(&model->charsmap, f.bytes, f.n_bytes, err));
        } else if (f.number == 3) {
            LTN_TRY(get_bool(&m, &f, &model->add_dummy_prefix, err));
        } else if (f.number == 4) {
            LTN_TRY(get_bool(&m, &f, &model->remove_extra_whitespaces, err));
        } else if (f.number == 5) {
            LTN_TRY(get_bool(&m, &f, &model->escape_whitespaces, err));
        }
    }
    return LTN_OK;
}

static enum ltn_status check_denormalizer(struct message m, struct ltn_error *err)
{
    struct field f;

    while (m.at < m.end) {
        LTN_TRY(read_field(&m, &f, err));
        if (f.number == 2 && (f.wire != WIRE_BYTES || f.n_bytes > 0))
            return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                            "tokenizer model: it has a denormaliser, which is not "
                            "supported");
    }
    return LTN_OK;
}

static int by_text(const void *a, const void *b)
{
    const struct ltn_sp_string *x = a, *y = b;
    const int order = memcmp(x->data, y->data, x->bytes < y->bytes ? x->bytes : y->bytes);

    return order != 0 ? order : x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

/* User-defined pieces that begin with each other: SentencePiece counts them all but has room for 64. In
 * sorted order the prefixes of a piece stand on a stack. */
static enum ltn_status check_nesting(const struct ltn_sp_model *model, struct ltn_error *err)
{
    struct ltn_sp_string *sorted = malloc((model->n_pieces + 1) * sizeof *sorted);
    struct ltn_sp_string stack[MAX_NESTED];
    size_t n = 0, depth = 0;
    enum ltn_status status = LTN_OK;

    if (sorted == NULL)
        return ltn_fail(err, LTN_ERR_MEMORY, "tokenizer model: no memory for %zu pieces", model->n_pieces);
    for (size_t i = 0; i < model->n_pieces; i++)
        if (model->pieces[i].type == LTN_SP_USER_DEFINED)
            sorted[n++] = model->pieces[i].text;
    qsort(sorted, n, sizeof *sorted, by_text);
    for (size_t i = 0; i < n && status == LTN_OK; i++) {
        while (depth > 0 && (stack[depth - 1].bytes > sorted[i].bytes ||
                             memcmp(stack[depth - 1].data, sorted[i].data, stack[depth - 1].bytes) != 0))
            depth--;
        if (depth == MAX_NESTED)
            status = ltn_fail(err, LTN_ERR_INPUT,
                              "tokenizer model: more than %d user-defined pieces begin with each other",
                              MAX_NESTED);
        else
            stack[depth++] = sorted[i];
    }
    free(sorted);
    return status;
}

static enum ltn_status check_model(const struct ltn_sp_model *model, struct ltn_error *err)
{
    if (model->type != LTN_SP_BPE && model->type != LTN_SP_UNIGRAM)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                        "tokenizer model: a %s model; only BPE and unigram are supported",
                        model->type == LTN_SP_WORD ? "word" : "character");
    for (size_t i = 0; i < model->n_pieces; i++) {
        const struct ltn_sp_piece *piece = &model->pieces[i];
        if (piece->type == LTN_SP_UNUSED)
            return ltn_fail(
                err, LTN_ERR_UNSUPPORTED,
                "tokenizer model: piece %zu is marked unused; a restricted vocabulary is not supported", i);
        /* SentencePiece takes a NUL for the end of most texts: in the tries that it builds, in names. */
        if ((piece->type != LTN_SP_NORMAL || model->type == LTN_SP_UNIGRAM) &&
            memchr(piece->text.data, '\0', piece->text.bytes) != NULL)
            return ltn_fail(err, LTN_ERR_INPUT, "tokenizer model: piece %zu has a NUL inside", i);
    }
    return check_nesting(model, err);
}

static enum ltn_status read_model(struct message m, struct ltn_sp_model *model, struct ltn_error *err)
{
    struct message count = m;
    struct field f;
    size_t n = 0;

    while (count.at < count.end) {
        LTN_TRY(read_field(&count, &f, err));
        n += f.number == 1;
    }
    if (n == 0 || n > LTN_TOKENIZER_MAX_IDS)
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer model: it has %zu pieces, expected 1 to %d", n,
                        LTN_TOKENIZER_MAX_IDS);
    model->pieces = malloc(n * sizeof *model->pieces);
    if (model->pieces == NULL)
        return ltn_fail(err, LTN_ERR_MEMORY, "tokenizer model: no memory for %zu pieces", n);

    while (m.at < m.end) {
        LTN_TRY(read_field(&m, &f, err));
        if (f.number == 1 || f.number == 2 || f.number == 3 || f.number == 5)
            LTN_TRY(want(&m, &f, WIRE_BYTES, err));
        if (f.number == 1)
            LTN_TRY(read_piece(enter(&m, &f, "a piece"), &model->pieces[model->n_pieces++], err));
        else if (f.number == 2)
            LTN_TRY(read_trainer(enter(&m, &f, "trainer_spec"), model, err));
        else if (f.number == 3)
            LTN_TRY(read_normalizer(enter(&m, &f, "normalizer_spec"), model, err));
        else if (f.number == 5)
            LTN_TRY(check_denormalizer(enter(&m, &f, "denormalizer_spec"), err));
    }
    return check_model(model, err);
}

enum ltn_status ltn_sp_model_read(struct ltn_sp_model *model, const void *data, size_t bytes,
                                  struct ltn_error *err)
{
    const struct message file = {
        .start = data, .at = data, .end = (const uint8_t *)data + bytes, .name = "the model"};

    /* Where a field is absent: the defaults that sentencepiece_model.proto declares. */
    *model = (struct ltn_sp_model){.type = LTN_SP_UNIGRAM,
                                   .add_dummy_prefix = true,
                                   .remove_extra_whitespaces = true,
                                   .escape_whitespaces = true,
                                   .unk_surface = {" \xE2\x81\x87 ", 5},
                                   .bos_piece = {"<s>", 3},
                                   .eos_piece = {"</s>", 4}};
    if (bytes == 0 || bytes > LTN_TOKENIZER_MAX_MODEL) {
        *model = (struct ltn_sp_model){0};
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer model: it has %zu bytes, expected 1 to %d", bytes,
                        LTN_TOKENIZER_MAX_MODEL);
    }
    const enum ltn_status status = read_model(file, model, err);
    if (model->bos_piece.bytes == 0) /* SentencePiece takes an empty name for the default */
        model->bos_piece = (struct ltn_sp_string){"<s>", 3};
    if (model->eos_piece.bytes == 0)
        model->eos_piece = (struct ltn_sp_string){"</s>", 4};
    if (status != LTN_OK)
        ltn_sp_model_free(model);
    return status;
}

void ltn_sp_model_free(struct ltn_sp_model *model)
{
    free(model->pieces);
    *model = (struct ltn_sp_model){0};
}

/* ---- the model written anew, from what was checked ---- */

struct writer {
    uint8_t *data; /* NULL: only count */
    size_t at;
};

static void put_byte(struct writer *w, uint64_t byte)
{
    if (w->data != NULL)
        w->data[w->at] = (uint8_t)byte;
    w->at++;
}

static void put_varint(struct writer *w, uint64_t value)
{
    for (; value > 0x7F; value >>= 7)
        put_byte(w, value | 0x80);
    put_byte(w, value);
}

static void put_number(struct writer *w, uint32_t field, uint64_t value)
{
    put_varint(w, field << 3 | WIRE_VARINT);
    put_varint(w, value);
}

static void put_length(struct writer *w, uint32_t field, size_t bytes)
{
    put_varint(w, field << 3 | WIRE_BYTES);
    put_varint(w, bytes);
}

static void put_piece(struct writer *w, const struct ltn_sp_piece *piece)
{
    uint32_t bits;

    put_length(w, 1, piece->text.bytes);
    for (size_t i = 0; i < piece->text.bytes; i++)
        put_byte(w, (uint8_t)piece->text.data[i]);
    memcpy(&bits, &piece->score, sizeof bits);
    put_varint(w, 2 << 3 | WIRE_32);
    for (int shift = 0; shift < 32; shift += 8)
        put_byte(w, bits >> shift & 0xFF);
    put_number(w, 3, piece->type);
}

static void put_trainer(struct writer *w, const struct ltn_sp_model *model)
{
    put_number(w, 3, model->type);
    put_number(w, 35, model->byte_fallback);
}

/* The table of rules has none: 256 units without a child and an empty replacement. Without a table
 * SentencePiece writes a line about that to stderr. */
static void put_normalizer(struct writer *w)
{
    enum { TRIE = 1024 };

    put_length(w, 2, 4 + TRIE + 1);
    for (size_t i = 0; i < 4 + TRIE + 1; i++)
        put_byte(w, i < 4 ? TRIE >> 8 * i & 0xFF : 0);
    put_number(w, 3, false); /* add_dummy_prefix */
    put_number(w, 4, false); /* remove_extra_whitespaces */
    put_number(w, 5, false); /* escape_whitespaces */
}

static void put_model(struct writer *w, const struct ltn_sp_model *model)
{
    struct writer inner;

    for (size_t i = 0; i < model->n_pieces; i++) {
        inner = (struct writer){0};
        put_piece(&inner, &model->pieces[i]);
        put_length(w, 1, inner.at);
        put_piece(w, &model->pieces[i]);
    }
    inner = (struct writer){0};
    put_trainer(&inner, model);
    put_length(w, 2, inner.at);
    put_trainer(w, model);
    inner = (struct writer){0};
    put_normalizer(&inner);
    put_length(w, 3, inner.at);
    put_normalizer(w);
}

enum ltn_status ltn_sp_model_rewrite(const struct ltn_sp_model *model, struct ltn_sp_string *checked,
                                     struct ltn_error *err)
{
    struct writer count = {0}, out = {0};

    put_model(&count, model);
    out.data = malloc(count.at);
    if (out.data == NULL)
        return ltn_fail(err, LTN_ERR_MEMORY, "tokenizer model: no memory for %zu bytes", count.at);
    put_model(&out, model);
    *checked = (struct ltn_sp_string){(const char *)out.data, out.at};
    return LTN_OK;
}
