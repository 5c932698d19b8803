"""Structures: which elements belong to which unit, against plain indexing; each element to one unit alone."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from msgspec import Struct

from sparseprune.spec import TensorInfo
from sparseprune.spec.structures import (
    Index,
    Kind,
    Structure,
    captures_of,
    find,
    hidden_size,
    matrices,
    outlook,
)

Shapes = dict[str, tuple[int, ...]]
Elements = dict[str, list[int]]


def index_of(shapes: Shapes, config: Mapping[str, Any] | None = None) -> Index:
    return Index.of([TensorInfo(name, "F32", shape) for name, shape in shapes.items()], config)


def numbered(shape: tuple[int, ...]) -> Any:
    """A tensor whose elements are their places in storage."""
    return np.arange(int(np.prod(shape))).reshape(shape)


def seen(shapes: Shapes, structure: Structure) -> Mapping[tuple[int, int], Elements]:
    """The elements of every unit, by the number of the module in a stack and of the unit, from strides."""
    found: dict[tuple[int, int], Elements] = {}
    for part in structure.parts:
        if part.follows:
            continue
        shape = shapes[part.tensor]
        look = outlook(part, shape)
        places: Any = look.offset + sum(
            np.arange(size).reshape([-1 if at == dim else 1 for at in range(len(look.shape))]) * step
            for dim, (size, step) in enumerate(zip(look.shape, look.stride, strict=True))
        )
        assert places.shape == look.shape
        units = places if look.leading else places[None]
        for module, unit in np.ndindex(units.shape[:2]):
            elements = units[module, unit].reshape(-1).tolist()
            found.setdefault((module, unit), {}).setdefault(part.tensor, []).extend(elements)
    return found


class Case(Struct, frozen=True):
    """Tensors, and by the name of each that belongs to a structure the elements of (module, unit)."""

    shapes: Shapes
    expected: Mapping[str, Callable[[int, int], Any]]
    config: Mapping[str, Any] = {}
    units: int = 6
    modules: int = 1


def check(kind: Kind, case: Case) -> Structure:
    """The one structure there is has exactly the elements that plain indexing gives, each of them once."""
    (structure,) = find(kind, index_of(case.shapes, case.config))
    assert structure.units == case.units
    found = seen(case.shapes, structure)
    assert len(found) == case.units * case.modules
    every: dict[str, list[int]] = {}
    for (module, unit), elements in found.items():
        wanted = {
            name: numbered(case.shapes[name])[of(module, unit)].reshape(-1).tolist()
            for name, of in case.expected.items()
        }
        assert {name: sorted(each) for name, each in elements.items()} == {
            name: sorted(each) for name, each in wanted.items()
        }
        for name, each in elements.items():
            every.setdefault(name, []).extend(each)
    assert all(len(each) == len(set(each)) for each in every.values())
    return structure


def below(base: str, **shapes: tuple[int, ...]) -> Shapes:
    """Names of modules below a base, with `__` for a dot; a name without a kind is a weight."""
    names = {name: name.replace("__", ".") + ("" if "__bias" in name else ".weight") for name in shapes}
    return {f"{base}.{names[name]}": shape for name, shape in shapes.items()}


def row(_: int, unit: int) -> Any:
    return np.s_[unit]


def column(_: int, unit: int) -> Any:
    return np.s_[:, unit]


def halves(_: int, unit: int) -> Any:
    return np.s_[[unit, unit + 6]]


def row_of_each(module: int, unit: int) -> Any:
    return np.s_[module, unit]


def column_of_each(module: int, unit: int) -> Any:
    return np.s_[module, :, unit]


def halves_of_each(module: int, unit: int) -> Any:
    return np.s_[module, [unit, unit + 6]]


def rows(size: int, begin: int = 0) -> Callable[[int, int], Any]:
    return lambda _, unit: np.s_[begin + size * unit : begin + size * (unit + 1)]


def columns(size: int, begin: int = 0) -> Callable[[int, int], Any]:
    return lambda _, unit: np.s_[:, begin + size * unit : begin + size * (unit + 1)]


def pairs(unit: int, *begins: int) -> list[int]:
    """Two indices of a unit behind each beginning."""
    return [begin + 2 * unit + at for begin in begins for at in (0, 1)]


# -- MLPs: 6 channels between 4 features, 3 experts ----------------------------------------------------

MLP, EXPERTS = "model.layers.0.mlp", "model.layers.0.mlp.experts"
MLPS = {
    "gate, up and down": Case(
        below(MLP, gate_proj=(6, 4), up_proj=(6, 4), down_proj=(4, 6)),
        {f"{MLP}.gate_proj.weight": row, f"{MLP}.up_proj.weight": row, f"{MLP}.down_proj.weight": column},
    ),
    "biases of what writes": Case(
        below(MLP, fc1=(6, 4), fc1__bias=(6,), fc2=(4, 6), fc2__bias=(4,)),
        {f"{MLP}.fc1.weight": row, f"{MLP}.fc1.bias": row, f"{MLP}.fc2.weight": column},
    ),
    "BERT": Case(
        below(
            "encoder.layer.3",
            intermediate__dense=(6, 4),
            intermediate__dense__bias=(6,),
            output__dense=(4, 6),
        ),
        {
            "encoder.layer.3.intermediate.dense.weight": row,
            "encoder.layer.3.intermediate.dense.bias": row,
            "encoder.layer.3.output.dense.weight": column,
        },
    ),
    "T5": Case(
        below("decoder.block.1.layer.2.DenseReluDense", wi_0=(6, 4), wi_1=(6, 4), wo=(4, 6)),
        {
            "decoder.block.1.layer.2.DenseReluDense.wi_0.weight": row,
            "decoder.block.1.layer.2.DenseReluDense.wi_1.weight": row,
            "decoder.block.1.layer.2.DenseReluDense.wo.weight": column,
        },
    ),
    "gate and up in halves": Case(
        below(MLP, gate_up_proj=(12, 4), down_proj=(4, 6)),
        {
            f"{MLP}.gate_up_proj.weight": halves,
            f"{MLP}.down_proj.weight": column,
        },
    ),
    "inputs first, as a bias tells": Case(
        below("h.0.mlp", c_fc=(4, 6), c_fc__bias=(6,), c_proj=(6, 4), c_proj__bias=(4,)),
        {"h.0.mlp.c_fc.weight": column, "h.0.mlp.c_fc.bias": row, "h.0.mlp.c_proj.weight": row},
    ),
    "inputs first, square, as the model tells": Case(
        below("h.0.mlp", c_fc=(6, 6), c_fc__bias=(6,), c_proj=(6, 6)),
        {"h.0.mlp.c_fc.weight": column, "h.0.mlp.c_fc.bias": row, "h.0.mlp.c_proj.weight": row},
        {"model_type": "gpt2"},
    ),
    "the same names with outputs first": Case(
        below("h.0.mlp", c_fc=(6, 6), c_fc__bias=(6,), c_proj=(6, 6)),
        {"h.0.mlp.c_fc.weight": row, "h.0.mlp.c_fc.bias": row, "h.0.mlp.c_proj.weight": column},
        {"model_type": "starcoder2"},
    ),
    "stacks": Case(
        {f"{EXPERTS}.gate_up_proj": (3, 12, 4), f"{EXPERTS}.down_proj": (3, 4, 6)},
        {
            f"{EXPERTS}.gate_up_proj": halves_of_each,
            f"{EXPERTS}.down_proj": column_of_each,
        },
        modules=3,
    ),
    "stacks with inputs first": Case(
        {f"{EXPERTS}.gate_up_proj": (3, 4, 12), f"{EXPERTS}.down_proj": (3, 6, 4)},
        {
            f"{EXPERTS}.gate_up_proj": lambda module, unit: np.s_[module, :, [unit, unit + 6]],
            f"{EXPERTS}.down_proj": row_of_each,
        },
        {"model_type": "llama4"},
        modules=3,
    ),
    "stacks with inputs first under other names": Case(
        {f"{EXPERTS}.fc1.weight": (3, 4, 12), f"{EXPERTS}.fc2.weight": (3, 6, 4)},
        {
            f"{EXPERTS}.fc1.weight": lambda module, unit: np.s_[module, :, [unit, unit + 6]],
            f"{EXPERTS}.fc2.weight": row_of_each,
        },
        modules=3,
    ),
    "stacks of Granite": Case(
        below("model.layers.0.block_sparse_moe", input_linear=(3, 12, 4), output_linear=(3, 4, 6)),
        {
            "model.layers.0.block_sparse_moe.input_linear.weight": halves_of_each,
            "model.layers.0.block_sparse_moe.output_linear.weight": lambda module, unit: np.s_[
                module, :, unit
            ],
        },
        modules=3,
    ),
    "gate and up take turns in gpt-oss": Case(
        {
            f"{EXPERTS}.gate_up_proj": (3, 4, 12),
            f"{EXPERTS}.gate_up_proj_bias": (3, 12),
            f"{EXPERTS}.down_proj": (3, 6, 4),
            f"{EXPERTS}.down_proj_bias": (3, 4),
        },
        {
            f"{EXPERTS}.gate_up_proj": lambda module, unit: np.s_[module, :, 2 * unit : 2 * unit + 2],
            f"{EXPERTS}.gate_up_proj_bias": lambda module, unit: np.s_[module, 2 * unit : 2 * unit + 2],
            f"{EXPERTS}.down_proj": row_of_each,
        },
        {"model_type": "gpt_oss"},
        modules=3,
    ),
    "DBRX has the channels of all experts as rows": Case(
        {
            "transformer.blocks.0.ffn.router.layer.weight": (3, 4),
            **{f"transformer.blocks.0.ffn.experts.mlp.{name}": (18, 4) for name in ("w1", "v1", "w2")},
        },
        {
            f"transformer.blocks.0.ffn.experts.mlp.{name}": lambda module, unit: np.s_[6 * module + unit]
            for name in ("w1", "v1", "w2")
        },
        modules=3,
    ),
    "CTRL has a sequence of modules": Case(
        below("transformer.h.0.ffn", **{"0": (6, 4), "0__bias": (6,), "2": (4, 6), "2__bias": (4,)}),
        {
            "transformer.h.0.ffn.0.weight": row,
            "transformer.h.0.ffn.0.bias": row,
            "transformer.h.0.ffn.2.weight": column,
        },
    ),
    "a convolution of channels between them": Case(
        below(
            "s.block.0.1.mlp", dense1=(6, 4), dense1__bias=(6,), dwconv__dwconv=(6, 1, 3, 3), dense2=(4, 6)
        ),
        {
            "s.block.0.1.mlp.dense1.weight": row,
            "s.block.0.1.mlp.dense1.bias": row,
            "s.block.0.1.mlp.dwconv.dwconv.weight": row,
            "s.block.0.1.mlp.dense2.weight": column,
        },
    ),
}


@pytest.mark.parametrize("case", MLPS.values(), ids=list(MLPS))
def test_a_channel_is_all_that_writes_it_and_all_that_reads_it(case: Case) -> None:
    check("mlp", case)


@pytest.mark.parametrize(
    "shapes",
    [
        below(MLP, gate_proj=(6, 4), down_proj=(4, 6)),  # no up
        below(MLP, gate_proj=(6, 4), up_proj=(5, 4), down_proj=(4, 6)),  # of unlike widths
        below(MLP, gate_up_proj=(13, 4), down_proj=(4, 6)),  # no two halves
        below("visual.merger", fc1=(6, 4), fc2=(4, 6)),  # in no layer
        below("h.0.attention", key=(6, 4), value=(4, 6)),  # MLPs of RWKV alone are called so
        {f"transformer.blocks.0.ffn.experts.mlp.{name}": (18, 4) for name in ("w1", "v1", "w2")},  # no router
        {
            "l.0.self_attention.experts.input_linear.weight": (3, 6, 4),
            "l.0.self_attention.experts.output_linear.weight": (3, 4, 6),
        },  # experts of attention
    ],
)
def test_what_is_no_mlp_is_none(shapes: Shapes) -> None:
    assert find("mlp", index_of(shapes)) == []


# -- attention: 8 features, heads of 2 ---------------------------------------------------------------

ATT = "model.layers.0.self_attn"
SEPARATE = {"q_proj": (16, 8), "k_proj": (8, 8), "v_proj": (8, 8), "o_proj": (8, 16)}
QKV = ("query", "key", "value")
GROUPED = {
    f"{ATT}.q_proj.weight": rows(4),
    f"{ATT}.k_proj.weight": rows(2),
    f"{ATT}.v_proj.weight": rows(2),
    f"{ATT}.o_proj.weight": columns(4),
}
NEOX, GPT2, BERT = "gpt_neox.layers.0.attention", "transformer.h.0.attn", "bert.encoder.layer.0.attention"
XLNET, JETMOE = "transformer.layer.0.rel_attn", "model.layers.0.self_attention"
DELTA = "model.layers.0.linear_attn"
DELTA_SIZES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 2,
    "linear_value_head_dim": 3,
}


def delta_parts(_: int, unit: int) -> Any:
    """Queries and keys of a head, and the values of the two that are its own."""
    return np.s_[[*pairs(unit, 0, 4), *range(8 + 6 * unit, 14 + 6 * unit)]]


HEADS = {
    "key/value heads with their queries": Case(
        below(ATT, **SEPARATE), GROUPED, {"num_attention_heads": 8}, units=4
    ),
    "a norm of heads tells their size": Case(
        {**below(ATT, **SEPARATE), f"{ATT}.q_norm.weight": (2,), f"{ATT}.k_norm.weight": (2,)},
        GROUPED,
        {"num_attention_heads": 4, "head_dim": 4},
        units=4,
    ),
    "of two sizes that which fits the number of heads counts": Case(
        below(ATT, **SEPARATE),
        GROUPED,
        {"num_attention_heads": 8, "kv_channels": 1, "attention_head_dim": 2},
        units=4,
    ),
    "biases": Case(
        {
            **below(ATT, **SEPARATE),
            f"{ATT}.q_proj.bias": (16,),
            f"{ATT}.k_proj.bias": (8,),
            f"{ATT}.o_proj.bias": (8,),
        },
        {**GROUPED, f"{ATT}.q_proj.bias": rows(4), f"{ATT}.k_proj.bias": rows(2)},
        {"num_attention_heads": 8},
        units=4,
    ),
    "query heads where all share keys and values": Case(
        below(ATT, q_proj=(16, 8), k_proj=(2, 8), v_proj=(2, 8), o_proj=(8, 16)),
        {f"{ATT}.q_proj.weight": rows(2), f"{ATT}.o_proj.weight": columns(2)},
        {"num_attention_heads": 8},
        units=8,
    ),
    "keys that are values": Case(
        below(ATT, q_proj=(16, 8), k_proj=(8, 8), o_proj=(8, 16)),
        {name: of for name, of in GROUPED.items() if "v_proj" not in name},
        {"num_attention_heads": 8},
        units=4,
    ),
    "latent keys and values": Case(
        below(ATT, q_b_proj=(20, 3), kv_b_proj=(24, 5), o_proj=(8, 12), kv_a_proj_with_mqa=(7, 8)),
        {
            f"{ATT}.q_b_proj.weight": rows(5),
            f"{ATT}.kv_b_proj.weight": rows(6),
            f"{ATT}.o_proj.weight": columns(3),
        },
        {"num_attention_heads": 4},
        units=4,
    ),
    "parts of a fused matrix, with groups": Case(
        below(ATT, qkv_proj=(32, 8), o_proj=(8, 16)),
        {
            f"{ATT}.qkv_proj.weight": lambda _, unit: np.s_[
                [*range(4 * unit, 4 * unit + 4), *pairs(unit, 16, 24)]
            ],
            f"{ATT}.o_proj.weight": columns(4),
        },
        {"model_type": "phi3", "num_attention_heads": 8},
        units=4,
    ),
    "GPT-2 has them as columns": Case(
        below(GPT2, c_attn=(8, 24), c_attn__bias=(24,), c_proj=(8, 8), c_proj__bias=(8,)),
        {
            f"{GPT2}.c_attn.weight": lambda _, unit: np.s_[:, pairs(unit, 0, 8, 16)],
            f"{GPT2}.c_attn.bias": lambda _, unit: np.s_[pairs(unit, 0, 8, 16)],
            f"{GPT2}.c_proj.weight": rows(2),
        },
        {"model_type": "gpt2", "n_head": 4},
        units=4,
    ),
    "GPT-NeoX has the three of each head side by side": Case(
        below(NEOX, query_key_value=(24, 8), query_key_value__bias=(24,), dense=(8, 8)),
        {
            f"{NEOX}.query_key_value.weight": rows(6),
            f"{NEOX}.query_key_value.bias": rows(6),
            f"{NEOX}.dense.weight": columns(2),
        },
        {"model_type": "gpt_neox", "num_attention_heads": 4},
        units=4,
    ),
    "Falcon has groups side by side": Case(
        below("transformer.h.0.self_attention", query_key_value=(32, 16), dense=(16, 16)),
        {
            "transformer.h.0.self_attention.query_key_value.weight": rows(8),
            "transformer.h.0.self_attention.dense.weight": columns(4),
        },
        {"model_type": "falcon", "num_attention_heads": 8},
        units=4,
    ),
    "Falcon with one key and value": Case(
        below("transformer.h.0.self_attention", query_key_value=(20, 16), dense=(16, 16)),
        {
            "transformer.h.0.self_attention.query_key_value.weight": rows(2),
            "transformer.h.0.self_attention.dense.weight": columns(2),
        },
        {"model_type": "falcon", "num_attention_heads": 8},
        units=8,
    ),
    "BERT": Case(
        below(
            BERT,
            self__query=(8, 8),
            self__key=(8, 8),
            self__value=(8, 8),
            self__value__bias=(8,),
            output__dense=(8, 8),
        ),
        {
            **{f"{BERT}.self.{name}.weight": rows(2) for name in QKV},
            f"{BERT}.self.value.bias": rows(2),
            f"{BERT}.output.dense.weight": columns(2),
        },
        {"num_attention_heads": 4},
        units=4,
    ),
    "attention to the whole text": Case(
        below(
            BERT,
            **{f"self__{name}{more}": (8, 8) for name in QKV for more in ("", "_global")},
            output__dense=(8, 8),
        ),
        {
            **{f"{BERT}.self.{name}{more}.weight": rows(2) for name in QKV for more in ("", "_global")},
            f"{BERT}.output.dense.weight": columns(2),
        },
        {"num_attention_heads": 4},
        units=4,
    ),
    "T5": Case(
        below("encoder.block.0.layer.0.SelfAttention", q=(12, 8), k=(12, 8), v=(12, 8), o=(8, 12)),
        {
            **{f"encoder.block.0.layer.0.SelfAttention.{name}.weight": rows(3) for name in "qkv"},
            "encoder.block.0.layer.0.SelfAttention.o.weight": columns(3),
        },
        {"num_heads": 4, "d_kv": 3},
        units=4,
    ),
    "a gate of the heads": Case(
        {**below(ATT, **SEPARATE), f"{ATT}.gate_proj.weight": (16, 8)},
        {**GROUPED, f"{ATT}.gate_proj.weight": rows(4)},
        {"num_attention_heads": 8},
        units=4,
    ),
    "DiffLlama subtracts the heads of the second half": Case(
        below(ATT, **SEPARATE, k_proj__bias=(8,)),
        {
            f"{ATT}.q_proj.weight": lambda _, unit: np.s_[
                [*range(4 * unit, 4 * unit + 4), *range(8 + 4 * unit, 12 + 4 * unit)]
            ],
            f"{ATT}.k_proj.weight": lambda _, unit: np.s_[pairs(unit, 0, 4)],
            f"{ATT}.k_proj.bias": lambda _, unit: np.s_[pairs(unit, 0, 4)],
            f"{ATT}.v_proj.weight": lambda _, unit: np.s_[pairs(unit, 0, 4)],
            f"{ATT}.o_proj.weight": columns(8),
        },
        {"num_attention_heads": 8, "model_type": "diffllama"},
        units=2,
    ),
    "XLNet has a dimension of heads": Case(
        {
            **{f"{XLNET}.{name}": (8, 4, 2) for name in "qkvor"},
            f"{XLNET}.r_w_bias": (4, 2),
            f"{XLNET}.seg_embed": (2, 4, 2),
        },
        {f"{XLNET}.{name}": column for name in "qkvor"},
        {"n_head": 4, "model_type": "xlnet"},
        units=4,
    ),
    "JetMoE has queries in experts": Case(
        below(
            "model.layers.0.self_attention",
            kv_proj=(12, 8),
            experts__input_linear=(5, 6, 8),
            experts__output_linear=(5, 8, 6),
        ),
        {
            f"{JETMOE}.kv_proj.weight": lambda _, unit: np.s_[pairs(unit, 0, 6)],
            f"{JETMOE}.experts.input_linear.weight": columns(2),
            f"{JETMOE}.experts.output_linear.weight": lambda _, unit: np.s_[..., 2 * unit : 2 * unit + 2],
        },
        {"num_key_value_heads": 3, "kv_channels": 2, "num_experts_per_tok": 2, "model_type": "jetmoe"},
        units=3,
    ),
    "key heads of a delta net with their value heads, side by side": Case(
        {
            **below(DELTA, in_proj_qkvz=(32, 8), in_proj_ba=(8, 8), conv1d=(20, 1, 4), out_proj=(8, 12)),
            f"{DELTA}.A_log": (4,),
            f"{DELTA}.norm.weight": (3,),
        },
        {
            f"{DELTA}.in_proj_qkvz.weight": rows(16),
            f"{DELTA}.in_proj_ba.weight": rows(4),
            f"{DELTA}.conv1d.weight": delta_parts,
            f"{DELTA}.out_proj.weight": columns(6),
        },
        DELTA_SIZES,
        units=2,
    ),
    "a delta net in parts": Case(
        below(DELTA, in_proj_qkv=(20, 8), in_proj_z=(12, 8), in_proj_a=(4, 8), out_proj=(8, 12)),
        {
            f"{DELTA}.in_proj_qkv.weight": delta_parts,
            f"{DELTA}.in_proj_z.weight": rows(6),
            f"{DELTA}.in_proj_a.weight": rows(2),
            f"{DELTA}.out_proj.weight": columns(6),
        },
        DELTA_SIZES,
        units=2,
    ),
    "heads of a stage": Case(
        below(
            "swin.encoder.layers.1.blocks.0.attention",
            self__query=(8, 8),
            self__key=(8, 8),
            self__value=(8, 8),
            output__dense=(8, 8),
        ),
        {
            **{f"swin.encoder.layers.1.blocks.0.attention.self.{name}.weight": rows(2) for name in QKV},
            "swin.encoder.layers.1.blocks.0.attention.output.dense.weight": columns(2),
        },
        {"num_heads": [2, 4]},
        units=4,
    ),
}


@pytest.mark.parametrize("case", HEADS.values(), ids=list(HEADS))
def test_a_head_is_all_that_writes_it_and_what_reads_it(case: Case) -> None:
    check("heads", case)


def test_codegen_has_a_quarter_of_the_heads_behind_another_and_these_compete() -> None:
    shapes = below(GPT2, qkv_proj=(48, 16), out_proj=(16, 16))
    blocks = find("heads", index_of(shapes, {"n_head": 8, "model_type": "codegen"}))
    assert [(dict(one.place)["group"], one.units, one.heads) for one in blocks] == [
        (block, 2, 2) for block in range(4)
    ]
    for block, structure in enumerate(blocks):
        for (_, unit), elements in seen(shapes, structure).items():
            whole = {name: numbered(shape) for name, shape in shapes.items()}
            begins = [12 * block + part for part in (0, 4, 8)]
            wanted = whole[f"{GPT2}.qkv_proj.weight"][pairs(unit, *begins)]
            assert sorted(elements[f"{GPT2}.qkv_proj.weight"]) == wanted.reshape(-1).tolist()
            wanted = whole[f"{GPT2}.out_proj.weight"][:, pairs(unit, 4 * block)]
            assert sorted(elements[f"{GPT2}.out_proj.weight"]) == sorted(wanted.reshape(-1).tolist())


def test_what_each_key_head_has_of_a_state_follows_by_rows_and_by_columns() -> None:
    more = {f"{ATT}.A": (4,), f"{ATT}.dt_proj.weight": (4, 8), f"{ATT}.dt_proj.bias": (4,)}
    (structure,) = find("heads", index_of({**below(ATT, **SEPARATE), **more}, {"num_attention_heads": 8}))
    follows = [(one.tensor, one.dim, one.count, one.size) for one in structure.parts if one.follows]
    assert follows == [
        (f"{ATT}.A", 0, 4, 1),
        (f"{ATT}.dt_proj.weight", 0, 4, 1),
        (f"{ATT}.dt_proj.weight", 1, 4, 2),
        (f"{ATT}.dt_proj.bias", 0, 4, 1),
    ]


def test_routed_experts_of_attention_are_experts_without_their_router() -> None:
    at = "model.layers.0.self_attention.experts"
    own = below(at, input_linear=(3, 6, 4), output_linear=(3, 4, 6))
    (found,) = find("experts", index_of({**own, f"{at}.router.layer.weight": (3, 4), f"{at}.bias": (4,)}))
    assert (found.units, {part.tensor for part in found.parts}) == (3, {*own})


def test_a_delta_net_of_other_sizes_than_the_config_says_is_none() -> None:
    shapes = below(DELTA, in_proj_qkv=(21, 8), in_proj_z=(12, 8), out_proj=(8, 12))
    assert find("heads", index_of(shapes, DELTA_SIZES)) == []
    assert find("heads", index_of(shapes, {**DELTA_SIZES, "linear_num_value_heads": 3})) == []


def test_layers_that_share_keys_and_values_lose_the_same_heads() -> None:
    """Layers 2 and 3 read those of the last layer of their type that has some."""
    shapes: Shapes = {}
    for layer in (0, 1):
        shapes |= below(f"model.layers.{layer}.self_attn", **SEPARATE)
    for layer in (2, 3):
        shapes |= below(f"model.layers.{layer}.self_attn", q_proj=(16, 8), o_proj=(8, 16))
    config = {
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding", "full", "full", "sliding"],
    }
    first, second = find("heads", index_of(shapes, config))
    assert [part.part for part in first.parts] == [*SEPARATE, "3.q_proj", "3.o_proj"]
    assert [part.part for part in second.parts] == [*SEPARATE, "2.q_proj", "2.o_proj"]
    for structure, layer in ((first, 3), (second, 2)):
        elements = seen(shapes, structure)[0, 1]
        query, output = (f"model.layers.{layer}.self_attn.{name}_proj.weight" for name in "qo")
        assert sorted(elements[query]) == numbered((16, 8))[4:8].reshape(-1).tolist()
        assert sorted(elements[output]) == sorted(numbered((8, 16))[:, 4:8].reshape(-1).tolist())
    assert len(find("heads", index_of(shapes, {**config, "num_kv_shared_layers": 0}))) == 2


@pytest.mark.parametrize(
    ("more", "dim", "size"),
    [
        ({f"{ATT}.q_norm.weight": (16,)}, 0, 4),
        ({f"{ATT}.k_norm.weight": (8,)}, 0, 2),
        ({f"{ATT}.q_norm.weight": (8, 2)}, 0, 2),
        ({f"{ATT}.sinks": (8,)}, 0, 2),
        ({f"{ATT}.bias_u": (8, 2)}, 0, 2),
        ({f"{ATT}.relative_attention_bias.weight": (32, 8)}, 1, 2),
    ],
)
def test_what_each_head_has_of_a_vector_follows(more: Shapes, dim: int, size: int) -> None:
    (structure,) = find("heads", index_of({**below(ATT, **SEPARATE), **more}, {"num_attention_heads": 8}))
    (part,) = (part for part in structure.parts if part.follows)
    assert ({part.tensor}, part.dim, part.count, part.size) == ({*more}, dim, 4, size)


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        (below(ATT, **SEPARATE), {}),  # nothing counts heads
        (below(ATT, **SEPARATE), {"num_attention_heads": 7}),
        (below(ATT, **SEPARATE), {"num_attention_heads": 5, "model_type": "diffllama"}),
        (below(ATT, **{**SEPARATE, "v_proj": (7, 8)}), {"num_attention_heads": 8}),
        (below(ATT, **{**SEPARATE, "o_proj": (8, 15)}), {"num_attention_heads": 8}),
        (below("visual.attn", **SEPARATE), {"num_attention_heads": 8}),  # in no layer
        (below(GPT2, qkv_proj=(24, 8), out_proj=(8, 8)), {"n_head": 2, "model_type": "codegen"}),
        (
            below(NEOX, query_key_value=(24, 8), dense=(8, 8)),
            {"num_attention_heads": 4, "model_type": "falcon"},
        ),
    ],
)
def test_heads_that_nobody_can_tell_apart_are_none(shapes: Shapes, config: Mapping[str, Any]) -> None:
    found = find("heads", index_of(shapes, config))
    assert found == [] or config.get("model_type") == "falcon"
    if found:  # a fused matrix of as many key/value heads as query heads is one group a head
        assert seen(shapes, found[0])[0, 0][f"{NEOX}.query_key_value.weight"] == list(range(6 * 8))


def test_each_tower_and_side_has_the_heads_of_its_own_config() -> None:
    tower, text = "vision_tower.encoder.layers.0.self_attn", "language_model.model.layers.0.self_attn"
    out = {"q_proj": (8, 8), "k_proj": (8, 8), "v_proj": (8, 8), "o_proj": (8, 8)}
    config = {
        "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 2},
        "text_config": {"model_type": "llama", "num_attention_heads": 4},
    }
    found = find("heads", index_of({**below(tower, **out), **below(text, **out)}, config))
    assert {dict(one.place)["stack"]: one.units for one in found} == {
        "vision_tower.encoder.layers": 2,
        "language_model.model.layers": 4,
    }
    sides = {
        **below("model.encoder.layers.0.self_attn", **out),
        **below("model.decoder.layers.0.encoder_attn", **out),
    }
    found = find("heads", index_of(sides, {"encoder_attention_heads": 2, "decoder_attention_heads": 8}))
    assert {dict(one.place)["stack"]: one.units for one in found} == {
        "model.encoder.layers": 2,
        "model.decoder.layers": 8,
    }


# -- experts and layers ------------------------------------------------------------------------------


def test_an_expert_is_every_tensor_of_it_and_no_router() -> None:
    shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}": shape
        for layer in (0, 1)
        for expert in range(3)
        for name, shape in {"up_proj.weight": (6, 4), "up_proj.bias": (6,), "scale": ()}.items()
    }
    routers: Shapes = {
        "model.layers.0.mlp.gate.weight": (3, 4),
        "model.layers.0.mlp.shared_expert.up_proj.weight": (6, 4),
    }
    found = find("experts", index_of({**shapes, **routers}))
    assert len(found) == 6
    reached = {part.tensor for one in found for part in one.parts}
    assert reached == {*shapes}
    place = dict(found[4].place)
    assert (place["layer"], place["expert"]) == (1, 1)
    for one in found:
        assert one.units == 1
        for name, elements in seen(shapes, one)[0, 0].items():
            assert elements == numbered(shapes[name]).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("shapes", "units", "modules"),
    [
        ({f"{EXPERTS}.gate_up_proj": (4, 12, 5), f"{EXPERTS}.gate_up_proj_bias": (4, 12)}, 4, 1),
        (below("model.layers.0.block_sparse_moe", input_linear=(4, 12, 5)), 4, 1),
        (
            {
                "transformer.blocks.0.ffn.experts.mlp.w1": (12, 5),
                "transformer.blocks.0.ffn.router.layer.weight": (4, 5),
            },
            4,
            1,
        ),
    ],
)
def test_an_expert_of_a_stack_is_its_slice(shapes: Shapes, units: int, modules: int) -> None:
    (structure,) = find("experts", index_of(shapes))
    assert structure.units == units
    assert dict(structure.place)["expert"] == "*"
    for (_, unit), elements in seen(shapes, structure).items():
        for name, each in elements.items():
            size = shapes[name][0] // units
            assert each == numbered(shapes[name])[size * unit : size * (unit + 1)].reshape(-1).tolist()


def test_experts_whose_names_have_their_number_are_told_apart() -> None:
    names = [f"decoder.layers.0.ffn.experts.expert_{expert}.fc1.weight" for expert in range(11)]
    found = find("experts", index_of(dict.fromkeys(names, (6, 4))))
    assert [dict(one.place)["expert"] for one in found] == list(range(11))
    assert [one.parts[0].tensor for one in found] == names


def test_a_layer_is_every_tensor_of_it_whatever_its_shape() -> None:
    own: Shapes = {"mlp.up.weight": (6, 4), "mlp.act_fn.beta": (), "norm.weight": (4,), "empty": (0, 4)}
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(3) for name, shape in own.items()}
    found = find("layers", index_of({**shapes, "model.embed.weight": (9, 4)}, {"num_hidden_layers": 3}))
    assert [dict(one.place)["layer"] for one in found] == [0, 1, 2]
    for one in found:
        (elements,) = seen(shapes, one).values()
        assert len(elements) == 3  # what has no elements has nothing to prune
        assert all(each == numbered(shapes[name]).reshape(-1).tolist() for name, each in elements.items())


@pytest.mark.parametrize(
    ("names", "config", "found"),
    [
        ([f"model.layers.{layer}.w" for layer in range(3)], {"num_hidden_layers": 2}, {"model.layers": 2}),
        (
            ["model.layers.0.w", "mtp.layers.0.w"],
            {"num_hidden_layers": 1},
            {"model.layers": 1, "mtp.layers": 1},
        ),
        (
            ["model.encoder.layers.0.w", "model.decoder.layers.0.w"],
            {},
            {"model.encoder.layers": 1, "model.decoder.layers": 1},
        ),
        (["h.0.w", "h.1.w", "conv_layers.0.w"], {}, {"h": 2}),
        (
            ["encoder.stages.0.layers.1.w", "encoder.stages.1.layers.0.w"],
            {},
            {"encoder.stages.0.layers": 1, "encoder.stages.1.layers": 1},
        ),
        # A stage is no layer, whatever else it has.
        (
            [
                "encoder.layers.0.blocks.0.w",
                "encoder.layers.0.blocks.1.w",
                "encoder.layers.0.downsample.norm.w",
            ],
            {"depths": [2]},
            {"encoder.layers.0.blocks": 2},
        ),
        (
            ["encoder.block.0.0.w", "encoder.block.1.0.w", "encoder.block.1.1.w"],
            {"depths": [1, 2]},
            {"encoder.block.0": 1, "encoder.block.1": 2},
        ),
        (["encoder.layers.0.w", "encoder.subsampling.layers.0.w"], {}, {"encoder.layers": 1}),
        (["encoder.albert_layer_groups.0.albert_layers.0.w"], {}, {"encoder.albert_layer_groups": 1}),
        (["blocks.0.0.w", "blocks.0.1.w", "blocks.1.0.w"], {}, {"blocks": 2}),
        (["model.layers.3.mlp.experts.0.layers.1.w"], {}, {"model.layers": 1}),
        (["experts.0.w", "model.norm.w"], {}, {}),
    ],
)
def test_lists_of_layers_are_known_by_their_names_and_end_where_the_config_says(
    names: list[str], config: Mapping[str, Any], found: Mapping[str, int]
) -> None:
    counts: dict[str, int] = {}
    for one in find("layers", index_of(dict.fromkeys(names, (2, 2)), config)):
        stack = str(dict(one.place)["stack"])
        counts[stack] = counts.get(stack, 0) + 1
    assert counts == found


# -- the hidden size ---------------------------------------------------------------------------------

HIDDEN: Shapes = {
    "model.embed_tokens.weight": (9, 6),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),  # of heads that are as many as hidden channels
    "model.layers.0.self_attn.k_proj.weight": (6, 6),
    "model.layers.0.self_attn.v_proj.weight": (6, 6),
    "model.layers.0.self_attn.o_proj.weight": (6, 6),
    "model.layers.0.self_attn.q_norm.weight": (2,),
    "model.layers.0.mlp.gate.weight": (4, 6),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 10, 6),
    "model.layers.0.mlp.experts.down_proj": (4, 6, 5),
    "lm_head.weight": (6, 6),  # as many tokens, too
}
SIX = {"hidden_size": 6, "num_attention_heads": 3, "head_dim": 2}


def test_a_hidden_channel_is_what_reads_writes_or_scales_it_in_every_tensor() -> None:
    (found,) = find("hidden", index_of(HIDDEN, SIX))
    inputs: dict[str, Callable[[int], Any]] = {
        name: lambda unit, shape=shape: numbered(shape)[..., unit]  # type: ignore[misc]
        for name, shape in HIDDEN.items()
        if "q_norm" not in name
    }
    inputs["model.layers.0.self_attn.o_proj.weight"] = lambda unit: numbered((6, 6))[unit]
    inputs["model.layers.0.mlp.experts.down_proj"] = lambda unit: numbered((4, 6, 5))[:, unit]
    elements = seen(HIDDEN, found)
    assert len(elements) == 6
    for (_, unit), each in elements.items():
        assert each == {name: of(unit).reshape(-1).tolist() for name, of in inputs.items()}


def test_without_a_config_embeddings_tell_the_hidden_size() -> None:
    shapes: Shapes = {"model.embed_tokens.weight": (9, 4), "model.layers.0.norm.weight": (4,)}
    (found,) = find("hidden", index_of(shapes))
    assert (found.units, len(found.parts)) == (4, 2)


def test_what_a_speculative_head_reads_has_hidden_channels_twice() -> None:
    shapes: Shapes = {"model.embed_tokens.weight": (9, 4), "model.layers.1.eh_proj.weight": (4, 8)}
    (found,) = find("hidden", index_of(shapes, {"hidden_size": 4}))
    each = [(one.dim, one.begin) for one in found.parts if "eh_proj" in one.tensor]
    assert each == [(1, 0), (1, 4), (0, 0)]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (
            {"model.layers.0.mix.weight": (6, 6)},
            "nothing tells which dimension of model.layers.0.mix.weight, [6, 6], it is",
        ),
        (
            {"vision_tower.layers.0.fc.weight": (8, 3)},
            "towers are joined by it, as vision_tower.layers.0.fc.weight tells",
        ),
    ],
)
def test_a_hidden_size_that_cannot_be_told_is_none_with_a_reason(more: Shapes, why: str) -> None:
    index = index_of({**HIDDEN, **more}, SIX)
    assert (find("hidden", index), hidden_size(index)) == ([], why)


def test_what_has_no_layers_or_no_such_width_has_no_hidden_size() -> None:
    assert hidden_size(index_of({"w": (4, 4)})) == "no layers and no embeddings tell one"
    index = index_of({"model.layers.0.fc.weight": (8, 3)}, {"hidden_size": 6})
    assert hidden_size(index) == "no tensor has 6 channels"


# -- matrices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "config", "view"),
    [
        ("layers.0.mlp.up_proj.weight", (6, 4), {}, lambda tensor: tensor),
        ("h.0.mlp.c_fc.weight", (4, 6), {"model_type": "gpt2"}, lambda tensor: tensor.T),
        ("layers.0.mlp.experts.up_proj", (3, 6, 4), {}, lambda tensor: tensor),
        (
            "layers.0.feed_forward.experts.gate_up_proj",
            (3, 4, 6),
            {"model_type": "llama4"},
            lambda tensor: tensor.swapaxes(1, 2),
        ),
        ("stages.0.layers.0.pwconv1.weight", (6, 4, 1, 1), {}, lambda tensor: tensor[:, :, 0, 0]),
        (
            "layers.0.convolution.weight",
            (6, 4, 3, 3),
            {},
            lambda tensor: tensor.transpose(2, 3, 0, 1).reshape(9, 6, 4),
        ),
        ("layers.0.conv.weight", (6, 4, 3), {}, lambda tensor: tensor.transpose(2, 0, 1)),
        (f"{XLNET}.q", (4, 3, 2), {}, lambda tensor: tensor.reshape(4, 6).T),
        (f"{XLNET}.o", (4, 3, 2), {}, lambda tensor: tensor.reshape(4, 6)),
    ],
)
def test_matrices_are_seen_outputs_first_and_inputs_last(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any], view: Callable[[Any], Any]
) -> None:
    ((_, _, look),) = matrices(index_of({name: shape}, config))
    tensor = numbered(shape)
    strides = [step * tensor.itemsize for step in look.stride]
    found = np.lib.stride_tricks.as_strided(tensor.reshape(-1)[look.offset :], look.shape, strides)
    assert found.tolist() == view(tensor).tolist()
    assert look.leading == max(0, len(look.shape) - 2)


def test_a_bias_tells_which_side_of_a_matrix_is_its_outputs() -> None:
    shapes: Shapes = {"h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_attn.bias": (12,)}
    ((_, _, look),) = matrices(index_of(shapes))
    assert look.shape == (12, 4)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (9, 4)),
        ("layers.0.norm.weight", (4, 4)),
        ("layers.0.up.weight", (4,)),
        ("layers.0.mixer.conv1d.weight", (8, 1, 4)),
        ("layers.0.mlp.router.weight", (3, 4)),
        ("layers.0.mlp.up_proj.weight_scale", (3, 4)),
        ("layers.0.mlp.up_proj.lora_A.weight", (3, 4)),
        ("lm_head.weight", (9, 4)),
    ],
)
def test_what_is_no_matrix_of_a_layer_is_none(name: str, shape: tuple[int, ...]) -> None:
    assert list(matrices(index_of({name: shape}))) == []


def test_a_gate_beside_experts_is_a_router_and_elsewhere_a_matrix() -> None:
    gate: Shapes = {"layers.0.mlp.gate.weight": (3, 4)}
    assert len(list(matrices(index_of(gate)))) == 1
    with_experts = index_of({**gate, "layers.0.mlp.experts.0.up.weight": (6, 4)})
    assert [tensor.name for _, tensor, _ in matrices(with_experts)] == ["layers.0.mlp.experts.0.up.weight"]


# -- places ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shapes", "captures"),
    [
        (
            "mlp",
            below("vision_tower.encoder.layers.7.mlp", fc1=(6, 4), fc2=(4, 6)),
            ("vision_tower.encoder.layers", 7, "mlp", "", "", "fc1"),
        ),
        (
            "mlp",
            below("layers.2.mlp.experts.11", up_proj=(6, 4), down_proj=(4, 6)),
            ("layers", 2, "mlp.experts", "", 11, "up_proj"),
        ),
        (
            "mlp",
            {f"{EXPERTS}.gate_up_proj": (3, 12, 4), f"{EXPERTS}.down_proj": (3, 4, 6)},
            ("model.layers", 0, "mlp.experts", "", "*", "gate_up_proj[gate]"),
        ),
        (
            "mlp",
            below("e.block.1.layer.2.DenseReluDense", wi=(6, 4), wo=(4, 6)),
            ("e.block", 1, "layer.2.DenseReluDense", "", "", "wi"),
        ),
    ],
)
def test_captures_tell_where_a_structure_is(
    kind: Kind, shapes: Shapes, captures: tuple[int | str, ...]
) -> None:
    (structure,) = find(kind, index_of(shapes))
    found = captures_of(structure, structure.parts[0])
    assert tuple(value for _, value in found) == captures
    assert [name for name, _ in found] == ["stack", "layer", "module", "group", "expert", "part"]
