"""The methods by name. A method is a file of this folder with a `METHOD`; a line here registers it.

`AqlmConfig(solver=NAME)`, ``--solver NAME``. Nothing else in the package knows a method's name: what differs between
them they are asked (`base.Method`). Listing the names imports none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import wrong

if TYPE_CHECKING:
    from .base import Method

DEFAULT = "ldl"
METHODS = {
    "ldl": "aqlm",  # sequential error feedback, exact pair search, least-squares codebooks
    "paper": "aqlm_paper",  # exactly the reference recipe, for comparison
    "rtn": "rtn",  # round to nearest: the baseline without calibration
    "gptq": "gptq",  # uniform grids with error feedback
    "quip": "quip",  # the same after random rotations
    "quip_sharp": "quip_sharp",  # a lattice's codebook after Hadamard transforms
    "kmeans": "kmeans",  # one codebook, without H
    "product": "product",  # a codebook for each part of a group, without H
    "additive": "additive",  # sums of entries, without H
}
ALIASES = {"aqlm": "ldl", "aqlm_paper": "paper"}  # names by which papers and tables call two of them


def method_name(name: str) -> str:
    """The name in `METHODS` of the method that is called `name`, perhaps by an alias; ValueError for an unknown one."""
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in METHODS:
        raise wrong("solver", name, f"one of {', '.join((*METHODS, *ALIASES))}")
    return name


def get_method(name: str) -> Method:
    """The method called `name`; ValueError for an unknown one."""
    name = method_name(name)
    return import_module(f".{METHODS[name]}", __name__).METHOD
