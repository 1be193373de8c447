/* Shapes and values that the tests of kernels/conv share. */
#ifndef LTN_TESTS_CONV_SHAPES_H
#define LTN_TESTS_CONV_SHAPES_H

#include "kernels/conv/conv.h"

/* n values from a normal distribution, a function of the seed. */
void conv_random(float *out, int64_t n, uint64_t seed);

/* A valid shape with everything that can vary, of at most so many products; NCHW, f32. */
struct ltn_conv_shape conv_random_shape(uint64_t seed, double most_products);

/* "2x3x17x9 -> 8, 3x1, stride 2,1, pad ..." */
void conv_shape_text(char *out, size_t size, const struct ltn_conv_shape *s);

#endif
