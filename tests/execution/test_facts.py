"""How patterns and blocks are written, and which matrix a tensor is."""

import pytest

from sparseprune.errors import SparsepruneError
from sparseprune.execution.inspect import BlockShape, Pattern, block_of, matrices_of, pattern_of


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", Pattern(2, 4)),
        ("0:1", Pattern(0, 1)),
        ("16:100", Pattern(16, 100)),
        (" 2:4 ", Pattern(2, 4)),
        ("2:4@0", Pattern(2, 4, 0)),
        ("2:4@-2", Pattern(2, 4, -2)),
        ("2:4@1", Pattern(2, 4, 1)),
        ("1:4@both", Pattern(1, 4, both=True)),
        ("123456789:999999999@12", Pattern(123456789, 999999999, 12)),
    ],
)
def test_a_pattern_is_written_as_it_is_asked_for(text: str, pattern: Pattern) -> None:
    assert pattern_of(text) == pattern
    assert str(pattern) == text.strip()


def test_the_last_dimension_is_meant_where_none_is_named() -> None:
    assert pattern_of("2:4@-1") == pattern_of("2:4")
    assert str(pattern_of("2:4@-1")) == "2:4"


@pytest.mark.parametrize(
    "text",
    [
        "", "2", "2:", ":4", "4:4", "5:4", "0:0", "-1:4", "2:4@", "2:4@x", "2:4@--1", "2:4:8", "2 :4",
        "2:4@1.5",
    ],
)  # fmt: skip
def test_what_is_no_pattern_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(
        SparsepruneError, match="wanted N:M with N less than M, such as 2:4, or N:M@AXIS"
    ) as said:
        pattern_of(text)
    assert str(said.value).startswith(f"--pattern {text}: ")


@pytest.mark.parametrize(
    ("text", "block"), [("8x1", BlockShape(8, 1)), ("1x1", BlockShape(1, 1)), ("32x64", BlockShape(32, 64))]
)
def test_a_block_is_written_as_it_is_asked_for(text: str, block: BlockShape) -> None:
    assert block_of(f" {text}") == block
    assert str(block) == text


@pytest.mark.parametrize("text", ["", "8", "8x", "x8", "0x4", "4x0", "-1x4", "4x4x4", "4X4", "4 x 4"])
def test_what_is_no_block_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SparsepruneError, match="wanted ROWSxCOLUMNS, such as 16x16"):
        block_of(text)


@pytest.mark.parametrize(
    ("shape", "matrices"),
    [
        ((), None),
        ((8,), None),
        ((0,), None),
        ((8, 3), (1, 8, 3)),
        ((0, 3), (1, 0, 3)),
        ((4, 8, 3), (4, 8, 3)),
        ((4, 0, 3), (4, 0, 3)),
        ((4, 8, 3, 3), (1, 4, 72)),
        ((4, 2, 2, 2, 2), (1, 4, 16)),
    ],
)
def test_tensors_are_matrices_stacks_of_them_or_convolutions(
    shape: tuple[int, ...], matrices: tuple[int, int, int] | None
) -> None:
    assert matrices_of(shape) == matrices
