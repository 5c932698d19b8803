"""Watching a model: its matrix products with parameters, and the tensors that store these parameters.

Owns what is seen of torch's dispatch, and names on disk. Knows no sums. Called by collecting.
"""

from __future__ import annotations

from collections import defaultdict, deque
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from msgspec import Struct
from msgspec.structs import replace
from torch.utils._python_dispatch import TorchDispatchMode

from sparseprune.spec.naming import MEMBER

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from sparseprune.checkpoint import Checkpoint


_ATEN = torch.ops.aten
# The places of the input and the weight among the arguments, and whether the weight is (out, in).
_PRODUCTS: Mapping[Any, tuple[int, int, bool]] = {
    _ATEN.mm: (0, 1, False),
    _ATEN.bmm: (0, 1, False),
    _ATEN.matmul: (0, 1, False),
    _ATEN.addmm: (1, 2, False),
    _ATEN.baddbmm: (1, 2, False),
    _ATEN.linear: (0, 1, True),
}
_REMEMBERED = 8  # inputs that are kept alive, to recognize later products with the same input


class Product(Struct, frozen=True, eq=False):
    """Inputs (rows, features) of a product with a parameter, (matrices, rows, features) with a whole stack.

    `matrix` is the number of a matrix in a stack, None for all matrices or without a stack; `input_dim` is
    the dimension of the parameter along which inputs lie; `counted` says which rows are tokens that count,
    None for all; `routed` whether a router chose the rows for this matrix. `below` counts the matrices that
    lie one below another in a parameter of two dimensions; else it is 0.
    """

    parameter: str
    matrix: int | None
    input_dim: int
    inputs: Tensor
    counted: Tensor | None
    routed: bool
    below: int = 0


class EnoughError(Exception):
    """Ends a forward pass: the rest is not needed."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, calls `seen` with each product with a parameter, before it is computed.

    Call `begin` before each forward pass.
    """

    def __init__(self, model: torch.nn.Module, seen: Callable[[Product], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen
        # transformers may load parts of one tensor as parameters that share its storage.
        self._known: defaultdict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.ndim in {2, 3} and parameter.device.type != "meta":
                self._known[parameter.untyped_storage().data_ptr()].append((name, parameter))
        self._names = {id(module): name for name, module in model.named_modules()}
        self._running: list[tuple[torch.nn.Module, bool]] = []
        self._hooks = [
            torch.nn.modules.module.register_module_forward_pre_hook(self._enter_module),
            torch.nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        self._window = _window(model)
        self.counted = torch.empty(0, dtype=torch.bool)
        # By the number of rows: which count, as they are and with the first tokens of all sequences first.
        self._counts: dict[int, tuple[Tensor, Tensor]] = {}
        self._turned: set[tuple[int, int]] = set()
        self._gathered: Tensor | None = None
        self._gatherer: torch.nn.Module | None = None

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def begin(self, counted: Tensor) -> None:
        """Begin a forward pass; `counted` says which tokens count, (sequences, length)."""
        padding = -counted.shape[1] % self._window
        padded = torch.nn.functional.pad(counted, (0, padding))  # by the model: none of these counts
        self.counted = counted.reshape(-1)
        self._counts = {one.numel(): (one.reshape(-1), one.T.reshape(-1)) for one in (padded, counted)}
        sizes = [(one.shape[1], one.shape[0]) for one in (padded, counted)]
        self._turned = {(places, sequences) for places, sequences in sizes if places != sequences}
        self._gathered = None
        self._running.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        place = _PRODUCTS.get(packet)
        if place is not None:
            self._product(args[place[0]], args[place[1]], outer=place[2])
        elif packet is _ATEN.index and self._has_all_rows(args[0]) and args[1][0] is not None:
            index = args[1][0]
            self._gather(index.nonzero().reshape(-1) if index.dtype == torch.bool else index)
        elif packet is _ATEN.index_select and args[1] == 0 and self._has_all_rows(args[0]):
            self._gather(args[2])
        return func(*args, **(kwargs or {}))

    def _product(self, inputs: Tensor, weight: Tensor, *, outer: bool) -> None:
        found = self._parameter(weight)
        if found is None or not inputs.numel():
            return
        name, parameter = found
        contracted = weight.ndim - 1 if outer else weight.ndim - 2
        features = weight.shape[contracted]
        rows = inputs if weight.ndim == 3 else inputs.reshape(-1, features)
        gathered = self._gathered is not None and self._gathered.numel() == rows.shape[-2]
        counted = self._rows_that_count(rows.shape[-2])
        part = _part_below(parameter, weight, contracted) if gathered else None
        if part is not None:
            self._seen(Product(name, part.number, part.input_dim, rows, counted, routed=True, below=part.of))
            return
        dims = [
            dim
            for dim in range(parameter.ndim - 2, parameter.ndim)
            if parameter.stride(dim) == weight.stride(contracted) and parameter.shape[dim] == features
        ]
        if not dims:
            return  # a part of its inputs, or not a view of a matrix
        matrix = None
        if parameter.ndim == 3 and weight.ndim == 2:
            begin = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
            matrix = begin // parameter.stride(0)
        self._seen(Product(name, matrix, dims[-1], rows, counted, gathered or parameter.ndim == 3))

    def _parameter(self, weight: Tensor) -> tuple[str, Tensor] | None:
        """The parameter of which an operand is a view, and its name."""
        address = weight.untyped_storage().data_ptr()
        if address in self._known:
            return next((pair for pair in self._known[address] if _holds(pair[1], weight)), None)
        # Offloaded parameters are loaded while their module runs.
        for module, _ in reversed(self._running):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim in {2, 3} and parameter.untyped_storage().data_ptr() == address:
                    prefix = self._names[id(module)]
                    return (f"{prefix}.{name}" if prefix else name), parameter
        return None

    def _rows_that_count(self, rows: int) -> Tensor | None:
        if self._gathered is not None and self._gathered.numel() == rows:
            return self.counted.to(self._gathered.device)[self._gathered]
        if rows not in self._counts:
            return None
        as_they_are, by_place = self._counts[rows]
        return by_place if self._running and self._running[-1][1] else as_they_are

    def _gather(self, index: Tensor) -> None:
        """Rows were selected by index; products with them happen while this module runs."""
        self._gathered, self._gatherer = index, self._running[-1][0] if self._running else None

    def _has_all_rows(self, source: Tensor) -> bool:
        return source.ndim > 0 and source.shape[0] == self.counted.numel()

    def _enter_module(self, module: torch.nn.Module, inputs: Any) -> None:
        if id(module) in self._names:
            # Some models (Longformer, XLNet) have the places in front, and the sequences behind them.
            first = inputs[0] if inputs and isinstance(inputs[0], torch.Tensor) else None
            turned = first is not None and first.ndim > 2 and tuple(first.shape[:2]) in self._turned
            self._running.append((module, turned))

    def _leave_module(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ARG002
        if self._running and self._running[-1][0] is module:
            self._running.pop()
        if module is self._gatherer:
            self._gathered = self._gatherer = None


def _window(model: torch.nn.Module) -> int:
    """Of how many tokens a model makes its texts a multiple (Longformer, LED), 1 where it does not."""
    found = getattr(getattr(model, "config", None), "attention_window", None)
    return max(found if isinstance(found, list) and found else [found if isinstance(found, int) else 1])


class _Part(Struct, frozen=True):
    """One of several matrices that lie one below another in a parameter, and the dimension of its inputs."""

    number: int
    of: int
    input_dim: int


def _part_below(parameter: Tensor, weight: Tensor, contracted: int) -> _Part | None:
    """The part of a matrix that a weight is, if it is one of several equal ones, one below another."""
    if parameter.ndim != 2 or weight.ndim != 2 or not parameter.is_contiguous():
        return None
    outputs = 1 - contracted
    turned = weight.stride(contracted) != 1  # the inputs lie one below another
    down, across = (contracted, outputs) if turned else (outputs, contracted)
    height, width = weight.shape[down], parameter.shape[1]
    strides = (weight.stride(down), weight.stride(across))
    if strides != (width, 1) or weight.shape[across] != width or not height < parameter.shape[0]:
        return None
    row, beside = divmod(int(weight.storage_offset() - parameter.storage_offset()), width)
    if beside or row % height or parameter.shape[0] % height:
        return None
    return _Part(row // height, parameter.shape[0] // height, 0 if turned else 1)


def _holds(parameter: Tensor, weight: Tensor) -> bool:
    """Whether the first element of a weight, of the same storage, is one of a parameter's."""
    place = weight.storage_offset() - parameter.storage_offset()
    sizes = zip(parameter.shape, parameter.stride(), strict=True)
    return 0 <= place <= sum((size - 1) * stride for size, stride in sizes)


class SharedInputs:
    """The parameters that have the same inputs in every product of a forward pass.

    By parameter: `groups` has the first parameter with the same inputs, `input_dims` the dimension along
    which inputs lie, `first` and `last` the numbers of its first and last product, `below` the matrices that
    lie one below another in it.
    """

    def __init__(self) -> None:
        self.input_dims: dict[str, int] = {}
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.below: dict[str, int] = {}
        self._met: dict[str, list[int]] = {}
        self._previous = ("", 0)
        self._recent: deque[tuple[tuple[Any, ...], Tensor, int]] = deque(maxlen=_REMEMBERED)
        self._products = 0

    def __call__(self, product: Product) -> None:
        """Note a product."""
        self._products += 1
        name, inputs = product.parameter, product.inputs
        key = (inputs.data_ptr(), tuple(inputs.shape), inputs.stride(), inputs._version)  # noqa: SLF001
        # The number of an input is that of the first product with it.
        number = next((first for same, _, first in self._recent if same == key), self._products)
        if self._previous != (name, number):  # parts of one parameter have one input, which counts once
            self._met.setdefault(name, []).append(number)
        self._previous = (name, number)
        self.input_dims.setdefault(name, product.input_dim)
        self.first.setdefault(name, self._products)
        self.last[name] = self._products
        if product.below:
            self.below[name] = product.below
        self._recent.append((key, inputs, number))

    @property
    def groups(self) -> dict[str, str]:
        """From the products until now."""
        leaders: dict[tuple[int, ...], str] = {}
        return {name: leaders.setdefault(tuple(met), name) for name, met in self._met.items()}


_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"})


class StoredAs(Struct, frozen=True):
    """A tensor of the checkpoint that is a parameter or a part of one, with the dimension of its inputs.

    `matrix` is its number in a stack, None for the whole stack or without one.
    """

    name: str
    input_dim: int
    matrix: int | None


def stored_as(
    model: Any, parameters: Mapping[str, int], groups: Mapping[str, str], checkpoint: Checkpoint
) -> dict[str, list[StoredAs]]:
    """The tensors that store each parameter, given its input dimension; an empty list if none is found.

    Of parameters that are stored together those in one of the `groups` count, which have the same inputs.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    same: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[name] = tuple(parameter.shape)
        same[id(parameter)].append(name)
    aliases = {names[0]: names for names in same.values()}
    found: dict[str, list[StoredAs]] = {}
    for name, dim in parameters.items():
        ways = [
            stored
            for alias in aliases.get(name, [name])
            for stored in _one(model, alias, shapes[alias], dim, checkpoint)
        ]
        found[name] = list({stored.name: stored for stored in ways}.values())
    lost: defaultdict[str, list[str]] = defaultdict(list)
    for name, stored_in in found.items():
        if not stored_in and len(shapes.get(name, ())) == 2:
            lost[name.rpartition(".")[0].rpartition(".")[0]].append(name)  # transformers fuses such ones
    for names in lost.values():
        for one, owners in _together(model, {name: (shapes[name], parameters[name]) for name in names}):
            stored = _stored_name(one.name, one.shape, checkpoint)
            if stored is not None and len({groups.get(name, name) for name in owners}) == 1:
                for name in owners:
                    found[name].append(StoredAs(stored, one.input_dim, None))
    return found


class _Fused(Struct, frozen=True):
    """A tensor that transformers would save, made of whole matrices with this dimension for their inputs."""

    name: str
    shape: tuple[int, ...]
    input_dim: int


def _together(
    model: Any, matrices: Mapping[str, tuple[tuple[int, ...], int]]
) -> Iterator[tuple[_Fused, list[str]]]:
    """The tensors in which matrices of these shapes and input dimensions are saved, each with its own."""
    if len(matrices) < 2:
        return
    most = 1 + max(shape[dim] for shape, dim in matrices.values())
    names = list(matrices)
    tags = {name: _tags(*matrices[name]) + most * number for number, name in enumerate(names)}
    for key, tensor in as_saved(model, tags).items():
        if tensor.ndim != 2 or key in matrices:
            continue
        owners, inputs = tensor // most, tensor % most
        for dim in (1, 0):
            line = torch.arange(tensor.shape[dim]).reshape([-1 if one == dim else 1 for one in range(2)])
            if bool((inputs == line).all()) and bool((owners == owners.select(dim, 0).unsqueeze(dim)).all()):
                within = [names[number] for number in sorted(set(owners.select(dim, 0).tolist()))]
                yield _Fused(key, tuple(tensor.shape), dim), within
                break


def without_statistics(
    model: Any, named: frozenset[str], checkpoint: Checkpoint
) -> Iterator[tuple[str, str]]:
    """The matrices and stacks of a checkpoint without statistics, each with the reason."""
    modules = model.named_modules()
    embeddings = {f"{path}.weight" for path, module in modules if isinstance(module, torch.nn.Embedding)}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # Both by the names that they are saved under as well.
    embeddings |= {each for name in embeddings for each in as_saved(model, {name: torch.empty(1, 1)})}
    known |= {each for name in known for each in as_saved(model, {name: torch.empty(1, 1)})}
    for name, stored in checkpoint.tensors.items():
        if name in named or len(stored.shape) not in {2, 3} or stored.dtype not in _FLOATS:
            continue
        ends = {name for name in known if name == stored.name or _is_end(name, stored.name)}
        if ends & embeddings:
            yield name, "an embedding, which is looked up and not multiplied with"
        elif ends:
            yield name, "no matrix product with it was seen"
        else:
            yield name, "the model has nothing of this name"


def siblings(seen: Mapping[str, Any], model: Any) -> dict[str, str]:
    """Parameters that were not seen, each with a seen one whose name differs in one number alone.

    For example an expert that the text does not reach.
    """
    forms: dict[str, str] = {}
    for name in seen:
        for form in _forms(name):
            forms.setdefault(form, name)
    found = {}
    for name, parameter in model.named_parameters():
        if name not in seen and parameter.ndim == 2:
            like = next((forms[form] for form in _forms(name) if form in forms), None)
            if like is not None:
                found[name] = like
    return found


def renumbered(name: str, one: str, like: str) -> str:
    """`name`, a neighbour of `like`, renumbered to be the same neighbour of `one`.

    >>> renumbered("mlp.experts.0.up", "mlp.experts.7.gate", "mlp.experts.0.gate")
    'mlp.experts.7.up'
    """
    pairs = zip(MEMBER.findall(one), MEMBER.findall(like), strict=False)
    other = {place: mine for place, (mine, theirs) in enumerate(pairs) if mine != theirs}
    places = count()

    def number(found: re.Match[str]) -> str:
        kind = found[0].removesuffix(found[1])  # such as `expert_`
        return f"{kind}{other.get(next(places), found[1])}"

    return MEMBER.sub(number, name)


def _forms(name: str) -> Iterator[str]:
    """The name with one of its numbers replaced by *, beginning with the last.

    Numbers of layers and experts: those of w1 and w2 or fc1 and fc2 tell matrices of different inputs apart.
    """
    for found in reversed(list(MEMBER.finditer(name))):
        yield f"{name[: found.start(1)]}*{name[found.end(1) :]}"


def _one(model: Any, name: str, shape: tuple[int, ...], dim: int, checkpoint: Checkpoint) -> list[StoredAs]:
    saved = as_saved(model, {name: _tags(shape, dim)})
    features = shape[dim]
    ways = (
        _decoded(_stored_name(key, tuple(tensor.shape), checkpoint), tensor, features)
        for key, tensor in saved.items()
    )
    found = [stored for stored in ways if stored is not None]
    return found if len(shape) == 3 else [replace(stored, matrix=None) for stored in found]


def as_saved(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a model as transformers would save them; unchanged if it does not convert them back."""
    try:
        from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

        saved: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    except Exception:  # noqa: BLE001  (what it cannot convert keeps its name)
        return tensors
    return saved


def _tags(shape: tuple[int, ...], dim: int) -> Tensor:
    """For each element: its matrix in a stack times the features, plus its input; takes no memory."""
    features = shape[dim]
    tags = torch.arange(features).reshape([-1 if other == dim else 1 for other in range(len(shape))])
    if len(shape) == 3:
        tags = tags + features * torch.arange(shape[0]).reshape(-1, 1, 1)
    return tags.expand(shape)


def _decoded(name: str | None, tags: Tensor, features: int) -> StoredAs | None:
    """The tensor of a name, read from its tags; None if its inputs are incomplete or in another order."""
    if name is None or tags.ndim not in {2, 3}:
        return None
    first = int(tags.reshape(-1)[0])
    if first % features:
        return None
    dims = [dim for dim in range(tags.ndim) if _counts(tags, dim, 1) and tags.shape[dim] == features]
    if not dims:
        return None
    if tags.ndim == 3 and (dims[-1] == 0 or not _counts(tags, 0, features)):
        return None
    return StoredAs(name, dims[-1], None if tags.ndim == 3 else first // features)


def _counts(tags: Tensor, dim: int, step: int) -> bool:
    """Whether tags grow by a step along a dimension."""
    line = tags[tuple(slice(None) if other == dim else 0 for other in range(tags.ndim))]
    return bool((line == line[0] + step * torch.arange(len(line))).all())


def _stored_name(name: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> str | None:
    """The tensor with a name and a shape: of that name, else the only one whose name differs by a prefix."""
    stored = checkpoint.tensors.get(name)
    if stored is not None:
        return name if stored.shape == shape else None
    alike = [
        other.name
        for other in checkpoint.tensors.values()
        if other.shape == shape and _is_end(other.name, name)
    ]
    return alike[0] if len(alike) == 1 else None


def _is_end(one: str, other: str) -> bool:
    """Whether one of two names is the other with a prefix."""
    return one.endswith(f".{other}") or other.endswith(f".{one}")
