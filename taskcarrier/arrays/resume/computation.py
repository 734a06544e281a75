"""A description of what a call computes, so that a later run can check that it computes the same.

Everything that decides the values of a call is compared by digests
(`taskcarrier.arrays.resume.fingerprint`), except for mapped arrays that may be too large for that:

- A file is the same if its device, inode, times and size are the same. Otherwise 64 of its pages
  are compared. A file in memory (tmpfs) is compared as a whole: its times do not show every write.
- For an array-like (a zarr array, for example) up to 64 items are compared.

Where the samples are equal, the rest may still differ: the run continues with a warning.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from taskcarrier.arrays.inputs.check import Inputs
from taskcarrier.arrays.inputs.halos import Halo
from taskcarrier.arrays.inputs.sources import ArrayLikeSource
from taskcarrier.arrays.resume.fingerprint import Fingerprint
from taskcarrier.memory.available import find_path
from taskcarrier.memory.memmaps import find_shared, sync_times
from taskcarrier.memory.segments import SharedView
from taskcarrier.memory.strides import address_of, byte_bounds
from taskcarrier.notes import warn_user
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.workers.call import Call

_N_SAMPLES = 64
# The approximate limit on the bytes of all sampled items of one array-like.
_SAMPLED_NBYTES = 1 << 26
# A list with more names than this is too long to be read.
_N_NAMES = 8


@dataclass(frozen=True)
class SampledInput:
    """An input of which only samples are compared.

    Attributes
    ----------
    name : str
        The name of the input in messages.
    samples : str
        A digest of the samples.
    status : list of int
        For a file: device, inode, time of the last change of its inode and of its content (in
        nanoseconds), and size in bytes. Empty for other inputs: they can never be known to be
        unchanged.
    """

    name: str
    samples: str
    status: list[int]


@dataclass(frozen=True)
class Computation:
    """Everything that decides the values of a call, as far as it can be determined.

    Attributes
    ----------
    digests : dict of str to str
        A digest of each part of the call, by the name of the part.
    sampled : dict of str to SampledInput
        Inputs of which samples are compared in addition, by name.
    by_type : list of str
        Names of the values that are compared by their types alone.
    """

    digests: dict[str, str]
    sampled: dict[str, SampledInput]
    by_type: list[str]

    @classmethod
    def from_call(
        cls,
        call: Call,
        inputs: Inputs,
        grid: ChunkGrid,
        halo: Halo | None,
        options: Mapping[str, object],
    ) -> Computation:
        """Return the computation of a call.

        Parameters
        ----------
        call : Call
            The function and its arguments besides the mapped arrays.
        inputs : Inputs
            The mapped arrays.
        grid : ChunkGrid
            The division of the items into chunks.
        halo : Halo or None
            The neighbours that are read with each chunk.
        options : mapping of str to object
            Other options that decide values; they are compared by their `repr`.

        Raises
        ------
        ValueError
            If the function may write to arrays of the caller.
        """
        fingerprint = Fingerprint()
        digests = fingerprint.digest_function(call.func, "func")
        if fingerprint.takes_writes:
            raise ValueError(
                f"resume=True cannot go with a function that may write to arrays of the caller: "
                f"{', '.join(fingerprint.takes_writes)}. A range that an earlier run has finished "
                "is not run again, so what it wrote there would be missing. Return the values "
                "instead; if func only reads the array, pass it in args= or set its "
                "flags.writeable = False"
            )
        digests |= {
            f"args[{n}]": fingerprint.digest(value, f"args[{n}]")
            for n, value in enumerate(call.args)
        }
        keywords = {f"kwargs[{name!r}]": value for name, value in call.kwargs.items()}
        digests |= {name: fingerprint.digest(value, name) for name, value in keywords.items()}
        sampled = {}
        for number, (array, axis) in enumerate(zip(inputs.arrays, inputs.axes, strict=True)):
            name = f"array {number}"
            digests[name], samples = _digest_input(array, axis, name, fingerprint)
            if samples is not None:
                sampled[name] = samples
        settings = {"axis": inputs.axes, "items": grid.n_items, "chunksize": grid.chunksize}
        settings |= {"order": inputs.order}  # the memory order of the output
        settings |= {**options, "depth": halo}
        digests |= {name: repr(value) for name, value in settings.items()}
        return cls(digests, sampled, sorted(fingerprint.not_looked_into))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Computation:
        """Return the computation that `to_json` described; raise an error for any other data."""
        digests, sampled = dict.items(data["digests"]), dict.items(data["sampled"])
        return cls(dict(digests), {name: SampledInput(**fields) for name, fields in sampled}, [])

    def to_json(self) -> dict[str, Any]:
        """Return what a later run is compared with, as an object for JSON."""
        return {
            "digests": self.digests,
            "sampled": {name: asdict(sampled) for name, sampled in self.sampled.items()},
        }

    def differences(self, earlier: Computation) -> list[str]:
        """Return the names of the parts in which an earlier computation differs from this one."""
        names = {**self.digests, **earlier.digests}
        differing = [name for name in names if self.digests.get(name) != earlier.digests.get(name)]
        return differing + [
            name
            for name in {**self.sampled, **earlier.sampled}
            if name not in differing
            and _get_samples(self.sampled.get(name)) != _get_samples(earlier.sampled.get(name))
        ]

    def notes(self) -> list[str]:
        """Return a note on the values that are compared by type alone, and warn of them."""
        if not self.by_type:
            return []
        names = self.by_type[:_N_NAMES]
        names += [f"{len(self.by_type) - _N_NAMES} more"] if self.by_type[_N_NAMES:] else []
        note = f"resume compares the type alone of {', '.join(names)}"
        warn_user(f"{note}. If a value changes, results that were made before stay as they are")
        return [note]

    def doubts(self, earlier: Computation) -> list[str]:
        """Return notes on inputs that may have changed since an earlier computation, and warn."""
        notes = [
            f"resume compared samples of {sampled.name}, which may have changed"
            for name, sampled in self.sampled.items()
            if not sampled.status or sampled.status != earlier.sampled[name].status
        ]
        for note in notes:
            warn_user(f"{note}. The samples are equal, so the run goes on")
        return notes


def _get_samples(sampled: SampledInput | None) -> str | None:
    return None if sampled is None else sampled.samples


def _digest_input(
    array: Any, axis: int, name: str, fingerprint: Fingerprint
) -> tuple[str, SampledInput | None]:
    """Return the digest of a mapped array, and its samples (None if it is compared as a whole)."""
    if not isinstance(array, np.ndarray):
        kind = f"{type(array).__module__}.{type(array).__qualname__}"
        samples = [fingerprint.digest(item, name) for item in _sample_items(array, axis)]
        digest = fingerprint.digest((kind, array.shape, array.dtype), name)
        return digest, SampledInput(f"{name} ({kind})", fingerprint.digest(samples, name), [])
    view = find_shared(array)
    if view is None or view.segment is None or not view.segment.on_disk:
        return fingerprint.digest(array, name), None
    if not sync_times(view.segment.fd):
        return fingerprint.digest(array, name), None
    file = os.fstat(view.segment.fd)
    status = [file.st_dev, file.st_ino, file.st_ctime_ns, file.st_mtime_ns, file.st_size]
    layout = repr((view.offset, view.shape, view.strides, view.dtype, file.st_size))
    samples = [fingerprint.digest(page, name) for page in _sample_pages(array, view)]
    label = f"{name} ({find_path(view.segment.fd) or 'a file'})"
    sampled = SampledInput(label, fingerprint.digest(samples, name), status)
    return fingerprint.digest(layout, name), sampled


def _sample_pages(array: np.ndarray, view: SharedView) -> Iterator[bytes]:
    """Yield sampled pages of the file that an array lies in, cut to the bytes of the array."""
    assert view.segment is not None  # for the type checker
    low, high = byte_bounds(array)
    shift = view.offset - address_of(array)
    low, high = low + shift, high + shift
    page_nbytes = mmap.PAGESIZE
    first, last = low // page_nbytes, (high - 1) // page_nbytes
    for page in _pick_evenly(last - first + 1, _N_SAMPLES):
        start, stop = (first + page) * page_nbytes, (first + page + 1) * page_nbytes
        start, stop = max(low, start), min(high, stop)
        yield os.pread(view.segment.fd, stop - start, start)


def _sample_items(array: Any, axis: int) -> Iterator[np.ndarray]:
    """Yield sampled items of an array-like."""
    n_items = array.shape[axis]
    item_nbytes = array.dtype.itemsize * int(np.prod(array.shape)) // max(1, n_items)
    read = ArrayLikeSource(Call(array), axis).open()
    n_samples = min(_N_SAMPLES, _SAMPLED_NBYTES // max(1, item_nbytes))
    for item in _pick_evenly(n_items, max(2, n_samples)):
        yield np.asarray(read(item, item + 1))


def _pick_evenly(n: int, n_samples: int) -> list[int]:
    """Return up to `n_samples` evenly spaced numbers from `range(n)`, with its first and last."""
    return np.unique(np.linspace(0, n - 1, min(n, n_samples)).astype(int)).tolist() if n else []
