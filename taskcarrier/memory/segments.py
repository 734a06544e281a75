"""Shared memory without a name, and descriptors of the arrays that live in it.

Who owns what. A `Segment` owns one file descriptor: of an anonymous memory file, or, when a
folder is asked for, of a file in it that was unlinked as soon as it was made. Nothing else
refers to the memory, so nothing is left behind however a process ends. A `Mapping` is a
segment mapped into this process and keeps its segment; an array over a mapping keeps the
mapping. When the last view of a result dies, its mapping and descriptor go with it.

Which way the data goes. `Staging` writes what a run needs into one segment; a `SharedView`
says where an array lies and is all that travels (the descriptors of its segments go beside
it, see `taskcarrier.workers.pickling`); `SharedView.open` maps it on the other side.

Segments only ever grow, by the kernel's own rule (a seal; `posix_fallocate` on disk), so no
worker can cut away pages that another has mapped.

When memory is given back. Workers keep segments mapped from one call to the next
(`taskcarrier.memory.mapping_cache`), so closing the caller's descriptor would free nothing. Its pages are
taken out of the memory file instead, for everybody, as soon as nothing of the caller refers to it:
what workers keep then are addresses without memory.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import sys
import threading
import weakref
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np

from taskcarrier.memory.available import check_memory, name_of_file, room_for
from taskcarrier.memory.strides import (
    address_of,
    byte_bounds,
)
from taskcarrier.system.descriptors import Descriptor, keep_standard_free, open_owned, own
from taskcarrier.system.interrupts import run_sheltered

Mode = Literal["read", "write", "private"]

_ACCESS = {
    "read": mmap.ACCESS_READ,  # the array cannot be made writable
    "write": mmap.ACCESS_WRITE,  # seen by all
    "private": mmap.ACCESS_COPY,  # writable, changed pages are the writer's own
}
# Python 3.13 can map without keeping a duplicate of the descriptor.
_MMAP_OPTIONS: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}

# A segment of less is recycled for whatever fits into it; arbitrary.
_SMALL_NBYTES = 1 << 20
# One pwrite moves 2 GiB at most.
_PWRITE_NBYTES = 1 << 30


class Mapping(mmap.mmap):
    """A segment mapped into this process; ``segment`` is kept as long as the mapping lives."""

    segment: Segment
    private: bool


# No `WeakSet`: it is told of every mapping that goes, by Python code, and Ctrl-C that comes while a
# finalizer runs is lost. Entries of mappings that are gone are thrown out when there are many.
_live: dict[int, weakref.ref[Mapping]] = {}
_numbers = count()
_MOST_GONE = 64


def _enter(mapping: Mapping) -> None:
    """Have a mapping among those that live."""
    _live[next(_numbers)] = weakref.ref(mapping)
    if len(_live) % _MOST_GONE == 0:
        for number, reference in _live.copy().items():
            if reference() is None:
                _live.pop(number, None)


n_forks = 0
"""How often this process has been forked: children see what was mapped then."""


def _retire_all() -> None:
    """A forked child will share what is mapped now: it must not be recycled under its eyes."""
    global n_forks  # noqa: PLW0603  # a fact about the process
    n_forks += 1
    for mapping in live_mappings():
        mapping.segment.retire()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_retire_all)


def live_mappings() -> list[Mapping]:
    """The mappings of this process that something refers to."""
    found = [reference() for reference in _live.copy().values()]
    return [mapping for mapping in found if mapping is not None]


def trim_files() -> None:
    """Unmap the pages of files that this process has looked at; they stay in the page cache.

    A worker that goes through a large file would otherwise hold as much memory as the file has, as
    far as the kernel's accounts tell. Pages are mapped again when they are touched.
    """
    for mapping in live_mappings():
        if mapping.segment.on_disk and not mapping.private:
            mapping.madvise(mmap.MADV_DONTNEED)


def descriptors_are_scarce() -> bool:
    """Whether mappings hold so many descriptors that results should be copied out of them.

    A mapping holds up to two; a quarter of what the process may open is ours at most.
    """
    import resource  # noqa: PLC0415  # POSIX only

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft != resource.RLIM_INFINITY and 2 * len(live_mappings()) > soft // 4


_labels = count(1)

# The kernel's words for taking pages out of a file.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
# `fallocate`, which needs neither a mapping nor a descriptor more; loaded with the first label.
_punch: Any = None


def _load_punch() -> None:
    global _punch  # noqa: PLW0603  # once
    if _punch is None:
        import ctypes  # noqa: PLC0415  # takes 3 ms, and only runs need it

        _punch = ctypes.CDLL(None).fallocate
        _punch.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class _Memory(NamedTuple):
    """What a segment owns: a descriptor, and what has to be known to let go of it."""

    descriptor: Descriptor
    nbytes: int
    on_disk: bool
    label: int

    # What is called when the interpreter ends is bound here: names of the module are gone then.
    def let_go(self, _size: Any = os.fstat, _ending: Any = sys.is_finalizing) -> None:
        """Close the descriptor; of memory that others may have mapped, take the pages out."""
        if self.label and _punch is not None and not _ending():
            fd = self.descriptor.fileno()
            whole_pages = -(-_size(fd).st_size // mmap.PAGESIZE) * mmap.PAGESIZE
            _punch(fd, _KEEP_SIZE | _PUNCH_HOLE, 0, whole_pages)
        self.descriptor.close()


class Segment:
    """A piece of shared memory.

    Parameters
    ----------
    descriptor : Descriptor
        Of the memory; the segment closes it.
    on_disk : bool
        Whether it lies on a file system (and is reserved there) or in memory.
    nbytes : int
        Bytes known to be reserved.
    recycler : Recycler, optional
        Where the descriptor goes when the segment is no longer used, instead of being closed.
    label : int, optional
        In a worker: what the caller calls this segment; 0 if it is not to be kept mapped.

    Attributes
    ----------
    fd : int
        The number of the descriptor.
    is_lent : bool
        Whether workers have it: then it is not recycled, should the caller let go of it.
    takes_writes : bool
        Whether a function that carries an array in it may write there: the user has asked for
        memory that is shared. Else what a worker writes stays its own.
    """

    __slots__ = (
        "_descriptor",
        "_maker",
        "_recycler",
        "fd",
        "is_lent",
        "label",
        "nbytes",
        "on_disk",
        "takes_writes",
    )

    def __init__(
        self,
        descriptor: Descriptor,
        on_disk: bool,
        nbytes: int = 0,
        recycler: Recycler | None = None,
        label: int = 0,
    ) -> None:
        self._descriptor = descriptor
        self.fd = descriptor.fileno()
        self.is_lent = False
        self.on_disk = on_disk
        self.nbytes = nbytes
        self.label = label
        self.takes_writes = False
        self._recycler = recycler
        self._maker = 0  # the process that may take the pages out, if any

    @classmethod
    def create(cls, folder: str | None = None, recycler: Recycler | None = None) -> Segment:
        """An empty segment, in memory or in a file without a name in `folder`."""
        if folder is not None:
            return cls(_nameless_file(folder), on_disk=True, recycler=recycler)
        import fcntl  # noqa: PLC0415  # POSIX only

        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        descriptor = open_owned(os.memfd_create, "taskcarrier", flags)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return cls._adopt(_Memory(descriptor, 0, on_disk=False, label=0), recycler)

    @classmethod
    def _adopt(cls, memory: _Memory, recycler: Recycler | None) -> Segment:
        descriptor, nbytes, on_disk, label = memory
        segment = cls(descriptor, on_disk, nbytes, recycler, label)
        segment._maker = os.getpid()
        return segment

    @classmethod
    def take_over(cls, descriptor: Descriptor, on_disk: bool) -> Segment:
        """What another process has made and filled for this one, and knows no more."""
        nbytes = os.fstat(descriptor.fileno()).st_size
        return cls._adopt(_Memory(descriptor, nbytes, on_disk, label=0), None)

    def get_label(self) -> int:
        """What workers are to call this segment, so that they may keep it mapped; 0 if not.

        Only memory that is this process's own to take back: files are let go of at once.
        """
        if self._maker == os.getpid() and not self.on_disk and not self.label:
            _load_punch()
            self.label = next(_labels)
        return self.label

    def __del__(
        self, _getpid: Any = os.getpid, _memory: Any = _Memory, _ending: Any = sys.is_finalizing
    ) -> None:
        if not hasattr(self, "_maker"):  # not made to the end; the descriptor closes by itself
            return
        label = self.label if self._maker == _getpid() else 0
        memory = _memory(self._descriptor, self.nbytes, self.on_disk, label)
        recycler = None if _ending() or self.is_lent else self._recycler
        if recycler is None or not recycler.take_back(memory):
            memory.let_go()

    def __reduce__(self) -> Any:
        # Whoever packs a run knows how to send a descriptor; nobody else can.
        raise TypeError("a segment can only be pickled as part of a run")

    def retire(self) -> None:
        """Never recycle this segment or its pages: somebody else still looks at it."""
        self._recycler = None
        self._maker = 0
        self.label = 0

    def reserve(self, nbytes: int) -> None:
        """Make room for `nbytes`; several processes may do so at once.

        Raises
        ------
        OSError
            The file system has no room (``ENOSPC``), or files may not be so large (``EFBIG``), with
            sizes.
        MemoryError
            In memory: less is available than asked for, with sizes.
        """
        if nbytes > self.nbytes:
            # Another process may have reserved it already.
            self.nbytes = os.fstat(self.fd).st_size
        if nbytes <= self.nbytes:
            return
        if not self.on_disk:
            check_memory(nbytes - self.nbytes)
        with room_for(self.fd, nbytes):
            if self.on_disk:
                os.posix_fallocate(self.fd, 0, nbytes)
            else:
                # The seal refuses to shrink: another worker has reserved more meanwhile.
                with contextlib.suppress(PermissionError):
                    os.ftruncate(self.fd, nbytes)
        self.nbytes = os.fstat(self.fd).st_size

    def map(self, mode: Mode) -> Mapping:
        """The reserved bytes, mapped. The segment must not be empty.

        `MemoryError` with sizes where no address space is left for them.
        """
        try:
            with keep_standard_free():  # before Python 3.13 it keeps a duplicate of the descriptor
                mapping = Mapping(self.fd, self.nbytes, access=_ACCESS[mode], **_MMAP_OPTIONS)
        except ValueError:
            size = os.fstat(self.fd).st_size
            if size < self.nbytes:  # just now
                raise cut_off(name_of_file(self.fd) or "shared memory", size, self.nbytes) from None
            raise
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise MemoryError(
                f"{self.nbytes:,} bytes of shared memory cannot be mapped: this process may have "
                "no more address space (RLIMIT_AS, `ulimit -v`) or mappings (vm.max_map_count)"
            ) from None
        mapping.segment = self
        mapping.private = mode == "private"
        _enter(mapping)
        return mapping

    def write(self, offset: int, block: memoryview) -> None:
        """Copy `block` to `offset`.

        By `pwrite`: a fresh 256 MB takes half the time of a copy through a mapping, which
        pays for each page when it is first touched.
        """
        written = 0
        while written < len(block):
            piece = block[written : written + _PWRITE_NBYTES]
            written += os.pwrite(self.fd, piece, offset + written)

    def read(self, begin: int, end: int) -> bytes:
        """A copy of bytes that were written."""
        block = b""
        while begin + len(block) < end:
            piece = os.pread(self.fd, end - begin - len(block), begin + len(block))
            if not piece:
                raise EOFError(
                    f"a segment ends at byte {begin + len(block):,}, before byte {end:,} of what "
                    "was written to it: the file was cut off"
                )
            block += piece
        return block


class Recycler:
    """Segments that are free again, kept for the next call: their pages are warm.

    The first touch of fresh shared memory costs about ten times that of recycled memory.
    Bounded in number and bytes; only for the process that made it (a forked child would
    share the pages with its parent).

    Parameters
    ----------
    max_segments : int, default 4
        A call uses two, a chain of calls three; the bound is arbitrary beyond that.
    max_nbytes : int, default 4 GiB
        Bytes kept in all.
    """

    _free: list[_Memory] = []  # noqa: RUF012  # of one that was not made to the end
    _open = False
    _pid = 0

    def __init__(self, max_segments: int = 4, max_nbytes: int = 4 << 30) -> None:
        self._max_segments = max_segments
        self._max_nbytes = max_nbytes
        self._free: list[_Memory] = []
        self._open = True
        # Reentrant: a segment may be freed by the garbage collector inside `segment`.
        self._lock = threading.RLock()
        self._pid = os.getpid()

    def segment(self, nbytes: int, folder: str | None) -> Segment:
        """A segment for about `nbytes`, recycled if one fits."""
        on_disk = folder is not None
        most = max(2 * nbytes, _SMALL_NBYTES)
        if self._pid == os.getpid():
            with self._lock:
                fits = [
                    kept
                    for kept in self._free
                    if kept.on_disk == on_disk and nbytes <= kept.nbytes <= most
                ]
                chosen = min(fits, key=lambda kept: kept.nbytes, default=None)
                # It may be gone: a finalizer may have begun a map in this thread just now.
                if chosen in self._free:
                    self._free.remove(chosen)
                    return Segment._adopt(chosen, recycler=self)
        return Segment.create(folder, recycler=self)

    def take_back(self, memory: _Memory) -> bool:
        """Keep the memory of a segment that is no longer used; False if it is not wanted."""
        if self._pid != os.getpid():  # not even the lock is ours in a forked child
            return False
        with self._lock:
            kept = sum(other.nbytes for other in self._free)
            wanted = (
                self._open
                and memory.nbytes > 0
                and len(self._free) < self._max_segments
                and kept + memory.nbytes <= self._max_nbytes
            )
            if wanted:
                self._free.append(memory)
            return wanted

    def close(self) -> None:
        """Let go of everything, now and from now on."""
        ours = self._pid == os.getpid()
        with self._lock if ours else contextlib.nullcontext():
            self._open = False
            free, self._free = self._free, []
        for memory in free:
            (memory if ours else memory._replace(label=0)).let_go()

    def __del__(self, _ending: Any = sys.is_finalizing) -> None:
        if _ending():
            for memory in self._free:
                memory.let_go()
        else:
            self.close()


@dataclass(frozen=True)
class SharedView:
    """Where an array lies in a segment: all that travels of it.

    ``segment`` is None for an array without bytes.
    """

    segment: Segment | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    def open(self, mode: Mode) -> np.ndarray:
        """The array, over a mapping of its own."""
        if self.segment is None:
            array = np.empty(self.shape, self.dtype)
            array.flags.writeable = mode != "read"
            return array
        end = self.offset + self.dtype.itemsize
        end += sum(
            (n - 1) * step for n, step in zip(self.shape, self.strides, strict=True) if step > 0
        )
        if end > self.segment.nbytes:
            raise cut_off(
                name_of_file(self.segment.fd) or "shared memory", self.segment.nbytes, end
            )
        return self.map_over(self.segment.map(mode))

    def map_over(self, mapping: Mapping) -> np.ndarray:
        """The array over a mapping of its segment."""
        return np.ndarray(self.shape, self.dtype, mapping, self.offset, self.strides)


def cut_off(path: str, size: int, end: int) -> ValueError:
    """The error for a file that is shorter than an array in it."""
    return ValueError(
        f"{path} was cut off: it has {size:,} bytes, but the array that maps it needs {end:,}"
    )


def memory_owner(array: np.ndarray) -> object:
    """What an array is a view of in the end, through arrays and memoryviews."""
    owner: Any = array
    while True:
        if isinstance(owner, memoryview):
            owner = owner.obj
        # Others have a base without end. NumPy itself puts an object below views with strides.
        elif isinstance(owner, np.ndarray) or type(owner).__module__.startswith("numpy."):
            owner = getattr(owner, "base", None)
        else:
            return owner


def locate(array: np.ndarray) -> SharedView | None:
    """The descriptor of an array over a mapping of this process; None if it is elsewhere."""
    owner = memory_owner(array)
    if not isinstance(owner, Mapping) or owner.private or array.nbytes == 0:
        return None
    origin = address_of(np.frombuffer(owner, np.uint8))
    low, high = byte_bounds(array)
    if low < origin or high > origin + len(owner):
        return None
    offset = address_of(array) - origin
    return SharedView(owner.segment, offset, array.shape, array.strides, array.dtype)


def _nameless_file(folder: str) -> Descriptor:
    """A new file, readable by its owner alone, that has no name from the start or at once."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            errno.ENOENT, "temp_folder must be an existing folder", os.fspath(folder)
        )
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return open_owned(os.open, folder, flags | os.O_TMPFILE, stat.S_IRUSR | stat.S_IWUSR)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:
            raise
    import tempfile  # noqa: PLC0415  # only on file systems without O_TMPFILE

    def create_file() -> Descriptor:
        with keep_standard_free():
            fd, path = tempfile.mkstemp(prefix="taskcarrier-", dir=folder)
        os.unlink(path)
        return own(fd)

    return run_sheltered(create_file)
