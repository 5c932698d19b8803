"""The tables of a spec as typed, frozen models: which keys there are and what each may hold.

A key's `description` is what an error says is wanted. Knows one table at a time: what tables say about
each other is for `checking`, what they mean for a checkpoint is for `binding`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from sparseprune.spec.expressions import Expression, SliceEntry
from sparseprune.spec.fields import (
    Across,
    Axes,
    Einops,
    Extents,
    Integer,
    Names,
    Order,
    Patterns,
    Positive,
    Regex,
    Share,
    Sizes,
    Slices,
    Text,
    Threshold,
)
from sparseprune.spec.methods import MethodTable, ReconstructTable, ScoreTable
from sparseprune.spec.patterns import TensorPattern
from sparseprune.spec.regexes import RegexPattern
from sparseprune.spec.variables import Variable

VERSION = 1
COVERS = ("matrices", "mlp", "attention", "experts", "layers")  # what a spec may be about

_SHAPE = "a list of integers or expressions, one for each dimension: 1 or more, or -1 for the whole dimension"
_TENSORS = 'a pattern such as "layers.{layer}.mlp.up_proj.weight", or a list of patterns'
_ORDERS = "a list with one list for each member, such as [[0, 1], [1, 0]]"
_ACROSS = 'a list of captures such as ["layer"], or "all"'
_OPTIONAL = "true or false: whether it may be missing in a checkpoint"


class Table(BaseModel):
    """Any table: nothing may be changed later, no unknown key is let through."""

    # Deferred, because a spec has few kinds of tables, and validators that nobody calls are slow to build.
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, defer_build=True)


class BudgetTable(MethodTable, Table):
    """What survives in each scope; of the first three keys exactly one stands in an outermost table."""

    nnz: Integer | None = Field(
        None, description="an integer of 0 or more, or an expression: how many blocks survive in each scope"
    )
    sparsity: Share | None = Field(
        None, description="a number from 0 to 1, or an expression: the share of each scope's blocks to prune"
    )
    threshold: Threshold | None = Field(
        None, description="a number of 0 or more, or an expression: the least score that survives"
    )
    multiple_of: Positive | None = Field(
        None,
        description="an integer of 1 or more, or an expression: the surviving blocks are rounded up to a "
        "multiple of it",
    )

    @property
    def budget_keys(self) -> tuple[str, ...]:
        """Which of the three budgets are given."""
        return tuple(key for key in BUDGETS if getattr(self, key) is not None)


BUDGETS = ("nnz", "sparsity", "threshold")


class ExplicitView(Table):
    """`view = {...}`: a view by its shape and strides, in elements of the row-major tensor."""

    shape: Extents = Field(description="a list of integers or expressions, each 1 or more")
    stride: Sizes = Field(description="a list of integers or expressions, each 0 or more")
    offset: Integer = Field(0, description="an integer of 0 or more, or an expression")


class TensorsTable(Table):
    """Which tensors there are, and how each one is looked at."""

    tensors: Patterns | None = Field(None, description=_TENSORS)
    regex: Regex | None = Field(
        None, description=r"a regular expression such as 'layers\.(?P<layer>\d+)\.up\.weight'"
    )
    exclude: Patterns = Field((), description="a pattern, or a list of patterns")
    where: Text | None = Field(
        None, description='an expression such as "layer >= 2 and ndim == 2", which is true or false'
    )
    slice: Slices | None = Field(
        None, description='a list with one text for each dimension, such as ["0:inter", ":"]'
    )
    view: Einops | ExplicitView | None = Field(
        None,
        description='an einops pattern such as "(kv q) k -> kv q k", or a table with shape and stride',
    )
    axes: Axes = Field(
        (), description="a table of axes of the view, each an integer of 1 or more or an expression"
    )

    @property
    def patterns(self) -> tuple[TensorPattern | RegexPattern, ...] | None:
        """What names its tensors; None where it names none."""
        return self.tensors if self.regex is None else (self.regex,)

    @property
    def patterns_key(self) -> str:
        return "tensors" if self.regex is None else "regex"


class BlockTable(TensorsTable):
    """`[block.NAME]`: the blocks of every tensor that a pattern matches."""

    shape: Extents = Field(description=_SHAPE)
    optional: StrictBool = Field(False, description=_OPTIONAL)  # noqa: FBT003


class BlockCouplingTable(Table):
    """`[block_coupling.NAME]`: blocks of several tensors fused into one."""

    member_kind: ClassVar[str] = "block"
    members_key: ClassVar[str] = "blocks"

    blocks: Names = Field(description='a list of names of [block] tables, such as ["gate", "up"]')
    orders: tuple[Order, ...] | None = Field(None, description=_ORDERS)
    across: Across = Field((), description=_ACROSS)
    optional: StrictBool = Field(False, description=_OPTIONAL)  # noqa: FBT003

    @property
    def members(self) -> tuple[str, ...]:
        return self.blocks


class ScopeTable(TensorsTable, BudgetTable):
    """`[scope.NAME]`: with `tensors` the short form, whose block is a shape; else the block is a name."""

    block: StrictStr | Extents = Field(
        description="the name of a [block] or [block_coupling], or a block's shape such as [1, 1] or [1, -1]"
    )
    shape: Extents = Field(description=_SHAPE.replace("1 or more", "1 or more blocks"))
    optional: StrictBool = Field(False, description=_OPTIONAL)  # noqa: FBT003


class ScopeCouplingTable(BudgetTable):
    """`[scope_coupling.NAME]`: scopes whose blocks compete for one budget."""

    member_kind: ClassVar[str] = "scope"
    members_key: ClassVar[str] = "scopes"

    scopes: Names = Field(description='a list of names of [scope] tables, such as ["attention", "mlp"]')
    orders: tuple[Order, ...] | None = Field(None, description=_ORDERS)
    across: Across = Field((), description=_ACROSS)
    optional: StrictBool = Field(False, description=_OPTIONAL)  # noqa: FBT003

    @property
    def members(self) -> tuple[str, ...]:
        return self.scopes


CouplingTable = BlockCouplingTable | ScopeCouplingTable

KINDS: Mapping[str, type[Table]] = MappingProxyType(
    {
        "block": BlockTable,
        "block_coupling": BlockCouplingTable,
        "scope": ScopeTable,
        "scope_coupling": ScopeCouplingTable,
    }
)


@dataclass(frozen=True, slots=True)
class Spec:
    """A spec that is right in itself; `source` is what its problems are reported under.

    Paths in it are relative to `directory`; `covers` is which matrices it is about, one of COVERS.
    """

    source: str
    directory: Path
    variables: Mapping[str, Variable]
    score: ScoreTable | None
    reconstruct: ReconstructTable | None
    block: Mapping[str, BlockTable]
    block_coupling: Mapping[str, BlockCouplingTable]
    scope: Mapping[str, ScopeTable]
    scope_coupling: Mapping[str, ScopeCouplingTable]
    covers: str = COVERS[0]

    def coupled_scopes(self) -> dict[str, str]:
        """For every scope that is a member of a scope coupling, the (last) coupling that names it."""
        return {scope: name for name, table in self.scope_coupling.items() for scope in table.scopes}


def expressions_of(value: object) -> Iterator[Expression]:
    """All expressions in the value of a key."""
    match value:
        case Expression():
            yield value
        case SliceEntry(low=low, high=high):
            yield from (bound for bound in (low, high) if bound is not None)
        case ExplicitView(shape=shape, stride=stride, offset=offset):
            yield from expressions_of((shape, stride, offset))
        case tuple():
            for part in value:
                yield from expressions_of(part)
