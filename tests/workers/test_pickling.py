"""Payloads: how tasks travel to a worker."""

import os
import pickle
import sys
import threading

import numpy as np
import pytest

from taskcarrier.memory.segments import Segment
from taskcarrier.memory.staging import Staging
from taskcarrier.system.descriptors import make_owner
from taskcarrier.workers import pickling
from taskcarrier.workers.call import Call
from taskcarrier.workers.pickling import pickle_apart, pickle_items, pickle_task, unpickle_task
from tests.workers.helpers import sent, travelled_task

SMALL = pickling.SHARED_NBYTES // 8 - 1
LARGE = pickling.SHARED_NBYTES // 8


@pytest.fixture(autouse=True)
def _payloads_live_as_long_as_the_run():
    yield
    sent.clear()


def module_level(x):
    return x + 1


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor


class TestFunctions:
    @pytest.mark.parametrize("func", [module_level, np.sqrt, len, Scale, np.linalg.norm])
    def test_importable_functions_arrive_as_themselves(self, func):
        arrived, nbytes = travelled_task(Call(func))
        assert arrived == Call(func, (), {})
        assert nbytes == 0

    def test_lambdas_and_closures_arrive_with_their_current_values(self):
        factor = 3

        def closure(x):
            return x * factor

        arrived = travelled_task((Call(lambda x: x - 1), Call(closure)))[0]
        factor = 100
        assert [call.func(7) for call in arrived] == [6, 21]

    def test_bound_methods_and_local_objects_arrive(self):
        class Local:
            def method(self, x):
                return x + 2

        assert travelled_task(Call(Local().method))[0].func(7) == 9
        assert travelled_task(Call(Scale(4)))[0].func(7) == 28

    def test_arguments_arrive(self):
        arrived, _ = travelled_task(Call(module_level, (1, "a"), {"key": [2.5]}))
        assert (arrived.args, arrived.kwargs) == ((1, "a"), {"key": [2.5]})

    def test_an_argument_that_cannot_be_pickled_is_an_error_with_the_remedy(self):
        with pytest.raises(TypeError, match="lock") as info:
            pickle_task(Call(module_level, (threading.Lock(),)), Staging())
        note = info.value.__notes__[-1]  # since 3.14 pickle adds notes of its own
        assert "could not pickle the function or its arguments" in note
        assert "backend='threading'" in note


class TestArrays:
    def test_large_arrays_travel_beside_the_pickle(self):
        array = np.arange(float(LARGE))
        staging = Staging()
        payload = pickle_task(Call(module_level, (array,)), staging)
        assert staging.nbytes == array.nbytes
        assert len(payload.data) < 2000
        assert len(payload.fds) == 1

    def test_small_arrays_travel_inside_the_pickle(self):
        array = np.arange(float(SMALL))
        staging = Staging()
        payload = pickle_task(Call(module_level, (array,)), staging)
        assert (staging.nbytes, payload.fds) == (0, [])
        assert np.array_equal(unpickle_task(payload.data, []).args[0], array)

    @pytest.mark.parametrize("length", [SMALL, LARGE])
    def test_arrays_arrive_writable_and_private(self, length):
        array = np.arange(float(length))
        staging = Staging()
        payload = pickle_task(Call(module_level, (array,)), staging)
        one, other = (
            unpickle_task(payload.data, [make_owner(os.dup(fd)) for fd in payload.fds]).args[0]
            for _ in range(2)
        )
        one[5] = -1
        assert one[5] == -1
        assert other[5] == array[5] == 5
        assert np.array_equal(other, array)

    def test_arrays_in_closures_travel_beside_the_pickle(self):
        array = np.arange(float(LARGE))
        arrived, nbytes = travelled_task(Call(lambda: array))
        assert nbytes == array.nbytes
        assert np.array_equal(arrived.func(), array)
        arrived.func()[0] = 5
        assert array[0] == 0

    @pytest.mark.parametrize(
        "array",
        [
            np.asfortranarray(np.arange(4.0 * LARGE).reshape(4, LARGE)),
            np.arange(3.0 * LARGE)[::3],
            np.arange(2.0 * LARGE).reshape(2, LARGE)[:, ::-1],
            np.broadcast_to(np.arange(5.0), (LARGE, 5)),
            np.array([[1], "two", None] * LARGE, dtype=object),
            np.array(["x" * 20] * LARGE),
            np.zeros(LARGE, [("a", ">i2"), ("b", "M8[s]")]),
            np.empty((0, 5)),
            np.array(3.0),
        ],
        ids=range(9),
    )
    def test_arrays_of_any_layout_and_dtype_arrive(self, array):
        arrived = travelled_task(Call(module_level, (array,)))[0].args[0]
        assert arrived.dtype == array.dtype
        assert arrived.shape == array.shape
        assert np.array_equal(arrived, array)

    def test_several_arrays_are_kept_apart(self):
        arrays = {n: np.arange(float(n)) for n in (LARGE, SMALL, 3 * LARGE, 5, 2 * LARGE)}
        arrived = travelled_task(Call(module_level, tuple(arrays.values()), {"more": arrays}))[0]
        for array, one in zip(arrays.values(), arrived.args, strict=True):
            assert np.array_equal(one, array)
            assert arrived.kwargs["more"][len(array)] is one

    def test_read_only_arrays_stay_read_only(self):
        array = np.arange(float(LARGE))
        array.flags.writeable = False
        assert not travelled_task(Call(module_level, (array,)))[0].args[0].flags.writeable

    def test_other_large_buffers_travel_beside_the_pickle(self):
        block = bytearray(os.urandom(8 * LARGE))
        arrived, nbytes = travelled_task(Call(module_level, (pickle.PickleBuffer(block),)))
        assert nbytes == len(block)
        assert bytes(arrived.args[0]) == block


class TestPickleApart:
    def test_large_arrays_are_separated_in_their_layout(self):
        large, small = np.arange(float(LARGE)).reshape(2, -1).T, np.arange(3)
        own, shared, *blocks = pickle_apart(lambda x: x + small, {"large": large, "small": small})
        assert [block.nbytes for block in blocks] == [large.nbytes]
        assert blocks[0].readonly
        found = pickle.loads(shared, buffers=blocks)
        assert np.shares_memory(found["large"], large)
        assert np.array_equal(found["large"], large)
        assert np.array_equal(found["small"], small)
        assert pickle.loads(own)(1).tolist() == [1, 2, 3]

    def test_arrays_of_the_function_stay_in_its_pickle(self):
        mine = np.zeros(LARGE)
        own, shared, *blocks = pickle_apart(lambda: mine, {"rows": np.zeros((2, LARGE))[:, ::2]})
        assert blocks == []
        arrived = pickle.loads(own)()
        assert arrived.flags.writeable
        assert pickle.loads(shared)["rows"].shape == (2, LARGE // 2)


class TestSegments:
    def test_segments_travel_by_descriptor(self):
        staging = Staging()
        array = np.arange(100.0)
        (view,) = staging.share([array])
        payload = pickle_task({"one": view, "again": view, "segment": view.segment}, staging)
        assert payload.fds == [view.segment.fd]
        arrived = unpickle_task(payload.data, [make_owner(os.dup(fd)) for fd in payload.fds])
        assert arrived["one"].segment is arrived["again"].segment is arrived["segment"]
        assert np.array_equal(arrived["one"].open("read"), array)
        arrived["one"].open("write")[7] = -1
        assert view.open("read")[7] == -1

    def test_several_segments_travel(self, tmp_path):
        made = [Segment.create(), Segment.create(str(tmp_path)), Segment.create()]
        for n, segment in enumerate(made):
            segment.reserve(100 * (n + 1))
        staging = Staging()
        (view,) = staging.share([np.arange(10.0)])
        payload = pickle_task([made[2], view, *made], staging)
        assert payload.segments == [made[2], view.segment, made[0], made[1]]
        arrived = unpickle_task(payload.data, [make_owner(os.dup(fd)) for fd in payload.fds])
        assert [os.fstat(s.fd).st_ino for s in arrived[2:]] == [os.fstat(s.fd).st_ino for s in made]
        assert [s.on_disk for s in arrived[2:]] == [False, True, False]
        assert [s.nbytes for s in arrived[2:]] == [100, 200, 300]
        assert arrived[0] is arrived[4]

    def test_descriptors_belong_to_the_receiver(self):
        staging = Staging()
        (view,) = staging.share([np.arange(10.0)])
        payload = pickle_task(view, staging)
        fd = os.dup(payload.fds[0])
        arrived = unpickle_task(payload.data, [make_owner(fd)])
        assert os.fstat(fd)
        del arrived
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    def test_a_payload_keeps_its_segments(self):
        payload = pickle_task(Call(module_level, (np.arange(float(LARGE)),)), Staging())
        assert os.fstat(payload.fds[0]).st_size >= 8 * LARGE


class TestItems:
    @pytest.mark.parametrize("items", [[1, "two", None], (3.5,), {"a": b"b"}, Ellipsis])
    def test_plain_items_are_pickled(self, items):
        assert pickle.loads(pickle_items(items)) == items

    def test_items_that_only_cloudpickle_takes_are_pickled(self):
        factor = 3
        assert pickle.loads(pickle_items([lambda x: x * factor]))[0](7) == 21

    def test_objects_of_main_travel_with_their_class(self, monkeypatch):
        namespace = {"__name__": "__main__"}
        exec("class Thing:\n    value = 7", namespace)
        kind = namespace["Thing"]
        monkeypatch.setattr(sys.modules["__main__"], "Thing", kind, raising=False)
        packed = pickle_items([kind()])
        monkeypatch.delattr(sys.modules["__main__"], "Thing")
        assert pickle.loads(packed)[0].value == 7

    def test_items_that_cannot_be_pickled_are_an_error(self):
        with pytest.raises(TypeError, match="lock"):
            pickle_items([threading.Lock()])
