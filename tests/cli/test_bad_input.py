"""Wrong use and broken machines: one clear line, the right exit code, no output, nothing lost."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.errors import MachineError
from tests.checkpoint.files import content
from tests.commands import ok, python, refused, run
from tests.faults import failing
from tests.limits import narrow
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_spec

Damage = "Callable[[Path], object]"


def spec_without(old: str, new: str, spec: str = TWO_OF_FOUR) -> Callable[[Path], object]:
    return lambda folder: write_spec(folder, spec.replace(old, new))


def with_tensors(**tensors: torch.Tensor) -> Callable[[Path], object]:
    return lambda folder: save_file(
        {name.replace("_", "."): tensor for name, tensor in tensors.items()}, folder / "m.safetensors"
    )


def nan_at(shape: tuple[int, ...], place: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.ones(shape)
    tensor[place] = float("nan")
    return tensor


# What is broken -> what the line on stderr must say. Without the damage the same command succeeds.
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such file": (lambda folder: (folder / "m.safetensors").unlink(), "m.safetensors: no such file"),
    "not safetensors": (lambda folder: (folder / "m.safetensors").write_bytes(b"PK\x03\x04" + bytes(60)),
        "m.safetensors"),
    "truncated": (
        lambda folder: (folder / "m.safetensors").write_bytes((folder / "m.safetensors").read_bytes()[:-5]),
        "bytes",
    ),
    "no such spec": (lambda folder: (folder / "spec.toml").unlink(), "neither a file nor a spec"),
    "not TOML": (spec_without("[scope.proj]", "[scope.proj"), "spec.toml: this is not TOML: "),
    "unknown key": (spec_without("shape", "shap"), '[scope.proj] shap: unknown key; did you mean "shape"?'),
    "unknown table": (spec_without("[scope.proj]", "[scop.proj]"),
        '[scop]: unknown table; did you mean "scope"?'),
    "pattern without a match": (spec_without(".weight", ".weights"), "no tensor matches"),
    "shape that does not divide": (spec_without("[1, 4]", "[1, 3]"), "is not a multiple of 3"),
    "shape of wrong rank": (spec_without("[1, 1]", "[1, 1, 1]"), "has 3 dimensions"),
    "nnz out of range": (spec_without("nnz = 2", "nnz = 5"), "[scope.proj] nnz"),
    "sparsity out of range": (spec_without("nnz = 2", "sparsity = 1.5"), "[scope.proj] sparsity"),
    "two budgets": (spec_without("nnz = 2", "nnz = 2\nsparsity = 0.5"), "[scope.proj]"),
    "no budget": (spec_without("nnz = 2", ""), "[scope.proj]"),
    "unknown block": (spec_without('"down"]', '"dwn"]', CHANNELS),
        'there is no [block.dwn]; did you mean "down"?'),
    "NaN in a pruned tensor": (with_tensors(a_b_weight=nan_at((4, 8), (2, 5))), "a.b.weight: NaN at [2, 5]"),
    "unsigned integers": (with_tensors(a_b_weight=torch.ones(4, 8, dtype=torch.uint8)), "U8"),
    "existing output": (lambda folder: (folder / "m.pruned.safetensors").write_bytes(b"precious"),
        "m.pruned.safetensors"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    write_spec(tmp_path, TWO_OF_FOUR)
    return tmp_path


@pytest.mark.parametrize("command", ["apply", "mask"])
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(folder: Path, command: str, name: str) -> None:
    damage, text = CASES[name]
    damage(folder)
    if name == "existing output" and command == "mask":
        (folder / "m.pruned.safetensors").rename(folder / "m.masks.safetensors")
        text = "m.masks.safetensors"
    before = content(folder)
    said = refused(command, folder / "m.safetensors", folder / "spec.toml")
    assert text in said.err
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("sparseprune: ")
    assert content(folder) == before


def test_the_undamaged_neighbour_of_every_case_succeeds(folder: Path) -> None:
    ok("apply", folder / "m.safetensors", folder / "spec.toml")
    ok("mask", folder / "m.safetensors", folder / "spec.toml")


def test_every_problem_of_a_spec_is_told_at_once(folder: Path) -> None:
    spec = write_spec(folder, TWO_OF_FOUR.replace("shape", "shap").replace("nnz", "nzn"))
    said = refused("apply", folder / "m.safetensors", spec)
    assert len(said.err.splitlines()) >= 2
    assert "[scope.proj] shap: unknown key" in said.err
    assert "[scope.proj] nzn: unknown key" in said.err


def test_nan_place_counts_from_the_whole_tensor_also_in_a_later_slab(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch, 256, tile=256)
    save_file({"a.b.weight": nan_at((64, 8), (41, 3))}, folder / "m.safetensors")
    said = run("apply", folder / "m.safetensors", folder / "spec.toml")
    assert "a.b.weight: NaN at [41, 3]" in said.err


def test_output_equal_to_the_input_is_refused_even_with_force(folder: Path) -> None:
    before = content(folder)
    path = folder / "m.safetensors"
    said = refused("apply", path, folder / "spec.toml", "-o", path, "--force")
    assert "input" in said.err
    assert content(folder) == before


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("gpu", "wanted auto, cpu, cuda or cuda:N"),
        ("cuda:x", "wanted auto, cpu, cuda or cuda:N"),
        ("cuda:99", "--device cuda:99: there is "),
    ],
)
def test_device_that_is_not_there_is_a_clear_error(folder: Path, device: str, text: str) -> None:
    before = content(folder)
    said = refused("apply", folder / "m.safetensors", folder / "spec.toml", "--device", device)
    assert text in said.err
    assert content(folder) == before


def test_force_keeps_the_old_output_when_the_new_one_fails(folder: Path) -> None:
    (folder / "m.pruned.safetensors").write_bytes(b"precious")
    save_file({"a.b.weight": nan_at((4, 8), (0, 0))}, folder / "m.safetensors")
    assert run("apply", folder / "m.safetensors", folder / "spec.toml", "--force").code == 2
    assert (folder / "m.pruned.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MachineError("disk: no space left"), 3, "sparseprune: disk: no space left\n"),
        (
            OSError(5, "Input/output error", "m.safetensors"),
            3,
            "sparseprune: m.safetensors: Input/output error\n",
        ),
        (KeyboardInterrupt(), 130, "sparseprune: interrupted"),
    ],
    ids=["machine", "OS", "interrupt"],
)
def test_a_failure_while_writing_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("sparseprune.checkpoint.StagedOutput.write_mask", fail)
    before = content(folder)
    # With one thread nothing is copied, and so noted for a run that continues, before a mask fails.
    said = run("apply", folder / "m.safetensors", folder / "spec.toml", "--jobs", "1")
    assert (said.code, said.out) == (code, "")
    assert said.err.startswith(text)
    assert content(folder) == before


def test_a_bug_keeps_its_traceback_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("sparseprune.checkpoint.StagedOutput.write_mask", failing(ZeroDivisionError))
    before = content(folder)
    with pytest.raises(ZeroDivisionError):
        run("apply", folder / "m.safetensors", folder / "spec.toml")
    assert content(folder) == before


def test_debug_shows_the_traceback_and_changes_no_exit_code(folder: Path) -> None:
    words = ("-m", "sparseprune", "apply", folder / "absent.safetensors", folder / "spec.toml")
    plain, debug = python(*words), python(*words, "--debug")
    assert plain.returncode == debug.returncode == 2
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize("words", [["apply"], ["apply", "x", "y", "--no-such"], ["prune"], ["inspect"]])
def test_wrong_use_is_exit_code_2(words: list[str]) -> None:
    said = refused(*words)
    assert said.err


def test_nan_place_counts_from_the_whole_tensor_also_in_a_slice(folder: Path) -> None:
    save_file({"w": nan_at((8, 4), (6, 1))}, folder / "m.safetensors")
    spec = """
version = 1
block.upper = { tensors = "w", slice = ["0:4", ":"], shape = [1, -1] }
block.lower = { tensors = "w", slice = ["4:8", ":"], shape = [1, -1] }
block_coupling.pair = { blocks = ["upper", "lower"] }
scope.pairs = { block = "pair", shape = [-1], nnz = 2 }
"""
    said = run("apply", folder / "m.safetensors", write_spec(folder, spec))
    assert "w: NaN at [6, 1]" in said.err
    save_file({"w": torch.ones(8, 4)}, folder / "m.safetensors")
    ok("apply", folder / "m.safetensors", write_spec(folder, spec))


def test_a_folder_that_is_gone_is_named_where_a_relative_path_needs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    (folder / "gone").rmdir()
    said = run("apply", folder / "m.safetensors", folder / "spec.toml", "-o", "out.safetensors")
    assert (said.code, said.out) == (3, "")
    assert said.err == "sparseprune: the folder that this runs in is gone; change to one that exists\n"
    ok("apply", folder / "m.safetensors", folder / "spec.toml", "-q")
