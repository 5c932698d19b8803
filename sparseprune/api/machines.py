"""The machines of a cluster that run a model for `calibrate`: CPUs or GPUs, and the room for sums.

Called by calibrating, which has loaded the model here to plan.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

from sparseprune.errors import MachineError

if TYPE_CHECKING:
    from sparseprune.api.run import Run
    from sparseprune.calibration import LoadedModel, Machines
    from sparseprune.execution.cluster import Cluster


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
