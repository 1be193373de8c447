/* ltn-run: continue a text. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "src/bandwidth.h"
#include "src/cli.h"

/* Long prompts on the command line are fed in slices, so that a signal is seen in time. */
enum { SLICE = 16384 };

struct options {
    const char *model, *prompt, *file, *tokens;
    int64_t n;
    double temperature;
    int64_t top_k;
    double top_p, min_p;
    struct ltn_seed seed;
    struct ltn_strings stop;
    bool ignore_eos, echo, stats, quiet;
    int64_t threads;
    const char *device;
};

struct run {
    const struct options *options;
    struct ltn_engine *engine;
    struct ltn_session *session;
    bool terminal;       /* stdout is one */
    int64_t ids_printed; /* with --tokens */
    double prefill_seconds;
    double first_token, last_token; /* when they came */
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static enum ltn_status print_id(struct run *run, int32_t id, struct ltn_error *err)
{
    return ltn_cli_printf(err, run->ids_printed++ ? " %d" : "%d", id);
}

/* ---- the prompt ---------------------------------------------------------------------------------------- */

static enum ltn_status feed_text(void *ctx, const char *text, size_t bytes, struct ltn_error *err)
{
    struct run *run = ctx;
    double begin = now();
    LTN_TRY(ltn_session_feed_text(run->session, text, bytes, err));
    run->prefill_seconds += now() - begin;
    return run->options->echo ? ltn_cli_write(text, bytes, err) : LTN_OK;
}

static enum ltn_status feed_id(void *ctx, int32_t id, struct ltn_error *err)
{
    struct run *run = ctx;
    double begin = now();
    LTN_TRY(ltn_session_feed(run->session, &id, 1, err));
    run->prefill_seconds += now() - begin;
    return run->options->echo ? print_id(run, id, err) : LTN_OK;
}

static enum ltn_status parse_ids(void *parser, const char *text, size_t bytes, struct ltn_error *err)
{
    return ltn_id_parser_feed(parser, text, bytes, err);
}

/* A string in slices, like a file. */
static enum ltn_status read_string(const char *text, ltn_text_fn *fn, void *ctx, struct ltn_error *err)
{
    for (size_t left = strlen(text); left > 0;) {
        size_t bytes = left < SLICE ? left : SLICE;
        if (ltn_cli_interrupted())
            return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
        LTN_TRY(fn(ctx, text, bytes, err));
        text += bytes;
        left -= bytes;
    }
    return LTN_OK;
}

static enum ltn_status read_prompt(struct run *run, struct ltn_error *err)
{
    const struct options *o = run->options;

    if (o->tokens) {
        struct ltn_id_parser parser = {.fn = feed_id, .ctx = run};
        if (strcmp(o->tokens, "-") == 0)
            LTN_TRY(ltn_cli_read("-", parse_ids, &parser, err));
        else
            LTN_TRY(read_string(o->tokens, parse_ids, &parser, err));
        return ltn_id_parser_finish(&parser, err);
    }
    if (o->prompt)
        LTN_TRY(read_string(o->prompt, feed_text, run, err));
    else
        LTN_TRY(ltn_cli_read(o->file ? o->file : "-", feed_text, run, err));
    return ltn_session_end_text(run->session, err);
}

static enum ltn_status prefill(struct run *run, struct ltn_error *err)
{
    const struct ltn_engine_info *info = ltn_engine_info(run->engine);
    const float *logits;

    if (!run->options->tokens && !info->has_tokenizer)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                        "the model has no tokenizer: expected token ids by --tokens, found text");
    LTN_TRY(read_prompt(run, err));
    if (ltn_session_position(run->session) == 0) {
        if (info->bos_id < 0)
            return ltn_fail(err, LTN_ERR_INPUT,
                            "empty prompt: the model has no BOS token to start from; expected some text");
        LTN_TRY(ltn_session_feed(run->session, &info->bos_id, 1, err));
    }
    double begin = now();
    LTN_TRY(ltn_session_logits(run->session, &logits, err));
    run->prefill_seconds += now() - begin;
    return LTN_OK;
}

/* ---- the answer ---------------------------------------------------------------------------------------- */

static enum ltn_status print_piece(void *ctx, int32_t id, const char *text, size_t bytes,
                                   struct ltn_error *err)
{
    struct run *run = ctx;
    if (id >= 0) {
        run->last_token = now();
        if (run->first_token == 0)
            run->first_token = run->last_token;
    }
    if (run->options->tokens) {
        if (id >= 0)
            LTN_TRY(print_id(run, id, err));
    } else if (bytes > 0) {
        LTN_TRY(ltn_cli_write(text, bytes, err));
    }
    if (ltn_cli_interrupted())
        return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
    return LTN_OK;
}

static void print_stats(const struct run *run, int64_t n_prompt, const struct ltn_generated *made)
{
    const struct ltn_engine_info *info = ltn_engine_info(run->engine);
    struct ltn_bandwidth bandwidth;
    char decode[160] = "", share[80] = "";

    if (made->n_tokens > 1) { /* between the first token and the last lie n - 1 steps */
        double tok_s = (double)(made->n_tokens - 1) / (run->last_token - run->first_token);
        double gbps = 1e-9 * tok_s * (double)info->decode_bytes;
        if (ltn_measure_bandwidth(run->engine, &bandwidth, NULL) == LTN_OK) {
            double peak = bandwidth.read_gbps > 0 ? bandwidth.read_gbps : bandwidth.copy_gbps;
            snprintf(share, sizeof share, ", %.1f %% of the %.1f GB/s measured here (%s)", 100 * gbps / peak,
                     peak, bandwidth.read_gbps > 0 ? "read" : "copy");
        }
        snprintf(decode, sizeof decode, "; decode %.1f tok/s, %.2f GB/s", tok_s, gbps);
    }
    ltn_cli_note("%s: prefill %lld tokens, %.1f tok/s%s%s", info->backend, (long long)n_prompt,
                 (double)n_prompt / run->prefill_seconds, decode, share);
}

/* Without a seed of the user's, one from the clock, named so that the text can be had again. */
static void choose_seed(struct run *run)
{
    const struct options *o = run->options;
    uint64_t seed = o->seed.value;
    if (!o->seed.given) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        seed = ((uint64_t)t.tv_sec * 1000003u ^ (uint64_t)t.tv_nsec) & 0xffffffffu;
        if (o->temperature > 0 && !o->quiet)
            ltn_cli_note("seed %llu", (unsigned long long)seed);
    }
    ltn_session_seed(run->session, seed);
}

static enum ltn_status generate(struct run *run, struct ltn_error *err)
{
    const struct options *o = run->options;
    const struct ltn_sampling sampling = {o->temperature, (int32_t)o->top_k, o->top_p, o->min_p};
    const struct ltn_generate_options options = {
        .sampling = &sampling,
        .max_tokens = o->n,
        .ignore_eos = o->ignore_eos,
        .stop = o->stop.v,
        .n_stop = o->stop.n,
        .piece = print_piece,
        .ctx = run,
    };
    struct ltn_generated made = {0};
    int64_t n_prompt = ltn_session_position(run->session);

    choose_seed(run);
    LTN_TRY(ltn_generate(run->session, &options, &made, err));
    if (o->tokens || run->terminal) /* ids make a line; text is left as it is, but for a terminal */
        LTN_TRY(ltn_cli_write("\n", 1, err));
    if (o->stats)
        print_stats(run, n_prompt, &made);
    return made.end == LTN_END_STOPPED ? ltn_fail(err, LTN_ERR_STOPPED, "stopped") : LTN_OK;
}

/* ---- the program --------------------------------------------------------------------------------------- */

static enum ltn_status open_all(struct run *run, struct ltn_error *err)
{
    const struct options *o = run->options;
    struct ltn_progress progress = {"loading the model", -1};
    struct ltn_engine_options options = {.device = o->device, .n_threads = (int)o->threads};
    char path[4096];

    if (!o->quiet) {
        options.progress = ltn_cli_progress;
        options.progress_ctx = &progress;
    }
    LTN_TRY(ltn_cli_write("", 0, err));
    LTN_TRY(ltn_cli_model(path, sizeof path, o->model, err));
    LTN_TRY(ltn_engine_open(&run->engine, path, &options, err));
    const char *notice = ltn_engine_info(run->engine)->notice;
    if (notice && !o->quiet)
        ltn_cli_note("%s", notice);
    return ltn_session_create(&run->session, run->engine, NULL, err);
}

static enum ltn_status run_all(struct run *run, struct ltn_error *err)
{
    LTN_TRY(open_all(run, err));
    LTN_TRY(prefill(run, err));
    return generate(run, err);
}

/* What the table of options cannot see; -1 when all is well. */
static int check(const struct options *o)
{
    if ((o->prompt != NULL) + (o->file != NULL) + (o->tokens != NULL) > 1)
        return ltn_cli_bad_usage("expected at most one of -p, -f and --tokens");
    if (!o->prompt && !o->file && !o->tokens && isatty(STDIN_FILENO))
        return ltn_cli_bad_usage("no prompt: expected -p, -f, --tokens or text on standard input; see "
                                 "ltn-run --help");
    if (o->tokens && o->stop.n)
        return ltn_cli_bad_usage("--stop: looks for text, but with --tokens there is none");
    for (size_t i = 0; i < o->stop.n; i++)
        if (!o->stop.v[i][0])
            return ltn_cli_bad_usage("--stop: expected some text, found ''");
    return o->tokens ? ltn_cli_check_ids("--tokens", o->tokens) : -1;
}

int main(int argc, char **argv)
{
    struct options o = {.n = 256,
                        .temperature = ltn_sampling_default.temperature,
                        .top_p = ltn_sampling_default.top_p,
                        .device = "auto"};
    // clang-format off
    const struct ltn_flag flags[] = {
        {.letter = 'm', .argument = "MODEL", .kind = LTN_FLAG_STRING, .target = &o.model,
         .help = "the model, a .ltn file; without it $LTN_MODEL, else the model that ships with ltn"},
        {.letter = 'p', .argument = "TEXT", .kind = LTN_FLAG_STRING, .target = &o.prompt, .help = "the prompt"},
        {.letter = 'f', .argument = "FILE", .kind = LTN_FLAG_STRING, .target = &o.file,
         .help = "read the prompt from a file; -: from standard input"},
        {.letter = 'n', .argument = "N", .kind = LTN_FLAG_INT, .target = &o.n, .min = -1, .max = INFINITY,
         .help = "generate at most N tokens; -1: until stopped"},
        {.name = "temp", .argument = "T", .kind = LTN_FLAG_REAL, .target = &o.temperature, .max = INFINITY,
         .help = "temperature; 0: always the likeliest token"},
        {.name = "top-k", .argument = "K", .kind = LTN_FLAG_INT, .target = &o.top_k, .max = INT32_MAX,
         .help = "draw from the K likeliest tokens; 0: from all"},
        {.name = "top-p", .argument = "P", .kind = LTN_FLAG_REAL, .target = &o.top_p, .max = 1,
         .help = "draw from the likeliest tokens that together have probability P; 1: from all"},
        {.name = "min-p", .argument = "P", .kind = LTN_FLAG_REAL, .target = &o.min_p, .max = 1,
         .help = "draw from tokens at least P times as likely as the likeliest; 0: from all"},
        {.name = "seed", .argument = "S", .kind = LTN_FLAG_SEED, .target = &o.seed,
         .help = "seed of the draws: the same seed, the same text; without it one is taken from the clock and "
                 "named on standard error"},
        {.name = "stop", .argument = "TEXT", .kind = LTN_FLAG_STRINGS, .target = &o.stop,
         .help = "end before this text; may be given more than once"},
        {.name = "ignore-eos", .kind = LTN_FLAG_SWITCH, .target = &o.ignore_eos,
         .help = "go on past the end token"},
        {.name = "echo", .kind = LTN_FLAG_SWITCH, .target = &o.echo, .help = "print the prompt too"},
        {.name = "tokens", .argument = "IDS", .kind = LTN_FLAG_STRING, .target = &o.tokens,
         .help = "the prompt as token ids, \"5,17,9\"; -: from standard input; prints the generated ids on one "
                 "line; needs no tokenizer"},
        {.letter = 't', .argument = "THREADS", .kind = LTN_FLAG_INT, .target = &o.threads, .max = 1024,
         .help = "CPU threads; 0: one per core"},
        {.name = "device", .argument = "DEVICE", .kind = LTN_FLAG_DEVICE, .target = &o.device,
         .help = "auto, cpu, cuda or cuda:N; auto: CUDA where it works, else the CPU"},
        {.name = "stats", .kind = LTN_FLAG_SWITCH, .target = &o.stats,
         .help = "print the speed on standard error, also as a share of the memory bandwidth measured here (above "
                 "100 % where the weights fit in a cache)"},
        {.letter = 'q', .kind = LTN_FLAG_SWITCH, .target = &o.quiet,
         .help = "print nothing but the text and errors"},
    };
    // clang-format on
    const struct ltn_program program = {
        .name = "ltn-run",
        .summary = "Continue a text with a TransNormerLLM.",
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
        .notes = "Without -p, -f and --tokens the prompt is standard input. It may have any length and is "
                 "taken exactly as it is, its last newline too. An empty prompt starts from the model's BOS "
                 "token. Standard output carries the text and nothing else.\n\n"
                 "Exit status: 0 done, 1 failure, 2 wrong usage, 130 after Ctrl-C.",
    };
    struct run run = {.options = &o};
    struct ltn_error err;

    int code = ltn_cli_parse(&program, argc, argv, NULL);
    if (code < 0)
        code = check(&o);
    if (code >= 0)
        return code;
    ltn_cli_catch_signals();
    run.terminal = isatty(STDOUT_FILENO);
    code = run_all(&run, &err) == LTN_OK ? LTN_EXIT_OK : ltn_cli_error(&err);
    ltn_session_free(run.session);
    ltn_engine_close(run.engine);
    return code;
}
