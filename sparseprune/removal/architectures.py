"""The table of architectures: which keys of config.json count the units of structures, by model type.

Data: the keys that mean the same in most configs, and one row for model types that need more, or refuse. A
model type is in a row only if removal was shown to load. Called by the rest of removal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sparseprune.spec.naming import HEAD_COUNTS

if TYPE_CHECKING:
    from collections.abc import Mapping

# -- keys that mean the same wherever they are -------------------------------------------------------

# Keys that may count the channels of an MLP, the likeliest first; the first counts whose value fits.
EXPERT_WIDTHS = (
    *("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "ffn_config.ffn_hidden_size"),
    *("expert_ffn_dim", "intermediate_size", "d_ff"),
)
SHARED_WIDTHS = (
    *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
    *("moe_intermediate_size", "intermediate_size"),
)
WIDTHS = (
    *(
        "intermediate_size_mlp",
        "intermediate_size",
        "ffn_hidden_size",
        "ffn_dim",
        "n_inner",
        "d_ff",
        "d_inner",
    ),
    *("hidden_dim", "dim_feedforward"),
)
SIDED_WIDTHS = ("{side}_ffn_dim", "{side}_intermediate_size")  # of encoders and decoders
RATIOS = ("mlp_ratio", "expansion_ratio")  # of the channels to the hidden size
KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "attn_config.kv_n_heads")
SIDED_KV_COUNTS = ("{side}_num_key_value_heads",)
SIDED_HEADS = ("{side}_attention_heads", "{side}_num_attention_heads")
EXPERT_COUNTS = (
    *(
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "ffn_config.moe_num_experts",
    ),
)
CHOSEN = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k"),
    *("ffn_config.moe_top_k", "num_selected_experts"),
)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
SIDED_LAYERS = ("{side}_layers", "num_{side}_layers", "{side}_num_hidden_layers")
HEADS = HEAD_COUNTS

# Lists with an entry for each layer.
BY_PLACE = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "activation_sparsity_pattern"),
    *("intermediate_size", "attention_layers", "hybrid_layer_pattern"),
)


class Layers(Struct, frozen=True):
    """Where a config refers to layers by number, and must change with them.

    `by_place`: lists with an entry for each layer. `by_number`: lists of numbers of layers. `up_to`: counts
    of the first layers, with the default. `beyond`: the count of layers behind those that the key counts.
    `implied`: what the class derives where there is no list, an expression over `layer`; for a list of
    numbers it says whether the layer is in it. `settled`: a rule besides the list puts layers into it, and
    these values turn the rule off. `rules`: keys from which the class derives a list; they get a value that
    still derives it, or are removed. `by_key`: objects with an entry for numbers of layers. No layer can be
    removed where a `refused` key is set, with the reason.
    """

    by_place: tuple[str, ...] = BY_PLACE
    by_number: tuple[str, ...] = ()
    by_key: tuple[str, ...] = ("per_layer_config",)
    up_to: Mapping[str, int] = {}
    implied: Mapping[str, str] = {}
    beyond: str = ""
    settled: Mapping[str, int] = {}
    rules: Mapping[str, str] = {}
    refused: Mapping[str, str] = {}


class Architecture(Struct, frozen=True):
    """Model types whose configs are alike, and what is particular about them.

    `refused` says why a structure ("mlp", "heads", "experts", "layers") cannot change. `pinned`: keys that
    are written out when heads go, expressions for what the class would else derive from the number of heads.
    The number of heads must divide the key `divides`; the class checks lists in `sized` by it. `alike` keys
    take the value of another. `values` are expressions for keys that a config may omit. `widths` name the
    key for modules whose names hold a text. `groups`: a router's groups of experts of one size, of which
    `serving` serve and each needs the `best`. `settled` keys get a value when channels go.
    """

    models: tuple[str, ...]
    layers: Layers = Layers()
    refused: Mapping[str, str] = {}
    pinned: Mapping[str, str] = {}
    divides: str | None = None
    sized: tuple[str, ...] = ()
    alike: Mapping[str, str] = {}
    values: Mapping[str, str] = {}
    widths: Mapping[str, str] = {}
    groups: str | None = None
    serving: str | None = None
    best: int = 1
    settled: Mapping[str, bool] = {}


_HEAD_DIM = "config.head_dim or config.hidden_size // config.num_attention_heads"
_PINNED = {"head_dim": _HEAD_DIM}
_KV = {"num_key_value_heads": "config.num_key_value_heads or config.num_attention_heads"}
_SLIDING = "'sliding_attention' if {} else 'full_attention'"
_QWEN_WINDOW = "(config.use_sliding_window or 0) and not (config.sliding_window == None or 0) and "
# A key that may be 0, or 28 where there is none.
_FULL_ONES = "(config.max_window_layers if (config.max_window_layers >= 0 or 0) else 28)"
_BERT_LAYERS = "a layer ends in a norm, so that without anything of it zeros are passed on, not its input"
_DERIVED = "the class derives the size of a head from {} // {}, so that fewer are larger"


def _row(*models: str, **particular: Any) -> Architecture:  # noqa: ANN401  (the fields of the class)
    """A row of model types, several in a text."""
    names = tuple(name for text in models for name in text.split())
    return Architecture(names, **particular)


def _grouped(*models: str, **particular: Any) -> Architecture:  # noqa: ANN401
    """Model types whose heads have a size of their own, in groups of one number of key/value heads."""
    grouped: dict[str, Any] = {"pinned": _PINNED, "values": _KV}
    return _row(*models, **{**grouped, **particular})


def _typed(layer_type: str, rule: str | None = None) -> Layers:
    """Layers whose types the class derives by an expression, from the key `rule` if any."""
    implied = {"layer_types": _SLIDING.format(layer_type)}
    return Layers(implied=implied, rules={} if rule is None else {rule: "layer_types"})


_SPARSE = Layers(
    by_number=("mlp_only_layers",),
    implied={"mlp_only_layers": "(layer + 1) % (config.decoder_sparse_step or 1) != 0"},
    settled={"decoder_sparse_step": 1},
)
_QWEN2_MOE_TYPES = _typed(
    f"(config.use_sliding_window or 0) and (layer + 1) % 2 and layer < {_FULL_ONES}", "max_window_layers"
)
_POST_NORM = {
    "heads": _DERIVED.format("hidden_size", "num_attention_heads"),
    "layers": _BERT_LAYERS,
}

ARCHITECTURES: tuple[Architecture, ...] = (
    _grouped("mistral gemma"),
    _grouped("llama", divides="hidden_size"),
    _grouped("qwen2 qwen3", layers=_typed(f"{_QWEN_WINDOW}layer >= {_FULL_ONES}", "max_window_layers")),
    _grouped("gemma2", layers=_typed("(layer + 1) % 2"), divides="hidden_size"),
    _grouped(
        "gemma3_text",
        layers=_typed("(layer + 1) % (config.sliding_window_pattern or 6)", "sliding_window_pattern"),
        divides="hidden_size",
    ),
    _grouped("phi3", sized=("rope_scaling", "rope_parameters")),
    _row(
        "gpt2",
        layers=Layers(
            refused={"scale_attn_by_inverse_layer_idx": "the scale of attention depends on a layer's number"}
        ),
        values={"n_inner": "config.n_inner or 4 * config.n_embd"},
        refused={"heads": _DERIVED.format("n_embd", "n_head")},
    ),
    _grouped("mixtral"),
    _grouped(
        "qwen2_moe",
        layers=Layers(
            by_number=_SPARSE.by_number,
            implied={**_SPARSE.implied, **_QWEN2_MOE_TYPES.implied},
            settled=_SPARSE.settled,
            rules=_QWEN2_MOE_TYPES.rules,
        ),
    ),
    _grouped("qwen3_moe", layers=_SPARSE),
    _row(
        "deepseek_v3 glm4_moe dots1 exaone_moe solar_open glm4_moe_lite",
        layers=Layers(beyond="num_nextn_predict_layers", up_to={"first_k_dense_replace": 3}),
        alike={"num_key_value_heads": "num_attention_heads"},
        groups="n_group",
        serving="topk_group",
        best=2,
    ),
    _grouped("gpt_oss", layers=_typed("(layer + 1) % 2")),
    _grouped(
        "llama4_text",
        layers=Layers(
            by_number=("moe_layers",),
            implied={
                "no_rope_layers": "1 if (layer + 1) % (config.no_rope_layer_interval or 4) else 0",
                "moe_layers": "(layer + 1) % (config.interleave_moe_layer_step or 1) == 0",
            },
            rules={"no_rope_layer_interval": "no_rope_layers", "interleave_moe_layer_step": "moe_layers"},
        ),
        widths={"expert": "intermediate_size", "feed_forward": "intermediate_size_mlp"},
    ),
    _row("bert roberta xlm-roberta", refused=_POST_NORM),
    _row("vit", pinned=_PINNED),
)


def model_types() -> tuple[str, ...]:
    """All model types in the table."""
    return tuple(model for architecture in ARCHITECTURES for model in architecture.models)


def architecture_of(model_type: object) -> Architecture | None:
    """The architecture of a model type, None for an unknown one."""
    return next((each for each in ARCHITECTURES if model_type in each.models), None)


def known_keys(architecture: Architecture) -> frozenset[str]:
    """All config keys that the table has for an architecture."""
    layers = architecture.layers
    keys: set[str | None] = {layers.beyond, *layers.by_place, *layers.by_number, *layers.by_key}
    keys.update(layers.up_to, layers.settled, layers.rules, layers.refused, layers.implied)
    keys.update((f"_{rule}" for rule in layers.rules), architecture.values, architecture.pinned)
    keys.update(architecture.alike, architecture.widths.values(), architecture.settled)
    keys.update((architecture.divides, architecture.groups, architecture.serving))
    return frozenset(key for key in keys if key)
