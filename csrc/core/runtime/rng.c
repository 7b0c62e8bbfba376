/* rng.c: xoshiro256** (Blackman and Vigna 2018), seeded by splitmix64. */
#include "core/runtime/rng.h"

aqlm_rng aqlm_rng_seed(uint64_t seed) {
    aqlm_rng rng;
    for (int i = 0; i < 4; i++) {
        uint64_t z = (seed += UINT64_C(0x9e3779b97f4a7c15));
        z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
        rng.s[i] = z ^ (z >> 31);
    }
    return rng;
}

static uint64_t rotate(uint64_t x, int k) { return (x << k) | (x >> (64 - k)); }

uint64_t aqlm_rng_next(aqlm_rng *rng) {
    uint64_t *s = rng->s, result = rotate(s[1] * 5, 7) * 9, t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate(s[3], 45);
    return result;
}

int64_t aqlm_rng_below(aqlm_rng *rng, int64_t n) {
    const uint64_t bound = (uint64_t)n, reject = -bound % bound;
    uint64_t x;
    do x = aqlm_rng_next(rng);
    while (x < reject);
    return (int64_t)(x % bound);
}
