/* rng.h: random numbers, the same on every machine (rng.c): xoshiro256**, seeded by splitmix64. */
#ifndef AQLM_CORE_RNG_H
#define AQLM_CORE_RNG_H

#include <stdint.h>

typedef struct aqlm_rng {
    uint64_t s[4];
} aqlm_rng;
aqlm_rng aqlm_rng_seed(uint64_t seed);
uint64_t aqlm_rng_next(aqlm_rng *rng);
int64_t aqlm_rng_below(aqlm_rng *rng, int64_t n); /* uniform in 0..n-1, no modulo bias */

#endif
