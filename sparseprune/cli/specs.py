"""`specs`: the specs that ship with the package, those that fit a checkpoint, or one of them whole."""

import textwrap
from collections.abc import Iterator

from sparseprune import api
from sparseprune.cli.command import Call, Json, command
from sparseprune.cli.console import print_result, print_table
from sparseprune.errors import SpecError
from sparseprune.results import ShippedSpec
from sparseprune.spec.problems import shown


def show_specs(call: "Call[dict[str, ShippedSpec]]", json: Json = False) -> None:
    found = call.function(**call.options).values()
    if json:
        documents = ",\n".join(one.to_json() for one in found)
        print_result(f"[\n{textwrap.indent(documents, '  ')}\n]" if documents else "[]")
        return
    if call.options["name"] is not None and call.options["checkpoint"] is None:
        print_result("".join(one.text for one in found).rstrip("\n"))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for one in found:
        table.add_row(one.name, Text("\n".join([one.summary, _knobs(one), *_fit_lines(one)])))
    print_table(table)
    if not found:
        call.note(_why_none(call))


specs = command(api.specs, show_specs, works=False)


def _knobs(found: ShippedSpec) -> str:
    """What a spec is about, and what can be set, with its values as they are typed."""
    about = ", ".join(one.replace("-", " ") for one in found.structures) or "by names of tensors"
    words = ["--set", *(f"{name}={shown(value)}" for name, value in found.variables.items())]
    return f"{about}; {' '.join(words) if found.variables else 'nothing to set'}"


def _why_none(call: "Call[dict[str, ShippedSpec]]") -> str:
    """Why no spec fits, by what one says that is for all matrices."""
    try:
        call.function(**{**call.options, "name": "2of4"})
    except SpecError as error:
        return f"no spec that ships with sparseprune fits {call.options['checkpoint']}: {error.args[0]}"
    return ""


def _fit_lines(found: ShippedSpec) -> Iterator[str]:
    """What a spec would do to the checkpoint that was looked at."""
    if found.reached is None or found.removal is None:
        return
    from sparseprune.report.coverage import coverage_text
    from sparseprune.report.pruning import config_text

    reached = coverage_text(found.reached)
    if reached is not None:
        yield f"reaches {reached.partition(';')[0]}"
    removal = found.removal
    if removal.reason is not None:
        yield f"remove: nothing: {removal.reason}"
    elif removal.numel is None:
        yield "remove: whole slices, as many as the data tells"
    else:
        changes = [config_text(one) for one in removal.config or ()]
        yield f"remove: {', '.join([*changes, f'{removal.numel:,} parameters left'])}"
