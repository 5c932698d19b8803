"""Tables at any width: what is left out, how names are shortened, that cells are shown literally."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from sparseprune.report.tables import Column, FittedTable, shortened


def drawn(table: FittedTable, width: int, **options: bool) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None, **options)  # type: ignore[arg-type]
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


COLUMNS = (
    Column("tensor", "left", "total of 3"),
    Column("dtype", "left", spare=2),
    Column("zero rows", footer="1,234", spare=1),
    Column("sparsity", footer="50.00%"),
)
ROWS = (
    ("model.layers.0.mlp.up_proj.weight", "BF16", "7", "50.00%"),
    ("model.layers.10.mlp.up_proj.weight", "BF16", "1,227", "9.00%"),
    ("lm_head", "F32", "", "100.00%"),
)


def test_a_wide_terminal_has_all_of_it() -> None:
    assert drawn(FittedTable(COLUMNS, ROWS), 80) == [
        "tensor                              dtype  zero rows  sparsity",
        "model.layers.0.mlp.up_proj.weight   BF16           7    50.00%",
        "model.layers.10.mlp.up_proj.weight  BF16       1,227     9.00%",
        "lm_head                             F32                100.00%",
        "total of 3                                     1,234    50.00%",
    ]


def test_titles_are_broken_before_anything_is_left_out() -> None:
    assert drawn(FittedTable(COLUMNS, ROWS), 58)[:3] == [
        "tensor                              dtype   zero  sparsity",
        "                                            rows",
        "model.layers.0.mlp.up_proj.weight   BF16       7    50.00%",
    ]


def test_names_are_shortened_while_they_have_room_and_columns_left_out_where_not() -> None:
    table = FittedTable(COLUMNS, ROWS)
    assert drawn(table, 50)[1:4] == [
        "                                rows",
        "…0.mlp.up_proj.weight   BF16       7    50.00%",
        "…10.mlp.up_proj.weight  BF16   1,227     9.00%",
    ]
    assert drawn(table, 40) == [
        "tensor                   zero  sparsity",
        "                         rows",
        "…0.mlp.up_proj.weight       7    50.00%",
        "…10.mlp.up_proj.weight  1,227     9.00%",
        "lm_head                         100.00%",
        "total of 3              1,234    50.00%",
        "left out: dtype; a wider terminal, --csv",
        "or --json has them",
    ]


@pytest.mark.parametrize("width", range(60, 201, 7))
def test_no_line_is_wider_than_the_terminal_and_names_stay_unlike(width: int) -> None:
    names = [
        f"model.language_model.layers.{layer}.{name}.weight"
        for layer in range(24)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "post_attention_layernorm")
    ]
    columns = (Column("tensor", "left"), *(Column(f"some count {at}", spare=at) for at in range(8)))
    lines = drawn(FittedTable(columns, [(name, *["1,234,567"] * 8) for name in names]), width)
    assert max(map(cell_len, lines)) <= width
    shown = [line.split()[0] for line in lines if "1,234,567" in line]
    assert len(set(shown)) == len(names)
    assert all(name.endswith(text.rpartition("…")[2]) for name, text in zip(names, shown, strict=True))


def test_a_table_without_spare_columns_still_fits() -> None:
    columns = (Column("tensor", "left"), Column("what", "left"), Column("why", "left"))
    lines = drawn(FittedTable(columns, [("n" * 70, "w" * 70, "y" * 70)]), 60)
    assert max(map(len, lines)) <= 60
    assert all(letter in lines[1] for letter in "nwy…")


def test_cells_are_shown_literally_on_one_line_and_aligned() -> None:
    names = ["[red]x[/red]", "模型.权重", "new\nline", ":smile:", "é"]
    lines = drawn(FittedTable((Column("tensor", "left"), Column("n")), [(name, "1") for name in names]), 60)
    assert [line.rpartition("  ")[0].rstrip() for line in lines[1:]] == [
        "[red]x[/red]", "模型.权重", "new\\nline", ":smile:", "é",
    ]  # fmt: skip
    assert {cell_len(line) for line in lines} == {cell_len(lines[0])}


def test_only_a_terminal_gets_styles_and_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    table = FittedTable((Column("tensor", "left"), Column("bad", style="red")), [("x", "1")])

    def text(**options: object) -> str:
        console = Console(file=io.StringIO(), width=80, **options)  # type: ignore[arg-type]
        with console.capture() as captured:
            console.print(table)
        return captured.get()

    assert "\x1b" not in text()
    coloured = text(force_terminal=True, color_system="standard")
    assert "\x1b[1m" in coloured
    assert "\x1b[31m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in text(force_terminal=True, color_system="standard")


def test_no_columns_and_no_rows_are_nothing_and_a_title() -> None:
    assert drawn(FittedTable((), ()), 80) == []
    assert drawn(FittedTable((Column("tensor", "left"), Column("n")), ()), 80) == ["tensor  n"]


@pytest.mark.parametrize(
    ("names", "width", "wanted"),
    [
        (["short", "names"], 5, ["short", "names"]),
        (["model.layers.3.mlp.up.weight"], 20, ["…3.mlp.up.weight"]),
        (["averyveryverylongname"], 8, ["…ongname"]),
        (["a.layers.17.x.weight", "a.layers.7.x.weight"], 12, ["…17.x.weight", "…7.x.weight"]),
        (
            ["vision.encoder.layers.3.fc1.weight", "text.encoder.layers.3.fc1.weight"],
            24,
            ["vision…yers.3.fc1.weight", "text…layers.3.fc1.weight"],
        ),
    ],
)
def test_names_keep_their_ends_and_what_tells_them_apart(
    names: list[str], width: int, wanted: list[str]
) -> None:
    assert shortened(names, width) == wanted


@given(st.lists(st.text("ab.01権é", max_size=40), max_size=12), st.integers(4, 30))
def test_shortened_names_fit_and_short_ones_are_whole(names: list[str], width: int) -> None:
    found = shortened(names, width)
    for name, text in zip(names, found, strict=True):
        assert cell_len(text) <= width
        if cell_len(name) <= width:
            assert text == name


@given(st.lists(st.integers(0, 999), min_size=2, max_size=30, unique=True), st.integers(22, 40))
def test_layers_stay_unlike_however_short_their_names_become(layers: list[int], width: int) -> None:
    parts = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.down_proj.weight")
    names = [f"model.language_model.layers.{layer}.{part}" for layer in layers for part in parts]
    assert len(set(shortened(names, width))) == len(names)
