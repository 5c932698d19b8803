"""The tables of a spec as typed, frozen models: which keys there are and what each may hold.

A key's `description` is what an error says is wanted. Knows one table at a time: what tables say about
each other is for `checking`, what they mean for a checkpoint is for `binding`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StrictInt,
    StrictStr,
)
from pydantic_core import PydanticCustomError

from sparseprune.spec.patterns import PatternError, TensorPattern, parse_pattern

VERSION = 1
_LARGEST = 2**63 - 1  # of what counts blocks or elements
OWN_WORDS = "own_words"  # the type of a validation error whose text is a whole sentence already


def _pattern(value: object) -> TensorPattern:
    if not isinstance(value, str):
        raise ValueError("no pattern")  # noqa: TRY004  (pydantic turns ValueErrors into problems)
    try:
        return parse_pattern(value)
    except PatternError as error:
        raise PydanticCustomError(OWN_WORDS, "{text}", {"text": f'"{value}" {error}'}) from error


def _extent(value: int) -> int:
    if value != -1 and not 1 <= value <= _LARGEST:
        raise ValueError("no extent")
    return value


def _one_as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Extents = tuple[Annotated[StrictInt, AfterValidator(_extent)], ...]
Names = Annotated[tuple[StrictStr, ...], Field(min_length=1)]
Order = tuple[Annotated[StrictInt, Field(ge=0, le=_LARGEST)], ...]
Across = Literal["all"] | tuple[StrictStr, ...]
Patterns = Annotated[
    tuple[Annotated[TensorPattern, PlainValidator(_pattern)], ...],
    BeforeValidator(_one_as_list),
    Field(min_length=1),
]

_SHAPE = "a list of integers, one for each dimension: 1 or more, or -1 for the whole dimension"
_TENSORS = 'a pattern such as "layers.{layer}.mlp.up_proj.weight", or a list of patterns'
_ORDERS = "a list with one list for each member, such as [[0, 1], [1, 0]]"
_ACROSS = 'a list of captures such as ["layer"], or "all"'


class Table(BaseModel):
    """Any table: nothing may be changed later, no unknown key is let through."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class BudgetTable(Table):
    """What survives in each scope; of the first three keys exactly one stands in an outermost table."""

    nnz: Annotated[StrictInt, Field(ge=0, le=_LARGEST)] | None = Field(
        None, description="an integer of 0 or more: how many blocks survive in each scope"
    )
    sparsity: Annotated[float, Field(strict=True, ge=0, le=1)] | None = Field(
        None, description="a number from 0 to 1: the share of each scope's blocks to prune"
    )
    threshold: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None = Field(
        None, description="a number of 0 or more: the least score that survives"
    )
    multiple_of: Annotated[StrictInt, Field(ge=1, le=_LARGEST)] | None = Field(
        None, description="an integer of 1 or more: the surviving blocks are rounded up to a multiple of it"
    )

    @property
    def budget_keys(self) -> tuple[str, ...]:
        """Which of the three budgets are given."""
        return tuple(key for key in BUDGETS if getattr(self, key) is not None)


BUDGETS = ("nnz", "sparsity", "threshold")


class BlockTable(Table):
    """`[block.NAME]`: the blocks of every tensor that a pattern matches."""

    tensors: Patterns = Field(description=_TENSORS)
    shape: Extents = Field(description=_SHAPE)


class BlockCouplingTable(Table):
    """`[block_coupling.NAME]`: blocks of several tensors fused into one."""

    member_kind: ClassVar[str] = "block"
    members_key: ClassVar[str] = "blocks"

    blocks: Names = Field(description='a list of names of [block] tables, such as ["gate", "up"]')
    orders: tuple[Order, ...] | None = Field(None, description=_ORDERS)
    across: Across = Field((), description=_ACROSS)

    @property
    def members(self) -> tuple[str, ...]:
        return self.blocks


class ScopeTable(BudgetTable):
    """`[scope.NAME]`: with `tensors` the short form, whose block is a shape; else the block is a name."""

    tensors: Patterns | None = Field(None, description=_TENSORS)
    block: StrictStr | Extents = Field(
        description="the name of a [block] or [block_coupling], or a block's shape such as [1, 1] or [1, -1]"
    )
    shape: Extents = Field(description=_SHAPE.replace("1 or more", "1 or more blocks"))


class ScopeCouplingTable(BudgetTable):
    """`[scope_coupling.NAME]`: scopes whose blocks compete for one budget."""

    member_kind: ClassVar[str] = "scope"
    members_key: ClassVar[str] = "scopes"

    scopes: Names = Field(description='a list of names of [scope] tables, such as ["attention", "mlp"]')
    orders: tuple[Order, ...] | None = Field(None, description=_ORDERS)
    across: Across = Field((), description=_ACROSS)

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
    """A spec that is right in itself; `source` is what its problems are reported under."""

    source: str
    block: Mapping[str, BlockTable]
    block_coupling: Mapping[str, BlockCouplingTable]
    scope: Mapping[str, ScopeTable]
    scope_coupling: Mapping[str, ScopeCouplingTable]

    def coupled_scopes(self) -> dict[str, str]:
        """For every scope that is a member of a scope coupling, the (last) coupling that names it."""
        return {scope: name for name, table in self.scope_coupling.items() for scope in table.scopes}
