"""Maps whose results are handed to the caller, one for each range."""

from __future__ import annotations

from typing import Any

from taskcarrier.arrays.call import ArrayCall, Outcomes
from taskcarrier.arrays.move import ArrayMove
from taskcarrier.run import raise_first_failure, raise_if_missing
from taskcarrier.workers.records import DeliveredFailure


def run_collected(
    call: ArrayCall, outcomes: Outcomes | None = None
) -> tuple[dict[int, Any], list[DeliveredFailure]]:
    """Run a call; return results by the start of their range, and the failures.

    `outcomes` are what the function has returned or raised before (`ArrayTask.outcomes`).
    """
    executor = call.decide(outcomes)
    work = call.make_work(executor.staging, None, outcomes=outcomes)
    try:
        outcome = call.execute(work, executor, move=ArrayMove(call) if executor.may_move else None)
    finally:
        if outcomes:  # errors that were not raised refer to frames, and these to them
            outcomes.clear()
    call.explain_ufunc_errors(outcome)
    raise_first_failure(outcome, call.inputs.describe)
    delivered = [parts for _, parts in outcome.delivered]
    results = {
        where.start: result
        for parts in delivered
        for where, result in parts.results
        if isinstance(where, slice)
    }
    failures = call.collect_failures(delivered)
    done = results.keys() | {start for start, _, _ in failures}
    ranges = list(map(call.grid.range_of, range(len(call.grid))))
    missing = [bounds for bounds in ranges if bounds[0] not in done]

    def list_results() -> list[Any]:
        return [results.get(start) for start, _ in ranges]

    raise_if_missing(outcome, call.inputs.describe, missing, list_results)
    return results, failures
