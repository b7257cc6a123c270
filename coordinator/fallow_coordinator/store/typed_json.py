"""Values of annotated types ↔ plain JSON values: what a type says of itself is all that is needed.

Dataclasses and named tuples become lists of their fields in order, dictionaries flat lists that keep their order,
bytes hexadecimal, enumerations their values. Nothing in the data names a class, so reading it makes what the annotation
says and nothing else. A type that is not covered is refused when its codec is made, before any value is seen.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from operator import attrgetter
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from fallow.ranges import RangeSet

ValueT = TypeVar("ValueT")
Convert = Callable[[Any], Any]

_PLAIN: tuple[type, ...] = (int, bool, float, types.NoneType)
"""Types that JSON has itself; exact for floats, because both sides write the shortest digits that give the same one."""


_COVERED = (
    "int, str, bytes, bool, float, enumerations, dataclasses, named tuples, RangeSet; "
    "and tuple, list, deque, set, frozenset, dict, Counter or unions of these"
)


class TypeNotCovered(TypeError):
    """A type that can't be written down; the message says where it stands and what is allowed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Codec(Generic[ValueT]):
    """How values of one type are written and read; None: as they are."""

    shape: str
    """What is written, in words that change whenever it does."""
    write: Convert | None
    read: Convert | None


def plain_of(codec: Codec[ValueT], value: ValueT) -> Any:
    """The plain JSON value of `value`."""
    return value if codec.write is None else codec.write(value)


def value_of(codec: Codec[ValueT], plain: Any) -> ValueT:
    """The value that was written. Raises ValueError, TypeError, KeyError or AttributeError when nobody wrote this."""
    made: ValueT = plain if codec.read is None else codec.read(plain)
    return made


class Codecs:
    """Makes codecs from annotations. Equal strings and bytes that it reads become one object, as they were in life."""

    def __init__(self) -> None:
        self._made: dict[Any, Codec[Any]] = {}
        self._words: dict[str, str] = {}
        self._bytes: dict[str, bytes] = {}

    def forget_words(self) -> None:
        """Lets go of what reading remembered: call it when a reading is over."""
        self._words.clear()
        self._bytes.clear()

    def of(self, annotation: Any, where: str = "") -> Codec[Any]:
        """The codec of a type. Raises TypeNotCovered."""
        annotation = types.NoneType if annotation is None else annotation
        while isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        made = self._made.get(annotation)
        if made is None:
            made = self._made[annotation] = self._make(annotation, where or str(annotation))
        return made

    def _make(self, annotation: Any, where: str) -> Codec[Any]:
        if annotation in _PLAIN:
            return Codec(annotation.__name__, None, None)
        if annotation is str:
            return Codec("str", None, self._read_word)
        if annotation is bytes:
            return Codec("bytes", bytes.hex, self._read_bytes)
        if annotation is RangeSet:
            return Codec("ranges", lambda value: value.flat, RangeSet.from_flat)
        if isinstance(annotation, type) and issubclass(annotation, Enum):
            return _enumeration(annotation)
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            return self._record(annotation)
        if isinstance(annotation, type) and "_fields" in vars(annotation):
            return self._named_tuple(annotation)
        return self._generic(annotation, where)

    def _generic(self, annotation: Any, where: str) -> Codec[Any]:
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin in (typing.Union, types.UnionType):
            return self._union(arguments, where)
        if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
            return _sequence("tuple", tuple, self.of(arguments[0], where))
        if origin is tuple and arguments and Ellipsis not in arguments:
            return self._tuple(arguments, where)
        if origin is list:
            return _sequence("list", list, self.of(arguments[0], where))
        if origin is deque:
            return _sequence("deque", deque, self.of(arguments[0], where))
        if origin in (set, frozenset):
            return _unordered(origin, self.of(arguments[0], where))
        if origin is dict:
            return _mapping(self.of(arguments[0], where), self.of(arguments[1], where), dict)
        if origin is Counter:
            return _mapping(self.of(arguments[0], where), self.of(int, where), Counter)
        raise TypeNotCovered(f"{where}: {annotation!r} can't be written down; use {_COVERED}")

    def _read_word(self, plain: str) -> str:
        return self._words.setdefault(plain, plain)

    def _read_bytes(self, plain: str) -> bytes:
        data = self._bytes.get(plain)
        if data is None:
            data = self._bytes[plain] = bytes.fromhex(plain)
        return data

    def _record(self, kind: type) -> Codec[Any]:
        hints = get_type_hints(kind)
        fields = dataclasses.fields(kind)
        if bad := [one.name for one in fields if not one.init or one.kw_only]:
            raise TypeNotCovered(f"{kind.__name__}.{bad[0]} is not given by position when a {kind.__name__} is made")
        codecs = [self.of(hints[one.name], f"{kind.__name__}.{one.name}") for one in fields]
        names = [one.name for one in fields]
        inner = ", ".join(f"{name}: {codec.shape}" for name, codec in zip(names, codecs, strict=True))
        return _fields(f"{kind.__name__}({inner})", _getter(names), codecs, lambda values: kind(*values))

    def _named_tuple(self, kind: Any) -> Codec[Any]:
        hints = get_type_hints(kind)
        codecs = [self.of(hints[name], f"{kind.__name__}.{name}") for name in kind._fields]
        inner = ", ".join(f"{name}: {codec.shape}" for name, codec in zip(kind._fields, codecs, strict=True))
        return _fields(f"{kind.__name__}({inner})", tuple, codecs, kind._make)

    def _tuple(self, arguments: Sequence[Any], where: str) -> Codec[Any]:
        codecs = [self.of(argument, where) for argument in arguments]
        return _fields(f"tuple({', '.join(codec.shape for codec in codecs)})", tuple, codecs, tuple)

    def _union(self, arguments: Sequence[Any], where: str) -> Codec[Any]:
        members = [argument for argument in arguments if argument is not types.NoneType]
        if len(members) == 1:
            return _optional(self.of(members[0], where))
        return _tagged(members, [self.of(member, where) for member in members], where)


def _enumeration(kind: type[Enum]) -> Codec[Any]:
    members = {member.value: member for member in kind}
    shape = f"{kind.__name__}[{', '.join(repr(value) for value in members)}]"
    # JSON writes members that are strings or integers as their values.
    write = None if issubclass(kind, str | int) else attrgetter("value")
    return Codec(shape, write, members.__getitem__)


def _getter(names: Sequence[str]) -> Convert:
    if not names:
        return lambda _: ()
    if len(names) == 1:
        only = attrgetter(names[0])
        return lambda value: (only(value),)
    return attrgetter(*names)


def _fields(shape: str, take: Convert, codecs: Sequence[Codec[Any]], make: Convert) -> Codec[Any]:
    """A fixed number of values, each of its own type; only those are touched that are not plain already."""
    writers = [(index, codec.write) for index, codec in enumerate(codecs) if codec.write is not None]
    readers = [(index, codec.read) for index, codec in enumerate(codecs) if codec.read is not None]
    count = len(codecs)

    def write(value: Any) -> Any:
        values = list(take(value))
        for index, convert in writers:
            values[index] = convert(values[index])
        return values

    def read(plain: Any) -> Any:
        if len(plain) != count:
            raise ValueError(f"{len(plain)} values where {count} belong: {shape}")
        for index, convert in readers:
            plain[index] = convert(plain[index])
        return make(plain)

    return Codec(shape, write if writers else lambda value: list(take(value)), read)


def _sequence(name: str, kind: Callable[[Any], Any], item: Codec[Any]) -> Codec[Any]:
    shape = f"{name}[{item.shape}]"
    write, read = item.write, item.read
    return Codec(
        shape,
        list if write is None else lambda value: [write(one) for one in value],
        (None if kind is list else kind) if read is None else lambda plain: kind([read(one) for one in plain]),
    )


def _unordered(kind: Callable[[Any], Any], item: Codec[Any]) -> Codec[Any]:
    """A set has no order of its own, so it gets one: that of what is written."""

    def write(value: Any) -> Any:
        plain = value if item.write is None else map(item.write, value)
        return sorted(plain, key=repr)

    read = item.read
    return Codec(
        f"set[{item.shape}]", write, kind if read is None else lambda plain: kind([read(one) for one in plain])
    )


def _mapping(key: Codec[Any], value: Codec[Any], kind: Callable[[Any], Any]) -> Codec[Any]:
    write_key, read_key = key.write or _same, key.read or _same
    if value.shape == "NoneType":
        return Codec(
            f"keys[{key.shape}]",
            lambda mapping: [write_key(one) for one in mapping],
            lambda plain: dict.fromkeys(map(read_key, plain)),
        )
    write_value, read_value = value.write or _same, value.read or _same

    def write(mapping: Mapping[Any, Any]) -> Any:
        flat: list[Any] = []
        for one, held in mapping.items():
            flat.append(write_key(one))
            flat.append(write_value(held))
        return flat

    def read(plain: Any) -> Any:
        flat = iter(plain)
        return kind({read_key(one): read_value(held) for one, held in zip(flat, flat, strict=True)})

    return Codec(f"dict[{key.shape}, {value.shape}]", write, read)


def _same(value: Any) -> Any:
    return value


def _optional(inner: Codec[Any]) -> Codec[Any]:
    write, read = inner.write, inner.read
    return Codec(
        f"{inner.shape} or None",
        None if write is None else lambda value: None if value is None else write(value),
        None if read is None else lambda plain: None if plain is None else read(plain),
    )


def _tagged(members: Sequence[Any], codecs: Sequence[Codec[Any]], where: str) -> Codec[Any]:
    """One of several classes, told apart by its place among them."""
    kinds = [member.__supertype__ if isinstance(member, typing.NewType) else member for member in members]
    if not all(isinstance(kind, type) for kind in kinds) or len(set(kinds)) != len(kinds):
        raise TypeNotCovered(f"{where}: the members of a union must be different classes")
    tags = {kind: tag for tag, kind in enumerate(kinds)}

    def write(value: Any) -> Any:
        if value is None:
            return None
        tag = tags[type(value)]
        return [tag, plain_of(codecs[tag], value)]

    def read(plain: Any) -> Any:
        if plain is None:
            return None
        return value_of(codecs[int(plain[0])], plain[1])

    return Codec(" | ".join(codec.shape for codec in codecs), write, read)
