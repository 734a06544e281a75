"""Records: small classes of values that stay as they were made.

They are dataclasses, and type checkers refuse to assign to their fields. At run time nothing holds
that, and nobody compares records: this makes them at a third of what a frozen dataclass takes when
a module is imported. The first map waits for the imports of about forty, here and in the fork
server.
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
