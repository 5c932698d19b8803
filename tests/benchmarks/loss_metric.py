"""The loss metric: `admm` with gradients beside `admm` without and SparseGPT, matrices in memory.

`python -m tests.benchmarks.loss_metric SCRATCH [--only PART]` prints Markdown tables. The decoder is that of
the benchmark of reconstruction, in the same folder; moments and gradients are taken here, by autograd.
"""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseprune import BlockSpec, Matrix, ScopeSpec, admm, projection
from sparseprune.engine import errors_of
from tests.benchmarks import decoders
from tests.benchmarks.reconstruction import made, run_parts, table
from tests.benchmarks.reconstruction_measures import texts
from tests.benchmarks.sparsegpt import n_of_m, sparsegpt

SIZES = ((1024, 1024), (1024, 256))
KEPT = {"2:4": 2, "1:4": 1}
METHODS = ("SparseGPT", "ADMM", "ADMM, loss metric")
FEW = "ADMM, loss metric, gradients of 8 sequences"
SEQUENCES = 128
COLUMNS = ["perplexity", "KL to dense", "error of outputs", "of the loss", "CPU seconds"]
_BATCH = 16


def pruned(matrix: Matrix, kept: int, method: str) -> Tensor:
    """The weights with so many of every four neighbours in a row."""
    if method == "SparseGPT":
        return sparsegpt(matrix.dense, matrix.moment, n_of_m(kept, 4))
    params = [torch.empty_like(matrix.dense)]
    project = projection(ScopeSpec(BlockSpec(params[0], (1, 1)), (1, 4)), kept, params)
    (found,) = admm([matrix if method == METHODS[-1] else Matrix(matrix.dense, matrix.moment)], project)
    return found.weights


def correlated(size: int, generator: torch.Generator) -> Tensor:
    """A second moment whose spectrum falls by e every 15% of its length, to 0.4%, with unlike diagonals."""
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    spectrum = torch.exp(-torch.arange(size) / (0.15 * size)) + 0.003
    scales = torch.exp(0.5 * torch.randn(size, generator=generator))
    moment: Tensor = scales.unsqueeze(-1) * (turn * spectrum) @ turn.T * scales
    return moment.add(moment.mT) / 2


def matrices(_: Path) -> None:
    """Seeded matrices with correlated inputs and gradients: errors in both metrics."""
    for rows, features in SIZES:
        generator = torch.Generator().manual_seed(0)
        dense = torch.randn(rows, features, generator=generator) / math.sqrt(features)
        matrix = Matrix(dense, correlated(features, generator), gradients=correlated(rows, generator))
        lines = []
        for pattern, kept in KEPT.items():
            for method in METHODS:
                began = time.process_time()
                weights = pruned(matrix, kept, method)
                seconds = time.process_time() - began
                errors = errors_of(matrix, weights)
                cells = f"{errors.outputs[0]:.4f}", f"{(errors.loss or (math.nan,))[0]:.4f}"
                lines.append([pattern, method, *cells, f"{seconds:.1f}"])
        columns = ["pattern", "method", "error of outputs", "error of the loss", "CPU seconds"]
        table(f"{rows}x{features}", columns, lines)


# The decoder.


def decoder(scratch: Path) -> None:
    """A small Llama of characters: perplexity and KL to the dense model on held-out text."""
    model, windows, tokens = taught(scratch)
    given = statistics(model, windows)
    few = statistics(model, windows[:8])
    eight = {
        name: Matrix(one.dense, one.moment, gradients=few[name].gradients) for name, one in given.items()
    }
    lines = [["dense", "", *quality(model, model, tokens), "", "", ""]]
    for pattern, kept in KEPT.items():
        lines += [
            [method, pattern, *rebuilt(model, given, given, kept, method, tokens)] for method in METHODS
        ]
        lines.append([FEW, pattern, *rebuilt(model, given, eight, kept, METHODS[-1], tokens)])
    table("2:4 and 1:4", ["method", "pattern", *COLUMNS], lines)


def taught(scratch: Path) -> tuple[Any, Tensor, Tensor]:
    """The decoder, windows of the text for calibration, and of the text held out."""
    folder = made(scratch / "llama")
    calibration, held = texts(folder)
    model, tokenizer = loaded(decoders.trained(folder / "dense", calibration))
    return model, ids_of(tokenizer, calibration, SEQUENCES), ids_of(tokenizer, held, 400)


def rebuilt(
    model: Any, given: dict[str, Matrix], used: dict[str, Matrix], kept: int, method: str, tokens: Tensor
) -> list[str]:
    """The cells of a row: all matrices pruned with the moments `used`, errors by those `given`."""
    other = copy.deepcopy(model)
    weights = dict(other.named_parameters())
    outputs: list[float] = []
    loss: list[float] = []
    seconds = 0.0
    for name, matrix in given.items():
        began = time.process_time()
        found = pruned(used[name], kept, method)
        seconds += time.process_time() - began
        errors = errors_of(matrix, found)
        outputs += errors.outputs
        loss += errors.loss or ()
        weights[name].data.copy_(found)
    means = [f"{sum(one) / len(one):.4f}" for one in (outputs, loss)]
    return [*quality(other, model, tokens), *means, f"{seconds:.1f}"]


# Large gradients in less memory.


def forms(scratch: Path) -> None:
    """The same decoder with gradients in groups of rows, or of low rank beside their diagonal."""
    model, windows, tokens = taught(scratch)
    given = statistics(model, windows)
    lines = []
    for pattern, kept in KEPT.items():
        for form, gradients in FORMS.items():
            used = {
                name: Matrix(one.dense, one.moment, gradients=gradients(full))
                for name, one in given.items()
                if (full := one.gradients) is not None
            }
            lines.append([form, pattern, *rebuilt(model, given, used, kept, METHODS[-1], tokens)])
    table("2:4 and 1:4", ["gradients", "pattern", *COLUMNS], lines)


def in_groups(groups: int) -> Callable[[Tensor], Tensor]:
    def take(full: Tensor) -> Tensor:
        size = len(full) // groups
        return torch.stack([full[at : at + size, at : at + size] for at in range(0, len(full), size)])

    return take


def of_rank(share: int) -> Callable[[Tensor], Tensor]:
    """Of rank `out // share`, and a diagonal so that the moment keeps its own: in turn, until both stand."""

    def take(full: Tensor) -> Tensor:
        wide, rank = full.double(), len(full) // share
        scale = wide.diagonal().sqrt().clamp_min(1e-30)
        unit = wide / scale / scale.unsqueeze(-1)
        rest = torch.zeros(len(full), dtype=torch.float64)
        for _ in range(20):
            values, vectors = torch.linalg.eigh(unit - rest.diag())
            low = vectors[:, -rank:] * values[-rank:].clamp_min(0) @ vectors[:, -rank:].T
            rest = (1 - low.diagonal()).clamp_min(0)
        found: Tensor = (low + rest.diag()) * scale * scale.unsqueeze(-1)
        return ((found + found.T) / 2).to(full.dtype)

    return take


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda full: full,
    "2 groups": in_groups(2),
    "4 groups": in_groups(4),
    "8 groups": in_groups(8),
    "the diagonal": lambda full: full.diag().diag(),
    "rank out / 4 and diagonal": of_rank(4),
    "rank out / 8 and diagonal": of_rank(8),
    "rank out / 16 and diagonal": of_rank(16),
}


def loaded(folder: Path) -> tuple[Any, Any]:
    import transformers

    own: Any = transformers
    model = own.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, own.AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer: Any, text: Path, windows: int) -> Tensor:
    """Windows of characters, spread over all of a text."""
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
    rows = ids[: len(ids) // decoders.LENGTH * decoders.LENGTH].reshape(-1, decoders.LENGTH)
    return rows[:: max(1, len(rows) // windows)][:windows]


def statistics(model: Any, windows: Tensor) -> dict[str, Matrix]:
    """Of every projection: E[x x^T], and E[g g^T] with labels drawn from the model's own softmax."""
    generator = torch.Generator().manual_seed(0)
    layers = {name: one for name, one in model.named_modules() if name.endswith("_proj")}
    inputs = {name: torch.zeros(one.in_features, one.in_features) for name, one in layers.items()}
    gradients = {name: torch.zeros(one.out_features, one.out_features) for name, one in layers.items()}
    hooks = [one.register_forward_hook(_watch(name, inputs, gradients)) for name, one in layers.items()]
    for part in torch.split(windows, _BATCH):
        logits = model(input_ids=part).logits.flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).reshape(-1)
        lost: Any = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        lost.backward()
        model.zero_grad()
    for hook in hooks:
        hook.remove()
    tokens = windows.numel()
    return {
        f"{name}.weight": Matrix(
            one.weight.detach().clone(), inputs[name] / tokens, gradients=gradients[name] / tokens
        )
        for name, one in layers.items()
    }


def _watch(name: str, inputs: dict[str, Tensor], gradients: dict[str, Tensor]) -> Callable[..., None]:
    def watch(_: Any, given: tuple[Tensor], output: Any) -> None:
        rows = given[0].detach().flatten(0, 1)
        inputs[name] += rows.T @ rows
        output.register_hook(lambda gradient: _add(gradients[name], gradient.flatten(0, 1)))

    return watch


def _add(total: Tensor, rows: Tensor) -> None:
    total += rows.T @ rows


def quality(model: Any, dense: Any, tokens: Tensor) -> list[str]:
    perplexity, far = measured(model, dense, tokens)
    return [f"{perplexity:.3f}", f"{far:.5f}"]


def measured(model: Any, dense: Any, tokens: Tensor) -> tuple[float, float]:
    """Perplexity, and the mean over tokens of the KL of the dense model's distribution to this one's."""
    lost, far = [], []
    with torch.no_grad():
        for part in torch.split(tokens, 50):
            mine, theirs = (one(input_ids=part).logits.log_softmax(-1) for one in (model, dense))
            lost.append(-mine[:, :-1].gather(-1, part[:, 1:, None]).flatten())
            far.append((theirs.exp() * (theirs - mine)).sum(-1).flatten())
    return math.exp(float(torch.cat(lost).mean())), float(torch.cat(far).mean())


PARTS: dict[str, Callable[[Path], None]] = {"matrices": matrices, "decoder": decoder, "forms": forms}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
