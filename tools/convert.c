/* tools/convert, installed as ltn-convert: a Hugging Face checkpoint becomes one .ltn file, or a .ltn file a
 * quantised one. */
#include "src/cli.h"
#include "tools/hf_convert.h"
#include "tools/quantize.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

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

struct job {
    const char *src, *out;
    struct ltn_convert_options convert;
    struct ltn_quantize_options quantize;
    bool is_quantised; /* what is asked for */
    struct ltn_progress bar;
};

static enum ltn_status quantize(struct job *job, const char *src, bool remove, struct ltn_error *err)
{
    struct ltn_checkpoint checkpoint;
    LTN_TRY(ltn_checkpoint_open(&checkpoint, src, err));
    if (remove)
        unlink(src); /* it is mapped, and gone once that ends, however it does */
    job->bar = (struct ltn_progress){.what = "quantising", .percent = -1};
    enum ltn_status status = ltn_quantize(&checkpoint, job->out, &job->quantize, err);
    ltn_checkpoint_close(&checkpoint);
    return status;
}

/* A Hugging Face checkpoint is quantised from a .ltn file beside the result, which holds it as stored. */
static enum ltn_status convert_and_quantize(struct job *job, struct ltn_error *err)
{
    char *between;
    if (asprintf(&between, "%s.unquantised", job->out) < 0)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for a path");
    enum ltn_status status = ltn_hf_convert(job->src, between, &job->convert, err);
    if (status == LTN_OK)
        status = quantize(job, between, true, err);
    free(between);
    return status;
}

static enum ltn_status run(struct job *job, struct ltn_error *err)
{
    struct stat st;
    bool is_folder = stat(job->src, &st) != 0 || S_ISDIR(st.st_mode); /* what is not there is refused later */
    if (is_folder)
        return job->is_quantised ? convert_and_quantize(job, err)
                                 : ltn_hf_convert(job->src, job->out, &job->convert, err);
    if (!job->is_quantised)
        return ltn_fail(err, LTN_ERR_INPUT,
                        "%s: a file: expected --dtype q8, fp8 or q4, or the folder of a checkpoint",
                        job->src);
    return quantize(job, job->src, false, err);
}

int main(int argc, char **argv)
{
    const char *dtype = NULL, *calibrate = NULL;
    int64_t threads = 0;
    // clang-format off
    const struct ltn_flag flags[] = {
        {.name = "dtype", .argument = "TYPE", .kind = LTN_FLAG_CHOICE, .target = &dtype,
         .choices = "f32|bf16|f16|q8|fp8|q4",
         .help = "element type of the matrices; without it they stay as they are stored"},
        {.name = "calibrate", .argument = "FILE", .kind = LTN_FLAG_STRING, .target = &calibrate,
         .help = "with q8, fp8 or q4: round such that a reading of this text changes least; at least 4,096 "
                 "tokens of the kind that the model will read, of which up to 65,536 are used"},
        {.letter = 't', .argument = "THREADS", .kind = LTN_FLAG_INT, .target = &threads, .max = 1024,
         .help = "CPU threads for quantising; 0: one per core"},
    };
    // clang-format on
    const struct ltn_program program = {
        .name = "ltn-convert",
        .summary = "Turn a Hugging Face checkpoint of a TransNormerLLM into one .ltn file, or quantise one.",
        .operands = "SRC OUT.ltn",
        .min_operands = 2,
        .max_operands = 2,
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
        .notes =
            "SRC is a folder with config.json and model.safetensors or pytorch_model.bin, whole or in parts "
            "with an index; tokenizer.model or *.tiktoken is taken in where it is there. Nothing in the "
            "checkpoint is executed. For q8, fp8 and q4 it may also be a .ltn file of f32, bf16 or f16.\n\n"
            "q8 stores a weight in 8.5 bits, fp8 in 8 and q4 in 4.5; embedding and head take 8.5 in all "
            "three. ltn-score --reference tells what that costs.\n\n"
            "An OUT.ltn that exists is replaced only once all went well.",
    };
    int first = 0, code = ltn_cli_parse(&program, argc, argv, &first);
    enum ltn_dtype type = LTN_F32;
    bool is_quantised = dtype && ltn_checkpoint_dtype_from_key(&type, dtype) && type >= LTN_Q8;
    if (code < 0 && calibrate && !is_quantised)
        code = ltn_cli_bad_usage("--calibrate: expected --dtype q8, fp8 or q4 with it");
    if (code >= 0)
        return code;

    struct job job = {.src = argv[first],
                      .out = argv[first + 1],
                      .is_quantised = is_quantised,
                      .bar = {.what = "converting", .percent = -1}};
    job.convert = (struct ltn_convert_options){.has_dtype = dtype && !is_quantised,
                                               .dtype = type,
                                               .progress = progress,
                                               .note = note,
                                               .ctx = &job.bar};
    job.quantize = (struct ltn_quantize_options){.dtype = type,
                                                 .calibrate = calibrate,
                                                 .n_threads = (int)threads,
                                                 .progress = progress,
                                                 .ctx = &job.bar};
    struct ltn_error err = {0};
    ltn_cli_catch_signals();
    if (run(&job, &err) == LTN_OK)
        return LTN_EXIT_OK;
    ltn_cli_progress(&job.bar, 1, 1); /* clears its line */
    return ltn_cli_error(&err);
}
