"""Shared memory without a name, and views of the arrays that lie in it.

Ownership. A `Segment` owns one file descriptor: of an anonymous memory file or, if a folder is
asked for, of a file in it that was unlinked as soon as it was made. Nothing else refers to the
memory, so nothing is left behind however a process ends. A `Mapping` is a segment mapped into this
process, and keeps its segment alive; an array over a mapping keeps the mapping alive. When the last
view of a result is deleted, so are its mapping and its descriptor.

Travel. `Staging` writes what a run needs into one segment. A `SharedView` says where an array lies,
and only that travels (the descriptors of its segments go beside it, see
`taskcarrier.workers.pickling`). `SharedView.open` maps it on the other side.

Segments only grow. The kernel guarantees that (a seal; `posix_fallocate` on disk), so no worker can
cut away pages that another has mapped.

Release. Workers keep segments mapped between calls (`taskcarrier.memory.mapping_cache`), so closing
the parent's descriptor would free nothing. Instead, as soon as nothing in the parent refers to a
segment, its pages are taken out of the memory file, for all processes. Then workers keep addresses
without memory.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import weakref
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np

from taskcarrier.memory.available import check_memory, explain_no_room, find_path
from taskcarrier.memory.memory_files import (
    OwnedMemory,
    create_memory_file,
    create_nameless_file,
    load_punch,
)
from taskcarrier.memory.strides import address_of, byte_bounds
from taskcarrier.system.descriptors import Descriptor, keep_standard_free
from taskcarrier.system.locks import ReentrantLock

Mode = Literal["read", "write", "private"]

_ACCESS = {
    "read": mmap.ACCESS_READ,  # the array cannot be made writable
    "write": mmap.ACCESS_WRITE,  # changes are seen by all processes
    "private": mmap.ACCESS_COPY,  # writable; changed pages are private
}
# Python 3.13 can map without keeping a duplicate of the descriptor.
_MMAP_OPTIONS: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}

# A segment of at most this size is recycled for any smaller one; arbitrary.
_SMALL_NBYTES = 1 << 20
# One pwrite moves at most 2 GiB.
_PWRITE_NBYTES = 1 << 30


class Mapping(mmap.mmap):
    """A segment mapped into this process; it keeps its ``segment`` alive."""

    segment: Segment
    private: bool


# Not a `WeakSet`: it would run Python code whenever a mapping is deleted, and a Ctrl-C that comes
# while a finalizer runs is lost. Entries of deleted mappings are removed at intervals.
_live: dict[int, weakref.ref[Mapping]] = {}
_numbers = count()
_SWEEP_INTERVAL = 64


def _register(mapping: Mapping) -> None:
    """Add a mapping to the live ones."""
    _live[next(_numbers)] = weakref.ref(mapping)
    if len(_live) % _SWEEP_INTERVAL == 0:
        for number, reference in _live.copy().items():
            if reference() is None:
                _live.pop(number, None)


n_forks = 0
"""The number of times that this process has forked; a child sees what was mapped then."""


def _retire_all() -> None:
    """Retire all mapped segments before a fork: the child shares them, so none may be recycled."""
    global n_forks  # noqa: PLW0603  # a fact about the process
    n_forks += 1
    for mapping in live_mappings():
        mapping.segment.retire()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_retire_all)


def live_mappings() -> list[Mapping]:
    """Return the mappings of this process that something refers to."""
    mappings = [reference() for reference in _live.copy().values()]
    return [mapping for mapping in mappings if mapping is not None]


def trim_files() -> None:
    """Unmap the pages of files that this process has read; they stay in the page cache.

    Otherwise, by the kernel's accounts, a worker that goes through a large file would hold as much
    memory as the file has bytes. Pages are mapped again when they are touched.
    """
    for mapping in live_mappings():
        if mapping.segment.on_disk and not mapping.private:
            mapping.madvise(mmap.MADV_DONTNEED)


def descriptors_are_scarce() -> bool:
    """Return whether mappings hold so many descriptors that results should be copied out of them.

    A mapping holds up to two. Mappings may take a quarter of what the process may open.
    """
    import resource  # noqa: PLC0415  # POSIX only

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft != resource.RLIM_INFINITY and 2 * len(live_mappings()) > soft // 4


_labels = count(1)


class Segment:
    """A piece of shared memory.

    Parameters
    ----------
    descriptor : Descriptor
        The descriptor of the memory; the segment closes it.
    on_disk : bool
        Whether the segment lies on a file system (and is reserved there), not in memory.
    nbytes : int
        The bytes that are known to be reserved.
    recycler : Recycler, optional
        The recycler that takes the descriptor when the segment is no longer used.
    label : int, optional
        In a worker: the parent's name for this segment; 0 if it is not to be kept mapped.

    Attributes
    ----------
    fd : int
        The number of the descriptor.
    is_lent : bool
        Whether workers are using it; then it is not recycled if the parent releases it.
    takes_writes : bool
        Whether a function that carries an array in it may write there, because the user has asked
        for shared memory. Else what a worker writes stays its own.
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
        """Create an empty segment, in memory or in a nameless file in `folder`."""
        if folder is not None:
            return cls(create_nameless_file(folder), on_disk=True, recycler=recycler)
        memory = OwnedMemory(create_memory_file(), 0, on_disk=False, label=0)
        return cls._adopt(memory, recycler)

    @classmethod
    def _adopt(cls, memory: OwnedMemory, recycler: Recycler | None) -> Segment:
        """Make a segment of memory that belongs to this process."""
        descriptor, nbytes, on_disk, label = memory
        segment = cls(descriptor, on_disk, nbytes, recycler, label)
        segment._maker = os.getpid()
        return segment

    @classmethod
    def take_over(cls, descriptor: Descriptor, on_disk: bool) -> Segment:
        """Make a segment of what another process has filled for this one, and has released."""
        nbytes = os.fstat(descriptor.fileno()).st_size
        return cls._adopt(OwnedMemory(descriptor, nbytes, on_disk, label=0), None)

    def get_label(self) -> int:
        """Return a label by which workers may keep this segment mapped; 0 if they may not.

        They may only keep memory that this process can take back. Files are never kept.
        """
        if self._maker == os.getpid() and not self.on_disk and not self.label:
            load_punch()
            self.label = next(_labels)
        return self.label

    def __del__(
        self,
        _getpid: Any = os.getpid,
        _memory: Any = OwnedMemory,
        _is_ending: Any = sys.is_finalizing,
    ) -> None:
        if not hasattr(self, "_maker"):  # `__init__` did not finish; the descriptor closes itself
            return
        label = self.label if self._maker == _getpid() else 0
        memory = _memory(self._descriptor, self.nbytes, self.on_disk, label)
        recycler = None if _is_ending() or self.is_lent else self._recycler
        if recycler is None or not recycler.take_back(memory):
            memory.release()

    def __reduce__(self) -> Any:
        # Only the pickler of a run can send a descriptor.
        raise TypeError("a segment can only be pickled as part of a run")

    def retire(self) -> None:
        """Never recycle this segment or its pages: another process still uses it."""
        self._recycler = None
        self._maker = 0
        self.label = 0

    def reserve(self, nbytes: int) -> None:
        """Reserve `nbytes` in all; several processes may do so at once.

        Raises
        ------
        OSError
            If the file system has no room (``ENOSPC``), or files may not be so large (``EFBIG``);
            with sizes.
        MemoryError
            If less memory is available than asked for; with sizes.
        """
        if nbytes > self.nbytes:
            # Another process may have reserved it already.
            self.nbytes = os.fstat(self.fd).st_size
        if nbytes <= self.nbytes:
            return
        if not self.on_disk:
            check_memory(nbytes - self.nbytes)
        with explain_no_room(self.fd, nbytes):
            if self.on_disk:
                os.posix_fallocate(self.fd, 0, nbytes)
            else:
                # The seal forbids shrinking: another worker has reserved more meanwhile.
                with contextlib.suppress(PermissionError):
                    os.ftruncate(self.fd, nbytes)
        self.nbytes = os.fstat(self.fd).st_size

    def map(self, mode: Mode) -> Mapping:
        """Map the reserved bytes. The segment must not be empty.

        Raise a `MemoryError` with sizes if there is no address space left for them.
        """
        try:
            with keep_standard_free():  # before Python 3.13, `mmap` duplicates the descriptor
                mapping = Mapping(self.fd, self.nbytes, access=_ACCESS[mode], **_MMAP_OPTIONS)
        except ValueError:
            size = os.fstat(self.fd).st_size
            if size < self.nbytes:  # it was cut off just now
                raise make_cut_off_error(
                    find_path(self.fd) or "shared memory", size, self.nbytes
                ) from None
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
        _register(mapping)
        return mapping

    def write(self, offset: int, block: memoryview) -> None:
        """Copy `block` to `offset`, by `pwrite`.

        For 256 MB of new memory that takes half the time of a copy through a mapping, which pays
        for each page when it is first touched.
        """
        written = 0
        while written < len(block):
            piece = block[written : written + _PWRITE_NBYTES]
            written += os.pwrite(self.fd, piece, offset + written)

    def read(self, begin: int, end: int) -> bytes:
        """Copy bytes that were written to the segment."""
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
    """Segments of finished runs that are kept for the next call, because their pages are warm.

    The first touch of new shared memory costs about ten times that of recycled memory. A recycler
    is bounded in number and bytes, and works only in the process that made it (a forked child
    would share the pages with its parent).

    Parameters
    ----------
    max_segments : int, default 4
        The maximum number of segments. A call uses two, a chain of calls three; the bound is
        arbitrary beyond that.
    max_nbytes : int, default 4 GiB
        The maximum number of bytes in all segments.
    """

    _free: list[OwnedMemory] = []  # noqa: RUF012  # if `__init__` did not finish
    _is_open = False
    _pid = 0

    def __init__(self, max_segments: int = 4, max_nbytes: int = 4 << 30) -> None:
        self._max_segments = max_segments
        self._max_nbytes = max_nbytes
        self._free: list[OwnedMemory] = []
        self._is_open = True
        # Reentrant: the garbage collector may free a segment while `segment` runs.
        self._lock = ReentrantLock()
        self._pid = os.getpid()

    def segment(self, nbytes: int, folder: str | None) -> Segment:
        """Return a segment for about `nbytes`, recycled if one fits."""
        on_disk = folder is not None
        max_nbytes = max(2 * nbytes, _SMALL_NBYTES)
        if self._pid == os.getpid():
            with self._lock:
                fitting = [
                    memory
                    for memory in self._free
                    if memory.on_disk == on_disk and nbytes <= memory.nbytes <= max_nbytes
                ]
                chosen = min(fitting, key=lambda memory: memory.nbytes, default=None)
                # It may be taken already: a finalizer may have begun a map in this thread just now.
                if chosen in self._free:
                    self._free.remove(chosen)
                    return Segment._adopt(chosen, recycler=self)
        return Segment.create(folder, recycler=self)

    def take_back(self, memory: OwnedMemory) -> bool:
        """Keep the memory of a segment that is no longer used; return False if there is no room."""
        if self._pid != os.getpid():  # a forked child must not even take the lock
            return False
        with self._lock:
            kept_nbytes = sum(other.nbytes for other in self._free)
            is_wanted = (
                self._is_open
                and memory.nbytes > 0
                and len(self._free) < self._max_segments
                and kept_nbytes + memory.nbytes <= self._max_nbytes
            )
            if is_wanted:
                self._free.append(memory)
            return is_wanted

    def close(self) -> None:
        """Release all segments, and keep none from now on."""
        is_ours = self._pid == os.getpid()
        with self._lock if is_ours else contextlib.nullcontext():
            self._is_open = False
            free, self._free = self._free, []
        for memory in free:
            (memory if is_ours else memory._replace(label=0)).release()

    def __del__(self, _is_ending: Any = sys.is_finalizing) -> None:
        if _is_ending():
            for memory in self._free:
                memory.release()
        else:
            self.close()


@dataclass(frozen=True)
class SharedView:
    """The place of an array in a segment, in a form that can travel.

    ``segment`` is None for an array without bytes.
    """

    segment: Segment | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    def open(self, mode: Mode) -> np.ndarray:
        """Map the segment, and return the array over that mapping."""
        if self.segment is None:
            array = np.empty(self.shape, self.dtype)
            array.flags.writeable = mode != "read"
            return array
        end = self.offset + self.dtype.itemsize
        end += sum(
            (n - 1) * step for n, step in zip(self.shape, self.strides, strict=True) if step > 0
        )
        if end > self.segment.nbytes:
            raise make_cut_off_error(
                find_path(self.segment.fd) or "shared memory", self.segment.nbytes, end
            )
        return self.map_over(self.segment.map(mode))

    def map_over(self, mapping: Mapping) -> np.ndarray:
        """Return the array over a given mapping of its segment."""
        return np.ndarray(self.shape, self.dtype, mapping, self.offset, self.strides)


def make_cut_off_error(path: str, size: int, end: int) -> ValueError:
    """Return the error for a file that is shorter than an array in it."""
    return ValueError(
        f"{path} was cut off: it has {size:,} bytes, but the array that maps it needs {end:,}"
    )


def memory_owner(array: np.ndarray) -> object:
    """Return the object that owns the memory of an array, behind all arrays and memoryviews."""
    owner: Any = array
    while True:
        if isinstance(owner, memoryview):
            owner = owner.obj
        # Bases of other types may never end. NumPy itself puts an object below views with strides.
        elif isinstance(owner, np.ndarray) or type(owner).__module__.startswith("numpy."):
            owner = getattr(owner, "base", None)
        else:
            return owner


def locate(array: np.ndarray) -> SharedView | None:
    """Return the view of an array over a mapping of this process; None if it lies elsewhere."""
    owner = memory_owner(array)
    if not isinstance(owner, Mapping) or owner.private or array.nbytes == 0:
        return None
    origin = address_of(np.frombuffer(owner, np.uint8))
    low, high = byte_bounds(array)
    if low < origin or high > origin + len(owner):
        return None
    offset = address_of(array) - origin
    return SharedView(owner.segment, offset, array.shape, array.strides, array.dtype)
