"""Which runtimes can run a tensor sparse: their rules as one table, each with its source.

Owns what they want of dtype, rank, size and pattern, and how the first rule that fails is worded. Judges what
was counted, sees no element, and knows no layer: GPT-2 stores its projections transposed (Conv1D, input by
output), which no file says. Called by `inspect --for`, requirements and summaries.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct
from msgspec import field as struct_field

from sparseprune.engine.grids import prod
from sparseprune.errors import SparsepruneError
from sparseprune.execution.inspect import Pattern
from sparseprune.report.wording import many, percent
from sparseprune.results.measuring import RuntimeVerdict
from sparseprune.spec.problems import listed, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from sparseprune.execution.inspect import TensorFacts

ALL = "all"


class Demand(Struct, frozen=True):
    """What a runtime wants of a matrix of one dtype: N:M along its inputs, rows and columns in multiples.

    One of the `others`, (kept, group), will do as well, and so does a share of zeros, wherever they are, of
    `zeros` or more. 0:0 asks for no pattern.
    """

    kept: int
    group: int
    rows: int = 1
    columns: int = 1
    others: tuple[tuple[int, int], ...] = ()
    zeros: float | None = None

    def patterns(self, rank: int) -> tuple[Pattern, ...]:
        """Those of which one suffices, for tensors of so many dimensions."""
        axis = _input_axis(rank)
        return tuple(Pattern(*pair, axis) for pair in ((self.kept, self.group), *self.others) if pair[1])


class Runtime(Struct, frozen=True):
    """What a runtime can run sparse; `demands` go by the dtype's name in the file.

    Rows are dimension 0, the outputs of a layer; columns are its inputs, dimension 1: the last one of a
    matrix (out, in), the channels of a convolution (out, in, ...). `ranks` are the numbers of dimensions
    that it takes. `gains_above` is the number of outputs, and of inputs to each, up to which the dense
    kernel is the faster one, 0 where the source names none. `device` is what no file can show; `devices` are
    those of dtypes that need another one. Without `demands` zeros are multiplied like all other numbers. The
    `source` was read at the `date`; `state` tells "alive", "research" or "ended", "masks" where others run
    them.
    """

    name: str
    demands: Mapping[str, Demand]
    ranks: tuple[int, ...]
    device: str
    source: str
    gains_above: int = 0
    devices: Mapping[str, str] = struct_field(default_factory=lambda: MappingProxyType({}))
    state: Literal["alive", "research", "ended", "masks"] = "alive"
    date: str = "autumn 2026"

    def device_for(self, dtypes: Iterable[str]) -> str:
        """What matrices of these dtypes need to run sparse.

        >>> RUNTIMES["torch-cusparselt"].device_for(["F8_E4M3"])
        'CUDA, compute capability 8.9 and above, with cuSPARSELt 0.8'
        """
        known = dict.fromkeys(dtype for dtype in dtypes if dtype in self.demands)
        usual = [] if known and all(dtype in self.devices for dtype in known) else [self.device]
        others = [(dtype, self.devices[dtype]) for dtype in known if dtype in self.devices]
        return "; ".join([*usual, *(f"{dtype}: {text}" if usual else text for dtype, text in others)])


def _alike(dtypes: str, demand: Demand) -> Mapping[str, Demand]:
    """One demand of several dtypes."""
    return MappingProxyType(dict.fromkeys(dtypes.split(), demand))


def _dense(name: str, source: str, device: str = "any", **more: Any) -> Runtime:  # noqa: ANN401
    return Runtime(name, MappingProxyType({}), (), device, source, **more)


def _demands(**by_dtype: tuple[int, int, int, int]) -> Mapping[str, Demand]:
    return MappingProxyType({dtype: Demand(*demand) for dtype, demand in by_dtype.items()})


# NVIDIA Apex skips float32 and float16 of other sizes; Model Optimizer took the rule over for all dtypes.
_ASP = _demands(F16=(2, 4, 8, 16), BF16=(2, 4, 8, 16), F32=(2, 4, 8, 16))

_ROWS = (
    # sparse_min_rows and sparse_min_cols of torch 2.13. The conversion takes 1:2 of float32 and encodes it
    # as 2:4 of halves. A matrix of another pattern is packed without an error, into another one. The kernel
    # is "supported only on GPUs with compute capability 8.x" (pytorch/pytorch issues 132009 and 132928).
    Runtime(
        "torch-cutlass",
        _demands(F16=(2, 4, 32, 64), BF16=(2, 4, 32, 64), I8=(2, 4, 16, 128), F32=(1, 2, 32, 32)),
        ranks=(2,),
        device="CUDA, compute capability 8.x",
        source="torch.sparse.SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS, "
        "torch.sparse._semi_structured_conversions",
    ),
    # float8 multiplies by torch._scaled_mm alone, from compute capability 8.9 on (cuSPARSELt 0.8); the 16-bit
    # floats and int8 from 8.0 on.
    # Compute capability 9.0 came with cuSPARSELt 0.6.
    Runtime(
        "torch-cusparselt",
        _demands(F16=(2, 4, 16, 16), BF16=(2, 4, 16, 16), I8=(2, 4, 32, 32), F8_E4M3=(2, 4, 32, 32)),
        ranks=(2,),
        device="CUDA, compute capability 8.0 and above, with cuSPARSELt",
        devices=MappingProxyType({"F8_E4M3": "CUDA, compute capability 8.9 and above, with cuSPARSELt 0.8"}),
        source="torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS, "
        "https://docs.nvidia.com/cuda/cusparselt/release_notes.html",
    ),
    # "For each output channel and for each spatial pixel in the kernel weights, every four input channels
    # must have at least two zeros": weights (K, C, R, S) with C % 4 == 0, in FP16 or INT8, to which the
    # builder takes the other floats. It times both kernels and picks the faster: "sparse conv kernels are
    # faster than dense conv kernels if C and K are large enough (>256)", "3x3 Conv effectively increases the
    # C by 9x".
    Runtime(
        "tensorrt",
        _demands(**dict.fromkeys(("F16", "BF16", "F32", "I8"), (2, 4, 1, 4))),
        ranks=(2, 4),
        device="CUDA, compute capability 8.0 and above",
        source="https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/io-formats-sparsity.html"
        ", https://github.com/NVIDIA/TensorRT/issues/3849",
        gains_above=256,
    ),
    # Masks of linear layers and convolutions of one and two dimensions: sparse_masklib.py, create_mask.
    Runtime(
        "asp",
        _ASP,
        ranks=(2, 3, 4),
        device="CUDA, compute capability 8.0 and above",
        source="https://github.com/NVIDIA/apex/blob/master/apex/contrib/sparsity/asp.py",
        state="masks",
    ),
    # The modules are nn.Linear and nn.Conv2d: weight_sparsity/module.py.
    Runtime(
        "modelopt",
        _ASP,
        ranks=(2, 4),
        device="CUDA, compute capability 8.0 and above",
        source="https://github.com/NVIDIA/Model-Optimizer/blob/main/modelopt/torch/sparsity/weight_sparsity/magnitude.py",
        state="masks",
    ),
    # Floats become float8 with a scale for each row: rowwise_scaled_linear_sparse_cutlass.
    Runtime(
        "torchao-fp8-2of4",
        _alike("F16 BF16", Demand(2, 4, 16, 32)),
        ranks=(2,),
        device="CUDA, compute capability 9.x",
        source="torchao 0.18: torchao.ops.rowwise_scaled_linear_sparse_cutlass",
    ),
    Runtime(
        "torchao-fp8-rocm",
        _alike("F16 BF16", Demand(2, 4, 16, 16)),
        ranks=(2,),
        device="ROCm, gfx950",
        source="torchao 0.18: float8_sparse_2x4",
    ),
    # What multiples it wants is not known: none are asked for.
    Runtime(
        "hipsparselt",
        _alike("F16 BF16 I8", Demand(2, 4, 1, 4)),
        ranks=(2,),
        device="ROCm, MI300 family",
        source="hipSPARSELt documentation",
    ),
    # At least 2 zeros in 2N; matrices are padded.
    Runtime(
        "slidesparse",
        _alike("F16 BF16 I8 F8_E4M3", Demand(2, 4, others=((4, 6), (6, 8), (8, 10)))),
        ranks=(2,),
        device="CUDA, compute capability 8.0 and above, with its own vLLM",
        source="https://arxiv.org/abs/2603.05232",
        state="research",
        date="2026-03",
    ),
    # Measured from 20% on; 66.5 to 98.6 tokens a second at 50%, batch 1.
    Runtime(
        "macko",
        _alike("F16", Demand(0, 0, zeros=0.2)),
        ranks=(2,),
        device="CUDA consumer cards, batch 1",
        source="https://github.com/vlejd/macko_spmv",
        state="research",
        date="2025-12",
    ),
    Runtime(
        "sparamx",
        _alike("BF16 I8", Demand(0, 0, zeros=0.5)),
        ranks=(2,),
        device="Xeon with AMX",
        source="https://arxiv.org/abs/2502.12444",
        state="research",
        date="2025-02",
    ),
    # From which share of zeros on is the user's to set (sparse_weights_decompression_rate): half is asked
    # for, where others on the same units gain.
    Runtime(
        "openvino",
        _alike("I8", Demand(0, 0, zeros=0.5)),
        ranks=(2,),
        device="Xeon with AMX, above the rate of zeros that is set",
        source="OpenVINO documentation: CPU device properties",
        date="2025",
    ),
    # N:M with half of the weights zero, or three quarters anywhere; the file shrinks, too.
    Runtime(
        "coreml",
        _alike("F16", Demand(2, 4, others=((4, 8), (8, 16), (1, 2)), zeros=0.75)),
        ranks=(2, 4),
        device="Apple Neural Engine, newer CPUs",
        source="coremltools documentation: pruning performance",
    ),
    _dense("vllm", "vLLM 0.33, which raises on a `sparsity_config` with targets"),
    _dense("sglang", "SGLang 0.5.23, which raises on a `sparsity_config` with targets"),
    _dense("transformers", "transformers 5.24"),
    _dense("mlx-lm", "mlx-lm", "Apple silicon"),
    _dense("llama.cpp", "llama.cpp"),
    _dense("onnxruntime", "ONNX Runtime: sparse initializers are made dense while loading"),
    _dense("tensorrt-llm", "TensorRT-LLM: its engine backend is gone", "CUDA"),
    _dense("deepsparse", "DeepSparse and SparseML", "x86", state="ended"),
)
RUNTIMES: Mapping[str, Runtime] = MappingProxyType({row.name: row for row in _ROWS})


def runtimes_of(text: str) -> tuple[Runtime, ...]:
    """The runtimes that `--for` names, with commas between them, each once; `all` is all that use zeros.

    >>> [runtime.name for runtime in runtimes_of("asp, torch-cutlass")]
    ['asp', 'torch-cutlass']
    """
    names = [word.strip() for word in text.split(",")]
    for name in names:
        if name not in {*RUNTIMES, ALL}:
            close = nearest(name.lower(), [*RUNTIMES, ALL])
            hint = f'did you mean "{close[0]}"?' if close else f"there is {', '.join(RUNTIMES)}, or {ALL}"
            raise SparsepruneError(f'--for {text}: no runtime is called "{name}"; {hint}')
    every = [name for name, row in RUNTIMES.items() if row.demands or name in names]
    return tuple(RUNTIMES[name] for name in dict.fromkeys(every if ALL in names else names))


def needed_patterns(runtimes: Collection[Runtime]) -> tuple[Pattern, ...]:
    """The patterns that must be looked for in every tensor before a verdict can be given, each once.

    >>> [str(pattern) for pattern in needed_patterns(runtimes_of("torch-cutlass, tensorrt"))]
    ['2:4', '1:2', '2:4@1']
    """
    needed = (
        pattern
        for runtime in runtimes
        for rank in runtime.ranks
        for demand in runtime.demands.values()
        for pattern in demand.patterns(rank)
    )
    return tuple(dict.fromkeys(needed))


def verdict(runtime: Runtime, facts: TensorFacts) -> RuntimeVerdict:
    """What a runtime makes of a tensor whose `needed_patterns` were looked for.

    First comes what no pruning can mend: rank, dtype, size; then the pattern; then whether it pays.
    """
    for rule in _RULES:
        reason = rule(runtime, facts)
        if reason is not None:
            return RuntimeVerdict(eligible=False, reason=reason)
    return RuntimeVerdict(eligible=True, reason=None)


def axes_of(pattern: Pattern, found: Collection[str], rank: int) -> set[int]:
    """The dimensions of a tensor along which N:M was found, whatever the axis of `pattern`.

    `found` are patterns as `str(Pattern)`, `rank` is the number of dimensions.

    >>> axes_of(Pattern(2, 4), ["1:2@0", "2:4", "2:4@0"], 2)
    {0, 1}
    """
    wanted = f"{pattern.kept}:{pattern.group}"
    split = (text.partition("@") for text in found)
    along = (("-1", "-2") if axis == "both" else (axis or "-1",) for name, _, axis in split if name == wanted)
    return {int(axis) % rank for axes in along for axis in axes}


def _input_axis(rank: int) -> int:
    """The input dimension: the last one of a matrix, dimension 1 of a convolution (out, in, ...)."""
    return -1 if rank == 2 else 1


def _zeros(runtime: Runtime, facts: TensorFacts) -> str | None:  # noqa: ARG001
    return None if runtime.demands else "runs zeros dense"


def _rank(runtime: Runtime, facts: TensorFacts) -> str | None:
    wanted = listed([f"{rank}-D" for rank in runtime.ranks], "or")
    return None if len(facts.shape) in runtime.ranks else f"{len(facts.shape)}-D, wanted {wanted}"


def _dtype(runtime: Runtime, facts: TensorFacts) -> str | None:
    if facts.holds == "packed":
        return f"packed codes in {facts.dtype} are not supported"
    if facts.dtype in runtime.demands:
        return None
    return f"{facts.dtype} is not supported, wanted {listed(runtime.demands, 'or')}"


def _size(runtime: Runtime, facts: TensorFacts) -> str | None:
    if facts.numel == 0:
        return "is empty"
    demand = runtime.demands[facts.dtype]
    words = ("row", "column") if len(facts.shape) == 2 else ("output channel", "input channel")
    sizes = zip(facts.shape, words, (demand.rows, demand.columns), strict=False)  # a convolution has more
    wrong = [(many(count, word), str(multiple)) for count, word, multiple in sizes if count % multiple]
    if not wrong:
        return None
    found, multiples = (" and ".join(texts) for texts in zip(*wrong, strict=True))
    return f"{found}, wanted {'multiples' if len(wrong) > 1 else 'a multiple'} of {multiples}"


def _pattern(runtime: Runtime, facts: TensorFacts) -> str | None:
    demand = runtime.demands[facts.dtype]
    rank, share = len(facts.shape), (facts.zeros or 0) / facts.numel
    wanted, along = demand.patterns(rank), set[int]()
    for pattern in wanted:
        along |= axes_of(pattern, facts.patterns, rank)
    if _input_axis(rank) % rank in along or (demand.zeros is not None and share >= demand.zeros):
        return None
    if not wanted:
        return f"{percent(share)} zeros, wanted {demand.zeros:.0%} or more"
    reason = f"is not {demand.kept}:{demand.group} along the input dimension"
    if demand.others:
        reason += f", nor {listed([f'{kept}:{group}' for kept, group in demand.others], 'or')}"
    elif (demand.kept, demand.group) != (2, 4):
        reason += f", as {facts.dtype} has to be"
    if along:
        reason += f", but along dimension {listed(map(str, sorted(along)))}"
    return reason


def _gain(runtime: Runtime, facts: TensorFacts) -> str | None:
    outputs, inputs = facts.shape[0], prod(facts.shape[1:])
    counts = (outputs, many(outputs, "output")), (inputs, f"{many(inputs, 'input')} to each output")
    for count, text in counts:
        if count <= runtime.gains_above:
            return f"no gain: {text}, wanted more than {runtime.gains_above}"
    return None


_RULES: tuple[Callable[[Runtime, TensorFacts], str | None], ...] = (
    _zeros,
    _rank,
    _dtype,
    _size,
    _pattern,
    _gain,
)
