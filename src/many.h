/* Many prompts, each continued by itself, several at once: ltn-run -j.
 *
 * Prompts are numbered from 0 in the order of the input. What is made of number i is a function of the model,
 * the options, the prompt, the seed and i (src/rng.h, ltn_text_seed); on the CPU to the bit, whatever else is
 * under way beside it. It is what ltn-run alone makes of that prompt under --seed ltn_text_seed(seed, i).
 *
 * Input: each line of a file, "\n" or NUL at its end, the last perhaps without; an empty line is an empty
 * prompt. Or each file is a prompt as a whole. With `json` a line is an object whose "prompt" is the prompt;
 * its other keys are not looked at.
 *
 * Output, in the order of the input: each text, with a line end after it (NUL where that ends the prompts).
 * The text of the earliest prompt under way is written as it comes. Or JSON lines, each written as a whole:
 *   {"index": 0, "prompt": "...", "text": "...", "tokens": 12, "logprob": -31.7, "end": "length"}
 * prompt is the input's text ("file": its name, in its place, where each file is one); the rest is as in
 * src/jsonl.h, end being "stopped" where a signal came.
 */
#ifndef LTN_MANY_H
#define LTN_MANY_H

#include "src/ltn.h"

struct ltn_many {
    const struct ltn_engine *engine;
    int32_t width;            /* prompts at once */
    struct ltn_session *from; /* each prompt goes on from here; NULL: from the beginning */
    uint64_t seed;            /* of them all */
    const char *file;         /* its lines are prompts; "-": standard input */
    const char *const *files; /* [n_files] or each of these is one; then `file` does not count */
    size_t n_files;
    bool nul; /* prompts and texts end in NUL */
    bool json_in, json_out;
    bool ids;  /* prompts are token ids, as src/cli.h parses them, and so are the texts */
    bool echo; /* put the prompt before its text; not with json_out */
    size_t max_waiting;
    struct ltn_generate_options generate; /* of each; piece and ctx do not count */
    /* what was done */
    int64_t n_prompts, n_read, n_made; /* prompts, tokens read, tokens made */
    int64_t n_steps, n_rows;           /* batched steps; sessions that took part, summed */
};

/* Reads and answers to the end of the input, in constant memory but for whole prompts and texts where json_in
 * or json_out need them: while what is not yet written takes more than max_waiting bytes, only the earliest
 * goes on. A prompt that is refused ends the reading: what came before it is completed and written, then the
 * error names its line or file. On a signal what is under way ends where it is, is written, and
 * LTN_ERR_STOPPED comes back. */
enum ltn_status ltn_many(struct ltn_many *many, struct ltn_error *err);

#endif
