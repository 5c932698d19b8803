"""The table of architectures: which key of config.json counts which dimension of which tensors.

Data, one row an architecture; a new one is a new row. Called by the rest of removal.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.spec.patterns import parse_pattern

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparseprune.spec.patterns import TensorPattern

# Names of parts of a model that have a config of their own.
OTHER_TOWERS = re.compile("vision|visual|audio|image|speech|resampler|perceiver|connector|projector|qformer")


class DimPart(Struct, frozen=True):
    """Consecutive indices of a dimension: as many units as `key` of the config says, `unit` indices each.

    `unit` is an expression over the config. A unit stays or goes as a whole, unless `by_index`: then the key
    counts indices, whichever they are.
    """

    key: str
    unit: str = "1"
    by_index: bool = False


class TensorDims(Struct, frozen=True):
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


class ModuleList(Struct, frozen=True):
    """A numbered list of modules: the pattern of a member's name, and the key that counts the members."""

    pattern: TensorPattern
    key: str


class Routing(Struct, frozen=True):
    """What a router needs of its experts: at least `chosen`, in `groups` of one size, `serving` at a time.

    Groups are ranked by the `best` of their members; each has at least that many.
    """

    experts: str
    chosen: str
    groups: str | None = None
    serving: str | None = None
    best: int = 1


class Heads(Struct, frozen=True):
    """The key that counts query heads; `groups` counts key/value heads, which share them equally.

    `pinned` keys are written out when heads are removed, since the class would derive them from the number of
    heads. `alike` keys take the value of another. The number of heads must divide the key `divides`. The
    class checks the length of lists in `sized` keys by the number of heads, whatever is pinned.
    """

    key: str
    groups: str | None = None
    divides: str | None = None
    pinned: Mapping[str, str] = {}
    alike: Mapping[str, str] = {}
    sized: tuple[str, ...] = ()


class Layers(Struct, frozen=True):
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
    up_to: Mapping[str, int] = {}
    implied: Mapping[str, str] = {}
    beyond: str = ""
    settled: Mapping[str, int] = {}
    rules: Mapping[str, str] = {}
    refused: Mapping[str, str] = {}


class Architecture(Struct, frozen=True):
    """Model types with the same names of tensors; the first of `tensors` that matches a name counts.

    `values` are expressions for keys that the config may omit, `aliases` are other spellings of keys.
    `refused` keys cannot change, with the reason.
    """

    models: tuple[str, ...]
    layers: Layers
    tensors: tuple[TensorDims, ...]
    lists: tuple[ModuleList, ...] = ()
    values: Mapping[str, str] = {}
    aliases: Mapping[str, str] = {}
    heads: Heads | None = None
    routing: Routing | None = None
    refused: Mapping[str, str] = {}

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
    name: str, dims: Mapping[int, str | DimPart | tuple[str | DimPart, ...]], *, follows: bool = False
) -> TensorDims:
    """A row of the table for names that end so; a key alone stands for units of one index."""
    parts = {dim: each if isinstance(each, tuple) else (each,) for dim, each in dims.items()}
    made = {
        dim: tuple(DimPart(one) if isinstance(one, str) else one for one in each)
        for dim, each in parts.items()
    }
    return TensorDims(parse_pattern(f"{{at:**}}.{name}"), made, follows)


def _writes(module: str, part: str | DimPart, *, follows: bool = False) -> TensorDims:
    """A linear layer whose outputs are the units, as torch stores it: outputs first."""
    return _dims(f"{module}.{{kind:weight|bias}}", {0: part}, follows=follows)


def _reads(module: str, part: str | DimPart) -> tuple[TensorDims, ...]:
    """A linear layer whose inputs are the units."""
    return _dims(f"{module}.weight", {1: part}), _dims(f"{module}.bias", {})


def _gated(
    module: str, width: str | DimPart, names: tuple[str, str] = ("{name:gate|up}_proj", "down_proj")
) -> tuple[TensorDims, ...]:
    """Two matrices that write channels and one that reads them."""
    writes, reads = names
    return _writes(f"{module}.{writes}", width), *_reads(f"{module}.{reads}", width)


def _router(module: str, experts: str) -> tuple[TensorDims, ...]:
    return (
        _writes(module, experts, follows=True),
        _dims(f"{module}.e_score_correction_bias", {0: experts}, follows=True),
    )


def _list(module: str, key: str) -> ModuleList:
    return ModuleList(parse_pattern(f"{{at:**}}.{module}.{{member}}"), key)


_LAYERS = _list("layers", "num_hidden_layers")
HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"
_HEAD_DIM = "config.head_dim or config.hidden_size // config.num_attention_heads"
_HEAD, _KV_HEAD = DimPart(HEADS, _HEAD_DIM), DimPart(KV_HEADS, _HEAD_DIM)
_WIDTH, _EXPERT_WIDTH = "intermediate_size", "moe_intermediate_size"
_EXPERTS, _LOCAL_EXPERTS = "num_experts", "num_local_experts"
_PINNED = {"head_dim": _HEAD_DIM}
_GROUPED = Heads(HEADS, KV_HEADS, pinned=_PINNED)
_EVEN = Heads(HEADS, KV_HEADS, "hidden_size", _PINNED)  # the config's class refuses others
_SLIDING = "'sliding_attention' if {} else 'full_attention'"
_QWEN_WINDOW = "(config.use_sliding_window or 0) and not (config.sliding_window == None or 0) and "
# A key that may be 0, or 28 where there is none.
_FULL_ONES = "(config.max_window_layers if (config.max_window_layers >= 0 or 0) else 28)"
_ATTENTION = (
    _writes("self_attn.q_proj", _HEAD),
    _writes("self_attn.{name:k|v}_proj", _KV_HEAD),
    *_reads("self_attn.o_proj", _HEAD),
    _dims("self_attn.sinks", {0: HEADS}, follows=True),
)


def _decoder(
    *models: str,
    layers: Layers = Layers(_LAYERS),
    tensors: tuple[TensorDims, ...] = (*_gated("mlp", _WIDTH), *_ATTENTION),
    heads: Heads = _GROUPED,
    experts: tuple[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Architecture:
    """Grouped query attention with an own head_dim; `experts` are a list of modules or "", and its key."""
    module, key = experts or ("", "")
    return Architecture(
        models,
        layers,
        tensors,
        (_list(module, key),) if module else (),
        {KV_HEADS: "config.num_key_value_heads or config.num_attention_heads"},
        aliases or {},
        heads,
        Routing(key, "num_experts_per_tok") if experts else None,
    )


def _typed(layer_type: str, rule: str | None = None) -> Layers:
    """Layers whose types the class derives by an expression, from the key `rule` if any."""
    implied = {"layer_types": _SLIDING.format(layer_type)}
    return Layers(_LAYERS, implied=implied, rules={} if rule is None else {rule: "layer_types"})


def _qwen_moe(model: str, layers: Layers, *more: TensorDims) -> Architecture:
    sparse = {"mlp_only_layers": "(layer + 1) % (config.decoder_sparse_step or 1) != 0"}
    return _decoder(
        model,
        layers=replace(
            layers,
            by_number=("mlp_only_layers",),
            implied={**sparse, **layers.implied},
            settled={"decoder_sparse_step": 1},
        ),
        tensors=(
            *_gated("mlp.experts.{expert}", _EXPERT_WIDTH),
            *_router("mlp.gate", _EXPERTS),
            *more,
            *_gated("mlp", _WIDTH),
            *_ATTENTION,
        ),
        experts=("mlp.experts", _EXPERTS),
        aliases={_EXPERTS: _LOCAL_EXPERTS},
    )


_GPT2_HEAD = DimPart("n_head", "config.n_embd // config.n_head")
_GPT2 = Architecture(
    ("gpt2",),
    Layers(
        _list("h", "n_layer"),
        refused={"scale_attn_by_inverse_layer_idx": "the scale of attention depends on a layer's number"},
    ),
    (
        _dims("mlp.c_fc.weight", {1: "n_inner"}),
        _dims("mlp.c_fc.bias", {0: "n_inner"}),
        _dims("mlp.c_proj.weight", {0: "n_inner"}),
        _dims("mlp.c_proj.bias", {}),
        _dims("attn.c_attn.weight", {1: (_GPT2_HEAD,) * 3}),
        _dims("attn.c_attn.bias", {0: (_GPT2_HEAD,) * 3}),
        _dims("attn.c_proj.weight", {0: _GPT2_HEAD}),
        _dims("attn.c_proj.bias", {}),
    ),
    values={"n_inner": "config.n_inner or 4 * config.n_embd"},
    heads=Heads("n_head"),
    refused={
        "n_head": "GPT2Attention derives the size of a head from n_embd // n_head, so that fewer are larger"
    },
)

_DEEPSEEK = Architecture(
    ("deepseek_v3",),
    Layers(_LAYERS, beyond="num_nextn_predict_layers", up_to={"first_k_dense_replace": 3}),
    (
        *_gated("mlp.experts.{expert}", _EXPERT_WIDTH),
        *_gated("mlp.shared_experts", DimPart(_EXPERT_WIDTH, "config.n_shared_experts or 1", by_index=True)),
        *_router("mlp.gate", "n_routed_experts"),
        *_gated("mlp", _WIDTH),
        _dims(
            "self_attn.{name:q|q_b}_proj.weight",
            {0: DimPart(HEADS, "config.qk_nope_head_dim + config.qk_rope_head_dim")},
        ),
        _dims(
            "self_attn.kv_b_proj.weight", {0: DimPart(HEADS, "config.qk_nope_head_dim + config.v_head_dim")}
        ),
        *_reads("self_attn.o_proj", DimPart(HEADS, "config.v_head_dim")),
    ),
    lists=(_list("mlp.experts", "n_routed_experts"),),
    heads=Heads(HEADS, alike={KV_HEADS: HEADS}),
    aliases={"n_routed_experts": _LOCAL_EXPERTS},
    routing=Routing("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", best=2),
)

_LLAMA4 = _decoder(
    "llama4_text",
    layers=Layers(
        _LAYERS,
        by_place=("no_rope_layers", "layer_types", "mlp_layer_types"),
        by_number=("moe_layers",),
        implied={
            "no_rope_layers": "1 if (layer + 1) % (config.no_rope_layer_interval or 4) else 0",
            "moe_layers": "(layer + 1) % (config.interleave_moe_layer_step or 1) == 0",
        },
        rules={"no_rope_layer_interval": "no_rope_layers", "interleave_moe_layer_step": "moe_layers"},
    ),
    tensors=(
        _dims("feed_forward.experts.gate_up_proj", {0: _LOCAL_EXPERTS, 2: (_WIDTH, _WIDTH)}),
        _dims("feed_forward.experts.down_proj", {0: _LOCAL_EXPERTS, 1: _WIDTH}),
        *_router("feed_forward.router", _LOCAL_EXPERTS),
        *_gated("feed_forward.{module:shared_expert}", _WIDTH),
        *_gated("feed_forward", "intermediate_size_mlp"),
        *_ATTENTION,
    ),
    experts=("", _LOCAL_EXPERTS),
)


def _encoder(
    *models: str, attention: str, heads: Heads, refused: Mapping[str, str], layers: Layers
) -> Architecture:
    tensors = (
        _dims("crossattention.output.dense.{kind:weight|bias}", {}),
        _writes(f"attention.{attention}.{{name:query|key|value}}", _HEAD),
        *_reads("attention.output.dense", _HEAD),
        _writes("intermediate.dense", _WIDTH),
        *_reads("output.dense", _WIDTH),
    )
    return Architecture(models, layers, tensors, heads=heads, refused=refused)


_ENCODER_LAYERS = Layers(_list("encoder.layer", "num_hidden_layers"))
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
    _decoder("qwen2", "qwen3", layers=_typed(f"{_QWEN_WINDOW}layer >= {_FULL_ONES}", "max_window_layers")),
    _decoder("gemma2", layers=_typed("(layer + 1) % 2"), heads=_EVEN),
    _decoder(
        "gemma3_text",
        layers=_typed("(layer + 1) % (config.sliding_window_pattern or 6)", "sliding_window_pattern"),
        heads=_EVEN,
    ),
    _decoder(
        "phi3",
        tensors=(
            _dims("mlp.gate_up_proj.weight", {0: (_WIDTH, _WIDTH)}),
            _dims("mlp.down_proj.weight", {1: _WIDTH}),
            _dims("self_attn.qkv_proj.weight", {0: (_HEAD, _KV_HEAD, _KV_HEAD)}),
            _dims("self_attn.o_proj.weight", {1: _HEAD}),
        ),
        heads=Heads(HEADS, KV_HEADS, pinned=_PINNED, sized=("rope_scaling", "rope_parameters")),
    ),
    _GPT2,
    _decoder(
        "mixtral",
        tensors=(
            *_gated("block_sparse_moe.experts.{expert}", _WIDTH, ("{name:w1|w3}", "w2")),
            *_router("block_sparse_moe.gate", _LOCAL_EXPERTS),
            *_ATTENTION,
        ),
        experts=("block_sparse_moe.experts", _LOCAL_EXPERTS),
    ),
    _qwen_moe(
        "qwen2_moe",
        _typed(
            f"(config.use_sliding_window or 0) and (layer + 1) % 2 and layer < {_FULL_ONES}",
            "max_window_layers",
        ),
        *_gated("mlp.shared_expert", "shared_expert_intermediate_size"),
    ),
    _qwen_moe("qwen3_moe", Layers(_LAYERS)),
    _DEEPSEEK,
    _decoder(
        "gpt_oss",
        layers=_typed("(layer + 1) % 2"),
        tensors=(
            _dims("mlp.experts.gate_up_proj", {0: _LOCAL_EXPERTS, 2: DimPart(_WIDTH, "2")}),
            _dims("mlp.experts.gate_up_proj_bias", {0: _LOCAL_EXPERTS, 1: DimPart(_WIDTH, "2")}),
            _dims("mlp.experts.down_proj", {0: _LOCAL_EXPERTS, 1: _WIDTH}),
            _dims("mlp.experts.down_proj_bias", {0: _LOCAL_EXPERTS}),
            *_router("mlp.router", _LOCAL_EXPERTS),
            *_ATTENTION,
        ),
        experts=("", _LOCAL_EXPERTS),
    ),
    _LLAMA4,
    _encoder(
        *("bert", "roberta", "xlm-roberta"),
        attention="self",
        heads=Heads(HEADS),
        refused={HEADS: _BERT_HEADS},
        layers=replace(_ENCODER_LAYERS, refused={"num_hidden_layers": _BERT_LAYERS}),
    ),
    _encoder(
        "vit", attention="attention", heads=Heads(HEADS, pinned=_PINNED), refused={}, layers=_ENCODER_LAYERS
    ),
)


def model_types() -> tuple[str, ...]:
    """All model types in the table."""
    return tuple(model for architecture in ARCHITECTURES for model in architecture.models)


def architecture_of(model_type: object) -> Architecture | None:
    """The architecture of a model type, None for an unknown one."""
    return next((each for each in ARCHITECTURES if model_type in each.models), None)
