"""What lies in a model directory, by the headers of its files; and whether every tensor of it is sound."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import shown, wrong
from .files import read_json_object
from .format import FIELDS, WEIGHT, Format, Rules
from .io import checkpoint
from .model.kinds import kind_of
from .recipe import RunConfig
from .report.report import known_provenance
from .report.tables import bits_text, html, make_table
from .units import megabytes

_METHODS = ("aqlm", "aqlm_c")


@dataclasses.dataclass
class Matrix:
    """A linear layer or an embedding. scheme: such as "2x8g8", or the dtype of a dense one. bits_per_weight: all
    that is stored for it, codes at their own width; bytes: as it lies on disk.
    """

    name: str
    out_features: int
    in_features: int
    scheme: str
    bits_per_weight: float
    bytes: int
    quantized: bool = False


@dataclasses.dataclass(repr=False)
class Inspection:
    """What `inspect_model` finds. parameters: of the whole model, as many for a quantized layer as for a dense one.
    provenance: what report.json, or
    else run.yaml, says of the run that wrote the directory; empty without them. checked: tensors that
    `check_model` verified.
    """

    model: str
    scheme: str | None
    layers: list[Matrix]
    embeddings: list[Matrix]
    total_bytes: int
    parameters: int
    provenance: dict[str, Any]
    checked: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Over the quantized layers, or over all layers of a dense model; 0 without any."""
        layers = [layer for layer in self.layers if layer.quantized] or self.layers
        weights = sum(layer.out_features * layer.in_features for layer in layers)
        return sum(layer.bits_per_weight * layer.out_features * layer.in_features for layer in layers) / (weights or 1)

    @property
    def effective_bits(self) -> float:
        """Bits on disk per parameter of the whole model."""
        return 8 * self.total_bytes / max(1, self.parameters)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of quantized layers, dense layers, embeddings and the rest; and of all safetensors files."""
        quantized = sum(layer.bytes for layer in self.layers if layer.quantized)
        dense = sum(layer.bytes for layer in self.layers) - quantized
        embeddings = sum(matrix.bytes for matrix in self.embeddings)
        other = self.total_bytes - quantized - dense - embeddings
        return {
            "quantized layers": quantized,
            "dense layers": dense,
            "embeddings": embeddings,
            "other": other,
            "total": self.total_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """All fields and properties, ready for JSON."""
        derived = {name: getattr(self, name) for name in ("bits_per_weight", "effective_bits", "sizes")}
        return {**dataclasses.asdict(self), **derived}

    def __repr__(self) -> str:
        return (
            f"<Inspection: {self.model}, {self.scheme or 'dense'}, {len(self.layers)} layers, "
            f"{self.bits_per_weight:.3f} bits per weight, {megabytes(self.total_bytes)}>"
        )

    def _repr_html_(self) -> str | None:
        return html(self)

    def __rich__(self) -> Any:
        """Tables for a rich console: layers by kind, sizes, provenance."""
        from rich.console import Group
        from rich.text import Text

        quantized, n_layers = sum(layer.quantized for layer in self.layers), len(self.layers)
        count = f"{quantized} of {n_layers}" if 0 < quantized < n_layers else n_layers
        title = f"{self.scheme or 'dense'}: {count} layers, {bits_text(self.bits_per_weight, self.effective_bits)}"
        table = make_table(title, ("layer", "n", "out x in", "scheme", "bits", "on disk"))
        groups: dict[tuple[Any, ...], list[Matrix]] = {}
        for layer in [*self.layers, *self.embeddings]:
            key = (kind_of(layer.name), layer.out_features, layer.in_features, layer.scheme)
            groups.setdefault(key, []).append(layer)
        for (kind, out_features, in_features, scheme), layers in groups.items():
            shape, size = f"{out_features}x{in_features}", megabytes(sum(layer.bytes for layer in layers))
            table.add_row(kind, str(len(layers)), shape, scheme, f"{layers[0].bits_per_weight:.2f}", size)
        sizes = " · ".join(f"{name} {megabytes(size)}" for name, size in self.sizes.items())
        lines = [sizes, *self._origin()]
        if self.checked:
            lines.append(f"{self.checked} tensors checked: names, shapes, dtypes, codes and finite values are right")
        return Group(table, *map(Text, lines))

    def _origin(self) -> list[str]:
        run = self.provenance.get("config")
        if not run:
            return ["no report.json of aqlm-c: where it comes from is not recorded"]
        versions = ", ".join(f"{name} {version}" for name, version in self.provenance.get("versions", {}).items())
        lines = [
            f"from {run.get('model')}: preset {run.get('preset')}, scheme {run.get('scheme')}, seed {run.get('seed')}",
            f"calibrated on {run.get('samples')} sequences of {run.get('sequence_length')} tokens from "
            f"{', '.join(run.get('data') or ['the bundled text'])}",
        ]
        if data := self.provenance.get("data"):
            lines[-1] += f" (SHA-256 of the tokens {str(data.get('input_ids'))[:12]}...)"
        return [*lines, f"by {versions}"] if versions else lines


def inspect_model(directory: str | os.PathLike[str]) -> Inspection:
    """Read config.json, the headers of the safetensors files, and report.json or run.yaml if there.

    An embedding is what has one row for each word of the vocabulary. Raises ValueError naming the file that is
    missing or damaged.
    """
    directory = Path(directory)
    fields, quantized, tensors = _read(directory)
    linears = checkpoint.stored_linears(tensors) if quantized else {}
    vocabulary = _vocabulary(fields)
    layers: list[Matrix] = []
    embeddings: list[Matrix] = []
    seen: set[str] = set()
    for name, tensor in tensors.items():
        linear = name.rpartition(".")[0]
        if linear in linears:
            if linear not in seen:
                matrix = _quantized(linear, linears[linear])
                (embeddings if matrix.out_features == vocabulary else layers).append(matrix)
            seen.add(linear)
        elif len(tensor.shape) >= 2:
            rows, columns, n_bytes = math.prod(tensor.shape[:-1]), tensor.shape[-1], checkpoint.n_bytes(tensor)
            bits = 8 * n_bytes / max(1, rows * columns)
            matrix = Matrix(linear, rows, columns, tensor.dtype, bits, n_bytes)
            (embeddings if rows == vocabulary else layers).append(matrix)
    total = sum(file.stat().st_size for file in {tensor.file for tensor in tensors.values()})
    schemes = dict.fromkeys(matrix.scheme for matrix in (*layers, *embeddings) if matrix.quantized)
    scheme = ", ".join(schemes) if schemes else None
    parameters = sum(_parameters(name, tensor, linears) for name, tensor in tensors.items())
    return Inspection(str(directory), scheme, layers, embeddings, total, parameters, _provenance(directory))


def check_model(directory: str | os.PathLike[str]) -> int:
    """Verify every tensor of a model directory; returns how many there are.

    Names, shapes and dtypes are compared with the model that config.json describes, built without memory for its
    weights; then the values are read: codes inside the codebooks, everything else finite. Raises ValueError
    naming the tensor.
    """
    directory = Path(directory)
    fields, _, tensors = _read(directory)
    from .hf import trust
    from .hf.models import auto_class  # and the quantizer is registered, which checks quantized layers

    trust.check_directory(directory)
    flash = trust.check_config(fields, directory / "config.json", len(tensors))
    try:
        options = {"config": trust.config_of(directory, local_files_only=True)} if flash else {}
        model, info = auto_class(directory, local_files_only=True, trust_remote_code=False).from_pretrained(
            directory,
            device_map="meta",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are told in `info`
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # of many types, as the config is
        if isinstance(error, ValueError) and "trust_remote_code" not in str(error):
            raise
        text = f"{directory / 'config.json'}: describes no model that can be built: {trust.reason(error)}"
        raise ValueError(text) from error
    for name, stored, expected in sorted(info["mismatched_keys"]):
        file = tensors[name].file if name in tensors else directory
        raise ValueError(f"{name} in {file}: {list(stored)}, expected {list(expected)}")
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"{name}: missing from {directory}, the model of its config.json has it")
    for name in sorted(info["unexpected_keys"]):
        raise ValueError(f"{name} in {directory}: unexpected, the model of its config.json has no such tensor")
    for name in set(checkpoint.unquantized_parameters(model)) & set(tensors):
        checkpoint.check_dense_dtype(name, tensors[name])
    checkpoint.check_stored_values(tensors)
    return len(tensors)


def _read(directory: Path) -> tuple[dict[str, Any], bool, dict[str, checkpoint.StoredTensor]]:
    """config.json, whether it says that there are quantized layers, and the headers of all tensors."""
    if not (directory / "config.json").is_file():
        raise wrong("model", str(directory), "a directory with config.json and *.safetensors")
    fields = read_json_object(directory / "config.json")
    tensors = checkpoint.read_directory(directory)
    if not tensors:
        raise ValueError(f"model: got {str(directory)!r}: no tensors in that directory, expected *.safetensors")
    quantization = fields.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise ValueError(
            f"{directory / 'config.json'}: quantization_config: got {shown(quantization)}, expected an object"
        )
    if quantization.get("quant_method") not in _METHODS:
        return fields, False, tensors
    try:
        sizes: dict[str, Any] = {name: quantization.get(name) for name in FIELDS}
        Format(**sizes)
        Rules(quantization.get("rules"))
        return fields, True, tensors
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from None


def _vocabulary(fields: dict[str, Any]) -> int | None:
    text = fields.get("text_config")
    return (text if isinstance(text, dict) else {}).get("vocab_size", fields.get("vocab_size"))


def _quantized(name: str, parts: dict[str, checkpoint.StoredTensor]) -> Matrix:
    """By the shapes of its tensors, whatever config.json says of its format."""
    codes, books = parts["codes"], parts.get("codebooks")
    if books is None:
        raise ValueError(f"{checkpoint.tensor_name(name, 'codes')} in {codes.file}: unexpected without its codebooks")
    for part, n_sides in (("codes", 3), ("codebooks", 4)):
        if len(parts[part].shape) != n_sides:
            raise ValueError(
                f"{name}.{part} in {parts[part].file}: {list(parts[part].shape)}, expected {n_sides} sides"
            )
    format = Format.of_codebooks(books.shape)
    out_features, in_features = codes.shape[0] * format.out_group_size, codes.shape[1] * format.in_group_size
    floats = sum(checkpoint.n_bytes(parts[part]) for part in ("codebooks", "scales") if part in parts)
    bits = format.code_bits_per_weight() + 8 * floats / max(1, out_features * in_features)
    n_bytes = sum(map(checkpoint.n_bytes, parts.values()))
    return Matrix(name, out_features, in_features, format.scheme, bits, n_bytes, True)


def _parameters(name: str, tensor: checkpoint.StoredTensor, linears: Mapping[str, Any]) -> int:
    """That a stored tensor stands for: the weight's for its codes, none for its codebooks and scales."""
    linear, _, part = name.rpartition(".")
    if linear not in linears or part not in WEIGHT:
        return math.prod(tensor.shape)
    if part != "codes":
        return 0
    return math.prod(tensor.shape[:2]) * Format.of_codebooks(linears[linear]["codebooks"].shape).group_weights


def _provenance(directory: Path) -> dict[str, Any]:
    if os.path.lexists(directory / "report.json"):
        return known_provenance(read_json_object(directory / "report.json"))
    if os.path.lexists(directory / "run.yaml"):
        return {"config": RunConfig.from_file(directory / "run.yaml").resolve().fields}
    return {}
