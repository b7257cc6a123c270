"""Sessions: one for each worker, what a reconnect keeps, what a restart and a long absence do."""

from __future__ import annotations

import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import PartyId
from fallow.session import HeldLease
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import events as e
from fallow_coordinator.core.limits import MACHINE_PRIORITY_MS, RESTART_GRACE_MS, SESSION_GRACE_MS
from simulation.core_world import World, capability, digest, of_kind


def busy_world(window: int = 2) -> World:
    """A job of 10,000 rows, one worker `w`, its leases in its hands."""
    world = World().start().ready_bundle()
    world.volunteer("w", window=window)
    world.submit(10_000)
    world.pack_all()
    return world


def only_worker(world: World) -> PartyId:
    return next(worker_id for worker_id, worker in world.state.workers.items() if worker.tier.value == "volunteer")


def test_a_reconnect_with_the_token_replaces_the_half_open_session_and_keeps_what_it_lists() -> None:
    world = busy_world()
    worker_id = only_worker(world)
    kept, dropped = world.leases_of(worker_id)
    old = world.state.workers[worker_id].session_id
    granted = world.connect(worker_id, token=f"{worker_id}#1", held=world.held(kept))
    assert granted.kept == (kept.lease_id,)
    assert kept.session_id == granted.session_id != old
    ended = [event for _, event in world.records if isinstance(event, e.LeaseEnded)]
    assert [(event.lease_id, event.outcome) for event in ended] == [(dropped.lease_id, e.LeaseOutcome.LOST)]
    assert [
        effect.reason_code for effect in of_kind(tuple(world.effects), f.EndSession) if effect.session_id == old
    ] == ["SESSION_REPLACED"]


def test_a_lease_listed_with_another_fence_is_dropped() -> None:
    world = busy_world(window=1)
    worker_id = only_worker(world)
    (lease,) = world.leases_of(worker_id)
    stale = (HeldLease(lease.lease_id, lease.fence + 1, committed=False),)
    granted = world.connect(worker_id, token=f"{worker_id}#1", held=stale)
    assert granted.kept == ()
    assert lease.lease_id in world.state.ended_leases


@pytest.mark.parametrize("token", [None, "guessed"])
def test_a_stranger_with_a_copied_key_is_refused_while_the_session_is_open(token: str | None) -> None:
    world = busy_world()
    worker_id = only_worker(world)
    with pytest.raises(FallowError) as caught:
        world.connect(worker_id, token=token)
    assert caught.value.reason is Reason.KEY_IN_USE
    assert "another machine" in caught.value.message
    assert len(world.leases_of(worker_id)) == 2, "nothing has changed"


def test_lost_welcomes_never_lock_an_honest_worker_out() -> None:
    world = busy_world()
    worker_id = only_worker(world)
    for _ in range(3):  # each Welcome is lost: the worker still has its first token
        world.connect(worker_id, token=f"{worker_id}#1")


def test_a_worker_without_token_may_come_back_after_a_clean_close() -> None:
    world = busy_world()
    worker_id = only_worker(world)
    session_id = world.state.workers[worker_id].session_id
    assert session_id is not None
    world.take(c.CloseSession(session_id, "bye"))
    assert world.take(c.CloseSession(session_id, "bye")).events == (), "a closed session is closed"
    assert world.connect(worker_id).kept == ()


def test_leases_outlive_their_session_for_the_grace_and_no_longer() -> None:
    world = busy_world()
    worker_id = only_worker(world)
    leases = world.leases_of(worker_id)
    session_id = world.state.workers[worker_id].session_id
    assert session_id is not None
    world.take(c.CloseSession(session_id, "link lost"))
    assert world.pass_time(SESSION_GRACE_MS - 1).events == ()
    turn = world.pass_time(1)
    assert [type(event) for event in turn.events] == [e.LeaseEnded, e.WorkerStruck, e.LeaseEnded]
    assert all(world.state.ended_leases[lease.lease_id].outcome is e.LeaseOutcome.LOST for lease in leases)
    assert of_kind(turn.effects, f.SendRevoked) == [], "nobody is there to be told"


def test_a_restart_closes_sessions_lengthens_leases_and_gives_a_longer_grace() -> None:
    world = busy_world()
    worker_id = only_worker(world)
    leases = world.leases_of(worker_id)
    before = [lease.deadline_ms for lease in leases]
    world.now_ms += 50_000
    world.take(c.Restart(epoch=2, down_time_ms=50_000))
    assert world.state.sessions == {}
    assert [lease.deadline_ms for lease in leases] == [deadline_ms + 50_000 for deadline_ms in before]
    assert world.pass_time(RESTART_GRACE_MS - 1).events == ()
    assert world.connect(worker_id, held=world.held(*leases)).kept == tuple(lease.lease_id for lease in leases)
    assert world.pass_time(10_000).events == ()


def test_a_restart_asks_again_for_packings_under_way() -> None:
    world = World().start().ready_bundle()
    world.volunteer("w")
    world.submit(10)
    packing = [task_id for lane in world.state.lanes.values() for task_id in lane.packing]
    assert packing
    turn = world.take(c.Restart(epoch=2, down_time_ms=0))
    assert [effect.task_id for effect in of_kind(turn.effects, f.PackTask)] == packing


def test_a_kept_committed_lease_gets_its_upload_offer_again() -> None:
    world = busy_world(window=1)
    worker_id = only_worker(world)
    (lease,) = world.leases_of(worker_id)
    world.take(world.commit_command(lease, inline=False))
    world.effects.clear()
    granted = world.connect(worker_id, token=f"{worker_id}#1", held=world.held(lease))
    offers = of_kind(tuple(world.effects), f.SendUploadOffer)
    assert offers == [f.SendUploadOffer(granted.session_id, lease.lease_id)]


def test_a_draining_worker_gets_nothing_more_and_may_finish_what_it_has() -> None:
    world = busy_world()
    worker_id = only_worker(world)
    session_id = world.state.workers[worker_id].session_id
    assert session_id is not None
    world.take(c.DrainSession(session_id))
    assert world.take(c.DrainSession(session_id)).events == ()
    for _ in range(2):
        world.work(worker_id)
    world.pack_all()
    assert world.leases_of(worker_id) == []


def test_a_wider_window_is_filled_at_once() -> None:
    world = busy_world(window=1)
    worker_id = only_worker(world)
    session_id = world.state.workers[worker_id].session_id
    assert session_id is not None
    world.take(c.ChangeCapability(session_id, None, 3))
    world.pack_all()
    assert len(world.leases_of(worker_id)) == 3
    assert world.take(c.ChangeCapability(session_id, capability(), 3)).events == (), "nothing new was said"


@pytest.mark.parametrize("window", [-1, 65])
def test_a_window_beyond_the_limit_is_refused(window: int) -> None:
    world = World().start()
    worker_id = world.enroll("w").party_id
    with pytest.raises(FallowError) as caught:
        world.connect(worker_id, window=window)
    assert (caught.value.reason, caught.value.field, caught.value.limit) == (
        Reason.LIMIT_EXCEEDED,
        "window",
        "0 to 64 leases",
    )


def test_no_session_for_clients_the_quarantined_or_expired_certificates() -> None:
    world = World().start()
    worker = world.enroll("w", valid_for_ms=1_000)
    command = c.OpenSession(world.client_id, None, digest("token"), capability(), 1, ())
    with pytest.raises(FallowError) as caught:
        world.take(command)
    assert caught.value.reason is Reason.WORKER_UNKNOWN
    world.take(c.QuarantineWorker(worker.party_id, "odd"))
    with pytest.raises(FallowError, match="odd"):
        world.connect(worker.party_id)
    world.take(c.ReleaseWorker(worker.party_id))
    world.now_ms += 1_000
    with pytest.raises(FallowError) as caught:
        world.connect(worker.party_id)
    assert caught.value.reason is Reason.CERTIFICATE_EXPIRED


def test_another_machine_with_a_copied_folder_is_kept_out_while_the_first_works_and_a_while_longer() -> None:
    world = World().start()
    worker_id = world.enroll("w").party_id

    def hello(machine: bytes, shown: str | None, given: str) -> c.OpenSession:
        token = None if shown is None else digest("token", shown)
        return c.OpenSession(worker_id, token, digest("token", given), capability(), 1, (), machine)

    first, copy = digest("machine 1"), digest("machine 2")
    world.take(hello(first, None, "one"))
    # The copy holds the resume token too.
    with pytest.raises(FallowError, match="another machine works under this key") as caught:
        world.take(hello(copy, "one", "two"))
    assert caught.value.reason is Reason.KEY_IN_USE and "prepare-image" in caught.value.hint
    session_id = world.state.workers[worker_id].session_id
    assert session_id is not None
    world.take(c.CloseSession(session_id, "gone"))
    with pytest.raises(FallowError):
        world.take(hello(copy, "one", "two"))
    world.take(hello(first, "one", "two"))
    session_id = world.state.workers[worker_id].session_id
    assert session_id is not None
    world.take(c.CloseSession(session_id, "gone"))
    # A worker that moved is let in after that.
    world.pass_time(MACHINE_PRIORITY_MS)
    world.take(hello(copy, "two", "three"))
    assert world.state.workers[worker_id].machine_digest == copy
    # Software of before tells no machine.
    session_id = world.state.workers[worker_id].session_id
    assert session_id is not None
    world.take(c.CloseSession(session_id, "gone"))
    world.take(hello(b"", "three", "four"))
