"""`apply` and `mask` as a user runs them: files in, files out."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparseprune
from sparseprune.checkpoint.discovery import MARKED
from tests.commands import ok, run, schema, valid
from tests.limits import narrow
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_shards, write_spec

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int8, torch.int16, torch.int32, torch.int64,
]  # fmt: skip


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor, for comparisons that tell -0.0 from 0.0."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def two_of_four(tensor: torch.Tensor) -> torch.Tensor:
    """The mask by plain loops: in each group of four the two largest, the earlier one among equals."""
    keep = torch.zeros(tensor.numel(), dtype=torch.bool)
    magnitudes = [abs(value) for value in tensor.to(torch.float64).flatten().tolist()]
    for first in range(0, len(magnitudes), 4):
        ranked = sorted(range(first, first + 4), key=lambda place: (-magnitudes[place], place))
        keep[ranked[:2]] = True
    return keep.view(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_is_pruned_beside_itself(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: (tensor * 9).to(dtype) for name, tensor in mlp_tensors().items()}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"made": "here"})
    said = ok("apply", tmp_path / "m.safetensors", write_spec(tmp_path, TWO_OF_FOUR))
    assert said.out == f"{tmp_path / 'm.pruned.safetensors'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "m.pruned.masks.safetensors", "m.pruned.report.json", "m.pruned.safetensors", "m.safetensors",
        "spec.toml",
    ]  # fmt: skip
    pruned = load_file(tmp_path / "m.pruned.safetensors")
    masks = sparseprune.load_masks(tmp_path / "m.pruned.masks.safetensors")
    assert masks.keys() == {name for name in tensors if name.endswith("weight")}
    for name, tensor in tensors.items():
        keep = two_of_four(tensor) if name in masks else torch.ones(tensor.shape, dtype=torch.bool)
        assert torch.equal(masks.get(name, keep), keep)
        assert torch.equal(
            bits(pruned[name]).view(keep.numel(), -1)[keep.flatten()],
            bits(tensor).view(keep.numel(), -1)[keep.flatten()],
        )
        assert not bits(pruned[name]).view(keep.numel(), -1)[~keep.flatten()].any()
    with safe_open(tmp_path / "m.pruned.safetensors", framework="pt") as opened:
        assert opened.metadata() == {
            "made": "here",
            "sparseprune.version": sparseprune.__version__,
            "sparseprune.command": "apply",
            "sparseprune.spec": "spec.toml",
            "sparseprune.spec_sha256": hashlib.sha256(TWO_OF_FOUR.encode()).hexdigest(),
        }


def test_the_bytes_outside_the_pruned_tensors_are_the_same(tmp_path: Path) -> None:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    ok("apply", tmp_path / "m.safetensors", write_spec(tmp_path, TWO_OF_FOUR))
    dense = (tmp_path / "m.safetensors").read_bytes()
    pruned = (tmp_path / "m.pruned.safetensors").read_bytes()
    header = 8 + int.from_bytes(dense[:8], "little")
    moved = len(pruned) - len(dense)
    assert moved == 4096  # a page of the file: what the kernel copies keeps its place within one
    entries = json.loads(pruned[8 : header + moved])
    assert list(entries.pop("__metadata__")) == list(MARKED)
    assert entries == json.loads(dense[8:header])
    for name, entry in entries.items():
        begin, end = (header + offset for offset in entry["data_offsets"])
        same = pruned[begin + moved : end + moved] == dense[begin:end]
        assert same == (not name.endswith("weight"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tensors = mlp_tensors()
    return write_shards(
        tmp_path / "ckpt",
        {
            "model-00001-of-00003.safetensors": {
                name: tensor for name, tensor in tensors.items() if "up" in name
            },
            "model-00002-of-00003.safetensors": {"norm": tensors["norm"]},
            "model-00003-of-00003.safetensors": {
                name: tensor for name, tensor in tensors.items() if "down" in name
            },
        },
    )


def test_a_coupling_across_shards_zeroes_channels_in_all_members(tmp_path: Path, sharded: Path) -> None:
    said = ok("apply", sharded, write_spec(tmp_path, CHANNELS))
    output = tmp_path / "ckpt-pruned"
    assert said.out == f"{output}\n"
    first, third = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
    ups, downs = load_file(output / first), load_file(output / third)
    for layer, tensors in ((0, mlp_tensors()), (1, mlp_tensors())):
        up, bias, down = (tensors[f"{layer}.{part}"] for part in ("up.weight", "up.bias", "down.weight"))
        norms = (up.double().square().sum(1) + bias.double().square() + down.double().square().sum(0)).sqrt()
        keep = torch.ones(16, dtype=torch.bool)
        keep[norms.argsort()[:4]] = False
        assert torch.equal(ups[f"{layer}.up.weight"], up * keep[:, None])
        assert torch.equal(ups[f"{layer}.up.bias"], bias * keep)
        assert torch.equal(downs[f"{layer}.down.weight"], down * keep)


def test_a_sharded_directory_keeps_its_form(tmp_path: Path, sharded: Path) -> None:
    ok("apply", sharded, write_spec(tmp_path, CHANNELS))
    output = tmp_path / "ckpt-pruned"
    names = {str(path.relative_to(sharded)) for path in sharded.rglob("*") if path.is_file()}
    added = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()} - names
    assert added == {
        "README.md",
        "sparseprune/masks-00001-of-00002.safetensors",
        "sparseprune/masks-00002-of-00002.safetensors",
        "sparseprune/masks.safetensors.index.json",
        "sparseprune/report.json",
        "sparseprune/spec.toml",
    }
    changed = {"config.json", *(f"model-0000{number}-of-00003.safetensors" for number in (1, 3))}
    for name in names - changed:
        assert (output / name).read_bytes() == (sharded / name).read_bytes()
    assert (output / "sparseprune/spec.toml").read_text() == CHANNELS
    masks = sparseprune.load_masks(output)
    assert {tuple(mask.shape) for mask in masks.values()} == {(16, 8), (16,), (8, 16)}


def test_report_says_what_was_written(tmp_path: Path, sharded: Path) -> None:
    said = run("apply", sharded, write_spec(tmp_path, CHANNELS), "--json", "-q")
    document = valid(said.out, "report")
    assert said.err == ""
    output = tmp_path / "ckpt-pruned"
    assert json.loads((output / "sparseprune/report.json").read_text()) == document
    assert document["input"] == str(sharded)
    assert document["output"] == str(output)
    errors = ("output_error_masked", "output_error", "loss_error_masked", "loss_error", "metric")
    nothing_rebuilt = dict.fromkeys(errors)
    counts = {"tensors": 7, "numel": 552, "covered": 544, "pruned": 136, "sparsity": 136 / 552}
    covered = {"covers": "matrices", "layer_coverage": 1.0, "declared_coverage": 1.0, "uncovered": []}
    assert document["totals"] == counts | nothing_rebuilt | covered
    assert (document["warnings"], document["device"], document["rules"][0]["device"]) == ([], "cpu", "cpu")
    (rule,) = document["rules"]
    assert rule["name"] == "scope.mlp"
    assert (rule["instances"], rule["tensors"], rule["scopes"]) == (2, 6, 2)
    assert (rule["blocks_per_scope"], rule["nnz"], rule["sparsity_asked"]) == (16, 12, 0.25)
    written = load_file(output / "model-00001-of-00003.safetensors")
    dense = mlp_tensors()
    for entry in document["tensors"]:
        if entry["name"] in written:
            tensor = written[entry["name"]].double()
            assert entry["zeros_after"] == int((tensor == 0).sum()) == entry["pruned"]
            kept = float(tensor.square().sum() / dense[entry["name"]].double().square().sum())
            assert entry["energy_kept"] == pytest.approx(kept)
            assert entry["zeros_before"] == 0


@pytest.mark.parametrize("command", ["apply", "mask"])
def test_packed_masks_say_the_same_as_bool_ones(tmp_path: Path, command: str, sharded: Path) -> None:
    spec = write_spec(tmp_path, CHANNELS)
    for form in ("bool", "packed"):
        ok(command, sharded, spec, "--mask-format", form, "-o", tmp_path / form)
    plain, packed = sparseprune.load_masks(tmp_path / "bool"), sparseprune.load_masks(tmp_path / "packed")
    assert plain.keys() == packed.keys()
    assert all(torch.equal(plain[name], packed[name]) for name in plain)
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / form).rglob("masks-*")) for form in ("bool", "packed")
    ]
    assert sizes[1] < sizes[0]


def test_no_masks_writes_none(tmp_path: Path, sharded: Path) -> None:
    ok("apply", sharded, write_spec(tmp_path, CHANNELS), "--no-masks")
    assert sorted(path.name for path in (tmp_path / "ckpt-pruned/sparseprune").iterdir()) == [
        "report.json",
        "spec.toml",
    ]


def test_mask_writes_masks_alone_and_they_are_those_of_apply(tmp_path: Path, sharded: Path) -> None:
    spec = write_spec(tmp_path, CHANNELS)
    said = run("mask", sharded, spec)
    assert (said.code, said.out) == (0, f"{tmp_path / 'ckpt-masks'}\n")
    assert sorted(path.name for path in (tmp_path / "ckpt-masks").iterdir()) == [
        "masks-00001-of-00002.safetensors", "masks-00002-of-00002.safetensors",
        "masks.safetensors.index.json", "report.json", "spec.toml",
    ]  # fmt: skip
    ok("apply", sharded, spec)
    alone, beside = (
        sparseprune.load_masks(tmp_path / "ckpt-masks"),
        sparseprune.load_masks(tmp_path / "ckpt-pruned"),
    )
    assert all(torch.equal(alone[name], beside[name]) for name in beside)


def test_mask_of_a_file_lies_beside_it(tmp_path: Path) -> None:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    ok("mask", tmp_path / "m.safetensors", write_spec(tmp_path, TWO_OF_FOUR))
    assert {path.name for path in tmp_path.iterdir()} >= {"m.masks.safetensors", "m.masks.report.json"}
    assert not (tmp_path / "m.pruned.safetensors").exists()


@pytest.mark.parametrize("threshold", [0.0, 0.5, 100.0])
def test_threshold_keeps_what_reaches_it(tmp_path: Path, threshold: float) -> None:
    tensors = mlp_tensors()
    save_file(tensors, tmp_path / "m.safetensors")
    spec = TWO_OF_FOUR.replace("nnz = 2", f"threshold = {threshold}")
    ok("apply", tmp_path / "m.safetensors", write_spec(tmp_path, spec))
    pruned = load_file(tmp_path / "m.pruned.safetensors")
    for name in ("0.up.weight", "1.down.weight"):
        kept = torch.where(tensors[name].abs() >= threshold, tensors[name], 0.0)
        assert torch.equal(pruned[name], kept)


def test_global_budget_takes_from_each_tensor_what_it_must(tmp_path: Path) -> None:
    tensors = {
        "0.big.weight": torch.full((4, 8), 2.0),
        "1.small.weight": torch.ones(4, 8),
        "norm": torch.ones(3),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    spec = """
version = 1
scope.all = { tensors = "{layer}.{name}.weight", block = [1, 1], shape = [-1, -1] }
scope_coupling.model = { scopes = ["all"], across = "all", sparsity = 0.75 }
"""
    ok("apply", tmp_path / "m.safetensors", write_spec(tmp_path, spec))
    pruned = load_file(tmp_path / "m.pruned.safetensors")
    assert int(pruned["0.big.weight"].count_nonzero()) == 16
    assert pruned["0.big.weight"].flatten()[:16].all()  # among equals the lower index is kept
    assert not pruned["1.small.weight"].any()


def test_output_is_the_same_whatever_the_jobs_and_slabs(
    tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    ok("apply", sharded, spec, "--jobs", 1, "-o", tmp_path / "one")
    narrow(monkeypatch, 64, tile=64)
    ok("apply", sharded, spec, "--jobs", 4, "-o", tmp_path / "four")
    for path in (tmp_path / "one").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "four" / path.relative_to(tmp_path / "one")).read_bytes()


def test_force_replaces_an_output(tmp_path: Path, sharded: Path) -> None:
    spec = write_spec(tmp_path, CHANNELS)
    ok("apply", sharded, spec)
    (tmp_path / "ckpt-pruned/left-over").touch()
    ok("apply", sharded, spec, "--force", "--no-masks")
    assert not (tmp_path / "ckpt-pruned/left-over").exists()


def test_summary_on_stderr_counts_rules_and_elements(tmp_path: Path, sharded: Path) -> None:
    said = run("apply", sharded, write_spec(tmp_path, CHANNELS), "--device", "cpu")
    lines = said.err.splitlines()
    assert lines[0].split() == "rule tensors scopes kept in each elements pruned of all".split()
    assert lines[1].split() == "scope.mlp 6 2 12 of 16 544 136 24.64%".split()
    assert lines[2] == "pruned 136 of 552 parameters (24.64%)"
    assert lines[3] == "left alone 1 of 7 tensors, 8 parameters"
    assert lines[4] == "reached 100.00% of the layers' matrices"
    assert lines[5].startswith("weights ")
    assert lines[5].endswith("before and after (zeros do not shrink a file), masks 68 B")
    assert lines[6].startswith("faster: in no runtime as these zeros lie; zeros run dense in vllm")
    assert lines[7].endswith("/s, on cpu")


def test_verbose_tells_about_every_tensor(tmp_path: Path, sharded: Path) -> None:
    said = run("apply", sharded, write_spec(tmp_path, CHANNELS), "-v")
    assert [line.split()[0] for line in said.err.splitlines()[1:7]] == [
        "0.up.bias", "0.up.weight", "1.up.bias", "1.up.weight", "0.down.weight", "1.down.weight",
    ]  # fmt: skip


def test_what_was_set_stands_in_the_report_and_above_the_spec(tmp_path: Path, sharded: Path) -> None:
    spec = "[vars]\nshare = 0.25\n".join(["version = 1\n", CHANNELS.replace("version = 1", "")])
    spec = spec.replace("sparsity = 0.25", 'sparsity = "share"')
    said = ok("apply", sharded, write_spec(tmp_path, spec), "--set", "share=0.5", "--json", "-q")
    document = valid(said.out, "report")
    assert document["set"] == {"share": "0.5"}
    assert document["rules"][0]["nnz"] == 8
    applied = (tmp_path / "ckpt-pruned/sparseprune/spec.toml").read_text()
    assert applied == f"# Applied with --set share=0.5\n{spec}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_gives_the_bytes_of_the_cpu(tmp_path: Path, sharded: Path) -> None:
    for name, spec in (("elements", TWO_OF_FOUR), ("channels", CHANNELS)):
        path = write_spec(tmp_path, spec)
        for device in ("cpu", "cuda"):
            ok("apply", sharded, path, "--device", device, "-o", tmp_path / f"{name}-{device}")
        for file in (tmp_path / f"{name}-cpu").rglob("*.safetensors"):
            twin = tmp_path / f"{name}-cuda" / file.relative_to(tmp_path / f"{name}-cpu")
            assert file.read_bytes() == twin.read_bytes()


HALVES = """
version = 1
scope.upper = { tensors = "w", slice = ["0:4", ":"], block = [1, -1], shape = [-1], nnz = 1 }
scope.lower = { tensors = "w", slice = ["4:8", ":"], block = [1, -1], shape = [-1], nnz = 3 }
"""


def test_rules_on_disjoint_parts_of_one_tensor_share_its_mask_and_are_counted_apart(tmp_path: Path) -> None:
    tensor = torch.arange(1.0, 33.0).view(8, 4)
    save_file({"w": tensor}, tmp_path / "m.safetensors")
    said = ok("apply", tmp_path / "m.safetensors", write_spec(tmp_path, HALVES), "--json", "-q")
    keep = torch.tensor([False, False, False, True, False, True, True, True])[:, None].expand(8, 4)
    assert torch.equal(load_file(tmp_path / "m.pruned.safetensors")["w"], tensor * keep)
    assert torch.equal(sparseprune.load_masks(tmp_path / "m.pruned.masks.safetensors")["w"], keep)
    document = json.loads(said.out)
    assert [(rule["name"], rule["numel"], rule["pruned"]) for rule in document["rules"]] == [
        ("scope.upper", 16, 12),
        ("scope.lower", 16, 4),
    ]
    assert document["totals"]["pruned"] == document["tensors"][0]["pruned"] == 16


def test_report_is_the_same_however_the_work_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    documents = []
    for limit in (1 << 20, 64):
        narrow(monkeypatch, limit, tile=limit)
        documents.append(json.loads(run("apply", tmp_path / "m.safetensors", spec, "--json", "--force").out))
    assert documents[0]["rules"] == documents[1]["rules"]
    assert documents[0]["rules"][0]["pruned"] == 256
    for whole, cut in zip(documents[0]["tensors"], documents[1]["tensors"], strict=True):
        assert cut | {"energy_kept": 0} == whole | {"energy_kept": 0}
        assert cut["energy_kept"] == pytest.approx(whole["energy_kept"])


def test_energy_that_is_not_finite_is_null(tmp_path: Path) -> None:
    tensor = torch.ones(4, 8)
    tensor[0, 0] = float("inf")
    save_file({"0.a.weight": tensor}, tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, TWO_OF_FOUR + 'score = { nonfinite = "prune" }')
    said = run("apply", tmp_path / "m.safetensors", spec, "--json", "-q")
    document = json.loads(said.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    schema("report").validate(document)
    assert document["tensors"][0]["energy_kept"] is None
