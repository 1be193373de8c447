/* How the fused convolution by the copy engine is computed, by shape. Plain C: tests run the plan on the CPU.
 */
#include "kernels/conv/fused.h"
#include "kernels/conv/fused_tma.h"
#include "kernels/dtype.h"

#include <string.h>

enum {
    SHARED = 227 * 1024, /* of one block on sm_90 */
    ALIGN = 1024,        /* the swizzle's period */
};

static int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

static int align_up(int n)
{
    return ceil_div(n, ALIGN) * ALIGN;
}

static int gcd(int a, int b)
{
    return b ? gcd(b, a % b) : a;
}

/* Strips and what follows from them. False: too many phases. */
static bool set_strips(struct ltn_tma_plan *plan, const struct ltn_conv_shape *s)
{
    struct ltn_tma_strips *strips = &plan->strips;
    int cg = s->ci / s->groups, line = 8 * plan->unit, step = 2 * plan->unit, most = 0;
    int period = s->sw / gcd(s->dw, s->sw); /* taps of one phase are so far apart */
    if (!plan->overlap || period > s->wf)
        period = s->wf;
    if (period > LTN_TMA_MAX_PHASES)
        return false;
    *strips = (struct ltn_tma_strips){.lines = ceil_div(cg, line),
                                      .rows = s->hf,
                                      .phases = period,
                                      .line = line,
                                      .down = s->dh,
                                      .last_steps = cg % line ? cg % line / step : 4,
                                      .apart = period * s->dw / s->sw};
    for (int v = 0; v < period; ++v) {
        int x = v * s->dw, taps = plan->overlap ? ceil_div(s->wf - v, period) : 1;
        int shift = plan->overlap ? x / s->sw : 0, last = shift + (taps - 1) * strips->apart;
        strips->phase[v].x = plan->overlap ? x % s->sw : x;
        strips->phase[v].taps = taps;
        strips->phase[v].shift = shift;
        most = last > most ? last : most;
    }
    plan->n_strips = strips->lines * strips->rows * period;
    plan->taps = strips->lines * s->hf * s->wf;
    plan->load = 64 * plan->mt + most;
    plan->wq = plan->wo + most;
    return true;
}

/* Places in shared memory. False: does not fit. */
static bool set_memory(struct ltn_tma_plan *plan, const struct ltn_conv_shape *s)
{
    plan->slot_bytes = align_up(plan->load * LTN_TMA_LINE);
    plan->stage_bytes = plan->bn * LTN_TMA_LINE;
    int fixed = 2 * ALIGN; /* barriers, the base */
    int left = SHARED - fixed;
    if (plan->load > 1024)
        return false;
    plan->resident = s->groups * plan->n_tiles == 1 && plan->taps <= LTN_TMA_MAX_STAGES &&
                     plan->taps * plan->stage_bytes + 3 * plan->slot_bytes <= left;
    plan->stages = plan->resident ? plan->taps : left / 2 / plan->stage_bytes; /* else half and half */
    plan->slots = (left - plan->stages * plan->stage_bytes) / plan->slot_bytes;
    if (plan->slots > LTN_TMA_MAX_SLOTS)
        plan->slots = LTN_TMA_MAX_SLOTS;
    if (!plan->resident) {
        plan->stages = (left - plan->slots * plan->slot_bytes) / plan->stage_bytes;
        if (plan->stages > LTN_TMA_MAX_STAGES)
            plan->stages = LTN_TMA_MAX_STAGES;
    }
    plan->at_stages = plan->slots * plan->slot_bytes;
    plan->at_barriers = plan->at_stages + plan->stages * plan->stage_bytes;
    plan->shared_bytes = plan->at_barriers + 2 * ALIGN;
    return plan->slots >= 2 && (plan->resident || plan->stages >= 2);
}

/* Estimated cycles of all: rounds of tiles on 132 multiprocessors, each bound by products or by the L2, and a
 * part of the other shows. The
 * constants are of an H100, and the choice is the same everywhere. */
static double cost(const struct ltn_tma_plan *plan, const struct ltn_conv_shape *s)
{
    double rows = 64.0 * plan->mt, positions = (double)s->n * plan->ho * plan->wq;
    double tiles = (double)(int64_t)((positions + rows - 1) / rows) * plan->n_tiles * s->groups;
    double rounds = (double)(int64_t)((tiles + 131) / 132);
    double steps = (double)ceil_div(s->ci / s->groups, 2 * plan->unit) * s->hf * s->wf;
    double products = steps * plan->mt *
                      (plan->bn == 128  ? 69
                       : plan->bn == 96 ? 53
                       : plan->mt == 4  ? 38
                                        : 42);
    double bytes = (double)plan->n_strips * plan->load * LTN_TMA_LINE +
                   (plan->resident ? 0 : (double)plan->taps * plan->stage_bytes);
    double l2 = bytes / 33;
    double high = products > l2 ? products : l2, low = products > l2 ? l2 : products;
    return rounds * (high + low / 4);
}

void ltn_tma_corners(const struct ltn_tma_plan *plan, const struct ltn_conv_shape *s, int corners[4])
{
    corners[0] = -s->pl;
    corners[1] = -s->pt;
    corners[2] = (plan->wq - 1) * s->sw - s->pl - (s->wi - 1);
    corners[3] = (plan->ho - 1) * s->sh - s->pt - (s->hi - 1);
}

/* What tensor maps can say, in im2col mode. */
static bool can_map(const struct ltn_tma_plan *plan, const struct ltn_conv_shape *s)
{
    int corners[4];
    ltn_tma_corners(plan, s, corners);
    for (int i = 0; i < 4; ++i)
        if (corners[i] < -128 || corners[i] > 127)
            return false;
    return true;
}

enum ltn_status ltn_tma_choose(struct ltn_tma_plan *plan, const struct ltn_conv_shape *s,
                               const struct ltn_tma_choice *choice, struct ltn_error *err)
{
    const struct ltn_tma_choice any = {.overlap = -1};
    int cog = s->co / s->groups, cg = s->ci / s->groups;
    struct ltn_tma_plan base = {
        .unit = s->type == LTN_CONV_BF16 ? 8 : 4, .ho = ltn_conv_ho(s), .wo = ltn_conv_wo(s)};
    if (!choice)
        choice = &any;
    if (s->type == LTN_CONV_F32 || s->layout != LTN_NHWC || cg % (2 * base.unit) != 0 || s->sh > 8 ||
        s->sw > 8 || (int64_t)s->dh * (s->hf - 1) > 255 || (int64_t)s->dw * (s->wf - 1) > 255 ||
        s->pt > 128 || s->pl > 128 || (double)s->hi * s->wi * s->ci >= 1e11 || s->hi > 1 << 20 ||
        s->wi > 1 << 20 || cg > 1 << 20)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "convolution: not a shape for strips by the copy engine");
    base.bn = cog <= 64 ? 64 : ceil_div(cog, 96) * 96 < ceil_div(cog, 128) * 128 ? 96 : 128;
    base.n_tiles = ceil_div(cog, base.bn);
    double least = -1;
    for (int i = 0; i < 4; ++i) {
        struct ltn_tma_plan now = base;
        now.overlap = i & 1;
        now.mt = i & 2 ? 4 : 2;
        if ((now.mt == 4 && now.bn != 64) || (choice->mt && choice->mt != now.mt) ||
            (choice->overlap >= 0 && choice->overlap != now.overlap) || !set_strips(&now, s) ||
            !set_memory(&now, s) || !can_map(&now, s))
            continue;
        double c = cost(&now, s);
        if (least < 0 || c < least) {
            least = c;
            *plan = now;
        }
    }
    if (least < 0)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "convolution: not a shape for strips by the copy engine");
    plan->bytes = (size_t)s->groups * (size_t)plan->n_tiles * (size_t)plan->taps * (size_t)plan->stage_bytes;
    return LTN_OK;
}

/* One tap of a tile of channels, [bn][128 bytes]. first: channel of the group; (u, v): of the filter. */
static void pack_tap(const struct ltn_tma_plan *plan, const struct ltn_conv_shape *s, const float *filter,
                     int first, int u, int v, int group, int n_tile, char *out)
{
    int cg = s->ci / s->groups, cog = s->co / s->groups, unit = plan->unit;
    for (int row = 0; row < plan->bn; ++row)
        for (int i = 0; i < 8 * unit; ++i) {
            int o = n_tile * plan->bn + ltn_fused_channel(row, unit), c = first + i;
            int at = row * 8 * unit + ((i / unit) ^ (row & 7)) * unit + i % unit;
            float value = 0;
            if (o < cog && c < cg)
                value = filter[((((int64_t)group * cog + o) * cg + c) * s->hf + u) * s->wf + v];
            if (unit == 8)
                ((uint16_t *)out)[at] = ltn_f32_to_bf16(value);
            else
                ((float *)out)[at] = ltn_round_tf32(value);
        }
}

void ltn_tma_pack(const struct ltn_tma_plan *plan, const struct ltn_conv_shape *s, const float *filter,
                  void *packed)
{
    const struct ltn_tma_strips *strips = &plan->strips;
    char *out = packed;
    for (int tile = 0; tile < s->groups * plan->n_tiles; ++tile)
        for (int line = 0; line < strips->lines; ++line)
            for (int u = 0; u < strips->rows; ++u)
                for (int phase = 0; phase < strips->phases; ++phase)
                    for (int v = phase; v < s->wf; v += strips->phases, out += plan->stage_bytes)
                        pack_tap(plan, s, filter, line * strips->line, u, v, tile / plan->n_tiles,
                                 tile % plan->n_tiles, out);
}
