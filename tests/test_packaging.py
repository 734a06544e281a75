"""What is said in more than one place about the package is said alike."""

import ast
import tomllib

import pytest
import yaml

import taskcarrier
from tests.strategies import ROOT


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project(pyproject):
    return pyproject["project"]


@pytest.fixture(scope="module")
def environment():
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def test_environment_has_the_dependencies_of_the_project(project, environment):
    python = f"python{project['requires-python']}"
    assert sorted(environment["dependencies"]) == sorted([python, *project["dependencies"]])
    assert environment["name"] == project["name"]
    assert environment["channels"] == ["conda-forge"]


def test_the_oldest_versions_are_the_lower_bounds(project):
    lines = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = dict(dependency.split(">=") for dependency in project["dependencies"])
    assert pins.keys() == bounds.keys()
    for name, bound in bounds.items():
        # 1.26 is the bound whose first version is 1.26.0.
        assert pins[name] in (bound, f"{bound}.0")


def test_dependency_groups_are_the_extras_of_the_same_names(pyproject, project):
    groups = pyproject["dependency-groups"]
    extras = project["optional-dependencies"]
    assert {name: extras[name] for name in groups if name != "dev"} == {
        name: group for name, group in groups.items() if name != "dev"
    }
    included = [entry["include-group"] for entry in groups["dev"] if isinstance(entry, dict)]
    assert included == [name for name in groups if name != "dev"]


def test_the_version_equals_that_of_the_project(project):
    assert taskcarrier.__version__ == project["version"]


def test_the_version_has_an_entry_in_the_changelog(project):
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_supported_python_versions_are_named(project):
    assert project["requires-python"] == ">=3.11"
    prefix = "Programming Language :: Python :: 3."
    named = [c.removeprefix(prefix) for c in project["classifiers"] if c.startswith(prefix)]
    assert named == ["11", "12", "13", "14"]


@pytest.mark.parametrize("file", [".ci/run", ".github/workflows/ci.yml", "noxfile.py"])
def test_the_supported_python_versions_are_tested(file, project):
    prefix = "Programming Language :: Python :: "
    named = [c.removeprefix(prefix) for c in project["classifiers"] if c.startswith(f"{prefix}3.")]
    text = (ROOT / file).read_text(encoding="utf-8").replace('"', "").replace(",", "")
    assert " ".join(named) in text


def test_setup_py_leaves_the_metadata_to_pyproject():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call for call in calls if call.startswith("setup(")] == [
        "setup(cmdclass={'install': Install})"
    ]


def test_the_package_is_marked_as_typed():
    assert (ROOT / "taskcarrier" / "py.typed").exists()
