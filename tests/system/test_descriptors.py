"""No descriptor of ours is below 3, whatever the program does with its standard ones."""

import os
import subprocess
import sys

import pytest

from tests.strategies import ROOT

pytestmark = pytest.mark.one_case  # each starts programs


def run(command):
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
        check=False,
        capture_output=True,
        text=True,
    )


# One function closes the standard descriptors, the other writes to all of them.
MAPS = """
import fcntl, os, sys, traceback
from pathlib import Path
import numpy as np
from taskcarrier import StaticParallelMapper, map_array, share, shutdown

who, folder = sys.argv[1], Path(sys.argv[2])
log = (folder / "log").open("w")
log = os.fdopen(fcntl.fcntl(log.fileno(), fcntl.F_DUPFD_CLOEXEC, 50), "w")

def close_all():
    for fd in range(3):
        try:
            os.close(fd)
        except OSError:
            pass

def there():
    return [fd for fd in range(3) if os.path.islink(f"/proc/self/fd/{fd}")]

def named():
    return [os.readlink(f"/proc/self/fd/{fd}") for fd in there()]

def write_to_all():
    for fd in range(3):
        try:
            os.write(fd, b"garbage!" * 100)
        except OSError:
            pass

def closes(chunk):
    if who == "worker":
        close_all()
    return chunk * 2

def writes(chunk):
    result = chunk * 2
    write_to_all()
    return result

def large(i):
    write_to_all()
    return np.full(50_000, float(i))

def run():
    if who == "caller":
        close_all()
    before = there()
    X = np.arange(50_000.0)
    Y = folder / "Y.npy"
    for backend in ("loky", "threading"):
        options = {"n_jobs": 2, "backend": backend}
        mapper = StaticParallelMapper(2, backend=backend)
        for _ in range(2):
            if backend == "loky":
                assert np.array_equal(map_array(closes, X, **options), X * 2)
            assert np.array_equal(map_array(writes, X, **options), X * 2)
            doubled = map_array(writes, share(X), **options)
            assert np.array_equal(map_array(writes, doubled, out=Y, **options), X * 4)
            Z = map_array(writes, Y, out=folder / "Z.npy", resume=True, **options)
            assert np.array_equal(Z, X * 8)
            for results in (mapper.map(large, range(12)), mapper.imap(large, range(12))):
                assert all((row == i).all() for i, row in enumerate(results))
            assert there() == before
        if backend == "loky":
            found = {name for names in mapper.map(lambda _: named(), range(4)) for name in names}
            # Of the program's own; older lokys let workers have less of these, or nothing's place.
            # (Newer versions of libffi keep their own file open, wherever that comes to be.)
            own = set() if who == "worker" else set(named())
            found = {name for name in found if "/libffi.so" not in name}
            assert found <= {*own, "/dev/null"}, found
            shutdown()

try:
    run()
    print("right", file=log)
except BaseException:
    traceback.print_exc(file=log)
log.close()
"""


@pytest.mark.fault(38)
@pytest.mark.parametrize("who", ["nobody", "worker", "start", "caller"])
def test_writes_to_standard_descriptors_reach_no_descriptor_of_ours(who, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(MAPS)
    command = [sys.executable, str(script), who, str(tmp_path)]
    if who == "start":  # with none of them open
        command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    run(command)
    assert (tmp_path / "log").read_text() == "right\n"


STREAMS = """
import io, sys
import numpy as np
from taskcarrier import map_array

class NoFlush:
    def write(self, text):
        return len(text)

log, way = sys.stdout, sys.argv[1]
closed = io.StringIO()
closed.close()
sys.stdout = sys.stderr = {"none": None, "closed": closed, "no flush": NoFlush()}[way]
before = sys.stdout
X = np.arange(8.0)
assert np.array_equal(map_array(lambda c: c * 2, X, n_jobs=2, backend="loky"), X * 2)
assert sys.stdout is sys.stderr is before
log.write("right")
log.flush()  # at its end Python 3.14 does not, where there are daemon threads
"""


@pytest.mark.fault(38)
@pytest.mark.parametrize("way", ["none", "closed", "no flush"])
def test_standard_streams_that_cannot_be_flushed_are_left_alone(way):
    done = run([sys.executable, "-c", STREAMS, way])
    assert done.stdout == "right", done.stderr
