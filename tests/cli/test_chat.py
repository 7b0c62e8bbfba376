"""Conversations and instructions in .jsonl files, as calibration text and for evaluation."""

import json

import pytest
import torch
from tiny import BYTES, byte_tokenizer, tiny_llama
from tokenizers.processors import TemplateProcessing

from aqlm_c import RunConfig
from aqlm_c.cli.main import main
from aqlm_c.io import data
from aqlm_c.io.chat import document_of
from aqlm_c.run import run

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
ASKED = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}]


def with_bos(template):
    """A tokenizer of bytes that begins every text with <bos>, as templates often do, too."""
    tokenizer = byte_tokenizer(chat_template=template, bos_token="<bos>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BYTES)]
    )
    return tokenizer


def written(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def read(path, tokenizer):
    return tokenizer.decode(data.token_stream(path, tokenizer))


def test_conversations_follow_each_other_at_once(tmp_path):
    lines = [
        {"text": "plain"},
        {"messages": ASKED},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"instruction": "add", "input": "1, 2", "output": "3", "source": "x"},
        {"instruction": "say", "input": None, "output": "hi", "messages": None, "text": None},
        {"text": "last", "messages": "not looked at"},
    ]
    expected = (
        "plain\n\n<user>one?\n<assistant>1\n<user>ab\n<user>add\n\n1, 2\n<assistant>3\n<user>say\n<assistant>hi\nlast"
    )
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    assert read(written(tmp_path / "a.jsonl", *lines), tokenizer) == expected


def test_without_a_template_an_instruction_is_plain_text(tmp_path):
    lines = [{"instruction": "add", "input": "1, 2", "output": "3"}, {"instruction": "say", "output": "hi"}]
    assert read(written(tmp_path / "a.jsonl", *lines), byte_tokenizer()) == "add\n\n1, 2\n\n3\n\nsay\n\nhi"


def test_no_text_begins_with_two_bos_tokens(tmp_path):
    path = written(tmp_path / "a.jsonl", {"messages": ASKED}, {"messages": ASKED})
    tokenizer = with_bos("<bos>" + TEMPLATE)
    ids = data.token_stream(path, tokenizer)
    assert tokenizer.decode(ids) == "<bos><user>one?\n<assistant>1\n<bos><user>one?\n<assistant>1\n"
    windows = data.load_sequences([path], tokenizer, 4, 10)
    assert (windows[:, 0] == BYTES).all() and (windows[:, 1] != BYTES).all()
    assert torch.equal(windows[:, 1:].flatten(), ids[1:37])
    never = data.load_sequences([path], tokenizer, 4, 10, bos="never")
    assert torch.equal(never.flatten(), ids[:40])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": []}', '"messages": expected a list'),
        ('{"messages": {"role": "user", "content": "x"}}', '"messages": expected a list'),
        ('{"messages": ["hello"]}', "message 1: expected an object"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "user"}]}', "message 2: expected an object"),
        ('{"messages": [{"role": 1, "content": "x"}]}', "message 1: expected an object"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "message 1: expected an object"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}', "message 1: expected an"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "chat template fails: no tools"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a character"),
        ('{"instruction": "x"}', 'expected strings as "instruction", "output"'),
        ('{"instruction": ["x"], "output": "y"}', 'expected strings as "instruction", "output"'),
        ('{"instruction": "x", "input": 0, "output": "y"}', 'expected strings as "instruction", "output"'),
        ('{"instruction": "x", "input": 3, "output": "y"}', 'expected strings as "instruction", "output"'),
        ('{"text": 3, "messages": [{"role": "user", "content": "x"}]}', 'expected a JSON object with a string "text"'),
        ('{"output": "y"}', 'expected a JSON object with a string "text"'),
        ("[1]", 'expected a JSON object with a string "text"'),
        ("null", 'expected a JSON object with a string "text"'),
        ('{"messages": [', 'expected a JSON object with a string "text"'),
    ],
)
def test_errors_name_the_line(tmp_path, line, message):
    template = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + TEMPLATE
    path = written(tmp_path / "a.jsonl", {"messages": ASKED}, "", line)
    with pytest.raises(ValueError, match=f"data: got '{path}': line 3: .*{message}"):
        data.token_stream(path, byte_tokenizer(chat_template=template))


def test_messages_need_a_template():
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        document_of({"messages": ASKED}, byte_tokenizer())


def test_a_run_and_an_evaluation_take_conversations(tmp_path, capsys):
    tiny_llama(vocab_size=BYTES).save_pretrained(tmp_path / "model")
    byte_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path / "model")
    path = written(tmp_path / "chat.jsonl", *[{"messages": ASKED}] * 8)
    options = {"scheme": "1x4g8", "preset": "fast", "data": [path], "samples": 4, "sequence_length": 16}
    report = run(RunConfig(str(tmp_path / "model"), str(tmp_path / "out"), **options))
    assert report.sequences == 4 and list(report.data["sources"]) == [path]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), "--data", path, "--sequence-length", "16", "--quiet"]) == 0
    assert float(capsys.readouterr().out) > 1
    broken = written(tmp_path / "broken.jsonl", {"messages": ASKED}, {"messages": 1})
    assert main(["evaluate", str(tmp_path / "out"), "--data", broken, "--sequence-length", "16"]) == 2
    assert "broken.jsonl': line 2: " in capsys.readouterr().err
