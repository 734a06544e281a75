"""The rules by which workers come by chunks, as small frozen values.

Static and dynamic differ in who takes which chunk, and in nothing else. Under both, the chunks
of one worker come in ascending order, and a worker looks at the ledger's halt word before
each. Under dynamic, chunks are given out in ascending order over all workers: when one fails,
all chunks below it were taken before, and are finished. Chunks with a mark are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from taskcarrier.scheduling.ledger import PENDING, Ledger
from taskcarrier.scheduling.partition import Partition


@dataclass(frozen=True)
class Static:
    """Each worker has one contiguous run of chunks, cut evenly beforehand."""

    name = "static"

    def chunks(self, ledger: Ledger, worker: int, n_workers: int, n_chunks: int) -> Iterator[int]:
        """The chunks of one worker, each in its hand when it is yielded."""
        marks = ledger.marks
        for index in self.plan(worker, n_workers, n_chunks):
            if ledger.is_halted:
                return
            if marks is None or marks[index] == PENDING:
                ledger.hold(worker, index)
                yield index

    def plan(self, worker: int, n_workers: int, n_chunks: int) -> range:
        """The chunks that only this worker will run."""
        parts = Partition(n_workers, n_chunks)
        return range(parts[worker].start, parts[worker].stop) if worker < len(parts) else range(0)


@dataclass(frozen=True)
class Dynamic:
    """The next chunk goes to whoever is free."""

    name = "dynamic"

    def chunks(self, ledger: Ledger, worker: int, n_workers: int, n_chunks: int) -> Iterator[int]:  # noqa: ARG002  # the rules share one signature
        """The chunks of one worker, each in its hand when it is yielded."""
        marks = ledger.marks
        while not ledger.is_halted and (index := ledger.claim(worker)) < n_chunks:
            if marks is None or marks[index] == PENDING:
                yield index

    def plan(self, worker: int, n_workers: int, n_chunks: int) -> range:  # noqa: ARG002  # the rules share one signature
        """No chunk belongs to one worker alone."""
        return range(0)


Balance = Static | Dynamic

_RULES: dict[str, Balance] = {rule.name: rule for rule in (Static(), Dynamic())}


def get_balance(name: object) -> Balance:
    """The rule of that name; a `ValueError` names the allowed ones."""
    rule = _RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise ValueError(f"balance must be one of {', '.join(map(repr, _RULES))}, got {name!r}")
    return rule
