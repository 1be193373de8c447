/* The linear maps and what is fused with them: which kernel takes which shape.
 *
 *   gemv.cu   one row, or a few where batch.cu cannot: everything fused, norms included
 *   batch.cu  up to 64 rows of 16-bit weights: feature map and second matrix fused, norms before it
 *   gemm.cu   the rest: nothing fused
 *
 * Quantised weights go row by row through gemv_quant.cu, or become bf16 first: linear_quant.cu. */
#include "kernels/cuda/quant.cuh"

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

static bool for_gemv(const struct cuda_backend *be, const struct product *p, enum ltn_dtype dtype)
{
    return (p->rows == 1 || (p->rows <= GEMV_ROWS && !batch_suits(be, p, dtype))) &&
           gemv_fits(be, p->cols, p->rows);
}

static enum ltn_status plain(struct ltn_backend *base, enum product_out out, void *y, const void *x,
                             const struct ltn_linear *l, int32_t rows, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    struct product p = product_of(l, rows, out, y);
    p.x = x;
    if (ltn_is_quantised(l->w.dtype)) {
        struct ltn_linear wide;
        bool done;
        LTN_TRY(quant_product(be, &p, l, NULL, &wide, NULL, &done, err));
        return done ? LTN_OK : plain(base, out, y, x, &wide, rows, err);
    }
    if (for_gemv(be, &p, l->w.dtype))
        return gemv(be, &p, l->w.dtype, err);
    return batch_suits(be, &p, l->w.dtype) ? batch(be, &p, l->w.dtype, err) : gemm(be, &p, l->w.dtype, err);
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
    const struct ltn_linear l = {*w, NULL};
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
    bool act_later = act == LTN_ACT_EXP; /* needs all of its group */

    p.act = act;
    p.act_cols = act_later ? 0 : act_cols;
    p.x = x;
    if (ltn_is_quantised(l->w.dtype)) {
        struct ltn_linear wide;
        bool done;
        p.in = IN_NORM;
        p.norm = *norm;
        LTN_TRY(quant_product(be, &p, l, NULL, &wide, NULL, &done, err));
        if (!done)
            return cuda_norm_linear(base, y, x, norm, &wide, act, act_cols, group, rows, scratch, err);
    } else if (for_gemv(be, &p, l->w.dtype)) {
        p.in = IN_NORM;
        p.norm = *norm;
        LTN_TRY(gemv(be, &p, l->w.dtype, err));
    } else {
        LTN_TRY(cuda_norm(base, scratch, x, norm, rows, p.cols, err));
        p.x = scratch;
        if (batch_suits(be, &p, l->w.dtype)) {
            LTN_TRY(batch(be, &p, l->w.dtype, err));
        } else {
            LTN_TRY(cuda_linear(base, y, scratch, l, rows, err));
            act_later = true;
        }
    }
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

    p.w2 = l2->w.data;
    p.bias2 = l2->bias;
    p.x = x;
    if (ltn_is_quantised(l1->w.dtype)) {
        struct ltn_linear wide, wide2;
        bool done;
        p.in = IN_NORM;
        p.norm = *norm;
        LTN_TRY(quant_product(be, &p, l1, l2, &wide, &wide2, &done, err));
        return done ? LTN_OK : cuda_norm_glu(base, y, x, norm, &wide, &wide2, rows, scratch, scratch2, err);
    }
    if (for_gemv(be, &p, l1->w.dtype)) {
        p.in = IN_NORM;
        p.norm = *norm;
        return gemv(be, &p, l1->w.dtype, err);
    }
    LTN_TRY(cuda_norm(base, scratch, x, norm, rows, p.cols, err));
    p.x = scratch;
    if (batch_suits(be, &p, l1->w.dtype))
        return batch(be, &p, l1->w.dtype, err);
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

    p.x = o;
    if (ltn_is_quantised(l->w.dtype)) {
        struct ltn_linear wide;
        bool done;
        p.in = IN_GATED;
        p.gate = gate;
        p.ld_gate = ld_gate;
        p.norm = *norm;
        LTN_TRY(quant_product(be, &p, l, NULL, &wide, NULL, &done, err));
        return done ? LTN_OK
                    : cuda_gated_linear_add(base, x, o, gate, ld_gate, norm, &wide, rows, scratch, err);
    }
    if (for_gemv(be, &p, l->w.dtype)) {
        p.in = IN_GATED;
        p.gate = gate;
        p.ld_gate = ld_gate;
        p.norm = *norm;
        return gemv(be, &p, l->w.dtype, err);
    }
    LTN_TRY(cuda_gated_norm(base, scratch, o, gate, ld_gate, norm, rows, p.cols, err));
    return cuda_linear_add(base, x, scratch, l, rows, err);
}

enum ltn_status cuda_norm_logits(struct ltn_backend *base, float *out, const float *x,
                                 const struct ltn_norm *norm, const struct ltn_matrix *w, int32_t rows,
                                 void *scratch, struct ltn_error *err)
{
    struct cuda_backend *be = cuda_of(base);
    struct turn turn(be);
    const struct ltn_linear l = {*w, NULL};
    struct product p = product_of(&l, rows, OUT_F32, out);

    p.x = x;
    if (ltn_is_quantised(w->dtype)) {
        struct ltn_linear wide;
        bool done;
        p.in = IN_NORM;
        p.norm = *norm;
        LTN_TRY(quant_product(be, &p, &l, NULL, &wide, NULL, &done, err));
        return done ? LTN_OK : cuda_norm_logits(base, out, x, norm, &wide.w, rows, scratch, err);
    }
    if (for_gemv(be, &p, w->dtype)) {
        p.in = IN_NORM;
        p.norm = *norm;
        return gemv(be, &p, w->dtype, err);
    }
    LTN_TRY(cuda_norm(base, scratch, x, norm, rows, p.cols, err));
    return cuda_logits(base, out, scratch, w, rows, err);
}
