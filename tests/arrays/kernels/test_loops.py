"""The source of fused loops; what they do is tested in `test_fused`."""

import ast
import textwrap

import numba
import numpy as np

from taskcarrier.arrays.kernels import loops
from taskcarrier.arrays.kernels.signatures import ArrayLayout, KernelResult, WritableArgs

SCALARS = ArrayLayout(np.dtype("f8"), 0, "C", True)
RECORDS = ArrayLayout(np.dtype([("a", "f8")]), 0, "C", True)
ROWS = ArrayLayout(np.dtype("f8"), 1, "C", True)


def source(layouts, extra_types, outs, row_at=None, *, is_tuple=False):
    result = KernelResult((np.dtype("f8"),) * len(outs), is_tuple, WritableArgs(items=False))
    return str(loops.write_loop(abs, layouts, extra_types, outs, result, row_at=row_at))


def test_the_documented_loop_is_the_one_that_is_made():
    begin = loops.__doc__.index("    def loop(")
    documented = textwrap.dedent(loops.__doc__[begin : loops.__doc__.index("``x0`` is")])
    made = source([SCALARS], [], [SCALARS])
    assert ast.unparse(ast.parse(documented)) == ast.unparse(ast.parse(made))


def test_a_loop_calls_the_kernel_with_items_arguments_and_row():
    array = numba.types.Array(numba.float64, 1, "C", readonly=True)
    text = source([SCALARS, ROWS], [numba.int64, array], [ROWS], row_at=1)
    row = "make_x1(x1 + i * x1_stride, x1_item_shape, x1_item_strides)"
    assert f" kernel(x0_all[i], {row}, a0, out_row, a1_all)\n" in text
    assert "copy(y0 + i * y0_stride, out_row_address, out_row_nbytes)" in text


def test_a_loop_writes_each_result_of_a_tuple():
    text = source([SCALARS], [], [SCALARS, SCALARS], is_tuple=True)
    assert "y0_all[i] = value[0]" in text
    assert "y1_all[i] = value[1]" in text


def test_a_loop_copies_records():
    text = source([RECORDS], [], [SCALARS])
    assert "x0_copy[0] = x0_all[i]" in text
    assert "kernel(x0_copy[0])" in text
