"""The version of this package and of those that a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on, of those installed."""
    found = {"aqlm_c": __version__, "python": platform.python_version()}
    for name in ("numpy", "torch", "transformers", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
