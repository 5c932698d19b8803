"""Stages of a block: which of its matrices can be pruned at the same time, by what depends on what.

Owns what is seen of data between the products of a block: how many pruned products lie before a matrix, and
which sums the outputs of a matrix end in. Knows no sums over tokens. Called by sweeping.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from sparseprune.calibration.watching import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch import Tensor

    from sparseprune.calibration.watching import Product

_ATEN = torch.ops.aten
_SAME = {  # operations whose outputs are their inputs in another shape, dtype or place
    _ATEN.view, _ATEN._unsafe_view, _ATEN.reshape, _ATEN.t, _ATEN.transpose, _ATEN.permute,  # noqa: SLF001
    _ATEN.unsqueeze, _ATEN.squeeze, _ATEN._to_copy, _ATEN.clone, _ATEN.contiguous, _ATEN.detach,  # noqa: SLF001
    _ATEN.alias, _ATEN.expand, _ATEN._reshape_alias,  # noqa: SLF001
}  # fmt: skip
_SUMS, _MULTIPLES = {_ATEN.add, _ATEN.add_}, {_ATEN.mul, _ATEN.mul_, _ATEN.div, _ATEN.div_}
_QUOTIENTS = {_ATEN.div, _ATEN.div_}


class Depths(Watch):  # type: ignore[no-untyped-call]
    """Watches one pass of a block: `of` has, for each parameter, how many products lie before it.

    `last` has the number of the last product with each parameter, `first` that of the first. `again` are
    parameters that are multiplied with several inputs, one after the other, `routed` those of experts.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model, self)
        self.of: dict[str, int] = {}
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.again: set[str] = set()
        self.routed: set[str] = set()
        self._depth: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no memory is used again
        self._met: defaultdict[tuple[str, int | None], set[int]] = defaultdict(set)
        self._products = 0
        self._now: Product | None = None

    def product(self, product: Product) -> None:
        """Note a product before it is computed."""
        self._products += 1
        name = product.parameter
        self.first.setdefault(name, self._products)
        self.last[name] = self._products
        met = self._met[name, product.matrix]
        met.add(product.inputs.data_ptr())
        if len(met) > 1:
            self.again.add(name)
        if product.routed:
            self.routed.add(name)
        self._now = product

    def gradients(self, *_: Any) -> None:
        """There are none."""

    def gated(self, *_: Any) -> None:
        """Gates do not count."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = _tensors((args, kwargs))
        depth = max((self._depth.get(_key(one), 0) for one in before), default=0)
        self._now = None
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if self._now is not None:
            name = self._now.parameter
            self.of[name] = max(self.of.get(name, 0), depth)
            depth += 1
        after = _tensors(made)
        self._alive += [before, after]
        if depth:
            for one in (*after, *_written(func, args)):
                self._depth[_key(one)] = max(depth, self._depth.get(_key(one), 0))
        return made


class Following(Watch):  # type: ignore[no-untyped-call]
    """Tells `seen` of each product of a block, and follows the outputs of some parameters to their sums.

    Call `begin` before each pass. Then `beside` gives what was added to the outputs of a parameter, a
    number for each output of each token: by how much outputs would have to change to change the sum so.
    """

    def __init__(
        self, model: torch.nn.Module, seen: Callable[[Product], None], followed: Collection[str]
    ) -> None:
        super().__init__(model, self)
        self._seen = seen
        self._bits = {name: 1 << number for number, name in enumerate(sorted(followed))}
        self.forget()

    def begin(self, counted: Tensor, *, gradients: bool = False) -> None:
        """Begin a forward pass, as `Watch` does."""
        super().begin(counted, gradients=gradients)
        self.forget()

    def forget(self) -> None:
        """Keep nothing of a pass."""
        self._carried: dict[int, dict[str, float]] = {}  # whose outputs a storage has, times what
        self._depends: dict[int, int] = {}  # on whose outputs a storage depends, as bits
        self._alive: list[Tensor] = []
        self._added: defaultdict[str, list[tuple[float, Tensor]]] = defaultdict(list)
        self._now: Product | None = None

    def product(self, product: Product) -> None:
        """A product, before it is computed."""
        self._now = product
        self._seen(product)

    def gradients(self, *_: Any) -> None:
        """There are none."""

    def gated(self, *_: Any) -> None:
        """Gates do not count."""

    def beside(self, name: str) -> Tensor | None:
        """What the outputs of a parameter were added to, (tokens, outputs); None where to nothing."""
        added = self._added.get(name)
        if not added:
            return None
        found = [(one.to(torch.float32) / factor).reshape(-1, one.shape[-1]) for factor, one in added]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._now = None
        changed = func.overloadpacket is _ATEN.add_ and isinstance(args[1], torch.Tensor)
        first = args[0].clone() if changed and _key(args[1]) in self._carried else None
        made = super().__torch_dispatch__(func, types, args, kwargs)
        product = self._now
        if not self._bits or (product is None and not self._depends):
            return made
        depends = 0
        for one in _tensors((args, kwargs)):
            depends |= self._depends.get(_key(one), 0)
        if product is not None:
            self._consumed(depends)
            depends |= self._bits.get(product.parameter, 0)
        if not depends:
            return made
        if product is not None and product.parameter in self._bits and isinstance(made, torch.Tensor):
            if product.matrix is None and product.inputs.ndim == 2:
                self._carried[_key(made)] = {product.parameter: 1.0}
        elif product is None:
            given = args if first is None else (first, *args[1:])
            self._carry(func.overloadpacket, given, kwargs or {}, made)
        for one in (*_tensors(made), *_written(func, args)):
            self._depends[_key(one)] = self._depends.get(_key(one), 0) | depends
            self._alive.append(one)
        return made

    def _consumed(self, depends: int) -> None:
        """A product has outputs of these parameters in its inputs: nothing is followed beyond."""
        for key, names in list(self._carried.items()):
            left = {name: factor for name, factor in names.items() if not self._bits[name] & depends}
            if left:
                self._carried[key] = left
            else:
                del self._carried[key]

    def _carry(self, packet: Any, args: Any, kwargs: Mapping[str, Any], made: Any) -> None:
        if not args or not isinstance(made, torch.Tensor) or not isinstance(args[0], torch.Tensor):
            return
        of_first = self._carried.get(_key(args[0]), {})
        if packet in _SAME:
            if of_first:
                self._carried[_key(made)] = of_first
        elif packet in _SUMS and isinstance(args[1], torch.Tensor):
            self._summed(args, kwargs, made)
        elif packet in _MULTIPLES:
            self._multiplied(packet, args, of_first, made)

    def _summed(self, args: Any, kwargs: Mapping[str, Any], made: Tensor) -> None:
        carried: dict[str, float] = {}
        if kwargs.get("alpha", 1) == 1:
            for mine, other in ((args[0], args[1]), (args[1], args[0])):
                for name, factor in self._carried.get(_key(mine), {}).items():
                    if mine.shape != made.shape or self._depends.get(_key(other), 0) & self._bits[name]:
                        continue
                    if other.shape == made.shape:  # not a bias
                        self._added[name].append((factor, other))
                    carried[name] = factor
        if carried:
            self._carried[_key(made)] = carried
        else:
            self._carried.pop(_key(made), None)

    def _multiplied(self, packet: Any, args: Any, carried: dict[str, float], made: Tensor) -> None:
        other = args[1]
        number = float(other) if not isinstance(other, torch.Tensor) or other.numel() == 1 else 0.0
        if carried and number:
            factor = 1 / number if packet in _QUOTIENTS else number
            self._carried[_key(made)] = {name: one * factor for name, one in carried.items()}
        else:
            self._carried.pop(_key(made), None)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(some: Any) -> list[Tensor]:
    return [one for one in tree_leaves(some) if isinstance(one, torch.Tensor)]


def _written(func: Any, args: Any) -> Iterator[Tensor]:
    """The arguments that an operation changes in place."""
    if func._schema.is_mutable:  # noqa: SLF001
        for one, said in zip(args, func._schema.arguments, strict=False):  # noqa: SLF001
            if said.alias_info is not None and said.alias_info.is_write and isinstance(one, torch.Tensor):
                yield one
