"""Commands that are killed: the same command continues to the same bytes; another one starts over."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint.output import read_journal
from tests.checkpoint.files import names_in
from tests.cli.interrupted import NAMES, Command, Commands, Ended, Moment, change
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_shards

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
CONTINUED = "sparseprune: an unfinished run is continued"
GLOBAL = """
version = 1
[scope.each]
tensors = "{layer}.{name}.weight"
block = [1, 1]
shape = [-1, -1]
[scope_coupling.all]
scopes = ["each"]
across = "all"
sparsity = 0.6
"""
PART = TWO_OF_FOUR + 'slice = ["0:6", ":"]\n'
SOFT = GLOBAL.replace("sparsity", 'mode = "soft"\nsparsity')
KEPT = TWO_OF_FOUR.replace("[scope", '[vars]\nkeep = "config.keep or 2"\n[scope').replace("= 2", '= "keep"')
REBUILT = TWO_OF_FOUR + '[reconstruct]\nfile = "stats.safetensors"\n'
SCORED = TWO_OF_FOUR + 'score = { kind = "values", file = "scores.safetensors" }\n'
MOMENTS = 4


@dataclass(frozen=True)
class Case:
    """A command on small input, by one way of working, with this many decisions that are noted."""

    words: str
    spec: str
    way: str
    decisions: int = 0
    force: bool = False

    @property
    def target(self) -> str:
        return "out" if self.words.split()[1] == "in" else "out.safetensors"

    def home(self, home: Path) -> Path:
        """A folder with the input, the spec and, with `force`, an older output."""
        copy_of_start(home, self.spec)
        if self.force and self.target == "out":
            shutil.copytree(home / "in", home / "out")
            (home / "out" / "sparseprune").mkdir()
            (home / "out" / "sparseprune" / "report.json").write_text("{}")
        elif self.force:
            shutil.copy(home / "m.safetensors", home / "out.safetensors")
            shutil.copy(home / "m.safetensors", home / "out.masks.safetensors")
        return home

    def command(self, home: Path, moment: Moment | None = None) -> Command:
        words = (*self.words.split(), "-o", self.target, *(["--force"] * self.force))
        return Command(str(home), words, self.way, moment=moment)


CASES = {
    "contiguous": Case("apply in spec.toml", TWO_OF_FOUR, "contiguous"),
    "contiguous, a file, packed": Case(
        "apply m.safetensors spec.toml --mask-format packed", TWO_OF_FOUR, "contiguous"
    ),
    "a part of every tensor, no masks": Case("apply in spec.toml --no-masks", PART, "contiguous"),
    "strided": Case("apply in spec.toml", TWO_OF_FOUR.replace("[1, 4]", "[4, 1]"), "strided"),
    "radix_select": Case("apply in spec.toml", GLOBAL, "radix_select", 1),
    "radix_select, a file, packed": Case(
        "apply m.safetensors spec.toml --mask-format packed", GLOBAL, "radix_select", 1
    ),
    "block_norms": Case("apply in spec.toml", CHANNELS, "block_norms", 2),
    "block_norms, packed": Case("apply in spec.toml --mask-format packed", CHANNELS, "block_norms", 2),
    "torch_in_memory": Case("apply in spec.toml", TWO_OF_FOUR, "torch_in_memory"),
    "torch_out_of_core": Case("apply in spec.toml --mask-format packed", GLOBAL, "torch_out_of_core", 1),
    "torch_out_of_core, soft": Case("apply m.safetensors spec.toml --no-masks", SOFT, "torch_out_of_core", 1),
    "masks": Case("mask in spec.toml", GLOBAL, "radix_select", 1),
    "masks of channels": Case(
        "mask m.safetensors spec.toml --mask-format packed", CHANNELS, "block_norms", 2
    ),
    "again": Case("apply in spec.toml", CHANNELS, "block_norms", 2, force=True),
    "again, a file": Case("apply m.safetensors spec.toml", TWO_OF_FOUR, "contiguous", force=True),
}


def copy_of_start(home: Path, spec: str) -> None:
    """A checkpoint as a file and as a directory, with a config and scores beside it, and a spec."""
    start = home.with_name("start")  # made once: safetensors writes metadata in another order each time
    if not start.exists():
        make_input(start)
    shutil.copytree(start, home)
    (home / "spec.toml").write_text(spec)


def make_input(home: Path) -> None:
    home.mkdir()
    tensors = mlp_tensors()
    shards: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        shards["a.safetensors" if "up" in name else "b.safetensors"][name] = tensor
    write_shards(home / "in", shards)
    save_file(tensors, home / "m.safetensors")
    save_file({name: tensor * tensor for name, tensor in tensors.items()}, home / "scores.safetensors")
    moments = {name: tensor.T @ tensor for name, tensor in tensors.items() if tensor.ndim == 2}
    save_file(moments, home / "stats.safetensors")
    (home / "config.json").write_text("{}")


def content(home: Path) -> dict[str, bytes]:
    """All that is no hidden file, and reports but for the seconds."""
    files = {}
    for path in home.rglob("*"):
        name = str(path.relative_to(home))
        if path.is_file() and not name.startswith("."):
            files[name] = path.read_bytes()
            if name.endswith("report.json"):
                report = json.loads(files[name])
                report.pop("seconds", None)
                files[name] = json.dumps(report).encode()
    return files


def notes(home: Path, target: str) -> Mapping[str, Any] | None:
    """What a killed run left to be continued, by key; None if it left nothing."""
    partial = home / f".{target}.sparseprune-partial"
    found = read_journal(partial / "journal")
    return None if found is None or not any((partial / "output").rglob("*")) else found.finished


def check_never_half(home: Path, target: str, before: dict[str, bytes], wanted: dict[str, bytes]) -> bool:
    """The target is as it was before or as it will be, and nothing that belongs to the other; is it done?

    A directory is whole at any moment, and so is a file that is new.
    """
    now = content(home)
    if target in before:
        assert now.items() <= (wanted if now[target] == wanted[target] else before).items()
    elif (home / target).exists():
        assert now in (before, wanted)
    else:
        assert now.items() <= before.items() | wanted.items()
    return now == wanted


def check_continued(
    ended: Ended, found: Mapping[str, Any] | None, full: Ended, case: Case, whole: Path
) -> None:
    """It says that it continues, and does neither read nor write what had been noted."""
    assert (ended.code, ended.out) == (0, f"{case.target}\n"), ended.err
    assert ended.err.splitlines().count(CONTINUED) == (found is not None)
    assert "Traceback" not in ended.err
    pieces = {key: nbytes for key, (nbytes, _) in (found or {}).items() if key.rpartition(".")[2].isdigit()}
    decisions = len(found or {}) - len(pieces)
    (report,) = (path for path in whole.rglob("*report.json") if "scores" not in path.name)
    once = sum(4 * tensor["numel"] for tensor in json.loads(report.read_text())["tensors"])
    saved = sum(nbytes for key, nbytes in pieces.items() if not key.startswith("copy"))
    if decisions:
        saved += (full.read - once) * decisions // case.decisions
    assert ended.read == full.read - saved
    if case.words.startswith("apply"):
        assert ended.written == full.written - sum(pieces.values())


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_is_continued_and_ends_in_the_same_bytes(
    tmp_path: Path, commands: Commands, name: str
) -> None:
    case = CASES[name]
    whole = case.home(tmp_path / "whole")
    before = content(whole)
    full = commands.run(case.command(whole))
    wanted = content(whole)
    draw, seen = random.Random(name), []
    for number in range(MOMENTS):
        home = case.home(tmp_path / str(number))
        at = full.calls * number // MOMENTS + draw.randint(1, full.calls // MOMENTS)
        ended, found = Ended(-1, "", ""), None
        # What continues is killed too, and continued.
        for moment in (at, draw.randint(1, full.calls // 2), draw.randint(1, full.calls), 0):
            ended = commands.run(case.command(home, Moment("kill", moment)))
            if ended.code == 0 or check_never_half(home, case.target, before, wanted):
                break
            found = notes(home, case.target)
            seen.append(len(found or ()))
        assert ended.code in (0, -signal.SIGKILL)
        assert content(home) == wanted
        if ended.code == 0:
            check_continued(ended, found, full, case, whole)
            assert names_in(home) == names_in(whole)
    assert len(set(seen)) > 3


@pytest.mark.parametrize("name", ["masks", "contiguous, a file, packed", "again", "again, a file"])
def test_a_run_killed_while_names_are_made_or_given_leaves_the_old_output_or_the_new_one(
    tmp_path: Path, commands: Commands, name: str
) -> None:
    case = CASES[name]
    whole = case.home(tmp_path / "whole")
    before = content(whole)
    assert commands.run(replace(case.command(whole), slab=1024)).code == 0
    wanted, done = content(whole), []
    for at in count(1):
        home = case.home(tmp_path / str(at))
        ended = commands.run(replace(case.command(home, Moment("kill", at, on=NAMES)), slab=1024))
        if ended.code == 0:
            break
        done.append(check_never_half(home, case.target, before, wanted))
        again = commands.run(replace(case.command(home), slab=1024))
        if done[-1] and not case.force:
            assert again.code == 2
            assert ": already exists; " in again.err
        else:
            assert again.code == 0, again.err
        assert content(home) == wanted
        assert names_in(home) == names_in(whole)
    assert sorted(done) == done
    assert len(done) > sum(done) > 1


def kept_halfway(home: Path, commands: Commands, case: Case) -> Ended:
    """A run that was killed when some of its pieces were on disk."""
    ended = commands.run(case.command(case.home(home), Moment("kill", 150)))
    assert (ended.code, bool(notes(home, case.target))) == (-signal.SIGKILL, True)
    return ended


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def retitle(path: Path) -> None:
    """Another header, of the same size, in a file of the same time."""
    status = path.stat()
    data = path.read_bytes()
    assert data.count(b'"pt"') == 1
    path.write_bytes(data.replace(b'"pt"', b'"tf"'))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite_in_secret(path: Path) -> None:
    """Other bytes, in a file of the same size and time."""
    status = path.stat()
    change(path, "rewrite")
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # the clock of some file systems is coarse
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def enlarge(path: Path) -> None:
    save_file(mlp_tensors() | {"more": torch.ones(3)}, path)


DIRECTORY = Case("apply in spec.toml --jobs 2", KEPT, "contiguous")
FILE = Case("apply m.safetensors spec.toml", KEPT, "contiguous")
SCORES = Case("apply m.safetensors spec.toml", SCORED, "contiguous")
Change = tuple[Case, str, "Callable[[Path], object]"]
# What changes in the folder of a killed run -> what is said to have changed.
CHANGES: dict[str, Change] = {
    "bytes of a shard": (DIRECTORY, "the input", lambda home: change(home / "in/b.safetensors", "rewrite")),
    "the time of a shard": (DIRECTORY, "the input", lambda home: touch(home / "in/b.safetensors")),
    "the header of a shard": (DIRECTORY, "the input", lambda home: retitle(home / "in/b.safetensors")),
    "a file that is copied": (DIRECTORY, "the input",
        lambda home: change(home / "in/extra/tokenizer.txt", "grow")),
    "the size of a file": (FILE, "the input", lambda home: enlarge(home / "m.safetensors")),
    "scores": (SCORES, "the input", lambda home: change(home / "scores.safetensors", "rewrite")),
    "bytes of a shard, at the same time": (DIRECTORY, "the input",
        lambda home: rewrite_in_secret(home / "in/b.safetensors")),
    "a shard that another one replaces": (DIRECTORY, "the input",
        lambda home: change(home / "in/b.safetensors", "replace")),
    "scores, at the same time": (SCORES, "the input",
        lambda home: rewrite_in_secret(home / "scores.safetensors")),
    "the config of a directory": (DIRECTORY, "the input",
        lambda home: (home / "in/config.json").write_text('{"keep": 1}')),
    "the config beside a file": (FILE, "the input",
        lambda home: (home / "config.json").write_text('{"keep": 1}')),
    "the spec": (FILE, "the spec", lambda home: (home / "spec.toml").write_text(TWO_OF_FOUR)),
}  # fmt: skip
# What changes in the command of a killed run -> what is said to have changed; nothing where it continues.
OPTIONS = {
    "--set keep=1": "the spec",
    "--mask-format bool": "the options",
    "--no-masks": "the options",
    "--memory 2GiB": "the options",
    "--device cpu": "the options",
    "--set keep=1 --no-masks": "the spec and the options",
    "--jobs 1": "",
    "--json": "",
    "-v": "",
}


def said_of(changed: str) -> str:
    return f"sparseprune: an unfinished run is not continued, since {changed} changed"


def check_started_over(ended: Ended, home: Path, fresh: Path, changed: str) -> None:
    """It says why, and ends as if there had been nothing before it."""
    assert ended.code == 0, ended.err
    assert ended.err.splitlines()[0] == (said_of(changed) if changed else CONTINUED)
    assert ended.err.count("an unfinished run") == 1
    assert content(home) == content(fresh)
    assert names_in(home) == names_in(fresh)


@pytest.mark.parametrize("name", CHANGES)
def test_a_killed_run_is_not_continued_with_another_input_or_spec(
    tmp_path: Path, commands: Commands, name: str
) -> None:
    case, changed, act = CHANGES[name]
    fresh, home = case.home(tmp_path / "fresh"), tmp_path / "home"
    kept_halfway(home, commands, case)
    for place in (fresh, home):
        act(place)
    full = commands.run(case.command(fresh))
    ended = commands.run(case.command(home))
    shutil.copy(fresh / "m.safetensors", home / "m.safetensors")  # metadata has another order each time
    shutil.copy(fresh / "out.safetensors", home / "out.safetensors") if name == "the size of a file" else None
    check_started_over(ended, home, fresh, changed)
    assert (ended.read, ended.written) == (full.read, full.written)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_killed_run_is_not_continued_with_other_options_but_for_those_that_change_no_byte(
    tmp_path: Path, commands: Commands, option: str
) -> None:
    other = Case(f"{DIRECTORY.words} {option}", KEPT, "contiguous")
    fresh, home = other.home(tmp_path / "fresh"), tmp_path / "home"
    kept_halfway(home, commands, DIRECTORY)
    commands.run(other.command(fresh))
    check_started_over(commands.run(other.command(home)), home, fresh, OPTIONS[option])


def test_a_killed_run_is_not_continued_by_another_version(tmp_path: Path, commands: Commands) -> None:
    fresh, home = FILE.home(tmp_path / "fresh"), tmp_path / "home"
    kept_halfway(home, commands, FILE)
    for place in (fresh, home):
        ended = commands.run(replace(FILE.command(place), version="99"))
    check_started_over(ended, home, fresh, "the version")


def test_masks_do_not_continue_weights(tmp_path: Path, commands: Commands) -> None:
    masks = Case("mask in spec.toml", KEPT, "contiguous")
    fresh, home = masks.home(tmp_path / "fresh"), tmp_path / "home"
    kept_halfway(home, commands, DIRECTORY)
    commands.run(masks.command(fresh))
    check_started_over(commands.run(masks.command(home)), home, fresh, "the options")


def test_a_run_that_started_over_is_itself_continued(tmp_path: Path, commands: Commands) -> None:
    other = Case(f"{FILE.words} --set keep=1", KEPT, "contiguous")
    fresh, home = other.home(tmp_path / "fresh"), tmp_path / "home"
    full = commands.run(other.command(fresh))
    kept_halfway(home, commands, FILE)
    killed = commands.run(other.command(home, Moment("kill", 200)))
    assert killed.err == said_of("the spec") + "\n"
    found = notes(home, other.target)
    ended = commands.run(other.command(home))
    check_continued(ended, found, full, other, fresh)
    check_started_over(ended, home, fresh, "")


def test_quiet_runs_continue_without_a_word(tmp_path: Path, commands: Commands) -> None:
    kept_halfway(tmp_path / "home", commands, FILE)
    quiet = Case(f"{FILE.words} -q", KEPT, "contiguous")
    assert commands.run(quiet.command(tmp_path / "home")).err == ""


def test_real_processes_killed_after_any_time_are_continued(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {f"{n}.up.weight": torch.randn(1024, 2048, generator=generator) for n in range(8)}
    save_file(tensors, tmp_path / "m.safetensors")
    (tmp_path / "spec.toml").write_text(GLOBAL)
    command = [sys.executable, "-m", "sparseprune", "apply", "m.safetensors", "spec.toml", "-q"]

    def begin(output: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "-o", output], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )

    began = time.perf_counter()
    assert begin("whole.safetensors").wait(60) == 0
    seconds = time.perf_counter() - began
    draw = random.Random(1)
    for _ in range(6):
        with begin("out.safetensors") as process:
            time.sleep(draw.uniform(0.3, 1.0) * seconds)
            process.kill()
        if (tmp_path / "out.safetensors").exists():
            break  # it died when all was done
    else:
        assert begin("out.safetensors").wait(60) == 0
    for name in ("safetensors", "masks.safetensors"):
        assert (tmp_path / f"out.{name}").read_bytes() == (tmp_path / f"whole.{name}").read_bytes()
    reports = [json.loads((tmp_path / f"{name}.report.json").read_text()) for name in ("out", "whole")]
    assert reports[0] | {"seconds": 0, "output": ""} == reports[1] | {"seconds": 0, "output": ""}


def test_the_checks_can_fail(tmp_path: Path, commands: Commands) -> None:
    whole, home = FILE.home(tmp_path / "whole"), FILE.home(tmp_path / "home")
    before = content(whole)
    full = commands.run(FILE.command(whole))
    wanted = content(whole)
    assert check_never_half(whole, FILE.target, before, wanted)
    assert not check_never_half(home, FILE.target, before, wanted)
    check_continued(full, None, full, FILE, whole)
    check_started_over(replace(full, err=f"{CONTINUED}\n"), whole, whole, "")
    (whole / "out.masks.safetensors").unlink()
    found = {"0.0.0": [64, []]}
    for wrong in (
        lambda: check_never_half(whole, FILE.target, before, wanted),
        lambda: check_continued(full, found, full, FILE, whole),
        lambda: check_continued(replace(full, err=f"{CONTINUED}\n"), found, full, FILE, whole),
        lambda: check_started_over(full, whole, whole, ""),
        lambda: check_started_over(replace(full, err=f"{CONTINUED}\n"), whole, home, ""),
    ):
        with pytest.raises(AssertionError):
            wrong()
