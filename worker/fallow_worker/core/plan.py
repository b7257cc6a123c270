"""What a worker does next: look at the world, return the actions that are due. Level-triggered: nothing is chained.

`plan` says what is due; the caller carries each action out and records it with `begun`. After that, `plan` is empty
until something happens or `next_wake_ms` comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import assert_never

from fallow.ids import LeaseId
from fallow.session import (
    CapabilityChanged,
    Cause,
    Draining,
    GrantsWanted,
    LeaseReturned,
    TaskKind,
)
from fallow_worker.core import limits
from fallow_worker.core.actions import (
    Action,
    Cancel,
    Connect,
    Fetch,
    Forget,
    Leave,
    ReleaseExecutor,
    Run,
    Say,
    SayHeartbeat,
    Upload,
)
from fallow_worker.core.advertising import change_due_ms
from fallow_worker.core.world import (
    AwaitingGrants,
    Cancelling,
    Connecting,
    Fetching,
    GivenUp,
    Granted,
    Held,
    Offline,
    Online,
    Phase,
    Ready,
    Running,
    Telling,
    Uploading,
    UploadWaiting,
    World,
)


def plan(world: World, now_ms: int) -> tuple[Action, ...]:
    """Everything that is due now, most urgent first."""
    if world.left:
        return ()
    if _drained(world, now_ms):
        return (*(Forget(lease_id) for lease_id in (*world.forgotten, *world.leases)), Leave())
    return (
        *(Forget(lease_id) for lease_id in world.forgotten),
        *_session_actions(world, now_ms),
        *_words(world, now_ms),
        *_cancellations(world, now_ms),
        *_runs(world, now_ms),
        *_uploads(world, now_ms),
        *_fetches(world, now_ms),
        *_releases(world, now_ms),
    )


def window_wanted(world: World, now_ms: int) -> int:
    """Leases this worker is ready to hold at once: running, `AHEAD_MS` of work ready beside that, and being delivered.

    0 when it takes nothing; 1 while it finds out whether its executor works again.
    """
    if world.drain is not None or world.terms.refusal:
        return 0
    if world.trouble is not None:
        return 0 if now_ms < world.trouble.until_ms else 1
    typical = world.run_ms_typical
    ahead = min(limits.AHEAD_PER_SLOT_MAX, max(1, -(-limits.AHEAD_MS // typical))) if typical else 1
    return min(limits.WINDOW_MAX, world.terms.slots * (2 + ahead))


def _drained(world: World, now_ms: int) -> bool:
    if world.drain is None:
        return False
    return not world.leases or now_ms >= world.drain.leave_at_ms


# ------------------------------------------------------------------------------------------------- with the coordinator


def _session_actions(world: World, now_ms: int) -> Iterator[Action]:
    match world.session:
        case Offline(retry_at_ms=retry_at_ms):
            if now_ms >= retry_at_ms:
                yield Connect()
        case Connecting():
            return
        case Online() as session:
            if now_ms >= session.heartbeat_due_ms:
                yield SayHeartbeat()
            if world.drain is not None and not session.draining_said:
                yield Say(Draining(world.drain.reason))
            elif world.drain is None and _capability_is_due(world, session, now_ms):
                yield Say(CapabilityChanged(world.capability, window_wanted(world, now_ms)))
            elif world.drain is None and _window_is_due(world, session, now_ms):
                yield Say(CapabilityChanged(None, window_wanted(world, now_ms)))
        case _:
            assert_never(world.session)


def _capability_is_due(world: World, session: Online, now_ms: int) -> bool:
    due_ms = change_due_ms(session.capability_said, world.capability, session.capability_said_at_ms)
    return due_ms is not None and now_ms >= due_ms


def _window_is_due(world: World, session: Online, now_ms: int) -> bool:
    wanted, said = window_wanted(world, now_ms), session.window_said
    if wanted < said:
        return wanted == 0 or 2 * wanted <= said
    if wanted == said or now_ms < session.window_due_ms:
        return False
    return said == 0 or 2 * wanted >= 3 * said


def _words(world: World, now_ms: int) -> Iterator[Action]:
    """What must be said of leases, and said again when no answer came."""
    if not isinstance(world.session, Online):
        return
    session_id = world.session.session_id
    for held in world.leases.values():
        match held.phase:
            case AwaitingGrants(said_in=said_in, said_at_ms=said_at_ms):
                if said_in != session_id or now_ms >= said_at_ms + limits.ANSWER_WAIT_MS:
                    yield Say(GrantsWanted(held.lease_id, held.fence))
            case (
                Telling(message=message, said_in=said_in, said_at_ms=said_at_ms, times=times)
                | GivenUp(message=message, said_in=said_in, said_at_ms=said_at_ms, times=times)
            ):
                if said_in != session_id:
                    yield Say(message)
                elif now_ms >= said_at_ms + limits.ANSWER_WAIT_MS:
                    yield Say(message) if times < limits.ANSWERS_ASKED_MAX else Forget(held.lease_id)
            case _:
                pass


# ------------------------------------------------------------------------------------------------- on this machine


def _cancellations(world: World, now_ms: int) -> Iterator[Action]:
    over = world.drain is not None and now_ms >= world.drain.runs_until_ms
    for held in world.leases.values():
        match held.phase:
            case Cancelling(told=False):
                yield Cancel(held.lease_id)
            case Running() if over or _disturbs(world, held):
                yield Cancel(held.lease_id)
            case _:
                pass


def _disturbs(world: World, held: Held) -> bool:
    """Whether a challenge drains a battery: nobody's rows wait for it."""
    return held.lease.kind is TaskKind.CHALLENGE and world.capability.on_battery


def _by_urgency(world: World, kind: type[Phase]) -> list[Held]:
    """Leases in a phase: those somebody waits for first, then in order of arrival."""
    return sorted(
        (held for held in world.leases.values() if isinstance(held.phase, kind)),
        key=lambda held: (held.lease.latency_ms_max == 0, held.order),
    )


def _runs(world: World, now_ms: int) -> Iterator[Action]:
    runs_max = world.terms.slots + world.terms.runs_queued
    if world.trouble is not None:
        runs_max = 0 if now_ms < world.trouble.until_ms else 1
    free = runs_max - world.runs
    for held in _by_urgency(world, Ready)[: max(0, free)]:
        yield Run(held.lease, world.offers[held.lease.bundle_digest])


def _fetches(world: World, now_ms: int) -> Iterator[Action]:
    free = limits.FETCHES_AT_ONCE_MAX - world.fetches
    bytes_here = sum(
        held.input_bytes for held in world.leases.values() if isinstance(held.phase, Fetching | Ready | Running)
    )
    for held in _by_urgency(world, Granted):
        phase = held.phase
        if free <= 0 or not isinstance(phase, Granted) or now_ms < phase.retry_at_ms:
            continue
        if bytes_here and bytes_here + held.input_bytes > limits.INPUT_BYTES_AHEAD_MAX:
            return
        offer = world.offers.get(held.lease.bundle_digest)
        if offer is None:
            continue
        free -= 1
        bytes_here += held.input_bytes
        yield Fetch(held.lease, offer)


def _uploads(world: World, now_ms: int) -> Iterator[Action]:
    free = limits.UPLOADS_AT_ONCE_MAX - world.uploads
    for held in _by_urgency(world, UploadWaiting):
        phase = held.phase
        if free > 0 and isinstance(phase, UploadWaiting) and now_ms >= phase.retry_at_ms:
            free -= 1
            yield Upload(held.lease_id, phase.grant)


def _releases(world: World, now_ms: int) -> Iterator[Action]:
    if world.executor_warm and not world.leases and now_ms >= world.busy_at_ms + world.terms.idle_release_ms:
        yield ReleaseExecutor()


# ------------------------------------------------------------------------------------------------- what has begun


def begun(world: World, action: Action, now_ms: int) -> World:
    """The world once an action of its plan is under way."""
    match action:
        case Connect():
            return replace(world, session=_connecting(world, now_ms))
        case Say():
            return _said(world, action, now_ms)
        case SayHeartbeat():
            assert isinstance(world.session, Online), "heartbeats are for open sessions"
            due_ms = now_ms + world.session.heartbeat_interval_ms
            return replace(world, session=replace(world.session, heartbeat_due_ms=due_ms))
        case Fetch(lease=lease):
            phase = world.leases[lease.lease_id].phase
            assert isinstance(phase, Granted), "only what is granted is fetched"
            return _with_phase(world, lease.lease_id, Fetching(phase.attempts))
        case Run(lease=lease):
            return replace(_with_phase(world, lease.lease_id, Running(now_ms)), executor_warm=True)
        case Cancel(lease_id=lease_id):
            return _cancel_told(world, world.leases[lease_id])
        case Upload(lease_id=lease_id):
            phase = world.leases[lease_id].phase
            assert isinstance(phase, UploadWaiting), "only what waits for it is uploaded"
            return _with_phase(world, lease_id, Uploading(phase.commitment, phase.grant, phase.attempts))
        case Forget(lease_id=lease_id):
            if lease_id in world.forgotten:
                return replace(world, forgotten=tuple(other for other in world.forgotten if other != lease_id))
            return _without(world, lease_id)
        case ReleaseExecutor():
            return replace(world, executor_warm=False)
        case Leave():
            return replace(world, left=True)
        case _:
            assert_never(action)


def _connecting(world: World, now_ms: int) -> Connecting:
    return Connecting(world.session.attempts, window_wanted(world, now_ms), world.capability)


def _said(world: World, action: Say, now_ms: int) -> World:
    session = world.session
    assert isinstance(session, Online), "words need an open session"
    match action.message:
        case GrantsWanted(lease_id=lease_id):
            phase = world.leases[lease_id].phase
            assert isinstance(phase, AwaitingGrants), "grants are wanted once"
            asked = replace(phase, said_in=session.session_id, said_at_ms=now_ms)
            return _with_phase(world, lease_id, asked)
        case CapabilityChanged(capability=capability, window=window):
            due_ms = now_ms + limits.WINDOW_SAID_EVERY_MS
            session = replace(session, window_said=window, window_due_ms=due_ms)
            if capability is not None:
                session = replace(session, capability_said=capability, capability_said_at_ms=now_ms)
            return replace(world, session=session)
        case Draining():
            return replace(world, session=replace(session, draining_said=True, window_said=0))
        case message:
            phase = world.leases[message.lease_id].phase
            assert isinstance(phase, Telling | GivenUp), "only what waits for an answer is told"
            times = phase.times + 1 if phase.said_in == session.session_id else 1
            told = replace(phase, said_in=session.session_id, said_at_ms=now_ms, times=times)
            return _with_phase(world, message.lease_id, told)


def _cancel_told(world: World, held: Held) -> World:
    if isinstance(held.phase, Cancelling):
        return _with_phase(world, held.lease_id, replace(held.phase, told=True))
    assert world.drain is not None or _disturbs(world, held), "only a drain stops what somebody wants"
    reason = world.drain.reason if world.drain is not None else "the machine runs on its battery"
    returned = LeaseReturned(held.lease_id, held.fence, Cause.OWNER_PREEMPT, reason)
    return _with_phase(world, held.lease_id, Cancelling(told=True, then=returned))


def _with_phase(world: World, lease_id: LeaseId, phase: Phase) -> World:
    held = replace(world.leases[lease_id], phase=phase)
    return replace(world, leases=MappingProxyType({**world.leases, lease_id: held}))


def _without(world: World, lease_id: LeaseId) -> World:
    leases = {other: held for other, held in world.leases.items() if other != lease_id}
    return replace(world, leases=MappingProxyType(leases))


# ------------------------------------------------------------------------------------------------- when to look again


def next_wake_ms(world: World, now_ms: int) -> int | None:
    """The next moment at which something may fall due though nothing happens: later than `now_ms`. None: never."""
    return min((moment for moment in _moments(world, now_ms) if moment > now_ms), default=None)


def _moments(world: World, now_ms: int) -> Iterator[int]:
    if world.left:
        return
    match world.session:
        case Offline(retry_at_ms=retry_at_ms):
            yield retry_at_ms
        case Online() as session:
            yield session.heartbeat_due_ms
            if window_wanted(world, now_ms) != session.window_said:
                yield session.window_due_ms
            change_ms = change_due_ms(session.capability_said, world.capability, session.capability_said_at_ms)
            if change_ms is not None and world.drain is None:
                yield change_ms
        case Connecting():
            pass
    if world.trouble is not None:
        yield world.trouble.until_ms
    if world.drain is not None:
        yield world.drain.runs_until_ms
        yield world.drain.leave_at_ms
    if world.executor_warm and not world.leases:
        yield world.busy_at_ms + world.terms.idle_release_ms
    for held in world.leases.values():
        match held.phase:
            case Granted(retry_at_ms=retry_at_ms) | UploadWaiting(retry_at_ms=retry_at_ms):
                yield retry_at_ms
            case (
                AwaitingGrants(said_at_ms=said_at_ms) | Telling(said_at_ms=said_at_ms) | GivenUp(said_at_ms=said_at_ms)
            ):
                yield said_at_ms + limits.ANSWER_WAIT_MS
            case _:
                pass
