"""What to quantize to and how: the AQLM format and the options of the solver."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_SCHEME = re.compile(r"(\d+)x(\d+)(?:g(\d+))?(?:o(\d+))?")
_GROUP_SIZES = (4, 8, 16, 32)
FORMAT = ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")  # what a scheme says
SOLVERS = ("ldl", "paper")
DEFAULTS_BY_SOLVER = {"init_max_iter": (20, 100), "relative_mse_tolerance": (0.003, 0.01)}  # ldl, paper
DENSE = "dense"  # the scheme of a layer that stays as it is
_SHARES = (
    "relative_mse_tolerance",
    "relative_damp",
    "adam_learning_rate",
    "finetune_learning_rate",
    "finetune_held_out",
)


def int_between(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ValueError unless `value` is an int (not a bool) in [low, high]."""
    if type(value) is int and low <= value and (high is None or value <= high):
        return
    expected = f"an integer in {low}..{high}" if high is not None else f"an integer >= {low}"
    raise ValueError(f"{name}={value!r}: expected {expected}")


def parse_scheme(scheme: str) -> dict[str, int]:
    """Read a scheme such as "2x8g8": num_codebooks x nbits_per_codebook g in_group_size.

    The group size may be left out ("2x8" is "2x8g8"); "o2" at the end sets out_group_size.
    Returns those fields of `AqlmConfig` by name. Raises ValueError for anything else.
    """
    match = _SCHEME.fullmatch(scheme.strip()) if isinstance(scheme, str) else None
    if match is None:
        raise ValueError(
            f"scheme={scheme!r}: expected <num_codebooks>x<nbits>g<group size>, such as '2x8g8', '1x16g8' or '3x8g8'"
        )
    num_codebooks, nbits, in_group, out_group = match.groups()
    return {
        "num_codebooks": int(num_codebooks),
        "nbits_per_codebook": int(nbits),
        "in_group_size": int(in_group or 8),
        "out_group_size": int(out_group or 1),
    }


def _checked_rules(rules: Any) -> dict[str, str]:
    if isinstance(rules, (list, tuple)) and all(isinstance(rule, (list, tuple)) and len(rule) == 2 for rule in rules):
        patterns = [pattern for pattern, _ in rules]
        if twice := [pattern for pattern in patterns if patterns.count(pattern) > 1]:
            raise ValueError(f"rules: {twice[0]!r}: given twice, expected one scheme")
        rules = dict(rules)  # as config.json has them: it sorts the names of a mapping, and the order counts
    if not isinstance(rules, Mapping | None):
        raise ValueError(f"rules={rules!r}: expected a mapping of regular expressions to schemes")
    for pattern, scheme in (rules or {}).items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"rules: {pattern!r}: expected a regular expression: {error}") from None
        if scheme != DENSE:
            try:
                AqlmConfig(**parse_scheme(scheme))
            except ValueError as error:
                raise ValueError(f"rules: {pattern!r}: {error}, or {DENSE!r}") from None
    return dict(rules or {})


@dataclasses.dataclass(frozen=True)
class AqlmConfig:
    """The format of a quantized weight and the options of its solver (AQLM, arXiv 2401.06118, section 3).

    Raises ValueError naming the field, its value and what was expected.
    """

    # The format: K codebooks of 2^B entries, each entry a block [out_group_size, in_group_size] of the weight.
    num_codebooks: int = 2
    nbits_per_codebook: int = 8
    in_group_size: int = 8
    out_group_size: int = 1
    # Other formats by layer: a regular expression found in its name -> scheme or "dense"; the first that fits counts.
    rules: dict[str, str] | None = dataclasses.field(default=None, hash=False)

    # The solver of one layer.
    solver: str = "ldl"  # or "paper": exactly the reference recipe, for comparison
    beam_size: int = 0  # 0: exact pairs where K >= 2 and B <= 8 (with a beam of 4 where K > 2), else a beam of 1
    relative_mse_tolerance: float | None = None  # stop when a sweep gains less of the error; None: 0.003, "paper": 0.01
    init_max_iter: int | None = None  # at most this many k-means rounds per codebook; None: 20, "paper": 100
    ldl_passes: int = 10  # passes of sequential error feedback, each followed by an update of the codebooks
    max_sweeps: int = 12  # at most this many coordinate sweeps after them
    cg_steps: int = 3  # conjugate-gradient steps per update of the codebooks
    adam_steps: int = 100  # of solver="paper", per update of codebooks and scales
    adam_learning_rate: float = 1e-4
    relative_damp: float = 3e-3  # added to H's diagonal, in units of its mean

    # Block fine-tuning (section 3.4): the quantized block's output is drawn to the original's.
    finetune_epochs: int = 5  # 0: none
    finetune_batch_size: int = 4  # sequences for each step of Adam
    finetune_learning_rate: float = 7e-3  # of codebooks, relative to their size; a seventh of it for all else
    finetune_lookahead: int = 2  # outputs are compared after so many of the following blocks
    finetune_patience: int = 2  # stop after so many epochs without a lower held-out error
    finetune_held_out: float = 0.125  # share of the sequences that validate and are not trained on
    finetune_search: int = 0  # times the codes are searched again after tuning, kept where the held-out error falls

    seed: int = 0

    def __post_init__(self) -> None:
        int_between("num_codebooks", self.num_codebooks, 1, 8)
        int_between("nbits_per_codebook", self.nbits_per_codebook, 1, 16)
        if type(self.in_group_size) is not int or self.in_group_size not in _GROUP_SIZES:
            raise ValueError(f"in_group_size={self.in_group_size!r}: expected one of {_GROUP_SIZES}")
        int_between("out_group_size", self.out_group_size, 1)
        object.__setattr__(self, "rules", _checked_rules(self.rules))
        int_between("beam_size", self.beam_size, 0, 64)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r}: expected one of {SOLVERS}")
        for name, (ldl, paper) in DEFAULTS_BY_SOLVER.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, paper if self.solver == "paper" else ldl)
        int_between("init_max_iter", self.init_max_iter, 1)
        int_between("ldl_passes", self.ldl_passes, 0)
        int_between("max_sweeps", self.max_sweeps, 0)
        int_between("cg_steps", self.cg_steps, 0)
        int_between("adam_steps", self.adam_steps, 1)
        int_between("finetune_epochs", self.finetune_epochs, 0)
        int_between("finetune_batch_size", self.finetune_batch_size, 1)
        int_between("finetune_lookahead", self.finetune_lookahead, 0)
        int_between("finetune_patience", self.finetune_patience, 1)
        int_between("finetune_search", self.finetune_search, 0)
        int_between("seed", self.seed, 0, 2**63 - 1)
        for name in _SHARES:
            value, low_allowed = getattr(self, name), name == "relative_mse_tolerance"
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (0 <= value < 1) or (value == 0 and not low_allowed):
                raise ValueError(f"{name}={value!r}: expected a number in {'[' if low_allowed else '('}0, 1)")

    @classmethod
    def from_scheme(cls, scheme: str, **options: Any) -> AqlmConfig:
        """`AqlmConfig` of a scheme string (`parse_scheme`) and any of the solver's options."""
        return cls.from_dict({**parse_scheme(scheme), **options})

    @property
    def scheme(self) -> str:
        """The format as a string that `from_scheme` reads, such as "2x8g8"."""
        out_group = f"o{self.out_group_size}" if self.out_group_size > 1 else ""
        return f"{self.num_codebooks}x{self.nbits_per_codebook}g{self.in_group_size}{out_group}"

    def rule_for(self, name: str) -> str | None:
        """The scheme that `rules` give the layer `name`, or "dense"; None if no rule fits."""
        return next((scheme for pattern, scheme in self.rules.items() if re.search(pattern, name)), None)

    def for_layer(self, name: str) -> AqlmConfig | None:
        """The config of the layer `name`, its scheme by the rules or else the common one; None if it stays dense."""
        if not self.rules:
            return self
        scheme = self.rule_for(name)
        if scheme == DENSE:
            return None
        return dataclasses.replace(self, rules=None, **(parse_scheme(scheme) if scheme else {}))

    @property
    def search_beam_size(self) -> int:
        """What the code search is told: 0 for the exact search over pairs, else the width of the beam."""
        return self.beam_size or (0 if self.num_codebooks >= 2 and self._pairs_fit else 1)

    @property
    def search_pairs(self) -> bool:
        """What the code search is told: that `beam_size` is the width of a beam that ends in exact pairs."""
        return self.num_codebooks > 2 and self._pairs_fit

    @property
    def _pairs_fit(self) -> bool:
        return self.nbits_per_codebook <= 8 and self.solver != "paper"

    def code_bits_per_weight(self) -> float:
        """Bits per weight of the codes alone."""
        return self.num_codebooks * self.nbits_per_codebook / (self.in_group_size * self.out_group_size)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """True bits per weight of a layer: codes, and codebooks and scales of 16 bits."""
        codebooks = 16 * self.num_codebooks * 2**self.nbits_per_codebook * self.out_group_size * self.in_group_size
        scales = 16 * out_features / self.out_group_size
        return self.code_bits_per_weight() + (codebooks + scales) / (out_features * in_features)

    def check_layer(self, name: str, out_features: int, in_features: int) -> None:
        """Raise ValueError unless groups tile a [out_features, in_features] weight."""
        for side, features, group in (
            ("in", in_features, self.in_group_size),
            ("out", out_features, self.out_group_size),
        ):
            if features < 1 or features % group:
                raise ValueError(
                    f"{side}_group_size={group}: expected a divisor of {side}_features={features} of layer {name}"
                )

    def check_searchable(self) -> None:
        """Raise ValueError for a format, of `rules` too, that loads and runs but that cannot be searched yet."""
        for scheme in set(self.rules.values()) - {DENSE}:
            type(self).from_scheme(scheme).check_searchable()
        if self.out_group_size != 1:
            raise ValueError(
                f"out_group_size={self.out_group_size} (scheme {self.scheme!r}): expected 1, "
                "codes are not searched for larger ones yet"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields by name; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> AqlmConfig:
        """The config with these fields; raises ValueError for a name that is not a field."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(f"unknown option {unknown[0]!r}: expected one of {', '.join(known)}")
        return cls(**fields)
