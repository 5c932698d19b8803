"""Coverage: which share of the layers' matrices the rules of a spec reach, and what is no success in it.

Owns which tensors are matrices of layers, which of them are of MLPs, attention and experts, and when a spec
that binds is still no success. Looks at names, shapes and bound rules; reads no data. Called by the commands
that take a spec.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sparseprune.checkpoint.codes import names_beside
from sparseprune.engine.grids import prod
from sparseprune.report.wording import many, percent
from sparseprune.results.fields import Uncovered
from sparseprune.spec import BoundBlockCoupling
from sparseprune.spec.naming import HEAD_NORMS, MEMBER, SPECULATIVE
from sparseprune.spec.structures import is_layer_matrix, is_matrix_shape, routed_modules

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.results.checking import VerifyTotals
    from sparseprune.results.listing import SpecCoverage
    from sparseprune.results.pruning import PlanTotals, RemovalTotals, ReportTotals
    from sparseprune.spec import BoundBlock, BoundInstance, BoundRule, BoundSpec

    Tensors = Mapping[str, StoredTensor]

ENOUGH = 0.9  # the share of what a spec is about under which a run is warned of
_LISTED, _SHOWN = 10, 2  # kinds that are left out: so many in a document, so many in a line

# Words that tell what a matrix of a layer is, by pieces between dots. The last piece that tells decides. They
# are not the naming schemes by which structures are found, so that they can tell what these miss.
_EXPERTS = re.compile(r"^experts$|moe$", re.IGNORECASE)
_SHARED = re.compile(r"shared", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|expert|moe$|DenseReluDense|^ff\d*$", re.IGNORECASE)
_OTHER = re.compile(r"mixer|mamba|ssm|^conv$", re.IGNORECASE)
# Of layers that have their matrices without a module for MLP or attention.
_ATTENTION_MATRIX = re.compile(
    r"^([qkvo]|out|qkv|kv)_proj$|^[qkvo]_lin$|^Wqkv$|^c_attn$|^query_key_value$|^(query|key|value)$"
)
_MLP_MATRIX = re.compile(
    r"^(gate|up|down|gate_up)(_proj)?$|^fc\d*$|^fc_(in|out)$|^c_fc$|^w[123]$|^wi(_\d)?$|^wo$|^lin[12]$"
    r"|^dense_(h_to_4h|4h_to_h)$|^intermediate$|^output$"
)
_NUMBERED_LAYER = re.compile(r"(?:(?:model|language_model|transformer)\.)*(?:layers|h)\.([0-9]+)\.")

_WORDS = {
    "matrices": "the layers' matrices",
    "mlp": "the MLP matrices",
    "attention": "the attention matrices",
    "experts": "the expert matrices",
    "layers": "those of the lists of layers that they reach",
}


class Coverage(Struct, frozen=True):
    """Shares of elements that rules reach, None where there are no such matrices.

    `layer_coverage` is of all matrices of layers, `declared_coverage` of those that the spec covers; without
    any of these the first one counts. `uncovered` are the kinds that rules miss in part: first those that the
    spec covers, the largest first. `reached` counts all elements that rules reach, of `numel` in the
    checkpoint; `flaws` are lines about rules.
    """

    covers: str
    layer_coverage: float | None
    declared_coverage: float | None
    uncovered: tuple[Uncovered, ...]
    reached: int
    numel: int
    flaws: tuple[str, ...] = ()

    @property
    def share(self) -> float | None:
        """Of what the spec covers, or else of all matrices."""
        return self.layer_coverage if self.declared_coverage is None else self.declared_coverage

    def warnings(self, what: str = "the rules reach") -> tuple[str, ...]:
        """What a user should know before a run: that rules reach too little, and the flaws."""
        if self.share is None or self.share >= ENOUGH:
            return self.flaws
        return f"{what} only {coverage_text(self)}", *self.flaws


@dataclass(slots=True)
class _Kind:
    """Matrices whose names differ in numbers alone: elements, those reached, matrices not reached in full."""

    name: str
    numel: int = 0
    reached: int = 0
    missed: int = 0


def coverage_of(tensors: Tensors, bound: BoundSpec, config: Mapping[str, Any] | None = None) -> Coverage:
    """What the rules of a spec reach in a checkpoint with this config.json."""
    reached = _reached(bound)
    shapes = [stored.entry.shape for stored in tensors.values()]
    beside = names_beside(tensors)
    names = [name for name in tensors if name not in beside] if beside else list(tensors)
    kinds = _kinds(names, [tensors[name].entry.shape for name in names] if beside else shapes, reached)
    about = {kind.name for kind in _about(kinds, bound.covers)}
    missed = [kind for kind in kinds if kind.missed]
    missed.sort(key=lambda kind: (kind.name not in about, kind.reached - kind.numel))
    return Coverage(
        bound.covers,
        _share(kinds),
        _share([kind for kind in kinds if kind.name in about]),
        tuple(Uncovered(name=one.name, tensors=one.missed, numel=one.numel - one.reached) for one in missed),
        sum(reached.values()),
        sum(prod(shape) * count for shape, count in Counter(shapes).items()),
        (*_flaws(tensors, bound.rules, kinds, config or {}), *idle_lines(bound.rules)),
    )


def coverage_totals(coverage: Coverage | None) -> dict[str, Any]:
    """The fields of coverage in the totals of a result; None where no spec tells what was reached."""
    return {
        "covers": coverage and coverage.covers,
        "layer_coverage": coverage and coverage.layer_coverage,
        "declared_coverage": coverage and coverage.declared_coverage,
        "uncovered": coverage.uncovered[:_LISTED] if coverage else (),
    }


def coverage_text(
    found: Coverage | ReportTotals | RemovalTotals | PlanTotals | VerifyTotals | SpecCoverage,
) -> str | None:
    """The shares and the largest kinds that rules miss; None where there are no matrices."""
    if found.layer_coverage is None:
        return None
    text = f"{percent(found.layer_coverage)} of {_WORDS['matrices']}"
    if found.covers and found.covers != "matrices" and found.declared_coverage is not None:
        text += f", {percent(found.declared_coverage)} of {_WORDS[found.covers]}"
    if not found.uncovered:
        return text
    first, *others = found.uncovered[: _SHOWN + 1]
    missed = [f"{many(first.numel, 'parameter')} of {first.name}"]
    missed += [f"{kind.numel:,} of {kind.name}" for kind in others[: _SHOWN - 1]]
    return f"{text}; not reached: {', '.join(missed)}{' and more' if len(others) == _SHOWN else ''}"


def _reached(bound: BoundSpec) -> dict[str, int]:
    """Elements of each tensor that rules reach; of nested ones those of the level that reaches the most."""
    of_level: dict[tuple[str, int], Counter[str]] = {}
    for rule in bound.rules:
        outermost, *inner = bound.levels(rule.name)
        leaves = Counter(
            (leaf.tensor, leaf.view_shape) for one in rule.instances for leaf in one.scope.leaves
        )
        found = of_level.setdefault((outermost, len(inner)), Counter())
        for (name, shape), count in leaves.items():
            found[name] += prod(shape) * count
    of_nest: dict[str, Counter[str]] = {}
    for (outermost, _), found in of_level.items():
        of_nest[outermost] = of_nest.get(outermost, Counter()) | found
    return sum(of_nest.values(), Counter())


def _kinds(names: Sequence[str], shapes: Sequence[Shape], reached: Mapping[str, int]) -> list[_Kind]:
    """The matrices of layers, kind by kind; of tens of thousands of tensors those that are alike are one."""
    starred = [MEMBER.sub("*", name) for name in names]
    parts = [reached.get(name, 0) for name in names]
    kinds: dict[str, _Kind] = {}
    for (key, shape, part), count in Counter(zip(starred, shapes, parts, strict=True)).items():
        if not is_matrix_shape(shape):
            continue
        kind = kinds.setdefault(key, _Kind(key))
        numel = prod(shape)
        kind.numel += numel * count
        kind.reached += part * count
        kind.missed += count if part < numel else 0
    routed = routed_modules(kind.name for kind in kinds.values())
    return [kind for kind in kinds.values() if is_layer_matrix(kind.name, routed)]


def matrix_kind(name: str) -> str:
    """Which part of a layer a matrix is of: "attention", "mlp", "experts" (which are MLPs) or "other".

    >>> matrix_kind("layers.*.self_attn.o_proj.weight"), matrix_kind("encoder.layer.*.output.dense.weight")
    ('attention', 'mlp')
    >>> matrix_kind("layers.*.mlp.experts.gate_up_proj"), matrix_kind("layers.*.mlp.shared_expert.up.weight")
    ('experts', 'mlp')
    """
    pieces = name.split(".")
    pieces = pieces[max(0, pieces.index("*") - 1) :]  # before the layers stand names of models
    experts = any(map(_EXPERTS.search, pieces)) and not any(map(_SHARED.search, pieces))
    for piece in reversed(pieces):
        if _ATTENTION.search(piece):
            return "attention"
        if _MLP.search(piece):
            return "experts" if experts else "mlp"
    for piece in () if any(map(_OTHER.search, pieces)) else reversed(pieces):
        if _ATTENTION_MATRIX.search(piece):
            return "attention"
        if _MLP_MATRIX.search(piece):
            return "mlp"
    return "other"


def _about(kinds: Sequence[_Kind], covers: str) -> Sequence[_Kind]:
    if covers == "layers":  # of the same lists of layers: all before the first number
        lists = {kind.name.partition(".*.")[0] for kind in kinds if kind.reached}
        return [kind for kind in kinds if kind.name.partition(".*.")[0] in lists]
    if covers == "matrices":
        return kinds
    sorts = {"mlp", "experts"} if covers == "mlp" else {covers}
    return [kind for kind in kinds if matrix_kind(kind.name) in sorts]


def _share(kinds: Sequence[_Kind]) -> float | None:
    numel = sum(kind.numel for kind in kinds)
    return sum(kind.reached for kind in kinds) / numel if numel else None


def _flaws(
    tensors: Tensors, rules: Sequence[BoundRule], kinds: Iterable[_Kind], config: Mapping[str, Any]
) -> Iterator[str]:
    """What a user would call wrong in what rules bind, a line for each rule and flaw."""
    for rule in rules:
        yield from _half_structures(rule, tensors)
    has_layers = any(not SPECULATIVE.search(kind.name) for kind in kinds)
    count = _layer_count(config)
    for rule in rules if has_layers else ():
        names = (leaf.tensor for instance in rule.instances for leaf in instance.scope.leaves)
        if rule.instances and all(_is_speculative(name, count) for name in names):
            example = rule.instances[0].scope.leaves[0].tensor
            yield f"{rule.name} binds only a speculative head, such as {example}"


def _layer_count(config: Mapping[str, Any]) -> int | None:
    nested = config.get("text_config")
    for section in (config, nested if isinstance(nested, dict) else {}):
        count = section.get("num_hidden_layers")
        if isinstance(count, int) and count > 0:
            return count
    return None


def _is_speculative(name: str, count: int | None) -> bool:
    """Whether a tensor is of a head that guesses tokens ahead: by its name, or of a layer beyond `count`."""
    numbered = None if count is None else _NUMBERED_LAYER.match(name)
    beyond = count is not None and numbered is not None and int(numbered[1]) >= count
    return beyond or SPECULATIVE.search(name) is not None


def _half_structures(rule: BoundRule, tensors: Tensors) -> Iterator[str]:
    """The first coupling of a rule that has columns without rows, and the first that cuts heads in two."""
    known: set[object] = set()
    found: dict[str, str] = {}
    for block in _couplings(rule):
        # Of thousands of experts one is enough; heads may differ from layer to layer.
        build = tuple([leaf.shape for leaf in block.members])
        if build in known and not _ATTENTION.search(block.members[0].tensor):
            continue
        known.add(build)
        leaves = [(leaf, *side_of(leaf, tensors[leaf.tensor].shape)) for leaf in block.members]
        sides = {side: leaf for leaf, side, _ in leaves}
        if "columns" in sides and "rows" not in sides:
            text = f"binds columns of {sides['columns'].tensor} without the rows that feed them"
            found.setdefault("half", f"{rule.name} prunes half a structure: it {text}")
        for leaf, side, indices in leaves:
            size = _head_size(leaf, side, tensors)
            if size and indices % size:
                text = f"its blocks have {indices} {side} of {leaf.tensor}, a head has {size}"
                found.setdefault("heads", f"{rule.name} prunes parts of heads: {text}")
    yield from found.values()


def _couplings(rule: BoundRule) -> Iterator[BoundBlockCoupling]:
    """The fused blocks of a rule; its instances are all of one build."""
    for instance in rule.instances:
        members = [member.block for member in instance.scope.members]
        fused = [block for block in members if isinstance(block, BoundBlockCoupling)]
        if not fused:
            return
        yield from fused


def side_of(leaf: BoundBlock, shape: Shape) -> tuple[str, int]:
    """Whether blocks are whole "rows" or whole "columns" of a matrix, and how many; ("", 0) where neither.

    >>> from sparseprune.spec import BoundBlock
    >>> side_of(BoundBlock("w", "w", (8, 6), (6, 1), 0, (2, 6)), (8, 6))
    ('rows', 2)
    """
    if len(shape) != 2:
        return "", 0
    rows = prod([size for size, step in zip(leaf.shape, leaf.view_stride, strict=True) if step >= shape[1]])
    columns = prod([size for size, step in zip(leaf.shape, leaf.view_stride, strict=True) if step < shape[1]])
    if columns == shape[1] and rows < shape[0]:
        return "rows", rows
    if rows == shape[0] and columns < shape[1]:
        return "columns", columns
    return "", 0


_OF_HEADS = ("q_proj", "k_proj", "v_proj")  # they write heads: of a hidden channel they have a column


def _head_size(leaf: BoundBlock, side: str, tensors: Tensors) -> int | None:
    """How many rows or columns of a matrix a head has, as the width of a norm of heads beside it tells."""
    module, _, name = leaf.tensor.rpartition(".")[0].rpartition(".")
    if side != ("rows" if name in _OF_HEADS else "columns") or not _ATTENTION.search(
        module.rpartition(".")[2]
    ):
        return None
    for each in HEAD_NORMS:
        norm, query = tensors.get(f"{module}.{each}.weight"), tensors.get(f"{module}.q_proj.weight")
        if norm is not None and len(norm.shape) == 1:
            # A norm that is as wide as all heads together says nothing of one.
            return norm.shape[0] if query is None or norm.shape[0] < query.shape[0] else None
    return None


def idle_lines(rules: Iterable[BoundRule]) -> Iterator[str]:
    """A line for each rule whose budgets let every block survive: why that is, and what would prune."""
    for rule in rules:
        if rule.instances and all(map(_keeps_all, rule.instances)):
            yield f"{rule.name} prunes nothing: {_why_idle(rule)}"


def unpruned_lines(rules: Iterable[BoundRule], pruned: Mapping[str, int]) -> Iterator[str]:
    """A line for each rule that pruned no element although its budget is not all; known after a run."""
    for rule in rules:
        if rule.instances and not pruned.get(rule.name) and not all(map(_keeps_all, rule.instances)):
            limits = [instance.budget.threshold for instance in rule.instances]
            known = sorted({limit for limit in limits if limit is not None})
            least = " to ".join(f"{limit:g}" for limit in dict.fromkeys([*known[:1], *known[-1:]]))
            why = f"no block scores less than the threshold {least}" if known else "it reaches no elements"
            yield f"{rule.name} prunes nothing: {why}"


def _keeps_all(instance: BoundInstance) -> bool:
    nnz = instance.budget.nnz
    return nnz is not None and nnz >= instance.scope.blocks_per_scope


def _why_idle(rule: BoundRule) -> str:
    """Of the instance that needs the least to prune: how its budget came to all, and what would not."""
    filled = [instance for instance in rule.instances if prod(instance.scope.grid_shape)]
    if not filled:
        return "it reaches no elements"
    instance = min(filled, key=_least_share)
    blocks, unit = instance.scope.blocks_per_scope, instance.budget.multiple_of
    kept = f"it keeps {blocks:,} of {many(blocks, 'block')} in each scope"
    rounded = f" and multiple_of {unit}" if unit > 1 else ""
    if instance.sparsity is None:
        most = (blocks - 1) // unit * unit
        return f"{kept}: nnz{rounded or f' {blocks:,}'} let all survive; nnz {most:,} or less prunes"
    least = math.ceil(_least_share(instance) * 10000) / 10000
    asked = f"sparsity {instance.sparsity:g} of {blocks:,}{rounded}"
    return f"{kept}: {asked} {'round' if rounded else 'rounds'} to none; {least:g} or more prunes"


def _least_share(instance: BoundInstance) -> float:
    """The share of its blocks that goes when as few go as the budget's rounding allows."""
    blocks, unit = instance.scope.blocks_per_scope, instance.budget.multiple_of
    return 1 - (blocks - 1) // unit * unit / blocks
