"""One run's configuration, from Python and from YAML, and what it leaves in OUT."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from tiny import BYTES, byte_tokenizer, tiny_llama

import aqlm_c
from aqlm_c import AqlmConfig, RunConfig, _core, load_model
from aqlm_c.recipe import FIELDS, PRESETS, SIZE_FIELDS, parse_option
from aqlm_c.run import run
from aqlm_c.units import parse_size

SMALL = {"scheme": "2x4g8", "samples": 4, "sequence_length": 32, "preset": "fast"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(torch.bfloat16, vocab_size=BYTES).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return tmp_path / "run.yaml"

    return write


def test_every_option_of_the_solver_is_one_of_a_run():
    options = set(AqlmConfig().to_dict())
    assert options - set(FIELDS) == {"num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size"}
    config, _, resolved = RunConfig("m", "o", scheme="1x4g16").resolve()
    assert config == AqlmConfig.from_scheme("1x4g16")
    assert resolved.keys() == set(FIELDS) - {"options"} and resolved["samples"] == 64
    assert config.to_dict().items() >= {name: resolved[name] for name in options & resolved.keys()}.items()
    assert all(resolved[name] is not None for name in options & resolved.keys())  # also where AqlmConfig decides


def test_a_configuration_needs_no_torch():
    code = "import sys, aqlm_c; aqlm_c.RunConfig('m', 'o').resolve()"
    check = "sys.exit(bool({'torch', 'transformers', 'rich', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", f"{code}; {check}"]).returncode == 0


def test_presets_resolve_and_explicit_options_win(monkeypatch):
    assert list(PRESETS) == ["fast", "balanced", "best", "tuned"]
    for name, options in PRESETS.items():
        config, _, resolved = RunConfig("m", "o", preset=name).resolve()
        assert options.items() <= {**resolved, **config.to_dict()}.items()
    assert RunConfig("m", "o", preset="tuned", tune={"steps": 7}).resolve().fields["tune"] == {"pv": True, "steps": 7}
    assert RunConfig("m", "o", preset="fast", finetune_epochs=3).resolve().config.tuning.finetune_epochs == 3
    assert RunConfig("m", "o", preset="best", finetune_epochs=0).resolve().config.tuning.finetune_epochs == 0
    monkeypatch.setitem(PRESETS, "fast", {"samples": 7})
    assert RunConfig("m", "o", preset="fast").resolve().fields["samples"] == 7
    assert RunConfig("m", "o", preset="fast", samples=8).resolve().fields["samples"] == 8


def test_an_explicit_solver_brings_its_own_defaults(file):
    path = file("model: a\nout: b\npreset: fast\nsolver: ldl\ninit_max_iter: 20\nrelative_mse_tolerance: 0.02\n")
    config, _, resolved = RunConfig.from_file(path, solver="paper").resolve()
    assert (config.options.init_max_iter, config.options.relative_mse_tolerance) == (100, 0.01)
    assert resolved["init_max_iter"] == 100
    assert RunConfig.from_file(path, solver="paper", init_max_iter=7).resolve().config.options.init_max_iter == 7


@pytest.mark.parametrize("inside", [".", "work", "a/b"])
def test_a_work_dir_inside_out_is_refused_before_any_work(model_dir, tmp_path, inside):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"work_dir: got .*, expected a folder outside of OUT="):
        run(RunConfig(model_dir, out, work_dir=out / inside, **SMALL))
    assert not out.exists()


def test_a_file_reads_like_python(file, tmp_path):
    path = file("model: a\nout: b\ndata: text.txt\nfinetune_learning_rate: 1e-4\nmemory_limit: 8GiB\nlayers: mlp\n")
    expected = RunConfig("a", "b", data=["text.txt"], finetune_learning_rate=1e-4, memory_limit=8 * 2**30, layers="mlp")
    assert RunConfig.from_file(path) == expected
    assert RunConfig.from_file(file(expected.to_yaml())) == expected
    assert RunConfig(tmp_path, tmp_path / "out", data=[tmp_path]).data == [str(tmp_path)]


def test_explicit_options_win_over_the_file(file):
    path = file("model: a\nout: b\npreset: best\nfinetune_epochs: 3\nseed: 5\n")
    config = RunConfig.from_file(path, seed=6, out="c")
    assert (config.model, config.out, config.seed, config.finetune_epochs) == ("a", "c", 6, 3)
    fast = RunConfig.from_file(path, preset="fast")  # and so does a preset, over all that presets set
    assert (fast.seed, fast.resolve().config.tuning.finetune_epochs) == (5, 0)
    assert RunConfig.from_file(path, preset="fast", finetune_epochs=1).resolve().config.tuning.finetune_epochs == 1


@pytest.mark.parametrize(
    ("text", "words"),
    {
        "finetune_epoch: 3": "unknown option 'finetune_epoch': did you mean 'finetune_epochs'?",
        "zzzzzzzz: 3": "unknown option 'zzzzzzzz': expected one of .*scheme",
        "1: 3": "unknown option 1: expected one of",
        "num_codebooks: 3": "unknown option 'num_codebooks'",
        "samples: few": "samples: got 'few', expected an integer",
        "samples: 1.5": r"samples: got 1\.5, expected an integer",
        "samples: [1]": r"samples: got \[1\], expected an integer",
        "seed: true": "seed: got True, expected an integer",
        "shuffle: 1": "shuffle: got 1, expected true or false",
        "shuffle: maybe": "shuffle: got 'maybe', expected true or false",
        "scheme: 28": "scheme: got 28, expected text",
        "scheme: null": "scheme: got None, expected text",
        "data: [1]": "data: got 1, expected text",
        "data: {a: b}": "data: got {'a': 'b'}, expected texts",
        "relative_damp: x": "relative_damp: got 'x', expected a number",
        "preset: slow": "preset: got 'slow', expected one of fast, balanced, best",
        "memory_limit: 8 elephants": "memory_limit: got '8 elephants', expected a number of bytes",
        "threads: 0": r"threads: got 0, expected an integer in 1\.\.1024",
        "- scheme": "got list, expected a mapping",
        "": "got NoneType, expected a mapping",
        "a: b: c": "not YAML: .*mapping values",
        "a: \x00": "not YAML",
        "!!python/name:os.system": "not YAML",
    }.items(),
)
def test_a_wrong_file_is_named_with_what_is_wrong(file, text, words):
    path = file(text)
    with pytest.raises(ValueError, match=f"(?s)config: got '{path}': {words}"):
        RunConfig.from_file(path)


def test_a_missing_file_and_missing_fields(tmp_path):
    with pytest.raises(ValueError, match=f"config: got '{tmp_path}/no.yaml': no such file"):
        RunConfig.from_file(tmp_path / "no.yaml")
    with pytest.raises(ValueError, match="MODEL: missing, expected a directory, a hub name"):
        RunConfig(out="o").resolve()
    with pytest.raises(ValueError, match="OUT: missing, expected a directory"):
        RunConfig("m").resolve()
    with pytest.raises(ValueError, match="solver: got 'x', expected one of"):
        RunConfig("m", "o", solver="x").resolve()


def test_sizes():
    sizes = {"8GiB": 8 * 2**30, "8G": 8 * 2**30, "8g": 8 * 2**30, "1.5 kB": 1500, "1.5 KB": 1500, "500": 500, 7: 7}
    sizes |= {"2TiB": 2**41, "3MB": 3_000_000, "500mb": 500_000_000, "64M": 2**26, "0.5 gib": 2**29}
    for text, size in sizes.items():
        assert parse_size("x", text) == size
    for wrong in (0, -1, True, "", "GiB", "nan", "0 MB", "8 GiBi", "8 bG", "8Gb/s", "1e3", "1,000"):
        with pytest.raises(ValueError, match="expected a number of bytes"):
            parse_size("x", wrong)


def test_options_as_text_have_the_type_of_their_field():
    assert parse_option("max_sweeps=3") == ("max_sweeps", 3)
    assert parse_option("relative_damp=1e-3") == ("relative_damp", 1e-3)
    assert parse_option("solver=paper") == ("solver", "paper")
    for text, words in {
        "max_sweeps": "--set: got 'max_sweeps', expected name=value",
        "max_sweep=3": "unknown option 'max_sweep': did you mean 'max_sweeps'?",
        "max_sweeps=3.5": "max_sweeps: got '3.5', expected an integer",
        "num_codebooks=3": "unknown option 'num_codebooks'",
        "out=x": "unknown option 'out'",
    }.items():
        with pytest.raises(ValueError) as error:
            parse_option(text)
        assert words in str(error.value)


def test_out_holds_what_reproduces_it(model_dir, tmp_path):
    config = RunConfig(model_dir, tmp_path / "a", seed=3, overwrite=True, **SMALL)
    report = run(config)
    text = (tmp_path / "a" / "run.yaml").read_text()
    assert f"aqlm_c {aqlm_c.__version__}, python " in text.splitlines()[0]
    assert report.data["sources"]["pydoc_data.topics"] in text and report.data["input_ids"] in text
    resolved = yaml.safe_load(text)
    assert resolved.keys() >= set(FIELDS) - {
        "options",
        "bits",
        "target_size",
        "candidates",
        "tune",
        "statistics",
        *SIZE_FIELDS,
        "layers",
        "work_dir",
        "memory_limit",
        "device_memory_limit",
        "overwrite",
    }
    assert "overwrite" not in resolved  # which would let the next run replace a model unasked
    assert resolved["finetune_epochs"] == PRESETS["fast"]["finetune_epochs"] and resolved["seed"] == 3

    written = json.loads((tmp_path / "a" / "report.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert resolved.items() <= written["config"].items()
    assert len(written["layers"]) == 14 and written["versions"]["aqlm_c"] == aqlm_c.__version__
    assert written["sizes"]["quantized_bytes"] == (tmp_path / "a" / "model.safetensors").stat().st_size

    again = RunConfig.from_file(tmp_path / "a" / "run.yaml", out=str(tmp_path / "b"))
    run(again)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="OUT: got"):
        run(RunConfig.from_file(tmp_path / "a" / "run.yaml"))
    assert load_model(str(tmp_path / "a"))[2].quantized


def test_a_loaded_model_is_not_loaded_again(model_dir, tmp_path, monkeypatch):
    loaded = load_model(str(model_dir))
    monkeypatch.setattr("aqlm_c.hf.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run(RunConfig(model_dir, tmp_path / "out", **SMALL), loaded=loaded).model == str(model_dir)


def test_wrong_input_is_refused_before_the_model_is_loaded(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("aqlm_c.hf.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    for options, words in [
        ({"data": ["no.txt"]}, r"data: got 'no\.txt': no such file"),
        ({"scheme": "2x4g8o2"}, "out_group_size: got 2"),
        ({"out": tmp_path}, "OUT: got"),
    ]:
        with pytest.raises((ValueError, OSError), match=words):
            run(RunConfig(**{"model": model_dir, "out": tmp_path / "out", **options}))


def test_work_dir_and_memory_limit_reach_quantize_model(model_dir, tmp_path, monkeypatch):
    calls = []

    def stop(*_, **options):
        calls.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("aqlm_c.quantize.quantize_model", stop)
    for limits in ({}, {"work_dir": str(tmp_path / "w"), "memory_limit": "1KiB"}):
        with pytest.raises(KeyboardInterrupt):
            run(RunConfig(model_dir, tmp_path / "out", **SMALL, **limits))
    assert calls[0]["work_dir"] is None and calls[0]["memory_limit"] is None
    assert (calls[1]["work_dir"], calls[1]["memory_limit"]) == (str(tmp_path / "w"), 1024)
    assert list(tmp_path.iterdir()) == []


def test_threads_are_set_for_both_bindings(model_dir, tmp_path):
    before = torch.get_num_threads(), _core.get_num_threads()
    try:
        report = run(RunConfig(model_dir, tmp_path / "out", threads=1, **SMALL))
        assert (report.threads, torch.get_num_threads()) == (1, 1)
        assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["threads"] == 1
    finally:
        torch.set_num_threads(before[0])
        _core.set_num_threads(before[1])
