"""Chunks by hand are the same bytes that protobuf makes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.errors import FallowError, Reason
from fallow.limits import BLOB_CHUNK_BYTES
from fallow.session import SignedBytes
from fallow.v1 import blob_service_pb2
from fallow.wire.blob import grant_to_message
from fallow.wire.chunks import PutPart, decode_get_part, decode_put_part, encode_get_part, encode_put_part

CHUNKS = st.one_of(st.binary(max_size=300), st.sampled_from([0, 1, 127, 128, 16_383, 16_384]).map(bytes))
GRANTS = st.one_of(st.none(), st.builds(SignedBytes, st.binary(max_size=200), st.binary(max_size=80)))


@given(CHUNKS, GRANTS, st.integers(0, 2**40))
def test_a_put_part_is_what_protobuf_writes(chunk: bytes, grant: SignedBytes | None, offset: int) -> None:
    message = blob_service_pb2.PutRequest(chunk=chunk, offset_bytes=offset)
    if grant is not None:
        message.grant.CopyFrom(grant_to_message(grant))
    encoded = encode_put_part(PutPart(chunk, grant, offset))
    assert blob_service_pb2.PutRequest.FromString(encoded) == message
    assert decode_put_part(message.SerializeToString()) == PutPart(chunk, grant, offset)
    assert decode_put_part(encoded) == PutPart(chunk, grant, offset)


@given(CHUNKS)
def test_a_get_part_is_what_protobuf_writes(chunk: bytes) -> None:
    encoded = blob_service_pb2.GetResponse(chunk=chunk).SerializeToString()
    assert encode_get_part(memoryview(chunk)) == encoded
    assert decode_get_part(encoded) == chunk


def test_a_whole_chunk_is_a_view_and_no_copy() -> None:
    data = encode_put_part(PutPart(bytes(BLOB_CHUNK_BYTES)))
    part = decode_put_part(data)
    assert isinstance(part.chunk, memoryview)
    assert part.chunk.obj is data
    assert decode_get_part(encode_get_part(bytes(BLOB_CHUNK_BYTES))).nbytes == BLOB_CHUNK_BYTES


@given(st.binary(max_size=64))
def test_any_bytes_decode_as_protobuf_decodes_them_or_are_refused(data: bytes) -> None:
    try:
        expected = blob_service_pb2.PutRequest.FromString(data)
    except Exception:
        expected = None
    if expected is None:
        with pytest.raises(FallowError) as caught:
            decode_put_part(data)
        assert caught.value.reason is Reason.MALFORMED_MESSAGE
    else:
        part = decode_put_part(data)
        assert part.chunk == expected.chunk
        assert part.offset_bytes == expected.offset_bytes
        assert (part.grant is not None) == expected.HasField("grant")


@pytest.mark.parametrize("data", [b"\x1a\x05abc", b"\x1a\xff\xff\xff\xff\xff\xff", b"\x1a", b"\xff\xff"])
def test_broken_bytes_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(FallowError) as caught:
        decode_put_part(data)
    assert caught.value.reason is Reason.MALFORMED_MESSAGE
    assert caught.value.field == "PutRequest"


def test_a_broken_download_is_refused_by_name() -> None:
    with pytest.raises(FallowError) as caught:
        decode_get_part(b"\x0a\x05abc")
    assert caught.value.field == "GetResponse"
