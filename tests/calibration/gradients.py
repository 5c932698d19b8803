"""The gradients of the loss at the outputs of all products, as autograd alone has them: slow and plain."""

import hashlib
from typing import Any

import torch
from msgspec import Struct
from torch.overrides import TorchFunctionMode

_FUNCTIONS = ("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm")


class Met(Struct, eq=False):
    """Of a matrix, seen (outputs, inputs): the rows of its inputs, and of the gradients at its outputs."""

    weight: torch.Tensor
    inputs: list[torch.Tensor]
    gradients: list[torch.Tensor]


class Products(TorchFunctionMode):
    """Keeps inputs and gradients of the products with parameters that Python code writes down."""

    def __init__(self, model: Any, counted: torch.Tensor) -> None:
        super().__init__()
        self.storages = {one.untyped_storage().data_ptr() for one in model.parameters() if one.ndim > 1}
        self.counted = counted
        window = getattr(model.config, "attention_window", 1)
        self.window = max(window) if isinstance(window, list) else window
        self.met: dict[tuple[int, tuple[int, ...]], Met] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        operands = args[1:3] if "add" in name else args[:2]
        if name not in _FUNCTIONS or len(operands) < 2:  # attention names its operands
            return made
        inputs, weight = operands
        if weight.untyped_storage().data_ptr() not in self.storages:
            return made
        seen = weight if name == "linear" else weight.mT
        if seen.ndim == 2:
            self.keep(seen, inputs, made, None)
        else:
            parts = made.unbind()
            for matrix, rows, outputs in zip(seen, inputs, parts, strict=True):
                self.keep(matrix, rows, outputs, rows.any(-1))
            made = torch.stack(parts)
        return made.clone()  # which models may change in place

    def keep(
        self, weight: torch.Tensor, inputs: torch.Tensor, made: torch.Tensor, met: torch.Tensor | None
    ) -> None:
        """Keep the inputs now, and the gradients when they come; zeros if none does."""
        chosen = self.of_tokens(inputs.shape[:-1])
        if met is not None:
            chosen = met if chosen is None else met & chosen

        def rows(of: torch.Tensor) -> torch.Tensor:
            flat = of.detach().reshape(-1, of.shape[-1])
            return (flat if chosen is None else flat[chosen]).double().clone()

        key = (weight.data_ptr(), tuple(weight.shape))
        one = self.met.setdefault(key, Met(weight.detach(), [], []))
        place = len(one.inputs)
        one.inputs.append(rows(inputs))
        one.gradients.append(torch.zeros(len(one.inputs[-1]), made.shape[-1], dtype=torch.float64))
        if made.requires_grad:
            hook: Any = made.register_hook
            hook(lambda gradient: one.gradients.__setitem__(place, rows(gradient)))

    def of_tokens(self, shape: Any) -> torch.Tensor | None:
        """Which rows count, where there is one for each token, maybe padded or with places in front."""
        sequences, places = self.counted.shape
        padded = torch.nn.functional.pad(self.counted, (0, -places % self.window))
        for one in (self.counted, padded):
            if tuple(shape[-2:]) == tuple(one.T.shape) and sequences != places:
                return one.T.reshape(-1)
            if shape.numel() == one.numel():
                return one.reshape(-1)
        return None


def gradients_of(model: Any, ids: torch.Tensor, counted: torch.Tensor, run: Any, seed: int = 0) -> list[Met]:
    """What every matrix meets; all sequences at once, with embeddings that are made to need gradients."""
    hooks = [
        module.register_forward_hook(lambda _, __, made: made.detach().requires_grad_().clone())
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
    ]
    for parameter in model.parameters():  # of positions that are inputs of matrices
        parameter.requires_grad_(parameter.ndim == 1)
    with Products(model, counted) as products:
        made = run(model, ids)
        torch.autograd.backward([loss(made, ids, counted, seed)])
    for hook in hooks:
        hook.remove()
    return list(products.met.values())


def loss(made: Any, ids: torch.Tensor, counted: torch.Tensor, seed: int) -> torch.Tensor:
    """The sum over all tokens that count, each drawn from a generator of its sequence."""
    logits = made.get("logits", made.get("prediction_logits"))
    total = torch.zeros(())
    for number in range(len(ids)):
        digest = hashlib.blake2b(f"{seed}\0{number}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        if logits is None:
            states = made["last_hidden_state"][number]
            probes = torch.randn(states.shape, generator=generator)
            total = total + (states * probes)[counted[number]].sum()
            continue
        draws = torch.rand(ids.shape[1], generator=generator, dtype=torch.float64)
        for place, drawn in enumerate(draws.tolist()):
            shares = logits[number, place].detach().softmax(-1).double()
            label = next(
                (word for word, below in enumerate(shares.cumsum(0)) if drawn * shares.sum() < below),
                len(shares) - 1,
            )
            if counted[number, place]:
                total = total - logits[number, place].log_softmax(-1)[label]
    return total
