"""What a hostile spec, or a stranger's names may not do: run long, or end in a fault."""

from __future__ import annotations

import pytest

from sparseprune.errors import SpecError
from sparseprune.spec import TensorInfo, bind, parse_spec
from sparseprune.spec.patterns import PatternError, parse_pattern
from sparseprune.spec.regexes import parse_regex
from tests.fuzzing.specs import fuzz


@pytest.mark.parametrize("regex", ["(?i)" + "[\u017f]*s" * 20 + "x", "(?i)" + "[\u212a]*k" * 20 + "x"])
def test_letters_that_are_alike_in_either_case_are_counted_as_choices(regex: str) -> None:
    with pytest.raises(PatternError, match="could take very long"):
        parse_regex(regex)


@pytest.mark.parametrize(
    ("regex", "length"), [(r"(.*)\1\1\1x", 100_000), (r".*[^.]*\.", 100_000), (".*a.*b", 1000)]
)
def test_a_regex_with_choices_refuses_a_name_that_is_too_long(regex: str, length: int) -> None:
    with pytest.raises(PatternError, match=f"name of {length} characters would take it very long"):
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
    with pytest.raises(PatternError, match=f"name of {len(name)} characters would take it very long"):
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
