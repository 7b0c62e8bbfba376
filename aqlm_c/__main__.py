"""`python -m aqlm_c` is `aqlm-c`."""

import signal
import sys


def main() -> int:
    """The command line, with Ctrl-C answered while it is still being imported.

    `doctor` needs nothing but the standard library, so that it can tell what is missing; `exec` leaves the process to
    the command that it runs.
    """
    name, *arguments = sys.argv[1:] or [""]
    if name == "exec" and arguments[:1] != ["--help"]:
        from . import execute

        return execute.main(arguments)
    try:
        if name == "doctor" and not arguments:
            from . import doctor

            code = doctor.main()
        else:
            from .cli.main import main

            code = main()
    except KeyboardInterrupt:
        print("aqlm-c: stopped", file=sys.stderr)
        code = 130
    if code == 130:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not disturb the end of the process
    return code


if __name__ == "__main__":
    sys.exit(main())
