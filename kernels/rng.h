/* Philox4x32-10, the counter-based random number generator of Salmon, Moraes, Dror and Shaw, "Parallel random
 * numbers: as easy as 1, 2, 3" (SC 2011). A draw is a pure function of (seed, number), so there is no state
 * to save, and any machine that resumes or forks a text draws the same. For C and CUDA. */
#ifndef LTN_KERNELS_RNG_H
#define LTN_KERNELS_RNG_H

#include <stdint.h>

#ifdef __CUDACC__
#define LTN_BOTH static inline __host__ __device__
#else
#define LTN_BOTH static inline
#endif

/* Ten rounds on counter[4] under key[2], in place. */
LTN_BOTH void ltn_philox(uint32_t counter[4], uint32_t key0, uint32_t key1)
{
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * counter[0];
        uint64_t b = (uint64_t)0xCD9E8D57u * counter[2];
        uint32_t next[4] = {(uint32_t)(b >> 32) ^ counter[1] ^ key0, (uint32_t)b,
                            (uint32_t)(a >> 32) ^ counter[3] ^ key1, (uint32_t)a};
        for (int i = 0; i < 4; i++)
            counter[i] = next[i];
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

/* Draw number `draw` under `seed`: uniform in [0, 1), all 53 bits of a double random. */
LTN_BOTH double ltn_uniform(uint64_t seed, uint64_t draw)
{
    uint32_t counter[4] = {(uint32_t)draw, (uint32_t)(draw >> 32), 0, 0};
    ltn_philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
    return (double)((uint64_t)(counter[0] >> 5) << 26 | counter[1] >> 6) * 0x1p-53;
}

#endif
