#include "tools/hf_config.h"

#include "model/json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CONFIG = 4 << 20, MAX_DEPTH = 64 };

struct reader {
    const cJSON *tree;
    const char *path;
    struct ltn_error *err;
};

/* The member that is there and not null. */
static const cJSON *present(const struct reader *r, const char *key)
{
    const cJSON *item = ltn_json_find(r->tree, key);
    return item && !cJSON_IsNull(item) ? item : NULL;
}

static enum ltn_status get_int(const struct reader *r, int32_t *out, const char *key, int32_t missing,
                               int64_t min, int64_t max)
{
    const cJSON *item = present(r, key);
    int64_t value = missing;
    if (item)
        LTN_TRY(ltn_json_int_item(&value, item, min, max, key, r->path, r->err));
    *out = (int32_t)value;
    return LTN_OK;
}

/* A token id; null means none, a missing key the default. */
static enum ltn_status get_id(const struct reader *r, int32_t *out, const char *key, int32_t missing)
{
    if (cJSON_IsNull(ltn_json_find(r->tree, key)))
        missing = -1;
    return get_int(r, out, key, missing, -1, LTN_MAX_VOCAB);
}

/* Truth as Python has it, of a boolean or a number. */
static enum ltn_status truth(const struct reader *r, bool *out, const cJSON *item, const char *key)
{
    if (!cJSON_IsBool(item) && !cJSON_IsNumber(item))
        return ltn_fail(r->err, LTN_ERR_INPUT, "%s: \"%s\" is neither a boolean nor a number", r->path, key);
    *out = cJSON_IsBool(item) ? cJSON_IsTrue(item) : item->valuedouble != 0;
    return LTN_OK;
}

static enum ltn_status get_bool(const struct reader *r, bool *out, const char *key, bool missing)
{
    const cJSON *item = present(r, key);
    *out = missing;
    return item ? truth(r, out, item, key) : LTN_OK;
}

static enum ltn_status get_text(const struct reader *r, const char **out, const char *key,
                                const char *missing)
{
    *out = missing;
    return present(r, key) ? ltn_json_string(out, r->tree, key, r->path, r->err) : LTN_OK;
}

static enum ltn_status get_lrpe(const struct reader *r, struct ltn_config *c)
{
    static const char key[] = "linear_use_lrpe_list";
    const cJSON *list = present(r, key);
    bool value = false;
    if (list && !cJSON_IsArray(list))
        return ltn_fail(r->err, LTN_ERR_INPUT, "%s: \"%s\" is not an array", r->path, key);
    if (!list || !list->child) {
        LTN_TRY(get_bool(r, &value, "linear_use_lrpe", false));
        memset(c->lrpe, value, (size_t)c->n_layers);
        return LTN_OK;
    }
    const cJSON *item = list->child;
    for (int32_t l = 0; l < c->n_layers; l++, item = item->next) {
        if (!item)
            return ltn_fail(r->err, LTN_ERR_INPUT,
                            "%s: \"%s\" has %d entries, expected one for each of %d layers", r->path, key, l,
                            c->n_layers);
        LTN_TRY(truth(r, &value, item, key));
        c->lrpe[l] = value;
    }
    return LTN_OK;
}

static enum ltn_status read_keys(const struct reader *r, struct ltn_hf_config *out)
{
    struct ltn_config *c = &out->config;
    const char *act = NULL, *norm = NULL;
    bool no_scale = false;
    if (!cJSON_IsObject(r->tree))
        return ltn_fail(r->err, LTN_ERR_INPUT, "%s: not a JSON object", r->path);
    LTN_TRY(get_int(r, &c->vocab_size, "vocab_size", 64000, 1, LTN_MAX_VOCAB));
    LTN_TRY(get_int(r, &c->embed_dim, "decoder_embed_dim", 1024, 1, LTN_MAX_DIM));
    LTN_TRY(get_int(r, &c->hidden_dim, "hidden_dim", 1024, 1, LTN_MAX_DIM));
    LTN_TRY(get_int(r, &c->n_layers, "decoder_layers", 24, 1, LTN_MAX_LAYERS));
    LTN_TRY(get_int(r, &c->n_heads, "decoder_attention_heads", 8, 1, LTN_MAX_HEADS));
    LTN_TRY(get_int(r, &c->glu_dim, "glu_dim", 2816, -1, LTN_MAX_DIM));
    if (c->glu_dim == -1)
        c->glu_dim = c->embed_dim;
    LTN_TRY(get_id(r, &c->bos_id, "bos_token_id", 1));
    LTN_TRY(get_id(r, &c->eos_id, "eos_token_id", 2));
    LTN_TRY(get_id(r, &c->pad_id, "pad_token_id", 0));
    LTN_TRY(get_bool(r, &no_scale, "no_scale_embedding", false));
    c->scale_embedding = !no_scale;
    LTN_TRY(get_bool(r, &c->bias, "bias", false));
    LTN_TRY(get_bool(r, &c->tied, "tie_word_embeddings", true));
    LTN_TRY(get_text(r, &norm, "norm_type", "simplermsnorm"));
    c->layer_norm = strcmp(norm, "simplermsnorm") != 0;
    LTN_TRY(get_text(r, &act, "linear_act_fun", "silu"));
    c->act = ltn_act_from_name(act);
    snprintf(out->act_name, sizeof out->act_name, "%s", act);
    out->act_known = c->act != LTN_ACT_NONE || strcmp(act, "none") == 0;
    return get_lrpe(r, c);
}

static enum ltn_status find_variant(struct ltn_config *c, const struct ltn_source *source,
                                    struct ltn_error *err)
{
    static const char gate[] = "model.layers.0.token_mixer.output_gate.0.weight";
    bool v2 = ltn_source_find(source, "model.layers.0.token_mixer.qkvu_proj.weight");
    bool tnl3 = ltn_source_find(source, "model.layers.0.token_mixer.qkv_proj.weight");
    if (v2 == tnl3)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: not a TransNormerLLM: layer 0 has %s token_mixer.qkvu_proj.weight (v1, v2) %s"
                        " token_mixer.qkv_proj.weight (TransNormerLLM3)",
                        source->dir, v2 ? "both" : "neither", v2 ? "and" : "nor");
    if (!tnl3)
        return LTN_OK;
    const struct ltn_source_tensor *t = ltn_source_find(source, gate);
    if (!t || t->rank != 2 || t->shape[0] < 1 || t->shape[0] > LTN_MAX_DIM)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%s\" is %s", source->dir, gate,
                        t ? "not a matrix of 1 to 65536 rows" : "missing");
    c->gate_dim = (int32_t)t->shape[0];
    return LTN_OK;
}

enum ltn_status ltn_hf_config_read(struct ltn_hf_config *out, const struct ltn_source *source,
                                   struct ltn_error *err)
{
    *out = (struct ltn_hf_config){0};
    char *path = NULL, *text = NULL;
    size_t bytes = 0;
    cJSON *tree = NULL;
    if (asprintf(&path, "%s/config.json", source->dir) < 0)
        return ltn_fail(err, LTN_ERR_MEMORY, "%s: no memory for a name", source->dir);
    enum ltn_status status = ltn_read_file(&text, &bytes, path, MAX_CONFIG, NULL, err);
    if (status == LTN_OK)
        status = ltn_json_parse(&tree, text, bytes, path, MAX_DEPTH, false, err);
    if (status == LTN_OK)
        status = read_keys(&(struct reader){tree, path, err}, out);
    if (status == LTN_OK)
        status = find_variant(&out->config, source, err);
    if (status == LTN_OK) {
        struct ltn_error inner = {0};
        status = ltn_config_check(&out->config, &inner);
        if (status != LTN_OK)
            status = ltn_fail(err, status, "%s: %s", path, inner.text);
    }
    cJSON_Delete(tree);
    free(text);
    free(path);
    return status;
}
