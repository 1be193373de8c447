/* ltn-run -i: a person and a model write on one text, in turns, at a terminal. */
#ifndef LTN_INTERACTIVE_H
#define LTN_INTERACTIVE_H

#include "src/ltn.h"

struct ltn_interactive {
    const struct ltn_engine *engine; /* with a tokenizer */
    struct ltn_session *session;
    const struct ltn_generate_options *options; /* of each answer; piece, ctx and keep_open are not used */
    const char *prefix, *suffix;                /* put around each input */
    bool stats, quiet; /* the speed after each answer; no messages that were not asked for */
};

/* Reads inputs and answers them until Ctrl-D or /quit. Answers go to standard output, each ending in a
 * newline, all else to the terminal by src/terminal.h and to standard error. After a stop string the session
 * is taken back to before it, so that it has read no more than what was printed, but for whole tokens: one
 * that holds the end of the text and the beginning of the stop string goes as well. LTN_ERR_STOPPED after a
 * second Ctrl-C in a row at an empty line, or another signal. */
enum ltn_status ltn_interactive(const struct ltn_interactive *interactive, struct ltn_error *err);

#endif
