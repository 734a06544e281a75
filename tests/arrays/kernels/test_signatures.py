"""What kernels take and return: layouts of arrays, bound arguments, signatures."""

import numba
import numpy as np
import pytest

from taskcarrier.arrays.kernels.signatures import (
    ArrayLayout,
    ExtraArgs,
    KernelSignature,
    WritableArgs,
    bind_arguments,
    find_signature,
    types_of,
)


class TestArrayLayout:
    def test_the_layout_of_items_drops_the_mapped_axis(self):
        X = np.zeros((5, 4, 3), "f4")
        assert ArrayLayout.of(X, 0) == ArrayLayout(np.dtype("f4"), 2, "C", True)
        assert ArrayLayout.of(X, 2) == ArrayLayout(np.dtype("f4"), 2, "A", True)
        assert ArrayLayout.of(X.T, 2) == ArrayLayout(np.dtype("f4"), 2, "F", True)
        assert ArrayLayout.of(X.T, 0) == ArrayLayout(np.dtype("f4"), 2, "A", True)
        assert ArrayLayout.of(X[:, ::-1], 0).layout == "A"

    def test_the_layout_of_scalars_keeps_alignment(self):
        X = np.zeros(6)
        assert ArrayLayout.of(X, 0) == ArrayLayout(np.dtype("f8"), 0, "C", True)
        assert ArrayLayout.of(X[::2], 0).layout == "A"
        unaligned = np.frombuffer(b"x" * 17, np.uint8)[1:].view("f8")
        assert ArrayLayout.of(unaligned, 0).aligned is False

    def test_a_layout_knows_the_numba_type_of_an_item(self):
        layout = ArrayLayout.of(np.zeros((2, 3)), 0)
        assert str(layout.item(writable=False)) == "readonly array(float64, 1d, C)"
        assert str(layout.item(writable=True)) == "array(float64, 1d, C)"
        assert layout.item(writable=False).mutable is False
        assert ArrayLayout.of(np.zeros(3, "i2"), 0).item(writable=False) == numba.int16


class TestBindArguments:
    @staticmethod
    def kernel():
        return numba.njit(lambda x, y, a, b=2, c=3: x + y + a + b + c)

    def test_positional_arguments_are_bound_as_given(self):
        assert bind_arguments(self.kernel(), 2, (5,), {}) == ExtraArgs((5,))

    def test_keywords_are_bound_to_their_positions(self):
        assert bind_arguments(self.kernel(), 2, (), {"c": 1, "a": 5}) == ExtraArgs((), (5, 2, 1))
        assert bind_arguments(self.kernel(), 2, (5,), {"c": 1}) == ExtraArgs((5,), (2, 1))

    @pytest.mark.parametrize("kwargs", [{"d": 1}, {"x": 1}])
    def test_unknown_keywords_are_errors(self, kwargs):
        with pytest.raises(TypeError):
            bind_arguments(self.kernel(), 2, (5,), kwargs)

    def test_the_output_row_follows_the_positional_arguments(self):
        kernel = numba.njit(lambda x, a, out, b=1, c=2: None)
        assert bind_arguments(kernel, 1, (5,), {"c": 3}, fills=True) == ExtraArgs((5,), (1, 3))
        kernel = numba.njit(lambda x, a, out: None)
        with pytest.raises(TypeError, match=r"\(x, a, out\) .* the row to fill, a= \(mult"):
            bind_arguments(kernel, 1, (), {"a": 5}, fills=True)

    def test_a_kernel_may_take_any_number_of_arguments(self):
        kernel = numba.njit(lambda x, y=1.0, *rest: x)
        assert bind_arguments(kernel, 1, (), {"y": 2.0}) == ExtraArgs((), (2.0,))
        assert bind_arguments(kernel, 1, (1.0, 2, 3), {}) == ExtraArgs((1.0, 2, 3))


class TestFindSignature:
    READ_ONLY = WritableArgs(items=False)

    def signature(self, kernel, *arguments):
        def get_types(writable_args):
            return types_of(arguments, writable=writable_args.items)

        return find_signature(kernel, get_types, self.READ_ONLY)

    def test_a_kernel_is_compiled_for_its_arguments(self):
        found = self.signature(numba.njit(lambda x, w: x * w.sum()), 2.0, np.ones(3))
        assert found == KernelSignature(
            return_type=numba.float64, writable_args=self.READ_ONLY, note=""
        )

    def test_arrays_are_writable_where_a_signature_wants_that(self):
        kernel = numba.njit("f8(f8[:])")(lambda row: row[0])
        assert self.signature(kernel, np.ones(3)).writable_args == WritableArgs(items=True)

    def test_the_type_is_unknown_where_numba_wants_values(self):
        found = self.signature(numba.njit(lambda x, n: numba.literally(n) * x), 2.0, 3)
        assert found.return_type is None
        assert "literally" in found.note

    @pytest.mark.parametrize(
        ("signature", "value"), [("f8(f8)", 2), ("i8(i8)", 2.5), ("f4(f4)", 2.5)]
    )
    def test_numbers_that_a_signature_would_convert_are_noticed(self, signature, value):
        kernel = numba.njit(signature)(lambda x: x * 2)
        assert "other numbers than it is given" in self.signature(kernel, value).note

    def test_a_signature_among_several_may_fit(self):
        kernel = numba.njit(["f4(f4)", "f8(f8)"])(lambda x: x * 2)
        assert self.signature(kernel, 2.5).note == ""
