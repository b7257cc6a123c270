"""Seeds with money: market and quota pools, asks that change, limits, budgets that run out, top-ups said twice, churn.

Reproduce a seed by hand: `PYTHONPATH=tests .venv/bin/python -m simulation.market SEED`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from unittest.mock import patch

from fallow.credits import PoolMode
from fallow.errors import FallowError, Reason
from fallow.ids import AccountId
from fallow.job import JobOptions, JobState
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import groups, questions
from fallow_coordinator.core.answers import Answer
from fallow_coordinator.core.ledger import allotment, available, contribution, pending
from fallow_coordinator.core.state import State
from simulation.coordinator_side import EngineBugs, carry
from simulation.core_world import digest
from simulation.market_oracle import MarketOracle
from simulation.run import FAULTS_END_MS, Client, Simulation
from simulation.virtual_time import SimulationError

ASKS = (0, 50_000, 120_000, 200_000, 260_000, 900_000)
LIMITS = (0, 100_000, 250_000, 1_000_000)
PERIOD_MS = 60_000
_EXPECTED = frozenset(
    {
        Reason.INSUFFICIENT_CREDITS,
        Reason.JOB_FINISHED,
        Reason.JOB_UNKNOWN,
        Reason.FIELD_INVALID,
        Reason.LIMIT_EXCEEDED,
        Reason.SESSION_REPLACED,
    }
)


class MarketSimulation(Simulation):
    """The world of one seed, with money in it."""

    def __init__(self, seed: int, bugs: EngineBugs | None = None) -> None:
        super().__init__(seed, bugs)
        self.books = MarketOracle(ticks=True)
        self.disk.oracle = self.books
        dice = self.schedule.dice
        self.mode = dice.choice((PoolMode.MARKET, PoolMode.MARKET, PoolMode.MARKET, PoolMode.QUOTA))
        self.purse = dice.choice((0, 500_000, 5_000_000, 500_000_000))
        self.budgets = {client.number: dice.choice((0, 20_000, 300_000, 50_000_000)) for client in self.clients}
        self.limits = {client.number: dice.choice(LIMITS) for client in self.clients}
        self.transfers = 0
        self.calm = False
        for worker in self.workers:
            worker.capability = replace(worker.capability, ask_microcredits_per_unit=dice.choice(ASKS))

    # ---------------------------------------------------------------------------------------------- what goes on

    def _registered(self, answer: Answer | FallowError) -> None:
        life = self.coordinator
        pool_id = life.state.default_pool_id
        life.submit(c.SetPoolMode(pool_id, self.mode), self._heard)
        if self.mode is PoolMode.QUOTA:
            life.submit(c.SetAllotment(pool_id, self.account_id, max(40_000_000, self.purse), PERIOD_MS), self._heard)
        elif self.purse:
            self._grant(self.purse)
        self.schedule.after(2_000, self._trade)
        super()._registered(answer)

    def _options(self, client: Client) -> JobOptions:
        budget, limit = self.budgets[client.number], self.limits[client.number]
        return replace(
            super()._options(client),
            region="",
            device_kind="",
            budget_microcredits=budget,
            limit_microcredits_per_unit=limit if budget else 0,
        )

    def _trade(self) -> None:
        """Now and then somebody grants, tops up, releases, or asks something else."""
        self.schedule.after(self.schedule.between(500, 2_500), self._trade)
        if not self.coordinator.alive:
            return
        chance = self.schedule.chance
        if self.schedule.now_ms >= FAULTS_END_MS and not self.calm:
            self._everybody_is_generous()
        if self.calm or chance(0.3):
            self._grant(self.schedule.dice.choice((1, 400_000, 60_000_000)))
        for client in self.clients:
            if client.job_id is not None and (self.calm or chance(0.3)):
                self.coordinator.read(lambda state, client=client: self._top_up(client, state))  # type: ignore[misc]
        for worker in self.workers:
            if worker.party_id in self.coordinator.state.workers and chance(0.2):
                self._release(self.coordinator.state.workers[worker.party_id].account_id)
            if not self.calm and chance(0.1):
                worker.capability = replace(
                    worker.capability, ask_microcredits_per_unit=self.schedule.dice.choice(ASKS)
                )
                worker.connect()

    def _everybody_is_generous(self) -> None:
        """From here on nobody asks more than anybody's limit: every job can end."""
        self.calm = True
        for worker in self.workers:
            worker.capability = replace(worker.capability, ask_microcredits_per_unit=0)
            worker.connect()

    def _transfer_id(self) -> bytes:
        self.transfers += 1
        return digest("transfer", self.transfers)[:16]

    def _carry(self, command: c.Command) -> None:
        """What people ask for travels too, and may be said twice."""
        carry(self.schedule, self.faults, lambda: self.coordinator.submit(command, self._heard))

    def _grant(self, microcredits: int) -> None:
        self._carry(c.GrantCredits(self.account_id, microcredits, "", self._transfer_id()))

    def _release(self, account_id: AccountId) -> None:
        microcredits = self.schedule.dice.choice((0, 1, 10_000))
        self._carry(c.ReleaseCredits(account_id, microcredits, "", self._transfer_id()))

    def _top_up(self, client: Client, state: State) -> None:
        assert client.job_id is not None
        status = questions.job_status(state, client.job_id)
        if status is None or not status.budget_microcredits:
            return
        if status.state is JobState.PAUSED or self.schedule.chance(0.2):
            microcredits = 20_000_000 if self.calm else self.schedule.dice.choice((1, 100_000, 3_000_000))
            self._carry(c.TopUpJob(self.account_id, client.job_id, microcredits, self._transfer_id()))

    def _heard(self, answer: Answer | FallowError) -> None:
        if isinstance(answer, FallowError) and answer.reason not in _EXPECTED:
            raise SimulationError(f"an honest transfer was refused: {answer}")

    # ---------------------------------------------------------------------------------------------- the end

    def _judge(self, state: State) -> None:
        super()._judge(state)
        books, ledger = self.books, state.ledger
        for account_id in state.accounts:
            told = (
                ledger.balance(available(account_id)),
                ledger.balance(pending(account_id)),
                ledger.balance(contribution(account_id)),
                ledger.balance(allotment(state.default_pool_id, account_id)),
            )
            counted = (
                books.available[account_id],
                books.pending[account_id],
                books.contributed[account_id],
                books.allotted[account_id],
            )
            if told != counted:
                raise SimulationError(f"the books say {told}, the events {counted}")
        held = sum(job.kept if job.ended else job.budget - job.spent for job in books.budgets.values())
        if sum(books.available.values()) + sum(books.pending.values()) + held != books.granted:
            raise SimulationError("credits were made or lost")


def simulate_market(seed: int, bugs: EngineBugs | None = None) -> MarketSimulation:
    """Runs one seed; a failure says how to see it again."""
    simulation = None
    try:
        # How devices come to be measured is another simulation's business.
        with patch.object(groups, "measured", lambda worker: True):
            simulation = MarketSimulation(seed, bugs)
            simulation.run()
    except Exception as error:
        at_ms = simulation.schedule.now_ms if simulation is not None else 0
        raise SimulationError(
            f"seed {seed}, at {at_ms} ms: {type(error).__name__}: {error}\n"
            f"reproduce: PYTHONPATH=tests .venv/bin/python -m simulation.market {seed}"
        ) from error
    return simulation


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        ran = simulate_market(int(argument))
        print(f"seed {argument}: {len(ran.disk.records)} records, {ran.schedule.now_ms} virtual ms, {ran.refusals}")
