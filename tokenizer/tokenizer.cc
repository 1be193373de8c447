#include "tokenizer/tokenizer.h"

#include "tokenizer/lookup.h"
#include "tokenizer/sp_model.h"
#include "tokenizer/tiktoken.h"
#include "tokenizer/tokens.h"
#include "tokenizer/utf8.h"

#include <algorithm>
#include <cjson/cJSON.h>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <sentencepiece_processor.h>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

using ltn::Cuts;
using ltn::Literals;
using ltn::view;
using ltn::Words;

namespace
{

constexpr size_t kWindow = 256 << 10;                     /* bytes; a segment ends here at the latest */
constexpr size_t kSlice = 64 << 10;                       /* of a feed, so that no buffer grows with it */
constexpr std::string_view kSpace = "\xE2\x96\x81";       /* U+2581, what SentencePiece writes for a space */
constexpr std::string_view kReplacement = "\xEF\xBF\xBD"; /* U+FFFD */

/* Runs f and turns what C++ throws into a status: nothing passes the C boundary. */
template <class F> enum ltn_status guarded(struct ltn_error *err, F f)
{
    try {
        return f();
    } catch (const std::bad_alloc &) {
        return ltn_fail(err, LTN_ERR_MEMORY, "tokenizer: out of memory");
    } catch (const std::exception &e) {
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer: SentencePiece failed: %s", e.what());
    } catch (...) {
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer: SentencePiece failed");
    }
}

/* For an error text. */
std::string one_line(std::string text)
{
    std::replace_if(
        text.begin(), text.end(), [](unsigned char c) { return c < ' ' || c == 0x7F; }, '?');
    return text;
}

/* ---- JSON ---- */

using Json = std::unique_ptr<cJSON, void (*)(cJSON *)>;

/* The members of an object, which must be exactly names [n], in any order. */
enum ltn_status members(const cJSON *object, const char *where, const char *const *names,
                        const cJSON **values, size_t n, struct ltn_error *err)
{
    if (!cJSON_IsObject(object))
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer JSON: %s is not an object", where);
    std::fill(values, values + n, nullptr);
    for (const cJSON *m = object->child; m != nullptr; m = m->next) {
        size_t i = 0;
        while (i < n && strcmp(m->string, names[i]) != 0)
            i++;
        if (i == n || values[i] != nullptr)
            return ltn_fail(err, LTN_ERR_INPUT, "tokenizer JSON: %s has %s key \"%s\"", where,
                            i == n ? "the unknown" : "twice the", one_line(m->string).c_str());
        values[i] = m;
    }
    for (size_t i = 0; i < n; i++)
        if (values[i] == nullptr)
            return ltn_fail(err, LTN_ERR_INPUT, "tokenizer JSON: %s has no \"%s\"", where, names[i]);
    return LTN_OK;
}

enum ltn_status integer(const cJSON *value, const char *what, int32_t *out, struct ltn_error *err)
{
    if (!cJSON_IsNumber(value) || value->valuedouble != value->valueint)
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer JSON: %s is not an integer", what);
    *out = value->valueint;
    return LTN_OK;
}

enum ltn_status parse(const char *json, Json *root, struct ltn_error *err)
{
    const size_t bytes = strnlen(json, LTN_TOKENIZER_MAX_JSON + 1);

    if (bytes > LTN_TOKENIZER_MAX_JSON)
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer JSON: more than %d bytes", LTN_TOKENIZER_MAX_JSON);
    if (strstr(json, "\\u0000") != nullptr) /* cJSON ends a string there */
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer JSON: \\u0000 is not allowed");
    const char *end = json;
    root->reset(cJSON_ParseWithLengthOpts(json, bytes + 1, &end, 1));
    if (*root == nullptr)
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer JSON: not valid from byte %zu on",
                        (size_t)(end - json));
    return LTN_OK;
}

enum ltn_status check_special(int32_t id, const char *text, struct ltn_error *err)
{
    const size_t bytes = strlen(text);

    if (id < 0 || id >= LTN_TOKENIZER_MAX_IDS)
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer: special token id %d, expected 0 to %d", id,
                        LTN_TOKENIZER_MAX_IDS - 1);
    if (bytes == 0 || bytes > LTN_TOKENIZER_MAX_PIECE)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "tokenizer: special token %d has %zu bytes of text, expected 1 to %d", id, bytes,
                        LTN_TOKENIZER_MAX_PIECE);
    if (ltn_utf8_check(text, bytes) != bytes)
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer: the text of special token %d is not UTF-8", id);
    return LTN_OK;
}

} /* namespace */

struct ltn_tokenizer {
    std::unordered_map<int32_t, std::string> special; /* id -> text */
    Literals literals;                                /* the special tokens */
    int32_t size = 0, bos = -1, eos = -1;
    bool add_bos = false, add_eos = false;
    struct ltn_tiktoken *tiktoken = nullptr; /* else it is SentencePiece's, and then: */

    std::string bytes; /* the model; `model` points into it */
    struct ltn_sp_model model = {};
    sentencepiece::SentencePieceProcessor sp;
    std::unordered_map<int32_t, int32_t> twins; /* id -> id of the reserved piece of the same text, which
                                                   SentencePiece decodes in its place */
    Literals user_defined;                      /* these the normaliser leaves as they are */
    Cuts cuts;
    size_t segment = 0; /* bytes; from here on a segment ends at the first place that is safe. Small ones stay
                           in the cache; a unigram model's are as long as its sums stay exact enough */
    size_t longest_unit = 4; /* bytes; the most that the normaliser looks at to take one step */

    ~ltn_tokenizer()
    {
        ltn_tiktoken_close(tiktoken);
        ltn_sp_model_free(&model);
    }
    enum ltn_status open(const void *data, size_t n, const char *json, struct ltn_error *err);
    enum ltn_status open_model(const void *data, size_t n, struct ltn_error *err);
    enum ltn_status open_tiktoken(const void *data, size_t n, struct ltn_error *err);
    enum ltn_status open_json(const cJSON *root, struct ltn_error *err);
    enum ltn_status add_special(const cJSON *list, struct ltn_error *err);
    int32_t piece_id(std::string_view text) const;
};

/* -1: not a piece. */
int32_t ltn_tokenizer::piece_id(std::string_view text) const
{
    if (tiktoken != nullptr)
        return ltn_bpe_find(ltn_tiktoken_bpe(tiktoken), text.data(), text.size());
    if (text.empty())
        return -1;
    const int id = sp.PieceToId(text); /* the unknown piece where there is none */
    return view(model.pieces[id].text) == text ? id : -1;
}

enum ltn_status ltn_tokenizer::open_model(const void *data, size_t n, struct ltn_error *err)
{
    if (n > LTN_TOKENIZER_MAX_MODEL)
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer model: it has %zu bytes, at most %d are allowed", n,
                        LTN_TOKENIZER_MAX_MODEL);
    bytes.assign((const char *)data, n);
    LTN_TRY(ltn_sp_model_read(&model, bytes.data(), n, err));
    struct ltn_sp_string checked;
    LTN_TRY(ltn_sp_model_rewrite(&model, &checked, err));
    const std::unique_ptr<char, void (*)(void *)> owner(const_cast<char *>(checked.data), free);
    const auto status = sp.LoadFromSerializedProto(view(checked));
    if (!status.ok())
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer model: SentencePiece says: %s",
                        one_line(status.ToString()).c_str());
    if (sp.GetPieceSize() != (int)model.n_pieces)
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer model: SentencePiece read %d pieces of %zu",
                        sp.GetPieceSize(), model.n_pieces);

    std::vector<Literals::Item> items;
    for (size_t i = 0; i < model.n_pieces; i++) {
        const int32_t id = (int32_t)i;
        const std::string_view text = view(model.pieces[i].text);
        const int32_t found = piece_id(text);
        if (found != id && found >= 0)
            twins[id] = found;
        if (model.pieces[i].type == LTN_SP_USER_DEFINED)
            items.push_back({text, id});
        if (model.pieces[i].type == LTN_SP_CONTROL && text == view(model.bos_piece))
            bos = id;
        if (model.pieces[i].type == LTN_SP_CONTROL && text == view(model.eos_piece))
            eos = id;
    }
    user_defined.assign(std::move(items));
    cuts.learn(model);
    longest_unit = std::max({longest_unit, user_defined.longest, model.charsmap.max_key});
    segment = model.type == LTN_SP_BPE ? 4 << 10 : 64 << 10;
    size = (int32_t)model.n_pieces;
    return LTN_OK;
}

enum ltn_status ltn_tokenizer::add_special(const cJSON *list, struct ltn_error *err)
{
    static const char *const names[] = {"id", "text"};
    std::vector<Literals::Item> items;
    std::set<std::string_view> texts;
    const cJSON *value[2];

    if (!cJSON_IsArray(list))
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer JSON: \"special\" is not an array");
    for (const cJSON *entry = list->child; entry != nullptr; entry = entry->next) {
        LTN_TRY(members(entry, "an entry of \"special\"", names, value, 2, err));
        int32_t id = -1;
        LTN_TRY(integer(value[0], "the id of a special token", &id, err));
        if (!cJSON_IsString(value[1]))
            return ltn_fail(err, LTN_ERR_INPUT,
                            "tokenizer JSON: the text of a special token is not a string");
        LTN_TRY(check_special(id, value[1]->valuestring, err));
        const auto added = special.emplace(id, value[1]->valuestring);
        if (!added.second || !texts.insert(added.first->second).second)
            return ltn_fail(err, LTN_ERR_INPUT,
                            "tokenizer JSON: the id or the text of special token %d stands there twice", id);
        if (special.size() > LTN_TOKENIZER_MAX_SPECIAL)
            return ltn_fail(err, LTN_ERR_INPUT, "tokenizer JSON: more than %d special tokens",
                            LTN_TOKENIZER_MAX_SPECIAL);
        items.push_back({added.first->second, id});
        size = std::max(size, id + 1);
    }
    literals.assign(std::move(items));
    return LTN_OK;
}

enum ltn_status ltn_tokenizer::open_tiktoken(const void *data, size_t n, struct ltn_error *err)
{
    LTN_TRY(ltn_tiktoken_open(&tiktoken, data, n, err));
    size = ltn_tiktoken_bpe(tiktoken)->n;
    return LTN_OK;
}

/* The model is open. */
enum ltn_status ltn_tokenizer::open_json(const cJSON *root, struct ltn_error *err)
{
    static const char *const names[] = {"type", "add_bos", "add_eos", "special", "pattern", "bos", "eos"};
    const char *const type = tiktoken != nullptr ? "tiktoken" : "sentencepiece";
    const cJSON *value[7];

    LTN_TRY(members(root, "it", names, value, tiktoken != nullptr ? 7 : 4, err));
    if (!cJSON_IsString(value[0]) || strcmp(value[0]->valuestring, type) != 0)
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer JSON: \"type\" is not \"%s\"", type);
    for (int i = 1; i <= 2; i++)
        if (!cJSON_IsBool(value[i]))
            return ltn_fail(err, LTN_ERR_INPUT, "tokenizer JSON: \"%s\" is neither true nor false", names[i]);
    add_bos = cJSON_IsTrue(value[1]);
    add_eos = cJSON_IsTrue(value[2]);
    LTN_TRY(add_special(value[3], err));
    if (tiktoken != nullptr) {
        if (!cJSON_IsString(value[4]) || strcmp(value[4]->valuestring, LTN_TIKTOKEN_PATTERN) != 0)
            return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                            "tokenizer JSON: \"pattern\" is not the one that is known, %s",
                            LTN_TIKTOKEN_PATTERN);
        LTN_TRY(integer(value[5], "\"bos\"", &bos, err));
        LTN_TRY(integer(value[6], "\"eos\"", &eos, err));
        for (const int32_t id : {bos, eos})
            if (id != -1 && special.count(id) == 0)
                return ltn_fail(err, LTN_ERR_INPUT, "tokenizer JSON: \"%s\" %d is no special token",
                                id == bos ? "bos" : "eos", id);
    }
    if ((add_bos && bos < 0) || (add_eos && eos < 0))
        return ltn_fail(err, LTN_ERR_INPUT,
                        "tokenizer JSON: \"add_%s\" is true, but the model has no such piece",
                        add_bos && bos < 0 ? "bos" : "eos");
    return LTN_OK;
}

enum ltn_status ltn_tokenizer::open(const void *data, size_t n, const char *json, struct ltn_error *err)
{
    Json root(nullptr, cJSON_Delete);

    LTN_TRY(parse(json, &root, err));
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(root.get(), "type");
    const bool ranks = cJSON_IsString(type) && strcmp(type->valuestring, "tiktoken") == 0;
    LTN_TRY(ranks ? open_tiktoken(data, n, err) : open_model(data, n, err));
    return open_json(root.get(), err);
}

enum ltn_status ltn_tokenizer_open(struct ltn_tokenizer **out, const void *model, size_t bytes,
                                   const char *json, struct ltn_error *err)
{
    *out = nullptr;
    return guarded(err, [&] {
        auto tokenizer = std::make_unique<ltn_tokenizer>();
        LTN_TRY(tokenizer->open(model, bytes, json, err));
        *out = tokenizer.release();
        return LTN_OK;
    });
}

void ltn_tokenizer_close(struct ltn_tokenizer *tokenizer)
{
    delete tokenizer;
}

int32_t ltn_tokenizer_size(const struct ltn_tokenizer *tokenizer)
{
    return tokenizer->size;
}

int32_t ltn_tokenizer_bos(const struct ltn_tokenizer *tokenizer)
{
    return tokenizer->bos;
}

int32_t ltn_tokenizer_eos(const struct ltn_tokenizer *tokenizer)
{
    return tokenizer->eos;
}

const char *ltn_tokenizer_piece(const struct ltn_tokenizer *tokenizer, int32_t id, size_t *bytes)
{
    struct ltn_token token;

    if (!ltn_tokenizer_token(tokenizer, id, &token))
        return nullptr;
    *bytes = token.text.bytes; /* a twin has the same */
    return token.text.data;
}

int32_t ltn_tokenizer_find(const struct ltn_tokenizer *tokenizer, const char *piece, size_t bytes)
{
    const Literals::Item *item = tokenizer->literals.find({piece, bytes});

    return item != nullptr ? item->id : tokenizer->piece_id({piece, bytes});
}

bool ltn_tokenizer_token(const struct ltn_tokenizer *tokenizer, int32_t id, struct ltn_token *token)
{
    const auto special = tokenizer->special.find(id);

    if (special != tokenizer->special.end()) {
        *token = {{special->second.data(), special->second.size()}, true, LTN_SP_CONTROL};
        return true;
    }
    if (id >= 0 && tokenizer->tiktoken != nullptr) {
        const struct ltn_bpe *bpe = ltn_tiktoken_bpe(tokenizer->tiktoken);
        if (id < bpe->n)
            *token = {{bpe->bytes + bpe->from[id], bpe->from[id + 1] - bpe->from[id]}, false, LTN_SP_NORMAL};
        return id < bpe->n;
    }
    if (id < 0 || (size_t)id >= tokenizer->model.n_pieces)
        return false;
    const auto twin = tokenizer->twins.find(id);
    const struct ltn_sp_piece &piece =
        tokenizer->model.pieces[twin != tokenizer->twins.end() ? twin->second : id];
    *token = {piece.text, false, piece.type};
    return true;
}

const struct ltn_sp_model *ltn_tokenizer_model(const struct ltn_tokenizer *tokenizer)
{
    return tokenizer->tiktoken != nullptr ? nullptr : &tokenizer->model;
}

/* What both kinds of JSON have. */
static bool add_common(cJSON *root, const char *type, bool add_bos, bool add_eos)
{
    return root != nullptr && cJSON_AddStringToObject(root, "type", type) != nullptr &&
           cJSON_AddBoolToObject(root, "add_bos", add_bos) != nullptr &&
           cJSON_AddBoolToObject(root, "add_eos", add_eos) != nullptr;
}

static bool add_entry(cJSON *list, int32_t id, const char *text)
{
    cJSON *entry = cJSON_CreateObject();
    return entry != nullptr && cJSON_AddItemToArray(list, entry) &&
           cJSON_AddNumberToObject(entry, "id", id) != nullptr &&
           cJSON_AddStringToObject(entry, "text", text) != nullptr;
}

/* Prints the tree, unless !ok, and sees that the tokenizer, whose model is open, takes it: bos, eos, texts
 * given twice. */
static enum ltn_status print(ltn_tokenizer *tokenizer, const cJSON *root, bool ok, char **json,
                             struct ltn_error *err)
{
    char *text = ok ? cJSON_PrintUnformatted(root) : nullptr;
    Json again(nullptr, cJSON_Delete);

    if (text == nullptr)
        return ltn_fail(err, LTN_ERR_MEMORY, "tokenizer: out of memory for the JSON");
    enum ltn_status status = parse(text, &again, err);
    if (status == LTN_OK)
        status = tokenizer->open_json(again.get(), err);
    if (status == LTN_OK)
        *json = text;
    else
        free(text);
    return status;
}

enum ltn_status ltn_tokenizer_describe(const void *model, size_t bytes, bool add_bos, bool add_eos,
                                       const struct ltn_special *extra, size_t n_extra, char **json,
                                       struct ltn_error *err)
{
    *json = nullptr;
    return guarded(err, [&] {
        ltn_tokenizer tokenizer;
        LTN_TRY(tokenizer.open_model(model, bytes, err));
        std::vector<std::string> texts(tokenizer.model.n_pieces); /* [id]; empty: not special */
        for (size_t i = 0; i < tokenizer.model.n_pieces; i++) {
            const struct ltn_sp_piece &piece = tokenizer.model.pieces[i];
            if (piece.type == LTN_SP_UNKNOWN || piece.type == LTN_SP_CONTROL)
                texts[i] = view(piece.text);
        }
        for (size_t i = 0; i < n_extra; i++) {
            LTN_TRY(check_special(extra[i].id, extra[i].text, err));
            if ((size_t)extra[i].id >= texts.size())
                texts.resize((size_t)extra[i].id + 1);
            texts[extra[i].id] = extra[i].text;
        }

        const Json root(cJSON_CreateObject(), cJSON_Delete);
        cJSON *list = nullptr;
        bool ok = add_common(root.get(), "sentencepiece", add_bos, add_eos) &&
                  (list = cJSON_AddArrayToObject(root.get(), "special")) != nullptr;
        for (size_t id = 0; ok && id < texts.size(); id++)
            ok = texts[id].empty() || add_entry(list, (int32_t)id, texts[id].c_str());
        return print(&tokenizer, root.get(), ok, json, err);
    });
}

enum ltn_status ltn_tokenizer_describe_tiktoken(const void *model, size_t bytes, bool add_bos, bool add_eos,
                                                int32_t bos, int32_t eos, const struct ltn_special *special,
                                                size_t n_special, char **json, struct ltn_error *err)
{
    *json = nullptr;
    return guarded(err, [&] {
        ltn_tokenizer tokenizer;
        LTN_TRY(tokenizer.open_tiktoken(model, bytes, err));
        const Json root(cJSON_CreateObject(), cJSON_Delete);
        cJSON *list = nullptr;
        bool ok = add_common(root.get(), "tiktoken", add_bos, add_eos) &&
                  cJSON_AddStringToObject(root.get(), "pattern", LTN_TIKTOKEN_PATTERN) != nullptr &&
                  cJSON_AddNumberToObject(root.get(), "bos", bos) != nullptr &&
                  cJSON_AddNumberToObject(root.get(), "eos", eos) != nullptr &&
                  (list = cJSON_AddArrayToObject(root.get(), "special")) != nullptr;
        for (size_t i = 0; ok && i < n_special; i++) {
            LTN_TRY(check_special(special[i].id, special[i].text, err));
            ok = add_entry(list, special[i].id, special[i].text);
        }
        return print(&tokenizer, root.get(), ok, json, err);
    });
}

/* ---- text to ids ---- */

/* Special tokens are split off; what lies between goes to tiktoken or, normalised, to SentencePiece. */
struct ltn_encoder {
    const struct ltn_tokenizer *t;
    ltn_ids_fn *emit;
    void *ctx;

    bool begun = false; /* bos is out */
    std::string text;   /* not yet searched for special tokens: less than the longest of them */
    /* The run: what lies between two special tokens. */
    struct ltn_tiktoken_run *pieces = nullptr; /* NULL: SentencePiece's */
    std::string run;          /* not yet taken in there, or normalised: less than the longest unit */
    bool run_begun = false;   /* something of it counts: the dummy prefix is out */
    bool after_space = false; /* further spaces are dropped (remove_extra_whitespaces) */
    size_t held_spaces = 0;   /* to be dropped should the run end here (remove_extra_whitespaces) */
    std::string segment;      /* normalised, not yet given to SentencePiece */
    std::vector<int> ids, word_ids;
    Words words;

    ~ltn_encoder()
    {
        ltn_tiktoken_run_free(pieces);
    }
    enum ltn_status create(const struct ltn_tokenizer *tokenizer, ltn_ids_fn *fn, void *fn_ctx,
                           struct ltn_error *err)
    {
        t = tokenizer;
        emit = fn;
        ctx = fn_ctx;
        return t->tiktoken == nullptr ? LTN_OK
                                      : ltn_tiktoken_run_create(&pieces, t->tiktoken, fn, fn_ctx, err);
    }
    enum ltn_status split(bool last, struct ltn_error *err);
    enum ltn_status advance(bool last, struct ltn_error *err);
    enum ltn_status normalize(bool last, struct ltn_error *err);
    enum ltn_status put_unit(std::string_view unit, struct ltn_error *err);
    enum ltn_status put_char(std::string_view c, struct ltn_error *err);
    enum ltn_status append(std::string_view c, struct ltn_error *err);
    enum ltn_status end_run(struct ltn_error *err);
    enum ltn_status flush(struct ltn_error *err);
    enum ltn_status settle(struct ltn_error *err);
    enum ltn_status encode(std::string_view word, struct ltn_error *err);
    enum ltn_status emit_one(int32_t id, struct ltn_error *err)
    {
        return emit(ctx, &id, 1, err);
    }
    enum ltn_status begin(struct ltn_error *err)
    {
        const bool due = !begun && t->add_bos;
        begun = true;
        return due ? emit_one(t->bos, err) : LTN_OK;
    }
};

/* Takes special tokens out of `text`. Where its end might begin one, the rest waits, unless it is the last.
 */
enum ltn_status ltn_encoder::split(bool last, struct ltn_error *err)
{
    size_t at = 0;

    while (at < text.size()) {
        const size_t from = at;
        const Literals::Item *item = nullptr;
        for (bool more; at < text.size(); at++) {
            if (!t->literals.begins[(unsigned char)text[at]])
                continue;
            item = t->literals.match(text.data() + at, text.size() - at, &more);
            if (item != nullptr || (more && !last)) {
                if (more && !last) { /* may yet become a longer one */
                    run.append(text, from, at - from);
                    text.erase(0, at);
                    return advance(false, err);
                }
                break;
            }
        }
        run.append(text, from, at - from);
        if (item != nullptr) {
            LTN_TRY(end_run(err));
            LTN_TRY(emit_one(item->id, err));
            at += item->text.size();
        }
    }
    text.clear();
    return advance(false, err);
}

/* Takes in what there is of the run. */
enum ltn_status ltn_encoder::advance(bool last, struct ltn_error *err)
{
    if (pieces == nullptr)
        return normalize(last, err);
    size_t used;
    LTN_TRY(ltn_tiktoken_run_feed(pieces, run.data(), run.size(), last, &used, err));
    run.erase(0, used);
    return LTN_OK;
}

/* Normalizer::NormalizePrefix of SentencePiece, unit by unit: a user-defined piece stays as it is, else the
 * longest rule applies, else one character is copied, or a byte that begins none replaced. A unit is taken
 * once all bytes that could belong to it are there. */
enum ltn_status ltn_encoder::normalize(bool last, struct ltn_error *err)
{
    size_t at = 0;

    while (at < run.size() && (last || run.size() - at >= t->longest_unit)) {
        const char *p = run.data() + at;
        const size_t left = run.size() - at;
        const Literals::Item *item = nullptr;
        const char *rule = nullptr;
        std::string_view unit;
        uint32_t c;
        bool more;
        size_t used;

        if (t->user_defined.begins[(unsigned char)*p])
            item = t->user_defined.match(p, left, &more);
        if (item != nullptr) {
            unit = item->text;
            used = unit.size();
        } else if ((used = ltn_sp_charsmap_match(&t->model.charsmap, p, left, &rule)) > 0) {
            unit = rule;
        } else if ((used = ltn_utf8_decode(p, left, &c)) > 0) {
            unit = {p, used};
        } else {
            unit = kReplacement;
            used = 1;
        }
        at += used;
        LTN_TRY(put_unit(unit, err));
    }
    run.erase(0, at);
    return LTN_OK;
}

/* Normalizer::Normalize: dummy prefix, spaces that collapse, spaces at both ends that fall away. */
enum ltn_status ltn_encoder::put_unit(std::string_view unit, struct ltn_error *err)
{
    const struct ltn_sp_model &m = t->model;
    const std::string_view space = m.escape_whitespaces ? kSpace : " ";

    if (!run_begun) {
        if (m.remove_extra_whitespaces && unit == " ")
            return LTN_OK;
        run_begun = true;
        after_space = m.remove_extra_whitespaces;
        if (m.add_dummy_prefix && !m.whitespace_as_suffix)
            LTN_TRY(put_char(space, err));
    }
    while (after_space && !unit.empty() && unit[0] == ' ')
        unit.remove_prefix(1);
    if (unit.empty())
        return LTN_OK;
    after_space = m.remove_extra_whitespaces && unit.back() == ' ';
    for (size_t at = 0, n; at < unit.size(); at += n) {
        n = ltn_utf8_length((unsigned char)unit[at]);
        LTN_TRY(put_char(unit[at] == ' ' ? space : unit.substr(at, n), err));
    }
    return LTN_OK;
}

/* Holds spaces back where the end of the run would take them away. */
enum ltn_status ltn_encoder::put_char(std::string_view c, struct ltn_error *err)
{
    const std::string_view space = t->model.escape_whitespaces ? kSpace : " ";

    if (t->model.remove_extra_whitespaces) {
        if (c == space) {
            held_spaces++;
            return LTN_OK;
        }
        for (; held_spaces > 0; held_spaces--)
            LTN_TRY(append(space, err));
    }
    return append(c, err);
}

/* Where a segment ends depends on the run alone, not on how it was fed. */
enum ltn_status ltn_encoder::append(std::string_view c, struct ltn_error *err)
{
    if (segment.size() >= t->segment) {
        size_t last = segment.size() - 1;
        uint32_t before = 0, after = 0;
        while (last > 0 && ltn_utf8_is_trail((unsigned char)segment[last]))
            last--;
        ltn_utf8_decode(segment.data() + last, segment.size() - last, &before);
        ltn_utf8_decode(c.data(), c.size(), &after);
        if (segment.size() >= kWindow || t->cuts.safe(before, after)) {
            if (t->model.type == LTN_SP_BPE) /* a long text, then */
                words.use();
            LTN_TRY(flush(err));
        }
    }
    segment.append(c);
    return LTN_OK;
}

enum ltn_status ltn_encoder::end_run(struct ltn_error *err)
{
    const struct ltn_sp_model &m = t->model;

    LTN_TRY(advance(true, err));
    if (run_begun && m.add_dummy_prefix && m.whitespace_as_suffix)
        LTN_TRY(append(m.escape_whitespaces ? kSpace : " ", err));
    run_begun = false;
    held_spaces = 0;
    return flush(err);
}

/* A long text goes on word by word, a word being what lies between safe places: most are known. Not so with a
 * unigram model, whose sums would begin anew at each. */
enum ltn_status ltn_encoder::flush(struct ltn_error *err)
{
    const std::string_view all = segment;
    size_t from = 0;
    uint32_t before = 0, c = 0;

    if (all.empty())
        return LTN_OK;
    ids.clear();
    if (words.in_use()) {
        for (size_t at = 0; at < all.size(); before = c) {
            const size_t n = ltn_utf8_decode(all.data() + at, all.size() - at, &c);
            if (at > from && t->cuts.safe(before, c)) {
                LTN_TRY(encode(all.substr(from, at - from), err));
                from = at;
            }
            at += n;
        }
    }
    LTN_TRY(encode(all.substr(from), err));
    segment.clear();
    return ids.empty() ? LTN_OK : emit(ctx, ids.data(), ids.size(), err);
}

/* Flushes the segment up to its last safe place. */
enum ltn_status ltn_encoder::settle(struct ltn_error *err)
{
    size_t cut = 0;
    uint32_t before = 0, c = 0;

    if (pieces != nullptr)
        return ltn_tiktoken_run_settle(pieces, err);
    for (size_t at = 0; at < segment.size(); before = c) {
        const size_t n = ltn_utf8_decode(segment.data() + at, segment.size() - at, &c);
        if (at > 0 && t->cuts.safe(before, c))
            cut = at;
        at += n;
    }
    const std::string rest = segment.substr(cut);
    segment.resize(cut);
    LTN_TRY(flush(err));
    segment = rest;
    return LTN_OK;
}

enum ltn_status ltn_encoder::encode(std::string_view word, struct ltn_error *err)
{
    Words::Slot *slot = words.slot(word);

    if (slot != nullptr && Words::holds(*slot, word)) {
        ids.insert(ids.end(), slot->ids, slot->ids + slot->n);
        return LTN_OK;
    }
    const auto status = t->sp.Encode(word, &word_ids);
    if (!status.ok())
        return ltn_fail(err, LTN_ERR_INPUT, "tokenizer: SentencePiece says: %s",
                        one_line(status.ToString()).c_str());
    ids.insert(ids.end(), word_ids.begin(), word_ids.end());
    if (slot != nullptr)
        Words::keep(*slot, word, word_ids);
    return LTN_OK;
}

enum ltn_status ltn_encoder_create(struct ltn_encoder **out, const struct ltn_tokenizer *tokenizer,
                                   ltn_ids_fn *emit, void *ctx, struct ltn_error *err)
{
    *out = nullptr;
    return guarded(err, [&] {
        auto encoder = std::make_unique<ltn_encoder>();
        LTN_TRY(encoder->create(tokenizer, emit, ctx, err));
        *out = encoder.release();
        return LTN_OK;
    });
}

enum ltn_status ltn_encoder_feed(struct ltn_encoder *encoder, const char *text, size_t bytes,
                                 struct ltn_error *err)
{
    return guarded(err, [&] {
        LTN_TRY(encoder->begin(err));
        for (size_t at = 0; at < bytes; at += kSlice) {
            encoder->text.append(text + at, std::min(kSlice, bytes - at));
            LTN_TRY(encoder->split(false, err));
        }
        return LTN_OK;
    });
}

enum ltn_status ltn_encoder_settle(struct ltn_encoder *encoder, struct ltn_error *err)
{
    return guarded(err, [&] { return encoder->settle(err); });
}

enum ltn_status ltn_encoder_finish(struct ltn_encoder *encoder, struct ltn_error *err)
{
    return guarded(err, [&] {
        LTN_TRY(encoder->begin(err));
        LTN_TRY(encoder->split(true, err));
        LTN_TRY(encoder->end_run(err));
        encoder->begun = false;
        return encoder->t->add_eos ? encoder->emit_one(encoder->t->eos, err) : LTN_OK;
    });
}

void ltn_encoder_free(struct ltn_encoder *encoder)
{
    delete encoder;
}

static enum ltn_status collect(void *ctx, const int32_t *ids, size_t n, struct ltn_error *)
{
    auto *all = static_cast<std::vector<int32_t> *>(ctx);

    all->insert(all->end(), ids, ids + n);
    return LTN_OK;
}

enum ltn_status ltn_tokenize(const struct ltn_tokenizer *tokenizer, const char *text, size_t bytes,
                             int32_t **ids, size_t *n, struct ltn_error *err)
{
    *ids = nullptr;
    *n = 0;
    return guarded(err, [&] {
        std::vector<int32_t> all;
        ltn_encoder encoder;
        LTN_TRY(encoder.create(tokenizer, collect, &all, err));
        LTN_TRY(ltn_encoder_feed(&encoder, text, bytes, err));
        LTN_TRY(ltn_encoder_finish(&encoder, err));
        if (all.empty())
            return LTN_OK;
        *ids = static_cast<int32_t *>(malloc(all.size() * sizeof **ids));
        if (*ids == nullptr)
            throw std::bad_alloc();
        memcpy(*ids, all.data(), all.size() * sizeof **ids);
        *n = all.size();
        return LTN_OK;
    });
}
