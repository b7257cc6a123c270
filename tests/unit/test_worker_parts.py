"""The small parts of a worker: its words for outputs, its folder, its transfers, its renewals, its offer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.bundle import Precision
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, LeaseId, PoolId, digest_of
from fallow.limits import (
    INLINE_PAYLOAD_BYTES_MAX,
    ROW_FAILURE_REASON_BYTES_MAX,
    ROW_FAILURES_LISTED_PER_TASK_MAX,
)
from fallow.roles import Tier
from fallow.row_block import RowBlock, pack
from fallow.session import (
    BlobReference,
    Capability,
    Cause,
    Commitment,
    Device,
    DeviceKind,
    DeviceLevel,
    Lease,
    RowFailure,
    SandboxLevel,
    TaskKind,
    Usage,
)
from fallow_worker.bundle_cache import BundleCache
from fallow_worker.config import WorkerConfig, drain_run_grace_ms, offer_words, refusal
from fallow_worker.core.happenings import FetchTrouble
from fallow_worker.executor import WorkFailed
from fallow_worker.link import After, ResumeToken, after
from fallow_worker.output import clipped, commitment, told
from fallow_worker.ports import Outcome
from fallow_worker.renewal import Renewal, renewal_due_ms
from fallow_worker.start import terms_of
from fallow_worker.state_folder import StateFolder
from fallow_worker.testing import MemoryBlobs, ScriptedCoordinator
from fallow_worker.transfers import Transfers, trouble_of

SCHEMA_DIGEST = Digest(b"s" * 32)


def lease_of(rows: int, *, input_block: bytes = b"", inline: bool = True) -> Lease:
    return Lease(
        lease_id=LeaseId("lease-1"),
        fence=3,
        kind=TaskKind.MAP,
        bundle_digest=Digest(b"b" * 32),
        offer=None,
        rows=rows,
        input=BlobReference(digest_of(input_block), len(input_block)) if input_block else None,
        inline_input=input_block if inline else b"",
        input_grant=None,
        deadline_ms=0,
        runtime_max_ms=0,
        precision=Precision.FP32,
        output_bytes_max=1 << 26,
        unit_micros=0,
        pool_id=PoolId("pool"),
    )


def outcome_of(block: bytes, *failures: RowFailure) -> Outcome:
    return Outcome(block, failures, Usage(wall_microseconds=7), "class")


# ------------------------------------------------------------------------------------------------- outputs


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=20))
def test_a_commitment_binds_to_root_digest_and_length(rows: list[bytes]) -> None:
    block = pack(SCHEMA_DIGEST, rows, [], bytes(16))
    committed = commitment(lease_of(len(rows)), outcome_of(block))
    assert committed.output_root == RowBlock.parse(block).root()
    assert committed.output == BlobReference(digest_of(block), len(block))
    assert committed.inline_output == block
    assert (committed.lease_id, committed.fence, committed.rows) == ("lease-1", 3, len(rows))


@pytest.mark.parametrize("excess", [0, 1])
async def test_an_output_travels_inline_up_to_the_limit(excess: int) -> None:
    length = INLINE_PAYLOAD_BYTES_MAX + excess
    overhead = len(pack(SCHEMA_DIGEST, [b""], [], bytes(16)))
    block = pack(SCHEMA_DIGEST, [bytes(length - overhead)], [], bytes(16))
    assert len(block) == length
    message = await told(lease_of(1), outcome_of(block))
    assert isinstance(message, Commitment)
    assert bool(message.inline_output) is not bool(excess)


def test_an_output_that_is_no_block_or_has_other_rows_is_the_platforms_fault() -> None:
    with pytest.raises(WorkFailed) as caught:
        commitment(lease_of(1), outcome_of(b"nonsense"))
    assert caught.value.cause is Cause.PLATFORM
    with pytest.raises(WorkFailed) as caught:
        commitment(lease_of(2), outcome_of(pack(SCHEMA_DIGEST, [b"one"], [], bytes(16))))
    assert "1 rows for 2" in caught.value.reason


def test_an_output_over_the_leases_limit_is_the_programs_fault() -> None:
    block = pack(SCHEMA_DIGEST, [bytes(1000)], [], bytes(16))
    with pytest.raises(WorkFailed) as caught:
        commitment(replace(lease_of(1), output_bytes_max=100), outcome_of(block))
    assert caught.value.cause is Cause.PROGRAM


def test_failures_are_listed_up_to_their_limits() -> None:
    rows = ROW_FAILURES_LISTED_PER_TASK_MAX + 10
    block = pack(SCHEMA_DIGEST, [b""] * rows, [], bytes(16))
    failures = [RowFailure(row, Cause.ROW, "é" * 1000) for row in range(rows)]
    committed = commitment(lease_of(rows), outcome_of(block, *failures))
    assert len(committed.failures) == ROW_FAILURES_LISTED_PER_TASK_MAX
    assert all(len(failure.reason.encode()) <= ROW_FAILURE_REASON_BYTES_MAX for failure in committed.failures)


@given(st.text())
def test_a_clipped_reason_is_one_line_within_the_limit(text: str) -> None:
    line = clipped(text)
    assert len(line.encode()) <= ROW_FAILURE_REASON_BYTES_MAX
    assert len(line.splitlines()) <= 1


# ------------------------------------------------------------------------------------------------- folder


def test_a_folder_lets_one_daemon_in_and_names_it_to_the_next(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state")
    assert folder.folder.stat().st_mode & 0o777 == 0o700
    assert folder.running_pid() is None
    with folder.locked():
        assert folder.running_pid() == os.getpid()
        with pytest.raises(FallowError) as caught, StateFolder(tmp_path / "state").locked():
            pass
        assert str(os.getpid()) in str(caught.value)
    assert folder.running_pid() is None
    with folder.locked():
        pass


def test_a_status_is_read_back_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    assert folder.read_status() == {}
    folder.write_status({"session": "online"})
    assert folder.read_status() == {"session": "online"}
    (tmp_path / "status.json").write_text("{half")
    assert folder.read_status() == {}


def test_a_resume_token_is_kept_for_the_owner_alone(tmp_path: Path) -> None:
    token = ResumeToken(tmp_path / "token")
    assert token.load() == b""
    token.save(b"secret")
    assert token.load() == b"secret"
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600


# ------------------------------------------------------------------------------------------------- transfers


async def test_an_inline_input_that_is_not_the_leases_own_is_refused(tmp_path: Path) -> None:
    transfers = Transfers(BundleCache(tmp_path), MemoryBlobs())
    granted = replace(lease_of(1, input_block=b"block"), inline_input=b"other")
    with pytest.raises(FallowError) as caught:
        await transfers._input(granted, MemoryBlobs())
    assert caught.value.reason is Reason.DIGEST_MISMATCH


async def test_old_blobs_close_only_when_nothing_is_under_way_through_them(tmp_path: Path) -> None:
    old, new = MemoryBlobs(), MemoryBlobs()
    transfers = Transfers(BundleCache(tmp_path), old)
    async with transfers._in_use() as used:
        assert used is old
        await transfers.use(new)
        closed_while_used = old.closed
    assert (closed_while_used, old.closed) == (False, True)
    await transfers.use(MemoryBlobs())
    assert new.closed


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (FallowError(Reason.GRANT_EXPIRED, ""), FetchTrouble.GRANT_EXPIRED),
        (FallowError(Reason.BLOB_UNKNOWN, ""), FetchTrouble.GIVE_UP),
        (FallowError(Reason.STORAGE_FULL, ""), FetchTrouble.GIVE_UP),
        (FallowError(Reason.COORDINATOR_UNREACHABLE, ""), FetchTrouble.TRY_AGAIN),
        (FallowError(Reason.DIGEST_MISMATCH, ""), FetchTrouble.TRY_AGAIN),
        (OSError(5, "input/output error"), FetchTrouble.TRY_AGAIN),
    ],
)
def test_what_a_failed_transfer_calls_for(error: FallowError | OSError, trouble: FetchTrouble) -> None:
    assert trouble_of(error) is trouble


# ------------------------------------------------------------------------------------------------- sessions, renewals


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_verdict(reason: Reason) -> None:
    assert isinstance(after(FallowError(reason, "")), After)


def test_only_what_cannot_mend_itself_ends_a_worker() -> None:
    ending = {reason for reason in Reason if after(FallowError(reason, "")) is After.END}
    assert ending == {
        Reason.PARTY_REVOKED,
        Reason.PROTOCOL_TOO_OLD,
        Reason.PROTOCOL_TOO_NEW,
        Reason.SESSION_REPLACED,
        Reason.PERMISSION_DENIED,
    }


@given(start=st.integers(0, 1 << 41), life=st.integers(1_000, 10**9), jitter=st.floats(0, 1, exclude_max=True))
def test_renewals_fall_between_half_and_six_tenths_of_a_life(start: int, life: int, jitter: float) -> None:
    due = renewal_due_ms(start, start + life, jitter)
    assert start + life * 0.5 - 1 <= due <= start + life * 0.6 + 1


async def test_a_certificate_past_half_its_life_is_due_at_once(tmp_path: Path) -> None:
    credentials = ScriptedCoordinator(tmp_path).credentials()
    await Renewal(now_ms=lambda: credentials.not_after_ms - 1).due(credentials)


# ------------------------------------------------------------------------------------------------- offers


def capability_at(level: SandboxLevel) -> Capability:
    device = Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, model="Model X", cores=4, slots=2)
    return Capability(devices=(device,), sandbox_level=level, task_kinds=frozenset({TaskKind.MAP}))


def test_below_the_full_sandbox_strangers_programs_are_refused_unless_the_owner_said_so(tmp_path: Path) -> None:
    config = WorkerConfig(tmp_path)
    assert refusal(config, SandboxLevel.FULL) == ""
    words = refusal(config, SandboxLevel.NO_FILES)
    assert "--accept-weaker-sandbox no-files" in words
    assert refusal(replace(config, weakest_sandbox=SandboxLevel.NO_FILES), SandboxLevel.NO_FILES) == ""
    assert refusal(replace(config, weakest_sandbox=SandboxLevel.NO_FILES), SandboxLevel.LIMITS)
    assert "offers nothing" in offer_words(capability_at(SandboxLevel.LIMITS), 1, words)


def test_an_offer_is_one_line_that_names_the_device(tmp_path: Path) -> None:
    words = offer_words(capability_at(SandboxLevel.FULL), 2, "")
    assert "map on cpu Model X (4 cores)" in words
    assert "\n" not in words


@pytest.mark.parametrize(("asked", "slots"), [(0, 2), (1, 1), (5, 2)])
def test_an_owner_may_lend_fewer_slots_never_more(tmp_path: Path, asked: int, slots: int) -> None:
    assert terms_of(WorkerConfig(tmp_path, slots=asked), capability_at(SandboxLevel.FULL)).slots == slots


def test_operators_workers_stop_fast_unless_told_otherwise(tmp_path: Path) -> None:
    config = WorkerConfig(tmp_path)
    assert drain_run_grace_ms(config, Tier.OPERATOR) < drain_run_grace_ms(config, Tier.VOLUNTEER)
    assert drain_run_grace_ms(replace(config, drain_run_grace_ms=5), Tier.OPERATOR) == 5
