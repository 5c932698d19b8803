"""Headers at random: the verdict of the safetensors package, and headers that it can load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseprune.checkpoint import header, lay_out
from sparseprune.checkpoint.header import read_header
from sparseprune.engine.dtypes import DTYPES
from tests.checkpoint.headers import STRICTER, file_of, loaded, refusal, tensor, verdict_of_package
from tests.fuzzing import headers as fuzzing

PER_EXAMPLE = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
BASES = [
    file_of({}),
    file_of({"__metadata__": {"b": "1"}, "a": tensor(), "b": tensor("F16", [0, 2], [1, 1])}, b"1"),
    file_of({"z": tensor(), "a": tensor("F32", [1], [1, 5], note={"x": [1, 2.5e300, None]})}, b"12345"),
]
SIZES: st.SearchStrategy[Any] = st.integers(0, 3) | st.sampled_from(
    [-1, 2**32, 2**63, 2**64, True, 1.0, None, "1", []]
)
OFFSETS: st.SearchStrategy[Any] = st.integers(0, 12) | st.sampled_from([-1, 2**64, 1.0, None])
ODD_ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F7", None, 3]),
        "shape": st.lists(SIZES, max_size=3) | SIZES,
        "data_offsets": st.lists(OFFSETS, max_size=3),
        "note": st.none() | st.text(max_size=2),
    },
)
NAMES = st.text(max_size=3)


@st.composite
def nearly_legal(draw: st.DrawFn) -> bytes:
    """A legal document of which at most one thing was changed."""
    shapes = draw(st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3))))
    document: dict[str, Any] = {}
    begin = 0
    for number, (dtype, shape) in enumerate(shapes):
        bits = DTYPES[dtype].bits
        for size in shape:
            bits *= size
        document[f"t{number}"] = tensor(dtype, shape, [begin, begin + bits // 8])
        begin += bits // 8
    if draw(st.booleans()) and document:
        name = draw(st.sampled_from(list(document)))
        document[name].update(draw(ODD_ENTRY))
    if draw(st.booleans()):
        metadata: st.SearchStrategy[Any] = st.none() | st.dictionaries(
            NAMES, NAMES | st.integers(), max_size=2
        )
        document["__metadata__"] = draw(metadata)
    return file_of(document, bytes(max(0, begin + draw(st.sampled_from([0, 0, 0, 0, 1, -1])))))


@PER_EXAMPLE
@given(content=nearly_legal())
def test_gives_the_verdict_of_the_package_on_odd_documents(tmp_path: Path, content: bytes) -> None:
    assert (refusal(tmp_path, content) is None) == verdict_of_package(content)


@PER_EXAMPLE
@given(base=st.sampled_from(BASES), at=st.integers(0, 700), new=st.binary(max_size=2), cut=st.integers(0, 2))
def test_gives_the_verdict_of_the_package_on_damaged_bytes(
    tmp_path: Path, base: bytes, at: int, new: bytes, cut: int
) -> None:
    at %= len(base)
    content = base[:at] + new + base[at + cut :]
    reason = refusal(tmp_path, content)
    if reason is None:
        assert verdict_of_package(content)
    elif verdict_of_package(content):
        assert any(known in reason for known in STRICTER)


def differing(rounds: int) -> list[str]:
    found: list[str] = []
    verdicts = fuzzing.fuzz(rounds, 5, lambda _, said: found.append(said))
    assert verdicts[True] > rounds // 20
    assert verdicts[False] > rounds // 20
    return found


def test_reads_what_the_package_reads_from_damaged_headers() -> None:
    assert differing(3000) == []


@pytest.mark.parametrize(
    ("part", "wrong", "fragment"),
    [
        ("_check_cover", lambda entries: None, "accepted here, refused there"),
        ("_size_of", lambda name, dtype, shape: 1, "refused here, accepted there"),
        ("_checked_metadata", lambda metadata: {}, "metadata {}, there"),
        ("_check_length", lambda raw, entries, size: 1 // 0, "ZeroDivisionError"),
    ],
)
def test_the_loop_finds_a_reader_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, part: str, wrong: Callable[..., object], fragment: str
) -> None:
    monkeypatch.setattr(header, part, wrong)
    assert any(fragment in said for said in differing(3000))


@st.composite
def specifications(draw: st.DrawFn) -> list[tuple[str, str, tuple[int, ...]]]:
    names = draw(
        st.lists(st.text(max_size=4).filter(lambda name: name != "__metadata__"), max_size=6, unique=True)
    )
    shapes = st.lists(st.integers(0, 3), max_size=3).map(lambda sizes: tuple(4 * size for size in sizes))
    return [(name, draw(st.sampled_from(list(DTYPES))), draw(shapes)) for name in names]


@PER_EXAMPLE
@given(tensors=specifications(), metadata=st.dictionaries(NAMES, NAMES, max_size=2))
def test_a_laid_out_header_reads_back_and_loads_with_the_package(
    tmp_path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    tensors = [
        (name, dtype, shape if DTYPES[dtype].bits >= 8 else (*shape, 4)) for name, dtype, shape in tensors
    ]
    laid = lay_out(tensors, metadata)
    assert laid.data_begin % 8 == 0
    path = tmp_path / "m.safetensors"
    path.write_bytes(laid.raw + bytes(laid.file_size - laid.data_begin))
    read = read_header(path)
    assert (read, read.metadata, read.file_size) == (laid, metadata, laid.file_size)
    assert [(entry.name, entry.dtype, entry.shape) for entry in laid.entries] == tensors
    assert {entry.name for entry in read.entries} == {name for name, _ in loaded(path.read_bytes())}
