"""Scores: a row for each kind that says what it reads and how it ranks elements or blocks.

Owns the table of kinds; the keys of a kind are in spec/schema.py. A new kind is a row here. Knows no regions:
plan finds what a kind reads, ranking calls its functions, strategy asks for its traits. `plan` calls it, so
what needs numpy is imported late.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from sparseprune.checkpoint import StatisticsKind, StoredTensor
    from sparseprune.execution.plan import Task
    from sparseprune.spec import Score

    Floats = NDArray[np.float64]


_GOLDEN = 0x9E37_79B9_7F4A_7C15
_FACTORS = (0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB)
_ALL_BITS = (1 << 64) - 1


class ScoreKind(Struct, frozen=True):
    """How one kind of score ranks the blocks of a rule.

    `reads` says what its file holds: "values", a number for each weight; "vector", statistics of the inputs
    of each matrix, used as `statistic`; "blocks", a number for each block; None, there is no file. "router":
    there is none either, the rows of a router rank the experts that they belong to. "routing": what experts
    did on text ranks them.

    `elements` makes the scores of elements from their magnitudes, which it may overwrite, and from the
    magnitudes of the file's numbers, if it reads any: float64, which broadcast to the shape of a region.
    A "vector" needs it. Without it the numbers of the file are the scores, or the magnitudes of the weights.

    `blocks` makes the scores of whole blocks, so that no element counts, from the score, the label of the
    block and the row-major numbers of the blocks: float64 of their shape.

    `norm` is the order of the norm over a block's elements; None: as the spec says.
    """

    reads: Literal["values", "vector", "blocks", "router", "routing"] | None = None
    statistic: StatisticsKind = "norm"
    elements: Callable[..., Floats] | None = None
    blocks: Callable[[Score, str, NDArray[np.uint64]], Floats] | None = None
    norm: float | None = None

    @property
    def ranks_blocks(self) -> bool:
        """Whether blocks have scores of their own, whatever their elements are."""
        return self.reads in {"blocks", "router", "routing"} or self.blocks is not None

    @property
    def ranks_weights(self) -> bool:
        """Whether the magnitudes of the weights are the scores."""
        return self.reads is None and self.elements is None and self.blocks is None

    def norm_of(self, score: Score) -> float:
        """The order of the norm over a block's elements."""
        return score.norm if self.norm is None else self.norm

    def dtypes(self, task: Task, tensors: Mapping[str, StoredTensor]) -> set[str]:
        """The dtypes of the numbers that rank the elements of a task."""
        if self.elements is not None or task.codes == "values":
            return {"F64"}
        if self.reads == "values":
            return {one.stored.dtype for one in task.inputs if one.role == "values"}
        return {tensors[leaf.tensor].dtype for leaf in task.instance.scope.leaves}


def kind_of(score: Score) -> ScoreKind:
    """The row of a score's kind."""
    return SCORE_KINDS[score.kind]


def random_scores(seed: int, name: str, numbers: NDArray[np.uint64]) -> Floats:
    """Float64, uniform in [0, 1), of the shape of `numbers`: the scores of these blocks of `name`.

    SplitMix64 (Steele, Lea and Flood 2014) over the blocks' numbers, started at a hash of seed and name.

    >>> import numpy as np
    >>> first, second = random_scores(0, "w", np.arange(2, dtype=np.uint64))
    >>> bool(random_scores(0, "w", np.array([1], dtype=np.uint64))[0] == second)
    True
    """
    import numpy as np  # noqa: PLC0415  (`plan` needs no scores)

    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    start = (int.from_bytes(digest, "little") + _GOLDEN) & _ALL_BITS
    state = numbers * np.uint64(_GOLDEN) + np.uint64(start)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _random(score: Score, label: str, numbers: NDArray[np.uint64]) -> Floats:
    return random_scores(score.seed, label, numbers)


def _wanda(magnitudes: Floats, norms: Floats) -> Floats:
    """|W| times the l2 norm of its input: Sun et al. 2023, A Simple and Effective Pruning Approach."""
    magnitudes *= norms
    return magnitudes


def _obd(magnitudes: Floats, diagonal: Floats) -> Floats:
    """W squared times the Hessian's diagonal: LeCun et al. 1989, Optimal Brain Damage, without the 1/2."""
    magnitudes *= magnitudes
    magnitudes *= diagonal
    return magnitudes


SCORE_KINDS: Mapping[str, ScoreKind] = {
    "magnitude": ScoreKind(),
    "random": ScoreKind(blocks=_random),
    "values": ScoreKind("values"),
    "wanda": ScoreKind("vector", "norm", elements=_wanda),
    "obd": ScoreKind("vector", "hessian", elements=_obd, norm=1.0),
    "blocks": ScoreKind("blocks"),
    "router": ScoreKind("router"),
    "reap": ScoreKind("routing"),
}
