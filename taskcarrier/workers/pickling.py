"""How tasks, items and results are pickled for the way between parent and workers.

A payload is a task pickled once for all workers of a run: the pickle, a table of the large
buffers in it (copied once into the run's staging segment, not per worker), and the file
descriptors of all segments that the task refers to. Descriptors are sent by ``SCM_RIGHTS`` over
the worker's own socket, so no name, no shared folder and no other process is involved.

Functions of ``__main__``, closures and lambdas are pickled by value, as they are at the time
of the call. Functions of importable modules are pickled by name.
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
from types import CodeType, FunctionType
from typing import Any

import numpy as np

from taskcarrier.memory.available import is_no_room
from taskcarrier.memory.memmaps import find_shared, find_writable
from taskcarrier.memory.segments import Mode, Segment, SharedView
from taskcarrier.memory.staging import SHARED_NBYTES, Staging
from taskcarrier.memory.strides import is_mostly_gaps
from taskcarrier.notes import add_note, count_noun, warn_user
from taskcarrier.system.descriptors import Descriptor
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.call import Call
from taskcarrier.workers.pickled_functions import reduce_cached, reduce_dispatching
from taskcarrier.workers.processes.messages import MAX_DESCRIPTORS

try:
    import cloudpickle
except ImportError:  # joblib before 1.6 has its own copy
    from joblib.externals import cloudpickle

_cloudpickle_impl = sys.modules[cloudpickle.Pickler.__module__]

_unpacking = threading.local()


class Payload:
    """A packed task: ``data`` and the descriptors ``fds`` that must be sent with it.

    The descriptors belong to ``segments``, which live as long as the payload. ``notes`` say what
    was noticed in the user's function. ``shares`` are what each worker gets of its own, if any
    (`taskcarrier.workers.processes.share_jobs`).
    """

    shares: Sequence[bytes] = ()

    def __init__(self, data: bytes, segments: list[Segment], notes: Sequence[str] = ()) -> None:
        self.data = data
        self.segments = segments
        self.notes = notes

    @property
    def fds(self) -> list[int]:
        """The descriptors, in the order in which the pickle refers to them."""
        return [segment.fd for segment in self.segments]

    def get_share(self, number: int) -> bytes:
        """Return what only the worker with this number gets."""
        return self.shares[number] if self.shares else b""


def pickle_task(task: object, staging: Staging, pickler: TaskPickler | None = None) -> Payload:
    """Pickle a task for the workers of one run, with `pickler` if that has pickled its call before.

    What pickling raises is raised with a note; at that time nothing has been started yet.
    """
    pickler = pickler or TaskPickler(staging)
    try:
        pickled = pickler.pickle(task)
    except Exception as error:
        if not is_no_room(error):  # a lack of memory is no fault of the function
            add_note(
                error,
                "taskcarrier could not pickle the function or its arguments for worker processes; "
                "make them picklable, or use backend='threading'",
            )
        raise
    table = []
    for raw in pickler.large:
        segment, offset = staging.add(raw)
        table.append((pickler.get_number(segment), offset, len(raw)))
    if len(pickler.segments) > MAX_DESCRIPTORS:
        raise ValueError(
            f"one call can take at most {MAX_DESCRIPTORS} separate shared arrays, got "
            f"{len(pickler.segments)}; copy some of them, or put those that func writes to into one"
        )
    return Payload(pickle.dumps((pickled, table)), pickler.segments, pickler.make_notes())


def unpickle_task(data: bytes, descriptors: list[Descriptor]) -> Any:
    """Return the task of a payload, in a worker; its segments take over the descriptors."""
    segments = [Segment(descriptor, on_disk=False) for descriptor in descriptors]
    for segment in segments:
        # What the parent wrote was reserved; an output still empty is reserved by its writer.
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


class TaskPickler:
    """A pickler for the task of one run.

    Parameters
    ----------
    staging : Staging
        Where copies for the workers go.
    copies : dict of (int, ndarray), optional
        What is pickled instead of arrays, by their `id`.

    Attributes
    ----------
    segments : list of Segment
        The segments that the pickle refers to by their position.
    large : list of memoryview
        The bytes of large arrays, which are not in the pickle.
    """

    def __init__(self, staging: Staging, copies: dict[int, np.ndarray] | None = None) -> None:
        self._staging = staging
        self.copies = copies or {}
        self.segments: list[Segment] = []
        self.large: list[memoryview] = []
        self._early: dict[int, tuple[Call, bytes]] = {}
        self._large_nbytes: list[int] = []  # of all large arrays so far
        self._func_nbytes: list[int] = []  # of those among them that functions carry

    def pickle(self, task: object) -> bytes:
        """Return the pickle of a task."""
        file = io.BytesIO()
        pickler = pickle.Pickler(file, protocol=5)
        # `Any`: typeshed has different return types for the reducers of the two tables.
        reducers: Any = {Segment: self._reduce_segment, Call: self._reduce_call}
        # A plain dict is fast; it is looked up for every object.
        pickler.dispatch_table = {**copyreg.dispatch_table, **reducers}
        pickler.dump(task)
        return file.getvalue()

    def pickle_early(self, call: Call) -> None:
        """Pickle a call as it is now; its large arrays are read when its task is pickled."""
        self._early[id(call)] = call, self.pickle_call(call)

    def get_number(self, segment: Segment) -> int:
        """Return the position of a segment among those that the pickle refers to."""
        for number, known in enumerate(self.segments):
            if known is segment:
                return number
        self.segments.append(segment)
        return len(self.segments) - 1

    def _reduce_segment(self, segment: Segment) -> tuple[Any, ...]:
        return _get_segment, self._describe_segment(segment)

    def _describe_segment(self, segment: Segment) -> tuple[int, bool, int]:
        return self.get_number(segment), segment.on_disk, segment.get_label()

    def _reduce_call(self, call: Call) -> tuple[Any, ...]:
        early = self._early.get(id(call))
        return _load_call_of_task, (self.pickle_call(call) if early is None else early[1],)

    def pickle_call(self, call: Call) -> bytes:
        """Return the pickle of a call, for `load_call`."""
        # Only the user's own objects need cloudpickle, which takes about 10 µs for each class that
        # it meets; the rest of a task is the library's.
        file = io.BytesIO()
        pickler = _UserPickler(file, self)
        n_before = len(self._large_nbytes)
        pickler.is_at_function = True
        pickler.dump(call.func)
        pickler.is_at_function = False
        self._func_nbytes += self._large_nbytes[n_before:]
        pickler.dump((call.args, call.kwargs))
        return file.getvalue()

    def make_notes(self) -> list[str]:
        """Return notes for the report on arrays in closures, partials and bound methods."""
        if not self._func_nbytes:
            return []
        arrays = (
            f"{count_noun(len(self._func_nbytes), 'array')} of {sum(self._func_nbytes):,} bytes"
        )
        cost = "each call copies them to shared memory, if they are not there yet (see `share`)"
        return [f"the function carries {arrays}: {cost}"]

    def get_view(self, array: np.ndarray) -> SharedView | None:
        """Return a view that is sent in place of the user's array; None to pickle the array.

        An array that is shared already, or lies in a file, is not copied. Of other arrays, pickle
        keeps the strides only if they are contiguous; with other strides the function would add up
        in another order, so these arrays are copied to a segment with their strides.
        """
        if array.dtype.hasobject or array.nbytes == 0:
            return None
        view = find_shared(array)
        if view is None and not (array.flags.forc or is_mostly_gaps(array)):
            (view,) = self._staging.share([array])
        if view is not None and array.nbytes >= SHARED_NBYTES:
            self._large_nbytes.append(array.nbytes)
        return view

    def describe(self, view: SharedView, mode: Mode) -> tuple[Any, ...]:
        """Return the arguments of `_open_view`, which can travel inside the user's pickle."""
        segment = view.segment
        assert segment is not None  # for the type checker
        place = (view.offset, view.shape, view.strides, view.dtype)
        return self._describe_segment(segment), place, mode

    def keep_in_band(self, buffer: Any) -> bool:
        """Return whether a buffer stays in the pickle; keep the bytes of others."""
        raw = _get_large_bytes(buffer)
        if raw is None:
            return True
        self.large.append(raw)
        self._large_nbytes.append(len(raw))
        return False


def _get_large_bytes(buffer: Any) -> memoryview | None:
    """Return the bytes of a buffer if they are large enough for shared memory, else None."""
    try:
        raw: memoryview = buffer.raw()
    except BufferError:  # not contiguous: pickle copies it
        return None
    return None if len(raw) < SHARED_NBYTES else raw


def is_sent_by_name(func: object) -> bool:
    """Return whether cloudpickle sends a function by its name, as plain pickle would."""
    if type(func) is not FunctionType:
        return False
    if getattr(_cloudpickle_impl, "_PICKLE_BY_VALUE_MODULES", True):  # the program has named some
        return False
    module: Any = sys.modules.get(func.__module__ or "")
    if module is None or func.__module__ in {"__main__", "__mp_main__"}:
        return False
    return getattr(module, func.__qualname__, None) is func


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped
    """A cloudpickle pickler that keeps the file names of functions, so tracebacks show lines.

    cloudpickle 3.1.3 drops the name, so that equal functions have equal pickles.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The main module of a child that multiprocessing started has no name that workers know.
        main = sys.modules["__main__"]
        if main.__name__ == "__mp_main__":
            cloudpickle.register_pickle_by_value(main)
        super().__init__(*args, **kwargs)

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is pickled; `NotImplemented` to leave that to its class."""
        if type(obj) is CodeType:
            return _make_code_of_file, (obj.co_filename, *self.dispatch_table[CodeType](obj))
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented:
            return reduce_cached(obj)
        # Slots of tuples are empty, and the class of a `NamedTuple` cannot be given any.
        if isinstance(obj, type) and "__slots__" in vars(obj) and not issubclass(obj, tuple):
            return _add_slots(obj, *reduced)
        return reduce_dispatching(obj) or reduced


def _add_slots(kind: type, make: Any, args: tuple[Any, ...], *rest: Any) -> tuple[Any, ...]:
    """Add ``__slots__`` to what cloudpickle sends of a class, so its objects have no dict there.

    cloudpickle 3.1.3 makes the class before it sets ``__slots__``, which then has no effect: the
    pickled state of its objects does not fit the class in the other process.
    """
    if make is _cloudpickle_impl._make_skeleton_class:
        constructor, name, bases, namespace, *others = args
        namespace = {**namespace, "__slots__": vars(kind)["__slots__"]}
        args = constructor, name, bases, namespace, *others
    return make, args, *rest


def _make_code_of_file(name: str, make: Callable[..., CodeType], args: tuple[Any, ...]) -> CodeType:
    return make(*args).replace(co_filename=name)


def dumps(
    obj: object,
    buffer_callback: Callable[[Any], bool] | None = None,
    *,
    pickler: type[Pickler] = Pickler,
) -> bytes:
    """Pickle an object of the user."""
    file = io.BytesIO()
    pickler(file, protocol=5, buffer_callback=buffer_callback).dump(obj)
    return file.getvalue()


def pickle_apart(own: object, shared: object) -> list[memoryview]:
    """Pickle for workers that get no descriptors: only bytes, each piece once for all workers.

    The pieces are a pickle of `own`, of which each worker gets its own copy, a pickle of `shared`,
    which all only read, and then the memory of each large array in `shared`, as it lies.

    Warns
    -----
    UserWarning
        If `own` has arrays in which the caller, on any other backend, would see what func writes.
    """
    large: list[memoryview] = []
    packed = dumps(shared, functools.partial(_keep_in_band, large))
    file = io.BytesIO()
    pickler = _CopyingPickler(file, protocol=5)
    pickler.dump(own)
    if pickler.n_copied:
        warn_user(
            f"func carries {count_noun(pickler.n_copied, 'array')} made by empty, share or load, "
            "or mapped for writing. On this backend workers get copies: what func writes to them "
            "is lost. If it only reads them, set their flags.writeable = False"
        )
    return [file.getbuffer(), memoryview(packed), *(raw.toreadonly() for raw in large)]


class _CopyingPickler(Pickler):
    """A pickler that counts arrays to which a function might write in vain."""

    n_copied = 0

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray) and find_writable(obj) is not None:
            self.n_copied += 1
        return super().reducer_override(obj)


class _UserPickler(Pickler):
    """A pickler for the user's function and arguments; sends views of arrays where it can.

    Attributes
    ----------
    is_at_function : bool
        Whether the function is being pickled now: it may write to arrays that it carries.
    """

    is_at_function = False

    def __init__(self, file: io.BytesIO, task_pickler: TaskPickler) -> None:
        super().__init__(file, protocol=5, buffer_callback=task_pickler.keep_in_band)
        self._task_pickler = task_pickler

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            if (copy := self._task_pickler.copies.get(id(obj))) is not None:
                return copy.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
            view = find_writable(obj) if self.is_at_function else None
            if view is not None:
                view_args = self._task_pickler.describe(view, "write")
                if type(obj) is np.ndarray or isinstance(obj, np.memmap):
                    return _open_view, view_args
                state = object.__getstate__(obj)
                return _open_subclass, (view_args, type(obj)), state, None, None, _restore_state
            if type(obj) is np.ndarray or isinstance(obj, np.memmap):
                view = self._task_pickler.get_view(obj)
                if view is not None:
                    return _open_view, self._task_pickler.describe(view, "private")
        return super().reducer_override(obj)


def _load_call_of_task(pickled: bytes) -> Call:
    return load_call(pickled, _unpacking.buffers)


def _open_subclass(view_args: tuple[Any, ...], kind: type[np.ndarray]) -> np.ndarray:
    return _open_view(*view_args).view(kind)


def _restore_state(array: np.ndarray, state: Any) -> None:
    """Set what an array of a subclass has beside its values: attributes, and slots."""
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        vars(array).update(attributes)
    for name, value in (slots or {}).items():
        object.__setattr__(array, name, value)


def _open_view(segment: tuple[Any, ...], place: tuple[Any, ...], mode: Mode) -> np.ndarray:
    """Open a view in a worker. What is written stays in the worker, unless the mode is "write"."""
    return SharedView(_get_segment(*segment), *place).open(mode)


def _get_segment(number: int, on_disk: bool, label: int) -> Segment:
    segment: Segment = _unpacking.segments[number]
    segment.on_disk = on_disk
    segment.label = label
    return segment


def load_call(pickled: bytes, buffers: Iterable[Any]) -> Call:
    """Return a call in a worker; `buffers` are its large arrays."""
    unpickler = pickle.Unpickler(io.BytesIO(pickled), buffers=buffers)
    func = unpickler.load()
    return Call(func, *unpickler.load())


def pickle_items(items: object, beside: list[memoryview] | None = None) -> bytes:
    """Pickle items of a list, or results: by plain pickle if possible, else by cloudpickle.

    Plain pickle is thirteen times faster on small chunks, but it sends objects of ``__main__`` by
    name, and in a worker ``__main__`` is another module.

    If `beside` is given, the bytes of large arrays are appended to it instead of being pickled, and
    must be passed to `unpickle_items` with the pickle.
    """
    keep = None if beside is None else functools.partial(_keep_in_band, beside)
    try:
        packed = pickle.dumps(items, protocol=5, buffer_callback=keep)
    except Exception as error:
        if is_raised_by_handler(error):
            raise
        packed = b"_main__"  # lambdas, local classes, ...: only an error of cloudpickle counts
    if b"_main__" not in packed:  # neither `__main__` nor `__mp_main__`
        return packed
    if beside is not None:
        beside.clear()
    return dumps(items, keep)


def _keep_in_band(beside: list[memoryview], buffer: Any) -> bool:
    raw = _get_large_bytes(buffer)
    if raw is not None:
        beside.append(raw)
    return raw is None


def unpickle_items(packed: bytes, beside: Iterable[Any] = ()) -> Any:
    """Return what `pickle_items`, or a worker in another way, has pickled; called in the parent.

    A class that the parent sent to a worker by value comes back by value with its instances.
    cloudpickle then finds the parent's own class, but sets all its attributes again, to functions
    with the worker's globals. Here a class that exists already is left as it is.
    """
    if b"cloudpickle" not in packed:
        return pickle.loads(packed, buffers=beside)
    return _Unpickler(io.BytesIO(packed), buffers=beside).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, *, buffers: Iterable[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._existing: list[type] = []

    def find_class(self, module: str, name: str) -> Any:
        obj = super().find_class(module, name)
        if name in {"_make_skeleton_class", "_make_skeleton_enum"}:
            return functools.partial(self._make_class, obj)
        if name == "_class_setstate":
            return functools.partial(self._set_state, obj)
        return obj

    def _make_class(self, make: Any, *args: Any) -> Any:
        before = set(getattr(_cloudpickle_impl, "_DYNAMIC_CLASS_TRACKER_BY_ID", {}).values())
        kind = make(*args)
        if kind in before:
            self._existing.append(kind)
        return kind

    def _set_state(self, set_state: Any, kind: type, state: Any) -> type:
        return kind if kind in self._existing else set_state(kind, state)
