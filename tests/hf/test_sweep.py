"""The sweep over all causal language models: a few of them here, all of them where asked for by -m slow."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[2]
MOST_REFUSED = 10


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep", Path(__file__).with_name("sweep.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_a_few(sweep):
    works, refused = sweep.try_model("mixtral"), sweep.try_model("gpt2")
    assert (works.outcome, works.class_name) == ("works", "MixtralForCausalLM") and works.error <= sweep.TOLERANCE
    assert works.quantized == works.linears - 1 == 2 * (4 + 3 * 4) or works.quantized == works.linears - 3
    assert refused.outcome == "refused" and "expected one with a list of blocks" in refused.note
    table = sweep.markdown([works, refused])
    assert "| mixtral | MixtralForCausalLM | works |" in table and "| gpt2 | GPT2LMHeadModel | refused | " in table


def test_the_table_in_docs_is_of_all_models():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    version = re.search(r"causal language models of transformers (\S+),", text)[1]
    outcomes = dict(re.findall(r"^\| (\S+) \| [A-Za-z]\w+ \| ([a-z ]+) \|", text, re.MULTILINE))
    late = {name for name, outcome in outcomes.items() if outcome not in ("works", "refused", "not built")}
    assert not late
    assert list(outcomes.values()).count("works") >= 125
    if version == transformers.__version__:
        assert list(outcomes) == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.slow
def test_all(sweep):
    results = sweep.sweep(list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    wrong = [
        f"{result.model_type}: {result.outcome}: {result.note}"
        for result in results
        if result.outcome not in sweep.GOOD
    ]
    assert not wrong, "\n".join(wrong)
    assert sum(result.outcome == "refused" for result in results) <= MOST_REFUSED
