"""The current mapper: chosen once at the top of a program, and asked for deep inside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Self

from taskcarrier.mappers import Mapper, SerialMapper
from taskcarrier.system.contexts import contextmanager
from taskcarrier.workers.choose import read_facts

_chosen_mapper: ContextVar[Mapper | None] = ContextVar("taskcarrier_mapper", default=None)


@contextmanager
def use_mapper(mapper: Mapper) -> Iterator[Mapper]:
    """Choose the mapper for a block of code, and for everything that is called in it.

    The choice holds for this thread (and for tasks of `asyncio` that begin in the block). Of nested
    blocks, the innermost counts.

    Parameters
    ----------
    mapper : SerialMapper, StaticParallelMapper or DynamicParallelMapper
        The mapper that `current_mapper` returns inside the block.

    Yields
    ------
    mapper
        The mapper that was passed.

    Examples
    --------
    >>> from taskcarrier import SerialMapper, current_mapper, use_mapper
    >>> def shout(words):
    ...     return current_mapper()(str.upper, words)
    >>> with use_mapper(SerialMapper()):
    ...     shout(["a", "b"])
    ['A', 'B']
    """
    if not isinstance(mapper, Mapper):
        raise TypeError(
            "use_mapper needs a SerialMapper, StaticParallelMapper or DynamicParallelMapper, got "
            f"{mapper!r}"
        )
    token = _chosen_mapper.set(mapper)
    try:
        yield mapper
    finally:
        _chosen_mapper.reset(token)


def current_mapper() -> Mapper:
    """Return the mapper that was chosen for this place.

    Returns
    -------
    mapper
        The mapper of the innermost `use_mapper` block; else the one that was registered with
        `MapperInstance`; else a `SerialMapper`. Inside a worker, ours or joblib's (and so
        scikit-learn's), always a `SerialMapper`: workers do not start workers.

    Examples
    --------
    >>> from taskcarrier import current_mapper
    >>> current_mapper()([].append, [])
    []
    """
    if _is_inside_a_worker():
        return SerialMapper()
    return _chosen_mapper.get() or MapperInstance().retrieve_mapper()


def _is_inside_a_worker() -> bool:
    facts = read_facts()
    return facts.is_in_worker or facts.is_nested_in_joblib or facts.is_daemonic


class MapperInstance:
    """A singleton that holds the mapper of a program, as in the original TaskCarrier.

    Entering it gives the registered mapper (a `SerialMapper` if there is none). Entering it again
    inside such a block, or in a worker, gives a `SerialMapper`. New code should rather use
    `use_mapper`.

    Examples
    --------
    >>> from taskcarrier import MapperInstance, SerialMapper, StaticParallelMapper
    >>> MapperInstance().register_mapper(StaticParallelMapper(1))
    >>> with MapperInstance() as mapper:
    ...     mapper.map(pow, [1, 2, 3], [2, 2, 2])
    [1, 4, 9]
    >>> MapperInstance().register_mapper(SerialMapper())
    """

    _singleton: Self | None = None
    _mapper: Mapper
    _depth: ContextVar[int]

    def __new__(cls) -> Self:  # noqa: D102  # there is one
        if cls._singleton is None:
            instance = super().__new__(cls)
            instance._mapper = SerialMapper()
            instance._depth = ContextVar("taskcarrier_mapper_depth", default=0)
            cls._singleton = instance
        return cls._singleton

    def register_mapper(self, mapper: Mapper) -> None:
        """Use this mapper from now on, everywhere in the program."""
        self._mapper = mapper

    def retrieve_mapper(self) -> Mapper:
        """Return the registered mapper."""
        return self._mapper

    def __enter__(self) -> Mapper:
        depth = self._depth.get()
        self._depth.set(depth + 1)
        return SerialMapper() if depth or _is_inside_a_worker() else self._mapper

    def __exit__(self, *_: Any) -> None:
        self._depth.set(self._depth.get() - 1)
