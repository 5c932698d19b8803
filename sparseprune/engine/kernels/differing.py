"""The loops of a comparison: over the patterns of elements (flat) before and after, side by side.

Where something is largest or first they tell the part in which it is, so that they need not stop for it.
Owns how a part is long. Called by comparing.py, which says what the numbers mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled, compiled_sum, float32_of, inlined

if TYPE_CHECKING:
    from sparseprune.engine.kernels.formats import Bits, Format

_BLOCK = 4096  # elements that are counted in 16 bits
_RUN = 512  # elements whose changes are kept for a second look


def count_pairs(before: Bits, after: Bits, zero_bits: int) -> tuple[tuple[int, int, int, int], slice, slice]:
    """Elements that are zero before, zero after, zero only after, and not zero after but other than before.

    Then the part with the first of the last ones, and the first part that has the highest pattern, of
    `zero_bits` alone, among those that are zero only after; without meaning where there are none.
    """
    found = np.zeros(6, dtype=np.int64)
    _count(before, after, before.size, zero_bits, found)
    zeros_before, zeros_after, zeroed, altered, first, highest = map(int, found)
    counts = zeros_before, zeros_after, zeroed, altered
    return counts, slice(first, first + _BLOCK), slice(highest, highest + _BLOCK)


def kept_and_lost(before: Bits, after: Bits, form: Format) -> tuple[float, float]:
    """The energy before of elements that are not zero after, and of those that are."""
    sums = np.empty(2)
    if form.itemsize == 8:
        _keep_wide(after, after.size, before.view(np.float64), sums)
    else:
        _keep(before, after, after.size, form.magnitude, form.shift, form.infinity, sums)
        sums *= form.scale * form.scale
    return float(sums[0]), float(sums[1])


def differences(before: Bits, after: Bits, form: Format) -> tuple[tuple[float, float, float], slice]:
    """The energies before, after and of the changes, and the first part that has the largest change.

    What equals its other, or is zero like it, has no change; a change from or to NaN or infinity is infinite.
    """
    sums, changes = np.zeros(4), np.empty(_RUN)
    if form.itemsize == 8:
        values = before.view(np.float64), after.view(np.float64)
        _differ_wide(before, after, before.size, *values, changes, sums)
    else:
        pattern = form.magnitude, form.shift, form.infinity, 32 - 8 * form.itemsize, form.scale
        _differ(before, after, before.size, *pattern, changes, sums)
    run = int(sums[3])
    return (float(sums[0]), float(sums[1]), float(sums[2])), slice(run, run + _RUN)


@compiled("void(K*, K*, int64, K, int64*)")
def _count(before, after, size, zero_bits, found):
    zeros_before = zeros_after = zeroed = altered = np.int64(0)
    highest = zero_bits ^ zero_bits
    for begin in range(0, size, _BLOCK):
        end = begin + _BLOCK if size - begin > _BLOCK else size
        dead_before = dead_after = lost = other = np.uint16(0)
        top = zero_bits ^ zero_bits
        for i in range(begin, end):
            one = before[i] & zero_bits
            two = after[i] & zero_bits
            gone = one if two == 0 else two ^ two
            dead_before = np.uint16(dead_before + np.uint16(one == 0))
            dead_after = np.uint16(dead_after + np.uint16(two == 0))
            lost = np.uint16(lost + np.uint16(gone != 0))
            other = np.uint16(other + np.uint16((two != 0) & (before[i] != after[i])))
            top = gone if gone > top else top
        zeros_before += np.int64(dead_before)
        zeros_after += np.int64(dead_after)
        zeroed += np.int64(lost)
        if other > 0 and altered == 0:
            found[4] = begin
        altered += np.int64(other)
        if top > highest:
            highest = top
            found[5] = begin
    found[0] = zeros_before
    found[1] = zeros_after
    found[2] = zeroed
    found[3] = altered


@compiled_sum("void(K*, K*, int64, uint32, uint32, uint32, float64*)")
def _keep(before, after, size, magnitude, shift, infinity, sums):
    kept = lost = 0.0
    for i in range(size):
        key = np.uint32(before[i]) & magnitude
        value = np.float64(float32_of(np.uint32(key << shift)))
        square = np.inf if key >= infinity else value * value
        live = (np.uint32(after[i]) & magnitude) != 0
        kept += square if live else 0.0
        lost += 0.0 if live else square
    sums[0] = kept
    sums[1] = lost


@compiled_sum("void(K*, int64, float64*, float64*)")
def _keep_wide(after, size, values, sums):
    kept = lost = 0.0
    for i in range(size):
        square = values[i] * values[i]
        live = (after[i] << np.uint64(1)) != 0
        kept += square if live else 0.0
        lost += 0.0 if live else square
    sums[0] = kept
    sums[1] = lost


@compiled_sum("void(K*, K*, int64, uint32, uint32, uint32, uint32, float64, float64*, float64*)")
def _differ(before, after, size, magnitude, shift, infinity, width, scale, changes, sums):
    energy_before = energy_after = energy_of_change = 0.0
    largest = -1.0
    for begin in range(0, size, _RUN):
        count = _RUN if size - begin > _RUN else size - begin
        for i in range(count):
            one, two = np.uint32(before[begin + i]), np.uint32(after[begin + i])
            key, other = one & magnitude, two & magnitude
            value = np.float64(float32_of(np.uint32((key << shift) | ((one ^ key) << width)))) * scale
            changed = np.float64(float32_of(np.uint32((other << shift) | ((two ^ other) << width)))) * scale
            value = np.inf if key >= infinity else value
            changed = -np.inf if other >= infinity else changed
            change = abs(changed - value)
            change = 0.0 if (one == two) | ((key | other) == 0) else change
            changes[i] = change
            energy_before += value * value
            energy_after += changed * changed
            energy_of_change += change * change
        top = _top(changes, count)
        if top > largest:
            largest = top
            sums[3] = begin
    sums[0] = energy_before
    sums[1] = energy_after
    sums[2] = energy_of_change


@compiled_sum("void(K*, K*, int64, float64*, float64*, float64*, float64*)")
def _differ_wide(before, after, size, values, others, changes, sums):
    energy_before = energy_after = energy_of_change = 0.0
    largest = -1.0
    for begin in range(0, size, _RUN):
        count = _RUN if size - begin > _RUN else size - begin
        for i in range(count):
            value, changed = values[begin + i], others[begin + i]
            change = abs(changed - value)
            change = change if change < np.inf else np.inf
            one, two = before[begin + i], after[begin + i]
            change = 0.0 if (one == two) | (((one | two) << np.uint64(1)) == 0) else change
            changes[i] = change
            energy_before += value * value
            energy_after += changed * changed
            energy_of_change += change * change
        top = _top(changes, count)
        if top > largest:
            largest = top
            sums[3] = begin
    sums[0] = energy_before
    sums[1] = energy_after
    sums[2] = energy_of_change


@inlined
def _top(changes, count):
    """The largest of some changes, of which none is NaN; several chains of comparisons side by side."""
    a = b = c = d = 0.0
    whole = count // 4 * 4
    for i in range(0, whole, 4):
        a = changes[i] if changes[i] > a else a
        b = changes[i + 1] if changes[i + 1] > b else b
        c = changes[i + 2] if changes[i + 2] > c else c
        d = changes[i + 3] if changes[i + 3] > d else d
    for i in range(whole, count):
        a = changes[i] if changes[i] > a else a
    a = b if b > a else a
    c = d if d > c else c
    return c if c > a else a
