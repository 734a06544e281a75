"""Fixtures of several test modules."""

import pytest

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
