"""Which tensors of a checkpoint a rank keeps of a layer, whatever order they come in. Knows nothing of vLLM.

A layer of vLLM may be several of the checkpoint's side by side, such as q, k and v: its parts. Tensor parallel ranks
have some outputs or some inputs of each, whole groups of them; codebooks are everyone's.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import wrong
from ..format import WEIGHT, Format
from ..io.checkpoint import check_values, tensor_name
from ..nn.embedding import QuantizedEmbedding
from ..nn.linear import QuantizedLayer, QuantizedLinear

__all__ = [
    "DENSE_PART",
    "ONE_RANK",
    "PADDING",
    "PartsLoading",
    "Share",
    "cut_dense",
    "cut_quantized",
    "even_places",
    "kept_groups",
]

DENSE_PART = "weight"  # the tensor of a part that is not quantized
ONE_RANK = (0, 1)  # (rank, ranks) of what is not split
PADDING = -1  # in the place of an output that the checkpoint does not have
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Share(NamedTuple):
    """What a rank has of a part: outputs and inputs, int64, by their places in the checkpoint; `PADDING` for none."""

    outputs: Tensor
    inputs: Tensor


def kept_groups(name: str, side: str, places: Tensor, group: int) -> Tensor:
    """The groups of `group` inputs or outputs that make up `places`; `PADDING` for a group of padding.

    Raises ValueError, naming the layer `name` and the `side` ("in" or "out"), if a group is split.
    """
    whole = len(places) % group == 0
    if whole:
        groups = places.view(-1, group)
        first = groups[:, :1]
        runs = (groups == first + torch.arange(group)).all(1) & (first[:, 0] % group == 0)
        whole = bool((runs | (groups == PADDING).all(1)).all())
    if not whole:
        low, high = int(places[places >= 0].min()), int(places.max())
        raise ValueError(
            f"tensor_parallel_size: got one with {side}puts {low} to {high} of layer {name} on a rank, "
            f"expected one that splits no group of {side}_group_size={group}"
        )
    return torch.where(first[:, 0] == PADDING, PADDING, first[:, 0] // group)


def cut_quantized(
    name: str, tensors: Mapping[str, Tensor], share: Share, formats: Collection[Format]
) -> dict[str, Tensor]:
    """`WEIGHT`'s tensors of the share of the quantized layer called `name`; scales of padding are zero.

    formats: those that config.json knows. Raises ValueError, naming a tensor, whose shape or dtype does not fit the
    others or these formats, and `kept_groups`'s.
    """
    codes, books, scales = (tensors[part] for part in WEIGHT)
    label = tensor_name(name, "codebooks")
    if books.dim() != 4 or books.dtype not in _FLOATS:
        raise ValueError(f"{label}: got {books.dtype} {list(books.shape)}, expected floats [K, 2^B, og, g]")
    format = Format.of_codebooks(tuple(books.shape))
    if books.shape[1] != format.entries or format not in formats:
        expected = " or ".join(sorted(known.scheme for known in formats))
        raise ValueError(f"{label}: got {list(books.shape)}, expected {expected}, as config.json says")
    stored = torch.int8 if format.code_itemsize == 1 else torch.int16
    rows, groups = (codes.shape[0], codes.shape[1]) if codes.dim() == 3 else (0, 0)
    shapes = format.shapes(rows * format.out_group_size, groups * format.in_group_size)
    for part, tensor, dtype in (("codes", codes, stored), ("scales", scales, books.dtype)):
        if tensor.dtype != dtype or tuple(tensor.shape) != shapes[part] or rows * groups == 0:
            raise ValueError(
                f"{tensor_name(name, part)}: got {tensor.dtype} {list(tensor.shape)}, "
                f"expected {dtype} {list(shapes[part])} for {format.scheme}"
            )
    out_groups = kept_groups(name, "out", share.outputs, format.out_group_size)
    in_groups = kept_groups(name, "in", share.inputs, format.in_group_size)
    _check_inside(name, "out", share.outputs, rows * format.out_group_size)
    _check_inside(name, "in", share.inputs, groups * format.in_group_size)
    kept = _take(_take(codes, 0, out_groups), 1, in_groups)
    kept_scales = _take(scales, 0, out_groups)
    if bool((out_groups == PADDING).any()):
        kept_scales = kept_scales * (out_groups != PADDING).view(-1, 1, 1, 1)
    return {"codes": kept, "codebooks": books, "scales": kept_scales}


def cut_dense(name: str, weight: Tensor, share: Share) -> Tensor:
    """The share of a dense weight [out, in]; padding is zero. Raises ValueError naming it for another shape."""
    label = tensor_name(name, DENSE_PART)
    if weight.dim() != 2 or weight.dtype not in _FLOATS:
        raise ValueError(f"{label}: got {weight.dtype} {list(weight.shape)}, expected floats [out, in]")
    for side, places, size in zip(("out", "in"), share, weight.shape, strict=True):
        _check_inside(name, side, places, size)
    kept = _take(_take(weight, 0, share.outputs), 1, share.inputs)
    return kept * (share.outputs != PADDING)[:, None] if bool((share.outputs == PADDING).any()) else kept


class PartsLoading:
    """The parts of one layer of vLLM while their tensors come, in any order.

    name: of the layer. formats: those that config.json knows. device, dtype: of what is kept; codebooks and scales keep
    their own dtype. is_embedding: rows are looked up.
    """

    def __init__(
        self,
        name: str,
        formats: Collection[Format],
        device: torch.device,
        dtype: torch.dtype,
        is_embedding: bool = False,
    ) -> None:
        self.name, self.formats, self.device, self.dtype = name, formats, device, dtype
        self.is_embedding = is_embedding
        self.parts: dict[Hashable, nn.Module] = {}
        self._tensors: dict[Hashable, dict[str, Tensor]] = {}

    def label(self, part: Hashable) -> str:
        """How errors call a part: the layer itself, if it is all of it."""
        names = part if isinstance(part, tuple) else () if part is None else (part,)
        return ".".join(map(str, (self.name, *names)))

    def add(self, part: Hashable, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """Note the tensor `name`, of `WEIGHT` or `DENSE_PART`; returns the part's when it is whole.

        `settle` is to be called then. Raises ValueError for a tensor that comes twice or does not go with the others.
        """
        if part in self.parts:
            raise ValueError(f"{tensor_name(self.label(part), name)}: unexpected, that layer is whole without it")
        tensors = self._tensors.setdefault(part, {})
        if name in tensors or (tensors and (name == DENSE_PART or DENSE_PART in tensors)):
            raise ValueError(f"{tensor_name(self.label(part), name)}: unexpected beside {', '.join(sorted(tensors))}")
        tensors[name] = tensor
        return tensors if name == DENSE_PART or set(WEIGHT) <= set(tensors) else None

    @staticmethod
    def sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(outputs, inputs) that a whole part has in the checkpoint, by its tensors; (0, 0) if these fit no layer."""
        if DENSE_PART in tensors:
            shape = tuple(tensors[DENSE_PART].shape)
            return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)
        codes, books = tensors["codes"], tensors["codebooks"]
        if codes.dim() != 3 or books.dim() != 4:
            return 0, 0
        return codes.shape[0] * books.shape[2], codes.shape[1] * books.shape[3]

    @torch.no_grad()
    def settle(self, part: Hashable, share: Share) -> None:
        """Make the rank's share of a whole part a layer, and forget its tensors."""
        tensors, name = self._tensors.pop(part), self.label(part)
        n_in, n_out = len(share.inputs), len(share.outputs)
        if DENSE_PART in tensors:
            dense: nn.Embedding | nn.Linear = nn.Linear(n_in, n_out, False, "meta")
            if self.is_embedding:
                dense = nn.Embedding(n_out, n_in, device="meta")
            weight = cut_dense(name, tensors[DENSE_PART], share)
            dense.weight = self._kept(weight.to(self.dtype))
            self.parts[part] = dense
            return
        kept = cut_quantized(name, tensors, share, self.formats)
        format = Format.of_codebooks(tuple(kept["codebooks"].shape))
        layer: QuantizedLayer
        if self.is_embedding:
            layer = QuantizedEmbedding(n_out, n_in, format, device="meta")
            layer.output_dtype = self.dtype
        else:
            layer = QuantizedLinear(n_in, n_out, False, format, "meta")
        for each in WEIGHT:
            setattr(layer, each, self._kept(kept[each]))
        check_values(name, layer)
        layer.pack()
        self.parts[part] = layer

    def _kept(self, tensor: Tensor) -> nn.Parameter:
        """On the device, without what is left of the file."""
        return nn.Parameter(tensor.to(self.device, copy=True).contiguous(), requires_grad=False)

    def finish(self, wanted: Sequence[Hashable] = ()) -> list[Any]:
        """The layers of the `wanted` parts, linears or embeddings, quantized or dense; they are forgotten here.

        Raises ValueError naming a tensor that did not come.
        """
        for part, tensors in self._tensors.items():
            missing = next(name for name in WEIGHT if name not in tensors)
            raise ValueError(f"{tensor_name(self.label(part), missing)}: missing from the checkpoint")
        for part in wanted:
            if part not in self.parts:
                raise ValueError(f"{tensor_name(self.label(part), 'codes')}: missing from the checkpoint")
        return [self.parts.pop(part) for part in wanted]


def even_places(name: str, stored: int, size: int, rank: int, ranks: int) -> Tensor:
    """The `rank`'s `size` of `stored` outputs or inputs, split evenly over `ranks`.

    Raises ValueError, naming the layer `name`, if these are not so many.
    """
    if size * ranks != stored:
        raise ValueError(
            f"{name}: got {stored} outputs or inputs, expected {size * ranks}, {size} on each of {ranks} ranks"
        )
    return torch.arange(rank * size, (rank + 1) * size)


def _check_inside(name: str, side: str, places: Tensor, size: int) -> None:
    if int(places.max()) >= size:
        raise wrong(f"{side}_features", size, f"at least {int(places.max()) + 1} of layer {name}")


def _take(tensor: Tensor, dim: int, places: Tensor) -> Tensor:
    """Those places along a dimension; for `PADDING` the first."""
    start, count = int(places[0]), len(places)
    if start >= 0 and torch.equal(places, torch.arange(start, start + count)):
        return tensor.narrow(dim, start, count)
    return tensor.index_select(dim, places.clamp(min=0).to(tensor.device))
