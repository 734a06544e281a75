"""One process reads another's memory: the same bytes, or an error."""

import contextlib
import fcntl
import mmap
import os
import pickle
import socket
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier.memory import parent_memory
from taskcarrier.memory.parent_memory import attach, is_readable, open_own_memory, read
from taskcarrier.memory.segments import Segment
from taskcarrier.system.descriptors import make_owner
from tests.descriptors import n_descriptors_in_use
from tests.layouts import CACHE_LINE, address, byte_bounds

PAGE = mmap.PAGESIZE

READER = """
import os, pickle, sys
from taskcarrier.memory import parent_memory

fd, requests = pickle.load(sys.stdin.buffer)
parent_memory.attach(fd)
answers = []
for low, nbytes in requests:
    try:
        memory, begin = parent_memory.read(low, nbytes)
    except OSError as error:
        answers.append(repr(error))
    else:
        found = memory[begin : begin + nbytes].tobytes()
        answers.append((found, memory.ctypes.data + begin))
pickle.dump((os.getpid(), answers), sys.stdout.buffer)
"""

DYING = """
import ctypes, os, socket, sys
from taskcarrier.memory import parent_memory

text = ctypes.create_string_buffer(b"last words")
channel = socket.socket(fileno=int(sys.argv[1]))
low = ctypes.addressof(text)
memory = parent_memory.open_own_memory()
socket.send_fds(channel, [low.to_bytes(8, "little")], [memory.fileno()])
sys.stdin.read()
"""


def read_in_a_child(*requests):
    """Read this process from another: return bytes and their address there, or an error."""
    memory = open_own_memory()
    try:
        child = subprocess.run(
            [sys.executable, "-c", READER],
            input=pickle.dumps((memory.fileno(), requests)),
            stdout=subprocess.PIPE,
            pass_fds=[memory.fileno()],
            check=True,
            timeout=60,
        )
    finally:
        memory.close()
    pid, answers = pickle.loads(child.stdout)
    assert pid != os.getpid()
    return answers


@contextlib.contextmanager
def attached(memory):
    """Let this process read like a worker; close the descriptor in the end."""
    before = parent_memory._fd
    attach(memory.fileno())
    try:
        yield
    finally:
        attach(before)
        memory.close()


@contextlib.contextmanager
def end_of_memory():
    """Return a page of memory and the address of its end, after which no byte can be read."""
    segment = Segment(make_owner(os.memfd_create("end", os.MFD_CLOEXEC)), on_disk=False)
    os.ftruncate(segment.fd, 2 * PAGE)
    segment.reserve(2 * PAGE)
    page = np.frombuffer(segment.map("write"), np.uint8, PAGE)
    page[:] = np.arange(PAGE) % 251
    os.ftruncate(segment.fd, PAGE)  # what is mapped beyond is there no more
    yield page, address(page) + PAGE


def refuse(*_, **__):
    raise PermissionError(13, "no")


class TestOpenOwnMemory:
    def test_memory_is_opened_for_reading_only(self):
        memory = open_own_memory()
        victim = np.zeros(8, np.uint8)
        assert fcntl.fcntl(memory, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(memory.fileno(), b"x", address(victim))
        assert not victim.any()

    def test_memory_is_closed_when_a_program_is_executed(self):
        assert fcntl.fcntl(open_own_memory(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC

    def test_open_own_memory_is_none_without_the_file(self, monkeypatch, tmp_path):
        monkeypatch.setattr(parent_memory, "_PATH", str(tmp_path / "missing"))
        assert open_own_memory() is None

    def test_open_own_memory_is_none_if_it_is_forbidden(self, monkeypatch):
        monkeypatch.setattr(os, "open", refuse)
        assert open_own_memory() is None


class TestReadable:
    @pytest.mark.parametrize("nbytes", [1, 100, 1 << 20])
    def test_ordinary_arrays_are_readable(self, nbytes):
        assert is_readable(*byte_bounds(np.zeros(nbytes, np.uint8)))

    @pytest.mark.parametrize("mode", ["r", "r+", "c"])
    def test_mapped_files_are_readable(self, mode, tmp_path):
        np.zeros(100).tofile(tmp_path / "array")
        assert is_readable(*byte_bounds(np.memmap(tmp_path / "array", mode=mode)))

    @pytest.mark.parametrize("low", [0, PAGE // 2, (1 << 63) - PAGE])
    def test_unmapped_addresses_are_not_readable(self, low):
        assert not is_readable(low, low + 10)

    def test_both_ends_of_a_range_must_be_readable(self):
        with end_of_memory() as (page, end):
            assert is_readable(address(page), end)
            assert not is_readable(address(page), end + 1)
            assert not is_readable(end, end + 1)
            assert not is_readable(0, end)

    @pytest.mark.parametrize("why", ["missing", "forbidden"])
    def test_nothing_is_readable_if_memory_cannot_be_opened(self, why, monkeypatch, tmp_path):
        bounds = byte_bounds(np.zeros(10))
        assert is_readable(*bounds)
        if why == "missing":
            monkeypatch.setattr(parent_memory, "_PATH", str(tmp_path / "missing"))
        else:
            monkeypatch.setattr(os, "open", refuse)
        assert not is_readable(*bounds)

    def test_checking_readability_leaves_no_descriptor(self, monkeypatch):
        low, high = byte_bounds(np.zeros(10))
        before = n_descriptors_in_use()
        assert is_readable(low, high)
        assert not is_readable(0, high)
        assert not is_readable(low, (1 << 63) - PAGE)
        assert n_descriptors_in_use() == before


class TestReadInAChild:
    def test_a_child_reads_the_same_bytes_at_the_same_place_in_a_cache_line(self):
        memory = np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8)
        low, high = byte_bounds(memory)
        requests = [(low + skip, nbytes) for skip in range(70) for nbytes in (1, 63, 64, 1000)]
        requests += [(low, 3 << 20), (high - 1, 1), (low + 12345, 1 << 20)]
        answers = read_in_a_child(*requests)
        assert len(answers) == len(requests)
        for (start, nbytes), (found, place) in zip(requests, answers, strict=True):
            assert found == memory[start - low :][:nbytes].tobytes()
            assert place % CACHE_LINE == start % CACHE_LINE

    def test_a_child_reads_bytes_as_they_are_now(self):
        memory = np.zeros(100, np.uint8)
        memory[:] = np.arange(100)
        ((found, _),) = read_in_a_child((address(memory), 100))
        assert found == bytes(range(100))

    def test_reading_past_the_end_of_memory_is_an_error(self):
        with end_of_memory() as (page, end):
            inside, across, outside, nowhere = read_in_a_child(
                (end - 100, 100), (end - 100, 101), (end, 1), (PAGE // 2, 10)
            )
            assert inside[0] == page[-100:].tobytes()
        for answer in (across, outside, nowhere):
            assert isinstance(answer, str)
            assert answer.startswith("OSError")


class TestRead:
    def test_memory_that_was_read_is_private_and_of_bytes(self):
        array = np.arange(100, dtype=np.uint8)
        with attached(open_own_memory()):
            memory, begin = read(address(array), 100)
        assert memory.dtype == np.uint8
        assert memory.flags.owndata
        assert np.array_equal(memory[begin : begin + 100], array)
        memory[begin] = 77
        assert array[0] == 0

    @pytest.mark.parametrize("nbytes", [999, 1000, 1001, 5000])
    def test_memory_is_read_in_pieces(self, nbytes, monkeypatch):
        monkeypatch.setattr(parent_memory, "_READ_NBYTES", 1000)
        array = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
        with attached(open_own_memory()):
            memory, begin = read(address(array), nbytes)
        assert np.array_equal(memory[begin : begin + nbytes], array[:nbytes])

    def test_reading_continues_after_a_short_read(self, monkeypatch):
        preadv = os.preadv
        lengths = []

        def short(fd, buffers, offset):
            (block,) = buffers
            lengths.append(preadv(fd, [block[:777]], offset))
            return lengths[-1]

        monkeypatch.setattr(os, "preadv", short)
        array = np.random.default_rng(0).integers(0, 256, 2000, np.uint8)
        with attached(open_own_memory()):
            memory, begin = read(address(array), 2000)
        assert np.array_equal(memory[begin : begin + 2000], array)
        assert lengths == [777, 777, 446]

    @given(st.integers(0, 200), st.integers(0, 200))
    def test_any_range_is_read(self, start, nbytes):
        array = np.arange(400, dtype=np.uint16).view(np.uint8)
        with attached(open_own_memory()):
            memory, begin = read(address(array) + start, nbytes)
        assert memory[begin : begin + nbytes].tobytes() == array[start : start + nbytes].tobytes()
        assert (address(memory) + begin - address(array) - start) % CACHE_LINE == 0

    def test_reading_without_the_caller_s_memory_is_an_error(self):
        assert parent_memory._fd == -1
        with pytest.raises(OSError, match="Bad file descriptor"):
            read(address(np.zeros(10)), 10)

    def test_reading_from_a_process_that_has_ended_is_an_error(self):
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                child = subprocess.Popen(
                    [sys.executable, "-c", DYING, str(theirs.fileno())],
                    stdin=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                )
            message, (fd,), _, _ = socket.recv_fds(ours, 8, 1)
        low = int.from_bytes(message, "little")
        with attached(make_owner(fd)):
            memory, begin = read(low, 10)
            assert memory[begin : begin + 10].tobytes() == b"last words"
            child.communicate(timeout=60)
            assert child.returncode == 0
            with pytest.raises(OSError, match=f"the caller's memory ends at {low:#x}"):
                read(low, 10)
