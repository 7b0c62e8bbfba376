"""What every test file may use: fixtures for instruction sets and dtypes."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports a hub client: tests use no network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported, for the processes that tests start too: tiny models take longer with more threads, and many
# times as long where cores are shared. Tests of threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

try:
    import aqlm_c
    from aqlm_c import _core
except ImportError as error:  # sources that nobody built, such as an unpacked sdist, hide what is installed
    pytest.exit(f"aqlm_c: got {error}, expected a build: run `make test`, or pytest from another folder", returncode=2)
if os.path.isdir("aqlm_c") and not os.path.samefile("aqlm_c", os.path.dirname(aqlm_c.__file__)):
    # `python -c` in the tests would import those
    pytest.exit(
        f"aqlm_c: got {aqlm_c.__file__}, expected that of this folder: run pytest from another one", returncode=2
    )

THREADS = {}  # of each library
MARKS = {"hf": "hf", "cuda": "gpu"}  # of all tests in a folder


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="fail where every selected test was skipped")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if mark := MARKS.get(item.path.parent.name):
            item.add_marker(mark)
    if "slow" not in (config.option.markexpr or ""):  # left out unless asked for
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Threads are as they were at first: a run that sets them, such as one of a run.yaml, sets them for the process."""
    for library in (sys.modules.get("torch"), _core):
        if library is not None:
            at_first = THREADS.setdefault(library.__name__, library.get_num_threads())
            if library.get_num_threads() != at_first:
                library.set_num_threads(at_first)


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and not reporter.stats.get("passed"):
        reporter.write_line("--no-skips: no test passed, expected at least one that is not skipped", red=True)
        session.exitstatus = 1


@pytest.fixture(params=_core.available_isas())
def isa(request):
    """Runs the test once per instruction set of this machine, on both bindings; gives its name."""
    bindings = [_core]
    try:
        from aqlm_c.nn import ops
    except ImportError:  # a build without torch still tests the C core
        pass
    else:
        bindings.append(ops)
    before = [binding.get_isa() for binding in bindings]
    for binding in bindings:
        binding.set_isa(request.param)
    yield request.param
    for binding, name in zip(bindings, before, strict=True):
        binding.set_isa(name)


@pytest.fixture(scope="module")
def one_thread():
    """Torch in one thread: tiny models take longer with more, and many times as long where cores are shared."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def exact():
    """Runs the test without matmul's rounded tables, on both bindings."""
    bindings = [_core]
    try:
        from aqlm_c.nn import ops
    except ImportError:
        pass
    else:
        bindings.append(ops)
    before = [binding.get_exact() for binding in bindings]
    for binding in bindings:
        binding.set_exact(True)
    yield
    for binding, value in zip(bindings, before, strict=True):
        binding.set_exact(value)


@pytest.fixture
def every_isa():
    """Calls a function for every instruction set and 1, 2 and 3 threads; True if all results are the same bits."""

    def run(function):
        isa, threads, results = _core.get_isa(), _core.get_num_threads(), []
        try:
            for name in _core.available_isas():
                _core.set_isa(name)
                for n in (1, 2, 3):
                    _core.set_num_threads(n)
                    result = function()
                    results.append([x.tobytes() for x in (result if isinstance(result, tuple) else (result,))])
        finally:
            _core.set_isa(isa)
            _core.set_num_threads(threads)
        return all(result == results[0] for result in results)

    return run


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request):
    """Runs the test once per torch dtype that a model may have."""
    return getattr(pytest.importorskip("torch"), request.param)
