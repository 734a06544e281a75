"""The examples of README.md and docs/ run as they stand there, and what pages promise is tested."""

import inspect
import re
import traceback
from pathlib import Path

import pytest

import taskcarrier

README = Path(__file__).parents[1] / "README.md"


def blocks(text):
    """The ```python blocks of a Markdown text: (line of the first statement, code)."""
    opened = re.compile(r"^( *)```python *\n(.*?)^\1``` *$", re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(2)) + 1, match[2]) for match in opened.finditer(text)]


def run(text, name):
    # As a script would be: its functions belong to a module that no worker can import.
    namespace = {"__name__": "__main__"}
    try:
        for line, code in blocks(text):
            run_block(line, code, name, namespace)
    finally:
        namespace.clear()  # numba keeps functions, and these their globals


def run_block(line, code, name, namespace):
    # Empty lines in front make the tracebacks name the lines of the file.
    program = compile("\n" * (line - 1) + code, name, "exec")
    try:
        exec(program, namespace)
    except BaseException as error:
        at = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == name]
        error.add_note(f"in the example at {name}:{line}, raised from its line {at[-1]}")
        raise


def test_the_examples_run(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8")
    assert text.count("```python") == len(blocks(text)) > 0
    monkeypatch.chdir(tmp_path)  # an example may write a file
    run(text, str(README))


def test_the_call_that_is_followed_step_by_step_runs():
    page = README.parent / "docs" / "how-it-works.md"
    text = page.read_text(encoding="utf-8")
    assert len(blocks(text)) == 1
    run(text, str(page))


def test_the_glossary_names_what_there_is():
    text = (README.parent / "docs" / "glossary.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([A-Za-z_]+)`", text))
    package = Path(taskcarrier.__file__).parent
    source = "\n".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    words = set(re.findall(r"\w+", source))
    assert "ChunkGrid" in names
    assert names <= words


def test_the_examples_about_filters_run():
    pytest.importorskip("scipy", reason="the page is about filters of SciPy")
    page = README.parent / "docs" / "filters.md"
    text = page.read_text(encoding="utf-8")
    assert blocks(text)
    run(text, str(page))


def test_the_examples_about_numba_run():
    page = README.parent / "docs" / "numba.md"
    text = page.read_text(encoding="utf-8")
    assert blocks(text)
    run(text, str(page))


def test_every_row_of_the_page_about_faults_is_covered_by_tests():
    page = README.parent / "docs" / "faults.md"
    rows = {
        int(n) for n in re.findall(r"^\| (\d+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = set()
    for path in Path(__file__).parent.rglob("test_*.py"):
        for numbers in re.findall(
            r"^ *@pytest\.mark\.fault\(([\d, ]+)\)$", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            named |= {int(n) for n in numbers.split(",")}
    assert named == rows


TWO = """\
# Title
```python
x = 1
```
text
```bash
false
```
```python
y = x + 1

assert y == 2
assert y == 3, "too small"
```
"""


def test_every_block_is_found_with_its_line():
    assert blocks(TWO) == [
        (3, "x = 1\n"),
        (10, 'y = x + 1\n\nassert y == 2\nassert y == 3, "too small"\n'),
    ]


def test_an_example_that_fails_says_where():
    with pytest.raises(AssertionError, match="too small") as caught:
        run(TWO, "README.md")
    assert caught.value.__notes__ == ["in the example at README.md:10, raised from its line 13"]


def test_the_table_of_options_equals_the_signatures():
    text = README.read_text(encoding="utf-8").partition("## Which option is where\n")[2]
    head, _, *lines = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in text.strip().partition("\n\n")[0].splitlines()
    ]
    verbs = [name.strip("`") for name in head[1:]]
    said = {verb: set() for verb in verbs}
    for first, *cells in lines:
        options = re.findall(r"`(\w+)`", first)
        for verb, cell in zip(verbs, cells, strict=False):
            own = re.findall(r"`(\w+)`", cell)
            said[verb].update(own or (options if cell else []))
    for verb, options in said.items():
        where = taskcarrier.SerialMapper if verb.startswith("mapper.") else taskcarrier
        function = getattr(where, verb.removeprefix("mapper."))
        parameters = inspect.signature(function).parameters.values()
        assert options == {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}, verb
