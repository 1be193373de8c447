/* Normal values by place: what benches and tests fill tensors with. Usable from C and CUDA. */
#ifndef LTN_CONV_RANDOM_H
#define LTN_CONV_RANDOM_H

#include "kernels/conv/index.h"

#include <math.h>

/* splitmix64's finalizer (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014). */
LTN_HD uint64_t conv_mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Mean 0, variance 1 (Box and Muller). */
LTN_HD float conv_normal(uint64_t seed, uint64_t i)
{
    uint64_t r = conv_mix(conv_mix(seed + 0x9e3779b97f4a7c15u) + i * 0x9e3779b97f4a7c15u);
    float u = ((float)(r >> 40) + 0.5f) * 0x1p-24f, angle = (float)(r & 0xffffff) * (6.2831853f * 0x1p-24f);
    return sqrtf(-2 * logf(u)) * cosf(angle);
}

#endif
