"""The end of a child process, by its own descriptor and by a thread that waits for it."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from taskcarrier.workers.processes.exits import ProcessExit, is_readable
from tests.clocks import LONG


def refuse(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(params=["pidfd", "not permitted", "not implemented", "absent", "no signals"])
def way(request, monkeypatch):
    """Select how the exit is watched, or which call fails."""
    if request.param == "absent":
        monkeypatch.delattr(os, "pidfd_open")
        monkeypatch.delattr(signal, "pidfd_send_signal")
    elif request.param == "no signals":
        monkeypatch.setattr(signal, "pidfd_send_signal", refuse(errno.ENOSYS))
    elif request.param != "pidfd":
        number = errno.EPERM if request.param == "not permitted" else errno.ENOSYS
        monkeypatch.setattr(os, "pidfd_open", refuse(number))
    return request.param


@pytest.fixture
def child():
    """A process that ends when its input does."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with process:
        yield process
        process.kill()


@pytest.mark.fault(50)
class TestProcessExit:
    def test_an_exit_is_seen_and_the_process_left_to_be_reaped(self, way, child):
        ending = ProcessExit(child.pid)
        assert not is_readable(ending.fd)
        assert not os.get_inheritable(ending.fd)
        child.communicate(b"\n", timeout=LONG)
        assert is_readable(ending.fd, LONG)
        assert child.returncode == 0
        ending.close()
        assert ending.fd == -1

    def test_an_exit_before_the_watch_is_seen(self, way, child):
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        ending = ProcessExit(child.pid)
        assert is_readable(ending.fd, LONG)
        ending.kill()
        assert child.wait(LONG) == 1
        ending.close()

    def test_a_process_is_killed(self, way, child):
        ending = ProcessExit(child.pid)
        ending.kill()
        assert is_readable(ending.fd, LONG)
        ending.kill()
        assert child.wait(LONG) == -signal.SIGKILL
        ending.kill()  # its number may be another's now
        ending.close()

    def test_a_forked_child_waits_for_no_exit(self, way, child):
        ending = ProcessExit(child.pid)
        pid = os.fork()
        if pid == 0:
            ending.drop_after_fork()
            os._exit(ending.fd == -1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        assert not is_readable(ending.fd)
        child.kill()
        child.wait(LONG)
        ending.close()

    def test_a_process_of_another_user_cannot_be_killed(self, way, child, monkeypatch):
        ending = ProcessExit(child.pid)
        monkeypatch.setattr(os, "kill", refuse(errno.EPERM))
        monkeypatch.setattr(signal, "pidfd_send_signal", refuse(errno.EPERM), raising=False)
        with pytest.raises(PermissionError):
            ending.kill()
        monkeypatch.undo()
        child.kill()
        child.wait(LONG)
        ending.close()


def test_a_thread_waits_only_without_pidfd(child):
    ending = ProcessExit(child.pid)
    assert not [one for one in threading.enumerate() if one.name == "taskcarrier-waiting"]
    child.kill()
    child.wait(LONG)
    ending.close()


def test_too_many_open_files_are_an_error(child, monkeypatch):
    monkeypatch.setattr(os, "pidfd_open", refuse(errno.EMFILE))
    with pytest.raises(OSError, match="Too many open files"):
        ProcessExit(child.pid)


class TestReadable:
    def test_a_descriptor_is_readable_once_there_is_something(self):
        read, write = os.pipe()
        assert not is_readable(read)
        assert not is_readable(read, 0.01)
        os.write(write, b"x")
        assert is_readable(read)
        os.close(read)
        os.close(write)

    def test_a_closed_descriptor_is_readable(self):
        one, other = socket.socketpair()
        with one:
            other.close()
            assert is_readable(one.fileno())

    def test_descriptors_beyond_the_range_of_select_are_watched(self):
        reader, writer = os.pipe()
        high = os.dup2(reader, 1500, inheritable=False)
        assert not is_readable(high)
        os.write(writer, b"x")
        assert is_readable(high)
        for fd in (reader, writer, high):
            os.close(fd)
