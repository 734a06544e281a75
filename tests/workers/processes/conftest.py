"""Pools of two worker processes."""

import pytest

from tests.helpers import both
from tests.workers.processes.helpers import open_pool, run


@pytest.fixture
def pool():
    """A pool for one test, which may kill its workers."""
    with open_pool(2) as made:
        yield made


@pytest.fixture(scope="module")
def warm():
    """A pool for the tests that leave it whole, started before the watch for leaks begins."""
    with open_pool(2) as made:
        run(made, both)
        yield made
