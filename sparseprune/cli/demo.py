"""`demo`: a small trained decoder with texts for it, pruned, inspected and evaluated, and what to try next.

Owns how the decoder, which ships in the folder beside this module, comes to a new folder together with two
parts of Python's help. Knows nothing of how it was trained (tests/benchmarks does).
"""

import shlex
import shutil
import zlib
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from sparseprune import api
from sparseprune.api.options import Option
from sparseprune.cli.apply import show_pruned
from sparseprune.cli.command import Call, command
from sparseprune.cli.evaluate import show_evaluated
from sparseprune.cli.inspect import show_inspected
from sparseprune.errors import CheckpointError

SHIPPED = Path(__file__).with_name("decoder")
_CORPUS, _HELD_OUT = "corpus.txt", "held-out.txt"
_FEW = 32  # sequences: enough for a small model, and a quarter of the time
_REST = f"""
Rebuild the weights that are left, so that the model's loss rises least:

  sparseprune apply decoder 2of4 --text {_CORPUS} --sequences {_FEW} --gradients -o rebuilt
  sparseprune eval rebuilt --against decoder --text {_HELD_OUT} --sequences {_FEW}

Or make the model smaller: cut out a quarter of the channels of each MLP:

  sparseprune calibrate decoder --text {_CORPUS} --sequences {_FEW} -o stats
  sparseprune remove decoder mlp-channels --stats stats -o smaller
  sparseprune eval smaller --against decoder --text {_HELD_OUT} --sequences {_FEW}

Or see what else fits this model:

  sparseprune specs --for decoder"""


Folder = Annotated[Path, Option("[FOLDER]", "A new folder for all files.", typed=Path)]


def _demo_options() -> None:
    """Make a small trained model with texts, prune it, and show what came out.

    The model is a decoder with half a million parameters. It was trained on corpus.txt and has not seen
    held-out.txt. At the end, the command lists what to try next in that folder.

    Example: sparseprune demo ./demo
    """


def show_demo(call: "Call[None]", folder: Folder = Path("demo")) -> None:  # noqa: ARG001
    """Make, prune, inspect; evaluate where transformers is there."""
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; name a folder that is not there yet")
    write_decoder(folder / "decoder")
    print(f"{folder / 'decoder'}: a small Llama with its tokenizer, trained on {_CORPUS}")
    runs = find_spec("transformers") is not None
    texts = texts_of_help()
    if texts is None:
        print("no texts: this Python has no module pydoc_data; give --text a file of yours below")
    else:
        for name, text in zip((_CORPUS, _HELD_OUT), texts, strict=True):
            (folder / name).write_text(text, encoding="utf-8")
        print(f"{folder / _CORPUS}, {folder / _HELD_OUT}: Python's help on different topics")
    with chdir(folder):
        _prune(evaluated=runs and texts is not None)
    print(f"\nGo on in that folder: cd {shlex.quote(str(folder))}")
    if not runs:
        print("This takes transformers: pip install 'sparseprune[calibrate]' (in a clone: '.[calibrate]')")
    print(_REST)


demo = command(_demo_options, show_demo, "demo", works=False)


def write_decoder(folder: Path) -> None:
    """The shipped decoder as a checkpoint: two shards with their index, config.json and the tokenizer."""
    folder.mkdir(parents=True)
    for file in SHIPPED.iterdir():
        shutil.copyfile(file, folder / file.name)


def texts_of_help() -> tuple[str, str] | None:
    """Python's help on two thirds of its topics, and on the others; None where this Python has none.

    A topic belongs to the same text in every version of Python. No paragraph is there twice.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return None
    parts: tuple[dict[str, None], dict[str, None]] = {}, {}
    for name in sorted(topics):
        parts[zlib.crc32(name.encode()) % 3 == 2].update(dict.fromkeys(topics[name].strip().split("\n\n")))
    corpus, others = parts
    held_out = [paragraph for paragraph in others if paragraph not in corpus]
    return "\n\n".join(corpus) + "\n", "\n\n".join(held_out) + "\n"


def _prune(*, evaluated: bool) -> None:
    """In the folder of the demo."""
    decoder, output = Path("decoder"), Path("magnitude")
    print("\nKeep the larger 2 of every 4 neighbouring weights in the matrices of all layers:\n")
    _show("apply", decoder, "2of4", "-o", output)
    pruning = {"checkpoint": decoder, "spec": "2of4", "output": output, "device": "cpu"}
    show_pruned(Call(api.apply, pruning))
    print()
    _show("inspect", output, "--by", "module")
    show_inspected(Call(api.inspect, {"checkpoint": output, "by": "module"}, quiet=True))
    if evaluated:
        print("\nHow much worse it predicts text:\n")
        _show("eval", output, "--against", decoder, "--text", _HELD_OUT, "--sequences", _FEW)
        texts = {"text": [Path(_HELD_OUT)], "sequences": _FEW}
        reading = {"checkpoint": output, "against": decoder, "device": "cpu", **texts}
        show_evaluated(Call(api.evaluate, reading))


def _show(*words: object) -> None:
    print(f"$ sparseprune {shlex.join(map(str, words))}", flush=True)
