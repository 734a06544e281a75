"""Every test, doctests among them, fails if it leaves something behind.

It stands at the root because it also covers the doctests of the package.

Watched are threads, processes, file descriptors, the temporary folder and /dev/shm. Warm workers
are no leak: they are there for the next call. So if a test ends with more than it found, garbage is
collected, then the workers are ended by `taskcarrier.shutdown()`, and what is still there and was
neither there before the test nor when the session began is a leak. `tests/test_conftest.py` sees
each sort found.

Only what this session's own process tree has made is looked at, so other programs, another session
of these tests among them, may run beside it. The session has a folder of its own. TMPDIR is in it:
every entry there is ours, and the path marks our processes. (An orphan has left the tree of
children, but its environment still names the folder.) The folders of pytest's `tmp_path` are in it
too; sessions that share one clean up for each other. What of /dev/shm is ours is decided in
`tests/shared_memory.py`.
"""

import builtins
import collections
import contextlib
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import psutil
import pytest

from tests.shared_memory import SHARED, SharedMemoryWatch, all_entries

pytest_plugins = ["tests.sampling"]
collect_ignore = ["tests/typing"]  # what type checkers read; it is not run

DESCRIPTORS = Path("/proc/self/fd")
FOLDER = Path(tempfile.mkdtemp(prefix="taskcarrier-tests-"))
TEMPORARY = FOLDER / "temporary"  # watched
TMP_PATHS = FOLDER / "pytest"  # not watched: pytest keeps what is in it until the session ends
SHARED_MEMORY = SharedMemoryWatch()
# These are not ours, so they are left out of checks of all processes, which run very often.
THERE_BEFORE = set(psutil.pids())
MANY_OBJECTS = 30_000  # a collection takes some 30 ms then
GRACE = 5.0  # seconds for threads and processes that are already ending; arbitrary

# The name of each sort of leak, and what identifies one: an object, a pid, a number and its
# target, a path. Values are shown in the failure.
Things = dict[str, dict[Any, str]]

# A first call starts workers or compiles, later ones do not: no deadline tells the two apart.
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=100)
hypothesis.settings.load_profile("quick")
# CI uses the same examples every time; elsewhere, each run draws others.
quick = hypothesis.settings.get_profile("quick")
hypothesis.settings.register_profile("ci", quick, derandomize=True)


def pytest_configure(config: pytest.Config) -> None:
    # Background jobs of a shell, and their children, ignore Ctrl-C from the start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[previous] = {
        name: os.environ.get(name)
        for name in ("TMPDIR", "PYTEST_DEBUG_TEMPROOT", "JOBLIB_TEMP_FOLDER")
    }
    TEMPORARY.mkdir()
    TMP_PATHS.mkdir()
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(TMP_PATHS))
    # This would name another folder than TMPDIR, which would not be watched.
    os.environ.pop("JOBLIB_TEMP_FOLDER", None)
    os.environ["TMPDIR"] = str(TEMPORARY)
    tempfile.tempdir = None  # asks the environment again
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        # NumPy 1 counts the threads that have an errstate of their own without a lock: the end of
        # one thread's takes away another's, whose warnings are then errors here.
        config.addinivalue_line("filterwarnings", "ignore:.* encountered in :RuntimeWarning")


def pytest_unconfigure(config: pytest.Config) -> None:
    # The tmp_path of a failed test is kept for the search for its cause.
    shutil.rmtree(TEMPORARY if failed in config.stash else FOLDER, ignore_errors=True)
    for name, value in config.stash[previous].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    tempfile.tempdir = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and call.when != "teardown":  # a teardown fails by our own complaints
        item.stash[failed] = item.config.stash[failed] = True
    return report


previous = pytest.StashKey[dict[str, str | None]]()
failed = pytest.StashKey[bool]()


@hypothesis.settings(max_examples=1, derandomize=True, database=None)
@hypothesis.given(hypothesis.strategies.none())
def run_one_example(_: None) -> None:
    """Have Hypothesis make its generator: it checks its referrers, which `gc.freeze` hides."""


@pytest.fixture(scope="session", autouse=True)
def leak_baseline(request: pytest.FixtureRequest) -> Iterator[Things]:
    """Record what exists before the first test; nothing more may exist after the last."""
    run_one_example()
    before = everything()
    yield before
    leaked = left_behind(before)
    if failed in request.config.stash:
        leaked.pop("descriptor", None)  # see no_leaks
    complain(leaked, "the session")


@pytest.fixture(scope="module", autouse=True)
def old_objects_are_not_looked_at(leak_baseline: Things) -> None:  # noqa: ARG001  # before the first call of shutdown
    """Exempt what exists before a module, mostly imports, from collections, to make them quick.

    They took 0.2 s each, several thousand times.
    """
    if len(gc.get_objects()) < MANY_OBJECTS:  # of those that are looked at
        return
    package = sys.modules.get("taskcarrier")
    if package is not None:  # workers may become garbage, so they are started again
        package.shutdown()
    gc.collect()
    gc.freeze()


@pytest.fixture
def pools() -> None:
    """Do nothing: modules that need pools have a fixture of this name."""


@pytest.fixture(autouse=True)
def no_leaks(
    request: pytest.FixtureRequest,
    leak_baseline: Things,
    pools: None,  # noqa: ARG001  # before anything is looked at
) -> Iterator[None]:
    before = everything()
    yield
    leaked = left_behind(before, leak_baseline, watchers())
    if failed in request.node.stash:
        # The traceback of a failed test keeps its arrays alive, and they their descriptors.
        leaked.pop("descriptor", None)
    complain(leaked, "this test")


def left_behind(*allowed: Things) -> Things:
    """Return what exists now and is in none of `allowed`, after it had time to go."""
    if not (leaked := beyond(everything(), allowed)):
        return leaked
    vars(builtins).pop("_", None)  # the interpreter keeps the last value a doctest has shown here
    gc.collect()
    if not (leaked := beyond(everything(), allowed)):
        return leaked
    package = sys.modules.get("taskcarrier")
    if package is not None:  # not imported: there are no workers to end
        package.shutdown()
    deadline = time.monotonic() + GRACE
    while leaked := beyond(everything(), allowed):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
        gc.collect()
    return leaked


def complain(leaked: Things, who: str) -> None:
    if leaked:
        lines = [f"{sort}: {text}" for sort, things in leaked.items() for text in things.values()]
        pytest.fail(f"{who} left behind\n  " + "\n  ".join(lines), pytrace=False)


def everything() -> Things:
    in_memory = all_entries()  # before the processes, among which their makers then are
    children = processes()
    family = {pid for pid, _ in children} | {os.getpid()} | resource_trackers()
    in_memory = SHARED_MEMORY.entries_of(family, in_memory) - lasting_semaphores()
    return {
        "thread": threads(),
        "process": children,
        "descriptor": descriptors(),
        "temporary entry": {path: str(path) for path in TEMPORARY.iterdir()},
        "shared memory": {path: str(path) for path in in_memory},
    }


def beyond(now: Things, allowed: Iterable[Things]) -> Things:
    new = {
        sort: {
            key: text for key, text in things.items() if not any(key in a[sort] for a in allowed)
        }
        for sort, things in now.items()
    }
    return {sort: things for sort, things in new.items() if things}


def threads() -> dict[object, str]:
    # The object, not its ident: idents are reused as soon as a thread ends.
    return {thread: repr(thread) for thread in threading.enumerate()}


def watchers() -> Things:
    """Return the threads that are kept for the next call, which must be gone only at the end."""
    kept = {
        thread: text for thread, text in threads().items() if thread.name == "taskcarrier-watcher"
    }
    return collections.defaultdict(dict, thread=kept)


def processes() -> dict[tuple[int, float], str]:
    """Return all children, grandchildren and orphans, including zombies."""
    parents = {pid: parent_of(pid) for pid in psutil.pids() if pid not in THERE_BEFORE}
    pids = {pid for pid in parents if is_marked(pid)}
    above = {os.getpid()}
    while above:
        above = {pid for pid, parent in parents.items() if parent in above}
        pids |= above
    found = {}
    for pid in pids - resource_trackers():
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            child = psutil.Process(pid)
            # Pids are reused; the time tells such processes apart.
            found[pid, child.create_time()] = f"{pid} {child.status()} {' '.join(cmdline(child))}"
    return found


def parent_of(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:  # noqa: PTH123 - read hundreds of times a test
            return int(stat.read().rpartition(b")")[2].split()[1])
    except OSError:  # gone
        return None


def is_marked(pid: int) -> bool:
    """Tell whether a process was started with our temporary folder, or with one inside it."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as environment:  # noqa: PTH123 - read hundreds of times a test
            return b"TMPDIR=" + bytes(FOLDER) in environment.read()
    except OSError:  # gone, or somebody else's
        return False


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.ZombieProcess, psutil.AccessDenied):
        return [process.name()]


def descriptors() -> dict[object, str]:
    trackers = {tracker._fd for tracker in loaded_trackers()}
    found = {}
    for entry in DESCRIPTORS.iterdir():
        number = int(entry.name)
        try:
            target = entry.readlink()
        except OSError:  # the one that listed this folder
            continue
        if number not in trackers:
            found[number, target] = f"{number} -> {target}"
    return found


def loaded_trackers() -> list:
    """Return the trackers of multiprocessing and loky: one a program, until its end."""
    names = ("multiprocessing.resource_tracker", "joblib.externals.loky.backend.resource_tracker")
    return [sys.modules[name]._resource_tracker for name in names if name in sys.modules]


def resource_trackers() -> set[int]:
    return {tracker._pid for tracker in loaded_trackers()}


def lasting_semaphores() -> set[Path]:
    """Return that of numba: one a program, until its end.

    It has a name where multiprocessing does not fork by default, as on Python 3.14.
    """
    parallel = sys.modules.get("numba.np.ufunc.parallel")
    semaphore = getattr(getattr(parallel, "_backend_init_process_lock", None), "_semlock", None)
    name = getattr(semaphore, "name", None)
    return set() if name is None else {SHARED / f"sem.{name.removeprefix('/')}"}
