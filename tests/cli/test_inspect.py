"""`inspect`: zeros and patterns of any checkpoint, as a table and as JSON."""

import contextlib
import csv
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import loaded, ok, refused, run, silent, valid
from tests.samples import TWO_OF_FOUR, mlp_tensors, write_shards, write_spec


def patterns_by_hand(tensor: torch.Tensor) -> list[str]:
    """Plain loops over every group of M neighbours along the last dimension."""
    found = []
    for kept, group in ((1, 2), (2, 4), (4, 8)):
        if tensor.ndim < 2 or not tensor.numel() or tensor.shape[-1] % group:
            continue
        values = tensor.to(torch.float64).flatten().tolist()
        counts = [sum(value != 0 for value in values[at : at + group]) for at in range(0, len(values), group)]
        if max(counts) <= kept:
            found.append(f"{kept}:{group}")
    tiled = tensor.ndim > 1 and tensor.numel() and not (tensor.shape[-2] % 4 or tensor.shape[-1] % 4)
    if (
        tiled
        and "2:4" in found
        and all(sum(map(bool, column)) <= 2 for column in tensor.to(torch.float64).mT.reshape(-1, 4).tolist())
    ):
        found.append("2:4@both")
    return found


def sparse(shape: tuple[int, ...], pattern: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    numel = torch.Size(shape).numel()
    return torch.tensor((pattern * (numel // len(pattern) + 1))[:numel]).view(shape).to(dtype)


SAMPLES = {
    "one of two": sparse((2, 8), [0, 3]),
    "two of four": sparse((2, 8), [1, 2, 0, 0]),
    "four of eight": sparse((2, 8), [1, 2, 3, 4, 0, 0, 0, 0]),
    "one too many": torch.cat([sparse((2, 8), [1, 2, 0, 0]), torch.tensor([[0, 0, 1, 0, 0, 1, 1, 1.0]])]),
    "tiles": sparse((2, 4, 8), [1, 1, 0, 0] * 4 + [0, 0, 1, 1] * 4),
    "columns too full": sparse((4, 8), [1, 1, 0, 0]),
    "narrow": sparse((4, 6), [1, 0]),
    "three dimensions": sparse((2, 3, 8), [0, 1, 1, 0]),
    "all zero": torch.zeros(2, 8),
    "vector": torch.zeros(8),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 8),
    "negative zero": torch.full((2, 8), -0.0, dtype=torch.bfloat16),
    "NaN": torch.full((2, 8), float("nan")),
    "float8": sparse((2, 8), [0, 0, 2, 1], torch.float8_e4m3fn),
    "int64": sparse((2, 8), [0, 2**62, 0, -5], torch.int64),
    "uint8": sparse((2, 8), [0, 255], torch.uint8),
    "bool": sparse((2, 8), [0, 1], torch.bool),
    "complex": torch.tensor([[0j, 1j, -0.0 + 0j, 0j]]),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(SAMPLES, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_json_agrees_with_plain_loops(checkpoint: Path) -> None:
    document = valid(run("inspect", checkpoint, "--json").out, "inspect")
    facts = {entry["name"]: entry for entry in document["tensors"]}
    assert facts.keys() == SAMPLES.keys()
    for name, tensor in SAMPLES.items():
        fact = facts[name]
        zeros = int((tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) == 0).sum())
        assert (fact["shape"], fact["numel"], fact["zeros"]) == (list(tensor.shape), tensor.numel(), zeros)
        assert fact["sparsity"] == (zeros / tensor.numel() if tensor.numel() else 0)
        if not tensor.is_complex():
            assert fact["patterns"] == patterns_by_hand(tensor), name
    assert facts["complex"]["patterns"] == ["1:2", "2:4"]
    totals = document["totals"]
    assert totals["tensors"] == len(SAMPLES)
    assert totals["pruned"] == sum(entry["zeros"] for entry in facts.values())
    assert totals["patterns"] == {
        pattern: sum(pattern in entry["patterns"] for entry in facts.values())
        for pattern in ("1:2", "2:4", "4:8", "2:4@both")
    }


def test_facts_do_not_depend_on_jobs(checkpoint: Path) -> None:
    alone = run("inspect", checkpoint, "--json", "--jobs", 1).out
    assert run("inspect", checkpoint, "--json", "--jobs", 4).out == alone


def test_elements_of_less_than_a_byte_are_not_counted(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F4", "shape": [2, 8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (entry,) = json.loads(run("inspect", tmp_path / "m.safetensors", "--json").out)["tensors"]
    assert (entry["zeros"], entry["sparsity"], entry["patterns"]) == (None, None, [])
    assert "?" in run("inspect", tmp_path / "m.safetensors").out


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    """Of the first layer the up matrix is 1:2, and of the down matrix three rows and two columns are zero."""
    tensors = mlp_tensors()
    tensors["0.up.weight"][:, ::2] = 0
    tensors["0.down.weight"][:3] = 0
    tensors["0.down.weight"][:, 4:6] = 0
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_table_has_a_line_for_each_tensor_and_the_total(mlp: Path) -> None:
    assert run("inspect", mlp).out.splitlines() == [
        "tensor         dtype  shape  zeros  sparsity  patterns     zero rows  zero columns",
        "0.down.weight  F32    8x16      58    45.31%                       3             2",
        "0.up.bias      F32    16         0     0.00%",
        "0.up.weight    F32    16x8      64    50.00%  1:2 2:4 4:8          0             4",
        "1.down.weight  F32    8x16       0     0.00%                       0             0",
        "1.up.bias      F32    16         0     0.00%",
        "1.up.weight    F32    16x8       0     0.00%                       0             0",
        "norm           F32    8          0     0.00%",
        "total of 7                     122    22.10%                       3             6",
        "satisfied: 1:2 by 1 tensor, 2:4 by 1 tensor, 4:8 by 1 tensor",
    ]


def test_what_all_tensors_lack_has_no_column(tmp_path: Path) -> None:
    save_file({"b": torch.ones(8), "a": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    assert run("inspect", tmp_path / "m.safetensors").out.splitlines() == [
        "tensor      dtype  shape  zeros  sparsity",
        "a           F32    4x4        0     0.00%",
        "b           F32    8          0     0.00%",
        "total of 2                    0     0.00%",
        "satisfied: no pattern by any tensor",
    ]


def test_names_select_and_a_column_orders(mlp: Path) -> None:
    def names(*words: str) -> list[str]:
        document = valid(run("inspect", mlp, "--json", *words).out, "inspect")
        assert document["totals"]["tensors"] == len(document["tensors"])
        return [entry["name"] for entry in document["tensors"]]

    assert names("--match", "0.**", "--match", "norm", "--exclude", "*.*.bias") == [
        "0.down.weight", "0.up.weight", "norm",
    ]  # fmt: skip
    assert names("--match", "**.weight", "--sort", "zeros", "--reverse")[:2] == [
        "0.up.weight",
        "0.down.weight",
    ]
    assert names("--reverse") == names()[::-1]


def test_groups_are_lines_entries_and_rows(mlp: Path) -> None:
    lines = run("inspect", mlp, "--by", "module").out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["*.down", "2"],
        ["*.up", "4"],
        ["norm", "1"],
        ["total", "of"],
    ]
    document = valid(run("inspect", mlp, "--by", "layer", "--sort", "zeros", "--json").out, "inspect")
    assert [group["name"] for group in document["groups"]] == ["1", "norm", "0"]
    assert len(document["tensors"]) == 7
    rows = list(csv.DictReader(io.StringIO(run("inspect", mlp, "--by", "layer", "--csv").out)))
    assert [(row["name"], row["tensors"], row["zeros"]) for row in rows] == [
        ("0", "3", "122"), ("1", "3", "0"), ("norm", "1", "0"),
    ]  # fmt: skip
    markdown = run("inspect", mlp, "--by", "module", "--markdown").out.splitlines()
    assert markdown[2].startswith("| \\*.down ")


def test_csv_has_every_fact_in_full(checkpoint: Path) -> None:
    facts = {
        entry["name"]: entry for entry in json.loads(run("inspect", checkpoint, "--json").out)["tensors"]
    }
    rows = list(csv.DictReader(io.StringIO(run("inspect", checkpoint, "--csv").out)))
    assert [row["name"] for row in rows] == list(facts)
    for row in rows:
        fact = facts[row["name"]]
        assert row["shape"] == "x".join(map(str, fact["shape"]))
        assert row["patterns"].split() == fact["patterns"]
        for key in ("numel", "zeros", "sparsity", "nonfinite", "zero_rows"):
            assert (None if row[key] == "" else float(row[key])) == fact[key]
        for shape in ("4x4", "16x16", "32x32"):
            wanted = fact["zero_blocks"].get(shape, {"zero": "", "of": ""})
            assert [row[f"zero_blocks_{shape}"], row[f"zero_blocks_{shape}_of"]] == [
                str(wanted["zero"]), str(wanted["of"]),
            ]  # fmt: skip


def test_patterns_and_blocks_that_are_asked_for_are_told(mlp: Path) -> None:
    words = (
        "--pattern", "1:8", "--pattern", "2:4@0", "--pattern", "2:4", "--block", "8x1", "--block", "3x16",
    )  # fmt: skip
    document = valid(run("inspect", mlp, "--json", *words).out, "inspect")
    assert list(document["totals"]["patterns"]) == ["1:2", "2:4", "4:8", "2:4@both", "1:8", "2:4@0"]
    down = next(entry for entry in document["tensors"] if entry["name"] == "0.down.weight")
    assert down["zero_blocks"]["8x1"] == {"zero": 2, "of": 16}
    assert down["zero_blocks"]["3x16"] == {"zero": 1, "of": 3}


def test_verdicts_bring_patterns_along_that_are_not_told(tmp_path: Path) -> None:
    weights = {"half": sparse((32, 64), [1, 1, 0, 0], torch.float16), "dense": torch.ones(32, 64).half()}
    filters = sparse((8, 3, 16), [1, 1, 0, 0]).transpose(1, 2).reshape(8, 16, 3, 1).contiguous()
    save_file(weights | {"filters": filters}, tmp_path / "m.safetensors")
    said = ok("inspect", tmp_path / "m.safetensors", "--for", "torch-cutlass,asp", "--json")
    document = valid(said.out, "inspect")
    found = {
        entry["name"]: [entry["runtimes"][name]["eligible"] for name in ("torch-cutlass", "asp")]
        for entry in document["tensors"]
    }
    assert found == {"half": [True, True], "dense": [False, False], "filters": [False, True]}
    assert list(document["totals"]["patterns"]) == ["1:2", "2:4", "4:8", "2:4@both"]
    assert all("@" not in pattern for entry in document["tensors"] for pattern in entry["patterns"])


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    write_shards(tmp_path / "c", {"model-1.safetensors": mlp_tensors()})
    spec = write_spec(
        tmp_path,
        TWO_OF_FOUR.replace("version = 1", "version = 1\n[vars]\nkept = 1").replace(
            "nnz = 2", 'nnz = "kept"'
        ),
    )
    ok("apply", tmp_path / "c", spec, "--set", "kept=2", "-q")
    return tmp_path / "c-pruned"


def test_rules_are_those_of_the_spec_that_was_applied(pruned: Path, tmp_path: Path) -> None:
    document = json.loads(run("inspect", pruned, "--by", "rule", "--json").out)
    assert [(group["name"], group["tensors"], group["patterns"]) for group in document["groups"]] == [
        ("scope.proj", 4, ["2:4", "4:8"]), ("no rule", 3, []),
    ]  # fmt: skip
    other = write_spec(tmp_path, TWO_OF_FOUR.replace("{name}", "up"))
    document = json.loads(run("inspect", pruned, "--by", "rule", "--spec", other, "--json").out)
    assert [group["tensors"] for group in document["groups"]] == [2, 5]


def test_rules_of_a_file_are_those_of_its_report(mlp: Path, tmp_path: Path) -> None:
    ok("apply", mlp, write_spec(tmp_path, TWO_OF_FOUR), "-q")
    lines = run("inspect", tmp_path / "m.pruned.safetensors", "--by", "rule").out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["scope.proj", "4"], ["no", "rule"]]


@pytest.mark.parametrize("text", ["{", "[]", '{"set": 3}'])
def test_a_report_that_cannot_be_used_is_told_or_passed_over(pruned: Path, text: str) -> None:
    (pruned / "sparseprune" / "report.json").write_text(text)
    said = run("inspect", pruned, "--by", "rule")
    if text == '{"set": 3}':
        assert (said.code, said.out.split()[0]) == (0, "rule")
    else:
        assert (said.code, said.out) == (2, "")
        assert said.err.startswith(f"sparseprune: {pruned / 'sparseprune' / 'report.json'}: ")
    (pruned / "sparseprune" / "spec.toml").unlink()
    assert run("inspect", pruned, "--by", "rule").code == 2


def test_a_tree_sums_up_layers_that_are_alike(pruned: Path) -> None:
    assert run("inspect", pruned, "--tree").out.splitlines() == [
        "tensor          tensors  shape  elements  zeros  sparsity  patterns",
        "0..1                  6              544    256    47.06%  2:4 4:8",
        "├─ down.weight        2  8x16        256    128    50.00%  2:4 4:8",
        "└─ up                 4              288    128    44.44%  2:4 4:8",
        "   ├─ bias            2  16           32      0     0.00%",
        "   └─ weight          2  16x8        256    128    50.00%  2:4 4:8",
        "norm                  1  8             8      0     0.00%",
        "total                 7              552    256    46.38%",
        "pruned by sparseprune 0.1.0 with spec.toml from c",
        "satisfied: 2:4 by 4 tensors, 4:8 by 4 tensors",
    ]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--tree", "--json"], "--tree and --json exclude each other; give one of them"),
        (["--csv", "--markdown"], "--csv and --markdown exclude each other; give one of them"),
        (["--tree", "--by", "layer"], "--tree and --by layer exclude each other; give one of them"),
        (["--tensor", "norm"], '--tensor "norm": goes with --plot FILE; to list a tensor alone give --match'),
        (["--window", "0,0"], '--window "0,0": goes with --plot FILE --tensor NAME'),
        (["--spec", "2of4"], "--spec: goes with --by rule or --plot FILE, which have a use for a spec"),
        (["--set", "n=2"], "--set: goes with --by rule or --plot FILE, which have a use for a spec"),
        (["--pattern", "4:2"], "--pattern 4:2: wanted N:M with N less than M"),
        (["--block", "4"], "--block 4: wanted ROWSxCOLUMNS, such as 16x16"),
        (["--for", "cuda"], "--for cuda: no runtime is called"),
        (["--sort", "sparsty"], '--sort sparsty: there is no such column; did you mean "sparsity"?'),
        (["--match", "x"], "--match x: matches none of 7 tensors, such as"),
        (["--exclude", "**"], "--exclude: of 7 tensors none is left; exclude fewer"),
        (["--require", "sparsty>=0.5"], "--require"),
        (["--plot", "out.gif"], "--plot out.gif: "),
        (["--by", "rule"], "{path}: there is no spec and no report beside it that tells which rule reached"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(mlp: Path, words: list[str], text: str) -> None:
    said = refused("inspect", mlp, *words)
    assert said.err.startswith(f"sparseprune: {text.format(path=mlp)}")
    assert said.err.count("\n") == 1


def test_requirements_fail_after_the_result_was_printed(mlp: Path) -> None:
    said = run("inspect", mlp, "--require", "2:4 in *.up.weight", "--require", "zero_rows>0 in 0.**.weight")
    assert said.code == 1
    assert said.out.startswith("tensor ")
    assert [line.split(":")[1].strip() for line in said.err.splitlines()] == ["1.up.weight", "0.up.weight"]
    ok("inspect", mlp, "--require", "2:4 in 0.up.weight")


def test_a_required_pattern_is_looked_for_and_told(mlp: Path) -> None:
    said = run("inspect", mlp, "--match", "0.up.weight", "--require", "4:7@0", "--require", "1:2", "--json")
    assert said.code == 1
    assert list(json.loads(said.out)["totals"]["patterns"]) == ["1:2", "2:4", "4:8", "2:4@both", "4:7@0"]
    assert "0.up.weight" in said.err


def test_a_required_runtime_is_asked(tmp_path: Path) -> None:
    save_file({"w": torch.ones(32, 64).half()}, tmp_path / "m.safetensors")
    said = run("inspect", tmp_path / "m.safetensors", "--require", "torch-cutlass")
    assert said.code == 1
    assert "torch-cutlass: 0 of 1 matrix" in said.out
    assert said.err.startswith("sparseprune: w: ")


@pytest.mark.parametrize("words", [[], ["--tree"], ["--csv"], ["--markdown"], ["--json"], ["--by", "layer"]])
def test_an_empty_checkpoint_has_totals(tmp_path: Path, words: list[str]) -> None:
    save_file({}, tmp_path / "m.safetensors")
    said = silent("inspect", tmp_path / "m.safetensors", *words)
    assert said.out


@pytest.mark.parametrize("words", [[], ["--for", "all"], ["--tree"], ["--by", "module"]])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_table_fits_the_width_that_it_is_given(
    checkpoint: Path, width: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = run("inspect", checkpoint, *words)
    assert max(map(len, said.out.splitlines())) <= width
    assert "\x1b" not in said.out
    assert said.err == ""


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_colour_unless_it_wants_none(checkpoint: Path, no_color: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "COLUMNS"}}
    environment |= {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if no_color else {})
    words = [sys.executable, "-m", "sparseprune", "inspect", str(checkpoint)]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
    with subprocess.Popen(
        words, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, env=environment
    ) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # the end of a terminal is an error on Linux
            while more := os.read(ours, 1 << 16):
                said += more
    os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[1m" in said
    assert (b"31m" in said) is not no_color
    plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", said).decode()
    assert max(map(len, plain.splitlines())) <= 90


@pytest.mark.parametrize("words", [[], ["--json"], ["--for", "all", "--tree"], ["--require", "sparsity>=0"]])
def test_neither_torch_nor_numba_is_loaded(checkpoint: Path, words: list[str]) -> None:
    code, libraries = loaded("inspect", checkpoint, *words)
    assert (code, libraries - {"numpy"}) == (0, set())


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    said = refused("inspect", tmp_path / "absent.safetensors")
    assert said.err == f"sparseprune: {tmp_path / 'absent.safetensors'}: no such file\n"
