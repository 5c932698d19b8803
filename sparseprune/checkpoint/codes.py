"""What a stored number means: a weight, or a code that a scale and a zero point beside it turn into one.

Owns the names, dtypes and shapes by which codes are recognized, and how scales and zero points are laid over
them. Reads headers and config.json alone; never fails: what it does not understand it says of the tensor.
Called when a checkpoint is opened; whoever works on elements asks `StoredTensor.codes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.checkpoint.documents import shown
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import Shape, prod

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from sparseprune.checkpoint.source import StoredTensor

    Tensors = Mapping[str, StoredTensor]
    Config = Mapping[str, Any]

QUANTIZED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside a config.json that say that its weights are codes."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_EIGHT_BITS = frozenset(name for name in DTYPES if name.startswith("F8_") and name != "F8_E8M0")
_SCALES = frozenset({*_FLOATS, *_EIGHT_BITS, "F8_E8M0"})
_ZERO_POINTS = frozenset({"I8", "U8", "I16", "I32", "I64"})
_WHOLE = frozenset({"I8", "U8", "I16"})  # integers that may be one code each
_WORDS = frozenset({"I32", "U32", "I64"})  # integers that hold several
# What stands behind the name of a tensor of codes, and what it is. The longest that fits counts.
_ENDS: Mapping[str, str] = {
    "_scale": "scale",
    "_scale_inv": "scale",
    "_scales": "scale",
    "_scale_2": "global",
    "_global_scale": "global",
    "_zero_point": "zero",
    "_g_idx": "order",
    "_shape": "other",
    ".absmax": "other",
    ".quant_map": "packed",
    ".nested_absmax": "other",
    ".nested_quant_map": "other",
    ".quant_state.bitsandbytes__nf4": "packed",
    ".quant_state.bitsandbytes__fp4": "packed",
}
# What stands in the place of `weight`, beside it.
_NAMES: Mapping[str, str] = {
    ".scale": "scale",
    ".scales": "scale",
    ".SCB": "rows of 127",
    ".qzeros": "zero",
    ".zeros": "zero",
    ".biases": "zero",
    ".g_idx": "order",
    ".weight_format": "other",
    ".input_scale": "other",
    ".input_zero_point": "other",
    ".input_global_scale": "other",
    ".output_scale": "other",
}
_BY_LENGTH = tuple(sorted((*_ENDS, *_NAMES), key=len, reverse=True))
_WEIGHTS = (".qweight", ".weight", ".weight_packed", ".W_q")  # what they are beside
_PACKED = (".qweight", ".weight_packed", ".W_q")  # names that say it alone
_STORED_AS = ("", "_packed", "_blocks", "_qdata")  # behind the name of the weight
_USUAL = (128, 64, 32, 16, 256)  # edges of blocks, the usual first, where a shape allows several
PARAMETERS = frozenset(
    end.removeprefix(".")
    for end in (*_PACKED, *_NAMES, *(f"weight{end}" for end in _ENDS if end.startswith("_")))
)
"""Last pieces of names that tell which parameter of a quantized module a tensor is, besides `weight`."""


class Beside(Struct, frozen=True):
    """Scales or zero points: an entry for each block of so many codes; blocks at the far edges may be cut.

    `dtype` is that of the entries, which a file may store as plain bytes. `stored` may have fewer dimensions.
    """

    stored: StoredTensor
    dtype: str
    block: Shape

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def is_one(self) -> bool:
        """Whether one entry is for all codes."""
        return self.stored.numel == 1


class Codes(Struct, frozen=True):
    """What the elements of a tensor are: a weight is (code - zero point) * scale * `unit`.

    `what` says it in words, and `packed` in which way elements hold more than one code, or less ("" where
    each is one), with the `bits` of a code, 0 where nobody tells. `beside` names all that belongs to the
    tensor. `no_values` and `no_zero` say why nobody can tell which numbers the codes stand for, and which of
    them stand for zero. Codes of one `form` differ only in the names and places of tensors; 0 is none.
    """

    what: str
    beside: tuple[str, ...] = ()
    packed: str = ""
    bits: int = 0
    scale: Beside | None = None
    zero_point: Beside | None = None
    unit: float = 1.0
    no_values: str = ""
    no_zero: str = ""
    form: int = 0

    @property
    def is_counted(self) -> bool:
        """Whether each element is one code, of which it is known whether it is zero."""
        return not self.packed and not self.no_zero

    def refusal(self, name: str, *, values: bool = True) -> str:
        """A line that tells why nothing can be done with such elements; "" where something can.

        `values`: whether they have to be known as numbers, and not only whether they are zero.
        """
        lies = f" ({self.beside[0]} lies beside it)" if self.beside else ""
        why = (self.no_values if values else "") or self.no_zero
        if self.packed:
            return f"{name} holds {self.what}, {self.packed}{lies}: dequantize the checkpoint first"
        return f"{name} holds {self.what}{lies}, {why}: dequantize the checkpoint first" if why else ""


def with_codes(tensors: Tensors, config: Callable[[], Config | None]) -> Tensors:
    """The same tensors, those that hold codes with what these mean; the very same where none does.

    `config` gives config.json, and is called where the answer depends on it.
    """
    if {one.entry.dtype for one in tensors.values()} <= _FLOATS:
        return tensors
    found = _named(tensors)
    may_lack = [name for name, one in tensors.items() if one.entry.dtype in _MAY_LACK]
    if not found and not may_lack:
        return tensors
    document = config() or {}
    if quantization_of(document) is not None:
        for name in may_lack:
            if len(tensors[name].shape) > 1 and name.rpartition(".")[2] in {"weight", *_STACKED}:
                found.setdefault(name, {})
    codes = _codes_of(found, tensors, _Hints.of(document))
    return {
        name: type(one)(one.entry, one.shard, codes[name]) if name in codes else one
        for name, one in tensors.items()
    }


_MAY_LACK = frozenset({"I8", *_EIGHT_BITS})
_STACKED = frozenset({"gate_up_proj", "down_proj"})


def names_beside(tensors: Tensors) -> frozenset[str]:
    """The tensors that only say what codes mean; they are no weights, and go where the codes go."""
    return frozenset(name for codes in codes_in(tensors).values() for name in codes.beside)


def codes_in(tensors: Tensors) -> dict[str, Codes]:
    """What the elements of those tensors are that hold codes."""
    return {name: stored.codes for name, stored in tensors.items() if stored.codes is not None}


def quantization_of(config: Config) -> str | None:
    """The method of the quantization that a config.json states, and where; None where it states none.

    A quantization_config that holds only a sparsity_config is none.
    """
    for key, part in (("", config), *config.items()):
        stated = part.get("quantization_config") if isinstance(part, Mapping) else None
        if stated and (method := _method(stated)):
            return f"{method}, says {key}{'.' if key else ''}quantization_config of config.json"
    return None


def _method(stated: object) -> str:
    """The method of a quantization_config; "" if it only describes sparsity."""
    if not isinstance(stated, Mapping):
        return shown(stated)
    method = str(stated.get("quant_method") or stated.get("quant_algo") or "of an unknown method")
    sparse_alone = bool(stated.get("sparsity_config")) and not stated.get("config_groups")
    return "" if sparse_alone and method in {"compressed-tensors", "of an unknown method"} else method


class _Hints(Struct, frozen=True):
    """What config.json says of codes: the method, bits of a code, the edges of blocks that have a scale."""

    method: str = ""
    bits: int = 0
    block: Shape = ()
    group: int = 0

    @classmethod
    def of(cls, config: Config) -> _Hints:
        """Of the first quantization_config; numbers that are none are left out."""
        parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
        stated = next(
            (part["quantization_config"] for part in parts if part.get("quantization_config")), None
        )
        if not isinstance(stated, Mapping):
            return cls()
        groups = stated.get("config_groups")
        each = [one.get("weights") for one in groups.values()] if isinstance(groups, Mapping) else []
        weights: Config = next((one for one in each if isinstance(one, Mapping)), {})
        block = weights.get("block_structure") or stated.get("weight_block_size")
        edges = tuple(block) if isinstance(block, list | tuple) else ()
        return cls(
            str(stated.get("quant_method") or stated.get("quant_algo") or "").lower(),
            _whole(weights.get("num_bits") or stated.get("bits") or stated.get("w_bit")),
            edges if len(edges) == 2 and all(map(_whole, edges)) else (),
            _whole(weights.get("group_size") or stated.get("group_size")),
        )


def _whole(number: object) -> int:
    """A positive integer, 0 for everything else."""
    return number if type(number) is int and number > 0 else 0


def _named(tensors: Tensors) -> dict[str, dict[str, str]]:
    """The tensors that names tell to be codes: for each, what lies beside it by the part that it plays."""
    found: dict[str, dict[str, str]] = {}
    endings = (*_BY_LENGTH, *_PACKED)
    ends: dict[str, str] = {}  # many names have few ends
    for name in [name for name in tensors if name.endswith(endings)]:
        if name.endswith(_PACKED):
            found.setdefault(name, {})
            continue
        last = name[-len(_BY_LENGTH[0]) :]
        end = ends.get(last) or next(end for end in _BY_LENGTH if name.endswith(end))
        ends[last] = end
        owner = _owner(name[: -len(end)], end, tensors)
        if owner is not None:
            role = _ENDS.get(end) or _NAMES[end]
            roles = found.setdefault(owner, {})
            roles[role if role not in roles else f"{role} {len(roles)}"] = name
    # What is beside a float says nothing of it: a scale of inputs, of a norm, of an adapter.
    return {name: roles for name, roles in found.items() if _may_be_codes(tensors[name], roles)}


def _may_be_codes(stored: StoredTensor, roles: Mapping[str, str]) -> bool:
    """Whether the dtype can be one of codes, and something beside it says more than a name alone."""
    told = stored.name.endswith(_PACKED) or not roles.keys() <= {"other", "order"}
    if stored.dtype in _WORDS:
        return told and len(stored.shape) > 1
    return told and (stored.dtype in _WHOLE | _EIGHT_BITS or DTYPES[stored.dtype].bits < 8)


def _owner(stem: str, end: str, tensors: Tensors) -> str | None:
    """The tensor of codes beside which a name stands that begins with `stem`."""
    if end in _ENDS:
        names = (f"{stem}{more}" for more in _STORED_AS)
        return next((name for name in names if name in tensors), None)
    return next((stem + name for name in _WEIGHTS if stem + name in tensors), None)


def _codes_of(found: Mapping[str, Mapping[str, str]], tensors: Tensors, hints: _Hints) -> dict[str, Codes]:
    """What the elements of tensors mean, beside which there is what was `found`: each form is told once."""
    first_of: dict[Hashable, Codes] = {}
    codes: dict[str, Codes] = {}
    for name, roles in found.items():
        entries = [tensors[one].entry for one in (name, *roles.values())]
        alike = (name.endswith(_PACKED), name.endswith("_blocks"), *roles)
        form = (*alike, *[(entry.dtype, entry.shape) for entry in entries])
        first = first_of.get(form)
        if first is None:
            made = _codes(tensors[name], roles, tensors, hints)
            codes[name] = made
            if not made.no_values and not made.no_zero:  # which name tensors
                codes[name] = first_of[form] = replace(made, form=len(first_of) + 1)
            continue
        scale, zero = first.scale, first.zero_point
        if scale is not None:
            there = roles["scale"] if "scale" in roles else roles["rows of 127"]
            scale = Beside(tensors[there], scale.dtype, scale.block)
        if zero is not None:
            zero = Beside(tensors[roles["zero"]], zero.dtype, zero.block)
        beside = tuple(roles.values())
        said = (first.what, beside, first.packed, first.bits)
        codes[name] = Codes(*said, scale, zero, first.unit, form=first.form)
    return codes


def _codes(stored: StoredTensor, roles: Mapping[str, str], tensors: Tensors, hints: _Hints) -> Codes:
    """What the elements of a tensor mean."""
    beside = tuple(roles.values())
    packed = _packed(stored, roles, tensors, hints)
    if packed is not None:
        return Codes(packed[0], beside, packed[1], packed[2])
    what = f"{_TITLES.get(stored.dtype, stored.dtype)} codes"
    scale, zero = (tensors[roles[role]] if role in roles else None for role in ("scale", "zero"))
    unit, no_values, no_zero = 1.0, "", ""
    if "rows of 127" in roles and scale is None:
        scale, unit = tensors[roles["rows of 127"]], 1 / 127
    if sum(role.startswith("scale") for role in roles) > 1:
        no_values = "with two scales"
    if "order" in roles:
        no_values = f"whose groups are in the order of {roles['order']}"
    if "global" in roles:
        no_values = f"with a second scale {roles['global']}"
    laid = None if scale is None else _laid(stored, scale, hints)
    if scale is None:
        no_values = "and no scale lies beside it"
    elif laid is None:
        no_values = no_values or f"whose scales {scale.name}, {_form(scale)}, do not fit its {_form(stored)}"
    laid_zero = None if zero is None else _laid_zero(stored, zero, hints)
    if zero is not None and laid_zero is None:
        no_zero = f"whose zero points {zero.name}, {_form(zero)}, do not fit its {_form(stored)}"
    return Codes(what, beside, "", 0, laid, laid_zero, unit, no_values, no_zero)


_TITLES = {"F8_E4M3": "FP8", "F8_E5M2": "FP8", "I8": "int8", "U8": "uint8", "I16": "int16"}


def _form(stored: StoredTensor) -> str:
    return f"{stored.dtype} of shape {list(stored.shape)}"


def _packed(
    stored: StoredTensor, roles: Mapping[str, str], tensors: Tensors, hints: _Hints
) -> tuple[str, str, int] | None:
    """What codes are called of which an element holds several or less than a byte, how many, and their bits.

    0 bits where nobody tells; None for others.
    """
    bits = DTYPES[stored.dtype].bits
    if stored.dtype in _WORDS:
        held = _COUNTS.get(bits // hints.bits if hints.bits else 0, "several")
        return f"{_title_of_words(roles, hints)} codes", f"{held} in an int{bits}", hints.bits
    if bits < 8:
        return f"{stored.dtype} codes", "which are no whole bytes", bits
    title = _title_of_bytes(stored, roles, tensors)
    return (f"{title} codes", "two in a byte", 4) if title else None


def _title_of_words(roles: Mapping[str, str], hints: _Hints) -> str:
    """What codes are called of which integers hold several."""
    if hints.method in {"gptq", "awq"}:
        return hints.method.upper()
    return "GPTQ" if "order" in roles else "integer"


def _title_of_bytes(stored: StoredTensor, roles: Mapping[str, str], tensors: Tensors) -> str:
    """What codes are called of which a byte holds two; "" where it holds one."""
    title = ""
    is_byte = stored.dtype in {"I8", "U8"}
    named = stored.name.endswith(_PACKED) or "global" in roles
    if "packed" in roles:
        title = "bitsandbytes"
    elif stored.name.endswith("_blocks"):
        title = "MXFP4"
    elif is_byte and (named or (stored.dtype == "U8" and "zero" not in roles)):
        title = "NVFP4" if "global" in roles else "four-bit"
    elif is_byte and "scale" in roles and _is_pair(stored, tensors[roles["scale"]]):
        title = "NVFP4" if tensors[roles["scale"]].dtype == "F8_E4M3" else "MXFP4"
    return title


_COUNTS = {2: "two", 4: "four", 8: "eight", 16: "sixteen"}


def _is_pair(stored: StoredTensor, scale: StoredTensor) -> bool:
    """Whether each byte holds two codes of four bits: their groups are half as many bytes long."""
    groups = {"U8": 32, "F8_E8M0": 32, "F8_E4M3": 16}.get(scale.dtype, 0)
    same = len(stored.shape) == len(scale.shape) > 1
    return same and groups > 0 and 2 * stored.shape[-1] == groups * scale.shape[-1]


def _laid(stored: StoredTensor, scale: StoredTensor, hints: _Hints) -> Beside | None:
    """Scales over codes; bytes beside codes of eight bits are exponents of two, as MX has them."""
    dtype = "F8_E8M0" if scale.dtype == "U8" else scale.dtype
    block = _block(stored.shape, scale.shape, hints)
    return None if block is None or dtype not in _SCALES else Beside(scale, dtype, block)


def _laid_zero(stored: StoredTensor, zero: StoredTensor, hints: _Hints) -> Beside | None:
    """Zero points over codes, both of them integers."""
    block = _block(stored.shape, zero.shape, hints)
    fits = block is not None and zero.dtype in _ZERO_POINTS and stored.dtype in _WHOLE
    return Beside(zero, zero.dtype, block) if fits and block is not None else None


def _block(codes: Shape, entries: Shape, hints: _Hints) -> Shape | None:
    """How many codes along each dimension share an entry; None where shapes do not tell.

    >>> _block((256, 384), (2, 3), _Hints()), _block((200, 384), (2, 3), _Hints())
    ((128, 128), (128, 128))
    >>> _block((6, 8), (6,), _Hints()), _block((6, 8), (6, 2), _Hints()), _block((6, 8), (3,), _Hints())
    ((1, 8), (1, 4), None)
    """
    if prod(entries) == 1:
        return codes
    own = list(entries)
    while len(own) > len(codes) and own[-1] == 1:
        own.pop()
    if len(own) > len(codes) or 0 in codes:
        return None
    same_rank = len(own) == len(codes)
    if len(own) == 1 and not same_rank and own[0] != codes[0] and own[0] == codes[-1]:
        own = [1] * (len(codes) - 1) + own  # one for each column
    own += [1] * (len(codes) - len(own))
    partial = [dim for dim, (size, count) in enumerate(zip(codes, own, strict=True)) if 1 < count < size]
    if any(count > size for size, count in zip(codes, own, strict=True)) or (partial and not same_rank):
        return None
    edges = [size if count == 1 else 1 for size, count in zip(codes, own, strict=True)]
    for dim in partial:
        edge = _edge(
            codes[dim], own[dim], _wanted(hints, dim - len(codes), in_rows=own[-2:-1] == [*codes[-2:-1]])
        )
        if not edge:
            return None
        edges[dim] = edge
    return tuple(edges)


def _wanted(hints: _Hints, dim: int, *, in_rows: bool) -> tuple[int, ...]:
    """The edges that are looked for along a dimension, likeliest first; `in_rows`: each row has groups."""
    stated = hints.block[dim] if hints.block and dim >= -2 else hints.group if dim == -1 else 0
    usual = () if in_rows else _USUAL[:1]  # blocks of rows and columns are those of FP8
    return (stated, *usual) if stated else usual


def _edge(size: int, count: int, wanted: tuple[int, ...]) -> int:
    """The edge of `count` blocks over `size` codes; 0 where none is certain."""
    fitting = (edge for edge in wanted if math.ceil(size / edge) == count)
    usual = (edge for edge in _USUAL if math.ceil(size / edge) == count)
    return next(fitting, size // count if size % count == 0 else next(usual, 0))
