"""Ways to claim the next of many numbers, with two processes contending for them.

The ledger gives out chunks in this way (see `taskcarrier/scheduling/counters.py`). Every way must
give each number to exactly one claimer; how many it gives out twice is printed beside its time.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from bench.timing import Arm, Comparison, Measured, Settings, compare

CLAIMERS = 2
COUNTER = struct.Struct("q")


def run(settings: Settings) -> list[Comparison]:
    """Compare the ways that are right; count the double claims of the one that is not."""
    claims = settings.pick(full=30_000, quick=5_000, tiny=50)
    rounds = settings.turns(full=7, quick=2)
    doubled, seconds = contend("lseek_raw", claims)
    threads = threads_contend(claims)
    return [
        compare(
            f"claims: {CLAIMERS} processes contending, time a claim",
            [
                Arm(way, partial(_arm, way, claims))
                for way in ("lseek", "append", "flock", "record_lock")
            ],
            rounds=rounds,
            unit="us",
            notes=[
                f"lseek on a memfd as created: {1e6 * seconds:.2f} us, {doubled} claims double",
                f"{CLAIMERS} threads, counter under a lock: {1e6 * threads:.2f} us",
            ],
        )
    ]


def _arm(way: str, claims: int) -> Measured:
    doubled, seconds = contend(way, claims)
    return Measured(1e6 * seconds, doubled)


def contend(way: str, claims: int) -> tuple[int, float]:
    """Return the numbers given out twice, and seconds a claim, of two processes at once."""
    raw = os.memfd_create("claims")
    os.ftruncate(raw, 0 if way == "append" else mmap.PAGESIZE)
    shared = os.open(f"/proc/self/fd/{raw}", os.O_RDWR)
    command = [sys.executable, "-m", "bench.claims", way, str(raw), str(shared), str(claims)]
    children = [
        subprocess.Popen(
            command, pass_fds=(raw, shared), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(CLAIMERS)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()  # it is ready
        begin = b"%d\n" % (time.monotonic_ns() + 20_000_000)
        for child in children:
            assert child.stdin is not None
            child.stdin.write(begin)
            child.stdin.flush()
        answers = [json.loads(child.communicate()[0]) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
        os.close(raw)
        os.close(shared)
    numbers = [number for _, got in answers for number in got]
    return len(numbers) - len(set(numbers)), max(took for took, _ in answers) / claims


def threads_contend(claims: int) -> float:
    """Return seconds a claim of two threads with the counter that the library's threads use."""
    from taskcarrier.scheduling.counters import ThreadCounter

    counter = ThreadCounter()
    threads = [
        threading.Thread(target=lambda: [counter.advance() for _ in range(claims)])
        for _ in range(CLAIMERS)
    ]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - begin) / (CLAIMERS * claims)


def claimer(way: str, raw: int, shared: int) -> Callable[[], int]:
    """Return a function that claims the next number."""
    if way in {"lseek", "lseek_raw"}:
        from taskcarrier.scheduling.counters import FileCounter

        return FileCounter(shared if way == "lseek" else raw).advance
    own = os.open(f"/proc/self/fd/{raw}", os.O_RDWR | (os.O_APPEND if way == "append" else 0))
    if way == "append":

        def append() -> int:
            os.write(own, b"x")
            return os.lseek(own, 0, os.SEEK_CUR) - 1

        return append
    lock = fcntl.flock if way == "flock" else fcntl.lockf
    words = mmap.mmap(raw, mmap.PAGESIZE)

    def locked() -> int:
        lock(own, fcntl.LOCK_EX)
        (number,) = COUNTER.unpack_from(words)
        COUNTER.pack_into(words, 0, number + 1)
        lock(own, fcntl.LOCK_UN)
        return number

    return locked


def _child() -> None:
    way, raw, shared, claims = sys.argv[1], *map(int, sys.argv[2:])
    claim = claimer(way, raw, shared)
    print("ready", flush=True)
    at = int(sys.stdin.readline())
    while time.monotonic_ns() < at:
        pass
    begin = time.perf_counter()
    got = [claim() for _ in range(claims)]
    print(json.dumps((time.perf_counter() - begin, got)))


if __name__ == "__main__":
    _child()
