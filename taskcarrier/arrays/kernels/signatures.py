"""What a kernel takes and returns, in numba's types: layouts of arrays, arguments, signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.errors import ForceLiteralArg, TypingError
from numba.core.registry import cpu_target
from numba.np import numpy_support

from taskcarrier.memory.strides import move_items_first
from taskcarrier.memory.views import make_read_only
from taskcarrier.notes import add_note, count_noun
from taskcarrier.record import record


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


@record
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
    bound = bind(kernel, n_items, args, kwargs, fills=fills)
    bound.apply_defaults()
    n_before = n_items + len(args)
    return ExtraArgs(args, bound.args[n_before + fills :])


def bind(
    kernel: Any, n_items: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, fills: bool
) -> inspect.BoundArguments:
    """Bind the arguments of a kernel; raise a `TypeError` that names them if they do not fit."""
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


def get_min_writable_args(records: bool, extras: ExtraArgs, *, writable: bool) -> WritableArgs:
    """Return what every kernel is assumed to write to: numba lets any kernel write to records."""
    return WritableArgs(writable or records, any(map(has_fields, extras.all)))


def has_fields(value: Any) -> bool:
    """Return whether a value is a record, or an array of records."""
    return getattr(getattr(value, "dtype", None), "names", None) is not None


_LITERALS_NOTE = (
    "the kernel is called from Python: numba compiles it for values of its arguments (literally), "
    "which are known when it is called"
)
_CONVERTING_NOTE = (
    "the kernel is called from Python: its signatures take other numbers than it is given, which "
    "compiled code would convert unchecked; leave the signatures out, or pass the types they name"
)


@dataclass(frozen=True, kw_only=True)
class KernelSignature:
    """What numba makes of a kernel and the types of its arguments.

    Attributes
    ----------
    return_type : numba type, optional
        The type that the kernel returns; None if numba does not know before the call.
    writable_args : WritableArgs
        Which arguments the kernel writes to.
    note : str
        Why compiled code must not call the kernel, which is called from Python then; else empty.
    """

    return_type: types.Type | None
    writable_args: WritableArgs
    note: str = ""


def find_signature(
    kernel: Any, get_types: Callable[[WritableArgs], tuple[types.Type, ...]], minimum: WritableArgs
) -> KernelSignature:
    """Compile a kernel; return its signature, which writes to no more than `minimum` if possible.

    `get_types` returns the types of all arguments, those that are written to as writable.

    Raises
    ------
    TypingError
        If the kernel cannot be compiled for them.
    """
    try:
        signature, writable_args = _resolve_writable_args(kernel, get_types, minimum)
    except ForceLiteralArg:
        return KernelSignature(return_type=None, writable_args=minimum, note=_LITERALS_NOTE)
    is_exact = kernel._can_compile or _takes_unconverted(signature, get_types(writable_args))
    return KernelSignature(
        return_type=signature.return_type,
        writable_args=writable_args,
        note="" if is_exact else _CONVERTING_NOTE,
    )


def _resolve(kernel: Any, arguments: tuple[types.Type, ...]) -> Any:
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
        return _resolve(kernel, get_types(minimum)), minimum
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
                    return _resolve(kernel, get_types(writable_args)), writable_args
        elif "Cannot modify readonly" in str(error):
            add_note(
                error,
                "items, chunks and arrays in args are read-only; writable=True gives private "
                "copies of items and chunks",
            )
        raise


def _takes_unconverted(signature: Any, arguments: tuple[types.Type, ...]) -> bool:
    """Return whether no number would be converted to fit the signature.

    Between compiled functions numba converts numbers whether they fit or not (-1 becomes the
    largest number), and picks any signature that would do. Called from Python, it refuses both.
    """
    return all(
        given_type == wanted_type
        for given_type, wanted_type in zip(arguments, signature.args, strict=True)
        if isinstance(given_type, (types.Number, types.Boolean))
    )


def get_result_dtypes(kind: types.Type) -> tuple[tuple[np.dtype[Any], ...], bool] | None:
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
