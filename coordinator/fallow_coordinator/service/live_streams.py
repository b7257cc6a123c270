"""Streams that outlive a call: each ends within seconds when its party is revoked or its certificate runs out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from typing import Final

from fallow.errors import FallowError, Reason
from fallow.ids import PartyId

_log = logging.getLogger(__name__)

STREAMS_PER_PARTY_MAX: Final = 64
STREAMS_MAX: Final = 10_000
EXPIRY_CHECK_INTERVAL_S: Final = 1.0


class LiveStream:
    """One open stream of a party; `ended` resolves to the reason when it must go."""

    __slots__ = ("ended", "not_after_ms", "party_id")

    def __init__(self, party_id: PartyId, not_after_ms: int) -> None:
        self.party_id = party_id
        self.not_after_ms = not_after_ms
        """When the newest certificate of the party ends, as far as known here."""
        self.ended: asyncio.Future[FallowError] = asyncio.get_running_loop().create_future()

    def end(self, error: FallowError) -> None:
        """Makes the stream end with `error`; the first reason counts."""
        if not self.ended.done():
            self.ended.set_result(error)


class LiveStreams:
    """Every stream that is open now, and no other."""

    def __init__(self) -> None:
        """Nobody is here yet."""
        self._streams: dict[PartyId, set[LiveStream]] = {}
        self._count = 0
        self._stopping: FallowError | None = None

    def __len__(self) -> int:
        return self._count

    @contextlib.contextmanager
    def open(self, party_id: PartyId, not_after_ms: int) -> Generator[LiveStream, None, None]:
        """A stream while the block runs. Raises OVERLOADED when the party or the coordinator has too many."""
        if self._stopping is not None:
            raise self._stopping
        mine = self._streams.get(party_id, set())
        if len(mine) >= STREAMS_PER_PARTY_MAX or self._count >= STREAMS_MAX:
            raise FallowError(
                Reason.OVERLOADED,
                "too many open streams",
                limit=f"{STREAMS_PER_PARTY_MAX} a party, {STREAMS_MAX} in all",
                hint="close some and try again",
            )
        stream = LiveStream(party_id, not_after_ms)
        self._streams.setdefault(party_id, mine).add(stream)
        self._count += 1
        try:
            yield stream
        finally:
            self._count -= 1
            mine.discard(stream)
            if not mine and self._streams.get(party_id) is mine:
                del self._streams[party_id]

    def end_party(self, party_id: PartyId, error: FallowError) -> None:
        """Ends every stream of a party."""
        for stream in tuple(self._streams.get(party_id, ())):
            stream.end(error)

    def stop(self, error: FallowError) -> None:
        """Ends every stream, and lets no other begin."""
        self._stopping = error
        for party_id in tuple(self._streams):
            self.end_party(party_id, error)

    async def watch_expiry(
        self, not_after_ms_of: Callable[[PartyId], Awaitable[int | None]], now_ms: Callable[[], int]
    ) -> None:
        """Runs for ever: ends streams whose party has no valid certificate any more, and learns of renewals.

        `not_after_ms_of` tells when a party's newest certificate ends, from committed state; None once revoked.
        """
        while True:
            await asyncio.sleep(EXPIRY_CHECK_INTERVAL_S)
            now = now_ms()
            due = [party for party, streams in self._streams.items() if any(s.not_after_ms <= now for s in streams)]
            for party_id in due:
                not_after_ms = await not_after_ms_of(party_id)
                if not_after_ms is None or not_after_ms <= now:
                    self.end_party(party_id, certificate_expired())
                    continue
                for stream in self._streams.get(party_id, ()):
                    stream.not_after_ms = not_after_ms

    def open_by_party(self) -> Counter[PartyId]:
        """How many streams each party has."""
        return Counter({party: len(streams) for party, streams in self._streams.items()})


def certificate_expired() -> FallowError:
    """The answer to a party whose certificate ran out."""
    return FallowError(
        Reason.CERTIFICATE_EXPIRED, "the certificate has expired", hint="renew it; the key is enough to do so"
    )
