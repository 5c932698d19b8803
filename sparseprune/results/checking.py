"""Results of checks: of verify with a spec or with masks, and of reapply. Plain data; report/ makes them."""

from collections.abc import Sequence
from typing import Annotated, Literal

from sparseprune.results.fields import (
    AtLeastOne,
    Count,
    Covers,
    DeclaredCoverage,
    Doc,
    Document,
    EachCount,
    EachNumber,
    FilesLeftOut,
    FilesNotRead,
    LayerCoverage,
    NamedTensor,
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


class BrokenScope(Record):
    """A scope that breaks its rule."""

    instance: str
    scope: Annotated[Shape, Doc("index in the grid of scopes of the instance")]
    element: Annotated[Shape, Doc("index in the tensor of the scope's first element")]
    nonzero: Annotated[AtLeastOne, Doc("blocks that are not zero")]
    allowed: Annotated[Count | None, Doc("null under a threshold")]


Along = Annotated[
    Literal["rows", "columns"] | None,
    Doc("the lines of tiles that are scopes, where the rule is transposable; left out otherwise"),
]


class CheckedTensor(Record):
    """The scopes of a rule that reach a tensor."""

    name: str
    rule: str
    scopes: Annotated[Count, Doc("that reach the tensor")]
    nnz: Annotated[Count | None, Doc("null if it differs from scope to scope, and under a threshold")]
    threshold: NotNegative | None
    broken: Count
    torn: Annotated[
        Count, Doc("fused blocks of too full scopes that are not zero in this tensor but zero in another")
    ]
    first: Annotated[BrokenScope | None, Doc("the first broken scope; null if there is none")]
    along: Along = None


class SharedSurvivors(Record):
    """What instances that share a budget keep together; of blocks that are not zero all elements count."""

    nonzero: Annotated[Count, Doc("elements of blocks that are not zero")]
    allowed: Annotated[Count, Doc("elements that the common budget lets survive")]


class CheckedRule(Record):
    """The scopes of a rule."""

    name: str
    instances: Count
    tensors: Count
    scopes: Count
    blocks_per_scope: EachCount
    nnz: EachCount
    threshold: EachNumber
    broken: Annotated[
        Count, Doc("scopes with more than nnz non-zero blocks, or with blocks below the threshold")
    ]
    torn: Annotated[
        Count, Doc("fused blocks of too full scopes that are zero in one tensor but not in another")
    ]
    survivors: Annotated[
        tuple[tuple[Count, AtLeastOne], ...],
        Doc("pairs, ascending: a number of non-zero blocks, and how many scopes have so many"),
    ]
    unchecked: Annotated[str | None, Doc("why the rule was not checked; null if it was")]
    together: Annotated[
        SharedSurvivors | None,
        Doc(
            "of a rule whose instances share one budget, where no report beside the weights has their parts "
            "of it: nnz is then the most that a part may be; left out otherwise"
        ),
    ] = None
    along: Along = None


class VerifyTotals(Record):
    """Sums over all rules that were checked; under a threshold every block is a scope."""

    scopes: Count
    broken: Count
    tensors: Annotated[Count, Doc("that were checked")]
    numel: Annotated[Count, Doc("of the whole checkpoint")]
    checked: Annotated[Count, Doc("elements that rules reach and that were checked")]
    covers: Covers
    layer_coverage: LayerCoverage
    declared_coverage: DeclaredCoverage
    uncovered: UncoveredKinds


class Verification(Document):
    """sparseprune verify CHECKPOINT SPEC --json."""

    schema: Literal["sparseprune.verify.v1"] = "sparseprune.verify.v1"
    input: str
    spec: Annotated[str, Doc("as it was typed")]
    set: Settings
    warnings: Warned
    files_not_read: FilesNotRead
    totals: VerifyTotals
    rules: tuple[CheckedRule, ...]
    tensors: Annotated[
        Sequence[CheckedTensor],
        Doc("the tensors that were checked, for each rule that reaches them, in the order of the checkpoint"),
    ]


class LeftOut(Record):
    """What has no counterpart and was ignored because of --partial."""

    masks: Annotated[Count, Doc("masks without a tensor")]
    tensors: Annotated[Count, Doc("tensors without a mask that they should have")]


class MaskedTotals(Record):
    """Sums over the whole checkpoint."""

    tensors: Count
    numel: Count
    masked: Annotated[Count, Doc("elements of tensors that have masks")]
    pruned: Annotated[Count, Doc("elements that masks drop")]
    lost: Annotated[Count, Doc("elements that masks drop and that were not zero in the input")]
    sparsity: Annotated[Share, Doc("pruned / numel")]


class MaskedTensor(NamedTensor):
    """A tensor that has a mask."""

    pruned: Annotated[Count, Doc("elements that the mask drops")]
    lost: Annotated[Count, Doc("those of them that were not zero in the input")]


class ReappliedTensor(MaskedTensor):
    """A tensor that has a mask, before and after."""

    zeros_before: Annotated[Count, Doc("of either sign")]
    zeros_after: Annotated[Count, Doc("of either sign")]
    energy_kept: Annotated[NotNegative | None, Doc("||after||^2 / ||before||^2; null if it is not finite")]


class Reapplication(Document):
    """report.json of sparseprune reapply, and its --json."""

    schema: Literal["sparseprune.reapply.v1"] = "sparseprune.reapply.v1"
    input: str
    masks: Annotated[str, Doc("the masks, or the sparse checkpoint whose zeros are the masks")]
    output: str
    set: Annotated[Settings, Doc("variables set by --set when the masks were made, as they were typed")]
    seconds: Seconds
    warnings: Warned
    files_left_out: FilesLeftOut
    left_out: LeftOut
    folded: Annotated[Count, Doc("weights that torch.nn.utils.prune kept in two, and that are one now")]
    bytes: WrittenBytes
    totals: MaskedTotals
    tensors: Annotated[
        Sequence[ReappliedTensor], Doc("the tensors that have a mask, in the order of the checkpoint")
    ]


class MaskVerifyTotals(MaskedTotals):
    """Sums over the whole checkpoint."""

    failed: Annotated[Count, Doc("tensors with lost zeros")]


class MaskCheckedTensor(MaskedTensor):
    """A tensor that has a mask."""

    first: Annotated[Shape | None, Doc("index of the first lost zero; null if none was lost")]


class MaskVerification(Document):
    """sparseprune verify --masks --json."""

    schema: Literal["sparseprune.verify-masks.v1"] = "sparseprune.verify-masks.v1"
    input: str
    masks: Annotated[str, Doc("the masks, or the sparse checkpoint whose zeros are the masks")]
    holds: Annotated[bool, Doc("whether everything that masks drop is zero")]
    warnings: Warned
    files_not_read: FilesNotRead
    left_out: LeftOut
    totals: MaskVerifyTotals
    tensors: Annotated[
        Sequence[MaskCheckedTensor], Doc("the tensors that have a mask, in the order of the checkpoint")
    ]
