"""A cluster whose machines are this process: what would be sent is pickled, and batches may be lost."""

import pickle
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Self

from sparseprune.execution.cluster import Node


class Kept:
    """A value that each machine gets once."""

    def __init__(self, value: object) -> None:
        self._value = pickle.dumps(value)

    def get(self) -> Any:
        return pickle.loads(self._value)


class Here:
    """As `Cluster`; with `losing` every batch is lost after its first news, and done again."""

    losing = False
    gpus = 0

    def __init__(self, address: str = "auto", jobs: int | None = None) -> None:
        self.nodes = (Node("1", "first", jobs or 1), Node("2", "second", jobs or 1))
        self.sent: list[Any] = []
        self.lost = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    def share(self, value: object) -> Kept:
        return Kept(value)

    def on_each(self, work: Callable[..., Any], *arguments: Any) -> dict[Node, Any]:
        return {node: work(*pickle.loads(pickle.dumps(arguments))) for node in self.nodes}

    def run(
        self, work: Callable[[Any], Any], batches: Iterable[Any], **_: int
    ) -> Generator[tuple[int, Any], None, None]:
        for number, batch in enumerate(batches):
            if batch is None:
                return
            yield number, pickle.loads(pickle.dumps(work(self._taken(batch))))

    def stream(
        self,
        work: Callable[[Any], Iterator[Any]],
        batches: Iterable[Any],
        again: Callable[[int], Any],
        **_: int,
    ) -> Generator[tuple[int, Any], None, None]:
        for number, batch in enumerate(batches):
            rest = batch
            if self.losing:
                *heard, last = work(self._taken(batch))
                for result in heard[:1]:
                    yield number, result
                self.lost += last is not None
                rest = again(number)
            if rest is not None:
                for result in work(self._taken(rest)):
                    yield number, pickle.loads(pickle.dumps(result))

    def _taken(self, batch: Any) -> Any:
        self.sent.append(batch)
        return pickle.loads(pickle.dumps(batch))
