"""Memmaps: which file they really map, so that workers can map it too.

A memmap is identified by its mapping, as the kernel tells it, and not by what the object says of
itself: the attributes of a view are those of its base, and the file may have been replaced. What
cannot be identified (private mappings, deleted or replaced files) is read like ordinary memory.
"""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskcarrier.memory.segments import Mapping, Segment, SharedView, cut_off, locate, memory_owner
from taskcarrier.memory.strides import address_of, byte_bounds
from taskcarrier.system.descriptors import Descriptor, keep_standard_free, open_owned

_MAPS = "/proc/self/maps"


def find_shared(array: np.ndarray, *, writable: bool = False) -> SharedView | None:
    """Where workers can map an array: in a segment or a file; None if it is in neither."""
    check_whole(array)
    return locate(array) or _find_in_file(array, writable=writable)


def find_writable(array: np.ndarray) -> SharedView | None:
    """Where a function that carries an array writes to it, so that the caller sees it.

    That is decided by the memory: of `empty`, `share` and `load`, or of a file that is mapped for
    writing. None if what workers write to the array stays their own.

    Raises
    ------
    ValueError
        If the file cannot be opened for that.
    """
    if not array.flags.writeable or array.nbytes == 0:
        return None
    view = locate(array)
    if view is not None:
        return view if view.segment is not None and view.segment.takes_writes else None
    if not _maps_a_file_for_writing(array):
        return None
    view = _find_in_file(array, writable=True)
    if view is None:
        raise ValueError(
            f"func carries a memmap of shape {array.shape}, and its file cannot be opened for "
            "writing (permission has gone, or it has no name and is not open): what workers "
            "write to it would be lost. If func only reads it, set its flags.writeable = False"
        )
    return view


def check_whole(array: np.ndarray) -> None:
    """A `ValueError` for an array over a file that was cut off since it was mapped.

    The kernel ends a process that looks at what is missing (SIGBUS), or gives it zeros in the
    file's last page. Nothing keeps a file from being cut off later.
    """
    owner = _owner(array)
    if owner is None or not array.nbytes:
        return
    if isinstance(owner, Mapping):
        if not owner.segment.on_disk:
            return
        size, offset = os.fstat(owner.segment.fd).st_size, 0
    else:
        try:
            size, offset = owner.size(), _offset_in_file(array)
        except (OSError, ValueError):  # it has no descriptor of its own
            return
    begin = address_of(np.frombuffer(owner, np.uint8))
    low, high = byte_bounds(array)
    end = offset + high - begin
    if end <= size or not os.path.exists(_MAPS):
        return
    line = _lines_over(low, low + 1)[0]
    if size == 0 and _is_device(line.path):
        return
    if line.permissions[3] == "p":  # what was written to in the last page is this process's own
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    if end > size:
        raise cut_off(line.path, size, end)


def _is_device(path: str) -> bool:
    """Whether what is mapped is no ordinary file, and so tells no size."""
    try:
        # Memory of /dev/zero is shown as a file that is gone.
        return not stat.S_ISREG(os.stat(path.removesuffix(" (deleted)")).st_mode)
    except OSError:
        return False


def _offset_in_file(array: np.ndarray) -> int:
    """Where the mapping begins in its file, as far as a `numpy.memmap` tells; else 0."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        if isinstance(owner, np.memmap) and hasattr(owner, "offset"):
            offset = int(owner.offset)
            return offset - offset % mmap.ALLOCATIONGRANULARITY
        owner = owner.base
    return 0


def sync_times(fd: int) -> bool:
    """Whether the time of change of a file tells, from now on, of all that is written to it.

    The kernel notes a change through a mapping when a clean page is first written to. So the pages
    are written back, whichever process wrote to them. Pages of a file system in memory never are.
    """
    try:
        os.fsync(fd)
    except OSError:  # a file system that cannot
        return False
    return not _lies_in_memory(os.fstat(fd).st_dev)


def _lies_in_memory(device: int) -> bool:
    name = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return False
    kinds = {mount[mount.index(b"-") + 1] for mount in mounts if mount[2] == name.encode()}
    return not kinds.isdisjoint({b"tmpfs", b"ramfs", b"hugetlbfs", b"devtmpfs"})


def region(array: np.ndarray) -> tuple[object, int, int]:
    """Which memory a non-empty array covers: whose, from, to.

    Files and segments have device and inode; also where the mapping is private (pages that were not
    written to are those of the file), or the file was deleted since.
    """
    low, high = byte_bounds(array)
    if _owner(array) is None or not os.path.exists(_MAPS):
        return "memory", low, high
    line = _lines_over(low, low + 1)[0]
    shift = line.offset - line.low
    return line.file, low + shift, high + shift


def file_of(path: str) -> tuple[str, str] | None:
    """Device and inode of a file as mappings of it have them; None if it cannot be mapped."""
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ) as probe,
        ):
            return _file_at(probe)
    except (OSError, ValueError):
        return None


@dataclass(frozen=True, eq=False)
class _Mapped:
    """One line of ``/proc/self/maps``."""

    low: int
    high: int
    permissions: str
    offset: int
    file: tuple[str, str]
    path: str

    @property
    def is_of_a_file(self) -> bool:
        """Whether it is of a file, which may have lost its name; anonymous memory is not."""
        return self.path.startswith("/") and not self.path.startswith("/dev/zero (")


def _find_in_file(array: np.ndarray, *, writable: bool) -> SharedView | None:
    owner = _owner(array)
    if owner is None or isinstance(owner, Mapping) or array.nbytes == 0:
        return None
    if not os.path.exists(_MAPS):
        return None
    low, high = byte_bounds(array)
    lines = _lines_over(low, high)
    if not lines or lines[0].low > low or lines[-1].high < high:
        return None
    first = lines[0]
    shift = first.offset - first.low
    if not all(_goes_on(line, first, writable=writable) for line in lines):
        return None
    segment = _reopen(first, writable=writable)
    if segment is None or segment.nbytes < shift + high:
        return None
    offset = shift + address_of(array)
    return SharedView(segment, offset, array.shape, array.strides, array.dtype)


def _goes_on(line: _Mapped, first: _Mapped, *, writable: bool) -> bool:
    """Whether a mapping is shared, and of the same stretch of the same file as the first one."""
    return (
        (line.file, line.offset - line.low) == (first.file, first.offset - first.low)
        and line.permissions[3] == "s"
        and (not writable or line.permissions[1] == "w")
    )


def _maps_a_file_for_writing(array: np.ndarray) -> bool:
    owner = _owner(array)
    if owner is None or isinstance(owner, Mapping) or not os.path.exists(_MAPS):
        return False
    lines = _lines_over(*byte_bounds(array))
    return all(
        line.permissions.startswith("rw") and line.permissions[3] == "s" and line.is_of_a_file
        for line in lines
    )


def _reopen(line: _Mapped, *, writable: bool) -> Segment | None:
    """The file of a mapping, opened again; None if that cannot be."""
    access = os.O_RDWR if writable else os.O_RDONLY
    with keep_standard_free():
        descriptor = _open_by_name(line, access) or _find_open_descriptor(line, access)
    if descriptor is None:
        return None
    segment = Segment(descriptor, on_disk=True, nbytes=os.fstat(descriptor.fileno()).st_size)
    return segment if segment.nbytes else None


def _open_by_name(line: _Mapped, access: int) -> Descriptor | None:
    if line.path.endswith(" (deleted)") or not line.path.startswith("/"):
        return None
    try:
        descriptor = open_owned(os.open, line.path, access | os.O_CLOEXEC)
    except OSError:
        return None
    return descriptor if _is_same(descriptor.fileno(), line) else None


def _find_open_descriptor(line: _Mapped, access: int) -> Descriptor | None:
    """A duplicate of a descriptor of this process: of a file that has lost its name, say.

    A `mmap` keeps one, and so does `multiprocessing.shared_memory`.
    """
    import fcntl  # noqa: PLC0415  # POSIX only

    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if str(os.fstat(fd).st_ino) != line.file[1] or not _is_same(fd, line):
                continue
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE in {access, os.O_RDWR}:
                return open_owned(os.dup, fd)
        except (OSError, ValueError):  # closed meanwhile, or nothing that can be mapped
            continue
    return None


def _owner(array: np.ndarray) -> mmap.mmap | None:
    """The mapping that an array is a view of."""
    owner = memory_owner(array)
    return owner if isinstance(owner, mmap.mmap) else None


def _is_same(fd: int, line: _Mapped) -> bool:
    """Whether a descriptor is of the file that is mapped there, by mapping it too.

    Some file systems tell other device numbers for a file than for mappings of it, so two mappings
    are compared.
    """
    if not os.fstat(fd).st_size:
        return False
    with mmap.mmap(fd, 1, access=mmap.ACCESS_READ) as probe:
        return _file_at(probe) == line.file


def _file_at(probe: mmap.mmap) -> tuple[str, str]:
    view = np.frombuffer(probe, np.uint8)
    low = address_of(view)
    del view
    return _lines_over(low, low + 1)[0].file


def _lines_over(low: int, high: int) -> list[_Mapped]:
    """The mappings of this process that overlap with a range of addresses, in order."""
    found = []
    # Paths may have any bytes; the kernel escapes line feeds only.
    with open(_MAPS, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            begin, _, end = line.partition(" ")[0].partition("-")
            if int(begin, 16) < high and int(end, 16) > low:
                found.append(_parse_line(line))
    return found


def _parse_line(line: str) -> _Mapped:
    addresses, permissions, offset, device, inode, *rest = line.rstrip("\n").split(maxsplit=5)
    begin, _, end = addresses.partition("-")
    path = "".join(rest).replace("\\012", "\n")
    return _Mapped(
        int(begin, 16), int(end, 16), permissions, int(offset, 16), (device, inode), path
    )
