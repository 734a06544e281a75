"""Which ranges are tried again, and in which pieces."""

import itertools
import math
from decimal import Decimal
from fractions import Fraction

import joblib
import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joblib.parallel import ThreadingBackend, register_parallel_backend

from taskcarrier import DynamicParallelMapper, map_array, map_chunks, map_items, reduce_array
from taskcarrier.scheduling.retries import (
    DEFAULT_POLICY,
    RETRIES,
    Attempt,
    RetryPolicy,
    WithRetries,
    check_timeout,
    halvings,
)


def spans():
    return st.tuples(st.integers(0, 1000), st.integers(1, 5000)).map(lambda t: (t[0], sum(t)))


def suspected(start, stop, item, retries):
    """Return the ranges on which workers die when one item kills, in order."""
    retry_policy = RetryPolicy(retries=retries)
    pending, deaths = [Attempt(start, stop)], []
    while pending:
        one, *pending = pending
        if not one.start <= item < one.stop:
            continue
        deaths.append(one)
        pending = retry_policy.next_after_death(one, can_split=True) + pending
    return deaths


class TestHalvings:
    @given(spans())
    def test_halvings_cover_the_range_without_a_gap(self, span):
        pieces = list(halvings(*span))
        assert pieces[0][0] == span[0]
        assert pieces[-1][1] == span[1]
        assert all(one[1] == other[0] for one, other in itertools.pairwise(pieces))

    @given(spans().filter(lambda span: span[1] - span[0] > 1))
    def test_each_halving_is_half_of_the_rest(self, span):
        left = span[1] - span[0]
        *pieces, last = [stop - start for start, stop in halvings(*span)]
        for piece in pieces:
            assert piece == (left + 1) // 2
            left -= piece
        assert last == left == 1


class TestAfterDeath:
    @given(spans(), st.integers(1, 4), st.data())
    def test_an_item_that_kills_is_found_by_a_death_for_each_halving(self, span, retries, data):
        item = data.draw(st.integers(span[0], span[1] - 1))
        deaths = suspected(*span, item, retries)
        whole = [one for one in deaths if one[:2] == span]
        assert len(whole) == retries + 1
        assert deaths[-1][:2] == (item, item + 1)
        assert len(deaths) <= retries + 1 + math.ceil(math.log2(span[1] - span[0]))
        assert [one.number for one in deaths] == list(range(1, len(deaths) + 1))

    @given(spans(), st.integers(1, 4), st.data())
    def test_ranges_that_do_not_kill_are_run_again_once(self, span, retries, data):
        item = data.draw(st.integers(span[0], span[1] - 1))
        spared = []
        for one in suspected(*span, item, retries)[retries:-1]:
            pieces = RetryPolicy(retries=retries).next_after_death(one, can_split=True)
            spared += [range(*p[:2]) for p in pieces if not p.start <= item < p.stop]
        others = [i for i in range(*span) if i != item]
        assert sorted(itertools.chain(*spared)) == others

    @pytest.mark.parametrize("can_split", [True, False])
    def test_a_death_without_retries_is_final(self, can_split):
        assert RetryPolicy(retries=0).next_after_death(Attempt(0, 8), can_split=can_split) == []

    def test_a_range_that_cannot_be_split_is_run_again_whole(self):
        one, attempts = Attempt(3, 9), [1]
        while nexts := RetryPolicy(retries=3).next_after_death(one, can_split=False):
            (one,) = nexts
            assert one[:2] == (3, 9)
            attempts.append(one.number)
        assert attempts == [1, 2, 3, 4]


class TestAfterTimeout:
    @pytest.mark.parametrize("kinds", [(), (ValueError,), (KeyError, ConnectionError)])
    def test_a_timeout_is_final_unless_retry_on_says_otherwise(self, kinds):
        assert RetryPolicy(1.0, 5, kinds).next_after_timeout(Attempt(0, 8)) == []

    @pytest.mark.parametrize("kind", [TimeoutError, OSError, Exception])
    def test_a_late_range_is_run_again_whole(self, kind):
        retry_policy = RetryPolicy(1.0, 2, (ValueError, kind))
        assert retry_policy.next_after_timeout(Attempt(0, 8)) == [Attempt(0, 8, 2)]
        assert retry_policy.next_after_timeout(Attempt(0, 8, 2)) == [Attempt(0, 8, 3)]
        assert retry_policy.next_after_timeout(Attempt(0, 8, 3)) == []


class TestArguments:
    def test_default_arguments_give_the_default_policy(self):
        assert RetryPolicy.from_arguments(None, RETRIES, ()) is DEFAULT_POLICY
        assert (DEFAULT_POLICY.timeout, DEFAULT_POLICY.retries, DEFAULT_POLICY.retry_on) == (
            None,
            2,
            (),
        )
        assert DEFAULT_POLICY.timeout_ns == 0

    @pytest.mark.parametrize("timeout", [3, 0.5, np.float32(2), np.int8(4)])
    def test_a_timeout_is_a_number_of_seconds(self, timeout):
        assert RetryPolicy.from_arguments(timeout, 2, ()).timeout == float(timeout)
        assert RetryPolicy.from_arguments(timeout, 2, ()).timeout_ns == round(float(timeout) * 1e9)

    @pytest.mark.parametrize(
        "timeout",
        [math.inf, np.float32("inf"), 1e300, 1e10, 10**400, Fraction(10**400), Decimal("1e999")],
    )
    def test_a_timeout_too_long_to_count_is_no_limit(self, timeout):
        assert RetryPolicy.from_arguments(timeout, 2, ()).timeout is None
        assert RetryPolicy.from_arguments(timeout, 2, ()).timeout_ns == 0

    @pytest.mark.parametrize("timeout", [1e300, math.inf, 10**400, 9e9])
    @pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
    def test_an_infinite_timeout_is_no_limit_in_every_verb(self, timeout, backend):
        run = {"backend": backend, "n_jobs": 2}
        X = np.arange(50.0)
        assert (map_array(np.negative, X, timeout=timeout, **run) == -X).all()
        assert (map_items(np.negative, X, timeout=timeout, **run) == -X).all()
        assert reduce_array(np.sum, X, combine=np.add, timeout=timeout, **run) == X.sum()
        assert map_chunks(len, X, chunksize=25, timeout=timeout, **run) == [25, 25]
        mapper = DynamicParallelMapper(**run)
        assert mapper.map(abs, range(-9, 0), timeout=timeout) == list(range(9, 0, -1))
        assert list(mapper.imap(abs, range(-9, 0), timeout=timeout)) == list(range(9, 0, -1))

    def test_an_infinite_timeout_is_no_limit_on_a_registered_backend(self):
        register_parallel_backend("taskcarrier-recovery", ThreadingBackend)
        try:
            mapper = DynamicParallelMapper(2, backend="taskcarrier-recovery")
            assert mapper.map(abs, [-1, -2], timeout=math.inf) == [1, 2]
        finally:
            del joblib.parallel.BACKENDS["taskcarrier-recovery"]

    def test_a_timeout_is_never_rounded_to_zero(self):
        assert RetryPolicy.from_arguments(1e-12, 2, ()).timeout_ns == 1

    @pytest.mark.parametrize(
        "timeout", [0, -1, -math.inf, -(10**400), math.nan, "3", True, [1], object, 1j]
    )
    def test_a_timeout_that_is_no_positive_number_is_refused(self, timeout):
        with pytest.raises(ValueError, match=r"timeout must be a positive number of seconds"):
            check_timeout(timeout)

    def test_retry_on_is_one_type_or_several(self):
        assert RetryPolicy.from_arguments(None, 2, OSError).retry_on == (OSError,)
        assert RetryPolicy.from_arguments(None, 2, (OSError, KeyError)).retry_on == (
            OSError,
            KeyError,
        )

    @pytest.mark.parametrize(
        "retry_on",
        [
            "OSError",
            OSError(),
            [OSError],
            (OSError, 3),
            int,
            None,
            KeyboardInterrupt,
            (OSError, SystemExit),
            BaseException,
        ],
    )
    def test_retry_on_without_exception_types_is_refused(self, retry_on):
        with pytest.raises(TypeError, match="retry_on must be an exception type or a tuple"):
            RetryPolicy.from_arguments(None, 2, retry_on)

    @pytest.mark.parametrize(
        ("retries", "kind"), [(-1, ValueError), (1.0, TypeError), ("2", TypeError)]
    )
    def test_a_bad_number_of_retries_is_refused(self, retries, kind):
        with pytest.raises(kind, match="retries must be"):
            RetryPolicy.from_arguments(None, retries, ())

    @pytest.mark.fault(34)
    @pytest.mark.parametrize(
        ("option", "kind"),
        [
            ({"timeout": -1}, ValueError),
            ({"retries": -1}, ValueError),
            ({"retries": 1.5}, TypeError),
            ({"retry_on": "all"}, TypeError),
            ({"on_error": "ignore"}, ValueError),
        ],
    )
    def test_every_verb_checks_the_options_before_it_calls_anything(self, option, kind):
        called = []
        X, (name,) = np.arange(4), option
        calls = [
            lambda: map_array(called.append, X, n_jobs=1, **option),
            lambda: map_items(called.append, X, n_jobs=1, **option),
            lambda: map_chunks(called.append, X, n_jobs=1, **option),
            lambda: DynamicParallelMapper(1).map(called.append, X, **option),
        ]
        if name != "on_error":
            calls.append(lambda: reduce_array(called.append, X, combine=max, n_jobs=1, **option))
        for call in calls:
            with pytest.raises(kind, match=name):
                call()
        assert called == []


class TestWithRetries:
    @staticmethod
    def failing(n_failures, kind=ConnectionError):
        calls = []

        def func(*args, **kwargs):
            calls.append((args, kwargs))
            if len(calls) <= n_failures:
                raise kind(len(calls))
            return len(calls)

        return func, calls

    @pytest.mark.parametrize("n_failures", [0, 1, 3])
    def test_a_function_is_called_until_it_succeeds(self, n_failures):
        func, calls = self.failing(n_failures)
        assert WithRetries(func, (OSError,), 3)(1, a=2) == n_failures + 1
        assert calls == [((1,), {"a": 2})] * (n_failures + 1)

    def test_the_last_exception_is_raised_with_the_number_of_calls(self):
        func, calls = self.failing(9)
        with pytest.raises(ConnectionError) as caught:
            WithRetries(func, (OSError,), 2)()
        assert caught.value.args == (3,)
        assert caught.value.__notes__ == ["func was called 3 times"]
        assert len(calls) == 3

    @pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt])
    def test_other_exceptions_are_final(self, kind):
        func, calls = self.failing(9, kind)
        with pytest.raises(kind) as caught:
            WithRetries(func, (OSError, KeyError), 2)()
        assert not hasattr(caught.value, "__notes__")
        assert len(calls) == 1

    def test_an_exception_that_refuses_notes_stays_what_it_is(self):
        class Stubborn(Exception):  # noqa: N818  # it is no error of ours
            def add_note(self, note):
                raise RuntimeError("no notes, please")

        func, _ = self.failing(9, Stubborn)
        with pytest.raises(Stubborn):
            WithRetries(func, (Stubborn,), 1)()

    @pytest.mark.parametrize("copies", [True, False])
    def test_every_call_gets_its_own_arrays_if_it_may_change_them(self, copies):
        given, calls = np.zeros(3), []

        def func(array):
            array += 1
            calls.append(array.copy())
            if len(calls) < 3:
                raise OSError
            return array

        result = WithRetries(func, (OSError,), 2, copies)(given)
        assert result.tolist() == [1.0 if copies else 3.0] * 3
        assert given.tolist() == [0.0 if copies else 3.0] * 3

    @pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
    @pytest.mark.parametrize("verb", [map_array, map_items])
    def test_an_attempt_gets_the_items_that_an_earlier_one_has_overwritten(
        self, verb, backend, tmp_path
    ):
        def func(x):
            x += 1
            mark = tmp_path / str(int(x[..., 0].flat[0]))
            if not mark.exists():
                mark.touch()
                raise OSError("once more")
            return x

        X = np.arange(12.0).reshape(6, 2)
        options = {"n_jobs": 2, "backend": backend, "chunksize": 2}
        assert (
            verb(func, X, writable=True, retry_on=OSError, **options).tolist() == (X + 1).tolist()
        )
        assert X.tolist() == np.arange(12.0).reshape(6, 2).tolist()

    @pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
    def test_exceptions_of_the_program_s_own_are_tried_again(self, backend, tmp_path):
        class Passing(Exception):  # noqa: N818  # as a user may call it
            pass

        def func(x):
            mark = tmp_path / str(int(x))
            if not mark.exists():
                mark.touch()
                raise Passing
            return x

        X = np.arange(6)
        options = {"n_jobs": 2, "backend": backend, "retry_on": Passing, "timeout": 60}
        assert map_items(func, X, **options).tolist() == X.tolist()

    @pytest.mark.parametrize("backend", ["sequential", "threading"])
    def test_kernels_are_tried_again(self, backend):
        @numba.njit
        def small_only(x):
            if x >= 6:
                raise ValueError("too large")
            return x * 2

        X = np.arange(8.0)
        options = {"n_jobs": 2, "backend": backend, "retry_on": ValueError}
        assert map_items(small_only, X[:6], **options).tolist() == (X[:6] * 2).tolist()
        with pytest.raises(ValueError, match="too large") as caught:
            map_items(small_only, X, balance="dynamic", **options)
        notes = "\n".join(caught.value.__notes__)
        assert "func was called 3 times" in notes
        assert "func failed on item 6" in notes
