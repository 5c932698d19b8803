"""Checks between tables of a spec: references, captures, budgets, methods; every problem at once.

Knows how tables build on each other, and no checkpoint. Called by parsing; locating asks it for the captures
and patterns of a table.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from typing import TYPE_CHECKING

from msgspec import Struct

from sparseprune.spec.expressions import FACTS, RESERVED, expressions_of, unknown_name
from sparseprune.spec.problems import Problems, listed, nearest, shown
from sparseprune.spec.schema import (
    BUDGETS,
    KINDS,
    METHOD_KEYS,
    PERMUTED_SCORES,
    SOFT_KEYS,
    BlockCouplingTable,
    BudgetTable,
    CouplingTable,
    ExplicitView,
    ReconstructTable,
    ScopeTable,
    ScoreTable,
    Spec,
    Table,
    TensorsTable,
    reconstruct_of,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from sparseprune.spec.expressions import Expression

Membership = tuple[str, str]
"""The places of a coupling and of one of its members."""
_BUDGET_KEYS = (*BUDGETS, "multiple_of")
_VIEW_KEYS = ("slice", "axes", "view", "shape", "block")
_MOST_LEVELS = 100
_MOST_SHOWN = 8  # names in a circle
_MOST_MISSING = 8  # names without a table, for which the tables that they may mean are looked for


def captures_of(spec: Spec, place: str) -> frozenset[frozenset[str]]:
    """The sets of captures that instances of a table may have: one, unless its patterns differ in them.

    Empty where a table below it is missing or cannot be read.
    """
    table, parts = spec.tables.get(place), spec.parts(place)
    if isinstance(table, TensorsTable) and not parts:
        return table.variants
    members = [captures_of(spec, part) for part in parts]
    if not members or not all(members):
        return frozenset()
    if not isinstance(table, CouplingTable):
        return members[0]
    every = frozenset(name for variants in members for names in variants for name in names)
    return frozenset({frozenset() if table.across == "all" else every.difference(table.across)})


def patterns_of(spec: Spec, place: str) -> tuple[str, ...]:
    """The patterns, in quotes, or structures of all tensors that a table consists of."""
    return tuple(text for leaf in spec.leaves(place).values() for text in leaf.sought)


def expressions_by_key(table: Table) -> dict[str, tuple[Expression, ...]]:
    """The expressions of a table's view and blocks, by key; they may use captures of fellow members."""
    return {key: tuple(expressions_of(value)) for key, value in table if key in _VIEW_KEYS}


def borrowed_names(spec: Spec, member: str) -> frozenset[str]:
    """The captures that expressions of a coupling's member use and its own patterns lack."""
    leaves, tables = spec.leaves(member), [spec.tables[each] for each in spec.tables_in(member)]
    if len(leaves) != 1 or any(isinstance(table, CouplingTable) for table in tables):
        return frozenset()
    expressions = (each for table in tables for found in expressions_by_key(table).values() for each in found)
    used = {name for expression in expressions for name in expression.names}
    return frozenset(used.difference(*captures_of(spec, member), spec.variables, RESERVED))


def check_spec(spec: Spec, declared: Mapping[str, Collection[str]], problems: Problems) -> None:
    """Every problem that shows without a checkpoint; `declared` has all names by kind, and those of vars."""
    check = _Checker(spec, declared, problems)
    if not declared["scope"] and not problems.is_open("", "scope"):
        problems.add("", "", "there is no rule: write at least one [scope.NAME]")
    for place, table in spec.tables.items():
        if isinstance(table, CouplingTable):
            check.members(place, table)
            check.orders(place, table)
            check.captures(place, table)
        elif isinstance(table, ScopeTable) and isinstance(table.block, str):
            check.named_block(place, table, table.block)
        elif not problems.is_open(place, "block"):
            check.tensors(place, table)
    check.blocks()
    check.budgets()
    check.nests()
    if spec.score is not None and not problems.is_open("score", "kind"):
        check.score("score", spec.score)
    if spec.reconstruct is not None and not problems.is_open("reconstruct", "method"):
        check.clamp("reconstruct", "clamp", spec.reconstruct)
    check.references()


class _Checker(Struct, frozen=True):
    """The checks of a spec; each adds problems. `declared` as for `check_spec`."""

    spec: Spec
    declared: Mapping[str, Collection[str]]
    problems: Problems

    def add(self, place: str, key: str, text: str) -> None:
        """Add a problem of a key, unless its value is unknown because of another one."""
        if not self.problems.is_open(place, key):
            self.problems.add(place, key, text)

    # -- tables by themselves, and the names of others in them -----------------------------------

    def tensors(self, place: str, table: TensorsTable) -> None:
        """The keys of a table that names tensors: which tensors, and its view of them."""
        named = [key for key in ("tensors", "regex", "structure") if getattr(table, key) is not None]
        if not named and not self.problems.is_open(place, "regex", "structure"):
            text = f"missing; wanted {TensorsTable.keys['tensors'].wanted}"
            if isinstance(table, ScopeTable):
                text = "missing: a block given by its shape needs the tensors beside it"
                text = f"{text}; or name a [block] or [block_coupling]"
            self.add(place, "tensors", text)
        if len(named) > 1:
            what = {"tensors": "by patterns", "regex": "by a regex", "structure": "by their structure"}
            text = f"tensors are named {what[named[0]]} already: give one of {listed(named)}"
            self.add(place, named[-1], text)
        if table.structure is not None and (table.slice is not None or isinstance(table.view, ExplicitView)):
            key = "slice" if table.slice is not None else "view"
            self.add(
                place, key, "a structure says which part of a tensor it is: name tensors to take another"
            )
        if table.axes and not isinstance(table.view, str) and not self.problems.is_open(place, "view"):
            self.add(place, "axes", 'axes belong to an einops pattern: give one as view = "..."')
        if isinstance(table.view, ExplicitView) and table.slice is not None:
            self.add(place, "slice", "a view by shape and stride takes no slice: give it an offset instead")

    def named_block(self, place: str, table: ScopeTable, block: str) -> None:
        for key in TensorsTable.keys:
            if getattr(table, key) not in {None, ()}:
                instead = "remove this key, or give the block's shape as a list of integers"
                text = f"the block is the table {shown(block)}, which has the tensors: {instead}"
                self.add(place, key, text)
        known = [*self.declared["block"], *self.declared["block_coupling"]]
        if block not in known and not self.problems.is_open("", "block", "block_coupling"):
            text = f"there is no [block.{block}] and no [block_coupling.{block}]"
            self.add(place, "block", text + self.problems.suggestion(block, known))

    def members(self, place: str, table: CouplingTable) -> None:
        kind, key = table.member_kind, table.members_key
        for number, member in enumerate(table.members):
            if member not in self.declared[kind]:
                if not self.problems.is_open("", kind):
                    meant = self.problems.suggestion(member, self.declared[kind])
                    self.add(place, key, f"there is no [{kind}.{member}]{meant}")
            elif member in table.members[:number]:
                self.add(place, key, f"{shown(member)} is listed twice: each member takes part once")

    def orders(self, place: str, table: CouplingTable) -> None:
        if table.orders is None:
            return
        orders, members, key = table.orders, table.members, table.members_key
        if len(orders) != len(members) and not self.problems.is_open(place, key):
            found = f"found {len(orders)} orders for {len(members)} {key}"
            self.add(place, "orders", f"{found}: give one order for each")
        for order in orders:
            if sorted(order) != list(range(len(order))):
                needed = f"it needs each of 0 to {len(order) - 1} once"
                self.add(place, "orders", f"{shown(order)} is no order of dimensions: {needed}")

    def captures(self, place: str, table: CouplingTable) -> None:
        """`across` names captures that exist, and members can be joined on what is left."""
        if table.across == "all" or self.problems.is_open(place, table.members_key, "across"):
            return
        kind = table.member_kind
        captured = {member: captures_of(self.spec, f"{kind}.{member}") for member in table.members}
        every = {name for variants in captured.values() for names in variants for name in names}
        for name in table.across if all(captured.values()) else ():
            if name not in every:
                meant = self.problems.suggestion(name, every)
                self.add(place, "across", f"no member captures {shown(name)}{meant}")
        for member, variants in captured.items():
            left = {names.difference(table.across) for names in variants}
            if len(left) > 1:
                texts = listed(sorted(listed(sorted(names)) if names else "nothing" for names in left), "or")
                patterns = listed(patterns_of(self.spec, f"{kind}.{member}"))
                text = f"{shown(member)} captures {texts}, depending on which of {patterns} matches"
                needed = "the patterns of a member need the same captures"
                self.add(place, table.members_key, f"{text}: {needed}")

    def blocks(self) -> None:
        """Names that two blocks share, and blocks that no scope uses, where all that is named is known."""
        blocks, couplings = set(self.declared["block"]), set(self.declared["block_coupling"])
        for name in self.declared["block_coupling"]:
            if name in blocks:
                text = f"[block.{name}] has the same name: a scope could mean either"
                self.add(f"block_coupling.{name}", "", text)
        tables = self.spec.tables.values()
        blocks_of = [table.block for table in tables if isinstance(table, ScopeTable)]
        named = {block for block in blocks_of if isinstance(block, str)}
        fused = {block for table in tables if isinstance(table, BlockCouplingTable) for block in table.blocks}
        missing = sorted((named - blocks - couplings) | (fused - blocks))
        meant = [nearest(name, blocks | couplings) for name in missing[: _MOST_MISSING + 1]]
        if len(missing) > _MOST_MISSING or not all(meant) or self.problems.is_open("", *KINDS):
            return
        if not (self._all_read("scope", "block") and self._all_read("block_coupling", "blocks")):
            return
        named.update(*meant)
        for name in self.declared["block_coupling"]:
            if name not in named:
                self.add(f"block_coupling.{name}", "", "used by no scope: name it in one, or remove it")
        for name in self.declared["block"]:
            if name not in named | fused:
                text = "used by no scope: name it in one or in a coupling, or remove it"
                self.add(f"block.{name}", "", text)

    def _all_read(self, kind: str, key: str) -> bool:
        """Whether this key is known of every table of a kind."""
        places = [f"{kind}.{name}" for name in self.declared[kind]]
        return all(each in self.spec.tables and not self.problems.is_open(each, key) for each in places)

    # -- budgets and methods ---------------------------------------------------------------------

    def budgets(self) -> None:
        coupled = self.spec.coupled_scopes()
        is_known = not self.problems.is_open("", "scope_coupling")
        is_known = is_known and self._all_read("scope_coupling", "scopes")
        for place, table in self.spec.tables.items():
            if place in coupled and isinstance(table, BudgetTable):
                self._inner(place, table, coupled[place])
            # A scope may be a member of a coupling that could not be read.
            elif isinstance(table, BudgetTable) and (is_known or isinstance(table, CouplingTable)):
                self._outermost(place, table)

    def _inner(self, place: str, table: BudgetTable, coupling: str) -> None:
        for key in (*_BUDGET_KEYS, "within", *METHOD_KEYS):
            if getattr(table, key) is not None:
                what = "its budget" if key in _BUDGET_KEYS else "this"
                self.add(place, key, f"this scope is a member of [{coupling}]: {what} belongs there")
        if isinstance(table, ScopeTable) and table.permute:
            self.add(place, "permute", f"this scope is a member of [{coupling}], and only N:M is permuted")
        if isinstance(table, ScopeTable) and table.transposable:
            self.add(place, "transposable", f"this scope is a member of [{coupling}]: only N:M can be so")

    def _outermost(self, place: str, table: BudgetTable) -> None:
        given = [key for key in BUDGETS if getattr(table, key) is not None or self.problems.has(place, key)]
        if not given and not self.problems.is_open(place, *BUDGETS):
            self.add(place, "", "there is no budget: give one of nnz, sparsity and threshold")
        if len(given) > 1:
            self.add(place, "", f"found the budgets {listed(given)}: give exactly one")
        if table.multiple_of is not None and given == ["threshold"]:
            text = "it rounds the number that nnz or sparsity gives; a threshold keeps no fixed number"
            self.add(place, "multiple_of", text)
        if isinstance(table, ScopeTable) and table.permute:
            self._permute(place, table)
        if isinstance(table, ScopeTable) and table.transposable:
            self._transposable(place, table)
        if not self.problems.is_open(place, "mode"):
            self._mode(place, table)
        if not self.problems.is_open(place, "mode", "score", "reconstruct", "threshold"):
            self._reconstruct(place, table)
            self._allocate(place, table)
        if table.score is not None:
            self.score(place, table.score, "score.")

    def _permute(self, place: str, table: ScopeTable) -> None:
        """Keys that do not go with inputs that change places."""
        if isinstance(table.block, str) and not self.problems.is_open(place, "block"):
            text = "only N:M of a scope that names its tensors is permuted: give them beside a block's shape"
            self.add(place, "permute", text)
        if table.threshold is not None:
            self.add(place, "permute", "a threshold keeps no fixed number: give nnz or sparsity")
        score = table.score or (None if self.problems.is_open(place, "score") else self.spec.score)
        if score is not None and score.kind not in PERMUTED_SCORES:
            kinds = listed(map(shown, PERMUTED_SCORES), "or")
            text = f'its score has kind = "{score.kind}", of which no order loses less: wanted {kinds}'
            self.add(place, "permute", text)

    def _transposable(self, place: str, table: ScopeTable) -> None:
        """Keys that do not go with n of m in both dimensions, whatever an expression comes to."""
        score = table.score or (None if self.problems.is_open(place, "score") else self.spec.score)
        found = table.reconstruct or self.spec.reconstruct
        if table.threshold is not None:
            self.add(place, "transposable", "a threshold keeps no fixed number: give nnz or sparsity")
        if table.mode == "soft":
            self.add(place, "transposable", 'mode = "soft" keeps no pattern: leave one of the two out')
        if score is not None and score.kind not in PERMUTED_SCORES:
            kinds = listed(map(shown, PERMUTED_SCORES), "or")
            self.add(place, "transposable", f'its score has kind = "{score.kind}": wanted {kinds}')
        if score is not None and score.nonfinite == "prune":
            self.add(place, "transposable", 'nonfinite = "prune" has scores without a sum: leave it out')
        if found is not None and found.allocate == "loss":
            text = 'each tile keeps as many, so that allocate = "loss" has nothing to share: leave it out'
            self.add(place, "transposable", text)

    def _mode(self, place: str, table: BudgetTable) -> None:
        """Keys that do not go with the mode of a rule."""
        if table.mode != "soft":
            for key in SOFT_KEYS:
                if getattr(table, key) is not None:
                    self.add(place, key, 'only mode = "soft" takes this key')
            return
        score = table.score or (None if self.problems.is_open(place, "score") else self.spec.score)
        if score is not None and score.nonfinite == "prune":
            text = 'found "soft", but its score has nonfinite = "prune", which only "hard" takes'
            self.add(place, "mode", text)
        if table.threshold is not None and table.k_weight is not None:
            text = "only a threshold made from nnz or sparsity takes this key; here it is given"
            self.add(place, "k_weight", text)

    def _reconstruct(self, place: str, table: BudgetTable) -> None:
        """Keys that do not go with how a rule reconstructs its weights."""
        score, found = table.score or self.spec.score, table.reconstruct or self.spec.reconstruct
        if found is not None and found is table.reconstruct:
            self.clamp(place, "reconstruct.clamp", found)
        if found is None or found.method == "none":
            return
        if table.mode == "soft":
            text = 'found "soft", which cannot reconstruct: write reconstruct = { method = "none" }'
            self.add(place, "mode", text)
        if score is not None and score.nonfinite == "prune":
            text = 'its score has nonfinite = "prune": NaN and infinity cannot be reconstructed'
            self.add(place, "reconstruct", text)
        if found.tune and found.target == "own":
            key = "reconstruct.tune" if found is table.reconstruct else "reconstruct"
            self.add(place, key, 'tunes towards the dense model: leave target = "own" out, or tune = 0')
        if found.method == "refit":
            return
        if table.threshold is not None:
            text = 'needs a fixed number of blocks: give nnz or sparsity, or method = "refit"'
            self.add(place, "threshold", f'method = "admm" {text}')
        if score is not None and (score.kind, score.norm or 2, score.normalize) != ("magnitude", 2, None):
            text = 'ranks blocks itself and uses no score: remove the score, or write method = "refit"'
            self.add(place, "reconstruct", f'method = "admm" {text}')

    def clamp(self, place: str, key: str, table: ReconstructTable) -> None:
        """A key that says nothing without another one."""
        if table.clamp is not None and table.allocate != "loss":
            self.add(place, key, 'only allocate = "loss" takes this key')

    def _allocate(self, place: str, table: BudgetTable) -> None:
        """Rules whose instances cannot have budgets of their own."""
        found = table.reconstruct or self.spec.reconstruct
        if found is None or found.allocate != "loss":
            return
        instead = 'write reconstruct = { allocate = "uniform" }'
        if table.threshold is not None:
            text = f'allocate = "loss" shares a number of blocks: give nnz or sparsity, or {instead}'
            self.add(place, "threshold", text)
        if table.mode == "soft":
            self.add(place, "mode", f'found "soft", which allocate = "loss" does not go with: {instead}')
        if isinstance(table, CouplingTable) and table.across == "all":
            text = 'everything competes for one budget already, so that allocate = "loss" has none to share'
            self.add(place, "across", f"{text}: remove this coupling, or {instead}")

    def score(self, place: str, table: ScoreTable, within: str = "") -> None:
        """Keys that do not go with the kind of a score, or are missing."""
        allowed = table.kind_keys
        for key in ScoreTable.keys:
            if key not in {"kind", *allowed} and getattr(table, key) is not None:
                text = f'kind = "{table.kind}" takes no {key}: it takes {listed(allowed)}'
                self.add(place, within + key, text)
        if "file" in allowed and table.file is None:
            text = f'missing: kind = "{table.kind}" reads its values from a safetensors file or directory'
            self.add(place, f"{within}file", text)

    # -- scopes within others ---------------------------------------------------------------------

    def nests(self) -> None:
        """Names that `within` cannot have, and keys of inner and outer rules that do not go with it."""
        coupled, nested = self.spec.coupled_scopes(), self.spec.nested()
        for place, table in self.spec.tables.items():
            if isinstance(table, BudgetTable) and table.within is not None and place not in coupled:
                self._name_of_outer(place, table.within, coupled)
        self._circles(nested)
        for place, outer in nested.items():
            if outer not in coupled and place not in coupled:
                self._level(place, place)
                if outer not in nested:
                    self._level(place, outer)
                self._rebuilt_alike(place, outer)

    def _name_of_outer(self, place: str, name: str, coupled: Mapping[str, str]) -> None:
        own = place.partition(".")[2]
        scopes, couplings = self.declared["scope"], self.declared["scope_coupling"]
        blocks = [kind for kind in ("block", "block_coupling") if name in self.declared[kind]]
        if name in couplings:
            return
        if name in scopes:
            coupling = coupled.get(f"scope.{name}")
            if coupling is not None:
                text = f"[scope.{name}] is a member of [{coupling}], which decides what it keeps: name that"
                self.add(place, "within", text)
        elif blocks:
            text = f"{shown(name)} is a [{blocks[0]}]: name a [scope] or [scope_coupling]"
            self.add(place, "within", text)
        elif not self.problems.is_open("", "scope", "scope_coupling"):
            real = (each for each in scopes if each != own and f"scope.{each}" not in coupled)
            text = f"there is no [scope] or [scope_coupling] {shown(name)}"
            self.add(place, "within", text + self.problems.suggestion(name, chain(real, couplings)))

    def _circles(self, nested: Mapping[str, str]) -> None:
        """Rules that are within themselves, by way of others, too, or within very many others."""
        depths: dict[str, int] = {}
        has_circle = False
        for start in nested:
            path: dict[str, None] = {}
            place: str | None = start
            while place is not None and place not in depths:
                depths[place] = 0
                path[place] = None
                place = nested.get(place)
            if place in path:
                has_circle = True
                circle = [*path][[*path].index(place) :]
                names = [shown(each.partition(".")[2]) for each in circle[1:_MOST_SHOWN]]
                names += ["others"] if len(circle) > _MOST_SHOWN else []
                text = ", that within ".join([*names, "itself"])
                self.add(place, "within", f"it is within {text}: leave the key out of the outermost one")
            for each in reversed(path):
                depths[each] = 1 + depths.get(nested.get(each, ""), 0)
        deepest = max(depths, key=depths.__getitem__, default="")
        if depths.get(deepest, 0) > _MOST_LEVELS and not has_circle:
            text = f"it is within {depths[deepest] - 1} others, wanted {_MOST_LEVELS - 1} at most"
            self.add(deepest, "within", text)

    def _level(self, place: str, level: str) -> None:
        """Keys of a level that does not go with others, told of `place`, which is it or within it."""
        table = self.spec.tables.get(level)
        if not isinstance(table, BudgetTable):
            return
        what = "this rule" if level == place else f"[{level}]"
        found = table.reconstruct or self.spec.reconstruct
        if table.threshold is not None:
            text = f"{what} has a threshold, which keeps no fixed number: give nnz or sparsity"
            self.add(place, "within", text)
        for key, is_there in {
            'mode = "soft"': table.mode == "soft",
            "permute": bool(getattr(table, "permute", None)),
            "transposable": bool(getattr(table, "transposable", None)),
            'allocate = "loss"': found is not None and found.allocate == "loss",
        }.items():
            if is_there:
                self.add(place, "within", f"{what} has {key}, which nested rules cannot have: leave it out")

    def _rebuilt_alike(self, place: str, outer: str) -> None:
        """A rule that is rebuilt in another way than the one around it: all levels are solved for at once."""
        is_open = self.problems.is_open
        if is_open("", "reconstruct") or is_open("reconstruct", *ReconstructTable.keys):
            return
        tables = [self.spec.tables.get(each) for each in (place, outer)]
        ways = {
            reconstruct_of(table.reconstruct or self.spec.reconstruct, self.spec.directory)
            for table in tables
            if isinstance(table, BudgetTable)
        }
        if len(ways) > 1 and not (is_open(place, "reconstruct") or is_open(outer, "reconstruct")):
            text = f"this rule and [{outer}] have unlike reconstruct tables, but are rebuilt at once"
            self.add(place, "within", f"{text}: give one [reconstruct] for all levels")

    # -- names in expressions --------------------------------------------------------------------

    def references(self) -> None:
        """Every name in every expression; vars are known if they are declared, also those with problems."""
        spec, memberships = self.spec, _memberships(self.spec)
        are_known = not self.problems.is_open("", "block_coupling", "scope_coupling") and not any(
            isinstance(table, CouplingTable) and self.problems.is_open(place, table.members_key)
            for place, table in spec.tables.items()
        )
        common = {*self.declared["vars"], "config"}
        for place, table in spec.tables.items():
            own = _captures(spec, place)
            lent = _lent(spec, memberships[place]) if are_known else None
            if isinstance(table, TensorsTable) and table.variants:
                self._check_leaf(place, table, own or frozenset(), lent)
            elif isinstance(table, ScopeTable) and own is not None and lent is not None:
                self._check_names(place, {"shape": table.shape}, {*own, *lent, *common})
            if isinstance(table, BudgetTable) and own is not None:
                budget = {
                    key: getattr(table, key, None) for key in (*_BUDGET_KEYS, "permute", "transposable")
                }
                self._check_names(place, budget, {*own, *common})

    def _check_leaf(
        self, place: str, table: TensorsTable, own: Collection[str], lent: Collection[str] | None
    ) -> None:
        """The names in `where`, and in the view and blocks, of a table with its `own` captures.

        `lent` are captures of fellow members that it may use, None where these are not known.
        """
        for capture in sorted(own):
            text = f"the capture {shown(capture)} is"
            if capture in self.declared["vars"]:
                self.add(place, table.patterns_key, f"{text} a var too: rename one")
            elif capture in RESERVED:
                self.add(place, table.patterns_key, f"{text} a reserved name in expressions: rename it")
        known = {*own, *self.declared["vars"], "config", *FACTS}
        self._check_names(place, {"where": table.where}, known)
        if lent is not None:
            known |= {*lent}
            of_blocks = expressions_by_key(table)
            if isinstance(table, ScopeTable):  # a scope may span tensors
                self._check_names(place, {"shape": of_blocks.pop("shape")}, known.difference(FACTS))
            self._check_names(place, of_blocks, known)

    def _check_names(self, place: str, values: Mapping[str, object], known: Collection[str]) -> None:
        for key, value in values.items():
            for expression in expressions_of(value):
                for name in sorted(expression.names.difference(known)):
                    text = f"{shown(expression.text)}: {unknown_name(name, frozenset(known))}"
                    self.problems.add(place, key, text)


def _captures(spec: Spec, place: str) -> frozenset[str] | None:
    """All captures that instances of a table may have; None where that cannot be known."""
    variants = captures_of(spec, place)
    return frozenset().union(*variants) if variants else None


def _lent(spec: Spec, memberships: Iterable[Membership]) -> set[str] | None:
    """The captures that a table may use of fellow members: those which every coupling that it is part of has.

    None where a fellow member cannot be read.
    """
    found = []
    for coupling, member in memberships:
        fellows = [_captures(spec, part) for part in spec.parts(coupling) if part != member]
        if None in fellows:
            return None
        found.append({name for captures in fellows for name in captures or ()})
    return set.intersection(*found) if found else set()


def _memberships(spec: Spec) -> defaultdict[str, list[Membership]]:
    """The couplings of each table, as a member itself or as the block of one."""
    found: defaultdict[str, list[Membership]] = defaultdict(list)
    for coupling, table in spec.tables.items():
        for member in spec.parts(coupling) if isinstance(table, CouplingTable) else ():
            for part in (member, *spec.parts(member)) if spec.leaves(member) else ():
                found[part].append((coupling, member))
    return found
