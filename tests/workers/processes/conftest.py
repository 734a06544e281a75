"""Pools of two worker processes."""

import pytest

from taskcarrier.workers.processes.pool import ProcessPool
from tests.helpers import both
from tests.workers.processes.helpers import run


@pytest.fixture
def pool():
    """A pool for one test, which may kill its workers."""
    made = ProcessPool(2)
    yield made
    made.close()
    # pytest keeps it beyond the watch for leaks; its memory and processes go now.
    vars(made).clear()


@pytest.fixture(scope="module")
def warm():
    """A pool for the tests that leave it whole, started before the watch for leaks begins."""
    made = ProcessPool(2)
    run(made, both)
    yield made
    made.close()
    vars(made).clear()  # as above
