"""Results of pruning: of plan, of apply and mask, and of remove. Plain data; report/ makes them."""

from collections.abc import Mapping, Sequence
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
    Record,
    Seconds,
    Settings,
    Shape,
    Share,
    UncoveredKinds,
    Warned,
    WrittenBytes,
)
from sparseprune.results.measuring import RuntimeCount

Minimized = Annotated[str | None, Doc(enum=["loss", "outputs", "loss and outputs", None])]


class ScoreAsked(Record):
    """What a rule ranks blocks by."""

    kind: str
    norm: float | Literal["inf"]
    normalize: bool
    file: str | None


class ReconstructAsked(Record):
    """How a rule updates the survivors."""

    method: Literal["refit", "admm"]
    file: str
    damp: NotNegative
    metric: Annotated[Minimized, Doc("what its instances minimize; null if nothing is rebuilt")]
    effort: Literal["best", "fast"]
    tune: Annotated[Count, Doc("steps that a layer is tuned, once it is pruned by a text")] = 0


class AllocateAsked(Record):
    """How the instances of a rule share one budget."""

    file: str
    clamp: Annotated[Share, Doc("how much more or less of an instance may go than was asked for")]


class AllocatedInstance(Record):
    """What an instance got of the budget that it shares with others."""

    instance: str
    blocks: Annotated[Count, Doc("in each of its scopes")]
    nnz: Annotated[Count, Doc("blocks of these that survive")]
    numel: Annotated[Count, Doc("elements that it reaches")]
    sparsity_asked: Annotated[Share, Doc("share of the blocks that would go if it shared nothing")]
    sparsity: Annotated[Share, Doc("share of the blocks that goes")]


Allocation = Annotated[
    Sequence[AllocatedInstance] | None,
    Doc("of a rule whose instances share one budget, their parts of it; left out where they share none"),
]


class ViewAsked(Record):
    """A strided view of a tensor."""

    shape: Shape
    stride: Annotated[Shape, Doc("in elements")]
    begin: Annotated[Shape, Doc("index in the tensor of the view's first element")]


class TensorForm(Record):
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


class Resized(Record):
    """Tensors of a rule that remove gives one new shape."""

    tensors: Count
    example: Annotated[str, Doc("name of one of them")]
    shape: Dimensions
    shape_after: Annotated[Shape | None, Doc("null if they are removed whole")]


class RuleRemoval(Record):
    """Whether remove could cut out what the rule prunes."""

    removable: Annotated[bool, Doc("whether all blocks are whole slices along one dimension")]
    reason: Annotated[str | None, Doc("why not")]
    becomes: Annotated[
        tuple[Resized, ...] | None,
        Doc("the shapes of its tensors; null if only the data decides, or nothing can be removed"),
    ]


WithinRule = Annotated[
    str | None,
    Doc("the rule that it is nested in, among whose survivors it decides; left out if there is none"),
]


class RulePlan(Record):
    """A rule of the spec, what it binds to and what it will prune."""

    name: str
    mode: Literal["hard", "soft"]
    score: ScoreAsked
    reconstruct: Annotated[ReconstructAsked | None, Doc("null if survivors keep their bits")]
    allocate: Annotated[AllocateAsked | None, Doc("null if each instance has a budget of its own")]
    instances: Count
    tensors: Count
    example: Annotated[str | None, Doc("name of its first tensor")]
    instance: Annotated[str | None, Doc("label of its first instance")]
    transposable: Annotated[bool, Doc("whether scopes are tiles, each row and column of which keeps as many")]
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
    pruned: Annotated[
        Count | None,
        Doc(
            "elements that it will drop, of a rule that is within another one at least; null if that depends "
            "on the data"
        ),
    ]
    forms: tuple[TensorForm, ...]
    removal: RuleRemoval
    allocation: Annotated[
        Allocation, Doc("of a rule that shares one, its parts; left out where no weights were read")
    ] = None
    within: WithinRule = None


class PlanTotals(Record):
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


class PlannedRemoval(Record):
    """What remove would leave; null if only the data decides, or nothing can be removed."""

    problems: Annotated[tuple[str, ...], Doc("why the model's class cannot have such shapes")]
    config: tuple[ConfigChange, ...] | None
    numel: Count | None
    bytes: Count | None
    remarks: Annotated[tuple[str, ...], Doc("what remove would warn of")] = ()


class UnreachedTensor(NamedTensor):
    """A tensor that no rule reaches."""

    bytes: Count


class TargetReached(Record):
    """What --target asked for, and the number of the spec that was found for it."""

    unit: Annotated[
        Literal["params", "size", "active"],
        Doc("parameters, bytes of the weight files, or parameters that one token uses"),
    ]
    asked: Annotated[Count, Doc("what may be left at most")]
    reached: Annotated[Count, Doc("what is left; zeros are not counted")]
    before: Annotated[Count, Doc("what there was")]
    name: Annotated[str, Doc("variable or budget of the spec that was varied, as in --set")]
    value: Annotated[float, Doc("the value that was found")]


Target = Annotated[TargetReached | None, Doc("null if none was given")]


class PlannedPermutation(Record):
    """A module whose units change places before N:M is decided."""

    module: str
    kind: Literal["mlp", "heads"]
    orders: Annotated[Count, Doc("one for each key/value head or expert, else 1")]
    units: Annotated[Count, Doc("channels, or dimensions of a head, of an order")]
    tensors: Annotated[tuple[Name, ...], Doc("those that move")]


class PermutedModule(PlannedPermutation):
    """A module whose units changed places, so that it computes the same and N:M prunes less."""

    pruned_before: Annotated[Share, Doc("share of all scores that N:M prunes in the old order")]
    pruned_after: Annotated[Share, Doc("share of all scores that N:M prunes in the new order")]


class UnmovedModule(Record):
    """A module that a rule wants to be permuted, and why it is not."""

    module: str
    reason: str


class PlannedBytes(Record):
    """Sizes of files, and memory."""

    input: Count
    masks: Annotated[Count, Doc("the data of the masks")]
    output: Annotated[Count, Doc("all files but the report, the spec and the model card")]
    peak: Annotated[Count | None, Doc("memory of a run")] = None


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
    target: Target
    unreached: Annotated[tuple[UnreachedTensor, ...], Doc("the largest tensors that no rule reaches")]
    bytes: PlannedBytes
    permuted: Annotated[tuple[PlannedPermutation, ...], Doc("empty unless a rule has permute")] = ()
    not_permuted: tuple[UnmovedModule, ...] = ()


ReconstructTyped = Annotated[str | None, Doc("--reconstruct, as it was typed; absent if it was not")]
StatsTyped = Annotated[
    str | None, Doc("--stats, as it was typed, or what stood for it; absent if there was none")
]
WithinTyped = Annotated[
    str | None, Doc("--within, the masks of an earlier step, as it was typed; absent if it was not")
]
Device = Annotated[str, Doc("what did the work, such as cpu, cuda:1, cuda and cpu")]
OutputError = Annotated[
    float | None,
    Doc(
        "sqrt(tr(D H D^T) / tr(W0 H W0^T)), the relative change of outputs; null if not reconstructed",
        minimum=0,
    ),
]
LossError = Annotated[
    float | None,
    Doc(
        "sqrt(tr(G D H D^T) / tr(G W0 H W0^T)), the same in units of the loss; null if not reconstructed, or "
        "without gradients",
        minimum=0,
    ),
]


class RuleResult(Record):
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
    pruned: Annotated[Count, Doc("elements that it dropped, with those that rules dropped that it is within")]
    device: Annotated[str | None, Doc("what did the work of this rule; null if it bound nothing")]
    reconstructed: Annotated[
        Literal["admm", "refit"] | None, Doc("how survivors were updated; null if they keep their bits")
    ]
    metric: Annotated[Minimized, Doc("what its instances minimized; null if nothing was reconstructed")]
    allocation: Allocation = None
    within: WithinRule = None


class TensorResult(NamedTensor):
    """A tensor that rules reached, before and after."""

    rule: Annotated[str, Doc("names of the rules that reached it, with commas between them")]
    instance: Annotated[str, Doc("label of the instance that reached it")]
    pruned: Annotated[Count, Doc("elements that rules dropped")]
    zeros_before: Annotated[Count, Doc("of either sign")]
    zeros_after: Annotated[Count, Doc("of either sign")]
    energy_kept: Annotated[
        NotNegative | None,
        Doc(
            "share of ||dense||^2 in survivors: before they are rebuilt, and after a soft threshold; null if "
            "float64 cannot hold the squares"
        ),
    ]
    output_error_masked: Annotated[OutputError, Doc("by the mask alone")]
    output_error: Annotated[OutputError, Doc("of what was written, before its layer is tuned")]
    loss_error_masked: Annotated[LossError, Doc("by the mask alone")]
    loss_error: Annotated[LossError, Doc("of what was written, before its layer is tuned")]
    metric: Annotated[Minimized, Doc("which of the two was minimized; null if not reconstructed")]


class TunedLayer(Record):
    """A layer whose survivors were tuned: what its outputs differ by from those of the dense model."""

    layer: str
    before: Annotated[NotNegative, Doc("sum of squares, with gradients in units of the loss up to a factor")]
    after: Annotated[NotNegative, Doc("in the same unit; the errors of matrices are those before")]


Tuned = Annotated[
    tuple[TunedLayer, ...], Doc("layers that were tuned, in the order of the model; empty without tune")
]


class ReportTotals(Record):
    """Sums over the whole checkpoint."""

    tensors: Count
    numel: Count
    covered: Annotated[Count, Doc("elements that rules reach")]
    pruned: Annotated[Count, Doc("elements that masks drop")]
    sparsity: Annotated[Share, Doc("pruned / numel")]
    covers: Covers
    layer_coverage: LayerCoverage
    declared_coverage: DeclaredCoverage
    uncovered: UncoveredKinds
    output_error_masked: Annotated[OutputError, Doc("the mean over matrices, by the masks alone")]
    output_error: Annotated[OutputError, Doc("the mean over matrices, of what was written")]
    loss_error_masked: Annotated[LossError, Doc("the mean over matrices, by the masks alone")]
    loss_error: Annotated[LossError, Doc("the mean over matrices, of what was written")]
    metric: Annotated[Minimized, Doc("which of the two was minimized; null if nothing was reconstructed")]


class Report(Document):
    """report.json of sparseprune apply and mask."""

    schema: Literal["sparseprune.report.v1"] = "sparseprune.report.v1"
    input: str
    output: str
    spec_sha256: Annotated[str, Doc("of the spec's bytes", pattern="^[0-9a-f]{64}$")]
    set: Settings
    target: Target
    reconstruct: ReconstructTyped = None
    stats: StatsTyped = None
    within: WithinTyped = None
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
    runtimes: Annotated[
        Mapping[str, RuntimeCount] | None,
        Doc(
            "for each runtime that uses zeros, how many of the matrices that rules reached it runs sparse, "
            "by what the rules ask for"
        ),
    ] = None
    permuted: Annotated[
        tuple[PermutedModule, ...],
        Doc("permutations.safetensors has the order of each tensor; empty unless a rule has permute"),
    ] = ()
    not_permuted: tuple[UnmovedModule, ...] = ()
    tuned: Tuned = ()


class RemovalTotals(Record):
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
    loss_error_masked: Annotated[LossError, Doc("the mean over matrices, by the masks alone")]
    loss_error: Annotated[LossError, Doc("the mean over matrices, after reconstruction")]
    metric: Annotated[Minimized, Doc("which of the two was minimized; null if nothing was reconstructed")]


class ChangedTensor(Record):
    """A tensor that was removed, or has another shape or name."""

    name: Name
    name_after: Annotated[str | None, Doc("null if it was removed")]
    dtype: Dtype
    shape: Dimensions
    shape_after: Annotated[Shape | None, Doc("null if it was removed")]


class Removal(Document):
    """report.json of sparseprune remove."""

    schema: Literal["sparseprune.remove.v1"] = "sparseprune.remove.v1"
    input: str
    output: str
    spec_sha256: Annotated[
        str | None, Doc("of the spec's bytes; null if none decided", pattern="^[0-9a-f]{64}$")
    ]
    masks: Annotated[str | None, Doc("as they were typed; null if others decided")]
    experts: Annotated[str | None, Doc("the list of those that stay, as typed; null if others decided")]
    vocabulary: Annotated[str | None, Doc("the list of tokens that stay, as typed; null if others decided")]
    set: Settings
    target: Target
    reconstruct: ReconstructTyped = None
    stats: StatsTyped = None
    device: Device
    seconds: Seconds
    warnings: Warned
    notes: Noted
    files_left_out: FilesLeftOut
    totals: RemovalTotals
    faster: Annotated[
        str | None,
        Doc("where smaller shapes run faster, and which sizes kernels do not like; absent if none changed"),
    ] = None
    config: tuple[ConfigChange, ...]
    rules: Annotated[Sequence[RuleResult], Doc("as in report.json of apply; empty if no spec decided")]
    tensors: Annotated[
        Sequence[ChangedTensor],
        Doc("the tensors that were removed, or have another shape or name, in the order of the input"),
    ]
    tuned: Tuned = ()
