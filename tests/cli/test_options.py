"""Options: sizes as they are typed, and defaults that respect what a container allows."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.api.resources import default_jobs, default_memory, memory_of
from sparseprune.errors import SparsepruneError
from tests.commands import ok, run

GIB = 1 << 30

# What was typed -> bytes.
SIZES = {
    "1": 1, "4096": 4096, "17B": 17, "17 b": 17, "2K": 2_000, "2kB": 2_000, "2 KB": 2_000, "3MB": 3_000_000,
    "3m": 3_000_000, "8GB": 8_000_000_000, "1TB": 10**12, "2KiB": 2048, "1mib": 1 << 20, "8GiB": 8 * GIB,
    "8  GIB": 8 * GIB, " 1.5GiB ": GIB + GIB // 2, ".5GiB": GIB // 2, "1TiB": 1 << 40, "1.9": 1,
}  # fmt: skip
NOT_SIZES = (
    "|8Gx|8Gi|GiB|-1|-1GiB|+1GiB|0|0GiB|0.1B|1e9|1.2.3GB|1,5GB|8GiB/2|8 G B|1_000|inf|9999999999999999".split(
        "|"
    )
)


@pytest.mark.parametrize("text", SIZES)
def test_a_size_is_bytes(text: str) -> None:
    assert memory_of(text) == SIZES[text]


@pytest.mark.parametrize("text", NOT_SIZES)
def test_what_is_no_size_is_refused(text: str) -> None:
    message = f"--memory {text}: wanted a size such as 8GiB or 500MB"
    with pytest.raises(SparsepruneError, match=f"^{re.escape(message)}$"):
        memory_of(text)


def test_help_shows_the_option_with_its_default() -> None:
    shown = " ".join(run("plan", "--help").out.split())
    assert "--memory SIZE Limit the memory of the run, such as 8GiB or 500MB. [default: a quarter" in shown
    assert "at most 1GiB without --text]" in shown


def machine(root: Path, files: dict[str, str]) -> Path:
    """A /proc and a /sys with these files."""
    for name, text in files.items():
        place = root / ("sys/fs/cgroup" if name != "proc/self/cgroup" else "") / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return root


OWN = "proc/self/cgroup"
# The files of a machine with 64 GiB -> a quarter of what a process may use, 1 GiB at most.
MEMORY: dict[str, tuple[dict[str, str], int]] = {
    "no control groups": ({}, GIB),
    "no limit": ({OWN: "0::/\n", "memory.max": "max\n"}, GIB),
    "a container": ({OWN: "0::/\n", "memory.max": f"{2 * GIB}\n"}, GIB // 2),
    "a large container": ({OWN: "0::/\n", "memory.max": f"{32 * GIB}\n"}, GIB),
    "a group": ({OWN: "0::/user/run\n", "user/run/memory.max": "4000\n"}, 1000),
    "a group around": ({OWN: "0::/user/run\n", "user/run/memory.max": "max\n", "user/memory.max": "4000\n"},
        1000),
    "the tightest one": (
        {OWN: "0::/user/run\n", "user/run/memory.max": "8000\n", "user/memory.max": "4000\n"}, 1000),
    "a group beside": ({OWN: "0::/user/run\n", "user/other/memory.max": "4000\n"}, GIB),
    "version 1": ({OWN: "4:memory:/a\n1:cpu:/\n0::/\n", "memory/a/memory.limit_in_bytes": "4000\n"}, 1000),
    "version 1 without a limit": (
        {OWN: "4:memory:/\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"}, GIB),
    "version 1 in a container": ({OWN: "4:cpu,memory:/docker/0f\n", "memory/memory.limit_in_bytes": "4000\n"},
        1000),
    "outside of what is mounted": ({OWN: "0::/../../other\n", "memory.max": "4000\n"}, 1000),
    "next to nothing": ({OWN: "0::/\n", "memory.max": "0\n"}, 1),
    "not what is expected": ({OWN: "\n:\n0:\nmemory\n0::/\n", "memory.max": "-1 \u00b2\n"}, GIB),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_a_quarter_of_what_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    files, wanted = MEMORY[name]
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 16 << 20}.__getitem__)
    assert default_memory(machine(tmp_path, files)) == wanted


def test_memory_of_a_small_machine_is_a_quarter_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert default_memory(tmp_path) == 1_024_000


@pytest.mark.parametrize("answer", [-1, ValueError("unrecognized"), OSError(22, "Invalid argument")])
def test_memory_of_a_machine_that_does_not_say_is_the_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | Exception
) -> None:
    def sysconf(_: str) -> int:
        if isinstance(answer, Exception):
            raise answer
        return answer if _ == "SC_PHYS_PAGES" else 4096

    monkeypatch.setattr("os.sysconf", sysconf)
    assert default_memory(tmp_path) == GIB


def test_defaults_of_this_machine() -> None:
    assert 0 < default_memory() <= GIB
    assert 0 < default_jobs() <= (os.cpu_count() or 1)


# cpu.max -> jobs of a process that sees eight cores.
JOBS = {
    "max 100000": 8, "200000 100000": 2, "150000 100000": 2, "50000 100000": 1, "1000 100000": 1,
    "1600000 100000": 8, "0 100000": 1, "200000 0": 8, "200000": 8, "": 8,
}  # fmt: skip


@pytest.mark.parametrize("text", JOBS)
@pytest.mark.parametrize("group", ["", "a/b/"])
def test_jobs_respect_the_quota_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, group: str
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    files = {OWN: f"0::/{group.rstrip('/')}\n", f"{group}cpu.max": f"{text}\n"}
    assert default_jobs(machine(tmp_path, files)) == JOBS[text]


def test_jobs_without_a_quota_are_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert default_jobs(tmp_path) == 3


def test_outputs_that_nobody_may_read_are_refused_and_replaced_as_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "m.safetensors"
    save_file({"layers.0.attn.q_proj.weight": torch.ones(4, 4)}, source)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"")
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **more: Path(path) != out and allowed(path, mode, **more)
    )
    said = run("apply", source, "2of4", "-o", out)
    assert (said.code, "already exists" in said.err) == (2, True), said.err
    ok("apply", source, "2of4", "-o", out, "--force")
    assert out.stat().st_size
