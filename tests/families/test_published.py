"""Published layouts: what specs reach in them, how units bind, and what is left after removal."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch

import sparseprune
from tests.families.checkpoints import Tensors, read
from tests.families.harness import Zoo, examine
from tests.families.published import (
    PUBLISHED,
    config_of,
    llava_of_few_keys,
    thinker_and_talker,
)
from tests.families.zoo import LAYERS

pytestmark = pytest.mark.usefixtures("untraced")

MAKERS = {**PUBLISHED, "qwen2_5_omni": thinker_and_talker, "llava of few keys": llava_of_few_keys}
HEADS = tuple(name for name in MAKERS if name.endswith("a head"))
NO_MATRIX = re.compile(
    r"embed|lm_head|shared_head\.head|codec_head|conv1d|mlp\.gate\.weight|shared_expert_gate|^mtp\.fc|^(thinker|talker)\.[a-z_]+\."
    r"(weight|bias)$|thinker_to_talker|multi_modal_projector"
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Zoo]:
    """One of these checkpoints, made when it is first asked for."""
    return cache(lambda name: MAKERS[name](tmp_path_factory.mktemp("published")))


def masks_of(one: Zoo, spec: str, folder: Path, **settings: str) -> Mapping[str, torch.Tensor]:
    masks = folder / f"masks of {one.species.name}"
    sparseprune.mask(one.folder, spec, masks, set=settings)
    return sparseprune.load_masks(masks)


def in_layers(tensors: Tensors) -> set[str]:
    """The matrices inside numbered modules."""
    return {
        name
        for name, each in tensors.items()
        if each.ndim >= 2 and re.search(r"\.\d+\.", name) and not NO_MATRIX.search(name)
    }


@pytest.mark.parametrize("name", MAKERS)
def test_2_of_4_reaches_every_matrix_of_layers_those_of_heads_too(
    name: str, published: Callable[[str], Zoo], tmp_path: Path
) -> None:
    one = published(name)
    masks = masks_of(one, "2of4", tmp_path)
    assert in_layers(read(one.folder)) - set(masks) == set()
    for mask in masks.values():
        assert (~mask).sum() * 2 == mask.numel()


def mlps(tensors: Tensors) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Every gated MLP: what its channels have in each of its matrices, channels first."""
    for name, each in tensors.items():
        if name.endswith("gate_proj.weight"):
            at = name.removesuffix("gate_proj.weight")
            biases = (f"{at}gate_proj.bias", f"{at}up_proj.bias")
            vectors = [tensors[bias][:, None] for bias in biases if bias in tensors]
            yield at, [each, tensors[f"{at}up_proj.weight"], tensors[f"{at}down_proj.weight"].T, *vectors]
        elif name.endswith("experts.gate_up_proj"):
            at = name.removesuffix("gate_up_proj")
            gate, up = each.chunk(2, 1)
            for expert, parts in enumerate(zip(gate, up, tensors[f"{at}down_proj"].mT, strict=True)):
                yield f"{at}{expert}.", list(parts)


@pytest.mark.parametrize("name", MAKERS)
def test_channels_of_each_mlp_compete_among_themselves(
    name: str, published: Callable[[str], Zoo], tmp_path: Path
) -> None:
    one = published(name)
    dense = read(one.folder)
    masks = masks_of(one, "mlp-channels", tmp_path)
    assert {each for each in dense if re.search(r"(gate|up|gate_up|down)_proj(\.weight)?$", each)} <= set(
        masks
    )
    found = 0
    for (at, parts), (_, kept) in zip(mlps(dense), mlps({**dense, **masks}), strict=True):
        squares = sum(part.double().square().sum(1) for part in parts)
        best = torch.zeros(len(parts[0]), dtype=torch.bool)
        best[torch.as_tensor(squares).topk(len(best) * 3 // 4).indices] = True
        for mask in kept:
            assert torch.equal(mask, best[:, None].expand(mask.shape)), at
        found += 1
    assert found


def experts(tensors: Tensors) -> dict[str, dict[int, list[torch.Tensor]]]:
    """The matrices of each expert, by the place of the experts."""
    found: dict[str, dict[int, list[torch.Tensor]]] = {}
    for name, each in tensors.items():
        if match := re.match(r"(.*\.experts)\.(\d+)\.", name):
            found.setdefault(match[1], {}).setdefault(int(match[2]), []).append(each)
        elif match := re.match(r"(.*\.experts)\.(gate_up|down)_proj", name):
            for number, part in enumerate(each):
                found.setdefault(match[1], {}).setdefault(number, []).append(part)
    return found


MIXTURES = tuple(name for name in MAKERS if re.search("moe|next|deepseek", name))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_quarter_of_the_experts_goes_in_every_layer_and_in_the_head(
    name: str, published: Callable[[str], Zoo], tmp_path: Path
) -> None:
    one = published(name)
    places = experts(dict(masks_of(one, "experts", tmp_path)))
    assert places.keys() == experts(read(one.folder)).keys()
    for at, numbered in places.items():
        kept = [all(bool(mask.all()) for mask in masks) for masks in numbered.values()]
        assert kept == [any(bool(mask.any()) for mask in masks) for masks in numbered.values()], at
        assert (len(kept), sum(kept)) == (8, 6), at


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_no_layer_of_the_trunk(name: str, published: Callable[[str], Zoo], tmp_path: Path) -> None:
    """Half of the trunk's layers go, as many as without the head, and nothing of the head."""
    one = published(name)
    head = re.compile(r"mtp\." if name.startswith("qwen") else rf"model\.layers\.{LAYERS}\.")
    masks = masks_of(one, "layers", tmp_path, sparsity="0.5")
    assert all(bool(mask.all()) for each, mask in masks.items() if head.match(each))
    layers: dict[str, bool] = {}
    for tensor, mask in masks.items():
        match = re.match(r"(model\.(?:language_model\.)?layers\.\d+)\.", tensor)
        if match and not head.match(tensor):
            layers[match[1]] = bool(mask.any())
    assert sum(layers.values()) * 2 == len(layers)


def test_layers_of_a_thinker_and_of_a_talker_do_not_compete(
    published: Callable[[str], Zoo], tmp_path: Path
) -> None:
    masks = masks_of(published("qwen2_5_omni"), "layers", tmp_path, sparsity="0.5")
    left: dict[str, set[str]] = {}
    for name, mask in masks.items():
        if match := re.match(
            r"(thinker\.model|talker\.model|thinker\.visual|thinker\.audio_tower)\.\w+\.(\d+)", name
        ):
            left.setdefault(match[1], set()).update([match[2]] if mask.any() else [])
    assert {at: len(kept) for at, kept in left.items()} == {
        "thinker.model": 2, "talker.model": 2, "thinker.visual": 2, "thinker.audio_tower": 2,
    }  # fmt: skip


def test_the_number_of_heads_that_a_config_leaves_out_is_that_of_the_class(
    published: Callable[[str], Zoo], tmp_path: Path
) -> None:
    """Llama has 32, which are of 2 here; Gemma 3 has 8 that share 4 keys, of 256."""
    llava = masks_of(published("llava of few keys"), "heads", tmp_path)
    rows = llava["language_model.model.layers.0.self_attn.q_proj.weight"].all(1).reshape(32, 2)
    assert rows.all(1).sum() == 24
    assert torch.equal(rows.all(1), rows.any(1))
    gemma = masks_of(published("gemma3 of few keys"), "heads", tmp_path)
    for name, heads, kept in (("q", 8, 6), ("k", 4, 3), ("v", 4, 3)):
        mask = gemma[f"language_model.model.layers.5.self_attn.{name}_proj.weight"].reshape(heads, -1)
        assert mask.all(1).sum() == kept
        assert torch.equal(mask.all(1), mask.any(1))


def test_a_width_that_a_config_leaves_out_is_written_once_it_is_smaller(
    published: Callable[[str], Zoo], tmp_path: Path
) -> None:
    one = published("llava of few keys")
    sparseprune.remove(one.folder, "mlp-channels", output=tmp_path / "smaller")
    config = config_of(Zoo(one.species, tmp_path / "smaller", one.dense))
    assert config["text_config"]["intermediate_size"] == 54
    assert config["vision_config"]["intermediate_size"] == 42
    assert "hidden_size" not in config["text_config"]


DERIVED = "heads of model.visual.blocks cannot go: the class derives the size of a head"
SHARED = "shared_experts.down_proj, and config.json has one for all"
REFUSED: Mapping[tuple[str, str], str] = {
    ("qwen3_5 with pictures and a head", "heads"): DERIVED,
    ("qwen3_5_moe with a head", "heads"): DERIVED,
    ("deepseek_v3 with a head", "expert-channels"): SHARED,
    ("glm4_moe with a head", "expert-channels"): SHARED,
}
"""Why an action is refused for a layout; what is not here is right, or there is nothing to remove."""


@pytest.mark.parametrize("action", ["2of4", "mlp-channels", "heads", "experts", "expert-channels", "layers"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_left_loads_and_computes_what_zeros_do(
    name: str, action: str, published: Callable[[str], Zoo]
) -> None:
    outcome = examine(published(name), action)
    if (name, action) in REFUSED:
        assert outcome.kind == "refused"
        assert REFUSED[name, action] in outcome.detail
    elif "expert" in action and name not in MIXTURES:
        assert outcome.kind == "none"
    else:
        assert outcome.kind == "right", outcome.detail
