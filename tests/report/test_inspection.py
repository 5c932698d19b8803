"""What is measured in a checkpoint: every dtype, cut into any slabs, by any number of jobs."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.checkpoint import TensorReader, lay_out, open_checkpoint
from sparseprune.engine.dtypes import DTYPES, torch_dtype
from sparseprune.errors import MachineError
from sparseprune.report import inspection
from sparseprune.report.inspection import TensorFacts, inspect_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PATTERNS = ((1, 2), (2, 4), (4, 8))
OTHERS = ((0, 1), (2, 3), (2, 2), (1, 4), (2, 4), (3, 6), (7, 12), (16, 32), (20, 64))


def write(path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], data: bytes) -> Path:
    path.write_bytes(lay_out(tensors, {}).raw + data)
    return path


def measure(
    path: Path, jobs: int, slab: int = 1 << 21, progress: Callable[[int, str], None] = lambda *_: None
) -> tuple[TensorFacts, ...]:
    with pytest.MonkeyPatch.context() as patch, TensorReader() as reader:
        patch.setattr(inspection, "_SLAB", slab)
        return inspect_checkpoint(open_checkpoint(path), reader, jobs, progress)


def facts_by_hand(
    name: str, dtype: str, shape: tuple[int, ...], data: bytes, patterns: tuple[tuple[int, int], ...]
) -> TensorFacts:
    """Plain loops over elements, rows and groups."""
    bits, zero_bits = DTYPES[dtype].bits, DTYPES[dtype].zero_bits
    numel = len(data) * 8 // bits
    if zero_bits is None:
        return TensorFacts(name, dtype, shape, numel, None, ())
    width = bits // 8
    elements = [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]
    nonzero = [zero_bits == 0 or element & zero_bits != 0 for element in elements]
    satisfied = []
    for kept, group in patterns:
        if len(shape) < 2 or numel == 0 or shape[-1] % group:
            continue
        rows = [nonzero[at : at + shape[-1]] for at in range(0, numel, shape[-1])]
        counts = [sum(row[at : at + group]) for row in rows for at in range(0, shape[-1], group)]
        if all(count <= kept for count in counts):
            satisfied.append(f"{kept}:{group}")
    return TensorFacts(name, dtype, shape, numel, nonzero.count(False), tuple(satisfied))


@st.composite
def tensor(draw: st.DrawFn, name: str) -> tuple[str, str, tuple[int, ...], bytes]:
    """Of any dtype; its elements repeat a row of zeros of either sign and others, with some changed."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    last = st.one_of(st.integers(0, 9), st.sampled_from([12, 16, 24, 60, 64, 192]))
    shape = (
        (*draw(st.lists(st.sampled_from([1, 2, 3, 0]), max_size=2)), draw(last))
        if draw(st.booleans())
        else ()
    )
    bits = DTYPES[dtype].bits
    if bits < 8:
        shape = (2, 8)
    numel = 1
    for size in shape:
        numel *= size
    if bits < 8:
        return name, dtype, shape, draw(st.binary(min_size=numel * bits // 8, max_size=numel * bits // 8))
    kinds = [
        bytes(bits // 8),
        bytes(bits // 8 - 1) + b"\x80",
        b"\1" + bytes(bits // 8 - 1),
        b"\xff" * (bits // 8),
    ]
    chosen = st.sampled_from(kinds)
    row = draw(st.lists(chosen, min_size=1, max_size=12))
    elements = [row[at % len(row)] for at in range(numel)]
    if numel:
        for place in draw(st.lists(st.integers(0, numel - 1), max_size=2)):
            elements[place] = draw(chosen)
    return name, dtype, shape, b"".join(elements)


@given(
    st.integers(0, 4).flatmap(lambda count: st.tuples(*[tensor(str(number)) for number in range(count)])),
    st.sampled_from([PATTERNS, OTHERS, ((1, 3), (2, 4), (2, 5))]),
    st.sampled_from([1, 8, 100, 1 << 21]),
    st.integers(1, 4),
)
def test_facts_are_those_of_plain_loops(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: tuple[tuple[str, str, tuple[int, ...], bytes], ...],
    patterns: tuple[tuple[int, int], ...],
    slab: int,
    jobs: int,
) -> None:
    path = write(
        tmp_path_factory.getbasetemp() / "drawn.safetensors",
        [(name, dtype, shape) for name, dtype, shape, _ in tensors],
        b"".join(data for *_, data in tensors),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "PATTERNS", patterns)
        assert measure(path, jobs, slab) == tuple(facts_by_hand(*each, patterns) for each in tensors)


@pytest.mark.parametrize("slab", range(1, 50))
def test_a_slab_holds_whole_groups_of_every_pattern(tmp_path: Path, slab: int) -> None:
    patterns = ((1, 3), (2, 4), (2, 5), (3, 6))
    data = bytes([0, 0, 1, 0, 1, 0] * 20)
    path = write(tmp_path / "m.safetensors", [("w", "I16", (1, 60))], data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "PATTERNS", patterns)
        assert measure(path, 2, slab) == (facts_by_hand("w", "I16", (1, 60), data, patterns),)


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.torch_name])
def test_an_element_is_zero_just_where_torch_says_so(name: str, tmp_path: Path) -> None:
    """Every pattern of one and two bytes; of wider ones a sign, a one and so on in every place."""
    width = DTYPES[name].bits // 8
    patterns = list(range(2 ** (8 * width))) if width < 3 else [1 << at for at in range(8 * width)] + [0]
    if name == "BOOL":
        patterns = [0, 1]
    if name == "C64":
        patterns += [1 << 63 | 1 << 31]
    data = b"".join(pattern.to_bytes(width, "little") for pattern in patterns)
    values = torch.frombuffer(bytearray(data), dtype=torch_dtype(name))
    wide = values.to(torch.complex128 if values.is_complex() else torch.float64)
    rows = [("w", name, (len(patterns),))]
    (facts,) = measure(write(tmp_path / "m.safetensors", rows, data), 1)
    assert facts.zeros == int((wide == 0).sum())


def test_progress_is_told_every_byte_of_every_tensor_by_its_name(tmp_path: Path) -> None:
    rows = [
        ("wide", "U8", (40, 8)),
        ("small", "F4", (3, 8)),
        ("none", "F32", (0,)),
        ("scales", "F8_E8M0", (7,)),
    ]
    path = write(tmp_path / "m.safetensors", rows, bytes(320 + 12 + 7))
    told: list[tuple[int, str]] = []
    measure(path, 3, 16, lambda nbytes, name: told.append((nbytes, name)))
    assert {name: sum(nbytes for nbytes, of in told if of == name) for _, name in told} == {
        "wide": 320,
        "small": 12,
        "scales": 7,
    }
    assert max(told)[0] == 16


def test_one_tensor_is_read_by_all_jobs(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", [("w", "U8", (3, 8))], bytes(24))
    together = threading.Barrier(3, timeout=60)

    def meet(*_: object) -> None:
        together.wait()

    (facts,) = measure(path, 3, 8, meet)
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


def test_of_two_failures_the_first_in_order_is_raised(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", [("a", "U8", (8,)), ("b", "U8", (8,))], bytes(16))
    later = threading.Event()

    def fail(_: int, name: str) -> None:
        if name == "b":
            later.set()
        later.wait(60)
        time.sleep(0.1 * (name == "a"))
        raise ValueError(f"in {name}")

    with pytest.raises(ValueError, match="in a"):
        measure(path, 2, 8, fail)


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
    data = bytes([0x80, 0, 0, 1, 1, 1, 0, 0])
    facts = facts_by_hand("w", "F8_E4M3", (1, 8), data, (*PATTERNS, (3, 4)))
    assert facts == TensorFacts("w", "F8_E4M3", (1, 8), 8, 5, ("2:4", "4:8", "3:4"))
    assert facts_by_hand("w", "U8", (1, 8), data, ((1, 2), (3, 8))).patterns == ()
    assert facts_by_hand("w", "U8", (8,), data, PATTERNS).patterns == ()
