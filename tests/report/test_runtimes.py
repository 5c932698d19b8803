"""Verdicts on tensors against torch's own tables, checks and packing, and the other rules in plain loops."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse import _semi_structured_conversions as _conversions

from sparseprune.engine.dtypes import DTYPES, torch_dtype
from sparseprune.errors import SparsepruneError
from sparseprune.execution.inspect import Pattern, TensorFacts
from sparseprune.report.runtimes import RUNTIMES, Runtime, axes_of, needed_patterns, runtimes_of, verdict

TORCH = {
    "torch-cutlass": SparseSemiStructuredTensorCUTLASS,
    "torch-cusparselt": SparseSemiStructuredTensorCUSPARSELT,
}
ALL_PATTERNS = ("2:4", "1:2", "2:4@1")
EVERY_DTYPE = sorted(DTYPES)
USERS = [name for name, runtime in RUNTIMES.items() if runtime.demands]
SIZES = st.sampled_from([0, 1, 4, 8, 15, 16, 24, 32, 48, 64, 96, 100, 128, 192, 256, 257, 264, 512])


def facts(dtype: str, shape: Sequence[int], patterns: Collection[str] = ALL_PATTERNS) -> TensorFacts:
    numel = 1
    for extent in shape:
        numel *= extent
    return TensorFacts("t", dtype, tuple(shape), numel, zeros=0, patterns=tuple(patterns))


def reason(
    runtime: str, dtype: str, shape: Sequence[int], patterns: Collection[str] = ALL_PATTERNS
) -> str | None:
    found = verdict(RUNTIMES[runtime], facts(dtype, shape, patterns))
    assert found.eligible == (found.reason is None)
    return found.reason


def satisfies(tensor: torch.Tensor, pattern: Pattern) -> bool:
    """Slowly: along its axis, of every `group` neighbours at most `kept` are not zero."""
    for line in tensor.movedim(pattern.axis, -1).reshape(-1, tensor.shape[pattern.axis]).tolist():
        if len(line) % pattern.group:
            return False
        for begin in range(0, len(line), pattern.group):
            if sum(value != 0 for value in line[begin : begin + pattern.group]) > pattern.kept:
                return False
    return True


def measured(dtype: str, tensor: torch.Tensor, runtime: str) -> TensorFacts:
    """The facts of a tensor as a verdict wants them."""
    rank = tensor.ndim
    asked = [p for p in needed_patterns([RUNTIMES[runtime]]) if -rank <= p.axis < rank]
    return facts(dtype, tensor.shape, [str(p) for p in asked if satisfies(tensor, p)])


# What torch itself says


@pytest.mark.parametrize("name", TORCH)
def test_dtypes_and_sizes_are_those_of_the_installed_torch(name: str) -> None:
    table = TORCH[name]._DTYPE_SHAPE_CONSTRAINTS
    ours = {
        torch_dtype(dtype): (demand.rows, demand.columns) for dtype, demand in RUNTIMES[name].demands.items()
    }
    assert ours == {dtype: (row.sparse_min_rows, row.sparse_min_cols) for dtype, row in table.items()}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(TORCH)), st.sampled_from(EVERY_DTYPE), st.lists(SIZES, min_size=0, max_size=4))
@example("torch-cutlass", "F16", [32, 64])
@example("torch-cutlass", "F16", [0, 64])
@example("torch-cusparselt", "F8_E4M3", [32, 32])
@example("torch-cusparselt", "F8_E5M2", [32, 32])
@example("torch-cutlass", "BOOL", [16, 128])
def test_what_torch_refuses_before_packing_is_what_is_not_eligible(
    name: str, dtype: str, shape: list[int]
) -> None:
    torch_name = DTYPES[dtype].torch_name
    tensor: Any = SimpleNamespace(
        is_cuda=True,
        dim=lambda: len(shape),
        is_contiguous=lambda: True,
        dtype=torch_name and getattr(torch, torch_name),
        shape=tuple(shape),
    )
    try:
        TORCH[name]._validate_device_dim_dtype_shape(tensor)
        accepted = True
    except RuntimeError:
        accepted = False
    assert (reason(name, dtype, shape) is None) == accepted


# What torch packs, on the CPU


def packed_and_back(dense: torch.Tensor) -> torch.Tensor:
    """What torch makes of a matrix that it packs for CUTLASS and unpacks again.

    Float32 is unpacked as two halves, and those that are a NaN come back as another one: the matrices here
    have values of few digits.
    """
    conversions: Any = _conversions
    packed = conversions.sparse_semi_structured_from_dense_cutlass(dense)
    back: torch.Tensor = conversions.sparse_semi_structured_to_dense_cutlass(*packed)
    return back


@st.composite
def matrices(draw: st.DrawFn) -> tuple[str, torch.Tensor]:
    """Of a size that the packing takes: N:M in most places, sometimes one group too many is full."""
    dtype = draw(st.sampled_from(sorted(RUNTIMES["torch-cutlass"].demands)))
    demand = RUNTIMES["torch-cutlass"].demands[dtype]
    shape = (demand.rows * draw(st.integers(1, 2)), demand.columns * draw(st.integers(1, 2)))
    kept, group = draw(st.sampled_from([(0, 4), (1, 4), (2, 4), (3, 4), (1, 2), (2, 8), (4, 8)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    ranks = torch.rand((shape[0], shape[1] // group, group), generator=generator).argsort(-1)
    values = torch.randint(1, 100, shape, generator=generator).float()
    tensor = values * (ranks < kept).reshape(shape)
    for _ in range(draw(st.integers(0, 2))):
        row, column = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))
        tensor[row, column] = draw(st.sampled_from([1.0, -2.0, 0.0, -0.0]))
    return dtype, tensor.to(torch_dtype(dtype))


@settings(max_examples=80, deadline=None)
@given(matrices())
def test_eligible_for_cutlass_is_what_comes_back_from_packing(made: tuple[str, torch.Tensor]) -> None:
    dtype, dense = made
    back = packed_and_back(dense)
    found = verdict(RUNTIMES["torch-cutlass"], measured(dtype, dense, "torch-cutlass"))
    assert found.eligible == torch.equal(back, dense)
    assert found.eligible or "along the input dimension" in str(found.reason)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_values_that_are_not_finite_count_as_not_zero_as_they_do_for_torch(dtype: str, value: float) -> None:
    for others in (1, 2):  # as many as may stand beside it in a group of four, for halves; one more
        dense = torch.zeros((32, 64), dtype=torch_dtype(dtype))
        dense[0, 0], dense[0, 2 : 2 + others] = value, 1
        if dtype == "F32" and others == 2:
            dense[0, 1] = 1
        back = packed_and_back(dense)
        found = verdict(RUNTIMES["torch-cutlass"], measured(dtype, dense, "torch-cutlass"))
        assert found.eligible == torch.equal(back.nan_to_num(7), dense.nan_to_num(7))
        assert found.eligible == (others == 1)


def test_torch_packs_a_dense_matrix_into_another_one_without_an_error() -> None:
    dense = torch.ones((32, 64), dtype=torch.float16)
    back = packed_and_back(dense)
    assert not torch.equal(back, dense)
    assert reason("torch-cutlass", "F16", (32, 64), ()) == "is not 2:4 along the input dimension"


def test_a_matrix_that_is_sparse_along_its_outputs_is_not_eligible_and_told_so() -> None:
    column = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float16).repeat(8)
    dense = column[:, None].repeat(1, 64)
    back = packed_and_back(dense)
    assert not torch.equal(back, dense)
    found = [str(pattern) for pattern in (Pattern(2, 4), Pattern(2, 4, 0)) if satisfies(dense, pattern)]
    assert (
        reason("torch-cutlass", "F16", (32, 64), found)
        == "is not 2:4 along the input dimension, but along dimension 0"
    )


def test_float32_that_is_2_of_4_is_not_eligible_for_cutlass_since_it_wants_1_of_2() -> None:
    dense = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(32, 16)
    back = packed_and_back(dense)
    assert not torch.equal(back, dense)
    assert (
        reason("torch-cutlass", "F32", (32, 64), ("2:4", "4:8"))
        == "is not 1:2 along the input dimension, as F32 has to be"
    )
    assert reason("torch-cutlass", "F16", (32, 64), ("2:4", "4:8")) is None


# The other rules


def oracle_asp(dtype: str, shape: Sequence[int], ranks: Collection[int]) -> bool:
    return dtype in {"F16", "BF16", "F32"} and len(shape) in ranks and shape[0] % 8 == 0 == shape[1] % 16


def oracle_tensorrt(tensor: torch.Tensor) -> bool:
    """In loops: every four input channels have at least two zeros, for each output and pixel."""
    outputs, channels = tensor.shape[:2]
    flat = tensor.reshape(outputs, channels, -1)
    if channels % 4:
        return False
    for output in range(outputs):
        for pixel in range(flat.shape[2]):
            for begin in range(0, channels, 4):
                if int((flat[output, begin : begin + 4, pixel] != 0).sum()) > 2:
                    return False
    return True


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["asp", "modelopt"]),
    st.sampled_from(EVERY_DTYPE),
    st.lists(SIZES.filter(bool), min_size=1, max_size=5),
)
@example("asp", "F32", [8, 16, 3])
@example("modelopt", "F32", [8, 16, 3])
@example("asp", "F16", [8, 16, 3, 3])
@example("modelopt", "BF16", [8, 16])
def test_asp_and_modelopt_want_rows_by_8_and_columns_by_16(name: str, dtype: str, shape: list[int]) -> None:
    ranks = {"asp": {2, 3, 4}, "modelopt": {2, 4}}[name]
    assert (reason(name, dtype, shape) is None) == oracle_asp(dtype, shape, ranks)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 3]),
    st.sampled_from([3, 4, 6, 8]),
    st.sampled_from([0, 1, 3]),
)
def test_tensorrt_looks_along_the_input_channels_for_each_output_and_pixel(
    seed: int, kept: int, channels: int, broken: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (257, channels, 9, 10)
    groups = torch.rand((257, -(-channels // 4), 4, 9, 10), generator=generator).argsort(2) < kept
    tensor = groups.reshape(257, -1, 9, 10)[:, :channels].to(torch.float32)
    for _ in range(broken):
        place = [int(torch.randint(extent, (1,), generator=generator)) for extent in shape]
        tensor[tuple(place)] = 1
    found = verdict(RUNTIMES["tensorrt"], measured("F32", tensor, "tensorrt"))
    assert found.eligible == oracle_tensorrt(tensor)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((257, 260), None),
        ((256, 260), "no gain: 256 outputs, wanted more than 256"),
        ((257, 256), "no gain: 256 inputs to each output, wanted more than 256"),
        ((257, 64, 3, 3), None),  # 9 pixels count as 9 times the channels
        ((257, 28, 3, 3), "no gain: 252 inputs to each output, wanted more than 256"),
        ((1, 512), "no gain: 1 output, wanted more than 256"),
        ((512, 512, 1, 1), None),
    ],
)
def test_tensorrt_gains_above_256_channels_alone(shape: tuple[int, ...], wanted: str | None) -> None:
    assert reason("tensorrt", "F16", shape) == wanted


@pytest.mark.parametrize(
    ("runtime", "dtype", "shape", "patterns", "wanted"),
    [
        ("torch-cutlass", "F16", (32, 64), ("2:4",), None),
        ("torch-cutlass", "F16", (64,), (), "1-D, wanted 2-D"),
        ("torch-cutlass", "F16", (), (), "0-D, wanted 2-D"),
        ("torch-cutlass", "F16", (8, 32, 64), ("2:4",), "3-D, wanted 2-D"),
        ("torch-cutlass", "F16", (0, 64), (), "is empty"),
        ("torch-cutlass", "F64", (32, 64), ("2:4",), "F64 is not supported, wanted F16, BF16, I8 or F32"),
        ("torch-cusparselt", "F32", (32, 64), ("2:4",),
         "F32 is not supported, wanted F16, BF16, I8 or F8_E4M3"),
        ("torch-cusparselt", "F4", (32, 64), (), "F4 is not supported, wanted F16, BF16, I8 or F8_E4M3"),
        ("torch-cutlass", "BF16", (48, 64), ("2:4",), "48 rows, wanted a multiple of 32"),
        ("torch-cutlass", "BF16", (1, 64), ("2:4",), "1 row, wanted a multiple of 32"),
        ("torch-cutlass", "BF16", (32, 1100), ("2:4",), "1,100 columns, wanted a multiple of 64"),
        ("torch-cutlass", "BF16", (48, 100), ("2:4",),
         "48 rows and 100 columns, wanted multiples of 32 and 64"),
        ("torch-cutlass", "BF16", (48, 64), (), "48 rows, wanted a multiple of 32"),  # no pruning mends it
        ("torch-cutlass", "I8", (16, 128), ("2:4",), None),
        ("torch-cutlass", "I8", (16, 64), ("2:4",), "64 columns, wanted a multiple of 128"),
        ("torch-cusparselt", "I8", (32, 32), ("2:4",), None),
        ("torch-cusparselt", "F8_E4M3", (32, 32), ("2:4",), None),
        ("torch-cusparselt", "BF16", (16, 16), ("2:4@0",),
         "is not 2:4 along the input dimension, but along dimension 0"),
        ("torch-cusparselt", "BF16", (16, 16), ("2:4@1",), None),
        ("torch-cusparselt", "BF16", (16, 16), ("1:2", "4:8"), "is not 2:4 along the input dimension"),
        ("asp", "F16", (8, 16, 4, 4), ("2:4@1",), None),
        ("asp", "F16", (8, 16, 4, 4), ("2:4@-3",), None),
        ("asp", "F16", (8, 16, 4, 4), ("2:4", "2:4@0"),
         "is not 2:4 along the input dimension, but along dimension 0 and 3"),
        ("asp", "F16", (8, 12, 4, 4), ("2:4@1",), "12 input channels, wanted a multiple of 16"),
        ("asp", "F16", (4, 16, 4, 4), ("2:4@1",), "4 output channels, wanted a multiple of 8"),
        ("asp", "F16", (8, 16, 4, 4, 4), ("2:4@1",), "5-D, wanted 2-D, 3-D or 4-D"),
        ("modelopt", "F16", (8, 16, 4), ("2:4@1",), "3-D, wanted 2-D or 4-D"),
        ("tensorrt", "I8", (512, 510), ("2:4",), "510 columns, wanted a multiple of 4"),
    ],
)  # fmt: skip
def test_the_first_rule_that_fails_is_told_with_its_numbers(
    runtime: str, dtype: str, shape: tuple[int, ...], patterns: tuple[str, ...], wanted: str | None
) -> None:
    assert reason(runtime, dtype, shape, patterns) == wanted


# Naming runtimes


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("asp", ["asp"]),
        ("torch-cutlass,asp", ["torch-cutlass", "asp"]),
        (" torch-cutlass , asp , torch-cutlass ", ["torch-cutlass", "asp"]),
        ("all", USERS),
        ("asp,all", USERS),
        ("all,vllm", [*USERS, "vllm"]),
    ],
)
def test_runtimes_are_named_with_commas(text: str, names: list[str]) -> None:
    assert [runtime.name for runtime in runtimes_of(text)] == names


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "torch-cutlas",
            '--for torch-cutlas: no runtime is called "torch-cutlas"; did you mean "torch-cutlass"?',
        ),
        ("asp,TensorRT", '--for asp,TensorRT: no runtime is called "TensorRT"; did you mean "tensorrt"?'),
        ("", '--for : no runtime is called ""; there is torch-cutlass, torch-cusparselt, tensorrt, asp'),
        ("asp,", '--for asp,: no runtime is called ""; there is'),
        ("cuda", '--for cuda: no runtime is called "cuda"; there is'),
    ],
)
def test_an_unknown_runtime_is_told_with_the_nearest_one(text: str, wanted: str) -> None:
    with pytest.raises(SparsepruneError) as caught:
        runtimes_of(text)
    assert str(caught.value).startswith(wanted)
    assert caught.value.exit_code == 2


def test_every_runtime_says_where_its_rules_come_from_and_what_device_it_needs() -> None:
    assert list(RUNTIMES)[:5] == ["torch-cutlass", "torch-cusparselt", "tensorrt", "asp", "modelopt"]
    for name, runtime in RUNTIMES.items():
        assert runtime.name == name
        assert runtime.source
        assert runtime.device
        assert re.fullmatch(r"(autumn )?202\d(-\d\d)?", runtime.date)
        assert set(runtime.demands) <= set(DTYPES)
        assert all(demand.group or demand.zeros for demand in runtime.demands.values())


@pytest.mark.parametrize(
    ("runtime", "dtype", "shape", "zeros", "patterns", "wanted"),
    [
        ("vllm", "BF16", (64, 64), 2048, ("2:4",), "runs zeros dense"),
        ("macko", "F16", (64, 64), 820, (), None),
        ("macko", "F16", (64, 64), 819, (), "20.00% zeros, wanted 20% or more"),
        ("macko", "BF16", (64, 64), 2048, (), "BF16 is not supported, wanted F16"),
        ("coreml", "F16", (64, 64), 3072, (), None),
        ("coreml", "F16", (64, 64), 2048, ("8:16",), None),
        (
            "coreml",
            "F16",
            (64, 64),
            3071,
            ("2:4@0",),
            "is not 2:4 along the input dimension, nor 4:8, 8:16 or 1:2, but along dimension 0",
        ),
        ("slidesparse", "BF16", (60, 60), 900, ("6:8",), None),
        (
            "slidesparse",
            "BF16",
            (60, 60),
            900,
            ("4:8",),
            "is not 2:4 along the input dimension, nor 4:6, 6:8 or 8:10",
        ),
        ("torchao-fp8-2of4", "BF16", (24, 32), 384, ("2:4",), "24 rows, wanted a multiple of 16"),
        ("hipsparselt", "I8", (7, 8), 28, ("2:4",), None),
    ],
)
def test_zeros_anywhere_and_other_patterns_do_where_the_runtime_says_so(
    runtime: str,
    dtype: str,
    shape: tuple[int, ...],
    zeros: int,
    patterns: tuple[str, ...],
    wanted: str | None,
) -> None:
    one = TensorFacts("t", dtype, shape, shape[0] * shape[1], zeros=zeros, patterns=patterns)
    assert verdict(RUNTIMES[runtime], one).reason == wanted


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("torch-cutlass", ["2:4", "1:2"]),
        ("torch-cusparselt", ["2:4"]),
        ("tensorrt", ["2:4", "2:4@1"]),
        ("asp", ["2:4", "2:4@1"]),
        ("modelopt", ["2:4", "2:4@1"]),
        ("all", ["2:4", "1:2", "2:4@1", "4:6", "6:8", "8:10", "4:8", "8:16", "4:8@1", "8:16@1", "1:2@1"]),
    ],
)
def test_patterns_that_a_verdict_needs_are_named_once(name: str, patterns: list[str]) -> None:
    assert [str(pattern) for pattern in needed_patterns(runtimes_of(name))] == patterns


@pytest.mark.parametrize(
    ("found", "rank", "axes"),
    [
        ((), 2, set()),
        (("2:4",), 2, {1}),
        (("2:4@0", "12:4", "2:48", "1:4"), 2, {0}),
        (("2:4@-1", "2:4@1"), 4, {1, 3}),
        (("2:4@both", "1:4@both"), 2, {0, 1}),
    ],
)
def test_axes_along_which_a_pattern_was_found(found: tuple[str, ...], rank: int, axes: set[int]) -> None:
    assert axes_of(Pattern(2, 4, 1), found, rank) == axes


CUSPARSELT = "CUDA, compute capability 8.0 and above, with cuSPARSELt"
FLOAT8 = "CUDA, compute capability 8.9 and above, with cuSPARSELt 0.8"


@pytest.mark.parametrize(
    ("dtypes", "device"),
    [
        (["F16", "BF16", "I8"], CUSPARSELT),
        (["F8_E4M3", "F8_E4M3"], FLOAT8),
        (["F8_E4M3", "BF16"], f"{CUSPARSELT}; F8_E4M3: {FLOAT8}"),
        (["F8_E4M3", "F64"], FLOAT8),
        (["F64"], CUSPARSELT),
        ([], CUSPARSELT),
    ],
)
def test_the_device_that_is_needed_depends_on_the_dtypes(dtypes: list[str], device: str) -> None:
    assert RUNTIMES["torch-cusparselt"].device_for(dtypes) == device


@pytest.mark.parametrize("name", RUNTIMES)
def test_devices_are_told_for_dtypes_that_the_runtime_takes(name: str) -> None:
    runtime = RUNTIMES[name]
    assert runtime.devices.keys() <= runtime.demands.keys()
    assert runtime.device_for(["F16"]) == runtime.device


def row_of(runtime: Runtime) -> str:
    """A runtime as the page of specs has it."""
    first = next(iter(runtime.demands.values()), None)
    zeros = "none: zeros run dense"
    if first is not None:
        pairs = ((first.kept, first.group), *first.others)
        asked = [f"{kept}:{group}" for kept, group in pairs if group]
        zeros = ", ".join([*asked, *([f"{first.zeros:.0%} anywhere"] if first.zeros else [])])
    sizes = dict.fromkeys(f"{one.rows}x{one.columns}" for one in runtime.demands.values())
    cells = (
        runtime.name, runtime.device, " ".join(runtime.demands), zeros, ", ".join(sizes), runtime.state,
        f"{runtime.source} ({runtime.date})",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_page_of_runtimes_has_every_one_as_it_is(name: str) -> None:
    page = Path(__file__).parents[2] / "specs" / "guide" / "runtimes.md"
    assert row_of(RUNTIMES[name]) in page.read_text().splitlines()
