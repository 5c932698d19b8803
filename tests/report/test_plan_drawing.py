"""Drawings as they are read: whole lines for the patterns that users know, and what colour adds."""

import io
from itertools import pairwise

import pytest
from rich.console import Console

from sparseprune.engine.grids import Shape
from sparseprune.report.drawings import RuleDrawing
from sparseprune.spec import (
    BoundBlock,
    BoundBlockCoupling,
    BoundInstance,
    BoundRule,
    BoundScope,
    BoundScopeCoupling,
    Budget,
)

AnyScope = BoundScope | BoundScopeCoupling


def block(
    name: str, shape: Shape, extents: Shape, view: tuple[Shape, Shape, int] | None = None
) -> BoundBlock:
    """Blocks of a whole matrix, or of a view (shape, strides, offset) of a tensor."""
    return BoundBlock(name, name, *(view or (shape, (shape[-1], 1), 0)), extents)


def rule(scope: AnyScope) -> BoundRule:
    return BoundRule("scope.s", (BoundInstance("s[layer=0]", (), scope, Budget(nnz=1)),))


def drawn(
    scope: AnyScope, shapes: dict[str, Shape], width: int = 80, *, colour: bool | None = None
) -> list[str]:
    """The lines of a drawing on a console of this width."""
    console = Console(
        file=io.StringIO(),
        width=width,
        legacy_windows=False,
        force_terminal=colour is not None,
        no_color=not colour,
    )
    with console.capture() as captured:
        console.print(RuleDrawing(rule(scope), shapes))
    return [line.rstrip() for line in captured.get().splitlines()]


TWO_OF_FOUR = BoundScope("s", block("w", (4, 32), (1, 1)), (1, 4))
COUPLED = BoundScope("s", block("w", (2, 32), (1, 1, 1, 2), ((2, 2, 8, 2), (32, 16, 1, 8), 0)), (1, 1, 4, 1))
SIXTEEN = BoundScope("s", block("w", (16, 64), (1, 16)), (8, 1))
CHANNEL = BoundScope(
    "mlp",
    BoundBlockCoupling(
        "channel",
        (
            block("l.0.gate.weight", (32, 64), (1, 64)),
            block("l.0.up.weight", (32, 64), (1, 64)),
            block("l.0.down.weight", (64, 32), (64, 1)),
        ),
        ((0, 1), (0, 1), (1, 0)),
    ),
    (32, 1),
)
CHANNEL_SHAPES: dict[str, Shape] = {
    "l.0.gate.weight": (32, 64),
    "l.0.up.weight": (32, 64),
    "l.0.down.weight": (64, 32),
}
HEADS = BoundScope(
    "attention",
    BoundBlockCoupling(
        "head",
        (
            block("q", (64, 64), (1, 32, 64), ((2, 32, 64), (2048, 64, 1), 0)),
            block("k", (32, 64), (1, 16, 64), ((2, 16, 64), (1024, 64, 1), 0)),
            block("o", (64, 64), (64, 1, 32), ((64, 2, 32), (64, 32, 1), 0)),
        ),
        ((0, 1, 2), (0, 1, 2), (1, 0, 2)),
    ),
    (2, 1, 1),
)


def test_two_of_four() -> None:
    assert drawn(TWO_OF_FOUR, {"w": (4, 32)}) == [
        "s[layer=0]",
        "w",
        "4x32",
        "  0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15",
        "0 a0 a1 a2 a3 b0 b1 b2 b3 c0 c1 c2 c3 d0 d1 d2 d3 …",
        "1 e0 e1 e2 e3 f0 f1 f2 f3 g0 g1 g2 g3 h0 h1 h2 h3 …",
        "2 i0 i1 i2 i3 j0 j1 j2 j3 k0 k1 k2 k3 l0 l1 l2 l3 …",
        "3 m0 m1 m2 m3 n0 n1 n2 n3 o0 o1 o2 o3 p0 p1 p2 p3 …",
        "letter: scope, a is the first one; number: block in the scope",
    ]


def test_coupled_two_of_four_shows_its_pairs_eight_columns_apart() -> None:
    assert drawn(COUPLED, {"w": (2, 32)})[3:6] == [
        "  0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15",
        "0 a0 a1 a2 a3 b0 b1 b2 b3 a0 a1 a2 a3 b0 b1 b2 b3 …",
        "1 c0 c1 c2 c3 d0 d1 d2 d3 c0 c1 c2 c3 d0 d1 d2 d3 …",
    ]


def test_sixteen_columns_are_cut_in_their_middle() -> None:
    lines = drawn(SIXTEEN, {"w": (16, 64)})
    assert lines[3:5] == [
        "  0  1     15 16 17    31 32 33    47 48 49    63",
        "0 a0 a0 …  a0 b0 b0 …  b0 c0 c0 …  c0 d0 d0 …  d0",
    ]
    assert lines[11:13] == [
        "7 a7 a7 …  a7 b7 b7 …  b7 c7 c7 …  c7 d7 d7 …  d7",
        "⋮ ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮",
    ]


def test_a_channel_is_a_row_in_two_members_and_a_column_in_the_third() -> None:
    lines = drawn(CHANNEL, CHANNEL_SHAPES)
    assert lines[:8] == [
        "s[layer=0] in l.0",
        "gate.weight      up.weight        down.weight",
        "32x64            32x64            64x32",
        "  0  1     63      0  1     63       0  1  2  3  4  5  6  7",
        "0 a0 a0 …  a0    0 a0 a0 …  a0     0 a0 a1 a2 a3 a4 a5 a6 a7 …",
        "1 a1 a1 …  a1    1 a1 a1 …  a1     1 a0 a1 a2 a3 a4 a5 a6 a7 …",
        "2 a2 a2 …  a2    2 a2 a2 …  a2     ⋮ ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮",
        "3 a3 a3 …  a3    3 a3 a3 …  a3    63 a0 a1 a2 a3 a4 a5 a6 a7 …",
    ]
    assert lines[-1] == "letter: scope; number: block in the scope; cells alike are one block"


def test_heads_are_rows_of_query_and_key_and_columns_of_the_output() -> None:
    assert drawn(HEADS, {"q": (64, 64), "k": (32, 64), "o": (64, 64)})[1:] == [
        "q                 k                 o",
        "64x64             32x64             64x64",
        "   0  1     63       0  1     63       0  1     31 32 33    63",
        " 0 a0 a0 …  a0     0 a0 a0 …  a0     0 a0 a0 …  a0 a1 a1 …  a1",
        " 1 a0 a0 …  a0     1 a0 a0 …  a0     1 a0 a0 …  a0 a1 a1 …  a1",
        " ⋮ ⋮  ⋮  ⋮  ⋮      ⋮ ⋮  ⋮  ⋮  ⋮      ⋮ ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮  ⋮",
        "31 a0 a0 …  a0    15 a0 a0 …  a0    63 a0 a0 …  a0 a1 a1 …  a1",
        "32 a1 a1 …  a1    16 a1 a1 …  a1",
        "33 a1 a1 …  a1    17 a1 a1 …  a1",
        " ⋮ ⋮  ⋮  ⋮  ⋮      ⋮ ⋮  ⋮  ⋮  ⋮",
        "63 a1 a1 …  a1    31 a1 a1 …  a1",
        "letter: scope; number: block in the scope; cells alike are one block",
    ]


def test_members_stand_below_each_other_where_the_terminal_is_narrow() -> None:
    lines = drawn(CHANNEL, CHANNEL_SHAPES, width=60)
    assert lines[1] == "gate.weight      up.weight"
    assert "down.weight" in lines


def test_of_many_scopes_that_compete_two_are_drawn() -> None:
    members = tuple(BoundScope(f"s{at}", block(f"w{at}", (2, 4), (1, 1)), (2, 4)) for at in range(5))
    scope = BoundScopeCoupling("all", members, ((0, 1),) * 5)
    lines = drawn(scope, {f"w{at}": (2, 4) for at in range(5)})
    assert lines[1:] == [
        "w0               w1",
        "2x4              2x4",
        "  0  1  2  3       0   1   2   3",
        "0 a0 a1 a2 a3    0 a8  a9  a10 a11",
        "1 a4 a5 a6 a7    1 a12 a13 a14 a15",
        "and 3 more tensors in the same scopes",
        "letter: scope; number: block in the scope; cells alike are one block",
    ]


def test_other_ranks_say_which_dimensions_are_shown() -> None:
    bound = BoundBlock("w", "w", (4, 3, 3), (9, 3, 1), 0, (1, 3, 3))
    assert drawn(BoundScope("s", bound, (4, 1, 1)), {"w": (4, 3, 3)})[2] == "4x3x3, dimensions 0 and 1"
    sliced = BoundBlock("w", "w", (1, 3, 3), (9, 3, 1), 18, (1, 1, 1))
    assert drawn(BoundScope("s", sliced, (1, 1, 3)), {"w": (4, 3, 3)})[2] == (
        "4x3x3, dimensions 1 and 2 from [2, 0, 0]"
    )
    assert drawn(BoundScope("s", block("w", (0, 8), (1, 8)), (1, 1)), {"w": (0, 8)})[2] == "0x8: no elements"


def test_what_lies_outside_a_view_is_a_dot() -> None:
    bound = block("w", (4, 4), (1, 1), ((2, 4), (4, 1), 4))
    assert drawn(BoundScope("s", bound, (1, 4)), {"w": (4, 4)})[2:7] == [
        "4x4 from [1, 0]", "  0  1  2  3", "1 a0 a1 a2 a3", "2 b0 b1 b2 b3", "3 ·  ·  ·  ·",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize(
    ("scope", "shapes"),
    [(TWO_OF_FOUR, {"w": (4, 32)}), (SIXTEEN, {"w": (16, 64)}), (CHANNEL, CHANNEL_SHAPES)],
)
def test_drawings_fit_the_width(scope: AnyScope, shapes: dict[str, Shape], width: int) -> None:
    assert max(map(len, drawn(scope, shapes, width))) <= width


def test_wide_numbers_leave_room_for_fewer_columns() -> None:
    wide = BoundScope("s", block("w", (10**6, 10**6), (1, 1)), (10**6, 10**6))
    lines = drawn(wide, {"w": (10**6, 10**6)}, 60)
    assert lines[4].split()[:3] == ["0", "a0", "a1"]
    assert lines[5].split()[:2] == ["1", "a1000000"]
    assert max(map(len, lines)) <= 60


def test_colour_joins_the_cells_of_a_block_and_tells_scopes_apart() -> None:
    coloured = drawn(SIXTEEN, {"w": (16, 64)}, colour=True)[4]
    assert coloured.count("\x1b[") >= 8
    plain = drawn(SIXTEEN, {"w": (16, 64)}, colour=False)[4]
    assert "48;" not in plain


def test_every_scope_has_another_colour_than_its_neighbours() -> None:
    console = Console(
        file=io.StringIO(), width=80, color_system="truecolor", force_terminal=True, no_color=False
    )
    lines = console.render_lines(RuleDrawing(rule(TWO_OF_FOUR), {"w": (4, 32)}))
    grounds = [
        [
            segment.style.bgcolor.name if segment.style and segment.style.bgcolor else None
            for segment in line
            if segment.text.strip() and segment.text[0].isalpha()
        ][:16]
        for line in lines[4:8]
    ]
    assert all(len(set(row)) == 4 for row in grounds)
    assert all(
        one != other for row, below in pairwise(grounds) for one, other in zip(row, below, strict=True)
    )
