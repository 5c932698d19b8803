"""Writing back: rounded once, bits kept where nothing is to change, +0.0 where nothing is left."""

import math
import random
from fractions import Fraction

import pytest
import torch

from sparseprune import BlockCoupling, BlockSpec
from sparseprune.engine.scoring import round_to
from tests.engine.devices import on_every_device
from tests.engine.structures import BITS, FLOATS

NARROW = [dtype for dtype in FLOATS if dtype.itemsize < 8]


def values_between(dtype: torch.dtype, seed: int) -> tuple[list[float], list[float]]:
    """Doubles around the midpoints of neighbouring numbers of `dtype`, and what each is rounded to."""
    chance = random.Random(seed)
    width = dtype.itemsize * 8
    last = {torch.float8_e4m3fn: 0x7D, torch.float8_e5m2: 0x7A}.get(dtype, 2 ** (width - 1) - 1)
    found: list[float] = []
    wanted: list[float] = []
    while len(found) < 2000:
        pattern = chance.randrange(last)
        pair = torch.tensor([pattern, pattern + 1], dtype=BITS[dtype.itemsize]).view(dtype).to(torch.float64)
        low, high = pair.tolist()
        if not math.isfinite(high) or math.isnan(low):
            continue
        middle = (Fraction(low) + Fraction(high)) / 2
        even = low if pattern % 2 == 0 else high
        sign = chance.choice([1, -1])
        for one, nearest in (
            (float(middle), even),
            (math.nextafter(float(middle), math.inf), high),
            (math.nextafter(float(middle), -math.inf), low),
            (low, low),
        ):
            found.append(sign * one)
            wanted.append(sign * nearest)
    return found, wanted


@on_every_device
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_doubles_beside_a_midpoint_are_rounded_once_and_ties_to_even(device: str, dtype: torch.dtype) -> None:
    doubles, wanted = values_between(dtype, 5)
    rounded = round_to(torch.tensor(doubles, dtype=torch.float64, device=device), dtype)
    assert rounded.dtype == dtype
    assert rounded.to(torch.float64).tolist() == wanted


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zeros_infinities_and_nan_are_rounded_to_themselves(dtype: torch.dtype) -> None:
    doubles = [0.0, -0.0, 1.0] if dtype == torch.float8_e4m3fn else [0.0, -0.0, math.inf, -math.inf]
    rounded = round_to(torch.tensor(doubles, dtype=torch.float64), dtype).to(torch.float64)
    assert rounded.tolist() == doubles
    assert [math.copysign(1, one) for one in rounded.tolist()] == [math.copysign(1, one) for one in doubles]
    assert round_to(torch.tensor([math.nan], dtype=torch.float64), dtype).to(torch.float64).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integers_are_rounded_to_the_nearest_and_saturate(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    rounded = round_to(torch.tensor([0.4, 1.5, -2.6, 1e30, -1e30], dtype=torch.float64), dtype).tolist()
    assert rounded[:3] == [0, 2, -3]
    assert rounded[3] >= info.max - 1023
    assert rounded[4] == info.min


@on_every_device
def test_a_multiplier_rounds_once(device: str) -> None:
    weight = torch.tensor([1.0, 3.0, -5.0], dtype=torch.bfloat16, device=device)
    BlockSpec(weight, ()).apply_multiplier(torch.tensor([1 + 2**-8 + 2**-40] * 3, dtype=torch.float64))
    assert weight.tolist() == [1.0078125, 3.015625, -5.03125]


def test_a_multiplier_of_one_keeps_every_bit_and_of_zero_leaves_positive_zeros() -> None:
    weight = torch.tensor([math.nan, -0.0, -3.0, math.inf, -math.inf, -7.0]).reshape(3, 2)
    before = weight.view(torch.int32).clone()
    BlockSpec(weight, (1, 2)).apply_multiplier(torch.tensor([[1.0], [0.0], [0.0]]))
    assert weight.view(torch.int32).tolist() == [before[0].tolist(), [0, 0], [0, 0]]
    whole = torch.tensor([2**53 + 1, 2**53 + 1, 3])
    BlockSpec(whole, ()).apply_multiplier(torch.tensor([1.0, 0.0, 2.5]))
    assert whole.tolist() == [2**53 + 1, 0, 8]


def test_a_multiplier_reaches_each_member_of_a_coupling_through_its_order() -> None:
    up, down = torch.ones(2, 3), torch.ones(3, 2)
    channel = BlockCoupling([BlockSpec(up, (1, -1)), BlockSpec(down, (-1, 1))], [(0, 1), (1, 0)])
    channel.apply_multiplier(torch.tensor([[2.0], [-3.0]]))
    assert up.tolist() == [[2, 2, 2], [-3, -3, -3]]
    assert down.tolist() == [[2, -3]] * 3
