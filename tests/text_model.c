#include "tests/text_model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support.h"
#include "tokenizer/tokenizer.h"

/* ---- a SentencePiece model, as the protocol buffer message ModelProto --------------------------------- */

/* The vocabulary is larger than the tokenizer: its last ids have no text. */
enum { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, BYTE = 6, MAX_BYTES = 65536, VOCABULARY = 360 };

struct proto {
    uint8_t data[MAX_BYTES];
    size_t bytes;
    int n_pieces;
};

static void put_varint(struct proto *p, unsigned value)
{
    for (; value >= 0x80; value >>= 7)
        p->data[p->bytes++] = (uint8_t)(value | 0x80);
    p->data[p->bytes++] = (uint8_t)value;
}

static void put_number(struct proto *p, unsigned field, unsigned value)
{
    put_varint(p, field << 3);
    put_varint(p, value);
}

/* pieces = 1 {piece = 1, score = 2, type = 3}; earlier pieces score higher, so they merge first */
static void put_piece(struct proto *p, const char *text, unsigned type)
{
    float score = -(float)p->n_pieces++;
    unsigned length = (unsigned)strlen(text);
    put_varint(p, 1 << 3 | 2);
    put_varint(p, 2 + length + 5 + 2);
    put_varint(p, 1 << 3 | 2);
    put_varint(p, length);
    memcpy(p->data + p->bytes, text, length);
    p->bytes += length;
    put_varint(p, 2 << 3 | 5);
    memcpy(p->data + p->bytes, &score, 4);
    p->bytes += 4;
    put_number(p, 3, type);
}

static void make_sentencepiece(struct proto *p)
{
    static const char *const merges[] = {"th",
                                         "he",
                                         "in",
                                         "er",
                                         "an",
                                         "\xe2\x96\x81t",
                                         "\xe2\x96\x81"
                                         "a",
                                         "the",
                                         "ing",
                                         "and",
                                         "ed",
                                         "\xe2\x96\x81s",
                                         "on",
                                         "re",
                                         "ou",
                                         "st",
                                         "\xe2\x96\x81w",
                                         "ll",
                                         "at",
                                         "or"};
    char text[8];

    put_piece(p, "<unk>", UNKNOWN);
    put_piece(p, "<s>", CONTROL);
    put_piece(p, "</s>", CONTROL);
    for (int b = 0; b < 256; b++) {
        snprintf(text, sizeof text, "<0x%02X>", b);
        put_piece(p, text, BYTE);
    }
    for (size_t i = 0; i < sizeof merges / sizeof *merges; i++)
        put_piece(p, merges[i], NORMAL);
    put_piece(p, "\xe2\x96\x81", NORMAL); /* the space */
    put_piece(p, "\xc3\xa9", NORMAL);     /* e acute */
    for (char c = 'a'; c <= 'z'; c++)
        put_piece(p, (char[]){c, 0}, NORMAL);
    for (char c = 'A'; c <= 'Z'; c++)
        put_piece(p, (char[]){c, 0}, NORMAL);
    for (const char *c = ".,!?'\"-:;0123456789"; *c; c++)
        put_piece(p, (char[]){*c, 0}, NORMAL);

    struct proto trainer = {.bytes = 0}, normalizer = {.bytes = 0};
    put_number(&trainer, 3, 2);    /* model_type: BPE */
    put_number(&trainer, 35, 1);   /* byte_fallback */
    put_number(&normalizer, 3, 1); /* add_dummy_prefix */
    put_number(&normalizer, 4, 0); /* remove_extra_whitespaces */
    put_number(&normalizer, 5, 1); /* escape_whitespaces */
    const struct proto *const parts[] = {&trainer, &normalizer};
    for (unsigned i = 0; i < 2; i++) {
        put_varint(p, (2 + i) << 3 | 2);
        put_varint(p, (unsigned)parts[i]->bytes);
        memcpy(p->data + p->bytes, parts[i]->data, parts[i]->bytes);
        p->bytes += parts[i]->bytes;
    }
}

/* ---- models -------------------------------------------------------------------------------------------- */

static struct ltn_config small(int bos_id, int eos_id)
{
    struct ltn_config config = {.vocab_size = VOCABULARY,
                                .embed_dim = 64,
                                .hidden_dim = 64,
                                .n_layers = 3,
                                .n_heads = 2,
                                .glu_dim = 96,
                                .act = LTN_ACT_SILU,
                                .tied = true,
                                .scale_embedding = true,
                                .bos_id = bos_id,
                                .eos_id = eos_id,
                                .pad_id = -1};
    config.lrpe[0] = 1;
    return config;
}

void test_write_token_model(const char *path, int bos_id, int eos_id)
{
    test_write_model(small(bos_id, eos_id), LTN_F32, 5, path);
}

void test_write_rounded_model(const char *path, int bos_id, int eos_id)
{
    test_write_model(small(bos_id, eos_id), LTN_BF16, 5, path);
}

void test_write_text_model(const char *path, int bos_id, int eos_id)
{
    struct proto *model = calloc(1, sizeof *model);
    struct ltn_error err;
    char *json;

    if (!model)
        exit(1);
    make_sentencepiece(model);
    if (ltn_tokenizer_describe(model->data, model->bytes, false, false, NULL, 0, &json, &err)) {
        fprintf(stderr, "text model: %s\n", err.text);
        exit(1);
    }
    test_write_model_with(small(bos_id, eos_id), LTN_F32, 5, model->data, model->bytes, json, path);
    free(json);
    free(model);
}

void test_write_tnl3_model(const char *path, int n_layers, enum ltn_dtype dtype)
{
    struct ltn_config config = {.vocab_size = 77,
                                .embed_dim = 96,
                                .hidden_dim = 96,
                                .n_layers = n_layers,
                                .n_heads = 3,
                                .glu_dim = 80,
                                .gate_dim = 8,
                                .act = LTN_ACT_SILU,
                                .layer_norm = true,
                                .bias = true,
                                .bos_id = -1,
                                .eos_id = -1,
                                .pad_id = -1};
    config.lrpe[0] = config.lrpe[3] = 1;
    test_write_model(config, dtype, 9, path);
}
