"""`remove`: what is told of a run, its report and its plan; wrong use and scarcity in whole lines."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseprune import load_masks
from sparseprune.api.resources import memory_of
from sparseprune.removal.architectures import model_types
from sparseprune.spec.problems import listed
from tests.checkpoint.files import content, names_in
from tests.cli.removal import (
    CASES,
    HALF,
    HIDDEN,
    LLAMA,
    MIXTRAL,
    UP,
    VOCABULARY,
    WIDTH,
    Draw,
    decoder,
    mixture,
    read,
    removed,
    weights,
    write,
)
from tests.commands import Said, ok, run, valid
from tests.faults import failing, fill, mounted
from tests.samples import write_spec

SPEED = re.compile(r"\d+\.\d s, [\d.]+ [kMG]?B/s, on cpu")


def told(said: Said) -> list[str]:
    """What was said on stderr, but for the last line, which tells times."""
    *lines, speed = said.err.splitlines()
    assert SPEED.fullmatch(speed)
    return lines


RULES = """\
rule       tensors  scopes  kept in each  elements  pruned  of all
scope.mlp        6       2      12 of 16       768     192  13.83%
"""
REACHED = (
    "reached 66.67% of the layers' matrices, 100.00% of the MLP matrices; not reached: 128 parameters of "
    "model.layers.*.self_attn.o_proj.weight, 128 of model.layers.*.self_attn.q_proj.weight and more\n"
)
SIZES = """\
config.json: intermediate_size 16 -> 12
parameters 1,388 before, 1,196 after (13.83% fewer)
weights 7.77 kB before, 7.18 kB after
faster: everywhere that reads sizes from the config; intermediate_size 12: not divisible by 32, for quantizers
"""
CHANGED = """\
tensor                               shape  becomes  named
model.layers.0.mlp.down_proj.weight  8x16   8x12
model.layers.0.mlp.gate_proj.weight  16x8   12x8
model.layers.0.mlp.up_proj.weight    16x8   12x8
model.layers.1.mlp.down_proj.weight  8x16   8x12
model.layers.1.mlp.gate_proj.weight  16x8   12x8
model.layers.1.mlp.up_proj.weight    16x8   12x8
"""


def test_what_is_told_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(Path("in"), decoder(), LLAMA)
    said = removed(source, "mlp-channels")
    assert (said.out, told(said)) == ("in-smaller\n", (RULES + REACHED + SIZES).splitlines())
    said = removed(source, "mlp-channels", "-o", "out", "-v")
    assert (said.out, [line.rstrip() for line in told(said)]) == (
        "out\n",
        (CHANGED + RULES + REACHED + SIZES).splitlines(),
    )
    ok("mask", source, "mlp-channels", "-o", "masks", "-q")
    said = removed(source, "--masks", "masks", "-o", "out", "--force")
    unnamed = SIZES.replace("7.18 kB", "7.15 kB")  # headers do not name the spec of masks
    assert (said.out, told(said)) == ("out\n", unnamed.splitlines())
    for options in (["-q"], ["-q", "-v"]):
        said = removed(source, "mlp-channels", "-o", "out", "--force", *options)
        assert (said.out, said.err) == ("out\n", "")
    said = removed(source, "mlp-channels", "-o", "out", "--force", "-q", "--json")
    assert (json.loads(said.out)["output"], said.err) == ("out", "")


def test_what_partial_masks_leave_out_is_told(tmp_path: Path) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA)
    ok("mask", source, "mlp-channels", "-o", tmp_path / "masks", "-q")
    full = load_masks(tmp_path / "masks")
    for more, lines in (
        ({}, []),
        ({"x.weight": torch.ones(3) > 0}, ["sparseprune: 1 mask without a tensor left out"]),
        (
            {"x.weight": torch.ones(3) > 0, "y.weight": torch.ones(3) > 0},
            ["sparseprune: 2 masks without a tensor left out"],
        ),
    ):
        save_file(full | more, tmp_path / "m.masks")
        words = (source, "--masks", tmp_path / "m.masks", "--partial", "-o", tmp_path / "out", "--force")
        said = removed(*words)
        assert told(said)[: len(lines)] == lines
        assert said.err.count("left out") == len(lines)
        assert removed(*words, "-q").err == ""


def test_what_is_told_of_heads_layers_and_experts(tmp_path: Path) -> None:
    lines = {
        "heads": [
            "config.json: num_attention_heads 4 -> 2",
            "config.json: num_key_value_heads 2 -> 1",
            "config.json: head_dim absent -> 2",
            "parameters 1,388 before, 1,196 after (13.83% fewer)",
        ],
        "layers": [
            "config.json: num_hidden_layers 2 -> 1",
            "15 of 24 tensors are left",
            "parameters 1,388 before, 796 after (42.65% fewer)",
        ],
        "experts": [
            "config.json: num_local_experts 4 -> 2",
            "29 of 41 tensors are left",
            "parameters 3,752 before, 2,184 after (41.79% fewer)",
        ],
    }
    for name, wanted in lines.items():
        case = CASES[name]
        source = write(tmp_path / name, case.tensors(), case.config)
        _, _, covered, *found, _, _ = told(removed(source, case.spec, *case.options))
        assert sorted(found) == sorted(wanted)
        assert covered.startswith("reached ")
    table = removed(source, case.spec, *case.options, "--force", "-v").err
    assert re.search(r"\.experts\.\d\.w2\.weight +8x16 +removed", table)
    assert re.search(r"\.experts\.\d\.w2\.weight +8x16 +as it was +\S+\.experts\.\d\.w2\.weight", table)
    assert re.search(r"\.gate\.weight +4x8 +2x8", table)


@pytest.mark.parametrize("name", CASES)
def test_the_report_tells_what_became_of_everything(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    dense = case.tensors()
    source = write(tmp_path / "in", dense, case.config, 2)
    said = removed(source, case.spec, *case.options, "-o", tmp_path / "out", "--json", "-q")
    report = valid(said.out, "remove")
    assert json.loads((tmp_path / "out" / "sparseprune" / "report.json").read_text()) == report
    left = read(tmp_path / "out")
    totals = {
        "tensors": len(dense),
        "tensors_after": len(left),
        "numel": sum(tensor.numel() for tensor in dense.values()),
        "numel_after": sum(tensor.numel() for tensor in left.values()),
        "bytes": sum(path.stat().st_size for path in source.glob("*.safetensors")),
        "bytes_after": sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")),
        "output_error_masked": None,
        "output_error": None,
    }
    assert {key: report["totals"][key] for key in totals} == totals
    assert report["totals"]["declared_coverage"] == 1
    assert {one["key"]: (one["before"], one["after"]) for one in report["config"]} == {
        key: (case.config.get(key), value) for key, value in case.changes.items()
    }
    listed = {one["name"]: one for one in report["tensors"]}
    becomes = {name: (name, list(tensor.shape)) for name, tensor in dense.items()}
    for key, one in listed.items():
        assert (one["shape"], one["dtype"]) == (becomes[key][1], "F32")
        assert (one["name_after"], one["shape_after"]) != becomes[key]
        becomes[key] = one["name_after"], one["shape_after"]
    assert {key: shape for key, shape in becomes.values() if key is not None} == {
        key: list(tensor.shape) for key, tensor in left.items()
    }
    assert (report["input"], report["output"]) == (str(source), str(tmp_path / "out"))
    assert (report["masks"], report["set"]) == (None, {"sparsity": "0.5"} if case.options else {})
    (rule,) = report["rules"]
    assert rule["pruned"] == rule["numel"] * (rule["blocks"] - rule["nnz"] * rule["scopes"]) // rule["blocks"]


def test_the_report_of_masks_names_them_and_has_no_rules(tmp_path: Path) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA)
    ok("apply", source, "mlp-channels", "-o", tmp_path / "zeros", "-q")
    said = removed(tmp_path / "zeros", "--masks", tmp_path / "zeros", "-o", tmp_path / "out", "--json", "-q")
    report = valid(said.out, "remove")
    assert (report["masks"], report["spec_sha256"], report["rules"]) == (str(tmp_path / "zeros"), None, [])
    assert report["totals"]["numel_after"] == 1_196
    spec = (tmp_path / "out" / "sparseprune" / "spec.toml").read_bytes()
    assert spec == (tmp_path / "zeros" / "sparseprune" / "spec.toml").read_bytes()
    assert sorted(path.name for path in (tmp_path / "out" / "sparseprune").iterdir()) == [
        "report.json",
        "spec.toml",
    ]


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("in"), decoder(), LLAMA)
    said = removed("in", "mlp-channels", "--dry-run")
    lines = [line.strip() for line in said.out.splitlines()]
    for line in (
        "removes   8x16 becomes 8x12, 16x8 becomes 12x8",
        "masks     none",
        "removal   1,196 parameters (13.83% fewer) in 4.78 kB: intermediate_size 16 -> 12",
    ):
        assert line in lines
    assert (said.err, names_in(tmp_path)) == ("", ["in"])
    assert any(re.fullmatch(r"output +[\d.]+ kB in in-smaller", line) for line in lines)
    said = removed("in", "mlp-channels", "--dry-run", "--json")
    plan = valid(said.out, "plan")
    assert plan["removal"] == {
        "problems": [],
        "config": [{"key": "intermediate_size", "before": 16, "after": 12}],
        "numel": 1_196,
        "bytes": 4_775,
        "remarks": [],
    }
    assert plan["rules"][0]["removal"]["removable"]
    assert (said.err, names_in(tmp_path)) == ("", ["in"])
    # What the run itself then comes to.
    report = json.loads(removed("in", "mlp-channels", "--json", "-q").out)
    assert report["config"] == plan["removal"]["config"]
    assert report["totals"]["numel_after"] == plan["removal"]["numel"]
    said = run("remove", "in", "2of4", "--dry-run", "-o", "x")
    assert (said.code, said.out, said.err) == (2, "", f"sparseprune: {UNREMOVABLE}\n")


UNREMOVABLE = (
    "2of4.toml: scope.matrix cannot be removed: its blocks [1, 1] are not whole slices of "
    "model.layers.0.mlp.down_proj.weight, [8, 16]; use apply, which writes zeros"
)
ORPHAN = "and it belongs to no layer or expert that is dropped as a whole"
COUPLED = f"{ORPHAN}: couple all tensors of one"
SINCE = f"{ORPHAN}, since model.layers.1.input_layernorm.weight stays: couple all tensors of one"
NO_CONFIG = (
    "there is no config.json, which has to say what becomes smaller; give the directory of a checkpoint that "
    "has one, or use apply, which keeps all shapes"
)
TYPES = model_types()
MORE = [f"{len(TYPES) - 20} more"] if len(TYPES) > 20 else []
UNKNOWN = (
    'config.json: nothing is known of the model_type "strange", so that no key can carry the smaller shapes; '
    f"known are {listed([*TYPES[:20], *MORE])}; apply keeps all shapes"
)
ONE_FILE = (
    "in/model.safetensors: what becomes smaller is said in config.json; give the directory of a checkpoint, "
    "or use apply, which keeps all shapes"
)
DOWN = "model.layers.0.mlp.down_proj.weight"
TAKEN = "HOME/taken: already exists; give another name with -o, or --force to replace it"
UNEVEN = Path("specs/mlp-channels.toml").read_text().replace('"sparsity"', '"0.25 + 0.25 * layer"')
# What is typed after `remove` -> what is said of it, line by line.
WRONG: dict[str, str] = {
    "in": (
        "nothing says what to remove; give a SPEC, such as mlp-channels, --masks, --experts or --vocabulary"
    ),
    "in mlp-channels --masks rows.masks --partial": (
        "mlp-channels and --masks exclude each other; give one of them"
    ),
    "in --masks rows.masks --set sparsity=0.5": "--set: goes with a SPEC, whose [vars] it sets",
    "in --masks rows.masks --dry-run": "--dry-run: goes with a SPEC, whose plan it shows, or with a list",
    "in 2of4 --partial": "--partial: goes with --masks MASKS or --zeros-of SPARSE",
    "in/model.safetensors mlp-channels": ONE_FILE,
    "in/model.safetensors --masks rows.masks --partial": ONE_FILE,
    "in mlp-channels -o taken": TAKEN,
    "in --masks rows.masks --partial -o taken": TAKEN,
    "in mlp-channels -o taken --force": (
        "HOME/taken: --force replaces what sparseprune wrote, and this directory has no report of it; remove "
        "it yourself, or give another name with -o"
    ),
    "in mlp-channels -o in --force": ("HOME/in: output and input are the same; give another name with -o"),
    "in mlp-channels -o in/out": (
        "HOME/in/out: the output lies inside the input in; give another place with -o"
    ),
    "in mlp-channels -o no/out": "HOME/no/out: the folder HOME/no does not exist; make it first",
    "in mlp-channels -o out.safetensors": (
        "out.safetensors: the output of the directory in is a directory; give a name without .safetensors"
    ),
    "in --masks all --partial -o all --force": (
        "HOME/all: the output would replace the masks in all/masks.safetensors; give another name with -o"
    ),
    "in mlp-channels --memory 1MB": (
        "--memory 1.00 MB: this run needs 121.71 MB, of which Python takes 104.86 MB; give --memory 122MB"
    ),
    "in --masks even.masks --partial --memory 1MB": (
        "--memory 1.00 MB: this run needs 121.71 MB, of which Python takes 104.86 MB; give --memory 122MB"
    ),
    "in 2of4": UNREMOVABLE,
    "unknown mlp-channels": f"mlp-channels.toml: {UNKNOWN}",
    "unknown --masks rows.masks --partial": f"rows.masks: {UNKNOWN}",
    "nothing mlp-channels": f"mlp-channels.toml: {NO_CONFIG}",
    "nothing --masks rows.masks --partial": f"rows.masks: {NO_CONFIG}",
    "broken mlp-channels": (
        "broken/config.json: cannot be read as JSON: Expecting property name enclosed in double quotes: line "
        "1 column 25 (char 24)"
    ),
    "strings mlp-channels": ('mlp-channels.toml: config.json: intermediate_size is "16", wanted an integer'),
    "wrong mlp-channels": "\n".join(
        f"mlp-channels.toml: model.layers.{layer}.mlp.gate_proj.weight has 16 channels along dimension 0, "
        "config.json says 17 for intermediate_size"
        for layer in range(2)
    ),
    "in uneven.toml": (
        "uneven.toml: intermediate_size would be 12 in model.layers.0.mlp.down_proj and 8 in "
        "model.layers.1.mlp.down_proj, and config.json has one for all: keep as many in all "
        "of these"
    ),
    "in mlp-channels-global": (
        "mlp-channels-global.toml: intermediate_size would be 15 in model.layers.0.mlp.down_proj "
        "and 9 in model.layers.1.mlp.down_proj, and config.json has one for all: keep as many in "
        "all of these"
    ),
    "mix experts --set sparsity=0.75": (
        "experts.toml: num_local_experts would be 1, fewer than the 2 of num_experts_per_tok"
    ),
    "in --masks in": (
        f"in/model.safetensors: {DOWN!r} has {float(decoder()[DOWN][0, 0]):g} at [0, 0], wanted a mask of 0 "
        "and 1 alone; give a mask file, its folder or index, or the output of sparseprune that has masks; "
        "the zeros of a sparse checkpoint are masks by --zeros-of"
    ),
    "in --masks absent.masks": "absent.masks: no such file; did you mean even.masks?",
    "in --masks sizes.masks --partial": (
        f"sizes.masks: mask '{UP}' has the shape [3, 8], the tensor in in [16, 8]; give the masks of this "
        "checkpoint, or leave this one out by --exclude"
    ),
    "in --masks strange.masks": (
        "strange.masks: its mask is not for a tensor of in, such as 'x.weight'; give the masks of this "
        "checkpoint, or --rename OLD=NEW where only names differ"
    ),
    "in --masks strange.masks --partial": (
        "strange.masks: its mask is not for a tensor of in, such as 'x.weight'; give the masks of this "
        "checkpoint, or --rename OLD=NEW where only names differ"
    ),
    "in --masks torn.masks --partial": (
        f"torn.masks: {UP}: its mask is not made of whole slices along its dimensions, so that nothing can "
        "be cut out; use apply, which writes zeros"
    ),
    "in --masks even.masks --partial": (
        f"even.masks: {UP} loses 4 of 8 along dimension 1, which no key of config.json carries"
    ),
    "in --masks embedding.masks": (
        "embedding.masks: model.embed_tokens.weight keeps 8 of 12 along dimension 0, lm_head.weight keeps "
        "12 of 12 along dimension 0 (vocab_size): couple them in the spec"
    ),
    "in --masks layer.masks --partial": "\n".join(
        f"layer.masks: model.layers.1.mlp.{name}_proj.weight: nothing of its {shape} is kept, {SINCE}"
        for name, shape in (("down", [HIDDEN, WIDTH]), ("gate", [WIDTH, HIDDEN]), ("up", [WIDTH, HIDDEN]))
    ),
    "broken --masks rows.masks --partial": (
        "broken/config.json: cannot be read as JSON: Expecting property name enclosed in double quotes: line "
        "1 column 25 (char 24)"
    ),
    "absent mlp-channels": "absent: no such file",
    "in absent.toml": (
        '"absent.toml" is neither a file nor a spec that ships with sparseprune; `sparseprune specs` lists '
        "those that do. A spec of your own is named by its path, such as path/to/spec.toml"
    ),
    "in --masks norm.masks": f"norm.masks: model.norm.weight: nothing of its [8] is kept, {COUPLED}",
}


def make_home(home: Path) -> Path:
    """A folder with all that the wrong uses name."""
    columns, rows = (
        torch.arange(HIDDEN).expand(WIDTH, HIDDEN),
        torch.arange(WIDTH)[:, None].expand(WIDTH, HIDDEN),
    )
    masks = {
        "torn": {UP: (rows + columns) % 2 > 0},
        "even": {UP: columns % 2 > 0},
        "rows": {UP: rows > 3},
        "sizes": {UP: torch.ones(3, HIDDEN) > 0},
        "strange": {"x.weight": torch.ones(3) > 0},
        "embedding": {"model.embed_tokens.weight": (rows > 3)[:VOCABULARY]},
        "layer": {
            f"model.layers.1.mlp.{name}_proj.weight": torch.zeros(each.shape[::way]) > 0
            for name, each, way in (("gate", rows, 1), ("up", rows, 1), ("down", rows, -1))
        },
        "norm": {"model.norm.weight": torch.zeros(HIDDEN) > 0},
    }
    (home / "all").mkdir()
    for name, each in masks.items():
        save_file({key: mask.contiguous() for key, mask in each.items()}, home / f"{name}.masks")
    shutil.copy(home / "rows.masks", home / "all" / "masks.safetensors")
    (home / "all" / "report.json").write_text("{}")
    write(home / "mix", mixture(), MIXTRAL)
    configs = {
        "in": LLAMA,
        "unknown": {**LLAMA, "model_type": "strange"},
        "nothing": None,
        "broken": {},
        "strings": {**LLAMA, "intermediate_size": "16"},
        "wrong": {**LLAMA, "intermediate_size": 17},
    }
    for name, config in configs.items():
        write(home / name, decoder(), config)
    (home / "broken" / "config.json").write_text('{"model_type": "llama", }')
    (home / "taken").mkdir()
    (home / "taken" / "work.txt").write_text("of hours")
    (home / "uneven.toml").write_text(UNEVEN)
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("words", WRONG)
def test_wrong_use_is_told_in_whole_lines_and_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(home)
    before, folders = content(home), names_in(home)
    said = run("remove", *words.split())
    lines = WRONG[words].replace("HOME", str(home)).splitlines()
    wanted = [f"sparseprune: {line}" for line in lines]
    assert (said.code, said.out, said.err.splitlines()) == (2, "", wanted)
    assert (content(home), names_in(home)) == (before, folders)


FULL = "sparseprune: out of memory; give a smaller --memory, or fewer --jobs"


SOFT = Path("specs/mlp-channels.toml").read_text().replace("[scope.mlp]\n", '[scope.mlp]\nmode = "soft"\n')


@pytest.mark.parametrize(
    ("place", "spec"),
    [
        ("sparseprune.execution.tensor_io.TensorIO.load", None),
        ("sparseprune.execution.tensor_io.TensorIO.load_run", None),
        ("sparseprune.removal.slices.kept_of", None),
        ("sparseprune.removal.slices.read_kept", SOFT),
        ("sparseprune.removal.shrink.CutTensor.work", None),
        ("sparseprune.removal.shrink.configure", None),
        ("sparseprune.checkpoint.StagedOutput.write_weight", None),
        ("sparseprune.checkpoint.StagedOutput.copy", None),
        ("sparseprune.api.removing.lay_out_removal", None),
        ("sparseprune.api.removing.open_choice", SOFT),
    ],
)
@pytest.mark.parametrize("quiet", [True, False])
def test_memory_that_is_not_there_is_told_with_what_to_do_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, spec: str | None, quiet: bool
) -> None:

    source = write(tmp_path / "in", decoder(), LLAMA, 2)
    named = "mlp-channels" if spec is None else write_spec(tmp_path, spec)
    before = names_in(tmp_path)
    words = (source, named, "-o", tmp_path / "out", *(["-q"] if quiet else []))
    removed(*words)
    wanted = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(place, failing(MemoryError))
    said = run("remove", *words)
    first, *kept = said.err.splitlines()
    assert (said.code, said.out, first) == (3, "", FULL)
    assert all(KEPT.search(line) for line in kept)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    removed(*words)
    assert (weights(tmp_path / "out"), names_in(tmp_path)) == (wanted, sorted([*before, "out"]))


KEPT = re.compile(
    r"sparseprune: what is finished is kept in \S+/\.out\.sparseprune-(?:choice|partial): the same command "
    "continues, removing the folder gives it up$"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "8m") as place:
        yield place


def test_a_disk_without_room_is_told_and_the_run_goes_on_when_there_is_some(
    tmp_path: Path, disk: Path
) -> None:
    wide = 1 << 16
    tensors = decoder(layers=0) | {
        f"model.layers.0.mlp.{name}_proj.weight": Draw()(*shape)
        for name, shape in (("gate", (wide, 4)), ("up", (wide, 4)), ("down", (4, wide)))
    }
    config = {**LLAMA, "hidden_size": 4, "intermediate_size": wide, "num_hidden_layers": 1}
    source = write(tmp_path / "in", tensors, config)
    removed(source, "mlp-channels", "-o", tmp_path / "wanted", "-q")
    words = ("remove", source, "mlp-channels", "-o", disk / "out", "-q")
    size = 4 * 3 * 4 * wide * 3 // 4
    fill(disk, 2 << 20)  # enough for the decisions, and for what is kept free beside
    for _ in range(2):
        said = run(*words)
        first, kept = said.err.splitlines()
        told = re.fullmatch(
            rf"sparseprune: {disk}: not enough free space: (.*) needed, .* free; free .* more, or give "
            "another place with -o",
            first,
        )
        assert told, said.err
        needed = memory_of(told[1]) - (1 << 20)
        assert (said.code, said.out, size < needed < size + (1 << 14)) == (3, "", True)
        assert KEPT.fullmatch(kept)
        assert len([name for name in names_in(disk) if name != "filler"]) == 1
    (disk / "filler").unlink()
    said = run(*words[:-1])
    assert (said.code, said.err.splitlines()[0]) == (0, "sparseprune: an unfinished run is continued")
    assert (weights(disk / "out"), names_in(disk)) == (weights(tmp_path / "wanted"), ["out"])
    shutil.rmtree(disk / "out")
    fill(disk, 1 << 19)
    said = run(*words)
    assert (said.code, said.err.count("\n"), names_in(disk)) == (3, 1, ["filler"])
    assert f"{disk}: not enough free space: " in said.err


def test_other_copies_of_the_weights_are_left_out_and_what_a_trainer_wrote_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA)
    (source / "pytorch_model.bin").write_bytes(b"PK")
    (source / "model.gguf").write_bytes(b"GGUF")
    (source / "optimizer.pt").write_bytes(b"PK")
    (source / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, HIDDEN)}, source / "2_Dense" / "model.safetensors")
    (source / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    said = removed(source, "mlp-channels", "-o", tmp_path / "out")
    lines = [line for line in said.err.splitlines() if "left out" in line or "copied" in line]
    assert lines == [
        "left out: model.gguf, pytorch_model.bin (6 B), other copies of the weights",
        "copied as it is, though a trainer wrote it for the larger model: optimizer.pt",
    ]
    report = valid((tmp_path / "out" / "sparseprune" / "report.json").read_text(), "remove")
    assert [one["path"] for one in report["files_left_out"]] == ["model.gguf", "pytorch_model.bin"]
    assert not {"model.gguf", "pytorch_model.bin"} & set(names_in(tmp_path / "out"))
    dense = Path("2_Dense", "model.safetensors")
    assert (tmp_path / "out" / dense).read_bytes() == (source / dense).read_bytes()


def test_what_a_config_says_of_layers_without_the_table_is_warned_of(tmp_path: Path) -> None:
    config = {**LLAMA, "attn_layer_period": 8, "per_layer_window": [3, 4]}
    source = write(tmp_path / "in", decoder(), config)
    (source / "params.json").write_text('{"n_layers": 2}')
    (source / "broken.json").write_text("{")
    lines = [
        "config.json: attn_layer_period 8 looks like a statement about layers, and stays as it is",
        "params.json: n_layers is 2, as num_hidden_layers was, and stays as it is",
    ]
    said = removed(source, "layers", *HALF, "-o", tmp_path / "out")
    warned = [line for line in said.err.splitlines() if "warning" in line]
    assert warned == [f"sparseprune: warning: {line}" for line in lines]
    report = json.loads((tmp_path / "out" / "sparseprune" / "report.json").read_text())
    assert report["warnings"] == lines
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(written["per_layer_window"]) == 1
    said = removed(source, "layers", *HALF, "-o", tmp_path / "dry", "--dry-run")
    assert [line.removeprefix("sparseprune: warning: ") for line in said.err.splitlines()] == lines
    said = run("remove", source, "layers", *HALF, "-o", tmp_path / "strict", "--strict")
    assert (said.code, len(said.err.splitlines())) == (2, 2)
    assert not (tmp_path / "strict").exists()


def test_a_removed_layer_is_said_to_be_skipped_where_a_masked_one_is_not(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", decoder(), {**LLAMA, "model_type": "doge"})
    line = (
        "layers of model.layers scale what they pass on: removed ones are skipped, while masked ones would "
        "pass on zeros"
    )
    said = ok("plan", folder, "layers", *HALF)
    assert f"removal   {line}" in [" ".join(one.split("\n")).strip() for one in said.out.splitlines()]
    assert line not in said.err
    assert valid(ok("plan", folder, "layers", *HALF, "--json").out, "plan")["removal"]["remarks"] == [line]
    report = json.loads(removed(folder, "layers", *HALF, "--json", "-q", "-o", tmp_path / "out").out)
    assert report["warnings"] == [line]
    said = removed(folder, "layers", *HALF, "-o", tmp_path / "again")
    assert f"sparseprune: warning: {line}\n" in said.err
