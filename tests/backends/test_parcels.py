"""Parcels: what travels to a worker, and what comes back."""

import os
import pickle
import resource
import socket
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from taskcarrier.backends import parcels
from taskcarrier.backends.given import Call
from taskcarrier.backends.parcels import (
    Channel,
    pack,
    pack_apart,
    pack_items,
    unpack,
)
from taskcarrier.descriptors import own
from taskcarrier.segments import Segment, Staging
from tests.interrupted import interrupted_at

SMALL = parcels._SHARED_NBYTES // 8 - 1
LARGE = parcels._SHARED_NBYTES // 8


sent = []


@pytest.fixture(autouse=True)
def _parcels_live_as_long_as_the_run():
    yield
    sent.clear()


def travelled(task):
    """A task as it arrives, and the bytes that were copied beside the pickle."""
    staging = Staging()
    parcel = pack(task, staging)
    sent.append(parcel)
    return unpack(parcel.data, [own(os.dup(fd)) for fd in parcel.fds]), staging.nbytes


def module_level(x):
    return x + 1


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor


class TestFunctions:
    @pytest.mark.parametrize("func", [module_level, np.sqrt, len, Scale, np.linalg.norm])
    def test_importable_ones_arrive_as_themselves(self, func):
        arrived, nbytes = travelled(Call(func))
        assert arrived == Call(func, (), {})
        assert nbytes == 0

    def test_lambdas_and_closures_arrive_as_they_are_now(self):
        factor = 3

        def closure(x):
            return x * factor

        arrived = travelled((Call(lambda x: x - 1), Call(closure)))[0]
        factor = 100
        assert [call.func(7) for call in arrived] == [6, 21]

    def test_bound_and_local_objects(self):
        class Local:
            def method(self, x):
                return x + 2

        assert travelled(Call(Local().method))[0].func(7) == 9
        assert travelled(Call(Scale(4)))[0].func(7) == 28

    def test_arguments(self):
        arrived, _ = travelled(Call(module_level, (1, "a"), {"key": [2.5]}))
        assert (arrived.args, arrived.kwargs) == ((1, "a"), {"key": [2.5]})

    def test_what_cannot_be_pickled(self):
        with pytest.raises(TypeError, match="lock") as info:
            pack(Call(module_level, (threading.Lock(),)), Staging())
        (note,) = info.value.__notes__
        assert "could not pickle the function or its arguments" in note
        assert "backend='threading'" in note


class TestArrays:
    def test_large_ones_travel_beside_the_pickle(self):
        array = np.arange(float(LARGE))
        staging = Staging()
        parcel = pack(Call(module_level, (array,)), staging)
        assert staging.nbytes == array.nbytes
        assert len(parcel.data) < 2000
        assert len(parcel.fds) == 1

    def test_small_ones_travel_inside(self):
        array = np.arange(float(SMALL))
        staging = Staging()
        parcel = pack(Call(module_level, (array,)), staging)
        assert (staging.nbytes, parcel.fds) == (0, [])
        assert np.array_equal(unpack(parcel.data, []).args[0], array)

    @pytest.mark.parametrize("length", [SMALL, LARGE])
    def test_arrive_writable_and_private(self, length):
        array = np.arange(float(length))
        staging = Staging()
        parcel = pack(Call(module_level, (array,)), staging)
        one, other = (
            unpack(parcel.data, [own(os.dup(fd)) for fd in parcel.fds]).args[0] for _ in range(2)
        )
        one[5] = -1
        assert one[5] == -1
        assert other[5] == array[5] == 5
        assert np.array_equal(other, array)

    def test_in_closures(self):
        array = np.arange(float(LARGE))
        arrived, nbytes = travelled(Call(lambda: array))
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
    def test_any_layout_and_dtype(self, array):
        arrived = travelled(Call(module_level, (array,)))[0].args[0]
        assert arrived.dtype == array.dtype
        assert arrived.shape == array.shape
        assert np.array_equal(arrived, array)

    def test_several_keep_apart(self):
        arrays = {n: np.arange(float(n)) for n in (LARGE, SMALL, 3 * LARGE, 5, 2 * LARGE)}
        arrived = travelled(Call(module_level, tuple(arrays.values()), {"more": arrays}))[0]
        for array, one in zip(arrays.values(), arrived.args, strict=True):
            assert np.array_equal(one, array)
            assert arrived.kwargs["more"][len(array)] is one

    def test_read_only_ones_stay_read_only(self):
        array = np.arange(float(LARGE))
        array.flags.writeable = False
        assert not travelled(Call(module_level, (array,)))[0].args[0].flags.writeable

    def test_other_large_buffers(self):
        block = bytearray(os.urandom(8 * LARGE))
        arrived, nbytes = travelled(Call(module_level, (pickle.PickleBuffer(block),)))
        assert nbytes == len(block)
        assert bytes(arrived.args[0]) == block


class TestApart:
    def test_large_arrays_are_taken_apart_as_they_lie(self):
        large, small = np.arange(float(LARGE)).reshape(2, -1).T, np.arange(3)
        own, shared, *blocks = pack_apart(lambda x: x + small, {"large": large, "small": small})
        assert [block.nbytes for block in blocks] == [large.nbytes]
        assert blocks[0].readonly
        found = pickle.loads(shared, buffers=blocks)
        assert np.shares_memory(found["large"], large)
        assert np.array_equal(found["large"], large)
        assert np.array_equal(found["small"], small)
        assert pickle.loads(own)(1).tolist() == [1, 2, 3]

    def test_what_becomes_a_worker_s_own_stays_in_its_pickle(self):
        mine = np.zeros(LARGE)
        own, shared, *blocks = pack_apart(lambda: mine, {"rows": np.zeros((2, LARGE))[:, ::2]})
        assert blocks == []
        arrived = pickle.loads(own)()
        assert arrived.flags.writeable
        assert pickle.loads(shared)["rows"].shape == (2, LARGE // 2)


class TestSegments:
    def test_travel_by_descriptor(self):
        staging = Staging()
        array = np.arange(100.0)
        (view,) = staging.share([array])
        parcel = pack({"one": view, "again": view, "segment": view.segment}, staging)
        assert parcel.fds == [view.segment.fd]
        arrived = unpack(parcel.data, [own(os.dup(fd)) for fd in parcel.fds])
        assert arrived["one"].segment is arrived["again"].segment is arrived["segment"]
        assert np.array_equal(arrived["one"].open("read"), array)
        arrived["one"].open("write")[7] = -1
        assert view.open("read")[7] == -1

    def test_several(self, tmp_path):
        made = [Segment.create(), Segment.create(str(tmp_path)), Segment.create()]
        for n, segment in enumerate(made):
            segment.reserve(100 * (n + 1))
        staging = Staging()
        (view,) = staging.share([np.arange(10.0)])
        parcel = pack([made[2], view, *made], staging)
        assert parcel.segments == [made[2], view.segment, made[0], made[1]]
        arrived = unpack(parcel.data, [own(os.dup(fd)) for fd in parcel.fds])
        assert [os.fstat(s.fd).st_ino for s in arrived[2:]] == [os.fstat(s.fd).st_ino for s in made]
        assert [s.on_disk for s in arrived[2:]] == [False, True, False]
        assert [s.nbytes for s in arrived[2:]] == [100, 200, 300]
        assert arrived[0] is arrived[4]

    def test_descriptors_belong_to_whoever_unpacks(self):
        staging = Staging()
        (view,) = staging.share([np.arange(10.0)])
        parcel = pack(view, staging)
        fd = os.dup(parcel.fds[0])
        arrived = unpack(parcel.data, [own(fd)])
        assert os.fstat(fd)
        del arrived
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    def test_a_parcel_keeps_its_segments(self):
        parcel = pack(Call(module_level, (np.arange(float(LARGE)),)), Staging())
        assert os.fstat(parcel.fds[0]).st_size >= 8 * LARGE


class TestItems:
    @pytest.mark.parametrize("items", [[1, "two", None], (3.5,), {"a": b"b"}, Ellipsis])
    def test_plain_data(self, items):
        assert pickle.loads(pack_items(items)) == items

    def test_what_pickle_does_not_take(self):
        factor = 3
        assert pickle.loads(pack_items([lambda x: x * factor]))[0](7) == 21

    def test_objects_of_main_travel_whole(self, monkeypatch):
        namespace = {"__name__": "__main__"}
        exec("class Thing:\n    value = 7", namespace)
        kind = namespace["Thing"]
        monkeypatch.setattr(sys.modules["__main__"], "Thing", kind, raising=False)
        packed = pack_items([kind()])
        monkeypatch.delattr(sys.modules["__main__"], "Thing")
        assert pickle.loads(packed)[0].value == 7

    def test_the_error_for_what_nothing_takes(self):
        with pytest.raises(TypeError, match="lock"):
            pack_items([threading.Lock()])


def n_open():
    return len(list(Path("/proc/self/fd").iterdir()))


def ready(channel):
    """The bytes of all whole messages that have come, and whether more may come."""
    open_ = channel.read()
    return [data for data, _ in channel.messages()], open_


class TestChannel:
    @pytest.fixture
    def raw(self):
        """A channel, and the bare socket at its other end."""
        ours, theirs = socket.socketpair()
        theirs.settimeout(30)
        channel = Channel(ours)
        yield channel, theirs
        channel.close()
        theirs.close()

    @pytest.fixture
    def pair(self):
        one, other = map(Channel, socket.socketpair())
        yield one, other
        one.close()
        other.close()

    @staticmethod
    def framed(channel, theirs, data):
        """A message as the channel writes it."""
        channel.send(data)
        head = theirs.recv(12, socket.MSG_WAITALL)
        assert struct.unpack("<QI", head) == (len(data), 0)
        return head + (theirs.recv(len(data), socket.MSG_WAITALL) if data else b"")

    @pytest.mark.parametrize("data", [b"", b"x", b"abc" * 10_000])
    def test_whole_messages(self, pair, data):
        pair[0].send(data)
        assert pair[1].receive() == (data, [])
        pair[1].send(data)
        assert ready(pair[0]) == ([data], True)

    def test_larger_than_the_kernel_s_buffer(self, pair):
        data = os.urandom(5 << 20)
        sender = threading.Thread(target=pair[0].send, args=(data,))
        sender.start()
        received = pair[1].receive()
        sender.join()
        assert received == (data, [])

    def test_more_than_one_look_takes_in(self, pair, monkeypatch):
        monkeypatch.setattr(parcels, "_MAX_READS", 2)
        data = os.urandom(3 << 20)
        sender = threading.Thread(target=pair[0].send, args=(data,))
        sender.start()
        messages = []
        while not messages:
            messages, open_ = ready(pair[1])
            assert open_
        sender.join()
        assert messages == [data]

    def test_many_at_once(self, pair):
        sent = [b"%d" % n * n for n in range(50)]
        for data in sent:
            pair[0].send(data)
        assert ready(pair[1]) == (sent, True)
        assert ready(pair[1]) == ([], True)

    def test_byte_by_byte(self, raw):
        channel, theirs = raw
        stream = self.framed(channel, theirs, b"hello") + self.framed(channel, theirs, b"you")
        got = []
        for n in range(len(stream)):
            theirs.sendall(stream[n : n + 1])
            messages, open_ = ready(channel)
            assert open_
            got += [(n, message) for message in messages]
        assert got == [(16, b"hello"), (31, b"you")]

    def test_one_and_a_half(self, raw):
        channel, theirs = raw
        stream = self.framed(channel, theirs, b"hello") + self.framed(channel, theirs, b"you")
        theirs.sendall(stream[:-2])
        assert ready(channel) == ([b"hello"], True)
        theirs.sendall(stream[-2:])
        assert ready(channel) == ([b"you"], True)

    def test_wait_for_one_in_pieces(self, raw):
        channel, theirs = raw
        stream = self.framed(channel, theirs, b"hello")
        received = []
        waiter = threading.Thread(target=lambda: received.append(channel.receive()))
        waiter.start()
        for n in range(len(stream)):
            theirs.sendall(stream[n : n + 1])
        waiter.join(30)
        assert received == [(b"hello", [])]

    def test_descriptors_come_with_their_message(self, pair):
        files = [os.memfd_create(f"file{n}") for n in range(3)]
        pair[0].send(b"two", files[:2])
        pair[0].send(b"none")
        pair[0].send(b"one", files[2:])
        received = [pair[1].receive() for _ in range(3)]
        assert [data for data, _ in received] == [b"two", b"none", b"one"]
        assert [len(fds) for _, fds in received] == [2, 0, 1]
        arrived = [fd for _, fds in received for fd in fds]
        assert [os.fstat(one.fileno()).st_ino for one in arrived] == [
            os.fstat(fd).st_ino for fd in files
        ]
        assert set(arrived).isdisjoint(files)
        for fd in files:
            os.close(fd)

    def test_as_many_descriptors_as_the_kernel_takes(self, pair):
        file = os.memfd_create("file")
        pair[0].send(b"many" * 1000, [file] * 253)
        data, fds = pair[1].receive()
        os.close(file)
        assert data == b"many" * 1000
        assert len({one.fileno() for one in fds}) == 253

    def test_descriptors_of_the_messages_that_are_read_together(self, pair):
        files = [os.memfd_create(f"file{n}") for n in range(3)]
        pair[0].send(b"none")
        pair[0].send(b"one", files[:1])
        pair[0].send(b"none")
        pair[0].send(b"two", files[1:])
        messages = []
        while len(messages) < 4:
            assert pair[1].read()
            messages += pair[1].messages()
        assert [(data, len(fds)) for data, fds in messages] == [
            (b"none", 0),
            (b"one", 1),
            (b"none", 0),
            (b"two", 2),
        ]
        arrived = [fd for _, fds in messages for fd in fds]
        assert [os.fstat(one.fileno()).st_ino for one in arrived] == [
            os.fstat(fd).st_ino for fd in files
        ]
        for fd in files:
            os.close(fd)

    def test_descriptors_that_nobody_takes_are_closed_with_the_channel(self, pair):
        file = os.memfd_create("file")
        before = n_open()
        pair[0].send(b"one", [file])
        assert pair[1].read()
        assert n_open() == before + 1
        pair[1].close()
        assert n_open() == before - 1
        os.close(file)

    def test_too_many_descriptors(self):
        with pytest.raises(ValueError, match="at most 253 separate shared arrays, got 254"):
            pack([Segment.create() for _ in range(254)], Staging())

    def test_descriptors_are_not_inherited(self, pair):
        file = os.memfd_create("file")
        pair[0].send(b"one", [file])
        _, (arrived,) = pair[1].receive()
        inheritable = os.get_inheritable(arrived.fileno())
        os.close(file)
        assert not inheritable

    def test_nothing_yet(self, pair):
        assert ready(pair[0]) == ([], True)

    def test_end(self, pair):
        pair[0].send(b"last")
        pair[0].close()
        assert ready(pair[1]) == ([b"last"], False)
        assert ready(pair[1]) == ([], False)
        with pytest.raises(EOFError):
            pair[1].receive()

    @pytest.mark.parametrize("cut", [1, 11, 12, 13, 16])
    def test_a_message_cut_off_by_death_is_never_returned(self, raw, cut):
        channel, theirs = raw
        stream = self.framed(channel, theirs, b"hello")
        theirs.sendall(stream + stream[:cut])
        theirs.close()
        messages, open_ = ready(channel)
        assert (messages, open_) == ([b"hello"], False)
        assert ready(channel) == ([], False)

    @pytest.mark.parametrize("cut", [1, 11, 12, 13, 16])
    def test_a_message_cut_off_while_it_is_waited_for(self, raw, cut):
        channel, theirs = raw
        theirs.sendall(self.framed(channel, theirs, b"hello")[:cut])
        theirs.close()
        with pytest.raises(EOFError):
            channel.receive()

    def test_a_connection_reset(self, raw):
        channel, theirs = raw
        channel.send(b"never read")  # closing with this unread resets the connection
        theirs.close()
        assert ready(channel) == ([], False)
        with pytest.raises(BrokenPipeError):
            channel.send(b"more")

    def test_an_exception_at_any_step_of_reading_loses_nothing(self, pair):
        # Neither bytes nor descriptors, which would come with the next message.
        files = [os.memfd_create(f"file{n}") for n in range(2)]
        before = n_open()
        step = 0
        messages = []

        def read():
            pair[1].read()
            messages.extend(pair[1].messages())

        def in_between():
            return interrupted_at(step, pair[1].read)

        while in_between():
            for n in range(2):
                pair[0].send(b"%d" % n, files[n : n + 1])
            assert in_between()
            read()
            inodes = [os.fstat(one.fileno()).st_ino for _, (one,) in messages]
            assert [data for data, _ in messages] == [b"0", b"1"]
            assert inodes == [os.fstat(fd).st_ino for fd in files]
            messages.clear()
            assert n_open() == before
            step += 1
        assert step > 10
        for fd in files:
            os.close(fd)

    def test_nothing_is_read_after_the_kernel_has_dropped_a_descriptor(self, pair):
        file = os.memfd_create("file")
        pair[0].send(b"one", [file])
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(file)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            with pytest.raises(OSError, match="too many open files for the shared arrays"):
                pair[1].read()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        pair[0].send(b"two", [file])
        assert ready(pair[1]) == ([], False)
        os.close(file)

    def test_can_be_waited_on(self, pair):
        assert pair[0].fileno() == pair[0]._socket.fileno() >= 0
