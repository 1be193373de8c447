/* Random numbers for whole texts. */
#ifndef LTN_RNG_H
#define LTN_RNG_H

#include "kernels/rng.h"

/* The seed of text number `text` of the many that share one seed, independent of each other: a block that no
 * draw uses, for the counter's third word is 0 in all of theirs. */
static inline uint64_t ltn_text_seed(uint64_t seed, uint64_t text)
{
    uint32_t counter[4] = {(uint32_t)text, (uint32_t)(text >> 32), 1, 0};
    ltn_philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
    return (uint64_t)counter[1] << 32 | counter[0];
}

#endif
