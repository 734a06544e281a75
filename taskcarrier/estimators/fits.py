"""One fit, in a worker: its estimator, its rows of the shared data, its random states.

scikit-learn is not imported here. Where the program has imported it, it clones the estimators, and
its configuration is passed on to the workers.
"""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from taskcarrier.arguments import check_iterable
from taskcarrier.arrays.inputs.check import refuse_masked
from taskcarrier.notes import add_note
from taskcarrier.record import record
from taskcarrier.workers.loop import is_worker_process


@record
class Template:
    """The estimator that many fits start from; a clone already.

    Worker processes get it pickled: scikit-learn's `clone` takes 50 µs for a ridge regression,
    reading its pickle takes 3 (`python -m bench fits`).
    """

    estimator: Any

    def make_estimator(self) -> Any:
        """Return a new estimator for one fit."""
        return clone(self.estimator)

    def __reduce__(self) -> tuple[Any, ...]:
        from taskcarrier.workers.pickling import pickle_items  # noqa: PLC0415  # loads joblib

        return _unpack_template, (pickle_items(self.estimator),)


@record
class _PackedTemplate:
    """A `Template` in a worker process."""

    packed: bytes

    def make_estimator(self) -> Any:
        """Return a new estimator for one fit."""
        return pickle.loads(self.packed)


def _unpack_template(packed: bytes) -> _PackedTemplate:
    pickle.loads(packed)  # imports the estimator's modules now, before the worker is ready
    return _PackedTemplate(packed)


@record
class Rows:
    """The rows of every fit. They are sent to processes as one array, which all share."""

    each: Sequence[np.ndarray]
    n_samples: int

    @classmethod
    def from_arguments(cls, rows: Any, n_samples: int) -> Rows:
        """Check the rows of every fit, which may be indices or masks."""
        entries = check_iterable(rows, "rows", "arrays of indices or masks, one for each fit")
        return cls([_to_rows(entry, n_samples) for entry in entries], n_samples)

    def get_rows(self, number: int) -> np.ndarray:
        """Return the rows of one fit."""
        return self.each[number]

    def __reduce__(self) -> tuple[Any, ...]:
        each = self.each
        dtype: type = bool
        if not all(rows.dtype == bool for rows in each):
            # Masks and indices do not fit into one array. Indices are below the number of samples.
            each = [np.flatnonzero(rows) if rows.dtype == bool else rows for rows in each]
            dtype = np.int32 if self.n_samples <= np.iinfo(np.int32).max else np.intp
        flat: np.ndarray = np.concatenate(each, dtype=dtype, casting="unsafe")
        return _FlatRows, (flat, [0, *np.cumsum([len(rows) for rows in each]).tolist()])


@record
class _FlatRows:
    """`Rows` in a worker process: one array, and where the rows of each fit begin and end."""

    flat: np.ndarray
    bounds: list[int]

    def get_rows(self, number: int) -> np.ndarray:
        """Return the rows of one fit."""
        rows = self.flat[self.bounds[number] : self.bounds[number + 1]]
        return rows if rows.dtype == bool else rows.astype(np.intp, copy=False)


def fit_one(
    number: int,
    estimator: Any = None,
    *,
    X: Any,
    y: Any = None,
    weights: np.ndarray | None = None,
    rows: Rows | _FlatRows | None,
    rng: np.random.Generator | None = None,
    template: Template | _PackedTemplate | None,
    columns: list[int] | None,
    draw_rows: Callable[[Any], Any] | None,
    draw_weights: Callable[[Any], Any] | None,
    by_fit: bool,
    caller_context: CallerContext,
) -> Any:
    """Fit one estimator, in a worker."""
    with caller_context.apply():
        estimator = clone(estimator) if template is None else template.make_estimator()
        if rng is not None:
            _set_random_states(estimator, rng)
        fit_rows = None if rows is None else rows.get_rows(number)
        if draw_rows is not None:
            fit_rows = _to_rows(draw_rows(rng), X.shape[0])
        if draw_weights is not None:
            weights = draw_weights(rng)
            refuse_masked(weights, "what sample_weight returned", "return its .filled(value)")
            weights = np.asarray(weights)
        elif by_fit and weights is not None:
            weights = weights[number]
        if y is not None and columns is not None:
            y = y[:, columns[number]]
        if fit_rows is not None:
            X, y, weights = (
                None if data is None else _take_rows(data, fit_rows) for data in (X, y, weights)
            )
        options = {} if weights is None else {"sample_weight": weights}
        estimator.fit(*([X] if y is None else [X, y]), **options)
        return estimator


def _take_rows(data: Any, rows: np.ndarray) -> Any:
    """Return ``data[rows]``."""
    # `take` is three times as fast for 500 rows of 160 bytes. From an array that is not in C order,
    # it would give a result in another order.
    if type(data) is np.ndarray and data.flags.c_contiguous and rows.dtype == np.intp:
        return data.take(rows, axis=0)
    return data[rows]


def clone(estimator: Any) -> Any:
    """Return an unfitted copy: scikit-learn's, if the program has it, else one like it."""
    base = sys.modules.get("sklearn.base")
    if base is not None:
        return base.clone(estimator, safe=False)
    if not hasattr(estimator, "get_params") or isinstance(estimator, type):
        return copy.deepcopy(estimator)
    parameters = estimator.get_params(deep=False)
    return type(estimator)(**{name: clone(value) for name, value in parameters.items()})


def _set_random_states(estimator: Any, rng: np.random.Generator) -> None:
    """Set every ``random_state`` parameter, in sorted order, to a number from the stream."""
    if not hasattr(estimator, "get_params"):
        return
    states = {
        name: int(rng.integers(np.iinfo(np.int32).max))
        for name in sorted(estimator.get_params(deep=True))
        if name == "random_state" or name.endswith("__random_state")
    }
    if states:
        estimator.set_params(**states)


@record
class CallerContext:
    """The caller's warning filters and scikit-learn configuration, which workers take over."""

    filters: list[Any]
    config: dict[str, Any] | None

    @classmethod
    def capture(cls) -> CallerContext:
        """Return what holds in the calling thread."""
        sklearn: Any = sys.modules.get("sklearn")
        return cls(list(warnings.filters), None if sklearn is None else sklearn.get_config())

    def apply(self) -> AbstractContextManager[Any]:
        """Return a context with these; in worker processes the filters stay until the run ends."""
        # Filters belong to the whole process, which threads share with the caller. A worker process
        # restores its filters at the end of a run.
        if is_worker_process():
            warnings.resetwarnings()  # also forgets which were shown
            warnings.filters[:] = self.filters  # type: ignore[index]  # in fact a list
        sklearn: Any = sys.modules.get("sklearn")
        # Setting the configuration takes ten times as long as seeing that it is set already.
        if sklearn is not None and self.config not in (None, sklearn.get_config()):
            context: AbstractContextManager[Any] = sklearn.config_context(**self.config)
            return context
        return nullcontext()


def _to_rows(rows: Any, n_samples: int) -> np.ndarray:
    """Return indices or a mask as an array; raise an error if it does not fit the samples."""
    refuse_masked(rows, "rows", "pass its .filled(value), or a boolean mask of the samples")
    try:
        indices = np.asarray(rows)
    except ValueError as error:
        add_note(
            error,
            "each entry of rows= must be one array of indices or one mask; of a splitter's pairs, "
            "pass the first: rows=[train for train, test in folds]",
        )
        raise
    if indices.dtype == bool and indices.shape != (n_samples,):
        raise ValueError(f"a mask of rows must have shape ({n_samples},), got {indices.shape}")
    if indices.size == 0:
        indices = indices.astype(np.intp)
    if indices.ndim != 1 or indices.dtype.kind not in "biu":
        raise TypeError(
            "rows must be given as an array of indices or a boolean mask for each fit, got "
            f"{rows!r} for one"
        )
    _check_bounds(indices, n_samples)
    return indices


def _check_bounds(rows: np.ndarray, n_samples: int) -> None:
    if rows.dtype != bool and rows.size:
        lowest, highest = int(rows.min()), int(rows.max())
        if lowest < -n_samples or highest >= n_samples:
            raise IndexError(
                f"rows {lowest} to {highest} are asked for, but there are {n_samples} samples"
            )
