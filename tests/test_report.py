"""The report: a table for people, a dict for programs."""

import functools
import html
import json
import os
import signal
import threading
import time
from dataclasses import FrozenInstanceError, fields, replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from taskcarrier import last_report, map_items
from taskcarrier.report import Report, WorkerReport, keep_report


@pytest.fixture
def report():
    return Report(
        backend="loky",
        reason="the default",
        balance="dynamic",
        n_jobs=2,
        chunksize=1000,
        ranges=1235,
        items=1_234_567,
        bytes_copied=9_876_543,
        seconds=1.25,
        workers=(
            WorkerReport("process 4711", 1000, 1_000_000, 1.0, 0.25),
            WorkerReport("process 12", 235, 234_567, 0.5, 0.75),
        ),
    )


def test_the_dict_of_a_report_is_json(report):
    plain = json.loads(json.dumps(report.to_dict()))
    assert {name: plain[name] for name in ("backend", "items", "bytes_copied", "seconds")} == {
        "backend": "loky",
        "items": 1_234_567,
        "bytes_copied": 9_876_543,
        "seconds": 1.25,
    }
    assert set(plain) == {field.name for field in fields(Report)}
    assert plain["workers"][1] == {
        "name": "process 12",
        "ranges": 235,
        "items": 234_567,
        "busy": 0.5,
        "idle": 0.75,
    }


def test_the_text_of_a_report_is_a_table(report):
    lines = str(report).splitlines()
    assert lines[0] == (
        "1,234,567 items in 1,235 ranges of up to 1,000, dynamic balance, "
        "backend loky (the default)"
    )
    assert lines[1] == "1.25 s in all, 9,876,543 bytes read or copied by processes"
    assert lines[2].split() == ["worker", "ranges", "items", "busy", "s", "idle", "s"]
    assert lines[3].split() == ["process", "4711", "1,000", "1,000,000", "1.0000", "0.2500"]
    assert lines[4].split() == ["process", "12", "235", "234,567", "0.5000", "0.7500"]
    assert len({len(line) for line in lines[2:]}) == 1  # the columns stand under their heads


def test_notes_stand_below_the_first_lines(report):
    noted = replace(report, notes=("array 0 is pickled", "array 1 too"))
    plain, lines = str(report).splitlines(), str(noted).splitlines()
    assert lines == [*plain[:2], "array 0 is pickled", "array 1 too", *plain[2:]]
    assert json.loads(json.dumps(noted.to_dict()))["notes"] == list(noted.notes)


def cells_of(page):
    """What stands in the table of a page, by rows."""
    root = ET.fromstring(f"<div>{page.replace('<br>', '<br/>')}</div>")
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


def test_notebooks_show_a_table(report):
    page = report._repr_html_()
    text = str(report).splitlines()
    n_rows = 1 + len(report.workers)
    rows = cells_of(page)
    assert rows[0] == ["worker", "ranges", "items", "busy s", "idle s"]
    assert [" ".join(row).split() for row in rows] == [line.split() for line in text[-n_rows:]]
    for line in text[:-n_rows]:
        assert html.escape(line) in page
    assert repr(report).startswith("Report(backend=")


def test_values_in_html_are_escaped(report):
    nasty = "<script>alert('x')</script> & \"more\""
    worker = replace(report.workers[0], name=nasty)
    page = replace(report, reason=nasty, notes=(nasty,), workers=(worker,))._repr_html_()
    assert "<script>" not in page
    assert page.count(html.escape(nasty)) == 3
    assert cells_of(page)[1][0] == nasty


def test_a_report_without_workers_has_a_text(report):
    empty = Report(**{**report.to_dict(), "workers": ()})
    assert len(str(empty).splitlines()) == 3


def test_a_report_cannot_be_changed(report):
    with pytest.raises(FrozenInstanceError):
        report.items = 0
    with pytest.raises(FrozenInstanceError):
        report.workers[0].items = 0


def test_last_report_belongs_to_its_thread(report):
    found = []

    def elsewhere():
        try:
            last_report()
        except LookupError as error:
            found.append(str(error))
        keep_report(report)
        found.append(last_report())

    other = Report(**{**report.to_dict(), "items": 1})
    keep_report(other)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == ["nothing was run from this thread yet", report]
    assert found[1] is report
    assert last_report() is other


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_after_an_interrupt_the_report_is_that_of_the_interrupted_run(backend):
    caller = os.getpid()
    returned = threading.Event()
    # Threads wait until the call has returned. Worker processes are killed by it.
    wait = returned.wait if backend == "threading" else functools.partial(time.sleep, 60)

    def interrupting(x):
        if x == 3:
            os.kill(caller, signal.SIGINT)
        return wait()

    map_items(lambda x: x, np.arange(5), n_jobs=2, backend=backend)
    with pytest.raises(KeyboardInterrupt):
        map_items(interrupting, np.arange(3, 100), n_jobs=2, backend=backend)
    returned.set()
    report = last_report()
    assert (report.items, report.backend, report.workers) == (97, backend, ())
    assert report.notes[-1] == "ended by KeyboardInterrupt; what its workers did is not counted"


def test_functions_that_are_not_compiled_take_no_time_to_compile():
    for backend in ("sequential", "threading"):
        map_items(lambda row: row.sum(), np.ones((50, 3)), n_jobs=2, backend=backend)
        assert last_report().compiling == 0
