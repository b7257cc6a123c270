"""The exact bytes of session messages: what is signed today must verify for ever."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fallow.bundle import InspectionReport, Precision
from fallow.challenge import ChallengeKind, ChallengePlan, ChallengeVerdict
from fallow.comparison import PPM_MAX, CandidateFinding, Finding, RowFinding, ToleranceProfile
from fallow.cost import CostCurve, CostKnot
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, LeaseId, PoolId, SessionId
from fallow.limits import ROW_FAILURE_REASON_BYTES_MAX
from fallow.session import (
    BlobReference,
    BundleOffer,
    Candidate,
    Capability,
    CapabilityChanged,
    Cause,
    Checked,
    Commitment,
    CoordinatorMessage,
    Delivery,
    Device,
    DeviceKind,
    DeviceLevel,
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
    Refereed,
    Refused,
    RowFailure,
    SandboxLevel,
    Settled,
    SignedBytes,
    TaskFailed,
    TaskKind,
    UploadOffer,
    Usage,
    Welcome,
    WorkerMessage,
)
from fallow.v1 import session_pb2
from fallow.wire.session import (
    decode_coordinator_message,
    decode_coordinator_messages,
    decode_worker_message,
    encode_coordinator_message,
    encode_coordinator_messages,
    encode_worker_message,
)

GOLDEN = Path(__file__).parent / "golden"
LEASE = LeaseId("lease-a")
ONE, TWO = Digest(bytes([1]) * 32), Digest(bytes([2]) * 32)
SIGNED = SignedBytes(b"payload", b"signature")
USAGE = Usage(1, 2, 3, 0.5, 4, 5)
CAPABILITY = Capability(
    devices=(
        Device(
            "cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, "AMD", "EPYC", 1 << 34, ("CPU",), "", "", 2, "avx2", "class", 1
        ),
    ),
    sandbox_level=SandboxLevel.FULL,
    memory_bytes_free=1 << 33,
    executor="ray",
    nodes=2,
    operating_system="linux",
    region="eu",
    task_kinds=frozenset({TaskKind.MAP, TaskKind.INSPECT}),
)
OFFER = BundleOffer(ONE, b"manifest", (SIGNED,), 4, True, 1 << 28)
REPORT = InspectionReport(ONE, True, (), (("MatMul", 3),), 4, False, False, 120, 7, 1 << 27, "class", 1.5)
CURVE = CostCurve(1, (CostKnot(0, 5_000), CostKnot(4_096, 900_000)), 31, "odd")

WORKER_MESSAGES: dict[str, WorkerMessage] = {
    "hello": Hello(1, 1, "fallow 0.1.0", b"token", CAPABILITY, 3, (HeldLease(LEASE, 7, True),)),
    "heartbeat": Heartbeat((LeaseProgress(LEASE, 7, 100),)),
    "capability_changed": CapabilityChanged(CAPABILITY, 2),
    "commitment": Commitment(
        LEASE, 7, ONE, 10, BlobReference(TWO, 400), (RowFailure(3, Cause.ROW, "not UTF-8"),), USAGE, "class", b"block"
    ),
    "commitment_of_nodes": Commitment(
        LEASE, 7, ONE, 10, BlobReference(TWO, 400), (), replace(USAGE, nodes=(NodeRows(5, 7), NodeRows(0, 3)))
    ),
    "delivery": Delivery(LEASE, 7, SIGNED),
    "inspection": Inspection(LEASE, 7, REPORT, USAGE),
    "inspection_with_cost": Inspection(LEASE, 7, replace(REPORT, cost=CURVE, flops_per_row=3_000_000), USAGE),
    "task_failed": TaskFailed(LEASE, 7, Cause.PROGRAM, "died"),
    "lease_returned": LeaseReturned(LEASE, 7, Cause.OWNER_PREEMPT, "owner is back"),
    "grants_wanted": GrantsWanted(LEASE, 7),
    "draining": Draining("stopping"),
    "lease_seen": LeaseSeen(LEASE, 7),
    "checked": Checked(LEASE, 7, ChallengeVerdict(False, "row 3 is not the product")),
    "refereed": Refereed(
        LEASE,
        7,
        TWO,
        (
            RowFinding(0, (CandidateFinding(Finding.EQUAL), CandidateFinding(Finding.WRONG, PPM_MAX))),
            RowFinding(1, (CandidateFinding(None), CandidateFinding(Finding.WITHIN_TOLERANCE, 250_000, 3_000_000))),
        ),
        "class-a",
        USAGE,
    ),
}
COORDINATOR_MESSAGES: dict[str, CoordinatorMessage] = {
    "welcome": Welcome(1, 1, SessionId("session-a"), b"next", 10_000, (LEASE,), 1_700_000_000_123, "127.0.0.1:1"),
    "lease": Lease(
        LEASE,
        7,
        TaskKind.MAP,
        ONE,
        OFFER,
        10,
        BlobReference(TWO, 400),
        b"",
        SIGNED,
        1_700_000_000_123,
        60_500,
        Precision.FP32,
        1 << 20,
        99,
        PoolId("pool-a"),
        (0, 1),
        (2, 3),
        250,
    ),
    "upload_offer": UploadOffer(LEASE, 7, SIGNED),
    "settled": Settled(LEASE, 7, 12),
    "lease_revoked": LeaseRevoked(LEASE, 7, "job cancelled"),
    "refused": Refused(4, LEASE, "FENCE_STALE", "fence 6 is older than 7"),
    "grants_renewed": GrantsRenewed(LEASE, 7, SIGNED, OFFER),
    "goodbye": Goodbye("SESSION_REPLACED", "a newer session took over", 1500),
    "device_standing": DeviceStanding("cpu-0", 1_500, 1 << 29, 1_700_000_000_123, "measured"),
    "challenge": Lease(
        LEASE,
        7,
        TaskKind.CHALLENGE,
        ONE,
        None,
        1,
        None,
        b"",
        None,
        1_700_000_000_123,
        60_500,
        Precision.FP32,
        1 << 20,
        99,
        PoolId("pool-a"),
        challenge=ChallengePlan(
            "cpu-0", ChallengeKind.SPEED, bytes(range(32)), Precision.FP32, 512, 2_048, 512, 70, 1 << 20, 64
        ),
    ),
    "referee": Lease(
        LEASE,
        7,
        TaskKind.REFEREE,
        ONE,
        None,
        3,
        BlobReference(TWO, 400),
        b"",
        SIGNED,
        1_700_000_000_123,
        60_500,
        Precision.FP32,
        1 << 20,
        99,
        PoolId("pool-a"),
        slots=(2, 3, 0),
        candidates=(
            Candidate(BlobReference(ONE, 300), SIGNED, b"", (0, 1, 0)),
            Candidate(BlobReference(TWO, 200), None, b"block", (1,), (2,)),
        ),
        execution_classes=("class-a", "class-b"),
        profiles=(ToleranceProfile("class-a", "class-b", 200, 900_000, 1_500_000, 4_000_000),),
    ),
}


SEVERAL = tuple(COORDINATOR_MESSAGES[name] for name in ("settled", "lease", "refused"))


def golden(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{name}.hex").read_text())


@pytest.mark.parametrize("name", WORKER_MESSAGES)
def test_worker_messages_keep_their_bytes(name: str) -> None:
    message = WORKER_MESSAGES[name]
    assert encode_worker_message(message) == golden(f"worker_{name}")
    assert decode_worker_message(golden(f"worker_{name}")) == message


@pytest.mark.parametrize("name", COORDINATOR_MESSAGES)
def test_coordinator_messages_keep_their_bytes(name: str) -> None:
    message = COORDINATOR_MESSAGES[name]
    assert encode_coordinator_message(message) == golden(f"coordinator_{name}")
    assert decode_coordinator_message(golden(f"coordinator_{name}")) == message


def test_messages_that_travel_as_one_keep_their_bytes_and_their_order() -> None:
    assert encode_coordinator_messages(SEVERAL) == golden("coordinator_several")
    assert decode_coordinator_messages(golden("coordinator_several")) == SEVERAL


@pytest.mark.parametrize("name", COORDINATOR_MESSAGES)
def test_a_message_alone_travels_as_itself(name: str) -> None:
    message = COORDINATOR_MESSAGES[name]
    assert encode_coordinator_messages([message]) == golden(f"coordinator_{name}")
    assert decode_coordinator_messages(golden(f"coordinator_{name}")) == (message,)


def test_neither_none_nor_too_many_nor_nested_messages_travel_as_one() -> None:
    inner = session_pb2.CoordinatorMessage()
    for count, reason in ((0, Reason.LIMIT_EXCEEDED), (65, Reason.LIMIT_EXCEEDED), (1, Reason.FIELD_INVALID)):
        several = session_pb2.SeveralMessages(messages=[inner] * count)
        data = session_pb2.CoordinatorMessage(several=several).SerializeToString()
        with pytest.raises(FallowError) as caught:
            decode_coordinator_messages(data)
        assert caught.value.reason is reason
    nested = session_pb2.CoordinatorMessage()
    nested.several.messages.add().several.messages.add().settled.lease_id = "lease-a"
    with pytest.raises(FallowError) as caught:
        decode_coordinator_messages(nested.SerializeToString())
    assert caught.value.reason is Reason.FIELD_INVALID


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x05\x01"])
def test_malformed_bytes_are_named(data: bytes) -> None:
    with pytest.raises(FallowError) as caught:
        decode_worker_message(data)
    assert caught.value.reason is Reason.MALFORMED_MESSAGE


def test_an_empty_message_has_no_kind() -> None:
    with pytest.raises(FallowError) as caught:
        decode_worker_message(b"")
    assert caught.value.reason is Reason.FIELD_INVALID


def test_a_reason_beyond_its_limit_is_refused() -> None:
    data = encode_worker_message(TaskFailed(LEASE, 1, Cause.ROW, "x" * (ROW_FAILURE_REASON_BYTES_MAX + 1)))
    with pytest.raises(FallowError) as caught:
        decode_worker_message(data)
    assert caught.value.reason is Reason.LIMIT_EXCEEDED
