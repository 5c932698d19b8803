"""From a checkpoint and masks, or the zeros of another checkpoint, to tensors with their masks.

Owns which masks are asked for under which names, and what is told and refused of them before any work. Called
by checking.py and removing.py, and by pruning.py for the masks of an earlier step.
"""

from __future__ import annotations

import dataclasses
import json
from types import MappingProxyType
from typing import TYPE_CHECKING

from msgspec import Struct

from sparseprune import __version__
from sparseprune.api.inputs import found_if_any
from sparseprune.api.options import path_or_none
from sparseprune.api.run import collector_paused, digest
from sparseprune.checkpoint import open_checkpoint, open_masks
from sparseprune.checkpoint.codes import names_beside
from sparseprune.checkpoint.discovery import RESULTS, SUFFIX
from sparseprune.checkpoint.documents import shown
from sparseprune.checkpoint.file_io import checkpoint_identity, shards_identity
from sparseprune.checkpoint.folding import folded, refuse_split, split_weights
from sparseprune.checkpoint.layout import PERMUTATIONS
from sparseprune.checkpoint.mask_names import counterparts, masked_name
from sparseprune.checkpoint.masks import provenance_of, renamed_masks, zeros_as_masks
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import CheckpointError, SparsepruneError
from sparseprune.execution.reapply import match_masks
from sparseprune.report.wording import many
from sparseprune.results.checking import LeftOut

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from sparseprune.api.options import Place
    from sparseprune.api.resources import Machine
    from sparseprune.api.run import Run
    from sparseprune.checkpoint import Checkpoint, MaskSet, Provenance, StoredMask
    from sparseprune.execution.reapply import Matched

_OPTIONS = ("--partial", "--rename", "--match", "--exclude")  # that only masks have a use for
_FEW = 1 / 1000  # share of zeros below which they may be there by chance


class MaskSource(Struct, frozen=True):
    """Where masks come from, and how they are matched to tensors.

    Masks are those under `path`, or, if `zeros`, the zeros of the checkpoint there; None where neither was
    given. `rename` has texts in their names and what is to stand there, `match` and `exclude` are patterns
    for the names of tensors.
    """

    path: Path | None
    zeros: bool = False
    partial: bool = False
    rename: Mapping[str, str] = MappingProxyType({})
    match: Sequence[str] = ()
    exclude: Sequence[str] = ()

    @property
    def options(self) -> Iterator[str]:
        """The flags that were given and that only masks have a use for."""
        given = (self.partial, self.rename, self.match, self.exclude)
        return (flag for flag, value in zip(_OPTIONS, given, strict=True) if value)

    @property
    def words(self) -> list[str]:
        """The options by which masks and tensors are matched, as they are typed."""
        words = ["--partial"] if self.partial else []
        for old, new in self.rename.items():
            words += ["--rename", f"{old}={new}"]
        for option, patterns in (("--match", self.match), ("--exclude", self.exclude)):
            for pattern in patterns:
                words += [option, pattern]
        return words

    @property
    def identity(self) -> str:
        """A text that differs whenever other masks may be meant."""
        return json.dumps([self.zeros, self.partial, [*self.rename.items()], [*self.match], [*self.exclude]])


class Masked(Struct, frozen=True):
    """Tensors with their masks, what was asked for, and what is known of the run that made the masks.

    `folded` has the weights that torch.nn.utils.prune keeps in two, by the names of their originals: the
    matched checkpoint has them in one.
    """

    checkpoint: Path
    source: MaskSource
    matched: Matched
    origin: Provenance | None
    folded: Mapping[str, str] = MappingProxyType({})

    @property
    def overrides(self) -> Mapping[str, str]:
        """The variables that were set when the masks were made."""
        return {} if self.origin is None else self.origin.overrides

    @property
    def spec(self) -> bytes | None:
        """The spec by which the masks were made, where the tensors have the names that it knows."""
        same = all(pair.mask.stored.name == pair.stored.name for pair in self.matched.pairs)
        return self.origin.spec if self.origin is not None and same else None

    @property
    def left_out(self) -> LeftOut:
        """How many masks and tensors have no counterpart and are ignored."""
        return LeftOut(masks=len(self.matched.unused), tensors=len(self.matched.unmasked))

    @property
    def identity(self) -> dict[str, str]:
        """What an unfinished output must agree with to be continued: the version, the input, the masks."""
        matched, origin = self.matched, self.origin
        carried = () if origin is None else (sorted(origin.overrides.items()), repr(origin.spec))
        return {
            "the version": __version__,
            "the input": checkpoint_identity(matched.checkpoint),
            "the masks": digest(json.dumps([shards_identity(matched.masks.shards), carried])),
        }


def mask_source(
    run: Run | None,
    places: tuple[Place | None, Place | None],
    names: tuple[Sequence[str], Sequence[str], Mapping[str, str] | None],
    *,
    partial: bool,
    flag: str = "--masks",
) -> MaskSource:
    """What was given: `places` are masks and a sparse checkpoint, `names` `match`, `exclude` and `rename`.

    Without a `run` nothing is asked of the hub.

    SparsepruneError for both masks and a sparse checkpoint; `flag` gives the masks.
    """
    masks, zeros_of = places
    if masks is not None and zeros_of is not None:
        raise SparsepruneError(f"{flag} and --zeros-of exclude each other; give one of them")
    place, (match, exclude, rename) = masks if zeros_of is None else zeros_of, names
    path = path_or_none(place) if run is None else found_if_any(run, place)
    return MaskSource(path, zeros_of is not None, partial, dict(rename or {}), match, exclude)


def refuse_contradictions(
    spec: str | None, source: MaskSource, variables: Mapping[str, object] | None, *, nothing: str | None
) -> None:
    """SparsepruneError unless one of a spec and masks is given, with what goes with it.

    `nothing` says what is wrong where there is neither; None where something else is given.
    """
    if spec is not None and source.path is not None:
        flag = "--zeros-of" if source.zeros else "--masks"
        raise SparsepruneError(f"{spec} and {flag} exclude each other; give one of them")
    if spec is None and source.path is None and nothing is not None:
        raise SparsepruneError(nothing)
    stray = None if source.path is not None else next(source.options, None)
    if stray is not None:
        raise SparsepruneError(f"{stray}: goes with --masks MASKS or --zeros-of SPARSE")
    if spec is None and variables:
        raise SparsepruneError("--set: goes with a SPEC, whose [vars] it sets")


def masked_by(
    run: Run,
    checkpoint: Path,
    source: MaskSource,
    machine: Machine,
    *,
    folds: bool = False,
    cuts: bool = False,
) -> Masked:
    """Open both, and give each tensor its mask; CheckpointError with all that does not fit.

    A sparse checkpoint is read once, to find the tensors that have zeros. Where it `folds`, weights that
    torch.nn.utils.prune keeps in two become one, if the masks are theirs. `cuts` as for `match_masks`.
    """
    path = source.path or checkpoint
    with collector_paused():
        opened, split = open_checkpoint(checkpoint), {}
        if folds and not source.zeros and path.exists() and path.samefile(checkpoint):
            split = split_weights(opened)
            opened = folded(opened, split)
        masks = _under_names(run, _zeros_of(path) if source.zeros else open_masks(path), source.rename)
        origin = None if source.zeros else provenance_of(masks)
        chosen = _chosen(opened, masks, source)
    if source.zeros:
        masks = _with_zeros(run, masks, _looked_at(opened, masks, source, chosen), machine)
    with collector_paused():
        matched = match_masks(opened, masks, origin, partial=source.partial, chosen=chosen, cuts=cuts)
    run.note(_other_names(matched), _other_order(masks))
    return Masked(checkpoint, source, matched, origin, split)


def masks_within(checkpoint: Checkpoint, path: Path) -> tuple[StoredMask, ...]:
    """The masks of an earlier step, under the names of tensors; CheckpointError for all that does not fit."""
    masks = open_masks(path)
    matched = match_masks(checkpoint, masks, provenance_of(masks), partial=False)
    return tuple(pair.mask for pair in matched.pairs)


def _other_order(masks: MaskSet) -> str | None:
    """A line where the masks are those of a checkpoint that was permuted before it was pruned."""
    for path in dict.fromkeys(shard.path for shard in masks.shards):
        named = path.name.replace(f".masks{SUFFIX}", f".{PERMUTATIONS}")
        homes = (path.parent / PERMUTATIONS, path.parent / RESULTS / PERMUTATIONS, path.with_name(named))
        told = next((one for one in homes if one != path and one.is_file()), None)
        if told is not None:
            why = "they fit what is made from that checkpoint, not the dense one"
            return f"these masks are in the order that {told} tells: {why}"
    return None


def _under_names(run: Run, masks: MaskSet, changes: Mapping[str, str]) -> MaskSet:
    """Masks under other names; a warning of each change that changes none."""
    for old, new in changes.items():
        if not any(old in name for name in masks.masks):
            some = next(iter(masks.masks), "")
            run.warn(f"--rename {old}={new}: changes no name in {masks.path}, such as {shown(some)}")
    return renamed_masks(masks, changes) if changes else masks


def _zeros_of(path: Path) -> MaskSet:
    """All tensors of a sparse checkpoint that could be pruned; what lies beside codes goes with these."""
    sparse = open_checkpoint(path)
    refuse_split(sparse)
    beside = names_beside(sparse.tensors)
    prunable = [
        name
        for name, stored in sparse.tensors.items()
        if stored.is_counted and (DTYPES[stored.dtype].prunable or stored.codes) and name not in beside
    ]
    return zeros_as_masks(sparse, prunable)


def _chosen(checkpoint: Checkpoint, masks: MaskSet, source: MaskSource) -> frozenset[str] | None:
    """The names that patterns leave: of tensors, and of masks without a tensor; None for all."""
    if not source.match and not source.exclude:
        return None
    from sparseprune.report.inspection import selected

    used = frozenset(counterparts(checkpoint.tensors, masks.masks).values())
    names = [*checkpoint.tensors, *(name for name in masks.masks if name not in used)]
    return frozenset(selected(names, source.match, source.exclude))


def _looked_at(
    checkpoint: Checkpoint, masks: MaskSet, source: MaskSource, chosen: Collection[str] | None
) -> list[StoredMask]:
    """The tensors of a sparse checkpoint whose zeros count.

    Where patterns say which, all of these; else matrices and what has more dimensions, of floats or bytes: a
    zero in a bias, a norm or a counter is seldom a pruned one.
    """
    found = list(masks.masks.values())
    if chosen is not None:
        of = {mask: name for name, mask in counterparts(checkpoint.tensors, masks.masks).items()}
        found = [mask for mask in found if of.get(mask.name, mask.name) in chosen]
    if source.match:
        return found
    wide = {"I16", "I32", "I64"}
    return [mask for mask in found if len(mask.shape) > 1 and mask.stored.dtype not in wide]


def _with_zeros(run: Run, masks: MaskSet, looked_at: Sequence[StoredMask], machine: Machine) -> MaskSet:
    """The masks that drop something; all other tensors of the sparse checkpoint are whole."""
    from sparseprune.execution.regions import limits_of
    from sparseprune.execution.zeros import count_zeros

    limits = limits_of(machine.memory, uses_torch=False)
    total = sum(mask.stored.nbytes for mask in looked_at)
    with run.reading() as reader, run.progress("finding zeros", total) as advance:
        zeros = count_zeros(looked_at, reader, limits, machine.jobs, advance)
    having = {mask.name: mask for mask in looked_at if zeros[mask.name]}
    if not having:
        raise CheckpointError(
            f"{masks.path}: there is no zero in {many(len(looked_at), 'tensor')}; give a sparse checkpoint"
        )
    run.note(f"masks are the zeros of {many(len(having), 'tensor')} of {masks.path}")
    few = [mask for mask in having.values() if zeros[mask.name] < _FEW * mask.numel]
    if few:
        first = few[0]
        some = f"{many(zeros[first.name], 'zero')} of {first.numel:,} elements of {shown(first.name)}"
        more = f" and those of {many(len(few) - 1, 'more tensor')}" if few[1:] else ""
        run.warn(f"{masks.path}: {some}{more} may be there by chance; --exclude leaves them out")
    whole = frozenset(name for name in masks.masks if name not in having)
    return dataclasses.replace(masks, masks=MappingProxyType(having), whole=whole)


def _other_names(matched: Matched) -> str | None:
    """How many masks are for tensors of other names, as a line."""
    names = [(pair.mask.stored.name, pair.stored.name) for pair in matched.pairs]
    other = [(mask, name) for mask, name in names if name not in (mask, masked_name(mask))]
    if not other:
        return None
    mask, name = other[0]
    return f"{many(len(other), 'mask')} of another name, such as {shown(mask)} for {shown(name)}"
