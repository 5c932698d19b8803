"""What was typed: commands, options, progress and exit codes.

The only room that prints, reads flags and exits. Parsing arguments and `--help` import no torch: each
command loads what it needs when it runs.
"""


def main() -> None:
    """Entry point of the console script and of `python -m sparseprune`."""
    from sparseprune.cli.app import app

    app()
