"""What is written where: `--json` onto whatever a path may be, OUT at every place that can and cannot be one."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from command import main_in_time
from tiny import BYTES, byte_tokenizer, tiny_llama

from aqlm_c.cli.main import main
from aqlm_c.files import JsonFile, hidden_name, write_json
from aqlm_c.io.checkpoint import check_output

SMALL = ["--scheme", "2x4g8", "--samples", "4", "--sequence-length", "32", "--preset", "fast", "--quiet"]
CLI = "import sys; from aqlm_c.__main__ import main; sys.exit(main())"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(torch.bfloat16, vocab_size=BYTES).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def run(capsys):
    """Runs the command line in this process; gives (exit code, stderr). What hangs fails."""

    def run(*arguments):
        code = main_in_time(*arguments)
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def refused(run):
    """Runs the command line, which must refuse with one line that holds these words."""

    def refused(words, *arguments):
        code, stderr = run(*arguments)
        assert code == 2 and stderr.count("\n") == 1 and stderr.startswith("aqlm-c: "), stderr
        assert "not expected:" not in stderr
        for word in words:
            assert word in stderr

    return refused


# ---- --json -----------------------------------------------------------------------------------------------------


def test_json_goes_through_links_and_keeps_the_mode(tmp_path):
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "file.json"
    target.write_text("old")
    target.chmod(0o640)
    (tmp_path / "link.json").symlink_to("real/file.json")
    (tmp_path / "new.json").symlink_to(tmp_path / "real" / "other.json")
    for name in ("link.json", "new.json"):
        write_json(tmp_path / name, {"a": 1})
        assert (tmp_path / name).is_symlink() and json.loads((tmp_path / name).read_text()) == {"a": 1}
    assert stat.S_IMODE(target.stat().st_mode) == 0o640 and len(list((tmp_path / "real").iterdir())) == 2
    long = tmp_path / ("x" * 250)
    write_json(long, {"a": 2})
    assert json.loads(long.read_text()) == {"a": 2}


def test_json_in_a_folder_that_cannot_be_written_is_written_in_place(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_text("x" * 1000)
    number = path.stat().st_ino
    monkeypatch.setattr(JsonFile, "_temporary", lambda self: Path("/proc/no"))  # root may write everywhere
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1} and path.stat().st_ino == number
    with pytest.raises(ValueError, match=r"path: got .*, expected a file that can be written: "):
        write_json(tmp_path / "new.json", {})


def test_json_into_a_pipe_and_devices(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_json(pipe, {"a": 1})
    reader.join(10)
    assert json.loads(read[0]) == {"a": 1} and stat.S_ISFIFO(pipe.stat().st_mode)
    write_json("/dev/null", {"a": 1})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="path: got '/dev/full', which cannot be written: No space left"):
        write_json("/dev/full", {"a": 1})


def test_a_pipe_without_a_reader_and_what_cannot_be_written_are_refused_at_once(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("aqlm_c.files._PATIENCE", 0.2)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("no/file")
    (tmp_path / "file").touch()
    for name, words in {
        "pipe": "nobody reads from it",
        "loop": "symbolic links",
        "dangling": "a file in a directory that exists",
        "file/x": "a file in a directory that exists",
        "no/x": "a file in a directory that exists",
        ".": "not a directory",
        "x" * 300: "File name too long",
    }.items():
        path = tmp_path / name
        refused(["--json: got", words], "inspect", "nosuch", "--json", path)  # before the model is looked at
    refused(["open for reading alone"], "inspect", "nosuch", "--json", "/dev/stdin")


def test_json_to_the_standard_output_and_a_process_substitution(model_dir, tmp_path):
    command = f"exec {sys.executable} -c '{CLI}' inspect {model_dir} --json"
    script = f"echo kept > {tmp_path}/log; {command} /dev/stdout >> {tmp_path}/log"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0 and log.startswith("kept\n") and "14 layers" in log and log.endswith("}\n")
    script = f"{command[5:]} >(cat > {tmp_path}/sub.json); wait $!; sleep 0.2"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads((tmp_path / "sub.json").read_text())["model"] == str(model_dir)


def test_results_are_shown_before_a_json_that_fails(model_dir, run, capsys):
    assert main(["inspect", str(model_dir), "--json", "/dev/full"]) == 2
    captured = capsys.readouterr()
    assert "14 layers" in captured.out and "--json: got '/dev/full'" in captured.err and captured.err.count("\n") == 1


# ---- OUT --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr("aqlm_c.hf.models.load_model", lambda *_: pytest.fail("the model was loaded"))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_out_that_is_no_place_is_refused_before_the_work(refused, no_work, tmp_path, monkeypatch, options, model_dir):
    monkeypatch.chdir(tmp_path)
    for out in ("/", ".", "..", "x" * 300, "a/" + "x" * 300, "/".join(["d" * 200] * 25), "/proc/x", "", "\udcff"):
        refused([": got" if out == "\udcff" else "OUT"], "quantize", model_dir, out, *SMALL, *options)
    assert names(tmp_path) == []


def test_a_mount_point_is_refused_before_the_work(refused, no_work, tmp_path, monkeypatch, model_dir):
    out, rename = tmp_path / "out", os.rename
    out.mkdir()

    def busy(source, target):
        if Path(source) == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    refused(["OUT: got", "a mount point cannot", "busy"], "quantize", model_dir, out, *SMALL, "--overwrite")
    assert names(tmp_path) == ["out"]


def test_long_names_are_fine(run, tmp_path, model_dir):
    out = tmp_path / ("ü" * 125)  # of 250 bytes
    assert run("quantize", model_dir, out, *SMALL) == (0, "")
    assert run("quantize", model_dir, out, *SMALL, "--overwrite") == (0, "")
    assert names(tmp_path) == [out.name] and (out / "tokenizer.json").is_file()
    assert len(os.fsencode(hidden_name("x" * 255, "new-" + "h" * 64 + "-4194304"))) <= 255


FOREIGN = {
    "notes.txt": lambda path: path.write_text("mine"),
    "src": lambda path: path.mkdir(),
    ".git": lambda path: path.mkdir(),
    "package.json": lambda path: path.write_text("{}"),
    "link": lambda path: path.symlink_to("/"),
    "model.gguf": lambda path: path.touch(),
    "tokenizer.json": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_overwrite_refuses_a_directory_with_foreign_files(refused, no_work, tmp_path, model_dir, name):
    out = shutil.copytree(model_dir, tmp_path / "out")
    (out / name).unlink(missing_ok=True)
    FOREIGN[name](out / name)
    before = names(out)
    refused(["OUT: got", f"holds '{name}'"], "quantize", model_dir, out, *SMALL, "--overwrite")
    assert names(out) == before


def test_overwrite_refuses_the_model_the_data_the_work_directory_and_where_one_is(
    refused, no_work, tmp_path, model_dir, monkeypatch
):
    out = shutil.copytree(model_dir, tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    (out / "merges.txt").write_text("x" * 10_000)  # a name that a model's file may have
    shutil.copytree(model_dir, out / "inner")
    before = names(out)
    for model in (out, tmp_path / "link", tmp_path / "out" / "." / "inner"):
        refused(["holds MODEL at"], "quantize", model, out, *SMALL, "--overwrite")
    refused(["DATA 2 at", "merges.txt"], "quantize", model_dir, out, *SMALL, "--overwrite",
            "--data", "pydoc_data.topics", "--data", out / "merges.txt")  # fmt: skip
    refused(["holds WORK_DIR"], "quantize", model_dir, out, *SMALL, "--overwrite", "--work-dir", out / "inner")
    shutil.rmtree(out / "inner")
    monkeypatch.chdir(out)
    refused(["holds the current directory"], "quantize", model_dir, "../out", *SMALL, "--overwrite")
    assert names(out) == [name for name in before if name != "inner"] and (out / "model.safetensors").stat().st_size


def test_data_is_hashed_before_the_work(run, tmp_path, model_dir, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 50)
    import aqlm_c.quantize

    quantize = aqlm_c.quantize.quantize_model
    monkeypatch.setattr("aqlm_c.quantize.quantize_model", lambda *a, **k: text.unlink() or quantize(*a, **k))
    assert run("quantize", model_dir, tmp_path / "out", *SMALL, "--data", text) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["data"]["sources"][str(text)]) == 64


def kept_model(stderr, tmp_path):
    """The directory that the one line of an error names."""
    assert stderr.count("\n") == 1 and "the quantized model is kept in " in stderr
    kept = Path(stderr.rpartition("kept in ")[2].strip().strip("'"))
    assert kept.parent == tmp_path and kept.name.startswith("out.finished-")
    return kept


@pytest.mark.parametrize("appears", ["file", "full directory", "empty directory", "broken disk"])
def test_a_finished_model_stays_where_out_is_no_place_any_more(run, tmp_path, model_dir, monkeypatch, appears):
    import aqlm_c.quantize

    quantize, out = aqlm_c.quantize.quantize_model, tmp_path / "out"

    def busy(*arguments, **options):
        if appears == "file":
            out.touch()
        elif appears.endswith("directory"):
            out.mkdir()
            (out / "mine").touch() if appears == "full directory" else None
        else:
            monkeypatch.setattr("aqlm_c.io.checkpoint.place", broken)
        return quantize(*arguments, **options)

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("aqlm_c.quantize.quantize_model", busy)
    code, stderr = run("quantize", model_dir, out, *SMALL)
    kept = kept_model(stderr, tmp_path)
    assert code == 2 and "OUT: got" in stderr and (kept / "report.json").is_file()
    assert (out.is_file(), out.is_dir()) == (appears == "file", appears.endswith("directory"))
    assert not (out / "config.json").exists()
    assert names(tmp_path) == sorted({kept.name, *([] if appears == "broken disk" else ["out"])})


def test_what_fails_after_the_model_is_written_keeps_it(run, tmp_path, model_dir, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    save, calls = PreTrainedTokenizerFast.save_pretrained, []

    def full(self, directory, *arguments, **options):
        calls.append(directory)
        if len(calls) == 2:  # the first is the trial before the work
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, directory, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    code, stderr = run("quantize", model_dir, tmp_path / "out", *SMALL)
    kept = kept_model(stderr, tmp_path)
    assert code == 2 and "No space left on device" in stderr and (kept / "model.safetensors").is_file()
    assert run("quantize", model_dir, tmp_path / "out", *SMALL) == (0, "")
    assert names(tmp_path) == sorted(["out", kept.name])  # and the next run clears nothing finished up
    assert (kept / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_the_work(refused, tmp_path, model_dir, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    def broken(*_, **__):
        raise Exception("tokenizers says so")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", broken)
    monkeypatch.setattr("aqlm_c.quantize.quantize_model", lambda *_, **__: pytest.fail("it was quantized"))
    words = ["OUT: got", "the tokenizer cannot be saved: tokenizers says so"]
    refused(words, "quantize", model_dir, tmp_path / "out", *SMALL)
    assert names(tmp_path) == []


def test_a_trial_leaves_nothing_and_touches_nothing(tmp_path, model_dir):
    out = shutil.copytree(model_dir, tmp_path / "out")
    before = {path.name: path.stat().st_ino for path in out.iterdir()}, out.stat().st_ino
    check_output(out, overwrite=True)
    assert ({path.name: path.stat().st_ino for path in out.iterdir()}, out.stat().st_ino) == before
    check_output(tmp_path / "a" / "b")
    assert names(tmp_path) == ["out"]
