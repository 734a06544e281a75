"""The layout of arrays in memory: arithmetic on addresses, shapes and strides."""

from __future__ import annotations

import numpy as np

# A copy has the address of the original modulo a cache line, so that loops which treat an unaligned
# start specially do the same work on the copy.
ALIGNMENT = 64


def is_mostly_gaps(array: np.ndarray) -> bool:
    """Return whether a view spreads over more than twice the bytes of its items."""
    if array.flags.forc or array.nbytes == 0:
        return False
    low, high = byte_bounds(array)
    return high - low > 2 * array.nbytes


def move_items_first(array: np.ndarray, axis: int) -> np.ndarray:
    """Return a view with the mapped axis first."""
    # `moveaxis` takes 2 µs, and a call of 0.2 ms would need several (`python -m bench kernels`).
    return array if axis == 0 else np.moveaxis(array, axis, 0)


def copy_without_gaps(array: np.ndarray) -> np.ndarray:
    """Copy a non-empty array without gaps, with the order and the signs of its strides."""
    strides = _dense_strides(array)
    ends = [(n - 1) * stride for n, stride in zip(array.shape, strides, strict=True)]
    memory = np.empty(sum(map(abs, ends)) + array.itemsize, np.uint8)
    start = -sum(end for end in ends if end < 0)
    copy: np.ndarray = np.ndarray(array.shape, array.dtype, memory, start, strides)
    copy[...] = array
    return copy


def _dense_strides(array: np.ndarray) -> tuple[int, ...]:
    """Return strides without gaps, with the order and the signs of those of `array`."""
    strides = [0] * array.ndim
    step = array.itemsize
    for axis in sorted(range(array.ndim), key=lambda axis: abs(array.strides[axis])):
        if array.strides[axis]:
            strides[axis] = step if array.strides[axis] > 0 else -step
            step *= array.shape[axis]
    return tuple(strides)


def contiguous_strides(shape: tuple[int, ...], itemsize: int, order: str) -> tuple[int, ...]:
    """Return the strides of a contiguous array in C or Fortran order (``"C"``, ``"F"``)."""
    strides = []
    step = itemsize
    for length in shape if order == "F" else reversed(shape):
        strides.append(step)
        step *= length
    return tuple(strides) if order == "F" else tuple(reversed(strides))


def byte_bounds(array: np.ndarray) -> tuple[int, int]:
    """Return the address of a non-empty array's lowest byte, and that after its highest byte."""
    low = high = address_of(array)
    for n, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            low += (n - 1) * stride
        else:
            high += (n - 1) * stride
    return low, high + array.itemsize


def count_copy_nbytes(array: np.ndarray) -> int:
    """Return the bytes that a copy of the array takes, with room for alignment."""
    if array.nbytes == 0:
        return 0
    low, high = byte_bounds(array)
    return high - low + 2 * ALIGNMENT


def address_of(array: np.ndarray) -> int:
    """Return the address of the first item (not of the lowest byte, if strides are negative)."""
    address: int = array.__array_interface__["data"][0]
    return address


class _RawMemory:
    """Bytes at an address, in the form of NumPy's array interface."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (address, True),
        }


def view_bytes(address: int, nbytes: int) -> memoryview:
    """Return the memory at an address, read-only; it must stay alive while it is used."""
    return np.asarray(_RawMemory(address, nbytes)).data


def align(nbytes: int) -> int:
    """Round up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def has_internal_overlap(array: np.ndarray) -> bool:
    """Return whether two items of an array may lie in the same memory.

    The strides decide: items do not overlap if the axes nest in each other.
    """
    if array.size <= 1:
        return False
    reach = array.itemsize
    for stride, n in sorted(
        (abs(stride), n) for n, stride in zip(array.shape, array.strides, strict=True) if n > 1
    ):
        if stride < reach:
            return True
        reach = (n - 1) * stride + reach
    return False
