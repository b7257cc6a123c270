"""Blobs that go to and from the bucket by URL: real processes, a real S3 server that checks signatures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from obstore.store import S3Store

from fallow import direct_transfer
from fallow.blob_client import BlobClient
from fallow.client import connect
from fallow.direct_transfer import DirectFailed, DirectRequest, direct_from_message
from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.row_block import RowBlock, pack
from fallow.v1 import blob_service_pb2
from fallow.wire.blob import BlobKind, decode_receipt, grant_to_message
from fallow_coordinator.blobs.bucket import BUCKET_FILE, BucketPlace
from fallow_coordinator.blobs.direct import may_be_given_out
from fallow_coordinator.blobs.storage import blob_key, staged_key
from fallow_coordinator.blobs.uploads import account_name
from integration.blob_rig import BlobRig, Party, reference_of
from integration.fault_rig import NARROW, rows_of, turning_bundle
from integration.harness import coordinator, worker
from s3_server import S3Bucket, environment_of_keys, s3_server

pytestmark = pytest.mark.processes

LARGE = 5 * 1024 * 1024 + 3
PREFIX = "lab/blobs"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as found:
        yield found


@pytest.fixture
def bucket(endpoint: str) -> S3Bucket:
    return S3Bucket.made(endpoint)


@pytest.fixture
def rig(tmp_path: Path, bucket: S3Bucket) -> Iterator[BlobRig]:
    """A blob service on a part of a bucket."""
    rig = BlobRig(tmp_path)
    where = ("--s3-bucket", bucket.bucket.name, "--s3-endpoint", bucket.bucket.endpoint, "--s3-prefix", PREFIX)
    rig.start(*where, environment=environment_of_keys())
    yield rig
    assert rig.stop() == 0


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of requests that went to the bucket."""
    methods: list[str] = []

    def noted(right: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: DirectRequest, *arguments: Any) -> Any:
            methods.append(request.method)
            return right(request, *arguments)

        return call

    monkeypatch.setattr(direct_transfer, "send", noted(direct_transfer.send))
    monkeypatch.setattr(direct_transfer, "receive", noted(direct_transfer.receive))
    return methods


def some_bytes(length: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(length)


async def test_large_blobs_go_to_the_bucket_and_come_from_it(rig: BlobRig, moved: list[str], tmp_path: Path) -> None:
    party, data, small = rig.party("anna", "lab"), some_bytes(LARGE), some_bytes(10_000)
    path = tmp_path / "large"
    path.write_bytes(data)
    async with rig.channel(party) as channel:
        client = BlobClient(channel)
        receipt = decode_receipt((await client.put(rig.put_grant(party, data), path)).payload)
        assert receipt.blob == reference_of(data)
        assert moved == ["PUT"]
        assert await client.get(rig.get_grant(party, data), reference_of(data)) == data
        await client.get_to_file(rig.get_grant(party, data), reference_of(data), tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == data
        await client.put(rig.put_grant(party, small), small)
        assert await client.get(rig.get_grant(party, small), reference_of(small)) == small
        assert moved == ["PUT", "GET", "GET"], "small blobs go through the service"
        await client.put(rig.put_grant(party, data), data)
        assert moved == ["PUT", "GET", "GET"], "nothing goes twice"


async def test_row_block_by_url_gets_its_root(rig: BlobRig, moved: list[str]) -> None:
    rows = [some_bytes(1_000, seed) for seed in range(3_000)]
    block = pack(digest_of(b"schema"), rows, [(len(row),) for row in rows], bytes(16))
    party = rig.party("anna", "lab")
    async with rig.channel(party) as channel:
        client = BlobClient(channel)
        receipt = decode_receipt(
            (await client.put(rig.put_grant(party, block, kind=BlobKind.ROW_BLOCK), block)).payload
        )
        assert (receipt.rows, receipt.root) == (3_000, RowBlock.parse(block).root())
        broken = bytearray(block)
        broken[60:90] = bytes(30)
        with pytest.raises(FallowError):
            await client.put(rig.put_grant(party, bytes(broken), kind=BlobKind.ROW_BLOCK), bytes(broken))
    assert moved == ["PUT", "PUT"]


async def test_download_goes_on_where_it_stood(rig: BlobRig, moved: list[str], tmp_path: Path) -> None:
    party, data, path = rig.party("anna", "lab"), some_bytes(LARGE), tmp_path / "blob"
    async with rig.channel(party) as channel:
        client = BlobClient(channel)
        await client.put(rig.put_grant(party, data), data)
        path.with_name("blob.part").write_bytes(data[:1_000_000])
        await client.get_to_file(rig.get_grant(party, data), reference_of(data), path)
    assert path.read_bytes() == data
    assert moved == ["PUT", "GET"]


async def test_storage_out_of_reach_is_passed_by(rig: BlobRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise DirectFailed("no route to the bucket")

    monkeypatch.setattr(direct_transfer, "send", unreachable)
    party, data = rig.party("anna", "lab"), some_bytes(LARGE)
    async with rig.channel(party) as channel:
        client = BlobClient(channel)
        await client.put(rig.put_grant(party, data), data)
        assert await client.get(rig.get_grant(party, data), reference_of(data)) == data


async def arrived(rig: BlobRig, party: Party, data: bytes) -> blob_service_pb2.GetUploadResponse:
    """Says that the bytes have arrived, whether or not they have."""
    request = blob_service_pb2.GetUploadRequest(grant=grant_to_message(rig.put_grant(party, data)), arrived=True)
    async with rig.channel(party) as channel:
        ask = channel.unary_unary(
            "/fallow.v1.BlobService/GetUpload",
            request_serializer=blob_service_pb2.GetUploadRequest.SerializeToString,
            response_deserializer=blob_service_pb2.GetUploadResponse.FromString,
        )
        response: blob_service_pb2.GetUploadResponse = await ask(request)
        return response


async def test_who_only_knows_a_digest_gets_no_receipt(rig: BlobRig) -> None:
    """The blob is here, by another account: saying that it has arrived shows no bytes."""
    owner, stranger, data = rig.party("anna", "lab"), rig.party("mallory", "elsewhere"), some_bytes(LARGE)
    async with rig.channel(owner) as channel:
        await BlobClient(channel).put(rig.put_grant(owner, data), data)
    with pytest.raises(Exception, match="no upload of that length has arrived"):
        await arrived(rig, stranger, data)


async def test_bytes_that_are_not_what_was_granted_are_read_back_and_dropped(rig: BlobRig, bucket: S3Bucket) -> None:
    """A store that does not compare checksums would take them; the service does not."""
    party, data = rig.party("anna", "lab"), some_bytes(LARGE)
    store = BucketPlace(bucket.bucket.name, PREFIX, bucket.bucket.endpoint)
    keyed = S3Bucket(bucket.bucket).store()
    name = f"{digest_of(data).hex()}-{account_name(party.account_id)}"
    key = f"{PREFIX}/{staged_key(name)}"
    await obstore.put_async(keyed, key, some_bytes(LARGE, seed=2))
    with pytest.raises(Exception, match="what arrived has another digest"):
        await arrived(rig, party, data)
    assert objects(keyed) == []
    assert store.url() == f"s3://{bucket.bucket.name}/{PREFIX}"


def objects(store: S3Store) -> list[str]:
    return [entry["path"] for page in obstore.list(store) for entry in page]


async def test_altered_blob_in_the_bucket_is_noticed_by_whoever_reads(rig: BlobRig, bucket: S3Bucket) -> None:
    party, data = rig.party("anna", "lab"), some_bytes(LARGE)
    async with rig.channel(party) as channel:
        client = BlobClient(channel)
        await client.put(rig.put_grant(party, data), data)
        other = bytes(LARGE)
        await obstore.put_async(bucket.store(), f"{PREFIX}/{blob_key(digest_of(data))}", other)
        with pytest.raises(FallowError) as refused:
            await client.get(rig.get_grant(party, data), reference_of(data))
        assert refused.value.reason is Reason.DIGEST_MISMATCH


def test_only_safe_requests_are_made_and_given_out() -> None:
    def read(method: str, url: str) -> DirectRequest | None:
        return direct_from_message(blob_service_pb2.DirectRequest(method=method, url=url))

    assert read("PUT", "https://bucket.example/x") and read("GET", "http://127.0.0.1:9000/x")
    for method, url in (("PUT", "http://bucket.example/x"), ("GET", "file:///etc/passwd"), ("DELETE", "https://b/x")):
        assert read(method, url) is None
    assert may_be_given_out("https://bucket.example") and may_be_given_out("http://localhost:9000")
    assert not may_be_given_out("http://bucket.example")


def test_places_are_read_and_moving_is_refused(tmp_path: Path) -> None:
    place = BucketPlace.parse("s3://bucket/some/part/", "", "eu-central-1")
    assert (place.bucket, place.prefix, place.url()) == ("bucket", "some/part", "s3://bucket/some/part")
    for wrong in ("bucket", "https://bucket", "s3://", "s3://bucket?x"):
        with pytest.raises(FallowError, match="names no bucket"):
            BucketPlace.parse(wrong, "", "us-east-1")
    place.remember(tmp_path)
    place.remember(tmp_path)
    assert BucketPlace.of_folder(tmp_path) == place
    with pytest.raises(FallowError, match="lie in s3://bucket/some/part"):
        BucketPlace("another").remember(tmp_path)
    (tmp_path / BUCKET_FILE).unlink()
    (tmp_path / "blobs" / "ab").mkdir(parents=True)
    (tmp_path / "blobs" / "ab" / "cd").touch()
    with pytest.raises(FallowError, match=f"lie in {tmp_path}"):
        place.remember(tmp_path)
    environment = environment_of_keys()
    assert place.signing(environment) is not None
    assert place.signing({}) is None
    assert place.signing({**environment, "AWS_SESSION_TOKEN": "passing"}) is None


def test_coordinator_on_a_bucket_runs_a_job_and_checks_it(tmp_path: Path, bucket: S3Bucket) -> None:
    place = f"s3://{bucket.bucket.name}/{PREFIX}"
    arguments = ("--blobs", place, "--s3-endpoint", bucket.bucket.endpoint)
    environment = {**os.environ, **environment_of_keys()}
    bundle, data = turning_bundle(tmp_path, NARROW, steps=1), rows_of(1_000)
    state = tmp_path / "state"
    with (
        coordinator(state, *arguments, operator_worker=True, environment=environment) as service,
        worker(service, tmp_path / "worker", "--executor", "process"),
        connect(service.facts["client_credentials"]) as client,
    ):
        assert client.map(bundle, {"x": data}, data="public").table().num_rows == len(data)
        logs = (state / "logs" / "blobs.log").read_text()
        assert "blob.arrived" in logs, "the model and the dataset went to the bucket by URL"
        assert not list((state / "blobs" / "blobs").glob("*/*")), "nothing lies on this machine"
        assert json.loads(checked(state, environment).stdout)["faults"] == []
        store = bucket.store()
        (lost,) = [one for one in objects(store) if one.endswith(blob_key(digest_of(model_of(tmp_path))))]
        obstore.delete(store, lost)
        missing = checked(state, environment)
        assert missing.returncode == 1
        assert [fault.split(";")[0] for fault in json.loads(missing.stdout)["faults"]] == [
            f"blob {digest_of(model_of(tmp_path)).hex()} is missing"
        ]
        assert service.stop() == 0


def checked(state: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "fallow_coordinator", "check", "--deep", "--json", "--state", str(state)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False, env=environment)


def model_of(folder: Path) -> bytes:
    (path,) = folder.glob("*.onnx")
    return path.read_bytes()
