"""Numba kernels in threads: loops over items without the GIL that claim their chunks themselves.

This is the only module that imports numba. It is imported only for functions that numba compiled.

A *fused* loop is compiled once for each kernel and each set of types. It claims the next chunk from
the ledger with one atomic instruction (10 ns), calls the kernel for every item, and writes each
result in place: no Python runs between items, nor between chunks. The loop takes addresses, not
arrays, because counting references to an array that several threads use costs 7 to 8 %. Items that
are rows are also made from addresses, always as read-only arrays: so one signature and one
compilation serve any array. Loops are closures over their kernel, which numba's cache on disk never
finds again, so they are not cached there.

For a kernel that makes a float64 of a float64, over a 1-D array, the source of the loop is this
(here with its first line wrapped)::

    def loop(
        ledger, worker_row, begin, end, next_own, stop_own, n_chunks, chunksize, n_items,
        x0, x0_stride, x0_item_shape, x0_item_strides,
        y0, y0_stride, y0_item_shape, y0_item_strides
    ):
        x0_all = make_x0(x0, (n_items,), (x0_stride,))
        y0_all = make_y0(y0, (n_items,), (y0_stride,))
        while True:
            if begin >= end:
                if load(ledger) != 0:
                    return
                if stop_own < 0:
                    index = take(ledger + 128)
                    if index >= n_chunks:
                        return
                else:
                    index = next_own
                    next_own += 1
                    if index >= stop_own:
                        return
                store(worker_row + 0, index)
                begin = index * chunksize
                end = min(begin + chunksize, n_items)
            for i in range(begin, end):
                if load(ledger) != 0:
                    return
                store(worker_row + 16, i)
                value = kernel(x0_all[i])
                if load(ledger) != 0:
                    return
                y0_all[i] = value
            store(worker_row + 8, load(worker_row + 8) + end - begin)
            store(worker_row + 24, load(worker_row + 24) + 1)
            store(worker_row + 0, -1)
            begin = end

``x0`` is the address of the mapped array, ``y0`` that of the output; ``make_x0`` and ``make_y0``
make arrays from addresses. Numbers added to ``ledger`` and ``worker_row`` are offsets in bytes.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import ForceLiteralArg, NumbaError, TypingError
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np import numpy_support
from numba.np.arrayobj import make_array, populate_array

from taskcarrier.arguments import make_read_only
from taskcarrier.memory.strides import move_items_first
from taskcarrier.notes import add_note, count_noun
from taskcarrier.scheduling.ledger import COUNTER_AT, IN_HAND_AT, ITEM_AT, ITEMS_AT, RANGES_AT
from taskcarrier.system.locks import ModuleLock
from taskcarrier.workers.pools import call_at_shutdown

_WORD = ir.IntType(64)
# The prefix of the symbols that make a Python object of an array.
_TO_PYTHON_PREFIX = "NRT_adapt_ndarray_to_python"


def _to_pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


@intrinsic
def _take(_context: Any, _address: Any) -> Any:
    """Return the number at an address and add one to it, in one step for all threads."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = _to_pointer(builder, args[0])
        return builder.atomic_rmw("add", pointer, ir.Constant(_WORD, 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def _load(_context: Any, _address: Any) -> Any:
    """Return the number at an address, which is read from memory each time."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load_atomic(_to_pointer(builder, args[0]), "monotonic", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store(_context: Any, _address: Any, _value: Any) -> Any:
    """Write a number to an address that other threads may read."""

    def codegen(target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _to_pointer(builder, args[0]), "monotonic", 8)
        return target.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _copy(_context: Any, _to: Any, _begin: Any, _nbytes: Any) -> Any:
    """Copy bytes from one address to another."""

    def codegen(target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        to, begin = (builder.inttoptr(address, cgutils.voidptr_t) for address in args[:2])
        cgutils.raw_memcpy(builder, to, begin, args[2], 1)
        return target.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _make_array_intrinsic(array_type: types.Array) -> Any:
    """Return a function for compiled code that makes an array from address, shape and strides.

    The array owns nothing: the caller must keep the memory under it alive.
    """
    itemsize = numpy_support.as_dtype(array_type.dtype).itemsize

    @intrinsic
    def array_at(_context: Any, _address: Any, shape: Any, strides: Any) -> Any:
        def codegen(target: Any, builder: Any, _signature: Any, args: Any) -> Any:
            address, lengths, byte_strides = args
            array = make_array(array_type)(target, builder)
            data = builder.inttoptr(address, target.get_data_type(array_type.dtype).as_pointer())
            populate_array(
                array,
                data=data,
                shape=lengths,
                strides=byte_strides,
                itemsize=target.get_constant(types.intp, itemsize),
                meminfo=None,
            )
            return array._getvalue()

        return array_type(types.int64, shape, strides), codegen

    return array_at


@dataclass(frozen=True)
class ArrayLayout:
    """What compiled code must know of an array: dtype, dimensions, order, alignment.

    Attributes
    ----------
    dtype : dtype
        The dtype of the array.
    ndim : int
        The number of its axes without the mapped one.
    layout : {"C", "F", "A"}
        The order of an item; that of all items, if these are scalars.
    aligned : bool
        Whether elements lie at multiples of their size.
    """

    dtype: np.dtype[Any]
    ndim: int
    layout: str
    aligned: bool

    @classmethod
    def of(cls, array: np.ndarray, axis: int) -> ArrayLayout:
        """Return the layout of an array whose items lie along `axis`."""
        items = move_items_first(array, axis)
        sample = items[0] if items.ndim > 1 else items
        layout = "C" if sample.flags.c_contiguous else "F" if sample.flags.f_contiguous else "A"
        return cls(array.dtype, items.ndim - 1, layout, bool(array.flags.aligned))

    def type(self, *, ndim: int, writable: bool) -> types.Array:
        """Return the array type of numba with `ndim` axes."""
        return types.Array(
            numpy_support.from_dtype(self.dtype),
            ndim,
            self.layout,
            readonly=not writable,
            aligned=self.aligned,
        )

    def item(self, *, writable: bool) -> types.Type:
        """Return the numba type of one item."""
        if self.ndim == 0:
            return numpy_support.from_dtype(self.dtype)
        return self.type(ndim=self.ndim, writable=writable)


@dataclass(frozen=True)
class WritableArgs:
    """Which arguments a kernel writes to, so that it gets private copies of them.

    Attributes
    ----------
    items : bool
        Whether it writes to items or chunks.
    args : bool
        Whether it writes to arrays among its further arguments.
    """

    items: bool
    args: bool = False


@dataclass(frozen=True, eq=False)
class KernelResult:
    """What a kernel returns for one item.

    Attributes
    ----------
    dtypes : tuple of dtype
        The dtype of each result.
    is_tuple : bool
        Whether the kernel returns a tuple.
    writable_args : WritableArgs
        Which arguments the kernel writes to.
    loops : dict
        The loops that were compiled for this result, by the layouts of the outputs.
    """

    dtypes: tuple[np.dtype[Any], ...]
    is_tuple: bool
    writable_args: WritableArgs
    loops: dict[tuple[ArrayLayout, ...], Callable[..., None]] = field(default_factory=dict)


@dataclass(frozen=True)
class ExtraArgs:
    """The arguments of a kernel besides items or chunks, by position.

    Attributes
    ----------
    before : tuple
        The arguments that follow the items.
    after : tuple
        The arguments that follow the row that the kernel fills, if it fills one.
    """

    before: tuple[Any, ...]
    after: tuple[Any, ...] = ()

    @property
    def all(self) -> tuple[Any, ...]:
        """All these arguments, in order."""
        return self.before + self.after


def bind_arguments(
    kernel: Any, n_items: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, fills: bool = False
) -> ExtraArgs:
    """Return `args` and `kwargs` by position, for ``kernel(*items, *args, [row], **kwargs)``.

    Raises
    ------
    TypeError
        If the kernel does not take them; raised before anything is compiled.
    """
    if not kwargs:
        return ExtraArgs(args)
    bound = _bind(kernel, n_items, args, kwargs, fills=fills)
    bound.apply_defaults()
    n_before = n_items + len(args)
    return ExtraArgs(args, bound.args[n_before + fills :])


def _bind(
    kernel: Any, n_items: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, fills: bool
) -> inspect.BoundArguments:
    signature = inspect.signature(kernel.py_func)
    try:
        return signature.bind(*[None] * (n_items + len(args) + fills), **kwargs)
    except TypeError as error:
        arguments = [
            count_noun(n_items, "mapped array"),
            *[f"{len(args)} of args"] * bool(args),
            *["the row to fill"] * fills,
        ]
        description = ", ".join([*arguments, *(f"{name}=" for name in kwargs)])
        raise TypeError(
            f"{kernel.__name__}{signature} cannot be called with {description} ({error}); a kernel "
            "that fills a row goes to map_items with out_shape="
        ) from None


def types_of(extras: Sequence[Any], *, writable: bool) -> tuple[types.Type, ...]:
    """Return the numba types of further arguments; arrays are read-only unless `writable`.

    Raises
    ------
    TypeError
        If a value has the other byte order: numba would misread dates of that order.
    """
    for value in extras:
        dtype = getattr(value, "dtype", None)
        if isinstance(dtype, np.dtype) and not dtype.isnative:
            raise TypeError(
                f"numba takes no values of dtype {dtype}, which has another byte order than this "
                "machine: pass X.astype(X.dtype.newbyteorder('='))"
            )
    return tuple(
        numba.typeof(value).copy(readonly=False)
        if writable and isinstance(value, np.ndarray)
        else numba.typeof(make_read_only(value))
        for value in extras
    )


def _get_min_writable_args(records: bool, extras: ExtraArgs, *, writable: bool) -> WritableArgs:
    """Return what every kernel is assumed to write to: numba lets any kernel write to records."""
    return WritableArgs(writable or records, any(map(_has_fields, extras.all)))


def _has_fields(value: Any) -> bool:
    return getattr(getattr(value, "dtype", None), "names", None) is not None


def resolve(kernel: Any, arguments: tuple[types.Type, ...]) -> Any:
    """Compile the kernel for arguments of these types and return its signature.

    Raises
    ------
    TypingError
        If the kernel cannot be compiled for them.
    """
    signature = cpu_target.typing_context.resolve_function_type(numba.typeof(kernel), arguments, {})
    if signature is None:
        names = ", ".join(map(str, arguments))
        known = ", ".join(f"({', '.join(map(str, kinds))})" for kinds in kernel.signatures)
        raise TypingError(
            f"{kernel.__name__} was compiled for {known} alone, not for ({names}); an array "
            "declared [::1] must be contiguous, [:] takes any; without a signature all are taken"
        )
    return signature


def _resolve_writable_args(
    kernel: Any, get_types: Callable[[WritableArgs], tuple[types.Type, ...]], minimum: WritableArgs
) -> tuple[Any, WritableArgs]:
    """Return the kernel's signature and what it writes to: no more than `minimum` if possible.

    A kernel with explicit signatures takes what these say; others take read-only arrays.
    """
    try:
        return resolve(kernel, get_types(minimum)), minimum
    except TypingError as error:
        vars(error).pop("__notes__", None)  # numba raises the same object each time
        if not kernel._can_compile:
            alternatives = (
                WritableArgs(minimum.items, True),
                WritableArgs(True, minimum.args),
                WritableArgs(True, True),
            )
            for writable_args in alternatives:
                with suppress(TypingError):  # the first error is more helpful
                    return resolve(kernel, get_types(writable_args)), writable_args
        elif "Cannot modify readonly" in str(error):
            add_note(
                error,
                "items, chunks and arrays in args are read-only; writable=True gives private "
                "copies of items and chunks",
            )
        raise


def _takes_unconverted(signature: Any, arguments: tuple[types.Type, ...]) -> bool:
    """Return whether no number would be converted to fit the signature.

    Between compiled functions numba converts numbers whether they fit or not (2.5 becomes 2, -1 the
    largest number), and picks any signature that would do. Called from Python, it refuses that.
    """
    return all(
        given_type == wanted_type
        for given_type, wanted_type in zip(arguments, signature.args, strict=True)
        if isinstance(given_type, (types.Number, types.Boolean))
    )


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
    key = (tuple(layouts), extra_types, len(extras.before), out, writable)
    with suppress(KeyError):
        return _get_cache(kernel).results[key]
    result = _find_result(kernel, layouts, extras, out, writable=writable)
    # Get the cache again: the kernel may have been compiled only now. If several threads come at
    # once, the first result counts.
    return _get_cache(kernel).results.setdefault(key, result)


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


class _KernelCache:
    """What was inferred and compiled for one kernel, as it was last compiled."""

    def __init__(self) -> None:
        self.first_overload: Any = None
        self.results: dict[Any, KernelResult | None] = {}
        self.wrappers: dict[int, Any] = {}

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
        _bind(kernel, len(layouts), extras.before, {}, fills=out is not None)

    def get_types(writable_args: WritableArgs) -> tuple[types.Type, ...]:
        items = tuple(layout.item(writable=writable_args.items) for layout in layouts)
        row = () if out is None else (out.type(ndim=out.ndim, writable=True),)
        before = types_of(extras.before, writable=writable_args.args)
        return (*items, *before, *row, *types_of(extras.after, writable=writable_args.args))

    # Items that are single records need no copies here: the loop copies them.
    has_record_rows = any(layout.ndim and layout.dtype.names is not None for layout in layouts)
    try:
        minimum = _get_min_writable_args(has_record_rows, extras, writable=writable)
        signature, writable_args = _resolve_writable_args(kernel, get_types, minimum)
    except ForceLiteralArg:
        return None  # numba compiles it for values, which are known when it is called
    if not kernel._can_compile and not _takes_unconverted(signature, get_types(writable_args)):
        return None
    if any(isinstance(kind, types.Array) for kind in get_types(writable_args)) and any(
        map(_makes_objects_of_arrays, kernel.overloads.values())
    ):
        return None
    if out is not None:
        return KernelResult((out.dtype,), is_tuple=False, writable_args=writable_args)
    scalars = _get_result_dtypes(signature.return_type)
    return None if scalars is None else KernelResult(*scalars, writable_args)


def _makes_objects_of_arrays(overload: Any) -> bool:
    """Return whether compiled code, or code that it calls, makes Python objects of arrays.

    It does so in `objmode`, and for exceptions with an array among their arguments. Python may
    keep such objects, but the arrays of loops lie over memory that they do not own.
    """
    return _TO_PYTHON_PREFIX in str(overload.library._get_module_for_linking())


def _get_result_dtypes(kind: types.Type) -> tuple[tuple[np.dtype[Any], ...], bool] | None:
    """Return the dtypes of a scalar or tuple of scalars, and whether it is a tuple; else None."""
    is_tuple = isinstance(kind, types.BaseTuple)
    parts = list(kind) if is_tuple else [kind]
    dtypes = [_to_dtype(part) for part in parts]
    if not dtypes or any(dtype is None for dtype in dtypes):
        return None  # arrays, None and text are stacked by Python code
    return tuple(d for d in dtypes if d is not None), is_tuple


def _to_dtype(kind: types.Type) -> np.dtype[Any] | None:
    kind = types.unliteral(kind)
    if isinstance(
        kind, (types.Number, types.Boolean, types.NPDatetime, types.NPTimedelta, types.Record)
    ):
        return np.dtype(numpy_support.as_dtype(kind))
    return None


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
                loops[key] = _build_loop(kernel, layouts, extra_types, outs, result, row_at=row_at)
    return loops[key]


def _build_loop(
    kernel: Any,
    layouts: Sequence[ArrayLayout],
    extra_types: Sequence[types.Type],
    outs: Sequence[ArrayLayout],
    result: KernelResult,
    *,
    row_at: int | None,
) -> Callable[..., None]:
    word = types.int64
    namespace: dict[str, Any] = {
        "kernel": kernel,
        "np": np,
        "take": _take,
        "load": _load,
        "store": _store,
        "copy": _copy,
    }
    parameters = [
        "ledger",
        "worker_row",
        "begin",
        "end",
        "next_own",
        "stop_own",
        "n_chunks",
        "chunksize",
        "n_items",
    ]
    signature: list[types.Type] = [word] * len(parameters)
    setup: list[str] = []
    body: list[str] = []
    arguments: list[str] = []

    def add_array(name: str, layout: ArrayLayout, *, writable: bool) -> str:
        """Pass an array to the loop; return the expression for its item `i`."""
        parameters.extend([name, f"{name}_stride", f"{name}_item_shape", f"{name}_item_strides"])
        signature.extend([word, word, *[types.UniTuple(word, layout.ndim)] * 2])
        if layout.ndim:
            namespace[f"make_{name}"] = _make_array_intrinsic(
                layout.type(ndim=layout.ndim, writable=writable)
            )
            return (
                f"make_{name}({name} + i * {name}_stride, {name}_item_shape, {name}_item_strides)"
            )
        namespace[f"make_{name}"] = _make_array_intrinsic(layout.type(ndim=1, writable=writable))
        setup.append(f"{name}_all = make_{name}({name}, (n_items,), ({name}_stride,))")
        return f"{name}_all[i]"

    for number, layout in enumerate(layouts):
        item = add_array(f"x{number}", layout, writable=result.writable_args.items)
        if layout.ndim == 0 and layout.dtype.names is not None:
            # A record in compiled code is a pointer: the kernel would write to the caller's record.
            namespace[f"record{number}_dtype"] = layout.dtype
            setup.append(f"record{number} = np.empty(1, record{number}_dtype)")
            body.append(f"record{number}[0] = {item}")
            item = f"record{number}[0]"
        arguments.append(item)
    targets = [add_array(f"y{n}", layout, writable=True) for n, layout in enumerate(outs)]
    for number, kind in enumerate(extra_types):
        name = f"a{number}"
        if isinstance(kind, types.Array):
            parameters.extend([name, f"{name}_shape", f"{name}_strides"])
            signature.extend([word, *[types.UniTuple(word, kind.ndim)] * 2])
            namespace[f"make_{name}"] = _make_array_intrinsic(kind)
            setup.append(f"{name}_all = make_{name}({name}, {name}_shape, {name}_strides)")
            arguments.append(f"{name}_all")
        else:
            parameters.append(name)
            signature.append(kind)
            arguments.append(name)
    if row_at is not None:  # the number of extras before the row
        namespace["row_dtype"] = result.dtypes[0]
        setup += [
            "out_row = np.empty(y0_item_shape, row_dtype)",
            "out_row_address, out_row_nbytes = out_row.ctypes.data, out_row.nbytes",
        ]
        arguments.insert(len(layouts) + row_at, "out_row")
        body.append(f"kernel({', '.join(arguments)})")
        writes = [_make_row_write(targets[0], outs[0], result.dtypes[0])]
    else:
        body.append(f"value = kernel({', '.join(arguments)})")
        writes = [
            f"{target} = value[{n}]" if result.is_tuple else f"{target} = value"
            for n, target in enumerate(targets)
        ]
    # The call may have been interrupted meanwhile: then nothing may be written any more.
    body += ["if load(ledger) != 0:", "    return", *writes]
    source = _LOOP.format(
        parameters=", ".join(parameters),
        setup="\n    ".join(setup) or "pass",
        body="\n            ".join(body),
        COUNTER_AT=COUNTER_AT,
        IN_HAND_AT=IN_HAND_AT,
        ITEM_AT=ITEM_AT,
        ITEMS_AT=ITEMS_AT,
        RANGES_AT=RANGES_AT,
    )
    exec(compile(source, f"<fused loop over {kernel.__name__}>", "exec"), namespace)
    loop: Any = numba.njit(nogil=True, **_get_inherited_options(kernel))(namespace["loop"])
    loop.compile(tuple(signature))
    loop.disable_compile()
    run: Callable[..., None] = loop
    return run


def _make_row_write(target: str, layout: ArrayLayout, dtype: np.dtype[Any]) -> str:
    """Return the statement that copies a filled row of `dtype` to its place in the output."""
    if layout.ndim == 0:
        return f"{target} = out_row[()]"
    if layout.layout == "C" and layout.dtype == dtype:
        # An assignment takes compiled code about 1 ns an element: 5 % of the time of a picture of
        # small numbers.
        return "copy(y0 + i * y0_stride, out_row_address, out_row_nbytes)"
    return f"{target}[...] = out_row"


# The source of every fused loop; what depends on arrays, kernel and results is filled in.
_LOOP = """
def loop({parameters}):
    {setup}
    while True:
        if begin >= end:
            if load(ledger) != 0:
                return
            if stop_own < 0:
                index = take(ledger + {COUNTER_AT})
                if index >= n_chunks:
                    return
            else:
                index = next_own
                next_own += 1
                if index >= stop_own:
                    return
            store(worker_row + {IN_HAND_AT}, index)
            begin = index * chunksize
            end = min(begin + chunksize, n_items)
        for i in range(begin, end):
            if load(ledger) != 0:
                return
            store(worker_row + {ITEM_AT}, i)
            {body}
        store(worker_row + {ITEMS_AT}, load(worker_row + {ITEMS_AT}) + end - begin)
        store(worker_row + {RANGES_AT}, load(worker_row + {RANGES_AT}) + 1)
        store(worker_row + {IN_HAND_AT}, -1)
        begin = end
"""


def _get_inherited_options(kernel: Any) -> dict[str, Any]:
    """Return the options that a function around a kernel needs too: numba may inline the kernel."""
    options = kernel.targetoptions
    names = ("boundscheck", "error_model", "fastmath")
    return {name: options[name] for name in names if name in options}


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
            wrappers[n_arguments] = numba.njit(nogil=True, **_get_inherited_options(kernel))(
                namespace["called"]
            )
        return wrappers[n_arguments]


def compile_kernel(
    kernel: Any, chunks: Sequence[np.ndarray], extras: ExtraArgs, *, writable: bool
) -> tuple[Callable[..., Any], WritableArgs, tuple[tuple[np.dtype[Any], ...], bool] | None]:
    """Compile a kernel for chunks (or items) like these.

    Return the function to call, what it writes to, and, if it returns scalars, their dtypes and
    whether they come as a tuple.
    """
    _bind(kernel, len(chunks), extras.all, {}, fills=False)

    def get_types(writable_args: WritableArgs) -> tuple[types.Type, ...]:
        return (
            *types_of(chunks, writable=writable_args.items),
            *types_of(extras.all, writable=writable_args.args),
        )

    try:
        minimum = _get_min_writable_args(any(map(_has_fields, chunks)), extras, writable=writable)
        signature, writable_args = _resolve_writable_args(kernel, get_types, minimum)
    except ForceLiteralArg:  # compiled for values when it is called
        return kernel, WritableArgs(items=writable), None
    if not kernel._can_compile and not _takes_unconverted(signature, get_types(writable_args)):
        return kernel, writable_args, None
    wrapper: Any = without_gil(kernel, len(chunks) + len(extras.all))
    wrapper.compile(get_types(writable_args))
    return wrapper, writable_args, _get_result_dtypes(signature.return_type)
