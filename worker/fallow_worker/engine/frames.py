"""Frames of the control socket: a length, then one message as JSON, decoded strictly because a child may be hostile."""

from __future__ import annotations

import json
import math
import struct
import types
import typing
from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Final, NewType, cast

from fallow_worker.engine import protocol
from fallow_worker.engine.protocol import CONTROL_FRAME_BYTES_MAX

_LENGTH: Final = struct.Struct("<I")
LENGTH_BYTES: Final = _LENGTH.size
_INTEGER_MAX: Final = 2**63 - 1
_KIND: Final = "is"
"""The key under which an object's class stands in its JSON."""

Message = protocol.ToChild | protocol.FromChild


class FrameError(Exception):
    """What came over the control socket is no frame of the contract: kill whoever sent it."""


def encode_frame(message: Message) -> bytes:
    """The bytes of one frame."""
    body = to_json(message)
    if len(body) > CONTROL_FRAME_BYTES_MAX:
        raise FrameError(f"a {type(message).__name__} of {len(body)} bytes, more than {CONTROL_FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """The length that a frame's first `LENGTH_BYTES` bytes announce. Raises FrameError above the limit."""
    length = int(_LENGTH.unpack(header)[0])
    if length > CONTROL_FRAME_BYTES_MAX:
        raise FrameError(f"a frame of {length} bytes, more than {CONTROL_FRAME_BYTES_MAX}")
    return length


def decode_to_child(body: bytes) -> protocol.ToChild:
    """A supervisor's message from the bytes of a frame. Raises FrameError."""
    return cast("protocol.ToChild", from_json(body, protocol.ToChild))


def decode_from_child(body: bytes) -> protocol.FromChild:
    """A child's message from the bytes of a frame. Raises FrameError."""
    message = cast("protocol.FromChild", from_json(body, protocol.FromChild))
    _check_natural(message)
    return message


def _check_natural(value: object) -> None:
    """A child counts from 0: what it says goes on into messages that hold no other numbers. Raises FrameError."""
    if isinstance(value, int) and value < 0:
        raise FrameError(f"a child counts {value}")
    if isinstance(value, tuple):
        for item in cast("tuple[object, ...]", value):
            _check_natural(item)
    elif is_dataclass(value):
        for field in fields(value):
            _check_natural(getattr(value, field.name))


class FrameReader:
    """Cuts a stream of received bytes into messages of a child."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[protocol.FromChild]:
        """The messages that `data` completes, in order. Raises FrameError."""
        self._buffer += data
        while len(self._buffer) >= LENGTH_BYTES:
            length = frame_length(bytes(self._buffer[:LENGTH_BYTES]))
            if len(self._buffer) < LENGTH_BYTES + length:
                return
            body = bytes(self._buffer[LENGTH_BYTES : LENGTH_BYTES + length])
            del self._buffer[: LENGTH_BYTES + length]
            yield decode_from_child(body)


def to_json(value: object) -> bytes:
    """Compact JSON of a dataclass of the contract."""
    return json.dumps(_plain(value), separators=(",", ":"), allow_nan=False).encode()


def from_json(body: bytes | str, hint: Any) -> Any:
    """The value of type `hint` in `body`, every field checked against its declared type. Raises FrameError."""
    try:
        return _value(json.loads(body), hint, "message")
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a frame is no JSON of the contract: {error}") from None


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold `text`: JSON can also spell halves of surrogate pairs, which no other message takes."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _plain(value: object) -> Any:
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast("tuple[object, ...]", value)]
    assert is_dataclass(value) and not isinstance(value, type), f"{type(value)} does not travel"
    plain: dict[str, Any] = {_KIND: type(value).__name__}
    for field in fields(value):
        plain[field.name] = _plain(getattr(value, field.name))
    return plain


def _value(plain: Any, hint: Any, path: str) -> Any:  # noqa: C901, PLR0912 - one arm for each kind of type
    while isinstance(hint, NewType):
        hint = hint.__supertype__
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(plain, typing.get_args(hint), path)
    if origin is tuple:
        return _tuple(plain, typing.get_args(hint), path)
    if hint is None or hint is type(None):
        if plain is None:
            return None
    elif hint is bool:
        if isinstance(plain, bool):
            return plain
    elif hint is int:
        if isinstance(plain, int) and not isinstance(plain, bool) and abs(plain) <= _INTEGER_MAX:
            return plain
    elif hint is float:
        if isinstance(plain, int | float) and not isinstance(plain, bool) and math.isfinite(plain):
            return float(plain)
    elif hint is str:
        if isinstance(plain, str) and _is_unicode(plain):
            return plain
    elif hint is bytes:
        if isinstance(plain, str):
            return bytes.fromhex(plain)
    elif isinstance(hint, type) and issubclass(hint, Enum):
        if isinstance(plain, str | int) and not isinstance(plain, bool):
            return hint(plain)
    elif isinstance(hint, type) and is_dataclass(hint):
        return _object(plain, hint, path)
    raise FrameError(f"{path} is no {hint}")


def _union(plain: Any, options: tuple[Any, ...], path: str) -> Any:
    if plain is None and type(None) in options:
        return None
    if isinstance(plain, dict):
        entries: dict[str, Any] = cast("Any", plain)
        kind = entries.get(_KIND)
        for option in options:
            if isinstance(option, type) and is_dataclass(option) and option.__name__ == kind:
                return _object(cast("Any", plain), option, path)
    for option in options:
        if option is int and isinstance(plain, int):
            return _value(plain, int, path)
        if isinstance(option, type) and issubclass(option, Enum) and isinstance(plain, str):
            return option(plain)
    raise FrameError(f"{path} is of no kind that the contract knows here")


def _tuple(plain: Any, arguments: tuple[Any, ...], path: str) -> Any:
    if not isinstance(plain, list):
        raise FrameError(f"{path} is no list")
    items: list[Any] = cast("Any", plain)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_value(item, arguments[0], path) for item in items)
    if len(items) != len(arguments):
        raise FrameError(f"{path} has {len(items)} items, not {len(arguments)}")
    return tuple(_value(item, argument, path) for item, argument in zip(items, arguments, strict=True))


def _object(plain: Any, cls: type[Any], path: str) -> Any:
    if not isinstance(plain, dict):
        raise FrameError(f"{path} is no object")
    entries: dict[str, Any] = cast("Any", plain)
    hints = _hints(cast("Hashable", cls))
    if entries.keys() - {_KIND} != hints.keys() or entries.get(_KIND) != cls.__name__:
        raise FrameError(f"{path} is no {cls.__name__}")
    return cls(**{name: _value(entries[name], hint, f"{path}.{name}") for name, hint in hints.items()})


@cache
def _hints(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)
