"""How a call to which one still wrote has really ended: the status that its server gave, whatever gRPC says later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import grpc

FAILED_WRITE: Final = "Internal error from Core"
"""What grpc.aio puts in the place of a status when a write fails."""
STATUS_WAIT_S: Final = 2.0
"""For the server's status once a write has failed: both come from the end of the stream, so it is on its way."""
_LOOK_EVERY_S: Final = 0.005

_T = TypeVar("_T")


class CallEnding:
    """Watches one call from its beginning and keeps the status that came from its server.

    A write that is under way when the server ends the call fails, and grpc.aio (1.60 to 1.85, `_write`) then sets
    the call's status to INTERNAL "Internal error from Core": over the server's own when that came first, else until
    it comes. Whoever asks afterwards would never learn why it was refused.
    """

    def __init__(self, call: grpc.aio.Call) -> None:
        """Ask right after the call was made."""
        self._call = call
        self._kept: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._done)

    async def failure(self, heard: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """The failure as the server told it; `heard` itself when nothing better is known in time."""
        if not _is_of_a_write(heard):
            return heard
        deadline_s = time.monotonic() + STATUS_WAIT_S
        while self._kept is None:
            now = self._status()
            if now is not None and not _is_of_a_write(now):
                return now
            if time.monotonic() > deadline_s:
                return heard
            # Nothing tells that a status was set for the second time.
            await asyncio.sleep(_LOOK_EVERY_S)
        return self._kept

    def _done(self, _call: object) -> None:
        """Called as soon as there is a status, before anything else can overwrite it."""
        status = self._status()
        if status is not None and not _is_of_a_write(status):
            self._kept = status

    def _status(self) -> grpc.aio.AioRpcError | None:
        """The status that the call has now, if it has one."""
        if not self._call.done():
            return None
        call = self._call
        code = _at_once(call.code())
        if code is None:
            return None
        return grpc.aio.AioRpcError(
            code,
            _at_once(call.initial_metadata()) or grpc.aio.Metadata(),
            _at_once(call.trailing_metadata()) or grpc.aio.Metadata(),
            _at_once(call.details()),
        )


def _is_of_a_write(failure: grpc.aio.AioRpcError) -> bool:
    return failure.code() is grpc.StatusCode.INTERNAL and failure.details() == FAILED_WRITE


def _at_once(asked: Coroutine[Any, Any, _T]) -> _T | None:
    """What a coroutine gives that needs not wait, as those of a call that is done; None when it would wait."""
    try:
        asked.send(None)
    except StopIteration as answer:
        given: _T = answer.value
        return given
    asked.close()
    return None
