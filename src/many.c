#include "src/many.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/json.h"
#include "src/cli.h"
#include "src/jsonl.h"
#include "src/rng.h"

enum { SLICE = 4096, MAX_DEPTH = 64 };

struct buffer {
    char *text; /* [bytes] */
    size_t bytes, room;
};

/* One prompt and what came of it, from when it is begun until it is written. */
struct answer {
    struct answer *next; /* the prompt after it */
    int64_t index;
    struct buffer prompt; /* with json_out */
    struct buffer text;   /* that is not written yet */
    int64_t n_ids;        /* put into it */
    struct ltn_generated made;
    double logprob;     /* with json_out: of all that was made */
    bool done, dropped; /* dropped: not to be written */
};

/* One of the places for prompts under way. */
struct slot {
    struct ltn_session *session;
    struct answer *answer;             /* NULL: free */
    struct ltn_generation *generation; /* NULL: the prompt is still being read */
    struct ltn_generate_options options;
    struct work *work;
};

struct work {
    struct ltn_many *many;
    struct ltn_batch *batch;
    struct slot *slots; /* [width], of which n_slots were ever needed */
    int32_t n_slots, n_generating;
    struct slot **moving;          /* [width] those that take part in a step, */
    struct ltn_session **sessions; /* and their sessions */
    struct answer *first, *last;   /* begun and not written, in order */
    size_t waiting;                /* bytes that these take */
    struct buffer line, json;      /* a JSON line that comes, one that goes */

    int fd;           /* of the input; -1: none is open */
    const char *name; /* of it, for people */
    size_t n_opened;
    int64_t n_lines;
    char input[16384];
    size_t at, end;       /* what is left of it */
    struct slot *reading; /* the prompt that the input is amid; NULL: none */
    struct ltn_id_parser parser;
    bool ended;               /* no more input is wanted */
    struct ltn_error failure; /* that ended it */
};

/* ---- buffers ------------------------------------------------------------------------------------------- */

static enum ltn_status append(struct buffer *b, const char *text, size_t bytes, struct ltn_error *err)
{
    if (bytes > b->room - b->bytes) {
        size_t room = 2 * b->room + bytes + 64;
        char *grown = realloc(b->text, room);
        if (!grown)
            return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %zu bytes of text", room);
        b->text = grown;
        b->room = room;
    }
    if (bytes)
        memcpy(b->text + b->bytes, text, bytes);
    b->bytes += bytes;
    return LTN_OK;
}

/* To a prompt or a text, whose memory counts. */
static enum ltn_status keep(struct work *w, struct buffer *b, const char *text, size_t bytes,
                            struct ltn_error *err)
{
    size_t room = b->room;
    enum ltn_status status = append(b, text, bytes, err);
    w->waiting += b->room - room;
    return status;
}

static enum ltn_status append_string(struct buffer *b, const char *text, struct ltn_error *err)
{
    return append(b, text, strlen(text), err);
}

/* , "key": "text" */
static enum ltn_status append_json(struct buffer *b, const char *key, const char *text, size_t bytes,
                                   struct ltn_error *err)
{
    char out[8];

    LTN_TRY(append_string(b, ", \"", err));
    LTN_TRY(append_string(b, key, err));
    LTN_TRY(append_string(b, "\": \"", err));
    for (size_t at = 0, n; at < bytes;) {
        at += ltn_jsonl_escape(text + at, bytes - at, out, &n);
        LTN_TRY(append(b, out, n, err));
    }
    return append_string(b, "\"", err);
}

/* ---- output -------------------------------------------------------------------------------------------- */

static enum ltn_status write_json(struct work *w, const struct answer *a, struct ltn_error *err)
{
    const struct ltn_many *many = w->many;
    struct buffer *line = &w->json;
    char number[64];

    line->bytes = 0;
    snprintf(number, sizeof number, "{\"index\": %" PRId64, a->index);
    LTN_TRY(append_string(line, number, err));
    if (many->n_files)
        LTN_TRY(append_json(line, "file", many->files[a->index], strlen(many->files[a->index]), err));
    else
        LTN_TRY(append_json(line, "prompt", a->prompt.text, a->prompt.bytes, err));
    if (many->ids) {
        LTN_TRY(append_string(line, ", \"ids\": [", err));
        LTN_TRY(append(line, a->text.text, a->text.bytes, err));
        LTN_TRY(append_string(line, "]", err));
    } else {
        LTN_TRY(append_json(line, "text", a->text.text, a->text.bytes, err));
    }
    snprintf(number, sizeof number,
             isfinite(a->logprob) ? ", \"tokens\": %" PRId64 ", \"logprob\": %.7g"
                                  : ", \"tokens\": %" PRId64 ", \"logprob\": null",
             a->made.n_tokens, a->logprob);
    LTN_TRY(append_string(line, number, err));
    const char *end = ltn_jsonl_end_name(a->made.end);
    LTN_TRY(append_json(line, "end", end, strlen(end), err));
    LTN_TRY(append_string(line, "}\n", err));
    return ltn_cli_write(line->text, line->bytes, err);
}

static void free_first(struct work *w)
{
    struct answer *a = w->first;
    w->first = a->next;
    if (!w->first)
        w->last = NULL;
    w->waiting -= sizeof *a + a->prompt.room + a->text.room;
    free(a->prompt.text);
    free(a->text.text);
    free(a);
}

/* Writes what may be written. */
static enum ltn_status write_out(struct work *w, struct ltn_error *err)
{
    for (struct answer *a; (a = w->first) && (!w->reading || w->reading->answer != a);) {
        if (a->dropped) {
            free_first(w);
            continue;
        }
        if (!w->many->json_out) {
            if (a->text.bytes > 0)
                LTN_TRY(ltn_cli_write(a->text.text, a->text.bytes, err));
            a->text.bytes = 0;
        }
        if (!a->done)
            break;
        LTN_TRY(w->many->json_out ? write_json(w, a, err) : ltn_cli_write(w->many->nul ? "" : "\n", 1, err));
        free_first(w);
    }
    return LTN_OK;
}

/* ---- prompts ------------------------------------------------------------------------------------------- */

static enum ltn_status keep_id(struct work *w, struct answer *a, int32_t id, struct ltn_error *err)
{
    char text[16];
    int n = snprintf(text, sizeof text, "%s%d", a->n_ids++ == 0 ? "" : w->many->json_out ? ", " : " ", id);
    return keep(w, &a->text, text, (size_t)n, err);
}

static enum ltn_status feed_id(void *slot, int32_t id, struct ltn_error *err)
{
    struct slot *s = slot;
    LTN_TRY(ltn_session_feed(s->session, &id, 1, err));
    return s->work->many->echo ? keep_id(s->work, s->answer, id, err) : LTN_OK;
}

static enum ltn_status feed(struct work *w, const char *text, size_t bytes, struct ltn_error *err)
{
    const struct ltn_many *many = w->many;
    struct slot *s = w->reading;

    if (many->json_out && !many->n_files)
        LTN_TRY(keep(w, &s->answer->prompt, text, bytes, err));
    if (many->ids)
        return ltn_id_parser_feed(&w->parser, text, bytes, err);
    if (many->echo)
        LTN_TRY(keep(w, &s->answer->text, text, bytes, err));
    return ltn_session_feed_text(s->session, text, bytes, err);
}

/* The prompt of a JSON line, in slices, so that a signal is seen in time. */
static enum ltn_status feed_json(struct work *w, struct ltn_error *err)
{
    cJSON *json;
    const char *prompt;

    LTN_TRY(ltn_json_parse(&json, w->line.text ? w->line.text : "", w->line.bytes, "JSON", MAX_DEPTH, false,
                           err));
    enum ltn_status status = ltn_json_string(&prompt, json, "prompt", "JSON", err);
    for (size_t left = status == LTN_OK ? strlen(prompt) : 0; left > 0 && status == LTN_OK;) {
        size_t bytes = left < SLICE ? left : SLICE;
        status = ltn_cli_interrupted() ? ltn_fail(err, LTN_ERR_STOPPED, "interrupted")
                                       : feed(w, prompt, bytes, err);
        prompt += bytes;
        left -= bytes;
    }
    cJSON_Delete(json);
    return status;
}

static enum ltn_status take_piece(void *slot, int32_t id, const char *text, size_t bytes,
                                  struct ltn_error *err)
{
    struct slot *s = slot;
    if (!s->work->many->ids)
        LTN_TRY(keep(s->work, &s->answer->text, text, bytes, err));
    else if (id >= 0)
        LTN_TRY(keep_id(s->work, s->answer, id, err));
    return ltn_cli_interrupted() ? ltn_fail(err, LTN_ERR_STOPPED, "interrupted") : LTN_OK;
}

static enum ltn_status note_drawn(void *slot, int32_t id, const float *logits, struct ltn_error *err)
{
    struct slot *s = slot;
    (void)err;
    s->answer->logprob +=
        ltn_logprobs(logits, ltn_engine_info(s->work->many->engine)->vocab_size, id, NULL, 0);
    return LTN_OK;
}

/* The prompt is complete: its text begins. */
static enum ltn_status complete(struct work *w, struct ltn_error *err)
{
    struct ltn_many *many = w->many;
    struct slot *s = w->reading;
    const int32_t bos = ltn_engine_info(many->engine)->bos_id;

    if (many->json_in)
        LTN_TRY(feed_json(w, err));
    LTN_TRY(many->ids ? ltn_id_parser_finish(&w->parser, err) : ltn_session_end_text(s->session, err));
    if (ltn_session_position(s->session) == 0) {
        if (bos < 0)
            return ltn_fail(err, LTN_ERR_INPUT,
                            "empty prompt: the model has no BOS token to start from; expected some text");
        LTN_TRY(ltn_session_feed(s->session, &bos, 1, err));
    }
    many->n_read += ltn_session_position(s->session) - (many->from ? ltn_session_position(many->from) : 0);
    ltn_session_seed(s->session, ltn_text_seed(many->seed, (uint64_t)s->answer->index));
    s->options = many->generate;
    s->options.piece = take_piece;
    s->options.drawn = many->json_out ? note_drawn : NULL;
    s->options.ctx = s;
    LTN_TRY(ltn_generation_begin(&s->generation, s->session, &s->options, err));
    w->n_generating++;
    w->reading = NULL;
    return LTN_OK;
}

static enum ltn_status begin_in(struct work *w, struct slot *s, struct ltn_error *err)
{
    struct ltn_many *many = w->many;

    s->work = w;
    if (!s->session)
        LTN_TRY(ltn_session_create(&s->session, many->engine,
                                   &(struct ltn_session_options){.batch = w->batch}, err));
    LTN_TRY(many->from ? ltn_session_copy(s->session, many->from, err) : ltn_session_reset(s->session, err));
    struct answer *a = calloc(1, sizeof *a);
    if (!a)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for prompt %" PRId64, many->n_prompts);
    a->index = many->n_prompts++;
    *(w->last ? &w->last->next : &w->first) = a;
    w->last = a;
    w->waiting += sizeof *a;
    s->answer = a;
    w->reading = s;
    w->line.bytes = 0;
    w->parser = (struct ltn_id_parser){.fn = feed_id, .ctx = s};
    return LTN_OK;
}

/* A prompt begins, if there is a free slot; else w->reading stays NULL. */
static enum ltn_status begin(struct work *w, struct ltn_error *err)
{
    int32_t i = 0;
    while (i < w->n_slots && w->slots[i].answer)
        i++;
    if (i == w->many->width)
        return LTN_OK;
    if (i == w->n_slots)
        w->n_slots++;
    return begin_in(w, &w->slots[i], err);
}

/* The prompt that was being read, the last, is not answered. */
static void drop_prompt(struct work *w)
{
    if (!w->reading)
        return;
    w->many->n_prompts--;
    w->reading->answer->done = w->reading->answer->dropped = true;
    w->reading->answer = NULL;
    w->reading = NULL;
}

/* ---- input --------------------------------------------------------------------------------------------- */

static enum ltn_status open_input(struct work *w, const char *path, struct ltn_error *err)
{
    bool standard = strcmp(path, "-") == 0;
    w->name = standard ? "standard input" : path;
    w->fd = standard ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC);
    w->n_opened++;
    if (w->fd < 0)
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    return LTN_OK;
}

static void close_input(struct work *w)
{
    if (w->fd > STDIN_FILENO)
        close(w->fd);
    w->fd = -1;
}

/* Reads on where all is used up. *got: -1: nothing is there now (not with `wait`); 0: the end; else
 * something. */
static enum ltn_status read_input(struct work *w, bool wait, int *got, struct ltn_error *err)
{
    *got = 1;
    while (w->at == w->end) {
        struct pollfd ready = {.fd = w->fd, .events = POLLIN};
        if (ltn_cli_interrupted())
            return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
        int n_ready = poll(&ready, 1, wait ? -1 : 0);
        if (n_ready < 0) /* a signal */
            continue;
        if (n_ready == 0) {
            *got = -1;
            return LTN_OK;
        }
        ssize_t n = read(w->fd, w->input, sizeof w->input);
        if (n < 0 && errno != EINTR && errno != EAGAIN)
            return ltn_fail(err, LTN_ERR_IO, "%s: cannot read: %s", w->name, strerror(errno));
        if (n == 0) {
            *got = 0;
            return LTN_OK;
        }
        w->at = 0;
        w->end = n > 0 ? (size_t)n : 0;
    }
    return LTN_OK;
}

/* Says where a prompt is that was refused. */
static enum ltn_status blame(const struct work *w, enum ltn_status status, const struct ltn_error *why,
                             struct ltn_error *err)
{
    if (status == LTN_ERR_STOPPED)
        return ltn_fail(err, status, "%s", why->text);
    if (w->many->n_files)
        return ltn_fail(err, status, "%s: %.400s", w->name, why->text);
    return ltn_fail(err, status, "%s, %s %" PRId64 ": %.400s", w->name, w->many->nul ? "prompt" : "line",
                    w->n_lines + 1, why->text);
}

/* Takes what is there, as far as `most` bytes or the end of the prompt. *taken: bytes. */
static enum ltn_status take_input(struct work *w, size_t most, size_t *taken, struct ltn_error *err)
{
    const struct ltn_many *many = w->many;
    const char *text = w->input + w->at;
    size_t bytes = w->end - w->at < most ? w->end - w->at : most;
    const char *end = many->n_files ? NULL : memchr(text, many->nul ? 0 : '\n', bytes);

    if (end)
        bytes = (size_t)(end - text);
    LTN_TRY(many->json_in ? append(&w->line, text, bytes, err) : feed(w, text, bytes, err));
    *taken = bytes + (end != NULL);
    w->at += *taken;
    return end ? complete(w, err) : LTN_OK;
}

/* The text that waits takes much memory, and the earliest prompt is one that can go on alone. */
static bool crowded(const struct work *w)
{
    return w->waiting > w->many->max_waiting && (!w->reading || w->reading->answer != w->first);
}

/* Reads prompts into the free slots: waits for input only where there is nothing else to do, and takes only a
 * little at a time where there is. */
static enum ltn_status read_prompts(struct work *w, struct ltn_error *err)
{
    const struct ltn_many *many = w->many;
    struct ltn_error why;
    size_t budget = SLICE, taken;
    int got;

    while (budget > 0 && !crowded(w)) {
        if (w->fd < 0) {
            if (w->n_opened == (many->n_files ? many->n_files : 1)) {
                w->ended = true;
                return LTN_OK;
            }
            LTN_TRY(open_input(w, many->n_files ? many->files[w->n_opened] : many->file, err));
        }
        LTN_TRY(read_input(w, w->n_generating == 0, &got, err));
        if (got < 0)
            return LTN_OK;
        if (!w->reading && (got > 0 || many->n_files)) {
            LTN_TRY(begin(w, err));
            if (!w->reading)
                return LTN_OK; /* no slot is free */
        }
        enum ltn_status status = LTN_OK;
        taken = 0;
        if (got > 0)
            status = take_input(w, w->n_generating ? budget : SLICE, &taken, &why);
        else if (w->reading)
            status = complete(w, &why);
        if (status != LTN_OK)
            return blame(w, status, &why, err);
        if (got == 0)
            close_input(w);
        if (!w->reading)
            w->n_lines++;
        if (w->n_generating)
            budget -= taken < budget ? taken : budget;
    }
    return LTN_OK;
}

/* ---- the work ------------------------------------------------------------------------------------------ */

/* A token for every text under way; where that is crowded, for the earliest alone. */
static enum ltn_status step(struct work *w, struct ltn_error *err)
{
    const bool alone = crowded(w);
    size_t n = 0;
    bool ended;

    for (int32_t i = 0; i < w->n_slots; i++) {
        struct slot *s = &w->slots[i];
        if (!s->generation || (alone && s->answer != w->first))
            continue;
        w->moving[n] = s;
        w->sessions[n++] = s->session;
    }
    LTN_TRY(ltn_batch_step(w->batch, w->sessions, n,
                           w->many->generate.sampling ? w->many->generate.sampling : &ltn_sampling_default,
                           err));
    for (size_t i = 0; i < n; i++) {
        struct slot *s = w->moving[i];
        LTN_TRY(ltn_generation_next(s->generation, &ended, err));
        if (!ended)
            continue;
        ltn_generation_end(s->generation, &s->answer->made);
        s->answer->done = true;
        w->many->n_made += s->answer->made.n_tokens;
        s->generation = NULL;
        s->answer = NULL;
        w->n_generating--;
    }
    w->many->n_steps++;
    w->many->n_rows += (int64_t)n;
    return LTN_OK;
}

static enum ltn_status work(struct work *w, struct ltn_error *err)
{
    for (;;) {
        if (!w->ended && read_prompts(w, &w->failure) != LTN_OK) {
            drop_prompt(w);
            w->ended = true;
        }
        if (w->n_generating > 0)
            LTN_TRY(step(w, err));
        if (ltn_cli_interrupted() && w->failure.status == LTN_OK) {
            ltn_fail(&w->failure, LTN_ERR_STOPPED, "interrupted");
            drop_prompt(w);
            w->ended = true;
        }
        LTN_TRY(write_out(w, err));
        if (w->n_generating == 0 && w->ended)
            return w->failure.status ? ltn_fail(err, w->failure.status, "%s", w->failure.text) : LTN_OK;
    }
}

static enum ltn_status open_work(struct work *w, struct ltn_error *err)
{
    struct ltn_many *many = w->many;
    const size_t n = (size_t)many->width;

    if (!many->ids && !ltn_engine_info(many->engine)->has_tokenizer)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                        "the model has no tokenizer: expected token ids by --tokens, found text");
    LTN_TRY(ltn_batch_create(&w->batch, many->engine, many->width, err));
    w->slots = calloc(n, sizeof *w->slots);
    w->moving = calloc(n, sizeof(struct slot *));
    w->sessions = calloc(n, sizeof(struct ltn_session *));
    if (!w->slots || !w->moving || !w->sessions)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory for %zu prompts at once", n);
    return LTN_OK;
}

static void close_work(struct work *w)
{
    for (int32_t i = 0; i < w->n_slots; i++) {
        ltn_generation_end(w->slots[i].generation, NULL);
        ltn_session_free(w->slots[i].session);
    }
    while (w->first)
        free_first(w);
    close_input(w);
    ltn_batch_free(w->batch);
    free(w->slots);
    free(w->moving);
    free(w->sessions);
    free(w->line.text);
    free(w->json.text);
}

enum ltn_status ltn_many(struct ltn_many *many, struct ltn_error *err)
{
    struct work *w = calloc(1, sizeof *w);
    if (!w)
        return ltn_fail(err, LTN_ERR_MEMORY, "no memory to begin");
    w->many = many;
    w->fd = -1;
    enum ltn_status status = open_work(w, err);
    if (status == LTN_OK)
        status = work(w, err);
    close_work(w);
    free(w);
    return status;
}
