"""Product quantization, whatever H is: each part of a group has a codebook of its own (Jegou et al., 2011)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..config import KmeansOptions
from ..core import arrays, verbs
from ..core.verbs import Array
from ..errors import wrong
from ..format import Format
from .base import LayerProblem, QuantizedWeight
from .kmeans import KMeans, without_hessian
from .state import check_searchable

_LEAST = 4  # weights of a group that k-means takes: smaller parts get zeros beside them


class Product(KMeans):
    """A group of g weights is cut into as many parts as there are codebooks, and k-means of each part gives a codebook
    of 2^B entries of g / K weights, by plain distance; a row's scale is its root mean square. It is an AQLM checkpoint
    whose entries are zero outside of their part. Its true bits count the part alone, as a file of this method has it.
    Block fine-tuning, after which entries would not be zero, is left out.
    """

    def check(self, format: Format, options: KmeansOptions) -> None:
        check_searchable(format)
        if format.in_group_size % format.num_codebooks:
            raise wrong("scheme", format.scheme, "as many codebooks as divide a group, such as '2x8g8' or '4x6g8'")

    def bits_per_weight(self, format: Format, shape: tuple[int, int], options: KmeansOptions) -> float:
        out, n = shape
        tables = format.codebook_bits() / format.num_codebooks
        return format.code_bits_per_weight() + (tables + 16 * out) / (out * n)

    def quantize(self, problem: LayerProblem, options: KmeansOptions) -> QuantizedWeight:
        state, format = without_hessian(problem), problem.format
        scales = arrays.root_sum_of_rows(state.weight, mean=True)
        size = format.in_group_size // format.num_codebooks
        part = Format(1, format.nbits_per_codebook, max(size, _LEAST))
        codes, entries = [], []
        for k in range(format.num_codebooks):
            points = _part(state.weight, format, k, part.in_group_size)
            fixed = (part, options.init_max_iter, 1e-4, problem.seed + k, None)
            of_part, book = state.timed("kmeans", verbs.residual_kmeans, points, scales, *fixed)
            codes.append(arrays.to_numpy(of_part)[..., 0])
            entries.append(arrays.to_numpy(book)[0, :, :size])
        books = np.zeros((format.num_codebooks, format.entries, format.in_group_size), np.float32)
        for k, entry in enumerate(entries):
            books[k, :, k * size : (k + 1) * size] = entry
        found = (np.ascontiguousarray(np.stack(codes, axis=-1)), books)
        of_kind, books_of_kind = (arrays.to_kind(array, problem.weight) for array in found)
        state.begin("kmeans", of_kind, books_of_kind, scales)
        return state.rounded(cg_steps=0)


def _part(weight: Array, format: Format, k: int, width: int) -> Array:
    """Part k of the groups of weight [out, in], in float32 [out, J width], zeros beside the weights of each."""
    out, size = weight.shape[0], format.in_group_size // format.num_codebooks
    groups = weight.reshape(out, -1, format.num_codebooks, size)
    shape = (out, int(groups.shape[1]), width)
    points: Any = np.zeros(shape, np.float32) if isinstance(weight, np.ndarray) else weight.new_zeros(shape)
    points[:, :, :size] = groups[:, :, k]
    return points.reshape(out, -1)


METHOD = Product()
