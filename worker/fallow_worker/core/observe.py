"""What a happening makes of the world. The only place, with `begun`, where a world changes."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Final, assert_never

from fallow.errors import Reason
from fallow.ids import LeaseId
from fallow.limits import LEASES_PER_WORKER_MAX
from fallow.session import (
    BundleOffer,
    Cause,
    Commitment,
    Delivery,
    GrantsRenewed,
    Lease,
    LeaseReturned,
    LeaseRevoked,
    Refused,
    Settled,
    TaskFailed,
    UploadOffer,
)
from fallow_worker.core import limits
from fallow_worker.core.advertising import advertised
from fallow_worker.core.happenings import (
    CapabilitySeen,
    DrainAsked,
    Fetched,
    FetchFailed,
    FetchTrouble,
    Happening,
    Ran,
    Received,
    RunFailed,
    SessionEnded,
    SessionOpened,
    SlotFreed,
    TimePassed,
    Uploaded,
    UploadFailed,
)
from fallow_worker.core.world import (
    AwaitingGrants,
    Cancelling,
    Connecting,
    Drain,
    Fetching,
    Finishing,
    GivenUp,
    Granted,
    Held,
    Offline,
    Online,
    Phase,
    Ready,
    Running,
    Telling,
    Trouble,
    Uploading,
    UploadWaiting,
    World,
)

_WORTH_SAYING_AGAIN: Final = frozenset(
    {Reason.OVERLOADED.value, Reason.COORDINATOR_STOPPING.value, Reason.STORAGE_FULL.value}
)
"""Refusals that may be over in a while; every other one ends the lease here."""
_PLATFORM_CAUSES: Final = frozenset({Cause.PLATFORM, Cause.WORKER})


def observe(world: World, happening: Happening, now_ms: int) -> World:
    """The world after `happening`. What concerns a lease that is not held, or another fence of it, changes nothing."""
    if world.left:
        return world
    if world.leases:
        world = replace(world, busy_at_ms=now_ms)
    match happening:
        case SessionOpened():
            after = _session_opened(world, happening, now_ms)
        case SessionEnded():
            after = _session_ended(world, happening, now_ms)
        case Received(message=message):
            after = _received(world, message, now_ms)
        case Fetched(lease_id=lease_id):
            after = _in_phase(world, lease_id, Fetching, Ready())
        case FetchFailed():
            after = _fetch_failed(world, happening, now_ms)
        case SlotFreed(lease_id=lease_id):
            after = _slot_freed(world, lease_id, now_ms)
        case Ran() | RunFailed():
            after = _run_ended(world, happening, now_ms)
        case Uploaded():
            after = _uploaded(world, happening)
        case UploadFailed():
            after = _upload_failed(world, happening, now_ms)
        case CapabilitySeen(capability=capability):
            after = replace(world, capability=advertised(world.capability, capability))
        case DrainAsked():
            after = _drain_asked(world, happening, now_ms)
        case TimePassed():
            after = world
        case _:
            assert_never(happening)
    return after


# ------------------------------------------------------------------------------------------------- the session


def _session_opened(world: World, happening: SessionOpened, now_ms: int) -> World:
    attempts = world.session.attempts
    window_said = world.session.window_said if isinstance(world.session, Connecting) else 0
    said = world.session.capability_said if isinstance(world.session, Connecting) else world.capability
    session = Online(
        session_id=happening.session_id,
        opened_at_ms=now_ms,
        heartbeat_interval_ms=happening.heartbeat_interval_ms,
        heartbeat_due_ms=now_ms + happening.heartbeat_interval_ms,
        attempts=attempts,
        window_said=window_said,
        window_due_ms=now_ms + limits.WINDOW_SAID_EVERY_MS,
        capability_said=said,
        capability_said_at_ms=now_ms,
    )
    world = replace(world, session=session)
    for held in tuple(world.leases.values()):
        if held.lease_id not in happening.keep_lease_ids:
            world = _unwanted(world, held)
    return world


def _session_ended(world: World, happening: SessionEnded, now_ms: int) -> World:
    attempts = world.session.attempts
    if isinstance(world.session, Online) and now_ms - world.session.opened_at_ms >= limits.SESSION_HOLDS_MS:
        attempts = 0
    delay_ms = happening.not_before_ms + limits.backoff_ms(
        attempts,
        happening.jitter,
        base_ms=limits.RECONNECT_BASE_MS,
        cap_ms=limits.RECONNECT_CAP_MS,
        least_ms=limits.RECONNECT_LEAST_MS,
    )
    return replace(world, session=Offline(now_ms + delay_ms, attempts + 1))


# ------------------------------------------------------------------------------------------------- what was said


def _received(
    world: World, message: Lease | UploadOffer | Settled | LeaseRevoked | Refused | GrantsRenewed, now_ms: int
) -> World:
    match message:
        case Lease():
            return _lease_received(world, message, now_ms)
        case Refused():
            return _refused(world, message, now_ms)
        case UploadOffer() | Settled() | LeaseRevoked() | GrantsRenewed():
            held = world.leases.get(message.lease_id)
            if held is None or held.fence != message.fence:
                return world
            match message:
                case UploadOffer():
                    return _upload_offered(world, held, message)
                case GrantsRenewed():
                    return _grants_renewed(world, held, message)
                case Settled() | LeaseRevoked():
                    return _unwanted(world, held)
                case _:
                    assert_never(message)
        case _:
            assert_never(message)


def _lease_received(world: World, lease: Lease, now_ms: int) -> World:
    if lease.offer is not None:
        world = _with_offer(world, lease.offer)
    # An offer lives in `offers` from here on, so that a lease does not keep a manifest alive.
    lease = replace(lease, offer=None)
    held = world.leases.get(lease.lease_id)
    if held is not None:
        if held.fence != lease.fence:
            return world
        return _with(world, replace(held, lease=lease, phase=_with_grants(world, held)))
    refusal = _refusal_of(world, lease, now_ms)
    phase: Phase
    if refusal is not None:
        phase = GivenUp(refusal)
    else:
        phase = Granted() if lease.bundle_digest in world.offers else AwaitingGrants(0)
    fresh = Held(lease, phase, world.leases_seen)
    return replace(_with(world, fresh), leases_seen=world.leases_seen + 1, busy_at_ms=now_ms)


def _with_grants(world: World, held: Held) -> Phase:
    """The phase of a lease whose grants were just renewed."""
    if isinstance(held.phase, AwaitingGrants) and held.lease.bundle_digest in world.offers:
        return Granted(held.phase.attempts)
    return held.phase


def _refusal_of(world: World, lease: Lease, now_ms: int) -> LeaseReturned | None:
    """Why this worker does not take a lease, or None when it does."""
    terms = world.terms
    if world.drain is not None:
        return LeaseReturned(lease.lease_id, lease.fence, Cause.OWNER_PREEMPT, world.drain.reason)
    if terms.refusal:
        return LeaseReturned(lease.lease_id, lease.fence, Cause.PLATFORM, terms.refusal)
    if lease.kind not in terms.task_kinds:
        return LeaseReturned(
            lease.lease_id, lease.fence, Cause.PLATFORM, f"this worker does not take {lease.kind.value} tasks"
        )
    if lease.precision not in terms.precisions:
        return LeaseReturned(
            lease.lease_id, lease.fence, Cause.PLATFORM, f"this worker cannot obey precision {lease.precision.value}"
        )
    if len(world.leases) >= LEASES_PER_WORKER_MAX:
        return LeaseReturned(
            lease.lease_id, lease.fence, Cause.PLATFORM, f"more than {LEASES_PER_WORKER_MAX} leases at once"
        )
    if world.trouble is not None and world.trouble.until_ms - now_ms > limits.TROUBLE_RETURN_MS:
        return LeaseReturned(lease.lease_id, lease.fence, Cause.PLATFORM, "this worker's executor is in trouble")
    return None


def _with_offer(world: World, offer: BundleOffer) -> World:
    """The world with an offer named last; the one longest unnamed goes, unless a lease needs it."""
    kept = {digest: known for digest, known in world.offers.items() if digest != offer.bundle_digest}
    kept[offer.bundle_digest] = offer
    if len(kept) > limits.OFFERS_KEPT_MAX:
        needed = {held.lease.bundle_digest for held in world.leases.values()} | {offer.bundle_digest}
        spare = [digest for digest in kept if digest not in needed]
        for digest in spare[: len(kept) - limits.OFFERS_KEPT_MAX]:
            del kept[digest]
    return replace(world, offers=MappingProxyType(kept))


def _upload_offered(world: World, held: Held, offer: UploadOffer) -> World:
    match held.phase:
        case Telling(message=Commitment(), commitment=commitment) if commitment is not None:
            return _with_phase(world, held, UploadWaiting(commitment, offer.grant, 0, 0))
        case UploadWaiting():
            return _with_phase(world, held, replace(held.phase, grant=offer.grant))
        case _:
            return world


def _grants_renewed(world: World, held: Held, renewed: GrantsRenewed) -> World:
    if renewed.offer is not None:
        world = _with_offer(world, renewed.offer)
    lease = held.lease
    if renewed.input_grant is not None:
        lease = replace(lease, input_grant=renewed.input_grant)
    if len(renewed.candidate_grants) == len(lease.candidates):
        renewed_candidates = zip(lease.candidates, renewed.candidate_grants, strict=True)
        lease = replace(lease, candidates=tuple(replace(one, grant=grant) for one, grant in renewed_candidates))
    return _with(world, replace(held, lease=lease, phase=_with_grants(world, held)))


def _refused(world: World, refused: Refused, now_ms: int) -> World:
    held = world.leases.get(refused.lease_id) if refused.lease_id is not None else None
    if held is None:
        return world
    if refused.reason in _WORTH_SAYING_AGAIN:
        if isinstance(held.phase, Telling | GivenUp):
            return _with_phase(world, held, replace(held.phase, said_at_ms=now_ms))
        return world
    return _unwanted(world, held)


# ------------------------------------------------------------------------------------------------- what was done


def _fetch_failed(world: World, happening: FetchFailed, now_ms: int) -> World:
    held = world.leases.get(happening.lease_id)
    if held is None or not isinstance(held.phase, Fetching):
        return world
    attempts = held.phase.attempts + 1
    if happening.trouble is FetchTrouble.GIVE_UP or attempts >= limits.FETCH_ATTEMPTS_MAX:
        # Without a pause the same lease could come back at once, for ever.
        world = _given_back(world, held, Cause.PLATFORM, happening.reason)
        return _troubled(world, happening, now_ms)
    if happening.trouble is FetchTrouble.GRANT_EXPIRED:
        return _with_phase(world, held, AwaitingGrants(attempts))
    delay_ms = _transfer_delay_ms(attempts, happening.jitter)
    return _with_phase(world, held, Granted(attempts, now_ms + delay_ms))


def _slot_freed(world: World, lease_id: LeaseId, now_ms: int) -> World:
    held = world.leases.get(lease_id)
    if held is None or not isinstance(held.phase, Running):
        return world
    return _with_phase(_run_measured(world, now_ms - held.phase.started_at_ms), held, Finishing())


def _run_ended(world: World, happening: Ran | RunFailed, now_ms: int) -> World:
    held = world.leases.get(happening.lease_id)
    if held is None:
        return world
    match held.phase:
        case Finishing():
            pass
        case Running(started_at_ms=started_at_ms):
            if isinstance(happening, Ran) and held.lease.challenge is None:
                world = _run_measured(world, now_ms - started_at_ms)
        case Cancelling(then=None):
            return _gone(world, held)
        case Cancelling(then=LeaseReturned() as returned):
            if isinstance(happening, RunFailed):
                return _with_phase(world, held, GivenUp(returned))
        case _:
            return world
    if isinstance(happening, Ran):
        commitment = happening.message if isinstance(happening.message, Commitment) else None
        world = replace(world, trouble=None)
        return _with_phase(world, held, Telling(happening.message, commitment))
    world = _with_phase(world, held, GivenUp(TaskFailed(held.lease_id, held.fence, happening.cause, happening.reason)))
    if happening.cause in _PLATFORM_CAUSES:
        return _troubled(world, happening, now_ms)
    return replace(world, trouble=None)


def _run_measured(world: World, run_ms: int) -> World:
    typical = (3 * world.run_ms_typical + run_ms) // 4 if world.run_ms_typical else run_ms
    return replace(world, run_ms_typical=max(1, typical))


def _troubled(world: World, happening: RunFailed | FetchFailed | UploadFailed, now_ms: int) -> World:
    failures = world.trouble.failures + 1 if world.trouble else 1
    delay_ms = limits.backoff_ms(
        failures - 1,
        0.5 + happening.jitter / 2,
        base_ms=limits.TROUBLE_BASE_MS,
        cap_ms=limits.TROUBLE_CAP_MS,
    )
    world = replace(world, trouble=Trouble(failures, now_ms + delay_ms))
    if delay_ms > limits.TROUBLE_RETURN_MS:
        for held in tuple(world.leases.values()):
            if isinstance(held.phase, Granted | AwaitingGrants | Fetching | Ready):
                world = _given_back(world, held, Cause.PLATFORM, happening.reason)
    return world


def _uploaded(world: World, happening: Uploaded) -> World:
    held = world.leases.get(happening.lease_id)
    if held is None or not isinstance(held.phase, Uploading):
        return world
    delivery = Delivery(held.lease_id, held.fence, happening.receipt)
    return _with_phase(world, held, Telling(delivery, held.phase.commitment))


def _upload_failed(world: World, happening: UploadFailed, now_ms: int) -> World:
    held = world.leases.get(happening.lease_id)
    if held is None or not isinstance(held.phase, Uploading):
        return world
    phase = held.phase
    attempts = phase.attempts + 1
    if happening.trouble is FetchTrouble.GIVE_UP or attempts >= limits.UPLOAD_ATTEMPTS_MAX:
        failed = TaskFailed(held.lease_id, held.fence, Cause.PLATFORM, happening.reason)
        # The word may have to wait for its answer; the output need not.
        world = replace(world, forgotten=(*world.forgotten, held.lease_id))
        return _troubled(_with_phase(world, held, GivenUp(failed)), happening, now_ms)
    if happening.trouble is FetchTrouble.GRANT_EXPIRED:
        # Repeating a commitment word for word is harmless, and is answered with a fresh grant.
        return _with_phase(world, held, Telling(phase.commitment, phase.commitment))
    delay_ms = _transfer_delay_ms(attempts, happening.jitter)
    return _with_phase(world, held, UploadWaiting(phase.commitment, phase.grant, attempts, now_ms + delay_ms))


def _transfer_delay_ms(attempts: int, jitter: float) -> int:
    return limits.backoff_ms(
        attempts, jitter, base_ms=limits.TRANSFER_RETRY_BASE_MS, cap_ms=limits.TRANSFER_RETRY_CAP_MS
    )


# ------------------------------------------------------------------------------------------------- the owner


def _drain_asked(world: World, happening: DrainAsked, now_ms: int) -> World:
    """A second asking can only shorten the grace."""
    runs_until_ms = now_ms + happening.run_grace_ms
    if world.drain is not None:
        runs_until_ms = min(runs_until_ms, world.drain.runs_until_ms)
    words_grace_ms = min(limits.DRAIN_WORDS_GRACE_MAX_MS, max(limits.DRAIN_WORDS_GRACE_MIN_MS, happening.run_grace_ms))
    drain = Drain(happening.reason, runs_until_ms, runs_until_ms + words_grace_ms)
    world = replace(world, drain=drain)
    for held in tuple(world.leases.values()):
        if isinstance(held.phase, Granted | AwaitingGrants | Fetching | Ready):
            world = _given_back(world, held, Cause.OWNER_PREEMPT, happening.reason)
    return world


# ------------------------------------------------------------------------------------------------- changing leases


def _in_phase(world: World, lease_id: LeaseId, expected: type[Phase], phase: Phase) -> World:
    held = world.leases.get(lease_id)
    if held is None or not isinstance(held.phase, expected):
        return world
    return _with_phase(world, held, phase)


def _with_phase(world: World, held: Held, phase: Phase) -> World:
    return _with(world, replace(held, phase=phase))


def _with(world: World, held: Held) -> World:
    return replace(world, leases=MappingProxyType({**world.leases, held.lease_id: held}))


def _given_back(world: World, held: Held, cause: Cause, reason: str) -> World:
    """Its fetch stops and its input goes at once, though the word may have to wait for a session."""
    world = replace(world, forgotten=(*world.forgotten, held.lease_id))
    return _with_phase(world, held, GivenUp(LeaseReturned(held.lease_id, held.fence, cause, reason)))


def _unwanted(world: World, held: Held) -> World:
    """Nothing of this lease counts any more: a run is stopped first, all else goes at once."""
    match held.phase:
        case Running():
            return _with_phase(world, held, Cancelling(told=False, then=None))
        case Cancelling():
            return _with_phase(world, held, replace(held.phase, then=None))
        case _:
            return _gone(world, held)


def _gone(world: World, held: Held) -> World:
    leases = {lease_id: other for lease_id, other in world.leases.items() if lease_id != held.lease_id}
    return replace(world, leases=MappingProxyType(leases), forgotten=(*world.forgotten, held.lease_id))
