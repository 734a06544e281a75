"""The types of mappers. This is not run: `tests/test_typing.py` has it checked."""

import operator
from collections.abc import Generator
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

from taskcarrier import (
    DynamicParallelMapper,
    FailedRange,
    SerialMapper,
    StaticParallelMapper,
    current_mapper,
)

X = np.arange(6.0)
mapper = StaticParallelMapper(2, 0, None, "threading", chunksize=4)


def double(chunk: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(2.0 * chunk)


def divide(chunk: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.asarray(chunk // 2), np.asarray(chunk % 2)


def add_up(row: NDArray[Any]) -> float:
    return float(row.sum())


# Maps over sequences.
assert_type(mapper.map(len, ["a"]), list[int])
assert_type(mapper(str.upper, ["a", "b"], chunksize=1, rng=None), list[str])
assert_type(mapper.map(divmod, [1], [2], on_error="raise", timeout=1.5), list[Any])
assert_type(mapper(lambda _: 1.5, ["a"]), list[float])
assert_type(mapper.map(len, ["a"], on_error="collect"), tuple[list[int | None], list[FailedRange]])
assert_type(mapper(len, ["a"], on_error="collect"), tuple[list[int | None], list[FailedRange]])
assert_type(mapper.starmap(divmod, [(1, 2)], 3), list[Any])
assert_type(mapper.starmap(len, [("a",)], shared={}), list[int])
assert_type(
    mapper.starmap(len, [("a",)], on_error="collect"), tuple[list[int | None], list[FailedRange]]
)
assert_type(mapper.imap(len, ["a"], ordered=False, buffersize=3), Generator[int, None, None])

# Maps over arrays.
assert_type(mapper.map_array(double, X), NDArray[Any])
assert_type(mapper.map_array(divide, X, depth=1), tuple[NDArray[Any], ...])
assert_type(
    mapper.map_array(double, X, on_error="collect"), tuple[NDArray[Any] | Any, list[FailedRange]]
)
assert_type(mapper.map_array(lambda chunk: (chunk, chunk), X), tuple[NDArray[Any], ...])
assert_type(mapper.map_items(add_up, X, out_axis=0, on_error="fill"), NDArray[Any])
assert_type(
    mapper.map_items(divide, X, on_error="collect"),
    tuple[tuple[NDArray[Any], ...] | Any, list[FailedRange]],
)
assert_type(mapper.map_chunks(add_up, X), list[float])
assert_type(
    mapper.map_chunks(add_up, X, on_error="collect"), tuple[list[float | None], list[FailedRange]]
)
assert_type(mapper.reduce_array(add_up, X, combine=operator.add), float)
assert_type(mapper.reduce_array(add_up, X, combine=max, initial=1.0), float)

# All mappers have the same methods.
with DynamicParallelMapper(n_jobs=2) as dynamic:
    assert_type(dynamic, DynamicParallelMapper)
    assert_type(dynamic.map_array(double, X), NDArray[Any])
assert_type(SerialMapper().map(len, ["a"]), list[int])
assert_type(current_mapper().map_items(add_up, X), NDArray[Any])
