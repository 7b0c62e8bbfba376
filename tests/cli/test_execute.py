"""`aqlm-c exec`: Python commands with aqlm_c.hf imported, as Python itself would run them."""

import json
import os
import signal
import subprocess
import sys
import zipfile

import pytest

from aqlm_c import execute
from aqlm_c.cli.main import main

# What a program sees of how it was started, and that it has our import; then it ends as it is told to.
PROGRAM = """
import json, sys
def main():
    seen = {"name": __name__, "argv": sys.argv, "path": sys.path[0], "hf": "aqlm_c.hf" in sys.modules}
    seen |= {"file": globals().get("__file__"), "main": sys.modules["__main__"].__name__}
    print(json.dumps(seen))
    return int(sys.argv[-1])
if __name__ == "__main__":
    sys.exit(main())
"""
# Imports of aqlm_c.hf cost seconds: one process runs many commands, with a stand-in for it.
MANY = """
import contextlib, io, json, os, sys, types
sys.modules["aqlm_c.hf"] = types.ModuleType("aqlm_c.hf")
from aqlm_c.execute import main
results = []
for arguments in json.loads(sys.argv[1]):
    before, path, shown = list(sys.path), sys.modules["__main__"], io.StringIO()
    sys.path.insert(0, "to be replaced")
    with contextlib.redirect_stdout(shown):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
    results.append((code, shown.getvalue()))
    sys.path[:], sys.modules["__main__"] = before, path
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of programs of every kind; `site` and `bin` lie on sys.path and on the PATH."""
    home = tmp_path_factory.mktemp("programs")
    for name in ("site/tool", "bin", "folder", "site/tool-1.dist-info"):
        (home / name).mkdir(parents=True)
    for name in ("script.py", "folder/__main__.py", "site/tool/__main__.py", "site/tool/cli.py", "site/single.py"):
        (home / name).write_text(PROGRAM)
    (home / "site/tool-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: tool\nVersion: 1\n")
    (home / "site/tool-1.dist-info/entry_points.txt").write_text("[console_scripts]\nthe-tool = tool.cli:main\n")
    files = {"bare": f"#!/usr/bin/env python3\n{PROGRAM}", "shell": "#!/bin/sh\nexit 7\n"}
    files["long"] = f"#!/bin/sh\n'''exec' /long/path/python3 \"$0\" \"$@\"\n' '''\n{PROGRAM}"
    for name, text in files.items():
        (home / "bin" / name).write_text(text)
        (home / "bin" / name).chmod(0o755)
    os.symlink(home / "script.py", home / "bin" / "linked.py")
    with zipfile.ZipFile(home / "app.pyz", "w") as archive:
        archive.writestr("__main__.py", PROGRAM)
    return home


def python(home, *arguments, **options):
    paths = {"PYTHONPATH": os.pathsep.join([str(home / "site"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    paths["PATH"] = os.pathsep.join([str(home / "bin"), os.environ["PATH"]])
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=home, env={**os.environ, **paths}, capture_output=True, text=True, **options
    )  # fmt: skip


COMMANDS = {
    "script": ["script.py", "-x", "--y=1", "3"],
    "a path": ["./folder/../script.py", "0"],
    "a link": ["bin/linked.py", "0"],
    "a folder": ["./folder", "4"],
    "a zip": ["./app.pyz", "5"],
    "module": ["-m", "single", "-m", "2"],
    "package": ["-m", "tool", "--", "2"],
    "code": ["-c", PROGRAM, "--help", "6"],
}


def test_a_command_sees_what_python_shows_it(home):
    wanted = []
    for arguments in COMMANDS.values():
        done = python(home, *arguments)
        wanted.append((done.returncode, json.loads(done.stdout)))
    asked = [["--", *arguments] for arguments in COMMANDS.values()] + [["python3", "-m", "tool", "2"]]
    done = python(home, "-c", MANY, json.dumps(asked))
    assert done.returncode == 0, done.stderr
    *found, behind_python = [(code, json.loads(shown)) for code, shown in json.loads(done.stdout)]
    for name, (code, seen), (right_code, right) in zip(COMMANDS, found, wanted, strict=True):
        assert seen.pop("hf") and not right.pop("hf")
        for part in ("path", "file"):
            seen[part], right[part] = (each[part] and os.path.normpath(home / each[part]) for each in (seen, right))
        assert (name, code, seen) == (name, right_code, right)
    assert behind_python[0] == 2 and behind_python[1]["path"] == str(home)


def test_console_scripts(home):
    done = python(home, "-c", MANY, json.dumps([["the-tool", "-a", "3"], ["bare", "-b", "4"], ["long", "0"]]))
    assert done.returncode == 0, done.stderr
    tool, bare, long = ((code, json.loads(shown)) for code, shown in json.loads(done.stdout))
    assert tool[0] == 3 and tool[1]["argv"] == ["the-tool", "-a", "3"] and tool[1]["name"] == "tool.cli"
    for name, arguments, (code, seen) in (("bare", ["-b", "4"], bare), ("long", ["0"], long)):
        assert code == int(arguments[-1]) and seen["argv"] == [str(home / "bin" / name), *arguments]
        assert seen["name"] == "__main__" and seen["path"] == str(home / "bin")
    assert all(seen["hf"] for _, seen in (tool, bare, long))


def test_the_command_line_of_transformers(home):
    """With the import itself, which -X importtime shows."""
    done = python(home, "-X", "importtime", "-m", "aqlm_c", "exec", "--", "transformers", "serve", "--help")
    assert done.returncode == 0, done.stderr
    assert "--port" in done.stdout
    assert "aqlm_c.hf.quantizer" in done.stderr


def test_an_exception_is_the_programs_own(home):
    stand_in = "import sys, types; sys.modules['aqlm_c.hf'] = types.ModuleType('x')"
    code = f"{stand_in}; from aqlm_c.execute import main; main(['-c', '1 / 0'])"
    done = python(home, "-c", code)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND: missing, expected a Python command"),
        (["--"], "COMMAND: missing"),
        (["python3"], "COMMAND: missing"),
        (["no-such-tool"], "COMMAND: got 'no-such-tool', which is not installed here, expected a Python command"),
        (["shell"], "COMMAND: got 'shell': .*bin/shell is no Python script"),
        (["nosuch.py"], "COMMAND: got 'nosuch.py': no such file"),
        (["./no/such"], r"COMMAND: got './no/such': no such file"),
        (["-m"], "COMMAND: got -m alone, expected a module after it"),
        (["-c"], "COMMAND: got -c alone, expected code after it"),
        (["-O", "x.py"], "COMMAND: got '-O', expected a Python command"),
    ],
)
def test_what_is_no_python_command_is_refused_in_one_line(home, monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("PATH", f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ValueError, match=message):
        execute.find([argument for argument in arguments if argument != "--"])
    assert execute.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("aqlm-c: COMMAND: ") and said.count("\n") == 1


def test_without_transformers_the_cure_is_said(home):
    code = (
        "import sys; sys.modules['transformers'] = None; from aqlm_c.execute import main; sys.exit(main(['script.py']))"
    )
    done = python(home, "-c", code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "aqlm-c: transformers: got none that is installed here, expected one: pip install 'aqlm-c[hf]'\n"
    )


def test_help_is_ours_only_before_the_command(capsys):
    assert main(["exec", "--help"]) == 0
    assert "COMMAND" in capsys.readouterr().out


def test_ctrl_c_is_the_commands(home):
    """Python's own end of a program that does not answer it."""
    code = f"import os, signal; os.kill(os.getpid(), {int(signal.SIGINT)}); print('after')"
    script = "import sys, types; sys.modules['aqlm_c.hf'] = types.ModuleType('x'); sys.argv[1:1] = ['exec', '--']"
    end = f"{script}; from aqlm_c.__main__ import main; sys.exit(main())"
    answers = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # the test may run in the background
    done = python(home, "-c", end, "-c", code, **answers)
    assert done.returncode == -signal.SIGINT and done.stdout == ""
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
