"""The bar, and the report in the log."""

import io
import logging
from unittest.mock import MagicMock

import pytest

from taskcarrier import SerialMapper
from taskcarrier.progress import log_report, progress_bar
from taskcarrier.report import Report
from taskcarrier.scheduling.ledger import Ledger
from tests.strategies import run_script

REPORT = Report("sequential", "asked for", "serial", 1, 1, 3, 3, 0, 0.5, ())


@pytest.fixture
def no_monitor(monkeypatch):
    """tqdm's monitor is a thread for the length of the program."""
    tqdm = pytest.importorskip("tqdm").tqdm
    monkeypatch.setattr(tqdm, "monitor_interval", 0)


@pytest.mark.parametrize("verbosity", [0, -1])
def test_nothing_is_shown_without_verbosity(verbosity, capsys):
    with progress_bar(verbosity, 10, 1) as tick:
        assert tick is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.fault(38)
@pytest.mark.parametrize("kind", ["None", "closed"])
def test_without_standard_error_there_is_no_bar(kind, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", None if kind == "None" else closed)
    with progress_bar(1, 10, 1) as tick:
        assert tick is None
    mapper = SerialMapper(verbosity=1)
    assert mapper.map(abs, [1, -2]) == list(mapper.imap(abs, [1, -2])) == [1, 2]


@pytest.mark.usefixtures("no_monitor")
class TestBar:
    def test_the_bar_counts_items_of_all_workers(self, capsys):
        ledger = Ledger.local(2)
        with progress_bar(1, 40, 2) as tick:
            tick(ledger)
            for worker, n_items in [(0, 10), (1, 5)]:
                ledger.claim(worker)
                ledger.finish(worker, n_items)
            tick(ledger)
            tick(ledger)
        last = shown_last(capsys)
        assert "15/40" in last
        assert "item" in last

    def test_the_bar_is_complete_at_the_end(self, capsys):
        ledger = Ledger.local(1)
        with progress_bar(1, 3, 1) as tick:
            for _ in range(3):
                ledger.claim(0)
                ledger.finish(0, 1)
                tick(ledger)
        assert "100%" in capsys.readouterr().err

    def test_the_bar_begins_with_what_was_done_before(self, capsys):
        ledger = Ledger.local(1)
        with progress_bar(1, 40, 1, n_before=30) as tick:
            tick(ledger)
            assert "30/40" in shown_last(capsys)
            ledger.claim(0)
            ledger.finish(0, 10)
            tick(ledger)
        assert "40/40" in shown_last(capsys)

    def test_the_bar_is_closed_after_an_error(self, capsys):
        with pytest.raises(KeyError), progress_bar(1, 3, 1):
            raise KeyError
        assert capsys.readouterr().err.endswith("\n")

    def test_a_bar_of_no_items_is_shown(self, capsys):
        with progress_bar(1, 0, 1) as tick:
            tick(Ledger.local(1))
        assert "0item" in capsys.readouterr().err


def test_a_bar_makes_no_lock_that_processes_share(tmp_path):
    code = """
from tqdm.std import TqdmDefaultWriteLock
from taskcarrier.progress import progress_bar

with progress_bar(1, 3, 1):
    pass
print(hasattr(TqdmDefaultWriteLock, "mp_lock"))
"""
    assert run_script(tmp_path, code) == "False\n"


@pytest.mark.usefixtures("no_monitor")
def test_a_bar_uses_the_lock_that_the_program_has_set(monkeypatch):
    lock = MagicMock()
    monkeypatch.setattr("tqdm.std.tqdm._lock", lock, raising=False)
    with progress_bar(1, 3, 1):
        pass
    assert lock.__enter__.called


def shown_last(capsys):
    """The bar as it stands."""
    out, err = capsys.readouterr()
    assert out == ""
    return err.rstrip().rsplit("\r", maxsplit=1)[-1]


@pytest.mark.parametrize(("verbosity", "expected"), [(0, []), (1, []), (2, [str(REPORT)])])
def test_the_report_is_logged_at_verbosity_two(verbosity, expected, caplog):
    with caplog.at_level(logging.INFO, logger="taskcarrier"):
        log_report(verbosity, REPORT)
    assert [record.getMessage() for record in caplog.records] == expected
