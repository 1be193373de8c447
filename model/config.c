#include "model/config.h"

#include "model/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- checks ------------------------------------------------------------------------------------------- */

static enum ltn_status check_range(const char *key, int64_t value, int64_t low, int64_t high,
                                   struct ltn_error *err)
{
    if (value >= low && value <= high)
        return LTN_OK;
    return ltn_fail(err, LTN_ERR_INPUT, "config: %s is %lld, expected %lld..%lld", key, (long long)value,
                    (long long)low, (long long)high);
}

enum ltn_status ltn_config_check(struct ltn_config *c, struct ltn_error *err)
{
    LTN_TRY(check_range("vocab_size", c->vocab_size, 1, LTN_MAX_VOCAB, err));
    LTN_TRY(check_range("decoder_embed_dim", c->embed_dim, 1, LTN_MAX_DIM, err));
    LTN_TRY(check_range("hidden_dim", c->hidden_dim, 1, LTN_MAX_DIM, err));
    LTN_TRY(
        check_range("decoder_layers (the slopes divide by one less)", c->n_layers, 2, LTN_MAX_LAYERS, err));
    LTN_TRY(check_range("decoder_attention_heads", c->n_heads, 1, LTN_MAX_HEADS, err));
    LTN_TRY(check_range("glu_dim", c->glu_dim, 1, LTN_MAX_DIM, err));
    LTN_TRY(check_range("gate_dim", c->gate_dim, 0, LTN_MAX_DIM, err));
    LTN_TRY(check_range("bos_token_id", c->bos_id, -1, c->vocab_size - 1, err));
    LTN_TRY(check_range("eos_token_id", c->eos_id, -1, c->vocab_size - 1, err));
    LTN_TRY(check_range("pad_token_id", c->pad_id, -1, c->vocab_size - 1, err));
    if (c->hidden_dim % c->n_heads)
        return ltn_fail(err, LTN_ERR_INPUT, "config: hidden_dim %d is not a multiple of %d heads",
                        c->hidden_dim, c->n_heads);
    c->head_dim = c->hidden_dim / c->n_heads;
    LTN_TRY(check_range("hidden_dim / decoder_attention_heads", c->head_dim, 1, LTN_MAX_HEAD_DIM, err));
    if (c->hidden_dim != c->embed_dim) {
        if (c->gate_dim)
            return ltn_fail(err, LTN_ERR_INPUT,
                            "config: TNL3 (gate_dim %d) needs hidden_dim %d == decoder_embed_dim %d",
                            c->gate_dim, c->hidden_dim, c->embed_dim);
        for (int32_t l = 0; l < c->n_layers; l++)
            if (c->lrpe[l])
                return ltn_fail(err, LTN_ERR_INPUT,
                                "config: LRPE in layer %d needs hidden_dim %d == decoder_embed_dim %d", l,
                                c->hidden_dim, c->embed_dim);
    }
    return LTN_OK;
}

/* ---- JSON ---------------------------------------------------------------------------------------------- */

/* The first name of each map is the one that is written. */
static const struct {
    const char *name;
    enum ltn_act act;
} act_names[] = {
    {"swish", LTN_ACT_SILU},      {"silu", LTN_ACT_SILU},      {"none", LTN_ACT_NONE},
    {"gelu", LTN_ACT_GELU},       {"relu", LTN_ACT_RELU},      {"elu", LTN_ACT_ELU},
    {"sigmoid", LTN_ACT_SIGMOID}, {"exp", LTN_ACT_EXP},        {"leak", LTN_ACT_LEAK},
    {"1+elu", LTN_ACT_ELU_ADD1},  {"2+elu", LTN_ACT_ELU_ADD2}, {"sine", LTN_ACT_SINE},
};
enum { N_ACT_NAMES = sizeof act_names / sizeof *act_names };

enum ltn_act ltn_act_from_name(const char *name)
{
    for (int i = 0; i < N_ACT_NAMES; i++)
        if (strcmp(name, act_names[i].name) == 0)
            return act_names[i].act;
    return LTN_ACT_NONE;
}

static const char *act_name(enum ltn_act act)
{
    for (int i = 0; i < N_ACT_NAMES; i++)
        if (act_names[i].act == act)
            return act_names[i].name;
    return "none";
}

static const char *const config_keys[] = {
    "vocab_size",
    "decoder_embed_dim",
    "hidden_dim",
    "decoder_layers",
    "decoder_attention_heads",
    "glu_dim",
    "gate_dim",
    "bias",
    "linear_act_fun",
    "norm_type",
    "bos_token_id",
    "no_scale_embedding",
    "eos_token_id",
    "tie_word_embeddings",
    "pad_token_id",
    "linear_use_lrpe_list",
};

static enum ltn_status get_int(int32_t *out, const cJSON *json, const char *key, int64_t low, int64_t high,
                               struct ltn_error *err)
{
    int64_t value = 0;
    LTN_TRY(ltn_json_int(&value, json, key, low, high, "config", err));
    *out = (int32_t)value;
    return LTN_OK;
}

static enum ltn_status read_config(struct ltn_config *c, const cJSON *json, struct ltn_error *err)
{
    const char *act = NULL, *norm = NULL;
    const cJSON *list = NULL;
    bool no_scale = false;

    LTN_TRY(ltn_json_keys(json, config_keys, sizeof config_keys / sizeof *config_keys, "config", err));
    LTN_TRY(get_int(&c->vocab_size, json, "vocab_size", 1, LTN_MAX_VOCAB, err));
    LTN_TRY(get_int(&c->embed_dim, json, "decoder_embed_dim", 1, LTN_MAX_DIM, err));
    LTN_TRY(get_int(&c->hidden_dim, json, "hidden_dim", 1, LTN_MAX_DIM, err));
    LTN_TRY(get_int(&c->n_layers, json, "decoder_layers", 2, LTN_MAX_LAYERS, err));
    LTN_TRY(get_int(&c->n_heads, json, "decoder_attention_heads", 1, LTN_MAX_HEADS, err));
    LTN_TRY(get_int(&c->glu_dim, json, "glu_dim", 1, LTN_MAX_DIM, err));
    LTN_TRY(get_int(&c->gate_dim, json, "gate_dim", 0, LTN_MAX_DIM, err));
    LTN_TRY(get_int(&c->bos_id, json, "bos_token_id", -1, LTN_MAX_VOCAB, err));
    LTN_TRY(get_int(&c->eos_id, json, "eos_token_id", -1, LTN_MAX_VOCAB, err));
    LTN_TRY(get_int(&c->pad_id, json, "pad_token_id", -1, LTN_MAX_VOCAB, err));
    LTN_TRY(ltn_json_bool(&c->bias, json, "bias", "config", err));
    LTN_TRY(ltn_json_bool(&c->tied, json, "tie_word_embeddings", "config", err));
    LTN_TRY(ltn_json_bool(&no_scale, json, "no_scale_embedding", "config", err));
    c->scale_embedding = !no_scale;

    LTN_TRY(ltn_json_string(&act, json, "linear_act_fun", "config", err));
    c->act = ltn_act_from_name(act);
    LTN_TRY(ltn_json_string(&norm, json, "norm_type", "config", err));
    c->layer_norm = strcmp(norm, "layernorm") == 0;
    if (!c->layer_norm && strcmp(norm, "simplermsnorm") != 0)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "config: norm_type is \"%.40s\", expected simplermsnorm or layernorm", norm);

    LTN_TRY(ltn_json_array(&list, json, "linear_use_lrpe_list", "config", err));
    if (cJSON_GetArraySize(list) != c->n_layers)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "config: linear_use_lrpe_list has %d entries, expected one for each of %d"
                        " layers",
                        cJSON_GetArraySize(list), c->n_layers);
    int32_t l = 0;
    const cJSON *item = NULL;
    cJSON_ArrayForEach(item, list)
    {
        int64_t value = 0;
        LTN_TRY(ltn_json_int_item(&value, item, 0, 1, "linear_use_lrpe_list", "config", err));
        c->lrpe[l++] = (uint8_t)value;
    }
    return ltn_config_check(c, err);
}

enum ltn_status ltn_config_parse(struct ltn_config *config, const char *text, struct ltn_error *err)
{
    cJSON *json = NULL;

    *config = (struct ltn_config){0};
    LTN_TRY(ltn_json_parse(&json, text, strlen(text), "config", 3, true, err));
    enum ltn_status status = read_config(config, json, err);
    cJSON_Delete(json);
    return status;
}

char *ltn_config_print(const struct ltn_config *c)
{
    cJSON *json = cJSON_CreateObject();
    cJSON *list = cJSON_AddArrayToObject(json, "linear_use_lrpe_list");
    bool ok = list && cJSON_AddNumberToObject(json, "vocab_size", c->vocab_size) &&
              cJSON_AddNumberToObject(json, "decoder_embed_dim", c->embed_dim) &&
              cJSON_AddNumberToObject(json, "hidden_dim", c->hidden_dim) &&
              cJSON_AddNumberToObject(json, "decoder_layers", c->n_layers) &&
              cJSON_AddNumberToObject(json, "decoder_attention_heads", c->n_heads) &&
              cJSON_AddNumberToObject(json, "glu_dim", c->glu_dim) &&
              cJSON_AddNumberToObject(json, "gate_dim", c->gate_dim) &&
              cJSON_AddStringToObject(json, "linear_act_fun", act_name(c->act)) &&
              cJSON_AddStringToObject(json, "norm_type", c->layer_norm ? "layernorm" : "simplermsnorm") &&
              cJSON_AddBoolToObject(json, "no_scale_embedding", !c->scale_embedding) &&
              cJSON_AddBoolToObject(json, "bias", c->bias) &&
              cJSON_AddBoolToObject(json, "tie_word_embeddings", c->tied) &&
              cJSON_AddNumberToObject(json, "bos_token_id", c->bos_id) &&
              cJSON_AddNumberToObject(json, "eos_token_id", c->eos_id) &&
              cJSON_AddNumberToObject(json, "pad_token_id", c->pad_id);
    for (int32_t l = 0; ok && l < c->n_layers; l++) {
        cJSON *item = cJSON_CreateNumber(c->lrpe[l]);
        ok = item && cJSON_AddItemToArray(list, item);
    }
    char *text = ok ? cJSON_PrintUnformatted(json) : NULL;
    cJSON_Delete(json);
    return text;
}

/* ---- released shapes ----------------------------------------------------------------------------------- */

enum ltn_status ltn_config_released(struct ltn_config *config, const char *name, struct ltn_error *err)
{
    static const struct {
        const char *name;
        int32_t dim, layers, heads, glu;
    } shapes[] = {{"385m", 1024, 24, 8, 2816}, {"1b", 2048, 16, 16, 5632}, {"7b", 4096, 30, 32, 11008}};

    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (strcmp(name, shapes[i].name) == 0) {
            *config = (struct ltn_config){.vocab_size = 64000,
                                          .embed_dim = shapes[i].dim,
                                          .hidden_dim = shapes[i].dim,
                                          .n_layers = shapes[i].layers,
                                          .n_heads = shapes[i].heads,
                                          .glu_dim = shapes[i].glu,
                                          .act = LTN_ACT_SILU,
                                          .tied = true,
                                          .scale_embedding = true,
                                          .bos_id = 1,
                                          .eos_id = 2,
                                          .pad_id = -1,
                                          .lrpe = {1}};
            return ltn_config_check(config, err);
        }
    return ltn_fail(err, LTN_ERR_INPUT, "shape: expected one of %s, found '%s'", LTN_RELEASED, name);
}

/* ---- decay and state ---------------------------------------------------------------------------------- */

void ltn_slopes(float *slopes, int32_t n_heads, int32_t layer, int32_t n_layers)
{
    int32_t p = 1; /* largest power of two <= n_heads */
    while (p <= n_heads / 2)
        p *= 2;
    float factor = (float)(1 - (double)layer / (n_layers - 1) + 1e-5);
    for (int32_t i = 0; i < n_heads; i++) {
        double exponent = i < p ? -8.0 * (i + 1) / p : -4.0 * (2 * (i - p) + 1) / p;
        slopes[i] = (float)exp2(exponent) * factor;
    }
}

size_t ltn_state_floats(const struct ltn_config *c, int32_t layer)
{
    return (size_t)c->n_heads * (size_t)c->head_dim * (size_t)c->head_dim * (c->lrpe[layer] ? 2 : 1);
}

size_t ltn_state_offset(const struct ltn_config *c, int32_t layer)
{
    size_t offset = 0;
    for (int32_t l = 0; l < layer; l++)
        offset += ltn_state_floats(c, l);
    return offset;
}

/* ---- the tensor set ----------------------------------------------------------------------------------- */

struct spec_list {
    const struct ltn_config *config;
    struct ltn_tensor_spec *specs;
    size_t n;
    int32_t layer; /* -1: outside the layers */
};

static void add(struct spec_list *list, enum ltn_slot slot, const char *name, bool is_bias, int32_t rank,
                int64_t a, int64_t b, int64_t c)
{
    struct ltn_tensor_spec *spec = &list->specs[list->n++];

    *spec = (struct ltn_tensor_spec){.slot = slot,
                                     .layer = list->layer,
                                     .is_bias = is_bias,
                                     .is_matrix = rank == 2,
                                     .rank = rank,
                                     .shape = {a, b, c}};
    if (list->layer < 0)
        snprintf(spec->name, sizeof spec->name, "%s", name);
    else
        snprintf(spec->name, sizeof spec->name, "model.layers.%d.%.39s", list->layer, name);
}

static void add_linear(struct spec_list *list, enum ltn_slot slot, const char *name, int64_t outputs,
                       int64_t inputs)
{
    char full[64];

    snprintf(full, sizeof full, "%s.weight", name);
    add(list, slot, full, false, 2, outputs, inputs, 0);
    if (list->config->bias) {
        snprintf(full, sizeof full, "%s.bias", name);
        add(list, slot, full, true, 1, outputs, 0, 0);
    }
}

static void add_norm(struct spec_list *list, enum ltn_slot slot, const char *name, int64_t width)
{
    char full[64];

    if (!list->config->layer_norm)
        return;
    snprintf(full, sizeof full, "%s.weight", name);
    add(list, slot, full, false, 1, width, 0, 0);
    snprintf(full, sizeof full, "%s.bias", name);
    add(list, slot, full, true, 1, width, 0, 0);
}

static void add_layer(struct spec_list *list)
{
    const struct ltn_config *c = list->config;
    const int64_t D = c->embed_dim, H = c->hidden_dim, G = c->glu_dim;

    add_norm(list, LTN_SLOT_TOKEN_NORM, "token_norm", D);
    if (c->gate_dim) {
        add_linear(list, LTN_SLOT_QKV, "token_mixer.qkv_proj", 3 * H, D);
        add_linear(list, LTN_SLOT_GATE0, "token_mixer.output_gate.0", c->gate_dim, D);
        add_linear(list, LTN_SLOT_GATE1, "token_mixer.output_gate.1", H, c->gate_dim);
    } else {
        add_linear(list, LTN_SLOT_QKV, "token_mixer.qkvu_proj", 4 * H, D);
    }
    if (c->lrpe[list->layer])
        add(list, LTN_SLOT_THETA, "token_mixer.lrpe.theta", false, 3, c->n_heads, 1, D / c->n_heads);
    add_norm(list, LTN_SLOT_ATTN_NORM, "token_mixer.norm", H);
    add_linear(list, LTN_SLOT_OUT, "token_mixer.out_proj", D, H);
    add_norm(list, LTN_SLOT_CHANNEL_NORM, "channel_norm", D);
    add_linear(list, LTN_SLOT_L1, "channel_mixer.l1", G, D);
    add_linear(list, LTN_SLOT_L2, "channel_mixer.l2", G, D);
    add_linear(list, LTN_SLOT_L3, "channel_mixer.l3", D, G);
}

enum ltn_status ltn_config_tensors(const struct ltn_config *config, struct ltn_tensor_spec **specs,
                                   size_t *n_specs, struct ltn_error *err)
{
    enum { MOST_IN_A_LAYER = 21, MOST_OUTSIDE = 4 };
    size_t most = (size_t)config->n_layers * MOST_IN_A_LAYER + MOST_OUTSIDE;
    struct spec_list list = {.config = config, .layer = -1};

    *n_specs = 0;
    *specs = list.specs = malloc(most * sizeof *list.specs);
    if (!list.specs)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for the names of %zu tensors", most);
    add(&list, LTN_SLOT_EMBED, "model.embed_tokens.weight", false, 2, config->vocab_size, config->embed_dim,
        0);
    for (list.layer = 0; list.layer < config->n_layers; list.layer++)
        add_layer(&list);
    list.layer = -1;
    add_norm(&list, LTN_SLOT_FINAL_NORM, "model.final_norm", config->embed_dim);
    if (!config->tied)
        add(&list, LTN_SLOT_HEAD, "lm_head.weight", false, 2, config->vocab_size, config->embed_dim, 0);
    *n_specs = list.n;
    return LTN_OK;
}
