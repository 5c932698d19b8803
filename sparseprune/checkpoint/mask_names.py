"""Names of masks and of weights that say the same: suffixes of masks, and what wrappers add to names.

Owns both lists, other names that users give, and which mask is for which tensor by its name alone. Called
where masks are opened and where they are matched.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sparseprune.checkpoint.documents import shown
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

ORIGINAL = "_orig"  # what torch.nn.utils.prune adds to the name of a weight, beside that of its mask
_SUFFIXES = ("_mask", ".mask")
_APEX = re.compile(r"(?P<module>(?:.*\.)?)__(?P<parameter>.+)_mma_mask")
# Of DataParallel, torch.compile, PEFT; those of FSDP, checkpointed activations and adapters stand anywhere.
_PREFIXES = ("module.", "_orig_mod.", "base_model.model.")
_PIECES = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})


def masked_name(name: str) -> str | None:
    """The weight that the name of a mask speaks of; None for a name that speaks of no mask.

    >>> masked_name("0.weight_mask"), masked_name("0.weight.mask"), masked_name("0.__weight_mma_mask")
    ('0.weight', '0.weight', '0.weight')
    >>> masked_name("0.weight") is masked_name("_mask") is None
    True
    """
    found = _APEX.fullmatch(name)
    if found is not None:
        return found["module"] + found["parameter"]
    end = next((end for end in _SUFFIXES if name.endswith(end) and name != end), None)
    return None if end is None else name.removesuffix(end)


def unwrapped(name: str) -> str:
    """A name without what wrappers of modules add.

    >>> unwrapped("base_model.model.model.layers.0.q_proj.base_layer.weight")
    'model.layers.0.q_proj.weight'
    >>> unwrapped("module._orig_mod.layers.0.weight"), unwrapped("module")
    ('layers.0.weight', 'module')
    """
    prefix = next((one for one in _PREFIXES if name.startswith(one)), None)
    if prefix is not None:
        return unwrapped(name.removeprefix(prefix))
    return ".".join([piece for piece in name.split(".") if piece not in _PIECES])


def renamed(names: Iterable[str], changes: Mapping[str, str]) -> dict[str, str]:
    """Names and what becomes of them where each old text is replaced by its new one, one after the other.

    Without an old text the new one comes in front.

    >>> renamed(["h.0.w", "h.1.w"], {"h.": "layers.", "": "model."})
    {'h.0.w': 'model.layers.0.w', 'h.1.w': 'model.layers.1.w'}
    """
    found = {}
    for name in names:
        found[name] = name
        for old, new in changes.items():
            found[name] = found[name].replace(old, new) if old else new + found[name]
    return found


def counterparts(tensors: Collection[str], masks: Collection[str]) -> dict[str, str]:
    """The mask of each tensor that has one: of the same name, or of one that only wrappers made another.

    Wrappers may have been around either. `X_orig` is `X` where its mask stands beside it, and a mask of `X`
    may be that of `X.weight`.

    >>> counterparts(["model.q.weight", "norm"], ["module.model.q.weight"])
    {'model.q.weight': 'module.model.q.weight'}

    Raises:
        CheckpointError: two masks are for one tensor, or two tensors have one mask.
    """
    of_tensors = _by_plain_name({name: unwrapped(_original(name, tensors)) for name in tensors})
    found: dict[str, str] = {}
    lines = []
    for plain, ours in _by_plain_name({name: unwrapped(name) for name in masks}).items():
        theirs = of_tensors.get(plain) or of_tensors.get(f"{plain}.weight", [])
        same = [name for name in ours if name in theirs]
        found |= {name: name for name in same}
        others = [name for name in ours if name not in same]
        if others and len(ours) > 1 and theirs:
            one, other = (*same, *others)[:2]
            lines.append(
                f"masks {shown(one)} and {shown(other)} are both for tensor {shown((*same, *theirs)[0])}; "
                "leave one of them out"
            )
        elif others and len(theirs) > 1:
            lines.append(
                f"mask {shown(others[0])} is for both {shown(theirs[0])} and {shown(theirs[1])}; name one of "
                "them with --rename OLD=NEW"
            )
        elif others and theirs:
            found[theirs[0]] = others[0]
    if lines:
        raise CheckpointError(*lines)
    return found


def _by_plain_name(plain: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, one in plain.items():
        groups.setdefault(one, []).append(name)
    return groups


def _original(name: str, tensors: Collection[str]) -> str:
    base = name.removesuffix(ORIGINAL)
    return base if base != name and f"{base}_mask" in tensors else name
