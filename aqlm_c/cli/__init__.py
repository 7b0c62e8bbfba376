"""The command line: `aqlm-c quantize`, `evaluate`, `generate`, `inspect`, `doctor`; also `python -m aqlm_c`.

Results go to stdout, progress to stderr. A wrong input gives one line on stderr and exit code 2, and nothing
is written; Ctrl-C one line and 130. torch and transformers are imported by the command that needs them.
"""

import os
import sys

from ..errors import missing

os.environ.setdefault("TQDM_DISABLE", "1")  # read when torch imports tqdm: progress is shown by `Display` alone

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ModuleNotFoundError as error:
    print(f"aqlm-c: {missing(error)}", file=sys.stderr)
    raise SystemExit(2) from None
