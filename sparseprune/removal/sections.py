"""Sections of a config: the objects that speak of a model or of one of its towers, and paths of their keys.

Owns values by layer: lists, and objects with other values for single layers. Called by the rest of removal.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sparseprune.errors import CheckpointError
from sparseprune.removal.architectures import Architecture, architecture_of, model_types
from sparseprune.results.fields import ConfigChange
from sparseprune.spec.expressions import ExpressionError, Names, parse_expression
from sparseprune.spec.naming import MEMBER
from sparseprune.spec.problems import listed, shown
from sparseprune.spec.structures import nested_key, with_defaults

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparseprune.spec import Captures

Path = tuple[str | int, ...]
"""The keys on the way to a value of a config, and places in lists."""
PER_LAYER = "per_layer_config"  # objects with the values of single layers that are unlike


def path_shown(path: Path) -> str:
    """A path as people write it.

    >>> path_shown(("text_config", "intermediate_size", 3))
    'text_config.intermediate_size[3]'
    """
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def value_at(config: object, path: Path) -> Any:  # noqa: ANN401  (whatever a config has there)
    """The value at a path; None where there is none."""
    found: Any = config
    for key in path:
        inside = isinstance(found, list) and isinstance(key, int) and key < len(found)
        if not inside and not (isinstance(found, Mapping) and key in found):
            return None
        found = found[key]
    return found


def with_value(config: Any, path: Path, value: object) -> Any:  # noqa: ANN401
    """A config in which a path has another value, None to remove it; what is on the way is copied."""
    if not path:
        return value
    first, *rest = path
    if isinstance(config, list) and isinstance(first, int):
        return [*config[:first], with_value(config[first], tuple(rest), value), *config[first + 1 :]]
    before = config if isinstance(config, Mapping) else {}
    if not rest and value is None:
        return {key: each for key, each in before.items() if key != first}
    return {**before, first: with_value(before.get(first), tuple(rest), value)}


class Section(Struct, frozen=True):
    """The part of a config that speaks of one tower or of the whole model, and its row in the table."""

    path: Path
    values: Mapping[str, Any]
    architecture: Architecture

    @property
    def prefix(self) -> str:
        """The path of a key of the section before its name."""
        return f"{path_shown(self.path)}." if self.path else ""

    def path_of(self, key: str, layer: int | None = None) -> Path:
        """Where the value of a key is, for a layer, by its own values or by a list."""
        names = tuple(key.split("."))
        if layer is not None:
            own = (PER_LAYER, str(layer), key)
            if value_at(self.values, own) is not None:
                return (*self.path, *own)
            if isinstance(value_at(self.values, names), list):
                return (*self.path, *names, layer)
        return (*self.path, *names)

    def value(self, key: str, layer: int | None = None) -> object:
        """The value of a key, for a layer; by the table's expression where the config has none."""
        found = value_at(self.values, self.path_of(key, layer)[len(self.path) :])
        if found is None and key in self.architecture.values:
            return self.evaluated(self.architecture.values[key])
        return found

    def number(self, text: str, least: int = 0) -> int:
        """The value of an expression; CheckpointError where it is no integer, or less than `least`."""
        found = self.evaluated(text)
        if isinstance(found, bool) or not isinstance(found, int):
            raise CheckpointError(f"config.json: {text} comes to {shown(found)}, wanted an integer")
        if found < least:
            raise CheckpointError(f"config.json: {text} comes to {shown(found)}, wanted {least} or more")
        return found

    def evaluated(self, text: str, captures: Captures = ()) -> object:
        """The value of an expression over the section's keys, and a layer's number if it is given."""
        try:
            return Names({"config": self.values}, captures).value(_parsed(text))
        except ExpressionError as error:
            raise CheckpointError(f"config.json: {error}") from error


_parsed = lru_cache(maxsize=256)(parse_expression)


class Sections(Struct, frozen=True):
    """All sections of a config, found by the names of tensors."""

    config: Mapping[str, Any]
    known: dict[Path, Section] = {}
    paths: dict[str, Path] = {}  # by names with stars for numbers

    @staticmethod
    def of(config: Mapping[str, Any] | None) -> Sections:
        """The sections of a config; CheckpointError without one."""
        if config is None:
            text = "give the directory of a checkpoint that has one, or use apply, which keeps all shapes"
            raise CheckpointError(f"there is no config.json, which has to say what becomes smaller; {text}")
        return Sections(config)

    def at(self, name: str) -> Section:
        """The section that speaks of a tensor or module; CheckpointError for unknown models."""
        path = self.path_at(name)
        if path not in self.known:
            values = with_defaults(value_at(self.config, path)) if path else self.config
            architecture = architecture_of(values.get("model_type"))
            if architecture is None:
                raise CheckpointError(_unknown(path, values.get("model_type")))
            self.known[path] = Section(path, values, architecture)
        return self.known[path]

    def even_unknown(self, path: Path) -> Section:
        """The section at a path, whether or not the table knows its model."""
        values = value_at(self.config, path)
        known = architecture_of(values.get("model_type"))
        return Section(path, values, Architecture(()) if known is None else known)

    def path_at(self, name: str) -> Path:
        """The path of the section that speaks of a tensor or module."""
        form = MEMBER.sub("*", name)
        if form not in self.paths:
            self.paths[form] = self._path_of(form)
        return self.paths[form]

    def _path_of(self, name: str) -> Path:
        path: list[str] = []
        values: Any = self.config
        while (key := nested_key(values, name)) is not None and len(path) < 4:
            if "model_type" not in values[key] and architecture_of(values.get("model_type")) is not None:
                break  # no config of its own: the one around it speaks of the model
            path.append(key)
            values = values[key]
        return tuple(path)


def _unknown(path: Path, model_type: object) -> str:
    known = f"so that no key can carry the smaller shapes; known are {listed(first_of(model_types(), 20))}"
    found = f"{path_shown((*path, 'model_type'))} {shown(model_type)}"
    return f"config.json: nothing is known of the {found}, {known}; apply keeps all shapes"


def first_of(names: Sequence[str], most: int) -> list[str]:
    """The first names, and how many there are besides."""
    return [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]


def as_model(
    config: Mapping[str, Any] | None, model_type: str | None
) -> tuple[Mapping[str, Any] | None, tuple[ConfigChange, ...]]:
    """The config as one of another model type whose class computes the same, and what changes by that.

    Raises:
        CheckpointError: no class of that type is known to compute the same.
    """
    if config is None or model_type is None:
        return config, ()
    path = Sections(config).path_at("model.layers.0")
    values = value_at(config, path)
    row, own = architecture_of(values.get("model_type")), shown(values.get("model_type"))
    if row is None or model_type not in row.kin:
        known = listed(row.kin) if row is not None and row.kin else "none"
        text = f"wanted a model type whose class computes the same as that of {own}; known are {known}"
        raise CheckpointError(f"--as {model_type}: {text}")
    for key in row.unlike:
        if values.get(key):
            raise CheckpointError(f"--as {model_type}: config.json has {key}, which that class lacks")
    for keys in row.told:
        if all(values.get(key) is None for key in keys):
            text = f"config.json has no {keys[0]}, for which that class has another default"
            raise CheckpointError(f"--as {model_type}: {text}")
    turned: dict[str, Any] = {"model_type": model_type, **row.kin[model_type]}
    names = values.get("architectures")
    if isinstance(names, list):
        old, new = str(values["model_type"]).capitalize(), model_type.capitalize()
        turned["architectures"] = [str(name).replace(old, new, 1) for name in names]
    changes = [
        ConfigChange(key=path_shown((*path, key)), before=values.get(key), after=value)
        for key, value in turned.items()
        if key not in values or values[key] != value
    ]
    return with_value(config, path, {**values, **turned}), tuple(changes)
