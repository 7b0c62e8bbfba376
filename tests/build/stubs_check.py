"""stubtest of the extension modules, for `make lint` and test_types.py; torch comes first, whose libraries `_torch`
needs. `_cuda` loads only beside a torch with CUDA, so it is checked where that is.
"""

import sys

from mypy import stubtest

from aqlm_c.core.extensions import has_cuda  # imports torch

if __name__ == "__main__":
    modules = ["aqlm_c._core", "aqlm_c._torch"]
    if has_cuda:
        modules.append("aqlm_c._cuda")
    sys.argv[1:] = [*modules, "--mypy-config-file", "pyproject.toml"]
    sys.exit(stubtest.main())
