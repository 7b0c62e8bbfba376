"""A model against its original: KL, top-1 and perplexity with their errors, from logits that come in slices."""

import json
import math
import re

import numpy as np
import pytest
import torch
from heads import CONFIGS, PROPHETNET
from tiny import BYTES, byte_tokenizer, random_model, random_tokens, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

import aqlm_c
from aqlm_c import divergence, evaluate, evaluate_models, perplexity, quantize_model
from aqlm_c.cli.main import main
from aqlm_c.evaluate import Recorded
from aqlm_c.model import logits as logits_module
from aqlm_c.model.logits import SplitModel
from aqlm_c.report.evaluation import figure_text

pytestmark = pytest.mark.usefixtures("one_thread")


def noisy(model, scale=0.1):
    """A copy that is near to a model."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter += scale * parameter.std() * torch.randn_like(parameter)
    return copy


def truth(model, original, windows):
    """The figures in float64, from all logits at once."""
    kl, losses, originals, agree = [], [], [], []
    for ids in windows:
        with torch.no_grad():
            p, q = (each(ids[None]).logits[0, :-1].double().log_softmax(-1) for each in (original, model))
        kl.append((p.exp() * (p - q)).sum(-1))
        agree.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
        for found, log_p in ((losses, q), (originals, p)):
            found.append(-log_p[torch.arange(len(ids) - 1), ids[1:]].mean().item())
    n, tokens = len(windows), torch.cat(kl)
    change = np.subtract(losses, originals)
    return {
        "perplexity": math.exp(np.mean(losses)),
        "perplexity_stderr": math.exp(np.mean(losses)) * np.std(losses, ddof=1) / math.sqrt(n),
        "kl": tokens.mean().item(),
        "kl_stderr": np.std([window.mean().item() for window in kl], ddof=1) / math.sqrt(n),
        "kl_p99": np.quantile(tokens.numpy(), 0.99),
        "top1": np.mean(agree),
        "original_perplexity": math.exp(np.mean(originals)),
        "original_perplexity_stderr": math.exp(np.mean(originals)) * np.std(originals, ddof=1) / math.sqrt(n),
        "perplexity_ratio": math.exp(np.mean(change)),
        "perplexity_ratio_stderr": math.exp(np.mean(change)) * np.std(change, ddof=1) / math.sqrt(n),
    }


def test_a_model_whose_output_layer_is_not_found_is_compared_by_whole_windows():
    model, stream = random_model(PROPHETNET), random_tokens(1, 48)[0]
    assert not SplitModel(model).is_split
    figures = divergence(noisy(model), model, stream, 12)
    wanted = truth(noisy(model), model, stream.view(4, 12))
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["llama, tied", "soft caps", "GPT-2"])
@pytest.mark.parametrize("positions", [1, 7, 256])
def test_divergence_is_what_all_logits_say(monkeypatch, name, positions):
    monkeypatch.setattr(evaluate, "_SLICE", positions)
    original, stream = random_model(CONFIGS[name]), random_tokens(1, 105)[0]
    model, seen = noisy(original), []
    figures = divergence(model, original, stream, 20, progress=lambda *state: seen.append(state))
    wanted = truth(model, original, stream[:100].view(5, 20))
    assert wanted["kl"] > 0.001 and 0 < wanted["top1"] < 1
    assert {key: figures[key] for key in wanted} == pytest.approx(wanted, rel=2e-5)
    assert (figures["windows"], figures["sequence_length"], figures["tokens"]) == (5, 20, 100)
    assert [state[:2] for state in seen] == [(i + 1, 5) for i in range(5)]
    alone = perplexity(model, stream, 20)
    assert alone["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-6)
    assert alone["perplexity_stderr"] == pytest.approx(figures["perplexity_stderr"], rel=1e-4)


def test_a_model_is_nothing_from_itself():
    model = tiny_llama(torch.bfloat16)
    figures = divergence(model, model, random_tokens(1, 64), 32)
    assert (figures["kl"], figures["kl_p99"], figures["top1"], figures["perplexity_ratio"]) == (0, 0, 1, 1)
    assert figures["kl_stderr"] == figures["perplexity_ratio_stderr"] == 0
    once = divergence(model, model, random_tokens(1, 64), 32, windows=1)
    assert once["perplexity_stderr"] is once["kl_stderr"] is once["original_perplexity_stderr"] is None


def test_bos_stands_before_each_window():
    original, stream = tiny_llama(), random_tokens(1, 60)[0]
    model = noisy(original)
    windows = torch.cat([torch.full((4, 1), 7), stream.view(4, 15)], dim=1)
    figures = divergence(model, original, stream, 16, bos_token=7)
    wanted = truth(model, original, windows)
    assert {key: figures[key] for key in wanted} == pytest.approx(wanted, rel=2e-5)


def test_a_quantized_model_with_a_quantized_head():
    original, stream = tiny_llama(tie_word_embeddings=False), random_tokens(1, 64)[0]
    model = tiny_llama(tie_word_embeddings=False)
    rules = {"embed_tokens|lm_head": "2x4g8"}
    options = {"ldl_passes": 1, "max_sweeps": 1, "init_max_iter": 2, "finetune_epochs": 0}
    quantize_model(model, random_tokens(4, 16), aqlm_c.AqlmConfig.from_scheme("2x4g8", rules=rules, **options))
    assert isinstance(model.lm_head, aqlm_c.QuantizedLinear)
    wanted = truth(model, original, stream.view(4, 16))
    figures = divergence(model, original, stream, 16)
    assert {key: figures[key] for key in wanted} == pytest.approx(wanted, rel=1e-3)


class Largest(TorchDispatchMode):
    """The most numbers of a float32 tensor that came up."""

    most = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.most = max(self.most, tensor.numel())
        return found


def test_never_all_logits_of_a_window_in_float32(monkeypatch):
    monkeypatch.setattr(evaluate, "_SLICE", 16)
    model = tiny_llama(torch.bfloat16, vocab_size=1024, hidden_size=16, tie_word_embeddings=False)
    stream = torch.randint(1024, (128,), generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        divergence(noisy(model), model, stream, 64)
        perplexity(model, stream, 64)
    assert 16 * 1024 <= largest.most < 32 * 1024


def test_a_standard_error_is_a_number():
    assert math.isfinite(evaluate._perplexity("perplexity", [600.0, 699.0])["perplexity_stderr"])  # of exp(649)


def test_tokens_that_windows_with_bos_need():
    model, stream = tiny_llama(), torch.full((46,), 5)
    assert perplexity(model, stream[:45], 16, 3, bos_token=7)["windows"] == 3
    with pytest.raises(ValueError, match="44 tokens, expected at least 45 for windows=3"):
        perplexity(model, stream[:44], 16, 3, bos_token=7)
    with pytest.raises(ValueError, match="45 tokens, expected at least 46 for windows=3"):
        perplexity(model, stream[:45], 16, 3, bos_token=5)


def test_what_divergence_refuses():
    model, ids = tiny_llama(), random_tokens(1, 64)
    with pytest.raises(ValueError, match="model: got 96 logits, expected 128 as the original has"):
        divergence(model, tiny_llama(vocab_size=128), ids, 32)
    recorded = Recorded(SplitModel(model), ids.view(4, 16))
    with pytest.raises(ValueError, match="original: got 4 recorded windows, expected 2 of the same length"):
        divergence(model, recorded, ids, 32)
    broken = tiny_llama()
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="original: the loss of window 0 is nan"):
        divergence(model, broken, ids, 32)
    with pytest.raises(ValueError, match="model: the loss of window 0 is nan"):
        divergence(broken, model, ids, 32)


def test_figures_of_broken_models_are_short():
    assert [figure_text(value) for value in (None, 1.08, 123456.7, 4.02e18)] == [
        "-",
        "1.0800",
        "123456.7000",
        "4.0200e+18",
    ]


# ---- evaluate_models and the command line ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An original and two models near it, as directories."""
    root = tmp_path_factory.mktemp("models")
    original = tiny_llama(vocab_size=BYTES)
    for name, model in (("original", original), ("near", noisy(original, 0.03)), ("far", noisy(original, 0.3))):
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def texts(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, word in zip(paths, ("happy families ", "a truth universally "), strict=True):
        path.write_text("".join(f"{word}{n} " for n in range(40)))
    return [str(path) for path in paths]


def same(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_several_models_and_texts(models, texts, monkeypatch):
    names, against = [str(models / "near"), str(models / "far")], str(models / "original")
    said = []
    progress = type("Said", (), {"on_phase": lambda self, name: said.append(name), "on_window": lambda *_: None})()
    result = evaluate_models(names, texts, against, progress=progress, sequence_length=32, windows=4)
    assert [(row["model"], row["data"]) for row in result.results] == [(m, t) for m in names for t in texts]
    assert said[:4] == [f"load {against}", *(f"{against} on {text}" for text in texts), f"load {names[0]}"]
    for row in result.results:
        (near, _, _), (original, tokenizer, _) = (aqlm_c.load_model(name) for name in (row["model"], against))
        stream = aqlm_c.token_stream(row["data"], tokenizer)
        figures = divergence(near, original, stream, 32, 4)
        assert same([row])[0] | same([figures])[0] == same([row])[0]
    assert result.results[0]["kl"] < result.results[2]["kl"]
    monkeypatch.setattr(evaluate, "available_memory", lambda: 0)  # no room for hidden states: it runs each time
    assert same(evaluate_models(names, texts, against, sequence_length=32, windows=4).results) == same(result.results)
    monkeypatch.setattr(logits_module._Body, "leave", lambda *_: False)
    assert same(evaluate_models(names, texts, against, sequence_length=32, windows=4).results) == same(result.results)
    alone = evaluate_models(names[0], texts[0], sequence_length=32, windows=4)
    assert alone.results[0]["perplexity"] == pytest.approx(result.results[0]["perplexity"], rel=1e-6)
    assert "KL" in result._repr_html_() and "perplexity" in repr(result)
    with pytest.raises(ValueError, match="what: got 'layers', expected 'results' or 'tasks'"):
        result.to_frame("layers")


def test_the_command_line(models, texts, tmp_path, capsys):
    report = tmp_path / "e.json"
    names = [str(models / "near"), str(models / "far"), "--against", str(models / "original")]
    options = [
        "--data",
        texts[0],
        "--data",
        texts[1],
        "--sequence-length",
        "32",
        "--windows",
        "3",
        "--json",
        str(report),
    ]
    assert main(["evaluate", *names, *options]) == 0
    out, err = capsys.readouterr()
    written = json.loads(report.read_text())
    assert (written["models"], written["against"], written["device"]) == (names[:2], names[3], "cpu")
    assert len(written["results"]) == 4 and written["tasks"] == []
    keys = {"model", "data", "sha256", "bos", "perplexity", "perplexity_stderr", "kl", "kl_p99", "top1", "windows"}
    assert all(keys <= row.keys() and row["bos"] is None for row in written["results"])
    rows = [line for line in out.splitlines() if re.search(r"\boriginal\b.*\d\.\d", line)]  # of the table
    assert len(rows) == 2 and "cut without a BOS token" in out and "KL(original || model)" in out
    assert f"{written['results'][0]['kl']:.5f}" in out and f"{written['results'][0]['top1']:.2%}" in out
    assert f"{names[0]} on {texts[1]} ..." in err
    assert main(["evaluate", *names, *options, "--quiet"]) == 0
    rows = json.loads(report.read_text())["results"]
    figures = [[row[name] for name in ("perplexity", "kl", "kl_p99", "top1")] for row in rows]
    assert [list(map(float, line.split())) for line in capsys.readouterr().out.splitlines()] == figures
    assert main(["evaluate", *names[:2], *options]) == 0  # without an original
    out = capsys.readouterr().out
    assert "KL" not in out and "±" in out and json.loads(report.read_text())["model"] == names[0]
    assert main(["evaluate", names[0], *options, "--dtype", "bfloat16"]) == 0
    assert "standard error" in capsys.readouterr().out and json.loads(report.read_text())["dtype"] == "bfloat16"


def test_what_is_refused_before_anything_is_loaded(models, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aqlm_c.hf.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    other, wide = tmp_path / "other", tmp_path / "wide"
    tiny_llama(vocab_size=BYTES + 1).save_pretrained(other)
    byte_tokenizer(additional_special_tokens=["<new>"]).save_pretrained(other)
    tiny_llama(vocab_size=BYTES + 7).save_pretrained(wide)
    byte_tokenizer().save_pretrained(wide)
    near, original = str(models / "near"), str(models / "original")
    for words, *arguments in (
        (["'<new>'", "number 257 there and none here"], near, "--against", str(other)),
        ([f"with {BYTES + 7} logits, expected {BYTES}"], near, "--against", str(wide)),
        (["model: got './nosuch': no such model"], near, "./nosuch", "--against", original),
        (["model: got './nosuch': no such model"], near, "--against", "./nosuch"),
        (["model: got './nosuch': no such model"], near, "./nosuch"),
        (["data: got 'nosuch.txt': no such file"], near, "--data", "nosuch.txt"),
        (["--dtype: got 'int8', expected one of auto, float32"], near, "--dtype", "int8"),
        (["--limit: got 0"], near, "--limit", "0"),
        (["--shots: got 6, expected an integer in 0..5"], near, "--shots", "6"),
        (["--record: got", "expected a directory with the report.json"], near, "--record"),
    ):
        assert main(["evaluate", *arguments, "--sequence-length", "32"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert all(word in line for word in words), line
        assert line.startswith("aqlm-c: ") and "not expected:" not in line
    with pytest.raises(ValueError, match=r"models: got \[\], expected at least one"):
        evaluate_models([])


def test_a_text_too_short_for_the_original_is_named(models, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short")
    arguments = [str(models / "near"), "--against", str(models / "original"), "--data", str(tmp_path / "short.txt")]
    assert main(["evaluate", *arguments, "--sequence-length", "64"]) == 2
    assert f"data: got '{tmp_path / 'short.txt'}': input_ids: 5 tokens, expected" in capsys.readouterr().err


@pytest.fixture(scope="module")
def broken(models):
    """A model whose logits are NaN, which is seen when it runs; another whose file is cut."""
    model = tiny_llama(vocab_size=BYTES)
    model.model.norm.weight.data[0] = torch.nan
    for name in ("nan", "cut"):
        model.save_pretrained(models / name)
        byte_tokenizer().save_pretrained(models / name)
    (models / "cut" / "model.safetensors").write_bytes(b"\x08")
    return models


def test_rows_before_an_error_are_shown(broken, texts, tmp_path, capsys):
    names = [str(broken / "near"), str(broken / "nan")]
    options = ["--data", texts[0], "--sequence-length", "32", "--windows", "2", "--json", str(tmp_path / "e.json")]
    assert main(["evaluate", *names, *options, "--quiet"]) == 2
    out, err = capsys.readouterr()
    found = aqlm_c.Evaluation(["-"])
    with pytest.raises(ValueError, match="the loss of window 0 is nan"):
        evaluate_models(names, texts[0], sequence_length=32, windows=2, found=found)
    (row,) = found.results
    assert row["model"] == names[0] and found.models == names and float(out) == row["perplexity"]
    assert "the loss of window 0 is nan" in err and not (tmp_path / "e.json").exists()


def test_what_is_known_before_the_work_is_refused_before_it(broken, texts, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("ab")
    near, original, data = str(broken / "near"), str(broken / "original"), [texts[0], str(tmp_path / "short.txt")]
    monkeypatch.setattr(evaluate, "SplitModel", None)  # called for the first window
    monkeypatch.setattr(evaluate._Work, "run_tasks", None)
    for against in (None, original):
        with pytest.raises(ValueError, match=r"short\.txt.*2 tokens, expected at least 32"):
            evaluate_models(near, data, against, sequence_length=32)
    for names, against in (([near, str(broken / "cut")], None), ([near], str(broken / "cut"))):
        with pytest.raises(ValueError, match=r"cut/model\.safetensors: expected a complete safetensors file"):
            evaluate_models(names, texts[0], against, sequence_length=32)
    with pytest.raises(ValueError, match="bos: got 'always', expected 'auto' or 'never'"):
        evaluate_models([near, original], texts[0], sequence_length=32, bos="always")


def test_what_cannot_be_recorded_is_refused(models, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    for folder in (out, other):
        folder.mkdir()
        (folder / "a.txt").write_text("a")
    texts = ["--data", str(out / "a.txt"), "--data", str(other / "a.txt")]
    for arguments, content, said in (
        ([str(out), *texts], "{}", "--record: got 'a.txt', expected files of different names"),
        ([str(out), "--tasks", "piqa", "--task-data", str(out)], "{}", "expected --data, too"),
        ([str(out), *texts[:2]], "[]", "report.json: got list, expected a JSON object"),
        ([str(models / "near"), *texts[:2]], "{}", "--record: got '"),
    ):
        (out / "report.json").write_text(content)
        assert main(["evaluate", *arguments, "--record"]) == 2
        assert said in capsys.readouterr().err


def test_recorded_figures_are_pairs(models, texts, tmp_path):
    out = tmp_path / "out"
    small = ["--scheme", "2x4g8", "--samples", "4", "--sequence-length", "32", "--preset", "fast", "--quiet"]
    assert main(["quantize", str(models / "original"), str(out), *small]) == 0
    arguments = [str(out), "--against", str(models / "original"), "--data", texts[0], "--sequence-length", "32"]
    assert main(["evaluate", *arguments, "--record", "--quiet", "--json", str(tmp_path / "e.json")]) == 0
    (row,) = json.loads((tmp_path / "e.json").read_text())["results"]
    ((name, pair),) = json.loads((out / "report.json").read_text())["perplexity"].items()
    assert name.startswith("a.txt, ") and pair == [row["original_perplexity"], row["perplexity"]]
    assert f"| {name} | {pair[0]:.3f} | {pair[1]:.3f} |" in (out / "README.md").read_text()
    assert main(["inspect", str(out)]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu(name):
    original = random_model(CONFIGS[name])
    model, stream = noisy(original), random_tokens(1, 100)[0]
    wanted = divergence(model, original, stream, 20)
    for place in ("cuda", "cpu"):  # of the original
        found = divergence(model.to("cuda"), original.to(place), stream, 20)
        for key in ("perplexity", "kl", "kl_p99", "original_perplexity", "perplexity_ratio"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-2), key
