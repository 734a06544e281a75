"""``.npy`` files, read and written in place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import math
import os
import stat
from typing import Any, Literal

import numpy as np

from taskcarrier.memory.segments import Segment, SharedView
from taskcarrier.memory.strides import ALIGNMENT, contiguous_strides
from taskcarrier.system.descriptors import Descriptor, open_owned

# Headers are as long as a dtype has fields; NumPy's own limit is 10,000 characters.
_MAX_HEADER = 1 << 20


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
        Whether the array is read-only, or writes go to the file: those of the caller, and those of
        functions that carry the array, as with `empty`.

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
    return _map_file(check_path(path), mode, takes_writes=mode == "r+")


def _map_file(text: str, mode: str, *, takes_writes: bool = False) -> np.ndarray:
    """A ``.npy`` file as an array, whatever its name ends in; see `Segment.takes_writes`."""
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
    flags = (os.O_RDONLY if mode == "r" else os.O_RDWR) | os.O_CLOEXEC
    descriptor = open_owned(os.open, text, flags)
    segment = Segment(descriptor, on_disk=True, nbytes=os.fstat(descriptor.fileno()).st_size)
    segment.takes_writes = takes_writes
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
        return np.lib.format.read_array_header_1_0(file, _MAX_HEADER)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file, _MAX_HEADER)
    # Field names in UTF-8: NumPy has no public function for the header of this version.
    mapped = np.load(file.name, mmap_mode="r", allow_pickle=False, max_header_size=_MAX_HEADER)
    file.seek(mapped.offset)
    return mapped.shape, mapped.flags.f_contiguous and not mapped.flags.c_contiguous, mapped.dtype


def header_of(dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> bytes:
    """The bytes before the data of a ``.npy`` file; a pure function, so that all workers agree."""
    file = io.BytesIO()
    if dtype.names is None:
        dtype = np.dtype(dtype.str)  # without metadata, which dtypes of dates get on their way
    facts = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": order == "F",
        "shape": shape,
    }
    try:
        np.lib.format.write_array_header_1_0(file, facts)
    except UnicodeEncodeError:
        return _header_3(repr(facts))
    except ValueError:  # a header above 64 KiB
        np.lib.format.write_array_header_2_0(file, facts)
    return file.getvalue()


def _header_3(facts: str) -> bytes:
    """Version 3, whose field names may have any letters; NumPy has no public function for it."""
    magic = np.lib.format.magic(3, 0)
    text = facts.encode()
    n_before = len(magic) + 4
    padding = -(n_before + len(text) + 1) % ALIGNMENT
    text += b" " * padding + b"\n"
    return magic + len(text).to_bytes(4, "little") + text


def open_own(path: str) -> Descriptor:
    """A descriptor of an ordinary file that is ours, to read and write it.

    Raises
    ------
    FileNotFoundError
        If there is none.
    FileExistsError
        If it is a link or no ordinary file, or somebody else's.
    """
    refusal = FileExistsError(
        errno.EEXIST, "there is no ordinary file of this user's; remove it first", path
    )
    try:
        file = open_owned(os.open, path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:
            raise
        raise refusal from None
    facts = os.fstat(file.fileno())
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
        raise refusal
    return file


class NpyWriter:
    """A ``.npy`` file in the making: filled beside its place, and renamed when it is complete.

    Half a result never looks whole: until `finish` there is only a file with ``.part`` added to its
    name, and `discard` removes that. The file has the permissions and the group of the one that it
    replaces, from the start, and those of new files where there is none.

    Parameters
    ----------
    path : str
        Where the file is to be in the end.
    keeps : bool
        Whether what there is stays there when the writer is discarded.
    is_running : bool
        Whether to fill the file that an earlier writer has left, if there is one.
    """

    def __init__(self, path: str, *, keeps: bool = False, is_running: bool = False) -> None:
        self.path = os.path.realpath(path)  # the target of a link, not the link
        self.part = self.path + ".part"
        self._keeps = keeps
        if os.path.isdir(path):
            raise IsADirectoryError(f"out={path!r} is a folder")
        file = _left_open(self.part)
        if file is not None and not is_running:
            # What an earlier run has left is of no use, nor is what it has noted about it.
            for leftover in (self.part, *([] if keeps else [ledger_path(self.path)])):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(leftover)
            file = None
        if file is None:
            # One that replaces another is this user's alone until it has that one's permissions.
            file = _new_file(self.part, 0o600 if os.path.exists(self.path) else 0o666)
        self.segment = Segment(file, on_disk=True)
        # Its owner may write to it for now, whatever becomes of it then.
        _take_on(self.segment.fd, self.path, stat.S_IRUSR | stat.S_IWUSR)

    def header(self) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
        """What an earlier writer has left says of its dtype and shape; None if it says nothing."""
        try:
            with open(self.part, "rb") as file:
                shape, _, dtype = _read_header(file, np.lib.format.read_magic(file))
                end = file.tell() + math.prod(shape) * dtype.itemsize
                is_whole = os.fstat(file.fileno()).st_size >= end
        except (OSError, ValueError):
            return None
        return (dtype, shape) if is_whole and not dtype.hasobject else None

    def finish(self, array: np.ndarray, header: bytes) -> np.ndarray:
        """Write the header, and give the file its name; the file, mapped."""
        self.segment.write(0, memoryview(header))
        os.truncate(self.segment.fd, len(header) + array.nbytes)
        file = _map_file(self.part, "r+")
        _take_on(self.segment.fd, self.path)
        os.replace(self.part, self.path)
        self._let_go()
        return file

    def discard(self) -> None:
        """Remove what is there, unless it was finished or is to be kept."""
        if self.part:
            if not self._keeps:
                with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
                    os.unlink(self.part)
            self._let_go()

    def _let_go(self) -> None:
        """Another run may write to this path from now on."""
        fcntl.flock(self.segment.fd, fcntl.LOCK_UN)
        self.part = ""


def _take_on(fd: int, path: str, more: int | None = None) -> None:
    """Give a file the permissions and the group of the one at `path`, if there is one.

    With `more` permissions as long as it is not finished; when it is, its owner too, which only
    root can give.
    """
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return
    own = os.fstat(fd)
    mode = stat.S_IMODE(there.st_mode) & 0o777
    owner = there.st_uid if more is None and os.geteuid() == 0 else own.st_uid
    if (owner, there.st_gid) != (own.st_uid, own.st_gid):
        try:
            os.fchown(fd, owner, there.st_gid)
        except OSError as error:
            # Not a group of this user's (EPERM), or one that its namespace does not know (EINVAL).
            if error.errno not in {errno.EPERM, errno.EINVAL}:
                raise
            # The group that it has instead may do what everybody may.
            mode = mode & ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
    mode |= more or 0
    if mode != stat.S_IMODE(own.st_mode):  # some file systems cannot change it
        os.fchmod(fd, mode)


def ledger_path(path: str) -> str:
    """Where the ledger of a run that can be resumed stands, by the path of its output."""
    return f"{path}.ledger"


def _left_open(path: str) -> Descriptor | None:
    """What an earlier run has left, locked for this one; None if there is nothing.

    A link or a device is not ours to write to, nor to remove.
    """
    try:
        file = open_own(path)
    except FileNotFoundError:
        return None
    return lock_file(file, path)


def _new_file(path: str, mode: int) -> Descriptor:
    """A new, empty file, locked for this run."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return lock_file(open_owned(os.open, path, flags, mode), path)
    except FileExistsError:  # it was not there a moment ago
        raise busy(path) from None


def lock_file(file: Descriptor, path: str) -> Descriptor:
    """The same file, which this run alone holds from now on; or an error."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy(path) from None
    return file


def busy(path: str) -> BlockingIOError:
    """What is said where two runs want the same output."""
    return BlockingIOError(errno.EAGAIN, "another run is at work on this output", path)
