"""Specs that are nearly right, bound to a small checkpoint: success, or an error of short lines.

`python -m tests.fuzzing.specs --rounds 100000 --seed 1` by hand; the suite runs a few rounds.
"""

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Callable

from sparseprune.errors import SparsepruneError
from sparseprune.spec import TensorInfo, bind, find_spec, list_specs, parse_spec

TENSORS = [
    TensorInfo(f"model.layers.{layer}.{name}.weight", "F32", shape)
    for layer in range(2)
    for name, shape in (
        ("mlp.gate_proj", (32, 16)),
        ("mlp.up_proj", (32, 16)),
        ("mlp.down_proj", (16, 32)),
        ("self_attn.q_proj", (16, 16)),
        ("self_attn.k_proj", (8, 16)),
        ("self_attn.v_proj", (8, 16)),
        ("self_attn.o_proj", (16, 16)),
        ("\x1b[31m[red]\n\x00", ()),
    )
]
CONFIG: dict[str, object] = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "huge": 10**400,
    "odd": [float("nan"), None, {"a": []}],
}
WORDS = (
    *("-1", "0", "1", str(2**63), "9" * 400, "1e400", "nan", "-inf", "true", "[]", "[[]]", "{}", '""'),
    *(
        '"config.odd[0]"',
        '"config.huge * config.huge"',
        '"1 // (layer - 1)"',
        '"layer[0]"',
        '"a" * 9',
        '"**"',
    ),
    *(
        '"{x}*{y}*{z}"',
        '"{x:**}{x}"',
        "'(a+)+b'",
        '"all"',
        '"\\u001b[31m[red]\\n"',
        '["0:-1", ":"]',
        '"m k -> k m"',
    ),
    *(
        "[scope.x]",
        "[vars]",
        "block",
        "shape",
        "across",
        "where",
        "exclude",
        "slice",
        "optional",
        "=",
        '"',
        "]",
    ),
)


def mutated(text: str, chance: random.Random) -> str:
    """The text of a spec with a few words or lines taken out, doubled, moved or changed."""
    lines = text.splitlines()
    for _ in range(chance.choice((1, 1, 2, 3, 5))):
        at = chance.randrange(len(lines))
        key, equals, _ = lines[at].partition("=")
        match chance.randrange(6):
            case 0 | 1 if equals:
                lines[at] = f"{key}= {chance.choice(WORDS)}"
            case 2:
                lines.insert(at, chance.choice(lines))
            case 3 if len(lines) > 1:
                del lines[at]
            case 4:
                lines.insert(at, f"{chance.choice(WORDS)} = {chance.choice(WORDS)}")
            case _:
                place = chance.randrange(len(lines[at]) + 1)
                lines[at] = (
                    lines[at][:place] + chance.choice(WORDS) + lines[at][place + chance.randrange(3) :]
                )
    return "\n".join(lines)


def fault(text: str, most_seconds: float = math.inf) -> str | None:
    """What is wrong with how a spec is taken; None where it is bound, or refused as promised, in time."""
    begun = time.process_time()
    try:
        bind(parse_spec(text), TENSORS, CONFIG)
    except SparsepruneError as error:
        lines = str(error).splitlines()
        if len(lines) > 51 or not all(line.isprintable() and len(line) <= 1000 for line in lines):
            return f"{len(lines)} problems are told, or one on more than a short line"
    except Exception as error:  # noqa: BLE001  (whatever it is, it is found)
        return f"{type(error).__name__}: {error}"
    seconds = time.process_time() - begun
    return f"it took {seconds:.1f} s" if seconds > most_seconds else None


def fuzz(rounds: int, seed: int, found: Callable[[str, str], None], most_seconds: float = math.inf) -> None:
    """So many specs; `found` is told of every one that ends in a fault, or takes too long."""
    chance = random.Random(seed)
    texts = [find_spec(name).text for name in list_specs()]
    for _ in range(rounds):
        text = mutated(chance.choice(texts), chance)
        said = fault(text, most_seconds)
        if said is not None:
            found(text, said)


def main() -> None:
    """Fuzz, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    faults: Counter[str] = Counter()

    def tell(text: str, said: str) -> None:
        faults[said[:60]] += 1
        if faults[said[:60]] == 1:
            print(said, text, sep="\n", flush=True)

    fuzz(asked.rounds, asked.seed, tell, most_seconds=1)
    print(f"{asked.rounds:,} specs, {faults.total():,} faults")


if __name__ == "__main__":
    main()
