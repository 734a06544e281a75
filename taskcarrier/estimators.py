"""Fits and predictions in the style of scikit-learn: many estimators on parts of the same data.

Estimators are duck-typed: scikit-learn is not imported here. What a worker does for one fit stands
in `taskcarrier.fits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from taskcarrier.arguments import check_integer
from taskcarrier.arrays.inputs.check import check_inputs, refuse_masked
from taskcarrier.arrays.mapping import map_array
from taskcarrier.fits import CallerContext, Rows, Template, clone, fit_one
from taskcarrier.lists.map import map_lists
from taskcarrier.options import fill_docstring
from taskcarrier.run import Settings
from taskcarrier.scheduling.retries import RETRIES

# Modules of estimators that spend their time in compiled code that releases the GIL.
_WITHOUT_GIL = ("sklearn.tree", "sklearn.ensemble._forest")
# Predictions are cut into about this many ranges of at least `_MIN_ROWS` rows: one call of a forest
# costs as much by itself as some thousand rows.
_N_RANGES = 16
_MIN_ROWS = 1000


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
    rows : sequence, callable, optional
        The rows of each fit: an array of indices or a boolean mask for each fit, or a callable
        that takes the fit's random stream and returns one of these (drawn in the worker, for
        example ``lambda rng: rng.integers(n, size=n)`` for a bootstrap). Default: all rows.
    columns : sequence of int, optional
        The column of `y` that is the target, for each fit.
    sample_weight : array_like of shape (n_samples,) or (n_fits, n_samples), or callable, optional
        Weights of samples, the same for all fits or one row for each, or a callable as for `rows`.
        Where `rows` are given, the weights of these rows are passed.
    rng : int, SeedSequence or Generator, optional
        Gives each fit a random stream of its own, which depends on the number of the fit alone.
        The stream is used for, in this order, every ``random_state`` parameter of the estimator (by
        name in sorted order, nested ones too, as scikit-learn sets them), what `rows` draws, and
        what `sample_weight` draws. Default: none; ``random_state`` stays as it is.
    balance : {"static", "dynamic"}, default "dynamic"
        How work is shared out: evenly beforehand, or the next part to each free worker.
    {n_jobs}
    backend : {"sequential", "threading", "loky", "threads", "processes"} or str, optional
        Where workers run; also any other backend that is registered with joblib, such as
        ``"dask"``, which cannot keep a `timeout`. Default: what an active `joblib.parallel_config`
        says, else threads for scikit-learn's trees and forests, which release the GIL, else
        processes.
    timeout : float, optional
        Seconds that the fits of one range may take. Default: no limit.
    retries : int, default 2
        How often fits are run again after their worker process has died.
    retry_on : exception type or tuple of types, optional
        Exceptions after which a fit is tried again, up to `retries` times. Default: none.
    {collect_on_error}

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
    settings = Settings.from_arguments(
        balance, n_jobs, backend, timeout=timeout, retries=retries, retry_on=retry_on
    )
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
        None if columns is None else [_to_column(column, data.get("y")) for column in columns],
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
        become their values (the estimator does not see column names).
    method : str, default "predict"
        The method to call: ``"predict"``, ``"predict_proba"``, ``"transform"``,
        ``"decision_function"`` or any other that takes rows and returns an array with as many
        rows.
    balance : {"static", "dynamic"}, default "dynamic"
        How work is shared out: evenly beforehand, or the next part to each free worker.
    {n_jobs}
    backend : {"sequential", "threading", "loky", "threads", "processes"}, optional
        Where workers run. Default: what an active `joblib.parallel_config` says, else threads for
        scikit-learn's trees and forests, which release the GIL, else processes.
    chunksize : int, optional
        Rows in each call. Default: a 16th of all, but at least a thousand.
    {out}
    dtype : dtype, optional
        The dtype that results are cast to, where that loses nothing.
    timeout : float, optional
        Seconds that one call may take. Default: no limit.
    retries : int, default 2
        How often rows are tried again after their worker process has died.

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
    if not callable(getattr(estimator, method, None)):
        raise TypeError(f"{type(estimator).__name__} has no method {method!r}")
    inputs = check_inputs((X,), 0)
    if chunksize is None:
        chunksize = max(_MIN_ROWS, -(-inputs.n_items // _N_RANGES))
    settings = Settings.from_arguments(
        balance, n_jobs, backend, timeout=timeout, retries=retries, retry_on=()
    )
    mapper_settings: Any = replace(settings, gil_reason=_explain_threads([estimator]))
    return map_array(
        partial(_call_method, estimator, method, caller_context=CallerContext.capture()),
        inputs.arrays[0],
        balance=mapper_settings,
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

    ``items`` are the numbers of the fits and, unless all start from one estimator, the estimators;
    ``template`` is the one estimator that all fits start from, if there is one.
    """

    items: tuple[Sequence[Any], ...]
    estimators: list[Any]
    template: Template | None
    rows: Rows | None
    columns: list[int] | None


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
    # CSR is the only kind of sparse matrix from which rows can be taken.
    is_sparse = hasattr(value, "tocsr")
    data = value.tocsr() if is_sparse else check_inputs((value,), 0).arrays[0]
    if n_samples is not None and data.shape[0] != n_samples:
        raise ValueError(f"X has {n_samples} samples, but {name} has {data.shape[0]}")
    return data


def _to_column(column: Any, y: Any) -> int:
    if y is None or y.ndim != 2:  # noqa: PLR2004  # a column has no other shape
        raise ValueError("columns= needs y with one column for each target")
    index = check_integer(column, "columns", "column numbers of y")
    if not -y.shape[1] <= index < y.shape[1]:
        raise IndexError(f"column {index} of y is asked for, which has {y.shape[1]}")
    return index
