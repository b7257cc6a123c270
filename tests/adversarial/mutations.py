"""Messages of the contract, filled by chance from their descriptors, and what becomes of them on a bad line."""

from __future__ import annotations

from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

DEPTH_MAX = 4
_INTEGERS = (0, 1, 2, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
_TEXTS = ("", "x", "job-1", "\x00\x1b[2J", "ü" * 60, "../" * 20)


def filled(descriptor: Descriptor, chance: Random, depth: int = 0) -> Message:
    """A message whose fields are set by chance, as the contract's types allow."""
    message: Message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if chance.random() < 0.3:
            continue
        if field.message_type is not None:
            if depth >= DEPTH_MAX:
                continue
            for _ in range(chance.randrange(4) if field.is_repeated else 1):
                inner = filled(field.message_type, chance, depth + 1)
                if field.is_repeated:
                    if not field.message_type.GetOptions().map_entry:
                        getattr(message, field.name).add().MergeFrom(inner)
                else:
                    getattr(message, field.name).CopyFrom(inner)
            continue
        values = [_value(field, chance) for _ in range(chance.randrange(4) if field.is_repeated else 1)]
        if field.is_repeated:
            getattr(message, field.name).extend(values)
        else:
            setattr(message, field.name, values[0])
    return message


def mutated(data: bytes, chance: Random) -> bytes:
    """`data` with a few bytes changed, taken out, doubled, or a monstrous length put in."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        place = chance.randrange(len(changed) + 1)
        match chance.randrange(6):
            case 0 if changed:
                changed[place % len(changed)] = chance.randrange(256)
            case 1:
                changed[place:place] = chance.randbytes(chance.randrange(1, 9))
            case 2:
                del changed[place : place + chance.randrange(1, 17)]
            case 3:
                changed[place:place] = changed[place : place + chance.randrange(1, 65)]
            case 4:
                # A length that is far beyond the end, or a field number that nobody gave out.
                changed[place:place] = b"\xfa\xff\xff\xff\x0f" + b"\xff" * chance.randrange(9) + b"\x7f"
            case _:
                # Groups within groups: what recursion without a limit dies of.
                changed[place:place] = b"\x0b" * chance.randrange(1, 200)
    return bytes(changed)


def _value(field: FieldDescriptor, chance: Random) -> Any:
    if field.enum_type is not None:
        return chance.choice(field.enum_type.values).number
    kinds = FieldDescriptor
    if field.type == kinds.TYPE_STRING:
        return chance.choice(_TEXTS)
    if field.type == kinds.TYPE_BYTES:
        return chance.randbytes(chance.choice((0, 1, 16, 32, 33, 64, 200)))
    if field.type == kinds.TYPE_BOOL:
        return chance.random() < 0.5
    if field.type in (kinds.TYPE_DOUBLE, kinds.TYPE_FLOAT):
        return chance.choice((0.0, -1.0, 1e300, float("inf"), float("nan"))) if field.type == kinds.TYPE_DOUBLE else 1.0
    bits = 31 if field.type in (kinds.TYPE_INT32, kinds.TYPE_SINT32, kinds.TYPE_UINT32, kinds.TYPE_FIXED32) else 62
    return chance.choice(_INTEGERS) % (1 << bits)
