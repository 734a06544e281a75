"""What is done about a range that failed: decisions without a clock or a worker.

A worker that dies leaves a range in hand. It is given out again, `retries` times; if it kills each
time, it is cut into halves of what is left, so that every further death halves the range that is
suspected, until one item is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from taskcarrier.arguments import check_integer
from taskcarrier.notes import add_note
from taskcarrier.system.interrupts import is_of_the_program

RETRIES = 2
"""How often a range on which a worker died is run again, if nothing else was said."""


class Attempt(NamedTuple):
    """A range that is given out again.

    Attributes
    ----------
    start, stop : int
        Its items.
    attempt : int
        The attempt number, from 1.
    """

    start: int
    stop: int
    attempt: int = 1


@dataclass(frozen=True)
class RetryPolicy:
    """How long a range may take, and what is tried again.

    Attributes
    ----------
    timeout : float or None
        Seconds for each range; None for any time.
    retries : int
        How often a range is run again.
    retry_on : tuple of exception types
        Which exceptions of the function are a reason for that, beside the death of a worker.
    """

    timeout: float | None = None
    retries: int = RETRIES
    retry_on: tuple[type[BaseException], ...] = ()

    @classmethod
    def from_arguments(cls, timeout: object, retries: object, retry_on: object) -> RetryPolicy:
        """From the arguments of a call, or an error that says what is wrong with them."""
        if timeout is None and retries is RETRIES and retry_on == ():
            return DEFAULT_POLICY
        n_retries = check_integer(retries, "retries", "a number of further attempts, 0 or more")
        if n_retries < 0:
            raise ValueError(f"retries must be 0 or more, got {n_retries}")
        kinds = retry_on if isinstance(retry_on, tuple) else (retry_on,)
        for kind in kinds:
            if not isinstance(kind, type) or not issubclass(kind, Exception):
                raise TypeError(
                    f"retry_on must be an exception type or a tuple of them, got {retry_on!r}"
                )
        return cls(check_timeout(timeout), n_retries, kinds)

    def __reduce__(self) -> Any:
        # For workers. Types of the caller's own are for it alone, which knows how to pickle them.
        kept = tuple(kind for kind in self.retry_on if kind.__module__ == "builtins")
        return RetryPolicy, (self.timeout, self.retries, kept)

    @property
    def timeout_ns(self) -> int:
        """The time for each range in nanoseconds, 0 for any time."""
        return 0 if self.timeout is None else max(1, round(self.timeout * 1e9))

    def next_after_death(self, attempt: Attempt, *, can_split: bool) -> list[Attempt]:
        """What to run instead of a range on which a worker died; nothing if it is to blame.

        Parameters
        ----------
        attempt : Attempt
            The range.
        can_split : bool
            Whether parts of a range can be run.

        >>> RetryPolicy(retries=1).next_after_death(Attempt(0, 8, 1), can_split=True)
        [Attempt(start=0, stop=8, attempt=2)]
        >>> [tuple(one) for one in RetryPolicy(retries=1).next_after_death(Attempt(0, 8, 2), can_split=True)]
        [(0, 4, 3), (4, 6, 3), (6, 7, 3), (7, 8, 3)]
        """
        number = attempt.attempt + 1
        if attempt.attempt <= self.retries:
            return [attempt._replace(attempt=number)]
        if self.retries == 0 or not can_split or attempt.stop - attempt.start == 1:
            return []
        return [Attempt(*part, number) for part in halvings(attempt.start, attempt.stop)]

    def next_after_timeout(self, attempt: Attempt) -> list[Attempt]:
        """What to run instead of a range that took too long; nothing if that is final."""
        if attempt.attempt <= self.retries and issubclass(TimeoutError, self.retry_on):
            return [attempt._replace(attempt=attempt.attempt + 1)]
        return []


DEFAULT_POLICY = RetryPolicy()
"""What holds if nothing else was said."""


def halvings(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """A range of at least two items in pieces, each half of what is left, the last of one item.

    >>> list(halvings(0, 10))
    [(0, 5), (5, 8), (8, 9), (9, 10)]
    """
    while stop - start > 1:
        middle = start + (stop - start + 1) // 2
        yield start, middle
        start = middle
    if stop > start:
        yield start, stop


# More seconds than a clock of nanoseconds counts in 64 bits, some 292 years, are no limit.
_LONGEST_TIMEOUT = 2**63 / 1e9


def check_timeout(timeout: Any) -> float | None:
    """`timeout` as a positive number of seconds; None for any time.

    >>> check_timeout(3), check_timeout(float("inf"))
    (3.0, None)
    """
    if timeout is None:
        return None
    try:
        seconds = float(timeout)
    except OverflowError:  # an integer or a fraction beyond all floats
        seconds = float("inf") if timeout > 0 else 0.0
    except (TypeError, ValueError):
        seconds = float("nan")
    if isinstance(timeout, (bool, str, bytes)) or not seconds > 0:
        raise ValueError(f"timeout must be a positive number of seconds or None, got {timeout!r}")
    return seconds if seconds < _LONGEST_TIMEOUT else None


@dataclass(frozen=True, eq=False)
class WithRetries:
    """A function that is called again when it raises what is a reason for that.

    Attributes
    ----------
    func : callable
        The function.
    retry_on : tuple of exception types
        What is a reason.
    retries : int
        How often.
    copies : bool
        Whether it may change the arrays that it gets, so that each call needs its own.
    """

    func: Callable[..., Any]
    retry_on: tuple[type[BaseException], ...]
    retries: int
    copies: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What it returns, at the latest in the last attempt."""
        for _ in range(self.retries):
            try:
                return self._call(args, kwargs)
            except self.retry_on as error:
                if is_of_the_program(error):
                    raise
        try:
            return self._call(args, kwargs)
        except self.retry_on as error:
            add_note(error, f"func was called {self.retries + 1} times")
            raise

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.copies:
            args = tuple(one.copy() if hasattr(one, "__array__") else one for one in args)
        return self.func(*args, **kwargs)
