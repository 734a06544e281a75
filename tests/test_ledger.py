"""The ledger: cells claimed once, and found again after any death."""

import contextlib
import json
import mmap
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest

from taskcarrier.ledger import (
    FileAgreement,
    FileCursor,
    Ledger,
    ThreadAgreement,
    ThreadCursor,
    ledger_nbytes,
)

N_WORKERS = 3
N_CELLS = 100

CONTENDER = """
import sys
from taskcarrier.ledger import FileCursor
cursor = FileCursor(int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(*(cursor.advance() for _ in range(int(sys.argv[2]))))
"""

CLAIMER = """
import json, mmap, sys
from taskcarrier.balance import Dynamic
from taskcarrier.ledger import FileAgreement, FileCursor, Ledger
words_fd, cursor_fd, agreement_fd, worker, n_workers, n_cells = map(int, sys.argv[1:])
words = memoryview(mmap.mmap(words_fd, 0)).cast("q")
ledger = Ledger(words, FileCursor(cursor_fd), FileAgreement(agreement_fd))
print("ready", flush=True)
sys.stdin.readline()
settled = ledger.agree(f"worker {worker}".encode()).decode()
taken = []
for cell in Dynamic().cells(ledger, worker, n_workers, n_cells):
    taken.append(cell)
    ledger.lay_down(worker, 2)
print(json.dumps([settled, taken]))
"""

PROPOSER = """
import sys
from taskcarrier.ledger import FileAgreement
fds = [int(word) for word in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.readline()
own = sys.argv[1].encode() * 50_000
print(*(chr(FileAgreement(fd).settle(own + b"." * at)[0]) for at, fd in enumerate(fds)))
"""


@pytest.fixture
def cursor_fd():
    fd = FileCursor.create()
    yield fd
    os.close(fd)


@pytest.fixture(params=["threads", "processes"])
def cursor(request, cursor_fd):
    return ThreadCursor() if request.param == "threads" else FileCursor(cursor_fd)


@pytest.fixture
def agreement_fd():
    fd = FileAgreement.create()
    yield fd
    os.close(fd)


@pytest.fixture(params=["threads", "processes"])
def agreement(request, agreement_fd):
    return ThreadAgreement() if request.param == "threads" else FileAgreement(agreement_fd)


@pytest.fixture
def ledger(cursor):
    words = memoryview(bytearray(ledger_nbytes(N_WORKERS))).cast("q")
    made = Ledger(words, cursor, ThreadAgreement())
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


class TestCursor:
    def test_counts_from_zero(self, cursor):
        assert [cursor.advance() for _ in range(4)] == [0, 1, 2, 3]
        assert cursor.position() == 4

    def test_starts_again(self, cursor):
        cursor.advance()
        cursor.reset()
        assert cursor.position() == 0
        assert cursor.advance() == 0

    def test_each_number_to_one_thread(self, cursor):
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        taken = [[] for _ in range(8)]
        begin = threading.Barrier(8)

        def run(mine):
            begin.wait()
            mine.extend(cursor.advance() for _ in range(2000))

        threads = [threading.Thread(target=run, args=(mine,)) for mine in taken]
        try:
            for thread in threads:
                thread.start()
        finally:
            for thread in threads:
                thread.join()
            sys.setswitchinterval(before)
        assert sorted(chain(*taken)) == list(range(16_000))

    def test_each_number_to_one_process(self, cursor_fd):
        n_programs, n_numbers = 3, 30_000
        with contenders(CONTENDER, [(cursor_fd, n_numbers)] * n_programs, [cursor_fd]) as programs:
            taken = [[int(word) for word in out.split()] for out in all_go(programs)]
        assert all(mine == sorted(mine) for mine in taken)
        assert sorted(chain(*taken)) == list(range(n_programs * n_numbers))
        assert FileCursor(cursor_fd).position() == n_programs * n_numbers

    def test_file_is_not_inherited_by_accident(self, cursor_fd):
        assert not os.get_inheritable(cursor_fd)


class TestAgreement:
    @pytest.mark.parametrize("proposal", [b"", b"one", bytes(range(256)) * 4000])
    def test_the_first_proposal_counts(self, agreement, proposal):
        assert agreement.settled() is None
        assert agreement.settle(proposal) == proposal
        assert agreement.settle(b"another") == proposal
        assert agreement.settled() == proposal

    def test_starts_again(self, agreement):
        agreement.settle(b"something long")
        agreement.reset()
        assert agreement.settled() is None
        assert agreement.settle(b"short") == b"short"
        assert agreement.settled() == b"short"

    def test_threads_that_propose_at_once_settle_on_one(self, agreement):
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        settled = []
        begin = threading.Barrier(8, timeout=30)

        def run(number):
            for _ in range(50):
                begin.wait()
                settled.append(agreement.settle(bytes([number]) * 100))
                if begin.wait() == 0:
                    assert len(set(settled)) == 1
                    settled.clear()
                    agreement.reset()
                begin.wait()

        with ThreadPoolExecutor(8) as threads:
            try:
                list(threads.map(run, range(8)))
            finally:
                sys.setswitchinterval(before)

    def test_processes_that_propose_at_once_settle_on_one(self):
        fds = [FileAgreement.create() for _ in range(40)]
        try:
            with contenders(PROPOSER, [(name, *fds) for name in "abc"], fds) as programs:
                answers = {tuple(out.split()) for out in all_go(programs)}
            (agreed,) = answers
            assert len(agreed) == len(fds)
            for at, (name, fd) in enumerate(zip(agreed, fds, strict=True)):
                assert FileAgreement(fd).settled() == name.encode() * 50_000 + b"." * at
        finally:
            for fd in fds:
                os.close(fd)

    def test_file_is_not_inherited_by_accident(self, agreement_fd):
        assert not os.get_inheritable(agreement_fd)


class TestLedger:
    def test_workers_agree(self, ledger):
        assert ledger.agreed() is None
        assert ledger.agree(b"mine") == b"mine"
        assert ledger.agree(b"yours") == b"mine"
        assert ledger.agreed() == b"mine"
        ledger.reset(N_WORKERS)
        assert ledger.agreed() is None

    def test_a_claim_is_in_hand_until_laid_down(self, ledger):
        assert ledger.claim(1) == 0
        assert ledger.in_hand(1, N_WORKERS, N_CELLS) == 0
        assert ledger.in_hand(0, N_WORKERS, N_CELLS) is None
        ledger.lay_down(1, 5)
        assert ledger.in_hand(1, N_WORKERS, N_CELLS) is None
        assert ledger.given_out() == 1

    def test_a_held_cell_is_in_hand(self, ledger):
        ledger.hold(2, 17)
        assert ledger.in_hand(2, N_WORKERS, N_CELLS) == 17
        assert ledger.given_out() == 0

    def test_items_are_counted_by_worker_and_in_all(self, ledger):
        for worker, n_items in [(0, 3), (1, 4), (0, 5)]:
            ledger.claim(worker)
            ledger.lay_down(worker, n_items)
        assert [ledger.items_of(worker) for worker in range(N_WORKERS)] == [8, 4, 0]
        assert ledger.items_done(N_WORKERS) == 12

    def test_a_claim_beyond_the_last_cell_is_none(self, ledger):
        claimed = [ledger.claim(0) for _ in range(3)]
        assert claimed == [0, 1, 2]
        assert ledger.in_hand(0, N_WORKERS, n_cells=3) == 2
        assert ledger.in_hand(0, N_WORKERS, n_cells=2) is None

    def test_halt(self, ledger):
        assert ledger.halted is False
        ledger.halt()
        assert ledger.halted is True

    def test_reset_forgets_everything(self, ledger):
        ledger.claim(0)
        ledger.lay_down(0, 9)
        ledger.claim(1)
        ledger.hold(2, 3)
        ledger.halt()
        ledger.reset(N_WORKERS)
        assert ledger.halted is False
        assert ledger.given_out() == 0
        assert ledger.items_done(N_WORKERS) == 0
        assert [ledger.in_hand(w, N_WORKERS, N_CELLS) for w in range(N_WORKERS)] == [None] * 3
        assert ledger.claim(2) == 0

    def test_workers_do_not_write_each_other_s_words(self):
        buffer = bytearray(ledger_nbytes(N_WORKERS))
        ledger = Ledger(memoryview(buffer).cast("q"), ThreadCursor(), ThreadAgreement())
        ledger.reset(N_WORKERS)
        before = bytes(buffer)
        ledger.claim(1)
        ledger.lay_down(1, 5)
        changed = [i for i in range(len(buffer)) if buffer[i] != before[i]]
        # One cache line, that of worker 1 behind two of the run and that of worker 0.
        assert changed
        assert {i // 64 for i in changed} == {3}

    def test_the_words_fit(self):
        for n_workers in (1, 2, 50):
            assert ledger_nbytes(n_workers) % 8 == 0
            words = memoryview(bytearray(ledger_nbytes(n_workers))).cast("q")
            ledger = Ledger(words, ThreadCursor(), ThreadAgreement())
            ledger.reset(n_workers)
            ledger.claim(n_workers - 1)
            ledger.lay_down(n_workers - 1, 7)
            assert ledger.items_done(n_workers) == 7

    def test_processes_share_it(self, cursor_fd, agreement_fd):
        n_workers, n_cells = 3, 5_000
        words_fd = os.memfd_create("words")
        try:
            os.ftruncate(words_fd, ledger_nbytes(n_workers))
            with mmap.mmap(words_fd, 0) as memory, memoryview(memory).cast("q") as words:
                ledger = Ledger(words, FileCursor(cursor_fd), FileAgreement(agreement_fd))
                ledger.reset(n_workers)
                fds = [words_fd, cursor_fd, agreement_fd]
                arguments = [(*fds, w, n_workers, n_cells) for w in range(3)]
                with contenders(CLAIMER, arguments, fds) as programs:
                    told = [json.loads(out) for out in all_go(programs)]
                taken = [cells for _, cells in told]
                assert {settled for settled, _ in told} == {ledger.agreed().decode()}
                assert sorted(chain(*taken)) == list(range(n_cells))
                assert [ledger.items_of(w) for w in range(3)] == [2 * len(t) for t in taken]
                assert ledger.given_out() == n_cells + n_workers
                assert [ledger.in_hand(w, n_workers, n_cells) for w in range(3)] == [None] * 3
        finally:
            os.close(words_fd)


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


class DeadlyWords:
    """Words of a ledger that let a worker write so many of them, and then die."""

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


class DeadlyCursor:
    """A cursor that kills its user before or after it gives out a number."""

    def __init__(self, cursor):
        self.cursor = cursor
        self.dies = ""

    def advance(self):
        if self.dies == "before":
            raise Killed
        number = self.cursor.advance()
        if self.dies == "after":
            raise Killed
        return number

    def position(self):
        return self.cursor.position()

    def reset(self):
        self.cursor.reset()


class TestDeathInsideAClaim:
    """Worker 1 dies in each step of its claim, after and before claims of others."""

    N_WRITES = 4  # in a claim, counted by `test_number_of_steps`

    @pytest.fixture
    def words(self):
        return DeadlyWords(memoryview(bytearray(ledger_nbytes(N_WORKERS))).cast("q"))

    @pytest.fixture
    def deadly(self, cursor):
        return DeadlyCursor(cursor)

    @pytest.fixture
    def ledger(self, words, deadly):
        made = Ledger(words, deadly, ThreadAgreement())
        made.reset(N_WORKERS)
        for worker in (0, 1, 2, 1, 0):  # cells 0 to 4
            made.claim(worker)
            made.lay_down(worker, 1)
        return made

    def test_number_of_steps(self, ledger, words):
        words.writes_left = 100
        assert ledger.claim(1) == 5
        assert words.writes_left == 100 - self.N_WRITES

    @pytest.mark.parametrize("n_writes", range(N_WRITES))
    @pytest.mark.parametrize("others_go_on", [False, True])
    def test_in_front_of_each_write(self, ledger, words, n_writes, others_go_on):
        words.writes_left = n_writes
        with pytest.raises(Killed):
            ledger.claim(1)
        words.writes_left = None
        taken = [ledger.claim(0), ledger.claim(2), ledger.claim(0)] if others_go_on else []
        # The first write only announces a claim; from the second on, a number was taken.
        expected = None if n_writes == 0 else 5
        assert expected not in taken
        assert ledger.in_hand(1, N_WORKERS, N_CELLS) == expected
        assert ledger.given_out() == 5 + len(taken) + (expected is not None)

    @pytest.mark.parametrize(("dies", "expected"), [("before", None), ("after", 5)])
    @pytest.mark.parametrize("others_go_on", [False, True])
    def test_around_the_cursor(self, ledger, deadly, dies, expected, others_go_on):
        deadly.dies = dies
        with pytest.raises(Killed):
            ledger.claim(1)
        deadly.dies = ""
        if others_go_on:
            assert ledger.claim(2) == (5 if expected is None else 6)
        assert ledger.in_hand(1, N_WORKERS, N_CELLS) == expected

    def test_a_lost_claim_beyond_the_last_cell_is_none(self, ledger, deadly):
        deadly.dies = "after"
        with pytest.raises(Killed):
            ledger.claim(1)
        assert ledger.in_hand(1, N_WORKERS, n_cells=5) is None

    def test_after_everything_was_given_out(self, ledger, deadly):
        deadly.dies = "after"
        with pytest.raises(Killed):
            ledger.claim(1)
        deadly.dies = ""
        while ledger.claim(0) < N_CELLS:
            ledger.lay_down(0, 1)
        assert ledger.claim(2) > N_CELLS
        assert ledger.in_hand(1, N_WORKERS, N_CELLS) == 5
        assert ledger.in_hand(0, N_WORKERS, N_CELLS) is None
