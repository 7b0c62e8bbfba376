"""Effective model sizes, and `aqlm-c compare`: table, JSON, plots and page."""

import html.parser
import json

import pytest
import torch
import yaml
from command import main_in_time
from tiny import BYTES, byte_tokenizer, tiny_llama

import aqlm_c
from aqlm_c.compare import compare, family_of
from aqlm_c.report.comparison import Comparison, averaged_rows
from aqlm_c.report.family import LLAMA_2, Family, size_text

BASE = {"preset": "fast", "samples": 8, "sequence_length": 32, "embeddings": "dense", "ldl_passes": 1, "max_sweeps": 1}
PAGE = {"sequence_length": 64, "windows": 4}


@pytest.mark.parametrize(("perplexity", "published"), [(13.5, 0.43e6), (5.65, 3.7e9), (5.35, 5.3e9)])
def test_published_effective_sizes_are_reproduced(perplexity, published):
    assert LLAMA_2.effective(perplexity).parameters == pytest.approx(published, rel=0.1)


def test_sizes_far_beyond_the_family_are_said_to_be_so():
    assert LLAMA_2.effective(13.5).extrapolated and LLAMA_2.effective(123).extrapolated
    assert not LLAMA_2.effective(5.12).extrapolated
    assert [size_text(size) for size in (3.7e9, 4.3e5, 12.0)] == ["3.7B", "0.43M", "12"]


def test_a_family_is_read_from_a_file_and_checked(tmp_path):
    fields = {"name": "mine", "text": "a text", "perplexities": {"1e8": 20.0, "1e9": 10.0}}
    (tmp_path / "family.yaml").write_text(yaml.safe_dump(fields))
    assert family_of(str(tmp_path / "family.yaml")).effective(15.0).parameters == pytest.approx(10**8.5)
    assert family_of("llama-2") is LLAMA_2
    for sizes in ({1e8: 20.0}, {1e8: 1.0, 1e9: 2.0}, {1e8: "many", 1e9: 2.0}, [1]):
        with pytest.raises(ValueError, match="family: got"):
            Family.from_dict({**fields, "perplexities": sizes})
    with pytest.raises(ValueError, match="family: got 'llama-9', expected llama-2 or a YAML file"):
        family_of("llama-9")


def row(name, bits, size, perplexity, **more):
    scores = {"text": {"perplexity": perplexity, "kl": 0.1, "top1": 0.5}}
    return {"name": name, "method": "m", "bits": bits, "bytes": size, "scores": scores, **more}


def test_seeds_are_averaged():
    (found,) = averaged_rows([row("a", 2.0, 10, 8.0), row("a", 2.0, 20, 10.0)])
    assert found["seeds"] == 2 and found["bytes"] == 15 and found["scores"]["text"]["perplexity"] == 9.0
    assert found["scores"]["text"]["perplexity_std"] == pytest.approx(2**0.5)


def test_the_front_is_of_rows_that_no_other_beats():
    rows = [
        row("small", 1.0, 10, 9.0),
        row("large", 4.0, 40, 5.0),
        row("beaten", 3.0, 40, 6.0),
        row("same", 1.0, 10, 9.0),
    ]
    found = Comparison(rows, family=LLAMA_2).complete()
    assert {r["name"]: r["front"] for r in found.rows} == {"small": True, "large": True, "beaten": False, "same": True}
    assert found.rows[-1]["effective_parameters"] > 0
    assert Comparison([row("a", 2.0, None, 5.0)]).complete().sized_by == "bits"


class Reader(html.parser.HTMLParser):
    """Rows of tables, and what a page refers to."""

    def __init__(self):
        super().__init__()
        self.rows, self.links, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for n, v in attributes if n in ("src", "href", "xlink:href") and not v.startswith("#")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("td", "th") and self.rows:
            self.rows[-1][-1] += data


def test_a_page_needs_no_other_file_and_runs_no_code_of_names():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    name = "<script>alert(1)</script>\x1b[31m"
    page = Comparison([row(name, 2.0, 10, 8.0), row("b", 3.0, 20, 7.0)], title=name).complete().page()
    reader = Reader()
    reader.feed(page)
    assert reader.links == [] and "script" not in reader.tags and reader.tags.count("svg") == 1
    assert reader.rows[1][0].startswith("<script>") and len({len(cells) for cells in reader.rows}) == 1
    assert "\x1b" not in page


def test_models_and_sweeps_are_compared_by_the_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    tiny_llama(torch.bfloat16, vocab_size=BYTES, max_position_embeddings=256).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    evaluation = {"data": ["pydoc_data.topics"], **PAGE}
    fields = {"model": str(tmp_path / "m"), "options": BASE, "evaluation": evaluation, "keep": "all"}
    result = aqlm_c.sweep({**fields, "space": {"scheme": ["1x4g8", "2x4g8"], "seed": [0, 1]}}, tmp_path / "s")
    kept = tmp_path / "s" / "models" / "00000"
    windows = ["--sequence-length", 64, "--windows", 4, "--against", tmp_path / "m", "--data", "pydoc_data.topics"]
    assert main_in_time("compare", tmp_path / "s", kept, "--out", tmp_path / "c", "--family", "llama-2", *windows) == 0
    found = json.loads((tmp_path / "c" / "compare.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["1x4g8"]["seeds"] == 2 and rows["2x4g8"]["bits"] == result.rows[2]["bits"]
    model, trial = rows["00000"], result.rows[0]
    assert model["method"] == "ldl" and model["bits"] == pytest.approx(trial["bits"])
    score, expected = model["scores"]["pydoc_data.topics"], trial["scores"]["pydoc_data.topics"]
    assert score["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    original = found["original"]["scores"]["pydoc_data.topics"]["perplexity"]
    assert original == pytest.approx(expected["original_perplexity"], rel=1e-6)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        f"compare.{end}" for end in ("json", "html", "png", "svg")
    }
    assert "as good as" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a sweep evaluated as the models beside it"):
        compare([tmp_path / "s", kept], str(tmp_path / "m"), data=["pydoc_data.topics"], sequence_length=32)
