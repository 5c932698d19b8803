"""Lists of experts that stay: their layouts, what is wrong with one, and what each tensor keeps."""

from typing import Any

import numpy as np
import pytest

from sparseprune.errors import CheckpointError
from sparseprune.removal.lists import kept_experts, kept_tokens
from sparseprune.removal.slices import KeptIndices
from tests.removal import models
from tests.removal.models import DEEPSEEK, GPT_OSS, QWEN3_MOE, Shapes

LISTED = models.mixture(QWEN3_MOE, dense=[0]) | models.experts("model.layers.2.mlp", 24, 7, 4)
STACKED: Shapes = {
    f"model.layers.{layer}.mlp.{name}": shape
    for layer in range(2)
    for name, shape in {
        "router.weight": (4, 24), "router.bias": (4,),
        "experts.gate_up_proj": (4, 24, 14), "experts.gate_up_proj_bias": (4, 14),
        "experts.down_proj": (4, 7, 24), "experts.down_proj_bias": (4, 24),
    }.items()
}  # fmt: skip
BOTH_SIDES = {
    name.replace("model.layers", f"{side}.layers"): shape
    for side in ("encoder", "decoder")
    for name, shape in models.experts("model.layers.1.mlp", 24, 7, 4).items()
}


def gone(kept: dict[str, KeptIndices]) -> dict[int, set[int]]:
    """The experts of which nothing is left, by layer."""
    found: dict[int, set[int]] = {}
    for name, each in kept.items():
        pieces = name.split(".")
        assert each.is_empty
        found.setdefault(int(pieces[2]), set()).add(int(pieces[5]))
    return found


@pytest.mark.parametrize(
    "listed",
    [
        [3, 0],
        [[0, 3], [0, 3]],
        ([0, 3], [3, 0]),
        {"1": [0, 3], "2": [0, 3]},
        {2: [0, 3], 1: [0, 3]},
        {"model.layers.1.mlp.experts": [0, 3], "2": [0, 3]},
    ],
    ids=str,
)
def test_every_layout_says_the_same(listed: object) -> None:
    kept = kept_experts(listed, LISTED, QWEN3_MOE)
    assert gone(kept) == {1: {1, 2}, 2: {1, 2}}
    assert len(kept) == 2 * 2 * 3


def test_layers_may_keep_unlike_experts() -> None:
    kept = kept_experts([[0, 1], [2, 3]], LISTED, QWEN3_MOE)
    assert gone(kept) == {1: {2, 3}, 2: {0, 1}}


def test_stacks_lose_the_slices_of_their_experts() -> None:
    kept = kept_experts([[0, 2, 3], [1]], STACKED, GPT_OSS)
    assert sorted(kept) == sorted(name for name in STACKED if ".experts." in name)
    for name, each in kept.items():
        stays = [True, False, True, True] if ".0." in name else [False, True, False, False]
        assert each.along[0].tolist() == stays
        assert all(flags.all() for flags in each.along[1:])


def test_stacks_in_groups_are_counted_through() -> None:
    shapes = {"model.layers.0.mlp.experts.down_proj": (8, 7, 24)}
    kept = kept_experts([1, 6], shapes, {**DEEPSEEK, "n_group": 2})
    ((_, each),) = kept.items()
    assert np.flatnonzero(each.along[0]).tolist() == [1, 6]


def test_nothing_is_cut_where_all_experts_stay() -> None:
    assert kept_experts([0, 1, 2, 3], LISTED, QWEN3_MOE) == {}
    assert kept_experts([0, 1, 2, 3], STACKED, GPT_OSS) == {}


HAS = "it has 4 experts, 0 to 3"
FIRST = "model.layers.1.mlp.experts"
LAYOUTS = (
    "wanted the numbers of experts that stay: one list for all layers, a list with one for each layer that "
    'has experts, or an object such as {"3": [0, 1, 5]}'
)
WRONG: list[tuple[Any, list[str]]] = [
    ([], [f"holds [], {LAYOUTS}"]),
    (7, [f"holds 7, {LAYOUTS}"]),
    ([0, "1"], [f'holds [0, "1"], {LAYOUTS}']),
    ([True, False], [f"holds [true, false], {LAYOUTS}"]),
    ([[0], 1], [f"holds [[0], 1], {LAYOUTS}"]),
    ([[0, 1]], [f"wanted a list for each of {FIRST} to model.layers.2.mlp.experts, 2 in all; found 1"]),
    (
        [0, 4],
        [f"model.layers.{layer}.mlp.experts: 4 is no expert: {HAS}" for layer in (1, 2)],
    ),
    ([[0, 1], [-1, 2]], [f"model.layers.2.mlp.experts: -1 is no expert: {HAS}"]),
    ([[0, 1.0], [1, 2]], [f"{FIRST}: 1.0 is no expert: {HAS}"]),
    ([[0, 1, 0], [1, 2]], [f"{FIRST}: 0 stands twice"]),
    ({"1": [0, 1]}, ["there is no list for model.layers.2.mlp.experts, which has experts"]),
    ({"1": [0], "2": [1], "0": [1]}, ["layer 0 has no experts; those with experts are 1, 2"]),
    ({"1": 3, "2": [1]}, ["1: holds 3, wanted a list of numbers of experts"]),
    ({"1": [3], FIRST: [3], "2": [1]}, [f"{FIRST} stands twice, by its name and by the number of its layer"]),
    (
        {"model.layers.1.mlp.expert": [0], "2": [1]},
        [f"model.layers.1.mlp.expert is no module with experts; the nearest name is {FIRST}"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("listed", "lines"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_list_is_refused_line_by_line(listed: object, lines: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        kept_experts(listed, LISTED, QWEN3_MOE)
    assert list(caught.value.args) == lines


def test_a_number_that_is_a_layer_of_two_lists_is_no_name() -> None:
    names = "decoder.layers.1.mlp.experts and encoder.layers.1.mlp.experts"
    with pytest.raises(CheckpointError, match=f"layer 1 is {names}: give their names in place of the number"):
        kept_experts({"1": [0]}, BOTH_SIDES, {})
    listed = {"encoder.layers.1.mlp.experts": [0, 1], "decoder.layers.1.mlp.experts": [0, 2]}
    assert len(kept_experts(listed, BOTH_SIDES, {})) == 2 * 2 * 3


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no routed experts under names that are known"):
        kept_experts([0], models.decoder(models.LLAMA), models.LLAMA)


# -- tokens


HEADED = {**models.decoder(models.LLAMA), "lm_head.weight": (50, 24), "lm_head.bias": (50,)}
SAID = "wanted a list of the ids of the tokens that stay"
WRONG_TOKENS: list[tuple[Any, str]] = [
    ([], f"holds [], {SAID}"),
    ({"0": 1}, f"holds a table, {SAID}"),
    ([0, True], f"holds [0, true], {SAID}"),
    ([0, 1.5], f"holds [0, 1.5], {SAID}"),
    ([0, 50], "50 is no token: there are 50, 0 to 49"),
    ([-1, 0], "-1 is no token: there are 50, 0 to 49"),
    ([3, 3], "3 stands twice: wanted ids in ascending order, each once"),
    ([3, 2], "3 stands before 2: wanted ids in ascending order, each once"),
]


@pytest.mark.parametrize(("listed", "line"), WRONG_TOKENS, ids=lambda value: str(value)[:30])
def test_a_wrong_list_of_tokens_is_refused(listed: object, line: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        kept_tokens(listed, HEADED, models.LLAMA)
    assert caught.value.args == (line,)


@pytest.mark.parametrize("ids", [[0], [49], [0, 7, 49], list(range(49))])
def test_embeddings_and_heads_keep_the_listed_rows(ids: list[int]) -> None:
    kept = kept_tokens(ids, HEADED, models.LLAMA)
    assert sorted(kept) == ["lm_head.bias", "lm_head.weight", "model.embed_tokens.weight"]
    for each in kept.values():
        assert np.flatnonzero(each.along[0]).tolist() == ids
        assert each.cut == (0,)


def test_no_row_goes_where_all_tokens_stay() -> None:
    assert kept_tokens(list(range(50)), HEADED, models.LLAMA) == {}


def test_heads_of_speculative_layers_are_cut_too() -> None:
    more = {
        "model.layers.3.embed_tokens.weight": (50, 24),
        "model.layers.3.shared_head.head.weight": (50, 24),
        "final_logits_bias": (1, 50),
    }
    kept = kept_tokens([1, 2], HEADED | more, models.LLAMA)
    assert more.keys() < kept.keys()
    assert kept["final_logits_bias"].shape == (1, 2)


def test_a_row_of_another_count_is_refused() -> None:
    shapes = HEADED | {"model.embed_tokens.weight": (64, 24)}
    line = "model.embed_tokens.weight has 64 rows, config.json says 50 for vocab_size"
    with pytest.raises(CheckpointError, match=line):
        kept_tokens([0, 1], shapes, models.LLAMA)
