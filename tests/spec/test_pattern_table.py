"""The table of patterns in the reference: each row is applied, and what survives is what the row says.

A row is read here in its own words, as views, blocks, scopes and couplings of named tensors, level by level,
and decided by the oracle in plain loops; the spec or example that it names is applied by the command line.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import oracle
from tests.commands import ok
from tests.samples import write_spec

REFERENCE = (Path(__file__).parents[2] / "specs" / "README.md").read_text("utf-8")
LAYERS, HIDDEN, HEADS, KEYS, DIM, WIDTH, EXPERTS, TOKENS, RANK = 2, 16, 8, 4, 4, 24, 4, 20, 8
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "head_dim": DIM, "vocab_size": TOKENS,
}  # fmt: skip
ATTENTION = {
    "q": (HEADS * DIM, HIDDEN),
    "k": (KEYS * DIM, HIDDEN),
    "v": (KEYS * DIM, HIDDEN),
    "o": (HIDDEN, HEADS * DIM),
}
MLP = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
NORMS = ("input_layernorm", "post_attention_layernorm")
Shapes = dict[str, tuple[int, ...]]


def matrices() -> Shapes:
    """Matrices that all blocks and groups of the table divide."""
    return {"model.layers.0.mlp.up_proj.weight": (32, 256), "model.layers.1.mlp.up_proj.weight": (32, 128)}


def decoder() -> Shapes:
    """A Llama with grouped queries."""
    found: Shapes = {"model.embed_tokens.weight": (TOKENS, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.{name}_proj.weight": shape for name, shape in ATTENTION.items()}
        found |= {f"{at}.mlp.{name}_proj.weight": shape for name, shape in MLP.items()}
        found |= {f"{at}.{norm}.weight": (HIDDEN,) for norm in NORMS}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (TOKENS, HIDDEN)}


def fused() -> Shapes:
    """MLPs whose gate and up are one matrix, one below the other."""
    found: Shapes = {}
    for layer in range(LAYERS):
        at = f"fused.layers.{layer}.mlp"
        found[f"{at}.gate_up_proj.weight"] = (2 * WIDTH, HIDDEN)
        found[f"{at}.down_proj.weight"] = MLP["down"]
    return found


def experts() -> Shapes:
    """Routers and the experts of each layer."""
    found: Shapes = {}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.mlp"
        found[f"{at}.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            found |= {f"{at}.experts.{expert}.{name}_proj.weight": shape for name, shape in MLP.items()}
    return found


def adapters() -> Shapes:
    """LoRA on q and v, beside the matrices that it adapts."""
    found = decoder()
    for layer, name in product(range(LAYERS), "qv"):
        at = f"model.layers.{layer}.self_attn.{name}_proj"
        rows, columns = found[f"{at}.weight"]
        found |= {f"{at}.lora_A.weight": (RANK, columns), f"{at}.lora_B.weight": (rows, RANK)}
    return found


def intermediate() -> Shapes:
    """The first half of BERT's MLPs."""
    at = "encoder.layer.{}.intermediate.dense"
    return {
        f"{at.format(layer)}.{part}": shape
        for layer in range(LAYERS)
        for part, shape in (("weight", (WIDTH, HIDDEN)), ("bias", (WIDTH,)))
    }


def convolutions() -> Shapes:
    """Two convolutions, each with its batch norm, and a depthwise one."""
    found: Shapes = {"stages.2.depthwise.weight": (8, 1, 3, 3)}
    for stage, shape in enumerate(((8, 4, 3, 3), (16, 8, 3, 3))):
        found[f"stages.{stage}.convolution.weight"] = shape
        found |= {f"stages.{stage}.normalization.{part}": shape[:1] for part in ("weight", "bias")}
    return found


class Part(NamedTuple):
    """A tensor of an instance: its name, and the einops pattern by which it is seen."""

    tensor: str
    pattern: str


@dataclass(frozen=True)
class Instance:
    """Tensors that belong together, by their roles, and the captures that tell it from others."""

    parts: Mapping[str, Part]
    layer: int = 0
    expert: int = 0


def of_layers(tensor: str, patterns: Mapping[str, str]) -> Callable[[], Iterator[Instance]]:
    """An instance for each layer; `tensor` has the places {layer} and {role}."""

    def instances() -> Iterator[Instance]:
        for layer in range(LAYERS):
            named = {role: tensor.format(layer=layer, role=role) for role in patterns}
            yield Instance({role: Part(named[role], patterns[role]) for role in patterns}, layer)

    return instances


def each_matrix() -> Iterator[Instance]:
    for layer, name in enumerate(matrices()):
        yield Instance({"matrix": Part(name, "m k")}, layer)


def each_matrix_of_layers() -> Iterator[Instance]:
    for name in decoder():
        if "_proj" in name:
            yield Instance({"matrix": Part(name, "m k")})


def each_convolution() -> Iterator[Instance]:
    for stage in range(2):
        yield Instance({"convolution": Part(f"stages.{stage}.convolution.weight", "o i h w")}, stage)


def each_filter() -> Iterator[Instance]:
    for stage in range(2):
        norm = f"stages.{stage}.normalization"
        yield Instance(
            {
                "filter": Part(f"stages.{stage}.convolution.weight", "o i h w"),
                "scale": Part(f"{norm}.weight", "o -> o 1 1 1"),
                "shift": Part(f"{norm}.bias", "o -> o 1 1 1"),
            },
            stage,
        )


def each_neuron() -> Iterator[Instance]:
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}.intermediate.dense"
        yield Instance({"weight": Part(f"{at}.weight", "m k"), "bias": Part(f"{at}.bias", "m -> m 1")}, layer)


def each_expert(patterns: Mapping[str, str]) -> Callable[[], Iterator[Instance]]:
    def instances() -> Iterator[Instance]:
        for layer, expert in product(range(LAYERS), range(EXPERTS)):
            at = f"model.layers.{layer}.mlp.experts.{expert}"
            parts = {role: Part(f"{at}.{role}_proj.weight", patterns[role]) for role in patterns}
            yield Instance(parts, layer, expert)

    return instances


def each_layer() -> Iterator[Instance]:
    for layer in range(LAYERS):
        names = [name for name in decoder() if f".layers.{layer}." in name]
        yield Instance(
            {name: Part(name, "k -> 1 1 k" if "norm" in name else "m k -> 1 m k") for name in names}, layer
        )


def hidden_states() -> Iterator[Instance]:
    """What reads or scales hidden states has them last, what writes them first; only o and down write."""

    def pattern(name: str) -> str:
        if "norm" in name:
            return "h -> h 1"
        return "h m" if re.search(r"(o|down)_proj", name) else "m h -> h m"

    yield Instance({name: Part(name, pattern(name)) for name in decoder()})


def vocabulary() -> Iterator[Instance]:
    names = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}
    yield Instance({role: Part(name, "v h") for role, name in names.items()})


def each_adapter() -> Iterator[Instance]:
    for layer, name in product(range(LAYERS), "qv"):
        at = f"model.layers.{layer}.self_attn.{name}_proj"
        yield Instance(
            {"A": Part(f"{at}.lora_A.weight", "r k"), "B": Part(f"{at}.lora_B.weight", "m r -> r m")}
        )


CHANNELS = {"gate": "c k", "up": "c k", "down": "k c -> c k"}
PROJECTION = "model.layers.{layer}.mlp.{role}_proj.weight"
MODULE = "model.layers.{layer}.self_attn.{role}_proj.weight"
SEEN: dict[str, tuple[Callable[[], Shapes], Callable[[], Iterator[Instance]]]] = {
    "matrices": (matrices, each_matrix),
    "all matrices": (decoder, each_matrix_of_layers),
    "convolutions": (convolutions, each_convolution),
    "convolutions and norms, filters first": (convolutions, each_filter),
    "BERT's intermediate layers, neurons first": (intermediate, each_neuron),
    "their matrices": (decoder, of_layers(PROJECTION, dict.fromkeys(("down", "gate", "up"), "m k"))),
    "gate and up": (decoder, of_layers(PROJECTION, dict.fromkeys(("gate", "up"), "m k"))),
    "up and down, channels first": (decoder, of_layers(PROJECTION, {"up": "c k", "down": "k c -> c k"})),
    "MLPs, channels first": (decoder, of_layers(PROJECTION, CHANNELS)),
    "fused MLPs, channels first": (
        fused,
        of_layers(f"fused.{PROJECTION[6:]}", {"gate_up": "(p c) k -> c p k", "down": "k c -> c 1 k"}),
    ),
    "q, k and v, inputs first": (decoder, of_layers(MODULE, dict.fromkeys("qkv", "m k -> k m"))),
    "q and o": (decoder, of_layers(MODULE, dict.fromkeys("qo", "m k"))),
    "attention": (decoder, of_layers(MODULE, dict.fromkeys("qkvo", "m k"))),
    "attention, heads first": (
        decoder,
        of_layers(MODULE, {**dict.fromkeys("qkv", "(u x) k -> u x k"), "o": "m (u x) -> u x m"}),
    ),
    "values, heads and dimensions first": (
        decoder,
        of_layers(MODULE, {"v": "(u d) k -> u d 1 k", "o": "m (u q d) -> u d q m"}),
    ),
    "layers": (decoder, each_layer),
    "hidden states, channels first": (decoder, hidden_states),
    "experts": (experts, each_expert(dict.fromkeys(MLP, "m k -> 1 m k"))),
    "experts, channels first": (experts, each_expert(CHANNELS)),
    "embeddings, tokens first": (decoder, vocabulary),
    "adapters, ranks first": (adapters, each_adapter),
}  # fmt: skip
SIZES = {"u": KEYS, "d": DIM, "p": 2}  # of axes that do not follow from a tensor's shape


class Row(NamedTuple):
    """The cells of a row of the table."""

    pattern: str
    seen: str
    block: str
    scope: str
    survives: str
    couplings: str
    spec: str


def rows() -> list[Row]:
    """The rows of the page."""
    section = REFERENCE.split("\n## Patterns of sparsity\n")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" |") for line in section.splitlines() if line.startswith("| ")]
    return [Row(*(cell.strip() for cell in each)) for each in cells[1:]]


def levels(row: Row) -> list[Row]:
    """A row for each of the nested rules of a row, outer ones first; cells without "then" hold for all."""
    found = [cell.split(", then ") for cell in row]
    count = max(map(len, found))
    assert all(len(each) in (1, count) for each in found)
    return [Row(*(each[level % len(each)] for each in found)) for level in range(count)]


def checkpoint_of(row: Row) -> Shapes:
    """The tensors that a row is tried on."""
    (shapes,) = {SEEN[level.seen.split(":")[0]][0] for level in levels(row)}
    return shapes()


def cut(row: Row) -> tuple[list[int], list[int], dict[str, float]]:
    """The block, the scope and the budget of a row."""
    block, scope = (json.loads(cell.strip("`")) for cell in (row.block, row.scope))
    return block, scope, tomllib.loads(row.survives.strip("`"))


def said(row: Row) -> dict[str, str]:
    """What a row says of couplings: what is fused, what competes."""
    return dict(each.split(": ") for each in row.couplings.removeprefix("none").split("; ") if each)


def indices_by_view(
    pattern: str, sizes: Mapping[str, int], shape: tuple[int, ...]
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Which index of a tensor each index of its view is, for an einops pattern, in plain loops."""
    left, _, right = pattern.partition("->")
    dims = [each.strip("()").split() for each in re.findall(r"\([^)]*\)|\S+", left)]
    known = dict(sizes)
    for axes, size in zip(dims, shape, strict=True):
        unknown = [axis for axis in axes if axis not in known]
        if unknown:
            (axis,) = unknown
            known[axis] = size // prod(known[each] for each in axes if each != axis)
        assert prod(known[axis] for axis in axes) == size
    order = [axis for axes in dims for axis in axes]
    seen = right.split() or order
    found = {}
    for places in product(*(range(known[axis]) for axis in order)):
        at = dict(zip(order, places, strict=True))
        index = []
        for axes in dims:
            place = 0
            for axis in axes:
                place = place * known[axis] + at[axis]
            index.append(place)
        found[tuple(at.get(axis, 0) for axis in seen)] = tuple(index)
    return found


class Seen(NamedTuple):
    """A tensor as a row sees it."""

    tensor: str
    leaf: oracle.Leaf
    indices: dict[tuple[int, ...], tuple[int, ...]]


def spanned(wanted: list[int], whole: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of a row, with -1 and what it leaves out spanned."""
    padded = [*wanted, *[-1] * (len(whole) - len(wanted))]
    return tuple(size if extent == -1 else extent for extent, size in zip(padded, whole, strict=True))


def see(part: Part, row: Row, shape: tuple[int, ...]) -> Seen:
    """A part of an instance, cut into the blocks of the row."""
    own = re.search(r"`(.*)`", row.seen)
    named = {name: int(size) for name, size in re.findall(r"\b(\w) = (\d+)", row.seen)}
    indices = indices_by_view(own[1], named, shape) if own else indices_by_view(part.pattern, SIZES, shape)
    view = tuple(max(index[dim] for index in indices) + 1 for dim in range(len(next(iter(indices)))))
    assert len(indices) == prod(view) == prod(shape)
    return Seen(part.tensor, oracle.Leaf(view, spanned(cut(row)[0], view)), indices)


def units_of(row: Row) -> Iterator[tuple[Instance, list[Part]]]:
    """The units that blocks of a row are cut from: tensors, or fused tensors of a layer, or of all layers."""
    instances = list(SEEN[row.seen.split(":")[0]][1]())
    fused = said(row).get("fused")
    if fused is None:
        yield from ((each, [part]) for each in instances for part in each.parts.values())
        return
    roles = fused.removesuffix(" of all layers").split(", ")
    assert roles == ["every tensor"] or all(list(each.parts) == roles for each in instances)
    if fused.endswith(" of all layers"):
        yield instances[0], [part for each in instances for part in each.parts.values()]
    else:
        yield from ((each, list(each.parts.values())) for each in instances)


def contests(row: Row, shapes: Shapes) -> Iterator[tuple[oracle.Coupled, list[Seen]]]:
    """What competes by a row, and the tensors of its leaves."""
    compete = said(row).get("compete")
    groups: dict[object, list[list[Part]]] = {}
    for number, (instance, parts) in enumerate(units_of(row)):
        alike = {None: number, "all": 0, "layers": instance.expert}
        groups.setdefault(alike.get(compete, instance.layer), []).append(parts)
    for group in groups.values():
        units = [[see(part, row, shapes[part.tensor]) for part in parts] for parts in group]
        scopes = []
        for unit in units:
            same = tuple(range(len(unit[0].leaf.view)))
            block = oracle.Fused(tuple(each.leaf for each in unit), (same,) * len(unit))
            assert {each.leaf.grid for each in unit} == {block.grid}
            scopes.append(oracle.Scope(block, spanned(cut(row)[1], block.grid)))
        order = tuple(range(len(scopes[0].shape)))
        yield oracle.Coupled(tuple(scopes), (order,) * len(scopes)), [each for unit in units for each in unit]


def by_row(row: Row, dense: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What should survive of each tensor that a row reaches."""
    masks: dict[str, torch.Tensor] = {}
    for level in levels(row):
        masks |= among(level, dense, masks)
    return masks


def budget_of(row: Row) -> Callable[[int], int]:
    """How many of so many blocks that are left survive in a scope."""
    budget = cut(row)[2]
    if "nnz" in budget:
        return lambda left: min(left, int(budget["nnz"]))
    return lambda left: left - int(Fraction(str(budget["sparsity"])) * left)


def among(
    row: Row, dense: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What should survive of each tensor that a level reaches, of what the levels before it keep."""
    masks = {}
    for structure, leaves in contests(row, {name: tuple(tensor.shape) for name, tensor in dense.items()}):
        elements, left = [], []
        for each in leaves:
            values = dense[each.tensor]
            before = kept.get(each.tensor, torch.ones(values.shape, dtype=torch.bool))
            elements.append({view: Fraction(values[index].item()) for view, index in each.indices.items()})
            left.append({view: bool(before[index]) for view, index in each.indices.items()})
        budget, blocks = budget_of(row), structure.blocks_per_scope
        assert 0 < budget(blocks) < blocks
        for each, mask in zip(leaves, oracle.masks_among(structure, elements, left, budget), strict=True):
            assert each.tensor not in masks
            masks[each.tensor] = torch.zeros(dense[each.tensor].shape, dtype=torch.bool)
            for view, index in each.indices.items():
                masks[each.tensor][index] = mask[view]
    return masks


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def example(row: Row) -> str:
    """The example that a row links to; where it is one of `block, shape`, with those of the row."""
    link = re.fullmatch(r"\[(.*)\]\(#(.*)\)", row.spec)
    assert link
    heads = re.split(r"^##+ (.*)$", REFERENCE, flags=re.MULTILINE)
    (section,) = [
        text for head, text in zip(heads[1::2], heads[2::2], strict=True) if anchor(head) == link[2]
    ]
    texts = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    if link[1] != "block, shape":
        (text,) = [text for text in texts if f"\n[{link[1]}]" in text]
        return str(text)
    (text,) = texts
    for key, value in (("block", row.block.strip("`")), ("shape", row.scope.strip("`"))):
        text, times = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert times == 1
    text, times = re.subn(r"(?m)^(nnz|sparsity) = .*$", row.survives.strip("`"), text)
    assert times == 1
    return str(text)


def write_checkpoint(shapes: Shapes, path: Path) -> Path:
    """A checkpoint of small whole numbers, none of them zero: many blocks tie."""
    generator = torch.Generator().manual_seed(5)
    path.mkdir()
    dense = {}
    for name, shape in shapes.items():
        signs = 2 * torch.randint(0, 2, shape, generator=generator) - 1
        dense[name] = (signs * torch.randint(1, 9, shape, generator=generator)).bfloat16()
    config = CONFIG | (
        {"num_local_experts": EXPERTS, "model_type": "qwen3_moe"} if shapes == experts() else {}
    )
    (path / "config.json").write_text(json.dumps(config))
    save_file(dense, path / "model.safetensors", metadata={"format": "pt"})
    return path


def expect(masks: Mapping[str, torch.Tensor], folder: Path, pruned: Path) -> None:
    """Where masks prune there are zeros; everything else is as in the dense checkpoint."""
    before, after = (load_file(each / "model.safetensors") for each in (folder, pruned))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = torch.where(masks[name], tensor, 0) if name in masks else tensor
        assert torch.equal(after[name], expected), name


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.pattern)
def test_what_survives_is_what_the_row_says(row: Row, tmp_path: Path) -> None:
    folder = write_checkpoint(checkpoint_of(row), tmp_path / "dense")
    shipped = re.fullmatch(r"`([\w-]+)`(.*)", row.spec)
    if shipped:
        words = [shipped[1], *shipped[2].replace("`", "").split()]
    else:
        words = [str(write_spec(tmp_path, example(row)))]
    ok("apply", folder, *words, "-o", tmp_path / "pruned", "-q")
    ok("verify", tmp_path / "pruned", *words, "-q")
    expect(by_row(row, load_file(folder / "model.safetensors")), folder, tmp_path / "pruned")


@pytest.mark.parametrize(
    ("spec", "changed"),
    [
        ("2of4", {"survives": "`nnz = 1`"}),
        ("2of4", {"block": "`[1, 2]`"}),
        ("2of4", {"scope": "`[1, 8]`", "survives": "`nnz = 4`"}),
        ("2of4", {"scope": "`[4, 1]`"}),
        ("mlp-channels", {"couplings": ""}),
        ("mlp-channels-global", {"couplings": "fused: gate, up, down"}),
        ("heads-aligned", {"couplings": "fused: q, k, v, o"}),
        ("vnm", {"block": "`[1, 1]`", "scope": "`[1, 8]`", "survives": "`nnz = 2`"}),
        ("vnm", {"block": "`[1, 1]`, then `[16, 1]`", "survives": "`nnz = 2`, then `nnz = 4`"}),
        ("vnm", {"survives": "`nnz = 3`, then `nnz = 2`"}),
        ("vnm", {"survives": "`nnz = 4`, then `nnz = 1`"}),
        ("mlp-channels-2of4", {"couplings": ""}),
        ("mlp-channels-2of4", {"block": "`[2]`, then `[1, 1]`"}),
        ("mlp-channels-2of4", {"survives": "`sparsity = 0.25`, then `nnz = 1`"}),
    ],
    ids=str,
)
def test_a_row_that_says_something_else_does_not_pass(
    spec: str, changed: dict[str, str], tmp_path: Path
) -> None:
    (row,) = [row for row in rows() if row.spec == f"`{spec}`"]
    folder = write_checkpoint(checkpoint_of(row), tmp_path / "dense")
    ok("apply", folder, spec, "-o", tmp_path / "pruned", "-q")
    masks = by_row(row._replace(**changed), load_file(folder / "model.safetensors"))
    with pytest.raises(AssertionError):
        expect(masks, folder, tmp_path / "pruned")


@dataclass(frozen=True)
class Strided:
    """A row of S3's table in its own terms: views of a matrix by shape, strides and offsets."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    scope: tuple[int, ...]
    nnz: int
    offsets: tuple[int, ...] = (0,)


M, K = 32, 64
TABLE_OF_S3 = {
    "2of4": Strided((M, K), (K, 1), (1, 1), (1, 4), 2),
    "pairs-4of8": Strided((M, K), (K, 1), (1, 2), (1, 4), 2),
    "coupled-2of4": Strided((M, K // 16, 8, 2), (K, 16, 1, 8), (1, 1, 1, 2), (1, 1, 4, 1), 2),
    "block16": Strided((8, 2, K), (K, 8 * K, 1), (1, 1, 16), (1, 2, 1), 1, tuple(range(0, M * K, 16 * K))),
}


@pytest.mark.parametrize("spec", TABLE_OF_S3)
def test_the_four_patterns_of_s3_are_those_of_its_table(spec: str, tmp_path: Path) -> None:
    """arXiv 2604.11315, table 1: shapes and strides of its views, blocks and scopes."""
    name, wanted = "model.layers.0.mlp.up_proj.weight", TABLE_OF_S3[spec]
    folder = write_checkpoint({name: (M, K)}, tmp_path / "dense")
    flat = load_file(folder / "model.safetensors")[name].flatten()
    mask = torch.zeros(M * K, dtype=torch.bool)
    leaf = oracle.Leaf(wanted.shape, wanted.block)
    structure = oracle.Coupled(
        (oracle.Scope(oracle.alone(leaf), wanted.scope),), (tuple(range(len(wanted.shape))),)
    )
    for offset in wanted.offsets:
        places = {
            index: offset + sum(i * stride for i, stride in zip(index, wanted.strides, strict=True))
            for index in product(*map(range, wanted.shape))
        }
        elements = {index: Fraction(flat[place].item()) for index, place in places.items()}
        (kept,) = oracle.masks_by_budget(structure, [elements], wanted.nnz)
        for index, place in places.items():
            mask[place] = kept[index]
    assert int(mask.sum()) == M * K // 2
    ok("apply", folder, spec, "-o", tmp_path / "pruned", "-q")
    expect({name: mask.view(M, K)}, folder, tmp_path / "pruned")
