"""Chunks of blobs on the wire: the same bytes as protobuf would make, without its copies of a mebibyte each.

A message that holds nothing but a chunk is a tag, a length and the chunk. Everything else is left to protobuf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError, Message

from fallow.errors import FallowError, Reason
from fallow.limits import BLOB_CHUNK_BYTES, KIB
from fallow.session import SignedBytes
from fallow.v1 import blob_service_pb2
from fallow.wire.blob import grant_from_message, grant_to_message

CHUNK_MESSAGE_BYTES_MAX: Final = BLOB_CHUNK_BYTES + 64 * KIB
"""A chunk and what may stand beside it: a grant and an offset."""

BLOB_SERVICE: Final = blob_service_pb2.DESCRIPTOR.services_by_name["BlobService"].full_name
LET_IN_METADATA: Final = "fallow-let-in"
"""Key of the initial metadata of a Put that may go on; a refusal's has it not."""
PUT_METHOD: Final = f"/{BLOB_SERVICE}/Put"
GET_METHOD: Final = f"/{BLOB_SERVICE}/Get"
GET_UPLOAD_METHOD: Final = f"/{BLOB_SERVICE}/GetUpload"
LOCATE_METHOD: Final = f"/{BLOB_SERVICE}/LocateBlob"
PACK_METHOD: Final = f"/{BLOB_SERVICE}/Pack"
PACK_ROWS_METHOD: Final = f"/{BLOB_SERVICE}/PackRows"
COMPARE_ROWS_METHOD: Final = f"/{BLOB_SERVICE}/CompareRows"

_LENGTH_DELIMITED: Final = 2

Buffer = bytes | bytearray | memoryview


def _chunk_tag(message: type[Message]) -> int:
    tag = message.DESCRIPTOR.fields_by_name["chunk"].number << 3 | _LENGTH_DELIMITED
    assert tag < 0x80, "the tag is one byte"
    return tag


_PUT_TAG: Final = _chunk_tag(blob_service_pb2.PutRequest)
_GET_TAG: Final = _chunk_tag(blob_service_pb2.GetResponse)


@dataclass(frozen=True, slots=True)
class PutPart:
    """One message of an upload; grant and offset in the first one only."""

    chunk: Buffer
    grant: SignedBytes | None = None
    offset_bytes: int = 0


def encode_put_part(part: PutPart) -> bytes:
    """A PutRequest."""
    if part.grant is None and part.offset_bytes == 0:
        return _encode_chunk(_PUT_TAG, part.chunk)
    head = blob_service_pb2.PutRequest(offset_bytes=part.offset_bytes)
    if part.grant is not None:
        head.grant.CopyFrom(grant_to_message(part.grant))
    # Fields of one message may simply stand one after the other.
    return head.SerializeToString() + _encode_chunk(_PUT_TAG, part.chunk)


def decode_put_part(data: bytes) -> PutPart:
    """The part that a PutRequest holds; its chunk is a view into `data`. Raises MALFORMED_MESSAGE."""
    chunk = _lone_chunk(_PUT_TAG, data)
    if chunk is not None:
        return PutPart(chunk)
    try:
        message = blob_service_pb2.PutRequest.FromString(data)
    except DecodeError:
        raise malformed("PutRequest") from None
    grant = grant_from_message(message.grant) if message.HasField("grant") else None
    return PutPart(message.chunk, grant, message.offset_bytes)


def encode_get_part(chunk: Buffer) -> bytes:
    """A GetResponse."""
    return _encode_chunk(_GET_TAG, chunk)


def decode_get_part(data: bytes) -> memoryview:
    """The chunk of a GetResponse, a view into `data` where that is possible. Raises MALFORMED_MESSAGE."""
    chunk = _lone_chunk(_GET_TAG, data)
    if chunk is not None:
        return chunk
    try:
        return memoryview(blob_service_pb2.GetResponse.FromString(data).chunk)
    except DecodeError:
        raise malformed("GetResponse") from None


def malformed(name: str) -> FallowError:
    """What a peer is told whose bytes are no message of that name."""
    return FallowError(Reason.MALFORMED_MESSAGE, f"these bytes are no {name}", field=name)


def _encode_chunk(tag: int, chunk: Buffer) -> bytes:
    if not chunk:
        return b""
    return b"".join((_head(tag, len(chunk)), chunk))


def _head(tag: int, length: int) -> bytes:
    head = bytearray([tag])
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head)


def _lone_chunk(tag: int, data: bytes) -> memoryview | None:
    """The chunk when `data` is exactly one field with that tag, minimally encoded; else None."""
    if not data or data[0] != tag:
        return None
    length = shift = 0
    position = 1
    for byte in data[1:6]:
        position += 1
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    else:
        return None
    if length != len(data) - position:
        return None
    return memoryview(data)[position:]
