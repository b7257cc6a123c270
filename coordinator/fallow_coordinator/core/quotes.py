"""What a job would cost and when it would end: a question to the state, answered with the rules of matching and pay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fallow.bundle import InspectionReport
from fallow.cost import SizeBin
from fallow.credits import ASK_MICROCREDITS_PER_UNIT_MAX, PoolMode, credits_text
from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, Digest, PartyId, PoolId
from fallow.job import JobState, Objective
from fallow.quote import BUDGET_PERCENT, Quote, QuoteRequest, Shortfall
from fallow_coordinator.core.availability import stays_permille
from fallow_coordinator.core.bundles import account_of, usable_bundle
from fallow_coordinator.core.carbon import grams_at, micrograms
from fallow_coordinator.core.cutting import Layout, cost_of, unit_micros
from fallow_coordinator.core.devices import measured, speed_measured
from fallow_coordinator.core.draws import expected_checks_permille
from fallow_coordinator.core.explaining import unfit
from fallow_coordinator.core.groups import ability_of_worker
from fallow_coordinator.core.jobs import check_assurance, check_needs, policy_of
from fallow_coordinator.core.limits import (
    QUOTE_MS_MAX,
    TASK_UNITS_TARGET,
    UNIT_MICROS,
)
from fallow_coordinator.core.needs import (
    MISFIT_WORDS,
    Ability,
    Misfit,
    Needs,
    misfit,
    needs_of_job,
    price_class,
)
from fallow_coordinator.core.prices import QUOTA_MICROCREDITS_PER_UNIT, is_within, price_paid
from fallow_coordinator.core.state import Bundle, Job, Pool, State, Worker

MILLIJOULES_PER_UNIT = 10_000
"""Rule of thumb for energy where nothing was accepted yet: ten watts for a second of a reference core."""
STAYS_KNOWN_MIN = 3
"""Stays that must have ended before a worker's absences count in a quote."""
_QUEUED = frozenset({JobState.QUEUED, JobState.RUNNING})
_REFERENCE_SPEED = 1_000


@dataclass(frozen=True, slots=True)
class Offer:
    """A worker that could do the work."""

    ask: int
    """Micro-credits for a unit; 0 for the caller's own workers."""
    speed_milliunits_per_s: int
    """Of all its slots together."""
    slots: int
    free: bool
    worker_id: PartyId
    own: bool = False


@dataclass(frozen=True, slots=True)
class _Fleet:
    """Who could do the work, and why others could not."""

    offers: tuple[Offer, ...]
    considered: int
    fallen_out: Counter[Misfit]
    ask_least: int
    """Of those that ask too much; 0: nobody does."""


def quote(state: State, account_id: AccountId, request: QuoteRequest, now_ms: int) -> Quote:
    """The quote. Costs a look at every worker and every unfinished job.

    Raises ACCOUNT_UNKNOWN, POOL_UNKNOWN, BUNDLE_UNKNOWN, BUNDLE_UNINSPECTED, PROGRAM_REFUSED, PROGRAM_HELD,
    SCHEMA_MISMATCH, FIELD_INVALID.
    """
    account = account_of(state, account_id)
    bundle = usable_bundle(state, account, request.bundle_digest)
    if bundle.report is None:
        raise FallowError(
            Reason.BUNDLE_UNINSPECTED,
            "the bundle is not inspected yet, so nobody knows what its rows cost",
            field="bundle_digest",
            hint="wait for its inspection: `fallow bundle inspect MODEL --register`",
        )
    pool = _pool_of(state, request)
    check_needs(request.options, now_ms)
    check_assurance(request.options)
    _check_bins(bundle, request.bins)
    rows = sum(group.rows for group in request.bins)
    units = estimated_unit_micros(bundle, bundle.report, request.bins)
    fleet = _fleet(state, account_id, pool, request)
    order = sorted(fleet.offers, key=_speed_order if request.options.objective is Objective.SPEED else _cost_order)
    used = _used(order, units)
    price = _price_per_unit(pool, order, used, request.options.limit_microcredits_per_unit)
    asked = request.options.assurance
    shared = ((state.workers[offer.worker_id], offer.own) for offer in used)
    checking = expected_checks_permille(asked, shared, rows) if asked else 0
    total = ceil_div(price * units * (1_000 + checking), 1_000 * UNIT_MICROS)
    wait_ms, run_ms = _times(state, account_id, fleet, units)
    # Who leaves on the way does less: on the mean, as much as those who are still there half-way.
    staying = replace(fleet, offers=_staying(state, fleet.offers, now_ms, (wait_ms + run_ms) // 2))
    wait_ms, run_ms = _times(state, account_id, staying, units)
    end_at_ms = now_ms + wait_ms + run_ms if fleet.offers else 0
    millijoules, source = _energy(state, bundle, rows, units)
    emitted, known = _carbon(state, used, millijoules, now_ms)
    return Quote(
        bundle_digest=request.bundle_digest,
        rows=rows,
        unit_micros=units,
        learned_permille=bundle.cost_permille,
        pool_id=pool.pool_id,
        pool_mode=pool.mode.value,
        policy=policy_of(request.options, pool),
        price_microcredits_per_unit=price,
        price_microcredits_per_1000_rows=ceil_div(total * 1_000, rows),
        price_microcredits=total,
        budget_microcredits=ceil_div(total * BUDGET_PERCENT, 100),
        wait_ms=wait_ms,
        run_ms=run_ms,
        end_at_ms=end_at_ms,
        millijoules=millijoules,
        energy_source=source,
        micrograms=emitted,
        carbon_known=known,
        checking_permille=checking,
        workers_considered=fleet.considered,
        workers_fitting=len(fleet.offers),
        workers_free=sum(offer.free for offer in fleet.offers),
        own_workers=sum(offer.own for offer in fleet.offers),
        fallen_out=_shortfalls(fleet),
        warnings=tuple(_warnings(state, account_id, bundle, request, fleet, end_at_ms=end_at_ms, total=total)),
    )


def estimated_unit_micros(bundle: Bundle, report: InspectionReport, bins: Sequence[SizeBin]) -> int:
    """Work of all rows by what inspection found, corrected by what accepted work has taught; at least 1."""
    if report.cost is not None:
        nanos = report.cost.unit_nanos_of(bins)
    else:
        rows = sum(group.rows for group in bins)
        index = bundle.bytes_feature_index
        size_bytes = sum(group.size_sums[index] for group in bins) if index >= 0 else 0
        nanos = 1_000 * (report.unit_micros_per_row * rows + report.unit_micros_per_kib * size_bytes // 1024)
    return max(1, ceil_div(nanos * bundle.cost_permille, 1_000_000))


def ceil_div(number: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-number // by)


def _pool_of(state: State, request: QuoteRequest) -> Pool:
    pool = state.pools.get(PoolId(request.pool_id))
    if pool is None:
        raise FallowError(Reason.POOL_UNKNOWN, f"there is no pool {request.pool_id}", field="pool_id")
    return pool


def _check_bins(bundle: Bundle, bins: Sequence[SizeBin]) -> None:
    for index, group in enumerate(bins):
        if len(group.size_sums) != bundle.size_feature_count:
            raise FallowError(
                Reason.SCHEMA_MISMATCH,
                f"the rows have {len(group.size_sums)} size features",
                field=f"bins[{index}].size_sums",
                limit=f"{bundle.size_feature_count}, as in the bundle's input schema",
            )


# ------------------------------------------------------------------------------------------------------------- fleet


def _fleet(state: State, account_id: AccountId, pool: Pool, request: QuoteRequest) -> _Fleet:
    options = request.options
    market = pool.mode is PoolMode.MARKET
    limit = options.limit_microcredits_per_unit or ASK_MICROCREDITS_PER_UNIT_MAX
    needs = needs_of_job(options, pool_id=pool.pool_id, data_class=request.data_class, mode=pool.mode)
    others = needs._replace(paid=market, limit_class=price_class(limit) if market else 0)
    own = needs._replace(paid=False, limit_class=price_class(ASK_MICROCREDITS_PER_UNIT_MAX))
    offers: list[Offer] = []
    fallen_out: Counter[Misfit] = Counter()
    too_dear: list[int] = []
    considered = 0
    for worker in state.workers.values():
        if state.parties[worker.worker_id].revoked or worker.pool_id != pool.pool_id:
            continue
        considered += 1
        mine = worker.account_id == account_id
        ask = worker.capability.ask_microcredits_per_unit if market and not mine else 0
        reason = unfit(state, own if mine else others, worker)
        reason = None if reason is Misfit.BUSY else reason
        if reason is None and not is_within(ask, limit):
            reason = Misfit.ASK
        if reason is not None:
            fallen_out[reason] += 1
            if reason is Misfit.ASK:
                too_dear.append(ask)
            continue
        offers.append(
            Offer(
                ask=ask,
                speed_milliunits_per_s=_speed(worker, request.bundle_digest) * worker.slots,
                slots=worker.slots,
                free=worker.free > 0,
                worker_id=worker.worker_id,
                own=mine,
            )
        )
    return _Fleet(tuple(offers), considered, fallen_out, min(too_dear, default=0))


def _speed(worker: Worker, bundle_digest: Digest) -> int:
    """Of one slot, in thousandths of a unit a second: on accepted work, else as measured, else a reference core's."""
    known = worker.speeds.get(bundle_digest) or worker.speed_milliunits_per_s
    if not known and measured(worker):
        known = speed_measured(worker) // worker.slots
    return known or _REFERENCE_SPEED


def _cost_order(offer: Offer) -> tuple[int, int, PartyId]:
    return offer.ask, -offer.speed_milliunits_per_s, offer.worker_id


def _speed_order(offer: Offer) -> tuple[int, int, PartyId]:
    return -offer.speed_milliunits_per_s // offer.slots, offer.ask, offer.worker_id


def _shortfalls(fleet: _Fleet) -> tuple[Shortfall, ...]:
    return tuple(
        Shortfall(reason.value, count, *MISFIT_WORDS[reason])
        for reason, count in sorted(fleet.fallen_out.items(), key=lambda entry: (-entry[1], entry[0]))
    )


# ------------------------------------------------------------------------------------------------------------- price


def _used(order: Sequence[Offer], units: int) -> Sequence[Offer]:
    """The workers that would take the job's tasks first: as many as have a slot for each of them."""
    tasks = ceil_div(units, TASK_UNITS_TARGET * UNIT_MICROS)
    slots = 0
    for place, offer in enumerate(order):
        if slots >= tasks:
            return order[:place]
        slots += offer.slots
    return order


def _price_per_unit(pool: Pool, order: Sequence[Offer], used: Sequence[Offer], limit: int) -> int:
    """Micro-credits for a unit, on the mean of the workers used: each is paid the cheapest ask left over, or its own.

    Own workers cost nothing. 0 where nobody fits: there is nothing to go by.
    """
    if pool.mode is PoolMode.QUOTA:
        return QUOTA_MICROCREDITS_PER_UNIT if any(not offer.own for offer in used) else 0
    if pool.mode is not PoolMode.MARKET or not used:
        return 0
    left = [offer.ask for offer in order[len(used) :] if not offer.own]
    runner_up = min(left, default=None)
    paid = speed = 0
    for offer in used:
        price = 0 if offer.own else price_paid(ask=offer.ask, runner_up_ask=runner_up, limit=limit or None)
        paid += price * offer.speed_milliunits_per_s
        speed += offer.speed_milliunits_per_s
    return ceil_div(paid, speed)


# -------------------------------------------------------------------------------------------------------------- time


def _times(state: State, account_id: AccountId, fleet: _Fleet, units: int) -> tuple[int, int]:
    """(until its first row is taken, from then to its last), in milliseconds.

    The account's own earlier jobs go first; other accounts with work for the same workers take equal turns until
    theirs is done. A job of few tasks runs on as many slots.
    """
    if not fleet.offers:
        return 0, 0
    speed = sum(offer.speed_milliunits_per_s for offer in fleet.offers)
    slots = sum(offer.slots for offer in fleet.offers)
    tasks = ceil_div(units, TASK_UNITS_TARGET * UNIT_MICROS)
    backlog = _backlog(state, fleet)
    mine = backlog.pop(account_id, 0)
    theirs = sum(backlog.values())
    before = min(mine * (len(backlog) + 1), mine + theirs)
    wait_ms = _milliseconds(before, speed)
    if not any(offer.free for offer in fleet.offers):
        wait_ms += min(_until_free_ms(state.workers[offer.worker_id], offer) for offer in fleet.offers)
    left = theirs - (before - mine)
    work = min(units * (len(backlog) + 1), units + left)
    run_ms = _milliseconds(work, speed * min(tasks, slots) // slots or 1)
    return min(wait_ms, QUOTE_MS_MAX), min(run_ms, QUOTE_MS_MAX)


def _milliseconds(units: int, speed_milliunits_per_s: int) -> int:
    return ceil_div(units * 1_000 * 1_000, UNIT_MICROS * speed_milliunits_per_s)


def _until_free_ms(worker: Worker, offer: Offer) -> int:
    """About when one of its leases ends: half of what it holds, on one slot."""
    each = worker.unit_micros_held // max(1, len(worker.leases))
    return _milliseconds(each, offer.speed_milliunits_per_s // offer.slots or 1) // 2


def _backlog(state: State, fleet: _Fleet) -> dict[AccountId, int]:
    """Micro-units of each account's unfinished work that some of these workers may be given."""
    abilities = _abilities(state, fleet.offers)
    competes: dict[Needs, bool] = {}
    backlog: dict[AccountId, int] = {}
    for job in state.jobs.values():
        if job.state not in _QUEUED:
            continue
        if job.lane not in competes:
            competes[job.lane] = any(misfit(job.lane, ability) is None for ability in abilities)
        if competes[job.lane]:
            backlog[job.account_id] = backlog.get(job.account_id, 0) + unfinished_unit_micros(state, job)
    return {account_id: units for account_id, units in backlog.items() if units}


def _abilities(state: State, offers: Iterable[Offer]) -> set[Ability]:
    return {ability_of_worker(state, state.workers[offer.worker_id]) for offer in offers}


def unfinished_unit_micros(state: State, job: Job) -> int:
    """Work of a job that is not settled."""
    report = state.bundles[job.bundle_digest].report
    live = sum(state.tasks[task_id].unit_micros for task_id in job.tasks)
    if report is None or job.next_row >= job.rows:
        return live
    return live + unit_micros(Layout(job.row_starts, job.byte_starts), cost_of(job, report), job.next_row, job.rows)


def _staying(state: State, offers: Iterable[Offer], now_ms: int, for_ms: int) -> tuple[Offer, ...]:
    """The offers, slower by how likely each worker has left by then; who left seldom before is thought to stay."""
    made: list[Offer] = []
    for offer in offers:
        worker = state.workers[offer.worker_id]
        if sum(worker.stays.ends) >= STAYS_KNOWN_MIN:
            speed = offer.speed_milliunits_per_s * stays_permille(worker, now_ms, for_ms) // 1_000
            made.append(replace(offer, speed_milliunits_per_s=max(offer.slots, speed)))
        else:
            made.append(offer)
    return tuple(made)


# ------------------------------------------------------------------------------------------------ energy and warnings


def _energy(state: State, bundle: Bundle, rows: int, units: int) -> tuple[int, str]:
    """(millijoules of all rows, where the number comes from).

    What rows of unarchived jobs with this bundle took, whoever did them; what workers say of energy is not checked.
    """
    spent = done = 0
    for job in state.jobs.values():
        if job.bundle_digest == bundle.bundle_digest and job.footprint.millijoules:
            spent += job.footprint.millijoules
            done += len(job.done)
    if done:
        return spent * rows // done, "accepted-work"
    return units * MILLIJOULES_PER_UNIT // UNIT_MICROS, "rule-of-thumb"


def _carbon(state: State, used: Sequence[Offer], millijoules: int, now_ms: int) -> tuple[int, bool]:
    """(micrograms of CO₂ by the mean of the workers used, whether the table covers all of them)."""
    weighted = speed = 0
    for offer in used:
        grams = grams_at(state.forecasts, state.workers[offer.worker_id].capability.region, now_ms)
        if grams is None:
            return 0, False
        weighted += grams * offer.speed_milliunits_per_s
        speed += offer.speed_milliunits_per_s
    return (micrograms(millijoules, weighted // speed), True) if speed else (0, False)


def _warnings(
    state: State,
    account_id: AccountId,
    bundle: Bundle,
    request: QuoteRequest,
    fleet: _Fleet,
    *,
    end_at_ms: int,
    total: int,
) -> Iterable[str]:
    options = request.options
    limit = options.limit_microcredits_per_unit
    if not fleet.offers and fleet.fallen_out[Misfit.ASK]:
        yield (
            f"the limit of {credits_text(limit)} credits a unit is below every ask: the cheapest worker asks "
            f"{credits_text(fleet.ask_least)}"
        )
    elif not fleet.offers:
        yield "no worker can take this job now: it would wait until one comes"
    if options.deadline_ms and fleet.offers and end_at_ms > options.deadline_ms:
        late_s = ceil_div(end_at_ms - options.deadline_ms, 1_000)
        yield f"the deadline is not reached: it would end {late_s} seconds later"
    if options.budget_microcredits and total > options.budget_microcredits:
        yield (
            f"the budget of {credits_text(options.budget_microcredits)} credits is less than the price of "
            f"{credits_text(total)}: the job would pause when it is used up"
        )
    curve = bundle.report.cost if bundle.report is not None else None
    if curve is not None and curve.feature_number:
        index = curve.feature_number - 1
        beyond = sum(group.rows for group in request.bins if group.size_sums[index] > curve.size_max * group.rows)
        if beyond:
            yield (
                f"{beyond} rows are larger than any that inspection measured ({curve.size_max}): they count as that "
                "large, and may fail"
            )
    if curve is not None and curve.note:
        yield f"the cost is uncertain: {curve.note}"
