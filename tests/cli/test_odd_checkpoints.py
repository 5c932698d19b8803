"""Checkpoints that are odd but legal: every command takes them, and loses and alters nothing."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparseprune.checkpoint import lay_out
from sparseprune.engine.dtypes import DTYPES
from sparseprune.report.wording import size
from tests.checkpoint.headers import file_of, loaded, tensor
from tests.commands import Said, run, valid
from tests.samples import config_of, unmarked, write_spec

Stored = tuple[str, str, tuple[int, ...]]

SPEC = """
version = 1
[scope.all]
tensors = "**"
where = "ndim == 2 and dtype == 'BF16'"
block = [1, 1]
shape = [1, 4]
nnz = 2
"""
W: Stored = ("w", "BF16", (4, 8))


def store(path: Path, *tensors: Stored, metadata: dict[str, str] | None = None) -> Path:
    """A file of these tensors, with numbers that are finite in every dtype."""
    header = lay_out(tensors, metadata or {})
    data = bytes(1 + place % 59 for place in range(header.file_size - header.data_begin))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.raw + data)
    return path


def index(
    folder: Path, weight_map: dict[str, str], name: str = "model.safetensors.index.json", **more: object
) -> None:
    (folder / name).write_text(json.dumps({"weight_map": weight_map, **more}))


def commanded(*words: object) -> Said:
    """What a command says: nothing raw for a terminal, no traceback, one line for what goes wrong."""
    said = run(*words)
    assert not any(sign in said.out + said.err for sign in ("\x1b", "\x07", "Traceback"))
    return said


def through_all(folder: Path, checkpoint: Path, spec: str = SPEC) -> Path:
    """Every command on a checkpoint; gives the pruned one, which has the same bytes where no rule reaches."""
    path = write_spec(folder, spec)
    suffix = "" if checkpoint.is_dir() else ".safetensors"
    out, again = folder / f"out{suffix}", folder / f"again{suffix}"
    for words in (["plan", checkpoint, path], ["inspect", checkpoint], ["inspect", checkpoint, "--tree"]):
        assert commanded(*words).code == 0
    said = commanded("apply", checkpoint, path, "-o", out, "-q")
    assert (said.code, said.err) == (0, "")
    masks = out / "sparseprune" if checkpoint.is_dir() else folder / "out.masks.safetensors"
    assert commanded("verify", out, path, "-q").code == 0
    assert commanded("verify", out, "--masks", masks, "-q").code == 0
    assert commanded("compare", checkpoint, out, "--require", "altered==0").code == 0
    assert commanded("reapply", checkpoint, masks, "-o", again, "-q").code == 0
    for first, second in zip(weights(out), weights(again), strict=True):
        assert unmarked(first.read_bytes()) == unmarked(second.read_bytes())
    before = {name: one for file in weights(checkpoint) for name, one in loaded(file.read_bytes())}
    after = {name: one for file in weights(out) for name, one in loaded(file.read_bytes())}
    assert before.keys() == after.keys()
    for name, one in before.items():
        same = len(one["shape"]) != 2 or one["dtype"] != "BF16" or 0 in one["shape"]
        assert (after[name]["dtype"], after[name]["shape"]) == (one["dtype"], one["shape"])
        assert (after[name]["data"] == one["data"]) == same, name
    return out


def weights(checkpoint: Path) -> Sequence[Path]:
    if not checkpoint.is_dir():
        return [checkpoint]
    return [path for path in sorted(checkpoint.rglob("*.safetensors")) if "sparseprune" not in path.parts]


# -- tensors --------------------------------------------------------------------------------------------


def test_every_dtype_that_the_package_knows_passes_byte_for_byte(tmp_path: Path) -> None:
    stored = [(f"of.{dtype}", dtype, (4, 8)) for dtype in DTYPES]
    through_all(tmp_path, store(tmp_path / "m.safetensors", *stored))


def test_scalars_empty_tensors_and_single_elements_pass(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (0, 4), (4, 0), (1,), (1, 1, 1), (2, 0, 3)]
    stored = [(f"t{number}", "BF16", shape) for number, shape in enumerate(shapes)]
    through_all(tmp_path, store(tmp_path / "m.safetensors", W, *stored))


NAMES = [
    "", ".", "..", "a/b", "a\\b", "-o", '"quoted"', "it's", "[red]x[/red]", "[/]", "line\nline\r\n", "\ttab",
    "\x00", "\x07\x1b[2J\x1b]0;title\x07", "\x7f", "\x9b31m", "\u2028\u2029", "\u202eright to left",
    "e\u0301", "😀", "日本語", "é" * 100, "x" * 100_000, "1." * 3_000,
]  # fmt: skip


def test_names_may_hold_anything(tmp_path: Path) -> None:
    stored = [(name, "BF16", (4, 8)) for name in NAMES]
    out = through_all(tmp_path, store(tmp_path / "m.safetensors", *stored))
    with safe_open(tmp_path / "out.masks.safetensors", "pt") as masks:
        assert set(masks.keys()) == set(NAMES)
    for name in NAMES[:20]:
        said = commanded(
            "compare", tmp_path / "m.safetensors", out, "--match", name or "*", "--require", "altered==0"
        )
        assert said.code in (0, 2)  # some are no patterns


def test_names_may_hold_anything_in_what_is_told_of_a_run(tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    for name in NAMES[1:20]:
        path = store(tmp_path / "m.safetensors", (name, "BF16", (4, 8)))
        spec = write_spec(tmp_path, SPEC.replace("scope.all", f"scope.{json.dumps(name)}"))
        said = commanded("apply", path, spec, "-v", "--force")
        assert said.code in (0, 2)  # some name no rule
        spec = write_spec(tmp_path, SPEC)
        said = commanded("apply", path, spec, "-v", "--force")
        assert said.code == 0
        assert "pruned 16 of 32" in said.err
        said = commanded(
            "reapply", path, tmp_path / "m.pruned.masks.safetensors", "-o", again, "-v", "--force"
        )
        assert said.code == 0, said.err
    assert commanded("plan", path, spec, "-o", tmp_path / "[/]\x1b").code == 0


def test_names_may_hold_anything_in_errors_too(tmp_path: Path) -> None:
    for name in NAMES:
        path = tmp_path / "m.safetensors"
        save_file({name: torch.full((4, 8), torch.nan)}, path)
        said = commanded("apply", path, write_spec(tmp_path, SPEC.replace("BF16", "F32")), "-q")
        assert (said.code, len(said.err.splitlines())) == (2, 1)
        assert len(said.err) < 2000


def test_data_may_begin_anywhere_and_stand_in_any_order(tmp_path: Path) -> None:
    document = {
        "z": tensor("BF16", [4, 8], [1, 65]),
        "a": tensor("U8", [1], [0, 1]),
        "m": tensor("F32", [3], [65, 77]),
    }
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_of(json.dumps(document).encode() + b" " * 3, bytes(range(1, 78))))
    out = through_all(tmp_path, path)
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    page = (out.read_bytes()[: begin + 4096]).rstrip()
    assert page.endswith(path.read_bytes()[:begin].rstrip()[10:])


def test_a_tensor_behind_the_first_four_gigabytes_is_pruned(tmp_path: Path) -> None:
    header = lay_out([("large", "BF16", (1 << 16, 40_000)), W], {})
    path = tmp_path / "m.safetensors"
    data = torch.randn(4, 8).bfloat16()
    with path.open("wb") as file:
        file.write(header.raw)
        file.seek(header.file_size - 64)
        file.write(data.view(torch.uint8).numpy().tobytes())
    assert path.stat().st_blocks < 1000  # a hole: no disk is taken
    spec = write_spec(tmp_path, SPEC.replace('"**"', '"w"'))
    said = commanded("mask", path, spec, "-o", tmp_path / "masks.safetensors", "-q", "--mask-format", "bool")
    assert (said.code, said.err) == (0, "")
    kept = load_file(tmp_path / "masks.safetensors")["w"]
    assert kept.reshape(-1, 4).sum(1).tolist() == [2] * 8
    ranks = data.abs().float().reshape(-1, 4).argsort(dim=1, descending=True, stable=True)[:, :2]
    assert torch.equal(kept.reshape(-1, 4), torch.zeros(8, 4, dtype=torch.bool).scatter(1, ranks, value=True))
    said = commanded("verify", path, spec, "-q", "--json")
    assert said.code == 1
    assert json.loads(said.out)["tensors"][0]["first"]["element"] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_pruned_in_its_own_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    patterns = torch.arange(256, dtype=torch.uint8)
    numbers = patterns.view(dtype)[torch.isfinite(patterns.view(dtype).float())]
    mixed = numbers.view(torch.uint8)[
        torch.randperm(len(numbers), generator=torch.Generator().manual_seed(1))
    ]
    weight = mixed[: len(mixed) // 4 * 4].reshape(-1, 4)
    save_file({"w": weight.view(dtype)}, tmp_path / "m.safetensors")
    spec = write_spec(
        tmp_path, SPEC.replace("BF16", "F8_E4M3" if dtype == torch.float8_e4m3fn else "F8_E5M2")
    )
    assert commanded("apply", tmp_path / "m.safetensors", spec, "-q").code == 0
    pruned = load_file(tmp_path / "m.pruned.safetensors")["w"].view(torch.uint8)
    order = weight.view(dtype).double().abs().argsort(dim=1, descending=True, stable=True)[:, :2]
    keep = torch.zeros(weight.shape, dtype=torch.bool).scatter(1, order, value=True)
    assert torch.equal(pruned, weight * keep)


@pytest.mark.parametrize("twice", [False, True])
def test_tied_weights_stay_as_they_are_stored(tmp_path: Path, twice: bool) -> None:
    stored = [("model.embed_tokens.weight", "BF16", (4, 8)), ("model.layers.0.w", "BF16", (4, 8))]
    stored += [("lm_head.weight", "BF16", (4, 8))] if twice else []
    folder = store(tmp_path / "in" / "model.safetensors", *stored).parent
    (folder / "config.json").write_text('{"tie_word_embeddings": true, "num_labels": 2}')
    out = through_all(tmp_path, folder)
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == twice
    assert config_of(out) == config_of(folder)


# -- directories ----------------------------------------------------------------------------------------


def test_a_snapshot_of_a_download_cache_becomes_plain_files(tmp_path: Path) -> None:
    cache = tmp_path / "models--some--model"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    store(cache / "blobs" / "aa", ("a", "BF16", (4, 8)))
    store(cache / "blobs" / "bb", ("b", "BF16", (4, 8)))
    index(cache / "blobs", {"a": "model-1.safetensors", "b": "model-2.safetensors"}, name="cc")
    links = {"model-1.safetensors": "aa", "model-2.safetensors": "bb", "model.safetensors.index.json": "cc"}
    for name, blob in links.items():
        (snapshot / name).symlink_to(os.path.join("..", "..", "blobs", blob))  # noqa: PTH118
    before = {blob: (cache / "blobs" / blob).read_bytes() for blob in links.values()}
    out = through_all(tmp_path, snapshot)
    assert {path.name for path in out.iterdir()} == {*links, "README.md", "sparseprune"}
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert {blob: (cache / "blobs" / blob).read_bytes() for blob in links.values()} == before


def test_paths_need_not_be_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"in\xff")
    store(folder / "model.safetensors", W)
    (folder / os.fsdecode(b"\xfe.txt")).write_text("x")
    out = through_all(tmp_path, folder)
    assert (out / os.fsdecode(b"\xfe.txt")).read_text() == "x"
    report = json.loads((out / "sparseprune" / "report.json").read_bytes())
    assert os.fsencode(report["input"]) == os.fsencode(folder)
    assert commanded("apply", folder, write_spec(tmp_path, SPEC), "--json", "-q").code == 0


def test_masks_are_not_found_through_a_link_to_a_folder(tmp_path: Path) -> None:
    store(tmp_path / "elsewhere" / "x.safetensors", ("w", "BOOL", (4, 8)))
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "sub").symlink_to(tmp_path / "elsewhere")
    index(masks, {"w": "sub/x.safetensors"}, name="masks.safetensors.index.json")
    path = store(tmp_path / "m.safetensors", W)
    for words in (["reapply", path, masks], ["verify", path, "--masks", masks]):
        said = commanded(*words)
        assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
        assert "whose folder is a link" in said.err


def test_tensors_that_the_index_lacks_are_not_lost(tmp_path: Path) -> None:
    folder = store(tmp_path / "in" / "model-1.safetensors", W, ("unlisted", "BF16", (4, 8))).parent
    index(folder, {"w": "model-1.safetensors"}, metadata={"total_size": "wrong", "note": [1.5]})
    out = through_all(tmp_path, folder)
    assert set(load_file(out / "model-1.safetensors")) == {"w", "unlisted"}
    assert (out / "model.safetensors.index.json").read_bytes() == (
        folder / "model.safetensors.index.json"
    ).read_bytes()


def test_shards_without_an_index_are_one_checkpoint_and_so_is_the_output(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number, name in enumerate("ba", 1):
        store(folder / f"model-{number:05d}-of-00002.safetensors", (name, "BF16", (4, 8)))
    out = through_all(tmp_path, folder)
    ours = {"sparseprune", "README.md"}
    assert {path.name for path in out.iterdir()} == {path.name for path in folder.iterdir()} | ours
    (out / "model-00001-of-00002.safetensors").unlink()
    said = commanded("verify", out, write_spec(tmp_path, SPEC))
    assert (said.code, "holds 1 of 2 shards" in said.err) == (2, True)


def copies(folder: Path) -> list[str]:
    """Puts copies of the weights, and small files, into a folder; gives the names of the copies."""
    others = ["consolidated.safetensors", "model.fp16.safetensors", "original/consolidated.00.safetensors"]
    for name in others:
        store(folder / name, ("other", "F32", (4, 8)))
    index(folder, {"w": "absent.safetensors"}, name="model.fp16.safetensors.index.json")
    (folder / "m\x1b[red].gguf").write_bytes(b"GGUF")
    store(folder / "value_head.safetensors", ("other", "F32", (4, 8)))
    (folder / "training_args.bin").write_bytes(b"PK")
    return sorted([*others, "model.fp16.safetensors.index.json", "m\x1b[red].gguf"])


def test_other_copies_of_the_weights_are_left_out_and_named(tmp_path: Path) -> None:
    folder = store(tmp_path / "in" / "model-1.safetensors", W).parent
    index(folder, {"w": "model-1.safetensors"})
    names = copies(folder)
    total = size(sum((folder / name).stat().st_size for name in names))
    variant = "model.fp16.safetensors, model.fp16.safetensors.index.json"
    first = f"consolidated.safetensors, m\\x1b[red].gguf, {variant}"
    line = f"{first} and 1 more ({total}), other copies of the weights"
    spec, out, again = write_spec(tmp_path, SPEC), tmp_path / "out", tmp_path / "again"
    masks = out / "sparseprune"
    for command, by, made in (("apply", spec, out), ("reapply", masks, again)):
        said = commanded(command, folder, by, "-o", made)
        assert f"left out: {line}" in said.err.splitlines()
        text = (made / "sparseprune" / "report.json").read_text()
        report = valid(text, "report" if made == out else "reapply")
        assert [one["path"] for one in report["files_left_out"]] == names
        assert report["files_left_out"][1] == {"path": "m\x1b[red].gguf", "bytes": 4}
        assert not any((made / name).exists() for name in names)
        for name in ("training_args.bin", "value_head.safetensors", "model.safetensors.index.json"):
            assert (made / name).read_bytes() == (folder / name).read_bytes()
    again.rename(tmp_path / "quiet")
    assert commanded("reapply", folder, masks, "-o", again, "-q").err == ""
    said = commanded("mask", folder, spec, "-o", tmp_path / "masks", "--json")
    assert (json.loads(said.out)["files_left_out"], "left out:" in said.err) == ([], False)


def test_copies_that_were_not_looked_at_are_named(tmp_path: Path) -> None:
    folder = store(tmp_path / "in" / "model.safetensors", W).parent
    spec, out = write_spec(tmp_path, SPEC), tmp_path / "out"
    assert commanded("apply", folder, spec, "-o", out, "-q").code == 0
    assert "not looked at" not in commanded("verify", out, spec).out
    (out / "pytorch_model.bin").write_bytes(b"PK")
    line = "not looked at: pytorch_model.bin (2 B), another copy of the weights"
    for words, name in (
        (["verify", out, spec], "verify"),
        (["verify", out, "--masks", out / "sparseprune"], "verify-masks"),
        (["inspect", out], "inspect"),
        (["inspect", out, "--tree"], ""),
    ):
        assert line in commanded(*words).out.splitlines()
        if name:
            found = valid(commanded(*words, "--json").out, name)
            assert found["files_not_read"] == [{"path": "pytorch_model.bin", "bytes": 2}]


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "diffusion_pytorch_model.safetensors", "model.safetensors"]
)
def test_one_file_of_whatever_name_is_the_checkpoint(tmp_path: Path, name: str) -> None:
    folder = store(tmp_path / "in" / name, ("base_model.model.0.q.lora_A.weight", "BF16", (4, 8))).parent
    (folder / "adapter_config.json").write_text('{"r": 4}')
    assert {path.name for path in through_all(tmp_path, folder).iterdir()} == {
        name,
        "README.md",
        "adapter_config.json",
        "sparseprune",
    }


def test_a_folder_of_components_names_those_that_can_be_given(tmp_path: Path) -> None:
    for part in ("unet", "vae"):
        store(tmp_path / "pipe" / part / "diffusion_pytorch_model.safetensors", W)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    said = commanded("apply", tmp_path / "pipe", write_spec(tmp_path, SPEC))
    assert said.code == 2
    assert "give one of its folders that do: unet, vae" in said.err
    through_all(tmp_path, tmp_path / "pipe" / "unet")


@pytest.mark.parametrize(
    "place",
    [
        "../elsewhere/x.safetensors", "{elsewhere}/x.safetensors", "sub/../../elsewhere/x.safetensors",
        "sub\\x.safetensors", "", ".", "\0.safetensors", "y" * 300 + ".safetensors", ".git/x.safetensors",
        "absent.safetensors", "link/x.safetensors",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["apply", "mask", "plan", "inspect", "verify", "compare", "reapply"])
def test_an_index_never_leads_out_of_its_folder(tmp_path: Path, command: str, place: str) -> None:
    store(tmp_path / "elsewhere" / "x.safetensors", W)
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    if place.startswith("link"):
        (folder / "link").symlink_to(tmp_path / "elsewhere")
    index(folder, {"w": place.replace("{elsewhere}", str(tmp_path / "elsewhere"))})
    spec = write_spec(tmp_path, SPEC)
    second = {"inspect": [], "compare": [folder], "reapply": [tmp_path / "elsewhere" / "x.safetensors"]}
    said = commanded(command, folder, *second.get(command, [spec]))
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert str(folder) in said.err


def test_an_output_replaces_a_link_and_never_what_it_leads_to(tmp_path: Path) -> None:
    precious = store(tmp_path / "elsewhere" / "x.safetensors", W)
    before = precious.read_bytes()
    source = store(tmp_path / "m.safetensors", W)
    spec = write_spec(tmp_path, SPEC)
    link = tmp_path / "out.safetensors"
    link.symlink_to(precious)
    assert commanded("apply", source, spec, "-o", link, "-q").code == 2
    assert commanded("apply", source, spec, "-o", link, "-q", "--force").code == 0
    assert not link.is_symlink()
    folder = store(tmp_path / "in" / "model.safetensors", W).parent
    target = tmp_path / "out"
    target.symlink_to(precious.parent)
    assert commanded("apply", folder, spec, "-o", target, "-q").code == 2
    commanded("apply", folder, spec, "-o", target, "-q", "--force")
    assert [path.name for path in precious.parent.iterdir()] == ["x.safetensors"]
    assert precious.read_bytes() == before


@pytest.mark.parametrize("form", [".", "./", "../in", "../in/", "../other/../in"])
def test_a_checkpoint_may_be_named_in_any_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    folder = store(tmp_path / "in" / "model.safetensors", W).parent
    (tmp_path / "other").mkdir()
    spec = write_spec(tmp_path, SPEC)
    monkeypatch.chdir(folder)
    said = commanded("apply", form, spec, "-q")
    assert said.code == 0, said.err
    assert (tmp_path / "in-pruned" / "model.safetensors").is_file()
    assert commanded("verify", tmp_path / "in-pruned", spec, "-q").code == 0
