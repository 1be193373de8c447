#include "kernels/quant.h"

static float largest(const float *w, size_t n)
{
    float max = 0;
    for (size_t i = 0; i < n; i++)
        max = fabsf(w[i]) > max ? fabsf(w[i]) : max;
    return max;
}

static float to_f16(float scale)
{
    return ltn_f16_to_f32(ltn_f32_to_f16(scale));
}

static double lost(const float *w, size_t n, float scale)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        float value;
        ltn_quant_code(LTN_Q4, w[i], scale, &value);
        sum += (double)(w[i] - value) * (w[i] - value);
    }
    return sum;
}

/* The weight that is largest lies at -8 scales or, where that loses less, nearer or farther: its code is one
 * of 16, and what the others lose counts too. */
static float q4_scale(const float *w, size_t n)
{
    float extreme = 0, best = 0;
    for (size_t i = 0; i < n; i++)
        extreme = fabsf(w[i]) > fabsf(extreme) ? w[i] : extreme;
    double least = INFINITY;
    for (float at = 6.4f; at < 9.3f; at += 0.1f) {
        float scale = to_f16(-extreme / at);
        if (!isfinite(scale))
            return scale;
        double loss = lost(w, n, scale);
        if (loss < least) {
            least = loss;
            best = scale;
        }
    }
    return best;
}

float ltn_quant_scale(enum ltn_dtype dtype, const float *weights, size_t n)
{
    if (dtype == LTN_Q8)
        return to_f16(largest(weights, n) / 127);
    if (dtype == LTN_FP8)
        return largest(weights, n) / 448;
    return q4_scale(weights, n);
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
        float scale = ltn_quant_scale(dtype, weights + first, n), value;
        finite &= isfinite(scale);
        ltn_quant_put_scale(dtype, row_scales, first / share, scale);
        for (size_t c = first; c < first + n; c++)
            ltn_quant_put(dtype, row, c, ltn_quant_code(dtype, weights[c], scale, &value));
    }
    return finite;
}
