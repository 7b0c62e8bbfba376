"""The command line in this process, for the tests."""

import signal

from aqlm_c.cli.main import main


def main_in_time(*arguments, seconds=60):
    """The exit code of the command line; what takes longer fails as a hang."""

    def late(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        return main([str(argument) for argument in arguments])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
