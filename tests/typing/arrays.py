"""The types of the verbs over arrays. This is not run: `tests/test_typing.py` has it checked."""

import operator
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

from taskcarrier import FailedRange, map_array, map_chunks, map_items, reduce_array

X = np.arange(6.0)


def double(chunk: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(2.0 * chunk)


def divide(chunk: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.asarray(chunk // 2), np.asarray(chunk % 2)


def add_up(row: NDArray[Any]) -> float:
    return float(row.sum())


def find_bounds(row: NDArray[Any]) -> tuple[float, float]:
    return float(row.min()), float(row.max())


def fill_row(row: NDArray[Any], out: NDArray[Any]) -> None:
    out[:] = row


def untyped(chunk: Any) -> Any:
    return chunk


# Functions that return arrays or numbers give an array.
assert_type(map_array(double, X), NDArray[Any])
assert_type(map_array(double, X, axis=0, n_jobs=2, on_error="fill"), NDArray[Any])
assert_type(map_array(double, X, X, out=X, dtype="f4", rng=1, retry_on=OSError), NDArray[Any])
assert_type(map_items(add_up, X), NDArray[Any])
assert_type(map_items(fill_row, X, out_shape=3, out="Y.npy", resume=True), NDArray[Any])
assert_type(map_array(np.sqrt, X), NDArray[Any])

# Functions that return tuples give a tuple of arrays.
assert_type(map_array(divide, X), tuple[NDArray[Any], ...])
assert_type(map_array(divide, X, depth=1, boundary="nearest"), tuple[NDArray[Any], ...])
assert_type(map_items(find_bounds, X, on_error="raise"), tuple[NDArray[Any], ...])
assert_type(map_array(lambda chunk: (chunk, chunk), X), tuple[NDArray[Any], ...])

# What a function returns may be unknown.
Y: NDArray[Any] = map_array(lambda chunk: chunk + 1, X)
Z: NDArray[Any] = map_items(untyped, X)

# Failures are returned beside the result.
result, failures = map_array(double, X, on_error="collect")
assert_type(failures, list[FailedRange])
assert_type(map_array(double, X, on_error="collect"), tuple[NDArray[Any] | Any, list[FailedRange]])
assert_type(
    map_items(find_bounds, X, on_error="collect", fill_value=0),
    tuple[tuple[NDArray[Any], ...] | Any, list[FailedRange]],
)

# Lists hold what the function returns.
assert_type(map_chunks(add_up, X), list[float])
assert_type(map_chunks(find_bounds, X, chunksize=2, on_error="raise"), list[tuple[float, float]])
assert_type(map_chunks(lambda _: "x", X), list[str])
assert_type(map_chunks(add_up, X, on_error="collect"), tuple[list[float | None], list[FailedRange]])

# A reduction gives what the function returns, or what `initial` is.
assert_type(reduce_array(add_up, X, combine=operator.add), float)
assert_type(reduce_array(add_up, X, combine=max, n_jobs=1, kwargs={}), float)
assert_type(reduce_array(add_up, X, combine=lambda left, right: left + right), float)


def collect(left: list[float], right: float) -> list[float]:
    return [*left, right]


nothing: list[float] = []
assert_type(reduce_array(add_up, X, combine=collect, initial=nothing), list[float])
