"""Commands that are interrupted, or whose machine fails: one line, the right exit code, nothing half done."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.api.resources import memory_of
from sparseprune.errors import size
from tests.checkpoint.files import names_in
from tests.cli.interrupted import (
    NAMES,
    ROOT,
    SYNCS,
    TORCH,
    WRITES,
    Command,
    Commands,
    Ended,
    Moment,
    ended,
    started,
)
from tests.cli.test_resuming_runs import (
    CASES,
    CONTINUED,
    GLOBAL,
    REBUILT,
    SCORED,
    Case,
    check_never_half,
    content,
    notes,
    said_of,
)
from tests.commands import python
from tests.faults import fill, free_bytes, mounted
from tests.samples import CHANNELS, TWO_OF_FOUR

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="this user may not mount a disk"
)
INTERRUPTED = "sparseprune: interrupted: there is no output; run the same command again to continue"
COMPLETE = "sparseprune: interrupted: the output is complete"
KEPT = re.compile(r"sparseprune: what is finished is kept in \S+: the same command continues, removing \S+")
FILE = Case("apply m.safetensors spec.toml", TWO_OF_FOUR, "contiguous")
DIRECTORY = Case("apply in spec.toml", TWO_OF_FOUR, "contiguous")
SCORES = Case("apply m.safetensors spec.toml", SCORED, "contiguous")
MATRICES = Case("apply in spec.toml --jobs 3", REBUILT, "contiguous")


def check_told(said: Ended, code: int, line: str, kept: bool | None = None) -> None:
    """One line, all of it matched by `line`, and at most one more that says how to go on."""
    assert (said.code, said.out) == (code, "")
    lines = [text for text in said.err.splitlines() if text != CONTINUED]
    assert re.fullmatch(f"sparseprune: {line}", lines[0]), said.err
    assert [text for text in lines[1:] if not KEPT.match(text)] == []
    assert len(lines) == 2 if kept else len(lines) <= 2 if kept is None else len(lines) == 1


def check_finishes(
    commands: Commands, command: Command, case: Case, wanted: dict[str, bytes], *, changed: bool = False
) -> Ended:
    """The same command continues, if anything was noted, and ends in the bytes of an undisturbed run.

    Where the input `changed` it says so and starts over.
    """
    home = Path(command.home)
    found = notes(home, case.target)
    said = commands.run(replace(command, moment=None))
    assert said.code == 0, said.err
    again = said_of("the input") if changed else CONTINUED
    assert (again in said.err.splitlines()) == (found is not None)
    assert content(home) == wanted
    assert not (home / f".{case.target}.sparseprune-partial").exists()
    return said


@pytest.mark.parametrize(
    "name", ["radix_select", "block_norms, packed", "again, a file", "torch_out_of_core, soft", "masks"]
)
@pytest.mark.parametrize("how", ["interrupt", "interrupt twice"])
def test_ctrl_c_at_any_moment_leaves_no_output_and_the_same_command_continues(
    tmp_path: Path, commands: Commands, name: str, how: str
) -> None:
    case = CASES[name]
    whole = case.home(tmp_path / "whole")
    before = content(whole)
    full = commands.run(case.command(whole))
    wanted = content(whole)
    seen = set()
    for number in range(1, 6):
        home = case.home(tmp_path / str(number))
        command = case.command(home, Moment(how, full.calls * number // 7))
        said = commands.run(command)
        found = notes(home, case.target)
        check_told(said, 130, re.escape(INTERRUPTED.removeprefix("sparseprune: ")), kept=bool(found))
        assert content(home) == before
        seen.add(len(found or ()))
        check_finishes(commands, command, case, wanted)
    assert len(seen) > 1


def test_ctrl_c_while_threads_are_started_ends_the_run(tmp_path: Path, commands: Commands) -> None:
    case = replace(DIRECTORY, words=f"{DIRECTORY.words} --jobs 2")
    whole = case.home(tmp_path / "whole")
    before = content(whole)
    threads = commands.run(case.command(whole, Moment("nothing", 99, on=("start",)))).calls
    assert threads == 5  # one hears of signals, one shows progress, one syncs, two work
    wanted = content(whole)
    for at in range(1, threads + 1):
        home = case.home(tmp_path / str(at))
        command = case.command(home, Moment("interrupt", at, on=("start",)))
        line = INTERRUPTED.removeprefix("sparseprune: ") if at > 1 else "interrupted: nothing was written"
        check_told(commands.run(command), 130, re.escape(line))
        assert content(home) == before
        check_finishes(commands, command, case, wanted)


@pytest.mark.parametrize("method", ["admm", "refit"])
def test_ctrl_c_while_torch_computes_in_several_threads_ends_the_run(
    tmp_path: Path, commands: Commands, method: str
) -> None:
    case = replace(MATRICES, spec=REBUILT + f'method = "{method}"\n')
    whole = case.home(tmp_path / "whole")
    before = content(whole)
    steps = commands.run(case.command(whole, Moment("nothing", 0, on=TORCH))).calls
    wanted = content(whole)
    for number in range(3):
        home = case.home(tmp_path / str(number))
        command = case.command(home, Moment("interrupt", 1 + steps * number // 3, on=TORCH))
        check_told(commands.run(command), 130, re.escape(INTERRUPTED.removeprefix("sparseprune: ")))
        assert content(home) == before
        check_finishes(commands, command, case, wanted)


@pytest.mark.parametrize(
    ("case", "on", "at"),
    [(MATRICES, TORCH, 40), (FILE, ("preadv",), 20), (DIRECTORY, ("mkdir",), 2), (FILE, ("rename",), 1)],
    ids=["torch in a thread", "reading in a thread", "the second folder", "the output's name"],
)
def test_a_library_that_does_not_return_is_not_waited_for_after_a_signal(
    tmp_path: Path, commands: Commands, case: Case, on: tuple[str, ...], at: int
) -> None:
    whole, home = case.home(tmp_path / "whole"), case.home(tmp_path / "home")
    before = content(home)
    assert commands.run(case.command(whole)).code == 0
    command = case.command(home, Moment("hang", at, on=on))
    said = commands.run(replace(command, grace=0.1))
    assert (said.code, said.out) == (143, "")
    wanted = INTERRUPTED.replace("interrupted", "terminated")
    assert [line for line in said.err.splitlines() if line.startswith("sparseprune: ")] == [wanted]
    assert content(home) == before
    check_finishes(commands, command, case, content(whole))


def test_ctrl_c_while_names_are_given_tells_whether_there_is_an_output(
    tmp_path: Path, commands: Commands
) -> None:
    for case in (FILE, CASES["again"]):
        (tmp_path / case.target).mkdir()
        whole = case.home(tmp_path / case.target / "whole")
        before = content(whole)
        commands.run(case.command(whole))
        wanted = content(whole)
        done = []
        for at in count(1):
            home = case.home(tmp_path / case.target / str(at))
            said = commands.run(case.command(home, Moment("interrupt", at, on=NAMES)))
            if said.code == 0:
                break
            assert said.code == 130
            done.append(check_never_half(home, case.target, before, wanted))
            assert content(home) in (before, wanted)
            line = COMPLETE if done[-1] else INTERRUPTED
            assert said.err.splitlines()[0] == line
        assert sorted(done) == done
        assert len(done) > sum(done) > 0


IMPORT = """
import os, signal, sys
module = sys.argv[1]
class Finder:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
from sparseprune.cli import main
sys.argv = ["sparseprune", "apply", "m.safetensors", "spec.toml"]
main()
"""


@pytest.mark.parametrize(
    ("module", "code", "told"),
    [
        ("sparseprune.cli.app", -signal.SIGINT, ""),  # which a shell calls 130 too
        ("sparseprune.api.pruning", 130, "sparseprune: interrupted: nothing was written\n"),
        ("sparseprune.execution.runner", 130, INTERRUPTED + "\n"),
        ("sparseprune.report.tables", 130, COMPLETE + "\n"),
    ],
)
def test_ctrl_c_while_modules_are_loaded_shows_no_traceback(
    tmp_path: Path, module: str, code: int, told: str
) -> None:
    home = FILE.home(tmp_path / "home")
    done = python("-c", IMPORT, module, cwd=home, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (code, "", told)
    assert (home / "m.pruned.safetensors").exists() == (told == COMPLETE + "\n")


HANGING = """
import hashlib, os, signal, sys, threading
from sparseprune.cli import main, signals
class Finder:
    def find_spec(self, name, *_):
        if name == "numpy":
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGHUP)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
signals._GRACE = 0.1
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.meta_path.insert(0, Finder())
sys.argv = ["sparseprune", "inspect", "m.safetensors"]
main()
"""


def test_a_library_that_takes_long_to_load_is_not_waited_for_after_a_signal(tmp_path: Path) -> None:
    home = FILE.home(tmp_path / "home")
    done = python("-c", HANGING, cwd=home, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (129, "")
    assert done.stderr == "sparseprune: hung up: nothing was written\n"


def test_a_signal_from_outside_interrupts_a_process_that_then_continues(
    tmp_path: Path, commands: Commands
) -> None:
    case = CASES["radix_select"]
    home, whole = case.home(tmp_path / "home"), case.home(tmp_path / "whole")
    before = content(home)
    assert commands.run(case.command(whole)).code == 0
    process = started(replace(case.command(home), slow=0.02, prompt=False))
    wait_for_notes(home, case.target)
    process.send_signal(signal.SIGINT)
    said = ended(process)
    check_told(said, 130, re.escape(INTERRUPTED.removeprefix("sparseprune: ")), kept=True)
    assert content(home) == before
    again = commands.run(case.command(home))
    assert again.code == 0
    assert again.err.splitlines()[0] == CONTINUED
    assert content(home) == content(whole)


def wait_for_notes(home: Path, target: str) -> None:
    """Until a run has something on disk that can be continued."""
    for _ in range(1000):
        if notes(home, target):
            return
        time.sleep(0.02)
    pytest.fail("the run does not begin")


A_FILE, CHANGED = r"m\.safetensors: ", "changed while it was read: it was written to after the run began; .*"
# What happens to an input while it is read -> the line that is said.
READS = {
    "a disk that cannot be read": (FILE, Moment("fail", 4, on=("preadv",)),
        A_FILE + "cannot be read: Input/output error"),
    "a file cut off": (FILE, Moment("truncate", 4, path="m.safetensors"),
        A_FILE + r"(file was truncated|changed) while it was read.*"),
    "a file that grows": (FILE, Moment("grow", 100, path="m.safetensors"),
        A_FILE + r"(file grew|changed) while it was read, from \d+ bytes to \d+.*"),
    "other bytes": (FILE, Moment("rewrite", 100, path="m.safetensors"), A_FILE + CHANGED),
    "a file that another one replaces": (FILE, Moment("replace", 100, path="m.safetensors"),
        A_FILE + "(changed while it was read: )?another file has taken its place.*"),
    "a file that another one replaces before its data is read": (
        FILE,
        Moment("replace", 1, path="m.safetensors"),
        A_FILE + "another file has taken its place while it was read",
    ),
    "a copied file that another one replaces": (DIRECTORY, Moment("replace", 20, path="in/config.json"),
        r"in/config\.json: changed while it was read: another file has taken its place; .*"),
    "scores that others replace": (SCORES, Moment("replace", 100, path="scores.safetensors"),
        r"\S+/scores\.safetensors: (changed while it was read: )?another file has taken its place.*"),
    "a file that vanishes": (FILE, Moment("remove", 100, path="m.safetensors"),
        A_FILE + r"cannot be read( any more)?: No such file or directory.*"),
    "a shard cut off": (DIRECTORY, Moment("truncate", 2, path="in/b.safetensors"),
        r"in/b\.safetensors: (file was truncated|changed) while it was read.*"),
    "a shard that vanishes": (DIRECTORY, Moment("remove", 2, path="in/b.safetensors"),
        r"in/b\.safetensors: cannot be read( any more)?: No such file or directory.*"),
    "a copied file that vanishes": (DIRECTORY, Moment("remove", 20, path="in/extra/tokenizer.txt"),
        r"in/extra/tokenizer\.txt: cannot be read: No such file or directory"),
    "another file that is copied": (DIRECTORY, Moment("rewrite", 20, path="in/config.json"),
        r"in/config\.json: " + CHANGED),
    "a copied file that grows": (DIRECTORY, Moment("grow", 20, path="in/config.json"),
        r"in/config\.json: changed while it was read, from \d+ bytes to \d+; .*"),
    "scores cut off": (SCORES, Moment("truncate", 10, path="scores.safetensors"),
        r"\S+/scores\.safetensors: (file was truncated|changed) while it was read.*"),
    "scores that vanish": (SCORES, Moment("remove", 100, path="scores.safetensors"),
        r"\S+/scores\.safetensors: cannot be read any more: No such file or directory.*"),
    "other scores": (SCORES, Moment("rewrite", 100, path="scores.safetensors"),
        r"\S+/scores\.safetensors: " + CHANGED),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_an_input_that_fails_or_changes_while_it_is_read_is_named_and_there_is_no_output(
    tmp_path: Path, commands: Commands, name: str
) -> None:
    case, moment, line = READS[name]
    home, whole = case.home(tmp_path / "home"), case.home(tmp_path / "whole")
    assert commands.run(case.command(whole)).code == 0
    command = case.command(home, moment)
    check_told(commands.run(command), 3, line)
    assert not (home / case.target).exists()
    if moment.path:
        # As it was, and with the time that it had, and yet another file.
        shutil.copy2(whole / moment.path, home / moment.path)
        (home / f"{moment.path}.away").unlink(missing_ok=True)
    check_finishes(commands, command, case, content(whole), changed=bool(moment.path))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "4m") as place:
        yield place


def large(home: Path, words: str) -> Command:
    """A command whose output of half a megabyte goes to the disk beside its home."""
    home.mkdir()
    generator = torch.Generator().manual_seed(5)
    tensors = {f"{number}.up.weight": torch.randn(64, 256, generator=generator) for number in range(8)}
    (home / "in").mkdir()
    save_file(tensors, home / "in" / "model.safetensors")
    shutil.copy(home / "in" / "model.safetensors", home / "m.safetensors")
    (home / "spec.toml").write_text(GLOBAL)
    return Command(str(home), tuple(words.split()), "radix_select", slab=8192)


FULL = (
    r"\S+/disk/\.out\S*: cannot be written: No space left on device; "
    r"the output needs [\d.]+ [kM]?B more, [\d.]+ [kM]?B are free now"
)
OUTPUTS = {
    "a directory": "apply in spec.toml -o ../disk/out",
    "a file": "apply m.safetensors spec.toml -o ../disk/out --mask-format packed",
    "masks": "mask in spec.toml -o ../disk/out",
}


@needs_root
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_disk_without_room_is_refused_before_the_first_byte(
    tmp_path: Path, commands: Commands, disk: Path, name: str
) -> None:
    command = large(tmp_path / "home", OUTPUTS[name])
    fill(disk, 1 << 20)
    free = free_bytes(disk)
    said = commands.run(command)
    check_told(said, 3, r"\S+/disk: not enough free space: [\d.]+ .B needed, .* free; .*", kept=False)
    lacking = memory_of(said.err.split("; free ")[1].split(" more")[0])
    assert f" needed, {size(free)} free; " in said.err
    assert (said.read, said.written) == (0, 0)
    assert names_in(disk) == ["filler"]
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - lacking - 4096)
    assert commands.run(command).code == 0


def nbytes_of(told: str) -> int:
    return 0 if told == "0 B" else memory_of(told)


@needs_root
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_disk_that_fills_up_is_told_with_its_numbers_and_the_same_command_continues(
    tmp_path: Path, commands: Commands, disk: Path, name: str
) -> None:
    command = large(tmp_path / "home", OUTPUTS[name])
    writes = commands.run(replace(command, moment=Moment("nothing", 0, on=("pwrite",)))).calls
    wanted = content(disk)
    seen = set()
    for number in range(8):
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        moment = Moment("fill", 3 + writes * number // 9, on=("pwrite",), path=str(disk))
        said = commands.run(replace(command, moment=moment))
        check_told(said, 3, FULL)
        needed, free = map(nbytes_of, re.findall(r"([\d.]+ [kM]?B) (?:more|are free)", said.err))
        assert free < 8192 < needed
        found = notes(disk, "out")
        seen.add(len(found or ()))
        (disk / "filler").unlink()
        assert content(disk) == {}
        again = commands.run(command)
        assert again.code == 0, again.err
        assert (CONTINUED in again.err) == (found is not None)
        assert content(disk) == wanted
    assert len(seen) > 3


@needs_root
def test_a_disk_that_may_only_be_read_is_told(tmp_path: Path, commands: Commands, disk: Path) -> None:
    command = large(tmp_path / "home", OUTPUTS["a directory"])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said = commands.run(command)
    check_told(said, 3, r"\S+/disk: cannot be written to; give another place with -o", kept=False)


# What is read-only -> the line that is said, and how to go on.
PERMISSIONS = {
    "the folder of the output": (FILE, "", 0o555, r"\S+: cannot be written to; give another place with -o"),
    "an output to be replaced": (CASES["again"], "out", 0o555,
        r"\S+/out: cannot be written to, so --force cannot replace it; .*"),
    "the input": (FILE, "m.safetensors", 0o000, A_FILE + "cannot be read: Permission denied"),
    "the folder of the input": (DIRECTORY, "in", 0o000, r"\S*in\S*: cannot be read: Permission denied"),
    "the spec": (FILE, "spec.toml", 0o000, r"spec\.toml: the spec cannot be read: Permission denied"),
}  # fmt: skip


@needs_root
@pytest.mark.parametrize("name", PERMISSIONS)
def test_what_may_not_be_touched_is_told_and_nothing_is_left(
    tmp_path: Path, commands: Commands, name: str
) -> None:
    case, place, mode, line = PERMISSIONS[name]
    home = case.home(tmp_path / "home")
    before, usual = content(home), (home / place).stat().st_mode
    command = replace(case.command(home), powerless=True)
    (home / place).chmod(mode)
    said = commands.run(command)
    (home / place).chmod(usual)
    check_told(said, 2 if place == "spec.toml" else 3, line, kept=False)
    assert content(home) == before
    assert not any(path.name.startswith(".") for path in home.iterdir())
    assert commands.run(command).code == 0


@needs_root
def test_a_folder_that_becomes_read_only_is_told_and_the_same_command_continues(
    tmp_path: Path, commands: Commands
) -> None:
    home, whole = DIRECTORY.home(tmp_path / "home"), DIRECTORY.home(tmp_path / "whole")
    commands.run(DIRECTORY.command(whole))
    place = ".out.sparseprune-partial/output/sparseprune"
    command = replace(DIRECTORY.command(home, Moment("lock", 150, path=place)), powerless=True)
    check_told(commands.run(command), 3, r"\S+/report\.json: cannot be written: Permission denied", kept=True)
    (home / place).chmod(0o755)
    check_finishes(commands, command, DIRECTORY, content(whole))


@pytest.mark.parametrize("words", ["apply in other.toml --force", "mask in spec.toml"])
def test_the_second_of_two_runs_to_one_output_is_refused_and_harms_nothing(
    tmp_path: Path, commands: Commands, words: str
) -> None:
    case = CASES["radix_select"]
    home, whole = case.home(tmp_path / "home"), case.home(tmp_path / "whole")
    for place in (home, whole):
        (place / "other.toml").write_text(CHANNELS)
    commands.run(case.command(whole))
    first = started(replace(case.command(home), slow=0.02))
    wait_for_notes(home, case.target)
    second = commands.run(Command(str(home), (*words.split(), "-o", "out")))
    check_told(
        second,
        2,
        r"\S+/out: another run is writing this output; wait, or give another name with -o",
        kept=False,
    )
    assert first.poll() is None
    assert ended(first).code == 0
    assert content(home) == content(whole)


def test_a_run_beside_one_that_was_killed_is_not_refused(tmp_path: Path, commands: Commands) -> None:
    case = CASES["radix_select"]
    home, whole = case.home(tmp_path / "home"), case.home(tmp_path / "whole")
    commands.run(case.command(whole))
    with started(replace(case.command(home), slow=0.02)) as first:
        wait_for_notes(home, case.target)
        first.kill()
    check_finishes(commands, case.command(home), case, content(whole))


@pytest.mark.parametrize("name", ["contiguous, a file, packed", "again"])
@pytest.mark.parametrize("function", [*WRITES, *SYNCS, *NAMES])
def test_a_writer_that_fails_anywhere_leaves_nothing_or_what_goes_on(
    tmp_path: Path, commands: Commands, name: str, function: str
) -> None:
    case = CASES[name]
    whole = case.home(tmp_path / "whole")
    before = content(whole)
    assert commands.run(replace(case.command(whole), slab=2048)).code == 0
    wanted, failed = content(whole), 0
    for at in count(1):
        home = case.home(tmp_path / str(at))
        command = replace(case.command(home, Moment("fail", at, on=(function,))), slab=2048)
        said = commands.run(command)
        if said.calls < at:
            break
        done = check_never_half(home, case.target, before, wanted)
        if not done:
            failed += 1
            check_told(said, 3, r"\S+: cannot .*: Input/output error( .*)?")
            assert str(home) in said.err
            assert content(home) == before
            check_finishes(commands, command, case, wanted)
        assert "Traceback" not in said.err
        shutil.rmtree(home)
    # A copy is made without the kernel; names are exchanged for directories, and only there.
    harmless = ["unlink", "rmdir", "copy_file_range", "rename" if name == "again" else "swap"]
    assert failed > 0 or function in harmless


@pytest.mark.parametrize(
    ("function", "at"),
    [("preadv", 1), ("preadv", 9), ("pwrite", 1), ("pwrite", 30), ("note", 1), ("note", 20)],
)
def test_a_bug_keeps_its_traceback_and_leaves_nothing(
    tmp_path: Path, commands: Commands, function: str, at: int
) -> None:
    case = CASES["radix_select"]
    home = case.home(tmp_path / "home")
    before = content(home)
    said = commands.run(case.command(home, Moment("bug", at, on=(function,))))
    assert (said.code, said.out) == (70, "")  # 1 would say that a check failed
    assert said.err.startswith("Traceback (most recent call last):\n"), said.err
    assert said.err.endswith("ZeroDivisionError: a bug\n")
    assert content(home) == before
    assert not (home / ".out.sparseprune-partial").exists()


def test_the_checks_can_fail(tmp_path: Path, commands: Commands) -> None:
    home = FILE.home(tmp_path / "home")
    good = Ended(3, "", f"{CONTINUED}\nsparseprune: m: gone\n")
    check_told(good, 3, "m: gone", kept=False)
    for wrong in (
        replace(good, code=2),
        replace(good, out="m\n"),
        replace(good, err="m: gone\n"),
        replace(good, err="sparseprune: m: gone again\n"),
        replace(good, err=f"{good.err}and more\n"),
        replace(good, err=f"Traceback\n{good.err}"),
    ):
        with pytest.raises(AssertionError):
            check_told(wrong, 3, "m: gone")
    with pytest.raises(AssertionError):
        check_told(good, 3, "m: gone", kept=True)
    assert commands.run(FILE.command(home)).code == 0
    with pytest.raises(AssertionError, match="already exists"):
        check_finishes(commands, FILE.command(home), FILE, content(home))
