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
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.errors import NumbaError, TypingError
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np import numpy_support
from numba.np.arrayobj import make_array, populate_array

from taskcarrier.backends.crews import at_shutdown
from taskcarrier.backends.work import add_note
from taskcarrier.ledger import CURSOR_AT, IN_HAND_AT, ITEM_AT, ITEMS_AT, RANGES_AT

_WORD = ir.IntType(64)


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
    """The number at an address, looked at anew each time."""

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
class Lie:
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
    def of(cls, array: np.ndarray, axis: int) -> Lie:
        """Of an array whose items lie along `axis`."""
        item = np.moveaxis(array, axis, 0)
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


@dataclass(frozen=True, eq=False)
class Returns:
    """What a kernel gives for one item.

    Attributes
    ----------
    dtypes : tuple of dtype
        Of each result.
    several : bool
        Whether it is a tuple.
    takes_copies : bool
        Whether the kernel's signature wants arrays that it may write to.
    """

    dtypes: tuple[np.dtype[Any], ...]
    several: bool
    takes_copies: bool


def bound(
    kernel: Any, n_items: int, args: tuple[Any, ...], kwargs: dict[str, Any], n_after: int = 0
) -> tuple[Any, ...]:
    """`args` and `kwargs` as positional arguments that follow the items.

    Raises
    ------
    TypeError
        If the kernel does not take them, before anything is compiled.
    """
    if not kwargs:
        return args
    signature = inspect.signature(kernel.py_func)
    names = list(signature.parameters)
    given = names[: len(names) - n_after]
    after = dict.fromkeys(names[len(given) :])
    found = signature.bind(*[None] * n_items, *args, **kwargs, **after)
    found.apply_defaults()
    return tuple(found.arguments[name] for name in given[n_items:])


def typed(extras: Sequence[Any], *, writable: bool) -> tuple[types.Type, ...]:
    """The types of further arguments; arrays among them are read-only unless `writable`."""
    return tuple(
        numba.typeof(value).copy(readonly=not writable)
        if isinstance(value, np.ndarray)
        else numba.typeof(value)
        for value in extras
    )


def resolved(kernel: Any, arguments: tuple[types.Type, ...]) -> types.Type:
    """What the kernel returns for arguments of these types; it is compiled for them by then.

    Raises
    ------
    TypingError
        If it cannot be.
    """
    signature = cpu_target.typing_context.resolve_function_type(numba.typeof(kernel), arguments, {})
    if signature is None:
        names = ", ".join(map(str, arguments))
        raise TypingError(f"{kernel.__name__} has no signature for ({names})")
    return signature.return_type


def _resolved_either_way(
    kernel: Any, arguments: Callable[[bool], tuple[types.Type, ...]], writable: bool
) -> tuple[types.Type, bool]:
    """The kernel's return type, and whether it must get arrays that it may write to.

    Kernels with explicit signatures take what these say; others take read-only arrays.
    """
    try:
        return resolved(kernel, arguments(writable)), writable
    except TypingError as error:
        if writable:
            raise
        if not kernel._can_compile:
            try:
                return resolved(kernel, arguments(True)), True
            except TypingError:
                pass  # the first error says more
        elif "readonly" in str(error).lower() or "read-only" in str(error).lower():
            add_note(error, "items and chunks are read-only; pass writable=True for private copies")
        raise


def returns(
    kernel: Any,
    lies: Sequence[Lie],
    extras: Sequence[Any],
    out: Lie | None,
    *,
    writable: bool,
) -> Returns | None:
    """What a kernel gives for an item, or None if a loop over it cannot be fused.

    Parameters
    ----------
    kernel : numba dispatcher
        The function of items.
    lies : sequence of Lie
        How the mapped arrays lie.
    extras : sequence
        Further arguments.
    out : Lie or None
        How the output lies into whose rows the kernel writes; None if it returns its results.
    writable : bool
        Whether it is to get private copies.
    """
    if any(lie.dtype.hasobject for lie in lies):
        return None
    try:
        for lie in lies:
            lie.item(writable=False)
        extra_types = typed(extras, writable=False)
    except (NumbaError, ValueError):
        return None  # a dtype or an argument that numba does not know
    # Numba takes 0.15 ms to look it up.
    key = (tuple(lies), extra_types, out, writable)
    known = _made_for(kernel).returns
    if key not in known:
        known[key] = _found_out(kernel, lies, extras, out, writable=writable)
    return known[key]


class _Made:
    """What was made for one kernel."""

    def __init__(self) -> None:
        self.returns: dict[Any, Returns | None] = {}
        self.loops: dict[Any, Callable[..., None]] = {}
        self.without_gil: dict[int, Any] = {}


# Numba keeps what a compiled function refers to for as long as that function lives, so neither a
# weak table nor an attribute of the kernel would let go of kernel and loop: the last ones are kept.
_MAX_KERNELS = 32  # arbitrary
_made: OrderedDict[Any, _Made] = OrderedDict()
_making = threading.Lock()
at_shutdown(_made.clear)


def _made_for(kernel: Any) -> _Made:
    with _making:
        made = _made.pop(kernel, None) or _Made()
        _made[kernel] = made
        if len(_made) > _MAX_KERNELS:
            _made.popitem(last=False)
    return made


def _found_out(
    kernel: Any,
    lies: Sequence[Lie],
    extras: Sequence[Any],
    out: Lie | None,
    *,
    writable: bool,
) -> Returns | None:
    def arguments(copies: bool) -> tuple[types.Type, ...]:
        items = tuple(lie.item(writable=copies) for lie in lies)
        after = () if out is None else (out.item(writable=True),)
        return (*items, *typed(extras, writable=copies), *after)

    kind, copies = _resolved_either_way(kernel, arguments, writable)
    if out is not None:
        return Returns((out.dtype,), several=False, takes_copies=copies)
    several = isinstance(kind, types.BaseTuple)
    parts = list(kind) if several else [kind]
    dtypes = [_as_dtype(part) for part in parts]
    if not dtypes or any(dtype is None for dtype in dtypes):
        return None  # arrays, None, text: stacked one by one
    return Returns(tuple(d for d in dtypes if d is not None), several, copies)


def _as_dtype(kind: types.Type) -> np.dtype[Any] | None:
    kind = types.unliteral(kind)
    if isinstance(
        kind, (types.Number, types.Boolean, types.NPDatetime, types.NPTimedelta, types.Record)
    ):
        return np.dtype(numpy_support.as_dtype(kind))
    return None


_compiling = threading.Lock()


def fused_loop(
    kernel: Any,
    lies: Sequence[Lie],
    extras: Sequence[Any],
    outs: Sequence[Lie],
    found: Returns,
    *,
    rows_out: bool,
) -> Callable[..., None]:
    """The compiled loop for a kernel over arrays that lie so; made once.

    Its arguments are the addresses of the ledger's words and of the worker's row in it, the items
    that are left of a range (begin, end), the worker's own ranges (first, last; last is -1 where
    ranges are claimed), the numbers of ranges, of items in each and of all items; then for each
    array and each output address, stride, shape and strides of an item; then the extras, arrays
    as address, shape and strides.
    """
    copies = found.takes_copies
    extra_types = typed(extras, writable=copies)
    key = (tuple(lies), tuple(outs), extra_types, found.several, copies, rows_out)
    with _compiling:
        loops = _made_for(kernel).loops
        if key not in loops:
            loops[key] = _compiled(kernel, lies, extra_types, outs, found, rows_out=rows_out)
        return loops[key]


def _compiled(
    kernel: Any,
    lies: Sequence[Lie],
    extra_types: Sequence[types.Type],
    outs: Sequence[Lie],
    found: Returns,
    *,
    rows_out: bool,
) -> Callable[..., None]:
    word = types.int64
    names: dict[str, Any] = {"kernel": kernel, "take": _take, "load": _load, "store": _store}
    names |= {"np": np}
    parameters = ["words", "row", "begin", "end", "first", "last", "n_cells", "size", "n_items"]
    signature: list[types.Type] = [word] * len(parameters)
    before: list[str] = []
    within: list[str] = []
    arguments: list[str] = []

    def add_array(name: str, lie: Lie, *, writable: bool) -> str:
        """Say how an array comes into the loop; the expression for its item `i`."""
        parameters.extend([name, f"{name}_step", f"{name}_shape", f"{name}_steps"])
        signature.extend([word, word, *[types.UniTuple(word, lie.ndim)] * 2])
        if lie.ndim:
            names[f"{name}_at"] = _maker(lie.type(ndim=lie.ndim, writable=writable))
            return f"{name}_at({name} + i * {name}_step, {name}_shape, {name}_steps)"
        names[f"{name}_at"] = _maker(lie.type(ndim=1, writable=writable))
        before.append(f"{name}_all = {name}_at({name}, (n_items,), ({name}_step,))")
        return f"{name}_all[i]"

    for number, lie in enumerate(lies):
        item = add_array(f"x{number}", lie, writable=found.takes_copies)
        if lie.ndim == 0 and lie.dtype.names is not None:
            # A record in compiled code is a pointer: the kernel would write to the caller's.
            names[f"r{number}_dtype"] = lie.dtype
            before.append(f"r{number} = np.empty(1, r{number}_dtype)")
            within.append(f"r{number}[0] = {item}")
            item = f"r{number}[0]"
        arguments.append(item)
    targets = [add_array(f"y{n}", lie, writable=True) for n, lie in enumerate(outs)]
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
    if rows_out:
        within.append(f"kernel({', '.join([*arguments, *targets])})")
    else:
        within.append(f"value = kernel({', '.join(arguments)})")
        within += [
            f"{target} = value[{n}]" if found.several else f"{target} = value"
            for n, target in enumerate(targets)
        ]
    source = _LOOP.format(
        parameters=", ".join(parameters),
        before="\n    ".join(before) or "pass",
        within="\n            ".join(within),
        CURSOR_AT=CURSOR_AT,
        IN_HAND_AT=IN_HAND_AT,
        ITEM_AT=ITEM_AT,
        ITEMS_AT=ITEMS_AT,
        RANGES_AT=RANGES_AT,
    )
    exec(compile(source, f"<fused loop over {kernel.__name__}>", "exec"), names)
    loop: Any = numba.njit(nogil=True, error_model="numpy", boundscheck=False)(names["loop"])
    loop.compile(tuple(signature))
    loop.disable_compile()
    run: Callable[..., None] = loop
    return run


# What every fused loop does; how arrays, kernel and results look like is filled in.
_LOOP = """
def loop({parameters}):
    {before}
    while True:
        if begin >= end:
            if load(words) != 0:
                return
            if last < 0:
                cell = take(words + {CURSOR_AT})
                if cell >= n_cells:
                    return
            else:
                cell = first
                first += 1
                if cell >= last:
                    return
            store(row + {IN_HAND_AT}, cell)
            begin = cell * size
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


def without_gil(kernel: Any, n_arguments: int) -> Any:
    """The kernel itself, called from compiled code that has let go of the GIL."""
    with _compiling:
        made = _made_for(kernel).without_gil
        if n_arguments not in made:
            # Not `*args`: compiled beforehand for these, it is compiled again when called.
            names = ", ".join(f"a{n}" for n in range(n_arguments))
            source = f"def called({names}):\n    return kernel({names})\n"
            namespace: dict[str, Any] = {"kernel": kernel}
            exec(compile(source, f"<call of {kernel.__name__}>", "exec"), namespace)
            made[n_arguments] = numba.njit(nogil=True)(namespace["called"])
        return made[n_arguments]


def compiled_for(
    kernel: Any, chunks: Sequence[np.ndarray], extras: Sequence[Any], *, writable: bool
) -> tuple[Callable[..., Any], bool]:
    """What to call with chunks like these, compiled, and whether chunks must be private copies."""

    def arguments(copies: bool) -> tuple[types.Type, ...]:
        return (*typed(chunks, writable=copies), *typed(extras, writable=copies))

    _, copies = _resolved_either_way(kernel, arguments, writable)
    called: Any = without_gil(kernel, len(chunks) + len(extras))
    called.compile(arguments(copies))
    return called, copies
