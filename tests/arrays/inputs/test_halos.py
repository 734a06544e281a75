"""Chunks with neighbours, against the filters of SciPy over the whole array."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier import last_report, map_array, map_chunks, map_items, reduce_array, share
from taskcarrier.arrays.inputs.halos import Halo, positions_inside
from tests.helpers import never
from tests.strategies import (
    EVERYWHERE,
    SMALL_RUNS,
    assert_same,
    contract,
    examples,
    keep_pools_warm,
    same_bits,
)

# `numpy.pad` has the same rules under other names.
PADS = {
    "reflect": "symmetric",
    "nearest": "edge",
    "mirror": "reflect",
    "wrap": "wrap",
    "constant": "constant",
}


pools = keep_pools_warm(2)


def ndimage():
    return pytest.importorskip("scipy.ndimage", reason="SciPy is the oracle")


def image():
    return np.random.default_rng(0).normal(size=(37, 23))


def padded(X, depth, boundary, axis=0, cval=0.0):
    """Pad the array with `numpy.pad`, as workers see it."""
    if boundary == "none":
        return X
    widths = [(0, 0)] * X.ndim
    widths[axis] = (depth, depth)
    options = {"constant_values": cval} if boundary == "constant" else {}
    return np.pad(X, widths, PADS[boundary], **options)


class TestFilters:
    """Bit for bit with the plain call."""

    @pytest.mark.parametrize("boundary", PADS)
    @pytest.mark.parametrize("axis", [0, 1, -1])
    def test_a_gaussian_filter_gives_the_bits_of_the_plain_call(self, axis, boundary):
        filters, X = ndimage(), image()
        options = {"sigma": 1.3, "axis": axis, "mode": boundary, "cval": 0.5, "radius": 4}
        expected = filters.gaussian_filter1d(X, **options)
        for chunksize in (1, 5, 36, 37, None):
            result = contract(
                filters.gaussian_filter1d,
                X,
                axis=axis,
                depth=4,
                boundary=boundary,
                cval=0.5,
                kwargs=options,
                chunksize=chunksize,
                runs=SMALL_RUNS,
            )
            assert_same(result, expected)

    @pytest.mark.parametrize("boundary", PADS)
    def test_a_median_filter_gives_the_bits_of_the_plain_call(self, boundary):
        filters, X = ndimage(), image()
        for axis, size in ((0, (5, 1)), (1, (1, 5)), (0, (5, 3))):
            options = {"size": size, "mode": boundary, "cval": -1.0}
            expected = filters.median_filter(X, **options)
            for chunksize in (1, 2, 10):
                result = contract(
                    filters.median_filter,
                    X,
                    axis=axis,
                    depth=2,
                    boundary=boundary,
                    cval=-1.0,
                    kwargs=options,
                    chunksize=chunksize,
                    runs=SMALL_RUNS,
                )
                assert_same(result, expected)

    @pytest.mark.parametrize("boundary", PADS)
    def test_a_correlation_gives_the_bits_of_the_plain_call(self, boundary, run):
        filters, X = ndimage(), image()
        weights = np.array([0.5, -2.0, 0.25, 1.0, 3.0])
        for axis in (0, 1):
            options = {"axis": axis, "mode": boundary, "cval": 2.0}
            expected = filters.correlate1d(X, weights, **options)
            for depth in (2, 7):
                result = map_array(
                    filters.correlate1d,
                    X,
                    axis=axis,
                    args=(weights,),
                    depth=depth,
                    boundary=boundary,
                    cval=2.0,
                    kwargs=options,
                    chunksize=3,
                    **run,
                )
                assert_same(result, expected)

    @pytest.mark.parametrize("boundary", PADS)
    def test_boundary_none_leaves_the_ends_to_the_filter(self, boundary, run):
        filters, X = ndimage(), image()
        options = {"sigma": 1.0, "axis": 0, "mode": boundary, "radius": 3}
        expected = filters.gaussian_filter1d(X, **options)
        # Ends of several items: a filter's own rule needs as many as it reaches.
        for chunksize in (4, 10, 37):
            result = map_array(
                filters.gaussian_filter1d,
                X,
                depth=3,
                boundary="none",
                kwargs=options,
                chunksize=chunksize,
                **run,
            )
            assert_same(result, expected) if boundary != "wrap" else assert_inside(result, expected)

    def test_running_means_equal_the_plain_call_up_to_rounding(self, run):
        filters, X = ndimage(), image()
        for boundary in PADS:
            options = {"size": 7, "axis": 0, "mode": boundary}
            result = map_array(
                filters.uniform_filter1d,
                X,
                depth=3,
                boundary=boundary,
                kwargs=options,
                chunksize=4,
                **run,
            )
            expected = filters.uniform_filter1d(X, **options)
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-13)

    def test_local_thresholds_equal_the_plain_call_up_to_rounding(self, run):
        filters = pytest.importorskip("skimage.filters", reason="scikit-image is the oracle")
        X = image()
        for method in ("gaussian", "mean", "median"):
            options = {"block_size": 7, "method": method}
            result = map_array(
                filters.threshold_local, X, depth=8, kwargs=options, chunksize=5, **run
            )
            expected = filters.threshold_local(X, **options)
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-13)


def assert_inside(result, expected):
    assert_same(result[3:-3].copy(), expected[3:-3].copy())


def window_sums(chunk, reach, axis):
    """Sum over all items within `reach`, as far as they exist; exact on integers."""
    n = chunk.shape[axis]
    taken = [
        chunk.take(range(max(0, i - reach), min(n, i + reach + 1)), axis).sum(axis)
        for i in range(n)
    ]
    return np.stack(taken, axis)


class TestEveryCut:
    @pytest.mark.parametrize("boundary", [*PADS, "none"])
    @pytest.mark.parametrize("n_items", [1, 2, 9])
    def test_every_chunksize_and_depth_gives_the_sums_of_the_padded_array(self, n_items, boundary):
        X = np.arange(n_items * 3).reshape(n_items, 3) ** 2
        for depth in range(1, n_items + 1):
            whole = window_sums(padded(X, depth, boundary, cval=5), depth, 0)
            expected = whole if boundary == "none" else whole[depth : depth + n_items]
            for chunksize in range(1, n_items + 2):
                result = contract(
                    window_sums,
                    X,
                    depth=depth,
                    boundary=boundary,
                    cval=5,
                    args=(depth, 0),
                    chunksize=chunksize,
                    runs=SMALL_RUNS if chunksize in {1, 4} else SMALL_RUNS[:1],
                )
                assert_same(result, expected, (depth, chunksize))

    @pytest.mark.parametrize("boundary", ["nearest", "constant", "none"])
    def test_a_depth_beyond_the_array_pads_several_times(self, boundary, run):
        X = np.arange(5) ** 2
        for depth in (6, 50):
            whole = window_sums(padded(X, depth, boundary, cval=5), depth, 0)
            expected = whole if boundary == "none" else whole[depth : depth + 5]
            for chunksize in (1, 2, 5):
                result = map_array(
                    window_sums,
                    X,
                    depth=depth,
                    boundary=boundary,
                    cval=5,
                    args=(depth, 0),
                    chunksize=chunksize,
                    **run,
                )
                assert_same(result, expected)

    @examples(60)
    @given(st.data())
    def test_any_depth_boundary_axis_and_chunksize_is_right(self, data):
        n_items = data.draw(st.integers(1, 20))
        depth = data.draw(st.integers(1, n_items))
        boundary = data.draw(st.sampled_from([*PADS, "none"]))
        axis = data.draw(st.integers(0, 1))
        X = np.random.default_rng(0).integers(-100, 100, (n_items, 4))
        X = X if axis == 0 else X.T
        X = data.draw(st.sampled_from([X, X[::-1], X[:, ::-1], np.asfortranarray(X), share(X)]))
        whole = window_sums(padded(X, depth, boundary, axis, cval=-3), depth, axis)
        own = (slice(None),) * axis + (slice(depth, depth + n_items),)
        backend, balance = data.draw(st.sampled_from(EVERYWHERE))
        result = map_array(
            window_sums,
            X,
            axis=axis,
            depth=depth,
            boundary=boundary,
            cval=-3,
            args=(depth, axis),
            chunksize=data.draw(st.none() | st.integers(1, 25)),
            backend=backend,
            balance=balance,
            n_jobs=2,
        )
        assert_same(result, np.ascontiguousarray(whole if boundary == "none" else whole[own]))


class TestChunks:
    """The chunks that the function gets."""

    @pytest.mark.parametrize("boundary", [*PADS, "none"])
    @pytest.mark.parametrize("depth", [1, 4, 11])
    def test_chunks_are_slices_of_the_padded_array(self, depth, boundary, run):
        X = np.random.default_rng(0).normal(size=(11, 3))
        found = map_chunks(np.copy, X, depth=depth, boundary=boundary, chunksize=4, **run)
        whole = padded(X, depth, boundary)
        assert len(found) == 3
        for start, chunk in zip((0, 4, 8), found, strict=True):
            stop = min(start + 4, 11)
            if boundary == "none":
                expected = X[max(0, start - depth) : stop + depth]
            else:
                expected = whole[start : stop + 2 * depth]
            assert same_bits(chunk, np.ascontiguousarray(expected))

    def test_chunks_are_read_only_unless_private_ones_are_asked_for(self, run):
        X = np.zeros(20)
        options = {"depth": 2, "chunksize": 6, **run}
        for flag in (False, True):
            found = map_chunks(lambda c: c.flags.writeable, X, writable=flag, **options)
            assert found == [flag] * 4

    def test_writing_to_a_chunk_leaves_its_neighbours_alone(self, run):
        def spoil(chunk):
            chunk += 1
            return chunk

        X = np.arange(20.0)
        result = map_array(spoil, X, depth=3, writable=True, chunksize=2, **run)
        assert_same(result, np.arange(1.0, 21.0))
        assert np.array_equal(X, np.arange(20.0))

    @pytest.mark.parametrize("dtype", ["U3", "S2", "M8[s]", "?", ">i4", "f2", "c8", "i4, U2", "O"])
    def test_chunks_of_every_dtype_keep_it(self, dtype, run):
        X = np.arange(10).astype("S1" if dtype == "S2" else "i4").astype(dtype)
        for boundary in ("reflect", "nearest", "mirror", "wrap", "none"):
            found = map_chunks(
                lambda c: (c.dtype, c.tolist()), X, depth=3, boundary=boundary, chunksize=4, **run
            )
            before = 0 if boundary == "none" else 3
            places = np.arange(10) if before == 0 else padded(np.arange(10), 3, boundary)
            for (kind, values), start in zip(found, (0, 4, 8), strict=True):
                stop = min(start + 4, 10)
                low, high = (start, stop + 6) if before else (max(0, start - 3), min(10, stop + 3))
                assert kind == X.dtype
                assert values == X[places[low:high]].tolist()

    def test_chunks_of_a_shared_array_are_not_copied(self):
        X = share(np.random.default_rng(0).normal(size=(400, 300)))
        result = map_array(lambda c: c * 2, X, depth=1, backend="loky", n_jobs=2)
        assert last_report().bytes_copied == 0
        assert_same(result, X * 2)


class TestResults:
    def test_margins_are_cut_off_each_of_several_results(self, run):
        X = np.arange(11.0)

        def both(chunk):
            return chunk + 1, np.stack([chunk, -chunk])

        one, other = map_array(both, X, depth=3, out_axis=(0, 1), chunksize=4, **run)
        assert_same(one, X + 1)
        assert_same(other, np.stack([X, -X]))

    def test_several_arrays_have_neighbours_along_axes_of_their_own(self, run):
        X = np.random.default_rng(0).normal(size=(3, 17))
        Y = np.random.default_rng(1).normal(size=(17, 3))

        def func(x, y):
            return x.T + y + np.roll(x.T, 1, 0) * np.roll(y, -1, 0)

        result = map_array(
            func, X, Y, axis=(1, 0), out_axis=0, depth=1, boundary="wrap", chunksize=5, **run
        )
        assert_same(result, func(X, Y))

    @pytest.mark.parametrize("kind", ["array", "file"])
    def test_results_are_written_in_place(self, kind, run, tmp_path):
        X = np.arange(40)
        out = np.empty(40, "f4") if kind == "array" else tmp_path / "Y.npy"
        result = map_array(
            window_sums, X, args=(2, 0), depth=2, out=out, dtype="f4", chunksize=7, **run
        )
        expected = window_sums(padded(X, 2, "reflect"), 2, 0)[2:42].astype("f4")
        assert np.array_equal(result, expected)
        assert kind == "array" or np.array_equal(np.load(out), expected)

    def test_results_that_the_function_has_cut_itself_are_refused(self, run):
        with pytest.raises(ValueError, match="length 4 along axis 0, for a chunk of length 8"):
            map_array(lambda c: c[2:-2], np.arange(8.0), depth=2, chunksize=4, **run)

    def test_collected_errors_name_the_bad_items_despite_neighbours(self, run):
        # Fails only if an item of the range is bad, not if a neighbour is.
        def func(chunk):
            if (chunk[2:-2] == 13).any():
                raise ValueError("bad")
            return window_sums(chunk, 2, 0)

        X = np.arange(40)
        expected = window_sums(padded(X, 2, "mirror"), 2, 0)[2:42]
        expected[13] = -1
        for chunksize in (1, 6, 40):
            result, failures = map_array(
                func,
                X,
                depth=2,
                boundary="mirror",
                on_error="collect",
                fill_value=-1,
                chunksize=chunksize,
                **run,
            )
            assert [failure[:2] for failure in failures] == [(13, 14)]
            assert_same(result, expected)

    def test_chunks_with_neighbours_can_be_reduced(self, run):
        X = np.arange(50) ** 2
        differences = reduce_array(
            lambda c: int(np.diff(c).max()),
            X,
            combine=max,
            depth=1,
            boundary="nearest",
            chunksize=7,
            **run,
        )
        assert differences == 49**2 - 48**2

    def test_an_array_without_items_gives_an_empty_result(self, run):
        for boundary in (*PADS, "none"):
            result = map_array(np.sqrt, np.empty((0, 3)), depth=5, boundary=boundary, **run)
            assert_same(result, np.empty((0, 3)))


class TestArguments:
    @pytest.mark.parametrize("boundary", ["reflect", "mirror", "wrap"])
    def test_a_depth_beyond_the_number_of_items_is_refused(self, boundary):
        for verb in (map_array, map_chunks):
            with pytest.raises(ValueError, match=r"depth=6 is more than the 5 items"):
                verb(never, np.arange(5), depth=6, boundary=boundary)

    @pytest.mark.parametrize("depth", [-1, -100])
    def test_a_negative_depth_is_refused(self, depth):
        with pytest.raises(ValueError, match=f"got {depth}"):
            map_array(never, np.arange(5), depth=depth)

    @pytest.mark.parametrize("depth", [1.0, "2", None, (1,)])
    def test_a_depth_that_is_no_integer_is_refused(self, depth):
        with pytest.raises(TypeError, match="depth must be"):
            map_array(never, np.arange(5), depth=depth)

    @pytest.mark.parametrize("boundary", ["edge", "grid-wrap", None, 3, ["wrap"]])
    def test_an_unknown_boundary_is_refused(self, boundary):
        with pytest.raises(ValueError, match="'reflect', 'nearest', 'mirror'"):
            map_array(never, np.arange(5), depth=1, boundary=boundary)
        with pytest.raises(ValueError, match="boundary must be one of"):
            map_array(never, np.arange(5), boundary=boundary)

    @pytest.mark.parametrize(
        ("dtype", "cval"),
        [("i4", np.nan), ("i4", 0.5), ("u1", -1), ("i1", 300), ("f8", "x"), ("U1", "xy"),
         ("M8[D]", 0.0), ("?", 2), ("f8", 1j), ("f4", 1e300), ("f8", None), ("f8", [1.0])],
    )  # fmt: skip
    def test_a_cval_that_is_no_value_of_the_dtype_is_refused(self, dtype, cval):
        with pytest.raises(TypeError, match="cval="):
            map_array(never, np.zeros(5, dtype), depth=1, boundary="constant", cval=cval)

    def test_cval_is_checked_only_where_it_is_used(self):
        X = np.arange(5)
        for options in ({"boundary": "constant"}, {"depth": 1}):
            assert_same(map_array(np.copy, X, cval=np.nan, n_jobs=1, **options), X)

    @pytest.mark.parametrize(
        ("dtype", "cval"),
        [("i4", 7.0), ("f4", np.nan), ("U2", "ab"), ("M8[D]", np.datetime64("NaT", "D")),
         ("?", True), ("c8", 1j), ("O", "anything"), ("f8", np.inf)],
    )  # fmt: skip
    def test_a_constant_boundary_is_filled_with_cval(self, dtype, cval, run):
        X = np.zeros(3, dtype)
        found = map_chunks(np.copy, X, depth=2, boundary="constant", cval=cval, chunksize=3, **run)
        filled = np.empty(2, dtype)
        filled[:] = cval
        (chunk,) = found
        expected = np.concatenate([filled, X, filled])
        assert chunk.dtype == expected.dtype
        assert [str(one) for one in chunk] == [str(one) for one in expected]

    def test_map_items_has_no_depth(self):
        with pytest.raises(TypeError, match="depth"):
            map_items(abs, np.arange(3), depth=1)


@given(st.integers(1, 12), st.sampled_from(sorted(PADS.keys() - {"constant"})), st.data())
def test_positions_equal_those_of_numpy_s_padding(n_items, boundary, data):
    depth = data.draw(st.integers(0, 4 * n_items))
    positions = np.arange(-depth, n_items + depth)
    expected = np.pad(np.arange(n_items), depth, PADS[boundary])
    assert np.array_equal(positions_inside(positions, n_items, boundary), expected)


@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([*PADS, "none"]), st.data())
def test_margins_say_where_the_items_lie_in_their_chunk(n_items, depth, boundary, data):
    start = data.draw(st.integers(0, n_items - 1))
    stop = data.draw(st.integers(start + 1, n_items))
    X = np.arange(n_items)
    halo = Halo(depth, boundary, 0, n_items)
    chunk = halo.read(lambda low, high: X[low:high], 0, start, stop)
    before, after = halo.margins(start, stop)
    assert chunk[before : len(chunk) - after].tolist() == list(range(start, stop))
