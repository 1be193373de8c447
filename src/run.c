/* ltn-run: continue a text. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "src/bandwidth.h"
#include "src/engine.h"
#include "src/ingest.h"
#include "src/interactive.h"
#include "src/jsonl.h"
#include "src/many.h"
#include "src/prefix_cache.h"
#include "src/run_options.h"
#include "src/session_file.h"

/* Long prompts on the command line are fed in slices, so that a signal is seen in time. */
enum { SLICE = 16384 };

struct run {
    const struct ltn_run_options *options;
    struct ltn_engine *engine;
    struct ltn_session *session;
    struct ltn_prefix_cache *cache; /* the prompt goes through it; NULL: straight into the session */
    int64_t start;                  /* position before the prompt is read */
    bool terminal;                  /* stdout is one */
    int64_t ids_printed;            /* with --tokens */
    struct ltn_jsonl jsonl;
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
    if (run->cache)
        LTN_TRY(ltn_prefix_feed_text(run->cache, text, bytes, err));
    else
        LTN_TRY(ltn_session_feed_text(run->session, text, bytes, err));
    run->prefill_seconds += now() - begin;
    return run->options->echo ? ltn_cli_write(text, bytes, err) : LTN_OK;
}

static enum ltn_status feed_id(void *ctx, int32_t id, struct ltn_error *err)
{
    struct run *run = ctx;
    double begin = now();
    if (run->cache)
        LTN_TRY(ltn_prefix_feed(run->cache, &id, 1, err));
    else
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
    const struct ltn_run_options *o = run->options;

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
    else if (o->file || !o->load)
        LTN_TRY(ltn_cli_read(o->file ? o->file : "-", feed_text, run, err));
    return ltn_session_end_text(run->session, err);
}

/* The prompt by way of the prefix cache. */
static enum ltn_status resume_prompt(struct run *run, struct ltn_error *err)
{
    const struct ltn_run_options *o = run->options;
    LTN_TRY(ltn_prefix_open(&run->cache, run->session, o->prefix_cache, (uint64_t)o->prefix_mb << 20, err));
    LTN_TRY(read_prompt(run, err));
    double begin = now();
    LTN_TRY(ltn_prefix_finish(run->cache, &run->start, err));
    run->prefill_seconds += now() - begin;
    if (!o->quiet)
        ltn_cli_note("%s: resumed %lld of %lld prompt tokens", o->prefix_cache, (long long)run->start,
                     (long long)ltn_session_position(run->session));
    if (ltn_prefix_warning(run->cache) && !o->quiet)
        ltn_cli_note("prefix cache: not stored: %s", ltn_prefix_warning(run->cache));
    return LTN_OK;
}

static enum ltn_status prefill(struct run *run, struct ltn_error *err)
{
    const struct ltn_engine_info *info = ltn_engine_info(run->engine);
    const float *logits;

    if (!run->options->tokens && !run->options->load && !info->has_tokenizer)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                        "the model has no tokenizer: expected token ids by --tokens, found text");
    LTN_TRY(run->options->prefix_cache ? resume_prompt(run, err) : read_prompt(run, err));
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
    if (run->jsonl.form != LTN_JSONL_NONE) {
        LTN_TRY(ltn_jsonl_piece(&run->jsonl, id, text, bytes, err));
    } else if (run->options->tokens) {
        if (id >= 0)
            LTN_TRY(print_id(run, id, err));
    } else if (bytes > 0) {
        LTN_TRY(ltn_cli_write(text, bytes, err));
    }
    if (ltn_cli_interrupted())
        return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
    return LTN_OK;
}

static enum ltn_status note_drawn(void *ctx, int32_t id, const float *logits, struct ltn_error *err)
{
    struct run *run = ctx;
    return ltn_jsonl_drawn(&run->jsonl, id, logits, err);
}

static void print_stats(const struct run *run, int64_t n_prompt, const struct ltn_generated *made)
{
    const struct ltn_engine_info *info = ltn_engine_info(run->engine);
    struct ltn_bandwidth bandwidth;
    char decode[160] = "", share[80] = "", upload[40] = "";

    if (made->n_tokens > 1) { /* between the first token and the last lie n - 1 steps */
        double tok_s = (double)(made->n_tokens - 1) / (run->last_token - run->first_token);
        double gbps = 1e-9 * tok_s * (double)info->decode_bytes;
        if (ltn_measure_bandwidth(&bandwidth, run->engine->be, info->n_threads, NULL) == LTN_OK)
            snprintf(share, sizeof share, ", %.1f %% of the %.1f GB/s measured here",
                     100 * gbps / bandwidth.read_gbps, bandwidth.read_gbps);
        snprintf(decode, sizeof decode, "; decode %.1f tok/s, %.2f GB/s", tok_s, gbps);
    }
    if (!run->engine->be->host_memory) /* there they are mapped, and nothing has moved */
        snprintf(upload, sizeof upload, ", %.1f GB/s",
                 1e-9 * (double)info->weights_bytes / info->load_seconds);
    ltn_cli_note("%s: started in %.3f s, %.1f MB of weights in %.3f s%s; prefill %lld tokens, %.1f tok/s%s%s",
                 info->backend, info->start_seconds, 1e-6 * (double)info->weights_bytes, info->load_seconds,
                 upload, (long long)n_prompt, (double)n_prompt / run->prefill_seconds, decode, share);
}

/* Without a seed of the user's, one from the clock, named so that the text can be had again. */
static uint64_t choose_seed(const struct ltn_run_options *o)
{
    struct timespec t;
    if (o->seed.given)
        return o->seed.value;
    clock_gettime(CLOCK_REALTIME, &t);
    uint64_t seed = ((uint64_t)t.tv_sec * 1000003u ^ (uint64_t)t.tv_nsec) & 0xffffffffu;
    if (o->temperature > 0 && !o->quiet)
        ltn_cli_note("seed %llu", (unsigned long long)seed);
    return seed;
}

static struct ltn_sampling sampling_of(const struct ltn_run_options *o)
{
    return (struct ltn_sampling){.temperature = o->temperature,
                                 .top_k = (int32_t)o->top_k,
                                 .top_p = o->top_p,
                                 .min_p = o->min_p,
                                 .typical = o->typical,
                                 .repeat_last = (int32_t)o->repeat_last,
                                 .repeat_penalty = o->repeat_penalty,
                                 .presence_penalty = o->presence_penalty,
                                 .frequency_penalty = o->frequency_penalty,
                                 .bias = o->bias,
                                 .n_bias = o->bias_texts.n};
}

/* One text, from run->session on; `index` of several (else 0). */
static enum ltn_status generate_one(struct run *run, int64_t index, struct ltn_generated *made,
                                    struct ltn_error *err)
{
    const struct ltn_run_options *o = run->options;
    const bool json = run->jsonl.form != LTN_JSONL_NONE;
    const struct ltn_sampling sampling = sampling_of(o);
    const struct ltn_generate_options options = {
        .sampling = &sampling,
        .max_tokens = o->n,
        .ignore_eos = o->ignore_eos,
        .stop = o->stop.v,
        .n_stop = o->stop.n,
        .keep_open = o->save && !o->ingest, /* the run that resumes completes it */
        .piece = print_piece,
        .drawn = json ? note_drawn : NULL,
        .ctx = run,
    };

    if (json)
        LTN_TRY(ltn_jsonl_begin(&run->jsonl, index, err));
    else if (o->n_best > 1 && !o->tokens) /* as head(1) and tail(1) tell texts apart */
        LTN_TRY(ltn_cli_printf(err, "%s==> %lld of %lld <==\n", index ? "\n" : "", (long long)index + 1,
                               (long long)o->n_best));
    LTN_TRY(ltn_generate(run->session, &options, made, err));
    if (json)
        return ltn_jsonl_end(&run->jsonl, made->end, err);
    /* ids, answers and texts of several make lines; one text is left as it is, but for a terminal */
    if (o->tokens || run->terminal || o->ingest || o->n_best > 1)
        return ltn_cli_write("\n", 1, err);
    return LTN_OK;
}

/* Several texts, each from a fork of the session. */
static enum ltn_status generate_forks(struct run *run, struct ltn_generated *made, struct ltn_error *err)
{
    struct ltn_session *session = run->session, *fork;
    int64_t n_tokens = 0;

    LTN_TRY(ltn_session_create(&fork, run->engine, NULL, err));
    enum ltn_status status = LTN_OK;
    run->session = fork;
    for (int64_t i = 0; i < run->options->n_best && status == LTN_OK && made->end != LTN_END_STOPPED; i++) {
        status = ltn_session_copy(fork, session, err);
        ltn_session_skip(fork, (uint64_t)i * LTN_FORK_DRAWS);
        run->ids_printed = 0;
        if (status == LTN_OK)
            status = generate_one(run, i, made, err);
        n_tokens += made->n_tokens;
    }
    made->n_tokens = n_tokens;
    run->session = session;
    ltn_session_free(fork);
    return status;
}

static enum ltn_status generate(struct run *run, struct ltn_error *err)
{
    const struct ltn_run_options *o = run->options;
    struct ltn_generated made = {0};
    int64_t n_prompt = ltn_session_position(run->session) - run->start;

    LTN_TRY(o->n_best > 1 ? generate_forks(run, &made, err) : generate_one(run, 0, &made, err));
    if (o->stats && !o->ingest)
        print_stats(run, n_prompt, &made);
    return made.end == LTN_END_STOPPED ? ltn_fail(err, LTN_ERR_STOPPED, "stopped") : LTN_OK;
}

/* ---- endless input ------------------------------------------------------------------------------------- */

static enum ltn_status print_answer(void *ctx, struct ltn_session *fork, struct ltn_error *err)
{
    struct run *run = ctx;
    struct ltn_session *session = run->session;
    run->session = fork;
    run->ids_printed = 0;
    enum ltn_status status = generate(run, err);
    run->session = session;
    return status;
}

static enum ltn_status keep_id(void *next, int32_t id, struct ltn_error *err)
{
    (void)err;
    *(*(int32_t **)next)++ = id;
    return LTN_OK;
}

/* *ids is malloc'd. */
static enum ltn_status read_question(const struct run *run, int32_t **ids, size_t *n, struct ltn_error *err)
{
    const struct ltn_run_options *o = run->options;
    if (o->prompt)
        return ltn_engine_tokenize(run->engine, o->prompt, strlen(o->prompt), ids, n, err);
    if (!o->tokens)
        return LTN_OK;
    *ids = malloc((strlen(o->tokens) / 2 + 1) * sizeof **ids); /* a digit and a comma each */
    if (!*ids)
        return ltn_fail(err, LTN_ERR_MEMORY, "--tokens: no memory");
    int32_t *next = *ids;
    struct ltn_id_parser parser = {.fn = keep_id, .ctx = &next};
    LTN_TRY(ltn_id_parser_feed(&parser, o->tokens, strlen(o->tokens), err));
    LTN_TRY(ltn_id_parser_finish(&parser, err));
    *n = (size_t)(next - *ids);
    return LTN_OK;
}

static enum ltn_status ingest(struct run *run, struct ltn_error *err)
{
    const struct ltn_run_options *o = run->options;
    struct ltn_ingest in = {.session = run->session,
                            .engine = run->engine,
                            .ids = o->tokens != NULL,
                            .echo = o->echo,
                            .every_tokens = o->every_tokens,
                            .every_seconds = o->every_seconds,
                            .answer = o->prompt || o->tokens ? print_answer : NULL,
                            .ctx = run};
    int32_t *question = NULL;
    double begin = now();

    enum ltn_status status = read_question(run, &question, &in.n_question, err);
    in.question = question;
    if (status == LTN_OK)
        status = ltn_ingest(&in, err);
    free(question);
    int64_t n = ltn_session_position(run->session) - run->start;
    if (o->stats)
        ltn_cli_note("%s: %lld tokens, %.1f tok/s with the answers", ltn_engine_info(run->engine)->backend,
                     (long long)n, (double)n / (now() - begin));
    return status;
}

/* ---- a person at a terminal ---------------------------------------------------------------------------- */

static enum ltn_status interactive(struct run *run, struct ltn_error *err)
{
    const struct ltn_run_options *o = run->options;
    const struct ltn_sampling sampling = sampling_of(o);
    const struct ltn_generate_options options = {.sampling = &sampling,
                                                 .max_tokens = o->n,
                                                 .ignore_eos = o->ignore_eos,
                                                 .stop = o->stop.v,
                                                 .n_stop = o->stop.n};
    return ltn_interactive(&(struct ltn_interactive){.engine = run->engine,
                                                     .session = run->session,
                                                     .options = &options,
                                                     .prefix = o->prefix ? o->prefix : "",
                                                     .suffix = o->suffix ? o->suffix : "",
                                                     .stats = o->stats,
                                                     .quiet = o->quiet},
                           err);
}

/* ---- many prompts -------------------------------------------------------------------------------------- */

static enum ltn_status answer_many(struct run *run, struct ltn_error *err)
{
    const struct ltn_run_options *o = run->options;
    const struct ltn_sampling sampling = sampling_of(o);
    struct ltn_many many = {
        .engine = run->engine,
        .width = (int32_t)o->many,
        .from = o->load ? run->session : NULL,
        .seed = choose_seed(o),
        .file = o->tokens ? o->tokens
                : o->file ? o->file
                          : "-",
        .files = o->files,
        .n_files = o->n_files,
        .nul = o->nul,
        .json_in = o->json_prompts,
        .json_out = o->json,
        .ids = o->tokens != NULL,
        .echo = o->echo,
        .max_waiting = 16 << 20,
        .generate = {.sampling = &sampling,
                     .max_tokens = o->n,
                     .ignore_eos = o->ignore_eos,
                     .stop = o->stop.v,
                     .n_stop = o->stop.n},
    };
    double begin = now();
    enum ltn_status status = ltn_many(&many, err);
    double seconds = now() - begin;
    if (o->stats)
        ltn_cli_note("%s: %lld prompts, %lld tokens read, %lld made, %.1f tok/s made; %.1f texts a step",
                     ltn_engine_info(run->engine)->backend, (long long)many.n_prompts, (long long)many.n_read,
                     (long long)many.n_made, (double)many.n_made / seconds,
                     many.n_steps ? (double)many.n_rows / (double)many.n_steps : 0.0);
    return status;
}

/* ---- the program --------------------------------------------------------------------------------------- */

static enum ltn_status open_all(struct run *run, struct ltn_error *err)
{
    const struct ltn_run_options *o = run->options;
    struct ltn_progress progress = {"loading the model", -1};
    struct ltn_engine_options options = {
        .device = o->device, .n_threads = (int)o->threads, .prefill = o->prefill};
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
    const int32_t V = ltn_engine_info(run->engine)->vocab_size;
    for (size_t i = 0; i < o->bias_texts.n; i++)
        if (o->bias[i].id >= V)
            return ltn_fail(err, LTN_ERR_INPUT, "--logit-bias: expected an id from 0 to %d, found %d", V - 1,
                            o->bias[i].id);
    run->jsonl = (struct ltn_jsonl){.engine = run->engine,
                                    .form = o->json            ? LTN_JSONL_TEXT
                                            : o->logprobs >= 0 ? LTN_JSONL_TOKENS
                                                               : LTN_JSONL_NONE,
                                    .ids = o->tokens != NULL,
                                    .indexed = o->n_best > 1,
                                    .n_top = o->logprobs > 0 ? (int32_t)o->logprobs : 0};
    if (o->many && !o->load)
        return LTN_OK; /* it makes its own sessions */
    LTN_TRY(ltn_session_create(&run->session, run->engine, NULL, err));
    if (o->save)
        LTN_TRY(ltn_session_file_check(o->save, err));
    if (!o->load)
        return LTN_OK;
    LTN_TRY(ltn_session_load(run->session, o->load, err));
    run->start = ltn_session_position(run->session);
    if (!o->quiet)
        ltn_cli_note("%s: resumed at token %lld", o->load, (long long)run->start);
    return LTN_OK;
}

static enum ltn_status save(struct run *run, struct ltn_error *err)
{
    const struct ltn_run_options *o = run->options;
    LTN_TRY(ltn_session_save(run->session, o->save, err));
    if (!o->quiet)
        ltn_cli_note("%s: saved at token %lld", o->save, (long long)ltn_session_position(run->session));
    return LTN_OK;
}

static enum ltn_status run_all(struct run *run, struct ltn_error *err)
{
    const struct ltn_run_options *o = run->options;

    LTN_TRY(open_all(run, err));
    if (o->many)
        return answer_many(run, err);
    if (o->interactive && !ltn_engine_info(run->engine)->has_tokenizer)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "-i: the model has no tokenizer, only token ids work");
    if (!o->ingest && (!o->interactive || o->prompt || o->file)) /* with -i the person begins, or goes on */
        LTN_TRY(prefill(run, err));
    if (o->seed.given || !o->load) /* else the session goes on with its own draws */
        ltn_session_seed(run->session, choose_seed(o));
    enum ltn_status status = o->interactive ? interactive(run, err)
                             : o->ingest    ? ingest(run, err)
                                            : generate(run, err);
    /* what was read of a stream is kept, whatever ended it; a text that was cut short is not */
    if (!o->save || (status != LTN_OK && status != LTN_ERR_STOPPED && !o->ingest))
        return status;
    struct ltn_error why;
    enum ltn_status saved = save(run, &why);
    if (saved == LTN_OK || (status != LTN_OK && status != LTN_ERR_STOPPED)) /* the first failure is told */
        return status;
    *err = why;
    return saved;
}

int main(int argc, char **argv)
{
    struct ltn_run_options options;
    struct run run = {.options = &options};
    struct ltn_error err;

    int code = ltn_run_parse_options(&options, argc, argv);
    if (code >= 0)
        return code;
    ltn_cli_catch_signals();
    run.terminal = isatty(STDOUT_FILENO);
    code = run_all(&run, &err) == LTN_OK ? LTN_EXIT_OK : ltn_cli_error(&err);
    ltn_prefix_close(run.cache);
    ltn_session_free(run.session);
    ltn_jsonl_free(&run.jsonl);
    ltn_engine_close(run.engine);
    return code;
}
