"""`remove`: what is left is the dense tensors at the indices that survive, by every way."""

import json
import pickle
import re
import shutil
import tracemalloc
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from sparseprune import load_masks
from sparseprune.checkpoint import TensorReader, open_masks
from sparseprune.checkpoint.publish import StagingDir
from sparseprune.execution import regions, schedule
from sparseprune.execution.block_norms import ReduceBlocks
from sparseprune.removal.shrink import CutTensor
from sparseprune.removal.slices import ReadSlices, read_slices
from tests.checkpoint.files import content, names_in
from tests.cli.removal import (
    CASES,
    DTYPES,
    HIDDEN,
    LLAMA,
    VOCABULARY,
    WIDTH,
    Draw,
    as_bytes,
    decoder,
    expected,
    read,
    removed,
    weights,
    write,
)
from tests.cli.test_scarcity import thread_limit
from tests.commands import ok, run
from tests.engine.reconstruction.oracle import moments
from tests.samples import config_of, write_spec


@pytest.mark.parametrize(
    ("name", "dtype", "shards"),
    [
        *(("channels", dtype, shards) for dtype, shards in (("F64", 1), ("F32", 2), ("F16", 3))),
        *((name, "BF16", 3) for name in CASES),
        *((name, "F8_E4M3", 1) for name in CASES),
    ],
)
def test_what_is_left_is_the_dense_tensors_at_the_indices_that_survive(
    tmp_path: Path, name: str, dtype: str, shards: int
) -> None:
    case = CASES[name]
    dense = case.tensors(DTYPES[dtype])
    source = write(tmp_path / "in", dense, case.config, shards)
    before = content(source)
    ok("apply", source, case.spec, *case.options, "-o", tmp_path / "zeros", "-q")
    said = removed(source, case.spec, *case.options, "-o", tmp_path / "out", "-q")
    assert (said.out, said.err) == (f"{tmp_path / 'out'}\n", "")
    found, wanted = read(tmp_path / "out"), expected(dense, load_masks(tmp_path / "zeros"))
    assert {key: as_bytes(each) for key, each in found.items()} == {
        key: as_bytes(each) for key, each in wanted.items()
    }
    assert sum(each.numel() for each in found.values()) < sum(each.numel() for each in dense.values())
    config = config_of(tmp_path / "out")
    assert config == {**case.config, **case.changes}
    assert list(config)[: len(case.config)] == list(case.config)
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(each.nbytes for each in found.values())
        for key, file in index["weight_map"].items():
            assert key in load_file(tmp_path / "out" / file)
    assert content(source) == before
    assert names_in(tmp_path) == ["in", "out", "zeros"]


@pytest.mark.parametrize(("dtype", "shards", "form"), [("F32", 1, "packed"), ("BF16", 3, "bool")])
@pytest.mark.parametrize("name", CASES)
def test_every_way_to_remove_the_same_gives_the_same_bytes(
    tmp_path: Path, name: str, dtype: str, shards: int, form: str
) -> None:
    case = CASES[name]
    source = write(tmp_path / "in", case.tensors(DTYPES[dtype]), case.config, shards)
    zeros, masks = tmp_path / "zeros", tmp_path / "masks"
    for words in (
        ("apply", source, case.spec, *case.options, "-o", zeros, "--mask-format", form, "-q"),
        ("mask", source, case.spec, *case.options, "-o", masks, "--mask-format", form, "-q"),
    ):
        ok(*words)
    ways: dict[str, tuple[object, ...]] = {
        "a spec": (source, case.spec, *case.options),
        "a spec again": (zeros, case.spec, *case.options),
        "masks of a pruned one": (zeros, "--masks", zeros),
        "masks alone": (source, "--masks", masks),
        "masks of another": (source, "--masks", zeros),
    }
    outputs = {}
    for way, words in ways.items():
        removed(*words, "-o", tmp_path / "out", "-q")
        outputs[way] = weights(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    assert outputs["a spec"].keys() >= {"config.json", "tokenizer.json", "sparseprune/spec.toml"}
    for way, found in outputs.items():
        assert found == outputs["a spec"], way
    assert names_in(tmp_path) == ["in", "masks", "zeros"]


@pytest.mark.parametrize("masks", [False, True])
def test_passes_of_a_removal_are_plain_data_that_another_process_could_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masks: bool
) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA, 2)
    ok("mask", source, "mlp-channels", "-o", tmp_path / "masks", "-q")
    words = (source, "--masks", tmp_path / "masks") if masks else (source, "mlp-channels")
    removed(*words, "-o", tmp_path / "usual", "-q")
    done = []
    for kind in (ReduceBlocks, ReadSlices, CutTensor):

        def elsewhere(one: Any, chunk: Any, io: Any, work: Any = kind.work) -> Any:
            done.append(type(one))
            return pickle.loads(pickle.dumps(work(*pickle.loads(pickle.dumps((one, chunk))), io)))

        monkeypatch.setattr(kind, "work", elsewhere)
    removed(*words, "-o", tmp_path / "out", "-q")
    assert {*done} == {ReadSlices if masks else ReduceBlocks, CutTensor}
    assert weights(tmp_path / "out") == weights(tmp_path / "usual")


def in_slabs(monkeypatch: pytest.MonkeyPatch, slab: int) -> None:
    """Slabs of about so many bytes or, of masks, elements."""
    usual = regions.limits_of

    def narrow(memory: int, **others: Any) -> regions.Limits:
        return replace(usual(memory, **others), slab=slab, tile=max(16, slab))

    monkeypatch.setattr(regions, "limits_of", narrow)
    monkeypatch.setattr(schedule, "limits_of", narrow)


@pytest.mark.parametrize("name", CASES)
def test_no_option_of_speed_changes_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = CASES[name]
    source = write(tmp_path / "in", case.tensors(torch.bfloat16), case.config, 2)
    ok("mask", source, case.spec, *case.options, "-o", tmp_path / "masks", "-q")
    ways = ((case.spec, *case.options), ("--masks", tmp_path / "masks"))
    hashes = set()
    for slab, *options in ((6, "--jobs", "1"), (40, "--jobs", "3"), (1 << 20, "--memory", "130MB")):
        in_slabs(monkeypatch, slab)
        for words in ways:
            removed(source, *words, *options, "-o", tmp_path / "out", "-q")
            found = weights(tmp_path / "out")
            hashes.add(sha256(repr(sorted(found.items())).encode()).hexdigest())
            shutil.rmtree(tmp_path / "out")
        monkeypatch.undo()
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "head", ['[reconstruct]\nfile = "stats.safetensors"\nmethod = "refit"\n', 'mode = "soft"\n']
)
def test_rebuilt_weights_are_cut_like_others(tmp_path: Path, head: str) -> None:
    """The tensors that apply writes, at the indices that its masks keep; the dense ones are not used."""
    dense = decoder()
    source = write(tmp_path / "in", dense, LLAMA, 2)
    generator = torch.Generator().manual_seed(1)
    stats = {
        name: moments(tensor.shape[1], 50, generator).contiguous()
        for name, tensor in dense.items()
        if name.endswith("_proj.weight")
    }
    save_file(stats, tmp_path / "stats.safetensors")
    text = Path("specs/mlp-channels.toml").read_text()
    if head.startswith("mode"):
        text = text.replace("[scope.mlp]\n", f"[scope.mlp]\n{head}")
    else:
        text = text.replace("[vars]\n", f"{head}[vars]\n", 1)
    spec = write_spec(tmp_path, text)
    ok("apply", source, spec, "-o", tmp_path / "zeros", "-q")
    removed(source, spec, "-o", tmp_path / "out", "-q")
    masks = load_masks(tmp_path / "zeros")
    found = {name: as_bytes(each) for name, each in read(tmp_path / "out").items()}
    assert found == {name: as_bytes(each) for name, each in expected(read(tmp_path / "zeros"), masks).items()}
    assert found != {name: as_bytes(each) for name, each in expected(dense, masks).items()}
    assert names_in(tmp_path) == ["in", "out", "spec.toml", "stats.safetensors", "zeros"]
    report = json.loads((tmp_path / "out" / "sparseprune" / "report.json").read_text())
    assert (report["totals"]["output_error"] is None) == head.startswith("mode")
    again = removed(tmp_path / "zeros", "--masks", tmp_path / "zeros", "-o", tmp_path / "again", "-q")
    assert (again.code, weights(tmp_path / "again")) == (0, weights(tmp_path / "out"))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("masks", [False, True])
def test_a_removal_of_nothing_is_an_error_that_says_what_would_remove(
    tmp_path: Path, shards: int, masks: bool
) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA, shards)
    words: tuple[object, ...] = ("mlp-channels", "--set", "sparsity=0")
    if masks:
        save_file({"lm_head.weight": torch.ones(VOCABULARY, HIDDEN) > 0}, tmp_path / "m.safetensors")
        words = ("--masks", tmp_path / "m.safetensors")
    before = content(source)
    said = run("remove", source, *words, "-o", tmp_path / "out")
    why = f"{tmp_path / 'm.safetensors'}: nothing to remove: every mask keeps all of its tensor"
    if not masks:
        why = (
            "mlp-channels.toml: nothing to remove: scope.mlp prunes nothing: it keeps 16 of 16 "
            "blocks in each scope: sparsity 0 of 16 rounds to none; 0.0625 or more prunes"
        )
    assert (said.code, said.err.splitlines()[-1]) == (2, f"sparseprune: {why}")
    assert content(source) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("masks", [False, True])
def test_an_output_that_exists_is_replaced_with_force_alone(tmp_path: Path, masks: bool) -> None:
    source, out = write(tmp_path / "in", decoder(), LLAMA, 2), tmp_path / "out"
    ok("mask", source, "mlp-channels", "-o", tmp_path / "masks", "-q")
    words = ("--masks", tmp_path / "masks") if masks else ("mlp-channels",)
    removed(source, *words, "-o", out, "-q")
    wanted = weights(out)
    shutil.rmtree(out)
    ok("apply", source, "2of4", "-o", out, "-q")
    before = content(out)
    assert run("remove", source, *words, "-o", out, "-q").code == 2
    assert content(out) == before
    removed(source, *words, "-o", out, "-q", "--force")
    assert weights(out) == wanted
    assert names_in(tmp_path) == ["in", "masks", "out"]


@pytest.mark.parametrize("name", ["out.choice", "out-choice"])
def test_what_lies_beside_the_output_is_neither_in_the_way_nor_touched(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA)
    (tmp_path / name).mkdir()
    (tmp_path / name / "work.txt").write_text("of hours")
    removed(source, "mlp-channels", "-o", tmp_path / "out", "-q")
    assert content(tmp_path / name) == {"work.txt": b"of hours"}


def test_the_config_keeps_what_is_not_of_the_removal(tmp_path: Path) -> None:
    config = {
        "z": [1e-05, None, "\u00e9"],
        **LLAMA,
        "intermediate_size": WIDTH,
        "a": {"intermediate_size": 5},
    }
    source = write(tmp_path / "in", decoder(), config)
    (source / "config.json").chmod(0o755)
    removed(source, "mlp-channels", "-o", tmp_path / "out", "-q")
    path = tmp_path / "out" / "config.json"
    assert config_of(path.parent) == {**config, "intermediate_size": 12}
    assert list(config_of(path.parent)) == list(config)
    assert path.stat().st_mode & 0o100


def test_shards_that_are_links_become_files(tmp_path: Path) -> None:
    """A snapshot of a download cache."""
    source = write(tmp_path / "in", decoder(), LLAMA, 2)
    removed(source, "mlp-channels", "-o", tmp_path / "wanted", "-q")
    blobs = tmp_path / "blobs"
    source.rename(blobs)
    source.mkdir()
    for number, path in enumerate(sorted(blobs.iterdir())):
        (source / path.name).symlink_to(path.rename(blobs / f"blob{number}"))
    before = content(blobs)
    removed(source, "mlp-channels", "-o", tmp_path / "out", "-q")
    assert weights(tmp_path / "out") == weights(tmp_path / "wanted")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert content(blobs) == before


def test_a_shard_of_which_all_is_gone_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "in"
    dense = decoder()
    write(source, dense, LLAMA)
    (source / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(3):
        part = {name: each for name, each in dense.items() if place_of(name) == number}
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file(part, source / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    masks = {name: torch.zeros(each.shape) > 0 for name, each in dense.items() if place_of(name) == 1}
    save_file(masks, tmp_path / "m.safetensors")
    removed(source, "--masks", tmp_path / "m.safetensors", "--partial", "-o", tmp_path / "out", "-q")
    assert [path.name for path in sorted((tmp_path / "out").glob("model*"))] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    found = {name: as_bytes(each) for name, each in read(tmp_path / "out").items()}
    assert found == {name: as_bytes(each) for name, each in expected(dense, masks).items()}
    said = run("inspect", tmp_path / "out", "--json")
    assert (said.code, json.loads(said.out)["totals"]["tensors"]) == (0, len(found))


def place_of(name: str) -> int:
    """A shard for each layer, and one for all else."""
    found = re.match(r"model\.layers\.(\d)\.", name)
    return 2 if found is None else int(found[1])


@pytest.mark.parametrize("limit", range(5))
@pytest.mark.parametrize("masks", [False, True])
def test_a_run_needs_no_thread_but_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, masks: bool
) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA, 2)
    ok("mask", source, "mlp-channels", "-o", tmp_path / "masks", "-q")
    words = ("--masks", tmp_path / "masks") if masks else ("mlp-channels",)
    removed(source, *words, "-o", tmp_path / "whole", "-q")
    thread_limit(monkeypatch, limit)
    removed(source, *words, "-o", tmp_path / "out", "--jobs", 3)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_an_input_may_be_called_anything(tmp_path: Path) -> None:
    """Whatever hidden names a run makes, they are none of the input's."""
    wanted = None
    for name in ("out.choice", "out-choice", "out.sparseprune-choice", ".out", "out.partial"):
        source = write(tmp_path / name, decoder(), LLAMA)
        removed(source, "mlp-channels", "-o", tmp_path / "out", "-q")
        wanted = wanted or weights(tmp_path / "out")
        assert weights(tmp_path / "out") == wanted
        shutil.rmtree(source)
        shutil.rmtree(tmp_path / "out")
    assert names_in(tmp_path) == []


def test_a_name_of_the_output_may_be_as_long_as_the_system_lets_it(tmp_path: Path) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA)
    for command in ("apply", "remove"):
        out = tmp_path / ("o" * 230 + command)[-230:]
        ok(command, source, "mlp-channels", "-o", out, "-q")
        assert (out / "config.json").is_file()


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("kind", ["choice", "partial"])
def test_another_run_that_writes_the_same_output_is_told_by_its_name(
    tmp_path: Path, kind: str, masks: bool
) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA)
    ok("mask", source, "mlp-channels", "-o", tmp_path / "masks", "-q")
    words = ("--masks", tmp_path / "masks") if masks else ("mlp-channels",)
    other = StagingDir(tmp_path / "out", kind)
    other.acquire()
    try:
        said = run("remove", source, *words, "-o", tmp_path / "out", "-q")
    finally:
        other.discard()
    if masks and kind == "choice":
        assert said.code == 0  # there is nothing to choose
        return
    told = f"{tmp_path}/out: another run is writing this output; wait, or give another name with -o"
    assert (said.code, said.out, said.err) == (2, "", f"sparseprune: {told}\n")
    removed(source, *words, "-o", tmp_path / "out", "-q")
    assert names_in(tmp_path) == ["in", "masks", "out"]


def drop_first_layer(source: Path, masks: Path) -> Path:
    """A file of masks that drop all of a layer that has any element."""
    dropped = {
        name: torch.zeros(each.shape) > 0
        for name, each in read(source).items()
        if name.startswith("model.layers.0.") and each.numel()
    }
    save_file(dropped, masks)
    return masks


@pytest.mark.parametrize("shards", [1, 2])
def test_only_what_a_list_numbers_is_renumbered(tmp_path: Path, shards: int) -> None:
    """A list of modules writes its numbers without zeros before them, and between dots."""
    odd = (
        "model.layers.01.x.weight",
        "model.layers.-1.x.weight",
        "model.layers.1x.weight",
        "model.layers_1.weight",
        f"model.layers.{'9' * 5000}.weight",
        "1.weight",
        "model.1",
        "model.layers.\u0661.x.weight",
    )
    dense = decoder() | {name: Draw()(3) for name in odd}
    source = write(tmp_path / "in", dense, LLAMA, shards)
    masks = drop_first_layer(source, tmp_path / "m.safetensors")
    removed(source, "--masks", masks, "--partial", "-o", tmp_path / "out", "-q")
    found, wanted = read(tmp_path / "out"), {}
    for name, each in dense.items():
        if not name.startswith("model.layers.0."):
            wanted[name.replace("model.layers.1.", "model.layers.0.")] = as_bytes(each)
    assert {name: as_bytes(each) for name, each in found.items()} == wanted
    assert found.keys() >= set(odd)
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 1


def test_tensors_of_no_dimension_and_of_no_element_go_with_their_layer(tmp_path: Path) -> None:
    more = {
        f"model.layers.{layer}.{name}": each
        for layer in range(2)
        for name, each in (("scale", torch.tensor(2.0 + layer)), ("empty", torch.zeros(0, 3)))
    }
    source = write(tmp_path / "in", decoder() | more, LLAMA)
    masks = drop_first_layer(source, tmp_path / "m.safetensors")
    removed(source, "--masks", masks, "--partial", "-o", tmp_path / "out", "-q")
    found = read(tmp_path / "out")
    assert float(found["model.layers.0.scale"]) == 3.0
    assert found["model.layers.0.empty"].shape == (0, 3)
    assert not any(name.startswith("model.layers.1.") for name in found)


def test_masks_are_looked_at_in_memory_that_does_not_grow_with_their_rows(tmp_path: Path) -> None:
    peaks = []
    for rows in (20, 400):
        path = tmp_path / f"{rows}.safetensors"
        save_file({"x": torch.ones(rows, 20_000) > 0}, path)
        masks = list(open_masks(path).masks.values())
        with TensorReader() as reader:
            tracemalloc.start()
            try:
                kept = read_slices(masks, reader, regions.Limits(1 << 30, 20_000), 1, lambda *_: None)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert kept["x"].is_whole
        peaks.append(peak)
    assert peaks[1] < 1.5 * peaks[0]


# -- the hidden size ---------------------------------------------------------------------------------

ANY_WIDTH = {**LLAMA, "model_type": "mistral", "head_dim": 2}  # Llama wants a multiple of the heads


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("jobs", ["1", "3"])
def test_hidden_channels_go_from_every_tensor_and_norms_are_scaled(
    tmp_path: Path, dtype: str, jobs: str
) -> None:
    dense = decoder(DTYPES[dtype])
    source = write(tmp_path / "in", dense, {**LLAMA, "head_dim": 2}, 2)
    ok("apply", source, "hidden", "--set", "sparsity=0.5", "-o", tmp_path / "masked")
    norm = load_masks(tmp_path / "masked")["model.norm.weight"]
    stays = [channel for channel in range(HIDDEN) if norm[channel]]
    said = run("remove", source, "hidden", "--set", "sparsity=0.5", "-o", tmp_path / "out", "--jobs", jobs)
    assert said.code == 0
    assert "5 weights, such as model.layers.0.input_layernorm.weight, are multiplied by 1.41421" in said.err
    config = config_of(tmp_path / "out")
    assert (config["hidden_size"], config["rms_norm_eps"], config["head_dim"]) == (4, 2e-5, 2)
    left = read(tmp_path / "out")
    assert set(left) == set(dense)
    for name, tensor in dense.items():
        wanted = tensor
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            wanted = tensor[stays]
        elif "_proj" in name or "embed" in name or "lm_head" in name:
            wanted = tensor[:, stays]
        elif "norm" in name:
            wanted = (tensor[stays].double() * 2**0.5).to(tensor.dtype)
        assert left[name].shape == wanted.shape, name
        close = 2**-52 if dtype == "F64" else 0.0
        assert torch.equal(left[name], wanted) or torch.allclose(left[name], wanted, rtol=close, atol=0), name


def test_hidden_channels_go_by_masks_to_the_same_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "in", decoder(), ANY_WIDTH)
    ok("apply", source, "hidden", "-o", tmp_path / "masked")
    run("remove", source, "hidden", "-o", tmp_path / "one")
    said = run("remove", source, "--masks", tmp_path / "masked", "-o", tmp_path / "other")
    assert said.code == 0
    assert content(tmp_path / "one" / "model.safetensors") == content(
        tmp_path / "other" / "model.safetensors"
    )
    said = run("remove", tmp_path / "masked", "--zeros-of", tmp_path / "masked", "-o", tmp_path / "third")
    assert said.code == 0, said.err
    assert content(tmp_path / "one" / "model.safetensors") == content(
        tmp_path / "third" / "model.safetensors"
    )


def test_a_norm_whose_dtype_holds_no_scaled_weights_is_refused(tmp_path: Path) -> None:
    dense = decoder()
    dense["model.norm.weight"] = dense["model.norm.weight"].to(torch.float8_e4m3fn)
    source = write(tmp_path / "in", dense, ANY_WIDTH)
    said = run("remove", source, "hidden", "-o", tmp_path / "out")
    assert (said.code, (tmp_path / "out").exists()) == (2, False)
    assert "model.norm.weight is F8_E4M3, and its weights would have to be scaled" in said.err


def test_a_llama_takes_any_hidden_size_as_a_mistral(tmp_path: Path) -> None:
    source = write(tmp_path / "in", decoder(), {**LLAMA, "head_dim": 2})
    said = run("remove", source, "hidden", "-o", tmp_path / "out")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "num_attention_heads, 4, such as 4 or 8; or --as mistral, whose class takes any" in said.err
    said = run("remove", source, "hidden", "--as", "mistral", "-o", tmp_path / "out")
    assert said.code == 0
    assert "config.json: sliding_window absent -> null\nconfig.json: architectures" in said.err
    assert config_of(tmp_path / "out")["hidden_size"] == 6
