"""Records: small classes of values that stay as they were made.

They are dataclasses, and type checkers refuse to assign to their fields. At run time nothing holds
that, and records are not compared. So a record takes a third of the time of a frozen dataclass when
its module is imported; the first map waits for twenty of them, and the fork server for as many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform, overload

T = TypeVar("T")


@overload
def record(cls: type[T]) -> type[T]: ...
@overload
def record(*, kw_only: bool) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
def record(cls: type[T] | None = None, *, kw_only: bool = False) -> object:
    """Make a class a record, as `dataclasses.dataclass` does it."""
    make = dataclass(eq=False, kw_only=kw_only)
    return make if cls is None else make(cls)
