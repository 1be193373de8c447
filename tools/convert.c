/* tools/convert, installed as ltn-convert: a Hugging Face checkpoint becomes one .ltn file. */
#include "src/cli.h"
#include "tools/hf_convert.h"

#include <string.h>

static enum ltn_status progress(void *ctx, uint64_t done, uint64_t total)
{
    ltn_cli_progress(ctx, done, total);
    return ltn_cli_interrupted() ? LTN_ERR_STOPPED : LTN_OK;
}

static void note(void *ctx, const char *text)
{
    (void)ctx;
    ltn_cli_note("note: %s", text);
}

int main(int argc, char **argv)
{
    const char *dtype = NULL;
    const struct ltn_flag flags[] = {
        {.name = "dtype",
         .argument = "TYPE",
         .kind = LTN_FLAG_CHOICE,
         .target = &dtype,
         .choices = "f32|bf16|f16",
         .help = "element type of the matrices, f32, bf16 or f16; without it they stay as they are stored"},
    };
    const struct ltn_program program = {
        .name = "ltn-convert",
        .summary = "Turn a Hugging Face checkpoint of a TransNormerLLM into one .ltn file.",
        .operands = "SRC_DIR OUT.ltn",
        .min_operands = 2,
        .max_operands = 2,
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
        .notes =
            "SRC_DIR holds config.json and model.safetensors or pytorch_model.bin, whole or in parts with an"
            " index; tokenizer.model or *.tiktoken is taken in where it is there. Nothing in the checkpoint "
            "is executed. An"
            " OUT.ltn that exists is replaced only once all went well.",
    };
    int first = 0, code = ltn_cli_parse(&program, argc, argv, &first);
    if (code >= 0)
        return code;

    struct ltn_progress bar = {.what = "converting", .percent = -1};
    struct ltn_convert_options options = {.progress = progress, .note = note, .ctx = &bar};
    if (dtype) {
        options.has_dtype = true;
        options.dtype = strcmp(dtype, "f32") == 0 ? LTN_F32 : strcmp(dtype, "bf16") == 0 ? LTN_BF16 : LTN_F16;
    }
    struct ltn_error err = {0};
    ltn_cli_catch_signals();
    if (ltn_hf_convert(argv[first], argv[first + 1], &options, &err) == LTN_OK)
        return LTN_EXIT_OK;
    ltn_cli_progress(&bar, 1, 1); /* clears its line */
    return ltn_cli_error(&err);
}
