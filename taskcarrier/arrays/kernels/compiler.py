"""What numba compiles for a map over a kernel: fused loops, and kernels that release the GIL.

Imported only for functions that numba compiled. A *fused* loop (`taskcarrier.arrays.kernels.loops`)
is compiled once for each kernel and each set of types.

A kernel is called from Python, and the report says why, if numba compiles it for values of its
arguments (`numba.literally`), or if its explicit signatures would have numbers converted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.core.errors import NumbaError

from taskcarrier.arrays.kernels.loops import build_loop, get_inherited_options
from taskcarrier.arrays.kernels.signatures import (
    ArrayLayout,
    ExtraArgs,
    KernelResult,
    WritableArgs,
    bind,
    find_signature,
    get_min_writable_args,
    get_result_dtypes,
    has_fields,
    types_of,
)
from taskcarrier.system.locks import ModuleLock
from taskcarrier.workers.introspect import has_own_threads
from taskcarrier.workers.pools import call_at_shutdown

# The symbols by which compiled code runs Python (`objmode`), prints, and draws random numbers.
_OF_EFFECTS = ("PyObject_Call", "PySys_FormatStdout", "numba_get_np_random", "numba_get_py_random")
# The prefix of the symbols that make a Python object of an array.
_TO_PYTHON_PREFIX = "NRT_adapt_ndarray_to_python"


def infer_result(
    kernel: Any,
    layouts: Sequence[ArrayLayout],
    extras: ExtraArgs,
    out: ArrayLayout | None,
    *,
    writable: bool,
) -> KernelResult | None:
    """Return what a kernel returns for an item, or None if its loop cannot be fused.

    Parameters
    ----------
    kernel : numba dispatcher
        The function of items.
    layouts : sequence of ArrayLayout
        The layouts of the mapped arrays.
    extras : ExtraArgs
        Further arguments.
    out : ArrayLayout or None
        The layout of the output whose rows the kernel fills; None if it returns its results.
    writable : bool
        Whether the kernel gets private copies in any case.
    """
    if any(layout.dtype.hasobject or not layout.dtype.isnative for layout in layouts):
        return None
    try:
        for layout in layouts:
            layout.item(writable=False)
        extra_types = types_of(extras.all, writable=False)
    except (NumbaError, ValueError, TypeError):
        return None  # numba does not know a dtype or an argument
    if any(layout.ndim for layout in layouts) and not all(map(_cannot_keep_row, extra_types)):
        return None
    # Looked up here first: numba takes 0.15 ms to look up a signature.
    key = _ResultKey(tuple(layouts), extra_types, len(extras.before), out, writable)
    with suppress(KeyError):
        return _get_cache(kernel).results[key]
    result = _find_result(kernel, layouts, extras, out, writable=writable)
    # Get the cache again: the kernel may have been compiled only now. If several threads come at
    # once, the first result counts.
    return _get_cache(kernel).results.setdefault(key, result)


class _ResultKey(NamedTuple):
    """What decides on the result of a kernel."""

    layouts: tuple[ArrayLayout, ...]
    extra_types: tuple[types.Type, ...]
    n_before: int
    out: ArrayLayout | None
    writable: bool


def _cannot_keep_row(kind: types.Type) -> bool:
    """Return whether a kernel cannot store a row in an argument of this type.

    Rows of loops do not outlive the call, so a kernel must not keep them.
    """
    if isinstance(kind, types.BaseTuple):
        return all(map(_cannot_keep_row, kind))
    return isinstance(
        kind,
        (
            types.Number,
            types.Boolean,
            types.Array,
            types.Record,
            types.NPDatetime,
            types.NPTimedelta,
            types.UnicodeType,
            types.NoneType,
            types.SliceType,
            types.Callable,
        ),
    )


class FoundLoop(NamedTuple):
    """A loop that was compiled.

    Attributes
    ----------
    loop : callable
        The loop.
    result : KernelResult
        What its kernel returns.
    has_effects : bool
        Whether somebody may notice that the kernel is called twice for an item.
    """

    loop: Callable[..., None]
    result: KernelResult
    has_effects: bool


class _KernelCache:
    """What was inferred and compiled for one kernel, as it was last compiled."""

    def __init__(self) -> None:
        self.first_overload: Any = None
        self.results: dict[_ResultKey, KernelResult | None] = {}
        self.wrappers: dict[int, Any] = {}
        self.found: dict[Any, FoundLoop] = {}

    def is_outdated_by(self, first_overload: Any) -> bool:
        """Return whether the kernel was recompiled since."""
        return self.first_overload is not None and self.first_overload is not first_overload


# Numba keeps what a compiled function refers to for as long as that function lives. So neither a
# weak table nor an attribute of the kernel would free kernel and loop: the most recent are kept.
_MAX_KERNELS = 32  # arbitrary
_kernel_caches: OrderedDict[Any, _KernelCache] = OrderedDict()
_caches_lock = ModuleLock()
call_at_shutdown(_kernel_caches.clear)


def _get_cache(kernel: Any) -> _KernelCache:
    first = next(iter(kernel.overloads.values()), None)
    with _caches_lock:
        cache = _kernel_caches.pop(kernel, None)
        if cache is None or cache.is_outdated_by(first):
            cache = _KernelCache()
        cache.first_overload = first
        _kernel_caches[kernel] = cache
        if len(_kernel_caches) > _MAX_KERNELS:
            _kernel_caches.popitem(last=False)
    return cache


def _find_result(
    kernel: Any,
    layouts: Sequence[ArrayLayout],
    extras: ExtraArgs,
    out: ArrayLayout | None,
    *,
    writable: bool,
) -> KernelResult | None:
    if not extras.after:  # otherwise checked when they were bound
        bind(kernel, len(layouts), extras.before, {}, fills=out is not None)

    def get_types(writable_args: WritableArgs) -> tuple[types.Type, ...]:
        items = tuple(layout.item(writable=writable_args.items) for layout in layouts)
        row = () if out is None else (out.type(ndim=out.ndim, writable=True),)
        before = types_of(extras.before, writable=writable_args.args)
        return (*items, *before, *row, *types_of(extras.after, writable=writable_args.args))

    # Items that are single records need no copies here: the loop copies them.
    has_record_rows = any(layout.ndim and layout.dtype.names is not None for layout in layouts)
    minimum = get_min_writable_args(has_record_rows, extras, writable=writable)
    signature = find_signature(kernel, get_types, minimum)
    if signature.note:
        return None
    if any(isinstance(kind, types.Array) for kind in get_types(signature.writable_args)) and any(
        map(_makes_objects_of_arrays, kernel.overloads.values())
    ):
        return None
    if out is not None:
        return KernelResult((out.dtype,), is_tuple=False, writable_args=signature.writable_args)
    scalars = get_result_dtypes(signature.return_type)
    return None if scalars is None else KernelResult(*scalars, signature.writable_args)


def _makes_objects_of_arrays(overload: Any) -> bool:
    """Return whether compiled code, or code that it calls, makes Python objects of arrays.

    It does so in `objmode`, and for exceptions with an array among their arguments. Python may
    keep such objects, but the arrays of loops lie over memory that they do not own.
    """
    return _TO_PYTHON_PREFIX in str(overload.library._get_module_for_linking())


def _has_effects(overload: Any) -> bool:
    """Return whether compiled code, or code that it calls, runs Python, prints or draws numbers."""
    code = str(overload.library._get_module_for_linking())
    return any(symbol in code for symbol in _OF_EFFECTS)


_compile_lock = ModuleLock()


def compile_loop(
    kernel: Any,
    layouts: Sequence[ArrayLayout],
    extras: ExtraArgs,
    outs: Sequence[ArrayLayout],
    result: KernelResult,
    *,
    rows_out: bool,
) -> Callable[..., None]:
    """Return the compiled loop for a kernel and arrays of these layouts; compile it once.

    `result` is what `infer_result` returned for them. The loop takes, in this order:

    - the addresses of the ledger's words and of the worker's row in it,
    - the items that are left of a chunk (begin, end),
    - the worker's own chunks (next_own, stop_own); stop_own is -1 where chunks are claimed,
    - the number of chunks, the chunksize, and the number of items,
    - for each array and each output: address, stride, shape and strides of an item,
    - the extras, arrays among them as address, shape and strides.
    """
    loops, key = result.loops, tuple(outs)
    if key not in loops:  # checked without the lock: do not wait while others compile
        with _compile_lock:
            if key not in loops:
                extra_types = types_of(extras.all, writable=result.writable_args.args)
                row_at = len(extras.before) if rows_out else None
                loops[key] = build_loop(kernel, layouts, extra_types, outs, result, row_at=row_at)
    return loops[key]


def find_loop(kernel: Any, arrays: Sequence[np.ndarray], args: tuple[Any, ...]) -> FoundLoop | None:
    """Return the loop that was compiled in an earlier call for arrays and numbers like these.

    Items are contiguous and lie along the first axis. None if there is no such loop, or if the
    kernel needs private copies or starts threads.
    """
    # The layouts of arrays would say the same, and take 20 µs.
    kinds = tuple((array.dtype, array.ndim, array.flags.aligned) for array in arrays)
    key = kinds, tuple(map(type, args))
    cache = _get_cache(kernel)
    found = cache.found.get(key)
    if found is None and cache.results and not has_own_threads(kernel, args):
        layouts = tuple(ArrayLayout.of(array, 0) for array in arrays)
        extra_types = types_of(args, writable=False)
        result = cache.results.get(_ResultKey(layouts, extra_types, len(args), None, False))
        if result is None or result.writable_args != WritableArgs(items=False):
            return None
        outs = tuple(ArrayLayout.of(np.empty(1, dtype), 0) for dtype in result.dtypes)
        if outs in result.loops:
            has_effects = any(map(_has_effects, kernel.overloads.values()))
            found = cache.found[key] = FoundLoop(result.loops[outs], result, has_effects)
    return found


def without_gil(kernel: Any, n_arguments: int) -> Any:
    """Return a compiled function that releases the GIL and calls the kernel."""
    with _compile_lock:
        wrappers = _get_cache(kernel).wrappers
        if n_arguments not in wrappers:
            # Not `*args`: compiled for these beforehand, it would be compiled again when called.
            names = ", ".join(f"a{n}" for n in range(n_arguments))
            source = f"def called({names}):\n    return kernel({names})\n"
            namespace: dict[str, Any] = {"kernel": kernel}
            exec(compile(source, f"<call of {kernel.__name__}>", "exec"), namespace)
            wrappers[n_arguments] = numba.njit(nogil=True, **get_inherited_options(kernel))(
                namespace["called"]
            )
        return wrappers[n_arguments]


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """A kernel that is called from Python, compiled beforehand if that is possible.

    Attributes
    ----------
    function : callable
        The function to call.
    writable_args : WritableArgs
        Which arguments it writes to.
    scalars : tuple, optional
        If it returns scalars: their dtypes, and whether they come as a tuple.
    note : str
        Why compiled code must not call the kernel; empty if it may.
    """

    function: Callable[..., Any]
    writable_args: WritableArgs
    scalars: tuple[tuple[np.dtype[Any], ...], bool] | None
    note: str


def compile_kernel(
    kernel: Any, chunks: Sequence[np.ndarray], extras: ExtraArgs, *, writable: bool
) -> CompiledKernel:
    """Compile a kernel for chunks (or items) like these."""
    bind(kernel, len(chunks), extras.all, {}, fills=False)

    def get_types(writable_args: WritableArgs) -> tuple[types.Type, ...]:
        return (
            *types_of(chunks, writable=writable_args.items),
            *types_of(extras.all, writable=writable_args.args),
        )

    minimum = get_min_writable_args(any(map(has_fields, chunks)), extras, writable=writable)
    signature = find_signature(kernel, get_types, minimum)
    function: Any = kernel
    if not signature.note:
        function = without_gil(kernel, len(chunks) + len(extras.all))
        function.compile(get_types(signature.writable_args))
    return CompiledKernel(
        function=function,
        writable_args=signature.writable_args,
        scalars=None if signature.note else get_result_dtypes(signature.return_type),
        note=signature.note,
    )
