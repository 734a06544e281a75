"""Digests of arrays depend on their values alone, not on how they lie in memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier.arrays.resume import plain_values
from taskcarrier.arrays.resume.plain_values import digest_array, digest_if_plain
from tests.strategies import samples


class TestArrays:
    @given(st.data())
    def test_arrays_of_equal_values_have_equal_digests_in_any_layout(self, data):
        sample = data.draw(samples())
        with sample.array() as array:
            copied = np.array(array, order=data.draw(st.sampled_from("CF")), subok=False)
            assert digest_array(np.asarray(array)) == digest_array(copied), sample

    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("nbytes", [1, 64, 300, 1 << 20])
    def test_digests_do_not_depend_on_the_size_of_the_pieces(self, nbytes, order, monkeypatch):
        X = np.arange(210.0).reshape(5, 6, 7)
        whole = digest_array(X)
        monkeypatch.setattr(plain_values, "_PIECE_NBYTES", nbytes)
        for view in (X.copy(order), X.repeat(2, 1)[:, ::2], np.flip(np.flip(X).copy())):
            assert digest_array(view) == whole
        assert digest_array(X[:, ::-1]) != whole

    def test_every_value_of_an_array_counts(self):
        X = np.arange(10.0)
        assert len({digest_array(np.where(np.arange(10) == i, -1, X)) for i in range(11)}) == 11

    def test_shapes_and_byte_orders_of_arrays_count(self):
        X = np.arange(6)
        others = [
            X,
            X.reshape(2, 3),
            X.reshape(3, 2),
            X.astype(">i8"),
            X.view("f8"),
            X.view("m8[s]"),
        ]
        assert len(set(map(digest_array, others))) == len(others)

    @pytest.mark.parametrize("dtype", [np.longdouble, np.clongdouble])
    def test_padding_of_long_doubles_does_not_count(self, dtype):
        one = np.full(3, 1, dtype) / 3
        raw = bytearray(one.tobytes())
        if np.finfo(np.longdouble).nmant == 63 and one.itemsize >= 16:
            for at in range(10, len(raw), 16):
                raw[at : at + 6] = b"\x07" * 6
        other = np.frombuffer(bytes(raw), dtype)
        assert (one == other).all()
        assert digest_array(one) == digest_array(other)
        assert digest_if_plain(one[0]) == digest_if_plain(other[0])
        assert digest_array(one) != digest_array(one * 2)

    def test_the_sign_of_zero_counts(self):
        assert digest_array(np.array([0.0])) != digest_array(np.array([-0.0]))

    def test_padding_of_structures_does_not_count(self):
        dtype = np.dtype([("a", "i1"), ("b", "f8")], align=True)
        one = np.zeros(3, dtype)
        raw = one.tobytes()
        other = np.frombuffer(raw[:1] + b"\x07" * 7 + raw[8:], dtype)
        assert (one == other).all()
        assert digest_array(one) == digest_array(other)
