"""What the classes of results are made of: documents and their JSON, types of fields, lazy sequences.

Knows no command and no checkpoint. Called by the other modules of this package; its sequences by execution
and report.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, fields
from typing import Annotated, Any, ClassVar, Generic, Never, TypeVar, dataclass_transform, overload

from sparseprune import __version__

Value = TypeVar("Value")


def one_or_all(values: Iterable[Value | None]) -> Value | list[Value | None] | None:
    """The value that all instances share, else the list of them, instance by instance; None of none.

    >>> one_or_all([2, 2]), one_or_all([2, 4])
    (2, [2, 4])
    """
    listed = list(values)
    return listed if len(set(listed)) > 1 else next(iter(listed), None)


class Doc:
    """The description of a field in the JSON Schema, and further keywords of its schema."""

    def __init__(self, description: str = "", **keywords: object) -> None:
        self._keywords = {"description": description, **keywords} if description else keywords

    def __get_pydantic_json_schema__(
        self, core_schema: object, handler: Callable[[object], dict[str, Any]]
    ) -> dict[str, Any]:
        return {**handler(core_schema), **self._keywords}


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Record:
    """A frozen dataclass of keywords; these methods serve all, as making methods for a class takes 1 ms."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    _defaults: ClassVar[dict[str, Any]]
    _optional: ClassVar[frozenset[str]]

    def __init_subclass__(cls) -> None:
        dataclass(init=False, repr=False, eq=False, kw_only=True)(cls)
        cls._defaults = {field.name: field.default for field in fields(cls)}
        cls._optional = frozenset(name for name, default in cls._defaults.items() if default is None)

    def __init__(self, **members: object) -> None:
        every = self._defaults | members  # in the order of the fields
        if len(every) > len(self._defaults) or any(value is MISSING for value in every.values()):
            raise TypeError(f"{type(self).__name__} has the fields {', '.join(self._defaults)}")
        vars(self).update(every)

    def __setattr__(self, name: str, value: object) -> Never:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        members = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({members})"


Count = Annotated[int, Doc(minimum=0)]
AtLeastOne = Annotated[int, Doc(minimum=1)]
Share = Annotated[float, Doc(minimum=0, maximum=1)]
NotNegative = Annotated[float, Doc(minimum=0)]
Shape = tuple[Count, ...]
_EACH = Doc("one value if all instances share it, else the values instance by instance")
EachCount = Annotated[Count | Sequence[Count | None] | None, _EACH]
EachNumber = Annotated[float | Sequence[float | None] | None, _EACH]

Seconds = Annotated[float, Doc("wall time", minimum=0)]
Settings = Annotated[dict[str, str], Doc("variables and budgets of the spec set by --set, as typed")]
Warned = Annotated[tuple[str, ...], Doc("what a user should know, one line each; also on stderr unless -q")]
Noted = Annotated[tuple[str, ...], Doc("further remarks, one line each")]
Name = Annotated[str, Doc("as in the file")]
Dtype = Annotated[str, Doc("as in the file, such as BF16")]
Numel = Annotated[Count, Doc("number of its elements")]
Dimensions = Annotated[Shape, Doc("length of each dimension")]


class NamedTensor(Record):
    """A tensor of a checkpoint, as its header says."""

    name: Name
    dtype: Dtype
    shape: Dimensions
    numel: Numel


class OtherWeights(Record):
    """A file with another copy of the weights."""

    path: Annotated[str, Doc("in the folder of the checkpoint")]
    bytes: Annotated[Count, Doc("size of the file")]


class WrittenBytes(Record):
    """Sizes of what was written."""

    weights: Annotated[Count, Doc("the weight files, which zeros do not shrink")]
    masks: Annotated[Count, Doc("the data of the masks")]


FilesLeftOut = Annotated[
    tuple[OtherWeights, ...],
    Doc("other copies of the dense weights in the input's folder; the output does not have them"),
]
FilesNotRead = Annotated[
    tuple[OtherWeights, ...], Doc("other copies of the weights in the folder; the command did not read them")
]


class Uncovered(Record):
    """Matrices of layers that rules do not reach in full, alike but for the numbers in their names."""

    name: Annotated[str, Doc("with a * for every number")]
    tensors: Annotated[AtLeastOne, Doc("that are not reached in full")]
    numel: Annotated[AtLeastOne, Doc("elements that are not reached")]


Covers = Annotated[
    str | None,
    Doc(
        "the matrices that the spec is for, as it declares; null if masks decided",
        enum=["matrices", "mlp", "attention", "experts", "layers", None],
    ),
]
LayerCoverage = Annotated[
    Share | None,
    Doc("share of the elements of the layers' matrices that rules reach; null if there are no such matrices"),
]
DeclaredCoverage = Annotated[
    Share | None, Doc("the same share of the matrices that the spec covers; null if there are none of these")
]
UncoveredKinds = Annotated[
    tuple[Uncovered, ...],
    Doc("the largest kinds of layers' matrices that rules miss, first those that the spec covers"),
]


class ConfigChange(Record):
    """A key of config.json that changed, dotted if it is nested."""

    key: str
    before: Annotated[object, Doc("null if it was absent")]
    after: Annotated[object, Doc("null if it was deleted")]


class Document(Record):
    """A result of a command: frozen, its fields are the keys of its JSON, in this order.

    A field whose default is None is left out of the JSON while it is None.
    """

    schema: str
    sparseprune: Annotated[str, Doc("version that wrote it")] = __version__

    def to_json(self) -> str:
        """The text of the JSON, with an indent of 2; ValueError for a number that is not finite."""
        return "".join(self.json_pieces())

    def json_pieces(self, *, ensure_ascii: bool = False) -> Iterator[str]:
        """The text of the JSON in pieces: of a list one entry at a time, which may be made only then."""
        encode = _encoder(indent=2, ensure_ascii=ensure_ascii).encode

        def text(value: object, indent: str) -> str:
            return encode(value).replace("\n", "\n" + indent)

        between = "{\n  "
        for key, value in json_value(self).items():
            yield f"{between}{text(key, '')}: "
            if _is_list(value):
                begin = "[\n    "
                for one in map(_as_dict, value):
                    yield begin + text(one, "    ")
                    begin = ",\n    "
                yield "\n  ]" if value else "[]"
            else:
                yield text(value, "  ")
            between = ",\n  "
        yield "\n}"

    def json_lines(self) -> Iterator[str]:
        """The JSON without an indent, in pieces: ten times as fast, to see whether it can be written."""
        encode = _encoder(ensure_ascii=False).encode
        for key, value in json_value(self).items():
            yield encode(key)
            yield from map(encode, map(_as_dict, value) if _is_list(value) else (value,))


def _encoder(*, ensure_ascii: bool, indent: int | None = None) -> json.JSONEncoder:
    return json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, allow_nan=False, check_circular=False, default=json_value
    )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _as_dict(entry: object) -> object:
    """An entry of a list; json would ask for the members of a result as well, but more slowly."""
    return json_value(entry) if isinstance(entry, Record) else entry


def json_value(value: object) -> dict[str, Any]:
    """The members of an object of results as JSON has them; TypeError for other objects."""
    if not isinstance(value, Record):  # json passes any object that it does not know
        raise TypeError(f"{type(value).__name__} has no JSON")
    members, optional = vars(value), value._optional  # noqa: SLF001  (same module)
    if not optional:
        return members
    return {key: found for key, found in members.items() if found is not None or key not in optional}


Thing = TypeVar("Thing")
Result = TypeVar("Result")


class Made(Sequence[Result], Generic[Thing, Result]):
    """The results of `make` for some things, made anew on each access; equal to a list of them.

    >>> Made([1, 2], str) == ["1", "2"], Made([1, 2], str)[-1]
    (True, '2')
    """

    def __init__(self, things: Sequence[Thing], make: Callable[[Thing], Result]) -> None:
        self._things = things
        self._make = make

    def __len__(self) -> int:
        return len(self._things)

    @overload
    def __getitem__(self, place: int) -> Result: ...
    @overload
    def __getitem__(self, place: slice) -> "Made[Thing, Result]": ...
    def __getitem__(self, place: int | slice) -> "Result | Made[Thing, Result]":
        if isinstance(place, slice):
            return Made(self._things[place], self._make)
        return self._make(self._things[place])

    def __iter__(self) -> Iterator[Result]:
        return map(self._make, self._things)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as of a list
