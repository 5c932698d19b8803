"""Proximal training, as the guide has it: a step in AdamW's own metric. A test of pages shows its end."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle

GUIDE = Path(__file__).parents[2] / "specs" / "guide" / "python.md"


@pytest.fixture(scope="module")
def guide() -> dict[str, Any]:
    """What the example of the guide defines; what it asserts is asserted by the test of pages."""
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)
    (example,) = (block for block in blocks if "exp_avg_sq" in block)
    names: dict[str, Any] = {}
    exec(example.partition("\n(dense, dense_pruned")[0], names)
    return names


def test_a_step_is_the_proximal_step_of_adamw_in_plain_loops(guide: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mlp = guide["MLP"](4, 6).double()
    inputs, targets = torch.randn(128, 4).double(), torch.randn(128, 4).double()
    free = guide["MLP"](4, 6).double()
    lr, strength, steps = 0.01, 0.3, 4
    free.load_state_dict(mlp.state_dict())
    weights = [mlp.gate.weight, mlp.up.weight, mlp.down.weight.T]
    m = [torch.zeros_like(weight) for weight in weights]
    v = [torch.zeros_like(weight) for weight in weights]
    torch.manual_seed(1)
    for step in range(1, steps + 1):
        rows = torch.randint(len(inputs), (128,))
        (free(inputs[rows]) - targets[rows]).square().mean().backward()
        own = [free.gate.weight, free.up.weight, free.down.weight]
        gradients = [one.grad.T if one is free.down.weight else one.grad for one in own]
        h, moved = [], []
        for each, (gradient, weight) in enumerate(zip(gradients, own, strict=True)):
            m[each] = 0.9 * m[each] + 0.1 * gradient
            v[each] = 0.999 * v[each] + 0.001 * gradient**2
            h.append((v[each] / (1 - 0.999**step)).sqrt() + 1e-8)
            oriented = weight.data.T if weight is free.down.weight else weight.data
            moved.append(oriented - lr * m[each] / (1 - 0.9**step) / h[each])
        for channel in range(6):
            whole = torch.cat([one[channel] for one in moved]).tolist()
            shrunk = oracle.shrink(whole, lr * strength, torch.cat([one[channel] for one in h]).tolist())
            for each, weight in enumerate(own):
                part = torch.tensor(shrunk[4 * each : 4 * each + 4], dtype=torch.float64)
                (weight.data.T if weight is free.down.weight else weight.data)[channel] = part
        free.zero_grad()
    torch.manual_seed(1)
    guide["train"](mlp, inputs, targets, strength, steps=steps, lr=lr)
    for name, weight in mlp.state_dict().items():
        found = free.state_dict()[name]
        assert torch.allclose(weight, found, rtol=1e-6, atol=1e-9), (weight - found).abs().max()
        assert 0 < weight.count_nonzero() < weight.numel()
        assert torch.equal(weight == 0, found == 0)
