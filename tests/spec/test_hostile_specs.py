"""What a hostile spec, or a stranger's names may not do: run long, or end in a fault."""

import os
import threading
from pathlib import Path

import pytest

from sparseprune.errors import SpecError
from sparseprune.spec import TensorInfo, bind, find_spec, parse_spec
from sparseprune.spec.parsing import LARGEST_SPEC
from sparseprune.spec.patterns import PatternError, parse_pattern, parse_regex
from tests.fuzzing.specs import fuzz

RULE = """
[scope.s]
tensors = "{layer}.w"
block = [1, 1]
shape = [1, 4]
nnz = 2
"""
TENSORS = [TensorInfo(f"{layer}.w", "F32", (4, 8)) for layer in range(3)]


def problems_of(text: str) -> list[str]:
    """The lines that are told of a spec: bounded, printable, each with the name of the file."""
    with pytest.raises(SpecError) as told:
        bind(parse_spec(text), TENSORS)
    lines = str(told.value).splitlines()
    assert len(lines) <= 51
    for line in lines:
        assert line.startswith("spec.toml: ")
        assert line.isprintable()
        assert len(line) <= 1000
    return lines


# What a spec holds -> what is said of it.
HOSTILE = {
    "a key of many parts": ("version = 1\n" + "a." * 50_000 + "b = 1", "the key on line 2 has more than 100"),
    "a table of many parts": ("version = 1\n\n[" + "a." * 50_000 + "b]",
        "the key on line 3 has more than 100"),
    "quoted parts": ("version = 1\n" + '"a" . ' * 200 + "b = 1", "the key on line 2 has more than 100"),
    "a key in an inline table": ("x = {" + "a." * 200 + "b = 1}", "the key on line 1 has more than 100"),
    "lists in lists": ("x = " + "[" * 50_000 + "]" * 50_000, "nested too deeply"),
    "tables in tables": ("x = " + "{a = " * 5_000 + "1" + "}" * 5_000, "nested too deeply"),
    "a number of many digits": (f"version = {'9' * 5_000}", "cannot be read as TOML"),
    "a long name": ("version = 1" + RULE.replace("{layer}.w", "x" * 900_000), "no tensor matches"),
    "a long list": ("version = 1" + RULE.replace("[1, 4]", f"[{'1,' * 100_000}]"), "has 100000 dimensions"),
    "a long number": ("version = 1" + RULE.replace("nnz = 2", f"nnz = {'9' * 4_000}"), "wanted an integer"),
    "many captures": ("version = 1" + RULE.replace("{layer}", "{a}{b}" * 1_000), "more than 1000 captures"),
    "many words": (
        "version = 1" + RULE.replace("{layer}", "{x:" + "|".join(f"w{n}" for n in range(50_000)) + "}"),
        "no tensor matches",
    ),
    "many blocks": (
        "version = 1" + RULE + "".join(f'[block.b{n}]\ntensors = "x"\nshape = [1]\n' for n in range(9_000)),
        "there are more problems than these",
    ),
    "many unknown keys": ("version = 1" + RULE + "".join(f"k{n} = 1\n" for n in range(50_000)),
        "unknown key"),
    "many vars in a circle": (
        "version = 1\n[vars]\n" + "".join(f'v{n} = "v{(n + 1) % 9_000}"\n' for n in range(9_000)) + RULE,
        "this depends on itself",
    ),
    "control characters": ('version = 1\n"\\u001b[2J\\n\\u0007" = 1' + RULE, "unknown key"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_told_in_a_few_short_lines(name: str) -> None:
    text, said = HOSTILE[name]
    assert any(said in line for line in problems_of(text))


def test_vars_and_tables_by_the_thousand_are_fine() -> None:
    chain = "".join(f'v{n} = "v{n - 1} + 1"\n' if n else "v0 = 1\n" for n in range(1_500))
    rules = "".join(
        RULE.replace("[scope.s]", f"[scope.s{n}]").replace("{layer}", f"{n}x") for n in range(1_500)
    )
    text = f"version = 1\n[vars]\n{chain}" + rules.replace("nnz = 2", "nnz = 2\noptional = true") + RULE
    assert sum(1 for _ in bind(parse_spec(text), TENSORS).instances()) == len(TENSORS)


def test_a_key_of_a_hundred_dots_in_a_text_is_no_key() -> None:
    text = "version = 1" + RULE.replace("{layer}.w", "{layer:**}" + ".x" * 200)
    assert "no tensor matches" in problems_of(text)[0]


@pytest.mark.parametrize("more", [0, 1])
def test_a_spec_has_its_largest_size(tmp_path: Path, more: int) -> None:
    path = tmp_path / "s.toml"
    text = "version = 1" + RULE
    path.write_text(text + "#" * (LARGEST_SPEC - len(text) + more))
    if not more:
        assert parse_spec(find_spec(path).text).tables.keys() == {"scope.s"}
        return
    with pytest.raises(SpecError, match=r"s.toml: larger than 1.00 MB; a spec is a page of TOML"):
        find_spec(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_spec_may_come_through_a_pipe_and_never_without_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("version = 1" + RULE))
    writer.start()
    assert find_spec(pipe).text == "version = 1" + RULE
    writer.join()
    with pytest.raises(SpecError, match="larger than"):
        find_spec("/dev/zero")


@pytest.mark.parametrize("regex", ["(?i)" + "[\u017f]*s" * 20 + "x", "(?i)" + "[\u212a]*k" * 20 + "x"])
def test_letters_that_are_alike_in_either_case_are_counted_as_choices(regex: str) -> None:
    with pytest.raises(PatternError, match="could take very long"):
        parse_regex(regex)


@pytest.mark.parametrize(
    ("regex", "length"), [(r"(.*)\1\1\1x", 100_000), (r".*[^.]*\.", 100_000), (".*a.*b", 1000)]
)
def test_a_regex_with_choices_refuses_a_name_that_is_too_long(regex: str, length: int) -> None:
    with pytest.raises(PatternError, match=f"name of {length} characters takes too long to match"):
        parse_regex(regex).match("a" * length)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("{x:**}{y:**}{z:**}{x}{y}{z}", "a" * 399 + "b"),
        ("{x:**}.{y:**}{x}.{y}", "a." * 50_000),
        ("*a" * 400, "a" * 100_000),
    ],
)
def test_a_pattern_refuses_a_name_that_is_too_long_for_it(pattern: str, name: str) -> None:
    with pytest.raises(PatternError, match=f"name of {len(name)} characters takes too long to match"):
        parse_pattern(pattern).match(name)


def test_a_stem_is_matched_in_a_name_of_any_length() -> None:
    assert parse_pattern("**.**.{x}b").match("ab." * 33_000) is None


def test_a_name_that_is_too_long_is_a_problem_of_the_spec() -> None:
    spec = parse_spec(
        "version = 1\n[scope.s]\nregex = '.*a.*b'\nblock = [1, 1]\nshape = [1, 4]\nnnz = 2\n", "s"
    )
    with pytest.raises(SpecError, match=r"^s: \[scope.s\] regex: a tensor's name of 5000 characters"):
        bind(spec, [TensorInfo("a" * 5000, "F32", (4, 4))])


def test_mutated_specs_are_bound_or_refused_without_a_fault() -> None:
    faults: list[tuple[str, str]] = []
    fuzz(400, 1, lambda text, said: faults.append((said, text)))
    assert faults == []
