"""Directories and files of others: no code of theirs runs, nothing hangs, each fault is one line."""

import json
import os
import socket
import time

import numpy as np
import pytest
import torch
import yaml
from command import main_in_time
from safetensors.torch import load_file, save_file
from tiny import BYTES, byte_tokenizer, tiny_llama

import aqlm_c
from aqlm_c import RunConfig, load_model
from aqlm_c.cli.main import main
from aqlm_c.errors import one_line, printable, shown
from aqlm_c.report.report import known_provenance
from aqlm_c.units import parse_size

SMALL = ["--scheme", "2x4g8", "--samples", "4", "--sequence-length", "32", "--preset", "fast", "--quiet"]
EVALUATE = ("--sequence-length", 32, "--windows", 1, "--quiet")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(torch.bfloat16, vocab_size=BYTES).save_pretrained(path)
    byte_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, dense):
    path = tmp_path_factory.mktemp("quantized") / "tiny"
    assert main(["quantize", str(dense), str(path), *SMALL]) == 0
    return path


@pytest.fixture
def model(dense, tmp_path):
    return copied(dense, tmp_path / "model")


@pytest.fixture
def ours(quantized, tmp_path):
    return copied(quantized, tmp_path / "ours")


def copied(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def run(capsys):
    """Runs the command line in this process; gives (exit code, stdout, stderr). What hangs fails."""

    def run(*arguments):
        code = main_in_time(*arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(run):
    """Runs the command line, which must refuse: the last line of stderr has the words, and it is no surprise."""

    def refused(words, *arguments):
        code, stdout, stderr = run(*arguments)
        assert code == 2 and "Traceback" not in stderr and "not expected:" not in stderr, stderr
        line = stderr.splitlines()[-1]
        assert line.startswith("aqlm-c: ") and len(line) < 3000 and "\x1b" not in stdout + stderr
        for word in [words] if isinstance(words, str) else words:
            assert word in line
        return line

    return refused


def commands(directory):
    return (
        ("inspect", directory, "--check"),
        ("evaluate", directory, *EVALUATE),
        ("generate", directory, "hello", "--max-new-tokens", 2),
        ("quantize", directory, directory.parent / "out", *SMALL),
    )


# ---- 1.1: code --------------------------------------------------------------------------------------------------

TRAP = "from pathlib import Path\nPath({!r}).touch()\nfrom transformers import LlamaForCausalLM as M\n"
TRAP += "from transformers import LlamaConfig as C, PreTrainedTokenizerFast as T\n"


def trapped(model, sprung, *what):
    (model / "trap.py").write_text(TRAP.format(str(sprung)))
    if "model" in what:
        auto = {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"}
        edit(model / "config.json", model_type="unheard_of", architectures=["M"], auto_map=auto)
    if "tokenizer" in what:
        path = model / "tokenizer_config.json"
        edit(path, tokenizer_class="Unheard", auto_map={"AutoTokenizer": ["trap.T", "trap.T"]})
        edit(model / "config.json", model_type="llama4_text")  # has no tokenizer of its own
        (model / "tokenizer.json").unlink()


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_code_of_a_model_is_never_run_nor_asked_about(model, refused, tmp_path, what, monkeypatch):
    trapped(model, tmp_path / "sprung", what)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for command in commands(model)[what == "tokenizer" :]:
        line = refused("model" if what == "model" else "cannot be loaded", *command)
        assert what == "tokenizer" or "never run" in line
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(model))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("said", ["", "y\n" * 100], ids=["silent", "yes"])
def test_an_open_stdin_is_not_read(model, refused, tmp_path, monkeypatch, said):
    trapped(model, tmp_path / "sprung", "model")
    reader, writer = os.pipe()
    os.write(writer, said.encode())
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        started = time.process_time()
        refused("which is never run", "generate", model, "hello")
        assert time.process_time() - started < 10 and not (tmp_path / "sprung").exists()
        os.close(writer)
        assert stdin.read() == said


KERNELS = [
    {"attn_implementation": "org/kernel"},
    {"_attn_implementation": "org/kernel@v1:forward"},
    {"attn_implementation": "paged|org/kernel"},
    {"attn_implementation": {"": "org/kernel"}},
    {"text_config": {"_attn_implementation": "org/kernel"}},
    {"experts_implementation": "org/kernel"},
]


@pytest.mark.parametrize("fields", KERNELS, ids=str)
def test_a_kernel_repository_is_never_asked_for(model, refused, monkeypatch, fields):
    try:
        from transformers.integrations import hub_kernels

        monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: pytest.fail("it was fetched"))
    except (ImportError, AttributeError):
        pass
    edit(model / "config.json", **fields)
    for command in commands(model) if fields == KERNELS[0] else commands(model)[:2]:
        refused(["attn_implementation" if "experts" not in str(fields) else "experts", "never run"], *command)


def test_flash_attention_is_not_fetched_either(model, run):
    expected = load_model(str(model))[0].config._attn_implementation
    for name in ("attn_implementation", "_attn_implementation"):
        edit(model / "config.json", **{name: "flash_attention_2"})
        assert load_model(str(model))[0].config._attn_implementation == expected
        assert run("evaluate", model, *EVALUATE)[0] == run("inspect", model, "--check")[0] == 0
    fields = json.loads((model / "config.json").read_text())
    del fields["_attn_implementation"]
    (model / "config.json").write_text(json.dumps(fields | {"attn_implementation": "eager"}))
    assert load_model(str(model))[0].config._attn_implementation == "eager"


def test_every_call_of_from_pretrained_says_that_no_code_is_trusted():
    import ast
    from pathlib import Path

    for path in Path(aqlm_c.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                said = {keyword.arg for keyword in node.keywords}
                assert "trust_remote_code" in said or None in said, f"{path}:{node.lineno}"
                if None in said and "trust_remote_code" not in said:  # **options
                    assert '"trust_remote_code": False' in source or "hf_class" in source, f"{path}:{node.lineno}"


# ---- 1.5: what is read from a directory ---------------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "rules",
    [
        [["(([a-z_.0-9])+)+!", "2x8g8"]],
        [[f"layers.{n}", "2x8g8"] for n in range(20_000)],
        [[["a"], "2x8g8"]],
        [[f"(a+)+{n}", "2x8g8"] for n in range(100)],
        {"up": DEEP},
        "up",
        7,
    ],
    ids=["backtracks", "20,000", "no text", "many slow ones", "no scheme", "text", "a number"],
)
def test_rules_of_a_config(ours, run, rules):
    fields = json.loads((ours / "config.json").read_text())["quantization_config"]
    edit(ours / "config.json", quantization_config={**fields, "quant_method": "aqlm_c", "rules": rules})
    started = time.process_time()
    for command in commands(ours)[:3]:
        code, _, stderr = run(*command)
        backtracks = rules[0][0] == "(([a-z_.0-9])+)+!" if isinstance(rules, list) else False
        assert code == (0 if backtracks else 2), stderr
        if not backtracks:
            assert "rules" in stderr.splitlines()[-1] and "not expected:" not in stderr
    assert time.process_time() - started < 20


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("text", [DEEP, "[]", '{"a": ' + "9" * 6000 + "}", "\xff"], ids=range(4))
def test_files_that_are_no_json_object(ours, run, file, text):
    (ours / file).write_text(text, encoding="latin-1")
    code, _, stderr = run("generate", ours, "hello", "--max-new-tokens", 2)
    assert code == 2 or file == "generation_config.json"
    assert "not expected:" not in stderr and "Traceback" not in stderr and len(stderr) < 3000


READ = ["report.json", "run.yaml", "model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]


@pytest.mark.parametrize("name", [*READ, "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "socket"])
def test_what_is_no_regular_file_is_refused(ours, refused, name, kind):
    if name == "run.yaml":
        (ours / "report.json").unlink()
    (ours / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(ours / name)
    elif kind == "endless":
        (ours / name).symlink_to("/dev/zero")
    else:
        here = os.getcwd()
        os.chdir(ours)  # paths of sockets are short
        server = socket.socket(socket.AF_UNIX)
        server.bind(name)
        os.chdir(here)
    for command in commands(ours)[:3] if name not in ("report.json", "run.yaml") else commands(ours)[:1]:
        expected = "config.json" if name == "config.json" else name
        refused([expected], *command)


@pytest.mark.parametrize(
    ("shard", "words"), [("../x.safetensors", "files in this directory"), ("/x.safetensors", "files in this directory"),
                         ("a/../../x.safetensors", "files in this directory"), (7, "weight_map"), ("", "files in this"),
                         ("no.safetensors", "missing")], ids=str)  # fmt: skip
def test_an_index_that_leads_outside(model, refused, tmp_path, shard, words):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for command in commands(model):
        refused([words, "index.json"], *command)


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_local_experts"])
def test_more_layers_than_tensors(model, refused, name):
    edit(model / "config.json", **{name: 300_000})
    started = time.process_time()
    for command in commands(model):
        refused([f"{name} in", "config.json: got 300000, expected at most 512", "tensors"], *command)
    assert time.process_time() - started < 10


WRONG_REPORTS = [
    {"config": {"data": [["x"]]}},
    {"config": {"data": "x"}},
    {"config": {"model": {"a": {"b": 1}}}},
    {"versions": {"torch": ["2"]}, "config": {"seed": 1}},
    {"data": {"sources": ["x"]}, "config": {"seed": 1}},
    {"data": {"input_ids": {}}, "config": {"seed": 1}},
    {"model": ["x"]},
    {"tokens": "x"},
    {"threads": True},
]


@pytest.mark.parametrize("fields", WRONG_REPORTS, ids=str)
def test_a_report_with_other_types_is_none_of_ours(ours, run, fields):
    report = json.loads((ours / "report.json").read_text())
    assert known_provenance(report)["config"]["seed"] == 0
    assert known_provenance({**report, **fields}) == {}
    (ours / "report.json").write_text(json.dumps({**report, **fields}))
    code, stdout, _ = run("inspect", ours)
    assert code == 0 and "not recorded" in stdout


def test_text_of_others_commands_no_terminal(ours, run, tmp_path):
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m"
    report = json.loads((ours / "report.json").read_text())
    report["config"] |= {"model": evil, "data": [evil]}
    (ours / "report.json").write_text(json.dumps(report))
    tensors = load_file(ours / "model.safetensors")
    save_file({**tensors, f"x{evil}.weight": torch.zeros(2, 2)}, ours / "model.safetensors", {"format": "pt"})
    code, stdout, stderr = run("inspect", ours, "--json", tmp_path / "x.json")
    assert code == 0 and "\\x1b]0;owned" in stdout
    loud = run("inspect", ours, "--check")
    for text in (stdout, stderr, loud[1], loud[2], run("generate", ours, "hello")[2]):
        assert not set("\x1b\x07\x9b\u202e") & set(text)
    assert loud[0] == 2 and json.loads((tmp_path / "x.json").read_text())["provenance"]["config"]["model"] == evil
    assert printable("a\tb\nü漢😀") == "a\tb\nü漢😀" and printable("\r\ud800") == "\\r\\ud800"
    assert len(shown("x" * 10**6)) < 400 and len(one_line("x" * 10**6)) < 3000 and shown(10**5000) == "a int"


# ---- 1.5 and 1.6: --config and --data ------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    {
        LAUGHS: "more than 20000 values",
        LAUGHS + "data: *i\n": "more than 20000 values",
        "data: &a [*a]\n": "more than 20000 values",
        "a: &a {<<: *a}\n": "more than 20000 values",
        DEEP: "nested too deeply",
        "a: " * 3 + "{a: " * 50_000: "config: got",
        "seed: 2001-99-99": "config: got",
        f"seed: {'9' * 6000}": "config: got",
        "? [a]\n: b": "not YAML",
        "seed: !!binary '%'": "config: got",
    }.items(),
    ids=range(10),
)
def test_a_config_that_is_a_trap(tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(ValueError, match=f"(?s){words}") as error:
        RunConfig.from_file(tmp_path / "run.yaml")
    assert time.process_time() - started < 5 and len(str(error.value)) < 10_000


def test_aliases_of_people_are_fine(tmp_path):
    (tmp_path / "run.yaml").write_text("model: &m here\nout: *m\ndata: &d [a.txt]\noptions: {}\n")
    config = RunConfig.from_file(tmp_path / "run.yaml")
    assert (config.model, config.out, config.data) == ("here", "here", ["a.txt"])
    assert yaml.safe_load(config.to_yaml())["out"] == "here"


@pytest.mark.parametrize("kind", ["pipe", "endless", "directory"])
def test_data_and_config_must_be_regular_files(refused, tmp_path, dense, monkeypatch, kind):
    monkeypatch.setattr("aqlm_c.hf.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    for suffix in ("txt", "jsonl", "npy", "safetensors", "yaml"):
        path = tmp_path / f"x.{suffix}"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "endless":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        option = "--config" if suffix == "yaml" else "--data"
        refused([f"x.{suffix}", "regular file" if kind != "directory" else "directory"],
                "quantize", dense, tmp_path / "out", *SMALL, option, path)  # fmt: skip
        if option == "--data":
            refused(f"x.{suffix}", "evaluate", dense, option, path)


def test_an_archive_named_npy_and_arrays_larger_than_their_file(refused, tmp_path, dense):
    np.savez(tmp_path / "a.npz", np.arange(500))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    refused(["a.npy", "an archive of arrays"], "evaluate", dense, *EVALUATE, "--data", tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.arange(500))
    content = (tmp_path / "b.npy").read_bytes()
    (tmp_path / "b.npy").write_bytes(
        content.replace(b"(500,), }", b"(5000000000000,), }").replace(b"          \n", b"\n")
    )
    refused(["b.npy", "not a readable .npy file"], "evaluate", dense, *EVALUATE, "--data", tmp_path / "b.npy")
    for text in ('{"text": "\\ud800 and more"}', DEEP, '{"text": "x"'):
        (tmp_path / "c.jsonl").write_text(text)
        refused(["c.jsonl", "line 1"], "evaluate", dense, *EVALUATE, "--data", tmp_path / "c.jsonl")


# ---- 1.9 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "complex64", "nosuch", 7], ids=str)
def test_other_dtypes_are_one_line(model, ours, run, dtype):
    for directory, last in ((model, 4), (ours, 3)):
        edit(directory / "config.json", dtype=dtype, torch_dtype=dtype)
        for command in commands(directory)[1 : last if dtype == "float64" else 2]:
            code, _, stderr = run(*command)
            assert code in (0, 2) and "not expected:" not in stderr and "Traceback" not in stderr, stderr
            assert code == 0 or stderr.splitlines()[-1].startswith("aqlm-c: ")


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{% for", "{{ messages[7].content.x }}", "{{ 1 / 0 }}", "{{ 'x'|nosuch }}"],
)
def test_a_chat_template_that_raises(model, refused, template):
    (model / "chat_template.jinja").write_text(template)
    refused(["--chat: the chat template of", "fails", "expected --raw"], "generate", model, "hello")


def test_prompts_that_are_no_text(model, refused):
    refused(["PROMPT: got half of a character"], "generate", model, "\udcff")
    refused(["PROMPT: got half of a character"], "generate", model, "--raw", "x\ud800")


@pytest.mark.parametrize("temperature", [0, 1])
def test_nan_logits(model, refused, temperature):
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][:] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(["its logits are NaN"], "generate", model, "hello", "--temperature", temperature)
    refused(["the loss of window 0 is nan"], "evaluate", model, *EVALUATE)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3, "early_stopping": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beam_groups": 2, "diversity_penalty": 0.5},
        {"prompt_lookup_num_tokens": 3},
        {"bad_words_ids": "x"},
        {"eos_token_id": "x"},
        {"max_length": -5},
        {"cache_implementation": "nosuch"},
        {"custom_generate": "org/repository"},
    ],
    ids=str,
)
def test_generation_configs_of_others(model, run, fields):
    (model / "generation_config.json").write_text(json.dumps(fields))
    code, stdout, stderr = run("generate", model, "hello", "--max-new-tokens", 3)
    assert "not expected:" not in stderr and "Traceback" not in stderr
    if "num_beams" in fields:
        (model / "generation_config.json").write_text("{}")
        assert (code, stdout) == run("generate", model, "hello", "--max-new-tokens", 3)[:2] and code == 0
    else:
        assert code == 0 or stderr.splitlines()[-1].startswith("aqlm-c: ")


@pytest.mark.parametrize(
    "options",
    [
        ("--memory-limit", "9" * 400),
        ("--memory-limit", "9" * 5000),
        ("--memory-limit", "1" + "0" * 30 + "GiB"),
        ("--samples", "9" * 400),
        ("--sequence-length", "9" * 30),
        ("--seed", "9" * 400),
        ("--threads", "9" * 5000),
        ("--set", "cg_steps=" + "9" * 5000),
        ("--layers", "(" * 5000),
        ("--rule", "(a+)+\\1=2x4g8"),
        ("--scheme", "9" * 5000 + "x8g8"),
    ],
    ids=lambda options: options[0] + str(len(options[1])),
)
def test_long_numbers_and_texts(refused, dense, tmp_path, options):
    line = refused([], "quantize", dense, tmp_path / "out", *SMALL, *options)
    assert options[0].strip("-").replace("-", "_").split("_")[0] in line or "set" in options[0]
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_many_digits():
    for size in ("9" * 400, 10**400, "1" + "0" * 30 + "GiB", 2**63):
        with pytest.raises(ValueError, match="expected a number of bytes"):
            parse_size("x", size)
    assert parse_size("x", 2**63 - 1) == 2**63 - 1
