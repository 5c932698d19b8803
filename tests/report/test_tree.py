"""The tree of names: branches, sums, and what is alike told as one."""

import io

from rich.console import Console

from sparseprune.execution.inspect import Questions, TensorFacts
from sparseprune.report.inspect_table import InspectTree
from sparseprune.report.inspection import make_inspection


def drawn(facts: list[TensorFacts], width: int = 100, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(InspectTree(make_inspection("m", facts, Questions())))
    return captured.get().splitlines()


def tensor(name: str, zeros: int = 0) -> TensorFacts:
    return TensorFacts(name, "F32", (4, 4), 16, zeros, 0, ("2:4",) if zeros >= 8 else ())


def test_branches_sum_up_their_tensors_and_lonely_twigs_are_joined() -> None:
    facts = [
        tensor("model.embed"),
        tensor("model.h.0.up.w", 8),
        tensor("model.h.0.down.w", 12),
        tensor("head"),
    ]
    assert drawn(facts) == [
        "tensor        tensors  shape  elements  zeros  sparsity  patterns",
        "model               3               48     20    41.67%",
        "├─ embed            1  4x4          16      0     0.00%",
        "└─ h.0              2               32     20    62.50%  2:4",
        "   ├─ up.w          1  4x4          16      8    50.00%  2:4",
        "   └─ down.w        1  4x4          16     12    75.00%  2:4",
        "head                1  4x4          16      0     0.00%",
        "total               4               64     20    31.25%",
        "satisfied: 2:4 by 2 tensors",
    ]


def test_numbered_branches_that_are_alike_are_told_as_one() -> None:
    zeros = {0: 8, 1: 8, 2: 4, 3: 8, 7: 8}
    facts = [tensor(f"h.{layer}.{name}", count) for layer, count in zeros.items() for name in ("a", "b")]
    assert drawn(facts)[1:-2] == [
        "h                 10              160     72    45.00%",
        "├─ 0..1,3,7        8              128     64    50.00%  2:4",
        "│  ├─ a            4  4x4          64     32    50.00%  2:4",
        "│  └─ b            4  4x4          64     32    50.00%  2:4",
        "└─ 2               2               32      8    25.00%",
        "   ├─ a            1  4x4          16      4    25.00%",
        "   └─ b            1  4x4          16      4    25.00%",
    ]


def test_alike_experts_in_alike_layers_are_told_as_one() -> None:
    facts = [tensor(f"h.{layer}.experts.{expert}.w") for layer in range(12) for expert in range(4)]
    lines = drawn(facts)
    assert lines[1].split() == ["h.0..11.experts.0..3.w", "48", "4x4", "768", "0", "0.00%"]


def test_what_is_left_alone_is_joined_after_alike_ones_are_told_as_one() -> None:
    facts = [
        tensor(f"m.h.{layer}.e.{expert}.{name}", 8 * (layer == 1))
        for layer in range(3)
        for expert in range(2)
        for name in ("a", "b")
    ]
    assert drawn(facts)[1:-2] == [
        "m.h                 12              192     32    16.67%",
        "├─ 0,2.e.0..1        8              128      0     0.00%",
        "│  ├─ a              4  4x4          64      0     0.00%",
        "│  └─ b              4  4x4          64      0     0.00%",
        "└─ 1.e.0..1          4               64     32    50.00%  2:4",
        "   ├─ a              2  4x4          32     16    50.00%  2:4",
        "   └─ b              2  4x4          32     16    50.00%  2:4",
    ]


def test_names_are_shortened_behind_the_lines_that_lead_to_them() -> None:
    names = ["a.b.a_rather_long_name_of_a_module.weight", "a.b.c", "a.d"]
    lines = drawn([tensor(name) for name in names], width=60)
    assert [line.split("  4x4")[0].rstrip() for line in lines[3:6]] == [
        "│  ├─ …ng_name_of_a_module.weight",
        "│  └─ c",
        "└─ d",
    ]


def test_a_tree_deeper_than_the_terminal_is_wide_is_drawn() -> None:
    facts = [tensor("".join(f"x{depth}." for depth in range(deep)) + "w") for deep in range(30)]
    assert max(map(len, drawn(facts, width=60))) <= 60


def test_names_that_only_look_like_numbers_stay_apart() -> None:
    labels = {
        line.split()[1] for line in drawn([tensor(f"h.{name}") for name in ("01", "1", "٣", "1a")])[2:6]
    }
    assert labels == {"01", "1", "٣", "1a"}


def test_a_tensor_whose_name_begins_others_is_a_twig_of_its_own() -> None:
    lines = drawn([tensor("a", 8), tensor("a.b")])
    assert [line.split("  ")[0] for line in lines[1:4]] == ["a", "├─ (itself)", "└─ b"]


def test_odd_names_and_very_deep_ones_are_drawn() -> None:
    names = ["", ".", "..", "a..b", "[red]", "new\nline", ".".join("x" * 3000), "9" * 5000]
    lines = drawn([tensor(name) for name in names], width=200)
    assert lines[-2].split()[:2] == ["total", str(len(names))]
    assert any("[red]" in line for line in lines)
    assert any("new\\nline" in line for line in lines)


def test_no_tensors_are_a_total() -> None:
    assert [line.split() for line in drawn([])][1] == ["total", "0", "0", "0", "0.00%"]


def test_a_plain_terminal_gets_plain_lines() -> None:
    facts = [tensor("a.b"), tensor("a.c.d"), tensor("a.c.e")]
    lines = drawn(facts, encoding="ascii")
    assert all(line.isascii() for line in lines)
    assert [line.split("     ")[0] for line in lines[1:6]] == ["a", "|- b", "`- c", "   |- d", "   `- e"]
