"""`apply --text` and `remove --text` with rules of all kinds, experts, two stacks, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

import sparseprune
from sparseprune.api import sweeping as driver
from sparseprune.calibration import make_sequences, sweeping
from sparseprune.calibration.sweeping import Sweep, _paired, _Rows
from tests.calibration.models import albert, deberta, made, save, t5, tokenizer
from tests.commands import Said, refused, run, valid
from tests.families.models import build
from tests.samples import config_of, unmarked

pytestmark = pytest.mark.usefixtures("quiet_transformers")

SIZES = ("--length", 12, "--sequences", 12)
HEAD = 'version = 1\n[reconstruct]\nmethod = "refit"\n'
MATRICES = '[scope.matrix]\nstructure = "matrices"\nblock = [1, 1]\nshape = [1, 4]\nnnz = 2\n'
MATRICES_OF_HEAD = '[scope.head]\ntensors = "lm_head.weight"\nblock = [1, 1]\nshape = [1, 4]\nnnz = 2\n'


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a text; nothing in it is changed by tests."""
    folder = made(tmp_path_factory.mktemp("rules"), "llama", "mixtral", "gpt_oss", "gemma3_with_pictures")
    save(t5(), folder / "t5")
    save(albert(), folder / "albert")
    save(deberta(share_att_key=True), folder / "deberta")
    return folder


def words(home: Path, model: str | Path, by: object, *more: object) -> list[object]:
    return [home / model, by, "--text", home / "words.txt", *SIZES, *more]


def swept(home: Path, model: str, out: Path, by: object, *more: object) -> Said:
    said = run("apply", *words(home, model, by, "-o", out, *more))
    assert said.code == 0, said.err
    return said


def spec(folder: Path, text: str) -> Path:
    path = folder / "spec.toml"
    path.write_text(text)
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def report(folder: Path) -> Any:
    return valid((folder / "sparseprune" / "report.json").read_text(), "report")


def zeros(tensor: torch.Tensor) -> float:
    return float((tensor == 0).double().mean())


def test_a_spec_that_keeps_all_leaves_every_byte_with_targets_of_its_own(home: Path, tmp_path: Path) -> None:
    own = HEAD.replace("refit", 'refit"\ntarget = "own') + MATRICES.replace("nnz = 2", "nnz = 4")
    swept(home, "llama", tmp_path / "out", spec(tmp_path, own))
    dense = home / "llama" / "model.safetensors"
    made = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert unmarked(made) == unmarked(dense.read_bytes())


def test_the_pruned_pass_is_that_of_the_checkpoint_that_is_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[torch.Tensor] = []
    usual = Sweep.go

    def go(this: Any, name: str, **named: Any) -> None:
        run = this._pruned.given(2)
        met.append((run.args[0] if run.args else run.kwargs["hidden_states"]).clone())
        this._pruned.keep(2)
        usual(this, name, **named)

    monkeypatch.setattr(Sweep, "go", go)
    monkeypatch.setattr(sweeping, "BATCH_TOKENS", 48)
    swept(home, "llama", tmp_path / "out", "2of4-admm")
    wanted: list[torch.Tensor] = []
    model = build("llama").from_pretrained(tmp_path / "out").eval()

    def keep(_: Any, inputs: Any, kwargs: Any) -> None:
        wanted.append((*inputs, *kwargs.values())[0])

    for layer in model.model.layers:
        layer.register_forward_pre_hook(keep, with_kwargs=True)
    drawn = make_sequences([(home / "words.txt").read_text()], tokenizer(), 12, 12, 0)
    with torch.no_grad():
        model(drawn.ids[5:9])
    assert len(met) == len(wanted) == 2
    for one, other in zip(met, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_bytes_do_not_depend_on_jobs_or_memory_and_nothing_is_left(home: Path, tmp_path: Path) -> None:
    read: dict[str, Any] = {"text": [home / "words.txt"], "length": 12, "sequences": 12}
    found = []
    ways: list[dict[str, Any]] = [{"jobs": 1}, {"jobs": 2}, {"memory": "680MB"}]
    for number, more in enumerate(ways):
        scratch, out = tmp_path / f"scratch{number}", tmp_path / f"out{number}"
        scratch.mkdir()
        sparseprune.apply(home / "mixtral", "2of4-admm", out, scratch=scratch, **read | more)
        assert not list(scratch.iterdir())
        found.append((out / "model.safetensors").read_bytes())
    assert found == [found[0]] * len(found)
    assert len(list(tmp_path.iterdir())) == 2 * len(found)


def test_moments_in_parts_and_states_on_disk_give_the_same_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept(home, "mixtral", tmp_path / "roomy", "2of4-admm")
    stages = []
    usual, gather = driver._rooms, Sweep.gather

    def narrow(*arguments: Any) -> Any:
        rooms = usual(*arguments)
        return replace(rooms, moments=2 * 8 * 32 * 32, states=0)

    def counted(this: Any, name: str, units: Any, **named: Any) -> Any:
        stages.append(len(units))
        return gather(this, name, units, **named)

    monkeypatch.setattr(driver, "_rooms", narrow)
    monkeypatch.setattr(Sweep, "gather", counted)
    swept(home, "mixtral", tmp_path / "narrow", "2of4-admm")
    assert len(stages) > 2 * 4
    first, second = (weights(tmp_path / name) for name in ("roomy", "narrow"))
    for name, one in first.items():
        assert torch.equal(one, second[name]), name


@pytest.mark.parametrize(
    ("by", "more", "parts"),
    [
        ("mlp-channels", (), ("gate_proj", "up_proj")),
        ("heads", ("--set", "sparsity=0.5"), ("q_proj", "k_proj")),
    ],
)
def test_what_remove_cuts_out_is_what_apply_makes_zero(
    by: str, more: tuple[str, ...], parts: tuple[str, ...], home: Path, tmp_path: Path
) -> None:
    swept(home, "llama", tmp_path / "zeroed", by, "--reconstruct", "admm", *more)
    said = run(
        "remove", *words(home, "llama", by, "--reconstruct", "admm", "-o", tmp_path / "smaller", *more)
    )
    assert said.code == 0, said.err
    assert config_of(tmp_path / "smaller") != config_of(home / "llama")
    large, small = weights(tmp_path / "zeroed"), weights(tmp_path / "smaller")
    for part in parts:
        name = next(key for key in large if f"layers.1.{'mlp' if 'mlp' in by else 'self_attn'}.{part}" in key)
        kept = large[name].any(dim=1)
        assert 0 < int(kept.sum()) < len(kept)
        assert torch.equal(large[name][kept], small[name])
    models = [build("llama").from_pretrained(tmp_path / one).eval() for one in ("zeroed", "smaller")]
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        first, second = (model(ids).logits for model in models)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_a_budget_over_queries_keys_and_values_is_one_decision(home: Path, tmp_path: Path) -> None:
    text = """
    [scope.part]
    tensors = "model.layers.{layer}.self_attn.{name:k|v}_proj.weight"
    block = [1, 1]
    shape = [4, 4]
    [scope_coupling.all]
    scopes = ["part"]
    across = ["name"]
    nnz = 12
    """
    swept(home, "llama", tmp_path / "out", spec(tmp_path, HEAD.replace("refit", "admm") + text))
    found = weights(tmp_path / "out")
    pair = [found[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "kv"]
    kept = torch.stack([(one != 0).reshape(4, 4, 8, 4).sum((1, 3)) for one in pair]).sum(0)
    assert bool((kept == 12).all())


def test_rules_that_need_no_text_stand_beside_those_that_do(home: Path, tmp_path: Path) -> None:
    text = HEAD + MATRICES.replace("[scope.matrix]", '[scope.matrix]\nexclude = ["**.o_proj.weight"]')
    text += """
    [scope.words]
    tensors = "model.embed_tokens.weight"
    block = [1, 1]
    shape = [1, 4]
    nnz = 1
    reconstruct = { method = "none" }
    [scope.outputs]
    tensors = "model.layers.{layer}.self_attn.o_proj.weight"
    block = [1, 1]
    shape = [1, 4]
    nnz = 2
    reconstruct = { method = "none" }
    """
    swept(home, "llama", tmp_path / "out", spec(tmp_path, text))
    dense, found = weights(home / "llama"), weights(tmp_path / "out")
    for name, share in (("model.embed_tokens.weight", 0.75), ("model.layers.0.self_attn.o_proj.weight", 0.5)):
        kept = found[name] != 0
        assert zeros(found[name]) == share
        assert torch.equal(found[name][kept], dense[name][kept])
    name = "model.layers.1.mlp.down_proj.weight"
    assert zeros(found[name]) == 0.5
    assert not torch.equal(found[name][found[name] != 0], dense[name][found[name] != 0])
    assert torch.equal(found["lm_head.weight"], dense["lm_head.weight"])


def test_both_stacks_of_an_encoder_and_a_decoder_are_pruned(home: Path, tmp_path: Path) -> None:
    swept(home, "t5", tmp_path / "out", "2of4-admm")
    found = {one["name"]: one for one in report(tmp_path / "out")["tensors"]}
    for name in ("encoder.block.1.layer.1.DenseReluDense.wo", "decoder.block.1.layer.1.EncDecAttention.k"):
        one = found[f"{name}.weight"]
        assert one["output_error"] < one["output_error_masked"]


def test_a_tower_of_pictures_is_pruned_by_magnitude_where_that_is_allowed_and_told(
    home: Path, tmp_path: Path
) -> None:
    said = swept(home, "gemma3_with_pictures", tmp_path / "out", "2of4", "--reconstruct", "admm")
    line = "scope.matrix is not rebuilt in 12 instances, such as those with "
    assert line in said.err
    found, dense = weights(tmp_path / "out"), weights(home / "gemma3_with_pictures")
    tower = next(
        name for name in dense if "vision_tower" in name and name.endswith("layers.0.mlp.fc1.weight")
    )
    kept = found[tower] != 0
    assert zeros(found[tower]) == 0.5
    assert torch.equal(found[tower][kept], dense[tower][kept])


def without_an_expert(dense: Path, folder: Path) -> Path:
    """A model whose router sends nothing to the second expert of the first layer."""
    folder.mkdir()
    for file in dense.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = weights(dense)
    if dense.name == "gpt_oss":
        tensors["model.layers.0.mlp.router.bias"][1] = -1e4
    else:  # another one of three has a larger logit
        config = json.loads((dense / "config.json").read_text()) | {"num_experts_per_tok": 1}
        (folder / "config.json").write_text(json.dumps(config))
        router = tensors["model.layers.0.block_sparse_moe.gate.weight"]
        router[1], router[2] = 0, -router[0]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("by", ["2of4-admm", "2of4"])
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w2.weight"),
    ],
)
def test_an_expert_that_no_token_reaches_is_pruned_by_magnitude_and_told(
    model: str, name: str, by: str, home: Path, tmp_path: Path
) -> None:
    folder = without_an_expert(home / model, tmp_path / model)
    said = run("apply", *words(home, folder, by, "-o", tmp_path / "out"))
    assert said.code == 0, said.err
    assert "scope.matrix is not rebuilt in" in said.err
    assert "no token reached these" in said.err
    found, dense = weights(tmp_path / "out"), weights(folder)
    one, before = (found[name][1], dense[name][1]) if model == "gpt_oss" else (found[name], dense[name])
    assert zeros(one) == 0.5
    assert torch.equal(one[one != 0], before[one != 0])
    other = name.replace("experts.1", "experts.0")
    one, before = (found[name][0], dense[name][0]) if model == "gpt_oss" else (found[other], dense[other])
    assert not torch.equal(one[one != 0], before[one != 0])


def test_rows_of_a_router_are_paired_by_their_tokens() -> None:
    mine = _Rows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([4, 0, 2]))
    theirs = _Rows(torch.tensor([[10.0], [20.0], [30.0]]), torch.tensor([2, 4, 7]))
    assert _paired(mine, theirs).tolist() == [[20.0], [2.0], [10.0]]
    assert _paired(mine, None) is mine.rows
    nothing = _Rows(torch.empty(0, 1), torch.empty(0, dtype=torch.int64))
    assert _paired(mine, nothing) is mine.rows
    assert _paired(nothing, theirs) is nothing.rows


def test_rows_of_no_router_are_paired_by_their_places() -> None:
    mine = _Rows(torch.ones(2, 3), None)
    theirs = _Rows(torch.full((2, 3), 2.0), None)
    assert _paired(mine, theirs) is theirs.rows
    assert _paired(mine, _Rows(torch.ones(1, 3), None)) is mine.rows


GLOBAL = "its blocks compete over 2 parts of the model, and a sweep decides one after the other"


@pytest.mark.parametrize(
    ("model", "by", "more", "line"),
    [
        ("llama", "unstructured-global", ("--reconstruct", "admm"), GLOBAL),
        ("llama", "hidden", ("--reconstruct", "admm"), "its blocks compete over 3 parts of the model"),
        ("llama", "2of4-admm", ("--set", "permute=true"), "permute: a sweep does without it"),
        ("llama", "2of4", ("--reconstruct", "none"), "--reconstruct none: survivors are rebuilt by --text"),
        ("llama", "2of4-admm", ("--memory", "400MB"), "--memory 400.00 MB: "),
        ("llama", "unstructured-admm", (), "give what calibrate wrote, as file here or by --stats"),
        (
            "albert",
            "2of4-admm",
            (),
            "a sweep rebuilds what one block has for itself, not 6 weights, such as ",
        ),
        ("llama", HEAD, (), "not lm_head.weight: leave that out, or calibrate"),
        ("deberta", "2of4-admm", (), "is used at several places of the model, which a sweep cannot rebuild"),
    ],
)
def test_what_a_sweep_cannot_do_is_refused_in_one_line(
    model: str, by: str, more: tuple[object, ...], line: str, home: Path, tmp_path: Path
) -> None:
    if "\n" in by:
        by = str(spec(tmp_path, by + MATRICES + MATRICES_OF_HEAD))
    said = refused("apply", *words(home, model, by, "-o", tmp_path / "out", *more))
    problems = [one for one in said.err.splitlines() if not one.startswith("sparseprune: loading")]
    assert line in problems[-1]
    assert not (tmp_path / "out").exists()


def test_a_text_goes_with_a_spec(home: Path, tmp_path: Path) -> None:
    masks = ("--zeros-of", home / "llama", "--text", home / "words.txt")
    said = refused("remove", home / "llama", *masks, "-o", tmp_path / "out")
    assert f"--text {home / 'words.txt'}: goes with a SPEC, of which survivors are rebuilt" in said.err


def test_gradients_and_windows_go_with_a_text(home: Path, tmp_path: Path) -> None:
    for more in (("--gradients",),):
        said = refused("apply", home / "llama", "2of4", "-o", tmp_path / "out", *more)
        assert str(more[0]) in said.err
        assert "--text" in said.err


def test_a_text_that_is_too_short_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1 w2")
    said = refused("apply", home / "llama", "2of4-admm", "--text", tmp_path / "short.txt", *SIZES)
    assert "the text has 2 tokens" in said.err


@pytest.mark.parametrize(
    ("by", "more"), [("vnm", ("--set", "v=4")), ("mlp-channels-2of4", ()), ("mlp-channels-2of4", ("refit",))]
)
def test_nested_scopes_are_rebuilt_block_by_block(
    home: Path, tmp_path: Path, by: str, more: tuple[str, ...]
) -> None:
    options = ("--reconstruct", *more) if more == ("refit",) else more
    swept(home, "llama", tmp_path / "out", by, *options)
    found = report(tmp_path / "out")
    assert all(
        rule["reconstructed"] == (options[1] if "refit" in more else "admm") for rule in found["rules"]
    )
    assert found["totals"]["output_error"] < found["totals"]["output_error_masked"]
    assert run("verify", tmp_path / "out", by, *(more if "refit" not in more else ())).code == 0
    assert not [one.name for one in tmp_path.iterdir() if one.name.startswith(".out")]


def test_what_is_cut_out_of_nested_scopes_leaves_a_rebuilt_pattern(home: Path, tmp_path: Path) -> None:
    by = "mlp-channels-2of4"
    swept(home, "llama", tmp_path / "out", by)
    assert run("remove", *words(home, "llama", by, "-o", tmp_path / "smaller")).code == 0
    assert run("verify", tmp_path / "smaller", "2of4").code == 0
    whole, smaller = weights(tmp_path / "out"), weights(tmp_path / "smaller")
    name = "model.layers.0.mlp.up_proj.weight"
    alive = (whole[name] != 0).any(1)
    assert torch.equal(smaller[name], whole[name][alive])
    down = name.replace("up", "down")
    assert torch.equal(smaller[down], whole[down][:, alive])


def test_levels_that_wait_for_a_text_and_are_not_rebuilt_are_refused(home: Path, tmp_path: Path) -> None:
    score = 'score = { kind = "wanda", file = "stats" }\nreconstruct = { method = "none" }\n'
    text = "version = 1\n" + MATRICES.replace("nnz = 2\n", f"nnz = 3\n{score}")
    text += MATRICES.replace("scope.matrix", "scope.inner") + f'within = "matrix"\n{score}'
    said = run("apply", *words(home, "llama", spec(tmp_path, text), "-o", tmp_path / "out"))
    assert said.code == 2
    assert "a sweep decides nested scopes only where it rebuilds them" in said.err
