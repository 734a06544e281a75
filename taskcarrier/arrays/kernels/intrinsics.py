"""Instructions that Python has not, for loops that numba compiles: memory by its address.

The words of a ledger are read, written and advanced in one step each, so that threads without the
GIL agree on them. Arrays are made from addresses, because counting references to an array that
several threads use costs 7 to 8 %.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import numpy_support
from numba.np.arrayobj import make_array, populate_array

_WORD = ir.IntType(64)


def _to_pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


@intrinsic
def take(_context: Any, _address: Any) -> Any:
    """Return the number at an address and add one to it, in one step for all threads."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = _to_pointer(builder, args[0])
        return builder.atomic_rmw("add", pointer, ir.Constant(_WORD, 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def load(_context: Any, _address: Any) -> Any:
    """Return the number at an address, which is read from memory each time."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load_atomic(_to_pointer(builder, args[0]), "monotonic", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store(_context: Any, _address: Any, _value: Any) -> Any:
    """Write a number to an address that other threads may read."""

    def codegen(target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _to_pointer(builder, args[0]), "monotonic", 8)
        return target.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def copy_bytes(_context: Any, _to: Any, _begin: Any, _nbytes: Any) -> Any:
    """Copy bytes from one address to another."""

    def codegen(target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        to, begin = (builder.inttoptr(address, cgutils.voidptr_t) for address in args[:2])
        cgutils.raw_memcpy(builder, to, begin, args[2], 1)
        return target.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def make_array_intrinsic(array_type: types.Array) -> Any:
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
