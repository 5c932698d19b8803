"""Runs that halt in front of blocks, and states that wait in memory or in files."""

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseprune.calibration import LoadedModel, load_model
from sparseprune.calibration.runs import Parking, Run, Stream, halting, outputs_of
from sparseprune.calibration.stages import Depths, Following
from sparseprune.checkpoint import TensorReader, open_checkpoint
from sparseprune.errors import SparsepruneError
from tests.calibration.models import save, tokenizer
from tests.families import zoo

pytestmark = pytest.mark.usefixtures("quiet_transformers")


class Twice(torch.nn.Module):
    """Two blocks, the second of which also gets what the caller has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
        for number, block in enumerate(self.blocks):
            halting(f"blocks.{number}", block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.blocks[1](self.blocks[0](x)) + x
        return found


@contextmanager
def run_of(forward: Any) -> Iterator[Run]:
    run = Run(forward)
    try:
        yield run
    finally:
        run.drop()


def states(run: Run) -> list[torch.Tensor]:
    return [one for one in run.args if isinstance(one, torch.Tensor)]


def test_a_run_halts_in_front_of_each_block_and_ends_with_the_result() -> None:
    model, x = Twice(), torch.randn(3, 4)
    wanted = model(x)
    with run_of(lambda: model(x)) as run:
        for name in ("blocks.0", "blocks.1"):
            assert run.at == name
            assert not run.ended
            run.go(outputs_of(model.get_submodule(name), run))
        assert run.ended
        assert run.at is None
        assert torch.equal(run.result, wanted)


def test_an_error_in_the_pass_is_raised_where_it_is_waited_for() -> None:
    model = Twice()
    with run_of(lambda: model(torch.ones(1, 4))) as run:
        run.go(torch.ones(1, 4))
        with pytest.raises(RuntimeError, match="must match the size"):
            run.go(torch.ones(7, 7))
        assert run.ended


def test_a_dropped_run_leaves_no_thread() -> None:
    before = threading.active_count()
    run = Run(lambda: Twice()(torch.ones(1, 4)))
    assert threading.active_count() == before + 1
    run.drop()
    run._thread.join(5)
    assert threading.active_count() == before


def test_batches_that_meet_other_blocks_are_told() -> None:
    model = Twice()
    forwards = [partial(model, torch.ones(1, 4)), partial(model.blocks[1], torch.ones(1, 4))]
    said = r"some sequences meet blocks\.0 where others meet blocks\.1"
    with Stream(forwards, parking()) as stream, pytest.raises(SparsepruneError, match=said):
        _ = stream.at


def parking(folder: Path = Path("/nowhere"), room: int = 1 << 20) -> Parking:
    return Parking(folder, room)


def test_states_wait_in_memory_up_to_the_room_and_then_in_files(tmp_path: Path) -> None:
    model = Twice()
    place = parking(tmp_path, room=3 * 4 * 4)
    inputs = [torch.full((3, 4), float(number)) for number in range(3)]
    with Stream([partial(model, x) for x in inputs], place) as stream:
        assert len([*tmp_path.iterdir()]) == 2
        assert [one.untyped_storage().nbytes() for one in inputs] == [48, 0, 0]
        for number in range(3):
            (found,) = states(stream.given(number))
            assert torch.equal(found, torch.full((3, 4), float(number)))
            stream.keep(number)
        assert sum(one.untyped_storage().nbytes() for one in inputs) == 48


def test_what_two_runs_have_stays_in_memory(tmp_path: Path) -> None:
    shared, own = torch.ones(2, 4), torch.full((2, 4), 2.0)
    mask = torch.zeros(2, 4)

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x + mask

    block = Block()
    halting("block", block)
    with Stream([lambda: block(shared, mask), lambda: block(own, mask)], parking(tmp_path, room=0)) as stream:
        assert torch.equal(mask, torch.zeros(2, 4))
        assert [one.untyped_storage().nbytes() for one in (shared, own)] == [0, 0]
        for number, wanted in enumerate((1.0, 2.0)):
            run = stream.given(number)
            assert torch.equal(run.args[0], torch.full((2, 4), wanted))
            assert torch.equal(run.args[1], torch.zeros(2, 4))
            stream.keep(number)


def test_tensors_of_the_model_stay_where_they_are(tmp_path: Path) -> None:
    model = Twice()
    table = torch.ones(2, 4)
    place = Parking(tmp_path, 0, [table])
    with Stream([lambda: model(table)], place):
        assert torch.equal(table, torch.ones(2, 4))
        assert not [*tmp_path.iterdir()]


def loaded_of(name: str, folder: Path, reader: TensorReader) -> LoadedModel:
    (species,) = (one for one in zoo.ZOO if one.name == name)
    saved = zoo.save(species, folder)
    tokenizer().save_pretrained(saved)
    return load_model(open_checkpoint(saved), "cpu", reader)


@pytest.mark.parametrize(
    ("name", "room"),
    [
        *((name, 0) for name in "llama gemma3n_text zamba2 bart mllama".split()),
        *((name, 1 << 30) for name in "llama deepseek_v3 t5 albert".split()),
    ],
)
def test_streamed_outputs_are_those_of_the_whole_model(name: str, room: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(4, 50, shape, generator=generator) for shape in ((2, 24), (1, 17))]
    with TensorReader() as reader, torch.no_grad():
        loaded = loaded_of(name, tmp_path, reader)
        read, blocks = loaded.read(reader), loaded.blocks
        place = Parking(tmp_path, room, [*loaded.model.parameters(), *loaded.model.buffers()])
        with Stream([partial(loaded.forward, ids) for ids in batches], place) as stream:
            while (at := stream.at) is not None:
                assert not any(one.is_meta for one in blocks.load(at, read).values())
                for number in range(len(stream)):
                    stream.go(number, outputs_of(blocks.modules[at], stream.given(number)))
                blocks.free(at)
            found = [stream.result(number).logits for number in range(len(stream))]
        for block in blocks.names:
            blocks.load(block, read)
        for ids, logits in zip(batches, found, strict=True):
            assert torch.equal(loaded.forward(ids).logits, logits)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="the system does not tell")
def test_blocks_that_were_freed_leave_no_memory_behind(tmp_path: Path) -> None:
    import transformers

    kind: Any = transformers.LlamaConfig
    small = {"hidden_size": 384, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 64}
    saved = save(transformers.LlamaForCausalLM(kind(**small, num_hidden_layers=2)), tmp_path / "model")
    with TensorReader() as reader:
        loaded = load_model(open_checkpoint(saved), "cpu", reader)
        taken = []
        for _ in range(30):
            for name in loaded.blocks.names:
                loaded.blocks.load(name, loaded.read(reader))
                loaded.blocks.free(name)
            taken.append(own_memory())
    block = 4 * (4 * 384 * 384 + 3 * 384 * 512)  # bytes; two of them are loaded and freed each time
    assert taken[-1] - taken[4] < 5 * block  # one in ten that stays is too many


def own_memory() -> int:
    """Bytes of memory that are no pages of files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.parametrize("of", [Depths, lambda model: Following(model, lambda _: None, ["weight"])])
def test_a_watch_that_is_closed_waits_for_no_collector_of_cycles(of: Any) -> None:
    model = torch.nn.Linear(4, 4)
    watch = of(model)
    watch.begin(torch.ones(1, 3, dtype=torch.bool))
    gc.disable()
    try:
        with torch.no_grad(), watch:
            model(torch.ones(1, 3, 4)).add_(1)
        watch.close()
        gone = weakref.ref(watch)
        del watch
        assert gone() is None
    finally:
        gc.enable()
