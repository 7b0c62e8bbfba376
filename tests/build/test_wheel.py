"""What `make audit` asks of a wheel, asked of one made of the package as it is built here."""

import shutil
import zipfile
from pathlib import Path

import pytest
import wheel_check

import aqlm_c
from aqlm_c import _core

pytest.importorskip("torch")
if not (shutil.which("readelf") and shutil.which("nm")):
    pytest.skip("needs readelf and nm", allow_module_level=True)

PACKAGE, BUILT = Path(aqlm_c.__file__).parent, Path(_core.__file__).parent


def wheel(folder, without="", tag="cp310-abi3"):
    path = folder / f"aqlm_c-{aqlm_c.__version__}-{tag}-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for source in [*PACKAGE.rglob("*.py"), *BUILT.glob("*.abi3.so")]:
            if not (without and without in source.name):
                archive.write(source, Path("aqlm_c", source.relative_to(BUILT if source.suffix == ".so" else PACKAGE)))
    return path


def test_a_sound_wheel(tmp_path, capfd):
    wheel_check.check(wheel(tmp_path))
    said = capfd.readouterr().out
    assert "without torch: ✓ _core" in said and ": ✓ cpu" in said and "MB, _core, " in said and "glibc" in said


@pytest.mark.parametrize(
    ("wrong", "named"), [({"without": "_torch"}, "_torch is missing"), ({"tag": "cp311-cp311"}, "the tag cp310-abi3")]
)
def test_what_is_wrong_is_named(tmp_path, wrong, named):
    with pytest.raises(SystemExit, match=named):
        wheel_check.check(wheel(tmp_path, **wrong))


def test_a_library_of_this_machine_is_named(monkeypatch, tmp_path):
    linked = """
 0x01 (NEEDED)             Shared library: [libcudart.so.13]
 0x01 (NEEDED)             Shared library: [libc.so.6]
 0x1d (RUNPATH)            Library runpath: [/somewhere/lib]
"""
    answers = {"readelf": linked, "nm": "  U cudaMalloc\n  U cuInit\n  U malloc@GLIBC_2.2.5\n  U _ZN3c104warnEv\n"}
    monkeypatch.setattr(wheel_check, "said", lambda program, *_: answers[program])
    assert list(wheel_check.problems_of(tmp_path / "_cuda.abi3.so")) == [
        "_cuda.abi3.so needs libcudart.so.13",
        "_cuda.abi3.so looks for libraries in /somewhere/lib",
        "_cuda.abi3.so wants cudaMalloc",
        "_cuda.abi3.so wants cuInit",
        "_cuda.abi3.so wants _ZN3c104warnEv",
    ]
