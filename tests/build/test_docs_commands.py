"""The commands and the Python of docs/ and README.md: all parse, and those that need no network, no GPU and little time
run as they are written, in a folder that has tiny models under the names that pages use."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
from command import main_in_time
from tiny import BYTES, FAST, byte_tokenizer, tiny_llama

from aqlm_c import AqlmConfig, quantize_model, save_quantized
from aqlm_c.cli.commands import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
NOT_RUN = {  # a pattern of commands -> why they are parsed alone
    r"--device cuda|torchrun": "a GPU",
    r"meta-llama|llama-3\.1|me/|allenai": "the network",
    r"--tasks|lm_eval": "the network: data sets, lm-eval",
    r"^aqlm-c serve": "a server, which does not end (tests/cli/test_serve.py)",
    r"^aqlm-c finetune|--tune|tuned": "minutes (tests/train)",
    r"sweep SPACE\.yaml --out DIR$|best\.yaml|compare DIR": "hours (tests/sweep)",
    r"\.gguf|THEIRS": "files that other programs make",
    r"--target-size": "a model of that size (tests/allocation)",
    r"\.\.\.": "an outline",
    r"--preset balanced|quantize MODEL OUT --scheme": "a minute of fine-tuning (tests/pipeline)",
}
TEXTS = ["text.txt", "test.txt", "calibration.txt", "c4.txt", "wikipedia.txt", "wikipedia_calibration.txt"]
TEXTS += ["wikitext2_test.txt", "wikitext2_test_raw.txt", "c4_evaluation.txt"]
PYTHON_NOT_RUN = {
    "OpenAI": "a server",
    "GPTQModel": "another package",
    "choose_schemes": "a model that the page before it loaded (tests/allocation)",
    r"tensor\(directory": "what tests/build/test_docs.py runs",
    "P.codes": "what tests/build/test_docs.py runs",
    "get_peft_model": "what tests/hf/test_training.py runs",
}


def commands(page):
    """Command lines of a page, in order: from fenced blocks and indented ones, without comments."""
    text = page.read_text(encoding="utf-8")
    blocks = [match[3] for match in FENCED.finditer(text) if match[2] in ("", "sh")]
    blocks += [match[0] for match in INDENTED.finditer(FENCED.sub("", text))]
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("aqlm-c "):
                yield shlex.split(line, comments=True)


def why_not(words, reasons):
    line = " ".join(words) if isinstance(words, list) else words
    return next((why for pattern, why in reasons.items() if re.search(pattern, line)), None)


HAVE_COMMANDS = [page for page in PAGES if list(commands(page))]


def test_pages_have_commands():
    assert {"README.md", "tutorial.md", "quantize.md", "serving.md"} <= {page.name for page in HAVE_COMMANDS}


@pytest.mark.parametrize("page", HAVE_COMMANDS, ids=lambda page: page.stem)
def test_every_command_is_one(page):
    """Its options and arguments parse."""
    group = typer.main.get_command(app)
    for _, name, *arguments in commands(page):
        assert name in group.commands, name
        if name not in ("exec", "push"):
            group.commands[name].make_context(name, arguments)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what pages name: dense models, one of two bits, texts, the sweep of docs/sweeps.md."""
    folder = tmp_path_factory.mktemp("docs")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    sizes = {"vocab_size": BYTES, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 4096}
    model = tiny_llama(**sizes, num_hidden_layers=1)
    for name in ("smollm2", "MODEL", "a-dense-model"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    quantize_model(model, None, AqlmConfig.from_scheme("2x4g8", **FAST))
    for name in ("smollm2-2bit", "OUT"):
        save_quantized(model, tokenizer, folder / name)
    words = np.random.default_rng(0).choice(["two", "bits", "a", "weight", "and", "no", "more."], 20_000)
    for name in TEXTS:
        (folder / name).write_text(" ".join(words))
    space = next(match[3] for match in FENCED.finditer((ROOT / "docs/sweeps.md").read_text()) if match[2] == "yaml")
    (folder / "SPACE.yaml").write_text(space)
    (folder / "q2_k.gguf").touch()
    return folder


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    """A copy of it, which is the current directory."""
    shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("page", HAVE_COMMANDS, ids=lambda page: page.stem)
def test_commands_run_as_written(page, folder):
    for _, *arguments in commands(page):
        if why_not("aqlm-c " + " ".join(arguments), NOT_RUN) is None:
            if arguments[0] == "quantize":
                shutil.rmtree(arguments[2], ignore_errors=True)  # which is there for pages that begin with it
            assert main_in_time(*arguments) == 0, arguments


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem
)
def test_python_runs_as_written(page, folder):
    names = {}
    for match in FENCED.finditer(page.read_text(encoding="utf-8")):
        if match[2] == "python" and why_not(match[3], PYTHON_NOT_RUN) is None:
            for name in re.findall(r'save_quantized\(.*"(.*)"\)', match[3]):
                shutil.rmtree(name)  # which is there for pages that begin with it
            exec(compile(match[3], str(page), "exec"), names)
