# ruff: noqa: E501  (whole lines, as they are printed)
"""Expressions: what Python makes of the same text, and nothing that could do harm or never end."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.spec.expressions import ExpressionError, evaluate, parse_expression, parse_slice

CONFIG = {
    "hidden_size": 64,
    "heads": 4,
    "nothing": None,
    "text_config": {"n": 3, "odd key": [1, 2]},
    "zero": 0,
}
NAMES = {"layer": 3, "part": "up", "keep": [4, 5, 6, 7], "rate": 0.5, "shape": [8, 16], "config": CONFIG}
ALLOWED = (
    'not allowed; allowed are numbers, strings, lists, names, + - * / // %, comparisons, in, and, or, not, "a if b else '
    'c", x[i] and keys of config'
)

VALUES = [
    ("0.2 + 0.4 * layer / 31", 0.2 + 0.4 * 3 / 31),
    ("keep[layer]", 7),
    ("keep[-1] % 4", 3),
    ("-layer // 2", -2),
    ("1 < layer <= 3", True),
    ("part in ['up', 'gate'] and not layer == 2", True),
    ("'gate' if part == 'down' else part + '_proj'", "up_proj"),
    ("[1] + [layer, part]", [1, 3, "up"]),
    ("part not in 'gate_up'", False),
    ("layer or missing", 3),
    ("0 and missing", 0),
    ("shape[1] % 16 == 0", True),
    (" 1 + 1 ", 2),
    ("(1 +\n 2)", 3),
    ("None == config.nothing", True),
    ("config.hidden_size // config.heads", 16),
    ("config['text_config'].n + config.text_config['odd key'][1]", 5),
    # a key that is missing, to the left of `or`
    ("config.head_dim or config.hidden_size // config.heads", 16),
    ("config.vision.head_dim or 5", 5),
    ("config.nothing.head_dim or 5", 5),
    ("config.heads.head_dim or 5", 5),
    ("config.a or config.b or config.heads", 4),
    ("(config.a or config.b) or 6", 6),
    ("config.a // config.b or 7", 7),
    ("config.zero or 8", 8),
    ("'n' in config.text_config", True),
    ("9223372036854775806 + 1", 2**63 - 1),
]

NO_VALUES = [
    ("layr + 1", 'column 1: unknown name "layr"; did you mean "layer"?'),
    ("1 + confg.heads", None),
    ("true", 'column 1: unknown name "true"; did you mean "True"?'),
    ("layer / (3 - layer)", "column 1: this divides by zero"),
    ("layer % 0.0", "column 1: this divides by zero"),
    ("part * 3", "column 1: a text * a number has no meaning"),
    ("3 * keep", "column 1: a number * a list has no meaning"),
    ("'%s' % part", "column 1: a text % a text has no meaning"),
    ("part + layer", "column 1: a text + a number has no meaning"),
    ("-part", "column 1: - a text has no meaning"),
    ("1 < part", "column 5: a number < a text has no meaning"),
    ("layer in 3", "column 10: a number in a number has no meaning"),
    ("keep[4]", "column 1: keep has 4 items, there is no item 4"),
    ("keep['a']", 'column 1: found the index "a", wanted an integer'),
    ("layer['a']", 'column 1: layer is 3, which has no key "a"'),
    ("layer[0]", "column 1: layer is a number, which has no item 0"),
    ("9223372036854775807 + 1", "column 1: this is an integer beyond 9223372036854775807"),
    ("1e308 * 10", "column 1: this is no finite number"),
    ("config.head_dim", 'column 1: config has no key "head_dim"; did you mean "heads"?'),
    ("1 + config.hidden_siz", 'column 5: config has no key "hidden_siz"; did you mean "hidden_size"?'),
    ("config.text_config.m", 'column 1: config.text_config has no key "m"; there is "n" and "odd key"'),
    ("config.nothing.m", 'column 1: config.nothing is null, which has no key "m"'),
    ("config.head_dim and 1 or config.head", None),
]  # fmt: skip

REFUSED = [
    ("().__class__", f"column 1: the attribute .__class__ of anything but config is {ALLOWED}"),
    ("part.upper", f"column 1: the attribute .upper of anything but config is {ALLOWED}"),
    ("keep[0].real", f"column 1: the attribute .real of anything but config is {ALLOWED}"),
    ("(config or 1).x", f"column 1: the attribute .x of anything but config is {ALLOWED}"),
    ("1 + len(keep)", f"column 5: a call is {ALLOWED}"),
    ("9**9**9", f"column 1: ** is {ALLOWED}"),
    ("[0 for x in keep]", f"column 1: a comprehension is {ALLOWED}"),
    ("lambda: 1", f"column 1: a lambda is {ALLOWED}"),
    ("f'{layer}'", f"column 1: an f-string is {ALLOWED}"),
    ("(x := 1)", f"column 2: := is {ALLOWED}"),
    ("keep[0:2]", f"column 6: a slice inside [ ] is {ALLOWED}"),
    ("1, 2", f"column 1: a tuple is {ALLOWED}"),
    ("{1: 2}", f"column 1: a dictionary is {ALLOWED}"),
    ("{1}", f"column 1: a set is {ALLOWED}"),
    ("[*keep]", f"column 2: * is {ALLOWED}"),
    ("1 << 99", f"column 1: << is {ALLOWED}"),
    ("~1", f"column 1: ~ is {ALLOWED}"),
    ("1 is 1", f"column 1: is is {ALLOWED}"),
    ("b'a'", f"column 1: a bytes constant is {ALLOWED}"),
    ("1j", f"column 1: a complex constant is {ALLOWED}"),
    ("...", f"column 1: ... is {ALLOWED}"),
    ("9223372036854775808", f"column 1: an integer beyond 9223372036854775807 is {ALLOWED}"),
    ("1e999", f"column 1: an infinite number is {ALLOWED}"),
    ("é + 9**2", f"column 5: ** is {ALLOWED}"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_an_expression_has_the_value_that_it_reads_as(text: str, value: object) -> None:
    found = evaluate(parse_expression(text), NAMES)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(("text", "message"), NO_VALUES)
def test_an_expression_without_a_value_says_where_and_why(text: str, message: str | None) -> None:
    with pytest.raises(ExpressionError) as caught:
        evaluate(parse_expression(text), NAMES)
    if message is not None:
        quoted = text.replace('"', '\\"')
        assert str(caught.value) == f'"{quoted}" {message}'


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_is_not_on_the_list_is_refused_before_anything_is_known(text: str, message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse_expression(text)
    assert str(caught.value) == f'"{text}" {message}'


@pytest.mark.parametrize(
    "text",
    [
        "'a'*10**9",
        "[0]*10**9",
        "'a'*1000000000",
        "[0]*1000000000",
        "9**9**9",
        "(" * 500 + "1" + ")" * 500,
        "[" * 199 + "]" * 199,
        "-" * 1500 + "1",
        "not " * 400 + "1",
        "1+" * 150 + "1",
        "config" + ".a" * 900,
        "x[" * 150 + "0" + "]" * 150,
        "1 if 1 else " * 150 + "1",
        "1" * 1_000_000,
        "+" * 1_000_000,
        "9" * 1900,
        "__import__('os').system('true')",
        "config.__class__.__mro__[1].__subclasses__()",
        "config.__class__",
        "a\0b",
        "\ud800",
        "'\\d'",
        "0x1for x in y",
        "# nothing",
        "",
        "1;2",
        "x = 1",
        "yield 1",
        "await x",
    ],
)
def test_hostile_expressions_are_refused_in_one_short_line(text: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        evaluate(parse_expression(text), NAMES)
    assert len(str(caught.value)) < 420
    assert "\n" not in str(caught.value)


def test_texts_and_lists_cannot_grow_without_end() -> None:
    names: dict[str, object] = {"text": "x" * 6000, "items": [[0] * 3000, [0] * 3000]}
    for expression in ("text + text", "items + items", "[items, items]"):
        with pytest.raises(ExpressionError, match="of more than 10000 parts"):
            evaluate(parse_expression(expression), names)
    assert evaluate(parse_expression("[items][0] + [0]"), names) == [*names["items"], 0]  # type: ignore[misc]


def test_without_a_config_its_keys_are_missing() -> None:
    assert evaluate(parse_expression("config.n or 4"), {"config": None}) == 4
    with pytest.raises(
        ExpressionError, match=re.escape('the checkpoint has no config.json, from which "n" is read')
    ):
        evaluate(parse_expression("config.n"), {"config": None})


@pytest.mark.parametrize(
    ("text", "low", "high", "single"),
    [
        ("0:n", "0", "n", False),
        (":", None, None, False),
        ("-1:", "-1", None, False),
        (": 2 * n ", None, "2 * n", False),
        ("n", "n", None, True),
        ("x[1]:config['a:b']", "x[1]", "config['a:b']", False),
    ],
)
def test_a_slice_is_read(text: str, low: str | None, high: str | None, single: bool) -> None:
    entry = parse_slice(text)
    assert (entry.low and entry.low.text, entry.high and entry.high.text, entry.single) == (low, high, single)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:1:2", '"0:1:2": a slice has no step: wanted "low:high", ":" or a single index'),
        ("0][1", '"0][1": wanted "low:high", ":" or a single index'),
        ("0] + x[1", '"0] + x[1": wanted "low:high", ":" or a single index'),
        ("0, 1", f'"0, 1" column 1: a tuple is {ALLOWED}'),
        ("0:9**9", f'"9**9" column 1: ** is {ALLOWED}'),
        ("", '"" column 1: this is no expression: invalid syntax'),
        ("1 # :", "\"1 # :\" column 6: this is no expression: '[' was never closed"),
    ],
)
def test_what_is_no_slice_is_refused(text: str, message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse_slice(text)
    assert str(caught.value) == message


NUMBERS = st.sampled_from(["0", "1", "2", "7", "0.5", "2.5", "True", "layer", "rate", "keep[1]", "shape[0]"])
OTHERS = st.sampled_from(["'up'", "part", "None", "keep", "[1, 2]", "False", "[]", "''"])


def _arithmetic(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.sampled_from([*"+ - * / // % < <= > >= == != and or".split()])
    return st.one_of(
        st.tuples(inner, binary, inner).map(lambda each: f"({each[0]} {each[1]} {each[2]})"),
        st.tuples(inner, binary, inner).map(lambda each: f"{each[0]} {each[1]} {each[2]}"),
        inner.map(lambda each: f"(not {each})"),
        inner.map(lambda each: f"-({each})"),
        st.tuples(inner, inner, inner).map(lambda each: f"({each[0]} if {each[1]} else {each[2]})"),
    )


def _any(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        _arithmetic(inner),
        st.tuples(inner, st.sampled_from(["in", "not in"]), inner).map(" ".join),
        st.tuples(inner, inner).map(lambda each: f"[{each[0]}, {each[1]}]"),
        st.tuples(inner, inner).map(lambda each: f"({each[0]} or keep)[{each[1]}]"),
    )


@settings(max_examples=400, deadline=None)
@given(st.recursive(NUMBERS | OTHERS, _any, max_leaves=8))
def test_whatever_has_a_value_has_the_value_that_python_gives(text: str) -> None:
    try:
        found = evaluate(parse_expression(text), NAMES)
    except ExpressionError:
        return
    wanted = eval(text, {"__builtins__": {}}, dict(NAMES))
    assert (found, type(found)) == (wanted, type(wanted))


@settings(max_examples=300, deadline=None)
@given(st.recursive(NUMBERS, _arithmetic, max_leaves=8))
def test_whatever_python_computes_from_numbers_has_a_value_here(text: str) -> None:
    try:
        wanted = eval(text, {"__builtins__": {}}, dict(NAMES))
    except ZeroDivisionError:
        with pytest.raises(ExpressionError, match="divides by zero"):
            evaluate(parse_expression(text), NAMES)
        return
    assert evaluate(parse_expression(text), NAMES) == wanted


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=40) | st.text("()[]{}.:,+-*/'\"#\\ config layer0123eE=<>!ifelse", max_size=40))
def test_any_text_is_an_expression_or_an_error(text: str) -> None:
    try:
        evaluate(parse_expression(text), NAMES)
    except ExpressionError as error:
        assert "\n" not in str(error)  # noqa: PT017  (either way is fine)
