"""What worker and coordinator say to each other, to the exact bytes that are signed, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from google.protobuf.message import DecodeError

from fallow.errors import FallowError, Reason
from fallow.ids import DIGEST_BYTES, Digest, LeaseId, PoolId, SessionId
from fallow.limits import (
    IDENTIFIER_BYTES_MAX,
    INLINE_PAYLOAD_BYTES_MAX,
    LEASES_PER_WORKER_MAX,
    MESSAGES_TOGETHER_MAX,
    NAMED_FACT_BYTES_MAX,
    NODE_RUNS_PER_TASK_MAX,
    POOL_CACHE_CERTIFICATE_BYTES_MAX,
    POOL_CACHES_TOLD_MAX,
    ROW_FAILURE_REASON_BYTES_MAX,
    ROW_FAILURES_LISTED_PER_TASK_MAX,
)
from fallow.session import (
    BundleOffer,
    CapabilityChanged,
    Cause,
    Checked,
    Commitment,
    CoordinatorMessage,
    Delivery,
    DeviceStanding,
    Draining,
    Goodbye,
    GrantsRenewed,
    GrantsWanted,
    Heartbeat,
    HeldLease,
    Hello,
    Inspection,
    Lease,
    LeaseProgress,
    LeaseReturned,
    LeaseRevoked,
    LeaseSeen,
    NodeRows,
    PoolCache,
    Refereed,
    Refused,
    RowFailure,
    Settled,
    TaskFailed,
    UploadOffer,
    Usage,
    Welcome,
    WorkerMessage,
)
from fallow.v1 import identity_pb2, session_pb2
from fallow.wire.blob import (
    digest_from,
    grant_from_message,
    grant_to_message,
    receipt_from_message,
    receipt_to_message,
    reference_from_message,
    reference_to_message,
)
from fallow.wire.bundle import report_from_message, report_to_message
from fallow.wire.capability import capability_from_message, capability_to_message
from fallow.wire.challenge import (
    checked_from_message,
    checked_to_message,
    plan_from_message,
    plan_to_message,
    standing_from_message,
    standing_to_message,
)
from fallow.wire.enums import CAUSES, ENERGY_SOURCES, PRECISIONS, TASK_KINDS
from fallow.wire.moments import duration_from_message, duration_to_message, moment_from_message, moment_to_message
from fallow.wire.referee import (
    candidates_from_message,
    candidates_to_message,
    profiles_from_message,
    profiles_to_message,
    row_findings_from_message,
    row_findings_to_message,
)


def encode_worker_message(message: WorkerMessage) -> bytes:
    """The exact bytes of a worker's message."""
    return _worker_message(message).SerializeToString(deterministic=True)


def decode_worker_message(data: bytes) -> WorkerMessage:
    """The worker's message in these bytes. Raises MALFORMED_MESSAGE, FIELD_INVALID, FIELD_MISSING, LIMIT_EXCEEDED."""
    try:
        message = session_pb2.WorkerMessage.FromString(data)
    except DecodeError:
        raise _malformed("worker message") from None
    return _worker_value(message)


def encode_coordinator_message(message: CoordinatorMessage) -> bytes:
    """The exact bytes of a coordinator's message."""
    return _coordinator_message(message).SerializeToString(deterministic=True)


def decode_coordinator_message(data: bytes) -> CoordinatorMessage:
    """The coordinator's message in these bytes. Raises MALFORMED_MESSAGE and as above."""
    try:
        message = session_pb2.CoordinatorMessage.FromString(data)
    except DecodeError:
        raise _malformed("coordinator message") from None
    return _coordinator_value(message)


def encode_coordinator_messages(messages: Sequence[CoordinatorMessage]) -> bytes:
    """The exact bytes of messages that travel as one; of a single message, its own."""
    if len(messages) == 1:
        return encode_coordinator_message(messages[0])
    assert 1 < len(messages) <= MESSAGES_TOGETHER_MAX, "messages that travel as one are counted"
    together = session_pb2.SeveralMessages(messages=[_coordinator_message(message) for message in messages])
    return session_pb2.CoordinatorMessage(several=together).SerializeToString(deterministic=True)


def decode_coordinator_messages(data: bytes) -> tuple[CoordinatorMessage, ...]:
    """The messages in these bytes, in order, at least one. Raises as `decode_coordinator_message`, LIMIT_EXCEEDED."""
    try:
        message = session_pb2.CoordinatorMessage.FromString(data)
    except DecodeError:
        raise _malformed("coordinator message") from None
    if message.WhichOneof("kind") != "several":
        return (_coordinator_value(message),)
    if not 1 <= len(message.several.messages) <= MESSAGES_TOGETHER_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"{len(message.several.messages)} messages as one",
            field="several.messages",
            limit=f"1 to {MESSAGES_TOGETHER_MAX}",
        )
    return tuple([_coordinator_value(one) for one in message.several.messages])


# ---------------------------------------------------------------------------------------------- parts


def usage_to_message(usage: Usage) -> session_pb2.Usage:
    """The protobuf form of a usage."""
    return session_pb2.Usage(
        wall_microseconds=usage.wall_microseconds,
        cpu_microseconds=usage.cpu_microseconds,
        memory_bytes_peak=usage.memory_bytes_peak,
        energy_joules=usage.energy_joules,
        tokens=usage.tokens,
        node=usage.node,
        energy_source=ENERGY_SOURCES.number(usage.energy_source),
        nodes=node_rows_to_messages(usage.nodes),
    )


def usage_from_message(message: session_pb2.Usage) -> Usage:
    """The usage a message describes. Raises FIELD_INVALID for an energy that is no quantity."""
    if not 0.0 <= message.energy_joules < math.inf:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"an energy of {message.energy_joules} joules",
            field="usage.energy_joules",
            limit="0 or more, and finite",
        )
    return Usage(
        wall_microseconds=message.wall_microseconds,
        cpu_microseconds=message.cpu_microseconds,
        memory_bytes_peak=message.memory_bytes_peak,
        energy_joules=message.energy_joules,
        tokens=message.tokens,
        node=message.node,
        energy_source=ENERGY_SOURCES.optional(message.energy_source, "usage.energy_source"),
        nodes=node_rows_from_messages(message.nodes, "usage.nodes"),
    )


def node_rows_to_messages(runs: Iterable[NodeRows]) -> list[session_pb2.NodeRows]:
    """The protobuf form of rows by node."""
    return [session_pb2.NodeRows(node=run.node, rows=run.rows) for run in runs]


def node_rows_from_messages(messages: Sequence[session_pb2.NodeRows], field: str) -> tuple[NodeRows, ...]:
    """The rows by node that messages describe. Raises LIMIT_EXCEEDED, or FIELD_INVALID for a run without rows."""
    if not messages:
        return ()
    if len(messages) > NODE_RUNS_PER_TASK_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED, f"{len(messages)} runs of rows", field=field, limit=f"{NODE_RUNS_PER_TASK_MAX} runs"
        )
    runs = tuple([NodeRows(message.node, message.rows) for message in messages])
    if not all(run.rows for run in runs):
        raise FallowError(Reason.FIELD_INVALID, "a run without rows", field=field, limit="1 row or more")
    return runs


def failure_to_message(failure: RowFailure) -> session_pb2.RowFailure:
    """The protobuf form of a row's failure."""
    return session_pb2.RowFailure(row=failure.row, cause=CAUSES.number(failure.cause), reason=failure.reason)


def failure_from_message(message: session_pb2.RowFailure, field: str) -> RowFailure:
    """The failure a message describes. Raises FIELD_INVALID or LIMIT_EXCEEDED."""
    return RowFailure(message.row, CAUSES.member(message.cause, f"{field}.cause"), _reason(message.reason, field))


def _offer_to_message(offer: BundleOffer | None) -> session_pb2.BundleOffer | None:
    if offer is None:
        return None
    return session_pb2.BundleOffer(
        bundle_digest=offer.bundle_digest,
        manifest=offer.manifest,
        file_grants=[grant_to_message(grant) for grant in offer.file_grants],
        canonical_batch_rows=offer.canonical_batch_rows,
        slot_dependent=offer.slot_dependent,
        memory_bytes_peak=offer.memory_bytes_peak,
        pool_caches=[_pool_cache_to_message(cache) for cache in offer.pool_caches],
    )


def _pool_cache_to_message(cache: PoolCache) -> session_pb2.PoolCache:
    return session_pb2.PoolCache(endpoint=cache.endpoint, certificate=cache.certificate)


def _pool_cache_from_message(message: session_pb2.PoolCache, field: str) -> PoolCache:
    host, _, port = message.endpoint.rpartition(":")
    if not host or not port.isdecimal() or len(message.endpoint) > NAMED_FACT_BYTES_MAX:
        raise FallowError(
            Reason.FIELD_INVALID, "this is no endpoint of a cache", field=f"{field}.endpoint", limit="host:port"
        )
    if not 1 <= len(message.certificate) <= POOL_CACHE_CERTIFICATE_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a certificate of {len(message.certificate)} bytes",
            field=f"{field}.certificate",
            limit=f"1 to {POOL_CACHE_CERTIFICATE_BYTES_MAX} bytes",
        )
    return PoolCache(message.endpoint, message.certificate)


def _offer_from_message(message: session_pb2.BundleOffer) -> BundleOffer:
    return BundleOffer(
        bundle_digest=digest_from(message.bundle_digest, "offer.bundle_digest"),
        manifest=message.manifest,
        file_grants=tuple(grant_from_message(grant) for grant in message.file_grants),
        canonical_batch_rows=message.canonical_batch_rows,
        slot_dependent=message.slot_dependent,
        memory_bytes_peak=message.memory_bytes_peak,
        pool_caches=tuple(
            [_pool_cache_from_message(m, "offer.pool_caches") for m in message.pool_caches[:POOL_CACHES_TOLD_MAX]]
        ),
    )


# ---------------------------------------------------------------------------------------------- worker → coordinator


def _worker_message(message: WorkerMessage) -> session_pb2.WorkerMessage:  # noqa: PLR0911 - one for each kind
    match message:
        case Hello():
            return session_pb2.WorkerMessage(hello=_hello_to_message(message))
        case Heartbeat(progress):
            parts = [
                session_pb2.LeaseProgress(lease_id=p.lease_id, fence=p.fence, rows_done=p.rows_done) for p in progress
            ]
            return session_pb2.WorkerMessage(heartbeat=session_pb2.Heartbeat(progress=parts))
        case CapabilityChanged(capability, window):
            changed = session_pb2.CapabilityChanged(
                capability=capability_to_message(capability) if capability else None, window=window
            )
            return session_pb2.WorkerMessage(capability_changed=changed)
        case Commitment():
            return session_pb2.WorkerMessage(commitment=_commitment_to_message(message))
        case Delivery(lease_id, fence, receipt):
            delivery = session_pb2.Delivery(lease_id=lease_id, fence=fence, receipt=receipt_to_message(receipt))
            return session_pb2.WorkerMessage(delivery=delivery)
        case Inspection(lease_id, fence, report, usage):
            inspection = session_pb2.Inspection(
                lease_id=lease_id, fence=fence, report=report_to_message(report), usage=usage_to_message(usage)
            )
            return session_pb2.WorkerMessage(inspection=inspection)
        case TaskFailed(lease_id, fence, cause, reason):
            failed = session_pb2.TaskFailed(lease_id=lease_id, fence=fence, cause=CAUSES.number(cause), reason=reason)
            return session_pb2.WorkerMessage(task_failed=failed)
        case LeaseReturned(lease_id, fence, cause, reason):
            returned = session_pb2.LeaseReturned(
                lease_id=lease_id, fence=fence, cause=CAUSES.number(cause), reason=reason
            )
            return session_pb2.WorkerMessage(lease_returned=returned)
        case GrantsWanted(lease_id, fence):
            return session_pb2.WorkerMessage(grants_wanted=session_pb2.GrantsWanted(lease_id=lease_id, fence=fence))
        case Draining(reason):
            return session_pb2.WorkerMessage(draining=session_pb2.Draining(reason=reason))
        case LeaseSeen(lease_id, fence):
            return session_pb2.WorkerMessage(lease_seen=session_pb2.LeaseSeen(lease_id=lease_id, fence=fence))
        case Checked():
            return session_pb2.WorkerMessage(checked=checked_to_message(message))
        case Refereed():
            return session_pb2.WorkerMessage(refereed=_refereed_to_message(message))


def _worker_value(message: session_pb2.WorkerMessage) -> WorkerMessage:  # noqa: PLR0911 - one for each kind
    match message.WhichOneof("kind"):
        case "hello":
            return _hello_from_message(message.hello)
        case "heartbeat":
            _check_lease_count(len(message.heartbeat.progress), "heartbeat.progress")
            progress = tuple(
                LeaseProgress(_lease_id(p.lease_id), p.fence, p.rows_done) for p in message.heartbeat.progress
            )
            return Heartbeat(progress)
        case "capability_changed":
            changed = message.capability_changed
            capability = capability_from_message(changed.capability) if changed.HasField("capability") else None
            return CapabilityChanged(capability, changed.window)
        case "commitment":
            return _commitment_from_message(message.commitment)
        case "delivery":
            delivery = message.delivery
            return Delivery(_lease_id(delivery.lease_id), delivery.fence, receipt_from_message(delivery.receipt))
        case "inspection":
            found = message.inspection
            report, usage = report_from_message(found.report), usage_from_message(found.usage)
            return Inspection(_lease_id(found.lease_id), found.fence, report, usage)
        case "task_failed":
            failed = message.task_failed
            return TaskFailed(_lease_id(failed.lease_id), failed.fence, *_cause_and_reason(failed.cause, failed.reason))
        case "lease_returned":
            back = message.lease_returned
            return LeaseReturned(_lease_id(back.lease_id), back.fence, *_cause_and_reason(back.cause, back.reason))
        case "grants_wanted":
            return GrantsWanted(_lease_id(message.grants_wanted.lease_id), message.grants_wanted.fence)
        case "draining":
            return Draining(_reason(message.draining.reason, "draining"))
        case "lease_seen":
            return LeaseSeen(_lease_id(message.lease_seen.lease_id), message.lease_seen.fence)
        case "checked":
            checked = message.checked
            return checked_from_message(checked, _lease_id(checked.lease_id), _reason(checked.reason, "checked"))
        case "refereed":
            return _refereed_from_message(message.refereed)
        case _:
            raise FallowError(
                Reason.FIELD_INVALID, "a worker message of no known kind", field="kind", hint="upgrade the coordinator"
            )


def _hello_to_message(hello: Hello) -> session_pb2.Hello:
    return session_pb2.Hello(
        protocol=identity_pb2.ProtocolVersion(
            version=hello.protocol_version, min_supported=hello.protocol_min_supported, software=hello.software
        ),
        resume_token=hello.resume_token,
        capability=capability_to_message(hello.capability),
        window=hello.window,
        held_leases=[
            session_pb2.HeldLease(lease_id=held.lease_id, fence=held.fence, committed=held.committed)
            for held in hello.held_leases
        ],
        takes_several=hello.takes_several,
        machine_digest=hello.machine_digest,
        pool_cache=_pool_cache_to_message(hello.pool_cache) if hello.pool_cache else None,
    )


def _machine_digest(digest: bytes) -> bytes:
    if len(digest) not in (0, DIGEST_BYTES):
        raise FallowError(
            Reason.FIELD_INVALID,
            f"a machine digest of {len(digest)} bytes",
            field="hello.machine_digest",
            limit=f"{DIGEST_BYTES} bytes, or none",
        )
    return digest


def _hello_from_message(message: session_pb2.Hello) -> Hello:
    _check_lease_count(len(message.held_leases), "hello.held_leases")
    return Hello(
        protocol_version=message.protocol.version,
        protocol_min_supported=message.protocol.min_supported,
        software=_named(message.protocol.software, "hello.protocol.software"),
        resume_token=message.resume_token,
        capability=capability_from_message(message.capability),
        window=message.window,
        held_leases=tuple(HeldLease(_lease_id(h.lease_id), h.fence, h.committed) for h in message.held_leases),
        takes_several=message.takes_several,
        machine_digest=_machine_digest(message.machine_digest),
        pool_cache=_pool_cache_from_message(message.pool_cache, "hello.pool_cache")
        if message.HasField("pool_cache")
        else None,
    )


def _commitment_to_message(commitment: Commitment) -> session_pb2.Commitment:
    return session_pb2.Commitment(
        lease_id=commitment.lease_id,
        fence=commitment.fence,
        output_root=commitment.output_root,
        rows=commitment.rows,
        output=reference_to_message(commitment.output),
        failures=[failure_to_message(failure) for failure in commitment.failures],
        usage=usage_to_message(commitment.usage),
        execution_class=commitment.execution_class,
        inline_output=commitment.inline_output,
        partial=commitment.partial,
    )


def _commitment_from_message(message: session_pb2.Commitment) -> Commitment:
    if (
        len(message.failures) > ROW_FAILURES_LISTED_PER_TASK_MAX
        or len(message.inline_output) > INLINE_PAYLOAD_BYTES_MAX
    ):
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            "too many failures or too long an inline output",
            field="commitment",
            limit=f"{ROW_FAILURES_LISTED_PER_TASK_MAX} failures, {INLINE_PAYLOAD_BYTES_MAX} bytes inline",
        )
    return Commitment(
        lease_id=_lease_id(message.lease_id),
        fence=message.fence,
        output_root=digest_from(message.output_root, "commitment.output_root"),
        rows=message.rows,
        output=reference_from_message(message.output, "commitment.output"),
        failures=tuple(
            failure_from_message(failure, f"commitment.failures[{i}]") for i, failure in enumerate(message.failures)
        ),
        usage=usage_from_message(message.usage),
        execution_class=_named(message.execution_class, "commitment.execution_class"),
        inline_output=message.inline_output,
        partial=message.partial,
    )


def _refereed_to_message(refereed: Refereed) -> session_pb2.Refereed:
    return session_pb2.Refereed(
        lease_id=refereed.lease_id,
        fence=refereed.fence,
        own_root=refereed.own_root,
        rows=row_findings_to_message(refereed.rows),
        execution_class=refereed.execution_class,
        usage=usage_to_message(refereed.usage),
    )


def _refereed_from_message(message: session_pb2.Refereed) -> Refereed:
    return Refereed(
        lease_id=_lease_id(message.lease_id),
        fence=message.fence,
        own_root=digest_from(message.own_root, "refereed.own_root"),
        rows=row_findings_from_message(message.rows),
        execution_class=_named(message.execution_class, "refereed.execution_class"),
        usage=usage_from_message(message.usage),
    )


# ---------------------------------------------------------------------------------------------- coordinator → worker


def _coordinator_message(message: CoordinatorMessage) -> session_pb2.CoordinatorMessage:
    match message:
        case Welcome():
            return session_pb2.CoordinatorMessage(welcome=_welcome_to_message(message))
        case Lease():
            return session_pb2.CoordinatorMessage(lease=_lease_to_message(message))
        case UploadOffer(lease_id, fence, grant):
            offer = session_pb2.UploadOffer(lease_id=lease_id, fence=fence, grant=grant_to_message(grant))
            return session_pb2.CoordinatorMessage(upload_offer=offer)
        case Settled(lease_id, fence, microcredits):
            settled = session_pb2.Settled(lease_id=lease_id, fence=fence, microcredits=microcredits)
            return session_pb2.CoordinatorMessage(settled=settled)
        case LeaseRevoked(lease_id, fence, reason):
            revoked = session_pb2.LeaseRevoked(lease_id=lease_id, fence=fence, reason=reason)
            return session_pb2.CoordinatorMessage(lease_revoked=revoked)
        case Refused(sequence, lease_id, reason, text):
            detail = identity_pb2.ErrorDetail(reason=reason, message=text)
            refused = session_pb2.Refused(sequence=sequence, lease_id=lease_id or "", error=detail)
            return session_pb2.CoordinatorMessage(refused=refused)
        case GrantsRenewed(lease_id, fence, input_grant, offer, candidate_grants):
            renewed = session_pb2.GrantsRenewed(
                lease_id=lease_id,
                fence=fence,
                input_grant=grant_to_message(input_grant) if input_grant else None,
                offer=_offer_to_message(offer),
                candidate_grants=[grant_to_message(grant) for grant in candidate_grants],
            )
            return session_pb2.CoordinatorMessage(grants_renewed=renewed)
        case Goodbye(reason, text, reconnect_after_ms):
            goodbye = session_pb2.Goodbye(
                error=identity_pb2.ErrorDetail(reason=reason, message=text),
                reconnect_after=duration_to_message(reconnect_after_ms) if reconnect_after_ms else None,
            )
            return session_pb2.CoordinatorMessage(goodbye=goodbye)
        case DeviceStanding():
            return session_pb2.CoordinatorMessage(device_standing=standing_to_message(message))


def _coordinator_value(message: session_pb2.CoordinatorMessage) -> CoordinatorMessage:
    match message.WhichOneof("kind"):
        case "welcome":
            return _welcome_from_message(message.welcome)
        case "lease":
            return _lease_from_message(message.lease)
        case "upload_offer":
            offer = message.upload_offer
            return UploadOffer(LeaseId(offer.lease_id), offer.fence, grant_from_message(offer.grant))
        case "settled":
            return Settled(LeaseId(message.settled.lease_id), message.settled.fence, message.settled.microcredits)
        case "lease_revoked":
            revoked = message.lease_revoked
            return LeaseRevoked(LeaseId(revoked.lease_id), revoked.fence, revoked.reason)
        case "refused":
            refused = message.refused
            lease_id = LeaseId(refused.lease_id) if refused.lease_id else None
            return Refused(refused.sequence, lease_id, refused.error.reason, refused.error.message)
        case "grants_renewed":
            renewed = message.grants_renewed
            return GrantsRenewed(
                LeaseId(renewed.lease_id),
                renewed.fence,
                grant_from_message(renewed.input_grant) if renewed.HasField("input_grant") else None,
                _offer_from_message(renewed.offer) if renewed.HasField("offer") else None,
                tuple(grant_from_message(grant) for grant in renewed.candidate_grants),
            )
        case "goodbye":
            goodbye = message.goodbye
            wait_ms = duration_from_message(goodbye.reconnect_after)
            return Goodbye(goodbye.error.reason, goodbye.error.message, wait_ms)
        case "device_standing":
            return standing_from_message(message.device_standing)
        case _:
            raise FallowError(
                Reason.FIELD_INVALID, "a coordinator message of no known kind", field="kind", hint="upgrade the worker"
            )


def _welcome_to_message(welcome: Welcome) -> session_pb2.Welcome:
    return session_pb2.Welcome(
        protocol=identity_pb2.ProtocolVersion(
            version=welcome.protocol_version, min_supported=welcome.protocol_min_supported
        ),
        session_id=welcome.session_id,
        resume_token=welcome.resume_token,
        heartbeat_interval=duration_to_message(welcome.heartbeat_interval_ms),
        keep_lease_ids=welcome.keep_lease_ids,
        now=moment_to_message(welcome.now_ms),
        blob_endpoint=welcome.blob_endpoint,
    )


def _welcome_from_message(message: session_pb2.Welcome) -> Welcome:
    return Welcome(
        protocol_version=message.protocol.version,
        protocol_min_supported=message.protocol.min_supported,
        session_id=SessionId(message.session_id),
        resume_token=message.resume_token,
        heartbeat_interval_ms=duration_from_message(message.heartbeat_interval),
        keep_lease_ids=tuple(LeaseId(lease_id) for lease_id in message.keep_lease_ids),
        now_ms=moment_from_message(message.now),
        blob_endpoint=message.blob_endpoint,
    )


def _lease_to_message(lease: Lease) -> session_pb2.Lease:
    return session_pb2.Lease(
        lease_id=lease.lease_id,
        fence=lease.fence,
        kind=TASK_KINDS.number(lease.kind),
        bundle_digest=lease.bundle_digest,
        offer=_offer_to_message(lease.offer),
        rows=lease.rows,
        input=reference_to_message(lease.input) if lease.input else None,
        inline_input=lease.inline_input,
        input_grant=grant_to_message(lease.input_grant) if lease.input_grant else None,
        deadline=moment_to_message(lease.deadline_ms),
        runtime_max=duration_to_message(lease.runtime_max_ms),
        precision=PRECISIONS.number(lease.precision),
        buckets=lease.buckets,
        slots=lease.slots,
        output_bytes_max=lease.output_bytes_max,
        unit_micros=lease.unit_micros,
        pool_id=lease.pool_id,
        latency_ms_max=lease.latency_ms_max,
        challenge=plan_to_message(lease.challenge) if lease.challenge else None,
        candidates=candidates_to_message(lease.candidates),
        execution_classes=lease.execution_classes,
        profiles=profiles_to_message(lease.profiles),
    )


def _lease_from_message(message: session_pb2.Lease) -> Lease:
    return Lease(
        lease_id=LeaseId(message.lease_id),
        fence=message.fence,
        kind=TASK_KINDS.member(message.kind, "lease.kind"),
        bundle_digest=Digest(message.bundle_digest),
        offer=_offer_from_message(message.offer) if message.HasField("offer") else None,
        rows=message.rows,
        input=reference_from_message(message.input, "lease.input") if message.HasField("input") else None,
        inline_input=message.inline_input,
        input_grant=grant_from_message(message.input_grant) if message.HasField("input_grant") else None,
        deadline_ms=moment_from_message(message.deadline),
        runtime_max_ms=duration_from_message(message.runtime_max),
        precision=PRECISIONS.member(message.precision, "lease.precision"),
        buckets=tuple(message.buckets),
        slots=tuple(message.slots),
        output_bytes_max=message.output_bytes_max,
        unit_micros=message.unit_micros,
        pool_id=PoolId(message.pool_id),
        latency_ms_max=message.latency_ms_max,
        challenge=plan_from_message(message.challenge, "lease.challenge") if message.HasField("challenge") else None,
        candidates=candidates_from_message(message),
        execution_classes=tuple(message.execution_classes),
        profiles=profiles_from_message(message.profiles),
    )


# ---------------------------------------------------------------------------------------------- limits


def _cause_and_reason(cause: int, reason: str) -> tuple[Cause, str]:
    return CAUSES.member(cause, "cause"), _reason(reason, "reason")


def _reason(text: str, field: str) -> str:
    if len(text.encode()) > ROW_FAILURE_REASON_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a reason of {len(text.encode())} bytes",
            field=field,
            limit=f"{ROW_FAILURE_REASON_BYTES_MAX} bytes",
        )
    return text


def _lease_id(text: str) -> LeaseId:
    """A lease's name as a worker may say it: what comes back in refusals and stands in logs is short and printable."""
    if len(text.encode()) > IDENTIFIER_BYTES_MAX or not text.isprintable():
        raise FallowError(
            Reason.FIELD_INVALID,
            "this is no lease's name",
            field="lease_id",
            limit=f"{IDENTIFIER_BYTES_MAX} bytes, printable",
        )
    return LeaseId(text)


def _check_lease_count(count: int, field: str) -> None:
    if count > LEASES_PER_WORKER_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED, f"{count} leases", field=field, limit=f"{LEASES_PER_WORKER_MAX} leases"
        )


def _named(text: str, field: str) -> str:
    if len(text.encode()) > NAMED_FACT_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a text of {len(text.encode())} bytes",
            field=field,
            limit=f"{NAMED_FACT_BYTES_MAX} bytes",
        )
    return text


def _malformed(what: str) -> FallowError:
    return FallowError(Reason.MALFORMED_MESSAGE, f"these bytes are no {what}", field="payload")
