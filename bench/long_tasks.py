"""A few long items: does the default call lose time by beginning alone, or by cutting badly?

Work of Python is as many steps as take the time on this machine at the start; it runs at the same
time in processes only, so threads are no arm there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

import taskcarrier
from bench import ours
from bench.defaults import N_JOBS
from bench.timing import Arm, Comparison, Promise, Settings, compare
from bench.work import Spinner, measure_step, sleep_each, sleep_item, spin, spin_item

LIST_ITEMS, LIST_SECONDS = 4, 1.0
CHUNKS, CHUNK_SECONDS = 16, 0.2

Call = Callable[..., Any]


def run(settings: Settings) -> list[Comparison]:
    """Measure lists, fits and chunks, with work of Python and asleep."""
    part = settings.pick(full=1.0, quick=0.1, tiny=0.002)
    steps = part / measure_step()
    with ExitStack() as stack:
        for backend in ("threading", "loky"):  # their idle workers are kept
            ours.warm_mapper(stack, "static", N_JOBS, backend)
        items, chunks = f"{LIST_ITEMS} list items of 1 s", f"{CHUNKS} chunks of 0.2 s"
        list_of, costs = partial(_map_list, LIST_ITEMS), partial(_map_costs, CHUNKS)
        return [
            _study(settings, f"{items}, Python", partial(list_of, spin_item, int(steps))),
            _study(settings, f"{items}, asleep", partial(list_of, sleep_item, part), threads=True),
            _study(settings, f"{LIST_ITEMS} fits of 1 s, Python", partial(_fit, int(steps))),
            _study(settings, f"{chunks}, Python", partial(costs, spin, int(CHUNK_SECONDS * steps))),
            _study(
                settings,
                f"{chunks}, asleep",
                partial(costs, sleep_each, CHUNK_SECONDS * part),
                threads=True,
            ),
        ]


def _study(settings: Settings, title: str, call: Call, *, threads: bool = False) -> Comparison:
    """Compare the default with explicit backends; the promise is about the faster of these."""
    explicit = ["threading", "loky"] if threads else ["loky"]
    arms = [Arm("default", call)]
    arms += [Arm(name, partial(call, backend=name)) for name in ("auto", *explicit)]
    found = compare(
        f"long_tasks: {title}, {N_JOBS} jobs",
        arms,
        rounds=settings.turns(full=5, quick=3),
        reference="loky",
    )
    best = min(explicit, key=lambda name: found.ratio(name, None).median)
    label = f"default / best explicit ({best})"
    found.promises = [Promise("default", best, 1.05, 1.0, at_most=True, label=label)]
    return found


def _map_list(n: int, func: Call, cost: float, **given: str) -> list[Any]:
    return list(ours.MAPPERS["static"](N_JOBS, **given).map(func, [cost] * n))


def _map_costs(n: int, func: Call, cost: float, **given: str) -> np.ndarray:
    result: np.ndarray = taskcarrier.map_array(func, np.full(n, cost), n_jobs=N_JOBS, **given)
    return result


def _fit(steps: int, **given: str) -> list[int]:
    X = np.zeros((8, 2))
    rows = [np.arange(2)] * LIST_ITEMS
    fitted = taskcarrier.fit_many(Spinner(steps), X, rows=rows, n_jobs=N_JOBS, **given)
    return [one.state_ for one in fitted]
