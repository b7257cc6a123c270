"""Pools with money in them: prices, budgets, pauses, top-ups, allotments, releases; and donation, which stays free."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fallow.credits import PoolMode, Purse
from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, PartyId
from fallow.job import JobOptions, JobState
from fallow.roles import Role, Tier
from fallow.session import Cause, RowFailure
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import groups
from fallow_coordinator.core.answers import Moved
from fallow_coordinator.core.events import LeaseGranted, TaskSettled
from fallow_coordinator.core.ledger import allotment, available, contribution, held, pending, sink
from simulation.core_world import World, capability, digest

UNIT = 1_000_000
CREDIT = 1_000_000


@pytest.fixture(autouse=True)
def everybody_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """How devices come to be measured is told elsewhere; paid work goes to measured ones alone."""
    monkeypatch.setattr(groups, "measured", lambda worker: True)


@pytest.fixture
def world() -> World:
    """One unit a row, a market, and 1,000 credits for the submitter."""
    made = World().start().ready_bundle(per_row=UNIT, batch=1)
    made.take(c.SetPoolMode(made.state.default_pool_id, PoolMode.MARKET))
    grant(made, made.account_id, 1_000 * CREDIT)
    return made


def grant(world: World, account_id: AccountId, microcredits: int, transfer: object = "grant") -> Moved:
    answer = world.ask(c.GrantCredits(account_id, microcredits, "a gift", digest(transfer)[:16]))
    assert isinstance(answer, Moved)
    return answer


def asking(world: World, name: str, ask: int, *, window: int = 1, tier: Tier | None = None) -> PartyId:
    """A connected worker with an account of its own, and its ask for a unit."""
    worker_id = world.enroll(name, world.token(tier=tier)).party_id
    world.connect(worker_id, window=window, able=replace(capability(), ask_microcredits_per_unit=ask))
    return worker_id


def options(budget: int = 0, limit: int = 0, **more: int) -> JobOptions:
    return JobOptions(budget_microcredits=budget, limit_microcredits_per_unit=limit, **more)  # type: ignore[arg-type]


def account_of(world: World, worker_id: PartyId) -> AccountId:
    return world.state.workers[worker_id].account_id


def spendable(world: World, account_id: AccountId) -> int:
    return world.state.ledger.balance(available(account_id))


def granted(world: World) -> list[LeaseGranted]:
    return [event for _, event in world.records if isinstance(event, LeaseGranted) and event.task_id.startswith("task")]


def job_leases(world: World) -> list[LeaseGranted]:
    inspections = {event.lease_id for event in granted(world)[:1]}
    return [event for event in granted(world) if event.lease_id not in inspections]


def refused(world: World, command: c.Command) -> FallowError:
    with pytest.raises(FallowError) as caught:
        world.take(command)
    return caught.value


# ---------------------------------------------------------------------------------------------------- prices


def test_the_cheapest_wins_and_is_paid_what_the_next_asks(world: World) -> None:
    cheap, dear = asking(world, "cheap", 100), asking(world, "dear", 300)
    world.submit(1, options=options(budget=10 * CREDIT))
    world.work_off()
    lease = job_leases(world)[0]
    assert lease.worker_id == cheap and lease.price_microcredits_per_unit == 300
    assert lease.reserved_microcredits == 300
    assert world.state.ledger.balance(pending(account_of(world, cheap))) == 300
    assert world.state.ledger.balance(pending(account_of(world, dear))) == 0
    assert world.replayed() == world.state


def test_nobody_is_paid_above_the_limit(world: World) -> None:
    asking(world, "cheap", 100), asking(world, "dear", 300)
    world.submit(1, options=options(budget=10 * CREDIT, limit=200))
    world.work_off()
    assert job_leases(world)[0].price_microcredits_per_unit == 100


def test_a_lone_worker_is_paid_its_ask(world: World) -> None:
    asking(world, "lone", 70)
    world.submit(1, options=options(budget=CREDIT, limit=10_000))
    world.work_off()
    assert job_leases(world)[0].price_microcredits_per_unit == 70


def test_a_limit_below_every_ask_keeps_the_job_waiting_and_says_why(world: World) -> None:
    asking(world, "dear", 1_000)
    job_id = world.submit(4, options=options(budget=CREDIT, limit=500))
    world.work_off()
    status = world.status(job_id)
    assert status.state is JobState.QUEUED and status.reason_code == "LIMIT_BELOW_ASKS"
    assert "3.6 credits" in status.reason and "1.8" in status.reason
    asking(world, "cheap", 400)
    world.work_off()
    assert world.status(job_id).state is JobState.SUCCEEDED


def test_own_workers_do_own_jobs_for_nothing(world: World) -> None:
    own = world.enroll("own", world.token(account_id=world.account_id)).party_id
    world.connect(own, able=replace(capability(), ask_microcredits_per_unit=900))
    before = dict(world.state.ledger.balances)
    job_id = world.submit(4)
    world.work_off()
    assert world.status(job_id).state is JobState.SUCCEEDED
    assert world.state.ledger.balances == before


def test_without_budget_only_free_work_is_taken(world: World) -> None:
    asking(world, "dear", 1)
    job_id = world.submit(2)
    world.work_off()
    assert world.status(job_id).reason_code == "LIMIT_BELOW_ASKS"
    asking(world, "donor", 0)
    world.work_off()
    assert world.status(job_id).state is JobState.SUCCEEDED
    assert world.status(job_id).spent_microcredits == 0


# ---------------------------------------------------------------------------------------------------- budgets


def test_a_budget_is_held_from_submission_and_its_rest_given_back(world: World) -> None:
    worker = asking(world, "worker", 100)
    job_id = world.submit(4, options=options(budget=CREDIT))
    assert spendable(world, world.account_id) == 999 * CREDIT
    assert world.state.ledger.balance(held(job_id, Purse.CREDITS)) == CREDIT
    world.work_off()
    assert world.status(job_id).spent_microcredits == 400
    assert spendable(world, world.account_id) == 1_000 * CREDIT - 400
    assert world.state.ledger.balance(pending(account_of(world, worker))) == 400


def test_a_budget_that_the_account_does_not_have_is_refused(world: World) -> None:
    error = refused(world, world.submission(4, options=options(budget=1_001 * CREDIT)))
    assert error.reason is Reason.INSUFFICIENT_CREDITS and error.field == "options.budget_microcredits"
    assert "1,000 credits" in error.message


@pytest.mark.parametrize("wrong", [options(budget=-1), options(limit=-1), options(budget=10**16), options(1, 10**10)])
def test_absurd_budgets_and_limits_are_refused(world: World, wrong: JobOptions) -> None:
    assert refused(world, world.submission(4, options=wrong)).reason is Reason.FIELD_INVALID


def test_a_limit_without_a_budget_is_refused(world: World) -> None:
    assert refused(world, world.submission(4, options=options(limit=5))).reason is Reason.FIELD_MISSING


def test_a_job_out_of_budget_pauses_and_a_top_up_lets_it_finish(world: World) -> None:
    asking(world, "worker", 100, window=2)
    job_id = world.submit(40, options=options(budget=1_000))
    world.work_off()
    status = world.status(job_id)
    assert status.state is JobState.PAUSED and status.reason_code == "BUDGET_EXHAUSTED"
    assert f"fallow job topup {job_id}" in status.reason
    assert 0 < status.spent_microcredits <= 1_000 and status.progress.rows_leased == 0
    done = status.progress.rows_done
    assert done * 100 == status.spent_microcredits

    world.take(c.TopUpJob(world.account_id, job_id, 10_000, digest("top up")[:16]))
    world.work_off()
    status = world.status(job_id)
    assert status.state is JobState.SUCCEEDED and status.spent_microcredits == 4_000
    assert status.budget_microcredits == 11_000
    assert spendable(world, world.account_id) == 1_000 * CREDIT - 4_000
    assert world.replayed() == world.state


def test_a_job_without_funds_does_not_hold_up_others(world: World) -> None:
    asking(world, "worker", 100)
    broke = world.submit(40, key="broke", options=options(budget=10))
    rich = world.submit(8, key="rich", options=options(budget=CREDIT))
    world.work_off()
    assert world.status(broke).state is JobState.PAUSED
    assert world.status(rich).state is JobState.SUCCEEDED


def test_a_top_up_said_twice_counts_once_and_another_under_its_name_is_refused(world: World) -> None:
    job_id = world.submit(40, options=options(budget=CREDIT))
    command = c.TopUpJob(world.account_id, job_id, 500, digest("t")[:16])
    assert world.ask(command) == Moved(500, repeated=False)
    assert world.ask(command) == Moved(500, repeated=True)
    assert world.status(job_id).budget_microcredits == CREDIT + 500
    assert refused(world, replace(command, microcredits=501)).reason is Reason.IDEMPOTENCY_CONFLICT


def test_what_cannot_be_topped_up_is_told(world: World) -> None:
    other = world.enroll("other", world.token(Role.CLIENT)).account_id
    job_id = world.submit(4, options=options(budget=CREDIT))
    top_up = c.TopUpJob(world.account_id, job_id, 500, digest("t")[:16])
    assert refused(world, replace(top_up, account_id=other)).reason is Reason.JOB_UNKNOWN
    assert refused(world, replace(top_up, microcredits=0)).reason is Reason.FIELD_INVALID
    assert refused(world, replace(top_up, microcredits=10**15)).reason is Reason.LIMIT_EXCEEDED
    assert refused(world, replace(top_up, microcredits=2_000 * CREDIT)).reason is Reason.INSUFFICIENT_CREDITS
    assert refused(world, replace(top_up, transfer_id=b"short")).reason is Reason.FIELD_INVALID
    world.take(c.CancelJob(world.account_id, job_id))
    assert refused(world, top_up).reason is Reason.JOB_FINISHED


def test_two_jobs_race_for_the_last_credit_and_one_gets_it(world: World) -> None:
    first = world.submit(4, key="first", options=options(budget=600 * CREDIT))
    error = refused(world, world.submission(4, key="second", options=options(budget=600 * CREDIT)))
    assert error.reason is Reason.INSUFFICIENT_CREDITS and "400 credits" in error.message
    world.take(c.CancelJob(world.account_id, first))
    world.submit(4, key="second", options=options(budget=600 * CREDIT))


def test_eighty_percent_of_a_budget_is_told(world: World) -> None:
    asking(world, "worker", 100, window=4)
    job_id = world.submit(20, options=options(budget=2_000))
    seen: list[tuple[str, ...]] = []
    while world.status(job_id).state in (JobState.QUEUED, JobState.RUNNING):
        world.pack_all()
        seen.append(world.status(job_id).warnings)
        world.take(world.commit_command(next(iter(world.state.leases.values()))))
    assert seen[0] == () and seen[-1] and "% of its budget of 0.002 credits is spent" in seen[-1][0]
    assert world.status(job_id).state is JobState.SUCCEEDED


@pytest.mark.parametrize("end", ["return", "fail", "expire", "lost", "cancel"])
def test_every_end_of_a_lease_frees_its_reservation(world: World, end: str) -> None:
    worker = asking(world, "worker", 100)
    job_id = world.submit(4, options=options(budget=CREDIT))
    world.pack_all()
    lease = world.leases_of(worker)[0]
    assert world.state.jobs[job_id].reserved_microcredits == lease.reserved_microcredits > 0
    match end:
        case "return":
            world.take(world.return_command(lease, Cause.OWNER_PREEMPT))
        case "fail":
            world.take(world.fail_command(lease, Cause.WORKER))
        case "expire":
            world.pass_time(10 * 3_600_000)
        case "lost":
            world.take(c.CloseSession(lease.session_id, "gone"))
            world.pass_time(60_000)
        case _:
            world.take(c.CancelJob(world.account_id, job_id))
            assert spendable(world, world.account_id) == 1_000 * CREDIT
    live = sum(one.reserved_microcredits for one in world.state.leases.values())
    assert world.state.jobs[job_id].reserved_microcredits == live
    assert lease.lease_id not in world.state.leases


def test_pay_follows_the_rows_that_were_done(world: World) -> None:
    worker = asking(world, "worker", 100)
    job_id = world.submit(4, options=options(budget=CREDIT))
    world.pack_all()
    lease = world.leases_of(worker)[0]
    rows = world.state.tasks[lease.task_id].rows
    world.take(world.commit_command(lease, failures=(RowFailure(0, Cause.ROW, "bad row"),)))
    settled = next(event for _, event in reversed(world.records) if isinstance(event, TaskSettled))
    assert settled.microcredits == 100 * (rows - 1) and not settled.released
    assert world.status(job_id).spent_microcredits == 100 * (rows - 1)


def test_managed_workers_may_spend_at_once_and_volunteers_when_released(world: World) -> None:
    managed, volunteer = asking(world, "managed", 0, tier=Tier.MANAGED), asking(world, "volunteer", 100)
    world.take(c.SetPoolMode(world.state.default_pool_id, PoolMode.MARKET))
    world.submit(2, options=options(budget=CREDIT))
    world.work_off()
    ledger = world.state.ledger
    assert ledger.balance(available(account_of(world, managed))) > 0
    earned = ledger.balance(pending(account_of(world, volunteer)))
    if not earned:
        world.submit(40, key="more", options=options(budget=CREDIT))
        world.work_off()
        earned = ledger.balance(pending(account_of(world, volunteer)))
    assert earned > 0
    release = c.ReleaseCredits(account_of(world, volunteer), 0, "checked by hand", digest("r")[:16])
    assert world.ask(release) == Moved(earned, repeated=False)
    assert world.ask(release) == Moved(earned, repeated=True)
    assert ledger.balance(available(account_of(world, volunteer))) == earned
    again = replace(release, transfer_id=digest("r2")[:16])
    assert refused(world, again).reason is Reason.INSUFFICIENT_CREDITS


# ---------------------------------------------------------------------------------------------------- grants, modes


def test_grants_are_bounded_and_idempotent(world: World) -> None:
    account_id = world.account_id
    assert grant(world, account_id, 5, "x").repeated is False
    assert grant(world, account_id, 5, "x").repeated is True
    assert spendable(world, account_id) == 1_000 * CREDIT + 5
    command = c.GrantCredits(account_id, 6, "", digest("x")[:16])
    assert refused(world, command).reason is Reason.IDEMPOTENCY_CONFLICT
    fresh = replace(command, transfer_id=digest("y")[:16])
    for microcredits in (0, -1, 10**15 + 1):
        assert refused(world, replace(fresh, microcredits=microcredits)).reason is Reason.FIELD_INVALID
    assert refused(world, replace(fresh, microcredits=10**15)).reason is Reason.LIMIT_EXCEEDED
    assert refused(world, replace(fresh, account_id=AccountId("nobody"))).reason is Reason.ACCOUNT_UNKNOWN
    assert refused(world, replace(fresh, note="x" * 201)).reason is Reason.LIMIT_EXCEEDED


def test_a_pool_keeps_its_mode_while_jobs_are_under_way(world: World) -> None:
    pool_id = world.state.default_pool_id
    job_id = world.submit(4, options=options(budget=CREDIT))
    assert refused(world, c.SetPoolMode(pool_id, PoolMode.DONATION)).reason is Reason.JOB_UNFINISHED
    world.take(c.CancelJob(world.account_id, job_id))
    world.take(c.SetPoolMode(pool_id, PoolMode.DONATION))
    assert world.state.pools[pool_id].mode is PoolMode.DONATION


@pytest.mark.parametrize("ask", [-1, 10**9 + 1, 2**63])
def test_absurd_asks_are_refused_at_the_door(world: World, ask: int) -> None:
    worker_id = world.enroll("greedy").party_id
    able = replace(capability(), ask_microcredits_per_unit=ask)
    with pytest.raises(FallowError) as caught:
        world.connect(worker_id, able=able)
    assert caught.value.reason is Reason.FIELD_INVALID
    assert caught.value.field == "capability.ask_microcredits_per_unit"
    session_id = world.connect(worker_id).session_id
    assert refused(world, c.ChangeCapability(session_id, able, 1)).reason is Reason.FIELD_INVALID


def test_an_ask_that_changes_counts_from_the_next_lease_on(world: World) -> None:
    worker = asking(world, "worker", 100)
    world.submit(20, options=options(budget=CREDIT))
    world.pack_all()
    session_id = world.state.workers[worker].session_id
    assert session_id is not None
    world.take(c.ChangeCapability(session_id, replace(capability(), ask_microcredits_per_unit=900), 1))
    world.work_off()
    prices = [lease.price_microcredits_per_unit for lease in job_leases(world)]
    assert prices[0] == 100 and set(prices[1:]) == {900}


# ---------------------------------------------------------------------------------------------------- donation, quota


def test_in_donation_everything_is_free_and_what_is_given_is_recorded() -> None:
    world = World().start().ready_bundle(per_row=UNIT, batch=1)
    worker = asking(world, "generous", 500)
    job_id = world.submit(4, options=options(budget=CREDIT, limit=1))
    world.work_off()
    assert world.status(job_id).state is JobState.SUCCEEDED
    assert world.status(job_id).spent_microcredits == 0
    assert world.state.ledger.balance(contribution(account_of(world, worker))) == 4 * UNIT
    assert spendable(world, account_of(world, worker)) == 0


@pytest.fixture
def quota() -> World:
    made = World().start().ready_bundle(per_row=UNIT, batch=1)
    pool_id = made.state.default_pool_id
    made.take(c.SetPoolMode(pool_id, PoolMode.QUOTA))
    made.take(c.SetAllotment(pool_id, made.account_id, 10 * CREDIT, 86_400_000))
    return made


def test_a_quota_job_uses_its_account_allotment_and_waits_for_the_next_period(quota: World) -> None:
    worker = asking(quota, "worker", 500)
    job_id = quota.submit(14)
    quota.work_off()
    status = quota.status(job_id)
    assert status.state is JobState.PAUSED and status.reason_code == "ALLOTMENT_EXHAUSTED"
    used = status.spent_microcredits
    assert 0 < used <= 10 * CREDIT
    ledger, book = quota.state.ledger, allotment(quota.state.default_pool_id, quota.account_id)
    assert ledger.balance(book) == 10 * CREDIT - used
    assert ledger.balance(contribution(account_of(quota, worker))) == used

    quota.now_ms += 86_400_000
    session_id = quota.state.workers[worker].session_id
    assert session_id is not None
    quota.take(c.Tick())
    quota.work_off()
    assert quota.status(job_id).state is JobState.SUCCEEDED
    assert quota.status(job_id).spent_microcredits == 14 * CREDIT
    assert ledger.balance(sink(Purse.ALLOTMENT)) == 14 * CREDIT + (10 * CREDIT - used)
    assert ledger.balance(book) == 10 * CREDIT - (14 * CREDIT - used)
    assert quota.replayed() == quota.state


def test_a_quota_job_may_have_a_bound_of_its_own_and_a_top_up(quota: World) -> None:
    asking(quota, "worker", 0)
    job_id = quota.submit(8, options=options(budget=4 * CREDIT))
    quota.work_off()
    assert quota.status(job_id).reason_code == "BUDGET_EXHAUSTED"
    quota.take(c.TopUpJob(quota.account_id, job_id, 4 * CREDIT, digest("t")[:16]))
    quota.work_off()
    assert quota.status(job_id).state is JobState.SUCCEEDED


def test_an_account_without_allotment_waits_until_it_has_one(quota: World) -> None:
    asking(quota, "worker", 0)
    pool_id = quota.state.default_pool_id
    quota.take(c.SetAllotment(pool_id, quota.account_id, 0, 86_400_000))
    assert not quota.state.ledger.allotments
    job_id = quota.submit(4)
    quota.work_off()
    assert quota.status(job_id).reason_code == "ALLOTMENT_EXHAUSTED"
    quota.take(c.SetAllotment(pool_id, quota.account_id, 50 * CREDIT, 60_000))
    quota.work_off()
    assert quota.status(job_id).state is JobState.SUCCEEDED


def test_allotments_belong_to_quota_pools(world: World) -> None:
    command = c.SetAllotment(world.state.default_pool_id, world.account_id, 5, 60_000)
    assert refused(world, command).reason is Reason.FIELD_INVALID


def test_periods_that_nobody_saw_are_passed_over_at_once(quota: World) -> None:
    quota.pass_time(10 * 86_400_000 + 5)
    one = quota.state.ledger.allotments[quota.state.default_pool_id, quota.account_id]
    assert one.renews_at_ms > quota.now_ms >= one.renews_at_ms - 86_400_000
    book = allotment(quota.state.default_pool_id, quota.account_id)
    assert quota.state.ledger.balance(book) == 10 * CREDIT
