"""Sections: which part of a config.json speaks of the layers, by which family, and what its keys come to.

Owns the way from a config to numbers. Changes nothing. Called by configuring.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sparseprune.errors import CheckpointError
from sparseprune.removal.families import family_of, model_types
from sparseprune.spec.expressions import Expression, ExpressionError, parse_expression
from sparseprune.spec.names import Environment, Names
from sparseprune.spec.problems import listed, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparseprune.removal.family import Family, Part
    from sparseprune.spec import Captures

_TEXT = "text_config"
OTHER_TOWERS = re.compile("vision|visual|audio|image|speech|resampler|perceiver|connector|projector|qformer")


@dataclass(frozen=True, slots=True)
class Section:
    """A family, and the object of a config that its keys stand in: at the top, or under `key`."""

    family: Family
    key: str | None
    values: Mapping[str, Any]

    def reaches(self, name: str) -> bool:
        """Whether a tensor may be one of its layers': towers of other kinds have configs of their own."""
        return self.key is None or OTHER_TOWERS.search(name) is None

    def spellings(self, key: str) -> tuple[str, ...]:
        """All spellings of a key that this config has: of two the class takes either."""
        alias = self.family.aliases.get(key)
        found = tuple(each for each in (key, alias) if each is not None and each in self.values)
        return found or (key,)

    def value(self, key: str) -> int:
        """What a key comes to; CheckpointError where it is no number."""
        return self.number(self.family.values.get(key, f"config.{self.spellings(key)[0]}"))

    def unit(self, part: Part) -> int:
        """How many indices one unit of a part has; CheckpointError where that is no number from 1 on."""
        return self.number(part.unit, least=1)

    def number(self, text: str, least: int = 0) -> int:
        """What an expression comes to; CheckpointError where that is no number, or less than `least`."""
        found = self.worth(text)
        if isinstance(found, bool) or not isinstance(found, int):
            raise CheckpointError(f"config.json: {text} comes to {shown(found)}, wanted an integer")
        if found < least:
            raise CheckpointError(f"config.json: {text} comes to {shown(found)}, wanted {least} or more")
        return found

    def of_layer(self, text: str, layer: int) -> object:
        """The value of an expression over the number of a layer; CheckpointError where it has none."""
        return self.worth(text, (("layer", layer),))

    def worth(self, text: str, captures: Captures = ()) -> object:
        """The value of an expression; CheckpointError where it has none."""
        try:
            return Names(Environment({}, self.values), captures).value(_parsed(text))
        except ExpressionError as error:
            raise CheckpointError(f"config.json: {error}") from error


def section_of(config: Mapping[str, Any] | None) -> Section:
    """The part of a config that counts layers and what they are made of; CheckpointError for unknown ones."""
    if config is None:
        raise CheckpointError(
            "there is no config.json, which has to say what becomes smaller; give the directory of a "
            "checkpoint that has one, or use apply, which keeps all shapes"
        )
    family = family_of(config.get("model_type"))
    if family is not None:
        return Section(family, None, config)
    nested = config.get(_TEXT)
    if isinstance(nested, dict):
        family = family_of(nested.get("model_type"))
        if family is not None:
            return Section(family, _TEXT, nested)
    found = shown(nested.get("model_type") if isinstance(nested, dict) else config.get("model_type"))
    raise CheckpointError(
        f"config.json: nothing is known of the model_type {found}, so that no key can carry the smaller "
        f"shapes; known are {listed(model_types())}; apply keeps all shapes"
    )


@lru_cache(maxsize=256)
def _parsed(text: str) -> Expression:
    return parse_expression(text)
