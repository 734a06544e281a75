"""Memory, files and descriptors that are scarce, or not there."""

import errno
import gc
import mmap
import os
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from taskcarrier import (
    StaticParallelMapper,
    empty,
    load,
    map_array,
    map_chunks,
    map_items,
    share,
)
from taskcarrier.memory import (
    available,
    segments,
)
from taskcarrier.workers.choose import count_cores
from tests.faults.helpers import output_of, unshared
from tests.strategies import OF_BALANCE, each_balance, keep_pools_warm, run_script, start_script

pytestmark = pytest.mark.one_case  # each starts programs

pools = keep_pools_warm(2)


@pytest.mark.thorough
@pytest.mark.fault(23)
def test_a_small_shared_memory_file_system_is_no_limit(tmp_path):
    prefix = unshared("mount -t tmpfs -o size=64m tmpfs /dev/shm")
    if prefix is None:
        pytest.skip("mounting needs root")
    code = """
import os
import numpy as np
from taskcarrier import map_array
if __name__ == "__main__":
    space = os.statvfs("/dev/shm")
    assert space.f_blocks * space.f_frsize == 64 << 20
    X = np.ones((1 << 19, 64))
    assert X.nbytes == 256 << 20
    Y = map_array(lambda c: c + 1, X, n_jobs=2, backend="loky")
    assert (Y == 2).all()
    print("fine")
"""
    assert run_script(tmp_path, code, prefix=prefix) == "fine\n"


NO_PROC = """
import os, sys
import numpy as np
from pathlib import Path
from taskcarrier import (
    DynamicParallelMapper,
    StaticParallelMapper,
    last_report,
    map_array,
    map_chunks,
    map_items,
    reduce_array,
    share,
)

def twice(x):
    return 2 * x

def exits_once(x):
    if x == 2 and not Path("exited").exists():
        Path("exited").touch()
        os._exit(3)
    return 2 * x

if __name__ == "__main__":
    assert os.listdir("/proc") == []
    backend = sys.argv[1]
    os.chdir(sys.argv[2])
    how = {"n_jobs": 2, "backend": backend}
    X = np.arange(300_000.0)
    np.save("X.npy", X)
    M = np.memmap("M", float, "w+", shape=X.shape)
    M[:] = X
    for given in (X, X[:3], M, X.reshape(500, 600)[:, ::3], share(X)):
        for balance in ("static", "dynamic"):
            Y = map_array(twice, given, balance=balance, **how)
            assert last_report().backend == backend
            assert np.array_equal(Y, 2 * np.asarray(given))
    assert np.array_equal(map_array(twice, "X.npy", **how), 2 * X)
    assert np.array_equal(map_array(twice, X, out="Y.npy", **how), 2 * X)
    assert np.array_equal(map_array(twice, X, out="Z.npy", resume=True, **how), 2 * X)
    assert np.array_equal(np.load("Z.npy"), 2 * X)
    assert np.array_equal(map_array(twice, M, out=np.empty_like(X), **how), 2 * X)
    assert map_items(twice, X[:9], **how).tolist() == (2 * X[:9]).tolist()
    assert sum(map(len, map_chunks(twice, X, **how))) == len(X)
    assert reduce_array(np.sum, X, combine=np.add, **how) == X.sum()
    func = exits_once if backend == "loky" else twice
    for kind in (StaticParallelMapper, DynamicParallelMapper):
        mapper = kind(2, backend=backend, temp_folder=".")
        assert mapper.map(func, range(5)) == [0, 2, 4, 6, 8]
        assert list(mapper.imap(func, range(5))) == [0, 2, 4, 6, 8]
        assert np.array_equal(mapper.map_array(twice, X), 2 * X)
    print("fine")
"""


@pytest.mark.fault(49)
@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_everything_works_without_proc(tmp_path, backend):
    prefix = unshared("mount -t tmpfs tmpfs /proc")
    if prefix is None:
        pytest.skip("mounting needs root")
    assert run_script(tmp_path, NO_PROC, backend, str(tmp_path), prefix=prefix) == "fine\n"


# What a program finds at /dev/shm, where joblib tries to make a semaphore when it is imported.
SHARED_MEMORY = {
    "full": "mount -t tmpfs -o size=4k tmpfs /dev/shm && (cat /dev/zero > /dev/shm/full || true)",
    "read-only": "mount -t tmpfs -o ro tmpfs /dev/shm",
    "absent": (
        "mount --rbind /dev '{folder}' && mount -t tmpfs tmpfs /dev && "
        "for name in null zero full random urandom tty; do "
        "touch /dev/$name && mount --bind '{folder}'/$name /dev/$name; done"
    ),
}


@pytest.mark.fault(23)
@pytest.mark.parametrize("state", SHARED_MEMORY)
def test_without_a_shared_memory_file_system_the_backend_and_number_of_workers_stay(
    state, tmp_path
):
    folder = tmp_path / "devices"
    folder.mkdir()
    prefix = unshared(SHARED_MEMORY[state].format(folder=folder) + " 2> /dev/null")
    if prefix is None:
        pytest.skip("mounting needs root")
    code = """
import sys, warnings
import numpy as np
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # joblib says that it will be serial
    import joblib
from joblib._multiprocessing_helpers import mp
from taskcarrier import DynamicParallelMapper, last_report, map_array, reduce_array
from taskcarrier.workers.choose import Choice, choose, read_facts


def plus_one(c):
    return c + 1


def how():
    report = last_report()
    return report.backend, report.n_jobs, report.reason


if __name__ == "__main__":
    assert mp is None
    X = np.arange(100_000.0)
    assert choose(2, None, read_facts()) == Choice("loky", 2, "the default")
    assert (map_array(plus_one, X, n_jobs=2, backend="loky") == X + 1).all()
    assert how() == ("loky", 2, "asked for")
    assert (map_array(np.sqrt, X, n_jobs=2, backend="threading") == np.sqrt(X)).all()
    assert how() == ("threading", 2, "asked for")
    assert reduce_array(np.sum, X, combine=np.add, n_jobs=2, backend="loky") == X.sum()
    assert how() == ("loky", 2, "asked for")
    mapper = DynamicParallelMapper(2, backend="loky")
    assert mapper(abs, range(-99, 0)) == list(range(99, 0, -1))
    assert how() == ("loky", 2, "asked for")
    assert list(mapper.imap(abs, range(-99, 0))) == list(range(99, 0, -1))
    assert how() == ("loky", 2, "asked for")
    with joblib.parallel_config(backend="threading", n_jobs=2):
        assert (map_array(plus_one, X) == X + 1).all()
    assert how() == ("threading", 2, "joblib's active configuration")
    map_array(plus_one, X, backend="threading")
    assert last_report().n_jobs == int(sys.argv[1])
    print("fine")
"""
    n_jobs = str(count_cores())
    assert run_script(tmp_path, code, n_jobs, prefix=prefix) == "fine\n"


@pytest.mark.fault(23)
def test_a_full_disk_is_an_error_with_sizes_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = unshared(f"mount -t tmpfs -o size=4m tmpfs '{disk}'")
    if prefix is None:
        pytest.skip("mounting needs root")
    code = """
import errno, gc, os, sys
import numpy as np
from taskcarrier import DynamicParallelMapper, StaticParallelMapper
if __name__ == "__main__":
    disk = sys.argv[1]
    free = os.statvfs(disk).f_bavail
    for kind in (StaticParallelMapper, DynamicParallelMapper):
        mapper = kind(2, temp_folder=disk, backend="loky")
        for X, func in (
            (np.ones(1 << 20), lambda c: c[:]),                     # the input is too large
            (np.ones(1 << 17), lambda c: np.ones((len(c), 64))),    # the output is
        ):
            try:
                mapper.map_array(func, X)
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                text = str(error)
                assert "bytes left" in text and "bytes:" in text, text
            else:
                raise SystemExit("no error")
            assert os.listdir(disk) == []
        # What fits still works.
        assert (mapper.map_array(lambda c: c + 1, np.ones(1000)) == 2).all()
        try:
            mapper(len, [b"x" * (8 << 20)])
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            raise SystemExit("no error")
    from taskcarrier import shutdown
    del mapper
    gc.collect()
    shutdown()
    assert os.statvfs(disk).f_bavail == free
    print("fine")
"""
    assert run_script(tmp_path, code, str(disk), prefix=prefix) == "fine\n"


@pytest.mark.fault(23)
@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
def test_an_output_file_that_does_not_fit_is_named_with_sizes(backend, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = unshared(f"mount -t tmpfs -o size=1m tmpfs '{disk}'")
    if prefix is None:
        pytest.skip("mounting needs root")
    code = """
import errno, os, sys
import numpy as np
from taskcarrier import map_array, map_items


def wide(rows):
    return np.ones((len(rows), 4000))


def widened(row):
    return np.ones(4000)


if __name__ == "__main__":
    disk, backend = sys.argv[1:]
    path = os.path.join(disk, "Y.npy")
    calls = [(map_array, wide), (map_items, widened)]
    for verb, func in calls:
        for more in ({}, {"resume": True}, {"on_error": "collect"}):
            try:
                verb(func, np.arange(100.0), out=path, n_jobs=2, backend=backend, **more)
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                assert error.filename == path + ".part", error
                assert "no room for a file of 3,200,128 bytes" in str(error), error
                assert "bytes left" in str(error), error
            else:
                raise SystemExit("no error")
            assert not os.path.exists(path)
            for left in os.listdir(disk):  # of resume=True
                os.unlink(os.path.join(disk, left))
    print("fine")
"""
    assert run_script(tmp_path, code, str(disk), backend, prefix=prefix) == "fine\n"


@pytest.mark.fault(23)
def test_a_limit_on_file_sizes_is_named_with_sizes(tmp_path):
    code = """
import errno, os, resource, sys
import numpy as np
from taskcarrier import DynamicParallelMapper, map_array, map_chunks, share


def wide(rows):
    return np.ones((len(rows), 1000))


def large(item):
    return np.ones(1 << 18)


if __name__ == "__main__":
    (folder,) = sys.argv[1:]
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    path = os.path.join(folder, "Y.npy")
    X = np.ones(1000)
    mapper = DynamicParallelMapper(2, backend="loky")
    loky = {"backend": "loky", "n_jobs": 2}
    for call in (
        lambda: map_array(wide, X, out=path, n_jobs=1),
        lambda: map_array(wide, X, out=path, n_jobs=2, backend="threading"),
        lambda: map_array(wide, X, out=path, **loky),
        lambda: map_array(wide, X, **loky),
        lambda: map_chunks(wide, X, chunksize=500, **loky),
        lambda: map_array(len, X, args=(np.ones(1 << 18),), **loky),
        lambda: mapper.map(large, [1, 2]),
        lambda: mapper.map(len, [b"x" * (2 << 20)]),
        lambda: mapper.map(large, [1], shared={"table": np.ones(1 << 18)}),
        lambda: list(mapper.imap(large, [1, 2])),
        lambda: list(mapper.imap(len, [b"x" * (2 << 20)])),
        lambda: share(wide(X)),
    ):
        try:
            call()
        except OSError as error:
            assert error.errno == errno.EFBIG, error
            assert "may have 1,048,576 bytes (RLIMIT_FSIZE" in str(error), error
            # It is none of what the user gave.
            assert not any("pickle" in note for note in getattr(error, "__notes__", [])), error
        else:
            raise SystemExit("no error")
        assert os.listdir(folder) == []
    # Ordinary memory is no file.
    assert (map_array(wide, X, n_jobs=2, backend="threading") == 1).all()
    print("fine")
"""
    folder = tmp_path / "outputs"
    folder.mkdir()
    assert run_script(tmp_path, code, str(folder)) == "fine\n"


@pytest.mark.fault(23)
@pytest.mark.parametrize("backend", ["sequential", "threading"])
@pytest.mark.parametrize("more", [{}, {"on_error": "fill"}, {"dtype": "f4"}])
def test_memory_that_is_too_small_for_a_result_is_an_error_with_sizes(backend, more, monkeypatch):
    monkeypatch.setattr(available, "_available_memory", lambda: (100 << 20, "a test"))
    halved = more == {"dtype": "f4"}
    n = 40_000_000 if halved else 20_000_000
    for verb, func, X in (
        (map_array, lambda c: np.broadcast_to(0.0, (len(c), n // 10)), np.arange(10.0)),
        (map_items, lambda _: (1.0, np.broadcast_to(0.0, n // 10)), np.arange(10.0)),
    ):
        asked = {"dtype": (None, "f4")} if halved and verb is map_items else more
        with pytest.raises(MemoryError, match=r"the result needs 160,000,000 bytes") as info:
            verb(func, X, n_jobs=2, chunksize=1, backend=backend, **asked)
        assert "104,857,600 are available (a test)" in str(info.value)
        assert r"pass out= as a path" in str(info.value)


def plus_sum(chunk, *arrays, **more):
    return chunk + sum(one.sum() for one in (*arrays, *more.values()))


CALLS_WITH_A_FILE = {
    "array": lambda m, run: map_array(np.sqrt, m, **run),
    "view": lambda m, run: map_array(np.sqrt, m[::-3], **run),
    "plain view": lambda m, run: map_items(np.sqrt, np.asarray(m)[5:], **run),
    "second": lambda m, run: map_chunks(np.add, np.ones(len(m)), m, **run),
    "args": lambda m, run: map_array(plus_sum, np.ones(3), args=(m,), **run),
    "kwargs": lambda m, run: map_array(plus_sum, np.ones(3), kwargs={"m": m}, **run),
    "shared": lambda m, run: StaticParallelMapper(**run).map(plus_sum, [1, 2], shared={"m": m}),
    "out": lambda m, run: map_array(np.sqrt, np.ones(len(m)), out=m, **run),
}


@pytest.mark.fault(41)
class TestTruncatedFiles:
    @pytest.fixture
    def path(self, tmp_path):
        np.save(tmp_path / "X.npy", np.ones(50_000))  # after 128 bytes of header
        return tmp_path / "X.npy"

    @pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
    @pytest.mark.parametrize("how", ["numpy", "ours"])
    @pytest.mark.parametrize("call", CALLS_WITH_A_FILE)
    @pytest.mark.parametrize("left", [200_000, 400_100])
    def test_a_truncated_file_is_named_before_anything_runs(self, call, how, backend, left, path):
        mapped = load(path, "r+") if how == "ours" else np.load(path, mmap_mode="r+")
        os.truncate(path, left)
        with pytest.raises(ValueError, match=rf"X\.npy was cut off: it has {left:,} bytes") as info:
            CALLS_WITH_A_FILE[call](mapped, {"backend": backend, "n_jobs": 2})
        assert "needs 400,128" in str(info.value)

    def test_the_part_of_a_truncated_file_that_exists_can_be_mapped(self, path):
        mapped = np.memmap(path, "f8", "r", offset=128)
        os.truncate(path, 200_128)
        assert map_array(np.negative, mapped[:25_000], backend="threading").sum() == -25_000
        with pytest.raises(ValueError, match="needs 200,136"):
            map_array(np.negative, mapped[:25_001])

    def test_private_pages_of_a_truncated_file_can_be_mapped(self, path):
        os.truncate(path, 1000)
        mapped = np.memmap(path, "f8", "c", shape=125)
        mapped[:] = 2
        os.truncate(path, 500)  # in the same page, which is a copy now
        assert map_array(np.negative, mapped, backend="threading").sum() == -250
        os.truncate(path, 0)
        with pytest.raises(ValueError, match="it has 0 bytes"):
            map_array(np.negative, mapped)

    def test_mapped_devices_have_no_size(self):
        with open("/dev/zero", "r+b") as device:  # noqa: PTH123  # only its descriptor is used
            mapped = np.frombuffer(mmap.mmap(device.fileno(), 8000), "f8")
        for backend in ("sequential", "threading", "loky"):
            assert not map_array(np.negative, mapped, backend=backend, n_jobs=2).any()

    def test_a_mapping_without_a_descriptor_is_not_checked(self, path):
        options = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **options)
        mapped = np.frombuffer(mapping, "f8", offset=128)
        assert map_array(np.negative, mapped, backend="threading", n_jobs=2).sum() == -50_000

    def test_a_truncated_file_with_an_offset_of_many_pages_is_named(self, path):
        mapped = np.memmap(path, "f8", "r", offset=80_000)
        os.truncate(path, 399_000)  # longer than what is mapped
        for backend in ("threading", "loky"):
            with pytest.raises(ValueError, match="needs 400,128"):
                map_array(np.negative, mapped, backend=backend, n_jobs=2)

    def test_a_truncated_file_in_a_closure_is_named(self, path):
        mapped = np.load(path, mmap_mode="r")
        os.truncate(path, 200_000)
        with pytest.raises(ValueError, match="was cut off"):
            map_array(lambda chunk: chunk + mapped.sum(), np.ones(3), backend="loky", n_jobs=2)

    @each_balance
    def test_a_file_truncated_while_processes_read_it_is_an_error(self, balance, path):
        mapped = np.load(path, mmap_mode="r")

        def cut(chunk):
            os.truncate(path, 128)
            return chunk + 1

        run = {"balance": balance, "backend": "loky", "n_jobs": 2}
        with pytest.raises(ValueError, match=r"X\.npy was cut off: it has 128 bytes"):
            map_array(cut, mapped, **run)
        assert (map_array(np.negative, np.ones(9), **run) == -1).all()


@pytest.mark.fault(24)
@each_balance
def test_a_temporary_folder_with_spaces_shows_no_files(balance, tmp_path):
    folder = tmp_path / "a folder with spaces, ünd mehr"
    folder.mkdir()

    def func(chunk):
        return np.full(len(chunk), len(list(folder.iterdir())))

    mapper = OF_BALANCE[balance](n_jobs=2, temp_folder=str(folder), backend="loky")
    with mapper:
        seen = mapper.map_array(func, np.arange(100_000.0))
        assert not seen.any()
        assert mapper(lambda i: list(folder.iterdir()), range(4)) == [[]] * 4
        again = mapper.map_array(np.negative, seen)
        assert mapper.report.bytes_copied == 0
        assert not again.any()
        assert list(folder.iterdir()) == []
        # It is that file system's space that the results take.
        assert any(str(folder) in str(link.readlink()) for link in _links())
    assert mapper.map_array(np.sign, np.arange(3)).tolist() == [0, 1, 1]


def _links():
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            link.readlink()
            yield link


@pytest.mark.fault(24)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_missing_temporary_folder_is_named(by, tmp_path, monkeypatch):
    missing = str(tmp_path / "not there")
    if by == "environment":
        monkeypatch.setenv("JOBLIB_TEMP_FOLDER", missing)
        mapper = StaticParallelMapper(2, backend="loky")
    else:
        mapper = StaticParallelMapper(2, temp_folder=missing, backend="loky")
    for call in (lambda: mapper.map_array(np.sign, np.arange(4)), lambda: mapper(abs, range(4))):
        with pytest.raises(OSError, match="existing folder") as caught:
            call()
        assert caught.value.errno == errno.ENOENT
        assert caught.value.filename == missing


SCARCE = """
import resource, sys
import numpy as np
from taskcarrier import DynamicParallelMapper, StaticParallelMapper, map_array, map_chunks

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    number = int(sys.argv[1])
    X, kept = np.arange(50_000.0), []
    for mapper in (StaticParallelMapper, DynamicParallelMapper):
        with mapper(2, backend="loky") as both:
            for n in range(30):
                kept.append(both.map_array(lambda c: c * number + n, X))
                assert both(lambda i: [i], range(5)) == [[i] for i in range(5)]
            both.map_array(lambda c, W: c + W[0], X, args=(X + 1,))
        for n, Y in enumerate(kept[-30:]):
            assert (Y == X * number + n).all()
    print("fine")
"""


@pytest.mark.thorough
@pytest.mark.fault(26)
def test_two_programs_with_few_descriptors_share_a_temporary_folder(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    programs = []
    for number in ("3", "4"):
        place = tmp_path / number
        place.mkdir()
        programs.append(start_script(place, SCARCE, number, JOBLIB_TEMP_FOLDER=str(folder)))
    try:
        for program in programs:
            out, err = program.communicate(timeout=60)
            assert (program.returncode, out) == (0, "fine\n"), err
    finally:
        for program in programs:
            program.kill()
            program.communicate()
    assert list(folder.iterdir()) == []


def test_more_than_a_thousand_open_descriptors_do_not_matter():
    code = """
import os, resource
import numpy as np
from taskcarrier import map_array
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
X = np.arange(10.0)
print(np.array_equal(map_array(np.sqrt, X, backend="loky", n_jobs=2), np.sqrt(X)))
"""
    assert output_of(code) == "True"


def test_a_pool_that_cannot_start_leaves_no_descriptor():
    code = """
import os, resource, warnings
import numpy as np
import taskcarrier
X = np.arange(10.0)
taskcarrier.map_array(np.sqrt, X, backend="loky", n_jobs=2)  # imports everything
taskcarrier.shutdown()
count = lambda: len(os.listdir("/proc/self/fd"))
before = count()
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for room in range(1, 9):  # with more, loky itself leaves a pipe of its own open
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + room, hard))
    try:
        taskcarrier.map_array(np.sqrt, X, backend="loky", n_jobs=2)
    except OSError:
        pass
    else:
        raise AssertionError("there was room")
    taskcarrier.shutdown()
resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
print(count() - before)
"""
    assert output_of(code) == "0"


@pytest.mark.fault(43)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user with no threads yet")
def test_more_threads_than_a_user_may_have_are_an_error(tmp_path):
    code = """
import os, resource, threading, time
import numpy as np
from taskcarrier import DynamicParallelMapper, map_array

if __name__ == "__main__":
    map_array(np.negative, np.arange(4.0), n_jobs=2, backend="threading")  # imports everything
    os.setresgid(54321, 54321, 54321)
    os.setresuid(54321, 54321, 54321)
    resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))
    before = threading.active_count()
    X = np.arange(1000.0)
    mapper = DynamicParallelMapper(1000, backend="threading")
    gate = threading.Event()
    for call in (
        lambda: map_array(np.negative, X, n_jobs=1000, chunksize=1, backend="threading"),
        lambda: list(mapper.imap(gate.wait, [60] * 1000)),
    ):
        try:
            call()
        except RuntimeError as error:
            assert "of 1,000 threads could be started" in error.__notes__[0], error.__notes__
        else:
            raise SystemExit("no error")
        gate.set()
        while threading.active_count() > before:
            time.sleep(0.01)
    Y = map_array(np.negative, X, n_jobs=4, chunksize=1, backend="threading")
    assert (Y == -X).all()
    print("fine")
"""
    assert run_script(tmp_path, code) == "fine\n"


class TestFreedPages:
    """Nobody who still looks at shared memory sees zeros, and nothing is kept."""

    @pytest.mark.parametrize("argument", [False, True])
    def test_a_grandchild_forked_by_a_worker_s_function_keeps_its_values(self, argument, tmp_path):
        def spawn(chunk, *arrays):
            seen = arrays[0] if arrays else chunk
            if os.fork() == 0:
                while not (tmp_path / "freed").exists():
                    time.sleep(0.01)
                part = tmp_path / f"part-{os.getpid()}"
                part.write_text(f"{seen.min()} {seen.max()}", encoding="utf-8")
                part.rename(tmp_path / f"child-{os.getpid()}")
                os._exit(0)

        X = share(np.arange(1.0, 300_001.0))
        args = (share(X),) if argument else ()
        map_chunks(spawn, X, args=args, chunksize=150_000, backend="loky", n_jobs=2)
        del X, args
        gc.collect()
        (tmp_path / "freed").touch()
        deadline = time.monotonic() + 20
        while len(found := list(tmp_path.glob("child-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        texts = sorted(path.read_text(encoding="utf-8") for path in found)
        whole = ["1.0 300000.0"] * 2
        assert texts == (whole if argument else ["1.0 150000.0", "150001.0 300000.0"])

    def test_a_process_may_fork_while_other_threads_share(self):
        stop = threading.Event()

        def sharing():
            while not stop.is_set():
                empty(10)

        threads = [threading.Thread(target=sharing) for _ in range(3)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        for thread in threads:
            thread.start()
        try:
            for _ in range(300):
                segments._retire_all()
                segments.live_mappings()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            sys.setswitchinterval(interval)

    def test_memory_is_freed_though_no_descriptor_is_left(self, tmp_path):
        code = """
        import os, resource
        import numpy as np
        from taskcarrier import empty, map_chunks
        from taskcarrier.memory.segments import locate
        map_chunks(len, np.ones(2), backend="loky", n_jobs=2)  # old loky forks: before there is X
        X = empty(1 << 20)
        X[:] = 1
        map_chunks(len, X, backend="loky", n_jobs=2)
        fd = os.dup(locate(X).segment.fd)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        held = []
        try:
            while True:
                held.append(open("/dev/null"))
        except OSError:
            pass
        del X
        print(os.fstat(fd).st_blocks)
        """
        assert run_script(tmp_path, textwrap.dedent(code)).strip() == "0"

    def test_a_program_ends_silently(self, tmp_path):
        code = """
        import builtins, collections
        import numpy as np
        from taskcarrier import StaticParallelMapper, map_array, share
        X = share(np.arange(1e5))
        np.kept = X, map_array(np.sqrt, X, backend="loky", n_jobs=2)
        mapper = StaticParallelMapper(n_jobs=2, backend="loky").__enter__()
        builtins.kept = mapper, mapper.map_array(np.sqrt, X)
        collections.kept = X.base
        """
        process = start_script(tmp_path, textwrap.dedent(code))
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0
