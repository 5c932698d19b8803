"""Structures as nouns: the index of a checkpoint's names, units of tensors, places, outlooks.

Owns how a tensor looks with its units in front, and which part of a config speaks of it. Finds no structure.
Called by the finders beside it, by locating, and by removal.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from sparseprune.spec.naming import CLASS_DEFAULTS, EXPERTS, MEMBER, MODELS_INSIDE, TEXT_CONFIGS, TOWERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.spec.bound import Captures, TensorInfo

    Numbers = tuple[int, ...]

Kind = Literal["matrices", "mlp", "heads", "experts", "layers", "hidden"]
KINDS: tuple[Kind, ...] = ("matrices", "mlp", "heads", "experts", "layers", "hidden")
NAMES: Mapping[Kind, str] = {
    "matrices": "matrices of layers",
    "mlp": "MLPs of layers",
    "heads": "attention of layers with heads that are counted",
    "experts": "routed experts",
    "layers": "lists of layers",
    "hidden": "hidden size of a text model",
}
CAPTURES = ("stack", "layer", "module", "group", "expert", "part")
MATRIX = ".weight"  # what the name of a module's matrix ends with


class Units(Struct, frozen=True):
    """Units along the dimension `dim` of a tensor: `count` of them, each `size` indices, from `begin` on.

    `stacked`: the first dimension counts modules, each of which has its own units; `flat` modules lie behind
    each other in the dimension of the units. A unit of several `runs` has its indices as many times, each run
    behind those of all units. A tensor that `follows` loses units without being pruned. `part` is its name
    inside the structure. Of attention a unit has so many `queries`, query heads, and a key/value head where
    it has `keys`.
    """

    tensor: str
    part: str
    dim: int
    count: int
    size: int = 1
    begin: int = 0
    stacked: bool = False
    flat: int = 1
    runs: int = 1
    follows: bool = False
    queries: int = 0
    keys: bool = False


class Structure(Struct, frozen=True):
    """One MLP, attention, set of experts, or list of layers: where it stands, and its units in each tensor.

    `units` counts them, `heads` the query heads of attention. Of experts that are modules of their own each
    is a structure.
    """

    kind: Kind
    place: Captures
    units: int
    parts: tuple[Units, ...]
    heads: int = 0


class Outlook(Struct, frozen=True):
    """How a table looks at a tensor of a structure: shape and strides of a view, units or outputs first.

    `leading` dimensions in front count matrices or modules of a stack.
    """

    shape: Shape
    stride: Shape
    offset: int = 0
    leading: int = 0


class Index(Struct, frozen=True):
    """The tensors of a checkpoint by the form of their names, with a star for each number.

    >>> from sparseprune.spec.bound import TensorInfo
    >>> Index.of([TensorInfo("layers.3.up.weight", "F32", (8, 4))]).forms["layers.*.up.weight"].keys()
    dict_keys([(3,)])
    """

    forms: Mapping[str, dict[Numbers, TensorInfo]]
    config: Mapping[str, Any]
    types: frozenset[str]

    @staticmethod
    def of(tensors: Iterable[TensorInfo], config: Mapping[str, Any] | None = None) -> Index:
        forms: dict[str, dict[Numbers, TensorInfo]] = {}
        star, numbers = MEMBER.sub, MEMBER.findall
        for tensor in tensors:
            name = tensor.name
            forms.setdefault(star("*", name), {})[tuple(map(int, numbers(name)))] = tensor
        return Index(forms, config or {}, frozenset(_model_types(config or {})))

    def is_one_of(self, types: Iterable[str]) -> bool:
        """Whether the config, or one inside it, is of one of these model types."""
        return not self.types.isdisjoint(types)

    def shape(self, form: str, numbers: Numbers) -> Shape | None:
        """The shape of a tensor; None where there is none of that name."""
        found = self.forms.get(form, {}).get(numbers)
        return None if found is None else found.shape


def _model_types(config: Mapping[str, Any], depth: int = 3) -> Iterator[str]:
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values() if depth else ():
        if isinstance(value, dict):
            yield from _model_types(value, depth - 1)


def place_of(module: str, numbers: Sequence[int]) -> Captures:
    """Where a module stands: the list of layers, the layer, the module in it, and the expert.

    >>> dict(place_of("model.layers.*.mlp.experts.*", (3, 7)))
    {'stack': 'model.layers', 'layer': 3, 'module': 'mlp.experts', 'group': '', 'expert': 7}
    """
    stack, star, within = module.partition("*")
    layer: int | str = numbers[0] if star else ""
    rest, pieces = list(numbers[1:]), list[str]()
    found: int | str = ""
    for piece in within.split(".") if star else ():
        if piece != "*":
            pieces.append(piece)
        elif pieces and pieces[-1] == EXPERTS:
            found = rest.pop(0)
        else:
            pieces.append(str(rest.pop(0)))
    inside = ".".join(filter(None, pieces))
    where = (("stack", stack.rstrip(".")), ("layer", layer), ("module", inside))
    return (*where, ("group", ""), ("expert", found))


def module_of(structure: Structure) -> str:
    """The name of the module of a structure."""
    place = dict(structure.place)
    pieces = [place["stack"], place["layer"], place["module"]]
    if isinstance(place["expert"], int):
        pieces.append(place["expert"])
    return ".".join(str(piece) for piece in pieces if piece != "")


def captures_of(structure: Structure, part: Units) -> Captures:
    """The captures of a tensor of a structure."""
    return (*structure.place, ("part", part.part))


def outlook(part: Units, shape: Shape) -> Outlook:
    """A tensor of this shape with its units in front; modules of a stack stand before them."""
    if not shape:
        return Outlook((1,), (1,))
    steps, dim = steps_of(shape), part.dim
    lead: list[tuple[int, int]] = []
    if part.stacked:
        lead = [(shape[0], steps[0])]
    elif part.flat > 1:
        lead = [(part.flat, shape[dim] // part.flat * steps[dim])]
    dims = [*zip(shape, steps, strict=True)]
    dims[dim] = (part.size, steps[dim])
    runs = [(part.runs, part.count * part.size * steps[dim])] if part.runs > 1 else []
    inner = [each for at, each in enumerate(dims) if at >= part.stacked and (at != dim or part.size > 1)]
    extents, stride = zip(*lead, (part.count, part.size * steps[dim]), *runs, *inner, strict=True)
    return Outlook(extents, stride, part.begin * steps[dim], len(lead))


def steps_of(shape: Shape) -> Shape:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def of_all_experts(place: Captures) -> Captures:
    """The place of what holds all experts of a layer."""
    return with_expert(place, "*")


def with_expert(place: Captures, expert: int | str, group: int | str = "") -> Captures:
    """A place with another expert, and the group that it belongs to."""
    return (*place[:3], ("group", group), ("expert", expert))


def filled(form: str, numbers: Sequence[int]) -> str:
    """A form with numbers in place of its stars.

    >>> filled("layers.*.experts.*.up", (3, 7))
    'layers.3.experts.7.up'
    """
    rest = list(numbers)
    return ".".join(str(rest.pop(0)) if piece == "*" else piece for piece in form.split("."))


# -- configs -----------------------------------------------------------------------------------------


def section_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What a config says of a tensor, of its tower or of the text model, with defaults of the class."""
    found = config
    for _ in range(4):
        key = nested_key(found, name)
        if key is None:
            break
        found = found[key]
    return found if found is config else with_defaults(found)


def with_defaults(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A section of a config with what its class takes for keys that it leaves out."""
    defaults = CLASS_DEFAULTS.get(str(section.get("model_type")), {})
    return {**defaults, **section} if defaults.keys() - section.keys() else section


def nested_key(config: Mapping[str, Any], name: str) -> str | None:
    """The key under which a config has the one of a tensor's tower; None where it speaks of it itself."""
    for names, inside in MODELS_INSIDE:
        if isinstance(config.get(inside), dict) and names.search(f"{name}."):
            return inside
    nested = [key for key, value in config.items() if isinstance(value, dict) and "model_type" in value]
    for names, keys in TOWERS:
        if names.search(name):
            return next((key for key in nested if keys.search(key)), None)
    for side in ("encoder", "decoder"):
        key = next((key for key in (side, f"{side}_config") if key in nested), None)
        if key is not None and side in name.split(".")[:2]:
            return key
    nested = [key for key, value in config.items() if isinstance(value, dict)]
    return next((key for key in TEXT_CONFIGS if key in nested), None)


def whole(value: object) -> int | None:
    """A positive integer; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def layer_count(section: Mapping[str, Any]) -> int | None:
    """How many layers a section of a config counts."""
    return whole(section.get("num_hidden_layers"))
