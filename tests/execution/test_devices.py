"""What a device does ends in the bytes of the CPU, needs no more of it than is free, is waited for once."""

import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from sparseprune.api import pruning
from sparseprune.api.options import Target, source
from sparseprune.api.resources import machine
from sparseprune.checkpoint import TensorReader, open_checkpoint
from sparseprune.errors import MachineError
from sparseprune.execution import devices, torch_tiles
from sparseprune.execution.devices import LANES, Lanes, free_bytes, in_smaller_parts, power_of_two_within
from sparseprune.execution.passes import Pass
from sparseprune.execution.plan import make_plan
from sparseprune.execution.pruning import jobs_of
from sparseprune.execution.regions import DEVICE_TILE_ELEMENTS, Limits, Part, limits_of
from sparseprune.execution.schedule import make_schedule
from sparseprune.execution.tensor_io import TensorIO
from sparseprune.execution.torch_out_of_core import Place, SearchRank
from sparseprune.execution.torch_tiles import halves
from sparseprune.spec import parse_spec
from tests.commands import refused, run
from tests.execution.elsewhere import Sent
from tests.execution.pretended import NAME, pretend
from tests.execution.structures import CASES
from tests.execution.test_ways import applied, prepare
from tests.limits import AMPLE, narrow

GIB = 1 << 30


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", CASES)
def test_a_device_gives_the_bytes_of_the_cpu(tmp_path: Path, name: str) -> None:
    spec, tensors = CASES[name]
    prepare(tmp_path, spec, tensors(torch.bfloat16))
    files, report = applied(tmp_path, "reference", "--device", "cpu")
    small = 256 if "transposable" in spec else 16  # all patterns are tried, tile by tile
    with pytest.MonkeyPatch.context() as patch:
        tile = 1 << 18 if list(CASES).index(name) % 3 else small
        narrow(patch, 64, tile, memory=1 << 20, device=1 << 20)
        pretend(patch)
        found, told = applied(tmp_path, "device", "--device", "cuda", "--jobs", 3)
    assert (told.pop("device"), {rule.pop("device") for rule in told["rules"]}) == (NAME, {NAME})
    assert found == files
    assert told["tensors"] == report["tensors"]


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations whose results the host has to know before it goes on."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.OPERATIONS or name.startswith("masked_select"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def passes_of(folder: Path, spec: str, io: TensorIO) -> Iterator[tuple[Pass, list[Any]]]:
    """Each pass of the only job of a plan for CUDA, and its chunks; what they give leads to the next one."""
    plan = make_plan(open_checkpoint(folder), parse_spec(spec))
    schedule = make_schedule(plan, AMPLE, 1, device="cuda")
    (job,) = jobs_of(schedule)
    current: Pass | None = job.first
    while current is not None:
        chunks = list(current.chunks(io))
        yield current, chunks
        following = current.merge([current.work(chunk, io) for chunk in chunks], io)
        decides = getattr(following, "value", None)
        current = following if isinstance(following, Pass) else current.decided(decides)


SMALL_TILES = ["2:4", "whole tensors", "rows over all tensors", "channels"]
LARGE_TILES = [*SMALL_TILES, "over all tensors", "whole rows", "a threshold", "random blocks"]


@pytest.mark.parametrize(("name", "tile"), [*product(SMALL_TILES, [16]), *product(LARGE_TILES, [1 << 18])])
def test_the_host_waits_once_for_each_chunk(tmp_path: Path, name: str, tile: int) -> None:
    spec, tensors = CASES[name]
    named = {key: one for key, one in tensors(torch.float32).items() if name != "channels" or key[0] == "0"}
    several = any(word in name for word in ("over all", "channels"))
    save_file(named if several else {"a.weight": named["a.weight"]}, tmp_path / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch, TensorReader() as reader:
        device = pretend(patch)
        narrow(patch, 64, tile, memory=1 << 20, device=GIB if tile > 16 else 1 << 13)
        io = TensorIO(reader, cast("Any", Sent()), open_checkpoint(tmp_path).tensors, NAME)
        for current, chunks in passes_of(tmp_path, spec, io):
            device.waits = 0
            for chunk in chunks:
                with Waits() as waits:
                    current.work(chunk, io)
                counted = isinstance(current, SearchRank) and current.collect and not current.kept_at_once
                assert waits.seen == [] or counted, (type(current).__name__, waits.seen)
            assert device.waits == len(chunks)


def test_a_scope_without_room_is_cut_in_halves_until_the_device_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, tensors = CASES["2:4"]
    prepare(tmp_path, spec, tensors(torch.bfloat16))
    reference = applied(tmp_path, "reference", "--device", "cpu")[0]
    pretend(monkeypatch)
    narrow(monkeypatch, 64, 1 << 18, device=GIB)
    usual, sizes = devices.uploaded, []

    def full(array: np.ndarray[Any, Any], device: str) -> torch.Tensor:
        sizes.append(array.size)
        if array.size > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return usual(array, device)

    monkeypatch.setattr(torch_tiles, "uploaded", full)
    assert applied(tmp_path, "device", "--device", "cuda", "--jobs", 1)[0] == reference
    assert max(sizes) > 64 >= min(sizes)
    spec, _ = CASES["whole tensors"]
    (tmp_path / "spec.toml").write_text(spec)
    said = run("apply", tmp_path / "in", tmp_path / "spec.toml", "-o", tmp_path / "no", "--device", "cuda")
    assert said.code == 3
    assert "the device has too little free memory for what must be decided together: free some" in said.err


@pytest.mark.parametrize("name", ["over all tensors", "rows over all tensors"])
def test_a_search_over_places_without_room_goes_on_with_fewer_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec, tensors = CASES[name]
    prepare(tmp_path, spec, tensors(torch.bfloat16))
    reference = applied(tmp_path, "reference", "--device", "cpu")[0]
    pretend(monkeypatch)
    narrow(monkeypatch, 64, 4, memory=1 << 20, device=1 << 12)
    usual, fails = SearchRank._over, []

    def full(self: SearchRank, span: tuple[int, int], io: TensorIO) -> Any:
        if span[1] - span[0] > 1:
            fails.append(span)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return usual(self, span, io)

    monkeypatch.setattr(SearchRank, "_over", full)
    assert applied(tmp_path, "device", "--device", "cuda", "--jobs", 2)[0] == reference
    assert fails


def test_another_error_is_no_lack_of_memory_and_a_single_piece_has_no_halves() -> None:
    def fails(error: Exception) -> Any:
        def work(_: int) -> list[int]:
            raise error

        return work

    with pytest.raises(RuntimeError, match="index out of range"):
        in_smaller_parts(fails(RuntimeError("index out of range")), 4, lambda number: [number // 2] * 2)
    with pytest.raises(MachineError, match="--device cpu"):
        in_smaller_parts(fails(torch.OutOfMemoryError("CUDA out of memory")), 4, lambda _: [4])


@pytest.mark.parametrize("extent", [(), (1,), (2,), (7, 3), (1, 1, 5)])
def test_halves_hold_every_place_once(extent: tuple[int, ...]) -> None:
    part = Part(tuple(2 + dim for dim in range(len(extent))), extent)
    parts = halves(part)
    assert sum(one.numel for one in parts) == part.numel
    assert all(2 * one.numel <= part.numel + 1 for one in parts)
    assert (len(parts) == 1) == (part.numel == 1)


def test_a_few_threads_at_a_time_are_on_a_device_as_long_as_it_has_room() -> None:
    opened: list[str] = []

    def stream(device: str) -> threading.Lock:
        opened.append(device)
        return threading.Lock()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "stream_context", stream)
        lanes = Lanes(room=100)
        now: list[int] = []
        most: list[tuple[int, int]] = []

        def work(nbytes: int) -> None:
            with lanes.lane("cuda", nbytes):
                now.append(nbytes)
                most.append((len(now), sum(now)))
                time.sleep(0.002)
                now.remove(nbytes)

        threads = [threading.Thread(target=work, args=(size,)) for size in (10, 60, 500, 40, 20, 30) * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(most) == len(threads)
    assert max(count for count, _ in most) <= LANES
    assert all(size <= 100 or count == 1 for count, size in most)
    assert 1 <= len(opened) <= LANES  # a stream is used again and again
    with lanes.lane("cpu", 1 << 60):
        assert len(opened) <= LANES


def test_a_lane_that_fails_lets_the_next_one_in() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "stream_context", lambda _: threading.Lock())
        lanes = Lanes(room=1)
        for _ in range(2 * LANES):
            with pytest.raises(ZeroDivisionError), lanes.lane("cuda", 5):
                raise ZeroDivisionError


def test_tiles_on_a_device_are_large_and_several_fit_on_the_host_and_on_the_device() -> None:
    roomy = limits_of(4 * GIB, uses_torch=True, device=64 * GIB)
    assert roomy.tile == roomy.usual_tile(patterns=True) == DEVICE_TILE_ELEMENTS == 1 << 24
    assert limits_of(GIB, uses_torch=True, device=64 * GIB).usual_tile(patterns=True) > 1 << 23
    for limits in (roomy, limits_of(GIB, uses_torch=True, device=GIB), Limits(1 << 20, device=GIB)):
        for patterns in (True, False):
            elements = limits.usual_tile(patterns=patterns)
            assert LANES * elements * 64 <= (limits.device or 0)
            assert LANES * elements * limits.element_bytes(patterns=patterns) <= limits.memory
            assert elements <= limits.largest_tile(patterns=patterns)
    assert limits_of(GIB, uses_torch=True).usual_tile() == 1 << 18


def test_free_memory_is_told_in_powers_of_two_and_of_a_device_that_is_there() -> None:
    assert [power_of_two_within(number) for number in (1, 2, 3, 4, 1023, 1024)] == [1, 2, 2, 4, 512, 1024]
    assert free_bytes("cpu") is None
    if not torch.cuda.is_available():
        assert free_bytes("cuda") is None
        return
    free = free_bytes("cuda")
    assert free is not None
    assert free <= torch.cuda.mem_get_info()[0]
    assert free & (free - 1) == 0


def test_a_block_that_the_device_has_no_room_for_is_decided_on_the_cpu_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = CASES["columns as blocks"]
    save_file({"w.weight": torch.ones(2048, 16)}, tmp_path / "model.safetensors")
    pretend(monkeypatch, room=1 << 16)
    (tmp_path / "spec.toml").write_text(spec.replace("nnz = 9", 'nnz = 9\nmode = "soft"'))
    words = ("apply", tmp_path / "model.safetensors", tmp_path / "spec.toml", "--device", "cuda")
    said = refused(*words)
    assert said.err.endswith(
        "a block has 2048 elements, which must be in memory together and take 131.07 kB of the device, of "
        "which about 65.54 kB are free; say --device cpu\n"
    )


def test_a_run_is_continued_only_where_as_much_of_the_device_is_free(tmp_path: Path) -> None:
    spec, tensors = CASES["2:4"]
    prepare(tmp_path, spec, tensors(torch.float32))
    asked, target = source(tmp_path / "in", tmp_path / "spec.toml", None), Target(tmp_path / "out")
    found = []
    for room in (1 << 30, 1 << 30, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            pretend(patch, room)
            found.append(pruning.identity_of(pruning.prepare(asked, target, machine("cuda")))["the options"])
    assert found[0] == found[1] != found[2]


def test_ties_are_counted_from_the_end_of_their_scope() -> None:
    member = cast("Any", type("Member", (), {"shape": (4, 6)})())
    place = Place(member, Part((5, 8), (2, 3)), (4, 6), before=10)
    numbers = [10 + row * 6 + column for row in (1, 2) for column in (2, 3, 4)]
    assert place.countdown(100, "cpu").tolist() == [99 - number for number in numbers]
