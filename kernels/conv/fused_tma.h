/* Fused im2win with strips that the copy engine (TMA) brings, for NHWC and whole steps of channels.
 *
 * Positions run through output rows of wq columns and images of ho rows. A *strip* holds 128 bytes of
 * channels of so many positions in a row, for one row u of the filter: what im2win unrolls. In shared memory,
 * position after position, swizzled, it serves each of its *taps* v as a shift of the start by whole
 * positions, and the windows of neighbouring outputs overlap there as in im2win's tensor. Columns of a stride
 * are kept apart by their phase, a strip each. Where the columns that rows waste for that (wq - wo) cost more
 * than the copies, each tap has a strip of its own, of outputs alone (wq = wo).
 *
 * The sum runs over strips, taps, channels in the order of struct ltn_tma_strips; it and the plan depend on
 * the shape alone. */
#ifndef LTN_CONV_FUSED_TMA_H
#define LTN_CONV_FUSED_TMA_H

#include "kernels/conv/conv.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    LTN_TMA_LINE = 128, /* bytes of channels of a position in a strip */
    LTN_TMA_STEP = 32,  /* of those in one product */
    LTN_TMA_MAX_PHASES = 16,
    LTN_TMA_MAX_SLOTS = 8,
    LTN_TMA_MAX_STAGES = 32,
};

/* Strips of one tile, in the order of the sum: for each line of channels, each row u of the filter, each
 * phase. Tap t of a strip begins `shift + t * apart` positions on. */
struct ltn_tma_strips {
    int32_t lines, rows, phases;
    int32_t line, down; /* elements of a line; input rows from one u to the next */
    int32_t last_steps; /* products of a tap in the last line; in the others 4 */
    int32_t apart;
    struct {
        int32_t x, taps, shift; /* x: columns from the position's own element */
    } phase[LTN_TMA_MAX_PHASES];
};

struct ltn_tma_plan {
    int unit;            /* elements in 16 bytes */
    int ho, wo, wq;      /* output rows and columns; columns of positions */
    bool overlap;        /* taps of a row share a strip */
    int bn, mt, n_tiles; /* a tile is mt * 64 positions by bn output channels; such tiles in a group */
    struct ltn_tma_strips strips;
    int n_strips, taps; /* of one tile */
    int load;           /* positions of a strip: a tile's and the largest shift */
    bool resident;      /* all filters stay in shared memory */
    int slots, stages;  /* strips and taps of filters in shared memory */
    int slot_bytes, stage_bytes;
    int at_stages, at_barriers, shared_bytes; /* from a base that is a multiple of 1,024 */
    size_t bytes;                             /* of the packed filter */
};

/* Overrides for measuring; 0 or -1: the plan chooses. */
struct ltn_tma_choice {
    int mt, overlap;
};

/* Decides how the shape is computed; choice may be NULL. LTN_ERR_UNSUPPORTED: not this way. */
enum ltn_status ltn_tma_choose(struct ltn_tma_plan *plan, const struct ltn_conv_shape *s,
                               const struct ltn_tma_choice *choice, struct ltn_error *err);

/* Corners of the box of first pixels, as tensor maps want them: {lower x, y, upper x, y}. */
void ltn_tma_corners(const struct ltn_tma_plan *plan, const struct ltn_conv_shape *s, int corners[4]);

/* Packs the filter, f32 [co][ci / groups][hf][wf], rounded to the shape's type, into plan->bytes of host
 * memory: [groups][n_tiles][taps][bn][128 bytes], row r of channel ltn_fused_channel(r), its 16-byte column c
 * at c ^ (r & 7), zeros beyond the last channel. */
void ltn_tma_pack(const struct ltn_tma_plan *plan, const struct ltn_conv_shape *s, const float *filter,
                  void *packed);

#ifdef __cplusplus
}
#endif
#endif
