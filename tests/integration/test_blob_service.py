"""The blob service as a real process, over mTLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest

from fallow.blob_client import BlobClient
from fallow.call_ending import CallEnding
from fallow.envelope import Domain, check_signature, sign_payload
from fallow.errors import FallowError, Reason
from fallow.identity import PrivateKey
from fallow.ids import Digest, digest_of
from fallow.limits import BLOB_CHUNK_BYTES, BLOCK_BYTES_MAX, MIB
from fallow.row_block import RowBlock, Span, pack, pack_selection
from fallow.session import BlobReference, SignedBytes
from fallow.v1 import blob_pb2, blob_service_pb2
from fallow.wire.blob import (
    BlobKind,
    Receipt,
    decode_grant,
    decode_receipt,
    encode_grant,
    grant_to_message,
)
from fallow.wire.chunks import PUT_METHOD, PutPart, encode_put_part
from fallow.wire.errors import error_from_rpc
from fallow_coordinator.blob_keeping import RemoteBlobs
from integration.blob_rig import BlobRig, Party, now_ms, reference_of, until

pytestmark = pytest.mark.processes

SCHEMA = digest_of(b"schema")
NONCE = bytes(range(16))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[BlobRig]:
    rig = BlobRig(tmp_path)
    rig.start()
    yield rig
    rig.stop()


@pytest.fixture
def party(rig: BlobRig) -> Party:
    return rig.party("client-a", "account-a")


def some_bytes(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def block_of(rows: int, seed: int = 1) -> bytes:
    chance = random.Random(seed)
    data = [chance.randbytes(chance.randrange(0, 400)) for _ in range(rows)]
    return pack(SCHEMA, data, [(len(row),) for row in data], NONCE)


def receipt_in(rig: BlobRig, signed: SignedBytes) -> Receipt:
    check_signature(rig.service_key.public_der, signed.signature, Domain.RECEIPT, signed.payload)
    receipt = decode_receipt(signed.payload)
    assert abs(receipt.issued_at_ms - now_ms()) < 60_000, "a receipt says when it was given out"
    return replace(receipt, issued_at_ms=0)


async def refusal(call: object) -> FallowError:
    with pytest.raises(FallowError) as caught:
        await call  # type: ignore[misc]
    return caught.value


class Put:
    """A Put call by hand, to say things that the client never says."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._method: grpc.aio.StreamUnaryMultiCallable[Any, Any] = channel.stream_unary(
            PUT_METHOD,
            request_serializer=lambda part: part if isinstance(part, bytes) else encode_put_part(part),
            response_deserializer=blob_service_pb2.PutResponse.FromString,
        )

    async def refused(self, *parts: PutPart | bytes) -> tuple[grpc.StatusCode, FallowError]:
        async def stream() -> AsyncIterator[PutPart | bytes]:
            for part in parts:
                yield part

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self._method(stream(), timeout=30)
        return caught.value.code(), error_from_rpc(caught.value)

    def opened(self) -> grpc.aio.StreamUnaryCall[Any, Any]:
        return self._method(timeout=60)


# ---------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("length", [1, BLOB_CHUNK_BYTES, BLOB_CHUNK_BYTES + 1, 20 * MIB + 13])
async def test_what_was_put_comes_back(rig: BlobRig, party: Party, tmp_path: Path, length: int) -> None:
    data = some_bytes(length)
    heard: list[int] = []
    async with rig.channel(party) as channel:
        client = BlobClient(channel)
        receipt = receipt_in(rig, await client.put(rig.put_grant(party, data), data, progress=heard.append))
        assert receipt == Receipt(reference_of(data), BlobKind.OPAQUE, party.account_id)
        assert heard[-1] == length
        assert heard == sorted(heard)
        assert await client.get(rig.get_grant(party, data), reference_of(data)) == data
        path = tmp_path / "downloaded"
        await client.get_to_file(rig.get_grant(party, data), reference_of(data), path, progress=heard.append)
        assert path.read_bytes() == data
        assert heard[-1] == length
    assert len(rig.blob_files()) == 1
    assert not rig.partial_files()


async def test_a_file_goes_up_as_it_is(rig: BlobRig, party: Party, tmp_path: Path) -> None:
    data = some_bytes(5 * MIB + 1)
    path = tmp_path / "file"
    path.write_bytes(data)
    async with rig.channel(party) as channel:
        client = BlobClient(channel)
        await client.put(rig.put_grant(party, data), path)
        assert await client.get(rig.get_grant(party, data), reference_of(data)) == data


async def test_a_row_block_gets_its_root(rig: BlobRig, party: Party) -> None:
    data = pack(SCHEMA, [b"one", b"", b"three", b""], [(1,), (2,), (3,), (4,)], NONCE)
    block = RowBlock.parse(data)
    async with rig.channel(party) as channel:
        signed = await BlobClient(channel).put(rig.put_grant(party, data, kind=BlobKind.ROW_BLOCK), data)
    assert receipt_in(rig, signed) == Receipt(
        blob=reference_of(data),
        kind=BlobKind.ROW_BLOCK,
        account_id=party.account_id,
        rows=4,
        root=block.root(),
        schema_digest=SCHEMA,
        size_feature_sums=(10,),
        rows_failed=2,
    )


async def test_the_root_is_that_of_the_block_for_many_rows(rig: BlobRig, party: Party) -> None:
    data = block_of(5_000)
    async with rig.channel(party) as channel:
        signed = await BlobClient(channel).put(rig.put_grant(party, data, kind=BlobKind.ROW_BLOCK), data)
    receipt = receipt_in(rig, signed)
    assert receipt.root == RowBlock.parse(data).root()
    assert receipt.rows == 5_000


async def test_a_second_upload_is_answered_at_once_with_the_same_receipt(rig: BlobRig, party: Party) -> None:
    data = block_of(100)
    grant = rig.put_grant(party, data, kind=BlobKind.ROW_BLOCK)
    async with rig.channel(party) as channel:
        client = BlobClient(channel)
        first = await client.put(grant, data)
        offset, receipt = await client.upload_offset(grant)
        again = await client.put(grant, data)
    assert receipt is not None
    assert offset == len(data)
    assert receipt_in(rig, first) == receipt_in(rig, receipt) == receipt_in(rig, again)
    assert decode_receipt(again.payload).issued_at_ms >= decode_receipt(first.payload).issued_at_ms


# ------------------------------------------------------------------------------------------------------------- refusals


async def test_a_foreign_certificate_gets_no_connection(rig: BlobRig, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    stranger = BlobRig(tmp_path / "foreign").party("client-a", "account-a")
    ours = replace(stranger.credentials, authority_pem=rig.authority.certificate_pem)
    data = b"data"
    async with rig.channel(replace(stranger, credentials=ours)) as channel:
        client = BlobClient(channel, attempts_max=1)
        error = await refusal(client.put(rig.put_grant(stranger, data), data))
    assert error.reason is Reason.COORDINATOR_UNREACHABLE
    assert not rig.blob_files()


async def test_every_wrong_grant_is_refused_and_nothing_is_kept(rig: BlobRig, party: Party) -> None:
    data = some_bytes(1000)
    good = rig.put_grant(party, data)
    grant = decode_grant(good.payload)
    other = rig.party("client-b", "account-b")
    expired = encode_grant(replace(grant, expires_at_ms=now_ms() - 1))
    wrong = {
        "forged": SignedBytes(good.payload, sign_payload(PrivateKey.generate(), Domain.GRANT, good.payload)),
        "altered": SignedBytes(encode_grant(replace(grant, account_id=other.account_id)), good.signature),
        "unsigned": SignedBytes(good.payload, b""),
        "receipt's signature": SignedBytes(
            good.payload, sign_payload(rig.coordinator_key, Domain.RECEIPT, good.payload)
        ),
        "another key's": rig.put_grant(other, data),
        "another operation's": rig.get_grant(party, data),
        "expired": SignedBytes(expired, sign_payload(rig.coordinator_key, Domain.GRANT, expired)),
    }
    async with rig.channel(party) as channel:
        put, client = Put(channel), BlobClient(channel, attempts_max=1)
        for name, signed in wrong.items():
            status, error = await put.refused(PutPart(data, signed))
            expected = Reason.GRANT_EXPIRED if name == "expired" else Reason.GRANT_INVALID
            assert (status, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, expected), name
            assert (await refusal(client.upload_offset(signed))).reason is expected, name
        status, error = await put.refused(PutPart(data))
        assert (status, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.FIELD_MISSING)
    assert not rig.blob_files()
    assert not rig.partial_files()


async def test_a_digest_alone_grants_nothing(rig: BlobRig, party: Party) -> None:
    data = some_bytes(3 * MIB)
    other = rig.party("client-b", "account-b")
    async with rig.channel(party) as channel, rig.channel(other) as foreign:
        await BlobClient(channel).put(rig.put_grant(party, data), data)
        client = BlobClient(foreign, attempts_max=1)
        # Without a grant, with another's, and with one to put: an account that has not shown the bytes gets no receipt.
        assert (await refusal(client.get(SignedBytes(b"", b""), reference_of(data)))).reason is Reason.GRANT_INVALID
        assert (
            await refusal(client.get(rig.get_grant(party, data), reference_of(data)))
        ).reason is Reason.GRANT_INVALID
        assert await client.upload_offset(rig.put_grant(other, data)) == (0, None)
        receipt = receipt_in(rig, await client.put(rig.put_grant(other, data), data))
    assert receipt.account_id == other.account_id
    assert len(rig.blob_files()) == 1


async def test_bytes_that_are_not_what_was_declared_are_not_kept(rig: BlobRig, party: Party) -> None:
    data = some_bytes(2 * MIB)
    altered = data[:-1] + bytes([data[-1] ^ 1])
    grant = rig.put_grant(party, data)
    async with rig.channel(party) as channel:
        put = Put(channel)
        status, error = await put.refused(PutPart(altered[:MIB], grant), PutPart(altered[MIB:]))
        assert (status, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.DIGEST_MISMATCH)
        assert not rig.partial_files()
        status, error = await put.refused(PutPart(data[:MIB], grant), PutPart(data[MIB:]), PutPart(b"x"))
        assert (status, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.DIGEST_MISMATCH)
        assert "longer than declared" in str(error)
        assert not rig.partial_files()
        assert (await refusal(BlobClient(channel).put(grant, data[:-1]))).reason is Reason.DIGEST_MISMATCH
        assert (await refusal(BlobClient(channel).put(grant, altered))).reason is Reason.DIGEST_MISMATCH
    assert not rig.blob_files()


async def test_an_endless_upload_is_stopped_where_the_grant_ends(rig: BlobRig, party: Party) -> None:
    data = some_bytes(MIB)
    sent = 0
    async with rig.channel(party) as channel:
        call = Put(channel).opened()
        ending = CallEnding(call)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(PutPart(data, rig.put_grant(party, data)))
            while sent < 2_000:
                await call.write(PutPart(data))
                sent += 1
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert (await ending.failure(refused.value)).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sent < 200
    assert not rig.partial_files()


async def test_a_request_that_is_longer_than_any_grant_is_refused_before_it_is_parsed(
    rig: BlobRig, party: Party
) -> None:
    data = some_bytes(100)
    long = blob_service_pb2.LocateBlobRequest(grant=grant_to_message(rig.put_grant(party, data)))
    long.grant.signature = bytes(5_000)
    async with rig.channel(party) as channel:
        for method in ("GetUpload", "LocateBlob"):
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                f"/fallow.v1.BlobService/{method}"
            )
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(long.SerializeToString(), timeout=20)
            error = error_from_rpc(refused.value)
            assert error.reason is Reason.LIMIT_EXCEEDED and error.limit == "4096 bytes"


async def test_an_upload_that_ends_early_is_no_blob_but_can_go_on(rig: BlobRig, party: Party) -> None:
    data = some_bytes(3 * MIB)
    grant = rig.put_grant(party, data)
    async with rig.channel(party) as channel:
        status, error = await Put(channel).refused(PutPart(data[:MIB], grant))
        assert (status, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.DIGEST_MISMATCH)
        assert not rig.blob_files()
        client = BlobClient(channel)
        assert await client.upload_offset(grant) == (MIB, None)
        receipt_in(rig, await client.put(grant, data))


async def test_another_offset_than_the_uploads_is_refused(rig: BlobRig, party: Party) -> None:
    data = some_bytes(3 * MIB)
    grant = rig.put_grant(party, data)
    async with rig.channel(party) as channel:
        put = Put(channel)
        await put.refused(PutPart(data[:MIB], grant))
        status, error = await put.refused(PutPart(data[2 * MIB :], grant, 2 * MIB))
        assert (status, error.reason) == (grpc.StatusCode.OUT_OF_RANGE, Reason.OFFSET_MISMATCH)
        assert str(MIB) in error.limit
        assert await BlobClient(channel).upload_offset(grant) == (MIB, None)


async def test_a_read_beyond_the_end_is_refused(rig: BlobRig, party: Party) -> None:
    data = some_bytes(100)
    async with rig.channel(party) as channel:
        await BlobClient(channel).put(rig.put_grant(party, data), data)
        stub_get = channel.unary_stream(
            "/fallow.v1.BlobService/Get",
            request_serializer=blob_service_pb2.GetRequest.SerializeToString,
            response_deserializer=blob_service_pb2.GetResponse.FromString,
        )
        grant = grant_to_message(rig.get_grant(party, data))
        tail = [m.chunk async for m in stub_get(blob_service_pb2.GetRequest(grant=grant, offset_bytes=90))]
        assert b"".join(tail) == data[90:]
        assert not [m async for m in stub_get(blob_service_pb2.GetRequest(grant=grant, offset_bytes=100))]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub_get(blob_service_pb2.GetRequest(grant=grant, offset_bytes=101)):
                pass
        assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE


async def test_a_blob_that_is_not_here_is_not_found(rig: BlobRig, party: Party) -> None:
    async with rig.channel(party) as channel:
        error = await refusal(BlobClient(channel).get(rig.get_grant(party, b"absent"), reference_of(b"absent")))
    assert error.reason is Reason.BLOB_UNKNOWN


async def test_chunks_over_the_limit_are_refused(rig: BlobRig, party: Party) -> None:
    data = some_bytes(4 * MIB)
    grant = rig.put_grant(party, data)
    async with rig.channel(party) as channel:
        put = Put(channel)
        status, error = await put.refused(PutPart(data[: BLOB_CHUNK_BYTES + 1], grant))
        assert (status, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.LIMIT_EXCEEDED)
        assert error.field == "chunk"
        assert str(BLOB_CHUNK_BYTES) in error.limit
    options = [("grpc.max_send_message_length", 16 * MIB), ("grpc.ssl_target_name_override", "blobs.fallow")]
    credentials = grpc.ssl_channel_credentials(
        rig.authority.certificate_pem, party.key.pem, party.credentials.certificate_pem
    )
    async with grpc.aio.secure_channel(rig.address, credentials, options) as channel:
        status, _ = await Put(channel).refused(PutPart(data, grant))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not rig.partial_files()


@pytest.mark.parametrize("part", [b"\xff\xff\xff", b"\x1a\x05abc", b""])
async def test_malformed_messages_are_refused(rig: BlobRig, party: Party, part: bytes) -> None:
    async with rig.channel(party) as channel:
        status, _ = await Put(channel).refused(part)
    assert status is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("damage", ["magic", "offsets", "length", "features"])
async def test_a_malformed_row_block_is_not_kept(rig: BlobRig, party: Party, damage: str) -> None:
    data = bytearray(block_of(50))
    match damage:
        case "magic":
            data[0] ^= 1
        case "offsets":
            data[72:76] = (1).to_bytes(4, "little")
        case "length":
            data += b"x"
        case _:
            data[12:16] = (99).to_bytes(4, "little")
    malformed = bytes(data)
    async with rig.channel(party) as channel:
        grant = rig.put_grant(party, malformed, kind=BlobKind.ROW_BLOCK)
        error = await refusal(BlobClient(channel).put(grant, malformed))
    assert error.reason is Reason.ROW_BLOCK_MALFORMED
    assert error.field.startswith("row_block[")
    assert not rig.blob_files()
    assert not rig.partial_files()


async def test_a_row_block_over_its_limit_is_refused_before_it_is_sent(rig: BlobRig, party: Party) -> None:
    blob = BlobReference(digest_of(b"huge"), BLOCK_BYTES_MAX + 1)
    grant = rig.grants.put(blob, party.holder, now_ms=now_ms(), kind=BlobKind.ROW_BLOCK)
    async with rig.channel(party) as channel:
        status, error = await Put(channel).refused(PutPart(b"x", grant))
    assert (status, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.BLOCK_TOO_LARGE)


# --------------------------------------------------------------------------------------------------------------- faults


async def test_an_upload_survives_kill_9_of_the_service(rig: BlobRig, party: Party) -> None:
    data = some_bytes(48 * MIB)
    grant = rig.put_grant(party, data)
    kept: list[int] = []
    started = asyncio.Event()

    def progress(offset: int) -> None:
        kept.append(offset)
        if offset >= 16 * MIB:
            started.set()

    async with rig.channel(party) as channel:
        uploading = asyncio.create_task(BlobClient(channel).put(grant, data, progress=progress))
        await started.wait()
        await asyncio.to_thread(rig.kill)
        assert not uploading.done()
        assert not rig.blob_files(), "a blob is never seen in part"
        (partial,) = rig.partial_files()
        stood_at = partial.stat().st_size
        await asyncio.to_thread(rig.start)
        receipt_in(rig, await uploading)
        resumed_at = next(after for before, after in pairwise(kept) if after < before)
        assert 0 < stood_at <= len(data)
        assert resumed_at - BLOB_CHUNK_BYTES <= stood_at <= resumed_at
        assert await BlobClient(channel).get(rig.get_grant(party, data), reference_of(data)) == data
    assert not rig.partial_files()


async def test_a_download_survives_kill_9_of_the_service(rig: BlobRig, party: Party, tmp_path: Path) -> None:
    data = some_bytes(48 * MIB)
    path = tmp_path / "downloaded"
    started = asyncio.Event()

    def progress(offset: int) -> None:
        if offset >= 8 * MIB:
            started.set()

    async with rig.channel(party) as channel:
        client = BlobClient(channel)
        await client.put(rig.put_grant(party, data), data)
        grant = rig.get_grant(party, data)
        downloading = asyncio.create_task(client.get_to_file(grant, reference_of(data), path, progress=progress))
        await started.wait()
        await asyncio.to_thread(rig.kill)
        assert not path.exists(), "a file is never seen in part"
        await asyncio.to_thread(rig.start)
        await downloading
    assert path.read_bytes() == data
    assert not path.with_name("downloaded.part").exists()


async def test_a_stopped_service_is_told_as_unreachable(rig: BlobRig, party: Party) -> None:
    data = some_bytes(10)
    assert rig.stop() == 0
    async with rig.channel(party) as channel:
        error = await refusal(BlobClient(channel, attempts_max=2).put(rig.put_grant(party, data), data))
    assert error.reason is Reason.COORDINATOR_UNREACHABLE


async def test_many_uploads_of_one_blob_at_once_are_all_receipted(rig: BlobRig, party: Party) -> None:
    data = block_of(20_000)
    others = [rig.party(f"client-{index}", f"account-{index % 3}") for index in range(6)]

    async def upload(holder: Party) -> Receipt:
        async with rig.channel(holder) as channel:
            grant = rig.put_grant(holder, data, kind=BlobKind.ROW_BLOCK)
            return receipt_in(rig, await BlobClient(channel).put(grant, data))

    receipts = await asyncio.gather(*(upload(holder) for holder in [*others, party, party]))
    assert {receipt.root for receipt in receipts} == {RowBlock.parse(data).root()}
    assert len(rig.blob_files()) == 1
    assert not rig.partial_files()


async def test_a_stalled_upload_is_taken_over_by_the_next_stream(rig: BlobRig, party: Party) -> None:
    data = some_bytes(3 * MIB)
    grant = rig.put_grant(party, data)
    async with rig.channel(party) as half_open, rig.channel(party) as channel:
        call = Put(half_open).opened()
        await call.write(PutPart(data[:MIB], grant))
        await until(lambda: bool(rig.partial_files()) and rig.partial_files()[0].stat().st_size == MIB)
        receipt_in(rig, await BlobClient(channel).put(grant, data))
        assert await call.code() is grpc.StatusCode.OUT_OF_RANGE


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 8 MiB."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)]
    if (
        os.geteuid() != 0
        or not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("cannot mount a small file system here")
    yield small
    subprocess.run(["umount", str(small)], check=True)


async def test_a_full_disk_is_told_and_leaves_room_for_the_next(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    rig = BlobRig(tmp_path / "state")
    try:
        rig.start("--folder", str(small_disk), "--free-bytes-floor", str(2 * MIB))
        party = rig.party("client-a", "account-a")
        async with rig.channel(party) as channel:
            client = BlobClient(channel)
            large, fits = some_bytes(7 * MIB), some_bytes(4 * MIB)
            error = await refusal(client.put(rig.put_grant(party, large), large))
            assert error.reason is Reason.STORAGE_FULL
            assert "free or add disk space" in error.hint
            receipt_in(rig, await client.put(rig.put_grant(party, fits), fits))
        rig.stop()
        # Without a floor the disk itself says no, in the middle of an upload.
        rig.start("--folder", str(small_disk), "--free-bytes-floor", str(-64 * MIB))
        async with rig.channel(party) as channel:
            client = BlobClient(channel)
            error = await refusal(client.put(rig.put_grant(party, large), large))
            assert error.reason is Reason.STORAGE_FULL
            assert not list((small_disk / "uploads").iterdir())
            another = some_bytes(MIB, seed=7)
            receipt_in(rig, await client.put(rig.put_grant(party, another), another))
            assert await client.get(rig.get_grant(party, fits), reference_of(fits)) == fits
    finally:
        rig.stop()


async def test_too_many_uploads_are_told_to_wait(tmp_path: Path) -> None:
    rig = BlobRig(tmp_path)
    rig.start("--uploads-max", "1")
    party = rig.party("client-a", "account-a")
    first, second = some_bytes(2 * MIB, 1), some_bytes(2 * MIB, 2)
    try:
        async with rig.channel(party) as channel:
            call = Put(channel).opened()
            await call.write(PutPart(first[:MIB], rig.put_grant(party, first)))
            await until(lambda: bool(rig.partial_files()))
            status, error = await Put(channel).refused(PutPart(second[:MIB], rig.put_grant(party, second)))
            assert (status, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
            waiting = asyncio.create_task(BlobClient(channel).put(rig.put_grant(party, second), second))
            await call.write(PutPart(first[MIB:]))
            await call.done_writing()
            await call
            receipt_in(rig, await waiting)
    finally:
        rig.stop()


async def test_the_service_ends_with_its_parent(tmp_path: Path) -> None:
    rig = BlobRig(tmp_path)
    ours, theirs = os.pipe()
    rig.start("--life-pipe", str(ours), pass_fds=(ours,))
    os.close(ours)
    process = rig.process
    assert process is not None
    assert process.poll() is None
    os.close(theirs)
    await until(lambda: process.poll() is not None)
    assert process.returncode == 0
    rig.stop()


async def test_a_renewed_certificate_is_used_without_a_restart(rig: BlobRig, party: Party) -> None:
    data = some_bytes(10)

    async def seen() -> bytes:
        credentials = grpc.ssl_channel_credentials(
            rig.authority.certificate_pem, party.key.pem, party.credentials.certificate_pem
        )
        options = [("grpc.ssl_target_name_override", "blobs.fallow"), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(rig.address, credentials, options) as channel:
            await BlobClient(channel).put(rig.put_grant(party, data), data)
        host, port = rig.address.split(":")
        command = ["openssl", "s_client", "-connect", f"{host}:{port}", "-servername", "blobs.fallow"]
        if not shutil.which("openssl"):
            pytest.skip("needs openssl to look at the certificate")
        shown = await asyncio.to_thread(
            subprocess.run, command, input=b"", capture_output=True, check=False, timeout=20
        )
        return shown.stdout.split(b"-----BEGIN CERTIFICATE-----")[1].split(b"-----END")[0]

    before = await seen()
    rig.renew_certificate()
    assert await seen() != before


# -------------------------------------------------------------------------------------------------------------- packing


async def test_the_coordinator_packs_and_a_holder_reads(rig: BlobRig, party: Party) -> None:
    blocks = [block_of(200, seed) for seed in (1, 2)]
    spans = [(0, 0, 50), (1, 100, 100), (0, 199, 1)]
    nonce = bytes(reversed(range(16)))
    async with rig.channel(party) as channel, rig.packer(rig.coordinator_key) as packer:
        client = BlobClient(channel)
        for data in blocks:
            await client.put(rig.put_grant(party, data, kind=BlobKind.ROW_BLOCK), data)
        sources = [(digest_of(data), len(data)) for data in blocks]
        digest, length = await packer.pack(sources=sources, spans=spans, nonce=nonce)
        reference = BlobReference(Digest(digest), length)
        grant = rig.grants.get(reference, party.holder, now_ms=now_ms())
        packed = await client.get(grant, reference)
    selection = [Span(source, first, first + rows) for source, first, rows in spans]
    assert packed == pack_selection([RowBlock.parse(data) for data in blocks], selection, nonce)


async def test_nobody_else_packs(rig: BlobRig, party: Party) -> None:
    data = block_of(10)
    async with rig.channel(party) as channel, rig.packer(party.key) as packer:
        await BlobClient(channel).put(rig.put_grant(party, data, kind=BlobKind.ROW_BLOCK), data)
        error = await refusal(packer.pack(sources=[(digest_of(data), len(data))], spans=[(0, 0, 1)], nonce=NONCE))
    assert error.reason is Reason.PERMISSION_DENIED


async def test_wrong_packs_are_refused(rig: BlobRig, party: Party) -> None:
    data, opaque = block_of(10), some_bytes(500)
    known, unknown_blob = (digest_of(data), len(data)), (digest_of(b"absent"), 6)
    async with rig.channel(party) as channel, rig.packer(rig.coordinator_key) as packer:
        client = BlobClient(channel)
        await client.put(rig.put_grant(party, data, kind=BlobKind.ROW_BLOCK), data)
        await client.put(rig.put_grant(party, opaque), opaque)

        async def reason(sources: list[tuple[Digest, int]], spans: list[tuple[int, int, int]], nonce: bytes) -> Reason:
            return (await refusal(packer.pack(sources=sources, spans=spans, nonce=nonce))).reason

        assert await reason([unknown_blob], [(0, 0, 1)], NONCE) is Reason.BLOB_UNKNOWN
        assert await reason([(known[0], known[1] - 1)], [(0, 0, 1)], NONCE) is Reason.BLOB_UNKNOWN
        assert await reason([(digest_of(opaque), 500)], [(0, 0, 1)], NONCE) is Reason.ROW_BLOCK_MALFORMED
        assert await reason([known], [(0, 5, 6)], NONCE) is Reason.FIELD_INVALID
        assert await reason([known], [(1, 0, 1)], NONCE) is Reason.FIELD_INVALID
        assert await reason([known], [(0, 0, 1)], b"short") is Reason.FIELD_INVALID
        assert await reason([], [], NONCE) is Reason.DATASET_EMPTY
        many = [(0, 9, 1)] * 300_000
        assert await reason([known], many, NONCE) is Reason.LIMIT_EXCEEDED


def raw_rows(channel: Any, name: str, answer: Any) -> Any:
    """A call about single rows, as bytes and message."""
    path = f"/{blob_service_pb2.DESCRIPTOR.services_by_name['BlobService'].full_name}/{name}"
    return channel.unary_unary(
        path, request_serializer=lambda message: message.SerializeToString(), response_deserializer=answer
    )


async def test_single_rows_of_stored_and_brought_blocks_are_packed_and_compared(rig: BlobRig, party: Party) -> None:
    blocks = [block_of(40, 1), block_of(40, 2), block_of(40, 1)]
    blocks[2] = pack(
        SCHEMA, list(RowBlock.parse(blocks[0])), [(len(row),) for row in RowBlock.parse(blocks[0])], bytes(16)
    )
    parsed = [RowBlock.parse(data) for data in blocks]
    places = [(1, 39), (0, 0), (2, 7), (1, 39)]
    async with rig.channel(party) as channel, rig.packer(rig.coordinator_key) as packer:
        client = BlobClient(channel)
        for data in blocks[:2]:
            await client.put(rig.put_grant(party, data, kind=BlobKind.ROW_BLOCK), data)
        sources = [
            *(
                blob_service_pb2.RowSource(blob=blob_pb2.BlobReference(digest=digest_of(data), length_bytes=len(data)))
                for data in blocks[:2]
            ),
            blob_service_pb2.RowSource(inline_block=blocks[2]),
        ]
        pack_rows = raw_rows(packer.channel, "PackRows", blob_service_pb2.PackRowsResponse.FromString)
        compare = raw_rows(packer.channel, "CompareRows", blob_service_pb2.CompareRowsResponse.FromString)
        rows = [blob_service_pb2.RowPlace(source=source, row=row) for source, row in places]
        packed = (await pack_rows(blob_service_pb2.PackRowsRequest(sources=sources, rows=rows, nonce=NONCE))).blob
        reference = BlobReference(Digest(packed.digest), packed.length_bytes)
        block = RowBlock.parse(await client.get(rig.grants.get(reference, party.holder, now_ms=now_ms()), reference))
        pairs = [
            blob_service_pb2.RowPair(
                left=blob_service_pb2.RowPlace(source=0, row=row),
                right=blob_service_pb2.RowPlace(source=source, row=row),
            )
            for source in (1, 2)
            for row in range(40)
        ]
        answered = await compare(blob_service_pb2.CompareRowsRequest(sources=sources, pairs=pairs))
        # What belongs to one lease alone goes with it.
        gone = await RemoteBlobs(packer.channel).delete_blobs(
            [reference.digest], decided_at_ms=now_ms(), packed_only=True
        )
    assert [bytes(row) for row in block] == [bytes(parsed[source][row]) for source, row in places]
    assert block.nonce == NONCE and block.size_features[0] == len(parsed[1][39])
    assert list(answered.equal) == [parsed[0][row] == parsed[source][row] for source in (1, 2) for row in range(40)]
    assert all(answered.equal[40:]) and not all(answered.equal[:40])
    assert list(gone) == [reference.digest]


async def test_single_rows_are_for_the_coordinator_alone_and_have_limits(rig: BlobRig, party: Party) -> None:
    row = blob_service_pb2.RowPlace()
    source = blob_service_pb2.RowSource(inline_block=block_of(3))
    for key, reason, count in (
        (party.key, Reason.PERMISSION_DENIED, 1),
        (rig.coordinator_key, Reason.LIMIT_EXCEEDED, 65_537),
    ):
        async with rig.packer(key) as packer:
            for name, request in (
                ("PackRows", blob_service_pb2.PackRowsRequest(sources=[source], rows=[row] * count, nonce=NONCE)),
                (
                    "CompareRows",
                    blob_service_pb2.CompareRowsRequest(
                        sources=[source], pairs=[blob_service_pb2.RowPair(left=row, right=row)] * count
                    ),
                ),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await raw_rows(packer.channel, name, lambda data: data)(request)
                assert error_from_rpc(caught.value).reason is reason


async def test_packed_inputs_go_when_the_coordinator_says_so_and_for_nobody_else(rig: BlobRig, party: Party) -> None:
    data = block_of(50)
    async with rig.channel(party) as channel, rig.packer(rig.coordinator_key) as packer:
        await BlobClient(channel).put(rig.put_grant(party, data, kind=BlobKind.ROW_BLOCK), data)
        packed, _ = await packer.pack(sources=[(digest_of(data), len(data))], spans=[(0, 3, 20)], nonce=NONCE)
        assert len(rig.blob_files()) == 2
        for call in (
            RemoteBlobs(channel).delete_blobs([packed], decided_at_ms=now_ms(), packed_only=True),
            RemoteBlobs(channel).list_blobs(packed[0], stored_before_ms=now_ms() + 1_000, after=None, limit=10),
        ):
            assert (await refusal(call)).reason is Reason.PERMISSION_DENIED
        keeper = RemoteBlobs(packer.channel)
        listed = await keeper.list_blobs(packed[0], stored_before_ms=now_ms() + 1_000, after=None, limit=10)
        assert packed in listed
        gone = await keeper.delete_blobs([packed, digest_of(data)], decided_at_ms=now_ms(), packed_only=True)
        assert gone == [packed], "what an account uploaded stays"
        assert await keeper.delete_blobs([digest_of(data)], decided_at_ms=now_ms()) == [], "it is too young"
        assert [path.stat().st_size for path in rig.blob_files()] == [len(data)]
