"""What machines of a cluster must have in common: versions of software, and the kind of processor.

Refuses machines of another version before any work. Called when a cluster is joined.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparseprune.errors import MachineError, one_of_many

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sparseprune.execution.cluster import Cluster, Node

_PACKAGES = ("sparseprune", "torch", "numpy", "numba", "transformers")
_NEEDED = frozenset({"sparseprune", "torch", "numpy", "numba"})
_WIDTHS = ("avx512f", "avx2", "asimd")  # flags of processors that sum in other orders


def refuse_unlike(cluster: Cluster) -> tuple[str, ...]:
    """MachineError where a machine has other versions than this process; lines on unlike processors.

    The bytes of a run are those of one machine only where every version is the same.
    """
    probe = _prober(_PACKAGES, _WIDTHS)
    here = probe()
    found = cluster.on_each(probe)
    lines = [line for node, there in found.items() for line in _unlike(node, here, there)]
    if lines:
        raise MachineError(one_of_many(lines))
    return tuple(_processors(found))


def _unlike(node: Node, here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    for name, own in here["versions"].items():
        other = there["versions"].get(name)
        if own is not None and other != own and (other is not None or name in _NEEDED):
            has = "no" if other is None else "another"
            found = "" if other is None else f" {other}"
            yield (
                f"machine {node.name} has {has} {name}{found}, this one {own}; install the same everywhere"
            )


def _processors(found: Mapping[Node, Mapping[str, Any]]) -> Iterator[str]:
    """A line where rebuilt weights may depend on which machine rebuilt them."""
    kinds: dict[str, str] = {}
    for node, one in found.items():
        kinds.setdefault(one["processor"], node.name)
    if len(kinds) > 1:
        some = ", ".join(f"{kind} on {name}" for kind, name in kinds.items())
        yield (
            f"the machines have unlike processors ({some}): rebuilt weights may differ in their last "
            "bits from one run to the next; no others do"
        )


def _prober(packages: tuple[str, ...], widths: tuple[str, ...]) -> Callable[[], dict[str, Any]]:
    """A function that machines can run where this package is missing or another one."""

    def probe() -> dict[str, Any]:
        import importlib.metadata  # noqa: PLC0415  (it runs elsewhere)
        import pathlib  # noqa: PLC0415
        import platform  # noqa: PLC0415
        import sys  # noqa: PLC0415

        def version(name: str) -> str | None:
            try:
                if name == "sparseprune":
                    import sparseprune  # noqa: PLC0415

                    return str(sparseprune.__version__)
                return importlib.metadata.version(name)
            except ImportError:
                return None

        try:
            flags = set(pathlib.Path("/proc/cpuinfo").read_text(errors="replace").split())
        except OSError:
            flags = set()
        wide = next((width for width in widths if width in flags), "")
        versions = {"Python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
        return {
            "versions": {**versions, **{name: version(name) for name in packages}},
            "processor": " ".join(filter(None, [platform.machine(), wide])),
        }

    return probe
