"""Messages on a worker's socket: whole ones, with their descriptors, or none."""

import os
import pickle
import resource
import socket
import struct
import threading

import pytest

from taskcarrier.memory.segments import Segment
from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.balance import Dynamic
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.workers.pickling import pickle_task
from taskcarrier.workers.processes import messages as module
from taskcarrier.workers.processes.messages import MessageSocket
from taskcarrier.workers.processes.pool import ProcessPool
from taskcarrier.workers.task import Job
from tests.descriptors import n_descriptors
from tests.interrupted import interrupted_at
from tests.workers.helpers import ready


class TestMessageSocket:
    @pytest.fixture
    def raw(self):
        """A channel, and the bare socket at its other end."""
        ours, theirs = socket.socketpair()
        theirs.settimeout(30)
        channel = MessageSocket(ours)
        yield channel, theirs
        channel.close()
        theirs.close()

    @pytest.fixture
    def pair(self):
        one, other = map(MessageSocket, socket.socketpair())
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
    def test_whole_messages_arrive(self, pair, data):
        pair[0].send(data)
        assert pair[1].receive() == (data, [])
        pair[1].send(data)
        assert ready(pair[0]) == ([data], True)

    def test_the_other_end_may_close_as_soon_as_it_has_the_message(self, raw):
        channel, theirs = raw

        class Closing:
            """A socket whose other end is closed just after a message with descriptors was sent."""

            def __init__(self, ours):
                self._ours = ours
                self.sendall = ours.sendall
                self.close = ours.close

            def sendmsg(self, *args):
                n_sent = self._ours.sendmsg(*args)
                theirs.close()
                return n_sent

        channel._socket = Closing(channel._socket)
        channel.send(b"the last one", [0])

    def test_a_message_may_be_larger_than_the_buffer_of_the_kernel(self, pair):
        data = os.urandom(5 << 20)
        sender = threading.Thread(target=pair[0].send, args=(data,))
        sender.start()
        received = pair[1].receive()
        sender.join()
        assert received == (data, [])

    def test_a_large_message_is_read_in_several_steps(self, pair):
        data = os.urandom(3 << 20)
        sender = threading.Thread(target=pair[0].send, args=(data,))
        sender.start()
        messages = []
        while not messages:
            assert pair[1].read(max_reads=2)
            messages = [data for data, _ in pair[1].messages()]
        sender.join()
        assert messages == [data]

    def test_all_messages_that_have_come_are_read_on_request(self, pair):
        n = module.MAX_READS + 4
        for number in range(n):  # a read ends where descriptors come
            pair[0].send(bytes([number]), [0])
        assert pair[1].read()
        n_first = len(list(pair[1].messages()))
        assert n_first < n
        assert pair[1].read(max_reads=None)
        assert len(list(pair[1].messages())) == n - n_first

    def test_many_messages_are_read_at_once(self, pair):
        sent = [b"%d" % n * n for n in range(50)]
        for data in sent:
            pair[0].send(data)
        assert ready(pair[1]) == (sent, True)
        assert ready(pair[1]) == ([], True)

    def test_messages_may_arrive_byte_by_byte(self, raw):
        channel, theirs = raw
        stream = self.framed(channel, theirs, b"hello") + self.framed(channel, theirs, b"you")
        got = []
        for n in range(len(stream)):
            theirs.sendall(stream[n : n + 1])
            messages, open_ = ready(channel)
            assert open_
            got += [(n, message) for message in messages]
        assert got == [(16, b"hello"), (31, b"you")]

    def test_half_a_message_waits_for_its_rest(self, raw):
        channel, theirs = raw
        stream = self.framed(channel, theirs, b"hello") + self.framed(channel, theirs, b"you")
        theirs.sendall(stream[:-2])
        assert ready(channel) == ([b"hello"], True)
        theirs.sendall(stream[-2:])
        assert ready(channel) == ([b"you"], True)

    def test_receive_waits_for_all_pieces_of_a_message(self, raw):
        channel, theirs = raw
        stream = self.framed(channel, theirs, b"hello")
        received = []
        waiter = threading.Thread(target=lambda: received.append(channel.receive()))
        waiter.start()
        for n in range(len(stream)):
            theirs.sendall(stream[n : n + 1])
        waiter.join(30)
        assert received == [(b"hello", [])]

    def test_descriptors_arrive_with_their_message(self, pair):
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

    def test_a_message_takes_as_many_descriptors_as_the_kernel(self, pair):
        file = os.memfd_create("file")
        pair[0].send(b"many" * 1000, [file] * 253)
        data, fds = pair[1].receive()
        os.close(file)
        assert data == b"many" * 1000
        assert len({one.fileno() for one in fds}) == 253

    def test_descriptors_of_messages_that_are_read_together_are_told_apart(self, pair):
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

    def test_unclaimed_descriptors_are_closed_with_the_channel(self, pair):
        file = os.memfd_create("file")
        before = n_descriptors()
        pair[0].send(b"one", [file])
        assert pair[1].read()
        assert n_descriptors() == before + 1
        pair[1].close()
        assert n_descriptors() == before - 1
        os.close(file)

    def test_too_many_descriptors_are_refused(self):
        with pytest.raises(ValueError, match="at most 253 separate shared arrays, got 254"):
            pickle_task([Segment.create() for _ in range(254)], Staging())

    def test_descriptors_are_not_inherited(self, pair):
        file = os.memfd_create("file")
        pair[0].send(b"one", [file])
        _, (arrived,) = pair[1].receive()
        inheritable = os.get_inheritable(arrived.fileno())
        os.close(file)
        assert not inheritable

    def test_an_empty_channel_has_no_message(self, pair):
        assert ready(pair[0]) == ([], True)

    def test_a_closed_channel_gives_its_last_message_and_ends(self, pair):
        pair[0].send(b"last")
        pair[0].close()
        assert ready(pair[1]) == ([b"last"], True)  # after a short read it does not read again
        assert ready(pair[1]) == ([], False)
        with pytest.raises(EOFError):
            pair[1].receive()

    def test_all_that_came_before_the_end_is_read_at_once(self, pair):
        pair[0].send(b"last")
        pair[0].close()
        assert ready(pair[1], max_reads=None) == ([b"last"], False)

    @pytest.mark.parametrize("cut", [1, 11, 12, 13, 16])
    def test_a_message_cut_off_by_death_is_never_returned(self, raw, cut):
        channel, theirs = raw
        stream = self.framed(channel, theirs, b"hello")
        theirs.sendall(stream + stream[:cut])
        theirs.close()
        messages, open_ = ready(channel, max_reads=None)
        assert (messages, open_) == ([b"hello"], False)
        assert ready(channel) == ([], False)

    @pytest.mark.parametrize("cut", [1, 11, 12, 13, 16])
    def test_a_message_cut_off_while_it_is_waited_for_is_an_error(self, raw, cut):
        channel, theirs = raw
        theirs.sendall(self.framed(channel, theirs, b"hello")[:cut])
        theirs.close()
        with pytest.raises(EOFError):
            channel.receive()

    def test_a_reset_connection_is_an_end(self, raw):
        channel, theirs = raw
        channel.send(b"never read")  # closing with this unread resets the connection
        theirs.close()
        assert ready(channel) == ([], False)
        with pytest.raises(BrokenPipeError):
            channel.send(b"more")

    def test_an_exception_at_any_step_of_reading_loses_no_message(self, pair):
        # Neither bytes nor descriptors, which would come with the next message.
        files = [os.memfd_create(f"file{n}") for n in range(2)]
        before = n_descriptors()
        step = 0
        messages = []

        def read():
            pair[1].read(max_reads=None)
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
            assert n_descriptors() == before
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

    def test_a_channel_can_be_waited_on(self, pair):
        assert pair[0].fileno() == pair[0]._socket.fileno() >= 0


class StartAndStop:
    """A task that returns the bounds of its ranges."""

    def start(self, worker):
        return lambda start, stop: [start, stop]


def test_the_messages_of_a_run_are_those_of_the_documented_example(monkeypatch):
    sent, came = [], []
    send, messages = MessageSocket.send, MessageSocket.messages

    def recorded_send(self, data, fds=None):
        sent.append((self, data, len(fds or [])))
        send(self, data, fds)

    def recorded_messages(self):
        for data, descriptors in messages(self):
            came.append((self, data))
            yield data, descriptors

    monkeypatch.setattr(MessageSocket, "send", recorded_send)
    monkeypatch.setattr(MessageSocket, "messages", recorded_messages)
    job = Job(StartAndStop(), Dynamic(), ChunkGrid(4, 2), 1)
    payload = pickle_task(job, Staging())
    pool = ProcessPool(1)
    try:
        pool.run(job, payload, lambda *_: None, None)
        channel = pool._workers[0].channel
    finally:
        pool.close()
        vars(pool).clear()  # pytest keeps it beyond the watch for leaks
    (start, n_descriptors), (order, _) = [rest for one, *rest in sent if one is channel]
    assert start == b""
    assert n_descriptors in {3, 4}  # without /proc, the parent's memory is not shared
    assert order == struct.pack("<?qII", False, 0, 0, 0) + payload.data
    *results, stats = [data for one, data in came if one is channel]
    assert {data[:1] for data in results} == {b"R"}
    parts = [part for data in results for part in pickle.loads(data[1:])]
    assert [(start, pickle.loads(packed), places) for start, packed, places in parts] == [
        (0, [0, 2], []),
        (2, [2, 4], []),
    ]
    assert stats[:2] == b"AF"
    (worker, ranges, items, busy_ns), *rest = pickle.loads(stats[2:])
    assert (worker, ranges, items, rest) == (0, 2, 4, [None, None, []])
    assert busy_ns > 0
