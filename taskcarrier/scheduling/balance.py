"""The rules that decide which worker takes which chunk, as small frozen values.

Static and dynamic differ only in which worker takes which chunk. Under both, a worker takes its
chunks in ascending order, and checks the ledger's halt word before each. Under dynamic, chunks are
given out in ascending order over all workers: when one fails, all chunks below it were taken
earlier, and are finished. Chunks that are marked already are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from taskcarrier.scheduling.ledger import PENDING, Ledger


@dataclass(frozen=True)
class Static:
    """Each worker has one contiguous share of the chunks, of equal size and cut beforehand."""

    name = "static"

    def chunks(
        self, ledger: Ledger, worker: int, n_workers: int, n_chunks: int, first: int = 0
    ) -> Iterator[int]:
        """Yield the chunks of one worker from `first` on, each in hand when it is yielded."""
        marks = ledger.marks
        for index in self.plan(worker, n_workers, n_chunks, first):
            if ledger.is_halted:
                return
            if marks is None or marks[index] == PENDING:
                ledger.hold(worker, index)
                yield index

    def plan(self, worker: int, n_workers: int, n_chunks: int, first: int = 0) -> range:
        """Return the chunks from `first` on that only this worker will run."""
        length, longer = divmod(n_chunks - first, n_workers)  # as a `Partition` cuts them
        start = first + worker * length + min(worker, longer)
        return range(start, start + length + (worker < longer))


@dataclass(frozen=True)
class Serial(Static):
    """The rule of a run in the caller: its one worker has all chunks."""

    name = "serial"


@dataclass(frozen=True)
class Dynamic:
    """The next chunk goes to the next free worker."""

    name = "dynamic"

    def chunks(
        self,
        ledger: Ledger,
        worker: int,
        n_workers: int,  # noqa: ARG002  # the rules share one signature
        n_chunks: int,
        first: int = 0,  # noqa: ARG002  # the ledger gives out chunks from there on
    ) -> Iterator[int]:
        """Yield the chunks of one worker, each in hand when it is yielded."""
        marks = ledger.marks
        while not ledger.is_halted and (index := ledger.claim(worker)) < n_chunks:
            if marks is None or marks[index] == PENDING:
                yield index

    def plan(self, worker: int, n_workers: int, n_chunks: int, first: int = 0) -> range:  # noqa: ARG002  # the rules share one signature
        """Return no chunks: none is reserved for one worker."""
        return range(0)


class Balance(Protocol):
    """A rule that assigns chunks to workers."""

    @property
    def name(self) -> str:
        """The name of the rule."""

    def chunks(
        self, ledger: Ledger, worker: int, n_workers: int, n_chunks: int, first: int = 0
    ) -> Iterator[int]:
        """Yield the chunks of one worker from `first` on, each in hand when it is yielded."""

    def plan(self, worker: int, n_workers: int, n_chunks: int, first: int = 0) -> range:
        """Return the chunks from `first` on that only this worker will run."""


_RULES: dict[str, Balance] = {rule.name: rule for rule in (Static(), Dynamic())}


def get_balance(name: object) -> Balance:
    """Return the rule with this name, or raise a `ValueError` that lists the allowed names."""
    rule = _RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise ValueError(f"balance must be one of {', '.join(map(repr, _RULES))}, got {name!r}")
    return rule
