"""Quotes: what a job would cost, when it would end and who could do it; and that asking changes nothing."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.cost import CostCurve, CostKnot, SizeBin
from fallow.credits import PoolMode
from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, PartyId
from fallow.job import JobOptions, JobState, Objective
from fallow.quote import Quote, QuoteRequest
from fallow.roles import DataClass
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import groups
from fallow_coordinator.core.answers import AccountMade
from fallow_coordinator.core.events import LeaseGranted
from fallow_coordinator.core.quotes import MILLIJOULES_PER_UNIT, quote
from simulation.core_world import World, capability

UNIT = 1_000_000
CREDIT = 1_000_000


@pytest.fixture(autouse=True)
def everybody_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """How devices come to be measured is told elsewhere; paid work goes to measured ones alone."""
    monkeypatch.setattr(groups, "measured", lambda worker: True)


def one_unit_a_row(mode: PoolMode = PoolMode.MARKET) -> World:
    world = World().start().ready_bundle(per_row=UNIT, batch=1)
    if mode is not PoolMode.DONATION:
        world.take(c.SetPoolMode(world.state.default_pool_id, mode))
    world.take(c.GrantCredits(world.account_id, 1_000 * CREDIT, "a gift", bytes(16)))
    return world


def asking(world: World, name: str, ask: int, *, slots: int = 1, account_id: AccountId | None = None) -> PartyId:
    worker_id = world.enroll(name, world.token(account_id=account_id) if account_id else world.token()).party_id
    able = replace(capability(slots=slots), ask_microcredits_per_unit=ask)
    world.connect(worker_id, window=slots, able=able)
    return worker_id


def quoted(world: World, rows: int = 1, **options: object) -> Quote:
    request = QuoteRequest(
        bundle_digest=world.bundle_digest,
        bins=(SizeBin(rows, ()),),
        data_class=DataClass.PUBLIC,
        pool_id=world.state.default_pool_id,
        options=JobOptions(**options),  # type: ignore[arg-type]
    )
    before = deepcopy(world.state)
    answer = quote(world.state, world.account_id, request, world.now_ms)
    assert world.state == before, "a question changes nothing"
    assert answer.workers_considered == answer.workers_fitting + sum(short.workers for short in answer.fallen_out)
    return answer


# ------------------------------------------------------------------------------------------------------------- price


def test_the_quote_is_the_price_that_the_job_then_pays() -> None:
    world = one_unit_a_row()
    asking(world, "cheap", 100), asking(world, "dear", 300)
    told = quoted(world)
    assert (told.price_microcredits_per_unit, told.price_microcredits, told.budget_microcredits) == (300, 300, 360)
    job_id = world.submit(1, options=JobOptions(budget_microcredits=told.budget_microcredits))
    world.work_off()
    granted = [event for _, event in world.records if isinstance(event, LeaseGranted)][-1]
    assert granted.price_microcredits_per_unit == told.price_microcredits_per_unit
    assert world.status(job_id).state is JobState.SUCCEEDED
    assert world.state.jobs[job_id].microcredits == told.price_microcredits


def test_a_large_job_takes_every_worker_and_each_is_paid_its_ask() -> None:
    world = one_unit_a_row()
    asking(world, "cheap", 100), asking(world, "dear", 300)
    told = quoted(world, 10_000)
    assert told.price_microcredits_per_unit == 200
    assert told.price_microcredits == 2_000_000
    assert told.price_microcredits_per_1000_rows == 200_000


def test_a_limit_takes_out_whoever_asks_more_and_tells() -> None:
    world = one_unit_a_row()
    asking(world, "cheap", 100), asking(world, "dear", 300)
    told = quoted(world, limit_microcredits_per_unit=200)
    assert (told.price_microcredits_per_unit, told.workers_fitting) == (100, 1)
    assert [(short.code, short.workers) for short in told.fallen_out if short.code == "ask"] == [("ask", 1)]
    nobody = quoted(world, limit_microcredits_per_unit=99)
    assert (nobody.workers_fitting, nobody.end_at_ms, nobody.price_microcredits) == (0, 0, 0)
    assert "below every ask: the cheapest worker asks 0.0001" in nobody.warnings[0]


def test_own_workers_cost_nothing_and_are_counted() -> None:
    world = one_unit_a_row()
    asking(world, "own", 900, account_id=world.account_id)
    told = quoted(world, 100)
    assert (told.price_microcredits, told.own_workers, told.workers_fitting) == (0, 1, 1)


def test_donation_is_free_and_quota_counts_units() -> None:
    world = one_unit_a_row(PoolMode.DONATION)
    asking(world, "kind", 900)
    assert (quoted(world, 50).price_microcredits, quoted(world, 50).pool_mode) == (0, "donation")
    world = one_unit_a_row(PoolMode.QUOTA)
    asking(world, "kind", 900)
    assert quoted(world, 50).price_microcredits == 50 * CREDIT


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 4)), min_size=1, max_size=6),
    st.integers(1, 5_000),
    st.integers(0, 10**9),
    st.sampled_from(list(Objective)),
)
def test_prices_stay_between_the_asks_and_the_limit(
    workers: list[tuple[int, int]], rows: int, limit: int, objective: Objective
) -> None:
    world = one_unit_a_row()
    for number, (ask, slots) in enumerate(workers):
        asking(world, f"w{number}", ask, slots=slots)
    told = quoted(world, rows, limit_microcredits_per_unit=limit, objective=objective)
    within = [ask for ask, _ in workers if not limit or ask <= limit]
    assert told.workers_fitting == len(within)
    if within:
        assert min(within) <= told.price_microcredits_per_unit <= max(within)
        assert told.price_microcredits == told.price_microcredits_per_unit * rows
        assert told.price_microcredits * 1.2 <= told.budget_microcredits < told.price_microcredits * 1.2 + 1
        assert told.run_ms > 0 and told.end_at_ms == world.now_ms + told.wait_ms + told.run_ms


# -------------------------------------------------------------------------------------------------------------- time


def test_more_workers_end_sooner_and_few_rows_gain_nothing_from_them() -> None:
    world = one_unit_a_row()
    asking(world, "one", 0)
    lone, small = quoted(world, 3_000), quoted(world, 10)
    assert (lone.run_ms, lone.wait_ms) == (3_000_000, 0)
    asking(world, "two", 0, slots=2)
    assert quoted(world, 3_000).run_ms == 1_000_000
    assert quoted(world, 10).run_ms == small.run_ms == 10_000


def test_others_take_turns_and_own_jobs_go_first() -> None:
    world = one_unit_a_row(PoolMode.DONATION)
    asking(world, "one", 0)
    empty = quoted(world, 1_000)
    other = world.ask(c.CreateAccount("other"))
    assert isinstance(other, AccountMade)
    world.register(other.account_id)
    world.submit(200, key="theirs", account_id=other.account_id)
    shared = quoted(world, 1_000)
    assert empty.run_ms + 150_000 <= shared.wait_ms + shared.run_ms <= empty.run_ms + 230_000
    assert quoted(world, 10).run_ms <= 21_000, "equal turns until the small job is done"
    world.submit(500, key="mine")
    behind = quoted(world, 10)
    assert behind.wait_ms >= 500_000


def test_deadlines_budgets_and_absent_workers_are_warned_of() -> None:
    world = one_unit_a_row()
    assert "no worker can take this job now" in quoted(world).warnings[0]
    asking(world, "one", 100)
    late = quoted(world, 1_000, deadline_ms=world.now_ms + 60_000)
    assert late.warnings == ("the deadline is not reached: it would end 940 seconds later",)
    assert quoted(world, 1_000, deadline_ms=world.now_ms + 2_000_000).warnings == ()
    assert "the job would pause" in quoted(world, 1_000, budget_microcredits=99_999).warnings[0]


def test_who_cannot_do_it_is_told_with_what_helps() -> None:
    world = one_unit_a_row()
    asking(world, "one", 100)
    told = quoted(world, device_kind="gpu", region="de")
    assert told.workers_fitting == 0
    reasons = {short.code: short for short in told.fallen_out}
    assert reasons["device-kind"].workers == 1
    assert "--device" in reasons["device-kind"].advice


# -------------------------------------------------------------------------------------------------------------- cost


def test_rows_are_counted_by_their_sizes_and_large_ones_are_told() -> None:
    world = one_unit_a_row()
    asking(world, "one", 1_000)
    bundle = world.state.bundles[world.bundle_digest]
    assert bundle.report is not None
    curve = CostCurve(1, (CostKnot(0, 10**9), CostKnot(100, 3 * 10**9)), note="repeats lay apart")
    bundle.report = replace(bundle.report, cost=curve)
    bundle.size_feature_count = 1

    def ask(*bins: SizeBin) -> Quote:
        request = QuoteRequest(world.bundle_digest, bins, DataClass.PUBLIC, world.state.default_pool_id)
        return quote(world.state, world.account_id, request, world.now_ms)

    told = ask(SizeBin(10, (0,)), SizeBin(10, (1_000,)))
    assert told.unit_micros == 40 * UNIT
    assert told.energy_source == "rule-of-thumb" and told.millijoules == 40 * MILLIJOULES_PER_UNIT
    assert told.warnings == ("the cost is uncertain: repeats lay apart",)
    assert "1 rows are larger" in ask(SizeBin(1, (101,))).warnings[0]
    with pytest.raises(FallowError) as caught:
        ask(SizeBin(1, ()))
    assert caught.value.reason is Reason.SCHEMA_MISMATCH


def test_what_cannot_be_quoted_is_refused_with_its_reason() -> None:
    world = one_unit_a_row()
    for changes, reason in (
        ({"bundle_digest": world.client_id.encode().ljust(32)}, Reason.BUNDLE_UNKNOWN),
        ({"pool_id": "pool-nowhere"}, Reason.POOL_UNKNOWN),
        ({"options": JobOptions(limit_microcredits_per_unit=-1)}, Reason.FIELD_INVALID),
        ({"options": JobOptions(deadline_ms=1)}, Reason.FIELD_INVALID),
        ({"options": JobOptions(device_kind="abacus")}, Reason.FIELD_INVALID),
    ):
        request = QuoteRequest(world.bundle_digest, (SizeBin(1, ()),), DataClass.PUBLIC, world.state.default_pool_id)
        with pytest.raises(FallowError) as caught:
            quote(world.state, world.account_id, replace(request, **changes), world.now_ms)
        assert caught.value.reason is reason
    world.state.bundles[world.bundle_digest].report = None
    world.state.bundles[world.bundle_digest].inspection_task_id = next(iter(world.state.tasks), None) or "task"  # type: ignore[assignment]
    with pytest.raises(FallowError) as caught:
        quoted(world)
    assert caught.value.reason is Reason.BUNDLE_UNINSPECTED
