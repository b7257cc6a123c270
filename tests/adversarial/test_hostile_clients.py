"""Enrolled submitters, and strangers at the open door, that send what no honest one sends."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from adversarial.attackers import CALL_S, Submitter, refused, submitter, watched
from engine_models import dense_model, tensor_manifest
from fallow.channel import blob_channel, control_channel, enrollment_channel
from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.row_block import pack
from fallow.session import BlobReference
from fallow.v1 import blob_pb2, bundle_pb2, job_pb2, job_service_pb2, schema_pb2
from fallow.wire.blob import reference_to_message
from fallow.wire.bundle import manifest_to_message
from fallow_coordinator.coordinator import CALLS_BURST, CALLS_PER_S
from fallow_coordinator.core.limits import INSPECTIONS_WAITING_PER_ACCOUNT_MAX
from fallow_coordinator.service.jobs import GRANTS_OF_ONE_CALL
from fallow_coordinator.service.live_streams import STREAMS_PER_PARTY_MAX
from integration.harness import CoordinatorService
from integration.raw_session import joined

pytestmark = pytest.mark.processes

FLOOD_S = 1.0
ESCAPES = "\x1b]0;owned\x07\x1b[2Jtitle\r\nsecond line"


@pytest.fixture
async def attacker(accounts: str, tmp_path: Path) -> AsyncIterator[Submitter]:
    async with submitter(accounts, tmp_path) as made:
        yield made


@pytest.fixture
async def honest(accounts: str, tmp_path: Path) -> AsyncIterator[Submitter]:
    async with submitter(accounts, tmp_path) as made:
        yield made


# ------------------------------------------------------------------------------------------------ manifests


def _manifest() -> bundle_pb2.BundleManifest:
    model = dense_model()
    return manifest_to_message(tensor_manifest(model))


def _changed(change: Callable[[bundle_pb2.BundleManifest], object]) -> bundle_pb2.BundleManifest:
    manifest = _manifest()
    change(manifest)
    return manifest


def _bomb(columns: Callable[[schema_pb2.Schema], None]) -> bundle_pb2.BundleManifest:
    """An output schema whose fixed columns are huge beside one that varies."""
    manifest = _manifest()
    columns(manifest.output_schema)
    manifest.output_schema.columns.add(name="text").string.SetInParent()
    return manifest


def _tensor(schema: schema_pb2.Schema, name: str, shape: list[int], *, columns: int = 1) -> None:
    for number in range(columns):
        _add_tensor(schema, name if columns == 1 else f"{name}{number}", shape)


def _add_tensor(schema: schema_pb2.Schema, name: str, shape: list[int]) -> None:
    schema.columns.add(name=name, tensor=schema_pb2.TensorColumn(dtype=schema_pb2.D_TYPE_FLOAT64, shape=shape))


def _ragged(schema: schema_pb2.Schema, name: str, shape: list[int]) -> None:
    schema.columns.add(name=name, ragged=schema_pb2.RaggedColumn(dtype=schema_pb2.D_TYPE_FLOAT64, shape=shape))


MANIFESTS: dict[str, bundle_pb2.BundleManifest] = {
    "a tensor of 10^58 bytes beside a text": _bomb(lambda s: _tensor(s, "huge", [2**24] * 8)),
    "many large tensors beside a text": _bomb(lambda s: _tensor(s, "c", [2**20], columns=200)),
    "a ragged column of 10^50 bytes an element": _bomb(lambda s: _ragged(s, "huge", [0, *[2**24] * 7])),
    "a dimension of 10^9": _changed(lambda m: _tensor(m.input_schema, "wide", [10**9])),
    "nine dimensions": _changed(lambda m: _tensor(m.input_schema, "deep", [1] * 9)),
    "no dimensions left": _changed(lambda m: _tensor(m.input_schema, "none", [0])),
    "a column twice": _changed(lambda m: _tensor(m.input_schema, "x", [1])),
    "300 columns": _changed(lambda m: _tensor(m.input_schema, "c", [1], columns=300)),
    "an element type of the future": _changed(lambda m: m.input_schema.columns[0].tensor.ClearField("dtype")),
    "a column without a kind": _changed(lambda m: m.input_schema.columns.add(name="what")),
    "no columns": _changed(lambda m: m.output_schema.ClearField("columns")),
    "nine size features": _changed(lambda m: m.input_schema.size_features.extend([schema_pb2.SIZE_FEATURE_BYTES] * 9)),
    "a file above": _changed(lambda m: setattr(m.files[0], "name", "../../etc/passwd")),
    "a file at the root": _changed(lambda m: setattr(m.files[0], "name", "/etc/passwd")),
    "a file of another system": _changed(lambda m: setattr(m.files[0], "name", "..\\evil")),
    "a file that is the folder": _changed(lambda m: setattr(m.files[0], "name", "..")),
    "a file with a zero byte": _changed(lambda m: setattr(m.files[0], "name", "a\0b")),
    "a file without a name": _changed(lambda m: setattr(m.files[0], "name", "")),
    "a file twice": _changed(lambda m: m.files.append(m.files[0])),
    "a file of no bytes": _changed(lambda m: setattr(m.files[0], "length_bytes", 0)),
    "a file of 2^64 bytes": _changed(lambda m: setattr(m.files[0], "length_bytes", 2**64 - 1)),
    "a digest that is too short": _changed(lambda m: setattr(m.files[0], "digest", b"short")),
    "65 files": _changed(lambda m: [m.files.add(name=f"f{n}", digest=b"d" * 32, length_bytes=1) for n in range(64)]),
    "no stages": _changed(lambda m: m.ClearField("stages")),
    "17 stages": _changed(lambda m: m.stages.extend([m.stages[0]] * 16)),
    "a stage of no kind": _changed(lambda m: m.stages.add()),
    "a precision of the future": _changed(lambda m: m.ClearField("precision")),
    "a title of a kilobyte": _changed(lambda m: setattr(m, "title", "x" * 1_000)),
}


async def test_hostile_manifests_are_refused_by_field(attacker: Submitter, target: CoordinatorService) -> None:
    await attacker.upload(dense_model())
    for what, manifest in MANIFESTS.items():
        error = await refused(attacker.register(manifest.SerializeToString()))
        assert error.reason in {Reason.BUNDLE_INVALID, Reason.LIMIT_EXCEEDED}, (what, error)
        assert error.field.startswith("manifest"), (what, error)
    assert (await refused(attacker.register(bytes(70_000)))).reason is Reason.LIMIT_EXCEEDED
    assert (await refused(attacker.register(b"\xff" * 100))).reason is Reason.BUNDLE_INVALID
    assert target.running()


async def test_a_file_that_was_never_uploaded_or_is_anothers_is_unknown(attacker: Submitter, honest: Submitter) -> None:
    model = dense_model(hidden=9)
    manifest = manifest_to_message(tensor_manifest(model)).SerializeToString()
    never = await refused(attacker.register(manifest))
    await honest.upload(model)
    anothers = await refused(attacker.register(manifest))
    assert (never.reason, never.message, never.field) == (anothers.reason, anothers.message, anothers.field)
    assert never.reason is Reason.BLOB_UNKNOWN


async def test_one_account_cannot_queue_inspections_without_end(attacker: Submitter, honest: Submitter) -> None:
    async def register(who: Submitter) -> None:
        program = secrets.token_bytes(40)
        await who.upload(program)
        await who.register(manifest_to_message(tensor_manifest(program)).SerializeToString())

    for _ in range(INSPECTIONS_WAITING_PER_ACCOUNT_MAX):
        await register(attacker)
    error = await refused(register(attacker))
    assert error.reason is Reason.OVERLOADED
    assert str(INSPECTIONS_WAITING_PER_ACCOUNT_MAX) in error.limit
    await register(honest)


# ------------------------------------------------------------------------------------------------ jobs


@dataclass
class Ready:
    """An account with a registered bundle and one uploaded block."""

    who: Submitter
    bundle_digest: bytes
    block: BlobReference
    rows: int

    def request(self, **changes: object) -> job_service_pb2.SubmitMapJobRequest:
        """A submission that would be accepted, but for `changes`."""
        facts: dict[str, object] = {
            "idempotency_key": secrets.token_bytes(16),
            "bundle_digest": self.bundle_digest,
            "blocks": [job_pb2.DatasetBlock(blob=reference_to_message(self.block), rows=self.rows)],
            "data_class": job_pb2.DATA_CLASS_PUBLIC,
        }
        return job_service_pb2.SubmitMapJobRequest(**{**facts, **changes})  # type: ignore[arg-type]  # by name

    async def submit(self, **changes: object) -> str:
        """The job's identifier."""
        return (await self.who.jobs.SubmitMapJob(self.request(**changes), timeout=CALL_S)).job_id


@pytest.fixture
async def ready(attacker: Submitter) -> Ready:
    model = dense_model(hidden=10)
    await attacker.upload(model)
    manifest = _manifest()
    manifest.files[0].digest, manifest.files[0].length_bytes = digest_of(model), len(model)
    status = await attacker.register(manifest.SerializeToString())
    schema_digest = digest_of(manifest.input_schema.SerializeToString(deterministic=True))
    block = pack(schema_digest, [bytes(24)] * 3, [], secrets.token_bytes(16))
    return Ready(attacker, status.bundle_digest, await attacker.upload(block, blob_pb2.BLOB_KIND_ROW_BLOCK), 3)


async def test_absurd_counts_and_repetitions_are_refused(ready: Ready) -> None:
    blob = reference_to_message(ready.block)
    block = job_pb2.DatasetBlock(blob=blob, rows=ready.rows)
    cases: dict[str, tuple[dict[str, object], Reason]] = {
        "one row more": ({"blocks": [job_pb2.DatasetBlock(blob=blob, rows=4)]}, Reason.FIELD_INVALID),
        "2^32 - 1 rows": ({"blocks": [job_pb2.DatasetBlock(blob=blob, rows=2**32 - 1)]}, Reason.LIMIT_EXCEEDED),
        "no rows": ({"blocks": [job_pb2.DatasetBlock(blob=blob)]}, Reason.DATASET_EMPTY),
        "20,001 blocks": ({"blocks": [block] * 20_001}, Reason.LIMIT_EXCEEDED),
        "failed rows without end": (
            {"options": job_pb2.JobOptions(failed_rows_max=2**64 - 1)}, Reason.FIELD_INVALID,
        ),
        "a title of a kilobyte": ({"title": "é" * 500}, Reason.LIMIT_EXCEEDED),
        "a data class of the future": ({"data_class": 77}, Reason.FIELD_INVALID),
        "a kept table that is not there": (
            {"kept": blob_pb2.BlobReference(digest=b"k" * 32, length_bytes=5)}, Reason.BLOB_UNKNOWN,
        ),
    }  # fmt: skip
    for what, (changes, reason) in cases.items():
        assert (await refused(ready.submit(**changes))).reason is reason, what


async def test_thousands_of_inline_blocks_are_refused_before_they_are_read(
    ready: Ready, honest: Submitter, target: CoordinatorService
) -> None:
    data = pack(digest_of(b"schema"), [b"row"], [], bytes(16))
    inline = job_pb2.DatasetBlock(
        blob=reference_to_message(BlobReference(digest_of(data), len(data))), rows=1, inline_block=data
    )
    request = ready.request(blocks=[inline] * 5_500)
    async with watched(target, honest) as watch:
        answers = await _flooded(lambda: ready.who.jobs.SubmitMapJob(request, timeout=CALL_S))
    assert set(answers) <= {Reason.LIMIT_EXCEEDED, Reason.OVERLOADED}, answers
    watch.was_harmless()


async def test_blocks_of_unfinished_jobs_have_a_limit(ready: Ready) -> None:
    blocks = [job_pb2.DatasetBlock(blob=reference_to_message(ready.block), rows=ready.rows)] * 19_000
    for _ in range(5):
        await _patiently(lambda: ready.submit(blocks=blocks))
    error = await _patiently(lambda: refused(ready.submit(blocks=blocks)), until=lambda e: e.field == "blocks")
    assert error.reason is Reason.OVERLOADED
    assert "blocks in unfinished jobs" in error.limit


async def test_texts_with_escape_sequences_come_back_as_they_are_and_break_no_log(
    ready: Ready, target: CoordinatorService
) -> None:
    job_id = await ready.submit(title=ESCAPES)
    status = await ready.who.jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job_id), timeout=CALL_S)
    assert status.job.title == ESCAPES
    assert "\x1b" not in target.log.read_text(errors="replace")


async def test_another_accounts_things_look_like_nothing(ready: Ready, honest: Submitter) -> None:
    job_id = await ready.submit()

    def asked(job: str, digest: bytes) -> dict[str, Awaitable[object]]:
        jobs = honest.jobs
        return {
            "job": jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job), timeout=CALL_S),
            "cancel": jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job), timeout=CALL_S),
            "watch": jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=job), timeout=CALL_S).read(),
            "bundle": jobs.GetBundle(job_service_pb2.GetBundleRequest(bundle_digest=digest), timeout=CALL_S),
            "blob": jobs.GrantDownloads(
                job_service_pb2.GrantDownloadsRequest(digests=[digest]), timeout=CALL_S
            ),
        }  # fmt: skip

    theirs, nothing = asked(job_id, ready.bundle_digest), asked("job-aaaaaaaaaaaaaaaa", b"n" * 32)
    for what in theirs:
        hidden, absent = await refused(theirs[what]), await refused(nothing[what])
        assert (hidden.reason, str(hidden)) == (absent.reason, str(absent)), what
    theirs_too = await refused(
        honest.jobs.GrantDownloads(job_service_pb2.GrantDownloadsRequest(digests=[ready.block.digest]), timeout=CALL_S)
    )
    assert theirs_too.reason is Reason.BLOB_UNKNOWN
    assert await ready.who.jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job_id), timeout=CALL_S)


async def test_watches_have_absurd_cursors_refused_and_a_limit(ready: Ready, honest: Submitter) -> None:
    job_id, jobs = await ready.submit(), ready.who.jobs
    for cursor in (1, 2**63, 2**64 - 1):
        request = job_service_pb2.WatchJobRequest(job_id=job_id, cursor=cursor)
        assert (await refused(jobs.WatchJob(request, timeout=CALL_S).read())).reason is Reason.OFFSET_MISMATCH
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(control_channel(ready.who.credentials)) for _ in range(4)]
        from fallow.v1 import job_service_pb2_grpc

        watches = [
            job_service_pb2_grpc.JobServiceStub(channels[number % 4]).WatchJob(
                job_service_pb2.WatchJobRequest(job_id=job_id), timeout=CALL_S
            )
            for number in range(STREAMS_PER_PARTY_MAX + 30)
        ]
        reasons = Counter(await asyncio.gather(*(_reason(watch.read()) for watch in watches)))
        assert reasons[None] == STREAMS_PER_PARTY_MAX
        assert reasons[Reason.OVERLOADED] == 30
        await honest.ask()
        for watch in watches:
            watch.cancel()


async def test_receipts_shown_again_and_again_write_nothing(ready: Ready, target: CoordinatorService) -> None:
    """A blob that is receipted as bytes and as a row block does not flip for ever."""
    data = pack(digest_of(b"schema"), [b"row"] * 5, [], secrets.token_bytes(16))
    from fallow.wire.blob import grant_from_message, receipt_to_message

    receipts: list[blob_pb2.SignedBlobReceipt] = []
    for kind in (blob_pb2.BLOB_KIND_OPAQUE, blob_pb2.BLOB_KIND_ROW_BLOCK):
        wanted = job_service_pb2.UploadWanted(
            blob=reference_to_message(BlobReference(digest_of(data), len(data))), kind=kind
        )
        granted = await ready.who.jobs.GrantUploads(
            job_service_pb2.GrantUploadsRequest(uploads=[wanted]), timeout=CALL_S
        )
        receipt = await ready.who.blobs.put(grant_from_message(granted.uploads[0].grant), data)
        receipts.append(receipt_to_message(receipt))

    async def record(receipt: blob_pb2.SignedBlobReceipt) -> None:
        await ready.who.jobs.RecordUploads(job_service_pb2.RecordUploadsRequest(receipts=[receipt]), timeout=CALL_S)

    await record(receipts[0])
    await record(receipts[1])
    before = _sequence(target)
    for number in range(20):
        await record(receipts[number % 2])
    assert _sequence(target) == before


# ------------------------------------------------------------------------------------------------ floods


async def test_a_thousand_grants_a_call_are_counted_as_many_calls(
    attacker: Submitter, honest: Submitter, target: CoordinatorService
) -> None:
    wanted = [
        job_service_pb2.UploadWanted(
            blob=reference_to_message(BlobReference(digest_of(number.to_bytes(4, "big")), 5)),
            kind=blob_pb2.BLOB_KIND_OPAQUE,
        )
        for number in range(1_000)
    ]
    request = job_service_pb2.GrantUploadsRequest(uploads=wanted)
    async with watched(target, honest) as watch:
        answers = await _flooded(lambda: attacker.jobs.GrantUploads(request, timeout=CALL_S))
    calls_max = (CALLS_BURST + CALL_S * CALLS_PER_S) / (len(wanted) / GRANTS_OF_ONE_CALL)
    assert 0 < answers[None] <= calls_max, answers
    assert set(answers) <= {None, Reason.OVERLOADED}
    watch.was_harmless()


async def test_calls_that_are_cancelled_at_once_hold_up_nobody(
    attacker: Submitter, honest: Submitter, target: CoordinatorService
) -> None:
    async def cancelled() -> None:
        call = attacker.jobs.ListJobs(job_service_pb2.ListJobsRequest(), timeout=CALL_S)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await call

    async with watched(target, honest) as watch:
        await _flooded(cancelled)
    watch.was_harmless()


@pytest.mark.parametrize("where", ["enrollment", "control", "blobs"])
async def test_watches_of_health_cannot_fill_a_server(
    where: str, attacker: Submitter, honest: Submitter, target: CoordinatorService, tmp_path: Path
) -> None:
    credentials = attacker.credentials

    def channel() -> grpc.aio.Channel:
        if where == "enrollment":
            return enrollment_channel(target.facts["enrollment_endpoint"], credentials.authority_pem)
        return control_channel(credentials) if where == "control" else blob_channel(credentials)

    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(channel()) for _ in range(18)]
        watches = [
            health_pb2_grpc.HealthStub(one).Watch(health_pb2.HealthCheckRequest())
            for one in channels
            for _ in range(60)
        ]
        answers = Counter(await asyncio.gather(*(_reason(watch.read()) for watch in watches)))
        assert answers[None] <= 32, answers
        await honest.ask()
        await honest.upload(secrets.token_bytes(1_000))
        await joined(target.client_join_line, tmp_path / "late")
        for watch in watches:
            watch.cancel()


async def test_connections_that_say_nothing_leave_room_for_parties(
    honest: Submitter, target: CoordinatorService
) -> None:
    host, _, port = target.facts["control_endpoint"].rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
        await honest.ask()
        async with control_channel(honest.credentials) as channel:
            from fallow.v1 import identity_pb2, job_service_pb2_grpc

            protocol = identity_pb2.ProtocolVersion(version=1, min_supported=1)
            await job_service_pb2_grpc.JobServiceStub(channel).GetSession(
                job_service_pb2.GetSessionRequest(protocol=protocol), timeout=CALL_S
            )


async def test_oversize_metadata_is_refused_by_the_transport(attacker: Submitter) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await attacker.jobs.ListJobs(
            job_service_pb2.ListJobsRequest(), timeout=CALL_S, metadata=(("x-long", "x" * 60_000),)
        )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await attacker.ask()


async def test_messages_made_to_be_dear_to_parse_are_cheap_enough(
    attacker: Submitter, honest: Submitter, target: CoordinatorService
) -> None:
    empty: list[Message] = [
        job_service_pb2.SubmitMapJobRequest(blocks=[job_pb2.DatasetBlock()] * 400_000),
        job_service_pb2.GrantUploadsRequest(uploads=[job_service_pb2.UploadWanted()] * 400_000),
        job_service_pb2.GrantDownloadsRequest(digests=[b""] * 400_000),
    ]
    async with watched(target, honest) as watch:
        for message, method in zip(empty, ("SubmitMapJob", "GrantUploads", "GrantDownloads"), strict=True):
            error = await refused(getattr(attacker.jobs, method)(message, timeout=CALL_S))
            assert error.reason in {Reason.LIMIT_EXCEEDED, Reason.FIELD_INVALID, Reason.OVERLOADED}, method
    watch.was_harmless()


async def _flooded(call: Callable[[], Awaitable[object]]) -> Counter[Reason | None]:
    """Many at once for a while; how often each answer came, None for success."""
    answers: Counter[Reason | None] = Counter()
    end = asyncio.get_running_loop().time() + FLOOD_S

    async def repeat() -> None:
        while asyncio.get_running_loop().time() < end:
            answers[await _reason(call())] += 1

    await asyncio.gather(*(repeat() for _ in range(16)))
    return answers


async def _reason(call: Awaitable[object]) -> Reason | None:
    try:
        await asyncio.wait_for(call, CALL_S)
    except grpc.aio.AioRpcError as failure:
        from fallow.wire.errors import error_from_rpc

        return error_from_rpc(failure).reason
    return None


async def _patiently(
    call: Callable[[], Awaitable[object]], *, until: Callable[[FallowError], bool] = lambda _: False
) -> FallowError:
    """Tries again while the coordinator only says that calls came too fast."""
    async with asyncio.timeout(60):
        while True:
            try:
                answer = await call()
            except grpc.aio.AioRpcError as failure:
                assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, failure
            else:
                if not isinstance(answer, FallowError):
                    return FallowError(Reason.INTERNAL, "it went through")
                if until(answer):
                    return answer
            await asyncio.sleep(0.2)


def _sequence(service: CoordinatorService) -> int:
    return int(service.cli("status")["journal_sequence"])
