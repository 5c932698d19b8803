"""Chunks that are done in another process: what they read they read there, what they write they send back."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from sparseprune.checkpoint import TensorReader
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.runner import Runner
from sparseprune.execution.tensor_io import TensorIO

MOST = 20_000  # bytes of a chunk that is plain


@dataclass
class Sent:
    """What was written: the method of an output and its arguments."""

    writes: list[tuple[Any, ...]] = field(default_factory=list)

    def write_weight(self, name: str, begin: int, data: memoryview) -> None:
        self.writes.append(("write_weight", name, begin, bytes(data)))

    def write_mask(self, name: str, first: int, keep: memoryview) -> None:
        self.writes.append(("write_mask", name, first, bytes(keep)))

    def copy(self, part: object) -> None:
        self.writes.append(("copy", part))


class PoolRunner(Runner):
    """A runner whose chunks are done by the processes of `pool`."""

    pool: ClassVar[ProcessPoolExecutor]
    done: ClassVar[list[str]] = []

    def do(self, current: Pass, chunk: Chunk, io: TensorIO) -> Any:
        assert len(pickle.dumps(chunk)) < MOST
        work = pickle.dumps((current, chunk, dict(io.tensors), io.device))
        partial, writes = pickle.loads(self.pool.submit(do, work).result())
        for method, *arguments in writes:
            getattr(io.output, method)(*arguments)
        self.done.append(type(current).__name__)
        return partial


def do(work: bytes) -> bytes:
    """A pickled pass with its chunk and tensors; gives the partial result and what was written."""
    current, chunk, tensors, device = pickle.loads(work)
    sent = Sent()
    with TensorReader() as reader:
        partial = current.work(chunk, TensorIO(reader, cast("Any", sent), tensors, device))
    return pickle.dumps((partial, sent.writes))


def one_thread() -> None:
    """As the runner has it: sums of products depend on how many threads share them."""
    import torch

    torch.set_num_threads(1)
