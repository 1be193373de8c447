/* What every ltn program does alike: one table of options, from which parsing, the hints at unknown options,
 * --help, the man page and the completion of bash come; signals; reading input; writing stdout; finding the
 * model.
 *
 * Exit codes: 0 done, 1 failure, 2 usage; 130 after Ctrl-C. stdout carries the result and nothing else;
 * messages are one line on stderr, "PROGRAM: what is wrong".
 */
#ifndef LTN_CLI_H
#define LTN_CLI_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { LTN_EXIT_OK = 0, LTN_EXIT_FAILURE = 1, LTN_EXIT_USAGE = 2, LTN_EXIT_INTERRUPT = 130 };

/* ---- options ------------------------------------------------------------------------------------------- */

enum ltn_flag_kind {
    LTN_FLAG_SWITCH,  /* bool: set to true */
    LTN_FLAG_STRING,  /* const char *: points into argv */
    LTN_FLAG_STRINGS, /* struct ltn_strings: may be repeated, up to LTN_MAX_REPEATS times */
    LTN_FLAG_CHOICE,  /* const char *: one of `choices` */
    LTN_FLAG_DEVICE,  /* const char *: see ltn_device_check */
    LTN_FLAG_INT,     /* int64_t in [min, max] */
    LTN_FLAG_SEED,    /* struct ltn_seed: 0 to 2^64 - 1 */
    LTN_FLAG_REAL,    /* double in [min, max] */
    LTN_FLAG_INTS,    /* struct ltn_ints: numbers in [min, max] with commas between */
};

enum { LTN_MAX_REPEATS = 64 }; /* of a repeated option, or numbers in a list */

struct ltn_strings {
    const char *v[LTN_MAX_REPEATS]; /* [n] */
    size_t n;
};

struct ltn_ints {
    int64_t v[LTN_MAX_REPEATS]; /* [n] */
    size_t n;
};

struct ltn_seed {
    uint64_t value;
    bool given;
};

/* One option. The variable behind `target` holds the default before parsing. */
struct ltn_flag {
    char letter;          /* 'm' for -m; 0: none */
    const char *name;     /* "top-k" for --top-k; NULL: none */
    const char *argument; /* what the help calls the argument, NULL for a switch. bash completes the names of
                             files for FILE, DIR, MODEL and what has a dot: "OUT.csv" */
    enum ltn_flag_kind kind;
    void *target;
    const char *help;    /* one sentence, lower case, without a full stop; \n where a line must break */
    double min, max;     /* of numbers; max INFINITY: no upper limit */
    const char *choices; /* of LTN_FLAG_CHOICE: "table|csv|json" */
};

struct ltn_program {
    const char *name;     /* "ltn-run" */
    const char *summary;  /* one line for --help */
    const char *operands; /* for the usage line, "FILE"; NULL: the program takes none */
    int min_operands, max_operands;
    const struct ltn_flag *flags; /* [n_flags] without --help and --version, which every program has */
    size_t n_flags;
    const char *notes; /* paragraphs after the options in --help; NULL: none */
    /* "model|attention": what may come first on the command line, the first of them being what the program
     * does without. Each has a table of its own, whose name is "PROGRAM COMMAND". NULL: none */
    const char *commands;
};

/* Parses the command line. Returns -1 to go on, with *first_operand (may be NULL) the index in argv of the
 * first operand (argc: none), else the exit code to leave with: --help and --version were printed to stdout,
 * or an error to stderr. The standard descriptors are open afterwards, SIGPIPE is ignored. */
int ltn_cli_parse(const struct ltn_program *program, int argc, char **argv, int *first_operand);

/* The table for people and for shells (src/cli_docs.c). The last two are what `make` gets from a program by
 * its only argument (but for a command), --print-man or --print-completion, which --help does not list.
 * Targets hold the defaults. */
enum ltn_print { LTN_PRINT_HELP, LTN_PRINT_MAN, LTN_PRINT_COMPLETION };
int ltn_cli_print(const struct ltn_program *program, enum ltn_print what); /* to stdout; the exit code */
void ltn_cli_usage(FILE *out, const struct ltn_program *program);          /* the usage line */

/* "PROGRAM: text" on stderr. _usage returns LTN_EXIT_USAGE, _fail LTN_EXIT_FAILURE. */
__attribute__((format(printf, 1, 2))) void ltn_cli_note(const char *format, ...);
__attribute__((format(printf, 1, 2))) int ltn_cli_fail(const char *format, ...);
__attribute__((format(printf, 1, 2))) int ltn_cli_bad_usage(const char *format, ...);

/* The exit code that an error ends a program with, after printing it: quiet and 0 where stdout's reader has
 * gone; quiet and 130 (SIGTERM: 143, SIGHUP: 129) where a signal stopped the work. */
int ltn_cli_error(const struct ltn_error *err);

/* ---- signals ------------------------------------------------------------------------------------------- */

/* From now on the first SIGINT or SIGTERM is only noted (and interrupts a blocking read or write); a second
 * one ends the program. */
void ltn_cli_catch_signals(void);
bool ltn_cli_interrupted(void);

/* For a program that Ctrl-C does not end: from now on SIGINT is noted as often as it comes, and SIGHUP once,
 * like SIGTERM. The second forgets a noted SIGINT, so that work goes on; false: what was noted, if anything,
 * was another signal. */
void ltn_cli_outlive_interrupts(void);
bool ltn_cli_forget_interrupt(void);

/* ---- input --------------------------------------------------------------------------------------------- */

/* Receives input piece by piece; anything but LTN_OK stops the reading, which returns it. */
typedef enum ltn_status ltn_text_fn(void *ctx, const char *text, size_t bytes, struct ltn_error *err);

/* Reads a file to its end ("-": stdin) in constant memory. LTN_ERR_STOPPED on a signal. */
enum ltn_status ltn_cli_read(const char *path, ltn_text_fn *fn, void *ctx, struct ltn_error *err);

/* Token ids as text: decimal numbers with commas or white space between, in pieces of any size. */
typedef enum ltn_status ltn_id_fn(void *ctx, int32_t id, struct ltn_error *err);
struct ltn_id_parser {
    ltn_id_fn *fn;
    void *ctx;
    int64_t n;       /* ids so far */
    char digits[16]; /* of the number being read */
    int n_digits;
    bool want_number; /* a comma was just read */
};
enum ltn_status ltn_id_parser_feed(struct ltn_id_parser *parser, const char *text, size_t bytes,
                                   struct ltn_error *err);
enum ltn_status ltn_id_parser_finish(struct ltn_id_parser *parser, struct ltn_error *err);

/* Checks the ids that a flag brought, before any work: -1, or the exit code after printing what is wrong. "-"
 * (standard input) passes. */
int ltn_cli_check_ids(const char *flag, const char *text);

/* The model's path: `flag` (the value of -m), else $LTN_MODEL, else model/demo/demo.ltn beside the
 * executable, else ../share/ltn/demo.ltn from there. Refuses, naming where it looked, when there is none. */
enum ltn_status ltn_cli_model(char *path, size_t size, const char *flag, struct ltn_error *err);

/* ---- output -------------------------------------------------------------------------------------------- */

/* Writes all of it to stdout at once; no bytes: asks whether stdout can be written. LTN_ERR_STOPPED where the
 * reader has gone (a quiet end). */
enum ltn_status ltn_cli_write(const char *text, size_t bytes, struct ltn_error *err);
/* The same with a format; up to 4,096 bytes a call. */
__attribute__((format(printf, 2, 3))) enum ltn_status ltn_cli_printf(struct ltn_error *err,
                                                                     const char *format, ...);

/* A progress line on stderr, where stderr is a terminal; erased at the end. A ltn_engine_options.progress;
 * ctx: struct ltn_progress. */
struct ltn_progress {
    const char *what; /* "loading model" */
    int percent;      /* shown last; begins as -1 */
};
void ltn_cli_progress(void *ctx, uint64_t done, uint64_t total);

#endif
