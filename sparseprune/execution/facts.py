"""What is asked of the tensors of a checkpoint, and what was found: the border between measuring and telling.

Plain data. Owns how N:M patterns and block shapes are written, and which matrix a tensor is looked at as.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from sparseprune.engine.grids import prod
from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparseprune.engine.grids import Shape

_PATTERN = re.compile(r"(?P<kept>[0-9]{1,9}):(?P<group>[0-9]{1,9})(@(?P<axis>-?[0-9]{1,2}))?")
_BLOCK = re.compile(r"(?P<rows>[0-9]{1,9})x(?P<columns>[0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Pattern:
    """N:M sparsity: of M neighbours along a dimension at most N are not zero; by default along the last."""

    kept: int
    group: int
    axis: int = -1

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" + ("" if self.axis == -1 else f"@{self.axis}")


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Rows and columns of the blocks that a matrix is cut into; those at its edges may be smaller."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


PATTERNS = (Pattern(1, 2), Pattern(2, 4), Pattern(4, 8))
BLOCKS = (BlockShape(4, 4), BlockShape(16, 16), BlockShape(32, 32))


@dataclass(frozen=True, slots=True)
class Questions:
    """What is looked for in every tensor, besides its zeros."""

    patterns: tuple[Pattern, ...] = PATTERNS
    blocks: tuple[BlockShape, ...] = BLOCKS


@dataclass(frozen=True, slots=True)
class Zeros:
    """How many of some things are zero throughout."""

    zero: int
    of: int


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What was counted in one tensor.

    Elements that are no whole bytes cannot be looked at: `zeros`, `nonfinite` and all below are then None.
    `patterns` are those of the questions that it satisfies, for tensors of two dimensions or more.
    `slices` has one entry for each dimension: of the slices at one index of it, those that are all zero.
    `rows`, `columns` and `blocks` (by their shape, "4x4") are those of its matrices (`matrices_of`), None
    where it has none. `nonfinite` counts NaN and infinities.
    """

    name: str
    dtype: str
    shape: Shape
    numel: int
    zeros: int | None = None
    nonfinite: int | None = None
    patterns: tuple[str, ...] = ()
    slices: tuple[Zeros, ...] | None = None
    rows: Zeros | None = None
    columns: Zeros | None = None
    blocks: Mapping[str, Zeros] | None = field(default_factory=lambda: MappingProxyType({}))


def matrices_of(shape: Shape) -> tuple[int, int, int] | None:
    """A tensor as (how many matrices, rows, columns), row-major without moving anything; None below 2-D.

    Three dimensions are a stack of matrices, such as experts; with four or more it is the one matrix that
    a convolution multiplies by, a row for each filter.

    >>> matrices_of((64, 16)), matrices_of((8, 64, 16)), matrices_of((64, 16, 3, 3)), matrices_of((64,))
    ((1, 64, 16), (8, 64, 16), (1, 64, 144), None)
    """
    if len(shape) < 2:
        return None
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], prod(shape[1:])


def pattern_of(text: str) -> Pattern:
    """A pattern as `--pattern` takes it: N:M, or N:M@AXIS.

    >>> pattern_of("2:4"), pattern_of("1:16@0")
    (Pattern(kept=2, group=4, axis=-1), Pattern(kept=1, group=16, axis=0))
    """
    found = _PATTERN.fullmatch(text.strip())
    if found is not None and 0 <= int(found["kept"]) < int(found["group"]):
        return Pattern(int(found["kept"]), int(found["group"]), int(found["axis"] or -1))
    raise SparsepruneError(
        f"--pattern {text}: wanted N:M with N less than M, such as 2:4, or N:M@AXIS, such as 2:4@0"
    )


def block_of(text: str) -> BlockShape:
    """A block shape as `--block` takes it: ROWSxCOLUMNS.

    >>> block_of("8x1")
    BlockShape(rows=8, columns=1)
    """
    found = _BLOCK.fullmatch(text.strip())
    if found is not None and int(found["rows"]) > 0 and int(found["columns"]) > 0:
        return BlockShape(int(found["rows"]), int(found["columns"]))
    raise SparsepruneError(f"--block {text}: wanted ROWSxCOLUMNS, such as 16x16")
