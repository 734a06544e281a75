"""Finding the file that a memmap really maps, so that workers can map it too.

A memmap is identified by its mapping as the kernel reports it, not by its own attributes: a view
has the attributes of its base, and the file may have been replaced. A memmap that cannot be
identified (private mappings, deleted or replaced files) is read like ordinary memory.
"""

from __future__ import annotations

import mmap
import os
import stat
from typing import Any

import numpy as np

from taskcarrier.memory.segments import (
    Mapping,
    Segment,
    SharedView,
    locate,
    make_cut_off_error,
    memory_owner,
)
from taskcarrier.memory.strides import address_of, byte_bounds
from taskcarrier.record import record
from taskcarrier.system.descriptors import Descriptor, keep_standard_free, open_owned

_MAPS = "/proc/self/maps"
# Where a pipe has the name of a file, opening it would wait for a writer.
_OPEN_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK


def find_shared(array: np.ndarray, *, writable: bool = False) -> SharedView | None:
    """Return where workers can map an array, in a segment or a file; None if it is in neither."""
    check_not_cut_off(array)
    return locate(array) or _find_in_file(array, writable=writable)


def find_writable(array: np.ndarray) -> SharedView | None:
    """Return where workers write to an array that the function carries, for the parent to see.

    The memory decides: workers write to memory of `empty`, `share` and `load`, and to files that
    are mapped for writing. Else None: what a worker writes to the array stays its own.

    Raises
    ------
    ValueError
        If the file cannot be opened for writing.
    """
    if not array.flags.writeable or array.nbytes == 0:
        return None
    view = locate(array)
    if view is not None:
        return view if view.segment is not None and view.segment.takes_writes else None
    if not _is_writable_file_mapping(array):
        return None
    view = _find_in_file(array, writable=True)
    if view is None:
        raise ValueError(
            f"func carries a memmap of shape {array.shape}, and its file cannot be opened for "
            "writing (permission has gone, or it has no name and is not open): what workers "
            "write to it would be lost. If func only reads it, set its flags.writeable = False"
        )
    return view


def check_not_cut_off(array: np.ndarray) -> None:
    """Raise a `ValueError` if an array lies over a file that was cut off after it was mapped.

    The kernel kills a process that touches the missing part (SIGBUS), or gives it zeros in the
    file's last page. Nothing stops the file from being cut off later.
    """
    owner = _find_owner(array)
    if owner is None or not array.nbytes:
        return
    if isinstance(owner, Mapping):
        if not owner.segment.on_disk:
            return
        size, offset = os.fstat(owner.segment.fd).st_size, 0
    else:
        try:
            size, offset = owner.size(), _get_offset_in_file(array)
        except (OSError, ValueError):  # the mapping has no descriptor of its own
            return
    begin = address_of(np.frombuffer(owner, np.uint8))
    low, high = byte_bounds(array)
    end = offset + high - begin
    if end <= size or not os.path.exists(_MAPS):
        return
    line = _read_lines(low, low + 1)[0]
    if size == 0 and _is_device(line.path):
        return
    if line.permissions[3] == "p":  # writes to the last page stay in this process
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    if end > size:
        raise make_cut_off_error(line.path, size, end)


def _is_device(path: str) -> bool:
    """Return whether the mapped file is not an ordinary one, and so reports no size."""
    try:
        # The kernel shows memory of /dev/zero as a deleted file.
        return not stat.S_ISREG(os.stat(path.removesuffix(" (deleted)")).st_mode)
    except OSError:
        return False


def _get_offset_in_file(array: np.ndarray) -> int:
    """Return where the mapping begins in its file, if a `numpy.memmap` knows it; else 0."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        if isinstance(owner, np.memmap) and hasattr(owner, "offset"):
            offset = int(owner.offset)
            return offset - offset % mmap.ALLOCATIONGRANULARITY
        owner = owner.base
    return 0


def sync_times(fd: int) -> bool:
    """Write a file back, and return whether its time of change now shows every later write.

    The kernel notes a change through a mapping when a clean page is first written to. So all dirty
    pages are written back, whichever process wrote to them. Pages of a file system in memory are
    never written back.
    """
    try:
        os.fsync(fd)
    except OSError:  # not every file system can
        return False
    return not _lies_in_memory(os.fstat(fd).st_dev)


def _lies_in_memory(device: int) -> bool:
    name = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return False
    file_systems = {mount[mount.index(b"-") + 1] for mount in mounts if mount[2] == name.encode()}
    return not file_systems.isdisjoint({b"tmpfs", b"ramfs", b"hugetlbfs", b"devtmpfs"})


def find_region(array: np.ndarray) -> tuple[object, int, int]:
    """Return the memory that a non-empty array covers: what it belongs to, begin and end.

    A file or segment is known by its device and inode, even if the mapping is private (pages that
    were not written to are those of the file), or the file was deleted after it was mapped.
    """
    low, high = byte_bounds(array)
    if _find_owner(array) is None or not os.path.exists(_MAPS):
        return "memory", low, high
    line = _read_lines(low, low + 1)[0]
    shift = line.offset - line.low
    return line.file, low + shift, high + shift


def identify_file(path: str) -> tuple[str, str] | None:
    """Return device and inode of a file as its mappings show them; None if it cannot be mapped."""
    try:
        file = open_owned(os.open, path, os.O_RDONLY | _OPEN_FLAGS)
        with mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ) as probe:
            return _identify_file(probe)
    except (OSError, ValueError):
        return None


@record
class _MapsLine:
    """One line of ``/proc/self/maps``: a mapping of this process."""

    low: int
    high: int
    permissions: str
    offset: int
    file: tuple[str, str]
    path: str

    @property
    def is_of_a_file(self) -> bool:
        """Whether a file is mapped, which may have lost its name, and not anonymous memory."""
        return self.path.startswith("/") and not self.path.startswith("/dev/zero (")


def _find_in_file(array: np.ndarray, *, writable: bool) -> SharedView | None:
    owner = _find_owner(array)
    if owner is None or isinstance(owner, Mapping) or array.nbytes == 0:
        return None
    if not os.path.exists(_MAPS):
        return None
    low, high = byte_bounds(array)
    lines = _read_lines(low, high)
    if not lines or lines[0].low > low or lines[-1].high < high:
        return None
    first = lines[0]
    shift = first.offset - first.low
    if not all(_continues(line, first, writable=writable) for line in lines):
        return None
    segment = _reopen(first, writable=writable)
    if segment is None or segment.nbytes < shift + high:
        return None
    offset = shift + address_of(array)
    return SharedView(segment, offset, array.shape, array.strides, array.dtype)


def _continues(line: _MapsLine, first: _MapsLine, *, writable: bool) -> bool:
    """Return whether a mapping is shared, and continues the first one in the same file."""
    return (
        (line.file, line.offset - line.low) == (first.file, first.offset - first.low)
        and line.permissions[3] == "s"
        and (not writable or line.permissions[1] == "w")
    )


def _is_writable_file_mapping(array: np.ndarray) -> bool:
    owner = _find_owner(array)
    if owner is None or isinstance(owner, Mapping) or not os.path.exists(_MAPS):
        return False
    lines = _read_lines(*byte_bounds(array))
    return all(
        line.permissions.startswith("rw") and line.permissions[3] == "s" and line.is_of_a_file
        for line in lines
    )


def _reopen(line: _MapsLine, *, writable: bool) -> Segment | None:
    """Open the file of a mapping again; return None if that is not possible."""
    access = os.O_RDWR if writable else os.O_RDONLY
    with keep_standard_free():
        descriptor = _open_by_name(line, access) or _find_open_descriptor(line, access)
    if descriptor is None:
        return None
    segment = Segment(descriptor, on_disk=True, nbytes=os.fstat(descriptor.fileno()).st_size)
    return segment if segment.nbytes else None


def _open_by_name(line: _MapsLine, access: int) -> Descriptor | None:
    if line.path.endswith(" (deleted)") or not line.path.startswith("/"):
        return None
    try:
        descriptor = open_owned(os.open, line.path, access | _OPEN_FLAGS)
    except OSError:
        return None
    return descriptor if _is_same_file(descriptor.fileno(), line) else None


def _find_open_descriptor(line: _MapsLine, access: int) -> Descriptor | None:
    """Duplicate a descriptor that this process has of the mapped file, which may be nameless.

    A `mmap` keeps such a descriptor, and so does `multiprocessing.shared_memory`.
    """
    import fcntl  # noqa: PLC0415  # POSIX only

    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if str(os.fstat(fd).st_ino) != line.file[1] or not _is_same_file(fd, line):
                continue
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE in {access, os.O_RDWR}:
                return open_owned(os.dup, fd)
        except (OSError, ValueError):  # closed meanwhile, or not a file that can be mapped
            continue
    return None


def _find_owner(array: np.ndarray) -> mmap.mmap | None:
    """Return the mapping that an array is a view of, or None."""
    owner = memory_owner(array)
    return owner if isinstance(owner, mmap.mmap) else None


def _is_same_file(fd: int, line: _MapsLine) -> bool:
    """Return whether a descriptor is of the file that a line shows, by mapping it too.

    Some file systems report other device numbers for a file than for mappings of it, so two
    mappings are compared.
    """
    if not os.fstat(fd).st_size:
        return False
    with mmap.mmap(fd, 1, access=mmap.ACCESS_READ) as probe:
        return _identify_file(probe) == line.file


def _identify_file(probe: mmap.mmap) -> tuple[str, str]:
    view = np.frombuffer(probe, np.uint8)
    low = address_of(view)
    del view
    return _read_lines(low, low + 1)[0].file


def _read_lines(low: int, high: int) -> list[_MapsLine]:
    """Return the mappings of this process that overlap with a range of addresses, in order."""
    overlapping = []
    # Paths may have any bytes; the kernel escapes only line feeds.
    with open(_MAPS, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            begin, _, end = line.partition(" ")[0].partition("-")
            if int(begin, 16) < high and int(end, 16) > low:
                overlapping.append(_parse_line(line))
    return overlapping


def _parse_line(line: str) -> _MapsLine:
    addresses, permissions, offset, device, inode, *rest = line.rstrip("\n").split(maxsplit=5)
    begin, _, end = addresses.partition("-")
    path = "".join(rest).replace("\\012", "\n")
    return _MapsLine(
        int(begin, 16), int(end, 16), permissions, int(offset, 16), (device, inode), path
    )
