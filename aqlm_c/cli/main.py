"""The process around a command: exit codes, one line for an error, Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import typer
from rich.console import Console

from .. import distributed
from ..errors import missing, one_line
from .commands import app

_OF_RANKS = ("quantize", "finetune")  # commands that several ranks run together
_PATIENCE = 1.5  # seconds between Ctrl-C and the end of a process whose main thread does not answer


class Interrupt:
    """Ctrl-C. The first one raises KeyboardInterrupt, later ones are ignored; a process whose main thread is
    inside a long call and does not answer is ended all the same. Files appear by rename only, so none is half.
    """

    kept = ""  # what is left of the work, for the one line that is shown

    def line(self) -> str:
        return f"aqlm-c: stopped{self.kept and ': '}{self.kept}\n"

    def lost(self, text: str) -> NoReturn:
        """End this process, since another rank has ended; called in any thread. No text: another process says it."""
        Console(stderr=True).show_cursor()
        if text:
            os.write(2, f"aqlm-c: {one_line('; '.join(filter(None, (text, self.kept))))}\n".encode())
        os._exit(1)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not mine or threading.current_thread() is not threading.main_thread():
            yield  # someone else answers it
            return
        done = threading.Event()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def watch() -> None:  # the C handler writes to the pipe at once, Python's waits for the main thread
            while (number := os.read(reader, 1)) not in (b"", bytes([signal.SIGINT])):
                pass
            if number and not done.wait(_PATIENCE):
                Console(stderr=True).show_cursor()
                os.write(2, self.line().encode())
                os._exit(130)

        def interrupt(*_: object) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            done.set()
            os.close(writer)
            thread.join()
            os.close(reader)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (none: the process's); returns the exit code: 2 wrong input, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command, interrupt = typer.main.get_command(app), Interrupt()
    with interrupt.guard():
        try:
            result = command.main(arguments, prog_name="aqlm-c", standalone_mode=False, obj=interrupt)
            code = result if isinstance(result, int) else 0
        except _UsageError as error:
            code, message = 2, error.format_message()
        except (ValueError, OSError) as error:
            code, message = 2, str(error)
        except ImportError as error:
            code, message = 2, str(missing(error))
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except Exception as error:  # a fault of ours, or of what a file made a library do
            logging.getLogger("aqlm_c").debug("unexpected", exc_info=True)
            code, message = 2, f"{type(error).__name__}: {error} (not expected: {_place(error)})"
        if code == 130:
            sys.stderr.write(interrupt.line())
        elif code == 2 and not (arguments[0] in _OF_RANKS and distributed.told_elsewhere()):
            print(f"aqlm-c: {one_line(message)}", file=sys.stderr)
    return code


def _place(error: BaseException) -> str:
    """Where in this package an error came up, or was passed on last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}aqlm_c{os.sep}" in frame.filename] or frames
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}"


_UsageError: Any = typer.BadParameter.__base__  # click's; typer imports click or carries its own, by version
