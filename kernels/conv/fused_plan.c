/* How the fused convolution is computed, by shape. Plain C: tests run the plan on the CPU. */
#include "kernels/conv/fused.h"
#include "kernels/dtype.h"

#include <stdlib.h>
#include <string.h>

enum {
    SHARED = 227 * 1024, /* of one block on sm_90 */
    FIXED = 1024,        /* barriers and alignment */
};

static int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

static size_t align_up(size_t n)
{
    return (n + 255) & ~(size_t)255;
}

/* Outputs are positions among others, and taps are shifts; else every position is an output. */
static bool is_flat(const struct ltn_fused_plan *plan)
{
    return plan->order == LTN_FUSED_CHANNEL || plan->order == LTN_FUSED_WINDOW;
}

static int group_channels(const struct ltn_conv_shape *s)
{
    return s->ci / s->groups;
}

/* Row phases in use, ascending; returns how many. Of phases[], [sh]. */
static int row_phases(const struct ltn_conv_shape *s, int *phases)
{
    int n = 0;
    for (int phase = 0; phase < s->sh; ++phase) {
        bool used = false;
        for (int u = 0; u < s->hf; ++u)
            used |= u * s->dh % s->sh == phase;
        if (used) {
            if (phases)
                phases[n] = phase;
            ++n;
        }
    }
    return n;
}

/* Everything that follows from the order of the sum alone. */
static void set_order(struct ltn_fused_plan *plan, const struct ltn_conv_shape *s, enum ltn_fused_order order)
{
    int cg = group_channels(s), v = plan->unit;
    int shift_x = 0, shift_y = 0;
    plan->order = order;
    plan->phases = 1;
    plan->rows = 1;
    if (is_flat(plan)) {
        shift_x = (s->wf - 1) * s->dw / s->sw;
        for (int k = 0; k < s->wf; ++k)
            if (k * s->dw % s->sw >= plan->phases)
                plan->phases = k * s->dw % s->sw + 1;
    }
    if (order == LTN_FUSED_CHANNEL) {
        shift_y = (s->hf - 1) * s->dh / s->sh;
        plan->rows = row_phases(s, NULL);
    }
    plan->wq = plan->wo + shift_x;
    plan->hq = plan->ho + shift_y;
    plan->shift = shift_y * plan->wq + shift_x;
    switch (order) {
    case LTN_FUSED_CHANNEL:
        plan->units = ceil_div(cg, v);
        break;
    case LTN_FUSED_WINDOW:
        plan->units = ceil_div(cg * s->hf, v);
        break;
    case LTN_FUSED_EXACT:
        plan->units = ceil_div(cg, v) * s->hf * s->wf;
        break;
    case LTN_FUSED_EXACT_LIST:
        plan->units = ceil_div(cg * s->hf * s->wf, v);
        break;
    }
    plan->vector =
        s->layout == LTN_NHWC && cg % v == 0 && (order == LTN_FUSED_CHANNEL || order == LTN_FUSED_EXACT);
}

/* Taps that one strip serves. */
static int taps(const struct ltn_fused_plan *plan, const struct ltn_conv_shape *s)
{
    return plan->order == LTN_FUSED_CHANNEL ? s->hf * s->wf : plan->order == LTN_FUSED_WINDOW ? s->wf : 1;
}

/* Distance of planes such that eight neighbouring threads of the loader write to different banks. */
static int plane_stride(const struct ltn_fused_plan *plan)
{
    int best = plan->load;
    for (int stride = plan->load; stride < plan->load + 8; ++stride) {
        int unit = plan->vector ? stride : plan->subplanes * stride; /* from the first thread to the next */
        int lanes = plan->vector ? plan->planes : plan->phases;      /* threads until the next position */
        bool taken[8] = {false}, clash = false;
        for (int i = 0; i < 8; ++i) {
            int bank = (i % lanes * unit + i / lanes) & 7;
            clash |= taken[bank];
            taken[bank] = true;
        }
        if (!clash)
            return stride;
        if (stride % 2 == 1 && best == plan->load)
            best = stride;
    }
    return best;
}

/* Sizes for a tile and a number of blocks. False: does not fit. */
static bool set_tile(struct ltn_fused_plan *plan, const struct ltn_conv_shape *s, int mt, int share,
                     int block_units, bool resident, int loaders)
{
    plan->mt = mt;
    plan->share = share;
    plan->tile_rows = 64 * mt * share;
    plan->block_units = block_units;
    plan->blocks = ceil_div(plan->units, block_units);
    plan->subplanes = plan->rows * block_units;
    plan->planes = plan->subplanes * plan->phases;
    plan->load = plan->tile_rows + plan->shift;
    plan->stride = plane_stride(plan);
    int pairs = taps(plan, s) * block_units;
    plan->zero = pairs % 2 != 0;
    plan->steps = ceil_div(pairs, 2);
    plan->resident = resident;
    plan->loaders = loaders;
    int64_t slot = ((int64_t)plan->planes * plan->stride + (plan->zero ? plan->tile_rows : 0)) * 16;
    int64_t step_bytes = plan->bn * 32;
    if ((plan->vector ? plan->planes : plan->phases) > loaders || plan->steps > LTN_FUSED_MAX_STEPS ||
        slot > SHARED || (share == 1 && (plan->blocks > 1 || !resident)))
        return false;
    plan->slot_bytes = (int)slot;
    int64_t weights;
    if (resident) {
        if (plan->n_tiles * s->groups > 1)
            return false;
        weights = plan->blocks * (int64_t)plan->steps * step_bytes;
        plan->stage_steps = 8;
        while (plan->blocks * ceil_div(plan->steps, plan->stage_steps) > LTN_FUSED_MAX_STAGES &&
               plan->stage_steps < plan->steps)
            plan->stage_steps *= 2;
        plan->stages = plan->blocks * ceil_div(plan->steps, plan->stage_steps);
        if (plan->stages > LTN_FUSED_MAX_STAGES)
            return false;
    } else {
        plan->stage_steps = plan->bn == 32 ? 8 : 4;
        if (plan->stage_steps > plan->steps)
            plan->stage_steps = plan->steps;
        plan->stages = 3;
        weights = plan->stages * (int64_t)plan->stage_steps * step_bytes;
    }
    int64_t left = SHARED - FIXED - (int64_t)align_up(plan->steps * 8u) - weights;
    int64_t slots = left / slot;
    if (left < 0 || slots < 2)
        return false;
    plan->slots = slots > LTN_FUSED_MAX_SLOTS ? LTN_FUSED_MAX_SLOTS : (int)slots;
    if (loaders <
        LTN_FUSED_LOADERS) { /* a slot belongs to one warp, and to one warpgroup where those take turns */
        int whole = LTN_FUSED_LOADERS / loaders * 2;
        if (plan->slots < whole)
            return false;
        plan->slots = plan->slots / whole * whole;
    }
    if (!resident) { /* what is left makes the ring of filters deeper */
        if (plan->slots > 4 && loaders == LTN_FUSED_LOADERS)
            plan->slots = 4;
        int64_t more = (left - plan->slots * slot) / (plan->stage_steps * step_bytes);
        plan->stages += (int)(more > 13 ? 13 : more);
        weights = plan->stages * (int64_t)plan->stage_steps * step_bytes;
    }
    plan->shared_bytes =
        FIXED + align_up(plan->steps * 8u) + (size_t)weights + (size_t)plan->slots * plan->slot_bytes;
    return true;
}

/* Estimated cycles per position: the slowest of matrix units, shared memory, L2, loading threads and memory
 * (of one of 132 multiprocessors); and what lies between tiles. The constants are of an H100, and the choice
 * is the same everywhere. */
static double cost(const struct ltn_fused_plan *plan)
{
    double rows = plan->tile_rows, steps = (double)plan->steps * plan->blocks, products = steps * rows / 64;
    double strip = (double)plan->planes * plan->load; /* units */
    double fetched = strip * plan->blocks;
    double weights = plan->resident ? 0 : steps * plan->bn * 32;
    double sector = plan->vector && plan->block_units == 1 ? 2 : 1; /* half a sector at a time */
    double write = rows * plan->bn * (plan->unit == 8 ? 2 : 4) / 13;
    double passes = (double)ceil_div(plan->phases * plan->load, plan->loaders) * ceil_div(plan->subplanes, 2);
    double most = products * plan->bn / 2, gap = 500;
    double others[] = {
        (products * (2048 + plan->bn * 32) + fetched * 16 + weights) / 128,
        (fetched * 16 * sector + weights) / 24,
        /* elements: each pass waits for memory */
        plan->vector ? fetched * (plan->unit == 8 ? 0.6 : 1.0)
                     : (700 + (plan->order == LTN_FUSED_CHANNEL ? 1800 : 1550) * passes) * plan->blocks *
                           (plan->loaders == 32 ? 1.2 / 7 : 1),
        plan->share == 1 ? write : 0,
    };
    for (int i = 0; i < 4; ++i)
        most = others[i] > most ? others[i] : most;
    if (plan->vector) /* strips come late where few are under way, and tf32's do not come by themselves */
        gap += strip * 16 / 24 / plan->slots + (plan->unit == 8 ? 100 : 700) * plan->blocks;
    if (plan->share == 2)
        gap += write / 4;
    return (most + gap) / rows;
}

static bool wanted(int choice, int value, int any)
{
    return choice == any || choice == value;
}

/* Tries every tile for the plan's order, and keeps in *best what costs less per output than *least; *least <
 * 0: anything.
 */
static void try_tiles(struct ltn_fused_plan *best, double *least, const struct ltn_fused_plan *plan,
                      const struct ltn_conv_shape *s, const struct ltn_fused_choice *ch)
{
    double waste = (double)plan->hq * plan->wq / ((double)plan->ho * plan->wo);
    int most_mt = plan->bn == 64 ? 3 : 2;
    for (int i = 0; i < most_mt * 8; ++i) {
        int mt = i / 8 + 1, share = i / 4 % 2 + 1, resident = i / 2 % 2;
        int loaders = i % 2 ? LTN_FUSED_LOADERS : 32;
        if (!wanted(ch->mt, mt, 0) || !wanted(ch->share, share, 0) || !wanted(ch->resident, resident, -1) ||
            !wanted(ch->loaders, loaders, 0) || (plan->vector && loaders == 32))
            continue;
        for (int blocks = 1, last = 0; blocks <= plan->units; blocks += 1 + blocks / 8) {
            struct ltn_fused_plan now = *plan;
            int units = ceil_div(plan->units, blocks);
            if (!is_flat(plan))
                units = units < 16 ? (units + 1) / 2 * 2 : 16;
            if (units == last || !wanted(ch->blocks, ceil_div(plan->units, units), 0))
                continue;
            last = units;
            if (!set_tile(&now, s, mt, share, units, resident, loaders))
                continue;
            double c = cost(&now) * waste;
            if (*least < 0 || c < *least) {
                *best = now;
                *least = c;
            }
        }
    }
}

enum ltn_status ltn_fused_choose(struct ltn_fused_plan *plan, const struct ltn_conv_shape *s,
                                 const struct ltn_fused_choice *choice, struct ltn_error *err)
{
    int cg = group_channels(s), cog = s->co / s->groups;
    memset(plan, 0, sizeof *plan);
    /* offsets within an image are 32 bits, those of rows and columns 15 */
    double rows = (double)s->hi + s->pt + s->pb, columns = (double)s->wi + s->pl + s->pr;
    if (s->type == LTN_CONV_F32 || rows >= LTN_FUSED_FAR || columns >= LTN_FUSED_FAR ||
        rows * columns * s->ci > INT32_MAX || (double)cg * s->hf * s->wf > INT32_MAX / 8)
        return ltn_fail(
            err, LTN_ERR_UNSUPPORTED,
            "convolution: fused im2win is for tf32 and bf16, rows and columns of fewer than %d elements, and "
            "images of fewer than 2^31",
            LTN_FUSED_FAR);
    plan->unit = s->type == LTN_CONV_BF16 ? 8 : 4;
    plan->ho = ltn_conv_ho(s);
    plan->wo = ltn_conv_wo(s);
    plan->bn = cog <= 32                                           ? 32
               : cog <= 64                                         ? 64
               : cog <= 96                                         ? 96
               : ceil_div(cog, 96) * 96 < ceil_div(cog, 128) * 128 ? 96
                                                                   : 128;
    plan->n_tiles = ceil_div(cog, plan->bn);

    const struct ltn_fused_choice any = {.resident = -1, .order = -1};
    double least = -1;
    if (!choice)
        choice = &any;
    for (int order = LTN_FUSED_CHANNEL; order <= LTN_FUSED_WINDOW; ++order) {
        struct ltn_fused_plan now = *plan;
        set_order(&now, s, (enum ltn_fused_order)order);
        bool wasteful = (double)now.hq * now.wq > 2.5 * now.ho * now.wo;
        if (!wasteful && wanted(choice->order, order, -1))
            try_tiles(plan, &least, &now, s, choice);
    }
    if (least < 0) {
        struct ltn_fused_plan now = *plan;
        set_order(&now, s, cg % plan->unit == 0 ? LTN_FUSED_EXACT : LTN_FUSED_EXACT_LIST);
        try_tiles(plan, &least, &now, s, &any);
    }
    if (least < 0)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED,
                        "convolution: no fused plan for %d x %d x %d, filter %d x %d", s->ci, s->hi, s->wi,
                        s->hf, s->wf);
    plan->fetch_entries =
        (int64_t)plan->blocks * (plan->vector ? plan->planes : plan->subplanes * plan->unit);
    plan->at_steps = align_up((size_t)plan->fetch_entries * 8);
    plan->at_weights = plan->at_steps + align_up((size_t)plan->steps * 8);
    plan->bytes =
        plan->at_weights + (size_t)s->groups * plan->n_tiles * plan->blocks * plan->steps * plan->bn * 32;
    return LTN_OK;
}

/* One unit of the sum: where it lies in the strip, and what it is. */
struct pair {
    int at;      /* units from the strip's start */
    int u, v, j; /* tap; unit in the block */
};

static int by_place(const void *a, const void *b)
{
    const struct pair *x = a, *y = b;
    return x->at < y->at ? -1 : x->at > y->at;
}

/* Element i of unit j of block b: its row, column and channel, or false: zero. (u, v): the tap, where the
 * strip serves several. */
static bool element(const struct ltn_fused_plan *plan, const struct ltn_conv_shape *s, int b, int j, int i,
                    int *u, int *v, int *c)
{
    int cg = group_channels(s), at = b * plan->block_units + j, per = ceil_div(cg, plan->unit),
        e = at * plan->unit + i;
    switch (plan->order) {
    case LTN_FUSED_CHANNEL:
        *c = e;
        return e < cg;
    case LTN_FUSED_WINDOW:
        *u = e / cg;
        *c = e % cg;
        return *u < s->hf;
    case LTN_FUSED_EXACT:
        *u = at / per / s->wf;
        *v = at / per % s->wf;
        *c = at % per * plan->unit + i;
        return *u < s->hf && *c < cg;
    case LTN_FUSED_EXACT_LIST:
        *v = e / (s->hf * cg);
        *u = e / cg % s->hf;
        *c = e % cg;
        return *v < s->wf;
    }
    return false;
}

static void fill_fetch(const struct ltn_fused_plan *plan, const struct ltn_conv_shape *s, const int *phases,
                       int32_t (*out)[2])
{
    bool nhwc = s->layout == LTN_NHWC;
    int y_pitch = nhwc ? s->wi * s->ci : s->wi, x_pitch = nhwc ? s->ci : 1,
        c_pitch = nhwc ? 1 : s->hi * s->wi;
    int planes = plan->vector ? plan->planes : plan->subplanes, n = plan->vector ? 1 : plan->unit;
    for (int b = 0; b < plan->blocks; ++b)
        for (int k = 0; k < planes; ++k)
            for (int i = 0; i < n; ++i, ++out) {
                int u = 0, v = 0, c = 0, sub = k % plan->subplanes;
                bool valid = element(plan, s, b, sub % plan->block_units, i, &u, &v, &c);
                int dy = plan->order == LTN_FUSED_CHANNEL ? phases[sub / plan->block_units] : u * s->dh;
                int dx = k / plan->subplanes + v * s->dw;
                (*out)[0] = valid ? dy * y_pitch + dx * x_pitch + c * c_pitch : 0;
                (*out)[1] = valid ? dy << 16 | dx : LTN_FUSED_FAR << 16;
            }
}

/* The units of a block in the order of the sum; returns how many, 2 * steps. */
static int order_pairs(const struct ltn_fused_plan *plan, const struct ltn_conv_shape *s, const int *phases,
                       struct pair *pairs)
{
    int n = 0, n_u = plan->order == LTN_FUSED_CHANNEL ? s->hf : 1, n_v = is_flat(plan) ? s->wf : 1;
    for (int u = 0; u < n_u; ++u) {
        int row = 0; /* of the row phases in use, the tap's */
        while (plan->order == LTN_FUSED_CHANNEL && phases[row] != u * s->dh % s->sh)
            ++row;
        for (int v = 0; v < n_v; ++v)
            for (int j = 0; j < plan->block_units; ++j) {
                int plane = v * s->dw % s->sw * plan->subplanes + row * plan->block_units + j;
                int shift = u * s->dh / s->sh * plan->wq + v * s->dw / s->sw;
                pairs[n++] = (struct pair){plane * plan->stride + shift, u, v, j};
            }
    }
    qsort(pairs, (size_t)n, sizeof *pairs, by_place);
    if (plan->zero)
        pairs[n++] = (struct pair){plan->planes * plan->stride, 0, 0, -1};
    return n;
}

static void fill_weights(const struct ltn_fused_plan *plan, const struct ltn_conv_shape *s,
                         const struct pair *pairs, const float *filter, char *out)
{
    int cog = s->co / s->groups, size = s->ci / s->groups * s->hf * s->wf;
    uint16_t *halves = (uint16_t *)out;
    float *words = (float *)out;
    for (int tile = 0; tile < s->groups * plan->n_tiles; ++tile)
        for (int b = 0; b < plan->blocks; ++b)
            for (int k = 0; k < 2 * plan->steps; ++k)
                for (int column = 0; column < plan->bn; ++column)
                    for (int i = 0; i < plan->unit; ++i) {
                        int o = tile % plan->n_tiles * plan->bn + ltn_fused_channel(column, plan->unit);
                        int u = pairs[k].u, v = pairs[k].v, c = 0;
                        float value = 0;
                        if (o < cog && pairs[k].j >= 0 && element(plan, s, b, pairs[k].j, i, &u, &v, &c))
                            value = filter[((int64_t)(tile / plan->n_tiles) * cog + o) * size +
                                           (c * s->hf + u) * s->wf + v];
                        if (plan->unit == 8)
                            *halves++ = ltn_f32_to_bf16(value);
                        else
                            *words++ = ltn_round_tf32(value);
                    }
}

enum ltn_status ltn_fused_pack(const struct ltn_fused_plan *plan, const struct ltn_conv_shape *s,
                               const float *filter, void *packed, struct ltn_error *err)
{
    char *out = packed;
    int32_t(*steps)[2] = (void *)(out + plan->at_steps);
    struct pair *pairs = malloc((size_t)plan->steps * 2 * sizeof *pairs);
    int *phases = malloc((size_t)s->sh * sizeof *phases);
    if (!pairs || !phases) {
        free(pairs);
        free(phases);
        return ltn_fail(err, LTN_ERR_MEMORY, "convolution: no memory to pack the filter");
    }
    memset(out, 0, plan->at_weights);
    row_phases(s, phases);
    fill_fetch(plan, s, phases, (void *)out);
    order_pairs(plan, s, phases, pairs);
    for (int k = 0; k < plan->steps; ++k) {
        steps[k][0] = pairs[2 * k].at;
        steps[k][1] = pairs[2 * k + 1].at - pairs[2 * k].at;
    }
    fill_weights(plan, s, pairs, filter, out + plan->at_weights);
    free(pairs);
    free(phases);
    return LTN_OK;
}
