"""A quantized model as other programs read it: dense, or in the one scheme that the published AQLM layout can say."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import wrong
from .files import read_json_object, read_text
from .hf.card import model_card
from .hf.models import load_model
from .hf.quantizer import attach
from .io.checkpoint import check_output, quantized_linears, save_quantized, write_quantized
from .model.embeddings import find_embeddings, untie
from .recipe import AqlmConfig


def export_dense(
    name: str | os.PathLike[str], out: str | os.PathLike[str], dtype: str = "auto", *, overwrite: bool = False
) -> str:
    """Write the model `name` as the directory `out` with dense weights, those that its codes decode to.

    dtype: of all weights, auto: the model's own. Every program that reads models of transformers reads it; a
    GGUF converter too. Returns what was written, in words. Raises what `load_model` and `save_quantized` do.
    """
    check_output(out, overwrite, {"MODEL": name})
    model, tokenizer, source = load_model(name)
    to = model.dtype if dtype == "auto" else getattr(torch, dtype)
    if source.quantized:
        model.hf_quantizer.dequantize(model, to)
    model.to(to)
    model.config.dtype = to
    files = _files(model, source.path)
    write_quantized(model, tokenizer, out, overwrite=overwrite, extra_files=lambda _: files)
    return f"dense, {str(to).removeprefix('torch.')}"


def export_aqlm(name: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> str:
    """Write the quantized model `name` as the directory `out` under quant_method "aqlm", which the upstream package
    and transformers with it read: the scheme of most weights keeps its codes, what has another one is made dense, the
    embeddings among it.

    Returns what was written, in words. Raises what `load_model` and `save_quantized` do; ValueError, naming MODEL,
    for a model that is not quantized.
    """
    check_output(out, overwrite, {"MODEL": name})
    model, tokenizer, source = load_model(name)
    if not source.quantized:
        raise wrong("MODEL", str(name), "a model in codes of AQLM")
    embeddings = find_embeddings(model)
    layers = dict(quantized_linears(model))
    weights: Counter[str] = Counter()
    for layer, linear in layers.items():
        if layer not in embeddings.names:
            weights[linear.scheme] += linear.codes.shape[0] * linear.codes.shape[1]
    if not weights:
        raise wrong("MODEL", str(name), "a model with quantized layers beside its embeddings")
    scheme = weights.most_common(1)[0][0]
    decoded = [layer for layer, linear in layers.items() if linear.scheme != scheme or layer in embeddings.names]
    for layer in decoded:
        model.set_submodule(layer, layers[layer].dequantize(model.dtype))
    untie(model, embeddings)
    attach(model, AqlmConfig.from_scheme(scheme))
    files = _files(model, source.path)
    save_quantized(model, tokenizer, out, overwrite=overwrite, extra_files=lambda _: files)
    return f"{scheme}, {len(layers) - len(decoded)} layers in codes, {len(decoded)} made dense"


def _files(model: Any, directory: str) -> Mapping[str, str]:
    """The card, and what is known of the run that made the codes; sizes of its files are not those of others."""
    files, source = {}, Path(directory)
    if (source / "run.yaml").is_file():
        files["run.yaml"] = read_text(source / "run.yaml")
    if (source / "report.json").is_file():
        report = read_json_object(source / "report.json")
        report.pop("sizes", None)
        files["report.json"] = json.dumps(report, indent=2, allow_nan=False) + "\n"
        files["README.md"] = model_card(model, report, source)
    return files
