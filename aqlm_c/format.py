"""What a quantized weight is made of, whatever method made it: its format, which layers have which, its tensors."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import int_between, shown, wrong
from .patterns import pattern_of

WEIGHT = ("codes", "codebooks", "scales")  # the tensors of a quantized weight, on disk and in its layer
DENSE = "dense"  # the scheme of a layer that stays as it is
AUTO = "auto"  # of embeddings: decided by their share of the model

_SCHEME = re.compile(r"(\d{1,9})x(\d{1,9})(?:g(\d{1,9}))?(?:o(\d{1,9}))?")
_GROUP_SIZES = (4, 8, 16, 32)
_MOST_RULES, _MOST_SLOW_RULES = 4096, 64


@dataclasses.dataclass(frozen=True)
class Format:
    """The AQLM format of a weight (arXiv 2401.06118, section 3).

    num_codebooks K codebooks of 2^nbits_per_codebook entries, each entry a block [out_group_size, in_group_size] of
    the weight. Raises ValueError naming the field, its value and what was expected.
    """

    num_codebooks: int = 2
    nbits_per_codebook: int = 8
    in_group_size: int = 8
    out_group_size: int = 1

    def __post_init__(self) -> None:
        int_between("num_codebooks", self.num_codebooks, 1, 8)
        int_between("nbits_per_codebook", self.nbits_per_codebook, 1, 16)
        if type(self.in_group_size) is not int or self.in_group_size not in _GROUP_SIZES:
            raise wrong("in_group_size", self.in_group_size, f"one of {_GROUP_SIZES}")
        int_between("out_group_size", self.out_group_size, 1)

    @classmethod
    def parse(cls, scheme: str) -> Format:
        """Read a scheme such as "2x8g8": num_codebooks x nbits_per_codebook g in_group_size.

        The group size may be left out ("2x8" is "2x8g8"); "o2" at the end sets out_group_size. Raises ValueError for
        anything else.
        """
        match = _SCHEME.fullmatch(scheme.strip()) if isinstance(scheme, str) else None
        if match is None:
            raise wrong("scheme", scheme, "<num_codebooks>x<nbits>g<group size>, such as '2x8g8', '1x16g8' or '3x8g8'")
        num_codebooks, nbits, in_group, out_group = match.groups()
        return cls(int(num_codebooks), int(nbits), int(in_group or 8), int(out_group or 1))

    @classmethod
    def of_codebooks(cls, shape: tuple[int, ...]) -> Format:
        """The format of a weight whose codebooks have this shape, [K, 2^B, og, g]."""
        num_codebooks, entries, out_group, in_group = shape
        return cls(num_codebooks, entries.bit_length() - 1, in_group, out_group)

    @property
    def scheme(self) -> str:
        """The format as a string that `parse` reads, such as "2x8g8"."""
        out_group = f"o{self.out_group_size}" if self.out_group_size > 1 else ""
        return f"{self.num_codebooks}x{self.nbits_per_codebook}g{self.in_group_size}{out_group}"

    @property
    def entries(self) -> int:
        """Of each codebook."""
        return 2**self.nbits_per_codebook

    @property
    def group_weights(self) -> int:
        """Weights in a group."""
        return self.in_group_size * self.out_group_size

    @property
    def code_itemsize(self) -> int:
        """Bytes of a stored code."""
        return 1 if self.nbits_per_codebook <= 8 else 2

    def code_bits_per_weight(self) -> float:
        """Bits per weight of the codes alone."""
        return self.num_codebooks * self.nbits_per_codebook / (self.in_group_size * self.out_group_size)

    def codebook_bits(self) -> int:
        """Bits of a weight's codebooks, 16 an element."""
        return 16 * self.num_codebooks * self.entries * self.out_group_size * self.in_group_size

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """True bits per weight of a layer: codes, and codebooks and scales of 16 bits."""
        scales = 16 * out_features / self.out_group_size
        return self.code_bits_per_weight() + (self.codebook_bits() + scales) / (out_features * in_features)

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes on disk of a layer: codes in their dtype, codebooks and scales of 16 bits."""
        codes = self.num_codebooks * self.code_itemsize * (out_features * in_features // self.group_weights)
        return codes + self.codebook_bits() // 8 + 2 * (out_features // self.out_group_size)

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a layer, by their names in `WEIGHT`."""
        rows = out_features // self.out_group_size
        return {
            "codes": (rows, in_features // self.in_group_size, self.num_codebooks),
            "codebooks": (self.num_codebooks, self.entries, self.out_group_size, self.in_group_size),
            "scales": (rows, 1, 1, 1),
        }

    def check_layer(self, name: str, out_features: int, in_features: int) -> None:
        """Raise ValueError unless groups tile a [out_features, in_features] weight."""
        for side, features, group in (
            ("in", in_features, self.in_group_size),
            ("out", out_features, self.out_group_size),
        ):
            if features < 1 or features % group:
                raise wrong(f"{side}_group_size", group, f"a divisor of {side}_features={features} of layer {name}")

    def to_dict(self) -> dict[str, int]:
        """The four numbers by name."""
        return dataclasses.asdict(self)


FIELDS = tuple(field.name for field in dataclasses.fields(Format))


class Rules(Mapping[str, str]):
    """Other formats by layer, in order: a regular expression found in a layer's name -> its scheme, or "dense".

    The first that fits counts. Made of a mapping or, as config.json has them, of pairs: JSON sorts the names of a
    mapping, and their order counts. Raises ValueError for what is no regular expression or no scheme, and for a
    pattern that is given twice.
    """

    def __init__(self, rules: Any = None) -> None:
        pairs = isinstance(rules, (list, tuple)) and all(
            isinstance(rule, (list, tuple)) and len(rule) == 2 for rule in rules
        )
        if not pairs and not isinstance(rules, Mapping | None):
            raise wrong("rules", rules, "a mapping of regular expressions to schemes")
        if rules and len(rules) > _MOST_RULES:
            raise ValueError(f"rules: got {len(rules)}, expected at most {_MOST_RULES}")
        items = rules if pairs else (rules or {}).items()
        if foreign := [pattern for pattern, _ in items if not isinstance(pattern, str)]:
            raise wrong("rules", foreign[0], "a regular expression, as text")
        if twice := [pattern for pattern, n in Counter(pattern for pattern, _ in items).items() if n > 1]:
            raise ValueError(f"rules: got {twice[0]!r} twice, expected one scheme for each pattern")
        self._schemes: dict[str, str] = dict(items)
        slow = 0
        for pattern, scheme in self._schemes.items():
            slow += not pattern_of("rules", pattern).simple
            if slow > _MOST_SLOW_RULES:
                raise wrong("rules", pattern, f"at most {_MOST_SLOW_RULES} patterns with several *, + or groups in one")
            if scheme != DENSE:
                try:
                    Format.parse(scheme)
                except ValueError as error:
                    raise ValueError(f"rules: {shown(pattern)}: {error}, or {DENSE!r}") from None

    def __getitem__(self, pattern: str) -> str:
        return self._schemes[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)

    def __repr__(self) -> str:
        return repr(self._schemes)

    def __hash__(self) -> int:
        return hash(frozenset(self._schemes.items()))

    def fitting(self, name: str) -> list[str]:
        """The patterns that fit the layer `name`, of which the first counts."""
        return list(self._fitting(name))

    def scheme_for(self, name: str) -> str | None:
        """The scheme, or "dense", of the first rule that fits the layer `name`; None if no rule does."""
        return next(map(self.__getitem__, self._fitting(name)), None)

    def format_for(self, name: str, default: Format) -> Format | None:
        """The format of the layer `name`, `default` where no rule fits; None if it stays dense."""
        scheme = self.scheme_for(name)
        if scheme == DENSE:
            return None
        return Format.parse(scheme) if scheme else default

    def _fitting(self, name: str) -> Iterator[str]:
        return (pattern for pattern in self if pattern_of("rules", pattern).found_in(name))

    def formats(self) -> list[Format]:
        """The formats that rules name, each once."""
        return [Format.parse(scheme) for scheme in dict.fromkeys(self.values()) if scheme != DENSE]

    def to_dict(self) -> dict[str, str]:
        """Scheme by pattern, in order."""
        return dict(self._schemes)
