"""Exceptions on their way from a worker to the caller."""

import itertools
import sys
import threading
import traceback

import numpy as np
import pytest

from taskcarrier.errors import TaskError, WorkerTracebackError
from taskcarrier.workers.pickled_errors import pickle_error, unpickle_error
from tests.errors import FrozenError, SlottedError, SpeechlessError, StubbornError, throw


class WordyError(Exception):
    """Has other arguments than its class takes."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class CodedError(OSError, ValueError):
    def __init__(self, path):
        super().__init__(2, "none", path)


class RebuiltError(Exception):
    """Says itself how it is made again."""

    def __init__(self, path):
        super().__init__(f"no {path}")
        self.path = path

    def __reduce__(self):
        return RebuiltError, (f"{self.path}, sent",)


class RestoredError(Exception):
    """Says itself what becomes of its state."""

    def __setstate__(self, state):
        self.__dict__.update(state, restored=True)


class UnprintableError(Exception):
    """Cannot be formatted by `traceback`."""

    @property
    def __notes__(self):
        raise RuntimeError("no")


class DisguisedError(Exception):
    """Pickles as something that is no exception."""

    def __reduce__(self):
        return dict, ()


class LostError(Exception):
    pass


def raised(error, *cause, handling=None):
    """The exception, raised, maybe while another is handled."""
    try:
        if handling is None:
            throw(error, *cause)
        try:
            throw(handling)
        except type(handling):
            throw(error, *cause)
    except type(error) as caught:
        return caught


def travelled_error(error):
    return unpickle_error(pickle_error(error))


def told(error):
    """The worker's text: the cause of the last exception that is shown."""
    while not isinstance(error, WorkerTracebackError):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return str(error)


class TestSingleErrors:
    @pytest.mark.parametrize(
        "error",
        [
            ValueError("no", 3),
            SystemExit(3),
            KeyboardInterrupt(),
            KeyError("k"),
            StopIteration(3),
            OSError(2, "none", "file"),
            OSError(2, "none", "file", None, "other"),
            BlockingIOError(11, "later", 5),
            ImportError("no", name="n", path="p"),
            SyntaxError("no", ("file", 3, 4, "text", 5, 6)),
            UnicodeDecodeError("ascii", b"\xff", 0, 1, "r"),
            ExceptionGroup("g", [ValueError("a"), TypeError("b")]),
            TaskError("text", "kind"),
            np.exceptions.AxisError(3, 2, "which"),
            FrozenError(3, text="x"),
            SlottedError(3),
            WordyError(1, 2),
            CodedError("file"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_an_error_arrives_unchanged(self, error):
        arrived = travelled_error(raised(error))
        assert type(arrived) is type(error)
        assert repr(arrived) == repr(error)
        assert str(arrived) == str(error)
        assert repr(arrived.args) == repr(error.args)
        for name in ("errno", "filename", "filename2", "name", "path", "lineno", "value", "code"):
            assert getattr(arrived, name, None) == getattr(error, name, None)

    def test_notes_and_attributes_arrive(self):
        error = ValueError("no")
        error.add_note("on item 3")
        error.extra = [1, 2]
        error.itself = error
        arrived = travelled_error(error)
        assert arrived.__notes__ == ["on item 3"]
        assert arrived.extra == [1, 2]
        assert arrived.itself is arrived

    def test_slots_arrive(self):
        arrived = travelled_error(SlottedError(3))
        assert arrived.code == 3
        assert arrived.elsewhere == [3]
        assert not hasattr(arrived, "left_empty")

    def test_errors_are_rebuilt_as_their_class_says(self):
        assert str(travelled_error(RebuiltError("here"))) == "no here, sent"
        error = RestoredError("no")
        error.extra = 3
        arrived = travelled_error(error)
        assert (arrived.restored, arrived.extra, arrived.args) == (True, 3, ("no",))

    def test_an_error_of_a_local_class_arrives(self):
        class LocalError(Exception):
            pass

        arrived = travelled_error(LocalError("no"))
        assert type(arrived) is LocalError
        assert arrived.args == ("no",)

    def test_the_text_of_the_traceback_is_the_cause(self):
        arrived = travelled_error(raised(ValueError("no")))
        assert isinstance(arrived.__cause__, WorkerTracebackError)
        text = str(arrived.__cause__)
        assert "in throw" in text
        assert text.endswith("ValueError: no")

    def test_an_error_that_cannot_be_printed_arrives(self):
        arrived = travelled_error(raised(UnprintableError("no")))
        assert type(arrived) is UnprintableError
        assert "in throw" in told(arrived)
        assert "UnprintableError: no" in told(arrived)


class WithheldError(Exception):
    def __getattribute__(self, name):
        raise AttributeError(name)


class PosingError(LookupError):
    def __init__(self, number):
        super().__init__(str(number))
        self.number = number


class QuarrelsomeError(Exception):
    def __init__(self, *args):
        super().__init__(*args)
        self.lock = threading.Lock()  # cannot be pickled

    def __eq__(self, other):
        raise ZeroDivisionError

    __hash__ = Exception.__hash__


class MoodyError(Exception):
    n_sent = 0

    def __reduce__(self):
        MoodyError.n_sent += 1
        if MoodyError.n_sent in {1, 3}:
            raise ValueError("not now")
        return MoodyError, ()


class TestReplacedErrors:
    def test_an_error_that_can_be_pickled_only_sometimes_is_replaced(self):
        arrived = travelled_error(raised(MoodyError()))
        assert type(arrived) is TaskError
        assert "could not be sent from the worker: ValueError: not now" in str(arrived)

    def test_an_error_whose_class_claims_to_be_a_builtin_arrives(self, monkeypatch):
        monkeypatch.setattr(PosingError, "__module__", "builtins")
        arrived = travelled_error(raised(PosingError(3)))
        assert (type(arrived).__name__, arrived.args, arrived.number) == ("PosingError", ("3",), 3)

    def test_an_error_without_attributes_arrives_or_is_replaced(self):
        arrived = travelled_error(raised(WithheldError("no")))
        assert issubclass(type(arrived), (TaskError, WithheldError))
        assert "in throw" in told(arrived)

    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (StubbornError("no"), "StubbornError: no"),
            (ValueError(threading.Lock()), "ValueError: <unlocked _thread.lock"),
            (SpeechlessError("no"), "SpeechlessError: <str() raised ZeroDivisionError>"),
        ],
    )
    def test_errors_that_do_not_survive_pickling_are_replaced(self, error, text):
        arrived = travelled_error(raised(error))
        assert type(arrived) is TaskError
        assert str(arrived).startswith(text)
        assert "could not be sent from the worker" in str(arrived)
        assert arrived.type_name == f"{type(error).__module__}.{type(error).__qualname__}"
        assert "in throw" in str(arrived.__cause__)

    def test_errors_that_arrive_as_something_else_are_replaced(self):
        arrived = travelled_error(raised(DisguisedError("no")))
        assert type(arrived) is TaskError
        assert arrived.type_name.endswith("DisguisedError")

    def test_errors_that_cannot_be_read_in_the_caller_are_replaced(self, monkeypatch):
        packed = pickle_error(raised(LostError("x", "y")))
        monkeypatch.delattr(sys.modules[__name__], "LostError")
        arrived = unpickle_error(packed)
        assert type(arrived) is TaskError
        assert "cannot be read here (AttributeError" in str(arrived)
        assert arrived.type_name.endswith("LostError")
        assert "in throw" in told(arrived)


def chain(error):
    """What Python shows, from the last exception to the first."""
    seen = []
    while error is not None:
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return seen


def kinds(errors):
    return [type(error) for error in errors]


class TestChains:
    def test_a_cause_arrives(self):
        arrived = travelled_error(raised(ValueError("no"), raised(KeyError("why"))))
        assert kinds(chain(arrived)) == [ValueError, KeyError, WorkerTracebackError]
        assert arrived.__cause__.args == ("why",)
        text = told(arrived)
        assert text.index("KeyError: 'why'") < text.index("ValueError: no")

    def test_a_context_arrives_and_is_no_cause(self):
        error = raised(FrozenError(3, text="second"), handling=KeyError("first"))
        arrived = travelled_error(error)
        assert arrived.__cause__ is None
        assert not arrived.__suppress_context__
        assert type(arrived.__context__) is KeyError
        assert "KeyError: 'first'" in told(arrived)

    def test_a_suppressed_context_arrives(self):
        arrived = travelled_error(raised(ValueError("second"), None, handling=KeyError("first")))
        assert arrived.__suppress_context__
        assert type(arrived.__context__) is KeyError
        assert kinds(chain(arrived)) == [ValueError, WorkerTracebackError]

    def test_cause_and_context_both_arrive(self):
        error = raised(ValueError("no"), LookupError("cause"), handling=KeyError("context"))
        arrived = travelled_error(error)
        assert type(arrived.__context__) is KeyError
        assert kinds(chain(arrived)) == [ValueError, LookupError, WorkerTracebackError]

    def test_an_error_that_is_held_and_is_a_cause_arrives_as_one_object(self):
        cause = KeyError("why")
        error = ValueError("no")
        error.original = cause
        arrived = travelled_error(raised(error, cause))
        assert arrived.original is arrived.__cause__

    def test_a_cause_that_cannot_be_sent_is_replaced_alone(self):
        first = raised(KeyError("first"))
        arrived = travelled_error(raised(ValueError("no"), raised(StubbornError("stays"), first)))
        assert kinds(chain(arrived)) == [ValueError, TaskError, KeyError, WorkerTracebackError]

    def test_very_long_chains_arrive_whole(self):
        errors = [ValueError(n) for n in range(3000)]
        for one, following in itertools.pairwise(errors):
            one.__context__ = following
        arrived = chain(travelled_error(errors[0]))
        assert [error.args[0] for error in arrived[:-1]] == list(range(3000))

    def test_cyclic_chains_arrive(self):
        one, two = ValueError("one"), ValueError("two")
        one.__cause__, two.__cause__ = two, one
        arrived = travelled_error(one)
        assert kinds(chain(arrived)) == [ValueError, ValueError, WorkerTracebackError]
        "".join(traceback.format_exception(arrived))


class TestGroups:
    def test_members_of_a_group_arrive_with_their_causes(self):
        inner = ExceptionGroup("inner", [raised(FrozenError(1, text="x"), KeyError("why"))])
        arrived = travelled_error(
            raised(ExceptionGroup("outer", [raised(ValueError("no")), inner]))
        )
        first, (second,) = arrived.exceptions[0], arrived.exceptions[1].exceptions
        assert (type(first), first.args) == (ValueError, ("no",))
        assert second == FrozenError(1, text="x")
        assert type(second.__cause__) is KeyError
        assert "ValueError: no" in told(arrived)

    def test_members_of_a_group_are_not_compared(self):
        arrived = travelled_error(raised(ExceptionGroup("some", [QuarrelsomeError("no")])))
        assert kinds([arrived, *arrived.exceptions]) == [ExceptionGroup, TaskError]

    def test_deeply_nested_groups_arrive(self):
        error = ValueError("inmost")
        for _ in range(400):
            error = ExceptionGroup("group", [error])
        arrived = travelled_error(raised(error))
        depth = 0
        while type(arrived) is ExceptionGroup:
            (arrived,) = arrived.exceptions
            depth += 1
        if type(arrived) is TaskError:
            assert depth < 400
            assert arrived.type_name == "builtins.ExceptionGroup"
        else:
            assert (depth, type(arrived), arrived.args) == (400, ValueError, ("inmost",))

    def test_a_member_that_cannot_be_sent_is_replaced_alone(self):
        group = ExceptionGroup(
            "some", [StubbornError("stays"), raised(ValueError("no"), KeyError(1))]
        )
        group.add_note("a note")
        arrived = travelled_error(raised(group))
        assert type(arrived) is ExceptionGroup
        assert arrived.__notes__ == ["a note"]
        assert kinds(arrived.exceptions) == [TaskError, ValueError]
        assert type(arrived.exceptions[1].__cause__) is KeyError
