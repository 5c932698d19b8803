"""Streamed: scopes that do not fit in memory, of blocks that do, in the torch engine.

Blocks pass by in tiles and are ranked anew each time. What survives is found by digits of (key, index): the
index, counted down, behind the key makes every rank unlike every other, so that ties need no care of their
own. As soon as few enough candidates are left they are collected and sorted. Imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparseprune.engine.block import zero_pruned
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.execution.cells import Part, block_part, members_of, tiles
from sparseprune.execution.plan import task_bytes
from sparseprune.execution.programs import Item, Program
from sparseprune.execution.ranking import Ranking
from sparseprune.execution.tensors import build_scope, element_values, load_tile, store_tile, stream_of
from sparseprune.execution.tiled import block_scores, shrink
from sparseprune.spec import BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from sparseprune.engine import SparseScope
    from sparseprune.execution.outcomes import Outcome
    from sparseprune.execution.plan import Task
    from sparseprune.execution.programs import Setting
    from sparseprune.execution.recipes import Streamed
    from sparseprune.execution.tensors import Tile

    Keys = NDArray[np.uint64]

_DIGIT = 16
_LAST = (1 << _DIGIT) - 1
_SIGN = 1 << 63
_CANDIDATE_BYTES = 48
_GROUPS = 16  # of places whose digits are counted together


@dataclass(frozen=True, slots=True)
class Place:
    """Blocks of one scope that pass by together: a part of a member's block grid.

    `origin` is where the scope begins on that grid; `before` counts the scope's blocks of earlier members.
    """

    member: BoundScope
    part: Part
    origin: tuple[int, ...]
    before: int

    def countdown(self, blocks: int) -> Keys:
        """For each block, row-major in the part, how many blocks of the scope come behind it."""
        shape = self.member.shape
        index = np.full((1,) * len(shape), self.before, dtype=np.int64)
        for dim, (begin, size) in enumerate(
            zip(self.part.within(self.origin).begin, self.part.extent, strict=True)
        ):
            steps = np.arange(begin, begin + size, dtype=np.int64) * prod(shape[dim + 1 :])
            index = index + steps.reshape([-1 if other == dim else 1 for other in range(len(shape))])
        return (blocks - 1 - index.reshape(-1)).astype(np.uint64)


def run_program(task: Task, recipe: Streamed, setting: Setting) -> Program:
    """For each scope steps that search, in the end one that cuts or shrinks all of them."""
    scope, budget = task.instance.scope, task.instance.budget
    if budget.nnz is None:
        raise TypeError(f"{task.instance.label}: a threshold asks every block by itself")
    work = _Work(task, recipe, setting)
    decisions: list[Any] = []
    for number in range(prod(scope.grid_shape)):
        key = f"decision {number}"
        decision = setting.recall(key)
        if not work.decides(decision):
            decision = yield from (
                work.threshold(number) if task.instance.soft else work.cut(number, budget.nnz)
            )
            passed = (recipe.passes - 1) * task_bytes(task, setting.tensors) // prod(scope.grid_shape)
            setting.note(key, decision, passed)
        decisions.append(decision)

    def items() -> Iterator[Item]:
        count = 0
        for number, decision in enumerate(decisions):
            for place in work.places(number):
                act = lambda place=place, decision=decision: work.prune(place, decision)  # noqa: E731
                yield Item(act, work.nbytes(place), recipe.memory, str(count))
                count += 1

    yield items()


class _Work:
    """What the steps of one task share."""

    def __init__(self, task: Task, recipe: Streamed, setting: Setting) -> None:
        self._task = task
        self._recipe = recipe
        self._setting = setting
        self._ranking = Ranking(task, setting.traffic)
        self._blocks = task.instance.scope.blocks_per_scope
        self._width = _exact_width(task, setting)

    def places(self, number: int) -> Iterator[Place]:
        """The blocks of one scope, member after member."""
        scope = self._task.instance.scope
        coordinate = tuple(int(index) for index in np.unravel_index(number, scope.grid_shape or (1,)))
        cell = Part(coordinate[: len(scope.grid_shape)], (1,) * len(scope.grid_shape))
        before = 0
        for member, order in members_of(scope):
            whole = block_part(member, order, cell)
            for part in tiles(member, whole, self._recipe.tile):
                yield Place(member, part, whole.begin, before)
            before += member.blocks_per_scope

    def nbytes(self, place: Place) -> int:
        """The input that a place reads, about: all of it counted in the widest dtype."""
        block = place.member.block
        sizes = [DTYPES[self._setting.tensors[leaf.tensor].dtype].bits // 8 for leaf in block.leaves]
        return place.part.numel * block.numel_per_block * max(sizes)

    def cut(self, number: int, nnz: int) -> Any:  # noqa: ANN401  (a part of a program)
        """The rank of the last block that survives, as [key, countdown]; [] for none, "all" for all."""
        if nnz in (0, self._blocks):
            return "all" if nnz else []
        return list((yield from self._search(number, nnz)))

    def threshold(self, number: int) -> Any:  # noqa: ANN401  (a part of a program)
        """The soft threshold of a scope: `kth_mid` of its norms, as hexadecimal text."""
        soft, nnz = self._task.instance.soft, self._task.instance.budget.nnz
        if soft is None or nnz is None:
            raise TypeError("a soft threshold needs a budget")
        kth = yield from self._norm(number, nnz)
        if soft.k_weight:
            following = yield from self._norm(number, nnz + 1)
            kth = (kth + soft.k_weight * following) / (1 + soft.k_weight)
        return kth.hex()

    def decides(self, noted: Any) -> bool:  # noqa: ANN401
        """Whether it is what `cut` or `threshold` gives."""
        if self._task.instance.soft is not None:
            try:
                return isinstance(noted, str) and float.fromhex(noted) >= 0
            except (ValueError, OverflowError):
                return False
        if noted in ([], "all"):
            return True
        return (
            isinstance(noted, list)
            and len(noted) == 2
            and all(type(one) is int and 0 <= one < 1 << 64 for one in noted)
        )

    def prune(self, place: Place, decision: Any) -> list[Outcome]:  # noqa: ANN401
        """Cut or shrink the blocks of a place, and write them."""
        with stream_of(self._setting.device):
            tile, engine = self._loaded(place)
            if self._task.instance.soft is not None:
                element_values(engine, tile, self._ranking)
                masks = shrink(engine, self._task, tile, self._ranking, float.fromhex(decision))
            else:
                kept = self._kept(place, engine, tile, decision)
                scopes = torch.from_numpy(kept).to(self._setting.device).reshape(*engine.grid_shape, -1)
                masks = engine.get_masks(0, block_mask=scopes)
                zero_pruned(masks)
            by_leaf = dict(zip(tile.loaded, (masks[spec] for spec in engine.blocks()), strict=True))
            return store_tile(self._task, tile, by_leaf, self._setting)

    def _kept(self, place: Place, engine: SparseScope, tile: Tile, decision: Any) -> NDArray[np.bool_]:  # noqa: ANN401
        if decision in ([], "all"):
            return np.full(place.part.numel, bool(decision))
        key, countdown = decision
        keys = self._keys(place, engine, tile)
        last = place.countdown(self._blocks) >= np.uint64(countdown)
        kept: NDArray[np.bool_] = (keys > key) | ((keys == np.uint64(key)) & last)
        return kept

    def _norm(self, number: int, k: int) -> Any:  # noqa: ANN401  (a part of a program)
        """The k-th largest norm; infinity before the first, 0 behind the last."""
        if not 1 <= k <= self._blocks:
            return 0.0 if k else float("inf")
        key, _ = yield from self._search(number, k)
        return float(np.array([key ^ _SIGN], dtype=np.uint64).view(np.float64)[0])

    def _search(self, number: int, k: int) -> Any:  # noqa: ANN401  (a part of a program)
        """The k-th largest rank of a scope, digit by digit, until the candidates fit in memory."""
        places = list(self.places(number))
        bounds = [len(places) * group // _GROUPS for group in range(_GROUPS + 1)]
        groups = [places[begin:end] for begin, end in pairwise(bounds) if end > begin]
        most = self._recipe.held // _CANDIDATE_BYTES
        ranks: list[tuple[int, int]] = [(0, shift) for shift in _shifts(self._width or 64)]
        ranks += [(1, shift) for shift in _shifts(self._blocks.bit_length())]
        prefix = [0, 0]
        for part, shift in ranks:
            counts = yield [
                Item(self._counter(group, part, shift, tuple(prefix)), memory=self._recipe.memory)
                for group in groups
            ]
            at_least = np.cumsum(sum(counts)[::-1])
            behind = int(np.searchsorted(at_least, k))
            k -= int(at_least[behind - 1]) if behind else 0
            prefix[part] |= (_LAST - behind) << shift
            if int(at_least[behind]) - (int(at_least[behind - 1]) if behind else 0) <= most:
                found = yield [
                    Item(self._collector(group, part, shift, tuple(prefix)), memory=self._recipe.memory)
                    for group in groups
                ]
                keys = np.concatenate([one[0] for one in found])
                countdown = np.concatenate([one[1] for one in found])
                chosen = np.lexsort((countdown, keys))[-k]
                return int(keys[chosen]), int(countdown[chosen])
        return prefix[0], prefix[1]

    def _counter(self, group: Sequence[Place], part: int, shift: int, prefix: tuple[int, ...]) -> Any:  # noqa: ANN401
        """Count the digits at `shift` of what agrees with all digits before."""

        def work() -> NDArray[np.int64]:
            counts = np.zeros(_LAST + 1, dtype=np.int64)
            for place in group:
                numbers = self._ranks(place)
                alike = _alike(numbers, prefix, part, shift + _DIGIT)
                digits = (numbers[part][alike] >> np.uint64(shift)) & np.uint64(_LAST)
                counts += np.bincount(digits.astype(np.int64), minlength=_LAST + 1)
                self._setting.passed(self.nbytes(place), self._task.instance.label)
            return counts

        return work

    def _collector(self, group: Sequence[Place], part: int, shift: int, prefix: tuple[int, ...]) -> Any:  # noqa: ANN401
        """The ranks that agree with all digits so far, that at `shift` among them."""

        def work() -> tuple[Keys, Keys]:
            found = []
            for place in group:
                numbers = self._ranks(place)
                alike = _alike(numbers, prefix, part, shift)
                found.append((numbers[0][alike], numbers[1][alike]))
                self._setting.passed(self.nbytes(place), self._task.instance.label)
            return np.concatenate([one[0] for one in found]), np.concatenate([one[1] for one in found])

        return work

    def _ranks(self, place: Place) -> tuple[Keys, Keys]:
        with stream_of(self._setting.device):
            tile, engine = self._loaded(place)
            return self._keys(place, engine, tile), place.countdown(self._blocks)

    def _loaded(self, place: Place) -> tuple[Tile, SparseScope]:
        """A tile, and the engine's blocks over it as one scope."""
        tile = load_tile([(place.member.block, place.part)], self._setting)
        scope = BoundScope(place.member.label, place.member.block, place.part.extent)
        return tile, build_scope(scope, tile.views)

    def _keys(self, place: Place, engine: SparseScope, tile: Tile) -> Keys:
        """Unsigned integers (blocks), row-major in the part, ordered as the blocks are ranked."""
        score = self._task.instance.score
        scores = block_scores(engine, [(place.member.block, place.part)], tile, self._ranking)
        values = None if scores is not None else element_values(engine, tile, self._ranking)
        single = place.member.block.numel_per_block == 1
        plain = single or self._task.instance.soft is not None
        if scores is None and not plain and (self._ranking.norm != 2 or score.normalize):
            scores = engine.block_norms(values, self._ranking.norm, rms=score.normalize)
        keys = engine.keys(values, scores, as_norms=self._width is None)
        signed = keys.reshape(-1).to(torch.int64).cpu().numpy()
        return signed.view(np.uint64) + np.uint64(1 << (self._width or 64) - 1)


def _exact_width(task: Task, setting: Setting) -> int | None:
    """Bits of the keys where single elements of one dtype compete by their own patterns; None for norms."""
    scope, kind = task.instance.scope, task.instance.score.kind
    dtypes = {setting.tensors[leaf.tensor].dtype for leaf in scope.leaves}
    if kind == "values":
        dtypes = {one.stored.dtype for one in task.inputs if one.role == "values"}
    single = all(member.block.numel_per_block == 1 for member, _ in members_of(scope))
    ready = kind in {"random", "blocks"} or task.instance.score.nonfinite == "prune"
    if task.instance.soft is not None or not single or len(dtypes) > 1 or ready:
        return None
    return 64 if kind in {"wanda", "obd"} else DTYPES[dtypes.pop()].bits


def _shifts(bits: int) -> list[int]:
    """Where the digits of numbers of so many bits begin, the most significant first."""
    return [digit * _DIGIT for digit in reversed(range(-(-bits // _DIGIT)))]


def _alike(numbers: tuple[Keys, Keys], prefix: tuple[int, ...], part: int, shift: int) -> NDArray[np.bool_]:
    """Which ranks agree with a prefix in everything above `shift` of one part, and in the parts before it."""
    above = np.uint64(shift)
    if shift >= 64:
        alike = np.ones(numbers[part].size, dtype=np.bool_)
    else:
        alike = numbers[part] >> above == np.uint64(prefix[part]) >> above
    return alike if part == 0 else alike & (numbers[0] == np.uint64(prefix[0]))
