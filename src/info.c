/* ltn-info: what is in a .ltn file. */
#include "model/checkpoint.h"
#include "model/json.h"
#include "src/cli.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* "12,345,678" */
static const char *grouped(char text[32], uint64_t n)
{
    char digits[24];
    int length = snprintf(digits, sizeof digits, "%" PRIu64, n), out = 0;
    for (int i = 0; i < length; i++) {
        if (i > 0 && (length - i) % 3 == 0)
            text[out++] = ',';
        text[out++] = digits[i];
    }
    text[out] = 0;
    return text;
}

/* "0", "0-3, 7": the layers with LRPE; "none". */
static void print_layers(char *text, size_t size, const struct ltn_config *c)
{
    size_t used = 0;
    text[0] = 0;
    for (int32_t l = 0; l < c->n_layers && used < size; l++) {
        if (!c->lrpe[l] || (l > 0 && c->lrpe[l - 1]))
            continue;
        int32_t last = l;
        while (last + 1 < c->n_layers && c->lrpe[last + 1])
            last++;
        used += (size_t)snprintf(text + used, size - used, last > l ? "%s%d-%d" : "%s%d", used ? ", " : "", l,
                                 last);
    }
    if (used == 0)
        snprintf(text, size, "none");
}

static uint64_t elements(const struct ltn_st_tensor *t)
{
    return t->bytes / ltn_st_dtype_size(t->dtype);
}

static enum ltn_status print_config(const struct ltn_checkpoint *ck, struct ltn_error *err)
{
    const struct ltn_config *c = &ck->config;
    char layers[2048], number[32];
    uint64_t parameters = 0;
    for (size_t i = 0; i < ck->n_specs; i++)
        parameters += elements(ck->tensors[i]);
    print_layers(layers, sizeof layers, c);

    cJSON *json = NULL; /* for the name of the activation; it was parsed before */
    const char *text = ltn_st_metadata(&ck->file, "config"), *act = NULL;
    LTN_TRY(ltn_json_parse(&json, text, strlen(text), "config", 3, true, err));
    enum ltn_status status = ltn_json_string(&act, json, "linear_act_fun", "config", err);
    if (status == LTN_OK)
        status = ltn_cli_printf(err, "architecture  %s\nparameters    %s\n",
                                c->gate_dim ? "TransNormerLLM3" : "TransNormerLLM v1/v2",
                                grouped(number, parameters));
    if (status == LTN_OK)
        status = ltn_cli_printf(
            err,
            "sizes         vocabulary %d, embedding %d, hidden %d, glu %d, %d layers, %d heads of "
            "%d",
            c->vocab_size, c->embed_dim, c->hidden_dim, c->glu_dim, c->n_layers, c->n_heads, c->head_dim);
    if (status == LTN_OK && c->gate_dim)
        status = ltn_cli_printf(err, ", gate rank %d", c->gate_dim);
    if (status == LTN_OK)
        status = ltn_cli_printf(err,
                                "\nswitches      activation %.40s, %s, LRPE in layers: %s\n"
                                "              head %s, embeddings %s, %s biases\n"
                                "tokens        bos %d, eos %d, pad %d (-1: none)\n",
                                act, c->layer_norm ? "LayerNorm" : "SimpleRMSNorm", layers,
                                c->tied ? "tied" : "of its own",
                                c->scale_embedding ? "scaled by sqrt(D)" : "unscaled",
                                c->bias ? "with" : "no", c->bos_id, c->eos_id, c->pad_id);
    cJSON_Delete(json);
    return status;
}

static enum ltn_status print_storage(const struct ltn_checkpoint *ck, struct ltn_error *err)
{
    static const enum ltn_st_dtype dtypes[] = {LTN_ST_F32, LTN_ST_BF16, LTN_ST_F16};
    char number[32];
    LTN_TRY(ltn_cli_printf(err, "matrices      %s\n", ltn_dtype_name(ck->dtype)));
    for (int d = 0; d < 3; d++) {
        uint64_t n = 0, bytes = 0;
        for (size_t i = 0; i < ck->n_specs; i++)
            if (ck->tensors[i]->dtype == dtypes[d]) {
                n++;
                bytes += ck->tensors[i]->bytes;
            }
        if (n)
            LTN_TRY(ltn_cli_printf(err, "stored as     %s: %" PRIu64 " tensors, %s bytes\n",
                                   ltn_st_dtype_name(dtypes[d]), n, grouped(number, bytes)));
    }
    LTN_TRY(
        ltn_cli_printf(err, "state         %s bytes a sequence\n",
                       grouped(number, 4 * (uint64_t)ltn_state_offset(&ck->config, ck->config.n_layers))));
    if (ck->tokenizer)
        return ltn_cli_printf(err, "tokenizer     %s bytes\n", grouped(number, ck->tokenizer_bytes));
    return ltn_cli_printf(err, "tokenizer     none: token ids only\n");
}

static enum ltn_status print_tensors(const struct ltn_checkpoint *ck, struct ltn_error *err)
{
    for (size_t i = 0; i < ck->file.n_tensors; i++) {
        const struct ltn_st_tensor *t = &ck->file.tensors[i];
        char shape[128];
        ltn_shape_print(shape, sizeof shape, t->shape, t->rank);
        LTN_TRY(ltn_cli_printf(err, "%-52s %-4s %-16s %14" PRIu64 " bytes at %" PRIu64 "\n", t->name,
                               ltn_st_dtype_name(t->dtype), shape, t->bytes, t->offset));
    }
    return LTN_OK;
}

/* Free text from a file, as one line. */
static enum ltn_status print_text(const char *label, const char *text, struct ltn_error *err)
{
    char line[1024];
    snprintf(line, sizeof line, "%s", text);
    for (char *p = line; *p; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            *p = '?';
    return ltn_cli_printf(err, "%-13s %s\n", label, line);
}

static enum ltn_status print(const struct ltn_checkpoint *ck, bool tensors, bool verified,
                             struct ltn_error *err)
{
    char number[32];
    LTN_TRY(print_text("file", ck->file.path, err));
    LTN_TRY(ltn_cli_printf(err, "size          %s bytes\n", grouped(number, ck->file.size)));
    LTN_TRY(print_config(ck, err));
    LTN_TRY(print_storage(ck, err));
    LTN_TRY(print_text("provenance", ltn_st_metadata(&ck->file, "provenance"), err));
    LTN_TRY(ltn_cli_printf(err, "checksum      %s%s\n", ck->checksum,
                           verified ? ", verified; all weights are finite" : ""));
    return tensors ? print_tensors(ck, err) : LTN_OK;
}

int main(int argc, char **argv)
{
    bool verify = false, tensors = false;
    const struct ltn_flag flags[] = {
        {.name = "verify",
         .kind = LTN_FLAG_SWITCH,
         .target = &verify,
         .help = "read all of the data: the checksum must match, every weight must be finite"},
        {.name = "tensors", .kind = LTN_FLAG_SWITCH, .target = &tensors, .help = "list the tensors too"},
    };
    const struct ltn_program program = {
        .name = "ltn-info",
        .summary = "Print what is in a .ltn file.",
        .operands = "FILE",
        .min_operands = 1,
        .max_operands = 1,
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
    };
    int first = 0, code = ltn_cli_parse(&program, argc, argv, &first);
    if (code >= 0)
        return code;

    struct ltn_checkpoint checkpoint;
    struct ltn_error err = {0};
    enum ltn_status status = ltn_checkpoint_open(&checkpoint, argv[first], &err);
    if (status == LTN_OK && verify)
        status = ltn_checkpoint_verify(&checkpoint, &err);
    if (status == LTN_OK)
        status = print(&checkpoint, tensors, verify, &err);
    ltn_checkpoint_close(&checkpoint);
    return status == LTN_OK ? LTN_EXIT_OK : ltn_cli_error(&err);
}
