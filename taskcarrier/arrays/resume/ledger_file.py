"""The ledger that a run keeps beside its output, so that a later run can continue it.

The file ``Y.npy.ledger`` stands beside ``Y.npy.part`` until ``Y.npy`` is complete:

=====================  =========================================================================
bytes                  content
=====================  =========================================================================
first line             ``TaskCarrier ledger 2``
second line            one JSON object in ASCII: ``marks_at``, ``chunks``, and ``computes``:
                       everything that decides values (`taskcarrier.arrays.resume.computation`)
up to ``marks_at``     zeros; a multiple of 4096
``chunks`` more bytes  one for each chunk of the run: 1 if its result is in the output, any other
                       value if it is not
=====================  =========================================================================

A worker writes the result of a chunk to the output before it sets the chunk's mark. Both are in
files, so they outlive every process (but not a power cut, as no process waits for the disk). The
dtype and shape of the results are in the header of the ``.part`` file, which is written before the
first result. The ledger file gets its name only when its header is complete, so an incomplete one
is never found. If marks are torn or cut off, their chunks are run again.

Nothing here is pickled. A file is not opened through a link, nor if it belongs to another user.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import tempfile

import numpy as np

from taskcarrier.arrays.resume.computation import Computation
from taskcarrier.memory.available import explain_no_room
from taskcarrier.memory.npy import ledger_path, open_own_file
from taskcarrier.memory.segments import Segment, SharedView
from taskcarrier.scheduling.ledger import DONE, PENDING
from taskcarrier.system.descriptors import Descriptor, make_owner, open_owned

_FIRST_LINE = b"TaskCarrier ledger 2\n"
# Far more bytes than the names of any call need. A file with a longer header is not a ledger.
_MAX_HEADER = 1 << 26
# The bytes that `marks_at` itself may take in the header.
_PLACE_NBYTES = 64
_DESCRIPTORS = "/proc/self/fd/"


class LedgerFile:
    """The ledger file beside an output.

    Parameters
    ----------
    path : str
        The path of the finished output.
    n_chunks : int
        The number of chunks of the run.
    computation : Computation
        Everything that decides the values of the run.

    Attributes
    ----------
    notes : list of str
        Notes for the report.

    Raises
    ------
    ValueError
        If the file belongs to another computation. The message says what differs.
    BlockingIOError
        If another run is using the file.

    Warns
    -----
    UserWarning
        If some values cannot be compared, or only in samples.
    """

    def __init__(self, path: str, n_chunks: int, computation: Computation) -> None:
        self.path = ledger_path(path)
        self.notes = computation.notes()
        self._n_chunks = n_chunks
        self._computation = computation
        self._file, self.is_new = open_own_file(self.path, self._create)
        try:
            self._segment = self._check()
        except BaseException:
            self.close()
            raise

    @property
    def marks(self) -> SharedView:
        """The place of the marks in the file, one byte for each chunk."""
        n = self._n_chunks
        return SharedView(self._segment, self._marks_at, (n,), (1,), np.dtype(np.uint8))

    def begin(self, *, start_over: bool) -> int:
        """Reset the marks of unfinished chunks, or all if `start_over`; return the number left."""
        marks = self.marks.open("write")
        marks[slice(None) if start_over else marks != DONE] = PENDING
        return int(np.count_nonzero(marks))

    def remove(self) -> None:
        """Remove the file: the output is complete."""
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            os.unlink(self.path)

    def close(self) -> None:
        """Unlock and close the file, so that another run can use it.

        Workers may still have it open or mapped; that does not keep the lock.
        """
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def _create(self, path: str) -> Descriptor:
        """Create a file with a complete header and no marks, and give it its name in one step.

        That step raises a `FileExistsError` if another run has made such a file meanwhile.
        """
        header = {"chunks": self._n_chunks, "computes": self._computation.to_json()}
        marks_at = _round_to_pages(len(_FIRST_LINE) + len(json.dumps(header)) + _PLACE_NBYTES)
        text = json.dumps({"marks_at": marks_at, **header}).encode("ascii") + b"\n"
        content = (_FIRST_LINE + text).ljust(marks_at, b"\0")
        folder, file_name = os.path.split(path)
        folder_descriptor = open_owned(os.open, folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        file, name = _create_nameless_file(folder)
        try:
            end = len(content) + self._n_chunks
            with explain_no_room(file.fileno(), end):
                os.posix_fallocate(file.fileno(), 0, end)
            os.pwrite(file.fileno(), content, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
            # A link replaces no file. With a folder's descriptor given, Python follows the link in
            # /proc to the file.
            os.link(name, file_name, dst_dir_fd=folder_descriptor.fileno())
        finally:
            if not name.startswith(_DESCRIPTORS):
                os.unlink(name)
        return file

    def _check(self) -> Segment:
        """Return the file as a segment; raise `ValueError` if it is of another computation."""
        fd = self._file.fileno()
        self._marks_at, n_chunks, earlier = _read_header(fd, self.path)
        differing = self._computation.differences(earlier)
        differing += ["the number of ranges"] if n_chunks != self._n_chunks else []
        if differing:
            raise ValueError(
                f"{self.path} is of another computation; what differs: {', '.join(differing)}. To "
                "start over, remove it, or choose another out="
            )
        if not self.is_new:
            self.notes += self._computation.doubts(earlier)
        end = self._marks_at + self._n_chunks
        if os.fstat(fd).st_size < end:  # it was cut off: chunks without marks are run again
            with explain_no_room(fd, end):
                os.posix_fallocate(fd, 0, end)
        return Segment(open_owned(os.dup, fd), on_disk=True, nbytes=end)


def _create_nameless_file(folder: str) -> tuple[Descriptor, str]:
    """Create a file that only its owner can open; return it and the path to link it from.

    The file has no name until it is linked, so nothing is left behind however a run ends. It has a
    temporary name on file systems without nameless files, and where there is no /proc.
    """
    if not os.path.exists(_DESCRIPTORS):
        return _create_named_file(folder)
    try:
        file = open_owned(os.open, folder, os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:
            raise
        return _create_named_file(folder)
    return file, f"{_DESCRIPTORS}{file.fileno()}"


def _create_named_file(folder: str) -> tuple[Descriptor, str]:
    fd, name = tempfile.mkstemp(".new", ".ledger-", folder)
    return make_owner(fd), name


def _round_to_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _read_header(fd: int, path: str) -> tuple[int, int, Computation]:
    """Return where the marks begin, how many there are, and the computation of the file."""
    lines = os.pread(fd, _MAX_HEADER, 0).split(b"\n", 2)
    try:
        if lines[0] + b"\n" != _FIRST_LINE:
            raise ValueError("its first line is another")  # noqa: TRY301  # all errors leave below
        header = json.loads(lines[1])
        marks_at, n_chunks = header["marks_at"], header["chunks"]
        computation = Computation.from_json(header["computes"])
        if not (isinstance(marks_at, int) and isinstance(n_chunks, int) and marks_at > 0):
            raise TypeError("its numbers are none")  # noqa: TRY301  # likewise
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(
            f"{path} is no ledger of this version of TaskCarrier ({error}); remove it to start over"
        ) from None
    return marks_at, n_chunks, computation
