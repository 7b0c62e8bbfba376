"""The model card of a quantized model, and its upload to the hub."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml

from ..errors import INSTALL, one_line, wrong
from ..files import JsonFile, read_json_object, read_text, write_json
from ..format import Format
from ..io.checkpoint import foreign_files, quantized_linears, save_quantized
from ..io.data import BUNDLED, FILE_TYPES
from ..model.embeddings import find_embeddings
from ..model.sizes import stored_size
from .models import is_image_text

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_AUTO = "AutoModelForCausalLM"
_USE = """import aqlm_c.hf  # teaches transformers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("THIS_REPOSITORY")
inputs = tokenizer("The capital of France is", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
_MOST_CARD, _MOST_TEXT = 2**20, 500  # bytes of a card, characters of a text in its front matter
_LICENSE = ("license", "license_name", "license_link", "language")


def model_card(
    model: Any,
    report: Mapping[str, Any] | None = None,
    source_directory: str | os.PathLike[str] | None = None,
    perplexity: Mapping[str, float | tuple[float, float]] | None = None,
    license: str | None = None,
) -> str:
    """The text of README.md, front matter first, for a quantized transformers model.

    report: `QuantizationReport.to_dict()`. source_directory: of the original model, whose own README.md says the
    licence if `license` does not; None: where the model was loaded from, if that is a directory. perplexity: by name
    of the data, that of the quantized model or (original, quantized). What is not known is left out.
    Raises ValueError if the model has no quantized layer.
    """
    report = report or {}
    schemes = _schemes(model)
    decoded = [] if schemes else _decoded(report)
    if not (schemes or decoded):
        raise ValueError("model: got no quantized layer, expected a quantized model")
    original = str(report.get("model") or model.config.name_or_path or type(model).__name__)
    source = Path(source_directory or original)
    inherited = {name: value for name, value in _front_matter(source).items() if name in _LICENSE}
    if license is not None:
        inherited = {name: value for name, value in inherited.items() if name == "language"} | {"license": license}
    on_hub = _HUB_NAME.fullmatch(original) is not None and not os.path.exists(original)
    data = report.get("data", {}).get("sources", {})
    of_images = is_image_text(model.config.model_type, type(model).__name__)
    auto = "AutoModelForImageTextToText" if of_images else _AUTO
    front = huggingface_hub.ModelCardData(
        base_model=original if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        datasets=[name for source in data if (name := _dataset(source)) and _HUB_NAME.fullmatch(name)] or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if of_images else "text-generation",
        tags=["aqlm", "aqlm_c", "quantized"] if schemes else ["aqlm_c", "quantized"],
        **inherited,
    )
    title = original if on_hub else Path(original).name
    link = f"[{title}](https://huggingface.co/{title})" if on_hub else title
    parts = [
        f"---\n{front.to_yaml()}\n---\n",
        *(_of_codes(link, title, schemes, auto) if schemes else _of_decoded(link, title, decoded, auto)),
        "## Format\n",
        *(_format(model, schemes, report) if schemes else _decoded_format(report)),
        *_run(report),
        *_calibration(report, data),
        *_perplexities(perplexity or _figures(report.get("perplexity"))),
        "## Licence\n",
        _licence(inherited, license is not None) + "\n",
    ]
    return "\n".join(parts)


def _of_codes(link: str, title: str, schemes: list[str], auto: str) -> Iterator[str]:
    """Title and use of a checkpoint of AQLM codes."""
    yield f"# {title}, quantized to {' and '.join(schemes)}\n"
    yield f"{link} in codes of [AQLM](https://arxiv.org/abs/2401.06118), made with aqlm_c.\n"
    yield "## Use\n"
    yield f"```sh\npip install torch  # 2.11 or newer, first\n{INSTALL}\n```\n"
    yield f"```python\n{_USE.replace(_AUTO, auto)}```\n"
    yield (
        "`aqlm-c serve` answers OpenAI's API with it; programs that know nothing of aqlm_c run as "
        "`aqlm-c exec -- COMMAND`, such as `aqlm-c exec -- lm_eval`.\n"
    )


def _of_decoded(link: str, title: str, decoded: list[str], auto: str) -> Iterator[str]:
    """Title and use of a checkpoint of the dense weights that the codes of a method decode to."""
    method = decoded[0]
    yield f"# {title}, by {method}\n"
    yield f"{link} with the weights to which the codes of {method} decode, made with aqlm_c.\n"
    yield "## Use\n"
    use = "\n".join(line for line in _USE.splitlines() if "aqlm_c" not in line)
    yield f"```python\n{use.strip().replace(_AUTO, auto)}\n```\n"


def _decoded(report: Mapping[str, Any]) -> list[str]:
    """Of a report: the name of the method whose dense weights a model has, and no name where it has codes."""
    return [str(report.get("config", {}).get("solver", "?"))] if report.get("layers") else []


def _decoded_format(report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Dense weights. Codes would take {report['bits_per_weight']:.3f} bits per weight of the quantized layers in "
        f"the blocks, scales and tables included, and {report['effective_bits']:.3f} bits per parameter of the whole "
        "model, dense tensors among them.\n"
    )
    if report.get("note"):
        yield f"{report['note']}\n"


def push_to_hub(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    *,
    card: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model quantized by aqlm_c",
) -> str:
    """Upload a quantized transformers model, its tokenizer and its card; returns the address of the commit.

    card: the text of README.md; None: that of the directory the model was loaded from, if it was quantized there,
    else `model_card` with the report that `from_pretrained` or that directory has. The model's own `push_to_hub`
    gives a new repository an empty card; one that is there, such as this one, it keeps.
    Raises ValueError if the model has no quantized layer.
    """
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "model"
        files = {"README.md": (card or _card(model)).replace("THIS_REPOSITORY", repo_id)}
        save_quantized(model, tokenizer, directory, extra_files=lambda _: files)
        api = huggingface_hub.HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=directory, revision=revision, commit_message=commit_message
        )
    return done.commit_url


def push_directory(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model quantized by aqlm_c",
) -> str:
    """Upload the files of a model directory as they are, in one commit; returns its address.

    In README.md the name that a card has in place of the repository's becomes `repo_id`. Hidden files stay. The token
    is that of `hf auth login` or HF_TOKEN. Raises ValueError for a name that the hub cannot have, a file that is no
    model's, and with what the hub says where it refuses.
    """
    if not _HUB_NAME.fullmatch(repo_id):
        raise wrong("NAME", repo_id, "owner/name, letters, digits, '-', '_' and '.' in each")
    directory = Path(directory)
    if foreign := sorted(name for name in foreign_files(directory) if not name.startswith(".")):
        raise wrong("DIR", str(directory), f"a directory with files of a model alone: {foreign[0]} is none")
    operations = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        if path.relative_to(directory).parts[0].startswith("."):
            continue
        name = path.relative_to(directory).as_posix()
        content: str | bytes = str(path)
        if name == "README.md":
            content = read_text(path).replace("THIS_REPOSITORY", repo_id).encode()
        operations.append(huggingface_hub.CommitOperationAdd(name, content))
    api = huggingface_hub.HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # of no token, of what it answers
        raise ValueError(f"NAME: got {repo_id!r}, which the hub does not take: {one_line(error)}") from error
    return done.commit_url


def _card(model: Any) -> str:
    origin = Path(model.config.name_or_path or "-")
    if "quantization_config" in _json(origin / "config.json"):  # loaded quantized
        if (origin / "README.md").is_file():
            return read_text(origin / "README.md")
        return model_card(model, _json(origin / "report.json"))
    report = getattr(getattr(model, "hf_quantizer", None), "report", None)
    return model_card(model, report.to_dict() if report is not None else None)


def check_record(directory: str | os.PathLike[str]) -> None:
    """Raise, before the work, the errors that `record_perplexity` would raise after it."""
    directory = Path(directory)
    json.dumps(_report(directory, "--record"), allow_nan=False)
    if (directory / "README.md").is_file():
        read_text(directory / "README.md")
    JsonFile("--record", directory / "report.json").close()


def _report(directory: Path, name: str) -> dict[str, Any]:
    if not (directory / "report.json").is_file():
        raise wrong(name, str(directory), "a directory with the report.json of aqlm-c quantize")
    return read_json_object(directory / "report.json")


def record_perplexity(directory: str | os.PathLike[str], perplexity: Mapping[str, Any]) -> None:
    """Put figures, by the name of their data, into the report.json and the README.md of a quantized model.

    A figure is a number, or a pair of the original's and the quantized model's. Those of other data stay. Raises
    ValueError for a directory without a report.json; OSError if one cannot be written.
    """
    directory = Path(directory)
    report = _report(directory, "model")
    report["perplexity"] = {**_figures(report.get("perplexity")), **perplexity}
    write_json(directory / "report.json", report)
    card = directory / "README.md"
    if card.is_file():
        text, section = card.read_text(encoding="utf-8"), "\n".join(_perplexities(report["perplexity"]))
        found = re.search(r"^## Perplexity\n.*?(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
        at = found.span() if found else ((text.find("## Licence\n") + 1 or len(text) + 1) - 1,) * 2
        new = card.with_name(f".README.md.{os.getpid()}.tmp")
        try:
            new.write_text(f"{text[: at[0]]}{section}\n{text[at[1] :]}", encoding="utf-8")
            os.replace(new, card)
        finally:
            new.unlink(missing_ok=True)


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _front_matter(directory: Path) -> dict[str, Any]:
    """The metadata of a local model's card, texts and lists of them; {} if there is none that can be read."""
    card = directory / "README.md"
    try:
        if not card.is_file() or card.stat().st_size > _MOST_CARD:
            return {}
        fields = huggingface_hub.repocard.metadata_load(card) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {name: value for name, value in fields.items() if _is_text(value)} if isinstance(fields, dict) else {}


def _is_text(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and len(text) <= _MOST_TEXT for text in texts) and len(texts) <= _MOST_TEXT


def _schemes(model: Any) -> list[str]:
    """The schemes of the model's quantized layers, that of most layers first."""
    return [scheme for scheme, _ in Counter(layer.scheme for _, layer in quantized_linears(model)).most_common()]


def _format(model: Any, schemes: list[str], report: Mapping[str, Any]) -> Iterator[str]:
    weights, stored = 0, 0.0
    embeddings = find_embeddings(model).names
    layers = dict(quantized_linears(model))
    for layer in [layer for name, layer in layers.items() if name not in embeddings] or layers.values():
        rows, groups, _ = layer.codes.shape
        out_features, in_features = rows * layer.out_group_size, groups * layer.in_group_size
        bits = Format.parse(layer.scheme).bits_per_weight(out_features, in_features)
        weights += out_features * in_features
        stored += bits * out_features * in_features
    parameters, n_bytes = stored_size(model)
    yield (
        f"{', '.join(schemes)} (codebooks x bits of a code, g weights in a group): {stored / weights:.3f} bits per "
        "weight of the quantized layers in the blocks, codebooks and scales included; "
        f"{8 * n_bytes / parameters:.3f} bits per parameter of the whole model, dense tensors among them.\n"
    )
    if rules := getattr(model.config.quantization_config, "rules", None):
        yield "Schemes by the first rule that is found in a layer's name:\n"
        yield _table(("rule", "scheme"), [(f"`{pattern}`", scheme) for pattern, scheme in rules.items()])
    sizes = report.get("sizes", {})
    if "quantized_bytes" in sizes:
        before = f"{sizes['original_bytes'] / 1e6:,.1f} MB before, " if "original_bytes" in sizes else ""
        yield f"Size on disk: {before}{sizes['quantized_bytes'] / 1e6:,.1f} MB quantized, embeddings included.\n"
        if report.get("note"):
            yield f"{report['note']}\n"


def _run(report: Mapping[str, Any]) -> Iterator[str]:
    """How it was made and how near it came: what the report knows of it."""
    if not report:
        return
    yield "## How it was made\n"
    options = [(name, report.get("config", {}).get(name)) for name in ("preset", "solver", "seed")]
    rows = [(name, str(value)) for name, value in options if value is not None]
    rows += list(report.get("versions", {}).items())
    if layers := report.get("layers"):
        worst = max(layers, key=lambda layer: layer["relative_error"])
        mean = sum(layer["relative_error"] for layer in layers) / len(layers)
        worst_error = f"{worst['relative_error']:.5f} ({worst['name']})"
        rows.append(("relative error of layers' outputs", f"mean {mean:.5f}, worst {worst_error}"))
    held_out = [
        block["held_out_after"] for block in report.get("blocks", []) if block.get("held_out_after") is not None
    ]
    if held_out:
        rows.append(("relative error of the last block's output, held out", f"{held_out[-1]:.5f}"))
    tuned = report.get("finetune")
    if isinstance(tuned, dict) and tuned.get("held_out_before") is not None:
        what = "codebooks, scales, norms and codes" if tuned.get("changed") else "codebooks, scales and norms"
        rows.append((f"whole model tuned on {tuned['tokens']:,} tokens ({what}): KL to the original, held out",
                     f"{tuned['held_out_before']:.5f} → {tuned['held_out_after']:.5f}"))  # fmt: skip
    yield _table(("", ""), rows)


def _calibration(report: Mapping[str, Any], data: Mapping[str, str | None]) -> Iterator[str]:
    if not report:
        return
    yield "## Calibration\n"
    if not report.get("sequences"):
        yield "Quantized without data.\n"
        return
    yield f"{report['sequences']} sequences, {report['tokens']:,} tokens.\n"
    if data:
        rows = [(_source_name(source), digest or "-") for source, digest in data.items()]
        rows.append(("all token ids", report["data"]["input_ids"]))
        yield _table(("data", "SHA-256"), rows)


def _perplexities(perplexity: Mapping[str, Any]) -> Iterator[str]:
    if not perplexity:
        return
    yield "## Perplexity\n"
    pairs = {name: value if isinstance(value, (tuple, list)) else (None, value) for name, value in perplexity.items()}
    rows = [(name, *map(_figure_text, pair)) for name, pair in pairs.items()]
    yield _table(("data", "original", "quantized"), rows)


def _figure_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 1e6 else f"{value:.3e}"


def _figures(given: Any) -> dict[str, Any]:
    """What are figures or pairs of them among those that a report of others holds."""
    found = {}
    for name, value in given.items() if isinstance(given, Mapping) else ():
        pair = value if isinstance(value, (tuple, list)) else (None, value)
        numbers = [number for number in pair if number is not None]
        if len(pair) == 2 and numbers and all(type(x) in (int, float) and 0 < x < math.inf for x in numbers):
            found[name] = value
    return found


def _licence(inherited: Mapping[str, Any], given: bool) -> str:
    if "license" not in inherited:
        return "The licence of the original model applies; it is not known here."
    name = inherited.get("license_name", inherited["license"])
    link = f" ({inherited['license_link']})" if "license_link" in inherited else ""
    return f"{name}{link}{'' if given else ', as the original model'}."


def _dataset(source: str) -> str | None:
    """The name of a data set among sources; None for a file and the bundled text."""
    if source == BUNDLED or Path(source).suffix in FILE_TYPES:
        return None
    return source.partition(":")[0].partition(",")[0]


def _source_name(source: str) -> str:
    """Of a file without the folders it lay in."""
    return Path(source).name if Path(source).suffix in FILE_TYPES else source


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = (" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows)
    return "\n".join(f"| {line} |" for line in (" | ".join(head), " | ".join("---" for _ in head), *lines)) + "\n"
