"""The table of architectures: which key of a config counts which dimension of which tensors.

Data, one row a family. A new family is a new row. Called by the rest of removal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from sparseprune.spec.patterns import parse_pattern

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sparseprune.spec.patterns import TensorPattern


@dataclass(frozen=True, slots=True)
class Part:
    """A run of indices of a dimension: `key` of the config, times `unit` indices for each.

    `unit` is an expression over the config. Units go whole, unless `apart`: then indices are only counted.
    """

    key: str
    unit: str = "1"
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Use:
    """What the dimensions of some tensors are made of, part after part; all others are no business of ours.

    Tensors whose captures agree, but for {name} and {kind}, have the same units. `follows`: it acts only
    through units that others drop, so that it loses what they lose without being pruned itself.
    """

    pattern: TensorPattern
    dims: Mapping[int, tuple[Part, ...]]
    follows: bool = False
    keys: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        found = frozenset(part.key for parts in self.dims.values() for part in parts)
        object.__setattr__(self, "keys", found)


@dataclass(frozen=True, slots=True)
class Members:
    """A numbered list of modules, by the pattern of a member's name, and the key that counts it."""

    pattern: TensorPattern
    key: str


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router asks of its experts: at least `chosen`, in `groups` of one size, `serving` at a time.

    Groups are ranked by the `best` of their members, of which each has so many.
    """

    experts: str
    chosen: str
    groups: str | None = None
    serving: str | None = None
    best: int = 1


@dataclass(frozen=True, slots=True)
class Heads:
    """The key that counts query heads; `groups` counts key/value heads, each of which has as many of them.

    `pinned` keys are written out once heads go, since the class would derive them from the number of heads.
    `alike` keys take the value of another. `divides` is a key of which heads have to be a divisor. `sized`
    keys may have lists whose length the class derives from the number of heads, whatever is pinned.
    """

    key: str
    groups: str | None = None
    divides: str | None = None
    pinned: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    alike: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    sized: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layers:
    """Where the config speaks of layers by their number: what is cut, or said in another way, with them.

    `by_place`: lists with an entry for each; `by_number`: lists of numbers; `up_to`: counts of the first
    ones, and what they are where the config has none; `beyond` counts those behind all that the key counts.
    `implied` are lists that the class makes where the config has none: an expression over `layer`, for lists
    of numbers whether it is one of them. `settled` keys say the same by a rule that ends with the list:
    layers are in it by either, and the keys get values that say no more. `rules` are keys of which the class
    makes a list where there is none: they get values that still make it, or are taken out. Where one of the
    `refused` keys is set no layer can go, with the reason.
    """

    members: Members
    by_place: tuple[str, ...] = ("layer_types", "mlp_layer_types")
    by_number: tuple[str, ...] = ()
    up_to: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    implied: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    beyond: str = ""
    settled: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    rules: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Family:
    """Model types that lay their tensors out alike; of several uses the first that matches a name counts.

    `values` are expressions for keys that the config may leave out, `aliases` other spellings of them.
    `refused` are keys that cannot change, with the reason.
    """

    models: tuple[str, ...]
    layers: Layers
    uses: tuple[Use, ...]
    lists: tuple[Members, ...] = ()
    values: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    heads: Heads | None = None
    routing: Routing | None = None
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def _use(pattern: str, dims: Mapping[int, str | Part | tuple[Part, ...]], *, follows: bool = False) -> Use:
    """A use; a key alone stands for one part of single indices."""
    parts = {
        dim: (Part(each),) if isinstance(each, str) else (each,) if isinstance(each, Part) else each
        for dim, each in dims.items()
    }
    return Use(parse_pattern(pattern), MappingProxyType(parts), follows)


def _gated(
    module: str, width: str | Part, names: tuple[str, str] = ("{name:gate|up}_proj", "down_proj")
) -> tuple[Use, ...]:
    """Two matrices that make channels and one that reads them, as torch's Linear has them: outputs first."""
    makes, reads = names
    return (
        _use(f"{module}.{makes}.{{kind:weight|bias}}", {0: width}),
        _use(f"{module}.{reads}.weight", {1: width}),
        _use(f"{module}.{reads}.bias", {}),
    )


HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"
_HEAD_DIM = "config.head_dim or config.hidden_size // config.num_attention_heads"
_MLP = "{at:**}.mlp"
_WIDTH, _EXPERT_WIDTH = "intermediate_size", "moe_intermediate_size"


def _layer(pattern: str = "{at:**}.layers.{member}", key: str = "num_hidden_layers") -> Members:
    return Members(parse_pattern(pattern), key)


_ATTENTION = (
    _use("{at:**}.self_attn.q_proj.{kind:weight|bias}", {0: Part(HEADS, _HEAD_DIM)}),
    _use("{at:**}.self_attn.{name:k|v}_proj.{kind:weight|bias}", {0: Part(KV_HEADS, _HEAD_DIM)}),
    _use("{at:**}.self_attn.o_proj.weight", {1: Part(HEADS, _HEAD_DIM)}),
    _use("{at:**}.self_attn.o_proj.bias", {}),
    _use("{at:**}.self_attn.sinks", {0: HEADS}, follows=True),
)
_PINNED = MappingProxyType({"head_dim": _HEAD_DIM})
_GROUPED = Heads(HEADS, KV_HEADS, pinned=_PINNED)
_EVEN = Heads(HEADS, KV_HEADS, "hidden_size", _PINNED)  # the config's class refuses others
_VALUES = MappingProxyType({KV_HEADS: "config.num_key_value_heads or config.num_attention_heads"})
_SLIDING = "'sliding_attention' if {} else 'full_attention'"
_QWEN_WINDOW = "(config.use_sliding_window or 0) and not (config.sliding_window == None or 0) and "
# A key that may be 0, or 28 where there is none.
_FULL_ONES = "(config.max_window_layers if (config.max_window_layers >= 0 or 0) else 28)"


def _decoder(
    *models: str, layer_type: str | None = None, rule: str | None = None, heads: Heads = _GROUPED
) -> Family:
    """Gated MLP, grouped query attention, head_dim of its own; `rule` is the key of which types are made."""
    implied = {} if layer_type is None else {"layer_types": layer_type}
    return Family(
        models,
        Layers(_layer(), implied=implied, rules={} if rule is None else {rule: "layer_types"}),
        (*_gated(_MLP, _WIDTH), *_ATTENTION),
        values=_VALUES,
        heads=heads,
    )


def _router(module: str, experts: str, router: str = "gate") -> tuple[Use, ...]:
    return (
        _use(f"{{at:**}}.{module}.{router}.{{kind:weight|bias}}", {0: experts}, follows=True),
        _use(f"{{at:**}}.{module}.{router}.e_score_correction_bias", {0: experts}, follows=True),
    )


def _experts(module: str, key: str) -> tuple[Members, ...]:
    return (Members(parse_pattern(f"{{at:**}}.{module}.experts.{{member}}"), key),)


def _qwen_moe(model: str, layer_type: str | None, *more: Use) -> Family:
    implied = {"mlp_only_layers": "(layer + 1) % (config.decoder_sparse_step or 1) != 0"}
    return Family(
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
        aliases=MappingProxyType({"num_experts": "num_local_experts"}),
        routing=Routing("num_experts", "num_experts_per_tok"),
        heads=_GROUPED,
    )


_PHI3 = Family(
    ("phi3",),
    Layers(_layer()),
    (
        _use("{at:**}.mlp.gate_up_proj.weight", {0: (Part(_WIDTH), Part(_WIDTH))}),
        _use("{at:**}.mlp.down_proj.weight", {1: _WIDTH}),
        _use(
            "{at:**}.self_attn.qkv_proj.weight",
            {0: (Part(HEADS, _HEAD_DIM), Part(KV_HEADS, _HEAD_DIM), Part(KV_HEADS, _HEAD_DIM))},
        ),
        _use("{at:**}.self_attn.o_proj.weight", {1: Part(HEADS, _HEAD_DIM)}),
    ),
    values=_VALUES,
    heads=Heads(HEADS, KV_HEADS, pinned=_PINNED, sized=("rope_scaling", "rope_parameters")),
)

_GPT2_HEAD = Part("n_head", "config.n_embd // config.n_head")
_GPT2 = Family(
    ("gpt2",),
    Layers(
        _layer("{at:**}.h.{member}", "n_layer"),
        refused={"scale_attn_by_inverse_layer_idx": "the scale of attention depends on a layer's number"},
    ),
    (
        _use("{at:**}.mlp.c_fc.weight", {1: "n_inner"}),
        _use("{at:**}.mlp.c_fc.bias", {0: "n_inner"}),
        _use("{at:**}.mlp.c_proj.weight", {0: "n_inner"}),
        _use("{at:**}.mlp.c_proj.bias", {}),
        _use("{at:**}.attn.c_attn.weight", {1: (_GPT2_HEAD,) * 3}),
        _use("{at:**}.attn.c_attn.bias", {0: (_GPT2_HEAD,) * 3}),
        _use("{at:**}.attn.c_proj.weight", {0: _GPT2_HEAD}),
        _use("{at:**}.attn.c_proj.bias", {}),
    ),
    values=MappingProxyType({"n_inner": "config.n_inner or 4 * config.n_embd"}),
    heads=Heads("n_head"),
    refused=MappingProxyType(
        {"n_head": "GPT2Attention derives the size of a head from n_embd // n_head, so that fewer are larger"}
    ),
)

_MIXTRAL = Family(
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

_DEEPSEEK = Family(
    ("deepseek_v3",),
    Layers(_layer(), beyond="num_nextn_predict_layers", up_to={"first_k_dense_replace": 3}),
    (
        *_gated("{at:**}.mlp.experts.{expert}", _EXPERT_WIDTH),
        *_gated(
            "{at:**}.mlp.shared_experts", Part(_EXPERT_WIDTH, "config.n_shared_experts or 1", apart=True)
        ),
        *_router("mlp", "n_routed_experts"),
        *_gated(_MLP, _WIDTH),
        _use(
            "{at:**}.self_attn.{name:q|q_b}_proj.weight",
            {0: Part(HEADS, "config.qk_nope_head_dim + config.qk_rope_head_dim")},
        ),
        _use(
            "{at:**}.self_attn.kv_b_proj.weight",
            {0: Part(HEADS, "config.qk_nope_head_dim + config.v_head_dim")},
        ),
        _use("{at:**}.self_attn.o_proj.weight", {1: Part(HEADS, "config.v_head_dim")}),
        _use("{at:**}.self_attn.o_proj.bias", {}),
    ),
    lists=_experts("mlp", "n_routed_experts"),
    heads=Heads(HEADS, alike=MappingProxyType({KV_HEADS: HEADS})),
    aliases=MappingProxyType({"n_routed_experts": "num_local_experts"}),
    routing=Routing("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", best=2),
)

_GPT_OSS = Family(
    ("gpt_oss",),
    Layers(_layer(), implied={"layer_types": _SLIDING.format("(layer + 1) % 2")}),
    (
        _use("{at:**}.mlp.experts.gate_up_proj", {0: "num_local_experts", 2: Part(_WIDTH, "2")}),
        _use("{at:**}.mlp.experts.gate_up_proj_bias", {0: "num_local_experts", 1: Part(_WIDTH, "2")}),
        _use("{at:**}.mlp.experts.down_proj", {0: "num_local_experts", 1: _WIDTH}),
        _use("{at:**}.mlp.experts.down_proj_bias", {0: "num_local_experts"}),
        *_router("mlp", "num_local_experts", "router"),
        *_ATTENTION,
    ),
    values=_VALUES,
    routing=Routing("num_local_experts", "num_experts_per_tok"),
    heads=_GROUPED,
)

_LLAMA4 = Family(
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
        _use(
            "{at:**}.feed_forward.experts.gate_up_proj",
            {0: "num_local_experts", 2: (Part(_WIDTH), Part(_WIDTH))},
        ),
        _use("{at:**}.feed_forward.experts.down_proj", {0: "num_local_experts", 1: _WIDTH}),
        *_router("feed_forward", "num_local_experts", "router"),
        *_gated("{at:**}.feed_forward.{module:shared_expert}", _WIDTH),
        *_gated("{at:**}.feed_forward", "intermediate_size_mlp"),
        *_ATTENTION,
    ),
    values=_VALUES,
    routing=Routing("num_local_experts", "num_experts_per_tok"),
    heads=_GROUPED,
)

_ENCODER_HEAD = Part(HEADS, _HEAD_DIM)


def _encoder(
    *models: str,
    attention: str,
    heads: Heads,
    refused: Mapping[str, str] = MappingProxyType({}),
    layers: Mapping[str, str] = MappingProxyType({}),
) -> Family:
    return Family(
        models,
        Layers(_layer("{at:**}.encoder.layer.{member}"), refused=layers),
        (
            _use("{at:**}.crossattention.output.dense.{kind:weight|bias}", {}),
            _use(
                f"{{at:**}}.attention.{attention}.{{name:query|key|value}}.{{kind:weight|bias}}",
                {0: _ENCODER_HEAD},
            ),
            _use("{at:**}.attention.output.dense.weight", {1: _ENCODER_HEAD}),
            _use("{at:**}.attention.output.dense.bias", {}),
            _use("{at:**}.intermediate.dense.{kind:weight|bias}", {0: _WIDTH}),
            _use("{at:**}.output.dense.weight", {1: _WIDTH}),
            _use("{at:**}.output.dense.bias", {}),
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

FAMILIES: tuple[Family, ...] = (
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
        refused=MappingProxyType({HEADS: _BERT_HEADS}),
        layers=MappingProxyType({"num_hidden_layers": _BERT_LAYERS}),
    ),
    _encoder("vit", attention="attention", heads=Heads(HEADS, pinned=_PINNED)),
)


def model_types(families: Iterable[Family] = FAMILIES) -> tuple[str, ...]:
    """All model types that are known."""
    return tuple(model for family in families for model in family.models)


def family_of(model_type: object) -> Family | None:
    """The family of a model type, None where it is not known."""
    return next((family for family in FAMILIES if model_type in family.models), None)
