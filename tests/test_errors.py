"""The exceptions: what they are, and what they carry."""

import pickle
import signal
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

import taskcarrier
from taskcarrier.errors import (
    TaskError,
    WorkerDiedError,
    WorkerTracebackError,
    describe_death,
    describe_exit,
)
from taskcarrier.workers.records import WorkerDeath


@pytest.mark.parametrize(
    ("exitcode", "text"),
    [
        (None, "gone"),
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-signal.SIGKILL, "killed by signal 9 (SIGKILL)"),
        (-signal.SIGSEGV, "killed by signal 11 (SIGSEGV)"),
        (-63, "killed by signal 63 (no standard signal)"),
    ],
)
def test_describe_exit_names_codes_and_signals(exitcode, text):
    assert describe_exit(exitcode) == text


@pytest.mark.parametrize(
    ("exitcode", "end"),
    [
        (-signal.SIGKILL, "; the kernel kills so when memory runs out"),
        (-signal.SIGSEGV, "; some library or compiled function has crashed"),
        (
            -signal.SIGBUS,
            (
                "; a file that it maps was cut off by another program, or some library or "
                "compiled function has crashed"
            ),
        ),
        (-signal.SIGTERM, " while mapping item 3"),
        (3, " while mapping item 3"),
        (None, " while mapping item 3"),
    ],
)
def test_the_text_of_a_death_hints_at_a_cause(exitcode, end):
    death = WorkerDeath(0, "process 7", exitcode, (3, 4), 1)
    assert describe_death(death, "item 3").endswith(end)


class TestWorkerDiedError:
    def test_worker_died_error_is_what_executors_raise(self):
        assert issubclass(WorkerDiedError, BrokenProcessPool)
        assert issubclass(WorkerDiedError, BrokenExecutor)

    def test_worker_died_error_carries_facts(self):
        error = WorkerDiedError("gone", worker="process 7", exitcode=-9, in_hand=(2, 4))
        assert str(error) == "gone"
        assert (error.worker, error.exitcode, error.in_hand) == ("process 7", -9, (2, 4))
        assert error.missing == []
        assert error.partial is None

    def test_each_error_has_its_own_list_of_missing_ranges(self):
        WorkerDiedError("one").missing.append((0, 1))
        assert WorkerDiedError("other").missing == []

    def test_facts_of_worker_died_error_survive_pickling(self):
        error = WorkerDiedError("gone", worker="process 7", exitcode=-9, in_hand=(2, 4))
        error.missing = [(2, 4), (6, 8)]
        error.partial = [1, None]
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is WorkerDiedError
        assert copy.args == error.args
        assert vars(copy) == vars(error)


class TestTaskError:
    def test_task_error_is_a_runtime_error_with_a_type_name(self):
        error = TaskError("text", "some.module.Kind")
        assert isinstance(error, RuntimeError)
        assert (str(error), error.type_name) == ("text", "some.module.Kind")

    def test_task_error_survives_pickling(self):
        copy = pickle.loads(pickle.dumps(TaskError("text", "some.module.Kind")))
        assert type(copy) is TaskError
        assert (str(copy), copy.type_name) == ("text", "some.module.Kind")


def test_a_worker_s_traceback_begins_on_a_line_of_its_own():
    assert str(WorkerTracebackError("Traceback ...")) == "\nTraceback ..."


def test_errors_are_public_names():
    assert taskcarrier.TaskError is TaskError
    assert taskcarrier.WorkerDiedError is WorkerDiedError
    with pytest.raises(AttributeError, match="no attribute 'NoSuchError'"):
        taskcarrier.NoSuchError  # noqa: B018  # looking it up raises


def test_the_error_of_dead_workers_is_known_by_its_public_name():
    assert f"{WorkerDiedError.__module__}.{WorkerDiedError.__qualname__}" == (
        "taskcarrier.errors.WorkerDiedError"
    )
    assert b"taskcarrier.errors" in pickle.dumps(WorkerDiedError)
    assert pickle.loads(pickle.dumps(WorkerDiedError)) is WorkerDiedError
    with pytest.raises(AttributeError, match="no attribute 'OtherError'"):
        taskcarrier.errors.OtherError  # noqa: B018  # asking is the test
