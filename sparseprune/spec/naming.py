"""How checkpoints name the parts of a layer: the naming schemes of MLPs, attention, experts and layers.

Data, one row a scheme, of whichever model; a new one is a new row. Knows no shapes and no config. Read by
structures, and through it by shipped specs, coverage, calibration and removal.
"""

from __future__ import annotations

import re

from msgspec import Struct


class MlpNames(Struct, frozen=True):
    """Modules of one MLP: `writes` have its channels as outputs, `reads` has them as inputs.

    A fused matrix writes twice as many, gate and up. `beside` are modules with a row for each channel between
    them, such as depthwise convolutions. `flat`: all matrices have the channels of all experts as rows.
    """

    writes: tuple[str, ...]
    reads: str
    beside: tuple[str, ...] = ()
    flat: bool = False


class AttentionNames(Struct, frozen=True):
    """Modules of one attention: queries, keys and values, separate or one `fused`, and what reads heads.

    `latent`: keys and values come from one matrix with the same heads as the queries. Without the module
    `missing` keys are values, too.
    """

    queries: tuple[str, ...] = ()
    fused: str = ""
    output: str = "o_proj"
    latent: bool = False
    missing: str = ""


def _mlp(writes: str, reads: str, beside: str = "") -> MlpNames:
    return MlpNames(tuple(writes.split()), reads, tuple(beside.split()))


MLPS: tuple[MlpNames, ...] = (
    _mlp("gate_proj up_proj", "down_proj", "ffn_sub_norm"),  # Llama and most decoders since; BitNet
    _mlp("gate_up_proj", "down_proj"),  # Phi-3, GLM-4, stacks of experts
    _mlp("up_proj", "down_proj"),  # Nemotron, MPT, Arcee, DINOv3
    _mlp("w1 w3", "w2"),  # Mixtral, LFM2
    _mlp("w1 v1", "w2"),
    MlpNames(("w1", "v1"), "w2", flat=True),  # DBRX
    _mlp("w12", "w3"),  # DINOv2 with SwiGLU
    _mlp("weights_in", "weights_out"),
    _mlp("w1", "w2"),
    _mlp("fc11 fc12", "fc2"),  # Nomic
    _mlp("fc1_g fc1_x", "fc2"),
    _mlp("fc1", "fc2", "dwconv.dwconv"),  # OPT, BART, Whisper, CLIP, SigLIP, Phi; PVT
    _mlp("fc_in", "fc_out"),  # GPT-J, CodeGen
    _mlp("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon, Persimmon
    _mlp("c_fc", "c_proj"),  # GPT-2 (inputs first), GPT-Neo, Starcoder2
    _mlp("c_fc_0 c_fc_1", "c_proj"),  # EXAONE
    _mlp("w1 w2", "c_proj"),
    _mlp("lin1", "lin2"),  # DistilBERT, XLM, SAM
    _mlp("wi_0 wi_1", "wo"),  # T5 1.1, mT5, UMT5
    _mlp("wi", "wo"),  # T5, Switch
    _mlp("Wi", "Wo"),  # ModernBERT
    _mlp("intermediate.dense", "output.dense"),  # BERT and its kin, ViT, BEiT, Swin
    _mlp("intermediate_dense", "output_dense"),  # wav2vec 2.0
    _mlp("ffn", "ffn_output"),  # ALBERT
    _mlp("ffn.0", "ffn.2"),  # CTRL
    _mlp("linear_fc1", "linear_fc2"),  # Qwen3-VL's tower
    _mlp("linear1", "linear2"),  # Parakeet and other conformers
    _mlp("linear_1", "linear_2"),
    _mlp("layer_1", "layer_2"),  # XLNet
    _mlp("pwconv1", "pwconv2"),  # ConvNeXt
    _mlp("dense1", "dense2", "dwconv.dwconv"),  # SegFormer
    _mlp("input_linear", "output_linear"),  # Granite's mixtures, JetMoE
    _mlp("proj_1", "proj_2"),  # OpenELM
    _mlp("proj_in", "proj_out"),
    _mlp("up", "down"),
    _mlp("key", "value"),  # RWKV, only where MLP_KEY_VALUE matches
    _mlp("ffn_layer_1", "ffn_layer_2"),
)
ATTENTION_EXPERTS = re.compile(r"(?:attn|attention)\.experts$")  # of JetMoE, whose experts are heads
MLP_KEY_VALUE = re.compile(r"feed_forward$")  # elsewhere key and value are parts of attention

MERGERS = re.compile(r"merger|projector|connector|resampler")  # what joins towers is no layer
ATTACHED = re.compile(r"(?:^|\.)head\.mlp$")  # behind the layers of SigLIP, with as many channels

ATTENTIONS: tuple[AttentionNames, ...] = (
    AttentionNames(("q_b_proj", "kv_b_proj"), latent=True),  # DeepSeek
    AttentionNames(("q_proj", "kv_b_proj"), latent=True),
    *(
        AttentionNames(("q_proj", "k_proj", "v_proj"), output=name)
        for name in ("o_proj", "out_proj", "dense", "proj")
    ),
    AttentionNames(("q_proj", "k_proj", "v_proj"), output="projection_layer"),
    AttentionNames(("q_proj", "k_proj"), missing="v_proj"),  # full attention of Gemma 4
    AttentionNames(("self.query", "self.key", "self.value"), output="output.dense"),  # BERT
    AttentionNames(("self.query_proj", "self.key_proj", "self.value_proj"), output="output.dense"),  # DeBERTa
    AttentionNames(("attention.query", "attention.key", "attention.value"), output="output.dense"),  # ViT
    AttentionNames(("attention.query", "attention.key", "attention.value"), output="attention.dense"),
    AttentionNames(("query", "key", "value"), output="dense"),  # ALBERT
    AttentionNames(("query", "key", "value"), output="projection"),
    AttentionNames(("query", "key", "value"), output="proj"),  # PVT
    AttentionNames(
        ("longformer_self_attn.query", "longformer_self_attn.key", "longformer_self_attn.value"),
        output="output",
    ),
    AttentionNames(("Wq", "Wk", "Wv"), output="dense"),  # CTRL
    AttentionNames(("q_lin", "k_lin", "v_lin"), output="out_lin"),  # DistilBERT, XLM
    AttentionNames(("q", "k", "v"), output="o"),  # T5, MPNet
    AttentionNames(("attn.q", "attn.k", "attn.v"), output="attn.o"),
    AttentionNames(("linear_q", "linear_k", "linear_v"), output="linear_out"),  # conformers
    AttentionNames(("wq", "wk", "wv"), output="wo"),
    AttentionNames(("to_q", "to_k", "to_v"), output="to_out.0"),
    *(AttentionNames(fused="qkv_proj", output=name) for name in ("o_proj", "out_proj", "proj")),  # Phi-3
    AttentionNames(fused="c_attn", output="c_proj"),  # GPT-2, GPT-BigCode
    AttentionNames(fused="query_key_value", output="dense"),  # GPT-NeoX, BLOOM, Falcon, Persimmon
    AttentionNames(fused="Wqkv", output="out_proj"),  # MPT, DBRX, Nomic
    AttentionNames(fused="Wqkv", output="Wo"),  # ModernBERT
    AttentionNames(fused="qkv", output="proj"),  # towers of Qwen-VL
    AttentionNames(fused="qkv", output="projection"),
    AttentionNames(fused="self.in_proj", output="output.dense"),  # DeBERTa 1
)
# Modules beside them whose outputs are all query heads: gates, positions, attention to the whole text.
HEAD_ROWS = (
    *("gate_proj", "output_gate", "relative_k_proj", "linear_pos", "self.pos_proj", "self.pos_q_proj"),
    *("self.query_global", "self.key_global", "self.value_global"),
    *(f"longformer_self_attn.{name}_global" for name in ("query", "key", "value")),
)

# Where a fused matrix holds queries, keys and values: "parts" one behind the other, "heads" each head's three
# side by side, "groups" each key/value head's queries with its key and value. By the model type where the
# names do not tell; None: in an order of its own.
FUSED_LAYOUTS: dict[str, str | None] = {
    "gpt_neox": "heads",
    "gpt_neox_japanese": "heads",
    "bloom": "heads",
    "persimmon": "heads",
    "fuyu": "heads",
    "deberta": "heads",
    "minimax": "heads",
    "falcon": "groups",
    "gpt_bigcode": "groups",
    "codegen": None,
}
NAMED_LAYOUTS = {"query_key_value": "heads"}  # of model types that are not in the table; others are parts

# Matrices with a dimension of heads in the middle, of inputs and outputs, or of outputs and inputs (XLNet).
HEADS_WRITTEN = re.compile(r"\.rel_attn\.[qkvr]$")
HEADS_READ = re.compile(r"\.rel_attn\.o$")

# Model types whose matrices have their inputs first, unlike torch's linear layers, where shapes do not tell.
INPUTS_FIRST = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
STACKS_INPUTS_FIRST = ("gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text", "aria_text")
INTERLEAVED = frozenset({"gpt_oss"})  # rows of gate and up take turns in a fused matrix

# Gated delta nets (Qwen3-Next, Qwen3.5): what a tensor has of each key head and of its own value heads: rows
# of keys (k), of values (v), or one of each value head (n). Parts lie one behind the other; what is written
# together lies side by side, head by head.
DELTA_NETS = re.compile(r"(?:^|\.)linear_attn$")
DELTA_INPUTS: dict[str, str] = {
    "in_proj_qkvz.weight": "kkvv",
    "in_proj_ba.weight": "nn",
    "in_proj_qkv.weight": "k k v",
    "in_proj_z.weight": "v",
    "in_proj_b.weight": "n",
    "in_proj_a.weight": "n",
    "q_proj.weight": "k",
    "k_proj.weight": "k",
    "v_proj.weight": "v",
    "g_proj.weight": "v",
    "b_proj.weight": "n",
    "a_proj.weight": "n",
    "conv1d.weight": "k k v",
    "A_log": "n",
    "dt_bias": "n",
}
DELTA_READS = ("out_proj", "o_proj")
# Keys of the config that count the heads, and that tell the size of one.
DELTA_KEYS = ("linear_num_key_heads", "linear_key_head_dim")
DELTA_VALUES = ("linear_num_value_heads", "linear_value_head_dim")

# Vectors with as many elements as all query heads, or as all key/value heads; or with a row for each head.
QUERY_VECTORS = ("q_norm.weight", "self.q_bias", "attn_sub_norm.weight")
KEY_VECTORS = ("k_norm.weight", "self.v_bias")
# What has one element, row or column for each key/value head, or the rows of its values.
EACH_KEY_HEAD = (("A", 0), ("dt_proj.weight", 0), ("dt_proj.weight", 1), ("dt_proj.bias", 0))  # Doge
# What has one element or row for each query head, in this dimension.
EACH_HEAD = (
    *(("sinks", 0), ("bias_u", 0), ("bias_v", 0), ("pos_bias_u", 0), ("pos_bias_v", 0)),
    *(("relative_attention_bias.weight", 1), ("self.relative_position_bias_table", 1)),
)
HEAD_NORMS = ("q_norm", "query_norm", "q_layernorm", "query_layernorm", "k_norm", "k_layernorm")

# Keys of a config that count heads, or tell the size of one, in the order in which they are believed.
HEAD_COUNTS = (
    "num_attention_heads",
    "n_head",
    "num_heads",
    "n_heads",
    "attention_heads",
    "encoder_attention_heads",
)
HEAD_SIZES = (
    "head_dim",
    "global_head_dim",
    "d_kv",
    "kv_channels",
    "attention_head_dim",
    "attention_head_size",
)

EXPERTS = "experts"  # the module that holds a layer's experts, as a list or as stacks
# Modules of stacks of experts that have no module of that name.
STACKS = re.compile(
    r"(?:^|\.)(?:block_sparse_moe|moe|mlp)\.(?:input_linear|output_linear)(?:\.weight|\.bias)?$"
)
# What a router has, beside the module of the experts; a scale of its inputs has nothing for each expert.
ROUTER = re.compile(
    r"^(?:(?:mlp\.)?(?:gate|router|moe_statics)|experts\.router)(?:\.(?!scale$)|$)"
    r"|^(?:expert_bias|\w*correction_bias)$"
)

# Modules with a row for each token, or an element of a bias: embeddings, and the heads that write logits.
VOCABULARIES = re.compile(
    r"(?:^|\.)(?:embed_tokens|word_embeddings?|(?:tok|token)_embeddings?|tok_embed|embed_in|tokens_embed|wte|shared|embeddings"
    r"|lm_head|lm_head\.decoder|generator_lm_head|embed_out|output_projection|vocab_projector|lm_loss|decoder"
    r"|predictions|predictions\.decoder|pred_layer\.proj|shared_head\.head|head|proj_out|lm_head\.out_proj"
    r"|transformer\.w)$"
)
EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens|word_embeddings?|(?:tok|token)_embeddings?|embed_in|wte|shared)$"
)
LOGIT_BIASES = re.compile(r"(?:^|\.)final_logits_bias$")
VOCABULARY_SIZE = "vocab_size"
# Model types whose positions are counted from the id of padding on.
POSITIONS_FROM_PADDING = frozenset(
    (
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text"),
        *("longformer", "ibert", "esm", "mpnet", "luke", "lilt", "layoutlmv3", "xmod", "markuplm"),
        *("clap_text_model", "speech_to_text", "m2m_100", "nllb-moe", "xglm", "fsmt"),
    )
)

# Keys of a config that say how wide is what layers pass on.
HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model", "model_dim", "dim")
NORMS = re.compile(r"norm|(?:^|[._])ln(?:_|\d|\.|$)")  # what is scaled to one length
JOINED = re.compile(r"(?:^|\.)(?:eh_proj|mtp\.fc)$")  # speculative heads read a token beside hidden states

# A whole piece of a name that numbers a member of a list, as in `layers.3` or in `experts.expert_3` (Switch).
# Matrices of a sequence of modules are no such members: `ffn.0` and `ffn.2` of CTRL, `to_out.0` of diffusers.
MEMBER = re.compile(
    r"(?:^|(?<=\.))(?:expert_)?(0|[1-9][0-9]{0,17})(?=\.|$)"
    r"(?!(?:(?<=\.ffn\.[0-9])|(?<=\.to_out\.[0-9]))\.(?:weight|bias)$)"
)
LAYER_LISTS = re.compile(
    r"^(?!conv|downsampl)(?:\w+_)?(?:layers|layer|layer_groups|h|blocks|block|resblocks)$"
)
NO_LAYERS = re.compile(r"(?:^|[._])(?:sub|down)sampl")  # lists that convolve the input
STAGES = re.compile(r"^(?:stages|layers)\.(?:layers|blocks)$")  # lists of layers in a list of stages

# Heads that guess tokens ahead.
SPECULATIVE = re.compile(r"(^|[._])(mtp|eagle\d*|medusa|nextn|speculator|draft)([._]|$)", re.IGNORECASE)

# -- what is no matrix of a layer --------------------------------------------------------------------

# Names that tell what a matrix of a layer is, by pieces between dots. The last piece that tells decides.
NO_MATRIX = re.compile(
    r"embed|norm|bias|router|A_log|time_mix|expert_gate|rotary|relative_position|codebook|lora_|lm_head|shared_head"
    r"|^wte$|^wpe$|^ln(_|\d|$)|^bn\d*$|_scale(_inv|s)?$|^scales$|zero_point|^qzeros$|^g_idx$|absmax|quant_map",
    re.IGNORECASE,
)

# -- towers ------------------------------------------------------------------------------------------

# Models inside a model, each with a config of its own, and towers in it.
MODELS_INSIDE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"(?:^|\.){name}\."), f"{name}_config")
    for name in ("thinker", "talker", "token2wav", "code2wav")
)
# Words of a tensor's name, and those of the nested config that speaks of it.
TOWERS: tuple[tuple[re.Pattern[str], re.Pattern[str]], ...] = tuple(
    (re.compile(names), re.compile(keys))
    for names, keys in (
        (r"vision|visual|image|pixel|vit(_|\.|$)|siglip", r"vision|visual|image|vit"),
        (r"audio|speech|sound|whisper", r"audio|speech|sound"),
        (r"qformer", r"qformer"),
        (r"perceiver|resampler|connector|projector", r"perceiver|resampler|connector|projector"),
        (r"code_predictor", r"code_predictor"),
    )
)
# What the classes of text models take for keys that published configs of models with towers leave out.
CLASS_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 4096, "num_attention_heads": 32},
    "mistral": {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
    "gemma": {"head_dim": 256},
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
}
TEXT_CONFIGS = ("thinker_config", "text_config", "llm_config", "language_config", "text_model_config")
OTHER_TOWERS = re.compile("vision|visual|audio|image|speech|resampler|perceiver|connector|projector|qformer")
