"""Fixtures of several test modules."""

import pytest

from taskcarrier.scheduling import history
from taskcarrier.short_calls import ShortSettings
from taskcarrier.workers import caller_chunks, hand_overs, stream_hand_over
from taskcarrier.workers.caller_first_stream import CallerFirstQueue
from tests.clocks import LONG
from tests.strategies import EVERYWHERE, LEFT_TO_ALL


@pytest.fixture(
    params=[
        pytest.param(
            run, id="-".join(run), marks=pytest.mark.thorough if run in LEFT_TO_ALL else ()
        )
        for run in EVERYWHERE
    ]
)
def run(request):
    """Options of a run with two workers; `make test` has one of each backend."""
    backend, balance = request.param
    return {"backend": backend, "balance": balance, "n_jobs": 2}


@pytest.fixture(autouse=True)
def nothing_is_missed():
    """Start no processes because of what earlier tests have missed."""
    hand_overs.missed_seconds.clear()


@pytest.fixture
def general_way(monkeypatch):
    """Let no call take the short way."""
    monkeypatch.setattr(ShortSettings, "choose", lambda *_, **__: (None, None))
    monkeypatch.setattr(history, "predict_busy", lambda *_: None)


@pytest.fixture
def hand_over_after(monkeypatch):
    """Return a function that has the rest handed over after so many chunks, and not before.

    In streams, it is handed over after so many items. No call takes the short way.
    """
    monkeypatch.setattr(history, "predict", lambda *_: None)
    monkeypatch.setattr(history, "predict_busy", lambda *_: None)
    monkeypatch.setattr(history, "find_alone_seconds", lambda *_: 0.0)
    chunks = caller_chunks.CallerChunks
    for module in (hand_overs, stream_hand_over):
        monkeypatch.setattr(module, "has_warm_processes", lambda n: True)
    monkeypatch.setattr(caller_chunks, "_READY_SECONDS", LONG)
    monkeypatch.setattr(chunks, "_find_seconds_to_wait", lambda self: LONG)

    def plan(n_chunks):
        monkeypatch.setattr(chunks, "_pays", lambda self, first: first >= n_chunks)
        monkeypatch.setattr(CallerFirstQueue, "_pays", lambda self: self._n_done >= n_chunks)

    return plan
