"""Watching: every product of activations with a parameter, wherever a model's code makes it.

Owns how a product is recognized (an operand that looks at a parameter's storage), so that linear layers,
transposed ones and fused experts need no code of their own; and which rows of an input are tokens that count.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

_ATEN = torch.ops.aten
# Where the input and the weight stand among the arguments, and whether the weight lies (out, in).
_PRODUCTS: Mapping[Any, tuple[int, int, bool]] = {
    _ATEN.mm: (0, 1, False),
    _ATEN.bmm: (0, 1, False),
    _ATEN.matmul: (0, 1, False),
    _ATEN.addmm: (1, 2, False),
    _ATEN.baddbmm: (1, 2, False),
    _ATEN.linear: (0, 1, True),
}
_REMEMBERED = 8  # inputs that are kept alive, so that a later product with the same one is known


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """Inputs (rows, features) that met a parameter, or (matrices, rows, features) that met each of a stack.

    `matrix` is which one of a stack it was, None for all of them or where there is no stack; `input_dim` is
    the dimension of the parameter along which inputs lie; `counted` which rows are tokens that count,
    None for all; `routed` whether the rows are those tokens that a router chose for this matrix.
    """

    parameter: str
    matrix: int | None
    input_dim: int
    inputs: Tensor
    counted: Tensor | None
    routed: bool


class EnoughError(Exception):
    """Ends a forward pass: nothing that follows is needed."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, tells `seen` of each product with a parameter before it is computed.

    `counted` (sequences * length) is to be set before each forward pass.
    """

    def __init__(self, model: torch.nn.Module, seen: Callable[[Product], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen
        self._known = {
            parameter.untyped_storage().data_ptr(): (name, parameter)
            for name, parameter in model.named_parameters()
            if parameter.ndim in {2, 3} and parameter.device.type != "meta"
        }
        self._names = {id(module): name for name, module in model.named_modules()}
        self._running: list[torch.nn.Module] = []
        self._hooks = [
            torch.nn.modules.module.register_module_forward_pre_hook(self._enter_module),
            torch.nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        self.counted = torch.empty(0, dtype=torch.bool)
        self._gathered: Tensor | None = None
        self._gatherer: torch.nn.Module | None = None

    def close(self) -> None:
        """Takes its hooks out again."""
        for hook in self._hooks:
            hook.remove()

    def begin(self, counted: Tensor) -> None:
        """A forward pass over sequences begins, of whose tokens these count, (sequences, length)."""
        self.counted = counted.reshape(-1)
        self._gathered = None
        self._running.clear()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
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
        dims = [
            dim
            for dim in range(parameter.ndim - 2, parameter.ndim)
            if parameter.stride(dim) == weight.stride(contracted) and parameter.shape[dim] == features
        ]
        if not dims:
            return  # a part of its inputs, or a look that is none at a matrix
        matrix = None
        if parameter.ndim == 3 and weight.ndim == 2:
            begin = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
            matrix = begin // parameter.stride(0)
        rows = inputs if weight.ndim == 3 else inputs.reshape(-1, features)
        gathered = self._gathered is not None and self._gathered.numel() == rows.shape[-2]
        counted = self._rows_that_count(rows.shape[-2])
        self._seen(Product(name, matrix, dims[-1], rows, counted, gathered or parameter.ndim == 3))

    def _parameter(self, weight: Tensor) -> tuple[str, Tensor] | None:
        """The parameter at which an operand looks, and its name."""
        address = weight.untyped_storage().data_ptr()
        found = self._known.get(address)
        if found is not None:
            return found
        # Parameters that lie elsewhere are put in place while their module runs.
        for module in reversed(self._running):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim in {2, 3} and parameter.untyped_storage().data_ptr() == address:
                    prefix = self._names[id(module)]
                    return (f"{prefix}.{name}" if prefix else name), parameter
        return None

    def _rows_that_count(self, rows: int) -> Tensor | None:
        if self._gathered is not None and self._gathered.numel() == rows:
            return self.counted.to(self._gathered.device)[self._gathered]
        return self.counted if rows == self.counted.numel() else None

    def _gather(self, index: Tensor) -> None:
        """Rows were taken by their numbers; who computes with them does so while this module runs."""
        self._gathered, self._gatherer = index, self._running[-1] if self._running else None

    def _has_all_rows(self, source: Tensor) -> bool:
        return source.ndim > 0 and source.shape[0] == self.counted.numel()

    def _enter_module(self, module: torch.nn.Module, inputs: Any) -> None:  # noqa: ARG002
        if id(module) in self._names:
            self._running.append(module)

    def _leave_module(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ARG002
        if self._running and self._running[-1] is module:
            self._running.pop()
        if module is self._gatherer:
            self._gathered = self._gatherer = None


class SharedInputs:
    """Which parameters meet the very same inputs, in every product of a forward pass.

    `groups` has for each parameter the first one of those that share its inputs, `input_dims` along which of
    its dimensions inputs lie, `first` and `last` the numbers of the first and the last product of each.
    """

    def __init__(self) -> None:
        self.input_dims: dict[str, int] = {}
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self._met: dict[str, list[int]] = {}
        self._previous = ("", 0)
        self._recent: deque[tuple[tuple[Any, ...], Tensor, int]] = deque(maxlen=_REMEMBERED)
        self._products = 0

    def __call__(self, product: Product) -> None:
        """Takes a product in."""
        self._products += 1
        name, inputs = product.parameter, product.inputs
        key = (inputs.data_ptr(), tuple(inputs.shape), inputs.stride(), inputs._version)  # noqa: SLF001
        # An input has the number of the first product with it.
        number = next((first for same, _, first in self._recent if same == key), self._products)
        if self._previous != (name, number):  # parts of one parameter meet one input, which counts once
            self._met.setdefault(name, []).append(number)
        self._previous = (name, number)
        self.input_dims.setdefault(name, product.input_dim)
        self.first.setdefault(name, self._products)
        self.last[name] = self._products
        self._recent.append((key, inputs, number))

    @property
    def groups(self) -> dict[str, str]:
        """By what was taken in until now."""
        leaders: dict[tuple[int, ...], str] = {}
        return {name: leaders.setdefault(tuple(met), name) for name, met in self._met.items()}
