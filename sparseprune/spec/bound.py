"""A spec bound to a checkpoint: plain, frozen data with every shape resolved.

The border between `spec` and the planning of work. Strides and offsets count elements of the contiguous
row-major tensor; no shape has a -1. Knows neither TOML nor files nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.engine.grids import Shape, divide, identity_order, permute, prod, surviving

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

Captures = tuple[tuple[str, int | str], ...]
"""The captures of a pattern, in order of first appearance; text that is all digits is an int."""


class TensorInfo(Struct, frozen=True):
    """One tensor of a checkpoint's header; `dtype` is the safetensors name.

    `codes`: elements are codes of which the dtype does not say what can be done with them.
    """

    name: str
    dtype: str
    shape: Shape
    codes: bool = False


class BoundBlock(Struct, frozen=True):
    """A grid of blocks in a view of one tensor; every extent of `shape` divides that of the view.

    >>> BoundBlock("w", "w", (8, 6), (6, 1), 0, (4, 2)).grid_shape
    (2, 3)
    """

    label: str
    tensor: str
    view_shape: Shape
    view_stride: Shape
    view_offset: int
    shape: Shape

    @property
    def grid_shape(self) -> Shape:
        return divide(self.view_shape, self.shape)

    @property
    def numel_per_block(self) -> int:
        return prod(self.shape)

    @property
    def leaves(self) -> tuple[BoundBlock, ...]:
        return (self,)


class BoundBlockCoupling(Struct, frozen=True):
    """Blocks fused over tensors: `common[d] == members[i].grid_shape[orders[i][d]]` for every member."""

    label: str
    members: tuple[BoundBlock, ...]
    orders: tuple[Shape, ...]

    @property
    def grid_shape(self) -> Shape:
        return permute(self.members[0].grid_shape, self.orders[0])

    @property
    def numel_per_block(self) -> int:
        return sum(member.numel_per_block for member in self.members)

    @property
    def leaves(self) -> tuple[BoundBlock, ...]:
        return self.members


class BoundScope(Struct, frozen=True):
    """Scopes of `shape` blocks each over one block grid; `grid_shape` counts scopes.

    As a coupling it is its only member. `transposable`: scopes are square tiles, each row and column of which
    keeps as many.
    """

    label: str
    block: BoundBlock | BoundBlockCoupling
    shape: Shape
    transposable: bool = False

    @property
    def grid_shape(self) -> Shape:
        return divide(self.block.grid_shape, self.shape, "scope", "block grid")

    @property
    def members(self) -> tuple[BoundScope, ...]:
        return (self,)

    @property
    def orders(self) -> tuple[Shape, ...]:
        return (identity_order(len(self.shape)),)

    @property
    def blocks_per_scope(self) -> int:
        return prod(self.shape)

    @property
    def leaves(self) -> tuple[BoundBlock, ...]:
        return self.block.leaves


class BoundScopeCoupling(Struct, frozen=True):
    """Scopes that compete: one scope of each member, aligned by `orders`, shares one budget."""

    label: str
    members: tuple[BoundScope, ...]
    orders: tuple[Shape, ...]

    @property
    def grid_shape(self) -> Shape:
        return permute(self.members[0].grid_shape, self.orders[0])

    @property
    def blocks_per_scope(self) -> int:
        return sum(member.blocks_per_scope for member in self.members)

    @property
    def leaves(self) -> tuple[BoundBlock, ...]:
        return tuple(leaf for member in self.members for leaf in member.leaves)


@dataclass(frozen=True, slots=True)
class Budget:
    """The blocks that survive in each scope: `nnz` of them, or all that score `threshold` or more.

    Exactly one of the two is set; `nnz` is already rounded up to a multiple of `multiple_of`, or all blocks.
    Of a rule within another one `nnz` is the most that survive: all that are left in a scope, where these are
    fewer. With a `share`, that share of what is left in each scope goes, rounded the same way.
    """

    nnz: int | None = None
    threshold: float | None = None
    multiple_of: int = field(default=1, compare=False)
    share: float | None = None


class Score(Struct, frozen=True):
    """The score that ranks the blocks of a rule; `file` is absolute.

    Keys that do not apply to the kind keep their defaults (the keys of each kind: SCORE_KEYS in schema.py).
    `nonfinite`: NaN and infinity are errors, or rank below all other scores. `normalize`: root mean square.
    `input_dim`: the dimension of the weight along which inputs lie; None: as the file says, else the last.
    """

    kind: str = "magnitude"
    norm: float = 2.0
    normalize: bool = False
    seed: int = 0
    file: Path | None = None
    input_dim: int | None = None
    nonfinite: Literal["error", "prune"] = "error"


class Soft(Struct, frozen=True):
    """How blocks are shrunk towards zero; with a budget of `nnz`, the threshold is `kth_mid`."""

    k_weight: float = 1.0
    scale: bool = False
    conditioners: Path | None = None
    max_iter: int = 20
    atol: float = 1e-8
    eps: float | None = None


Metric = Literal["loss", "outputs"]
"""In what a change of weights is measured: what the loss becomes worse by, or what outputs change by."""


class Reconstruct(Struct, frozen=True):
    """How surviving weights are reconstructed from the second moments in `file`, which is absolute.

    "refit": for the mask that the score gives; "admm": mask and weights together. `input_dim` is the
    dimension of the weights along which inputs lie, None for what the file says. `metric` None: the loss
    where the file has gradients of all matrices that are solved together, else the outputs. `file` is None
    where the spec names none. `optional`: weights without statistics keep the bits of their survivors.
    `target`: where inputs are those of the pruned model, the outputs are to be those of the dense model, or
    those that the dense weights have of their own inputs. `tune`: once a layer is pruned its survivors take
    so many steps towards the outputs that it has in the dense model.
    """

    file: Path | None
    method: Literal["refit", "admm"] = "admm"
    damp: float = 0.01
    input_dim: int | None = None
    metric: Metric | None = None
    effort: Literal["best", "fast"] = "best"
    optional: bool = False
    target: Literal["dense", "own"] = "dense"
    tune: int = 0


class Allocate(Struct, frozen=True):
    """How the instances of a rule share one budget: by the loss, which the second moments in `file` tell.

    Without it each scope would keep `nnz` blocks; with it the share that goes of an instance is at most
    `clamp` more or less than that. `decided`: the instance's budget is its part of the common one; until then
    it is `nnz`. `file` is absolute, None where neither spec nor command names one; `input_dim` as in
    `Reconstruct`.
    """

    file: Path | None
    nnz: int
    clamp: float = 0.1
    damp: float = 0.01
    input_dim: int | None = None
    decided: bool = False


class BoundInstance(Struct, frozen=True):
    """One instance of a rule, an outermost scope or coupling; `sparsity` is the one that was asked for.

    Instances of one `form` differ only in captures, labels and tensor names: shapes, dtypes, views, orders,
    budget and method are equal. A form belongs to one rule of a spec. `permute`: its tensors' inputs change
    places first, where that leaves the model as it is. `within`: the outer rule, such as "scope.coarse": its
    blocks compete among what that one keeps.
    """

    label: str
    captures: Captures
    scope: BoundScope | BoundScopeCoupling
    budget: Budget
    sparsity: float | None = None
    score: Score = Score()
    soft: Soft | None = None
    reconstruct: Reconstruct | None = None
    allocate: Allocate | None = None
    form: int = 0
    permute: bool = False
    within: str | None = None

    @property
    def kept_range(self) -> tuple[int, int] | None:
        """Of an instance that shares a budget, how many blocks of a scope survive at least and at most."""
        shared, blocks, unit = self.allocate, self.scope.blocks_per_scope, self.budget.multiple_of
        if shared is None:
            return None
        room = blocks - surviving(shared.clamp, blocks)
        least = min(shared.nnz, -(-max(0, shared.nnz - room) // unit) * unit)
        most = max(shared.nnz, (shared.nnz + room) // unit * unit)
        return least, blocks if shared.nnz + room >= blocks else most


class BoundRule(Struct, frozen=True):
    """All instances of one outermost table, named as in the spec (`scope.proj`)."""

    name: str
    instances: tuple[BoundInstance, ...]

    @property
    def within(self) -> str | None:
        """The name of the rule that it is within; None of one that is within none."""
        return self.instances[0].within if self.instances else None

    def forms(self) -> dict[int, list[BoundInstance]]:
        """The instances by form, in order; the way and the cost of one hold for all others of its form."""
        members: dict[int, list[BoundInstance]] = {}
        for instance in self.instances:
            members.setdefault(instance.form, []).append(instance)
        return members


def levels_of(name: str, outer: Mapping[str, str | None]) -> tuple[str, ...]:
    """The names of the rules that a rule is within, outermost first, and its own; `outer` has that of each.

    >>> levels_of("fine", {"fine": "middle", "middle": "coarse", "coarse": None})
    ('coarse', 'middle', 'fine')
    """
    names = [name]
    while (found := outer.get(names[-1])) is not None:
        names.append(found)
    return tuple(reversed(names))


class BoundSpec(Struct, frozen=True):
    """Every rule of a spec, bound; no element of any tensor belongs to two instances, but of nested rules.

    `covers` says which matrices it is about: "matrices" (all), "mlp", "attention", "experts", "layers".
    """

    rules: tuple[BoundRule, ...]
    covers: str = "matrices"

    def instances(self) -> Iterator[tuple[BoundRule, BoundInstance]]:
        """Every instance with its rule, in the order of the spec and of the captures."""
        return ((rule, instance) for rule in self.rules for instance in rule.instances)

    def levels(self, name: str) -> tuple[str, ...]:
        """The names of the rules that a rule is within, outermost first, and its own."""
        return levels_of(name, {rule.name: rule.within for rule in self.rules})

    @property
    def outermost(self) -> BoundSpec:
        """The rules that are within none."""
        return replace(self, rules=tuple([rule for rule in self.rules if rule.within is None]))

    @property
    def outer(self) -> frozenset[str]:
        """The names of the rules that others are within."""
        return frozenset(rule.within for rule in self.rules if rule.within is not None)

    @property
    def covered(self) -> tuple[str, ...]:
        """The tensors that some rule reaches, each once, in the order of the rules."""
        leaves = (leaf.tensor for _, instance in self.instances() for leaf in instance.scope.leaves)
        return tuple(dict.fromkeys(leaves))
