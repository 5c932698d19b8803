"""Structures: the MLPs, attentions, experts, layers and matrices of a checkpoint, found by names and shapes.

Owns which dimension of which tensor counts the units of a structure, and how a tensor looks with its units in
front. Reads headers and config.json alone. Called by locating, and by coverage and removal.
"""

from __future__ import annotations

import re
from collections import defaultdict
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.spec.naming import (
    ATTENTIONS,
    EXPERTS,
    FUSED_LAYOUTS,
    HEAD_COUNTS,
    HEAD_NORMS,
    HEAD_SIZES,
    HEAD_VECTORS,
    INPUTS_FIRST,
    INTERLEAVED,
    LAYER_LISTS,
    MLP_KEY_VALUE,
    MLPS,
    NAMED_LAYOUTS,
    NO_MATRIX,
    STACKS,
    STACKS_INPUTS_FIRST,
    STAGES,
    TEXT_CONFIGS,
    TOWERS,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.spec.bound import Captures, TensorInfo
    from sparseprune.spec.naming import AttentionNames, MlpNames

    Numbers = tuple[int, ...]
    Members = Mapping[Numbers, TensorInfo]

Kind = Literal["matrices", "mlp", "heads", "experts", "layers"]
KINDS: tuple[Kind, ...] = ("matrices", "mlp", "heads", "experts", "layers")
NAMES: Mapping[Kind, str] = {
    "matrices": "matrices of layers",
    "mlp": "MLPs of layers",
    "heads": "attention of layers with heads that are counted",
    "experts": "routed experts",
    "layers": "lists of layers",
}
CAPTURES = ("stack", "layer", "module", "expert", "part")
_NUMBER = re.compile(r"(?:^|(?<=\.))[0-9]{1,9}(?=\.|$)")
_MATRIX = ".weight"


class Units(Struct, frozen=True):
    """Units along the dimension `dim` of a tensor: `count` of them, each `size` indices, from `begin` on.

    `stacked`: the first dimension counts modules, each of which has its own units; `flat` modules lie behind
    each other in the dimension of the units. A tensor that `follows` loses units without being pruned. `part`
    is its name inside the structure. Of attention a unit has so many `queries`, query heads, and a key/value
    head where it has `keys`.
    """

    tensor: str
    part: str
    dim: int
    count: int
    size: int = 1
    begin: int = 0
    stacked: bool = False
    flat: int = 1
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
        star, numbers = _NUMBER.sub, _NUMBER.findall
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


def find(kind: Kind, index: Index) -> list[Structure]:
    """All structures of a kind; "matrices" are no structure, see `matrices`."""
    finders = {"mlp": find_mlps, "heads": find_attentions, "experts": find_experts, "layers": find_layers}
    return finders[kind](index)


# -- places ------------------------------------------------------------------------------------------


def place_of(module: str, numbers: Sequence[int]) -> Captures:
    """Where a module stands: the list of layers, the layer, the module in it, and the expert.

    >>> dict(place_of("model.layers.*.mlp.experts.*", (3, 7)))
    {'stack': 'model.layers', 'layer': 3, 'module': 'mlp.experts', 'expert': 7}
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
    return (("stack", stack.rstrip(".")), ("layer", layer), ("module", inside), ("expert", found))


def captures_of(structure: Structure, part: Units) -> Captures:
    """The captures of a tensor of a structure."""
    return (*structure.place, ("part", part.part))


def outlook(part: Units, shape: Shape) -> Outlook:
    """A tensor of this shape with its units in front; modules of a stack stand before them."""
    if not shape:
        return Outlook((1,), (1,))
    steps, dim = _steps(shape), part.dim
    lead: list[tuple[int, int]] = []
    if part.stacked:
        lead = [(shape[0], steps[0])]
    elif part.flat > 1:
        lead = [(part.flat, shape[dim] // part.flat * steps[dim])]
    dims = [*zip(shape, steps, strict=True)]
    dims[dim] = (part.size, steps[dim])
    inner = [each for at, each in enumerate(dims) if at >= part.stacked and (at != dim or part.size > 1)]
    extents, stride = zip(*lead, (part.count, part.size * steps[dim]), *inner, strict=True)
    return Outlook(extents, stride, part.begin * steps[dim], len(lead))


def _steps(shape: Shape) -> Shape:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


# -- matrices ----------------------------------------------------------------------------------------


def matrices(index: Index) -> Iterator[tuple[Captures, TensorInfo, Outlook]]:
    """The matrices of layers, outputs first and inputs last; matrices of a stack lie behind each other.

    A convolution is a matrix for each place of its kernel.
    """
    routed = routed_modules(index.forms)
    for form, members in index.forms.items():
        if not is_layer_matrix(form, routed):
            continue
        module, part = _split(form)
        first: dict[Shape, Outlook | None] = {}
        for numbers, tensor in members.items():
            if tensor.shape not in first:
                first[tensor.shape] = _matrix_outlook(index, form, numbers, tensor.shape)
            found = first[tensor.shape]
            if found is not None:
                yield (*place_of(module, numbers), ("part", part)), tensor, found


def routed_modules(forms: Iterable[str]) -> frozenset[str]:
    """Modules that have experts, so that their gate is a router."""
    return frozenset(form.partition(f".{EXPERTS}.")[0] for form in forms if f".{EXPERTS}." in form)


def is_layer_matrix(form: str, routed: frozenset[str]) -> bool:
    """Whether a name with stars for numbers is that of a matrix of layers, as far as names tell."""
    pieces = form.split(".")
    if "*" not in pieces[:-1]:
        return False
    last = max(at for at, piece in enumerate(pieces[:-1]) if piece == "*")
    if any(NO_MATRIX.search(piece) for piece in pieces[max(0, last - 1) :]):
        return False
    return not any(form.startswith(f"{module}.gate.") for module in routed)


def is_matrix_shape(shape: Shape) -> bool:
    """Whether a tensor of layers is a matrix, a stack of them, or a convolution of several channels."""
    return len(shape) >= 2 and not (len(shape) > 2 and shape[1] == 1)


def _split(form: str) -> tuple[str, str]:
    """The module of a tensor and the tensor's part in it: the last module's name, without `.weight`."""
    stem = form.removesuffix(_MATRIX)
    module, _, part = stem.rpartition(".")
    return (module, part) if part != "*" else (stem, "weight")


def _matrix_outlook(index: Index, form: str, numbers: Numbers, shape: Shape) -> Outlook | None:
    if not is_matrix_shape(shape):
        return None
    if len(shape) > 3 or (len(shape) == 3 and "conv" in form):
        places = prod(shape[2:])
        if places == 1:
            return Outlook(shape[:2], (shape[1], 1))
        return Outlook((places, *shape[:2]), (1, shape[1] * places, places), leading=1)
    outputs, inputs = shape[-2:]
    lead, step = (shape[:1], (outputs * inputs,)) if len(shape) == 3 else ((), ())
    if inputs_first(index, form, numbers, shape):
        return Outlook((*lead, inputs, outputs), (*step, 1, inputs), leading=len(lead))
    return Outlook(shape, _steps(shape), leading=len(lead))


def inputs_first(index: Index, form: str, numbers: Numbers, shape: Shape) -> bool:
    """Whether a matrix, or a stack of them, has inputs before outputs: by its bias, its MLP, or the model."""
    bias = index.shape(f"{form.removesuffix(_MATRIX)}.bias", numbers) or index.shape(f"{form}_bias", numbers)
    rows, columns = shape[-2:]
    if rows != columns and bias is not None and len(bias) == len(shape) - 1:
        return bias[-1] == columns
    if len(shape) == 3 and form.endswith(("gate_up_proj", "down_proj")):
        base = form.rpartition(".")[0]
        up, down = index.shape(f"{base}.gate_up_proj", numbers), index.shape(f"{base}.down_proj", numbers)
        if up is not None and down is not None and len(up) == len(down) == 3:
            as_linear = up[2] == down[1] and up[1] == 2 * down[2]
            as_inputs_first = up[1] == down[2] and up[2] == 2 * down[1]
            if as_linear != as_inputs_first:
                return as_inputs_first
    return index.is_one_of(STACKS_INPUTS_FIRST if len(shape) == 3 else INPUTS_FIRST)


# -- MLPs --------------------------------------------------------------------------------------------


def find_mlps(index: Index) -> list[Structure]:
    """MLPs inside numbered modules, of layers and of experts; units are channels."""
    found: dict[str, Structure] = {}  # by the matrix that reads
    taken: set[str] = set()
    for names in MLPS:
        for suffix in (_MATRIX, ""):
            ending = f".{names.reads}{suffix}"
            for form in [each for each in index.forms if each.endswith(ending)]:
                base = form[: -len(ending)]
                if "*" not in base or (names.reads == "value" and not MLP_KEY_VALUE.search(base)):
                    continue
                for numbers, reads in index.forms[form].items():
                    mlp = None if reads.name in taken else _mlp(index, names, (base, suffix), numbers)
                    if mlp is not None and taken.isdisjoint(each.tensor for each in mlp.parts):
                        found[reads.name] = mlp
                        taken.update(each.tensor for each in mlp.parts)
    return list(found.values())


def _mlp(index: Index, names: MlpNames, where: tuple[str, str], numbers: Numbers) -> Structure | None:
    """The MLP of a module; None where it lacks a matrix, or shapes do not fit."""
    base, suffix = where
    written = [index.forms.get(f"{base}.{each}{suffix}", {}).get(numbers) for each in names.writes]
    reads = index.forms[f"{base}.{names.reads}{suffix}"][numbers]
    writes = [each for each in written if each is not None]
    if len(writes) < len(names.writes) or len(reads.shape) not in (2, 3):
        return None
    if any(len(each.shape) != len(reads.shape) for each in writes):
        return None
    flipped = inputs_first(index, f"{base}.{names.writes[0]}{suffix}", numbers, writes[0].shape)
    sides = _flat_sides(index, names, base, numbers) if names.flat else _sides(writes, reads, flipped=flipped)
    if sides is None:
        return None
    out, into, channels, flat = sides
    stacked = len(reads.shape) == 3
    parts: list[Units] = []
    for name, each in zip(names.writes, writes, strict=True):
        parts += _halves(
            index, Units(each.name, name, out, channels, stacked=stacked, flat=flat), each.shape[out]
        )
    parts.append(Units(reads.name, names.reads, into, channels, stacked=stacked, flat=flat))
    for name in names.writes:
        bias = index.forms.get(f"{base}.{name}.bias" if suffix else f"{base}.{name}_bias", {}).get(numbers)
        if bias is not None:
            units = Units(bias.name, f"{name}.bias", len(bias.shape) - 1, channels, stacked=stacked)
            parts += _halves(index, units, bias.shape[-1])
    for name in names.beside:
        for end in ("weight", "bias"):
            beside = index.forms.get(f"{base}.{name}.{end}", {}).get(numbers)
            if beside is not None and beside.shape[0] == channels:
                parts.append(Units(beside.name, f"{name}.{end}", 0, channels))
    place = place_of(base, numbers)
    return Structure("mlp", _of_all(place) if stacked or flat > 1 else place, channels, tuple(parts))


def _sides(
    writes: Sequence[TensorInfo], reads: TensorInfo, *, flipped: bool
) -> tuple[int, int, int, int] | None:
    """The dimensions of the channels in what writes and in what reads, how many of them, in how many MLPs."""
    last = len(reads.shape) - 1
    out, into = (last, last - 1) if flipped else (last - 1, last)
    channels = reads.shape[into]
    if all(each.shape[out] in (channels, 2 * channels) for each in writes):
        return out, into, channels, 1
    return None


def _flat_sides(
    index: Index, names: MlpNames, base: str, numbers: Numbers
) -> tuple[int, int, int, int] | None:
    """As `_sides`, of matrices that have the channels of all experts as rows."""
    module = base.partition(f".{EXPERTS}")[0]
    router = index.shape(f"{module}.router.layer.weight", numbers)
    rows = {(index.shape(f"{base}.{each}", numbers) or (0,))[0] for each in (*names.writes, names.reads)}
    if router is None or len(rows) != 1 or f".{EXPERTS}" not in base:
        return None
    (count,), experts = rows, router[0]
    return (0, 0, count // experts, experts) if experts and count and count % experts == 0 else None


def _halves(index: Index, units: Units, size: int) -> Iterator[Units]:
    """The units of a matrix that writes channels: of gate and of up, where it is fused."""
    if size == units.count or units.flat > 1:
        yield units
    elif index.is_one_of(INTERLEAVED) or (units.stacked and _interleaved(index, units)):
        yield replace(units, size=2)
    else:
        head, _, tail = units.part.partition(".")
        end = f".{tail}" if tail else ""
        yield replace(units, part=f"{head}[gate]{end}")
        yield replace(units, part=f"{head}[up]{end}", begin=units.count)


def _interleaved(index: Index, units: Units) -> bool:
    """Of a model that no config names: stacks with biases are those of gpt-oss."""
    return not index.types and units.part.startswith("gate_up_proj") and units.tensor.endswith("_bias")


# -- attention ---------------------------------------------------------------------------------------


def find_attentions(index: Index) -> list[Structure]:
    """Attentions inside numbered modules; units are key/value heads with their queries, or query heads.

    Attention without as many key/value heads as two has its query heads as units.
    """
    found: dict[str, Structure] = {}
    for names in ATTENTIONS:
        ending = f".{names.output}{_MATRIX}"
        for form in [each for each in index.forms if each.endswith(ending)]:
            base = form[: -len(ending)]
            if "*" not in base:
                continue
            section = section_of(index.config, base)
            for numbers, output in index.forms[form].items():
                if output.name not in found:
                    heads = _attention(index, names, (base, section), numbers)
                    if heads is not None:
                        found[output.name] = heads
    return list(found.values())


class _Attention(Struct, frozen=True):
    """What is known of an attention: its matrices, and the dimensions of outputs and of inputs in them."""

    index: Index
    base: str
    section: Mapping[str, Any]
    numbers: Numbers
    out: int
    into: int

    def tensor(self, name: str) -> TensorInfo | None:
        return self.index.forms.get(f"{self.base}.{name}", {}).get(self.numbers)


def _attention(
    index: Index, names: AttentionNames, where: tuple[str, Mapping[str, Any]], numbers: Numbers
) -> Structure | None:
    base, section = where
    matrices = [*names.queries, *([names.fused] if names.fused else []), names.output]
    forms = [f"{base}.{each}{_MATRIX}" for each in matrices]
    tensors = [index.forms.get(form, {}).get(numbers) for form in forms]
    if any(each is None or len(each.shape) != 2 for each in tensors):
        return None
    output = tensors[-1]
    flipped = output is not None and inputs_first(index, forms[0], numbers, tensors[0].shape)  # type: ignore[union-attr]
    at = _Attention(index, base, section, numbers, int(flipped), int(not flipped))
    if names.fused:
        parts = _fused(at, names)
    elif names.latent:
        parts = _latent(at, names)
    else:
        parts = _separate(at, names)
    if not parts:
        return None
    biases = []
    for each in parts:
        bias = at.tensor(f"{each.part}.bias")
        if bias is not None and each.dim == at.out:
            biases.append(replace(each, tensor=bias.name, part=f"{each.part}.bias", dim=0))
    heads = parts[0].count * max(each.queries for each in parts)
    named = _numbered_parts([*parts, *biases])
    return Structure("heads", place_of(base, numbers), parts[0].count, named, heads)


def _numbered_parts(parts: Sequence[Units]) -> tuple[Units, ...]:
    """Parts with names of their own: those of one tensor are told apart by what they begin with."""
    begins: dict[str, set[int]] = defaultdict(set)
    for each in parts:
        begins[each.tensor].add(each.begin)
    named = []
    for each in parts:
        order = sorted(begins[each.tensor])
        part = each.part if len(order) == 1 else f"{each.part}[{'qkv'[order.index(each.begin)]}]"
        named.append(replace(each, part=part))
    return tuple(named)


def _head_size(at: _Attention, queries: int, keys: int) -> int | None:
    """How many rows of queries a head has: by a norm of heads, or by the config."""
    for name in HEAD_NORMS:
        norm = at.tensor(f"{name}{_MATRIX}")
        if norm is not None and len(norm.shape) == 1 and norm.shape[0] < keys and keys % norm.shape[0] == 0:
            return norm.shape[0]
    for key in HEAD_SIZES:
        size = _whole(at.section.get(key))
        if size is not None and queries % size == 0 == keys % size:
            return size
    count = head_count(at.section, at.base)
    if count is None or queries % count:
        return None
    size = queries // count
    return size if keys % size == 0 else None


def head_count(section: Mapping[str, Any], base: str) -> int | None:
    """The number of query heads that a section of a config tells of an attention."""
    side = next((side for side in ("decoder", "encoder") if side in base), "")
    sided = (f"{side}_attention_heads", f"{side}_num_attention_heads") if side else ()
    return next((count for key in (*sided, *HEAD_COUNTS) if (count := _whole(section.get(key)))), None)


def _whole(value: object) -> int | None:
    """A positive integer; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _separate(at: _Attention, names: AttentionNames) -> list[Units]:
    query, key, value = [at.tensor(f"{each}{_MATRIX}") for each in names.queries]
    output = at.tensor(f"{names.output}{_MATRIX}")
    if query is None or key is None or value is None or output is None:
        return []
    sizes = [each.shape[at.out] for each in (query, key, value)]
    size = _head_size(at, sizes[0], sizes[1])
    if size is None:
        return []
    heads, groups = sizes[0] // size, sizes[1] // size
    if not groups or heads % groups or sizes[2] % groups or output.shape[at.into] % groups:
        return []
    if groups == 1 < heads:
        if output.shape[at.into] % heads:
            return []
        parts = [Units(query.name, names.queries[0], at.out, heads, size, queries=1)]
        read = output.shape[at.into] // heads
        parts.append(Units(output.name, names.output, at.into, heads, read, queries=1))
    else:
        each = heads // groups
        counts = ((query, each), (key, 0), (value, 0), (output, each))
        parts = [
            Units(one.name, name, dim, groups, one.shape[dim] // groups, queries=queries, keys=not queries)
            for name, (one, queries), dim in zip(
                (*names.queries, names.output), counts, (at.out, at.out, at.out, at.into), strict=True
            )
        ]
    return parts + _head_vectors(at, heads, parts[0].count, sizes)


def _head_vectors(at: _Attention, heads: int, units: int, sizes: Sequence[int]) -> list[Units]:
    """Norms over all heads together, and what there is one of for each head; they follow."""
    found, each = [], heads // units
    for name, size, queries in zip(HEAD_VECTORS, sizes, (each, 0), strict=False):
        norm = at.tensor(f"{name}{_MATRIX}")
        rows = 0 if norm is None else norm.shape[0]
        if (
            norm is not None
            and rows % units == 0
            and (len(norm.shape) == 2 or (rows,) == norm.shape == (size,))
        ):
            found.append(
                Units(
                    norm.name, name, 0, units, rows // units, follows=True, queries=queries, keys=not queries
                )
            )
    for name, dim in (("sinks", 0), (f"relative_attention_bias{_MATRIX}", 1)):
        one = at.tensor(name)
        if one is not None and one.shape[dim:] == (heads,):
            part = name.removesuffix(_MATRIX)
            found.append(Units(one.name, part, dim, units, each, follows=True, queries=each))
    return found


def _latent(at: _Attention, names: AttentionNames) -> list[Units]:
    query, latent = [at.tensor(f"{each}{_MATRIX}") for each in names.queries]
    output, heads = at.tensor(f"{names.output}{_MATRIX}"), head_count(at.section, at.base)
    if query is None or latent is None or output is None or heads is None:
        return []
    sizes = (query.shape[0], latent.shape[0], output.shape[1])
    if any(size % heads for size in sizes):
        return []
    matrices = zip((*names.queries, names.output), (query, latent, output), sizes, (0, 0, 1), strict=True)
    return [
        Units(each.name, name, dim, heads, size // heads, queries=1, keys=name == names.queries[1])
        for name, each, size, dim in matrices
    ]


def _fused(at: _Attention, names: AttentionNames) -> list[Units]:
    fused, output = at.tensor(f"{names.fused}{_MATRIX}"), at.tensor(f"{names.output}{_MATRIX}")
    if fused is None or output is None:
        return []
    rows, width = fused.shape[at.out], output.shape[at.into]
    size = _head_size(at, width, width)
    if size is None:
        return []
    heads = width // size
    groups = (rows // size - heads) // 2
    if rows % size or (heads + 2 * groups) * size != rows or not groups or heads % groups:
        return []
    layout = fused_layout(at.index, names.fused)
    each = heads // groups
    read = Units(output.name, names.output, at.into, groups, width // groups, queries=each)
    if layout is None:
        return []
    if groups == 1 < heads:
        whole = Units(fused.name, names.fused, at.out, heads, size, queries=1)
        return [whole, replace(read, count=heads, size=size, queries=1)]
    if layout == "parts":
        queries = Units(fused.name, names.fused, at.out, groups, width // groups, queries=each)
        keys = replace(queries, size=size, begin=width, queries=0, keys=True)
        parts = [queries, keys, replace(keys, begin=width + groups * size), read]
    else:
        parts = [
            Units(fused.name, names.fused, at.out, groups, rows // groups, queries=each, keys=True),
            read,
        ]
    return parts + _head_vectors(at, heads, groups, (width, groups * size))


def fused_layout(index: Index, name: str) -> str | None:
    """How a fused matrix of this name holds queries, keys and values; None where nobody knows."""
    for model_type in index.types & FUSED_LAYOUTS.keys():
        return FUSED_LAYOUTS[model_type]
    return NAMED_LAYOUTS.get(name, "parts") if index.types or name not in NAMED_LAYOUTS else None


def section_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The part of a config that speaks of a tensor: the config of its tower, or of the text model."""
    found = config
    for _ in range(4):
        key = nested_key(found, name)
        if key is None:
            return found
        found = found[key]
    return found


def nested_key(config: Mapping[str, Any], name: str) -> str | None:
    """The key under which a config has the one of a tensor's tower; None where it speaks of it itself."""
    nested = [key for key, value in config.items() if isinstance(value, dict) and "model_type" in value]
    for names, keys in TOWERS:
        if names.search(name):
            return next((key for key in nested if keys.search(key)), None)
    for side in ("encoder", "decoder"):
        if side in nested and side in name.split(".")[:2]:
            return side
    nested = [key for key, value in config.items() if isinstance(value, dict)]
    return next((key for key in TEXT_CONFIGS if key in nested), None)


# -- experts -----------------------------------------------------------------------------------------


def find_experts(index: Index) -> list[Structure]:
    """Routed experts: of each list one structure an expert, of each stack one with all experts as units."""
    return [*_listed_experts(index), *_stacked_experts(index)]


def _listed_experts(index: Index) -> Iterator[Structure]:
    found: dict[tuple[str, Numbers], list[Units]] = {}
    for form, members in index.forms.items():
        base, star, rest = form.rpartition(f".{EXPERTS}.*.")
        if star and "*" in base:
            module, depth = f"{base}{star}"[:-1], base.count("*") + 1
            for numbers, tensor in members.items():
                units = Units(
                    tensor.name, _filled(rest, numbers[depth:]), 0, 1, max(1, (*tensor.shape, 1)[0])
                )
                found.setdefault((module, numbers[:depth]), []).append(units)
    for (module, numbers), parts in found.items():
        yield Structure("experts", place_of(module, numbers), 1, tuple(parts))


def _filled(form: str, numbers: Sequence[int]) -> str:
    rest = list(numbers)
    return ".".join(str(rest.pop(0)) if piece == "*" else piece for piece in form.split("."))


def _stacked_experts(index: Index) -> Iterator[Structure]:
    found: dict[tuple[str, Numbers], list[tuple[str, TensorInfo]]] = {}
    for form, members in index.forms.items():
        base, star, rest = form.rpartition(f".{EXPERTS}.")
        is_stack = bool(star) and not rest.startswith("*") and "*" not in rest
        if not is_stack and STACKS.search(form):
            base, rest = (
                form.rsplit(".", 2)[0] if form.endswith((_MATRIX, ".bias")) else form.rpartition(".")[0],
                "",
            )
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
            parts = [
                Units(tensor.name, rest.removesuffix(_MATRIX), 0, count)
                for rest, tensor in tensors
                if tensor.shape and tensor.shape[0] == count
            ]
            yield Structure("experts", _of_all(place_of(module, numbers)), count, tuple(parts))


def _of_all(place: Captures) -> Captures:
    """The place of what holds all experts of a layer."""
    return (*place[:3], ("expert", "*"))


def _flat_experts(
    index: Index, module: str, numbers: Numbers, tensors: Sequence[tuple[str, TensorInfo]]
) -> Iterator[Structure]:
    """Experts whose rows lie behind each other in matrices; the router tells how many there are."""
    router = index.shape(f"{module.removesuffix(f'.{EXPERTS}')}.router.layer.weight", numbers)
    if router is None or not all(tensor.shape[0] % router[0] == 0 for _, tensor in tensors):
        return
    count = router[0]
    parts = [Units(tensor.name, rest, 0, count, tensor.shape[0] // count) for rest, tensor in tensors]
    yield Structure("experts", _of_all(place_of(module, numbers)), count, tuple(parts))


# -- layers ------------------------------------------------------------------------------------------


def find_layers(index: Index) -> list[Structure]:
    """Layers of every list of them, each one structure; layers behind those that the config counts are none.

    Lists inside other lists are those of the innermost level that is called so, such as stages with blocks.
    """
    found: dict[tuple[str, int], list[Units]] = {}
    for form, members in index.forms.items():
        pieces = form.split(".")
        stars = [at for at, piece in enumerate(pieces) if piece == "*"]
        lists = [at for at in stars if at and LAYER_LISTS.search(pieces[at - 1])]
        if not lists:
            continue
        at = (
            lists[1]
            if len(lists) > 1 and STAGES.search(f"{pieces[lists[0] - 1]}.{pieces[lists[1] - 1]}")
            else lists[0]
        )
        before = stars.index(at)
        for numbers, tensor in members.items():
            stack = _filled(".".join(pieces[:at]), numbers)
            rest = _filled(".".join(pieces[at + 1 :]), numbers[before + 1 :])
            numel = max(1, prod(tensor.shape))
            units = Units(tensor.name, rest.removesuffix(_MATRIX), 0, 1, max(1, (*tensor.shape, 1)[0]))
            if numel and prod(tensor.shape):
                found.setdefault((stack, numbers[before]), []).append(units)
    structures = []
    for (stack, layer), parts in found.items():
        count = layer_count(section_of(index.config, stack))
        if count is None or layer < count:
            place = (("stack", stack), ("layer", layer), ("module", ""), ("expert", ""))
            structures.append(Structure("layers", place, 1, tuple(parts)))
    return structures


def layer_count(section: Mapping[str, Any]) -> int | None:
    """How many layers a section of a config counts."""
    return _whole(section.get("num_hidden_layers"))
