"""The source of fused loops: loops over items that claim their chunks themselves, without Python.

Such a loop claims the next chunk from the ledger with one atomic instruction (10 ns), calls the
kernel for every item, and writes each result in place: no Python runs between items, nor between
chunks. The loop takes addresses, not arrays. Items that are rows are also made from addresses,
always as read-only arrays: so one signature and one compilation serve any array. Loops are closures
over their kernel, which numba's cache on disk never finds again, so they are not cached there.

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

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from numba import types

from taskcarrier.arrays.kernels.intrinsics import (
    copy_bytes,
    load,
    make_array_intrinsic,
    store,
    take,
)
from taskcarrier.arrays.kernels.signatures import ArrayLayout, KernelResult
from taskcarrier.scheduling.ledger import COUNTER_AT, IN_HAND_AT, ITEM_AT, ITEMS_AT, RANGES_AT

_WORDS = (
    "ledger",
    "worker_row",
    "begin",
    "end",
    "next_own",
    "stop_own",
    "n_chunks",
    "chunksize",
    "n_items",
)


def build_loop(
    kernel: Any,
    layouts: Sequence[ArrayLayout],
    extra_types: Sequence[types.Type],
    outs: Sequence[ArrayLayout],
    result: KernelResult,
    *,
    row_at: int | None,
) -> Callable[..., None]:
    """Compile a loop for a kernel and arrays of these layouts.

    `row_at` is the number of extras before the row that the kernel fills, if it fills one.
    """
    source = write_loop(kernel, layouts, extra_types, outs, result, row_at=row_at)
    loop: Any = numba.njit(nogil=True, **get_inherited_options(kernel))(source.make_function())
    loop.compile(tuple(source.signature))
    loop.disable_compile()
    run: Callable[..., None] = loop
    return run


def write_loop(
    kernel: Any,
    layouts: Sequence[ArrayLayout],
    extra_types: Sequence[types.Type],
    outs: Sequence[ArrayLayout],
    result: KernelResult,
    *,
    row_at: int | None,
) -> LoopSource:
    """Return the source of the loop that `build_loop` compiles."""
    source = LoopSource(kernel)
    items = [
        source.add_items(f"x{n}", layout, writable=result.writable_args.items)
        for n, layout in enumerate(layouts)
    ]
    targets = [source.add_array(f"y{n}", out, writable=True) for n, out in enumerate(outs)]
    extras = [source.add_extra(f"a{n}", kind) for n, kind in enumerate(extra_types)]
    if row_at is None:
        source.add_call([*items, *extras], targets, is_tuple=result.is_tuple)
    else:
        arguments = [*items, *extras[:row_at], "out_row", *extras[row_at:]]
        source.add_row_call(arguments, targets[0], outs[0], result.dtypes[0])
    return source


class LoopSource:
    """The source of one fused loop, to which arrays, arguments and the call are added in order."""

    def __init__(self, kernel: Any) -> None:
        self.signature: list[types.Type] = [types.int64] * len(_WORDS)
        self._parameters = [*_WORDS]
        self._setup: list[str] = []
        self._body: list[str] = []
        self._namespace: dict[str, Any] = {
            "kernel": kernel,
            "np": np,
            "take": take,
            "load": load,
            "store": store,
            "copy": copy_bytes,
        }

    def add_array(self, name: str, layout: ArrayLayout, *, writable: bool) -> str:
        """Pass an array to the loop; return the expression for its item `i`."""
        shape, strides = f"{name}_item_shape", f"{name}_item_strides"
        self._parameters += [name, f"{name}_stride", shape, strides]
        self.signature += [types.int64] * 2 + [types.UniTuple(types.int64, layout.ndim)] * 2
        array_type = layout.type(ndim=layout.ndim or 1, writable=writable)
        self._namespace[f"make_{name}"] = make_array_intrinsic(array_type)
        if layout.ndim:
            return f"make_{name}({name} + i * {name}_stride, {shape}, {strides})"
        self._setup.append(f"{name}_all = make_{name}({name}, (n_items,), ({name}_stride,))")
        return f"{name}_all[i]"

    def add_items(self, name: str, layout: ArrayLayout, *, writable: bool) -> str:
        """Pass a mapped array to the loop; return the expression for the item of the kernel."""
        item = self.add_array(name, layout, writable=writable)
        if layout.ndim or layout.dtype.names is None:
            return item
        # A record in compiled code is a pointer: the kernel would write to the caller's record.
        self._namespace[f"{name}_dtype"] = layout.dtype
        self._setup.append(f"{name}_copy = np.empty(1, {name}_dtype)")
        self._body.append(f"{name}_copy[0] = {item}")
        return f"{name}_copy[0]"

    def add_extra(self, name: str, kind: types.Type) -> str:
        """Pass a further argument to the loop; return the expression for it."""
        if not isinstance(kind, types.Array):
            self._parameters.append(name)
            self.signature.append(kind)
            return name
        self._parameters += [name, f"{name}_shape", f"{name}_strides"]
        self.signature += [types.int64] + [types.UniTuple(types.int64, kind.ndim)] * 2
        self._namespace[f"make_{name}"] = make_array_intrinsic(kind)
        self._setup.append(f"{name}_all = make_{name}({name}, {name}_shape, {name}_strides)")
        return f"{name}_all"

    def add_call(self, arguments: list[str], targets: list[str], *, is_tuple: bool) -> None:
        """Call the kernel, and write what it returns."""
        writes = [
            f"{target} = value[{n}]" if is_tuple else f"{target} = value"
            for n, target in enumerate(targets)
        ]
        self._add_call(f"value = kernel({', '.join(arguments)})", writes)

    def add_row_call(
        self, arguments: list[str], target: str, layout: ArrayLayout, dtype: np.dtype[Any]
    ) -> None:
        """Call the kernel, and write the row that it has filled."""
        self._namespace["row_dtype"] = dtype
        self._setup += [
            "out_row = np.empty(y0_item_shape, row_dtype)",
            "out_row_address, out_row_nbytes = out_row.ctypes.data, out_row.nbytes",
        ]
        write = _make_row_write(target, layout, dtype)
        self._add_call(f"kernel({', '.join(arguments)})", [write])

    def _add_call(self, call: str, writes: list[str]) -> None:
        # The call may have been interrupted meanwhile: then nothing may be written any more.
        self._body += [call, "if load(ledger) != 0:", "    return", *writes]

    def __str__(self) -> str:
        return _LOOP.format(
            parameters=", ".join(self._parameters),
            setup="\n    ".join(self._setup) or "pass",
            body="\n            ".join(self._body),
            COUNTER_AT=COUNTER_AT,
            IN_HAND_AT=IN_HAND_AT,
            ITEM_AT=ITEM_AT,
            ITEMS_AT=ITEMS_AT,
            RANGES_AT=RANGES_AT,
        )

    def make_function(self) -> Callable[..., None]:
        """Return the loop as a Python function, to be compiled."""
        name = self._namespace["kernel"].__name__
        exec(compile(str(self), f"<fused loop over {name}>", "exec"), self._namespace)
        loop: Callable[..., None] = self._namespace["loop"]
        return loop


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


def get_inherited_options(kernel: Any) -> dict[str, Any]:
    """Return the options that a function around a kernel needs too: numba may inline the kernel."""
    options = kernel.targetoptions
    names = ("boundscheck", "error_model", "fastmath")
    return {name: options[name] for name in names if name in options}
