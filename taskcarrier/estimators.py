"""Fits and predictions in the style of scikit-learn: many estimators on parts of the same data.

Estimators are duck-typed: scikit-learn is not imported here. Where the program has imported it, it
clones the estimators, and its configuration is passed on to the workers.
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
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, overload

import numpy as np

from taskcarrier.arguments import check_integer
from taskcarrier.arrays.inputs.check import check_inputs, refuse_masked
from taskcarrier.arrays.mapping import MAP_ARRAY, prepare_chunks
from taskcarrier.lists.map import map_lists
from taskcarrier.notes import add_note
from taskcarrier.options import CollectOption, FitOptions, PredictOptions
from taskcarrier.run import Settings
from taskcarrier.verbs import Verb
from taskcarrier.workers.loop import is_worker_process

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from taskcarrier.errors import FailedRange

E = TypeVar("E")

# Modules of estimators that spend their time in compiled code that releases the GIL.
_WITHOUT_GIL = ("sklearn.tree", "sklearn.ensemble._forest")
# Predictions are cut into about this many ranges of at least `_MIN_ROWS` rows: one call of a forest
# costs as much by itself as some thousand rows.
_N_RANGES = 16
_MIN_ROWS = 1000
# The bounds of indices are checked for this many fits together, except for fits with more rows than
# `_SMALL_ROWS`; both numbers are arbitrary.
_FITS_PER_CHECK = 64
_SMALL_ROWS = 4096
# Types of parameters that need no copy.
_PLAIN_TYPES = (bool, int, float, complex, str, bytes)
_NO_CONTEXT = nullcontext()

_FIT_MANY = Verb.from_groups("fit_many", FitOptions, CollectOption, balance="dynamic")
_PREDICT_ARRAY = Verb.from_groups("predict_array", PredictOptions, balance="dynamic")


@overload
def fit_many(
    estimators: list[E] | tuple[E, ...],
    X: Any,
    y: Any = None,
    *,
    on_error: Literal["raise"] = ...,
    **options: Unpack[FitOptions],
) -> list[E]: ...
@overload
def fit_many(
    estimators: E,
    X: Any,
    y: Any = None,
    *,
    on_error: Literal["raise"] = ...,
    **options: Unpack[FitOptions],
) -> list[E]: ...
@overload
def fit_many(
    estimators: list[E] | tuple[E, ...],
    X: Any,
    y: Any = None,
    *,
    on_error: Literal["collect"],
    **options: Unpack[FitOptions],
) -> tuple[list[E | None], list[FailedRange]]: ...
@overload
def fit_many(
    estimators: E,
    X: Any,
    y: Any = None,
    *,
    on_error: Literal["collect"],
    **options: Unpack[FitOptions],
) -> tuple[list[E | None], list[FailedRange]]: ...
@_FIT_MANY.document
def fit_many(estimators: Any, X: Any, y: Any = None, **options: Any) -> Any:
    """Fit many estimators, each on its rows of the same data, on every core.

    Equals ``[clone(e).fit(X[rows_of_e], y[rows_of_e]) for e in estimators]``. All workers share one
    copy of the data. There are as many fits as `estimators`, `rows` and `columns` have entries;
    what is given once is used for all of them.

    An estimator must have ``fit(X)`` or ``fit(X, y)``, with ``sample_weight=`` where that is given.
    It must be possible to clone it (scikit-learn's way, by ``get_params``, or else by a deep copy)
    and, for processes, to pickle it. The estimators that are passed stay as they are.

    Parameters
    ----------
    estimators : estimator or sequence of estimators
        One for all fits, or one for each.
    X : array_like of shape (n_samples, ...)
        The data. Arrays from `share` or `load` are not copied. pandas objects become their values
        (estimators do not see column names); sparse matrices stay sparse.
    y : array_like of shape (n_samples,) or (n_samples, n_targets), optional
        The targets.
    **options
        See `taskcarrier.options`.

    Returns
    -------
    list of fitted estimators
        The estimators in the order of the fits. With ``on_error="collect"`` a tuple of this list,
        with None where a fit failed, and a list of `FailedRange`.

    Raises
    ------
    TypeError, ValueError
        The arguments are wrong; nothing was started.
    WorkerDiedError
        A fit killed every worker process that ran it.
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
    >>> [float(fit.mean_) for fit in fit_many(Mean(), np.arange(4.0), rows=halves, n_jobs=1)]
    [0.5, 2.5]
    """
    filled = _FIT_MANY.fill(options)
    settings = Settings.from_options(filled)
    rows, sample_weight, rng = filled["rows"], filled["sample_weight"], filled["rng"]
    columns = filled["columns"]
    data = {"X": _to_data(X, "X")}
    n_samples = data["X"].shape[0]
    if y is not None:
        data["y"] = _to_data(y, "y", n_samples)
    for name, option in (("rows", rows), ("sample_weight", sample_weight)):
        if callable(option) and rng is None:
            raise ValueError(f"{name} is to draw from a random stream: pass rng=")
    weights = _Weights.from_arguments(sample_weight, n_samples)
    if weights.values is not None:
        data["weights"] = weights.values
    fits = _plan_fits(
        _to_list(estimators),
        None if rows is None or callable(rows) else _Rows.from_arguments(rows, n_samples),
        None if columns is None else [_to_column(column, data.get("y")) for column in columns],
        weights.n_fits,
    )
    fit = partial(
        _fit,
        template=fits.template,
        columns=fits.columns,
        draw_rows=rows if callable(rows) else None,
        draw_weights=sample_weight if callable(sample_weight) else None,
        by_fit=weights.n_fits is not None,
        caller_context=_CallerContext.capture(),
    )
    return map_lists(
        replace(settings, gil_reason=_explain_threads(fits.estimators)),
        fit,
        fits.items,
        None,
        on_error=filled["on_error"],
        rng=rng,
        shared={**data, "rows": fits.rows},
    )


@_PREDICT_ARRAY.document
def predict_array(
    estimator: Any, X: Any, method: str = "predict", **options: Unpack[PredictOptions]
) -> NDArray[Any]:
    """Apply a fitted estimator to the rows of an array, in ranges, on every core.

    Equals ``estimator.predict(X)`` (or another method) for every estimator that treats rows
    independently.

    Parameters
    ----------
    estimator : fitted estimator
        The fitted estimator. For processes it must be picklable.
    X : array_like of shape (n_samples, ...)
        The rows. Paths that end in ``.npy`` and memmaps are mapped by the workers. pandas objects
        become their values (the estimator does not see column names).
    method : str, default "predict"
        The method to call: ``"predict"``, ``"predict_proba"``, ``"transform"``,
        ``"decision_function"`` or any other that takes rows and returns an array with as many
        rows.
    **options
        See `taskcarrier.options`.

    Returns
    -------
    ndarray
        `out` if it was given, else a new array.

    Raises
    ------
    TypeError, ValueError
        The arguments are wrong; nothing was started.
    WorkerDiedError, TimeoutError
        Rows killed every worker process that ran them, or took longer than `timeout`.
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
    filled = _PREDICT_ARRAY.fill(options)
    if not callable(getattr(estimator, method, None)):
        raise TypeError(f"{type(estimator).__name__} has no method {method!r}")
    inputs = check_inputs((X,), 0)
    if filled["chunksize"] is None:
        filled["chunksize"] = max(_MIN_ROWS, -(-inputs.n_items // _N_RANGES))
    settings = replace(Settings.from_options(filled), gil_reason=_explain_threads([estimator]))
    call_method = partial(_call_method, estimator, method, caller_context=_CallerContext.capture())
    filled = MAP_ARRAY.fill({**filled, "out_axis": 0})
    result: NDArray[Any] = prepare_chunks(settings, call_method, (inputs.arrays[0],), filled).run()
    return result


@dataclass(frozen=True, eq=False)
class _Fits:
    """All fits of a call.

    ``items`` are the numbers of the fits and, unless all start from one estimator, the estimators;
    ``template`` is the one estimator that all fits start from, if there is one.
    """

    items: tuple[Sequence[Any], ...]
    estimators: list[Any]
    template: _Template | _Parameters | None
    rows: _Rows | None
    columns: list[int] | None


@dataclass(frozen=True, eq=False)
class _Parameters:
    """The estimator that many fits start from, where it consists of plain parameters only.

    The constructor of a ridge regression takes 0.3 µs; scikit-learn's `clone`, which asks for the
    signature of the class several times, takes 50. Reading a pickle takes 3, but a fit of the
    estimator that was read takes 16 longer, because of how Python then stores its attributes.
    """

    kind: type
    values: dict[str, Any]

    @classmethod
    def from_clone(cls, estimator: Any) -> _Parameters | None:
        """Return the parameters of a fresh clone; None if it has other state than these."""
        if not hasattr(estimator, "get_params") or _clones_itself(estimator):
            return None
        plain = cls(type(estimator), estimator.get_params(deep=False))
        if not all(value is None or type(value) in _PLAIN_TYPES for value in plain.values.values()):
            return None
        is_plain = _has_only(estimator, plain.values)
        return plain if is_plain and _has_only(plain.make_estimator(), plain.values) else None

    def make_estimator(self) -> Any:
        return self.kind(**self.values)


def _clones_itself(estimator: Any) -> bool:
    """Return whether the estimator's class has a ``__sklearn_clone__`` of its own."""
    base = sys.modules.get("sklearn.base")
    default = None if base is None else getattr(base.BaseEstimator, "__sklearn_clone__", None)
    return getattr(type(estimator), "__sklearn_clone__", default) is not default


def _has_only(estimator: Any, expected: dict[str, Any]) -> bool:
    state = getattr(estimator, "__dict__", {})  # there is none where there are slots
    return state.keys() == expected.keys() and all(state[name] is expected[name] for name in state)


@dataclass(frozen=True, eq=False)
class _Template:
    """The estimator that many fits start from, where it has other state; a clone already.

    Worker processes get it pickled: reading it is faster than cloning it.
    """

    estimator: Any

    def make_estimator(self) -> Any:
        return _clone(self.estimator)

    def __reduce__(self) -> tuple[Any, ...]:
        from taskcarrier.workers.pickling import pickle_items  # noqa: PLC0415  # loads joblib

        return _PackedTemplate, (pickle_items(self.estimator),)


@dataclass(frozen=True, eq=False)
class _PackedTemplate:
    """A `_Template` in a worker process."""

    packed: bytes

    def make_estimator(self) -> Any:
        return pickle.loads(self.packed)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of every fit. They are sent to processes as one array, which all share."""

    each: Sequence[np.ndarray]
    n_samples: int

    @classmethod
    def from_arguments(cls, rows: Any, n_samples: int) -> _Rows:
        each = [_to_indices(entry, n_samples) for entry in rows]
        small: dict[np.dtype[Any], list[np.ndarray]] = {}
        for indices in each:
            if indices.size > _SMALL_ROWS:
                _check_bounds(indices, n_samples)
            elif indices.dtype != bool:
                small.setdefault(indices.dtype, []).append(indices)
        # Checking them one by one takes four times as long as checking them concatenated.
        for group in small.values():
            for begin in range(0, len(group), _FITS_PER_CHECK):
                _check_bounds(np.concatenate(group[begin : begin + _FITS_PER_CHECK]), n_samples)
        return cls(each, n_samples)

    def get_rows(self, number: int) -> np.ndarray:
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


@dataclass(frozen=True, eq=False)
class _FlatRows:
    """`_Rows` in a worker process: one array, and where the rows of each fit begin and end."""

    flat: np.ndarray
    bounds: list[int]

    def get_rows(self, number: int) -> np.ndarray:
        rows = self.flat[self.bounds[number] : self.bounds[number + 1]]
        return rows if rows.dtype == bool else rows.astype(np.intp, copy=False)


@dataclass(frozen=True, eq=False)
class _Weights:
    """The weights of samples: none, the same for all fits, or one row for each fit."""

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


def _plan_fits(
    estimators: list[Any],
    rows: _Rows | None,
    columns: list[int] | None,
    n_weights: int | None,
) -> _Fits:
    """Return all fits; raise a `ValueError` if the arguments have different numbers of entries."""
    lengths = {
        "estimators": len(estimators) if len(estimators) != 1 else None,
        "rows": None if rows is None else len(rows.each),
        "columns": None if columns is None else len(columns),
        "sample_weight": n_weights,
    }
    known_lengths = {name: length for name, length in lengths.items() if length is not None}
    if len(set(known_lengths.values())) > 1:
        counts = ", ".join(f"{name} has {length}" for name, length in known_lengths.items())
        raise ValueError(f"one entry is wanted for each fit, but {counts}")
    n_fits = next(iter(known_lengths.values()), len(estimators))
    is_common = n_fits > 1 and all(each is estimators[0] for each in estimators)
    items: tuple[Sequence[Any], ...] = (range(n_fits),)
    template = None
    if is_common:
        clone = _clone(estimators[0])
        template = _Parameters.from_clone(clone) or _Template(clone)
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
    caller_context: _CallerContext,
) -> Any:
    """Fit one estimator, in a worker."""
    with caller_context.apply():
        estimator = _clone(estimator) if template is None else template.make_estimator()
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


def _call_method(
    estimator: Any, method: str, chunk: np.ndarray, *, caller_context: _CallerContext
) -> Any:
    """Call a method of the estimator on some rows, in a worker."""
    with caller_context.apply():
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
class _CallerContext:
    """The caller's warning filters and scikit-learn configuration, which workers take over."""

    filters: list[Any]
    config: dict[str, Any] | None
    _filters_are_set: bool = False

    @classmethod
    def capture(cls) -> _CallerContext:
        sklearn: Any = sys.modules.get("sklearn")
        return cls(list(warnings.filters), None if sklearn is None else sklearn.get_config())

    def apply(self) -> AbstractContextManager[Any]:
        """Return a context with these; filters stay set until a worker process ends its run."""
        # Filters belong to the whole process, which threads share with the caller. A worker process
        # restores its filters at the end of a run, and gets a new copy of this object for the next.
        if not self._filters_are_set and is_worker_process():
            warnings.resetwarnings()  # also forgets which were shown
            warnings.filters[:] = self.filters  # type: ignore[index]  # in fact a list
            self._filters_are_set = True
        sklearn: Any = sys.modules.get("sklearn")
        # Setting the configuration takes ten times as long as seeing that it is set already.
        if sklearn is not None and self.config not in (None, sklearn.get_config()):
            context: AbstractContextManager[Any] = sklearn.config_context(**self.config)
            return context
        return _NO_CONTEXT


def _explain_threads(estimators: list[Any]) -> str:
    """Return why threads suit these estimators; an empty text if that is not known."""
    modules = {type(estimator).__module__ for estimator in estimators}
    if modules and all(module.startswith(_WITHOUT_GIL) for module in modules):
        return "trees release the GIL"
    return ""


def _to_list(estimators: Any) -> list[Any]:
    has_several = isinstance(estimators, (list, tuple))
    listed = list(estimators) if has_several else [estimators]
    for each in listed:
        if isinstance(each, type):
            raise TypeError(f"{each.__name__} is a class: pass an estimator, {each.__name__}()")
        if not callable(getattr(each, "fit", None)):
            raise TypeError(f"estimators must have a method fit, got {each!r}")
    if not listed:
        raise ValueError("there is no estimator to fit")
    return listed


def _to_data(value: Any, name: str, n_samples: int | None = None) -> Any:
    """Return data from which rows can be taken; `name` is for errors."""
    # CSR is the only kind of sparse matrix from which rows can be taken.
    is_sparse = hasattr(value, "tocsr")
    data = value.tocsr() if is_sparse else check_inputs((value,), 0).arrays[0]
    if n_samples is not None and data.shape[0] != n_samples:
        raise ValueError(f"X has {n_samples} samples, but {name} has {data.shape[0]}")
    return data


def _to_rows(rows: Any, n_samples: int) -> np.ndarray:
    indices = _to_indices(rows, n_samples)
    _check_bounds(indices, n_samples)
    return indices


def _to_indices(rows: Any, n_samples: int) -> np.ndarray:
    """Return indices or a mask as an array; do not check whether such samples exist."""
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
    return indices


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
