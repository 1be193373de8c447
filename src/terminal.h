/* What a person types: lines edited with libedit, with a history that is kept from one run to the next, and
 * inputs of several lines. */
#ifndef LTN_TERMINAL_H
#define LTN_TERMINAL_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stddef.h>

struct ltn_terminal;

/* Standard input is a terminal; prompts go to standard output or, where that is none, to standard error. The
 * history is the file ltn/history under $XDG_STATE_HOME, else under ~/.local/state, of mode 0600 in folders
 * of mode 0700 where they are made here; without either, or where there is something else than such a file,
 * the history ends with the run. *note (may be empty) is a line that says why it could not be read. Sets
 * LC_CTYPE. */
enum ltn_status ltn_terminal_open(struct ltn_terminal **out, struct ltn_error *note, struct ltn_error *err);
void ltn_terminal_close(struct ltn_terminal *terminal); /* NULL is allowed */

enum ltn_input_kind {
    LTN_INPUT_TEXT,
    LTN_INPUT_BLOCK,       /* text that stood between two lines of """ */
    LTN_INPUT_INTERRUPTED, /* a signal came; what was typed so far is dropped, bytes says how much it was */
    LTN_INPUT_END,         /* Ctrl-D at the beginning of a line */
};

struct ltn_input {
    enum ltn_input_kind kind;
    const char *text; /* [bytes] and a 0 byte, without the last newline; valid until the next call */
    size_t bytes;
};

/* Reads one input. A line that ends in a backslash goes on: a newline takes the backslash's place. Lines
 * between two lines of """ are taken as they are. */
enum ltn_status ltn_terminal_read(struct ltn_terminal *terminal, const char *marker, struct ltn_input *input,
                                  struct ltn_error *err);

/* Adds a text to the history, and to its file together with what other runs added since. *note: a line that
 * says why it could not be written, the first time. */
void ltn_terminal_remember(struct ltn_terminal *terminal, const char *text, struct ltn_error *note);

#endif
