"""What goes wrong in the function: the caller sees it, and where it was."""

import dataclasses
import gc
import os
import sys
import threading
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

import taskcarrier
from taskcarrier import (
    DynamicParallelMapper,
    TaskError,
    map_array,
    map_chunks,
    map_items,
    reduce_array,
)
from tests.descriptors import n_descriptors
from tests.errors import FrozenError, HoldingError
from tests.faults.functions import note, noted
from tests.strategies import (
    EVERYWHERE,
    OF_BALANCE,
    assert_same,
    each_balance,
    each_of,
    each_ordered_run,
    each_parallel_run,
    each_run,
    keep_pools_warm,
    start_script,
)

pools = keep_pools_warm(2)


class TwoWordsError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")
        self.first, self.second = first, second


@pytest.mark.fault(34)
@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
@pytest.mark.parametrize(
    ("X", "words"),
    [
        (np.array(["1", "2"]), ["<U1", "X.astype(float)"]),
        (np.array([b"1", b"2"]), ["S1", "X.astype(float)"]),
        (np.array(["1", 2.0], object), ["object", "select_dtypes('number')"]),
        (np.zeros(2, [("a", "f8"), ("b", "U1")]), ["'b'", "X['name']"]),
    ],
)
def test_arrays_that_hold_no_numbers_are_named(backend, X, words):
    run = {"backend": backend, "n_jobs": 2}
    for call in (
        lambda: map_array(np.sqrt, X, **run),
        lambda: map_items(lambda x: np.sqrt(x) + 1, X, **run),
        lambda: map_chunks(lambda numbers, x: np.sqrt(x), np.ones(2), X, **run),
    ):
        with pytest.raises(TypeError) as info:
            call()
        (note,) = [one for one in info.value.__notes__ if "has dtype" in one]
        assert [word for word in words if word not in note] == []


@pytest.mark.fault(1)
@each_run
def test_an_error_keeps_its_type_and_arguments_and_names_axis_and_range(backend, balance):
    def func(chunk):
        if chunk[0, 0] == 6:
            raise ValueError("odd", 6)
        return chunk

    X = np.tile(np.arange(12), (5, 1))
    with pytest.raises(ValueError, match="odd") as caught:
        map_array(func, X, axis=1, chunksize=3, n_jobs=2, backend=backend, balance=balance)
    assert caught.value.args == ("odd", 6)
    notes = caught.value.__notes__
    assert any("axis 1, items 6:9 of an array of shape (5, 12)" in note for note in notes)
    if backend == "loky":
        assert 'raise ValueError("odd", 6)' in str(caught.value.__cause__)


@pytest.mark.fault(2)
@each_ordered_run
def test_of_several_errors_the_lowest_is_raised_on_every_run(backend, balance):
    def func(chunk):
        if chunk[0] in {9, 10, 25}:
            raise LookupError(int(chunk[0]))
        return chunk

    for _ in range(20):
        with pytest.raises(LookupError) as caught:
            map_array(func, np.arange(40), chunksize=1, n_jobs=2, backend=backend, balance=balance)
        assert caught.value.args == (9,)


@pytest.mark.fault(2)
@each_parallel_run
def test_the_second_of_two_simultaneous_errors_is_in_the_notes(backend, balance, tmp_path):
    def func(chunk):
        (tmp_path / str(chunk[0])).touch()
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.001)
        raise LookupError(f"here {chunk[0]}")

    with pytest.raises(LookupError, match="here 0") as caught:
        map_array(func, np.arange(2), chunksize=1, n_jobs=2, backend=backend, balance=balance)
    notes = "\n".join(caught.value.__notes__)
    assert "also failed: axis 0, items 1:2 of an array of shape (2,): LookupError: here 1" in notes


@pytest.mark.fault(2)
@each_balance
def test_workers_stop_at_their_next_range_after_an_error(balance, tmp_path):
    log = tmp_path / "log"

    def func(chunk):
        note(log, chunk[0])
        if chunk[0] == 0:
            raise LookupError
        while "0" not in noted(log):
            time.sleep(0.001)
        time.sleep(0.05)
        return chunk

    with pytest.raises(LookupError):
        map_array(func, np.arange(400), chunksize=1, n_jobs=2, backend="loky", balance=balance)
    # Where one is late to raise the error, the other may do some of its 200 or more meanwhile.
    assert len(noted(log)) < 100


@pytest.mark.fault(3)
@each_run
@pytest.mark.parametrize("kind", [TwoWordsError, HoldingError])
def test_errors_that_are_hard_to_pickle_keep_their_type_or_become_task_errors(
    backend, balance, kind
):
    arguments = ("one", "two") if kind is TwoWordsError else ("one",)

    def func(chunk):
        raise kind(*arguments)

    if backend == "loky":
        with pytest.raises((kind, TaskError), match="one") as caught:
            map_array(func, np.arange(4), n_jobs=2, backend=backend, balance=balance)
        if isinstance(caught.value, TaskError):
            assert caught.value.type_name.endswith(kind.__name__)
            assert kind.__name__ in str(caught.value)
            assert "raise kind" in str(caught.value.__cause__)
    else:
        with pytest.raises(kind, match="one"):
            map_array(func, np.arange(4), n_jobs=2, backend=backend, balance=balance)
    assert_same(
        map_array(np.sqrt, np.arange(4.0), n_jobs=2, backend=backend), np.sqrt(np.arange(4.0))
    )


def recurse(n):
    return recurse(n + 1)


ESCAPES = {
    "exit": (lambda c: sys.exit(7), SystemExit, (7,)),
    "interrupt": (lambda c: _raise(KeyboardInterrupt("here")), KeyboardInterrupt, ("here",)),
    "memory": (lambda c: _raise(MemoryError("full")), MemoryError, ("full",)),
    "recursion": (lambda c: recurse(0), RecursionError, None),
    "stop": (lambda c: _raise(StopIteration(3)), StopIteration, (3,)),
    "generator exit": (lambda c: _raise(GeneratorExit()), GeneratorExit, ()),
}


def _raise(error):
    raise error


@pytest.mark.fault(4)
@pytest.mark.parametrize("case", sorted(ESCAPES))
def test_exits_and_interrupts_of_the_task_arrive_as_themselves(case):
    func, kind, arguments = ESCAPES[case]
    for backend, balance in EVERYWHERE:
        with pytest.raises(kind) as caught:
            map_array(func, np.arange(4), n_jobs=2, backend=backend, balance=balance)
        assert arguments is None or caught.value.args == arguments
        with pytest.raises(kind):
            OF_BALANCE[balance](n_jobs=2, backend=backend)(func, range(4))
        assert map_array(np.sign, np.arange(2), n_jobs=2, backend=backend).tolist() == [0, 1]


@pytest.mark.fault(9)
@each_balance
def test_a_function_that_cannot_be_pickled_fails_before_anything_runs(balance, tmp_path):
    lock = threading.Lock()

    def func(chunk):
        (tmp_path / "ran").touch()
        return chunk if lock else None

    taskcarrier.shutdown()
    before = psutil.Process().children(recursive=True)
    with pytest.raises(TypeError, match="lock") as caught:
        map_array(func, np.arange(4), n_jobs=2, backend="loky", balance=balance)
    assert any("could not pickle the function" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match="lock"):
        map_array(np.add, np.arange(4), args=(lock,), n_jobs=2, backend="loky", balance=balance)
    assert not (tmp_path / "ran").exists()
    assert psutil.Process().children(recursive=True) == before


@each_balance
def test_a_failed_call_keeps_no_shared_memory_in_the_workers(balance):
    def func(chunk):
        if chunk[0] < 0:
            raise ValueError("negative")
        return np.full(len(chunk), os.getpid())

    def mapped():
        found = 0
        for child in psutil.Process().children():
            maps = (
                Path(f"/proc/{child.pid}/smaps")
                .read_text(encoding="utf-8")
                .split("taskcarrier (deleted)")
            )
            found += sum(int(part.split("Size:")[1].split()[0]) for part in maps[1:])
        return found  # kB

    map_array(func, np.zeros(4), n_jobs=2, backend="loky", balance=balance)
    before = mapped()
    for _ in range(3):
        with pytest.raises(ValueError, match="negative"):
            map_array(func, np.full(1_000_000, -1.0), n_jobs=2, backend="loky", balance=balance)
    assert mapped() - before < 8_000


@each_balance
def test_a_failed_call_leaves_nothing_to_the_garbage_collector(balance):
    def failing(chunk):
        raise LookupError

    def fail():
        with suppress(LookupError):
            map_array(failing, np.arange(9), n_jobs=2, backend="loky", balance=balance)
        with suppress(LookupError):
            OF_BALANCE[balance](2, backend="loky")(failing, range(9))
        return n_descriptors()

    gc.collect()
    gc.disable()
    try:
        before = fail()
        assert [fail() for _ in range(3)] == [before] * 3
    finally:
        gc.enable()


class Held:
    """What a function has in hand when it fails, and is gone when nobody refers to it."""


@each_of([run for run in EVERYWHERE if run[0] != "loky"])
@pytest.mark.parametrize("on_error", ["raise", "fill"])
def test_objects_held_by_a_failed_function_are_freed_without_the_garbage_collector(
    on_error, backend, balance
):
    held = []

    def failing(chunk):
        if chunk[0] == 2:
            thing = Held()
            held.append(weakref.ref(thing))
            raise LookupError
        return chunk

    options = {"n_jobs": 2, "backend": backend, "balance": balance, "chunksize": 1}
    gc.collect()
    gc.disable()
    try:
        with suppress(LookupError):
            map_array(failing, np.arange(4.0), on_error=on_error, **options)
        deadline = time.monotonic() + 60
        while any(one() for one in held) and time.monotonic() < deadline:
            time.sleep(0.01)  # a thread may just be letting go of it
        assert [one() for one in held] == [None] * len(held)
        assert held
    finally:
        gc.enable()


def test_the_output_of_a_script_names_what_is_wrong(tmp_path):
    code = """
import numpy as np
from taskcarrier import map_array
def func(chunk):
    if chunk[0] == 2: raise ValueError("as it was raised")
    return chunk
if __name__ == "__main__":
    map_array(func, np.arange(4), chunksize=1, n_jobs=2, backend="loky")
"""
    process = start_script(tmp_path, code)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ValueError: as it was raised" in err
    assert "while mapping axis 0, items 2:3 of an array of shape (4,)" in err
    assert 'if chunk[0] == 2: raise ValueError("as it was raised")' in err


class LockedError(Exception):
    __slots__ = ("code",)

    def __init__(self, code, *, text):
        object.__setattr__(self, "code", code)
        object.__setattr__(self, "text", text)

    def __setattr__(self, name, value):
        raise TypeError("no attributes")


def _first_error(collected):
    raise collected[1][0].error


VERBS = {
    "map_array": lambda f, **how: map_array(f, np.arange(4), **how),
    "map_items": lambda f, **how: map_items(f, np.arange(4), **how),
    "map_chunks": lambda f, **how: map_chunks(f, np.arange(4), **how),
    "reduce_array": lambda f, **how: reduce_array(f, np.arange(4), combine=np.add, **how),
    "collected": lambda f, **how: _first_error(
        map_array(f, np.arange(4), on_error="collect", **how)
    ),
    "map": lambda f, **how: DynamicParallelMapper(**how).map(f, range(4)),
    "map, collected": lambda f, **how: _first_error(
        DynamicParallelMapper(**how).map(f, range(4), on_error="collect")
    ),
    "map, retried": lambda f, **how: DynamicParallelMapper(**how).map(
        f, range(4), retry_on=Exception, retries=1
    ),
    "imap": lambda f, **how: list(DynamicParallelMapper(**how).imap(f, range(4))),
    "with": lambda f, **how: _within(DynamicParallelMapper(**how), f),
}


def _within(mapper, func):
    with mapper, taskcarrier.use_mapper(mapper):
        return mapper.map(func, range(4))


@pytest.mark.fault(45)
@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
@pytest.mark.parametrize("verb", sorted(VERBS))
@pytest.mark.parametrize("kind", [FrozenError, LockedError])
def test_exceptions_that_refuse_attributes_arrive_with_causes_and_contexts(backend, verb, kind):
    def func(x):
        try:
            {}["context"]
        except KeyError:
            raise kind(3, text="x") from ExceptionGroup("cause", [kind(4, text="y")])

    with pytest.raises(kind) as caught:
        VERBS[verb](func, n_jobs=2, backend=backend)
    error = caught.value
    assert (error.code, error.text) == (3, "x")
    assert any("while mapping" in note for note in error.__notes__)
    assert type(error.__context__) is KeyError
    assert error.__suppress_context__
    (member,) = error.__cause__.exceptions
    assert (type(member), member.code, member.text) == (kind, 4, "y")
    if backend == "loky":
        assert "raise kind(3" in str(error.__cause__.__cause__)


@pytest.mark.fault(45)
@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
def test_a_context_is_not_replaced_by_what_the_caller_is_handling(backend):
    def func(x):
        try:
            {}["first"]
        except KeyError:
            raise FrozenError(3, text="x")  # noqa: B904  # it is the context that is tried

    def while_handling(verb):
        try:
            raise LookupError("of the caller")  # noqa: TRY301  # as above
        except LookupError:
            verb(func, n_jobs=2, backend=backend)

    for verb in (VERBS["map_array"], VERBS["imap"]):
        with pytest.raises(FrozenError) as caught:
            while_handling(verb)
        assert caught.value.__cause__ is None
        assert caught.value.__context__.args == ("first",)


@dataclasses.dataclass(frozen=True)
class FrozenWarning(UserWarning):
    code: int


@pytest.mark.fault(10, 45)
def test_warnings_that_refuse_attributes_arrive_as_themselves():
    def func(chunk):
        warnings.warn(FrozenWarning(3), stacklevel=1)
        return chunk

    with pytest.warns(FrozenWarning) as seen:
        map_array(func, np.arange(4), n_jobs=2, backend="loky")
    assert [one.message for one in seen] == [FrozenWarning(3)]


class Stubborn(Exception):  # noqa: N818  # it is no error of ours
    def add_note(self, note):
        raise RuntimeError("no notes, please")


@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
def test_an_exception_that_refuses_notes_keeps_its_type(backend):
    def func(chunk):
        raise Stubborn("as I am")

    with pytest.raises(Stubborn, match="as I am"):
        map_array(func, np.zeros(4), n_jobs=2, backend=backend)


@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
@pytest.mark.parametrize("rule", ["raise", "ignore"])
def test_floating_point_errors_are_treated_as_the_caller_says(backend, rule):
    X = np.array([1.0, 0.0])
    with np.errstate(all=rule):
        if rule == "raise":
            with pytest.raises(FloatingPointError):
                map_array(lambda chunk: 1 / chunk, X, n_jobs=2, backend=backend)
        else:
            result = map_array(lambda chunk: 1 / chunk, X, n_jobs=2, backend=backend)
            assert result.tolist() == [1.0, np.inf]


# Warnings of the function


class OddWarning(UserWarning):
    """Holds what cannot be pickled."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


def warning(x):
    """Warns in every call, of two things."""
    warnings.warn("careful", stacklevel=1)
    warnings.warn(FutureWarning("not for long"), stacklevel=1)
    return x


def heard(call, *filters):
    """What the caller's filters are shown."""
    with warnings.catch_warnings(record=True) as seen:
        for one in filters or ["always"]:
            warnings.simplefilter(one)
        call()
    return [(one.category, str(one.message), one.filename, one.lineno) for one in seen]


@pytest.mark.fault(10)
@each_balance
def test_warnings_of_processes_reach_the_caller_once(balance):
    X, run = np.arange(40), {"n_jobs": 2, "backend": "loky"}
    in_one_call = heard(lambda: warning(1))
    assert [one[0] for one in in_one_call] == [UserWarning, FutureWarning]
    calls = [
        lambda: map_array(warning, X, chunksize=3, balance=balance, **run),
        lambda: map_items(warning, X, balance=balance, **run),
        lambda: map_chunks(warning, X, balance=balance, **run),
        lambda: reduce_array(warning, X, chunksize=10, combine=np.add, balance=balance, **run),
        lambda: OF_BALANCE[balance](**run)(warning, range(40)),
    ]
    for call in calls * 2:  # every run is heard
        assert sorted(heard(call), key=str) == sorted(in_one_call, key=str)


@pytest.mark.fault(10)
def test_warnings_are_not_also_shown_by_workers(capfd):
    assert heard(lambda: map_array(warning, np.arange(4), n_jobs=2, backend="loky"), "ignore") == []
    taskcarrier.shutdown()  # whatever is written is written by then
    assert capfd.readouterr() == ("", "")


@pytest.mark.fault(10)
@each_run
def test_a_filter_may_turn_warnings_into_errors(backend, balance):
    run = {"n_jobs": 2, "backend": backend, "balance": balance}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="careful"):
            map_array(warning, np.arange(4), **run)
    assert map_array(np.sign, np.arange(2), **run).tolist() == [0, 1]


@pytest.mark.fault(10)
def test_an_error_takes_precedence_over_warnings():
    def func(chunk):
        warnings.warn("careful", stacklevel=1)
        if chunk[0] == 3:
            raise LookupError("this")
        return chunk

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LookupError, match="this"):
            map_array(func, np.arange(4), chunksize=1, n_jobs=2, backend="loky")


@pytest.mark.fault(10)
def test_warnings_of_numpy_and_of_an_unpicklable_kind_arrive():
    def func(chunk):
        warnings.warn(OddWarning("held"), stacklevel=1)
        return np.log(chunk)

    X = np.array([1.0, 0.0, -1.0, 2.0])
    seen = heard(lambda: map_array(func, X, chunksize=1, n_jobs=2, backend="loky"))
    assert sorted(text for _, text, _, _ in seen) == [
        "OddWarning: held",
        "divide by zero encountered in log",
        "invalid value encountered in log",
    ]
    assert {kind for kind, *_ in seen} == {UserWarning, RuntimeWarning}
    with np.errstate(all="ignore"):
        seen = heard(lambda: map_array(np.log, X, n_jobs=2, backend="loky"))
    assert seen == []


@pytest.mark.fault(10)
@pytest.mark.parametrize("field", ["message", "category", "module"])
def test_filters_by_text_kind_or_module_apply(field):
    options = {"message": "care", "category": UserWarning, "module": __name__.replace(".", r"\.")}
    for call in (
        lambda: warning(1),
        lambda: map_items(warning, np.arange(4), n_jobs=2, backend="loky"),
    ):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", **{field: options[field]})
            call()
        left = [] if field == "module" else [FutureWarning]
        assert [one.category for one in seen] == left


def test_warnings_of_main_are_shown_by_default(tmp_path):
    code = """
import warnings
import numpy as np
from taskcarrier import map_array
def func(chunk):
    warnings.warn("old", DeprecationWarning)
    return chunk
if __name__ == "__main__":
    map_array(func, np.arange(4), chunksize=1, n_jobs=2, backend="loky")
"""
    process = start_script(tmp_path, code, PYTHONWARNINGS="")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.count("DeprecationWarning: old") == 1
