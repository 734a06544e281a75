"""Static against dynamic load balancing over many sizes of a list, for a light and a heavy task.

This repeats the study that the project's mappers come from: 2015, two workers, lists of 0 to 3000
items. Tasks sleep, so the heavy ones cost nothing but time, and the distance between the curves is
the cost of handing out the items.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import taskcarrier
from bench.timing import Settings, WrongResultError, table
from bench.work import heavy, light

N_JOBS = 2
MAPPERS = ("serial", "static", "dynamic")
FUNCS: dict[str, Callable[[int], int]] = {"light": light, "heavy": heavy}
ALL_SIZES = range(0, 3001, 50)
RECORD = (
    "2015, two workers: heavy 5.10 ms a task static, 5.17 ms dynamic;",
    "light: static met serial only at 600-700 items, dynamic never did",
)
COLOURS = {"serial": "#6b7280", "static": "#2563eb", "dynamic": "#d97706"}
STYLES = ("-", "-", (0, (4, 2)))  # static and dynamic nearly cover each other


@dataclass(frozen=True)
class Sample:
    """One measured map."""

    task: str
    mapper: str
    size: int
    repeat: int
    seconds: float


@dataclass
class Study:
    """All samples of a run, and what they say."""

    samples: list[Sample]
    notes: list[str]
    binding: bool = True
    missed: tuple[str, ...] = ()

    def curve(self, task: str, mapper: str) -> tuple[list[int], list[float]]:
        """Sizes and median seconds of one line of the figure."""
        points: dict[int, list[float]] = {}
        for sample in self.samples:
            if (sample.task, sample.mapper) == (task, mapper):
                points.setdefault(sample.size, []).append(sample.seconds)
        return sorted(points), [median(points[size]) for size in sorted(points)]

    def to_dict(self) -> dict[str, Any]:
        """Curves and derived numbers, for JSON."""
        curves = {
            f"{task} {mapper}": dict(zip(*self.curve(task, mapper), strict=True))
            for task in FUNCS
            for mapper in MAPPERS
        }
        return {"title": "balancing", "curves": curves, "rules": rules(self), "notes": self.notes}

    def __str__(self) -> str:
        numbers = rules(self)
        rows = [(mapper, _ms(numbers[f"heavy {mapper} ms a task"])) for mapper in MAPPERS]
        longest = max(sample.size for sample in self.samples)
        lines = [
            f"balancing: lists of 0 to {longest} items, loky, {N_JOBS} jobs",
            table(("heavy task (10 ms of sleep)", "ms a task"), rows),
        ]
        lines += [
            f"  light task (0.1 ms of sleep): {mapper} {numbers[f'light {mapper} meets serial']}"
            for mapper in ("static", "dynamic")
        ]
        return "\n".join([*lines, *(f"  {line}" for line in (*RECORD, *self.notes))])


def run(settings: Settings) -> list[Study]:
    """Measure, write data and figure: into ``docs/`` at full size, else only into ``out``."""
    plans = [*_light(settings), *_heavy(settings)]
    study = Study(list(_measure(plans)), [])
    if settings.scale == "full":
        study.notes.append(
            "heavy: every 100 items in parallel, every 500 serial (all: half an hour)"
        )
    folder = settings.out or (Path("docs") if settings.scale == "full" else None)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        _write(study.samples, folder / "load_balancing.csv")
        study.notes += [f"data: {folder / 'load_balancing.csv'}", _figure(study, folder)]
    return [study]


def rules(study: Study) -> dict[str, Any]:
    """Rules of thumb: what a heavy task costs, and from which size on the light task gains."""
    numbers: dict[str, Any] = {
        f"heavy {mapper} ms a task": slope(*study.curve("heavy", mapper)) * 1000
        for mapper in MAPPERS
    }
    for mapper in ("static", "dynamic"):
        pair = (study.curve("light", "serial"), study.curve("light", mapper))
        numbers[f"light {mapper} meets serial"] = meeting(
            pair[0][0][1:], pair[0][1][1:], pair[1][1][1:]
        )
    return numbers


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds that one item more costs: the slope of the straight line through the points."""
    return float(np.polyfit(sizes, seconds, 1)[0])


def meeting(sizes: Sequence[int], serial: Sequence[float], parallel: Sequence[float]) -> str:
    """Tell from which size on ``parallel`` is faster than ``serial`` for good, and where first."""
    faster = [ours < plain for plain, ours in zip(serial, parallel, strict=True)]
    if not faster[-1]:
        return "does not beat serial"
    first = sizes[faster.index(True)]
    settled = len(faster) - faster[::-1].index(False) if False in faster else 0
    return f"beats serial from {first} items, and always from {sizes[settled]}"


def _light(settings: Settings) -> list[tuple[str, str, int, int]]:
    sizes = settings.pick(full=ALL_SIZES, quick=range(0, 1001, 100), tiny=range(0, 21, 10))
    repeats = settings.turns(full=3, quick=1)
    return [("light", m, n, k) for k in range(repeats) for n in sizes for m in _turn(k + n)]


def _heavy(settings: Settings) -> list[tuple[str, str, int, int]]:
    parallel = settings.pick(full=range(0, 3001, 100), quick=range(0, 81, 20), tiny=range(0, 5, 2))
    serial = settings.pick(full=range(0, 3001, 500), quick=range(0, 81, 40), tiny=range(0, 5, 4))
    return [("heavy", m, n, 0) for n in parallel for m in _turn(n) if m != "serial" or n in serial]


def _turn(turn: int) -> tuple[str, ...]:
    start = turn // 50 % len(MAPPERS)
    return (*MAPPERS[start:], *MAPPERS[:start])


def _measure(plans: Sequence[tuple[str, str, int, int]]) -> Iterator[Sample]:
    mappers = {
        "serial": taskcarrier.SerialMapper(),
        "static": taskcarrier.StaticParallelMapper(N_JOBS, backend="loky"),
        "dynamic": taskcarrier.DynamicParallelMapper(N_JOBS, backend="loky"),
    }
    for mapper in mappers.values():
        mapper(light, list(range(10)))  # worker processes start here and stay
    for task, name, size, repeat in plans:
        items = list(range(size))
        begin = time.perf_counter()
        answer = mappers[name](FUNCS[task], items)
        seconds = time.perf_counter() - begin
        if list(answer) != items:
            raise WrongResultError(f"{name} mapper, {task} task, {size} items: wrong answer")
        yield Sample(task, name, size, repeat, seconds)


def _write(samples: Sequence[Sample], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("task", "mapper", "size", "repeat", "seconds"))
        for sample in samples:
            row = (sample.task, sample.mapper, sample.size, sample.repeat, f"{sample.seconds:.6f}")
            writer.writerow(row)


def _figure(study: Study, folder: Path) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "figure: matplotlib is not installed, left out"
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    titles = {"light": "Light task: 0.1 ms of sleep", "heavy": "Heavy task: 10 ms of sleep"}
    for axes, (task, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        _panel(axes, study, task, title)
    figure.savefig(folder / "load_balancing.png", dpi=150)
    return f"figure: {folder / 'load_balancing.png'}"


def _panel(axes: Any, study: Study, task: str, title: str) -> None:
    sizes, seconds = study.curve(task, "serial")
    half = [value / N_JOBS for value in seconds]
    axes.plot(sizes, half, color="#9ca3af", linestyle=":", label=f"serial / {N_JOBS}")
    for (mapper, colour), style in zip(COLOURS.items(), STYLES, strict=True):
        axes.plot(*study.curve(task, mapper), color=colour, linestyle=style, label=mapper)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("items in the list")
    axes.set_ylabel("seconds")
    axes.set_xlim(0, max(sizes))
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.legend(frameon=False)


def _ms(value: float) -> str:
    return f"{value:.2f}"
