"""Random kills, interrupts, full disks and time-outs, for as long as is wanted.

Run as ``python -m tests.stress --minutes 2``. Each round is a program of its own, with a number
that decides all it does (but for the moments at which the machine does it): ``--only deaths
--seed 17 --rounds 1`` runs that one again. A round says what it did; whatever it found that should
not be is printed with its number, and the program then ends with 1. A round that takes more than a
few minutes hangs: its stacks are printed.

What is held: every run gives the result of the plain call, byte for byte, or the error that says
what happened; afterwards the next run is right, no process is left, and nothing is left in the
temporary folder or in /dev/shm.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import taskcarrier
from taskcarrier import (
    DynamicParallelMapper,
    StaticParallelMapper,
    WorkerDiedError,
    map_array,
    map_chunks,
    map_items,
    reduce_array,
)
from tests.clocks import LATE
from tests.shared_memory import SharedMemoryWatch, all_entries

ROOT = Path(__file__).parents[1]
BALANCES = ("static", "dynamic")
HANGS_AFTER = 180.0  # seconds
MOST_FOUND = 5  # then it is enough
ENDS_WITHIN = 30.0  # seconds, for processes whose parent is gone

Done = Counter[str]


def double(chunk: np.ndarray) -> np.ndarray:
    """Takes some 0.2 ms a range, so that there is a moment for everything."""
    time.sleep(0.0002)
    return chunk * 2


def same(result: Any, expected: Any) -> bool:
    return bool(
        type(result) is type(expected)
        and (
            np.array_equal(result, expected)
            if isinstance(expected, np.ndarray)
            else result == expected
        )
    )


# What a run may be: a call, its expected result, and whether its partial results are an array.
Run = tuple[Callable[[], Any], Any]


def some_run(rng: random.Random, **options: Any) -> Run:
    """A map of some sort with its right result."""
    n_items = rng.choice([1, 7, 300, 2000])
    X = np.arange(float(n_items))
    options = {
        "chunksize": rng.choice([1, 3, 10, 50]),
        "n_jobs": rng.choice([2, 2, 3]),
        "balance": rng.choice(BALANCES),
        "backend": "loky",
        **options,
    }
    size = options["chunksize"]
    verb = rng.choice(["array", "items", "chunks", "reduce", "list"])
    if verb == "array":
        return lambda: map_array(double, X, **options), X * 2
    if verb == "items":
        return lambda: map_items(lambda x: x * 2, X, **options), X * 2
    if verb == "chunks":
        sums = [float(X[start : start + size].sum() * 2) for start in range(0, n_items, size)]
        return lambda: map_chunks(lambda c: float(double(c).sum()), X, **options), sums
    if verb == "reduce":
        whole = float(X.sum() * 2)  # exact: these are integers
        return lambda: reduce_array(
            lambda c: float(double(c).sum()), X, combine=sum_of, **options
        ), whole
    kind = StaticParallelMapper if options.pop("balance") == "static" else DynamicParallelMapper
    mapper = kind(
        options.pop("n_jobs"), backend=options.pop("backend"), chunksize=options.pop("chunksize")
    )
    values = X.tolist()
    return lambda: mapper.map(slow_double, values, **options), [2 * one for one in values]


def failing_run(rng: random.Random, **options: Any) -> Callable[[], Any]:
    """A map that must not come to a result: its error is large, so that it takes time to send."""
    n_items = rng.choice([2, 40, 400])
    fails_at = float(rng.randrange(n_items))

    def func(item: float) -> float:
        time.sleep(0.0002)
        if item == fails_at:
            raise ValueError(bytes(20_000_000))
        return item

    X = np.arange(float(n_items))
    balance = rng.choice(BALANCES)
    options = {"n_jobs": 2, "backend": "loky", **options}
    if rng.random() < 0.5:  # one way or the other
        return lambda: map_items(func, X, balance=balance, **options)
    kind = StaticParallelMapper if balance == "static" else DynamicParallelMapper
    mapper = kind(options.pop("n_jobs"), backend=options.pop("backend"))
    return lambda: mapper.map(func, X.tolist(), **options)


def sum_of(left: float, right: float) -> float:
    return left + right


def slow_double(number: float) -> float:
    time.sleep(0.00002)
    return number * 2


@contextlib.contextmanager
def soon(delay: float, what: Callable[[], None]) -> Iterator[None]:
    """Call something in another thread after a delay; the block waits for it at its end."""
    timer = threading.Timer(delay, what)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def workers() -> list[psutil.Process]:
    """Our worker processes, but not loky's own watcher, whose end no worker can be started over."""
    children = {child: " ".join(command_of(child)) for child in psutil.Process().children()}
    return [one for one, words in children.items() if "loky" in words and "tracker" not in words]


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def check(condition: bool, what: str) -> None:  # what an assert takes
    if not condition:
        raise AssertionError(what)


def check_partial(error: WorkerDiedError, expected: Any) -> None:
    """What is not missing in an error's partial result must be right."""
    if not isinstance(error.partial, np.ndarray):
        return
    there = np.ones(len(expected), bool)
    for start, stop in error.missing:
        there[start:stop] = False
    check(same(error.partial[there], expected[there]), f"wrong partial results: {error}")


# Rounds


def deaths(rng: random.Random) -> Done:
    """Workers are killed at random moments, one or all at once."""
    done: Done = Counter()

    def kill() -> None:
        victims = workers()
        rng.shuffle(victims)
        for victim in victims if rng.random() < 0.2 else victims[:1]:  # some
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
                done["kills"] += 1

    for _ in range(12):
        retries = rng.choice([0, 1, 2, 2, 5])
        fails = rng.random() < 0.3  # some
        if fails:
            call, expected = failing_run(rng, retries=retries), None
        else:
            call, expected = some_run(rng, retries=retries)
        delays = [rng.uniform(0, 0.05), rng.uniform(0, 0.3)]
        with soon(delays[0], kill), soon(delays[1], kill):
            try:
                result = call()
            except WorkerDiedError as error:
                done["died errors"] += 1
                if not fails:
                    check_partial(error, expected)
            except ValueError:
                done["right errors"] += 1
                check(fails, "an error out of nowhere")
            else:
                done["right results"] += 1
                check(not fails, "a result of a run that has failed")
                check(same(result, expected), "a wrong result")
    call, expected = some_run(rng)
    check(same(call(), expected), "a wrong result after all kills")
    return done


def streams(rng: random.Random) -> Done:
    """Streams of results whose workers are killed, which are left early, or interrupted."""
    done: Done = Counter()

    def kill() -> None:
        victims = workers()
        if victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(victims).kill()
                done["kills"] += 1

    for _ in range(12):
        n_items = rng.choice([5, 300, 3000])
        mapper = DynamicParallelMapper(2, backend="loky", chunksize=rng.choice([None, 1, 20]))
        ordered = rng.random() < 0.7  # mostly
        results = mapper.imap(
            slow_double,
            iter(range(n_items)),
            ordered=ordered,
            buffersize=rng.choice([None, 1, 50]),
            retries=rng.choice([2, 5]),
        )
        leaves_at = rng.choice([n_items, n_items, n_items // 2])
        came: list[float] = []
        delay = rng.uniform(0, 0.1)
        what = rng.choice([kill, kill, lambda: os.kill(os.getpid(), signal.SIGINT)])
        try:
            with soon(delay, what), soon(2 * delay, kill):
                try:
                    came += itertools.islice(results, leaves_at)
                finally:
                    results.close()
        except WorkerDiedError:
            done["died errors"] += 1
        except KeyboardInterrupt:
            done["interrupted"] += 1
        else:
            check(len(came) == leaves_at, "results are missing")
            done["right results"] += 1
        expected = [2 * n for n in range(len(came) if ordered else n_items)]
        check(came == expected if ordered else set(came) <= set(expected), "a wrong result")
        check(len(set(came)) == len(came), "a result came twice")
    return done


def interrupts(rng: random.Random) -> Done:
    """Ctrl-C at a random moment, but not within a first import, which leaves half a module."""
    done: Done = Counter()
    for backend in ("loky", "threading"):
        map_array(double, np.arange(4.0), n_jobs=2, backend=backend)
    for _ in range(8):
        call, expected = some_run(rng, backend=rng.choice(["loky", "threading", "sequential"]))
        pressed: list[float] = []
        ended = 0.0

        def press(pressed: list[float] = pressed) -> None:
            pressed.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        try:
            with soon(rng.uniform(0, 0.1), press):
                try:
                    result = call()
                finally:
                    ended = time.monotonic()
        except KeyboardInterrupt:
            done["interrupted"] += 1
            # The promise is two seconds, of which the machine may take some for others.
            check(ended - pressed[0] < 2 + LATE, "Ctrl-C took more than two seconds")
        else:
            done["right results"] += 1
            check(same(result, expected), "a wrong result")
        call, expected = some_run(rng)
        check(same(call(), expected), "a wrong result after Ctrl-C")
    return done


def small_call(rng: random.Random, backend: str) -> tuple[Any, Any]:
    """A map of some milliseconds at most, done: its result and the right one."""
    kind = rng.choice([StaticParallelMapper, DynamicParallelMapper])
    mapper = kind(2, backend=backend)
    way = rng.choice(["list", "array", "stream", "left", "within"])
    if way == "array":
        X = np.arange(12.0)
        return mapper.map_array(np.negative, X), -X
    if way == "stream":
        return list(mapper.imap(abs, range(-5, 0))), [5, 4, 3, 2, 1]
    if way == "left":
        return next(mapper.imap(abs, range(-500, 0))), 500
    with mapper if way == "within" else contextlib.nullcontext():
        return mapper.map(abs, range(-5, 0)), [5, 4, 3, 2, 1]


def n_open() -> dict[str, int]:
    """Threads and descriptors of this program."""
    return {name: len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("task", "fd")}


def exceptions(rng: random.Random) -> Done:
    """Thousands of exceptions from outside, at random moments of small calls."""
    done: Done = Counter()
    backend = rng.choice(["threading", "threading", "loky"])
    n_calls = 200 if backend == "loky" else 2000

    def some_call() -> tuple[Any, Any]:
        return small_call(rng, backend)

    def heard(*_: object) -> None:
        if awaited and rng.random() < 0.95:  # else one more comes while this one is seen to
            awaited.clear()
        elif awaited:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 0.002))
        else:
            return
        raise KeyboardInterrupt

    for _ in range(30):
        some_call()
    before = n_open()
    awaited: list[bool] = []
    signal.signal(signal.SIGALRM, heard)
    sys.unraisablehook = lambda _: None  # what comes in a finalizer is lost
    while done["interrupted calls"] < n_calls:
        try:
            try:
                awaited.append(True)
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 0.004))
                result, expected = some_call()
            finally:
                awaited.clear()
        except KeyboardInterrupt:
            done["interrupted calls"] += 1
        else:
            check(same(result, expected), "a wrong result")
            done["right results"] += 1
        awaited.clear()
    sys.unraisablehook = sys.__unraisablehook__
    for _ in range(2):
        some_call()
    gc.collect()
    limits = {"task": before["task"] + 2, "fd": before["fd"] + 16}
    wait_for(lambda: all(n_open()[name] <= limits[name] for name in limits), f"left: {n_open()}")
    mapper = DynamicParallelMapper(2, backend=backend)
    mapper.map(abs, range(4))
    check(mapper.report.backend == backend, "this thread is taken for a worker")
    return done  # `shutdown` comes after it


def timeouts(rng: random.Random) -> Done:
    """Some ranges take far too long."""
    done: Done = Counter()
    X = np.arange(200.0)
    for _ in range(2):
        slow = {rng.randrange(20) * 10.0 for _ in range(rng.choice([0, 1, 3]))}

        def func(chunk: np.ndarray, slow: set[float] = slow) -> np.ndarray:
            time.sleep(30 if float(chunk[0]) in slow else 0)
            return chunk * 2

        options = {"chunksize": 10, "n_jobs": 2, "backend": "loky", "timeout": LATE}
        options["balance"] = rng.choice(BALANCES)
        result, failures = map_array(func, X, on_error="collect", **options)
        expected = X * 2
        for start in slow:
            expected[int(start) : int(start) + 10] = np.nan
        check(np.array_equal(result, expected, equal_nan=True), "a wrong result")
        check({one.start for one in failures} == slow, f"failed were {failures}")
        check(all(isinstance(one.error, TimeoutError) for one in failures), f"failed: {failures}")
        done["time-outs collected"] += len(slow)
        try:
            result = map_array(func, X, **options)
        except TimeoutError:
            done["time-outs raised"] += 1
        else:
            check(not slow, "no TimeoutError")
            check(same(result, X * 2), "a wrong result")
    return done


def disks(rng: random.Random) -> Done:
    """The folder for temporary files is on a small disk, mounted for this program alone."""
    done: Done = Counter()
    disk = os.environ["STRESS_DISK"]
    for _ in range(10):
        X = np.arange(float(rng.choice([1 << 10, 1 << 17, 1 << 19, 1 << 21])))
        kind = rng.choice([StaticParallelMapper, DynamicParallelMapper])
        mapper = kind(2, temp_folder=disk, backend="loky")
        try:
            result = mapper.map_array(lambda c: c[:] * 2, X)
        except OSError as error:
            check(error.errno == errno.ENOSPC, f"another error: {error!r}")
            check("bytes" in str(error), f"no sizes: {error}")
            done["full disks"] += 1
        else:
            done["right results"] += 1
            check(same(result, X * 2), "a wrong result")
            del result
        check(not list(Path(disk).iterdir()), "files are left on the disk")
    return done


N_CHUNKS = 120


def resumable(rng: random.Random) -> Done:
    """One try of a run that can be resumed; `resumes` kills it."""
    folder = Path(os.environ["STRESS_FOLDER"])

    def func(chunk: np.ndarray) -> np.ndarray:
        time.sleep(0.01)
        with open(folder / "calls", "a", encoding="ascii") as log:  # noqa: PTH123  # quick
            log.write("x")
        return chunk * 2

    map_array(
        func,
        np.arange(N_CHUNKS * 10.0),
        chunksize=10,
        n_jobs=2,
        backend=rng.choice(["loky", "threading"]),
        balance=rng.choice(BALANCES),
        out=folder / "Y.npy",
        resume=True,
    )
    return Counter()


def resumes(rng: random.Random) -> Done:
    """A run that can be resumed is killed, alone or with its workers, until it is complete."""
    done: Done = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "calls").touch()
        while not (folder / "Y.npy").exists():
            environment = {**os.environ, "STRESS_FOLDER": name}
            command = one_command("resumable", rng.randrange(1 << 30))
            program = subprocess.Popen(
                command,
                env=environment,
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
            # Longer and longer, for where it takes that long to begin.
            patience = 1.2 ** done["resumable runs killed"]
            try:
                program.wait(patience * rng.uniform(0.7, 1.6))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    (os.kill if rng.random() < 0.5 else os.killpg)(
                        program.pid, signal.SIGKILL
                    )  # half
                done["resumable runs killed"] += 1
            check(program.wait() in {0, -signal.SIGKILL}, "a resumed run failed")
            if not (folder / "Y.npy").exists():
                wait_for(lambda: not marked_processes(name), "workers are left")
        check(same(np.load(folder / "Y.npy"), np.arange(N_CHUNKS * 10.0) * 2), "a wrong output")
        again = (folder / "calls").stat().st_size - N_CHUNKS
        check(again <= 4 * done["resumable runs killed"], f"{again} ranges were run again")
        done["ranges run again"] += again
        left = sorted(path.name for path in folder.iterdir())
        check(left == ["Y.npy", "calls"], f"left: {left}")
    done["resumed to the end"] += 1
    return done


ROUNDS: dict[str, Callable[[random.Random], Done]] = {
    one.__name__: one for one in (deaths, streams, interrupts, exceptions, timeouts, disks, resumes)
}


# Running them


def one_command(kind: str, seed: int) -> list[str]:
    return [sys.executable, "-m", "tests.stress", "--one", kind, "--seed", str(seed)]


def marked_processes(text: str) -> list[int]:
    """Processes whose environment says so, but this one and those it descends from."""
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for pid in psutil.pids():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # gone, or somebody else's
            continue
        if pid not in ours and text.encode() in environment and not is_zombie(pid):
            found.append(pid)
    return found


def is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + ENDS_WITHIN
    while not condition():
        check(time.monotonic() < deadline, otherwise)
        time.sleep(0.02)


def run_round(kind: str, seed: int) -> tuple[Done, str]:
    """What a round did, and what is wrong with it."""
    with tempfile.TemporaryDirectory(prefix="taskcarrier-stress-") as name:
        temp = Path(name) / "temp"
        disk = Path(name) / "disk"
        temp.mkdir()
        disk.mkdir()
        command = one_command(kind, seed)
        if kind == "disks":
            mount = f"mount -t tmpfs -o size=4m tmpfs '{disk}' && exec \"$@\""
            command = ["unshare", "--mount", "sh", "-c", mount, "sh", *command]
        environment = {**os.environ, "TMPDIR": str(temp), "STRESS_DISK": str(disk)}
        shared_memory = SharedMemoryWatch()
        program = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = program.communicate(timeout=HANGS_AFTER)
        except subprocess.TimeoutExpired:
            program.send_signal(signal.SIGABRT)  # prints all stacks
            out, err = program.communicate()
            return Counter(), f"hangs:\n{err}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                program.kill()
        if program.returncode:
            return Counter(), f"failed with {program.returncode}:\n{err}"
        try:
            done = Counter(json.loads(out))
        except json.JSONDecodeError:
            return Counter(), f"something else was printed:\n{out}\n{err}"
        try:
            wait_for(lambda: not marked_processes(str(temp)), "processes are left")
            check(not list(temp.iterdir()), f"files are left: {list(temp.iterdir())}")
            # No process of the round is left, so whatever belongs to it has been left behind.
            wait_for(
                lambda: not shared_memory.entries_of(set(), all_entries()), "shared memory is left"
            )
        except AssertionError as error:
            return done, str(error)
        return done, ""


def can_mount() -> bool:
    command = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="how long (default: 2)")
    parser.add_argument("--rounds", type=int, default=sys.maxsize, help="at most so many rounds")
    parser.add_argument("--seed", type=int, help="the number of the first round (default: any)")
    parser.add_argument("--only", choices=ROUNDS, help="one sort of round")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if options.seed is None else options.seed
    if options.one:
        faulthandler.enable()  # SIGABRT prints all stacks
        # Background jobs of a shell, and their children, ignore Ctrl-C from the start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        kind = {**ROUNDS, "resumable": resumable}[options.one]
        print(json.dumps(kind(random.Random(seed))))
        taskcarrier.shutdown()
        return 0
    kinds = [options.only] if options.only else list(ROUNDS)
    if "disks" in kinds and not can_mount():
        kinds.remove("disks")
        print("no full disks: mounting one needs root")
    done: Done = Counter()
    found: list[str] = []
    deadline = time.monotonic() + 60 * options.minutes
    rounds = 0
    print(f"from seed {seed} on, for {options.minutes:g} minutes", flush=True)
    while time.monotonic() < deadline and rounds < options.rounds:
        kind = kinds[rounds % len(kinds)]
        did, wrong = run_round(kind, seed + rounds)
        done += did
        if wrong:
            found.append(f"--only {kind} --seed {seed + rounds} --rounds 1: {wrong}")
            print(found[-1], flush=True)
        rounds += 1
        if len(found) == MOST_FOUND:
            break
    print(f"{rounds} rounds: " + ", ".join(f"{n:,} {what}" for what, n in sorted(done.items())))
    print(f"found: {len(found)}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
