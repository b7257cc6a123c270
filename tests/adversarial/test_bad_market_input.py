"""What the market is given and cannot use: each is refused or explained by name, and nothing is lost by it."""

from __future__ import annotations

import datetime
import math
from dataclasses import replace
from typing import Any

import pytest

from fallow.client.terms import terms_of
from fallow.credits import ASK_MICROCREDITS_PER_UNIT_MAX, MICROCREDITS_MAX, PoolMode, parse_credits
from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, PartyId
from fallow.job import JobOptions, JobState
from fallow.session import Device, DeviceKind, DeviceLevel
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core import explaining, groups, kinds_of_workers
from fallow_coordinator.core.ledger import available
from fallow_coordinator.core.limits import REGIONS_UNKNOWN_MAX
from simulation.core_world import World, capability, digest

CREDIT = 1_000_000
NOW = datetime.datetime(2026, 11, 22, tzinfo=datetime.UTC)


@pytest.fixture(autouse=True)
def everybody_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "measured", lambda worker: True)


@pytest.fixture
def world() -> World:
    """One unit a row, a market, and 1,000 credits for the submitter."""
    made = World().start().ready_bundle(per_row=CREDIT, batch=1)
    made.take(c.SetPoolMode(made.state.default_pool_id, PoolMode.MARKET))
    made.ask(c.GrantCredits(made.account_id, 1_000 * CREDIT, "", digest("grant")[:16]))
    return made


def asking(world: World, name: str, ask: int, **more: Any) -> PartyId:
    worker_id = world.enroll(name).party_id
    world.connect(worker_id, window=1, able=replace(capability(), ask_microcredits_per_unit=ask, **more))
    return worker_id


def refused(world: World, command: c.Command) -> FallowError:
    before = repr(world.state)
    with pytest.raises(FallowError) as caught:
        world.take(command)
    assert repr(world.state) == before, "a refusal changes nothing"
    assert caught.value.field and caught.value.limit
    return caught.value


def spendable(world: World, account_id: AccountId) -> int:
    return world.state.ledger.balance(available(account_id))


# ------------------------------------------------------------------------------------------------- amounts

ABSURD = {
    "negative": ("-1", -1),
    "not a number": ("nan", None),
    "infinite": ("1e400", None),
    "overflowing": ("9223372036855", 2**63),
    "absurdly small": ("0.00000001", None),
    "no amount": ("plenty", None),
}


@pytest.mark.parametrize("what", ABSURD)
def test_an_ask_that_is_no_amount_is_refused(what: str, world: World) -> None:
    text, number = ABSURD[what]
    with pytest.raises(FallowError) as caught:
        parse_credits(text, "--ask", ASK_MICROCREDITS_PER_UNIT_MAX)
    assert (caught.value.reason, caught.value.field) == (Reason.FIELD_INVALID, "--ask")
    if number is not None:
        worker_id = asking(world, "honest", 5)
        session_id = world.state.workers[worker_id].session_id
        assert session_id is not None
        able = replace(capability(), ask_microcredits_per_unit=number)
        error = refused(world, c.ChangeCapability(session_id, able, 1))
        assert (error.reason, error.field) == (Reason.FIELD_INVALID, "capability.ask_microcredits_per_unit")
        assert world.state.workers[worker_id].ask_microcredits_per_unit == 5


@pytest.mark.parametrize("field", ["limit", "budget"])
@pytest.mark.parametrize("what", ABSURD)
def test_a_limit_or_budget_that_is_no_amount_is_refused(what: str, field: str, world: World) -> None:
    text, number = ABSURD[what]
    with pytest.raises(FallowError) as caught:
        terms_of({field: text}, JobOptions(), now=NOW)  # type: ignore[misc]
    assert (caught.value.reason, caught.value.field) == (Reason.FIELD_INVALID, field)
    if number is not None:
        names = {"limit": "limit_microcredits_per_unit", "budget": "budget_microcredits"}
        options = JobOptions(budget_microcredits=CREDIT)
        options = replace(options, **{names[field]: number})  # type: ignore[arg-type]
        error = refused(world, world.submission(4, options=options))
        assert (error.reason, error.field) == (Reason.FIELD_INVALID, f"options.{names[field]}")
        assert spendable(world, world.account_id) == 1_000 * CREDIT


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -0.5, 1e30])
def test_floats_that_are_no_amount_are_refused(number: float) -> None:
    with pytest.raises(FallowError) as caught:
        terms_of({"budget": number}, JobOptions(), now=NOW)
    assert caught.value.reason is Reason.FIELD_INVALID


@pytest.mark.parametrize("amount", [-1, 0, MICROCREDITS_MAX + 1, 2**64])
def test_a_top_up_or_grant_that_is_no_amount_is_refused(amount: int, world: World) -> None:
    job_id = world.submit(4, options=JobOptions(budget_microcredits=CREDIT))
    top_up = c.TopUpJob(world.account_id, job_id, amount, digest("t")[:16])
    assert refused(world, top_up).reason is Reason.FIELD_INVALID
    grant = c.GrantCredits(world.account_id, amount, "", digest("g")[:16])
    assert refused(world, grant).reason is Reason.FIELD_INVALID


# ------------------------------------------------------------------------------------------------- capabilities


def test_a_capability_of_absurd_numbers_is_counted_within_bounds(world: World) -> None:
    most = 2**64 - 1
    absurd = Device("gpu-0", DeviceKind.GPU, DeviceLevel.USABLE, memory_bytes=most, cores=2**32 - 1, slots=2**32 - 1)
    able = replace(capability(), devices=(absurd,), memory_bytes_free=most, nodes=2**32 - 1)
    worker_id = world.enroll("boaster").party_id
    world.connect(worker_id, window=1, able=able)
    worker = world.state.workers[worker_id]
    assert worker.slots == groups.slots_of(able) <= 1_024
    job_id = world.submit(4, options=JobOptions(memory_bytes_min=1 << 50))
    world.work_off()
    assert world.status(job_id).state is JobState.SUCCEEDED


def test_a_capability_that_flips_every_second_leaves_nothing_behind(world: World) -> None:
    steady, fickle = asking(world, "steady", 100), asking(world, "fickle", 200)
    session_id = world.state.workers[fickle].session_id
    assert session_id is not None
    job_id = world.submit(200, options=JobOptions(budget_microcredits=CREDIT))
    gpu = Device("gpu-0", DeviceKind.GPU, DeviceLevel.USABLE, slots=3)
    states = [
        replace(capability(), ask_microcredits_per_unit=200),
        replace(capability(), devices=(gpu,), ask_microcredits_per_unit=1, region="moon"),
        replace(capability(), devices=()),
    ]
    kinds = set()
    for second in range(120):
        world.now_ms += 1_000
        world.take(c.ChangeCapability(session_id, states[second % 3], second % 2))
        kinds.add(len(world.state.groups))
        world.pack_all()
        for lease in [*world.leases_of(steady)[:1], *world.leases_of(fickle)[:1]]:
            world.take(world.commit_command(lease))
    assert max(kinds) <= 3, "what it was before is forgotten"
    world.work_off()
    status = world.status(job_id)
    assert status.state is JobState.SUCCEEDED and status.progress.rows_done == 200
    reported = [event for _, event in world.records if isinstance(event, e.CapabilityReported)]
    assert len(reported) <= 120, "one record for each change"


def test_regions_that_strangers_make_up_count_as_other(world: World) -> None:
    world.take(c.RecordForecasts(world.now_ms - world.now_ms % 3_600_000, (e.RegionForecast("de", (300,)),), "test"))
    able = [replace(capability(), region=f"made-up-{number}") for number in range(REGIONS_UNKNOWN_MAX + 10)]
    for number, one in enumerate(able):
        world.connect(world.enroll(f"stranger {number}").party_id, window=1, able=one)
    regions = [worker.capability.region for worker in world.state.workers.values() if worker.session_id]
    assert regions.count(kinds_of_workers.OTHER_REGION) == 10
    assert len({group.ability.region for group in world.state.groups.values()}) == REGIONS_UNKNOWN_MAX + 1
    late = world.enroll("late").party_id
    world.connect(late, able=replace(capability(), region="DE"))
    assert world.state.workers[late].capability.region == "DE", "what a forecast knows is always told apart"
    again = world.enroll("again").party_id
    world.connect(again, able=able[0])
    assert world.state.workers[again].capability.region == "made-up-0"


@pytest.mark.parametrize("region", ["over there", "x" * 33, "\x1b[2J", "de\n", "ümlaut"])
def test_what_is_no_region_is_refused(region: str, world: World) -> None:
    worker_id = world.enroll("stranger").party_id
    with pytest.raises(FallowError) as caught:
        world.connect(worker_id, able=replace(capability(), region=region))
    assert (caught.value.reason, caught.value.field) == (Reason.FIELD_INVALID, "capability.region")
    session_id = world.connect(worker_id).session_id
    error = refused(world, c.ChangeCapability(session_id, replace(capability(), region=region), 1))
    assert error.field == "capability.region"


def test_kinds_of_workers_have_a_limit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds_of_workers, "GROUPS_MAX", 3)
    for number in range(3):
        asking(world, f"w{number}", 1 << number)
    with pytest.raises(FallowError) as caught:
        asking(world, "one too many", 1 << 10)
    assert (caught.value.reason, caught.value.field) == (Reason.OVERLOADED, "capability")
    assert len(world.state.groups) == 3
    known = asking(world, "of a known kind", 1)
    session_id = world.state.workers[known].session_id
    assert session_id is not None
    dearer = replace(capability(), ask_microcredits_per_unit=1 << 12)
    assert refused(world, c.ChangeCapability(session_id, dearer, 1)).reason is Reason.OVERLOADED
    alone = next(w for w in world.state.workers.values() if w.ask_microcredits_per_unit == 4)
    assert alone.session_id is not None
    world.take(c.ChangeCapability(alone.session_id, dearer, 1))
    assert len(world.state.groups) == 3, "who makes a kind alone may become another"


# ------------------------------------------------------------------------------------------------- money and time


def test_a_budget_used_up_in_mid_job_pauses_it_and_a_top_up_loses_nothing(world: World) -> None:
    asking(world, "worker", 100_000)
    job_id = world.submit(40, options=JobOptions(budget_microcredits=CREDIT))
    world.work_off()
    paused = world.status(job_id)
    assert (paused.state, paused.reason_code) == (JobState.PAUSED, "BUDGET_EXHAUSTED")
    assert f"fallow job topup {job_id}" in paused.reason
    explained = explaining.explain_job(world.state, job_id, world.now_ms)
    assert explained is not None and explained.waits_for[0].code == "BUDGET_EXHAUSTED"
    before = {result.cursor: result.output_root for result in world.state.jobs[job_id].results}
    assert 0 < paused.progress.rows_done < 40
    world.take(c.TopUpJob(world.account_id, job_id, 10 * CREDIT, digest("t")[:16]))
    world.work_off()
    job = world.state.jobs[job_id]
    assert job.state is JobState.SUCCEEDED and len(job.done) == 40
    assert before.items() <= {result.cursor: result.output_root for result in job.results}.items()
    assert job.microcredits == 40 * 100_000
    assert spendable(world, world.account_id) == 1_000 * CREDIT - 40 * 100_000


def test_a_limit_below_every_ask_is_explained_with_the_lowest_ask(world: World) -> None:
    asking(world, "dear", 1_000)
    asking(world, "dearer", 5_000)
    job_id = world.submit(4, options=JobOptions(budget_microcredits=CREDIT, limit_microcredits_per_unit=500))
    world.work_off()
    status = world.status(job_id)
    assert (status.state, status.reason_code) == (JobState.QUEUED, "LIMIT_BELOW_ASKS")
    assert "lowest ask is 3.6 credits" in status.reason
    explained = explaining.explain_job(world.state, job_id, world.now_ms)
    assert explained is not None and ("ask", 2) in [(one.code, one.count) for one in explained.fallen_out]


def test_a_deadline_in_the_past_is_refused_with_how_long_ago_it_was(world: World) -> None:
    error = refused(world, world.submission(4, options=JobOptions(deadline_ms=world.now_ms - 90_000)))
    assert (error.reason, error.field) == (Reason.FIELD_INVALID, "options.deadline")
    assert "90 seconds ago" in error.message
    with pytest.raises(FallowError, match="has passed"):
        terms_of({"deadline": NOW - datetime.timedelta(seconds=1)}, JobOptions(), now=NOW)


def test_two_jobs_that_race_for_the_last_credit_cannot_both_have_it(world: World) -> None:
    asking(world, "worker", 100_000)
    first = world.submit(4, key="first", options=JobOptions(budget_microcredits=1_000 * CREDIT))
    second = world.submission(4, key="second", options=JobOptions(budget_microcredits=1))
    error = refused(world, second)
    assert (error.reason, error.field) == (Reason.INSUFFICIENT_CREDITS, "options.budget_microcredits")
    world.work_off()
    assert world.status(first).state is JobState.SUCCEEDED
    assert spendable(world, world.account_id) == 1_000 * CREDIT - 400_000
    world.take(second)


def test_two_jobs_that_race_for_the_last_of_an_allotment_cannot_both_have_it() -> None:
    world = World().start().ready_bundle(per_row=CREDIT, batch=1)
    world.take(c.SetPoolMode(world.state.default_pool_id, PoolMode.QUOTA))
    world.take(c.SetAllotment(world.state.default_pool_id, world.account_id, 4 * CREDIT, 86_400_000))
    for name in ("one", "two"):
        world.volunteer(name, window=1)
    jobs = [world.submit(4, key=key) for key in ("first", "second")]
    world.work_off()
    states = sorted(world.status(job_id).state.value for job_id in jobs)
    assert states == ["paused", "succeeded"]
    assert sum(world.status(job_id).spent_microcredits for job_id in jobs) <= 4 * CREDIT
