"""The C core in NumPy, float64 and plain loops: the readable specification each C step is tested against.

Letters as in csrc/aqlm.h: weight W [out, in], g = in_group_size, J = in / g groups, K codebooks of E entries;
working codes [out, J, K], codebooks [K, E, g] (out_group_size 1), scales [out].
"""

import itertools
import math

import numpy as np

MASK = 2**64 - 1


class Rng:
    """xoshiro256** seeded by splitmix64."""

    def __init__(self, seed):
        self.s = []
        for _ in range(4):
            seed = (seed + 0x9E3779B97F4A7C15) & MASK
            z = seed
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
            self.s.append(z ^ (z >> 31))

    def next(self):
        def rotate(x, k):
            return ((x << k) | (x >> (64 - k))) & MASK

        s = self.s
        result, t = (rotate((s[1] * 5) & MASK, 7) * 9) & MASK, (s[1] << 17) & MASK
        s[2] ^= s[0]
        s[3] ^= s[1]
        s[1] ^= s[2]
        s[0] ^= s[3]
        s[2] ^= t
        s[3] = rotate(s[3], 45)
        return result

    def below(self, n):
        while True:
            x = self.next()
            if x >= 2**64 % n:
                return x % n


# ---- the stored weight


def unpack_codes(stored, nbits):
    return stored.astype(np.int64) & (2**nbits - 1)


def decode_stored(codes, codebooks, scales):
    """W [out, in] of codes [O, J, K] as on disk, codebooks [K, E, og, g], scales [O]."""
    K, E, og, g = codebooks.shape
    codes = unpack_codes(codes, int(math.log2(E)))
    groups = sum(codebooks[k].astype(np.float64)[codes[:, :, k]] for k in range(K))  # [O, J, og, g]
    groups = groups * scales.reshape(-1, 1, 1, 1).astype(np.float64)
    return groups.transpose(0, 2, 1, 3).reshape(codes.shape[0] * og, codes.shape[1] * g)


def decode(codes, codebooks, scales):
    return decode_stored(codes, codebooks[:, :, None, :], scales)


# ---- H


def error(W, H, Wq=0.0):
    D = np.asarray(W, np.float64) - Wq
    return float(np.einsum("oi,ij,oj->", D, H.astype(np.float64), D))


def factor_hessian(H, g, relative_damp):
    """Order of the groups, R (upper, in that order) with P H P^T + damp = R R^T, metric_j = R_jj R_jj^T."""
    J = len(H) // g
    traces = [np.trace(H[j * g : (j + 1) * g, j * g : (j + 1) * g], dtype=np.float64) for j in range(J)]
    order = sorted(range(J), key=lambda j: (-traces[j], j))
    index = np.concatenate([np.arange(j * g, (j + 1) * g) for j in order])
    A = H.astype(np.float64)[np.ix_(index, index)] + relative_damp * sum(traces) / len(H) * np.eye(len(H))
    R = np.linalg.cholesky(A[::-1, ::-1])[::-1, ::-1]
    blocks = [R[j * g : (j + 1) * g, j * g : (j + 1) * g] for j in range(J)]
    feedback = np.concatenate(
        [R[:, j * g : (j + 1) * g] @ np.linalg.inv(block) for j, block in enumerate(blocks)], axis=1
    )
    for j in range(J):
        feedback[j * g :, j * g : (j + 1) * g] = 0.0
    return np.array(order), feedback, np.array([block @ block.T for block in blocks])


def correct_weight(W, C, H, alpha, relative_damp):
    """W + alpha W C (H + damp)^-1."""
    damped = H.astype(np.float64) + relative_damp * np.diag(H).mean(dtype=np.float64) * np.eye(len(H))
    return W + alpha * W.astype(np.float64) @ C.astype(np.float64) @ np.linalg.inv(damped)


def gaussian_reference(eigenvalues, rate):
    low, high = 0.0, float(eigenvalues.max())
    for _ in range(200):
        theta = (low + high) / 2
        bits = 0.5 * np.log2(np.maximum(eigenvalues / theta, 1.0)).mean()
        low, high = (theta, high) if bits > rate else (low, theta)
    return float(np.minimum(theta, eigenvalues).sum() / eigenvalues.sum())


# ---- k-means


def residual_kmeans(W, scales, K, B, g, init_max_iter, tolerance, seed, column_weight=None):
    out, J, E = len(W), W.shape[1] // g, 2**B
    weight = np.ones(W.shape[1]) if column_weight is None else column_weight.astype(np.float64)
    weight = weight.reshape(1, J, g) * (scales.astype(np.float64) ** 2).reshape(-1, 1, 1)
    residual = (W / scales[:, None]).astype(np.float64).reshape(out, J, g)
    codes, codebooks, rng = np.zeros((out, J, K), np.int64), np.zeros((K, E, g)), Rng(seed)
    for k in range(K):
        points = residual.reshape(-1, g)
        order = list(range(len(points)))
        for e in range(min(E, len(points))):
            pick = e + rng.below(len(points) - e)
            order[e], order[pick] = order[pick], order[e]
        entries = points[[order[e % len(points)] for e in range(E)]].copy()

        def assign(entries, residual=residual):
            distance = (weight[:, :, None] * (residual[:, :, None] - entries) ** 2).sum(-1)
            return distance.argmin(-1), distance.min(-1)

        nearest, distance = assign(entries)
        for _ in range(init_max_iter):
            before, worst = distance.sum(), iter(np.argsort(-distance.T.ravel(), kind="stable"))
            for e in range(E):
                members = nearest == e
                if members.any():
                    mass = weight[members].sum(0)
                    mean = (weight[members] * residual[members]).sum(0) / np.where(mass > 0, mass, 1)
                    entries[e] = np.where(mass > 0, mean, entries[e])
                else:
                    point = next(worst)  # counted group by group: j * out + o
                    entries[e] = residual[point % out, point // out]
            nearest, distance = assign(entries)
            if not before - distance.sum() > tolerance * before:
                break
        codes[:, :, k], codebooks[k] = nearest, entries
        residual = residual - entries[nearest]
    return codes, codebooks


# ---- code search: the best codes of one group, cost q S q - 2 target q


def search_pairs(codes, codebooks, S, target, from_scratch, beam_size):
    """A beam over all codebooks but the last two, each of its states with its best pair of those; a sweep (K > 2) keeps
    the codes it came with where nothing better is found."""
    K, E, _ = codebooks.shape

    def cost(chosen):
        q = sum((codebooks[k, c] for k, c in enumerate(chosen)), np.zeros(len(target)))
        return q @ S @ q - 2 * target @ q

    beam = [()]
    for _ in range(K - 2):
        beam = sorted(((*b, e) for b in beam for e in range(E)), key=cost)[:beam_size]
    found = []
    for b in beam:
        q = sum((codebooks[k, c] for k, c in enumerate(b)), np.zeros(len(target)))
        q = q + codebooks[K - 2][:, None] + codebooks[K - 1][None]  # [E, E, g]
        costs = np.einsum("abd,de,abe->ab", q, S, q) - 2 * q @ target
        found.append((*b, *np.unravel_index(costs.argmin(), costs.shape)))
    best = min(found, key=cost)
    if from_scratch or cost(best) < cost(tuple(codes)):
        codes[:] = best


def search_beam(codes, codebooks, S, target, books, beam_size):
    """books: the order in which codebooks are searched again; None: from scratch, then in order."""
    K, E, _ = codebooks.shape

    def cost(chosen):
        q = sum((codebooks[k, c] for k, c in enumerate(chosen) if c is not None), np.zeros(len(target)))
        return q @ S @ q - 2 * target @ q

    def expand(beam, k):
        beam = list(dict.fromkeys((*b[:k], None, *b[k + 1 :]) for b in beam))
        options = ((*b[:k], e, *b[k + 1 :]) for b in beam for e in range(E))
        return sorted(options, key=cost)[:beam_size]

    beam = [(None,) * K if books is None else tuple(codes)]
    for k in range(K if books is None else 0):
        beam = expand(beam, k)
    if books is not None or K > 1:
        for k in range(K) if books is None else books:
            beam = expand(beam, k)
    if books is None or cost(beam[0]) < cost(tuple(codes)):
        codes[:] = beam[0]


def _search(codes, codebooks, S, target, books, beam_size, pairs):
    if pairs or not beam_size:
        search_pairs(codes, codebooks, S, target, books is None, beam_size or 4)
    else:
        search_beam(codes, codebooks, S, target, books, beam_size)


def shuffled(n, rng):
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        pick = rng.below(i + 1)
        order[i], order[pick] = order[pick], order[i]
    return order


def search_sweep(codes, W, H, codebooks, scales, beam_size, seed, pairs=False):
    """Each group in a random order, at its best given all others."""
    K, _, g = codebooks.shape
    rng, codes, H = Rng(seed), codes.astype(np.int64), H.astype(np.float64)
    order = shuffled(codes.shape[1], rng)
    books = [shuffled(K, rng) for _ in order]
    for o, (j, its_books) in itertools.product(range(len(W)), zip(order, books, strict=True)):
        here = slice(j * g, (j + 1) * g)
        D = W[o] - decode(codes[o : o + 1], codebooks, scales[o : o + 1])[0]
        D[here] = W[o, here]  # this group taken out
        _search(codes[o, j], codebooks, H[here, here], D @ H[:, here] / scales[o], its_books, beam_size, pairs)
    return codes


def search_ldl(W, order, feedback, metric, codebooks, scales, beam_size, pairs=False):
    """Groups in order; each aims at its weights plus what the errors already made ask of it."""
    K, _, g = codebooks.shape
    codes = np.zeros((len(W), len(order), K), np.int64)
    for o in range(len(W)):
        D = np.zeros(W.shape[1])  # in order
        for i, j in enumerate(order):
            here = slice(i * g, (i + 1) * g)
            w = W[o, j * g : (j + 1) * g].astype(np.float64)
            target = (w + D @ feedback[:, here]) @ metric[i] / scales[o]
            _search(codes[o, j], codebooks, metric[i], target, None, beam_size, pairs)
            D[here] = w - scales[o] * sum(codebooks[k, codes[o, j, k]] for k in range(K))
    return codes


# ---- updates


def design(codes, E):
    """The 0/1 matrix [J, K * E] of each output: its unscaled row is design @ entries, group by group."""
    out, J, K = codes.shape
    X = np.zeros((out, J, K * E))
    for k in range(K):
        np.put_along_axis(X, (codes[:, :, k] + k * E)[:, :, None], 1.0, 2)
    return X


def update_codebooks(W, H, codes, scales, K, E, g):
    """The least-squares codebooks and the error they reach, by the dense normal equations."""
    X, J = design(codes, E) * scales[:, None, None], codes.shape[1]
    blocks = H.astype(np.float64).reshape(J, g, J, g)
    A = np.einsum("ojp,jcid,oiq->pcqd", X, blocks, X, optimize=True).reshape(K * E * g, K * E * g)
    b = np.einsum("ojp,ojd->pd", X, (W.astype(np.float64) @ H).reshape(len(W), J, g)).ravel()
    entries = np.linalg.lstsq(A, b, rcond=1e-12)[0]
    return entries.reshape(K, E, g), error(W, H) - float(b @ entries)


def update_scales(W, H, codes, codebooks, scales):
    Q = decode(codes, codebooks, np.ones(len(W)))
    top, bottom = (np.einsum("oi,ij,oj->o", A, H.astype(np.float64), Q) for A in (W.astype(np.float64), Q))
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), scales)


def update_adam(codebooks, scales, moments, W, H, codes, steps, learning_rate, steps_before=0):
    """Adam with betas (0, 0.95), AMSGrad and eps 1e-8 on tr(D H D^T) / out."""
    (K, E, g), (out, J, _) = codebooks.shape, codes.shape
    codebooks, scales, (moment, most) = codebooks.astype(np.float64), scales.astype(np.float64), moments.copy()
    for step in range(steps_before + 1, steps_before + steps + 1):
        slope = 2 * (decode(codes, codebooks, scales) - W) @ H.astype(np.float64) / out
        along_entries = np.einsum("ojp,ojd->pd", design(codes, E) * scales[:, None, None], slope.reshape(out, J, g))
        along_scales = (slope * decode(codes, codebooks, np.ones(out))).sum(1)
        gradient = np.concatenate([along_entries.ravel(), along_scales])
        moment = 0.95 * moment + 0.05 * gradient**2
        most = np.maximum(most, moment)
        move = learning_rate * gradient / (np.sqrt(most / (1 - 0.95**step)) + 1e-8)
        codebooks, scales = codebooks - move[:-out].reshape(K, E, g), scales - move[-out:]
    return codebooks, scales, np.array([moment, most])


def buffer_step(buffer, gradient, first, second, divisor, learning_rate, beta1, beta2, step):
    """(buffer, first, second) after step number `step` of Adam with eps 1e-12."""
    gradient = gradient / divisor
    first, second = beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient**2
    size = np.sqrt(second / (1 - beta2**step)) + 1e-12
    return buffer - learning_rate * first / (1 - beta1**step) / size, first, second


def blocks_of_moments(moments, power, levels, least=0):
    """What is left of moments in blocks of 256 bytes that share a scale: (scale byte)^power with the moment's sign, the
    byte at least `least` but for 0."""
    flat = moments.ravel()
    kept = np.empty_like(flat)
    for at in range(0, flat.size, 256):
        roots = np.abs(flat[at : at + 256]) ** (1 / power)
        scale = roots.max() / levels or 1
        bytes_ = np.where(roots > 0, np.maximum(np.rint(roots / scale), least), 0)
        kept[at : at + 256] = np.sign(flat[at : at + 256]) * (scale * bytes_) ** power
    return kept.reshape(moments.shape)


# ---- rounding with error feedback, lattices, transforms


def gptq(W, H, order, scales, zeros, bits, group_size):
    """Codes [out, in] as GPTQ's own algorithm finds them (arXiv 2210.17323, algorithm 1): by the inverse of H, whose
    Cholesky factor says how the later columns make up for the error of each; scales, zeros [out, in / group_size].
    """
    W, n = W.astype(np.float64).copy(), len(order)
    U = np.linalg.cholesky(np.linalg.inv(H.astype(np.float64)[np.ix_(order, order)])).T
    codes = np.zeros(W.shape, np.uint8)
    for i, column in enumerate(order):
        scale, zero = (grid[:, column // group_size].astype(np.float64) for grid in (scales, zeros))
        codes[:, column] = np.floor(W[:, column] / scale + zero + 0.5).clip(0, 2**bits - 1)
        error = (W[:, column] - scale * (codes[:, column] - zero)) / U[i, i]
        for later in range(i + 1, n):
            W[:, order[later]] -= error * U[i, later]
    return codes


def ldlq(W, order, feedback, width, nearest):
    """What W [out, in] decodes to by LDLQ in groups of `width` columns (QuIP, arXiv 2307.13304, section 3)."""
    W, rounded = W.astype(np.float64), np.zeros(W.shape)
    columns = np.concatenate([np.arange(j * width, (j + 1) * width) for j in order])
    for first in range(0, len(columns), width):
        now, done = columns[first : first + width], columns[:first]
        errors = (W - rounded)[:, done]
        rounded[:, now] = nearest(W[:, now] + errors @ feedback[:first, first : first + width].astype(np.float64))
    return rounded


def e8p():
    """All 2^16 vectors of E8P [65536, 8] by code: signs of the first 7, shift, pattern (csrc/aqlm/rounding.h)."""
    vectors, left = [], 29
    for magnitudes in itertools.product((0.5, 1.5, 2.5), repeat=8):
        norm = sum(m * m for m in magnitudes)
        if norm > 12 or (norm > 10 and (2.5 in magnitudes or not left)):
            continue
        left -= norm > 10
        for code in range(256):
            signs = [-1 if code >> i & 1 else 1 for i in range(7)]
            total = sum(s * m for s, m in zip(signs, magnitudes, strict=False))
            last = magnitudes[7] if (total + magnitudes[7]) % 2 == 0 else -magnitudes[7]
            shift = 0.25 if code & 128 else -0.25
            vectors.append([s * m + shift for s, m in zip(signs, magnitudes, strict=False)] + [last + shift])
    return np.array(vectors)
