"""Rests: what no rule reaches of a tensor that rules reach in part; taken over as it is, its masks all 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.tally import Tally, tally
from sparseprune.execution.boxes import gaps
from sparseprune.execution.programs import Item, Program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparseprune.execution.boxes import Run
    from sparseprune.execution.outcomes import Outcome
    from sparseprune.execution.programs import Setting
    from sparseprune.execution.schedule import Rest


def rest_program(rest: Rest, setting: Setting) -> Program:
    """One step: runs of elements, some of them at one time."""
    stored = rest.stored
    size = max(1, stored.nbytes // max(1, stored.numel))
    slab = max(1, setting.limits.slab // size)

    def take_over(runs: list[Run]) -> list[Outcome]:
        total = Tally()
        for first, count in runs:
            bits = setting.traffic.load_run(stored, (first, count))
            total += tally(bits, stored.dtype)
            setting.traffic.store_run(stored, first, bits, np.ones(count, dtype=np.uint8))
        counted = [total.zeros, total.energy]
        return [[stored.name, "", total.numel, 0, *counted, *counted]]

    def items() -> Iterator[Item]:
        for number, runs in enumerate(_batches(rest, slab)):
            elements = sum(count for _, count in runs)
            yield Item(
                lambda runs=runs: take_over(runs),  # type: ignore[misc]
                elements * size,
                2 * elements * (size + 1),
                str(number),
            )

    yield items()


def _batches(rest: Rest, slab: int) -> Iterator[list[Run]]:
    """The runs that are left over, cut and gathered to about `slab` elements each."""
    batch: list[Run] = []
    filled = 0
    for first, count in gaps(rest.stored, rest.leaves):
        done = 0
        while done < count:
            step = min(slab - filled, count - done)
            batch.append((first + done, step))
            done, filled = done + step, filled + step
            if filled == slab:
                yield batch
                batch, filled = [], 0
    if batch:
        yield batch
