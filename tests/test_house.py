"""The house itself: what lies where, who may import whom, what starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import imported, loaded, python

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sparseprune"
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_top_level_holds_the_five_names_and_dot_files() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    five = {"README.md", "pyproject.toml", "sparseprune", "specs", "tests"}
    assert {name for name in names if not name.startswith(".")} == five


def test_package_holds_the_rooms_of_the_house() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    layers = {"cli", "api", "report", "removal", "execution", "calibration", "spec", "checkpoint", "engine"}
    assert rooms == {*layers, "results"}
    loose = {path.name for path in PACKAGE.glob("*") if path.is_file()}
    assert loose == {"README.md", "__init__.py", "__main__.py", "errors.py", "py.typed"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_says_what_it_owns_and_asserts_nothing(path: Path) -> None:
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree)
    assert docstring
    assert len(docstring.splitlines()) <= 6
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert path.stem not in {"utils", "helpers", "common", "base", "manager"}


def test_layers_are_held_by_the_import_linter() -> None:
    done = python(Path(sys.executable).with_name("lint-imports"), "--no-cache", cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import sparseprune",
        "import sparseprune.checkpoint, sparseprune.spec, sparseprune.execution.schedule",
        "import sparseprune.cli.app",
        "import sparseprune.api.calibrating; from sparseprune.calibration import read_documents",
    ],
)
def test_imports_without_torch(code: str) -> None:
    assert "torch" not in imported(code)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["apply", "--help"]])
def test_help_and_version_import_no_torch(words: list[str]) -> None:
    assert loaded(*words) == (0, set())


def test_every_public_name_is_there() -> None:
    import sparseprune

    for name in sparseprune.__all__:
        assert getattr(sparseprune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sparseprune.nothing
