"""Which files a checkpoint's folder holds: shards, index, config, other files, copies of the weights.

Owns the rules for names and the index file. Reads no tensors. Called by source, layout and the command line.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from msgspec import Struct

from sparseprune.checkpoint import not_safetensors
from sparseprune.checkpoint.documents import leads_nowhere, read_json, read_object, shown, strict_json
from sparseprune.checkpoint.file_io import Stamp, permissions, stamp_of
from sparseprune.checkpoint.remote import FOLDER, RemotePath
from sparseprune.errors import CheckpointError, MachineError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path


SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
MARK = "sparseprune"  # the key of config.json under which an output tells how it was made
MARKED = {f"{MARK}.{key}": key for key in ("version", "command", "spec", "spec_sha256")}
"""Keys in the headers of an output that tell the same: those that depend on no name of the input."""
RESULTS = "sparseprune"  # the folder of masks and report in an output
# Top folders that are not copied: an earlier run's results, version history, and records of downloads, which
# have the checksums of the dense files.
NOT_COPIED = frozenset({RESULTS, ".git", ".cache"})
# Names of the shards of one checkpoint.
NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})" + re.escape(SUFFIX))
_PREFERRED = "model" + SUFFIX
_PREFERRED_INDEX = "model" + INDEX_SUFFIX
# Files of these bases are forms of one model: variants (`model.fp16`), shards that no index lists.
_BASES = frozenset({"model", "pytorch_model", "diffusion_pytorch_model", "consolidated"})
_ROW_END = re.compile(r"-\d+-of-\d+$")
_INDEX_OF = re.compile(r".*(\.\w+)\.index(?:\.\w+)?\.json")
# Folders for other forms of a model.
_CONVERSIONS = frozenset({"original", "onnx", "openvino", "coreml", "metal", "gguf", "tflite"})
_BUNDLES = (".mlpackage", ".mlmodelc")
# Keys of a config.json that may differ between copies of one model.
_UNTELLING = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", MARK})
_SMALLEST_COPY = 1 / 16  # share of the weights' bytes from which a pickle of any name is a copy of them
_DEPTH = 100  # levels of folders
_NAMED = 4  # files in a line


class OtherFile(Struct, frozen=True):
    """A file that is copied as it is; `path` is relative to the checkpoint, `mode` are its permissions."""

    path: PurePosixPath
    nbytes: int
    mode: int
    stamp: Stamp


class FoundFiles(Struct, frozen=True):
    """The shards by name, the index and its weight map, all other files, the permissions of all folders."""

    shards: tuple[PurePosixPath, ...]
    index: PurePosixPath | None
    weight_map: Mapping[str, PurePosixPath]
    others: tuple[OtherFile, ...]
    folders: Mapping[PurePosixPath, int]


def find_files(directory: Path) -> FoundFiles:
    """The files of a checkpoint's directory; CheckpointError where it holds none, or more than one."""
    try:
        top = sorted(path.name for path in directory.iterdir())
        files = [name for name in top if SUFFIX in name and not _is_folder_in(directory, name)]
        index = _index_name(directory, files)
        weight_map = {} if index is None else read_weight_map(directory / index)
        is_other = _PREFERRED in files and PurePosixPath(_PREFERRED) not in weight_map.values()
        if is_other and index != _PREFERRED_INDEX:
            index, weight_map = None, {}  # the index of another copy: loaders take the file of the usual name
        listed = None if index is None else frozenset(weight_map.values())
        unlisted = _unlisted_names(directory, top, files, listed)
        shards = tuple(sorted({*weight_map.values(), *map(PurePosixPath, unlisted)}))
        others = tuple(_other_files(directory, frozenset(shards)))
        inside = {folder for path in (*shards, *(other.path for other in others)) for folder in path.parents}
        folders = {folder: _folder_mode(directory / folder) for folder in inside}
    except OSError as error:
        raise MachineError(f"{error.filename or directory}: cannot be read: {error.strerror}") from error
    return FoundFiles(shards, None if index is None else PurePosixPath(index), weight_map, others, folders)


def _is_folder_in(directory: Path, name: str) -> bool:
    """As `is_folder`, of what was just listed."""
    path = directory / name
    return not path.is_file() if isinstance(path, RemotePath) else is_folder(path)


def _folder_mode(folder: Path) -> int:
    return FOLDER if isinstance(folder, RemotePath) else permissions(folder.stat())


def is_folder(path: Path) -> bool:
    """Whether a path leads to a folder; False where it leads nowhere or may not be followed.

    SparsepruneError where it is in a store that cannot be asked, or in none.
    """
    if isinstance(path, RemotePath):
        try:
            return path.is_dir()
        except OSError as error:
            unread = f"{path}: cannot be read: {error.strerror}"
            raise (leads_nowhere(path, error) or MachineError(unread)) from error
    return os.path.isdir(path)  # noqa: PTH112  (False for a name that is too long)


def read_weight_map(index: Path) -> dict[str, PurePosixPath]:
    """Tensor name -> file from an index file; every file lies inside the index's own folder."""
    weight_map = read_object(index, strict_json).get("weight_map") or None  # an empty one is none
    if not isinstance(weight_map, dict) or not all(isinstance(place, str) for place in weight_map.values()):
        raise CheckpointError(f'{index}: wanted an object of tensor names and shards under "weight_map"')
    places = {place: _checked_place(index, place) for place in set(weight_map.values())}
    return {name: places[place] for name, place in weight_map.items()}


def copies_of_weights(
    directory: Path, found: FoundFiles, has_same_tensors: Callable[[PurePosixPath], bool]
) -> frozenset[PurePosixPath]:
    """The other files that hold the checkpoint's weights in another form or copy, and indexes of these.

    `has_same_tensors` says whether a safetensors file has the tensors of the checkpoint. Adapters, states of
    trainers, and files in folders of other modules or models are no copies.
    """
    folders = _module_folders(directory)
    bases = _BASES | {_base(shard.name) for shard in found.shards}
    nbytes = sum((directory / shard).stat().st_size for shard in found.shards)

    def is_copy(path: PurePosixPath, size: int) -> bool:
        adapter = directory / path.with_name("adapter_config.json")
        is_adapter = path.name.startswith("adapter_") and adapter.is_file()
        if is_adapter or not folders.isdisjoint(path.parents):
            return False
        converted = any(part in _CONVERSIONS or part.endswith(_BUNDLES) for part in path.parts[:-1])
        if path.name.endswith(SUFFIX):
            named = _base(path.name) in (bases if len(path.parts) == 1 else {"consolidated"})
            return converted or named or has_same_tensors(path)
        if path.suffix.lower() not in not_safetensors.PICKLE_SUFFIXES:
            return not_safetensors.names_weights(path.name)
        if not_safetensors.names_training_state(path.name) or _is_other_model(directory, path.parent):
            return False
        named = not_safetensors.names_weights(path.name) or (converted and path.suffix == ".bin")
        if named or size < nbytes * _SMALLEST_COPY:
            return named
        return not_safetensors.looks_pickled(_first_bytes(directory / path))

    copies = {other.path for other in found.others if is_copy(other.path, other.nbytes)}
    forms = {(path.parent, path.suffix) for path in copies}
    indexes = {
        other.path
        for other in found.others
        if (match := _INDEX_OF.fullmatch(other.path.name)) and (other.path.parent, match[1]) in forms
    }
    return frozenset(copies | (indexes - {found.index}))


def _first_bytes(path: Path) -> bytes:
    if isinstance(path, RemotePath):
        return bytes(path.read_part(0, 4))
    with path.open("rb") as file:
        return file.read(4)


def _base(name: str) -> str:
    """The name of a weight file without number, variant and suffix."""
    return _ROW_END.sub("", name.partition(".")[0])


def _module_folders(directory: Path) -> frozenset[PurePosixPath]:
    """The folders of other modules, as sentence-transformers and diffusers list them."""
    names: list[object] = []
    for document in ("modules.json", "model_index.json"):
        try:
            value = read_json(directory / document)
        except CheckpointError:
            continue  # there is none, or it cannot be read
        modules = value if isinstance(value, list) else []
        names += [module.get("path") for module in modules if isinstance(module, dict)]
        names += value if isinstance(value, dict) else ()
    return frozenset(PurePosixPath(name) for name in names if isinstance(name, str)) - {PurePosixPath()}


def _is_other_model(directory: Path, folder: PurePosixPath) -> bool:
    """Whether a folder inside has its own config.json, of another model."""
    if not folder.parts:
        return False
    try:
        own, top = (read_object(directory / at / "config.json") for at in (folder, ""))
    except CheckpointError:
        return False
    return any(own.get(key) != top.get(key) for key in (own.keys() | top.keys()) - _UNTELLING)


def _index_name(directory: Path, files: list[str]) -> str | None:
    """The index of the checkpoint; that of a variant (`model.safetensors.index.fp16.json`) if it is alone."""
    originals = _originals(files)
    indexes = [stem + INDEX_SUFFIX for stem in originals if stem + INDEX_SUFFIX in files]
    if _PREFERRED_INDEX in indexes:
        return _PREFERRED_INDEX
    if len(indexes) > 1:
        names = ", ".join(indexes)
        raise CheckpointError(f"{directory}: holds {len(indexes)} index files ({names}); keep one of them")
    if indexes:
        return indexes[0]
    variants = [name for name in files if SUFFIX + ".index." in name and name.endswith(".json")]
    return variants[0] if len(variants) == 1 and len(originals) > 1 and "model" not in originals else None


def _unlisted_names(
    directory: Path, top: list[str], files: list[str], listed: frozenset[PurePosixPath] | None
) -> Sequence[str]:
    """The weight files that no index lists: one, or a row of shards; none where there is an index."""
    originals = [stem + SUFFIX for stem in _originals(files) if stem + SUFFIX in files]
    if listed is not None:
        if _PREFERRED in originals and PurePosixPath(_PREFERRED) not in listed:
            raise CheckpointError(
                f"{directory}: holds {_PREFERRED} and an index that does not list it, so two checkpoints; "
                f"give {directory / _PREFERRED} to prune that file, or move it away to prune the shards"
            )
        return ()
    if _PREFERRED in originals:
        return [_PREFERRED]
    row = _row(directory, originals)
    if row or len(originals) == 1:
        return row or originals
    if originals:
        raise CheckpointError(
            f"{directory}: holds {len(originals)} safetensors files and no index, {_named(originals)}; "
            "give one"
        )
    raise CheckpointError(f"{directory}: holds no safetensors file{next(_what_instead(directory, top))}")


def _row(directory: Path, names: list[str]) -> list[str]:
    """The files that are numbered as one checkpoint; none beside others, unless they are called `model`."""
    found = {name: match for name in names if (match := NUMBERED.fullmatch(name))}
    counts = {(match["stem"], int(match["count"])) for match in found.values()}
    usual = [(stem, count) for stem, count in counts if stem == "model"]
    if len(usual) != 1 and (len(counts) != 1 or len(found) < len(names)):
        return []
    stem, count = usual[0] if len(usual) == 1 else counts.pop()
    row = {int(match["number"]): name for name, match in found.items() if match["stem"] == stem}
    missing = next((number for number in range(1, count + 1) if number not in row), None)
    if missing is not None or len(row) != count:
        lacking = "some are numbered otherwise" if missing is None else f"number {missing} is not there"
        raise CheckpointError(
            f"{directory}: holds {len(row)} of {count} shards {stem}-...{SUFFIX} and no index; {lacking}; "
            "copy or download the checkpoint again, or give one of its files"
        )
    return [row[number] for number in sorted(row)]


def _originals(files: list[str]) -> list[str]:
    """The stems of weight files and indexes, without variants: no `x.fp16` where there is an `x`."""
    ends = (SUFFIX, INDEX_SUFFIX)
    stems = {name.removesuffix(end) for end in ends for name in files if name.endswith(end)}
    return [
        stem
        for stem in sorted(stems)
        if not any(stem[:place] in stems for place, letter in enumerate(stem) if letter == ".")
    ]


def _what_instead(directory: Path, top: list[str]) -> Iterator[str]:
    """What a directory without safetensors holds, and what to do; the first line says it best."""
    snapshot = _snapshot(directory)
    if snapshot is not None:
        yield f" at its top, it is a model in a download cache; give {snapshot}"
    if "adapter_config.json" in top:
        yield f", only an adapter; {not_safetensors.MERGE}"
    shouted = [name for name in top if name.lower().endswith(SUFFIX) and not name.endswith(SUFFIX)]
    if shouted:
        yield f" of that spelling, only {_named(shouted)}; give one, or rename it"
    pickles = [name for name in top if PurePosixPath(name).suffix in not_safetensors.PICKLE_SUFFIXES]
    if pickles:
        yield f", only {_named(pickles)}; {not_safetensors.conversion_advice(pickles[0])}"
    converted = [name for name in top if not_safetensors.names_weights(name)]
    if converted:
        yield f", only {_named(converted)}; {not_safetensors.CONVERTED}"
    archives = [name for name in top if not_safetensors.is_archive(name)]
    if archives:
        yield f", only {_named(archives)}; {not_safetensors.UNPACK}"
    components = [name for name in top if any((directory / name).glob("*" + SUFFIX))]
    if components:
        pipeline = ", it is a pipeline of several models" if "model_index.json" in top else ""
        yield f" at its top{pipeline}; give one of its folders that do: {_named(components)}"
    yield "; give a safetensors file or the directory of a checkpoint"


def _snapshot(directory: Path) -> Path | None:
    """The snapshot in a model's folder of the hub's cache: that of `main`, or the first; None elsewhere."""
    found = sorted((directory / "snapshots").glob("*/"))
    with suppress(OSError, UnicodeDecodeError):
        main = directory / "snapshots" / (directory / "refs" / "main").read_text().strip()
        found = [main, *found] if main in found else found
    return found[0] if found else None


def _named(names: Sequence[str]) -> str:
    """Names in a line, the first ones of many."""
    some = ", ".join(map(printable, names[:_NAMED]))
    return f"{some} and {len(names) - _NAMED} more" if len(names) > _NAMED else some


def _checked_place(index: Path, place: str) -> PurePosixPath:
    """A shard that an index names; refused unless it is a file inside the index's folder."""
    path, named = PurePosixPath(place), f"{index}: names the shard {shown(place)}"
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in place:
        raise CheckpointError(f"{named}, which is no file in its own folder")
    if path.parts[0] in NOT_COPIED or not place.endswith(SUFFIX):
        raise CheckpointError(f"{named}, wanted a {SUFFIX} file of the checkpoint")
    if any((index.parent / folder).is_symlink() for folder in list(path.parents)[:-1]):
        raise CheckpointError(
            f"{named}, whose folder is a link, which may lead anywhere; put the folder there"
        )
    if not _is_file(index.parent / path):
        raise CheckpointError(f"{named}, which is not there; download it again")
    return path


def _is_file(path: Path) -> bool:
    if isinstance(path, RemotePath):
        return path.is_file()
    return os.path.isfile(path)  # noqa: PTH113  (False for a name that is too long)


def _other_files(directory: Path, shards: frozenset[PurePosixPath]) -> Iterator[OtherFile]:
    """All files but the shards, by path, folder by folder; links to files count as files."""
    listed = _folders_of(directory) if isinstance(directory, RemotePath) else None
    folders = [PurePosixPath()]
    while folders:
        folder = folders.pop()
        for name, is_inner in _entries(directory / folder) if listed is None else listed[folder]:
            path = folder / name
            if is_inner:
                if len(path.parts) > _DEPTH:
                    raise CheckpointError(f"{directory}: holds folders more than {_DEPTH} deep; remove them")
                if str(path) not in NOT_COPIED:
                    folders.append(path)
            elif path not in shards and str(path) not in NOT_COPIED:
                yield _other_file(directory, path)


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """The names in a folder, in order, and which of them are folders and no links."""
    with os.scandir(folder) as found:
        return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)


def _folders_of(directory: RemotePath) -> dict[PurePosixPath, list[tuple[str, bool]]]:
    """As `_entries`, of a folder in a store and of all folders in it, by their paths inside."""
    found: dict[PurePosixPath, dict[str, bool]] = {PurePosixPath(): {}}
    for path in map(PurePosixPath, directory.below()):
        for inner, name in zip(path.parents, reversed(path.parts), strict=True):
            found.setdefault(inner, {})[name] = inner / name != path
    return {folder: sorted(names.items()) for folder, names in found.items()}


def _other_file(directory: Path, relative: PurePosixPath) -> OtherFile:
    path = directory / relative
    try:
        status = path.stat()
    except OSError as error:
        if leads_nowhere(path, error) is None:
            raise
        raise CheckpointError(f"{path}: a link to a file that is not there; remove it") from error
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(
            f"{path}: a link to a folder, which may lead anywhere; put the folder there or remove the link"
        )
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: neither a file nor a folder, so it cannot be copied; remove it")
    return OtherFile(relative, status.st_size, permissions(status), stamp_of(status))
