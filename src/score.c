/* ltn-score: how well a model predicts a text, in one exact stream of any length and in constant memory.
 *
 * Text is scored from its first token on, given the model's BOS token (for the demo: the token that ends a
 * document); where the model has none, and with --tokens, the first token has nothing before it and is not
 * scored. bits/byte = all scored nats / ln 2 / all bytes of the input.
 *
 * --logits: float32 [n, vocab] in NumPy's format; row i holds the logits after token i of the input.
 * --positions: CSV, the mean loss by position in the stream, in bins with edges d * 10^k, d = 1 .. 9 (so 1000
 * to 2000 is one, 10000 to 20000 another): columns first, end (exclusive), tokens, nats_per_token, stderr;
 * with --reference also reference_nats_per_token and kl, both means over the same tokens.
 * tools/plot_loss.py draws it.
 *
 * --reference: the same ids run through a second model, whose predictions are the truth: after every token of
 * the input (and after BOS) the Kullback-Leibler divergence from it, whether both find the same token the
 * likeliest, and the largest difference of any logit.
 *
 * Standard errors are those of means of independent tokens; of perplexity: perplexity times that of the mean
 * loss.
 */
#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "src/cli.h"
#include "src/divergence.h"
#include "src/ltn.h"
#include "src/outfile.h"
#include "tokenizer/tokenizer.h"

enum { LOGITS_MEMORY = 64 << 20, N_BINS = 9 * 18 + 1, NPY_HEADER = 128 };

struct options {
    const char *model, *reference, *file, *tokens, *logits, *positions;
    bool json;
    const char *prefill;
    int64_t threads;
    const char *device;
};

struct bin {
    int64_t n;
    double nats, squares;      /* sums over its tokens */
    double reference_nats, kl; /* with a reference */
};

/* A model and its reading of the text. */
struct reader {
    struct ltn_engine *engine;
    const struct ltn_engine_info *info;
    struct ltn_session *session;
};

/* What is known of a prediction, of the next token, once it is made. */
struct prediction {
    const float *logits, *reference; /* [vocab_size]; reference: NULL without one */
    double lse, reference_lse, kl;
};

struct score {
    const struct options *options;
    struct reader model, reference; /* without --reference its engine is NULL */
    struct ltn_outfile npy, csv;
    float *reference_logits; /* [batch, vocab_size] after each of ids */
    struct ltn_divergence divergence;

    int32_t *ids; /* [batch] input not yet run */
    int32_t batch, n_ids;
    int64_t n;                 /* tokens of the input before ids */
    int64_t bytes;             /* of text */
    struct prediction pending; /* of the token after ids; its pointers are not to be used */
    struct bin all;            /* of all scored tokens */
    bool from_bos;             /* the first token was scored, after BOS */
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

static struct prediction predict(struct score *s, const float *logits, const float *reference)
{
    const int32_t V = s->model.info->vocab_size;
    struct prediction p = {.logits = logits, .reference = reference, .lse = ltn_log_sum_exp(logits, V)};
    if (reference) {
        p.reference_lse = ltn_log_sum_exp(reference, V);
        p.kl = ltn_divergence_add(&s->divergence, reference, p.reference_lse, logits, p.lse, V);
    }
    return p;
}

static void bin_add(struct bin *bin, double nats, double reference_nats, double kl)
{
    bin->n++;
    bin->nats += nats;
    bin->squares += nats * nats;
    bin->reference_nats += reference_nats;
    bin->kl += kl;
}

/* The standard error of the mean loss; NaN for fewer than two tokens. */
static double standard_error(double sum, double squares, int64_t n)
{
    double variance = (squares - sum * sum / (double)n) / (double)(n - 1);
    return n > 1 ? sqrt((variance > 0 ? variance : 0) / (double)n) : NAN;
}

/* The loss of a token, -log softmax(logits)[id], after what was predicted. */
static enum ltn_status add_loss(struct score *s, const struct prediction *p, int32_t id, int64_t position,
                                struct ltn_error *err)
{
    double nats = p->lse - p->logits[id];
    double reference_nats = p->reference ? p->reference_lse - p->reference[id] : 0;
    if (!isfinite(nats) || !isfinite(reference_nats) || !isfinite(p->kl))
        return ltn_fail(err, LTN_ERR_INPUT, "token %lld: expected a finite loss, found %f",
                        (long long)position, isfinite(nats) ? reference_nats : nats);
    bin_add(&s->bins[bin_of(position)], nats, reference_nats, p->kl);
    bin_add(&s->all, nats, reference_nats, p->kl);
    return LTN_OK;
}

/* ---- the stream ---------------------------------------------------------------------------------------- */

static enum ltn_status keep_logits(void *ctx, const float *logits, int64_t position, int32_t rows,
                                   struct ltn_error *err)
{
    (void)err;
    struct score *s = ctx;
    const size_t V = (size_t)s->model.info->vocab_size;
    memcpy(s->reference_logits + (size_t)(position - s->from_bos - s->n) * V, logits,
           (size_t)rows * V * sizeof *logits);
    return LTN_OK;
}

/* Logits row r predicts the token after it; the batch's last row predicts the next batch's first token. */
static enum ltn_status take_logits(void *ctx, const float *logits, int64_t position, int32_t rows,
                                   struct ltn_error *err)
{
    struct score *s = ctx;
    const size_t V = (size_t)s->model.info->vocab_size;
    int64_t first = position - s->from_bos - s->n; /* index in s->ids of the first row's token */

    for (int32_t r = 0; r < rows; r++) {
        int64_t i = first + r;
        const float *reference = s->reference.engine ? s->reference_logits + (size_t)i * V : NULL;
        struct prediction p = predict(s, logits + (size_t)r * V, reference);
        if (i + 1 < s->n_ids)
            LTN_TRY(add_loss(s, &p, s->ids[i + 1], s->n + i + 1, err));
        s->pending = p; /* what it points at is gone once the next batch has begun */
    }
    if (s->npy.file)
        LTN_TRY(ltn_outfile_write(&s->npy, logits, (size_t)rows * V * sizeof *logits, err));
    return LTN_OK;
}

/* The loss of the batch's first token, after what the last batch, or BOS, left. */
static enum ltn_status first_loss(struct score *s, struct ltn_error *err)
{
    struct prediction p = s->pending;
    LTN_TRY(ltn_session_logits(s->model.session, &p.logits, err));
    if (s->reference.engine)
        LTN_TRY(ltn_session_logits(s->reference.session, &p.reference, err));
    if (s->n == 0)
        p = predict(s, p.logits, p.reference);
    return add_loss(s, &p, s->ids[0], s->n, err);
}

static enum ltn_status run_batch(struct score *s, struct ltn_error *err)
{
    struct reader *const readers[] = {&s->model, &s->reference};

    if (s->n_ids == 0)
        return LTN_OK;
    double begin = now();
    int32_t bos = s->model.info->bos_id;
    if (s->n == 0 && !s->options->tokens && bos >= 0 && s->ids[0] != bos) { /* a text that has none */
        s->from_bos = true;
        for (int i = 0; i < 2 && readers[i]->engine; i++)
            LTN_TRY(ltn_session_feed(readers[i]->session, &bos, 1, err));
    }
    if (s->n > 0 || s->from_bos)
        LTN_TRY(first_loss(s, err));
    if (s->reference.engine)
        LTN_TRY(ltn_session_score(s->reference.session, s->ids, (size_t)s->n_ids, keep_logits, s, err));
    LTN_TRY(ltn_session_score(s->model.session, s->ids, (size_t)s->n_ids, take_logits, s, err));
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

    if (!s->model.info->has_tokenizer)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                        "the model has no tokenizer: expected token ids by --tokens, found text");
    LTN_TRY(ltn_encoder_create(&reader.encoder, ltn_engine_tokenizer(s->model.engine), take_ids, s, err));
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
    npy_header(header, 0, s->model.info->vocab_size); /* the number of rows follows at the end */
    return ltn_outfile_write(&s->npy, header, sizeof header, err);
}

static enum ltn_status finish_npy(struct score *s, struct ltn_error *err)
{
    char header[NPY_HEADER];
    npy_header(header, s->n, s->model.info->vocab_size);
    if (fseek(s->npy.file, 0, SEEK_SET) != 0)
        return ltn_fail(err, LTN_ERR_IO, "%s: expected a file that can be sought in", s->options->logits);
    LTN_TRY(ltn_outfile_write(&s->npy, header, sizeof header, err));
    return ltn_outfile_commit(&s->npy, err);
}

static enum ltn_status write_positions(struct score *s, struct ltn_error *err)
{
    FILE *f = s->csv.file;
    bool reference = s->reference.engine;

    fprintf(f, "first,end,tokens,nats_per_token,stderr%s\n", reference ? ",reference_nats_per_token,kl" : "");
    for (int b = 0; b < N_BINS; b++) {
        const struct bin *bin = &s->bins[b];
        double n = (double)bin->n;
        if (bin->n == 0)
            continue;
        fprintf(f, "%lld,%lld,%lld,%.6f,", (long long)bin_begin(b), (long long)bin_begin(b + 1),
                (long long)bin->n, bin->nats / n);
        if (bin->n > 1) /* of one token there is none */
            fprintf(f, "%.6f", standard_error(bin->nats, bin->squares, bin->n));
        if (reference)
            fprintf(f, ",%.6f,%.6g", bin->reference_nats / n, bin->kl / n);
        fputc('\n', f);
    }
    return ltn_outfile_commit(&s->csv, err); /* fprintf's failures show here */
}

/* The figures, in the order in which they are printed. A NaN stands for "none". */
struct figure {
    const char *key;
    double value;
    bool count; /* printed as a whole number */
};

enum { MAX_FIGURES = 19 };

/* Fills f and returns how many there are: those of a comparison only where there was one. */
static int figures(const struct score *s, struct figure f[MAX_FIGURES])
{
    const struct bin *all = &s->all;
    const struct ltn_divergence *d = &s->divergence;
    bool scored = all->n > 0;
    double mean = scored ? all->nats / (double)all->n : NAN, n = (double)d->n;
    double error = standard_error(all->nats, all->squares, all->n);
    const struct figure list[MAX_FIGURES] = {
        {"tokens", (double)s->n, true},
        {"scored_tokens", (double)all->n, true},
        {"bytes", s->options->tokens ? NAN : (double)s->bytes, true},
        {"nats", scored ? all->nats : NAN, false},
        {"nats_per_token", mean, false},
        {"nats_stderr", error, false},
        {"perplexity", exp(mean), false},
        {"perplexity_stderr", exp(mean) * error, false},
        {"bits_per_byte", scored && s->bytes ? all->nats / M_LN2 / (double)s->bytes : NAN, false},
        {"tokens_per_second", s->seconds > 0 ? (double)s->n / s->seconds : NAN, false},
        {"reference_perplexity", scored ? exp(all->reference_nats / (double)all->n) : NAN, false},
        {"compared_tokens", n, true},
        {"kl_mean", d->kl / n, false},
        {"kl_stderr", standard_error(d->kl, d->kl_squares, d->n), false},
        {"kl_median", ltn_divergence_quantile(d, 0.5), false},
        {"kl_p99", ltn_divergence_quantile(d, 0.99), false},
        {"kl_max", d->kl_max, false},
        {"top1_agreement", (double)d->agreed / n, false},
        {"largest_logit_difference", d->logit_max, false},
    };
    memcpy(f, list, sizeof list);
    return s->reference.engine ? MAX_FIGURES : 10;
}

static const char *context(const struct score *s)
{
    return s->from_bos ? "BOS" : "none";
}

static enum ltn_status print_table(const struct score *s, struct ltn_error *err)
{
    struct figure f[MAX_FIGURES];
    int n = figures(s, f);
    for (int i = 0; i < n; i++) {
        if (isnan(f[i].value))
            LTN_TRY(ltn_cli_printf(err, "%-24s -\n", f[i].key));
        else
            LTN_TRY(ltn_cli_printf(err, f[i].count ? "%-24s %.0f\n" : "%-24s %.6g\n", f[i].key, f[i].value));
    }
    return ltn_cli_printf(err, "%-24s %s\n", "first_token",
                          s->from_bos ? "scored, given BOS" : "not scored, it has nothing before it");
}

static enum ltn_status print_json(const struct score *s, struct ltn_error *err)
{
    struct figure f[MAX_FIGURES];
    cJSON *json = cJSON_CreateObject();

    int n = figures(s, f);
    for (int i = 0; i < n; i++)
        cJSON_AddNumberToObject(json, f[i].key, f[i].value); /* prints NaN as null */
    cJSON_AddStringToObject(json, "first_token_given", context(s));
    cJSON_AddStringToObject(json, "model", s->model.info->checksum);
    if (s->reference.engine)
        cJSON_AddStringToObject(json, "reference", s->reference.info->checksum);
    cJSON_AddStringToObject(json, "dtype", s->model.info->dtype);
    cJSON_AddStringToObject(json, "device", s->model.info->backend);
    char *text = cJSON_Print(json);
    cJSON_Delete(json);
    if (!text)
        return ltn_fail(err, LTN_ERR_MEMORY, "JSON: no memory");
    enum ltn_status status = ltn_cli_printf(err, "%s\n", text);
    cJSON_free(text);
    return status;
}

/* ---- the program --------------------------------------------------------------------------------------- */

static enum ltn_status open_model(const struct score *s, struct reader *r, const char *path,
                                  const char *prefill, struct ltn_error *err)
{
    struct ltn_progress progress = {"loading the model", -1};
    const struct ltn_engine_options options = {.device = s->options->device,
                                               .n_threads = (int)s->options->threads,
                                               .prefill = prefill,
                                               .progress = ltn_cli_progress,
                                               .progress_ctx = &progress};
    LTN_TRY(ltn_engine_open(&r->engine, path, &options, err));
    r->info = ltn_engine_info(r->engine);
    return LTN_OK;
}

static enum ltn_status open_session(const struct score *s, struct reader *r, struct ltn_error *err)
{
    const struct ltn_session_options options = {.chunk_rows = s->batch, .score_rows = s->batch};
    return ltn_session_create(&r->session, r->engine, &options, err);
}

/* The reference must take the same ids for the same text, as far as that can be seen. */
static enum ltn_status open_reference(struct score *s, const char *path, struct ltn_error *err)
{
    const struct ltn_engine_info *model = s->model.info;
    size_t row = (size_t)model->vocab_size * sizeof(float);

    LTN_TRY(open_model(s, &s->reference, path, "exact", err));
    const struct ltn_engine_info *reference = s->reference.info;
    if (reference->vocab_size != model->vocab_size)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: expected the model's vocabulary of %d, found %d", path,
                        model->vocab_size, reference->vocab_size);
    if (!s->options->tokens && reference->bos_id != model->bos_id)
        return ltn_fail(err, LTN_ERR_INPUT, "%s: expected the model's BOS token %d, found %d", path,
                        model->bos_id, reference->bos_id);
    s->reference_logits = malloc((size_t)s->batch * row);
    if (!s->reference_logits)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %d rows of logits", s->batch);
    return open_session(s, &s->reference, err);
}

static enum ltn_status open_all(struct score *s, struct ltn_error *err)
{
    const struct options *o = s->options;
    char path[4096];

    LTN_TRY(ltn_cli_write("", 0, err));
    LTN_TRY(ltn_cli_model(path, sizeof path, o->model, err));
    LTN_TRY(open_model(s, &s->model, path, o->prefill, err));
    const struct ltn_engine_info *info = s->model.info;
    if (info->notice)
        ltn_cli_note("%s", info->notice);

    int64_t rows = LOGITS_MEMORY / ((int64_t)sizeof(float) * info->vocab_size);
    s->batch = rows < 1 ? 1 : rows < info->chunk_rows ? (int32_t)rows : info->chunk_rows;
    s->ids = malloc((size_t)s->batch * sizeof *s->ids);
    if (!s->ids)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %d ids", s->batch);
    LTN_TRY(open_session(s, &s->model, err));
    if (o->reference)
        LTN_TRY(open_reference(s, o->reference, err));
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
    struct options o = {.device = "auto", .prefill = "exact"};
    // clang-format off
    const struct ltn_flag flags[] = {
        {.letter = 'm', .argument = "MODEL", .kind = LTN_FLAG_STRING, .target = &o.model,
         .help = "the model, a .ltn file; without it $LTN_MODEL, else the model that ships with ltn"},
        {.name = "reference", .argument = "MODEL", .kind = LTN_FLAG_STRING, .target = &o.reference,
         .help = "compare the model's predictions with this one's: KL divergence, likeliest token, logits"},
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
        {.name = "prefill", .argument = "HOW", .kind = LTN_FLAG_CHOICE, .target = &o.prefill,
         .choices = "exact|fp8",
         .help = "fp8: read with products in e4m3, about twice as fast and coarser; needs a Hopper GPU. A "
                 "reference is read exactly"},
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
            "--reference gives mean, standard error, median, 99th percentile (to 0.6 %) and maximum of the "
            "Kullback-Leibler divergence of each prediction from the reference's, in nats, the share of "
            "predictions whose likeliest token is the same, and the largest difference of a logit. Both "
            "models read the ids that the first one's tokenizer makes.\n\n"
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
    free(s.reference_logits);
    ltn_session_free(s.model.session);
    ltn_session_free(s.reference.session);
    ltn_engine_close(s.model.engine);
    ltn_engine_close(s.reference.engine);
    return code;
}
