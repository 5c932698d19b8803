"""What is published: a source archive, the wheel built from it, and what a bare environment runs of it."""

import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.metadata import Metadata

import sparseprune
from sparseprune.spec import list_specs
from tests.commands import python

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a source archive and of a wheel that was built from what is in the archive."""
    folder = tmp_path_factory.mktemp("dist")
    done = python("-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command as pip installs it in an environment of its own, which has our dependencies beside it."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    made = python("-m", "venv", "--without-pip", home)
    assert made.returncode == 0, made.stderr
    interpreter = home / "bin/python"
    installed = python(
        "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index", wheel
    )
    assert installed.returncode == 0, installed.stderr
    (packages,) = home.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(others) + "\n")
    return home / "bin/sparseprune"


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"sparseprune-{sparseprune.__version__}.dist-info/METADATA")


def installed(program: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [program, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_wheel_has_the_package_with_all_that_it_reads_and_nothing_else(wheel: Path) -> None:
    found = names(wheel)
    package = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("sparseprune/**/*") if path.is_file()}
    wanted = {name for name in package if "__pycache__" not in name}
    wanted |= {f"sparseprune/{path.relative_to(ROOT)}" for path in ROOT.glob("specs/**/*") if path.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == wanted
    assert "sparseprune/py.typed" in found


def test_source_archive_has_the_tests(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        found = {name.partition("/")[2] for name in opened.getnames()}
    assert {"README.md", "pyproject.toml", "specs/2of4.toml", "tests/test_package.py"} <= found


def test_metadata_is_what_an_index_takes(wheel: Path) -> None:
    text = metadata(wheel)
    read = Metadata.from_email(text, validate=True)
    assert read.version is not None
    assert (read.name, str(read.version)) == ("sparseprune", sparseprune.__version__)
    assert read.description_content_type == "text/markdown"
    assert read.description == (ROOT / "README.md").read_text()
    assert "Typing :: Typed" in (read.classifiers or [])
    assert {"calibrate", "plot", "ray", "remote", "test"} == set(read.provides_extra or [])
    assert not [name for name, value in message_from_bytes(text).items() if value == "UNKNOWN"], text


def test_installed_command_runs_from_any_folder(program: Path, tmp_path: Path) -> None:
    said = installed(program, tmp_path, "--version")
    assert (said.returncode, said.stdout) == (0, f"sparseprune {sparseprune.__version__}\n"), said.stderr
    said = installed(program, tmp_path, "specs")
    assert said.returncode == 0, said.stderr
    assert set(list_specs()) <= set(said.stdout.split())


def test_changelog_has_this_version() -> None:
    assert f"\n## {sparseprune.__version__} " in (ROOT / "specs/CHANGELOG.md").read_text()
