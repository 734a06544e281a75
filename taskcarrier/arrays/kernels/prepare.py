"""Preparing calls of functions that numba has compiled: what is compiled before a call runs.

This module decides between a fused loop and calls of the kernel from Python, and whether a kernel
must get private copies. The modules that use numba itself are imported only here, and only for such
functions.
"""

from __future__ import annotations

from dataclasses import field
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from taskcarrier.arrays.casting import cast_checked
from taskcarrier.arrays.inputs.check import Inputs, normalize_axis
from taskcarrier.arrays.inputs.halos import Halo
from taskcarrier.arrays.inputs.sources import local_sources
from taskcarrier.arrays.outputs.buffers import LocalBuffer, open_place
from taskcarrier.arrays.outputs.specs import DeferredResult, Spec
from taskcarrier.memory.strides import move_items_first
from taskcarrier.record import record
from taskcarrier.system.locks import ModuleLock
from taskcarrier.workers.call import Call
from taskcarrier.workers.introspect import has_own_threads, is_jitted, is_numba_ufunc
from taskcarrier.workers.records import DeliveredFailure

if TYPE_CHECKING:
    from taskcarrier.arrays.kernels.fused import FusedTask
    from taskcarrier.arrays.kernels.signatures import KernelResult

_COPIES_NOTE = "the kernel takes arrays or records that it may write to: it gets private copies"
_NO_LOOP_NOTE = (
    "the kernel is called from Python and not fused into a loop, which gives scalars or fills rows "
    "(pass out_shape=), of dtypes that numba knows, and takes items as its signature says"
)

_IN_PROCESSES_NOTE = (
    "in processes a kernel is called from Python for every item; in threads, by a compiled loop"
)


@record
class RowOutput:
    """The row of the output to which a function of items writes its result, passed after `args`.

    Attributes
    ----------
    shape : tuple of int
        The shape of the row.
    dtype : dtype
        The dtype of the row.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def make_empty_result(self, out_axis: int | tuple[int, ...]) -> np.ndarray:
        """Return the result for no items."""
        axis = out_axis[0] if isinstance(out_axis, tuple) else out_axis
        axis = normalize_axis(axis, len(self.shape) + 1, "out_axis")
        return np.empty((*self.shape[:axis], 0, *self.shape[axis:]), self.dtype)

    def wrap_function(self, func: Any) -> Any:
        """Return a function that returns what `func` writes to a row."""
        return _RowReturner(func, self)


@record
class _RowReturner:
    func: Any
    row: RowOutput

    def __call__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        # Compiled functions take only this machine's byte order; the output is cast.
        row = np.empty(self.row.shape, self.row.dtype.newbyteorder("="))
        self.func(*args, row, **kwargs)
        return row


@record(kw_only=True)
class PreparedCall:
    """A function as it will be called, compiled beforehand if it is a kernel.

    Attributes
    ----------
    call : Call
        The function to call, with its arguments.
    writable : bool
        Whether it gets private copies of chunks or items.
    copies_args : bool
        Whether every worker gets copies of arrays among the arguments, which it may write to.
    notes : list of str
        The notes for the report.
    compiling_ns : int
        The time that compiling took, in ns.
    """

    call: Call
    writable: bool
    copies_args: bool = False
    notes: list[str] = field(default_factory=list)
    compiling_ns: int = 0


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
    """Compile a function for chunks (or items) like those of the range `first`."""
    func = call.func
    if not (is_jitted(func) or is_numba_ufunc(func)) or inputs.n_items == 0:
        return PreparedCall(call=call, writable=writable)
    begin = monotonic_ns()
    chunks = [source.open()(*first) for source in local_sources(inputs, halo)]
    if is_numba_ufunc(func):
        if not in_processes:
            _compile_ufunc(func, [*chunks, *call.args])
        return PreparedCall(call=call, writable=writable, compiling_ns=monotonic_ns() - begin)
    from taskcarrier.arrays.kernels.compiler import compile_kernel  # noqa: PLC0415  # loads numba
    from taskcarrier.arrays.kernels.signatures import bind_arguments  # noqa: PLC0415  # likewise

    extras = bind_arguments(func, len(chunks), call.args, call.kwargs)
    if by_item:
        chunks = [
            move_items_first(chunk, axis)[0]
            for chunk, axis in zip(chunks, inputs.axes, strict=True)
        ]
    compiled = compile_kernel(func, chunks, extras, writable=writable)
    target = func if in_processes else compiled.function
    if not in_processes and has_own_threads(func, extras.all):
        target = _OneAtATime(target)
    # Later objects may have other types than the first; the kernel is then compiled again.
    if by_item and compiled.scalars is not None and not any(d.hasobject for d in inputs.dtypes):
        target = _TypedKernel(target, *compiled.scalars)
    copies_items = compiled.writable_args.items
    notes = [_COPIES_NOTE] if copies_items and not writable else []
    if in_processes and by_item:
        notes.append(_IN_PROCESSES_NOTE)
    elif by_item or (compiled.note and not in_processes):
        notes.append(compiled.note or _NO_LOOP_NOTE)
    return PreparedCall(
        call=Call(target, extras.all),
        writable=copies_items,
        copies_args=compiled.writable_args.args,
        notes=notes,
        compiling_ns=monotonic_ns() - begin,
    )


_ufunc_lock = ModuleLock()


def _compile_ufunc(func: Any, values: list[Any]) -> None:
    """Have numba compile a ufunc for arguments like these, by a call with no elements.

    Numba compiles it when it is called, which is not safe in several threads at once, so it is
    done here.
    Generalized ufuncs that are compiled when called take their output as an argument, which they
    do not get here.
    """
    if func.signature is None:
        with _ufunc_lock:
            func(*(np.empty(0, np.asarray(value).dtype) for value in values[: func.nin]))


@record
class _TypedKernel:
    """A kernel that is called from Python and gives results of the dtypes it was compiled for."""

    func: Any
    dtypes: tuple[np.dtype[Any], ...]
    is_tuple: bool

    def __call__(self, *args: Any) -> Any:
        value = self.func(*args)
        if not self.is_tuple:
            return np.asarray(value, self.dtypes[0])[()]
        return tuple(
            np.asarray(scalar, dtype)[()] for scalar, dtype in zip(value, self.dtypes, strict=True)
        )


# Some of numba's threading layers abort when two functions that start threads run at once.
_own_threads_lock = ModuleLock()


@record
class _OneAtATime:
    """A function that starts threads of its own, called from one thread at a time."""

    func: Any

    def __call__(self, *args: Any) -> Any:
        with _own_threads_lock:
            return self.func(*args)


@record(kw_only=True)
class FusedLoop:
    """A call whose items are run by a compiled loop.

    Attributes
    ----------
    task : FusedTask
        The loop and its arguments.
    spec : Spec
        The spec of the results.
    notes : list of str
        The notes for the report.
    uncast_results : list of ndarray
        The results that must be cast at the end; none if they are in place already.
    """

    task: FusedTask
    spec: Spec
    notes: list[str]
    uncast_results: list[np.ndarray]

    def cast_deferred(self, failures: list[DeliveredFailure]) -> list[DeferredResult]:
        """Return the results that are not in place yet because they must be cast."""
        if not self.uncast_results:
            return []
        for start, stop, _ in failures:  # values that were never written might not survive a cast
            for out in self.task.outs:
                out[start:stop] = np.zeros((), out.dtype)
        cast_results = [
            cast_checked(result, dtype)
            for result, (dtype, _) in zip(self.uncast_results, self.spec.parts, strict=True)
        ]
        return [(slice(0, self.task.n_items), cast_results)]


def fuse_loop(
    call: Call,
    inputs: Inputs,
    buffer: LocalBuffer,
    row: RowOutput | None,
    *,
    writable: bool,
    collect_errors: bool,
    may_claim: bool,
) -> FusedLoop | None:
    """Return a fused loop for a kernel of items, or None if its loop cannot be fused.

    It claims chunks by itself if it may, and if no rows must be copied for it.
    """
    if not all(type(array) is np.ndarray for array in inputs.arrays):
        return None
    from taskcarrier.arrays.kernels import compiler, fused, signatures  # noqa: PLC0415  # load numba

    extras = signatures.bind_arguments(
        call.func, len(inputs.arrays), call.args, call.kwargs, fills=row is not None
    )
    layouts = [
        signatures.ArrayLayout.of(*pair) for pair in zip(inputs.arrays, inputs.axes, strict=True)
    ]
    row_layout = None
    if row is not None:
        sample = np.empty((1, *row.shape), row.dtype.newbyteorder("="))
        row_layout = signatures.ArrayLayout.of(sample, 0)
    result = compiler.infer_result(call.func, layouts, extras, row_layout, writable=writable)
    if result is None:
        return None
    kernel_spec, spec = _find_specs(result, row, buffer)
    results = _make_results(kernel_spec, spec, buffer)
    outs = [move_items_first(*pair) for pair in zip(results, spec.axes, strict=True)]
    out_layouts = [signatures.ArrayLayout.of(array, 0) for array in outs]
    loop = compiler.compile_loop(
        call.func, layouts, extras, out_layouts, result, rows_out=row is not None
    )
    if has_own_threads(call.func, extras.all):
        loop = _OneAtATime(loop)
    copies_rows = result.writable_args.items and any(layout.ndim for layout in layouts)
    kind = fused.ClaimingTask if may_claim and not copies_rows else fused.FusedTask
    task = kind(
        loop=loop,
        arrays=inputs.arrays,
        axes=inputs.axes,
        outs=outs,
        extras=extras.all,
        n_items=inputs.n_items,
        writable_args=result.writable_args,
        collect_errors=collect_errors,
    )
    return FusedLoop(
        task=task,
        spec=spec,
        notes=[_COPIES_NOTE] if result.writable_args.items and not writable else [],
        uncast_results=results if spec != kernel_spec else [],
    )


def _find_specs(
    result: KernelResult, row: RowOutput | None, buffer: LocalBuffer
) -> tuple[Spec, Spec]:
    """Return the spec of what a kernel gives, and that of what is asked for."""
    n_results = len(result.dtypes)
    shape = () if row is None else row.shape
    axes = tuple(
        normalize_axis(axis, len(shape) + 1, "out_axis") for axis in buffer.get_axes(n_results)
    )
    kernel_spec = Spec(tuple((dtype, shape) for dtype in result.dtypes), axes, result.is_tuple)
    outputs = buffer.get_outputs(n_results)
    spec = kernel_spec.with_dtypes(
        [output.dtype or dtype for output, dtype in zip(outputs, result.dtypes, strict=True)]
    )
    buffer.check(spec, promote_dtypes=False)  # the dtypes are known
    return kernel_spec, spec


def _make_results(kernel_spec: Spec, spec: Spec, buffer: LocalBuffer) -> list[np.ndarray]:
    """Return where the loop writes: in the outputs, if what the kernel gives need not be cast."""
    if spec == kernel_spec:
        return [open_place(place) for place in buffer.make_places(spec)]
    shapes = kernel_spec.shapes(buffer.n_items)
    return [
        np.empty(shape, dtype) for shape, (dtype, _) in zip(shapes, kernel_spec.parts, strict=True)
    ]


def check_row(out_shape: object, dtype: Any, out: Any) -> RowOutput | None:
    """Check `out_shape` and return the row that it describes, with the dtype of results."""
    if out_shape is None:
        return None
    lengths = out_shape if isinstance(out_shape, (tuple, list)) else (out_shape,)
    shape = tuple(_check_length(length, out_shape) for length in lengths)
    if isinstance(dtype, tuple) or isinstance(out, tuple):
        raise TypeError("with out_shape= there is one result; dtype= and out= must not be tuples")
    if dtype is None:
        dtype = out.dtype if isinstance(out, np.ndarray) else np.float64
    row = RowOutput(shape, np.dtype(dtype))
    if row.dtype.kind in "SU" and row.dtype.itemsize == 0:
        raise ValueError(
            f"with out_shape=, the dtype of text needs a length, as 'U20'; got {dtype!r}"
        )
    return row


def _check_length(value: Any, out_shape: object) -> int:
    if not hasattr(value, "__index__") or (length := value.__index__()) < 0:
        raise TypeError(f"out_shape must be a tuple of lengths, got {out_shape!r}")
    return int(length)
