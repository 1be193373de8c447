#include "src/terminal.h"

#include <errno.h>
#include <histedit.h>
#include <langinfo.h>
#include <limits.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/outfile.h"

enum { HISTORY_LINES = 1000 };
static const char CONTINUED[] = "... ";
static const char FENCE[] = "\"\"\"";

struct ltn_terminal {
    EditLine *el;
    History *history;
    FILE *out;           /* where libedit writes */
    char path[PATH_MAX]; /* of the history; "": none is kept */
    const char *marker;  /* of the line being read */
    char *text;          /* [bytes] of the input so far, and a 0 byte */
    size_t bytes, capacity;
};

/* ---- the history's file -------------------------------------------------------------------------------- */

/* Makes the folders of the path that are missing below its first `base` bytes. */
static bool make_folders(char *path, size_t base)
{
    for (char *slash = path + base; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        bool made = mkdir(path, 0700) == 0 || errno == EEXIST;
        *slash = '/';
        if (!made)
            return false;
    }
    return true;
}

/* Is anything there, and is it what a history could be? */
static bool check_file(const char *path, bool *there)
{
    struct stat st;
    *there = stat(path, &st) == 0;
    return *there ? S_ISREG(st.st_mode) : errno == ENOENT;
}

static void choose_path(struct ltn_terminal *t, struct ltn_error *note)
{
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
    struct stat st;
    bool there;
    int n = 0;

    if (state && state[0] == '/')
        n = snprintf(t->path, sizeof t->path, "%s/ltn/history", state);
    else if (home && home[0] == '/' && stat(home, &st) == 0 && S_ISDIR(st.st_mode))
        n = snprintf(t->path, sizeof t->path, "%s/.local/state/ltn/history", home);
    if (n <= 0 || n >= (int)sizeof t->path) {
        t->path[0] = 0;
        return;
    }
    const char *why = NULL;
    if (!make_folders(t->path, strlen(state && state[0] == '/' ? state : home)))
        why = strerror(errno);
    else if (!check_file(t->path, &there))
        why = "it is no regular file";
    if (why) {
        ltn_fail(note, LTN_ERR_IO, "history: not kept in %s: %s", t->path, why);
        t->path[0] = 0;
    }
}

static History *new_history(void)
{
    HistEvent event;
    History *h = history_init();
    if (h) {
        history(h, &event, H_SETSIZE, HISTORY_LINES);
        history(h, &event, H_SETUNIQUE, 1); /* the same twice in a row is kept once */
    }
    return h;
}

static bool load(History *h, const char *path, struct ltn_error *note)
{
    HistEvent event;
    bool there;

    if (!check_file(path, &there))
        return ltn_fail(note, LTN_ERR_IO, "history: not kept in %s: it is no regular file", path), false;
    if (!there || history(h, &event, H_LOAD, path) >= 0)
        return true;
    return ltn_fail(note, LTN_ERR_INPUT, "history: %s is none of libedit's: it is left alone", path), false;
}

static bool store(History *h, const char *path, struct ltn_error *note)
{
    struct ltn_outfile out;
    HistEvent event;

    if (ltn_outfile_open(&out, path, note) != LTN_OK)
        return false;
    if (fchmod(fileno(out.file), 0600) != 0 || history(h, &event, H_SAVE_FP, out.file) < 0) {
        ltn_fail(note, LTN_ERR_IO, "%s: cannot write: %s", path, strerror(errno));
        ltn_outfile_abandon(&out);
        return false;
    }
    return ltn_outfile_commit(&out, note) == LTN_OK;
}

void ltn_terminal_remember(struct ltn_terminal *t, const char *text, struct ltn_error *note)
{
    HistEvent event;

    history(t->history, &event, H_ENTER, text);
    if (!t->path[0])
        return;
    History *h = new_history();
    bool kept =
        h && load(h, t->path, note) && history(h, &event, H_ENTER, text) >= 0 && store(h, t->path, note);
    if (h)
        history_end(h);
    if (!kept)
        t->path[0] = 0;
}

/* ---- life ---------------------------------------------------------------------------------------------- */

static char *prompt(EditLine *el)
{
    struct ltn_terminal *t;
    el_get(el, EL_CLIENTDATA, &t);
    return (char *)t->marker;
}

static enum ltn_status open_all(struct ltn_terminal *t, struct ltn_error *note, struct ltn_error *err)
{
    /* whatever the terminal's locale, models speak UTF-8 */
    if (!setlocale(LC_CTYPE, "") || strcmp(nl_langinfo(CODESET), "UTF-8") != 0)
        setlocale(LC_CTYPE, "C.UTF-8");
    t->out = isatty(STDOUT_FILENO) ? stdout : stderr;
    t->history = new_history();
    t->el = el_init("ltn-run", stdin, t->out, stderr);
    if (!t->history || !t->el)
        return ltn_fail(err, LTN_ERR_MEMORY, "terminal: cannot set it up");
    el_set(t->el, EL_CLIENTDATA, t);
    el_set(t->el, EL_PROMPT, prompt);
    el_set(t->el, EL_EDITOR, "emacs");
    el_set(t->el, EL_SIGNAL, 1); /* it leaves raw mode for them, then hands them on */
    el_set(t->el, EL_HIST, history, t->history);
    el_set(t->el, EL_BIND, "^I", "ed-insert", NULL); /* a tab is text */
    el_set(t->el, EL_BIND, "^R", "em-inc-search-prev", NULL);
    el_source(t->el, NULL); /* ~/.editrc */
    choose_path(t, note);
    if (t->path[0] && !load(t->history, t->path, note))
        t->path[0] = 0;
    return LTN_OK;
}

enum ltn_status ltn_terminal_open(struct ltn_terminal **out, struct ltn_error *note, struct ltn_error *err)
{
    struct ltn_terminal *t = calloc(1, sizeof *t);

    *out = NULL;
    *note = (struct ltn_error){0};
    if (!t)
        return ltn_fail(err, LTN_ERR_MEMORY, "terminal: no memory");
    enum ltn_status status = open_all(t, note, err);
    if (status != LTN_OK) {
        ltn_terminal_close(t);
        return status;
    }
    *out = t;
    return LTN_OK;
}

void ltn_terminal_close(struct ltn_terminal *t)
{
    if (!t)
        return;
    if (t->el)
        el_end(t->el);
    if (t->history)
        history_end(t->history);
    free(t->text);
    free(t);
}

/* ---- reading ------------------------------------------------------------------------------------------- */

static enum ltn_status append(struct ltn_terminal *t, const char *text, size_t bytes, struct ltn_error *err)
{
    if (t->capacity - t->bytes <= bytes) {
        size_t capacity = 2 * t->capacity + bytes + 256;
        char *grown = realloc(t->text, capacity);
        if (!grown)
            return ltn_fail(err, LTN_ERR_MEMORY, "input: no memory for %zu bytes", capacity);
        t->text = grown;
        t->capacity = capacity;
    }
    memcpy(t->text + t->bytes, text, bytes);
    t->bytes += bytes;
    t->text[t->bytes] = 0;
    return LTN_OK;
}

/* One line, without its newline, and what ended it. LTN_INPUT_INTERRUPTED: *bytes were typed. */
static enum ltn_status read_line(struct ltn_terminal *t, const char *marker, const char **line, size_t *bytes,
                                 enum ltn_input_kind *kind, struct ltn_error *err)
{
    int n = 0;

    t->marker = marker;
    el_set(t->el, EL_PREP_TERM, 1); /* before the marker shows, so that what is typed at once is not cooked */
    errno = 0;
    *line = el_gets(t->el, &n);
    int why = errno;
    *kind = LTN_INPUT_TEXT;
    *bytes = *line && n > 0 ? (size_t)n : 0;
    if (*bytes && (*line)[*bytes - 1] == '\n')
        --*bytes;
    if (!*line) {
        fputc('\n', t->out); /* the cursor still stands behind the marker */
        *kind = n == 0 ? LTN_INPUT_END : LTN_INPUT_INTERRUPTED;
        const LineInfo *typed = el_line(t->el);
        *bytes = (size_t)(typed->lastchar - typed->buffer);
    }
    fflush(t->out);
    if (!*line && n != 0 && why != EINTR)
        return ltn_fail(err, LTN_ERR_IO, "terminal: cannot read: %s", strerror(why));
    return LTN_OK;
}

enum ltn_status ltn_terminal_read(struct ltn_terminal *t, const char *marker, struct ltn_input *input,
                                  struct ltn_error *err)
{
    enum ltn_input_kind kind;
    const char *line;
    size_t bytes;
    bool block = false, more = true;

    t->bytes = 0;
    LTN_TRY(append(t, "", 0, err));
    for (size_t n = 0; more; n++) {
        LTN_TRY(read_line(t, n ? CONTINUED : marker, &line, &bytes, &kind, err));
        if (kind != LTN_INPUT_TEXT) {
            *input = (struct ltn_input){kind, "", n ? t->bytes + bytes + 1 : bytes};
            return LTN_OK;
        }
        bool fence = bytes == sizeof FENCE - 1 && memcmp(line, FENCE, bytes) == 0;
        if (n == 0 && fence) {
            block = true;
            continue;
        }
        if (block && fence)
            break;
        more = block || (bytes > 0 && line[bytes - 1] == '\\');
        if (n > (block ? 1 : 0)) /* between two lines, not behind the last */
            LTN_TRY(append(t, "\n", 1, err));
        LTN_TRY(append(t, line, bytes - (more && !block), err));
    }
    *input = (struct ltn_input){block ? LTN_INPUT_BLOCK : LTN_INPUT_TEXT, t->text, t->bytes};
    return LTN_OK;
}
