"""Random stored weights as tensors, and what they decode to by the formula."""

import torch

# out, in, K, B, og, g: every stored dtype, group size and odd bit width, sizes around lanes and tiles.
SHAPES = [
    (1, 8, 1, 1, 1, 8),
    (17, 40, 2, 8, 1, 8),
    (48, 64, 1, 16, 1, 8),
    (33, 96, 3, 12, 1, 4),
    (24, 64, 8, 5, 1, 16),
    (30, 64, 4, 8, 2, 32),
    (35, 48, 2, 9, 5, 8),
]
SHAPE_IDS = ["{2}x{3}g{5}-og{4}-{0}x{1}".format(*s) for s in SHAPES]
SMALL = (12, 16, 2, 3, 2, 4)


def random_weight(shape, dtype=torch.float32, seed=0):
    """codes, codebooks, scales as they lie on disk."""
    out, in_features, K, B, og, g = shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (B - 1)), 2 ** (B - 1), (out // og, in_features // g, K), generator=generator)
    codebooks = torch.randn(K, 2**B, og, g, generator=generator)
    scales = torch.rand(out // og, 1, 1, 1, generator=generator) + 0.5
    return codes.to(torch.int8 if B <= 8 else torch.int16), codebooks.to(dtype), scales.to(dtype)


def dense(codes, codebooks, scales):
    """W [out, in] in float64, by the formula (differentiable)."""
    K, E, og, g = codebooks.shape
    O, J, _ = codes.shape
    unsigned = codes.long() % E
    groups = sum(codebooks[k].double()[unsigned[:, :, k]] for k in range(K)) * scales.double().view(O, 1, 1, 1)
    return groups.transpose(1, 2).reshape(O * og, J * g)
