"""Fits and predictions in the style of scikit-learn: many estimators on parts of the same data.

Estimators are duck-typed: scikit-learn is not imported here. What a worker does for one fit stands
in `taskcarrier.estimators.fits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, overload

import numpy as np

from taskcarrier.arguments import check_integer, check_iterable
from taskcarrier.arrays.inputs.check import check_inputs, refuse_masked
from taskcarrier.arrays.mapping import MAP_ARRAY, prepare_chunks
from taskcarrier.estimators.fits import CallerContext, Rows, Template, clone, fit_one
from taskcarrier.lists.map import map_lists
from taskcarrier.options import CollectOption, FitOptions, PredictOptions
from taskcarrier.record import record
from taskcarrier.run import Settings
from taskcarrier.scheduling.history import Known
from taskcarrier.verbs import Verb

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

# The types of parameters by which an estimator is known again in the next call.
_PLAIN = {bool, int, float, str, type(None)}

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
        None if rows is None or callable(rows) else Rows.from_arguments(rows, n_samples),
        None if columns is None else _to_columns(columns, data.get("y")),
        weights.n_fits,
    )
    fit = partial(
        fit_one,
        template=fits.template,
        columns=fits.columns,
        draw_rows=rows if callable(rows) else None,
        draw_weights=sample_weight if callable(sample_weight) else None,
        by_fit=weights.n_fits is not None,
        caller_context=CallerContext.capture(),
    )
    return map_lists(
        replace(settings, gil_reason=_explain_threads(fits.estimators)),
        fit,
        fits.items,
        None,
        on_error=filled["on_error"],
        rng=rng,
        shared={**data, "rows": fits.rows},
        noun="fit",
        are_long=True,
        known=fits.describe(data["X"].shape),
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
    if not isinstance(method, str):
        raise TypeError(f"method must be the name of a method, such as 'predict', got {method!r}")
    if not callable(getattr(estimator, method, None)):
        raise TypeError(f"{type(estimator).__name__} has no method {method!r}")
    inputs = check_inputs((X,), 0, ["X"])
    if filled["chunksize"] is None:
        filled["chunksize"] = max(_MIN_ROWS, -(-inputs.n_items // _N_RANGES))
    settings = replace(Settings.from_options(filled), gil_reason=_explain_threads([estimator]))
    call_method = partial(_call_method, estimator, method, caller_context=CallerContext.capture())
    filled = MAP_ARRAY.fill({**filled, "out_axis": 0})
    result: NDArray[Any] = prepare_chunks(settings, call_method, (inputs.arrays[0],), filled).run()
    return result


@record
class _Fits:
    """All fits of a call.

    ``items`` are the numbers of the fits and, unless all start from one estimator, the estimators;
    ``template`` is the one estimator that all fits start from, if there is one.
    """

    items: tuple[Sequence[Any], ...]
    estimators: list[Any]
    template: Template | None
    rows: Rows | None
    columns: list[int] | None

    def describe(self, shape: tuple[int, ...]) -> Known:
        """Return what decides on how long the fits take: the first estimator and its data."""
        first = self.estimators[0] if self.estimators else None
        parameters = {
            name: value
            for name, value in getattr(first, "__dict__", {}).items()
            if type(value) in _PLAIN
        }
        n_rows = 0 if self.rows is None else sum(map(len, self.rows.each))
        return Known((type(first), *sorted(parameters.items()), shape, n_rows.bit_length()))


@record
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
    rows: Rows | None,
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
        template = Template(clone(estimators[0]))
    else:
        items = (*items, estimators if len(estimators) > 1 else estimators * n_fits)
    return _Fits(items, estimators, template, rows, columns)


def _call_method(
    estimator: Any, method: str, chunk: np.ndarray, *, caller_context: CallerContext
) -> Any:
    """Call a method of the estimator on some rows, in a worker."""
    with caller_context.apply():
        return getattr(estimator, method)(chunk)


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
    refuse_masked(value, name, "pass its .filled(value)")
    # CSR is the only kind of sparse matrix from which rows can be taken.
    is_sparse = hasattr(value, "tocsr")
    data = value.tocsr() if is_sparse else check_inputs((value,), 0, [name]).arrays[0]
    if n_samples is not None and data.shape[0] != n_samples:
        raise ValueError(f"X has {n_samples} samples, but {name} has {data.shape[0]}")
    return data


def _to_columns(columns: Any, y: Any) -> list[int]:
    if y is None or y.ndim != 2:  # noqa: PLR2004  # a column has no other shape
        raise ValueError("columns= needs y with one column for each target")
    entries = check_iterable(columns, "columns", "column numbers of y, one for each fit")
    return [_to_column(column, y.shape[1]) for column in entries]


def _to_column(column: Any, n_columns: int) -> int:
    index = check_integer(column, "columns", "column numbers of y")
    if not -n_columns <= index < n_columns:
        raise IndexError(f"column {index} of y is asked for, which has {n_columns}")
    return index
