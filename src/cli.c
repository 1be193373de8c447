#include "src/cli.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/ltn.h"

enum { MAX_FLAGS = 96, LONG_ONLY = 256, HELP = 1000, VERSION_FLAG = 1001 };

/* ---- messages ------------------------------------------------------------------------------------------ */

/* One line, whatever a name or an argument may contain. */
static void message(const char *format, va_list args)
{
    char line[1024];
    int n = snprintf(line, sizeof line, "%s: ", program_invocation_short_name);
    if (n < 0 || n >= (int)sizeof line)
        n = 0;
    vsnprintf(line + n, sizeof line - (size_t)n, format, args);
    for (char *c = line; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';
    fprintf(stderr, "%s\n", line);
}

void ltn_cli_note(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    message(format, args);
    va_end(args);
}

int ltn_cli_fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    message(format, args);
    va_end(args);
    return LTN_EXIT_FAILURE;
}

int ltn_cli_bad_usage(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    message(format, args);
    va_end(args);
    return LTN_EXIT_USAGE;
}

/* ---- signals ------------------------------------------------------------------------------------------- */

static volatile sig_atomic_t caught; /* the signal's number; a handler can reach nothing but a global */

static void catch (int signal)
{
    if (caught == 0 || caught == SIGINT) /* the one that ends a program is not forgotten for a Ctrl-C */
        caught = signal;
}

void ltn_cli_catch_signals(void)
{
    /* no SA_RESTART: a read that waits for input returns */
    struct sigaction action = {.sa_handler = catch, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

bool ltn_cli_interrupted(void)
{
    return caught != 0;
}

void ltn_cli_outlive_interrupts(void)
{
    struct sigaction action = {.sa_handler = catch};
    sigaction(SIGINT, &action, NULL);
    action.sa_flags = (int)SA_RESETHAND;
    sigaction(SIGHUP, &action, NULL);
}

bool ltn_cli_forget_interrupt(void)
{
    if (caught != SIGINT)
        return false;
    caught = 0;
    return true;
}

int ltn_cli_error(const struct ltn_error *err)
{
    if (err->status == LTN_ERR_STOPPED)
        return caught ? 128 + caught : LTN_EXIT_OK;
    return ltn_cli_fail("%s", err->text);
}

/* ---- output -------------------------------------------------------------------------------------------- */

enum ltn_status ltn_cli_write(const char *text, size_t bytes, struct ltn_error *err)
{
    do {
        ssize_t n = write(STDOUT_FILENO, text, bytes);
        if (n >= 0) {
            text += n;
            bytes -= (size_t)n;
        } else if (errno == EAGAIN) { /* somebody made the terminal non-blocking */
            poll(&(struct pollfd){.fd = STDOUT_FILENO, .events = POLLOUT}, 1, -1);
        } else if (errno == EPIPE) {
            return ltn_fail(err, LTN_ERR_STOPPED, "standard output: nobody reads it");
        } else if (errno != EINTR) {
            return ltn_fail(err, LTN_ERR_IO, "standard output: cannot write: %s", strerror(errno));
        }
    } while (bytes > 0);
    return LTN_OK;
}

enum ltn_status ltn_cli_printf(struct ltn_error *err, const char *format, ...)
{
    char text[4096];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n < 0 || n >= (int)sizeof text)
        return ltn_fail(err, LTN_ERR_INPUT, "standard output: a line of %d bytes is too long", n);
    return n ? ltn_cli_write(text, (size_t)n, err) : LTN_OK;
}

void ltn_cli_progress(void *ctx, uint64_t done, uint64_t total)
{
    struct ltn_progress *progress = ctx;
    int percent = total ? (int)(100.0 * (double)done / (double)total) : 100;

    if (percent == progress->percent || !isatty(STDERR_FILENO))
        return;
    progress->percent = percent;
    if (done < total)
        fprintf(stderr, "\r%s: %3d %%", progress->what, percent);
    else
        fprintf(stderr, "\r\033[K");
}

/* ---- options ------------------------------------------------------------------------------------------- */

/* How people write it: "-m", "--temp". */
static const char *written(const struct ltn_flag *f, char buffer[64])
{
    if (f->name)
        snprintf(buffer, 64, "--%s", f->name);
    else
        snprintf(buffer, 64, "-%c", f->letter);
    return buffer;
}

static void describe(const struct ltn_flag *f, char *text, size_t size)
{
    const char *what = f->kind == LTN_FLAG_REAL ? "a number" : "a whole number";
    if (f->kind == LTN_FLAG_SEED)
        snprintf(text, size, "a whole number from 0 to %llu", ULLONG_MAX);
    else if (f->kind == LTN_FLAG_CHOICE)
        snprintf(text, size, "one of %s", f->choices);
    else if (f->kind == LTN_FLAG_DEVICE)
        snprintf(text, size, "auto, cpu, cuda or cuda:N");
    else if (f->kind == LTN_FLAG_STRINGS)
        snprintf(text, size, "%s up to %d times", f->argument, LTN_MAX_REPEATS);
    else if (f->kind == LTN_FLAG_STRING)
        snprintf(text, size, "%s", f->argument);
    else if (f->kind == LTN_FLAG_INTS)
        snprintf(text, size, "up to %d whole numbers from %.10g to %.10g with commas between",
                 LTN_MAX_REPEATS, f->min, f->max);
    else if (isinf(f->max))
        snprintf(text, size, "%s of at least %.10g", what, f->min);
    else
        snprintf(text, size, "%s from %.10g to %.10g", what, f->min, f->max);
}

static bool parse_integer(const char *text, size_t bytes, double min, double max, int64_t *value)
{
    char digits[24];
    if (bytes == 0 || bytes >= sizeof digits || strspn(text, "-0123456789") < bytes)
        return false;
    memcpy(digits, text, bytes);
    digits[bytes] = 0;
    char *end;
    errno = 0;
    *value = strtoll(digits, &end, 10);
    return *end == 0 && errno == 0 && (double)*value >= min && (double)*value <= max;
}

static bool parse_real(const char *text, double min, double max, double *value)
{
    char *end;
    if (!*text || strspn(text, "+-.0123456789eE") != strlen(text))
        return false;
    *value = strtod(text, &end);
    return *end == 0 && isfinite(*value) && *value >= min && *value <= max;
}

static bool parse_seed(const char *text, struct ltn_seed *seed)
{
    char *end;
    if (!*text || strspn(text, "0123456789") != strlen(text))
        return false;
    errno = 0;
    seed->value = strtoull(text, &end, 10);
    seed->given = true;
    return errno == 0;
}

static bool parse_choice(const char *text, const char *choices, const char **value)
{
    size_t bytes = strlen(text);
    for (const char *c = choices; *c; c += strcspn(c, "|"), c += *c == '|')
        if (bytes > 0 && strcspn(c, "|") == bytes && strncmp(c, text, bytes) == 0) {
            *value = text;
            return true;
        }
    return false;
}

static bool parse_integers(const char *text, double min, double max, struct ltn_ints *ints)
{
    for (ints->n = 0; ints->n < LTN_MAX_REPEATS; text++) {
        size_t bytes = strcspn(text, ",");
        if (!parse_integer(text, bytes, min, max, &ints->v[ints->n++]))
            return false;
        text += bytes;
        if (!*text)
            return true;
    }
    return false;
}

static bool append(struct ltn_strings *strings, const char *text)
{
    if (strings->n == LTN_MAX_REPEATS)
        return false;
    strings->v[strings->n++] = text;
    return true;
}

static bool set(const struct ltn_flag *f, const char *text)
{
    switch (f->kind) {
    case LTN_FLAG_SWITCH:
        *(bool *)f->target = true;
        return true;
    case LTN_FLAG_STRING:
        *(const char **)f->target = text;
        return true;
    case LTN_FLAG_STRINGS:
        return append(f->target, text);
    case LTN_FLAG_CHOICE:
        return parse_choice(text, f->choices, f->target);
    case LTN_FLAG_DEVICE:
        *(const char **)f->target = text;
        return ltn_device_check(text, NULL) == LTN_OK;
    case LTN_FLAG_INT:
        return parse_integer(text, strlen(text), f->min, f->max, f->target);
    case LTN_FLAG_SEED:
        return parse_seed(text, f->target);
    case LTN_FLAG_REAL:
        return parse_real(text, f->min, f->max, f->target);
    case LTN_FLAG_INTS:
        return parse_integers(text, f->min, f->max, f->target);
    }
    return false;
}

/* Levenshtein distance, for names of sensible length. */
static int distance(const char *a, const char *b)
{
    int row[64];
    int n = (int)strlen(b);
    if (n >= 64 || strlen(a) >= 64)
        return INT_MAX;
    for (int j = 0; j <= n; j++)
        row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            if (row[j] + 1 < best)
                best = row[j] + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[n];
}

static int unknown(const struct ltn_program *program, const char *given)
{
    char name[64];
    const char *nearest = NULL;
    int least = INT_MAX;

    snprintf(name, sizeof name, "%.*s", (int)strcspn(given + 2, "="), given + 2);
    for (size_t i = 0; i < program->n_flags + 2; i++) {
        const char *candidate = i < program->n_flags    ? program->flags[i].name
                                : i == program->n_flags ? "help"
                                                        : "version";
        if (!candidate)
            continue;
        int d = strncmp(candidate, name, strlen(name)) == 0 ? 0 : distance(name, candidate);
        if (d < least) {
            least = d;
            nearest = candidate;
        }
    }
    if (nearest && least <= 1 + (int)strlen(name) / 3)
        return ltn_cli_bad_usage("--%s: no such option; did you mean --%s?", name, nearest);
    return ltn_cli_bad_usage("--%s: no such option; see %s --help", name, program->name);
}

/* The table as getopt_long wants it. Values: a letter, LONG_ONLY + index, HELP, VERSION_FLAG. */
struct getopt_table {
    char letters[2 * MAX_FLAGS + 2];
    struct option options[MAX_FLAGS + 3];
};

static void make_table(const struct ltn_program *program, struct getopt_table *table)
{
    char *letter = table->letters;
    struct option *option = table->options;

    *letter++ = ':'; /* a missing argument is told from an unknown option */
    for (size_t i = 0; i < program->n_flags && i < MAX_FLAGS; i++) {
        const struct ltn_flag *f = &program->flags[i];
        if (f->letter) {
            *letter++ = f->letter;
            if (f->argument)
                *letter++ = ':';
        }
        if (f->name)
            *option++ = (struct option){f->name, f->argument ? required_argument : no_argument, NULL,
                                        LONG_ONLY + (int)i};
    }
    *letter = 0;
    *option++ = (struct option){"help", no_argument, NULL, HELP};
    *option++ = (struct option){"version", no_argument, NULL, VERSION_FLAG};
    *option = (struct option){0};
}

static const struct ltn_flag *find(const struct ltn_program *program, int value)
{
    if (value >= LONG_ONLY && value < LONG_ONLY + (int)program->n_flags)
        return &program->flags[value - LONG_ONLY];
    for (size_t i = 0; i < program->n_flags; i++)
        if (program->flags[i].letter == value && value)
            return &program->flags[i];
    return NULL;
}

/* Parses one option; -1 to go on. */
static int take(const struct ltn_program *program, int value, char **argv)
{
    const struct ltn_flag *f = find(program, value == ':' || value == '?' ? optopt : value);
    char name[64], expected[128];

    if (value == '?' && f && f->argument == NULL && optopt >= LONG_ONLY)
        return ltn_cli_bad_usage("%s: expected no argument", written(f, name));
    if (value == '?' && optopt >= HELP)
        return ltn_cli_bad_usage("%s: expected no argument", argv[optind - 1]);
    if (value == '?' && optopt)
        return ltn_cli_bad_usage("-%c: no such option; see %s --help", optopt, program->name);
    if (value == '?')
        return unknown(program, argv[optind - 1]);
    describe(f, expected, sizeof expected);
    if (value == ':')
        return ltn_cli_bad_usage("%s: expected %s, found nothing", written(f, name), expected);
    if (!set(f, optarg))
        return ltn_cli_bad_usage("%s: expected %s, found '%s'", written(f, name), expected, optarg);
    return -1;
}

/* A file that is opened must not become a standard stream by getting its number. */
static void open_standard_descriptors(void)
{
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) == -1 && errno == EBADF)
            (void)!open("/dev/null",
                        fd == STDOUT_FILENO ? O_RDONLY : O_RDWR); /* the lowest free number: fd */
}

static int print_version(const struct ltn_program *program)
{
    struct ltn_error err;
    if (ltn_cli_printf(&err, "%s (ltn) %s\n", program->name, ltn_version()) != LTN_OK)
        return ltn_cli_error(&err);
    return LTN_EXIT_OK;
}

int ltn_cli_parse(const struct ltn_program *program, int argc, char **argv, int *first_operand)
{
    struct getopt_table table;
    int value;

    open_standard_descriptors();
    signal(SIGPIPE, SIG_IGN); /* the write fails instead, and that is handled */
    signal(SIGXFSZ, SIG_IGN);
    if (argc == 2 && strcmp(argv[1], "--print-man") == 0)
        return ltn_cli_print(program, LTN_PRINT_MAN);
    if (argc == 2 && strcmp(argv[1], "--print-completion") == 0)
        return ltn_cli_print(program, LTN_PRINT_COMPLETION);
    make_table(program, &table);
    opterr = 0;

    /* --help shows the defaults, so it goes before anything is set */
    while ((value = getopt_long(argc, argv, table.letters, table.options, NULL)) != -1) {
        if (value == HELP)
            return ltn_cli_print(program, LTN_PRINT_HELP);
        if (value == VERSION_FLAG)
            return print_version(program);
    }
    optind = 0; /* glibc: start over */
    while ((value = getopt_long(argc, argv, table.letters, table.options, NULL)) != -1) {
        int code = take(program, value, argv);
        if (code >= 0)
            return code;
    }
    int n = argc - optind;
    if (n > program->max_operands)
        return ltn_cli_bad_usage("unexpected argument '%s'; see %s --help",
                                 argv[optind + program->max_operands], program->name);
    if (n < program->min_operands) {
        ltn_cli_usage(stderr, program);
        return LTN_EXIT_USAGE;
    }
    if (first_operand)
        *first_operand = optind;
    return -1;
}

/* ---- input --------------------------------------------------------------------------------------------- */

static enum ltn_status read_all(int fd, const char *name, ltn_text_fn *fn, void *ctx, struct ltn_error *err)
{
    char text[16384];
    for (;;) {
        if (ltn_cli_interrupted())
            return ltn_fail(err, LTN_ERR_STOPPED, "%s: interrupted", name);
        ssize_t n = read(fd, text, sizeof text);
        if (n == 0)
            return LTN_OK;
        if (n > 0)
            LTN_TRY(fn(ctx, text, (size_t)n, err));
        else if (errno == EAGAIN)
            poll(&(struct pollfd){.fd = fd, .events = POLLIN}, 1, -1);
        else if (errno != EINTR)
            return ltn_fail(err, LTN_ERR_IO, "%s: cannot read: %s", name, strerror(errno));
    }
}

enum ltn_status ltn_cli_read(const char *path, ltn_text_fn *fn, void *ctx, struct ltn_error *err)
{
    if (strcmp(path, "-") == 0)
        return read_all(STDIN_FILENO, "standard input", fn, ctx, err);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return ltn_fail(err, LTN_ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    enum ltn_status status = read_all(fd, path, fn, ctx, err);
    close(fd);
    return status;
}

static enum ltn_status bad_id(const struct ltn_id_parser *p, const char *found, struct ltn_error *err)
{
    return ltn_fail(err, LTN_ERR_INPUT, "token %lld: expected an id, found %s", (long long)p->n, found);
}

static enum ltn_status end_number(struct ltn_id_parser *p, struct ltn_error *err)
{
    if (p->n_digits == 0)
        return LTN_OK;
    p->digits[p->n_digits] = 0;
    long long id = strtoll(p->digits, NULL, 10);
    if (id > INT32_MAX)
        return bad_id(p, p->digits, err);
    LTN_TRY(p->fn(p->ctx, (int32_t)id, err));
    p->n++;
    p->n_digits = 0;
    p->want_number = false;
    return LTN_OK;
}

enum ltn_status ltn_id_parser_feed(struct ltn_id_parser *p, const char *text, size_t bytes,
                                   struct ltn_error *err)
{
    for (size_t i = 0; i < bytes; i++) {
        char c = text[i];
        if (c >= '0' && c <= '9') {
            if (p->n_digits == (int)sizeof p->digits - 1)
                return bad_id(p, "a number too long", err);
            p->digits[p->n_digits++] = c;
        } else if (c == ',') {
            LTN_TRY(end_number(p, err));
            if (p->want_number || p->n == 0)
                return bad_id(p, "','", err);
            p->want_number = true;
        } else if (strchr(" \t\r\n", c) && c) {
            LTN_TRY(end_number(p, err));
        } else {
            char found[8];
            snprintf(found, sizeof found, (unsigned char)c > 0x20 && c < 0x7f ? "'%c'" : "\\x%02x",
                     (unsigned char)c);
            return bad_id(p, found, err);
        }
    }
    return LTN_OK;
}

enum ltn_status ltn_id_parser_finish(struct ltn_id_parser *p, struct ltn_error *err)
{
    LTN_TRY(end_number(p, err));
    return p->want_number ? bad_id(p, "the end", err) : LTN_OK;
}

static enum ltn_status ignore_id(void *ctx, int32_t id, struct ltn_error *err)
{
    (void)ctx, (void)id, (void)err;
    return LTN_OK;
}

int ltn_cli_check_ids(const char *flag, const char *text)
{
    struct ltn_id_parser parser = {.fn = ignore_id};
    struct ltn_error err;

    if (strcmp(text, "-") == 0 || (ltn_id_parser_feed(&parser, text, strlen(text), &err) == LTN_OK &&
                                   ltn_id_parser_finish(&parser, &err) == LTN_OK))
        return -1;
    return ltn_cli_bad_usage("%s: %s", flag, err.text);
}

/* ---- the model ----------------------------------------------------------------------------------------- */

enum ltn_status ltn_cli_model(char *path, size_t size, const char *flag, struct ltn_error *err)
{
    static const char *const places[] = {"model/demo/demo.ltn", "../share/ltn/demo.ltn"};
    const char *variable = getenv("LTN_MODEL");
    char exe[PATH_MAX];

    if (!flag && variable && *variable)
        flag = variable;
    if (flag) {
        if (snprintf(path, size, "%s", flag) < (int)size)
            return LTN_OK;
        return ltn_fail(err, LTN_ERR_INPUT, "model: expected a path shorter than %zu bytes, found %zu", size,
                        strlen(flag));
    }
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    if (n < 0)
        return ltn_fail(err, LTN_ERR_IO, "/proc/self/exe: %s", strerror(errno));
    exe[n] = 0;
    int folder = (int)(strrchr(exe, '/') - exe);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++)
        if (snprintf(path, size, "%.*s/%s", folder, exe, places[i]) < (int)size && access(path, F_OK) == 0)
            return LTN_OK;
    return ltn_fail(err, LTN_ERR_INPUT,
                    "no model: expected one by -m or in $LTN_MODEL, or %s or %s seen from %.*s, found none",
                    places[0], places[1], folder, exe);
}
