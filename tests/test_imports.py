"""Importing the package is light, and inside it imports point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import taskcarrier

PACKAGE = Path(__file__).parents[1] / "taskcarrier"

# Bottom first. A module imports only from layers before its own; inside one folder (`workers`,
# `arrays`) modules also import from each other, but never in a circle. A folder stands for all of
# its modules.
LAYERS = [
    ["record", "system", "worker_died"],
    ["arguments", "errors", "random_streams"],
    ["memory", "notes"],
    ["report", "scheduling"],
    ["options", "progress", "workers"],
    ["run", "short_calls", "verbs"],
    ["short_runs"],
    ["arrays", "lists"],
    ["estimators", "mappers"],
    ["current"],
    ["__init__"],
]

# Who alone imports what.
ONLY = {
    "joblib": "workers",
    "numba": "arrays.kernels",
}

# What `import taskcarrier` leaves alone.
HEAVY = [
    "concurrent.futures",
    "dask",
    "joblib",
    "matplotlib",
    "multiprocessing.pool",
    "numba",
    "pandas",
    "sklearn",
    "tqdm",
]


def test_import_is_light():
    # The exceptions, the one other name, are imported when one is needed.
    code = (
        "import sys\n"
        "from taskcarrier import StaticParallelMapper, map_array, reduce_array, share, shutdown\n"
        f"print(*(m for m in {HEAVY} if m in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_every_public_name_is_where_the_table_says():
    assert sorted(taskcarrier._MODULES) == taskcarrier.__all__ == sorted(taskcarrier.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    said = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("taskcarrier.")
        for alias in node.names
    }
    assert said == {name: f"taskcarrier.{module}" for name, module in taskcarrier._MODULES.items()}
    for name in taskcarrier.__all__:
        assert getattr(taskcarrier, name).__name__ == name
        assert name in dir(taskcarrier)
    with pytest.raises(AttributeError, match="no attribute 'map_everything'"):
        taskcarrier.map_everything  # noqa: B018  # asking is the test


def test_imports_point_one_way():
    sources = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
    }
    assert "__init__" in sources
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"scheduling": "from .errors import E", "errors": ""}, []),
        ({"scheduling": "from . import errors", "errors": ""}, []),
        ({"scheduling": "import taskcarrier.errors", "errors": ""}, []),
        ({"errors": "from .scheduling import P"}, ["errors imports scheduling"]),
        (
            {"errors": "from taskcarrier.scheduling.scheduling import P"},
            ["errors imports scheduling"],
        ),
        (
            {"errors": "import taskcarrier.scheduling.scheduling as p"},
            ["errors imports scheduling"],
        ),
        ({"errors": "from taskcarrier import scheduling"}, ["errors imports scheduling"]),
        ({"errors": "def f():\n    from . import scheduling"}, ["errors imports scheduling"]),
        ({"errors": "from . import shutdown"}, ["errors imports __init__"]),
        ({"scheduling": "from . import run"}, ["scheduling imports run"]),
        ({"unknown": ""}, ["unknown is in no layer"]),
        ({"workers.threads": "from taskcarrier.scheduling.report import L", "report": ""}, []),
        ({"workers.threads": "from ..report import L", "report": ""}, []),
        ({"workers.__init__": "from .threads import T", "workers.threads": ""}, []),
        ({"workers.threads": "from ..run import R"}, ["workers.threads imports run"]),
        ({"workers.threads": "from ..arrays.x import R"}, ["workers.threads imports arrays"]),
        ({"mappers": "from .x import y"}, ["mappers imports __init__"]),
        (
            {"workers.__init__": "from .a import A", "workers.a": "from . import B"},
            ["workers, workers.a import each other"],
        ),
        (
            {"workers.a": "from .b import B", "workers.b": "from .a import A"},
            ["workers.a, workers.b import each other"],
        ),
        ({"workers.a": "import joblib", "arrays.kernels.compiler": "from numba import njit"}, []),
        ({"errors": "from joblib.externals import loky"}, ["errors imports joblib"]),
        ({"arrays.mapping": "import numba.core"}, ["arrays.mapping imports numba"]),
        (
            {"errors": "import importlib\nimportlib.import_module('numba.core')"},
            ["errors imports numba"],
        ),
    ],
)
def test_violations_of_the_layers_are_found(sources, expected):
    assert violations(sources) == expected


def violations(sources):
    """What is wrong with the modules of a package, given as {name inside it: source}."""
    # A name after `from . import` may be a module of the table that is not among the sources.
    known = {name_of(path) for path in sources} | {name for names in LAYERS for name in names}
    found, edges = [], {}
    for path, source in sorted(sources.items()):
        module = name_of(path)
        if layer(module) is None:
            found.append(f"{module} is in no layer")
            continue
        edges[module] = set()
        for target, is_ours in sorted(set(imports(path, ast.parse(source), known))):
            if not is_ours:
                wrong = not f"{module}.".startswith(f"{ONLY.get(target, module)}.")
            elif head(target) == head(module):
                edges[module].add(target)
                wrong = False
            else:
                wrong = layer(target) >= layer(module)
            if wrong:
                found.append(f"{module} imports {target}")
    return found + circles(edges)


def name_of(path):
    """What a module is imported as: a folder's `__init__` is the folder."""
    return path.removesuffix(".__init__")


def head(module):
    return module.partition(".")[0]


def layer(module):
    return next((number for number, names in enumerate(LAYERS) if head(module) in names), None)


def circles(edges):
    """Removes modules that import nothing of what is left; what stays imports in a circle."""
    left = {module: targets & edges.keys() for module, targets in edges.items()}
    while free := {module for module, targets in left.items() if not targets & left.keys()}:
        left = {module: targets for module, targets in left.items() if module not in free}
    return [f"{', '.join(sorted(left))} import each other"] if left else []


def imports(path, tree, known):
    """All imports of a module, in functions too: (our module or a foreign package, is it ours)."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                for alias in names:
                    yield resolve(alias.name, known)
            case ast.ImportFrom(source, names, level):
                base = absolute(path, source, level)
                for alias in names:
                    yield resolve(f"{base}.{alias.name}", known)
            case ast.Call(func, [ast.Constant(str(name)), *_]) if ast.unparse(func) in (
                "import_module",
                "importlib.import_module",
                "__import__",
            ):
                yield resolve(name, known)


def absolute(path, source, level):
    """The full name of what `from` names in a module of the package."""
    if level == 0:
        return source
    # One level is the folder of the module; `a.__init__` and `a.b` are both in the folder `a`.
    parts = ["taskcarrier", *path.split(".")][:-level]
    return ".".join([*parts, *([source] if source else [])])


def resolve(name, known):
    """The longest beginning of a dotted name that is a module of ours, or its foreign package."""
    first, *rest = name.split(".")
    if first != "taskcarrier":
        return first, False
    candidates = (".".join(rest[:stop]) for stop in range(len(rest), 0, -1))
    return next((module for module in candidates if module in known), "__init__"), True
