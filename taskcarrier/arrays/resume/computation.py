"""What a call computes, so that a later run can tell whether it computes the same.

All that decides the values of a call is compared by digests (`taskcarrier.arrays.resume.fingerprint`), except for
mapped arrays that may be too large for that:

- A file is the same if its device, inode, times and size are. Otherwise 64 pages of it are
  compared. One in memory (tmpfs) is compared as a whole: its times do not tell of all writes.
- Of an array-like (a zarr array, for example) up to 64 items are compared.

Where samples are equal, the rest may still differ: the run goes on with a warning.
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
from taskcarrier.memory.available import name_of_file
from taskcarrier.memory.memmaps import find_shared, sync_times
from taskcarrier.memory.segments import SharedView
from taskcarrier.memory.strides import address_of, byte_bounds
from taskcarrier.notes import advise
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.workers.call import Call

_N_SAMPLES = 64
# Items of array-likes that are sampled together have about so many bytes at most.
_SAMPLED_NBYTES = 1 << 26
# So many names make a message that is still read.
_N_NAMES = 8


@dataclass(frozen=True)
class Sampled:
    """An input that is compared in samples.

    Attributes
    ----------
    name : str
        What to call it.
    samples : str
        A digest of the samples.
    status : list of int
        Of a file: device, inode, time of the last change of its inode and of its content (in
        nanoseconds), and size in bytes. Empty for others, which are never known to be the same.
    """

    name: str
    samples: str
    status: list[int]


@dataclass(frozen=True)
class Computation:
    """All that decides the values of a call, as far as that can be told.

    Attributes
    ----------
    digests : dict of str to str
        By name.
    sampled : dict of str to Sampled
        Inputs that are compared in samples besides, by name.
    by_type : list of str
        What is compared by its type alone.
    """

    digests: dict[str, str]
    sampled: dict[str, Sampled]
    by_type: list[str]

    @classmethod
    def of(
        cls,
        call: Call,
        inputs: Inputs,
        grid: ChunkGrid,
        halo: Halo | None,
        options: Mapping[str, object],
    ) -> Computation:
        """Of a call; a `ValueError` if its function may write to arrays of the caller.

        Parameters
        ----------
        call : Call
            The function, and what it gets besides.
        inputs : Inputs
            The mapped arrays.
        grid : ChunkGrid
            What a chunk is.
        halo : Halo or None
            Neighbours.
        options : mapping of str to object
            What else counts, as a text.
        """
        found = Fingerprint()
        digests = found.of_function(call.func, "func")
        if found.takes_writes:
            raise ValueError(
                f"resume=True cannot go with a function that may write to arrays of the caller: "
                f"{', '.join(found.takes_writes)}. A range that an earlier run has finished is not "
                "run again, so what it wrote there would be missing. Return the values instead; "
                "if func only reads the array, pass it in args= or set its flags.writeable = False"
            )
        digests |= {f"args[{n}]": found.of(one, f"args[{n}]") for n, one in enumerate(call.args)}
        keyed = {f"kwargs[{name!r}]": one for name, one in call.kwargs.items()}
        digests |= {name: found.of(one, name) for name, one in keyed.items()}
        sampled = {}
        for number, (array, axis) in enumerate(zip(inputs.arrays, inputs.axes, strict=True)):
            name = f"array {number}"
            digests[name], samples = _input(array, axis, name, found)
            if samples is not None:
                sampled[name] = samples
        words = {"axis": inputs.axes, "items": grid.n_items, "chunksize": grid.chunksize}
        words |= {"order": inputs.order}  # so the output lies
        words |= {**options, "depth": halo}
        digests |= {name: repr(value) for name, value in words.items()}
        return cls(digests, sampled, sorted(found.not_looked_into))

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Computation:
        """From what `to_json` gave; an error where it was not that."""
        digests, sampled = dict.items(found["digests"]), dict.items(found["sampled"])
        return cls(dict(digests), {name: Sampled(**one) for name, one in sampled}, [])

    def to_json(self) -> dict[str, Any]:
        """What a later run is compared with, in a form for JSON."""
        return {
            "digests": self.digests,
            "sampled": {name: asdict(one) for name, one in self.sampled.items()},
        }

    def differences(self, earlier: Computation) -> list[str]:
        """Names of what this computation and an earlier one do not have in common."""
        names = {**self.digests, **earlier.digests}
        differing = [one for one in names if self.digests.get(one) != earlier.digests.get(one)]
        return differing + [
            name
            for name in {**self.sampled, **earlier.sampled}
            if name not in differing
            and _samples(self.sampled.get(name)) != _samples(earlier.sampled.get(name))
        ]

    def notes(self) -> list[str]:
        """Of what is compared by its type alone; the program is warned of it."""
        if not self.by_type:
            return []
        names = self.by_type[:_N_NAMES]
        names += [f"{len(self.by_type) - _N_NAMES} more"] if self.by_type[_N_NAMES:] else []
        note = f"resume compares the type alone of {', '.join(names)}"
        advise(f"{note}. If a value changes, results that were made before stay as they are")
        return [note]

    def doubts(self, earlier: Computation) -> list[str]:
        """Of inputs that may differ from those of an earlier computation; the program is warned."""
        notes = [
            f"resume compared samples of {own.name}, which may have changed"
            for name, own in self.sampled.items()
            if not own.status or own.status != earlier.sampled[name].status
        ]
        for note in notes:
            advise(f"{note}. The samples are equal, so the run goes on")
        return notes


def _samples(sampled: Sampled | None) -> str | None:
    return None if sampled is None else sampled.samples


def _input(array: Any, axis: int, name: str, found: Fingerprint) -> tuple[str, Sampled | None]:
    """The digest of a mapped array, and what is sampled of it."""
    if not isinstance(array, np.ndarray):
        kind = f"{type(array).__module__}.{type(array).__qualname__}"
        samples = [found.of(item, name) for item in _items(array, axis)]
        digest = found.of((kind, array.shape, array.dtype), name)
        return digest, Sampled(f"{name} ({kind})", found.of(samples, name), [])
    view = find_shared(array)
    if view is None or view.segment is None or not view.segment.on_disk:
        return found.of(array, name), None
    if not sync_times(view.segment.fd):
        return found.of(array, name), None
    file = os.fstat(view.segment.fd)
    status = [file.st_dev, file.st_ino, file.st_ctime_ns, file.st_mtime_ns, file.st_size]
    place = repr((view.offset, view.shape, view.strides, view.dtype, file.st_size))
    samples = [found.of(page, name) for page in _pages(array, view)]
    what = f"{name} ({name_of_file(view.segment.fd) or 'a file'})"
    return found.of(place, name), Sampled(what, found.of(samples, name), status)


def _pages(array: np.ndarray, view: SharedView) -> Iterator[bytes]:
    """Pages of a file that an array lies in, as far as it covers them."""
    assert view.segment is not None  # for the type checker
    low, high = byte_bounds(array)
    shift = view.offset - address_of(array)
    low, high = low + shift, high + shift
    size = mmap.PAGESIZE
    first, last = low // size, (high - 1) // size
    for page in _evenly(last - first + 1, _N_SAMPLES):
        start, stop = (first + page) * size, (first + page + 1) * size
        start, stop = max(low, start), min(high, stop)
        yield os.pread(view.segment.fd, stop - start, start)


def _items(array: Any, axis: int) -> Iterator[np.ndarray]:
    """Items of an array-like."""
    n_items = array.shape[axis]
    item_nbytes = array.dtype.itemsize * int(np.prod(array.shape)) // max(1, n_items)
    read = ArrayLikeSource(Call(array), axis).open()
    n_samples = min(_N_SAMPLES, _SAMPLED_NBYTES // max(1, item_nbytes))
    for item in _evenly(n_items, max(2, n_samples)):
        yield np.asarray(read(item, item + 1))


def _evenly(n: int, n_samples: int) -> list[int]:
    """So many of n numbers, at even distances: the first, the last, and between them."""
    return np.unique(np.linspace(0, n - 1, min(n, n_samples)).astype(int)).tolist() if n else []
