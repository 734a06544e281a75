"""Worker processes that are none, and die at a chosen step."""

import os
import signal
import socket

from taskcarrier.workers.processes import messages
from taskcarrier.workers.processes.messages import MessageSocket
from taskcarrier.workers.processes.worker import RESULTS
from tests.errors import Killed

SIGKILL = -signal.SIGKILL


class Fate:
    """When a worker dies: before its step number `left`, and before all later ones."""

    def __init__(self, left=None):
        self.left = left

    def step(self):
        if self.left is not None:
            if self.left == 0:
                raise Killed
            self.left -= 1


class MortalMemory:
    """Memory that a worker writes to as long as it lives."""

    def __init__(self, memory, fate):
        self.memory = memory
        self.fate = fate

    def __getitem__(self, index):
        found = self.memory[index]
        return MortalMemory(found, self.fate) if isinstance(index, slice) else found

    def __setitem__(self, index, value):
        self.fate.step()
        self.memory[index] = value


class MortalCounter:
    """A worker may die before and after it takes a number."""

    def __init__(self, counter, fate):
        self.counter = counter
        self.fate = fate

    def advance(self):
        self.fate.step()
        number = self.counter.advance()
        self.fate.step()
        return number


class MortalSocket(MessageSocket):
    """A worker may die before, in the middle of and after a message."""

    def __init__(self, sock, fate):
        super().__init__(sock)
        self._fate = fate
        self.results = []  # of messages that have left as a whole

    def send(self, data, fds=None):
        whole = messages._HEADER.pack(len(data), len(fds or [])) + data
        self._fate.step()
        socket.send_fds(self._socket, [whole[: len(whole) // 2]], fds or [])
        self._fate.step()
        self._socket.sendall(whole[len(whole) // 2 :])
        if data[:1] == RESULTS:
            self.results.append(data)
        self._fate.step()


class Process:
    """Stands for a worker process; the test decides when it runs."""

    def __init__(self, number, name, fate):
        ours, theirs = socket.socketpair()
        self.number = number
        self.name = name
        self.fate = fate
        self.channel = MessageSocket(ours)
        self.inside = MortalSocket(theirs, fate)
        self.pidfd, self._end = os.pipe()
        self.n_kills = 0
        self.has_ended = False

    def kill(self):
        """Count the kill; the test decides when the death is seen, because signals take time."""
        self.n_kills += 1

    def end(self):
        self.inside.close()
        os.write(self._end, b"x")
        self.has_ended = True

    def reap(self):
        assert self.has_ended or self.n_kills
        self.close()
        return SIGKILL

    def close(self):
        self.inside.close()
        self.channel.close()
        for fd in (self.pidfd, self._end):
            os.close(fd)
        self.pidfd = -1
