"""The parts of cuda.py that need torch: selection, ADMM, calibration, shipped specs on small models."""

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sparseprune import BlockSpec, ScopeSpec
from sparseprune.engine.energies import errors_of
from sparseprune.engine.matrices import Matrix
from sparseprune.engine.projections import projection
from sparseprune.engine.reconstruction import admm
from sparseprune.engine.scoring import magnitude_keys
from sparseprune.engine.selection import select
from tests.benchmarks import decoders
from tests.benchmarks.cuda import Bout, Line, same_files
from tests.benchmarks.pipeline import SPARSEPRUNE
from tests.benchmarks.processes import measure
from tests.benchmarks.reconstruction_measures import texts
from tests.families.checkpoints import Checkpoint, make, write_statistics
from tests.families.test_library import OPTIONS, SERVED

BLOCKS = (4, 16, 64, 4096)
CLOSE = 0.02  # of output errors of rebuilt weights: sums of products have another order on a device
ALIKE = 1e-3  # of second moments, in the Frobenius norm


def bytes_of_specs(bout: Bout) -> Iterator[Line]:
    """Shipped specs on small models | on | as on the CPU | output error, CPU | device"""
    home = bout.folder("specs")
    made: dict[str, Checkpoint] = {}
    for spec in SERVED:
        if not bout.has_time(spec, 5):
            continue
        family = SERVED[spec][0]
        dense = made[family] = made.get(family) or make(family, home)
        place = bout.folder(f"specs-{spec}")
        write_statistics(dense, place)
        reports = []
        with contextlib.chdir(place):
            for number, device in enumerate(("cpu", bout.device)):
                words = ("apply", dense.folder, spec, *OPTIONS.get(spec, ()), "--device", device)
                sparseprune(*words, "-o", place / str(number))
                reports.append(json.loads((place / str(number) / "sparseprune/report.json").read_text()))
        errors = [report["totals"].get("output_error") for report in reports]
        if errors[0] is None:
            holds = same_files(place / "0", place / "1")
        else:
            holds = abs(errors[1] - errors[0]) <= CLOSE * errors[0]
        shown = ["" if error is None else f"{error:.4f}" for error in errors]
        yield spec, reports[1]["device"], bout.check(f"{spec} on {family}", holds=holds), *shown


def selection(bout: Bout) -> Iterator[Line]:
    """Selection of half the blocks of every scope | as on the CPU | ms | GB/s of keys"""
    count = 1 << (16 if bout.small else 24)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        keys = magnitude_keys(torch.randn(count, generator=generator).to(dtype))
        there = keys.to(bout.device)
        for blocks in (*BLOCKS, count):
            what = f"{count // blocks:,} scopes of {blocks:,}, {str(dtype).removeprefix('torch.')}"
            if not bout.has_time(what, 10):
                continue
            found = select(there.view(-1, blocks), blocks // 2).cpu()
            holds = torch.equal(found, select(keys.view(-1, blocks), blocks // 2))
            seconds = timed(partial(select, there.view(-1, blocks), blocks // 2), bout.device)
            rate = f"{keys.nbytes / seconds / 1e9:.1f}"
            yield what, bout.check(what, holds=holds), f"{1000 * seconds:.2f}", rate


def solver(bout: Bout) -> Iterator[Line]:
    """ADMM at 2:4 | metric | on | seconds | error in that metric"""
    sizes = (64, 128) if bout.small else (1024, 4096)
    for size in sizes:
        for metric in ("outputs", "loss"):
            errors = []
            for device in bout.devices:
                what = f"{size}x{size}, {metric}, {device}"
                slow = device == "cpu" and size == sizes[-1] and not bout.small
                if slow or not bout.has_time(what, 60 if device == "cpu" else 30):
                    continue
                seconds, error = rebuilt(size, metric, device)
                errors.append(error)
                if len(errors) == 2:
                    bout.check(what, holds=abs(errors[1] - errors[0]) <= CLOSE * errors[0])
                yield f"{size}x{size}", metric, device, f"{seconds:.2f}", f"{error:.4f}"


def rebuilt(size: int, metric: str, device: str) -> tuple[float, float]:
    """Seconds of the second of two runs, the first of which may compile and allocate, and the error."""
    generator = torch.Generator().manual_seed(size)

    def moment() -> torch.Tensor:
        mixed = torch.randn(2 * size, size, generator=generator).cumsum(1)
        rows = mixed + torch.randn(2 * size, size, generator=generator) * size**0.5 / 4
        product: torch.Tensor = rows.T @ rows / len(rows)
        return product.to(device)

    dense = torch.randn(size, size, generator=generator).to(device)
    matrix = Matrix(dense, moment(), gradients=moment() if metric == "loss" else None)
    param = torch.empty_like(dense)
    project = projection(ScopeSpec(BlockSpec(param, (1, 1)), (1, 4)), 2, [param])
    seconds = timed(lambda: admm([matrix], project), device, rounds=1)
    errors = errors_of(matrix, admm([matrix], project)[0].weights)
    return seconds, (errors.outputs if errors.loss is None else errors.loss)[0]


def calibration(bout: Bout) -> Iterator[Line]:
    """`calibrate` of a random Llama | on | seconds | tokens/s | moments, relative change"""
    home = bout.folder("calibration")
    text, _ = texts(home)
    dense = random_llama(home / "dense", text, small=bout.small)
    sizes = ("--length", decoders.LENGTH, "--sequences", 8 if bout.small else 256)
    found: list[dict[str, torch.Tensor]] = []
    for device in bout.devices:
        if not bout.has_time(f"calibrate on {device}", 60):
            continue
        out = home / f"stats-{len(found)}"
        words = map(str, ("calibrate", dense, "--text", text, *sizes, "--device", device, "-o", out))
        taken = measure([*SPARSEPRUNE, *words], home / "log")
        if taken.failure:
            bout.failed.append(f"calibrate on {device}")
            yield dense.name, taken.failure, "", "", (home / "log").read_text()[-200:]
            continue
        report = json.loads((out / "sparseprune/report.json").read_text())
        found.append(load_file(out / "statistics.safetensors"))
        alike = ""
        if len(found) == 2:
            alike = f"{(change := most_changed(*found)):.1e}"
            bout.check("moments of the device", holds=change <= ALIKE)
        rate = f"{report['tokens'] / report['seconds']:,.0f}"
        yield dense.name, report["device"], f"{report['seconds']:.1f}", rate, alike


def sweeping(bout: Bout) -> Iterator[Line]:
    """`apply --text`, then `eval`, of a small random Llama | on | seconds | output error | KL to dense"""
    home = bout.folder("sweeping")
    text, _ = texts(home)
    dense = random_llama(home / "dense", text, small=True)
    asked = ("--text", text, "--length", decoders.LENGTH, "--sequences", 16, "--json")
    found: list[dict[str, float]] = []
    for device in bout.devices:
        what = f"apply --text on {device}"
        if not bout.has_time(what, 60):
            continue
        out = home / f"swept-{len(found)}"
        began = time.perf_counter()
        swept = told("apply", dense, "2of4", "--reconstruct", "admm", *asked, "--device", device, "-o", out)
        judged = told("eval", out, "--against", dense, *asked, "--device", device)
        seconds = time.perf_counter() - began
        found.append({"error": swept["totals"]["output_error"], "kl": judged["kl"]})
        if len(found) == 2:
            for name, on_host in found[0].items():
                holds = abs(found[1][name] - on_host) <= CLOSE * abs(on_host)
                bout.check(f"{name} of {what}", holds=holds)
        yield dense.name, device, f"{seconds:.1f}", *(f"{one:.3g}" for one in found[-1].values())


def told(*words: object) -> Any:
    """The result of a command as JSON."""
    done = subprocess.run([*SPARSEPRUNE, *map(str, words), "-q"], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def random_llama(folder: Path, text: Path, *, small: bool) -> Path:
    import transformers

    own: Any = transformers
    torch.manual_seed(0)
    tokenizer = decoders.characters(text)
    width = 64 if small else 2048
    config = own.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2 if small else 8,
        num_attention_heads=max(1, width // 128),
        num_key_value_heads=max(1, width // 256),
        max_position_embeddings=decoders.LENGTH,
        initializer_range=width**-0.5,
    )
    return decoders.saved(own.LlamaForCausalLM(config), tokenizer, folder)


def most_changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """The largest relative change of a tensor; infinity where names differ."""
    if before.keys() != after.keys():
        return float("inf")
    ratios = [
        (after[name].double() - one.double()).norm() / one.double().norm() for name, one in before.items()
    ]
    return float(max(ratios))


def sparseprune(*words: object) -> None:
    subprocess.run([*SPARSEPRUNE, *map(str, words), "-q"], check=True, stdout=subprocess.DEVNULL)


def timed(work: Callable[[], object], device: str, rounds: int = 5) -> float:
    """Seconds of the fastest of some rounds, after one that is not counted."""
    seconds = []
    for _ in range(1 + rounds):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def quiet(bout: Bout) -> None:
    """No hints of transformers; which device there is."""
    decoders.quiet()
    if bout.device != "cpu":
        free, whole = torch.cuda.mem_get_info(bout.device)
        name = torch.cuda.get_device_name(bout.device)
        print(f"\n{name}, {free >> 20:,} of {whole >> 20:,} MiB free, torch {torch.__version__}")
