/* The 16-bit element types: every value, and every rounding, against their definitions. */
#include "kernels/dtype.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

static double f16_value(unsigned half) /* of a finite one, by the definition of binary16 */
{
    int exponent = half >> 10 & 31, fraction = half & 1023;
    double value = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return half & 0x8000 ? -value : value;
}

static double bf16_value(unsigned half)
{
    int exponent = half >> 7 & 255, fraction = half & 127;
    double value = exponent ? ldexp(128 + fraction, exponent - 134) : ldexp(fraction, -133);
    return half & 0x8000 ? -value : value;
}

static uint16_t narrow(float value, enum ltn_dtype dtype)
{
    return dtype == LTN_BF16 ? ltn_f32_to_bf16(value) : ltn_f32_to_f16(value);
}

static void test_every_half(void **state)
{
    (void)state;
    for (enum ltn_dtype dtype = LTN_BF16; dtype <= LTN_F16; dtype++) {
        unsigned infinity = dtype == LTN_BF16 ? 0x7f80 : 0x7c00;
        for (unsigned half = 0; half < 65536; half++) {
            uint16_t stored = (uint16_t)half;
            float value = ltn_load(&stored, dtype, 0);
            unsigned magnitude = half & 0x7fff;
            if (magnitude > infinity) {
                assert_true(isnan(value));
                unsigned back = narrow(value, dtype) & 0x7fff;
                assert_true(back > infinity);
                continue;
            }
            assert_int_equal(narrow(value, dtype), half);
            assert_int_equal(signbit(value) != 0, half >> 15);
            if (magnitude == infinity)
                assert_true(isinf(value));
            else
                assert_true(value == (dtype == LTN_BF16 ? bf16_value(half) : f16_value(half)));
        }
    }
}

static void test_rounding(void **state)
{
    (void)state;
    for (enum ltn_dtype dtype = LTN_BF16; dtype <= LTN_F16; dtype++) {
        unsigned infinity = dtype == LTN_BF16 ? 0x7f80 : 0x7c00;
        for (unsigned half = 0; half + 1 < infinity; half++) {
            uint16_t low = (uint16_t)half, high = (uint16_t)(half + 1);
            float middle =
                (float)(((double)ltn_load(&low, dtype, 0) + (double)ltn_load(&high, dtype, 0)) / 2);
            for (int negative = 0; negative < 2; negative++) {
                float sign = negative ? -1 : 1;
                unsigned bit = negative ? 0x8000 : 0;
                assert_int_equal(narrow(sign * middle, dtype), bit | (half & 1 ? high : low));
                assert_int_equal(narrow(sign * nextafterf(middle, INFINITY), dtype), bit | high);
                assert_int_equal(narrow(sign * nextafterf(middle, 0), dtype), bit | low);
            }
        }
        assert_int_equal(narrow(INFINITY, dtype), infinity);
        assert_int_equal(narrow(-INFINITY, dtype), infinity | 0x8000);
        assert_int_equal(narrow(FLT_MAX, dtype), infinity);
    }
    assert_int_equal(ltn_f32_to_f16(65519.996f), 0x7bff);
    assert_int_equal(ltn_f32_to_f16(65520.0f), 0x7c00);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_half),
        cmocka_unit_test(test_rounding),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
