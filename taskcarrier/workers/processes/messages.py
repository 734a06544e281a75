"""Messages with file descriptors on a worker's socket.

A message is a header of 12 bytes (``<QI``: the length of its content, and the number of descriptors
that come with its first byte), then the content. What the content means is written in
`taskcarrier.workers.processes.worker`.

An example: all messages of a new worker that runs the two chunks of four items, with a function
that returns ``[start, stop]``. (A pickle is shown as the object that it gives.)

======  ========================================  ================================================
to      content                                   meaning
======  ========================================  ================================================
worker  (nothing, with 4 descriptors)             its start: the ledger's words, counter and
                                                  set-once file, and the parent's memory
worker  ``00``                                    an order (``<?qII``): no batches follow,
        ``00 00 00 00 00 00 00 00``               it begins with chunk 0,
        ``00 00 00 00``                           pickled attempts take 0 bytes,
        ``00 00 00 00``                           and what only this worker gets, 0 bytes;
        ``80 04 95 ...``                          the payload: the pickled job, some 1,400 bytes
parent  ``R``                                     results:
        ``[(0, <pickle of [0, 2]>, []),``         the start of a chunk, its result, and where its
        ``(2, <pickle of [2, 4]>, [])]``          large arrays lie in the segment that comes along
parent  ``A F``                                   stats: the function holds on to no shared memory;
        ``((0, 2, 4, 25949), None, None, [])``    worker 0 ran 2 ranges, 4 items, in 25,949 ns;
                                                  the task's facts, its failure, its warnings
======  ========================================  ================================================

The results are two messages if the first chunk took some time. The worker then waits for the next
order, or for the end of the socket. In a stream the order begins with ``01``, batches follow it
(`pack_batch_order`), and a message without content is the last of them. If the caller begins the
run itself, an order names chunk -1: the worker answers ``Y`` when it has unpickled the payload, and
waits for a message that names the first chunk (``<q``), or, without content, calls the run off.
"""

from __future__ import annotations

import array
import errno
import socket
import struct
from collections.abc import Iterator
from itertools import count
from typing import Any

from taskcarrier.system.descriptors import Descriptor, keep_standard_free, make_owner

_TOO_MANY = "too many open files for the shared arrays of this call"


# The kernel allows no more in one message.
MAX_DESCRIPTORS = 253


_FDS_SPACE = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)


# If the other end is gone, sending raises, whatever the program does about SIGPIPE.
_FLAGS = socket.MSG_NOSIGNAL


# Plain numbers: the constants of the module are enumerations, which are slow.
_CLOEXEC, _DONTWAIT = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_DONTWAIT)


_CTRUNC = int(socket.MSG_CTRUNC)


# The header of a message: its length and the number of descriptors that come with it.
_HEADER = struct.Struct("<QI")


# The most bytes of a first read. After fewer, another read would most probably find none. (Memory
# for more is mapped and unmapped each time by the C library: `python -m bench empty`.)
_SHORT_NBYTES = 1 << 16
_LONG_NBYTES = 1 << 20

MAX_READS = 16
"""The number of reads, of up to a megabyte, after which the caller looks at its messages.

So a worker that sends without end does not keep it from the others.
"""


Message = tuple[bytes, list[Descriptor]]
"""The bytes of a message, and the descriptors that came with them."""


class MessageSocket:
    """One end of a worker's socket, for whole messages with file descriptors.

    Parameters
    ----------
    sock : socket.socket
        A connected stream socket. The `MessageSocket` owns it and closes it.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)  # the program may have set another default for its own sockets
        self._socket = sock
        self._received = bytearray()
        # The last result of `recvmsg` until `_keep` has stored it: an asynchronous exception may
        # come before that is done.
        self._last: Any = ()
        self._descriptors: list[Descriptor] = []
        # Whether descriptors are missing. Then no further message can be trusted: it would get the
        # descriptors of another.
        self._is_torn = False

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end, so that the other end sees the end of the stream."""
        self._socket.close()
        if self._last:
            self._keep()
        self._descriptors = []

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """Send one message; wait until the socket has taken all of it."""
        fds = fds or []
        message = memoryview(_HEADER.pack(len(data), len(fds)) + data)
        sent = 0
        if fds:  # they arrive with the first byte
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            sent = self._socket.sendmsg([message], [rights], _FLAGS)
        if sent < len(message):  # else the other end may have closed, where sending nothing fails
            self._socket.sendall(message[sent:], _FLAGS)

    def receive(self) -> Message:
        """Wait for one message and return it; raise `EOFError` when the other end is closed."""
        if self._last:
            self._keep()
        while (message := next(self.messages(), None)) is None:
            if self._is_torn or not self._receive_piece(_SHORT_NBYTES):
                raise EOFError
        return message

    def _receive_piece(self, nbytes: int, flags: int = 0) -> int:
        """Receive at most `nbytes` bytes, and descriptors; return the number of bytes."""
        with keep_standard_free():
            # Received and stored in one step, by C: no asynchronous exception can come between.
            [self._last] = map(self._socket.recvmsg, (nbytes,), (_FDS_SPACE,), (flags | _CLOEXEC,))
        return self._keep()

    def _keep(self) -> int:
        """Add what came last to what was received, and return the number of its bytes."""
        data, ancillary, flags, _ = self._last
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        # No asynchronous exception can come between these steps either: there is no call.
        [descriptors, self._last] = map(list, (map(make_owner, fds), ()))
        self._received += data
        self._descriptors += descriptors
        if flags & _CTRUNC:  # the kernel drops descriptors that are too many for this process
            raise self._mark_torn()
        return len(data)

    def _mark_torn(self) -> OSError:
        self._is_torn = True
        return OSError(errno.EMFILE, _TOO_MANY)

    def read(self, max_reads: int | None = MAX_READS) -> bool:
        """Receive what has come, without waiting; return whether more may come.

        It ends after a short read: what comes after it, the next call receives. With `max_reads`
        None it receives all that has come, as long as that may take.
        """
        if self._is_torn:
            return False
        try:
            if self._last:
                self._keep()
            nbytes = _SHORT_NBYTES
            for _ in count() if max_reads is None else range(max_reads):
                n_read = self._receive_piece(nbytes, _DONTWAIT)
                if not n_read:
                    return False
                if n_read < _SHORT_NBYTES and max_reads is not None:
                    break
                nbytes = _LONG_NBYTES
        except BlockingIOError:
            pass  # nothing more for now
        except ConnectionResetError:
            return False
        return True

    def next_kind(self) -> bytes:
        """Return the first byte of the next whole message that was read; nothing if none was."""
        if len(self._received) < _HEADER.size or self._is_torn:
            return b""
        nbytes, _ = _HEADER.unpack_from(self._received)
        if len(self._received) < _HEADER.size + nbytes:
            return b""
        return bytes(self._received[_HEADER.size : _HEADER.size + 1])

    def messages(self) -> Iterator[Message]:
        """Yield whole messages that were read, never one that the sender's death has cut off."""
        while len(self._received) >= _HEADER.size and not self._is_torn:
            nbytes, n_descriptors = _HEADER.unpack_from(self._received)
            end = _HEADER.size + nbytes
            if len(self._received) < end:
                return
            data = bytes(self._received[_HEADER.size : end])
            # Bytes and descriptors are removed together: again there is no call between.
            descriptors = self._descriptors[:n_descriptors]
            self._descriptors = self._descriptors[n_descriptors:]
            del self._received[:end]
            if len(descriptors) < n_descriptors:
                raise self._mark_torn()
            yield data, descriptors
