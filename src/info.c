/* ltn-info: what is in a .ltn or a session file. */
#include "model/checkpoint.h"
#include "model/json.h"
#include "src/cli.h"
#include "src/session_file.h"

#include <inttypes.h>
#include <math.h>
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

static uint64_t parameters_of(const struct ltn_tensor_spec *spec)
{
    uint64_t n = 1;
    for (int32_t i = 0; i < spec->rank; i++)
        n *= (uint64_t)spec->shape[i];
    return n;
}

static enum ltn_status print_config(const struct ltn_checkpoint *ck, struct ltn_error *err)
{
    const struct ltn_config *c = &ck->config;
    char layers[2048], number[32];
    uint64_t parameters = 0;
    for (size_t i = 0; i < ck->n_specs; i++)
        parameters += parameters_of(&ck->specs[i]);
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
    static const enum ltn_st_dtype dtypes[] = {LTN_ST_U8,  LTN_ST_F8_E4M3, LTN_ST_I8,
                                               LTN_ST_F32, LTN_ST_BF16,    LTN_ST_F16};
    char number[32];
    LTN_TRY(ltn_cli_printf(err, "matrices      %s\n", ltn_dtype_name(ck->dtype)));
    for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++) {
        uint64_t n = 0, bytes = 0;
        for (size_t i = 0; i < 2 * ck->n_specs; i++) {
            const struct ltn_st_tensor *t = (i % 2 ? ck->scales : ck->tensors)[i / 2];
            if (t && t->dtype == dtypes[d]) {
                n++;
                bytes += t->bytes;
            }
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

static enum ltn_status print_tensors(const struct ltn_st_file *f, struct ltn_error *err)
{
    for (size_t i = 0; i < f->n_tensors; i++) {
        const struct ltn_st_tensor *t = &f->tensors[i];
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
    return tensors ? print_tensors(&ck->file, err) : LTN_OK;
}

/* ---- sessions ------------------------------------------------------------------------------------------ */

/* One layer's state: its root mean square and its largest value. */
static enum ltn_status print_layer(const struct ltn_session_file *s, int32_t layer, struct ltn_error *err)
{
    const struct ltn_st_tensor *t = &s->state[layer];
    const uint8_t *data = s->file.map + t->offset;
    char shape[128];
    double sum = 0, largest = 0;

    for (uint64_t i = 0; i < elements(t); i++) {
        float x;
        memcpy(&x, data + 4 * i, 4);
        sum += (double)x * x;
        largest = fmax(largest, fabs((double)x));
    }
    ltn_shape_print(shape, sizeof shape, t->shape, t->rank);
    return ltn_cli_printf(err, "  layer %-5d %-18s norm %-12.6g rms %-12.6g largest %.6g\n", layer, shape,
                          sqrt(sum), elements(t) ? sqrt(sum / (double)elements(t)) : 0, largest);
}

static enum ltn_status verify_session(const struct ltn_session_file *s, struct ltn_error *err)
{
    LTN_TRY(ltn_session_file_verify(s, err));
    for (size_t i = 0; i < s->file.n_tensors; i++) {
        const struct ltn_st_tensor *t = &s->file.tensors[i];
        size_t bad = t->dtype == LTN_ST_F32
                         ? ltn_first_not_finite(s->file.map + t->offset, LTN_F32, elements(t))
                         : elements(t);
        if (bad < elements(t))
            return ltn_fail(err, LTN_ERR_INPUT, "%s: tensor \"%s\" is not finite at element %zu",
                            s->file.path, t->name, bad);
    }
    return LTN_OK;
}

static enum ltn_status print_session(const struct ltn_session_file *s, bool tensors, bool verified,
                                     struct ltn_error *err)
{
    char number[32];
    uint64_t state = s->logits->offset - s->state->offset;

    LTN_TRY(print_text("session file", s->file.path, err));
    LTN_TRY(ltn_cli_printf(err, "size          %s bytes\n", grouped(number, s->file.size)));
    LTN_TRY(ltn_cli_printf(err, "model         %s\n", s->model));
    LTN_TRY(ltn_cli_printf(err, "position      %s tokens\n", grouped(number, (uint64_t)s->position)));
    LTN_TRY(ltn_cli_printf(err, "draws         seed %" PRIu64 ", next draw %" PRIu64 "\n", s->seed, s->draw));
    if (strspn(s->prefix, "0") < strlen(s->prefix))
        LTN_TRY(ltn_cli_printf(err, "prefix        %s\n", s->prefix));
    LTN_TRY(ltn_cli_printf(err, "vocabulary    %s\n", grouped(number, elements(s->logits))));
    LTN_TRY(
        ltn_cli_printf(err, "state         %s bytes in %d layers\n", grouped(number, state), s->n_layers));
    for (int32_t l = 0; l < s->n_layers; l++)
        LTN_TRY(print_layer(s, l, err));
    LTN_TRY(ltn_cli_printf(err, "checksum      %s%s\n", s->checksum,
                           verified ? ", verified; state and logits are finite" : ""));
    return tensors ? print_tensors(&s->file, err) : LTN_OK;
}

/* ---- the program --------------------------------------------------------------------------------------- */

static enum ltn_status show_model(const char *path, bool tensors, bool verify, struct ltn_error *err)
{
    struct ltn_checkpoint checkpoint;
    LTN_TRY(ltn_checkpoint_open(&checkpoint, path, err));
    enum ltn_status status = verify ? ltn_checkpoint_verify(&checkpoint, err) : LTN_OK;
    if (status == LTN_OK)
        status = print(&checkpoint, tensors, verify, err);
    ltn_checkpoint_close(&checkpoint);
    return status;
}

static enum ltn_status show_session(const char *path, bool tensors, bool verify, struct ltn_error *err)
{
    struct ltn_session_file session;
    LTN_TRY(ltn_session_file_open(&session, path, err));
    enum ltn_status status = verify ? verify_session(&session, err) : LTN_OK;
    if (status == LTN_OK)
        status = print_session(&session, tensors, verify, err);
    ltn_session_file_close(&session);
    return status;
}

static enum ltn_status show(const char *path, bool tensors, bool verify, struct ltn_error *err)
{
    struct ltn_st_file file;
    LTN_TRY(ltn_st_open(&file, path, err));
    const char *format = ltn_st_metadata(&file, "format");
    bool session = format && strcmp(format, "ltn-session") == 0;
    ltn_st_close(&file);
    return session ? show_session(path, tensors, verify, err) : show_model(path, tensors, verify, err);
}

int main(int argc, char **argv)
{
    bool verify = false, tensors = false;
    const struct ltn_flag flags[] = {
        {.name = "verify",
         .kind = LTN_FLAG_SWITCH,
         .target = &verify,
         .help = "read all of the data: the checksum must match, every number must be finite"},
        {.name = "tensors", .kind = LTN_FLAG_SWITCH, .target = &tensors, .help = "list the tensors too"},
    };
    const struct ltn_program program = {
        .name = "ltn-info",
        .summary = "Print what is in a .ltn file or a saved session.",
        .operands = "FILE",
        .min_operands = 1,
        .max_operands = 1,
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
    };
    int first = 0, code = ltn_cli_parse(&program, argc, argv, &first);
    if (code >= 0)
        return code;

    struct ltn_error err;
    return show(argv[first], tensors, verify, &err) == LTN_OK ? LTN_EXIT_OK : ltn_cli_error(&err);
}
