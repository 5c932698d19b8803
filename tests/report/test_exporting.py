"""CSV and Markdown: exact numbers, quoting and escaping, read back by other readers."""

import csv
import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from sparseprune.report.tables import Column, csv_text, markdown_text

FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False))))
def test_csv_reads_back_exactly(rows: list[tuple[str, float]]) -> None:
    text = csv_text(["name", "number"], rows)
    header, *found = csv.reader(io.StringIO(text, newline=""))
    assert header == ["name", "number"]
    assert [(name.removeprefix("'"), float(number)) for name, number in found] == rows
    assert not any(name.startswith(FORMULAS) for name, _ in found)


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@A1", "\tx", "\rx", "\nx", "\uff1d", "'", "'=1", "-", '=,"a']
)
def test_csv_text_that_a_spreadsheet_would_run_has_an_apostrophe_in_front(text: str) -> None:
    found = csv_text(["name"], [[text], [[text, "x"]]])
    read = [row[0] for row in csv.reader(io.StringIO(found, newline=""))]
    assert read == ["name", f"'{text}", f"'{text} x"]


def test_csv_numbers_are_numbers_also_below_zero() -> None:
    assert csv_text(["a", "b", "c"], [[-1, -0.5, [-1, 2]], [-math.inf, "1-1", "a=b"]]) == (
        "a,b,c\n-1,-0.5,-1 2\n-inf,1-1,a=b\n"
    )


def test_csv_writes_none_as_nothing_truth_as_json_and_lists_as_items() -> None:
    text = csv_text(["a", "b", "c", "d"], [[None, True, [1, 2], "x"], ["", False, (), math.inf]])
    assert text == "a,b,c,d\n,true,1 2,x\n,false,,inf\n"


def test_csv_of_no_rows_has_its_titles() -> None:
    assert csv_text(["name", "zeros"], []) == "name,zeros\n"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("model.layers.0.up_proj.weight", "model.layers.0.up_proj.weight"),
        ("a|b", "a\\|b"),
        ("layers.*.experts.*.up", "layers.\\*.experts.\\*.up"),
        ("_up_proj_", "\\_up_proj\\_"),
        ("[red]", "\\[red\\]"),
        ("<b>&amp;`x`", "\\<b\\>\\&amp;\\`x\\`"),
        ("a & b", "a & b"),
        ("back\\slash", "back\\\\slash"),
        ("new\nline", "new\\\\nline"),
    ],
)
def test_markdown_escapes_what_it_would_take_for_its_own(text: str, escaped: str) -> None:
    line = markdown_text([Column("tensor", "left")], [[text]]).splitlines()[2]
    assert line == f"| {escaped.ljust(6)} |"


def test_markdown_is_aligned_and_ends_with_the_footers() -> None:
    columns = [
        Column("tensor", "left", "total of 2"),
        Column("dtype", "left"),
        Column("zeros", footer="1,234"),
    ]
    assert markdown_text(columns, [["model.norm", "F32", "4"], ["模型", "BF16", "1,230"]]).splitlines() == [
        "| tensor         | dtype |     zeros |",
        "|:---------------|:------|----------:|",
        "| model.norm     | F32   |         4 |",
        "| 模型           | BF16  |     1,230 |",
        "| **total of 2** |       | **1,234** |",
    ]


def test_markdown_lines_are_equally_wide() -> None:
    text = markdown_text([Column("t", "left"), Column("n")], [["a|b", "1"], ["権" * 9, ""]])
    assert len({cell_len(line) for line in text.splitlines()}) == 1
