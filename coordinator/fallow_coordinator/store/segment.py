"""A stretch of the journal outside the database: `JournalRecord`s, each after its length as u32 big-endian."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from google.protobuf.message import DecodeError

from fallow.journal.v1 import journal_pb2 as pb
from fallow_coordinator.store.encoding import EventUnreadable
from fallow_coordinator.store.stored_record import StoredRecord

_LENGTH = struct.Struct(">I")


def encode_segment(records: Iterable[StoredRecord]) -> bytes:
    """The bytes of a stretch of records."""
    pieces: list[bytes] = []
    for record in records:
        data = pb.JournalRecord(
            sequence=record.sequence,
            at_ms=record.at_ms,
            epoch=record.epoch,
            event=record.event,
            salt=record.salt,
            leaf=record.leaf,
        ).SerializeToString(deterministic=True)
        pieces += (_LENGTH.pack(len(data)), data)
    return b"".join(pieces)


def decode_segment(data: bytes) -> list[StoredRecord]:
    """The records of a segment, unchecked: give them to `decode_records`. Raises EventUnreadable for torn bytes."""
    records: list[StoredRecord] = []
    offset = 0
    while offset < len(data):
        try:
            (length,) = _LENGTH.unpack_from(data, offset)
            offset += _LENGTH.size
            if offset + length > len(data):
                raise EventUnreadable(f"the segment ends inside record {len(records) + 1} of it")
            message = pb.JournalRecord.FromString(data[offset : offset + length])
        except (struct.error, DecodeError) as error:
            raise EventUnreadable(f"the segment is damaged at byte {offset}: {error}") from error
        offset += length
        records.append(
            StoredRecord(message.sequence, message.at_ms, message.epoch, message.event, message.salt, message.leaf)
        )
    return records
