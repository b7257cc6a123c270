"""Credits: balances, statements, earnings, prices, top-ups; and for operators grants, releases, allotments, modes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from statistics import median_low
from typing import Final

import grpc

from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, JobId, PartyId, PoolId
from fallow.job import JOB_STATES_FINAL
from fallow.roles import Role
from fallow.v1 import ledger_service_pb2 as pb
from fallow.wire.job import pool_mode_from, status_to_message
from fallow.wire.moments import duration_from_message, duration_to_message, moment_from_message, moment_to_message
from fallow_coordinator.core.answers import Moved
from fallow_coordinator.core.balances import AccountBalances, all_balances, balances_of, made
from fallow_coordinator.core.commands import GrantCredits, ReleaseCredits, SetAllotment, SetPoolMode, TopUpJob
from fallow_coordinator.core.prices import (
    HIGH_PERCENT,
    LOW_PERCENT,
    MEDIAN_PERCENT,
    PricePoint,
    device_class,
    price_at,
)
from fallow_coordinator.core.state import State
from fallow_coordinator.engine import Engine
from fallow_coordinator.ports import LedgerViews
from fallow_coordinator.service.auth import Caller, Doorkeeper
from fallow_coordinator.service.calls import Answer, Call, RequestT, ResponseT, method_name, service_handlers, unary
from fallow_coordinator.service.job_reads import JobReads
from fallow_coordinator.service.rate_limit import RateLimit

DAY_MS: Final = 24 * 3_600_000
EARNINGS_PERIOD_MS_DEFAULT: Final = 30 * DAY_MS
PRICES_PERIOD_MS_DEFAULT: Final = 7 * DAY_MS
PERIOD_MS_MAX: Final = 366 * DAY_MS
PAGE_SIZE_DEFAULT: Final = 1_000
PAGE_SIZE_MAX: Final = 10_000
STATEMENT_CHARGE: Final = 20
"""A statement may look through all that an account ever did: it counts as so many calls."""

_SERVICE = pb.DESCRIPTOR.services_by_name["LedgerService"]
_ANYBODY = (Role.CLIENT, Role.OPERATOR, Role.WORKER)


class LedgerService:
    """All of LedgerService."""

    def __init__(
        self,
        *,
        engine: Engine,
        reads: JobReads,
        views: LedgerViews,
        doorkeeper: Doorkeeper,
        now_ms: Callable[[], int],
    ) -> None:
        """Balances come from `engine`'s state, history from `views`."""
        self._engine = engine
        self._reads = reads
        self._views = views
        self._doorkeeper = doorkeeper
        self._now_ms = now_ms

    def handlers(self, limit: RateLimit) -> grpc.GenericRpcHandler:
        """All methods; `limit` counts by key."""

        def handler(
            method: str, request_type: type[RequestT], answer: Answer[RequestT, ResponseT]
        ) -> tuple[str, grpc.RpcMethodHandler[bytes, bytes]]:
            return method, unary(method_name(_SERVICE, method), request_type, answer, limit)

        operators = self._for_operators
        return service_handlers(
            _SERVICE,
            dict(
                (
                    handler("GetBalances", pb.GetBalancesRequest, self.get_balances),
                    handler("GetStatement", pb.GetStatementRequest, self.get_statement),
                    handler("GetEarnings", pb.GetEarningsRequest, self.get_earnings),
                    handler("TopUpJob", pb.TopUpJobRequest, self.top_up_job),
                    handler("GetPrices", pb.GetPricesRequest, operators(self.get_prices)),
                    handler("GrantCredits", pb.GrantCreditsRequest, operators(self.grant_credits)),
                    handler("ReleaseCredits", pb.ReleaseCreditsRequest, operators(self.release_credits)),
                    handler("ListBalances", pb.ListBalancesRequest, operators(self.list_balances)),
                    handler("SetAllotment", pb.SetAllotmentRequest, operators(self.set_allotment)),
                    handler("ListPools", pb.ListPoolsRequest, operators(self.list_pools)),
                    handler("SetPoolMode", pb.SetPoolModeRequest, operators(self.set_pool_mode)),
                )
            ),
        )

    def _for_operators(self, answer: Answer[RequestT, ResponseT]) -> Answer[RequestT, ResponseT]:
        async def guarded(call: Call[RequestT]) -> ResponseT:
            await self._doorkeeper.admit(call.peer, Role.OPERATOR)
            return await answer(call)

        return guarded

    # ------------------------------------------------------------------------------------------- for everybody

    async def get_balances(self, call: Call[pb.GetBalancesRequest]) -> pb.GetBalancesResponse:
        """What an account has now."""
        caller = await self._doorkeeper.admit(call.peer, *_ANYBODY)
        return pb.GetBalancesResponse(balances=self._balances(_account(caller, call.request.account_id)))

    async def get_statement(self, call: Call[pb.GetStatementRequest]) -> pb.GetStatementResponse:
        """A page of what came and went."""
        caller = await self._doorkeeper.admit(call.peer, *_ANYBODY)
        call.charge(STATEMENT_CHARGE)
        request = call.request
        account_id = _account(caller, request.account_id)
        if account_id not in self._engine.state.accounts:
            raise _no_account(account_id)
        size = request.page_size or PAGE_SIZE_DEFAULT
        if size > PAGE_SIZE_MAX:
            raise FallowError(
                Reason.LIMIT_EXCEEDED, f"{size} lines", field="page_size", limit=f"at most {PAGE_SIZE_MAX}"
            )
        offset = _offset(request.page_token)
        page = await asyncio.to_thread(
            self._views.statement,
            account_id,
            since_ms=moment_from_message(request.since),
            until_ms=moment_from_message(request.until) or 1 << 62,
            offset=offset,
            limit=size + 1,
        )
        return pb.GetStatementResponse(
            lines=[
                pb.StatementLine(
                    first_at=moment_to_message(row.first_at_ms),
                    last_at=moment_to_message(row.last_at_ms),
                    what=row.what,
                    book=row.book,
                    microcredits=row.microcredits,
                    job_id=row.job_id,
                    worker_id=row.worker_id,
                    pool_id=row.pool_id,
                    note=row.note,
                    count=row.count,
                )
                for row in page.rows[:size]
            ],
            next_page_token=str(offset + size) if len(page.rows) > size else "",
            opening=[pb.BookBalance(book=book, microcredits=m) for book, m in sorted(page.opening.items())],
            closing=[pb.BookBalance(book=book, microcredits=m) for book, m in sorted(page.closing.items())],
            sequence=page.sequence,
        )

    async def get_earnings(self, call: Call[pb.GetEarningsRequest]) -> pb.GetEarningsResponse:
        """What a worker did and earned."""
        caller = await self._doorkeeper.admit(call.peer, *_ANYBODY)
        worker_id = PartyId(call.request.worker_id or caller.party_id)
        worker = self._engine.state.workers.get(worker_id)
        if worker is None or (worker.account_id != caller.account_id and caller.role is not Role.OPERATOR):
            raise FallowError(Reason.WORKER_UNKNOWN, "this account has no such worker", field="worker_id")
        since_ms = self._since(_period(call.request.period, EARNINGS_PERIOD_MS_DEFAULT))
        sequence, days = await asyncio.to_thread(self._views.earnings, worker_id, since_ms=since_ms)
        prices = await asyncio.to_thread(self._views.prices, since_ms=since_ms)
        kind = device_class(worker.capability)
        return pb.GetEarningsResponse(
            worker_id=worker_id,
            balances=self._balances(worker.account_id),
            days=[
                pb.EarningsDay(
                    day=moment_to_message(day.day_ms),
                    pool_id=day.pool_id,
                    tasks=day.tasks,
                    rows=day.rows,
                    rows_failed=day.rows_failed,
                    unit_micros=day.unit_micros,
                    microcredits=day.microcredits,
                    contribution_microcredits=day.contribution_microcredits,
                    energy_millijoules=day.energy_millijoules,
                )
                for day in days
            ],
            ask_microcredits_per_unit=worker.capability.ask_microcredits_per_unit,
            device_class=kind,
            prices=_index(kind, prices[kind], ()) if kind in prices else None,
            sequence=sequence,
        )

    async def top_up_job(self, call: Call[pb.TopUpJobRequest]) -> pb.TopUpJobResponse:
        """The job, with more budget."""
        caller = await self._doorkeeper.admit(call.peer, Role.CLIENT, Role.OPERATOR)
        request = call.request
        job_id = JobId(request.job_id)
        status = await self._reads.status(caller.account_id, job_id)
        if status.state in JOB_STATES_FINAL and request.transfer_id not in self._engine.state.ledger.transfers:
            raise FallowError(Reason.JOB_FINISHED, f"the job is {status.state.value} already", field="job_id")
        if job_id in self._engine.state.jobs:
            await self._engine.submit(TopUpJob(caller.account_id, job_id, request.microcredits, request.transfer_id))
        status = await self._reads.status(caller.account_id, job_id)
        return pb.TopUpJobResponse(job=status_to_message(status))

    # ------------------------------------------------------------------------------------------- for operators

    async def get_prices(self, call: Call[pb.GetPricesRequest]) -> pb.GetPricesResponse:
        """Prices paid and asked, by class of devices."""
        since_ms = self._since(_period(call.request.period, PRICES_PERIOD_MS_DEFAULT))
        prices = await asyncio.to_thread(self._views.prices, since_ms=since_ms)
        asks: dict[str, list[int]] = {}
        for worker in self._engine.state.workers.values():
            if worker.session_id is not None and worker.ask_microcredits_per_unit:
                asks.setdefault(device_class(worker.capability), []).append(worker.ask_microcredits_per_unit)
        kinds = sorted({*prices, *asks})
        return pb.GetPricesResponse(prices=[_index(kind, prices.get(kind, ()), asks.get(kind, ())) for kind in kinds])

    async def grant_credits(self, call: Call[pb.GrantCreditsRequest]) -> pb.GrantCreditsResponse:
        """Credits for an account."""
        request = call.request
        account_id = AccountId(request.account_id)
        moved = await self._move(
            GrantCredits(account_id, request.microcredits, _text(request.note), request.transfer_id)
        )
        return pb.GrantCreditsResponse(balances=self._balances(account_id), repeated=moved.repeated)

    async def release_credits(self, call: Call[pb.ReleaseCreditsRequest]) -> pb.ReleaseCreditsResponse:
        """Earned credits become spendable."""
        request = call.request
        account_id = AccountId(request.account_id)
        moved = await self._move(
            ReleaseCredits(account_id, request.microcredits, _text(request.note), request.transfer_id)
        )
        return pb.ReleaseCreditsResponse(
            balances=self._balances(account_id), released_microcredits=moved.microcredits, repeated=moved.repeated
        )

    async def list_balances(self, call: Call[pb.ListBalancesRequest]) -> pb.ListBalancesResponse:
        """Accounts that have anything."""
        state = self._engine.state
        return pb.ListBalancesResponse(
            balances=[_balances_message(one) for one in all_balances(state)], made_microcredits=made(state)
        )

    async def set_allotment(self, call: Call[pb.SetAllotmentRequest]) -> pb.SetAllotmentResponse:
        """An account's allotment in a quota pool."""
        request = call.request
        account_id = AccountId(request.account_id)
        period_ms = duration_from_message(request.period)
        await self._engine.submit(SetAllotment(PoolId(request.pool_id), account_id, request.microcredits, period_ms))
        return pb.SetAllotmentResponse(balances=self._balances(account_id))

    async def list_pools(self, call: Call[pb.ListPoolsRequest]) -> pb.ListPoolsResponse:
        """All pools."""
        state = self._engine.state
        return pb.ListPoolsResponse(pools=[_pool(state, pool_id) for pool_id in state.pools])

    async def set_pool_mode(self, call: Call[pb.SetPoolModeRequest]) -> pb.SetPoolModeResponse:
        """How work is paid in a pool."""
        pool_id = PoolId(call.request.pool_id)
        await self._engine.submit(SetPoolMode(pool_id, pool_mode_from(call.request.mode, "mode")))
        return pb.SetPoolModeResponse(pool=_pool(self._engine.state, pool_id))

    async def _move(self, command: GrantCredits | ReleaseCredits) -> Moved:
        moved = (await self._engine.submit(command)).answer
        assert isinstance(moved, Moved), "a transfer moves something"
        return moved

    def _balances(self, account_id: AccountId) -> pb.Balances:
        found = balances_of(self._engine.state, account_id)
        if found is None:
            raise _no_account(account_id)
        return _balances_message(found)

    def _since(self, period_ms: int) -> int:
        return max(0, self._now_ms() - period_ms)


def _account(caller: Caller, named: str) -> AccountId:
    """The account that is asked about. Raises PERMISSION_DENIED for another's, unless an operator asks."""
    if not named or named == caller.account_id:
        return caller.account_id
    if caller.role is not Role.OPERATOR:
        raise FallowError(
            Reason.PERMISSION_DENIED, "another account's credits are nobody's business", field="account_id"
        )
    return AccountId(named)


def _no_account(account_id: AccountId) -> FallowError:
    return FallowError(Reason.ACCOUNT_UNKNOWN, f"there is no account {account_id}", field="account_id")


def _text(note: str) -> str:
    if not note.isprintable():
        raise FallowError(Reason.FIELD_INVALID, "the note has characters that do not print", field="note")
    return note


def _offset(token: str) -> int:
    if not token:
        return 0
    if not token.isdecimal() or len(token) > 12:
        raise FallowError(
            Reason.FIELD_INVALID, "this page token was not given here", field="page_token", hint="start over"
        )
    return int(token)


def _period(message: object, default_ms: int) -> int:
    period_ms = duration_from_message(message) or default_ms  # type: ignore[arg-type]  # a Duration
    if not 0 < period_ms <= PERIOD_MS_MAX:
        raise FallowError(Reason.FIELD_INVALID, f"a period of {period_ms} ms", field="period", limit="up to 366 days")
    return period_ms


def _index(kind: str, points: Sequence[PricePoint], asks: Sequence[int]) -> pb.PriceIndex:
    return pb.PriceIndex(
        device_class=kind,
        low_microcredits_per_unit=price_at(points, LOW_PERCENT),
        median_microcredits_per_unit=price_at(points, MEDIAN_PERCENT),
        high_microcredits_per_unit=price_at(points, HIGH_PERCENT),
        tasks=sum(point.tasks for point in points),
        unit_micros=sum(point.unit_micros for point in points),
        microcredits=sum(point.microcredits for point in points),
        workers_asking=len(asks),
        median_ask_microcredits_per_unit=median_low(asks) if asks else 0,
    )


def _balances_message(balances: AccountBalances) -> pb.Balances:
    return pb.Balances(
        account_id=balances.account_id,
        name=balances.name,
        available_microcredits=balances.available,
        held_microcredits=balances.held,
        pending_microcredits=balances.pending,
        contribution_microcredits=balances.contribution,
        allotments=[
            pb.Allotment(
                pool_id=one.pool_id,
                microcredits=one.microcredits,
                left_microcredits=one.left_microcredits,
                period=duration_to_message(one.period_ms),
                renews_at=moment_to_message(one.renews_at_ms),
            )
            for one in balances.allotments
        ],
    )


def _pool(state: State, pool_id: PoolId) -> pb.Pool:
    pool = state.pools[pool_id]
    return pb.Pool(
        pool_id=pool.pool_id,
        account_id=pool.account_id,
        name=pool.name,
        mode=pool.mode.value,
        policy=pool.policy,
        workers_connected=sum(
            worker.pool_id == pool_id and worker.session_id is not None for worker in state.workers.values()
        ),
        jobs_unfinished=sum(
            job.pool_id == pool_id and job.state not in JOB_STATES_FINAL for job in state.jobs.values()
        ),
    )
