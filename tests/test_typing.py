"""The types of all verbs and mapper methods are what two type checkers say that they are."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.strategies import ROOT

FOLDER = ROOT / "tests" / "typing"


def run(*words):
    program = [sys.executable, "-m", *map(str, words)]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    return result.stdout


def check_with_mypy(tmp_path):
    files = sorted(FOLDER.glob("*.py"))
    text = run("mypy", "--strict", f"--cache-dir={tmp_path}", *files)
    for path, line, message in re.findall(r"^(.*?):(\d+): error: (.*)$", text, re.MULTILINE):
        # `make check` looks into the package, with one version of numpy.
        if (ROOT / path).parent == FOLDER:
            yield Path(path).name, int(line), message


def check_with_pyright(tmp_path):
    report = json.loads(
        run("basedpyright", "--project", FOLDER, "--pythonpath", sys.executable, "--outputjson")
    )
    assert report["summary"]["filesAnalyzed"] == len(list(FOLDER.glob("*.py")))
    for one in report["generalDiagnostics"]:
        yield Path(one["file"]).name, one["range"]["start"]["line"] + 1, one["message"]


@pytest.mark.timeout(900)  # a checker reads all of numpy first
@pytest.mark.parametrize("check", [check_with_mypy, check_with_pyright])
def test_the_types_are_as_asserted_and_each_mistake_is_found(check, tmp_path):
    found = list(check(tmp_path))
    assert [one for one in found if one[0] != "mistakes.py"] == []
    lines = (FOLDER / "mistakes.py").read_text(encoding="utf-8").splitlines()
    calls = [number for number, line in enumerate(lines, 1) if re.match(r"\w+\(", line)]
    assert sorted({line for _, line, _ in found}) == calls
