"""The standard streams of a process: full, closed, or read by nobody; and signals that end it."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import lay_out
from sparseprune.cli.demo import write_decoder
from tests.cli.interrupted import Commands, ended, started
from tests.cli.test_interruptions import wait_for_notes
from tests.cli.test_resuming_runs import CASES, CONTINUED, content
from tests.commands import python

COMMAND = f'"{sys.executable}" -m sparseprune'
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"
FULL = "sparseprune: the result cannot be written to stdout: No space left on device"
needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")  # noqa: PTH110


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    write_decoder(folder / "decoder")
    assert shell(folder, "apply decoder 2of4 -o pruned -q").returncode == 0
    return folder


def shell(folder: Path, words: str) -> subprocess.CompletedProcess[str]:
    """A command in a shell, as somebody types it."""
    command = ["bash", "-c", f"{COMMAND} {words}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


@needs_dev_full
@pytest.mark.parametrize(
    "words",
    [
        "inspect pruned", "inspect pruned --json", "verify pruned 2of4", "compare decoder pruned --csv",
        "plan decoder 2of4", "specs", "specs 2of4", "--help", "apply --help", "--version",
    ],
)  # fmt: skip
def test_a_result_that_cannot_be_written_is_the_machines_error(folder: Path, words: str) -> None:
    said = shell(folder, f"{words} > /dev/full")
    assert (said.returncode, said.stderr.splitlines()) == (3, [FULL])


@needs_dev_full
@pytest.mark.parametrize("more", ["", "--json", "-q"])
def test_an_output_is_complete_also_where_its_name_cannot_be_told(folder: Path, more: str) -> None:
    said = shell(folder, f"apply decoder 2of4 -o untold{more} {more} > /dev/full")
    assert said.returncode == 3
    assert said.stderr.splitlines()[-2:] == [FULL, "sparseprune: the output is complete"]
    assert shell(folder, f"verify untold{more} 2of4 -q").returncode == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_in_nobodys_way(folder: Path, closed: str) -> None:
    out = f"closed{len(closed)}{closed[0].replace('<', 'in').replace('>', 'out')}"
    said = shell(folder, f"apply decoder 2of4 -o {out} {closed}")
    assert (said.returncode, "Traceback" in said.stderr) == (0, False)
    names = {path.relative_to(folder / "pruned") for path in (folder / "pruned").rglob("*.safetensors")}
    assert names
    for name in names:  # nothing that was printed ended in a file that took the place of a stream
        assert (folder / out / name).read_bytes() == (folder / "pruned" / name).read_bytes()


@needs_dev_full
def test_a_log_that_is_full_stops_nothing(folder: Path) -> None:
    said = shell(folder, "apply decoder 2of4 -o unlogged 2> /dev/full")
    assert (said.returncode, said.stdout) == (0, "unlogged\n")
    assert shell(folder, "inspect absent 2> /dev/full").returncode == 2


def test_whoever_reads_no_further_is_no_failure(folder: Path) -> None:
    said = shell(folder, "inspect pruned | head -n 1; echo ${PIPESTATUS[0]}")
    assert said.stderr == ""
    assert said.stdout.splitlines()[-1] == "0"


@pytest.mark.parametrize(
    ("number", "word"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "hung up")],
)
@pytest.mark.parametrize("name", ["radix_select", "contiguous"])
def test_a_signal_ends_a_run_that_then_continues(
    tmp_path: Path, commands: Commands, number: signal.Signals, word: str, name: str
) -> None:
    case = CASES[name]
    home, whole = case.home(tmp_path / "home"), case.home(tmp_path / "whole")
    before = content(home)
    assert commands.run(case.command(whole)).code == 0
    process = started(replace(case.command(home), slow=0.02, prompt=False))
    wait_for_notes(home, case.target)
    process.send_signal(number)
    process.send_signal(number)
    said = ended(process)
    assert said.code == 128 + number
    wanted = f"sparseprune: {word}: there is no output; run the same command again to continue"
    assert wanted in said.err.splitlines()
    assert content(home) == before
    again = commands.run(case.command(home))
    assert (again.code, again.err.splitlines()[0]) == (0, CONTINUED)
    assert content(home) == content(whole)


IGNORED = """
import os, signal
from sparseprune.cli.signals import stopped_once
with stopped_once():
    os.kill(os.getpid(), signal.SIGHUP)
print("went on")
"""


def test_a_signal_that_is_ignored_from_outside_stays_ignored() -> None:
    command = f"trap '' HUP; exec \"{sys.executable}\" -c '{IGNORED}'"
    said = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout, said.stderr) == (0, "went on\n", "")
    heard = python("-c", IGNORED)
    assert heard.returncode != 0
    assert "Stopped" in heard.stderr


STOPPED = """
import os, signal, sys, time
from sparseprune.cli.signals import Stopped, stopped_once
class Destroyed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass
try:
    with stopped_once():
        {begin}
        time.sleep(10)
except Stopped as stopped:
    print(stopped.number, {whole})
"""


@pytest.mark.parametrize(
    ("begin", "whole"), [("import other", "sys.modules['other'].whole"), ("Destroyed()", "True")]
)
def test_a_signal_that_cannot_be_raised_where_it_comes_is_raised_a_moment_later(
    tmp_path: Path, begin: str, whole: str
) -> None:
    (tmp_path / "other.py").write_text(
        "import os\nos.kill(os.getpid(), 15)\nfor _ in range(999): whole = True"
    )
    done = python("-c", STOPPED.format(begin=begin, whole=whole), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "15 True\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no terminals of this kind")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_gets_its_cursor_back(tmp_path: Path, number: signal.Signals) -> None:
    header = lay_out([("w", "BF16", (1 << 16, 1 << 16))], {})
    with (tmp_path / "m.safetensors").open("wb") as file:  # a hole: nothing on disk, and long enough to read
        file.write(header.raw)
        file.truncate(header.file_size)
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "sparseprune", "inspect", str(tmp_path / "m.safetensors")],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(follower)
    shown = b""
    while HIDE not in shown:
        shown += os.read(leader, 1 << 16)
    process.send_signal(number)
    while more := read_terminal(leader):
        shown += more
    os.close(leader)
    assert process.wait(60) == 128 + number
    assert shown.rindex(SHOW) > shown.rindex(HIDE)
    assert b"nothing was written" in shown


def read_terminal(leader: int) -> bytes:
    """What was printed, nothing once nobody prints any more."""
    try:
        return os.read(leader, 1 << 16)
    except OSError:
        return b""


@pytest.mark.skipif(sys.platform != "linux", reason="names are not bytes there")
def test_a_path_that_is_not_utf_8_is_told_as_the_bytes_that_it_is(folder: Path) -> None:
    words = [sys.executable, "-m", "sparseprune", "apply", "decoder", "2of4", "-q", "-o"]
    said = subprocess.run(
        [*map(os.fsencode, words), b"caf\xe9"], cwd=folder, capture_output=True, check=False
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, b"caf\xe9\n", b"")


@pytest.mark.parametrize("form", ["--csv", "--markdown", "--json"])
def test_names_reach_no_terminal_raw_in_any_form(tmp_path: Path, form: str) -> None:
    save_file({"\x1b[2J\x07": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    leader, follower = os.openpty()
    words = [sys.executable, "-m", "sparseprune", "inspect", str(tmp_path / "m.safetensors"), form]
    process = subprocess.Popen(words, stdout=follower, stderr=follower, env=os.environ | {"TERM": "dumb"})
    os.close(follower)
    shown = b""
    while more := read_terminal(leader):
        shown += more
    os.close(leader)
    assert process.wait(60) == 0
    assert b"[2J" in shown
    assert b"\x1b" not in shown
    assert b"\x07" not in shown
