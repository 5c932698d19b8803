"""What was typed: commands, options, progress and exit codes.

The only room that prints, reads flags and exits. Parsing arguments and `--help` import no torch: each
command loads what it needs when it runs.
"""


def main() -> None:
    """Entry point of the console script and of `python -m sparseprune`."""
    import gc
    import os
    import signal
    import sys

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # While nothing has begun, and when all is over, Ctrl-C ends the process without a word.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What modules make is no garbage: looking for some takes a tenth of the start.
    gc.set_threshold(50_000)
    # Plugins of pydantic are looked for in everything that is installed.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # Threads of our own share the work; a pool of numpy's would end the process where it gets no thread.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from sparseprune.cli.console import open_streams

    open_streams()
    from sparseprune.cli.console import ended

    def run() -> None:
        from sparseprune.cli.app import app

        app()

    code = ended(run, debug="--debug" in sys.argv)
    if isinstance(code, int) and code > 128:
        # After a signal nothing is waited for, and no library goes down around its own threads.
        os._exit(code)
    sys.exit(code)
