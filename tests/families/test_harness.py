"""Every action on a spread of the zoo: each naming scheme and each kind of model; all others by hand."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file

import sparseprune
from tests.families.checkpoints import read
from tests.families.harness import (
    ACTIONS,
    CALIBRATED,
    Outcome,
    Zoo,
    empty_members,
    examine,
    has,
    settle,
    skip,
)
from tests.families.zoo import SPECIES, output

pytestmark = pytest.mark.usefixtures("untraced")
DERIVED = "the class derives the size of a head"
SHARED = "config.json has one for all"
SPREAD: dict[str, dict[str, str]] = {
    # decoders: two or three matrices, fused ones, inputs first, a state instead of attention
    "llama_mlp_bias": {},
    "gemma2": {},
    "phi3": {},
    "gemma4_shared": {"layers": "the last layers share keys and values"},
    "starcoder2": {},
    "opt": {"heads": DERIVED},
    "gpt2": {"heads": DERIVED},
    "gpt_neox": {"heads": DERIVED},
    "mamba2": {},
    # mixtures: lists of experts, stacks, interleaved ones, groups, shared experts, some layers only
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "deepseek_v3": {"expert-channels": SHARED},
    "gpt_oss": {},
    "llama4_text": {"expert-channels": SHARED},
    "granitemoeshared": {},
    "dbrx": {"heads": DERIVED},
    "jamba": {"expert-channels": SHARED},
    # encoders, and with decoders
    "bert": {"heads": DERIVED},
    "distilbert": {"heads": DERIVED},
    "modernbert": {"heads": DERIVED},
    "t5_gated": {},
    # pictures and sound
    "beit": {},
    "swin": {"heads": DERIVED},
    "clip": {"heads": DERIVED},
    "gemma3": {},
    "qwen2_5_vl": {"heads": DERIVED},
    "whisper": {"heads": DERIVED},
}
"""Why an action is refused for a type. All others are right, or the type has no such structure."""
OF_TEXT = ("calibrate", "gradients")
MEAN, JOINED, UNTOLD = "norms subtract the mean", "towers are joined by it", "nothing tells which dimension"
HIDDEN = {
    **dict.fromkeys(("starcoder2", "opt", "gpt2", "gpt_neox", "beit", "swin"), MEAN),
    **dict.fromkeys(("clip", "gemma3", "qwen2_5_vl"), JOINED),
    **dict.fromkeys(("bert", "distilbert", "modernbert", "whisper"), UNTOLD),
    "gemma4_shared": "other weights by the hidden size",
    **dict.fromkeys(("mamba2", "jamba"), "state space layers"),
    "dbrx": DERIVED,
}
"""Why the hidden size is refused for a type."""
PARTS = ("jamba",)  # matrices that no rule of four fits


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Zoo]:
    """The checkpoint of a type, made when it is first asked for."""
    return cache(lambda name: settle(SPECIES[name], tmp_path_factory.mktemp("zoo")))


@pytest.mark.parametrize(
    ("name", "action"),
    [(name, action) for name in SPREAD for action in ACTIONS if action not in OF_TEXT or name in CALIBRATED],
)
def test_an_action_is_right_or_refused_with_its_reason(
    name: str, action: str, settled: Callable[[str], Zoo]
) -> None:
    one = settled(name)
    outcome = examine(one, action)
    if reason := HIDDEN.get(name) if action == "hidden" else SPREAD[name].get(action):
        assert outcome.kind == "refused"
        assert reason in outcome.detail
    elif action in {"2of4", *OF_TEXT}:
        assert outcome.kind == "right", outcome.detail
        assert (not outcome.detail) == (action in OF_TEXT or name not in PARTS)
    else:
        assert outcome.kind == ("right" if has(one, action) else "none"), outcome.detail


def tampered(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """From now on removal writes something else."""
    own = sparseprune.remove

    def remove(checkpoint: Path, spec: str, *, output: Path, **options: object) -> object:
        removal = own(checkpoint, spec, output=output, **options)  # type: ignore[arg-type]
        change(output)
        return removal

    monkeypatch.setattr(sparseprune, "remove", remove)


def overwrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(read(folder) | tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_smaller_model_that_computes_something_else_is_wrong(
    settled: Callable[[str], Zoo], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tampered(monkeypatch, lambda folder: overwrite(folder, {name: read(folder)[name].flip(1)}))
    found = examine(settled("llama_mlp_bias"), "mlp-channels")
    assert (found.kind, found.detail[:16]) == ("wrong", "outputs differ b")


def test_a_router_with_the_rows_of_other_experts_is_wrong(
    settled: Callable[[str], Zoo], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.block_sparse_moe.gate.weight"
    tampered(monkeypatch, lambda folder: overwrite(folder, {name: read(folder)[name].flip(0)}))
    found = examine(settled("mixtral"), "experts")
    assert (found.kind, found.detail[:16]) == ("wrong", "outputs differ b")


def test_a_config_that_does_not_fit_is_wrong(
    settled: Callable[[str], Zoo], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = settled("llama_mlp_bias")
    config = (one.folder / "config.json").read_text()

    def as_before(folder: Path) -> None:
        (folder / "config.json").write_text(config)

    tampered(monkeypatch, as_before)
    assert examine(one, "mlp-channels").kind == "wrong"


def test_a_tensor_that_the_class_does_not_know_is_wrong(
    settled: Callable[[str], Zoo], monkeypatch: pytest.MonkeyPatch
) -> None:
    tampered(monkeypatch, lambda folder: overwrite(folder, {"model.more": torch.ones(2)}))
    found = examine(settled("llama_mlp_bias"), "layers")
    assert found == Outcome("wrong", found.detail)
    assert "unexpected_keys" in found.detail


def test_layers_that_end_in_a_norm_are_compared_with_a_model_that_skips_them(
    settled: Callable[[str], Zoo], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    tampered(monkeypatch, lambda folder: overwrite(folder, {name: read(folder)[name].flip(1)}))
    found = examine(settled("bert"), "layers")
    assert (found.kind, found.detail[:16]) == ("wrong", "outputs differ b")


def test_a_model_that_skips_a_layer_computes_what_one_without_it_does(settled: Callable[[str], Zoo]) -> None:
    one = settled("bert")
    skipping, shorter = skip(one.load(one.folder), ["bert.encoder.layer.2"]), one.load(one.folder)
    del shorter.bert.encoder.layer[2]
    assert torch.equal(output(one.species, skipping), output(one.species, shorter))
    assert not torch.allclose(output(one.species, skipping), one.dense, atol=1e-2)


def test_empty_members_are_the_outermost_of_which_every_weight_is_zero(settled: Callable[[str], Zoo]) -> None:
    one = settled("swin")
    model = one.load(one.folder)
    with torch.no_grad():
        for each in model.swin.encoder.layers[1].blocks[2].parameters():
            each.zero_()
        model.swin.encoder.layers[1].blocks[3].layernorm_before.weight.zero_()
    assert empty_members(model) == ["swin.encoder.layers.1.blocks.2"]


def test_what_computes_what_the_dense_model_does_is_wrong(
    settled: Callable[[str], Zoo], tmp_path: Path
) -> None:
    one = settled("llama_mlp_bias")
    sparseprune.remove(one.folder, "mlp-channels", output=tmp_path / "smaller")
    same = replace(one, dense=output(one.species, one.load(tmp_path / "smaller")))
    assert examine(same, "mlp-channels") == Outcome("wrong", "computes what the dense model does")


def test_moments_of_other_inputs_and_gradients_are_wrong(
    settled: Callable[[str], Zoo], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = sparseprune.calibrate

    def calibrate(*given: object, **options: object) -> object:
        return own(*given, **{**options, "seed": 1})  # type: ignore[arg-type]

    monkeypatch.setattr(sparseprune, "calibrate", calibrate)
    for action in OF_TEXT:
        found = examine(settled("llama"), action)
        assert (found.kind, found.detail.split(": ")[1][:10]) == ("wrong", "the moment")
