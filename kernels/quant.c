#include "kernels/quant.h"

static float extreme(const float *w, size_t n)
{
    float most = 0;
    for (size_t i = 0; i < n; i++)
        most = fabsf(w[i]) > fabsf(most) ? w[i] : most;
    return most;
}

size_t ltn_quant_scales(enum ltn_dtype dtype, const float *weights, size_t n, float *scales)
{
    const float most = extreme(weights, n);
    if (dtype == LTN_FP8) {
        scales[0] = fabsf(most) / 448;
        return 1;
    }
    /* The code, not rounded, that the largest weight gets. Of q8's scales that waste up to a fifth of the
     * codes one has, by chance, all weights near their codes; of q4's some cut the largest weight, and the
     * scale has its sign turned round, since -8 is there and 8 is not. */
    const size_t count = dtype == LTN_Q8 ? LTN_QUANT_SCALES : 29;
    for (size_t i = 0; i < count; i++) {
        const float at =
            dtype == LTN_Q8 ? copysignf(127.5f - 0.4f * (float)i, most) : -6.4f - 0.1f * (float)i;
        scales[i] = ltn_f16_to_f32(ltn_f32_to_f16(most / at));
    }
    return count;
}

static double lost(enum ltn_dtype dtype, const float *w, size_t n, float scale)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        float value;
        ltn_quant_code(dtype, w[i], scale, &value);
        sum += (double)(w[i] - value) * (w[i] - value);
    }
    return sum;
}

/* The one that loses least, or an infinite one if any is. */
static float best_scale(enum ltn_dtype dtype, const float *weights, size_t n)
{
    float scales[LTN_QUANT_SCALES], best = 0;
    const size_t count = ltn_quant_scales(dtype, weights, n, scales);
    double least = INFINITY;
    for (size_t i = 0; i < count; i++) {
        if (!isfinite(scales[i]) || count == 1)
            return scales[i];
        const double loss = lost(dtype, weights, n, scales[i]);
        if (loss < least) {
            least = loss;
            best = scales[i];
        }
    }
    return best;
}

int ltn_quant_code(enum ltn_dtype dtype, float weight, float scale, float *value)
{
    float ratio = scale != 0 ? weight / scale : 0;
    if (dtype == LTN_FP8) {
        uint8_t code = ltn_f32_to_e4m3(ratio);
        *value = ltn_e4m3_to_f32(code) * scale;
        return code;
    }
    float low = dtype == LTN_Q8 ? -127 : -8, high = dtype == LTN_Q8 ? 127 : 7;
    float code = rintf(ratio < low ? low : ratio > high ? high : ratio);
    *value = code * scale;
    return (int)code;
}

void ltn_quant_put(enum ltn_dtype dtype, void *row, size_t col, int code)
{
    uint8_t *codes = row;
    if (dtype != LTN_Q4) {
        codes[col] = (uint8_t)code;
        return;
    }
    size_t in_group = col % LTN_GROUP;
    codes[col / LTN_GROUP * LTN_Q4_GROUP_BYTES + in_group % LTN_Q4_GROUP_BYTES] |=
        (uint8_t)((code & 15) << (in_group < LTN_Q4_GROUP_BYTES ? 0 : 4));
}

void ltn_quant_put_scale(enum ltn_dtype dtype, void *row_scales, size_t i, float scale)
{
    if (dtype == LTN_FP8)
        ((float *)row_scales)[i] = scale;
    else
        ((uint16_t *)row_scales)[i] = ltn_f32_to_f16(scale);
}

bool ltn_quantise_row(enum ltn_dtype dtype, const float *weights, size_t cols, void *row, void *row_scales)
{
    size_t share = dtype == LTN_FP8 ? cols : LTN_GROUP; /* weights of one scale */
    bool finite = true;
    memset(row, 0, ltn_row_bytes(dtype, cols));
    for (size_t first = 0; first < cols; first += share) {
        size_t n = cols - first < share ? cols - first : share;
        float scale = best_scale(dtype, weights + first, n), value;
        finite &= isfinite(scale);
        ltn_quant_put_scale(dtype, row_scales, first / share, scale);
        for (size_t c = first; c < first + n; c++)
            ltn_quant_put(dtype, row, c, ltn_quant_code(dtype, weights[c], scale, &value));
    }
    return finite;
}
