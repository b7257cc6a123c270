"""Enrolled workers that send too much, too long, too often or too strange: nobody else notices."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adversarial.attackers import Submitter, submitter, watched
from fallow.bundle import InspectionReport
from fallow.credentials import Credentials
from fallow.credits import ASK_MICROCREDITS_PER_UNIT_MAX
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, LeaseId
from fallow.limits import CAPABILITY_BYTES_MAX, LEASES_PER_WORKER_MAX, ROW_FAILURES_LISTED_PER_TASK_MAX
from fallow.session import (
    BlobReference,
    Capability,
    CapabilityChanged,
    Cause,
    Commitment,
    Device,
    DeviceKind,
    DeviceLevel,
    Draining,
    GrantsWanted,
    Heartbeat,
    HeldLease,
    Inspection,
    LeaseProgress,
    LeaseReturned,
    Refused,
    RowFailure,
    TaskFailed,
    Usage,
    WorkerMessage,
)
from fallow.v1 import worker_service_pb2 as pb
from integration.harness import CoordinatorService
from integration.raw_session import RawSession, hello, joined, raw_session

pytestmark = pytest.mark.processes

FLOOD_S = 0.8
NOBODYS = LeaseId("lease-nobody")
ROOT, BLOB = Digest(b"r" * 32), BlobReference(Digest(b"d" * 32), 10)
LONG = "x" * 200_000


@pytest.fixture
async def attacker(target: CoordinatorService, tmp_path: Path) -> Credentials:
    return await joined(target.worker_join_line, tmp_path / "attacker")


@pytest.fixture
async def honest(accounts: str, tmp_path: Path) -> AsyncIterator[Submitter]:
    async with submitter(accounts, tmp_path) as made:
        yield made


async def _flood(session: RawSession, make: Callable[[int], WorkerMessage], *, sign: bool, reads: bool = True) -> int:
    """Sends as fast as it is let, for a while; gives how many got out."""
    sent = 0

    async def send() -> None:
        nonlocal sent
        while True:
            await session.send(make(sent), sign=sign)
            sent += 1
            await asyncio.sleep(0)

    sending = asyncio.create_task(send())
    reading = asyncio.create_task(session.ended()) if reads else None
    await asyncio.sleep(FLOOD_S)
    for task in (sending, reading):
        if task is not None:
            task.cancel()
    await asyncio.gather(*(task for task in (sending, reading) if task is not None), return_exceptions=True)
    return sent


FLOODS: dict[str, tuple[Callable[[int], WorkerMessage], bool]] = {
    "heartbeats": (lambda _: Heartbeat(), False),
    "heartbeats about 12,000 leases": (
        lambda _: Heartbeat((LeaseProgress(NOBODYS, 1, 1),) * 12_000),
        False,
    ),
    "long capabilities": (lambda n: CapabilityChanged(Capability(executor=f"{LONG}{n}"), 1), False),
    "short capabilities": (lambda n: CapabilityChanged(Capability(executor=str(n)), 1), False),
    "windows": (lambda n: CapabilityChanged(None, n % LEASES_PER_WORKER_MAX), False),
    "long names of leases": (lambda n: GrantsWanted(LeaseId(f"{LONG}{n}"), 1), False),
    "wishes for grants": (lambda _: GrantsWanted(NOBODYS, 1), False),
    "failures of tasks": (lambda _: TaskFailed(NOBODYS, 1, Cause.PROGRAM, "x" * 256), True),
    "commitments with many failed rows": (
        lambda _: Commitment(NOBODYS, 1, ROOT, 1, BLOB, failures=(RowFailure(0, Cause.ROW, ""),) * 25_000),
        True,
    ),
}


@pytest.mark.parametrize("what", FLOODS)
async def test_a_flood_neither_fills_the_disk_nor_holds_up_others(
    what: str, target: CoordinatorService, attacker: Credentials, honest: Submitter
) -> None:
    make, sign = FLOODS[what]
    async with watched(target, honest) as watch, raw_session(attacker) as session:
        await session.open()
        assert await _flood(session, make, sign=sign) > 1
    watch.was_harmless()


async def test_a_worker_that_never_reads_costs_little_memory(
    target: CoordinatorService, attacker: Credentials, honest: Submitter
) -> None:
    async with watched(target, honest) as watch, raw_session(attacker) as session:
        await session.open()
        await _flood(session, lambda _: GrantsWanted(LeaseId("n" * 64), 1), sign=False, reads=False)
    watch.was_harmless(memory_bytes_max=40_000_000)


async def test_sessions_opened_without_end_are_told_to_wait(
    target: CoordinatorService, attacker: Credentials, honest: Submitter
) -> None:
    reasons: set[Reason] = set()

    async def reopen() -> None:
        for _ in range(80):
            async with raw_session(attacker) as session:
                await session.send(hello())
                try:
                    await asyncio.wait_for(session.receive(), 5)
                except Exception as error:
                    reasons.add(getattr(error, "reason", Reason.INTERNAL))

    async with watched(target, honest) as watch:
        await asyncio.gather(*(reopen() for _ in range(4)))
    assert Reason.OVERLOADED in reasons
    watch.was_harmless()


def _device(number: int = 0, **facts: object) -> Device:
    plain = Device(f"cpu-{number}", DeviceKind.CPU, DeviceLevel.USABLE, cores=2, slots=1)
    return replace(plain, **facts)  # type: ignore[arg-type]  # facts of a device


HELLOS = {
    "a million devices": Capability(devices=tuple(_device(n) for n in range(4_000))),
    "one device too many": Capability(devices=tuple(_device(n) for n in range(65))),
    "a capability that is too long": Capability(region="x" * (CAPABILITY_BYTES_MAX + 1)),
    "a device of too many words": Capability(devices=(_device(vendor=LONG),)),
}


@pytest.mark.parametrize("what", HELLOS)
async def test_an_absurd_capability_is_refused_by_name(what: str, attacker: Credentials) -> None:
    async with raw_session(attacker) as session:
        await session.send(replace(hello(), capability=HELLOS[what]))
        error = await session.ended()
        assert error.reason is Reason.LIMIT_EXCEEDED
        assert error.field.startswith("capability")


async def test_numbers_at_their_ends_are_survived(target: CoordinatorService, attacker: Credentials) -> None:
    most = 2**64 - 1
    device = _device(memory_bytes=most, cores=2**32 - 1, slots=2**32 - 1)
    capability = Capability(
        devices=(device,) * 60, memory_bytes_free=most, nodes=2**32 - 1, network_down_bytes_per_s=most,
        network_up_bytes_per_s=most, ask_microcredits_per_unit=ASK_MICROCREDITS_PER_UNIT_MAX,
    )  # fmt: skip
    absurd = replace(capability, ask_microcredits_per_unit=most)
    async with raw_session(attacker) as session:
        with pytest.raises(FallowError) as caught:
            await session.open(replace(hello(), capability=absurd))
        assert caught.value.field == "capability.ask_microcredits_per_unit"
    async with raw_session(attacker) as session:
        await session.open(replace(hello(), capability=capability, window=LEASES_PER_WORKER_MAX))
        await session.send(GrantsWanted(NOBODYS, most), sign=False, sequence=most)
        assert isinstance(await session.receive(), Refused)
        await session.send(Heartbeat(), sign=False, sequence=most)
        assert (await session.ended()).reason is Reason.SEQUENCE_REPLAYED
    workers = {one["worker_id"]: one for one in target.cli("worker", "list")["workers"]}
    assert workers[attacker.party_id]["capability"]["devices"][0]["memory_bytes"] == str(most)


_REPORT = InspectionReport(
    bundle_digest=Digest(b"b" * 32), accepted=True, refusals=(), operators=(), canonical_batch_rows=1,
    slot_dependent=False, neighbour_dependent=False, unit_micros_per_row=1, unit_micros_per_kib=0,
    memory_bytes_peak=1, execution_class="", inspected_seconds=0.0,
)  # fmt: skip

REFUSED: dict[str, tuple[WorkerMessage, Reason, bool]] = {
    "an energy that is no number": (
        Commitment(NOBODYS, 1, ROOT, 1, BLOB, usage=Usage(energy_joules=math.nan)), Reason.FIELD_INVALID, True,
    ),
    "an energy without end": (
        Commitment(NOBODYS, 1, ROOT, 1, BLOB, usage=Usage(energy_joules=math.inf)), Reason.FIELD_INVALID, True,
    ),
    "energy gained": (
        Commitment(NOBODYS, 1, ROOT, 1, BLOB, usage=Usage(energy_joules=-1.0)), Reason.FIELD_INVALID, True,
    ),
    "an execution class of 200,000 bytes": (
        Commitment(NOBODYS, 1, ROOT, 1, BLOB, execution_class=LONG), Reason.LIMIT_EXCEEDED, True,
    ),
    "one failed row too many": (
        Commitment(NOBODYS, 1, ROOT, 1, BLOB,
                   failures=(RowFailure(0, Cause.ROW, ""),) * (ROW_FAILURES_LISTED_PER_TASK_MAX + 1)),
        Reason.LIMIT_EXCEEDED, True,
    ),
    "a lease whose name breaks the log's line": (
        LeaseReturned(LeaseId("x\n2026 ERROR forged"), 1, Cause.WORKER, ""), Reason.FIELD_INVALID, False,
    ),
    "a lease whose name steers a terminal": (GrantsWanted(LeaseId("\x1b[2J"), 1), Reason.FIELD_INVALID, False),
    "a reason that is too long": (TaskFailed(NOBODYS, 1, Cause.ROW, "x" * 257), Reason.LIMIT_EXCEEDED, True),
    "an inspection by a volunteer": (Inspection(NOBODYS, 1, _REPORT), Reason.LEASE_UNKNOWN, True),
    "a report that is too long": (
        Inspection(NOBODYS, 1, replace(_REPORT, refusals=("x" * 1000,) * 100)), Reason.LIMIT_EXCEEDED, True,
    ),
    "more leases than there are": (
        Heartbeat((LeaseProgress(NOBODYS, 1, 1),) * (LEASES_PER_WORKER_MAX + 1)), Reason.LIMIT_EXCEEDED, False,
    ),
    "a window without end": (CapabilityChanged(None, 2**32 - 1), Reason.LIMIT_EXCEEDED, False),
}  # fmt: skip


async def test_what_is_out_of_range_is_refused_and_the_session_goes_on(attacker: Credentials) -> None:
    async with raw_session(attacker) as session:
        await session.open()
        for what, (message, reason, sign) in REFUSED.items():
            await session.send(message, sign=sign)
            answer = await session.receive()
            assert isinstance(answer, Refused), what
            assert (answer.reason, answer.sequence) == (reason.value, session.sequence), what
            assert len(answer.message) < 1_000, what
        await session.send(Draining("done"), sign=False)
        await session.send(GrantsWanted(NOBODYS, 1), sign=False)
        assert isinstance(await session.receive(), Refused)


async def test_a_second_hello_ends_the_session(attacker: Credentials) -> None:
    async with raw_session(attacker) as session:
        await session.open()
        await session.send(hello())
        assert (await session.ended()).reason is Reason.MALFORMED_MESSAGE


@pytest.mark.parametrize("sequence", [0, 1])
async def test_a_number_that_does_not_rise_ends_the_session(sequence: int, attacker: Credentials) -> None:
    async with raw_session(attacker) as session:
        await session.open()
        await session.send(Heartbeat(), sign=False, sequence=sequence)
        assert (await session.ended()).reason is Reason.SEQUENCE_REPLAYED


async def test_a_worker_claims_no_leases_that_it_never_had(attacker: Credentials) -> None:
    held = tuple(HeldLease(LeaseId(f"lease-{n}"), n, committed=True) for n in range(LEASES_PER_WORKER_MAX))
    async with raw_session(attacker) as session:
        assert (await session.open(replace(hello(), held_leases=held))).keep_lease_ids == ()
    async with raw_session(attacker) as session:
        await session.send(replace(hello(), held_leases=(*held, held[0])))
        assert (await session.ended()).reason is Reason.LIMIT_EXCEEDED


async def test_messages_of_no_known_kind_are_refused(attacker: Credentials) -> None:
    async with raw_session(attacker) as session:
        await session.open()
        for payload in (b"", b"\xfa\x07\x02\x08\x01"):
            session.sequence += 1
            await session.send_request(pb.SessionRequest(sequence=session.sequence, payload=payload))
            answer = await session.receive()
            assert isinstance(answer, Refused)
            assert answer.reason == Reason.FIELD_INVALID.value
