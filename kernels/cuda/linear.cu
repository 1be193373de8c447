/* The linear maps and what is fused with them: which kernel takes which shape.
 *
 *   gemv.cu         one row, or a few where batch.cu cannot: everything fused, norms included
 *   batch.cu        up to 64 rows of 16-bit weights: feature map and second matrix fused, norms before it
 *   gemm_hopper.cu  many rows on Hopper: SiLU, product of two, sum into the residual fused, SimpleRMSNorm as
 *                   a factor of rows, the gate behind the attention in the attention; in e4m3 where the map
 * has its fp8: norms and gate while rounding gemm.cu         the rest: nothing fused
 *
 * Quantised weights go row by row through gemv_quant.cu, or become bf16 first: linear_quant.cu. */
#include "kernels/cuda/gemm_hopper.h"
#include "kernels/cuda/lightning_mma.h"
#include "kernels/cuda/quant.cuh"

enum path { GEMV, BATCH, HOPPER_FP8, HOPPER, GEMM };

static struct product product_of(const struct ltn_linear *l, int32_t rows, enum product_out out, void *y)
{
    struct product p = {};
    p.w = l->w.data;
    p.bias = l->bias;
    p.outs = l->w.rows;
    p.cols = l->w.cols;
    p.rows = rows;
    p.out = out;
    p.y = y;
    return p;
}

static bool for_hopper(const struct cuda_backend *be, const struct product *p)
{
    return be->hopper && be->base.act_dtype == LTN_BF16 && !p->bias && !p->bias2 && p->out != OUT_F32 &&
           p->cols % 8 == 0 && p->outs % 8 == 0 && p->act_cols % 8 == 0 && aligned16(p->w) &&
           aligned16(p->w2) && aligned16(p->x) && aligned16(p->y);
}

/* Enough tiles of 256 x 256 to be worth such large ones; by constants, so that bits depend on sizes alone. */
static bool enough_tiles(const struct product *p)
{
    enum { SIDE = 256, TILES = 48 };
    return (((int64_t)p->rows + SIDE - 1) / SIDE) * ((p->outs + SIDE - 1) / SIDE) >= TILES;
}

static bool for_fp8(const struct product *p, const struct ltn_linear *l)
{
    enum { ROWS = 256 };
    return l->fp8.data && p->rows >= ROWS && p->cols % 16 == 0 && p->cols <= FP8_COLS && !p->norm.weight &&
           aligned16(p->gate) && p->ld_gate % 8 == 0;
}

/* Bytes of a bf16 copy and, behind it, its sums of squares. */
static size_t copy_bytes(int32_t rows, int32_t cols)
{
    return (size_t)rows * cols * sizeof(__nv_bfloat16) + (size_t)hopper_squares(cols) * rows * sizeof(float);
}

/* Bytes of activations in e4m3 and, behind them, their scales. */
static size_t fp8_bytes(int32_t rows, int32_t cols)
{
    return (size_t)rows * cols + (size_t)rows * sizeof(float);
}

void linear_room(const struct cuda_backend *be, const struct ltn_network *net, int32_t rows, size_t *needed)
{
    if (!be->hopper || be->base.act_dtype != LTN_BF16)
        return;
    raise(&needed[ROOM_COPY], copy_bytes(rows, net->embed_dim));
    for (int32_t i = 0; i < net->n_layers; i++) {
        const struct ltn_layer *l = &net->layers[i];
        for (const struct ltn_linear *map : {&l->qkv, &l->gate0, &l->gate1, &l->out, &l->l1, &l->l2, &l->l3})
            if (map->fp8.data)
                raise(&needed[ROOM_FP8], fp8_bytes(rows, map->w.cols));
    }
}

/* between: where Norm(x) would go */
static enum path path_of(const struct cuda_backend *be, const struct product *p, const struct ltn_linear *l,
                         const void *between)
{
    const enum ltn_dtype dtype = l->w.dtype;
    const bool batches = batch_suits(be, p, dtype) && aligned16(between);
    if ((p->rows == 1 || (p->rows <= GEMV_ROWS && !batches)) && gemv_fits(be, p->cols, p->rows))
        return GEMV;
    if (batches)
        return BATCH;
    if (!for_hopper(be, p) || !aligned16(between))
        return GEMM;
    return for_fp8(p, l) ? HOPPER_FP8 : dtype == LTN_BF16 && enough_tiles(p) ? HOPPER : GEMM;
}

/* Of quantised weights the product is made here, row by row (*done), or *l and *l2 (NULL, where there is one
 * alone) become the same maps in bf16, which lie in wide, and p follows; but where their fp8 is used, they
 * are not touched. between: as in path_of. */
static enum ltn_status resolve(struct cuda_backend *be, struct product *p, const struct ltn_linear **l,
                               const struct ltn_linear **l2, struct ltn_linear wide[2], const void *between,
                               bool *done, struct ltn_error *err)
{
    *done = false;
    if (!ltn_is_quantised((*l)->w.dtype) || (for_hopper(be, p) && for_fp8(p, *l) && aligned16(between)))
        return LTN_OK;
    LTN_TRY(quant_product(be, p, *l, l2 ? *l2 : NULL, &wide[0], &wide[1], done, err));
    if (*done)
        return LTN_OK;
    *l = &wide[0];
    p->w = wide[0].w.data;
    if (l2) {
        *l2 = &wide[1];
        p->w2 = wide[1].w.data;
    }
    return LTN_OK;
}

/* Whether the kernels of a path form what the product reads themselves. */
static bool forms_input(enum path path, const struct product *p)
{
    return path == GEMV || path == HOPPER_FP8 || (path == HOPPER && p->in == IN_NORM && !p->norm.weight);
}

/* The parts of the backend's room for a residual stream: copy [rows, cols], squares [., rows]. */
static enum ltn_status room_for_copy(struct cuda_backend *be, void **copy, float **squares, int32_t rows,
                                     int32_t cols, struct ltn_error *err)
{
    LTN_TRY(room_part(be, copy, ROOM_COPY, copy_bytes(rows, cols), err));
    *squares = (float *)((uint8_t *)*copy + (size_t)rows * cols * sizeof(__nv_bfloat16));
    return LTN_OK;
}

/* The input of a product of Norm(x): as the operation before left it, or made here, to the same bits. */
static enum ltn_status norm_by_rows(struct cuda_backend *be, struct hopper_gemm *g, const struct product *p,
                                    const float *copied, struct ltn_error *err)
{
    const float *x = (const float *)p->x;
    void *copy;
    float *squares;
    const bool there = copied == x && be->copied_rows == p->rows && be->copied_cols == p->cols;
    LTN_TRY(room_for_copy(be, &copy, &squares, p->rows, p->cols, err));
    if (!there)
        CUDA_TRY(be, err, hopper_square(be->stream, copy, squares, x, p->rows, p->cols));
    g->x = copy;
    g->squares = squares;
    g->n_squares = hopper_squares(p->cols);
    be->copied = x; /* which stays as it is */
    be->copied_rows = p->rows;
    be->copied_cols = p->cols;
    return LTN_OK;
}

/* l2: of a product of two, or NULL; copied: see struct turn */
static enum ltn_status hopper(struct cuda_backend *be, const struct product *p, const struct ltn_linear *l,
                              const struct ltn_linear *l2, bool fp8, const float *copied,
                              struct ltn_error *err)
{
    struct hopper_gemm g = {};
    g.out = p->out == OUT_ADD ? (fp8 ? HOPPER_ADD : HOPPER_RESIDUAL) : l2 ? HOPPER_GLU : HOPPER_ACT;
    g.w = p->w;
    g.w2 = p->w2;
    g.x = p->x;
    g.y = p->y;
    g.rows = p->rows;
    g.outs = p->outs;
    g.cols = p->cols;
    g.act_cols = p->act_cols;
    g.squares = p->squares;
    g.n_squares = p->n_squares;
    if (fp8) {
        void *room;
        LTN_TRY(room_part(be, &room, ROOM_FP8, fp8_bytes(p->rows, p->cols), err));
        struct fp8_rows x = {(uint8_t *)room, (float *)((uint8_t *)room + (size_t)p->rows * p->cols)};
        LTN_TRY(rows_to_fp8(be, &x, p, err));
        g.fp8 = true;
        g.x = x.codes;
        g.row_scale = x.scales;
        g.w = l->fp8.data;
        g.col_scale = (const float *)l->fp8.scales;
        g.w2 = l2 ? l2->fp8.data : NULL;
        g.col_scale2 = l2 ? (const float *)l2->fp8.scales : NULL;
    }
    if (!fp8 && p->in == IN_NORM)
        LTN_TRY(norm_by_rows(be, &g, p, copied, err));
    if (g.out == HOPPER_RESIDUAL)
        LTN_TRY(room_for_copy(be, &g.copy, &g.new_squares, p->rows, p->outs, err));
    CUDA_TRY(be, err, hopper_gemm_run(be->stream, be->n_sms, &g));
    if (g.out == HOPPER_RESIDUAL) {
        be->copied = (const float *)p->y;
        be->copied_rows = p->rows;
        be->copied_cols = p->outs;
    }
    return LTN_OK;
}

static enum ltn_status run(struct cuda_backend *be, enum path path, const struct product *p,
                           const struct ltn_linear *l, const struct ltn_linear *l2, const float *copied,
                           struct ltn_error *err)
{
    switch (path) {
    case GEMV:
        return gemv(be, p, l->w.dtype, err);
    case BATCH:
        return batch(be, p, l->w.dtype, err);
    case HOPPER_FP8:
    case HOPPER:
        return hopper(be, p, l, l2, path == HOPPER_FP8, copied, err);
    default:
        return gemm(be, p, l->w.dtype, err);
    }
}

static enum ltn_status plain(struct ltn_backend *base, enum product_out out, void *y, const void *x,
                             const struct ltn_linear *l, int32_t rows, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    struct product p = product_of(l, rows, out, y);
    struct ltn_linear wide[2];
    bool done;

    p.x = x;
    LTN_TRY(resolve(be, &p, &l, NULL, wide, NULL, &done, err));
    return done ? LTN_OK : run(be, path_of(be, &p, l, NULL), &p, l, NULL, turn.copied, err);
}

enum ltn_status cuda_linear(struct ltn_backend *be, void *y, const void *x, const struct ltn_linear *l,
                            int32_t rows, struct ltn_error *err)
{
    return plain(be, OUT_ACT, y, x, l, rows, err);
}

enum ltn_status cuda_linear_add(struct ltn_backend *be, float *x, const void *y, const struct ltn_linear *l,
                                int32_t rows, struct ltn_error *err)
{
    return plain(be, OUT_ADD, x, y, l, rows, err);
}

enum ltn_status cuda_logits(struct ltn_backend *be, float *out, const void *y, const struct ltn_matrix *w,
                            int32_t rows, struct ltn_error *err)
{
    const struct ltn_linear l = {*w, NULL, {}};
    return plain(be, OUT_F32, out, y, &l, rows, err);
}

enum ltn_status cuda_norm_linear(struct ltn_backend *base, void *y, const float *x,
                                 const struct ltn_norm *norm, const struct ltn_linear *l, enum ltn_act act,
                                 int32_t act_cols, int32_t group, int32_t rows, void *scratch,
                                 struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    struct product p = product_of(l, rows, OUT_ACT, y);
    struct ltn_linear wide[2];
    bool done;

    p.act = act;
    p.act_cols = act == LTN_ACT_EXP ? 0 : act_cols; /* it needs all of its group */
    p.x = x;
    p.in = IN_NORM;
    p.norm = *norm;
    LTN_TRY(resolve(be, &p, &l, NULL, wide, scratch, &done, err));
    if (done)
        return p.act_cols == act_cols ? LTN_OK
                                      : cuda_activation(base, y, p.outs, rows, act_cols, group, act, err);
    const enum path path = path_of(be, &p, l, scratch);
    const bool act_later = act == LTN_ACT_EXP || path == GEMM || (path >= HOPPER_FP8 && act != LTN_ACT_SILU);
    if (act_later)
        p.act_cols = 0;
    if (!forms_input(path, &p)) {
        LTN_TRY(cuda_norm(base, scratch, x, norm, rows, p.cols, err));
        p.in = IN_ACT;
        p.x = scratch;
    }
    LTN_TRY(run(be, path, &p, l, NULL, turn.copied, err));
    if (!act_later || act_cols == 0)
        return LTN_OK;
    return cuda_activation(base, y, p.outs, rows, act_cols, group, act, err);
}

enum ltn_status cuda_norm_glu(struct ltn_backend *base, void *y, const float *x, const struct ltn_norm *norm,
                              const struct ltn_linear *l1, const struct ltn_linear *l2, int32_t rows,
                              void *scratch, void *scratch2, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    struct product p = product_of(l1, rows, OUT_ACT, y);
    struct ltn_linear wide[2];
    bool done;

    p.w2 = l2->w.data;
    p.bias2 = l2->bias;
    p.x = x;
    p.in = IN_NORM;
    p.norm = *norm;
    LTN_TRY(resolve(be, &p, &l1, &l2, wide, scratch, &done, err));
    if (done)
        return LTN_OK;
    const enum path path = path_of(be, &p, l1, scratch);
    if (!forms_input(path, &p)) {
        LTN_TRY(cuda_norm(base, scratch, x, norm, rows, p.cols, err));
        p.in = IN_ACT;
        p.x = scratch;
    }
    if (path != GEMM)
        return run(be, path, &p, l1, l2, turn.copied, err);
    LTN_TRY(cuda_linear(base, y, scratch, l1, rows, err));
    LTN_TRY(cuda_linear(base, scratch2, scratch, l2, rows, err));
    return cuda_multiply(base, y, scratch2, (int64_t)rows * p.outs, err);
}

enum ltn_status cuda_gated_linear_add(struct ltn_backend *base, float *x, const void *o, const void *gate,
                                      int32_t ld_gate, const struct ltn_norm *norm,
                                      const struct ltn_linear *l, int32_t rows, void *scratch,
                                      struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    struct product p = product_of(l, rows, OUT_ADD, x);
    struct ltn_linear wide[2];
    bool done;

    p.x = o;
    p.in = IN_GATED;
    p.gate = gate;
    p.ld_gate = ld_gate;
    p.norm = *norm;
    LTN_TRY(resolve(be, &p, &l, NULL, wide, scratch, &done, err));
    if (done)
        return LTN_OK;
    const enum path path = path_of(be, &p, l, scratch);
    if (!forms_input(path, &p)) {
        LTN_TRY(cuda_gated_norm(base, scratch, o, gate, ld_gate, norm, rows, p.cols, err));
        p.in = IN_ACT;
        p.x = scratch;
    }
    return run(be, path, &p, l, NULL, turn.copied, err);
}

/* Where the attention's kernel can put the gate on its outputs, and leave their squares, W gate Norm(o) = (W
 * (gate o)) / rms(o). */
enum ltn_status cuda_lightning_linear_add(struct ltn_backend *base, float *x, const void *q, const void *k,
                                          const void *v, int32_t ld, const struct ltn_attention *a,
                                          const struct ltn_seq *seqs, int32_t n_seqs, const void *gate,
                                          int32_t ld_gate, const struct ltn_norm *norm,
                                          const struct ltn_linear *l, int32_t rows, void *o, void *scratch,
                                          struct ltn_error *err)
{
    enum { SQUARES_COLS = 64 };
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    struct product p = product_of(l, rows, OUT_ADD, x);
    bool done = false;

    p.x = o;
    p.squares = (const float *)scratch;
    p.n_squares = p.cols / SQUARES_COLS;
    if (!norm->weight && p.cols == a->n_heads * a->head_dim && path_of(be, &p, l, NULL) == HOPPER) {
        struct ltn_lightning_call call = {};
        call.o = o;
        call.q = q;
        call.k = k;
        call.v = v;
        call.ld = ld;
        call.a = a;
        call.seqs = seqs;
        call.n_seqs = n_seqs;
        call.steps = be->steps;
        call.gate = gate;
        call.ld_gate = ld_gate;
        call.squares = (float *)scratch;
        LTN_TRY(lightning_tensor(be, &call, &done, err));
        if (done)
            return run(be, HOPPER, &p, l, NULL, NULL, err);
    }
    LTN_TRY(cuda_lightning(base, o, q, k, v, ld, a, seqs, n_seqs, err));
    return cuda_gated_linear_add(base, x, o, gate, ld_gate, norm, l, rows, scratch, err);
}

enum ltn_status cuda_norm_logits(struct ltn_backend *base, float *out, const float *x,
                                 const struct ltn_norm *norm, const struct ltn_matrix *w, int32_t rows,
                                 void *scratch, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    const struct ltn_linear head = {*w, NULL, {}}, *l = &head;
    struct product p = product_of(l, rows, OUT_F32, out);
    struct ltn_linear wide[2];
    bool done;

    p.x = x;
    p.in = IN_NORM;
    p.norm = *norm;
    LTN_TRY(resolve(be, &p, &l, NULL, wide, scratch, &done, err));
    if (done)
        return LTN_OK;
    const enum path path = path_of(be, &p, l, scratch);
    if (!forms_input(path, &p)) {
        LTN_TRY(cuda_norm(base, scratch, x, norm, rows, p.cols, err));
        p.in = IN_ACT;
        p.x = scratch;
    }
    return run(be, path, &p, l, NULL, turn.copied, err);
}
