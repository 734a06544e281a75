"""Arrays in files: what a memmap really maps, and ``.npy`` files read and written in place.

A memmap is identified by its mapping, as the kernel tells it, and not by what the object says of
itself: the attributes of a view are those of its base, and the file may have been replaced. What
cannot be identified (private mappings, deleted or replaced files) is read like ordinary memory.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import re
import stat
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from taskcarrier.layout import address_of, byte_bounds, contiguous_strides
from taskcarrier.segments import Mapping, Segment, SharedView, locate

_MAPS = "/proc/self/maps"


def located(array: np.ndarray, *, writable: bool = False) -> SharedView | None:
    """Where workers can map an array: in a segment or a file; None if it is in neither."""
    return locate(array) or _in_file(array, writable=writable)


def region(array: np.ndarray) -> tuple[object, int, int]:
    """Which memory a non-empty array covers: whose, from, to. Files and segments by their inode."""
    low, high = byte_bounds(array)
    view = located(array)
    if view is None or view.segment is None:
        return "memory", low, high
    status = os.fstat(view.segment.fd)
    shift = view.offset - address_of(array)
    return (status.st_dev, status.st_ino), low + shift, high + shift


@dataclass(frozen=True)
class _Mapped:
    """One line of ``/proc/self/maps``."""

    low: int
    high: int
    permissions: str
    offset: int
    file: tuple[str, str]
    path: str


def _in_file(array: np.ndarray, *, writable: bool) -> SharedView | None:
    if array.nbytes == 0 or not _is_over_mmap(array) or not os.path.exists(_MAPS):
        return None
    low, high = byte_bounds(array)
    lines = _lines_over(low, high)
    if not lines or lines[0].low > low or lines[-1].high < high:
        return None
    first = lines[0]
    shift = first.offset - first.low
    if not all(_goes_on(line, first, writable=writable) for line in lines):
        return None
    segment = _reopened(first, writable=writable)
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


def _reopened(line: _Mapped, *, writable: bool) -> Segment | None:
    """The file of a mapping, opened again; None if it is no longer there."""
    if line.path.endswith(" (deleted)") or not line.path.startswith("/"):
        return None
    try:
        fd = os.open(line.path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError:
        return None
    segment = Segment(fd, on_disk=True, nbytes=os.fstat(fd).st_size)
    return segment if segment.nbytes and _is_same(fd, line) else None


def _is_over_mmap(array: np.ndarray) -> bool:
    owner: Any = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    return owner is not None and not isinstance(owner, Mapping)


def _is_same(fd: int, line: _Mapped) -> bool:
    """Whether a descriptor is of the file that is mapped there, by mapping it too.

    Some file systems tell other device numbers for a file than for mappings of it, so two mappings
    are compared.
    """
    with mmap.mmap(fd, 1, access=mmap.ACCESS_READ) as probe:
        view = np.frombuffer(probe, np.uint8)
        low = address_of(view)
        del view
        return [found.file for found in _lines_over(low, low + 1)] == [line.file]


def _lines_over(low: int, high: int) -> list[_Mapped]:
    """The mappings of this process that overlap with a range of addresses, in order."""
    found = []
    with open(_MAPS, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            begin, _, end = line.partition(" ")[0].partition("-")
            if int(begin, 16) < high and int(end, 16) > low:
                found.append(_parsed(line))
    return found


def _parsed(line: str) -> _Mapped:
    addresses, permissions, offset, device, inode, *rest = line.rstrip("\n").split(maxsplit=5)
    begin, _, end = addresses.partition("-")
    path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), "".join(rest))
    return _Mapped(
        int(begin, 16), int(end, 16), permissions, int(offset, 16), (device, inode), path
    )


def check_path(path: object) -> str:
    """The path of a ``.npy`` file as a string, or an error that says what is expected."""
    text = os.fspath(path)  # type: ignore[call-overload]  # whatever the user passed
    if not isinstance(text, str) or not text.endswith(".npy"):
        raise ValueError(f"expected a path that ends in .npy, got {path!r}")
    return text


def load(path: str | os.PathLike[str], mode: str = "r") -> np.ndarray:
    """Map a ``.npy`` file as an ordinary array.

    Nothing is read until it is looked at, and workers map the file themselves: neither the
    array nor a view of it is ever copied to them. What another program writes into the file is
    seen.

    Parameters
    ----------
    path : str or path-like
        A file in NumPy's ``.npy`` format, of any dtype but Python objects.
    mode : {"r", "r+"}, default "r"
        Whether the array is read-only, or writes go to the file.

    Returns
    -------
    ndarray
        Over the mapped file; the mapping ends with the last view.

    Raises
    ------
    FileNotFoundError, PermissionError
        As `open` does.
    ValueError
        No ``.npy`` file, one of Python objects, or one that is shorter than its header says.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> from taskcarrier import load, map_array
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "X.npy")
    ...     np.save(path, np.arange(4.0))
    ...     X = load(path)
    ...     map_array(np.sqrt, X)
    array([0.        , 1.        , 1.41421356, 1.73205081])
    """
    if mode not in {"r", "r+"}:
        raise ValueError(f"mode must be 'r' or 'r+', got {mode!r}")
    text = check_path(path)
    with open(text, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
        except ValueError as error:
            raise ValueError(f"{text} is no .npy file: {error}") from None
        shape, fortran_order, dtype = _read_header(file, version)
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError(
            f"{text} holds pickled Python objects, which cannot be mapped; "
            "pass numpy.load(path, allow_pickle=True) if you trust the file"
        )
    order: Literal["C", "F"] = "F" if fortran_order else "C"
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        nothing = np.empty(shape, dtype, order)
        nothing.flags.writeable = mode == "r+"
        return nothing
    fd = os.open(text, (os.O_RDONLY if mode == "r" else os.O_RDWR) | os.O_CLOEXEC)
    segment = Segment(fd, on_disk=True, nbytes=os.fstat(fd).st_size)
    if segment.nbytes < offset + nbytes:
        raise ValueError(
            f"{text} is cut off: {segment.nbytes:,} bytes, but its header says {offset + nbytes:,}"
        )
    view = SharedView(
        segment, offset, shape, contiguous_strides(shape, dtype.itemsize, order), dtype
    )
    return view.open("read" if mode == "r" else "write")


def _read_header(file: Any, version: tuple[int, int]) -> Any:
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    # Field names in UTF-8: NumPy has no public function for the header of this version.
    mapped = np.load(file.name, mmap_mode="r", allow_pickle=False)
    file.seek(mapped.offset)
    return mapped.shape, mapped.flags.f_contiguous and not mapped.flags.c_contiguous, mapped.dtype


def header_of(dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> bytes:
    """The bytes before the data of a ``.npy`` file; a pure function, so that all workers agree."""
    file = io.BytesIO()
    facts = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": order == "F",
        "shape": shape,
    }
    try:
        np.lib.format.write_array_header_1_0(file, facts)
    except ValueError:  # a header above 64 KiB
        np.lib.format.write_array_header_2_0(file, facts)
    return file.getvalue()


class NpyWriter:
    """A ``.npy`` file in the making: filled beside its place, and renamed when it is complete.

    Half a result never looks whole: until `finish` there is only a file with ``.part`` added to its
    name, and `discard` removes that. The file has the permissions that new files have here.

    Parameters
    ----------
    path : str
        Where the file is to be in the end.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.part = path + ".part"
        if os.path.isdir(path):
            raise IsADirectoryError(f"out={path!r} is a folder")
        # What an earlier, killed run has left is of no use; a link or device is not ours to remove.
        try:
            if not stat.S_ISREG(os.lstat(self.part).st_mode):
                raise FileExistsError(
                    f"{self.part} exists and is no ordinary file; remove it first"
                )
            os.unlink(self.part)
        except FileNotFoundError:
            pass
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.segment = Segment(os.open(self.part, flags, 0o666), on_disk=True)

    def finish(self, array: np.ndarray, header: bytes) -> None:
        """Write the header, and give the file its name."""
        self.segment.write(0, memoryview(header))
        os.truncate(self.segment.fd, len(header) + array.nbytes)
        os.replace(self.part, self.path)
        self.part = ""

    def discard(self) -> None:
        """Remove what is there, unless it was finished."""
        if self.part:
            os.unlink(self.part)
            self.part = ""
