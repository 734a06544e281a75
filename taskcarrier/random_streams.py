"""Random streams for items or ranges: independent of each other, and of which worker runs what.

Philox encrypts a counter of 256 bits under a key of 128 bits, and each of the 2**256 counters gives
another block of numbers (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11). The
key comes from the seed. The third of the counter's four words is the number of the item, and a
stream advances the first two. So no counter belongs to two streams of a call: they cannot overlap
before 2**128 blocks were drawn. Making a stream takes a few microseconds and needs no other stream;
spawning a child of a `SeedSequence` takes longer, and advances a counter in the parent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskcarrier.record import record


@dataclass(frozen=True)
class RandomStreams:
    """Random streams, one for each number of an item or range.

    Attributes
    ----------
    key : tuple of int
        The two 64-bit words under which all counters are encrypted.
    """

    key: tuple[int, int]

    @classmethod
    def from_seed(cls, rng: object) -> RandomStreams:
        """Make streams from an int, a `SeedSequence` or a `Generator` (advanced by one draw).

        Raises
        ------
        TypeError, ValueError
            `rng` is anything else, or negative.
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
        """Return the stream of one item or range, at its beginning.

        >>> streams = RandomStreams.from_seed(7)
        >>> bool(streams.stream(3).random() == streams.stream(3).random())
        True
        """
        return np.random.Generator(np.random.Philox(key=self.key, counter=(0, 0, number, 0)))


@record
class WithRandomStream:
    """A function that gets a stream of its own as ``rng=`` in each call.

    The first argument of a call is the number of the item or range.
    """

    func: Callable[..., Any]
    streams: RandomStreams

    def __call__(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the stream of this number, always from its beginning."""
        return self.func(*args, rng=self.streams.stream(number), **kwargs)


def random_streams_for(func: Callable[..., Any], rng: object) -> RandomStreams:
    """Return the streams of `rng`; raise a `TypeError` if `func` has no parameter ``rng``.

    >>> random_streams_for(abs, 3)
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
    """Return whether a function takes ``rng=``; a function without a signature may take it."""
    if isinstance(func, np.ufunc):
        return False
    func = getattr(func, "py_func", func)  # numba's dispatchers have its signature
    try:
        # Not the signature of a wrapped function: the wrapper may take arguments that it does
        # not pass on.
        parameters = inspect.signature(func, follow_wrapped=False).parameters
    except (TypeError, ValueError):  # there is no signature
        return True
    if "rng" in parameters:
        return parameters["rng"].kind is not inspect.Parameter.POSITIONAL_ONLY
    return any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
