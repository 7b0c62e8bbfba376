"""The torch binding: the operators of ``torch.ops.aqlm_c`` for the CPU, registered at import (csrc/torch).

It needs torch's libraries in the process: import torch first. The settings are this binding's own; `aqlm_c._core` has
its by the same names.
"""

def get_isa() -> str: ...
def set_isa(name: str, /) -> None:
    """Run the ops on another instruction set; ValueError if this CPU cannot."""

def get_exact() -> bool | None: ...
def set_exact(exact: bool | None, /) -> None:
    """True: matmul without rounded products; None, as at first: 16 bits, 23 for float32; False: 16."""

def available_isas() -> list[str]:
    """Instruction sets that this CPU can run, slowest first."""
