/* A program's table of options for people and for shells: --help, the man page, the completion of bash. */
#include "src/cli.h"

#include <stdlib.h>
#include <string.h>

#include "src/ltn.h"

enum { HELP_COLUMN = 22, WIDTH = 79 };

/* What every program has without its table saying so. */
static const struct ltn_flag common[] = {
    {.name = "help", .kind = LTN_FLAG_SWITCH, .help = "print this help and exit"},
    {.name = "version", .kind = LTN_FLAG_SWITCH, .help = "print the version and exit"},
};
enum { N_COMMON = sizeof common / sizeof *common };

static size_t n_flags(const struct ltn_program *program)
{
    return program->n_flags + N_COMMON;
}

static const struct ltn_flag *flag(const struct ltn_program *program, size_t i)
{
    return i < program->n_flags ? &program->flags[i] : &common[i - program->n_flags];
}

/* " (default: 256)", where there is one. */
static void print_default(FILE *out, const struct ltn_flag *f)
{
    switch (f->kind) {
    case LTN_FLAG_INT:
        if ((double)*(int64_t *)f->target >= f->min) /* else it is that of a flag not given */
            fprintf(out, " (default: %lld)", (long long)*(int64_t *)f->target);
        break;
    case LTN_FLAG_REAL:
        fprintf(out, " (default: %g)", *(double *)f->target);
        break;
    case LTN_FLAG_CHOICE:
    case LTN_FLAG_DEVICE:
        if (*(const char **)f->target)
            fprintf(out, " (default: %s)", *(const char **)f->target);
        break;
    case LTN_FLAG_INTS: {
        const struct ltn_ints *ints = f->target;
        for (size_t i = 0; i < ints->n; i++)
            fprintf(out, "%s%lld", i ? "," : " (default: ", (long long)ints->v[i]);
        fprintf(out, ints->n ? ")" : "");
        break;
    }
    default:
        break;
    }
}

static enum ltn_status no_memory(struct ltn_error *err)
{
    return ltn_fail(err, LTN_ERR_MEMORY, "help: no memory");
}

/* What the help says of an option, the default with it; malloc'd. NULL: no memory. */
static char *help_of(const struct ltn_flag *f)
{
    char *text = NULL;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);
    if (!out)
        return NULL;
    fputs(f->help, out);
    print_default(out, f);
    if (fclose(out) == 0)
        return text;
    free(text);
    return NULL;
}

/* ---- --help -------------------------------------------------------------------------------------------- */

/* Words of text in lines of at most WIDTH columns, each after `indent` spaces; the first line has begun. */
static void print_wrapped(FILE *out, const char *text, int indent)
{
    int column = indent;
    while (*text) {
        size_t word = strcspn(text, " \n");
        if (column > indent && column + 1 + (int)word > WIDTH) {
            fprintf(out, "\n%*s", indent, "");
            column = indent;
        }
        column += fprintf(out, "%s%.*s", column > indent ? " " : "", (int)word, text);
        text += word;
        if (*text == '\n') {
            fprintf(out, "\n%*s", indent, "");
            column = indent;
        }
        if (*text)
            text++;
    }
    fputc('\n', out);
}

static void print_flag(FILE *out, const struct ltn_flag *f, const char *help)
{
    char left[80];
    int n = snprintf(left, sizeof left, "  %c%c%s%s%s%s", f->letter ? '-' : ' ', f->letter ? f->letter : ' ',
                     !f->name    ? ""
                     : f->letter ? ", --"
                                 : "  --",
                     f->name ? f->name : "", f->argument ? " " : "", f->argument ? f->argument : "");
    if (n + 2 <= HELP_COLUMN)
        fprintf(out, "%-*s", HELP_COLUMN, left);
    else
        fprintf(out, "%s\n%*s", left, HELP_COLUMN, "");
    print_wrapped(out, help, HELP_COLUMN);
}

void ltn_cli_usage(FILE *out, const struct ltn_program *program)
{
    fprintf(out, "Usage: %s%s [OPTION]...%s%s\n", program->name, program->commands ? " [COMMAND]" : "",
            program->operands ? " " : "", program->operands ? program->operands : "");
}

static enum ltn_status print_help(FILE *out, const struct ltn_program *program, struct ltn_error *err)
{
    ltn_cli_usage(out, program);
    print_wrapped(out, program->summary, 0);
    fputc('\n', out);
    for (size_t i = 0; i < n_flags(program); i++) {
        char *help = help_of(flag(program, i));
        if (!help)
            return no_memory(err);
        print_flag(out, flag(program, i), help);
        free(help);
    }
    if (program->notes) {
        fputc('\n', out);
        print_wrapped(out, program->notes, 0);
    }
    return LTN_OK;
}

/* The program's name, or "ltn-bench-attention" for a command, with `between` for what is between words. */
static void page_name(char name[64], const struct ltn_program *program, char between)
{
    snprintf(name, 64, "%s", program->name);
    for (char *c = name; *c; c++)
        if (*c == ' ' || *c == '-')
            *c = between;
}

/* ---- the man page, in the macros of man(7) ------------------------------------------------------------- */

/* Text as roff should show it: no character is taken for a request, no ASCII one becomes another. */
static void roff(FILE *out, const char *text)
{
    bool line_start = true;
    for (const char *c = text; *c; c++) {
        const char *special = *c == '\\'                   ? "\\e"
                              : *c == '-'                  ? "\\-"
                              : *c == '\''                 ? "\\(aq"
                              : *c == '`'                  ? "\\(ga"
                              : *c == '^'                  ? "\\(ha"
                              : *c == '~'                  ? "\\(ti"
                              : *c == '.' && line_start    ? "\\&."
                              : strncmp(c, "\n\n", 2) == 0 ? "\n.PP\n"
                              : *c == '\n'                 ? "\n.br\n"
                                                           : NULL;
        line_start = *c == '\n';
        if (special)
            fputs(special, out);
        else
            fputc(*c, out);
        c += strncmp(c, "\n\n", 2) == 0;
    }
}

static void print_synopsis(FILE *out, const struct ltn_flag *f)
{
    fputs(".TP\n", out);
    if (f->letter)
        fprintf(out, "\\fB\\-%c\\fR%s", f->letter, f->name ? ", " : "");
    if (f->name) {
        fputs("\\fB\\-\\-", out);
        roff(out, f->name);
        fputs("\\fR", out);
    }
    if (f->argument) {
        fputs(" \\fI", out);
        roff(out, f->argument);
        fputs("\\fR", out);
    }
    fputc('\n', out);
}

static enum ltn_status print_man(FILE *out, const struct ltn_program *program, struct ltn_error *err)
{
    static const char *const programs[] = {"ltn-run", "ltn-score", "ltn-bench", "ltn-info", "ltn-convert"};
    const char *separator = "";
    char page[64], summary[256]; /* a page's name line has no full stop */
    snprintf(summary, sizeof summary, "%s", program->summary);
    summary[strlen(summary) - 1] = 0;

    page_name(page, program, '-');
    fprintf(out, ".TH \"%s\" 1 \"\" \"ltn %s\" \"ltn\"\n.SH NAME\n", page, ltn_version());
    roff(out, page);
    fputs(" \\- ", out);
    roff(out, summary);
    fputs("\n.SH SYNOPSIS\n.B ", out);
    roff(out, program->name);
    fputs(program->commands ? "\n[\\fICOMMAND\\fR]" : "", out);
    fputs("\n[\\fIOPTION\\fR]...", out);
    if (program->operands) {
        fputs(" \\fI", out);
        roff(out, program->operands);
        fputs("\\fR", out);
    }
    if (program->notes) {
        fputs("\n.SH DESCRIPTION\n", out);
        roff(out, program->notes);
    }
    fputs("\n.SH OPTIONS\n", out);
    for (size_t i = 0; i < n_flags(program); i++) {
        const struct ltn_flag *f = flag(program, i);
        char *help = help_of(f);
        if (!help)
            return no_memory(err);
        print_synopsis(out, f);
        roff(out, help);
        fputc('\n', out);
        free(help);
    }
    fputs(".SH SEE ALSO\n", out);
    for (const char *c = program->commands ? program->commands : ""; *c; c += strcspn(c, "|"), c += *c == '|')
        if (c != program->commands) { /* the first has no page but this */
            fprintf(out, "%s\\fB", separator);
            roff(out, program->name);
            fprintf(out, "\\-%.*s\\fR(1)", (int)strcspn(c, "|"), c);
            separator = ",\n";
        }
    for (size_t i = 0; i < sizeof programs / sizeof *programs; i++)
        if (strcmp(programs[i], program->name) != 0) {
            fprintf(out, "%s\\fB", separator);
            roff(out, programs[i]);
            fputs("\\fR(1)", out);
            separator = ",\n";
        }
    fputc('\n', out);
    return LTN_OK;
}

/* ---- bash ---------------------------------------------------------------------------------------------- */

static bool names_file(const struct ltn_flag *f)
{
    static const char *const names[] = {"FILE", "DIR", "MODEL"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(f->argument, names[i]) == 0)
            return true;
    return strchr(f->argument, '.') != NULL;
}

/* "-m", "--model" or "-m|--model". */
static void print_names(FILE *out, const struct ltn_flag *f, const char *between)
{
    if (f->letter)
        fprintf(out, "-%c%s", f->letter, f->name ? between : "");
    if (f->name)
        fprintf(out, "--%s", f->name);
}

static bool has_words(const struct ltn_flag *f)
{
    return f->kind == LTN_FLAG_CHOICE || f->kind == LTN_FLAG_DEVICE;
}

/* "    -f|--save", the options whose argument does, or does not, name a file; false: there is none. */
static bool print_group(FILE *out, const struct ltn_program *program, bool files)
{
    const char *before = "    ";
    for (size_t i = 0; i < program->n_flags; i++) {
        const struct ltn_flag *f = &program->flags[i];
        if (!f->argument || has_words(f) || names_file(f) != files)
            continue;
        fputs(before, out);
        print_names(out, f, "|");
        before = "|";
    }
    return before[0] == '|';
}

static void print_words(FILE *out, const struct ltn_flag *f)
{
    fputs("    ", out);
    print_names(out, f, "|");
    fputs(") words='", out);
    for (const char *c = f->kind == LTN_FLAG_CHOICE ? f->choices : "auto|cpu|cuda"; *c; c++)
        fputc(*c == '|' ? ' ' : *c, out);
    fputs("' ;;\n", out);
}

static void print_completion(FILE *out, const struct ltn_program *program)
{
    const bool is_command = strchr(program->name, ' ') != NULL; /* its program's completion calls this one */
    char name[64];
    page_name(name, program, '_');

    fprintf(out,
            "# Completion of %s for bash. An empty answer leaves it to readline, which completes names of "
            "files,\n"
            "# unless compopt says that there is nothing to complete.\n"
            "_%s() {\n"
            "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=\n"
            "    COMPREPLY=()\n"
            "    [[ $cur == = ]] && cur= # bash takes --name=value for three words\n"
            "    [[ $prev == = ]] && prev=${COMP_WORDS[COMP_CWORD-2]}\n",
            program->name, name);
    if (program->commands) {
        const char *first = program->commands + strcspn(program->commands, "|");
        if (*first)
            fprintf(
                out,
                "    case ${COMP_WORDS[1]} in %s) [[ $COMP_CWORD -gt 1 ]] && { _%s_${COMP_WORDS[1]}; return; "
                "} ;; esac\n",
                first + 1, name);
        fputs("    [[ $COMP_CWORD -eq 1 && $cur != -* ]] && {\n        mapfile -t COMPREPLY < <(compgen -W '",
              out);
        for (const char *c = program->commands; *c; c++)
            fputc(*c == '|' ? ' ' : *c, out);
        fputs("' -- \"$cur\")\n        return 0\n    }\n", out);
    }
    fputs("    case $prev in\n", out);
    if (print_group(out, program, true))
        fputs(") return 0 ;;\n", out);
    if (print_group(out, program, false))
        fputs(") ;;\n", out);
    for (size_t i = 0; i < program->n_flags; i++)
        if (has_words(&program->flags[i]))
            print_words(out, &program->flags[i]);
    fprintf(out, "    *) [[ $cur == -* ]] %s", program->operands ? "|| return 0; words='" : "&& words='");
    for (size_t i = 0; i < n_flags(program); i++) {
        fputs(i ? " " : "", out);
        print_names(out, flag(program, i), " ");
    }
    fprintf(out, "' ;;\n"
                 "    esac\n"
                 "    compopt +o default 2>/dev/null\n"
                 "    mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$cur\")\n"
                 "}\n");
    if (!is_command)
        fprintf(out, "complete -o default -F _%s %s\n", name, program->name);
}

/* The whole text is made before any of it is written, so that a failure to write is seen. */
int ltn_cli_print(const struct ltn_program *program, enum ltn_print what)
{
    char *text = NULL;
    size_t bytes = 0;
    struct ltn_error err;
    enum ltn_status status = LTN_OK;
    FILE *out = open_memstream(&text, &bytes);

    if (!out)
        status = no_memory(&err);
    else if (what == LTN_PRINT_HELP)
        status = print_help(out, program, &err);
    else if (what == LTN_PRINT_MAN)
        status = print_man(out, program, &err);
    else
        print_completion(out, program);
    if (out && fclose(out) != 0 && status == LTN_OK)
        status = no_memory(&err);
    if (status == LTN_OK)
        status = ltn_cli_write(text, bytes, &err);
    free(text);
    return status == LTN_OK ? LTN_EXIT_OK : ltn_cli_error(&err);
}
