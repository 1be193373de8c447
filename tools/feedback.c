#include "tools/feedback.h"

#include "kernels/quant.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- the rule ------------------------------------------------------------------------------------------ */

static void subtract(double *y, const double *x, double factor, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] -= factor * x[i];
}

/* a, [n, n], symmetric and positive: its upper half becomes V with a = V^T V. False where it is not positive
 * within rounding. */
static bool factorise(double *a, size_t n)
{
    for (size_t k = 0; k < n; k++) {
        double *row = a + k * n;
        if (!(row[k] > 0))
            return false;
        double root = sqrt(row[k]);
        for (size_t i = k; i < n; i++)
            row[i] /= root;
        for (size_t i = k + 1; i < n; i++)
            subtract(a + i * n + i, row + i, row[i], n - i);
    }
    return true;
}

/* The upper half of v becomes its inverse, last row first. scratch: [n] */
static void invert(double *v, double *scratch, size_t n)
{
    for (size_t i = n; i-- > 0;) {
        double *row = v + i * n, diagonal = row[i];
        memcpy(scratch + i, row + i, (n - i) * sizeof *row);
        memset(row + i, 0, (n - i) * sizeof *row);
        row[i] = 1;
        for (size_t k = i + 1; k < n; k++)
            subtract(row + k, v + k * n + k, scratch[k], n - k);
        for (size_t k = i; k < n; k++)
            row[k] /= diagonal;
    }
}

/* The rule of a block of a gram, [n, n], whose rows lie `stride` apart. Row j of r, [n, n], holds from behind
 * its diagonal on R[j, k] / R[j, j], where R is upper and R^T R the inverse of the block; its diagonal holds
 * 1 / R[j, j]^2, which is what an error in column j costs once the columns behind it have made good what they
 * can. To get it from one factor and one inverse, the order of rows and columns is turned round twice. a:
 * [n, n]; scratch: [n]. False where the block is not positive within rounding. */
static bool make_rule(float *r, const float *gram, size_t stride, size_t n, double *a, double *scratch)
{
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < n; k++)
            a[i * n + k] = gram[(n - 1 - i) * stride + (n - 1 - k)];
    if (!factorise(a, n))
        return false;
    invert(a, scratch, n);
    for (size_t j = 0; j < n; j++) {
        const double diagonal = a[(n - 1 - j) * n + (n - 1 - j)];
        r[j * n + j] = (float)(1 / (diagonal * diagonal));
        for (size_t k = j + 1; k < n; k++)
            r[j * n + k] = (float)(a[(n - 1 - k) * n + (n - 1 - j)] / diagonal);
    }
    return true;
}

static size_t group_width(size_t cols, size_t first)
{
    return cols - first < LTN_GROUP ? cols - first : LTN_GROUP;
}

/* More damping than the inverse needs: other texts than the one that was read find errors where it had next
 * to nothing. */
static const double DAMPING = 0.03; /* of the mean of the diagonal */

enum ltn_status ltn_feedback_open(struct ltn_feedback *f, const float *gram, size_t cols, const char *name,
                                  struct ltn_error *err)
{
    double *a = malloc(cols * cols * sizeof *a), *scratch = malloc(cols * sizeof *scratch), trace = 0;
    enum ltn_status status = LTN_OK;
    *f = (struct ltn_feedback){.cols = cols,
                               .gram = malloc(cols * cols * sizeof *f->gram),
                               .whole = malloc(cols * cols * sizeof *f->whole),
                               .groups = malloc(cols * LTN_GROUP * sizeof *f->groups)};
    if (!a || !scratch || !f->gram || !f->whole || !f->groups)
        status = ltn_fail(err, LTN_ERR_MEMORY, "no memory to calibrate tensor \"%s\"", name);
    for (size_t i = 0; i < cols; i++)
        trace += gram[i * cols + i];
    if (status == LTN_OK) {
        memcpy(f->gram, gram, cols * cols * sizeof *gram);
        for (size_t i = 0; i < cols; i++)
            f->gram[i * cols + i] += (float)(DAMPING * trace / (double)cols);
        bool good = trace > 0 && trace < INFINITY && make_rule(f->whole, f->gram, cols, cols, a, scratch);
        for (size_t c = 0; c < cols && good; c += LTN_GROUP)
            good = make_rule(f->groups + c * LTN_GROUP, f->gram + c * cols + c, cols, group_width(cols, c), a,
                             scratch);
        if (!good)
            status = ltn_fail(
                err, LTN_ERR_INPUT,
                "calibration: tensor \"%s\": its inputs, over the text, are all zero or not finite", name);
    }
    free(a);
    free(scratch);
    if (status != LTN_OK)
        ltn_feedback_close(f);
    return status;
}

void ltn_feedback_close(struct ltn_feedback *f)
{
    free(f->gram);
    free(f->whole);
    free(f->groups);
    *f = (struct ltn_feedback){0};
}

/* ---- a group ------------------------------------------------------------------------------------------- */

/* What n weights that share a scale become: code times scale, and where a backend multiplies by the matrix
 * turned into bf16, as CUDA's does for many rows, that rounded once more. The two losses together are twice
 * that of the value between them and twice the square of half their distance. */
struct fit {
    float scale, values[LTN_GROUP]; /* the values between */
};

/* Rounds a group with the scale, column after column by the rule r. Returns the loss, or, as soon as it is
 * known not to be below `most`, anything from there on. */
static double round_group(struct fit *fit, enum ltn_dtype dtype, const float *r, size_t stride,
                          const float *weights, size_t n, float scale, double most)
{
    float w[LTN_GROUP];
    double loss = 0;
    memcpy(w, weights, n * sizeof *w);
    fit->scale = scale;
    for (size_t c = 0; c < n && loss < most; c++) {
        const float *row = r + c * stride;
        float value;
        ltn_quant_code(dtype, w[c], scale, &value);
        const float apart = (ltn_bf16_to_f32(ltn_f32_to_bf16(value)) - value) / 2;
        fit->values[c] = value + apart;
        const float lost = w[c] - fit->values[c];
        loss += (double)row[c] * (lost * lost + apart * apart);
        for (size_t k = c + 1; k < n; k++)
            w[k] -= lost * row[k];
    }
    return loss;
}

/* The best of the scales; *fit stays as it was if none has a loss below `most`, as where one is not finite.
 */
static void fit_group(struct fit *fit, enum ltn_dtype dtype, const float *r, size_t stride,
                      const float *weights, size_t n, const float *scales, size_t n_scales, double most)
{
    struct fit other;
    for (size_t i = 0; i < n_scales; i++) {
        const double loss = round_group(&other, dtype, r, stride, weights, n, scales[i], most);
        if (loss < most) {
            most = loss;
            *fit = other;
        }
    }
}

/* ---- a row --------------------------------------------------------------------------------------------- */

/* A row on its way. */
struct row {
    const struct ltn_feedback *f;
    enum ltn_dtype dtype;
    float whole_scale;                          /* of fp8 */
    float *target, *values, *gradient, *scales; /* [cols], the last by groups */
};

/* Scales to choose from for a group whose weights are to become `target`. False where one is infinite. */
static bool scales_for(const struct row *row, const float *target, size_t n, float *scales, size_t *n_scales)
{
    if (row->dtype == LTN_FP8) {
        scales[0] = row->whole_scale;
        *n_scales = 1;
    } else {
        *n_scales = ltn_quant_scales(row->dtype, target, n, scales);
    }
    for (size_t i = 0; i < *n_scales; i++)
        if (!isfinite(scales[i]))
            return false;
    return true;
}

static void take(struct row *row, size_t first, size_t n, const struct fit *fit)
{
    row->scales[first / LTN_GROUP] = fit->scale;
    memcpy(row->values + first, fit->values, n * sizeof *fit->values);
}

static bool feed_back(struct row *row)
{
    const size_t cols = row->f->cols;
    float scales[LTN_QUANT_SCALES];
    size_t n_scales;
    for (size_t c = 0; c < cols; c += LTN_GROUP) {
        const size_t n = group_width(cols, c);
        struct fit fit = {.scale = INFINITY};
        if (!scales_for(row, row->target + c, n, scales, &n_scales))
            return false;
        fit_group(&fit, row->dtype, row->f->whole + c * cols + c, cols, row->target + c, n, scales, n_scales,
                  INFINITY);
        if (!isfinite(fit.scale))
            return false;
        take(row, c, n, &fit);
        for (size_t i = c; i < c + n; i++) {
            const float *rule = row->f->whole + i * cols, lost = row->target[i] - row->values[i];
            for (size_t k = i + 1; k < cols; k++)
                row->target[k] -= lost * rule[k];
        }
    }
    return true;
}

/* What the group loses by its weights' becoming others in bf16. */
static double lost_apart(const struct row *row, size_t first, size_t n)
{
    const float *r = row->f->groups + first * LTN_GROUP, scale = row->scales[first / LTN_GROUP];
    double loss = 0;
    for (size_t i = 0; i < n; i++) {
        float value;
        ltn_quant_code(row->dtype, row->values[first + i], scale, &value);
        const float apart = row->values[first + i] - value;
        loss += (double)r[i * n + i] * apart * apart;
    }
    return loss;
}

/* target: what the group would best become, with all others as they are: its values plus the inverse of its
 * block times its part of the gradient. Returns what the group loses by not being there. */
static double best_for_group(const struct row *row, size_t first, size_t n, float *target)
{
    const float *r = row->f->groups + first * LTN_GROUP, *gradient = row->gradient + first;
    double half[LTN_GROUP], loss = 0;
    for (size_t i = 0; i < n; i++) {
        double sum = gradient[i];
        for (size_t k = i + 1; k < n; k++)
            sum += (double)r[i * n + k] * gradient[k];
        half[i] = sum / r[i * n + i];
        loss += sum * half[i];
    }
    for (size_t i = 0; i < n; i++) {
        double sum = half[i];
        for (size_t k = 0; k < i; k++)
            sum += r[k * n + i] * half[k];
        target[i] = row->values[first + i] + (float)sum;
    }
    return loss;
}

static void sweep(struct row *row)
{
    const size_t cols = row->f->cols;
    float scales[LTN_QUANT_SCALES], target[LTN_GROUP], before[LTN_GROUP];
    size_t n_scales;
    for (size_t c = 0; c < cols; c += LTN_GROUP) {
        const size_t n = group_width(cols, c);
        struct fit fit = {.scale = row->scales[c / LTN_GROUP]};
        memcpy(before, row->values + c, n * sizeof *before);
        memcpy(fit.values, before, n * sizeof *before);
        /* what is better by less than the rounding of the gradient need not be better */
        const double most = (best_for_group(row, c, n, target) + lost_apart(row, c, n)) * (1 - 1e-5);
        if (!scales_for(row, target, n, scales, &n_scales))
            continue;
        fit_group(&fit, row->dtype, row->f->groups + c * LTN_GROUP, n, target, n, scales, n_scales, most);
        take(row, c, n, &fit);
        for (size_t i = 0; i < n; i++) {
            const float change = fit.values[i] - before[i], *gram = row->f->gram + (c + i) * cols;
            if (change == 0)
                continue;
            for (size_t k = 0; k < cols; k++)
                row->gradient[k] -= change * gram[k];
        }
    }
}

bool ltn_feedback_row(const struct ltn_feedback *f, enum ltn_dtype dtype, int sweeps, const float *weights,
                      float *room, void *codes, void *scales)
{
    const size_t cols = f->cols;
    struct row row = {.f = f,
                      .dtype = dtype,
                      .target = room,
                      .values = room + cols,
                      .gradient = room + 2 * cols,
                      .scales = room + 3 * cols};
    memcpy(row.target, weights, cols * sizeof *weights);
    if (dtype == LTN_FP8)
        ltn_quant_scales(dtype, weights, cols, &row.whole_scale);
    if (!feed_back(&row))
        return false;
    memset(row.gradient, 0, cols * sizeof *row.gradient);
    for (size_t c = 0; c < cols; c++)
        for (size_t k = 0; k < cols; k++)
            row.gradient[k] += (weights[c] - row.values[c]) * f->gram[c * cols + k];
    for (int i = 0; i < sweeps; i++)
        sweep(&row);
    memset(codes, 0, ltn_row_bytes(dtype, cols));
    for (size_t c = 0; c < cols; c++) {
        const float scale = row.scales[c / LTN_GROUP];
        float value;
        if (c % LTN_GROUP == 0)
            ltn_quant_put_scale(dtype, scales, dtype == LTN_FP8 ? 0 : c / LTN_GROUP, scale);
        ltn_quant_put(dtype, codes, c, ltn_quant_code(dtype, row.values[c], scale, &value));
    }
    return true;
}
