"""Results of pruning: of apply and mask, and of remove. Plain data; report/ makes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from sparseprune.results.fields import (
    ConfigChange,
    Count,
    Covers,
    DeclaredCoverage,
    Dimensions,
    Doc,
    Document,
    Dtype,
    EachCount,
    EachNumber,
    FilesLeftOut,
    LayerCoverage,
    Name,
    NamedTensor,
    Noted,
    NotNegative,
    Seconds,
    Settings,
    Shape,
    Share,
    UncoveredKinds,
    Warned,
    WrittenBytes,
)

Device = Annotated[str, Doc("what did the work, such as cpu, cuda:1, cuda and cpu")]
OutputError = Annotated[
    float | None,
    Doc(
        "sqrt(tr(D H D^T) / tr(W0 H W0^T)), the relative change of outputs; null if not reconstructed",
        minimum=0,
    ),
]


@dataclass(frozen=True, kw_only=True)
class RuleResult:
    """A rule of the spec, and what it pruned."""

    name: str
    instances: Count
    tensors: Annotated[Count, Doc("that it reached")]
    scopes: Count
    blocks_per_scope: EachCount
    nnz: EachCount
    threshold: EachNumber
    sparsity_asked: EachNumber
    blocks: Count
    numel: Annotated[Count, Doc("elements that it reached")]
    pruned: Annotated[Count, Doc("elements that it dropped")]
    device: Annotated[str | None, Doc("what did the work of this rule; null if it bound nothing")]


@dataclass(frozen=True, kw_only=True)
class TensorResult(NamedTensor):
    """A tensor that rules reached, before and after."""

    rule: Annotated[str, Doc("names of the rules that reached it, with commas between them")]
    instance: Annotated[str, Doc("label of the instance that reached it")]
    pruned: Annotated[Count, Doc("elements that rules dropped")]
    zeros_before: Annotated[Count, Doc("of either sign")]
    zeros_after: Annotated[Count, Doc("of either sign")]
    energy_kept: Annotated[
        NotNegative | None, Doc("||pruned||^2 / ||dense||^2; null if float64 cannot hold the squares")
    ]
    output_error_masked: Annotated[OutputError, Doc("by the mask alone")]
    output_error: Annotated[OutputError, Doc("of what was written")]


@dataclass(frozen=True, kw_only=True)
class ReportTotals:
    """Sums over the whole checkpoint."""

    tensors: Count
    numel: Count
    pruned: Annotated[Count, Doc("elements that masks drop")]
    sparsity: Annotated[Share, Doc("pruned / numel")]
    covers: Covers
    layer_coverage: LayerCoverage
    declared_coverage: DeclaredCoverage
    uncovered: UncoveredKinds
    output_error_masked: Annotated[OutputError, Doc("the mean over matrices, by the masks alone")]
    output_error: Annotated[OutputError, Doc("the mean over matrices, of what was written")]


@dataclass(frozen=True, kw_only=True)
class Report(Document):
    """report.json of sparseprune apply and mask."""

    schema: Literal["sparseprune.report.v1"] = "sparseprune.report.v1"
    input: str
    output: str
    spec_sha256: Annotated[str, Doc("of the spec's bytes", pattern="^[0-9a-f]{64}$")]
    set: Settings
    device: Device
    seconds: Seconds
    warnings: Warned
    notes: Noted
    files_left_out: FilesLeftOut
    bytes: WrittenBytes
    totals: ReportTotals
    rules: Sequence[RuleResult]
    tensors: Annotated[
        Sequence[TensorResult], Doc("the tensors that a rule reached, in the order of the checkpoint")
    ]


@dataclass(frozen=True, kw_only=True)
class RemovalTotals:
    """Sums over the whole checkpoint, before and after."""

    tensors: Count
    tensors_after: Count
    numel: Count
    numel_after: Count
    covers: Covers
    layer_coverage: LayerCoverage
    declared_coverage: DeclaredCoverage
    uncovered: UncoveredKinds
    bytes: Annotated[Count, Doc("of the weight files")]
    bytes_after: Annotated[Count, Doc("of the weight files")]
    output_error_masked: Annotated[OutputError, Doc("the mean over matrices, by the masks alone")]
    output_error: Annotated[OutputError, Doc("the mean over matrices, after reconstruction")]


@dataclass(frozen=True, kw_only=True)
class ChangedTensor:
    """A tensor that was removed, or has another shape or name."""

    name: Name
    name_after: Annotated[str | None, Doc("null if it was removed")]
    dtype: Dtype
    shape: Dimensions
    shape_after: Annotated[Shape | None, Doc("null if it was removed")]


@dataclass(frozen=True, kw_only=True)
class Removal(Document):
    """report.json of sparseprune remove."""

    schema: Literal["sparseprune.remove.v1"] = "sparseprune.remove.v1"
    input: str
    output: str
    spec_sha256: Annotated[
        str | None, Doc("of the spec's bytes; null if masks decided", pattern="^[0-9a-f]{64}$")
    ]
    masks: Annotated[str | None, Doc("as they were typed; null if a spec decided")]
    set: Settings
    device: Device
    seconds: Seconds
    warnings: Warned
    notes: Noted
    files_left_out: FilesLeftOut
    totals: RemovalTotals
    config: tuple[ConfigChange, ...]
    rules: Annotated[Sequence[RuleResult], Doc("as in report.json of apply; empty if masks decided")]
    tensors: Annotated[
        Sequence[ChangedTensor],
        Doc("the tensors that were removed, or have another shape or name, in the order of the input"),
    ]
