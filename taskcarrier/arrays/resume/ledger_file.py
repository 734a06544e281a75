"""The ledger that a run keeps beside its output, so that another run can go on with it.

The file ``Y.npy.ledger`` stands beside ``Y.npy.part`` until ``Y.npy`` is complete:

=====================  =========================================================================
bytes                  what
=====================  =========================================================================
first line             ``TaskCarrier ledger 2``
second line            one JSON object in ASCII: ``marks_at``, ``chunks``, and under ``computes`` all
                       that decides values (`taskcarrier.arrays.resume.computation`)
up to ``marks_at``     zeros; a multiple of 4096
``chunks`` bytes more   one for each range of the run: 1 if its result is in the output, else
                       anything else
=====================  =========================================================================

A worker writes the result of a range to the output before it sets the range's mark. Both are in
files, so they outlive every process (though not a power cut, for nobody waits for the disk). What
results are like is in the header of the ``.part`` file, which is written before the first result.
The file has no name until its header is whole, so there is a whole one or none; of marks that are
torn or cut off, the ranges are run again.

Nothing here is pickled, and no file is opened through a link or that is somebody else's.
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
from taskcarrier.memory.available import room_for
from taskcarrier.memory.npy import busy, ledger_path, lock_file, open_own
from taskcarrier.memory.segments import Segment, SharedView
from taskcarrier.scheduling.ledger import DONE, PENDING
from taskcarrier.system.descriptors import Descriptor, open_owned, own

_FIRST_LINE = b"TaskCarrier ledger 2\n"
# Far more than the names of any call; a file that says more is none of ours.
_MAX_HEADER = 1 << 26
# What `marks_at` itself takes in the header.
_PLACE_NBYTES = 64
_DESCRIPTORS = "/proc/self/fd/"


class LedgerFile:
    """The ledger beside an output.

    Parameters
    ----------
    path : str
        Where the output is to be in the end.
    n_chunks : int
        Ranges of the run.
    computation : Computation
        All that decides values.

    Attributes
    ----------
    notes : list of str
        What the report should say.

    Raises
    ------
    ValueError
        If there is one of another computation; says what differs.
    BlockingIOError
        If another run is at work with it.

    Warns
    -----
    UserWarning
        Of what cannot be compared, or in samples only.
    """

    def __init__(self, path: str, n_chunks: int, computation: Computation) -> None:
        self.path = ledger_path(path)
        self.notes = computation.notes()
        self._n_chunks = n_chunks
        self._computation = computation
        try:
            self._file = open_own(self.path)
        except FileNotFoundError:
            self.is_new = True
            self._file = self._create()
        else:
            self.is_new = False
            lock_file(self._file, self.path)
        try:
            self._segment = self._check()
        except BaseException:
            self.close()
            raise

    @property
    def marks(self) -> SharedView:
        """Where the chunks are marked."""
        n = self._n_chunks
        return SharedView(self._segment, self._marks_at, (n,), (1,), np.dtype(np.uint8))

    def begin(self, *, anew: bool) -> int:
        """Have marks of finished ranges alone, or none at all; how many there are."""
        marks = self.marks.open("write")
        marks[slice(None) if anew else marks != DONE] = PENDING
        return int(np.count_nonzero(marks))

    def remove(self) -> None:
        """The output is complete."""
        with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
            os.unlink(self.path)

    def close(self) -> None:
        """Let another run go on with it, whoever else has it open: workers, and what is mapped."""
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def _create(self) -> Descriptor:
        """A new file with a whole header and no marks, put in place at once."""
        header = {"chunks": self._n_chunks, "computes": self._computation.to_json()}
        marks_at = _round_to_pages(len(_FIRST_LINE) + len(json.dumps(header)) + _PLACE_NBYTES)
        text = json.dumps({"marks_at": marks_at, **header}).encode("ascii") + b"\n"
        content = (_FIRST_LINE + text).ljust(marks_at, b"\0")
        folder, own_name = os.path.split(self.path)
        there = open_owned(os.open, folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        file, name = _nameless(folder)
        try:
            end = len(content) + self._n_chunks
            with room_for(file.fileno(), end):
                os.posix_fallocate(file.fileno(), 0, end)
            os.pwrite(file.fileno(), content, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
            # Not over one that another run has made meanwhile. Where a folder's descriptor is
            # given, the link in /proc is followed to the file.
            os.link(name, own_name, dst_dir_fd=there.fileno())
        except FileExistsError:
            raise busy(self.path) from None
        finally:
            if not name.startswith(_DESCRIPTORS):
                os.unlink(name)
        return file

    def _check(self) -> Segment:
        """The file as a segment, if it is of this computation."""
        fd = self._file.fileno()
        self._marks_at, n_chunks, earlier = _header_of(fd, self.path)
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
        if os.fstat(fd).st_size < end:  # it was cut off: those ranges are run again
            with room_for(fd, end):
                os.posix_fallocate(fd, 0, end)
        return Segment(open_owned(os.dup, fd), on_disk=True, nbytes=end)


def _nameless(folder: str) -> tuple[Descriptor, str]:
    """A new file that is its owner's alone, and by what it can be linked to its place.

    It has no name until then, so nothing is left of it however a run ends; but on file systems that
    know no such files, and where there is no /proc.
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
    return own(fd), name


def _round_to_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _header_of(fd: int, path: str) -> tuple[int, int, Computation]:
    """Where the marks begin, how many there are, and what was computed."""
    lines = os.pread(fd, _MAX_HEADER, 0).split(b"\n", 2)
    try:
        if lines[0] + b"\n" != _FIRST_LINE:
            raise ValueError("its first line is another")  # noqa: TRY301  # one way out for all
        found = json.loads(lines[1])
        marks_at, n_chunks = found["marks_at"], found["chunks"]
        computation = Computation.from_json(found["computes"])
        if not (isinstance(marks_at, int) and isinstance(n_chunks, int) and marks_at > 0):
            raise TypeError("its numbers are none")  # noqa: TRY301  # likewise
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(
            f"{path} is no ledger of this version of TaskCarrier ({error}); remove it to start over"
        ) from None
    return marks_at, n_chunks, computation
