"""Requirements: what the grammar takes, what it refuses and how, and which tensors fail with which line."""

import operator
import re
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparseprune.errors import SparsepruneError
from sparseprune.execution.inspect import Pattern
from sparseprune.report.requirements import Comparison, check_names, failures, parse_requirement
from sparseprune.results.measuring import ComparedTensor, InspectedTensor, RuntimeVerdict, ZeroBlocks

FIELDS = ("numel", "zeros", "sparsity", "nonfinite", "zero_rows", "zero_columns")
RUNTIMES = ("torch-cutlass", "asp")
OPERATORS = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt,
    "<": operator.lt,
}  # fmt: skip


def entry(
    name: str, shape: tuple[int, ...] = (4, 8), patterns: tuple[str, ...] = (), **facts: Any
) -> InspectedTensor:
    """A tensor as `inspect` gives it; `runtimes` says why each cannot run it, None where it can."""
    unknown: dict[str, Any] = dict.fromkeys(field.name for field in fields(InspectedTensor))
    known = {"name": name, "dtype": "BF16", "shape": shape, "zeros": 16, "sparsity": 0.5, "zero_blocks": {}}
    reasons = facts.pop("runtimes", {})
    runtimes = {key: RuntimeVerdict(eligible=why is None, reason=why) for key, why in reasons.items()}
    return InspectedTensor(**unknown | known | {"patterns": patterns, "runtimes": runtimes} | facts)


def check(text: str, *entries: InspectedTensor) -> list[str]:
    return failures([parse_requirement(text, FIELDS, RUNTIMES)], entries)


# What is read


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", Pattern(2, 4)),
        (" 2:4 ", Pattern(2, 4)),
        ("0:4", Pattern(0, 4)),
        ("1:16@0", Pattern(1, 16, 0)),
        ("2:4@-2", Pattern(2, 4, -2)),
        ("2:4@both", Pattern(2, 4, both=True)),
    ],
)
def test_a_pattern_is_read(text: str, pattern: Pattern) -> None:
    found = parse_requirement(text, FIELDS, RUNTIMES)
    assert (found.pattern, found.runtime, found.comparison, found.names) == (pattern, None, None, ())


@pytest.mark.parametrize("text", ["asp", " torch-cutlass "])
def test_a_runtime_is_read(text: str) -> None:
    found = parse_requirement(text, FIELDS, RUNTIMES)
    assert (found.pattern, found.runtime, found.comparison) == (None, text.strip(), None)


@pytest.mark.parametrize("sign", OPERATORS)
@pytest.mark.parametrize(
    ("number", "value", "percent"),
    [
        ("0.5", Fraction(1, 2), False),
        (".5", Fraction(1, 2), False),
        ("1.", Fraction(1), False),
        ("-1e-3", Fraction(-1, 1000), False),
        ("+2E+2", Fraction(200), False),
        ("33.3%", Fraction(333, 1000), True),
        ("100%", Fraction(1), True),
    ],
)
@pytest.mark.parametrize("space", ["", " ", "  "])
def test_a_comparison_is_read(sign: str, number: str, value: Fraction, percent: bool, space: str) -> None:
    found = parse_requirement(f"zero_rows{space}{sign}{space}{number}", FIELDS, RUNTIMES)
    assert found.comparison == Comparison("zero_rows", sign, value, percent)
    assert found.what == f"zero_rows{sign}{number}"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("2:4 in **.weight", ["**.weight"]),
        ("2:4   in   a.*,b.{layer}.w ,  c", ["a.*", "b.{layer}.w", "c"]),
        ("asp in in", ["in"]),
        ("sparsity>=0.5 in {x:gate|up}.in in y", ["{x:gate|up}.in in y"]),
        ("2:4", []),
    ],
)
def test_names_follow_the_word_in(text: str, names: list[str]) -> None:
    found = parse_requirement(text, FIELDS, RUNTIMES)
    assert [pattern.text for pattern in found.names] == names


BAD = [
    ("", "nothing is asked; wanted N:M, such as 2:4, or a comparison, such as sparsity>=0.5"),
    ("4:2", "wanted N:M with N less than M"),
    ("4:4", "wanted N:M with N less than M"),
    ("2:4@x", "wanted N:M with N less than M, such as 2:4, or N:M@AXIS, such as 2:4@0, or N:M@both"),
    ("2:4 within **", "wanted N:M with N less than M"),
    ("2:4, sparsity>=0.5", "wanted N:M with N less than M"),
    ("2:4 in", "the pattern is empty: write the name of a tensor"),
    ("2:4 in a,,b", "the pattern is empty"),
    ("2:4 in a.{x", 'pattern "a.{x": character 3: { opens a capture that no } closes'),
    ("2:4 in a.***", 'pattern "a.***": character 3: *** has no meaning'),
    ("sparsity", '"sparsity" is compared with nothing; wanted such as sparsity>=0.5'),
    ("sparsty>=0.5", 'there is no field "sparsty"; did you mean "sparsity"?'),
    ("Zeros==0", 'there is no field "Zeros"; did you mean "zeros"?'),
    (
        "qqq>=0.5",
        'there is no field "qqq"; there is numel, zeros, sparsity, nonfinite, zero_rows and zero_columns',
    ),
    ("sparsity=0.5", "there is no comparison =; did you mean ==?"),
    ("sparsity=>0.5", "there is no comparison =>; did you mean >=?"),
    ("sparsity<>0.5", "there is no comparison <>; did you mean !=?"),
    ("sparsity=!0.5", "there is no comparison =!; wanted >=, <=, ==, !=, > or <"),
    ("sparsity>=", '"" is no number; wanted one such as 0.5 or 50%'),
    ("sparsity>=half", '"half" is no number'),
    ("sparsity>=nan", '"nan" is no number'),
    ("sparsity>=inf", '"inf" is no number'),
    ("sparsity>=0,5", '"0,5" is no number'),
    ("sparsity>=1/2", '"1/2" is no number'),
    ("sparsity>=50%%", '"50%%" is no number'),
    ("sparsity>=1e999", '"1e999" is no number'),
    ("sparsity>=0.5 and zeros>1", '"sparsity>=0.5 and zeros>1" has no meaning'),
    ("torch_cutlas", '"torch_cutlas" has no meaning; did you mean "torch-cutlass"?'),
    ("apex", '"apex" has no meaning; wanted N:M'),
    ("ASP", '"ASP" has no meaning; did you mean "asp"?'),
    ("in **.weight", '"in **.weight" has no meaning; wanted N:M'),
    ("50%", '"50%" has no meaning; wanted N:M'),
]


@pytest.mark.parametrize(("text", "wanted"), BAD)
def test_what_has_no_meaning_is_told_in_one_line(text: str, wanted: str) -> None:
    with pytest.raises(SparsepruneError) as caught:
        parse_requirement(text, FIELDS, RUNTIMES)
    line = str(caught.value)
    assert line.startswith(f'--require "{text}": {wanted}')
    assert len(line.splitlines()) == 1
    assert caught.value.exit_code == 2


def test_a_runtime_that_was_not_asked_about_is_no_condition() -> None:
    assert parse_requirement("asp", FIELDS, ["asp"]).runtime == "asp"
    with pytest.raises(SparsepruneError, match='"asp" has no meaning; wanted N:M'):
        parse_requirement("asp", FIELDS)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="24:@>=<!% .e0in*{}|,saprity\n\x00é", max_size=30))
def test_any_text_is_a_requirement_or_one_line_of_error(text: str) -> None:
    error = None
    try:
        found = parse_requirement(text, FIELDS, RUNTIMES)
    except SparsepruneError as caught:
        error = caught
    if error is not None:
        assert len(str(error).splitlines()) == 1
    else:
        assert [found.pattern, found.runtime, found.comparison].count(None) == 2


# What fails


@pytest.mark.parametrize(
    ("text", "patterns", "line"),
    [
        ("2:4", ("2:4", "4:8"), None),
        ("2:4", ("4:8",), "w: wanted 2:4, satisfies 4:8"),
        ("2:4", ("12:4", "2:48", "4:8"), "w: wanted 2:4, satisfies 12:4 2:48 4:8"),
        ("2:4", (), "w: wanted 2:4, satisfies none"),
        ("2:4", ("2:4@1",), None),  # the last of two dimensions
        ("2:4@1", ("2:4",), None),
        ("2:4@0", ("2:4",), "w: wanted 2:4@0, satisfies 2:4"),
        ("2:4@-2", ("2:4@0",), None),
        ("2:4@both", ("2:4", "2:4@0"), None),
        ("2:4", ("2:4@both",), None),
        ("2:4@both", ("2:4",), "w: wanted 2:4@both, satisfies 2:4"),
        ("4:8@both", ("2:4@both",), "w: wanted 4:8@both, has 4 along dimension 0, no multiple of 8"),
        ("2:4@2", ("2:4",), "w: wanted 2:4@2, is 2-D and has no dimension 2"),
        ("2:4@-3", ("2:4",), "w: wanted 2:4@-3, is 2-D and has no dimension -3"),
        ("1:3", ("2:4",), "w: wanted 1:3, has 8 along dimension 1, no multiple of 3"),
        ("4:8@0", ("2:4",), "w: wanted 4:8@0, has 4 along dimension 0, no multiple of 8"),
    ],
)
def test_a_tensor_has_the_pattern_or_is_told_what_it_has(
    text: str, patterns: tuple[str, ...], line: str | None
) -> None:
    assert check(text, entry("w", patterns=patterns)) == ([] if line is None else [line])


def test_patterns_and_runtimes_are_asked_of_matrices_unless_names_say_otherwise() -> None:
    no = {"asp": "1-D, wanted 2-D"}
    yes = {"asp": None}
    vector = entry("norm.weight", (8,), runtimes=no)
    scalar = entry("scale.weight", (), runtimes=no)
    matrix = entry("up.weight", patterns=("2:4",), runtimes=yes)
    assert check("2:4", vector, scalar, matrix) == []
    assert check("asp", vector, scalar, matrix) == []
    assert check("2:4 in **.weight", vector, scalar, matrix) == [
        "norm.weight: wanted 2:4, is 1-D",
        "scale.weight: wanted 2:4, is 0-D",
    ]
    assert check("asp in *.weight", vector, matrix) == ["norm.weight: not eligible for asp: 1-D, wanted 2-D"]


def test_patterns_and_runtimes_are_asked_of_no_empty_matrix_unless_it_is_named() -> None:
    empty = entry("e", (0, 8), runtimes={"asp": "is empty"})
    full = entry("w", patterns=("2:4",), runtimes={"asp": None})
    assert check("2:4", empty, full) == check("asp", empty, full) == []
    assert check("2:4 in *", empty, full) == ["e: wanted 2:4, is empty"]
    assert check("asp in *", empty, full) == ["e: not eligible for asp: is empty"]
    assert check("sparsity>0.5", replace(empty, sparsity=0.0)) == ["e: wanted sparsity>0.5, found 0"]


def test_elements_that_cannot_be_looked_at_fail_with_that_reason() -> None:
    unseen = entry("w", dtype="F4", zeros=None, sparsity=None)
    reason = "elements of F4 are no whole bytes and were not looked at"
    assert check("2:4", unseen) == [f"w: wanted 2:4, {reason}"]
    assert check("sparsity>=0.5", unseen) == [f"w: wanted sparsity>=0.5, {reason}"]
    assert check("zero_rows==0", replace(unseen, shape=(8,))) == [f"w: wanted zero_rows==0, {reason}"]


def test_a_fact_that_only_matrices_have_is_not_asked_of_vectors_unless_they_are_named() -> None:
    vector = entry("norm", (8,), zero_rows=None)
    matrix = entry("up", zero_rows=1)
    assert check("zero_rows==1", vector, matrix) == []
    assert check("zero_rows==0", vector, matrix) == ["up: wanted zero_rows==0, found 1"]
    assert check("zero_rows==1 in norm", vector, matrix) == [
        "norm: wanted zero_rows==1, zero_rows is not known"
    ]
    assert check("sparsity>0.5", vector, matrix) == [
        "norm: wanted sparsity>0.5, found 0.5",
        "up: wanted sparsity>0.5, found 0.5",
    ]


def test_a_fact_that_a_matrix_lacks_fails_as_unknown() -> None:
    assert check("nonfinite==0", entry("w", nonfinite=None)) == [
        "w: wanted nonfinite==0, nonfinite is not known"
    ]
    assert check("nonfinite==0", entry("w")) == ["w: wanted nonfinite==0, nonfinite is not known"]
    assert check("nonfinite==0", entry("w", nonfinite=0)) == []


@pytest.mark.parametrize(
    ("text", "value", "found"),
    [
        ("sparsity>=0.5", 0.5, None),
        ("sparsity>=50%", 0.5, None),
        ("sparsity>=0.5", 0.49966, "0.4997"),
        ("sparsity>=50%", 0.49966, "49.97%"),
        ("sparsity>=0.5", 0.49999, "0.49999"),
        ("sparsity>=0.5", 0.49999999, "0.49999999"),
        ("sparsity>=50%", 0.49999999, "49.999999%"),
        ("sparsity==0.5", 0.500001, "0.500001"),
        ("sparsity>0.5", 0.5, "0.5"),
        ("sparsity!=0.3", 0.3, "0.3"),
        ("sparsity==0.3", 3 / 10, None),
        ("sparsity==33.3%", 333 / 1000, None),
        ("sparsity>33.3%", 333 / 1000, "33.3%"),
        ("sparsity<=0", 1e-12, "1e-12"),
        ("sparsity<1", 123456.75, "123457"),
        ("sparsity<1", float("inf"), "inf"),
        ("sparsity>1", float("inf"), None),
        ("sparsity!=1", float("nan"), "nan"),  # of what is no number nothing holds
        ("zeros>=17", 16, "16"),
        ("zeros>=15.5", 16, None),
        ("zeros==9007199254740993", 2**53, "9007199254740992"),
        ("zeros==9007199254740993", 2**53 + 1, None),
        ("zeros<1e3", 123456, "123456"),
    ],
)
def test_a_number_that_fails_is_told_in_enough_digits(text: str, value: float, found: str | None) -> None:
    field = re.split("[<>=!]", text)[0]
    wanted = [] if found is None else [f"w: wanted {text}, found {found}"]
    facts: dict[str, Any] = {field: value}
    assert check(text, entry("w", **facts)) == wanted


NUMBERS = st.one_of(
    st.integers(0, 4096).flatmap(lambda whole: st.integers(0, whole).map(lambda part: part / max(whole, 1))),
    st.floats(0, 1),
    st.floats(-1e9, 1e9),
    st.integers(0, 10**20),
)


@settings(max_examples=500, deadline=None)
@given(NUMBERS, st.sampled_from(sorted(OPERATORS)), st.one_of(NUMBERS, st.none()), st.booleans())
@example(0.49999999999999994, ">=", 0.5, True)
@example(0.49999999999999994, ">=", 0.5, False)
@example(0.1 + 0.2, "==", 0.3, False)
def test_what_is_told_never_looks_as_if_it_held(
    value: float, sign: str, wanted: float | None, percent: bool
) -> None:
    wanted = value if wanted is None else wanted
    percent = percent and isinstance(value, float)
    digits = f"{Decimal(wanted) * (100 if percent else 1):.12f}"
    text = f"sparsity{sign}{digits}{'%' if percent else ''}"
    number = Fraction(digits) / (100 if percent else 1)
    lines = check(text, entry("w", sparsity=value))
    if isinstance(value, float):
        assert (lines == []) == OPERATORS[sign](value, float(number))
    else:
        assert (lines == []) == OPERATORS[sign](Fraction(value), number)
    for line in lines:
        told = line.removeprefix(f"w: wanted {text}, found ")
        shown = Fraction(told.removesuffix("%")) / (100 if percent else 1)
        assert told.endswith("%") == percent
        if isinstance(value, float):
            assert not OPERATORS[sign](float(shown), float(number))
            assert (float(shown) == float(number)) == (value == float(number))
        else:
            assert shown == value


def test_nested_facts_go_by_their_flat_names() -> None:
    blocks = {"4x4": ZeroBlocks(zero=2, of=8)}
    requirement = parse_requirement("zero_blocks_4x4>=3", ["zero_blocks_4x4"])
    assert failures([requirement], [entry("w", zero_blocks=blocks)]) == [
        "w: wanted zero_blocks_4x4>=3, found 2"
    ]
    assert failures([requirement], [entry("v")]) == [
        "v: wanted zero_blocks_4x4>=3, zero_blocks_4x4 is not known"
    ]


def test_every_failing_tensor_of_every_requirement_has_a_line_in_their_order() -> None:
    asked = [parse_requirement(text, FIELDS) for text in ("sparsity>=0.6", "2:4 in b.*")]
    entries = [entry("b.w"), entry("a.w", sparsity=0.7), entry("b.v", patterns=("2:4",))]
    assert failures(asked, entries) == [
        "b.w: wanted sparsity>=0.6, found 0.5",
        "b.v: wanted sparsity>=0.6, found 0.5",
        "b.w: wanted 2:4, satisfies none",
    ]
    assert failures([], entries) == []


def test_a_tensor_that_several_patterns_match_is_asked_once() -> None:
    assert check("2:4 in a.*, **.w, a.w", entry("a.w"), entry("b.w", patterns=("2:4",))) == [
        "a.w: wanted 2:4, satisfies none"
    ]


def test_captures_are_allowed_and_mean_nothing_more() -> None:
    entries = [entry("h.0.q.w"), entry("h.10.k.w"), entry("h.1.v.w")]
    assert check("sparsity>=0.9 in h.{layer}.{part:q|k}.w", *entries) == [
        "h.0.q.w: wanted sparsity>=0.9, found 0.5",
        "h.10.k.w: wanted sparsity>=0.9, found 0.5",
    ]


def test_odd_names_stay_on_their_line() -> None:
    names = ["[red]w[/red]", "重み.weight", "a\nb", "a\x1b[31m"]
    lines = check("sparsity>0.9", *map(entry, names))
    assert lines == [
        "[red]w[/red]: wanted sparsity>0.9, found 0.5",
        "重み.weight: wanted sparsity>0.9, found 0.5",
        "a\\nb: wanted sparsity>0.9, found 0.5",
        "a\\x1b[31m: wanted sparsity>0.9, found 0.5",
    ]


# What cannot be asked


@pytest.mark.parametrize(
    ("text", "entries", "wanted"),
    [
        (
            "2:4 in **.q_porj.weight",
            [entry("h.0.q_proj.weight"), entry("h.1.q_proj.weight"), entry("h.0.norm")],
            'no tensor matches "**.q_porj.weight"; the nearest names are h.0.q_proj.weight',
        ),
        (
            "2:4 in **.w, nothing",
            [entry("a.w", patterns=("2:4",))],
            'no tensor matches "nothing"; the first names are a.w',
        ),
        ("2:4 in h.0", [entry("m.h.0.w"), entry("h.0.w")], 'no tensor matches "h.0"; did you mean "h.0.**"?'),
        ("2:4 in h.*.w", [entry("m.h.0.w")], 'no tensor matches "h.*.w"; did you mean "**.h.*.w"?'),
        ("2:4 in {x:q|k}_proj.", [entry("m.k_proj.w")], 'did you mean "**.{x:q|k}_proj.**"?'),
        ("2:4 in *", [entry("m.w")], 'no tensor matches "*"; the first names are m.w'),
        ("2:4 in a\nb", [entry("a\n\nb")], 'no tensor matches "a\\nb"; the nearest names are a\\n\\nb'),
        ("2:4 in w", [], 'no tensor matches "w"; there is no tensor'),
        ("2:4", [entry("norm", (8,))], "there is no tensor it can be asked of; name some: 2:4 in PATTERN"),
        ("sparsity>0", [], "there is no tensor"),
        ("zero_rows==0", [entry("norm", (8,), zero_rows=None)], "there is no tensor it can be asked of"),
        ("zeros>=50%", [entry("w")], "zeros is a count; wanted a number without %"),
    ],
)
def test_a_check_of_nothing_is_an_error(text: str, entries: list[InspectedTensor], wanted: str) -> None:
    with pytest.raises(SparsepruneError) as caught:
        check(text, *entries)
    line = str(caught.value)
    assert wanted in line
    assert line.startswith("--require ")
    assert len(line.splitlines()) == 1
    assert caught.value.exit_code == 2


def test_a_field_that_is_no_number_is_an_error() -> None:
    with pytest.raises(SparsepruneError, match="dtype is no number"):
        failures([parse_requirement("dtype==16", ["dtype"])], [entry("w")])


def test_patterns_are_an_error_where_tensors_are_compared() -> None:
    unknown: dict[str, Any] = dict.fromkeys(field.name for field in fields(ComparedTensor))
    bare = ComparedTensor(**unknown | {"name": "w", "shape": (4, 8), "altered": 0})
    assert failures([parse_requirement("altered==0", ["altered"])], [bare]) == []
    with pytest.raises(
        SparsepruneError, match="N:M patterns are not looked for here; ask sparseprune inspect"
    ):
        failures([parse_requirement("2:4", ["altered"])], [bare])


def test_names_can_be_checked_before_anything_is_measured() -> None:
    asked = [parse_requirement("2:4 in a.*, **.w", FIELDS), parse_requirement("sparsity>0", FIELDS)]
    check_names(asked, ["a.w"])
    check_names(asked[1:], [])
    with pytest.raises(SparsepruneError, match=r'no tensor matches "a\.\*"; the first names are b\.w'):
        check_names(asked, ["b.w"])
