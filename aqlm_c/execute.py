"""`aqlm-c exec -- COMMAND ARGS...`: a Python command in this process, with `aqlm_c.hf` imported first.

So programs that know nothing of this package, such as lm_eval and `transformers serve`, load its checkpoints. Only the
standard library is imported before the command is known; the command then has the process to itself: its exceptions,
exit code, standard streams and Ctrl-C are as without us.
"""

from __future__ import annotations

import builtins
import importlib
import os
import re
import runpy
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from .errors import missing, one_line, wrong

_EXPECTED = "a Python command: the name of one that is installed here, a script, -m MODULE or -c CODE"
_INTERPRETER = re.compile(r"python[\d.]*(\.exe)?")
_SHEBANG = re.compile(rb"#!.*\bpython|#!/bin/sh\n'''exec' .*python")  # the second is pip's, for long paths


def main(arguments: Sequence[str]) -> int:
    """Run the command that `arguments` ("--" may come first) are; 2 and one line on stderr where they are none.

    Raises what the command raises, SystemExit too.
    """
    try:
        command = find(arguments[1:] if arguments[:1] == ["--"] else arguments)
        importlib.import_module(f"{__package__}.hf")
    except (ValueError, OSError, ImportError) as error:
        print(f"aqlm-c: {one_line(missing(error) if isinstance(error, ImportError) else error)}", file=sys.stderr)
        return 2
    sys.exit(command())


def find(arguments: Sequence[str]) -> Callable[[], Any]:
    """What runs a command as Python would: with its sys.argv and sys.path[0].

    In this order it is -m MODULE or -c CODE, also behind the name of an interpreter; a path; a console script that a
    package of this environment declares; a Python script beside the interpreter or on the PATH. Raises ValueError for
    anything else.
    """
    if arguments and _INTERPRETER.fullmatch(Path(arguments[0]).name):
        arguments = arguments[1:]
    if not arguments:
        raise ValueError(f"COMMAND: missing, expected {_EXPECTED}")
    name, *rest = arguments
    if name in ("-m", "-c"):
        if not rest:
            raise ValueError(f"COMMAND: got {name} alone, expected {'a module' if name == '-m' else 'code'} after it")
        return (lambda: _module(*rest)) if name == "-m" else (lambda: _code(*rest))
    if name.startswith("-"):
        raise wrong("COMMAND", name, _EXPECTED)
    path = Path(name)
    if path.suffix == ".py" or os.sep in name:
        if not path.exists():
            raise ValueError(f"COMMAND: got {name!r}: no such file, expected {_EXPECTED}")
        return lambda: _script(path, name, rest)
    beside = os.pathsep.join([sysconfig.get_path("scripts"), os.path.dirname(sys.executable)])
    found = shutil.which(name, path=beside) or shutil.which(name)
    if entries := list(metadata.entry_points(group="console_scripts", name=name)):
        return lambda: _entry(entries[0], found or name, rest)
    if found is None:
        raise ValueError(f"COMMAND: got {name!r}, which is not installed here, expected {_EXPECTED}")
    with open(found, "rb") as file:
        if not _SHEBANG.match(file.read(1024)):
            raise ValueError(f"COMMAND: got {name!r}: {found} is no Python script, expected {_EXPECTED}")
    return lambda: _script(Path(found), found, rest)


def _start(argv: Sequence[str], folder: str | None) -> None:
    """Set what Python sets before it runs something. folder: of sys.path[0]; None: there is none."""
    sys.argv = list(argv)
    if not getattr(sys.flags, "safe_path", False):  # of Python 3.11: then no folder comes first
        sys.path[:1] = [] if folder is None else [folder]


def _module(name: str, *arguments: str) -> None:
    _start(["-m", *arguments], os.getcwd())
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _code(code: str, *arguments: str) -> None:
    _start(["-c", *arguments], "")
    _as_main(compile(code, "<string>", "exec"))


def _script(path: Path, name: str, arguments: Sequence[str]) -> None:
    if path.is_dir() or zipfile.is_zipfile(path):
        _start([name, *arguments], None)  # runpy puts it first itself
        runpy.run_path(name, run_name="__main__")
        return
    file = os.path.join(os.getcwd(), name)
    _start([name, *arguments], os.path.dirname(os.path.realpath(path)))
    _as_main(compile(path.read_bytes(), file, "exec"), __file__=file, __loader__=SourceFileLoader("__main__", file))


def _as_main(code: CodeType, **names: Any) -> None:
    """Run code in a module that is `__main__` as long as the process lives, as threads and pickles expect."""
    module = ModuleType("__main__")
    vars(module).update(__builtins__=builtins, **names)
    sys.modules["__main__"] = module
    exec(code, vars(module))


def _entry(entry: metadata.EntryPoint, script: str, arguments: Sequence[str]) -> Any:
    _start([script, *arguments], os.path.dirname(os.path.realpath(script)) if os.sep in script else None)
    return entry.load()()
