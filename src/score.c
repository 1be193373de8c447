/* ltn-score: how well a model predicts a text, in one exact stream of any length and in constant memory.
 *
 * Text is scored from its first token on, given the model's BOS token (for the demo: the token that ends a
 * document); where the model has none, and with --tokens, the first token has nothing before it and is not
 * scored. bits/byte = all scored nats / ln 2 / all bytes of the input.
 *
 * --logits: float32 [n, vocab] in NumPy's format; row i holds the logits after token i of the input.
 * --positions: CSV, the mean loss by position in the stream, in bins with edges d * 10^k, d = 1 .. 9 (so 1000
 * to 2000 is one, 10000 to 20000 another): columns first, end (exclusive), tokens, nats_per_token.
 */
#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "src/cli.h"
#include "src/ltn.h"
#include "src/outfile.h"
#include "tokenizer/tokenizer.h"

enum { LOGITS_MEMORY = 64 << 20, N_BINS = 9 * 18 + 1, NPY_HEADER = 128 };

struct options {
    const char *model, *file, *tokens, *logits, *positions;
    bool json;
    int64_t threads;
    const char *device;
};

struct bin {
    int64_t n;
    double nats;
};

struct score {
    const struct options *options;
    struct ltn_engine *engine;
    const struct ltn_engine_info *info;
    struct ltn_session *session;
    struct ltn_outfile npy, csv;

    int32_t *ids; /* [batch] input not yet run */
    int32_t batch, n_ids;
    int64_t n;      /* tokens of the input before ids */
    int64_t bytes;  /* of text */
    int64_t scored; /* tokens */
    double nats;    /* of all scored tokens */
    bool from_bos;  /* the first token was scored, after BOS */
    struct bin bins[N_BINS];
    double seconds; /* in the model */
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the loss ------------------------------------------------------------------------------------------ */

/* Bin 0 is position 0; then each decade has nine. */
static int bin_of(int64_t position)
{
    int decade = 0;
    for (; position >= 10; position /= 10)
        decade++;
    return position == 0 ? 0 : 9 * decade + (int)position;
}

static int64_t bin_begin(int bin)
{
    if (bin == 0)
        return 0;
    int64_t begin = (bin - 1) % 9 + 1;
    for (int decade = (bin - 1) / 9; decade > 0; decade--)
        begin *= 10;
    return begin;
}

/* -log softmax(logits)[id] */
static double loss(const float *logits, int32_t n, int32_t id)
{
    float largest = logits[0];
    double sum = 0;
    for (int32_t i = 1; i < n; i++)
        largest = logits[i] > largest ? logits[i] : largest;
    for (int32_t i = 0; i < n; i++)
        sum += expf(logits[i] - largest);
    return (double)largest - logits[id] + log(sum);
}

static enum ltn_status add_loss(struct score *s, const float *logits, int32_t id, int64_t position,
                                struct ltn_error *err)
{
    double nats = loss(logits, s->info->vocab_size, id);
    if (!isfinite(nats))
        return ltn_fail(err, LTN_ERR_INPUT, "token %lld: expected a finite loss, found %f",
                        (long long)position, nats);
    struct bin *bin = &s->bins[bin_of(position)];
    bin->n++;
    bin->nats += nats;
    s->nats += nats;
    s->scored++;
    return LTN_OK;
}

/* ---- the stream ---------------------------------------------------------------------------------------- */

/* Logits row r predicts the token after it; the batch's last row predicts the next batch's first token. */
static enum ltn_status take_logits(void *ctx, const float *logits, int64_t position, int32_t rows,
                                   struct ltn_error *err)
{
    struct score *s = ctx;
    const size_t V = (size_t)s->info->vocab_size;
    int64_t first = position - s->from_bos - s->n; /* index in s->ids of the first row's token */

    for (int32_t r = 0; r < rows; r++)
        if (first + r + 1 < s->n_ids)
            LTN_TRY(add_loss(s, logits + (size_t)r * V, s->ids[first + r + 1], s->n + first + r + 1, err));
    if (s->npy.file)
        LTN_TRY(ltn_outfile_write(&s->npy, logits, (size_t)rows * V * sizeof *logits, err));
    return LTN_OK;
}

static enum ltn_status run_batch(struct score *s, struct ltn_error *err)
{
    const float *before;

    if (s->n_ids == 0)
        return LTN_OK;
    double begin = now();
    int32_t bos = s->info->bos_id;
    if (s->n == 0 && !s->options->tokens && bos >= 0 && s->ids[0] != bos) { /* a text that has none */
        s->from_bos = true;
        LTN_TRY(ltn_session_feed(s->session, &bos, 1, err));
    }
    if (s->n > 0 || s->from_bos) {
        LTN_TRY(ltn_session_logits(s->session, &before, err));
        LTN_TRY(add_loss(s, before, s->ids[0], s->n, err));
    }
    LTN_TRY(ltn_session_score(s->session, s->ids, (size_t)s->n_ids, take_logits, s, err));
    s->n += s->n_ids;
    s->n_ids = 0;
    s->seconds += now() - begin;
    if (ltn_cli_interrupted())
        return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
    return LTN_OK;
}

static enum ltn_status take_id(void *ctx, int32_t id, struct ltn_error *err)
{
    struct score *s = ctx;
    s->ids[s->n_ids++] = id;
    return s->n_ids == s->batch ? run_batch(s, err) : LTN_OK;
}

static enum ltn_status take_ids(void *ctx, const int32_t *ids, size_t n, struct ltn_error *err)
{
    for (size_t i = 0; i < n; i++)
        LTN_TRY(take_id(ctx, ids[i], err));
    return LTN_OK;
}

struct text_reader {
    struct score *score;
    struct ltn_encoder *encoder;
};

static enum ltn_status take_text(void *ctx, const char *text, size_t bytes, struct ltn_error *err)
{
    struct text_reader *reader = ctx;
    reader->score->bytes += (int64_t)bytes;
    return ltn_encoder_feed(reader->encoder, text, bytes, err);
}

static enum ltn_status read_text(struct score *s, struct ltn_error *err)
{
    struct text_reader reader = {.score = s};

    if (!s->info->has_tokenizer)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                        "the model has no tokenizer: expected token ids by --tokens, found text");
    LTN_TRY(ltn_encoder_create(&reader.encoder, ltn_engine_tokenizer(s->engine), take_ids, s, err));
    enum ltn_status status = ltn_cli_read(s->options->file ? s->options->file : "-", take_text, &reader, err);
    if (status == LTN_OK)
        status = ltn_encoder_finish(reader.encoder, err);
    ltn_encoder_free(reader.encoder);
    return status;
}

static enum ltn_status parse_ids(void *parser, const char *text, size_t bytes, struct ltn_error *err)
{
    return ltn_id_parser_feed(parser, text, bytes, err);
}

static enum ltn_status read_tokens(struct score *s, struct ltn_error *err)
{
    struct ltn_id_parser parser = {.fn = take_id, .ctx = s};
    const char *tokens = s->options->tokens;

    if (strcmp(tokens, "-") == 0)
        LTN_TRY(ltn_cli_read("-", parse_ids, &parser, err));
    else
        LTN_TRY(ltn_id_parser_feed(&parser, tokens, strlen(tokens), err));
    return ltn_id_parser_finish(&parser, err);
}

/* ---- results ------------------------------------------------------------------------------------------- */

/* NumPy's format 1.0: magic, version, header length, a Python literal padded to NPY_HEADER bytes in all. */
static void npy_header(char header[NPY_HEADER], int64_t rows, int32_t columns)
{
    char literal[NPY_HEADER];
    int n =
        snprintf(literal, sizeof literal, "{'descr': '<f4', 'fortran_order': False, 'shape': (%lld, %d), }",
                 (long long)rows, columns);
    memset(header, ' ', NPY_HEADER);
    memcpy(header, "\x93NUMPY\x01\x00", 8);
    header[8] = NPY_HEADER - 10;
    header[9] = 0;
    memcpy(header + 10, literal, (size_t)n);
    header[NPY_HEADER - 1] = '\n';
}

static enum ltn_status begin_npy(struct score *s, struct ltn_error *err)
{
    char header[NPY_HEADER];
    LTN_TRY(ltn_outfile_open(&s->npy, s->options->logits, err));
    npy_header(header, 0, s->info->vocab_size); /* the number of rows follows at the end */
    return ltn_outfile_write(&s->npy, header, sizeof header, err);
}

static enum ltn_status finish_npy(struct score *s, struct ltn_error *err)
{
    char header[NPY_HEADER];
    npy_header(header, s->n, s->info->vocab_size);
    if (fseek(s->npy.file, 0, SEEK_SET) != 0)
        return ltn_fail(err, LTN_ERR_IO, "%s: expected a file that can be sought in", s->options->logits);
    LTN_TRY(ltn_outfile_write(&s->npy, header, sizeof header, err));
    return ltn_outfile_commit(&s->npy, err);
}

static enum ltn_status write_positions(struct score *s, struct ltn_error *err)
{
    fprintf(s->csv.file, "first,end,tokens,nats_per_token\n");
    for (int b = 0; b < N_BINS; b++)
        if (s->bins[b].n > 0)
            fprintf(s->csv.file, "%lld,%lld,%lld,%.6f\n", (long long)bin_begin(b),
                    (long long)bin_begin(b + 1), (long long)s->bins[b].n,
                    s->bins[b].nats / (double)s->bins[b].n);
    return ltn_outfile_commit(&s->csv, err); /* fprintf's failures show here */
}

/* The figures, in the order in which they are printed. A NaN stands for "none". */
struct figure {
    const char *key;
    double value;
    bool count; /* printed as a whole number */
};

enum { N_FIGURES = 8 };

static void figures(const struct score *s, struct figure f[N_FIGURES])
{
    double mean = s->scored ? s->nats / (double)s->scored : NAN;
    double bits_per_byte = s->scored && s->bytes ? s->nats / M_LN2 / (double)s->bytes : NAN;
    const struct figure all[N_FIGURES] = {
        {"tokens", (double)s->n, true},
        {"scored_tokens", (double)s->scored, true},
        {"bytes", s->options->tokens ? NAN : (double)s->bytes, true},
        {"nats", s->scored ? s->nats : NAN, false},
        {"nats_per_token", mean, false},
        {"perplexity", exp(mean), false},
        {"bits_per_byte", bits_per_byte, false},
        {"tokens_per_second", s->seconds > 0 ? (double)s->n / s->seconds : NAN, false},
    };
    memcpy(f, all, sizeof all);
}

static const char *context(const struct score *s)
{
    return s->from_bos ? "BOS" : "none";
}

static enum ltn_status print_table(const struct score *s, struct ltn_error *err)
{
    struct figure f[N_FIGURES];
    figures(s, f);
    for (int i = 0; i < N_FIGURES; i++) {
        if (isnan(f[i].value))
            LTN_TRY(ltn_cli_printf(err, "%-18s -\n", f[i].key));
        else
            LTN_TRY(ltn_cli_printf(err, f[i].count ? "%-18s %.0f\n" : "%-18s %.6g\n", f[i].key, f[i].value));
    }
    return ltn_cli_printf(err, "%-18s %s\n", "first_token",
                          s->from_bos ? "scored, given BOS" : "not scored, it has nothing before it");
}

static enum ltn_status print_json(const struct score *s, struct ltn_error *err)
{
    struct figure f[N_FIGURES];
    cJSON *json = cJSON_CreateObject();

    figures(s, f);
    for (int i = 0; i < N_FIGURES; i++)
        cJSON_AddNumberToObject(json, f[i].key, f[i].value); /* prints NaN as null */
    cJSON_AddStringToObject(json, "first_token_given", context(s));
    cJSON_AddStringToObject(json, "model", s->info->checksum);
    cJSON_AddStringToObject(json, "device", s->info->backend);
    char *text = cJSON_Print(json);
    cJSON_Delete(json);
    if (!text)
        return ltn_fail(err, LTN_ERR_MEMORY, "JSON: no memory");
    enum ltn_status status = ltn_cli_printf(err, "%s\n", text);
    cJSON_free(text);
    return status;
}

/* ---- the program --------------------------------------------------------------------------------------- */

static enum ltn_status open_all(struct score *s, struct ltn_error *err)
{
    const struct options *o = s->options;
    struct ltn_progress progress = {"loading the model", -1};
    const struct ltn_engine_options options = {.device = o->device,
                                               .n_threads = (int)o->threads,
                                               .progress = ltn_cli_progress,
                                               .progress_ctx = &progress};
    char path[4096];

    LTN_TRY(ltn_cli_write("", 0, err));
    LTN_TRY(ltn_cli_model(path, sizeof path, o->model, err));
    LTN_TRY(ltn_engine_open(&s->engine, path, &options, err));
    s->info = ltn_engine_info(s->engine);
    if (s->info->notice)
        ltn_cli_note("%s", s->info->notice);

    int64_t rows = LOGITS_MEMORY / ((int64_t)sizeof(float) * s->info->vocab_size);
    s->batch = rows < 1 ? 1 : rows < s->info->chunk_rows ? (int32_t)rows : s->info->chunk_rows;
    s->ids = malloc((size_t)s->batch * sizeof *s->ids);
    if (!s->ids)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %d ids", s->batch);
    const struct ltn_session_options session = {.chunk_rows = s->batch, .score_rows = s->batch};
    LTN_TRY(ltn_session_create(&s->session, s->engine, &session, err));
    if (o->logits)
        LTN_TRY(begin_npy(s, err));
    if (o->positions)
        LTN_TRY(ltn_outfile_open(&s->csv, o->positions, err));
    return LTN_OK;
}

static enum ltn_status run_all(struct score *s, struct ltn_error *err)
{
    LTN_TRY(open_all(s, err));
    LTN_TRY(s->options->tokens ? read_tokens(s, err) : read_text(s, err));
    LTN_TRY(run_batch(s, err));
    if (s->n == 0)
        return ltn_fail(err, LTN_ERR_INPUT, "nothing to score: expected some input, found none");
    if (s->options->logits)
        LTN_TRY(finish_npy(s, err));
    if (s->options->positions)
        LTN_TRY(write_positions(s, err));
    return s->options->json ? print_json(s, err) : print_table(s, err);
}

int main(int argc, char **argv)
{
    struct options o = {.device = "auto"};
    // clang-format off
    const struct ltn_flag flags[] = {
        {.letter = 'm', .argument = "MODEL", .kind = LTN_FLAG_STRING, .target = &o.model,
         .help = "the model, a .ltn file; without it $LTN_MODEL, else the model that ships with ltn"},
        {.letter = 'f', .argument = "FILE", .kind = LTN_FLAG_STRING, .target = &o.file,
         .help = "the text to score; -: standard input"},
        {.name = "tokens", .argument = "IDS", .kind = LTN_FLAG_STRING, .target = &o.tokens,
         .help = "score token ids, \"5,17,9\", just as they are; -: from standard input; needs no tokenizer"},
        {.name = "logits", .argument = "OUT.npy", .kind = LTN_FLAG_STRING, .target = &o.logits,
         .help = "write all logits, float32 [tokens, vocabulary] in NumPy's format; row i: after token i"},
        {.name = "positions", .argument = "OUT.csv", .kind = LTN_FLAG_STRING, .target = &o.positions,
         .help = "write the mean loss by position, in bins from 1 to 2, ... 9 to 10, 10 to 20, 20 to 30, ..."},
        {.name = "json", .kind = LTN_FLAG_SWITCH, .target = &o.json, .help = "print the result as JSON"},
        {.letter = 't', .argument = "THREADS", .kind = LTN_FLAG_INT, .target = &o.threads, .max = 1024,
         .help = "CPU threads; 0: one per core"},
        {.name = "device", .argument = "DEVICE", .kind = LTN_FLAG_DEVICE, .target = &o.device,
         .help = "auto, cpu, cuda or cuda:N; auto: CUDA where it works, else the CPU"},
    };
    // clang-format on
    const struct ltn_program program = {
        .name = "ltn-score",
        .summary = "Measure how well a TransNormerLLM predicts a text.",
        .flags = flags,
        .n_flags = sizeof flags / sizeof *flags,
        .notes =
            "Without -f and --tokens the text is standard input. It is one stream of any length. Text is "
            "scored from its first token on, given the model's BOS token where it has one; otherwise, and "
            "with --tokens, the first token is not scored. bits_per_byte is all scored nats / ln 2 / all "
            "bytes of the text.\n\n"
            "Exit status: 0 done, 1 failure, 2 wrong usage, 130 after Ctrl-C.",
    };
    struct score s = {.options = &o};
    struct ltn_error err;

    int code = ltn_cli_parse(&program, argc, argv, NULL);
    if (code < 0 && o.file && o.tokens)
        code = ltn_cli_bad_usage("expected at most one of -f and --tokens");
    if (code < 0 && !o.file && !o.tokens && isatty(STDIN_FILENO))
        code = ltn_cli_bad_usage("no text: expected -f, --tokens or text on standard input; see "
                                 "ltn-score --help");
    if (code < 0 && o.tokens)
        code = ltn_cli_check_ids("--tokens", o.tokens);
    if (code >= 0)
        return code;
    ltn_cli_catch_signals();
    code = run_all(&s, &err) == LTN_OK ? LTN_EXIT_OK : ltn_cli_error(&err);
    ltn_outfile_abandon(&s.npy);
    ltn_outfile_abandon(&s.csv);
    free(s.ids);
    ltn_session_free(s.session);
    ltn_engine_close(s.engine);
    return code;
}
