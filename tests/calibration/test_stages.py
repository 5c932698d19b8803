"""Stages of blocks, and the sums that outputs of matrices end in, against hooks on whole models."""

import copy
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseprune.calibration import Sequences, load_model
from sparseprune.calibration.stages import Following
from sparseprune.calibration.sweeping import Look, Sweep
from sparseprune.checkpoint import TensorReader, open_checkpoint
from tests.calibration.models import save, save_family, t5, tokenizer
from tests.families import zoo
from tests.families.models import FAMILIES, build

pytestmark = pytest.mark.usefixtures("quiet_transformers")

IDS = torch.randint(4, 50, (3, 8), generator=torch.Generator().manual_seed(2))


def fresh(name: str) -> Any:
    """A model in float64, with the random weights of its class."""
    if name == "t5":
        torch.manual_seed(5)
        return t5().double().eval()
    torch.manual_seed(5)
    species = {one.name: one for one in zoo.ZOO}
    model = build(name) if name in FAMILIES else zoo.build(species[name])
    if name == "mixtral":  # other code takes no float64
        model.set_experts_implementation("eager")
    return model.double().eval()


# By family: a block, a matrix of it, a module whose input (<) or output (>) is the sum of its outputs.
SUMS = [
    ("llama", "model.layers.1", "self_attn.o_proj", "<post_attention_layernorm"),
    ("llama", "model.layers.1", "mlp.down_proj", ">"),
    ("gpt2", "transformer.h.1", "attn.c_proj", "<ln_2"),
    ("gpt2", "transformer.h.1", "mlp.c_proj", ">"),
    ("bert", "encoder.layer.1", "attention.output.dense", "<attention.output.LayerNorm"),
    ("bert", "encoder.layer.1", "output.dense", "<output.LayerNorm"),
    ("t5", "encoder.block.1", "layer.0.SelfAttention.o", "<layer.1.layer_norm"),
    ("t5", "decoder.block.1", "layer.1.EncDecAttention.o", "<layer.2.layer_norm"),
    ("t5", "decoder.block.1", "layer.2.DenseReluDense.wo", ">"),
    ("gptj", "transformer.h.1", "attn.out_proj", ">"),
    ("gptj", "transformer.h.1", "mlp.fc_out", ">"),
    ("falcon", "transformer.h.1", "self_attention.dense", ">"),
    ("falcon", "transformer.h.1", "mlp.dense_4h_to_h", ">"),
    ("cohere", "model.layers.1", "self_attn.o_proj", ">"),
    ("cohere", "model.layers.1", "mlp.down_proj", ">"),
    ("mixtral", "model.layers.1", "self_attn.o_proj", "<post_attention_layernorm"),
]
NO_SUM = [
    ("gemma2", "model.layers.1", "self_attn.o_proj"),  # a norm stands before the sum
    ("gemma2", "model.layers.1", "mlp.down_proj"),
    ("gemma3", "model.layers.1", "mlp.down_proj"),
    ("llama", "model.layers.1", "mlp.up_proj"),
    ("llama", "model.layers.1", "self_attn.v_proj"),
]


def passed(model: Any, block: str, matrix: str, place: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """What outputs of a matrix are added to in a pass, its inputs, and the sum at a place."""
    seen: dict[str, torch.Tensor] = {}

    def keep(which: str) -> Any:
        def hook(_: Any, inputs: Any, kwargs: Any, output: Any) -> None:
            given = (*inputs, *kwargs.values())[0]
            made = output if isinstance(output, torch.Tensor) else output[0]
            seen[which] = (made if place[0] == ">" and which == "sum" else given).detach().clone()

        return hook

    at = f"{block}.{place[1:]}".rstrip(".")
    hooks = [
        model.get_submodule(name).register_forward_hook(keep(which), with_kwargs=True)
        for name, which in ((f"{block}.{matrix}", "inputs"), (at, "sum"))
    ]
    name = f"{block}.{matrix}.weight"
    given = {"decoder_input_ids": IDS.flip(0)} if model.config.is_encoder_decoder else {}
    following = Following(model, lambda _: None, [name])
    with closing(following), torch.no_grad():
        following.begin(torch.ones_like(IDS, dtype=torch.bool))
        with following:
            model(input_ids=IDS, **given)
        beside = following.beside(name)
    for one in hooks:
        one.remove()
    inputs, total = (seen[one].reshape(-1, seen[one].shape[-1]) for one in ("inputs", "sum"))
    return beside, inputs, total


def with_noise(model: Any) -> Any:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for one in other.parameters():
            if one.ndim > 1:
                noise = torch.randn(one.shape, generator=generator, dtype=one.dtype)
                one.add_(0.1 * one.std() * noise)
    return other


@pytest.mark.parametrize(("family", "block", "matrix", "place"), SUMS)
def test_what_sums_differ_by_is_what_inputs_and_addends_differ_by(
    family: str, block: str, matrix: str, place: str
) -> None:
    dense = fresh(family)
    pruned = with_noise(dense)
    same = dense.get_submodule(f"{block}.{matrix}")
    pruned.get_submodule(f"{block}.{matrix}").load_state_dict(same.state_dict())
    (one, x, z), (other, y, w) = (passed(each, block, matrix, place) for each in (dense, pruned))
    weight = same.weight.detach()
    weight = weight.T if "Conv1D" in type(same).__name__ else weight
    assert one is not None
    assert float((z - w).norm()) > 0
    torch.testing.assert_close(z - w, (x - y) @ weight.T + (one - other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "block", "matrix"), NO_SUM)
def test_outputs_that_are_added_to_nothing_as_they_are_have_nothing_beside_them(
    family: str, block: str, matrix: str
) -> None:
    beside, _, _ = passed(fresh(family), block, matrix, ">")
    assert beside is None


@contextmanager
def looked(path: Path, number: int, ids: torch.Tensor = IDS) -> Iterator[tuple[str, Look]]:
    """What a sweep sees of a block."""
    with TensorReader() as reader:
        loaded = load_model(open_checkpoint(path), "cpu", reader)
        read = loaded.read(reader)
        sequences = Sequences(ids, torch.ones_like(ids, dtype=torch.bool), len(ids))
        with Sweep(loaded, sequences, (read, read), (path, 1 << 30), targets=False) as sweep:
            for _ in range(number):
                name = str(sweep.at)
                sweep.open(name)
                sweep.go(name)
            name = str(sweep.at)
            sweep.open(name)
            yield name, sweep.look(name)


def saved(family: str, folder: Path) -> Path:
    if family == "t5":
        return save(t5(), folder / family)
    if family in FAMILIES:
        return save_family(family, folder / family)
    zoo.save(next(one for one in zoo.ZOO if one.name == family), folder)
    tokenizer().save_pretrained(folder / family)
    return folder / family


def stages(name: str, look: Look) -> list[set[str]]:
    """Matrices by their depths, without the name of the block and of projections."""
    found: dict[int, set[str]] = {}
    for one, depth in look.depths.items():
        short = one.removeprefix(f"{name}.").removesuffix(".weight").removesuffix("_proj")
        found.setdefault(depth, set()).add(short)
    return [found[depth] for depth in sorted(found)]


ATTENTION = [{"self_attn.q", "self_attn.k", "self_attn.v"}, {"self_attn.o"}]


@pytest.mark.parametrize(
    ("family", "number", "wanted"),
    [
        ("llama", 0, [*ATTENTION, {"mlp.gate", "mlp.up"}, {"mlp.down"}]),
        ("phi3", 0, [{"self_attn.qkv"}, {"self_attn.o"}, {"mlp.gate_up"}, {"mlp.down"}]),
        (
            "gptj",
            1,
            [{"attn.q", "attn.k", "attn.v", "mlp.fc_in"}, {"attn.out", "mlp.fc_out"}],
        ),
        (
            "deepseek_v3",
            0,
            [
                {"self_attn.q_a", "self_attn.kv_a_proj_with_mqa"},
                {"self_attn.q_b", "self_attn.kv_b"},
                {"self_attn.o"},
                {"mlp.gate", "mlp.up"},
                {"mlp.down"},
            ],
        ),
    ],
)
def test_stages_are_what_depends_on_nothing_that_is_not_pruned_yet(
    family: str, number: int, wanted: list[set[str]], tmp_path: Path
) -> None:
    with looked(saved(family, tmp_path), number) as (name, look):
        assert stages(name, look) == wanted
        assert not look.again


def test_cross_attention_has_keys_of_the_encoder_in_the_first_stage(tmp_path: Path) -> None:
    with looked(saved("t5", tmp_path), 2) as (name, look):
        found = stages(name, look)
    assert name == "decoder.block.0"
    assert {"layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"} <= found[0]
    depth = {one: number for number, some in enumerate(found) for one in some}
    order = ["SelfAttention.o", "EncDecAttention.q", "EncDecAttention.o", "DenseReluDense.wi"]
    order = [next(key for key in depth if key.endswith(f".{one}")) for one in order]
    assert [depth[one] for one in order] == sorted({depth[one] for one in order})


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_come_after_the_router_also_those_that_one_sequence_does_not_reach(
    family: str, tmp_path: Path
) -> None:
    path = saved(family, tmp_path)
    depths = []
    for ids in (IDS, IDS[:1, :1]):  # of one token that two experts of four get
        with looked(path, 0, ids) as (_, look):
            depths.append(dict(look.depths))
            assert {one for one in look.routed if "experts" in one} == set(look.routed) != set()
    assert depths[0] == depths[1]
    first, last = (
        {depth for one, depth in depths[0].items() if any(f".experts.{part}" in one for part in parts)}
        for parts in (("gate_up_proj",), ("down_proj",))
    )
    gate = next(depth for one, depth in depths[0].items() if one.endswith(("gate.weight", "router.weight")))
    assert len(first) == len(last) == 1
    assert gate < min(first) < min(last)
