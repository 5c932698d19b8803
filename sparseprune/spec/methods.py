"""How a rule ranks its blocks and what becomes of losers and survivors: `[score]`, `[reconstruct]`, `mode`.

Owns which keys go together and what they become (`Score`, `Reconstruct`, `Soft`); paths become absolute here.
Knows no other table. Used by the models of the tables, by `checking` and `binding`.
"""

from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from sparseprune.spec.bound import Reconstruct, Score, Soft
from sparseprune.spec.expressions import LARGEST
from sparseprune.spec.problems import listed

if TYPE_CHECKING:
    from sparseprune.spec.schema import BudgetTable

Kind = Literal["magnitude", "random", "values", "wanda", "obd", "blocks"]
FilePath = Annotated[StrictStr, Field(min_length=1, pattern=r"^[^\x00]*$")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]

# What each kind of score takes beside its kind; `file` is needed where it is allowed.
SCORE_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "magnitude": ("norm", "normalize", "nonfinite"),
        "random": ("seed",),
        "values": ("file", "nonfinite"),
        "wanda": ("file", "input_dim", "nonfinite"),
        "obd": ("file", "input_dim", "nonfinite"),
        "blocks": ("file",),
    }
)
SOFT_KEYS = ("k_weight", "scale", "conditioners", "max_iter", "atol", "eps")


def _not_a_boolean(value: object) -> object:
    """`true` equals 1, and is no norm."""
    if isinstance(value, bool):
        raise ValueError("no norm")  # noqa: TRY004  (pydantic turns ValueErrors into problems)
    return value


class ScoreTable(BaseModel):
    """`[score]`, or `score = {...}` in an outermost table."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    kind: Kind = Field("magnitude", description=f"one of {listed(SCORE_KEYS, 'or')}")
    norm: Annotated[Literal[1, 2, "inf"], BeforeValidator(_not_a_boolean)] | None = Field(
        None, description='1, 2 or "inf"'
    )
    normalize: Literal["rms"] | None = Field(None, description='"rms": the root mean square of each block')
    seed: Annotated[StrictInt, Field(ge=0, le=LARGEST)] | None = Field(
        None, description="an integer of 0 or more"
    )
    file: FilePath | None = Field(
        None, description="the path of a safetensors file or directory, relative to the spec"
    )
    input_dim: Annotated[StrictInt, Field(ge=-LARGEST, le=LARGEST)] | None = Field(
        None, description="an integer: the dimension of the weight along which its input features lie"
    )
    nonfinite: Literal["error", "prune"] | None = Field(
        None, description='"error" or "prune": what becomes of NaN and infinity among the weights and scores'
    )


class ReconstructTable(BaseModel):
    """`[reconstruct]`, or `reconstruct = {...}` in an outermost table."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    method: Literal["refit", "admm", "none"] = Field("admm", description='one of "refit", "admm" and "none"')
    file: FilePath | None = Field(
        None, description="the path of a statistics file or directory, as calibrate writes it"
    )
    damp: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = Field(
        0.01,
        description="a number of 0 or more: how much of the mean of the Hessian's diagonal is added to it",
    )
    input_dim: Annotated[StrictInt, Field(ge=-LARGEST, le=LARGEST)] | None = Field(
        None, description="an integer: the dimension of the weight along which its input features lie"
    )


class MethodTable(BaseModel):
    """What an outermost scope or coupling has beside its budget."""

    model_config = ConfigDict(defer_build=True)

    score: ScoreTable | None = Field(None, description='a table such as { kind = "random", seed = 1 }')
    reconstruct: ReconstructTable | None = Field(
        None, description='a table such as { file = "stats", method = "admm" }'
    )
    mode: Literal["hard", "soft"] | None = Field(
        None, description='"hard" (losers become zero) or "soft" (every block shrinks by the threshold)'
    )
    k_weight: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None = Field(
        None, description="a number of 0 or more: how much the first pruned score counts in the threshold"
    )
    scale: StrictBool | None = Field(
        None,
        description="true or false: whether the threshold grows with the root of a block's size",
    )
    conditioners: FilePath | None = Field(
        None, description="the path of a safetensors file or directory, relative to the spec"
    )
    max_iter: Annotated[StrictInt, Field(ge=1, le=LARGEST)] | None = Field(
        None, description="an integer of 1 or more"
    )
    atol: Positive | None = Field(None, description="a number above 0")
    eps: Positive | None = Field(None, description="a number above 0")


METHOD_KEYS = tuple(MethodTable.model_fields)
_NO_STATISTICS = "missing: what calibrate wrote, a safetensors file or directory"


def wrong_score(table: ScoreTable) -> Iterator[tuple[str, str]]:
    """Keys that do not go with the kind of a score, and what to say about each."""
    allowed = SCORE_KEYS[table.kind]
    for key in ScoreTable.model_fields:
        if key not in {"kind", *allowed} and getattr(table, key) is not None:
            yield key, f'kind = "{table.kind}" takes no {key}: it takes {listed(allowed)}'
    if "file" in allowed and table.file is None:
        yield "file", f'missing: kind = "{table.kind}" reads its values from a safetensors file or directory'


def wrong_common_reconstruct(table: ReconstructTable) -> Iterator[tuple[str, str]]:
    """What is wrong in [reconstruct] itself."""
    if table.method != "none" and table.file is None:
        yield "file", _NO_STATISTICS


def wrong_reconstruct(
    table: "BudgetTable", score: ScoreTable | None, reconstruct: ReconstructTable | None
) -> Iterator[tuple[str, str]]:
    """What does not go with how a rule is reconstructed; it follows this `score` and this `reconstruct`."""
    if reconstruct is None or reconstruct.method == "none":
        return
    if reconstruct.file is None and reconstruct is table.reconstruct:
        yield "reconstruct.file", _NO_STATISTICS
    if table.mode == "soft":
        yield "mode", 'found "soft", which goes without reconstruct; say reconstruct = { method = "none" }'
    if score is not None and score.nonfinite == "prune":
        yield "reconstruct", 'its score says nonfinite = "prune": nothing makes up for what is not finite'
    if reconstruct.method == "refit":
        return
    if table.threshold is not None:
        yield (
            "threshold",
            'method = "admm" keeps a number of blocks: give nnz or sparsity, or method = "refit"',
        )
    if score is not None and (score.kind, score.norm or 2, score.normalize) != ("magnitude", 2, None):
        text = 'method = "admm" ranks by what it reconstructs, so that no score has a part'
        yield "reconstruct", f'{text}: remove the score, or say method = "refit"'


def wrong_method(table: "BudgetTable", common: ScoreTable | None) -> Iterator[tuple[str, str]]:
    """Keys that do not go with the mode of a rule, and what to say about each; `common` is [score]."""
    if table.mode != "soft":
        for key in SOFT_KEYS:
            if getattr(table, key) is not None:
                yield key, 'this goes with mode = "soft" only'
        return
    score = table.score or common
    if score is not None and score.nonfinite == "prune":
        yield "mode", 'found "soft", but its score says nonfinite = "prune", which goes with "hard" only'
    if table.threshold is not None and table.k_weight is not None:
        yield "k_weight", "this goes with nnz or sparsity, from which the threshold is made; here it is given"


def score_of(table: ScoreTable | None, directory: Path) -> Score:
    """What a score table says; without one, the magnitude."""
    if table is None:
        return Score()
    return Score(
        kind=table.kind,
        norm=inf if table.norm == "inf" else float(table.norm or 2),
        normalize=table.normalize is not None,
        seed=table.seed or 0,
        file=None if table.file is None else _absolute(table.file, directory),
        input_dim=table.input_dim,
        nonfinite=table.nonfinite or "error",
    )


def reconstruct_of(table: ReconstructTable | None, directory: Path) -> Reconstruct | None:
    """How survivors make up for what was pruned, if they do."""
    if table is None or table.method == "none" or table.file is None:
        return None
    return Reconstruct(_absolute(table.file, directory), table.method, table.damp, table.input_dim)


def soft_of(table: "BudgetTable", directory: Path) -> Soft | None:
    """How a rule shrinks its blocks, if it does."""
    if table.mode != "soft":
        return None
    plain = {key: getattr(table, key) for key in SOFT_KEYS if key != "conditioners"}
    given = {key: value for key, value in plain.items() if value is not None}
    path = None if table.conditioners is None else _absolute(table.conditioners, directory)
    return Soft(conditioners=path, **given)


def _absolute(path: str, directory: Path) -> Path:
    return Path(directory, path).absolute()
