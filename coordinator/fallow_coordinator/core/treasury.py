"""Decisions that move credits by somebody's word: grants, releases, allotments, top-ups, modes of pools."""

from __future__ import annotations

from fallow.credits import MICROCREDITS_MAX, NOTE_BYTES_MAX, TRANSFER_ID_BYTES, PoolMode, Purse, credits_text
from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, PoolId
from fallow.job import JOB_STATES_FINAL, JobState
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core.answers import Decision, Moved
from fallow_coordinator.core.evolve_ledger import transfer_facts
from fallow_coordinator.core.funding import BUDGET_EXHAUSTED, resumed, short_of_allotment
from fallow_coordinator.core.ledger import TransferFacts, allotment, available, pending, treasury
from fallow_coordinator.core.limits import (
    ALLOTMENT_PERIOD_MS_MAX,
    ALLOTMENT_PERIOD_MS_MIN,
    ALLOTMENTS_MAX,
    DAY_MS,
    DUE_PER_TICK_MAX,
    MINUTE_MS,
    TREASURY_MICROCREDITS_MAX,
)
from fallow_coordinator.core.state import State


def set_pool_mode(state: State, command: c.SetPoolMode) -> Decision:
    """How work is paid from here on. Raises POOL_UNKNOWN; JOB_UNFINISHED while jobs of the pool are under way."""
    pool = state.pools.get(command.pool_id)
    if pool is None:
        raise _no_pool(command.pool_id)
    if pool.mode is command.mode:
        return Decision()
    unfinished = sum(
        job.pool_id == command.pool_id and job.state not in JOB_STATES_FINAL for job in state.jobs.values()
    )
    if unfinished:
        raise FallowError(
            Reason.JOB_UNFINISHED,
            f"{unfinished} jobs of pool {pool.name} have not ended, and a job is paid as its pool was when it came",
            field="pool_id",
            hint="wait for them to end, or cancel them",
        )
    return Decision((e.PoolModeChanged(pool_id=command.pool_id, mode=command.mode.value),))


def grant_credits(state: State, command: c.GrantCredits) -> Decision:
    """Credits out of the treasury. Raises ACCOUNT_UNKNOWN, FIELD_INVALID, LIMIT_EXCEEDED, IDEMPOTENCY_CONFLICT."""
    _check_account(state, command.account_id)
    _check_note(command.note)
    _check_amount(command.microcredits, least=1)
    event = e.CreditsGranted(command.account_id, command.microcredits, command.note, command.transfer_id)
    repeated = _repeated(state, command.transfer_id, transfer_facts(event))
    if repeated is not None:
        return repeated
    room = min(
        MICROCREDITS_MAX - state.ledger.balance(available(command.account_id)),
        TREASURY_MICROCREDITS_MAX + state.ledger.balance(treasury(Purse.CREDITS)),
    )
    if command.microcredits > room:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a grant of {credits_text(command.microcredits)} credits",
            field="microcredits",
            limit=f"{credits_text(max(0, room))} credits for this account now",
        )
    return Decision((event,), Moved(command.microcredits, repeated=False))


def release_credits(state: State, command: c.ReleaseCredits) -> Decision:
    """What is pending may be spent.

    Raises ACCOUNT_UNKNOWN, FIELD_INVALID, INSUFFICIENT_CREDITS, IDEMPOTENCY_CONFLICT.
    """
    _check_account(state, command.account_id)
    _check_note(command.note)
    _check_amount(command.microcredits)
    known = state.ledger.transfers.get(command.transfer_id)
    if known is not None and not command.microcredits and (known.kind, known.owner) == ("release", command.account_id):
        return Decision(answer=Moved(known.microcredits, repeated=True))
    # What waits for checks is released by them alone.
    unverified = state.accounts[command.account_id].microcredits_unverified
    waiting = state.ledger.balance(pending(command.account_id)) - unverified
    event = e.CreditsReleased(command.account_id, command.microcredits or waiting, command.note, command.transfer_id)
    repeated = _repeated(state, command.transfer_id, transfer_facts(event))
    if repeated is not None:
        return repeated
    if not waiting or command.microcredits > waiting:
        raise FallowError(
            Reason.INSUFFICIENT_CREDITS,
            f"the account has {credits_text(waiting)} credits pending",
            field="microcredits",
            limit=f"more than 0, up to {credits_text(waiting)} credits",
        )
    return Decision((event,), Moved(event.microcredits, repeated=False))


def set_allotment(state: State, command: c.SetAllotment, now_ms: int) -> Decision:
    """What an account gets in a quota pool; its first period begins now. Raises as `grant_credits`, POOL_UNKNOWN."""
    _check_account(state, command.account_id)
    pool = state.pools.get(command.pool_id)
    if pool is None:
        raise _no_pool(command.pool_id)
    if pool.mode is not PoolMode.QUOTA:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"pool {pool.name} is in mode {pool.mode.value}",
            field="pool_id",
            limit="a pool in mode quota",
            hint=f"`fallow-coordinator pool set-mode {command.pool_id} quota`",
        )
    _check_amount(command.microcredits)
    if not ALLOTMENT_PERIOD_MS_MIN <= command.period_ms <= ALLOTMENT_PERIOD_MS_MAX:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"a period of {command.period_ms} ms",
            field="period",
            limit=f"{ALLOTMENT_PERIOD_MS_MIN // MINUTE_MS} minute to {ALLOTMENT_PERIOD_MS_MAX // DAY_MS} days",
        )
    if len(state.ledger.allotments) >= ALLOTMENTS_MAX:
        raise FallowError(Reason.LIMIT_EXCEEDED, "too many allotments", limit=f"{ALLOTMENTS_MAX} allotments")
    room = TREASURY_MICROCREDITS_MAX + state.ledger.balance(treasury(Purse.ALLOTMENT))
    event = e.AllotmentSet(
        pool_id=command.pool_id,
        account_id=command.account_id,
        microcredits=command.microcredits,
        period_ms=command.period_ms,
        renews_at_ms=now_ms + command.period_ms,
        granted_microcredits=min(command.microcredits, room),
        lapsed_microcredits=state.ledger.balance(allotment(command.pool_id, command.account_id)),
    )
    waiting = short_of_allotment(state, command.pool_id, command.account_id) if command.microcredits else []
    return Decision((event, *map(resumed, waiting)), Moved(event.granted_microcredits, repeated=False))


def renewals_due(state: State, now_ms: int) -> list[e.Event]:
    """Fresh periods of allotments, and the jobs that waited for them."""
    events: list[e.Event] = []
    room = TREASURY_MICROCREDITS_MAX + state.ledger.balance(treasury(Purse.ALLOTMENT))
    for renews_at_ms, pool_id, account_id in state.ledger.renewals[:DUE_PER_TICK_MAX]:
        if renews_at_ms > now_ms:
            break
        known = state.ledger.allotments[pool_id, account_id]
        granted = min(known.microcredits, room)
        room -= granted
        periods = (now_ms - renews_at_ms) // known.period_ms + 1
        events.append(
            e.AllotmentRenewed(
                pool_id=pool_id,
                account_id=account_id,
                renews_at_ms=renews_at_ms + periods * known.period_ms,
                granted_microcredits=granted,
                lapsed_microcredits=state.ledger.balance(allotment(pool_id, account_id)),
            )
        )
        events.extend(map(resumed, short_of_allotment(state, pool_id, account_id)))
    return events


def top_up_job(state: State, command: c.TopUpJob) -> Decision:
    """More budget for a job; one that was out of it goes on.

    Raises JOB_UNKNOWN, JOB_FINISHED, FIELD_INVALID, LIMIT_EXCEEDED, INSUFFICIENT_CREDITS, IDEMPOTENCY_CONFLICT.
    """
    job = state.jobs.get(command.job_id)
    if job is None or job.account_id != command.account_id:
        raise FallowError(Reason.JOB_UNKNOWN, f"this account has no job {command.job_id}", field="job_id")
    _check_amount(command.microcredits, least=1)
    event = e.JobFunded(command.job_id, command.microcredits, command.transfer_id)
    repeated = _repeated(state, command.transfer_id, transfer_facts(event))
    if repeated is not None:
        return repeated
    if job.state in JOB_STATES_FINAL:
        raise FallowError(Reason.JOB_FINISHED, f"the job is {job.state.value} already", field="job_id")
    if job.mode is PoolMode.DONATION or (job.mode is PoolMode.QUOTA and not job.budget_microcredits):
        raise FallowError(
            Reason.FIELD_INVALID,
            f"the job has no budget: its pool is in mode {job.mode.value}",
            field="job_id",
            limit="a job with a budget",
        )
    if job.budget_microcredits + command.microcredits > MICROCREDITS_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"the job's budget is {credits_text(job.budget_microcredits)} credits",
            field="microcredits",
            limit=f"{credits_text(MICROCREDITS_MAX)} credits in all",
        )
    if job.mode is PoolMode.MARKET:
        check_funds(state, command.account_id, command.microcredits, "microcredits")
    waits = job.state is JobState.PAUSED and job.reason_code == BUDGET_EXHAUSTED
    return Decision((event, resumed(job)) if waits else (event,), Moved(command.microcredits, repeated=False))


def check_funds(state: State, account_id: AccountId, microcredits: int, field: str) -> None:
    """Returns when the account can spend so much. Raises INSUFFICIENT_CREDITS."""
    free = state.ledger.balance(available(account_id))
    if microcredits > free:
        raise FallowError(
            Reason.INSUFFICIENT_CREDITS,
            f"the account has {credits_text(free)} credits available, wanted are {credits_text(microcredits)}",
            field=field,
            limit=f"up to {credits_text(free)} credits",
            hint="`fallow account show` tells what is held by jobs; earn some, or ask the operator for a grant",
        )


def _check_account(state: State, account_id: AccountId) -> None:
    if account_id not in state.accounts:
        raise FallowError(Reason.ACCOUNT_UNKNOWN, f"there is no account {account_id}", field="account_id")


def _no_pool(pool_id: PoolId) -> FallowError:
    return FallowError(Reason.POOL_UNKNOWN, f"there is no pool {pool_id}", field="pool_id")


def _check_note(note: str) -> None:
    size = len(note.encode("utf-8", errors="replace"))
    if size > NOTE_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED, f"the note has {size} bytes", field="note", limit=f"{NOTE_BYTES_MAX} bytes of UTF-8"
        )


def _check_amount(microcredits: int, *, least: int = 0) -> None:
    if not least <= microcredits <= MICROCREDITS_MAX:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"{microcredits} micro-credits",
            field="microcredits",
            limit=f"{least} to {MICROCREDITS_MAX} micro-credits",
        )


def _repeated(state: State, transfer_id: bytes, facts: TransferFacts) -> Decision | None:
    """The answer to a transfer that happened already. Raises FIELD_INVALID, IDEMPOTENCY_CONFLICT."""
    if len(transfer_id) != TRANSFER_ID_BYTES:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"a transfer id of {len(transfer_id)} bytes",
            field="transfer_id",
            limit=f"{TRANSFER_ID_BYTES} random bytes",
        )
    known = state.ledger.transfers.get(transfer_id)
    if known is None:
        return None
    if known != facts:
        raise FallowError(
            Reason.IDEMPOTENCY_CONFLICT,
            f"this transfer id did something else: {known.kind} of {credits_text(known.microcredits)} credits",
            field="transfer_id",
            hint="use a fresh one for a new transfer",
        )
    return Decision(answer=Moved(known.microcredits, repeated=True))
