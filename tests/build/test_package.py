"""The package itself: its public names, and what importing them costs."""

import subprocess
import sys

import pytest

import aqlm_c


def test_public_names_resolve():
    for name in aqlm_c.__all__:
        assert getattr(aqlm_c, name) is not None
    assert set(aqlm_c.__all__) <= set(dir(aqlm_c))
    with pytest.raises(AttributeError, match="nosuch"):
        aqlm_c.nosuch  # noqa: B018


def test_one_weight_needs_no_torch():
    code = "import sys, aqlm_c; aqlm_c.quantize_weight, aqlm_c.AqlmConfig, aqlm_c.QuantizationReport"
    check = "sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", f"{code}; {check}"]).returncode == 0
