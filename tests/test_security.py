"""The promises of SECURITY.md: no file is unpickled, and no file of ours is readable by others."""

import ast
import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest

import taskcarrier
from taskcarrier import load, map_array

PACKAGE = Path(taskcarrier.__file__).parent
X = np.arange(20.0)


class Trap:
    """An object that leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def calls(name):
    """Yield the calls in the package of a function of that name: file and arguments."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name):
                words = {one.arg: ast.unparse(one.value) for one in node.keywords}
                yield str(path.relative_to(PACKAGE)), ast.unparse(node.func), words


def test_no_code_unpickles_a_file():
    assert not list(calls("pickle.load"))
    # What is unpickled from memory came over a worker's own socket, by the backend a user
    # has registered, or lies in nameless memory.
    assert {where for where, _, _ in calls("pickle.loads")} <= {
        "estimators/fits.py",
        "scheduling/counters.py",
        "workers/joblib_backends.py",
        "workers/pickled_errors.py",
        "workers/pickling.py",
        "workers/processes/packed_chunks.py",
        "workers/processes/fork_server.py",
        "workers/processes/share_jobs.py",
        "workers/processes/worker_starter.py",
        "workers/processes/worker.py",
    }


def test_npy_files_are_never_read_with_pickles():
    found = list(calls("np.load"))
    assert found
    assert all(words.get("allow_pickle") == "False" for _, _, words in found)


@pytest.mark.parametrize("where", ["input", "load", "ledger", "part"])
def test_planted_pickles_are_refused(where, tmp_path):
    mark, out = tmp_path / "mark", tmp_path / "Y.npy"
    trap = np.array([Trap(mark)] * 20, object)
    if where in {"input", "load"}:
        np.save(tmp_path / "X.npy", trap, allow_pickle=True)
        with pytest.raises(ValueError, match="Python objects"):
            load(tmp_path / "X.npy") if where == "load" else map_array(np.copy, tmp_path / "X.npy")
    elif where == "ledger":
        Path(f"{out}.ledger").write_bytes(pickle.dumps(Trap(mark)))
        with pytest.raises(ValueError, match="no ledger"):
            map_array(np.negative, X, out=out, resume=True)
    else:

        def fails(chunk):
            if chunk[-1] == 19:
                raise OSError("later")
            return -chunk

        with pytest.raises(OSError, match="later"):
            map_array(fails, X, out=out, resume=True, chunksize=5, n_jobs=1)
        with Path(f"{out}.part").open("wb") as part:
            np.save(part, trap, allow_pickle=True)
        # It says nothing that can be gone on with, so everything is run again.
        with pytest.raises(OSError, match="later"):
            map_array(fails, X, out=out, resume=True, chunksize=5, n_jobs=1)
    assert not mark.exists()


def test_ledger_files_are_readable_only_by_their_owner_under_any_umask(tmp_path):
    seen = []

    def look(chunk):
        seen.extend(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.ledger"))
        return chunk

    before = os.umask(0)
    try:
        map_array(look, X, out=tmp_path / "Y.npy", resume=True, n_jobs=2, backend="threading")
    finally:
        os.umask(before)
    assert set(seen) == {0o600}
    assert [path.name for path in tmp_path.iterdir()] == ["Y.npy"]


@pytest.mark.parametrize("name", ["Y.npy.ledger", "Y.npy.part"])
def test_links_are_not_followed(name, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match=name):
        map_array(np.negative, X, out=tmp_path / "Y.npy", resume=True, backend="threading")
    assert victim.read_text() == "as it was"
