"""Threads, instruction sets and Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import time

import layers
import numpy as np
import pytest

from aqlm_c import _core


def test_isas():
    names = _core.available_isas()
    assert names[0] == "scalar" and len(set(names)) == len(names)
    with pytest.raises(ValueError, match="name: got 'sse9', expected one of"):
        _core.set_isa("sse9")


def test_the_environment_variable_picks_the_isa():
    def run(isa):
        code = "from aqlm_c import _core; print(_core.get_isa())"
        return subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "AQLM_C_ISA": isa}, capture_output=True, text=True
        )

    for isa in _core.available_isas():
        assert run(isa).stdout.strip() == isa
    assert "AQLM_C_ISA: got 'mmx', expected one of" in run("mmx").stderr


def test_the_number_of_threads():
    before = _core.get_num_threads()
    _core.set_num_threads(3)
    assert _core.get_num_threads() == 3
    _core.set_num_threads(before)
    for bad in (0, -1, 5000):
        with pytest.raises(ValueError, match=f"n: got {bad} threads, expected 1..1024"):
            _core.set_num_threads(bad)


@pytest.fixture
def ctrl_c():
    """ctrl_c(seconds) interrupts the process then, whatever handler an earlier test left behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda seconds: threading.Timer(seconds, signal.raise_signal, (signal.SIGINT,)).start()
    signal.signal(signal.SIGINT, before)


def repeat(function):
    """Calls it again and again, but not for ever."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        function()


def test_ctrl_c_stops_long_work_within_two_seconds(ctrl_c):
    W, H = layers.random_layer(512, 512)
    scales = np.ones(512, np.float32)
    started = time.monotonic()
    ctrl_c(0.3)
    with pytest.raises(KeyboardInterrupt):
        _core.residual_kmeans(W, scales, 8, 12, 8, 10_000, 0.0)
    assert time.monotonic() - started < 2.3
    codes, codebooks = _core.residual_kmeans(W, scales, 1, 4, 8)  # and the next call is not disturbed
    assert _core.quantization_error(W, H, codes, codebooks, scales) > 0


def test_ctrl_c_in_the_very_first_pass(ctrl_c):
    W, _ = layers.random_layer(1024, 512)
    ctrl_c(0.02)
    with pytest.raises(KeyboardInterrupt):
        # one assignment to 65,536 entries takes longer than the timer
        repeat(lambda: _core.residual_kmeans(W, np.ones(1024, np.float32), 1, 16, 8, 1, 0.0))


def test_ctrl_c_stops_the_main_thread_alone(ctrl_c):
    W, _ = layers.random_layer(256, 256)
    scales, results = np.ones(256, np.float32), []

    def work():
        return _core.residual_kmeans(W, scales, 2, 9, 8, 40, 0.0)

    truth = work()
    thread = threading.Thread(target=lambda: results.extend(work() for _ in range(4)))
    thread.start()
    ctrl_c(0.1)
    with pytest.raises(KeyboardInterrupt):
        repeat(work)
    thread.join()
    assert len(results) == 4
    for result in results:
        np.testing.assert_array_equal(result[0], truth[0])
        np.testing.assert_array_equal(result[1], truth[1])


def test_other_python_threads_run_meanwhile():
    W, _ = layers.random_layer(256, 256)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.005)

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.monotonic()
    _core.residual_kmeans(W, np.ones(256, np.float32), 4, 10, 8, 60, 0.0)
    ended = time.monotonic()
    done.set()
    thread.join()
    inside = [t for t in ticks if started < t < ended]
    assert ended - started > 0.1 and len(inside) > 5


DAEMONS = """
import threading, time
import numpy as np
from aqlm_c import _core

W, scales = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32), np.ones(256, np.float32)


def deep(n):  # below C frames, as a stack in use is
    if n:
        return list(map(deep, [n - 1]))
    while True:
        _core.residual_kmeans(W, scales, 4, 10, 8, 1000, 0.0)


class Late:
    def __del__(self, sleep=time.sleep):
        sleep(0.4)  # the interpreter ends, which asks of every thread that wants the GIL to end


late = Late()
_core.set_num_threads(3)
for _ in range(4):
    threading.Thread(target=deep, args=(60,), daemon=True).start()
time.sleep(0.2)
"""


def test_daemon_threads_inside_the_core_when_the_interpreter_ends():
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", DAEMONS], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("bits", [16, 23])
def test_the_isa_may_change_while_products_run(bits):
    """Each product is made by one table of kernels, whoever switches meanwhile."""
    names = _core.available_isas()
    if len(names) < 2:
        pytest.skip("this CPU has one instruction set")
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (512, 64, 2)).astype(np.int8)
    codebooks = rng.standard_normal((2, 256, 1, 8)).astype(np.float32)
    x, scales = rng.standard_normal((4, 512)).astype(np.float32), np.ones(512, np.float32)
    isa, exact, done = _core.get_isa(), _core.get_exact(), threading.Event()

    def switch():
        while not done.is_set():
            for name in names:
                _core.set_isa(name)
                time.sleep(1e-4)

    _core.set_exact(None if bits == 23 else False)
    thread = threading.Thread(target=switch)
    try:
        truth = _core.matmul(x, codes, codebooks, scales)
        thread.start()
        for _ in range(400):
            np.testing.assert_array_equal(_core.matmul(x, codes, codebooks, scales), truth)
    finally:
        done.set()
        if thread.ident:
            thread.join()
        _core.set_isa(isa)
        _core.set_exact(exact)


def test_signals_are_answered_in_a_child_that_a_thread_forked():
    code = """
import os, signal, threading, numpy as np
from aqlm_c import _core

def work():
    while True:
        _core.residual_kmeans(np.ones((256, 256), np.float32), np.ones(256, np.float32), 4, 10, 8, 1000, 0.0)

def forks():
    global child
    child = os.fork()
    if child == 0:  # this thread is the main one here
        signal.alarm(20)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.2)
        signal.signal(signal.SIGVTALRM, lambda *_: os._exit(7))
        work()

thread = threading.Thread(target=forks)
thread.start()
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "7", done.stderr
