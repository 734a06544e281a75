"""Decisions on what to do about a range that failed; they need no clock and no worker.

A worker that dies leaves a range in hand. That range is run again, up to `retries` times. If a
worker dies each time, it is split: half of it, half of the rest, and so on. So every further death
halves the range under suspicion, until one item is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from taskcarrier.arguments import check_integer
from taskcarrier.notes import add_note
from taskcarrier.system.interrupts import is_raised_by_handler

RETRIES = 2
"""How often a range on which a worker died is run again by default."""


class Attempt(NamedTuple):
    """A range that is run outside the grid.

    Attributes
    ----------
    start, stop : int
        The bounds of the range.
    number : int
        The attempt number, from 1.
    """

    start: int
    stop: int
    number: int = 1


@dataclass(frozen=True)
class RetryPolicy:
    """How long a range may take, and which failures are retried.

    Attributes
    ----------
    timeout : float or None
        The seconds that each range may take; None for no limit.
    retries : int
        How often a range is run again.
    retry_on : tuple of exception types
        The exceptions of the function that are retried, besides the death of a worker.
    """

    timeout: float | None = None
    retries: int = RETRIES
    retry_on: tuple[type[BaseException], ...] = ()

    @classmethod
    def from_arguments(cls, timeout: object, retries: object, retry_on: object) -> RetryPolicy:
        """Make a policy from the arguments of a call, or raise an error that says what is wrong."""
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
        # For workers, which look for builtin types only. The user's own types travel with the
        # function (`WithRetries`), through a pickler that can handle them.
        builtin_types = tuple(kind for kind in self.retry_on if kind.__module__ == "builtins")
        return RetryPolicy, (self.timeout, self.retries, builtin_types)

    @property
    def timeout_ns(self) -> int:
        """The nanoseconds that each range may take, 0 for no limit."""
        return 0 if self.timeout is None else max(1, round(self.timeout * 1e9))

    def next_after_death(self, attempt: Attempt, *, can_split: bool) -> list[Attempt]:
        """Return what to run after a worker died on a range; nothing if the range is to blame.

        Parameters
        ----------
        attempt : Attempt
            The range that the worker had in hand.
        can_split : bool
            Whether parts of a range can be run.

        >>> policy = RetryPolicy(retries=1)
        >>> policy.next_after_death(Attempt(0, 8, 1), can_split=True)
        [Attempt(start=0, stop=8, number=2)]
        >>> [tuple(part) for part in policy.next_after_death(Attempt(0, 8, 2), can_split=True)]
        [(0, 4, 3), (4, 6, 3), (6, 7, 3), (7, 8, 3)]
        """
        next_number = attempt.number + 1
        if attempt.number <= self.retries:
            return [attempt._replace(number=next_number)]
        if self.retries == 0 or not can_split or attempt.stop - attempt.start == 1:
            return []
        return [Attempt(*part, next_number) for part in halvings(attempt.start, attempt.stop)]

    def next_after_timeout(self, attempt: Attempt) -> list[Attempt]:
        """Return what to run after a range took too long; nothing if it is not retried."""
        if attempt.number <= self.retries and issubclass(TimeoutError, self.retry_on):
            return [attempt._replace(number=attempt.number + 1)]
        return []


DEFAULT_POLICY = RetryPolicy()
"""The policy of a call that does not ask for another."""


def halvings(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range of at least two items: each is half of the rest, down to one item.

    >>> list(halvings(0, 10))
    [(0, 5), (5, 8), (8, 9), (9, 10)]
    """
    while stop - start > 1:
        middle = start + (stop - start + 1) // 2
        yield start, middle
        start = middle
    if stop > start:
        yield start, stop


# A 64-bit clock of nanoseconds counts up to about 292 years; longer timeouts are no limit.
_LONGEST_TIMEOUT = 2**63 / 1e9


def check_timeout(timeout: Any) -> float | None:
    """Return `timeout` as a positive number of seconds, or None for no limit; else `ValueError`.

    >>> check_timeout(3), check_timeout(float("inf"))
    (3.0, None)
    """
    if timeout is None:
        return None
    try:
        seconds = float(timeout)
    except OverflowError:  # an integer or a fraction too large for a float
        seconds = float("inf") if timeout > 0 else 0.0
    except (TypeError, ValueError):
        seconds = float("nan")
    if isinstance(timeout, (bool, str, bytes)) or not seconds > 0:
        raise ValueError(f"timeout must be a positive number of seconds or None, got {timeout!r}")
    return seconds if seconds < _LONGEST_TIMEOUT else None


@dataclass(frozen=True, eq=False)
class WithRetries:
    """A function that is called again when it raises certain exceptions.

    Attributes
    ----------
    func : callable
        The function.
    retry_on : tuple of exception types
        The exceptions after which it is called again.
    retries : int
        How often it is called again.
    copies : bool
        Whether the function may change the arrays that it gets, so that each call needs copies.
    """

    func: Callable[..., Any]
    retry_on: tuple[type[BaseException], ...]
    retries: int
    copies: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the first successful call, or raise the error of the last one."""
        for _ in range(self.retries):
            try:
                return self._call(args, kwargs)
            except self.retry_on as error:
                if is_raised_by_handler(error):
                    raise
        try:
            return self._call(args, kwargs)
        except self.retry_on as error:
            add_note(error, f"func was called {self.retries + 1} times")
            raise

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.copies:
            args = tuple(arg.copy() if hasattr(arg, "__array__") else arg for arg in args)
        return self.func(*args, **kwargs)
