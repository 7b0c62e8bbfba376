"""BOS: every calibration sequence and evaluation window begins with it where the tokenizer begins texts with it."""

import json
import logging

import numpy as np
import pytest
import torch
from tiny import BYTES, byte_tokenizer, tiny_llama
from tokenizers.processors import TemplateProcessing

from aqlm_c import RunConfig
from aqlm_c.cli.main import main
from aqlm_c.evaluate import perplexity
from aqlm_c.io import data
from aqlm_c.run import run


def tokenizer(adds=True):
    """Bytes, <bos> being 257; `adds`: before every text."""
    found = byte_tokenizer(bos_token="<bos>")
    if adds:
        found._tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BYTES)]
        )
    assert found("a")["input_ids"][0] == BYTES if adds else len(found("a")["input_ids"]) == 1
    return found


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(ord("a") + i % 26) for i in range(400)))
    return str(path)


def test_every_sequence_begins_with_it(text, caplog):
    adds, plain = tokenizer(), tokenizer(adds=False)
    stream = data.token_stream(text, plain)
    before = data.load_sequences([text], plain, 4, 16)
    assert torch.equal(before, stream[:64].view(4, 16))
    for sequences in (
        data.load_sequences([text], adds, 4, 16),
        data.load_sequences([text], plain, 4, 16, bos="always"),
    ):
        assert (sequences[:, 0] == BYTES).all() and torch.equal(sequences[:, 1:], stream[:60].view(4, 15))
    assert not caplog.text
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        never = data.load_sequences([text], adds, 4, 16, bos="never")
    assert never[0, 0] == BYTES and torch.equal(never.flatten()[1:], stream[:63])  # the stream as it was
    assert "1 of 4 calibration sequences begin with <bos>" in caplog.text
    shuffled = data.load_sequences([text], adds, 26, 16, shuffle=True, seed=1)
    assert (shuffled[:, 0] == BYTES).all() and (shuffled[:, 1:] != BYTES).all()
    with pytest.raises(ValueError, match=r"hold 26 sequences of 16, expected 27"):
        data.load_sequences([text], adds, 27, 16)


def test_token_ids_in_files_stay_unless_asked(tmp_path, caplog):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(40))
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        assert torch.equal(data.load_sequences([str(path)], tokenizer(), 2, 20), torch.arange(40).view(2, 20))
    assert "0 of 2 calibration sequences begin with <bos>" in caplog.text
    always = data.load_sequences([str(path)], tokenizer(), 2, 20, bos="always")
    assert always[:, 0].tolist() == [BYTES] * 2 and always[1, 1:].tolist() == list(range(19, 38))


@pytest.mark.parametrize(
    ("bos", "message"), [("yes", "bos: got 'yes', expected one of auto"), ("always", "no BOS token")]
)
def test_what_is_refused(bos, message, text):
    with pytest.raises(ValueError, match=message):
        data.load_sequences([text], byte_tokenizer(), 2, 8, bos=bos)


def test_windows_of_evaluation():
    model = tiny_llama(vocab_size=BYTES + 1)
    stream = torch.randint(BYTES, (64,), generator=torch.Generator().manual_seed(0))
    begun = perplexity(model, torch.cat([torch.tensor([BYTES]), stream]), 16, bos_token=BYTES)
    losses = []
    for window in stream[:60].view(4, 15):
        window = torch.cat([torch.tensor([BYTES]), window])
        losses.append(torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:]).item())
    assert begun["windows"] == 4 and begun["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


def test_a_run_and_an_evaluation_say_it(tmp_path, text, capsys):
    tiny_llama(vocab_size=BYTES + 1).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    options = {"scheme": "1x4g8", "preset": "fast", "data": [text], "samples": 4, "sequence_length": 16}
    report = run(RunConfig(str(tmp_path / "model"), str(tmp_path / "out"), **options, gaussian_reference=False))
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["config"]["bos"] == "auto" and written["data"]["bos"] == "<bos>"
    assert written["config"]["gaussian_reference"] is False and written["layers"][0]["gaussian_true_rate"] is None
    assert "gaussian_reference: false" in (tmp_path / "out" / "run.yaml").read_text()
    from rich.console import Console

    with open(tmp_path / "shown.txt", "w") as shown:
        Console(file=shown, width=140).print(report)
    shown = (tmp_path / "shown.txt").read_text()
    assert "each beginning with <bos>" in shown and "dB" not in shown and "Gaussian" not in shown
    capsys.readouterr()
    for bos, said in (("auto", True), ("never", False)):
        command = ["evaluate", str(tmp_path / "out"), "--data", text, "--sequence-length", "16", "--bos", bos]
        assert main([*command, "--json", str(tmp_path / "e.json")]) == 0
        captured = capsys.readouterr()
        assert ("each beginning with <bos>" in captured.out) == said
        assert ("windows are cut without <bos>" in captured.err) != said
        assert json.loads((tmp_path / "e.json").read_text())["results"][0]["bos"] == ("<bos>" if said else None)
    assert main(["evaluate", str(tmp_path / "out"), "--bos", "yes"]) == 2
    assert "--bos: got 'yes', expected one of auto, always, never" in capsys.readouterr().err
