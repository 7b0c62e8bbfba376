"""`python -m aqlm_c` is `aqlm-c`."""

import signal
import sys


def main() -> int:
    """The command line, with Ctrl-C answered while it is still being imported."""
    try:
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
