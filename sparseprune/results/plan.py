"""The result of plan. Plain data; report/ makes it."""

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
    LayerCoverage,
    NamedTensor,
    NotNegative,
    Shape,
    Share,
    UncoveredKinds,
    Warned,
)


@dataclass(frozen=True, kw_only=True)
class ScoreAsked:
    """What a rule ranks blocks by."""

    kind: str
    norm: float | Literal["inf"]
    normalize: bool
    file: str | None


@dataclass(frozen=True, kw_only=True)
class ReconstructAsked:
    """How a rule updates the survivors."""

    method: Literal["refit", "admm"]
    file: str
    damp: NotNegative


@dataclass(frozen=True, kw_only=True)
class ViewAsked:
    """A strided view of a tensor."""

    shape: Shape
    stride: Annotated[Shape, Doc("in elements")]
    begin: Annotated[Shape, Doc("index in the tensor of the view's first element")]


@dataclass(frozen=True, kw_only=True)
class TensorForm:
    """Tensors of a rule that are alike in block, dtype and shapes."""

    block_name: str
    tensors: Annotated[Count, Doc("views, if one tensor has several")]
    example: Annotated[str, Doc("name of one of them")]
    dtype: Dtype
    shape: Dimensions
    view: Annotated[ViewAsked | None, Doc("null for the whole tensor")]
    block: Shape
    grid: Shape
    scope: Shape


@dataclass(frozen=True, kw_only=True)
class Resized:
    """Tensors of a rule that remove gives one new shape."""

    tensors: Count
    example: Annotated[str, Doc("name of one of them")]
    shape: Dimensions
    shape_after: Annotated[Shape | None, Doc("null if they are removed whole")]


@dataclass(frozen=True, kw_only=True)
class RuleRemoval:
    """Whether remove could cut out what the rule prunes."""

    removable: Annotated[bool, Doc("whether all blocks are whole slices along one dimension")]
    reason: Annotated[str | None, Doc("why not")]
    becomes: Annotated[
        tuple[Resized, ...] | None,
        Doc("the shapes of its tensors; null if only the data decides, or nothing can be removed"),
    ]


@dataclass(frozen=True, kw_only=True)
class RulePlan:
    """A rule of the spec, what it binds to and what it will prune."""

    name: str
    mode: Literal["hard", "soft"]
    score: ScoreAsked
    reconstruct: Annotated[ReconstructAsked | None, Doc("null if survivors keep their bits")]
    instances: Count
    tensors: Count
    example: Annotated[str | None, Doc("name of its first tensor")]
    instance: Annotated[str | None, Doc("label of its first instance")]
    fused: Annotated[tuple[str, ...], Doc("names of the blocks of a block coupling")]
    fused_block: Annotated[
        str | None, Doc("label of the first fused block; a file of block scores names its tensor by it")
    ]
    competing: Annotated[Count, Doc("scopes of an instance that share a budget")]
    scopes: Count
    blocks_per_scope: EachCount
    nnz: EachCount
    threshold: EachNumber
    sparsity_asked: EachNumber
    sparsity: Annotated[EachNumber, Doc("share of the blocks of a scope that are dropped, after rounding")]
    blocks: Count
    numel: Annotated[Count, Doc("elements that the rule reaches")]
    pruned: Annotated[Count | None, Doc("elements that it will drop; null if that depends on the data")]
    forms: tuple[TensorForm, ...]
    removal: RuleRemoval


@dataclass(frozen=True, kw_only=True)
class PlanTotals:
    """Sums over the whole checkpoint."""

    tensors: Count
    numel: Count
    reached: Annotated[Count, Doc("tensors that rules reach")]
    covered: Annotated[Count, Doc("elements that rules reach")]
    coverage: Annotated[Share, Doc("covered / numel")]
    covers: Covers
    layer_coverage: LayerCoverage
    declared_coverage: DeclaredCoverage
    uncovered: UncoveredKinds


@dataclass(frozen=True, kw_only=True)
class PlannedRemoval:
    """What remove would leave; null if only the data decides, or nothing can be removed."""

    problems: Annotated[tuple[str, ...], Doc("why the model's class cannot have such shapes")]
    config: tuple[ConfigChange, ...] | None
    numel: Count | None
    bytes: Count | None


@dataclass(frozen=True, kw_only=True)
class UnreachedTensor(NamedTensor):
    """A tensor that no rule reaches."""

    bytes: Count


@dataclass(frozen=True, kw_only=True)
class PlannedBytes:
    """Sizes of files, and memory."""

    input: Count
    masks: Annotated[Count, Doc("the data of the masks")]
    output: Annotated[Count, Doc("all files but the report and the spec")]
    peak: Annotated[Count | None, Doc("memory of a run")] = None


@dataclass(frozen=True, kw_only=True)
class Plan(Document):
    """sparseprune plan --json, and --dry-run --json of apply and mask."""

    schema: Literal["sparseprune.plan.v1"] = "sparseprune.plan.v1"
    input: str
    spec: Annotated[str, Doc("as it was typed")]
    output: str
    output_exists: Annotated[bool, Doc("if true, a run needs --force")]
    warnings: Warned
    totals: PlanTotals
    rules: tuple[RulePlan, ...]
    removal: PlannedRemoval
    unreached: Annotated[tuple[UnreachedTensor, ...], Doc("the largest tensors that no rule reaches")]
    bytes: PlannedBytes
