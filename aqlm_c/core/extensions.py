"""Loads the extensions that register torch operators: `_torch` for the CPU, `_cuda` where it was built and torch has
CUDA. Everything that touches ``torch.ops.aqlm_c`` imports this first.
"""

from __future__ import annotations

try:
    import torch

    from .. import _torch
except ImportError as error:
    raise ImportError(
        f"aqlm_c._torch: got none that loads here ({error}), expected torch >= 2.11, and aqlm_c built where torch "
        "can be seen: install torch, then AQLM_C_REQUIRE=torch pip install --no-build-isolation --force-reinstall "
        "--no-deps <aqlm_c's folder>"
    ) from error

try:
    from .. import _cuda  # noqa: F401 (registers the ops for GPUs)
except ImportError:  # built without it, or a torch without CUDA
    has_cuda = False
else:
    has_cuda = True

ops = torch.ops.aqlm_c
get_isa, set_isa = _torch.get_isa, _torch.set_isa
get_exact, set_exact = _torch.get_exact, _torch.set_exact
