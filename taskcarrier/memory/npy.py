"""``.npy`` files, which are mapped to read and write them in place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import math
import os
import stat
from collections.abc import Callable
from tokenize import TokenError
from typing import Any, Literal

import numpy as np

from taskcarrier.memory.segments import Segment, SharedView
from taskcarrier.memory.strides import ALIGNMENT, contiguous_strides
from taskcarrier.system.descriptors import Descriptor, open_owned

# A header grows with the fields of its dtype; NumPy's own limit is 10,000 characters.
_MAX_HEADER = 1 << 20


def check_path(path: object) -> str:
    """Return the path of a ``.npy`` file as a string, or raise an error that says what is wrong."""
    text = os.fspath(path)  # type: ignore[call-overload]  # whatever the user passed
    if not isinstance(text, str) or not text.endswith(".npy"):
        raise ValueError(f"expected a path that ends in .npy, got {path!r}")
    return text


def load(path: str | os.PathLike[str], mode: str = "r") -> np.ndarray:
    """Map a ``.npy`` file as an ordinary array.

    Data is read only when it is used, and workers map the file themselves: neither the array nor a
    view of it is ever copied to them. What another program writes to the file shows in the array.

    Parameters
    ----------
    path : str or path-like
        A file in NumPy's ``.npy`` format, of any dtype but Python objects.
    mode : {"r", "r+"}, default "r"
        Whether the array is read-only, or writes go to the file: the caller's own, and those of
        functions that carry the array, as with `empty`.

    Returns
    -------
    ndarray
        The array over the mapped file. The mapping ends with the last view.

    Raises
    ------
    FileNotFoundError, PermissionError
        As `open` does.
    ValueError
        If the file is no ``.npy`` file, holds Python objects, or is shorter than its header says.

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
    """Map a ``.npy`` file, which may have any name; see `Segment` for `takes_writes`."""
    with open(text, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
        except ValueError as error:
            raise ValueError(f"{text} is no .npy file: {error}") from None
        try:
            shape, fortran_order, dtype = _read_header(file, version)
        except (ValueError, TokenError) as error:
            raise ValueError(
                f"{text} has a header that cannot be read: {error}. The file is cut off, damaged "
                "or of a newer NumPy; write it again with numpy.save"
            ) from None
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError(
            f"{text} holds pickled Python objects, which cannot be mapped; "
            "pass numpy.load(path, allow_pickle=True) if you trust the file"
        )
    order: Literal["C", "F"] = "F" if fortran_order else "C"
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        empty = np.empty(shape, dtype, order)
        empty.flags.writeable = mode == "r+"
        return empty
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
    # Version 3 has field names in UTF-8; NumPy has no public function for its header.
    mapped = np.load(file.name, mmap_mode="r", allow_pickle=False, max_header_size=_MAX_HEADER)
    file.seek(mapped.offset)
    return mapped.shape, mapped.flags.f_contiguous and not mapped.flags.c_contiguous, mapped.dtype


def find_order(array: np.ndarray) -> str:
    """Return the order in which a file holds an array: "F" only if it has no other."""
    return "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"


def make_header(dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> bytes:
    """Return the bytes before the data of a ``.npy`` file; all workers compute the same."""
    file = io.BytesIO()
    if dtype.names is None:
        dtype = np.dtype(dtype.str)  # without metadata, which dtypes of dates get when they travel
    fields = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": order == "F",
        "shape": shape,
    }
    try:
        np.lib.format.write_array_header_1_0(file, fields)
    except UnicodeEncodeError:
        return _make_header_3(repr(fields))
    except ValueError:  # a header above 64 KiB
        np.lib.format.write_array_header_2_0(file, fields)
    return file.getvalue()


def _make_header_3(fields: str) -> bytes:
    """Return a header of version 3, whose field names may have any letters.

    NumPy has no public function for it.
    """
    magic = np.lib.format.magic(3, 0)
    text = fields.encode()
    n_before = len(magic) + 4
    padding = -(n_before + len(text) + 1) % ALIGNMENT
    text += b" " * padding + b"\n"
    return magic + len(text).to_bytes(4, "little") + text


def open_own_file(path: str, create: Callable[[str], Descriptor]) -> tuple[Descriptor, bool]:
    """Open and lock an ordinary file of this user for reading and writing.

    If there is none, `create` makes it. Returns the file, and whether it is new.

    Raises
    ------
    FileExistsError
        If there is a link, no ordinary file, or another user's file.
    BlockingIOError
        If another run has locked the file, or has made it a moment ago.
    """
    file = _open_ordinary_file(path)
    is_new = file is None
    try:
        if file is None:
            file = create(path)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileExistsError, BlockingIOError):
        raise BlockingIOError(errno.EAGAIN, "another run is at work on this output", path) from None
    return file, is_new


def _open_ordinary_file(path: str) -> Descriptor | None:
    """Open a file, or return None if there is none.

    A link or a device is refused: it is not ours to write to or to remove.
    """
    refusal = FileExistsError(
        errno.EEXIST, "there is no ordinary file of this user's; remove it first", path
    )
    try:
        file = open_owned(os.open, path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:
            raise
        raise refusal from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise refusal
    return file


class NpyWriter:
    """A ``.npy`` file that is filled under another name, and renamed when it is complete.

    An incomplete result never looks complete: until `finish` there is only a file with ``.part``
    added to its name, and `discard` removes it. From the start, the file has the permissions and
    the group of the file that it replaces, or those of new files if there is none.

    Parameters
    ----------
    path : str
        The final path of the file.
    keep : bool
        Whether the incomplete file stays when the writer is discarded.
    is_resumed : bool
        Whether to go on with the file that an earlier writer has left, if there is one.
    """

    def __init__(self, path: str, *, keep: bool = False, is_resumed: bool = False) -> None:
        self.path = os.path.realpath(path)  # the target of a link, not the link
        self.part = self.path + ".part"
        self._keep = keep
        if os.path.isdir(path):
            raise IsADirectoryError(f"out={path!r} is a folder")
        file, is_new = open_own_file(self.part, self._create)
        while not (is_new or is_resumed):
            # What an earlier run has left is of no use, and neither is its ledger file.
            for leftover in (self.part, *([] if keep else [ledger_path(self.path)])):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(leftover)
            file, is_new = open_own_file(self.part, self._create)
        self.segment = Segment(file, on_disk=True)
        # Its owner may write to it for now, even if the finished file will be read-only.
        _copy_permissions(self.segment.fd, self.path, stat.S_IRUSR | stat.S_IWUSR)

    def _create(self, path: str) -> Descriptor:
        # A file that replaces another is private until it has the permissions of that one.
        mode = 0o600 if os.path.exists(self.path) else 0o666
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return open_owned(os.open, path, flags, mode)

    def make_view(self, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> SharedView:
        """Make room for an array in the file, write its header, and return where its data lie."""
        header = make_header(dtype, shape, order)
        offset = len(header)
        nbytes = math.prod(shape) * dtype.itemsize
        self.segment.reserve(offset + nbytes)
        # Before the first result, so that a later run can read what results are like.
        self.segment.write(0, memoryview(header))
        strides = contiguous_strides(shape, dtype.itemsize, order)
        return SharedView(self.segment if nbytes else None, offset, shape, strides, dtype)

    def read_header(self) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
        """Return dtype and shape of what an earlier writer has left; None if it is of no use."""
        try:
            with open(self.part, "rb") as file:
                shape, _, dtype = _read_header(file, np.lib.format.read_magic(file))
                end = file.tell() + math.prod(shape) * dtype.itemsize
                is_whole = os.fstat(file.fileno()).st_size >= end
        except (OSError, ValueError, TokenError):
            return None
        return (dtype, shape) if is_whole and not dtype.hasobject else None

    def finish(self, array: np.ndarray) -> np.ndarray:
        """Write the header of `array`, give the file its final path, and return it mapped."""
        header = make_header(array.dtype, array.shape, find_order(array))
        self.segment.write(0, memoryview(header))
        os.truncate(self.segment.fd, len(header) + array.nbytes)
        file = _map_file(self.part, "r+")
        _copy_permissions(self.segment.fd, self.path)
        os.replace(self.part, self.path)
        self._unlock()
        return file

    def discard(self) -> None:
        """Remove the incomplete file, unless it was finished or is to be kept."""
        if self.part:
            if not self._keep:
                with contextlib.suppress(FileNotFoundError):  # something else has removed it
                    os.unlink(self.part)
            self._unlock()

    def _unlock(self) -> None:
        """Unlock the path, so that another run may write to it."""
        fcntl.flock(self.segment.fd, fcntl.LOCK_UN)
        self.part = ""


def _copy_permissions(fd: int, path: str, extra_mode: int | None = None) -> None:
    """Give a file the permissions and the group of the file at `path`, if there is one.

    An unfinished file gets `extra_mode` as well. A finished one (without `extra_mode`) also gets
    the owner, which only root can change.
    """
    try:
        target = os.stat(path)
    except FileNotFoundError:
        return
    current = os.fstat(fd)
    mode = stat.S_IMODE(target.st_mode) & 0o777
    owner = target.st_uid if extra_mode is None and os.geteuid() == 0 else current.st_uid
    if (owner, target.st_gid) != (current.st_uid, current.st_gid):
        try:
            os.fchown(fd, owner, target.st_gid)
        except OSError as error:
            # The user is not in the group (EPERM), or the namespace does not know it (EINVAL).
            if error.errno not in {errno.EPERM, errno.EINVAL}:
                raise
            # The group that the file keeps gets the permissions of all others.
            mode = mode & ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
    mode |= extra_mode or 0
    if mode != stat.S_IMODE(current.st_mode):  # some file systems cannot change it
        os.fchmod(fd, mode)


def ledger_path(path: str) -> str:
    """Return the path of the ledger file of a run that can be resumed, by that of its output."""
    return f"{path}.ledger"
