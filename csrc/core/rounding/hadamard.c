/* hadamard.c: which Hadamard matrices there are: powers of two, Paley's, and their products. What the transform by them
 * needs on the CPU (transform.c) and on GPUs; of nothing else of this library. */
#include "aqlm/rounding.h"

enum { MOST_PALEY = 1024 };

static bool is_prime(int64_t n) {
    if (n < 2) return false;
    for (int64_t d = 2; d * d <= n; d++)
        if (n % d == 0) return false;
    return true;
}

/* Paley's first construction has order q + 1, q = 3 mod 4; the second 2 (q + 1), q = 1 mod 4. */
static bool is_known(int64_t odd) { return 4 * odd <= MOST_PALEY && (is_prime(4 * odd - 1) || is_prime(2 * odd - 1)); }

/* odd as a product of few m with a matrix of order 4 m each; their number, or -1. */
static int split(int64_t odd, int twos, int64_t *factors, int most) {
    if (odd == 1) return 0;
    if (twos < 2 || most == 0) return -1;
    for (int64_t m = odd; m > 1; m -= 2) {
        if (odd % m || !is_known(m)) continue;
        const int more = split(odd / m, twos - 2, factors + 1, most - 1);
        if (more < 0) continue;
        factors[0] = 4 * m;
        return more + 1;
    }
    return -1;
}

static int twos_of(int64_t *n) {
    int twos = 0;
    for (; *n % 2 == 0; *n /= 2) twos++;
    return twos;
}

int aqlm_hadamard_factors(int64_t order, int64_t factors[AQLM_HADAMARD_FACTORS]) {
    const int twos = twos_of(&order);
    return split(order, twos, factors, AQLM_HADAMARD_FACTORS);
}

int64_t aqlm_hadamard_order(int64_t n) {
    if (n < 1) return 0;
    int64_t odd = n, factors[AQLM_HADAMARD_FACTORS];
    const int twos = twos_of(&odd);
    for (int64_t m = odd; m > 1; m -= 2)
        if (odd % m == 0 && split(m, twos, factors, AQLM_HADAMARD_FACTORS) >= 0) return m << twos;
    return (int64_t)1 << twos;
}

/* 1 for squares modulo the prime q, -1 for others, 0 for 0, by Euler's criterion. */
static int legendre(int64_t a, int64_t q) {
    int64_t power = 1, base = a % q;
    for (int64_t e = (q - 1) / 2; e; e /= 2, base = base * base % q)
        if (e & 1) power = power * base % q;
    return power == 0 ? 0 : power == 1 ? 1 : -1;
}

aqlm_status aqlm_paley(int8_t *signs, int64_t order) {
    if (order < 12 || order % 8 != 4 || !is_known(order / 4)) return AQLM_BAD_ARGUMENT;
    const bool first = is_prime(order - 1);
    const int64_t q = first ? order - 1 : order / 2 - 1, n = q + 1;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            int core = 0; /* Jacobsthal's matrix with a border */
            if (i && j) core = legendre(i > j ? i - j : i - j + q, q);
            else if (i || j) core = first && i ? -1 : 1;
            if (first) {
                signs[i * n + j] = (int8_t)(i == j ? 1 : core);
                continue;
            }
            int8_t *to = signs + 2 * i * order + 2 * j; /* core [1 1; 1 -1], on the diagonal [1 -1; -1 -1] */
            to[0] = (int8_t)(i == j ? 1 : core);
            to[1] = to[order] = (int8_t)(i == j ? -1 : core);
            to[order + 1] = (int8_t)(i == j ? -1 : -core);
        }
    return AQLM_OK;
}
