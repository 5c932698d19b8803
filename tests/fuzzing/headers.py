"""Damaged headers by the hundred thousand: what our reader says of each, beside the safetensors package.

Run by hand: `python -m tests.fuzzing.headers --rounds 200000 --seed 1 --keep FOLDER`. A header on which the
two differ, or that ends in anything but a verdict, is kept as a file; faults found so become cases of
the tables in tests/checkpoint/test_header.py.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sparseprune.checkpoint.header import read_header
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import CheckpointError
from tests.checkpoint.headers import STRICTER, loaded, tensor, verdict_of_package

NUMBERS = (
    "0",
    "-0",
    "1",
    "1.0",
    "1e0",
    "10e-1",
    "01",
    "+1",
    "0x1",
    "-1",
    "2",
    "16",
    "1E2",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1" * 30,
    "1e400",
    "-1e400",
    "1e-400",
    "0.5",
    "NaN",
    "Infinity",
    "true",
    "null",
    '"1"',
    "[]",
    "{}",
)
WORDS = (
    '"a"',
    '"\\u0061"',
    '"\\ud83d\\ude00"',
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\/"',
    '"\\x"',
    '"\t"',
    '"é"',
    '"\\u0000"',
    '""',
    '"__metadata__"',
    '"dtype"',
    '"shape"',
    '"data_offsets"',
    "'a'",
    '"F32"',
    '"U8"',
    '"F4"',
    '"f32"',
    '"BF16 "',
    '"C64"',
    "nul",
    "tru",
    "//",
    "/**/",
    "\ufeff",
    "\x00",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
)
SPACES = ("", "", "", " ", "\n", "\t", "\r", "\x0b", "\xa0", "  ")


def documents(chance: random.Random) -> tuple[dict[str, Any], int]:
    """A legal document, and the bytes of data that it wants."""
    document: dict[str, Any] = {}
    if chance.random() < 0.4:
        document["__metadata__"] = {
            f"k{n}": chance.choice(("v", "", "é")) for n in range(chance.randrange(3))
        }
    begin = 0
    for number in range(chance.randrange(4)):
        dtype = chance.choice(list(DTYPES))
        shape = [chance.choice((0, 1, 2, 3, 4, 8)) for _ in range(chance.randrange(4))]
        bits = DTYPES[dtype].bits
        for size in shape:
            bits *= size
        document[chance.choice(("t", "a.b", "é", "")) + str(number)] = tensor(
            dtype, shape, [begin, begin + bits // 8]
        )
        begin += bits // 8
    return document, begin


def shifted(document: dict[str, Any], chance: random.Random) -> None:
    """One tensor laid out wrongly: moved, stretched, over another, with another shape or dtype."""
    names = [name for name in document if name != "__metadata__"]
    if not names:
        return
    entry, other = document[chance.choice(names)], document[chance.choice(names)]
    begin, end = entry["data_offsets"]
    step = chance.choice((-8, -1, 1, 2, 8, 2**63, 2**64 - 1))
    match chance.randrange(6):
        case 0:
            entry["data_offsets"] = [begin + step, end + step]
        case 1:
            entry["data_offsets"] = [begin, end + step]
        case 2:
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        case 3:
            entry["data_offsets"] = list(other["data_offsets"])
        case 4:
            entry["shape"] = [*entry["shape"], chance.choice((0, 1, 2, 2**32, 2**61, 2**63, 2**64 - 1))]
        case _:
            entry["dtype"] = chance.choice(list(DTYPES))


def spelled(value: object, chance: random.Random, odd: float) -> str:
    """JSON with odd spellings here and there."""
    space = chance.choice(SPACES) if chance.random() < odd else ""
    if isinstance(value, dict):
        members = [
            f"{spelled(key, chance, odd)}:{spelled(inner, chance, odd)}{space}"
            for key, inner in value.items()
        ]
        if members and chance.random() < odd:
            members.append(chance.choice(members))
        if chance.random() < odd:
            members.append(f"{chance.choice(WORDS)}:{chance.choice(NUMBERS + WORDS)}")
        chance.shuffle(members)
        return "{" + ",".join(members) + "}"
    if isinstance(value, list | tuple):
        return "[" + space + ",".join(spelled(inner, chance, odd) for inner in value) + "]"
    if chance.random() < odd / 2:
        return chance.choice(NUMBERS + WORDS)
    if isinstance(value, str) and chance.random() < odd:
        return '"' + "".join(f"\\u{ord(c):04x}" if chance.random() < 0.5 else c for c in value) + '"'
    return space + json.dumps(value, ensure_ascii=chance.random() < 0.5)


def damaged(text: bytes, chance: random.Random) -> bytes:
    """Some bytes flipped, cut, doubled, or put in."""
    content = bytearray(text)
    for _ in range(chance.choice((0, 0, 0, 0, 1, 1, 2, 5))):
        at = chance.randrange(len(content) + 1)
        match chance.randrange(5):
            case 0 if at < len(content):
                content[at] ^= 1 << chance.randrange(8)
            case 1:
                del content[at : at + chance.choice((1, 1, 2, 9))]
            case 2:
                content[at:at] = chance.choice(WORDS + NUMBERS + SPACES).encode()
            case 3:
                content[at:at] = content[at : at + chance.randrange(40)]
            case _:
                content[at:at] = bytes([chance.randrange(256)])
    return bytes(content)


def header(chance: random.Random) -> bytes:
    """A file that is nearly one."""
    document, nbytes = documents(chance)
    if chance.random() < 0.25:
        shifted(document, chance)
        ends = [entry["data_offsets"][1] for name, entry in document.items() if name != "__metadata__"]
        # As much data as the layout wants, so that only its gaps and overlaps are wrong.
        nbytes = chance.choice((nbytes, min(max(ends, default=0), 4096)))
    text = damaged(
        spelled(document, chance, chance.choice((0, 0.02, 0.1))).encode("utf-8", "surrogatepass"), chance
    )
    text += b" " * chance.choice((0, 0, 1, 7)) + chance.choice((b"", b"", b"", b"\0", b"\n", b"{}"))
    length = len(text) + chance.choice((0,) * 12 + (1, -1, 8, 1 << 20, 1 << 40, (1 << 63) - 1))
    data = chance.randbytes(max(0, nbytes + chance.choice((0,) * 8 + (1, -1, 8))))
    whole = max(0, length).to_bytes(8, "little") + text + data
    return whole[: chance.randrange(len(whole) + 1)] if chance.random() < 0.02 else whole


def disagreement(path: Path, content: bytes) -> str | None:
    """In which way our reader and the package differ on a file; None where they agree."""
    path.write_bytes(content)
    accepted = verdict_of_package(content)
    try:
        read = read_header(path)
    except CheckpointError as error:
        text = str(error)
        if "\n" in text or len(text) > 2000:
            return f"the error has {len(text)} characters or several lines"
        known = any(one in text for one in STRICTER)
        return f"refused here, accepted there: {text}" if accepted and not known else None
    if not accepted:
        return "accepted here, refused there"
    data = content[read.data_begin :]
    entries = {one.name: (one.dtype, list(one.shape), data[one.begin : one.end]) for one in read.entries}
    theirs = {name: (one["dtype"], one["shape"], bytes(one["data"])) for name, one in loaded(content)}
    if entries != theirs:
        return f"read as {entries}, there as {theirs}"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    return None if dict(read.metadata) == (metadata or {}) else f"metadata {read.metadata}, there {metadata}"


def fuzz(rounds: int, seed: int, found: Callable[[bytes, str], None]) -> Counter[bool]:
    """So many headers; `found` is told of every one on which the two differ."""
    chance = random.Random(seed)
    verdicts: Counter[bool] = Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "m.safetensors"
        for _ in range(rounds):
            content = header(chance)
            verdicts[verdict_of_package(content)] += 1
            try:
                said = disagreement(path, content)
            except Exception as error:  # noqa: BLE001  (whatever it is, it is found)
                said = f"{type(error).__name__}: {error}"
            if said is not None:
                found(content, said)
    return verdicts


def main() -> None:
    """Fuzz, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, default=Path("faults"), help="where headers that differ are kept"
    )
    asked = parser.parse_args()
    faults: Counter[str] = Counter()

    def keep(content: bytes, said: str) -> None:
        asked.keep.mkdir(exist_ok=True, parents=True)
        faults[said[:60]] += 1
        (asked.keep / f"{asked.seed}-{faults.total()}.safetensors").write_bytes(content)
        if faults[said[:60]] <= 3:
            print(said, content[:200], sep="\n    ")

    begun = time.monotonic()
    verdicts = fuzz(asked.rounds, asked.seed, keep)
    seconds = time.monotonic() - begun
    counted = f"{verdicts[True]:,} legal, {faults.total():,} differ"
    print(f"{asked.rounds:,} headers in {seconds:.0f} s, {counted}")


if __name__ == "__main__":
    main()
