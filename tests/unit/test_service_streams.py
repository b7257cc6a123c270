"""Live streams, and where effects go."""

from __future__ import annotations

import asyncio

import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import Digest, JobId, LeaseId, PartyId, SessionId, TaskId
from fallow_coordinator.core.effects import (
    EndParty,
    EndSession,
    PackTask,
    SendLease,
    SendSettled,
    WakeBundleWatchers,
    WakeWatchers,
)
from fallow_coordinator.service import live_streams
from fallow_coordinator.service.live_streams import STREAMS_PER_PARTY_MAX, LiveStreams
from fallow_coordinator.service.outbox import Outbox, SessionEffect

PARTY, OTHER = PartyId("worker-a"), PartyId("worker-b")
SESSION = SessionId("session-a")


async def test_end_of_a_party_ends_its_streams_alone() -> None:
    streams = LiveStreams()
    with streams.open(PARTY, 10) as first, streams.open(PARTY, 10) as second, streams.open(OTHER, 10) as third:
        Outbox(streams).apply([EndParty(PARTY)])
        assert {stream.ended.result().reason for stream in (first, second)} == {Reason.PARTY_REVOKED}
        assert not third.ended.done()
    assert len(streams) == 0


async def test_streams_of_a_party_have_a_limit_and_closed_ones_make_room() -> None:
    streams = LiveStreams()
    opened = [streams.open(PARTY, 10) for _ in range(STREAMS_PER_PARTY_MAX)]
    for one in opened:
        one.__enter__()
    with pytest.raises(FallowError) as caught, streams.open(PARTY, 10):
        pass
    assert caught.value.reason is Reason.OVERLOADED
    with streams.open(OTHER, 10):
        assert len(streams) == STREAMS_PER_PARTY_MAX + 1
    opened[0].__exit__(None, None, None)
    with streams.open(PARTY, 10):
        pass
    for one in opened[1:]:
        one.__exit__(None, None, None)
    assert len(streams) == 0


async def test_stopping_ends_all_streams_and_lets_none_begin() -> None:
    streams = LiveStreams()
    stopping = FallowError(Reason.COORDINATOR_STOPPING, "stopping")
    with streams.open(PARTY, 10) as stream:
        streams.stop(stopping)
        assert stream.ended.result() is stopping
        with pytest.raises(FallowError) as caught, streams.open(OTHER, 10):
            pass
        assert caught.value is stopping


async def test_expired_certificate_ends_a_stream_and_a_renewal_saves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_streams, "EXPIRY_CHECK_INTERVAL_S", 0)
    ends = {PARTY: 100, OTHER: 500}
    asked: list[PartyId] = []
    now_ms = 0

    async def not_after_ms(party_id: PartyId) -> int | None:
        asked.append(party_id)
        return ends.get(party_id)

    streams = LiveStreams()
    watching = asyncio.create_task(streams.watch_expiry(not_after_ms, lambda: now_ms))
    with streams.open(PARTY, 100) as renewed, streams.open(OTHER, 500) as lapsing:
        for _ in range(10):
            await asyncio.sleep(0)
        assert not asked, "nothing is read while nothing is due"
        ends[PARTY] = 1_000
        now_ms = 100
        async with asyncio.timeout(5):
            while renewed.not_after_ms != 1_000:  # noqa: ASYNC110 - turns of the loop, no time
                await asyncio.sleep(0)
        now_ms = 500
        error = await asyncio.wait_for(asyncio.shield(lapsing.ended), 5)
        assert error.reason is Reason.CERTIFICATE_EXPIRED
        assert not renewed.ended.done()
        del ends[PARTY]
        now_ms = 1_000
        assert (await asyncio.wait_for(asyncio.shield(renewed.ended), 5)).reason is Reason.CERTIFICATE_EXPIRED
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_effects_that_outrun_their_session_are_kept_while_it_opens() -> None:
    outbox = Outbox(LiveStreams())
    heard: list[SessionEffect] = []
    early, later = SendLease(SESSION, LeaseId("lease-1")), SendSettled(SESSION, LeaseId("lease-1"), 1, 0)
    outbox.apply([SendLease(SESSION, LeaseId("lease-0"))])
    with outbox.opening():
        outbox.apply([early, SendLease(SessionId("session-b"), LeaseId("lease-9"))])
        outbox.register(SESSION, heard.append)
    outbox.apply([later])
    assert heard == [early, later], "in order, and nothing from before the opening"
    outbox.forget(SESSION)
    outbox.apply([EndSession(SESSION, "SESSION_REPLACED", "x")])
    assert len(heard) == 2
    assert outbox.sessions_open == 0


async def test_early_effects_do_not_outlive_the_openings() -> None:
    outbox = Outbox(LiveStreams())
    with outbox.opening():
        outbox.apply([SendLease(SESSION, LeaseId("lease-1"))])
    heard: list[SessionEffect] = []
    outbox.register(SESSION, heard.append)
    assert heard == []


async def test_watchers_of_a_job_are_woken_and_no_others() -> None:
    outbox = Outbox(LiveStreams())
    with outbox.watching(JobId("job-a")) as mine, outbox.watching(JobId("job-b")) as theirs:
        outbox.apply(
            [WakeWatchers(JobId("job-a")), PackTask(TaskId("task-a"), 1), WakeBundleWatchers(Digest(b"d" * 32))]
        )
        assert mine.is_set()
        assert not theirs.is_set()
    outbox.apply([WakeWatchers(JobId("job-a"))])
