"""Numba kernels in threads: loops over items without the GIL that claim their ranges themselves.

The only module that imports numba, and imported only for functions that numba has compiled.

A *fused* loop is compiled once for each kernel and each set of types. It takes the next range off
the ledger with one atomic instruction (10 ns), calls the kernel on every item, and writes what it
returns where it belongs: no Python between items, nor between ranges. It is handed addresses and
not arrays, because counting references to an array that several threads use costs 7 to 8 %; items
that are rows are made from addresses as well, always as read-only arrays, so that there is one
signature and one compilation whatever array was given. Loops are closures over their kernel, which
numba's cache on disk never finds again, so they are not cached there.
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

from taskcarrier.arguments import read_only
from taskcarrier.memory.strides import items_first
from taskcarrier.notes import add_note, count_noun
from taskcarrier.scheduling.ledger import COUNTER_AT, IN_HAND_AT, ITEM_AT, ITEMS_AT, RANGES_AT
from taskcarrier.system.locks import ModuleLock
from taskcarrier.workers.pools import call_at_shutdown

_WORD = ir.IntType(64)
# The beginning of the name of what makes a Python object of an array.
_TO_PYTHON = "NRT_adapt_ndarray_to_python"


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


@intrinsic
def _take(_context: Any, _address: Any) -> Any:
    """The number at an address, which is one more from then on, for all threads."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0])
        return builder.atomic_rmw("add", pointer, ir.Constant(_WORD, 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def _load(_context: Any, _address: Any) -> Any:
    """The number at an address, looked at again each time."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0]), "monotonic", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store(_context: Any, _address: Any, _value: Any) -> Any:
    """Write a number to an address, where other threads may look."""

    def codegen(target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0]), "monotonic", 8)
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


def _maker(array_type: types.Array) -> Any:
    """A function for compiled code that makes an array of a type from address, shape and strides.

    The array refers to nothing: what it lies over must be kept alive by others.
    """
    itemsize = numpy_support.as_dtype(array_type.dtype).itemsize

    @intrinsic
    def array_at(_context: Any, _address: Any, shape: Any, strides: Any) -> Any:
        def codegen(target: Any, builder: Any, _signature: Any, args: Any) -> Any:
            address, lengths, steps = args
            array = make_array(array_type)(target, builder)
            data = builder.inttoptr(address, target.get_data_type(array_type.dtype).as_pointer())
            populate_array(
                array,
                data=data,
                shape=lengths,
                strides=steps,
                itemsize=target.get_constant(types.intp, itemsize),
                meminfo=None,
            )
            return array._getvalue()

        return array_type(types.int64, shape, strides), codegen

    return array_at


@dataclass(frozen=True)
class ArrayLayout:
    """How an array lies in memory, as far as compiled code is made for it.

    Attributes
    ----------
    dtype : dtype
        Its dtype.
    ndim : int
        Its number of axes without the mapped one.
    layout : {"C", "F", "A"}
        Of an item; of all items, if these are scalars.
    aligned : bool
        Whether elements stand at multiples of their size.
    """

    dtype: np.dtype[Any]
    ndim: int
    layout: str
    aligned: bool

    @classmethod
    def of(cls, array: np.ndarray, axis: int) -> ArrayLayout:
        """Of an array whose items lie along `axis`."""
        item = items_first(array, axis)
        whole = item[0] if item.ndim > 1 else item
        layout = "C" if whole.flags.c_contiguous else "F" if whole.flags.f_contiguous else "A"
        return cls(array.dtype, item.ndim - 1, layout, bool(array.flags.aligned))

    def type(self, *, ndim: int, writable: bool) -> types.Array:
        """The array type of numba with so many axes."""
        return types.Array(
            numpy_support.from_dtype(self.dtype),
            ndim,
            self.layout,
            readonly=not writable,
            aligned=self.aligned,
        )

    def item(self, *, writable: bool) -> types.Type:
        """The type of one item."""
        if self.ndim == 0:
            return numpy_support.from_dtype(self.dtype)
        return self.type(ndim=self.ndim, writable=writable)


@dataclass(frozen=True)
class WritableArgs:
    """Which arrays a kernel must be able to write to, so that it gets private copies of them."""

    items: bool
    args: bool = False


@dataclass(frozen=True, eq=False)
class KernelResult:
    """What a kernel gives for one item.

    Attributes
    ----------
    dtypes : tuple of dtype
        Of each result.
    is_tuple : bool
        Whether it is a tuple.
    writable_args : WritableArgs
        What it must be able to write to.
    loops : dict
        Loops that were compiled for it, by how the outputs lie.
    """

    dtypes: tuple[np.dtype[Any], ...]
    is_tuple: bool
    writable_args: WritableArgs
    loops: dict[tuple[ArrayLayout, ...], Callable[..., None]] = field(default_factory=dict)


@dataclass(frozen=True)
class ExtraArgs:
    """What a kernel gets besides items or chunks, by position.

    Attributes
    ----------
    before, after : tuple
        What follows the items; what follows the row that it fills, if it fills one.
    """

    before: tuple[Any, ...]
    after: tuple[Any, ...] = ()

    @property
    def all(self) -> tuple[Any, ...]:
        """One after the other."""
        return self.before + self.after


def bind_arguments(
    kernel: Any, n_items: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, fills: bool = False
) -> ExtraArgs:
    """`args` and `kwargs` by position, for the call ``kernel(*items, *args, [row], **kwargs)``.

    Raises
    ------
    TypeError
        If the kernel does not take them, before anything is compiled.
    """
    if not kwargs:
        return ExtraArgs(args)
    found = _bind(kernel, n_items, args, kwargs, fills=fills)
    found.apply_defaults()
    n_before = n_items + len(args)
    return ExtraArgs(args, found.args[n_before + fills :])


def _bind(
    kernel: Any, n_items: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, fills: bool
) -> inspect.BoundArguments:
    signature = inspect.signature(kernel.py_func)
    try:
        return signature.bind(*[None] * (n_items + len(args) + fills), **kwargs)
    except TypeError as error:
        given = [
            count_noun(n_items, "mapped array"),
            *[f"{len(args)} of args"] * bool(args),
            *["the row to fill"] * fills,
        ]
        words = ", ".join([*given, *(f"{name}=" for name in kwargs)])
        raise TypeError(
            f"{kernel.__name__}{signature} cannot be called with {words} ({error}); a kernel "
            "that fills a row goes to map_items with out_shape="
        ) from None


def types_of(extras: Sequence[Any], *, writable: bool) -> tuple[types.Type, ...]:
    """The types of further arguments; arrays among them are read-only unless `writable`.

    Raises
    ------
    TypeError
        For values of the other byte order: numba takes dates of that kind for others.
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
        else numba.typeof(read_only(value))
        for value in extras
    )


def _least(records: bool, extras: ExtraArgs, *, writable: bool) -> WritableArgs:
    """What every kernel is taken to write to: numba keeps nobody from writing to records."""
    return WritableArgs(writable or records, any(map(_has_fields, extras.all)))


def _has_fields(value: Any) -> bool:
    return getattr(getattr(value, "dtype", None), "names", None) is not None


def resolve(kernel: Any, arguments: tuple[types.Type, ...]) -> Any:
    """The kernel's signature for arguments of these types; it is compiled for them by then.

    Raises
    ------
    TypingError
        If it cannot be.
    """
    signature = cpu_target.typing_context.resolve_function_type(numba.typeof(kernel), arguments, {})
    if signature is None:
        names = ", ".join(map(str, arguments))
        known = ", ".join(f"({', '.join(map(str, one))})" for one in kernel.signatures)
        raise TypingError(
            f"{kernel.__name__} was compiled for {known} alone, not for ({names}); an array "
            "declared [::1] must be contiguous, [:] takes any; without a signature all are taken"
        )
    return signature


def _resolve_any(
    kernel: Any, arguments: Callable[[WritableArgs], tuple[types.Type, ...]], least: WritableArgs
) -> tuple[Any, WritableArgs]:
    """The kernel's signature, and what it must be able to write to: the least if that can be.

    Kernels with explicit signatures take what these say; others take read-only arrays.
    """
    try:
        return resolve(kernel, arguments(least)), least
    except TypingError as error:
        vars(error).pop("__notes__", None)  # numba raises the same object again and again
        if not kernel._can_compile:
            more = (
                WritableArgs(least.items, True),
                WritableArgs(True, least.args),
                WritableArgs(True, True),
            )
            for writable_args in more:
                with suppress(TypingError):  # the first error says more
                    return resolve(kernel, arguments(writable_args)), writable_args
        elif "Cannot modify readonly" in str(error):
            add_note(
                error,
                "items, chunks and arrays in args are read-only; writable=True gives private "
                "copies of items and chunks",
            )
        raise


def _takes_as_they_are(signature: Any, arguments: tuple[types.Type, ...]) -> bool:
    """Whether no number would be converted to fit the signature.

    Numba converts between compiled functions whatever fits or not (2.5 becomes 2, -1 the largest
    number), and takes one of several signatures that would do; called from Python it refuses that.
    """
    return all(
        given == wanted
        for given, wanted in zip(arguments, signature.args, strict=True)
        if isinstance(given, (types.Number, types.Boolean))
    )


def infer_result(
    kernel: Any,
    layouts: Sequence[ArrayLayout],
    extras: ExtraArgs,
    out: ArrayLayout | None,
    *,
    writable: bool,
) -> KernelResult | None:
    """What a kernel gives for an item, or None if a loop over it cannot be fused.

    Parameters
    ----------
    kernel : numba dispatcher
        The function of items.
    layouts : sequence of ArrayLayout
        How the mapped arrays lie.
    extras : ExtraArgs
        Further arguments.
    out : ArrayLayout or None
        How the output lies into whose rows the kernel writes; None if it returns its results.
    writable : bool
        Whether it is to get private copies.
    """
    if any(layout.dtype.hasobject or not layout.dtype.isnative for layout in layouts):
        return None
    try:
        for layout in layouts:
            layout.item(writable=False)
        extra_types = types_of(extras.all, writable=False)
    except (NumbaError, ValueError, TypeError):
        return None  # a dtype or an argument that numba does not know
    if any(layout.ndim for layout in layouts) and not all(map(_keeps_nothing, extra_types)):
        return None
    # Numba takes 0.15 ms to look it up.
    key = (tuple(layouts), extra_types, len(extras.before), out, writable)
    with suppress(KeyError):
        return _get_made(kernel).infer_result[key]
    found = _find_result(kernel, layouts, extras, out, writable=writable)
    # The kernel may only be compiled now. Of threads that come at once the first counts.
    return _get_made(kernel).infer_result.setdefault(key, found)


def _keeps_nothing(kind: types.Type) -> bool:
    """Whether a kernel cannot put a row into an argument: rows of loops are gone after the call."""
    if isinstance(kind, types.BaseTuple):
        return all(map(_keeps_nothing, kind))
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


class _Made:
    """What was made for one kernel as it was compiled last."""

    def __init__(self) -> None:
        self.first_overload: Any = None
        self.infer_result: dict[Any, KernelResult | None] = {}
        self.without_gil: dict[int, Any] = {}

    def is_outdated_by(self, first_overload: Any) -> bool:
        """Whether the kernel was recompiled since."""
        return self.first_overload is not None and self.first_overload is not first_overload


# Numba keeps what a compiled function refers to for as long as that function lives, so neither a
# weak table nor an attribute of the kernel would let go of kernel and loop: the last ones are kept.
_MAX_KERNELS = 32  # arbitrary
_made: OrderedDict[Any, _Made] = OrderedDict()
_making = ModuleLock()
call_at_shutdown(_made.clear)


def _get_made(kernel: Any) -> _Made:
    first = next(iter(kernel.overloads.values()), None)
    with _making:
        made = _made.pop(kernel, None)
        if made is None or made.is_outdated_by(first):
            made = _Made()
        made.first_overload = first
        _made[kernel] = made
        if len(_made) > _MAX_KERNELS:
            _made.popitem(last=False)
    return made


def _find_result(
    kernel: Any,
    layouts: Sequence[ArrayLayout],
    extras: ExtraArgs,
    out: ArrayLayout | None,
    *,
    writable: bool,
) -> KernelResult | None:
    if not extras.after:  # else it was looked at when they were bound
        _bind(kernel, len(layouts), extras.before, {}, fills=out is not None)

    def arguments(writable_args: WritableArgs) -> tuple[types.Type, ...]:
        items = tuple(layout.item(writable=writable_args.items) for layout in layouts)
        row = () if out is None else (out.type(ndim=out.ndim, writable=True),)
        before = types_of(extras.before, writable=writable_args.args)
        return (*items, *before, *row, *types_of(extras.after, writable=writable_args.args))

    # Records that are items by themselves are copied by the loop.
    records = any(layout.ndim and layout.dtype.names is not None for layout in layouts)
    try:
        least = _least(records, extras, writable=writable)
        signature, writable_args = _resolve_any(kernel, arguments, least)
    except ForceLiteralArg:
        return None  # it is compiled for values, which numba knows when it is called
    if not kernel._can_compile and not _takes_as_they_are(signature, arguments(writable_args)):
        return None
    if any(isinstance(kind, types.Array) for kind in arguments(writable_args)) and any(
        map(_makes_objects_of_arrays, kernel.overloads.values())
    ):
        return None
    if out is not None:
        return KernelResult((out.dtype,), is_tuple=False, writable_args=writable_args)
    scalars = _result_dtypes(signature.return_type)
    return None if scalars is None else KernelResult(*scalars, writable_args)


def _makes_objects_of_arrays(overload: Any) -> bool:
    """Whether compiled code, or what it calls, makes Python objects of arrays.

    It does where it turns to Python code (`objmode`), and for exceptions that have an array among
    their arguments. Python may keep them, but arrays of loops lie over memory that they do not own.
    """
    return _TO_PYTHON in str(overload.library._get_module_for_linking())


def _result_dtypes(kind: types.Type) -> tuple[tuple[np.dtype[Any], ...], bool] | None:
    """The dtypes of a scalar or of a tuple of them, and which it is; None for anything else."""
    is_tuple = isinstance(kind, types.BaseTuple)
    parts = list(kind) if is_tuple else [kind]
    dtypes = [_to_dtype(part) for part in parts]
    if not dtypes or any(dtype is None for dtype in dtypes):
        return None  # arrays, None, text: stacked one by one
    return tuple(d for d in dtypes if d is not None), is_tuple


def _to_dtype(kind: types.Type) -> np.dtype[Any] | None:
    kind = types.unliteral(kind)
    if isinstance(
        kind, (types.Number, types.Boolean, types.NPDatetime, types.NPTimedelta, types.Record)
    ):
        return np.dtype(numpy_support.as_dtype(kind))
    return None


_compiling = ModuleLock()


def compile_loop(
    kernel: Any,
    layouts: Sequence[ArrayLayout],
    extras: ExtraArgs,
    outs: Sequence[ArrayLayout],
    found: KernelResult,
    *,
    rows_out: bool,
) -> Callable[..., None]:
    """The compiled loop for a kernel over arrays that lie so; made once for what `infer_result` found.

    Its arguments are the addresses of the ledger's words and of the worker's row in it, the items
    that are left of a range (begin, end), the worker's own ranges (first, last; last is -1 where
    ranges are claimed), the numbers of ranges, of items in each and of all items; then for each
    array and each output address, stride, shape and strides of an item; then the extras, arrays
    as address, shape and strides.
    """
    loops, key = found.loops, tuple(outs)
    if key not in loops:  # looked up before: nobody waits for other kernels to be compiled
        with _compiling:
            if key not in loops:
                extra_types = types_of(extras.all, writable=found.writable_args.args)
                row_at = len(extras.before) if rows_out else None
                loops[key] = _compile(kernel, layouts, extra_types, outs, found, row_at=row_at)
    return loops[key]


def _compile(
    kernel: Any,
    layouts: Sequence[ArrayLayout],
    extra_types: Sequence[types.Type],
    outs: Sequence[ArrayLayout],
    found: KernelResult,
    *,
    row_at: int | None,
) -> Callable[..., None]:
    word = types.int64
    names: dict[str, Any] = {
        "kernel": kernel,
        "np": np,
        "take": _take,
        "load": _load,
        "store": _store,
        "copy": _copy,
    }
    parameters = ["words", "row", "begin", "end", "first", "last", "n_chunks", "size", "n_items"]
    signature: list[types.Type] = [word] * len(parameters)
    before: list[str] = []
    within: list[str] = []
    arguments: list[str] = []

    def add_array(name: str, layout: ArrayLayout, *, writable: bool) -> str:
        """Say how an array comes into the loop; the expression for its item `i`."""
        parameters.extend([name, f"{name}_step", f"{name}_shape", f"{name}_steps"])
        signature.extend([word, word, *[types.UniTuple(word, layout.ndim)] * 2])
        if layout.ndim:
            names[f"{name}_at"] = _maker(layout.type(ndim=layout.ndim, writable=writable))
            return f"{name}_at({name} + i * {name}_step, {name}_shape, {name}_steps)"
        names[f"{name}_at"] = _maker(layout.type(ndim=1, writable=writable))
        before.append(f"{name}_all = {name}_at({name}, (n_items,), ({name}_step,))")
        return f"{name}_all[i]"

    for number, layout in enumerate(layouts):
        item = add_array(f"x{number}", layout, writable=found.writable_args.items)
        if layout.ndim == 0 and layout.dtype.names is not None:
            # A record in compiled code is a pointer: the kernel would write to the caller's.
            names[f"r{number}_dtype"] = layout.dtype
            before.append(f"r{number} = np.empty(1, r{number}_dtype)")
            within.append(f"r{number}[0] = {item}")
            item = f"r{number}[0]"
        arguments.append(item)
    targets = [add_array(f"y{n}", layout, writable=True) for n, layout in enumerate(outs)]
    for number, kind in enumerate(extra_types):
        name = f"a{number}"
        if isinstance(kind, types.Array):
            parameters.extend([name, f"{name}_shape", f"{name}_steps"])
            signature.extend([word, *[types.UniTuple(word, kind.ndim)] * 2])
            names[f"{name}_at"] = _maker(kind)
            before.append(f"{name}_all = {name}_at({name}, {name}_shape, {name}_steps)")
            arguments.append(f"{name}_all")
        else:
            parameters.append(name)
            signature.append(kind)
            arguments.append(name)
    if row_at is not None:  # so many of the extras come before it
        names["row_dtype"] = found.dtypes[0]
        before += [
            "filled = np.empty(y0_shape, row_dtype)",
            "filled_at, filled_nbytes = filled.ctypes.data, filled.nbytes",
        ]
        arguments.insert(len(layouts) + row_at, "filled")
        within.append(f"kernel({', '.join(arguments)})")
        written = [_put_in_place(targets[0], outs[0], found.dtypes[0])]
    else:
        within.append(f"value = kernel({', '.join(arguments)})")
        written = [
            f"{target} = value[{n}]" if found.is_tuple else f"{target} = value"
            for n, target in enumerate(targets)
        ]
    # The call may have been interrupted meanwhile: then nothing is written any more.
    within += ["if load(words) != 0:", "    return", *written]
    source = _LOOP.format(
        parameters=", ".join(parameters),
        before="\n    ".join(before) or "pass",
        within="\n            ".join(within),
        COUNTER_AT=COUNTER_AT,
        IN_HAND_AT=IN_HAND_AT,
        ITEM_AT=ITEM_AT,
        ITEMS_AT=ITEMS_AT,
        RANGES_AT=RANGES_AT,
    )
    exec(compile(source, f"<fused loop over {kernel.__name__}>", "exec"), names)
    loop: Any = numba.njit(nogil=True, **_inherit_options(kernel))(names["loop"])
    loop.compile(tuple(signature))
    loop.disable_compile()
    run: Callable[..., None] = loop
    return run


def _put_in_place(target: str, layout: ArrayLayout, dtype: np.dtype[Any]) -> str:
    """The statement that copies a filled row of some dtype to its place in the output."""
    if layout.ndim == 0:
        return f"{target} = filled[()]"
    if layout.layout == "C" and layout.dtype == dtype:
        # Assigning takes compiled code about 1 ns an element: 5 % of a picture of small numbers.
        return "copy(y0 + i * y0_step, filled_at, filled_nbytes)"
    return f"{target}[...] = filled"


# What every fused loop does; how arrays, kernel and results look like is filled in.
_LOOP = """
def loop({parameters}):
    {before}
    while True:
        if begin >= end:
            if load(words) != 0:
                return
            if last < 0:
                index = take(words + {COUNTER_AT})
                if index >= n_chunks:
                    return
            else:
                index = first
                first += 1
                if index >= last:
                    return
            store(row + {IN_HAND_AT}, index)
            begin = index * size
            end = min(begin + size, n_items)
        for i in range(begin, end):
            if load(words) != 0:
                return
            store(row + {ITEM_AT}, i)
            {within}
        store(row + {ITEMS_AT}, load(row + {ITEMS_AT}) + end - begin)
        store(row + {RANGES_AT}, load(row + {RANGES_AT}) + 1)
        store(row + {IN_HAND_AT}, -1)
        begin = end
"""


def _inherit_options(kernel: Any) -> dict[str, Any]:
    """Options that a function around a kernel must have too: the kernel may be inlined into it."""
    options = kernel.targetoptions
    names = ("boundscheck", "error_model", "fastmath")
    return {name: options[name] for name in names if name in options}


def without_gil(kernel: Any, n_arguments: int) -> Any:
    """The kernel itself, called from compiled code that has let go of the GIL."""
    with _compiling:
        made = _get_made(kernel).without_gil
        if n_arguments not in made:
            # Not `*args`: compiled beforehand for these, it is compiled again when called.
            names = ", ".join(f"a{n}" for n in range(n_arguments))
            source = f"def called({names}):\n    return kernel({names})\n"
            namespace: dict[str, Any] = {"kernel": kernel}
            exec(compile(source, f"<call of {kernel.__name__}>", "exec"), namespace)
            made[n_arguments] = numba.njit(nogil=True, **_inherit_options(kernel))(
                namespace["called"]
            )
        return made[n_arguments]


def compile_kernel(
    kernel: Any, chunks: Sequence[np.ndarray], extras: ExtraArgs, *, writable: bool
) -> tuple[Callable[..., Any], WritableArgs, tuple[tuple[np.dtype[Any], ...], bool] | None]:
    """What to call with chunks like these, compiled, what it must be able to write to.

    And what it returns, if that is scalars: their dtypes, and whether they come as a tuple.
    """
    _bind(kernel, len(chunks), extras.all, {}, fills=False)

    def arguments(writable_args: WritableArgs) -> tuple[types.Type, ...]:
        return (
            *types_of(chunks, writable=writable_args.items),
            *types_of(extras.all, writable=writable_args.args),
        )

    try:
        least = _least(any(map(_has_fields, chunks)), extras, writable=writable)
        signature, writable_args = _resolve_any(kernel, arguments, least)
    except ForceLiteralArg:  # as above
        return kernel, WritableArgs(items=writable), None
    if not kernel._can_compile and not _takes_as_they_are(signature, arguments(writable_args)):
        return kernel, writable_args, None
    called: Any = without_gil(kernel, len(chunks) + len(extras.all))
    called.compile(arguments(writable_args))
    return called, writable_args, _result_dtypes(signature.return_type)
