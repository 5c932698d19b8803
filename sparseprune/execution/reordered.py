"""A dense checkpoint in the order of one that was permuted before it was pruned, so that both are compared.

Owns whether they differ less in that order, which a checkpoint made from the permuted one does not. Called by
what compares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.checkpoint.permuted import Permuted, PermutedSource, both_sides, read_permutations
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.formats import FORMATS, values_of
from sparseprune.errors import CheckpointError
from sparseprune.execution.tensor_io import TensorIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sparseprune.checkpoint import Checkpoint, Source, Statistics, StoredTensor
    from sparseprune.checkpoint.permuted import Order

_SAMPLE = 1 << 18  # elements of a tensor by which the order is told
_SAMPLES = 4  # tensors


def in_order_of(
    pruned: Checkpoint, dense: Checkpoint, statistics: Statistics | None, reader: Source
) -> Source | None:
    """A source that serves the dense checkpoint and its statistics in the order of the pruned one.

    None where that was not permuted, or where they are in one order already.
    """
    orders = {
        name: own
        for name, own in read_permutations(pruned).items()
        if name in dense.tensors and dense.tensors[name].shape == pruned.tensors[name].shape
    }
    moved = [Permuted(dense.tensors[name], own) for name, own in orders.items()]
    source = PermutedSource(reader, moved)
    looked_at = [one for one in moved if _differs(one)][:_SAMPLES]
    votes = [_distance(one, pruned.tensors[one.stored.name], source, reader) for one in looked_at]
    if sum(votes) <= 0:
        return None
    beside = () if statistics is None else tuple(_statistics(statistics, orders, dense.tensors))
    return PermutedSource(reader, (*moved, *beside))


def _differs(one: Permuted) -> bool:
    """Whether an order is another one than that of the file, and elements are known as numbers."""
    known = one.stored.dtype in FORMATS and one.stored.codes is None
    return known and any((np.diff(order, axis=1) != 1).any() for order in one.orders.values())


def _distance(one: Permuted, after: StoredTensor, source: Source, reader: Source) -> int:
    """1 where some elements are nearer to those of the pruned tensor in the other order, -1 as they lie."""
    if after.dtype not in FORMATS or after.codes is not None:
        return 0
    run = (0, min(_SAMPLE // DTYPES[one.stored.dtype].itemsize, one.stored.numel))
    now = values_of(TensorIO(reader).load_run(after, run), after.dtype).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        found = [
            np.square(values_of(TensorIO(each).load_run(one.stored, run), one.stored.dtype) - now).sum()
            for each in (source, reader)
        ]
    return int(found[1] > found[0]) - int(found[1] < found[0])


def _statistics(
    statistics: Statistics, orders: Mapping[str, Mapping[int, Order]], tensors: Mapping[str, StoredTensor]
) -> Iterator[Permuted]:
    """The second moments of inputs and of gradients along permuted dimensions, each once."""
    seen: set[tuple[object, str]] = set()
    for name, along in orders.items():
        statistic, rank = statistics.of.get(name), len(tensors[name].shape)
        if statistic is None:
            continue
        ((dim, order),) = along.items()
        inputs = (-1 if statistic.input_dim is None else statistic.input_dim) % rank
        stored = statistic.stored if inputs == dim else statistic.gradients
        if stored is None or (stored.shard, stored.name) in seen:
            continue
        seen.add((stored.shard, stored.name))
        if len(stored.shape) > 1 and (inputs != dim or statistic.kind != "norm"):
            try:
                yield both_sides(stored, order)
            except ValueError as error:
                text = f"{error}: give statistics without gradients"
                raise CheckpointError(f"{stored.shard.path}: {text}") from error
