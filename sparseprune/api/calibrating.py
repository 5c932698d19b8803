"""`calibrate`: from text and a checkpoint to statistics under their name.

Called by the public functions. Loads torch and transformers once all that can be refused without them is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from sparseprune import __version__
from sparseprune.api.run import digest, output_shown
from sparseprune.api.windows import folder_for_states
from sparseprune.checkpoint import TensorReader, make_output, open_checkpoint
from sparseprune.checkpoint.file_io import checkpoint_identity, refuse_changed
from sparseprune.checkpoint.folding import refuse_split
from sparseprune.checkpoint.statistics import ROUTING, lay_out_statistics, statistics_beside
from sparseprune.errors import MachineError, SparsepruneError
from sparseprune.results.measuring import (
    CollectedGradients,
    CollectedStatistics,
    RoutedExperts,
    Statistics,
    WithoutStatistics,
)

if TYPE_CHECKING:
    from pathlib import Path

    from sparseprune.api.run import Run
    from sparseprune.api.windows import Windows
    from sparseprune.calibration import Calibration, Counted, LoadedModel, Machines, Streaming
    from sparseprune.checkpoint import Collected, Output, StatisticsKind
    from sparseprune.execution.cluster import Cluster


class Collecting(Struct, frozen=True):
    """What text to run through which model, and where the statistics go.

    `memory` is bytes for second moments; `gradients` may be "alone", without moments of inputs; `scratch` is
    a folder for hidden states, None for a temporary one.
    """

    checkpoint: Path
    windows: Windows
    output: Path | None
    kind: StatisticsKind
    device: str
    memory: int
    gradients: bool | Literal["alone"] = False
    force: bool = False
    scratch: Path | None = None


def calibrate(run: Run, asked: Collecting) -> Statistics:
    """Read, plan, run the text through the model, and give the statistics their name."""
    if asked.gradients and asked.kind == "norm":
        raise SparsepruneError(
            "--gradients and --kind norm contradict each other: who reads gradients needs all second moments"
        )
    checkpoint = open_checkpoint(asked.checkpoint)
    refuse_split(checkpoint)
    if run.cluster is not None:
        from sparseprune.execution.spreading import refuse_other_files

        files = [(shard.path, shard.size) for shard in checkpoint.shards]
        files += [(checkpoint.path / one.path, one.nbytes) for one in checkpoint.others]
        refuse_other_files(run.cluster, files)
    source = checkpoint.path.absolute()
    target = asked.output or statistics_beside(source)
    # Before minutes are spent on a model.
    make_output(lay_out_statistics(checkpoint, target, asked.kind, ()), asked.force).refuse_early()
    documents = asked.windows.documents()
    run.note(f"loading the model of {asked.checkpoint}")
    # Not before something is said: this takes seconds.
    from sparseprune.calibration import Loss, Streaming, load_model, plan_calibration
    from sparseprune.execution.schedule import resolve_device

    device = "cpu" if run.cluster is not None else resolve_device(asked.device, uses_torch=True)
    with TensorReader() as reader, folder_for_states(asked.scratch) as folder:
        loaded = load_model(checkpoint, device, reader)
        machines = None
        if run.cluster is not None:
            loaded, machines = machines_for(run, run.cluster, asked.device, loaded)
        sequences = asked.windows.cut(run, documents, [loaded])
        run.note("finding out which matrices meet text")
        loss = Loss(asked.windows.seed) if asked.gradients else None
        streaming = Streaming(loaded, loaded.read(reader), sequences, folder)
        alone = asked.gradients == "alone"
        plan = plan_calibration(streaming, asked.kind, asked.memory, loss, alone=alone)
        if loaded.others and plan.without:
            others = " and ".join(loaded.others)
            run.note(
                f"text alone is fed: what takes {others} gets no statistics, such as {plan.without[-1][0]}"
            )
        run.note(plan.crowded)
        layout = lay_out_statistics(checkpoint, target, asked.kind, plan.tensors)
        output = make_output(layout, asked.force, _identity(asked, streaming, plan))
        return run.write(
            output,
            lambda _: _collected(run, asked, (streaming, plan, machines), output),
            lambda: refuse_changed(checkpoint, ()),
        )


def _identity(asked: Collecting, streaming: Streaming, plan: Calibration) -> dict[str, str]:
    """What an unfinished run must agree with to be continued, to the same bytes."""
    from sparseprune.calibration import plan_digest

    loaded, sequences = streaming.loaded, streaming.sequences
    drawn = hashlib.sha256(sequences.ids.numpy().tobytes() + sequences.counted.numpy().tobytes())
    length = sequences.ids.shape[1]
    memory = "--memory" if loaded.room is None else "--memory or what is free on the device"
    windows = asked.windows
    drawing = (windows.sequences, length, windows.seed, windows.special, windows.field)
    options = (*drawing, asked.kind, asked.gradients)
    return {
        "the version": __version__,
        "the versions of torch and transformers": loaded.versions,
        "the input": checkpoint_identity(loaded.checkpoint),
        "the options": json.dumps(options),
        "the text": json.dumps([list(sequences.ids.shape), drawn.hexdigest()]),
        memory: digest(plan_digest(plan)),
        "the device or its number of threads": loaded.machine,
    }


def _collected(
    run: Run,
    asked: Collecting,
    work: tuple[Streaming, Calibration, Machines | None],
    output: Output,
) -> Statistics:
    streaming, plan, _ = work
    loaded, sequences = streaming.loaded, streaming.sequences
    counted = _counted(run, asked.kind, work, output)
    return Statistics(
        input=str(asked.checkpoint),
        output=output_shown(asked.output, asked.checkpoint, output.layout),
        kind=asked.kind,
        device=loaded.place,
        seconds=round(run.seconds, 3),
        text=tuple(str(path) for path in asked.windows.text),
        sequences=len(sequences.ids),
        length=sequences.ids.shape[1],
        seed=asked.windows.seed,
        special=asked.windows.special,
        tokens=sequences.tokens,
        passes=plan.passes,
        matrices=tuple(
            CollectedStatistics(
                name=one.name,
                features=one.features,
                experts=one.experts,
                tokens=_one_or_all(one, counted[one.name].rows),
                divided_by=_one_or_all(one, counted[one.name].divisors),
                weights=dict(one.weights),
            )
            for one in plan.tensors
            if one.about == "inputs"
        ),
        gradients=tuple(
            CollectedGradients(
                name=one.name,
                weight=next(iter(one.weights)),
                outputs=one.features,
                groups=one.groups,
                experts=one.experts,
                tokens=_one_or_all(one, counted[one.name].rows),
            )
            for one in plan.tensors
            if one.about == "gradients"
        ),
        experts=tuple(_routed(one, counted[one.name]) for one in plan.tensors if one.about == "routing"),
        missing=tuple(loaded.missing),
        without=tuple(WithoutStatistics(name=name, why=why) for name, why in plan.without),
        without_gradients=tuple(
            WithoutStatistics(name=name, why=why) for name, why in plan.without_gradients
        ),
    )


def _counted(
    run: Run,
    kind: StatisticsKind,
    work: tuple[Streaming, Calibration, Machines | None],
    output: Output,
) -> dict[str, Counted]:
    """Run the text through the model, here or on machines."""
    from sparseprune.calibration import Gathering, Work, calibrate

    streaming, plan, machines = work
    if machines is not None:
        gathering = Gathering(machines, streaming, plan, output, kind)
        size = gathering.work
        with run.progress("calibrating", size.total, size.already, "tokens") as advance:
            return gathering.run(advance)
    size = Work.of(plan, streaming.sequences, output.finished)
    with run.progress("calibrating", size.total, size.already, "tokens") as advance:
        return calibrate(streaming, plan, output, kind, advance)


def _routed(one: Collected, counted: Counted) -> RoutedExperts:
    sums = dict(zip(ROUTING, zip(*counted.values, strict=True), strict=True))
    return RoutedExperts(
        name=one.name,
        weight=next(iter(one.weights)),
        tokens=tuple(map(int, sums["tokens"])),
        gate=sums["gate"],
        gated_norm=sums["gated_norm"],
    )


def _one_or_all(one: Collected, numbers: list[int]) -> int | tuple[int, ...]:
    return tuple(numbers) if one.experts is not None else numbers[0]


def machines_for(
    run: Run, cluster: Cluster, device: str, loaded: LoadedModel
) -> tuple[LoadedModel, Machines]:
    """A model as it runs there, and what runs it: each GPU where there are some, else each machine.

    A machine without GPUs is left out where others have some. All run with as many threads as the machine
    with the fewest CPUs has, so that sums do not depend on which machine makes them.

    Raises:
        MachineError: `device` asks for GPUs, and no machine has one.
    """
    from sparseprune.calibration import Elsewhere, Machines, cpu_machine

    if device != "cpu" and cluster.gpus:
        return _with_gpus(run, cluster, loaded)
    if device.startswith("cuda"):
        raise MachineError(f"--device {device}: no machine of this cluster has a GPU; leave it out")
    threads = min(node.cpus for node in cluster.nodes)
    there = dataclasses.replace(loaded, elsewhere=Elsewhere("cpu", cpu_machine(threads)))
    stream = partial(cluster.stream, cpus=threads)
    return there, Machines(len(cluster.nodes), threads, "cpu", cluster.share, stream)


def _with_gpus(run: Run, cluster: Cluster, loaded: LoadedModel) -> tuple[LoadedModel, Machines]:
    from sparseprune.calibration import Elsewhere, Machines, gpus_here, room_for_sums

    nodes = [node for node in cluster.nodes if node.gpus]
    found = cluster.on_each(gpus_here)
    gpus = [gpu for node in nodes for gpu in found[node]]
    if not gpus:
        raise MachineError(
            "--on: the cluster says that it has GPUs, and torch finds none there; say --device cpu"
        )
    names = sorted({name for name, _ in gpus})
    if len(names) > 1:
        run.warn(
            f"the machines have unlike GPUs ({', '.join(names)}): statistics may differ in their last bits "
            "from one run to the next"
        )
    largest = max((loaded.blocks.nbytes(name) for name in loaded.blocks.names), default=0)
    room = room_for_sums(min(nbytes for _, nbytes in gpus) - loaded.nbytes - largest)
    there = dataclasses.replace(loaded, elsewhere=Elsewhere("cuda", f"cuda:0 {names[0]}", room))
    threads = min(max(1, node.cpus // node.gpus) for node in nodes)
    stream = partial(cluster.stream, cpus=threads, gpus=1)
    return there, Machines(cluster.gpus, threads, "cuda", cluster.share, stream)
