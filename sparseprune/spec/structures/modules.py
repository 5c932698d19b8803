"""Whole modules that can go: routed experts and layers, with every tensor that belongs to them.

Experts are modules of a list or slices of stacks; layers are modules of a list.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING

from msgspec.structs import replace

from sparseprune.spec.naming import EXPERTS, LAYER_LISTS, NO_LAYERS, ROUTER, STACKS, STAGES
from sparseprune.spec.structures.index import (
    MATRIX,
    Structure,
    Units,
    filled,
    layer_count,
    module_of,
    of_all_experts,
    place_of,
    section_of,
    whole,
    with_expert,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.spec.bound import TensorInfo
    from sparseprune.spec.structures.index import Index, Numbers


def find_experts(index: Index) -> list[Structure]:
    """Routed experts: of each list one structure an expert, of each stack one with all experts as units."""
    return [*_listed_experts(index), *_stacked_experts(index)]


def expert_modules(index: Index) -> dict[str, dict[int | str, Structure]]:
    """All modules with routed experts by name: the structures of each expert by number, or of all by "*"."""
    modules: dict[str, dict[int | str, Structure]] = {}
    for one in find_experts(index):
        module = module_of(replace(one, place=with_expert(one.place, "")))
        modules.setdefault(module, {})[dict(one.place)["expert"]] = one
    return modules


def find_routers(index: Index, experts: Mapping[str, int]) -> dict[str, tuple[TensorInfo, int]]:
    """The matrix of each module's router, by the module of its experts, with its dimension of the experts.

    `experts` says how many there are in each module. A module with several such matrices, or none, is left
    out.
    """
    parents = {module.removesuffix(f".{EXPERTS}"): module for module in experts}
    found: dict[str, list[tuple[TensorInfo, int]]] = {}
    for form, members in index.forms.items():
        if not form.endswith(MATRIX) or not any(word in form for word in ("gate", "router")):
            continue
        for tensor in members.values():
            parts = tensor.name.split(".")
            splits = ((".".join(parts[:at]), ".".join(parts[at:])) for at in range(len(parts) - 1, 0, -1))
            parent, rest = next((each for each in splits if each[0] in parents), ("", ""))
            if parent and ROUTER.match(rest) and len(tensor.shape) == 2:
                module = parents[parent]
                dims = [dim for dim in (0, 1) if tensor.shape[dim] == experts[module]]
                found.setdefault(module, []).extend((tensor, dim) for dim in dims[:1])
    return {module: each[0] for module, each in found.items() if len(each) == 1}


def _listed_experts(index: Index) -> Iterator[Structure]:
    found: dict[tuple[str, Numbers], list[Units]] = {}
    for form, members in index.forms.items():
        base, star, rest = form.rpartition(f".{EXPERTS}.*.")
        if star and "*" in base:
            module, depth = f"{base}{star}"[:-1], base.count("*") + 1
            for numbers, tensor in members.items():
                units = Units(tensor.name, filled(rest, numbers[depth:]), 0, 1, max(1, (*tensor.shape, 1)[0]))
                found.setdefault((module, numbers[:depth]), []).append(units)
    counts = Counter((module, numbers[:-1]) for module, numbers in found)
    groups = {key: _groups(index, key[0], count) for key, count in counts.items()}
    for (module, numbers), parts in found.items():
        place, key = place_of(module, numbers), (module, numbers[:-1])
        if groups[key] > 1:
            size = counts[key] // groups[key]
            place = with_expert(place, numbers[-1], min(numbers[-1] // size, groups[key] - 1))
        yield Structure("experts", place, 1, tuple(parts))


def _groups(index: Index, module: str, experts: int) -> int:
    """How many groups of experts a router chooses from before it chooses experts; those of one compete."""
    groups = whole(section_of(index.config, module).get("n_group")) or 1
    return groups if experts % groups == 0 else 1


def _stacked_experts(index: Index) -> Iterator[Structure]:
    found: dict[tuple[str, Numbers], list[tuple[str, TensorInfo]]] = {}
    for form, members in index.forms.items():
        base, star, rest = form.rpartition(f".{EXPERTS}.")
        is_stack = bool(star) and not rest.startswith("*") and "*" not in rest
        if not is_stack and STACKS.search(form):
            base = form.rsplit(".", 2)[0] if form.endswith((MATRIX, ".bias")) else form.rpartition(".")[0]
            rest, is_stack = form[len(base) + 1 :], True
        if is_stack and "*" in base:
            for numbers, tensor in members.items():
                module = f"{base}{star}".rstrip(".") if star else base
                found.setdefault((module, numbers), []).append((rest, tensor))
    for (module, numbers), tensors in found.items():
        deepest = max(len(tensor.shape) for _, tensor in tensors)
        if deepest == 2:
            yield from _flat_experts(index, module, numbers, tensors)
        elif deepest > 2:
            count = next(tensor.shape[0] for _, tensor in tensors if len(tensor.shape) == deepest)
            groups = _groups(index, module, count)
            parts = [
                Units(tensor.name, rest.removesuffix(MATRIX), 0, count // groups, flat=groups)
                for rest, tensor in tensors
                if tensor.shape and tensor.shape[0] == count and not ROUTER.match(f"{EXPERTS}.{rest}")
            ]
            yield Structure("experts", of_all_experts(place_of(module, numbers)), count, tuple(parts))


def _flat_experts(
    index: Index, module: str, numbers: Numbers, tensors: Sequence[tuple[str, TensorInfo]]
) -> Iterator[Structure]:
    """Experts whose rows lie behind each other in matrices; the router tells how many there are."""
    router = index.shape(f"{module.removesuffix(f'.{EXPERTS}')}.router.layer.weight", numbers)
    if router is None or not all(tensor.shape[0] % router[0] == 0 for _, tensor in tensors):
        return
    count = router[0]
    parts = [Units(tensor.name, rest, 0, count, tensor.shape[0] // count) for rest, tensor in tensors]
    yield Structure("experts", of_all_experts(place_of(module, numbers)), count, tuple(parts))


# -- layers ------------------------------------------------------------------------------------------


def _list_in_stage(index: Index, pieces: Sequence[str], at: int) -> int | None:
    """Where the numbers of the layers of a stage are, whose own number is piece `at`; None of no stage."""
    if pieces[at + 2 : at + 3] == ["*"] and STAGES.search(f"{pieces[at - 1]}.{pieces[at + 1]}"):
        return at + 2
    nested = pieces[at + 1 : at + 2] == ["*"]  # no name between them
    depths = section_of(index.config, ".".join(pieces[:at])).get("depths") if nested else None
    return at + 1 if isinstance(depths, list) else None


def find_layers(index: Index) -> list[Structure]:
    """Layers of every list of them, each one structure; layers behind those that the config counts are none.

    Lists inside other lists are those of the innermost level that is called so, such as stages with blocks.
    """
    found: dict[tuple[str, int], list[Units]] = {}
    stages: set[str] = set()  # lists whose members have lists of layers, and parts beside them
    for form, members in index.forms.items():
        pieces = form.split(".")
        stars = [at for at, piece in enumerate(pieces) if piece == "*"]
        lists = [at for at in stars if at and LAYER_LISTS.search(pieces[at - 1])]
        if not lists:
            continue
        at, inner = lists[0], _list_in_stage(index, pieces, lists[0])
        if inner is not None:
            stages.add(".".join(pieces[:at]))
            at = inner
        before = stars.index(at)
        for numbers, tensor in members.items():
            stack = filled(".".join(pieces[:at]), numbers)
            rest = filled(".".join(pieces[at + 1 :]), numbers[before + 1 :])
            numel = max(1, prod(tensor.shape))
            units = Units(tensor.name, rest.removesuffix(MATRIX), 0, 1, max(1, (*tensor.shape, 1)[0]))
            if numel and prod(tensor.shape):
                found.setdefault((stack, numbers[before]), []).append(units)
    structures = []
    for (stack, layer), parts in found.items():
        if stack in stages or NO_LAYERS.search(stack):
            continue
        count = layer_count(section_of(index.config, stack))
        if count is None or layer < count:
            place = with_expert((("stack", stack), ("layer", layer), ("module", "")), "")
            structures.append(Structure("layers", place, 1, tuple(parts)))
    return structures
