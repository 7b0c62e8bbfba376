"""The model card, and what reaches the hub: a hub that is a dictionary, no network."""

import functools
import json
import re
import types

import huggingface_hub
import pytest
import torch
from tiny import FAST, SCHEME, random_tokens, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

import aqlm_c
import aqlm_c.hf
from aqlm_c.hf.card import model_card, push_to_hub, record_perplexity
from aqlm_c.inspection import inspect_model
from aqlm_c.recipe import AqlmConfig

HUB_NAME = "someone/tiny-llama"


@pytest.fixture
def quantized():
    """A quantized model, and its report."""
    model = tiny_llama()
    report = aqlm_c.quantize_model(model, random_tokens(2, 16), AqlmConfig.from_scheme(SCHEME, **FAST)).to_dict()
    report["data"] = {
        "sources": {"/home/me/text.txt": "ab12", "Salesforce/wikitext,wikitext-2-raw-v1:train": None},
        "input_ids": "cd34",
    }
    report["model"] = HUB_NAME
    report["sizes"] = {"original_bytes": 10_000_000, "quantized_bytes": 2_500_000}
    return model, report


def front(text):
    return huggingface_hub.ModelCard(text).data.to_dict()


def test_everything_that_is_known_is_on_the_card(quantized, tmp_path):
    model, report = quantized
    theirs = "license: other\nlicense_name: tiny-licence\nlicense_link: LICENSE\nlanguage:\n- en\ntags: [theirs]"
    (tmp_path / "README.md").write_text(f"---\n{theirs}\n---\nText")
    text = model_card(model, report, tmp_path, perplexity={"wikitext | test": (10.5, 12.25), "more": 13.0})
    assert front(text) == {
        "base_model": HUB_NAME,
        "base_model_relation": "quantized",
        "datasets": ["Salesforce/wikitext"],
        "language": ["en"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["aqlm", "aqlm_c", "quantized"],
    }
    assert f"# {HUB_NAME}, quantized to {SCHEME}\n" in text
    assert f"{report['bits_per_weight']:.3f} bits per weight of the quantized layers" in text
    assert "import aqlm_c.hf" in text and "AutoModelForCausalLM.from_pretrained(" in text
    assert "| text.txt | ab12 |\n" in text and "/home/me" not in text
    assert "| all token ids | cd34 |\n" in text and "2 sequences, 32 tokens" in text
    assert "| wikitext \\| test | 10.500 | 12.250 |\n| more | - | 13.000 |\n" in text
    assert "10.0 MB before, 2.5 MB quantized" in text
    assert "tiny-licence (LICENSE), as the original model." in text


def test_the_card_says_how_it_was_made_and_its_code_runs(quantized, tmp_path, monkeypatch, capsys):
    model, report = quantized
    report["config"]["preset"] = "fast"
    text = model_card(model, {**report, "perplexity": {"test.txt": 12.25}})
    worst = max(report["layers"], key=lambda layer: layer["relative_error"])
    for line in (
        "| preset | fast |",
        f"| solver | {report['config']['solver']} |",
        f"| seed | {report['config']['seed']} |",
        f"| torch | {torch.__version__} |",
        f"worst {worst['relative_error']:.5f} ({worst['name']}) |",
        "| test.txt | - | 12.250 |",
        "pip install 'aqlm-c[hf]'",
        "aqlm-c exec -- ",
    ):
        assert line in text, line
    aqlm_c.save_quantized(model, tiny_tokenizer(), tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("THIS_REPOSITORY", "./out"), "card", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_perplexity_is_recorded_in_report_and_card(quantized, tmp_path):
    model, report = quantized
    out = tmp_path / "out"
    files = {"report.json": json.dumps(report), "README.md": model_card(model, report, license="mit") + "\nMy words.\n"}
    aqlm_c.save_quantized(model, None, out, extra_files=lambda _: files)
    before = (out / "README.md").read_text()
    record_perplexity(out, {"a.txt": 20.0})
    record_perplexity(out, {"b | c": 10.5, "a.txt": 21.0})
    text = (out / "README.md").read_text()
    section = "## Perplexity\n\n| data | original | quantized |\n| --- | --- | --- |\n"
    section += "| a.txt | - | 21.000 |\n| b \\| c | - | 10.500 |\n\n"
    assert text.replace(section, "") == before and "My words." in text
    assert text.index("## Calibration") < text.index("## Perplexity") < text.index("## Licence")
    assert json.loads((out / "report.json").read_text()) == {**report, "perplexity": {"a.txt": 21.0, "b | c": 10.5}}
    assert section in model_card(model, json.loads((out / "report.json").read_text()))
    assert not list(out.glob(".*"))
    with pytest.raises(ValueError, match=r"expected a directory with the report\.json"):
        record_perplexity(tmp_path, {"a": 1.0})


def test_figures_of_others_that_are_none_are_left_out(quantized, tmp_path):
    model, report = quantized
    known = {
        "a": 3.0,
        "b": [4.0, 5],
        "c": "x",
        "d": None,
        "e": [1, 2, 3],
        "f": {},
        "g": float("nan"),
        "h": True,
        "i": [],
    }
    text = model_card(model, {**report, "perplexity": known})
    assert "| a | - | 3.000 |\n| b | 4.000 | 5.000 |\n\n" in text
    assert "## Perplexity" not in model_card(model, {**report, "perplexity": ["x"]})
    (tmp_path / "report.json").write_text(json.dumps({"perplexity": known}))
    record_perplexity(tmp_path, {"a": [None, 4e18]})
    assert json.loads((tmp_path / "report.json").read_text()) == {"perplexity": {"a": [None, 4e18], "b": [4.0, 5]}}
    assert "| a | - | 4.000e+18 |" in model_card(model, report, perplexity={"a": 4e18})


def test_what_is_loaded_and_saved_again_keeps_where_it_came_from(quantized, tmp_path):
    model, report = quantized
    files = {"report.json": json.dumps(report), "run.yaml": "scheme: 1x4g8\n", "README.md": "card"}
    aqlm_c.save_quantized(model, None, tmp_path / "out", extra_files=lambda _: files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    aqlm_c.save_quantized(loaded, None, tmp_path / "third")
    for name in ("again", "third"):
        for file in ("report.json", "run.yaml"):
            assert (tmp_path / name / file).read_text() == files[file]
        assert inspect_model(tmp_path / name).provenance["config"] == report["config"]
    own = {"report.json": "{}"}  # of a later run
    aqlm_c.save_quantized(loaded, None, tmp_path / "own", extra_files=lambda _: own)
    assert (tmp_path / "own" / "report.json").read_text() == "{}"
    loaded.save_pretrained(tmp_path / "not-main", is_main_process=False)
    loaded.dequantize().save_pretrained(tmp_path / "dense")
    for name in ("not-main", "dense"):
        assert not (tmp_path / name / "report.json").exists()


def test_nothing_is_made_up(quantized):
    model, _ = quantized
    text = model_card(model)
    assert front(text).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "it is not known here" in text
    assert "Perplexity" not in text and "Calibration" not in text and "None" not in text


@pytest.mark.parametrize("readme", [None, "no front matter", "---\nlicense: [\n---\n", b"\xff\xfe"])
def test_a_licence_that_cannot_be_read_is_left_out(quantized, tmp_path, readme):
    if readme is not None:
        (tmp_path / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    assert "license" not in front(model_card(*quantized, tmp_path))
    assert front(model_card(*quantized, tmp_path, license="mit"))["license"] == "mit"


def test_rules_are_listed():
    model = tiny_llama()
    config = AqlmConfig.from_scheme(SCHEME, rules={"k_proj|q_proj": "1x3g8", "v_proj": "dense"}, **FAST)
    report = aqlm_c.quantize_model(model, random_tokens(2, 16), config)
    text = model_card(model, report.to_dict())
    assert "| `k_proj\\|q_proj` | 1x3g8 |\n| `v_proj` | dense |\n" in text
    assert f"quantized to {SCHEME} and 1x3g8" in text
    assert f"{report.bits_per_weight:.3f} bits per weight of the quantized layers" in text


def test_a_local_model_is_called_by_its_last_name_only(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    config = aqlm_c.hf.AqlmConfig(scheme=SCHEME, **FAST)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", quantization_config=config)
    text = model_card(model, model.hf_quantizer.report.to_dict())
    assert "# mine, quantized to" in text and str(tmp_path) not in text and "Quantized without data." in text
    assert front(text)["license"] == "apache-2.0" and "base_model" not in front(text)


@pytest.fixture
def hub(monkeypatch):
    """{repository: {file: bytes}}, in the place of huggingface.co."""
    repositories = {}

    def create_repo(self, repo_id, **options):
        repositories.setdefault(repo_id, {})
        return types.SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **options):
        files = {str(path.relative_to(folder_path)): path.read_bytes() for path in folder_path.rglob("*")}
        repositories[repo_id] |= files
        return types.SimpleNamespace(commit_url="https://hub/commit")

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            with operation.as_file() as file:
                repositories[repo_id][operation.path_in_repo] = file.read()

    def load(repo_id, **options):
        if "README.md" not in repositories[repo_id]:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no README.md")
        return huggingface_hub.ModelCard(repositories[repo_id]["README.md"].decode())

    import transformers.utils.hub as theirs

    functions = {"create_repo": create_repo, "upload_folder": upload_folder, "create_commit": create_commit}
    for name, function in functions.items():
        monkeypatch.setattr(huggingface_hub.HfApi, name, function)
        if hasattr(theirs, name):  # transformers 4
            monkeypatch.setattr(theirs, name, functools.partial(function, None))
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", load)
    return repositories


def test_push_to_hub(hub, tmp_path, monkeypatch):
    dense = tmp_path / "dense"
    tiny_llama().save_pretrained(dense)
    config = aqlm_c.hf.AqlmConfig(scheme=SCHEME, dataset=random_tokens(2, 16), **FAST)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert push_to_hub(model, "me/tiny", tiny_tokenizer()) == "https://hub/commit"
    files = hub["me/tiny"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    card = files["README.md"].decode()
    assert 'from_pretrained("me/tiny"' in card and "2 sequences, 32 tokens" in card and "THIS_REPOSITORY" not in card

    monkeypatch.chdir(tmp_path)
    model.push_to_hub("me/tiny")  # of transformers: it keeps the card
    kept = files["README.md"].decode()
    assert kept.partition("\n# ")[2] == card.partition("\n# ")[2] and front(kept)["library_name"] == "transformers"

    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in files.items():
        (copy / name).write_bytes(content)
    again = AutoModelForCausalLM.from_pretrained(copy)
    assert torch.equal(again(random_tokens(1, 8)).logits, model(random_tokens(1, 8)).logits)
    push_to_hub(again, "me/second")
    assert hub["me/second"]["README.md"] == files["README.md"]
    assert hub["me/second"]["model.safetensors"] == files["model.safetensors"]


def test_push_to_hub_takes_the_report_beside_a_loaded_model(hub, quantized, tmp_path):
    model, report = quantized
    aqlm_c.save_quantized(model, None, tmp_path / "out", extra_files=lambda _: {"report.json": json.dumps(report)})
    (tmp_path / "out" / "README.md").unlink(missing_ok=True)
    push_to_hub(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), "me/tiny")
    assert front(hub["me/tiny"]["README.md"].decode())["base_model"] == HUB_NAME


def test_a_dense_model_is_not_pushed(hub):
    for card in (None, "text"):
        with pytest.raises(ValueError, match="model: got no "):
            push_to_hub(tiny_llama(), "me/tiny", card=card)
    assert not hub
