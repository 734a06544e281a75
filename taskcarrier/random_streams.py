"""Random streams by item or range: the same whoever runs what, and independent of each other.

Philox encrypts a counter of 256 bits under a key of 128 bits, and each of the 2**256 counters gives
another block of numbers (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11). The
key comes from the seed; the third of the counter's four words is the number of the item; a stream
goes through the first two. So no counter belongs to two streams of a call: they cannot overlap
before 2**128 blocks were drawn. Making one takes a few microseconds and needs no other stream;
spawning a child of a `SeedSequence` takes longer, and counts children in the parent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RandomStreams:
    """One random stream for each number.

    Attributes
    ----------
    key : tuple of int
        The two 64-bit words under which all counters are encrypted.
    """

    key: tuple[int, int]

    @classmethod
    def from_seed(cls, rng: object) -> RandomStreams:
        """From an int, a `SeedSequence` or a `Generator` (which is advanced by one draw).

        Raises
        ------
        TypeError, ValueError
            For anything else, and for negative numbers.
        """
        if isinstance(rng, np.random.Generator):
            sequence = np.random.SeedSequence(int(rng.integers(1 << 63)))
        elif isinstance(rng, np.random.SeedSequence):
            sequence = rng
        elif isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
            if rng < 0:
                raise ValueError(f"rng must not be negative, got {rng}")
            sequence = np.random.SeedSequence(int(rng))
        else:
            raise TypeError(
                "rng must be an int, a numpy.random.SeedSequence or a numpy.random.Generator, got "
                f"{rng!r}"
            )
        first, second = sequence.generate_state(2, np.uint64)
        return cls((int(first), int(second)))

    def stream(self, number: int) -> np.random.Generator:
        """The stream of one item or range, at its beginning.

        >>> streams = Streams.of_seed(7)
        >>> bool(streams.stream(3).random() == streams.stream(3).random())
        True
        """
        return np.random.Generator(np.random.Philox(key=self.key, counter=(0, 0, number, 0)))


@dataclass(frozen=True, eq=False)
class WithRandomStream:
    """A function that gets a stream of its own with each call, as ``rng=``.

    It is called with the number of the item or range before everything else.
    """

    func: Callable[..., Any]
    streams: RandomStreams

    def __call__(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """Have the function called with the stream of that number, always from its beginning."""
        return self.func(*args, rng=self.streams.stream(number), **kwargs)


def random_streams_for(func: Callable[..., Any], rng: object) -> RandomStreams:
    """The streams of `rng` for a function that takes one; a `TypeError` for another.

    >>> streams_for(abs, 3)
    Traceback (most recent call last):
    TypeError: rng= gives func a numpy.random.Generator as rng=, but abs has no such parameter: ...
    """
    streams = RandomStreams.from_seed(rng)
    if not _takes_rng(func):
        raise TypeError(
            "rng= gives func a numpy.random.Generator as rng=, but "
            f"{getattr(func, '__name__', repr(func))} has no such parameter: write it as in "
            "def func(x, rng), or leave rng= out"
        )
    return streams


def _takes_rng(func: Callable[..., Any]) -> bool:
    """Whether a function can be called with ``rng=``, as far as it tells."""
    if isinstance(func, np.ufunc):
        return False
    func = getattr(func, "py_func", func)  # numba's dispatchers are called like this function
    try:
        # Not that of what is wrapped: a wrapper may well take what it does not pass on.
        parameters = inspect.signature(func, follow_wrapped=False).parameters
    except (TypeError, ValueError):  # it tells nothing
        return True
    if "rng" in parameters:
        return parameters["rng"].kind is not inspect.Parameter.POSITIONAL_ONLY
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
