"""Where effects go: to the session, the watcher or the live stream they are for. The engine's `EffectSink`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Generator, Sequence
from typing import Final, assert_never

from fallow.errors import FallowError, Reason
from fallow.ids import JobId, SessionId
from fallow_coordinator.core.effects import (
    CompareRows,
    DropInput,
    Effect,
    EndParty,
    EndSession,
    PackTask,
    SendLease,
    SendRevoked,
    SendSettled,
    SendStanding,
    SendUploadOffer,
    WakeBundleWatchers,
    WakeWatchers,
)
from fallow_coordinator.service.auth import party_revoked
from fallow_coordinator.service.live_streams import LiveStreams

_log = logging.getLogger(__name__)

SessionEffect = SendLease | SendUploadOffer | SendSettled | SendRevoked | SendStanding | EndSession
EARLY_EFFECTS_MAX: Final = 10_000
"""Effects of sessions whose opening has not come back yet; beyond it they are dropped, and repaired on reconnect."""


class Outbox:
    """Routes what has become durable. `apply` never blocks; whoever is routed to has a bounded queue of its own."""

    def __init__(self, streams: LiveStreams) -> None:
        """`streams` are ended when their party is."""
        self._streams = streams
        self._sessions: dict[SessionId, Callable[[SessionEffect], None]] = {}
        self._openings = 0
        self._early: dict[SessionId, list[SessionEffect]] = {}
        self._early_count = 0
        self._watchers: dict[JobId, set[asyncio.Event]] = {}

    @property
    def sessions_open(self) -> int:
        """How many sessions can be sent to."""
        return len(self._sessions)

    def apply(self, effects: Sequence[Effect]) -> None:
        """Acts on effects in order."""
        for effect in effects:
            match effect:
                case SendLease() | SendUploadOffer() | SendSettled() | SendRevoked() | SendStanding() | EndSession():
                    self._to_session(effect)
                case WakeWatchers(job_id):
                    for watcher in self._watchers.get(job_id, ()):
                        watcher.set()
                case EndParty(party_id):
                    self._streams.end_party(party_id, party_revoked())
                case PackTask() | CompareRows() | DropInput() | WakeBundleWatchers():
                    # Packing and comparing are the engine's own, inputs are the collector's. Nobody waits for a bundle
                    # on a stream: jobs wake their watchers.
                    pass
                case _:
                    assert_never(effect)

    @contextlib.contextmanager
    def opening(self) -> Generator[None, None, None]:
        """While a session is being opened: effects for sessions not yet known are kept for `register`."""
        self._openings += 1
        try:
            yield
        finally:
            self._openings -= 1
            if not self._openings:
                self._early.clear()
                self._early_count = 0

    def register(self, session_id: SessionId, deliver: Callable[[SessionEffect], None]) -> None:
        """From now on `deliver` hears of the session's effects, first of those that came early."""
        self._sessions[session_id] = deliver
        for effect in self._early.pop(session_id, ()):
            deliver(effect)

    def forget(self, session_id: SessionId) -> None:
        """The session's stream has ended."""
        self._sessions.pop(session_id, None)

    @contextlib.contextmanager
    def watching(self, job_id: JobId) -> Generator[asyncio.Event, None, None]:
        """An event that is set whenever something about the job changes; the watcher clears it."""
        event = asyncio.Event()
        watchers = self._watchers.setdefault(job_id, set())
        watchers.add(event)
        try:
            yield event
        finally:
            watchers.discard(event)
            if not watchers and self._watchers.get(job_id) is watchers:
                del self._watchers[job_id]

    def _to_session(self, effect: SessionEffect) -> None:
        deliver = self._sessions.get(effect.session_id)
        if deliver is not None:
            deliver(effect)
        elif self._openings and self._early_count < EARLY_EFFECTS_MAX:
            self._early.setdefault(effect.session_id, []).append(effect)
            self._early_count += 1
        else:
            _log.debug("effect.dropped session=%s kind=%s", effect.session_id, type(effect).__name__)


def session_ended(effect: EndSession) -> FallowError:
    """What the worker is told when the core ends its session."""
    try:
        reason = Reason(effect.reason_code)
    except ValueError:
        reason = Reason.INTERNAL
    return FallowError(reason, effect.reason or "the session was ended")
