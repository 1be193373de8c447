#include "tools/hf_tokenizer.h"

#include "model/json.h"
#include "tokenizer/tokenizer.h"
#include "tools/source.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_JSON = 64 << 20, MAX_DEPTH = 64 };

struct build {
    const struct ltn_tokenizer *plain; /* the model with its own special pieces only */
    bool ranks;                        /* it is a *.tiktoken file, else SentencePiece's */
    char path[4096];                   /* of the file being read */
    int32_t vocab_size, beyond;
    struct ltn_special *special; /* [n]; texts belong to the trees */
    size_t n, room;
    struct ltn_error *err;
};

static enum ltn_status add(struct build *b, int64_t id, const char *text)
{
    if (id >= b->vocab_size) {
        b->beyond++;
        return LTN_OK;
    }
    for (size_t i = 0; i < b->n; i++) {
        bool same_id = b->special[i].id == id, same_text = strcmp(b->special[i].text, text) == 0;
        if (same_id && same_text)
            return LTN_OK;
        if (same_id || same_text)
            return ltn_fail(b->err, LTN_ERR_INPUT,
                            "%s: special token %d is \"%.60s\", but %d was \"%.60s\" before", b->path,
                            (int)id, text, b->special[i].id, b->special[i].text);
    }
    if (b->n == b->room) {
        size_t room = 2 * b->room + 16;
        struct ltn_special *more = realloc(b->special, room * sizeof *more);
        if (!more)
            return ltn_fail(b->err, LTN_ERR_MEMORY, "%s: no memory for special tokens", b->path);
        b->special = more;
        b->room = room;
    }
    b->special[b->n++] = (struct ltn_special){.id = (int32_t)id, .text = text};
    return LTN_OK;
}

/* A token by name: text, or an object with its text as "content". One that the model does not have is none.
 */
static enum ltn_status add_named(struct build *b, const cJSON *item)
{
    const cJSON *text = cJSON_IsObject(item) ? ltn_json_find(item, "content") : item;
    if (!cJSON_IsString(text))
        return LTN_OK; /* null: the checkpoint has no such token */
    int32_t id = ltn_tokenizer_find(b->plain, text->valuestring, strlen(text->valuestring));
    return id < 0 ? LTN_OK : add(b, id, text->valuestring);
}

static enum ltn_status add_names(struct build *b, const cJSON *tree)
{
    static const char *const keys[] = {"unk_token", "bos_token", "eos_token", "pad_token",
                                       "sep_token", "cls_token", "mask_token"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        LTN_TRY(add_named(b, ltn_json_find(tree, keys[i])));
    const cJSON *more = ltn_json_find(tree, "additional_special_tokens");
    for (const cJSON *c = cJSON_IsArray(more) ? more->child : NULL; c; c = c->next)
        LTN_TRY(add_named(b, c));
    return LTN_OK;
}

/* added_tokens_decoder: {"0": {"content": "<unk>", ...}, ...} */
static enum ltn_status add_decoder(struct build *b, const cJSON *tree)
{
    const cJSON *map = ltn_json_find(tree, "added_tokens_decoder");
    for (const cJSON *c = cJSON_IsObject(map) ? map->child : NULL; c; c = c->next) {
        size_t digits = strspn(c->string, "0123456789");
        const char *text = NULL;
        if (digits == 0 || digits > 9 || c->string[digits])
            return ltn_fail(b->err, LTN_ERR_INPUT, "%s: added_tokens_decoder: \"%.40s\" is no token id",
                            b->path, c->string);
        LTN_TRY(ltn_json_string(&text, c, "content", b->path, b->err));
        LTN_TRY(add(b, atoi(c->string), text));
    }
    return LTN_OK;
}

/* added_tokens.json: {"<pad>": 64000, ...} */
static enum ltn_status add_added(struct build *b, const cJSON *tree)
{
    for (const cJSON *c = cJSON_IsObject(tree) ? tree->child : NULL; c; c = c->next) {
        int64_t id = 0;
        LTN_TRY(ltn_json_int_item(&id, c, 0, INT32_MAX, c->string, b->path, b->err));
        LTN_TRY(add(b, id, c->string));
    }
    return LTN_OK;
}

/* DIR/NAME as JSON; *tree stays NULL where there is no such file. */
static enum ltn_status read_json(cJSON **tree, char path[], size_t size, const char *dir, const char *name,
                                 struct ltn_error *err)
{
    char *text = NULL;
    size_t bytes = 0;
    bool found = false;
    snprintf(path, size, "%s/%s", dir, name);
    enum ltn_status status = ltn_read_file(&text, &bytes, path, MAX_JSON, &found, err);
    if (!found)
        return LTN_OK;
    if (status == LTN_OK)
        status = ltn_json_parse(tree, text, bytes, path, MAX_DEPTH, false, err);
    free(text);
    return status;
}

static enum ltn_status get_flag(bool *out, const cJSON *tree, const char *key, const char *path,
                                struct ltn_error *err)
{
    const cJSON *item = ltn_json_find(tree, key);
    return item && !cJSON_IsNull(item) ? ltn_json_bool(out, tree, key, path, err) : LTN_OK;
}

/* What the files beside the model say. Names of special tokens count where the model has such pieces. */
static enum ltn_status read_beside(struct build *b, const char *dir, cJSON *trees[3], bool *add_bos,
                                   bool *add_eos)
{
    static const char *const names[] = {"tokenizer_config.json", "special_tokens_map.json",
                                        "added_tokens.json"};
    for (int i = 0; i < 3; i++) {
        LTN_TRY(read_json(&trees[i], b->path, sizeof b->path, dir, names[i], b->err));
        if (i == 0 && trees[i]) {
            *add_bos = !b->ranks; /* where it is silent, as the official class has it */
            LTN_TRY(get_flag(add_bos, trees[i], "add_bos_token", b->path, b->err));
            LTN_TRY(get_flag(add_eos, trees[i], "add_eos_token", b->path, b->err));
        }
        if (i < 2)
            LTN_TRY(add_decoder(b, trees[i]));
        else
            LTN_TRY(add_added(b, trees[i]));
        if (i < 2 && !b->ranks)
            LTN_TRY(add_names(b, trees[i]));
    }
    return LTN_OK;
}

/* The special tokens of TransNormerLLM3, whose vocabulary has this many ranks. */
enum { TNL3_RANKS = 100256 };
static const struct ltn_special tnl3_special[] = {{100256, "<|J2PM|>"},       {100257, "<|endoftext|>"},
                                                  {100258, "<|fim_prefix|>"}, {100259, "<|fim_middle|>"},
                                                  {100260, "<|fim_suffix|>"}, {100261, "<s>"},
                                                  {100262, "<pad>"},          {100263, "<unk>"},
                                                  {100264, "<mask>"},         {100276, "<|endofprompt|>"}};

/* The special token that tokenizer_config.json names by `key`, or else `text`, where given; -1: none. */
static int32_t find_special(const struct build *b, const cJSON *config, const char *key, const char *text)
{
    const cJSON *item = ltn_json_find(config, key);
    if (cJSON_IsObject(item))
        item = ltn_json_find(item, "content");
    if (cJSON_IsString(item))
        text = item->valuestring;
    for (size_t i = 0; text && i < b->n; i++)
        if (strcmp(b->special[i].text, text) == 0)
            return b->special[i].id;
    return -1;
}

/* The JSON that goes with out->model, which lies at `path`. */
static enum ltn_status describe(struct ltn_hf_tokenizer *out, const char *dir, const char *path,
                                struct build *b, cJSON *trees[3])
{
    bool add_bos = false, add_eos = false, known = false;
    LTN_TRY(read_beside(b, dir, trees, &add_bos, &add_eos));
    if (!b->ranks)
        return ltn_tokenizer_describe(out->model, out->bytes, add_bos, add_eos, b->special, b->n, &out->json,
                                      b->err);
    if (b->n == 0 && b->beyond == 0) {
        known = ltn_tokenizer_size(b->plain) == TNL3_RANKS;
        if (!known)
            return ltn_fail(b->err, LTN_ERR_INPUT,
                            "%s: %d ranks: expected their special tokens as added_tokens_decoder in "
                            "tokenizer_config.json or in added_tokens.json, found none",
                            path, ltn_tokenizer_size(b->plain));
        for (size_t i = 0; i < sizeof tnl3_special / sizeof *tnl3_special; i++)
            LTN_TRY(add(b, tnl3_special[i].id, tnl3_special[i].text));
    }
    return ltn_tokenizer_describe_tiktoken(
        out->model, out->bytes, add_bos, add_eos,
        find_special(b, trees[0], "bos_token", known ? "<s>" : NULL),
        find_special(b, trees[0], "eos_token", known ? "<|endoftext|>" : NULL), b->special, b->n, &out->json,
        b->err);
}

/* The model without the files beside it. */
static enum ltn_status open_plain(struct ltn_tokenizer **plain, const struct ltn_hf_tokenizer *t, bool ranks,
                                  const char *path, struct ltn_error *err)
{
    struct ltn_error inner = {0};
    char *json = NULL;
    enum ltn_status status =
        ranks ? ltn_tokenizer_describe_tiktoken(t->model, t->bytes, false, false, -1, -1, NULL, 0, &json,
                                                &inner)
              : ltn_tokenizer_describe(t->model, t->bytes, false, false, NULL, 0, &json, &inner);
    if (status == LTN_OK)
        status = ltn_tokenizer_open(plain, t->model, t->bytes, json, &inner);
    free(json);
    return status == LTN_OK ? LTN_OK : ltn_fail(err, status, "%.200s: %.280s", path, inner.text);
}

/* DIR/NAME.tiktoken; path stays as it is where there is none. */
static enum ltn_status find_ranks(char path[], size_t size, const char *dir, bool *ranks,
                                  struct ltn_error *err)
{
    enum ltn_status status = LTN_OK;
    DIR *d = opendir(dir);
    if (!d)
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot open: %s", dir, strerror(errno));
    for (struct dirent *entry; (entry = readdir(d)) != NULL && status == LTN_OK;) {
        const char *dot = strrchr(entry->d_name, '.');
        if (!dot || strcmp(dot, ".tiktoken") != 0)
            continue;
        if (*ranks || access(path, F_OK) == 0)
            status =
                ltn_fail(err, LTN_ERR_INPUT, "%.200s: expected one tokenizer, found %.100s beside %.100s",
                         dir, entry->d_name, strrchr(path, '/') + 1);
        *ranks = true;
        snprintf(path, size, "%s/%s", dir, entry->d_name);
    }
    closedir(d);
    return status;
}

static enum ltn_status read_all(struct ltn_hf_tokenizer *out, const char *dir, int32_t vocab_size,
                                struct ltn_error *err)
{
    char path[4096];
    bool found = false, ranks = false;
    struct ltn_tokenizer *plain = NULL;
    snprintf(path, sizeof path, "%s/tokenizer.model", dir);
    LTN_TRY(find_ranks(path, sizeof path, dir, &ranks, err));
    enum ltn_status status =
        ltn_read_file(&out->model, &out->bytes, path, LTN_TOKENIZER_MAX_MODEL, &found, err);
    if (!found)
        return LTN_OK;
    if (status == LTN_OK)
        status = open_plain(&plain, out, ranks, path, err);
    if (status == LTN_OK && ltn_tokenizer_size(plain) > vocab_size)
        status = ltn_fail(err, LTN_ERR_INPUT, "%s: %d pieces, but the model's vocab_size is %d", path,
                          ltn_tokenizer_size(plain), vocab_size);
    if (status == LTN_OK) {
        struct build b = {.plain = plain, .ranks = ranks, .vocab_size = vocab_size, .err = err};
        cJSON *trees[3] = {NULL, NULL, NULL};
        status = describe(out, dir, path, &b, trees);
        for (int i = 0; i < 3; i++)
            cJSON_Delete(trees[i]);
        free(b.special);
        out->beyond = b.beyond;
    }
    ltn_tokenizer_close(plain);
    return status;
}

enum ltn_status ltn_hf_tokenizer_read(struct ltn_hf_tokenizer *out, const char *dir, int32_t vocab_size,
                                      struct ltn_error *err)
{
    *out = (struct ltn_hf_tokenizer){0};
    enum ltn_status status = read_all(out, dir, vocab_size, err);
    if (status != LTN_OK)
        ltn_hf_tokenizer_free(out);
    return status;
}

void ltn_hf_tokenizer_free(struct ltn_hf_tokenizer *t)
{
    free(t->model);
    free(t->json);
    *t = (struct ltn_hf_tokenizer){0};
}
