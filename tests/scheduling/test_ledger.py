"""The ledger: chunks are claimed once, and recovered by their marks after any death."""

import contextlib
import json
import mmap
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest

from taskcarrier.scheduling.counters import FileCounter, FileSetOnce, ThreadCounter, ThreadSetOnce
from taskcarrier.scheduling.ledger import (
    DONE,
    OWN_MARKS,
    PENDING,
    RECLAIMED,
    SENT,
    Ledger,
    ledger_nbytes,
)
from tests.errors import Killed

N_WORKERS = 3
N_CHUNKS = 100

CONTENDER = """
import sys
from taskcarrier.scheduling.counters import FileCounter
counter = FileCounter(int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(*(counter.advance() for _ in range(int(sys.argv[2]))))
"""

CLAIMER = """
import json, mmap, sys
from taskcarrier.scheduling.balance import Dynamic
from taskcarrier.scheduling.ledger import DONE, Ledger
from taskcarrier.scheduling.counters import FileSetOnce, FileCounter
words_fd, counter_fd, set_once_fd, worker, n_workers, n_chunks = map(int, sys.argv[1:])
memory = memoryview(mmap.mmap(words_fd, 0))
words, marks = memory[:-n_chunks].cast("q"), memory[-n_chunks:]
ledger = Ledger(words, FileCounter(counter_fd), FileSetOnce(set_once_fd), marks)
ledger.set_marks(None, n_chunks)
print("ready", flush=True)
sys.stdin.readline()
decided = ledger.propose(f"worker {worker}".encode()).decode()
taken = []
for chunk in Dynamic().chunks(ledger, worker, n_workers, n_chunks):
    taken.append(chunk)
    ledger.marks[chunk] = DONE
    ledger.finish(worker, 2)
print(json.dumps([decided, taken]))
"""

PROPOSER = """
import sys
from taskcarrier.scheduling.counters import FileSetOnce
fds = [int(word) for word in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.readline()
own = sys.argv[1].encode() * 50_000
print(*(chr(FileSetOnce(fd).propose(own + b"." * at)[0]) for at, fd in enumerate(fds)))
"""


@pytest.fixture(params=["/proc", "no /proc"])
def opened_by(request, monkeypatch):
    """Whether memory files can be opened by /proc."""
    if request.param == "no /proc":
        opens = os.open

        def refuses(path, *args, **kwargs):
            if str(path).startswith("/proc"):
                raise FileNotFoundError(path)
            return opens(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", refuses)
    return request.param


@pytest.fixture
def counter_fd(opened_by):
    fd = FileCounter.create()
    assert ("memfd" in Path(f"/proc/self/fd/{fd}").readlink().name) == (opened_by == "/proc")
    yield fd
    os.close(fd)


@pytest.fixture(params=["threads", "processes"])
def counter(request, counter_fd):
    return ThreadCounter() if request.param == "threads" else FileCounter(counter_fd)


@pytest.fixture
def set_once_fd(opened_by):
    fd = FileSetOnce.create()
    yield fd
    os.close(fd)


@pytest.fixture(params=["threads", "processes"])
def set_once(request, set_once_fd):
    return ThreadSetOnce() if request.param == "threads" else FileSetOnce(set_once_fd)


@pytest.fixture
def ledger(counter):
    words = memoryview(bytearray(ledger_nbytes(N_WORKERS))).cast("q")
    made = Ledger(words, counter, ThreadSetOnce())
    made.reset(N_WORKERS)
    return made


@contextlib.contextmanager
def contenders(code, arguments, fds):
    """Programs that inherit `fds`, all waiting for a line; killed at the end if need be."""
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, each)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=fds,
        )
        for each in arguments
    ]
    try:
        for program in programs:
            assert program.stdout.readline() == "ready\n"
        yield programs
    finally:
        for program in programs:
            program.kill()
            program.communicate()


def all_go(programs):
    for program in programs:
        program.stdin.write("\n")
        program.stdin.flush()
    return [program.communicate(timeout=60)[0] for program in programs]


class TestCounter:
    def test_a_counter_counts_from_zero(self, counter):
        assert [counter.advance() for _ in range(4)] == [0, 1, 2, 3]
        assert counter.position() == 4

    def test_a_counter_starts_over_after_reset(self, counter):
        counter.advance()
        counter.reset()
        assert counter.position() == 0
        assert counter.advance() == 0

    def test_each_number_goes_to_one_thread(self, counter):
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        taken = [[] for _ in range(8)]
        begin = threading.Barrier(8)

        def run(mine):
            begin.wait()
            mine.extend(counter.advance() for _ in range(2000))

        threads = [threading.Thread(target=run, args=(mine,)) for mine in taken]
        try:
            for thread in threads:
                thread.start()
        finally:
            for thread in threads:
                thread.join()
            sys.setswitchinterval(before)
        assert sorted(chain(*taken)) == list(range(16_000))

    def test_each_number_goes_to_one_process(self, counter_fd):
        n_programs, n_numbers = 3, 30_000
        with contenders(
            CONTENDER, [(counter_fd, n_numbers)] * n_programs, [counter_fd]
        ) as programs:
            taken = [[int(word) for word in out.split()] for out in all_go(programs)]
        assert all(mine == sorted(mine) for mine in taken)
        assert sorted(chain(*taken)) == list(range(n_programs * n_numbers))
        assert FileCounter(counter_fd).position() == n_programs * n_numbers

    def test_the_file_of_a_counter_is_not_inherited(self, counter_fd):
        assert not os.get_inheritable(counter_fd)


class TestSetOnce:
    @pytest.mark.parametrize("proposal", [b"", b"one", bytes(range(256)) * 4000])
    def test_the_first_proposal_counts(self, set_once, proposal):
        assert set_once.get() is None
        assert set_once.propose(proposal) == proposal
        assert set_once.propose(b"another") == proposal
        assert set_once.get() == proposal

    def test_a_value_can_be_set_again_after_reset(self, set_once):
        set_once.propose(b"something long")
        set_once.reset()
        assert set_once.get() is None
        assert set_once.propose(b"short") == b"short"
        assert set_once.get() == b"short"

    def test_threads_that_propose_at_once_get_the_same_value(self, set_once):
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        answers = []
        begin = threading.Barrier(8, timeout=30)

        def run(number):
            for _ in range(50):
                begin.wait()
                answers.append(set_once.propose(bytes([number]) * 100))
                if begin.wait() == 0:
                    assert len(set(answers)) == 1
                    answers.clear()
                    set_once.reset()
                begin.wait()

        with ThreadPoolExecutor(8) as threads:
            try:
                list(threads.map(run, range(8)))
            finally:
                sys.setswitchinterval(before)

    def test_processes_that_propose_at_once_get_the_same_value(self, opened_by):
        fds = [FileSetOnce.create() for _ in range(40)]
        try:
            with contenders(PROPOSER, [(name, *fds) for name in "abc"], fds) as programs:
                answers = {tuple(out.split()) for out in all_go(programs)}
            (first_proposal,) = answers
            assert len(first_proposal) == len(fds)
            for at, (name, fd) in enumerate(zip(first_proposal, fds, strict=True)):
                assert FileSetOnce(fd).get() == name.encode() * 50_000 + b"." * at
        finally:
            for fd in fds:
                os.close(fd)

    def test_the_file_of_a_set_once_is_not_inherited(self, set_once_fd):
        assert not os.get_inheritable(set_once_fd)


class TestLedger:
    def test_the_first_proposal_counts_for_all_workers(self, ledger):
        assert ledger.first_proposal() is None
        assert ledger.propose(b"mine") == b"mine"
        assert ledger.propose(b"yours") == b"mine"
        assert ledger.first_proposal() == b"mine"
        ledger.reset(N_WORKERS)
        assert ledger.first_proposal() is None

    def test_a_claimed_chunk_is_in_hand_until_finished(self, ledger):
        assert ledger.claim(1) == 0
        assert ledger.chunk_in_hand(1, N_CHUNKS) == 0
        assert ledger.chunk_in_hand(0, N_CHUNKS) is None
        ledger.finish(1, 5)
        assert ledger.chunk_in_hand(1, N_CHUNKS) is None
        assert ledger.n_claimed() == 1

    def test_a_held_chunk_is_in_hand(self, ledger):
        ledger.hold(2, 17)
        assert ledger.chunk_in_hand(2, N_CHUNKS) == 17
        assert ledger.attempt_in_hand(2) is None
        assert ledger.n_claimed() == 0

    @pytest.mark.parametrize("number", [0, 1, 1000])
    def test_an_attempt_is_in_hand_by_its_number(self, ledger, number):
        ledger.hold_attempt(1, number)
        assert ledger.attempt_in_hand(1) == number
        assert ledger.chunk_in_hand(1, N_CHUNKS) is None
        assert ledger.n_attempts_done(1) == 0
        ledger.finish_attempt(1, number, 5)
        assert ledger.attempt_in_hand(1) is None
        assert ledger.n_attempts_done(1) == number + 1
        assert ledger.n_items_of(1) == 5
        assert (ledger.n_attempts_done(0), ledger.n_claimed()) == (0, 0)

    def test_a_claim_is_no_attempt_in_hand(self, ledger):
        assert ledger.attempt_in_hand(1) is None
        ledger._counter = DeadlyCounter(ledger._counter)
        ledger._counter.dies = "before"
        with pytest.raises(Killed):
            ledger.claim(1)
        assert ledger.attempt_in_hand(1) is None

    def test_the_start_time_of_a_range_is_recorded(self, ledger):
        assert ledger.start_time_ns(1) == 0
        ledger.claim(1)
        ledger.set_start_time(1, 12_345)
        assert (ledger.start_time_ns(0), ledger.start_time_ns(1)) == (0, 12_345)
        ledger.clear_row(1)
        assert ledger.start_time_ns(1) == 0

    def test_a_range_is_not_charged_with_the_time_of_the_one_before(self, ledger):
        ledger.claim(1)
        ledger.set_start_time(1, 12_345)
        ledger.finish(1, 5)
        ledger.claim(1)  # and its own time is not noted yet
        assert ledger.start_time_ns(1) == 0

    def test_a_replaced_worker_starts_with_nothing_in_hand(self, ledger):
        for worker in (0, 1):
            ledger.claim(worker)
            ledger.finish(worker, 3)
            ledger.hold_attempt(worker, 4)
            ledger.finish_attempt(worker, 4, 3)
            ledger.claim(worker)
            ledger.set_start_time(worker, 99)
        ledger.propose(b"mine")
        ledger.clear_row(1)
        assert (ledger.n_items_of(1), ledger.n_attempts_done(1), ledger.start_time_ns(1)) == (
            0,
            0,
            0,
        )
        assert ledger.chunk_in_hand(1, N_CHUNKS) is None
        # Nothing else has changed.
        assert (ledger.n_items_of(0), ledger.n_attempts_done(0), ledger.start_time_ns(0)) == (
            6,
            5,
            99,
        )
        assert ledger.chunk_in_hand(0, N_CHUNKS) == 1
        assert (ledger.n_claimed(), ledger.first_proposal()) == (4, b"mine")

    def test_items_are_counted_by_worker_and_in_all(self, ledger):
        for worker, n_items in [(0, 3), (1, 4), (0, 5)]:
            ledger.claim(worker)
            ledger.finish(worker, n_items)
        assert [ledger.n_items_of(worker) for worker in range(N_WORKERS)] == [8, 4, 0]
        assert ledger.n_items_done(N_WORKERS) == 12

    def test_a_claim_past_the_last_chunk_is_not_in_hand(self, ledger):
        claimed = [ledger.claim(0) for _ in range(3)]
        assert claimed == [0, 1, 2]
        assert ledger.chunk_in_hand(0, n_chunks=3) == 2
        assert ledger.chunk_in_hand(0, n_chunks=2) is None

    def test_halt_sets_the_flag(self, ledger):
        assert ledger.is_halted is False
        ledger.halt()
        assert ledger.is_halted is True

    def test_reset_forgets_everything(self, ledger):
        ledger.claim(0)
        ledger.finish(0, 9)
        ledger.claim(1)
        ledger.set_start_time(1, 99)
        ledger.hold_attempt(2, 3)
        ledger.finish_attempt(2, 3, 1)
        ledger.hold_attempt(2, 4)
        ledger.halt()
        ledger.reset(N_WORKERS)
        assert ledger.is_halted is False
        assert ledger.n_claimed() == 0
        assert ledger.n_items_done(N_WORKERS) == 0
        for worker in range(N_WORKERS):
            assert ledger.chunk_in_hand(worker, N_CHUNKS) is None
            assert ledger.attempt_in_hand(worker) is None
            assert (ledger.n_attempts_done(worker), ledger.start_time_ns(worker)) == (0, 0)
        assert ledger.claim(2) == 0

    def test_workers_write_only_to_their_own_words(self):
        buffer = bytearray(ledger_nbytes(N_WORKERS))
        ledger = Ledger(memoryview(buffer).cast("q"), ThreadCounter(), ThreadSetOnce())
        ledger.reset(N_WORKERS)
        before = bytes(buffer)
        ledger.claim(1)
        ledger.set_start_time(1, 99)
        ledger.finish(1, 5)
        ledger.hold_attempt(1, 2)
        ledger.finish_attempt(1, 2, 5)
        changed = [i for i in range(len(buffer)) if buffer[i] != before[i]]
        # One pair of cache lines: that of worker 1, after two of the run and that of worker 0.
        assert changed
        assert {i // 128 for i in changed} == {3}

    def test_the_words_fit_into_the_memory(self):
        for n_workers in (1, 2, 50):
            assert ledger_nbytes(n_workers) % 8 == 0
            words = memoryview(bytearray(ledger_nbytes(n_workers))).cast("q")
            ledger = Ledger(words, ThreadCounter(), ThreadSetOnce())
            ledger.reset(n_workers)
            ledger.claim(n_workers - 1)
            ledger.finish(n_workers - 1, 7)
            assert ledger.n_items_done(n_workers) == 7

    def test_processes_share_a_ledger(self, counter_fd, set_once_fd):
        n_workers, n_chunks = 3, 5_000
        words_fd = os.memfd_create("words")
        try:
            os.ftruncate(words_fd, ledger_nbytes(n_workers) + n_chunks)
            with (
                mmap.mmap(words_fd, 0) as memory,
                memoryview(memory) as whole,
                whole[:-n_chunks] as begin,
                begin.cast("q") as words,
                whole[-n_chunks:] as marks,
            ):
                ledger = Ledger(words, FileCounter(counter_fd), FileSetOnce(set_once_fd))
                ledger.reset(n_workers)
                fds = [words_fd, counter_fd, set_once_fd]
                arguments = [(*fds, w, n_workers, n_chunks) for w in range(3)]
                with contenders(CLAIMER, arguments, fds) as programs:
                    told = [json.loads(out) for out in all_go(programs)]
                taken = [chunks for _, chunks in told]
                assert {get for get, _ in told} == {ledger.first_proposal().decode()}
                assert sorted(chain(*taken)) == list(range(n_chunks))
                assert [ledger.n_items_of(w) for w in range(3)] == [2 * len(t) for t in taken]
                assert ledger.n_claimed() == n_chunks + n_workers
                assert [ledger.chunk_in_hand(w, n_chunks) for w in range(3)] == [None] * 3
                assert bytes(marks) == bytes([DONE]) * n_chunks
        finally:
            os.close(words_fd)


class TestMarks:
    def test_marks_are_distinct(self):
        assert len({PENDING, DONE, SENT, RECLAIMED}) == 4
        assert PENDING == 0  # fresh memory

    def test_there_are_no_marks_unless_asked_for(self, ledger):
        ledger.set_marks(None, N_CHUNKS)
        assert ledger.marks is None
        assert Ledger.local(2).marks is None

    def test_few_marks_lie_in_the_ledger(self):
        own = bytearray(OWN_MARKS)
        words = memoryview(bytearray(ledger_nbytes(1))).cast("q")
        ledger = Ledger(words, ThreadCounter(), ThreadSetOnce(), memoryview(own))
        ledger.set_marks(None, 7)
        assert len(ledger.marks) == 7
        ledger.marks[6] = SENT
        assert own.find(SENT) == 6

    def test_many_marks_lie_in_the_given_memory(self):
        own, given = memoryview(bytearray(10)), memoryview(bytearray(OWN_MARKS + 1))
        words = memoryview(bytearray(ledger_nbytes(1))).cast("q")
        ledger = Ledger(words, ThreadCounter(), ThreadSetOnce(), own)
        ledger.set_marks(given, len(given))
        ledger.marks[OWN_MARKS] = DONE
        assert given[OWN_MARKS] == DONE
        assert not any(own)


class DeadlyWords:
    """Words of a ledger that kill a worker after a number of writes."""

    def __init__(self, words):
        self.words = words
        self.writes_left = None

    def __getitem__(self, index):
        return self.words[index]

    def __setitem__(self, index, value):
        if self.writes_left is not None:
            if self.writes_left == 0:
                raise Killed
            self.writes_left -= 1
        self.words[index] = value


class DeadlyCounter:
    """A counter that kills its user before or after it gives out a number."""

    def __init__(self, counter):
        self.counter = counter
        self.dies = ""

    def advance(self):
        if self.dies == "before":
            raise Killed
        number = self.counter.advance()
        if self.dies == "after":
            raise Killed
        return number

    def position(self):
        return self.counter.position()

    def reset(self, start=0):
        self.counter.reset(start)


class TestDeathInsideAClaim:
    """Worker 1 dies in each step of its claim; the others finish all chunks that they can claim."""

    N_WRITES = 2  # in a claim, counted by `test_a_claim_has_two_writes`
    N_CHUNKS = 20

    @pytest.fixture
    def words(self):
        return DeadlyWords(memoryview(bytearray(ledger_nbytes(N_WORKERS))).cast("q"))

    @pytest.fixture
    def deadly(self, counter):
        return DeadlyCounter(counter)

    @pytest.fixture
    def ledger(self, words, deadly):
        marks = memoryview(bytearray(self.N_CHUNKS))
        made = Ledger(words, deadly, ThreadSetOnce(), marks)
        made.reset(N_WORKERS)
        made.set_marks(None, self.N_CHUNKS)
        for worker in (0, 1, 2, 1, 0):  # chunks 0 to 4
            finish(made, worker, made.claim(worker))
        return made

    def left(self, ledger):
        """Chunks that are still to be run once the others are done."""
        for worker in (0, 2, 0):
            finish(ledger, worker, ledger.claim(worker))
        while (index := ledger.claim(2)) < self.N_CHUNKS:
            finish(ledger, 2, index)
        assert ledger.chunk_in_hand(2, self.N_CHUNKS) is None
        return [index for index in range(self.N_CHUNKS) if ledger.marks[index] == PENDING]

    def test_a_claim_has_two_writes(self, ledger, words):
        words.writes_left = 100
        assert ledger.claim(1) == 5
        assert words.writes_left == 100 - self.N_WRITES

    # The first write only announces a claim; before the second, a number is taken.
    @pytest.mark.parametrize(("n_writes", "lost"), [(0, []), (1, [5])])
    def test_a_death_before_a_write_loses_at_most_the_claimed_chunk(
        self, ledger, words, n_writes, lost
    ):
        words.writes_left = n_writes
        with pytest.raises(Killed):
            ledger.claim(1)
        words.writes_left = None
        assert ledger.chunk_in_hand(1, self.N_CHUNKS) is None
        assert self.left(ledger) == lost
        # Whatever others did, the dead worker has no chunk in hand.
        assert ledger.chunk_in_hand(1, self.N_CHUNKS) is None
        assert ledger.attempt_in_hand(1) is None

    @pytest.mark.parametrize(("dies", "lost"), [("before", []), ("after", [5])])
    def test_a_death_around_the_counter_loses_at_most_the_claimed_chunk(
        self, ledger, deadly, dies, lost
    ):
        deadly.dies = dies
        with pytest.raises(Killed):
            ledger.claim(1)
        deadly.dies = ""
        assert ledger.chunk_in_hand(1, self.N_CHUNKS) is None
        assert self.left(ledger) == lost

    def test_a_death_with_the_claim_in_hand_leaves_the_chunk(self, ledger):
        assert ledger.claim(1) == 5
        assert self.left(ledger) == [5]
        assert ledger.chunk_in_hand(1, self.N_CHUNKS) == 5

    @pytest.mark.parametrize("n_writes", [0, 1])
    def test_a_death_while_finishing_a_marked_chunk_loses_nothing(self, ledger, words, n_writes):
        assert ledger.claim(1) == 5
        ledger.marks[5] = DONE
        words.writes_left = n_writes
        with pytest.raises(Killed):
            ledger.finish(1, 1)
        words.writes_left = None
        assert self.left(ledger) == []
        assert ledger.chunk_in_hand(1, self.N_CHUNKS) in {5, None}  # which is finished, by its mark

    @pytest.mark.parametrize("n_writes", range(3))
    def test_a_death_while_finishing_an_attempt_leaves_it_in_hand_or_finished(
        self, ledger, words, n_writes
    ):
        ledger.hold_attempt(1, 0)
        words.writes_left = n_writes
        with pytest.raises(Killed):
            ledger.finish_attempt(1, 0, 4)
        words.writes_left = None
        # It is in hand or counted as finished, at every moment.
        assert ledger.attempt_in_hand(1) == 0 or ledger.n_attempts_done(1) == 1
        assert self.left(ledger) == []

    def test_a_lost_claim_past_the_last_chunk_loses_nothing(self, ledger, deadly):
        assert self.left(ledger) == []
        deadly.dies = "after"
        with pytest.raises(Killed):
            ledger.claim(1)
        assert ledger.chunk_in_hand(1, self.N_CHUNKS) is None


def finish(ledger, worker, index):
    ledger.marks[index] = DONE
    ledger.finish(worker, 1)
