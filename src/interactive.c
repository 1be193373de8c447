#include "src/interactive.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "src/cli.h"
#include "src/stop.h"
#include "src/terminal.h"
#include "src/timeline.h"

enum { SLICE = 256 };                  /* tokens of an input between two looks at Ctrl-C */
#define PAST_BYTES ((uint64_t)1 << 30) /* of all that can be gone back to */

struct chat {
    const struct ltn_interactive *in;
    struct ltn_timelines *timelines;
    struct ltn_terminal *terminal;
    bool leave;                           /* /quit, or nobody reads the answers */
    double input_seconds, answer_seconds; /* of the last exchange */
    int64_t input_tokens, answer_tokens;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int64_t position(const struct chat *c)
{
    return ltn_session_position(c->in->session);
}

static void print_speed(const struct chat *c)
{
    ltn_cli_note("input %" PRId64 " tokens in %.2f s; answer %" PRId64 " tokens, %.1f tok/s", c->input_tokens,
                 c->input_seconds, c->answer_tokens,
                 c->answer_seconds > 0 ? (double)c->answer_tokens / c->answer_seconds : 0.0);
}

/* ---- answers ------------------------------------------------------------------------------------------- */

struct answer {
    struct chat *chat;
    struct ltn_stopper stopper;
    size_t drawn, printed; /* bytes of text */
    bool stopped;          /* at a stop string */
    bool line_open;        /* what was printed does not end in a newline */
};

static enum ltn_status print(struct answer *a, const char *text, size_t bytes, struct ltn_error *err)
{
    if (bytes == 0)
        return LTN_OK;
    enum ltn_status status = ltn_cli_write(text, bytes, err);
    a->chat->leave = status != LTN_OK;
    a->printed += bytes;
    a->line_open = text[bytes - 1] != '\n';
    return status;
}

static enum ltn_status take_piece(void *ctx, int32_t id, const char *text, size_t bytes,
                                  struct ltn_error *err)
{
    struct answer *a = ctx;

    LTN_TRY(ltn_timelines_drawn(a->chat->timelines, id, bytes, err));
    a->chat->answer_tokens++;
    a->drawn += bytes;
    if (a->stopper.n)
        LTN_TRY(ltn_stopper_push(&a->stopper, text, bytes, &text, &bytes, &a->stopped, err));
    LTN_TRY(print(a, text, bytes, err));
    if (a->stopped || ltn_cli_interrupted())
        return ltn_fail(err, LTN_ERR_STOPPED, "stopped");
    return LTN_OK;
}

static enum ltn_status generate(struct answer *a, struct ltn_error *err)
{
    struct chat *c = a->chat;
    struct ltn_generate_options options = *c->in->options;
    const char *text;
    size_t bytes;

    LTN_TRY(ltn_stopper_create(&a->stopper, options.stop, options.n_stop, err));
    options.n_stop = 0;       /* looked for here, where it is known which token brought which bytes */
    options.keep_open = true; /* the next answer may go on amid a character */
    options.piece = take_piece;
    options.ctx = a;
    LTN_TRY(ltn_generate(c->in->session, &options, NULL, err));
    if (a->stopped)
        return ltn_timelines_cut(c->timelines, a->drawn, a->printed, err);
    if (!a->stopper.n)
        return LTN_OK;
    ltn_stopper_finish(&a->stopper, &text, &bytes);
    return print(a, text, bytes, err);
}

/* Continues the text. Ctrl-C ends the answer. */
static enum ltn_status answer(struct chat *c, struct ltn_error *err)
{
    struct answer a = {.chat = c};
    double begin = now();

    c->answer_tokens = 0;
    enum ltn_status status = generate(&a, err);
    c->answer_seconds = now() - begin;
    ltn_stopper_free(&a.stopper);
    if ((a.line_open || ltn_cli_interrupted()) && !c->leave) { /* the next marker begins a line */
        struct ltn_error why;
        enum ltn_status written = ltn_cli_write("\n", 1, &why);
        c->leave = written != LTN_OK;
        if (c->leave && status == LTN_OK)
            *err = why;
        status = status == LTN_OK ? written : status;
    }
    LTN_TRY(status);
    if (c->in->stats)
        print_speed(c);
    return LTN_OK;
}

/* ---- inputs -------------------------------------------------------------------------------------------- */

/* The ids of prefix, text and suffix as one text, *ids malloc'd. Amid the stream no BOS token begins it. */
static enum ltn_status tokenize(const struct chat *c, const struct ltn_input *input, int32_t **ids, size_t *n,
                                struct ltn_error *err)
{
    const int32_t bos = ltn_engine_info(c->in->engine)->bos_id;
    char *text;
    int bytes = asprintf(&text, "%s%s%s", c->in->prefix, input->text, c->in->suffix);

    if (bytes < 0)
        return ltn_fail(err, LTN_ERR_MEMORY, "input: no memory for %zu bytes", input->bytes);
    enum ltn_status status = ltn_engine_tokenize(c->in->engine, text, (size_t)bytes, ids, n, err);
    free(text);
    LTN_TRY(status);
    if (position(c) > 0 && *n > 0 && (*ids)[0] == bos)
        memmove(*ids, *ids + 1, --*n * sizeof **ids);
    return LTN_OK;
}

/* LTN_ERR_STOPPED on a signal. */
static enum ltn_status feed(struct chat *c, const int32_t *ids, size_t n, struct ltn_error *err)
{
    const int32_t bos = ltn_engine_info(c->in->engine)->bos_id;
    const float *logits;

    if (n == 0 && position(c) == 0) {
        if (bos < 0)
            return ltn_fail(err, LTN_ERR_INPUT,
                            "nothing to go on from: the model has no BOS token; expected some text");
        ids = &bos;
        n = 1;
    }
    c->input_tokens = (int64_t)n;
    while (n > 0) {
        size_t k = n < SLICE ? n : SLICE;
        if (ltn_cli_interrupted())
            return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
        LTN_TRY(ltn_timelines_feed(c->timelines, ids, k, err));
        ids += k;
        n -= k;
    }
    return ltn_session_logits(c->in->session, &logits, err);
}

/* One exchange. What cannot be read to its end is taken back. */
static enum ltn_status converse(struct chat *c, const struct ltn_input *input, struct ltn_error *err)
{
    int32_t *ids = NULL;
    size_t n = 0;
    double begin = now();

    if (input->bytes > 0) /* an empty input asks for more, with nothing around it */
        LTN_TRY(tokenize(c, input, &ids, &n, err));
    enum ltn_status status = ltn_timelines_begin(c->timelines, err);
    if (status == LTN_OK) {
        status = feed(c, ids, n, err);
        if (status != LTN_OK)
            ltn_timelines_undo(c->timelines, NULL);
    }
    free(ids);
    c->input_seconds = now() - begin;
    if (status == LTN_ERR_STOPPED && ltn_cli_forget_interrupt()) {
        fputc('\n', stderr); /* behind the ^C that the terminal shows */
        if (!c->in->quiet)
            ltn_cli_note("interrupted: the input was not taken");
        return LTN_OK;
    }
    LTN_TRY(status);
    return answer(c, err);
}

/* ---- commands ------------------------------------------------------------------------------------------ */

static void say_where(const struct chat *c, const char *what)
{
    if (!c->in->quiet)
        ltn_cli_note("%s token %" PRId64, what, position(c));
}

/* "~/" at the beginning of a name is $HOME/, as in a shell. */
static enum ltn_status find_file(char *path, const char *name, struct ltn_error *err)
{
    const char *home = getenv("HOME");
    bool at_home = home && name[0] == '~' && name[1] == '/';
    if (snprintf(path, PATH_MAX, "%s%s", at_home ? home : "", name + at_home) < PATH_MAX)
        return LTN_OK;
    return ltn_fail(err, LTN_ERR_INPUT, "expected a name of less than %d bytes", PATH_MAX);
}

static enum ltn_status do_save(struct chat *c, const char *name, struct ltn_error *err)
{
    char path[PATH_MAX];
    LTN_TRY(find_file(path, name, err));
    LTN_TRY(ltn_session_save(c->in->session, path, err));
    if (!c->in->quiet)
        ltn_cli_note("%s: saved at token %" PRId64, path, position(c));
    return LTN_OK;
}

static enum ltn_status do_load(struct chat *c, const char *name, struct ltn_error *err)
{
    char path[PATH_MAX];
    LTN_TRY(find_file(path, name, err));
    LTN_TRY(ltn_session_load(c->in->session, path, err));
    ltn_timelines_forget(c->timelines);
    if (!c->in->quiet)
        ltn_cli_note("%s: resumed at token %" PRId64, path, position(c));
    return LTN_OK;
}

static enum ltn_status do_fork(struct chat *c, const char *name, struct ltn_error *err)
{
    struct ltn_timeline_info info;

    if (strpbrk(name, " \t\n"))
        return ltn_fail(err, LTN_ERR_INPUT, "expected a name without spaces, found '%.40s'", name);
    if (*name) {
        const struct ltn_timeline_info from = ltn_timelines_current(c->timelines);
        LTN_TRY(ltn_timelines_fork(c->timelines, name, err));
        if (!c->in->quiet)
            ltn_cli_note("'%s' stays at token %" PRId64 "; this is '%s' at token %" PRId64, from.name,
                         from.position, name, position(c));
        return LTN_OK;
    }
    for (size_t i = 0; ltn_timelines_info(c->timelines, i, &info); i++)
        ltn_cli_note("%c %s at token %" PRId64, info.current ? '*' : ' ', info.name, info.position);
    return LTN_OK;
}

static enum ltn_status do_rewind(struct chat *c, const char *text, struct ltn_error *err)
{
    char *end;
    errno = 0;
    long long n = strtoll(text, &end, 10);
    if (*end || errno || strspn(text, "0123456789") != strlen(text))
        return ltn_fail(err, LTN_ERR_INPUT, "expected a number of tokens, found '%.40s'", text);
    LTN_TRY(ltn_timelines_rewind(c->timelines, n, err));
    say_where(c, "back at");
    return LTN_OK;
}

static enum ltn_status do_undo(struct chat *c, const char *none, struct ltn_error *err)
{
    (void)none;
    LTN_TRY(ltn_timelines_undo(c->timelines, err));
    say_where(c, "back at");
    return LTN_OK;
}

static enum ltn_status do_regenerate(struct chat *c, const char *none, struct ltn_error *err)
{
    (void)none;
    LTN_TRY(ltn_timelines_again(c->timelines, err));
    if (c->in->options->sampling->temperature == 0 && !c->in->quiet)
        ltn_cli_note("at temperature 0 every answer is the same");
    c->input_tokens = 0;
    c->input_seconds = 0;
    return answer(c, err);
}

static enum ltn_status do_stats(struct chat *c, const char *none, struct ltn_error *err)
{
    const struct ltn_timeline_info info = ltn_timelines_current(c->timelines);
    (void)none, (void)err;
    ltn_cli_note("%s", ltn_engine_info(c->in->engine)->backend);
    ltn_cli_note("'%s' at token %" PRId64 ", back to token %" PRId64 " at most", info.name, info.position,
                 info.oldest);
    ltn_cli_note("%zu checkpoints; with those of all %zu forks %.1f MB", info.n_checkpoints,
                 ltn_timelines_count(c->timelines), 1e-6 * (double)ltn_timelines_bytes(c->timelines));
    print_speed(c);
    return LTN_OK;
}

static enum ltn_status do_help(struct chat *c, const char *none, struct ltn_error *err);

static enum ltn_status do_quit(struct chat *c, const char *none, struct ltn_error *err)
{
    (void)none, (void)err;
    c->leave = true;
    return LTN_OK;
}

static const struct command {
    const char *name, *argument; /* NULL: takes none; "[...]": may be left out */
    enum ltn_status (*run)(struct chat *c, const char *argument, struct ltn_error *err);
    const char *help;
} commands[] = {
    {"save", "FILE", do_save, "save the session, the whole text so far, in a file of fixed size"},
    {"load", "FILE", do_load, "go on from a saved session; one cannot undo or rewind past it"},
    {"fork", "[NAME]", do_fork,
     "go over to NAME; a new NAME begins here; the text that is left, at first\n"
     "                 called main, stays as it is; without NAME: list them"},
    {"rewind", "N", do_rewind, "take back the last N tokens; /stats says how many there are"},
    {"undo", NULL, do_undo, "take back the last input and its answer"},
    {"regenerate", NULL, do_regenerate, "another answer to the last input"},
    {"stats", NULL, do_stats, "where the text stands, how far back one can go, the speed"},
    {"help", NULL, do_help, "this text"},
    {"quit", NULL, do_quit, "leave, as Ctrl-D does"},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static enum ltn_status do_help(struct chat *c, const char *none, struct ltn_error *err)
{
    (void)c, (void)none, (void)err;
    fputs("What you type goes on with the text, and the model goes on with yours; after an\n"
          "empty line, with its own. A line that ends in \\ is not the last one. Lines between\n"
          "two lines of \"\"\" are taken as they are. Ctrl-C stops an answer or drops a line;\n"
          "twice at an empty line, or Ctrl-D, leaves.\n",
          stderr);
    for (size_t i = 0; i < N_COMMANDS; i++) {
        const struct command *k = &commands[i];
        int width = fprintf(stderr, "  /%s %s", k->name, k->argument ? k->argument : "");
        fprintf(stderr, "%*s%s\n", width < 17 ? 17 - width : 1, "", k->help);
    }
    return LTN_OK;
}

static enum ltn_status command(struct chat *c, const char *text, struct ltn_error *err)
{
    const size_t length = strcspn(text + 1, " \t\n");
    const char *begin = text + 1 + length + strspn(text + 1 + length, " \t\n");
    size_t bytes = strlen(begin);
    struct ltn_error why = {0};

    while (bytes > 0 && strchr(" \t\n", begin[bytes - 1]))
        bytes--;
    for (size_t i = 0; i < N_COMMANDS; i++) {
        const struct command *k = &commands[i];
        if (strlen(k->name) != length || memcmp(k->name, text + 1, length) != 0)
            continue;
        if (!k->argument && bytes)
            return ltn_fail(err, LTN_ERR_INPUT, "/%s: expected nothing after it, found '%.40s'", k->name,
                            begin);
        if (k->argument && k->argument[0] != '[' && !bytes)
            return ltn_fail(err, LTN_ERR_INPUT, "/%s: expected %s, found nothing", k->name, k->argument);
        char *argument = strndup(begin, bytes);
        if (!argument)
            return ltn_fail(err, LTN_ERR_MEMORY, "/%s: no memory", k->name);
        enum ltn_status status = k->run(c, argument, &why);
        free(argument);
        return status == LTN_OK ? LTN_OK : ltn_fail(err, status, "/%s: %.450s", k->name, why.text);
    }
    return ltn_fail(
        err, LTN_ERR_INPUT,
        "%.40s: no such command; /help lists them, and text that begins with / goes between two lines "
        "of \"\"\"",
        text);
}

/* ---- the loop ------------------------------------------------------------------------------------------ */

static void tell(const struct chat *c, struct ltn_error *note)
{
    if (note->status != LTN_OK && !c->in->quiet)
        ltn_cli_note("%s", note->text);
    note->status = LTN_OK;
}

/* Is this interruption the end? */
static bool interrupted(const struct chat *c, const struct ltn_input *input, bool *warned)
{
    bool again = *warned && input->bytes == 0;
    if (again || !ltn_cli_forget_interrupt())
        return true;
    *warned = input->bytes == 0;
    if (*warned && !c->in->quiet)
        ltn_cli_note("Ctrl-C again, or Ctrl-D, leaves; /help helps");
    return false;
}

static enum ltn_status loop(struct chat *c, struct ltn_error *err)
{
    bool warned = false;
    while (!c->leave) {
        char marker[LTN_FORK_NAME + 3] = "> ";
        struct ltn_error note = {0};
        struct ltn_input input;

        ltn_cli_forget_interrupt(); /* it came for an answer that was just complete */
        if (ltn_cli_interrupted())
            return ltn_fail(err, LTN_ERR_STOPPED, "stopped");
        if (ltn_timelines_count(c->timelines) > 1)
            snprintf(marker, sizeof marker, "%s> ", ltn_timelines_current(c->timelines).name);
        LTN_TRY(ltn_terminal_read(c->terminal, marker, &input, err));
        if (input.kind == LTN_INPUT_END)
            return LTN_OK;
        if (input.kind == LTN_INPUT_INTERRUPTED) {
            if (interrupted(c, &input, &warned))
                return ltn_fail(err, LTN_ERR_STOPPED, "interrupted");
            continue;
        }
        warned = false;
        if (input.bytes > 0)
            ltn_terminal_remember(c->terminal, input.text, &note);
        tell(c, &note);
        enum ltn_status status = input.kind == LTN_INPUT_TEXT && input.text[0] == '/'
                                     ? command(c, input.text, err)
                                     : converse(c, &input, err);
        if (status != LTN_OK && (c->leave || status == LTN_ERR_STOPPED))
            return status;
        if (status != LTN_OK)
            ltn_cli_fail("%s", err->text);
    }
    return LTN_OK;
}

enum ltn_status ltn_interactive(const struct ltn_interactive *interactive, struct ltn_error *err)
{
    struct chat c = {.in = interactive};
    struct ltn_error note;

    ltn_cli_outlive_interrupts();
    enum ltn_status status =
        ltn_timelines_create(&c.timelines, interactive->engine, interactive->session, PAST_BYTES, err);
    if (status == LTN_OK)
        status = ltn_terminal_open(&c.terminal, &note, err);
    if (status == LTN_OK) {
        tell(&c, &note);
        status = loop(&c, err);
    }
    ltn_terminal_close(c.terminal);
    ltn_timelines_free(c.timelines);
    return status;
}
