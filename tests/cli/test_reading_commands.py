"""What all commands that read and write nothing share: being interrupted, and odd streams."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import StoredTensor, TensorReader
from tests.cli.interrupted import change
from tests.commands import ok, python, refused, run, silent, valid
from tests.faults import failing
from tests.samples import TWO_OF_FOUR, mlp_tensors, write_spec

COMMANDS = (
    ("inspect", "m.safetensors"),
    ("compare", "m.safetensors", "m.pruned.safetensors"),
    ("verify", "m.pruned.safetensors", "spec.toml"),
    ("verify", "m.pruned.safetensors", "--masks", "m.pruned.masks.safetensors"),
)
ODD_NAME = "[red]w\N{LATIN SMALL LETTER E WITH ACUTE}\n\N{CJK UNIFIED IDEOGRAPH-5BBD}.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(mlp_tensors() | {ODD_NAME: torch.ones(4, 4)}, tmp_path / "m.safetensors")
    ok("apply", tmp_path / "m.safetensors", write_spec(tmp_path, TWO_OF_FOUR), "-q")
    return tmp_path


def in_folder(folder: Path, words: tuple[str, ...]) -> list[object]:
    return [folder / word if word.endswith((".safetensors", ".toml")) else word for word in words]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_an_interrupt_says_that_nothing_was_written(
    folder: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:

    before = sorted(folder.iterdir())
    monkeypatch.setattr(TensorReader, "read_into", failing(KeyboardInterrupt))
    said = run(*in_folder(folder, words), "-q")
    assert (said.code, said.out) == (130, "")
    assert said.err == "sparseprune: interrupted: nothing was written\n"
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_a_stream_that_knows_ascii_alone_gets_escapes(
    folder: Path, words: tuple[str, ...], options: tuple[str, ...]
) -> None:
    ascii_alone = os.environ | {"PYTHONIOENCODING": "ascii", "LANG": "C"}
    done = python("-m", "sparseprune", *in_folder(folder, words), *options, env=ascii_alone)
    assert (done.returncode, done.stderr, done.stdout.isascii()) == (0, "", True)
    names = [tensor["name"] for tensor in json.loads(done.stdout)["tensors"]] if options else []
    if words[0] in {"inspect", "compare"}:
        assert ODD_NAME in names if options else "[red]w" in done.stdout or words[0] == "compare"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(folder: Path, words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "sparseprune", *map(str, in_folder(folder, words)), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "m.safetensors", "--require", "2:4"),
        ("compare", "m.safetensors", "m.pruned.safetensors", "--require", "zeroed==0"),
        ("verify", "m.safetensors", "spec.toml"),
        ("verify", "m.safetensors", "--masks", "m.pruned.masks.safetensors"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_a_check_that_fails_does_not_pass_because_nobody_reads_on(
    folder: Path, words: tuple[str, ...], options: tuple[str, ...]
) -> None:
    command = [sys.executable, "-m", "sparseprune", *map(str, in_folder(folder, words)), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read().startswith(b"sparseprune: ")
        assert process.wait() == 1


# What happens to a file while it is read -> what is said of it.
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "written to": (lambda path: os.utime(path, ns=(0, 0)), "it was written to after the run began"),
    "replaced": (lambda path: change(path, "replace"), "another file has taken its place"),
    "cut off": (lambda path: os.truncate(path, path.stat().st_size - 1), "while it was read"),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_file_that_changes_while_it_is_read_is_told_and_nothing_else(
    folder: Path, words: tuple[str, ...], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, told = CHANGES[how]
    usual = TensorReader.read_into
    changed: list[Path] = []

    def read(reader: TensorReader, stored: StoredTensor, *rest: Any) -> None:
        usual(reader, stored, *rest)
        if not changed:
            changed.append(stored.shard.path)
            act(stored.shard.path)

    monkeypatch.setattr(TensorReader, "read_into", read)
    said = run(*in_folder(folder, words), "--jobs", 1, "-q")
    assert (said.code, said.out) == (3, "")
    assert said.err.startswith(f"sparseprune: {changed[0]}: ")
    assert told in said.err
    assert len(said.err.splitlines()) == 1


def test_a_summary_has_the_totals_of_the_table_and_no_line_for_a_tensor(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 8), "b.weight": torch.eye(4)}, tmp_path / "m.safetensors")
    save_file({"a.weight": torch.ones(4, 8), "b.weight": torch.zeros(4, 4)}, tmp_path / "n.safetensors")
    looks = ("inspect", tmp_path / "m.safetensors"), ("inspect", tmp_path / "m.safetensors", "--by", "layer")
    compares = ("compare", tmp_path / "m.safetensors", tmp_path / "n.safetensors")
    for words in (*looks, compares):
        said = silent(*words, "--summary").out
        assert ".weight" not in said
        whole, short = (json.loads(silent(*words, *more, "--json").out) for more in ((), ("--summary",)))
        assert short["totals"] == whole["totals"]
        assert short["tensors"] == []
        valid(json.dumps(short), str(words[0]))
        for form in ("--csv", "--markdown"):
            assert f"--summary and {form} exclude each other" in refused(*words, "--summary", form).err
    assert silent(*looks[0], "--summary").out.splitlines()[:2] == [
        "2 tensors, 48 elements",
        "zeros: 12, sparsity 25.00%",
    ]
    assert silent(*compares, "--summary").out.splitlines()[:2] == [
        "2 tensors in both, 1 of them differ",
        "changed 4, zeroed 4, revived 0, altered 0",
    ]


def test_memory_changes_no_result_of_a_command_that_reads(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 8), "b.weight": torch.eye(4)}, tmp_path / "m.safetensors")
    for words in (("inspect", tmp_path / "m.safetensors"), ("compare", *[tmp_path / "m.safetensors"] * 2)):
        assert silent(*words, "--json", "--memory", "1kB").out == silent(*words, "--json").out
        assert "--memory much: wanted a size" in refused(*words, "--memory", "much").err


def test_compare_shows_tensors_that_are_the_same_when_asked_for_all(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 8)}, tmp_path / "m.safetensors")
    words = ("compare", *[tmp_path / "m.safetensors"] * 2)
    assert "a.weight" not in silent(*words).out
    assert "a.weight" in silent(*words, "-v").out
