"""Results of measuring: of inspect, compare and calibrate. Plain data; report/ and calibrate make them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from sparseprune.results.fields import (
    AtLeastOne,
    Count,
    Dimensions,
    Doc,
    Document,
    Dtype,
    FilesNotRead,
    Name,
    NamedTensor,
    NotNegative,
    Numel,
    Record,
    Seconds,
    Shape,
    Share,
)

Pattern = Annotated[str, Doc(pattern="^[0-9]+:[0-9]+(@(-?[0-9]+|both))?$")]


class ZeroBlocks(Record):
    """Blocks of one shape that are zero in every element."""

    zero: Annotated[Count, Doc("blocks that are all zero")]
    of: Annotated[Count, Doc("all blocks")]


BlockZeros = Annotated[
    Mapping[str, ZeroBlocks],
    Doc(
        "zero blocks by their shape, ROWSxCOLUMNS; blocks at the edges may be smaller",
        propertyNames={"pattern": "^[0-9]+x[0-9]+$"},
    ),
]
Holds = Annotated[
    Literal["weights", "codes", "packed", "beside"],
    Doc(
        "weights; codes, each of which scales and zero points beside the tensor make a weight; packed codes, "
        "which are not counted; or what lies beside codes, which no sum has"
    ),
]
NonFinite = Annotated[Count | None, Doc("NaN and infinities")]
ZeroRows = Annotated[Count | None, Doc("rows that are all zero")]
ZeroColumns = Annotated[Count | None, Doc("columns that are all zero")]


class RuntimeVerdict(Record):
    """Whether a runtime can run a tensor sparse."""

    eligible: Annotated[bool, Doc("whether the tensor satisfies all rules of the runtime")]
    reason: Annotated[str | None, Doc("the first rule that it breaks")]


class RuntimeCount(Record):
    """How many matrices a runtime can run sparse."""

    eligible: Annotated[Count, Doc("matrices that it can run sparse")]
    of: Annotated[Count, Doc("tensors of two dimensions or more")]


class RuntimeTotals(RuntimeCount):
    """How many matrices a runtime can run sparse, and on which device."""

    device: Annotated[str, Doc("the device that the runtime needs for the dtypes of these matrices")]
    state: Annotated[
        Literal["alive", "research", "ended", "masks"], Doc("masks: it makes masks, which others run")
    ] = "alive"
    source: Annotated[str, Doc("where its rules are from")] = ""
    date: Annotated[str, Doc("when that was read, or written")] = ""


class InspectedTensor(NamedTensor):
    """A tensor, counted."""

    zeros: Annotated[
        Count | None,
        Doc(
            "of either sign, of codes those that stand for zero; this and all counts below are null if "
            "elements are smaller than a byte, or hold several codes"
        ),
    ]
    sparsity: Annotated[Share | None, Doc("zeros / numel; 0 if it has no element")]
    nonfinite: NonFinite
    patterns: Annotated[
        tuple[Pattern, ...],
        Doc(
            "N:M: of M neighbours along the last dimension at most N are not zero; N:M@A: along dimension A; "
            "N:M@both: along both of the last two, which is transposable N:M"
        ),
    ]
    rows: Annotated[
        Count | None,
        Doc(
            "of the matrix, of the stack of matrices (3-D), or of filters by all else (4-D and more); "
            "null below 2-D"
        ),
    ]
    zero_rows: ZeroRows
    columns: Annotated[Count | None, Doc("of the same matrices")]
    zero_columns: ZeroColumns
    zero_slices: Annotated[
        Shape | None, Doc("for each dimension, at how many of its indices all elements are zero")
    ]
    zero_blocks: BlockZeros
    runtimes: Annotated[
        Mapping[str, RuntimeVerdict] | None, Doc("whether each runtime of --for can run it sparse")
    ] = None
    holds: Holds = "weights"


class InspectedGroup(Record):
    """Tensors of one group, added up."""

    name: Annotated[
        str,
        Doc('the layer, the module with a * for each number, or the rules; "no rule" if none reached them'),
    ]
    tensors: Annotated[Count, Doc("that belong to it")]
    matrices: Annotated[Count, Doc("those of two dimensions or more")]
    numel: Annotated[Count, Doc("elements of all of them")]
    zeros: Annotated[
        Count | None, Doc("of either sign; this and all counts below are null if no tensor could be counted")
    ]
    sparsity: Annotated[Share | None, Doc("zeros as a share of the elements that could be counted")]
    nonfinite: NonFinite
    patterns: Annotated[tuple[Pattern, ...], Doc("that all of its matrices satisfy")]
    rows: Annotated[Count | None, Doc("of its matrices; this and the three below are null if it has none")]
    zero_rows: ZeroRows
    columns: Annotated[Count | None, Doc("of its matrices")]
    zero_columns: ZeroColumns
    zero_blocks: BlockZeros
    runtimes: Annotated[
        Mapping[str, RuntimeCount] | None,
        Doc("for each runtime of --for, how many matrices of the group it can run sparse"),
    ] = None


class InspectTotals(Record):
    """Sums over the tensors of the document."""

    tensors: Annotated[Count, Doc("all that were asked for")]
    matrices: Annotated[Count, Doc("tensors of two dimensions or more")]
    uncounted: Annotated[
        Count,
        Doc(
            "tensors that are not counted: elements smaller than a byte are taken as not zero, packed codes "
            "are left out of numel and sparsity"
        ),
    ]
    numel: Annotated[Count, Doc("elements of all tensors but packed codes and what lies beside codes")]
    pruned: Annotated[Count, Doc("elements that are zero, of either sign")]
    sparsity: Annotated[Share, Doc("pruned / numel; 0 if there is no element")]
    nonfinite: Annotated[Count, Doc("NaN and infinities")]
    patterns: Annotated[
        Mapping[str, Count],
        Doc(
            "how many tensors satisfy each pattern that was looked for",
            propertyNames={"pattern": "^[0-9]+:[0-9]+(@(-?[0-9]+|both))?$"},
        ),
    ]
    rows: Annotated[Count, Doc("of all matrices")]
    zero_rows: Annotated[Count, Doc("rows that are all zero")]
    columns: Annotated[Count, Doc("of all matrices")]
    zero_columns: Annotated[Count, Doc("columns that are all zero")]
    zero_blocks: BlockZeros
    runtimes: Annotated[
        Mapping[str, RuntimeTotals] | None,
        Doc("for each runtime of --for, how many matrices it can run sparse"),
    ] = None


class MadeBy(Record):
    """The run of sparseprune that a checkpoint tells of, in its config.json or in the report beside it."""

    version: Annotated[str, Doc("of sparseprune")]
    command: Annotated[Literal["apply", "remove", "reapply"], Doc("what was done")]
    model: Annotated[str | None, Doc("what it was made from; null if that is not told")]
    spec: Annotated[str | None, Doc("name of the spec; null if that is not told")]


class Inspection(Document):
    """sparseprune inspect --json."""

    __pydantic_config__ = {"json_schema_extra": {"dependentRequired": {"groups": ["by"], "by": ["groups"]}}}  # noqa: RUF012

    schema: Literal["sparseprune.inspect.v2"] = "sparseprune.inspect.v2"
    input: Annotated[str, Doc("path of the checkpoint, as it was typed")]
    made_by: Annotated[MadeBy | None, Doc("left out where it tells of none")] = None
    files_not_read: FilesNotRead
    totals: InspectTotals
    by: Annotated[str | None, Doc("what the groups are made by", enum=["layer", "module", "rule"])] = None
    groups: Annotated[
        Sequence[InspectedGroup] | None,
        Doc("sums over the tensors of each group, in the order that was asked for"),
    ] = None
    tensors: Annotated[
        Sequence[InspectedTensor], Doc("in the order that was asked for, else in that of the checkpoint")
    ]


_EnergyKept = Annotated[
    Share | None,
    Doc("share of ||dense||^2 in elements that are not zero after, as they were; null if not finite"),
]
_RelativeError = Annotated[NotNegative | None, Doc("||pruned - dense|| / ||dense||; null if not finite")]


class ComparedTensor(Record):
    """A tensor that both checkpoints have with one shape."""

    name: Name
    dtype: Dtype
    dtype_after: Annotated[
        str, Doc("if it differs from dtype, or one holds codes, values are compared in place of bits")
    ]
    shape: Dimensions
    numel: Numel
    differs: Annotated[bool | None, Doc("whether any element changed; null if that is unknown")]
    sparsity: Annotated[Share | None, Doc("after")]
    zeros_before: Annotated[
        Count | None,
        Doc(
            "of either sign; this and all that follows is null if elements are smaller than a byte, or hold "
            "several codes"
        ),
    ]
    zeros_after: Annotated[Count | None, Doc("of either sign")]
    changed: Annotated[
        Count | None,
        Doc("elements that differ; zeros of either sign are equal, a NaN is equal to the same bits"),
    ]
    zeroed: Annotated[Count | None, Doc("elements that are zero only after")]
    revived: Annotated[Count | None, Doc("elements that are zero only before: a part of the altered ones")]
    altered: Annotated[Count | None, Doc("not zero after, and other than before; changed = zeroed + altered")]
    first_altered: Annotated[Shape | None, Doc("index of the first altered element; null if there is none")]
    energy_kept: _EnergyKept
    relative_error: _RelativeError
    output_error: Annotated[
        NotNegative | None,
        Doc(
            "sqrt(tr(D H D^T) / tr(W0 H W0^T)), the relative change of outputs; "
            "null without statistics of inputs, or if it is no finite number"
        ),
    ]
    loss_error: Annotated[
        NotNegative | None,
        Doc(
            "sqrt(tr(G D H D^T) / tr(G W0 H W0^T)), the same in units of the loss; null without statistics "
            "of gradients, or if it is no finite number"
        ),
    ]
    largest_change: Annotated[
        NotNegative | None,
        Doc("largest |pruned - dense| of an element; null if a NaN or an infinity came or went"),
    ]
    largest_change_at: Annotated[
        Shape | None, Doc("index of the first such element; null if no value changed")
    ]
    holds: Holds = "weights"


class ReshapedTensor(Record):
    """A tensor that both checkpoints have, with different shapes."""

    name: Name
    dtype: Annotated[str, Doc("in the dense checkpoint")]
    dtype_after: Annotated[str, Doc("in the pruned checkpoint")]
    shape: Annotated[Shape, Doc("in the dense checkpoint")]
    shape_after: Annotated[Shape, Doc("in the pruned checkpoint")]
    numel: Annotated[Count, Doc("number of its elements in the dense checkpoint")]
    numel_after: Annotated[Count, Doc("number of its elements in the pruned checkpoint")]


class CompareTotals(Record):
    """Sums over the tensors that both have with one shape.

    Energies leave out tensors that did not change and are not finite.
    """

    tensors: Annotated[Count, Doc("that both have with one shape")]
    numel: Annotated[Count, Doc("elements of these tensors")]
    differing: Annotated[Count, Doc("tensors of which an element changed")]
    uncompared: Annotated[
        Count,
        Doc("tensors of different dtypes, one of which has elements smaller than a byte or packed codes"),
    ]
    sparsity_before: Annotated[Share, Doc("zeros_before as a share of the elements that could be compared")]
    sparsity: Annotated[Share, Doc("zeros_after as a share of the elements that could be compared")]
    zeros_before: Annotated[Count, Doc("of either sign")]
    zeros_after: Annotated[Count, Doc("of either sign")]
    changed: Annotated[Count, Doc("elements, zeroed and altered ones")]
    zeroed: Annotated[Count, Doc("elements that are zero only after")]
    revived: Annotated[Count, Doc("elements that are zero only before: a part of the altered ones")]
    altered: Annotated[Count, Doc("elements that are not zero after, and other than before")]
    energy_kept: Annotated[
        _EnergyKept, Doc("over tensors of floats, complex numbers or codes; null if not finite")
    ]
    relative_error: Annotated[_RelativeError, Doc("over the same tensors; null if not finite")]
    added: Annotated[Count, Doc("tensors that only the pruned checkpoint has")]
    removed: Annotated[Count, Doc("tensors that only the dense checkpoint has")]
    reshaped: Annotated[Count, Doc("tensors that both have, with different shapes")]
    output_error: Annotated[
        NotNegative | None, Doc("the mean over the tensors that have one; null without statistics")
    ]
    loss_error: Annotated[
        NotNegative | None, Doc("the mean over the tensors that have one; null without gradients")
    ]


class Comparison(Document):
    """sparseprune compare --json."""

    schema: Literal["sparseprune.compare.v1"] = "sparseprune.compare.v1"
    dense: Annotated[str, Doc("path of the first checkpoint, as it was typed")]
    pruned: Annotated[str, Doc("path of the second checkpoint, as it was typed")]
    totals: CompareTotals
    tensors: Annotated[Sequence[ComparedTensor], Doc("that both have with one shape")]
    added: Annotated[tuple[NamedTensor, ...], Doc("that only the pruned checkpoint has")]
    removed: Annotated[tuple[NamedTensor, ...], Doc("that only the dense checkpoint has")]
    reshaped: Annotated[tuple[ReshapedTensor, ...], Doc("that both have, with different shapes")]


class CollectedStatistics(Record):
    """A tensor of statistics: second moments of the inputs of matrices."""

    name: str
    features: AtLeastOne
    experts: Annotated[AtLeastOne | None, Doc("matrices in the stack; null if it is no stack")]
    tokens: Annotated[
        Count | tuple[Count, ...],
        Doc("rows of inputs that were counted; one number for each matrix of a stack"),
    ]
    divided_by: Annotated[
        AtLeastOne | tuple[AtLeastOne, ...],
        Doc(
            "divisor of the sums over these rows: their number, or the tokens of the text if a router "
            "chose the rows; one number for each matrix of a stack"
        ),
    ]
    weights: Annotated[
        Mapping[str, Count],
        Doc(
            "the tensors of the checkpoint that have this input, with the dimension that it multiplies",
            minProperties=1,
        ),
    ]


class CollectedGradients(Record):
    """Second moments of the gradients of the loss at the outputs of a matrix, or of each in a stack."""

    name: str
    weight: Annotated[str, Doc("the tensor of the checkpoint")]
    outputs: AtLeastOne
    groups: Annotated[AtLeastOne, Doc("of consecutive outputs, without moments between these groups")]
    experts: Annotated[AtLeastOne | None, Doc("matrices in the stack; null if it is no stack")]
    tokens: Annotated[
        Count | tuple[Count, ...],
        Doc("rows of outputs by whose number the sums are divided; one number for each matrix of a stack"),
    ]


class RoutedExperts(Record):
    """What experts did whose last matrices are in one tensor: sums over the tokens routed to each."""

    name: str
    weight: Annotated[str, Doc("the tensor of the checkpoint")]
    tokens: Annotated[tuple[Count, ...], Doc("tokens routed to each expert")]
    gate: Annotated[tuple[float, ...], Doc("sums of the gates")]
    gated_norm: Annotated[tuple[float, ...], Doc("sums of the l2 norms of the outputs times their gates")]


class WithoutStatistics(Record):
    """A matrix without statistics."""

    name: str
    why: str


class Statistics(Document):
    """report.json of sparseprune calibrate."""

    schema: Literal["sparseprune.statistics.v1"] = "sparseprune.statistics.v1"
    input: str
    output: str
    kind: Literal["hessian", "norm"]
    device: str
    seconds: Seconds
    text: Annotated[tuple[str, ...], Doc("files of text", minItems=1)]
    sequences: AtLeastOne
    length: Annotated[AtLeastOne, Doc("tokens of a sequence, with the special ones")]
    seed: Count
    special: Annotated[bool, Doc("whether special tokens count")]
    tokens: Annotated[AtLeastOne, Doc("that count, over all sequences")]
    passes: Annotated[AtLeastOne, Doc("how often the layer that ran most often met the text")]
    matrices: Annotated[tuple[CollectedStatistics, ...], Doc("one entry for each tensor of statistics")]
    missing: Annotated[
        tuple[str, ...],
        Doc("weights of the model that the checkpoint lacks: those of heads, which had random values"),
    ]
    without: Annotated[
        tuple[WithoutStatistics, ...],
        Doc("matrices of the checkpoint, and stacks of them, without statistics"),
    ]
    gradients: Annotated[
        tuple[CollectedGradients, ...], Doc("of each matrix that has some; none without --gradients")
    ] = ()
    without_gradients: Annotated[
        tuple[WithoutStatistics, ...], Doc("matrices that have statistics of inputs alone, though asked for")
    ] = ()
    experts: Annotated[
        tuple[RoutedExperts, ...], Doc("for each tensor with the last matrices of routed experts")
    ] = ()
