"""Context managers made from generators, for blocks that may raise any exception.

`contextlib.contextmanager` sets the traceback of each exception that passes through. An exception
that refuses attributes (`taskcarrier.notes`) would be replaced by the error of that attempt. The
context managers here let it pass, and are the same otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, _GeneratorContextManager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from taskcarrier.system.exceptions import set_base_attribute

P = ParamSpec("P")
T = TypeVar("T")


class _Block(_GeneratorContextManager[Any]):
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if error is None:
            return super().__exit__(kind, error, traceback)
        try:
            self.gen.throw(error)
        except StopIteration:
            return True  # the generator has caught it
        except BaseException as raised:
            # In a generator a `StopIteration` becomes the cause of a `RuntimeError`.
            if raised is error or (isinstance(error, StopIteration) and raised.__cause__ is error):
                set_base_attribute(error, "__traceback__", traceback)
                return False
            raise
        raise RuntimeError("the generator yields again after its block has raised")


def contextmanager(func: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """Turn a generator function that yields once into a context manager, as `contextlib` does."""

    @functools.wraps(func)
    def make_block(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Block(func, args, kwargs)  # type: ignore[arg-type]  # it is a generator function

    return make_block
