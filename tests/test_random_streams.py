"""Random streams: independent, and the same whoever runs what."""

import functools

import numba
import numpy as np
import pytest

from taskcarrier import SerialMapper, map_array, map_chunks, map_items, reduce_array
from taskcarrier.mappers import DynamicParallelMapper, StaticParallelMapper
from taskcarrier.random_streams import RandomStreams
from tests.strategies import (
    EVERYWHERE,
    RUNS,
    assert_same,
    contract,
    each_run,
    keep_runs_warm,
)

X = np.arange(40.0)


pools = keep_runs_warm()


def draw(item, rng):
    return item + rng.random()


def draws(chunk, rng):
    return chunk + rng.random(len(chunk))


class TestStreams:
    def test_a_stream_begins_at_its_beginning(self):
        streams = RandomStreams.from_seed(5)
        first = streams.stream(3).random(100)
        streams.stream(4).random(7)
        assert_same(streams.stream(3).random(100), first)

    def test_streams_are_distinct(self):
        streams = RandomStreams.from_seed(5)
        n = 100_000
        drawn = np.array([streams.stream(number).bit_generator.random_raw() for number in range(n)])
        assert len(np.unique(drawn)) == n
        assert abs(drawn.astype(float).mean() / 2**64 - 0.5) < 5 / np.sqrt(12 * n)

    def test_neighbouring_streams_share_no_numbers(self):
        streams = RandomStreams.from_seed(5)
        drawn = [streams.stream(number).bit_generator.random_raw(2_000) for number in range(100)]
        assert len(np.unique(np.concatenate(drawn))) == 200_000

    def test_counters_of_streams_are_apart(self):
        # The words below the number are the stream's own; a block advances the lowest by one.
        states = [
            RandomStreams.from_seed(1).stream(n).bit_generator.state["state"] for n in (0, 1, 2**40)
        ]
        assert [state["counter"].tolist() for state in states] == [
            [0, 0, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 2**40, 0],
        ]
        assert len({tuple(state["key"].tolist()) for state in states}) == 1

    @pytest.mark.parametrize(
        "seed", [0, 3, 2**100, np.int64(3), np.random.SeedSequence(3, spawn_key=(1,))]
    )
    def test_seeds_of_every_kind_are_reproducible(self, seed):
        assert RandomStreams.from_seed(seed) == RandomStreams.from_seed(seed)
        assert RandomStreams.from_seed(seed) != RandomStreams.from_seed(4)

    def test_a_seed_sequence_is_its_seed_and_stays_as_it_is(self):
        sequence = np.random.SeedSequence(3)
        assert RandomStreams.from_seed(sequence) == RandomStreams.from_seed(3)
        assert sequence.n_children_spawned == 0

    def test_a_generator_is_advanced_by_one_draw(self):
        ours, theirs = np.random.default_rng(8), np.random.default_rng(8)
        first, second = RandomStreams.from_seed(ours), RandomStreams.from_seed(ours)
        assert first != second
        theirs.integers(1 << 63, size=2)
        assert ours.bit_generator.state == theirs.bit_generator.state

    @pytest.mark.parametrize("seed", ["3", 1.0, True, np.random.RandomState(0), [1, 2]])
    def test_other_seeds_are_refused(self, seed):
        with pytest.raises(TypeError, match="rng must be an int"):
            map_items(draw, X, rng=seed)

    def test_negative_seeds_are_refused(self):
        with pytest.raises(ValueError, match="must not be negative, got -1"):
            map_items(draw, X, rng=-1)


def of_items(seed):
    return np.array([draw(x, RandomStreams.from_seed(seed).stream(n)) for n, x in enumerate(X)])


@pytest.mark.parametrize("chunksize", [None, 1, 7, 100])
def test_items_have_streams_by_their_number(chunksize):
    result = contract(draw, X, verb=map_items, rng=3, chunksize=chunksize)
    assert_same(result, of_items(3))


@pytest.mark.parametrize("chunksize", [1, 7, 100])
def test_chunks_have_streams_by_the_number_of_their_range(chunksize):
    expected = np.concatenate(
        [
            draws(X[start : start + chunksize], RandomStreams.from_seed(3).stream(number))
            for number, start in enumerate(range(0, len(X), chunksize))
        ]
    )
    assert_same(contract(draws, X, rng=3, chunksize=chunksize), expected)
    for backend, balance in EVERYWHERE:
        run = {
            "backend": backend,
            "balance": balance,
            "n_jobs": 2,
            "chunksize": chunksize,
            "rng": 3,
        }
        assert_same(np.concatenate(map_chunks(draws, X, **run)), expected)
        total = reduce_array(lambda c, rng: draws(c, rng).sum(), X, combine=max, **run)
        cuts = range(chunksize, len(X), chunksize)
        assert total == max(part.sum() for part in np.split(expected, cuts))


@pytest.mark.parametrize("kind", [SerialMapper, StaticParallelMapper, DynamicParallelMapper])
@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_items_of_lists_have_the_streams_of_items(kind, backend):
    for chunksize in (None, 1, 7):
        mapper = kind(2, backend=backend, chunksize=chunksize)
        assert mapper.map(draw, X.tolist(), rng=3) == of_items(3).tolist()
    is_tuple = mapper.map(lambda a, b, rng: a + b + rng.random(), X.tolist(), [1.0] * 40, rng=3)
    assert np.allclose(is_tuple, of_items(3) + 1)
    assert_same(mapper.map_items(draw, X, rng=3), of_items(3))


def wrapped(func):
    """A decorator that takes whatever comes, and whose signature is said to be the function's."""

    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        kwargs.pop("rng")
        return func(*args, **kwargs)

    return wrapper


class Draws:
    def __call__(self, x, *, rng):
        return draw(x, rng)


class TestFunctionsWithoutRng:
    @pytest.mark.parametrize(
        ("func", "name"),
        [
            (np.sqrt, "sqrt"),
            (abs, "abs"),
            (lambda x: x, "<lambda>"),
            (lambda x, rng, /: x, "<lambda>"),
            (functools.partial(pow, 2), "functools.partial"),
            (numba.njit(lambda x: x), "<lambda>"),
        ],
    )
    def test_functions_that_take_no_rng_are_refused_before_anything_starts(self, func, name):
        mapper = DynamicParallelMapper(2)
        for call in (
            lambda: map_array(func, X, rng=3),
            lambda: map_items(func, X, rng=3),
            lambda: map_chunks(func, X, rng=3),
            lambda: reduce_array(func, X, combine=np.add, rng=3),
            lambda: mapper.map(func, [1, 2], rng=3),
            lambda: mapper.starmap(func, [(1,), (2,)], rng=3),
            lambda: mapper.imap(func, [1, 2], rng=3),
        ):
            with pytest.raises(
                TypeError, match=r"has no such parameter: .* def func\(x, rng\)"
            ) as info:
                call()
            assert name in str(info.value)

    @pytest.mark.parametrize(
        "func",
        [
            draw,
            Draws(),
            functools.partial(draw),
            lambda x, **more: draw(x, more["rng"]),
            functools.partial(lambda x, scale, rng: draw(x, rng), scale=2),
        ],
    )
    def test_functions_that_take_an_rng_are_accepted(self, func):
        assert_same(map_items(func, X, rng=3, n_jobs=1), of_items(3))

    def test_a_wrapper_may_take_an_rng_that_it_does_not_pass_on(self):
        assert SerialMapper().map(wrapped(abs), [-1], rng=3) == [1]


def test_several_arrays_results_and_arguments_may_come_with_an_rng():
    def func(x, y, scale, rng, shift):
        return x * scale + shift, y + rng.normal()

    for backend, balance, n_jobs in RUNS[:6]:
        options = {"args": (2.0,), "kwargs": {"shift": 1.0}, "rng": np.random.SeedSequence(4)}
        run = {"backend": backend, "balance": balance, "n_jobs": n_jobs}
        first, second = map_items(func, X, X, **options, **run)
        assert_same(first, X * 2 + 1)
        assert_same(
            second,
            np.array([x + RandomStreams.from_seed(4).stream(n).normal() for n, x in enumerate(X)]),
        )


@each_run
class TestWithFailures:
    def test_an_item_that_is_called_again_draws_the_same_numbers(self, backend, balance):
        def moody(x, rng):
            value = rng.random()
            if value < 0.5 and rng.random() < 2:
                moody.calls += 1
                if moody.calls % 2:
                    raise ConnectionError
            return x + value

        moody.calls = 0
        run = {"backend": backend, "balance": balance, "n_jobs": 2}
        result = map_items(moody, X, rng=3, retry_on=ConnectionError, retries=50, **run)
        assert_same(result, of_items(3))

    def test_a_range_with_one_stream_fails_as_a_whole(self, backend, balance):
        def fails(chunk, rng):
            if (chunk == 17).any():
                raise ValueError("17")
            return draws(chunk, rng)

        run = {"backend": backend, "balance": balance, "n_jobs": 2, "chunksize": 10}
        result, failures = map_array(fails, X, rng=3, on_error="collect", **run)
        assert [one[:2] for one in failures] == [(10, 20)]
        whole = map_array(draws, X, rng=3, **run)
        assert_same(np.delete(result, range(10, 20)), np.delete(whole, range(10, 20)))


def test_resumed_runs_draw_the_same_numbers(tmp_path):
    later = tmp_path / "later"

    def func(chunk, rng):
        if chunk[0] == 20 and not later.exists():
            raise OSError("later")
        return draws(chunk, rng)

    options = {"rng": 3, "chunksize": 10, "out": tmp_path / "Y.npy", "resume": True}
    with pytest.raises(OSError, match="later"):
        map_array(func, X, n_jobs=1, **options)
    with pytest.raises(ValueError, match="rng"):
        map_array(func, X, n_jobs=1, **{**options, "rng": 4})
    later.touch()
    result = map_array(func, X, n_jobs=2, backend="threading", **options)
    again = map_array(draws, X, rng=3, chunksize=10, n_jobs=2, backend="loky")
    assert np.array_equal(result, again)


def test_rng_must_not_be_given_twice():
    with pytest.raises(TypeError, match="twice"):
        map_items(draw, X, rng=1, kwargs={"rng": 2})


def test_without_items_no_stream_is_needed():
    assert map_items(draw, X[:0], rng=1).shape == (0,)
    assert map_array(draws, X[:0], rng=1).shape == (0,)
