"""The tables of a spec as pydantic models: keys, types, defaults, score kinds, methods.

Owns what may be written where. A new key is one field of its table here, a new score kind one row of
SCORE_KEYS. Called by parsing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
)
from pydantic_core import PydanticCustomError

from sparseprune.spec.bound import Reconstruct, Score, Soft
from sparseprune.spec.expressions import (
    LARGEST,
    Expression,
    ExpressionError,
    SliceEntry,
    Variable,
    parse_expression,
    parse_slice,
)
from sparseprune.spec.patterns import PatternError, RegexPattern, TensorPattern, parse_pattern, parse_regex
from sparseprune.spec.problems import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


Read = TypeVar("Read")
OWN_WORDS = "own_words"  # the type of a validation error whose text is shown as it is
_TAKEN = ("cls", "tensor", "pattern")  # argument names of the functions that read einops patterns


def own_words(text: str) -> PydanticCustomError:
    """An error whose text is shown as it is."""
    return PydanticCustomError(OWN_WORDS, "{text}", {"text": text})


def _reader(parse: Callable[[str], Read]) -> Callable[[object], Read]:
    """A validator that parses texts and keeps the parser's own error texts."""

    def read(value: object) -> Read:
        if not isinstance(value, str):
            raise ValueError("no text")  # noqa: TRY004  (pydantic turns ValueErrors into problems)
        try:
            return parse(value)
        except PatternError as error:
            raise own_words(f'"{value}" {error}') from error
        except ExpressionError as error:
            raise own_words(str(error)) from error

    return read


_expression = _reader(parse_expression)


def _integer(least: int) -> Callable[[object], int | Expression]:
    def read(value: object) -> int | Expression:
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST:
            return value
        return _expression(value)

    return read


def _number(most: float) -> Callable[[object], float | Expression]:
    def read(value: object) -> float | Expression:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most:
            return float(value)
        return _expression(value)

    return read


def _extent(value: object) -> int | Expression:
    return -1 if value == -1 and type(value) is int else _integer(1)(value)


def _slice_entry(value: object) -> SliceEntry:
    single = type(value) is int and abs(value) <= LARGEST
    return _reader(parse_slice)(str(value) if single else value)


def _axes(value: object) -> tuple[tuple[str, int | Expression], ...]:
    if not isinstance(value, dict):
        raise ValueError("no table")  # noqa: TRY004
    for name in value:
        if not (name.isascii() and name.isidentifier()) or name in _TAKEN:
            raise own_words(f'"{name}" cannot be the name of an axis: take another one, such as q')
    return tuple((name, _integer(1)(size)) for name, size in value.items())


def _einops(pattern: str) -> str:
    if pattern.count("->") != 1:
        raise own_words(f'"{pattern}" is no einops pattern: wanted two sides, as in "(kv q) k -> kv q k"')
    return pattern


def _one_as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Integer = Annotated[int | Expression, PlainValidator(_integer(0))]
Positive = Annotated[int | Expression, PlainValidator(_integer(1))]
Share = Annotated[float | Expression, PlainValidator(_number(1.0))]
Threshold = Annotated[float | Expression, PlainValidator(_number(sys.float_info.max))]
Text = Annotated[Expression, PlainValidator(_expression)]
Extents = tuple[Annotated[int | Expression, PlainValidator(_extent)], ...]
Sizes = tuple[Annotated[int | Expression, PlainValidator(_integer(0))], ...]
Slices = tuple[Annotated[SliceEntry, PlainValidator(_slice_entry)], ...]
Axes = Annotated[tuple[tuple[str, int | Expression], ...], PlainValidator(_axes)]
Einops = Annotated[StrictStr, AfterValidator(_einops)]
Names = Annotated[tuple[StrictStr, ...], Field(min_length=1)]
Order = tuple[Annotated[StrictInt, Field(ge=0, le=LARGEST)], ...]
Across = Literal["all"] | tuple[StrictStr, ...]
Patterns = Annotated[
    tuple[Annotated[TensorPattern, PlainValidator(_reader(parse_pattern))], ...],
    BeforeValidator(_one_as_list),
    Field(min_length=1),
]
Regex = Annotated[RegexPattern, PlainValidator(_reader(parse_regex))]

FilePath = Annotated[StrictStr, Field(min_length=1, pattern=r"^[^\x00]*$")]
PositiveNumber = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NumberFromZero = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Dimension = Annotated[StrictInt, Field(ge=-LARGEST, le=LARGEST)]

# The kinds of scores, each with the keys that it takes; `file` is required where it is allowed.
# A new kind is a row here and a row of execution/scores.py, which says how it ranks.
SCORE_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "magnitude": ("norm", "normalize", "nonfinite"),
        "random": ("seed",),
        "values": ("file", "nonfinite"),
        "wanda": ("file", "input_dim", "nonfinite"),
        "obd": ("file", "input_dim", "nonfinite"),
        "blocks": ("file",),
    }
)
_PATH = "the path of a safetensors file or directory, relative to the spec"
_INPUT_DIM = "an integer: the dimension of the weight along which its input features lie"
SOFT_KEYS = ("k_weight", "scale", "conditioners", "max_iter", "atol", "eps")


def _score_kind(value: str) -> str:
    if value not in SCORE_KEYS:
        raise ValueError("no kind of score")
    return value


def _not_a_boolean(value: object) -> object:
    """`true` equals 1, and is no norm."""
    if isinstance(value, bool):
        raise ValueError("no norm")  # noqa: TRY004  (pydantic turns ValueErrors into problems)
    return value


class Table(BaseModel):
    """Any table: it cannot be changed, and refuses unknown keys."""

    # Deferred, because a spec uses few kinds of tables, and validators are slow to build.
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, defer_build=True)


class ScoreTable(Table):
    """`[score]`, or `score = {...}` in an outermost table."""

    kind: Annotated[StrictStr, AfterValidator(_score_kind)] = Field(
        "magnitude", description=f"one of {listed(SCORE_KEYS, 'or')}"
    )
    norm: Annotated[Literal[1, 2, "inf"], BeforeValidator(_not_a_boolean)] | None = Field(
        None, description='1, 2 or "inf"'
    )
    normalize: Literal["rms"] | None = Field(None, description='"rms": the root mean square of each block')
    seed: Annotated[StrictInt, Field(ge=0, le=LARGEST)] | None = Field(
        None, description="an integer of 0 or more"
    )
    file: FilePath | None = Field(None, description=_PATH)
    input_dim: Dimension | None = Field(None, description=_INPUT_DIM)
    nonfinite: Literal["error", "prune"] | None = Field(
        None, description='"error" or "prune": what to do with NaN and infinity among the weights and scores'
    )


class ReconstructTable(Table):
    """`[reconstruct]`, or `reconstruct = {...}` in an outermost table."""

    method: Literal["refit", "admm", "none"] = Field("admm", description='one of "refit", "admm" and "none"')
    file: FilePath | None = Field(
        None, description="the path of a statistics file or directory, as calibrate writes it"
    )
    damp: NumberFromZero = Field(
        0.01,
        description="a number of 0 or more: how much of the mean of the Hessian's diagonal is added to it",
    )
    input_dim: Dimension | None = Field(None, description=_INPUT_DIM)


class MethodTable(Table):
    """The keys of an outermost scope or coupling beside its budget."""

    score: ScoreTable | None = Field(None, description='a table such as { kind = "random", seed = 1 }')
    reconstruct: ReconstructTable | None = Field(
        None, description='a table such as { file = "stats", method = "admm" }'
    )
    mode: Literal["hard", "soft"] | None = Field(
        None, description='"hard" (losers become zero) or "soft" (every block shrinks by the threshold)'
    )
    k_weight: NumberFromZero | None = Field(
        None, description="a number of 0 or more: how much the first pruned score counts in the threshold"
    )
    scale: StrictBool | None = Field(
        None, description="true or false: whether the threshold grows with the root of a block's size"
    )
    conditioners: FilePath | None = Field(None, description=_PATH)
    max_iter: Annotated[StrictInt, Field(ge=1, le=LARGEST)] | None = Field(
        None, description="an integer of 1 or more"
    )
    atol: PositiveNumber | None = Field(None, description="a number above 0")
    eps: PositiveNumber | None = Field(None, description="a number above 0")


METHOD_KEYS = tuple(MethodTable.model_fields)
_NO_STATISTICS = "missing: give what calibrate wrote, a safetensors file or directory"


def wrong_score(table: ScoreTable) -> Iterator[tuple[str, str]]:
    """Keys that do not go with the kind of a score, each with the text of the problem."""
    allowed = SCORE_KEYS[table.kind]
    for key in ScoreTable.model_fields:
        if key not in {"kind", *allowed} and getattr(table, key) is not None:
            yield key, f'kind = "{table.kind}" takes no {key}: it takes {listed(allowed)}'
    if "file" in allowed and table.file is None:
        yield "file", f'missing: kind = "{table.kind}" reads its values from a safetensors file or directory'


def wrong_common_reconstruct(table: ReconstructTable) -> Iterator[tuple[str, str]]:
    """What is wrong in [reconstruct] itself, by key."""
    if table.method != "none" and table.file is None:
        yield "file", _NO_STATISTICS


def wrong_reconstruct(
    table: BudgetTable, score: ScoreTable | None, reconstruct: ReconstructTable | None
) -> Iterator[tuple[str, str]]:
    """Keys of a rule that do not go with its `reconstruct`; `score` and `reconstruct` are those it uses."""
    if reconstruct is None or reconstruct.method == "none":
        return
    if reconstruct.file is None and reconstruct is table.reconstruct:
        yield "reconstruct.file", _NO_STATISTICS
    if table.mode == "soft":
        yield "mode", 'found "soft", which cannot reconstruct: write reconstruct = { method = "none" }'
    if score is not None and score.nonfinite == "prune":
        yield "reconstruct", 'its score has nonfinite = "prune": NaN and infinity cannot be reconstructed'
    if reconstruct.method == "refit":
        return
    if table.threshold is not None:
        yield (
            "threshold",
            'method = "admm" needs a fixed number of blocks: give nnz or sparsity, or method = "refit"',
        )
    if score is not None and (score.kind, score.norm or 2, score.normalize) != ("magnitude", 2, None):
        text = 'method = "admm" ranks blocks itself and uses no score'
        yield "reconstruct", f'{text}: remove the score, or write method = "refit"'


def wrong_method(table: BudgetTable, common: ScoreTable | None) -> Iterator[tuple[str, str]]:
    """Keys that do not go with the mode of a rule, each with the text of the problem; `common` is [score]."""
    if table.mode != "soft":
        for key in SOFT_KEYS:
            if getattr(table, key) is not None:
                yield key, 'only mode = "soft" takes this key'
        return
    score = table.score or common
    if score is not None and score.nonfinite == "prune":
        yield "mode", 'found "soft", but its score has nonfinite = "prune", which only "hard" takes'
    if table.threshold is not None and table.k_weight is not None:
        yield "k_weight", "only a threshold made from nnz or sparsity takes this key; here it is given"


def score_of(table: ScoreTable | None, directory: Path) -> Score:
    """The score of a table; without one, the magnitude."""
    if table is None:
        return Score()
    return Score(
        kind=table.kind,
        norm=inf if table.norm == "inf" else float(table.norm or 2),
        normalize=table.normalize is not None,
        seed=table.seed or 0,
        file=None if table.file is None else _absolute(table.file, directory),
        input_dim=table.input_dim,
        nonfinite=table.nonfinite or "error",
    )


def reconstruct_of(table: ReconstructTable | None, directory: Path) -> Reconstruct | None:
    """How the surviving weights are reconstructed; None if they are not."""
    if table is None or table.method == "none" or table.file is None:
        return None
    return Reconstruct(_absolute(table.file, directory), table.method, table.damp, table.input_dim)


def soft_of(table: BudgetTable, directory: Path) -> Soft | None:
    """How a rule shrinks its blocks; None in mode "hard"."""
    if table.mode != "soft":
        return None
    plain = {key: getattr(table, key) for key in SOFT_KEYS if key != "conditioners"}
    given = {key: value for key, value in plain.items() if value is not None}
    path = None if table.conditioners is None else _absolute(table.conditioners, directory)
    return Soft(conditioners=path, **given)


def _absolute(path: str, directory: Path) -> Path:
    return Path(directory, path).absolute()


VERSION = 1
COVERS = ("matrices", "mlp", "attention", "experts", "layers")  # which matrices a spec may be about

_SHAPE = "a list of integers or expressions, one for each dimension: 1 or more, or -1 for the whole dimension"
_TENSORS = 'a pattern such as "layers.{layer}.mlp.up_proj.weight", or a list of patterns'
_OPTIONAL = "true or false: whether it may be missing in a checkpoint"


class BudgetTable(MethodTable):
    """What survives in each scope; an outermost table has exactly one of the first three keys."""

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


BUDGETS = ("nnz", "sparsity", "threshold")


class ExplicitView(Table):
    """`view = {...}`: a view by its shape and strides, in elements of the row-major tensor."""

    shape: Extents = Field(description="a list of integers or expressions, each 1 or more")
    stride: Sizes = Field(description="a list of integers or expressions, each 0 or more")
    offset: Integer = Field(0, description="an integer of 0 or more, or an expression")


class TensorsTable(Table):
    """Which tensors a table is about, and its view of each."""

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
        """The patterns of its tensors; None where it names none."""
        return self.tensors if self.regex is None else (self.regex,)

    @property
    def patterns_key(self) -> str:
        return "tensors" if self.regex is None else "regex"


class BlockTable(TensorsTable):
    """`[block.NAME]`: the blocks of every tensor that a pattern matches."""

    shape: Extents = Field(description=_SHAPE)
    optional: StrictBool = Field(False, description=_OPTIONAL)  # noqa: FBT003


class CouplingTable(Table):
    """A coupling of members, which are tables of `member_kind`, listed under `members_key`."""

    member_kind: ClassVar[str]

    orders: tuple[Order, ...] | None = Field(
        None, description="a list with one list for each member, such as [[0, 1], [1, 0]]"
    )
    across: Across = Field((), description='a list of captures such as ["layer"], or "all"')
    optional: StrictBool = Field(False, description=_OPTIONAL)  # noqa: FBT003

    @property
    def members_key(self) -> str:
        return f"{self.member_kind}s"

    @property
    def members(self) -> tuple[str, ...]:
        members: tuple[str, ...] = getattr(self, self.members_key)
        return members


class BlockCouplingTable(CouplingTable):
    """`[block_coupling.NAME]`: blocks of several tensors fused into one."""

    member_kind: ClassVar[str] = "block"

    blocks: Names = Field(description='a list of names of [block] tables, such as ["gate", "up"]')


class ScopeTable(TensorsTable, BudgetTable):
    """`[scope.NAME]`: with `tensors` the short form, whose block is a shape; else the block is a name."""

    block: StrictStr | Extents = Field(
        description="the name of a [block] or [block_coupling], or a block's shape such as [1, 1] or [1, -1]"
    )
    shape: Extents = Field(description=_SHAPE.replace("1 or more", "1 or more blocks"))
    optional: StrictBool = Field(False, description=_OPTIONAL)  # noqa: FBT003


class ScopeCouplingTable(CouplingTable, BudgetTable):
    """`[scope_coupling.NAME]`: scopes whose blocks compete for one budget."""

    member_kind: ClassVar[str] = "scope"

    scopes: Names = Field(description='a list of names of [scope] tables, such as ["attention", "mlp"]')


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
    """A spec without contradictions; problems with a checkpoint are reported under the name `source`.

    Paths in it are relative to `directory`; `covers` says which matrices it is about, one of COVERS.
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
