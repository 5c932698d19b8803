"""`eval`: its table, the tokens where two models differ most, and what `--require` may ask.

Owns how means stand beside their errors. Looks at a result alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from sparseprune.errors import SparsepruneError, printable
from sparseprune.report.requirements import parse_requirement, shortfall
from sparseprune.report.tables import plain_table
from sparseprune.report.wording import many
from sparseprune.spec.problems import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from sparseprune.report.requirements import Requirement
    from sparseprune.results import Evaluation
    from sparseprune.results.evaluating import GuessedToken

PREDICTED = ("perplexity", "perplexity_per_byte")
COMPARED = ("kl", "top1", "dense_perplexity", "dense_perplexity_per_byte")
EMBEDDED = ("cosine", "cosine_first")
FIELDS = (*PREDICTED, *COMPARED, *EMBEDDED)
_FEW = 5  # tokens that the table shows


def parse_requirements(texts: Sequence[str], *, compares: bool) -> list[Requirement]:
    """Conditions on the means; SparsepruneError for what they are not about.

    `compares`: there is a dense model to compare with.
    """
    found = [parse_requirement(text, FIELDS) for text in texts]
    for one in found:
        if one.names or one.comparison is None:
            raise SparsepruneError(
                f"--require {shown(one.text)}: asks for tensors, wanted a mean such as kl<=0.05"
            )
        if one.comparison.field not in PREDICTED and not compares:
            raise SparsepruneError(f"{one.comparison.field} is not known without --against DENSE")
    return found


def refuse_unknown(requirements: Sequence[Requirement], kind: str, where: str) -> None:
    """SparsepruneError for a condition on a mean that such a model has not."""
    known = EMBEDDED if kind == "encoder" else (*PREDICTED, *COMPARED)
    for one in requirements:
        if one.comparison is not None and one.comparison.field not in known:
            has = ", ".join(known)
            raise SparsepruneError(
                f"--require {shown(one.text)}: {where} is of the kind {kind}, which has {has}"
            )


def failures(requirements: Sequence[Requirement], found: Evaluation) -> list[str]:
    """A line for each condition that does not hold; a mean that is not finite fulfils none."""
    lines = []
    for one in requirements:
        if one.comparison is None:
            continue
        field = one.comparison.field
        reason = shortfall(one.comparison, one.what, getattr(found, field))
        if reason is not None:
            error = getattr(found.errors, field)
            spread = "" if error is None else f" +- {error:.2g}"
            lines.append(f"{printable(found.input)}: {reason}{spread}")
    return lines


def evaluation_table(found: Evaluation, *, all_tokens: bool) -> RenderableType:
    """Means with their errors, what they rest on, and the tokens where both models differ most."""
    titles = [printable(found.input)]
    if found.kind != "encoder" and found.against is not None:
        titles.append(printable(found.against))
    table = plain_table(("",), titles, _rows(found))
    parts: list[RenderableType] = [table, Text(_basis(found))]
    if found.worst:
        parts += [Text("\nwhere they differ most:"), _worst(found, all_tokens=all_tokens)]
    return Group(*parts)


def with_error(mean: float | None, error: float | None, scale: float = 1, unit: str = "") -> str:
    """A mean in as many digits as its standard error leaves it, two of that.

    >>> with_error(54.3127, 0.331), with_error(0.9121, 0.0042, 100, "%"), with_error(3.0, None)
    ('54.31 +- 0.33', '91.21% +- 0.42%', '3.000')
    >>> with_error(1.0, 0.0, 100, "%"), with_error(None, None)
    ('100.0% +- 0.0%', 'not finite')
    """
    if mean is None:
        return "not finite"
    value, spread = mean * scale, (error or 0.0) * scale
    leading = math.floor(math.log10(spread or abs(value) or 1.0))
    digits = min(max((1 if spread else 3) - leading, 0), 9)
    text = f"{value:,.{digits}f}{unit}"
    return text if error is None else f"{text} +- {spread:,.{digits}f}{unit}"


def _rows(found: Evaluation) -> list[list[str]]:
    errors = found.errors
    if found.kind == "encoder":
        return [
            ["cosine of mean-pooled embeddings", with_error(found.cosine, errors.cosine)],
            ["cosine of first tokens", with_error(found.cosine_first, errors.cosine_first)],
        ]
    rows = [
        ["perplexity of a token", with_error(found.perplexity, errors.perplexity)],
        ["perplexity of a byte", with_error(found.perplexity_per_byte, errors.perplexity_per_byte)],
    ]
    if found.against is None:
        return rows
    rows[0].append(with_error(found.dense_perplexity, errors.dense_perplexity))
    rows[1].append(with_error(found.dense_perplexity_per_byte, errors.dense_perplexity_per_byte))
    return [
        *rows,
        ["KL to the dense model, nats a token", with_error(found.kl, errors.kl), ""],
        ["same most probable token", with_error(found.top1, errors.top1, 100, "%"), ""],
    ]


def _basis(found: Evaluation) -> str:
    """What the means rest on."""
    windows = f"{many(found.sequences, 'window')} of {found.length:,}"
    if found.kind == "encoder":
        return f"over {many(found.tokens, 'token')} in {windows}, against {printable(found.against or '')}"
    # A tokenizer need not know text; one that does has some bytes for its tokens.
    stand = f" ({many(found.bytes, 'byte')})" if found.bytes else ""
    return f"over {many(found.tokens, 'predicted token')}{stand} in {windows}"


def _worst(found: Evaluation, *, all_tokens: bool) -> RenderableType:
    names = ("text before", "next", printable(found.input), printable(found.against or ""))
    table = plain_table(names, ("KL", "window", "position"), ())
    for one in found.worst if all_tokens else found.worst[:_FEW]:
        guesses = map(_guess, (one.guess, one.dense_guess))
        numbers = ("?" if one.kl is None else f"{one.kl:.3g}", str(one.window), str(one.position))
        table.add_row(*map(Text, (printable(one.before), printable(one.token), *guesses, *numbers)))
    return table


def _guess(one: GuessedToken) -> str:
    return f"{printable(one.text)} {'?' if one.probability is None else format(one.probability, '.0%')}"
