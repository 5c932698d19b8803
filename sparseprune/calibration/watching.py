"""Watching a model: its matrix products with parameters, their gradients, the gates of its experts.

Owns what is seen of torch's dispatch. Knows no sums. Called by planning and collecting.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from msgspec import Struct
from msgspec.structs import replace
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


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


class Product(Struct, frozen=True, eq=False):
    """Inputs (rows, features) of a product with a parameter, (matrices, rows, features) with a whole stack.

    `matrix` is the number of a matrix in a stack, None for all matrices or without a stack; `input_dim` is
    the dimension of the parameter along which inputs lie; `outputs` counts the outputs of a row; `counted`
    says which rows are tokens that count, None for all; `routed` whether a router chose the rows for this
    matrix. `below` counts the matrices that lie one below another in a parameter of two dimensions; else it
    is 0. `tokens` are the numbers of the tokens that rows belong to, where a router chose some.
    """

    parameter: str
    matrix: int | None
    input_dim: int
    inputs: Tensor
    outputs: int
    counted: Tensor | None
    routed: bool
    below: int = 0
    tokens: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many rows its inputs have, those that do not count too."""
        return int(self.inputs.shape[-2])

    def chosen(self, matrix: int) -> Tensor | None:
        """Which rows are tokens that count and met this matrix, None for all."""
        if self.inputs.ndim < 3:
            return None if self.counted is None else self.counted.to(self.inputs.device)
        # Every token reaches every matrix of the stack, as zeros unless it was routed there.
        met = self.inputs[matrix].any(-1)
        return met if self.counted is None else met & self.counted.to(met.device)

    def of_chosen(self, rows: Tensor, chosen: Tensor | None) -> Tensor:
        """The chosen ones of some rows of this product; on a device all, with zeros in place of others.

        Else the host would wait for it at every product, to learn how many they are. Of a stack it does:
        there most rows of a matrix are others.
        """
        if chosen is None:
            return rows
        if _is_on_host(rows) or self.inputs.ndim == 3:
            return rows[chosen]
        return rows.masked_fill(~(chosen if rows.ndim == 1 else chosen.unsqueeze(-1)), 0)


class Watching(Protocol):
    """Who is told what a `Watch` sees."""

    def product(self, product: Product) -> None:
        """A product, before it is computed."""

    def gradients(self, product: Product, chosen: Mapping[int, Tensor | None], rows: Tensor) -> None:
        """The gradients at all rows of the outputs of a product; `chosen` as of the product, by matrix."""

    def gated(
        self, product: Product, matrix: int, chosen: Tensor | None, gates: Tensor, norms: Tensor
    ) -> None:
        """Of the chosen rows of an expert's last product: gates, and norms of outputs times gates."""


class _Open(Struct, frozen=True, eq=False):
    """A product whose gradients may come: what has to be known of it then, without its inputs."""

    product: Product
    chosen: Mapping[int, Tensor | None]
    stride: int  # of the outputs in the weight


class EnoughError(Exception):
    """Ends a forward pass: the rest is not needed."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, tells of each product with a parameter, its gradients, and gates of experts.

    It knows the parameters that have memory when it is made, and what runs in the thread that entered it.
    Call `begin` before each forward pass, `turn` before the backward pass that may follow.

    A backward pass multiplies the gradients at the outputs with the same weight along its other dimension:
    by this they are recognized. They belong to the last forward product with this weight and as many rows
    whose gradients did not come yet; which rows count depends on nothing else.
    """

    def __init__(self, model: torch.nn.Module, watching: Watching) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watching = watching
        self._gates = _Gates(watching)
        self._open: defaultdict[tuple[int, int], list[_Open]] | None = None
        self._backward = False
        # transformers may load parts of one tensor as parameters that share its storage.
        self._known: defaultdict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.ndim in {2, 3} and parameter.device.type != "meta":
                self._known[parameter.untyped_storage().data_ptr()].append((name, parameter))
        self._thread = 0
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

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def close(self) -> None:
        """Remove the hooks, and forget the tensors: whoever watches itself is freed by no count."""
        for hook in self._hooks:
            hook.remove()
        self._known.clear()
        del self._watching, self._gates

    def begin(self, counted: Tensor, *, gradients: bool = False) -> None:
        """Begin a forward pass; `counted` says which tokens count, (sequences, length).

        With `gradients` a backward pass follows.
        """
        self._open = defaultdict(list) if gradients else None
        self._backward = False
        self._gates.forget()
        padding = -counted.shape[1] % self._window
        padded = torch.nn.functional.pad(counted, (0, padding))  # by the model: none of these counts
        self.counted = counted.reshape(-1)
        self._counts = {one.numel(): (one.reshape(-1), one.T.reshape(-1)) for one in (padded, counted)}
        sizes = [(one.shape[1], one.shape[0]) for one in (padded, counted)]
        self._turned = {(places, sequences) for places, sequences in sizes if places != sequences}
        self._gathered = None
        self._running.clear()

    def turn(self) -> None:
        """What follows is the backward pass."""
        self._backward = True
        self._gates.forget()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        place = _PRODUCTS.get(packet)
        if self._backward:
            if place is not None:
                self._gradient(args[place[0]], args[place[1]])
            return func(*args, **(kwargs or {}))
        product = None
        if place is not None:
            product = self._product(args[place[0]], args[place[1]], outer=place[2])
        elif packet is _ATEN.index and self._has_all_rows(args[0]) and args[1][0] is not None:
            index = args[1][0]
            self._gather(index.nonzero().reshape(-1) if index.dtype == torch.bool else index)
        elif packet is _ATEN.index and args[1][0] is None and self._has_all_rows(args[0].squeeze(0)):
            if len(args[1]) == 2 and args[1][1].dtype == torch.int64:  # one member in front of the rows
                self._gather(args[1][1])
        elif packet is _ATEN.index_select and args[1] == 0 and self._has_all_rows(args[0]):
            self._gather(args[2])
        self._gates.before(packet, args)
        made = func(*args, **(kwargs or {}))
        self._gates.after(packet, args, made, product, self._running[-1][0] if self._running else None)
        return made

    def _product(self, inputs: Tensor, weight: Tensor, *, outer: bool) -> Product | None:
        found = self._parameter(weight)
        if found is None and inputs.ndim == weight.ndim == 3:  # many equal matrices may stand in front
            inputs, weight = weight.mT, inputs.mT
            found = self._parameter(weight)
            if found is not None and found[1].ndim == 3:
                return None
        if found is None or not inputs.numel():
            return None
        name, parameter = found
        if parameter.ndim == 2:
            inputs, weight = _flat(inputs, weight)
        contracted = weight.ndim - 1 if outer else weight.ndim - 2
        features = weight.shape[contracted]
        rows = inputs if weight.ndim == 3 else inputs.reshape(-1, features)
        gathered = self._gathered is not None and self._gathered.numel() == rows.shape[-2]
        counted = self._rows_that_count(rows.shape[-2])
        outputs = weight.ndim - 2 if outer else weight.ndim - 1
        part = _part_below(parameter, weight, contracted) if gathered else None
        if part is not None:
            dim, matrix, below = part.input_dim, part.number, part.of
        else:
            dims = [
                dim
                for dim in range(parameter.ndim - 2, parameter.ndim)
                if parameter.stride(dim) == weight.stride(contracted) and parameter.shape[dim] == features
            ]
            if not dims:
                return None  # a part of its inputs, or not a view of a matrix
            dim, matrix, below = dims[-1], None, 0
            if parameter.ndim == 3 and weight.ndim == 2:
                begin = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
                matrix = begin // parameter.stride(0)
        routed = gathered or parameter.ndim == 3
        tokens = self._gathered if gathered else None
        product = Product(name, matrix, dim, rows, weight.shape[outputs], counted, routed, below, tokens)
        self._watching.product(product)
        if self._open is not None:
            matrices = range(len(rows)) if rows.ndim == 3 else [matrix or 0]
            self._open[weight.data_ptr(), weight.numel()].append(
                _Open(
                    replace(product, inputs=rows.new_empty(()).expand(rows.shape)),
                    {one: product.chosen(one) for one in matrices},
                    weight.stride(outputs),
                )
            )
        return product

    def _gradient(self, left: Tensor, right: Tensor) -> None:
        """A product of a backward pass, of gradients and a weight in either order."""
        if self._open is None:
            return
        for operand, other, turned in ((right, left, False), (left, right, True)):
            rows, weight = _flat(other.mT if turned else other, operand)
            opened = self._open.get((weight.data_ptr(), weight.numel()), [])
            contracted = weight.ndim - (1 if turned else 2)
            for place in reversed(range(len(opened))):
                one = opened[place]
                fits = (weight.shape[contracted], rows.shape[-2]) == (one.product.outputs, one.product.rows)
                if fits and (one.product.outputs == 1 or weight.stride(contracted) == one.stride):
                    del opened[place]
                    self._watching.gradients(one.product, one.chosen, rows)
                    return

    def _parameter(self, weight: Tensor) -> tuple[str, Tensor] | None:
        """The parameter of which an operand is a view, and its name."""
        pairs = self._known.get(weight.untyped_storage().data_ptr(), ())
        return next((pair for pair in pairs if _holds(pair[1], weight)), None)

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
        if threading.get_ident() == self._thread:  # hooks are for all threads
            # Some models (Longformer, XLNet) have the places in front, and the sequences behind them.
            first = inputs[0] if inputs and isinstance(inputs[0], torch.Tensor) else None
            turned = first is not None and first.ndim > 2 and tuple(first.shape[:2]) in self._turned
            self._running.append((module, turned))

    def _leave_module(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ARG002
        if threading.get_ident() != self._thread:
            return
        if self._running and self._running[-1][0] is module:
            self._running.pop()
        self._gates.left(module)
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


def _flat(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of a product with one matrix for all, which torch may write as many equal ones."""
    if weight.ndim < 3 or (len(weight) > 1 and weight.stride(0)):
        return rows, weight
    return rows.reshape(-1, rows.shape[-1]), weight[0]


class _Gates:
    """Finds the products of experts whose outputs, or inputs, are multiplied with a gate for each row.

    What gates are is not told by names: they have one number for each row of what they multiply. Gates of
    inputs are in the outputs already, whose norm then counts as it is.
    """

    def __init__(self, watching: Watching) -> None:
        self._watching = watching
        self.forget()

    def forget(self) -> None:
        """Nothing of a pass is kept."""
        self._last: tuple[Product, Tensor] | None = None  # of one expert, with what came of it
        self._scaled: tuple[Tensor, Tensor] | None = None  # rows that were multiplied with gates, these
        self._stack: tuple[torch.nn.Module | None, Tensor] | None = None  # of all experts: where, gates
        self._of_stack: tuple[Product, Tensor] | None = None

    def before(self, packet: Any, args: Any) -> None:
        """Tell of the gates of an expert's outputs, which may be multiplied in place."""
        if packet not in {_ATEN.mul, _ATEN.mul_} or self._last is None:
            return
        product, outputs = self._last
        for one, other in (args, args[::-1]):
            if _same(one, outputs) and _is_gate(other, outputs):
                self._last = None
                matrix = product.matrix or 0
                chosen = product.chosen(matrix)
                gates = product.of_chosen(other.reshape(-1).double(), chosen)
                norms = product.of_chosen(_norms(one.reshape(outputs.shape)), chosen)
                self._watching.gated(product, matrix, chosen, gates, gates.abs() * norms)
                return

    def after(
        self, packet: Any, args: Any, made: Any, product: Product | None, module: torch.nn.Module | None
    ) -> None:
        """Keep what gates may multiply: outputs of an expert, with its bias or in another dtype."""
        if product is not None:
            self._met(product, made, module)
        elif packet in {_ATEN.mul, _ATEN.mul_}:
            for one, other in (args, args[::-1]):
                if isinstance(one, torch.Tensor) and one.ndim == 2 and _is_gate(other, one):
                    self._scaled = (made, other.reshape(-1))
        elif self._last is not None and packet in {_ATEN.add, _ATEN.add_, _ATEN._to_copy}:  # noqa: SLF001
            rows = self._last[0].rows
            others = [one for one in args[:2] if not _same(one, self._last[1])]
            if len(others) < len(args[:2]) and all(_is_bias(one, rows) for one in others):
                self._last = (self._last[0], made)

    def _met(self, product: Product, made: Tensor, module: torch.nn.Module | None) -> None:
        if product.inputs.ndim < 3:
            self._last = (product, made) if product.routed else None
            return
        if self._scaled is not None and _same(product.inputs, self._scaled[0]):
            self._stack = (module, self._scaled[1].reshape(product.inputs.shape[:2]))
        if self._stack is not None and self._stack[1].shape == product.inputs.shape[:2]:
            self._of_stack = (product, made)

    def left(self, module: torch.nn.Module) -> None:
        """Tell of a stack of experts when its module ends, whose last product is the last of each."""
        if self._stack is None or self._stack[0] is not module:
            return
        (_, gates), found = self._stack, self._of_stack
        self._stack = self._of_stack = self._scaled = None
        if found is None:
            return
        product, outputs = found
        with torch.no_grad():
            for matrix in range(len(outputs)):
                chosen = product.chosen(matrix)
                if chosen is not None:
                    norms = _norms(product.of_chosen(outputs[matrix], chosen))
                    gated = product.of_chosen(gates[matrix], chosen).double()
                    self._watching.gated(product, matrix, chosen, gated, norms)


def _same(one: Any, other: Tensor) -> bool:
    """Whether a tensor has the elements of another one, maybe in another shape."""
    return (
        isinstance(one, torch.Tensor) and one.numel() == other.numel() and one.data_ptr() == other.data_ptr()
    )


def _is_gate(one: Any, rows: Tensor) -> bool:
    """Whether a tensor has one number for each of some rows."""
    return (
        isinstance(one, torch.Tensor)
        and one.ndim == 2
        and one.shape[-1] == 1
        and one.numel() == rows.numel() // rows.shape[-1]
    )


def _is_bias(one: Any, rows: int) -> bool:
    return isinstance(one, torch.Tensor) and (one.ndim == 1 or (one.ndim == 2 and len(one) == 1 < rows))


def _is_on_host(tensor: Tensor) -> bool:
    """Whether the host has what is in a tensor, and waits for no device."""
    return tensor.device.type == "cpu"


def _norms(rows: Tensor) -> Tensor:
    return rows.double().square().sum(-1).sqrt()
