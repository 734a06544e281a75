"""What travels to a worker process, and how it is packed.

A payload is a task pickled once for all workers of a run: the pickle, a table of the large
buffers in it (copied once into the run's staging segment, not per worker), and the file
descriptors of every segment the task refers to. Descriptors cross by ``SCM_RIGHTS`` over the
worker's own socket, so no name, no shared folder and no other process is involved.

Functions of ``__main__``, closures and lambdas are pickled by value, as they are at the time
of the call; functions of importable modules by name.
"""

from __future__ import annotations

import copyreg
import functools
import io
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any

import numpy as np

from taskcarrier.memory.available import is_no_room
from taskcarrier.memory.memmaps import find_shared, find_writable
from taskcarrier.memory.segments import Mode, Segment, SharedView
from taskcarrier.memory.staging import Staging
from taskcarrier.memory.strides import is_mostly_gaps
from taskcarrier.notes import add_note, advise, count_noun
from taskcarrier.system.descriptors import Descriptor
from taskcarrier.system.interrupts import is_of_the_program
from taskcarrier.workers.call import Call
from taskcarrier.workers.pickled_functions import reduce_cached, reduce_dispatching
from taskcarrier.workers.processes.messages import _MAX_DESCRIPTORS

try:
    import cloudpickle
except ImportError:  # joblib before 1.6 carries its own
    from joblib.externals import cloudpickle

_cloudpickle_impl = sys.modules[cloudpickle.Pickler.__module__]

# Arrays in arguments, closures and results from this size on go into shared memory.
_SHARED_NBYTES = 1 << 14

_unpacking = threading.local()


class Payload:
    """A packed task: ``data`` and the descriptors ``fds`` that must travel beside it.

    The descriptors belong to the segments in ``segments``, which are kept so long. What was found
    in the user's function is said in ``notes``.
    """

    def __init__(self, data: bytes, segments: list[Segment], notes: Sequence[str] = ()) -> None:
        self.data = data
        self.segments = segments
        self.notes = notes

    @property
    def fds(self) -> list[int]:
        """Descriptors in the order in which the pickle refers to them."""
        return [segment.fd for segment in self.segments]


def pickle_task(task: object, staging: Staging) -> Payload:
    """Pickle a task for the workers of one run.

    Raises whatever pickling the task raises, with a note; nothing has been started by then.
    """
    packer = _Packer(staging)
    try:
        pickled = packer.pickle(task)
    except Exception as error:
        if not is_no_room(error):  # which is no fault of theirs
            add_note(
                error,
                "taskcarrier could not pickle the function or its arguments for worker processes; "
                "make them picklable, or use backend='threading'",
            )
        raise
    if packer.buffers:
        table = [(packer.number(segment), offset, n) for segment, offset, n in packer.buffers]
    else:
        table = []
    if len(packer.segments) > _MAX_DESCRIPTORS:
        raise ValueError(
            f"one call can take at most {_MAX_DESCRIPTORS} separate shared arrays, got "
            f"{len(packer.segments)}; copy some of them, or put those that func writes to into one"
        )
    return Payload(pickle.dumps((pickled, table)), packer.segments, packer.notes())


def unpickle_task(data: bytes, descriptors: list[Descriptor]) -> Any:
    """The task of a payload, in a worker; the descriptors now belong to its segments."""
    segments = [Segment(descriptor, on_disk=False) for descriptor in descriptors]
    for segment in segments:
        # What the caller wrote was reserved; an output still empty is reserved by who fills it.
        segment.nbytes = os.fstat(segment.fd).st_size
    pickled, table = pickle.loads(data)
    mappings = {number: segments[number].map("private") for number in {row[0] for row in table}}
    _unpacking.segments = segments
    _unpacking.buffers = iter(
        [memoryview(mappings[number])[offset : offset + nbytes] for number, offset, nbytes in table]
    )
    try:
        return pickle.loads(pickled)
    finally:
        del _unpacking.segments, _unpacking.buffers


class _Packer:
    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self.segments: list[Segment] = []
        self.buffers: list[tuple[Segment, int, int]] = []
        self._found: list[int] = []  # bytes of large arrays so far
        self._carried: list[int] = []  # of those in functions

    def pickle(self, task: object) -> bytes:
        file = io.BytesIO()
        pickler = pickle.Pickler(file, protocol=5)
        # typeshed's idea of what a reducer returns differs between the two tables.
        reducers: Any = {Segment: self._reduce_segment, Call: self._reduce_call}
        # A plain dict: it is asked about every object.
        pickler.dispatch_table = {**copyreg.dispatch_table, **reducers}
        pickler.dump(task)
        return file.getvalue()

    def number(self, segment: Segment) -> int:
        for number, known in enumerate(self.segments):
            if known is segment:
                return number
        self.segments.append(segment)
        return len(self.segments) - 1

    def _reduce_segment(self, segment: Segment) -> tuple[Any, ...]:
        return _get_segment, self._terms(segment)

    def _terms(self, segment: Segment) -> tuple[int, bool, int]:
        return self.number(segment), segment.on_disk, segment.get_label()

    def _reduce_call(self, call: Call) -> tuple[Any, ...]:
        # Only what the user gave needs cloudpickle, which takes some 10 µs for each class it
        # meets; the rest of a task is the library's own.
        file = io.BytesIO()
        pickler = _UserPickler(file, self)
        n_before = len(self._found)
        pickler.is_at_function = True
        pickler.dump(call.func)
        pickler.is_at_function = False
        self._carried += self._found[n_before:]
        pickler.dump((call.args, call.kwargs))
        return _load_call, (file.getvalue(),)

    def notes(self) -> list[str]:
        """What the report says of closures, partials and bound methods."""
        if not self._carried:
            return []
        what = f"{count_noun(len(self._carried), 'array')} of {sum(self._carried):,} bytes"
        where = "each call copies them to shared memory, if they are not there yet (see `share`)"
        return [f"the function carries {what}: {where}"]

    def view(self, array: np.ndarray) -> SharedView | None:
        """Where an array that the user gave goes as it lies; None to pickle it.

        What is shared already or lies in a file is not copied. Of other arrays pickle keeps the
        strides only if they are contiguous, and the function would add up in another order.
        """
        if array.dtype.hasobject or array.nbytes == 0:
            return None
        view = find_shared(array)
        if view is None and not (array.flags.forc or is_mostly_gaps(array)):
            (view,) = self._staging.share([array])
        if view is not None and array.nbytes >= _SHARED_NBYTES:
            self._found.append(array.nbytes)
        return view

    def describe(self, view: SharedView, mode: Mode) -> tuple[Any, ...]:
        """A view in terms that travel inside the user's pickle."""
        segment = view.segment
        assert segment is not None  # for the type checker
        place = (view.offset, view.shape, view.strides, view.dtype)
        return self._terms(segment), place, mode

    def keep_in_band(self, buffer: Any) -> bool:
        block = _large_block(buffer)
        if block is None:
            return True
        segment, offset = self._staging.add(block)
        self.buffers.append((segment, offset, len(block)))
        self._found.append(len(block))
        return False


def _large_block(buffer: Any) -> memoryview | None:
    """The bytes of a buffer that are better off in shared memory than in a pickle."""
    try:
        block: memoryview = buffer.raw()
    except BufferError:  # not contiguous: pickle copies it
        return None
    return None if len(block) < _SHARED_NBYTES else block


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped
    """cloudpickle, but functions keep the name of their file, for tracebacks that show lines.

    cloudpickle 3.1.3 drops the name, so that equal functions have equal pickles.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The main module of a child that multiprocessing has started is no module in our workers.
        main = sys.modules["__main__"]
        if main.__name__ == "__mp_main__":
            cloudpickle.register_pickle_by_value(main)
        super().__init__(*args, **kwargs)

    def reducer_override(self, obj: Any) -> Any:
        """How an object is pickled, if not as its class says."""
        if type(obj) is CodeType:
            return _code_of_file, (obj.co_filename, *self.dispatch_table[CodeType](obj))
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented:
            return reduce_cached(obj)
        # Slots of tuples are empty, and the class of a `NamedTuple` refuses to be given any.
        if isinstance(obj, type) and "__slots__" in vars(obj) and not issubclass(obj, tuple):
            return _keep_slots(obj, *reduced)
        return reduce_dispatching(obj) or reduced


def _keep_slots(kind: type, make: Any, args: tuple[Any, ...], *rest: Any) -> tuple[Any, ...]:
    """What cloudpickle sends of a class; its objects have no dict in the worker either.

    cloudpickle 3.1.3 makes the class before it sets ``__slots__``, which has no effect then: what
    pickle sends of its objects does not fit those of the other process.
    """
    if make is _cloudpickle_impl._make_skeleton_class:
        constructor, name, bases, namespace, *others = args
        namespace = {**namespace, "__slots__": vars(kind)["__slots__"]}
        args = constructor, name, bases, namespace, *others
    return make, args, *rest


def _code_of_file(name: str, make: Callable[..., CodeType], args: tuple[Any, ...]) -> CodeType:
    return make(*args).replace(co_filename=name)


def dumps(
    obj: object,
    buffer_callback: Callable[[Any], bool] | None = None,
    *,
    pickler: type[Pickler] = Pickler,
) -> bytes:
    """An object of the user's, pickled."""
    file = io.BytesIO()
    pickler(file, protocol=5, buffer_callback=buffer_callback).dump(obj)
    return file.getvalue()


def pickle_apart(own: object, shared: object) -> list[memoryview]:
    """What workers without descriptors are sent: only bytes, each piece once for all of them.

    A pickle of what becomes a worker's own, one of what is read by all, and then the memory of
    each large array in the latter, as it lies.

    Warns
    -----
    UserWarning
        Of arrays in `own` that the caller would see written in any other backend.
    """
    blocks: list[memoryview] = []
    packed = dumps(shared, functools.partial(_keep_in_band, blocks))
    file = io.BytesIO()
    pickler = _CopyingPickler(file, protocol=5)
    pickler.dump(own)
    if pickler.n_copied:
        advise(
            f"func carries {count_noun(pickler.n_copied, 'array')} made by empty, share or load, or "
            "mapped for writing. On this backend workers get copies: what func writes to them is "
            "lost. If it only reads them, set their flags.writeable = False"
        )
    return [file.getbuffer(), memoryview(packed), *(b.toreadonly() for b in blocks)]


class _CopyingPickler(Pickler):
    """Counts the arrays that a function might write to in vain."""

    n_copied = 0

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray) and find_writable(obj) is not None:
            self.n_copied += 1
        return super().reducer_override(obj)


class _UserPickler(Pickler):
    """Pickles what the user gave; arrays go as descriptions where they can.

    Attributes
    ----------
    is_at_function : bool
        Whether it is the function that is pickled: it may write to arrays that it carries.
    """

    is_at_function = False

    def __init__(self, file: io.BytesIO, packer: _Packer) -> None:
        super().__init__(file, protocol=5, buffer_callback=packer.keep_in_band)
        self._packer = packer

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            view = find_writable(obj) if self.is_at_function else None
            if view is not None:
                terms = self._packer.describe(view, "write")
                if type(obj) is np.ndarray or isinstance(obj, np.memmap):
                    return _open_view, terms
                state = object.__getstate__(obj)
                return _open_subclass, (terms, type(obj)), state, None, None, _restore_state
            if type(obj) is np.ndarray or isinstance(obj, np.memmap):
                view = self._packer.view(obj)
                if view is not None:
                    return _open_view, self._packer.describe(view, "private")
        return super().reducer_override(obj)


def _open_subclass(terms: tuple[Any, ...], kind: type[np.ndarray]) -> np.ndarray:
    return _open_view(*terms).view(kind)


def _restore_state(array: np.ndarray, state: Any) -> None:
    """What an array of a subclass has beside its values: attributes, and those with places."""
    attributes, places = state if isinstance(state, tuple) else (state, None)
    if attributes:
        vars(array).update(attributes)
    for name, value in (places or {}).items():
        object.__setattr__(array, name, value)


def _open_view(segment: tuple[Any, ...], place: tuple[Any, ...], mode: Mode) -> np.ndarray:
    """Private but for what a function may write to: what is written to it stays in the worker."""
    return SharedView(_get_segment(*segment), *place).open(mode)


def _get_segment(number: int, on_disk: bool, label: int) -> Segment:
    segment: Segment = _unpacking.segments[number]
    segment.on_disk = on_disk
    segment.label = label
    return segment


def _load_call(pickled: bytes) -> Call:
    unpickler = pickle.Unpickler(io.BytesIO(pickled), buffers=_unpacking.buffers)
    func = unpickler.load()
    return Call(func, *unpickler.load())


def pickle_items(items: object, beside: list[memoryview] | None = None) -> bytes:
    """Plain data (items of a list, results), by pickle where it can, else by cloudpickle.

    Plain pickle is thirteen times faster on small blocks, but writes down objects of
    ``__main__`` by name, which is another module in a worker.

    Where `beside` is given, large arrays are not in the pickle: their bytes are added to it, and
    must be at hand when the pickle is read.
    """
    keep = None if beside is None else functools.partial(_keep_in_band, beside)
    try:
        packed = pickle.dumps(items, protocol=5, buffer_callback=keep)
    except Exception as error:
        if is_of_the_program(error):
            raise
        packed = b"_main__"  # lambdas, local classes, ...: cloudpickle's error counts
    if b"_main__" not in packed:  # nor `__mp_main__`
        return packed
    if beside is not None:
        beside.clear()
    return dumps(items, keep)


def _keep_in_band(beside: list[memoryview], buffer: Any) -> bool:
    block = _large_block(buffer)
    if block is not None:
        beside.append(block)
    return block is None


def unpickle_items(packed: bytes, beside: Iterable[Any] = ()) -> Any:
    """What `pickle_items` packed, or else a worker, read in the caller.

    A class that the caller sent to a worker by value comes back by value with its instances.
    cloudpickle then finds the caller's own class, but sets all its attributes again, to functions
    with the worker's globals; here a class that exists already is left as it is.
    """
    if b"cloudpickle" not in packed:
        return pickle.loads(packed, buffers=beside)
    return _Unpickler(io.BytesIO(packed), buffers=beside).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, *, buffers: Iterable[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._existing: list[type] = []

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if name in {"_make_skeleton_class", "_make_skeleton_enum"}:
            return functools.partial(self._skeleton, found)
        if name == "_class_setstate":
            return functools.partial(self._set_state, found)
        return found

    def _skeleton(self, make: Any, *args: Any) -> Any:
        before = set(getattr(_cloudpickle_impl, "_DYNAMIC_CLASS_TRACKER_BY_ID", {}).values())
        made = make(*args)
        if made in before:
            self._existing.append(made)
        return made

    def _set_state(self, set_state: Any, kind: type, state: Any) -> type:
        return kind if kind in self._existing else set_state(kind, state)
