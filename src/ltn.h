/* ltn: inference for TransNormerLLM. This header is the whole public C interface.
 *
 *   struct ltn_engine *engine;
 *   struct ltn_session *session;
 *   struct ltn_error err;
 *   if (ltn_engine_open(&engine, "demo.ltn", NULL, &err) || ltn_session_create(&session, engine, NULL, &err))
 *       fail(err.text);
 *   ltn_session_feed_text(session, "Once upon a time", 16, &err);
 *   ltn_session_end_text(session, &err);
 *   ltn_generate(session, &(struct ltn_generate_options){.max_tokens = 100, .piece = print}, NULL, &err);
 *
 * An engine is a loaded model: immutable, and large. A session is one timeline through it: the recurrent
 * state, of the same size however long the past is, the position in it, the logits of the last token, the
 * random draws. Everything that differs between two texts lives in the session.
 *
 * Threads: any number of threads may use one engine, each with sessions of its own; their computations take
 * turns on its device. A session belongs to one thread at a time, and may go from one to another by whatever
 * orders memory between them (a mutex, a join); ltn_session_copy needs both of its. Different engines share
 * nothing. An engine is closed when no call on it runs and its sessions are freed. Callbacks run in the
 * thread that made the call, while it lasts; in them the session of the call may be read (its position,
 * logits, an export, a save, a copy from it), but not fed, sampled, seeded, set anew or freed. The CPU
 * backend has threads of its own, which take no signals. A child of fork(2) may not use what its parent
 * opened.
 *
 * Errors: a call that can fail returns an enum ltn_status and writes one line to *err (which may be NULL).
 * The library never prints, exits or installs signal handlers.
 *
 * Memory: what is created is freed by the matching close or free, which accept NULL. Engines outlive their
 * sessions. Feeding, sampling and generating allocate nothing once a session has warmed up.
 */
#ifndef LTN_H
#define LTN_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#ifdef __GNUC__
#pragma GCC visibility push(default) /* libltn.so is compiled with -fvisibility=hidden */
#endif

struct ltn_engine;
struct ltn_session;
struct ltn_batch;
struct ltn_tokenizer; /* tokenizer/tokenizer.h */

const char *ltn_version(void); /* of the library, "0.1.0" */

/* ---- engine: a loaded model ---------------------------------------------------------------------------- */

struct ltn_engine_options {
    const char *device; /* "auto" (also NULL): CUDA where it works, else the CPU; "cpu"; "cuda"; "cuda:N" */
    int n_threads;      /* of the CPU backend; 0: one per available core */
    void (*progress)(void *ctx, uint64_t done, uint64_t total); /* bytes of weights loaded; may be NULL */
    void *progress_ctx;
    /* "exact" (also NULL): many tokens are read in the types in which one is. "fp8": their products run in
     * e4m3, about twice as fast and coarser, and weights take half as much memory again: an engine on a
     * Hopper GPU, BF16, F16 or FP8 weights. */
    const char *prefill;
};

struct ltn_engine_info {
    int32_t vocab_size;
    int32_t embed_dim;
    int32_t n_layers;
    int32_t n_heads;
    int32_t head_dim;
    int32_t bos_id, eos_id; /* -1: none */
    uint64_t n_parameters;
    uint64_t weights_bytes; /* all weights, in the types in which the file stores them */
    uint64_t state_bytes;   /* recurrent state of one session */
    uint64_t decode_bytes;  /* memory traffic of one decoded token: weights read, state read and written */
    uint64_t session_bytes; /* of a session file and of ltn_session_export */
    int32_t chunk_rows;     /* tokens that one prefill step takes at once */
    int n_threads;          /* of the CPU backend; 0 on another */
    double start_seconds;   /* that the device and its library took to start, and then */
    double load_seconds;    /* the weights, to be where they are used */
    bool has_tokenizer;
    const char *dtype;    /* of the matrices: "F32", "BF16", "F16", "Q8", "FP8", "Q4" */
    const char *backend;  /* for people: "CPU, 8 threads, AVX-512" */
    const char *checksum; /* the model's identity, 32 hexadecimal digits */
    const char *notice;   /* one line that a program should show, e.g. why "auto" passed over CUDA; or NULL */
};

/* Refuses a text that names no device. */
enum ltn_status ltn_device_check(const char *device, struct ltn_error *err);

/* Opens a .ltn file (model/checkpoint.h) and puts its weights on the device. options may be NULL. The CUDA
 * backend, libltn_cuda.so, is looked for beside the running executable, in ../lib and ../lib/ltn from there,
 * then beside libltn.so and wherever the system's loader looks. */
enum ltn_status ltn_engine_open(struct ltn_engine **out, const char *path,
                                const struct ltn_engine_options *options, struct ltn_error *err);
void ltn_engine_close(struct ltn_engine *engine);

const struct ltn_engine_info *ltn_engine_info(const struct ltn_engine *engine); /* lives as the engine does */
const struct ltn_tokenizer *ltn_engine_tokenizer(const struct ltn_engine *engine); /* NULL: model has none */

/* Text to ids and back, the whole at once. *ids and *text are malloc'd, the caller frees them; *text is
 * [*bytes] and a 0 byte. LTN_ERR_UNSUPPORTED where the model has no tokenizer. */
enum ltn_status ltn_engine_tokenize(const struct ltn_engine *engine, const char *text, size_t bytes,
                                    int32_t **ids, size_t *n, struct ltn_error *err);
enum ltn_status ltn_engine_detokenize(const struct ltn_engine *engine, const int32_t *ids, size_t n,
                                      char **text, size_t *bytes, struct ltn_error *err);

/* ---- session: one timeline ----------------------------------------------------------------------------- */

struct ltn_session_options {
    int32_t chunk_rows; /* tokens per prefill step, 1 or more; 0: what suits the backend (info.chunk_rows) */
    int32_t score_rows; /* logits rows that ltn_session_score has room for; 0: the session will not score */
    /* Compute in this batch's memory instead of some of its own: one of many sessions then takes little more
     * than its state. All sessions of a batch and the batch itself belong to one thread at a time, together,
     * and the batch outlives them. NULL: a session by itself. */
    struct ltn_batch *batch;
};

/* A new session stands at position 0 with a zero state and seed 0. options may be NULL. */
enum ltn_status ltn_session_create(struct ltn_session **out, const struct ltn_engine *engine,
                                   const struct ltn_session_options *options, struct ltn_error *err);
void ltn_session_free(struct ltn_session *session);

/* Back to position 0 with a zero state; the seed stays, its draws start over. */
enum ltn_status ltn_session_reset(struct ltn_session *session, struct ltn_error *err);

/* Makes dst what src is, both of one engine: a fork. Neither sees what the other does from then on. Refused
 * while src is amid a text (before ltn_session_end_text). */
enum ltn_status ltn_session_copy(struct ltn_session *dst, struct ltn_session *src, struct ltn_error *err);

int64_t ltn_session_position(const struct ltn_session *session); /* tokens fed since the start */

/* Feeds tokens. Any split of a sequence into feeds gives the same result: ids wait in the session until a
 * step's worth is there or something is asked of them (logits, a sample, an export), so many small feeds cost
 * what one large one does. An id outside the vocabulary is refused, and then none of this call's is taken.
 * After a failure of the device the session refuses everything but reset, copy into and import. */
enum ltn_status ltn_session_feed(struct ltn_session *session, const int32_t *ids, size_t n,
                                 struct ltn_error *err);

/* Feeds text, in pieces of any size, in constant memory; ltn_session_end_text says that it is complete. The
 * ids are those of the whole text. Nothing else may be fed between. */
enum ltn_status ltn_session_feed_text(struct ltn_session *session, const char *text, size_t bytes,
                                      struct ltn_error *err);
enum ltn_status ltn_session_end_text(struct ltn_session *session, struct ltn_error *err);

/* *logits: [vocab_size] of the last token fed, in host memory, valid until the session is used again. An
 * error where nothing was fed yet. */
enum ltn_status ltn_session_logits(struct ltn_session *session, const float **logits, struct ltn_error *err);

/* Receives logits [rows, vocab_size] (host, valid during the call) of the tokens at position, position + 1,
 * ...; anything but LTN_OK stops ltn_session_score, which returns it. */
typedef enum ltn_status ltn_logits_fn(void *ctx, const float *logits, int64_t position, int32_t rows,
                                      struct ltn_error *err);

/* As ltn_session_feed, at once, giving the logits of every token. Needs options.score_rows. */
enum ltn_status ltn_session_score(struct ltn_session *session, const int32_t *ids, size_t n,
                                  ltn_logits_fn *each, void *ctx, struct ltn_error *err);

/* The whole session as a file of info.session_bytes bytes (src/session_file.h says what is in it), however
 * long its past is. What is loaded, into any session of the same model, goes on exactly where the saved one
 * stood: its text, its draws, a character of which only the first bytes were generated. Saving appears under
 * its name complete and synced, or not at all: a file that was there stays until then, and a full disk is a
 * failure. Amid a text saving is refused. Loading refuses another model's session and, by its checksums, a
 * truncated or altered file; the session is then as it was. */
enum ltn_status ltn_session_save(struct ltn_session *session, const char *path, struct ltn_error *err);
enum ltn_status ltn_session_load(struct ltn_session *session, const char *path, struct ltn_error *err);

/* The same to and from memory: the bytes of the file. */
enum ltn_status ltn_session_export(struct ltn_session *session, void *buffer, size_t bytes,
                                   struct ltn_error *err);
enum ltn_status ltn_session_import(struct ltn_session *session, const void *buffer, size_t bytes,
                                   struct ltn_error *err);

/* ---- batch: one step of several sessions -------------------------------------------------------------- */

/* Room for passes of up to max_sessions sessions, 1 to LTN_BATCH_MAX; a step of more makes several. */
enum { LTN_BATCH_MAX = 4096 };
enum ltn_status ltn_batch_create(struct ltn_batch **out, const struct ltn_engine *engine,
                                 int32_t max_sessions, struct ltn_error *err);
void ltn_batch_free(struct ltn_batch *batch);

/* Does for each of the sessions, [n], any of the batch's engine, what ltn_session_logits would have to do,
 * but together: the weights are read once for all. Their logits and samples cost no more passes then, until
 * they are fed again. Nothing flows from one session to another, wherever each of them stands and however
 * much it was fed; on the CPU the logits are to the bit those that the session would have by itself, on other
 * devices within rounding. A session that waits for nothing is left alone. Where one is refused (amid a text,
 * after a failure, another engine's) the error names it by its index and none has moved. After a failure of
 * the device those that were moving refuse everything, as after ltn_session_feed.
 * sampling: how the sessions will draw next, if that is known, else NULL. A device then draws each one's next
 * token with the step, the same that ltn_session_sample gives without it, and the logits stay where they are
 * until they are asked for. */
struct ltn_sampling;
enum ltn_status ltn_batch_step(struct ltn_batch *batch, struct ltn_session *const *sessions, size_t n,
                               const struct ltn_sampling *sampling, struct ltn_error *err);

/* ---- sampling and generation --------------------------------------------------------------------------- */

struct ltn_logit_bias {
    int32_t id;
    float value; /* added to the token's logit; -INFINITY: it never comes */
};

enum { LTN_MAX_REPEAT_LAST = 1024 }; /* so many of its last tokens a session knows */

/* The order is penalties, bias, temperature, top_k, typical, top_p, min_p; each takes what the one before it
 * left, and shares are of that. A struct of zeros but for top_p = 1 is the plain choice of the likeliest
 * token. */
struct ltn_sampling {
    double temperature; /* 0: always the likeliest token, of equals the one with the lowest id */
    int32_t top_k;      /* keep the k likeliest; 0: all */
    double top_p;       /* keep the fewest likeliest that together reach this share; 1: all */
    double min_p;       /* keep those at least this share of the likeliest; 0: all */
    /* Keep the fewest that together reach this share, those first whose -log p is nearest to the entropy; 0
     * or 1: all (Meister, Pimentel, Wiher, Cotterell: Locally typical sampling, arXiv 2202.00666). */
    double typical;
    /* Penalties look at the last repeat_last tokens of the timeline, the prompt's too; 0: at none. The logit
     * l of a token that is n times among them becomes (l > 0 ? l / repeat : l * repeat) - presence - n *
     * frequency (the first part: Keskar et al., CTRL, arXiv 1909.05858, as it is commonly done).
     */
    int32_t repeat_last;               /* 0 to LTN_MAX_REPEAT_LAST */
    double repeat_penalty;             /* above 1: less of it; 0 or 1: none */
    double presence_penalty;           /* 0: none */
    double frequency_penalty;          /* 0: none */
    const struct ltn_logit_bias *bias; /* [n_bias] borrowed; of a token that is there twice the sum counts */
    size_t n_bias;
};

extern const struct ltn_sampling ltn_sampling_default; /* temperature 0.8, top_p 0.95, repeat_last 64 */

/* Draw number i is a function of seed and i alone (Philox4x32-10). Sets the seed and starts at draw 0. */
void ltn_session_seed(struct ltn_session *session, uint64_t seed);

/* Leaves out so many draws. Forks of one session that leave out different multiples of LTN_FORK_DRAWS go on
 * independently of each other: number i of ltn-run --n-best leaves out i times as many. */
void ltn_session_skip(struct ltn_session *session, uint64_t draws);
#define LTN_FORK_DRAWS ((uint64_t)1 << 48)

/* Draws the next token from the logits of the last. It is not fed. */
enum ltn_status ltn_session_sample(struct ltn_session *session, const struct ltn_sampling *sampling,
                                   int32_t *id, struct ltn_error *err);

/* Receives each generated token with the text that it makes certain: whole UTF-8 characters, perhaps none.
 * The last call of a generation may have id -1 and brings text that was held back. text is [bytes], without
 * a closing 0, and "" where the model has no tokenizer. LTN_ERR_STOPPED ends the generation in good order,
 * any other failure at once. */
typedef enum ltn_status ltn_piece_fn(void *ctx, int32_t id, const char *text, size_t bytes,
                                     struct ltn_error *err);

/* Receives each token before it is fed, with the logits, [vocab_size], that it was drawn from: as the model
 * gave them, before penalties, bias and temperature. Anything but LTN_OK ends the generation, which returns
 * it. */
typedef enum ltn_status ltn_drawn_fn(void *ctx, int32_t id, const float *logits, struct ltn_error *err);

struct ltn_generate_options {
    const struct ltn_sampling *sampling; /* NULL: ltn_sampling_default */
    int64_t max_tokens;                  /* -1: until something else ends it */
    bool ignore_eos;                     /* treat the end token as any other */
    bool keep_open;          /* an unfinished character stays in the session instead of becoming U+FFFD */
    const char *const *stop; /* [n_stop] the text ends before the first of these strings; none is empty */
    size_t n_stop;
    ltn_piece_fn *piece; /* may be NULL */
    ltn_drawn_fn *drawn; /* may be NULL; called before piece, not for an end token that ends it */
    void *ctx;           /* of both */
};

enum ltn_end {
    LTN_END_LENGTH,  /* max_tokens */
    LTN_END_EOS,     /* the end token came; it is neither given out nor fed */
    LTN_END_STRING,  /* a stop string came; it is not given out */
    LTN_END_STOPPED, /* piece asked for it */
};

struct ltn_generated {
    int64_t n_tokens; /* given to piece */
    enum ltn_end end;
};

/* Continues the session's text. Text that may be the beginning of a stop string is held back until it is
 * known not to be. Together the pieces are decode(all tokens) less decode(those fed before). Calling it again
 * goes on with the same text. result may be NULL. */
enum ltn_status ltn_generate(struct ltn_session *session, const struct ltn_generate_options *options,
                             struct ltn_generated *result, struct ltn_error *err);

/* The same a token at a time, for those who have something to do in between, such as ltn_batch_step. The
 * options, which are borrowed, and the session are to outlive it; the session is to be used by nothing else
 * meanwhile. */
struct ltn_generation;
enum ltn_status ltn_generation_begin(struct ltn_generation **out, struct ltn_session *session,
                                     const struct ltn_generate_options *options, struct ltn_error *err);
/* Draws a token, feeds it and gives it out, or comes to the end. With *ended all text is given out, and it is
 * not to be called again. */
enum ltn_status ltn_generation_next(struct ltn_generation *generation, bool *ended, struct ltn_error *err);
/* Frees it, ended or not. generation and result may be NULL. */
void ltn_generation_end(struct ltn_generation *generation, struct ltn_generated *result);

#ifdef __GNUC__
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
#endif
