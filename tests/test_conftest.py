"""The leak check of conftest.py finds each sort of leak, and nothing where nothing leaks."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from tests.shared_memory import maker_of
from tests.strategies import ROOT

# Each leaks one thing: the code of a test, and how the failure shows what it left.
LEAKS = {
    "thread": (
        """
        import threading
        threading.Thread(target=threading.Event().wait, name="stray", daemon=True).start()
        """,
        "thread: <Thread(stray,*",
    ),
    "child": (
        """
        import os
        os.posix_spawnp("sleep", ["sleep", "301"], os.environ)
        """,
        "process: * sleep 301",
    ),
    "orphan": (
        """
        import subprocess, time
        from pathlib import Path
        code = "sleep 302 >/dev/null 2>&1 & echo $!"
        told = subprocess.run(["sh", "-c", code], check=True, stdout=subprocess.PIPE, text=True)
        words = Path(f"/proc/{int(told.stdout)}/cmdline")
        while words.read_bytes() != b"sleep\\x00302\\x00":  # it is the shell's copy before
            time.sleep(0.01)
        """,
        "process: * sleep 302",
    ),
    "zombie": (
        """
        import os
        pid = os.posix_spawnp("true", ["true"], os.environ)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        """,
        "process: * zombie true",
    ),
    "descriptor": (
        """
        import os
        os.dup(1)
        """,
        "descriptor: * -> *",
    ),
    "mapping": (
        """
        import builtins, mmap, os
        fd = os.memfd_create("stray")
        os.ftruncate(fd, 4096)
        builtins.kept = mmap.mmap(fd, 4096)
        os.close(fd)
        """,
        "descriptor: * -> /memfd:stray*",
    ),
    "temporary": (
        """
        import tempfile
        tempfile.mkdtemp(prefix="stray")
        """,
        "temporary entry: */stray*",
    ),
    "shared": (
        """
        import os
        os.close(os.open(f"/dev/shm/stray-{os.getpid()}", os.O_CREAT | os.O_WRONLY, 0o600))
        """,
        "shared memory: /dev/shm/stray-*",
    ),
    "shared_by_dead": (
        """
        import subprocess
        subprocess.run(["sh", "-c", ": > /dev/shm/stray-$$-dead"], check=True)
        """,
        "shared memory: /dev/shm/stray-*-dead",
    ),
    "shared_and_open": (
        """
        import os
        os.open("/dev/shm/stray-open-UNIQUE", os.O_CREAT | os.O_RDONLY, 0o600)
        """,
        "shared memory: /dev/shm/stray-open-*",
    ),
    "shared_and_mapped": (
        """
        import builtins, mmap, os
        from multiprocessing import resource_tracker, shared_memory
        tracked, resource_tracker.register = resource_tracker.register, lambda *_: None
        builtins.kept_segment = shared_memory.SharedMemory("stray-mapped-UNIQUE", True, 8)
        resource_tracker.register = tracked
        os.close(builtins.kept_segment._fd)
        builtins.kept_segment._fd = -1
        """,
        "shared memory: /dev/shm/stray-mapped-*",
    ),
    "semaphore": (
        """
        import builtins, multiprocessing, os
        multiprocessing.current_process()._config["semprefix"] = f"/stray-{os.getpid()}"
        builtins.kept_semaphore = multiprocessing.get_context("forkserver").RLock()
        """,
        "shared memory: /dev/shm/sem.stray-*",
    ),
}
LATE = """
    import os, pytest
    @pytest.fixture(scope="module", autouse=True)
    def closes_badly():
        yield
        os.dup(1)
    def test_it():
        pass
"""
# No leaks: garbage in cycles, what a fixture removes, a thread about to end, warm workers that
# the package ends on `shutdown`, and a lock that numba keeps.
CLEAN = """
    import mmap, multiprocessing, os, sys, threading, time, types

    package = types.ModuleType("taskcarrier")
    closed = threading.Event()
    package.shutdown = closed.set

    def test_cycle():
        fd = os.memfd_create("segment")
        os.ftruncate(fd, 4096)
        cycle = [mmap.mmap(fd, 4096)]
        os.close(fd)
        cycle.append(cycle)

    def test_fixtures(tmp_path, capfd, monkeypatch):
        (tmp_path / "kept").write_text("")

    def test_ending():
        threading.Thread(target=time.sleep, args=(0.1,)).start()

    def test_warm_workers():
        sys.modules["taskcarrier"] = package
        threading.Thread(target=closed.wait, daemon=True).start()

    def test_lock_of_numba():
        multiprocessing.current_process()._config["semprefix"] = f"/stray-{os.getpid()}"
        parallel = types.ModuleType("numba.np.ufunc.parallel")
        parallel._backend_init_process_lock = multiprocessing.get_context("forkserver").RLock()
        sys.modules[parallel.__name__] = parallel
"""


# What another program may do in /dev/shm meanwhile: entries with its number, as joblib makes them,
# and one without, come and go; those that are there when it is killed stay.
NEIGHBOUR = """
import os, sys, time
from pathlib import Path
entries = [Path(f"/dev/shm/stray_{os.getpid()}_{i}") for i in range(3)]
entries.append(Path("/dev/shm/stray-" + sys.argv[2]))
while os.getppid() == int(sys.argv[1]):
    for entry in entries:
        entry.mkdir()
    print("ready", flush=True)
    time.sleep(0.02)
    for entry in entries:
        entry.rmdir()
"""
WITH_A_NEIGHBOUR = """
    import os, signal, time

    def test_while_it_lives():
        time.sleep(0.1)

    def test_while_it_is_killed():
        os.kill({pid}, signal.SIGKILL)
        while os.path.exists("/proc/{pid}"):
            time.sleep(0.01)

    def test_afterwards():
        pass
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run pytest on a test module in parts, under our conftest.py, in another process."""
    set_environment(pytester, monkeypatch)

    def run_module(*parts, grace=0.3):
        pytester.makeconftest((ROOT / "conftest.py").read_text() + f"\nGRACE = {grace}\n")
        pytester.makepyfile("\n".join(map(textwrap.dedent, parts)))
        result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error")
        clean_up(result.stdout.str())
        return result

    return run_module


def set_environment(pytester, monkeypatch):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.delenv("PYTEST_DEBUG_TEMPROOT", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for what conftest.py imports
    # A session with a failed test keeps its folder.
    folder = pytester.path / "folder of the session"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))


def clean_up(output):
    """End what was reported as left behind: this test must not leak it either."""
    for pid in set(re.findall(r"process: (\d+) \S+ sleep 30", output)):
        os.kill(int(pid), signal.SIGKILL)
    for path in set(re.findall(r"shared memory: (/dev/shm/stray-\S+)", output)):
        Path(path).unlink()


def leaky(sort, end=""):
    code, _ = LEAKS[sort]
    code = textwrap.dedent(code).replace("UNIQUE", unique_word())
    return f"def test_{sort}():\n" + textwrap.indent(code + end, "    ")


def unique_word():
    """Return a word without digits that no other run of these tests has."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(os.getpid()))


def test_each_leak_fails_its_test_and_no_other(run):
    result = run(*map(leaky, LEAKS), "def test_last():\n    pass\n")
    for sort, (_, message) in LEAKS.items():
        result.stdout.fnmatch_lines(
            [f"*at teardown of test_{sort} *", "this test left behind", f"  {message}"]
        )
    # What all have left, the session still has at its end.
    result.stdout.fnmatch_lines(["*at teardown of test_last*", "the session left behind"])
    for _, message in LEAKS.values():
        result.stdout.fnmatch_lines(["the session left behind", f"  {message}"])
    result.assert_outcomes(passed=len(LEAKS) + 1, errors=len(LEAKS) + 1)


@pytest.mark.thorough
def test_a_leak_after_the_last_test_fails_the_session(run):
    result = run(LATE)
    result.stdout.fnmatch_lines(["*the session left behind*"])
    result.assert_outcomes(passed=1, errors=1)


def test_nothing_is_reported_where_nothing_leaks(run):
    run(CLEAN, grace=60).assert_outcomes(passed=5)


def test_shared_memory_of_other_programs_is_ignored(run):
    word = unique_word()
    command = [sys.executable, "-c", NEIGHBOUR, str(os.getpid()), word]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as neighbour:
        assert neighbour.stdout.readline() == "ready\n"
        # So that it can go on printing, and leaves no zombie.
        threading.Thread(target=neighbour.communicate).start()
        try:
            result = run(WITH_A_NEIGHBOUR.format(pid=neighbour.pid))
        finally:
            neighbour.kill()
    left = [f"/dev/shm/stray_{neighbour.pid}_{i}" for i in range(3)]
    for path in map(Path, (*left, f"/dev/shm/stray-{word}")):
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
    result.assert_outcomes(passed=3)


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("sem.loky-4711-x2k", 4711),
        ("joblib_memmapping_folder_4711_ab12", 4711),
        ("sem.mp-9_byyxdh", None),  # random, though a digit stands alone
        ("psm_1a2b3c", None),
    ],
)
def test_the_maker_of_shared_memory_is_read_off_its_name(name, maker):
    assert maker_of(Path("/dev/shm", name)) == maker


@pytest.mark.thorough
def test_a_session_uses_a_folder_of_its_own(pytester, monkeypatch):
    set_environment(pytester, monkeypatch)
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    pytester.makepyfile("""
        import os
        from pathlib import Path

        def test_it(tmp_path):
            folder = Path(os.environ["TMPDIR"]).parent
            assert tmp_path.is_relative_to(folder)
            Path("where").write_text(str(folder))
    """)
    result = pytester.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    assert not Path(Path("where").read_text()).exists()


@pytest.mark.thorough
def test_a_failed_test_may_hold_descriptors_but_nothing_else(run):
    result = run(leaky("descriptor", "assert False\n"))
    result.assert_outcomes(failed=1)
    result = run(leaky("temporary", "assert False\n"))
    result.assert_outcomes(failed=1, errors=1)


@pytest.mark.thorough
def test_a_deadlock_prints_all_stacks_and_fails(run, pytester):
    stuck = """
        import threading
        def test_it():
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        def test_next():
            pass
    """
    # Long enough for what is not stuck, too.
    pytester.makeini("[pytest]\ntimeout = 6\ntimeout_method = signal\n")
    result = run(stuck)
    result.stdout.fnmatch_lines(["*lock.acquire()*", "*Timeout*"])
    result.assert_outcomes(failed=1, passed=1)
