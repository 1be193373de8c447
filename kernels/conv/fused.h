/* Fused im2win on tensor cores: convolution without a workspace. The window order is built in shared memory.
 *
 * Shared memory holds a strip of the input as *planes* of 16-byte units (8 bf16 or 4 tf32 elements), one unit
 * for each *position*. The matrix units read eight rows of a 16-byte column as 128 contiguous bytes, at any
 * 16-byte offset, so the same plane serves every filter tap: a tap is a shift of the start address by whole
 * units. What a unit holds is chosen by shape:
 *
 *   channel order  V neighbouring channels of one input pixel. Pixels are kept apart by their phase, row mod
 * sh and column mod sw, so that neighbouring outputs are neighbouring positions; positions run through rows
 * and images of wq columns and hq rows, and tap (u,v) is the shift (u dh / sh) wq + v dw / sw in the plane of
 * phase (u dh mod sh, v dw mod sw). window order   V of the Hf*C elements (u, c) of one column of an output
 * row's window, as im2win has them: for few channels, where padding Hf*C to a multiple of V wastes far less
 * than padding C. exact          positions are outputs; the units of all taps are gathered. What nothing else
 * fits.
 *
 * The sum over (tap, unit) runs in steps of two units; which two, and the packed filter beside them, the
 * tables below say. The plan depends on the shape alone, never on the device, so results do not either. */
#ifndef LTN_CONV_FUSED_H
#define LTN_CONV_FUSED_H

#include "kernels/conv/conv.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    LTN_FUSED_LOADERS = 7 * 32, /* threads that load strips */
    LTN_FUSED_MAX_STEPS = 1024,
    LTN_FUSED_MAX_SLOTS = 16,
    LTN_FUSED_MAX_STAGES = 32,
    LTN_FUSED_FAR = 32767, /* a row offset that is outside of every image: the element is 0 */
};

enum ltn_fused_order { LTN_FUSED_CHANNEL, LTN_FUSED_WINDOW, LTN_FUSED_EXACT, LTN_FUSED_EXACT_LIST };

struct ltn_fused_plan {
    enum ltn_fused_order order;
    int unit;   /* V, elements in 16 bytes */
    int ho, wo; /* output rows and columns */
    int hq, wq; /* rows and columns of positions per image; outputs are those with row < ho, column < wo */
    int shift;  /* the largest shift of a tap, in positions */
    int phases; /* column phases kept: 0 .. phases-1 of sw */
    int rows;   /* channel order: row phases kept */
    int units;  /* units of one pixel, column or output */
    int block_units;   /* of those, in one strip */
    int blocks;        /* strips per tile: ceil(units / block_units) */
    int subplanes;     /* planes per column phase */
    int planes;        /* subplanes * phases */
    int load;          /* positions loaded per plane: tile_rows + shift */
    int stride;        /* units from plane to plane, >= load; odd multiples against bank conflicts */
    int steps;         /* per block, of two units */
    bool zero;         /* an odd number of units: the last step's second unit is a plane of zeros */
    bool vector;       /* units are fetched as 16 aligned bytes */
    int bn, mt, share; /* tile: share * mt * 64 positions by bn output channels, by `share` warpgroups */
    int tile_rows;
    int n_tiles;       /* tiles of output channels in a group */
    bool resident;     /* all packed filters stay in shared memory */
    int stage_steps;   /* steps per stage of packed filters */
    int loaders;       /* threads that fill a strip: all, or a warp, and then each warp another strip */
    int stages, slots; /* stages of filters and slots of strips in shared memory */
    int slot_bytes;
    size_t shared_bytes;
    int64_t fetch_entries;              /* of 2 ints */
    size_t at_steps, at_weights, bytes; /* in the packed filter: byte offsets, and all; fetch comes first */
};

/* Overrides for measuring; 0 or -1: the plan chooses. */
struct ltn_fused_choice {
    int mt, share, blocks, resident, order, loaders;
};

/* Decides how the problem is computed. choice may be NULL. */
enum ltn_status ltn_fused_choose(struct ltn_fused_plan *plan, const struct ltn_conv_shape *s,
                                 const struct ltn_fused_choice *choice, struct ltn_error *err);

/* Packs the filter, f32 [co][ci / groups][hf][wf], rounded to the shape's type, into plan->bytes of host
 * memory: fetch   [blocks][planes or subplanes][1 or unit][2]: element offset from the position's own
 * element, and dy << 16 | dx, that offset's rows and columns; one for each unit where plan->vector, planes
 * with their column phase; else one for each element of a subplane steps   [steps][2]: start in units from
 * the strip, distance of the second unit weights [groups][n_tiles][blocks][steps][2][bn][unit]: of channel
 * ltn_fused_channel(column), 0 beyond the last */
enum ltn_status ltn_fused_pack(const struct ltn_fused_plan *plan, const struct ltn_conv_shape *s,
                               const float *filter, void *packed, struct ltn_error *err);

/* Output channel, within the tile, of a column of the products. The matrix units give each thread columns 8 b
 * + 2 t and 8 b + 2 t + 1, t < 4; these channels make runs of 16 bytes of what a thread writes. unit: of the
 * plan. */
static inline int ltn_fused_channel(int column, int unit)
{
    int t = column >> 1 & 3, b = column >> 3, low = column & 1;
    return unit == 8 ? (b >> 2) * 32 + t * 8 + (b & 3) * 2 + low : (b >> 1) * 16 + t * 4 + (b & 1) * 2 + low;
}

#ifdef __cplusplus
}
#endif
#endif
