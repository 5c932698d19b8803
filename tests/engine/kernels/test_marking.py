"""What is zero and what is no finite number, in every dtype: as torch says, and as plain loops count."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.engine.dtypes import DTYPES, torch_dtype
from sparseprune.engine.kernels.counting import mark_nonzero
from sparseprune.engine.kernels.formats import FORMATS

WHOLE_BYTES = [name for name, dtype in DTYPES.items() if dtype.zero_bits is not None]


def marked(name: str, patterns: list[int]) -> tuple[list[bool], int, int]:
    """The marks, and what was said of them."""
    bits = np.array(patterns, dtype=f"u{DTYPES[name].bits // 8}")
    marks = np.array(
        [number % 2 == 0 for number in range(len(patterns))], dtype=np.bool_
    )  # of an earlier call
    zeros, nonfinite = mark_nonzero(bits, DTYPES[name], marks)
    return marks.tolist(), zeros, nonfinite


def telling_patterns(name: str) -> list[int]:
    """Every pattern of one and two bytes; of wider ones those around which a float's kind changes."""
    bits = DTYPES[name].bits
    if name == "BOOL":
        return [0, 1]
    if bits <= 16:
        return list(range(1 << bits))
    if name == "C64":
        halves = [0, 1, 0x7F7F_FFFF, 0x7F80_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFF80_0000, 0xFFFF_FFFF]
        return [high << 32 | low for high in halves for low in halves]
    infinity = 0x7F80_0000 if bits == 32 else 0x7FF0_0000_0000_0000
    near = [infinity - 1, infinity, infinity + 1, (1 << bits - 1) - 1, 0, 1]
    return [*near, *(1 << bits - 1 | pattern for pattern in near), *(1 << at for at in range(bits))]


@pytest.mark.parametrize("name", [name for name in WHOLE_BYTES if DTYPES[name].torch_name])
def test_an_element_is_zero_or_not_finite_just_where_torch_says_so(name: str) -> None:
    patterns = telling_patterns(name)
    data = b"".join(pattern.to_bytes(DTYPES[name].bits // 8, "little") for pattern in patterns)
    values = torch.frombuffer(bytearray(data), dtype=torch_dtype(name))
    wide = values.to(torch.complex128 if values.is_complex() else torch.float64)
    zero, nonfinite = (wide == 0).tolist(), (~torch.isfinite(wide)).tolist()
    step = 1 if len(patterns) < 1000 else 16
    for begin in range(0, len(patterns), step):
        part = slice(begin, begin + step)
        expected = [not each for each in zero[part]], sum(zero[part]), sum(nonfinite[part])
        assert marked(name, patterns[part]) == expected, hex(patterns[begin])
    assert marked(name, patterns)[1:] == (sum(zero), sum(nonfinite))


@pytest.mark.parametrize("name", WHOLE_BYTES)
@settings(max_examples=25)
@given(data=st.data())
def test_many_elements_are_counted_as_one_by_one(name: str, data: st.DataObject) -> None:
    chosen = st.one_of(st.just(0), st.integers(0, (1 << DTYPES[name].bits) - 1))
    if DTYPES[name].bits > 16:
        chosen |= st.sampled_from(telling_patterns(name))
    patterns = data.draw(st.lists(chosen, max_size=40))
    single = [marked(name, [pattern]) for pattern in patterns]
    marks, zeros, nonfinite = marked(name, patterns)
    assert marks == [one[0][0] for one in single]
    assert (zeros, nonfinite) == (sum(one[1] for one in single), sum(one[2] for one in single))


def test_nothing_is_counted_in_nothing() -> None:
    for name in WHOLE_BYTES:
        assert marked(name, []) == ([], 0, 0)


def test_the_compiled_loops_mean_the_same_infinities() -> None:
    for name, form in FORMATS.items():
        assert DTYPES[name].nonfinite == (form.infinity, form.magnitude)
        assert DTYPES[name].zero_bits == form.magnitude


def test_only_floats_have_patterns_that_are_not_finite() -> None:
    without = {name for name, dtype in DTYPES.items() if dtype.nonfinite is None}
    assert without == {
        *("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"),
        *("F4", "F6_E2M3", "F6_E3M2"),
    }
