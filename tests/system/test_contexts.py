"""Context managers that let any exception pass. `contextlib` is the oracle where possible."""

import ast
import contextlib
from pathlib import Path

import pytest

import taskcarrier
from taskcarrier.system.contexts import contextmanager
from tests.errors import FrozenError, throw


def passing(log):
    log.append("begin")
    try:
        yield log
    finally:
        log.append("end")


def catching(log):
    with contextlib.suppress(ValueError, StopIteration):
        yield log
    log.append("end")


def replacing(log):
    try:
        yield log
    except ValueError:
        log.append("end")
        raise KeyError("instead") from None


def outcome(make, generator, error):
    log = []
    try:
        with make(generator)(log) as entered:
            assert entered is log
            if error is not None:
                throw(error)
    except (ValueError, KeyError, StopIteration, RuntimeError, OSError) as caught:
        return type(caught), caught.args, len(list(walk(caught.__traceback__))), log
    return None, None, 0, log


def walk(frames):
    while frames is not None:
        yield frames
        frames = frames.tb_next


@pytest.mark.parametrize("generator", [passing, catching, replacing])
@pytest.mark.parametrize("error", [None, ValueError, StopIteration, RuntimeError, OSError])
def test_contextmanager_equals_that_of_contextlib(generator, error):
    ours, theirs = (
        outcome(make, generator, error and error("x"))
        for make in (contextmanager, contextlib.contextmanager)
    )
    assert ours == theirs


@pytest.mark.parametrize("generator", [passing, catching, replacing])
def test_an_exception_that_refuses_attributes_passes(generator):
    error = FrozenError(3, text="x")
    with pytest.raises(FrozenError) as caught, contextmanager(generator)([]):
        raise error
    assert caught.value is error
    assert len(list(walk(error.__traceback__))) == 1


def test_a_generator_that_yields_twice_is_an_error():
    @contextmanager
    def twice():
        for _ in range(2):
            with contextlib.suppress(ValueError):
                yield

    with pytest.raises(RuntimeError, match="yields again"), twice():
        raise ValueError


def test_a_context_manager_is_a_decorator_too():
    log = []
    contextmanager(passing)(log)(lambda: log.append("call"))()
    assert log == ["begin", "call", "end"]


def test_the_package_uses_no_other_contextmanager():
    for path in Path(taskcarrier.__file__).parent.rglob("*.py"):
        if path.name != "contexts.py":
            names = {
                node.attr if isinstance(node, ast.Attribute) else alias.name
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Attribute)
                or (isinstance(node, ast.ImportFrom) and node.module == "contextlib")
                for alias in getattr(node, "names", [None])
            }
            assert "contextmanager" not in names, path
