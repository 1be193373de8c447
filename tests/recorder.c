#include "tests/recorder.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST_CALLS = 512, MOST_SEQS = 8 };

/* An operation and its arguments, in the order of the table's. */
struct call {
    enum { EMBED, NORM, GATED_NORM, LINEAR, LINEAR_ADD, LOGITS, ACTIVATION, MULTIPLY, LIGHTNING, SAMPLE } op;
    void *p[4];
    const void *c[4];
    int32_t n[4];
    int64_t count;
    float scale;
    struct ltn_norm norm;
    struct ltn_seq seqs[MOST_SEQS];
    struct ltn_choice choice;
};

struct ltn_recording {
    const int64_t *steps;
    struct call calls[MOST_CALLS];
    int n;
};

static const struct ltn_ops *below;
static struct ltn_backend *plain;     /* whose sample is used */
static struct ltn_ops tables[2];      /* [1] records */
static struct ltn_recording *current; /* being made; NULL: calls run */
static int replays;

static enum ltn_status run(struct ltn_backend *be, const struct call *c, int64_t steps, struct ltn_error *err)
{
    struct ltn_seq seqs[MOST_SEQS];
    switch (c->op) {
    case EMBED:
        return below->embed(be, c->p[0], c->c[0], c->c[1], c->n[0], c->scale, err);
    case NORM:
        return below->norm(be, c->p[0], c->c[0], &c->norm, c->n[0], c->n[1], err);
    case GATED_NORM:
        return below->gated_norm(be, c->p[0], c->c[0], c->c[1], c->n[0], &c->norm, c->n[1], c->n[2], err);
    case LINEAR:
        return below->linear(be, c->p[0], c->c[0], c->c[1], c->n[0], err);
    case LINEAR_ADD:
        return below->linear_add(be, c->p[0], c->c[0], c->c[1], c->n[0], err);
    case LOGITS:
        return below->logits(be, c->p[0], c->c[0], c->c[1], c->n[0], err);
    case ACTIVATION:
        return below->activation(be, c->p[0], c->n[0], c->n[1], c->n[2], c->n[3], (enum ltn_act)c->count,
                                 err);
    case MULTIPLY:
        return below->multiply(be, c->p[0], c->c[0], c->count, err);
    case LIGHTNING:
        memcpy(seqs, c->seqs, sizeof seqs);
        for (int32_t i = 0; i < c->n[1]; i++)
            seqs[i].pos += steps;
        return below->lightning(be, c->p[0], c->c[0], c->c[1], c->c[2], c->n[0], c->c[3], seqs, c->n[1], err);
    case SAMPLE:
        return plain->ops->sample(plain, c->p[0], c->c[0], c->n[0], c->n[1], &c->choice, c->p[1], c->p[2],
                                  c->p[3], (int32_t *)(uintptr_t)c->c[1], c->n[2], err);
    }
    return LTN_ERR_INPUT;
}

/* Notes it while a recording is made, else runs it. */
static enum ltn_status take(struct ltn_backend *be, struct call c, struct ltn_error *err)
{
    if (!current)
        return run(be, &c, 0, err);
    assert_true(current->n < MOST_CALLS);
    current->calls[current->n++] = c;
    return LTN_OK;
}

static enum ltn_status embed(struct ltn_backend *be, float *x, const struct ltn_matrix *t, const int32_t *ids,
                             int32_t rows, float scale, struct ltn_error *err)
{
    return take(be, (struct call){EMBED, .p = {x}, .c = {t, ids}, .n = {rows}, .scale = scale}, err);
}

static enum ltn_status norm(struct ltn_backend *be, void *y, const float *x, const struct ltn_norm *how,
                            int32_t rows, int32_t cols, struct ltn_error *err)
{
    return take(be, (struct call){NORM, .p = {y}, .c = {x}, .n = {rows, cols}, .norm = *how}, err);
}

static enum ltn_status gated_norm(struct ltn_backend *be, void *y, const void *o, const void *gate,
                                  int32_t ld_gate, const struct ltn_norm *how, int32_t rows, int32_t cols,
                                  struct ltn_error *err)
{
    return take(be,
                (struct call){GATED_NORM, .p = {y}, .c = {o, gate}, .n = {ld_gate, rows, cols}, .norm = *how},
                err);
}

static enum ltn_status linear(struct ltn_backend *be, void *y, const void *x, const struct ltn_linear *l,
                              int32_t rows, struct ltn_error *err)
{
    return take(be, (struct call){LINEAR, .p = {y}, .c = {x, l}, .n = {rows}}, err);
}

static enum ltn_status linear_add(struct ltn_backend *be, float *x, const void *y, const struct ltn_linear *l,
                                  int32_t rows, struct ltn_error *err)
{
    return take(be, (struct call){LINEAR_ADD, .p = {x}, .c = {y, l}, .n = {rows}}, err);
}

static enum ltn_status logits(struct ltn_backend *be, float *out, const void *y, const struct ltn_matrix *w,
                              int32_t rows, struct ltn_error *err)
{
    return take(be, (struct call){LOGITS, .p = {out}, .c = {y, w}, .n = {rows}}, err);
}

static enum ltn_status activation(struct ltn_backend *be, void *x, int32_t ld, int32_t rows, int32_t cols,
                                  int32_t group, enum ltn_act act, struct ltn_error *err)
{
    return take(be, (struct call){ACTIVATION, .p = {x}, .n = {ld, rows, cols, group}, .count = act}, err);
}

static enum ltn_status multiply(struct ltn_backend *be, void *a, const void *b, int64_t n,
                                struct ltn_error *err)
{
    return take(be, (struct call){MULTIPLY, .p = {a}, .c = {b}, .count = n}, err);
}

static enum ltn_status lightning(struct ltn_backend *be, void *o, const void *q, const void *k, const void *v,
                                 int32_t ld, const struct ltn_attention *a, const struct ltn_seq *seqs,
                                 int32_t n_seqs, struct ltn_error *err)
{
    struct call c = {LIGHTNING, .p = {o}, .c = {q, k, v, a}, .n = {ld, n_seqs}};
    if (n_seqs > MOST_SEQS)
        return below->lightning(be, o, q, k, v, ld, a, seqs, n_seqs, err);
    memcpy(c.seqs, seqs, (size_t)n_seqs * sizeof *seqs);
    return take(be, c, err);
}

static enum ltn_status sample(struct ltn_backend *be, int32_t *ids, const float *x, int32_t rows,
                              int32_t cols, const struct ltn_choice *choice, struct ltn_draws *draws,
                              float *scratch, int64_t *steps, int32_t *log, int32_t log_rows,
                              struct ltn_error *err)
{
    return take(be,
                (struct call){SAMPLE, .p = {ids, draws, scratch, steps}, .c = {x, log},
                              .n = {rows, cols, log_rows}, .choice = *choice},
                err);
}

static enum ltn_status record(struct ltn_backend *be, const int64_t *steps, struct ltn_error *err)
{
    (void)be, (void)err;
    assert_null(current);
    current = calloc(1, sizeof *current);
    assert_non_null(current);
    current->steps = steps;
    return LTN_OK;
}

static enum ltn_status recorded(struct ltn_backend *be, struct ltn_recording **out, struct ltn_error *err)
{
    (void)be, (void)err;
    *out = current;
    current = NULL;
    return LTN_OK;
}

static enum ltn_status replay(struct ltn_backend *be, struct ltn_recording *r, struct ltn_error *err)
{
    replays++;
    for (int i = 0; i < r->n; i++)
        LTN_TRY(run(be, &r->calls[i], r->steps ? *r->steps : 0, err));
    return LTN_OK;
}

static void recording_free(struct ltn_backend *be, struct ltn_recording *r)
{
    (void)be;
    free(r);
}

void recorder_install(struct ltn_backend *be, bool records)
{
    if (!plain)
        assert_int_equal(ltn_reference_open(&plain, NULL), LTN_OK);
    below = be->ops;
    struct ltn_ops *t = &tables[records];
    *t = *below;
    t->embed = embed;
    t->norm = norm;
    t->gated_norm = gated_norm;
    t->linear = linear;
    t->linear_add = linear_add;
    t->logits = logits;
    t->activation = activation;
    t->multiply = multiply;
    t->lightning = lightning;
    t->norm_linear = NULL;
    t->norm_glu = NULL;
    t->gated_linear_add = NULL;
    t->lightning_linear_add = NULL;
    t->norm_logits = NULL;
    t->step = NULL;
    if (records) {
        t->sample = sample;
        t->record = record;
        t->recorded = recorded;
        t->replay = replay;
        t->recording_free = recording_free;
    }
    be->ops = t;
}

int recorder_replays(void)
{
    return replays;
}
