"""Runs that are killed, or whose disk fails, at any moment: the target is never half, and all goes on."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from sparseprune.checkpoint import publish
from sparseprune.errors import CheckpointError, MachineError
from tests.checkpoint.files import all_keys, content, directory, finish, layout_of, names_in, single, stage
from tests.checkpoint.killed import prune

Make = Callable[[Path], Path]
pytestmark = pytest.mark.usefixtures("untraced")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs that take no time: what a killed process has written stays without them."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)


def visible(home: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(home).items() if not name.startswith(".")}


def started(home: Path, make: Make, *, force: bool) -> str:
    """An input and, with `force`, an output to be replaced; the name of the input."""
    source = make(home)
    if force:
        stage(layout_of(source, masked="bs", form="packed"), report=b"old")
    return source.name


def wanted_of(home: Path, source: str, *, force: bool) -> dict[str, bytes]:
    """What all that lies there is in the end."""
    shutil.copytree(home, home.parent / "wanted")
    prune(home.parent / "wanted", source, force=force)
    wanted = content(home.parent / "wanted")
    shutil.rmtree(home.parent / "wanted")
    return wanted


def check_never_half(home: Path, target: str, before: dict[str, bytes], wanted: dict[str, bytes]) -> bool:
    """The target is there as it was or as it will be, and nothing that belongs to the other; is it done?

    A directory is whole at any moment, and so is a file that is new.
    """
    now = visible(home)
    if any(name.split("/")[0] == target for name in now):
        if target not in before:
            assert now in (before, wanted)
        else:
            assert now.items() <= (wanted if now[target] == wanted[target] else before).items()
    else:
        assert now.items() <= {**before, **wanted}.items() | before.items()
    return now == wanted


def killed_everywhere(home: Path, source: str, *words: str) -> list[Path]:
    """The folders that runs left which were killed at one moment each, in the order of the moments."""
    command = [sys.executable, "-m", "tests.checkpoint.killed", str(home), source, *words]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    places = sorted((place for place in home.iterdir() if place.name.isdigit()), key=lambda at: int(at.name))
    assert int(places[-1].name) > 20
    return places


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (directory, ()),
        (directory, ("force",)),
        (directory, ("force", "without exchange")),
        (single, ()),
        (single, ("force",)),
    ],
)
def test_a_run_killed_at_any_moment_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, make: Make, words: tuple[str, ...]
) -> None:
    force = "force" in words
    (tmp_path / "start").mkdir()
    source = started(tmp_path / "start", make, force=force)
    wanted = wanted_of(tmp_path / "start", source, force=force)
    before = content(tmp_path / "start")
    target = layout_of(tmp_path / "start" / source).target.name
    *places, whole = killed_everywhere(tmp_path, source, *words)
    assert content(whole) == wanted
    keys = all_keys(layout_of(whole / source, masked="bs", form="packed"))
    seen = set()
    for place in places:
        done = check_never_half(place, target, before, wanted)
        assert (place / target).exists() or not force or "without exchange" in words
        if done and not force:
            with pytest.raises(CheckpointError, match="already exists"):
                prune(place, source, force=force)
        else:
            found, new = prune(place, source, force=force)
            assert [*found, *new] == keys
            seen.add(len(found))
        assert content(place) == wanted, place
        assert names_in(place) == names_in(whole), place
        shutil.rmtree(place)
    assert seen == set(range(len(keys) + 1))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("make", [directory, single])
def test_a_run_that_goes_on_may_be_killed_again_at_any_moment(tmp_path: Path, make: Make) -> None:
    (tmp_path / "first" / "start").mkdir(parents=True)
    source = started(tmp_path / "first" / "start", make, force=True)
    wanted = wanted_of(tmp_path / "first" / "start", source, force=True)
    before = content(tmp_path / "first" / "start")
    places = killed_everywhere(tmp_path / "first", source, "force")
    target = layout_of(places[0] / source).target.name
    # In the middle of the work, and while names are given.
    halfway = [place for place in places if any(publish.is_at_work(place / name) for name in names_in(place))]
    assert halfway
    for number, start in enumerate([places[len(places) // 3], halfway[len(halfway) // 2]]):
        home = tmp_path / f"again {number}"
        shutil.copytree(start, home / "start")
        for place in killed_everywhere(home, source, "force", "seldom"):
            check_never_half(place, target, before, wanted)
            prune(place, source, force=True)
            assert content(place) == wanted, place
        shutil.rmtree(home)


@pytest.mark.parametrize("function", ["pwrite", "ftruncate", "fdatasync", "fsync", "rename", "open", "mkdir"])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("make", [directory, single])
def test_a_disk_that_fails_at_any_moment_leaves_nothing_or_what_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make, force: bool, function: str
) -> None:
    (tmp_path / "start").mkdir()
    source = started(tmp_path / "start", make, force=force)
    wanted = wanted_of(tmp_path / "start", source, force=force)
    before = content(tmp_path / "start")
    target = layout_of(tmp_path / "start" / source).target.name
    keys = all_keys(layout_of(tmp_path / "start" / source, masked="bs", form="packed"))
    seen = set()
    for moment in count(1, 3 if function == "open" else 1):  # which is called most
        home = tmp_path / str(moment)
        shutil.copytree(tmp_path / "start", home)
        layout = layout_of(home / source, masked="bs", form="packed")
        with monkeypatch.context() as patch:
            if function == "rename":
                patch.setattr(publish, "swap", lambda one, other: False)
            failing = Failing(patch, function, moment)
            error = machine_error(partial(finish, layout, force=force))
        done = check_never_half(home, target, before, wanted)
        # What is no longer needed may stay where it cannot be removed.
        assert not done or not (home / f".{target}.sparseprune-partial").exists() or function == "open"
        if not done:
            assert "Input/output error" in (error or "")
            assert "\n" not in (error or "")
            assert visible(home) == before
            kept = (home / f".{target}.sparseprune-partial").exists()
            found, new = finish(layout, force=force)
            assert [*found, *new] == keys
            assert kept == (found != []) or function == "open"
            seen.add(len(found))
        assert visible(home) == wanted
        shutil.rmtree(home)
        if not failing.failed:
            break
    assert len(seen) > 3 or function not in ("pwrite", "fdatasync", "open")
    assert len(keys) in seen or function == "mkdir"


class Failing:
    """A function of the system that fails at one call, counted from 1."""

    def __init__(self, patch: pytest.MonkeyPatch, function: str, moment: int) -> None:
        self.failed = False
        self._left = moment
        self._real = getattr(os, function)
        patch.setattr(os, function, self)

    def __call__(self, *args: object, **keywords: object) -> object:
        self._left -= 1
        if self._left == 0:
            self.failed = True
            raise OSError(errno.EIO, "Input/output error")
        return self._real(*args, **keywords)


def machine_error(run: Callable[[], object]) -> str | None:
    try:
        run()
    except MachineError as error:
        return str(error)
    return None


HOLD = """
import sys
from pathlib import Path
from sparseprune.checkpoint import StagedOutput
from tests.checkpoint.files import fill, layout_of
with StagedOutput(layout_of(Path(sys.argv[1]))) as output:
    print("at work", flush=True)
    sys.stdin.read()
    fill(output)
    output.commit()
"""


@pytest.mark.parametrize("make", [directory, single])
def test_the_second_of_two_processes_is_refused_and_harms_nothing(tmp_path: Path, make: Make) -> None:
    path = make(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        assert first.stdout.readline() == b"at work\n"
        for force in (False, True):
            with pytest.raises(CheckpointError, match="another run is writing this output"):
                finish(layout_of(path), force=force)
        first.stdin.close()
        assert first.wait(60) == 0
    target = layout_of(path).target
    with pytest.raises(CheckpointError, match="already exists"):
        finish(layout_of(path))
    weights = target / "model.safetensors" if target.is_dir() else target
    original = path / "model.safetensors" if path.is_dir() else path
    assert weights.read_bytes() == original.read_bytes()
