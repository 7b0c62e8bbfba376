"""The dense weight of a quantized layer for whoever asks for it: decoded when its values are read, never changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map

__all__ = ["DecodedWeight"]


class DecodedWeight(Tensor):
    """A tensor whose values are decoded by each operation that reads them; shape, dtype and device need none.

    It is a leaf without gradient. An operation that would change it, or a view of it, raises ValueError: codes cannot
    take the change. While a layer is being loaded such operations are ignored instead (`settled`), since they are the
    model's initialisation of what the files hold. Copies, also by copy.deepcopy and pickle, are dense tensors.
    """

    _is_hf_initialized = True  # by this transformers 5 leaves a tensor as it is
    _decode: Callable[[], Tensor]
    _settled: bool

    @staticmethod
    def __new__(
        cls,
        decode: Callable[[], Tensor],
        size: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        stride: tuple[int, ...] | None = None,
        settled: bool = False,
    ) -> DecodedWeight:
        """decode: gives the values [size] of `dtype` on `device`. settled: changes are ignored, not refused."""
        weight = Tensor._make_wrapper_subclass(cls, size, strides=stride, dtype=dtype, device=device)
        weight._decode, weight._settled = decode, settled
        return weight

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        written, is_view = _effects(func)
        for place, name in written:
            for tensor in tree_iter(args[place] if place < len(args) else kwargs.get(name)):
                if isinstance(tensor, DecodedWeight):
                    if tensor._settled:
                        return tensor if func._schema.returns else None
                    raise _refused(func)
        found = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, DecodedWeight)]
        settled = any(tensor._settled for tensor in found)
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return _of(found[0]._decode, found[0], settled)
        args, kwargs = tree_map(lambda x: x._decode() if isinstance(x, DecodedWeight) else x, (args, kwargs))
        result = func(*args, **kwargs)
        if not is_view:
            return result
        return tree_map(lambda x: _of(lambda: x, x, settled) if isinstance(x, Tensor) else x, result)

    @property
    def data(self) -> Tensor:
        """Itself."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not self._settled:
            raise _refused("data")

    @property
    def requires_grad(self) -> bool:
        """False."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> DecodedWeight:
        if requires_grad and not self._settled:
            raise _refused("requires_grad")
        return self

    def numpy(self, *, force: bool = False) -> Any:
        return self._decode().numpy(force=force)

    def tolist(self) -> Any:
        return self._decode().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._decode().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._decode().clone().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override, unused-ignore]
        return f"{type(self).__name__}({list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


def _of(decode: Callable[[], Tensor], like: Tensor, settled: bool) -> DecodedWeight:
    return DecodedWeight(decode, like.shape, like.dtype, like.device, like.stride(), settled)


def _refused(what: Any) -> ValueError:
    return ValueError(
        f"weight: got {what}, which changes it, expected only reading: it is decoded from AQLM codes, which cannot "
        "take changes. The layer's dequantize(), or the loaded model's, gives a dense one that can"
    )


@functools.cache
def _effects(func: Any) -> tuple[tuple[tuple[int, str], ...], bool]:
    """The arguments of an operator that it writes to, by place and name; whether its results are views."""
    arguments = enumerate(func._schema.arguments)
    written = tuple((place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return written, not written and any(r.alias_info is not None for r in func._schema.returns)
