"""An observer of money: keeps books of its own from durable events and the promises alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fallow.credits import PoolMode
from fallow.ids import AccountId, JobId, LeaseId, PartyId, TaskId
from fallow.job import JOB_STATES_FINAL
from fallow.session import Capability
from fallow_coordinator.core import events as e
from simulation.oracle import Oracle
from simulation.virtual_time import SimulationError

MICRO = 1_000_000


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise SimulationError(what)


@dataclass
class SeenBudget:
    """What a job may spend and has spent."""

    account_id: AccountId
    mode: PoolMode
    budget: int
    limit: int
    spent: int = 0
    ended: bool = False
    kept: int = 0
    """What its late leases may still cost once it has ended."""


@dataclass
class SeenPrice:
    """What a live lease may cost."""

    job_id: JobId
    worker_id: PartyId
    task_id: TaskId
    reserved: int


@dataclass
class MarketOracle(Oracle):
    """The oracle, and who has what by its own count."""

    modes: dict[str, PoolMode] = field(default_factory=dict[str, PoolMode])
    owners: dict[PartyId, AccountId] = field(default_factory=dict[PartyId, AccountId])
    asks: dict[PartyId, int] = field(default_factory=dict[PartyId, int])
    costs: dict[TaskId, int] = field(default_factory=dict[TaskId, int])
    budgets: dict[JobId, SeenBudget] = field(default_factory=dict[JobId, SeenBudget])
    prices: dict[LeaseId, SeenPrice] = field(default_factory=dict[LeaseId, SeenPrice])
    available: Counter[AccountId] = field(default_factory=Counter[AccountId])
    pending: Counter[AccountId] = field(default_factory=Counter[AccountId])
    contributed: Counter[AccountId] = field(default_factory=Counter[AccountId])
    allotted: Counter[AccountId] = field(default_factory=Counter[AccountId])
    transfers: set[bytes] = field(default_factory=set[bytes])
    granted: int = 0

    def see(self, at_ms: int, event: e.Event) -> None:
        """The next durable record."""
        ended = self.prices.get(event.lease_id) if isinstance(event, e.LeaseEnded) else None
        super().see(at_ms, event)
        match event:
            case e.PoolCreated():
                self.modes[event.pool_id] = PoolMode(event.mode)
            case e.PoolModeChanged():
                self.modes[event.pool_id] = PoolMode(event.mode)
            case e.PartyEnrolled():
                self.owners[event.party_id] = event.account_id
            case e.SessionOpened():
                self._hear(event.worker_id, event.capability)
            case e.CapabilityReported():
                self._hear(self.sessions[event.session_id], event.capability)
            case e.TaskCreated():
                self.costs[event.task_id] = event.unit_micros
            case e.JobSubmitted():
                self._submit(event)
            case e.JobStateChanged():
                if event.state in JOB_STATES_FINAL:
                    self._end_job(event.job_id)
            case e.LeaseGranted():
                self._price(event)
            case e.LeaseEnded():
                if ended is not None:
                    self._free(event.lease_id)
            case e.TaskSettled() | e.LateLeaseSettled():
                self._pay(event)
            case _:
                self._see_transfer(event)

    def _see_transfer(self, event: e.Event) -> None:
        match event:
            case e.CreditsGranted():
                self._once(event.transfer_id)
                self.available[event.account_id] += event.microcredits
                self.granted += event.microcredits
            case e.CreditsReleased():
                self._once(event.transfer_id)
                self.pending[event.account_id] -= event.microcredits
                self.available[event.account_id] += event.microcredits
                _must(self.pending[event.account_id] >= 0, "more was released than earned")
            case e.JobFunded():
                self._once(event.transfer_id)
                job = self.budgets[event.job_id]
                job.budget += event.microcredits
                if job.mode is PoolMode.MARKET:
                    self._spend(job.account_id, event.microcredits)
            case e.AllotmentSet() | e.AllotmentRenewed():
                self.allotted[event.account_id] += event.granted_microcredits - event.lapsed_microcredits
            case _:
                pass

    def _once(self, transfer_id: bytes) -> None:
        _must(transfer_id not in self.transfers, "one transfer happened twice")
        self.transfers.add(transfer_id)

    def _hear(self, worker_id: PartyId, capability: Capability | None) -> None:
        if capability is not None:
            self.asks[worker_id] = capability.ask_microcredits_per_unit

    def _spend(self, account_id: AccountId, microcredits: int) -> None:
        self.available[account_id] -= microcredits
        _must(self.available[account_id] >= 0, "an account spent what it does not have")

    def _submit(self, event: e.JobSubmitted) -> None:
        mode = self.modes[event.pool_id]
        budget = event.options.budget_microcredits if mode is not PoolMode.DONATION else 0
        self.budgets[event.job_id] = SeenBudget(
            event.account_id, mode, budget, event.options.limit_microcredits_per_unit
        )
        if mode is PoolMode.MARKET:
            _must(event.held_microcredits == budget, "a budget is not held")
            self._spend(event.account_id, budget)

    def _end_job(self, job_id: JobId) -> None:
        job = self.budgets[job_id]
        left = [price for price in self.prices.values() if price.job_id == job_id]
        late = all(price.task_id in self.answered for price in left)
        _must(late, "a job ended and left leases to pay whose rows it does not have")
        job.ended = True
        if job.mode is PoolMode.MARKET:
            job.kept = sum(price.reserved for price in left)
            self.available[job.account_id] += job.budget - job.spent - job.kept

    def _price(self, event: e.LeaseGranted) -> None:
        job_id, _ = self.spans[event.task_id]
        if job_id is None:
            return
        job, price = self.budgets[job_id], event.price_microcredits_per_unit
        own = self.owners[event.worker_id] == job.account_id
        cost = self.costs[event.task_id]
        _must(event.reserved_microcredits == -(-price * cost // MICRO), "a reservation is not what the lease may cost")
        if own or job.mode is PoolMode.DONATION:
            _must(price == 0, "what is free has a price")
        elif job.mode is PoolMode.MARKET:
            _must(price <= job.limit, "a price is above the limit")
            _must(price >= self.asks[event.worker_id], "a price is below the worker's ask")
        else:
            _must(price == MICRO, "a unit of allotment is a unit of work")
        self.prices[event.lease_id] = SeenPrice(job_id, event.worker_id, event.task_id, event.reserved_microcredits)
        reserved = sum(one.reserved for one in self.prices.values() if one.job_id == job_id)
        if job.mode is PoolMode.MARKET or job.budget:
            _must(job.spent + reserved <= job.budget, "a budget is overrun")
        if job.mode is PoolMode.QUOTA:
            self.allotted[job.account_id] -= event.reserved_microcredits
            _must(self.allotted[job.account_id] >= 0, "an allotment is overrun")

    def _free(self, lease_id: LeaseId) -> SeenPrice:
        price = self.prices.pop(lease_id)
        job = self.budgets[price.job_id]
        if job.mode is PoolMode.QUOTA:
            self.allotted[job.account_id] += price.reserved
        elif job.mode is PoolMode.MARKET and job.ended:
            job.kept -= price.reserved
            self.available[job.account_id] += price.reserved
        return price

    def _pay(self, event: e.TaskSettled | e.LateLeaseSettled) -> None:
        job_id, _ = self.spans[event.task_id]
        if job_id is None:
            return
        _must(event.lease_id in self.prices, "a lease was paid twice, or never priced")
        price = self._free(event.lease_id)
        job, owner = self.budgets[job_id], self.owners[price.worker_id]
        done = event.rows - event.rows_failed
        _must(event.microcredits == price.reserved * done // event.rows, "pay does not follow the rows done")
        job.spent += event.microcredits
        if job.mode is PoolMode.MARKET:
            _must(not event.released, "a volunteer's pay was released unchecked")
            _must(not event.contribution_microcredits, "paid work is no contribution")
            self.pending[owner] += event.microcredits
            if job.ended:
                self._spend(job.account_id, event.microcredits)
            return
        if job.mode is PoolMode.QUOTA:
            self.allotted[job.account_id] -= event.microcredits
        expected = 0 if owner == job.account_id else self.costs[event.task_id] * done // event.rows
        _must(event.contribution_microcredits == expected, "a contribution is not the work done")
        self.contributed[owner] += expected
