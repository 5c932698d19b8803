"""The table of architectures: which keys of config.json count the units of structures, by model type.

Data: the keys that mean the same in most configs, and one row for model types that need more, or refuse. A
model type is in a row only if removal was shown to load. Called by the rest of removal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

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
SIDES = ("decoder", "encoder")
SIDED_LAYERS = ("{side}_layers", "num_{side}_layers", "{side}_num_hidden_layers")

# Keys beside a tower's config that name the layer whose output is used.
TAPS = ("vision_feature_layer", "vision_feature_layers")
# Lists with an entry for each layer.
BY_PLACE = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "activation_sparsity_pattern"),
    *("intermediate_size", "attention_layers", "hybrid_layer_pattern"),
)


class Layers(Struct, frozen=True):
    """What is particular about layers that go; where a config refers to layers by number, and must change.

    A removed layer is skipped. `skipped` says what else than adding to its input a layer does, if
    `skipped_where` is true, so that a masked layer is not skipped.

    `by_place`: lists with an entry for each layer, of encoders and decoders those of one `side`.
    `by_number`: lists of numbers of layers. `up_to`: counts of the first layers, with the default. `beyond`:
    the count of layers behind those that the key counts. `implied`: what the class derives where there is no
    list, an expression over `layer`; for a list of numbers it says whether the layer is in it. `settled`: a
    rule besides the list puts layers into it, and these values turn the rule off. `rules`: keys from which
    the class derives a list; they get a value that still derives it, or are removed. `by_key`: objects with
    an entry for numbers of layers. `derived` keys are taken out, since the class makes them anew. `kinds`:
    what the class derives of a layer without any list, an expression over `layer` and `layers`, and the keys
    that may get other values for it. `cycled`: lists of kinds that begin anew where layers are left, with the
    default. `by_root`: keys that the class divides by the root of the number of layers, with the default.
    `packed`: modules beside the list of which a dimension has a part for each layer.

    Of a list in `needs`, or of kinds, some layer has this entry, in `last` the last one; one in `needs_any`
    names some layer. `first` says why the first layer has to stay. Layers that lists in `taken` name have to
    stay, and as many first ones as a list `feeding` beside the section has entries. No layer can be removed
    where a `refused` key is set, with the reason.
    """

    by_place: tuple[str, ...] = BY_PLACE
    side: str = ""
    by_number: tuple[str, ...] = ()
    by_key: tuple[str, ...] = ("per_layer_config",)
    up_to: Mapping[str, int] = {}
    implied: Mapping[str, str] = {}
    beyond: str = ""
    settled: Mapping[str, int] = {}
    rules: Mapping[str, str] = {}
    needs: Mapping[str, str] = {}
    needs_any: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    refused: Mapping[str, str] = {}
    skipped: str = ""
    skipped_where: str = "True"
    kinds: Mapping[str, tuple[str, ...]] = {}
    last: Mapping[str, str] = {}
    first: str = ""
    taken: tuple[str, ...] = ()
    feeding: str = ""
    by_root: Mapping[str, float] = {}
    cycled: Mapping[str, tuple[str, ...]] = {}
    packed: Mapping[str, int] = {}


class Hidden(Struct, frozen=True):
    """What a class computes from the hidden size, or adds to the weights of norms.

    Norms multiply by their weights plus `offset`. Embeddings are multiplied by the root of the hidden size
    where the expression `embeddings` is true, and what the head reads is divided by it where `divided` is:
    the `last` norm makes up for it. `keys` change in proportion. `shared`: norms of small values elsewhere
    have the same epsilon, which stays.
    """

    offset: float = 0.0
    embeddings: str = "False"
    divided: str = "False"
    last: str = "model.norm.weight"
    keys: tuple[str, ...] = ()
    shared: bool = False


class Architecture(Struct, frozen=True):
    """Model types whose configs are alike, and what is particular about them.

    `refused` says why a structure ("mlp", "heads", "experts", "layers", "hidden") cannot change;
    `refused_where` a key is set. `tied` says why attentions whose names hold a text keep the same heads in
    all layers of a stack. `pinned`: keys that are written out when heads or the hidden size change,
    expressions for what the class would else derive from them. The number of heads must divide the key
    `divides`; the class checks lists in `sized` by it. `alike` keys take the value of another. `values` are
    expressions for keys that a config may omit. `widths` name the key for modules whose names hold a text.
    `groups`: a router's groups of experts of one size, of which `serving` serve and each needs the `best`.
    Classes of `kin` compute the same with these values of their own keys, unless one of `unlike` is set, or
    the config has none of some keys in `told`, for which the classes have unlike defaults. `settled` keys get
    a value when channels go. `wide_norms` are modules of norms over all heads of a layer or all channels of
    an MLP.
    """

    models: tuple[str, ...]
    layers: Layers = Layers()
    refused: Mapping[str, str] = {}
    refused_where: Mapping[str, tuple[str, str]] = {}
    tied: Mapping[str, str] = {}
    pinned: Mapping[str, str] = {}
    divides: str | None = None
    sized: tuple[str, ...] = ()
    alike: Mapping[str, str] = {}
    values: Mapping[str, str] = {}
    widths: Mapping[str, str] = {}
    groups: str | None = None
    serving: str | None = None
    best: int = 1
    kin: Mapping[str, Mapping[str, object]] = {}
    unlike: tuple[str, ...] = ()
    told: tuple[tuple[str, ...], ...] = ()
    settled: Mapping[str, bool] = {}
    hidden: Hidden = Hidden()
    wide_norms: tuple[str, ...] = ()


_HEAD_DIM = "config.head_dim or config.hidden_size // config.num_attention_heads"
_PINNED = {"head_dim": _HEAD_DIM}
_SIDED_HEAD_DIM = {
    "head_dim": "config.head_dim or (config.hidden_size // config.encoder_num_attention_heads"
    " if config.encoder_num_attention_heads == config.decoder_num_attention_heads else None)"
}
_KV = {"num_key_value_heads": "config.num_key_value_heads or config.num_attention_heads"}
_SLIDING = "'sliding_attention' if {} else 'full_attention'"
_QWEN_WINDOW = "(config.use_sliding_window or 0) and not (config.sliding_window == None or 0) and "
# A key that may be 0, or 28 where there is none.
_FULL_ONES = "(config.max_window_layers if (config.max_window_layers >= 0 or 0) else 28)"

# -- reasons -----------------------------------------------------------------------------------------

SUBTRACTED = "its norms subtract the mean of all hidden channels, which is another one of fewer"
_BARE_NORM = "its norms have no weights that could make up for fewer channels"
_EXPANDED = "the class derives the width of state space layers from the hidden size"
_AS_SCALE = "the class scales other weights by the hidden size"
DERIVED = "the class derives the size of a head from the hidden size, so that fewer heads are larger"
_SQUARE = "what reads heads is as wide as the hidden size, whatever the config says of heads"
_POST_NORM = "end in a norm"
_BIASES = {"SelfAttention": "the position biases of the first layer are those of all, head by head"}
_FOURFOLD = "the class makes them four times as many as hidden channels, whatever the config says"
_STAGES = "they differ from stage to stage, and one ratio or the class itself counts them"
_SHARED = "the last layers share keys and values of earlier ones"
_FIRST_WIDENS = "the first layer of a stage changes its size"
_FIRST_BIASES = "the first layer has the position biases of all"


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
    needs={"layer_types": "full_attention"},
)
_QWEN2_MOE_TYPES = _typed(
    f"(config.use_sliding_window or 0) and (layer + 1) % 2 and layer < {_FULL_ONES}", "max_window_layers"
)
_HYBRID = Layers(needs={"layer_types": "full_attention"})
_BACKBONE = Layers(derived=("stage_names", "out_features", "out_indices"))
_SCALED = Layers(skipped="scale what they pass on")
_POST_NORMED = Layers(skipped=_POST_NORM)
_STABLE = Layers(skipped=_POST_NORM, skipped_where="not (config.do_stable_layer_norm or 0)")
_WINDOWED = Layers(skipped=_POST_NORM, by_place=("attention_window",))
_PAIRS = Layers(kinds={"layer % 2": ()})  # windows shift in every other layer of a stage
_BIASED = Layers(first=_FIRST_BIASES)
_HEADS = {"heads": DERIVED}
_PLUS_ONE = Hidden(offset=1.0, shared=True)
_GEMMA = Hidden(offset=1.0, embeddings="True")
_T5 = Hidden(divided="True", last="decoder.final_layer_norm.weight")

# -- what is derived from the number of a layer ------------------------------------------------------

_FED = Layers(feeding="vision_config.deepstack_visual_indexes")
_ERNIE_EXPERTS = {
    "(layer + 1) % (config.moe_layer_interval or 1) == 0"
    " and layer >= (config.moe_layer_start_index if (config.moe_layer_start_index >= 0 or 0) else 1)"
    " and layer <= (config.moe_layer_end_index if (config.moe_layer_end_index >= 0 or 0) else layers - 1)": (
        *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
    )
}
_AT = "('{}' if layer % {period} == {offset} else 'other') if {offset} < {period} else 'refused'"
_JAMBA_ATTENTION = _AT.format(
    "full_attention",
    period="(config.attn_layer_period or 8)",
    offset="(config.attn_layer_offset if (config.attn_layer_offset >= 0 or 0) else 4)",
)
_JAMBA_EXPERTS = _AT.format(
    "experts",
    period="(config.expert_layer_period or 2)",
    offset="(config.expert_layer_offset if (config.expert_layer_offset >= 0 or 0) else 1)",
)
_SWITCH_STEP = (
    "(config.{side}_sparse_step if (config.{side}_sparse_step >= 0 or 0)"
    " else layers // config.num_sparse_{side}_layers if (config.num_sparse_{side}_layers or 0) else layers)"
)
_SWITCH_EXPERTS = {
    f"{_SWITCH_STEP} > 0 and ({_SWITCH_STEP} == 1 or layer % {_SWITCH_STEP} == 1)": ("{side}_sparse_step",)
}
_NLLB_STEP = "(config.{side}_sparse_step if (config.{side}_sparse_step >= 0 or 0) else 4)"
_NLLB_EXPERTS = {f"{_NLLB_STEP} > 0 and (layer + 1) % {_NLLB_STEP} == 0": ("{side}_sparse_step",)}

ARCHITECTURES: tuple[Architecture, ...] = (
    # Decoders with grouped heads of a size of their own.
    _grouped(
        "mistral ministral ministral3 glm glm4 seed_oss arcee apertus cwm",
        "jais2 nemotron granite granitemoe granitemoeshared eurobert ernie4_5 hunyuan_v1_dense",
        "phi hunyuan_v1_moe phimoe starcoder2 t5_gemma_module falcon_h1",
        "aria_text mixtral qwen2_5_omni_text",
    ),
    _grouped(
        "llama",
        divides="hidden_size",
        kin={"mistral": {"sliding_window": None}},
        unlike=("attention_bias", "mlp_bias"),
    ),
    _grouped("cohere cohere2", refused={"hidden": SUBTRACTED}),
    _grouped("olmo nanochat", refused={"hidden": _BARE_NORM}),
    _grouped("qwen3_5_text", layers=_HYBRID, hidden=_PLUS_ONE),
    _grouped("gemma vaultgemma", hidden=_GEMMA),
    _grouped("qwen2 qwen3", layers=_typed(f"{_QWEN_WINDOW}layer >= {_FULL_ONES}", "max_window_layers")),
    _row("qwen2_vl_text qwen2_5_vl_text glm4v_text", refused=_HEADS),
    _grouped("qwen3_vl_text qwen3_vl_moe_text", layers=_FED),
    _grouped("gemma2", layers=_typed("(layer + 1) % 2"), divides="hidden_size", hidden=_GEMMA),
    _grouped(
        "gemma3_text",
        layers=_typed("(layer + 1) % (config.sliding_window_pattern or 6)", "sliding_window_pattern"),
        divides="hidden_size",
        hidden=_GEMMA,
    ),
    _grouped("phi3", sized=("rope_scaling", "rope_parameters")),
    _grouped(
        "smollm3",
        layers=Layers(
            implied={"no_rope_layers": "(layer + 1) % (config.no_rope_layer_interval or 4) != 0"},
            rules={"no_rope_layer_interval": "no_rope_layers"},
        ),
    ),
    _grouped("exaone4", layers=Layers(derived=("sliding_window_pattern",))),
    _grouped("ernie4_5_moe", layers=Layers(kinds=_ERNIE_EXPERTS)),
    _grouped("granitemoehybrid", layers=_HYBRID, refused={"hidden": _EXPANDED}),
    _grouped(
        "bamba",
        layers=Layers(by_number=("attn_layer_indices",), needs_any=("attn_layer_indices",)),
        refused={"hidden": _EXPANDED},
    ),
    _grouped(
        "lfm2",
        settled={"block_auto_adjust_ff_dim": False},
        layers=Layers(by_number=("full_attn_idxs",), needs={"layer_types": "full_attention"}),
    ),
    _grouped("lfm2_moe", layers=replace(_HYBRID, up_to={"num_dense_layers": 2})),
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
    _grouped("qwen3_next qwen3_5_moe_text", layers=_SPARSE, hidden=_PLUS_ONE),
    _grouped("qwen3_omni_moe_text", layers=replace(_SPARSE, feeding=_FED.feeding)),
    _grouped(
        "glm4_moe dots1 exaone_moe solar_open",
        layers=Layers(beyond="num_nextn_predict_layers", up_to={"first_k_dense_replace": 3}),
        groups="n_group",
        serving="topk_group",
        best=2,
    ),
    _grouped(
        "gemma4_text",
        layers=Layers(
            skipped=_SCALED.skipped,
            refused={"num_kv_shared_layers": _SHARED},
            implied={"layer_types": _SLIDING.format("(layer + 1) % 6")},
            last={"layer_types": "full_attention"},
            packed={"embed_tokens_per_layer": 1, "per_layer_model_projection": 0},
        ),
        refused={"hidden": _AS_SCALE},
    ),
    _grouped(
        "gemma3n_text",
        refused={
            "mlp": "the activation keeps a share of all channels of a layer",
            "layers": _SHARED,
        },
    ),
    _grouped(
        "afmoe",
        hidden=Hidden(embeddings="config.mup_enabled or False"),
        layers=Layers(up_to={"num_dense_layers": 1}),
    ),
    _grouped("doge", layers=_SCALED),
    _grouped(
        "minimax",
        refused={
            "heads": "layers of linear attention have decays of each head",
            "layers": "the decay of attention depends on a layer's number",
        },
    ),
    _grouped("minimax_m2 olmo2 olmo3 flex_olmo", wide_norms=("q_norm", "k_norm")),
    _grouped("olmoe", refused=_HEADS),
    _grouped(
        "jamba",
        layers=Layers(
            kinds={
                _JAMBA_ATTENTION: ("attn_layer_offset", "attn_layer_period"),
                _JAMBA_EXPERTS: ("expert_layer_offset", "expert_layer_period"),
            },
            needs={_JAMBA_ATTENTION: "full_attention"},
        ),
        refused={"hidden": _EXPANDED},
    ),
    _grouped(
        "nemotron_h",
        hidden=Hidden(shared=True),
        layers=Layers(needs={"layers_block_type": "full_attention"}),
    ),
    _grouped(
        "recurrent_gemma",
        refused={
            "mlp": "intermediate_size counts gate and up together",
            "heads": "states of the recurrence are as wide as all heads",
        },
        layers=Layers(
            cycled={"block_types": ("recurrent", "recurrent", "attention")},
            needs={"block_types": "attention"},
        ),
    ),
    _grouped(
        "diffllama",
        refused={
            "layers": "the scale of attention depends on a layer's number",
        },
    ),
    # Latent keys and values.
    _row(
        "deepseek_v3 glm4_moe_lite",
        layers=Layers(beyond="num_nextn_predict_layers", up_to={"first_k_dense_replace": 3}),
        alike={"num_key_value_heads": "num_attention_heads"},
        groups="n_group",
        serving="topk_group",
        best=2,
    ),
    _row(
        "deepseek_v2",
        layers=Layers(up_to={"first_k_dense_replace": 0}),
        alike={"num_key_value_heads": "num_attention_heads"},
        groups="n_group",
        serving="topk_group",
    ),
    _row(
        "minicpm3",
        hidden=Hidden(keys=("dim_model_base",)),
        alike={"num_key_value_heads": "num_attention_heads"},
        layers=Layers(by_root={"scale_depth": 1.4}),
    ),
    _row(
        "longcat_flash",
        alike={"num_key_value_heads": "num_attention_heads"},
        refused={
            "mlp": "experts that do nothing stand in the list of experts",
            "experts": "experts that do nothing are counted besides",
            "hidden": _AS_SCALE,
        },
    ),
    # Decoders whose heads are as large as the hidden size and their number say.
    _row(
        "gpt2",
        refused=_HEADS,
        values={"n_inner": "config.n_inner or 4 * config.n_embd"},
        layers=Layers(
            refused={"scale_attn_by_inverse_layer_idx": "the scale of attention depends on a layer's number"}
        ),
    ),
    _row(
        "gptj codegen gpt_bigcode", refused=_HEADS, values={"n_inner": "config.n_inner or 4 * config.n_embd"}
    ),
    _row(
        "gpt_neo", refused=_HEADS, layers=Layers(by_place=("attention_layers",), derived=("attention_types",))
    ),
    _row("gpt_neox persimmon stablelm falcon biogpt xglm", refused=_HEADS),
    _grouped(
        "helium",
        refused=dict.fromkeys(("heads", "hidden"), _SQUARE),
        kin={"ernie4_5": {"use_bias": False}},
        unlike=("attention_bias", "mlp_bias"),
        told=(
            *(("head_dim",), ("num_key_value_heads",), ("rms_norm_eps",), ("tie_word_embeddings",)),
            ("rope_parameters", "rope_theta"),
        ),
    ),
    _row(
        "opt",
        refused=_HEADS,
        layers=Layers(skipped=_POST_NORM, skipped_where="(config.do_layer_norm_before == 0 or 0)"),
    ),
    _row("bloom mpt", refused={"mlp": _FOURFOLD, "heads": DERIVED}),
    _row("openai-gpt", refused={"mlp": _FOURFOLD, "heads": DERIVED}, layers=_POST_NORMED),
    _row("dbrx", refused=_HEADS),
    _grouped(
        "bitnet",
        wide_norms=("ffn_sub_norm",),
        refused=dict.fromkeys(("heads", "hidden"), "a norm of all heads is as wide as the hidden size"),
    ),
    _row("jetmoe"),
    _row("ctrl", refused=_HEADS, widths={"h.": "dff"}),
    _row("mamba falcon_mamba"),
    _row("mamba2", refused={"hidden": _EXPANDED}),
    _row("rwkv", layers=Layers(first="the first layer has the norm behind the embeddings")),
    _row(
        "zamba2",
        refused={
            "mlp": "layers share it, with adapters of their own",
            "heads": "layers share them, with adapters of their own",
            "layers": "layers share attention, and lists say by number where it stands",
        },
    ),
    # Encoders.
    _row(
        "bert roberta xlm-roberta camembert electra ernie rembert roformer mpnet distilbert deberta",
        "mobilebert xlnet blip_text_model",
        refused=_HEADS,
        layers=_POST_NORMED,
    ),
    _row("deberta-v2", refused={"heads": _SQUARE}, layers=_POST_NORMED),
    _row("longformer", refused=_HEADS, layers=_WINDOWED),
    _row(
        "albert", refused={"heads": DERIVED, "layers": "they share the weights of one, or of one in a group"}
    ),
    _grouped("nomic_bert", layers=_POST_NORMED),
    _row("esm", refused=_HEADS, layers=Layers(packed={"contact_head.regression": 1})),
    _row(
        "modernbert",
        refused=_HEADS,
        layers=Layers(
            implied={"layer_types": _SLIDING.format("layer % (config.global_attn_every_n_layers or 3)")},
            rules={"global_attn_every_n_layers": "layer_types"},
            first="the first layer alone has no norm before attention",
        ),
    ),
    # Encoders and decoders.
    _row("t5", tied=_BIASES, layers=_BIASED, hidden=_T5),
    _row("mt5", tied=_BIASES, layers=_BIASED),
    _row("umt5", hidden=_T5),
    _row(
        "switch_transformers",
        tied=_BIASES,
        layers=Layers(kinds=_SWITCH_EXPERTS, first=_FIRST_BIASES),
        hidden=_T5,
    ),
    _row("mbart pegasus blenderbot m2m_100 whisper speech_to_text", refused=_HEADS),
    _grouped("moonshine", pinned=_SIDED_HEAD_DIM),
    _row("bart marian", refused=_HEADS, layers=_POST_NORMED),
    _row("led", refused=_HEADS, layers=replace(_WINDOWED, side="encoder")),
    _row("nllb-moe", refused=_HEADS, layers=Layers(kinds=_NLLB_EXPERTS)),
    # Pictures and sound.
    _row("vit deit ijepa vit_msn", pinned=_PINNED),
    _row("beit", pinned=_PINNED, layers=_BACKBONE),
    _row(
        "dinov2",
        pinned=_PINNED,
        layers=_BACKBONE,
        refused_where={
            "use_swiglu_ffn": ("mlp", "the class makes them two thirds of what the ratio says, in eights")
        },
    ),
    _row("dinov3_vit", refused=_HEADS, layers=_BACKBONE),
    _row("siglip_vision_model clip_vision_model clip_text_model siglip_text_model", refused=_HEADS),
    _row("idefics3_vision smolvlm_vision internvl_vision pixtral blip_vision_model", refused=_HEADS),
    _row(
        "llama4_vision_model",
        refused={"mlp": "what joins the tower to the text model is as wide", "heads": DERIVED},
    ),
    _row("qwen2_vl_vision qwen2_5_vl_vision qwen2_5_omni_vision_encoder", refused=_HEADS),
    _row("qwen3_5_vision qwen3_5_moe_vision", refused=_HEADS),
    _row(
        "qwen3_vl_vision qwen3_vl_moe_vision qwen3_omni_moe_vision_encoder",
        refused=_HEADS,
        layers=Layers(taken=("deepstack_visual_indexes",)),
    ),
    _row("mllama_text_model", refused=_HEADS, layers=Layers(by_number=("cross_attention_layers",))),
    _row("mllama_vision_model", refused={"heads": DERIVED, "layers": "outputs of numbered layers are used"}),
    _row("glm4v_vision", refused={"mlp": "they are as many as the text model is wide", "heads": DERIVED}),
    _row("swin swinv2", refused=_HEADS, layers=_PAIRS),
    _row("segformer pvt_v2", refused={"mlp": _STAGES, "heads": DERIVED}),
    _row("hiera", refused={"mlp": _STAGES, "heads": DERIVED}, layers=Layers(first=_FIRST_WIDENS)),
    _row("convnext convnextv2", refused={"mlp": _STAGES}),
    _row("resnet", layers=Layers(first=_FIRST_WIDENS)),
    _row("wav2vec2 hubert", refused=_HEADS, layers=_STABLE),
    _row("wavlm", refused=_HEADS, layers=replace(_STABLE, first=_FIRST_BIASES)),
    _row("wav2vec2-bert wav2vec2-conformer", refused=_HEADS, layers=_POST_NORMED),
    _grouped("parakeet_encoder", layers=_POST_NORMED),
    _row("qwen2_5_omni_audio_encoder qwen3_omni_moe_audio_encoder", refused=_HEADS),
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
    keys: set[str | None] = {
        layers.beyond,
        *layers.by_place,
        *layers.by_number,
        *layers.by_key,
        *layers.taken,
    }
    keys.update(layers.up_to, layers.settled, layers.rules, layers.refused, layers.implied, layers.by_root)
    keys.update(layers.cycled)
    keys.update(key.format(side=side) for of in layers.kinds.values() for key in of for side in SIDES)
    keys.update((f"_{rule}" for rule in layers.rules), architecture.values, architecture.pinned)
    keys.update(architecture.alike, architecture.widths.values(), architecture.settled)
    keys.update((architecture.divides, architecture.groups, architecture.serving))
    return frozenset(key for key in keys if key)
