"""Many comparisons of the same arms, one row each: ratios, geometric means, promises about all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bench.timing import Comparison, Promise, Spread, table
from bench.workloads import Workload

# Below this many seconds of the plain call, what a call costs by itself is not counted up to an
# offset; from there on, the plain call itself is a bar.
LONG_SECONDS = 0.02
OFFSET, AIM_OFFSET = 60e-6, 30e-6
SEQUENTIAL_OR_PROCESSES = ("plain", "loop", "sequential", "loky")


@dataclass(frozen=True)
class Judged:
    """A workload with what its arms took."""

    workload: Workload
    comparison: Comparison

    @property
    def seconds(self) -> float:
        """The median of the plain call."""
        return statistics.median(self.comparison.amounts["plain"])

    def rivals_of(self, bar: str, arm: str) -> tuple[str, ...]:
        """Return the arms among which the bar is: ``"loop"``, ``"plain"`` or the ``"best"``.

        Threads count for `auto`, and where the library can know that they pay.
        """
        if bar != "best":
            return (bar,)
        counts_threads = arm == "auto" or self.workload.is_known_free
        return (*SEQUENTIAL_OR_PROCESSES, *(("threading",) if counts_threads else ()))

    def best(self, arm: str) -> str:
        """Return the rival with the lowest median.

        The lowest of each round would be a bar that no arm reaches, made of all arms' luck.
        """
        amounts = self.comparison.amounts
        return min(self.rivals_of("best", arm), key=lambda name: statistics.median(amounts[name]))

    def ratio(self, arm: str, bar: str, offset: float = OFFSET) -> Spread:
        """Return the spread of an arm's ratios to the bar within the rounds.

        In short calls the offset is not counted, but for the plain call, which is a bar for long
        calls only.
        """
        if bar == "plain" or self.seconds >= LONG_SECONDS:
            offset = 0.0
        rival = self.best(arm) if bar == "best" else bar
        amounts = self.comparison.amounts
        pairs = zip(amounts[arm], amounts[rival], strict=True)
        return Spread.of([lessened_ratio(above, below, offset) for above, below in pairs])


def lessened_ratio(above: float, below: float, offset: float) -> float:
    """Return ``(above - offset) / below``, but not less than 1 only because of the offset.

    So a bar of 1 or more is kept exactly if ``above <= bar * below + offset``, and means of many
    ratios do not grow better by what was not counted.
    """
    return max(above - offset, min(above, below)) / below


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A promise about an arm's ratio on each workload, or about the geometric mean of all."""

    arm: str
    bar: str
    required: float
    aim: float
    is_mean: bool = False
    only_long: bool = False
    one_pass: bool | None = None  # only workloads that are (are not) one pass over memory

    @property
    def promise(self) -> Promise:
        """The promise in the words of all benches."""
        which = "geometric mean" if self.is_mean else "each workload"
        if self.only_long:
            which = "one pass over memory, each" if self.one_pass else "each"
            which += f" of {1e3 * LONG_SECONDS:g} ms or more"
        label = f"{self.arm} / {self.bar}, {which}"
        return Promise(self.arm, None, self.required, self.aim, at_most=True, label=label)

    def choose(self, rows: Sequence[Judged]) -> list[Judged]:
        """Return the workloads that the promise is about."""
        return [
            row
            for row in rows
            if (row.seconds >= LONG_SECONDS or not self.only_long)
            and self.one_pass in {None, row.workload.is_one_pass}
        ]

    def measure(self, rows: Sequence[Judged], offset: float) -> float:
        """Return the worst of the medians, or their mean."""
        medians = [row.ratio(self.arm, self.bar, offset).median for row in rows]
        return statistics.geometric_mean(medians) if self.is_mean else max(medians)

    def judge(self, rows: Sequence[Judged]) -> Verdict:
        """Say how the promise stands; the aim has a smaller offset than the promise."""
        chosen = self.choose(rows)
        if not chosen:
            return Verdict(promise=self.promise, verdict="no workload")
        value = self.measure(chosen, OFFSET)
        verdict = self.promise.verdict(value)
        if verdict == "aim reached" and self.measure(chosen, AIM_OFFSET) > self.aim:
            verdict = "kept"
        ratios = {row.workload.name: row.ratio(self.arm, self.bar).median for row in chosen}
        above = {name: ratio for name, ratio in ratios.items() if ratio > self.required}
        return Verdict(
            promise=self.promise,
            verdict=verdict,
            value=value,
            above={} if self.is_mean else above,
            workloads=len(chosen),
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found about a promise; ``above`` has the workloads that miss it."""

    promise: Promise
    verdict: str
    value: float | None = None
    above: dict[str, float] = field(default_factory=dict)
    workloads: int = 0


BARS = [
    Bar(arm="default", bar="loop", required=1.1, aim=1.02),
    Bar(arm="default", bar="plain", required=1.1, aim=1.02, only_long=True, one_pass=False),
    Bar(arm="default", bar="plain", required=1.3, aim=1.02, only_long=True, one_pass=True),
    *(
        Bar(arm=arm, bar="best", required=required, aim=aim, is_mean=is_mean)
        for arm in ("default", "auto")
        for is_mean, required, aim in ((False, 1.35, 1.15), (True, 1.12, 1.05))
    ),
]
COLUMNS = (("default", "loop"), ("default", "plain"), ("default", "best"), ("auto", "best"))


@dataclass
class Overview:
    """All workloads in one table; those that are held out stand apart."""

    rows: list[Judged]
    is_part: bool = False
    binding: bool = True  # False at small sizes, about which nothing is promised

    @property
    def title(self) -> str:
        """What the table is about."""
        return f"defaults: {len(self.rows)} workloads, warm workers, one BLAS thread for all arms"

    @property
    def columns(self) -> list[tuple[str, str]]:
        """The ratios whose arms were measured."""
        arms = {name for row in self.rows for name in row.comparison.amounts}
        return [(arm, bar) for arm, bar in COLUMNS if arm in arms]

    def judged(self) -> list[Verdict]:
        """Every promise about an arm that was measured; a part of the table has no means."""
        measured = {arm for arm, _ in self.columns}
        found = [
            bar.judge(self.rows)
            for bar in BARS
            if bar.arm in measured and not (bar.is_mean and self.is_part)
        ]
        return found if self.binding else [replace(one, verdict="not judged") for one in found]

    @property
    def missed(self) -> list[str]:
        """Names of the promises that were not kept."""
        return [one.promise.name for one in self.judged() if one.verdict == "MISSED"]

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, for JSON."""
        return {
            "title": self.title,
            "workloads": [self._row_to_dict(row) for row in self.rows],
            "promises": [
                {
                    **asdict(one.promise),
                    "name": one.promise.name,
                    "value": one.value,
                    "verdict": one.verdict,
                    "missed by": one.above,
                }
                for one in self.judged()
            ],
        }

    def _row_to_dict(self, row: Judged) -> dict[str, Any]:
        ratios = {f"{arm} / {bar}": asdict(row.ratio(arm, bar)) for arm, bar in self.columns}
        return {
            **row.comparison.to_dict(),
            "group": row.workload.group,
            "held out": row.workload.is_held_out,
            "ratios": ratios,
        }

    def __str__(self) -> str:
        parts = [self.title, self._turns()]
        for words, is_held_out in (("in sight", False), ("held out", True)):
            rows = [row for row in self.rows if row.workload.is_held_out == is_held_out]
            parts += [self._ratio_table(words, rows)] if rows else []
        return "\n\n".join([*parts, self._mean_table(), self._promise_table(), *self._misses()])

    def _turns(self) -> str:
        others = [row.comparison.others for row in self.rows if row.comparison.others is not None]
        told = "arms taking turns, median [quartiles; range below ten rounds] of the ratios"
        if others:
            told += f"; other programs kept {statistics.mean(others):.1f} cpus busy meanwhile"
        offset = f"in calls below {1e3 * LONG_SECONDS:g} ms, / loop and / best leave out up to "
        return f"{told}\n{offset}{1e6 * OFFSET:g} µs beyond that arm"

    def _ratio_table(self, words: str, rows: Sequence[Judged]) -> str:
        names = [f"{arm} / {bar}" for arm, bar in self.columns]
        head = [f"workloads {words}", "plain ms", "rounds", *names, "best is"]
        return table(head, [self._ratio_row(row) for row in rows])

    def _ratio_row(self, row: Judged) -> list[str]:
        seconds = f"{1e3 * row.seconds:.3g}"
        ratios = [str(row.ratio(arm, bar)) for arm, bar in self.columns]
        name = f"{row.workload.group}: {row.workload.name}"
        return [name, seconds, str(row.comparison.rounds), *ratios, row.best("default")]

    def _mean_table(self) -> str:
        groups = {
            "all": self.rows,
            "in sight": [row for row in self.rows if not row.workload.is_held_out],
            "held out": [row for row in self.rows if row.workload.is_held_out],
        }
        rows = []
        for words, some in groups.items():
            means = [
                geometric_mean([r.ratio(arm, bar).median for r in some])
                for arm, bar in self.columns
            ]
            rows.append([words, str(len(some)), *(f"{mean:.2f}" for mean in means)])
        names = [f"{arm} / {bar}" for arm, bar in self.columns]
        return table(["geometric means", "workloads", *names], rows)

    def _promise_table(self) -> str:
        head = ("promised", "measured", "required", "aim", "missed by", "")
        rows = [
            (
                one.promise.name,
                "" if one.value is None else f"{one.value:.2f}",
                f"≤ {one.promise.required:g}",
                f"{one.promise.aim:g}",
                "" if not one.above else f"{len(one.above)} of {one.workloads}",
                one.verdict,
            )
            for one in self.judged()
        ]
        return table(head, rows)

    def _misses(self) -> list[str]:
        if not self.binding:
            return []
        return [
            f"  {one.promise.name}: missed by "
            + ", ".join(f"{n} {v:.2f}" for n, v in one.above.items())
            for one in self.judged()
            if one.above
        ]


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean; of nothing, "not a number"."""
    return statistics.geometric_mean(values) if values else math.nan
