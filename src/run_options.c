/* The command line of ltn-run: the table of options, and what goes with what. */
#include "src/run_options.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/jsonl.h"

/* ---- values that are texts ----------------------------------------------------------------------------- */

/* "ID=VALUE" */
static bool parse_bias(const char *text, struct ltn_logit_bias *bias)
{
    const char *value = strchr(text, '=');
    size_t digits = strspn(text, "0123456789");
    char *end = NULL;

    if (!value++ || digits == 0 || digits > 9 || text + digits + 1 != value)
        return false;
    bias->id = (int32_t)strtol(text, NULL, 10);
    bias->value = -INFINITY;
    if (strcmp(value, "-inf") == 0)
        return true;
    if (!*value || value[strspn(value, "+-.0123456789eE")])
        return false;
    bias->value = strtof(value, &end);
    return *end == 0 && isfinite(bias->value);
}

/* "N" or "Ns": tokens or seconds, 1 or more. */
static bool parse_every(struct ltn_run_options *o)
{
    const char *text = o->every;
    char *end;
    long long n = strtoll(text, &end, 10);
    o->every_tokens = *end ? 0 : n;
    o->every_seconds = *end ? (double)n : 0;
    return text[0] >= '1' && text[0] <= '9' && n < 1000000000000000 && (*end == 0 || strcmp(end, "s") == 0);
}

/* ---- what goes with what; -1 when all is well ---------------------------------------------------------- */

/* What the table of options cannot see of how and what to print. */
static int check_choice(struct ltn_run_options *o)
{
    for (size_t i = 0; i < o->bias_texts.n; i++)
        if (!parse_bias(o->bias_texts.v[i], &o->bias[i]))
            return ltn_cli_bad_usage(
                "--logit-bias: expected ID=VALUE, a number or -inf for VALUE, found '%s'",
                o->bias_texts.v[i]);
    if (o->json && o->logprobs >= 0)
        return ltn_cli_bad_usage("expected at most one of --json and --logprobs");
    if (o->echo && (o->json || o->logprobs >= 0 || o->n_best > 1))
        return ltn_cli_bad_usage(
            "--echo: prints the prompt as it is, not with --json, --logprobs or --n-best");
    if (o->n_best > 1 && (o->save || o->ingest))
        return ltn_cli_bad_usage("--n-best: has no one session to go on with, not with --save or --ingest");
    if (o->n_best > 1 && o->temperature == 0)
        return ltn_cli_bad_usage("--n-best: with --temp 0 all texts would be the same");
    return -1;
}

/* What it cannot see of -i. */
static int check_interactive(const struct ltn_run_options *o)
{
    if ((o->prefix || o->suffix) && !o->interactive)
        return ltn_cli_bad_usage("--prefix and --suffix: go around what is typed; expected -i with them");
    if (!o->interactive)
        return -1;
    if (o->tokens || o->ingest || (o->file && strcmp(o->file, "-") == 0))
        return ltn_cli_bad_usage("-i: the input is typed text, not with --tokens, --ingest or -f -");
    if (o->json || o->logprobs >= 0 || o->n_best > 1)
        return ltn_cli_bad_usage(
            "-i: answers are text, one to each input, not with --json, --logprobs or --n-best");
    if (!isatty(STDIN_FILENO) || !(isatty(STDOUT_FILENO) || isatty(STDERR_FILENO)))
        return ltn_cli_bad_usage("-i: expected a terminal on standard input and on standard output or error");
    return -1;
}

/* -1 when all is well. */
static int check_stop(const struct ltn_run_options *o)
{
    if (o->tokens && o->stop.n)
        return ltn_cli_bad_usage("--stop: looks for text, but with --tokens there is none");
    for (size_t i = 0; i < o->stop.n; i++)
        if (!o->stop.v[i][0])
            return ltn_cli_bad_usage("--stop: expected some text, found ''");
    return -1;
}

static int check_many(const struct ltn_run_options *o)
{
    const char *odd = o->prompt          ? "-p"
                      : o->save          ? "--save"
                      : o->prefix_cache  ? "--prefix-cache"
                      : o->ingest        ? "--ingest"
                      : o->every         ? "--every"
                      : o->interactive   ? "-i"
                      : o->n_best > 1    ? "--n-best"
                      : o->logprobs >= 0 ? "--logprobs"
                                         : NULL;
    if (odd)
        return ltn_cli_bad_usage("%s: for one prompt, not with -j", odd);
    if (o->tokens && strcmp(o->tokens, "-") != 0)
        return ltn_cli_bad_usage(
            "--tokens: with -j expected -, ids in the lines of standard input, found '%s'", o->tokens);
    if ((o->file != NULL) + (o->tokens != NULL) + (o->n_files > 0) > 1)
        return ltn_cli_bad_usage("expected at most one of -f, --tokens and files that are prompts");
    if (o->n_files && (o->json_prompts || o->nul))
        return ltn_cli_bad_usage("%s: for prompts that are lines, found files",
                                 o->nul ? "--null" : "--json-prompts");
    if (o->json && o->nul)
        return ltn_cli_bad_usage("--null: not with --json, which makes lines");
    if (!o->file && !o->n_files && isatty(STDIN_FILENO))
        return ltn_cli_bad_usage(
            "no prompts: expected -f, files or lines on standard input; see ltn-run --help");
    return check_stop(o);
}

/* What else it cannot see; -1 when all is well. */
static int check(struct ltn_run_options *o)
{
    int code = check_choice(o);
    if (code < 0)
        code = check_interactive(o);
    if (code >= 0)
        return code;

    if (!o->many && o->n_files)
        return ltn_cli_bad_usage("unexpected argument '%s': files that are prompts need -j N", o->files[0]);
    if (!o->many && (o->json_prompts || o->nul))
        return ltn_cli_bad_usage("%s: for many prompts, expected -j N with it",
                                 o->json_prompts ? "--json-prompts" : "--null");
    if (o->many)
        return check_many(o);
    if ((o->prompt != NULL) + (o->file != NULL) + (o->tokens != NULL) > 1)
        return ltn_cli_bad_usage("expected at most one of -p, -f and --tokens");
    if (o->every && !parse_every(o))
        return ltn_cli_bad_usage("--every: expected tokens, N, or seconds, Ns, of at least 1, found '%s'",
                                 o->every);
    if (o->every && (!o->ingest || !(o->prompt || o->tokens)))
        return ltn_cli_bad_usage("--every: expected --ingest and a question by -p or --tokens with it");
    if (o->ingest && (o->file || (o->tokens && strcmp(o->tokens, "-") == 0)))
        return ltn_cli_bad_usage(
            "--ingest: standard input is the stream; expected the question by -p or --tokens");
    if (o->ingest && !o->prompt && !o->tokens && !o->save)
        return ltn_cli_bad_usage("--ingest: expected a question by -p or --tokens, or a file by --save");
    if (o->prefix_cache && (o->ingest || o->load))
        return ltn_cli_bad_usage(
            "--prefix-cache: for prompts from their beginning, not with --load or --ingest");
    if (!o->prompt && !o->file && !o->tokens && !o->load && !o->ingest && !o->interactive &&
        isatty(STDIN_FILENO))
        return ltn_cli_bad_usage("no prompt: expected -p, -f, --tokens or text on standard input; see "
                                 "ltn-run --help");
    code = check_stop(o);
    return code >= 0 ? code : o->tokens ? ltn_cli_check_ids("--tokens", o->tokens) : -1;
}

/* ---- the table ----------------------------------------------------------------------------------------- */

int ltn_run_parse_options(struct ltn_run_options *o, int argc, char **argv)
{
    int operand;

    *o = (struct ltn_run_options){.n = 256,
                                  .temperature = ltn_sampling_default.temperature,
                                  .top_p = ltn_sampling_default.top_p,
                                  .typical = 1,
                                  .repeat_last = ltn_sampling_default.repeat_last,
                                  .repeat_penalty = 1,
                                  .n_best = 1,
                                  .logprobs = -1,
                                  .prefix_mb = 2048,
                                  .device = "auto",
                                  .prefill = "exact"};
    // clang-format off
    const struct ltn_flag flags[] = {
        {.letter = 'm', .argument = "MODEL", .kind = LTN_FLAG_STRING, .target = &o->model,
         .help = "the model, a .ltn file; without it $LTN_MODEL, else the model that ships with ltn"},
        {.letter = 'p', .argument = "TEXT", .kind = LTN_FLAG_STRING, .target = &o->prompt, .help = "the prompt"},
        {.letter = 'f', .argument = "FILE", .kind = LTN_FLAG_STRING, .target = &o->file,
         .help = "read the prompt from a file; -: from standard input"},
        {.letter = 'n', .argument = "N", .kind = LTN_FLAG_INT, .target = &o->n, .min = -1, .max = INFINITY,
         .help = "generate at most N tokens; -1: until stopped"},
        {.name = "temp", .argument = "T", .kind = LTN_FLAG_REAL, .target = &o->temperature, .max = INFINITY,
         .help = "temperature; 0: always the likeliest token"},
        {.name = "top-k", .argument = "K", .kind = LTN_FLAG_INT, .target = &o->top_k, .max = INT32_MAX,
         .help = "draw from the K likeliest tokens; 0: from all"},
        {.name = "top-p", .argument = "P", .kind = LTN_FLAG_REAL, .target = &o->top_p, .max = 1,
         .help = "draw from the likeliest tokens that together have probability P; 1: from all"},
        {.name = "min-p", .argument = "P", .kind = LTN_FLAG_REAL, .target = &o->min_p, .max = 1,
         .help = "draw from tokens at least P times as likely as the likeliest; 0: from all"},
        {.name = "typical", .argument = "P", .kind = LTN_FLAG_REAL, .target = &o->typical, .max = 1,
         .help = "draw from the tokens of the most typical likelihood that together have probability P; 1: from "
                 "all"},
        {.name = "repeat-penalty", .argument = "R", .kind = LTN_FLAG_REAL, .target = &o->repeat_penalty, .min = 0.01,
         .max = 100, .help = "divide the logits of recent tokens by R, multiply negative ones; 1: leave them"},
        {.name = "presence-penalty", .argument = "X", .kind = LTN_FLAG_REAL, .target = &o->presence_penalty,
         .min = -100, .max = 100, .help = "subtract X from the logits of recent tokens"},
        {.name = "frequency-penalty", .argument = "X", .kind = LTN_FLAG_REAL, .target = &o->frequency_penalty,
         .min = -100, .max = 100, .help = "subtract X for each time that the token is among the recent ones"},
        {.name = "repeat-last", .argument = "N", .kind = LTN_FLAG_INT, .target = &o->repeat_last,
         .max = LTN_MAX_REPEAT_LAST, .help = "recent are the last N tokens, the prompt's too"},
        {.name = "logit-bias", .argument = "ID=VALUE", .kind = LTN_FLAG_STRINGS, .target = &o->bias_texts,
         .help = "add VALUE to the logit of a token, -inf: it never comes; may be given more than once"},
        {.name = "seed", .argument = "S", .kind = LTN_FLAG_SEED, .target = &o->seed,
         .help = "seed of the draws: the same seed, the same text; without it one is taken from the clock and "
                 "named on standard error"},
        {.name = "stop", .argument = "TEXT", .kind = LTN_FLAG_STRINGS, .target = &o->stop,
         .help = "end before this text; may be given more than once"},
        {.name = "n-best", .argument = "K", .kind = LTN_FLAG_INT, .target = &o->n_best, .min = 1, .max = 65536,
         .help = "K texts, each continuing the prompt with other draws, one after another under a line that "
                 "numbers it; the first is the one that is printed without this"},
        {.name = "json", .kind = LTN_FLAG_SWITCH, .target = &o->json,
         .help = "print each text as a line of JSON: text (or ids), tokens, logprob, end, with --n-best index; "
                 "with -j index and prompt (or file), too"},
        {.name = "logprobs", .argument = "K", .kind = LTN_FLAG_INT, .target = &o->logprobs, .min = 0,
         .max = LTN_JSONL_MAX_TOP,
         .help = "print each token as a line of JSON: id, text, logprob, and the K likeliest as top"},
        {.name = "ignore-eos", .kind = LTN_FLAG_SWITCH, .target = &o->ignore_eos,
         .help = "go on past the end token"},
        {.name = "echo", .kind = LTN_FLAG_SWITCH, .target = &o->echo, .help = "print the prompt too"},
        {.name = "tokens", .argument = "IDS", .kind = LTN_FLAG_STRING, .target = &o->tokens,
         .help = "the prompt as token ids, \"5,17,9\"; -: from standard input; prints the generated ids on one "
                 "line; needs no tokenizer"},
        {.name = "save", .argument = "FILE", .kind = LTN_FLAG_STRING, .target = &o->save,
         .help = "save the session at the end, also after Ctrl-C: all that was read and printed, in a file of a "
                 "size that depends on the model alone"},
        {.name = "load", .argument = "FILE", .kind = LTN_FLAG_STRING, .target = &o->load,
         .help = "go on from a saved session, with its draws unless --seed is given; a prompt, as a text of its "
                 "own, is optional then"},
        {.name = "prefix-cache", .argument = "DIR", .kind = LTN_FLAG_STRING, .target = &o->prefix_cache,
         .help = "resume the longest beginning of the prompt that was read before, and keep this one's for later"},
        {.name = "prefix-cache-size", .argument = "MB", .kind = LTN_FLAG_INT, .target = &o->prefix_mb, .min = 1,
         .max = 1 << 30, .help = "remove what was unused for longest while DIR has more MiB"},
        {.name = "ingest", .kind = LTN_FLAG_SWITCH, .target = &o->ingest,
         .help = "read standard input for as long as it lasts; answer -p (or --tokens) at its end, each answer on "
                 "a line, from a fork that is then dropped"},
        {.name = "every", .argument = "N", .kind = LTN_FLAG_STRING, .target = &o->every,
         .help = "with --ingest: answer after every N tokens, too, or, given Ns, after every N seconds in which "
                 "something came"},
        {.letter = 'i', .kind = LTN_FLAG_SWITCH, .target = &o->interactive,
         .help = "interactive: write on the text in turns with the model, at a terminal; /help there lists the "
                 "commands, Ctrl-C stops an answer. -n limits each answer"},
        {.name = "prefix", .argument = "TEXT", .kind = LTN_FLAG_STRING, .target = &o->prefix,
         .help = "with -i: put before each input, exactly as it is (a shell writes a newline as $'\\n')"},
        {.name = "suffix", .argument = "TEXT", .kind = LTN_FLAG_STRING, .target = &o->suffix,
         .help = "with -i: put after each input"},
        {.letter = 'j', .argument = "N", .kind = LTN_FLAG_INT, .target = &o->many, .max = LTN_BATCH_MAX,
         .help = "continue many prompts, N at once: each line of standard input or of -f FILE, or each FILE given, "
                 "is one; 0: all of the input is one prompt"},
        {.name = "json-prompts", .kind = LTN_FLAG_SWITCH, .target = &o->json_prompts,
         .help = "with -j: each line is a JSON object with the prompt under \"prompt\""},
        {.letter = '0', .name = "null", .kind = LTN_FLAG_SWITCH, .target = &o->nul,
         .help = "with -j: prompts and texts end in a NUL rather than a newline"},
        {.letter = 't', .argument = "THREADS", .kind = LTN_FLAG_INT, .target = &o->threads, .max = 1024,
         .help = "CPU threads; 0: one per core"},
        {.name = "device", .argument = "DEVICE", .kind = LTN_FLAG_DEVICE, .target = &o->device,
         .help = "auto, cpu, cuda or cuda:N; auto: CUDA where it works, else the CPU"},
        {.name = "prefill", .argument = "HOW", .kind = LTN_FLAG_CHOICE, .target = &o->prefill,
         .choices = "exact|fp8",
         .help = "fp8: read the input with products in e4m3, about twice as fast and coarser; needs a Hopper GPU"},
        {.name = "stats", .kind = LTN_FLAG_SWITCH, .target = &o->stats,
         .help = "print the speed on standard error, also as a share of the memory bandwidth measured here (above "
                 "100 % where the weights fit in a cache)"},
        {.letter = 'q', .kind = LTN_FLAG_SWITCH, .target = &o->quiet,
         .help = "print nothing but the text and errors"},
    };
    // clang-format on
    const struct ltn_program program = {
        .name = "ltn-run",
        .summary = "Continue a text with a TransNormerLLM.",
        .operands = "[FILE]...",
        .max_operands = INT_MAX,
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
        .notes =
            "Without -p, -f, --tokens, --load and -i the prompt is standard input. It may have any length "
            "and is "
            "taken exactly as it is, its last newline too. An empty prompt starts from the model's BOS "
            "token. Standard output carries the text and nothing else.\n\n"
            "What a run with --save prints, then one with --load and no prompt, is to the byte what one run "
            "would have printed: a character that is not whole at the end of the first waits for the second. "
            "--stop looks at the text of its own run. Nothing is saved where reading the prompt was "
            "interrupted.\n\n"
            "What a token may be is settled in this order: penalties, bias, temperature, top-k, typical, "
            "top-p, "
            "min-p. Log-probabilities are the model's own, before all of these.\n\n"
            "With -j the texts come in the order of the prompts, a newline after each; where texts hold "
            "newlines themselves, --null or --json tells them apart, or --stop keeps them to a line. What "
            "is made of prompt number i depends on the seed and i, not on N or the other prompts (on a GPU, "
            "within rounding). All options of sampling and -n apply to each prompt by itself; with --load "
            "each goes on from the saved session. A prompt that is refused ends the run when those before "
            "it are done.\n\n"
            "Exit status: 0 done, 1 failure, 2 wrong usage, 130 after Ctrl-C.",
    };
    int code = ltn_cli_parse(&program, argc, argv, &operand);
    if (code >= 0)
        return code;
    o->files = (const char *const *)argv + operand;
    o->n_files = (size_t)(argc - operand);
    return check(o);
}
