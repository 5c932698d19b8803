"""Masks that hold in training: by any optimizer, however transformers keeps the weights in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparseprune import ShapeMismatchError, SparsityError, keep_masked, load_masks, parameter_masks
from tests.commands import ok, run
from tests.families.models import DECODER, build

pytestmark = pytest.mark.usefixtures("quiet_transformers")


def bits_where_pruned(parameter: Tensor, mask: Tensor) -> int:
    """How many pruned elements are anything but +0.0."""
    pruned = parameter.detach()[~mask]
    return int(pruned.view({2: torch.int16, 4: torch.int32}[pruned.element_size()]).count_nonzero())


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        ids = torch.randint(5, 50, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# -- models of transformers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "spec", "renamed"),
    [
        ("llama", "2of4", 0),
        ("gpt2", "mlp-channels", 0),  # matrices lie the other way round
        ("qwen3_moe", "2of4", 24),  # experts are fused into stacks
        ("mixtral", "expert-channels", 24),
        ("gemma3_with_pictures", "2of4", 26),  # the prefix of the language model is another one
    ],
)
def test_a_trained_model_is_as_sparse_as_its_checkpoint(
    tmp_path: Path, family: str, spec: str, renamed: int
) -> None:
    torch.manual_seed(0)
    model = build(family)
    model.save_pretrained(tmp_path / "dense")
    ok("mask", tmp_path / "dense", spec, "-o", tmp_path / "masks", "-q")
    model = type(model).from_pretrained(tmp_path / "dense").train()
    parameters = dict(model.named_parameters())
    masks = load_masks(tmp_path / "masks")
    assert len(masks.keys() - parameters.keys()) == renamed
    found = parameter_masks(model, tmp_path / "masks")
    assert sum(int((~mask).sum()) for mask in found.values()) == sum(
        int((~mask).sum()) for mask in masks.values()
    )

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    keep_masked(model, tmp_path / "masks", optimizer)
    before = {name: parameters[name].detach().clone() for name in found}
    train(model, optimizer)
    for name, mask in found.items():
        assert bits_where_pruned(parameters[name], mask) == 0
        seen_no_picture = "vision_tower" in name
        assert torch.equal(parameters[name].detach()[mask], before[name][mask]) == seen_no_picture
    model.save_pretrained(tmp_path / "tuned")
    ok("verify", tmp_path / "tuned", spec, "-q")
    ok("verify", tmp_path / "tuned", "--masks", tmp_path / "masks", "-q")


def test_without_it_training_breaks_the_pattern(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "dense")
    ok("apply", tmp_path / "dense", "2of4", "-o", tmp_path / "half", "-q")
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half").train()
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), steps=1)
    model.save_pretrained(tmp_path / "tuned")
    assert run("verify", tmp_path / "tuned", "2of4", "-q").code == 1


def test_stacks_that_lie_transposed_in_the_file_are_turned_as_the_weights_are(tmp_path: Path) -> None:
    """Of a vision-language model with experts; transformers goes by their shape, and saves them turned."""
    import transformers

    text = {**DECODER, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    tower: dict[str, Any] = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
    }  # fmt: skip
    tower |= {"patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=tower)
    transformers.Qwen3VLMoeForConditionalGeneration(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    stacks = {name: weight.mT.contiguous() for name, weight in weights.items() if "experts." in name}
    save_file(weights | stacks, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path)
    masks = {name: weight > 0 for name, weight in stacks.items()}
    parameters = dict(model.named_parameters())
    found = parameter_masks(model, masks)
    assert found.keys() == masks.keys()
    for name, mask in found.items():
        assert torch.equal(mask, parameters[name] > 0)
        assert mask.shape != masks[name].shape


def test_what_transformers_splits_or_transposes_is_found_element_by_element(tmp_path: Path) -> None:
    import transformers
    from transformers.core_model_loading import Chunk, Transpose, WeightConverter

    sizes = {**DECODER, "num_key_value_heads": DECODER["num_attention_heads"]}
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    names = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    model._weight_conversions = [
        WeightConverter("self_attn.qkv.weight", names, operations=[Chunk(dim=0)]),
        WeightConverter("mlp.down.weight", "mlp.down_proj.weight", operations=[Transpose(0, 1)]),
    ]
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    masks = {name: weight > 0 for name, weight in weights.items() if "qkv" in name or "down" in name}
    assert len(masks) == 4
    found = parameter_masks(model, masks)
    parameters = dict(model.named_parameters())
    assert len(found) == 8
    for name, mask in found.items():
        assert torch.equal(mask, parameters[name] > 0)


def test_a_checkpoint_with_or_without_a_head_fits_models_with_and_without(tmp_path: Path) -> None:
    import transformers

    with_head, without = build("llama"), build("llama_without_head")
    for model, stored in ((with_head, without), (without, with_head)):
        masks = {name: weight > 0 for name, weight in stored.named_parameters() if "proj" in name}
        model.load_state_dict(
            {name: weight for name, weight in stored.state_dict().items() if name in model.state_dict()},
            strict=False,
        )
        found = parameter_masks(model, masks)
        assert len(found) == len(masks) == 14
    outer = nn.ModuleDict({"encoder": with_head})  # as in sentence-transformers
    masks = {name: weight > 0 for name, weight in with_head.named_parameters()}
    found = parameter_masks(outer, masks)
    for name, weight in outer.named_parameters():
        assert torch.equal(found[name], weight > 0)
    assert isinstance(with_head, transformers.PreTrainedModel)


# -- any module of torch, any optimizer --------------------------------------------------------------


def small() -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


MASKS = {
    "0.weight": torch.arange(32).reshape(8, 4) % 3 > 0,
    "2.weight": torch.arange(16).reshape(2, 8) % 2 > 0,
    "0.bias": torch.arange(8) > 1,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda given: torch.optim.AdamW(given, lr=0.1, weight_decay=0.5),
    "fused AdamW": lambda given: torch.optim.AdamW(given, lr=0.1, fused=True),
    "AMSGrad": lambda given: torch.optim.Adam(given, lr=0.1, amsgrad=True),
    "SGD": lambda given: torch.optim.SGD(given, lr=0.1),
    "SGD with momentum": lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda given: torch.optim.RMSprop(given, lr=0.1),
}


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, number: int, *, of: int = 1, half: bool = False
) -> None:
    """One step, of the gradients of `of` batches."""
    for part in range(of):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(100 * number + part))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = (model(inputs) - 1).pow(2).mean()
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("kind", "half", "batches"),
    [(kind, False, 1) for kind in OPTIMIZERS]
    + [
        (kind, *rest)
        for kind in ("AdamW", "SGD with momentum")
        for rest in ((True, 1), (False, 2), (True, 2))
    ],
)
def test_every_optimizer_trains_what_is_left_and_nothing_else(kind: str, half: bool, batches: int) -> None:
    """The survivors get the bits that they get where zeros are written by hand after each step."""
    model, plain = small(), small()
    optimizer, other = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](plain.parameters())
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    keep_masked(model, MASKS, optimizer)
    by_hand = dict(plain.named_parameters())
    for number in range(4):
        with torch.no_grad():
            for name, mask in MASKS.items():
                by_hand[name][~mask] = 0
        for name, weight in model.named_parameters():
            assert torch.equal(weight, by_hand[name])
            assert name not in MASKS or bits_where_pruned(weight, MASKS[name]) == 0
        step(model, optimizer, number, of=batches, half=half)
        step(plain, other, number, of=batches, half=half)
    for name, mask in MASKS.items():
        assert bool((dict(model.named_parameters())[name] != start[name])[mask].any())


def test_nan_and_negative_zero_become_zero() -> None:
    model = small().to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = keep_masked(model, MASKS, optimizer)
    weight, mask = model[0].weight, MASKS["0.weight"]
    for strange in (float("nan"), -0.0, float("inf")):
        with torch.no_grad():
            weight[~mask] = strange
        assert bits_where_pruned(weight, mask)
        optimizer.step()
        assert bits_where_pruned(weight, mask) == 0
    model.load_state_dict(small().state_dict())
    assert bits_where_pruned(weight, mask)
    kept.apply()
    assert bits_where_pruned(weight, mask) == 0
    assert weight.requires_grad


def test_a_step_that_a_scaler_skips_changes_nothing() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    keep_masked(model, MASKS, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf"), 1.0):
        before = model[0].weight.detach().clone()
        scaler.scale(model(torch.ones(3, 4)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model[0].weight) == (factor == float("inf"))
        assert bits_where_pruned(model[0].weight, MASKS["0.weight"]) == 0


def test_removed_masks_hold_no_longer() -> None:
    model = small()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.AdamW(model[2].parameters(), lr=0.1)
    kept = keep_masked(model, MASKS, first, second)
    step(model, first, 0)
    step(model, second, 0)
    for name, mask in MASKS.items():
        assert bits_where_pruned(dict(model.named_parameters())[name], mask) == 0
    kept.remove()
    step(model, first, 1)
    step(model, second, 1)
    assert bits_where_pruned(model[0].weight, MASKS["0.weight"])
    assert bits_where_pruned(model[2].weight, MASKS["2.weight"])


def test_the_optimizer_inside_that_of_accelerate_is_found() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(small(), torch.optim.SGD(small().parameters(), lr=0.1))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    keep_masked(model, MASKS, optimizer)
    accelerator.backward(model(torch.ones(3, 4)).sum())
    optimizer.step()
    assert bits_where_pruned(model[0].weight, MASKS["0.weight"]) == 0
    assert not torch.equal(model[0].weight, small()[0].weight)


def test_shards_of_a_parameter_get_shards_of_its_mask() -> None:
    distributed: Any = torch.distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = small()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        keep_masked(model, MASKS, optimizer)
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        for name, weight in model.named_parameters():
            assert isinstance(weight, DTensor)
            if name in MASKS:
                assert bits_where_pruned(weight.full_tensor(), MASKS[name]) == 0
    finally:
        distributed.destroy_process_group()


# -- names -------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """What torch.compile, DistributedDataParallel and others do to names."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, inner)


def test_wrapped_modules_have_the_names_of_the_file() -> None:
    inner = small()
    wrapped: list[nn.Module] = [
        Wrapper(inner, "_orig_mod"),
        nn.DataParallel(inner),
        nn.DataParallel(Wrapper(inner, "_orig_mod")),
        Wrapper(nn.DataParallel(inner), "_orig_mod"),
        nn.Sequential(
            Wrapper(inner[0], "_checkpoint_wrapped_module"), inner[1], Wrapper(inner[2], "_orig_mod")
        ),
    ]
    for model in wrapped:
        found = parameter_masks(model, MASKS)
        assert len(found) == 3
        for name, mask in found.items():
            original = next(one for one in MASKS if name.endswith(one[2:]) and MASKS[one].shape == mask.shape)
            assert torch.equal(mask, MASKS[original])
    llama = build("llama")
    masks = {name: weight > 0 for name, weight in llama.named_parameters()}
    for layer, one in enumerate(llama.model.layers):
        llama.model.layers[layer] = Wrapper(one, "_orig_mod")
    found = parameter_masks(nn.DataParallel(llama), masks)
    for name, weight in nn.DataParallel(llama).named_parameters():
        assert torch.equal(found[name], weight > 0)


def test_tied_weights_keep_what_all_of_their_masks_keep() -> None:
    import transformers

    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    one, other = torch.arange(12).reshape(4, 3) % 2 > 0, torch.arange(12).reshape(4, 3) % 3 > 0
    assert parameter_masks(model, {"head.weight": one}).keys() == {"embed.weight"}
    (mask,) = parameter_masks(model, {"head.weight": one, "embed.weight": other}).values()
    assert torch.equal(mask, one & other)
    family = build("gemma")  # whose head is its embedding
    assert family.lm_head.weight is family.model.embed_tokens.weight
    shape = family.lm_head.weight.shape
    one = torch.arange(shape.numel()).reshape(shape) % 2 > 0
    found = parameter_masks(family, {"lm_head.weight": one, "model.embed_tokens.weight": ~one})
    assert {name: int(mask.sum()) for name, mask in found.items()} == {"model.embed_tokens.weight": 0}
    sizes: dict[str, Any] = {
        "vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2,
    }  # fmt: skip
    two_names: Any = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    assert two_names.shared.weight is two_names.encoder.embed_tokens.weight
    two_names.lm_head.weight = two_names.shared.weight
    one = torch.arange(16 * 8).reshape(16, 8) % 2 > 0
    (mask,) = parameter_masks(two_names, {"shared.weight": one, "lm_head.weight": one.flip(0, 1)}).values()
    assert torch.equal(mask, one & one.flip(0, 1))


def test_masks_may_be_numbers_and_are_not_changed() -> None:
    model = small()
    given = {name: mask.to(torch.float32) for name, mask in MASKS.items()}
    found = parameter_masks(model, given)
    assert {name: mask.dtype for name, mask in found.items()} == dict.fromkeys(MASKS, torch.bool)
    for name, mask in found.items():
        assert torch.equal(mask, MASKS[name])
        mask.fill_(False)
        assert MASKS[name].any()
    assert parameter_masks(model, {}) == {}
    assert keep_masked(model, {}).apply() is None


def test_a_mask_without_a_parameter_is_named() -> None:
    model = small()
    with pytest.raises(
        SparsityError, match=r"mask 1.weight and 1 more: Sequential has no parameter"
    ) as caught:
        keep_masked(model, {**MASKS, "1.weight": MASKS["2.weight"], "9.bias": MASKS["0.bias"]})
    assert "leave such masks out" in str(caught.value)
    with pytest.raises(SparsityError, match="mask weight: Sequential has no parameter"):
        keep_masked(model, {"weight": MASKS["0.weight"]})  # behind which of two prefixes?
    with pytest.raises(ShapeMismatchError, match=r"mask 0.weight has shape \[4, 8\], .* in shape \[8, 4\]"):
        keep_masked(model, {"0.weight": MASKS["0.weight"].T})
    stack = nn.ParameterDict({"stack": torch.zeros(2, 3, 4)})
    with pytest.raises(ShapeMismatchError, match=r"mask stack has shape \[2, 4, 3\]"):
        keep_masked(stack, {"stack": torch.ones(2, 4, 3)})
    with pytest.raises(SparsityError, match=r"0.weight has no data \(device meta\)"):
        keep_masked(small().to("meta"), MASKS)
    assert torch.equal(model[0].weight, small()[0].weight)
