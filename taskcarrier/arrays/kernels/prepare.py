"""What is compiled before a call runs, for functions that numba has compiled.

Decides between a fused loop and calls of the kernel from outside, and whether a kernel must get
private copies. Numba itself is met in `taskcarrier.arrays.kernels.compiler` alone, which is imported only
here, and only for such functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic_ns
from typing import Any

import numpy as np

from taskcarrier.arrays.casting import cast_checked
from taskcarrier.arrays.inputs.check import Inputs, normalize_axis
from taskcarrier.arrays.inputs.halos import Halo
from taskcarrier.arrays.inputs.sources import local_sources
from taskcarrier.arrays.kernels.fused import FusedTask
from taskcarrier.arrays.outputs.buffers import open_place
from taskcarrier.arrays.outputs.request import DeferredResult
from taskcarrier.arrays.outputs.specs import Spec
from taskcarrier.arrays.outputs.writer import Plan
from taskcarrier.memory.strides import items_first
from taskcarrier.system.locks import ModuleLock
from taskcarrier.workers.call import Call
from taskcarrier.workers.introspect import has_own_threads, is_jitted, is_numba_ufunc
from taskcarrier.workers.records import Fault

_COPIES = "the kernel takes arrays or records that it may write to: it gets private copies"
_NO_LOOP = (
    "the kernel is called from Python and not fused into a loop, which gives scalars or fills rows "
    "(pass out_shape=), of dtypes that numba knows, and takes items as its signature says"
)


@dataclass(frozen=True, eq=False)
class Row:
    """Where a function of items writes its result: a row of the output, given after `args`.

    Attributes
    ----------
    shape : tuple of int
        Its shape.
    dtype : dtype
        Its dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def none(self, out_axis: int | tuple[int, ...]) -> np.ndarray:
        """The result of no items."""
        axis = out_axis[0] if isinstance(out_axis, tuple) else out_axis
        axis = normalize_axis(axis, len(self.shape) + 1, "out_axis")
        return np.empty((*self.shape[:axis], 0, *self.shape[axis:]), self.dtype)

    def make_returning(self, func: Any) -> Any:
        """A function that returns what `func` writes."""
        return _Filled(func, self)


@dataclass(frozen=True, eq=False)
class _Filled:
    func: Any
    row: Row

    def __call__(self, *given: Any, **options: Any) -> np.ndarray:
        # Compiled functions take this machine's byte order alone; the output is cast.
        row = np.empty(self.row.shape, self.row.dtype.newbyteorder("="))
        self.func(*given, row, **options)
        return row


@dataclass(frozen=True, eq=False)
class PreparedCall:
    """A function as it is called, with what it needs.

    Attributes
    ----------
    call : Call
        What to call.
    writable : bool
        Whether it gets private copies.
    copies_args : bool
        Whether every worker gets copies of arrays in its arguments, which it may write to.
    notes : list of str
        What the report should say.
    compiling_ns : int
        What it took to compile it.
    """

    call: Call
    writable: bool
    copies_args: bool
    notes: list[str]
    compiling_ns: int


def prepare_call(
    call: Call,
    inputs: Inputs,
    first: tuple[int, int],
    halo: Halo | None,
    *,
    by_item: bool,
    writable: bool,
    in_processes: bool,
) -> PreparedCall:
    """A function compiled for chunks (or items) like those of the first range."""
    func = call.func
    if not (is_jitted(func) or is_numba_ufunc(func)) or inputs.n_items == 0:
        return PreparedCall(call, writable, False, [], 0)
    begin = monotonic_ns()
    chunks = [source.open()(*first) for source in local_sources(inputs, halo)]
    if is_numba_ufunc(func):
        if not in_processes:
            _compile_ufunc(func, [*chunks, *call.args])
        return PreparedCall(call, writable, False, [], monotonic_ns() - begin)
    from taskcarrier.arrays.kernels import compiler  # noqa: PLC0415  # loads numba

    extras = compiler.bind_arguments(func, len(chunks), call.args, call.kwargs)
    if by_item:
        chunks = [
            items_first(chunk, axis)[0] for chunk, axis in zip(chunks, inputs.axes, strict=True)
        ]
    called, writable_args, returned = compiler.compile_kernel(
        func, chunks, extras, writable=writable
    )
    if in_processes:
        called = func
    elif has_own_threads(func, extras.all):
        called = _Alone(called)
    # Objects may be of other types than the first, and are compiled for again.
    if by_item and returned is not None and not any(d.hasobject for d in inputs.dtypes):
        called = _Typed(called, *returned)
    notes = [_COPIES] if writable_args.items and not writable else []
    if by_item and not in_processes:
        notes.append(_NO_LOOP)
    ours = Call(called, extras.all)
    return PreparedCall(
        ours, writable_args.items, writable_args.args, notes, monotonic_ns() - begin
    )


_compiling = ModuleLock()


def _compile_ufunc(func: Any, given: list[Any]) -> None:
    """Have numba compile a ufunc, which it does when it is called, for arguments like these.

    Not safely by several threads at once, hence here. Of no elements it computes nothing.
    Generalized ones that are compiled when called take their output as an argument, which they
    do not get here.
    """
    if func.signature is None:
        with _compiling:
            func(*(np.empty(0, np.asarray(value).dtype) for value in given[: func.nin]))


@dataclass(frozen=True, eq=False)
class _Typed:
    """A kernel that is called from Python, with results of the dtypes it was compiled for."""

    func: Any
    dtypes: tuple[np.dtype[Any], ...]
    is_tuple: bool

    def __call__(self, *given: Any) -> Any:
        value = self.func(*given)
        if not self.is_tuple:
            return np.asarray(value, self.dtypes[0])[()]
        return tuple(
            np.asarray(one, dtype)[()] for one, dtype in zip(value, self.dtypes, strict=True)
        )


# Under some of numba's threading layers two calls at once of what brings its own threads abort.
_own_threads = ModuleLock()


@dataclass(frozen=True, eq=False)
class _Alone:
    """A function that brings threads of its own, called from one thread at a time."""

    func: Any

    def __call__(self, *given: Any) -> Any:
        with _own_threads:
            return self.func(*given)


@dataclass(frozen=True, eq=False)
class FusedLoop:
    """A call whose items are run by a compiled loop.

    Attributes
    ----------
    task : FusedTask
        The loop and what it needs.
    spec : Spec
        What the results are like.
    notes : list of str
        What the report should say.
    runs_all : bool
        Whether threads may leave claiming to the loop: not if rows must be copied before.
    casts : bool
        Whether results are cast in the end, and do not stand in place before.
    """

    task: FusedTask
    spec: Spec
    notes: list[str]
    runs_all: bool
    casts: bool
    _results: list[np.ndarray]

    def deferred(self, faults: list[Fault]) -> list[DeferredResult]:
        """Results that are not where they belong yet, because they must be cast."""
        if not self.casts:
            return []
        for start, stop, _ in faults:  # what was never written may not survive a cast
            for out in self.task.outs:
                out[start:stop] = np.zeros((), out.dtype)
        cast = [
            cast_checked(result, dtype)
            for result, (dtype, _) in zip(self._results, self.spec.parts, strict=True)
        ]
        return [(slice(0, self.task.n_items), cast)]


def fuse_loop(
    call: Call,
    inputs: Inputs,
    plan: Plan,
    row: Row | None,
    *,
    writable: bool,
    collect_errors: bool,
    in_threads: bool,
) -> FusedLoop | None:
    """A fused loop for a kernel of items, or None if it cannot be had."""
    if not all(type(a) is np.ndarray for a in inputs.arrays):
        return None
    from taskcarrier.arrays.kernels import compiler  # noqa: PLC0415  # loads numba

    extras = compiler.bind_arguments(
        call.func, len(inputs.arrays), call.args, call.kwargs, fills=row is not None
    )
    layouts = [
        compiler.ArrayLayout.of(*pair) for pair in zip(inputs.arrays, inputs.axes, strict=True)
    ]
    out = None
    if row is not None:
        place = np.empty((1, *row.shape), row.dtype.newbyteorder("="))
        out = compiler.ArrayLayout.of(place, 0)
    found = compiler.infer_result(call.func, layouts, extras, out, writable=writable)
    if found is None:
        return None
    shape = () if row is None else row.shape
    wanted = plan.axes_for(len(found.dtypes))
    axes = tuple(normalize_axis(axis, len(shape) + 1, "out_axis") for axis in wanted)
    native = Spec(tuple((dtype, shape) for dtype in found.dtypes), axes, found.is_tuple)
    outputs = plan.outputs_for(len(found.dtypes))
    dtypes = tuple(o.dtype or d for o, d in zip(outputs, found.dtypes, strict=True))
    casts = dtypes != found.dtypes
    spec = native.with_dtypes(dtypes) if casts else native
    plan.check(spec, promote_dtypes=False)  # the dtypes are known
    if casts:
        shapes = native.shapes(inputs.n_items)
        results = [np.empty(*pair) for pair in zip(shapes, found.dtypes, strict=True)]
    else:
        places = plan.allocation.places(spec, outputs)
        assert places is not None  # for the type checker: kernels return no objects
        results = [open_place(place) for place in places]
    outs = [items_first(*pair) for pair in zip(results, axes, strict=True)]
    out_lies = [compiler.ArrayLayout.of(one, 0) for one in outs]
    loop = compiler.compile_loop(
        call.func, layouts, extras, out_lies, found, rows_out=row is not None
    )
    # Threads are chosen for none that has its own (`taskcarrier.workers.choose`).
    if not in_threads and has_own_threads(call.func, extras.all):
        loop = _Alone(loop)
    task = FusedTask(
        loop,
        inputs.arrays,
        inputs.axes,
        outs,
        extras.all,
        inputs.n_items,
        found.writable_args.items,
        found.writable_args.args,
        collect_errors,
    )
    notes = [_COPIES] if found.writable_args.items and not writable else []
    runs_all = not found.writable_args.items or not any(layout.ndim for layout in layouts)
    return FusedLoop(task, spec, notes, runs_all, casts, results)


def check_row(out_shape: object, dtype: Any, out: Any) -> Row | None:
    """`out_shape` as the user may pass it, with the dtype that results are to have."""
    if out_shape is None:
        return None
    lengths = out_shape if isinstance(out_shape, (tuple, list)) else (out_shape,)
    shape = tuple(_length(one, out_shape) for one in lengths)
    if isinstance(dtype, tuple) or isinstance(out, tuple):
        raise TypeError("with out_shape= there is one result; dtype= and out= must not be tuples")
    if dtype is None:
        dtype = out.dtype if isinstance(out, np.ndarray) else np.float64
    return Row(shape, np.dtype(dtype))


def _length(value: Any, out_shape: object) -> int:
    if not hasattr(value, "__index__") or (length := value.__index__()) < 0:
        raise TypeError(f"out_shape must be a tuple of lengths, got {out_shape!r}")
    return int(length)
