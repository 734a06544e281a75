"""What results look like, and whether two of them fit into one array."""

import numpy as np

from taskcarrier.arrays.outputs.specs import Spec, shorten_repr
from tests.arrays.outputs.examples import FLAT, PAIR


def test_a_spec_gives_shapes_and_a_description():
    assert FLAT.shapes(7) == [(7,)]
    assert PAIR.shapes(7) == [(3, 7), (7, 2, 5)]
    assert FLAT.describe(4) == "an array float64 (4,)"
    assert PAIR.describe(4) == "a tuple of 2 (int16 (3, 4); datetime64[s] (4, 2, 5))"


def test_specs_agree_if_all_is_equal_or_only_dtypes_differ_that_promote():
    single = FLAT.with_dtypes([np.dtype("f4")])
    assert single.parts == ((np.dtype("f4"), ()),)
    assert FLAT.agrees(FLAT, promote_dtypes=False)
    assert not FLAT.agrees(single, promote_dtypes=False)
    assert FLAT.agrees(single, promote_dtypes=True)
    for other in (
        Spec(((np.dtype("f8"), (1,)),), (0,), is_tuple=False),
        Spec(((np.dtype("f8"), ()),), (0,), is_tuple=True),
        Spec(((np.dtype("f8"), ()),) * 2, (0, 0), is_tuple=False),
    ):
        assert not FLAT.agrees(other, promote_dtypes=True)


def test_long_values_are_cut_so_that_they_fit_a_line():
    assert shorten_repr([1, 2]) == "[1, 2]"
    assert shorten_repr("a" * 58) == "'" + "a" * 58 + "'"
    assert shorten_repr("a" * 59) == "'" + "a" * 56 + "..."
