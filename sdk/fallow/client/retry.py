"""How a client waits out a coordinator that is away: jittered, growing, and with an end."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Final

import grpc

from fallow.errors import FallowError, Reason
from fallow.wire.errors import ERROR_METADATA_KEY, error_from_rpc

_log = logging.getLogger(__name__)

BACKOFF_S_MIN: Final = 0.1
BACKOFF_S_MAX: Final = 5.0
PATIENCE_S: Final = 300.0
"""How long the coordinator may be away before a call gives up."""

TRANSIENT_REASONS: Final = frozenset({Reason.COORDINATOR_STOPPING, Reason.OVERLOADED, Reason.COORDINATOR_UNREACHABLE})
_TRANSIENT_STATUSES: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        # What a connection that broke in the middle of a call looks like; told apart from a server's own answer by the
        # missing detail.
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
    }
)


def is_transient(failure: grpc.aio.AioRpcError) -> bool:
    """Whether the same call may well succeed later, nothing being wrong with it."""
    for key, _ in failure.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY:
            return error_from_rpc(failure).reason in TRANSIENT_REASONS
    return failure.code() in _TRANSIENT_STATUSES


_JOBS_GO_ON: Final = "A job that was submitted goes on without this client"


class Backoff:
    """Waits between attempts of one call; success starts it anew."""

    def __init__(self, patience_s: float) -> None:
        """A back-off that gives up after `patience_s` of failure."""
        self._patience_s = patience_s
        self._failing_since: float | None = None
        self._delay_s = BACKOFF_S_MIN
        self.renewed = False
        """Whether the certificate was renewed on account of this call's failures."""
        self.words: FallowError | None = None
        """Why this call fails, as somebody found who looked."""

    def succeeded(self) -> None:
        """The call went through."""
        self._failing_since = None
        self._delay_s = BACKOFF_S_MIN
        self.renewed, self.words = False, None

    async def pause(self, error: FallowError) -> None:
        """Waits a little on account of `error`, or raises it when patience is over."""
        now = asyncio.get_running_loop().time()
        if self._failing_since is None:
            self._failing_since = now
            _log.warning("client.retrying reason=%s %s", error.reason.value, error)
        if now - self._failing_since >= self._patience_s:
            raise FallowError(
                error.reason,
                f"gave up after {self._patience_s:g} s: {error.message}",
                field=error.field,
                limit=error.limit,
                hint=f"{error.hint or 'is the coordinator running?'} {_JOBS_GO_ON}",
            ) from None
        # Half of the delay is chance, so that clients that lost the same coordinator do not come back together.
        await asyncio.sleep(self._delay_s * random.uniform(0.5, 1.0))  # noqa: S311 (no secret)
        self._delay_s = min(self._delay_s * 2, BACKOFF_S_MAX)
