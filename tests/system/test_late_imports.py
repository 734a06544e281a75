"""Imports after the end of the main thread."""

import pytest

from tests.strategies import run_script


def test_hooks_that_python_no_longer_takes_are_run_at_exit(tmp_path):
    code = """
import threading
from taskcarrier.system.late_imports import late_hooks

def late():
    threading.main_thread().join()
    register = threading._register_atexit
    with late_hooks():
        threading._register_atexit(print, "at the end")
    assert threading._register_atexit is register
    print("registered")

threading.Thread(target=late).start()
"""
    assert run_script(tmp_path, code).splitlines() == ["registered", "at the end"]


COLLECTED = """
import threading
import numpy as np
from taskcarrier import map_chunks

def wait_and_fail(chunk):
    threading.main_thread().join()
    raise ValueError("late")

def late():
    _, failures = map_chunks(wait_and_fail, np.arange(3), chunksize=3, n_jobs=1, on_error="collect")
    print(failures[0].error)

threading.Thread(target=late).start()
"""


@pytest.mark.one_case
@pytest.mark.fault(47)
def test_failures_are_listed_after_the_end_of_the_main_thread(tmp_path):
    assert run_script(tmp_path, COLLECTED).split() == ["late"]
