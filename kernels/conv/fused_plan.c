/* How the fused convolution is computed, by shape. Plain C: tests run the plan on the CPU. */
#include "kernels/conv/fused.h"

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

static int group_channels(const struct fused_problem *p)
{
    return p->ci / p->groups;
}

/* Row phases in use, ascending; returns how many. Of phases[], [sh]. */
static int row_phases(const struct fused_problem *p, int *phases)
{
    int n = 0;
    for (int phase = 0; phase < p->sh; ++phase) {
        bool used = false;
        for (int u = 0; u < p->hf; ++u)
            used |= u * p->dh % p->sh == phase;
        if (used) {
            if (phases)
                phases[n] = phase;
            ++n;
        }
    }
    return n;
}

/* Everything that follows from the order of the sum alone. */
static void set_order(struct ltn_fused_plan *plan, const struct fused_problem *p, enum ltn_fused_order order)
{
    int cg = group_channels(p), v = plan->unit;
    bool flat = order == LTN_FUSED_CHANNEL || order == LTN_FUSED_WINDOW;
    int shift_x = 0, shift_y = 0;
    plan->order = order;
    plan->phases = 1;
    plan->rows = 1;
    if (flat) {
        shift_x = (p->wf - 1) * p->dw / p->sw;
        for (int k = 0; k < p->wf; ++k)
            if (k * p->dw % p->sw >= plan->phases)
                plan->phases = k * p->dw % p->sw + 1;
    }
    if (order == LTN_FUSED_CHANNEL) {
        shift_y = (p->hf - 1) * p->dh / p->sh;
        plan->rows = row_phases(p, NULL);
    }
    plan->wq = plan->wo + shift_x;
    plan->hq = plan->ho + shift_y;
    plan->shift = shift_y * plan->wq + shift_x;
    switch (order) {
    case LTN_FUSED_CHANNEL:
        plan->units = ceil_div(cg, v);
        break;
    case LTN_FUSED_WINDOW:
        plan->units = ceil_div(cg * p->hf, v);
        break;
    case LTN_FUSED_EXACT:
        plan->units = ceil_div(cg, v) * p->hf * p->wf;
        break;
    case LTN_FUSED_EXACT_LIST:
        plan->units = ceil_div(cg * p->hf * p->wf, v);
        break;
    }
    plan->vector = p->nhwc && cg % v == 0 && (order == LTN_FUSED_CHANNEL || order == LTN_FUSED_EXACT);
}

/* Taps that one strip serves. */
static int taps(const struct ltn_fused_plan *plan, const struct fused_problem *p)
{
    return plan->order == LTN_FUSED_CHANNEL ? p->hf * p->wf : plan->order == LTN_FUSED_WINDOW ? p->wf : 1;
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
static bool set_tile(struct ltn_fused_plan *plan, const struct fused_problem *p, int mt, int share, int block_units,
                     bool resident)
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
    int pairs = taps(plan, p) * block_units;
    plan->zero = pairs % 2 != 0;
    plan->steps = ceil_div(pairs, 2);
    plan->resident = resident;
    int64_t slot = ((int64_t)plan->planes * plan->stride + (plan->zero ? plan->tile_rows : 0)) * 16;
    int64_t step_bytes = plan->bn * 32;
    if (plan->steps > LTN_FUSED_MAX_STEPS || slot > SHARED || (share == 1 && (plan->blocks > 1 || !resident)))
        return false;
    plan->slot_bytes = (int)slot;
    int64_t weights;
    if (resident) {
        if (plan->n_tiles * p->groups > 1)
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
        plan->stage_steps = 12288 / (int)step_bytes;
        if (plan->stage_steps > plan->steps)
            plan->stage_steps = plan->steps;
        plan->stages = 4;
        weights = plan->stages * (int64_t)plan->stage_steps * step_bytes;
    }
    int64_t left = SHARED - FIXED - (int64_t)align_up(plan->steps * 8u) - weights;
    int64_t slots = left / slot;
    if (left < 0 || slots < 2)
        return false;
    plan->slots = slots > LTN_FUSED_MAX_SLOTS ? LTN_FUSED_MAX_SLOTS : (int)slots;
    if (!resident) { /* what is left makes the ring of filters deeper */
        if (plan->slots > 4)
            plan->slots = 4;
        int64_t more = (left - plan->slots * slot) / (plan->stage_steps * step_bytes);
        plan->stages += (int)(more > 4 ? 4 : more);
        weights = plan->stages * (int64_t)plan->stage_steps * step_bytes;
    }
    plan->shared_bytes =
        FIXED + align_up(plan->steps * 8u) + (size_t)weights + (size_t)plan->slots * plan->slot_bytes;
    return true;
}

/* Estimated cycles per position: the slowest of matrix units, shared memory, L2 and loader threads; the writing of
 * outputs comes on top where both warpgroups do it at once. */
static double cost(const struct ltn_fused_plan *plan)
{
    double rows = plan->tile_rows, steps = (double)plan->steps * plan->blocks;
    double products = steps * rows / 64;
    double fetched = (double)plan->planes * plan->load * plan->blocks; /* units */
    double weights = plan->resident ? 0 : steps * plan->bn * 32;
    double matrix = products * plan->bn / 2;
    double shared = (products * (2048 + plan->bn * 32) + fetched * 16 + weights) / 128;
    double sector = plan->vector && plan->block_units == 1 ? 2 : 1; /* half a sector at a time */
    double l2 = (fetched * 16 * sector + weights) / 24;
    double rounds = plan->vector ? ceil_div(plan->planes * plan->load, 4 * LTN_FUSED_LOADERS)
                                 : ceil_div(plan->phases * plan->load, LTN_FUSED_LOADERS) * ceil_div(plan->subplanes, 2);
    double loader = (rounds * 700 + 200) * plan->blocks; /* each waits for memory once */
    double write = rows * plan->bn * (plan->unit == 8 ? 2 : 4) / 24;
    double most = matrix;
    most = shared > most ? shared : most;
    most = l2 > most ? l2 : most;
    most = loader > most ? loader : most;
    if (plan->share == 1)
        return (write > most ? write : most) / rows;
    return (most + 500 + write / 2) / rows;
}

static bool best_tile(struct ltn_fused_plan *plan, const struct fused_problem *p, const struct ltn_fused_choice *ch)
{
    struct ltn_fused_plan best = {0}, now;
    double least = 0;
    int most_mt = plan->bn == 64 ? 3 : 2;
    bool flat = plan->order == LTN_FUSED_CHANNEL || plan->order == LTN_FUSED_WINDOW;
    for (int mt = 1; mt <= most_mt; ++mt)
        for (int share = 1; share <= 2; ++share)
            for (int resident = 0; resident <= 1; ++resident)
                for (int blocks = 1, last = 0; blocks <= plan->units; blocks += 1 + blocks / 8) {
                    int units = ceil_div(plan->units, blocks);
                    if (!flat)
                        units = units < 16 ? (units + 1) / 2 * 2 : 16;
                    if (units == last)
                        continue;
                    last = units;
                    now = *plan;
                    if ((ch && ch->mt > 0 && ch->mt != mt) || (ch && ch->share > 0 && ch->share != share) ||
                        (ch && ch->resident >= 0 && ch->resident != resident) ||
                        (ch && ch->blocks > 0 && ch->blocks != ceil_div(plan->units, units)) ||
                        !set_tile(&now, p, mt, share, units, resident))
                        continue;
                    double c = cost(&now);
                    if (!best.steps || c < least) {
                        best = now;
                        least = c;
                    }
                }
    if (best.steps)
        *plan = best;
    return best.steps > 0;
}

enum ltn_status ltn_fused_choose(struct ltn_fused_plan *plan, const struct fused_problem *p,
                               const struct ltn_fused_choice *choice, struct ltn_error *err)
{
    int cg = group_channels(p), cog = p->co / p->groups;
    memset(plan, 0, sizeof *plan);
    plan->unit = p->bf16 ? 8 : 4;
    plan->ho = (p->hi + p->pt + p->pb - p->dh * (p->hf - 1) - 1) / p->sh + 1;
    plan->wo = (p->wi + p->pl + p->pr - p->dw * (p->wf - 1) - 1) / p->sw + 1;
    plan->bn = cog <= 32 ? 32 : cog <= 64 ? 64 : cog <= 96 ? 96 : ceil_div(cog, 96) * 96 < ceil_div(cog, 128) * 128 ? 96 : 128;
    plan->n_tiles = ceil_div(cog, plan->bn);

    /* The order with fewer products; a window order only where it saves much, as it loads rows Hf/sh times. */
    int64_t by_channel = (int64_t)ceil_div(cg, plan->unit) * p->hf * p->wf;
    int64_t by_window = (int64_t)ceil_div(cg * p->hf, plan->unit) * p->wf;
    enum ltn_fused_order order = 10 * by_channel >= 13 * by_window ? LTN_FUSED_WINDOW : LTN_FUSED_CHANNEL;
    if (choice && choice->order >= 0)
        order = (enum ltn_fused_order)choice->order;
    set_order(plan, p, order);
    double waste = (double)plan->hq * plan->wq / ((double)plan->ho * plan->wo);
    bool found = waste <= 2.5 && best_tile(plan, p, choice);
    if (!found) {
        set_order(plan, p, cg % plan->unit == 0 ? LTN_FUSED_EXACT : LTN_FUSED_EXACT_LIST);
        found = best_tile(plan, p, NULL);
    }
    if (!found)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "convolution: no fused plan for %d x %d x %d, filter %d x %d", p->ci,
                        p->hi, p->wi, p->hf, p->wf);
    plan->fetch_entries =
        (int64_t)plan->blocks * (plan->vector ? plan->planes : plan->subplanes * plan->unit);
    plan->at_fetch = 0;
    plan->at_steps = align_up((size_t)plan->fetch_entries * 16);
    plan->at_map = plan->at_steps + align_up((size_t)plan->steps * 8);
    plan->at_weights = plan->at_map + align_up((size_t)plan->blocks * plan->steps * 2 * plan->unit * 4);
    plan->bytes = plan->at_weights + (size_t)p->groups * plan->n_tiles * plan->blocks * plan->steps * plan->bn * 32;
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

/* Element i of unit j of block b: its row, column and channel, or false: zero. (u, v): the tap, where the strip serves
 * several. */
static bool element(const struct ltn_fused_plan *plan, const struct fused_problem *p, int b, int j, int i, int *u, int *v,
                    int *c)
{
    int cg = group_channels(p), at = b * plan->block_units + j, per = ceil_div(cg, plan->unit), e = at * plan->unit + i;
    switch (plan->order) {
    case LTN_FUSED_CHANNEL:
        *c = e;
        return e < cg;
    case LTN_FUSED_WINDOW:
        *u = e / cg;
        *c = e % cg;
        return *u < p->hf;
    case LTN_FUSED_EXACT:
        *u = at / per / p->wf;
        *v = at / per % p->wf;
        *c = at % per * plan->unit + i;
        return *u < p->hf && *c < cg;
    case LTN_FUSED_EXACT_LIST:
        *v = e / (p->hf * cg);
        *u = e / cg % p->hf;
        *c = e % cg;
        return *v < p->wf;
    }
    return false;
}

static void fill_fetch(const struct ltn_fused_plan *plan, const struct fused_problem *p, int32_t (*out)[4])
{
    int *phases = NULL, one = 0;
    int y_pitch = p->nhwc ? p->wi * p->ci : p->wi, x_pitch = p->nhwc ? p->ci : 1, c_pitch = p->nhwc ? 1 : p->hi * p->wi;
    phases = plan->order == LTN_FUSED_CHANNEL ? malloc((size_t)p->sh * sizeof *phases) : &one;
    if (plan->order == LTN_FUSED_CHANNEL)
        row_phases(p, phases);
    int n_planes = plan->vector ? plan->planes : plan->subplanes, n = plan->vector ? 1 : plan->unit;
    for (int b = 0; b < plan->blocks; ++b)
        for (int k = 0; k < n_planes; ++k)
            for (int i = 0; i < n; ++i, ++out) {
                int u = 0, v = 0, c = 0, sub = k % plan->subplanes;
                int dy = phases[sub / plan->block_units], dx = k / plan->subplanes;
                bool valid = element(plan, p, b, sub % plan->block_units, i, &u, &v, &c);
                if (plan->order != LTN_FUSED_CHANNEL)
                    dy = u * p->dh;
                if (plan->order == LTN_FUSED_EXACT || plan->order == LTN_FUSED_EXACT_LIST)
                    dx = v * p->dw;
                (*out)[0] = valid ? dy : LTN_FUSED_FAR;
                (*out)[1] = valid ? dx : 0;
                (*out)[2] = valid ? dy * y_pitch + dx * x_pitch + c * c_pitch : 0;
                (*out)[3] = 0;
            }
    if (phases != &one)
        free(phases);
}

void ltn_fused_tables(const struct ltn_fused_plan *plan, const struct fused_problem *p, void *tables)
{
    char *base = tables;
    int32_t(*steps)[2] = (void *)(base + plan->at_steps);
    int32_t *map = (void *)(base + plan->at_map);
    memset(tables, 0, plan->at_weights);
    fill_fetch(plan, p, (void *)(base + plan->at_fetch));

    int n = 0, total = taps(plan, p) * plan->block_units;
    struct pair *pairs = malloc((size_t)(total + 1) * sizeof *pairs);
    bool flat = plan->order == LTN_FUSED_CHANNEL || plan->order == LTN_FUSED_WINDOW;
    int n_u = plan->order == LTN_FUSED_CHANNEL ? p->hf : 1, n_v = flat ? p->wf : 1;
    for (int u = 0; u < n_u; ++u) {
        int row = 0; /* index of the tap's row phase among those in use */
        for (int phase = 0; phase < u * p->dh % p->sh; ++phase)
            for (int k = 0; k < p->hf; ++k)
                if (k * p->dh % p->sh == phase) {
                    ++row;
                    break;
                }
        for (int v = 0; v < n_v; ++v)
            for (int j = 0; j < plan->block_units; ++j) {
                int phase = flat ? v * p->dw % p->sw : 0;
                int plane = phase * plan->subplanes + row * plan->block_units + j;
                int shift = (u * p->dh / p->sh) * plan->wq + (flat ? v * p->dw / p->sw : 0);
                pairs[n++] = (struct pair){plane * plan->stride + shift, u, v, j};
            }
    }
    qsort(pairs, (size_t)n, sizeof *pairs, by_place);
    if (plan->zero)
        pairs[n++] = (struct pair){plan->planes * plan->stride, 0, 0, -1};
    for (int s = 0; s < plan->steps; ++s) {
        steps[s][0] = pairs[2 * s].at;
        steps[s][1] = pairs[2 * s + 1].at - pairs[2 * s].at;
    }
    for (int b = 0; b < plan->blocks; ++b)
        for (int k = 0; k < n; ++k)
            for (int i = 0; i < plan->unit; ++i, ++map) {
                int u = pairs[k].u, v = pairs[k].v, c = 0;
                bool valid = pairs[k].j >= 0 && element(plan, p, b, pairs[k].j, i, &u, &v, &c);
                *map = valid ? (c * p->hf + u) * p->wf + v : -1;
            }
    free(pairs);
}
