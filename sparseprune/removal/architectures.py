"""The table of architectures: which key of config.json counts which dimension of which tensors.

Data, one row an architecture; a new one is a new row. Called by the rest of removal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparseprune.spec.patterns import parse_pattern

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparseprune.spec.patterns import TensorPattern

# Names of parts of a model that have a config of their own.
OTHER_TOWERS = re.compile("vision|visual|audio|image|speech|resampler|perceiver|connector|projector|qformer")


@dataclass(frozen=True, slots=True)
class DimPart:
    """Consecutive indices of a dimension: as many units as `key` of the config says, `unit` indices each.

    `unit` is an expression over the config. A unit stays or goes as a whole, unless `by_index`: then the key
    counts indices, whichever they are.
    """

    key: str
    unit: str = "1"
    by_index: bool = False


@dataclass(frozen=True, slots=True)
class TensorDims:
    """The parts of the dimensions of some tensors; other dimensions must not change.

    Tensors whose captures agree, except {name} and {kind}, keep the same units. A tensor that `follows` is
    not pruned itself: it loses the units that the others lose.
    """

    pattern: TensorPattern
    dims: Mapping[int, tuple[DimPart, ...]]
    follows: bool = False

    @property
    def keys(self) -> frozenset[str]:
        """The config keys of all parts."""
        return frozenset(part.key for parts in self.dims.values() for part in parts)


@dataclass(frozen=True, slots=True)
class ModuleList:
    """A numbered list of modules: the pattern of a member's name, and the key that counts the members."""

    pattern: TensorPattern
    key: str


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router needs of its experts: at least `chosen`, in `groups` of one size, `serving` at a time.

    Groups are ranked by the `best` of their members; each has at least that many.
    """

    experts: str
    chosen: str
    groups: str | None = None
    serving: str | None = None
    best: int = 1


@dataclass(frozen=True, slots=True)
class Heads:
    """The key that counts query heads; `groups` counts key/value heads, which share them equally.

    `pinned` keys are written out when heads are removed, since the class would derive them from the number of
    heads. `alike` keys take the value of another. The number of heads must divide the key `divides`. The
    class checks the length of lists in `sized` keys by the number of heads, whatever is pinned.
    """

    key: str
    groups: str | None = None
    divides: str | None = None
    pinned: Mapping[str, str] = field(default_factory=dict)
    alike: Mapping[str, str] = field(default_factory=dict)
    sized: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layers:
    """Where the config refers to layers by number, and must change with them.

    `by_place`: lists with an entry for each layer. `by_number`: lists of numbers of layers. `up_to`: counts
    of the first layers, with the default. `beyond`: the count of layers behind those that the key counts.
    `implied`: what the class derives where there is no list, an expression over `layer`; for a list of
    numbers it says whether the layer is in it. `settled`: a rule besides the list puts layers into it, and
    these values turn the rule off. `rules`: keys from which the class derives a list; they get a value that
    still derives it, or are removed. No layer can be removed where a `refused` key is set, with the reason.
    """

    members: ModuleList
    by_place: tuple[str, ...] = ("layer_types", "mlp_layer_types")
    by_number: tuple[str, ...] = ()
    up_to: Mapping[str, int] = field(default_factory=dict)
    implied: Mapping[str, str] = field(default_factory=dict)
    beyond: str = ""
    settled: Mapping[str, int] = field(default_factory=dict)
    rules: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Architecture:
    """Model types with the same names of tensors; the first of `tensors` that matches a name counts.

    `values` are expressions for keys that the config may omit, `aliases` are other spellings of keys.
    `refused` keys cannot change, with the reason.
    """

    models: tuple[str, ...]
    layers: Layers
    tensors: tuple[TensorDims, ...]
    lists: tuple[ModuleList, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    heads: Heads | None = None
    routing: Routing | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> frozenset[str]:
        """All config keys that the table has of this architecture."""
        layers, heads, routing = self.layers, self.heads, self.routing
        keys: set[str | None] = {layers.members.key, layers.beyond, *layers.by_place, *layers.by_number}
        keys.update(layers.up_to, layers.settled, layers.rules, layers.refused, self.values, self.aliases)
        keys.update((f"_{rule}" for rule in layers.rules), self.aliases.values())
        keys.update((members.key for members in self.lists), *(dims.keys for dims in self.tensors))
        if heads is not None:
            keys.update((heads.key, heads.groups, heads.divides), heads.pinned, heads.alike)
        if routing is not None:
            keys.update((routing.experts, routing.chosen, routing.groups, routing.serving))
        return frozenset(key for key in keys if key)


def _dims(
    pattern: str, dims: Mapping[int, str | DimPart | tuple[DimPart, ...]], *, follows: bool = False
) -> TensorDims:
    """A row of tensors; a key alone stands for one part with units of one index."""
    parts = {
        dim: (DimPart(each),) if isinstance(each, str) else (each,) if isinstance(each, DimPart) else each
        for dim, each in dims.items()
    }
    return TensorDims(parse_pattern(pattern), parts, follows)


def _gated(
    module: str, width: str | DimPart, names: tuple[str, str] = ("{name:gate|up}_proj", "down_proj")
) -> tuple[TensorDims, ...]:
    """Two matrices that write channels and one that reads them, as torch's Linear stores them."""
    makes, reads = names
    return (
        _dims(f"{module}.{makes}.{{kind:weight|bias}}", {0: width}),
        _dims(f"{module}.{reads}.weight", {1: width}),
        _dims(f"{module}.{reads}.bias", {}),
    )


HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"
_HEAD_DIM = "config.head_dim or config.hidden_size // config.num_attention_heads"
_MLP = "{at:**}.mlp"
_WIDTH, _EXPERT_WIDTH = "intermediate_size", "moe_intermediate_size"


def _layer(pattern: str = "{at:**}.layers.{member}", key: str = "num_hidden_layers") -> ModuleList:
    return ModuleList(parse_pattern(pattern), key)


_ATTENTION = (
    _dims("{at:**}.self_attn.q_proj.{kind:weight|bias}", {0: DimPart(HEADS, _HEAD_DIM)}),
    _dims("{at:**}.self_attn.{name:k|v}_proj.{kind:weight|bias}", {0: DimPart(KV_HEADS, _HEAD_DIM)}),
    _dims("{at:**}.self_attn.o_proj.weight", {1: DimPart(HEADS, _HEAD_DIM)}),
    _dims("{at:**}.self_attn.o_proj.bias", {}),
    _dims("{at:**}.self_attn.sinks", {0: HEADS}, follows=True),
)
_PINNED = {"head_dim": _HEAD_DIM}
_GROUPED = Heads(HEADS, KV_HEADS, pinned=_PINNED)
_EVEN = Heads(HEADS, KV_HEADS, "hidden_size", _PINNED)  # the config's class refuses others
_VALUES = {KV_HEADS: "config.num_key_value_heads or config.num_attention_heads"}
_SLIDING = "'sliding_attention' if {} else 'full_attention'"
_QWEN_WINDOW = "(config.use_sliding_window or 0) and not (config.sliding_window == None or 0) and "
# A key that may be 0, or 28 where there is none.
_FULL_ONES = "(config.max_window_layers if (config.max_window_layers >= 0 or 0) else 28)"


def _decoder(
    *models: str, layer_type: str | None = None, rule: str | None = None, heads: Heads = _GROUPED
) -> Architecture:
    """Gated MLP, grouped query attention, own head_dim; types of layers are derived from the key `rule`."""
    implied = {} if layer_type is None else {"layer_types": layer_type}
    return Architecture(
        models,
        Layers(_layer(), implied=implied, rules={} if rule is None else {rule: "layer_types"}),
        (*_gated(_MLP, _WIDTH), *_ATTENTION),
        values=_VALUES,
        heads=heads,
    )


def _router(module: str, experts: str, router: str = "gate") -> tuple[TensorDims, ...]:
    return (
        _dims(f"{{at:**}}.{module}.{router}.{{kind:weight|bias}}", {0: experts}, follows=True),
        _dims(f"{{at:**}}.{module}.{router}.e_score_correction_bias", {0: experts}, follows=True),
    )


def _experts(module: str, key: str) -> tuple[ModuleList, ...]:
    return (ModuleList(parse_pattern(f"{{at:**}}.{module}.experts.{{member}}"), key),)


def _qwen_moe(model: str, layer_type: str | None, *more: TensorDims) -> Architecture:
    implied = {"mlp_only_layers": "(layer + 1) % (config.decoder_sparse_step or 1) != 0"}
    return Architecture(
        (model,),
        Layers(
            _layer(),
            by_number=("mlp_only_layers",),
            implied=implied if layer_type is None else {**implied, "layer_types": layer_type},
            settled={"decoder_sparse_step": 1},
            rules={} if layer_type is None else {"max_window_layers": "layer_types"},
        ),
        (
            *_gated("{at:**}.mlp.experts.{expert}", _EXPERT_WIDTH),
            *_router("mlp", "num_experts"),
            *more,
            *_gated(_MLP, _WIDTH),
            *_ATTENTION,
        ),
        lists=_experts("mlp", "num_experts"),
        values=_VALUES,
        aliases={"num_experts": "num_local_experts"},
        routing=Routing("num_experts", "num_experts_per_tok"),
        heads=_GROUPED,
    )


_PHI3 = Architecture(
    ("phi3",),
    Layers(_layer()),
    (
        _dims("{at:**}.mlp.gate_up_proj.weight", {0: (DimPart(_WIDTH), DimPart(_WIDTH))}),
        _dims("{at:**}.mlp.down_proj.weight", {1: _WIDTH}),
        _dims(
            "{at:**}.self_attn.qkv_proj.weight",
            {0: (DimPart(HEADS, _HEAD_DIM), DimPart(KV_HEADS, _HEAD_DIM), DimPart(KV_HEADS, _HEAD_DIM))},
        ),
        _dims("{at:**}.self_attn.o_proj.weight", {1: DimPart(HEADS, _HEAD_DIM)}),
    ),
    values=_VALUES,
    heads=Heads(HEADS, KV_HEADS, pinned=_PINNED, sized=("rope_scaling", "rope_parameters")),
)

_GPT2_HEAD = DimPart("n_head", "config.n_embd // config.n_head")
_GPT2 = Architecture(
    ("gpt2",),
    Layers(
        _layer("{at:**}.h.{member}", "n_layer"),
        refused={"scale_attn_by_inverse_layer_idx": "the scale of attention depends on a layer's number"},
    ),
    (
        _dims("{at:**}.mlp.c_fc.weight", {1: "n_inner"}),
        _dims("{at:**}.mlp.c_fc.bias", {0: "n_inner"}),
        _dims("{at:**}.mlp.c_proj.weight", {0: "n_inner"}),
        _dims("{at:**}.mlp.c_proj.bias", {}),
        _dims("{at:**}.attn.c_attn.weight", {1: (_GPT2_HEAD,) * 3}),
        _dims("{at:**}.attn.c_attn.bias", {0: (_GPT2_HEAD,) * 3}),
        _dims("{at:**}.attn.c_proj.weight", {0: _GPT2_HEAD}),
        _dims("{at:**}.attn.c_proj.bias", {}),
    ),
    values={"n_inner": "config.n_inner or 4 * config.n_embd"},
    heads=Heads("n_head"),
    refused={
        "n_head": "GPT2Attention derives the size of a head from n_embd // n_head, so that fewer are larger"
    },
)

_MIXTRAL = Architecture(
    ("mixtral",),
    Layers(_layer()),
    (
        *_gated("{at:**}.block_sparse_moe.experts.{expert}", _WIDTH, ("{name:w1|w3}", "w2")),
        *_router("block_sparse_moe", "num_local_experts"),
        *_ATTENTION,
    ),
    lists=_experts("block_sparse_moe", "num_local_experts"),
    values=_VALUES,
    routing=Routing("num_local_experts", "num_experts_per_tok"),
    heads=_GROUPED,
)

_DEEPSEEK = Architecture(
    ("deepseek_v3",),
    Layers(_layer(), beyond="num_nextn_predict_layers", up_to={"first_k_dense_replace": 3}),
    (
        *_gated("{at:**}.mlp.experts.{expert}", _EXPERT_WIDTH),
        *_gated(
            "{at:**}.mlp.shared_experts",
            DimPart(_EXPERT_WIDTH, "config.n_shared_experts or 1", by_index=True),
        ),
        *_router("mlp", "n_routed_experts"),
        *_gated(_MLP, _WIDTH),
        _dims(
            "{at:**}.self_attn.{name:q|q_b}_proj.weight",
            {0: DimPart(HEADS, "config.qk_nope_head_dim + config.qk_rope_head_dim")},
        ),
        _dims(
            "{at:**}.self_attn.kv_b_proj.weight",
            {0: DimPart(HEADS, "config.qk_nope_head_dim + config.v_head_dim")},
        ),
        _dims("{at:**}.self_attn.o_proj.weight", {1: DimPart(HEADS, "config.v_head_dim")}),
        _dims("{at:**}.self_attn.o_proj.bias", {}),
    ),
    lists=_experts("mlp", "n_routed_experts"),
    heads=Heads(HEADS, alike={KV_HEADS: HEADS}),
    aliases={"n_routed_experts": "num_local_experts"},
    routing=Routing("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", best=2),
)

_GPT_OSS = Architecture(
    ("gpt_oss",),
    Layers(_layer(), implied={"layer_types": _SLIDING.format("(layer + 1) % 2")}),
    (
        _dims("{at:**}.mlp.experts.gate_up_proj", {0: "num_local_experts", 2: DimPart(_WIDTH, "2")}),
        _dims("{at:**}.mlp.experts.gate_up_proj_bias", {0: "num_local_experts", 1: DimPart(_WIDTH, "2")}),
        _dims("{at:**}.mlp.experts.down_proj", {0: "num_local_experts", 1: _WIDTH}),
        _dims("{at:**}.mlp.experts.down_proj_bias", {0: "num_local_experts"}),
        *_router("mlp", "num_local_experts", "router"),
        *_ATTENTION,
    ),
    values=_VALUES,
    routing=Routing("num_local_experts", "num_experts_per_tok"),
    heads=_GROUPED,
)

_LLAMA4 = Architecture(
    ("llama4_text",),
    Layers(
        _layer(),
        by_place=("no_rope_layers", "layer_types", "mlp_layer_types"),
        by_number=("moe_layers",),
        implied={
            "no_rope_layers": "1 if (layer + 1) % (config.no_rope_layer_interval or 4) else 0",
            "moe_layers": "(layer + 1) % (config.interleave_moe_layer_step or 1) == 0",
        },
        rules={"no_rope_layer_interval": "no_rope_layers", "interleave_moe_layer_step": "moe_layers"},
    ),
    (
        _dims(
            "{at:**}.feed_forward.experts.gate_up_proj",
            {0: "num_local_experts", 2: (DimPart(_WIDTH), DimPart(_WIDTH))},
        ),
        _dims("{at:**}.feed_forward.experts.down_proj", {0: "num_local_experts", 1: _WIDTH}),
        *_router("feed_forward", "num_local_experts", "router"),
        *_gated("{at:**}.feed_forward.{module:shared_expert}", _WIDTH),
        *_gated("{at:**}.feed_forward", "intermediate_size_mlp"),
        *_ATTENTION,
    ),
    values=_VALUES,
    routing=Routing("num_local_experts", "num_experts_per_tok"),
    heads=_GROUPED,
)

_ENCODER_HEAD = DimPart(HEADS, _HEAD_DIM)


def _encoder(
    *models: str,
    attention: str,
    heads: Heads,
    refused: Mapping[str, str] = {},
    layers: Mapping[str, str] = {},
) -> Architecture:
    return Architecture(
        models,
        Layers(_layer("{at:**}.encoder.layer.{member}"), refused=layers),
        (
            _dims("{at:**}.crossattention.output.dense.{kind:weight|bias}", {}),
            _dims(
                f"{{at:**}}.attention.{attention}.{{name:query|key|value}}.{{kind:weight|bias}}",
                {0: _ENCODER_HEAD},
            ),
            _dims("{at:**}.attention.output.dense.weight", {1: _ENCODER_HEAD}),
            _dims("{at:**}.attention.output.dense.bias", {}),
            _dims("{at:**}.intermediate.dense.{kind:weight|bias}", {0: _WIDTH}),
            _dims("{at:**}.output.dense.weight", {1: _WIDTH}),
            _dims("{at:**}.output.dense.bias", {}),
        ),
        heads=heads,
        refused=refused,
    )


_BERT_LAYERS = (
    "a BertLayer ends in a LayerNorm, so that without anything of it zeros are passed on, not its input"
)
_BERT_HEADS = (
    "BertSelfAttention derives the size of a head from hidden_size // num_attention_heads, so that fewer are "
    "larger"
)

ARCHITECTURES: tuple[Architecture, ...] = (
    _decoder("mistral", "gemma"),
    _decoder("llama", heads=_EVEN),
    _decoder(
        "qwen2",
        "qwen3",
        layer_type=_SLIDING.format(f"{_QWEN_WINDOW}layer >= {_FULL_ONES}"),
        rule="max_window_layers",
    ),
    _decoder("gemma2", layer_type=_SLIDING.format("(layer + 1) % 2"), heads=_EVEN),
    _decoder(
        "gemma3_text",
        layer_type=_SLIDING.format("(layer + 1) % (config.sliding_window_pattern or 6)"),
        rule="sliding_window_pattern",
        heads=_EVEN,
    ),
    _PHI3,
    _GPT2,
    _MIXTRAL,
    _qwen_moe(
        "qwen2_moe",
        _SLIDING.format(f"(config.use_sliding_window or 0) and (layer + 1) % 2 and layer < {_FULL_ONES}"),
        *_gated("{at:**}.mlp.shared_expert", "shared_expert_intermediate_size"),
    ),
    _qwen_moe("qwen3_moe", None),
    _DEEPSEEK,
    _GPT_OSS,
    _LLAMA4,
    _encoder(
        *("bert", "roberta", "xlm-roberta"),
        attention="self",
        heads=Heads(HEADS),
        refused={HEADS: _BERT_HEADS},
        layers={"num_hidden_layers": _BERT_LAYERS},
    ),
    _encoder("vit", attention="attention", heads=Heads(HEADS, pinned=_PINNED)),
)


def model_types() -> tuple[str, ...]:
    """All model types in the table."""
    return tuple(model for architecture in ARCHITECTURES for model in architecture.models)


def architecture_of(model_type: object) -> Architecture | None:
    """The architecture of a model type, None for an unknown one."""
    return next((each for each in ARCHITECTURES if model_type in each.models), None)
