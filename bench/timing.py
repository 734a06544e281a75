"""Compare several ways of doing the same work, fairly.

The arms of a comparison take turns, in another order in each round, so that anything else the
machine does affects all of them, and none always follows the same. An amount counts only if the
arm's answer is equal to the first arm's: this is checked for every arm before the first round, and
for every measured run. The result is the median of the ratios within each round, with its spread;
the milliseconds beside it are for orientation.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bench.machine import watch_others

T = TypeVar("T")

# From this many rounds on the quartiles say more than the extremes, which only grow. Arbitrary.
QUARTILES_FROM = 10


class WrongResultError(Exception):
    """An arm's answer differs from the first arm's, so its time means nothing."""


@dataclass(frozen=True)
class Settings:
    """The size of a bench: full, quick or tiny.

    ``rounds`` and ``out`` overrule what the bench would choose. With ``only``, `defaults` measures
    the workloads whose name or group has that word.
    """

    scale: str = "full"
    rounds: int | None = None
    out: Path | None = None
    only: str | None = None

    def pick(self, *, full: T, quick: T, tiny: T) -> T:
        """Choose by scale."""
        return {"full": full, "quick": quick, "tiny": tiny}[self.scale]

    def turns(self, *, full: int, quick: int, tiny: int = 1) -> int:
        """Return the number of rounds: as asked for, else by scale."""
        return self.rounds or self.pick(full=full, quick=quick, tiny=tiny)


@dataclass(frozen=True)
class Measured:
    """An answer with an amount the arm measured by itself (seconds a call, peak memory, ...)."""

    amount: float
    answer: Any


@dataclass(frozen=True)
class Arm:
    """One way of doing the work. ``run`` returns the answer, so it is timed, or a `Measured`."""

    name: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class Promise:
    """``scale * over / under`` is to be at least ``required`` (at most, with ``at_most=True``).

    With ``under=None`` the promise is about the amount itself, with ``difference=True`` about
    ``scale * (over - under)``.
    """

    over: str
    under: str | None
    required: float
    aim: float
    at_most: bool = False
    scale: float = 1.0
    label: str = ""
    difference: bool = False

    @property
    def name(self) -> str:
        """What is promised, in words."""
        return self.label or (self.over if self.under is None else f"{self.over} / {self.under}")

    def verdict(self, value: float) -> str:
        """Say whether ``value`` reaches the aim, keeps the promise, or misses it."""
        sign = -1 if self.at_most else 1
        if sign * value >= sign * self.aim:
            return "aim reached"
        return "kept" if sign * value >= sign * self.required else "MISSED"


@dataclass(frozen=True)
class Spread:
    """Median of some values with their range (quartiles from ten values on)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise ``values``."""
        if len(values) >= QUARTILES_FROM:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        else:
            low, high = min(values), max(values)
        return cls(statistics.median(values), low, high)

    def __str__(self) -> str:
        return f"{_number(self.median)} [{_number(self.low)}-{_number(self.high)}]"


@dataclass
class Comparison:
    """The result: the amounts of every arm, round by round, and the promises about them."""

    title: str
    reference: str
    amounts: dict[str, list[float]]
    promises: Sequence[Promise] = ()
    unit: str = "ms"
    notes: list[str] = field(default_factory=list)
    binding: bool = True  # False at small sizes, about which nothing is promised
    others: float | None = None  # cpus that other programs kept busy meanwhile, if known

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.amounts[self.reference])

    def ratio(self, over: str, under: str | None, scale: float = 1.0) -> Spread:
        """Spread of the per-round ratios of two arms; of the amounts if ``under`` is None."""
        divisors = self.amounts[under] if under else [1.0] * self.rounds
        pairs = zip(self.amounts[over], divisors, strict=True)
        return Spread.of([scale * above / below for above, below in pairs])

    def difference(self, over: str, under: str, scale: float = 1.0) -> Spread:
        """Spread of the per-round differences of two arms."""
        pairs = zip(self.amounts[over], self.amounts[under], strict=True)
        return Spread.of([scale * (above - below) for above, below in pairs])

    def judged(self) -> list[tuple[Promise, Spread, str]]:
        """Every promise whose arms were measured, with its value and verdict."""
        found = []
        for promise in self.promises:
            if {promise.over, promise.under} - {None} <= set(self.amounts):
                of = self.difference if promise.difference else self.ratio
                spread = of(promise.over, promise.under, promise.scale)
                verdict = promise.verdict(spread.median) if self.binding else "not judged"
                found.append((promise, spread, verdict))
        return found

    @property
    def missed(self) -> list[str]:
        """Names of the promises that were not kept."""
        return [promise.name for promise, _, verdict in self.judged() if verdict == "MISSED"]

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, for JSON: amounts are seconds where the unit is milliseconds."""
        return {
            "title": self.title,
            "unit": "s" if self.unit == "ms" else self.unit,
            "rounds": self.rounds,
            "cpus busy with other programs": self.others,
            "reference": self.reference,
            "amounts": self.amounts,
            "ratios": {name: asdict(self.ratio(name, self.reference)) for name in self.amounts},
            "promises": [
                {
                    **asdict(promise),
                    "name": promise.name,
                    "value": asdict(spread),
                    "verdict": verdict,
                }
                for promise, spread, verdict in self.judged()
            ],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        turns = f"{self.rounds} round{'s' * (self.rounds > 1)}, arms taking turns"
        if self.others is not None:
            turns += f"; other programs kept {self.others:.1f} cpus busy meanwhile"
        parts = [self.title, turns, self._arm_table()]
        if self.judged():
            parts.append(self._promise_table())
        parts.extend(f"  {note}" for note in self.notes)
        return "\n".join(parts)

    def _arm_table(self) -> str:
        factor = 1000.0 if self.unit == "ms" else 1.0
        head = ("arm", f"median {self.unit}", f"/ {self.reference} [{_spread_word(self.rounds)}]")
        rows = [
            (
                name,
                _number(factor * statistics.median(values)),
                str(self.ratio(name, self.reference)),
            )
            for name, values in self.amounts.items()
        ]
        return table(head, rows)

    def _promise_table(self) -> str:
        head = ("promised", "measured", "required", "aim", "")
        rows = []
        for promise, spread, verdict in self.judged():
            sign = "≤" if promise.at_most else "≥"
            rows.append(
                (
                    promise.name,
                    str(spread),
                    f"{sign} {promise.required:g}",
                    f"{promise.aim:g}",
                    verdict,
                )
            )
        return table(head, rows)


def compare(
    title: str,
    arms: Sequence[Arm],
    *,
    rounds: int,
    reference: str | None = None,
    promises: Sequence[Promise] = (),
    unit: str = "ms",
    notes: Sequence[str] = (),
) -> Comparison:
    """Run the arms in turn for ``rounds`` rounds and return what they took.

    The others' answers must equal the first arm's, bit for bit; `WrongResultError` otherwise.
    The pass that checks this comes first and is not measured, so it also warms every arm up.
    """
    expected = _unwrap(arms[0].run())
    for arm in arms[1:]:
        _check(arm, _unwrap(arm.run()), expected, arms[0])
    amounts: dict[str, list[float]] = {arm.name: [] for arm in arms}
    others = watch_others()
    for turn in range(rounds):
        gc.collect()
        for arm in mixed(arms, turn):
            amount, answer = _measure(arm)
            _check(arm, answer, expected, arms[0])
            amounts[arm.name].append(amount)
            del answer  # results let go of their memory before the next arm's clock starts
    return Comparison(
        title,
        reference or arms[0].name,
        amounts,
        promises,
        unit,
        list(notes),
        others=others(),
    )


def mixed(arms: Sequence[Arm], turn: int) -> list[Arm]:
    """Return the arms in another order in every round, the same in every run.

    An arm finds caches and memory as the one before has left them, so none always follows the same.
    """
    return random.Random(turn).sample(arms, len(arms))


def repeated(call: Callable[[], Any], calls: int) -> Callable[[], Measured]:
    """Make an arm out of many calls: seconds of one call on average, and the last answer."""

    def run() -> Measured:
        begin = time.perf_counter()
        for _ in range(calls):
            answer = call()
        return Measured((time.perf_counter() - begin) / calls, answer)

    return run


def timed(call: Callable[[], T], answer: Callable[[T], Any]) -> Callable[[], Measured]:
    """Make an arm of which only ``call`` is timed; what is compared is ``answer`` of its result."""

    def run() -> Measured:
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
        return Measured(seconds, answer(result))

    return run


def same(left: Any, right: Any) -> bool:
    """Equal to the bit for arrays (dtype and shape included), ``==`` for everything else."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return (
            left.dtype == right.dtype and left.shape == right.shape and bool((left == right).all())
        )
    return type(left) is type(right) and bool(left == right)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [_line(row, widths) for row in (head, *rows)]
    return "\n".join([lines[0], "  " + "─" * (sum(widths) + 3 * (len(widths) - 1)), *lines[1:]])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return ("  " + "   ".join(cells)).rstrip()


def _measure(arm: Arm) -> tuple[float, Any]:
    begin = time.perf_counter()
    answer = arm.run()
    seconds = time.perf_counter() - begin
    return (answer.amount, answer.answer) if isinstance(answer, Measured) else (seconds, answer)


def _unwrap(answer: Any) -> Any:
    return answer.answer if isinstance(answer, Measured) else answer


def _check(arm: Arm, answer: Any, expected: Any, first: Arm) -> None:
    if not same(answer, expected):
        raise WrongResultError(
            f"{arm.name!r} and {first.name!r} disagree: no time of theirs counts"
        )


def _spread_word(rounds: int) -> str:
    return "quartiles" if rounds >= QUARTILES_FROM else "min-max"


def _number(value: float) -> str:
    """Three significant digits, no exponent."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"
