"""Which tensors are listed and in which order: patterns, flat names, natural names, unknown values last."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.errors import SparsepruneError
from sparseprune.report.inspection import flat, natural, ordered, selected
from sparseprune.results.measuring import InspectedTensor, RuntimeVerdict, ZeroBlocks

NAMES = (
    "model.embed.weight", "model.layers.0.up.weight", "model.layers.1.up.weight", "model.layers.1.up.bias",
    "lm_head.weight",
)  # fmt: skip


@pytest.mark.parametrize(
    ("match", "exclude", "numbers"),
    [
        ([], [], [0, 1, 2, 3, 4]),
        (["lm_head.weight"], [], [4]),
        (["**.up.*"], [], [1, 2, 3]),
        (["model.layers.{layer}.up.weight"], [], [1, 2]),
        (["lm_head.*", "*.embed.*"], [], [0, 4]),
        (["**"], ["**.bias"], [0, 1, 2, 4]),
        ([], ["model.**"], [4]),
        ([], ["nothing.of.this.name"], [0, 1, 2, 3, 4]),
        (["model.*.weight"], ["lm_head.weight"], [0]),
    ],
)
def test_names_are_selected_by_patterns_in_their_order(
    match: list[str], exclude: list[str], numbers: list[int]
) -> None:
    assert selected(NAMES, match, exclude) == tuple(NAMES[number] for number in numbers)


@pytest.mark.parametrize(
    ("match", "exclude", "text"),
    [
        (["lm_haed.*"], [], '--match lm_haed.*: matches none of 5 tensors, such as "lm_head.weight"'),
        (["model.layers"], [],
         "--match model.layers: matches none of 5 tensors; did you mean model.layers.**?"),
        (["model.layers."], [],
         "--match model.layers.: matches none of 5 tensors; did you mean model.layers.**?"),
        (["qqq"], [], '--match qqq: matches none of 5 tensors, such as "model.embed.weight"'),
        (["lm_head.weight", "qqq"], [],
         '--match qqq: matches none of 5 tensors, such as "model.embed.weight"'),
        ([], ["**"], "--exclude: of 5 tensors none is left; exclude fewer"),
        (["lm_head.*"], ["**"], "--match and --exclude: of 5 tensors none is left; exclude fewer"),
        (["{"], [], "--match {: character 1: { opens a capture that no } closes: write"),
        ([], ["***"], "--exclude ***: character 1: *** has no meaning"),
        ([""], [], "--match : the pattern is empty"),
    ],
)  # fmt: skip
def test_a_pattern_that_selects_nothing_is_told(match: list[str], exclude: list[str], text: str) -> None:
    with pytest.raises(SparsepruneError) as raised:
        selected(NAMES, match, exclude)
    assert str(raised.value).startswith(text)
    assert "\n" not in str(raised.value)


def test_an_empty_checkpoint_is_selected_whole_and_matches_no_pattern() -> None:
    assert selected([], [], []) == ()
    assert selected([], [], ["**"]) == ()
    with pytest.raises(SparsepruneError, match=r"matches none of 0 tensors$"):
        selected([], ["**"], [])


def tensor(name: str, **facts: Any) -> InspectedTensor:
    unknown: dict[str, Any] = dict.fromkeys(field.name for field in fields(InspectedTensor))
    return InspectedTensor(**unknown | {"name": name, "zero_blocks": {}} | facts)


TENSORS = [
    tensor("h.10.w", numel=8, sparsity=0.5, dtype="F32", zero_blocks={"4x4": ZeroBlocks(zero=3, of=9)},
        shape=(2, 4)),
    tensor("h.9.w", numel=8, dtype="BF16", shape=(8,)),
    tensor("h.1.w", numel=9, sparsity=0.0, dtype="F32", zero_blocks={"4x4": ZeroBlocks(zero=1, of=9)},
        shape=(3, 3)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "order", "reverse"),
    [
        (None, [0, 1, 2], [2, 1, 0]),
        ("name", [2, 1, 0], [0, 1, 2]),
        ("tensor", [2, 1, 0], [0, 1, 2]),
        ("numel", [0, 1, 2], [2, 0, 1]),
        ("sparsity", [2, 0, 1], [0, 2, 1]),
        ("dtype", [1, 0, 2], [0, 2, 1]),
        ("shape", [0, 2, 1], [1, 2, 0]),
        ("zero_blocks_4x4", [2, 0, 1], [0, 2, 1]),
        ("zero-blocks 4x4", [2, 0, 1], [0, 2, 1]),
        ("4x4", [2, 0, 1], [0, 2, 1]),
    ],
)
def test_tensors_are_ordered_by_any_fact_with_the_unknown_last(
    key: str | None, order: list[int], reverse: list[int]
) -> None:
    assert ordered(TENSORS, key, False) == tuple(TENSORS[at] for at in order)
    assert ordered(TENSORS, key, True) == tuple(TENSORS[at] for at in reverse)


def test_a_column_that_is_not_there_is_told_with_the_nearest() -> None:
    with pytest.raises(SparsepruneError, match=r'^--sort sparsty: there is no .* did you mean "sparsity"\?$'):
        ordered(TENSORS, "sparsty", False)
    with pytest.raises(SparsepruneError, match=r"^--sort qq: there is no such column; there is .*dtype"):
        ordered(TENSORS, "qq", False)
    assert ordered([], "qq", False) == ()


@given(st.lists(st.integers(0, 10**30)))
def test_numbers_in_names_are_ordered_as_numbers(numbers: list[int]) -> None:
    names = [f"model.layers.{number}.w" for number in numbers]
    assert sorted(names, key=natural) == [f"model.layers.{number}.w" for number in sorted(numbers)]


@given(st.lists(st.text("a.0129é٣²", max_size=8)))
def test_any_names_have_an_order(names: list[str]) -> None:
    assert sorted(sorted(names, key=natural)) == sorted(names)


def test_nested_facts_get_flat_names() -> None:
    nested = flat(
        tensor(
            "w",
            shape=(1, 2),
            zero_blocks={"4x4": ZeroBlocks(zero=1, of=2)},
            runtimes={"asp": RuntimeVerdict(eligible=False, reason="1-D")},
        )
    )
    assert {key: value for key, value in nested.items() if value is not None} == {
        "name": "w", "shape": (1, 2), "zero_blocks_4x4": 1, "zero_blocks_4x4_of": 2, "runtimes_asp": False,
        "runtimes_asp_reason": "1-D",
    }  # fmt: skip
