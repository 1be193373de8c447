/* The session file: a safetensors file (model/safetensors.h) that holds one timeline of one model. Its size
 * depends on the model alone.
 *
 * __metadata__ (all strings, exactly these keys):
 *   format    "ltn-session"
 *   version   "1"
 *   model     checksum of the model (model/checkpoint.h), 32 hexadecimal digits
 *   position  tokens seen, 19 decimal digits
 *   seed      of the draws, 20 decimal digits
 *   draw      number of the next draw, 20 decimal digits
 *   prefix    XXH3-128 of all tokens seen as src/prefix_cache.h computes it, 32 hexadecimal digits; zeros
 * where nobody computed it seal      XXH3-128 of the five values before it, with single spaces between
 *   checksum  XXH3-128 of the data
 * Tensors, in this order:
 *   state.0 ... state.(L-1)  F32 [h, d, e], the recurrent state of each layer; under LRPE 2d rows a head,
 * cosine rows first logits                   F32 [V] of the last token; zeros at position 0 recent I32
 * [LTN_RECENT_IDS], id number i of the timeline at i % LTN_RECENT_IDS, of the last so many; zeros where there
 * were none yet A session never waits amid a text or with tokens that the state has not seen, so this is all
 * of it.
 */
#ifndef LTN_SESSION_FILE_H
#define LTN_SESSION_FILE_H

#include "model/safetensors.h"
#include "src/session.h"

struct ltn_session_file {
    struct ltn_st_file file;
    const char *model; /* 32 hexadecimal digits */
    int64_t position;
    uint64_t seed, draw;
    const char *prefix; /* 32 hexadecimal digits */
    const char *checksum;
    int32_t n_layers;
    const struct ltn_st_tensor *state; /* [n_layers] without gaps between their data */
    const struct ltn_st_tensor *logits, *recent;
};

/* Opens a session file and checks its header, not its data. On failure *file is zero. */
enum ltn_status ltn_session_file_open(struct ltn_session_file *file, const char *path, struct ltn_error *err);
void ltn_session_file_close(struct ltn_session_file *file); /* a zeroed one is allowed */
/* Reads all of the data: its checksum must match. */
enum ltn_status ltn_session_file_verify(const struct ltn_session_file *file, struct ltn_error *err);

/* Bytes of the file that a session of this engine makes. */
enum ltn_status ltn_session_file_size(uint64_t *bytes, const struct ltn_engine *engine,
                                      struct ltn_error *err);
/* Can a session be saved there? To be asked before long work. */
enum ltn_status ltn_session_file_check(const char *path, struct ltn_error *err);

/* ltn_session_save and ltn_session_load of a prefix: its hash is written; hash and position are required.
 * NULL: a session like any other. */
enum ltn_status ltn_session_file_save(struct ltn_session *session, const char *path, const char *prefix,
                                      struct ltn_error *err);
enum ltn_status ltn_session_file_load(struct ltn_session *session, const char *path, const char *prefix,
                                      int64_t position, struct ltn_error *err);

#endif
