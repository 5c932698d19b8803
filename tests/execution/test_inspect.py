"""What is measured in a checkpoint: every dtype and shape, cut into any slabs, by any number of jobs."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.checkpoint import StoredTensor, TensorReader, lay_out, open_checkpoint
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import MachineError
from sparseprune.execution.inspect import (
    BLOCKS,
    PATTERNS,
    SLAB,
    BlockShape,
    Pattern,
    Questions,
    TensorFacts,
    Zeros,
    inspect_checkpoint,
)
from sparseprune.execution.regions import Resources

Index = tuple[int, ...]
Drawn = tuple[str, str, tuple[int, ...], bytes]

ASKED = Questions()


def write(path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], data: bytes) -> Path:
    path.write_bytes(lay_out(tensors, {}).raw + data)
    return path


def measure(
    path: Path,
    jobs: int,
    slab: int = SLAB,
    progress: Callable[[int, str], None] = lambda *_: None,
    questions: Questions = ASKED,
) -> tuple[TensorFacts, ...]:
    tensors = tuple(open_checkpoint(path).tensors.values())
    with TensorReader() as reader:
        return inspect_checkpoint(tensors, reader, questions, Resources(jobs, 1 << 30), progress, slab)


def is_nonfinite(name: str, pattern: int) -> bool:
    """Said of each dtype anew; that torch says the same is another test's part."""
    if name == "C64":
        return is_nonfinite("F32", pattern >> 32) or is_nonfinite("F32", pattern & 0xFFFF_FFFF)
    exponents = {
        "F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80, "F8_E5M2": 0x7C,
        "F8_E4M3": 0x7F, "F8_E8M0": 0xFF,
    }  # fmt: skip
    if name in exponents:
        return pattern & exponents[name] == exponents[name]
    return name.endswith("FNUZ") and pattern == 0x80


def satisfied_by_hand(pattern: Pattern, shape: Index, nonzero: dict[Index, bool]) -> bool:
    """Counts every group of neighbours, wherever it begins."""
    if pattern.both:
        return all(
            satisfied_by_hand(Pattern(pattern.kept, pattern.group, axis), shape, nonzero) for axis in (-1, -2)
        )
    if len(shape) < 2 or not nonzero or pattern.axis not in range(-len(shape), len(shape)):
        return False
    axis = pattern.axis % len(shape)
    if shape[axis] % pattern.group:
        return False
    counts: dict[Index, int] = {}
    for index, mark in nonzero.items():
        group = (*index[:axis], index[axis] // pattern.group, *index[axis + 1 :])
        counts[group] = counts.get(group, 0) + mark
    return max(counts.values()) <= pattern.kept


def zeros_by_hand(places: Iterable[tuple[Index, bool]], of: int) -> Zeros:
    """Of parts, told by where their elements lie, those without a mark; `of` counts empty ones too."""
    occupied: dict[Index, bool] = {}
    for part, mark in places:
        occupied[part] = occupied.get(part, False) or mark
    return Zeros(sum(not mark for mark in occupied.values()), of)


def parts_by_hand(shape: Index, nonzero: dict[Index, bool], height: int, width: int) -> Zeros:
    """Blocks of the matrices, each element of which is looked at."""
    if len(shape) == 3:
        matrices, rows, columns = shape
    else:
        matrices, rows, columns = 1, shape[0], prod(shape[1:])
    places = []
    for number, mark in enumerate(nonzero.values()):
        row, column = number // columns % rows, number % columns
        places.append(((number // (rows * columns), row // height, column // width), mark))
    return zeros_by_hand(places, matrices * -(-rows // height) * -(-columns // width))


def facts_by_hand(
    name: str, dtype: str, shape: Index, data: bytes, questions: Questions = ASKED
) -> TensorFacts:
    """Plain loops over elements."""
    bits, zero_bits = DTYPES[dtype].bits, DTYPES[dtype].zero_bits
    numel = len(data) * 8 // bits
    if zero_bits is None:
        return TensorFacts(name, dtype, shape, numel, blocks=None)
    width = bits // 8
    elements = [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]
    marks = [zero_bits == 0 or element & zero_bits != 0 for element in elements]
    nonzero = dict(zip(product(*map(range, shape)), marks, strict=True))
    patterns = tuple(str(one) for one in questions.patterns if satisfied_by_hand(one, shape, nonzero))
    slices = tuple(
        zeros_by_hand((((index[dim],), mark) for index, mark in nonzero.items()), size)
        for dim, size in enumerate(shape)
    )
    counted = marks.count(False), sum(is_nonfinite(dtype, element) for element in elements)
    if len(shape) < 2:
        return TensorFacts(name, dtype, shape, numel, *counted, patterns, slices, blocks=None)
    far = 10**9
    rows, columns = (parts_by_hand(shape, nonzero, *size) for size in ((1, far), (far, 1)))
    if not numel:  # a column of no rows is none of any block, but it is a column
        columns = Zeros(0, shape[0] * shape[2] if len(shape) == 3 else prod(shape[1:]))
        rows = Zeros(0, shape[0] * shape[1] if len(shape) == 3 else shape[0])
    blocks = {str(one): parts_by_hand(shape, nonzero, one.rows, one.columns) for one in questions.blocks}
    return TensorFacts(
        name, dtype, shape, numel, *counted, patterns, slices, rows, columns, MappingProxyType(blocks)
    )


small = st.integers(1, 7)
wide = st.one_of(small, st.sampled_from([8, 12, 16, 24, 33, 60, 64, 65, 128, 192]))
shapes = st.one_of(
    st.just(()),
    st.tuples(wide),
    st.tuples(wide, wide).filter(lambda shape: prod(shape) < 3000),
    st.tuples(small, small, wide),
    st.tuples(small, small, st.integers(1, 4), st.integers(1, 4)),
    st.lists(st.integers(0, 8), min_size=1, max_size=4).map(tuple).filter(lambda shape: prod(shape) < 3000),
)


@st.composite
def marks_of(draw: st.DrawFn, shape: Index) -> list[bool]:
    """Which elements are not zero: all, none, some, repeated rows, all but some slices, or stretches."""
    numel = prod(shape)
    kind = draw(st.sampled_from(["all", "none", "some", "repeated", "slices", "stretches"]))
    if kind == "repeated":
        row = draw(st.lists(st.booleans(), min_size=1, max_size=12))
        marks = [row[at % len(row)] for at in range(numel)]
    elif kind == "slices":
        gone = [draw(st.sets(st.integers(0, max(0, size - 1)), max_size=size)) for size in shape]
        marks = [
            not any(at in slices for at, slices in zip(index, gone, strict=True))
            for index in product(*map(range, shape))
        ]
    elif kind == "stretches":
        shares = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=5))
        random = draw(st.randoms(use_true_random=False))
        marks = [random.random() < shares[at * len(shares) // numel] for at in range(numel)]
    else:
        share = {"all": 1.0, "none": 0.0, "some": draw(st.sampled_from([0.02, 0.5, 0.98]))}[kind]
        random = draw(st.randoms(use_true_random=False))
        marks = [random.random() < share for _ in range(numel)]
    if numel:
        for place in draw(st.lists(st.integers(0, numel - 1), max_size=2)):
            marks[place] = draw(st.booleans())
    return marks


@st.composite
def tensor(draw: st.DrawFn, name: str) -> Drawn:
    """Of any dtype; zeros have either sign, and some of the other elements are not finite."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    bits = DTYPES[dtype].bits
    if bits < 8:
        return name, dtype, (2, 8), draw(st.binary(min_size=bits * 2, max_size=bits * 2))
    shape = draw(shapes)
    width, zero_bits = bits // 8, DTYPES[dtype].zero_bits or 0
    sign = 1 << bits - 1
    zeros = [bytes(width), (0 if sign & zero_bits else sign).to_bytes(width, "little")]
    infinity = b"\x7c" if bits == 8 else bytes(width - 2) + b"\x80\x7f"
    others = [b"\1" + bytes(width - 1), b"\xff" * width, infinity]
    chosen = draw(st.lists(st.sampled_from(others), min_size=1, max_size=5))
    marks = draw(marks_of(shape))
    elements = [chosen[at % len(chosen)] if mark else zeros[at % 2] for at, mark in enumerate(marks)]
    return name, dtype, shape, b"".join(elements)


QUESTIONS = (
    ASKED,
    Questions((), ()),
    Questions(
        (Pattern(0, 1), Pattern(1, 3), Pattern(2, 4, 0), Pattern(2, 4, -2), Pattern(3, 6), Pattern(2, 4, 1)),
        (BlockShape(1, 4), BlockShape(3, 5), BlockShape(5, 1), BlockShape(2, 64)),
    ),
    Questions(
        (
            Pattern(20, 64),
            Pattern(30, 128),
            Pattern(1, 2, 3),
            Pattern(1, 5, -3),
            Pattern(40, 65),
            Pattern(1, 2),
            Pattern(2, 4, both=True),
            Pattern(1, 2, both=True),
            Pattern(2, 3, both=True),
        ),
        (BlockShape(1, 1), BlockShape(7, 2), BlockShape(6, 70), BlockShape(2, 128), BlockShape(1000, 1000)),
    ),
)


@given(
    st.integers(0, 3).flatmap(lambda count: st.tuples(*[tensor(str(number)) for number in range(count)])),
    st.sampled_from(QUESTIONS),
    st.sampled_from([1, 100, 512, 1500, SLAB]),
    st.integers(1, 3),
)
def test_facts_are_those_of_plain_loops(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: tuple[Drawn, ...],
    questions: Questions,
    slab: int,
    jobs: int,
) -> None:
    path = write(
        tmp_path_factory.getbasetemp() / "drawn.safetensors",
        [(name, dtype, shape) for name, dtype, shape, _ in tensors],
        b"".join(data for *_, data in tensors),
    )
    measured = measure(path, jobs, slab, questions=questions)
    assert measured == tuple(facts_by_hand(*each, questions) for each in tensors)


def some(at: Index, part: float) -> bool:
    """Such that some rows, columns and blocks are zero and most patterns hold."""
    return at[-1] % 4 == 1 and at[-2] % 9 > 2 and at[0] % 5 != 1


FILLS: dict[str, Callable[[Index, float], bool]] = {
    "some": some,
    "all, then none": lambda _, part: part < 0.5,
    "none, then all": lambda _, part: part >= 0.5,
    "some, all, some": lambda at, part: 0.3 < part < 0.7 or some(at, part),
    "none, but for one in the middle": lambda at, part: all(index == 1 for index in at),
}


SLABS = (1, 64, 130, 192, 256, 390, 1000, 5000, SLAB)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    "shape", [(37, 130), (3, 11, 130), (130, 3), (2, 70, 2), (70, 1, 3), (7, 5, 3, 2), (1, 300)]
)
def test_no_size_of_slabs_changes_a_fact(tmp_path: Path, shape: Index, fill: str) -> None:
    """Slabs without a zero, of zeros alone and of both follow each other."""
    indices = list(product(*map(range, shape)))
    data = bytes(FILLS[fill](at, number / len(indices)) for number, at in enumerate(indices))
    path = write(tmp_path / "m.safetensors", [("w", "I8", shape)], data)
    questions = Questions(
        (
            Pattern(1, 2),
            Pattern(1, 10),
            Pattern(9, 130),
            Pattern(6, 37, 0),
            Pattern(8, 11, -2),
            Pattern(30, 70, 1),
        ),
        (BlockShape(3, 3), BlockShape(4, 4), BlockShape(10, 1), BlockShape(1, 40), BlockShape(12, 64)),
    )
    expected = facts_by_hand("w", "I8", shape, data, questions)
    for slab in SLABS:
        assert measure(path, 2, slab, questions=questions) == (expected,), slab


@pytest.mark.parametrize(
    ("shape", "slices", "rows", "columns"),
    [
        ((0, 8), (0, 8), 0, 8),
        ((8, 0), (8, 0), 8, 0),
        ((0, 0), (0, 0), 0, 0),
        ((2, 0, 3), (2, 0, 3), 0, 6),
        ((0, 2, 3), (0, 2, 3), 0, 0),
        ((0, 2, 3, 4), (0, 2, 3, 4), 0, 24),
    ],
)
def test_what_holds_no_elements_is_there_and_is_not_zero(
    tmp_path: Path, shape: Index, slices: Index, rows: int, columns: int
) -> None:
    (facts,) = measure(write(tmp_path / "m.safetensors", [("w", "F32", shape)], b""), 1)
    assert (facts.zeros, facts.nonfinite, facts.patterns) == (0, 0, ())
    assert facts.slices == tuple(Zeros(0, size) for size in slices)
    assert (facts.rows, facts.columns) == (Zeros(0, rows), Zeros(0, columns))
    assert facts.blocks == {"4x4": Zeros(0, 0), "16x16": Zeros(0, 0), "32x32": Zeros(0, 0)}


def test_a_vector_has_slices_but_no_rows_and_a_number_has_none(tmp_path: Path) -> None:
    rows = [("number", "I8", ()), ("none", "I8", (0,)), ("vector", "I8", (4,))]
    vector, number, none = sorted(
        measure(write(tmp_path / "m.safetensors", rows, bytes([0, 1, 0, 0, 5])), 1),
        key=lambda facts: ["vector", "number", "none"].index(facts.name),
    )
    assert (vector.zeros, vector.slices) == (2, (Zeros(2, 4),))
    assert (none.zeros, none.slices) == (0, (Zeros(0, 0),))
    assert (number.zeros, number.slices) == (1, ())
    for facts in (vector, number, none):
        assert (facts.patterns, facts.rows, facts.columns, facts.blocks) == ((), None, None, None)


def test_facts_come_in_the_order_in_which_tensors_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", [(name, "I8", (2, 2)) for name in "abc"], bytes(12))
    tensors = open_checkpoint(path).tensors
    chosen = [tensors[name] for name in "ca"]
    with TensorReader() as reader:
        facts = inspect_checkpoint(chosen, reader, ASKED, Resources(2, 1 << 30), lambda *_: None)
    assert [one.name for one in facts] == ["c", "a"]


def test_patterns_are_told_as_they_were_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", [("w", "I8", (4, 4))], bytes(16))
    asked = (
        Pattern(2, 4, 1),
        Pattern(1, 2),
        Pattern(2, 4),
        Pattern(1, 4, -2),
        Pattern(1, 4, 0),
        Pattern(1, 4, 2),
    )
    (facts,) = measure(path, 1, questions=Questions(asked, ()))
    assert facts.patterns == ("2:4@1", "1:2", "2:4", "1:4@-2", "1:4@0")
    assert facts.blocks == {}


def test_progress_is_told_every_byte_of_every_tensor_by_its_name(tmp_path: Path) -> None:
    rows = [
        ("wide", "U8", (40, 8)),
        ("small", "F4", (3, 8)),
        ("none", "F32", (0,)),
        ("scales", "F8_E8M0", (7,)),
    ]
    path = write(tmp_path / "m.safetensors", rows, bytes(320 + 12 + 7))
    told: list[tuple[int, str]] = []
    measure(path, 3, 16, lambda nbytes, name: told.append((nbytes, name)), Questions((), ()))
    assert {name: sum(nbytes for nbytes, of in told if of == name) for _, name in told} == {
        "wide": 320,
        "small": 12,
        "scales": 7,
    }
    assert max(told)[0] == 16


def test_one_tensor_is_read_by_all_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.safetensors", [("w", "U8", (3, 8))], bytes(24))
    together = threading.Barrier(3, timeout=60)
    read = TensorReader.read_into

    def meet(*arguments: Any) -> None:
        together.wait()
        read(*arguments)

    monkeypatch.setattr(TensorReader, "read_into", meet)
    (facts,) = measure(path, 3, 8)
    assert (facts.zeros, facts.patterns) == (24, ("1:2", "2:4", "4:8"))


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_failure_stops_all_jobs(tmp_path: Path, jobs: int) -> None:
    path = write(tmp_path / "m.safetensors", [("w", "U8", (1000, 8))], bytes(8000))
    told = []

    def fail(nbytes: int, name: str) -> None:
        told.append(nbytes)
        if len(told) == 3:
            raise ValueError(name)
        time.sleep(0.01)

    before = threading.active_count()
    with pytest.raises(ValueError, match="w"):
        measure(path, jobs, 8, fail)
    assert len(told) < 500
    assert threading.active_count() == before


def test_of_two_failures_the_first_in_order_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.safetensors", [("a", "U8", (8,)), ("b", "U8", (8,))], bytes(16))
    later = threading.Event()

    def fail(_: TensorReader, stored: StoredTensor, *rest: object) -> None:
        if stored.name == "b":
            later.set()
        later.wait(60)
        time.sleep(0.1 * (stored.name == "a"))
        raise ValueError(f"in {stored.name}")

    monkeypatch.setattr(TensorReader, "read_into", fail)
    with pytest.raises(ValueError, match="in a"):
        measure(path, 2, 8)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_file_that_ends_too_early_is_told_by_its_first_missing_byte(tmp_path: Path, jobs: int) -> None:
    path = write(tmp_path / "m.safetensors", [("w", "U8", (1000, 8))], bytes(8000))
    size = path.stat().st_size

    def cut(*_: object) -> None:
        os.truncate(path, size - 4003)

    with pytest.raises(MachineError, match=f"it ends at byte {size - 4003}, had {size}"):
        measure(path, jobs, 8, cut)


def test_an_interrupt_ends_the_jobs_and_is_raised(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", [("w", "U8", (1000, 8))], bytes(8000))
    told: list[int] = []

    def interrupt(nbytes: int, name: str) -> None:
        if not told:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        told.append(nbytes)
        time.sleep(0.05)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        measure(path, 2, 8, interrupt)
    assert len(told) < 500
    assert threading.active_count() == before


def test_plain_loops_tell_a_case_by_hand() -> None:
    data = bytes([0x80, 0, 0, 1, 1, 1, 0, 0x7F] + [0] * 4 + [0x80, 0, 0, 1])
    questions = Questions(
        (*PATTERNS, Pattern(3, 4), Pattern(1, 2, 0), Pattern(2, 2, 0)), (BlockShape(1, 3), *BLOCKS)
    )
    one = {"4x4": Zeros(0, 2), "16x16": Zeros(0, 1), "32x32": Zeros(0, 1)}
    assert facts_by_hand("w", "F8_E4M3", (2, 8), data, questions) == TensorFacts(
        "w",
        "F8_E4M3",
        (2, 8),
        16,
        zeros=11,
        nonfinite=1,
        patterns=("4:8", "3:4", "2:2@0"),
        slices=(Zeros(0, 2), Zeros(4, 8)),
        rows=Zeros(0, 2),
        columns=Zeros(4, 8),
        blocks=MappingProxyType({"1x3": Zeros(3, 6), **one}),
    )
    stack = facts_by_hand("w", "U8", (2, 2, 2), bytes([1, 0, 0, 0, 0, 0, 0, 0]))
    assert stack.slices == (Zeros(1, 2), Zeros(1, 2), Zeros(1, 2))
    assert (stack.rows, stack.columns) == (Zeros(3, 4), Zeros(3, 4))
    assert facts_by_hand("w", "U8", (8,), data[:8]).patterns == ()
    assert facts_by_hand("w", "F8_E8M0", (1, 2), b"\x00\xff").nonfinite == 1
