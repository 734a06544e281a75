"""Fit loops in the style of scikit-learn: many estimators on parts of the same data; predictions.

Estimators are duck-typed: scikit-learn is not imported here unless the program has done so. Where
it has, estimators are cloned by it, and its configuration goes along to the workers.
"""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from taskcarrier.arguments import check_integer
from taskcarrier.arrays.inputs.check import check_inputs, refuse_masked
from taskcarrier.arrays.mapping import map_array
from taskcarrier.lists.map import map_lists
from taskcarrier.notes import add_note
from taskcarrier.options import fill_docstring
from taskcarrier.run import Settings
from taskcarrier.scheduling.retries import RETRIES
from taskcarrier.workers.loop import is_worker_process

# Modules whose estimators spend their time in compiled code without the GIL.
_WITHOUT_GIL = ("sklearn.tree", "sklearn.ensemble._forest")
# Predictions are cut into about this many ranges, if that leaves them a mebibyte each: every call
# of a forest costs as much as some thousand rows.
_N_RANGES = 16
_MIN_ROWS = 1000
# Indices are checked so many fits at once, unless they are more than this for one; arbitrary.
_AT_ONCE = 64
_SMALL_ROWS = 4096
# Parameters that need no copy of their own.
_PLAIN = (bool, int, float, complex, str, bytes)
_NO_CONTEXT = nullcontext()


@fill_docstring
def fit_many(
    estimators: Any,
    X: Any,
    y: Any = None,
    *,
    rows: Any = None,
    columns: Sequence[int] | None = None,
    sample_weight: Any = None,
    rng: Any = None,
    balance: str = "dynamic",
    n_jobs: int | None = None,
    backend: str | None = None,
    timeout: float | None = None,
    retries: int = RETRIES,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (),
    on_error: str = "raise",
) -> Any:
    """Fit many estimators, each on its rows of the same data, on every core.

    Equals ``[clone(e).fit(X[rows_of_e], y[rows_of_e]) for e in estimators]``. The data are there
    once for all workers. There are as many fits as `estimators`, `rows` and `columns` have
    entries; what is given once goes to all of them.

    What is demanded of an estimator: ``fit(X)`` or ``fit(X, y)``, with ``sample_weight=`` where
    that is given, and that it can be cloned (scikit-learn's way, by ``get_params``, or else by a
    deep copy) and, for processes, pickled. The estimators that are passed stay as they are.

    Parameters
    ----------
    estimators : estimator or sequence of estimators
        One for all fits, or one for each.
    X : array_like of shape (n_samples, ...)
        The data. Arrays from `share` or `load` are not copied. pandas objects become their values
        (estimators see no names of columns); sparse matrices stay sparse.
    y : array_like of shape (n_samples,) or (n_samples, n_targets), optional
        The targets.
    rows : sequence, callable, optional
        Which rows each is fitted on: an array of indices or a boolean mask for each fit, or a
        callable that takes the fit's random stream and returns one of these (drawn in the worker,
        for example ``lambda rng: rng.integers(n, size=n)`` for a bootstrap). Default: all rows.
    columns : sequence of int, optional
        For each fit the column of `y` that is its target.
    sample_weight : array_like of shape (n_samples,) or (n_fits, n_samples), or callable, optional
        Weights of samples, the same for all fits or one row for each, or a callable as for `rows`.
        Where `rows` are given, those of the rows are passed.
    rng : int, SeedSequence or Generator, optional
        Gives each fit a random stream of its own, which depends on its number alone. From it come,
        in this order, every ``random_state`` parameter of the estimator (by name in sorted order,
        nested ones too, as scikit-learn sets them), what `rows` draws, and what `sample_weight`
        draws. Default: none; ``random_state`` stays as it is.
    balance : {"static", "dynamic"}, default "dynamic"
        How work is shared out: evenly beforehand, or each free worker takes the next part.
    {n_jobs}
    backend : {"sequential", "threading", "loky", "threads", "processes"} or str, optional
        Where workers run; also any other that is registered with joblib, such as ``"dask"``, which
        keeps no `timeout`. Default: what an active `joblib.parallel_config` says, else threads for
        scikit-learn's trees and forests, which release the GIL, else processes.
    timeout : float, optional
        Seconds that the fits of one range may take. Default: any time.
    retries : int, default 2
        How often fits are run again after their worker process has died.
    retry_on : exception type or tuple of types, optional
        Exceptions after which a fit is tried again, up to `retries` times. Default: none.
    {collect_on_error}

    Returns
    -------
    list of fitted estimators
        In the order of the fits. With ``on_error="collect"`` a tuple of that, with None where a fit
        failed, and a list of `FailedRange`.

    Raises
    ------
    TypeError, ValueError
        Bad arguments, before anything is started.
    WorkerDiedError
        A fit has killed every worker process that ran it.
    TimeoutError
        Fits took longer than `timeout`.
    Exception
        Whatever a fit raises, with a note that names its number.

    Examples
    --------
    >>> import numpy as np
    >>> from taskcarrier import fit_many
    >>> class Mean:
    ...     def fit(self, X):
    ...         self.mean_ = X.mean()
    ...         return self
    >>> halves = [np.arange(2), np.arange(2, 4)]
    >>> [float(one.mean_) for one in fit_many(Mean(), np.arange(4.0), rows=halves, n_jobs=1)]
    [0.5, 2.5]
    """
    settings = Settings.from_arguments(
        balance, n_jobs, backend, timeout=timeout, retries=retries, retry_on=retry_on
    )
    data = {"X": _to_data(X, "X")}
    n_samples = data["X"].shape[0]
    if y is not None:
        data["y"] = _to_data(y, "y", n_samples)
    for name, one in (("rows", rows), ("sample_weight", sample_weight)):
        if callable(one) and rng is None:
            raise ValueError(f"{name} is to draw from a random stream: pass rng=")
    weights = _Weights.from_arguments(sample_weight, n_samples)
    if weights.values is not None:
        data["weights"] = weights.values
    fits = _fits(
        _to_list(estimators),
        None if rows is None or callable(rows) else _Rows.from_arguments(rows, n_samples),
        None if columns is None else [_to_column(one, data.get("y")) for one in columns],
        weights.n_fits,
    )
    fit = partial(
        _fit,
        template=fits.template,
        columns=fits.columns,
        draw_rows=rows if callable(rows) else None,
        draw_weights=sample_weight if callable(sample_weight) else None,
        by_fit=weights.n_fits is not None,
        parent_state=_Surroundings.here(),
    )
    return map_lists(
        replace(settings, known=_find_method(fits.estimators)),
        fit,
        fits.items,
        None,
        on_error=on_error,
        rng=rng,
        shared={**data, "rows": fits.rows},
    )


@fill_docstring
def predict_array(
    estimator: Any,
    X: Any,
    method: str = "predict",
    *,
    balance: str = "dynamic",
    n_jobs: int | None = None,
    backend: str | None = None,
    chunksize: int | None = None,
    out: Any = None,
    dtype: Any = None,
    timeout: float | None = None,
    retries: int = RETRIES,
) -> Any:
    """Apply a fitted estimator to the rows of an array, in ranges, on every core.

    Equals ``estimator.predict(X)`` (or another method) for every estimator that treats rows
    independently.

    Parameters
    ----------
    estimator : fitted estimator
        The fitted estimator. For processes it must be picklable.
    X : array_like of shape (n_samples, ...)
        The rows. Paths that end in ``.npy`` and memmaps are mapped by the workers. pandas objects
        become their values (the estimator sees no names of columns).
    method : str, default "predict"
        What it is asked: ``"predict"``, ``"predict_proba"``, ``"transform"``,
        ``"decision_function"`` or any other method that takes rows and returns an array with as
        many rows.
    balance : {"static", "dynamic"}, default "dynamic"
        How work is shared out: evenly beforehand, or each free worker takes the next part.
    {n_jobs}
    backend : {"sequential", "threading", "loky", "threads", "processes"}, optional
        Where workers run. Default: what an active `joblib.parallel_config` says, else threads for
        scikit-learn's trees and forests, which release the GIL, else processes.
    chunksize : int, optional
        Rows for each call. Default: a 16th of all, but at least a thousand.
    {out}
    dtype : dtype, optional
        What the results are cast to, where that loses nothing.
    timeout : float, optional
        Seconds that one call may take. Default: any time.
    retries : int, default 2
        How often rows are tried again after their worker process has died.

    Returns
    -------
    ndarray
        `out` where it was given, else a new array.

    Raises
    ------
    TypeError, ValueError
        Bad arguments, before anything is started.
    WorkerDiedError, TimeoutError
        Rows that kill the worker processes that run them, or that take longer than `timeout`.
    Exception
        Whatever the method raises, with a note that names the rows.

    Examples
    --------
    >>> import numpy as np
    >>> from taskcarrier import predict_array
    >>> class Double:
    ...     def predict(self, X):
    ...         return 2 * X
    >>> predict_array(Double(), np.arange(4), n_jobs=1)
    array([0, 2, 4, 6])
    """
    if not callable(getattr(estimator, method, None)):
        raise TypeError(f"{type(estimator).__name__} has no method {method!r}")
    inputs = check_inputs((X,), 0)
    if chunksize is None:
        chunksize = max(_MIN_ROWS, -(-inputs.n_items // _N_RANGES))
    settings = Settings.from_arguments(
        balance, n_jobs, backend, timeout=timeout, retries=retries, retry_on=()
    )
    how: Any = replace(settings, known=_find_method([estimator]))
    return map_array(
        partial(_ask, estimator, method, parent_state=_Surroundings.here()),
        inputs.arrays[0],
        balance=how,
        chunksize=chunksize,
        out=out,
        dtype=dtype,
        out_axis=0,
        timeout=timeout,
        retries=retries,
    )


@dataclass(frozen=True, eq=False)
class _Fits:
    """All fits of a call.

    ``items`` are their numbers and, unless one is given for all, the estimators; ``template`` is
    the estimator that all of them start from, if one is.
    """

    items: tuple[Sequence[Any], ...]
    estimators: list[Any]
    template: _Template | _Parameters | None
    rows: _Rows | None
    columns: list[int] | None


@dataclass(frozen=True, eq=False)
class _Parameters:
    """An estimator that many fits start from, where it is nothing but plain parameters.

    Its constructor takes 0.3 µs for a ridge regression; scikit-learn's `clone`, which asks for the
    signature of the class several times, takes 50. Reading a pickle takes 3, but a fit of what
    comes out of it then takes 16 longer, by what Python makes of its attributes.
    """

    kind: type
    values: dict[str, Any]

    @classmethod
    def of(cls, estimator: Any) -> _Parameters | None:
        """Those of an estimator that was cloned just now; None if there is more to it."""
        if not hasattr(estimator, "get_params") or _clones_itself(estimator):
            return None
        found = cls(type(estimator), estimator.get_params(deep=False))
        if not all(value is None or type(value) in _PLAIN for value in found.values.values()):
            return None
        same = _has_only(estimator, found.values)
        return found if same and _has_only(found.fresh(), found.values) else None

    def fresh(self) -> Any:
        return self.kind(**self.values)


def _clones_itself(estimator: Any) -> bool:
    """Whether its class says how it is cloned, other than scikit-learn's estimators do."""
    base = sys.modules.get("sklearn.base")
    common = None if base is None else getattr(base.BaseEstimator, "__sklearn_clone__", None)
    return getattr(type(estimator), "__sklearn_clone__", common) is not common


def _has_only(estimator: Any, expected: dict[str, Any]) -> bool:
    found = getattr(estimator, "__dict__", {})  # there is none where there are slots
    return found.keys() == expected.keys() and all(found[name] is expected[name] for name in found)


@dataclass(frozen=True, eq=False)
class _Template:
    """Another estimator that many fits start from, itself cloned already.

    Worker processes get it pickled, which is read faster than it is cloned.
    """

    estimator: Any

    def fresh(self) -> Any:
        return _clone(self.estimator)

    def __reduce__(self) -> tuple[Any, ...]:
        from taskcarrier.workers.pickling import pickle_items  # noqa: PLC0415  # loads joblib

        return _PackedTemplate, (pickle_items(self.estimator),)


@dataclass(frozen=True, eq=False)
class _PackedTemplate:
    """The same in a worker process."""

    packed: bytes

    def fresh(self) -> Any:
        return pickle.loads(self.packed)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of every fit; they travel to processes as one array, which is there once for all."""

    each: Sequence[np.ndarray]
    n_samples: int

    @classmethod
    def from_arguments(cls, rows: Any, n_samples: int) -> _Rows:
        each = [_to_indices(one, n_samples) for one in rows]
        small: dict[np.dtype[Any], list[np.ndarray]] = {}
        for one in each:
            if one.size > _SMALL_ROWS:
                _check_bounds(one, n_samples)
            elif one.dtype != bool:
                small.setdefault(one.dtype, []).append(one)
        # Asking one by one takes four times as long as asking what is put together.
        for of_type in small.values():
            for begin in range(0, len(of_type), _AT_ONCE):
                _check_bounds(np.concatenate(of_type[begin : begin + _AT_ONCE]), n_samples)
        return cls(each, n_samples)

    def of(self, number: int) -> np.ndarray:
        return self.each[number]

    def __reduce__(self) -> tuple[Any, ...]:
        each = self.each
        dtype: type = bool
        if not all(rows.dtype == bool for rows in each):
            # A mask and indices are no one array. Indices are below the number of samples.
            each = [np.flatnonzero(rows) if rows.dtype == bool else rows for rows in each]
            dtype = np.int32 if self.n_samples <= np.iinfo(np.int32).max else np.intp
        flat: np.ndarray = np.concatenate(each, dtype=dtype, casting="unsafe")
        return _FlatRows, (flat, [0, *np.cumsum([len(rows) for rows in each]).tolist()])


@dataclass(frozen=True, eq=False)
class _FlatRows:
    """The same in a worker process: one array, and where those of each fit begin and end."""

    flat: np.ndarray
    bounds: list[int]

    def of(self, number: int) -> np.ndarray:
        rows = self.flat[self.bounds[number] : self.bounds[number + 1]]
        return rows if rows.dtype == bool else rows.astype(np.intp, copy=False)


@dataclass(frozen=True, eq=False)
class _Weights:
    """Weights of samples: none, the same for all fits, or a row for each."""

    values: np.ndarray | None
    n_fits: int | None

    @classmethod
    def from_arguments(cls, sample_weight: Any, n_samples: int) -> _Weights:
        if sample_weight is None or callable(sample_weight):
            return cls(None, None)
        refuse_masked(sample_weight, "sample_weight", "pass its .filled(value)")
        values = np.asarray(sample_weight)
        if values.ndim not in {1, 2} or values.shape[-1] != n_samples:
            raise ValueError(
                f"sample_weight must have shape ({n_samples},) or (n_fits, {n_samples}), got "
                f"{values.shape}"
            )
        return cls(values, len(values) if values.ndim == 2 else None)  # noqa: PLR2004  # a row each


def _fits(
    estimators: list[Any],
    rows: _Rows | None,
    columns: list[int] | None,
    n_weights: int | None,
) -> _Fits:
    """One for each fit; what is there once goes to all."""
    lengths = {
        "estimators": len(estimators) if len(estimators) != 1 else None,
        "rows": None if rows is None else len(rows.each),
        "columns": None if columns is None else len(columns),
        "sample_weight": n_weights,
    }
    given = {name: length for name, length in lengths.items() if length is not None}
    if len(set(given.values())) > 1:
        words = ", ".join(f"{name} has {length}" for name, length in given.items())
        raise ValueError(f"one entry is wanted for each fit, but {words}")
    n_fits = next(iter(given.values()), len(estimators))
    common = n_fits > 1 and all(one is estimators[0] for one in estimators)
    items: tuple[Sequence[Any], ...] = (range(n_fits),)
    template = None
    if common:
        cloned = _clone(estimators[0])
        template = _Parameters.of(cloned) or _Template(cloned)
    else:
        items = (*items, estimators if len(estimators) > 1 else estimators * n_fits)
    return _Fits(items, estimators, template, rows, columns)


def _fit(
    number: int,
    estimator: Any = None,
    *,
    X: Any,
    y: Any = None,
    weights: np.ndarray | None = None,
    rows: _Rows | _FlatRows | None,
    rng: np.random.Generator | None = None,
    template: _Parameters | _Template | _PackedTemplate | None,
    columns: list[int] | None,
    draw_rows: Callable[[Any], Any] | None,
    draw_weights: Callable[[Any], Any] | None,
    by_fit: bool,
    parent_state: _Surroundings,
) -> Any:
    """In a worker: one fit."""
    with parent_state.apply():
        estimator = _clone(estimator) if template is None else template.fresh()
        if rng is not None:
            _set_random_states(estimator, rng)
        drawn = None if rows is None else rows.of(number)
        if draw_rows is not None:
            drawn = _to_rows(draw_rows(rng), X.shape[0])
        if draw_weights is not None:
            weights = draw_weights(rng)
            refuse_masked(weights, "what sample_weight returned", "return its .filled(value)")
            weights = np.asarray(weights)
        elif by_fit and weights is not None:
            weights = weights[number]
        if y is not None and columns is not None:
            y = y[:, columns[number]]
        if drawn is not None:
            X, y, weights = (None if of is None else _at(of, drawn) for of in (X, y, weights))
        options = {} if weights is None else {"sample_weight": weights}
        estimator.fit(*([X] if y is None else [X, y]), **options)
        return estimator


def _at(data: Any, rows: np.ndarray) -> Any:
    """``data[rows]``."""
    # Three times as fast for 500 rows of 160 bytes. What does not lie in C order would come out
    # in another one.
    if type(data) is np.ndarray and data.flags.c_contiguous and rows.dtype == np.intp:
        return data.take(rows, axis=0)
    return data[rows]


def _ask(estimator: Any, method: str, chunk: np.ndarray, *, parent_state: _Surroundings) -> Any:
    """In a worker: what the estimator says of some rows."""
    with parent_state.apply():
        return getattr(estimator, method)(chunk)


def _clone(estimator: Any) -> Any:
    base = sys.modules.get("sklearn.base")
    if base is not None:
        return base.clone(estimator, safe=False)
    if not hasattr(estimator, "get_params") or isinstance(estimator, type):
        return copy.deepcopy(estimator)
    parameters = estimator.get_params(deep=False)
    return type(estimator)(**{name: _clone(value) for name, value in parameters.items()})


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


@dataclass(eq=False)
class _Surroundings:
    """What estimators see of the caller in every worker: warning filters, scikit-learn's own."""

    filters: list[Any]
    config: dict[str, Any] | None
    _filters_are_set: bool = False

    @classmethod
    def here(cls) -> _Surroundings:
        sklearn: Any = sys.modules.get("sklearn")
        return cls(list(warnings.filters), None if sklearn is None else sklearn.get_config())

    def apply(self) -> AbstractContextManager[Any]:
        """For what is run within; filters stay until the end of a worker process's run."""
        # Filters are the whole process's, and threads share it. A process undoes at the end of a
        # run what was done to them in it, and gets what it is to run again for each.
        if not self._filters_are_set and is_worker_process():
            warnings.resetwarnings()  # forgets which were shown, too
            warnings.filters[:] = self.filters  # type: ignore[index]  # a list, in fact
            self._filters_are_set = True
        sklearn: Any = sys.modules.get("sklearn")
        # Setting what is set already takes ten times as long as seeing that it is.
        if sklearn is not None and self.config not in (None, sklearn.get_config()):
            context: AbstractContextManager[Any] = sklearn.config_context(**self.config)
            return context
        return _NO_CONTEXT


def _find_method(estimators: list[Any]) -> str:
    """Why these do not need processes; nothing if that is not known."""
    modules = {type(one).__module__ for one in estimators}
    if modules and all(module.startswith(_WITHOUT_GIL) for module in modules):
        return "trees release the GIL"
    return ""


def _to_list(estimators: Any) -> list[Any]:
    is_tuple = isinstance(estimators, (list, tuple))
    found = list(estimators) if is_tuple else [estimators]
    for one in found:
        if isinstance(one, type):
            raise TypeError(f"{one.__name__} is a class: pass an estimator, {one.__name__}()")
        if not callable(getattr(one, "fit", None)):
            raise TypeError(f"estimators must have a method fit, got {one!r}")
    if not found:
        raise ValueError("there is no estimator to fit")
    return found


def _to_data(value: Any, name: str, n_samples: int | None = None) -> Any:
    """Data that rows can be taken from, by name."""
    # Of sparse matrices, rows can be taken from this sort alone.
    is_sparse = hasattr(value, "tocsr")
    data = value.tocsr() if is_sparse else check_inputs((value,), 0).arrays[0]
    if n_samples is not None and data.shape[0] != n_samples:
        raise ValueError(f"X has {n_samples} samples, but {name} has {data.shape[0]}")
    return data


def _to_rows(rows: Any, n_samples: int) -> np.ndarray:
    found = _to_indices(rows, n_samples)
    _check_bounds(found, n_samples)
    return found


def _to_indices(rows: Any, n_samples: int) -> np.ndarray:
    """Indices or a mask; whether there are such samples is another question."""
    refuse_masked(rows, "rows", "pass its .filled(value), or a boolean mask of the samples")
    try:
        found = np.asarray(rows)
    except ValueError as error:
        add_note(
            error,
            "each entry of rows= must be one array of indices or one mask; of a splitter's pairs, "
            "pass the first: rows=[train for train, test in folds]",
        )
        raise
    if found.dtype == bool and found.shape != (n_samples,):
        raise ValueError(f"a mask of rows must have shape ({n_samples},), got {found.shape}")
    if found.size == 0:
        found = found.astype(np.intp)
    if found.ndim != 1 or found.dtype.kind not in "biu":
        raise TypeError(
            "rows must be given as an array of indices or a boolean mask for each fit, got "
            f"{rows!r} for one"
        )
    return found


def _check_bounds(rows: np.ndarray, n_samples: int) -> None:
    if rows.dtype != bool and rows.size:
        lowest, highest = int(rows.min()), int(rows.max())
        if lowest < -n_samples or highest >= n_samples:
            raise IndexError(
                f"rows {lowest} to {highest} are asked for, but there are {n_samples} samples"
            )


def _to_column(column: Any, y: Any) -> int:
    if y is None or y.ndim != 2:  # noqa: PLR2004  # a column has no other shape
        raise ValueError("columns= needs y with one column for each target")
    index = check_integer(column, "columns", "column numbers of y")
    if not -y.shape[1] <= index < y.shape[1]:
        raise IndexError(f"column {index} of y is asked for, which has {y.shape[1]}")
    return index
