"""The rules by which workers come by cells, as small frozen values.

Static and dynamic differ in who takes which cell, and in nothing else. Under both, the cells
of one worker come in ascending order, and a worker looks at the ledger's halt word before
each. Under dynamic, cells are given out in ascending order over all workers: when one fails,
all cells below it were taken before, and are finished. Cells with a mark are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from taskcarrier.scheduling.ledger import FREE, Ledger
from taskcarrier.scheduling.partition import Partition


@dataclass(frozen=True)
class Static:
    """Each worker has one contiguous run of cells, cut evenly beforehand."""

    name = "static"

    def cells(self, ledger: Ledger, worker: int, n_workers: int, n_cells: int) -> Iterator[int]:
        """The cells of one worker, each in its hand when it is yielded."""
        marks = ledger.marks
        for cell in self.planned(worker, n_workers, n_cells):
            if ledger.halted:
                return
            if marks is None or marks[cell] == FREE:
                ledger.hold(worker, cell)
                yield cell

    def planned(self, worker: int, n_workers: int, n_cells: int) -> range:
        """The cells that only this worker will run."""
        parts = Partition(n_workers, n_cells)
        return range(parts[worker].start, parts[worker].stop) if worker < len(parts) else range(0)


@dataclass(frozen=True)
class Dynamic:
    """The next cell goes to whoever is free."""

    name = "dynamic"

    def cells(self, ledger: Ledger, worker: int, n_workers: int, n_cells: int) -> Iterator[int]:  # noqa: ARG002  # the rules share one signature
        """The cells of one worker, each in its hand when it is yielded."""
        marks = ledger.marks
        while not ledger.halted and (cell := ledger.claim(worker)) < n_cells:
            if marks is None or marks[cell] == FREE:
                yield cell

    def planned(self, worker: int, n_workers: int, n_cells: int) -> range:  # noqa: ARG002  # the rules share one signature
        """No cell belongs to one worker alone."""
        return range(0)


Balance = Static | Dynamic

_RULES: dict[str, Balance] = {rule.name: rule for rule in (Static(), Dynamic())}


def get_balance(name: object) -> Balance:
    """The rule of that name; a `ValueError` names the allowed ones."""
    rule = _RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise ValueError(f"balance must be one of {', '.join(map(repr, _RULES))}, got {name!r}")
    return rule
