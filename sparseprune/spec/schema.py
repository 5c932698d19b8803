"""The tables of a spec: their keys, how each is read, what is wanted, defaults, score kinds, methods.

Owns what may be written where. A new key is one line of its table here, a new score kind one row of
SCORE_KEYS. Called by parsing.
"""

from __future__ import annotations

import sys
from math import inf, ulp
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Never, TypeVar

from msgspec import Struct

from sparseprune.spec.bound import Allocate, Reconstruct, Score, Soft
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
from sparseprune.spec.problems import listed, shown
from sparseprune.spec.structures import CAPTURES, Kind
from sparseprune.spec.structures import KINDS as STRUCTURES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


Read = TypeVar("Read")
Integer = int | Expression
Number = float | Expression
_ABOVE_ZERO = ulp(0.0)
_TAKEN = ("cls", "tensor", "pattern")  # argument names of the functions that read einops patterns


class WrongValueError(ValueError):
    """A value that a key cannot have; `args` are texts of problems, if more is known than what is wanted."""


def _plain(*kinds: type, fits: Callable[[Any], bool] = lambda _: True) -> Callable[[object], Any]:
    """A reader of values of exactly these types that fit; `true` equals 1, and is no integer."""

    def read(value: object) -> object:
        if type(value) not in kinds or not fits(value):
            raise WrongValueError
        return value

    return read


def _one_of(*values: str | int) -> Callable[[object], Any]:
    return _plain(str, int, float, fits=lambda value: value in values)


def _whole(least: int) -> Callable[[object], int]:
    return _plain(int, fits=lambda value: least <= value <= LARGEST)


def _finite(least: float = 0.0, most: float = sys.float_info.max) -> Callable[[object], float]:
    number = _plain(int, float, fits=lambda value: least <= value <= most)
    return lambda value: float(number(value))


_string, _boolean = _plain(str), _plain(bool)
_path = _plain(str, fits=lambda path: path != "" and "\0" not in path)


def _parsed(parse: Callable[[str], Read]) -> Callable[[object], Read]:
    """A reader that parses texts and keeps the parser's own error texts."""

    def read(value: object) -> Read:
        try:
            return parse(_string(value))
        except PatternError as error:
            raise WrongValueError(f'"{value}" {error}') from error
        except ExpressionError as error:
            raise WrongValueError(str(error)) from error

    return read


_expression = _parsed(parse_expression)


def _or_expression(read: Callable[[object], Read]) -> Callable[[object], Read | Expression]:
    return lambda value: _expression(value) if isinstance(value, str) else read(value)


_from_zero, _positive = _or_expression(_whole(0)), _or_expression(_whole(1))
_extent = _or_expression(_plain(int, fits=lambda size: size == -1 or 1 <= size <= LARGEST))


def _list(read: Callable[[object], Read], least: int = 0) -> Callable[[object], tuple[Read, ...]]:
    """A reader of lists with `least` items or more, with the problems of all items."""

    def read_all(value: object) -> tuple[Read, ...]:
        if not isinstance(value, list) or len(value) < least:
            raise WrongValueError
        found: list[Read] = []
        wrong: list[WrongValueError] = []
        for item in value:
            try:
                found.append(read(item))
            except WrongValueError as error:
                wrong.append(error)
        if wrong:
            raise WrongValueError(*(text for error in wrong for text in error.args))
        return tuple(found)

    return read_all


def _slice_entry(value: object) -> SliceEntry:
    single = type(value) is int and abs(value) <= LARGEST
    return _parsed(parse_slice)(str(value) if single else value)


def _axes(value: object) -> tuple[tuple[str, Integer], ...]:
    if not isinstance(value, dict):
        raise WrongValueError
    for name in value:
        if not (name.isascii() and name.isidentifier()) or name in _TAKEN:
            raise WrongValueError(f'"{name}" cannot be the name of an axis: take another one, such as q')
    return tuple((name, _positive(size)) for name, size in value.items())


def _einops(value: object) -> str:
    pattern: str = _string(value)
    if pattern.count("->") != 1:
        raise WrongValueError(f'"{value}" is no einops pattern: wanted two sides, as in "(kv q) k -> kv q k"')
    return pattern


def _patterns(value: object) -> tuple[TensorPattern, ...]:
    return _list(_parsed(parse_pattern), 1)([value] if isinstance(value, str) else value)


def _block(value: object) -> str | tuple[Integer, ...]:
    return value if isinstance(value, str) else _list(_extent)(value)


def _across(value: object) -> str | tuple[str, ...]:
    return value if value == "all" else _list(_string)(value)


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
        "router": ("norm",),
        "reap": ("file",),
    }
)


PERMUTED_SCORES = ("magnitude", "values", "wanda", "obd")  # of single elements, so that orders differ


_kind = _plain(str, fits=lambda kind: kind in SCORE_KEYS)


class Key(NamedTuple):
    """A key of a table: how its value is read, what is wanted in words, and the `table` that it may be."""

    read: Callable[[object], object]
    wanted: str
    default: object = None
    required: bool = False
    table: type[Table] | None = None


def _key(
    read: Callable[[object], object], wanted: str, default: object = None, table: type[Table] | None = None
) -> Any:  # noqa: ANN401  (the type of the attribute, which has the value once the table is read)
    return Key(read, wanted, default, table=table)


def _required(read: Callable[[object], object], wanted: str) -> Any:  # noqa: ANN401
    """A key that every table has; an empty tuple while it is missing, for further checks."""
    return Key(read, wanted, (), required=True)


class Table:
    """Any table: each of its `keys` is an attribute, with the value that was read or the default.

    Where a key in `essential` is wrong, checks cannot rely on a table inside another one.
    """

    keys: ClassVar[Mapping[str, Key]] = {}
    essential: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        every = [pair for base in reversed(cls.__mro__) for pair in vars(base).items()]
        cls.keys = {name: value for name, value in every if isinstance(value, Key)}

    def __init__(self, values: Mapping[str, object]) -> None:
        vars(self).update({name: key.default for name, key in self.keys.items()} | {**values})

    def __setattr__(self, name: str, value: object) -> Never:
        raise AttributeError(f"cannot change {name}: a table stays as it was read")

    def __iter__(self) -> Iterator[tuple[str, object]]:
        return iter(vars(self).items())


_SEVERAL = "a list of integers or expressions"
_SHAPE = f"{_SEVERAL}, one for each dimension: 1 or more, or -1 for the whole dimension"
_TENSORS = 'a pattern such as "layers.{layer}.mlp.up_proj.weight", or a list of patterns'
_PATH = "the path of a safetensors file or directory, relative to the spec"
_INPUT_DIM = "an integer: the dimension of the weight along which its input features lie"
USUAL_CLAMP = 0.1
SOFT_KEYS = ("k_weight", "scale", "conditioners", "max_iter", "atol", "eps")


_OPTIONAL: Any = _key(_boolean, "true or false: whether it may be missing in a checkpoint", default=False)


class ScoreTable(Table):
    """`[score]`, or `score = {...}` in an outermost table."""

    essential = ("kind",)

    kind: str = _key(_kind, f"one of {listed(SCORE_KEYS, 'or')}", "magnitude")
    norm: Literal[1, 2, "inf"] | None = _key(_one_of(1, 2, "inf"), '1, 2 or "inf"')
    normalize: str | None = _key(_one_of("rms"), '"rms": the root mean square of each block')
    seed: int | None = _key(_whole(0), "an integer of 0 or more")
    file: str | None = _key(_path, _PATH)
    input_dim: int | None = _key(_whole(-LARGEST), _INPUT_DIM)
    nonfinite: Literal["error", "prune"] | None = _key(
        _one_of("error", "prune"),
        '"error" or "prune": what to do with NaN and infinity among the weights and scores',
    )

    @property
    def kind_keys(self) -> tuple[str, ...]:
        """The keys that its kind takes."""
        return SCORE_KEYS[self.kind]


class ReconstructTable(Table):
    """`[reconstruct]`, or `reconstruct = {...}` in an outermost table."""

    essential = ("method",)

    method: Literal["refit", "admm", "none"] = _key(
        _one_of("refit", "admm", "none"), 'one of "refit", "admm" and "none"', "admm"
    )
    file: str | None = _key(_path, "the path of a statistics file or directory, as calibrate writes it")
    damp: float = _key(
        _finite(),
        "a number of 0 or more: how much of the mean of the Hessian's diagonal is added to it",
        0.01,
    )
    input_dim: int | None = _key(_whole(-LARGEST), _INPUT_DIM)
    metric: Literal["loss", "outputs"] | None = _key(
        _one_of("loss", "outputs"), '"loss" or "outputs": in what a change of the weights is measured'
    )
    effort: Literal["best", "fast"] = _key(
        _one_of("best", "fast"), '"best" or "fast": how long admm may look for the mask', "best"
    )
    allocate: Literal["uniform", "loss"] = _key(
        _one_of("uniform", "loss"),
        '"uniform" (every instance has the same budget) or "loss" (they share one, by what is lost)',
        "uniform",
    )
    clamp: float | None = _key(
        _finite(most=1.0),
        "a number from 0 to 1: how much more or less of an instance may go than with a uniform budget",
    )
    target: Literal["dense", "own"] = _key(
        _one_of("dense", "own"),
        '"dense" (outputs as in the dense model) or "own" (as the dense weights have them), in a sweep',
        "dense",
    )
    tune: int = _key(
        _whole(0),
        "an integer of 0 or more: how many steps each layer of a sweep is tuned once it is pruned",
        0,
    )
    optional: bool = _key(
        _boolean, "true or false: whether weights without statistics are masked alone", default=False
    )


class MethodTable(Table):
    """The keys of an outermost scope or coupling beside its budget."""

    score: ScoreTable | None = _key(
        _plain(), 'a table such as { kind = "random", seed = 1 }', table=ScoreTable
    )
    reconstruct: ReconstructTable | None = _key(
        _plain(), 'a table such as { file = "stats", method = "admm" }', table=ReconstructTable
    )
    mode: Literal["hard", "soft"] | None = _key(
        _one_of("hard", "soft"),
        '"hard" (losers become zero) or "soft" (every block shrinks by the threshold)',
    )
    k_weight: float | None = _key(
        _finite(), "a number of 0 or more: how much the first pruned score counts in the threshold"
    )
    scale: bool | None = _key(
        _boolean, "true or false: whether the threshold grows with the root of a block's size"
    )
    conditioners: str | None = _key(_path, _PATH)
    max_iter: int | None = _key(_whole(1), "an integer of 1 or more")
    atol: float | None = _key(_finite(_ABOVE_ZERO), "a number above 0")
    eps: float | None = _key(_finite(_ABOVE_ZERO), "a number above 0")


METHOD_KEYS = tuple(MethodTable.keys)


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
    if table is None or table.method == "none":
        return None
    return Reconstruct(
        None if table.file is None else _absolute(table.file, directory),
        table.method,
        table.damp,
        table.input_dim,
        table.metric,
        table.effort,
        table.optional,
        table.target,
        table.tune,
    )


def allocate_of(table: ReconstructTable | None, directory: Path, nnz: int | None) -> Allocate | None:
    """How instances share a budget that would be `nnz` for each scope; None where each has its own."""
    if table is None or table.allocate != "loss" or nnz is None:
        return None
    clamp = USUAL_CLAMP if table.clamp is None else table.clamp
    file = None if table.file is None else _absolute(table.file, directory)
    return Allocate(file, nnz, clamp, table.damp, table.input_dim)


def soft_of(table: BudgetTable, directory: Path) -> Soft | None:
    """How a rule shrinks its blocks; None in mode "hard"."""
    if table.mode != "soft":
        return None
    plain = {key: getattr(table, key) for key in SOFT_KEYS if key != "conditioners"}
    given = {key: value for key, value in plain.items() if value is not None}
    path = None if table.conditioners is None else _absolute(table.conditioners, directory)
    return Soft(conditioners=path, **given)


def _absolute(path: str, directory: Path) -> Path:
    return (directory / path).absolute()


VERSION = 1
COVERS = ("matrices", "mlp", "attention", "experts", "layers")  # which matrices a spec may be about


class BudgetTable(MethodTable):
    """What survives in each scope; an outermost table has exactly one of the first three keys."""

    nnz: Integer | None = _key(
        _from_zero,
        "an integer of 0 or more, or an expression: how many blocks survive in each scope",
    )
    sparsity: Number | None = _key(
        _or_expression(_finite(most=1.0)),
        "a number from 0 to 1, or an expression: the share of each scope's blocks to prune",
    )
    threshold: Number | None = _key(
        _or_expression(_finite()), "a number of 0 or more, or an expression: the least score that survives"
    )
    multiple_of: Integer | None = _key(
        _positive,
        "an integer of 1 or more, or an expression: the surviving blocks are rounded up to a multiple of it",
    )
    within: str | None = _key(
        _string, "the name of a [scope] or [scope_coupling]: only what that one keeps competes"
    )


BUDGETS = ("nnz", "sparsity", "threshold")


class ExplicitView(Table):
    """`view = {...}`: a view by its shape and strides, in elements of the row-major tensor."""

    essential = ("shape", "stride", "offset")

    shape: tuple[Integer, ...] = _required(_list(_extent), f"{_SEVERAL}, each 1 or more")
    stride: tuple[Integer, ...] = _required(_list(_from_zero), f"{_SEVERAL}, each 0 or more")
    offset: Integer = _key(_from_zero, "an integer of 0 or more, or an expression", 0)


class TensorsTable(Table):
    """Which tensors a table is about, and its view of each."""

    tensors: tuple[TensorPattern, ...] | None = _key(_patterns, _TENSORS)
    regex: RegexPattern | None = _key(
        _parsed(parse_regex), r"a regular expression such as 'layers\.(?P<layer>\d+)\.up\.weight'"
    )
    structure: Kind | None = _key(
        _one_of(*STRUCTURES), f"one of {listed(map(shown, STRUCTURES), 'or')}: tensors by what they are"
    )
    exclude: tuple[TensorPattern, ...] = _key(_patterns, "a pattern, or a list of patterns", ())
    where: Expression | None = _key(
        _expression, 'an expression such as "layer >= 2 and ndim == 2", which is true or false'
    )
    slice: tuple[SliceEntry, ...] | None = _key(
        _list(_slice_entry), 'a list with one text for each dimension, such as ["0:inter", ":"]'
    )
    view: str | ExplicitView | None = _key(
        _einops,
        'an einops pattern such as "(kv q) k -> kv q k", or a table with shape and stride',
        table=ExplicitView,
    )
    axes: tuple[tuple[str, Integer], ...] = _key(
        _axes, "a table of axes of the view, each an integer of 1 or more or an expression", ()
    )

    @property
    def patterns(self) -> tuple[TensorPattern | RegexPattern, ...] | None:
        """The patterns of its tensors; None where it names none."""
        return self.tensors if self.regex is None else (self.regex,)

    @property
    def patterns_key(self) -> str:
        if self.structure is not None:
            return "structure"
        return "tensors" if self.regex is None else "regex"

    @property
    def variants(self) -> frozenset[frozenset[str]]:
        """The sets of captures that its tensors may have; none where it names no tensors."""
        if self.structure is not None:
            return frozenset({frozenset(CAPTURES)})
        return frozenset(frozenset(pattern.names) for pattern in self.patterns or ())

    @property
    def sought(self) -> tuple[str, ...]:
        """Its patterns or its structure, as problems name them."""
        if self.structure is not None:
            return (f'structure "{self.structure}"',)
        return tuple(f'"{pattern.text}"' for pattern in self.patterns or ())


class BlockTable(TensorsTable):
    """`[block.NAME]`: the blocks of every tensor that a pattern matches."""

    shape: tuple[Integer, ...] = _required(_list(_extent), _SHAPE)
    optional: bool = _OPTIONAL


class CouplingTable(Table):
    """A coupling of members, which are tables of `member_kind`, listed under `members_key`."""

    member_kind: ClassVar[str]

    orders: tuple[tuple[int, ...], ...] | None = _key(
        _list(_list(_whole(0))), "a list with one list for each member, such as [[0, 1], [1, 0]]"
    )
    across: str | tuple[str, ...] = _key(_across, 'a list of captures such as ["layer"], or "all"', ())
    optional: bool = _OPTIONAL

    @property
    def members_key(self) -> str:
        return f"{self.member_kind}s"

    @property
    def members(self) -> tuple[str, ...]:
        members: tuple[str, ...] = getattr(self, self.members_key)
        return members


class BlockCouplingTable(CouplingTable):
    """`[block_coupling.NAME]`: blocks of several tensors fused into one."""

    member_kind = "block"

    blocks: tuple[str, ...] = _required(
        _list(_string, 1), 'a list of names of [block] tables, such as ["gate", "up"]'
    )


class ScopeTable(TensorsTable, BudgetTable):
    """`[scope.NAME]`: with `tensors` the short form, whose block is a shape; else the block is a name."""

    block: str | tuple[Integer, ...] = _required(
        _block, "the name of a [block] or [block_coupling], or a block's shape such as [1, 1] or [1, -1]"
    )
    shape: tuple[Integer, ...] = _required(_list(_extent), _SHAPE.replace("1 or more", "1 or more blocks"))
    optional: bool = _OPTIONAL
    permute: bool | Expression | None = _key(
        _or_expression(_boolean),
        "true, false or an expression: whether inputs change places first, where the model stays the same",
    )
    transposable: bool | Expression | None = _key(
        _or_expression(_boolean),
        "true, false or an expression: whether n of m survive along both dimensions of a matrix",
    )


class ScopeCouplingTable(CouplingTable, BudgetTable):
    """`[scope_coupling.NAME]`: scopes whose blocks compete for one budget."""

    member_kind = "scope"

    scopes: tuple[str, ...] = _required(
        _list(_string, 1), 'a list of names of [scope] tables, such as ["attention", "mlp"]'
    )


SpecTable = BlockTable | BlockCouplingTable | ScopeTable | ScopeCouplingTable
KINDS: Mapping[str, type[SpecTable]] = MappingProxyType(
    {
        "block": BlockTable,
        "block_coupling": BlockCouplingTable,
        "scope": ScopeTable,
        "scope_coupling": ScopeCouplingTable,
    }
)


class Spec(Struct, frozen=True):
    """A spec without contradictions; problems with a checkpoint are reported under the name `source`.

    `tables` are named by their places, such as "scope.proj", in the order of KINDS. Paths are relative to
    `directory`; `covers` says which matrices the spec is about, one of COVERS. Where instances share a
    budget and their parts of it are known, `allocated` has by place and label what each scope keeps.
    """

    source: str
    directory: Path
    variables: Mapping[str, Variable]
    score: ScoreTable | None
    reconstruct: ReconstructTable | None
    tables: Mapping[str, SpecTable]
    covers: str = COVERS[0]
    allocated: Mapping[str, Mapping[str, int]] = {}

    @property
    def shares(self) -> tuple[str, ...]:
        """The places of outermost tables whose instances share one budget."""
        coupled = self.coupled_scopes()
        outermost = {
            place: table.reconstruct or self.reconstruct
            for place, table in self.tables.items()
            if isinstance(table, BudgetTable) and place not in coupled
        }
        return tuple(place for place, found in outermost.items() if found and found.allocate == "loss")

    def parts(self, place: str) -> tuple[str, ...]:
        """The places of the tables that a table names: the members of a coupling, the block of a scope."""
        table = self.tables.get(place)
        if isinstance(table, CouplingTable):
            return tuple(f"{table.member_kind}.{name}" for name in table.members)
        if isinstance(table, ScopeTable) and isinstance(table.block, str):
            coupling = f"block_coupling.{table.block}"
            return (coupling if coupling in self.tables else f"block.{table.block}",)
        return ()

    def tables_in(self, place: str) -> Iterator[str]:
        """A table and all tables that it consists of, without those that are missing."""
        if place in self.tables:
            yield place
            for part in self.parts(place):
                yield from self.tables_in(part)

    def leaves(self, place: str) -> dict[str, BlockTable | ScopeTable]:
        """The tables with tensors that a table consists of, without those that are missing."""
        found = ((each, self.tables[each]) for each in self.tables_in(place) if not self.parts(each))
        return {each: table for each, table in found if isinstance(table, BlockTable | ScopeTable)}

    def outer(self, place: str) -> str | None:
        """The place of the scope or coupling that a rule is within; None of one that is within none."""
        name = getattr(self.tables[place], "within", None)
        if name is None:
            return None
        coupling = f"scope_coupling.{name}"
        return coupling if coupling in self.tables else f"scope.{name}"

    def nested(self) -> dict[str, str]:
        """For every rule that is within another one, the place of that one, by place."""
        found = {place: self.outer(place) for place in self.tables}
        return {place: outer for place, outer in found.items() if outer is not None}

    def coupled_scopes(self) -> dict[str, str]:
        """For every scope that is a member of a scope coupling, the (last) one that names it, by place."""
        couplings = [place for place, table in self.tables.items() if isinstance(table, ScopeCouplingTable)]
        return {scope: place for place in couplings for scope in self.parts(place)}
