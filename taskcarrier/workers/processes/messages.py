"""Messages on a worker's socket, with file descriptors beside them."""

from __future__ import annotations

import array
import errno
import socket
import struct
from collections.abc import Iterator
from typing import Any

from taskcarrier.system.descriptors import Descriptor, keep_standard_free, own

_TOO_MANY = "too many open files for the shared arrays of this call"


# The kernel's limit for one message.
_MAX_DESCRIPTORS = 253


_FDS_SPACE = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4)


# The other end may be gone: an error, whatever the program does about SIGPIPE.
_FLAGS = socket.MSG_NOSIGNAL


# Plain numbers: what the module has are enumerations, which are slow.
_CLOEXEC, _DONTWAIT = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_DONTWAIT)


_CTRUNC = int(socket.MSG_CTRUNC)


# Before each message stand its length and the number of descriptors that come with it.
_HEADER = struct.Struct("<QI")


# Reads of a megabyte before what has come is looked at, so that one worker that sends without
# end does not keep the caller from the others.
_MAX_READS = 16


Message = tuple[bytes, list[Descriptor]]
"""Bytes, and the descriptors that came with them."""


class MessageSocket:
    """One end of a worker's socket: whole messages, with file descriptors beside them.

    Parameters
    ----------
    sock : socket.socket
        A connected stream socket; owned by the channel.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)  # the program may have set another default for its own sockets
        self._socket = sock
        self._received = bytearray()
        # What came last, until it is kept: an exception from outside may come before that is done.
        self._came: Any = ()
        self._descriptors: list[Descriptor] = []
        # Once descriptors are missing, nothing that comes is what it seems: they would go to the
        # wrong messages.
        self._is_torn = False

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end; the other end sees the end of the stream."""
        self._socket.close()
        if self._came:
            self._keep()
        self._descriptors = []

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """Send one message."""
        fds = fds or []
        message = memoryview(_HEADER.pack(len(data), len(fds)) + data)
        sent = 0
        if fds:  # they arrive with the first byte
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            sent = self._socket.sendmsg([message], [rights], _FLAGS)
        self._socket.sendall(message[sent:], _FLAGS)

    def receive(self) -> Message:
        """Wait for one message; `EOFError` when the other end is closed."""
        head = self._piece(_HEADER.size)
        if not head:
            raise EOFError
        self._received.clear()
        head += self._exactly(_HEADER.size - len(head))
        nbytes, n_descriptors = _HEADER.unpack(head)
        return self._exactly(nbytes), self._take(n_descriptors)

    def _piece(self, nbytes: int, flags: int = 0) -> bytes:
        """Take in bytes, and descriptors, that have come."""
        with keep_standard_free():
            # Received and kept in one step, by C: no exception from outside comes between.
            [self._came] = map(self._socket.recvmsg, (nbytes,), (_FDS_SPACE,), (flags | _CLOEXEC,))
        return self._keep()

    def _keep(self) -> bytes:
        """What has come, which from now on is among what was received."""
        data, ancillary, flags, _ = self._came
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        # Nor does any come here: there is no call.
        [descriptors, self._came] = map(list, (map(own, fds), ()))
        self._received += data
        self._descriptors += descriptors
        if flags & _CTRUNC:  # the kernel drops what a process may not open
            raise self._torn()
        return bytes(data)

    def _take(self, number: int) -> list[Descriptor]:
        """The descriptors of a message: the first that have come and were not taken."""
        if len(self._descriptors) < number:
            raise self._torn()
        first, self._descriptors = self._descriptors[:number], self._descriptors[number:]
        return first

    def _torn(self) -> OSError:
        self._is_torn = True
        return OSError(errno.EMFILE, _TOO_MANY)

    def _exactly(self, nbytes: int) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            piece = self._socket.recv(min(nbytes - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def read(self) -> bool:
        """Take in what has come so far, without waiting; whether more may come."""
        if self._is_torn:
            return False
        try:
            if self._came:
                self._keep()
            for _ in range(_MAX_READS):
                if not self._piece(1 << 20, _DONTWAIT):
                    return False
        except BlockingIOError:
            pass  # nothing more for now
        except ConnectionResetError:
            return False
        return True

    def messages(self) -> Iterator[Message]:
        """Whole messages that were read; one cut off by the sender's death is never among them."""
        while len(self._received) >= _HEADER.size and not self._is_torn:
            nbytes, n_descriptors = _HEADER.unpack_from(self._received)
            end = _HEADER.size + nbytes
            if len(self._received) < end:
                return
            data = bytes(self._received[_HEADER.size : end])
            # Its bytes and its descriptors go together: again there is no call.
            descriptors = self._descriptors[:n_descriptors]
            self._descriptors = self._descriptors[n_descriptors:]
            del self._received[:end]
            if len(descriptors) < n_descriptors:
                raise self._torn()
            yield data, descriptors
