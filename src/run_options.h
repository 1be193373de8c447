/* What ltn-run is asked to do. */
#ifndef LTN_RUN_OPTIONS_H
#define LTN_RUN_OPTIONS_H

#include "src/cli.h"
#include "src/ltn.h"

/* Named as the options are; what each does and its limits stand in the table in src/run_options.c. */
struct ltn_run_options {
    const char *model, *prompt, *file, *tokens;
    int64_t n;
    double temperature;
    int64_t top_k;
    double top_p, min_p, typical;
    int64_t repeat_last;
    double repeat_penalty, presence_penalty, frequency_penalty;
    struct ltn_strings bias_texts;               /* "ID=VALUE" */
    struct ltn_logit_bias bias[LTN_MAX_REPEATS]; /* [bias_texts.n] what they say */
    int64_t n_best, logprobs;                    /* logprobs -1: none are printed */
    bool json;
    struct ltn_seed seed;
    struct ltn_strings stop;
    bool ignore_eos, echo, stats, quiet;
    int64_t threads;
    const char *device, *prefill;
    const char *save, *load, *prefix_cache;
    int64_t prefix_mb;
    bool ingest;
    const char *every;    /* "N" or "Ns" */
    int64_t every_tokens; /* what it says; 0: the other one holds */
    double every_seconds;
    bool interactive;
    const char *prefix, *suffix;
    int64_t many;
    bool json_prompts, nul;
    const char *const *files; /* [n_files] operands */
    size_t n_files;
};

/* The options that the command line gives, the defaults for the others, checked for what goes together.
 * Returns -1 to go on, else the exit code to leave with, as ltn_cli_parse does. Strings point into argv. */
int ltn_run_parse_options(struct ltn_run_options *options, int argc, char **argv);

#endif
