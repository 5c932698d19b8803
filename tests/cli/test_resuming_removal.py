"""Removals that are killed, interrupted or out of disk: the same command continues to the same bytes."""

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune.checkpoint.output import read_journal
from tests.checkpoint.files import content, names_in
from tests.cli.interrupted import NAMES, Command, Commands, Ended, Moment, change
from tests.cli.removal import LLAMA, MIXTRAL, decoder, mixture, removed, weights, write
from tests.commands import ok
from tests.samples import write_spec

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
CONTINUED = "sparseprune: an unfinished run is continued"
SPEC = Path("specs/mlp-channels.toml").read_text()
SOFT = SPEC.replace("[scope.mlp]\n", '[scope.mlp]\nmode = "soft"\n')
EXPERTS = Path("specs/experts.toml").read_text()
CHOICE, PARTIAL = ".out.sparseprune-choice", ".out.sparseprune-partial"


@dataclass(frozen=True)
class Case:
    """What is typed after `remove` in a folder that has this spec."""

    words: str = "in spec.toml"
    spec: str = SPEC
    force: bool = False

    def command(self, home: Path, moment: Moment | None = None) -> Command:
        force = ["--force"] * self.force
        return Command(str(home), ("remove", *self.words.split(), "-o", "out", *force), moment=moment)


CASES = {
    "a spec": Case(),
    "rebuilt": Case(spec=SOFT),
    "masks": Case("in --masks masks"),
    "experts": Case("mix spec.toml --set sparsity=0.5", EXPERTS),
    "again": Case(force=True),
}


@dataclass
class World:
    """A server of commands, the folder that every home is copied from, and what undisturbed runs come to."""

    commands: Commands
    start: Path
    done: dict[str, tuple[Ended, dict[str, bytes]]]

    def home(self, home: Path, case: Case) -> Path:
        shutil.copytree(self.start, home)  # with the times of the files
        write_spec(home, case.spec)
        if not case.force:
            shutil.rmtree(home / "out")
        return home

    def run(self, case: Case, home: Path, moment: Moment | None = None) -> Ended:
        return self.commands.run(case.command(home, moment))

    def kill(self, case: Case, home: Path, at: int) -> list[str]:
        """The hidden folders that a run leaves which is killed at this call."""
        ended = self.run(case, home, Moment("kill", at))
        assert ended.code == -signal.SIGKILL, ended.err
        return hidden(home)

    def whole(self, name: str) -> tuple[Ended, dict[str, bytes]]:
        """How the case ends, and its output."""
        if name not in self.done:
            case = CASES[name]
            home = self.home(self.start.with_name(f"whole {name}"), case)
            ended = self.run(case, home)
            assert ended.code == 0, ended.err
            self.done[name] = ended, weights(home / "out")
        return self.done[name]


def hidden(home: Path) -> list[str]:
    return [name for name in names_in(home) if name.startswith(".")]


def begun(home: Path, folder: str) -> bool:
    """Whether an unfinished run left what can be continued."""
    return read_journal(home / folder / "journal") is not None and any((home / folder / "output").rglob("*"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    start = tmp_path_factory.mktemp("world") / "start"
    start.mkdir()
    write(start / "in", decoder(), LLAMA, 2)
    write(start / "mix", mixture(), MIXTRAL, 2)
    mask = ("mask", start / "in", "mlp-channels", "-o", start / "masks", "--mask-format", "bool", "-q")
    ok(*mask)
    removed(start / "in", "mlp-channels", "--set", "sparsity=0.5", "-o", start / "out", "-q")
    with Commands() as commands:
        yield World(commands, start, {})


def check_ended(world: World, ended: Ended, home: Path, name: str) -> None:
    """As if nothing had come between."""
    _, wanted = world.whole(name)
    assert (ended.code, ended.out) == (0, "out\n"), ended.err
    assert weights(home / "out") == wanted
    assert hidden(home) == []


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_is_continued_and_ends_in_the_same_bytes(
    tmp_path: Path, world: World, name: str
) -> None:
    case, (full, _) = CASES[name], world.whole(name)
    told_in = PARTIAL if name == "masks" else CHOICE
    seen, reads = set(), []
    for part in (0.3, 0.6, 0.93):
        home = world.home(tmp_path / str(part), case)
        old = content(home / "out") if case.force else {}
        seen |= {*world.kill(case, home, int(full.calls * part))}
        if part == 0.6:  # what continues is killed too
            seen |= {*world.kill(case, home, 20)}
        assert (content(home / "out") if case.force else {}) == old
        assert case.force or not (home / "out").exists()
        goes_on = begun(home, told_in) or begun(home, PARTIAL)
        ended = world.run(case, home)
        check_ended(world, ended, home, name)
        assert ended.err.splitlines().count(CONTINUED) == goes_on
        reads.append(ended.read)
    assert min(reads) < full.read
    assert max(reads) <= full.read
    assert seen == {PARTIAL, told_in}


def test_decisions_over_whole_blocks_wait_in_the_journal_and_need_no_masks(
    tmp_path: Path, world: World
) -> None:
    full, _ = world.whole("a spec")
    for part in range(1, 10):
        home = world.home(tmp_path / str(part), CASES["a spec"])
        world.kill(CASES["a spec"], home, int(full.calls * part / 10))
        found = read_journal(home / CHOICE / "journal")
        if found is not None and found.finished:
            assert sum(path.stat().st_size for path in (home / CHOICE / "output").rglob("*")) == 0
            return
    pytest.fail("no run was killed between a decision and the end of the choice")


@pytest.mark.parametrize("name", ["a spec", "again"])
def test_a_run_that_ends_while_names_are_given_leaves_nothing_once_it_is_called_again(
    tmp_path: Path, world: World, name: str
) -> None:
    case, (_, wanted) = CASES[name], world.whole(name)
    done = []
    for at in last_names(tmp_path, world, case):
        home = world.home(tmp_path / str(at), case)
        old = content(home / "out") if case.force else {}
        ended = world.run(case, home, Moment("kill", at, on=NAMES))
        assert ended.code == -signal.SIGKILL
        there = (home / "out").exists()
        done.append(there and weights(home / "out") == wanted)
        assert done[-1] or not there or content(home / "out") == old
        check_called_again(world, case, home, done=done[-1])
        assert weights(home / "out") == wanted
    assert sorted(done) == done
    assert len(done) > sum(done) > 0


def last_names(tmp_path: Path, world: World, case: Case) -> range:
    """Some of the last calls of a run that make names, give them or take them away."""
    home = world.home(tmp_path / "counted", case)
    calls = world.run(case, home, Moment("nothing", 0, on=NAMES)).calls
    return range(max(1, calls - (29 if case.force else 13)), calls + 1, 4 if case.force else 2)


def check_called_again(world: World, case: Case, home: Path, *, done: bool) -> None:
    """The same command ends the work, or says that it is done; nothing else is left."""
    again = world.run(case, home)
    if done and not case.force:
        taken = (
            f"sparseprune: {home}/out: already exists; give another name with -o, or --force to replace it\n"
        )
        assert (again.code, again.out, again.err) == (2, "", taken)
    else:
        assert again.code == 0, again.err
    assert hidden(home) == []


def kept_in(home: Path, folder: str) -> str:
    return (
        f"sparseprune: what is finished is kept in {home / folder}: the same command continues, removing the "
        "folder gives it up"
    )


@pytest.mark.parametrize(
    ("name", "do"), [("a spec", "interrupt"), ("a spec", "interrupt twice"), ("masks", "interrupt")]
)
def test_an_interrupted_run_says_what_there_is_and_is_continued(
    tmp_path: Path, world: World, name: str, do: str
) -> None:
    case, (full, _) = CASES[name], world.whole(name)
    told_in = PARTIAL if name == "masks" else CHOICE
    seen = set()
    for part in (0.02, 0.35, 0.75):
        home = world.home(tmp_path / str(part), case)
        ended = world.run(case, home, Moment(do, int(full.calls * part)))
        assert (ended.code, ended.out) == (130, "")
        left = hidden(home)
        first, *kept = ended.err.splitlines()
        again = "; run the same command again to continue"
        assert first.removesuffix(again) == "sparseprune: interrupted: there is no output"
        assert first.endswith(again) or not left
        assert kept == [kept_in(home, folder) for folder in reversed(left)]
        seen |= {*left}
        ended = world.run(case, home)
        check_ended(world, ended, home, name)
        assert ended.err.splitlines().count(CONTINUED) == (told_in in left)
    assert seen == {PARTIAL, told_in}


@pytest.mark.parametrize("name", ["a spec", "masks"])
def test_an_interrupt_while_names_are_given_says_whether_the_output_is_complete(
    tmp_path: Path, world: World, name: str
) -> None:
    case, complete = CASES[name], []
    for at in last_names(tmp_path, world, case)[1:]:
        home = world.home(tmp_path / str(at), case)
        ended = world.run(case, home, Moment("interrupt", at, on=NAMES))
        complete.append((home / "out").exists())
        assert (ended.code, ended.out) == (130, "")
        first, *kept = ended.err.splitlines()
        if complete[-1]:
            assert (first, kept) == ("sparseprune: interrupted: the output is complete", [])
        else:
            assert first.startswith(
                "sparseprune: interrupted: there is no output; run the same command again"
            )
        check_called_again(world, case, home, done=complete[-1])
    assert sorted(complete) == complete
    assert len(complete) > sum(complete) > 0


@pytest.mark.parametrize(
    ("name", "part", "code"),
    [
        ("rebuilt", 0.2, errno.ENOSPC),
        ("rebuilt", 0.7, errno.EIO),
        ("a spec", 0.02, errno.ENOSPC),
        ("a spec", 0.7, errno.EIO),
    ],
)
def test_a_disk_that_fails_is_told_and_the_run_is_continued(
    tmp_path: Path, world: World, name: str, part: float, code: int
) -> None:
    case = CASES[name]
    counted = world.home(tmp_path / "counted", case)
    calls = world.run(case, counted, Moment("nothing", 0, on=("pwrite",))).calls
    home = world.home(tmp_path / "home", case)
    ended = world.run(case, home, Moment("fail", 1 + int(calls * part), on=("pwrite",), code=code))
    first, *kept = (line for line in ended.err.splitlines() if line)
    assert (ended.code, ended.out) == (3, "")
    assert re.match(rf"sparseprune: {home}/\.out\.sparseprune-\w+/\S+: cannot be written: ", first)
    assert os.strerror(code) in first
    left = hidden(home)
    assert (PARTIAL in left) == (part > 0.5)
    assert kept == [kept_in(home, folder) for folder in reversed(left)]
    check_ended(world, world.run(case, home), home, name)


def edit_config(home: Path) -> None:
    path = home / "in" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 3.0}))


def drop_others(home: Path) -> None:
    """Masks that drop the first channels instead of those that they dropped."""
    for path in (home / "masks").glob("*.safetensors"):
        masks = load_file(path)
        for name, mask in masks.items():
            rows = mask.T if "down" in name else mask
            rows[:] = (torch.arange(len(rows)) > 3)[:, None]
        save_file(masks, path)


# The case, the part of the run after which it is killed, what then changes, and what is said to have changed.
CHANGES: dict[str, tuple[str, float, Callable[[Path], Any], str]] = {
    "a shard": ("a spec", 0.5,
        lambda home: change(home / "in" / "model-00001-of-00002.safetensors", "rewrite"), "the input"),
    "a shard, later": ("a spec", 0.85,
        lambda home: change(home / "in" / "model-00002-of-00002.safetensors", "rewrite"), "the input"),
    "the spec": ("a spec", 0.5, lambda home: write_spec(home, SPEC.replace("0.25", "0.5")), "the spec"),
    "the spec, later": ("a spec", 0.85, lambda home: write_spec(home, SPEC.replace("0.25", "0.5")),
        "the spec"),
    "the config": ("a spec", 0.5, edit_config, "the input"),
    "the config, with masks": ("masks", 0.7, edit_config, "the input"),
    "masks": ("masks", 0.7, drop_others, "the masks and what survives"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_killed_run_is_not_continued_with_another_input(tmp_path: Path, world: World, name: str) -> None:
    kind, part, act, changed = CHANGES[name]
    case, (full, _) = CASES[kind], world.whole(kind)
    fresh, home = world.home(tmp_path / "fresh", case), world.home(tmp_path / "home", case)
    assert world.kill(case, home, int(full.calls * part))
    assert begun(home, PARTIAL if kind == "masks" else CHOICE)
    for place in (fresh, home):
        act(place)
    assert world.run(case, fresh).code == 0
    ended = world.run(case, home)
    assert (ended.code, ended.out) == (0, "out\n"), ended.err
    said = f"sparseprune: an unfinished run is not continued, since {changed} changed"
    assert ended.err.splitlines()[0] == said
    assert ended.err.count("an unfinished run") == 1
    assert weights(home / "out") == weights(fresh / "out")
    assert hidden(home) == []
    _, unchanged = world.whole(kind)
    assert weights(home / "out") != unchanged


def test_options_of_speed_and_words_continue_a_run_and_others_do_not(tmp_path: Path, world: World) -> None:
    case, (full, _) = CASES["a spec"], world.whole("a spec")
    for number, (option, continues) in enumerate(
        {"--jobs 1": True, "--json": True, "-v": True, "--set sparsity=0.5": False}.items()
    ):
        home = world.home(tmp_path / str(number), case)
        world.kill(case, home, int(full.calls * 0.6))
        ended = world.run(replace(case, words=f"{case.words} {option}"), home)
        assert (ended.code, CONTINUED in ended.err) == (0, continues), option
        assert ended.err.count("an unfinished run") == 1
        assert hidden(home) == []


def test_quiet_runs_are_continued_without_a_word(tmp_path: Path, world: World) -> None:
    case, (full, _) = CASES["a spec"], world.whole("a spec")
    home = world.home(tmp_path / "home", case)
    world.kill(case, home, int(full.calls * 0.6))
    ended = world.run(replace(case, words=f"{case.words} -q"), home)
    assert ended.err == ""
    check_ended(world, ended, home, "a spec")


def test_an_input_that_changes_while_it_is_worked_on_is_told_and_there_is_no_output(
    tmp_path: Path, world: World
) -> None:
    case, (full, _) = CASES["a spec"], world.whole("a spec")
    for part in (0.4, 0.8):
        home = world.home(tmp_path / str(part), case)
        moment = Moment("replace", int(full.calls * part), path="in/model-00001-of-00002.safetensors")
        ended = world.run(case, home, moment)
        assert (ended.code, ended.out) == (3, ""), ended.err
        assert ended.err.startswith("sparseprune: in/model-00001-of-00002.safetensors: ")
        assert "another file has taken its place" in ended.err
        assert not (home / "out").exists()
        check_ended(world, world.run(case, home), home, "a spec")
