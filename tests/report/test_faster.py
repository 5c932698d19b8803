"""Where a result runs faster: what a spec made of matrices against what is found in them, and sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.report.faster import smaller_line
from sparseprune.results.fields import ConfigChange
from tests.commands import ok, valid

HEAD = 'version = 1\n[scope.w]\ntensors = "{name}.weight"\n'


def pruned(tmp_path: Path, spec: str, *, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Any], str]:
    """The report of a run, whose runtimes are those that inspect finds, and the line of its summary."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"{at}.weight": torch.randn(64, 128, generator=generator).to(dtype) for at in range(3)}
    weights["norm"] = torch.ones(64, dtype=dtype)
    save_file(weights, tmp_path / "m.safetensors")
    (tmp_path / "spec.toml").write_text(HEAD + spec)
    said = ok("apply", tmp_path / "m.safetensors", tmp_path / "spec.toml", "-o", tmp_path / "out.safetensors")
    report = json.loads((tmp_path / "out.report.json").read_text())
    looked = ok("inspect", tmp_path / "out.safetensors", "--for", "all", "--json")
    found = valid(looked.out, "inspect")["totals"]["runtimes"]
    for name, one in found.items():
        told = report["runtimes"][name]
        assert told["of"] == one["of"]
        # Zeros that a rule puts anywhere may happen to lie in a pattern, too.
        assert told["eligible"] == one["eligible"] or (name == "slidesparse" and not told["eligible"])
    (line,) = [line for line in said.err.splitlines() if line.startswith("faster: ")]
    return report, line


def test_2_of_4_in_bfloat16_is_faster_where_inspect_says_so(tmp_path: Path) -> None:
    _, line = pruned(tmp_path, "block = [1, 1]\nshape = [1, 4]\nnnz = 2\n")
    assert line == (
        "faster: in torch-cutlass, torch-cusparselt, torchao-fp8-2of4, torchao-fp8-rocm and 1 more; "
        "zeros run dense in vllm, sglang, transformers, mlx-lm and 3 more"
    )


@pytest.mark.parametrize(
    ("spec", "dtype", "told"),
    [
        ("block = [1, 1]\nshape = [1, 2]\nnnz = 1\n", torch.float32, "in torch-cutlass"),
        ("block = [1, 1]\nshape = [1, 8]\nnnz = 1\n", torch.float32, "in torch-cutlass"),
        (
            "block = [1, 1]\nshape = [1, 8]\nnnz = 2\n",
            torch.bfloat16,
            "in torch-cutlass, torch-cusparselt, torchao-fp8-2of4, torchao-fp8-rocm and 1 more",
        ),
        ("block = [1, 1]\nshape = [1, 16]\nnnz = 8\n", torch.float16, "in coreml"),
        ("block = [1, 1]\nshape = [-1, -1]\nsparsity = 0.8\n", torch.float16, "in coreml"),
        ("block = [1, 1]\nshape = [4, 1]\nnnz = 2\n", torch.float32, "in no runtime as these zeros lie"),
        (
            "block = [1, 1]\nshape = [-1, -1]\nsparsity = 0.3\n",
            torch.float16,
            "in no runtime as these zeros lie (research: macko)",
        ),
    ],
)
def test_other_zeros_are_faster_elsewhere_or_nowhere(
    tmp_path: Path, spec: str, dtype: torch.dtype, told: str
) -> None:
    _, line = pruned(tmp_path, spec, dtype=dtype)
    assert line.partition(";")[0] == f"faster: {told}"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"intermediate_size": 384}, ""),
        ({"intermediate_size": 370}, "; intermediate_size 370: not divisible by 32, for quantizers"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 4},
            "; num_attention_heads 6: not divisible by 4, for tensor parallelism",
        ),
        ({"text_config.num_experts": 7}, "; num_experts 7: odd, slower in fused kernels"),
        (
            {"intermediate_size": [64, 96]},
            "; intermediate_size unlike in layers: only classes that read such a list load it",
        ),
        ({"num_hidden_layers": 7}, ""),
    ],
)
def test_smaller_shapes_are_faster_where_the_config_is_read_and_odd_sizes_are_told(
    changes: dict[str, object], told: str
) -> None:
    made = [ConfigChange(key=key, before=512, after=after) for key, after in changes.items()]
    assert smaller_line(made) == f"faster: everywhere that reads sizes from the config{told}"
    assert smaller_line([]) is None
