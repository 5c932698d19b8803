"""Progress: one line on a terminal that never wraps and always goes; log lines where stderr is a pipe."""

import io
import math
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from random import Random

import pytest
from rich.cells import cell_len
from rich.console import Console

from sparseprune.api.run import Advance, Progress, Run
from sparseprune.cli.progress import Latest, Reading, _log_lines, log_line, shown, terminal_line

UNIT = "model.layers.7.mlp.experts.down"
HALF = (Progress("pruning", 750_000_000, 2_200_000_000, unit=UNIT), 1.13e9)


@contextmanager
def progress(what: str, total: int, *, quiet: bool) -> Iterator[Advance]:
    """A step of a run that the command line shows."""
    with shown(quiet=quiet) as hear, Run(hear).progress(what, total) as advance:
        yield advance


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class At(Latest):
    """A step at a rate that a test sets."""

    def __init__(self, step: Progress, rate: float | None) -> None:
        super().__init__(step)
        self.rate = rate

    def read(self) -> Reading:
        return at_rate(self.step, self.rate)


def at_rate(step: Progress, rate: float | None) -> Reading:
    return Reading(step, rate, (step.total - step.done) / rate if rate else None)


def drawn(step: Progress, rate: float | None, width: int, encoding: str = "utf-8") -> str:
    """What a terminal of this width shows; without colours and the spaces at the end."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    console = Console(file=stream, force_terminal=True, no_color=True, width=width, highlight=False)
    line, draw = terminal_line(At(step, rate), console)
    draw()
    console.print(line)
    stream.flush()
    text = raw.getvalue().decode(encoding).replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert text.endswith("\n")
    (whole,) = text[:-1].split("\n")
    assert cell_len(whole) <= width - 2
    return whole.rstrip()


# The width of the terminal -> the line.
LINES = {
    40: "pruning   0.75/2.20 GB 1.1 GB/s    1 s",
    50: f"pruning ━━━╸{' ' * 7} 0.75/2.20 GB 1.1 GB/s    1 s",
    60: "pruning ━    0.75/2.20 GB 1.1 GB/s    1 s model.layers.7.…",
    80: f"pruning ━━╸{' ' * 5} 0.75/2.20 GB 1.1 GB/s    1 s {UNIT}",
    120: f"pruning ━━━━━{' ' * 11} 0.75/2.20 GB 1.1 GB/s    1 s {UNIT}",
    200: f"pruning {'━' * 10}╸{' ' * 21} 0.75/2.20 GB 1.1 GB/s    1 s {UNIT}",
}


@pytest.mark.parametrize("width", LINES)
def test_the_line_has_all_facts_at_any_width(width: int) -> None:
    assert drawn(*HALF, width) == LINES[width]


@pytest.mark.parametrize("width", [3, 20, 38, 40, 41, 47, 59, 60, 79, 80, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize(
    ("done", "total", "rate", "unit"),
    [
        (750_000_000, 2_200_000_000, 1.13e9, UNIT),
        (0, 0, None, ""),
        (0, 2_200_000_000, None, ""),
        (3_000, 2_000, 1.0, ""),
        (12_340_000_000, 99_900_000_000, 1.0, UNIT * 9),
        (1, 99_900_000_000, 9_940_000.0, "重み[layer=7]" * 9),
        (999, 10**18, 10.0**14, "x\x1b[2J\ny"),
    ],
)
def test_the_line_never_wraps_and_leaves_room_for_an_interrupt(
    done: int, total: int, rate: float | None, unit: str, encoding: str, width: int
) -> None:
    line = drawn(Progress("masking", done, total, unit=unit), rate, width, encoding)
    assert width < 47 or line.startswith("masking ")


def test_the_line_in_a_terminal_without_unicode_has_the_same_length() -> None:
    assert drawn(*HALF, 60, "latin-1") == "pruning -    0.75/2.20 GB 1.1 GB/s    1 s model.layers.7.m"


def test_the_bar_keeps_its_length_when_the_next_unit_begins() -> None:
    lines = [drawn(replace(HALF[0], unit=unit), 1.13e9, 80) for unit in ("", "a", UNIT, UNIT * 9)]
    assert len({line.index("0.75/2.20 GB") for line in lines}) == 1


def test_names_are_shown_as_they_are_but_for_what_a_terminal_obeys() -> None:
    unit = "[bold]{x}[/]:smile:\x1b[2J\n%s"
    assert drawn(replace(HALF[0], unit=unit), 1.13e9, 120).endswith(r" [bold]{x}[/]:smile:\x1b[2J\n%s")


def test_the_line_counts_tokens() -> None:
    step = Progress("calibrating", 750_000, 2_200_000, counts="tokens")
    assert drawn(step, 1.1e6, 80).endswith(" 0.75/2.20 M tokens 1.1 M tokens/s    1 s")


@pytest.mark.parametrize(
    ("done", "total", "rate", "unit", "line"),
    [
        (750_000_000, 2_200_000_000, 1.13e9, UNIT, f"34%, 0.75 of 2.20 GB, 1.1 GB/s, 1 s left, {UNIT}"),
        (7_500_000, 12_300_000, None, "", "60%, 7.5 of 12.3 MB"),
        (0, 2_000, None, "", "0%, 0.00 of 2.00 kB"),
        (1_999, 2_000, 10.0, "", "99%, 2.00 of 2.00 kB, 10 B/s, 0 s left"),
        (1_000, 2_000, 0.0, "x", "50%, 1.00 of 2.00 kB, 0 B/s, x"),
        (0, 0, None, "", "100%, 0 of 0 B"),
        (0, 10**10, 12_345_678.0, "", "0%, 0.0 of 10.0 GB, 12 MB/s, 14 min left"),
        (0, 10**8, 999_999.0, "", "0%, 0 of 100 MB, 1.0 MB/s, 2 min left"),
        (0, 36 * 10**11, 10.0**8, "a\nb", "0%, 0.00 of 3.60 TB, 100 MB/s, 10.0 h left, a\\nb"),
    ],
)
def test_log_lines(done: int, total: int, rate: float | None, unit: str, line: str) -> None:
    assert (
        log_line(at_rate(Progress("reading", done, total, unit=unit), rate)) == f"sparseprune: reading {line}"
    )


def test_the_rate_starts_with_the_first_bytes_and_without_what_was_there() -> None:
    clock = Clock()
    began = Progress("reading", 400, 1_000, already=400)
    latest = Latest(began, clock)
    clock.now += 60
    assert latest.read() == Reading(began)
    latest.step = replace(began, done=410, unit="a")
    clock.now += 0.1
    assert latest.read() == Reading(latest.step)
    latest.step = replace(began, done=500, unit="a")
    clock.now += 1.8
    reading = latest.read()
    assert reading.rate == pytest.approx(50)
    assert reading.left == pytest.approx(10)
    assert log_line(reading) == "sparseprune: reading 50%, 0.50 of 1.00 kB, 50 B/s, 10 s left, a"


def test_the_time_left_counts_down_between_two_pieces_and_the_rate_falls_where_none_comes() -> None:
    clock = Clock()
    latest = Latest(Progress("reading", 0, 1_000), clock)
    for _ in range(5):
        clock.now += 10
        latest.step = replace(latest.step, done=latest.step.done + 100)
        latest.read()
    lefts = []
    for _ in range(5):
        clock.now += 2
        lefts.append(latest.read().left)
    assert lefts == pytest.approx([48, 46, 44, 42, 40])
    clock.now += 1000
    stopped = latest.read()
    assert (stopped.rate or 0) < 0.5
    assert (stopped.left or 0) > 500


def lefts_of(durations: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The share that is done and the seconds that are said to be left, five times a second.

    A workload is how much work each piece is said to be, and how many seconds it really takes.
    """
    clock, found = Clock(), []
    whole = int(sum(work for work, _ in durations))
    latest, done = Latest(Progress("pruning", 0, whole), clock), 0.0
    end = clock.now
    for work, seconds in durations:
        end += seconds
        while clock.now + 0.2 < end:
            clock.now += 0.2
            found.append((done / whole, latest.read().left))
        done += work
        latest.step = replace(latest.step, done=int(done))
    return [(share, left) for share, left in found if left is not None]


DRAWN = Random(0)
# How much work each piece is said to be, and the seconds that it takes.
WORKLOADS = {
    "layers alike": [(100.0, DRAWN.uniform(0.5, 0.8)) for _ in range(200)],
    "a slow disk now and then": [(100.0, DRAWN.choice([0.2, 0.2, 0.2, 3.0])) for _ in range(300)],
    "large matrices first": [
        (size**3 / 1e4, size**3 / 2e8 * DRAWN.uniform(0.8, 1.25))
        for size in [4096] * 4 + [1024] * 60 + [256] * 200
    ],
    "faster from the page cache in the beginning": [(100.0, 0.1)] * 100 + [(100.0, 0.16)] * 300,
    "few long searches": [(work, 1.0) for _ in range(8) for work in [4.7e3] * 18 + [1.5e4]],
}
MOST = 1.6  # times as much may be left later as was said before, and a second


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_time_left_hardly_rises_after_the_first_tenth(workload: str) -> None:
    least = math.inf
    lefts = [left for share, left in lefts_of(WORKLOADS[workload]) if share >= 0.1]
    assert len(lefts) > 20
    for left in lefts:
        assert left <= MOST * least + 1
        least = min(least, left)


def test_every_thread_is_counted() -> None:
    steps: list[Progress] = []
    with Run(steps.append).progress("reading", 40_000) as advance:

        def work() -> None:
            for _ in range(10_000):
                advance(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [step.done for step in steps] == [*range(40_001), 40_000]
    assert [step.ended for step in steps[-2:]] == [False, True]


def test_log_lines_come_at_growing_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, moments = Clock(), []
    monkeypatch.setattr("time.monotonic", clock)
    began, look = clock.now, _log_lines(Latest(Progress("reading", 0, 100)))
    for _ in range(300):
        clock.now += 1
        look()
        if capsys.readouterr().err:
            moments.append(clock.now - began)
    assert moments == [5, 10, 20, 40, 80, 140, 200, 260]


def test_a_pipe_gets_log_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sparseprune.cli.progress._TICK", 0.01)
    monkeypatch.setattr("sparseprune.cli.progress._FIRST_LINE", 0.01)
    with progress("reading", 100, quiet=False) as advance:
        advance(25, "model.norm")
        line = ""
        while "25%" not in line:  # the first look may come before the first byte
            time.sleep(0.01)
            line = (capsys.readouterr().err.splitlines() or [""])[-1]
    assert line.startswith("sparseprune: reading 25%, 25 of 100 B")
    assert line.endswith(", model.norm")


def test_quiet_writes_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sparseprune.cli.progress._TICK", 0.01)
    monkeypatch.setattr("sparseprune.cli.progress._FIRST_LINE", 0.01)
    with progress("reading", 100, quiet=True) as advance:
        advance(25, "model.norm")
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


def test_a_short_run_says_nothing_and_leaves_no_thread(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), progress("reading", 100, quiet=False) as advance:  # noqa: PT012
        advance(100)
        raise ZeroDivisionError
    assert threading.active_count() == before
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sparseprune.cli.progress._TICK", 0.01)
    monkeypatch.setattr("sparseprune.cli.progress._FIRST_LINE", 0.01)
    monkeypatch.setattr("sys.stderr", Closed())
    with progress("reading", 100, quiet=False) as advance:
        time.sleep(0.1)
        advance(100)


PROGRAM = """
import sys
from sparseprune.api.run import Run
from sparseprune.cli.progress import shown
with shown(quiet={quiet}) as hear, Run(hear).progress("pruning", 100) as advance:
    advance(50, "proj[layer=3]")
    input()
    print("a warning", file=sys.stderr)
    print("a result")
    {end}
"""


def on_terminal(end: str, *, quiet: bool = False, **environment: str) -> tuple[str, str]:
    """What the program writes on a terminal as stderr, and on a pipe as stdout.

    It goes on once it has drawn what it does, if it draws.
    """
    colours = {"NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    plain = {name: value for name, value in os.environ.items() if name not in colours}
    wanted = plain | {"TERM": "xterm", "COLUMNS": "100"} | environment
    draws = not quiet and wanted["TERM"] != "dumb"
    leader, follower = pty.openpty()
    written = b""
    with os.fdopen(leader, "rb", buffering=0) as terminal, os.fdopen(follower, "wb") as stderr:
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(end=end, quiet=quiet)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=wanted,
        ) as process:
            while draws and b"50/100 B" not in written:
                written += terminal.read(65536) or b""
            out, _ = process.communicate(b"\n")
        os.set_blocking(terminal.fileno(), False)
        written += terminal.read(65536) or b""
    return written.decode(), out.decode()


@pytest.mark.parametrize("end", ["advance(50)", "raise SystemExit", "raise KeyboardInterrupt"])
def test_the_line_goes_and_the_cursor_comes_back_however_a_run_ends(end: str) -> None:
    written, result = on_terminal(end)
    assert "50/100 B" in written
    assert "proj[layer=3]" in written
    assert "a warning\r\n" in written
    assert result == "a result\n"
    hidden = written.rindex("\x1b[?25l")
    shown = written.index("\x1b[?25h", hidden)
    erased = written.rindex("\x1b[1A\x1b[2K")
    assert hidden < written.rindex("50/100 B" if "raise" in end else "100/100 B") < shown < erased


def test_thousands_of_steps_are_drawn_a_few_times() -> None:
    written, _ = on_terminal("for _ in range(20_000): advance(0)")
    assert written.count("50/100 B") < 100  # five a second


def test_no_color_and_quiet_and_a_dumb_terminal_are_respected() -> None:
    assert "\x1b[9" in on_terminal("pass")[0]
    assert "\x1b[9" not in on_terminal("pass", NO_COLOR="1")[0]
    assert on_terminal("pass", quiet=True)[0] == "a warning\r\n"
    assert on_terminal("pass", TERM="dumb")[0] == "a warning\r\n"
