"""Inputs: the tensors of score and conditioner files that the tasks of a plan read beside the weights.

Owns finding them by name and checking their shapes against headers alone, every problem at once. What
is done with them is ranking's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

from sparseprune.checkpoint import open_checkpoint
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import CheckpointError, SpecError
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sparseprune.checkpoint import Checkpoint, StoredTensor
    from sparseprune.spec import BoundBlockCoupling, BoundInstance, BoundScopeCoupling

Role = Literal["values", "vector", "blocks", "conditioners"]
_NUMBERS = frozenset(row.name for row in DTYPES.values() if row.prunable)


@dataclass(frozen=True, slots=True)
class TaskInput:
    """A stored tensor that a task reads: `key` is the weight, or for block scores the block, that it is for.

    `dim` is the dimension of the weight along which a vector lies.
    """

    role: Role
    key: str
    stored: StoredTensor
    dim: int = -1


class InputFiles:
    """The score and conditioner files of a spec, each opened once; collects what is wrong with them."""

    def __init__(self, weights: Checkpoint) -> None:
        self._weights = weights
        self._files: dict[Path, Checkpoint | None] = {}
        self._problems: dict[str, None] = {}

    def of_instance(self, rule: str, instance: BoundInstance) -> tuple[TaskInput, ...]:
        """The inputs of one instance; what is missing is noted and left out."""
        found: list[TaskInput] = []
        score = instance.score
        if score.file is not None:
            if score.kind == "blocks":
                found += self._block_scores(rule, score.file, instance.scope)
            else:
                role: Role = "values" if score.kind == "values" else "vector"
                found += self._weight_inputs(rule, score.file, instance.scope, role, score.input_dim)
        if instance.soft is not None and score.kind != "magnitude":
            self._note(
                rule, f"mode soft shrinks the norms of the weights themselves; kind {score.kind} has no part"
            )
        if instance.soft is not None and instance.soft.conditioners is not None:
            found += self._weight_inputs(rule, instance.soft.conditioners, instance.scope, "conditioners", -1)
        return tuple(found)

    def raise_if_any(self) -> None:
        """SpecError with every problem that was noted."""
        if self._problems:
            raise SpecError(*self._problems)

    def _weight_inputs(
        self, rule: str, path: Path, scope: BoundScope | BoundScopeCoupling, role: Role, dim: int
    ) -> Iterator[TaskInput]:
        """One input for each weight; statistics may leave out members of a fused block, but not all of it."""
        for block in _blocks(scope):
            names = dict.fromkeys(leaf.tensor for leaf in block.leaves)
            there = [name for name in names if self._open(rule, path, name) is not None]
            for name in names if role != "vector" or not there else there:
                weight = self._weights.tensors[name]
                wanted = weight.shape
                if role == "vector":
                    if not -len(weight.shape) <= dim < len(weight.shape):
                        text = (
                            f"input_dim {dim} is no dimension of {name}, whose shape is {list(weight.shape)}"
                        )
                        self._note(rule, text)
                        continue
                    wanted = (weight.shape[dim],)
                stored = self._get(rule, path, (name,), wanted)
                if stored is not None:
                    yield TaskInput(role, name, stored, dim)

    def _block_scores(
        self, rule: str, path: Path, scope: BoundScope | BoundScopeCoupling
    ) -> Iterator[TaskInput]:
        for block in _blocks(scope):
            names = (block.label, block.tensor) if isinstance(block, BoundBlock) else (block.label,)
            stored = self._get(rule, path, names, block.grid_shape)
            if stored is not None:
                yield TaskInput("blocks", block.label, stored)

    def _get(
        self, rule: str, path: Path, names: tuple[str, ...], shape: tuple[int, ...]
    ) -> StoredTensor | None:
        for name in names:
            stored = self._open(rule, path, name)
            if stored is None:
                continue
            if stored.shape != shape:
                self._note(rule, f"{path}: {name} has shape {list(stored.shape)}, wanted {list(shape)}")
            elif stored.dtype not in _NUMBERS:
                wanted = ", ".join(sorted(_NUMBERS))
                self._note(rule, f"{path}: {name} is {stored.dtype}, wanted one of {wanted}")
            else:
                return stored
            return None
        file = self._files.get(path)
        if file is not None:
            close = get_close_matches(names[-1], list(file.tensors), n=1)
            hint = f"; the nearest name is {close[0]}" if close else ""
            self._note(rule, f"{path}: there is no tensor {names[-1]} of shape {list(shape)}{hint}")
        return None

    def _open(self, rule: str, path: Path, name: str) -> StoredTensor | None:
        if path not in self._files:
            try:
                self._files[path] = open_checkpoint(path)
            except CheckpointError as error:
                self._files[path] = None
                self._note(rule, str(error))
        file = self._files[path]
        return None if file is None else file.tensors.get(name)

    def _note(self, rule: str, text: str) -> None:
        self._problems[f"[{rule}] score: {text}"] = None


def _blocks(scope: BoundScope | BoundScopeCoupling) -> Iterator[BoundBlock | BoundBlockCoupling]:
    if isinstance(scope, BoundScope):
        yield scope.block
    else:
        yield from (member.block for member in scope.members)
