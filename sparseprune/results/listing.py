"""Results of specs: what ships with the package, and what fits a checkpoint. Plain data; api/ makes them."""

from typing import Annotated, Any, Literal

from sparseprune.results.fields import (
    ConfigChange,
    Count,
    Covers,
    DeclaredCoverage,
    Doc,
    Document,
    LayerCoverage,
    Record,
    Share,
    UncoveredKinds,
)


class SpecCoverage(Record):
    """Which share of a checkpoint a spec reaches."""

    covers: Covers
    layer_coverage: LayerCoverage
    declared_coverage: DeclaredCoverage
    uncovered: UncoveredKinds


class SpecRemoval(Record):
    """What remove would make of a checkpoint by a spec; all null if only the data tells how much goes."""

    config: Annotated[tuple[ConfigChange, ...] | None, Doc("what would change in config.json")]
    numel: Annotated[Count | None, Doc("parameters that would be left")]
    reason: Annotated[str | None, Doc("why nothing can be removed")]


class ShippedSpec(Document):
    """A spec; of one that was looked at with a checkpoint also what it would do there."""

    schema: Literal["sparseprune.specs.v1"] = "sparseprune.specs.v1"
    name: str
    summary: Annotated[str, Doc("its first comment: what it prunes")]
    aliases: Annotated[tuple[str, ...], Doc("earlier names, which still name it")]
    structures: Annotated[
        tuple[str, ...], Doc("the parts of models that it prunes by their structure, under any names")
    ]
    variables: Annotated[dict[str, Any], Doc("what --set may change: numbers, lists, or expressions")]
    text: Annotated[str, Doc("the TOML")]
    coverage: Annotated[
        Share | None, Doc("share of what it covers that it reaches, else of all matrices")
    ] = None
    reached: SpecCoverage | None = None
    removal: SpecRemoval | None = None
