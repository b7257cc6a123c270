"""Decisions about workers' sessions: one each, replaced only by who holds its token."""

from __future__ import annotations

from fallow.credits import ASK_MICROCREDITS_PER_UNIT_MAX, check_amount
from fallow.errors import FallowError, Reason
from fallow.ids import PartyId, SessionId
from fallow.limits import LEASES_PER_WORKER_MAX
from fallow.roles import Role
from fallow.session import Capability, Cause
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core.answers import Decision, SessionGranted
from fallow_coordinator.core.draft import Draft, shortened
from fallow_coordinator.core.identity import quarantined, revoked
from fallow_coordinator.core.kinds_of_workers import told_apart
from fallow_coordinator.core.limits import MACHINE_PRIORITY_MS, MINUTE_MS, SESSIONS_MAX
from fallow_coordinator.core.measuring import outlived
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.state import State, Worker

REPLACED = "replaced by a newer session of the same worker"


def open_session(state: State, command: c.OpenSession, now_ms: int, names: Names) -> Decision:
    """A worker's stream: keeps the leases it lists with their live fence; what else it held is lost and tried again.

    Raises WORKER_UNKNOWN, PARTY_REVOKED, PARTY_QUARANTINED, CERTIFICATE_EXPIRED, KEY_IN_USE, LIMIT_EXCEEDED,
    FIELD_INVALID, OVERLOADED.
    """
    worker = _admitted(state, command.worker_id, now_ms)
    _check_window(command.window)
    _check_ask(command.capability)
    capability = told_apart(state, worker, command.capability)
    if len(command.held_leases) > LEASES_PER_WORKER_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"the worker lists {len(command.held_leases)} leases",
            field="held_leases",
            limit=f"{LEASES_PER_WORKER_MAX} leases",
        )
    _check_machine(worker, command, now_ms)
    _check_token(worker, command)
    if worker.session_id is None and len(state.sessions) >= SESSIONS_MAX:
        raise FallowError(
            Reason.OVERLOADED,
            "too many workers are connected",
            limit=f"{SESSIONS_MAX} sessions",
            hint="try again later",
        )
    draft = Draft(state)
    draft.events.extend(outlived(worker, command.capability.devices))
    if worker.session_id is not None:
        draft.events.append(e.SessionClosed(session_id=worker.session_id, reason=REPLACED))
    fences = {held.lease_id: held.fence for held in command.held_leases}
    kept = tuple(lease_id for lease_id in worker.leases if fences.get(lease_id) == state.leases[lease_id].fence)
    session_id = SessionId(names.new("session"))
    draft.events.append(
        e.SessionOpened(
            session_id=session_id,
            worker_id=worker.worker_id,
            resume_token_digest=command.next_resume_token_digest,
            capability=capability,
            window=command.window,
            kept=kept,
            presented_token_digest=command.resume_token_digest,
            machine_digest=command.machine_digest,
        )
    )
    for lease_id in worker.leases:
        if lease_id not in kept:
            lease = state.leases[lease_id]
            draft.end_lease(lease, e.LeaseOutcome.LOST, Cause.WORKER, "the worker came back without it")
    return Decision(tuple(draft.events), SessionGranted(session_id, kept))


def close_session(state: State, command: c.CloseSession) -> Decision:
    """The stream is gone. Nothing happens when it was closed or replaced before."""
    if command.session_id not in state.sessions:
        return Decision()
    return Decision((e.SessionClosed(session_id=command.session_id, reason=shortened(command.reason)),))


def change_capability(state: State, command: c.ChangeCapability) -> Decision:
    """The worker can do or hold something else now.

    Raises SESSION_REPLACED, LIMIT_EXCEEDED, FIELD_INVALID, OVERLOADED.
    """
    worker = worker_of_session(state, command.session_id)
    _check_window(command.window)
    capability = command.capability
    if capability is not None:
        _check_ask(capability)
        capability = told_apart(state, worker, capability)
    if command.window == worker.window and capability in (None, worker.capability):
        return Decision()
    event = e.CapabilityReported(session_id=command.session_id, capability=capability, window=command.window)
    ended = () if capability is None else outlived(worker, capability.devices)
    return Decision((*ended, event))


def drain_session(state: State, command: c.DrainSession) -> Decision:
    """The worker's window closes; what it holds it may finish. Raises SESSION_REPLACED."""
    worker = worker_of_session(state, command.session_id)
    if not worker.window:
        return Decision()
    return Decision((e.CapabilityReported(session_id=command.session_id, capability=None, window=0),))


def worker_of_session(state: State, session_id: SessionId) -> Worker:
    """The worker whose open session this is. Raises SESSION_REPLACED."""
    worker_id = state.sessions.get(session_id)
    if worker_id is None:
        raise FallowError(Reason.SESSION_REPLACED, "this session is over", hint="open a new one")
    return state.workers[worker_id]


def _admitted(state: State, worker_id: PartyId, now_ms: int) -> Worker:
    party = state.parties.get(worker_id)
    if party is None or party.role is not Role.WORKER:
        raise FallowError(Reason.WORKER_UNKNOWN, f"there is no worker {worker_id}", field="worker_id")
    if party.revoked:
        raise revoked(party)
    worker = state.workers[worker_id]
    if worker.quarantined:
        raise quarantined(worker)
    if party.not_after_ms <= now_ms:
        raise FallowError(Reason.CERTIFICATE_EXPIRED, "the worker's certificate has expired", hint="renew it")
    return worker


def _check_window(window: int) -> None:
    if not 0 <= window <= LEASES_PER_WORKER_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"the window is {window}",
            field="window",
            limit=f"0 to {LEASES_PER_WORKER_MAX} leases",
        )


def _check_ask(capability: Capability) -> None:
    check_amount(
        capability.ask_microcredits_per_unit,
        "capability.ask_microcredits_per_unit",
        most=ASK_MICROCREDITS_PER_UNIT_MAX,
    )


def _check_machine(worker: Worker, command: c.OpenSession, now_ms: int) -> None:
    """Keeps out another machine with the same key, whatever token it shows: a copied folder holds that as well."""
    if not command.machine_digest or not worker.machine_digest or command.machine_digest == worker.machine_digest:
        return
    if worker.session_id is None and now_ms - worker.closed_at_ms >= MACHINE_PRIORITY_MS:
        return
    raise FallowError(
        Reason.KEY_IN_USE,
        "another machine works under this key: this folder is a copy of its folder",
        field="machine_digest",
        limit="one machine for each key",
        hint="make this one a worker of its own with `fallow-worker prepare-image` and then `fallow-worker start`;"
        f" if the worker has moved here, stop it there and wait {MACHINE_PRIORITY_MS // MINUTE_MS} minutes",
    )


def _check_token(worker: Worker, command: c.OpenSession) -> None:
    """While a session is open, lets in only who holds its token, or the one shown to get it (a Welcome may be lost).

    While none is open everybody with the key may come: an honest worker may have lost its token with its memory, or
    hold that of a stream whose Hello was overtaken, and a stranger with a copied key could say it has none as well.
    """
    if worker.session_id is None:
        return
    presented = command.resume_token_digest
    if presented is not None and presented in (worker.resume_token_digest, worker.presented_token_digest):
        return
    raise FallowError(
        Reason.KEY_IN_USE,
        "another machine uses this key: its open session was not opened with the token shown",
        field="resume_token",
        hint="if this is a copy of another worker's folder, join with a fresh one; else wait a minute and try again",
    )
