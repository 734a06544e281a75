"""The state of the parent that the function sees, in every backend as in the caller itself."""

import decimal
import os
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from taskcarrier import StaticParallelMapper, map_array
from taskcarrier.workers import parent_state
from tests.strategies import BACKENDS, each_parallel_run, keep_pools_warm

pools = keep_pools_warm(2)


def mapped(func, backend):
    return StaticParallelMapper(2, backend=backend, chunksize=1).map(func, range(6))


def third(_):
    return str(Decimal(1) / 3), decimal.getcontext().rounding


@pytest.mark.fault(35)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decimals_are_rounded_as_in_the_caller(backend):
    with decimal.localcontext() as context:
        context.prec, context.rounding = 4, decimal.ROUND_UP
        assert mapped(third, backend) == [("0.3334", decimal.ROUND_UP)] * 6
    # ... also after a call that set something else.
    assert mapped(third, backend) == list(map(third, range(6)))


@pytest.mark.fault(35)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decimals_raise_as_in_the_caller(backend):
    with decimal.localcontext() as context:
        context.traps[decimal.Inexact] = True
        with pytest.raises(decimal.Inexact):
            mapped(third, backend)


def test_threads_do_not_change_the_decimal_context_of_the_caller():
    def func(i):
        decimal.getcontext().prec = 3 + i
        return str(Decimal(1) / 3)

    with decimal.localcontext() as context:
        context.clear_flags()
        assert mapped(func, "threading")[0] == "0.333"
        assert context.prec == 28
        assert not context.flags[decimal.Inexact]


@pytest.mark.fault(35)
@pytest.mark.parametrize("backend", BACKENDS)
def test_functions_may_recurse_as_deep_as_in_the_caller(backend):
    def deep(n):
        return 0 if n == 0 else 1 + deep(n - 1)

    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + 3000)
    try:
        assert mapped(lambda _: deep(before + 1000), backend) == [before + 1000] * 6
    finally:
        sys.setrecursionlimit(before)
    with pytest.raises(RecursionError):
        mapped(lambda _: deep(before + 1000), backend)


class Handler:
    """Writes down what it is called with, where the caller can see it."""

    def __init__(self, path):
        self.path = path

    def __call__(self, kind, flag):
        with self.path.open("a") as file:
            file.write(f"{kind} {flag}\n")

    def write(self, text):
        with self.path.open("a") as file:
            file.write(text)


@pytest.fixture
def handled(tmp_path):
    """What was handled, in a program whose handler is none afterwards."""
    path = tmp_path / "handled"
    before = np.seterrcall(Handler(path))
    yield lambda: path.read_text().splitlines()
    np.seterrcall(before)


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("mode", "line"), [("call", "divide by zero 1"), ("log", "Warning: divide by zero")]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_handlers_of_floating_point_errors_are_called(backend, mode, line, handled):
    with np.errstate(divide=mode):
        mapped(lambda _: np.ones(1) / 0, backend)
    assert [text.partition(" encountered")[0] for text in handled()] == [line] * 6


@each_parallel_run
def test_an_unused_error_handler_is_not_sent(backend, balance):
    class Unpicklable:
        def __reduce__(self):
            raise TypeError("not to be pickled")

        def __call__(self, kind, flag):
            """Never."""

    before = np.seterrcall(Unpicklable())
    try:
        X = np.ones(4)
        assert np.array_equal(map_array(np.sqrt, X, backend=backend, balance=balance, n_jobs=2), X)
    finally:
        np.seterrcall(before)


class TestFolders:
    """The caller's current folder, which somebody may remove at any time."""

    @pytest.fixture(autouse=True)
    def back_again(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)

    @pytest.mark.fault(36)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_folder_of_an_earlier_call_may_be_removed(self, backend, tmp_path):
        (tmp_path / "gone").mkdir()
        os.chdir("gone")
        pids = set(mapped(lambda _: os.getpid(), backend))
        os.chdir(tmp_path)
        (tmp_path / "gone").rmdir()
        told = mapped(lambda _: (os.getpid(), str(Path.cwd())), backend)
        assert {folder for _, folder in told} == {str(tmp_path)}
        assert {pid for pid, _ in told} <= pids  # the same workers

    @pytest.mark.fault(36)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_caller_may_be_in_a_removed_folder(self, backend, tmp_path):
        (tmp_path / "gone").mkdir()
        os.chdir("gone")
        mapped(abs, backend)
        (tmp_path / "gone").rmdir()
        assert mapped(abs, backend) == list(range(6))
        X = np.arange(6.0)
        assert np.array_equal(map_array(np.sqrt, X, backend=backend, n_jobs=2), np.sqrt(X))

    @pytest.mark.fault(36)
    def test_a_folder_removed_before_the_worker_starts_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(parent_state, "_get_folder", lambda: str(tmp_path / "missing"))
        with pytest.raises(FileNotFoundError, match="missing") as caught:
            mapped(abs, "loky")
        assert "while a worker process took on the caller's folder" in caught.value.__notes__[0]
        monkeypatch.undo()
        assert mapped(abs, "loky") == list(range(6))
