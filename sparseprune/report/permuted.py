"""What `permute` moved, or would: parts of the results of `plan` and `apply`, and lines for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sparseprune.report.wording import many, some_of
from sparseprune.results.pruning import PermutedModule, PlannedPermutation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sparseprune.execution.permutable import Permutation, Permutations
    from sparseprune.execution.permuting import Found
    from sparseprune.results.pruning import UnmovedModule

_KINDS = {"mlp": "MLP", "heads": "attention"}


def planned_permutations(permutations: Permutations) -> tuple[PlannedPermutation, ...]:
    """The modules whose units will be permuted."""
    return tuple(PlannedPermutation(**_of(one)) for one in permutations.found)


def permuted_modules(found: Iterable[Found]) -> tuple[PermutedModule, ...]:
    """The modules whose units were permuted, and what came of it."""
    return tuple(
        PermutedModule(**_of(one.permutation), pruned_before=one.before, pruned_after=one.after)
        for one in found
    )


def _of(one: Permutation) -> dict[str, Any]:
    interior = one.interior
    return {
        "module": interior.module,
        "kind": interior.kind,
        "orders": interior.sets,
        "units": interior.size,
        "tensors": one.tensors,
    }


def planned_text(found: Sequence[PlannedPermutation]) -> str:
    """How many modules of each kind, and what moves in them."""
    counts = Counter(one.kind for one in found)
    kinds = ", ".join(many(count, f"{_KINDS[kind]} module") for kind, count in sorted(counts.items()))
    units = sum(one.orders * one.units for one in found)
    tensors = len({name for one in found for name in one.tensors})
    return f"{kinds}: {units:,} units in {many(tensors, 'tensor')}"


def unmoved_texts(found: Sequence[UnmovedModule]) -> Iterator[str]:
    """For each reason how many modules have it, with an example."""
    alike: dict[str, list[str]] = {}
    for one in found:
        alike.setdefault(one.reason.replace(f"{one.module}.", ""), []).append(one.module)
    for reason, modules in alike.items():
        yield f"{some_of(modules)}: {reason}"


def permuted_lines(permuted: Sequence[PermutedModule], unmoved: Sequence[UnmovedModule]) -> Iterator[str]:
    """What a run permuted and what not, for people."""
    if permuted:
        before = sum(one.pruned_before for one in permuted) / len(permuted)
        after = sum(one.pruned_after for one in permuted) / len(permuted)
        yield (
            f"permuted {planned_text(permuted)}; there {after:.1%} of the scores are pruned, "
            f"{before:.1%} in the old order"
        )
        yield "the dense model computes the same in that order: compare by permutations.safetensors"
    for text in unmoved_texts(unmoved):
        yield f"not permuted {text}"
