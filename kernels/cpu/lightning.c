/* Lightning attention on the CPU. One task is a range of value columns of one head of one sequence: the
 * columns of a state are independent of each other. */
#include "kernels/cpu/cpu.h"

#include <math.h>

enum {
    BLOCK = 64, /* rows of a prefill block */
    TILE = 12,  /* rows of a block whose scores are computed together */
    MIN_COLUMNS = 16,
};

struct lightning_job {
    const struct cpu_backend *cpu;
    float *o;
    const float *q, *k, *v;
    size_t ld;
    const struct ltn_attention *a;
    const struct ltn_seq *seqs;
    int splits, columns; /* tasks of one head, and value columns of each */
    int block;           /* rows of a block: BLOCK, or fewer where scratch memory is short */
};

/* One head's part of a task. */
struct head {
    const struct micro *micro;
    float *o, *s;           /* first output and first row of the state, at the first column */
    const float *q, *k, *v; /* the head's columns of row 0; v at the first column */
    size_t ld, ld_o;        /* of q, k, v; of o */
    const float *theta;     /* [e] or NULL */
    double slope;
    int e, d, n; /* n value columns */
};

/* [x cos, x sin] of one row, or x itself without LRPE. */
static void rotate(float *out, const float *x, const struct head *h, const float *turn)
{
    memcpy(out, x, (size_t)h->e * sizeof *x);
    if (!h->theta)
        return;
    memcpy(out + h->e, x, (size_t)h->e * sizeof *x);
    h->micro->multiply(out, turn, 2 * (size_t)h->e);
}

static void decode(const struct head *h, double pos, float *scratch)
{
    float *turn = scratch, *q = turn + 2 * h->e, *k = q + h->d;
    if (h->theta)
        h->micro->angles(turn, turn + h->e, h->theta, pos, (size_t)h->e);
    rotate(q, h->q, h, turn);
    rotate(k, h->k, h, turn);
    h->micro->step(h->o, h->s, (size_t)h->e, q, k, h->v, (float)-expm1(-h->slope), h->d, h->n);
}

/* One block of m rows from row `first` on, by the split of Lightning Attention-2 (arXiv 2401.04658, eq. 5-12)
 * with rows counted from 0:
 *   o_i = exp(-s (i + 1)) q_i S + sum_{j <= i} exp(-s (i - j)) (q_i . k_j) v_j
 *   S  <- S + sum_j k_j^T exp(-s (m - 1 - j)) v_j - (1 - exp(-s m)) S
 * power[BLOCK - i] = exp(-s i), i = 0 .. BLOCK. */
static void prefill_block(const struct head *h, int first, int m, double pos, const float *power,
                          float *scratch)
{
    const struct micro *micro = h->micro;
    size_t d = (size_t)h->d, e = (size_t)h->e, n = (size_t)h->n;
    float *turn = scratch, *q = turn + 2 * e, *k = q + m * d, *v = k + m * d, *score = v + m * n;
    float *o = h->o + first * h->ld_o;
    for (int i = 0; i < m; i++) {
        size_t row = (size_t)(first + i) * h->ld;
        if (h->theta)
            micro->angles(turn, turn + e, h->theta, pos + i, e);
        rotate(q + i * d, h->q + row, h, turn);
        rotate(k + i * d, h->k + row, h, turn);
        memcpy(v + i * n, h->v + row, n * sizeof *v);
        memset(o + i * h->ld_o, 0, n * sizeof *o);
    }

    micro->outer(o, h->ld_o, q, d, 1, h->s, e, m, h->n, h->d, 0);
    for (int i = 0; i < m; i++)
        micro->scale(o + i * h->ld_o, power[BLOCK - i - 1], n);

    for (int top = 0; top < m; top += TILE) {
        int rows = m - top < TILE ? m - top : TILE, end = top + rows;
        micro->dots[LTN_F32](score, BLOCK, q + top * d, d, k, NULL, rows, end, h->d, false, NULL);
        for (int i = 0; i < rows; i++) {
            micro->multiply(score + i * BLOCK, power + BLOCK - top - i, (size_t)(top + i + 1));
            memset(score + i * BLOCK + top + i + 1, 0, (size_t)(rows - i - 1) * sizeof *score);
        }
        micro->outer(o + top * h->ld_o, h->ld_o, score, BLOCK, 1, v, n, rows, h->n, end, 0);
    }

    for (int j = 0; j < m; j++)
        micro->scale(v + j * n, power[BLOCK - (m - 1 - j)], n);
    micro->outer(h->s, e, k, 1, d, v, n, h->d, h->n, m, (float)-expm1(-h->slope * m));
}

static void lightning_task(void *ctx, int64_t task, int worker)
{
    const struct lightning_job *job = ctx;
    const struct ltn_attention *a = job->a;
    const struct ltn_seq *seq = &job->seqs[task / job->splits / a->n_heads];
    size_t head = (size_t)(task / job->splits % a->n_heads), e = (size_t)a->head_dim;
    size_t column = (size_t)(task % job->splits) * (size_t)job->columns;
    size_t d = a->theta ? 2 * e : e, row = (size_t)seq->first;
    const struct head h = {
        .micro = job->cpu->micro,
        .o = job->o + (row * a->n_heads + head) * e + column,
        .s = seq->state + a->state_offset + head * d * e + column,
        .q = job->q + row * job->ld + head * e,
        .k = job->k + row * job->ld + head * e,
        .v = job->v + row * job->ld + head * e + column,
        .ld = job->ld,
        .ld_o = a->n_heads * e,
        .theta = a->theta ? a->theta + head * e : NULL,
        .slope = a->slopes[head],
        .e = (int)e,
        .d = (int)d,
        .n = (int)e - (int)column < job->columns ? (int)e - (int)column : job->columns,
    };
    float *scratch = job->cpu->scratch + (size_t)worker * CPU_SCRATCH_FLOATS;
    if (seq->count == 1) {
        decode(&h, (double)seq->pos, scratch);
        return;
    }
    float power[BLOCK + 1];
    for (int i = 0; i <= BLOCK; i++) {
        double value = exp(-h.slope * i);
        power[BLOCK - i] = value < 0x1p-100 ? 0 : (float)value; /* products with less might go subnormal */
    }
    for (int first = 0; first < seq->count; first += job->block) {
        int m = seq->count - first < job->block ? seq->count - first : job->block;
        prefill_block(&h, first, m, (double)seq->pos + first, power, scratch);
    }
}

enum ltn_status cpu_lightning(struct ltn_backend *be, void *o, const void *q, const void *k, const void *v,
                              int32_t ld, const struct ltn_attention *a, const struct ltn_seq *seqs,
                              int32_t n_seqs, struct ltn_error *err)
{
    const struct cpu_backend *cpu = (const struct cpu_backend *)be;
    struct lightning_job job = {
        .cpu = cpu, .o = o, .q = q, .k = k, .v = v, .ld = (size_t)ld, .a = a, .seqs = seqs};
    int64_t e = a->head_dim, d = a->theta ? 2 * e : e;
    int64_t block = (CPU_SCRATCH_FLOATS - TILE * BLOCK - 2 * e) / (2 * d + e);
    if (block < 1)
        return ltn_fail(err, LTN_ERR_UNSUPPORTED, "CPU backend: head_dim %d is too large", a->head_dim);
    job.block = block < BLOCK ? (int)block : BLOCK;

    int64_t heads = (int64_t)n_seqs * a->n_heads;
    job.splits = 1;
    job.columns = a->head_dim;
    while (heads * job.splits < 2 * cpu->n_threads && job.columns > MIN_COLUMNS) {
        job.columns = ((job.columns + 1) / 2 + MIN_COLUMNS - 1) / MIN_COLUMNS * MIN_COLUMNS;
        job.splits = (a->head_dim + job.columns - 1) / job.columns;
    }
    pool_run(cpu->pool, heads * job.splits, lightning_task, &job);
    return LTN_OK;
}
