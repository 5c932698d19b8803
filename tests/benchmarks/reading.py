"""How a checkpoint is best read and its output best written: the calls of the system side by side, in GB/s.

Run by hand: `python -m tests.benchmarks.reading SCRATCH`. Pages of the input are in the cache; output
counts until it is on the disk. Medians within one run, numpy only.
"""

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Way = Callable[[Path, list[range], int], None]  # path, the offsets of each thread, bytes of a slab

KIB, MIB = 1 << 10, 1 << 20
SLABS = {"256 KiB": 256 * KIB, "1 MiB": MIB, "4 MiB": 4 * MIB, "16 MiB": 16 * MIB}
FLUSH_SECONDS = 0.01


def consume(slab: Bytes) -> None:
    """What every way of reading does to a slab at the end: one pass over it, at the speed of memory."""
    np.bitwise_or.reduce(slab.view(np.uint64))


def read_into_buffer(path: Path, threads: list[range], slab: int) -> None:
    """Preadv into a buffer that each thread keeps."""
    descriptor = os.open(path, os.O_RDONLY)

    def work(offsets: range) -> None:
        buffer = np.empty(slab, np.uint8)
        for offset in offsets:
            os.preadv(descriptor, [buffer.data], offset)
            consume(buffer)

    side_by_side(work, threads)
    os.close(descriptor)


def copy_from_map(path: Path, threads: list[range], slab: int) -> None:
    """A fresh mapping, copied into a buffer that each thread keeps."""
    mapped = np.memmap(path, np.uint8, mode="r")

    def work(offsets: range) -> None:
        buffer = np.empty(slab, np.uint8)
        for offset in offsets:
            np.copyto(buffer, mapped[offset : offset + slab])
            consume(buffer)

    side_by_side(work, threads)


def use_map(path: Path, threads: list[range], slab: int) -> None:
    """A fresh mapping, used where it lies."""
    mapped = np.memmap(path, np.uint8, mode="r")

    def work(offsets: range) -> None:
        for offset in offsets:
            consume(mapped[offset : offset + slab])

    side_by_side(work, threads)


def write_from_buffer(path: Path, threads: list[range], slab: int) -> None:
    """Pwrite from a buffer that each thread keeps."""
    descriptor = os.open(path, os.O_WRONLY)

    def work(offsets: range) -> None:
        buffer = np.full(slab, 1, np.uint8)
        for offset in offsets:
            os.pwrite(descriptor, buffer.data, offset)

    side_by_side(work, threads)
    os.close(descriptor)


def write_to_map(path: Path, threads: list[range], slab: int) -> None:
    """A shared mapping of the output, filled from a buffer that each thread keeps."""
    mapped = np.memmap(path, np.uint8, mode="r+")

    def work(offsets: range) -> None:
        buffer = np.full(slab, 1, np.uint8)
        for offset in offsets:
            np.copyto(mapped[offset : offset + slab], buffer)

    side_by_side(work, threads)


READING: dict[str, Way] = {
    "`preadv` into a buffer": read_into_buffer,
    "`mmap`, copied": copy_from_map,
    "`mmap`, in place": use_map,
}
WRITING: dict[str, Way] = {"`pwrite`": write_from_buffer, "shared `mmap`": write_to_map}


def side_by_side(work: Callable[[range], None], threads: list[range]) -> None:
    """The work of each thread; what one of them raises is raised."""
    with ThreadPoolExecutor(len(threads)) as pool:
        list(pool.map(work, threads))


def offsets(size: int, slab: int, threads: int) -> list[range]:
    """Where each thread's slabs begin: they take turns, so that all go through the file together."""
    return [range(thread * slab, size, threads * slab) for thread in range(threads)]


@contextmanager
def flushing(path: Path) -> Iterator[None]:
    """A thread that has the disk write what is there, again and again."""
    done = threading.Event()
    descriptor = os.open(path, os.O_RDWR)

    def flush() -> None:
        while not done.wait(FLUSH_SECONDS):
            os.fdatasync(descriptor)

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        os.close(descriptor)


def read_rate(way: Way, path: Path, threads: int, slab: int) -> float:
    """Bytes a second."""
    size = path.stat().st_size
    began = time.perf_counter()
    way(path, offsets(size, slab, threads), slab)
    return size / (time.perf_counter() - began)


def write_rate(way: Way, path: Path, size: int, threads: int, flushed: bool, slab: int) -> float:
    """Bytes a second of a fresh file that has its length from the start, its sync included."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    os.sync()
    began = time.perf_counter()
    if flushed:
        with flushing(path):
            way(path, offsets(size, slab, threads), slab)
    else:
        way(path, offsets(size, slab, threads), slab)
    os.sync()
    rate = size / (time.perf_counter() - began)
    path.unlink()
    return rate


def print_table(header: str, measure: Mapping[str, Callable[[int], float]], rounds: int) -> None:
    """GB/s of every row at every slab size; rows take turns, so that what drifts meets them all."""
    rates: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for slab_name, slab in SLABS.items():
            for row, rate in measure.items():
                rates.setdefault((row, slab_name), []).append(rate(slab) / 1e9)
    print(f"\n| {header} | {' | '.join(SLABS)} |\n|{'---|' * (header.count('|') + 1 + len(SLABS))}")
    for row in measure:
        print(f"| {row} | {' | '.join(f'{median(rates[row, slab]):.2f}' for slab in SLABS)} |")


def main() -> None:
    """Print one table for reading and one for writing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    most = max(SLABS.values())
    size = max(1, round(asked.gigabytes * 1e9 / most)) * most
    path = asked.scratch / "reading.bin"
    drawn = np.random.default_rng(0).integers(0, 256, most, np.uint8)
    with path.open("wb") as file:
        for _ in range(size // most):
            file.write(drawn)
    os.sync()
    reading = {
        f"{name} | {threads}": partial(read_rate, way, path, threads)
        for name, way in READING.items()
        for threads in (1, 2)
    }
    print_table("reading | threads", reading, asked.rounds)
    writing = {
        f"{name} | {threads} | {flushed}": partial(write_rate, way, path, size, threads, flushed == "yes")
        for name, way in WRITING.items()
        for threads in (1, 2)
        for flushed in ("no", "yes")
    }
    print_table("writing | threads | `fdatasync` meanwhile", writing, asked.rounds)


if __name__ == "__main__":
    main()
