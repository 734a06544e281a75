"""Examples of specs: one number for each item, and two arrays for each item."""

import numpy as np

from taskcarrier.arrays.outputs.specs import Spec

FLAT = Spec(((np.dtype("f8"), ()),), (0,), is_tuple=False)
PAIR = Spec(((np.dtype("i2"), (3,)), (np.dtype("M8[s]"), (2, 5))), (1, 0), is_tuple=True)
