"""`demo`: a checkpoint that it makes itself, pruned twice with the commands that a user would type."""

from __future__ import annotations

import shlex
from contextlib import chdir
from pathlib import Path

from sparseprune.cli import apply, inspect
from sparseprune.cli.demo_checkpoint import write_decoder
from sparseprune.cli.options import default_jobs, default_memory
from sparseprune.cli.request import Request
from sparseprune.cli.stopping import temporary_folder
from sparseprune.errors import CheckpointError

_DENSE = Path("decoder")
_STEPS = (
    ("Keep 2 of every 4 neighbours in every projection:", "2of4", "half"),
    ("Prune a quarter of the MLP channels, fused over three matrices:", "decoder-mlp-channels", "channels"),
)


def run(folder: Path | None) -> None:
    """Make, prune, inspect; in a new folder that is kept, or in one that is gone afterwards."""
    if folder is None:
        with temporary_folder("sparseprune-demo-") as temporary:
            _demo(Path(temporary))
        print("\nAll of it was in a temporary folder; `sparseprune demo FOLDER` keeps it.")
        return
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; name a folder that is not there yet")
    folder.mkdir(parents=True)
    _demo(folder)
    print(f"\nAll of it is in {folder}.")


def _demo(folder: Path) -> None:
    with chdir(folder):
        parameters = write_decoder(_DENSE)
        print(f"A decoder of {parameters:,} random parameters, in two shards: {_DENSE}")
        for title, spec, name in _STEPS:
            output = Path(f"{_DENSE}-{name}")
            print(f"\n{title}\n")
            _show("apply", _DENSE, spec, "-o", output)
            apply.run(
                Request(
                    checkpoint=_DENSE,
                    spec=spec,
                    output=output,
                    device="cpu",
                    jobs=default_jobs(),
                    memory=default_memory(),
                    mask_format="bool",
                )
            )
            print()
            _show("inspect", output)
            inspect.run(inspect.InspectRequest(output, jobs=default_jobs(), quiet=True))


def _show(*words: object) -> None:
    print(f"$ sparseprune {shlex.join(map(str, words))}", flush=True)
