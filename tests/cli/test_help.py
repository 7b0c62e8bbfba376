"""What people see of the command line: help at 80 columns, shell completion, stdin, progress of evaluations."""

import io
import os
import re
import subprocess
import sys

import pytest
import typer

from aqlm_c.cli.commands import app
from aqlm_c.cli.display import Display
from aqlm_c.cli.main import main
from aqlm_c.config import DTYPES, FinetuneOptions
from aqlm_c.recipe import PRESETS, RunConfig

ROOT = typer.main.get_command(app)
COMMANDS = sorted(ROOT.commands)


def help_of(capsys, monkeypatch, *command):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command, "--help"]) == 0
    return capsys.readouterr().out


def words(*texts):
    return {word for text in texts for word in (text or "").replace("\\[", "[").split()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_breaks_no_word(name, capsys, monkeypatch):
    text = help_of(capsys, monkeypatch, name)
    command = ROOT.commands[name]
    context = command.make_context(name, [], resilient_parsing=True)
    records = [record for parameter in command.get_params(context) if (record := parameter.get_help_record(context))]
    known = words(command.help, command.epilog, *(part for record in records for part in record))
    known |= words(*command.collect_usage_pieces(context))
    headings = {line for line in text.splitlines() if line and not line.startswith(" ")}
    body = [line for line in text.splitlines() if line not in headings]
    assert words(*body) <= known
    assert "…" not in text
    assert all(len(line) <= 80 or len(line.split()) <= 3 for line in text.splitlines())  # a list of choices is one word


def test_commands_are_in_groups(capsys, monkeypatch):
    text = help_of(capsys, monkeypatch)
    lines = text.splitlines()
    order = ["Quantize:", "Measure:", "Use:", "Pass on:", "This machine:"]
    assert [line for line in lines if line in order] == order
    assert "Commands:" not in lines  # of those without a group
    listed = {line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "}
    assert set(COMMANDS) <= listed


def test_options_of_a_long_command_are_in_groups(capsys, monkeypatch):
    lines = help_of(capsys, monkeypatch, "quantize").splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == [
        "Arguments:", "Which bits:", "Text:", "Method:", "Fine-tuning of blocks:", "Machine:", "Output:",
    ]  # fmt: skip
    place = {line.split()[0].rstrip(","): number for number, line in enumerate(lines) if line.startswith("  --")}
    assert lines.index("Text:") < place["--samples"] < lines.index("Method:") < place["--method"]
    assert "Machine:" not in help_of(capsys, monkeypatch, "inspect").splitlines()
    for name in COMMANDS:
        titles = help_of(capsys, monkeypatch, name).splitlines()
        assert ("Options:" in titles) != ("Output:" in titles)  # every option of a long one has a group


def completed(line):
    """What bash is offered at the end of a line."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "_AQLM_C_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run([sys.executable, "-m", "aqlm_c"], env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout.split()


def test_a_shell_completes():
    assert completed("aqlm-c qu") == ["quantize"]
    assert "--finetune-epochs" in completed("aqlm-c quantize --finetune-")
    assert set(completed("aqlm-c quantize --preset ")) == set(PRESETS)
    assert set(completed("aqlm-c evaluate --dtype ")) == set(DTYPES)


def test_generate_reads_stdin(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("aqlm_c.hf.models.load_model", lambda *_: (None, None, None))
    monkeypatch.setattr("aqlm_c.generate.generate", lambda *given, **_: seen.append(given[3]))
    for content in (b"two\nlines \xe2\x82\xac\n", b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert main(["generate", "model", "-"]) == 0
    assert seen == ["two\nlines €", ""]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert main(["generate", "model", "-"]) == 2
    assert "PROMPT: got what is no UTF-8 on stdin" in capsys.readouterr().err


def test_evaluate_tells_how_far_it_is(capsys):
    with Display() as display:
        display.on_phase("model on text")
        for done in range(1, 26):
            display.on_window(done, 25, 10.0 + done)
        display.on_phase("original on text")
        display.on_window(1, 2, float("nan"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "model on text ..."
    assert lines[1] == "  window 3 of 25, perplexity 13"
    assert lines[-3] == "  window 25 of 25, perplexity 35"
    assert lines[-1] == "  window 1 of 2"
    assert len(lines) == 1 + 9 + 1 + 1
    with Display(quiet=True) as display:
        display.on_phase("model on text")
        display.on_window(1, 2, 1.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["finetune", "quantize"])
def test_defaults_in_the_help_are_those_of_the_options(name):
    fields = vars(RunConfig("model", "out")) | (vars(FinetuneOptions()) if name == "finetune" else {})
    told = {
        parameter.name: found[1]
        for parameter in ROOT.commands[name].params
        if (found := re.search(r"\[default: ([^],]+)\]", parameter.help or ""))
    }
    known = {option: str(fields[option]) for option in told if fields.get(option) is not None}
    assert len(known) >= 3
    assert {option: told[option] for option in known} == known
