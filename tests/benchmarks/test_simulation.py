"""The model of machines on one store: what must hold of it whatever the numbers."""

import math
import random
from dataclasses import replace

import pytest

from tests.benchmarks.simulation import Batch, Lost, Machine, Store, ideal, in_pieces, simulate

FREE = Store(limit=math.inf, request=0.0)  # a store that costs nothing
ONE = Machine(cores=1, network=100.0, files=1)


def drawn(seed: int, count: int = 40) -> list[Batch]:
    """Batches of any sizes: some are moved for long, others computed."""
    chance = random.Random(seed)
    return [
        Batch(
            read=chance.uniform(1, 1000),
            written=chance.uniform(1, 1000),
            pieces=tuple(chance.uniform(0.1, 5) for _ in range(chance.randrange(5))),
            shared=chance.uniform(0, 5),
        )
        for _ in range(count)
    ]


def test_one_machine_with_one_core_takes_the_sum_of_its_batches() -> None:
    batches = drawn(1)
    whole = sum(max(one.cpu, max(one.read, one.written) / 100) for one in batches)
    assert simulate(batches, 1, ONE, FREE) == pytest.approx(whole)


def test_requests_are_waited_for_once_a_batch() -> None:
    batches = [Batch(100.0, 100.0)] * 5
    assert simulate(batches, 1, ONE, Store(request=0.5, spread=0.0)) == pytest.approx(5 * (1 + 3 * 0.5))


def test_a_batch_has_no_more_than_its_window_in_flight() -> None:
    assert simulate([Batch(100.0, 0.0)], 1, ONE, Store(request=0.5, spread=0.0, window=10)) == pytest.approx(
        1.5 + 5
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("machines", [1, 3, 16])
def test_no_run_beats_the_ideal(seed: int, machines: int) -> None:
    batches, machine, store = drawn(seed), Machine(8, 100.0, 4), Store(700.0, 0.1, window=50)
    least = ideal(batches, machines, machine, store)
    assert simulate(batches, machines, machine, store) > least
    assert simulate(in_pieces(batches, 50), machines, machine, store) > least


def test_work_that_can_be_divided_comes_to_the_ideal() -> None:
    batches, machine = [Batch(1000.0, 900.0)] * 64, Machine(4, 100.0, 4)
    for machines in (1, 2, 8, 16):
        assert simulate(batches, machines, machine, FREE) == ideal(batches, machines, machine, FREE)


def test_the_limit_of_the_store_is_shared_by_all_machines() -> None:
    batches = [Batch(100.0, 100.0)] * 8
    times = [simulate(batches, machines, ONE, replace(FREE, limit=200.0)) for machines in (1, 2, 4, 8)]
    assert times == pytest.approx([8.0, 4.0, 4.0, 4.0])


def test_fewer_batches_than_machines_take_as_long_as_the_largest_one() -> None:
    batches = [Batch(100.0, 100.0), Batch(50.0, 50.0), Batch(700.0, 10.0)]
    assert simulate(batches, 9, ONE, FREE) == pytest.approx(7.0)


def test_pieces_of_computation_are_done_by_one_core_each() -> None:
    batch = Batch(0.0, 0.0, pieces=(4.0, 3.0, 3.0))
    assert [batch.seconds(cores) for cores in (1, 2, 3, 9)] == [10.0, 6.0, 4.0, 4.0]


def test_a_lost_machine_costs_its_open_batches() -> None:
    batches = [Batch(100.0, 100.0)] * 8  # a second each: four rounds of two
    assert simulate(batches, 2, ONE, FREE) == pytest.approx(4.0)
    # At 1.5 s machine 0 has done one of four and half of the second one.
    assert simulate(batches, 2, ONE, FREE, Lost(1.5, noticed=0.0)) == pytest.approx(7.0)
    assert simulate(batches, 2, ONE, FREE, Lost(1.5, noticed=20.0)) == pytest.approx(22.5)
    assert simulate(batches, 2, ONE, FREE, Lost(99.0)) == pytest.approx(4.0)


def test_without_a_machine_that_is_left_there_is_no_end() -> None:
    with pytest.raises(ValueError, match="no machine is left"):
        simulate([Batch(1000.0, 0.0)], 1, ONE, FREE, Lost(1.0))


def test_pieces_of_batches_are_the_same_work() -> None:
    batches = drawn(2)
    cut = in_pieces(batches, 50)
    assert len(cut) > len(batches)
    for total in (lambda one: one.read, lambda one: one.written, lambda one: one.cpu):
        assert sum(map(total, cut)) == pytest.approx(sum(map(total, batches)))


def test_the_same_work_takes_the_same_time_again() -> None:
    once, again = (simulate(drawn(3), 5, Machine(8, 100.0, 4), Store(300.0)) for _ in range(2))
    assert once == again
