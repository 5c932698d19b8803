"""What is found between two checkpoints: every dtype, cut into any slabs, by any number of jobs."""

import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.checkpoint import StoredTensor, TensorReader, lay_out, open_checkpoint
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.comparing import Counts
from sparseprune.errors import MachineError
from sparseprune.execution.compare import SLAB, compare_checkpoints, sides_of
from sparseprune.execution.regions import Resources
from sparseprune.report.comparison import FIELDS, make_comparison, sheet_of, unmeasured
from sparseprune.results import Comparison
from tests.commands import as_data, schema
from tests.engine.kernels.test_comparing import compared_by_hand, special

Tensor = tuple[str, str, tuple[int, ...], bytes]


def write(path: Path, tensors: Sequence[Tensor]) -> Path:
    header = lay_out([(name, dtype, shape) for name, dtype, shape, _ in tensors], {})
    path.write_bytes(header.raw + b"".join(data for *_, data in tensors))
    return path


def comparison_of(
    before: Path,
    after: Path,
    jobs: int = 1,
    slab: int = SLAB,
    progress: Callable[[int, str], None] = lambda *_: None,
) -> Comparison:
    """A comparison, which its schema allows."""
    one, other = open_checkpoint(before), open_checkpoint(after)
    sides = sides_of(one.tensors, other.tensors, list(dict.fromkeys((*one.tensors, *other.tensors))))
    with TensorReader() as reader:
        found = compare_checkpoints(sides.pairs, reader, Resources(jobs, 1 << 30), progress, slab)
    comparison = make_comparison("before", "after", found, sides)
    schema("compare").validate(as_data(comparison))
    return comparison


def measure(before: Path, after: Path, **how: Any) -> dict[str, Any]:
    found: dict[str, Any] = as_data(comparison_of(before, after, **how))
    return found


def compared(tmp_path: Path, before: Sequence[Tensor], after: Sequence[Tensor], **how: Any) -> dict[str, Any]:
    return measure(
        write(tmp_path / "before.safetensors", before), write(tmp_path / "after.safetensors", after), **how
    )


def floats(name: str, *values: float, dtype: str = "float32", shape: tuple[int, ...] | None = None) -> Tensor:
    data = np.array(values).astype(dtype)
    kind = {"float32": "F32", "float64": "F64", "int64": "I64"}[dtype]
    return name, kind, (data.size,) if shape is None else shape, data.tobytes()


def patterns(dtype: str, data: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(data, dtype=f"u{DTYPES[dtype].bits // 8}")


def index_by_hand(place: int, shape: tuple[int, ...]) -> list[int] | None:
    return None if place < 0 else [int(at) for at in np.unravel_index(place, shape)] if shape else []


def assert_as_by_hand(entry: dict[str, Any], one: Tensor, other: Tensor) -> None:
    name, dtype, shape, before = one
    _, dtype_after, _, after = other
    assert (entry["name"], entry["dtype"], entry["dtype_after"]) == (name, dtype, dtype_after)
    assert (entry["shape"], entry["numel"]) == (list(shape), math.prod(shape))
    if None in (DTYPES[dtype].zero_bits, DTYPES[dtype_after].zero_bits):
        assert entry["differs"] == (before != after if dtype == dtype_after else None)
        changes = [entry[field] for field in ("changed", "zeroed", "revived", "altered")]
        assert changes == [None if entry["differs"] is not False else 0] * 4
        unknown = {*FIELDS[1:], "first_altered", "largest_change_at"}
        unknown -= {"changed", "zeroed", "revived", "altered"}
        assert {entry[field] for field in unknown} == {None}
        return
    found = compared_by_hand(patterns(dtype, before), patterns(dtype_after, after), dtype, dtype_after)
    counts = found.counts
    assert (
        Counts(
            entry["zeros_before"],
            entry["zeros_after"],
            entry["zeroed"],
            entry["altered"],
            counts.first_altered,
        )
        == counts
    )
    assert entry["first_altered"] == index_by_hand(counts.first_altered, shape)
    assert entry["changed"] == counts.zeroed + counts.altered
    assert entry["differs"] == (entry["changed"] > 0)
    assert entry["revived"] == counts.zeroed - counts.zeros_after + counts.zeros_before
    assert entry["sparsity"] == (counts.zeros_after / entry["numel"] if entry["numel"] else 0)
    if not (dtype == dtype_after and dtype in {"I64", "U64"}):  # floats may hold neighbours of these as equal
        largest = found.largest if math.isfinite(found.largest) else None
        assert entry["largest_change"] == (largest and pytest.approx(largest, rel=1e-15, abs=0))
        assert entry["largest_change_at"] == index_by_hand(found.place, shape)


WHOLE_OR_NOT = sorted(DTYPES)


@st.composite
def tensors(draw: st.DrawFn, name: str) -> tuple[Tensor, Tensor]:
    """Of one shape, mostly of one dtype; some elements of the second are those of the first."""
    dtype = draw(st.sampled_from(WHOLE_OR_NOT))
    other = dtype if draw(st.integers(0, 3)) else draw(st.sampled_from(WHOLE_OR_NOT))
    shape = draw(st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 2, 4), (40,)]))
    if DTYPES[dtype].bits < 8 or DTYPES[other].bits < 8:
        shape = draw(st.sampled_from([(0,), (8,), (2, 8)]))

    def data(kind: str) -> bytes:
        bits, numel = DTYPES[kind].bits, math.prod(shape)
        if bits < 8:
            return draw(st.binary(min_size=numel * bits // 8, max_size=numel * bits // 8))
        some = st.lists(st.sampled_from(special(kind)), min_size=numel, max_size=numel)
        return b"".join(pattern.to_bytes(bits // 8, "little") for pattern in draw(some))

    before = data(dtype)
    after = data(other)
    if dtype == other and draw(st.booleans()):
        width = max(1, DTYPES[dtype].bits // 8)
        kept = draw(st.sets(st.integers(0, len(before) // width)))
        pieces = [
            (before, after)[at not in kept][at * width : (at + 1) * width]
            for at in range(len(before) // width)
        ]
        after = b"".join(pieces)
    return (name, dtype, shape, before), (name, other, shape, after)


@settings(max_examples=40)
@given(
    st.integers(0, 4).flatmap(lambda count: st.tuples(*[tensors(str(number)) for number in range(count)])),
    st.sampled_from([1, 16, 100, SLAB]),
    st.integers(1, 3),
)
def test_facts_are_those_of_plain_loops(
    tmp_path_factory: pytest.TempPathFactory, pairs: tuple[tuple[Tensor, Tensor], ...], slab: int, jobs: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    before, after = [one for one, _ in pairs], [other for _, other in pairs]
    document = compared(folder, before, after[::-1], slab=slab, jobs=jobs)
    for entry, (one, other) in zip(document["tensors"], pairs, strict=True):
        assert_as_by_hand(entry, one, other)
    totals = document["totals"]
    known = [entry for entry in document["tensors"] if entry["zeros_after"] is not None]
    for count in ("zeros_before", "zeros_after", "changed", "zeroed", "revived", "altered"):
        assert totals[count] == sum(entry[count] for entry in known)
    assert totals["tensors"] == len(pairs)
    assert totals["numel"] == sum(entry["numel"] for entry in document["tensors"])
    assert totals["differing"] == sum(entry["differs"] is True for entry in document["tensors"])
    assert totals["uncompared"] == sum(entry["differs"] is None for entry in document["tensors"])


def test_shares_do_not_depend_on_jobs_and_hardly_on_slabs(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    values = drawn.normal(size=100_000)
    changed = np.where(drawn.integers(0, 3, values.size) == 0, 0, values)
    changed[77_777] *= 2
    before, after = [floats("w", *values)], [floats("w", *changed)]
    alone = compared(tmp_path, before, after, slab=4000)
    (entry,) = alone["tensors"]
    assert compared(tmp_path, before, after, slab=4000, jobs=4) == alone
    (other,) = compared(tmp_path, before, after)["tensors"]
    for field in ("energy_kept", "relative_error"):
        assert entry.pop(field) == pytest.approx(other.pop(field), rel=1e-14)
    assert entry == other
    assert entry["first_altered"] == [77_777]


def test_of_equal_changes_the_first_one_in_order_is_told_whoever_finds_it(tmp_path: Path) -> None:
    before = [floats("w", *[1.0] * 400, shape=(20, 20))]
    after = [floats("w", *[1.0] * 205, 0.0, *[1.0] * 100, 0.0, 3.0, 1.5, *[1.0] * 90, 3.0, shape=(20, 20))]
    for jobs in (1, 3):
        (entry,) = compared(tmp_path, before, after, jobs=jobs, slab=16)["tensors"]
        assert (entry["largest_change"], entry["largest_change_at"]) == (2.0, [15, 7])
        assert (entry["altered"], entry["first_altered"]) == (3, [15, 7])
        assert entry["zeroed"] == 2


@pytest.mark.parametrize(
    ("before", "after", "kept", "error"),
    [
        ([3, 4], [3, 4], 1.0, 0.0),
        ([3, 4], [3, 0], 9 / 25, 4 / 5),
        ([3, 4], [0, 0], 0.0, 1.0),
        ([3, 4], [-3, -4], 1.0, 2.0),
        ([3, 4], [6, 0], 9 / 25, 1.0),  # a survivor that is rebuilt keeps what it had
        ([], [], 1.0, 0.0),
        ([0, 0], [0, -0.0], 1.0, 0.0),
        ([0, 0], [0, 1], 1.0, None),
        ([math.inf, 1], [math.inf, 1], None, 0.0),
        ([math.inf, 1], [math.inf, 0], None, None),
        ([1, 1], [math.nan, 1], 1.0, None),
        ([1e-200, 1e-200], [1e-200, 0], None, None),
        ([1e-200, 1e-200], [1e-200, 1e-200], 1.0, 0.0),
        ([1e200, 1], [1e200, 0], None, None),
        ([1e-160, 1e-160], [1e-160, 0], None, None),  # squares that have lost digits
    ],
)
def test_a_share_is_told_where_it_is_a_finite_number(
    tmp_path: Path, before: list[float], after: list[float], kept: float | None, error: float | None
) -> None:
    pair = [floats("w", *before, dtype="float64")], [floats("w", *after, dtype="float64")]
    document = compared(tmp_path, *pair)
    (entry,) = document["tensors"]
    assert (entry["energy_kept"], entry["relative_error"]) == (kept, error)
    if all(map(math.isfinite, before)):
        totals = document["totals"]
        assert (totals["energy_kept"], totals["relative_error"]) == (kept, error)


def test_totals_are_shares_of_the_energy_of_all_floats(tmp_path: Path) -> None:
    before = [
        floats("a", 3, 0),
        floats("b", 4),
        floats("positions", 1000, dtype="int64"),
        floats("mask", -math.inf),
    ]
    after = [
        floats("a", 0, 0),
        floats("b", 4),
        floats("positions", 999, dtype="int64"),
        floats("mask", -math.inf),
    ]
    totals = compared(tmp_path, before, after)["totals"]
    assert (totals["energy_kept"], totals["relative_error"]) == (16 / 25, 3 / 5)
    assert (totals["sparsity_before"], totals["sparsity"]) == (1 / 5, 2 / 5)
    after[-1] = floats("mask", 0)
    totals = compared(tmp_path, before, after)["totals"]
    assert (totals["energy_kept"], totals["relative_error"]) == (None, None)
    totals = compared(tmp_path, [floats("a", 0)], [floats("a", 0)])["totals"]
    assert (totals["energy_kept"], totals["relative_error"]) == (1.0, 0.0)
    totals = compared(tmp_path, [], [])["totals"]
    assert (totals["energy_kept"], totals["relative_error"]) == (1.0, 0.0)


def test_tensors_of_one_side_and_of_two_shapes_are_told_with_their_shapes(tmp_path: Path) -> None:
    before = [floats("both", 1, 2), floats("gone", 1, 2, 3), floats("other", 1, 2, 3, 4, shape=(2, 2))]
    after = [floats("new", 1, shape=()), floats("both", 1, 2), floats("other", 1, 2, 3, 4)]
    document = compared(tmp_path, before, after)
    assert [entry["name"] for entry in document["tensors"]] == ["both"]
    assert document["added"] == [{"name": "new", "dtype": "F32", "shape": [], "numel": 1}]
    assert document["removed"] == [{"name": "gone", "dtype": "F32", "shape": [3], "numel": 3}]
    (reshaped,) = document["reshaped"]
    assert (reshaped["name"], reshaped["shape"], reshaped["shape_after"]) == ("other", [2, 2], [4])
    assert [document["totals"][key] for key in ("added", "removed", "reshaped")] == [1, 1, 1]


@pytest.mark.parametrize("jobs", [1, 3])
def test_progress_is_told_every_byte_of_both_sides_by_the_name_of_its_tensor(
    tmp_path: Path, jobs: int
) -> None:
    before = [
        ("wide", "U8", (40, 8), bytes(320)),
        ("small", "F4", (16,), bytes(8)),
        ("none", "F32", (0,), b""),
    ]
    before += [("cast", "F32", (9,), bytes(36)), ("packed", "F4", (16,), bytes(8))]
    after = [*before[:3], ("cast", "BF16", (9,), bytes(18)), ("packed", "U8", (16,), bytes(16))]
    told: list[tuple[int, str]] = []
    compared(
        tmp_path, before, after, jobs=jobs, slab=16, progress=lambda nbytes, name: told.append((nbytes, name))
    )
    sums = {name: sum(nbytes for nbytes, of in told if of == name) for _, name in told}
    assert sums == {"wide": 640, "small": 16, "cast": 54, "packed": 24}


def test_a_file_that_ends_too_early_is_told_whichever_side_it_is(tmp_path: Path) -> None:
    data = [("w", "U8", (1000, 8), bytes(8000))]
    for name in ("before", "after"):

        def cut(*_: object, path: Path = tmp_path / f"{name}.safetensors") -> None:
            os.truncate(path, path.stat().st_size - 4003)

        with pytest.raises(MachineError, match=rf"{name}\.safetensors: .*ends at byte"):
            compared(tmp_path, data, data, slab=64, progress=cut)


def test_one_tensor_is_read_by_all_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3, timeout=60)
    read = TensorReader.read_into

    def meet(reader: TensorReader, stored: StoredTensor, *rest: Any) -> None:
        if stored.shard.name.startswith("after"):
            together.wait()
        read(reader, stored, *rest)

    monkeypatch.setattr(TensorReader, "read_into", meet)
    data = [("w", "BF16", (12,), bytes(24))]
    document = compared(tmp_path, data, data, jobs=3, slab=8)
    assert document["totals"]["zeros_after"] == 12


def test_a_sheet_has_every_fact_of_every_tensor(tmp_path: Path) -> None:
    before = write(tmp_path / "before.safetensors", [floats("w", 1, 2, 3, 4, shape=(2, 2))])
    after = write(tmp_path / "after.safetensors", [floats("w", 1, 0, 3, 5, shape=(2, 2))])
    found = comparison_of(before, after)
    columns, rows = sheet_of(found)
    assert [dict(zip(columns, row, strict=True)) for row in rows] == [
        vars(found.tensors[0]) | {"shape": "2x2"}
    ]


def test_tensors_that_were_not_measured_have_a_number_of_elements_alone(tmp_path: Path) -> None:
    stored = open_checkpoint(write(tmp_path / "before.safetensors", [floats("w", 1)])).tensors
    (tensor,) = unmeasured(sides_of(stored, stored, ["w"]).pairs)
    assert {field for field in FIELDS if getattr(tensor, field) is not None} == {"numel"}


def test_plain_loops_tell_a_case_by_hand() -> None:
    one, other = floats("w", 1, 2, 0), floats("w", 1, 0, 5)
    entry = {
        "name": "w", "dtype": "F32", "dtype_after": "F32", "shape": [3], "numel": 3, "differs": True,
        "sparsity": 1 / 3, "zeros_before": 1, "zeros_after": 1, "changed": 2, "zeroed": 1, "revived": 1,
        "altered": 1, "first_altered": [2], "largest_change": 5.0, "largest_change_at": [2],
    }  # fmt: skip
    assert_as_by_hand(entry, one, other)
    for wrong in ({"altered": 2}, {"first_altered": [1]}, {"largest_change_at": [1]}, {"revived": 0}):
        with pytest.raises(AssertionError):
            assert_as_by_hand(entry | wrong, one, other)
