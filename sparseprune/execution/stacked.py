"""Stacks: small tensors that look alike, of one instance or many, are read into one array, counted at once.

Thousands of experts differ in nothing but their names: what a call of numpy costs is paid once for many of
them. Owns which instances can be stacked. Called by verifying.py.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.occupancy import any_in, histograms, nonzero
from sparseprune.execution.occupied import SURVIVORS, Blocks, Found, count_rows, counted, judged
from sparseprune.execution.programs import Item, Program
from sparseprune.execution.regions import leaves_of, members_of, storage_order, whole_region
from sparseprune.execution.surviving import leaf_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from sparseprune.engine.kernels.occupancy import ByteFlags
    from sparseprune.execution.programs import Setting
    from sparseprune.execution.regions import AnyScope
    from sparseprune.execution.surviving import Way
    from sparseprune.spec import BoundBlock

_SHARE = 8  # leaves that fit so often into what is read at one time are small


def stack_height(scope: AnyScope, way: Way) -> int:
    """How many instances of the form of this one are read at one time; 0 where they cannot be stacked.

    Stacked are those that are worked as cells of whole scopes, and have small leaves, each in one stretch.
    """
    numel = sum(prod(leaf.view_shape) for leaf in scope.leaves)
    small = 0 < numel <= way.limit and numel // len(scope.leaves) <= way.limit // _SHARE
    if way.kind != "cells" or not small:
        return 0
    in_one = all(len(list(whole_region(leaf).runs())) == 1 for leaf in scope.leaves)
    return way.limit // numel if in_one else 0


def stack_program(
    scopes: Sequence[AnyScope],
    allowed: int,
    way: Way,
    setting: Setting,
    tell: Callable[[Sequence[Found]], None],
) -> Program:
    """Count what survives in instances of one form; `tell` gets what was found in each, in their order."""
    nbytes = leaf_bytes(scopes[0].leaves, setting.tensors) * len(scopes)
    (found,) = yield [Item(partial(_count, scopes, allowed, setting), nbytes, way.memory)]
    tell(found)


def _count(scopes: Sequence[AnyScope], allowed: int, setting: Setting) -> list[Found]:
    form = scopes[0]
    read = list(_blocks(form, iter(_flags_of_leaves(scopes, setting))))
    counts = counted(read, count_rows(form), allowed)
    survivors = counts[SURVIVORS]
    if int(survivors.max(initial=0)) <= allowed:
        return [Found(found) for found in histograms(survivors.reshape(len(scopes), -1))]
    begin = (0,) * len(form.grid_shape)
    return [judged([row[place] for row in counts], begin, allowed) for place in range(len(scopes))]


def _blocks(form: AnyScope, flags: Iterator[ByteFlags]) -> Iterator[Blocks]:
    """The blocks of every member, all instances of it along a dimension in front."""
    for member, order in members_of(form):
        own = [next(flags).transpose(_behind(to_common)) for _, to_common in leaves_of(member.block)]
        yield Blocks((1, *member.shape), _behind(order), tuple(own))


def _flags_of_leaves(scopes: Sequence[AnyScope], setting: Setting) -> list[ByteFlags]:
    """For each leaf of the form, which of its blocks are not zero; what looks alike is read together."""
    alike: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, leaf in enumerate(scopes[0].leaves):
        dtype = setting.tensors[leaf.tensor].dtype
        alike[leaf.view_shape, leaf.view_stride, leaf.shape, dtype].append(place)
    leaves, height = [scope.leaves for scope in scopes], len(scopes)
    flags: dict[int, ByteFlags] = {}
    for places in alike.values():
        together = _flags([own[place] for place in places for own in leaves], setting)
        for number, place in enumerate(places):
            flags[place] = together[number * height : (number + 1) * height]
    return [flags[place] for place in sorted(flags)]


def _flags(leaves: Sequence[BoundBlock], setting: Setting) -> ByteFlags:
    """Which blocks of some leaves that look alike are not zero: (leaves, *grid of blocks)."""
    form = leaves[0]
    dtype = DTYPES[setting.tensors[form.tensor].dtype]
    bits = np.empty((len(leaves), prod(form.view_shape)), dtype=f"uint{dtype.bits}")
    for leaf, row in zip(leaves, bits, strict=True):
        setting.traffic.read_run(setting.tensors[leaf.tensor], leaf.view_offset, row)
    order = storage_order(form)
    shaped = bits.reshape(len(leaves), *(form.view_shape[dim] for dim in order))
    own = shaped.transpose(_behind(sorted(range(len(order)), key=order.__getitem__)))
    return any_in(nonzero(own, dtype.zero_bits or 0), (1, *form.shape))


def _behind(order: Sequence[int]) -> tuple[int, ...]:
    """The same order of dimensions where one more stands in front."""
    return (0, *(1 + dim for dim in order))
