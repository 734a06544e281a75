"""Functions of chunks that return or raise all sorts of things."""

import numpy as np


def fail_at(number):
    """Return a function that raises an error if it gets this number."""

    def func(chunk):
        if np.min(chunk) <= number <= np.max(chunk):
            raise ValueError("bad", number)
        return chunk

    return func


def changing(*functions):
    """Return a function that is another one from item 8 on, and from item 16 on."""

    def func(chunk):
        return functions[min(int(np.min(chunk)) // 16, len(functions) - 1)](chunk)

    return func


# For chunks of 24 rows of two numbers, from 0 on.
ODD_FUNCTIONS = {
    "same": lambda c: c,
    "view": lambda c: c[..., ::-1],
    "sum": lambda c: c.sum(axis=-1),
    "more axes": lambda c: c[..., None] + np.zeros(3),
    "tuple": lambda c: (c, c > 3, c.astype("f4")),
    "tuple of one": lambda c: (c * 2,),
    "empty tuple": lambda c: (),
    "list": lambda c: [c, c],
    "number": lambda c: 1,
    "scalar": lambda c: np.float64(c.sum()),
    "text": lambda c: c.astype(str),
    "dates": lambda c: c.astype("M8[s]"),
    "big-endian": lambda c: c.astype(">i4"),
    "objects": lambda c: c.astype(object),
    "an object": lambda c: {"a": 1},
    "none": lambda c: None,
    "masked": lambda c: np.ma.masked_array(c, c > 3),
    "half": lambda c: c[: len(c) // 2],
    "nothing": lambda c: c[..., :0],
    "writes": lambda c: c.fill(0),
    "raises at once": fail_at(0),
    "raises later": fail_at(20),
    "raises at the end": fail_at(47),
    "text as numbers": lambda c: np.add(c.astype(str), 1),
    "stops": lambda c: next(iter(())),
    "other dtype later": changing(np.copy, lambda c: np.asarray(c, int)),
    "other shape later": changing(np.copy, lambda c: c.sum(axis=-1)),
    "tuple later": changing(np.copy, lambda c: (c, c)),
    "tuple of one later": changing(np.copy, lambda c: (c,)),
    "more results later": changing(lambda c: (c, c), lambda c: (c, c, c)),
    "object later": changing(np.copy, lambda c: "text"),
    "error later": changing(np.copy, np.copy, lambda c: c.undefined),
}
