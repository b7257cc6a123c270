"""Measuring devices, as the core decides it: when, how hard, and what an answer and its check are worth."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.bundle import InspectionReport
from fallow.challenge import (
    BUNDLE_DIGEST,
    FILL_BYTES_MIN,
    MANIFEST,
    OUTPUT_SCHEMA_DIGEST,
    STEPS_MAX,
    ChallengeKind,
    ChallengeVerdict,
    fault_of_plan,
)
from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.limits import GIB
from fallow.session import Cause, TaskKind, Usage
from fallow.wire.bundle import encode_manifest
from fallow.wire.schema import encode_schema
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import invariants, measuring
from fallow_coordinator.core.devices import identity_of, measured, speed_measured
from fallow_coordinator.core.measuring import elapsed_ms, sized
from fallow_coordinator.core.questions import device_standing, lease_to_send, workers
from journal_world import DAY_MS, block_of, stored_of
from measuring_world import CPU, KINDS, RULES, Measuring


def scene(story: Callable[[Measuring], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that runs a story in a world of its own."""

    def test() -> None:
        asyncio.run(story(Measuring()))

    test.__name__, test.__doc__ = story.__name__, story.__doc__
    return test


def test_the_names_of_the_builtin_bundle_are_its_digests() -> None:
    assert digest_of(encode_manifest(MANIFEST)) == BUNDLE_DIGEST
    assert digest_of(encode_schema(MANIFEST.output_schema)) == OUTPUT_SCHEMA_DIGEST


@scene
async def test_a_device_is_measured_once_it_has_shown_speed_and_memory(m: Measuring) -> None:
    await m.begin()
    await m.pass_ms(59_000)
    assert not m.world.leases_of(m.worker), "it has not been idle long enough"
    await m.pass_ms(1_000)
    sent = lease_to_send(m.world.engine.state, m.lease().lease_id)
    assert sent is not None and sent.challenge is not None and sent.challenge.kind is ChallengeKind.SPEED
    await m.answer(took_ms=1_100, round_trip_ms=100)
    assert not measured(m.state_of_worker), "an answer counts once it is checked"
    await m.pass_ms(1_000)
    check = lease_to_send(m.world.engine.state, m.lease(TaskKind.CHECK).lease_id)
    assert check is not None and check.challenge == sent.challenge and check.input is not None and check.input_inline
    assert check.account_id == m.worker.account_id
    await m.verdict()
    held = m.state_of_worker.certificates["cpu-0"]
    assert held.units_milli_per_s == sent.challenge.operations * 1_000 // 50_000_000_000
    assert not measured(m.state_of_worker), "its memory is not shown yet"
    await m.pass_ms(60_000)
    await m.answer()
    await m.pass_ms(1_000)
    await m.verdict()
    assert measured(m.state_of_worker) and speed_measured(m.state_of_worker) == held.units_milli_per_s
    assert m.state_of_worker.certificates["cpu-0"].memory_bytes == RULES.fill_bytes_max
    standing = device_standing(m.world.engine.state, m.worker.worker_id, "cpu-0")
    assert standing.units_milli_per_s == held.units_milli_per_s and standing.expires_at_ms
    (status,) = [status for status in workers(m.world.engine.state) if status.worker_id == m.worker.worker_id]
    assert [certificate.device_id for certificate in status.certificates] == ["cpu-0"]
    await m.pass_ms(6 * DAY_MS)
    assert not m.world.leases_of(m.worker), "a donation pool measures once"
    await m.pass_ms(DAY_MS)
    assert not measured(m.state_of_worker), "certificates end"
    await m.pass_ms(0)
    assert m.lease()


@scene
async def test_who_gives_a_wrong_answer_has_no_certificate_and_loses_the_one_it_had(m: Measuring) -> None:
    await m.begin()
    await m.pass_ms(60_000)
    await m.answer()
    await m.pass_ms(1_000)
    await m.verdict("row 3 of product 7 is not the product")
    record = m.state_of_worker.challenged["cpu-0"]
    assert record.blamed and "not the product" in record.reason and not m.state_of_worker.certificates
    await m.pass_ms(9 * 60_000)
    assert not m.world.leases_of(m.worker), "whoever lied waits longer"
    await m.measure()
    assert measured(m.state_of_worker) and not m.state_of_worker.challenged


@scene
async def test_a_claim_that_is_not_kept_is_the_claimers_fault(m: Measuring) -> None:
    await m.begin(replace(CPU, claimed_milliunits_per_s=20_000))
    await m.pass_ms(60_000)
    plan = next(iter(m.world.engine.state.challenges.values())).plan
    assert plan.operations >= 20 * 50_000_000_000 * RULES.target_ms // 1_000
    await m.answer(took_ms=10 * RULES.target_ms)
    assert "where it claims 20" in m.state_of_worker.challenged["cpu-0"].reason
    assert m.state_of_worker.challenged["cpu-0"].blamed and not m.world.engine.state.challenges


@scene
async def test_nobody_is_challenged_on_battery_at_work_or_against_its_kinds(m: Measuring) -> None:
    await m.begin(battery=True)
    await m.pass_ms(60_000)
    assert not m.world.leases_of(m.worker)
    await m.capability(m.worker, (CPU,), frozenset({TaskKind.MAP}))
    await m.pass_ms(60_000)
    assert not m.world.leases_of(m.worker), "an older worker does not know challenges"
    await m.capability(m.worker, (CPU,), KINDS)
    await m.world.tell(c.DrainSession(m.checker.session_id))
    await m.pass_ms(60_000)
    assert not m.world.leases_of(m.worker), "nobody could check it"


@scene
async def test_returned_and_untimed_challenges_are_nobodys_fault_and_come_again(m: Measuring) -> None:
    await m.begin()
    for turn in range(4):
        await m.pass_ms(60_000)
        lease = m.lease()
        await m.world.tell(
            c.ReturnLease(
                m.worker.session_id, m.worker.worker_id, lease.lease_id, lease.fence, Cause.OWNER_PREEMPT, "not now"
            )
        )
        record = m.state_of_worker.challenged["cpu-0"]
        assert not record.blamed and record.failures == turn + 1
    await m.pass_ms(60_000)
    await m.answer(took_ms=0)
    assert not m.state_of_worker.challenged["cpu-0"].blamed and not measured(m.state_of_worker)


@scene
async def test_a_certificate_ends_with_the_identity_of_its_device(m: Measuring) -> None:
    await m.begin()
    await m.measure()
    await m.capability(m.worker, (replace(CPU, slots=3, claimed_milliunits_per_s=5),), KINDS)
    assert measured(m.state_of_worker), "slots and claims are no identity"
    await m.capability(m.worker, (replace(CPU, driver_version="onnxruntime 99"),), KINDS)
    assert not m.state_of_worker.certificates
    invariants.check(m.world.engine.state)


@scene
async def test_a_device_that_changes_while_it_is_measured_is_not_certified(m: Measuring) -> None:
    await m.begin()
    await m.pass_ms(60_000)
    await m.answer()
    await m.capability(m.worker, (replace(CPU, model="Core 10"),), KINDS)
    await m.pass_ms(1_000)
    await m.verdict()
    assert not m.state_of_worker.certificates and not m.state_of_worker.challenged["cpu-0"].blamed


@scene
async def test_a_check_that_comes_to_nothing_goes_to_another_and_is_given_up_at_last(m: Measuring) -> None:
    await m.begin()
    await m.pass_ms(60_000)
    await m.answer()
    for _ in range(3):
        await m.pass_ms(1_000)
        lease = m.lease(TaskKind.CHECK)
        await m.world.tell(
            c.FailTask(
                m.checker.session_id, m.checker.worker_id, lease.lease_id, lease.fence, Cause.PLATFORM, "no child"
            )
        )
        invariants.check(m.world.engine.state)
    await m.pass_ms(1_000)
    assert not m.world.engine.state.challenges and not m.state_of_worker.challenged["cpu-0"].blamed


@scene
async def test_only_checks_take_verdicts_and_only_challenges_take_answers(m: Measuring) -> None:
    await m.begin()
    await m.pass_ms(60_000)
    lease = m.lease()
    verdict = c.ReportCheck(
        m.worker.session_id, m.worker.worker_id, lease.lease_id, lease.fence, ChallengeVerdict(holds=True, reason="")
    )
    with pytest.raises(FallowError) as refused:
        await m.world.tell(verdict)
    assert refused.value.reason is Reason.FIELD_INVALID
    report = InspectionReport(BUNDLE_DIGEST, True, (), (), 1, False, False, 0, 0, 0, "", 0.0)
    with pytest.raises(FallowError) as refused:
        await m.world.tell(
            c.ReportInspection(
                m.worker.session_id, m.worker.worker_id, lease.lease_id, lease.fence, report, Usage(), digest_of(b""),
                b"", 1,
            )
        )  # fmt: skip
    assert refused.value.reason is Reason.FIELD_INVALID
    await m.pass_ms(3 * 60_000)
    assert m.state_of_worker.challenged["cpu-0"].blamed, "who never answers is to blame"


def test_the_identity_of_a_device_is_not_its_name() -> None:
    assert identity_of(CPU) == identity_of(replace(CPU, device_id="cpu-7", slots=9))
    for change in (
        {"model": "other"},
        {"execution_class": "x"},
        {"driver_version": "2"},
        {"cores": 3},
        {"memory_bytes": 9 * GIB},
        {"providers": ("a", "b")},
    ):
        assert identity_of(CPU) != identity_of(replace(CPU, **change))
    assert identity_of(replace(CPU, vendor="ab", model="c")) != identity_of(replace(CPU, vendor="a", model="bc"))


@given(
    kind=st.sampled_from(list(ChallengeKind)),
    claim=st.integers(0, 2**63),
    cores=st.integers(0, 10_000),
    memory=st.integers(0, 2**60),
    free=st.integers(0, 2**60),
    target_ms=st.integers(1, 10_000),
)
def test_every_plan_is_one_that_a_worker_takes(
    kind: ChallengeKind, claim: int, cores: int, memory: int, free: int, target_ms: int
) -> None:
    device = replace(CPU, claimed_milliunits_per_s=claim, cores=cores, memory_bytes=memory)
    plan = sized(device, kind, c.MeasuringRules(target_ms=target_ms), free, bytes(32))
    assert not fault_of_plan(plan)
    if kind is ChallengeKind.MEMORY:
        assert plan.fill_bytes <= max(FILL_BYTES_MIN, min(free, memory) // 4)
    else:
        assert plan.steps <= STEPS_MAX


@given(took=st.integers(1, 10**7), round_trip=st.integers(0, 10**9))
def test_a_round_trip_takes_off_a_quarter_at_most(took: int, round_trip: int) -> None:
    command = _commit(took, round_trip)
    assert max(1, took - took // 4 - 1) <= elapsed_ms(command) <= took
    assert elapsed_ms(command) >= took - 500


def _commit(took: int, round_trip: int) -> c.Commit:
    stored = stored_of(block_of(OUTPUT_SCHEMA_DIGEST, [b"x"]))
    return c.Commit(
        session_id="s",  # type: ignore[arg-type]
        worker_id="w",  # type: ignore[arg-type]
        lease_id="l",  # type: ignore[arg-type]
        fence=1, output_root=digest_of(b""), rows=1, output=stored.blob, inline=True, failures=(), usage=Usage(),
        execution_class="", message_digest=digest_of(b""), signature=b"", sequence=1, stored=stored, elapsed_ms=took,
        round_trip_ms=round_trip,
    )  # fmt: skip


async def test_a_tick_looks_at_so_many_workers_and_at_all_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "WORKERS_LOOKED_AT_MAX", 2)
    here = Measuring()
    await here.begin()
    others = [await here.world.volunteer(f"other {number}") for number in range(6)]
    for number, other in enumerate(others):
        device = replace(CPU, device_id=f"cpu-{number}")
        await here.capability(other, (device,), KINDS)
    state = here.world.engine.state
    await here.pass_ms(60_000)
    issued = len(state.challenges)
    assert issued <= 2
    for _ in range(60):
        await here.pass_ms(1_000)
        assert len(state.challenges) - issued <= 2
        issued = len(state.challenges)
    assert {challenge.worker_id for challenge in state.challenges.values()} == {
        here.worker.worker_id,
        *(other.worker_id for other in others),
    }
