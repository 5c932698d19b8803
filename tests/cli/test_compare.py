"""`compare` as it is typed: what stands on stdout in each form, what is refused, what the exit code is."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from safetensors.torch import load_file, save_file

from sparseprune.checkpoint import lay_out
from tests.commands import loaded, ok, refused, run, silent, valid
from tests.samples import TWO_OF_FOUR, mlp_tensors, write_shards, write_spec

ODD_NAME = "[red]a\n\N{CJK UNIFIED IDEOGRAPH-5BBD}.weight"


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tensors = mlp_tensors(1) | {
        "gone": torch.zeros(2, 3),
        "other": torch.ones(4, 2),
        ODD_NAME: torch.ones(2, 2),
    }
    return saved(tmp_path / "dense.safetensors", tensors)


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """Half of one matrix zeroed; of another one a zero, a survivor that is altered, one that is infinite."""
    tensors = mlp_tensors(1) | {
        "new": torch.zeros(3),
        "other": torch.ones(8),
        ODD_NAME: torch.ones(2, 2).half(),
    }
    tensors["0.up.weight"][:, ::2] = 0
    tensors["0.down.weight"][0, 3] = 0
    tensors["0.down.weight"][2, 5] += 1
    tensors["norm"][4] = torch.inf
    return saved(tmp_path / "pruned.safetensors", tensors)


def words_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def document_of(*words: object) -> dict[str, Any]:
    document: dict[str, Any] = valid(run("compare", *words, "--json").out, "compare")
    return document


def test_nothing_in_common_is_said_and_no_sparsity(tmp_path: Path) -> None:
    one = saved(tmp_path / "one.safetensors", {"a": torch.zeros(2), "b": torch.ones(2)})
    other = saved(tmp_path / "other.safetensors", {"b": torch.ones(3)})
    said = silent("compare", one, other)
    assert said.out.splitlines() == [
        "nothing to compare: no tensor has its name and shape in both",
        "reshaped: 1 tensor",
        "  b: 2 to 3",
        "removed: 1 tensor",
        "  a: F32 2",
    ]


def test_unrelated_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    one = saved(tmp_path / "one.safetensors", {"a": torch.zeros(2), "b": torch.ones(2)})
    other = saved(tmp_path / "other.safetensors", {"x": torch.ones(3)})
    said = refused("compare", one, other)
    assert said.err == (
        f'sparseprune: {one} and {other} have no tensor in common: the first names are "a" and "x"; compare '
        "checkpoints of one model\n"
    )


def test_few_tensors_in_common_are_warned_of(tmp_path: Path) -> None:
    names = [f"{number}.weight" for number in range(5)]
    one = saved(tmp_path / "one.safetensors", {name: torch.ones(2) for name in names})
    other = saved(tmp_path / "other.safetensors", {f"x.{name}": torch.ones(2) for name in names[1:]})
    tensors = load_file(other) | {names[0]: torch.ones(2)}
    saved(other, tensors)
    said = ok("compare", one, other)
    assert f"warning: only 1 of 5 tensors have their names in both {one} and {other}: are these" in said.err
    assert "no tensor that is in both differs" in said.out
    whole = saved(tmp_path / "whole.safetensors", tensors | load_file(one))
    assert ok("compare", one, whole).err == ""  # a part of it is all of the other


def test_table_tells_what_changed_and_what_is_odd(dense: Path, pruned: Path) -> None:
    said = silent("compare", dense, pruned)
    lines = words_of(said.out)
    document = document_of(dense, pruned)
    entries = {entry["name"]: entry for entry in document["tensors"]}
    kept = f"{entries['0.up.weight']['energy_kept']:.2%}"
    error = f"{entries['0.up.weight']['relative_error']:.2%}"
    largest = f"{entries['0.up.weight']['largest_change']:#.4g}"
    down = entries["0.down.weight"]
    titles = "tensor dtype shape changed zeroed altered sparsity energy kept relative error largest change"
    assert lines[0] == titles.split()
    assert lines[1][:7] == ["0.down.weight", "F32", "8x16", "2", "1", "1", "0.78%"]
    assert lines[2] == ["0.up.weight", "F32", "16x8", "64", "64", "0", "50.00%", kept, error, largest]
    assert lines[3] == ["norm", "F32", "8", "1", "0", "1", "0.00%", "100.00%", "?", "not", "finite"]
    assert lines[4] == [
        "total",
        "of",
        "5",
        "67",
        "65",
        "2",
        "22.89%",
        f"{document['totals']['energy_kept']:.2%}",
        "?",
    ]
    assert lines[5:] == words_of(
        "unchanged: 2 tensors, 20 elements\n"
        "sparsity: 0.00% before, 22.89% after\n"
        "survivors altered: 2, in 2 tensors\n"
        "0.down.weight: first at [2, 5]\n"
        "norm: first at [4]\n"
        "NaN or infinity came or went: 1 tensor\n"
        "norm: first at [4]\n"
        "other dtype, values compared: 1 tensor\n"
        "[red]a\\n\N{CJK UNIFIED IDEOGRAPH-5BBD}.weight: F32 to F16\n"
        "reshaped: 1 tensor\n"
        "other: 4x2 to 8\n"
        "added: 1 tensor\n"
        "new: F32 3\n"
        "removed: 1 tensor\n"
        "gone: F32 2x3\n"
    )
    assert down["first_altered"] == [2, 5]


def test_an_output_of_apply_has_no_altered_survivor(tmp_path: Path) -> None:
    tensors = mlp_tensors(2, torch.bfloat16)
    shards = {"a.safetensors": {"norm": tensors.pop("norm")}, "b.safetensors": tensors}
    folder = write_shards(tmp_path / "m", shards)
    ok("apply", folder, write_spec(tmp_path, TWO_OF_FOUR), "-o", tmp_path / "out", "-q")
    report = json.loads((tmp_path / "out" / "sparseprune" / "report.json").read_text())
    said = ok("compare", folder, tmp_path / "out", "--require", "altered==0", "--require", "revived==0")
    assert said.out.splitlines()[-1] == "survivors altered: none"
    entries = {entry["name"]: entry for entry in document_of(folder, tmp_path / "out")["tensors"]}
    for told in report["tensors"]:
        entry = entries[told["name"]]
        assert entry["energy_kept"] == pytest.approx(told["energy_kept"], rel=1e-14)
        assert (entry["zeros_before"], entry["zeros_after"]) == (told["zeros_before"], told["zeros_after"])


def test_a_checkpoint_does_not_differ_from_itself_or_its_other_shards(tmp_path: Path) -> None:
    tensors = mlp_tensors(1)
    file = saved(tmp_path / "m.safetensors", tensors)
    last = {"0.up.weight": tensors.pop("0.up.weight")}
    folder = write_shards(tmp_path / "m", {"b.safetensors": last, "a.safetensors": tensors})
    for one, other in ((file, file), (file, folder), (folder, file)):
        said = ok("compare", one, other)
        assert said.out.splitlines() == [
            "unchanged: 4 tensors, 280 elements",
            "sparsity: 0.00% before, 0.00% after",
            "nothing differs",
        ]


def test_csv_and_markdown_have_the_rows_of_the_table(dense: Path, pruned: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run("compare", dense, pruned, "--csv").out)))
    entries = document_of(dense, pruned)["tensors"]
    assert [row["name"] for row in rows] == [entry["name"] for entry in entries]
    for row, entry in zip(rows, entries, strict=True):
        assert row["shape"] == "x".join(map(str, entry["shape"]))
        for field in ("changed", "energy_kept", "largest_change"):
            assert row[field] == ("" if entry[field] is None else str(entry[field]))
    lines = run("compare", dense, pruned, "--markdown").out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == [
        *("tensor", lines[1].split("|")[1]),
        *("0.down.weight", "0.up.weight", "norm", "**total of 5**"),
    ]


def test_tensors_that_are_named_are_told_also_where_they_did_not_change(dense: Path, pruned: Path) -> None:
    said = run("compare", dense, pruned, "--match", "0.up.*", "--exclude", "gone", "--sort", "numel")
    assert [line[0] for line in words_of(said.out)] == [
        "tensor", "0.up.bias", "0.up.weight", "total", "sparsity:", "survivors",
    ]  # fmt: skip
    document = document_of(dense, pruned, "--match", "0.up.*")
    assert (document["totals"]["tensors"], document["added"], document["removed"]) == (2, [], [])
    document = document_of(dense, pruned, "--match", "gone", "--match", "new")
    assert [len(document[key]) for key in ("tensors", "added", "removed", "reshaped")] == [0, 1, 1, 0]


def test_rows_are_in_the_order_that_was_asked_for(dense: Path, pruned: Path) -> None:
    names = [
        entry["name"] for entry in document_of(dense, pruned, "--sort", "altered", "--reverse")["tensors"]
    ]
    assert names[:2] == ["0.down.weight", "norm"]
    names = [entry["name"] for entry in document_of(dense, pruned, "--sort", "energy-kept")["tensors"]]
    assert names[0] == "0.up.weight"
    assert names[-1] == "norm"


def test_a_tensor_that_is_gone_or_reshaped_fails_what_is_required_of_it(dense: Path, pruned: Path) -> None:
    said = run("compare", dense, pruned, "--require", "zeroed>=0 in gone, other, norm", "-q")
    assert said.code == 1
    assert said.err.splitlines() == [
        "sparseprune: gone: wanted zeroed>=0, is not in PRUNED",
        "sparseprune: other: wanted zeroed>=0, was 4x2, is 8 in PRUNED",
    ]
    everywhere = run("compare", dense, pruned, "--require", "zeroed>=0", "-q")
    assert everywhere.err == said.err


def test_a_requirement_that_fails_is_told_with_its_tensor_after_the_result(dense: Path, pruned: Path) -> None:
    said = run(
        "compare", dense, pruned, "--json", "--require", "altered==0", "--require", "zeroed<=64 in 0.up.*"
    )
    assert said.code == 1
    assert said.err.splitlines() == [
        "sparseprune: 0.down.weight: wanted altered==0, found 1",
        "sparseprune: norm: wanted altered==0, found 1",
        "sparseprune: gone: wanted altered==0, is not in PRUNED",
        "sparseprune: other: wanted altered==0, was 4x2, is 8 in PRUNED",
    ]
    valid(said.out, "compare")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--require", "altred==0"],
         '--require "altred==0": there is no field "altred"; did you mean "altered"?'),
        (["--require", "altered==0 in 9.*"], '--require "altered==0 in 9.*": no tensor matches "9.*"'),
        (["--require", "2:4"], '--require "2:4": N:M patterns are not looked for here'),
        (["--sort", "energie_kept"],
         '--sort energie_kept: there is no such column; did you mean "energy_kept"?'),
        (["--match", "nothing"], "--match nothing: matches none of 8 tensors"),
        (["--csv", "--json"], "--json and --csv exclude each other"),
        (["--plot", "a.gif"], "--plot a.gif: ends in .gif; wanted .png, .svg, .pdf or .html"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused_before_anything_is_read(
    dense: Path, pruned: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseprune.execution.compare.compare_checkpoints", None)
    said = refused("compare", dense, pruned, *words)
    assert said.err.startswith(f"sparseprune: {message}")


@pytest.mark.parametrize("absent", [0, 1])
def test_a_checkpoint_that_is_not_there_is_named(dense: Path, tmp_path: Path, absent: int) -> None:
    paths = [dense, dense]
    paths[absent] = tmp_path / "absent.safetensors"
    said = refused("compare", *paths)
    assert said.err == f"sparseprune: {tmp_path / 'absent.safetensors'}: no such file\n"


def test_elements_of_less_than_a_byte_are_compared_as_bytes(tmp_path: Path) -> None:
    names = [("same", "F4", (2, 8)), ("differs", "F4", (2, 8)), ("cast", "F4", (2, 8))]
    header = lay_out(names, {})
    one = tmp_path / "one.safetensors"
    one.write_bytes(header.raw + bytes(24))
    names[2] = ("cast", "U8", (2, 8))
    other = tmp_path / "other.safetensors"
    other.write_bytes(lay_out(names, {}).raw + bytes(15) + b"\1" + bytes(16))
    entries = {entry["name"]: entry for entry in document_of(one, other)["tensors"]}
    assert [entries[name]["differs"] for name in ("same", "differs", "cast")] == [False, True, None]
    assert [entries[name]["changed"] for name in ("same", "differs", "cast")] == [0, None, None]
    lines = words_of(run("compare", one, other).out)
    assert ["differs,", "bytes", "compared:", "1", "tensor"] in [["differs,", *line[1:]] for line in lines]
    assert ["not", "compared:", "1", "tensor"] in lines
    assert run("compare", one, other, "--require", "altered==0").code == 1


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_table_fits_the_width_that_it_is_given(
    dense: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = run("compare", dense, pruned)
    assert max(map(cell_len, said.out.splitlines())) <= width
    assert "\x1b" not in said.out
    assert (said.code, said.err) == (0, "")
    assert "0.down.weight" in said.out


@pytest.mark.parametrize("words", [[], ["--json"], ["--require", "altered<=1 in norm"]])
def test_neither_torch_nor_numba_is_loaded_once_the_loops_are_kept(
    dense: Path, pruned: Path, words: list[str]
) -> None:
    ok("compare", dense, pruned)
    code, libraries = loaded("compare", dense, pruned, *words)
    assert (code, libraries - {"numpy"}) == (0, set())


@pytest.mark.parametrize("form", ["svg", "html"])
def test_a_picture_is_drawn_of_what_was_found(dense: Path, pruned: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / f"drawn.{form}"
    ok("compare", dense, pruned, "--plot", path)
    assert "energy kept beyond" in path.read_text().lower()
