"""The bytes of journal events are frozen: what was written once is read for ever, with the same meaning."""

from __future__ import annotations

import dataclasses
import json
import typing
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import pytest

from fallow_coordinator.store.encoding import KINDS, decode_event, encode_event
from fallow_coordinator.store.event_kind import AnyKind

GOLDEN = Path(__file__).parent / "golden" / "journal_events.json"
"""Kind → bytes in hex and what they say. Running this file as a program adds new kinds and keeps the others."""


def sample(shape: Any, name: str) -> Any:
    """A value that is not the default: made from its name, the last member of an enum, two of each sequence."""
    origin, arguments = typing.get_origin(shape), get_args(shape)
    simple: dict[Any, Any] = {
        int: 1_000 + sum(name.encode()),
        bool: True,
        str: name,
        bytes: name.encode().ljust(32, b"."),
        float: 1.5,
    }
    if isinstance(shape, typing.NewType):
        made = sample(shape.__supertype__, name)
    elif origin in {typing.Union, UnionType}:
        made = sample(arguments[0], name)
    elif origin is tuple and arguments[-1] is Ellipsis:
        made = tuple(sample(arguments[0], f"{name}_{index}") for index in range(2))
    elif origin is tuple:
        made = tuple(sample(argument, f"{name}_{index}") for index, argument in enumerate(arguments))
    elif origin is frozenset:
        made = frozenset(list(arguments[0])[:2])
    elif isinstance(shape, type) and issubclass(shape, StrEnum):
        made = list(shape)[-1]
    elif dataclasses.is_dataclass(shape):
        made = instance(typing.cast("type", shape))
    else:
        made = simple[shape]
    return made


def instance(kind: type) -> Any:
    hints = typing.get_type_hints(kind)
    return kind(**{field.name: sample(hints[field.name], field.name) for field in dataclasses.fields(kind)})


def plain(value: Any) -> Any:
    """A value as JSON can say it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    return value


def says(recorded: Any, told: Any) -> bool:
    """Whether `told` says all that was recorded; fields that came later are free."""
    if isinstance(recorded, dict) and isinstance(told, dict):
        return all(name in told and says(value, told[name]) for name, value in recorded.items())
    if isinstance(recorded, list) and isinstance(told, list):
        return len(recorded) == len(told) and all(map(says, recorded, told))
    return bool(recorded == told)


def golden() -> dict[str, Any]:
    return typing.cast("dict[str, Any]", json.loads(GOLDEN.read_text())) if GOLDEN.exists() else {}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_recorded_bytes_of_an_event_mean_what_they_meant(kind: AnyKind) -> None:
    recorded = golden()[kind.name]
    event = decode_event(bytes.fromhex(recorded["bytes"]))
    assert type(event) is kind.event
    assert says(recorded["says"], plain(event))
    assert encode_event(event).hex() == recorded["bytes"]


def test_no_recorded_kind_is_forgotten() -> None:
    assert set(golden()) == {kind.name for kind in KINDS}


def main() -> None:
    """Adds what is missing."""
    recorded = golden()
    for kind in KINDS:
        if kind.name not in recorded:
            event = instance(kind.event)
            recorded[kind.name] = {"bytes": encode_event(event).hex(), "says": plain(event)}
    GOLDEN.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
