"""`map_array` equals the plain call, on every backend, balance and number of workers."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import taskcarrier
from taskcarrier import map_array
from taskcarrier.arrays.casting import find_missing_value, require_missing_value
from taskcarrier.arrays.mapping import UNSET, choose_fill
from tests.strategies import (
    BACKENDS,
    DTYPES,
    PAIRS,
    PARALLEL,
    REALS,
    RUNS,
    assert_same,
    axes_of,
    chunksizes,
    contract,
    each_parallel_run,
    each_run,
    examples,
    filled,
    keep_runs_warm,
    same_bits,
    samples,
)

pools = keep_runs_warm()


def quiet(func):
    """`func` without warnings; NumPy's settings do not reach other threads."""

    def silent(*arrays, **options):
        with np.errstate(all="ignore"):
            return func(*arrays, **options)

    return silent


# Layouts, dtypes and axes


@pytest.mark.fault(29, 30)
@examples(120)
@given(st.data())
def test_any_layout_dtype_axis_and_place_is_mapped_bit_for_bit(data):
    sample = data.draw(samples())
    with sample.array() as X:
        axis = data.draw(axes_of(X))
        result = contract(lambda c: c, X, axis=axis, chunksize=data.draw(chunksizes()))
        assert_same(result, np.asarray(X), sample)


@examples(60)
@given(st.data())
def test_out_axis_says_where_the_mapped_axis_stands_in_the_result(data):
    sample = data.draw(samples())
    with sample.array() as X:
        axis, out_axis = data.draw(axes_of(X)), data.draw(axes_of(X))
        move = np.moveaxis
        result = contract(
            lambda c: move(c, axis, out_axis),
            X,
            axis=axis,
            out_axis=out_axis,
            chunksize=data.draw(chunksizes()),
        )
        assert_same(result, np.moveaxis(np.asarray(X), axis, out_axis), sample)


ALONG = {
    "sort": np.sort,
    "argsort": np.argsort,
    "cumsum": np.cumsum,
    "flip": np.flip,
    "diff": np.diff,
    "fft": np.fft.fft,
    "max": np.maximum.accumulate,
}


@examples(80)
@given(st.data())
def test_functions_along_another_axis_give_the_bits_of_the_plain_call(data):
    sample = data.draw(samples(REALS, min_dims=2))
    along = data.draw(st.sampled_from(sorted(ALONG)))
    with sample.array() as X:
        axis = data.draw(axes_of(X))
        other = data.draw(st.sampled_from(sorted(set(range(X.ndim)) - {axis % X.ndim})))
        if along == "fft" and X.shape[other] == 0:
            return  # NumPy refuses it
        func = quiet(lambda c, f=ALONG[along]: f(c, axis=other))
        result = contract(func, X, axis=axis, chunksize=data.draw(chunksizes()))
        assert_same(result, func(np.asarray(X)), (along, sample))


# What IEEE arithmetic rounds correctly. NumPy's exp, sin and the like are other code for other
# strides, alignments and distances between operands, whose last bits differ.
EXACT = [np.sqrt, np.square, np.reciprocal, np.negative, np.rint, np.signbit]
ROUNDED = [np.exp, np.sin, np.log1p]


@pytest.mark.fault(29)
@examples(60)
@given(st.data())
def test_ufuncs_give_the_bits_of_the_plain_call_on_any_layout(data):
    sample = data.draw(samples(REALS, max_side=9))
    ufunc = data.draw(st.sampled_from(EXACT))
    func = quiet(lambda c: ufunc(c.astype(float)))
    with sample.array() as X:
        axis = data.draw(axes_of(X))
        result = contract(func, X, axis=axis, chunksize=data.draw(chunksizes()))
        assert_same(result, func(np.asarray(X)), (ufunc, sample))


@examples(20)
@given(st.data())
def test_rounded_ufuncs_differ_from_the_plain_call_in_the_last_bits_at_most(data):
    sample = data.draw(samples(REALS, max_side=9))
    ufunc = data.draw(st.sampled_from(ROUNDED))
    func = quiet(lambda c: ufunc(c.astype(float)))
    with sample.array() as X:
        axis, chunksize = data.draw(axes_of(X)), data.draw(chunksizes())
        expected = func(np.asarray(X))
        for backend, balance, n_jobs in PAIRS:
            run = {"backend": backend, "balance": balance, "n_jobs": n_jobs}
            result = map_array(func, X, axis=axis, chunksize=chunksize, **run)
            np.testing.assert_allclose(result, expected, rtol=1e-13, err_msg=str((run, sample)))


@pytest.mark.fault(28)
@pytest.mark.parametrize("tail", [(), (3,), (0,), (2, 0, 2)])
def test_few_items_and_empty_axes_are_mapped(tail):
    for n_items in (0, 1, 2, 3, 7, 8, 9, 100):
        X = np.arange(n_items * int(np.prod(tail)), dtype=float).reshape(n_items, *tail)
        assert_same(contract(np.sqrt, X), np.sqrt(X), n_items)


@pytest.mark.fault(28)
def test_without_items_the_function_is_called_once_on_the_real_array():
    seen = []

    def func(chunk):
        seen.append((chunk.shape, threading.current_thread()))
        return chunk.astype("i2")

    for backend in BACKENDS:
        result = map_array(func, np.zeros((3, 0)), axis=1, backend=backend, n_jobs=2)
        assert_same(result, np.zeros((3, 0), "i2"), backend)
    assert seen == [((3, 0), threading.current_thread())] * 3


@pytest.mark.fault(30)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_of_every_dtype_are_kept_bit_for_bit(dtype):
    X = np.arange(40)
    table = filled(dtype, (40, 2), np.random.default_rng(3))
    raw, name = table.tobytes(), table.dtype

    def func(chunk):
        # From bytes: NumPy pickles some arrays in another byte order.
        return np.frombuffer(raw, name).reshape(40, 2)[chunk]

    assert_same(contract(func, X, chunksize=7), table)


@pytest.mark.parametrize("order", ["C", "F"])
def test_results_keep_the_order_of_the_first_array(order):
    X = np.arange(60.0).reshape((12, 5), order=order)
    for backend in BACKENDS:
        result = map_array(np.negative, X, n_jobs=2, backend=backend)
        assert result.flags.c_contiguous == (order == "C"), backend
        assert_same(result, -X, backend)


# Several arrays, several results, arguments


def test_results_in_a_tuple_may_differ_in_rank_and_dtype():
    X = np.arange(60.0).reshape(15, 4)

    def func(chunk):
        return (
            chunk.sum(axis=1),
            chunk > 7,
            chunk.astype("S5")[:, :, None],
            [row[0] for row in chunk],
        )

    sums, large, words, first = contract(func, X, chunksize=4)
    assert_same(
        (sums, large, words, first), (X.sum(axis=1), X > 7, X.astype("S5")[..., None], X[:, 0])
    )


def test_a_tuple_of_one_result_stays_a_tuple():
    assert_same(contract(lambda c: (c,), np.arange(9)), (np.arange(9),))


def test_named_tuples_are_tuples_of_results():
    X = np.random.default_rng(0).random((12, 3, 3))
    values, vectors = contract(np.linalg.eigh, X, chunksize=5)
    assert_same((values, vectors), tuple(np.linalg.eigh(X)))


def test_each_of_several_results_has_its_own_out_axis():
    X = np.arange(60.0).reshape(4, 15)

    def func(chunk):
        return chunk.T, chunk.sum(axis=0), np.stack([chunk, chunk], axis=1)

    result = contract(func, X, axis=1, out_axis=(0, -1, 2), chunksize=4)
    assert_same(result, func(X))


def test_results_may_have_fewer_axes_than_chunks():
    X = np.arange(105.0).reshape(5, 7, 3)
    assert_same(contract(lambda c: c.sum(axis=(0, 2)), X, axis=1, out_axis=0), X.sum(axis=(0, 2)))
    assert_same(contract(lambda c: c.sum(axis=0), X, axis=-1), X.sum(axis=0))


@pytest.mark.parametrize("chunksize", [None, 1, 4, 100])
def test_several_arrays_are_mapped_along_axes_of_their_own(chunksize):
    X, Y, Z = np.arange(30.0).reshape(10, 3), np.arange(20, dtype=">i2").reshape(2, 10), np.ones(10)

    def func(x, y, z):
        return x[:, 0] * y[1] + z

    assert_same(contract(func, X, Y, Z, axis=(0, 1, -1), chunksize=chunksize), func(X, Y, Z))


def test_one_array_may_be_given_twice():
    X = np.arange(30.0).reshape(6, 5)
    assert_same(
        contract(lambda a, b: a @ b.T * 0 + a[:, :1], X, X, chunksize=6), X[:, :1] + X @ X.T * 0
    )


@pytest.mark.parametrize("n_extra", [3, 5000], ids=["small", "large"])
def test_arguments_reach_the_function_and_arrays_in_them_are_read_only(n_extra):
    X, extra = np.arange(20.0), np.arange(float(n_extra))

    def func(chunk, offsets, *, scale):
        return chunk * scale[1] + offsets[2], np.full(
            len(chunk), offsets.flags.writeable | scale.flags.writeable
        )

    result, writeable = contract(
        func, X, args=(extra,), kwargs={"scale": extra.copy()}, chunksize=3
    )
    assert_same(result, X * 1 + 2)
    assert not writeable.any()
    assert extra.flags.writeable


@pytest.mark.fault(6)
@pytest.mark.parametrize("n_items", [4, 40_000])
@each_run
def test_a_function_that_writes_to_its_chunk_is_told_the_remedy(backend, balance, n_items):
    X = np.arange(float(n_items))
    before = X.copy()

    def func(chunk):
        chunk[0] = -1
        return chunk

    with pytest.raises(ValueError, match="read-only") as caught:
        map_array(func, X, n_jobs=2, backend=backend, balance=balance)
    assert any("writable=True" in note for note in caught.value.__notes__)
    assert_same(X, before)


def test_a_function_that_writes_to_its_arguments_fails_everywhere():
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="read-only"):
            map_array(
                lambda c, extra: extra.sort() or c,
                np.arange(5.0),
                args=(np.arange(3.0),),
                backend=backend,
                n_jobs=2,
            )


@examples(30)
@given(st.data())
def test_writable_chunks_are_private_copies(data):
    sample = data.draw(samples(REALS))
    with sample.array() as X:
        before = np.array(X)
        axis = data.draw(axes_of(X))

        def func(chunk):
            chunk[...] = chunk + 1
            return chunk

        result = contract(
            quiet(func), X, axis=axis, writable=True, chunksize=data.draw(chunksizes())
        )
        with np.errstate(all="ignore"):
            assert_same(result, (before + 1).astype(before.dtype), sample)
        assert same_bits(np.asarray(X), before)


def test_several_writable_chunks_of_one_array_are_private():
    X = np.arange(12.0)

    def func(a, b):
        a += 1
        return a + b

    assert_same(contract(func, X, X, writable=True, chunksize=5), 2 * X + 1)
    assert_same(X, np.arange(12.0))


# The same bits on every run


def strided_samples():
    rng = np.random.default_rng(7)
    wide = rng.standard_normal((240, 67))
    record = np.zeros((240, 33), [("before", "i1"), ("value", "f8"), ("after", "V40")])
    record["value"] = rng.standard_normal((240, 33))
    return {
        "C": np.ascontiguousarray(wide),
        "F": np.asfortranarray(wide),
        "reversed": wide[::-1, ::-1],
        "every second": wide[:, ::2],
        "every fourth": wide[:, :61:4],
        "every fourth F": np.asfortranarray(wide)[:, :61:4],
        "every fifth row": wide[::5],
        "every fifth row F": np.asfortranarray(wide)[::5],
        "windows": np.lib.stride_tricks.sliding_window_view(wide[:, 0], 50),
        "field": record["value"],
        "broadcast": np.broadcast_to(wide[0], (240, 67)),
        "single": wide.astype("f4"),
        "three axes": rng.standard_normal((240, 9, 31)).transpose(0, 2, 1),
        "three axes, gaps": rng.standard_normal((240, 9, 124))[:, :, :121:4],
    }


NEIGHBOURS = {
    "product": lambda c: c @ np.swapaxes(c, -1, -2)[..., :5] if c.ndim > 2 else c @ (c.T @ c),
    "gram": lambda c: c @ np.full((c.shape[-1], 3), 1 / 3),
    "sum of the chunk": lambda c: c - c.sum(),
    "sums of columns": lambda c: c - c.sum(axis=0),
    "sums of rows": lambda c: c.sum(axis=-1),
    "running sum": lambda c: np.cumsum(c, axis=0),
    "mean": lambda c: (c - c.mean()) / c.std(),
    "einsum": lambda c: c * np.einsum("i...->...", c),
}


@pytest.mark.one_case
@pytest.mark.parametrize("layout", sorted(strided_samples()))
def test_functions_that_mix_neighbouring_items_give_the_same_bits_on_every_run(layout):
    X = strided_samples()[layout]
    for kind, func in NEIGHBOURS.items():
        result = contract(func, X, chunksize=37)
        pieces = [func(X[start : start + 37]) for start in range(0, len(X), 37)]
        exact = X.dtype == np.float64
        tolerance = {"rtol": 1e-9, "atol": 1e-9} if exact else {"rtol": 1e-3, "atol": 1e-3}
        np.testing.assert_allclose(result, np.concatenate(pieces), err_msg=kind, **tolerance)


def test_products_large_enough_for_threads_of_blas_give_the_same_bits():
    rng = np.random.default_rng(0)
    X, W = rng.standard_normal((1000, 500)), rng.standard_normal((500, 500))
    runs = [run for run in RUNS if run[2] in {1, 2}]
    result = contract(lambda c, w: c @ w, X, args=(W,), chunksize=500, runs=runs)
    np.testing.assert_allclose(result, X @ W, atol=1e-9)


def test_one_range_is_the_plain_call():
    X = np.random.default_rng(1).standard_normal((300, 40))
    assert_same(contract(lambda c: c - c.sum(axis=0), X, chunksize=300), X - X.sum(axis=0))
    assert_same(contract(lambda c: c - c.sum(axis=0), X, chunksize=10**9), X - X.sum(axis=0))


def test_ranges_do_not_depend_on_workers_backend_or_balance():
    X = np.zeros((1000, 300))
    lengths = contract(lambda c: np.full(len(c), len(c)), X)
    assert 1 <= lengths[0] < len(X)
    assert (lengths[: -lengths[0]] == lengths[0]).all()


# Who owns the result


CONSTANT = np.arange(4.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_own_their_memory(backend):
    X = np.arange(40.0)
    for func in (lambda c: c, lambda c: c[:], lambda c: c[::-1][::-1]):
        result = map_array(func, X, n_jobs=2, backend=backend, chunksize=4)
        assert not np.shares_memory(result, X)
        result += 1
        assert_same(X, np.arange(40.0))
        assert_same(result, X + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_may_return_the_same_array_every_time(backend):
    scratch = np.arange(4.0)

    def func(chunk):
        scratch[...] = chunk
        return scratch

    X = np.arange(40.0)
    # One worker: two threads would overwrite each other's scratch.
    result = map_array(func, X, n_jobs=2 if backend == "loky" else 1, backend=backend, chunksize=4)
    assert_same(result, X)
    assert not np.shares_memory(result, scratch)


# Results are shared, inputs are not kept


VIEWS = {
    "itself": lambda Y: Y,
    "reversed": lambda Y: Y[::-1],
    "transposed": lambda Y: Y.T,
    "slice": lambda Y: Y[5:40, 1:],
    "every third": lambda Y: Y[::3, ::2],
    "bytes": lambda Y: Y.view(np.uint8),
    "broadcast": lambda Y: np.broadcast_to(Y[3], (30, Y.shape[1])),
    "windows": lambda Y: np.lib.stride_tricks.sliding_window_view(Y[:, 0], 7),
}


@pytest.mark.usefixtures("general_way")  # results of short calls are in ordinary memory
@pytest.mark.parametrize("view", sorted(VIEWS))
def test_a_result_of_processes_is_mapped_again_without_a_copy(view):
    Y = map_array(np.negative, np.random.default_rng(2).random((90, 8)), n_jobs=2, backend="loky")
    assert taskcarrier.last_report().bytes_copied >= Y.nbytes
    Z = VIEWS[view](Y)
    for balance in ("static", "dynamic"):
        result = map_array(lambda c: c * 2, Z, n_jobs=2, backend="loky", balance=balance)
        assert taskcarrier.last_report().bytes_copied == 0
        assert_same(result, Z * 2)


def test_each_of_several_results_is_mapped_again_without_a_copy():
    X = np.arange(90.0).reshape(30, 3)
    first, second = map_array(lambda c: (c, c.astype("f4")), X, n_jobs=2, backend="loky")
    result = map_array(lambda a, b: a + b, first, second, n_jobs=2, backend="loky")
    assert taskcarrier.last_report().bytes_copied == 0
    assert_same(result, X + X.astype("f4"))


@pytest.mark.usefixtures("general_way")  # results of short calls are in ordinary memory
def test_a_result_changed_in_place_is_mapped_as_it_is_now():
    Y = map_array(np.negative, np.arange(100.0), n_jobs=2, backend="loky")
    Y[::2] = 5
    result = map_array(lambda c: c + 1, Y, n_jobs=2, backend="loky")
    assert taskcarrier.last_report().bytes_copied == 0
    assert_same(result, Y + 1)


@pytest.mark.fault(25)
@each_parallel_run
@pytest.mark.parametrize("mapped", [False, True], ids=["ndarray", "memmap"])
def test_an_array_changed_in_place_is_seen_by_the_next_call(backend, balance, mapped, tmp_path):
    X = np.memmap(tmp_path / "X", "f8", "w+", shape=(300, 40)) if mapped else np.zeros((300, 40))
    for number in range(5):
        X[...] = np.arange(12_000.0).reshape(300, 40) * number
        result = map_array(lambda c: c * 2, X.T, axis=1, n_jobs=2, backend=backend, balance=balance)
        assert_same(result, np.asarray(X.T * 2))


@pytest.mark.fault(22)
@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_and_closures_changed_in_place_are_seen_by_the_next_call(backend):
    X, captured, extra = np.arange(10.0), np.zeros(5000), np.zeros(5000)
    for number in range(3):
        captured[...] = number
        extra[...] = 10 * number
        result = map_array(
            lambda c, more: c + captured[77] + more[4000],
            X,
            args=(extra,),
            n_jobs=2,
            backend=backend,
        )
        assert_same(result, X + 11 * number)


FACTOR = 1


@pytest.mark.fault(22)
@pytest.mark.parametrize("backend", BACKENDS)
def test_globals_of_a_lambda_are_seen_as_they_are_now(backend, monkeypatch):
    X = np.arange(10.0)
    for number in (2, 3):
        monkeypatch.setitem(globals(), "FACTOR", number)
        assert_same(map_array(lambda c: c * FACTOR, X, n_jobs=2, backend=backend), X * number)


@pytest.mark.fault(22)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_redefined_function_is_seen_by_the_next_call(backend):
    X = np.arange(10.0)
    namespace = {"__name__": "__main__"}
    for number in (2, 3):
        exec(f"def func(chunk): return chunk * {number}", namespace)  # as in a notebook
        assert_same(map_array(namespace["func"], X, n_jobs=2, backend=backend), X * number)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_in_a_closure_may_be_changed_by_the_function_only_in_processes(backend):
    captured = np.zeros(5000)

    def func(chunk):
        captured[0] += 1
        return chunk + 0 * captured[0]

    assert_same(map_array(func, np.arange(6.0), n_jobs=2, backend=backend), np.arange(6.0))
    assert (captured[0] == 0) == (backend == "loky")


# Threads of the caller


def test_a_report_belongs_to_the_thread_that_ran():
    map_array(np.sqrt, np.ones(10), n_jobs=1)
    seen = []

    def other():
        try:
            taskcarrier.last_report()
        except LookupError:
            seen.append("nothing yet")
        map_array(np.sqrt, np.ones(20), n_jobs=1)
        seen.append(taskcarrier.last_report().items)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == ["nothing yet", 20]
    assert taskcarrier.last_report().items == 10


# Objects


THINGS = np.array([1, "two", None, (4,), {5: 6}, 7.5, b"8"], object)


@each_run
@pytest.mark.parametrize("axis", [0, 1])
def test_arrays_of_objects_are_mapped_and_come_back_as_objects(backend, balance, axis):
    X = np.stack([THINGS, THINGS[::-1]], axis=1 - axis)
    for view in (X, X[:, ::-1], X[::-1]):
        result = map_array(
            lambda c: c, view, axis=axis, chunksize=2, n_jobs=2, backend=backend, balance=balance
        )
        assert result.dtype == object
        assert result.tolist() == view.tolist()
        assert result.flags.writeable


@each_run
def test_the_report_says_that_objects_are_pickled_for_processes(backend, balance):
    numbers = np.arange(7)
    options = {"n_jobs": 2, "backend": backend, "balance": balance}
    result = map_array(lambda n, c: n + [len(str(x)) for x in c], numbers, THINGS, **options)
    assert_same(result, numbers + [len(str(x)) for x in THINGS])
    notes = taskcarrier.last_report().notes
    if backend == "loky":
        (note,) = notes
        assert "array 1 has dtype object" in note
        assert "pickled" in note
        assert note in str(taskcarrier.last_report())
    else:
        assert notes == ()
    map_array(lambda c: c, numbers, **options)
    assert taskcarrier.last_report().notes == ()


def test_arrays_of_objects_go_to_processes_by_default(hand_over_after):
    hand_over_after(1)
    map_array(lambda c: c, THINGS, n_jobs=2)
    assert taskcarrier.last_report().backend == "loky"


@each_run
def test_numbers_can_be_mapped_to_objects(backend, balance):
    X = np.arange(9)
    objects, doubled = map_array(
        lambda c: (np.array([{int(x)} for x in c], object), c * 2),
        X,
        chunksize=2,
        n_jobs=2,
        backend=backend,
        balance=balance,
    )
    assert objects.tolist() == [{x} for x in range(9)]
    assert_same(doubled, X * 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_of_objects_are_read_only(backend):
    def func(chunk):
        chunk[0] = None
        return chunk

    with pytest.raises(ValueError, match="read-only"):
        map_array(func, THINGS, n_jobs=2, backend=backend)
    result = map_array(func, THINGS, n_jobs=2, backend=backend, writable=True, chunksize=1)
    assert result.tolist() == [None] * 7
    assert THINGS[1] == "two"


# Casts


@pytest.mark.parametrize(
    ("given", "dtype"), [("f8", "f4"), ("f8", ">f8"), ("i8", "u1"), ("f4", "c16"), ("U2", "U5")]
)
def test_results_are_cast_to_the_dtype_that_is_asked_for(given, dtype):
    X = np.arange(40).astype(given)
    result = contract(lambda c: c, X, dtype=dtype, chunksize=7, runs=PAIRS)
    assert_same(result, X.astype(dtype))


@pytest.mark.fault(5)
@each_run
def test_a_value_that_does_not_fit_is_named_with_its_range(backend, balance):
    with pytest.raises(ValueError, match="the result 300 does not fit into uint8") as caught:
        map_array(
            lambda c: c + 270 * (c == 30),
            np.arange(40),
            dtype="u1",
            chunksize=10,
            n_jobs=2,
            backend=backend,
            balance=balance,
        )
    assert any("items 30:40" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match="float64 cannot become int32"):
        map_array(np.sqrt, np.arange(4.0), dtype="i4", n_jobs=2, backend=backend, balance=balance)


def test_each_of_several_results_has_its_own_dtype():
    X = np.arange(20.0)
    result = contract(lambda c: (c, c, c > 3), X, dtype=("f4", None, "i1"), runs=PAIRS)
    assert_same(result, (X.astype("f4"), X, (X > 3).astype("i1")))


def test_results_of_different_dtypes_are_cast_to_one():
    X = np.arange(20)
    result = contract(
        lambda c: c.astype("f4") if c[0] == 4 else c * 1.0, X, dtype="f8", chunksize=4, runs=PAIRS
    )
    assert_same(result, X * 1.0)


# Last: these end the workers that the others share, or start more


@pytest.mark.fault(7)
def test_results_are_right_after_the_workers_are_gone():
    X = np.arange(50_000.0)
    for backend in BACKENDS:
        first = map_array(lambda c: c, X, n_jobs=2, backend=backend)
        second = map_array(np.negative, first[::-1], n_jobs=2, backend=backend)
        taskcarrier.shutdown()
        assert_same(first, X, backend)
        del first
        assert_same(second, -X[::-1], backend)


@pytest.mark.thorough
@pytest.mark.fault(19)
def test_four_threads_can_map_at_once():
    X = np.arange(3000.0).reshape(1000, 3)
    wrong = []

    def many(backend, balance):
        for number in range(10):
            Y = X + number
            result = map_array(
                lambda c: c * 3, Y, n_jobs=2, backend=backend, balance=balance, chunksize=50
            )
            if not same_bits(result, Y * 3):
                wrong.append((backend, balance, number))

    threads = [threading.Thread(target=many, args=run) for run in PARALLEL]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_given_fill_value_takes_precedence_and_must_fit():
    assert choose_fill(7, "fill")(np.dtype("i4")) == 7
    assert choose_fill(None, "collect")(np.dtype(object))[()] is None
    assert choose_fill(0, "collect")(np.dtype("f8")) == 0
    with pytest.raises(TypeError, match=r"fill_value=1\.5 is no value of dtype int32"):
        choose_fill(1.5, "fill")(np.dtype("i4"))
    assert choose_fill(UNSET, "collect") is find_missing_value
    assert choose_fill(UNSET, "fill") is require_missing_value
